"""One turn: one measure on one mount, with everything around the timed part made equal for all systems."""

from __future__ import annotations

import enum
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.client import Client, Job, Loop, end_group
from benchmarks.errors import MeasureFailedError, SystemFailedError
from benchmarks.mounts import LiveMount
from benchmarks.scale import Scale


class Cache(enum.Enum):
    """Where a file's bytes are when its measure starts."""

    COLD = "on disk only"
    FIRST = "in the backing filesystem's cache, and not yet read through the mount"
    WARM = "read through the mount before"


@dataclass(frozen=True)
class Value:
    """What a measure yields: `cpu_seconds` of clients and daemon are per request."""

    value: float
    cpu_seconds: float

    @classmethod
    def of(cls, loop: Loop, request_units: int = 1) -> Value:
        """The rate of a loop whose requests are of so many units each."""
        return cls(loop.rate, (loop.cpu + loop.daemon_cpu) / (loop.units / request_units))


@dataclass(frozen=True)
class Turn:
    """What a measure works with.  `backing` is the bare directory; `publishes`: a close on this mount is durable."""

    mount: LiveMount
    backing: Path
    publishes: bool
    scratch: Path
    client: Client
    scale: Scale

    @property
    def root(self) -> Path:
        return self.mount.path

    def loop(self, job: Job, *paths: Path) -> Loop:
        return self.client.run(job, paths, self.mount.cpu_seconds, self.scale.turn_seconds)

    def read_all(self, path: Path) -> None:
        """Get a file of the run's size into every cache that reading it fills."""
        self.loop(Job("read", size=self.scale.file_bytes, steps=self.scale.file_bytes // Job.block), path)

    def settle(self, cache: Cache, fixture: Callable[[Path], Path]) -> None:
        """Bring a fixture into a state of caches."""
        if cache is Cache.COLD:
            machine.drop_caches()
        elif cache is Cache.FIRST:
            machine.drop_pages(fixture(self.root))
            self.read_all(fixture(self.backing))
        else:
            self.read_all(fixture(self.root))

    def clear(self) -> None:
        """Remove what was written, through the mount."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def program(self, command: Sequence[str | Path]) -> tuple[str, float, float]:
        """Run a program to its end: its output, seconds, and processor time of it and of the daemon."""
        usage, daemon, start = _children_cpu(), self.mount.cpu_seconds(), time.monotonic()
        output = run_program(command, self.scale.turn_seconds)
        seconds = time.monotonic() - start
        return output, seconds, _children_cpu() - usage + self.mount.cpu_seconds() - daemon


def run_program(command: Sequence[str | Path], limit_seconds: float) -> str:
    """The output of a program; MeasureFailedError if it fails, SystemFailedError if it takes too long."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # git shall only look, not write down what it saw.
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=limit_seconds)[0]
    except subprocess.TimeoutExpired:
        end_group(process)
        raise SystemFailedError(f"no end of {Path(command[0]).name} after {limit_seconds:g} s") from None
    if process.returncode:
        last = output.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise MeasureFailedError(f"{Path(command[0]).name}: {last[0]}")
    return output


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
