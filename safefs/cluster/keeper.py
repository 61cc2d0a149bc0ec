"""Keeps this node's lease, and says so when it is lost.

Between the end of a lease and the moment in which this node notices, nothing may be done under it: whoever acts on a
lock asks `OwnLease.holds` (through `LockBackend.lease_ends`) himself.  What the keeper adds is the way back: everything
that was held is given up, and the node joins again under a new name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import trio

from safefs.cluster.backend import BackendError, LeaseLostError, LockBackend
from safefs.cluster.problems import LEASE, Problems
from safefs.lease import Terms, boottime

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 2.0)  # between attempts to join or renew that failed, at first and at most


async def _at_once() -> bool:
    return True


class Keeper:
    """The lease of one node; `on_lost` is called once for each that is lost, `on_joined` for each new one."""

    def __init__(
        self,
        backend: LockBackend,
        terms: Terms,
        on_joined: Callable[[], None],
        on_lost: Callable[[str], None],
        problems: Problems | None = None,
    ) -> None:
        self._backend = backend
        self._terms = terms
        self._on_joined = on_joined
        self._on_lost = on_lost
        self._problems = problems or Problems()
        self.before_rejoin: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint  # BackendError: not now
        # Whether nothing is on its way any more that was begun under the lease: else the lease ends by itself.
        self.has_ended: Callable[[], Awaitable[bool]] = _at_once
        self.problem: BackendError | None = None  # why there is no lease; None: no attempt to get one has failed

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once there is a first lease.  BackendError where this node is not let in."""
        await self._join(is_first=True)
        task_status.started()
        try:
            while True:
                reason = await self._keep()
                log.error("the lease of this node is lost: %s", reason)
                self._problems.note(LEASE, f"no lease since one was lost: {reason}")
                self._on_lost(reason)
                await self._join()
        finally:
            with trio.CancelScope(shield=True):
                if await self.has_ended():
                    with trio.move_on_after(RETRY_SECONDS[1]):
                        await self._leave()
                else:
                    log.warning("the backing has not answered everything: others wait until this node's lease is over")

    async def _join(self, *, is_first: bool = False) -> None:
        pause, longest = RETRY_SECONDS
        while True:
            try:
                if not is_first:
                    await self.before_rejoin()
                await self._backend.join()
            except BackendError as error:
                self._problems.note(LEASE, f"no lease: {error}")
                self.problem = error
                if is_first and error.is_final:  # later there is a mount that is better off when it is let in again
                    raise
                await trio.sleep(pause)
                pause = min(2 * pause, longest)
            else:
                log.info("this node is %s", self._backend.node)
                self.problem = None
                self._problems.over(LEASE)
                self._on_joined()
                return

    async def _keep(self) -> str:
        """Renew until the lease is lost; why it is."""
        pause = self._terms.renew_seconds
        while True:
            await trio.sleep(pause)
            try:
                await self._renew()
            except LeaseLostError as error:
                return str(error)
            except BackendError as error:
                self._problems.note(LEASE, f"the lease could not be renewed: {error}")
                if boottime() >= self._backend.lease_ends():
                    return "it could not be renewed in time"
                pause = RETRY_SECONDS[0]
            else:
                self._problems.over(LEASE)
                pause = self._terms.renew_seconds

    async def _renew(self) -> None:
        """BackendError where there is no answer before the lease ends: that has to be noticed in time."""
        left = self._backend.lease_ends() - boottime()
        with trio.move_on_after(left if left > 0 else math.inf) as scope:
            await self._backend.renew()
        if scope.cancelled_caught:
            raise BackendError("there was no answer")

    async def _leave(self) -> None:
        try:
            await self._backend.leave()
        except BackendError as error:
            log.info("the lease ends by itself: %s", error)
