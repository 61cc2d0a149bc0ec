"""Advisory locks of one name: who holds which bytes, who waits for which, and who is next.

Decides; does no I/O, knows no clock and never waits.  The rules are those of fcntl(2) and flock(2) on Linux
(fs/locks.c): locks of one owner never conflict, a new one takes the place of what the owner had in its range, and
neighbours of one mode become one.  flock(2) locks are locks of the whole range in a table of their own: the kernel
keeps the two kinds apart, and so does `NameLocks`.

Where the kernel makes no promise, this table does: a request that has to wait is not overtaken for ever.  Locks are
handed over at the unlock itself, in the order of arrival, and a later request waits behind an earlier one that it
conflicts with, even if what is held now would let it pass (otherwise readers that overlap would starve a writer).  It
passes all the same

- where the earlier one waits, directly or not, for the later one's owner: else both would wait for ever;
- where it has been told to: `Wait.passes` is for what a table cannot see, such as a parent that holds a shared lock and
  waits for a child that asks for one, or waiting across names and nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

OFFSET_MAX = (1 << 63) - 1  # as in include/linux/fs.h: a range to the end of the file, however long it gets


class Mode(Enum):
    """F_RDLCK and LOCK_SH; F_WRLCK and LOCK_EX."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Kind(Enum):
    """Locks of different kinds know nothing of each other."""

    RECORD = "record"  # fcntl(2): traditional (of a process) and OFD locks, which do exclude each other
    FLOCK = "flock"
    CLAIM = "claim"  # of a name that somebody is making with O_EXCL
    PUBLISH = "publish"  # of a name that is about to show something else

    # Each is there once.  Of Enum's own, which is in Python, every lock request would need half a dozen.
    __hash__ = object.__hash__


class Owner(NamedTuple):
    """Whose a lock is: the kernel's lock owner, on a node.  A lock owner of 0 is nobody's."""

    node: str
    number: int


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock, held or wanted: bytes `first` to `last`, both included."""

    owner: Owner
    mode: Mode
    first: int = 0
    last: int = OFFSET_MAX
    pid: int = 0  # on the owner's node, of whoever asked for it

    def overlaps(self, first: int, last: int) -> bool:
        return self.first <= last and first <= self.last

    def conflicts(self, other: Lock) -> bool:
        exclusive = Mode.EXCLUSIVE in (self.mode, other.mode)
        return exclusive and self.owner != other.owner and self.overlaps(other.first, other.last)


class Held(NamedTuple):
    """What one owner has of a whole name (None: nothing), and who asked for it last."""

    mode: Mode | None
    pid: int


@dataclass(frozen=True, slots=True)
class Wait:
    """A request in the queue, under a number that its node has given it."""

    ticket: int
    lock: Lock
    passes: bool = False  # those that came before it and do not hold anything yet


@dataclass
class LockTable:
    """The locks of one kind on one name.

    `held` has the order of the kernel's list: owners by when they began to hold something, and the locks of one owner
    by where they begin.
    """

    held: list[Lock] = field(default_factory=list)
    waiting: list[Wait] = field(default_factory=list)
    drops_to_convert: bool = False  # flock(2): the old lock goes first, and is lost if the new one cannot be had

    def __bool__(self) -> bool:
        return bool(self.held or self.waiting)

    # ---------------------------------------------------------- questions

    def conflict(self, lock: Lock) -> Lock | None:
        """What is held and in the way of `lock` (F_GETLK): of several the first in `held`, as the kernel answers."""
        return next((held for held in self.held if held.conflicts(lock)), None)

    def blockers(self, wait: Wait) -> Iterator[Lock]:
        """All that a waiting request waits for: locks, and requests that came before it."""
        yield from (held for held in self.held if held.conflicts(wait.lock))
        if not wait.passes:
            for earlier in self.waiting:
                if earlier.ticket == wait.ticket and earlier.lock.owner.node == wait.lock.owner.node:
                    return
                if earlier.lock.conflicts(wait.lock) and not self._passes(wait.lock, earlier):
                    yield earlier.lock

    def waits(self, node: str, ticket: int) -> bool:
        """Whether a request is in the queue."""
        return any((wait.lock.owner.node, wait.ticket) == (node, ticket) for wait in self.waiting)

    def has(self, lock: Lock) -> bool:
        """Whether a lock is held as a whole."""
        return any(
            held.owner == lock.owner and held.mode is lock.mode and held.first <= lock.first and lock.last <= held.last
            for held in self.held
        )

    def _passes(self, lock: Lock, earlier: Wait) -> bool:
        obstacles = {held.owner for held in self.held if held.conflicts(earlier.lock)}
        return lock.owner in self._reachable(obstacles)

    def _reachable(self, owners: set[Owner]) -> set[Owner]:
        """These owners and those for whose locks they wait in turn."""
        seen: set[Owner] = set()
        while new := owners - seen:
            seen |= new
            wanted = [wait.lock for wait in self.waiting if wait.lock.owner in new]
            owners = {held.owner for held in self.held for lock in wanted if held.conflicts(lock)}
        return seen

    def held_alone(self, owner: Owner) -> Held | None:
        """What an owner has of a table of whole locks that nobody else is in; None where somebody is."""
        if self.waiting or any(held.owner != owner for held in self.held):
            return None
        return Held(self.held[0].mode, self.held[0].pid) if self.held else Held(None, 0)

    # ------------------------------------------------------------ changes

    def request(self, wait: Wait) -> tuple[bool, list[Wait]]:
        """Ask for a lock: whether it is held now, and the requests of others that got theirs by it.

        Else it is in the queue, and a later change returns it.  To ask for what one has, or waits for, changes nothing:
        so a request can be repeated when it is not known whether it arrived.
        """
        granted, others = self.attempt(wait)
        if granted or self.waits(wait.lock.owner.node, wait.ticket):
            return granted, others
        self.waiting.append(wait)
        granting = self._grant()  # whom somebody waits for in a ring that is closed now may pass who came before
        return wait in granting, others + [other for other in granting if other is not wait]

    def attempt(self, wait: Wait) -> tuple[bool, list[Wait]]:
        """The same for one who does not wait (F_SETLK, LOCK_NB)."""
        others: list[Wait] = []
        lock = wait.lock
        if not self:  # as nearly always
            self.held = [lock]
            return True, others
        if self.waits(lock.owner.node, wait.ticket):
            return False, others
        if self.drops_to_convert and any(held.owner == lock.owner and held.mode is not lock.mode for held in self.held):
            others = self.release(lock.owner)
        if next(self.blockers(wait), None) is None:
            self._put(lock)
            return True, others + self._grant()
        return False, others

    def release(self, owner: Owner, first: int = 0, last: int = OFFSET_MAX) -> list[Wait]:
        """Unlock a range of one owner; returns the requests that got their locks by it."""
        self.held = list(_without(self.held, owner, first, last))
        return self._grant()

    def trim(self, owner: Owner, first: int, last: int, told: Iterable[Lock]) -> list[Wait]:
        """Of what an owner has in a range leave what it is told of; returns as `release` does.

        In the mode that it is told of, if nobody has one by now that conflicts.
        """
        before = self.held
        mine = [_within(held, first, last) for held in locks_of(owner, before) if held.overlaps(first, last)]
        self.held = list(_without(before, owner, first, last))
        for kept, mode in _common(mine, told):
            known = replace(kept, mode=mode)
            self._put(known if self.conflict(known) is None else kept)
        if locks_of(owner, self.held) == locks_of(owner, before):
            self.held = before  # in the order in which owners began to hold something
        return self._grant()

    def cut(self, locks: Iterable[Lock]) -> None:
        """Of a table of one owner's leave what is in these locks of its, too, in the weaker mode of both."""
        mine, self.held = self.held, []
        for kept, mode in _common(mine, locks):
            self._put(kept if mode is Mode.EXCLUSIVE else replace(kept, mode=mode))

    def hand_over(self, owner: Owner, heir: Owner) -> None:
        """What one owner holds is another's from now on; nobody gets his lock by that, for it is not free."""
        self.held = [replace(held, owner=heir) if held.owner == owner else held for held in self.held]

    def cancel(self, node: str, ticket: int) -> list[Wait]:
        """A request is given up; returns those that it stood in the way of."""
        self.waiting = [wait for wait in self.waiting if (wait.lock.owner.node, wait.ticket) != (node, ticket)]
        return self._grant()

    def forget(self, node: str) -> list[Wait]:
        """A node is gone with all that it held and wanted."""
        self.held = [held for held in self.held if held.owner.node != node]
        self.waiting = [wait for wait in self.waiting if wait.lock.owner.node != node]
        return self._grant()

    def break_held(self, owners: Collection[Owner]) -> list[Wait]:
        """These hold nothing any more; returns the requests that got their locks by it."""
        self.held = [held for held in self.held if held.owner not in owners]
        return self._grant()

    def let_pass(self, node: str, ticket: int) -> list[Wait]:
        """A request that waits may pass those before it from now on."""
        self.waiting = [
            replace(wait, passes=True) if (wait.lock.owner.node, wait.ticket) == (node, ticket) else wait
            for wait in self.waiting
        ]
        return self._grant()

    def _put(self, lock: Lock) -> None:
        """The owner has this lock from now on, in place of what it had in the range; neighbours become one."""
        before = list(takewhile(lambda held: held.owner != lock.owner, self.held))
        after = [held for held in self.held[len(before) :] if held.owner != lock.owner]
        mine = list(_without(locks_of(lock.owner, self.held), lock.owner, lock.first, lock.last))
        for held in [held for held in mine if held.mode is lock.mode]:
            if held.last + 1 == lock.first or lock.last + 1 == held.first:
                lock = replace(lock, first=min(held.first, lock.first), last=max(held.last, lock.last))
                mine.remove(held)
        self.held = [*before, *sorted([*mine, lock], key=lambda held: held.first), *after]

    def _grant(self) -> list[Wait]:
        """Those whose turn has come get their locks."""
        granted: list[Wait] = []
        while wait := next((wait for wait in self.waiting if next(self.blockers(wait), None) is None), None):
            self.waiting.remove(wait)
            self._put(wait.lock)
            granted.append(wait)
        return granted


def _without(locks: Iterable[Lock], owner: Owner, first: int, last: int) -> Iterator[Lock]:
    """The locks without the part that an owner has in a range."""
    for lock in locks:
        if lock.owner != owner or not lock.overlaps(first, last):
            yield lock
            continue
        if lock.first < first:
            yield replace(lock, last=first - 1)
        if lock.last > last:
            yield replace(lock, first=last + 1)


def locks_of(owner: Owner, locks: Iterable[Lock]) -> list[Lock]:
    return [lock for lock in locks if lock.owner == owner]


def _within(lock: Lock, first: int, last: int) -> Lock:
    return replace(lock, first=max(lock.first, first), last=min(lock.last, last))


def _common(mine: Iterable[Lock], others: Iterable[Lock]) -> Iterator[tuple[Lock, Mode]]:
    """The parts of some locks that are in others as well, and the modes that these have."""
    for other in others:
        for lock in mine:
            if lock.overlaps(other.first, other.last):
                yield _within(lock, other.first, other.last), other.mode


@dataclass
class NameLocks:
    """All locks of one name: what is on record where several nodes share it."""

    tables: dict[Kind, LockTable] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.tables.values())

    def __getitem__(self, kind: Kind) -> LockTable:
        return self.tables.setdefault(kind, LockTable(drops_to_convert=kind is Kind.FLOCK))

    def nodes(self) -> set[str]:
        """The nodes that hold something, or wait for it."""
        locks = (lock for table in self.tables.values() for lock in (*table.held, *(w.lock for w in table.waiting)))
        return {lock.owner.node for lock in locks}

    def holders(self) -> set[Owner]:
        """Those who hold something."""
        return {lock.owner for table in self.tables.values() for lock in table.held}

    def copy(self) -> NameLocks:
        return NameLocks(
            {kind: replace(table, held=[*table.held], waiting=[*table.waiting]) for kind, table in self.tables.items()}
        )

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            kind.value: {
                "held": [_lock_to_list(lock) for lock in table.held],
                "waiting": [[wait.ticket, wait.passes, *_lock_to_list(wait.lock)] for wait in table.waiting],
            }
            for kind, table in self.tables.items()
            if table
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> NameLocks:
        """The reverse of `to_record`; ValueError, KeyError or TypeError for anything else."""
        locks = cls()
        for kind, table in record.items():
            locks[Kind(kind)].held = [_lock_from_list(values) for values in table["held"]]
            locks[Kind(kind)].waiting = [
                Wait(of_type(int, ticket), _lock_from_list(values), of_type(bool, passes))
                for ticket, passes, *values in table["waiting"]
            ]
        return locks


def _lock_to_list(lock: Lock) -> list[Any]:
    return [lock.owner.node, lock.owner.number, lock.mode.value, lock.first, lock.last, lock.pid]


def _lock_from_list(values: list[Any]) -> Lock:
    node, number, mode, first, last, pid = values
    for each in (number, first, last, pid):
        of_type(int, each)
    return Lock(Owner(of_type(str, node), number), Mode(mode), first, last, pid)


def of_type(kind: type[T], value: object) -> T:
    """A value of a record; TypeError where it is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.100} is no {kind.__name__}")
    return value
