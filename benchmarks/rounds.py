"""Interleaved rounds: in each, every measure goes through all systems, in an order that rotates.

So two figures of one ratio were taken within seconds of each other, and no system always comes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchmarks import fixtures
from benchmarks.client import Client
from benchmarks.errors import MeasureFailedError, SystemFailedError
from benchmarks.measures import Measure
from benchmarks.mounts import LiveMount
from benchmarks.results import Run, Sample
from benchmarks.scale import Scale
from benchmarks.systems import Place, Profile, System
from benchmarks.turns import Turn

FILL_SECONDS = 600

Thing = TypeVar("Thing")


def rotated(things: Sequence[Thing], by: int) -> list[Thing]:
    by %= len(things) or 1
    return [*things[by:], *things[:by]]


@dataclass
class Fleet:
    """The mounts of a run, each made when it is first needed and kept; what a system fails at is written down."""

    place: Place
    scale: Scale
    run: Run
    with_package: bool
    _mounts: dict[tuple[str, Profile], LiveMount] = field(default_factory=dict)
    _filled: set[str] = field(default_factory=set)

    def mount(self, system: System, profile: Profile) -> LiveMount:
        """A mount with all fixtures on it; SystemFailedError if it cannot be had."""
        key = (system.name, profile)
        if key not in self._mounts:
            context = system.mounted(self.place, profile, self.place.backing)
            self._mounts[key] = self.place.stack.enter_context(context)
            if system.state is not None and profile is Profile.DEFAULT:
                self.run.machine[f"{system.name} mount"] = system.state(self._mounts[key].path)
            with self._mounts[key].watched(FILL_SECONDS):
                self._fill(system, self._mounts[key].path)
        return self._mounts[key]

    def _fill(self, system: System, root: Path) -> None:
        """A system with a store of its own gets its fixtures through its first mount."""
        if system.shares or system.name in self._filled:
            return
        self._filled.add(system.name)
        try:
            fixtures.lay_out(root, self.scale)
            if self.with_package:
                fixtures.copy_package(self.place.backing, root)
        except OSError as error:
            raise SystemFailedError(f"its fixtures could not be made: {error.strerror}") from None

    def give_up(self, system: System, reason: str) -> None:
        """Measure a system no further."""
        self.run.left_out[system.name] = reason
        for (name, _), mount in self._mounts.items():
            if name == system.name:
                mount.abort()


@dataclass
class Rounds:
    """All rounds of a run.  `tell` hears what is being done, `advance` that a turn is over."""

    fleet: Fleet
    client: Client
    systems: Sequence[System]
    measures: Sequence[Measure]
    tell: Callable[[str], None]
    advance: Callable[[], None]
    _failed: set[tuple[str, str]] = field(default_factory=set)

    def go(self, count: int, limit_seconds: float) -> None:
        """At most `count` rounds; a further one only if it ends in time, going by the one before.

        Should already the first take longer, its last measures are left out.  Systems measured once are in the first.
        """
        start = time.monotonic()
        for number in range(count):
            expected = self._round(number, count, start + limit_seconds)
            if time.monotonic() + expected > start + limit_seconds:
                return

    def _round(self, number: int, count: int, deadline: float) -> float:
        """How many seconds it took those that are also in the next round."""
        seconds = 0.0
        for measure in self.measures:
            if time.monotonic() > deadline:
                self.fleet.run.notes.append(f"{measure.name} in round {number + 1}: out of time")
                continue
            for system in rotated(self.systems, number):
                begin = time.monotonic()
                if self._takes_part(system, measure, number):
                    self.tell(f"round {number + 1} of {count}: {measure.name} on {system.name}")
                    self._attempt(measure, system, number)
                seconds += 0 if system.once else time.monotonic() - begin
                self.advance()
        return seconds

    def _takes_part(self, system: System, measure: Measure, number: int) -> bool:
        failed = system.name in self.fleet.run.left_out or (measure.name, system.name) in self._failed
        return not failed and not (system.once and number)

    def _attempt(self, measure: Measure, system: System, number: int) -> None:
        run = self.fleet.run
        try:
            mount = self.fleet.mount(system, measure.profile)
            run.samples.append(self._sample(measure, system, mount, number))
        except SystemFailedError as error:
            self.fleet.give_up(system, f"{measure.name}: {error}")
        except MeasureFailedError as error:
            self._failed.add((measure.name, system.name))
            run.notes.append(f"{measure.name} on {system.name}: {error}")

    def _sample(self, measure: Measure, system: System, mount: LiveMount, number: int) -> Sample:
        fleet = self.fleet
        scratch = mount.path / f"scratch-{system.name}-{measure.profile.value}"
        turn = Turn(mount, fleet.place.backing, system.publishes, scratch, self.client, fleet.scale)
        # What comes after the workload may wait for the daemon as well.
        with mount.watched(2 * fleet.scale.turn_seconds):
            try:
                scratch.mkdir(exist_ok=True)
                value = measure.workload(turn)
            except SystemFailedError:
                mount.abort()
                raise
            except OSError as error:
                raise MeasureFailedError(str(error.strerror)) from None
            finally:
                turn.clear()
        return Sample(measure.name, system.name, number, value.value / measure.scale, value.cpu_seconds)
