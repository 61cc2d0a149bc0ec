"""What is lent to whoever answers flock(2) by itself changes nothing for anybody: the same requests have the same
outcomes with a lender and without."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import trio

from safefs.locks import Alone, Lender, Locks
from safefs.locktable import Held, Kind, Lock, Mode, NameLocks, Owner
from tests.support.lending import Extension

NAMES = ["1/a.lock", "1/b.lock"]
HANDLES = range(5)  # each is on one name, and an open file of its own: its owner has the number of the handle


class Party:
    """Clients of one node, with or without an extension that answers some of them."""

    def __init__(self, extension: Extension | None) -> None:
        self.extension = extension
        self.answered = 0  # by the extension
        self.locks = Locks(Alone("node"), extension)
        self.waiting: set[int] = set()  # handles of clients that do not ask for anything else meanwhile

    def key(self, handle: int) -> str:
        return NAMES[handle % len(NAMES)]

    def flock(self, handle: int, mode: Mode | None, *, may_wait: bool) -> str:
        """What the request comes to, as locking.py and operations.py have it done."""
        if self.extension is not None and self.extension.use(handle, handle, mode, pid=handle):
            self.answered += 1
            return "done"
        key, owner = self.key(handle), Owner(self.locks.node, handle)
        if mode is None:
            self.locks.release(key, Kind.FLOCK, owner)
        else:
            try:
                waiting = self.locks.acquire(key, Kind.FLOCK, Lock(owner, mode, pid=handle), handle, may_wait=may_wait)
            except BlockingIOError:
                return "refused"
            if waiting is not None and not may_wait:
                self.locks.give_up(waiting)
                return "refused"
            if waiting is not None:
                self.waiting.add(handle)
                return "waits"
        self.locks.lend(key, handle, handle)
        return "done"

    def close(self, handle: int) -> None:
        self.locks.released(handle)

    def state(self) -> list[tuple[object, ...]]:
        """Who has what and waits for what, by the report; who waits no more asks again from now on."""
        entries = trio.run(self.locks.report)
        still = {entry["pid"] for entry in entries if entry["state"] == "waiting"}
        self.waiting &= still
        return sorted((entry["key"], entry["state"], entry["mode"], entry["pid"]) for entry in entries)


Request = tuple[str, int, Mode | None, bool]
requests = st.tuples(
    st.sampled_from(["flock"] * 9 + ["close", "look"]),
    st.sampled_from(HANDLES),
    st.sampled_from([Mode.SHARED, Mode.EXCLUSIVE, None]),
    st.booleans(),
)


def compare(plan: list[Request]) -> int:
    """Both parties get the same requests; how many of them were answered by the extension."""
    lent, kept = Party(Extension()), Party(None)
    for action, handle, mode, may_wait in plan:
        if action == "look":
            assert lent.state() == kept.state()
        elif handle in kept.waiting:
            continue
        elif action == "close":
            lent.close(handle)
            kept.close(handle)
        else:
            assert lent.flock(handle, mode, may_wait=may_wait) == kept.flock(handle, mode, may_wait=may_wait)
            kept.state()
            lent.waiting = set(kept.waiting)
    assert lent.state() == kept.state()
    assert lent.locks.counts() == kept.locks.counts()
    return lent.answered


@hypothesis.given(plan=st.lists(requests, max_size=40))
def test_nobody_can_tell(plan: list[Request]) -> None:
    compare(plan)


def test_it_is_lent() -> None:
    """Else the comparison would compare nothing."""
    plan: list[Request] = [
        ("flock", 0, mode, True) for mode in (Mode.EXCLUSIVE, None, Mode.SHARED, Mode.EXCLUSIVE, None)
    ]
    assert compare(plan) == len(plan) - 1


@pytest.mark.parametrize("forgotten", ["take_back", "lend"])
def test_control_it_is_found_out(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lender that is not asked for what it was lent, and one that is lent what others have to do with."""
    if forgotten == "take_back":
        monkeypatch.setattr(Locks, "_take_back", lambda *_: None)
    else:
        monkeypatch.setattr("safefs.locktable.LockTable.held_alone", lambda *_: Held(None, 0))
    # Not the shrinking, which only takes time here.
    search = hypothesis.settings(phases=[hypothesis.Phase.generate], max_examples=500, database=None)
    with pytest.raises((AssertionError, KeyError)):
        search(hypothesis.given(plan=st.lists(requests, min_size=20, max_size=40))(compare_only))()


def compare_only(plan: list[Request]) -> None:
    compare(plan)


def test_a_lost_lease_ends_loans() -> None:
    """What was locked by the extension is fenced as well; what it unlocked is not."""
    party = Party(extension := Extension())
    for handle in (0, 1):
        party.flock(handle, Mode.EXCLUSIVE, may_wait=True)
    party.flock(0, None, may_wait=True)
    assert party.answered == 1
    assert party.locks.lose() == {1}
    assert not extension.loans


def test_a_loan_lasts_as_long_as_the_lease() -> None:
    ends: list[float] = []

    class Noting(Extension):
        def lend_lock(self, number: int, owner: int, held: Held, until: float) -> bool:
            ends.append(until)
            return super().lend_lock(number, owner, held, until)

    names = Alone("node")
    names.lease_ends = lambda: 12.5  # type: ignore[method-assign]
    lender: Lender = Noting()
    locks = Locks(names, lender)
    locks.acquire(NAMES[0], Kind.FLOCK, Lock(Owner("node", 3), Mode.EXCLUSIVE), 3, may_wait=True)
    locks.lend(NAMES[0], 3, 3)
    assert ends == [12.5]


def test_only_who_has_locked_through_a_handle_gets_a_loan() -> None:
    """RELEASE is Python's business of such handles alone."""
    party = Party(extension := Extension())
    party.locks.release(party.key(0), Kind.FLOCK, Owner("node", 0))
    party.locks.lend(party.key(0), 0, 0)
    assert not extension.loans


def test_held_alone_is_of_whole_names() -> None:
    locks = NameLocks()
    table = locks[Kind.FLOCK]
    one, two = Owner("node", 1), Owner("node", 2)
    assert table.held_alone(one) == Held(None, 0)
    table.held = [Lock(one, Mode.SHARED, pid=7)]
    assert table.held_alone(one) == Held(Mode.SHARED, 7)
    assert table.held_alone(two) is None
