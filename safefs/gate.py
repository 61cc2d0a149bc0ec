"""Small synchronisers: a gate that writers pass and a publish closes, locks found by key, one sync that serves many."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio


class Gate:
    """Many pass at once; one can close it, waits until all are through, and then is alone."""

    __slots__ = ("_alone", "_condition", "_inside", "preparing", "writing")

    def __init__(self) -> None:
        self.preparing = trio.Lock()  # for what the first of those that pass does for all
        self.writing = trio.Lock()  # for what those that pass do one after the other
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


@dataclass(slots=True)
class _Syncs:
    users: int = 0
    begun: int = 0
    done: int = 0  # number of the last one that went well
    running: bool = False


class GroupSync:
    """Runs a sync for all who ask while one is under way: the next one, which begins after they asked, serves them.

    For threads.  What holds for fsync(2): a sync that began after a change has it on disk when it returns.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._syncs: dict[Hashable, _Syncs] = {}

    def sync(self, key: Hashable, function: Callable[[], None]) -> None:
        """Return once a call of `function` for this key that began after this one has ended well; raises its error."""
        with self._changed:
            syncs = self._syncs.setdefault(key, _Syncs())
            syncs.users += 1
            wanted = syncs.begun + 1
        try:
            self._wait_or_run(syncs, wanted, function)
        finally:
            with self._changed:
                syncs.users -= 1
                if not syncs.users:
                    del self._syncs[key]

    def _wait_or_run(self, syncs: _Syncs, wanted: int, function: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not syncs.running or syncs.done >= wanted)
            if syncs.done >= wanted:
                return
            syncs.running = True
            syncs.begun += 1
            number = syncs.begun
        try:
            function()
        except BaseException:
            number = 0
            raise
        finally:
            with self._changed:
                syncs.running = False
                syncs.done = max(syncs.done, number)
                self._changed.notify_all()
