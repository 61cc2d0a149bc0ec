"""Operations on names: lookup, directories, links, renames, removal, and extended attributes."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from safefs import backing
from safefs.backing import RENAME_EXCHANGE, RENAME_NOREPLACE
from safefs.digest import PROVENANCE
from safefs.draft import Draft, DraftEvent, DraftState
from safefs.files import Files
from safefs.filesystem import Entry, FileSystem, close_all, failure
from safefs.identity import DAEMON
from safefs.model import Caller, Identity
from safefs.namespace import ROOT_NODEID, Node, Ticket
from safefs.native import native
from safefs.placing import NameKeeper

CAPABILITY = os.fsencode(backing.CAPABILITY)
FIRST_DRAFT_COOKIE = -(1 << 63)  # offsets of a family's own drafts, after the backing's entries
DT_REG = 8
LINK_ATTEMPTS = 3  # of a file whose name is being given to another inode

Found = tuple[int, os.stat_result]
T = TypeVar("T")


@dataclass(slots=True)
class OpenDirectory:
    """An open directory; `drafts` are the names that only its opener's family sees, fixed when it was opened."""

    node: Node
    fd: int
    drafts: list[tuple[bytes, int]] = field(default_factory=list)


class Tree:
    """The names of one mount."""

    def __init__(self, filesystem: FileSystem, files: Files, *, refresh_misses: bool) -> None:
        self.fs = filesystem
        self.files = files
        self._find = backing.find_refreshed if refresh_misses else backing.find
        self._directories: dict[int, OpenDirectory] = {}
        self._last_directory = 0

    def _reserved(self, directory: Node, name: bytes) -> bool:
        return backing.is_hidden(name) or (directory is self.fs.root and name == backing.STATE_NAME)

    def _require_free(self, directory: Node, name: bytes) -> None:
        if self._reserved(directory, name):
            raise failure(errno.EPERM)

    # ------------------------------------------------------------- lookup

    async def lookup(self, directory_id: int, name: bytes, caller: Caller) -> Entry:
        fs = self.fs
        directory = fs.node(directory_id)
        if self._reserved(directory, name):
            raise failure(errno.ENOENT)
        if fs.ordering:
            await fs.ordering.wait_name(directory, name)
        ticket = fs.ticket(caller)
        if ticket is not None:
            ticket.walked = True
        # Asked before the backing is: a draft can end while it answers, with what the name showed before.
        cached = ticket is None and not fs.drafts.has(directory, name)
        own = await self._own_draft(directory, name, caller)
        if own is not None:
            return await self._show_draft(own, ticket)
        async with fs.pinned(directory):
            fd, status = await fs.backing.run(caller, self._find, directory.fd, name)
            if ticket is not None and ticket.write and stat.S_ISREG(status.st_mode):
                name_class = fs.classify(directory, name).name_class
                if not name_class.in_place:
                    native.close_later(fd)
                    draft = await self.files.draft_for_ticket(directory, name, caller, ticket)
                    return await self._show_draft(draft, ticket)
            node = fs.intern(fd, status, directory, name)
        fs.walked(node, directory, name, caller)
        node.lookups += 1
        if ticket is not None:
            ticket.found = node.nodeid
        return fs.entry(node, status, cached=cached and not fs.drafts.has(directory, name))

    async def _own_draft(self, directory: Node, name: bytes, caller: Caller) -> Draft | None:
        if not self.fs.drafts.has(directory, name):
            return None
        return await self.fs.family_draft(directory, name, caller.pid)

    async def _show_draft(self, draft: Draft, ticket: Ticket | None) -> Entry:
        if ticket is not None:
            await self.files.reserve(draft, ticket)
        draft.node.lookups += 1
        return await self.getattr(draft.node.nodeid)

    async def getattr(self, nodeid: int) -> Entry:
        fs = self.fs
        node = fs.node(nodeid)
        if node.draft is not None:
            await fs.write_out_early(node.draft)  # for the size
        if node.draft is not None:
            # The daemon wrote this inode itself or holds its base open: answered from memory.
            return fs.draft_entry(node.draft, os.fstat(fs.content_fd(node.draft)))
        async with fs.pinned(node):
            status = await fs.backing.run(DAEMON, os.fstat, node.fd)
        parent = fs.nodes.get(node.parent)
        return fs.entry(node, status, cached=parent is None or not fs.drafts.has(parent, node.name))

    async def readlink(self, nodeid: int, caller: Caller) -> bytes:
        node = self.fs.node(nodeid)
        async with self.fs.pinned(node):
            return await self.fs.backing.run(caller, self._readlink, node.fd)

    @staticmethod
    def _readlink(fd: int) -> bytes:
        return os.readlink(b"", dir_fd=fd)

    # ----------------------------------------------------------- creation

    async def _make(
        self, directory_id: int, name: bytes, caller: Caller, function: Callable[..., Found], *arguments: object
    ) -> Entry:
        fs = self.fs
        directory = fs.node(directory_id)
        self._require_free(directory, name)
        await fs.wait_turn(caller)
        await fs.ordering.wait_name(directory, name)
        async with fs.pinned(directory):
            fd, status = await fs.backing.run(caller, function, directory.fd, name, *arguments)
            node = fs.intern(fd, status, directory, name)
        node.lookups += 1
        return fs.entry(node, status, cached=not fs.drafts.has(directory, name))

    async def mkdir(self, directory_id: int, name: bytes, mode: int, caller: Caller) -> Entry:
        return await self._make(directory_id, name, caller, backing.make_directory, stat.S_IMODE(mode))

    async def mknod(self, directory_id: int, name: bytes, mode: int, device: int, caller: Caller) -> Entry:
        return await self._make(directory_id, name, caller, backing.make_node, mode, device)

    async def symlink(self, directory_id: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        return await self._make(directory_id, name, caller, backing.make_symlink, target)

    async def link(self, nodeid: int, directory_id: int, name: bytes, caller: Caller) -> Entry:
        """link(2); of an open draft: publishes it, then links what was published.

        A new name of class lock or shared shows the inode that is open, not a copy: such files are written in place,
        and programs that make a lock by link(2) compare st_ino of the descriptor and of the name.
        """
        fs = self.fs
        node, directory = fs.node(nodeid), fs.node(directory_id)
        self._require_free(directory, name)
        draft = node.draft
        if draft is None:
            async with fs.pinned(node):
                return await self._make_link(node.fd, directory_id, name, caller)
        async with fs.held(draft):
            return await self._link_draft(draft, directory_id, name, caller)

    async def _link_draft(self, draft: Draft, directory_id: int, name: bytes, caller: Caller) -> Entry:
        fs = self.fs
        in_place = fs.classify(fs.node(directory_id), name).name_class.in_place
        for _ in range(LINK_ATTEMPTS):
            if draft.state is DraftState.QUARANTINED:
                raise failure(draft.error or errno.EIO)
            if draft.pending:
                await fs.wait_turn(caller)
                await fs.publish(draft, in_place=in_place)
            shown = fs.shown_fd(draft)
            fd = os.dup(shown)  # the next publish may close the other
            try:
                return await self._make_link(fd, directory_id, name, caller)
            except FileNotFoundError:
                async with draft.gate.passing():  # a copy may just have taken the place of that inode
                    if fs.shown_fd(draft) == shown:
                        raise
            finally:
                native.close_later(fd)
        raise failure(errno.ENOENT)

    async def _make_link(self, fd: int, directory_id: int, name: bytes, caller: Caller) -> Entry:
        def make_link(directory: int, new_name: bytes) -> Found:
            return backing.make_link(fd, directory, new_name)

        await self.fs.publisher.check_link(fd, self.fs.node(directory_id), name, caller)
        return await self._make(directory_id, name, caller, make_link)

    # ------------------------------------------------------------ removal

    async def unlink(self, directory_id: int, name: bytes, caller: Caller) -> None:
        """unlink(2); by a draft's own family it cancels the draft."""
        fs = self.fs
        directory = fs.node(directory_id)
        if self._reserved(directory, name):
            raise failure(errno.ENOENT)
        await fs.wait_turn(caller)
        await fs.ordering.wait_name(directory, name)
        own = await self._own_draft(directory, name, caller)
        lock = fs.soft_locks.find(directory.identity, name)
        async with fs.held(own), fs.pinned(directory):
            keeper = fs.publisher.keeper_of(directory, name)
            if own is None:
                await fs.backing.run(caller, self._unlink_entry, directory.fd, name, keeper)
                fs.soft_locks.forget(lock)
                return
            has_version = own.base is not None
            await self._cancel(own)
            if has_version:
                with suppress(FileNotFoundError):
                    await fs.backing.run(caller, self._unlink_entry, directory.fd, name, keeper)

    @staticmethod
    def _unlink_entry(directory: int, name: bytes, keeper: NameKeeper) -> None:
        keeper.retain()
        backing.unlink(directory, name)

    async def _cancel(self, draft: Draft) -> None:
        """Deleted on purpose: what was written goes, descriptors go on working on an inode without a name."""
        fs = self.fs
        async with draft.gate.closed():
            if draft.discarded:
                return
            draft.move(DraftEvent.CANCELLED)
            draft.modified = False
            fs.unlist_draft(draft)
            await fs.drop_temp(draft)
        fs.publisher.counts["cancelled"] += 1

    async def rmdir(self, directory_id: int, name: bytes, caller: Caller) -> None:
        """rmdir(2); temps of drafts do not keep a directory, a family's own new files do."""
        fs = self.fs
        directory = fs.node(directory_id)
        if self._reserved(directory, name):
            raise failure(errno.ENOENT)
        await fs.wait_turn(caller)
        async with fs.pinned(directory):
            fd, status = await fs.backing.run(caller, backing.find, directory.fd, name)
            try:
                node = fs.nodes.find(backing.identity_of(status))
                if node is not None:
                    await fs.ordering.wait_directory(node)
                    await self._require_no_own_drafts(node, caller)
                await fs.backing.run(caller, self._remove_directory, directory.fd, name, fd, node, caller)
            finally:
                native.close_later(fd)

    async def _require_no_own_drafts(self, directory: Node, caller: Caller) -> None:
        for draft in self.fs.drafts.below(directory):
            if draft.created and await self._own_draft(directory, draft.name, caller):
                raise failure(errno.ENOTEMPTY)

    def _remove_directory(self, directory: int, name: bytes, fd: int, node: Node | None, caller: Caller) -> None:
        try:
            os.rmdir(name, dir_fd=directory)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            hidden = backing.hidden_entries(fd)
            if not hidden:
                raise
        self.fs.publisher.displace(fd, hidden, self.fs.drafts.below(node) if node is not None else [], caller)
        os.rmdir(name, dir_fd=directory)

    # ------------------------------------------------------------- rename

    async def rename(self, old_id: int, name: bytes, new_id: int, new_name: bytes, flags: int, caller: Caller) -> None:
        """rename(2) and renameat2(2); of an open draft by its family: publishes it under the new name."""
        fs = self.fs
        old, new = fs.node(old_id), fs.node(new_id)
        if self._reserved(old, name):
            raise failure(errno.ENOENT)
        self._require_free(new, new_name)
        await fs.wait_turn(caller)
        await fs.ordering.wait_name(old, name)
        await fs.ordering.wait_name(new, new_name)
        own = await self._own_draft(old, name, caller)
        async with fs.held(own):
            overwritten = await self._own_draft(new, new_name, caller)
            overwritten = None if overwritten is own else overwritten
            async with fs.held(overwritten), fs.pinned(old, new):
                if flags & RENAME_EXCHANGE:
                    await self._exchange((own, overwritten), old, name, new, new_name, caller)
                    return
                if overwritten is not None and flags & RENAME_NOREPLACE:
                    raise failure(errno.EEXIST)
                await self._require_empty(new, new_name, caller)
                await self._rename(own, old, name, new, new_name, flags, caller)
                if overwritten is not None:
                    await self._cancel(overwritten)

    async def _require_empty(self, directory: Node, name: bytes, caller: Caller) -> None:
        """A directory that holds the family's own new files is not empty, though the backing thinks so."""
        if not len(self.fs.drafts):
            return
        identity = await self.fs.backing.run_or_caller(caller, backing.identity_at, directory.fd, name)
        node = self.fs.nodes.find(identity) if identity is not None else None
        if node is not None and node.is_directory:
            await self._require_no_own_drafts(node, caller)

    async def _exchange(
        self, drafts: tuple[Draft | None, ...], old: Node, name: bytes, new: Node, new_name: bytes, caller: Caller
    ) -> None:
        """RENAME_EXCHANGE, of what the family's drafts have published."""
        fs = self.fs
        for draft in drafts:
            if draft is not None:
                await fs.publish(draft)
        locks = [fs.soft_locks.find(old.identity, name), fs.soft_locks.find(new.identity, new_name)]
        shown = await fs.backing.run(caller, self._exchange_entries, old.fd, name, new.fd, new_name)
        for lock in locks:
            fs.soft_locks.forget(lock)
        places = [(old, name), (new, new_name)]
        for identity, place, before, draft in zip(shown, reversed(places), places, drafts, strict=True):
            moved = fs.nodes.find(identity)
            if moved is not None and moved is not fs.root:
                fs.moved(moved, *place, (before[0].nodeid, before[1]))
            if draft is not None:
                await fs.rename_draft(draft, *place)

    @staticmethod
    def _exchange_entries(old: int, name: bytes, new: int, new_name: bytes) -> tuple[Identity, Identity]:
        """What the names showed before."""
        backing.rename(old, name, new, new_name, RENAME_EXCHANGE)
        moved, other = (os.stat(at, dir_fd=fd, follow_symlinks=False) for fd, at in ((new, new_name), (old, name)))
        return backing.identity_of(moved), backing.identity_of(other)

    async def _rename(
        self, own: Draft | None, old: Node, name: bytes, new: Node, new_name: bytes, flags: int, caller: Caller
    ) -> None:
        fs = self.fs
        if own is not None and own.pending and own.base is None:
            # Never published: it appears under its new name only.
            await fs.publish(own, target=new, name=new_name, replace=not flags & RENAME_NOREPLACE)
        else:
            if own is not None:
                await fs.publish(own)
            locks = [fs.soft_locks.find(old.identity, name), fs.soft_locks.find(new.identity, new_name)]
            checked = await fs.publisher.check_new_name(old, name, new, new_name, caller)
            renaming = partial(self._rename_entry, checked, fs.publisher.keeper_of(new, new_name))
            async with fs.publisher.holding(new, new_name):
                status = await fs.backing.run(caller, renaming, old.fd, name, new.fd, new_name, flags)
            for lock in locks:
                fs.soft_locks.forget(lock)
            moved = fs.nodes.find(backing.identity_of(status))
            if moved is not None and moved is not fs.root:
                fs.moved(moved, new, new_name, (old.nodeid, name))
        if own is not None:
            await fs.rename_draft(own, new, new_name)

    @staticmethod
    def _rename_entry(
        checked: Identity | None, keeper: NameKeeper, old: int, name: bytes, new: int, new_name: bytes, flags: int
    ) -> os.stat_result:
        with keeper.locked():
            status = os.stat(name, dir_fd=old, follow_symlinks=False)
            if checked is not None and backing.identity_of(status) != checked:
                raise failure(errno.ESTALE)  # another file by now: the kernel asks once more, and it is checked then
            if not flags & RENAME_NOREPLACE and backing.identity_at(new, new_name) != backing.identity_of(status):
                keeper.retain()
            backing.rename(old, name, new, new_name, flags)
        return status

    # -------------------------------------------------------- directories

    async def opendir(self, nodeid: int, caller: Caller) -> int:
        fs = self.fs
        node = fs.node(nodeid)
        fs.backing.require_room()
        async with fs.pinned(node):
            fd = await fs.backing.run(caller, backing.reopen, node.fd, os.O_RDONLY | os.O_DIRECTORY)
        await fs.ordering.wait_directory(node)
        opened = OpenDirectory(node, fd)
        for draft in fs.drafts.below(node):
            if draft.created and await fs.family_draft(node, draft.name, caller.pid) is draft:
                opened.drafts.append((draft.name, draft.shown_ino))
        self._last_directory += 1
        self._directories[self._last_directory] = opened
        node.opens += 1
        return self._last_directory

    def directory(self, number: int, nodeid: int = ROOT_NODEID) -> OpenDirectory:
        """An open directory; one that the C extension has opened is known by its nodeid, and had no drafts then."""
        if number & native.FH_HOT:
            return OpenDirectory(self.fs.node(nodeid), number & native.FH_HOT - 1)
        try:
            return self._directories[number]
        except KeyError:
            raise failure(errno.EBADF) from None

    async def readdir(self, nodeid: int, number: int, offset: int, size: int) -> bytes:
        fs = self.fs
        opened = self.directory(number, nodeid)
        await fs.ordering.wait_directory(opened.node)
        if offset >= 0:
            state = backing.STATE_NAME if opened.node is fs.root else b""
            answer = await fs.backing.run(DAEMON, backing.read_directory, opened.fd, offset, size, state)
            if answer or not opened.drafts:
                return answer
            offset = FIRST_DRAFT_COOKIE
        return self._draft_entries(opened, offset - FIRST_DRAFT_COOKIE, size)

    @staticmethod
    def _draft_entries(opened: OpenDirectory, index: int, size: int) -> bytes:
        """struct fuse_dirent of the family's own drafts."""
        answer = bytearray()
        for position in range(index, len(opened.drafts)):
            name, ino = opened.drafts[position]
            entry = struct.pack("=QqII", ino, FIRST_DRAFT_COOKIE + position + 1, len(name), DT_REG) + name
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return bytes(answer)

    async def releasedir(self, number: int) -> None:
        opened = self._directories.pop(number, None)
        if number & native.FH_HOT:
            native.close_later(number & native.FH_HOT - 1)
        if opened is not None:
            native.close_later(opened.fd)
            opened.node.opens -= 1
            close_all(self.fs.nodes.drop_if_idle(opened.node))

    async def fsyncdir(self, number: int) -> None:
        await self.fs.backing.run(DAEMON, backing.sync_open_directory, self.directory(number).fd)

    async def statfs(self, caller: Caller) -> os.statvfs_result:
        return await self.fs.backing.run(caller, os.statvfs, backing.proc_path(self.fs.backing.root_fd))

    async def access(self, nodeid: int, mask: int, caller: Caller) -> bool:
        def allowed(fd: int) -> bool:
            return os.access(backing.proc_path(fd), mask, effective_ids=True)

        async with self.fs.inode(self.fs.node(nodeid)) as fd:
            return await self.fs.backing.run(caller, allowed, fd)

    # --------------------------------------------------------------- xattr

    async def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, caller: Caller) -> None:
        self._require_writable_attribute(name)
        draft = self.fs.node(nodeid).draft
        if draft is not None and name == CAPABILITY:
            self.fs.note_capability(draft)
        await self._on_inodes(nodeid, caller, os.setxattr, name, value, flags)

    async def getxattr(self, nodeid: int, name: bytes, caller: Caller) -> bytes:
        draft = self.fs.node(nodeid).draft
        if name == CAPABILITY and draft is not None and draft.prepared and not draft.may_have_capability:
            raise failure(errno.ENODATA)  # the kernel asks for it before every file's first write
        return await self._of_inode(nodeid, caller, os.getxattr, name)

    @staticmethod
    def _require_writable_attribute(name: bytes) -> None:
        if os.fsdecode(name).startswith(PROVENANCE):
            raise failure(errno.EPERM)

    async def removexattr(self, nodeid: int, name: bytes, caller: Caller) -> None:
        self._require_writable_attribute(name)
        await self._on_inodes(nodeid, caller, os.removexattr, name)

    async def listxattr(self, nodeid: int, caller: Caller) -> list[bytes]:
        names = await self._of_inode(nodeid, caller, os.listxattr)
        # Who copies a file with its attributes would be refused those of safefs.
        return [os.fsencode(name) for name in names if not name.startswith(PROVENANCE)]

    async def _of_inode(self, nodeid: int, caller: Caller, function: Callable[..., T], *arguments: object) -> T:
        fs = self.fs
        async with fs.attributed(fs.node(nodeid), to_change=False) as (fd, *_):
            return await fs.backing.run(caller, function, backing.proc_path(fd), *arguments)

    async def _on_inodes(
        self, nodeid: int, caller: Caller, function: Callable[..., object], *arguments: object
    ) -> None:
        fs = self.fs
        async with fs.attributed(fs.node(nodeid)) as descriptors:
            for path in map(backing.proc_path, descriptors):
                await fs.backing.run(caller, function, path, *arguments)
