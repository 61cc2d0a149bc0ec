"""The locks of this node's processes: which names they are on, who waits, and what ends with a descriptor.

On names that are delegated to this node (all of them, where there is no other) everything is done at once, when the
request is received.  So the order of lock requests, FLUSHes and RELEASEs is that in which the kernel sent them, and a
try-lock that comes after a close(2) finds what the close unlocked.  On other names it is done in that order, too, by
steps on a shared record.

The flock(2) locks of a name that one open file alone has to do with can be lent to a `Lender`, which answers for that
file without asking.  Whoever looks at the locks of a name takes them back first (`NameService.take_back`).
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import trio
import xxhash

from safefs.cluster.backend import BackendError
from safefs.cluster.names import Names, TakeBack
from safefs.cluster.record import Acquire, Break, GiveUp, HandOver, LetPass, Release, Step, carry_out
from safefs.cluster.survey import Survey
from safefs.locktable import OFFSET_MAX, Held, Kind, Lock, LockTable, Mode, NameLocks, Owner, Wait, locks_of
from safefs.turns import Turns
from safefs.uses import Use, Uses

NAME_SECONDS = 30.0  # for the daemon's own locks of names


def name_key(directory: str, name: bytes) -> str:
    """A name as all nodes call it, in a directory as they do.  Not an inode: a publish would split its locks."""
    return f"{directory}/{os.fsdecode(name)}"


def entry_of(key: str) -> bytes:
    """The name in its directory."""
    return os.fsencode(key.rpartition("/")[2])


class NameService(Protocol):
    """Where the locks of names are (safefs.cluster.names.Names, or `Alone`)."""

    take_back: TakeBack  # called before anybody sees the locks of a name that is this node's

    @property
    def node(self) -> str:
        """This node's name."""

    def lease_holds(self) -> bool:
        """Whether what was locked is still this node's."""

    def lease_ends(self) -> float:
        """Until when it is (CLOCK_BOOTTIME)."""

    def local(self, key: str) -> NameLocks | None:
        """The locks of a name, to be worked on at once; None where steps have to be submitted."""

    def known(self, key: str) -> NameLocks:
        """What is known of the locks of a name, perhaps not the latest."""

    def submit(self, key: str, step: Step) -> trio.Event:
        """Queue a step; the event is set once it is on record."""

    async def look(self, key: str) -> NameLocks:
        """The locks of a name that is not local."""

    async def clear(self, key: str) -> NameLocks | None:
        """The same before they are broken; None where nobody could tell, and whoever had any has lost them."""

    async def survey(self) -> Survey:
        """The locks of all names."""

    async def host_of(self, node: str) -> str:
        """The host that a node is on."""


class Lender(Protocol):
    """What can answer flock(2) by itself, and FLUSH (safefs.hot)."""

    def mark_owner(self, number: int, change: int) -> None:
        """There is one owner of record locks more or less: his FLUSHes are for `Locks`."""

    def lend_lock(self, number: int, owner: int, held: Held, until: float) -> bool:
        """Answer on a file handle that nobody else is in the way of, until a moment of CLOCK_BOOTTIME."""

    def take_lock_back(self, number: int) -> Held:
        """What the owner of a file handle holds that was lent."""


class Alone:
    """There is no other node."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.take_back: TakeBack = lambda _key, _locks: None
        self._names: dict[str, NameLocks] = {}
        self._last = ""

    def local(self, key: str) -> NameLocks:
        if self._last != key and not self._names.get(self._last, True):
            del self._names[self._last]  # names without locks do not pile up
        self._last = key
        locks = self._names.setdefault(key, NameLocks())
        self.take_back(key, locks)
        return locks

    known = local

    def lease_holds(self) -> bool:
        return True

    def lease_ends(self) -> float:
        return math.inf

    async def survey(self) -> Survey:
        return Survey(dict(self._names))

    async def host_of(self, node: str) -> str:
        return socket.gethostname() if node == self.node else ""

    def submit(self, key: str, step: Step) -> trio.Event:
        raise AssertionError(f"{step} on {key}: every name is local")

    async def look(self, key: str) -> NameLocks:
        raise AssertionError(f"{key}: every name is local")

    clear = look


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that is not answered yet."""

    key: str
    kind: Kind
    wait: Wait
    handle: int | None
    file: int  # that the handle is of
    may_wait: bool
    submitted: bool = False  # on its way to a shared record, which answers in any case
    settled: trio.Event = field(default_factory=trio.Event)
    held: bool = False  # once settled: its lock is held, or it was refused
    elsewhere: bool = False  # once held: it may have been another node's before

    @property
    def use(self) -> Use:
        return self.key, self.kind, self.wait.lock.owner


@dataclass(frozen=True, slots=True)
class Estate:
    """The record locks that a process had of a file which it has closed: who holds them now, and by which names."""

    heir: Owner
    names: list[str]
    recorded: list[trio.Event]  # what to wait for until that is so for all nodes

    def uses(self) -> list[Use]:
        return [(key, Kind.RECORD, self.heir) for key in self.names]


class Locks:
    """The lock requests of one node."""

    def __init__(self, names: NameService, lender: Lender | None = None) -> None:
        self._names = names
        self._names.take_back = self._take_back
        self._lender = lender
        self._lent: dict[str, tuple[Owner, int]] = {}  # by name: to whom, through which file handle
        self._waiting: dict[int, Waiting] = {}  # by ticket
        self._uses = Uses(self._mark)
        self._keys: dict[int, str] = {}  # the name that was locked last through a file handle that is open
        # What owners of this node have been told that they hold, whether or not the backend can be asked about it.
        self._held: defaultdict[tuple[str, Kind], dict[Owner, LockTable]] = defaultdict(dict)
        self._last_ticket = self._last_own = 0
        self.fence: Callable[[set[int]], None] = lambda _handles: None  # what was locked through them is broken
        self.turns = Turns()  # of those who try what others have locked, by name

    def serve(self, names: Names) -> None:
        """Tell the names of a cluster what owners of this node have, and hear from them what these get, or lose."""
        names.resolve, names.told, names.cut, names.broken = self.answer, self.told, self.cut, self.broken

    @property
    def node(self) -> str:
        return self._names.node

    def lease_holds(self) -> bool:
        """Whether what was locked is still this node's: to be asked right before anything is done under a lock."""
        return self._names.lease_holds()

    def lease(self) -> str:
        """Under which lease anything may be done now; empty: there is none."""
        return self.node if self.lease_holds() else ""

    def is_stale(self, handle: int) -> bool:
        """Whether what was locked through a file handle may be another node's, before `lose` has been called."""
        return not self.lease_holds() and self._holds(handle)

    def _holds(self, handle: int) -> bool:
        uses = self._uses.of(handle)
        self._settle_loans(key for key, _, _ in uses)
        return any(owner in self._held.get((key, kind), ()) for key, kind, owner in uses)

    # ---------------------------------------------------------- questions

    async def conflict(self, key: str, kind: Kind, lock: Lock) -> Lock | None:
        """What is held and in the way of a lock (F_GETLK)."""
        return (await self._latest(key))[kind].conflict(lock)

    def own(self, key: str, kind: Kind, owner: Owner, first: int, last: int) -> Lock | None:
        """The first that an owner of this node has in a range itself."""
        return next((lock for lock in self.told(key, kind, owner) if lock.overlaps(first, last)), None)

    async def _latest(self, key: str) -> NameLocks:
        """The locks of a name as they are now, on all nodes."""
        locks = self._names.local(key)
        return await self._names.look(key) if locks is None else locks

    async def report(self) -> list[dict[str, Any]]:
        """Every holder and waiter on all nodes, in words; and names of which nobody knows who can be asked."""
        self._settle_loans(self._lent)
        found = await self._names.survey()
        entries = [
            _entry(key, kind.value, state, lock.mode.value, lock)
            for key, locks in found.locks.items()
            for kind, table in locks.tables.items()
            for state, lock in _states(table)
        ]
        unknown = [(key, node, "the node does not answer") for key, node in found.silent.items()]
        unknown += [(key, "", why) for key, why in found.unreadable.items()]
        for key, node, why in unknown:
            entries.append(_entry(key, "any", f"unknown: {why}", "any", Lock(Owner(node, 0), Mode.EXCLUSIVE)))
        hosts = {node: await self._names.host_of(node) for node in {str(entry["node"]) for entry in entries} - {""}}
        return [{**entry, "host": hosts.get(entry["node"], "")} for entry in entries]

    async def break_locks(self, key: str) -> int:
        """Take all locks on a name from their holders, whose open files are fenced; how many there were.

        A record that is damaged counts as one.  Raises BackendError where it is not known whether they are broken.
        """
        node = self.node
        locks = self._names.local(key)
        if locks is None:
            locks = await self._names.clear(key)
        if locks is None:
            return 1
        held = sum(len(table.held) for table in locks.tables.values())
        done = self._do(key, Break(frozenset(locks.holders())))
        if done is not None:
            await done.wait()
            if self.node != node or not self.lease_holds():
                raise BackendError("this node has lost its lease meanwhile: see what is locked, and try again")
        return held

    def broken(self, key: str, locks: NameLocks) -> None:
        """An operator has broken the locks of a name; what is in `locks` was had by then, or later.

        To be called before anybody is told of what he got by that.  Who still has all that he was told of came after
        the operator had looked; but not one who waits besides: he may have got it anew, from others who had it since.
        """
        fenced = set[int]()
        for kind in (Kind.FLOCK, Kind.RECORD):
            waiting = {each.wait.lock.owner for each in self._waiting.values() if each.use[:2] == (key, kind)}
            for owner, held in list(self._held.get((key, kind), {}).items()):
                told = list(held.held)
                self.cut(key, kind, owner, locks)
                if owner in waiting or self.told(key, kind, owner) != told:
                    fenced.update(self._uses.handles((key, kind, owner)))
        if fenced:
            self.fence(fenced)

    def counts(self) -> tuple[int, int]:
        """How many locks are held or asked for through open files, and how many of them wait."""
        return len(self._uses), len(self._waiting)

    def key_of(self, handle: int) -> str | None:
        """The name that was locked last through this file handle, which it may not have any more; None if none was."""
        return self._keys.get(handle)

    def bound_files(self, handle: int, key: str, owner: Owner) -> set[int]:
        """The files of what is held or wanted through an open file, or by an owner on a name."""
        uses = {*self._uses.of(handle), (key, Kind.FLOCK, owner), (key, Kind.RECORD, owner)}
        self._settle_loans(name for name, _, _ in uses)
        held = (use for use in uses if use[2] in self._held.get(use[:2], ()))
        waiting = (each for each in self._waiting.values() if each.handle == handle or each.wait.lock.owner == owner)
        return {each.file for each in waiting}.union(*(self._uses.files(use) for use in held))

    def kin(self, waiting: Waiting) -> set[int]:
        """Pids of those who hold something on the name: a request of a child of theirs need not wait in the queue."""
        owner = waiting.wait.lock.owner
        return {lock.pid for lock in self._held_here(waiting.key, waiting.kind) if lock.owner != owner}

    def is_blocked(self, waiting: Waiting) -> bool:
        """Whether somebody holds what is in its way, so that it does not only wait in the queue."""
        held = self._names.known(waiting.key)[waiting.kind].held
        return any(lock.conflicts(waiting.wait.lock) for lock in held)

    def has_queue(self, waiting: Waiting) -> bool:
        """Whether others wait for what a request is for."""
        waits = self._names.known(waiting.key)[waiting.kind].waiting
        return any(wait.ticket != waiting.wait.ticket for wait in waits)

    def _held_here(self, key: str, kind: Kind) -> Iterator[Lock]:
        """What owners of this node hold on a name, which nobody has to be asked for."""
        for table in self._held.get((key, kind), {}).values():
            yield from table.held

    def _held_against(self, waiting: Waiting) -> set[Owner]:
        """Owners of this node who hold what a request waits for, and are other processes.

        A process has traditional locks under one owner alone.  So where it stands in its own way, open files own locks
        (OFD), and another of its threads can unlock: the kernel looks for no deadlock there (fs/locks.c).
        """
        held, wanted = self._held_here(waiting.key, waiting.kind), waiting.wait.lock
        return {lock.owner for lock in held if lock.conflicts(wanted) and (not lock.pid or lock.pid != wanted.pid)}

    def _deadlocks(self, waiting: Waiting) -> bool:
        """Whether one of those in the way waits, directly or not and on whatever name, for this owner."""
        owner, seen = waiting.wait.lock.owner, set[Owner]()
        obstacles = self._held_against(waiting)
        while new := obstacles - seen:
            if owner in new:
                return True
            seen |= new
            waits = [other for other in self._waiting.values() if other.wait.lock.owner in new]
            obstacles = {holder for other in waits for holder in self._held_against(other)}
        return False

    # ------------------------------------------------------------ changes

    async def claim(self, directory: str, name: bytes) -> Callable[[], object] | None:
        """Claim a name for whoever makes it with O_EXCL: how to give the claim up; None where another has it.

        Raises OSError (ETIMEDOUT) where the lock backend does not answer for `NAME_SECONDS`.
        """
        waiting = self._ask_for_name(Kind.CLAIM, directory, name, may_wait=False)
        await self._settle(waiting)
        if not waiting.settled.is_set():
            raise OSError(errno.ETIMEDOUT, "the lock backend does not answer")
        return partial(self.release, waiting.key, Kind.CLAIM, waiting.wait.lock.owner) if waiting.held else None

    @asynccontextmanager
    async def publishing(self, directory: str, name: bytes) -> AsyncIterator[bool]:
        """Keep other nodes from changing what a name shows; yields False where that is not had in `NAME_SECONDS`."""
        waiting = self._ask_for_name(Kind.PUBLISH, directory, name, may_wait=True)
        await self._settle(waiting)
        try:
            yield waiting.held
        finally:
            if waiting.held:
                self.release(waiting.key, Kind.PUBLISH, waiting.wait.lock.owner)

    def _ask_for_name(self, kind: Kind, directory: str, name: bytes, *, may_wait: bool) -> Waiting:
        """Lock one name for the daemon itself.

        All names of a directory are on one record, so that making many files costs a message for the first alone.
        """
        at = xxhash.xxh3_64_intdigest(name) >> 1
        lock = Lock(self._own_owner(), Mode.EXCLUSIVE, at, at)
        return self._ask(self._new(name_key(directory, b""), kind, lock, None, 0, may_wait=may_wait))

    def _own_owner(self) -> Owner:
        """One who is none of the kernel's, none of whose numbers is negative."""
        self._last_own -= 1
        return Owner(self.node, self._last_own)

    async def _settle(self, waiting: Waiting) -> None:
        """Until a request of the daemon's own is answered, or given up after `NAME_SECONDS`."""
        try:
            with trio.move_on_after(NAME_SECONDS):
                await waiting.settled.wait()
        finally:
            self.give_up(waiting)

    def acquire(
        self, key: str, kind: Kind, lock: Lock, handle: int, *, may_wait: bool, file: int = 0
    ) -> Waiting | None:
        """Take a lock through a file handle: None if it is held now, else what to wait for.

        `file` is what closes of it are about; of a handle without one it is the handle itself.  Raises BlockingIOError
        (EAGAIN) where it may not wait and somebody holds what is in its way; that somebody was first may come to
        nothing (`kin`).  Raises OSError (EDEADLK) where it would wait for ever: for record locks alone, as the kernel
        does (fcntl(2), F_SETLKW), and as far as this node sees it.
        """
        locks = self._names.local(key)
        waiting = self._new(key, kind, lock, handle, file or handle, may_wait=may_wait)
        if locks is not None and not locks[kind]:
            locks[kind].request(waiting.wait)  # nobody has anything: it is held
            self._get(waiting)
            return None
        self._ask(waiting)
        if waiting.settled.is_set() and not waiting.held:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if waiting.held:
            return None
        self._remember(waiting)
        return waiting

    def _new(self, key: str, kind: Kind, lock: Lock, handle: int | None, file: int, *, may_wait: bool) -> Waiting:
        self._last_ticket += 1
        return Waiting(key, kind, Wait(self._last_ticket, lock), handle, file, may_wait)

    def _ask(self, waiting: Waiting) -> Waiting:
        """Ask for a lock; the answer is there at once where the name is this node's.  Raises OSError (EDEADLK)."""
        key, kind, lock, may_wait = waiting.key, waiting.kind, waiting.wait.lock, waiting.may_wait
        if may_wait and kind is Kind.RECORD and self._deadlocks(waiting):
            raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK))
        locks = self._names.local(key)
        self._waiting[waiting.wait.ticket] = waiting
        if locks is None:
            waiting.submitted = True
            self._names.submit(key, Acquire(kind, waiting.wait, may_wait))
        elif self._carry_out(key, locks, Acquire(kind, waiting.wait, may_wait=True)):
            self.resolve(waiting.wait.ticket, True)
        else:
            if kind is Kind.FLOCK and not any(held.owner == lock.owner for held in locks[kind].held):
                self._drop(waiting.use)  # it was to be converted: what was held is gone all the same (flock(2))
            if not may_wait and self.is_blocked(waiting):
                self.give_up(waiting)
                waiting.settled.set()
        return waiting

    def release(self, key: str, kind: Kind, owner: Owner, first: int = 0, last: int = OFFSET_MAX) -> trio.Event | None:
        """Unlock a range of an owner's; None if that is done, else what to wait for."""
        held = self._held.get((key, kind), {})
        if owner in held:
            held[owner].release(owner, first, last)
            if not held[owner]:
                self._drop((key, kind, owner))
        unlocking = self._do(key, Release(kind, owner, first, last))
        self.turns.unlocked(key)
        return unlocking

    def let_pass(self, waiting: Waiting) -> None:
        """A request may pass those that came before it, in case they wait for it in a way that is not seen here."""
        waiting.wait = replace(waiting.wait, passes=True)
        self._do(waiting.key, LetPass(waiting.kind, waiting.wait))

    def give_up(self, waiting: Waiting) -> None:
        """Nobody waits for this lock any more."""
        if self._waiting.pop(waiting.wait.ticket, None) is not None:
            self._do(waiting.key, GiveUp(waiting.kind, waiting.wait))

    def holder(self, owner: Owner, file: int) -> int:
        """The process that has record locks of a file as this owner; 0: there are none, or it has no number here."""
        names = self._uses.names(owner, file)
        held = (lock for key in names for lock in self.told(key, Kind.RECORD, owner))
        return next((lock.pid for lock in held), 0)

    def flushed(self, owner: Owner, file: int) -> list[trio.Event]:
        """A process has closed a descriptor of a file: it loses its record locks there (fcntl(2)); what to wait for."""
        return _to_wait_for(self.release(*use) for use in self._forget_closed(owner, file))

    def hand_over(self, owner: Owner, file: int, handle: int) -> Estate | None:
        """The same, but what it loses is not free yet: it is held on, through an open file (`hold_on`, `let_go`)."""
        lost = self._forget_closed(owner, file)
        if not lost:
            return None
        heir, events = self._own_owner(), []
        for key, kind, _ in lost:
            held = self._held[key, kind]
            held[heir] = held.pop(owner)
            held[heir].hand_over(owner, heir)
            events.append(self._do(key, HandOver(kind, owner, heir)))
        estate = Estate(heir, [key for key, _, _ in lost], _to_wait_for(events))
        self.hold_on(estate, handle, file)
        return estate

    def hold_on(self, estate: Estate, handle: int, file: int) -> None:
        """It is held through this open file as well: whoever breaks it fences that."""
        for use in estate.uses():
            self._uses.add(use, handle, file, anew=False)

    def let_go(self, estate: Estate, handle: int) -> None:
        """It is held through this open file no more; with the last it is free."""
        for use in estate.uses():
            self._uses.part(use, handle)
            if not self._uses.handles(use) and self._uses.forget(use):
                self.release(*use)

    def _forget_closed(self, owner: Owner, file: int) -> list[Use]:
        """What a process holds of a file, and of no other by the same name, and loses by closing it.

        That goes for what is on record when the close is (which is over then): what is granted later it keeps.
        """
        lost = []
        for key in self._uses.names(owner, file):
            use = key, Kind.RECORD, owner
            for handle in self._uses.handles(use, file):
                self._uses.part(use, handle)
            if not self._uses.handles(use) and self._uses.forget(use) and owner in self._held.get(use[:2], ()):
                lost.append(use)
        return lost

    def unlock_records(self, owner: Owner, file: int, first: int, last: int) -> list[trio.Event]:
        """A process has unlocked a range of a file; what to wait for.

        A part of what is also another file's, by the same name, stays until that is unlocked.
        """
        events = []
        for key in self._uses.names(owner, file):
            use = key, Kind.RECORD, owner
            if self._uses.files(use) == {file}:
                events.append(self.release(*use, first, last))
            elif (first, last) == (0, OFFSET_MAX):
                for handle in self._uses.handles(use, file):
                    self._uses.part(use, handle)
        return _to_wait_for(events)

    def released(self, handle: int) -> None:
        """The last descriptor of an open file is closed: what was locked through it last is free."""
        self._settle_loans(key for key, _, _ in self._uses.of(handle))
        self._keys.pop(handle, None)
        for use in self._uses.release(handle):
            if self._uses.forget(use):
                self.release(*use)

    def _remember(self, waiting: Waiting) -> None:
        key, kind, owner = waiting.use
        assert waiting.handle is not None
        anew = owner not in self._held.get((key, kind), ())
        self._uses.add(waiting.use, waiting.handle, waiting.file, anew=anew)
        self._keys[waiting.handle] = key

    def _get(self, waiting: Waiting) -> None:
        """An owner has a lock from now on, through an open file."""
        self._remember(waiting)  # a close by another thread has perhaps forgotten it
        self._hold(waiting.use, waiting.wait)

    def _hold(self, use: Use, wait: Wait) -> None:
        key, kind, owner = use
        self._held[key, kind].setdefault(owner, LockTable()).request(wait)

    def _drop(self, use: Use) -> None:
        """An owner has nothing more on a name."""
        key, kind, owner = use
        held = self._held.get((key, kind), {})
        held.pop(owner, None)
        if not held:
            self._held.pop((key, kind), None)

    def cut(self, key: str, kind: Kind, owner: Owner, locks: NameLocks) -> None:
        """An owner has no more of a name than what is in these locks, by what it asked for itself."""
        held = self._held.get((key, kind), {}).get(owner)
        if held is not None:
            held.cut(locks_of(owner, locks[kind].held))
            if not held:
                self._drop((key, kind, owner))

    def told(self, key: str, kind: Kind, owner: Owner) -> list[Lock]:
        """What an owner has been told that it has."""
        return self._held.get((key, kind), {}).get(owner, LockTable()).held

    def answer(self, ticket: int, held: bool) -> bool:
        """The same as `resolve`, for what has been asked of a record that nodes share."""
        waiting = self._waiting.get(ticket)
        if waiting is not None:
            waiting.elsewhere = held
        return self.resolve(ticket, held)

    def resolve(self, ticket: int, held: bool) -> bool:
        """A request has its lock, or is refused; returns whether anybody still wants to know."""
        waiting = self._waiting.pop(ticket, None)
        if waiting is None:
            return False
        waiting.held = held
        waiting.settled.set()
        if held and waiting.handle is not None:
            self._get(waiting)
        return True

    def lose(self) -> set[int]:
        """All locks are lost; returns the file handles that something is locked through.  Requests go on waiting."""
        for key in list(self._lent):
            self._take_back(key, NameLocks())
        fenced = {handle for handle in self._uses.open_files() if self._holds(handle)}
        self._held.clear()
        self._uses.forget_all()
        return fenced

    def ask_again(self) -> None:
        """This node has another name: what waited under the old one waits under the new."""
        self._uses.forget_all(self.node)  # but what was asked for since all was lost
        for waiting in self._waiting.values():
            lock = replace(waiting.wait.lock, owner=Owner(self.node, waiting.wait.lock.owner.number))
            waiting.wait = replace(waiting.wait, lock=lock)
            if waiting.handle is not None:
                self._remember(waiting)
            self._names.submit(waiting.key, Acquire(waiting.kind, waiting.wait, waiting.may_wait))

    # ---------------------------------------------------------------- loans

    def lend(self, key: str, number: int, handle: int) -> None:
        """Have flock(2) answered without us through a file handle, if nobody else has to do with the name.

        The owner, whose number in the kernel is `number`, has to have locked the name through this handle before.
        """
        locks, owner = self._names.local(key), Owner(self.node, number)
        if locks is None or self._lender is None or self.turns.has_line(key):
            return
        if (key, Kind.FLOCK, owner) not in self._uses.of(handle):
            return
        held = locks[Kind.FLOCK].held_alone(owner)
        if held is not None and self._lender.lend_lock(handle, number, held, self._names.lease_ends()):
            self._lent[key] = owner, handle

    def _take_back(self, key: str, locks: NameLocks) -> None:
        """End the loan of a name: what has become of it is in `locks` and among what is held from now on."""
        loan = self._lent.pop(key, None)
        if loan is None:
            return
        assert self._lender is not None
        owner, handle = loan
        mode, pid = self._lender.take_lock_back(handle)
        use, table = (key, Kind.FLOCK, owner), locks[Kind.FLOCK]
        table.held = []
        self._drop(use)
        if mode is not None:
            self._last_ticket += 1
            wait = Wait(self._last_ticket, Lock(owner, mode, pid=pid))
            table.request(wait)
            self._hold(use, wait)

    def end_loans(self, concerns: Callable[[int], bool]) -> None:
        """Take back what is lent to those file handles of which this is true."""
        self._settle_loans([key for key, (_, handle) in self._lent.items() if concerns(handle)])

    def end_loan(self, key: str) -> None:
        """Take back what is lent of a name."""
        self._settle_loans([key])

    def _mark(self, owner: Owner, change: int) -> None:
        if self._lender is not None:
            self._lender.mark_owner(owner.number, change)

    def _settle_loans(self, keys: Iterable[str]) -> None:
        for key in self._lent.keys() & set(keys):
            self._names.known(key)

    def _do(self, key: str, step: Step) -> trio.Event | None:
        locks = self._names.local(key)
        if locks is None:
            return self._names.submit(key, step)
        self._carry_out(key, locks, step)
        return None

    def _carry_out(self, key: str, locks: NameLocks, step: Step) -> bool:
        done, others = carry_out(locks, step)
        if isinstance(step, Break):
            self.broken(key, locks)
        for wait in others:
            self.resolve(wait.ticket, True)
        return done


def _to_wait_for(steps: Iterable[trio.Event | None]) -> list[trio.Event]:
    """Of some steps those that are not done."""
    return [event for event in steps if event is not None]


def _states(table: LockTable) -> Iterator[tuple[str, Lock]]:
    yield from (("held", lock) for lock in table.held)
    yield from (("waiting", wait.lock) for wait in table.waiting)


def _entry(key: str, kind: str, state: str, mode: str, lock: Lock) -> dict[str, Any]:
    last = None if lock.last == OFFSET_MAX else lock.last
    node, pid = lock.owner.node, lock.pid
    return {
        "key": key,
        "kind": kind,
        "state": state,
        "mode": mode,
        "first": lock.first,
        "last": last,
        "node": node,
        "pid": pid,
    }
