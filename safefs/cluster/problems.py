"""What is wrong with the lock backend as one node sees it: for who asks, and in the log when it begins and ends.

Each name has its own.  One for all would be over with the next call that goes well, and there always are some: an etcd
without space renews leases.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import trio

from safefs.cluster.backend import BackendError

log = logging.getLogger(__name__)

# What else than a name there can be problems with: no name begins so.
NOTICES, LEASE = "?notices", "?lease"
MOST_SAID = 100  # texts of which it is remembered who has them: others are not in the log
MOST_LINES, LINES_SECONDS = 20, 60.0  # so many lines in the log, in so long


@dataclass(frozen=True)
class Problem:
    """The last text, when that was, and since when nothing has gone well."""

    text: str
    since: float
    last: float


@dataclass
class _Said:
    """A text that is in the log, and who has had it since without being well in between."""

    since: float
    whose: set[str] = field(default_factory=set)


class Problems:
    """Those of one node, each under the name that it is about, or `NOTICES` or `LEASE`."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self._said: dict[str, _Said] = {}
        self._lines: deque[float] = deque()  # when they were written
        self._unsaid = 0

    def note(self, about: str, error: BackendError | str) -> None:
        """It has failed, perhaps again."""
        text, now = str(error), trio.current_time()
        known = self._problems.get(about)
        self._problems[about] = Problem(text, known.since if known else now, now)
        if text not in self._said and len(self._said) < MOST_SAID:
            self._said[text] = _Said(now)
            self._say(text)
        if text in self._said:
            self._said[text].whose.add(about)

    def over(self, about: str, *, is_known: bool = False, unless_within: float = 0.0) -> None:
        """It has gone well, or has not failed for some seconds; or it `is_known` why it is not tried any more."""
        problem = self._problems.get(about)
        if problem is None or trio.current_time() - problem.last < unless_within:
            return
        del self._problems[about]
        for said in self._said.values():
            said.whose.discard(about)
        ended = [text for text, said in self._said.items() if not said.whose]
        begun = [self._said.pop(text).since for text in ended]
        if ended and not is_known:  # of several that came one after the other, the last
            self._say(f"over, after {trio.current_time() - min(begun):.0f} s: {ended[-1]}")

    def report(self) -> dict[str, Any] | None:
        """The one that has lasted longest, and how many names have one; None where there is none."""
        if not self._problems:
            return None
        oldest = min(self._problems.values(), key=lambda problem: problem.since)
        names = len(self._problems.keys() - {NOTICES, LEASE})
        return {"text": oldest.text, "seconds": round(trio.current_time() - oldest.since, 1), "names": names}

    def _say(self, text: str) -> None:
        """Thousands of names can each have their own."""
        now = trio.current_time()
        while self._lines and now - self._lines[0] > LINES_SECONDS:
            self._lines.popleft()
        if len(self._lines) >= MOST_LINES:
            self._unsaid += 1
            return
        self._lines.append(now)
        if self._unsaid:
            log.warning("the lock backend: %d lines of other problems are left out", self._unsaid)
            self._unsaid = 0
        log.warning("the lock backend: %s", text)
