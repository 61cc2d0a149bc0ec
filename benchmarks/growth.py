"""What grows: time and memory with the number of files that a mount knows, and with the number of mounts.

Every walk has a mount of its own, so that its daemon starts from nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fixtures, machine
from benchmarks.client import Client, Job
from benchmarks.errors import MeasureFailedError, SystemFailedError
from benchmarks.measures import CROWDS, WALKS
from benchmarks.mounts import LiveMount, memory_bytes
from benchmarks.results import Crowd, Run, Walk
from benchmarks.rounds import rotated
from benchmarks.scale import Scale
from benchmarks.systems import Place, Profile, System

SETTLE_SECONDS = 30
LOOK_SECONDS = 0.2
# Shares of the memory that may change, and of a processor that may be used, between two looks at a daemon that rests.
SETTLED = 0.01
BUSY = 0.2
# Trees are made through a mount at some hundred files a second.
MAKE_SECONDS = 900


@dataclass
class Growth:
    """Both series.  `tell` hears what is being done, `advance` that one step is over."""

    place: Place
    run: Run
    scale: Scale
    client: Client
    systems: Sequence[System]
    tell: Callable[[str], None]
    advance: Callable[[], None]

    def go(self, wanted: set[str]) -> None:
        if WALKS in wanted:
            for number, files in enumerate(self.scale.walk_sizes):
                self._series(WALKS, number, files, self._walk)
        if CROWDS in wanted:
            for number, mounts in enumerate(self.scale.mount_counts):
                self._series(CROWDS, number, mounts, self._crowd)

    def steps(self, wanted: set[str]) -> int:
        sizes = {WALKS: self.scale.walk_sizes, CROWDS: self.scale.mount_counts}
        return len(self.systems) * sum(len(sizes[series]) for series in wanted)

    def _series(self, series: str, number: int, size: int, step: Callable[[System, int], None]) -> None:
        """One size on all systems."""
        for system in rotated(self.systems, number):
            self.tell(f"{series}: {size:,} on {system.name}")
            if system.name not in self.run.left_out:
                try:
                    step(system, size)
                except MeasureFailedError as error:
                    self.run.notes.append(f"{series}, {size:,} on {system.name}: {error}")
            self.advance()

    def _walk(self, system: System, files: int) -> None:
        self._check_time(system, files)
        with system.mounted(self.place, Profile.DEFAULT, self._backing(files)) as mount:
            tree = self._tree(system, mount, files)
            # All start alike: neither the kernel nor a daemon through which the tree was made knows its inodes.
            machine.forget_inodes()
            # The first request makes the daemon whole: caches, threads.
            self._run_walk([mount], [tree], files=0)
            before = self._settled_memory(mount)
            seconds = self._run_walk([mount], [tree], files)
            walked = mount.memory_bytes()
            machine.forget_inodes()
            forgotten = self._settled_memory(mount)
        self.run.walks.append(Walk(system.name, files, seconds, before, walked, forgotten))

    def _check_time(self, system: System, files: int) -> None:
        earlier = [walk for walk in self.run.walks if walk.system == system.name]
        if not system.shares and files > self.scale.made_files:
            raise MeasureFailedError(f"not tried: more than {self.scale.made_files:,} files take too long to make")
        if earlier and earlier[-1].seconds * files / earlier[-1].files > self.scale.walk_seconds:
            raise MeasureFailedError(f"not tried: it would take more than {self.scale.walk_seconds:g} s")

    def _crowd(self, system: System, mounts: int) -> None:
        files = self.scale.crowd_files
        with ExitStack() as stack:
            backing = self._backing(files)
            crowd = [stack.enter_context(system.mounted(self.place, Profile.DEFAULT, backing)) for _ in range(mounts)]
            trees = [self._tree(system, mount, files) for mount in crowd]
            seconds = self._run_walk(crowd, trees, files)
            used = _memory(crowd)
        self.run.crowds.append(Crowd(system.name, mounts, seconds, used))

    def _backing(self, files: int) -> Path:
        """A directory with nothing but a tree of so many files."""
        backing = self.place.directory(f"growth-{files}")
        if not (backing / "tree").exists():
            self.tell(f"making {files:,} files")
            fixtures.make_tree(backing / "tree", files)
        return backing

    def _tree(self, system: System, mount: LiveMount, files: int) -> Path:
        """The tree as the mount shows it."""
        if system.shares:
            return mount.path / "tree"
        tree = mount.path / f"growth-{files}"
        with mount.watched(MAKE_SECONDS):
            try:
                if not tree.exists():
                    fixtures.make_tree(tree, files)
            except OSError as error:
                raise SystemFailedError(f"{files:,} files could not be made: {error.strerror}") from None
        return tree

    def _run_walk(self, mounts: Sequence[LiveMount], trees: Sequence[Path], files: int) -> float:
        """Walk the trees at the same time, or only list their tops if there are no files to see; seconds."""
        job = Job("walk" if files else "list", processes=len(trees), steps=1)
        limit = max(self.scale.turn_seconds, 3 * self.scale.walk_seconds)
        try:
            return self.client.run(job, trees, lambda: 0.0, limit).seconds
        except SystemFailedError:
            for mount in mounts:
                mount.abort()
            raise

    def _settled_memory(self, mount: LiveMount) -> int:
        """Bytes, once the daemon rests and they stop changing: the kernel's FORGETs arrive bit by bit."""
        deadline = time.monotonic() + SETTLE_SECONDS
        last, now, busy = 0, mount.memory_bytes(), True
        while (busy or abs(now - last) > now * SETTLED) and time.monotonic() < deadline:
            cpu = mount.cpu_seconds()
            time.sleep(LOOK_SECONDS)
            busy = mount.cpu_seconds() - cpu > LOOK_SECONDS * BUSY
            last, now = now, mount.memory_bytes()
        return now


def _memory(mounts: Sequence[LiveMount]) -> int:
    """Bytes of all daemons; a helper that serves several is counted once."""
    return sum(memory_bytes(pid) for pid in {pid for mount in mounts for pid in mount.pids()})
