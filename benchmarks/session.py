"""One run from its first directory to its last: nothing of it stays, whatever happens, but the results."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import fixtures, machine
from benchmarks.client import Client
from benchmarks.errors import BenchError
from benchmarks.growth import Growth
from benchmarks.locks import SERVICES, LockRounds, lock_measures
from benchmarks.measures import LOCKS, PROGRAMS, Measure
from benchmarks.results import Run
from benchmarks.rounds import Fleet, Rounds
from benchmarks.scale import QUICK, Scale
from benchmarks.systems import Place, System

# What of the scale is about locks.
LOCK_SCALE = ("rounds", "lock_clients", "lock_seconds", "hold_seconds", "long_hold_seconds")


@dataclass(frozen=True)
class Plan:
    """What a run is to do; `series` names what is to be measured of growth, and whether locks are."""

    scale: Scale
    systems: Sequence[System]
    measures: Sequence[Measure]
    series: set[str]


def carry_out(plan: Plan, parent: Path, console: Console) -> Run:
    """Measure everything in a new directory below `parent`, which is removed again.

    After a KeyboardInterrupt that comes while something is measured, the figures so far are returned.
    """
    start = time.monotonic()
    with _workplace(parent) as work, ExitStack() as stack, _progress(console) as progress:
        run = _new_run(plan, work)
        present = [system for system in plan.systems if system.name not in run.left_out]
        task = progress.add_task("making the fixtures", total=None)

        def tell(text: str) -> None:
            progress.update(task, description=text)

        def advance() -> None:
            progress.advance(task)

        client = Client(work)
        place = Place(work, stack)
        with_package = any(measure.figure.group == PROGRAMS for measure in plan.measures)
        if plan.measures:
            fixtures.lay_out(place.backing, plan.scale)
        if with_package:
            fixtures.make_package(place.backing)
        os.sync()
        growing = plan.series - {LOCKS}
        growth = Growth(place, run, plan.scale, client, present, tell, advance)
        rounds = Rounds(Fleet(place, plan.scale, run, with_package), client, present, plan.measures, tell, advance)
        locks = LockRounds(place, _new_lock_run(plan, work), plan.scale, client, tell, advance)
        turns = plan.scale.rounds * len(plan.measures) * len(present) + growth.steps(growing)
        progress.update(task, total=turns + (locks.steps() if LOCKS in plan.series else 0))
        try:
            if plan.measures:
                rounds.go(plan.scale.rounds, plan.scale.rounds_seconds)
            growth.go(growing)
            if LOCKS in plan.series:
                run.locks = locks.run
                locks.go()
        except KeyboardInterrupt:
            run.interrupted = True
            run.notes.append("interrupted: what would have come after it")
        tell("taking everything away")
    run.seconds = time.monotonic() - start
    return run


def _new_run(plan: Plan, work: Path) -> Run:
    left_out = {system.name: reason for system in plan.systems if (reason := system.missing())}
    present = [system for system in plan.systems if system.name not in left_out]
    return Run(
        quick=plan.scale.file_bytes == QUICK.file_bytes,
        started=_now(),
        machine=machine.describe(work, present),
        scale=asdict(plan.scale),
        systems={system.name: system.title for system in plan.systems},
        left_out=left_out,
        figures={measure.name: measure.figure for measure in plan.measures},
    )


def _new_lock_run(plan: Plan, work: Path) -> Run:
    systems = [service.system for service in SERVICES]
    left_out = {system.name: reason for system in systems if (reason := system.missing())}
    present = [system for system in systems if system.name not in left_out]
    return Run(
        quick=plan.scale.file_bytes == QUICK.file_bytes,
        started=_now(),
        machine=machine.describe(work, present),
        scale={name: value for name, value in asdict(plan.scale).items() if name in LOCK_SCALE},
        systems={system.name: system.title for system in systems},
        left_out=left_out,
        figures={measure.figure.name: measure.figure for measure in lock_measures(plan.scale)},
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """A new directory, gone at the end; BenchError if something is still mounted in it then."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="bench-", dir=parent)).resolve()
    except OSError as error:
        raise BenchError(f"{parent}: {error.strerror}") from None
    try:
        yield work
    finally:
        if f" {work}{os.sep}" in Path("/proc/self/mountinfo").read_text(errors="replace"):
            raise BenchError(f"a mount is left below {work}")
        shutil.rmtree(work)


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)
