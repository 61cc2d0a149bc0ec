"""What one node keeps of the locks of its processes: as much as there is, and nothing that is no longer true."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import hypothesis
import hypothesis.strategies as st
import pytest
import trio

from safefs.cluster.record import Acquire, Release, Step
from safefs.locks import Alone, Closed, Locks
from safefs.locktable import OFFSET_MAX, Kind, Lock, LockTable, Mode, NameLocks, Owner, Wait
from tests.support.lending import Extension

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
        assert locks.flushed(owner(number), locks.closed(owner(number), HANDLE)) == []
    assert not locks._uses.of(HANDLE)
    assert locks.counts() == (0, 0)
    assert locks.key_of(HANDLE) == NAME  # by which it is locked from then on
    locks.released(HANDLE)
    assert locks.key_of(HANDLE) is None


def test_a_close_leaves_the_locks_of_others(locks: Locks) -> None:
    for number in (1, 2):
        lock = Lock(owner(number), Mode.EXCLUSIVE, number, number)
        assert locks.acquire(NAME, Kind.RECORD, lock, HANDLE, may_wait=False) is None
    locks.flushed(owner(1), locks.closed(owner(1), HANDLE))
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
    assert locks.bound_files(1, NAME, owner(1)) == {1} and locks.bound_files(2, NAME, owner(2)) == {2}
    locks.release(NAME, Kind.FLOCK, owner(1))
    assert not locks.bound_files(1, NAME, owner(1))
    assert waiting is not None and locks.bound_files(2, NAME, owner(2)) == {2}
    assert locks.bound_files(1, NAME, owner(2)) == {2}  # by who asks
    locks.release(NAME, Kind.FLOCK, owner(2))
    assert not locks.bound_files(2, NAME, owner(2))
    locks.acquire("1/y.lock", Kind.FLOCK, Lock(owner(2), Mode.EXCLUSIVE), 2, may_wait=True)
    assert locks.key_of(2) == "1/y.lock"


# Who is marked as an owner of record locks: what he closes is not answered without us.


def require_marks(locks: Locks, extension: Extension) -> None:
    """And what is known of open files, files and names is the same, whichever is asked."""
    uses = locks._uses
    assert +extension.owners == Counter(each.number for each in uses._recorded)
    assert uses._recorded == Counter(number for _, kind, number in uses._through if kind is Kind.RECORD)
    assert min(extension.owners.values(), default=0) >= 0
    for use in uses._through:
        key, _, number = use
        assert uses._last[use] in uses.handles(use)
        for handle in uses.handles(use):
            assert use in uses.of(handle) and handle in uses.handles(use, uses._files[handle])
            assert key in uses.names(number, uses._files[handle])
    for handle in uses.open_files():
        assert all(handle in uses.handles(use) for use in uses.of(handle))
    for (number, file), names in uses._names.items():
        assert names and all(uses.handles((key, Kind.RECORD, number), file) for key in names)


record_steps = st.tuples(
    st.sampled_from(["try", "try", "wait", "unlock", "flush", "release", "lose"]),
    st.sampled_from([NAME, "1/y.lock"]),
    st.integers(1, 3),  # owner
    st.integers(1, 4),  # open file
    st.integers(10, 12),  # which it is of, if it is not known yet
    st.booleans(),  # whole or not
)


@hypothesis.given(st.lists(record_steps, max_size=60))
def test_marks_are_those_of_who_has_record_locks(plan: list[tuple[str, str, int, int, int, bool]]) -> None:
    locks = Locks(Alone("node"), extension := Extension())
    for step, key, number, handle, file, whole in plan:
        last = OFFSET_MAX if whole else 0
        if step in ("try", "wait"):
            lock = Lock(owner(number), Mode.EXCLUSIVE, 0, last)
            with suppress(OSError):  # refused, or EDEADLK
                locks.acquire(key, Kind.RECORD, lock, handle, may_wait=step == "wait", file=file)
        elif step == "unlock":
            locks.unlock_records(owner(number), file, 0, last)
        elif step == "flush":
            locks.flushed(owner(number), locks.closed(owner(number), file))
            assert not locks.closed(owner(number), file)
        elif step == "release":
            locks.released(handle)
        elif not locks._waiting:
            locks.lose()
        require_marks(locks, extension)
    for waiting in list(locks._waiting.values()):
        locks.give_up(waiting)
    for handle in range(1, 5):
        locks.released(handle)
    require_marks(locks, extension)
    assert not +extension.owners and locks.counts() == (0, 0) and not locks._uses._names and not locks._uses._files


def test_who_asked_without_a_lease_is_marked_once() -> None:
    """And not by the name that the node has no more: no close ends that."""
    names = Shared("node")
    names.is_shared = True
    locks = Locks(names, extension := Extension())
    locks.lose()
    waiting = locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE), HANDLE, may_wait=True)
    assert waiting is not None
    names.node = "again"
    locks.ask_again()
    require_marks(locks, extension)
    assert +extension.owners == {1: 1}
    locks.flushed(Owner("again", 1), locks.closed(Owner("again", 1), HANDLE))
    assert not +extension.owners


def test_what_is_locked_of_two_files_by_one_name(locks: Locks) -> None:
    """It ends with the last of them."""
    lock = Lock(owner(1), Mode.EXCLUSIVE)
    for handle, file in ((1, 10), (2, 10), (3, 11)):
        assert locks.acquire(NAME, Kind.RECORD, lock, handle, may_wait=False, file=file) is None
    assert locks.closed(owner(1), 10) == {NAME: Closed({1, 2}, {3})}
    assert locks.unlock_records(owner(1), 10, 0, 9) == []  # a part stays
    locks.unlock_records(owner(1), 10, 0, OFFSET_MAX)
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 0) == lock
    assert locks.closed(owner(1), 10) == {} and locks.closed(owner(1), 11) == {NAME: Closed({3}, set())}
    locks.unlock_records(owner(1), 11, 0, 9)
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 9) is None
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 10) is not None
    locks.flushed(owner(1), locks.closed(owner(1), 11))
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, OFFSET_MAX) is None


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_what_is_released_without_being_closed_before(locks: Locks, order: tuple[int, int]) -> None:
    """The last close of an open file ends what was locked through it last: no other close may be heard of."""
    for handle in (1, 2):
        locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE), handle, may_wait=False, file=10)
    first, second = order
    locks.released(first)
    assert (locks.own(NAME, Kind.RECORD, owner(1), 0, 0) is None) is (first == 2)
    locks.released(second)
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 0) is None and locks.counts() == (0, 0)


def locked(locks: Locks, handle: int, *ranges: tuple[int, int]) -> None:
    for first, last in ranges:
        locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE, first, last), handle, may_wait=False)


def table(*ranges: tuple[int, int]) -> LockTable:
    """Of one owner who has got these."""
    found = LockTable()
    for ticket, (first, last) in enumerate(ranges):
        found.request(Wait(ticket, Lock(owner(1), Mode.EXCLUSIVE, first, last)))
    return found


def held(locks: Locks, *places: int) -> list[int]:
    return [at for at in places if locks.own(NAME, Kind.RECORD, owner(1), at, at)]


@pytest.mark.parametrize("through", [HANDLE, HANDLE + 1])
def test_what_a_process_has_got_after_a_close(locks: Locks, through: int) -> None:
    """A wait of another thread of it has come to its end."""
    locked(locks, HANDLE, (0, 9), (20, 29))
    closed = locks.closed(owner(1), HANDLE)
    got = [(20, 24), (0, 0), (23, 26)]
    closed[NAME].since = table(*got)
    closed[NAME].again.add(through)
    locked(locks, through, *got)
    locks.flushed(owner(1), closed)
    assert held(locks, 0, 1, 9, 19, 20, 26, 27, 29) == [0, 20, 26]
    assert locks.closed(owner(1), HANDLE) == ({NAME: Closed({HANDLE}, set())} if through == HANDLE else {})
    locks.flushed(owner(1), locks.closed(owner(1), through))
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, OFFSET_MAX) is None and locks.counts() == (0, 0)


@pytest.mark.parametrize("through", [2, 3])
def test_what_another_file_has_of_the_name_outlives_a_close(locks: Locks, through: int) -> None:
    """Also if something was got since, through it or another one."""
    locked(locks, 1, (1, 1))
    locked(locks, 2, (2, 2))
    closed = locks.closed(owner(1), 1)
    closed[NAME].since = table((3, 3))
    closed[NAME].again.add(through)
    locked(locks, through, (3, 3))
    locks.flushed(owner(1), closed)
    assert held(locks, 1, 2, 3) == [1, 2, 3]
    assert locks.closed(owner(1), 1) == {}


def test_who_only_waits_keeps_nothing_of_a_closed_file(locks: Locks) -> None:
    """Another thread has asked through another open file after the close, and has nothing yet."""
    locked(locks, 1, (1, 1))
    locks.acquire(NAME, Kind.RECORD, Lock(owner(2), Mode.EXCLUSIVE, 2, 2), 9, may_wait=False)
    closed = locks.closed(owner(1), 1)
    waiting = locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE, 2, 2), 3, may_wait=True)
    assert waiting is not None
    locks.flushed(owner(1), closed)
    assert held(locks, 1, 2) == []
    locks.release(NAME, Kind.RECORD, owner(2))
    assert held(locks, 1, 2) == [2]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_what_two_files_have_of_a_name_is_released_with_the_last(locks: Locks, order: tuple[int, int]) -> None:
    for handle in (1, 2):
        locked(locks, handle, (handle, handle))
    locks.released(order[0])
    assert held(locks, 1, 2) == [1, 2]
    locks.released(order[1])
    assert held(locks, 1, 2) == [] and locks.counts() == (0, 0)


def test_what_is_to_be_published_first_is_not_released_before(locks: Locks) -> None:
    locked(locks, 1, (1, 1))
    closed = locks.closed(owner(1), 1)
    locks.released(1, lambda use: use == (NAME, Kind.RECORD, owner(1)))
    assert held(locks, 1) == [1]
    locks.flushed(owner(1), closed)
    assert held(locks, 1) == [] and locks.counts() == (0, 0)


def test_what_is_asked_of_other_nodes_is_spared() -> None:
    """The answer comes after the process has closed the file by another descriptor."""
    names = Shared("node")
    locks = Locks(names)
    locked(locks, 1, (0, 9))
    closed = locks.closed(owner(1), 1)
    names.is_shared = True
    waiting = locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE, 5, 7), 2, may_wait=False)
    assert waiting is not None
    locks.spare(owner(1), closed)
    locks.flushed(owner(1), closed)
    released = [(step.first, step.last) for step in names.steps if isinstance(step, Release)]
    assert released == [(0, 4), (8, OFFSET_MAX)]


@pytest.mark.parametrize(
    ("ranges", "first", "last", "left"),
    [
        ([], 0, OFFSET_MAX, []),
        ([(0, 9), (20, 29)], 5, 24, [(0, 4), (25, 29)]),
        ([(0, OFFSET_MAX)], 3, 3, [(0, 2), (4, OFFSET_MAX)]),
        ([(3, 5)], 0, 9, []),
        ([(3, 5)], 6, 9, [(3, 5)]),
    ],
)
def test_ranges_without_one(ranges: list[tuple[int, int]], first: int, last: int, left: list[tuple[int, int]]) -> None:
    since = table(*ranges)
    since.release(owner(1), first, last)
    assert [(lock.first, lock.last) for lock in since.held] == left


@pytest.mark.parametrize(
    ("ranges", "rest"),
    [
        ([], [(0, OFFSET_MAX)]),
        ([(0, OFFSET_MAX)], []),
        ([(5, 5), (6, 9), (3, 7)], [(0, 2), (10, OFFSET_MAX)]),
        ([(0, 3), (9, OFFSET_MAX), (20, 30)], [(4, 8)]),
    ],
)
def test_what_is_between_ranges(ranges: list[tuple[int, int]], rest: list[tuple[int, int]]) -> None:
    names = Shared("node")
    locks = Locks(names)
    locked(locks, 1, (0, OFFSET_MAX))
    names.is_shared = True
    locks.flushed(owner(1), {NAME: Closed(set(), set(), table(*ranges))})
    assert [(step.first, step.last) for step in names.steps if isinstance(step, Release)] == rest
