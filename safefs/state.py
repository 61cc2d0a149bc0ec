"""The state directory of a backing: the quarantine, and a record of every daemon that works on it.

It lies at the backing's root (`.safefs`), out of reach of the mounts, so that the bytes of a refused draft get there
by a link and not by a copy.  Everything here blocks and runs in worker threads, as whom the directory belongs to
(identity.SERVICE); nothing here is on the way of a write that goes well, but for one line per directory of
`DaemonRecord.note_directory`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from safefs.backing import append_lines, copy_contents, copy_times, link_inode, reopen, sync_directory, unlink
from safefs.custody import take_custody
from safefs.errors import NOT_JSON
from safefs.identity import SERVICE, Identities, root_or, written_down
from safefs.model import Caller
from safefs.processes import start_time
from safefs.retained import RetainedVersions

log = logging.getLogger(__name__)

RECORD_VERSION = 1
MACHINE_ID = re.compile("[0-9a-f]{32}")
QUARANTINE = "quarantine"
DAEMONS = "daemons"
EVENTS = "events"
LOCK_FILES = "locks"
CLUSTER = "cluster-id"
SHARING = "sharing"  # in a daemon's identity: what its locks depend on (safefs.agreement)
RETAINED = "retained"
RECORD_SUFFIX = ".json"
WRITER = "writer"  # in a daemon's journal
COPIED_FROM = "copied_from"  # in the record of a file that is a copy: owner and mode of the file
# In a daemon's record:
IDENTITY, HEARTBEAT, JOURNAL, SOFT_LOCKS, ETCD = "identity.json", "heartbeat", "journal", "softlocks", "etcd"
BEAT_SECONDS = 5.0  # between its heartbeats
MAX_NOTED = 1 << 18  # directories that a daemon remembers to have put on record; then it does so again
LOCKS = "names.lock"
LOCK_RANGE = (1 << 62) - 1
NAME_LOCK_SECONDS = 30.0  # a publish holds it for a rename, and for comparing two files where there is a conflict
LOCK_PAUSE_SECONDS, LOCK_PAUSES_SECONDS = 0.0005, 0.05  # between attempts, at first and at most
NO_TIME = 1e11  # seconds since the epoch, thousands of years from now: no clock says so, and all before can be shown
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # the backing has none


def _read_first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.readline().strip()
    except (OSError, ValueError):
        return ""


def _machine_id() -> str:
    """What tells this host from others of its name (machine-id(5)); empty where it has nothing that does.

    An image that has not been booted has another word there, or nothing, and so has each of its containers.
    """
    found = _read_first_line("/etc/machine-id")
    return found if MACHINE_ID.fullmatch(found) and found.strip("0") else ""


def _flock(kind: int, start: int) -> bytes:
    """struct flock for one byte; l_pid is 0 for locks of open file descriptions."""
    return struct.pack("hhqqi", kind, os.SEEK_SET, start, 1, 0)


def _namespace(kind: str) -> int:
    """The number of this process's namespace of a kind; 0 where the kernel has none (time: before 5.6)."""
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


def host_identity() -> dict[str, Any]:
    """What tells this daemon from others: the boot it lives in, its pid namespace, its process."""
    return {
        "version": RECORD_VERSION,
        "host": socket.gethostname(),
        "machine": _machine_id(),
        "boot": _read_first_line("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _namespace("pid"),
        "time_namespace": _namespace("time"),  # start times are told in it
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
    }


def known_dead(identity: Mapping[str, Any]) -> bool | None:
    """Whether the process with a `host_identity` is dead; None where this host cannot know it."""
    me = host_identity()
    if identity.get("machine") != me["machine"] or identity.get("host") != me["host"]:
        return None
    if identity.get("boot") != me["boot"]:
        # Without a machine-id two hosts of one name would look like one that has booted again.
        return True if me["machine"] else None
    if any(identity.get(namespace) != me[namespace] for namespace in ("pid_namespace", "time_namespace")):
        return None
    pid, start = identity.get("pid"), identity.get("start")
    if not isinstance(pid, int) or not isinstance(start, int):
        return None  # the record is damaged
    return start_time(pid) != start


def agreed(home: Path, mine: str, note: str) -> tuple[str, str]:
    """The id that all who use a directory have agreed on, and its note: those of who was first.  Raises OSError.

    A directory with one file of that name: of several that rename theirs to the place one succeeds, everywhere.
    """
    found = noted(home)
    if found is not None:
        return found
    fresh = home / f"{CLUSTER}.{secrets.token_hex(8)}"
    fresh.mkdir(mode=0o700)
    try:
        (fresh / mine).write_text(note, encoding="utf-8", errors="surrogateescape")
        fresh.rename(home / CLUSTER)
    except OSError as error:
        with suppress(OSError):
            (fresh / mine).unlink()
            fresh.rmdir()
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EACCES):
            raise
    found = noted(home)
    if found is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(home / CLUSTER))
    return found


def noted(home: Path) -> tuple[str, str] | None:
    """What `agreed` says; None where nobody has made anything yet.  Raises OSError."""
    try:
        for path in (home / CLUSTER).iterdir():
            return path.name, path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        pass
    return None


def _find(directory: int, name: bytes) -> int:
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def is_name(found: Any) -> bool:
    """Whether something that was read can be a path: what stands in a damaged record need not be one."""
    try:
        return b"\0" not in os.fsencode(found)
    except (TypeError, ValueError):
        return False


def _time_of(record: Mapping[str, Any], otherwise: float) -> float:
    """When a file was kept, by its record; where that is damaged something else."""
    noted = record.get("time")
    if isinstance(noted, int | float) and not isinstance(noted, bool) and 0 <= noted < NO_TIME:
        return float(noted)
    return otherwise


def _file_names(directory: Path) -> list[str]:
    """The regular files in a directory."""
    with os.scandir(directory) as found:
        return [entry.name for entry in found if entry.is_file(follow_symlinks=False)]


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none: not yet, cut short by a crash, or damaged."""
    try:
        found = json.loads(path.read_text(encoding="ascii"))
    except (OSError, *NOT_JSON):
        return {}
    return found if isinstance(found, dict) else {}


def identity_of(record: Path) -> dict[str, Any]:
    """Who the daemon with this record is (`host_identity`); empty where that cannot be read."""
    return _read_object(record / IDENTITY)


def heartbeat_of(record: Path) -> str:
    """What the daemon with this record has come to; empty where that cannot be read."""
    try:
        return (record / HEARTBEAT).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def etcd_of(record: Path) -> str:
    """In which etcd the daemon with this record has its locks (`note_etcd`); empty where in none.  Raises OSError."""
    try:
        return (record / ETCD).read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def host_of(record: Path) -> str:
    """The host of the daemon with this record; empty where that cannot be read."""
    return str(identity_of(record).get("host", ""))


@dataclass(frozen=True)
class Kept:
    """One file in quarantine; `record` is what was written down about it, empty where that was cut short."""

    write_id: str
    file: Path
    size_bytes: int
    time: float  # seconds since the epoch
    record: dict[str, Any]

    @property
    def path(self) -> str:
        """The name that it was meant for, below the backing directory."""
        return str(self.record.get("path") or self.record.get("name") or "")

    @property
    def copied_from(self) -> tuple[int, int, int] | None:
        """Owner, group and mode of the file that this is a copy of; None where it is the file itself."""
        try:
            found = self.record[COPIED_FROM]
            return int(found["uid"]), int(found["gid"]), int(found["mode"])
        except (KeyError, TypeError, ValueError):
            return None


class StateDirectory:
    """The quarantine and the daemons' records below one state directory."""

    def __init__(self, path: Path, identities: Identities) -> None:
        self.path = path
        self._identities = identities
        take_custody(path, (QUARANTINE, DAEMONS, EVENTS), identities)
        self.events = path / EVENTS
        self.retained = RetainedVersions(path / RETAINED)
        self._locks_fd = os.open(path / LOCKS, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.quarantine_fd = os.open(path / QUARANTINE, os.O_PATH | os.O_DIRECTORY)

    def acting(self) -> AbstractContextManager[None]:
        """A block in which this thread acts as whom the directory belongs to."""
        return self._identities.acting(SERVICE)

    def open_kept(self, path: Path) -> int:
        """A file in it, to be read; it can belong to who wrote it."""
        with self.acting():
            fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                return self._identities.as_owner(fd, reopen, fd, os.O_RDONLY)
            finally:
                os.close(fd)

    def cluster_id(self) -> tuple[str, str]:
        """What all nodes that use it call themselves together, and what is noted with it.  Raises OSError."""
        return agreed(self.path, secrets.token_hex(8), "")

    @contextmanager
    def name_lock(self, directory: int, name: bytes) -> Iterator[None]:
        """Keep all other daemons on this backing from publishing under a name of the directory with this st_ino.

        A byte range of one file, locked by open file description (fcntl(2), F_OFD_SETLK), so it ends with the daemon.
        Between nodes it is as good as the backing's fcntl locks.  Threads of this daemon exclude each other before
        they come here.  Raises OSError (EBUSY) when another holds it for `NAME_LOCK_SECONDS`.
        """
        key = xxhash.xxh3_64_intdigest(b"%d/%s" % (directory, name)) & LOCK_RANGE
        held = self._lock(key)
        try:
            yield
        finally:
            if held:
                fcntl.fcntl(self._locks_fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, key))

    def _lock(self, key: int) -> bool:
        deadline, pause = time.monotonic() + NAME_LOCK_SECONDS, LOCK_PAUSE_SECONDS
        while True:
            try:
                fcntl.fcntl(self._locks_fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, key))
                return True
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return False
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "another daemon holds the lock of the name")
            time.sleep(pause)
            pause = min(2 * pause, LOCK_PAUSES_SECONDS)

    def keep(
        self,
        fd: int,
        write_id: str,
        record: dict[str, Any],
        shown: tuple[int, bytes] | None,
        others: Iterable[Caller] = (),
    ) -> None:
        """Keep the inode of a refused draft: by rename of the name that shows it, by link, or by copy.

        In the end there is no such name any more.  Whoever this directory belongs to may have no right to it: then root
        removes it, one of `others`, or the owner of the directory or of the file.
        """
        name = write_id.encode()
        moved = self._moved(shown, name)
        if not moved and not self._linked(fd, name):
            record = {**record, COPIED_FROM: self._copy(fd, name)}
        self._write_record(write_id, record)
        if shown is not None and not moved:
            callers = root_or(others, (shown[0], fd))
            try:
                self._identities.call_first(callers, unlink, *shown)
            except FileNotFoundError:
                pass  # another node has removed it, with its directory
            except OSError as error:
                log.warning("the name of a file that is in quarantine stays: %r (%s)", shown[1], error)

    def _copy(self, fd: int, name: bytes) -> dict[str, int]:
        """A copy belongs to whom this directory does; returns what the file had."""
        status = os.fstat(fd)
        copy = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.quarantine_fd)
        try:
            copy_contents(fd, copy)
            copy_times(fd, copy)
            os.fsync(copy)
        finally:
            os.close(copy)
        return {"uid": status.st_uid, "gid": status.st_gid, "mode": stat.S_IMODE(status.st_mode)}

    def keep_leftover(self, directory: int, hidden: bytes, reason: str, others: Iterable[Caller] = ()) -> None:
        """Keep a hidden file of another daemon, or remove it when it holds nothing.

        As root, as one of `others`, who have rights to the directory, or as who owns it or the file.
        """
        as_owner = partial(self._identities.as_owner, others=others)
        inode = as_owner(directory, _find, directory, hidden)
        try:
            if not os.fstat(inode).st_size:
                as_owner(directory, unlink, directory, hidden)
                return
            fd = as_owner(inode, reopen, inode, os.O_RDONLY)
        finally:
            os.close(inode)
        try:
            write_id = secrets.token_hex(8)
            record = {"write_id": write_id, "name": os.fsdecode(hidden), "reason": reason}
            self.keep(fd, write_id, record, (directory, hidden), others)
        finally:
            os.close(fd)

    def _moved(self, shown: tuple[int, bytes] | None, name: bytes) -> bool:
        if shown is None:
            return False
        with suppress(OSError):
            os.rename(shown[1], name, src_dir_fd=shown[0], dst_dir_fd=self.quarantine_fd)
            return True
        return False

    def _linked(self, fd: int, name: bytes) -> bool:
        with suppress(OSError):
            link_inode(fd, self.quarantine_fd, name)
            return True
        return False

    def _write_record(self, write_id: str, record: dict[str, Any]) -> None:
        text = json.dumps({"version": RECORD_VERSION, "time": time.time(), **record}, indent=1)
        with open(self.path / QUARANTINE / f"{write_id}{RECORD_SUFFIX}", "x", encoding="ascii") as file:
            file.write(text + "\n")
        sync_directory(self.quarantine_fd)

    def kept(self) -> list[Kept]:
        """What is in quarantine, the oldest first.  Blocks."""
        entries = [self._kept(name) for name in self._kept_names()]
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.time)

    def _kept_names(self) -> list[str]:
        """The files in quarantine.  Directories, which others put anywhere (`@eaDir`, `.AppleDouble`), are none."""
        names = _file_names(self.path / QUARANTINE)
        return [name for name in names if not name.endswith(RECORD_SUFFIX)]

    def _kept(self, write_id: str) -> Kept | None:
        path = self.path / QUARANTINE / write_id
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None  # purged meanwhile
        record = _read_object(path.with_name(write_id + RECORD_SUFFIX))
        return Kept(write_id, path, status.st_size, _time_of(record, status.st_mtime), record)

    def purge(self, write_id: str) -> None:
        """Remove one file from quarantine, and its record after it."""
        for name in (write_id, write_id + RECORD_SUFFIX):
            (self.path / QUARANTINE / name).unlink(missing_ok=True)

    def prune(self, age_seconds: float, total_bytes: int) -> list[Kept]:
        """Remove what is older than this, and the oldest of what is more than this; 0: no limit.  Blocks."""
        entries, now = self.kept(), time.time()
        excess = sum(entry.size_bytes for entry in entries) - total_bytes if total_bytes else 0
        purged = []
        for entry in entries:
            if (age_seconds and now - entry.time > age_seconds) or excess > 0:
                self.purge(entry.write_id)
                excess -= entry.size_bytes
                purged.append(entry)
        return purged

    def prune_events(self, age_seconds: float) -> None:
        """Remove the events of daemons that have no record any more, once nothing was added for so long."""
        living = set(os.listdir(self.path / DAEMONS))
        for name in _file_names(self.events):
            path = self.events / name
            with suppress(FileNotFoundError):
                if name.partition(".")[0] not in living and time.time() - path.stat().st_mtime > age_seconds:
                    path.unlink()

    def count(self) -> int:
        """How many drafts are in quarantine."""
        return len(self._kept_names())


class DaemonRecord:
    """This daemon's record: who it is, that it lives, and where it makes hidden names.

    Other daemons read it when they look for what a dead one left (safefs/recovery.py).
    """

    def __init__(self, state: StateDirectory, node_id: str, sharing: Mapping[str, Any]) -> None:
        self.path = state.path / DAEMONS / node_id
        self.identity = self.path / IDENTITY
        self._identity = json.dumps({**host_identity(), SHARING: dict(sharing)}) + "\n"
        self._beats = 0
        self._beating = threading.Lock()
        self._noting = threading.Lock()  # apart from it: to make a note durable can take longer than a beat may wait
        self._noted: set[bytes] = set()
        self._journal = self._make()
        self.made = 1  # how many times: others, who took this daemon for dead, have removed what was there before
        self._is_over = False
        self.beat()

    def _make(self) -> int:
        """The record, and the descriptor of its journal."""
        self.path.mkdir(mode=0o700)
        self.identity.write_text(self._identity, encoding="ascii")
        return os.open(self.path / JOURNAL, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def beat(self) -> None:
        """Show other nodes that this daemon lives: they watch the content change, no clocks are compared.

        One that was frozen for so long that another has settled what it left gets a record again.
        """
        with self._beating:
            if self._is_over:
                return
            self._beats += 1
            try:
                self._show_beat()
            except FileNotFoundError:
                self._make_again()
                self._show_beat()

    def _show_beat(self) -> None:
        """A new file each time, which a client cannot have in its cache; in place where there is no space for one.

        All of one width, so that it takes no more room than the last one.
        """
        text = f"{self._beats:012}\n"
        try:
            self._replace(HEARTBEAT, text)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            try:
                fd = os.open(self.path / HEARTBEAT, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise error from None  # whether the record is gone with it the next beat will see
            try:
                os.pwrite(fd, text.encode("ascii"), 0)
            finally:
                os.close(fd)

    def _make_again(self) -> None:
        try:
            journal = self._make()
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)  # a half of it would pass for the whole at the next beat
            raise
        os.dup2(journal, self._journal, inheritable=False)  # others may be about to write to it
        os.close(journal)
        self.made += 1
        self._noted.clear()
        log.warning("others took this daemon for dead, and have settled what it left")

    def note_etcd(self, etcd: str) -> None:
        """Show other nodes in which etcd this daemon has its locks, by its id; empty: in none.

        An empty file and not none: a client that has looked for a name in vain may go on to find nothing there.
        """
        self._note(ETCD, etcd)

    def _note(self, name: str, text: str, *, durable: bool = False) -> None:
        """Put something beside the heartbeat; not behind `remove`, or it would be a record of its own."""
        with self._noting:
            if not self._is_over:
                self._replace(name, text, durable=durable)

    def _replace(self, name: str, text: str, *, durable: bool = False) -> None:
        temporary = self.path / f"{name}.new"
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(self.path / name)

    def has_noted(self, path: bytes) -> bool:
        """Whether a directory is on record.  Does not block."""
        return path in self._noted

    def note_directory(self, path: bytes, writer: Caller) -> None:
        """Before a hidden name in a directory: where a successor has to look, and who has rights there."""
        if path in self._noted:
            return
        self._append({"directory": os.fsdecode(path), WRITER: written_down(writer)})
        if len(self._noted) >= MAX_NOTED:
            self._noted.clear()
        self._noted.add(path)

    def note_partial(self, path: bytes, hidden: bytes, name: bytes, writer: Caller) -> None:
        """Before a partial file is renamed into a draft: where it belongs."""
        names = {"hidden": os.fsdecode(hidden), "name": os.fsdecode(name)}
        self._append({"directory": os.fsdecode(path), **names, WRITER: written_down(writer)})

    def write_soft_locks(self, data: dict[str, Any]) -> None:
        """Replace the list of lock files that go with this daemon, durably: others read it when this node is gone."""
        self._note(SOFT_LOCKS, json.dumps(data), durable=True)

    def _append(self, entry: dict[str, Any]) -> None:
        append_lines(self._journal, json.dumps(entry).encode("ascii") + b"\n")

    def remove(self) -> None:
        """An orderly end: nothing is left to find."""
        with self._noting, self._beating:
            self._is_over = True
        journal, self._journal = self._journal, -1  # the number can be another file's in a moment
        os.close(journal)
        replaced = (HEARTBEAT, SOFT_LOCKS, ETCD)
        for name in (*(f"{each}.new" for each in replaced), *replaced, JOURNAL, IDENTITY):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()
