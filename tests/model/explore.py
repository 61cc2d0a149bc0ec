"""Every state that a system can come to, breadth first, each state once; and whether a goal stays within reach.

What is explored is finite: a state is a value that can be hashed, and `steps` says what can follow it.  A step that is
a fault may happen, but nothing may rely on it: it counts for what must never be, not for what must come in the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
Steps = Callable[[S], Iterable[tuple[str, S, bool]]]  # what happens, what follows, whether it is a fault


class Violation(AssertionError):  # noqa: N818 - what a search is for, not something that went wrong in it
    """A state that must not be, and the shortest way to it."""

    def __init__(self, what: str, way: list[str]) -> None:
        super().__init__("\n  ".join([what, *way]))
        self.what = what
        self.way = way


class TooManyError(Exception):
    """The search was given up: it has found nothing, and does not say that there is nothing."""


@dataclass
class Explored(Generic[S]):
    """The states that were found, in the order in which they were, and the steps between them."""

    states: list[S] = field(default_factory=list)
    steps: int = 0
    _came: list[tuple[int, str]] = field(default_factory=list)  # from which state, by which step
    _sources: array[int] = field(default_factory=lambda: array("I"))  # of steps that are no faults
    _targets: array[int] = field(default_factory=lambda: array("I"))

    def way_to(self, at: int) -> list[str]:
        way = []
        while at:
            at, label = self._came[at]
            way.append(label)
        return way[::-1]

    def require_within_reach(self, is_goal: Callable[[S], bool]) -> int:
        """Violation unless each state can come to a goal without a fault; how many goals there are.

        Where chance decides among the steps that can happen, a goal that stays within reach is reached; and where no
        goal is within reach any more, somebody waits for ever, be it that nothing moves or that all turns in circles.
        """
        reaches = bytearray(is_goal(state) for state in self.states)
        goals = sum(reaches)
        before = -1
        while before != (now := sum(reaches)):
            before = now
            # A step leads mostly to a state that was found later.
            for at in range(len(self._sources) - 1, -1, -1):
                if reaches[self._targets[at]]:
                    reaches[self._sources[at]] = 1
        stuck = reaches.find(0)
        if stuck >= 0:
            raise Violation("no goal is within reach any more", self.way_to(stuck))
        return goals


def explore(first: S, steps: Steps[S], check: Callable[[S], str], most: int) -> Explored[S]:
    """All states.  Violation where `check` says what is wrong with one; TooManyError for more than `most`."""
    found: Explored[S] = Explored([first])
    found._came.append((0, ""))
    numbers = {first: 0}
    for at, state in enumerate(_growing(found.states)):
        if wrong := check(state):
            raise Violation(wrong, found.way_to(at))
        for label, after, is_fault in steps(state):
            number = numbers.setdefault(after, len(found.states))
            if number == len(found.states):
                found.states.append(after)
                found._came.append((at, label))
            found.steps += 1
            if not is_fault:
                found._sources.append(at)
                found._targets.append(number)
        if len(found.states) > most:
            raise TooManyError(f"more than {most} states")
    return found


def _growing(states: list[S]) -> Iterator[S]:
    at = 0
    while at < len(states):
        yield states[at]
        at += 1
