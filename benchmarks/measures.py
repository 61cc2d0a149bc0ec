"""What is measured: one entry for each figure, in the order in which a round goes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks import fixtures
from benchmarks import workloads as work
from benchmarks.errors import BenchError
from benchmarks.results import Figure
from benchmarks.scale import MIB, Scale
from benchmarks.systems import Profile
from benchmarks.turns import Cache
from benchmarks.workloads import Workload

CONTENTS = "One large file"
NAMES = "Names and small files"
PROGRAMS = "Programs"
KIB = 1024

PUBLISH_MEANING = (
    "4 KiB whole and durable under a new name: on safefs open + write + close, elsewhere by hand: a temporary name, "
    "write, fsync, rename, fsync of the directory"
)

# What grows with the number of files and of mounts is measured by growth.py, locks by locks.py.
WALKS = "growth-files"
CROWDS = "growth-mounts"
LOCKS = "locks"


@dataclass(frozen=True)
class Measure:
    """A figure, the work that yields it, and how the kernel may cache meanwhile.  `scale`: units per unit shown."""

    figure: Figure
    workload: Workload
    profile: Profile = Profile.DEFAULT
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.figure.name


def all_measures(scale: Scale) -> list[Measure]:
    return [*_contents(scale), *_names(scale), *_programs()]


def select_measures(measures: Sequence[Measure], patterns: Sequence[str]) -> tuple[list[Measure], set[str]]:
    """The measures that a pattern matches, and which of the series; everything without patterns."""
    series = {WALKS, CROWDS, LOCKS}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in [*(m.name for m in measures), *series]):
            raise BenchError(f"no measure matches {pattern!r}; --list shows them")

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    return [measure for measure in measures if wanted(measure.name)], {name for name in series if wanted(name)}


def _contents(scale: Scale) -> Iterator[Measure]:
    def measure(name: str, meaning: str, workload: Workload, clients: int = 1) -> Measure:
        return Measure(Figure(name, CONTENTS, meaning, "MiB/s", clients), workload, scale=MIB)

    yield measure("write", "a new file, from open to the last write", work.contents("write"))
    yield measure("write-sync", "a new file, from open to fsync and close", work.contents("write-sync"))
    closed = "a new file, from its last write until it is durable: by close on safefs, elsewhere by fsync and close"
    yield measure("close", closed, work.closing())
    yield measure("overwrite", "blocks that are there, through one descriptor", work.contents("overwrite"))
    yield measure("overwrite-sync", "the same, to fsync and close", work.contents("overwrite-sync"))
    yield measure(
        "reopen-sync",
        "a file that exists, opened without O_TRUNC and overwritten, from open to fsync and close",
        work.contents("modify-sync", modify=True),
    )
    for cache in Cache:
        word = cache.name.lower()
        yield measure(f"read-{word}", f"read, the bytes {cache.value}", work.contents("read", cache=cache))
        yield measure(f"mmap-{word}", f"copied from a map, the bytes {cache.value}", work.contents("mmap", cache=cache))
    for block in (4 * KIB, 128 * KIB):
        size = f"{block // KIB}k"
        for clients in scale.client_counts:
            yield measure(
                f"read-{size}{_suffix(clients)}",
                f"reads of {size} at random offsets, cached",
                work.random_access("read-randomly", block=block, clients=clients, fixture=True),
                clients,
            )
        yield measure(
            f"write-{size}",
            f"writes of {size} at random offsets, blocks that are there",
            work.random_access("overwrite-randomly", block=block, fixture=False),
        )


# Measured with each system's own caching of names and without any: name, meaning, operation of the client, fixture.
_LOOPS = (
    ("open", "open + close", "open", fixtures.small),
    ("open-read", "open + read of 4 KiB + close", "open-read", fixtures.small),
    ("find", "walk of a tree with a stat of every entry", "walk", fixtures.tree),
)
_NO_CACHE = "names that the kernel may not keep"


def _names(scale: Scale) -> Iterator[Measure]:
    def measure(
        name: str, meaning: str, workload: Workload, clients: int = 1, profile: Profile = Profile.DEFAULT
    ) -> Measure:
        return Measure(Figure(name + _suffix(clients), NAMES, meaning, "1/s", clients), workload, profile)

    cached = work.names("stat", fixtures.small)
    yield measure("stat-cached", "stat of names that the kernel may keep for 60 s", cached, 1, Profile.CACHED)
    for clients in scale.client_counts:
        getattr_loop = work.names("getattr", fixtures.small, clients=clients)
        yield measure("getattr", "statx of files past the kernel's cache: one GETATTR each", getattr_loop, clients)
        stat_loop = work.names("stat", fixtures.small, clients=clients)
        yield measure("stat-uncached", f"stat of {_NO_CACHE}", stat_loop, clients, Profile.UNCACHED)
        for name, meaning, operation, fixture in _LOOPS:
            loop = work.names(operation, fixture, clients=clients)
            yield measure(name, meaning, loop, clients)
            yield measure(f"{name}-uncached", f"{meaning}, {_NO_CACHE}", loop, clients, Profile.UNCACHED)
        create_loop = work.new_files("create", clients=clients)
        yield measure("create", "open of a new name + write of 4 KiB + close", create_loop, clients)
        yield measure("publish", PUBLISH_MEANING, work.publishing(clients), clients)
    yield measure("rewrite", "open with O_TRUNC + write of 4 KiB + close", work.new_files("rewrite"))
    yield measure("readdir", "entries of one large directory", work.names("list", fixtures.listed))


def _programs() -> Iterator[Measure]:
    def measure(name: str, meaning: str, workload: Workload) -> Measure:
        return Measure(Figure(name, PROGRAMS, meaning, "s"), workload)

    yield measure("safetensors-cold", "safetensors loads a model, " + Cache.COLD.value, work.model_load(Cache.COLD))
    yield measure("safetensors-warm", "safetensors loads a model a second time", work.model_load(Cache.WARM))
    yield measure("git-status", "git status in a repository of numpy", work.repeated(work.git_status))
    yield measure("python-import", "python -c 'import numpy'", work.repeated(work.python_import))


def _suffix(clients: int) -> str:
    """The name of a measure with one client is the plain one."""
    return "" if clients == 1 else f"/{clients}"
