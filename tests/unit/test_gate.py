"""The gate that writers pass and a publish closes, and the locks that are found by key."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from safefs.gate import Gate, GroupSync, KeyedLocks


def run(main: object) -> None:
    """An async test without a plugin; a deadlock fails instead of hanging."""

    async def bounded() -> None:
        with trio.fail_after(10):
            await main()  # type: ignore[operator]

    trio.run(bounded)


class Visitor:
    """A task that goes through a gate or lock, says where it is, and leaves when told."""

    def __init__(self, nursery: trio.Nursery, context: object) -> None:
        self.inside, self.left = False, False
        self.scope = trio.CancelScope()
        self._leave = trio.Event()
        nursery.start_soon(self._visit, context)

    async def _visit(self, context: object) -> None:
        with self.scope:
            async with context:  # type: ignore[attr-defined]
                self.inside = True
                try:
                    await self._leave.wait()
                finally:
                    self.inside = False
        self.left = True

    async def leave(self) -> None:
        self._leave.set()
        await wait_all_tasks_blocked()

    async def cancel(self) -> None:
        self.scope.cancel()
        await wait_all_tasks_blocked()


# -------------------------------------------------------------------- gate


def test_many_pass_at_once() -> None:
    async def main() -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            visitors = [Visitor(nursery, gate.passing()) for _ in range(3)]
            await wait_all_tasks_blocked()
            assert all(visitor.inside for visitor in visitors)
            for visitor in visitors:
                await visitor.leave()

    run(main)


def test_closing_waits_for_all_that_pass() -> None:
    async def main() -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            first, second = Visitor(nursery, gate.passing()), Visitor(nursery, gate.passing())
            await wait_all_tasks_blocked()
            alone = Visitor(nursery, gate.closed())
            await wait_all_tasks_blocked()
            assert not alone.inside
            await first.leave()
            assert not alone.inside
            await second.leave()
            assert alone.inside
            await alone.leave()

    run(main)


def test_nobody_passes_or_closes_while_it_is_closed() -> None:
    async def main() -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            alone = Visitor(nursery, gate.closed())
            await wait_all_tasks_blocked()
            writer, other = Visitor(nursery, gate.passing()), Visitor(nursery, gate.closed())
            await wait_all_tasks_blocked()
            assert alone.inside
            assert not writer.inside
            assert not other.inside
            await alone.leave()
            assert writer.inside != other.inside
            await writer.leave()
            await other.leave()
            assert writer.left
            assert other.left

    run(main)


@pytest.mark.parametrize("kind", ["passing", "closed"])
def test_an_exception_inside_opens_the_gate_again(kind: str) -> None:
    async def main() -> None:
        gate = Gate()
        with pytest.raises(ValueError, match="inside"):
            async with getattr(gate, kind)():
                raise ValueError("inside")
        async with gate.closed():
            pass
        async with gate.passing():
            pass

    run(main)


@pytest.mark.parametrize("kind", ["passing", "closed"])
def test_a_cancelled_visitor_leaves_no_trace(kind: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            inside = Visitor(nursery, getattr(gate, kind)())
            await wait_all_tasks_blocked()
            assert inside.inside
            await inside.cancel()
            assert inside.left
            async with gate.closed():
                pass

    run(main)


@pytest.mark.parametrize("kind", ["passing", "closed"])
def test_who_gives_up_waiting_leaves_no_trace(kind: str) -> None:
    async def main() -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            alone = Visitor(nursery, gate.closed())
            await wait_all_tasks_blocked()
            waiting = Visitor(nursery, getattr(gate, kind)())
            await wait_all_tasks_blocked()
            await waiting.cancel()
            assert waiting.left
            await alone.leave()
            async with gate.closed():
                pass
            async with gate.passing():
                pass

    run(main)


# ------------------------------------------------------------- keyed locks


def test_one_key_is_held_by_one_at_a_time() -> None:
    async def main() -> None:
        locks = KeyedLocks()
        async with trio.open_nursery() as nursery:
            first = Visitor(nursery, locks.holding("key"))
            await wait_all_tasks_blocked()
            second, stranger = Visitor(nursery, locks.holding("key")), Visitor(nursery, locks.holding("other"))
            await wait_all_tasks_blocked()
            assert (first.inside, second.inside, stranger.inside) == (True, False, True)
            await first.leave()
            assert second.inside
            await second.leave()
            await stranger.leave()

    run(main)


def test_keys_are_freed_with_their_last_user() -> None:
    async def main() -> None:
        locks = KeyedLocks()
        async with trio.open_nursery() as nursery:
            first = Visitor(nursery, locks.holding("key"))
            await wait_all_tasks_blocked()
            second = Visitor(nursery, locks.holding("key"))
            await wait_all_tasks_blocked()
            await first.leave()
            assert len(locks._held) == 1
            await second.leave()
            assert not locks._held

    run(main)


def test_a_user_that_gives_up_waiting_frees_nothing_of_the_holders() -> None:
    async def main() -> None:
        locks = KeyedLocks()
        async with trio.open_nursery() as nursery:
            holder = Visitor(nursery, locks.holding("key"))
            await wait_all_tasks_blocked()
            waiting = Visitor(nursery, locks.holding("key"))
            await wait_all_tasks_blocked()
            await waiting.cancel()
            late = Visitor(nursery, locks.holding("key"))
            await wait_all_tasks_blocked()
            assert holder.inside
            assert not late.inside
            await holder.leave()
            assert late.inside
            await late.leave()
            assert not locks._held

    run(main)


def test_an_exception_inside_frees_the_key() -> None:
    async def main() -> None:
        locks = KeyedLocks()
        with pytest.raises(ValueError, match="inside"):
            async with locks.holding("key"):
                raise ValueError("inside")
        assert not locks._held

    run(main)


class Disk:
    """Counts syncs; each notes how many changes it has seen when it began, and can be held up."""

    def __init__(self) -> None:
        self.changes = 0
        self.safe = 0
        self.runs = 0
        self.go = threading.Event()
        self.began = threading.Event()

    def sync(self) -> None:
        self.runs += 1
        seen = self.changes
        self.began.set()
        assert self.go.wait(10)
        self.safe = max(self.safe, seen)


def test_one_sync_serves_all_who_asked_while_another_was_under_way() -> None:
    disk, syncs = Disk(), GroupSync()
    asked = threading.Semaphore(0)

    def change() -> None:
        disk.changes += 1
        mine = disk.changes
        asked.release()
        syncs.sync("directory", disk.sync)
        assert disk.safe >= mine

    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(change)
        assert disk.began.wait(10)
        others = [pool.submit(change) for _ in range(19)]
        for _ in range(20):
            assert asked.acquire(timeout=10)
        disk.go.set()
        for future in (first, *others):
            future.result(10)
    # The first, one for all that waited for it, and at most one for those who came while that had begun.
    assert 2 <= disk.runs <= 3
    assert not syncs._syncs


def test_a_sync_that_failed_serves_nobody() -> None:
    syncs, outcomes = GroupSync(), iter([OSError(5, "first"), None])
    began, go = threading.Event(), threading.Event()

    def flaky() -> None:
        began.set()
        assert go.wait(10)
        if (outcome := next(outcomes)) is not None:
            raise outcome

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(syncs.sync, 1, flaky)
        assert began.wait(10)
        second = pool.submit(syncs.sync, 1, flaky)
        go.set()
        with pytest.raises(OSError, match="first"):
            first.result(10)
        second.result(10)
    assert next(outcomes, "both ran") == "both ran"
