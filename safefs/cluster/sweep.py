"""Records of names that nobody asks for any more: what nodes that are gone have on them is freed, and they are removed.

Whoever needs a name finds out by himself that a node on its record is gone.  But programs lock names that they need
once, and what a node had of those when it died would stay for good.  So each node looks at a few records a minute.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import trio

from safefs.cluster.backend import NAMELESS, BackendError, LockBackend

log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
SWEPT_AT_ONCE = 10  # records


class Sweep:
    """One node's part in it: of the names that it does not work on itself."""

    def __init__(
        self,
        backend: LockBackend,
        knows: Callable[[str], bool],
        gone: Callable[[set[str]], Awaitable[set[str]]],
        hear: Callable[[str], None],
    ) -> None:
        """`hear` is told of names of which this node has to hear that what it held is broken."""
        self._backend = backend
        self._knows = knows
        self._gone = gone
        self._hear = hear

    async def run(self, may_act: Callable[[], bool]) -> None:
        """Until cancelled; only while this node has a lease."""
        while True:
            await trio.sleep(SWEEP_SECONDS * random.uniform(0.5, 1.5))  # nodes are often mounted together
            for key in await self._some() if may_act() else ():
                if not key.startswith(NAMELESS) and not self._knows(key):
                    await self._look_at(key)

    async def _some(self) -> list[str]:
        try:
            return await self._backend.some_names(SWEPT_AT_ONCE)
        except BackendError as error:
            log.info("the lock backend: %s", error)
            return []

    async def _look_at(self, key: str) -> None:
        try:
            await self._free(key)
        except BackendError as error:  # whoever needs the name is told
            log.info("the lock backend: %s", error)

    async def _free(self, key: str) -> None:
        stored = await self._backend.read(key)
        if self._backend.node in stored.record.broken:
            self._hear(key)  # it may have got another lock since, as only the one who works on the name can tell
            return
        gone = await self._gone(stored.record.nodes())
        left = stored.record.without(gone)
        if left != stored.record and not self._knows(key):
            swapped = await self._backend.swap(key, stored, left)
            if swapped is not None and not swapped.record:
                await self._backend.discard(key, swapped)
        for node in left.broken:
            await self._backend.notify(node, key)  # whoever broke it may be gone
