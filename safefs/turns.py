"""Those who only try, and are refused: they are answered in turn, when so many try that it would be a burden.

A program that waits for a lock by trying again and again costs as much as it likes; a hundred of them, each looking
twenty times a second, leave a daemon no time for the one that has the lock.  So a name has only so many refusals a
second.  One that comes before its turn is put off, for a moment at most, and is no refusal if the lock is free in
between: then the lock goes to the first in the line.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import TypeVar

import trio

REFUSAL_SECONDS = 0.01  # between the refusals of one name
AT_ONCE = 20  # refusals that were saved up while nobody tried
LONGEST_SECONDS = 0.25  # that an answer is put off
MAX_NAMES = 1024  # with more it is looked which of them are not needed any more

T = TypeVar("T")


class Turns:
    """The lines of all names."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[Hashable, float] = {}  # when the last turn of a name was, or will be
        self._lines: dict[Hashable, deque[trio.Event]] = {}

    def seconds(self, name: Hashable) -> float:
        """How long the refusal that is due now has to wait for its turn."""
        now = self._clock()
        earliest = now - AT_ONCE * REFUSAL_SECONDS
        turn = max(self._last.get(name, earliest) + REFUSAL_SECONDS, earliest)
        self._last[name] = min(turn, now + LONGEST_SECONDS)
        if len(self._last) > MAX_NAMES:
            self._last = {name: last for name, last in self._last.items() if last > earliest}
        return max(self._last[name] - now, 0.0)

    def has_line(self, name: Hashable) -> bool:
        """Whether anybody's refusal has been put off."""
        return name in self._lines

    def unlocked(self, name: Hashable) -> None:
        """Somebody else may have better luck now: the first in the line."""
        line = self._lines.get(name)
        if line:
            line.popleft().set()
            if not line:
                del self._lines[name]

    async def attempt(self, name: Hashable, seconds: float, function: Callable[[], T]) -> T:
        """What a function returns that raises BlockingIOError as long as it has no luck: within `seconds`, or raise."""
        deadline = trio.current_time() + seconds
        is_first = False
        while True:
            luck = await self._stand(name, deadline, first=is_first)
            try:
                result = function()
            except BlockingIOError:
                if not luck:
                    raise
                is_first = True
            else:
                self.unlocked(name)  # what was had may leave room for more
                return result

    async def _stand(self, name: Hashable, deadline: float, *, first: bool) -> bool:
        """Until this one is told that there is something to be had (True), or the time is over."""
        told, line = trio.Event(), self._lines.setdefault(name, deque())
        if first:
            line.appendleft(told)
        else:
            line.append(told)
        try:
            with trio.move_on_at(deadline):
                await told.wait()
                return True
            return told.is_set()
        except trio.Cancelled:
            if told.is_set():
                self.unlocked(name)  # somebody else's luck
            raise
        finally:
            self._leave(name, told)

    def _leave(self, name: Hashable, told: trio.Event) -> None:
        line = self._lines.get(name)
        if line is not None and told in line:
            line.remove(told)
            if not line:
                del self._lines[name]
