"""Processes that contend for one lock (contender.py), and what follows from when each of them had it."""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.client import end_group
from benchmarks.errors import MeasureFailedError

PROGRAM = Path(__file__).with_name("contender.py")
START_SECONDS = 30.0
END_SECONDS = 30.0  # beyond the time for which they contend: whoever waits by then still gets the lock


class Hold(NamedTuple):
    """One possession of the lock, in seconds of CLOCK_MONOTONIC."""

    granted: float
    released: float  # right before the unlock
    asked: float
    process: int


@dataclass(frozen=True)
class Contest:
    """All that happened, in the order of the grants."""

    holds: list[Hold]

    def rate(self) -> float:
        """Acquisitions per second of all processes together, from the first grant to the last release."""
        seconds = max(hold.released for hold in self.holds) - self.holds[0].granted
        return len(self.holds) / seconds

    def handover_seconds(self) -> float:
        """The median time from an unlock to the grant for another process, which had asked for it before.

        MeasureFailedError where the lock never went from one to another.
        """
        seconds = [
            after.granted - before.released
            for before, after in pairwise(self.holds)
            if before.process != after.process and after.asked < before.released
        ]
        if not seconds:
            raise MeasureFailedError("the lock was not handed over once")
        return statistics.median(seconds)


def judge(stamps: Sequence[Sequence[tuple[float, float, float]]]) -> Contest:
    """What each process has noted (asked, granted, released); MeasureFailedError where the lock excluded nobody."""
    holds = sorted(
        Hold(granted, released, asked, process)
        for process, noted in enumerate(stamps)
        for asked, granted, released in noted
    )
    if len(holds) < 2:
        raise MeasureFailedError("nobody got the lock twice")
    if any(after.granted < before.released for before, after in pairwise(holds)):
        raise MeasureFailedError("two processes held the lock at the same time")
    return Contest(holds)


def contend(kind: str, targets: Sequence[str], seconds: float, hold_seconds: float = 0.0) -> Contest:
    """One process for each target, all started together; MeasureFailedError when one fails, or does not end."""
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryFile("w+") as complaints:
        try:
            # One at a time: should a later one fail to start, those before it are ended.
            processes.extend(_start(kind, target, seconds, hold_seconds, complaints) for target in targets)
            for process in processes:
                _line(process, START_SECONDS, complaints)
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            deadline = time.monotonic() + seconds + END_SECONDS
            answers = [_line(process, deadline - time.monotonic(), complaints) for process in processes]
            return judge([json.loads(answer) for answer in answers])
        finally:
            for process in processes:
                end_group(process)


def _start(kind: str, target: str, seconds: float, hold_seconds: float, complaints: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, PROGRAM, kind, target, str(seconds), str(hold_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        text=True,
        start_new_session=True,
    )


def _line(process: subprocess.Popen[str], seconds: float, complaints: IO[str]) -> str:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], max(0.0, seconds))[0]:
        raise MeasureFailedError("a process that contends for the lock does not go on")
    line = process.stdout.readline()
    if not line:
        complaints.seek(0)
        words = complaints.read().strip().splitlines()
        raise MeasureFailedError(words[-1] if words else "a process that contends for the lock ended without a word")
    return line
