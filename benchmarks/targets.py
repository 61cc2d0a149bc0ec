"""What safefs sets itself as targets, and how a run measured up to them: misses are shown like hits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.locks import ETCD, LEASEFILE, MEMORY
from benchmarks.results import BASE, Run, Spread, Walk, quotient

SAFEFS = "safefs"
FALLBACK = "safefs-fallback"
PEERS = ("bindfs", "mergerfs")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """`system` is to reach `least` times the speed of `against`, with each of these numbers of clients."""

    measure: str
    least: float
    against: str = BASE
    system: str = SAFEFS
    clients: tuple[int, ...] = (1,)

    def names(self) -> list[str]:
        return [self.measure if clients == 1 else f"{self.measure}/{clients}" for clients in self.clients]


@dataclass(frozen=True)
class Verdict:
    """One line of the table: what was wanted and measured, and whether that is enough (None: not measured)."""

    claim: str
    wanted: str
    measured: str
    met: bool | None


PASSTHROUGH = (
    *("write", "overwrite", "read-warm", "read-cold", "mmap-warm", "mmap-cold"),
    *("read-128k", "write-128k", "read-4k", "write-4k"),
)

TARGETS = (
    *(Target(measure, 0.97) for measure in PASSTHROUGH),
    *(Target(measure, 0.95, system=FALLBACK) for measure in ("read-warm", "mmap-warm")),
    *(Target(measure, 1, peer, FALLBACK) for measure in ("read-first", "write") for peer in PEERS),
    # A verified close takes at most 1.3 times as long as fsync and close.
    *(Target("close", 1 / 1.3, system=system) for system in (SAFEFS, FALLBACK)),
    Target("stat-cached", 0.9),
    *(
        Target(measure, 1, peer, clients=(1, 2, 4))
        for measure in ("getattr", "stat-uncached", "open", "open-uncached", "open-read", "open-read-uncached")
        for peer in PEERS
    ),
    *(Target(measure, 1, peer, clients=(1, 2, 4)) for measure in ("find", "find-uncached") for peer in PEERS),
    Target("readdir", 1, "bindfs"),
    Target("create", 0.9, "bindfs"),
    Target("publish", 0.7),
    Target("publish", 0.9, clients=(8,)),
)

BYTES_PER_INODE = 1024
# "Where it began" allows for what any program keeps after a day's work.
GROWTH_AFTER = 1.1
FORGOTTEN_FILES = 1_000_000

LOCK_REQUESTS = 0.9  # a lock or unlock that nobody contends for: of the rate of empty round trips
HANDOVER_SWAPS = 2  # from node to node: round trips of the backend,
HANDOVER_SECONDS = 0.005  # and so much more


def verdicts(run: Run) -> list[Verdict]:
    """All targets, in their order."""
    locks = [] if run.locks is None else _judge_locks(run.locks)
    return [*(_judge(target, run) for target in TARGETS), *_judge_memory(run), *locks]


def _judge(target: Target, run: Run) -> Verdict:
    names = target.names()
    ratios = [run.ratio(name, target.system, target.against) if name in run.figures else None for name in names]
    known = [ratio for ratio in ratios if ratio is not None]
    clients = "" if target.clients == (1,) else f", {_and(target.clients)} clients"
    return Verdict(
        f"{target.system}: {target.measure}{clients}",
        f"≥ {target.least:.3g} of {target.against}",
        "; ".join(spread_text(ratio) for ratio in ratios) if known else NOT_MEASURED,
        all(ratio.median >= target.least for ratio in known) if known else None,
    )


def _judge_locks(locks: Run) -> Iterator[Verdict]:
    """What lock services are to reach within a run: compared with other figures of their own."""
    for system in (MEMORY, LEASEFILE, ETCD):
        share = quotient(locks.values("flock", system), locks.values("empty", system))
        met = None if share is None else share.median >= LOCK_REQUESTS
        wanted = f"≥ {LOCK_REQUESTS:g} of the rate of empty round trips"
        yield Verdict(f"{system}: flock", wanted, spread_text(share), met)
    for system in (LEASEFILE, ETCD):
        swaps = locks.values("swap", system)
        allowed = {number: HANDOVER_SWAPS * seconds + HANDOVER_SECONDS for number, seconds in swaps.items()}
        for name in ("handover", "handover-late"):
            share = quotient(locks.values(name, system), allowed)
            met = None if share is None else share.median <= 1
            wanted = f"≤ {HANDOVER_SWAPS} swaps + {HANDOVER_SECONDS * 1e3:g} ms"
            measured = NOT_MEASURED if share is None else f"{spread_text(share)} of that"
            yield Verdict(f"{system}: {name}", wanted, measured, met)


def spread_text(spread: Spread | None) -> str:
    """A median with the range of its rounds."""
    if spread is None:
        return NOT_MEASURED
    median, low, high = (ratio_text(value) for value in (spread.median, spread.low, spread.high))
    return median if spread.rounds == 1 else f"{median} ({low} to {high})"


def ratio_text(ratio: float) -> str:
    """Two digits that say something."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _and(numbers: tuple[int, ...]) -> str:
    texts = [str(number) for number in numbers]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts)


def _judge_memory(run: Run) -> Iterator[Verdict]:
    walks = [walk for walk in run.walks if walk.system == SAFEFS]
    largest = max(walks, key=lambda walk: walk.files, default=None)
    yield _judge_walk(
        f"{SAFEFS}: memory for each known inode",
        f"≤ {BYTES_PER_INODE} bytes",
        largest,
        lambda walk: walk.bytes_per_file,
        BYTES_PER_INODE,
        "{:.0f} bytes",
    )
    yield _judge_walk(
        f"{SAFEFS}: memory after {FORGOTTEN_FILES:,} files were walked and forgotten",
        f"≤ {GROWTH_AFTER:g} of before",
        next((walk for walk in walks if walk.files == FORGOTTEN_FILES), None),
        lambda walk: walk.growth_after,
        GROWTH_AFTER,
        "{:.2f}",
    )


def _judge_walk(
    claim: str,
    wanted: str,
    walk: Walk | None,
    figure: Callable[[Walk], float | None],
    most: float,
    form: str,
) -> Verdict:
    value = None if walk is None else figure(walk)
    if walk is None or value is None:
        return Verdict(claim, wanted, NOT_MEASURED, None)
    return Verdict(claim, wanted, f"{form.format(value)} ({walk.files:,} files)", value <= most)
