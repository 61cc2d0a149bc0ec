"""The lock table against the kernel's own locks, and what it promises beyond them: nobody waits for ever."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safefs.locktable import OFFSET_MAX, Kind, Lock, LockTable, Mode, NameLocks, Owner, Wait

FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
F_OFD_GETLK, F_OFD_SETLK = 36, 37
TYPES = {Mode.SHARED: fcntl.F_RDLCK, Mode.EXCLUSIVE: fcntl.F_WRLCK, None: fcntl.F_UNLCK}
LAST = 9  # of the bytes that the examples are about
OWNERS = 3

A, B, C, D = (Owner("here", number) for number in (1, 2, 3, 4))
SHARED, EXCLUSIVE = Mode.SHARED, Mode.EXCLUSIVE


# Against the kernel.


@dataclass(frozen=True)
class Step:
    owner: int
    mode: Mode | None  # None: unlock
    first: int
    last: int


@st.composite
def steps(draw: st.DrawFn) -> Step:
    first = draw(st.integers(0, LAST))
    last = draw(st.one_of(st.integers(first, LAST), st.just(OFFSET_MAX)))
    return Step(draw(st.integers(0, OWNERS - 1)), draw(st.sampled_from([*Mode, None])), first, last)


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    """On tmpfs: its locks are the kernel's own."""
    path = Path(f"/dev/shm/safefs-locktable-{os.getpid()}")
    path.touch()
    yield path
    path.unlink()


def kernel_lock(fd: int, command: int, step: Step, mode: Mode | None) -> tuple[int, int, int]:
    """A record lock operation of the kernel's; returns the type, first and last byte that it gives back."""
    length = 0 if step.last == OFFSET_MAX else step.last - step.first + 1
    request = struct.pack(FLOCK, TYPES[mode], os.SEEK_SET, step.first, length, 0)
    kind, _, first, length, _ = struct.unpack(FLOCK, fcntl.fcntl(fd, command, request))
    return kind, first, OFFSET_MAX if length == 0 else first + length - 1


@settings(max_examples=300)
@given(st.lists(steps(), max_size=25))
def test_record_locks_are_the_kernels(file: Path, plan: list[Step]) -> None:
    """The same requests succeed, and each byte is locked alike after every one of them."""
    table = LockTable()
    fds = [os.open(file, os.O_RDWR) for _ in range(OWNERS + 1)]
    try:
        for number, step in enumerate(plan):
            owner = Owner("here", step.owner)
            if step.mode is None:
                kernel_lock(fds[step.owner], F_OFD_SETLK, step, None)
                table.release(owner, step.first, step.last)
            else:
                granted = True
                try:
                    kernel_lock(fds[step.owner], F_OFD_SETLK, step, step.mode)
                except BlockingIOError:
                    granted = False
                lock = Lock(owner, step.mode, step.first, step.last)
                assert table.attempt(Wait(number, lock)) == (granted, [])
            compare(table, fds[-1])
    finally:
        for fd in fds:
            os.close(fd)


def compare(table: LockTable, stranger: int) -> None:
    """What a stranger learns by F_OFD_GETLK of each byte, and of it and all that follow: from kernel and table."""
    for at, end in itertools.product(range(LAST + 2), (0, OFFSET_MAX)):
        last = end or at
        kind, *where = kernel_lock(stranger, F_OFD_GETLK, Step(OWNERS, EXCLUSIVE, at, last), EXCLUSIVE)
        found = table.conflict(Lock(Owner("here", OWNERS), EXCLUSIVE, at, last))
        assert found is None if kind == fcntl.F_UNLCK else found is not None
        assert found is None or (TYPES[found.mode], [found.first, found.last]) == (kind, where)


def test_the_first_of_several_conflicts_is_named() -> None:
    table = LockTable()
    for first in (20, 5, 12):
        assert table.request(Wait(first, Lock(A, EXCLUSIVE, first, first + 1)))[0]
    found = table.conflict(Lock(B, SHARED))
    assert found is not None
    assert (found.first, found.last) == (5, 6)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, OWNERS - 1), st.sampled_from([*Mode, None])), max_size=20))
def test_flock_is_the_kernels(file: Path, plan: list[tuple[int, Mode | None]]) -> None:
    """Conversions included: one that fails loses the lock that it was to replace."""
    operations = {SHARED: fcntl.LOCK_SH, EXCLUSIVE: fcntl.LOCK_EX}
    table = NameLocks()[Kind.FLOCK]
    fds = [os.open(file, os.O_RDWR) for _ in range(OWNERS)]
    try:
        for number, (who, mode) in enumerate(plan):
            owner = Owner("here", who)
            if mode is None:
                fcntl.flock(fds[who], fcntl.LOCK_UN)
                table.release(owner)
                continue
            granted = False
            with suppress(BlockingIOError):
                fcntl.flock(fds[who], operations[mode] | fcntl.LOCK_NB)
                granted = True
            assert table.attempt(Wait(number, Lock(owner, mode))) == (granted, [])
    finally:
        for fd in fds:
            os.close(fd)


def test_control_the_kernel_refuses_what_conflicts(file: Path) -> None:
    """The oracle does exclude: without that, agreeing with it would say nothing."""
    fds = [os.open(file, os.O_RDWR) for _ in range(2)]
    try:
        kernel_lock(fds[0], F_OFD_SETLK, Step(0, EXCLUSIVE, 0, 4), EXCLUSIVE)
        with pytest.raises(BlockingIOError) as refused:
            kernel_lock(fds[1], F_OFD_SETLK, Step(1, SHARED, 4, 9), SHARED)
        assert refused.value.errno == errno.EAGAIN
    finally:
        for fd in fds:
            os.close(fd)


# Waiting.


class Queue:
    """A table whose requests all may wait."""

    def __init__(self, table: LockTable | None = None) -> None:
        self.table = LockTable() if table is None else table
        self._tickets = iter(range(1, 1000))

    def ask(self, owner: Owner, mode: Mode, first: int = 0, last: int = OFFSET_MAX) -> bool:
        wait = Wait(next(self._tickets), Lock(owner, mode, first, last))
        return self.table.request(wait)[0]

    def release(self, owner: Owner, first: int = 0, last: int = OFFSET_MAX) -> list[Owner]:
        return [wait.lock.owner for wait in self.table.release(owner, first, last)]


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_locks_are_handed_over_in_the_order_of_arrival(queue: Queue) -> None:
    assert queue.ask(A, EXCLUSIVE)
    assert not any(queue.ask(owner, EXCLUSIVE) for owner in (B, C, D))
    assert [queue.release(owner) for owner in (A, B, C, D)] == [[B], [C], [D], []]


def test_readers_that_wait_get_their_locks_together(queue: Queue) -> None:
    assert queue.ask(A, EXCLUSIVE)
    assert not any(queue.ask(owner, SHARED) for owner in (B, C, D))
    assert queue.release(A) == [B, C, D]


def test_readers_do_not_starve_a_writer(queue: Queue) -> None:
    """A reader that comes after a waiting writer waits behind him, and one that may not wait is refused."""
    assert queue.ask(A, SHARED)
    assert not queue.ask(B, EXCLUSIVE)
    assert not queue.ask(C, SHARED)
    assert queue.table.attempt(Wait(99, Lock(D, SHARED))) == (False, [])
    assert queue.release(A) == [B]
    assert queue.release(B) == [C]


def test_a_request_elsewhere_in_the_file_does_not_wait(queue: Queue) -> None:
    assert queue.ask(A, EXCLUSIVE, 0, 9)
    assert not queue.ask(B, EXCLUSIVE, 5, 14)
    assert queue.ask(C, EXCLUSIVE, 20, 29)
    assert not queue.ask(D, SHARED, 12, 13)  # in the way of B, who was first


def test_a_holder_passes_those_who_wait_for_him(queue: Queue) -> None:
    """He could not unlock otherwise: two would wait for each other."""
    assert queue.ask(A, EXCLUSIVE, 0, 4)
    assert not queue.ask(B, EXCLUSIVE, 0, 9)
    assert queue.ask(A, EXCLUSIVE, 5, 9)
    assert queue.release(A) == [B]


def test_whoever_is_waited_for_through_others_passes_too(queue: Queue) -> None:
    """C waits for A, and A for B: B must not wait behind C."""
    assert queue.ask(A, EXCLUSIVE, 0, 0)
    assert queue.ask(B, EXCLUSIVE, 1, 1)
    assert not queue.ask(A, EXCLUSIVE, 1, 1)
    assert not queue.ask(C, EXCLUSIVE, 0, 5)
    assert queue.ask(B, EXCLUSIVE, 5, 5)


def test_one_who_may_pass(queue: Queue) -> None:
    assert queue.ask(A, SHARED)
    assert not queue.ask(B, EXCLUSIVE)
    assert not queue.ask(C, SHARED)
    assert [wait.lock.owner for wait in queue.table.let_pass("here", 3)] == [C]
    assert queue.table.attempt(Wait(99, Lock(D, SHARED), passes=True)) == (True, [])


def test_giving_up_lets_others_pass(queue: Queue) -> None:
    assert queue.ask(A, SHARED)
    assert not queue.ask(B, EXCLUSIVE)
    assert not queue.ask(C, SHARED)
    assert [wait.lock.owner for wait in queue.table.cancel("here", 2)] == [C]
    assert queue.table.cancel("elsewhere", 3) == []


def test_a_downgrade_lets_readers_in(queue: Queue) -> None:
    assert queue.ask(A, EXCLUSIVE)
    assert not queue.ask(B, SHARED)
    granted, others = queue.table.request(Wait(99, Lock(A, SHARED)))
    assert granted and [wait.lock.owner for wait in others] == [B]


def test_a_conversion_of_flock_gives_way_to_those_who_wait() -> None:
    """flock(2): the shared lock is dropped, and one who waited for it comes first."""
    queue = Queue(NameLocks()[Kind.FLOCK])
    assert queue.ask(A, SHARED)
    assert not queue.ask(B, EXCLUSIVE)
    granted, others = queue.table.request(Wait(99, Lock(A, EXCLUSIVE)))
    assert not granted and [wait.lock.owner for wait in others] == [B]
    assert queue.release(B) == [A]


def test_two_upgrades_of_record_locks_wait_for_each_other(queue: Queue) -> None:
    """The table shows it, and who asks can be told EDEADLK."""
    assert queue.ask(A, SHARED) and queue.ask(B, SHARED)
    assert not queue.ask(A, EXCLUSIVE)
    (waiting,) = queue.table.waiting
    assert {lock.owner for lock in queue.table.blockers(waiting)} == {B}
    assert {lock.owner for lock in queue.table.blockers(Wait(99, Lock(B, EXCLUSIVE)))} == {A}


def test_whoever_closes_a_ring_lets_the_one_in_it_pass(queue: Queue) -> None:
    """B waits behind A alone, who waits for C; when C waits for B in turn, only B can go on."""
    assert queue.table.request(Wait(1, Lock(C, SHARED)))[0]
    assert queue.table.request(Wait(2, Lock(B, SHARED, 1)))[0]
    assert not queue.table.request(Wait(3, Lock(A, EXCLUSIVE, 0, 0)))[0]
    assert not queue.table.request(Wait(4, Lock(B, SHARED, 0, 0)))[0]
    granted, others = queue.table.request(Wait(5, Lock(C, EXCLUSIVE)))
    assert not granted and [wait.ticket for wait in others] == [4]


def test_a_node_that_is_gone(queue: Queue) -> None:
    far = Owner("far", 1)
    assert queue.ask(far, EXCLUSIVE)
    assert not queue.ask(Owner("far", 2), EXCLUSIVE)
    assert not queue.ask(B, EXCLUSIVE)
    assert [wait.lock.owner for wait in queue.table.forget("far")] == [B]
    assert queue.table.waiting == []


@settings(max_examples=400)
@given(
    st.lists(st.tuples(steps(), st.sampled_from(["ask", "unlock", "hand over"])), max_size=30), st.sampled_from(Kind)
)
def test_nobody_is_forgotten(plan: list[tuple[Step, str]], kind: Kind) -> None:
    """No two hold what conflicts, whoever waits waits for somebody, and at the end all have had their locks.

    An owner asks for one thing at a time, as a thread does; what is granted meanwhile counts as asked for.
    """
    table, asked, had = NameLocks()[kind], set(), set()
    for number, (step, does) in enumerate(plan):
        owner = Owner("here", step.owner)
        if does == "hand over":  # also by who waits for more
            table.hand_over(owner, Owner("here", -number - 1))
            check(table)
            continue
        if any(wait.lock.owner == owner for wait in table.waiting):
            continue
        if does == "unlock" or step.mode is None:
            others = table.release(owner, step.first, step.last)
        else:
            granted, others = table.request(Wait(number, Lock(owner, step.mode, step.first, step.last)))
            asked.add(number)
            had |= {number} if granted else set()
        had |= {wait.ticket for wait in others}
        check(table)
    for _ in range(len(plan) + 1):
        for owner in {held.owner for held in table.held}:
            if not any(wait.lock.owner == owner for wait in table.waiting):
                had |= {wait.ticket for wait in table.release(owner)}
        if not table.waiting:
            break
        # Only those who hold and wait are left: in a ring, which is for EDEADLK to prevent.
        stuck = table.waiting[0]
        had |= {stuck.ticket, *(wait.ticket for wait in table.cancel("here", stuck.ticket))}
    assert asked == had
    assert not table.waiting


def check(table: LockTable) -> None:
    for lock in table.held:
        assert not any(lock.conflicts(other) for other in table.held)
        assert lock.first <= lock.last
    for wait in table.waiting:
        assert next(table.blockers(wait), None) is not None


# On record.


def test_a_record_says_all() -> None:
    locks = NameLocks()
    for kind in Kind:
        queue = Queue(locks[kind])
        assert queue.ask(A, EXCLUSIVE, 3, 9)
        assert not queue.ask(Owner("far", 7), SHARED)
        locks[kind].let_pass("far", 2)
    again = NameLocks.from_record(json.loads(json.dumps(locks.to_record())))
    assert again == locks
    assert again.nodes() == {"here", "far"}
    assert not NameLocks.from_record({})


@pytest.mark.parametrize("record", [{"nothing": {}}, {"flock": {"held": [[1]], "waiting": []}}, {"flock": {}}])
def test_a_record_that_is_none(record: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        NameLocks.from_record(record)


@pytest.mark.parametrize("kind", ["held", "waiting"])
def test_a_record_with_values_of_wrong_types(kind: str) -> None:
    """They would fail only later, when they are compared, or looked up."""
    locks = NameLocks()
    queue = Queue(locks[Kind.FLOCK])
    assert queue.ask(A, EXCLUSIVE) and not queue.ask(Owner("far", 7), SHARED)
    for at in range(len(locks.to_record()["flock"][kind][0])):
        for wrong in ([], {}, None, 1.5):
            record = locks.to_record()
            record["flock"][kind][0][at] = wrong
            with pytest.raises((ValueError, TypeError)):
                NameLocks.from_record(record)


def test_what_is_trimmed_to_what_it_is_keeps_its_place() -> None:
    """F_GETLK answers with the first in the way, which is whose owner began first to hold something."""
    held = [Lock(Owner("a", 1), Mode.SHARED, 0, 9), Lock(Owner("b", 1), Mode.SHARED, 0, 9)]
    table = LockTable([*held])
    table.trim(held[0].owner, 0, 9, [held[0]])
    assert table.held == held
    table.trim(held[0].owner, 0, 4, [])
    assert table.conflict(Lock(Owner("c", 1), Mode.EXCLUSIVE, 0, 4)) == held[1]
