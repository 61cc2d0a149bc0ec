"""Fixtures: a fresh backing directory, one mount of it, two mounts that stand for two nodes, and processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from tests.mount.actors import Actor, actor
from tests.support.mounting import Mount, mounted

MountFactory = Callable[..., Mount]

# Whoever starts the tests in the background has SIGINT ignored (sh), which every process below would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    """An empty directory on the machine's own filesystem."""
    directory = tmp_path / "backing"
    directory.mkdir()
    return directory


@pytest.fixture
def make_mount(tmp_path: Path, backing: Path) -> Iterator[MountFactory]:
    """Mount `backing` (or another directory) as often as wanted; everything is unmounted at the end."""
    with ExitStack() as stack:
        count = 0

        def make(*arguments: str, backing: Path = backing, **options: object) -> Mount:
            nonlocal count
            count += 1
            return stack.enter_context(mounted(backing, tmp_path / f"mnt{count}", *arguments, **options))

        yield make


@pytest.fixture
def mount(make_mount: MountFactory) -> Mount:
    """One mount of the backing directory."""
    return make_mount()


@pytest.fixture
def two_mounts(make_mount: MountFactory) -> tuple[Mount, Mount]:
    """Two mounts of one backing directory: two nodes."""
    return make_mount(), make_mount()


@pytest.fixture
def writer() -> Iterator[Actor]:
    """A process that writes."""
    with actor() as party:
        yield party


@pytest.fixture
def stranger() -> Iterator[Actor]:
    """A process that is no relative of `writer`."""
    with actor() as party:
        yield party


@pytest.fixture
def third() -> Iterator[Actor]:
    """One more stranger."""
    with actor() as party:
        yield party
