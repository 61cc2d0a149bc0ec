"""Lock requests of clients: which name they are about, and what they wait for."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import trio

from safefs import backing, processes
from safefs.closers import CALL_SECONDS, CLOSING_NS
from safefs.cluster.backend import NAMELESS, BackendError
from safefs.filesystem import BY_PATH, FileSystem, Handle, number_key, path_key
from safefs.hot import MODE_TYPES, TYPE_MODES
from safefs.identity import DAEMON
from safefs.locks import Estate, Waiting, entry_of, name_key
from safefs.locktable import OFFSET_MAX, Kind, Lock, Mode, Owner
from safefs.model import Identity
from safefs.namespace import Node
from safefs.native import native

# After that long, who waits behind others who have nothing yet passes them, should he be what they wait for.
PATIENCE_SECONDS = 5.0
# That doubles while the queue does not empty, up to this: those who hold a lock for less than half of it starve nobody,
# and who is waited for in a way that is not seen does not wait for days because the queue has been busy for days.
MAX_PATIENCE_SECONDS = 3600.0
MAX_KIN = 16
# How long the RELEASE of a closed file is waited for, between looks at who closed it.  When he has left the call others
# have it open, perhaps a parent that has just forked and is about to close it: so many looks are for that, and so many
# while there are requests that may be the RELEASE.
RELEASE_SECONDS, LEFT_LOOKS, RELEASE_LOOKS = 0.02, 5, 10
BACKLOG_SECONDS = 0.002  # between looks whether what the kernel had to say has been received

_UNKNOWN_DIRECTORY = re.compile(rb"inode ([0-9]+)")  # how `Locking.report` calls one that the mount has not come to
_FLOCK_MODES = {fcntl.LOCK_SH: Mode.SHARED, fcntl.LOCK_EX: Mode.EXCLUSIVE}


T = TypeVar("T")

# What comes of asking for a lock: None, and it is held; something to wait for; or a turn in so many seconds.
Asked = Waiting | float | None


class Wanted(NamedTuple):
    """A lock request as the kernel sends it: `owner` is its number for who asks, `handle` that of the open file."""

    nodeid: int
    handle: int
    owner: int
    kind: Kind
    mode: Mode | None  # None: unlock
    first: int = 0
    last: int = OFFSET_MAX
    pid: int = 0
    may_wait: bool = False


def record_lock(
    nodeid: int, handle: int, owner: int, number: int, start: int, length: int, pid: int = 0, *, may_wait: bool = False
) -> Wanted:
    """A struct flock of fcntl(2); a length of 0 is up to the end of the file."""
    last = OFFSET_MAX if length == 0 else start + length - 1
    return Wanted(nodeid, handle, owner, Kind.RECORD, TYPE_MODES.get(number), start, last, pid, may_wait)


def flock_lock(nodeid: int, handle: int, owner: int, operation: int, pid: int) -> Wanted:
    """The operation of a flock(2)."""
    mode = _FLOCK_MODES.get(operation & ~fcntl.LOCK_NB)
    return Wanted(nodeid, handle, owner, Kind.FLOCK, mode, pid=pid, may_wait=not operation & fcntl.LOCK_NB)


@dataclass(eq=False)
class Ending:
    """The record locks of a process on a file that it has closed, and that is not published yet.

    They are nobody's whom a client could be, so the process is to others, and others to it, as if it had lost them:
    whoever wants one of them waits, and that is all.
    """

    owner: Owner  # whose they were
    file: int
    estate: Estate
    closes: list[Close] = field(default_factory=list)  # after which it can yet be published
    done: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False)
class Close:
    """A process has closed a descriptor, and nobody knows yet whether it was the last."""

    ending: Ending
    handle: Handle
    tid: int  # the thread that did

    def may_publish(self) -> bool:
        """Whether its RELEASE has come, or somebody publishes the file now, or perhaps is about to."""
        draft = self.handle.draft
        return self.handle.released or (draft is not None and (draft.gate.is_closed or draft.flushes > 0))


class Locking:
    """The locks of one mount's files."""

    def __init__(self, filesystem: FileSystem) -> None:
        self.fs = filesystem
        self.locks = filesystem.locks
        self._endings: defaultdict[str, list[Ending]] = defaultdict(list)  # by name
        self._endings_of: defaultdict[tuple[Owner, int], list[Ending]] = defaultdict(list)  # by process and file
        self._closes: defaultdict[int, list[Close]] = defaultdict(list)  # by the number of the file handle
        self._patience: dict[tuple[str, Kind], float] = {}  # where it was lost before, while anybody waits

    def key(self, nodeid: int, number: int, owner: Owner) -> str:
        """What an open file is locked by, for one who asks: its draft's name, or the one that it was found under.

        What is held or waited for through it, or by who asks, keeps the name that it was locked by, whatever has become
        of the file since; once there is nothing, it is the name that others find the file by.
        """
        known, found = self.locks.key_of(number), self._found_under(nodeid, number)
        if found is None:  # all that were open then go on with the name that they had
            return known or name_key(self.fs.directory_key(self.fs.node(nodeid)), b"")
        if known in (None, found):
            return found
        bound = self.locks.bound_files(number, known, owner)
        return known if self.fs.nodes.origin(nodeid) in bound else found

    def _handle(self, number: int) -> Handle | None:
        return self.fs.handles.get(number)

    def _key(self, wanted: Wanted) -> str:
        return self.key(wanted.nodeid, wanted.handle, self._owner(wanted))

    def _found_under(self, nodeid: int, number: int) -> str | None:
        """None of a name that is gone with its directory; the kernel keeps the others above a file that is open."""
        directory, name = self._place(nodeid, number)
        return name_key(self.fs.directory_key(directory), name) if directory is not None else None

    def _place(self, nodeid: int, number: int) -> tuple[Node | None, bytes]:
        """Directory and name of an open file; of one with several names those that it was opened by.

        A draft has the name that it will be published under, also when somebody else has renamed the version.
        """
        handle = self._handle(number)
        if handle is not None and handle.draft is not None and handle.node.draft is handle.draft:
            return handle.draft.directory, handle.draft.name
        node = self.fs.node(nodeid)
        parent, name = node.parent, node.name
        if node.linked:  # the extension opens what has one name alone
            parent, name = handle.place if handle is not None else node.first_place
        return self.fs.nodes.get(parent), name

    def _owner(self, wanted: Wanted) -> Owner:
        return Owner(self.locks.node, wanted.owner)

    async def conflict(self, wanted: Wanted) -> tuple[int, int, int, int]:
        """F_GETLK: type, start, length and pid of a lock in the way (pid 0: on another node); else F_UNLCK.

        Asked for F_UNLCK (F_OFD_GETLK, where the kernel has that) it is a lock of the open file's own.  OSError
        (ENOLCK): this node has no lease, and cannot say.
        """
        key, owner, first, last = self._key(wanted), self._owner(wanted), wanted.first, wanted.last
        if wanted.mode is None:
            found = self.locks.own(key, wanted.kind, owner, first, last)
        else:
            try:
                found = await self.locks.conflict(key, wanted.kind, Lock(owner, wanted.mode, first, last))
            except BackendError:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from None
        if found is None:
            return fcntl.F_UNLCK, 0, 0, 0
        length = 0 if found.last == OFFSET_MAX else found.last - found.first + 1
        return MODE_TYPES[found.mode], found.first, length, found.pid if found.owner.node == self.locks.node else 0

    def may_settle(self) -> bool:
        """Whether there is anything that `settled` could wait for."""
        return bool(self.fs.ordering or self._endings)

    async def settled(self, wanted: Wanted, tid: int) -> None:
        """Until what was closed under a lock of the name is published: nobody may have the lock before.

        Who closed it has no lock any more as far as he knows, so who asks for one in the way (F_GETLK) waits as well.
        """
        if self._endings:
            for ending in list(self._endings.get(self._key(wanted), ())):
                await self._end(ending, tid)
        await self.fs.ordering.wait_name(*self._place(wanted.nodeid, wanted.handle))

    def unlock(self, wanted: Wanted) -> list[trio.Event]:
        """What to wait for until that is done."""
        owner = self._owner(wanted)
        if wanted.kind is Kind.RECORD:
            return self.locks.unlock_records(owner, self.fs.nodes.origin(wanted.nodeid), wanted.first, wanted.last)
        key = self._key(wanted)
        unlocking = self.locks.release(key, wanted.kind, owner)
        if unlocking is not None:
            return [unlocking]
        self._lend(wanted, key)
        return []

    def lock(self, wanted: Wanted, mode: Mode) -> Waiting | None:
        """None if the lock is held, else what to `wait` for.  OSError: EAGAIN, EDEADLK, ESTALE."""
        known = self.locks.key_of(wanted.handle)
        key = self._key(wanted)
        if wanted.kind is Kind.RECORD:
            native.hear_closes(entry_of(key))  # from now on every close of such a file is heard of
        lock = Lock(self._owner(wanted), mode, wanted.first, wanted.last, wanted.pid)
        origin = self.fs.nodes.origin(wanted.nodeid)
        waiting = self.locks.acquire(key, wanted.kind, lock, wanted.handle, may_wait=wanted.may_wait, file=origin)
        handle = self._handle(wanted.handle)
        if handle is not None and handle.draft is not None:
            handle.draft.locked = True
        if known is None and wanted.handle & native.FH_HOT:
            self.fs.nodes.hot.mark_handle(wanted.handle, 1)  # its RELEASE is Python's business from now on
        if waiting is None:
            self._lend(wanted, key)
        return waiting

    def ask(self, wanted: Wanted, mode: Mode) -> Asked:
        """As `lock`; or for how many seconds a try that is refused now has to wait for its answer (`lock_in_turn`).

        Whole locks alone: who is refused one range of a file may hold another that somebody waits for (SQLite).
        """
        try:
            return self.lock(wanted, mode)
        except BlockingIOError:
            key = self._key(wanted)
            seconds = self.locks.turns.seconds(key) if wanted.kind is Kind.FLOCK else 0.0
            if not seconds:
                raise
            return seconds

    async def lock_in_turn(self, wanted: Wanted, seconds: float) -> Waiting | None:
        """As `lock`, as soon as it is free, or refused after so long."""
        assert wanted.mode is not None
        key = self._key(wanted)
        return await self.locks.turns.attempt(key, seconds, partial(self.lock, wanted, wanted.mode))

    def _lend(self, wanted: Wanted, key: str) -> None:
        """From now on the extension answers, until somebody else comes.

        Not where a lock means more than that it is held: a draft is moved by it, and is published before it is free;
        and what was written in place is sent before.  Nor by a name that the file does not have any more.
        """
        handle = self._handle(wanted.handle)
        means_more = handle is not None and (handle.draft is not None or handle.node.nodeid in self.fs.unsent)
        if wanted.kind is Kind.FLOCK and not means_more and key == self._found_under(wanted.nodeid, wanted.handle):
            self.locks.lend(key, wanted.owner, wanted.handle)

    async def wait(self, waiting: Waiting, tid: int) -> None:
        """Until the lock is held; cancelled, the request is given up.  BlockingIOError (EAGAIN): it was refused."""
        try:
            if not self.locks.is_blocked(waiting) and await self._is_kin(waiting, tid):
                self.locks.let_pass(waiting)
            if waiting.submitted and not waiting.may_wait:
                await waiting.settled.wait()
            elif waiting.may_wait:
                await self._wait_patiently(waiting)
        finally:
            self.locks.give_up(waiting)
        if not waiting.held:
            if waiting.submitted and waiting.kind is Kind.FLOCK:
                await trio.sleep(self.locks.turns.seconds(waiting.key))
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async def _wait_patiently(self, waiting: Waiting) -> None:
        """Who comes after one that has lost patience has twice as much, so that those who were passed have a turn."""
        queue = waiting.key, waiting.kind
        seconds = self._patience.get(queue, PATIENCE_SECONDS)
        try:
            with trio.move_on_after(seconds):
                await waiting.settled.wait()
            if not waiting.settled.is_set():
                doubled = min(2 * seconds, MAX_PATIENCE_SECONDS)
                self._patience[queue] = max(self._patience.get(queue, 0.0), doubled)
                self.locks.let_pass(waiting)
            await waiting.settled.wait()
        finally:
            if not self.locks.has_queue(waiting):
                self._patience.pop(queue, None)

    async def _is_kin(self, waiting: Waiting, tid: int) -> bool:
        """Whether a process that holds something on the name, or a child of it, is the one that asks."""
        chain = await self.fs.look(processes.ancestry, tid) or []
        for pid in sorted(self.locks.kin(waiting))[:MAX_KIN]:
            process = await self.fs.identify(pid)
            if process is not None and process.tgid in chain:
                return True
        return False

    async def report(self) -> list[dict[str, Any]]:
        """Every holder and waiter on all nodes, with its path as far as this node knows the directory.

        What a directory has of names that are being made in it is shown as the directory with a slash.
        """
        entries = await self.locks.report()
        for entry in entries:
            directory, _, name = entry.pop("key").rpartition("/")
            entry["path"] = os.path.join(self._directory_text(directory), name) or "./"
        return entries

    def _directory_text(self, key: str) -> str:
        if key.startswith(NAMELESS):
            return key.removeprefix(NAMELESS)
        if key.startswith(BY_PATH):
            return key.removeprefix(BY_PATH)
        ino = int(key, 16)
        node = self.fs.nodes.find(Identity(self.fs.root.identity.dev, ino))
        try:
            if node is None or node.fd < 0:
                raise FileNotFoundError
            return os.fsdecode(backing.path_below(self.fs.backing.root_path, node.fd))
        except OSError:
            return f"inode {ino}"

    async def break_locks(self, path: bytes) -> int:
        """Take all locks on a path below the root, as it is reported, from their holders; how many there were.

        OSError: no such path.
        """
        directory, name = os.path.split(path)
        key = await self.fs.backing.run(DAEMON, self._key_of_path, directory)
        return await self.locks.break_locks(name_key(key, name))

    def _key_of_path(self, directory: bytes) -> str:
        """Of a directory below the root; where nothing has that name, of one that is reported by its number."""
        try:
            fd = self.fs.backing.open_below(directory)
        except FileNotFoundError:
            unknown = _UNKNOWN_DIRECTORY.fullmatch(directory) if self.fs.numbers_are_shared else None
            if unknown is None:
                raise
            return number_key(int(unknown[1]))
        try:
            if self.fs.numbers_are_shared:
                return number_key(os.fstat(fd).st_ino)
            return path_key(backing.path_below(self.fs.backing.root_path, fd))
        finally:
            os.close(fd)

    def flushed(self, nodeid: int, owner: int) -> list[trio.Event]:
        """A process has closed a descriptor of an open file; what to wait for until its locks are free."""
        return self.locks.flushed(Owner(self.locks.node, owner), self.fs.nodes.origin(nodeid))

    def writes_through(self, nodeid: int, owner: int) -> list[Handle]:
        """By which a process that closes a file, and has locks on it, has written what is not published yet.

        They are closed perhaps in the same call, in the next ones, or as the process ends.
        """
        file = self.fs.nodes.origin(nodeid)
        pid = self.locks.holder(Owner(self.locks.node, owner), file)
        drafts = self.fs.drafts if pid else ()
        written = [draft for draft in drafts if draft.unpublished and draft.node.origin == file]
        handles = self.fs.handles.values() if written else ()
        own = (each for each in handles if each.opener_tgid == pid and each.writable and not each.released)
        return [each for each in own if each.draft in written]

    def flushed_unpublished(self, nodeid: int, handles: Sequence[Handle], owner: int, tid: int) -> list[Close]:
        """The same, where what was written under the locks is not published yet, and will be by RELEASE if it comes.

        The locks end when that has come of all these open files (`released`), or once it is known that it does not come
        (`end_unless_released`, for each of what this returns): close(2) gives them up, and so it did, but for the
        moment until then.
        """
        closer, file = Owner(self.locks.node, owner), self.fs.nodes.origin(nodeid)
        estate = self.locks.hand_over(closer, file, handles[0].number)
        if estate is not None:
            ending = Ending(closer, file, estate)
            self._endings_of[closer, file].append(ending)
            for key in estate.names:
                self._endings[key].append(ending)
        endings = self._endings_of.get((closer, file), ())
        return [self._note_close(ending, handle, tid) for ending in endings for handle in handles]

    def _note_close(self, ending: Ending, handle: Handle, tid: int) -> Close:
        close = Close(ending, handle, tid)
        if handle.draft is not None:
            handle.draft.locked = True  # it is published under the lease, through whatever it was locked
        ending.closes.append(close)
        self._closes[handle.number].append(close)
        self.locks.hold_on(ending.estate, handle.number, ending.file)
        return close

    async def _end(self, ending: Ending, tid: int) -> None:
        """A thread asks for something, so it is in none of its closes any more: RELEASE has come, or will not."""
        while own := [close for close in ending.closes if tid and close.tid == tid and not close.may_publish()]:
            if not self.fs.passthrough.requests_wait():
                for close in own:
                    self._over(close)
                break
            await trio.sleep(BACKLOG_SECONDS)
        await ending.done.wait()

    def _over(self, close: Close) -> None:
        """What came of a close is published, or it was not the last: the locks are free, but for other closes."""
        ending, number = close.ending, close.handle.number
        if close not in ending.closes:
            return
        ending.closes.remove(close)
        self._drop(self._closes, number, close)
        if all(other.handle.number != number for other in ending.closes):
            self.locks.let_go(ending.estate, number)
        if not ending.closes:
            self._drop(self._endings_of, (ending.owner, ending.file), ending)
            for key in ending.estate.names:
                self._drop(self._endings, key, ending)
            ending.done.set()

    @staticmethod
    def _drop(lists: defaultdict[Any, list[T]], key: object, item: T) -> None:
        lists[key].remove(item)
        if not lists[key]:
            del lists[key]

    async def end_unless_released(self, close: Close) -> None:
        """RELEASE comes at the end of the call that closes, or not at all, when there are other copies.

        A call that closes many files can take as long as it takes to publish some of them.  It cannot be told from one
        that the thread makes after it, so that is waited for within `CALL_SECONDS` alone, but to its end where the
        process ends.
        """
        closers, looks, tid = self.fs.closers, 0, close.tid
        began, flushes, end = None, closers.flushes(tid), trio.current_time() + CALL_SECONDS
        now: int | None = processes.ENDING
        while now == processes.ENDING or (trio.current_time() < end and looks < RELEASE_LOOKS) or close.may_publish():
            with trio.move_on_after(RELEASE_SECONDS):
                await close.ending.done.wait()
            if close.ending.done.is_set() or close.handle.released:
                return
            if close.may_publish():
                continue
            before, flushes = flushes, closers.flushes(tid)
            closes_more = closers.is_waiting(tid) or flushes != before
            now = await self.fs.look(processes.time_while_closing, tid, closes_more)
            began = now if began is None or closes_more else began
            has_run = now is not None and began is not None and now - began >= CLOSING_NS
            if has_run or now == processes.LEFT:
                looks += 1
                if looks >= LEFT_LOOKS and not (self.fs.passthrough.requests_wait() or close.may_publish()):
                    break
        self._over(close)

    def released(self, number: int) -> None:
        """Nobody has an open file any more."""
        for close in list(self._closes.get(number, ())):
            self._over(close)
        if number & native.FH_HOT and self.locks.key_of(number) is not None:
            self.fs.nodes.hot.mark_handle(number, -1)
            self.fs.fenced_readers.discard(number)
        self.locks.released(number)
