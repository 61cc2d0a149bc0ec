"""Threads for what can block, beside the event loop.

What `trio.to_thread.run_sync` does with `abandon_on_cancel`, at half its cost, because a publish makes three such calls
one after the other: no context to copy, no name of the thread to change twice, no limiter to ask.

Guaranteed: at most so many calls run at once, the others wait in the order in which they came; a call that is
cancelled is left alone, keeps its place until it ends, and its result is dropped.  Where the system gives no more
threads, calls wait for those that there are; with none of its own at work a call raises OSError (EAGAIN).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import outcome
import trio

T = TypeVar("T")

IDLE_SECONDS = 10.0  # then a thread that has nothing to do ends
RETRY_SECONDS = 1.0  # until it is tried again to start one: those that there are may hang


class _Call:
    """One call on its way."""

    __slots__ = ("arguments", "function", "result", "task", "token")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.task: trio.lowlevel.Task | None = trio.lowlevel.current_task()  # None once nobody waits for the result
        self.token = trio.lowlevel.current_trio_token()
        self.result: outcome.Outcome[Any]

    def abandon(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class _Thread:
    """One thread; `wake` is free when there is a call for it."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.call: _Call | None = None
        self.wake = threading.Lock()
        self.wake.acquire()
        threading.Thread(target=self._work, name="safefs-worker", daemon=True).start()

    def _work(self) -> None:
        while True:
            if self.wake.acquire(timeout=IDLE_SECONDS):
                self._carry_out()
            elif self._workers.dismiss(self):
                return

    def _carry_out(self) -> None:
        call, self.call = self.call, None
        assert call is not None
        call.result = outcome.capture(call.function, *call.arguments)
        self._workers.idle.append(self)  # before the result, which may lead to the next call
        with suppress(trio.RunFinishedError):
            call.token.run_sync_soon(self._workers.deliver, call)


class Workers:
    """The threads of one purpose."""

    def __init__(self, max_threads: int) -> None:
        self._max = self._free = max_threads
        self._waiting = trio.lowlevel.ParkingLot()
        self._threadless = trio.lowlevel.ParkingLot()  # calls that have their place, and no thread
        self._quiet = trio.lowlevel.ParkingLot()
        self.idle: list[_Thread] = []

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call `function(*arguments)` in a thread.  Raises OSError (EAGAIN) where there is none to be had."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._free:
            self._free -= 1
        else:
            await self._waiting.park()  # whoever is done hands its place over
        call = _Call(function, arguments)
        try:
            thread = self.idle.pop() if self.idle else await self._new_thread()
        except BaseException:
            self._leave()
            raise
        thread.call = call
        thread.wake.release()
        result: T = await trio.lowlevel.wait_task_rescheduled(call.abandon)
        return result

    async def _new_thread(self) -> _Thread:
        """For who has a place; where none can be started, one that another call is done with."""
        while True:
            try:
                return _Thread(self)
            except RuntimeError:  # "can't start new thread": the limit of the user, the cgroup or the system
                if self.busy == len(self._threadless) + 1:  # nobody has one
                    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
            with trio.move_on_after(RETRY_SECONDS):
                await self._threadless.park()
            if self.idle:
                return self.idle.pop()

    @property
    def busy(self) -> int:
        """How many calls are on their way, those included that have got their place and not begun."""
        return self._max - self._free

    async def quiet(self) -> None:
        """Until no call is on its way, those included that were cancelled."""
        while self.busy:
            await self._quiet.park()

    def _leave(self) -> None:
        if self._threadless:
            self._threadless.unpark()  # for the thread, or to find that there is none
        if self._waiting:
            self._waiting.unpark()
            return
        self._free += 1
        if not self.busy:
            self._quiet.unpark_all()

    def deliver(self, call: _Call) -> None:
        """A call has ended; on the event loop."""
        self._leave()
        if call.task is not None:
            trio.lowlevel.reschedule(call.task, call.result)

    def dismiss(self, thread: _Thread) -> bool:
        """Whether a thread may end: nobody has a call for it."""
        with suppress(ValueError):
            self.idle.remove(thread)
            return True
        return False
