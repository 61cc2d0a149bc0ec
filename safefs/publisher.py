"""Carries out what a close, rename or link decides: seal a draft, make its name show it, or put it into quarantine.

Guaranteed when `publish` returns: the file and its name are durable, every open from now on finds it, and no reader
saw anything between the version before and this one.  When it raises, the name shows what it showed before and the
bytes are in quarantine.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from safefs import backing
from safefs.backing import DAEMON, Backing
from safefs.draft import Base, Draft, DraftEvent, DraftState
from safefs.errors import SafefsError
from safefs.gate import GroupSync, KeyedLocks
from safefs.model import Closer, Identity
from safefs.namespace import Node
from safefs.rules import NameClass
from safefs.state import DaemonRecord, StateDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrivateInode:
    """An inode that no name shows yet."""

    fd: int
    temp_name: bytes | None  # its hidden name, None for O_TMPFILE
    version_fd: int = -1  # O_PATH, once a name shows it


class PublishRefusedError(SafefsError):
    """A check failed: nothing was published, and what was written is in quarantine."""


@dataclass(frozen=True, slots=True)
class Order:
    """One publish, as the worker thread gets it."""

    draft: Draft
    inode: PrivateInode  # what becomes the version: the draft's own, or a copy
    directory: int  # where a hidden temp lies
    target: int
    name: bytes
    may_replace: bool
    hidden: bytes
    sync_target: Callable[[], None]
    check_space: Callable[[], None] | None = None  # for writes that were not seen: one may have failed for want of it


def write_gathered(draft: Draft) -> None:
    """Give the private inode what was gathered for it; only one thread at a time."""
    gathered, done = draft.gathered, 0
    try:
        while done < len(gathered.data):
            done += backing.write_all(draft.fd, memoryview(gathered.data)[done:], gathered.offset + done)
    except OSError as error:
        draft.error = draft.error or error.errno or errno.EIO
        raise
    finally:
        gathered.data = bytearray()


def check_written(draft: Draft) -> None:
    """The file is as long as its writes made it, or a write was lost on the way."""
    if draft.unseen:
        return
    size = os.fstat(draft.fd).st_size
    if size != draft.size:
        raise PublishRefusedError(f"it has {size} bytes, {draft.size} were written", errno.EIO)


def may_replace(order: Order) -> bool:
    """Whether the draft may take the place of what its name shows now (docs/semantics.md, "Conflicts")."""
    draft = order.draft
    if not order.may_replace:
        return False
    if draft.fresh or draft.base is None:
        return True
    shown = backing.identity_at(order.target, order.name)
    if shown == draft.base.identity:
        return True
    if shown is None and os.fstat(draft.base.fd).st_nlink > 0:
        return False  # renamed away: that is how a downloader finishes
    what = "was deleted" if shown is None else "shows another version"
    raise PublishRefusedError(f"the version that it was based on {what}", errno.ESTALE)


def carry_out(order: Order) -> int:
    """Seal, check, rename, and make the name durable; an O_PATH descriptor of the version.  Blocks; as the caller."""
    draft = order.draft
    if backing.is_removed(order.target):
        raise PublishRefusedError("its directory was removed", errno.ENOENT)
    write_gathered(draft)
    check_written(draft)
    if order.check_space is not None:
        order.check_space()
    if draft.copied and draft.base is not None:
        # Whoever changed attributes since then found the copy; the draft's own family changed both.
        backing.copy_metadata(draft.base.fd, order.inode.fd)
    os.fsync(order.inode.fd)
    replace = may_replace(order)
    backing.place(
        order.inode.fd,
        order.inode.temp_name,
        order.directory,
        order.target,
        order.name,
        replace=replace,
        hidden=order.hidden,
    )
    order.sync_target()
    return backing.reopen(order.inode.fd, os.O_PATH)


def take_place(order: Order) -> bool:
    """Put the copy where the draft's own inode is shown; False, and the copy has no name, where it no longer is."""
    own = backing.identity_of(os.fstat(order.draft.fd))
    placed = False
    if backing.identity_at(order.target, order.name) == own:
        os.fsync(order.inode.fd)
        placed = backing.swap(order.inode.fd, order.inode.temp_name, order.directory, order.name, own, order.hidden)
        order.sync_target()
    elif order.inode.temp_name is not None:
        backing.unlink(order.directory, order.inode.temp_name)
    return placed


def drop_inode(directory: int, inode: PrivateInode) -> None:
    """Forget a private inode that nobody needs."""
    os.close(inode.fd)
    if inode.temp_name is not None:
        backing.unlink(directory, inode.temp_name)


class Publisher:
    """Publishes and refuses drafts of one backing directory."""

    def __init__(self, store: Backing, state: StateDirectory, record: DaemonRecord) -> None:
        self._backing = store
        self._state = state
        self._record = record
        self._names = KeyedLocks()
        self._syncs = GroupSync()
        self._noted: set[Identity] = set()
        self.counts: Counter[str] = Counter()
        self.on_publish: Callable[[Node, Identity | None], None] | None = None

    async def publish(
        self,
        draft: Draft,
        *,
        target: Node | None = None,
        name: bytes | None = None,
        replace: bool = True,
        keep_private: bool = False,
    ) -> None:
        """Publish what the round wrote, under the draft's own name or another; nothing happens without changes.

        With `keep_private` a copy is published, because somebody can still write to the draft's inode and the daemon
        would not see it.  Descriptors of `draft.directory` and `target` are pinned by the caller.  Raises
        PublishRefusedError.
        """
        if draft.exclusive and target is None:
            replace = False  # O_EXCL is about the name that was opened, not about one that it is renamed to
        target, name = target or draft.directory, draft.name if name is None else name
        async with draft.gate.closed():
            if not await self._has_changed(draft):
                draft.modified = draft.pending and keep_private  # there may be changes yet
                return
            if draft.error:
                await self._refuse(draft, PublishRefusedError("a write to it failed", draft.error))
            async with self._names.holding((target.identity, name)):
                draft.move(DraftEvent.SEAL)
                try:
                    inode = await self._carry_out(draft, target, name, replace, keep_private)
                except PublishRefusedError as error:
                    await self._refuse(draft, error)
                except OSError as error:
                    reason = f"publishing failed: {error.strerror}"
                    await self._refuse(draft, PublishRefusedError(reason, error.errno or errno.EIO))
            replaced = draft.base.identity if draft.base else None
            self._published(draft, name, inode, keep_private)
            if self.on_publish is not None:
                self.on_publish(target, replaced)

    async def _carry_out(
        self, draft: Draft, target: Node, name: bytes, replace: bool, keep_private: bool
    ) -> PrivateInode:
        copy = keep_private or draft.unlinkable
        inode = await self._copy(draft) if copy else PrivateInode(draft.fd, draft.temp_name)
        hidden = self._backing.hidden_name(b"r")
        hidden_probe = self._backing.hidden_name(b"s")
        check = partial(self._backing.check_space, draft.directory.fd, draft.caller, hidden_probe)
        sync = self._sync_of(target)
        order = Order(
            draft, inode, draft.directory.fd, target.fd, name, replace, hidden, sync, check if draft.unseen else None
        )
        if inode.temp_name is None:
            await self.note_directory(target)
        try:
            version_fd = await self._backing.run_or_daemon(draft.caller, carry_out, order)
        except BaseException:
            if copy:
                await self._backing.run(DAEMON, drop_inode, draft.directory.fd, inode)
            raise
        return dataclasses.replace(inode, version_fd=version_fd)

    def _published(self, draft: Draft, name: bytes, inode: PrivateInode, keep_private: bool) -> None:
        draft.move(DraftEvent.RENAMED)
        draft.modified = draft.created = draft.exclusive = draft.fresh = False
        draft.spare_fds += [fd for fd in (draft.version_fd,) if fd >= 0]
        draft.version_fd = inode.version_fd
        if not keep_private:
            if inode.fd != draft.fd:
                draft.spare_fds.append(draft.fd)
            draft.fd, draft.temp_name, draft.copied, draft.unlinkable = inode.fd, None, False, False
        size = self._rebase(draft, inode.fd)
        if keep_private:
            self._go_on_from_copy(draft)
        self.counts["published"] += 1
        log.debug("published %r (%d bytes)", name, size)

    def _rebase(self, draft: Draft, fd: int) -> int:
        """The version behind `fd` is what a further round builds on; returns its size."""
        status = os.fstat(fd)  # of an inode that this daemon has just written: answered from memory
        # Whoever uses a descriptor of the draft passes its gate, which is closed now.
        for old in {*draft.spare_fds, *([draft.base.fd] if draft.base else [])} - {draft.fd, fd}:
            os.close(old)
        draft.spare_fds.clear()
        draft.base = Base(fd, backing.identity_of(status))
        return status.st_size

    def _sync_of(self, directory: Node) -> Callable[[], None]:
        """To make a directory's names durable; one fsync(2) serves all publishes that wait for it."""
        return partial(self._syncs.sync, directory.identity, partial(backing.sync_directory, directory.fd))

    # ------------------------------------------- writers that are not seen

    async def _copy(self, draft: Draft) -> PrivateInode:
        if not self._backing.uses_tmpfile:
            await self.note_directory(draft.directory)
        hidden = self._backing.hidden_name(b"d")
        return await self._backing.run_or_daemon(draft.caller, self._copy_inode, draft, hidden)

    def _copy_inode(self, draft: Draft, hidden: bytes) -> PrivateInode:
        fd, temp_name, _ = self._backing.make_temp(draft.directory.fd, 0o600, hidden)
        inode = PrivateInode(fd, temp_name)
        try:
            backing.copy_contents(draft.fd, fd)
            backing.copy_metadata(draft.fd, fd)
            backing.copy_times(draft.fd, fd)
        except BaseException:
            drop_inode(draft.directory.fd, inode)
            raise
        return inode

    def _go_on_from_copy(self, draft: Draft) -> None:
        """A further round begins, in the same inode: whether anything was written in it is seen at its end."""
        draft.move(DraftEvent.WRITTEN)
        draft.copied = draft.modified = True
        draft.write_id = secrets.token_hex(8)

    async def _has_changed(self, draft: Draft) -> bool:
        base = draft.base
        if not draft.pending or not draft.copied or base is None:
            return draft.pending
        return not await self._backing.run(DAEMON, backing.same_contents, draft.fd, base.fd)

    async def detach(self, draft: Draft) -> None:
        """A published inode can still be written to: its name shows a copy from now on, and the inode is private again.

        Called with the draft's gate closed, or by the first of those who passed it.
        """
        if draft.state is not DraftState.PUBLISHED or draft.base is None or draft.base.fd != draft.fd:
            return
        inode = await self._copy(draft)
        async with self._names.holding((draft.directory.identity, draft.name)):
            hidden = self._backing.hidden_name(b"r")
            home = draft.directory
            order = Order(draft, inode, home.fd, home.fd, draft.name, True, hidden, self._sync_of(home))
            try:
                placed = await self._backing.run_or_daemon(draft.caller, take_place, order)
            except BaseException:
                await self._backing.run(DAEMON, drop_inode, draft.directory.fd, inode)
                raise
        self._rebase(draft, inode.fd)
        self._go_on_from_copy(draft)
        draft.unlinkable = True
        self.counts["late writers"] += 1
        log.info(
            "%r is written to after it was published; its name shows %s", draft.name, "a copy" if placed else "another"
        )
        if self.on_publish is not None:
            self.on_publish(draft.directory, None)

    async def note_directory(self, directory: Node) -> None:
        """Put on record that a hidden name may appear in a directory, once each."""
        if directory.identity in self._noted:
            return
        self._noted.add(directory.identity)
        await self._backing.run(DAEMON, self._note_directory, directory.fd)

    def _note_directory(self, fd: int) -> None:
        try:
            self._record.note_directory(backing.path_below(self._backing.root_path, fd))
        except OSError as error:
            log.warning("leftovers in a directory could not be found again after a crash: %s", error)

    def note_partial(self, directory: int, hidden: bytes, name: bytes) -> None:
        """Blocks; in a worker thread."""
        self._record.note_partial(backing.path_below(self._backing.root_path, directory), hidden, name)

    def displace(self, directory: int, hidden: list[bytes], drafts: list[Draft]) -> None:
        """Make room for rmdir: temps leave a directory that is being removed.  Blocks; in a worker thread.

        Drafts of this daemon live on in their descriptors.  Others belong to daemons that live on (theirs go on in
        their descriptors too) or died: their bytes are kept.
        """
        mine = {draft.temp_name: draft for draft in drafts if draft.temp_name is not None}
        for name in hidden:
            draft = mine.get(name)
            if draft is not None:
                draft.temp_name = None
                backing.unlink(directory, name)
            else:
                self._state.keep_leftover(directory, name, "its directory was removed")

    async def end_killed(self, draft: Draft) -> None:
        """The last closer was killed: partial files go back under their name, everything else is refused."""
        if draft.name_class is NameClass.PARTIAL and not draft.error:
            try:
                await self.publish(draft, replace=draft.base is not None)
            except PublishRefusedError as error:
                log.info("a killed writer's %r did not go back: %s", draft.name, error.message)
            else:
                self.counts["partial kept"] += 1
            return
        reason = "its writer was killed" if draft.closer is Closer.KILLED else "how its writer ended is not known"
        await self.refuse(draft, reason, errno.EINTR)

    async def refuse(self, draft: Draft, reason: str, error: int) -> None:
        """Put a round that is not going to be published into quarantine."""
        async with draft.gate.closed():
            if not await self._has_changed(draft):
                draft.modified = False
                return
            try:
                await self._refuse(draft, PublishRefusedError(reason, error))
            except PublishRefusedError as refused:
                draft.error = refused.errno

    async def _refuse(self, draft: Draft, error: PublishRefusedError) -> None:
        draft.move(DraftEvent.REFUSED)
        draft.modified = False
        draft.error = error.errno
        self.counts["refused"] += 1
        record = self._describe(draft, error)
        try:
            if await self._backing.run(DAEMON, self._keep, draft, record):
                self.counts["quarantined"] += 1
            log.warning("not published: %s (%s)", record["path"], error.message)
        except OSError as problem:
            log.error("not published and not kept: %s (%s; quarantine: %s)", record["path"], error.message, problem)
        draft.temp_name = None
        raise error

    def _describe(self, draft: Draft, error: PublishRefusedError) -> dict[str, Any]:
        return {
            "write_id": draft.write_id,
            "name": os.fsdecode(draft.name),
            "path": os.fsdecode(draft.name),
            "reason": error.message,
            "errno": errno.errorcode.get(error.errno, str(error.errno)),
            "uid": draft.caller.uid,
            "gid": draft.caller.gid,
            "pid": draft.opener.tgid if draft.opener else 0,
            "size_bytes": os.fstat(draft.fd).st_size if draft.unseen else draft.size,
        }

    def _keep(self, draft: Draft, record: dict[str, Any]) -> bool:
        try:
            below = backing.path_below(self._backing.root_path, draft.directory.fd)
            record["path"] = os.fsdecode(b"/".join(part for part in (below, draft.name) if part))
        except OSError:
            pass  # the directory is gone: the name alone has to do
        with suppress(OSError):
            write_gathered(draft)  # what there is of it
        hidden = None if draft.temp_name is None else (draft.directory.fd, draft.temp_name)
        if not os.fstat(draft.fd).st_size:
            if hidden is not None:
                backing.unlink(*hidden)
            return False
        self._state.keep(draft.fd, draft.write_id, record, hidden)
        return True
