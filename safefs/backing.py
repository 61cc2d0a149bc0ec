"""The only place that touches the backing filesystem.

`Backing.run` carries a plain function into a worker thread and, under a daemon of root's, lets the thread take on the
caller's fsuid, fsgid, supplementary groups and umask for the time of the call (safefs/identity.py): the backing decides
what he may do.  The functions below it are such functions; they take descriptors of directories and single names,
never paths, so that a directory that was renamed or replaced meanwhile cannot lead them elsewhere.  They block and
raise OSError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from safefs import model
from safefs.digest import PROVENANCE
from safefs.draft import Draft
from safefs.identity import REFUSED, SERVICE, Identities, root_or
from safefs.model import Caller, Identity
from safefs.native import native
from safefs.workers import Workers

T = TypeVar("T")

HIDDEN_PREFIX = b".safefs~"  # names that the mount never shows
STATE_NAME = model.STATE_NAME.encode()  # a name that the mount does not show at its root

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FICLONE = 0x40049409  # linux/fs.h
COPY_CHUNK_BYTES = 1 << 20
ProbeKey = tuple[Identity, int, int]  # directory, owner and group
MAX_PROBES = 32
NO_CEILING = (1 << 31) - 1
FREE_NUMBERS = 8
SPACE_BYTES = 1 << 17  # less than this is no space: a write of that size is what programs do
OTHER_FILESYSTEM = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)
POSIX_ACL = "system.posix_acl_access"
CAPABILITY = "security.capability"
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)  # open(2), O_TMPFILE
REOPENED_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NOATIME | os.O_SYNC | os.O_DSYNC


def proc_path(fd: int) -> bytes:
    """A path to the very inode of a descriptor, for the calls that have no variant for O_PATH descriptors."""
    return b"/proc/self/fd/%d" % fd


class Backing:
    """The backing directory, and the threads that work on it."""

    def __init__(
        self, root: Path, identities: Identities, *, max_threads: int, temp: str = "auto", ceiling: int = NO_CEILING
    ) -> None:
        self.root_path = os.fsencode(root)
        self.root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self.identities = identities
        self.ceiling = ceiling
        self.workers = Workers(max_threads)
        self.node_id = secrets.token_hex(4)
        self._tmpfile = temp != "hidden"
        self._root_dev = os.fstat(self.root_fd).st_dev
        self._nameless: set[int] = set()  # filesystems (st_dev) that have shown that O_TMPFILE works on them
        self._refusing: set[int] = set()  # those that have refused it, somewhere
        self._serial = 0
        self._probes_lock = threading.Lock()
        self._probes: dict[ProbeKey, int] = {}  # nameless inodes to ask for space with

    def require_room(self) -> None:
        """Raise ENFILE where nothing more may be opened for clients: what is left is for the daemon's own work.

        To close and publish files takes descriptors, too.  The kernel gives out the lowest numbers that are free
        (open(2)), and a descriptor that was closed for another a moment ago does not make room.
        """
        numbers: list[int] = []
        try:
            while len(numbers) < FREE_NUMBERS:
                numbers.append(os.dup(self.root_fd))
        finally:
            for fd in numbers:
                os.close(fd)
        if numbers[-1] >= self.ceiling:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    async def run(self, caller: Caller, function: Callable[..., T], *args: object) -> T:
        """Call `function(*args)` in a thread, as the caller."""
        return await self.workers.run(self._as_caller, caller, function, args)

    async def run_or_daemon(self, caller: Caller, function: Callable[..., T], *args: object, owned: int) -> T:
        """As the caller, and where the backing refuses him as the daemon itself, or as the owner of `owned`.

        For steps that the caller need not have the right to, because they stand for one that he had: replacing a file
        that he may write to in a directory that he may not.  A client of root's gets what the backing gives root.
        """
        if caller.uid == 0:
            return await self.run(caller, function, *args)
        return await self.workers.run(self._as_caller_or_daemon, caller, owned, function, args)

    async def run_or_caller(self, caller: Caller, function: Callable[..., T], *args: object, owned: int = -1) -> T:
        """As the daemon, and where the backing refuses root (root_squash) as the caller, or as the owner of `owned`."""
        return await self.workers.run(self._as_daemon_or_caller, caller, owned, function, args)

    async def run_for(self, draft: Draft, function: Callable[..., T], *args: object) -> T:
        """About a draft's private inode and its hidden name: as the daemon, or as whose they are (`call_for`)."""
        return await self.run_or_caller(draft.caller, function, *args, owned=draft.directory.fd)

    def call_for(self, draft: Draft, function: Callable[..., T], *args: object) -> T:
        """The same within a worker thread.

        A draft is its caller's, or the directory's owner's if the caller could make no file there.
        """
        return self.identities.call_first(root_or((draft.caller,), (draft.directory.fd,)), function, *args)

    def _as_caller(self, caller: Caller, function: Callable[..., T], args: tuple[object, ...]) -> T:
        native.private_umask(caller.umask)
        if caller.uid == 0 and caller.gid == 0 and caller is not SERVICE:  # which a thread of ours is to begin with
            return function(*args)
        return self.identities.call(caller, function, *args)

    def _as_caller_or_daemon(
        self, caller: Caller, owned: int, function: Callable[..., T], args: tuple[object, ...]
    ) -> T:
        native.private_umask(caller.umask)
        return self.identities.call_first(chain((caller,), root_or((), (owned,))), function, *args)

    def _as_daemon_or_caller(
        self, caller: Caller, owned: int, function: Callable[..., T], args: tuple[object, ...]
    ) -> T:
        native.private_umask(caller.umask)
        descriptors = () if owned < 0 else (owned,)
        return self.identities.call_first(root_or((caller,), descriptors), function, *args)

    def open_below(self, path: bytes, others: Iterable[Caller] = ()) -> int:
        """A directory below the root, by a path of which no component may be a symbolic link: users can make those.

        As the daemon itself, as one of `others`, or as the owners of the directories on the way.
        """
        as_owner = partial(self.identities.as_owner, others=others)
        fd = os.dup(self.root_fd)
        for component in path.split(b"/"):
            if component:
                try:
                    below: int = as_owner(fd, _find_directory, fd, component)
                finally:
                    os.close(fd)
                fd = below
        try:
            directory: int = as_owner(fd, open_directory, fd)
            return directory
        finally:
            os.close(fd)

    def hidden_name(self, kind: bytes) -> bytes:
        """A new hidden name of this daemon: what it is for, and whose leftover it would be."""
        self._serial += 1
        return b"%s%s~%s~%d" % (HIDDEN_PREFIX, self.node_id.encode(), kind, self._serial)

    @property
    def uses_tmpfile(self) -> bool:
        """Whether drafts on the filesystem of the root are O_TMPFILE inodes, as far as is known."""
        return self._tmpfile and self._root_dev not in self._refusing

    def is_nameless(self, directory: Identity) -> bool:
        """Whether drafts in a directory are known to be O_TMPFILE inodes: they leave nothing when the daemon dies."""
        return directory.dev in self._nameless and directory.dev not in self._refusing

    def _tries_tmpfile(self, directory: int) -> bool:
        """Each filesystem for itself: where one has shown that it works, nobody has put a hidden name on record.

        Which one it is costs a system call, and on shared filesystems a request: only where they differ it is asked.
        """
        if not self._tmpfile or not self._refusing:
            return self._tmpfile
        if self._root_dev in self._refusing and not self._nameless:
            return False
        return os.fstat(directory).st_dev not in self._refusing

    def make_temp(self, directory: int, mode: int, hidden: bytes) -> tuple[int, bytes | None, os.stat_result]:
        """A private inode in `directory`, open for reading and writing, and its hidden name where it needs one."""
        if self._tries_tmpfile(directory):
            try:
                fd = os.open(b".", os.O_TMPFILE | os.O_RDWR, mode, dir_fd=directory)
                status = os.fstat(fd)
                self._nameless.add(status.st_dev)
                return fd, None, status
            except OSError as error:
                if is_removed(directory):  # ext4 says EPERM then, others ENOENT
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
                if error.errno not in NO_TMPFILE:
                    raise
                self._refusing.add(os.fstat(directory).st_dev)
        fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, mode, dir_fd=directory)
        return fd, hidden, os.fstat(fd)

    def check_space(self, directory: int, owner: Caller, hidden: bytes) -> None:
        """Raise ENOSPC or EDQUOT where not even `SPACE_BYTES` more can be written: space or a quota is used up.

        Asked of the filesystem itself, by allocating in an inode of its own: one that somebody may write to at this
        moment cannot be given back its length.  Where fallocate(2) is not to be had only the free space is looked at.
        """
        key = (identity_of(os.fstat(directory)), owner.uid, owner.gid)
        with self._probes_lock:
            fd, name = self._probes.pop(key, -1), None
        if fd < 0:
            fd, name, _ = self.make_temp(directory, 0o600, hidden)
        try:
            native.fallocate(fd, 0, 0, SPACE_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = os.fstatvfs(fd)
            if free.f_bavail * free.f_frsize < SPACE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        finally:
            if name is None:
                self._keep_probe(key, fd)
            else:
                os.close(fd)
                unlink(directory, name)

    def _keep_probe(self, key: ProbeKey, fd: int) -> None:
        """For the next file of that owner there: ext4 is slow to find a new inode after many were deleted."""
        with suppress(OSError):
            os.ftruncate(fd, 0)
        with self._probes_lock:
            replaced = self._probes.pop(key, -1)  # of another thread
            oldest = self._probes.pop(next(iter(self._probes))) if len(self._probes) >= MAX_PROBES else -1
            self._probes[key] = fd
        for old in (replaced, oldest):
            if old >= 0:
                os.close(old)


# ------------------------------------------------------------------- names


def is_hidden(name: bytes) -> bool:
    return name.startswith(HIDDEN_PREFIX)


def find(directory: int, name: bytes) -> tuple[int, os.stat_result]:
    """An O_PATH descriptor of an entry, and its attributes."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
    try:
        return fd, os.fstat(fd)
    except BaseException:
        os.close(fd)
        raise


def find_refreshed(directory: int, name: bytes) -> tuple[int, os.stat_result]:
    """Like find, but a miss is believed only after the directory was read anew.

    NFS and others remember that a name was missing; opening the directory makes the client ask the server whether it
    changed (nfs(5), close-to-open), listing it replaces what was remembered on FUSE underlays.
    """
    try:
        return find(directory, name)
    except FileNotFoundError:
        if is_removed(directory):
            raise
    fd = open_directory(directory)
    try:
        os.fstat(fd)
        with os.scandir(fd) as entries:
            if not any(os.fsencode(entry.name) == name for entry in entries):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    finally:
        os.close(fd)
    return find(directory, name)


def is_removed(directory: int) -> bool:
    """Whether a directory has lost its name, here or on another node: clients of NFS and others remember attributes."""
    return native.link_count(directory) == 0


def identity_of(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino)


def is_mapped(fd: int) -> bool:
    """Whether somebody can still write to an inode that no descriptor is open on for writing: a shared mapping.

    A read lease is refused then (fcntl(2), F_SETLEASE).  Filesystems without leases say no.  `fd` is read-only.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def identity_at(directory: int, name: bytes) -> Identity | None:
    """Which inode a name shows, None when it shows nothing."""
    try:
        return identity_of(os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return None


def reopen(fd: int, flags: int) -> int:
    """Open the inode of a descriptor anew; permissions are checked."""
    return os.open(proc_path(fd), flags | os.O_CLOEXEC)


def reopen_current(fd: int, flags: int) -> int:
    """The same on a filesystem that others write to as well: what it shows is what they have left."""
    opened = reopen(fd, flags)
    make_current(opened)
    return opened


def make_current(fd: int) -> None:
    """Have the client of a shared filesystem forget what it remembers of a file that has just been opened.

    Clients in user space take attributes from the reply to fsync(2).  The kernel asks them and servers for attributes
    when it is forced to, and lets go of bytes when it is told that nobody needs them.
    """
    with suppress(OSError):
        os.fsync(fd)
    with suppress(OSError):
        native.link_count(fd)
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def open_anew(fd: int) -> None:
    """Put a new open of the same file in the place of a descriptor, which others may be reading and writing by."""
    fresh = reopen(fd, fcntl.fcntl(fd, fcntl.F_GETFL) & REOPENED_FLAGS)
    try:
        make_current(fresh)
        os.dup2(fresh, fd, inheritable=False)
    finally:
        os.close(fresh)


def send(fd: int) -> None:
    """Have a client send what was written: each close(2) of a descriptor does, and says whether it could."""
    os.close(os.dup(fd))


def create_in_place(
    directory: int, name: bytes, flags: int, mode: int, *, current: bool = False
) -> tuple[int, os.stat_result]:
    """open(2) with O_CREAT on the backing itself; `current`: others write to it as well."""
    fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=directory)
    if current and not flags & os.O_EXCL:
        make_current(fd)
    return fd, os.fstat(fd)


def make_directory(directory: int, name: bytes, mode: int) -> tuple[int, os.stat_result]:
    os.mkdir(name, mode, dir_fd=directory)
    return find(directory, name)


def make_node(directory: int, name: bytes, mode: int, device: int) -> tuple[int, os.stat_result]:
    os.mknod(name, mode, device, dir_fd=directory)
    return find(directory, name)


def make_symlink(directory: int, name: bytes, target: bytes) -> tuple[int, os.stat_result]:
    os.symlink(target, name, dir_fd=directory)
    return find(directory, name)


def link_inode(fd: int, directory: int, name: bytes) -> None:
    """Give the inode of a descriptor a further name; never replaces.

    Through /proc, because linkat(AT_EMPTY_PATH) wants CAP_DAC_READ_SEARCH, which a thread that acts as a user lacks.
    """
    native.linkat(AT_FDCWD, proc_path(fd), directory, name, AT_SYMLINK_FOLLOW)


def make_link(fd: int, directory: int, name: bytes) -> tuple[int, os.stat_result]:
    link_inode(fd, directory, name)
    return find(directory, name)


def rename(source: int, name: bytes, target: int, new_name: bytes, flags: int) -> None:
    """renameat2(2).

    A client of NFS says ETXTBSY, which rename(2) has no other use for, of one who has no right to it, where the file
    that would be replaced is open.
    """
    try:
        if flags:
            native.renameat2(source, name, target, new_name, flags)
        else:
            os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
    except OSError as error:
        if error.errno != errno.ETXTBSY:
            raise
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def unlink(directory: int, name: bytes) -> None:
    os.unlink(name, dir_fd=directory)


def hidden_entries(directory: int) -> list[bytes] | None:
    """The hidden names of a directory; None when it also has names that are not."""
    fd = open_directory(directory)
    try:
        names = [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)
    return names if all(map(is_hidden, names)) else None


def open_directory(directory: int) -> int:
    """A descriptor to read or sync a directory by, from an O_PATH one."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)


def _find_directory(directory: int, name: bytes) -> int:
    return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)


def sync_directory(directory: int) -> None:
    """Make the names of a directory durable (an O_PATH descriptor cannot be synced)."""
    fd = open_directory(directory)
    try:
        sync_open_directory(fd)
    finally:
        os.close(fd)


def sync_open_directory(fd: int) -> None:
    """fsync(2) of a directory; a filesystem whose directories need no sync says EINVAL."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def read_directory(fd: int, offset: int, size: int, state: bytes) -> bytes:
    """The answer to one READDIR, without hidden names and without the name `state`."""
    return native.read_directory(fd, offset, size, HIDDEN_PREFIX, state)


def path_below(root: bytes, fd: int) -> bytes:
    """Where a directory lies at this moment, relative to the root; OSError when it is too deep to say."""
    path = os.readlink(proc_path(fd))
    if path == root:
        return b""
    prefix = root.rstrip(b"/") + b"/"
    if not path.startswith(prefix):
        raise FileNotFoundError(errno.ENOENT, "not below the backing directory any more")
    return path[len(prefix) :]


# -------------------------------------------------------------- attributes


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """What a SETATTR asks for; None leaves a value as it is.  Times are (seconds, nanoseconds or UTIME_*).

    `strip_privileges` is carried out by the caller of change_attributes, with other rights.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime: tuple[int, int] | None = None
    mtime: tuple[int, int] | None = None
    strip_privileges: bool = False


UTIME_NOW = (0, (1 << 30) - 1)
UTIME_OMIT = (0, (1 << 30) - 2)


def change_attributes(fd: int, change: AttributeChange) -> None:
    """chmod, chown and utimensat of an inode, in the order in which the kernel itself applies them."""
    if change.uid is not None or change.gid is not None:
        keep = 0xFFFFFFFF
        native.fchown(fd, keep if change.uid is None else change.uid, keep if change.gid is None else change.gid)
    if change.mode is not None:
        os.chmod(proc_path(fd), stat.S_IMODE(change.mode))
    if change.atime is not None or change.mtime is not None:
        native.utimensat(proc_path(fd), *(change.atime or UTIME_OMIT), *(change.mtime or UTIME_OMIT))


def strip_privileges(fd: int) -> None:
    """What a write by somebody without CAP_FSETID does: no set-uid, no set-gid on executables, no capabilities."""
    mode = os.fstat(fd).st_mode
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    if kept != mode:
        os.chmod(proc_path(fd), stat.S_IMODE(kept))
    with suppress(OSError):
        os.removexattr(proc_path(fd), CAPABILITY)


def copy_metadata(source: int, target: int) -> None:
    """Give a draft its base's owner, mode, ACL and extended attributes."""
    have, want = os.fstat(target), os.fstat(source)
    if (have.st_uid, have.st_gid) != (want.st_uid, want.st_gid):
        # A root-squashing server refuses root: then the file belongs to whoever wrote it.
        with suppress(PermissionError):
            os.chown(target, want.st_uid, want.st_gid)
    with suppress(OSError):
        os.removexattr(target, POSIX_ACL)  # what it inherited from the directory's default ACL
    os.fchmod(target, stat.S_IMODE(want.st_mode))
    path = proc_path(source)
    try:
        names = os.listxattr(path)
    except OSError:
        return
    for name in names:
        # A write takes a capability away, whoever writes; what is known of the base is not true of the draft.
        if name == CAPABILITY or name.startswith(PROVENANCE):
            continue
        # A namespace that only root may write (trusted, security) stays behind for other daemons.
        with suppress(OSError):
            os.setxattr(target, name, os.getxattr(path, name))


def copy_times(source: int, target: int) -> None:
    status = os.fstat(source)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


# ---------------------------------------------------------------- contents


def copy_contents(source: int, target: int) -> None:
    """Fill an empty draft with its base: by reflink, else by reading and writing.

    Not by copy_file_range: pages that it leaves in the cache map at half the speed.  Who may read and write by these
    descriptors need not have the right to more: a server of NFS 4.2 asks for it anew at a reflink and a look for holes.
    """
    try:
        fcntl.ioctl(target, FICLONE, source)
        return
    except OSError as error:
        if error.errno not in (*OTHER_FILESYSTEM, *REFUSED):
            raise
    offset, end = 0, os.fstat(source).st_size
    while offset < end:
        # Holes stay holes.
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
            data_end = os.lseek(source, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            if error.errno not in (errno.EINVAL, *REFUSED):
                raise
            data_end = end
        while offset < data_end:
            chunk = os.pread(source, min(COPY_CHUNK_BYTES, data_end - offset), offset)
            if not chunk:
                data_end = end = offset
                break
            write_all(target, chunk, offset)
            offset += len(chunk)
    if os.fstat(target).st_size < end:
        os.ftruncate(target, end)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """pwrite that goes on after a short write, so that the next call names the error; returns what was written."""
    view, done = memoryview(data), 0
    while done < len(view):
        try:
            written = os.pwrite(fd, view[done:], offset + done)
        except OSError:
            if done:
                return done
            raise
        done += written
    return done


def append_lines(fd: int, lines: bytes) -> None:
    """Write behind the last line of a file that is open for reading too, with O_APPEND.

    OSError (ENOSPC) where they are not there as a whole; what comes next does not continue what was cut so.
    """
    size = os.fstat(fd).st_size
    is_cut = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
    data = b"\n" * is_cut + lines
    if os.write(fd, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def allocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)"""
    native.fallocate(fd, mode, offset, length)


def same_contents(one: int, other: int) -> bool:
    """Whether two files have the same bytes."""
    return os.fstat(one).st_size == os.fstat(other).st_size and starts_with(one, other)


def starts_with(one: int, other: int) -> bool:
    """Whether a file begins with all the bytes of another."""
    size = os.fstat(other).st_size
    if os.fstat(one).st_size < size:
        return False
    for offset in range(0, size, COPY_CHUNK_BYTES):
        length = min(COPY_CHUNK_BYTES, size - offset)
        if os.pread(one, length, offset) != os.pread(other, length, offset):
            return False
    return True


def read_full(fd: int, size: int, offset: int) -> bytes:
    """pread that goes on after a short read: to a FUSE client a short answer means end of file."""
    data = os.pread(fd, size, offset)
    if not data or len(data) == size:
        return data
    parts, have = [data], len(data)
    while have < size:
        more = os.pread(fd, size - have, offset + have)
        if not more:
            break
        parts.append(more)
        have += len(more)
    return b"".join(parts)


# ----------------------------------------------------------------- publish


def place(
    fd: int,
    temp_name: bytes | None,
    directory: int,
    target: int,
    name: bytes,
    *,
    replace: bool,
    hidden: bytes,
    require: Callable[[], None] = lambda: None,
) -> None:
    """Make `name` in `target` show the draft's inode, in one step that no reader can see half of.

    `directory` is where a draft with a `temp_name` lies.  `require` is called right before that step; what it raises is
    raised.  Raises FileExistsError where `replace` is false and the name is taken.
    """
    if temp_name is None:
        _place_nameless(fd, target, name, replace, hidden, require)
    elif replace:
        require()
        rename(directory, temp_name, target, name, 0)
    else:
        _place_without_replacing(fd, temp_name, directory, target, name, require)


def _place_nameless(
    fd: int, target: int, name: bytes, replace: bool, hidden: bytes, require: Callable[[], None]
) -> None:
    """linkat(2) never replaces: to do that an O_TMPFILE inode is linked as `hidden` first."""
    if not replace or identity_at(target, name) is None:
        try:
            require()
            link_inode(fd, target, name)
            return
        except FileExistsError:
            if not replace:
                raise
    link_inode(fd, target, hidden)
    try:
        require()
        rename(target, hidden, target, name, 0)
    except BaseException:
        with suppress(OSError):
            unlink(target, hidden)
        raise


def swap(fd: int, temp_name: bytes | None, directory: int, name: bytes, shown: Identity, hidden: bytes) -> bool:
    """Make `name` show the inode behind `fd` instead of `shown`; False where it shows something else, or nothing.

    RENAME_EXCHANGE brings out what the name showed in the very step that replaces it, so that another's publish or
    unlink between a look and that step is not undone.  Filesystems without it are left with the look.
    """
    if temp_name is None:
        link_inode(fd, directory, hidden)
        temp_name = hidden
    try:
        rename(directory, temp_name, directory, name, RENAME_EXCHANGE)
    except FileNotFoundError:
        unlink(directory, temp_name)
        return False
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            unlink(directory, temp_name)
            raise
        rename(directory, temp_name, directory, name, 0)
        return True
    swapped = identity_at(directory, temp_name) == shown
    if not swapped:
        rename(directory, temp_name, directory, name, RENAME_EXCHANGE)
    unlink(directory, temp_name)
    return swapped


def _place_without_replacing(
    fd: int, temp_name: bytes, directory: int, target: int, name: bytes, require: Callable[[], None] = lambda: None
) -> None:
    try:
        require()
        rename(directory, temp_name, target, name, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # link(2) never replaces either.  NFS can say EEXIST of its own repeated request: the inode tells.
        try:
            require()
            os.link(temp_name, name, src_dir_fd=directory, dst_dir_fd=target, follow_symlinks=False)
        except FileExistsError:
            if identity_at(target, name) != identity_of(os.fstat(fd)):
                raise
        unlink(directory, temp_name)


def give_back(directory: int, hidden: bytes, name: bytes) -> None:
    """Give a file that was renamed to a hidden name its own again.  FileExistsError where that was taken meanwhile."""
    fd = os.open(hidden, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        _place_without_replacing(fd, hidden, directory, directory, name)
    finally:
        os.close(fd)


def put_back(directory: int, hidden: bytes, name: bytes) -> None:
    """The same; where the name was taken the file is removed, as it is where one that has its name is replaced."""
    try:
        give_back(directory, hidden, name)
    except FileExistsError:
        unlink(directory, hidden)


def take_over(base: int, identity: Identity, directory: int, name: bytes, hidden: bytes) -> int | None:
    """Rename a partial file into a draft: a descriptor to write it with, or None when the name shows another."""
    if identity_at(directory, name) != identity:
        return None
    try:
        rename(directory, name, directory, hidden, 0)
    except FileNotFoundError:
        return None  # another has taken it over since the look
    if identity_at(directory, hidden) != identity:
        # Somebody published between the look and the rename: his file goes back where it was.
        put_back(directory, hidden, name)
        return None
    return reopen(base, os.O_RDWR)
