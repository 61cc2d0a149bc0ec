"""Mounts as nodes, with either kind of draft: nameless (O_TMPFILE) or under a hidden name; and who locks files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.lockers import CODE, Make
from tests.support.mounting import Mount

# For the claims that the kind of temporary file could break.
both_temps = pytest.mark.parametrize("nodes", ["auto", "hidden"], indirect=True)

# For claims about stat(2) where the kernel cannot know of the change: on another node, and behind the mount's back.
# It may show what was true a second ago otherwise (docs/semantics.md, "Validity").
_NOTHING_KEPT = "entry_timeout=0,attr_timeout=0"
both_temps_exact = pytest.mark.parametrize(
    "nodes", [f"auto,{_NOTHING_KEPT}", f"hidden,{_NOTHING_KEPT}"], indirect=True, ids=["auto", "hidden"]
)


@pytest.fixture
def nodes(request: pytest.FixtureRequest, make_mount: MountFactory) -> tuple[Mount, Mount]:
    """Two mounts of one directory; parametrized by `both_temps`, with that kind of temporary file."""
    kind = getattr(request, "param", "auto")
    return make_mount("-o", f"temp={kind}"), make_mount("-o", f"temp={kind}")


@pytest.fixture(params=["bare", "mount"])
def place(request: pytest.FixtureRequest, tmp_path: Path, make_mount: MountFactory) -> Path:
    """A directory: on the mount, or as the control a bare one."""
    if request.param == "mount":
        return make_mount().path
    (tmp_path / "bare").mkdir()
    return tmp_path / "bare"


@pytest.fixture
def party() -> Iterator[Make]:
    """Processes that know the lock calls."""
    actors = []

    def make() -> Actor:
        one = actor()
        actors.append(one)
        process = one.__enter__()
        process(CODE)
        return process

    yield make
    for one in actors:
        one.__exit__(None, None, None)
