"""Publishes that RELEASE started: nobody waits for their request, yet nothing that came after may overtake them."""

from __future__ import annotations

from collections.abc import Callable

import trio

from safefs.draft import Draft
from safefs.model import Process
from safefs.namespace import Node


class Publishing:
    """One publish on its way."""

    __slots__ = ("directory", "done", "name", "number", "process")

    def __init__(self, number: int, directory: Node, name: bytes, process: Process | None) -> None:
        self.number = number
        self.directory = directory
        self.name = name
        self.process = process
        self.done = trio.Event()

    def concerns(self, process: Process) -> bool:
        """Whether the process, or another of its session, closed the file.

        A script's `cmd > file; touch STABLE` runs each command in a process of its own; the session is what they
        have in common.
        """
        mine = self.process
        if mine is None:
            return True
        return process.tgid == mine.tgid or (process.session != 0 and process.session == mine.session)


class Ordering:
    """The publishes on their way, oldest first."""

    def __init__(self) -> None:
        self._publishing: dict[Publishing, None] = {}
        self._last = 0

    def __bool__(self) -> bool:
        return bool(self._publishing)

    def __len__(self) -> int:
        return len(self._publishing)

    def begin(self, draft: Draft) -> Publishing:
        """To be called when the RELEASE is received, before any later request is."""
        self._last += 1
        publishing = Publishing(self._last, draft.directory, draft.name, draft.opener)
        self._publishing[publishing] = None
        return publishing

    def end(self, publishing: Publishing) -> None:
        self._publishing.pop(publishing, None)
        publishing.done.set()

    async def wait_name(self, directory: Node | None, name: bytes) -> None:
        """Until no earlier publish of this name is on its way."""
        await self._wait(lambda publishing: publishing.directory is directory and publishing.name == name)

    async def wait_directory(self, directory: Node) -> None:
        await self._wait(lambda publishing: publishing.directory is directory)

    async def wait_process(self, process: Process | None, before: Publishing | None = None) -> None:
        """Until everything that the process (or its session) closed before is visible."""
        await self._wait(lambda publishing: process is None or publishing.concerns(process), before)

    async def _wait(self, concerns: Callable[[Publishing], bool], before: Publishing | None = None) -> None:
        """For the newest first: the others are done by then as a rule.

        With the oldest first each publish would wake all that wait; a process that dies with thousands of open files
        makes as many wait for each other.
        """
        last = self._last if before is None else before.number - 1
        while (publishing := self._newest(concerns, last)) is not None:
            await publishing.done.wait()

    def _newest(self, concerns: Callable[[Publishing], bool], last: int) -> Publishing | None:
        earlier = (publishing for publishing in reversed(self._publishing) if publishing.number <= last)
        return next(filter(concerns, earlier), None)
