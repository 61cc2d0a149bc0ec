"""Processes that count together under a lock, through whatever happens to them, to their daemons and to the servers.

Each takes the lock of a file on its mount, reads the number in it, writes the next one in place, and notes in a plain
file of its own that it did, once write(2) has succeeded.  So a number is noted once, or two were inside at one time, or
one wrote that had lost its lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import Node
from tests.mount.actors import Actor
from tests.mount.lockers import BLOCK
from tests.support.mounting import wait_until

FILE = "count.db"  # of class shared: written in place
PAUSE_SECONDS = 0.001  # inside
SECONDS = 60.0

# The file is opened for each turn: a mount that has died fails, and a new daemon brings a new one.
LOOP = r"""
def count(path, block, notes, stop, pause):
    with open(notes, "ab", 0) as notes:
        while not os.path.exists(stop):
            try:
                fd = os.open(path, os.O_RDWR)
            except OSError:
                time.sleep(0.05)
                continue
            try:
                eval(block, {**globals(), "fd": fd})
                number = int(os.pread(fd, 20, 0)) + 1
                time.sleep(pause)
                os.pwrite(fd, b"%020d" % number, 0)
                notes.write(b"%d\n" % number)
            except OSError:
                time.sleep(0.05)
            finally:
                try:
                    os.close(fd)
                except OSError:
                    pass
"""


@dataclass
class Counter:
    """One process that counts, on one node."""

    node: Node
    kind: str
    notes: Path
    process: Actor

    def progress(self) -> int:
        return self.notes.stat().st_size if self.notes.exists() else 0


@dataclass
class Count:
    """All that count on one backing directory."""

    place: Path  # a plain directory
    backing: Path
    parties: Callable[[], Actor]
    counters: list[Counter] = field(default_factory=list)
    _made: int = 0

    def __post_init__(self) -> None:
        (self.backing / FILE).write_bytes(b"%020d" % 0)

    @property
    def _stop(self) -> Path:
        return self.place / "stop"

    def add(self, node: Node, kind: str) -> Counter:
        self._made += 1
        counter = Counter(node, kind, self.place / f"notes{self._made}", self.parties())
        counter.process(LOOP)
        counter.process.start(
            "count(path, block, notes, stop, pause)",
            path=os.fspath(node / FILE),
            block=BLOCK[kind],
            notes=os.fspath(counter.notes),
            stop=os.fspath(self._stop),
            pause=PAUSE_SECONDS,
        )
        self.counters.append(counter)
        return counter

    def remove(self, counter: Counter, signal_number: int) -> None:
        self.counters.remove(counter)
        counter.process.kill(signal_number)

    def goes_on(self, nodes: list[Node], seconds: float) -> bool:
        """Whether everybody on these nodes counts on within this time."""
        before = [(counter, counter.progress()) for counter in self.counters if counter.node in nodes]
        assert before
        return wait_until(lambda: all(counter.progress() > noted for counter, noted in before), seconds)

    def run(self, nodes: list[Node], rounds: int, seconds: float) -> list[int]:
        """Count on all nodes until everybody has gone on so often, each time within so long; what they wrote."""
        for node in nodes:
            for kind in ("fcntl", "ofd"):
                self.add(node, kind)
        for _ in range(rounds):
            assert self.goes_on(nodes, seconds)
        self.stop()
        return self.noted()

    def stop(self) -> None:
        self._stop.touch()
        while self.counters:
            self.counters.pop().process.result(SECONDS)

    def noted(self) -> list[int]:
        """All numbers that somebody wrote."""
        files = self.place.glob("notes*")
        return [int(line) for path in files for line in path.read_text().splitlines()]

    def reached(self) -> int:
        """Beside the mounts.

        A client of Gluster goes on showing the bytes that it has written itself, whatever others have written since and
        however often it is opened, until its kernel lets go of them.
        """
        with open(self.backing / FILE, "rb", 0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return int(file.read())
