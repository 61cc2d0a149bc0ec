"""What closing a file does: FLUSH, RELEASE, and the end of drafts.

Guaranteed: a draft is published by the FLUSH that is provably its last close, else by the RELEASE of its last handle
that can write, else (a mapping outlived them all) when that mapping ends; a killed writer publishes nothing.

Of a draft whose writes pass through the kernel the daemon sees none.  Its inode must be nobody's to write to once a
name shows it: while somebody still can, a copy is published, and what he writes is published by his own close.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace

import trio

from safefs import backing, processes
from safefs.draft import Base, Decision, Draft, DraftState, FlushFacts, decide_flush
from safefs.errors import SafefsError
from safefs.filesystem import FileSystem, Handle, failure
from safefs.identity import DAEMON
from safefs.lingering import Lingering
from safefs.model import Caller, Closer
from safefs.ordering import Publishing
from safefs.rules import NameClass

log = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
MAPS_SECONDS = 0.1  # for a look at a process's mappings, which can be waiting for the very FLUSH (processes.py)
FPUT_SECONDS = (0.001, 0.004, 0.016)  # the kernel closes a passed-through file a moment after it sends RELEASE
KEEPING_SECONDS = 10.0  # for what goes to quarantine at the end, after publishes have had their time
MAPPED_SECONDS = (0.005, 1.0)  # between looks whether a mapping has ended, at first and at most


class Closing:
    """The closes of one mount."""

    def __init__(self, filesystem: FileSystem, nursery: trio.Nursery, unlock: Callable[[int], None]) -> None:
        self.fs = filesystem
        self._nursery = nursery
        self._unlock = unlock  # what was locked through a file handle
        self._lingering = Lingering(filesystem, nursery, self._detach)
        self._settling: list[trio.CancelScope] = []
        self._drained_by = math.inf  # trio.current_time()

    # -------------------------------------------------------------- FLUSH

    async def flush(self, handle: Handle, tid: int) -> None:
        """A copy of a descriptor was closed: publish if it was provably the last one that can write."""
        draft = handle.draft
        if draft is None or not handle.writable:
            return
        await draft.gate.opened()  # what another close is publishing is also what was written before this one
        if draft.pending:
            draft.flushes += 1
            try:
                await self._flush_pending(handle, draft, tid)
            finally:
                draft.flushes -= 1
        if draft.state is DraftState.QUARANTINED and draft.error:
            raise failure(draft.error)
        if self.fs.is_fenced(handle):  # also where it is not known yet whether this was the last close
            raise failure(errno.EIO)

    async def _flush_pending(self, handle: Handle, draft: Draft, tid: int) -> None:
        fs = self.fs
        tgid, decision = await self._decide(handle, draft, tid)
        if draft.closer in (Closer.ALIVE, Closer.EXITED):
            draft.flushed = True
        for seconds in LOOK_AGAIN_SECONDS:
            if decision is not Decision.LOOK_AGAIN:
                break
            await trio.sleep(seconds)
            tgid, decision = await self._decide(handle, draft, tid)
        if decision is Decision.PUBLISH:
            mapped = await self._maps(draft, tgid)
            if mapped is not None:
                await fs.wait_turn(Caller(draft.caller.uid, draft.caller.gid, tid))
                await fs.publisher.publish(draft, keep_private=mapped)
                draft.closed = True
                if draft.unseen and draft.state is DraftState.PUBLISHED:
                    self._lingering.expect_release(handle, draft, tid)

    async def _decide(self, handle: Handle, draft: Draft, tid: int) -> tuple[int, Decision]:
        """The process that closes, and what its FLUSH does."""
        seen = await self.fs.look(
            self._look, tid, handle.opener_tgid, draft.writers > 1, draft.shown_ino, self.fs.device
        )
        if seen is None:
            draft.closer = Closer.UNKNOWN
            return 0, Decision.WAIT
        tgid, facts = seen
        draft.closer = facts.closer
        # Another writer may have come during the look.
        return tgid, decide_flush(replace(facts, other_writers=draft.writers > 1))

    @staticmethod
    def _look(tid: int, opener_tgid: int, other_writers: bool, ino: int, device: str) -> tuple[int, FlushFacts]:
        tgid, closer = processes.closer_of(tid)
        facts = FlushFacts(closer, tgid != 0 and tgid == opener_tgid, other_writers)
        if decide_flush(facts) is Decision.WAIT:
            return tgid, facts
        if closer is Closer.ALIVE and processes.holds_writable(tgid, ino, device):
            return tgid, replace(facts, holds_another=True)
        return tgid, replace(facts, descendant_holds=processes.descendant_holds(tgid, ino, device))

    async def _maps(self, draft: Draft, tgid: int) -> bool | None:
        """Whether the process maps a draft that the daemon does not see written; None when that is not known."""
        if not (draft.unseen and draft.mappable) or draft.closer is not Closer.ALIVE:
            return False
        with trio.move_on_after(MAPS_SECONDS):
            return await self.fs.look(processes.maps_writable, tgid, draft.shown_ino)
        return None

    # ------------------------------------------------------------ RELEASE

    def begin_release(self, handle: Handle) -> Publishing | None:
        """The synchronous half of RELEASE, run when the request is received: later requests must not overtake it.

        The other half, `release`, is for handles of drafts.
        """
        draft = handle.draft
        if draft is not None:
            handle.released = True
            draft.handles -= 1
            draft.writers -= handle.writable
            if handle.writable and not draft.writers and (draft.unpublished or draft.detaching):
                draft.reserved += 1
                return self.fs.ordering.begin(draft)
        self._unlock(handle.number)
        if draft is None:
            self.fs.remove_handle(handle)
        return None

    async def release(self, handle: Handle, draft: Draft, publishing: Publishing | None) -> None:
        fs = self.fs
        if publishing is not None:
            try:
                await fs.ordering.wait_process(draft.opener, before=publishing)
                await self._settle_released(draft)
            finally:
                draft.reserved -= 1
                self._unlock(handle.number)  # whoever gets the lock sees what was written under it
                fs.ordering.end(publishing)
        elif handle.writable and self._may_be_mapped(draft):
            draft.reserved += 1
            try:
                await self._keep_mapped_private(draft)
            finally:
                draft.reserved -= 1
        fs.remove_handle(handle)
        await fs.end_draft(draft)

    async def settle(self, draft: Draft, *, keep_private: bool = False) -> None:
        """Nobody has the draft open any more: how the last closer ended decides."""
        publisher = self.fs.publisher
        if draft.closer in (Closer.KILLED, Closer.UNKNOWN):
            await publisher.end_killed(draft)
            return
        try:
            await publisher.publish(draft, keep_private=keep_private)
        except SafefsError as error:
            log.info("a late publish of %r was refused: %s", draft.name, error.message)

    async def finish_publishes(self, seconds: float, pause: float) -> None:
        """The connection is over: wait until no request has published for a while, within the time that `drain` has.

        Who waits for another's publish begins his own after it.
        """
        self._begin_end(seconds)
        publishing = [draft for draft in self.fs.drafts if draft.gate.is_closed]
        while True:
            with trio.move_on_at(self._drained_by):
                for draft in publishing:
                    await draft.gate.opened()
            await trio.sleep(pause)
            publishing = [draft for draft in self.fs.drafts if draft.gate.is_closed]
            if not publishing or trio.current_time() >= self._drained_by:
                return

    def _begin_end(self, seconds: float) -> None:
        """Nothing new is begun from now on, and publishes on their way have so long, in all."""
        self.fs.accepting = False
        self._drained_by = min(self._drained_by, trio.current_time() + seconds)

    async def drain(self, seconds: float, *, all_closed: bool) -> None:
        """The daemon ends: publishes on their way have so long, in all; what is open then is kept, whatever hangs."""
        self._begin_end(seconds)
        if not (self.fs.ordering or any(draft.unpublished or draft.gate.is_closed for draft in self.fs.drafts)):
            return
        with trio.move_on_at(self._drained_by) as in_time:
            await self.fs.ordering.wait_process(None)
            await self.settle_all(all_closed=all_closed).wait()
        if in_time.cancelled_caught:
            log.error("gave up waiting for the backing after %g s of shutdown", seconds)
            with trio.move_on_after(KEEPING_SECONDS):
                await self.settle_all(all_closed=all_closed, in_time=False).wait()

    def settle_all(self, *, all_closed: bool, in_time: bool = True) -> trio.Event:
        """What was closed is published, what is still being written is kept; returns what to wait for.

        `all_closed` says that the mount is gone, so that nothing can be open; the kernel drops RELEASEs then.  Where
        publishes on their way have had their time, and have not come to an end (`in_time`), what was closed after them
        is kept as well, for it must not be seen before them.  Who does not wait any longer does not end it, and neither
        does what ends the daemon, before `give_up`: a publish that is given up lets go of its locks, and may come to
        pass yet.
        """
        done, scope = trio.Event(), trio.CancelScope(shield=True)
        self._settling.append(scope)
        self._nursery.start_soon(self._settle_all, all_closed, in_time, done, scope)
        return done

    def give_up(self) -> None:
        """What is not settled by now stays as it is."""
        for scope in self._settling:
            scope.cancel()

    async def _settle_all(self, all_closed: bool, in_time: bool, done: trio.Event, scope: trio.CancelScope) -> None:
        """What was closed comes one after the other; nothing else waits for anything."""
        closed = list[Draft]()
        with scope:
            async with trio.open_nursery() as nursery:
                for draft in self.fs.drafts:
                    if in_time and draft.flushed and not draft.gate.is_closed:
                        closed.append(draft)
                    elif in_time or not draft.gate.is_closed:
                        nursery.start_soon(self._settle_at_end, draft, all_closed, in_time)
                for draft in closed:
                    await self._settle_at_end(draft, all_closed, in_time)
            done.set()

    async def _settle_at_end(self, draft: Draft, all_closed: bool, in_time: bool) -> None:
        await draft.gate.opened()
        if not draft.pending:
            return
        try:
            if in_time and draft.flushed and (all_closed or not draft.writers):
                await self.settle(draft)
            elif draft.name_class is NameClass.PARTIAL:
                await self.fs.publisher.end_killed(draft)
            else:
                await self.fs.publisher.refuse(draft, "safefs was stopped before it could be published", errno.EIO)
        except Exception as error:  # noqa: BLE001 - a boundary: all others are to be settled as well
            log.error("%r could not be settled at the end: %s", draft.name, error)

    async def drop_temps(self) -> bool:
        """No requests come any more: whether there is nothing left that would have to be found.

        What is being kept at this moment is not unpublished any more, and not in quarantine yet: its gate is closed.
        """
        for draft in self.fs.drafts:
            if not (draft.unpublished or draft.gate.is_closed):
                await self.fs.drop_temp(draft)
        return all(draft.temp_name is None and not draft.unpublished for draft in self.fs.drafts)

    # -------------------------------------- writers that are not seen (passthrough)

    async def _detach(self, draft: Draft) -> None:
        draft.detaching = True
        try:
            async with draft.gate.closed():
                await self.fs.publisher.detach(draft)
        except OSError as error:
            log.warning("%r can be written to although it is published: %s", draft.name, error)
        finally:
            draft.detaching = False

    def _may_be_mapped(self, draft: Draft) -> bool:
        live = draft.state in (DraftState.WRITING, DraftState.PUBLISHED)
        return draft.unseen and draft.mappable and live and not draft.writers

    async def _settle_released(self, draft: Draft) -> None:
        try:
            mapped = self._may_be_mapped(draft) and await self._is_mapped(draft)
            await self.settle(draft, keep_private=mapped)
            if mapped:
                self._await_mapping(draft)
        except Exception as error:  # a boundary: whatever fails, the bytes are kept and the handle goes
            log.exception("publishing %r failed", draft.name)
            await self.fs.publisher.refuse(draft, f"publishing failed: {error!r}", errno.EIO)

    async def _keep_mapped_private(self, draft: Draft) -> None:
        try:
            if await self._is_mapped(draft):
                await self._detach(draft)
                self._await_mapping(draft)
        except Exception as error:  # noqa: BLE001 - a boundary: it is published, and the handle goes
            log.warning("whether %r can be written to although it is published is not known: %s", draft.name, error)

    async def _is_mapped(self, draft: Draft) -> bool:
        """Whether a shared mapping outlives the last handle.  The daemon's own descriptor must not be a writer then."""
        fs = self.fs
        async with draft.gate.closed():
            writable = draft.fd
            try:
                draft.fd = await fs.backing.run_for(draft, backing.reopen, writable, os.O_RDONLY)
            except PermissionError:
                return False  # where root has no rights, and its owner may not read it: that is not to be found out
            if draft.base is not None and draft.base.fd == writable:
                draft.base = Base(draft.fd, draft.base.identity)
            await fs.backing.run(DAEMON, os.close, writable)
            for seconds in FPUT_SECONDS:
                if not await fs.backing.run(DAEMON, backing.is_mapped, draft.fd):
                    return False
                await trio.sleep(seconds)
            return True

    def _await_mapping(self, draft: Draft) -> None:
        draft.reserved += 1
        self._nursery.start_soon(self._watch_mapping, draft)

    async def _watch_mapping(self, draft: Draft) -> None:
        """Publish what a mapping's last stores made of the file once it has ended."""
        seconds, longest = MAPPED_SECONDS
        try:
            while await self.fs.backing.run(DAEMON, backing.is_mapped, draft.fd):
                await trio.sleep(seconds)
                seconds = min(2 * seconds, longest)
            await self.settle(draft)
        except OSError as error:
            log.warning("what was stored in a mapping of %r is not published: %s", draft.name, error)
        finally:
            draft.reserved -= 1
        await self.fs.end_draft(draft)
