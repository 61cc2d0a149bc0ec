"""Fixtures for mounts as nodes, with either kind of draft: nameless (O_TMPFILE) or under a hidden name."""

from __future__ import annotations

import pytest

from tests.conftest import MountFactory
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
