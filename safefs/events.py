"""What happened on a backing directory, for people and programs that want to know: one JSON line for each event.

Every daemon writes a file of its own below the state directory, so that nodes never wait for each other; a reader puts
them together by time.  Guaranteed: noting an event never blocks and never fails what it reports; memory and files are
bounded, and what was dropped is said.  Not guaranteed: that the last second survives a daemon that is killed.  What is
in quarantine has its own record.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from safefs.backing import append_lines

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
FILE_BYTES = 8 << 20  # then the file becomes the old one, of which each daemon has one
SUFFIX, OLD_SUFFIX = ".jsonl", ".old.jsonl"


class EventKind(StrEnum):
    """What can happen."""

    PUBLISHED = "published"
    JOINED = "joined"  # a record was added to another's version
    SUPERSEDED = "superseded"  # another's version had all of it already
    CONFLICT = "conflict"
    REFUSED = "refused"
    KILLED = "killed writer"
    PARTIAL_KEPT = "partial kept"  # a killed writer's partial file went back under its name
    LATE_WRITE = "late write"
    LEASE_LOST = "lease lost"  # this node's, and with it all locks that were held through it
    LOCK_BROKEN = "lock broken"  # by an operator
    LOCK_REMOVED = "lock removed"  # a lock file of a process that was killed, or of a node that is gone
    RECOVERED = "recovered"  # what a dead daemon left was settled
    DAMAGED = "damaged"  # scrub took a file away that is not what it was published as, or what its name says
    RESTORED = "restored"
    PURGED = "purged"


Event = dict[str, Any]


def event_of(kind: EventKind, path: str, details: dict[str, Any]) -> Event:
    """An event of this moment on this host."""
    return {"time": round(time.time(), 3), "node": socket.gethostname(), "event": str(kind), "path": path, **details}


def append_events(directory: Path, writer: str, events: list[Event]) -> None:
    """Write events behind those that this writer has written before.  OSError where not all are there.  Blocks."""
    path = directory / f"{writer}{SUFFIX}"
    text = "".join(json.dumps(event) + "\n" for event in events)
    fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        append_lines(fd, text.encode("ascii"))
        full = os.fstat(fd).st_size >= FILE_BYTES
    finally:
        os.close(fd)
    if full:
        path.rename(directory / f"{writer}{OLD_SUFFIX}")


class EventLog:
    """Events of this daemon, gathered on the event loop and written by a worker thread."""

    def __init__(self, directory: Path, writer: str) -> None:
        self._directory, self._writer = directory, writer
        self._waiting: deque[Event] = deque()
        self._dropped = 0

    def note(self, kind: EventKind, path: str, **details: Any) -> None:
        """Never blocks; the oldest go where too many are waiting."""
        self._waiting.append(event_of(kind, path, details))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._dropped += 1

    def taken(self) -> list[Event]:
        """What is waiting, which then waits no more."""
        events = list(self._waiting)
        self._waiting.clear()
        if self._dropped:
            events.insert(0, {"time": time.time(), "event": "dropped", "path": "", "count": self._dropped})
            self._dropped = 0
        return events

    def write(self) -> None:
        """Write what is waiting.  Blocks; in a worker thread, one at a time."""
        events = self.taken()
        if not events:
            return
        try:
            append_events(self._directory, self._writer, events)
        except OSError as error:
            log.warning("of %d events some could not be written: %s", len(events), error)


class EventReader:
    """Reads the events of all writers, and goes on where it stopped.

    The files stay open in between: one that became the old one, or is gone, is read to its end, and its st_ino is not
    given to another one meanwhile.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[tuple[int, int], BinaryIO] = {}  # by st_dev and st_ino

    def read(self) -> list[Event]:
        """What is new, in the order of time.  Raises OSError where the directory cannot be read."""
        for path in self._directory.glob(f"*{SUFFIX}"):
            self._open(path)
        events = [event for file in self._files.values() for event in _new_lines(file)]
        for key in [key for key, file in self._files.items() if not os.fstat(file.fileno()).st_nlink]:
            self._files.pop(key).close()
        return sorted(events, key=lambda event: float(event.get("time", 0)))

    def _open(self, path: Path) -> None:
        try:
            file = open(path, "rb")  # noqa: SIM115 - for as long as it has a name
        except FileNotFoundError:
            return
        status = os.fstat(file.fileno())
        if self._files.setdefault((status.st_dev, status.st_ino), file) is not file:
            file.close()


def _new_lines(file: BinaryIO) -> Iterator[Event]:
    while (line := file.readline()).endswith(b"\n"):
        event = _parsed(line)
        if event is not None:
            yield event
    file.seek(-len(line), os.SEEK_CUR)  # one that is being written


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None  # cut short by a crash
    return event if isinstance(event, dict) else None
