"""Operations on the contents of files: open, create, read, write, and what they do to drafts."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from safefs import backing, processes
from safefs.backing import AttributeChange
from safefs.digest import Written
from safefs.draft import Base, Draft, DraftEvent, DraftState
from safefs.filesystem import Entry, FileSystem, Handle, failure
from safefs.gate import Gate, KeyedLocks
from safefs.identity import DAEMON
from safefs.model import Caller, Process
from safefs.namespace import Node, Ticket
from safefs.native import native
from safefs.placing import PrivateInode, write_draft, write_gathered
from safefs.rules import NameClass
from safefs.softlocks import Maker, introduce_maker

SMALL_BYTES, GATHERED_BYTES = 1 << 16, 1 << 18  # of writes that are gathered, and of what is gathered
MAX_GATHERING = 256  # drafts; with more their writes go through
# Right after CREATE the kernel checks permissions, and asks for the attributes again if it may not keep them till then.
OPENING_SECONDS = 0.01
CREATE_ATTEMPTS = 10  # of one open(2) with O_CREAT, whose name comes and goes
FMODE_EXEC = 0x20  # include/linux/fs.h: the open is for execve


T = TypeVar("T")


class WithdrawnError(Exception):
    """A permission to change a file does not stand any more."""


def _if_permitted(permit: Callable[[], bool], function: Callable[..., T], *arguments: object) -> T:
    if not permit():
        raise WithdrawnError
    return function(*arguments)


@dataclass(slots=True)
class Opened:
    """What the kernel is told about a new handle."""

    handle: Handle
    keep_cache: bool = False
    direct_io: bool = False


@dataclass(frozen=True, slots=True)
class Staged:
    """What a draft begins with, as one worker thread has made it."""

    inode: PrivateInode
    status: os.stat_result  # of that inode
    shown: os.stat_result  # of what its family sees: the base, if there is one
    opener: tuple[Process | None, int]  # and a pidfd, -1 where it cannot be had
    base: Base | None = None
    backing_id: int = 0


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
        self._staging = KeyedLocks()  # names for which a draft is being made

    # --------------------------------------------------------------- open

    async def open(self, nodeid: int, flags: int, caller: Caller) -> Opened:
        fs = self.fs
        node = fs.node(nodeid)
        if node.draft is not None and (node.draft.visible_to_family or node.draft.discarded):
            return await self._open_draft(node.draft, flags, caller)
        number, name = fs.opened_by(node, caller)
        parent = fs.nodes.get(number)
        if parent is not None:
            await fs.ordering.wait_name(parent, name)
        name_class = fs.classify(parent, name).name_class if parent else NameClass.PRIVATE
        if name_class.in_place:
            return await self._open_in_place(node, flags, caller)
        if wants_write(flags):
            raise await self._redirect_writer(node, caller)
        return await self._open_version(node, parent, name, flags, caller)

    async def _redirect_writer(self, node: Node, caller: Caller) -> OSError:
        """A version is never written to: the kernel is sent through the path again, to find a draft there."""
        if not self.fs.accepting:
            return failure(errno.ESHUTDOWN)
        return await self._redirect(node, caller, write=True)

    async def _redirect(self, node: Node, caller: Caller, *, write: bool) -> OSError:
        fs = self.fs
        ticket = fs.tickets.take(caller.pid) if caller.pid else None
        await fs.end_ticket(ticket)
        if caller.pid and (ticket is None or ticket.walked or ticket.nodeid != node.nodeid):
            return fs.redirect(node, caller, write=write)
        # The same thread came back without a walk: a magic link (/proc/self/fd/N), which has no name to publish.
        return failure(errno.ETXTBSY)

    async def _open_version(self, node: Node, parent: Node | None, name: bytes, flags: int, caller: Caller) -> Opened:
        fs = self.fs
        returning = fs.tickets.take(caller.pid) if caller.pid else None
        await fs.end_ticket(returning)
        check = not (returning and returning.answers(node)) and caller.pid != 0 and parent is not None
        if check and node.doubtful_until > time.monotonic():
            raise fs.redirect(node, caller, write=False)  # which of its names is opened cannot be told
        fs.backing.require_room()
        execute = flags & FMODE_EXEC
        flags &= os.O_NOATIME | os.O_NONBLOCK  # the kernel's side of O_DIRECT is its own affair
        where = parent if parent is not None else node
        register = fs.passthrough.register if fs.wants_backing_id(node) else None
        async with fs.pinned(node, where):
            order = VersionOrder(where.fd, name, node.fd, flags, check, register)
            if execute:
                opened = await fs.backing.run_or_daemon(caller, open_version, order, owned=node.fd)
            else:
                opened = await fs.backing.run(caller, open_version, order)
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
        if fs.can_lose_locks and fs.passes_through(node):
            # It was opened by a name of another class.  What the kernel writes by itself nobody could stop, so from now
            # on its name shows another node.
            fs.nodes.hide(node)
            raise await self._redirect(node, caller, write=False)
        fs.backing.require_room()
        kept = flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_NOATIME | os.O_SYNC | os.O_DSYNC)
        async with fs.pinned(node):
            open_it = backing.reopen_current if fs.is_shared else backing.reopen
            fd = await fs.backing.run(caller, open_it, node.fd, kept)
        candidate = await self._backing_id_in_place(node, fd, caller)
        handle = fs.add_handle(node, fd, caller, writable=bool(flags & os.O_ACCMODE), backing_id=candidate)
        handle.in_place = True
        return Opened(handle, direct_io=True)

    async def _backing_id_in_place(self, node: Node, fd: int, caller: Caller) -> int:
        """0 where locks can be lost: what the kernel writes by itself nobody could stop then."""
        return 0 if self.fs.can_lose_locks else await self.fs.backing_id(node, fd, caller)

    async def _open_draft(self, draft: Draft, flags: int, caller: Caller, candidate: int = 0) -> Opened:
        fs = self.fs
        writable = wants_write(flags)
        if writable and flags & os.O_APPEND:
            draft.appends = True
        elif writable:
            draft.append_only = False
        draft.handles += 1
        draft.writers += writable
        try:
            await fs.end_ticket(fs.tickets.take(caller.pid))
            if flags & os.O_TRUNC:
                await self._truncate(draft, 0)
            process = await self._process_of(draft, caller) if writable else None
            if writable and not candidate:
                candidate = await self._pass_draft_through(draft, caller)
        except BaseException:
            draft.handles -= 1
            draft.writers -= writable
            await fs.end_draft_soon(draft)
            raise
        handle = fs.add_handle(draft.node, -1, caller, writable=writable, backing_id=candidate)
        handle.draft = draft
        handle.opener_tgid = process.tgid if process else 0
        if draft.prepared and not draft.may_have_capability:
            native.opens_set_bare(draft.node.nodeid, True)
        if handle.backing_id and writable:  # from now on the daemon sees nothing of what is written
            draft.unseen = draft.modified = True
            draft.mappable = draft.mappable or flags & os.O_ACCMODE == os.O_RDWR
        return Opened(handle, keep_cache=True)

    async def _process_of(self, draft: Draft, caller: Caller) -> Process | None:
        """Whose the new handle is; of the thread that made the draft a moment ago it is known."""
        first = draft.handles == 1 and draft.caller.pid == caller.pid
        return draft.opener if first else await self.fs.identify(caller.pid)

    async def _pass_draft_through(self, draft: Draft, caller: Caller) -> int:
        """A backing id for one more writer of a draft; 0 while its content is still to be copied."""
        fs, node = self.fs, draft.node
        if not (fs.wants_backing_id(node) or fs.passes_through(node)):
            return 0
        async with draft.gate.passing():
            await fs.write_out(draft)
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
        await fs.end_ticket(fs.tickets.take(caller.pid))
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
        fs.backing.require_room()
        name_class = fs.classify(directory, name).name_class
        in_place = name_class.in_place
        kept = flags & (os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_EXCL)
        make = self._make_lock if flags & os.O_EXCL and name_class is NameClass.LOCK else self._make_in_place
        fd, status, maker = await fs.backing.run(caller, make, directory.fd, name, kept, mode & 0o7777, caller.pid)
        if maker is not None:
            fs.soft_locks.made(directory.identity, name, maker, fs.policy(directory, name).stale)
        path_fd = os.open(backing.proc_path(fd), os.O_PATH)
        node = fs.intern(path_fd, status, directory, name)
        fs.walked(node, directory, name, caller)
        node.lookups += 1
        candidate = await (self._backing_id_in_place if in_place else fs.backing_id)(node, fd, caller)
        handle = fs.add_handle(node, fd, caller, writable=bool(flags & os.O_ACCMODE), backing_id=candidate)
        handle.in_place = in_place
        opened = Opened(handle, keep_cache=not in_place, direct_io=in_place)
        return opened, fs.entry(node, status)

    def _make_in_place(
        self, directory: int, name: bytes, flags: int, mode: int, _tid: int
    ) -> tuple[int, os.stat_result, Maker | None]:
        return *backing.create_in_place(directory, name, flags, mode, current=self.fs.is_shared), None

    @staticmethod
    def _make_lock(
        directory: int, name: bytes, flags: int, mode: int, tid: int
    ) -> tuple[int, os.stat_result, Maker | None]:
        fd, status = backing.create_in_place(directory, name, flags, mode)
        return fd, status, introduce_maker(directory, fd, tid)

    async def _create_draft(
        self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Opened, Entry]:
        fs = self.fs
        if not flags & os.O_EXCL:
            draft, opened = await self._create_or_open(directory, name, mode, flags, caller)
        else:
            claim = await fs.claim(directory, name)
            try:
                draft, opened = await self._create_or_open(directory, name, mode, flags, caller)
                draft.exclusive, draft.claim = True, claim
            except BaseException:
                claim()
                raise
        draft.node.lookups += 1
        seconds = min(OPENING_SECONDS, fs.settings.attr_timeout_seconds)
        return opened, fs.draft_entry(draft, os.fstat(fs.content_fd(draft)), seconds)

    async def _create_or_open(
        self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Draft, Opened]:
        staged = await self._stage_missing(directory, name, mode & 0o7777, caller)
        attempts = 1
        while isinstance(staged, os.stat_result):
            if flags & os.O_EXCL or not stat.S_ISREG(staged.st_mode) or attempts > CREATE_ATTEMPTS:
                # ESTALE: what is not a regular file appeared a moment ago; a new walk of the path will find it.
                raise failure(errno.EEXIST if flags & os.O_EXCL else errno.ESTALE)
            try:
                draft = await self._draft_upon(directory, name, caller)
            except FileNotFoundError:  # it is gone again
                staged = await self._stage_missing(directory, name, mode & 0o7777, caller)
                attempts += 1
            else:
                return draft, await self._open_draft(draft, flags, caller)
        draft = self._new_draft(directory, name, caller, staged)
        draft.created = draft.fresh = draft.prepared = True
        opened = await self._open_draft(draft, flags & ~os.O_TRUNC, caller, staged.backing_id)
        draft.modified = True  # an open that fails leaves nothing to publish
        return draft, opened

    async def _stage_missing(self, directory: Node, name: bytes, mode: int, caller: Caller) -> Staged | os.stat_result:
        """The beginning of a draft for a name that does not exist; what the name shows where it does."""
        fs = self.fs
        fs.backing.require_room()
        await fs.publisher.announce_temp(directory, caller)
        hidden = fs.backing.hidden_name(b"d")
        return await fs.backing.run(caller, self._make_missing, directory.fd, name, mode, hidden, caller.pid)

    def _make_missing(self, directory: int, name: bytes, mode: int, hidden: bytes, tid: int) -> Staged | os.stat_result:
        with suppress(FileNotFoundError):
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        fd, temp_name, status = self.fs.backing.make_temp(directory, mode, hidden)
        backing_id = self.fs.register(fd) if self.fs.passthrough.active else 0
        return Staged(PrivateInode(fd, temp_name), status, status, self._introduce(tid), backing_id=backing_id)

    @staticmethod
    def _introduce(tid: int) -> tuple[Process | None, int]:
        process = processes.identify(tid)
        return process, processes.open_pidfd(process.tgid) if process else -1

    def _new_draft(self, directory: Node, name: bytes, caller: Caller, staged: Staged) -> Draft:
        fs = self.fs
        node = fs.nodes.create(backing.identity_of(staged.status), staged.shown.st_mode, shown=False)
        node.parent, node.name = directory.nodeid, name
        version = fs.nodes.find(staged.base.identity) if staged.base is not None else None
        node.origin = node.nodeid if version is None else version.origin
        fs.nodes.note_private(node, node.identity)
        opener, pidfd = staged.opener
        draft = Draft(
            write_id=secrets.token_hex(8),
            node=node,
            directory=directory,
            name=name,
            name_class=fs.classify(directory, name).name_class,
            caller=replace(caller, groups=opener.groups) if opener else caller,
            opener=opener,
            pidfd=pidfd,
            fd=staged.inode.fd,
            temp_name=staged.inode.temp_name,
            shown_ino=staged.shown.st_ino,
            gate=Gate(),
            base=staged.base,
            size=staged.shown.st_size,
        )
        fs.list_draft(draft)
        return draft

    async def _draft_upon(self, directory: Node, name: bytes, caller: Caller) -> Draft:
        """The family's draft of a name, or a new one: threads that open a file at the same moment get the same."""
        async with self._staging.holding((directory.nodeid, name)):
            draft = await self.fs.family_draft(directory, name, caller.pid)
            return draft or await self._stage(directory, name, caller)

    async def _stage(self, directory: Node, name: bytes, caller: Caller) -> Draft:
        """A draft on top of the version that a name shows; `directory` is pinned by the caller.

        Nothing is copied yet: reads go to the version until the first write.
        """
        fs = self.fs
        fs.backing.require_room()
        await fs.publisher.announce_temp(directory, caller)
        hidden = fs.backing.hidden_name(b"d")
        home = directory.fd
        staged = await fs.backing.run_or_daemon(caller, self._make_upon, home, name, hidden, caller.pid, owned=home)
        return self._new_draft(directory, name, caller, staged)

    def _make_upon(self, directory: int, name: bytes, hidden: bytes, tid: int) -> Staged:
        base_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            shown = os.fstat(base_fd)
            fd, temp_name, status = self.fs.backing.make_temp(directory, 0o600, hidden)
        except BaseException:
            os.close(base_fd)
            raise
        base = Base(base_fd, backing.identity_of(shown))
        return Staged(PrivateInode(fd, temp_name), status, shown, self._introduce(tid), base)

    # ------------------------------------------------------ under a lock

    def may_lag(self, number: int) -> bool:
        """Whether an open file is a draft that can still `catch_up`."""
        handle = self.fs.handles.get(number)
        draft = handle.draft if handle is not None else None
        if draft is None or draft.base is None or draft.appends:
            return False
        return draft.state is DraftState.WRITING and not draft.prepared

    async def catch_up(self, number: int) -> int:
        """A lock was granted through an open file: what it shows is what those who had the lock before have left.

        A draft that nobody has changed yet starts from the version that its name shows now, not from the one of its
        open, which came before the lock.  Returns the nodeid whose pages the kernel has to drop, else 0.  Not for
        O_APPEND: the kernel would go on at the end that it knows, and what is appended is merged at publish anyway.
        """
        fs = self.fs
        if not self.may_lag(number):
            return 0
        draft = fs.handle(number).draft
        assert draft is not None
        await fs.ordering.wait_name(draft.directory, draft.name)
        async with fs.held(draft), draft.gate.closed():
            if not self.may_lag(number):
                return 0
            try:
                directory, name = draft.directory.fd, draft.name
                opening = draft.caller, self._open_base, directory, name
                base, size = await fs.backing.run_or_daemon(*opening, owned=directory)
            except OSError:
                return 0  # the name is gone, or not for this user any more: what was opened stays
            assert draft.base is not None
            if base.identity == draft.base.identity:
                native.close_later(base.fd)
                return 0
            draft.spare_fds.append(draft.base.fd)
            draft.base, draft.size = base, size
            return draft.node.nodeid

    @staticmethod
    def _open_base(directory: int, name: bytes) -> tuple[Base, int]:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return Base(fd, backing.identity_of(status)), status.st_size

    # ------------------------------------------------------ read and write

    async def read(self, number: int, offset: int, size: int) -> bytes:
        handle = self.fs.handle(number)
        in_place = handle.in_place and self.fs.is_shared
        async with self.fs.reading_in_place(handle) if in_place else nullcontext(), self.fs.readable(handle) as fd:
            return await self.fs.backing.run(DAEMON, backing.read_full, fd, size, offset)

    async def _change_in_place(
        self, handle: Handle, caller: Caller, function: Callable[..., T], *arguments: object
    ) -> T:
        """Change an open file, unless what was locked through it is lost.

        That is asked last in the thread: it may have waited for one, or been stopped.  Once the change is made, or has
        failed half-way, it has to be sent.
        """
        fs = self.fs
        try:
            while True:
                permit = fs.permit(handle)
                with suppress(WithdrawnError):
                    return await fs.backing.run(caller, _if_permitted, permit, function, *arguments)
        finally:
            fs.note_unsent(handle)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        handle = self.fs.changeable(number)
        draft = handle.draft
        if draft is None:
            await self.fs.look_anew(handle)
            return await self._change_in_place(handle, handle.caller, backing.write_all, handle.fd, data, offset)
        async with draft.gate.passing():
            await self._prepare(draft)
            async with draft.gate.writing:
                written = await self._write_in_turn(draft, offset, data)
            draft.size = max(draft.size, offset + written)
            return written

    async def _write_in_turn(self, draft: Draft, offset: int, data: bytes) -> int:
        """Small writes are gathered: each would cost a worker thread otherwise.

        Not beyond the end, where one can fail for the offset alone (EFBIG).
        """
        run, gathered = self.fs.backing.run, draft.gathered
        fits = gathered.continues(offset) and len(gathered.data) + len(data) <= GATHERED_BYTES
        if gathered.data and not fits:
            await run(DAEMON, write_gathered, draft)
        if len(data) <= SMALL_BYTES and offset <= draft.size and len(self.fs.drafts) <= MAX_GATHERING:
            gathered.add(offset, data)
            return len(data)
        try:
            return await run(DAEMON, write_draft, draft, data, offset)
        except OSError as error:
            draft.error = draft.error or error.errno or errno.EIO
            raise

    async def _prepare(self, draft: Draft, *, fresh: bool = False) -> bool:
        """Make the private inode ready for a change; `fresh` when its base's content is not wanted.

        Returns whether it is known to be empty, because it was made for this.
        """
        async with draft.gate.preparing:
            if draft.state is DraftState.QUARANTINED:
                raise failure(draft.error or errno.EIO)
            if draft.state is DraftState.PUBLISHED:
                await self._next_round(draft)
            filled = not draft.prepared and await self._fill(draft, fresh=fresh)
            draft.prepared = True
            if not filled and not draft.modified and draft.caller.uid != 0:
                await self.fs.backing.run_for(draft, backing.strip_privileges, draft.fd)
            draft.modified, draft.flushed = True, False
            return filled and fresh

    async def _next_round(self, draft: Draft) -> None:
        """A descriptor outlived the publish and is used again: on top of what was published, in a new inode."""
        if draft.unseen:
            await self.fs.publisher.detach(draft)
            return
        fs = self.fs
        await fs.publisher.announce_temp(draft.directory, draft.caller)
        make, home, hidden = fs.backing.make_temp, draft.directory.fd, fs.backing.hidden_name(b"d")
        # What was published is the base now.
        made = await fs.backing.run_or_daemon(draft.caller, make, home, 0o600, hidden, owned=home)
        draft.fd, draft.temp_name, status = made
        fs.nodes.note_private(draft.node, backing.identity_of(status))
        draft.write_id, draft.written = secrets.token_hex(8), Written()
        draft.prepared = False
        draft.move(DraftEvent.WRITTEN)

    async def _fill(self, draft: Draft, *, fresh: bool) -> bool:
        """Copy what the draft starts from; False where nothing is to be copied."""
        base = draft.base
        if base is None:
            return False
        if not fresh and draft.name_class is NameClass.PARTIAL and await self._take_over(draft, base):
            return False
        await self.fs.backing.run(DAEMON, self._fill_from_base, draft, base, fresh)
        if draft.name_class is NameClass.PARTIAL:
            draft.fresh = True  # a download of its own from here on, which no other's progress can conflict with
        draft.size = 0 if fresh else os.fstat(draft.fd).st_size
        return True

    def _fill_from_base(self, draft: Draft, base: Base, fresh: bool) -> None:
        call_for = self.fs.backing.call_for
        if not fresh:  # as who has both open: root, squashed, would get no reflink and find no holes
            self.fs.backing.identities.call(draft.caller, backing.copy_contents, base.fd, draft.fd)
        call_for(draft, backing.copy_metadata, base.fd, draft.fd)
        if draft.caller.uid != 0:
            call_for(draft, backing.strip_privileges, draft.fd)

    async def _take_over(self, draft: Draft, base: Base) -> bool:
        """Rename a partial file into the draft instead of copying it: a download goes on where it stopped."""
        fs = self.fs
        hidden = fs.backing.hidden_name(b"p")
        taking = draft.caller, self._take_over_file, draft, base, hidden
        fd = await fs.backing.run_or_daemon(*taking, owned=draft.directory.fd)
        if fd is None:
            return False
        draft.spare_fds += [draft.fd, base.fd]
        fs.nodes.note_private(draft.node, base.identity)
        old_temp, draft.temp_name = draft.temp_name, hidden
        draft.fd, draft.base, draft.fresh = fd, None, True
        fs.note_capability(draft)
        if old_temp is not None:
            await fs.publisher.drop_hidden(draft, old_temp)
        return True

    def _take_over_file(self, draft: Draft, base: Base, hidden: bytes) -> int | None:
        self.fs.publisher.note_partial(draft.directory.fd, hidden, draft.name, draft.caller)
        return backing.take_over(base.fd, base.identity, draft.directory.fd, draft.name, hidden)

    async def _truncate(self, draft: Draft, size: int) -> None:
        draft.append_only = False
        async with draft.gate.passing():
            modified = draft.modified
            empty = await self._prepare(draft, fresh=size == 0)
            await self.fs.write_out(draft)
            try:
                if not empty:
                    await self.fs.backing.run_for(draft, os.ftruncate, draft.fd, size)
            except OSError:
                draft.modified = modified  # EFBIG and the like: nothing has changed
                raise
            draft.size = size
            draft.written.forget(size)
            if size == 0:
                draft.fresh = True

    async def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        handle = self.fs.changeable(number)
        draft = handle.draft
        if draft is None:
            await self._change_in_place(handle, handle.caller, backing.allocate, handle.fd, mode, offset, length)
            return
        async with draft.gate.passing():
            await self._prepare(draft)
            await self.fs.write_out(draft)
            await self.fs.backing.run_for(draft, backing.allocate, draft.fd, mode, offset, length)
            if mode:  # it can move bytes or make them zeros
                draft.written.forget(offset)
            draft.size = os.fstat(draft.fd).st_size

    async def lseek(self, number: int, offset: int, whence: int) -> int:
        handle = self.fs.handle(number)
        async with self.fs.readable(handle) as fd:
            return await self.fs.backing.run_or_caller(handle.caller, os.lseek, fd, offset, whence)

    async def copy_file_range(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> int:
        fs = self.fs
        reading, writing = fs.handle(source), fs.changeable(target)
        draft = writing.draft
        if draft is None:
            async with fs.readable(reading) as fd_in:
                ranges = fd_in, writing.fd, length, source_offset, target_offset
                return await self._change_in_place(writing, writing.caller, os.copy_file_range, *ranges)
        async with draft.gate.passing():
            await self._prepare(draft)
            await fs.write_out(draft)
            async with fs.readable(reading) as fd_in:
                count = await fs.backing.run_for(
                    draft, os.copy_file_range, fd_in, draft.fd, length, source_offset, target_offset
                )
            draft.size = max(draft.size, target_offset + count)
            draft.written.forget(target_offset, target_offset + count)
            return count

    async def fsync(self, number: int, datasync: bool) -> None:
        async with self.fs.readable(self.fs.handle(number)) as fd:
            await self.fs.backing.run(DAEMON, os.fdatasync if datasync else os.fsync, fd)

    # --------------------------------------------------------- attributes

    async def set_size(self, node: Node, size: int, number: int | None, caller: Caller) -> None:
        """The size part of SETATTR: ftruncate(2) with a handle, truncate(2) without."""
        fs = self.fs
        handle = fs.changeable(number) if number is not None else None
        if node.draft is not None:
            await self._truncate_draft(node.draft, size, handle is not None, caller)
        elif handle is not None and handle.draft is None:
            await self._change_in_place(handle, caller, os.ftruncate, handle.fd, size)
        else:
            parent = fs.nodes.get(node.parent)
            if parent is None or not fs.classify(parent, node.name).name_class.in_place:
                raise await self._redirect_writer(node, caller)
            async with fs.pinned(node):
                await fs.backing.run(caller, os.truncate, backing.proc_path(node.fd), size)

    async def _truncate_draft(self, draft: Draft, size: int, by_handle: bool, caller: Caller) -> None:
        fs = self.fs
        async with fs.held(draft):
            await fs.end_ticket(fs.tickets.take(caller.pid))
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
            await self.fs.backing.run_or_caller(caller, backing.strip_privileges, fd, owned=fd)
        await self.fs.backing.run(caller, backing.change_attributes, fd, change)

    async def draft_for_ticket(self, directory: Node, name: bytes, caller: Caller, ticket: Ticket) -> Draft:
        """The draft that a redirected open finds under its name; kept for it until its OPEN comes."""
        draft = await self._draft_upon(directory, name, caller)
        await self.reserve(draft, ticket)
        return draft

    async def reserve(self, draft: Draft, ticket: Ticket) -> None:
        """Keep a draft until the ticket's open comes; the one that was kept for it before need not wait any more."""
        before, ticket.draft = ticket.draft, draft
        draft.reserved += 1
        if before is not None:
            before.reserved -= 1
            await self.fs.end_draft(before)
