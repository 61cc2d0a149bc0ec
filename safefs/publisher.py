"""Carries out what a close, rename or link decides: seal a draft, make its name show it, or put it into quarantine.

Guaranteed when `publish` returns: the file and its name are durable, every open from now on finds it, and no reader
saw anything between the version before and this one.  When it raises, the name shows what it showed before and the
bytes are in quarantine.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safefs import backing
from safefs.backing import DAEMON, Backing
from safefs.draft import Base, Draft, DraftEvent
from safefs.errors import SafefsError
from safefs.gate import KeyedLocks
from safefs.model import Closer, Identity
from safefs.namespace import Node
from safefs.rules import NameClass
from safefs.state import DaemonRecord, StateDirectory

log = logging.getLogger(__name__)


class PublishRefusedError(SafefsError):
    """A check failed: nothing was published, and what was written is in quarantine."""


@dataclass(frozen=True, slots=True)
class Order:
    """One publish, as the worker thread gets it."""

    draft: Draft
    directory: int  # where a hidden temp lies
    target: int
    name: bytes
    may_replace: bool
    hidden: bytes


def check_size(draft: Draft) -> None:
    """The file is as long as its writes made it, or a write was lost on the way."""
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


def carry_out(order: Order) -> None:
    """Seal, check, rename, and make the name durable.  Blocks; runs as the caller."""
    draft = order.draft
    if backing.is_removed(order.target):
        raise PublishRefusedError("its directory was removed", errno.ENOENT)
    check_size(draft)
    os.fsync(draft.fd)
    replace = may_replace(order)
    backing.place(
        draft.fd,
        draft.temp_name,
        order.directory,
        order.target,
        order.name,
        replace=replace,
        hidden=order.hidden,
    )
    backing.sync_directory(order.target)


class Publisher:
    """Publishes and refuses drafts of one backing directory."""

    def __init__(self, store: Backing, state: StateDirectory, record: DaemonRecord) -> None:
        self._backing = store
        self._state = state
        self._record = record
        self._names = KeyedLocks()
        self._noted: set[Identity] = set()
        self.counts: Counter[str] = Counter()
        self.on_publish: Callable[[Node, Identity | None], None] | None = None

    async def publish(
        self, draft: Draft, *, target: Node | None = None, name: bytes | None = None, replace: bool = True
    ) -> None:
        """Publish what the round wrote, under the draft's own name or another; nothing happens without changes.

        Descriptors of `draft.directory` and `target` are pinned by the caller.  Raises PublishRefusedError.
        """
        if draft.exclusive and target is None:
            replace = False  # O_EXCL is about the name that was opened, not about one that it is renamed to
        target, name = target or draft.directory, draft.name if name is None else name
        async with draft.gate.closed():
            if not draft.pending:
                return
            if draft.error:
                await self._refuse(draft, PublishRefusedError("a write to it failed", draft.error))
            async with self._names.holding((target.identity, name)):
                draft.move(DraftEvent.SEAL)
                try:
                    await self._carry_out(draft, target, name, replace)
                except PublishRefusedError as error:
                    await self._refuse(draft, error)
                except OSError as error:
                    reason = f"publishing failed: {error.strerror}"
                    await self._refuse(draft, PublishRefusedError(reason, error.errno or errno.EIO))
            replaced = draft.base.identity if draft.base else None
            self._published(draft, name)
            if self.on_publish is not None:
                self.on_publish(target, replaced)

    async def _carry_out(self, draft: Draft, target: Node, name: bytes, replace: bool) -> None:
        hidden = self._backing.hidden_name(b"r")
        order = Order(draft, draft.directory.fd, target.fd, name, replace, hidden)
        if draft.temp_name is None:
            await self.note_directory(target)
        await self._backing.run_or_daemon(draft.caller, carry_out, order)

    def _published(self, draft: Draft, name: bytes) -> None:
        draft.move(DraftEvent.RENAMED)
        draft.modified = draft.created = draft.exclusive = draft.fresh = False
        draft.temp_name = None
        status = os.fstat(draft.fd)  # of an inode that this daemon has just written: answered from memory
        # Whoever uses a descriptor of the draft passes its gate, which is closed now.
        for fd in {*draft.spare_fds, *([draft.base.fd] if draft.base else [])} - {draft.fd}:
            os.close(fd)
        draft.spare_fds.clear()
        draft.base = Base(draft.fd, backing.identity_of(status))
        self.counts["published"] += 1
        log.debug("published %r (%d bytes)", name, status.st_size)

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
            if draft.pending:
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
            "size_bytes": draft.size,
        }

    def _keep(self, draft: Draft, record: dict[str, Any]) -> bool:
        try:
            below = backing.path_below(self._backing.root_path, draft.directory.fd)
            record["path"] = os.fsdecode(b"/".join(part for part in (below, draft.name) if part))
        except OSError:
            pass  # the directory is gone: the name alone has to do
        hidden = None if draft.temp_name is None else (draft.directory.fd, draft.temp_name)
        if not os.fstat(draft.fd).st_size:
            if hidden is not None:
                backing.unlink(*hidden)
            return False
        self._state.keep(draft.fd, draft.write_id, record, hidden)
        return True
