"""Lock files and their creators, without a mount: what is on record, whom there is room for, and the end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import trio
import trio.testing

from safefs import softlocks
from safefs.backing import Backing
from safefs.events import EventLog
from safefs.model import Identity, Process
from safefs.rules import Stale
from safefs.softlocks import NOTE_SECONDS, End, Maker, SoftLocks, introduce_maker
from safefs.state import DaemonRecord

T = TypeVar("T")
NOBODY = 65534


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
    locks = SoftLocks(cast(Backing, store), cast(DaemonRecord, None), EventLog(tmp_path, "w"))

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
        locks = SoftLocks(cast(Backing, SlowStore()), cast(DaemonRecord, None), EventLog(tmp_path, "w"))
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
    locks = SoftLocks(cast(Backing, SlowStore()), cast(DaemonRecord, None), EventLog(tmp_path, "w"))
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
