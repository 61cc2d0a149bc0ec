"""Lock files and their creators, without a mount: what is on record, whom there is room for, and the end."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import trio
import trio.testing

from safefs import backing as backing_module
from safefs import softlocks
from safefs.backing import Backing
from safefs.events import EventLog
from safefs.identity import Identities
from safefs.model import Identity, Process
from safefs.rules import Stale
from safefs.softlocks import NOTE_SECONDS, End, Maker, Mark, SoftLock, SoftLocks, introduce_maker, read_noted
from safefs.state import DaemonRecord, StateDirectory

T = TypeVar("T")
NOBODY = 65534
NO_RECORD = cast(DaemonRecord, SimpleNamespace(made=1))


class SlowStore:
    """Stands in for `Backing`: calls take longer than what passes between two records."""

    def __init__(self) -> None:
        self.calls = self.running = self.most = 0

    async def run(self, _caller: object, _function: Callable[..., Any], *_arguments: object) -> None:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await trio.sleep(10 * NOTE_SECONDS)
        self.running -= 1


def test_a_record_is_written_when_the_one_before_is_there(tmp_path: Path) -> None:
    """Both have the same name on their way: two at once lose one, and what is older can be the one that stays."""
    store = SlowStore()
    locks = SoftLocks(cast(Backing, store), NO_RECORD, EventLog(tmp_path, "w"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(locks.run)
            for _ in range(5):
                await trio.sleep(2 * NOTE_SECONDS)
                locks._note_soon()
            await trio.sleep(50 * NOTE_SECONDS)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert store.most == 1
    assert store.calls == 2


def maker_of(process: subprocess.Popen[bytes], path: Path) -> Maker:
    """As if a process had made this lock file."""
    path.touch()
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    return Maker(Process(process.pid, 0), os.pidfd_open(process.pid), directory, os.open(path, os.O_PATH))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen(["sleep", "inf"]) as process:
        yield process
        process.kill()


def test_it_ends_in_order_while_creators_live(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Whichever of its tasks comes first, which trio leaves to chance."""

    async def main() -> None:
        locks = SoftLocks(cast(Backing, SlowStore()), NO_RECORD, EventLog(tmp_path, "w"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(locks.run)
            await trio.testing.wait_all_tasks_blocked()
            locks.made(Identity(1, 1), b"x.lock", maker_of(sleeper, tmp_path / "x.lock"), Stale.SIGNALLED)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    for _ in range(16):
        trio.run(main)


@pytest.fixture
def leaver() -> Iterator[subprocess.Popen[bytes]]:
    """A process that exits when its standard input is closed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process


def test_locks_that_have_outlived_their_creators_make_way(
    tmp_path: Path,
    sleeper: subprocess.Popen[bytes],
    leaver: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are there to be shown; those whose creators live stay, and there is no room for more of these."""
    monkeypatch.setattr(softlocks, "MAX_WATCHED", 2)
    locks = SoftLocks(cast(Backing, SlowStore()), NO_RECORD, EventLog(tmp_path, "w"))
    directory = Identity(1, 1)

    def make(name: bytes, process: subprocess.Popen[bytes]) -> None:
        locks.made(directory, name, maker_of(process, tmp_path / os.fsdecode(name)), Stale.SIGNALLED)

    def watched() -> set[bytes]:
        return {name for _, name in locks._locks}

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(locks.run)
            await trio.testing.wait_all_tasks_blocked()
            make(b"1", leaver)
            make(b"2", leaver)
            assert leaver.stdin is not None
            leaver.stdin.close()
            for _ in range(1000):
                if all(lock.end is End.EXITED for lock in locks._locks.values()):
                    break
                await trio.sleep(0.01)
            make(b"3", sleeper)
            assert watched() == {b"2", b"3"}
            make(b"4", sleeper)
            assert watched() == {b"3", b"4"}
            make(b"5", sleeper)
            assert watched() == {b"3", b"4"}
            nursery.cancel_scope.cancel()

    trio.run(main)


THREADS = "import os, threading, time; threading.Timer(0.1, os._exit, (0,)).start(); time.sleep(60)"


def test_how_it_ended_is_not_guessed() -> None:
    """Who may not trace a process sees no status of a zombie, and its threads are ended as if they were killed."""
    with subprocess.Popen([sys.executable, "-c", THREADS]) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            assert _as_nobody(lambda: softlocks.end_of(pidfd, process.pid)) is None
            assert softlocks.end_of(pidfd, process.pid) is End.EXITED
            process.wait()
            assert _as_nobody(lambda: softlocks.end_of(pidfd, process.pid)) in (End.EXITED, End.UNKNOWN)
        finally:
            os.close(pidfd)


def _as_nobody(function: Callable[[], T]) -> T:
    """As a daemon of an ordinary user's."""
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        return function()
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("failing", ["open", "dup"])
def test_a_maker_for_whom_no_descriptor_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """The file has been made: its open succeeds, it is not watched, and nothing stays open."""

    works = getattr(os, failing)

    def fail(what: Any, flags: int = os.O_PATH, *arguments: Any, **options: Any) -> Any:
        if flags & os.O_PATH:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return works(what, flags, *arguments, **options)  # what looks at the process

    directory = os.open(tmp_path, os.O_PATH)
    fd = os.open(tmp_path / "x.lock", os.O_CREAT | os.O_RDWR)
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(softlocks.os, failing, fail)
        maker = introduce_maker(directory, fd, os.getpid())
    assert maker is None
    assert os.listdir("/proc/self/fd") == before
    os.close(fd)
    os.close(directory)


# -------------------------------------------------------- what fails at first


@dataclass
class Watched:
    """A lock file of a process, watched by a daemon of its own."""

    root: Path
    locks: SoftLocks
    record: DaemonRecord
    events: EventLog
    process: subprocess.Popen[bytes]

    @property
    def file(self) -> Path:
        return self.root / "x.lock"

    @property
    def lock(self) -> SoftLock | None:
        return next(iter(self.locks._locks.values()), None)

    def noted(self) -> list[str]:
        found = read_noted(self.record.path)
        return [entry["path"] for entry in found.locks] if found is not None else []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.locks.run)
            await trio.testing.wait_all_tasks_blocked()
            maker = maker_of(self.process, self.file)
            self.locks.made(backing_module.identity_of(self.root.stat()), b"x.lock", maker, Stale.DEAD)
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def watched(tmp_path: Path, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(softlocks, "NOTE_SECONDS", 0.01)
    monkeypatch.setattr(softlocks, "REPEAT_SECONDS", 0.01)
    store = Backing(tmp_path, Identities(impersonate=False), max_threads=2)
    state = StateDirectory(tmp_path / ".safefs", store.identities)
    record, events = DaemonRecord(state, store.node_id, {}), EventLog(state.events, store.node_id)
    yield Watched(tmp_path, SoftLocks(store, record, events), record, events, sleeper)
    record.remove()
    os.close(state.quarantine_fd)
    os.close(store.root_fd)


async def until(holds: Callable[[], Any]) -> None:
    with trio.fail_after(30):
        while not holds():  # noqa: ASYNC110 - files and processes
            await trio.sleep(0.01)


def failing(function: Callable[..., Any], number: int, times: int) -> Callable[..., Any]:
    """It fails so many times, and works from then on."""
    left = iter(range(times))

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is not None:
            raise OSError(number, os.strerror(number))
        return function(*arguments, **options)

    return fail


def failures(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS])
def test_a_removal_that_fails_is_tried_again(
    watched: Watched, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And said once."""
    monkeypatch.setattr(backing_module, "rename", failing(backing_module.rename, number, 7))

    async def main() -> None:
        async with watched.running():
            watched.process.kill()
            await until(lambda: not watched.file.exists())
            await until(lambda: watched.lock is None)

    trio.run(main)
    assert [event["path"] for event in watched.events.taken()] == ["x.lock"]
    assert failures(caplog) == 1


def test_who_cannot_look_for_want_of_a_thread_looks_again(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on watching: the end of that task would be the end of the mount."""
    refused = threading.Event()

    def refuse(_thread: threading.Thread) -> None:
        refused.set()
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        async with watched.running():
            await until(watched.noted)
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                watched.process.kill()
                await until(refused.is_set)
                await trio.testing.wait_all_tasks_blocked()
            await until(lambda: not watched.file.exists())

    trio.run(main)


def stale(monkeypatch: pytest.MonkeyPatch, watched: Watched) -> None:
    """The descriptors that the daemon holds are of no use any more, as after the end of an NFS server."""
    assert watched.lock is not None
    fstat, fd = os.fstat, watched.lock.fd

    def fail(which: int) -> os.stat_result:
        if which == fd:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fstat(which)

    monkeypatch.setattr(os, "fstat", fail)


def test_a_file_whose_descriptor_is_stale_is_found_by_its_path(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with watched.running():
            await until(watched.noted)
            stale(monkeypatch, watched)
            await watched.locks._drop_missing()
            assert watched.lock is not None
            watched.process.kill()
            await until(lambda: not watched.file.exists())
            await until(lambda: watched.lock is None)

    trio.run(main)


def test_a_file_that_is_gone_with_its_directory_is_forgotten(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS descriptors are stale then."""

    async def main() -> None:
        async with watched.running():
            await until(watched.noted)
            watched.file.unlink()
            stale(monkeypatch, watched)
            real = backing_module.identity_at
            monkeypatch.setattr(backing_module, "identity_at", failing(real, errno.ESTALE, 1))
            await watched.locks._drop_missing()
            assert watched.lock is None

    trio.run(main)


@pytest.mark.parametrize(("number", "is_gone"), [(errno.EIO, False), (errno.EACCES, False), (errno.ENOTDIR, True)])
def test_what_cannot_be_looked_at_is_not_gone(
    watched: Watched, number: int, is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with watched.running():
            monkeypatch.setattr(backing_module, "identity_at", failing(backing_module.identity_at, number, 1))
            await watched.locks._drop_missing()
            assert (watched.lock is None) == is_gone

    trio.run(main)


def test_a_file_that_others_removed_is_forgotten(watched: Watched) -> None:
    async def main() -> None:
        async with watched.running():
            watched.file.unlink()
            await watched.locks._drop_missing()
            assert watched.lock is None

    trio.run(main)


def test_a_note_that_fails_is_made_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the file would stay for ever, should the node die before anything changes."""
    note = failing(watched.record.write_soft_locks, errno.ENOSPC, 5)
    monkeypatch.setattr(watched.record, "write_soft_locks", note)

    async def main() -> None:
        async with watched.running():
            await until(lambda: watched.noted() == ["x.lock"])
            await until(lambda: not watched.locks._is_behind)

    trio.run(main)
    assert failures(caplog) == 1


def test_what_was_on_record_is_noted_in_a_new_one(watched: Watched) -> None:
    """Others have taken the daemon for dead, and removed what they found."""

    async def main() -> None:
        async with watched.running():
            await until(lambda: watched.noted() == ["x.lock"])
            shutil.rmtree(watched.record.path)
            watched.record.beat()
            await until(lambda: watched.noted() == ["x.lock"])

    trio.run(main)


def test_a_file_that_cannot_be_looked_at_is_noted_later(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays on record should it happen afterwards."""
    monkeypatch.setattr(Mark, "of", failing(Mark.of, errno.EIO, 5))

    async def main() -> None:
        async with watched.running():
            await until(lambda: watched.noted() == ["x.lock"])
            monkeypatch.setattr(Mark, "of", failing(Mark.of, errno.EIO, 1 << 30))
            (watched.record.path / "softlocks").unlink()
            watched.locks.joined("0123456789abcdef")
            await until(lambda: watched.noted() == ["x.lock"])

    trio.run(main)


def test_a_removal_that_fails_halfway_gives_the_file_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, directory = tmp_path / "x.lock", os.open(tmp_path, os.O_PATH)
    file.write_bytes(b"1")
    fd = os.open(file, os.O_PATH)
    try:
        mark = Mark.of(fd)
        with monkeypatch.context() as patch:
            patch.setattr(backing_module, "unlink", failing(backing_module.unlink, errno.EIO, 1))
            with pytest.raises(OSError, match="Input/output"):
                softlocks.remove_if_same(directory, b"x.lock", mark, b".hidden")
        assert os.listdir(tmp_path) == ["x.lock"]
        assert softlocks.remove_if_same(directory, b"x.lock", mark, b".hidden")
        assert os.listdir(tmp_path) == []
    finally:
        os.close(fd)
        os.close(directory)


def test_another_node_may_be_quicker_to_remove_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, directory = tmp_path / "x.lock", os.open(tmp_path, os.O_PATH)
    file.touch()
    fd = os.open(file, os.O_PATH)
    try:
        mark = Mark.of(fd)
        monkeypatch.setattr(backing_module, "rename", failing(backing_module.rename, errno.ENOENT, 1))
        assert not softlocks.remove_if_same(directory, b"x.lock", mark, b".hidden")
    finally:
        os.close(fd)
        os.close(directory)
