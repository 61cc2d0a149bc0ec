"""What one node keeps of the locks of its processes: as much as there is, and nothing that is no longer true."""

from __future__ import annotations

import pytest
import trio

from safefs.cluster.record import Acquire, Step
from safefs.locks import Alone, Locks
from safefs.locktable import Kind, Lock, Mode, NameLocks, Owner

NAME, HANDLE = "1/x.lock", 7


@pytest.fixture
def locks() -> Locks:
    return Locks(Alone("node"))


def owner(number: int) -> Owner:
    return Owner("node", number)


def test_an_open_file_of_many_processes(locks: Locks) -> None:
    """A server's children come and go for months, each with its own locks through what they have inherited."""
    for number in range(1, 101):
        lock = Lock(owner(number), Mode.EXCLUSIVE, 0, 0)
        assert locks.acquire(NAME, Kind.RECORD, lock, HANDLE, may_wait=False) is None
        assert locks.flushed(HANDLE, NAME, owner(number)) == []
    assert not locks._by_handle[HANDLE]
    assert locks.counts() == (0, 0)
    assert locks.key_of(HANDLE) == NAME  # by which it is locked from then on
    locks.released(HANDLE)
    assert locks.key_of(HANDLE) is None


def test_a_close_leaves_the_locks_of_others(locks: Locks) -> None:
    for number in (1, 2):
        lock = Lock(owner(number), Mode.EXCLUSIVE, number, number)
        assert locks.acquire(NAME, Kind.RECORD, lock, HANDLE, may_wait=False) is None
    locks.flushed(HANDLE, NAME, owner(1))
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 9) is None
    assert locks.own(NAME, Kind.RECORD, owner(2), 0, 9) == Lock(owner(2), Mode.EXCLUSIVE, 2, 2)
    assert locks.lose() == {HANDLE}


def test_an_open_file_keeps_its_name_when_its_locks_are_lost(locks: Locks) -> None:
    """By that it is known at its last close that something was locked through it."""
    locks.acquire(NAME, Kind.FLOCK, Lock(owner(1), Mode.EXCLUSIVE), HANDLE, may_wait=False)
    assert locks.lose() == {HANDLE}
    assert locks.key_of(HANDLE) == NAME
    locks.released(HANDLE)
    assert locks.key_of(HANDLE) is None


def test_there_is_no_lease_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anybody has noticed, as when a machine wakes up: threads ask for it right before they change anything."""
    names, holds = Alone("node"), [True]
    monkeypatch.setattr(names, "lease_holds", lambda: holds[0])
    locks = Locks(names)
    assert locks.acquire(NAME, Kind.FLOCK, Lock(owner(1), Mode.EXCLUSIVE), HANDLE, may_wait=False) is None
    assert locks.lease() == "node" and not locks.is_stale(HANDLE)
    holds[0] = False
    assert locks.lease() == "" and locks.is_stale(HANDLE)
    assert not locks.is_stale(HANDLE + 1)  # nothing was locked through it


@pytest.mark.parametrize("may_wait", [False, True])
def test_what_a_conversion_has_lost_is_not_held(locks: Locks, may_wait: bool) -> None:
    """flock(2): the old lock goes first.  Who has none is not kept from writing when the lease is lost."""
    for number in (1, 2):
        lock = Lock(owner(number), Mode.SHARED)
        assert locks.acquire(NAME, Kind.FLOCK, lock, number, may_wait=False) is None
    wanted = Lock(owner(1), Mode.EXCLUSIVE)
    if may_wait:
        assert locks.acquire(NAME, Kind.FLOCK, wanted, 1, may_wait=True) is not None
    else:
        with pytest.raises(BlockingIOError):
            locks.acquire(NAME, Kind.FLOCK, wanted, 1, may_wait=False)
    assert locks.own(NAME, Kind.FLOCK, owner(1), 0, 0) is None
    assert locks.lose() == {2}


class Shared(Alone):
    """Another node has to do with all names: every step is on its way to a record."""

    is_shared = False

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.steps: list[Step] = []

    def local(self, key: str) -> NameLocks:
        return None if self.is_shared else super().local(key)  # type: ignore[return-value]

    def submit(self, key: str, step: Step) -> trio.Event:
        self.steps.append(step)
        return trio.Event()


@pytest.mark.parametrize("given_up", [False, True])
def test_the_same_on_a_name_that_nodes_share(given_up: bool) -> None:
    names = Shared("node")
    locks = Locks(names)
    locks.acquire(NAME, Kind.FLOCK, Lock(owner(1), Mode.SHARED), HANDLE, may_wait=False)
    names.is_shared = True
    waiting = locks.acquire(NAME, Kind.FLOCK, Lock(owner(1), Mode.EXCLUSIVE), HANDLE, may_wait=given_up)
    assert waiting is not None
    step = names.steps[-1]
    assert isinstance(step, Acquire)
    if given_up:
        locks.give_up(waiting)
    else:
        locks.answer(step.wait.ticket, False)
    assert locks.own(NAME, Kind.FLOCK, owner(1), 0, 0) is None
    assert locks.lose() == set()


def test_an_open_file_is_bound_to_its_name_while_there_is_something(locks: Locks) -> None:
    def ask(number: int, handle: int) -> object:
        return locks.acquire(NAME, Kind.FLOCK, Lock(owner(number), Mode.EXCLUSIVE), handle, may_wait=True)

    assert ask(1, 1) is None
    waiting = ask(2, 2)
    assert locks.is_bound(1, NAME, owner(1)) and locks.is_bound(2, NAME, owner(2))
    locks.release(NAME, Kind.FLOCK, owner(1))
    assert not locks.is_bound(1, NAME, owner(1))
    assert waiting is not None and locks.is_bound(2, NAME, owner(2))
    assert locks.is_bound(1, NAME, owner(2))  # by who asks
    locks.release(NAME, Kind.FLOCK, owner(2))
    assert not locks.is_bound(2, NAME, owner(2))
    locks.acquire("1/y.lock", Kind.FLOCK, Lock(owner(2), Mode.EXCLUSIVE), 2, may_wait=True)
    assert locks.key_of(2) == "1/y.lock"
