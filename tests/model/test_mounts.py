"""Mounts against a reference: what a writer does, what it sees itself, and what a stranger sees meanwhile.

Writer and stranger are on one mount; or on two, where the stranger and a program beside both mounts write as well, to
names that have no draft (tests/model/test_conflicts.py is about those).

The reference is a plain directory that always holds what is published: what a stranger may see.  Pending writes are
kept beside it, in memory, and reach it by rename when their last handle closes.  That is where the contract differs
from POSIX, and all of it is in `Reference`:

- an open write handle's bytes are its family's own until the last of the handles on that name closes;
- a publish is a new inode for one name: other hard links keep the old content;
- rename or link of an open draft publishes it there and then; writing on starts the next round;
- unlink of an open draft, and a rename over it, cancels it.

The errno of a change of names is POSIX's own: for the time of the call the family's new files lie in the plain
directory as placeholders.

`SAFEFS_MODEL_EXAMPLES` says how many examples are tried, `SAFEFS_MODEL_STEPS` how long they are.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.mount.actors import Actor, actor
from tests.support.mounting import mounted

EXAMPLES = int(os.environ.get("SAFEFS_MODEL_EXAMPLES", "100"))
STEPS = int(os.environ.get("SAFEFS_MODEL_STEPS", "14"))
AT_LENGTH = "SAFEFS_MODEL_EXAMPLES" in os.environ
UMASK = 0o022
SIZE_LIMIT = 1 << 20

# Loaded into the actors, and used by the reference on its own directory.
OBSERVE = r"""
import errno, os, stat
def look(path):
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        return ("link", os.readlink(path), status.st_nlink)
    mode = stat.S_IMODE(status.st_mode)
    if kind == stat.S_IFDIR:
        return ("directory", mode, sorted(os.listdir(path)))
    with open(path, "rb") as file:
        content = file.read()
        opened = os.fstat(file.fileno())
    return ("file", mode, status.st_nlink, status.st_size, opened.st_size, content)
def walk(root):
    seen = {}
    waiting = [""]
    while waiting:
        path = waiting.pop()
        seen[path] = look(os.path.join(root, path))
        if seen[path][0] == "directory":
            waiting += [os.path.join(path, name) for name in seen[path][2]]
    return seen
def attempt(function, *arguments):
    try:
        return function(*arguments), 0
    except OSError as error:
        return None, error.errno
"""
observe: dict[str, Any] = {}
exec(OBSERVE, observe)

NAMES = ["a", "b", "p", "q", "p/a", "p/b", "q/a", "q/p"]
anywhere = st.sampled_from(NAMES)
# Most of the time a name that is there, or the name of a draft.
there = st.runner().flatmap(lambda machine: st.sampled_from(machine.family_names() or NAMES))
drafts = st.runner().flatmap(lambda machine: st.sampled_from(sorted(machine.reference.drafts) or NAMES))
missing = st.runner().flatmap(
    lambda machine: st.sampled_from([name for name in NAMES if name not in machine.family_names()] or NAMES)
)
paths = st.one_of(there, anywhere, drafts)
payloads = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.builds(lambda byte, count: bytes([byte]) * count, st.integers(1, 255), st.sampled_from([4096, 5000, 70000])),
)
offsets = st.sampled_from([0, 1, 5, 4095, 4096, 9000])
sizes = st.sampled_from([0, 1, 7, 4096, 10000])
modes = st.sampled_from([0o600, 0o644, 0o755, 0o666])


@dataclass(eq=False)
class Pending:
    """What one family writes under one name."""

    path: str
    created: bool  # there is no version of that name
    content: bytearray | None = None  # None: nothing written in this round, so it is the version's
    mode: int = 0
    discarded: bool = False
    handles: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Handle:
    """An open write handle of the writer."""

    descriptor: int
    draft: Pending
    flags: int


class Reference:
    """What has to be seen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.drafts: dict[str, Pending] = {}
        self._count = itertools.count()
        self._scratch = root.with_name(root.name + ".scratch")
        self._scratch.mkdir()

    def at(self, path: str) -> str:
        return os.path.join(self.root, path)

    def attempt(self, function: Callable[..., object], *arguments: object) -> int:
        """A change of names, among the family's names."""
        for draft in self.drafts.values():
            if draft.created:
                os.close(os.open(self.at(draft.path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        return int(observe["attempt"](function, *arguments)[1])

    def clear(self) -> None:
        """Take the placeholders away, wherever they are by now."""
        for draft in self.drafts.values():
            if draft.created:
                os.unlink(self.at(draft.path))

    def change(self, function: Callable[..., object], *arguments: object) -> int:
        """A change that moves and removes no file."""
        number = self.attempt(function, *arguments)
        self.clear()
        return number

    def version(self, path: str) -> tuple[bytearray, int]:
        with open(self.at(path), "rb") as file:
            return bytearray(file.read()), stat.S_IMODE(os.fstat(file.fileno()).st_mode)

    def prepare(self, draft: Pending) -> bytearray:
        """The draft's bytes, to be changed."""
        if draft.content is None:
            draft.content, draft.mode = self.version(draft.path)
        return draft.content

    def publish(self, draft: Pending) -> None:
        if draft.content is not None and not draft.discarded:
            temporary = self._scratch / str(next(self._count))
            temporary.write_bytes(draft.content)
            temporary.chmod(draft.mode)
            temporary.rename(self.at(draft.path))
            draft.content, draft.created = None, False

    def discard(self, draft: Pending) -> None:
        """Before its version goes."""
        if draft.content is None:
            draft.content, draft.mode = self.version(draft.path)
        draft.discarded = True
        del self.drafts[draft.path]

    def move(self, draft: Pending, path: str) -> None:
        del self.drafts[draft.path]
        draft.path = path
        self.drafts[path] = draft

    def opened(self, path: str, flags: int, mode: int) -> tuple[Pending | None, int]:
        """open(2) for writing: the draft it leads to."""
        draft = self.drafts.get(path)
        missing = draft is None and not os.path.lexists(self.at(path))
        probe = flags & ~(os.O_TRUNC | os.O_APPEND)
        number = self.change(lambda: os.close(os.open(self.at(path), probe, 0o600)))
        if number:
            return None, number
        if missing:
            os.unlink(self.at(path))
            draft = Pending(path, True, bytearray(), mode & ~UMASK)
        elif draft is None:
            draft = Pending(path, False)
        assert draft is not None
        self.drafts[path] = draft
        if flags & os.O_TRUNC:
            del self.prepare(draft)[:]
        return draft, 0

    def resize(self, draft: Pending, size: int) -> None:
        content = self.prepare(draft)
        del content[size:]
        content.extend(bytes(size - len(content)))

    def write(self, draft: Pending, offset: int, data: bytes) -> None:
        content = self.prepare(draft)
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data

    def size(self, draft: Pending) -> int:
        return len(draft.content) if draft.content is not None else os.stat(self.at(draft.path)).st_size

    def content(self, draft: Pending) -> bytes:
        return bytes(draft.content if draft.content is not None else self.version(draft.path)[0])

    def seen_by_strangers(self) -> dict[str, Any]:
        return dict(observe["walk"](os.fspath(self.root)))

    def seen_by_family(self) -> dict[str, Any]:
        seen = self.seen_by_strangers()
        for draft in self.drafts.values():
            if draft.created:
                parent = os.path.dirname(draft.path)
                kind, mode, names = seen[parent]
                seen[parent] = (kind, mode, sorted([*names, os.path.basename(draft.path)]))
            if draft.content is not None:
                size = len(draft.content)
                seen[draft.path] = ("file", draft.mode, None, size, size, bytes(draft.content))
            else:
                seen[draft.path] = without_links(seen[draft.path])
        return seen


def without_links(seen: Any) -> Any:
    """A file's link count is not promised while it is a draft."""
    return (*seen[:2], None, *seen[3:])


@dataclass
class Setup:
    """What all examples share."""

    mount: Path
    strangers_mount: Path
    backing: Path
    reference: Path
    writer: Actor
    stranger: Actor
    numbers: Iterator[int] = field(default_factory=itertools.count)


class OneMount(RuleBasedStateMachine):
    """One example, in directories of its own."""

    setup_of_all: Setup

    handles = Bundle("handles")
    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        shared = self.setup_of_all
        name = str(next(shared.numbers))
        self.writer, self.stranger = shared.writer, shared.stranger
        self.root, self.strangers_root = shared.mount / name, shared.strangers_mount / name
        self.backing = shared.backing / name
        reference = shared.reference / name
        reference.mkdir()
        self.reference = Reference(reference)
        self.open_handles: list[Handle] = []
        self.open_readers: dict[int, bytes] = {}
        self.writer("os.mkdir(p)", p=os.fspath(self.root))

    def at(self, path: str) -> str:
        return os.path.join(self.root, path)

    def do(self, call: str, *arguments: object) -> tuple[Any, int]:
        """A system call of the writer: its result and its errno."""
        value, number = self.writer(f"attempt(os.{call}, *arguments)", arguments=arguments)
        return value, number

    @initialize(files=st.sets(st.sampled_from(["a", "p/a", "q/a"]), max_size=2))
    def begin(self, files: set[str]) -> None:
        for path in ("p", "q"):
            self.mkdir(path)
        for path in sorted(files):
            handle = self._open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            if handle is not None:
                self._write(handle, 0, b"first version of " + path.encode())
                self._close(handle)

    # ------------------------------------------------------------ contents

    def _open(self, path: str, flags: int, mode: int) -> Handle | None:
        flags |= os.O_NOFOLLOW
        draft, expected = self.reference.opened(path, flags, mode)
        descriptor, number = self.do("open", self.at(path), flags, mode)
        assert number == expected, f"open: {errno.errorcode.get(number)}, not {errno.errorcode.get(expected)}"
        if draft is None:
            return None
        handle = Handle(descriptor, draft, flags)
        draft.handles.append(descriptor)
        self.open_handles.append(handle)
        return handle

    def _write(self, handle: Handle, offset: int, data: bytes) -> None:
        if handle.flags & os.O_APPEND:
            offset = self.reference.size(handle.draft)
            written, number = self.do("write", handle.descriptor, data)
        else:
            written, number = self.do("pwrite", handle.descriptor, data, offset)
        assert (written, number) == (len(data), 0)
        self.reference.write(handle.draft, offset, data)

    def _close(self, handle: Handle) -> None:
        self.open_handles.remove(handle)
        draft = handle.draft
        draft.handles.remove(handle.descriptor)
        if not draft.handles and not draft.discarded:
            self.reference.publish(draft)
            del self.reference.drafts[draft.path]
        assert self.do("close", handle.descriptor)[1] == 0

    @rule(
        target=handles,
        path=paths,
        access=st.sampled_from([os.O_WRONLY, os.O_RDWR]),
        how=st.sampled_from(
            [0, os.O_CREAT, os.O_CREAT | os.O_TRUNC, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_APPEND, os.O_TRUNC]
        ),
        mode=modes,
    )
    def open(self, path: str, access: int, how: int, mode: int) -> Handle | None:
        return self._open(path, access | how, mode)

    @rule(target=handles, path=missing, how=st.sampled_from([os.O_EXCL, os.O_TRUNC]), data=payloads)
    def begin_a_new_file(self, path: str, how: int, data: bytes) -> Handle | None:
        handle = self._open(path, os.O_RDWR | os.O_CREAT | how, 0o644)
        if handle is not None:
            self._write(handle, 0, data)
        return handle

    @rule(handle=handles, offset=offsets, data=payloads)
    def pwrite(self, handle: Handle | None, offset: int, data: bytes) -> None:
        if handle in self.open_handles:
            self._write(handle, offset, data)

    @rule(handle=handles, size=sizes)
    def ftruncate(self, handle: Handle | None, size: int) -> None:
        if handle in self.open_handles:
            assert self.do("ftruncate", handle.descriptor, size)[1] == 0
            self.reference.resize(handle.draft, size)

    @rule(handle=handles)
    def pread(self, handle: Handle | None) -> None:
        if handle in self.open_handles:
            expected = self.reference.content(handle.draft)
            if handle.flags & os.O_RDWR:
                assert self.do("pread", handle.descriptor, SIZE_LIMIT, 0) == (expected, 0)
            size, number = self.do("lseek", handle.descriptor, 0, os.SEEK_END)
            assert (size, number) == (len(expected), 0)

    @rule(handle=handles)
    def fsync(self, handle: Handle | None) -> None:
        if handle in self.open_handles:
            assert self.do("fsync", handle.descriptor)[1] == 0

    @rule(handle=consumes(handles))
    def close(self, handle: Handle | None) -> None:
        if handle in self.open_handles:
            self._close(handle)

    @rule(path=paths, how=st.sampled_from([os.O_TRUNC, os.O_APPEND]), data=payloads, mode=modes)
    def whole_write(self, path: str, how: int, data: bytes, mode: int) -> None:
        handle = self._open(path, os.O_WRONLY | os.O_CREAT | how, mode)
        if handle is not None:
            self._write(handle, 0, data)
            self._close(handle)

    @rule(path=paths, size=sizes)
    def truncate(self, path: str, size: int) -> None:
        reference = self.reference
        expected = reference.change(lambda: os.close(os.open(reference.at(path), os.O_WRONLY)))
        assert self.do("truncate", self.at(path), size)[1] == expected
        if not expected:
            draft = reference.drafts.get(path)
            reference.resize(draft or (draft := Pending(path, False)), size)
            if path not in reference.drafts:
                reference.publish(draft)

    @rule(target=readers, path=paths)
    def stranger_opens(self, path: str) -> int | None:
        seen = self.reference.seen_by_strangers().get(path)
        if seen is None or seen[0] != "file":
            return None
        there = os.path.join(self.strangers_root, path)
        descriptor, number = self.stranger("attempt(os.open, p, os.O_RDONLY)", p=there)
        assert number == 0
        self.open_readers[descriptor] = seen[-1]
        return int(descriptor)

    @rule(reader=consumes(readers))
    def stranger_closes(self, reader: int | None) -> None:
        if reader is not None:
            del self.open_readers[reader]
            self.stranger("os.close(fd)", fd=reader)

    # --------------------------------------------------------------- names

    @rule(path=anywhere)
    def mkdir(self, path: str) -> None:
        expected = self.reference.change(os.mkdir, self.reference.at(path), 0o755)
        assert self.do("mkdir", self.at(path), 0o755)[1] == expected

    @rule(path=paths)
    def rmdir(self, path: str) -> None:
        expected = self.reference.change(os.rmdir, self.reference.at(path))
        assert self.do("rmdir", self.at(path))[1] == expected

    @rule(path=anywhere)
    def symlink(self, path: str) -> None:
        expected = self.reference.change(os.symlink, "nowhere/at/all", self.reference.at(path))
        assert self.do("symlink", "nowhere/at/all", self.at(path))[1] == expected

    @rule(path=paths)
    def unlink(self, path: str) -> None:
        reference = self.reference
        draft = reference.drafts.get(path)
        if draft is not None:
            reference.discard(draft)
            if draft.created:  # `discard` takes it out of the placeholders
                os.close(os.open(reference.at(path), os.O_CREAT | os.O_WRONLY))
        expected = reference.change(os.unlink, reference.at(path))
        assert self.do("unlink", self.at(path))[1] == expected

    @rule(path=paths, mode=modes)
    def chmod(self, path: str, mode: int) -> None:
        reference = self.reference
        draft = reference.drafts.get(path)
        number = self.do("chmod", self.at(path), mode)[1]
        if draft is not None and draft.content is not None:
            draft.mode = mode
            assert number == 0
        else:
            directory = os.path.isdir(reference.at(path))
            mode = mode | 0o700 if directory else mode
            if directory:
                number = self.do("chmod", self.at(path), mode)[1]
            assert number == reference.change(os.chmod, reference.at(path), mode)

    @rule(source=paths, path=paths)
    def link(self, source: str, path: str) -> None:
        reference = self.reference
        draft = reference.drafts.get(source)
        if draft is not None:
            free = reference.change(lambda: os.mkdir(reference.at(path)) or os.rmdir(reference.at(path))) == 0
            if free:
                reference.publish(draft)
        expected = reference.change(os.link, reference.at(source), reference.at(path))
        assert self.do("link", self.at(source), self.at(path))[1] == expected

    def family_names(self) -> list[str]:
        return sorted(path for path in self.reference.seen_by_family() if path)

    def _same_file(self, source: str, path: str) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.lstat(self.reference.at(source)), os.lstat(self.reference.at(path)))
        return False

    @rule(names=st.permutations(["p", "q"]))
    def rename_directory(self, names: list[str]) -> None:
        self._rename(*names)

    @rule(source=paths, path=paths)
    def rename(self, source: str, path: str) -> None:
        self._rename(source, path)

    def _rename(self, source: str, path: str) -> None:
        reference = self.reference
        moved, replaced = reference.drafts.get(source), reference.drafts.get(path)
        if source == path or ((moved or replaced) and self._same_file(source, path)):
            return  # POSIX does nothing then; whether the draft is another file is not promised
        replaced_content = reference.content(replaced) if replaced is not None else b""
        expected = reference.attempt(os.rename, reference.at(source), reference.at(path))
        if not expected:
            if replaced is not None:
                replaced.content, replaced.discarded = bytearray(replaced_content), True
                del reference.drafts[path]
            for draft in list(reference.drafts.values()):
                if draft.path == source or draft.path.startswith(source + "/"):
                    reference.move(draft, path + draft.path[len(source) :])
        reference.clear()
        if not expected and moved is not None:
            reference.publish(moved)
        assert self.do("rename", self.at(source), self.at(path))[1] == expected

    # ---------------------------------------------------------- what is seen

    def _assert_seen(self, observer: Actor, expected: dict[str, Any]) -> None:
        root = self.root if observer is self.writer else self.strangers_root
        seen = observer("walk(root)", root=os.fspath(root))
        drafts = self.reference.drafts
        for path in seen:
            if path in drafts and observer is self.writer:
                seen[path] = without_links(seen[path])
        assert seen == expected

    @invariant()
    def a_stranger_sees_what_is_published(self) -> None:
        self._assert_seen(self.stranger, self.reference.seen_by_strangers())

    @invariant()
    @precondition(lambda self: self.reference.drafts)
    def the_writer_sees_its_own_drafts(self) -> None:
        self._assert_seen(self.writer, self.reference.seen_by_family())

    @invariant()
    @precondition(lambda self: self.open_readers)
    def open_versions_never_change(self) -> None:
        code = "{fd: os.pread(fd, limit, 0) for fd in fds}"
        assert self.stranger(code, fds=list(self.open_readers), limit=SIZE_LIMIT) == self.open_readers

    def teardown(self) -> None:
        failed = False
        try:
            for handle in list(self.open_handles):
                self._close(handle)
        except BaseException:
            failed = True
            raise
        finally:
            for handle in self.open_handles:
                self.do("close", handle.descriptor)
            for descriptor in self.open_readers:
                self.stranger("os.close(fd)", fd=descriptor)
        if not failed:
            expected = self.reference.seen_by_strangers()
            self._assert_seen(self.writer, expected)
            self._assert_seen(self.stranger, expected)


class TwoMounts(OneMount):
    """The stranger is on another node and writes there; a third one knows no mount at all."""

    def _is_free(self, path: str) -> bool:
        """No draft of the writer has to do with the name, and a file can be there."""
        reference, drafts = self.reference, self.reference.drafts
        parent = os.path.dirname(path)
        return (
            not any(path == draft or path.startswith(draft + "/") for draft in drafts)
            and not os.path.islink(reference.at(path))
            and not os.path.isdir(reference.at(path))
            and os.path.isdir(reference.at(parent))
            and not os.path.islink(reference.at(parent))
        )

    def _replace(self, place: str, path: str, data: bytes) -> None:
        """As a program does that knows how: a temporary name, then a rename."""
        Path(place, "temporary").write_bytes(data)
        Path(place, "temporary").chmod(0o644)
        os.rename(os.path.join(place, "temporary"), os.path.join(place, path))

    @rule(path=paths, data=payloads)
    def the_other_node_writes(self, path: str, data: bytes) -> None:
        if self._is_free(path):
            mode = self.reference.version(path)[1] if os.path.lexists(self.reference.at(path)) else 0o644
            code = "file = open(p, 'wb', 0); file.write(data); file.close()"
            self.stranger(code, p=os.path.join(self.strangers_root, path), data=data)
            self.reference.publish(Pending(path, False, bytearray(data), mode))

    @rule(path=paths, data=payloads)
    def somebody_writes_below(self, path: str, data: bytes) -> None:
        if self._is_free(path):
            self._replace(os.fspath(self.backing), path, data)
            self._replace(os.fspath(self.reference.root), path, data)

    @rule(path=paths)
    def somebody_removes_below(self, path: str) -> None:
        if self._is_free(path) and os.path.lexists(self.reference.at(path)):
            os.unlink(self.backing / path)
            os.unlink(self.reference.at(path))

    @rule(path=paths)
    def the_other_node_removes(self, path: str) -> None:
        if self._is_free(path) and os.path.lexists(self.reference.at(path)):
            self.stranger("os.unlink(p)", p=os.path.join(self.strangers_root, path))
            os.unlink(self.reference.at(path))


@contextlib.contextmanager
def everything(directory: Path, *, nodes: int) -> Iterator[Setup]:
    """The mounts, a writer and a stranger for all examples."""
    backing, reference = directory / "backing", directory / "reference"
    reference.mkdir()
    # What another node or nobody's mount changes shows in stat(2) a second later otherwise.
    exact = ("-o", "entry_timeout=0,attr_timeout=0") if nodes > 1 else ()
    with contextlib.ExitStack() as stack:
        mounts = [stack.enter_context(mounted(backing, directory / f"mnt{node}", *exact)) for node in range(nodes)]
        writer, stranger = (stack.enter_context(actor(umask=UMASK)) for _ in range(2))
        for party in (writer, stranger):
            party(OBSERVE)
        yield Setup(mounts[0].path, mounts[-1].path, backing, reference, writer, stranger)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """For everything that happens on one mount."""
    with everything(tmp_path_factory.mktemp("model"), nodes=1) as setup:
        yield setup


def test_one_mount_agrees_with_the_reference(shared: Setup) -> None:
    run(OneMount, shared)


def test_two_mounts_agree_with_the_reference(tmp_path: Path) -> None:
    with everything(tmp_path, nodes=2) as setup:
        run(TwoMounts, setup)


def run(machine: type[OneMount], setup: Setup) -> None:
    machine.setup_of_all = setup
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            database=None,
            derandomize=not AT_LENGTH,
            # Looking for a smaller failure takes minutes, in which the time of a normal run is over.
            phases=(Phase.generate, Phase.shrink) if AT_LENGTH else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("call", ["rmdir", "rename_directory"])
def test_a_familys_new_file_keeps_its_directory(shared: Setup, call: str) -> None:
    """A scenario that random examples rarely meet."""
    OneMount.setup_of_all = shared
    machine = OneMount()
    machine.mkdir("p")
    machine.mkdir("q")
    machine.begin_a_new_file("q/a", os.O_EXCL, b"new")
    if call == "rmdir":
        machine.rmdir("q")
    else:
        machine.rename_directory(["p", "q"])
    machine.a_stranger_sees_what_is_published()
    machine.the_writer_sees_its_own_drafts()
    machine.teardown()
