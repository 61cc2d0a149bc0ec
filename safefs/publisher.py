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
import stat
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from safefs import backing
from safefs.backing import Backing
from safefs.digest import Written
from safefs.draft import Base, Draft, DraftEvent, DraftState
from safefs.errors import PublishRefusedError
from safefs.events import EventKind, EventLog
from safefs.gate import GroupSync, KeyedLocks
from safefs.identity import SERVICE
from safefs.model import Caller, Closer, Identity
from safefs.namespace import Node
from safefs.native import native
from safefs.placing import Order, Placed, PrivateInode, Verdict, carry_out, drop_inode, take_place, write_gathered
from safefs.retained import NO_LINKS, slot_of
from safefs.rules import NameClass, Policy, Verify
from safefs.seal import Demands, check_name
from safefs.state import DaemonRecord, StateDirectory

log = logging.getLogger(__name__)

_OUTCOMES = {
    Verdict.OURS: EventKind.PUBLISHED,
    Verdict.BOTH: EventKind.JOINED,
    Verdict.THEIRS: EventKind.SUPERSEDED,
}
FENCED = "what it had locked is another's by now"
_REFUSALS = {errno.ESTALE: EventKind.CONFLICT, errno.EINTR: EventKind.KILLED}


@dataclass(frozen=True, slots=True)
class Keeper:
    """A name of a directory, as all daemons on the backing know it through the state directory (placing.NameKeeper)."""

    state: StateDirectory
    store: Backing
    directory: int
    ino: int
    name: bytes
    retain_seconds: float

    def locked(self) -> AbstractContextManager[None]:
        return self.state.name_lock(self.ino, self.name)

    def retain(self) -> None:
        """Best effort: where the backing has no links, or an inode too many, the version goes as it always did."""
        if not self.retain_seconds or not self.state.retained.usable:
            return
        try:
            status = os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                self.store.identities.call(SERVICE, self._keep)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.state.retained.usable = error.errno not in NO_LINKS
            log.warning("%r is not retained: %s", self.name, error)

    def _keep(self) -> None:
        try:
            path = backing.path_below(self.store.root_path, self.directory)
        except OSError:
            path = b""
        shown = os.fsdecode(os.path.join(path, self.name))
        slot = slot_of(self.ino, self.name)
        self.state.retained.keep(self.directory, self.name, slot, shown, self.retain_seconds)

    def retains(self, ino: int) -> bool:
        return self.store.identities.call(SERVICE, self.state.retained.has, slot_of(self.ino, self.name), ino)


class Publisher:
    """Publishes and refuses drafts of one backing directory."""

    def __init__(
        self,
        store: Backing,
        state: StateDirectory,
        record: DaemonRecord,
        events: EventLog,
        verify: Verify,
        retain_seconds: float,
    ) -> None:
        self._backing = store
        self._events = events
        self._verify = verify
        self._retain_seconds = retain_seconds
        self._state = state
        self._record = record
        self._names = KeyedLocks()
        self._shown: dict[Identity, list[Draft]] = {}  # by what their `shown` says
        self._syncs = GroupSync()
        self.counts: Counter[str] = Counter()
        self.has_left = False  # hidden files that nobody here knows of any more
        self.on_publish: Callable[[Node, Identity | None], None] | None = None
        self.policy_of: Callable[[Node, bytes], Policy] = lambda _directory, _name: Policy()
        self.lease: Callable[[], str] = lambda: "for ever"
        self.lock_name: Callable[[Node, bytes], AbstractAsyncContextManager[bool]] | None = None

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
        async with draft.gate.closed():
            if draft.exclusive and target is None:
                replace = False  # O_EXCL is about the name that was opened, not about one that it is renamed to
            # Which the draft's own name is, is known now: it may have been renamed while this waited.
            target, name = target or draft.directory, draft.name if name is None else name
            if not await self._has_changed(draft):
                draft.modified = draft.pending and keep_private  # there may be changes yet
                return
            if draft.error:
                reason = FENCED if draft.fenced else "a write to it failed"
                await self._refuse(draft, PublishRefusedError(reason, draft.error))
            lease = self.lease()
            async with self.holding(target, name) as alone:
                draft.move(DraftEvent.SEAL)
                try:
                    if not alone and draft.base is not None and not draft.fresh:
                        raise OSError(errno.EBUSY, "its name is in use on another node, or the lock backend is away")
                    placed = await self._carry_out(draft, target, name, lease, replace, keep_private)
                except PublishRefusedError as error:
                    await self._refuse(draft, error)
                except OSError as error:
                    reason = f"publishing failed: {error.strerror}"
                    await self._refuse(draft, PublishRefusedError(reason, error.errno or errno.EIO))
                except Exception as error:  # a boundary: whatever fails, the bytes are kept
                    log.exception("publishing %r failed", draft.name)
                    await self._refuse(draft, PublishRefusedError(f"publishing failed: {error!r}", errno.EIO))
            replaced = draft.base.identity if draft.base else None
            self._published(draft, target, name, placed, keep_private)
            if self.on_publish is not None:
                self.on_publish(target, replaced)

    async def _carry_out(
        self, draft: Draft, target: Node, name: bytes, lease: str, replace: bool, keep_private: bool
    ) -> Placed:
        copy = keep_private or draft.unlinkable
        own = PrivateInode(draft.fd, draft.temp_name)
        async with self._copied(draft) if copy else nullcontext(own) as inode:
            demands = self._demands(target, name, None if copy else draft.written)
            order = self._order(draft, inode, target, name, demands, lease, may_replace=replace)
            if inode.temp_name is None:
                await self.note_directory(target, draft.caller)
            return await self._backing.run_or_daemon(draft.caller, carry_out, order, owned=target.fd)

    @asynccontextmanager
    async def _copied(self, draft: Draft) -> AsyncIterator[PrivateInode]:
        """Around what makes a name show a copy of the draft's inode; where that fails, nobody needs the copy.

        Where it is given up, because the daemon ends, a thread goes on with the copy: its descriptor stays open, for
        its number would be another file's, and what hidden name there is has to be found.
        """
        try:
            inode = await self._copy(draft)
            try:
                yield inode
            except Exception:
                native.close_later(inode.fd)
                if inode.temp_name is not None:
                    await self.drop_hidden(draft, inode.temp_name)
                raise
        except trio.Cancelled:
            self.has_left = True
            raise

    async def drop_hidden(self, draft: Draft, name: bytes) -> bool:
        """Remove a hidden name that nobody needs; where it stays (False), the next daemon has to find it."""
        try:
            await self._backing.run_for(draft, backing.unlink, draft.directory.fd, name)
        except FileNotFoundError:
            pass  # it has become another name
        except OSError as error:
            log.warning("a hidden file stays beside %r: %s", draft.name, error)
            self.has_left = True
            return False
        return True

    def _published(self, draft: Draft, target: Node, name: bytes, placed: Placed, keep_private: bool) -> None:
        inode, write_id = placed.inode, draft.write_id
        draft.move(DraftEvent.RENAMED)
        draft.modified = draft.created = draft.exclusive = draft.fresh = False
        draft.version_fd = inode.version_fd
        if not keep_private:
            self.forget(draft)  # its own inode may be another one now
            if inode.fd != draft.fd:
                draft.spare_fds.append(draft.fd)
            draft.fd, draft.temp_name, draft.copied, draft.unlinkable = inode.fd, None, False, False
        size = self._rebase(draft, inode.fd)
        if keep_private:
            self._go_on_from_copy(draft)
        elif draft.unseen and draft.writers and draft.base is not None:
            draft.shown = draft.base.identity
            self._shown.setdefault(draft.shown, []).append(draft)
        self._note(_OUTCOMES[placed.verdict], draft, self._path_text(target.fd, name), size=size, write_id=write_id)

    def _note(self, kind: EventKind, draft: Draft, path: str, **details: Any) -> None:
        self.counts[kind] += 1
        pid = draft.opener.tgid if draft.opener else 0
        self._events.note(kind, path, uid=draft.caller.uid, pid=pid, **details)

    def _rebase(self, draft: Draft, fd: int) -> int:
        """The version behind `fd` is what a further round builds on; returns its size."""
        status = os.fstat(fd)  # of an inode that this daemon has just written: answered from memory
        # Whoever uses a descriptor of the draft passes its gate, which is closed now.
        for old in {*draft.spare_fds, *([draft.base.fd] if draft.base else [])} - {draft.fd, fd}:
            native.close_later(old)
        draft.spare_fds.clear()
        draft.base = Base(fd, backing.identity_of(status))
        return status.st_size

    @asynccontextmanager
    async def holding(self, directory: Node, name: bytes) -> AsyncIterator[bool]:
        """Nobody else in this daemon changes what the name shows.  Its threads share the lock of Keeper.locked.

        Where that is no lock between nodes, there is one of the cluster as well; yields False where it is not had.  Who
        compares nothing, because the last close wins anyway, can go on then.
        """
        async with self._names.holding((directory.identity, name)):
            if self.lock_name is None:
                yield True
                return
            async with self.lock_name(directory, name) as alone:
                yield alone

    def keeper_of(self, directory: Node, name: bytes) -> Keeper:
        """For worker threads, while the directory's descriptor is pinned."""
        seconds = self.policy_of(directory, name).retain_seconds
        return Keeper(
            state=self._state,
            store=self._backing,
            directory=directory.fd,
            ino=directory.identity.ino,
            name=name,
            retain_seconds=self._retain_seconds if seconds is None else seconds,
        )

    def _order(
        self,
        draft: Draft,
        inode: PrivateInode,
        target: Node,
        name: bytes,
        demands: Demands,
        lease: str,
        *,
        may_replace: bool = True,
    ) -> Order:
        store, home = self._backing, draft.directory
        return Order(
            draft=draft,
            inode=inode,
            directory=home.fd,
            target=target.fd,
            name=name,
            may_replace=may_replace,
            hidden=store.hidden_name(b"r"),
            make_temp=partial(store.make_temp, home.fd, 0o600, store.hidden_name(b"j")),
            keeper=self.keeper_of(target, name),
            sync_target=self._sync_of(target),
            demands=demands,
            require_lease=partial(self._require_lease, draft, lease),
            check_space=partial(store.check_space, home.fd, draft.caller, store.hidden_name(b"s")),
        )

    def _require_lease(self, draft: Draft, lease: str) -> None:
        """That under which the publish began, not one that this node has got since then; nor was what it had broken."""
        if draft.fenced:
            raise PublishRefusedError(FENCED, errno.EIO)
        compares = self.lock_name is not None and draft.base is not None and not draft.fresh
        if (draft.locked or draft.claim or compares) and (not lease or self.lease() != lease):
            reason = "the lease of this node is over, and what it had locked may be another's"
            raise PublishRefusedError(reason, errno.EIO)

    def _demands(self, directory: Node, name: bytes, written: Written | None) -> Demands:
        policy = self.policy_of(directory, name)
        return Demands(name, policy, policy.verify or self._verify, written)

    def _sync_of(self, directory: Node) -> Callable[[], None]:
        """To make a directory's names durable; one fsync(2) serves all publishes that wait for it."""
        return partial(self._syncs.sync, directory.identity, partial(backing.sync_directory, directory.fd))

    # ------------------------------------ versions that get another name

    async def check_new_name(
        self, directory: Node, name: bytes, target: Node, new_name: bytes, caller: Caller
    ) -> Identity | None:
        """Before a rename: a version whose bytes are not what the new name promises goes into quarantine.

        Returns the inode that was looked at, which has to be the one that is renamed.  Raises PublishRefusedError
        (EIO).  Descriptors of both directories are pinned.  A file that neither the daemon (root_squash) nor the
        caller may read is renamed unseen: rename(2) asks for no right to read.
        """
        demands = self._demands(target, new_name, None)
        if demands.policy.content:
            with suppress(PermissionError):
                return await self._backing.run_or_caller(caller, self._check_entry, directory.fd, name, demands, caller)
        return None

    def _check_entry(self, directory: int, name: bytes, demands: Demands, caller: Caller) -> Identity | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except PermissionError:
            raise
        except OSError:
            return None  # rename(2) will say what is wrong; a symbolic link is none of ours
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                check_name(fd, demands)
            return backing.identity_of(status)
        except PublishRefusedError as error:
            self._keep_version(fd, directory, name, demands, error, caller)
            raise
        finally:
            os.close(fd)

    def _keep_version(
        self, fd: int, directory: int, name: bytes, demands: Demands, error: PublishRefusedError, caller: Caller
    ) -> None:
        status, write_id = os.fstat(fd), secrets.token_hex(8)
        record = {
            **self._refusal(write_id, directory, name, error),
            "reason": f"it was to be renamed to {os.fsdecode(demands.name)}: {error.message}",
            "uid": status.st_uid,
            "gid": status.st_gid,
            "pid": 0,
            "size_bytes": status.st_size,
        }
        self.counts[EventKind.REFUSED] += 1
        self._events.note(EventKind.REFUSED, record["path"], reason=record["reason"], write_id=write_id)
        if backing.identity_at(directory, name) == backing.identity_of(status):
            keep = self._state.keep, fd, write_id, record, (directory, name), (caller,)
            self._backing.identities.call(SERVICE, *keep)
            self.counts["quarantined"] += 1
        log.warning("not renamed: %s (%s)", record["path"], record["reason"])

    async def check_link(self, fd: int, target: Node, new_name: bytes, caller: Caller) -> None:
        """Before a link, likewise; the inode keeps the names that it has."""
        demands = self._demands(target, new_name, None)
        if demands.policy.content:
            with suppress(PermissionError):
                await self._backing.run_or_caller(caller, self._check_inode, fd, demands)

    @staticmethod
    def _check_inode(fd: int, demands: Demands) -> None:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        readable = backing.reopen(fd, os.O_RDONLY)
        try:
            check_name(readable, demands)
        finally:
            os.close(readable)

    def _path_text(self, directory: int, name: bytes) -> str:
        """A file's path below the root; its name alone where the directory is gone."""
        try:
            below = backing.path_below(self._backing.root_path, directory)
        except OSError:
            below = b""
        return os.fsdecode(b"/".join(part for part in (below, name) if part))

    # ------------------------------------------- writers that are not seen

    async def _copy(self, draft: Draft) -> PrivateInode:
        await self.announce_temp(draft.directory, draft.caller)
        hidden = self._backing.hidden_name(b"d")
        home = draft.directory.fd
        return await self._backing.run_or_daemon(draft.caller, self._copy_inode, draft, hidden, owned=home)

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
        """Whether there is something to be published or kept; what cannot be compared may be."""
        base = draft.base
        if not draft.pending or not draft.copied or base is None:
            return draft.pending
        try:
            return not await self._backing.run_for(draft, backing.same_contents, draft.fd, base.fd)
        except OSError as error:
            log.warning("whether %r was written to once more is not known: %s", draft.name, error)
            return True

    async def detach(self, draft: Draft) -> None:
        """A published inode can still be written to: its name shows a copy from now on, and the inode is private again.

        Called with the draft's gate closed, or by the first of those who passed it.
        """
        if draft.state is not DraftState.PUBLISHED or draft.base is None or draft.base.fd != draft.fd:
            return
        async with self._copied(draft) as inode, self.holding(home := draft.directory, draft.name):
            # The name has shown these bytes already: that they do not suit it would be no news.
            demands = dataclasses.replace(self._demands(home, draft.name, None), policy=Policy())
            order = self._order(draft, inode, home, draft.name, demands, self.lease())
            placed = await self._backing.run_or_daemon(draft.caller, take_place, order, owned=home.fd)
        self._rebase(draft, inode.fd)
        self._go_on_from_copy(draft)
        draft.unlinkable = True
        self._note(EventKind.LATE_WRITE, draft, self._path_text(draft.directory.fd, draft.name))
        log.info(
            "%r is written to after it was published; its name shows %s", draft.name, "a copy" if placed else "another"
        )
        if self.on_publish is not None:
            self.on_publish(draft.directory, None)

    def drafts_of(self, identity: Identity) -> list[Draft]:
        """The drafts whose own inode this is, shown by a name and open for writing when it was published.

        It has a node of its own by then.  Its attributes, changed through that, are meant for the name: also where the
        name shows a copy meanwhile, because a writer is left or only seems to be.
        """
        return list(self._shown.get(identity, ()))

    def forget(self, draft: Draft) -> None:
        """No inode of the draft's has a node of its own, as far as its attributes are concerned."""
        identity, draft.shown = draft.shown, None
        if identity is not None:
            self._shown[identity].remove(draft)
            if not self._shown[identity]:
                del self._shown[identity]

    async def announce_temp(self, directory: Node, caller: Caller) -> None:
        """A private inode is about to be made, under a hidden name where the backing may need one."""
        if not self._backing.is_nameless(directory.identity):
            await self.note_directory(directory, caller)

    async def note_directory(self, directory: Node, caller: Caller) -> None:
        """Put on record that a hidden name may appear in a directory, made by this caller.

        Once for each path: there a successor looks, whatever directory it is.  Inode numbers are used again, and a
        directory that was renamed is at another path.
        """
        try:
            path = backing.path_below(self._backing.root_path, directory.fd)
            if not self._record.has_noted(path):
                await self._backing.run(SERVICE, self._record.note_directory, path, caller)
        except OSError as error:
            log.warning("leftovers in a directory could not be found again after a crash: %s", error)

    def note_partial(self, directory: int, hidden: bytes, name: bytes, caller: Caller) -> None:
        """Blocks; in a worker thread."""
        self._record.note_partial(backing.path_below(self._backing.root_path, directory), hidden, name, caller)

    def displace(self, directory: int, hidden: list[bytes], drafts: list[Draft], caller: Caller) -> None:
        """Make room for rmdir: temps leave a directory that is being removed.  Blocks; in a worker thread.

        Drafts of this daemon live on in their descriptors.  Others belong to daemons that live on (theirs go on in
        their descriptors too) or died: their bytes are kept.
        """
        mine = {draft.temp_name: draft for draft in drafts if draft.temp_name is not None}
        for name in hidden:
            draft = mine.get(name)
            if draft is not None:
                draft.temp_name = None
                self._backing.call_for(draft, backing.unlink, directory, name)
            else:
                keep = self._state.keep_leftover, directory, name, "its directory was removed", (caller,)
                self._backing.identities.call(SERVICE, *keep)

    async def end_killed(self, draft: Draft) -> None:
        """The last closer was killed: partial files go back under their name, everything else is refused."""
        if draft.name_class is NameClass.PARTIAL and not draft.error:
            try:
                await self.publish(draft, replace=draft.base is not None)
            except PublishRefusedError as error:
                log.info("a killed writer's %r did not go back: %s", draft.name, error.message)
            else:
                self._note(EventKind.PARTIAL_KEPT, draft, self._path_text(draft.directory.fd, draft.name))
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
        record = self._describe(draft, error)
        kind = _REFUSALS.get(error.errno, EventKind.REFUSED)
        self._note(kind, draft, record["path"], reason=error.message, write_id=draft.write_id)
        hidden, is_settled = draft.temp_name, False
        try:
            if await self._backing.run(SERVICE, self._keep, draft, hidden, record):
                self.counts["quarantined"] += 1
            is_settled = True
            log.warning("not published: %s (%s)", record["path"], error.message)
        except Exception as problem:  # noqa: BLE001 - a boundary: what is refused is refused, kept or not
            log.error("not published and not kept: %s (%s; quarantine: %r)", record["path"], error.message, problem)
        finally:  # also where it is given up: what is not kept is for the next daemon to find, and not to be removed
            self.has_left = self.has_left or (hidden is not None and not is_settled)
            draft.temp_name = None
        raise error

    def _refusal(self, write_id: str, directory: int, name: bytes, error: PublishRefusedError) -> dict[str, Any]:
        """The beginning of a record in quarantine."""
        return {
            "write_id": write_id,
            "name": os.fsdecode(name),
            "path": self._path_text(directory, name),
            "reason": error.message,
            "errno": errno.errorcode.get(error.errno, str(error.errno)),
        }

    def _describe(self, draft: Draft, error: PublishRefusedError) -> dict[str, Any]:
        return {
            **self._refusal(draft.write_id, draft.directory.fd, draft.name, error),
            "uid": draft.caller.uid,
            "gid": draft.caller.gid,
            "pid": draft.opener.tgid if draft.opener else 0,
            "size_bytes": os.fstat(draft.fd).st_size if draft.unseen else draft.size,
        }

    def _keep(self, draft: Draft, hidden: bytes | None, record: dict[str, Any]) -> bool:
        with suppress(OSError):
            write_gathered(draft)  # what there is of it
        shown = None if hidden is None else (draft.directory.fd, hidden)
        if not os.fstat(draft.fd).st_size:
            if shown is not None:
                self._backing.call_for(draft, backing.unlink, *shown)
            return False
        self._state.keep(draft.fd, draft.write_id, record, shown, (draft.caller,))
        return True
