"""Every order of renewals and looks, in ticks: a node is gone no sooner than its own clock has told it that it lost.

The arithmetic of safefs.lease runs, with steps as in safefs.cluster.leasefile: a renewal counts one up unless the lease
was ended, and its answer comes late or not at all; who looks at the count may be slow to read it and slow to act on it,
and ends the lease only at the count that it saw.  The holder's clock falls behind, by as much as the delay at most.

Times are told from now, and what is too long ago to matter is all one; so the search has an end, and time has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from safefs.lease import OwnLease, Sightings, Terms
from tests.model.explore import Violation, explore

TERMS = Terms(lease_seconds=3, delay_seconds=2)
DELAY = int(TERMS.delay_seconds)
LONG_AGO = -int(TERMS.gone_seconds)
NODE = "holder"


class State(NamedTuple):
    behind: int = 0  # the holder's clock
    renewed: int = 0  # when, as the holder knows and by its clock
    sent: int | None = None  # a renewal, by its clock
    carried: bool = False  # that renewal has counted
    ended: bool = False
    seen: tuple[int, int] | None = (
        None  # by the other node: how many renewals ago its count was new, and when it saw it
    )
    since: int | None = None  # the other node looks
    read: int | None = None  # how many renewals ago the count was that it has read

    @property
    def holds(self) -> bool:
        return OwnLease(TERMS, self.renewed).holds(0)


def steps(state: State, most_behind: int = DELAY) -> Iterator[tuple[str, State, bool]]:
    yield "a tick", _later(state, 1), False
    if state.behind < most_behind:
        yield "a tick that the holder's clock misses", _later(state, 0)._replace(behind=state.behind + 1), False
    if state.sent is None and state.holds:
        yield "the holder renews", state._replace(sent=0, carried=False), False
    if state.sent is not None:
        if not state.carried and not state.ended:
            yield "the renewal counts", _counted(state), False
        if state.carried:
            yield "the holder knows", state._replace(renewed=state.sent, sent=None), False
        yield "the answer is lost", state._replace(sent=None), False
    if state.since is None:
        yield "the other looks", state._replace(since=0), False
    elif state.read is None:
        yield "the other reads", state._replace(read=0), False
    else:
        yield "the other notes", _noted(state, state.since, state.read), False


def _later(state: State, holder_ticks: int) -> State:
    return state._replace(
        renewed=max(state.renewed - holder_ticks, LONG_AGO),
        sent=None if state.sent is None else max(state.sent - holder_ticks, LONG_AGO),
        seen=None if state.seen is None else (state.seen[0], max(state.seen[1] - 1, 2 * LONG_AGO)),
        since=None if state.since is None else max(state.since - 1, LONG_AGO),
    )


def _counted(state: State) -> State:
    """The count is another one.  Of older ones it matters only whether they are the same, so they are 1 and 2."""
    seen, when = state.seen or (None, 0)
    ages = [0, *sorted({age + 1 for age in (seen, state.read) if age is not None})]
    return state._replace(
        carried=True,
        seen=None if seen is None else (ages.index(seen + 1), when),
        read=None if state.read is None else ages.index(state.read + 1),
    )


def _noted(state: State, since: int, read: int) -> State:
    sightings = Sightings(TERMS, {} if state.seen is None else {NODE: state.seen})
    is_gone = sightings.see(NODE, read, since, 0)
    seen, when = sightings._seen[NODE]
    assert isinstance(seen, int)
    ended = state.ended or (is_gone and read == 0)
    return state._replace(seen=(seen, int(when)), since=None, read=None, ended=ended)


def check(state: State) -> str:
    return "a lease is ended that its holder goes by" if state.ended and state.holds else ""


def test_all_orders() -> None:
    found = explore(State(), steps, check, 1_000_000)
    print(f"{len(found.states)} states, {found.steps} steps")
    assert any(state.ended for state in found.states)
    assert found.require_within_reach(lambda state: state.ended) > 0


def test_control_a_clock_that_falls_behind_by_more_than_the_delay() -> None:
    with pytest.raises(Violation, match="goes by"):
        explore(State(), lambda state: steps(state, DELAY + 1), check, 1_000_000)


def test_control_a_lease_that_counts_from_its_answer() -> None:
    """The holder takes the time at which it knows for that at which it asked."""

    def late(state: State) -> Iterator[tuple[str, State, bool]]:
        for label, after, is_fault in steps(state):
            yield label, after._replace(renewed=0) if label == "the holder knows" else after, is_fault

    with pytest.raises(Violation, match="goes by"):
        explore(State(), late, check, 1_000_000)
