"""Handles whose RELEASE does not come: when they are taken for open, and how often the kernel is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import trio
from trio.testing import MockClock

from safefs.closers import CALL_SECONDS, CLOSING_NS
from safefs.draft import DraftState
from safefs.lingering import BACKLOG_LOOKS, LOOK_SECONDS, Lingering

TID = 7


class Kernel:
    """What a mount's daemon sees of its clients, and the drafts that were found to be open still."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.cpu_ns: int | None = 0  # of the thread that closes; None: it has left the call
        self.backlog = self.flushing = False
        self.looks = 0
        self.flushed = False  # whether it was taken to be in a call that closes more, at the last look
        self.open: list[Any] = []
        self.passthrough = SimpleNamespace(requests_wait=lambda: self.backlog)
        fs: Any = self
        self.flushes = 0  # that the thread has sent
        self.closers = SimpleNamespace(is_waiting=lambda _tid: self.flushing, flushes=lambda _tid: self.flushes)
        self.lingering = Lingering(fs, nursery, self.lives_on)

    async def look(self, _function: object, tid: int, may_flush: bool) -> int | None:
        assert tid == TID
        self.looks += 1
        self.flushed = may_flush
        await trio.lowlevel.checkpoint()
        return self.cpu_ns

    @asynccontextmanager
    async def held(self, _draft: object) -> AsyncIterator[None]:
        yield

    async def lives_on(self, draft: Any) -> None:
        self.open.append(draft)

    def close(self) -> Any:
        handle: Any = SimpleNamespace(released=False)
        draft: Any = SimpleNamespace(state=DraftState.PUBLISHED, handle=handle, itself=object())
        self.lingering.expect_release(handle, draft, TID)
        return draft


def run(story: Callable[[Kernel], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(1000):
            async with trio.open_nursery() as nursery:
                await story(Kernel(nursery))  # and every watch has come to its end

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_what_is_released_at_once_is_not_looked_for() -> None:
    async def story(kernel: Kernel) -> None:
        kernel.close().handle.released = True
        await trio.sleep(1)
        assert (kernel.looks, kernel.open) == (0, [])

    run(story)


def test_what_is_not_released_when_the_call_is_over_is_open() -> None:
    async def story(kernel: Kernel) -> None:
        draft = kernel.close()
        await trio.sleep(1)
        assert kernel.open == []  # it may still be in the call
        kernel.cpu_ns = None
        await trio.sleep(1)
        assert kernel.open == [draft]

    run(story)


def test_a_thread_that_runs_on_has_left_the_call() -> None:
    async def story(kernel: Kernel) -> None:
        draft = kernel.close()
        await trio.sleep(1)
        kernel.cpu_ns = CLOSING_NS - 1
        await trio.sleep(1)
        assert kernel.open == []
        kernel.cpu_ns = CLOSING_NS
        await trio.sleep(1)
        assert kernel.open == [draft]

    run(story)


def test_a_thread_that_goes_on_closing_is_in_one_call_for_so_long() -> None:
    async def story(kernel: Kernel) -> None:
        draft = kernel.close()
        end = trio.current_time() + CALL_SECONDS - 1
        while trio.current_time() < end:
            kernel.flushes += 1
            await trio.sleep(LOOK_SECONDS[0])
            assert kernel.flushed or kernel.looks < 2
        await trio.sleep(2)
        assert not kernel.flushed  # it has sent none since
        kernel.flushes += 1
        await trio.sleep(1)
        assert not kernel.flushed  # and what it sends now is of another call
        draft.handle.released = True

    run(story)


def test_requests_that_wait_may_be_its_release() -> None:
    async def story(kernel: Kernel) -> None:
        kernel.cpu_ns, kernel.backlog = None, True
        draft, late = kernel.close(), kernel.close()
        await trio.sleep(2.5 * LOOK_SECONDS[0])
        assert kernel.looks == 1
        late.handle.released = True
        await trio.sleep(100)
        assert (kernel.looks, kernel.open) == (BACKLOG_LOOKS, [draft])

    run(story)


def test_nothing_is_taken_for_open_that_was_closed_a_moment_ago() -> None:
    async def story(kernel: Kernel) -> None:
        kernel.cpu_ns = None
        kernel.close()
        await trio.sleep(0.9 * LOOK_SECONDS[0])
        fresh = kernel.close()
        await trio.sleep(0.9 * LOOK_SECONDS[0])
        assert kernel.looks == 1 and fresh not in kernel.open
        fresh.handle.released = True

    run(story)


def test_a_thousand_files_of_an_ending_process_are_looked_for_together() -> None:
    """It closes them one by one, and the kernel lets go of all at the very end."""

    async def story(kernel: Kernel) -> None:
        drafts = []
        for _ in range(1000):
            kernel.flushing = True
            await trio.sleep(0.001)
            drafts.append(kernel.close())
            kernel.flushing = False
        await trio.sleep(10)
        assert kernel.looks < 1000 * 0.001 / LOOK_SECONDS[0] + 10 / LOOK_SECONDS[1] + 20
        for draft in drafts:
            draft.handle.released = True
        await trio.sleep(1)
        assert kernel.open == []

    run(story)
