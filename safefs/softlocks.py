"""Lock files that are locks by being there (class lock, made with O_EXCL), and what becomes of them without a maker.

A file goes when the process that made it was ended by a signal with the file still there, or when the lease of its
node is over.  A process that exits by itself proves nothing (lockfile-create(1) exits and its lock stands), and neither
does one whose end nobody saw: such a file stays, and `safefs locks` says that its creator is gone.  `stale` in the
rules: `signalled` is that; with `dead` any end of the process counts, with `off` none, nor the end of the lease.

How a process ended is learnt by a pidfd, which was opened while it waited for its open(2): from the kernel once it is
reaped (ioctl_pidfd(2), PIDFD_GET_INFO with PIDFD_INFO_EXIT, Linux 6.15), before that from /proc while it is a zombie.
Older kernels leave nothing of a process that was reaped at once: then the file stays.

What other nodes have to know when this one is gone is in a file of this daemon's record, for locks that have been there
for `NOTE_SECONDS`: most live for less.  Until then a node that dies with all of its daemons leaves a file that stays.

What fails is tried again: a file is gone where nothing is at its place, and not where that cannot be seen.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import trio

from safefs import backing, processes
from safefs.backing import Backing
from safefs.cluster.files import NODE
from safefs.errors import MALFORMED
from safefs.events import EventKind, EventLog
from safefs.identity import DAEMON, SERVICE, read_back, written_down
from safefs.model import Caller, Closer, Identity, Process
from safefs.native import native
from safefs.rules import Stale
from safefs.state import DAEMONS, SOFT_LOCKS, DaemonRecord, StateDirectory, host_of, is_name
from safefs.workers import Workers

log = logging.getLogger(__name__)

NOTE_SECONDS = 0.1
REPEAT_SECONDS = 5.0  # until what failed is tried again
SWEEP_SECONDS = 60.0  # between looks whether the files are still there: other nodes can remove them
MAX_WATCHED = 1024  # files; each keeps two descriptors open
REAP_SECONDS = (0.005, 2.0)  # between looks at a zombie, at first and at most
LOOK_SECONDS = 1.0  # at /proc, which can make wait
MAX_LOOKS = 4  # at once
GONE = (errno.ENOENT, errno.ENOTDIR)

# include/uapi/linux/pidfd.h: struct pidfd_info, its first version.
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO_EXIT = 1 << 3
_INFO_BYTES, _EXIT_CODE_AT = 64, 60


ALIVE = "alive"


class End(StrEnum):
    """How the process that made a lock ended."""

    KILLED = "killed by a signal"
    EXITED = "exited"
    UNKNOWN = "ended, nobody saw how"


def exit_status(pidfd: int) -> int | None:
    """The wait(2) status of a process that was reaped; None before that, or where the kernel does not tell."""
    info = bytearray(_INFO_BYTES)
    struct.pack_into("=Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    if not struct.unpack_from("=Q", info, 0)[0] & _PIDFD_INFO_EXIT:
        return None
    return int(struct.unpack_from("=i", info, _EXIT_CODE_AT)[0])


def end_of(pidfd: int, tgid: int) -> End | None:
    """How a process ended; None while it is a zombie of which that is not seen.  Blocks."""
    status = exit_status(pidfd)
    if status is not None:
        return End.KILLED if os.WIFSIGNALED(status) else End.EXITED
    _, closer = processes.closer_of(tgid, guesses=False)
    if not processes.is_reaped(pidfd):  # so it was this process that /proc spoke of
        return {Closer.KILLED: End.KILLED, Closer.EXITED: End.EXITED}.get(closer)
    status = exit_status(pidfd)
    if status is None:
        return End.UNKNOWN
    return End.KILLED if os.WIFSIGNALED(status) else End.EXITED


@dataclass(frozen=True)
class Mark:
    """What tells one file from a later one of its name, also on another node: inode numbers are used again."""

    ino: int
    born: int  # ns; 0 where the filesystem does not know it
    changed: int  # st_mtime_ns, for filesystems that do not know the former

    @classmethod
    def of(cls, fd: int) -> Mark:
        status = os.fstat(fd)
        return cls(status.st_ino, native.birth_time(fd), status.st_mtime_ns)

    def is_same(self, other: Mark) -> bool:
        if self.ino != other.ino or self.born != other.born:
            return False
        return bool(self.born) or self.changed == other.changed


@dataclass(frozen=True)
class Maker:
    """Who has just made a lock file, and where; the descriptors belong to whoever gets this."""

    process: Process
    pidfd: int
    directory_fd: int
    fd: int  # O_PATH; keeps the inode's number from being used again, as far as this node can

    def close(self) -> None:
        os.close(self.pidfd)
        native.close_later(self.directory_fd)
        native.close_later(self.fd)


def introduce_maker(directory: int, fd: int, tid: int) -> Maker | None:
    """The process of a thread that waits for its open(2) of a new lock file; None where it cannot be seen.  Blocks.

    Nor is it watched where there is no descriptor left for that: the file has been made, so the open succeeds.
    """
    process = processes.identify(tid)
    pidfd = processes.open_pidfd(process.tgid) if process is not None else -1
    if process is None or pidfd < 0:
        return None
    with ExitStack() as undo:
        undo.callback(os.close, pidfd)
        try:
            path_fd = os.open(backing.proc_path(fd), os.O_PATH | os.O_CLOEXEC)
            undo.callback(os.close, path_fd)
            maker = Maker(process, pidfd, os.dup(directory), path_fd)
        except OSError as error:
            log.warning("a lock file of process %d is not watched: %s", process.tgid, error)
            return None
        undo.pop_all()
        return maker


@dataclass(eq=False)
class SoftLock:
    """One lock file, and who made it."""

    directory: Identity
    name: bytes
    directory_fd: int
    fd: int
    creator: Process
    stale: Stale
    since: float = field(default_factory=time.time)
    noted: bool = False  # on record for other nodes
    end: End | None = None  # of its creator, once the file has outlived it
    due: str = ""  # why it is to be removed, which has failed
    entry: dict[str, Any] | None = None  # what was last put on record

    @property
    def maker(self) -> Caller:
        """Who has made it: the owner, with the groups that its creator had."""
        status = os.fstat(self.fd)
        return Caller(status.st_uid, status.st_gid, groups=self.creator.groups)

    def makers(self) -> Iterator[Caller]:
        """The same for where root may be refused: only then the file is looked at."""
        yield self.maker

    def close(self) -> None:
        native.close_later(self.directory_fd)
        native.close_later(self.fd)


@dataclass(eq=False)
class _Creator:
    """A process that has made soft locks."""

    process: Process
    pidfd: int  # closed by whoever watches the process
    locks: set[SoftLock] = field(default_factory=set)


class SoftLocks:
    """The soft locks that were made through one mount."""

    def __init__(self, store: Backing, record: DaemonRecord, events: EventLog) -> None:
        self._backing = store
        self._record = record
        self._events = events
        self._locks: dict[tuple[Identity, bytes], SoftLock] = {}
        self._creators: dict[int, _Creator] = {}
        self._nursery: trio.Nursery | None = None
        self._noting = False
        self._is_behind = False  # what should be on record is not
        self._noted_in = 1  # as which record it was put down last (DaemonRecord.made)
        self._writing = trio.Lock()
        self._looks = Workers(MAX_LOOKS)
        self.node = ""  # this node's name in the cluster; empty: there is none

    async def run(self) -> None:
        """Until cancelled: watch those who made locks."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._repeat)
                while True:
                    await trio.sleep(SWEEP_SECONDS)
                    if self._locks:
                        await self._drop_missing()
        finally:  # nobody watches any more, nor works on a file
            self._nursery = None
            for lock in self._locks.values():
                lock.close()

    async def _repeat(self) -> None:
        """Until cancelled: what failed is tried again."""
        while True:
            await trio.sleep(REPEAT_SECONDS)
            if self._is_behind or self._noted_in != self._record.made:
                self._note_soon()
            for lock in [lock for lock in self._locks.values() if lock.due]:
                await self._remove(lock, lock.due)

    # ------------------------------------------------------------- locks

    def made(self, directory: Identity, name: bytes, maker: Maker, stale: Stale) -> None:
        """A process has made a lock file."""
        self.forget(self.find(directory, name))
        if self._nursery is None or not self._has_room():
            log.warning("%r is not watched: there are %d lock files already", name, len(self._locks))
            maker.close()
            return
        lock = SoftLock(directory, name, maker.directory_fd, maker.fd, maker.process, stale)
        self._locks[directory, name] = lock
        creator = self._creators.get(maker.process.tgid)
        if creator is not None and processes.is_alive(creator.pidfd):
            os.close(maker.pidfd)
        else:
            creator = self._creators[maker.process.tgid] = _Creator(maker.process, maker.pidfd)
            self._nursery.start_soon(self._watch, creator)
        creator.locks.add(lock)
        self._note_soon()

    def _has_room(self) -> bool:
        """Those that have outlived their creators are there to be shown: the first of them makes way."""
        if len(self._locks) >= MAX_WATCHED:
            self.forget(next((lock for lock in self._locks.values() if lock.end is not None), None))
        return len(self._locks) < MAX_WATCHED

    def find(self, directory: Identity, name: bytes) -> SoftLock | None:
        """The lock that this name shows, as far as this node knows; to `forget` once it is removed."""
        return self._locks.get((directory, name)) if self._locks else None

    def forget(self, lock: SoftLock | None) -> None:
        """The file is removed, or its name shows something else now."""
        if lock is None or self._locks.get((lock.directory, lock.name)) is not lock:
            return
        del self._locks[lock.directory, lock.name]
        creator = self._creators.get(lock.creator.tgid)
        if creator is not None:
            creator.locks.discard(lock)
        if lock.noted:
            self._note_soon()
        lock.close()

    def joined(self, node: str) -> None:
        """This node has a name in the cluster, a new one after each lost lease.

        Others may have removed files when the last one was over; what is left stands under the new one.
        """
        self.node = node
        if self._locks:
            self._note_soon()

    async def _drop_missing(self) -> None:
        for lock in [lock for lock in self._locks.values() if not lock.due]:
            if self._locks.get((lock.directory, lock.name)) is not lock:
                continue
            if not await self._backing.run(DAEMON, self._is_shown, lock):
                self.forget(lock)

    def _is_shown(self, lock: SoftLock) -> bool:
        """Whether the name shows the file, as far as can be seen."""
        try:
            return self._is_at(lock)
        except OSError as error:
            return error.errno not in GONE

    def _is_at(self, lock: SoftLock) -> bool:
        as_owner, directory = self._backing.identities.as_owner, lock.directory_fd
        try:
            shown = as_owner(directory, backing.identity_at, directory, lock.name, others=lock.makers())
            return shown is not None and shown == backing.identity_of(os.fstat(lock.fd))
        except OSError as error:
            if error.errno != errno.ESTALE or lock.entry is None:
                raise
        return _at_noted(self._backing, lock.entry, _shows)  # of the descriptors none may ever be good again

    # ----------------------------------------------------------- creators

    async def _watch(self, creator: _Creator) -> None:
        tgid = creator.process.tgid
        try:
            await trio.lowlevel.wait_readable(creator.pidfd)
            end = await self._end_of(creator)
        finally:
            if self._creators.get(tgid) is creator:
                del self._creators[tgid]
            os.close(creator.pidfd)
        creator.locks -= {lock for lock in creator.locks if self._locks.get((lock.directory, lock.name)) is not lock}
        for lock in list(creator.locks):
            if (end is End.KILLED and lock.stale is Stale.SIGNALLED) or lock.stale is Stale.DEAD:
                await self._remove(lock, f"its creator {end}")
            lock.end = end
        if creator.locks:
            self._note_soon()  # they have outlived it

    async def _end_of(self, creator: _Creator) -> End:
        pause, longest = REAP_SECONDS
        while True:
            end = None
            with trio.move_on_after(LOOK_SECONDS), suppress(OSError):
                end = await self._looks.run(end_of, creator.pidfd, creator.process.tgid)
            if end is not None:
                return end
            await trio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _remove(self, lock: SoftLock, reason: str) -> None:
        if self._locks.get((lock.directory, lock.name)) is not lock:
            return
        path, removed = "", False
        try:
            path, removed = await self._backing.run(DAEMON, self._remove_file, lock)
        except OSError as error:
            if error.errno not in GONE:
                if not lock.due:
                    log.warning("the lock file %r of a process that is gone stays for now: %s", lock.name, error)
                lock.due = reason
                return
        if removed:
            self._events.note(
                EventKind.LOCK_REMOVED, path, reason=reason, pid=lock.creator.tgid, command=lock.creator.command
            )
            log.info("removed the lock file %s: %s", path, reason)
        self.forget(lock)

    def _remove_file(self, lock: SoftLock) -> tuple[str, bool]:
        path, directory = self._path(lock), lock.directory_fd
        as_owner, hidden = self._backing.identities.as_owner, self._backing.hidden_name(b"l")
        try:
            mark = Mark.of(lock.fd)
            return path, as_owner(directory, remove_if_same, directory, lock.name, mark, hidden, others=lock.makers())
        except OSError as error:
            if error.errno != errno.ESTALE or lock.entry is None:
                raise
        return path, remove_noted(self._backing, lock.entry)

    def _path(self, lock: SoftLock) -> str:
        directory = os.fsdecode(backing.path_below(self._backing.root_path, lock.directory_fd))
        return os.path.join(directory, os.fsdecode(lock.name))

    # ------------------------------------------------------------- record

    def _note_soon(self) -> None:
        if not self._noting and self._nursery is not None:
            self._noting = True
            self._nursery.start_soon(self._note)

    async def _note(self) -> None:
        await trio.sleep(NOTE_SECONDS)
        async with self._writing:  # one after the other: the last one has to be the one that stays
            self._noting = False
            locks = list(self._locks.values())
            for lock in locks:
                lock.noted = True
            try:
                await self._backing.run(SERVICE, self._write, locks)
            except OSError as error:
                if not self._is_behind:
                    log.warning("lock files cannot be put on record yet: %s", error)
                self._is_behind = True
            else:
                self._is_behind = False

    def _write(self, locks: list[SoftLock]) -> None:
        """Put them on record; OSError also where one is missing there for another reason than that it is gone."""
        missing, self._noted_in = None, self._record.made
        for lock in locks:
            try:
                lock.entry = self._entry(lock)
            except OSError as error:  # what was on record is still true: others look before they remove it
                if lock.entry is None and error.errno not in (*GONE, errno.ESTALE):
                    missing = error
        entries = [lock.entry for lock in locks if lock.entry is not None]
        self._record.write_soft_locks({"node": self.node, "locks": entries})
        if missing is not None:
            raise missing

    def _entry(self, lock: SoftLock) -> dict[str, Any]:
        mark = Mark.of(lock.fd)
        return {
            "path": self._path(lock),
            "ino": mark.ino,
            "born": mark.born,
            "changed": mark.changed,
            "pid": lock.creator.tgid,
            "command": lock.creator.command,
            "creator": str(lock.end or ALIVE),
            "stale": str(lock.stale),
            "since": round(lock.since, 3),
            "maker": written_down(lock.maker),
        }


@dataclass(frozen=True)
class Noted:
    """The soft locks that a daemon has on record."""

    node: str  # its name in the cluster then
    locks: tuple[dict[str, Any], ...]
    is_whole: bool = True  # else the record is damaged, and there were more


def read_noted(record: Path) -> Noted | None:
    """What a daemon has on record; None where there is nothing.  Raises OSError.  Blocks."""
    try:
        text = (record / SOFT_LOCKS).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = json.loads(text.decode("ascii"))
        node, locks = _node(data["node"]), tuple(data["locks"])
    except MALFORMED:
        return Noted("", (), is_whole=False)
    sound = tuple(entry for entry in locks if _is_entry(entry))
    return Noted(node, sound, is_whole=len(sound) == len(locks))


def _node(found: Any) -> str:
    """A node's name, or that there is none: with anything else it is not known under whose lease lock files stand."""
    if found == "" or NODE.fullmatch(found):
        return str(found)
    raise ValueError(f"{found!r} is no node of a cluster")


def _is_entry(found: Any) -> bool:
    """Whether something in a record is what `SoftLocks._entry` makes."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("path", "creator", "stale")):
        return False
    # The file is known by the first three; who made it is shown.
    return is_name(found["path"]) and all(isinstance(found.get(key), int) for key in ("ino", "born", "changed", "pid"))


def all_noted(state: StateDirectory) -> list[dict[str, Any]]:
    """The soft locks that any daemon has on record, as `safefs locks` shows them.  Blocks."""
    entries = []
    for record in sorted((state.path / DAEMONS).iterdir()):
        noted = None
        with suppress(OSError):
            noted = read_noted(record)
        if noted is None:
            continue
        host = host_of(record)
        for entry in noted.locks:
            state_text = "held" if entry["creator"] == ALIVE else f"creator {entry['creator']}"
            shown = {"kind": "file", "mode": "exclusive", "first": 0, "last": None, "state": state_text}
            entries.append({**entry, **shown, "node": noted.node, "host": host})
    return entries


def remove_noted(store: Backing, entry: dict[str, Any]) -> bool:
    """Remove a file of a node whose lease is over; False where it is not there.  Raises OSError.  Blocks."""
    if entry["stale"] == Stale.OFF:
        return False
    return _at_noted(store, entry, remove_if_same, store.hidden_name(b"l"))


def _at_noted(store: Backing, entry: dict[str, Any], function: Callable[..., bool], *arguments: object) -> bool:
    """Call a function with directory, name and mark of a file on record; False where its directory is gone.

    The directory is looked up from the root, so an ESTALE says that it cannot be seen at the moment.  Lock files lie in
    users' directories, where root may have no rights (root_squash).
    """
    directory, name = os.path.split(os.fsencode(entry["path"]))
    makers = read_back(entry.get("maker"))
    try:
        fd = store.open_below(directory, makers)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        mark = Mark(entry["ino"], entry["born"], entry["changed"])
        return store.identities.as_owner(fd, function, fd, name, mark, *arguments, others=makers)
    finally:
        os.close(fd)


def remove_if_same(directory: int, name: bytes, mark: Mark, hidden: bytes) -> bool:
    """Remove a name as long as it shows this file: another one that comes meanwhile is put back.

    Whoever makes the name in the moment in which another's file is out of its place has it, and that file goes.  It
    takes two others who make the same lock within microseconds, one before and one after the rename.  Where that fails
    halfway the file gets its name back, so that it can be tried again.
    """
    if not _shows(directory, name, mark):
        return False
    try:
        backing.rename(directory, name, directory, hidden, 0)
    except FileNotFoundError:
        return False  # another node has just removed it
    try:
        is_same = _shows(directory, hidden, mark)
        if is_same:
            backing.unlink(directory, hidden)
    except OSError:
        with suppress(OSError):
            backing.put_back(directory, hidden, name)
        raise
    if not is_same:
        backing.put_back(directory, hidden, name)
    return is_same


def _shows(directory: int, name: bytes, mark: Mark) -> bool:
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno in GONE:
            return False
        raise
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and Mark.of(fd).is_same(mark)
    finally:
        os.close(fd)
