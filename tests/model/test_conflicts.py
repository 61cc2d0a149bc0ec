"""Writers of one name, on two mounts and below them, in any interleaving: the conflict table against a reference.

The reference carries the table out on plain values (docs/semantics.md, "Conflicts").  After every step the name has to
show what the reference says, in all three places, and in the end every byte whose close was acknowledged is shown or
was superseded by the table, and every byte whose close was refused is in quarantine.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.places import content, in_quarantine
from tests.support.mounting import Mount

EXAMPLES = int(os.environ.get("SAFEFS_MODEL_EXAMPLES", "100"))
WRITERS = 3
RECORD_BYTES = 4096
MODES = {
    "append": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
    "update": os.O_RDWR | os.O_CREAT,
    "truncate": os.O_WRONLY | os.O_TRUNC | os.O_CREAT,
}

pieces = st.sampled_from([b"x", b"xx", b"one line\n", b"x" * 3000, b"r" * 5000])
writers = st.integers(0, WRITERS - 1)
steps = st.one_of(
    st.tuples(st.just("open"), writers, st.sampled_from(sorted(MODES))),
    st.tuples(st.just("write"), writers, pieces, st.integers(0, 6)),
    st.tuples(st.just("write"), writers, pieces, st.just(0)),
    st.tuples(st.just("close"), writers),
    st.tuples(st.just("close"), writers),
    st.tuples(st.just("below"), pieces),
    st.tuples(st.just("unlink")),
    st.tuples(st.just("away")),
)
# Most of what can happen needs several who started from one version.
starts = st.tuples(
    st.tuples(st.just("below"), pieces),
    *(st.tuples(st.just("open"), st.just(number), st.sampled_from(sorted(MODES))) for number in range(WRITERS)),
    *(st.tuples(st.just("write"), st.just(number), pieces, st.sampled_from([0, 1, 5])) for number in range(WRITERS)),
)
plans = st.builds(lambda start, rest: [*start, *rest], starts, st.lists(steps, max_size=16))


@dataclass(eq=False)
class Version:
    """What a name shows, or showed."""

    data: bytes
    linked: bool = True


@dataclass(eq=False)
class Pending:
    """One writer's open file."""

    descriptor: int
    base: Version | None  # None: it started from nothing
    data: bytearray
    appends: bool
    changed: bool


@dataclass
class Reference:
    """The name, its open files, and the table."""

    version: Version | None = None
    away: Version | None = None  # what was renamed away last
    pending: dict[int, Pending] = field(default_factory=dict)

    def show(self, version: Version | None) -> None:
        if self.version is not None and self.version is not version:
            self.version.linked = False
        self.version = version

    def move_away(self) -> None:
        if self.away is not None:
            self.away.linked = False
        self.away, self.version = self.version, None

    def opened(self, number: int, descriptor: int, mode: str) -> None:
        fresh = mode == "truncate" or self.version is None
        base = None if fresh else self.version
        data = bytearray(base.data if base else b"")
        self.pending[number] = Pending(descriptor, base, data, mode == "append", fresh)

    def wrote(self, number: int, data: bytes, offset: int) -> None:
        pending = self.pending[number]
        at = len(pending.data) if pending.appends else offset
        pending.data.extend(bytes(max(0, at + len(data) - len(pending.data))))
        pending.data[at : at + len(data)] = data
        pending.changed = True

    def closed(self, number: int) -> int:
        """The errno of the close."""
        pending = self.pending.pop(number)
        ours, base, shown = bytes(pending.data), pending.base, self.version
        if not pending.changed:
            return 0
        if base is None or shown is base or (shown is None and base.linked):
            self.show(Version(ours))
        elif shown is None:
            return errno.ESTALE
        elif pending.appends and 0 < len(ours) - len(base.data) <= RECORD_BYTES and shown.data.startswith(base.data):
            self.show(Version(shown.data + ours[len(base.data) :]))
        elif shown.data.startswith(ours):
            pass
        elif ours.startswith(shown.data):
            self.show(Version(ours))
        else:
            return errno.ESTALE
        return 0


@dataclass
class Parties:
    """The writers, of which the last is alone on the second mount."""

    mounts: tuple[Mount, Mount]
    actors: list[Actor]

    @property
    def backing(self) -> Path:
        return self.mounts[0].backing

    def path(self, number: int, name: str) -> Path:
        return self.mounts[number == WRITERS - 1] / name

    def places(self, name: str) -> list[Path]:
        return [self.mounts[0] / name, self.mounts[1] / name, self.backing / name]


@pytest.fixture(params=["auto", "hidden"])
def parties(request: pytest.FixtureRequest, make_mount: MountFactory) -> Iterator[Parties]:
    kind = f"temp={request.param}"
    with ExitStack() as stack:
        mounts = (make_mount("-o", kind), make_mount("-o", kind))
        yield Parties(mounts, [stack.enter_context(actor()) for _ in range(WRITERS)])


def take(step: tuple[object, ...], parties: Parties, reference: Reference, name: str) -> None:
    """One step, in reality and in the reference."""
    match step:
        case ("open", int(number), str(mode)) if number not in reference.pending:
            descriptor = parties.actors[number].open(parties.path(number, name), MODES[mode])
            reference.opened(number, descriptor, mode)
        case ("write", int(number), bytes(data), int(offset)) if number in reference.pending:
            pending = reference.pending[number]
            call = "os.write(fd, data)" if pending.appends else "os.pwrite(fd, data, offset)"
            parties.actors[number](call, fd=pending.descriptor, data=data, offset=offset)
            reference.wrote(number, data, offset)
        case ("close", int(number)) if number in reference.pending:
            close(number, parties, reference)
        case ("below", bytes(data)):
            (parties.backing / f"{name}.new").write_bytes(data)
            (parties.backing / f"{name}.new").rename(parties.backing / name)
            reference.show(Version(data))
        case ("unlink",) if reference.version is not None:
            (parties.mounts[0] / name).unlink()
            reference.show(None)
        case ("away",) if reference.version is not None:
            (parties.mounts[1] / name).rename(parties.mounts[1] / f"{name}.away")
            reference.move_away()


def close(number: int, parties: Parties, reference: Reference) -> None:
    pending = reference.pending[number]
    expected, ours = reference.closed(number), bytes(pending.data)
    assert parties.actors[number].errno("os.close(fd)", fd=pending.descriptor) == expected
    if expected:
        assert in_quarantine(parties.backing, lambda data: data == ours)


def interleave(parties: Parties, examples: int) -> None:
    """Try so many plans, each with a name of its own."""
    numbers = itertools.count()

    @settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    @given(plan=plans)
    def run(plan: list[tuple[object, ...]]) -> None:
        name, reference = f"file{next(numbers)}", Reference()
        for step in [*plan, *(("close", number) for number in range(WRITERS))]:
            take(step, parties, reference, name)
            expected = reference.version.data if reference.version else None
            for place in parties.places(name):
                assert content(place) == expected, place

    run()


def test_any_interleaving(parties: Parties) -> None:
    interleave(parties, EXAMPLES)
