"""What a publish that fails leaves: the bytes, wherever they can be, and never unnoticed."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from safefs import backing, placing
from safefs import publisher as publisher_module
from safefs.backing import Backing
from safefs.draft import Base, Draft, DraftState, DraftTable
from safefs.errors import PublishRefusedError
from safefs.events import EventLog
from safefs.files import Files
from safefs.filesystem import FileSystem
from safefs.gate import Gate
from safefs.identity import Identities
from safefs.model import Caller, Identity
from safefs.namespace import Node
from safefs.publisher import Publisher
from safefs.rules import NameClass, Verify
from safefs.seal import ALONGSIDE_BYTES
from safefs.state import DaemonRecord, StateDirectory
from safefs.tree import Tree

NAME = b"name"


@dataclass
class Stage:
    """A publisher, and a draft of the root's that is about to be published."""

    root: Path
    store: Backing
    state: StateDirectory
    publisher: Publisher
    draft: Draft

    def kept(self) -> dict[str, bytes]:
        """The quarantine: reason and bytes."""
        return {str(kept.record["reason"]): kept.file.read_bytes() for kept in self.state.kept()}


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    store = Backing(tmp_path, Identities(impersonate=False), max_threads=1)
    state = StateDirectory(tmp_path / ".safefs", store.identities)
    record = DaemonRecord(state, store.node_id, {})
    events = EventLog(state.events, store.node_id)
    root = Node(1, backing.identity_of(tmp_path.stat()), stat.S_IFDIR)
    root.fd = store.root_fd
    fd, temp_name, status = store.make_temp(store.root_fd, 0o644, store.hidden_name(b"d"))
    os.truncate(fd, ALONGSIDE_BYTES)
    draft = Draft(
        write_id="0123456789abcdef",
        node=Node(2, Identity(0, 0), stat.S_IFREG),
        directory=root,
        name=NAME,
        name_class=NameClass.PRIVATE,
        caller=Caller(os.getuid(), os.getgid()),
        opener=None,
        pidfd=-1,
        fd=fd,
        temp_name=temp_name,
        shown_ino=status.st_ino,
        gate=Gate(),
        created=True,
        fresh=True,
        modified=True,
        size=ALONGSIDE_BYTES,
    )
    yield Stage(tmp_path, store, state, Publisher(store, state, record, events, Verify.CACHE, retain_seconds=0), draft)
    record.remove()
    for opened in (draft.fd, draft.version_fd, state.quarantine_fd, store.root_fd):
        if opened >= 0:
            os.close(opened)


def test_a_long_file_is_published_where_no_more_threads_can_be_started(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncing and reading it at once would take one beside the worker that there is."""
    refused = []

    def refuse(thread: threading.Thread) -> None:
        refused.append(thread.name)
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        await stage.store.workers.run(int)  # its thread stays
        monkeypatch.setattr(threading.Thread, "start", refuse)
        await stage.publisher.publish(stage.draft)

    trio.run(main)
    assert refused == ["safefs-sync"]
    assert stage.draft.state is DraftState.PUBLISHED
    assert (stage.root / "name").stat().st_size == ALONGSIDE_BYTES
    assert stage.kept() == {}


@pytest.mark.parametrize("failure", [RuntimeError("a defect"), MemoryError()], ids=repr)
def test_what_could_not_be_published_is_kept_whatever_was_raised(
    stage: Stage, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_order: placing.Order) -> placing.Placed:
        raise failure

    monkeypatch.setattr(publisher_module, "carry_out", fail)
    with pytest.raises(PublishRefusedError) as refused:
        trio.run(stage.publisher.publish, stage.draft)
    assert refused.value.errno == stage.draft.error == errno.EIO
    assert stage.draft.state is DraftState.QUARANTINED
    assert stage.kept() == {f"publishing failed: {failure!r}": bytes(ALONGSIDE_BYTES)}
    assert not (stage.root / "name").exists()
    assert failure in [record.exc_info[1] for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_further_round_that_cannot_be_compared_counts_as_written(
    stage: Stage, is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the kernel wrote anything in it is seen by its bytes alone."""

    def fail(_one: int, _other: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(backing, "same_contents", fail)
    publisher, draft, shown = stage.publisher, stage.draft, stage.root / "name"
    shown.write_bytes(b"before")
    draft.copied, draft.fresh = True, False
    draft.base = Base(os.open(shown, os.O_RDONLY), backing.identity_of(shown.stat()))
    if is_killed:
        trio.run(publisher.refuse, draft, "its writer was killed", errno.EINTR)
        assert stage.kept() == {"its writer was killed": bytes(ALONGSIDE_BYTES)}
        assert shown.read_bytes() == b"before"
        os.close(draft.base.fd)
    else:
        trio.run(publisher.publish, draft)
        assert draft.state is DraftState.PUBLISHED
        assert shown.read_bytes() == bytes(ALONGSIDE_BYTES)


# ------------------------------------------------------- what is given up


class Hanging:
    """A call to the backing that does not come back before it is told to."""

    def __init__(self) -> None:
        self._began, self._comes_back = threading.Event(), threading.Event()
        self.order: placing.Order | None = None

    def __call__(self, *arguments: Any) -> Any:
        self.order = next((each for each in arguments if isinstance(each, placing.Order)), None)
        self._began.set()
        self._comes_back.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def give_up(self, store: Backing, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Cancel who waits for it, and see it end afterwards."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(function, *arguments)
                await trio.to_thread.run_sync(self._began.wait)
                nursery.cancel_scope.cancel()
        finally:
            self._comes_back.set()
        await store.workers.quiet()


@pytest.mark.parametrize("temp", ["tmpfile", "hidden"])
@pytest.mark.parametrize("call", ["carry_out", "take_place"])
def test_a_copy_that_is_given_up_keeps_its_descriptor(
    stage: Stage, call: str, temp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread goes on with it: if its number were used again, the name would show another file."""
    closed = list[int]()
    monkeypatch.setattr(publisher_module, "native", SimpleNamespace(close_later=closed.append))
    hanging = Hanging()
    monkeypatch.setattr(publisher_module, call, hanging)
    publisher, draft = stage.publisher, stage.draft
    monkeypatch.setattr(stage.store, "_tries_tmpfile", lambda _directory: temp == "tmpfile")
    draft.unseen = True
    if call == "carry_out":
        trio.run(hanging.give_up, stage.store, partial(publisher.publish, keep_private=True), draft)
    else:
        draft.state, draft.base = DraftState.PUBLISHED, Base(draft.fd, backing.identity_of(os.fstat(draft.fd)))
        trio.run(hanging.give_up, stage.store, publisher.detach, draft)
    assert hanging.order is not None
    assert hanging.order.inode.fd != draft.fd
    assert closed == []
    assert publisher.has_left
    os.close(hanging.order.inode.fd)


@pytest.mark.parametrize("call", ["carry_out", "take_place"])
def test_a_copy_that_cannot_be_placed_leaves_nothing(stage: Stage, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, copies = list[int](), list[placing.PrivateInode]()

    def fail(order: placing.Order) -> placing.Placed:
        copies.append(order.inode)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(publisher_module, "native", SimpleNamespace(close_later=closed.append))
    monkeypatch.setattr(publisher_module, call, fail)
    publisher, draft = stage.publisher, stage.draft
    monkeypatch.setattr(stage.store, "_tries_tmpfile", lambda _directory: False)
    draft.unseen = True
    if call == "carry_out":
        with pytest.raises(PublishRefusedError):
            trio.run(partial(publisher.publish, keep_private=True), draft)
    else:
        draft.state, draft.base = DraftState.PUBLISHED, Base(draft.fd, backing.identity_of(os.fstat(draft.fd)))
        with pytest.raises(OSError, match="Input/output error"):
            trio.run(publisher.detach, draft)
    assert closed == [copies[0].fd] != [draft.fd]
    assert copies[0].temp_name is not None
    assert os.fsdecode(copies[0].temp_name) not in os.listdir(stage.root)
    assert not publisher.has_left
    os.close(copies[0].fd)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), MemoryError(), None], ids=repr)
def test_what_is_not_kept_stays_under_its_hidden_name(
    stage: Stage, filesystem: Any, failure: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where keeping it is given up, and fails then: the next daemon finds it."""
    publisher, draft = stage.publisher, stage.draft
    draft.temp_name = stage.store.hidden_name(b"d")
    hidden = stage.root / os.fsdecode(draft.temp_name)
    hidden.write_bytes(b"precious")
    hanging = Hanging()

    def fail(*_arguments: Any) -> None:
        assert failure is not None
        raise failure

    monkeypatch.setattr(stage.state, "keep", hanging if failure is None else fail)

    async def main() -> None:
        refusal = draft, "its writer was killed", errno.EINTR
        if failure is None:
            await hanging.give_up(stage.store, publisher.refuse, *refusal)
        else:
            await publisher.refuse(*refusal)
        await filesystem.drop_temp(draft)  # as at the end of a draft, and of a daemon

    trio.run(main)
    assert draft.state is DraftState.QUARANTINED
    assert draft.error == errno.EINTR
    assert hidden.read_bytes() == b"precious"
    assert publisher.has_left
    assert publisher.counts["quarantined"] == 0


# ------------------------------------------------- hidden files that stay


@pytest.fixture
def filesystem(stage: Stage) -> Any:
    """What Files and Tree need of one to drop a hidden name."""
    fs = SimpleNamespace(
        backing=stage.store,
        publisher=stage.publisher,
        nodes=SimpleNamespace(note_private=lambda _node, _identity: None),
        note_capability=lambda _draft: None,
        unlist_draft=lambda _draft: None,
    )
    fs.drop_temp = partial(FileSystem.drop_temp, fs)
    return fs


def hide(stage: Stage, monkeypatch: pytest.MonkeyPatch, number: int) -> Path:
    """Give the draft a hidden name, which cannot be removed."""

    def fail(_directory: int, _name: bytes) -> None:
        raise OSError(number, os.strerror(number))

    stage.draft.temp_name = stage.store.hidden_name(b"d")
    hidden = stage.root / os.fsdecode(stage.draft.temp_name)
    hidden.touch()
    monkeypatch.setattr(backing, "unlink", fail)
    return hidden


def renaming(stage: Stage) -> tuple[Any, Node]:
    """What `rename_draft` needs, and another directory; the draft has a hidden name, and no other any more."""
    (stage.root / "b").mkdir()
    new = Node(3, backing.identity_of((stage.root / "b").stat()), stat.S_IFDIR)
    new.fd = os.open(stage.root / "b", os.O_PATH)
    draft = stage.draft
    draft.temp_name = stage.store.hidden_name(b"d")
    backing.link_inode(draft.fd, draft.directory.fd, draft.temp_name)
    fs: Any = SimpleNamespace(
        backing=stage.store,
        publisher=stage.publisher,
        drafts=DraftTable(),
        unpin=lambda _node: None,
        _hear_closes_of=lambda _name, _before: None,
    )
    fs._move_temp = partial(FileSystem._move_temp, fs)
    return fs, new


def test_who_comes_to_publish_while_a_hidden_file_is_moved_publishes_under_the_new_name(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close by another thread; the version itself has its new name by then."""
    fs, new = renaming(stage)
    rename, moves, goes_on = backing.rename, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        moves.set()
        assert goes_on.wait(10)
        rename(*arguments)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patched:
                patched.setattr(backing, "rename", slow)
                nursery.start_soon(FileSystem.rename_draft, fs, stage.draft, new, b"renamed")
                await trio.to_thread.run_sync(moves.wait, 10)
            nursery.start_soon(stage.publisher.publish, stage.draft)
            await trio.testing.wait_all_tasks_blocked()
            goes_on.set()

    trio.run(main)
    assert os.path.samestat((stage.root / "b/renamed").stat(), os.fstat(stage.draft.fd))
    assert not (stage.root / "name").exists()
    assert (stage.draft.directory, stage.draft.name) == (new, b"renamed")
    os.close(new.fd)


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_hidden_file_that_cannot_follow_its_draft_is_not_forgotten(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """The rename of the name has been done by then: the draft is published by its descriptor."""
    (fs, new), draft, old = renaming(stage), stage.draft, stage.draft.directory
    assert draft.temp_name is not None
    hidden = stage.root / os.fsdecode(draft.temp_name)

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as scope:

            def fail(*_: object) -> None:
                if cancelled:
                    trio.from_thread.run_sync(scope.cancel, trio_token=token)
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

            with monkeypatch.context() as patched:
                patched.setattr(backing, "rename", fail)
                await FileSystem.rename_draft(fs, draft, new, b"renamed")
        assert scope.cancelled_caught is cancelled
        assert (draft.directory, draft.name) == ((old, NAME) if cancelled else (new, b"renamed"))
        assert draft.temp_name is None
        assert stage.publisher.has_left
        assert not draft.gate.is_closed
        await stage.publisher.publish(draft)

    trio.run(main)
    published = stage.root / ("name" if cancelled else "b/renamed")
    assert published.samefile(hidden)  # for the next daemon to settle
    os.close(new.fd)


UNLINKS = pytest.mark.parametrize(("number", "stays"), [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOENT, False)])


@UNLINKS
def test_a_hidden_file_that_stays_when_its_draft_is_removed_is_not_forgotten(
    stage: Stage, filesystem: Any, monkeypatch: pytest.MonkeyPatch, number: int, stays: bool
) -> None:
    """The daemon keeps its record then; and it tries again where the draft ends."""
    draft = stage.draft
    hide(stage, monkeypatch, number)
    trio.run(Tree(filesystem, Files(filesystem), refresh_misses=False)._cancel, draft)
    assert draft.discarded
    assert stage.publisher.has_left is stays
    assert (draft.temp_name is not None) is stays


@UNLINKS
def test_a_hidden_file_that_stays_when_a_partial_file_is_taken_over_is_not_forgotten(
    stage: Stage, filesystem: Any, monkeypatch: pytest.MonkeyPatch, number: int, stays: bool
) -> None:
    """And the download goes on where it stopped."""
    draft, partial_file = stage.draft, stage.root / "name"
    partial_file.write_bytes(b"half")
    base = Base(os.open(partial_file, os.O_RDONLY), backing.identity_of(partial_file.stat()))
    draft.base = base
    hidden = hide(stage, monkeypatch, number)
    assert trio.run(Files(filesystem)._take_over, draft, base)
    assert stage.publisher.has_left is stays
    assert draft.temp_name is not None
    assert draft.temp_name != os.fsencode(hidden.name)
    assert os.pread(draft.fd, 5, 0) == (stage.root / os.fsdecode(draft.temp_name)).read_bytes() == b"half"
    for fd in draft.spare_fds:
        os.close(fd)
