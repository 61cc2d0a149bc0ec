"""A shared filesystem as bad as the real ones: one process of this for each node, all on one directory.

    python -m tests.underlay.filesystem SOURCE MOUNTPOINT [--negative SECONDS] [--attr SECONDS] [--listing SECONDS]
        [--estale] [--short N] [--keep] [--numbers] [--squash] [--late DIRECTORY]
        [--nameless]

- flock and fcntl locks succeed for everybody and exclude nobody on another node: the kernel keeps them for each mount,
  as Lustre does with -o localflock;
- a name that was missing stays missing for `negative` seconds, as on NFS; size and times that another node changes show
  `attr` seconds later;
- what a directory had is listed for `listing` seconds, unless this node changes it, as on sshfs;
- with `keep` the kernel goes on showing what it has read of a file, also to who opens it anew, as on Gluster;
- a read of a file whose st_ino is the name of a file in the directory `late` is answered, with what was there when it
  came, once that file, whose name ends in `.read` from then on, is removed;
- with `numbers` each node has inode numbers of its own, as on sshfs;
- a file that lost its name cannot be read any more (ESTALE), as on Gluster;
- a write takes at most `short` bytes;
- root is nobody (`squash`), as on servers that do not trust the roots of their clients: what he asks for is done, or
  refused, with the rights of nobody, and what he makes is nobody's;
- with `nameless` it does not say what it is (type `fuse`), as some clients of object stores;
- what was not synced is gone when the power fails: on SIGUSR2 every file that was written to after its last fsync is
  filled with zeros, on all nodes, and the process ends.

Made to be short, not to be quick.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import secrets
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import pyfuse3
import trio

LIBC = ctypes.CDLL(None, use_errno=True)
RENAME = LIBC.renameat2
NOBODY = 65534


def proc(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def handled(method: Callable[..., Any]) -> Callable[..., Any]:
    """OSError becomes its errno; what root asks for is done as nobody where he is squashed.

    No handler that acts for root gives its turn away, so that one identity is in force from its beginning to its end.
    """

    @wraps(method)
    async def wrapper(self: Underlay, *args: Any, **kwargs: Any) -> Any:
        squashed = self.is_squashed(args[-1] if args else None)
        try:
            if squashed:
                act_as(NOBODY)
            return await method(self, *args, **kwargs)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        finally:
            if squashed:
                act_as(0)

    return wrapper


def act_as(number: int) -> None:
    """Have the filesystem take this thread for another, who has no rights but his own, and is in no groups."""
    LIBC.setfsgid(number)
    LIBC.setfsuid(number)


class Underlay(pyfuse3.Operations):
    """A node is known by its st_ino, which is the same everywhere; its O_PATH descriptor stays open to the end."""

    enable_writeback_cache = False

    def __init__(
        self,
        source: Path,
        *,
        negative_seconds: float,
        attr_seconds: float,
        listing_seconds: float,
        estale: bool,
        short_bytes: int,
        keep: bool,
        numbers: bool,
        squash: bool,
        late: Path | None,
    ) -> None:
        super().__init__()
        self._late = late
        self._squash = squash
        self._attr = attr_seconds
        self._listing, self._keep = listing_seconds, keep
        self._mask = secrets.randbelow(1 << 40) if numbers else 0  # between st_ino here and on the disk
        self._listed: dict[int, tuple[float, list[bytes]]] = {}  # by node: until when, and what
        self._negative, self._estale, self._short = negative_seconds, estale, short_bytes
        self._nodes = {pyfuse3.ROOT_INODE: os.open(source, os.O_PATH | os.O_DIRECTORY)}
        self._unsynced: set[int] = set()  # nodes
        self._opened: dict[int, int] = {}  # descriptor → node
        self._listings: dict[int, list[bytes]] = {}

    def is_squashed(self, ctx: object) -> bool:
        """Whether a request with this context is root's; those about open files have none, and need no rights."""
        return self._squash and isinstance(ctx, pyfuse3.RequestContext) and ctx.uid == 0

    def lose_power(self) -> None:
        for node in self._unsynced:
            with open(proc(self._nodes[node]), "r+b") as file:
                file.write(bytes(os.fstat(file.fileno()).st_size))

    # ------------------------------------------------------------- entries

    def _attributes(self, number: int) -> pyfuse3.EntryAttributes:
        status, shown = os.fstat(self._nodes[number]), pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blocks"):
            setattr(shown, name, getattr(status, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(shown, name, getattr(status, name))
        shown.st_ino = pyfuse3.InodeT(number)
        shown.entry_timeout, shown.attr_timeout = 0, self._attr
        return shown

    def _found(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._nodes[parent])
        number = os.fstat(fd).st_ino ^ self._mask
        if number in self._nodes:
            os.close(fd)
        else:
            self._nodes[number] = fd
        return self._attributes(number)

    def _changes(self, parent: int) -> int:
        """The descriptor of a directory that this node changes: it is listed anew from then on."""
        self._listed.pop(parent, None)
        return self._nodes[parent]

    def _made(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if not self.is_squashed(ctx):
            inherits = os.fstat(self._nodes[parent]).st_mode & stat.S_ISGID
            gid = -1 if inherits else ctx.gid
            os.chown(name, ctx.uid, gid, dir_fd=self._nodes[parent], follow_symlinks=False)
        return self._found(parent, name)

    @handled
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        try:
            return self._found(parent_inode, name)
        except FileNotFoundError:
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = pyfuse3.InodeT(0)
            missing.entry_timeout = self._negative
            return missing

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    @handled
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @handled
    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        path = proc(self._nodes[inode])
        if fields.update_size:
            os.truncate(path, attr.st_size)
            self._unsynced.add(inode)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            os.chown(path, attr.st_uid if fields.update_uid else -1, attr.st_gid if fields.update_gid else -1)
        if fields.update_atime or fields.update_mtime:
            status = os.stat(path)
            atime = attr.st_atime_ns if fields.update_atime else status.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else status.st_mtime_ns
            os.utime(path, ns=(atime, mtime))
        return self._attributes(inode)

    # --------------------------------------------------------------- names

    @handled
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return os.readlink(b"", dir_fd=self._nodes[inode])

    @handled
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        os.mkdir(name, mode & ~ctx.umask, dir_fd=self._changes(parent_inode))
        return self._made(parent_inode, name, ctx)

    @handled
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        os.symlink(target, name, dir_fd=self._changes(parent_inode))
        return self._made(parent_inode, name, ctx)

    @handled
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        os.link(proc(self._nodes[inode]), new_name, dst_dir_fd=self._changes(new_parent_inode), follow_symlinks=True)
        return self._found(new_parent_inode, new_name)

    @handled
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        os.unlink(name, dir_fd=self._changes(parent_inode))

    @handled
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        os.rmdir(name, dir_fd=self._changes(parent_inode))

    @handled
    async def rename(
        self, old_id: int, name: bytes, new_id: int, new_name: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        if RENAME(self._changes(old_id), name, self._changes(new_id), new_name, flags) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    # ---------------------------------------------------------------- files

    def _open(self, number: int, flags: int) -> pyfuse3.FileInfo:
        fd = os.open(proc(self._nodes[number]), flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND))
        self._opened[fd] = number
        if flags & os.O_TRUNC:
            self._unsynced.add(number)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fd), keep_cache=self._keep)

    @handled
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return self._open(inode, flags)

    @handled
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        made = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(name, made, mode & ~ctx.umask, dir_fd=self._changes(parent_inode)))
        entry = self._made(parent_inode, name, ctx)
        return self._open(entry.st_ino, flags), entry

    @handled
    async def read(self, fh: int, off: int, size: int) -> bytes:
        if self._estale and os.fstat(fh).st_nlink == 0:
            raise OSError(errno.ESTALE, "it has no name any more")
        data = os.pread(fh, size, off)
        while self._is_late(str(self._opened[fh])):  # noqa: ASYNC110 - a test says when, in another process
            await trio.sleep(0.01)
        return data

    def _is_late(self, name: str) -> bool:
        if self._late is None:
            return False
        with suppress(FileNotFoundError):
            os.rename(self._late / name, self._late / f"{name}.read")
        return (self._late / f"{name}.read").exists()

    @handled
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._unsynced.add(self._opened[fh])
        return os.pwrite(fh, buf[: self._short] if self._short else buf, off)

    @handled
    async def fsync(self, fh: int, datasync: bool) -> None:
        self._unsynced.discard(self._opened[fh])

    async def flush(self, fh: int) -> None:
        pass

    @handled
    async def release(self, fh: int) -> None:
        self._opened.pop(fh)
        os.close(fh)

    # ---------------------------------------------------------- directories

    @handled
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        fd = os.open(proc(self._nodes[inode]), os.O_RDONLY | os.O_DIRECTORY)
        self._opened[fd] = inode
        return fd

    @handled
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        if start_id == 0:
            self._listings[fh] = self._list(self._opened[fh], fh)
        for number, name in enumerate(self._listings[fh][start_id:], start_id + 1):
            try:
                entry = self._found(self._opened[fh], name)
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, name, entry, number):
                return

    def _list(self, node: int, fh: int) -> list[bytes]:
        until, names = self._listed.get(node, (0.0, []))
        if time.monotonic() > until:
            names = sorted(map(os.fsencode, os.listdir(fh)))
            self._listed[node] = time.monotonic() + self._listing, names
        return names

    @handled
    async def releasedir(self, fh: int) -> None:
        self._opened.pop(fh)
        self._listings.pop(fh, None)
        os.close(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        pass

    # ----------------------------------------------------------------- rest

    @handled
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status, shown = os.fstatvfs(self._nodes[pyfuse3.ROOT_INODE]), pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(shown, f"f_{name}", getattr(status, f"f_{name}"))
        return shown

    @handled
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        os.setxattr(proc(self._nodes[inode]), name, value)

    @handled
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return os.getxattr(proc(self._nodes[inode]), name)

    @handled
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return [os.fsencode(name) for name in os.listxattr(proc(self._nodes[inode]))]

    @handled
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        os.removexattr(proc(self._nodes[inode]), name)

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True


async def serve(filesystem: Underlay) -> None:
    async def watch() -> None:
        with trio.open_signal_receiver(signal.SIGUSR2, signal.SIGTERM) as signals:
            async for number in signals:
                if number == signal.SIGUSR2:
                    filesystem.lose_power()
                    os._exit(0)
                pyfuse3.terminate()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--negative", type=float, default=30)
    parser.add_argument("--attr", type=float, default=3)
    parser.add_argument("--listing", type=float, default=0)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--numbers", action="store_true")
    parser.add_argument("--estale", action="store_true")
    parser.add_argument("--short", type=int, default=0)
    parser.add_argument("--squash", action="store_true")
    parser.add_argument("--late", type=Path)
    parser.add_argument("--nameless", action="store_true")
    options = parser.parse_args()
    os.umask(0)
    os.setgroups([])
    filesystem = Underlay(
        options.source,
        negative_seconds=options.negative,
        attr_seconds=options.attr,
        listing_seconds=options.listing,
        estale=options.estale,
        short_bytes=options.short,
        keep=options.keep,
        numbers=options.numbers,
        squash=options.squash,
        late=options.late,
    )
    settings = {*pyfuse3.default_options, "fsname=underlay", "allow_other", "default_permissions"}
    if not options.nameless:
        settings.add("subtype=underlay")
    pyfuse3.init(filesystem, os.fspath(options.mountpoint), settings)
    try:
        trio.run(serve, filesystem)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    sys.exit(main())
