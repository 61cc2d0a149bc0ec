"""A backend of which answers are late or get lost, for tests that draw by lot what happens."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from safefs.cluster.backend import BackendError, Stored
from safefs.cluster.record import NameRecord
from tests.support.memory_backend import MemoryBackend, MemoryCluster, MemoryFollower


class FaultyBackend(MemoryBackend):
    """Answers come late, and some not at all: of a swap that was carried out, was not, or will be later."""

    def __init__(self, cluster: MemoryCluster, node: str, chance: random.Random, share: float) -> None:
        super().__init__(cluster, node)
        self._chance = chance
        self._share = share  # of the calls that fail, and of the notices that are lost
        self.calls = 0

    async def _may_fail(self) -> None:
        self.calls += 1
        await trio.sleep(self._chance.random() / 100)
        if self._chance.random() < self._share:
            raise BackendError("no answer")

    async def read(self, name: str) -> Stored:
        await self._may_fail()
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        await self._may_fail()
        if self._chance.random() < self._share / 2:
            trio.lowlevel.spawn_system_task(self._swap_later, name, old, new)
            raise BackendError("no answer in time")
        stored = await super().swap(name, old, new)
        await self._may_fail()
        return stored

    async def _swap_later(self, name: str, old: Stored, new: NameRecord) -> None:
        await trio.sleep(self._chance.random())
        await super().swap(name, old, new)

    async def is_current(self, name: str, stored: Stored) -> bool:
        await self._may_fail()
        return await super().is_current(name, stored)

    def follow(self, name: str) -> MemoryFollower:
        return FaultyFollower(self._cluster, name, self._may_fail)

    async def notify(self, node: str, name: str) -> None:
        if self._chance.random() > self._share:  # notices are lost without a word
            await super().notify(node, name)


@dataclass
class FaultyFollower(MemoryFollower):
    """What is told comes late, and sometimes it is said that nothing can be told."""

    may_fail: Callable[[], Awaitable[None]]

    async def next_change(self, seen: Stored, seconds: float, turns: int = 0) -> Stored | None:
        stored = await super().next_change(seen, seconds)
        await self.may_fail()
        return stored
