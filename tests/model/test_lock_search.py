"""Every order of events between two nodes that share a lock: the protocol of safefs.cluster.names, searched through.

The very code of daemons runs (tests.model.protocol); what can come to it, and go wrong, is in tests.model.cluster.
Asked of every state: no two whose leases hold by their own clocks have locks that exclude each other, and the record
makes sense; that who holds a lock is told when it is taken from him, and nobody else; and that without another fault
every client of a node that lives gets its lock, so nobody waits for ever.

`SAFEFS_SEARCH=deep` has it look further: two clients on one node, answers that are under way for long while leases end,
faults with a reader.  What each search came to is printed (docs/decisions/0006-lock-protocol-search.md has figures).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from safefs.cluster.backend import BackendError, Stored
from safefs.cluster.name import Name
from safefs.cluster.record import NameRecord
from safefs.locks import Locks
from safefs.locktable import Held, Kind, Lock, LockTable, Mode, NameLocks, Owner, Wait
from tests.model.cluster import Cluster, Faults, State, check_record
from tests.model.explore import Violation, explore
from tests.model.protocol import LingeringNames, SearchedNames, ToldNames, View, without_an_event_loop
from tests.support.lending import Extension

MOST_STATES = 10_000_000
ONE = frozenset({0})
BOTH = frozenset({0, 1})

CALLS = Faults(1, leases=False, deaths=False, tidies=True)
LEASES = Faults(1, calls=False, deaths=False)
DEATHS = Faults(1, calls=False, leases=False)
PROMPT_CALLS = Faults(1, leases=False, deaths=False, prompt=BOTH)
PROMPT_LEASES = Faults(1, calls=False, deaths=False, prompt=BOTH)
PROMPT = Faults(prompt=BOTH)
LENT_LEASES = replace(PROMPT_LEASES, of=ONE, only_lent=True)
STALE = Faults(1, calls=False, leases=False, deaths=False, stale=True)
EVERY_LOOK = Faults(idle_looks=True)

# With changes that nodes look for; where they are told of them, see TOLD.
BRIEF = [
    (["X", "X"], Faults()),
    (["X", "X"], EVERY_LOOK),
    (["X", "X"], Faults(tidies=True)),
    (["X", "S"], Faults()),
    (["X", "T"], Faults()),
    (["X", "G"], Faults()),
    (["X", "X"], DEATHS),
    (["X", "X"], STALE),
    (["X", "X"], CALLS),
]
LENT = [
    (["RX"], Faults()),
    (["R", "X"], PROMPT),
    (["R"], PROMPT_LEASES),
    (["R", "T"], LENT_LEASES),
]
BROKEN = [
    (["XB"], Faults()),
    (["X", "B"], Faults()),
    (["X", "B"], DEATHS),
    (["R", "B"], PROMPT),
]
TOLD = [
    (["X", "X"], Faults(), LingeringNames),
    (["X", "T"], Faults(), LingeringNames),
    (["X", "X"], Faults(tidies=True), ToldNames),
    (["X", "G"], Faults(), ToldNames),
    (["X", "X"], DEATHS, ToldNames),
    (["X", "X"], PROMPT_CALLS, LingeringNames),
]
DEEP = [
    (["X", "X"], PROMPT_LEASES),
    (["XX", "X"], Faults()),
    (["XS", "S"], Faults()),
    (["X", "X"], LEASES),
    (["X", "S"], CALLS),
    (["X", "TG"], PROMPT_CALLS),
    (["X", "S"], PROMPT_LEASES),
    (["R", "X"], Faults()),
    (["R", "X"], replace(PROMPT, tidies=True)),
    (["R", "X"], LENT_LEASES),
    (["RX", "T"], PROMPT),
    (["X", "B"], CALLS),
    (["X", "B"], STALE),
    (["X", "B"], PROMPT_LEASES),
    (["X", "TB"], PROMPT),
    (["X", "TB"], Faults()),
    (["S", "SB"], PROMPT),
]
TOLD_DEEP = [
    (["XX", "X"], Faults(), LingeringNames),
    (["X", "X"], CALLS, ToldNames),
    (["X", "X"], PROMPT_LEASES, LingeringNames),
    (["X", "TB"], PROMPT, LingeringNames),
]
IS_DEEP = os.environ.get("SAFEFS_SEARCH") == "deep"
LOOKED_FOR = [(*depth, SearchedNames) for depth in BRIEF + LENT + BROKEN + (DEEP if IS_DEEP else [])]
DEPTHS = LOOKED_FOR + TOLD + (TOLD_DEEP if IS_DEEP else [])


@pytest.fixture(autouse=True)
def _no_event_loop() -> Iterator[None]:
    with without_an_event_loop():
        yield


def search(cluster: Cluster, most: int = MOST_STATES) -> int:
    """Go through all states; how many there are.  Violation where one must not be, or leads to no good end."""
    found = explore(cluster.first, cluster.steps, cluster.check, most)
    goals = found.require_within_reach(cluster.is_settled)
    tables = [len(table.views) for table in cluster.tables]
    print(f"{len(found.states)} states, {found.steps} steps, {goals} at rest; of the nodes: {tables}")
    return len(found.states)


def describe(value: object) -> str:
    if isinstance(value, type):
        return value.__name__.removesuffix("Names").lower()
    if not isinstance(value, Faults):
        return "+".join(value) if isinstance(value, list) else ""
    kinds = [kind for kind in ("calls", "leases", "deaths", "stale", "idle_looks", "tidies") if getattr(value, kind)]
    return f"{value.most}-{'-'.join(kinds)}" if value.most or value.idle_looks or value.tidies else "nothing-fails"


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("nodes", "faults", "names"), DEPTHS, ids=describe)
def test_all_orders(nodes: list[str], faults: Faults, names: type[SearchedNames]) -> None:
    alike = len(set(nodes)) == 1 and faults.most == 1
    faults = replace(faults, of=ONE) if alike else faults
    assert search(Cluster(nodes, faults, names)) > (1000 if nodes[1:] else 20)


# Controls: a protocol that lacks one thing is found out, so each of these has a meaning, and so has the search.


class ActsOnOldAnswers(SearchedNames):
    """An answer to what this node asked under its old name counts under the new one."""

    def _require_lease(self, name: Name) -> None:
        if not self.lease_holds():
            raise BackendError("the lease of this node is over")


class ServesWithoutALease(SearchedNames):
    """What was delegated to a node is locked there until it has noticed that its lease is over."""

    def _require_lease(self, name: Name) -> None:
        if name.mine is None:
            super()._require_lease(name)


class LeavesWhatIsLent(SearchedNames):
    """A name is given back without what was lent of it."""

    async def _advance(self, name: Name) -> None:
        if name.mine is not None and name.asked and not name.pending:
            name.leaving, name.mine = name.mine, None
        await super()._advance(name)


class KeepsWhatWasAsked(SearchedNames):
    """What is asked without a lease is carried out under the old name, later."""

    def _has_lease_to_serve(self) -> bool:
        return True


class HeedsOnlyWhatItKnows(SearchedNames):
    """A name that is delegated to it by a swap that came too late is nothing that it knows of."""

    async def _heed(self) -> None:
        while True:
            name = self._names.get(await self._backend.next_notice())
            if name is not None:
                name.asked = True
                self._wake(name)


class GivesBackUnused(SearchedNames):
    """A name is given back when it is asked for, whatever this node took it for."""

    async def _advance(self, name: Name) -> None:
        if name.mine is not None and name.asked:
            name.leaving, name.mine = name.mine, None
        await super()._advance(name)


class TrustsLostAnswers(SearchedNames):
    """A swap whose answer was lost is taken for one that was carried out."""

    async def _swap(self, name: Name, stored: Stored, new: NameRecord) -> bool:
        try:
            return await super()._swap(name, stored, new)
        except BackendError:
            name.stored = Stored(stored.version + 1, new)
            return True


class NeverLooksAgain(Cluster):
    """Who waits relies on notices and changes, and never looks by himself."""

    def sees_something(self, state: State, view: View, seen: int) -> bool:
        return view.poked or seen != state.record[0]


class HandsOverAtOnce(Cluster):
    """A node can be gone before its own clock has told it: no lock-delay."""

    @staticmethod
    def may_be_gone(state: State, at: int, view: View) -> bool:
        return True


class ActsWithoutALease(Cluster):
    """A node uses its locks for as long as nobody has told it that it lost them."""

    @staticmethod
    def may_act(view: View) -> bool:
        return True


class KnowsNoTime(Extension):
    """What is lent is lent until it is taken back."""

    def lend_lock(self, number: int, owner: int, held: Held, until: float) -> bool:
        return super().lend_lock(number, owner, held, float("inf"))


OVERLAP = "two hold a lock that excludes"
UNTOLD = "a lock is taken from somebody who is not told"
UNBROKEN = "a lock is broken that nobody has broken"
STUCK = "no goal is within reach any more"
TOO_LATE = "a lock is had after the lease"
ENDLESS = "the record is replaced again and again"


@pytest.mark.parametrize(
    ("names", "faults", "what"),
    [
        *([(KeepsWhatWasAsked, PROMPT_LEASES, UNTOLD)] if IS_DEEP else []),
        (ActsOnOldAnswers, PROMPT_LEASES, UNTOLD),
        (TrustsLostAnswers, CALLS, UNTOLD),
        (HeedsOnlyWhatItKnows, CALLS, STUCK),
    ],
)
def test_control_other_nodes(names: type[SearchedNames], faults: Faults, what: str) -> None:
    with pytest.raises(Violation) as caught:
        search(Cluster(["X", "X"], replace(faults, of=ONE), names))
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("cluster", "faults", "what"),
    [
        (NeverLooksAgain, Faults(), STUCK),
        (HandsOverAtOnce, Faults(), UNTOLD),
        (ActsWithoutALease, PROMPT_LEASES, OVERLAP),
    ],
)
def test_control_other_clusters(cluster: type[Cluster], faults: Faults, what: str) -> None:
    with pytest.raises(Violation) as caught:
        search(cluster(["X", "X"], faults))
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("nodes", "faults", "names", "extension", "what"),
    [
        (["R"], PROMPT_LEASES, ServesWithoutALease, Extension, TOO_LATE),
        (["R", "T"], LENT_LEASES, SearchedNames, KnowsNoTime, TOO_LATE),
        (["R", "X"], PROMPT, LeavesWhatIsLent, Extension, UNTOLD),
    ],
)
def test_control_loans(
    nodes: list[str], faults: Faults, names: type[SearchedNames], extension: type[Extension], what: str
) -> None:
    with pytest.raises(Violation) as caught:
        search(Cluster(nodes, faults, names, extension))
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("ignored", "nodes", "what"), [("waiting", ["RX"], STUCK), ("held", ["RX"], OVERLAP)], ids=["waiting", "held"]
)
def test_control_a_name_is_lent_that_others_have_to_do_with(
    ignored: str, nodes: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With requests that nobody looks at any more, and with locks of others."""
    held_alone = LockTable.held_alone

    def careless(table: LockTable, owner: Owner) -> Held | None:
        others = {"waiting": [], "held": [held for held in table.held if held.owner == owner]}
        return held_alone(replace(table, **{ignored: others[ignored]}), owner)

    monkeypatch.setattr(LockTable, "held_alone", careless)
    with pytest.raises(Violation) as caught:
        search(Cluster(nodes, Faults()))
    assert caught.value.what == what


def test_control_a_name_that_is_given_back_unused_and_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes take it from each other for ever: neither uses it first, nor leaves it to the one who asked for it."""
    monkeypatch.setattr(NameRecord, "given_back", lambda _record, _node, locks: NameRecord(locks=locks))
    with pytest.raises(Violation) as caught:
        search(Cluster(["X", "X"], Faults(of=ONE, prompt=BOTH), GivesBackUnused))
    assert caught.value.what == ENDLESS


if IS_DEEP:

    def test_control_a_queue_that_is_not_put_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
        """A delegate gives a name back without those who wait for it, and they ask again and again."""

        def given_back(_record: NameRecord, _node: str, locks: NameLocks) -> NameRecord:
            kept = locks.copy()
            for table in kept.tables.values():
                table.waiting = []
            return NameRecord(locks=kept)

        monkeypatch.setattr(NameRecord, "given_back", given_back)
        with pytest.raises(Violation) as caught:
            search(Cluster(["TX", "X"], Faults()), most=600_000)
        assert caught.value.what == ENDLESS


def test_control_who_is_not_told_that_his_lock_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NameRecord, "broke", lambda record, _nodes: record)
    with pytest.raises(Violation) as caught:
        search(Cluster(["X", "B"], PROMPT))
    assert caught.value.what == UNTOLD


def test_control_everybody_is_told_that_his_lock_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Locks.broken
    monkeypatch.setattr(Locks, "broken", lambda locks, key, _kept: broken(locks, key, NameLocks()))
    with pytest.raises(Violation) as caught:
        search(Cluster(["X", "TB"], PROMPT))
    assert caught.value.what == UNBROKEN


LOCKS = [Lock(Owner("n0", number), Mode.EXCLUSIVE) for number in range(2)]


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (NameRecord("n0", (), NameLocks({Kind.FLOCK: LockTable(LOCKS[:1])})), "a name is delegated, and has locks"),
        (NameRecord("n0", broken=("n1",)), "a name is delegated, and has locks"),
        (NameRecord("n0", ("n0",)), "wanted by the node that has it"),
        (NameRecord("", (), NameLocks({Kind.RECORD: LockTable(LOCKS)})), "two locks on record exclude"),
        (NameRecord("", (), NameLocks({Kind.RECORD: LockTable([], [Wait(1, LOCKS[0])])})), "on record for nobody"),
    ],
)
def test_control_records_that_make_no_sense(record: NameRecord, what: str) -> None:
    assert what in check_record(record)
