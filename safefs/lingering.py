"""Handles that live on after what looked like their last close: somebody else has a copy of the descriptor.

RELEASE comes at the end of the call that closes, of an ending process's files together at its very end.  So who closes
is watched, once for all that he has closed, until he has left that call; what is not released then is still open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from safefs import processes
from safefs.closers import CALL_SECONDS, CLOSING_NS
from safefs.draft import Draft, DraftState
from safefs.filesystem import FileSystem, Handle

LOOK_SECONDS = (0.003, 0.25)  # between looks at who closes, after something more was closed, and at most
BACKLOG_LOOKS = 8  # while the kernel has requests that were not received yet: RELEASE may be among them


@dataclass(slots=True, eq=False)
class Closed:
    """A handle of a published draft whose RELEASE has not come yet."""

    handle: Handle
    draft: Draft
    since: float
    began: int | None = None  # what CPU time the thread had used (ns) when it was first looked at
    looks: int = 0  # since the thread has left the call


class Lingering:
    """The handles of one mount."""

    def __init__(
        self,
        filesystem: FileSystem,
        nursery: trio.Nursery,
        lives_on: Callable[[Draft], Awaitable[None]],
    ) -> None:
        self.fs = filesystem
        self._nursery = nursery
        self._lives_on = lives_on
        self._closed: dict[int, list[Closed]] = {}  # by the thread that closes

    def expect_release(self, handle: Handle, draft: Draft, tid: int) -> None:
        """A thread has closed what looked like the last copy of a descriptor."""
        closed = self._closed.setdefault(tid, [])
        closed.append(Closed(handle, draft, trio.current_time()))
        if len(closed) == 1:
            self._nursery.start_soon(self._watch, tid, closed)

    async def _watch(self, tid: int, closed: list[Closed]) -> None:
        shortest, longest = LOOK_SECONDS
        seconds, flushes = shortest, self.fs.closers.flushes(tid)
        while closed:
            before = list(closed)
            await trio.sleep(seconds)
            closed[:] = [each for each in closed if not each.handle.released]
            due = [each for each in before if not each.handle.released]
            seconds = shortest if len(closed) > len(due) else min(2 * seconds, longest)
            if due and not self.fs.closers.is_waiting(tid):
                before_that, flushes = flushes, self.fs.closers.flushes(tid)
                is_young = trio.current_time() - due[0].since < CALL_SECONDS
                for each in await self._living_on(tid, due, may_flush=is_young and flushes != before_that):
                    closed.remove(each)
                    self._nursery.start_soon(self._end, each)
        del self._closed[tid]

    async def _living_on(self, tid: int, due: list[Closed], *, may_flush: bool) -> list[Closed]:
        """Those of some closed handles that somebody else has open."""
        now = await self.fs.look(processes.time_while_closing, tid, may_flush)
        now = None if now == processes.LEFT else now  # nor is it waited for what takes too long to find out
        backlog = self.fs.passthrough.requests_wait()
        found = []
        for each in due:
            if now is not None and (each.began is None or now - each.began < CLOSING_NS):
                each.began = now if each.began is None else each.began
                continue
            each.looks += 1
            if not backlog or each.looks >= BACKLOG_LOOKS:
                found.append(each)
        return found

    async def _end(self, each: Closed) -> None:
        if each.draft.state is DraftState.PUBLISHED and not each.handle.released:
            async with self.fs.held(each.draft):
                await self._lives_on(each.draft)
