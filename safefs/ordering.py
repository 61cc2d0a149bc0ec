"""Publishes that RELEASE started: nobody waits for their request, yet nothing that came after may overtake them."""

from __future__ import annotations

import trio

from safefs.draft import Draft
from safefs.model import Process
from safefs.namespace import Node


class Publishing:
    """One publish on its way."""

    __slots__ = ("directory", "done", "name", "process")

    def __init__(self, directory: Node, name: bytes, process: Process | None) -> None:
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

    def __bool__(self) -> bool:
        return bool(self._publishing)

    def __len__(self) -> int:
        return len(self._publishing)

    def begin(self, draft: Draft) -> Publishing:
        """To be called when the RELEASE is received, before any later request is."""
        publishing = Publishing(draft.directory, draft.name, draft.opener)
        self._publishing[publishing] = None
        return publishing

    def end(self, publishing: Publishing) -> None:
        self._publishing.pop(publishing, None)
        publishing.done.set()

    async def wait_name(self, directory: Node | None, name: bytes) -> None:
        """Until no earlier publish of this name is on its way."""
        for publishing in list(self._publishing):
            if publishing.directory is directory and publishing.name == name:
                await publishing.done.wait()

    async def wait_directory(self, directory: Node) -> None:
        for publishing in list(self._publishing):
            if publishing.directory is directory:
                await publishing.done.wait()

    async def wait_process(self, process: Process | None, before: Publishing | None = None) -> None:
        """Until everything that the process (or its session) closed before is visible."""
        for publishing in list(self._publishing):
            if publishing is before:
                return
            if process is None or publishing.concerns(process):
                await publishing.done.wait()
