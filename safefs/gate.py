"""Small synchronisers: a gate that writers pass and a publish closes, locks found by key, one sync that serves many."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio


class Gate:
    """Many pass at once; one can close it, waits until all are through, and then is alone.

    Who need not wait does not give up his turn on the event loop either: that would cost more than what is done inside.
    """

    __slots__ = ("_alone", "_inside", "_waiting", "preparing", "writing")

    def __init__(self) -> None:
        self.preparing = trio.Lock()  # for what the first of those that pass does for all
        self.writing = trio.Lock()  # for what those that pass do one after the other
        self._waiting = trio.lowlevel.ParkingLot()
        self._inside = 0
        self._alone = False

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        await self.opened()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._waiting.unpark_all()

    @property
    def is_closed(self) -> bool:
        return self._alone

    async def opened(self) -> None:
        """Until nobody has it closed, as far as is known now."""
        while self._alone:
            await self._waiting.park()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        while self._alone or self._inside:
            await self._waiting.park()
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
            self._waiting.unpark_all()


class KeyedLocks:
    """A lock per key, kept only while somebody holds or awaits it; given on in the order in which it was asked for."""

    def __init__(self) -> None:
        self._held: dict[Hashable, trio.lowlevel.ParkingLot] = {}  # who waits for it

    @asynccontextmanager
    async def holding(self, key: Hashable) -> AsyncIterator[None]:
        waiting = self._held.get(key)
        if waiting is None:
            waiting = self._held[key] = trio.lowlevel.ParkingLot()
        else:
            await waiting.park()  # whoever holds it gives it on
        try:
            yield
        finally:
            if waiting:
                waiting.unpark()
            else:
                del self._held[key]


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
