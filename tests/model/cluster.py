"""All that can happen between nodes that share one name (tests.model.protocol), with what can go wrong on the way.

Guaranteed is what safefs.cluster.backend promises, and no more: a swap replaces the record that was read or nothing; a
node is gone no sooner than its own clock has told it that its lease is over (for which see test_lease_search.py).
Within that, everything may come at any time and in any order: calls, their answers, notices, what clients do.  A node
that is frozen is one to which nothing comes while its lease ends; it may go on at any moment after that.

Free, as often as it likes: a notice gets lost, comes late or twice; a pause ends early; a name is put away; what is
lent is used, or the lease as it was then is over.
Out of the budget of faults:

- a call fails, and was not carried out, or was, or will be: a swap can arrive long after its node has stopped waiting
- a swap that was carried out is said to have failed
- a lease ends, and its node wakes up at any time after that, finds it out at any time after that, and joins again
- a node dies at any moment
- a read finds an older record; but none from before what its own node has written or seen
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from safefs.cluster.record import NameRecord
from safefs.locktable import Kind, LockTable, Owner
from tests.model.protocol import CLIENTS, HOLDS, NO_RECORD, Call, SearchedNames, Table, Version, View, stored_of
from tests.support.lending import Extension

SETTLED = {"free", "done", "refused", "gave-up", "fenced"}
MOST_SWAPS = 20  # on one record, by a few clients that come once: more of them never end
Step = tuple[str, "State", bool]


class State(NamedTuple):
    nodes: tuple[int, ...]  # states in their tables
    faults: int  # how many are still to come
    record: Version = (0, NO_RECORD)
    last_version: int = 0
    answers: frozenset[tuple[int, int, object]] = frozenset()  # of calls that were carried out: node, call, answer
    late: frozenset[tuple[int, str]] = frozenset()  # swaps that nobody waits for: version and record
    notices: frozenset[str] = frozenset()  # to these nodes
    ended: frozenset[str] = frozenset()  # leases that others know to be over
    dead: frozenset[int] = frozenset()
    past: tuple[tuple[Version, ...], ...] = ()  # what a stale read of each node can still find


@dataclass(frozen=True)
class Faults:
    """How many in one run, and which."""

    most: int = 0
    of: frozenset[int] = frozenset({0, 1})  # nodes; where they are alike and it is one fault, one of them will do
    calls: bool = True
    leases: bool = True
    deaths: bool = True
    stale: bool = False
    idle_looks: bool = False  # pauses end early
    only_lent: bool = False  # leases end while something is lent, or not at all
    tidies: bool = False  # nodes put away what they have not used for long; it can be long at any moment
    prompt: frozenset[int] = frozenset()  # nodes whose answers arrive at once: fewer states, and fewer orders


class Cluster:
    """The steps of all nodes; each is described by the clients that it has (`protocol.CLIENTS`)."""

    def __init__(
        self,
        nodes: list[str],
        faults: Faults,
        names: type[SearchedNames] = SearchedNames,
        extension: type[Extension] = Extension,
    ) -> None:
        self.tables = [Table(f"n{at}", clients, names, extension) for at, clients in enumerate(nodes)]
        self._clients = nodes
        self._faults = faults
        self.first = State((0,) * len(nodes), faults.most, past=((),) * len(nodes) if faults.stale else ())
        self._record_checks: dict[Version, str] = {}

    def views(self, state: State) -> Iterator[tuple[int, View]]:
        for at, number in enumerate(state.nodes):
            yield at, self.tables[at].views[number]

    # ------------------------------------------------------------- questions

    def check(self, state: State) -> str:
        """What is wrong with a state."""
        holders = [
            (at, view, client)
            for at, view in self.views(state)
            if at not in state.dead and self.may_act(view)
            for client, phase in enumerate(view.phases)
            if phase in HOLDS and not self._is_about_to_be_told(state, view, client)
        ]
        modes = [CLIENTS[self._clients[at][client]].mode for at, _, client in holders]
        if len(modes) > 1 and CLIENTS["X"].mode in modes:
            return "two hold a lock that excludes"
        if any(not self._is_kept(state, at, view, client) for at, view, client in holders):
            return "a lock is taken from somebody who is not told"
        ordered = frozenset[Owner]().union(*(view.ordered for _, view in self.views(state)))
        if any(not view.broken <= ordered for _, view in self.views(state)):
            return "a lock is broken that nobody has broken"
        if any(view.too_late for _, view in self.views(state)):
            return "a lock is had after the lease"
        if state.last_version > MOST_SWAPS:
            return "the record is replaced again and again"
        if state.record not in self._record_checks:
            self._record_checks[state.record] = check_record(on_record(state.record[1]))
        return self._record_checks[state.record]

    @staticmethod
    def _is_about_to_be_told(state: State, view: View, client: int) -> bool:
        """Whether an operator may have broken a client's lock, of which his node is going to hear."""
        at_home = "breaking" in view.phases and owner_of(view, client) in view.ordered
        return at_home or view.name in on_record(state.record[1]).broken

    @staticmethod
    def _is_kept(state: State, at: int, view: View, client: int) -> bool:
        """Whether others know that a lock is held, or its node is about to hear what has become of it."""
        record = on_record(state.record[1])
        is_known = record.delegate == view.name or owner_of(view, client) in record.locks.holders()
        return is_known or any(node == at for node, _, _ in state.answers)

    def is_settled(self, state: State) -> bool:
        """Whether every client of a node that lives has got what it asked for, and nothing of its is on record."""
        living = [view for at, view in self.views(state) if at not in state.dead]
        has_locks = on_record(state.record[1]).locks.nodes()
        return all(SETTLED.issuperset(view.phases) and view.name not in has_locks for view in living)

    @staticmethod
    def may_act(view: View) -> bool:
        """Whether a node may use the locks that it has."""
        return not view.lapsed

    @staticmethod
    def may_be_gone(state: State, at: int, view: View) -> bool:
        """Whether others may find that a node has lost its lease."""
        return view.lapsed or at in state.dead

    def sees_something(self, state: State, view: View, seen: int) -> bool:
        """Whether a look is of use: else it would find all as before, and the pause would begin again.

        Nobody waits for a record that is not there: who has found it replaced by none goes on after the pause.
        """
        if self._faults.idle_looks or view.poked or seen != state.record[0] or not seen:
            return True
        nodes, delegate = named_in(state.record[1])
        return bool(nodes & state.ended) or (bool(delegate) and delegate not in state.notices)

    # ----------------------------------------------------------------- steps

    def steps(self, state: State) -> Iterator[Step]:
        for at, view in self.views(state):
            if at not in state.dead:
                yield from self._clients_of(state, at, view)
                yield from self._keeper_of(state, at, view)
                yield from self._calls_of(state, at, view)
        for at, view in self.views(state):
            lost = range(view.name.find("'"), len(view.name)) if "'" in view.name else ()
            former = {view.name[:end] for end in lost}  # its names under leases that it has lost
            over = former | ({view.name} if self.may_be_gone(state, at, view) else set())
            for name in sorted(over - state.ended):
                yield f"others see that {name} is gone", self._end(state, name), False
        for old, text in state.late:
            after = state._replace(late=state.late - {(old, text)})
            yield "a late swap arrives", self._swap(after, None, old, text)[0], False

    def _node(self, state: State, at: int, *given: object) -> State:
        after = self.tables[at].after(state.nodes[at], *given)
        return state._replace(nodes=(*state.nodes[:at], after, *state.nodes[at + 1 :]))

    def _clients_of(self, state: State, at: int, view: View) -> Iterator[Step]:
        for client, phase in enumerate(view.phases):
            who = f"client {client} of {view.name}"
            # Once it has had the lock nothing may rely on it that it will want it again, or close its file.
            leisure = phase == "free"
            if client in view.lent and phase in ("free", "holding"):
                what = "locks" if leisure else "unlocks"
                yield f"{who} {what} by its loan", self._node(state, at, "uses_loan", client), leisure
            if phase == "idle" or (view.turns[client] and phase in ("free", "holding")):
                yield f"{who} asks", self._node(state, at, "asks", client), phase != "idle"
            if phase == "holding" and view.turns[client]:
                yield f"{who} unlocks", self._node(state, at, "unlocks", client), False
            if phase in ("free", "holding"):
                yield f"{who} closes its file", self._node(state, at, "closes", client), leisure
            if phase == "asking" and CLIENTS[self._clients[at][client]].may_give_up:
                yield f"{who} gives up", self._node(state, at, "gives_up", client), False

    def _keeper_of(self, state: State, at: int, view: View) -> Iterator[Step]:
        may_fail = state.faults and at in self._faults.of
        one_less = state._replace(faults=state.faults - 1)
        may_end = self._faults.leases and not view.lapsed and (view.lent or not self._faults.only_lent)
        if may_fail and may_end:
            yield f"the lease of {view.name} is over", self._node(one_less, at, "lapses"), True
        if view.lapsed and view.joined:
            yield f"{view.name} notices that its lease is over", self._node(state, at, "loses"), False
        elif not view.joined:
            yield f"{view.name} joins under a new name", self._node(state, at, "joins"), False
        if view.lent:
            yield f"the lease of {view.name} outlives what was lent", self._node(state, at, "loans_end"), False
        if self._faults.tidies:
            yield f"{view.name} tidies up", self._node(state, at, "tidies_up"), False
        if may_fail and self._faults.deaths:
            yield f"{view.name} dies", self._die(one_less, at, view), True

    def _die(self, state: State, at: int, view: View) -> State:
        carried = {number for node, number, _ in state.answers if node == at}
        swaps = {call[1:] for number, call in view.calls if call[0] == "swap" and number not in carried}
        return state._replace(
            dead=state.dead | {at},
            late=state.late | swaps,
            answers=frozenset(answer for answer in state.answers if answer[0] != at),
        )

    @staticmethod
    def _end(state: State, name: str) -> State:
        return state._replace(ended=state.ended | {name})

    def _calls_of(self, state: State, at: int, view: View) -> Iterator[Step]:
        may_fail = state.faults and at in self._faults.of
        answers = {number: answer for node, number, answer in state.answers if node == at}
        for number, call in view.calls:
            what = f"{view.name}: {call[0]}"
            if number in answers:
                arrived = state._replace(answers=state.answers - {(at, number, answers[number])})
                yield f"{what} is answered", self._node(arrived, at, "answer", number, answers[number]), False
            else:
                arrived = state
                yield from self._carry_out(state, at, view, number, call)
            if may_fail and self._faults.calls and call[0] == "swap" and number in answers:
                unsure = arrived._replace(faults=state.faults - 1)
                yield f"{what} is said to have failed", self._node(unsure, at, "answer", number, None), True
            if may_fail and self._faults.calls and call[0] not in ("change", "notice", "sleep"):
                arrived = arrived._replace(faults=state.faults - 1)
                if call[0] == "swap" and number not in answers:
                    arrived = arrived._replace(late=state.late | {call[1:]})
                yield f"{what} gets no answer", self._node(arrived, at, "error", number), True

    def _carry_out(self, state: State, at: int, view: View, number: int, call: Call) -> Iterator[Step]:
        what = f"{view.name}: {call[0]}"
        match call:
            case ("swap", old, text):
                after, answer = self._swap(state, at, old, text)
                yield f"{what} to {summary(text)}", self._answered(after, at, number, answer), False
            case ("read",):
                yield f"{what} of {summary(state.record[1])}", self._read(state, at, number, state.record), False
                if state.faults and at in self._faults.of and self._faults.stale:
                    one_less = state._replace(faults=state.faults - 1)
                    for past in state.past[at]:
                        yield f"{what} of the older {past}", self._read(one_less, at, number, past), True
            case ("sleep",):
                yield f"{view.name} tries again", self._node(state, at, "answer", number, None), False
            case ("notify", node):
                lost = self._node(state, at, "answer", number, None)
                yield f"{what} is lost", lost, False
                yield what, lost._replace(notices=state.notices | {node}), False
            case ("notice",):
                if view.name in state.notices:
                    taken = self._node(state, at, "answer", number, None)
                    yield f"{what} comes", taken._replace(notices=state.notices - {view.name}), False
            case ("gone", nodes):
                yield what, self._node(state, at, "answer", number, nodes & state.ended), False
            case ("current", version):
                is_current = version == state.record[0]
                yield f"{what}: {is_current}", self._answered(state, at, number, is_current), False
            case ("change", seen):
                if seen != state.record[0]:
                    yield f"{what} to {summary(state.record[1])}", self._read(state, at, number, state.record), False
                if self.sees_something(state, view, seen):
                    yield f"{view.name} looks again", self._node(state, at, "answer", number, None), False

    def _answered(self, state: State, at: int, number: int, answer: object) -> State:
        """The answer is on its way."""
        if at in self._faults.prompt:
            return self._node(state, at, "answer", number, answer)
        return state._replace(answers=state.answers | {(at, number, answer)})

    def _read(self, state: State, at: int, number: int, version: Version) -> State:
        if state.past:
            known = (*state.past[at], state.record)
            state = self._remember(state, at, known[known.index(version) :])
        return self._answered(state, at, number, version)

    @staticmethod
    def _remember(state: State, at: int, versions: tuple[Version, ...]) -> State:
        """What is still to be found by a stale read: the versions without the latest."""
        past = tuple(version for version in versions if version != state.record)
        return state._replace(past=(*state.past[:at], past, *state.past[at + 1 :]))

    def _swap(self, state: State, by: int | None, old: int, text: str) -> tuple[State, Version | None]:
        if state.record[0] != old:
            if by is not None and state.past:
                state = self._remember(state, by, ())  # the attempt has had it look anew
            return state, None
        number = state.last_version + 1
        after = (0, NO_RECORD) if is_empty(text) else (number, text)
        past = tuple((*each, state.record) if at != by else () for at, each in enumerate(state.past))
        return state._replace(record=after, last_version=number, past=past), after


def check_record(record: NameRecord) -> str:
    """What is wrong with a record."""
    try:
        if NameRecord.from_json(record.to_json()).to_json() != record.to_json():
            return "a record is another one when it is read again"
    except ValueError as error:
        return str(error)
    if record.delegate in record.wanted:
        return "a name is wanted by the node that has it"
    return next(filter(None, map(_check_table, record.locks.tables.values())), "")


def _check_table(table: LockTable) -> str:
    if any(one.conflicts(other) for one in table.held for other in table.held):
        return "two locks on record exclude each other"
    if any(next(table.blockers(wait), None) is None for wait in table.waiting):
        return "a request waits on record for nobody"
    return ""


def owner_of(view: View, client: int) -> Owner:
    return Owner(view.name, client + 1)


@cache
def on_record(text: str) -> NameRecord:
    return stored_of((1, text)).record


@cache
def named_in(text: str) -> tuple[set[str], str]:
    """The nodes on record, and whom the name is delegated to."""
    record = on_record(text)
    return record.nodes(), record.delegate


def is_empty(text: str) -> bool:
    return not on_record(text)


@cache
def summary(text: str) -> str:
    """A record in one line."""
    record = on_record(text)
    if record.delegate:
        return f"delegated to {record.delegate}, wanted by {list(record.wanted)}"
    table = record.locks[Kind.FLOCK]
    held = [f"{lock.owner.node}/{lock.owner.number}" for lock in table.held]
    waiting = [f"{wait.lock.owner.node}/{wait.lock.owner.number}" for wait in table.waiting]
    broken = f", broken for {list(record.broken)}" if record.broken else ""
    return f"held {held}, waiting {waiting}{broken}"
