"""The command: what is asked for, checked before anything is mounted, and where the results go."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from benchmarks import report, results
from benchmarks.catalogue import SYSTEMS, select_systems
from benchmarks.errors import BenchError
from benchmarks.locks import SERVICES, lock_measures
from benchmarks.measures import CROWDS, LOCKS, WALKS, all_measures, select_measures
from benchmarks.results import Run
from benchmarks.scale import FULL, QUICK

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
RECORD = ROOT / "docs" / "performance"
PIPE_COLUMNS = 160
NEEDED = ("matplotlib", "numpy", "safetensors", "filelock")

_PATH = click.Path(path_type=Path)


def _print_list(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    rows = [[measure.name, measure.figure.meaning] for measure in all_measures(FULL)]
    rows += [[measure.figure.name, measure.figure.meaning] for measure in lock_measures(FULL)]
    rows += [[WALKS, "time and memory with the number of files"], [CROWDS, "and with the number of mounts"]]
    rows += [[LOCKS, "all measures of locks, which are chosen together"]]
    systems = [[system.name, system.missing() or system.title] for system in SYSTEMS]
    services = [[service.name, service.system.missing() or service.system.title] for service in SERVICES]
    for title, lines in (("Measures", rows), ("Systems", systems), ("Lock services", services)):
        Console(highlight=False).print(report.Grid(title, ["", ""], lines, words=True).rich())
    context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Small sizes and short loops: under 3 minutes.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only measures that match (as in *.txt); repeatable.")
@click.option("--systems", default="", metavar="NAME,…", help="Only these systems, and native.")
@click.option("--rounds", type=click.IntRange(1, 1000), help="So many rounds.")
@click.option("--output", type=_PATH, default=ROOT / ".cache" / "bench", help="Where results go [.cache/bench].")
@click.option("--work", type=_PATH, default=ROOT / ".cache", help="Measure in a new directory below this one [.cache].")
@click.option("--record", is_flag=True, help="Put the results into docs/performance.md as well.")
@click.option("--from", "source", type=_PATH, metavar="JSON", help="Measure nothing: report on earlier results.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_list,
    help="Show the measures and systems.",
)
def main(
    quick: bool,
    only: tuple[str, ...],
    systems: str,
    rounds: int | None,
    output: Path,
    work: Path,
    record: bool,
    source: Path | None,
) -> None:
    """Measure safefs and other FUSE filesystems side by side on one backing filesystem."""
    # Lines are not cut to the width of a terminal that is not there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    try:
        if record and (only not in {(), (LOCKS,)} or systems) and source is None:
            raise BenchError(f"--record is for whole runs: leave out --systems and --only, but for --only {LOCKS}")
        _check_libraries()
        _make_directory(output)
        run = results.load(source) if source else _measure(console, quick, only, systems, rounds, work)
        _write(run, output)
        if record and (source or not run.interrupted):
            _record(run)
        _show(console, run, output)
        if run.interrupted and source is None:
            raise KeyboardInterrupt
    except BenchError as error:
        click.echo(f"benchmarks: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("benchmarks: interrupted; everything is unmounted", err=True)
        sys.exit(130)


def _measure(console: Console, quick: bool, only: tuple[str, ...], systems: str, rounds: int | None, work: Path) -> Run:
    from benchmarks.session import Plan, carry_out

    scale = QUICK if quick else FULL
    scale = replace(scale, rounds=rounds or scale.rounds)
    measures, series = select_measures(all_measures(scale), only)
    selected = select_systems([name.strip() for name in systems.split(",") if name.strip()])
    if os.geteuid() != 0:
        raise BenchError("only root can empty the kernel's caches; run this with sudo")
    signal.signal(signal.SIGTERM, _interrupt)
    return carry_out(Plan(scale, selected, measures, series), work, console)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_libraries() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BenchError(f"{', '.join(missing)} not installed; run scripts/setup bench")


def _make_directory(path: Path) -> None:
    """Before anything is measured: results that cannot be kept are not worth an hour."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None


def _write(run: Run, directory: Path) -> None:
    """results.json, report.md and the plots."""
    from benchmarks.plots import draw

    run.save(directory / "results.json")
    images = [path.name for path in draw(run, directory)]
    (directory / "report.md").write_text(f"# Benchmarks\n\n{report.markdown(run, images)}", encoding="utf-8")


def _record(run: Run) -> None:
    """The results where the documents are.  Of a run of locks alone, beside the other figures that are there."""
    from benchmarks.plots import draw

    if not run.samples and run.locks is not None:
        recorded = results.load(RECORD / "results.json")
        run = replace(recorded, locks=run.locks)
    RECORD.mkdir(exist_ok=True)
    run.save(RECORD / "results.json")
    images = [f"{RECORD.name}/{path.name}" for path in draw(run, RECORD)]
    document = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(report.put_between_markers(document, report.markdown(run, images)), encoding="utf-8")


def _show(console: Console, run: Run, output: Path) -> None:
    grids = (*report.ratio_grids(run), *report.growth_grids(run), *report.lock_grids(run))
    for grid in (*grids, report.targets_grid(report.judged(run))):
        if grid.rows:
            console.print(grid.rich())
    for name, reason in run.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    for note in run.notes:
        console.print(f"not measured: {note}", markup=False)
    console.print(f"{run.seconds:.0f} s; report, figures and plots: {output}", markup=False)
