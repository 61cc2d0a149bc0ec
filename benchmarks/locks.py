"""Locks: what one costs, how fast it goes from node to node, and how often it can be had, beside other lock services.

Nodes are mounts of one directory.  Each service has a directory of its own; the order of the services rotates from
round to round, as in rounds.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from benchmarks.catalogue import mount_safefs
from benchmarks.client import Client, Job
from benchmarks.contest import contend
from benchmarks.errors import MeasureFailedError, SystemFailedError
from benchmarks.mounts import LiveMount
from benchmarks.results import Figure, Run, Sample
from benchmarks.rounds import rotated
from benchmarks.scale import Scale
from benchmarks.servers import etcd_address, start_etcd
from benchmarks.systems import Command, Place, Profile, Request, System
from safefs.cluster.backend import BackendError, LockBackend
from safefs.cluster.etcd import EtcdBackend
from safefs.cluster.etcd_client import Access, Endpoint
from safefs.cluster.leasefile import LeasefileBackend, Site
from safefs.cluster.record import NameRecord
from safefs.lease import Terms

NODES = 2
LOCK_NAME = "contended.lock"

MEMORY, LEASEFILE, ETCD = "safefs-memory", "safefs-leasefile", "safefs-etcd"
STRICT_SOFT, ETCD_LOCK = "filelock-strict", "etcd-lock"
# What is shown side by side: locks that rest on files, and locks that rest on etcd.
COMPARED = ((LEASEFILE, STRICT_SOFT), (ETCD, ETCD_LOCK))


@dataclass(frozen=True)
class LockService:
    """Something to lock with.

    `system` says how it is mounted, or that it is the bare directory, `kind` how a process of contest.py asks for a
    lock, `backend` what the nodes share.
    """

    system: System
    kind: str = "flock"
    spans_nodes: bool = True
    backend: Callable[[Place], LockBackend] | None = None

    @property
    def name(self) -> str:
        return self.system.name


def _etcd_mount(request: Request) -> list[str | Path]:
    return list(mount_safefs(f"locks=etcd://{etcd_address(request.place)}")(request))


def _leasefile_backend(place: Place) -> LockBackend:
    return LeasefileBackend(Site(str(place.directory("lease-files")), Terms(), {}, lambda _: False, lambda: 0))


def _etcd_backend(place: Place) -> LockBackend:
    access = Access((Endpoint.parse(etcd_address(place)),))
    return EtcdBackend(access, "/benchmark", Terms(), {}, lambda _: False)


def _safefs(name: str, title: str, command: Command, option: str, *, needs_etcd: bool = False) -> System:
    programs, prepare = (("etcd",), start_etcd) if needs_etcd else ((), None)
    return System(name, title, command, programs, safefs_option=option, prepare=prepare, helper="etcd" * needs_etcd)


SERVICES = (
    LockService(System("native", "flock(2) in the bare directory: one kernel"), spans_nodes=False),
    LockService(
        _safefs(MEMORY, "safefs -o locks=memory: one node", mount_safefs("locks=memory"), "locks"), spans_nodes=False
    ),
    LockService(
        _safefs(LEASEFILE, "safefs -o locks=leasefile", mount_safefs("locks=leasefile"), "locks"),
        backend=_leasefile_backend,
    ),
    LockService(
        _safefs(ETCD, "safefs -o locks=etcd://…", _etcd_mount, "locks", needs_etcd=True), backend=_etcd_backend
    ),
    LockService(System(STRICT_SOFT, "filelock.StrictSoftFileLock in the bare directory"), "strict-soft"),
    LockService(
        System(
            ETCD_LOCK,
            "etcd's own lock service, through its gateway",
            programs=("etcd",),
            version=("etcd", "--version"),
            prepare=start_etcd,
            helper="etcd",
        ),
        "etcd",
    ),
)


@dataclass
class Arena:
    """A service in a run, with the mounts of its nodes, each made when it is first needed."""

    service: LockService
    place: Place
    client: Client
    scale: Scale
    _mounts: list[LiveMount] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.place.directory("locked", self.service.name)

    def mount(self, node: int) -> LiveMount:
        system = self.service.system
        if system.prepare is not None and system.helper not in self.place.services:
            system.prepare(self.place)
        if system.command is None:
            return LiveMount(self.directory)
        while len(self._mounts) <= node:
            context = system.mounted(self.place, Profile.DEFAULT, self.directory)
            self._mounts.append(self.place.stack.enter_context(context))
        return self._mounts[node]

    def abort(self) -> None:
        for mount in self._mounts:
            mount.abort()

    def target(self, node: int) -> str:
        """What a process on a node contends for."""
        root = self.mount(node).path
        return etcd_address(self.place) if self.service.kind == "etcd" else str(root / LOCK_NAME)


Work = Callable[[Arena], tuple[float, float]]  # value, processor seconds


@dataclass(frozen=True)
class LockMeasure:
    """A figure, the work that yields it, and which services it is about."""

    figure: Figure
    work: Work
    concerns: Callable[[LockService], bool]


def _mounted(service: LockService) -> bool:
    return service.system.command is not None


def _uses_flock(service: LockService) -> bool:
    return service.kind == "flock"


def _spans_nodes(service: LockService) -> bool:
    return service.spans_nodes


def _has_backend(service: LockService) -> bool:
    return service.backend is not None


def lock_measures(scale: Scale) -> Iterator[LockMeasure]:
    def measure(name: str, meaning: str, unit: str, work: Work, concerns: Callable[[LockService], bool]) -> LockMeasure:
        clients = int(name.partition("/")[2] or 1)
        return LockMeasure(Figure(name, "Locks", meaning, unit, clients), work, concerns)

    empty = "an ioctl(2) that the daemon refuses in C without a look at anything: the empty round trip"
    yield measure("empty", empty, "1/s", partial(_requests, "empty"), _mounted)
    flush = "a FLUSH that Python answers at once, with nothing to do: the round trip to the interpreter"
    yield measure("flush", flush, "1/s", partial(_requests, "flush"), _mounted)
    flock = "requests of flock(2), lock and unlock in turn, that nobody contends for"
    yield measure("flock", flock, "1/s", partial(_requests, "flock"), _uses_flock)
    for clients in scale.lock_clients:
        name = "acquire" if clients == 1 else f"acquire/{clients}"
        meaning = "locks had and given back by processes that contend for one, on one node"
        yield measure(name, meaning, "1/s", partial(_acquire, [0] * clients), lambda _: True)
    for clients in scale.lock_clients:
        if clients > 1:
            nodes = [number % NODES for number in range(clients)]
            meaning = "the same, the processes on two nodes by turns"
            yield measure(f"acquire-nodes/{clients}", meaning, "1/s", partial(_acquire, nodes), _spans_nodes)
    swap = "the backend's round trip: one swap of a record that nobody contends for"
    yield measure("swap", swap, "s", _swap, _has_backend)
    handover = "from an unlock on one node to the grant on the other, which has waited for"
    for name, hold in (("handover", scale.hold_seconds), ("handover-late", scale.long_hold_seconds)):
        yield measure(name, f"{handover} {hold:g} s", "s", partial(_hand_over, hold), _spans_nodes)


def _requests(operation: str, arena: Arena) -> tuple[float, float]:
    mount = arena.mount(0)
    job = Job(operation, seconds=arena.scale.lock_seconds)
    loop = arena.client.run(job, [mount.path], mount.cpu_seconds, arena.scale.turn_seconds)
    return loop.rate, (loop.cpu + loop.daemon_cpu) / loop.units


def _acquire(nodes: list[int], arena: Arena) -> tuple[float, float]:
    targets = [arena.target(node) for node in nodes]
    return contend(arena.service.kind, targets, arena.scale.lock_seconds).rate(), 0.0


def _hand_over(hold_seconds: float, arena: Arena) -> tuple[float, float]:
    targets = [arena.target(node) for node in range(NODES)]
    # Long enough for some to and fro, whatever a hold takes.
    seconds = max(arena.scale.lock_seconds, 4 * hold_seconds)
    return contend(arena.service.kind, targets, seconds, hold_seconds).handover_seconds(), 0.0


def _swap(arena: Arena) -> tuple[float, float]:
    assert arena.service.backend is not None
    arena.mount(0)  # so that its server runs
    try:
        return trio.run(swap_seconds, arena.service.backend(arena.place), arena.scale.lock_seconds), 0.0
    except BackendError as error:
        raise MeasureFailedError(str(error)) from None


async def swap_seconds(backend: LockBackend, seconds: float) -> float:
    """The median time that a swap takes, of as many as there is time for."""
    await backend.join()
    record = NameRecord(delegate=backend.node)
    taken: list[float] = []
    stored = await backend.read(LOCK_NAME)
    end = time.monotonic() + seconds
    while not taken or time.monotonic() < end:
        start = time.monotonic()
        swapped = await backend.swap(LOCK_NAME, stored, record)
        taken.append(time.monotonic() - start)
        if swapped is None:
            raise MeasureFailedError("a swap that nobody contends for was refused")
        stored = swapped
    await backend.swap(LOCK_NAME, stored, NameRecord())
    await backend.leave()
    return statistics.median(taken)


@dataclass
class LockRounds:
    """All rounds of the locks; `run` gets what is found out.  `tell` hears what is being done, `advance` that it is."""

    place: Place
    run: Run
    scale: Scale
    client: Client
    tell: Callable[[str], None]
    advance: Callable[[], None]
    _failed: set[tuple[str, str]] = field(default_factory=set)

    def _services(self, measure: LockMeasure) -> list[LockService]:
        """Those that a measure is about and that can be measured here."""
        return [service for service in SERVICES if measure.concerns(service) and service.name not in self.run.left_out]

    def steps(self) -> int:
        return self.scale.rounds * sum(len(self._services(measure)) for measure in lock_measures(self.scale))

    def go(self) -> None:
        start = time.monotonic()
        try:
            self._go()
        finally:
            self.run.seconds = time.monotonic() - start

    def _go(self) -> None:
        arenas = {service.name: Arena(service, self.place, self.client, self.scale) for service in SERVICES}
        for number in range(self.scale.rounds):
            for measure in lock_measures(self.scale):
                name = measure.figure.name
                for service in rotated(self._services(measure), number):
                    self.tell(f"round {number + 1} of {self.scale.rounds}: {name} on {service.name}")
                    if (name, service.name) not in self._failed:
                        self._attempt(measure, arenas[service.name], number)
                    self.advance()

    def _attempt(self, measure: LockMeasure, arena: Arena, number: int) -> None:
        name, service = measure.figure.name, arena.service.name
        try:
            value, cpu_seconds = measure.work(arena)
        except SystemFailedError as error:
            arena.abort()
            self.run.left_out[service] = f"{name}: {error}"
        except MeasureFailedError as error:
            self._failed.add((name, service))
            self.run.notes.append(f"{name} on {service}: {error}")
        else:
            self.run.samples.append(Sample(name, service, number, value, cpu_seconds))
