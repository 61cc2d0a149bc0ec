"""Where a name can be looked at: on each of two mounts and in the bare backing directory below them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.mounting import Mount, wait_until
from tests.support.observer import Observer, Seen, observing

PIECE = 65536
A = b"a" * PIECE
B = b"b" * PIECE
WHOLE = A + B
ALL_SECONDS = 20.0


def content(path: Path) -> bytes | None:
    """What a fresh open and read gives; None when the name does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def quarantined(backing: Path) -> Iterator[bytes]:
    """The bytes of every file in quarantine."""
    for directory, _, names in os.walk(backing / ".safefs" / "quarantine"):
        for name in names:
            try:
                yield Path(directory, name).read_bytes()
            except FileNotFoundError:
                continue


def in_quarantine(backing: Path, accept: Callable[[bytes], bool]) -> bool:
    """Whether quarantine comes to hold a file that `accept` takes.

    A killed process is a zombie before the daemon has moved its draft, so this waits, but not for long.
    """
    return wait_until(lambda: any(accept(data) for data in quarantined(backing)), ALL_SECONDS)


def leftovers(backing: Path) -> list[str]:
    """Every entry below the backing directory that is neither under .safefs nor visible through a mount."""
    found = []
    for directory, directories, names in os.walk(backing):
        if Path(directory) == backing and ".safefs" in directories:
            directories.remove(".safefs")
        found += [os.path.join(directory, name) for name in names if ".safefs" in name]
    return found


@dataclass
class Stage:
    """One name under observation: the scenario acts on `path`; `absent` and `shows` look at a step.

    As a control, the same scenario runs on a bare directory (`mounts` is empty): there the steps only make sure that
    the observer looked, and the test asserts that it did see an unfinished file.
    """

    path: Path
    paths: list[Path]
    guarded: bool
    observer: Observer = field(init=False)

    def absent(self) -> None:
        """The name does not exist for anybody outside the family."""
        self.only(None)

    def only(self, data: bytes | None) -> None:
        """At this step the name shows exactly `data`, in every place."""
        self.observer.look()
        if self.guarded:
            for path in self.paths:
                found = content(path)
                assert found == data, f"{path} shows something else: {Seen([found], [], [], []).summary()}"

    def published(self, data: bytes, *, everywhere_at_once: bool = True) -> None:
        """The call just made published `data`.

        On the writer's mount it must show at once.  A publish that only RELEASE can carry out is asynchronous to
        other nodes: nothing there waits for it, so they get a short time (`everywhere_at_once=False`).
        """
        if self.guarded:
            assert content(self.path) == data, f"{self.path} is not published when the call returned"
            for path in self.paths:
                if everywhere_at_once:
                    assert content(path) == data, f"{path} is not published when the call returned"
                else:
                    assert wait_until(lambda path=path: content(path) == data, ALL_SECONDS), f"{path} never published"
        self.observer.look()


def stage_on_mounts(mounts: tuple[Mount, Mount], name: str) -> Stage:
    """A name on two mounts and below."""
    first, second = mounts
    return Stage(first / name, [first / name, second / name, first.backing / name], True)


def stage_on_bare(directory: Path, name: str) -> Stage:
    """The same on a directory without safefs."""
    return Stage(directory / name, [directory / name], False)


def watch(stage: Stage, scenario: Callable[[Stage], None], *allowed: bytes | None) -> bool:
    """Run a scenario under observation; True when no more than `allowed` was ever seen."""
    with observing(*stage.paths) as stage.observer:
        scenario(stage)
    if stage.guarded:
        stage.observer.assert_only(*allowed)
        return True
    return all(set(seen.contents) <= set(allowed) for seen in stage.observer.results.values())
