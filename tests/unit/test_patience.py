"""Who waits behind others who have nothing yet passes them at last, and never for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from safefs.locking import MAX_PATIENCE_SECONDS, PATIENCE_SECONDS, Locking
from safefs.locks import Alone, Locks
from safefs.locktable import Kind, Lock, Mode, Owner

HOLD_SECONDS, NEXT_SECONDS = 2.6 * PATIENCE_SECONDS, 1.3 * PATIENCE_SECONDS
READERS = 100


async def unknown(*_: object) -> None:
    """What is known of a process."""


class Party:
    def __init__(self) -> None:
        self.locks = Locks(Alone("here"))
        fs: Any = SimpleNamespace(locks=self.locks, look=unknown, identify=unknown)
        self.locking = Locking(fs)
        self.granted: list[int] = []

    async def use(self, number: int, mode: Mode, seconds: float) -> None:
        owner = Owner("here", number)
        waiting = self.locks.acquire("d/name", Kind.FLOCK, Lock(owner, mode), number, may_wait=True)
        if waiting is not None:
            await self.locking.wait(waiting, number)
        self.granted.append(number)
        await trio.sleep(seconds)
        self.locks.release("d/name", Kind.FLOCK, owner)


@pytest.mark.parametrize("scale", [1, 100])
def test_a_writer_among_readers_that_overlap(scale: int) -> None:
    """Each of them waits longer than the last before it passes him: also where they hold it for twenty minutes."""
    party = Party()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for reader in range(1, READERS):
                nursery.start_soon(party.use, reader, Mode.SHARED, scale * HOLD_SECONDS)
                if reader == 1:
                    await trio.sleep(1)
                    nursery.start_soon(party.use, 0, Mode.EXCLUSIVE, 1)
                await trio.sleep(scale * NEXT_SECONDS)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert 0 < party.granted.index(0) < READERS / 5
    assert sorted(party.granted) == list(range(READERS))


def test_very_many_who_lose_patience_together_count_as_one() -> None:
    """The next has twice as much as they had, not twice as much for each of them."""
    party, crowd = Party(), 100

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(party.use, 0, Mode.EXCLUSIVE, 10 * PATIENCE_SECONDS)
            await trio.sleep(1)
            for number in range(1, crowd):
                nursery.start_soon(party.use, number, Mode.EXCLUSIVE, 0)
            await trio.sleep(2 * PATIENCE_SECONDS)
            nursery.start_soon(party.use, crowd, Mode.EXCLUSIVE, 0)
            await trio.testing.wait_all_tasks_blocked()
            assert set(party.locking._patience.values()) == {2 * PATIENCE_SECONDS}

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert sorted(party.granted) == list(range(crowd + 1))


def test_a_reader_that_a_waiting_writer_waits_for() -> None:
    """What he holds depends on another lock, which is not seen: it would never end."""
    party = Party()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            freed = trio.Event()

            async def first() -> None:
                await party.use(1, Mode.SHARED, 0)

            async def hold() -> None:
                owner = Owner("here", 9)
                assert party.locks.acquire("d/name", Kind.FLOCK, Lock(owner, Mode.SHARED), 9, may_wait=True) is None
                await freed.wait()
                party.locks.release("d/name", Kind.FLOCK, owner)

            nursery.start_soon(hold)
            await trio.sleep(1)
            nursery.start_soon(party.use, 0, Mode.EXCLUSIVE, 1)
            await trio.sleep(1)
            await first()
            assert trio.current_time() > PATIENCE_SECONDS
            freed.set()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert party.granted == [1, 0]


def test_there_is_an_end_to_patience() -> None:
    """The queue has been busy for days: who comes now does not wait for days until he passes."""
    party, days = Party(), 3 * 86400.0

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(party.use, 0, Mode.EXCLUSIVE, days)
            await trio.sleep(1)
            number = 0
            while trio.current_time() < days - MAX_PATIENCE_SECONDS:
                nursery.start_soon(party.use, number := number + 1, Mode.EXCLUSIVE, 0)
                await trio.sleep(MAX_PATIENCE_SECONDS / 4)
            assert set(party.locking._patience.values()) == {MAX_PATIENCE_SECONDS}

    trio.run(main, clock=MockClock(autojump_threshold=0))
