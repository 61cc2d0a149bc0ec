"""A run as tables: Markdown for the documents, the same on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.errors import BenchError
from benchmarks.locks import COMPARED
from benchmarks.results import BASE, Figure, Run, Spread
from benchmarks.targets import Verdict, ratio_text, spread_text, verdicts

BEGIN = "<!-- results: begin (written by `python -m benchmarks --record`) -->"
END = "<!-- results: end -->"
NOTHING = "-"
MIB = 1 << 20


@dataclass(frozen=True)
class Grid:
    """A table: the first column holds words, the others are figures unless `words` is set."""

    title: str
    header: list[str]
    rows: list[list[str]]
    words: bool = False

    def markdown(self) -> str:
        rule = ["---", *["---" if self.words else "---:"] * (len(self.header) - 1)]
        lines = [" | ".join(row) for row in (self.header, rule, *self.rows)]
        return "\n".join([f"### {self.title}", "", *(f"| {line} |" for line in lines), ""])

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="left" if self.words or not number else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def measured_systems(run: Run) -> list[str]:
    """Those that have figures, in the order of the catalogue."""
    seen = {sample.system for sample in run.samples} | {walk.system for walk in run.walks}
    return [name for name in run.systems if name in seen]


def targets_grid(lines: Sequence[Verdict]) -> Grid:
    words = {True: "yes", False: "no", None: NOTHING}
    rows = [[v.claim, v.wanted, v.measured, words[v.met]] for v in lines]
    return Grid("Targets", ["safefs", "target", "measured: median (range of rounds)", "met"], rows, words=True)


def ratio_grids(run: Run) -> Iterator[Grid]:
    """How fast each system is as a multiple of native, one table for each group of measures."""
    others = [name for name in measured_systems(run) if name != BASE]
    for group in run.groups():
        rows = [
            [figure.name, _value(run.value(figure.name, BASE), figure), *(_ratio(run, figure, name) for name in others)]
            for figure in run.figures.values()
            if figure.group == group
        ]
        yield Grid(f"{group}: speed as a multiple of native", ["", BASE, *others], rows)


def value_grid(run: Run) -> Grid:
    systems = measured_systems(run)
    rows = [
        [figure.name, *(_value(run.value(figure.name, name), figure) for name in systems)]
        for figure in run.figures.values()
    ]
    return Grid("Medians as measured", ["", *systems], rows)


def cpu_grid(run: Run) -> Grid:
    """Microseconds of processor time for a request."""
    systems = measured_systems(run)
    rows = [
        [figure.name, *(_microseconds(run.cpu(figure.name, name)) for name in systems)]
        for figure in run.figures.values()
    ]
    return Grid("Processor time for each request, clients and daemon together, in µs", ["", *systems], rows)


def growth_grids(run: Run) -> Iterator[Grid]:
    if run.walks:
        rows = [
            [
                walk.system,
                f"{walk.files:,}",
                f"{walk.seconds / walk.files * 1e6:.1f}",
                _mib(walk.bytes_before),
                _mib(walk.bytes_walked),
                _mib(walk.bytes_forgotten),
                NOTHING if walk.bytes_per_file is None else f"{walk.bytes_per_file:,.0f}",
            ]
            for name in measured_systems(run)
            for walk in run.walks
            if walk.system == name
        ]
        header = ["", "files", "µs a file", "MiB before", "MiB walked", "MiB forgotten", "bytes a file"]
        yield Grid("A walk of so many files on a fresh mount, and its daemon's memory", header, rows)
    if run.crowds:
        rows = [
            [crowd.system, str(crowd.mounts), f"{crowd.seconds:.3f}", _mib(crowd.bytes_used)]
            for name in measured_systems(run)
            for crowd in run.crowds
            if crowd.system == name
        ]
        yield Grid("Several mounts of one directory, walked at the same time", ["", "mounts", "s", "MiB"], rows)


def meaning_grid(run: Run) -> Grid:
    """Every measure once, whatever the number of clients."""
    families = {figure.family: figure for figure in reversed(run.figures.values())}
    rows = [[family, figure.unit, figure.meaning] for family, figure in reversed(families.items())]
    return Grid("The measures", ["", "unit", "what is measured"], rows, words=True)


def lock_grids(run: Run) -> Iterator[Grid]:
    """Of each measure of locks every service's median, with the range of the rounds."""
    locks = run.locks
    if locks is None:
        return
    systems = measured_systems(locks)
    rows = [
        [figure.name, *(_value_and_range(locks.value(figure.name, name), figure) for name in systems)]
        for figure in locks.figures.values()
    ]
    yield Grid("Locks: medians (range of rounds)", ["", *systems], rows)
    sides = [(mine, other) for mine, other in COMPARED if {mine, other} <= set(systems)]
    rows = [
        [name, *(spread_text(locks.ratio(name, mine, other)) for mine, other in sides)]
        for name in locks.figures
        if any(locks.ratio(name, mine, other) for mine, other in sides)
    ]
    yield Grid("Locks: how many times as fast", ["", *(f"{mine} / {other}" for mine, other in sides)], rows)


def _value_and_range(spread: Spread | None, figure: Figure) -> str:
    if spread is None:
        return NOTHING
    form = _milliseconds if figure.unit == "s" else _per_second
    return form(spread.median) if spread.rounds == 1 else f"{form(spread.median)} ({_range(spread, form)})"


def _range(spread: Spread, form: Callable[[float], str]) -> str:
    return f"{form(spread.low)} to {form(spread.high)}"


def _milliseconds(seconds: float) -> str:
    return f"{_short(seconds * 1e3)} ms"


def _per_second(rate: float) -> str:
    return f"{_short(rate)}/s"


def _locks_markdown(locks: Run) -> list[str]:
    """What the report of a run has of its locks, which may have been measured at another time."""
    kind = "Quick run" if locks.quick else "Run"
    head = f"{kind} of the locks of {locks.started}, {locks.seconds / 60:.0f} minutes: {_scale(locks)}."
    left_out = [f"{name}: {reason}" for name, reason in locks.left_out.items()]
    lists = [*_list("Locks: left out", left_out), *_list("Locks: not measured", locks.notes)]
    services = [[name, locks.systems[name]] for name in measured_systems(locks)]
    named = Grid("The lock services", ["", ""], services, words=True)
    return [head, "", meaning_grid(locks).markdown(), named.markdown(), *lists, machine_grid(locks).markdown()]


def machine_grid(run: Run) -> Grid:
    return Grid("The machine", ["", ""], [[key, value] for key, value in run.machine.items()], words=True)


def markdown(run: Run, images: Sequence[str]) -> str:
    """The whole report; `images` are the addresses of the plots."""
    kind = "Quick run (sizes and times too small for more than a look)" if run.quick else "Full run"
    head = f"{kind} of {run.started}, {run.seconds / 60:.0f} minutes. Sizes, times and counts: {_scale(run)}."
    parts = [head, "", targets_grid(verdicts(run)).markdown()]
    parts += [f"![{Path(image).stem}]({image})\n" for image in images]
    grids = [*ratio_grids(run), *growth_grids(run), value_grid(run), cpu_grid(run), meaning_grid(run)]
    parts += [grid.markdown() for grid in grids]
    parts += _list("Left out", [f"{name}: {reason}" for name, reason in run.left_out.items()])
    parts += [*_list("Not measured", run.notes), machine_grid(run).markdown()]
    if run.locks is not None:
        parts += ["## Locks", "", *(grid.markdown() for grid in lock_grids(run)), *_locks_markdown(run.locks)]
    return "\n".join(parts).strip() + "\n"


def put_between_markers(document: str, section: str) -> str:
    """The document with another section of results; BenchError without the markers."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"no place for the results: there is no {END if begin else BEGIN}")
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}"


def judged(run: Run) -> list[Verdict]:
    """The targets that the run says something about."""
    return [verdict for verdict in verdicts(run) if verdict.met is not None]


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"### {title}", "", *(f"- {line}" for line in lines), ""] if lines else []


def _scale(run: Run) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.scale.items())


def _value(spread: Spread | None, figure: Figure) -> str:
    return NOTHING if spread is None else f"{_short(spread.median)} {figure.unit}".replace(" 1/s", "/s")


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(run: Run, figure: Figure, system: str) -> str:
    spread = run.ratio(figure.name, system)
    return NOTHING if spread is None else ratio_text(spread.median)


def _microseconds(spread: Spread | None) -> str:
    return NOTHING if spread is None else _short(spread.median * 1e6)


def _mib(count: int) -> str:
    return f"{count / MIB:.1f}" if count else NOTHING
