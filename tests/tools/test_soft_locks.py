"""Files whose existence is the lock: one that a killed holder left is taken away, one that is meant to stay stays.

The bare directory is the control: there the file stays, and nobody gets the lock any more.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.support.mounting import Mount, wait_until
from tests.tools import locking
from tests.tools.locking import LOCKFILE, SOFT_LOCKS, Tool, got_it, holding, waiting

LEASE_SECONDS = 3
# Lease, the delay after it, and what a starting interpreter takes where many share the processor.
RECOVERY_SECONDS = LEASE_SECONDS + 3 + 20
# A file that is gone within the time for a start was not removed because this lease ended.
LONG_LEASE_SECONDS = 600

FILES = {"SoftFileLock": "x.lock", "FileBaton": "lock", "git": "repository/.git/index.lock"}

soft_locks = pytest.mark.parametrize("tool", SOFT_LOCKS.values(), ids=SOFT_LOCKS)


def make_nodes(make_mount: MountFactory, lease_seconds: int) -> tuple[Mount, Mount]:
    options = f"locks=leasefile,lease_seconds={lease_seconds}"
    return make_mount("-o", options), make_mount("-o", options)


@pytest.fixture
def nodes(make_mount: MountFactory) -> tuple[Mount, Mount]:
    """Two mounts of one directory, which share their locks."""
    return make_nodes(make_mount, LEASE_SECONDS)


@soft_locks
@pytest.mark.parametrize(
    ("died", "waits"),
    [("process", 0), ("process", 1), ("node", 1)],
    ids=["process-same-node", "process-other-node", "node"],
)
def test_a_killed_holders_file_is_removed(
    tool: Tool, died: str, waits: int, make_mount: MountFactory, tmp_path: Path
) -> None:
    """Of a process that a signal ended, at once; of one whose daemon was killed with it, within the lease."""
    nodes = make_nodes(make_mount, LEASE_SECONDS if died == "node" else LONG_LEASE_SECONDS)
    locking.prepare(tool, nodes[0].path, tmp_path / "hooks")
    file = nodes[1] / FILES[tool.name]
    # Under different host names: SoftFileLock itself removes files of dead processes of its own host.
    with (
        holding(tool, nodes[0].path, "node-a") as holder,
        waiting(tool, nodes[waits].path, tmp_path / "marker", "node-b") as waiter,
    ):
        assert not got_it(waiter, 1)
        assert file.exists()
        if died == "node":
            nodes[0].kill()
        holder.kill()
        assert got_it(waiter, RECOVERY_SECONDS)
    assert not file.exists()


@soft_locks
def test_control_a_bare_directory_keeps_it(tool: Tool, tmp_path: Path) -> None:
    place = tmp_path / "bare"
    place.mkdir()
    locking.prepare(tool, place, tmp_path / "hooks")
    with (
        holding(tool, place, "node-a") as holder,
        waiting(tool, place, tmp_path / "marker", "node-b") as waiter,
    ):
        assert not got_it(waiter, 1)
        holder.kill()
        assert not got_it(waiter, LEASE_SECONDS + 3)
    assert (place / FILES[tool.name]).exists()


def lockfile(program: str, place: Path, *options: str) -> int:
    """Run a program of lockfile-progs on the lock in a place; its exit status."""
    return subprocess.run([program, *options, place / LOCKFILE.target], timeout=30, capture_output=True).returncode


def test_a_lock_outlives_the_clean_exit_of_its_creator(nodes: tuple[Mount, Mount]) -> None:
    """lockfile-create ends and its lock stands, on all nodes, until lockfile-remove on any of them."""
    one, two = nodes[0].path, nodes[1].path
    assert lockfile("lockfile-create", one, "--retry", "0") == 0
    file = nodes[1].backing / f"{LOCKFILE.target}.lock"
    assert not wait_until(lambda: not file.exists(), LEASE_SECONDS + 3 + 2)
    for place in (one, two):
        assert lockfile("lockfile-check", place) == 0
        assert lockfile("lockfile-create", place, "--retry", "0") != 0
    assert lockfile("lockfile-remove", two) == 0
    assert lockfile("lockfile-check", one) != 0
    assert lockfile("lockfile-create", two, "--retry", "0") == 0


def test_a_lock_outlives_the_clean_exit_of_a_plain_creator(nodes: tuple[Mount, Mount]) -> None:
    """The same of a file that was made with O_EXCL under the lock's own name (`set -C` of a shell)."""
    file = nodes[0] / "x.lock"
    script = ["sh", "-c", 'set -C; : >"$0"', file]
    assert subprocess.run(script, timeout=30, capture_output=True).returncode == 0
    assert not wait_until(lambda: not os.path.lexists(nodes[1] / "x.lock"), LEASE_SECONDS + 3 + 2)
    assert subprocess.run(script, timeout=30, capture_output=True).returncode != 0
