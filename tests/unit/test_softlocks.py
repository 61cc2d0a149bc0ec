"""What is on record of lock files: written one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import trio
import trio.testing

from safefs.backing import Backing
from safefs.events import EventLog
from safefs.softlocks import NOTE_SECONDS, SoftLocks
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
