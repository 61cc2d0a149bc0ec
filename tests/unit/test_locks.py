"""What one node keeps of the locks of its processes: as much as there is, and nothing that is no longer true."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import hypothesis
import hypothesis.strategies as st
import pytest
import trio
import trio.testing

from safefs.cluster.names import Names
from safefs.cluster.record import HandOver, Release, Step
from safefs.locks import Alone, Estate, Locks, Waiting
from safefs.locktable import OFFSET_MAX, Kind, Lock, Mode, NameLocks, Owner
from tests.support.lending import Extension
from tests.support.memory_backend import MemoryBackend, MemoryCluster

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
        assert locks.flushed(owner(number), HANDLE) == []
    assert not locks._uses.of(HANDLE)
    assert locks.counts() == (0, 0)
    assert locks.key_of(HANDLE) == NAME  # by which it is locked from then on
    locks.released(HANDLE)
    assert locks.key_of(HANDLE) is None


def test_a_close_leaves_the_locks_of_others(locks: Locks) -> None:
    for number in (1, 2):
        lock = Lock(owner(number), Mode.EXCLUSIVE, number, number)
        assert locks.acquire(NAME, Kind.RECORD, lock, HANDLE, may_wait=False) is None
    locks.flushed(owner(1), HANDLE)
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
    st.sampled_from(["try", "try", "wait", "unlock", "flush", "hand over", "let go", "release", "lose"]),
    st.sampled_from([NAME, "1/y.lock"]),
    st.integers(1, 3),  # owner
    st.integers(1, 4),  # open file
    st.integers(10, 12),  # which it is of, if it is not known yet
    st.booleans(),  # whole or not
)


@hypothesis.given(st.lists(record_steps, max_size=60))
def test_marks_are_those_of_who_has_record_locks(plan: list[tuple[str, str, int, int, int, bool]]) -> None:
    locks = Locks(Alone("node"), extension := Extension())
    estates: list[tuple[Estate, int]] = []
    for step, key, number, handle, file, whole in plan:
        last = OFFSET_MAX if whole else 0
        if step in ("try", "wait"):
            lock = Lock(owner(number), Mode.EXCLUSIVE, 0, last)
            with suppress(OSError):  # refused, or EDEADLK
                locks.acquire(key, Kind.RECORD, lock, handle, may_wait=step == "wait", file=file)
        elif step == "unlock":
            locks.unlock_records(owner(number), file, 0, last)
        elif step == "flush":
            locks.flushed(owner(number), file)
            assert not locks._uses.names(owner(number), file)
        elif step == "hand over":
            estates += [(estate, handle)] if (estate := locks.hand_over(owner(number), file, handle)) else []
        elif step == "let go" and estates:
            locks.let_go(*estates.pop(number % len(estates)))
        elif step == "release":
            locks.released(handle)
        elif not locks._waiting:
            locks.lose()
        require_marks(locks, extension)
    for waiting in list(locks._waiting.values()):
        locks.give_up(waiting)
    for estate, handle in estates:
        locks.let_go(estate, handle)
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
    locks.flushed(Owner("again", 1), HANDLE)
    assert not +extension.owners


def test_what_is_locked_of_two_files_by_one_name(locks: Locks) -> None:
    """It ends with the last of them."""
    lock = Lock(owner(1), Mode.EXCLUSIVE)
    for handle, file in ((1, 10), (2, 10), (3, 11)):
        assert locks.acquire(NAME, Kind.RECORD, lock, handle, may_wait=False, file=file) is None
    assert locks.unlock_records(owner(1), 10, 0, 9) == []  # a part stays
    locks.unlock_records(owner(1), 10, 0, OFFSET_MAX)
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 0) == lock
    locks.flushed(owner(1), 10)
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 0) == lock
    locks.unlock_records(owner(1), 11, 0, 9)
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 9) is None
    assert locks.own(NAME, Kind.RECORD, owner(1), 0, 10) is not None
    locks.flushed(owner(1), 11)
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


def held(locks: Locks, *places: int) -> list[int]:
    return [at for at in places if locks.own(NAME, Kind.RECORD, owner(1), at, at)]


def test_what_another_file_has_of_the_name_outlives_a_close(locks: Locks) -> None:
    locked(locks, 1, (1, 1))
    locked(locks, 2, (2, 2))
    locks.flushed(owner(1), 1)
    assert held(locks, 1, 2) == [1, 2]
    locks.flushed(owner(1), 2)
    assert held(locks, 1, 2) == [] and locks.counts() == (0, 0)


def test_who_only_waits_keeps_nothing_of_a_closed_file(locks: Locks) -> None:
    """Another of its threads waits, through another descriptor."""
    locked(locks, 1, (1, 1))
    locks.acquire(NAME, Kind.RECORD, Lock(owner(2), Mode.EXCLUSIVE, 2, 2), 9, may_wait=False)
    waiting = locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE, 2, 2), 3, may_wait=True, file=1)
    assert waiting is not None
    locks.flushed(owner(1), 1)
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


# What a process has closed, and is held on until it is published.


def hand_over(locks: Locks, number: int, handle: int) -> Estate:
    estate = locks.hand_over(owner(number), handle, handle)
    assert estate is not None
    return estate


def test_what_is_held_on_is_its_process_s_no_more(locks: Locks) -> None:
    """It is refused to that as to everybody, and what it gets since does not end with it."""
    locked(locks, 1, (1, 3))
    estate = hand_over(locks, 1, 1)
    assert held(locks, 1, 2, 3) == []
    for number in (1, 2):
        with pytest.raises(BlockingIOError):
            locks.acquire(NAME, Kind.RECORD, Lock(owner(number), Mode.SHARED, 2, 2), 9, may_wait=False)
    locked(locks, 1, (5, 5))
    assert locks.flushed(owner(1), 9) == [] and held(locks, 5) == [5]
    locks.let_go(estate, 1)
    assert held(locks, 5) == [5]
    locked(locks, 1, (1, 3))
    assert held(locks, 1, 2, 3, 5) == [1, 2, 3, 5]


def test_nothing_is_to_be_held_on(locks: Locks) -> None:
    assert locks.hand_over(owner(1), 1, 1) is None
    locked(locks, 2, (1, 1))
    assert locks.hand_over(owner(1), 1, 1) is None and held(locks, 1) == [1]


def test_what_is_held_on_through_several_open_files(locks: Locks) -> None:
    """It is free when the last of them is done with, whatever becomes of them; and fenced through each."""
    locked(locks, 1, (1, 1))
    estate = hand_over(locks, 1, 1)
    locks.hold_on(estate, 2, 1)
    locks.let_go(estate, 2)
    locks.released(2)
    locks.hold_on(estate, 3, 1)
    locks.let_go(estate, 1)
    locks.released(1)
    assert locks.counts() == (1, 0)
    fenced = set[int]()
    locks.fence = fenced.update
    locks.broken(NAME, NameLocks())
    assert fenced == {3}
    locks.let_go(estate, 3)
    assert locks.counts() == (0, 0) and locks.lose() == set()


def test_who_waits_for_what_is_held_on_is_in_no_ring(locks: Locks) -> None:
    """Who has closed it waits for another lock, and its holder for this one: it is about to be free."""
    locked(locks, 1, (1, 1))
    other = "1/y.lock"
    locks.acquire(other, Kind.RECORD, Lock(owner(2), Mode.EXCLUSIVE), 2, may_wait=False)
    waiting = locks.acquire(NAME, Kind.RECORD, Lock(owner(2), Mode.EXCLUSIVE), 3, may_wait=True)
    assert waiting is not None
    estate = hand_over(locks, 1, 1)
    assert locks.acquire(other, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE), 4, may_wait=True) is not None
    assert not waiting.held
    locks.let_go(estate, 1)
    assert waiting.held


def test_what_is_held_on_is_so_for_other_nodes() -> None:
    """The close waits for that, as for an unlock: what its process is granted afterwards is its own."""
    names = Shared("node")
    locks = Locks(names)
    locked(locks, 1, (0, 9))
    names.is_shared = True
    estate = hand_over(locks, 1, 1)
    assert len(estate.recorded) == 1 and not estate.recorded[0].is_set()
    locks.let_go(estate, 1)
    assert names.steps == [
        HandOver(Kind.RECORD, owner(1), estate.heir),
        Release(Kind.RECORD, estate.heir, 0, OFFSET_MAX),
    ]


def ask(locks: Locks, owner: Owner, first: int, last: int, handle: int) -> Waiting:
    wanted = Lock(owner, Mode.EXCLUSIVE, first, last)
    waiting = locks.acquire(NAME, Kind.RECORD, wanted, handle, may_wait=True, file=1)
    assert waiting is not None
    return waiting


def two_nodes(nursery: trio.Nursery) -> list[Locks]:
    """Of one cluster, which are called one and two."""
    cluster, nodes = MemoryCluster(), []
    for name in ("one", "two"):
        names = Names(MemoryBackend(cluster, name))
        nodes.append(Locks(names))
        nodes[-1].serve(names)
        nursery.start_soon(names.run)
    return nodes


def test_what_another_node_unlocks_after_a_close_is_who_waits_for_its() -> None:
    """Two threads: one waits for a range that another node has, and one closes the file meanwhile."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            here, there = two_nodes(nursery)
            me, other = Owner("one", 1), Owner("two", 2)
            for locks, who, first, handle in ((here, me, 0, 1), (there, other, 50, 5)):
                waiting = ask(locks, who, first, first + 9, handle)
                await waiting.settled.wait()
                assert waiting.held
            waits = ask(here, me, 50, 59, 2)
            estate = here.hand_over(me, 1, 1)
            assert estate is not None
            for event in estate.recorded:
                await event.wait()
            there.release(NAME, Kind.RECORD, other, 50, 59)
            await waits.settled.wait()
            here.let_go(estate, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert waits.held
            again = [ask(there, other, first, first, 5) for first in (0, 59)]
            await again[0].settled.wait()
            await trio.sleep(60)
            assert again[0].held and not again[1].settled.is_set()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_close_that_ends_nothing_asks_no_other_node() -> None:
    """What was asked for is not had yet; once it is had, nobody has taken it away."""
    names = Shared("node")
    names.is_shared = True
    locks = Locks(names)
    waiting = locks.acquire(NAME, Kind.RECORD, Lock(owner(1), Mode.EXCLUSIVE), 1, may_wait=True)
    assert waiting is not None
    assert locks.flushed(owner(1), 1) == []
    locks.answer(waiting.wait.ticket, True)
    assert held(locks, 1) == [1] and len(names.steps) == 1
    locks.released(1)
    assert names.steps[1:] == [Release(Kind.RECORD, owner(1), 0, OFFSET_MAX)]


# Locks that an operator breaks.


def parts(locks: Locks, owner: Owner) -> list[tuple[int, int]]:
    """The ranges that an owner has been told that he holds."""
    held = locks._held.get((NAME, Kind.RECORD), {}).get(owner)
    return [(lock.first, lock.last) for lock in held.held] if held is not None else []


@pytest.mark.parametrize("more", [(10, 19), (20, 29), (5, 14), (0, 29)], ids=["beside", "apart", "partly", "all"])
def test_who_waits_for_more_keeps_nothing_of_what_is_broken(locks: Locks, more: tuple[int, int]) -> None:
    """Another has waited for it; what was waited for is held, through an open file that is fenced."""
    fenced = set[int]()
    locks.fence = fenced.update
    locked(locks, 1, (0, 9))
    locks.acquire(NAME, Kind.RECORD, Lock(owner(2), Mode.EXCLUSIVE, 10, 29), 2, may_wait=False)
    first = ask(locks, owner(3), 0, 4, 3)
    waits = ask(locks, owner(1), *more, 1)
    assert trio.run(locks.break_locks, NAME) == 2
    assert fenced == {1, 2}
    assert first.held and parts(locks, owner(3)) == [(0, 4)] and parts(locks, owner(2)) == []
    if more == (0, 29):
        assert not waits.held and parts(locks, owner(1)) == []
        locks.flushed(owner(3), 1)
    assert waits.held and parts(locks, owner(1)) == [more]


def test_the_same_where_it_is_another_node_s_lock() -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            here, there = two_nodes(nursery)
            fenced = set[int]()
            here.fence = fenced.update
            me, other, third = Owner("one", 1), Owner("two", 2), Owner("two", 3)
            for locks, who, first, handle in ((here, me, 0, 1), (there, other, 10, 2)):
                await ask(locks, who, first, first + 9, handle).settled.wait()
            first = ask(there, third, 0, 9, 3)
            waits = ask(here, me, 10, 19, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert await there.break_locks(NAME) == 2
            for waiting in (first, waits):
                await waiting.settled.wait()
                assert waiting.held
            assert fenced == {1} and parts(here, me) == [(10, 19)]
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_on_record_after_a_break(waits: bool) -> None:
    """It is had for longer than that, or anew, by one who has waited for it: others can have had it in between."""
    names = Shared("node")
    locks = Locks(names)
    fenced = set[int]()
    locks.fence = fenced.update
    locked(locks, 1, (0, 9))
    names.is_shared = True
    if waits:
        ask(locks, owner(1), 0, 19, 1)
    record = NameLocks()
    record[Kind.RECORD].held = [Lock(owner(1), Mode.EXCLUSIVE, 0, 19)]
    locks.broken(NAME, record)
    assert fenced == ({1} if waits else set())
    assert parts(locks, owner(1)) == [(0, 9)]
