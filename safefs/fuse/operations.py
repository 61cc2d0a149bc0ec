"""Translation between FUSE requests and the file system, and the one error boundary.

An exception that is no FUSEError ends pyfuse3's main loop, and with it the mount for everybody.  So every handler
goes through `translated`: OSError and SafefsError become their errno, anything else is logged and becomes EIO.

Requests that pyfuse3 does not know, or does not tell enough about, arrive as `on_*` calls of the C extension.  These
run synchronously when the request is received, which is what the order of publishes rests on.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from safefs.backing import UTIME_NOW, AttributeChange
from safefs.closing import Closing
from safefs.draft import Draft
from safefs.errors import SafefsError
from safefs.files import Files, Opened
from safefs.filesystem import Entry, FileSystem, Handle
from safefs.fuse.mount import forget_pages
from safefs.inplace import InPlace
from safefs.locking import Asked, Locking, Wanted, flock_lock, record_lock
from safefs.model import Caller
from safefs.native import native
from safefs.tree import Tree

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# libfuse's to_set bits of a SETATTR (fuse_lowlevel.h).
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
SET_ATIME_NOW, SET_MTIME_NOW = 1 << 7, 1 << 8

BLOCK_BYTES = 4096
MAX_ERRNO = 511  # the kernel takes no reply with a larger one (fs/fuse/dev.c), and its request would never end
ENOTSUPP = 524  # Linux's own, which NFS clients let out
MAX_INVALIDATIONS = 8  # threads that wait for the kernel
# How long who unlocks or closes waits until that is on a record that nodes share, and since he got a signal: what has
# been asked for stays so, and nobody else has the lock before.
UNLOCK_SECONDS, INTERRUPTED_SECONDS = 30.0, 2.0


def error_number(error: BaseException, operation: str) -> int:
    """The errno that a client gets for an exception."""
    if isinstance(error, (OSError, SafefsError)):
        number = error.errno or errno.EIO
        if number > MAX_ERRNO:
            return errno.EOPNOTSUPP if number == ENOTSUPP else errno.EIO
        return number
    log.error("a defect in safefs, in %s; the client gets EIO", operation, exc_info=error)
    return errno.EIO


def translated(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """The error boundary of handlers that pyfuse3 calls."""

    @wraps(handler)
    async def bounded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: whatever left would end the mount
            raise pyfuse3.FUSEError(error_number(error, handler.__name__)) from None

    return bounded


def caller_of(context: pyfuse3.RequestContext | native.Request) -> Caller:
    return Caller(context.uid, context.gid, context.pid, context.umask)


def attributes_of(entry: Entry) -> pyfuse3.EntryAttributes:
    """pyfuse3's form of an entry; the C extension takes the st_ino from `generation`."""
    status, shown = entry.status, pyfuse3.EntryAttributes()
    shown.st_ino = pyfuse3.InodeT(entry.nodeid)
    shown.generation = entry.ino
    shown.entry_timeout = entry.entry_seconds
    shown.attr_timeout = entry.attr_seconds
    shown.st_mode = pyfuse3.ModeT(status.st_mode)
    shown.st_nlink = entry.nlink
    shown.st_uid = status.st_uid
    shown.st_gid = status.st_gid
    shown.st_rdev = status.st_rdev
    shown.st_size = status.st_size
    shown.st_blksize = status.st_blksize or BLOCK_BYTES
    shown.st_blocks = status.st_blocks
    shown.st_atime_ns = status.st_atime_ns
    shown.st_mtime_ns = status.st_mtime_ns
    shown.st_ctime_ns = status.st_ctime_ns
    return shown


def reply_attributes(request: native.Request, entry: Entry) -> None:
    status = entry.status
    request.reply_attr(
        entry.ino,
        status.st_mode,
        entry.nlink,
        status.st_uid,
        status.st_gid,
        status.st_rdev,
        status.st_size,
        status.st_blksize or BLOCK_BYTES,
        status.st_blocks,
        status.st_atime_ns,
        status.st_mtime_ns,
        status.st_ctime_ns,
        entry.attr_seconds,
    )


def file_info(opened: Opened) -> pyfuse3.FileInfo:
    handle = opened.handle
    number = handle.number
    name = handle.node.name if handle.draft is None else handle.draft.name
    # Files that are locked as a rule need every FLUSH, and others where the end of record locks can depend on it.
    hears = opened.direct_io or handle.node.linked or native.hears_closes(name)
    if not handle.writable and not hears:
        number |= native.FH_NOFLUSH
    if handle.backing_id:
        number |= native.FH_PASSTHROUGH | handle.backing_id << native.FH_BACKING_SHIFT
    return pyfuse3.FileInfo(
        fh=pyfuse3.FileHandleT(number),
        direct_io=opened.direct_io,
        keep_cache=opened.keep_cache and not opened.direct_io,
    )


class Operations(pyfuse3.Operations):
    """The request handlers of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False  # asked for by the INIT handover, where the backing has ACLs

    def __init__(
        self,
        filesystem: FileSystem,
        tree: Tree,
        files: Files,
        in_place: InPlace,
        closing: Closing,
        locking: Locking,
        nursery: trio.Nursery,
    ) -> None:
        super().__init__()
        self._fs = filesystem
        self._tree = tree
        self._files = files
        self._in_place = in_place
        self._closing = closing
        self._locking = locking
        self._nursery = nursery
        self._invalidations = trio.CapacityLimiter(MAX_INVALIDATIONS)

    # -------------------------------------------------------------- names

    @translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return attributes_of(await self._tree.lookup(parent_inode, name, caller_of(ctx)))

    @translated
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        await self._fs.forget(inode_list)

    @translated
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._tree.readlink(inode, caller_of(ctx))

    @translated
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return attributes_of(await self._tree.mknod(parent_inode, name, mode, rdev, caller_of(ctx)))

    @translated
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return attributes_of(await self._tree.mkdir(parent_inode, name, mode, caller_of(ctx)))

    @translated
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._tree.unlink(parent_inode, name, caller_of(ctx))

    @translated
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._tree.rmdir(parent_inode, name, caller_of(ctx))

    @translated
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return attributes_of(await self._tree.symlink(parent_inode, name, target, caller_of(ctx)))

    @translated
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        await self._tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, caller_of(ctx))

    @translated
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return attributes_of(await self._tree.link(inode, new_parent_inode, new_name, caller_of(ctx)))

    @translated
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return await self._tree.access(inode, mode, caller_of(ctx))

    @translated
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status, shown = await self._tree.statfs(caller_of(ctx)), pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            setattr(shown, f"f_{name}", getattr(status, f"f_{name}"))
        return shown

    # -------------------------------------------------------- directories

    @translated
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return await self._tree.opendir(inode, caller_of(ctx))

    @translated
    async def releasedir(self, fh: int) -> None:
        await self._tree.releasedir(fh)

    @translated
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._tree.fsyncdir(fh)

    # ----------------------------------------------------------- contents

    @translated
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return file_info(await self._files.open(inode, flags, caller_of(ctx)))

    @translated
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        opened, entry = await self._files.create(parent_inode, name, mode, flags, caller_of(ctx))
        return file_info(opened), attributes_of(entry)

    @translated
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._files.read(fh, off, size)

    @translated
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._files.write(fh, off, buf)

    @translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._files.fsync(fh, datasync)

    # -------------------------------------------------------------- xattrs

    @translated
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._tree.getxattr(inode, name, caller_of(ctx))

    @translated
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return await self._tree.listxattr(inode, caller_of(ctx))

    @translated
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._tree.removexattr(inode, name, caller_of(ctx))

    # ----------------------------------------- requests of the C extension

    def _start(self, request: native.Request, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        self._nursery.start_soon(self._finish, request, work, arguments)

    async def _finish(
        self, request: native.Request, work: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]
    ) -> None:
        try:
            await work(request, *arguments)
        except Exception as error:  # noqa: BLE001 - the same boundary, for requests of the C extension
            number = error_number(error, work.__name__)
            if not request.answered:
                request.reply_err(number)

    def on_getattr(self, request: native.Request, nodeid: int, number: int, with_handle: int) -> None:
        self._start(request, self._getattr, nodeid)

    async def _getattr(self, request: native.Request, nodeid: int) -> None:
        reply_attributes(request, await self._tree.getattr(nodeid))

    def on_setattr(
        self,
        request: native.Request,
        nodeid: int,
        valid: int,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        atime: int,
        atime_ns: int,
        mtime: int,
        mtime_ns: int,
        number: int,
        with_handle: int,
    ) -> None:
        change = AttributeChange(
            mode=mode if valid & SET_MODE else None,
            uid=uid if valid & SET_UID else None,
            gid=gid if valid & SET_GID else None,
            atime=UTIME_NOW if valid & SET_ATIME_NOW else (atime, atime_ns) if valid & SET_ATIME else None,
            mtime=UTIME_NOW if valid & SET_MTIME_NOW else (mtime, mtime_ns) if valid & SET_MTIME else None,
            # With FUSE_HANDLE_KILLPRIV_V2 a SETATTR of nothing asks for the set-id bits to go (fs/fuse/dir.c).
            strip_privileges=not valid or bool(valid & SET_SIZE and request.uid),
        )
        new_size = size if valid & SET_SIZE else None
        self._start(request, self._setattr, nodeid, change, new_size, number if with_handle else None)

    async def _setattr(
        self, request: native.Request, nodeid: int, change: AttributeChange, size: int | None, number: int | None
    ) -> None:
        caller, node = caller_of(request), self._fs.node(nodeid)
        if size is not None:
            await self._files.set_size(node, size, number, caller)
        if size is None or change != AttributeChange(strip_privileges=change.strip_privileges):
            await self._files.change_attributes(node, change, caller)
        reply_attributes(request, await self._tree.getattr(nodeid))

    def on_flush(self, request: native.Request, nodeid: int, number: int, owner: int) -> None:
        handle = self._fs.handles.get(number)
        if handle is not None and handle.draft is not None and handle.writable:
            self._start(request, self._flush, nodeid, handle, owner)
        elif self._fs.is_lost(number) if handle is None else self._fs.is_fenced(handle):
            self._locking.flushed(nodeid, owner)  # what was locked after that
            request.reply_err(errno.EIO)
        elif handle is not None and handle.in_place and (handle.error or self._in_place.unsent(number)):
            self._start(request, self._flush_in_place, nodeid, number, owner)
        elif writes := self._locking.writes_through(nodeid, owner):
            self._start(request, self._await_unlocked_close, self._hand_over(nodeid, writes, owner, request.pid))
        elif unlocking := self._locking.flushed(nodeid, owner):
            self._start(request, self._await_unlocked_close, unlocking)
        else:
            request.reply_err(0)

    def _hand_over(self, nodeid: int, handles: Sequence[Handle], owner: int, tid: int) -> list[trio.Event]:
        """A close comes before the publish of what was written under locks; what to wait for."""
        unlocking = list[trio.Event]()
        for close in self._locking.flushed_unpublished(nodeid, handles, owner, tid):
            unlocking += close.ending.estate.recorded
            self._nursery.start_soon(self._locking.end_unless_released, close)
        return unlocking

    async def _flush(self, request: native.Request, nodeid: int, handle: Handle, owner: int) -> None:
        unlocking = list[trio.Event]()
        with self._fs.closers.waits(request.pid):
            try:
                await self._closing.flush(handle, request.pid)
            finally:  # whoever gets the lock sees what was written under it
                if handle.draft is not None and handle.draft.unpublished:
                    others = (each for each in self._locking.writes_through(nodeid, owner) if each is not handle)
                    unlocking = self._hand_over(nodeid, [handle, *others], owner, request.pid)
                else:
                    unlocking = self._locking.flushed(nodeid, owner)
            await self._await_unlocking(request, unlocking)

    async def _flush_in_place(self, request: native.Request, nodeid: int, number: int, owner: int) -> None:
        with self._fs.closers.waits(request.pid):
            await self._in_place.send(self._in_place.unsent(number))
            await self._await_record(request, self._locking.flushed(nodeid, owner))
            self._in_place.require_sent(number)
            request.reply_err(0)

    async def _await_unlocked_close(self, request: native.Request, unlocking: Sequence[trio.Event]) -> None:
        with self._fs.closers.waits(request.pid):
            await self._await_unlocking(request, unlocking)

    async def _await_unlocking(self, request: native.Request, unlocking: Sequence[trio.Event]) -> None:
        await self._await_record(request, unlocking)
        request.reply_err(0)

    @staticmethod
    async def _await_record(request: native.Request, unlocking: Sequence[trio.Event]) -> None:
        """Not for ever: a record that cannot be read would keep a process that was killed."""
        with trio.move_on_after(UNLOCK_SECONDS) as scope:

            def interrupt() -> None:
                scope.deadline = min(scope.deadline, trio.current_time() + INTERRUPTED_SECONDS)

            if unlocking:
                request.await_interrupt(interrupt)
            for event in unlocking:
                await event.wait()

    def on_release(self, request: native.Request, nodeid: int, number: int) -> None:
        request.reply_err(0)
        handle = self._fs.handles.get(number)
        if number & native.FH_HOT:  # something is locked through it, or every thread of the C extension is busy
            self._locking.released(number)
            native.hot_release(nodeid, number)
        elif handle is not None:
            publishing = self._closing.begin_release(handle)
            if handle.draft is not None:
                self._start(request, self._release, handle, handle.draft, publishing)

    async def _release(self, request: native.Request, handle: Handle, draft: Draft, publishing: Any) -> None:
        await self._closing.release(handle, draft, publishing)

    def on_getlk(
        self, request: native.Request, nodeid: int, number: int, owner: int, kind: int, start: int, length: int
    ) -> None:
        self._start(request, self._getlk, record_lock(nodeid, number, owner, kind, start, length))

    async def _getlk(self, request: native.Request, wanted: Wanted) -> None:
        settling, asking, found = trio.CancelScope(), trio.CancelScope(), None

        def interrupt() -> None:
            settling.cancel()
            asking.cancel()

        request.await_interrupt(interrupt)
        with settling:  # who is interrupted is told of the lock that is about to end
            await self._locking.settled(wanted, request.pid)
        with asking:  # other nodes, where the name is not this one's
            found = await self._locking.conflict(wanted)
        if found is None:
            request.reply_err(errno.EINTR)
        else:
            request.reply_lock(*found)

    def on_setlk(
        self,
        request: native.Request,
        nodeid: int,
        number: int,
        owner: int,
        kind: int,
        start: int,
        length: int,
        pid: int,
        may_wait: int,
    ) -> None:
        wanted = record_lock(nodeid, number, owner, kind, start, length, pid, may_wait=bool(may_wait))
        self._lock(request, wanted)

    def on_flock(self, request: native.Request, nodeid: int, number: int, owner: int, operation: int) -> None:
        self._lock(request, flock_lock(nodeid, number, owner, operation, request.pid))

    def _lock(self, request: native.Request, wanted: Wanted) -> None:
        """At once where that is possible, so that lock requests are answered in the order of the kernel's queue."""
        if wanted.mode is not None and self._locking.may_settle():
            self._start(request, self._wait_for_lock, wanted)
            return
        try:
            self._ask(request, wanted)
        except Exception as error:  # noqa: BLE001 - the same boundary, for what is answered at once
            request.reply_err(error_number(error, "lock"))

    def _ask(self, request: native.Request, wanted: Wanted) -> None:
        if wanted.mode is None:
            self._unlock(request, wanted)
            return
        asked = self._locking.ask(wanted, wanted.mode)
        if asked is not None:
            self._start(request, self._wait_for_lock, wanted, asked)
        elif self._files.may_lag(wanted.handle):
            self._start(request, self._locked, wanted.handle)
        else:
            request.reply_err(0)

    def _unlock(self, request: native.Request, wanted: Wanted) -> None:
        unsent = self._in_place.unsent(wanted.handle)
        if unsent:
            self._start(request, self._send_and_unlock, unsent, wanted)
        elif unlocking := self._locking.unlock(wanted):
            self._start(request, self._await_unlocking, unlocking)
        else:
            request.reply_err(0)

    async def _send_and_unlock(self, request: native.Request, unsent: list[Handle], wanted: Wanted) -> None:
        await self._in_place.send(unsent)
        await self._await_unlocking(request, self._locking.unlock(wanted))

    async def _wait_for_lock(self, request: native.Request, wanted: Wanted, asked: Asked = None) -> None:
        """For what came of asking; None: it has to be asked for first, once that can be done."""
        waiting, held = None, False
        with trio.CancelScope() as scope:
            request.await_interrupt(scope.cancel)
            if asked is None and wanted.mode is not None:
                await self._locking.settled(wanted, request.pid)
                asked = self._locking.ask(wanted, wanted.mode)
            if isinstance(asked, float):
                asked = await self._locking.lock_in_turn(wanted, asked)
            waiting = asked
            if waiting is not None:
                await self._locking.wait(waiting, request.pid)
            held = True
        if waiting is not None and waiting.held and waiting.elsewhere:
            await self._in_place.look_anew(wanted.handle)
        if held or (waiting is not None and waiting.held):  # perhaps at the moment when it was interrupted
            await self._locked(request, wanted.handle)
        else:
            # Of a try that was not made yet nobody knows what came of it; the kernel makes it again (SA_RESTART).
            request.reply_err(errno.EINTR if wanted.may_wait or asked is None else errno.EAGAIN)

    async def _locked(self, request: native.Request, number: int) -> None:
        """A lock is held: what is read under it is what was written under it before."""
        changed = await self._files.catch_up(number)
        if changed:
            await trio.to_thread.run_sync(forget_pages, changed, abandon_on_cancel=True, limiter=self._invalidations)
        request.reply_err(0)

    def on_readdir(self, request: native.Request, nodeid: int, number: int, offset: int, size: int) -> None:
        self._start(request, self._readdir, nodeid, number, offset, size)

    async def _readdir(self, request: native.Request, nodeid: int, number: int, offset: int, size: int) -> None:
        request.reply_buffer(await self._tree.readdir(nodeid, number, offset, size))

    def on_setxattr(self, request: native.Request, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        self._start(request, self._setxattr, nodeid, name, value, flags)

    async def _setxattr(self, request: native.Request, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        await self._tree.setxattr(nodeid, name, value, flags, caller_of(request))
        request.reply_err(0)

    def on_fallocate(self, request: native.Request, number: int, mode: int, offset: int, length: int) -> None:
        self._start(request, self._fallocate, number, mode, offset, length)

    async def _fallocate(self, request: native.Request, number: int, mode: int, offset: int, length: int) -> None:
        await self._files.fallocate(number, mode, offset, length)
        request.reply_err(0)

    def on_lseek(self, request: native.Request, number: int, offset: int, whence: int) -> None:
        self._start(request, self._lseek, number, offset, whence)

    async def _lseek(self, request: native.Request, number: int, offset: int, whence: int) -> None:
        request.reply_offset(await self._files.lseek(number, offset, whence))

    def on_copy_file_range(
        self,
        request: native.Request,
        source: int,
        source_offset: int,
        target: int,
        target_offset: int,
        length: int,
        flags: int,
    ) -> None:
        self._start(request, self._copy_file_range, source, source_offset, target, target_offset, length)

    async def _copy_file_range(
        self, request: native.Request, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> None:
        request.reply_count(await self._files.copy_file_range(source, source_offset, target, target_offset, length))
