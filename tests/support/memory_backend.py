"""A backend in the memory of one process, for tests that put several nodes into it."""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from safefs.cluster.backend import LeaseLostError, ProcessIdentity, Stored
from safefs.cluster.record import NameRecord


@dataclass
class MemoryCluster:
    """What the nodes share."""

    records: dict[str, Stored] = field(default_factory=dict)
    notices: defaultdict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    answers: dict[tuple[str, str], str] = field(default_factory=dict)  # by node and question
    ended: set[str] = field(default_factory=set)  # nodes whose leases are over
    changed: trio.Event = field(default_factory=trio.Event)
    _last_version: int = 0

    def tell(self) -> None:
        """Wake everybody who waits for something."""
        self.changed.set()
        self.changed = trio.Event()

    def new_version(self) -> int:
        self._last_version += 1
        return self._last_version


@dataclass
class MemoryFollower:
    """One record (backend.Follower)."""

    cluster: MemoryCluster
    name: str

    async def next_change(self, seen: Stored, seconds: float, _turns: int = 0) -> Stored | None:
        with trio.move_on_after(seconds):
            while (stored := self.cluster.records.get(self.name, Stored())).version == seen.version:
                await self.cluster.changed.wait()
            return stored
        return None

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class MemoryBackend:
    """One node's view (backend.LockBackend)."""

    tells_changes = True

    def __init__(self, cluster: MemoryCluster, node: str) -> None:
        self._cluster = cluster
        self.node = node

    async def join(self) -> None:
        """One more node, under another name if there was one."""
        await trio.lowlevel.checkpoint()
        if self.node in self._cluster.ended:
            self.node = f"{self.node}'"

    async def renew(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.node in self._cluster.ended:
            raise LeaseLostError("another node has ended the lease")

    async def leave(self) -> None:
        await trio.lowlevel.checkpoint()
        self._cluster.ended.add(self.node)
        self._cluster.tell()

    async def read(self, name: str) -> Stored:
        await trio.lowlevel.checkpoint()
        return self._cluster.records.get(name, Stored())

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        await trio.lowlevel.checkpoint()
        records = self._cluster.records
        if records.get(name, Stored()).version != old.version:
            return None
        records.pop(name, None)
        stored = Stored()
        if new:
            kept = NameRecord.from_json(json.loads(json.dumps(new.to_json())))  # as on a disk: shared with nobody
            stored = records[name] = Stored(self._cluster.new_version(), kept)
        self._cluster.tell()
        return stored

    async def discard(self, name: str, stored: Stored) -> None:
        await trio.lowlevel.checkpoint()
        assert not stored.record, name  # nothing is left of empty records here

    async def is_current(self, name: str, stored: Stored) -> bool:
        return (await self.read(name)).version == stored.version

    def follow(self, name: str) -> MemoryFollower:
        return MemoryFollower(self._cluster, name)

    async def notify(self, node: str, name: str) -> None:
        await trio.lowlevel.checkpoint()
        if name not in self._cluster.notices[node]:
            self._cluster.notices[node].append(name)
        self._cluster.tell()

    def expect_notices(self) -> None:
        """They are told."""

    def rest(self, rests: bool) -> None:
        """There is nothing to rest from."""

    async def next_notice(self) -> str:
        while not self._cluster.notices[self.node]:
            await self._cluster.changed.wait()
        await trio.lowlevel.checkpoint()
        return self._cluster.notices[self.node].popleft()

    async def answer(self, question: str, text: str) -> None:
        await trio.lowlevel.checkpoint()
        self._cluster.answers[self.node, question] = text

    async def take_answer(self, node: str, question: str) -> str | None:
        await trio.lowlevel.checkpoint()
        return self._cluster.answers.pop((node, question), None)

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        await trio.lowlevel.checkpoint()
        return set(nodes) & self._cluster.ended

    async def tidy_up(self) -> None:
        """Nothing stays."""
        await trio.lowlevel.checkpoint()

    async def all_names(self) -> list[str]:
        await trio.lowlevel.checkpoint()
        return list(self._cluster.records)

    async def some_names(self, most: int) -> list[str]:
        await trio.lowlevel.checkpoint()
        return random.sample(list(self._cluster.records), min(most, len(self._cluster.records)))

    async def process_of(self, node: str) -> ProcessIdentity:
        await trio.lowlevel.checkpoint()
        return {"host": node}

    def lease_ends(self) -> float:
        return float("-inf") if self.node in self._cluster.ended else float("inf")
