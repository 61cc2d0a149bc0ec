"""What nodes have left that are gone, or died in the middle: it is ended, and removed, by those that live.

Some of the others are looked at each time: of a thousand nodes, each would else look at a thousand.  Nodes that do not
renew are ended, as by who waits for them: so also those of hosts that never come back have ended at some time, and are
buried a day later.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from safefs.cluster.backend import BackendError
from safefs.cluster.calls import Call, batches
from safefs.cluster.files import ENDED, GONE, LOOK, Files
from safefs.lease import Sightings, boottime

LOOKED_AT_ONCE = 10  # nodes, for what they have left
MOST_FORMER = 10  # names of this node, which are looked at each time
MOST_UNFINISHED = 100
MOST_HOMES = 10_000  # directories of names of which it is remembered that they were there
BURIED_SECONDS = 86400.0  # after that long nobody looks for an ended node any more


class Remains:
    """The blocking half."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def others(self, node: str) -> list[str]:
        """All other nodes that have left anything; what dead ones have left beside them is removed."""
        before = self.long_ago(node)
        for part in ("nodes", "names"):
            self._remove_looks(self._files.path(part), before)
        return [other for other in self._files.nodes() if other != node]

    def end_the_dead(self, others: Iterable[str]) -> None:
        """Those of them whose processes are known to have died."""
        for other in others:
            if self._files.has_died(other) and (heartbeat := self._files.heartbeat(other)) not in (None, ENDED):
                self._files.end(other, str(heartbeat))

    def bury(self, node: str, others: Iterable[str]) -> None:
        """Remove what is left of nodes that are gone, and have been for long."""
        now = self._now(node)
        for other in others:
            home, heartbeat = self._files.path("nodes", other), self._files.heartbeat(other)
            with suppress(OSError):
                if heartbeat in (None, ENDED):
                    ended = os.stat(home if heartbeat is None else f"{home}/{ENDED}").st_ctime
                    if now - ended > BURIED_SECONDS:
                        self._files.remove_node(other)

    def _now(self, node: str) -> float:
        """By the filesystem's clock: it renamed this node's own heartbeat just now."""
        home = self._files.path("nodes", node)
        return os.stat(f"{home}/{self._files.heartbeat(node)}").st_ctime

    def unfinished(self) -> list[str]:
        """First states of names that are not in their place yet."""
        return self._files.listed(self._files.path("new"))[:MOST_UNFINISHED]

    def remove_unfinished(self, entry: str) -> None:
        """Whoever is about to rename it finds that it is gone, and not that a part of it is."""
        path = self._files.path("new", entry)
        over = path if entry.startswith(GONE) else self._files.path("new", f"{GONE}~{entry}")
        with suppress(OSError):
            os.rename(path, over)
            self._files.clear(over)

    def long_ago(self, node: str) -> float:
        """What nobody has changed since then is left, by the filesystem's clock."""
        return self._now(node) - BURIED_SECONDS

    @staticmethod
    def _remove_looks(directory: str, before: float) -> None:
        """What nodes have left that died while they had their client look anew."""
        for entry in os.listdir(directory):
            path = f"{directory}/{entry}"
            with suppress(OSError):
                if entry.startswith(LOOK) and os.stat(path).st_ctime < before:
                    os.unlink(path)


class Housekeeping:
    """One node's part in it."""

    def __init__(
        self, files: Files, call: Call, gone: Callable[[Iterable[str]], Awaitable[set[str]]], sightings: Sightings
    ) -> None:
        self._files = files
        self._remains = Remains(files)
        self._call = call
        self._gone = gone
        self._sightings = sightings
        self._former: list[str] = []  # this node's names, with the one that it has
        self._known, self._unfinished = set[str](), set[str]()  # nodes and first states, as listed last
        self._to_look_at: list[str] = []
        self._homes: list[str] = []  # of names, which are still to be looked at
        self._tidied_as = ""

    def joins(self, node: str) -> None:
        """This node tries to join under a name; that it did may not become known."""
        self._former = [*self._former[-MOST_FORMER:], node]

    async def tidy_up(self, node: str) -> None:
        """Some of it, for who is `node` now.  The first time it is about those before this one on its host."""
        if self._tidied_as != node:
            others, self._tidied_as = await self._call(self._remains.others, node), node
            for some in batches(others):
                await self._call(self._remains.end_the_dead, some)
        if not self._to_look_at:
            self._to_look_at = await self._call(self._remains.others, node)
            random.shuffle(self._to_look_at)
            self._sightings.forget(self._known - set(self._to_look_at))
            self._known = set(self._to_look_at)
        due, self._to_look_at = self._to_look_at[:LOOKED_AT_ONCE], self._to_look_at[LOOKED_AT_ONCE:]
        own = {former for former in self._former if former != node}  # lost, or it was not known that it had joined
        gone = await self._gone({*due, *own})
        self._former = [former for former in self._former if former not in gone]
        await self._call(self._remains.bury, node, gone)
        await self._remove_unfinished()

    async def some_names(self, node: str, most: int) -> list[str]:
        """Some of those that have records, for who is `node` now."""
        if not self._homes:
            homes = await self._call(self._files.homes)
            self._homes = random.sample(homes, min(len(homes), MOST_HOMES))
        due, self._homes = self._homes[:most], self._homes[most:]
        found: list[str] = []
        before = await self._call(self._remains.long_ago, node) if due else 0.0
        for home in due:
            with suppress(BackendError):  # one that hangs, or cannot be read, is nobody else's affair
                await self._call(self._files.discard_empty, home, before)
                found += await self._call(self._files.names_of, [home])
        return found

    async def _remove_unfinished(self) -> None:
        """What nodes have left that died while they made a name's first state."""
        before = boottime()
        entries = await self._call(self._remains.unfinished)
        keys = {f"new/{entry}": entry for entry in entries}
        self._sightings.forget(self._unfinished - keys.keys())
        self._unfinished = set(keys)
        for key, entry in keys.items():
            if self._sightings.see(key, entry, before, boottime()):
                await self._call(self._remains.remove_unfinished, entry)
