"""Two small synchronisers for trio: a gate that writers pass and a publish closes, and locks that are found by key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import trio


class Gate:
    """Many pass at once; one can close it, waits until all are through, and then is alone."""

    __slots__ = ("_alone", "_condition", "_inside", "preparing")

    def __init__(self) -> None:
        self.preparing = trio.Lock()  # for what the first of those that pass does for all
        self._condition = trio.Condition()
        self._inside = 0
        self._alone = False

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        async with self._condition:
            while self._alone:
                await self._condition.wait()
            self._inside += 1
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with self._condition:
                    self._inside -= 1
                    self._condition.notify_all()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        async with self._condition:
            while self._alone or self._inside:
                await self._condition.wait()
            self._alone = True
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with self._condition:
                    self._alone = False
                    self._condition.notify_all()


class KeyedLocks:
    """A lock per key, kept only while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[Hashable, tuple[trio.Lock, int]] = {}

    @asynccontextmanager
    async def holding(self, key: Hashable) -> AsyncIterator[None]:
        lock, users = self._locks.get(key, (None, 0))
        if lock is None:
            lock = trio.Lock()
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)
