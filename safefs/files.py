"""Operations on the contents of files: open, create, read, write, and what they do to drafts."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from safefs import backing, processes
from safefs.backing import DAEMON, AttributeChange
from safefs.draft import Base, Draft, DraftEvent, DraftState
from safefs.filesystem import Entry, FileSystem, Handle, failure
from safefs.gate import Gate
from safefs.model import Caller, Process
from safefs.namespace import Node, Ticket
from safefs.publisher import PrivateInode, drop_inode
from safefs.rules import NameClass

FMODE_EXEC = 0x20  # include/linux/fs.h: the open is for execve


@dataclass(slots=True)
class Opened:
    """What the kernel is told about a new handle."""

    handle: Handle
    keep_cache: bool = False
    direct_io: bool = False


def wants_write(flags: int) -> bool:
    return bool(flags & os.O_ACCMODE) or bool(flags & os.O_TRUNC)


@dataclass(frozen=True, slots=True)
class VersionOrder:
    """One open of a version for reading, as the worker thread gets it."""

    parent: int
    name: bytes
    node: int
    flags: int
    check: bool  # whether its name still shows it
    register: Callable[[int], int] | None  # for a backing id


def open_version(order: VersionOrder) -> tuple[int, os.stat_result, int] | None:
    """Open a version for reading; None when its name shows another one by now."""
    if order.check and backing.identity_at(order.parent, order.name) != backing.identity_of(os.fstat(order.node)):
        return None
    fd = backing.reopen(order.node, order.flags)
    return fd, os.fstat(fd), order.register(fd) if order.register else 0


class Files:
    """Open files and drafts of one mount."""

    def __init__(self, filesystem: FileSystem) -> None:
        self.fs = filesystem

    # --------------------------------------------------------------- open

    async def open(self, nodeid: int, flags: int, caller: Caller) -> Opened:
        fs = self.fs
        node = fs.node(nodeid)
        if node.draft is not None and (node.draft.visible_to_family or node.draft.discarded):
            return await self._open_draft(node.draft, flags, caller)
        parent = fs.nodes.get(node.parent)
        if parent is not None:
            await fs.ordering.wait_name(parent, node.name)
        name_class = fs.classify(parent, node.name).name_class if parent else NameClass.PRIVATE
        if name_class.in_place:
            return await self._open_in_place(node, flags, caller)
        if wants_write(flags):
            raise self._redirect_writer(node, caller)
        return await self._open_version(node, parent, flags, caller)

    def _redirect_writer(self, node: Node, caller: Caller) -> OSError:
        """A version is never written to: the kernel is sent through the path again, to find a draft there."""
        fs = self.fs
        if not fs.accepting:
            return failure(errno.ESHUTDOWN)
        ticket = fs.tickets.take(caller.pid) if caller.pid else None
        fs.end_ticket(ticket)
        if caller.pid and (ticket is None or ticket.walked or ticket.nodeid != node.nodeid):
            return fs.redirect(node, caller, write=True)
        # The same thread came back without a walk: a magic link (/proc/self/fd/N), which has no name to publish.
        return failure(errno.ETXTBSY)

    async def _open_version(self, node: Node, parent: Node | None, flags: int, caller: Caller) -> Opened:
        fs = self.fs
        returning = fs.tickets.take(caller.pid) if caller.pid else None
        fs.end_ticket(returning)
        check = not (returning and returning.answers(node)) and caller.pid != 0 and parent is not None
        if check and node.doubtful_until > time.monotonic():
            raise fs.redirect(node, caller, write=False)  # which of its names is opened cannot be told
        run = fs.backing.run_or_daemon if flags & FMODE_EXEC else fs.backing.run
        flags &= os.O_NOATIME | os.O_NONBLOCK  # the kernel's side of O_DIRECT is its own affair
        where = parent if parent is not None else node
        register = fs.passthrough.register if fs.wants_backing_id(node) else None
        async with fs.pinned(node, where):
            order = VersionOrder(where.fd, node.name, node.fd, flags, check, register)
            opened = await run(caller, open_version, order)
        if opened is None:
            raise fs.redirect(node, caller, write=False)
        fd, status, candidate = opened
        unchanged = fs.seen(node, status)
        handle = fs.add_handle(node, fd, caller, writable=False, backing_id=candidate)
        return Opened(handle, keep_cache=unchanged)

    async def _open_in_place(self, node: Node, flags: int, caller: Caller) -> Opened:
        fs = self.fs
        if wants_write(flags) and not fs.accepting:
            raise failure(errno.ESHUTDOWN)
        kept = flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_NOATIME | os.O_SYNC | os.O_DSYNC)
        async with fs.pinned(node):
            fd = await fs.backing.run(caller, backing.reopen, node.fd, kept)
        candidate = await fs.backing_id(node, fd, caller)
        handle = fs.add_handle(node, fd, caller, writable=bool(flags & os.O_ACCMODE), backing_id=candidate)
        return Opened(handle, direct_io=True)

    async def _open_draft(self, draft: Draft, flags: int, caller: Caller) -> Opened:
        fs = self.fs
        fs.end_ticket(fs.tickets.take(caller.pid))
        writable = wants_write(flags)
        draft.handles += 1
        draft.writers += writable
        try:
            if flags & os.O_TRUNC:
                await self._truncate(draft, 0)
            process = await fs.identify(caller.pid) if writable else None
            candidate = await self._pass_draft_through(draft, caller) if writable else 0
        except BaseException:
            draft.handles -= 1
            draft.writers -= writable
            raise
        handle = fs.add_handle(draft.node, -1, caller, writable=writable, backing_id=candidate)
        handle.draft = draft
        handle.opener_tgid = process.tgid if process else 0
        if handle.backing_id and writable:  # from now on the daemon sees nothing of what is written
            draft.unseen = draft.modified = True
            draft.mappable = draft.mappable or flags & os.O_ACCMODE == os.O_RDWR
        return Opened(handle, keep_cache=True)

    async def _pass_draft_through(self, draft: Draft, caller: Caller) -> int:
        """A backing id for one more writer of a draft; 0 while its content is still to be copied."""
        fs, node = self.fs, draft.node
        if not (fs.wants_backing_id(node) or fs.passes_through(node)):
            return 0
        async with draft.gate.passing():
            ready = await self._private_for_kernel(draft)
            return await fs.backing_id(node, draft.fd, caller) if ready else 0

    async def _private_for_kernel(self, draft: Draft) -> bool:
        """Whether the private inode has the draft's content, and nobody else sees it."""
        async with draft.gate.preparing:
            if draft.unseen:
                await self.fs.publisher.detach(draft)
            elif not draft.prepared and draft.name_class is NameClass.PARTIAL and draft.base is not None:
                # Taken over it has no name any more: from here on it has to be published, written to or not.
                draft.prepared = draft.modified = await self._take_over(draft, draft.base)
                draft.size = os.fstat(self.fs.content_fd(draft)).st_size
            return draft.prepared and draft.state in (DraftState.WRITING, DraftState.DISCARDED)

    # ------------------------------------------------------------- create

    async def create(
        self, directory_id: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Opened, Entry]:
        fs = self.fs
        directory = fs.node(directory_id)
        if backing.is_hidden(name) or (directory is fs.root and name == backing.STATE_NAME):
            raise failure(errno.EPERM)
        if not fs.accepting:
            raise failure(errno.ESHUTDOWN)
        fs.end_ticket(fs.tickets.take(caller.pid))
        await fs.wait_turn(caller)
        await fs.ordering.wait_name(directory, name)
        async with fs.pinned(directory):
            if fs.classify(directory, name).name_class.in_place or not flags & os.O_ACCMODE:
                return await self._create_in_place(directory, name, mode, flags, caller)
            return await self._create_draft(directory, name, mode, flags, caller)

    async def _create_in_place(
        self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Opened, Entry]:
        fs = self.fs
        if flags & os.O_EXCL and fs.drafts.claims(directory, name):
            raise failure(errno.EEXIST)
        in_place = fs.classify(directory, name).name_class.in_place
        kept = flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_EXCL)
        fd, status = await fs.backing.run(caller, backing.create_in_place, directory.fd, name, kept, mode & 0o7777)
        path_fd = os.open(backing.proc_path(fd), os.O_PATH)
        node = fs.intern(path_fd, status, directory, name)
        node.lookups += 1
        candidate = await fs.backing_id(node, fd, caller)
        handle = fs.add_handle(node, fd, caller, writable=bool(flags & os.O_ACCMODE), backing_id=candidate)
        opened = Opened(handle, keep_cache=not in_place, direct_io=in_place)
        return opened, fs.entry(node, status)

    async def _create_draft(
        self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Opened, Entry]:
        fs = self.fs
        exclusive = bool(flags & os.O_EXCL)
        if exclusive and fs.drafts.claims(directory, name):
            raise failure(errno.EEXIST)
        existing = await fs.backing.run(caller, self._existing, directory.fd, name)
        if existing is not None and (exclusive or not stat.S_ISREG(existing.st_mode)):
            # ESTALE: what is not a regular file appeared a moment ago; a new walk of the path will find it.
            raise failure(errno.EEXIST if exclusive else errno.ESTALE)
        if existing is not None:
            draft = await self.stage(directory, name, caller)
            opened = await self._open_draft(draft, flags, caller)
        else:
            draft = await self._stage_new(directory, name, mode, caller, exclusive)
            opened = await self._open_draft(draft, flags & ~os.O_TRUNC, caller)
        draft.node.lookups += 1
        return opened, fs.draft_entry(draft, os.fstat(fs.content_fd(draft)))

    @staticmethod
    def _existing(directory: int, name: bytes) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    async def _stage_new(self, directory: Node, name: bytes, mode: int, caller: Caller, exclusive: bool) -> Draft:
        staged = await self._make_temp(directory, mode & 0o7777, caller)
        if exclusive and self.fs.drafts.claims(directory, name):  # claimed while the temp was made
            await self.fs.backing.run(DAEMON, drop_inode, directory.fd, staged)
            raise failure(errno.EEXIST)
        draft = await self._new_draft(directory, name, caller, staged)
        draft.created = draft.fresh = draft.prepared = draft.modified = True
        draft.exclusive = exclusive
        return draft

    async def _make_temp(self, directory: Node, mode: int, caller: Caller, *, replaces: bool = False) -> PrivateInode:
        fs = self.fs
        if not fs.backing.uses_tmpfile:
            await fs.publisher.note_directory(directory)
        run = fs.backing.run_or_daemon if replaces else fs.backing.run
        hidden = fs.backing.hidden_name(b"d")
        fd, temp_name, _ = await run(caller, fs.backing.make_temp, directory.fd, mode, hidden)
        return PrivateInode(fd, temp_name)

    async def _new_draft(
        self, directory: Node, name: bytes, caller: Caller, staged: PrivateInode, base: Base | None = None
    ) -> Draft:
        fs = self.fs
        status = os.fstat(staged.fd)
        node = fs.nodes.create(backing.identity_of(status), status.st_mode, shown=False)
        node.parent, node.name = directory.nodeid, name
        draft = Draft(
            write_id=secrets.token_hex(8),
            node=node,
            directory=directory,
            name=name,
            name_class=fs.classify(directory, name).name_class,
            caller=caller,
            opener=None,
            pidfd=-1,
            fd=staged.fd,
            temp_name=staged.temp_name,
            shown_ino=base.identity.ino if base else status.st_ino,
            gate=Gate(),
            base=base,
        )
        fs.list_draft(draft)
        found = await fs.look(self._introduce, caller.pid)
        if found is not None:
            draft.opener, draft.pidfd = found
        return draft

    @staticmethod
    def _introduce(tid: int) -> tuple[Process, int] | None:
        process = processes.identify(tid)
        return (process, processes.open_pidfd(process.tgid)) if process else None

    async def stage(self, directory: Node, name: bytes, caller: Caller) -> Draft:
        """A draft on top of the version that a name shows; `directory` is pinned by the caller.

        Nothing is copied yet: reads go to the version until the first write.
        """
        fs = self.fs
        base_fd, status = await fs.backing.run_or_daemon(caller, self._open_base, directory.fd, name)
        base = Base(base_fd, backing.identity_of(status))
        try:
            staged = await self._make_temp(directory, 0o600, caller, replaces=True)
        except BaseException:
            os.close(base_fd)
            raise
        draft = await self._new_draft(directory, name, caller, staged, base)
        draft.size = status.st_size
        draft.node.mode = status.st_mode
        return draft

    @staticmethod
    def _open_base(directory: int, name: bytes) -> tuple[int, os.stat_result]:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        return fd, os.fstat(fd)

    # ------------------------------------------------------ read and write

    async def read(self, number: int, offset: int, size: int) -> bytes:
        async with self.fs.readable(self.fs.handle(number)) as fd:
            return await self.fs.backing.run(DAEMON, backing.read_full, fd, size, offset)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        handle = self.fs.handle(number)
        draft = handle.draft
        if draft is None:
            return await self.fs.backing.run(handle.caller, backing.write_all, handle.fd, data, offset)
        async with draft.gate.passing():
            await self._prepare(draft)
            try:
                written = await self.fs.backing.run(DAEMON, backing.write_all, draft.fd, data, offset)
            except OSError as error:
                draft.error = draft.error or error.errno or errno.EIO
                raise
            draft.size = max(draft.size, offset + written)
            return written

    async def _prepare(self, draft: Draft, *, fresh: bool = False) -> None:
        """Make the private inode ready for a change; `fresh` when its base's content is not wanted."""
        async with draft.gate.preparing:
            if draft.state is DraftState.QUARANTINED:
                raise failure(draft.error or errno.EIO)
            if draft.state is DraftState.PUBLISHED:
                await self._next_round(draft)
            if not draft.prepared:
                await self._fill(draft, fresh=fresh)
                draft.prepared = True
            if not draft.modified and draft.caller.uid != 0:
                await self.fs.backing.run(DAEMON, backing.strip_privileges, draft.fd)
            draft.modified, draft.flushed = True, False

    async def _next_round(self, draft: Draft) -> None:
        """A descriptor outlived the publish and is used again: on top of what was published, in a new inode."""
        if draft.unseen:
            await self.fs.publisher.detach(draft)
            return
        staged = await self._make_temp(draft.directory, 0o600, draft.caller, replaces=True)
        draft.fd, draft.temp_name = staged.fd, staged.temp_name  # what was published is the base now
        draft.write_id = secrets.token_hex(8)
        draft.prepared = False
        draft.move(DraftEvent.WRITTEN)

    async def _fill(self, draft: Draft, *, fresh: bool) -> None:
        base = draft.base
        if base is None:
            return
        if not fresh and draft.name_class is NameClass.PARTIAL and await self._take_over(draft, base):
            return
        await self.fs.backing.run_or_caller(draft.caller, self._fill_from_base, draft, base, fresh)
        if draft.name_class is NameClass.PARTIAL:
            draft.fresh = True  # a download of its own from here on, which no other's progress can conflict with
        draft.size = 0 if fresh else os.fstat(draft.fd).st_size

    @staticmethod
    def _fill_from_base(draft: Draft, base: Base, fresh: bool) -> None:
        if not fresh:
            backing.copy_contents(base.fd, draft.fd)
        backing.copy_metadata(base.fd, draft.fd)

    async def _take_over(self, draft: Draft, base: Base) -> bool:
        """Rename a partial file into the draft instead of copying it: a download goes on where it stopped."""
        fs = self.fs
        hidden = fs.backing.hidden_name(b"p")
        fd = await fs.backing.run_or_daemon(draft.caller, self._take_over_file, draft, base, hidden)
        if fd is None:
            return False
        draft.spare_fds += [draft.fd, base.fd]
        old_temp, draft.temp_name = draft.temp_name, hidden
        if old_temp is not None:
            await fs.backing.run(DAEMON, backing.unlink, draft.directory.fd, old_temp)
        draft.fd, draft.base, draft.fresh = fd, None, True
        return True

    def _take_over_file(self, draft: Draft, base: Base, hidden: bytes) -> int | None:
        self.fs.publisher.note_partial(draft.directory.fd, hidden, draft.name)
        return backing.take_over(base.fd, base.identity, draft.directory.fd, draft.name, hidden)

    async def _truncate(self, draft: Draft, size: int) -> None:
        async with draft.gate.passing():
            modified = draft.modified
            await self._prepare(draft, fresh=size == 0)
            try:
                await self.fs.backing.run(DAEMON, os.ftruncate, draft.fd, size)
            except OSError:
                draft.modified = modified  # EFBIG and the like: nothing has changed
                raise
            draft.size = size
            if size == 0:
                draft.fresh = True

    async def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        handle = self.fs.handle(number)
        draft = handle.draft
        if draft is None:
            await self.fs.backing.run(handle.caller, backing.allocate, handle.fd, mode, offset, length)
            return
        async with draft.gate.passing():
            await self._prepare(draft)
            await self.fs.backing.run(DAEMON, backing.allocate, draft.fd, mode, offset, length)
            draft.size = os.fstat(draft.fd).st_size

    async def lseek(self, number: int, offset: int, whence: int) -> int:
        async with self.fs.readable(self.fs.handle(number)) as fd:
            return await self.fs.backing.run(DAEMON, os.lseek, fd, offset, whence)

    async def copy_file_range(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> int:
        fs = self.fs
        reading, writing = fs.handle(source), fs.handle(target)
        draft = writing.draft
        if draft is None:
            async with fs.readable(reading) as fd_in:
                return await fs.backing.run(
                    writing.caller, os.copy_file_range, fd_in, writing.fd, length, source_offset, target_offset
                )
        async with draft.gate.passing():
            await self._prepare(draft)
            async with fs.readable(reading) as fd_in:
                count = await fs.backing.run(
                    DAEMON, os.copy_file_range, fd_in, draft.fd, length, source_offset, target_offset
                )
            draft.size = max(draft.size, target_offset + count)
            return count

    async def fsync(self, number: int, datasync: bool) -> None:
        async with self.fs.readable(self.fs.handle(number)) as fd:
            await self.fs.backing.run(DAEMON, os.fdatasync if datasync else os.fsync, fd)

    # --------------------------------------------------------- attributes

    async def set_size(self, node: Node, size: int, number: int | None, caller: Caller) -> None:
        """The size part of SETATTR: ftruncate(2) with a handle, truncate(2) without."""
        fs = self.fs
        if node.draft is not None:
            await self._truncate_draft(node.draft, size, number is not None, caller)
        elif number is not None and fs.handle(number).draft is None:
            handle = fs.handle(number)
            await fs.backing.run(caller, os.ftruncate, handle.fd, size)
        else:
            parent = fs.nodes.get(node.parent)
            if parent is None or not fs.classify(parent, node.name).name_class.in_place:
                raise self._redirect_writer(node, caller)
            async with fs.pinned(node):
                await fs.backing.run(caller, os.truncate, backing.proc_path(node.fd), size)

    async def _truncate_draft(self, draft: Draft, size: int, by_handle: bool, caller: Caller) -> None:
        fs = self.fs
        async with fs.held(draft):
            fs.end_ticket(fs.tickets.take(caller.pid))
            await self._truncate(draft, size)
            if not by_handle and not draft.writers:
                await fs.publish(draft)

    async def change_attributes(self, node: Node, change: AttributeChange, caller: Caller) -> None:
        """chmod, chown and utimens; before the first write they are meant for the version."""
        async with self.fs.attributed(node) as descriptors:
            draft = node.draft
            if draft is not None and draft.fd not in descriptors:
                # The first write will strip the draft; the version stays as it is.
                change = replace(change, strip_privileges=False)
            for fd in descriptors:
                await self._change(fd, change, caller)

    async def _change(self, fd: int, change: AttributeChange, caller: Caller) -> None:
        if change.strip_privileges:
            # The kernel asks for it on behalf of a writer, who need not own the file.
            await self.fs.backing.run(DAEMON, backing.strip_privileges, fd)
        await self.fs.backing.run(caller, backing.change_attributes, fd, change)

    async def draft_for_ticket(self, directory: Node, name: bytes, caller: Caller, ticket: Ticket) -> Draft:
        """The draft that a redirected open finds under its name; kept for it until its OPEN comes."""
        draft = await self.stage(directory, name, caller)
        self.reserve(draft, ticket)
        return draft

    @staticmethod
    def reserve(draft: Draft, ticket: Ticket) -> None:
        if ticket.draft is not draft:
            if ticket.draft is not None:
                ticket.draft.reserved -= 1
            draft.reserved += 1
            ticket.draft = draft
