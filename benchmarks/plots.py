"""A run as pictures (PNG)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from benchmarks.report import measured_systems
from benchmarks.results import BASE, Figure, Run

DOTS_PER_INCH = 110
MARKERS = "osD^vP*Xh"
MIB = 1 << 20


def draw(run: Run, directory: Path) -> list[Path]:
    """Write every picture that the run has figures for; their paths."""
    paths = []
    for name, picture in _pictures(run):
        path = directory / f"{name}.png"
        picture.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
        pyplot.close(picture)
        paths.append(path)
    return paths


def _pictures(run: Run) -> Iterator[tuple[str, Picture]]:
    if any(figure.clients == 1 for figure in _measured(run)):
        yield "ratios", _ratios(run)
    families = [family for family, counts in _client_counts(run).items() if len(counts) > 1]
    if families:
        yield "clients", _clients(run, families)
    if run.walks:
        yield "files", _files(run)
    if run.crowds:
        yield "mounts", _mounts(run)


class _Style:
    """The same colour and marker for a system in every picture."""

    def __init__(self, run: Run) -> None:
        colours = mpl.colormaps["tab10"]
        self._numbers = {name: number for number, name in enumerate(run.systems)}
        self._colours = [colours(number) for number in range(10)]

    def __call__(self, system: str) -> dict[str, Any]:
        number = self._numbers[system]
        return {"color": self._colours[number % 10], "marker": MARKERS[number % len(MARKERS)], "label": system}


def _ratios(run: Run) -> Picture:
    """A row for each measure with one client: a dot for each system, its line the range of the rounds."""
    figures = [figure for figure in _measured(run) if figure.clients == 1]
    groups = [group for group in run.groups() if any(figure.group == group for figure in figures)]
    heights = [sum(figure.group == group for figure in figures) for group in groups]
    picture, columns = pyplot.subplots(
        len(groups),
        figsize=(10, 1.5 + 0.34 * sum(heights) + 0.5 * len(groups)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    style, systems = _Style(run), [name for name in measured_systems(run) if name != BASE]
    for axes, group in zip(columns[:, 0], groups, strict=True):
        names = [figure.name for figure in figures if figure.group == group]
        for place, system in enumerate(systems):
            shift = (place - (len(systems) - 1) / 2) * 0.6 / max(1, len(systems))
            spreads = [(row, run.ratio(name, system)) for row, name in enumerate(names)]
            known = [(row + shift, spread) for row, spread in spreads if spread is not None]
            rows = [row for row, _ in known]
            axes.hlines(rows, [s.low for _, s in known], [s.high for _, s in known], color="0.6", linewidth=1)
            axes.plot([s.median for _, s in known], rows, linestyle="", markersize=5, **style(system))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.set_title(group, loc="left", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        for row in range(1, len(names)):
            axes.axhline(row - 0.5, color="0.9", linewidth=0.6)
    columns[-1, 0].set_xlabel("speed as a multiple of native (1: as fast; right is better)")
    _legend(picture, columns[0, 0])
    return picture


def _measured(run: Run) -> list[Figure]:
    """What native and another system have figures for."""
    others = [name for name in measured_systems(run) if name != BASE]
    return [figure for figure in run.figures.values() if any(run.ratio(figure.name, name) for name in others)]


def _client_counts(run: Run) -> dict[str, list[int]]:
    """Family of measures -> the numbers of clients it was measured with."""
    counts: dict[str, list[int]] = {}
    for figure in _measured(run):
        counts.setdefault(figure.family, []).append(figure.clients)
    return counts


def _clients(run: Run, families: Sequence[str]) -> Picture:
    """Rates against the number of client processes."""
    picture, grid = _panels(len(families))
    style = _Style(run)
    for axes, family in zip(grid, families, strict=False):
        figures = [figure for figure in _measured(run) if figure.family == family]
        for system in measured_systems(run):
            spreads = [(figure.clients, run.value(figure.name, system)) for figure in figures]
            known = [(clients, spread.median) for clients, spread in spreads if spread is not None]
            _line(axes, known, style(system))
        axes.set_title(f"{family}, {figures[0].unit}", fontsize=9)
        _count_axis(axes, sorted({figure.clients for figure in figures}))
    picture.supxlabel("client processes", fontsize=10)
    _legend(picture, grid[0])
    return picture


def _files(run: Run) -> Picture:
    """Time and memory against the number of files."""
    panels: list[tuple[str, Callable[..., float]]] = [
        ("seconds for a walk", lambda walk: walk.seconds),
        ("MiB of the daemon's memory after the walk", lambda walk: walk.bytes_walked / MIB),
        ("MiB after the kernel forgot the files", lambda walk: walk.bytes_forgotten / MIB),
    ]
    picture, grid = _panels(len(panels))
    style = _Style(run)
    for axes, (title, figure) in zip(grid, panels, strict=False):
        for system in measured_systems(run):
            _line(axes, [(walk.files, figure(walk)) for walk in run.walks if walk.system == system], style(system))
        axes.set_title(title, fontsize=9)
        axes.set_xscale("log")
    picture.supxlabel("files", fontsize=10)
    _legend(picture, grid[0])
    return picture


def _mounts(run: Run) -> Picture:
    """Time and memory against the number of mounts."""
    panels: list[tuple[str, Callable[..., float]]] = [
        ("seconds until all have walked the tree", lambda crowd: crowd.seconds),
        ("MiB of all daemons", lambda crowd: crowd.bytes_used / MIB),
    ]
    picture, grid = _panels(len(panels))
    style = _Style(run)
    for axes, (title, figure) in zip(grid, panels, strict=False):
        for system in measured_systems(run):
            crowds = [crowd for crowd in run.crowds if crowd.system == system]
            _line(axes, [(crowd.mounts, figure(crowd)) for crowd in crowds], style(system))
        axes.set_title(title, fontsize=9)
        _count_axis(axes, sorted({crowd.mounts for crowd in run.crowds}))
    picture.supxlabel("mounts of one directory", fontsize=10)
    _legend(picture, grid[0])
    return picture


def _panels(count: int) -> tuple[Picture, list[Axes]]:
    columns = min(3, count)
    rows = -(-count // columns)
    picture, grid = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 1 + 2.6 * rows), squeeze=False, layout="constrained"
    )
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    return picture, list(grid.flat)


def _line(axes: Axes, points: Sequence[tuple[int, float]], style: dict[str, Any]) -> None:
    """A line over a logarithmic axis, which has no place for zero: a bare directory has no daemon to need memory."""
    shown = [(x, y) for x, y in points if y > 0]
    if shown:
        axes.plot([x for x, _ in shown], [y for _, y in shown], **style)
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _count_axis(axes: Axes, ticks: Sequence[int]) -> None:
    """Powers of two as plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])


def _legend(picture: Picture, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
