"""Programs that lock, unmodified, on two nodes: one of them is inside, and a killed holder's lock is free.

The mounts that share no locks (`locks=memory`) are the control: there two are inside.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.support.mounting import Mount
from tests.tools import locking
from tests.tools.locking import (
    KERNEL_LOCKS,
    LOCKFILE,
    NO_LOCK,
    SOFT_LOCKS,
    STRICT,
    Tool,
    contend,
    got_it,
    holding,
    waiting,
)

LEASE_SECONDS = 3
# Lease, the delay after it, and what a starting interpreter takes where many share the processor.
RECOVERY_SECONDS = LEASE_SECONDS + 3 + 20
# A lock that is free within the time for a start was not freed by the end of this lease.
LONG_LEASE_SECONDS = 600
PROCESSES = 4

EVERY_LOCK = {**KERNEL_LOCKS, **SOFT_LOCKS, "StrictSoftFileLock": STRICT, "lockfile-create": LOCKFILE}
# What starts programs in each turn takes fewer turns.
TURNS = {"flock": 40, "lockfile": 20, "git": 12}

Nodes = tuple[Mount, Mount]
kernel_locks = pytest.mark.parametrize("tool", KERNEL_LOCKS.values(), ids=KERNEL_LOCKS)


def make_nodes(make_mount: MountFactory, lease_seconds: int) -> Nodes:
    options = f"locks=leasefile,lease_seconds={lease_seconds}"
    return make_mount("-o", options), make_mount("-o", options)


def places(nodes: Nodes) -> list[Path]:
    return [nodes[number % 2].path for number in range(PROCESSES)]


@pytest.fixture
def nodes(make_mount: MountFactory) -> Nodes:
    """Two mounts of one directory, which share their locks; no lease ends, however busy the machine is."""
    return make_nodes(make_mount, LONG_LEASE_SECONDS)


@pytest.fixture
def apart(make_mount: MountFactory) -> Nodes:
    """Two mounts of one directory that know nothing of each other's locks."""
    return make_mount("-o", "locks=memory"), make_mount("-o", "locks=memory")


@pytest.mark.parametrize("tool", EVERY_LOCK.values(), ids=EVERY_LOCK)
def test_one_is_inside(tool: Tool, nodes: Nodes, tmp_path: Path) -> None:
    locking.prepare(tool, nodes[0].path, tmp_path / "hooks")
    turns = TURNS.get(tool.name, 80)
    assert contend(tool, places(nodes), tmp_path / "marker", turns=turns) == 0
    if tool.name == "git":
        repository = nodes[1] / tool.target
        history = locking.git(repository, "rev-list", "HEAD").split()
        moves = locking.git(repository, "reflog", "--format=%H").split()
        assert history == moves  # no commit is lost
        assert len(history) > turns
        locking.git(repository, "fsck", "--strict")


@kernel_locks
def test_control_locks_that_are_not_shared(tool: Tool, apart: Nodes, tmp_path: Path) -> None:
    assert contend(tool, places(apart), tmp_path / "marker", turns=TURNS.get(tool.name, 80)) > 0


def test_control_without_a_lock(nodes: Nodes, tmp_path: Path) -> None:
    """The marker shows it where nobody locks, whatever the mounts share."""
    assert contend(NO_LOCK, places(nodes), tmp_path / "marker", turns=80) > 0


@kernel_locks
@pytest.mark.parametrize("waits", [0, 1], ids=["same-node", "other-node"])
def test_a_killed_holders_lock_is_free(tool: Tool, waits: int, nodes: Nodes, tmp_path: Path) -> None:
    """At once: no lease of a node has ended, and none ends here."""
    with holding(tool, nodes[0].path) as holder, waiting(tool, nodes[waits].path, tmp_path / "marker") as waiter:
        assert not got_it(waiter, 1)
        holder.kill()
        assert got_it(waiter, RECOVERY_SECONDS)


@kernel_locks
def test_a_dead_nodes_lock_is_free(tool: Tool, make_mount: MountFactory, tmp_path: Path) -> None:
    """Holder and daemon are killed: within the lease another node has the lock."""
    nodes = make_nodes(make_mount, LEASE_SECONDS)
    with holding(tool, nodes[0].path) as holder, waiting(tool, nodes[1].path, tmp_path / "marker") as waiter:
        assert not got_it(waiter, 1)
        nodes[0].kill()
        holder.kill()
        assert got_it(waiter, RECOVERY_SECONDS)
