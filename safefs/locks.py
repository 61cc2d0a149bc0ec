"""The locks of this node's processes: which names they are on, who waits, and what ends with a descriptor.

Everything here is done at once, when a request is received; what has to wait is given back as `Waiting`.  So the order
of lock requests, FLUSHes and RELEASEs is that in which the kernel sent them, and a try-lock that comes after a close(2)
finds what the close unlocked.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from dataclasses import dataclass, field

import trio

from safefs.locktable import OFFSET_MAX, Kind, Lock, NameLocks, Owner, Wait
from safefs.model import Identity

Key = tuple[Identity, bytes]  # a directory and a name in it: a publish changes the inode, and must not split a lock
Use = tuple[Key, Kind, Owner]


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits for its lock."""

    key: Key
    kind: Kind
    wait: Wait
    granted: trio.Event = field(default_factory=trio.Event)


class Locks:
    """The lock table of one node."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._names: dict[Key, NameLocks] = {}
        self._waiting: dict[int, Waiting] = {}  # by ticket
        self._by_handle: defaultdict[int, set[Use]] = defaultdict(set)
        self._last_handle: dict[Use, int] = {}  # through which an owner asked last
        self._last_ticket = 0

    def owner(self, number: int) -> Owner:
        return Owner(self.node, number)

    # ---------------------------------------------------------- questions

    def conflict(self, key: Key, kind: Kind, lock: Lock) -> Lock | None:
        """What is held and in the way of a lock (F_GETLK)."""
        locks = self._names.get(key)
        return None if locks is None else locks[kind].conflict(lock)

    def counts(self) -> tuple[int, int]:
        """How many locks are held, and how many requests wait."""
        tables = [table for locks in self._names.values() for table in locks.tables.values()]
        return sum(len(table.held) for table in tables), len(self._waiting)

    def key_of(self, handle: int) -> Key | None:
        """The name that was locked through this file handle, which it may not have any more; None if none was."""
        return next((key for key, _, _ in self._by_handle.get(handle, ())), None)

    def _deadlocks(self, owner: Owner, obstacles: set[Owner]) -> bool:
        """Whether one of those in the way waits, directly or not and on whatever name, for this owner."""
        seen: set[Owner] = set()
        while new := obstacles - seen:
            if owner in new:
                return True
            seen |= new
            waits = [waiting for waiting in self._waiting.values() if waiting.wait.lock.owner in new]
            obstacles = {held.owner for waiting in waits for held in self._held_against(waiting)}
        return False

    def _held_against(self, waiting: Waiting) -> list[Lock]:
        return [held for held in self._names[waiting.key][waiting.kind].held if held.conflicts(waiting.wait.lock)]

    # ------------------------------------------------------------ changes

    def acquire(self, key: Key, kind: Kind, lock: Lock, handle: int, *, may_wait: bool) -> Waiting | None:
        """Take a lock through a file handle: None if it is held now, else what to wait for.

        Raises BlockingIOError (EAGAIN) where it may not wait and somebody holds what is in its way; that somebody was
        first may come to nothing (`kin`).  Raises OSError (EDEADLK) where it would wait for ever: for record locks
        alone, as the kernel does (fcntl(2), F_SETLKW).
        """
        table = self._names.setdefault(key, NameLocks())[kind]
        self._last_ticket += 1
        waiting = Waiting(key, kind, Wait(self._last_ticket, lock))
        if may_wait and kind is Kind.RECORD:
            obstacles = {held.owner for held in self._held_against(waiting)}
            if self._deadlocks(lock.owner, obstacles):
                raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK))
        granted, others = table.request(waiting.wait)
        self._wake(others)
        if not granted:
            self._waiting[waiting.wait.ticket] = waiting
            if not may_wait and table.conflict(lock) is not None:
                self.give_up(waiting)
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._by_handle[handle].add((key, kind, lock.owner))
        self._last_handle[key, kind, lock.owner] = handle
        return None if granted else waiting

    def kin(self, waiting: Waiting) -> set[int]:
        """Pids of those who hold something on the name: a request of a child of theirs need not wait in the queue."""
        held = self._names[waiting.key][waiting.kind].held
        return {lock.pid for lock in held if lock.owner.node == self.node and lock.owner != waiting.wait.lock.owner}

    def is_blocked(self, waiting: Waiting) -> bool:
        """Whether somebody holds what is in its way, so that it does not only wait in the queue."""
        return bool(self._held_against(waiting))

    def release(self, key: Key, kind: Kind, owner: Owner, first: int = 0, last: int = OFFSET_MAX) -> None:
        """Unlock a range of an owner's."""
        locks = self._names.get(key)
        if locks is not None:
            self._wake(locks[kind].release(owner, first, last))
            self._drop_if_empty(key)

    def let_pass(self, waiting: Waiting) -> None:
        """A request may pass those that came before it, in case they wait for it in a way that is not seen here."""
        self._wake(self._names[waiting.key][waiting.kind].let_pass(self.node, waiting.wait.ticket))

    def give_up(self, waiting: Waiting) -> None:
        """Nobody waits for this lock any more."""
        if self._waiting.pop(waiting.wait.ticket, None) is not None:
            self._wake(self._names[waiting.key][waiting.kind].cancel(self.node, waiting.wait.ticket))
            self._drop_if_empty(waiting.key)

    def flushed(self, handle: int, key: Key, owner: Owner) -> None:
        """A process has closed one of its descriptors: it loses its record locks on the file (fcntl(2))."""
        used = {use[0] for use in self._by_handle.get(handle, ()) if use[1:] == (Kind.RECORD, owner)}
        for name in {key, *used}:
            if self._last_handle.pop((name, Kind.RECORD, owner), None) is not None:
                self.release(name, Kind.RECORD, owner)

    def released(self, handle: int) -> None:
        """The last descriptor of an open file is closed: what was locked through it is free."""
        for use in self._by_handle.pop(handle, ()):
            if self._last_handle.get(use) == handle:
                del self._last_handle[use]
                self.release(*use)

    def _wake(self, granted: list[Wait]) -> None:
        for wait in granted:
            self._waiting.pop(wait.ticket).granted.set()

    def _drop_if_empty(self, key: Key) -> None:
        if not self._names.get(key, True):
            del self._names[key]
