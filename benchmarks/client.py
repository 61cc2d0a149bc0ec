"""Builds and runs the client program: C, because an interpreter would take longer for a request than the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchError, MeasureFailedError, SystemFailedError
from benchmarks.scale import MIB

SOURCES = Path(__file__).with_name("client_program")
BUILD_SECONDS = 60
END_SECONDS = 10


@dataclass(frozen=True)
class Loop:
    """What the processes did: units in all and per second, longest loop in seconds, processor time in seconds."""

    units: int
    rate: float
    seconds: float
    cpu: float
    daemon_cpu: float


@dataclass(frozen=True)
class Job:
    """What the client program is to do; see client_program/main.c.  Sizes in bytes, 0 seconds or steps: no limit."""

    operation: str
    processes: int = 1
    seconds: float = 0
    steps: int = 0
    size: int = 0
    block: int = MIB
    files: int = 0

    def arguments(self, paths: Sequence[Path]) -> list[str]:
        numbers = (self.processes, self.seconds, self.steps, self.size, self.block, self.files)
        return [self.operation, *map(str, numbers), *map(os.fspath, paths)]


class Client:
    """The compiled program, in a directory of the run."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "client"
        self._complaints = directory / "client.err"
        sources = sorted(SOURCES.glob("*.c"))
        flags = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
        command: list[str | Path] = ["gcc", *flags, "-o", self._program, *sources]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except FileNotFoundError:
            raise BenchError("gcc is missing; run scripts/setup bench") from None
        except subprocess.CalledProcessError as error:
            raise BenchError(f"the client does not compile: {error.stderr.strip().splitlines()[0]}") from None

    def run(self, job: Job, paths: Sequence[Path], meter: Callable[[], float], limit_seconds: float) -> Loop:
        """Do a job; `meter` tells the processor time of the daemon so far, and is asked before and after the loops."""
        with open(self._complaints, "wb") as complaints:
            process = subprocess.Popen(
                [self._program, *job.arguments(paths)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
        try:
            return self._converse(process, meter, time.monotonic() + limit_seconds)
        except SystemFailedError:
            raise SystemFailedError(f"no end of {job.operation} after {limit_seconds:g} s") from None
        finally:
            end_group(process)

    def _converse(self, process: subprocess.Popen[bytes], meter: Callable[[], float], deadline: float) -> Loop:
        self._line(process, deadline)
        before = meter()
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        answer = json.loads(self._line(process, deadline))
        return Loop(**answer, daemon_cpu=meter() - before)

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """The next line of the program; MeasureFailedError if it ends, SystemFailedError if it takes too long."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise SystemFailedError
        line = process.stdout.readline()
        if not line:
            lines = self._complaints.read_text(errors="replace").splitlines()
            raise MeasureFailedError(lines[0] if lines else "the client ended without a word")
        return line


def end_group(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Make sure that a program we started in a session of its own is gone, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        # It hangs in a request to its mount and ends with it.
        raise SystemFailedError("a client hangs") from None
