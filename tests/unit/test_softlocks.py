"""Lock files and their creators, without a mount: what is on record, whom there is room for, and the end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from safefs.backing import Backing
from safefs.events import EventLog
from safefs.model import Identity, Process
from safefs.rules import Stale
from safefs.softlocks import NOTE_SECONDS, Maker, SoftLocks
from safefs.state import DaemonRecord


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
