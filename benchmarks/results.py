"""What a run found out: samples as they were taken, and the medians and ratios that follow from them.

A ratio is taken within a round, where two systems were measured next to each other, and the median is taken of the
rounds' ratios.  It says how much faster: 2 is twice as fast, whether the figures are rates or durations.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchError

BASE = "native"
FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """What is measured: `unit` is that of a value, and of durations ("s") less is better."""

    name: str
    group: str
    meaning: str
    unit: str
    clients: int = 1

    @property
    def less_is_better(self) -> bool:
        return self.unit == "s"

    @property
    def family(self) -> str:
        """The name without the number of clients."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Sample:
    """One measurement.  `cpu_seconds` is per request: processor time of the clients and of the daemon together."""

    measure: str
    system: str
    round: int
    value: float
    cpu_seconds: float


@dataclass(frozen=True)
class Walk:
    """A tree of `files` walked on a fresh mount; bytes of memory before, after, and after the kernel forgot it."""

    system: str
    files: int
    seconds: float
    bytes_before: int
    bytes_walked: int
    bytes_forgotten: int

    @property
    def bytes_per_file(self) -> float | None:
        """Memory for each file known; None where there is no daemon."""
        return (self.bytes_walked - self.bytes_before) / self.files if self.bytes_before else None

    @property
    def growth_after(self) -> float | None:
        """Memory after the forgetting as a multiple of what it was before the walk."""
        return self.bytes_forgotten / self.bytes_before if self.bytes_before else None


@dataclass(frozen=True)
class Crowd:
    """`mounts` mounts of one directory, walked at the same time, one client each: seconds for all, bytes of memory."""

    system: str
    mounts: int
    seconds: float
    bytes_used: int


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and how far they lie apart."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> Spread | None:
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values), len(values))


def quotient(values: dict[int, float], others: dict[int, float]) -> Spread | None:
    """How many times as much the values are as others, round by round; None where no round has both."""
    return Spread.of([values[number] / others[number] for number in values if others.get(number, 0) > 0])


@dataclass
class Run:
    """Everything about one run, as it is kept in results.json."""

    quick: bool
    started: str
    machine: dict[str, str]
    scale: dict[str, Any]
    systems: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    walks: list[Walk] = field(default_factory=list)
    crowds: list[Crowd] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    locks: Run | None = None  # a run of its own, which can be repeated alone

    def values(self, measure: str, system: str) -> dict[int, float]:
        """Round -> value."""
        return {s.round: s.value for s in self.samples if (s.measure, s.system) == (measure, system)}

    def value(self, measure: str, system: str) -> Spread | None:
        return Spread.of(list(self.values(measure, system).values()))

    def ratio(self, measure: str, system: str, to: str = BASE) -> Spread | None:
        """How much faster `system` is than `to`, round by round; None if one of them was not measured."""
        mine, others = self.values(measure, system), self.values(measure, to)
        if self.figures[measure].less_is_better:
            mine, others = others, mine
        return quotient(mine, others)

    def cpu(self, measure: str, system: str) -> Spread | None:
        """Seconds of processor time per request."""
        return Spread.of([s.cpu_seconds for s in self.samples if (s.measure, s.system) == (measure, system)])

    def groups(self) -> list[str]:
        return list(dict.fromkeys(figure.group for figure in self.figures.values()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")) + "\n", encoding="utf-8")


def load(path: Path) -> Run:
    """A run that was saved; BenchError if the file is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError("written by another version")
        return _from_data(data)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}: not the results of a benchmark: {error}") from None


def _from_data(data: dict[str, Any]) -> Run:
    run = Run(**data)
    run.figures = {name: Figure(**figure) for name, figure in data["figures"].items()}
    run.samples = [Sample(**sample) for sample in data["samples"]]
    run.walks = [Walk(**walk) for walk in data["walks"]]
    run.crowds = [Crowd(**crowd) for crowd in data["crowds"]]
    run.locks = _from_data(data["locks"]) if data.get("locks") else None
    return run
