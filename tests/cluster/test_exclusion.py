"""Several mounts of one directory as several nodes: a lock is held by one, whatever its kind, and everybody gets it.

Who is inside makes a marker file with O_EXCL in a plain directory and removes it again; two inside find each other's.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.test_locks import BLOCK, BLOCKED, CODE, RELEASE, TRY, opened
from tests.support.mounting import Mount, status, wait_until

HOLDS = 3400  # by each kind of lock
LEASE_SECONDS = 3.0
RECOVERY_SECONDS = LEASE_SECONDS + 3.0 + 2.0  # lease, delay, and what the issue allows

# Each turn takes the lock, by waiting or by trying, and looks whether anybody else is inside.
LOOP = r"""
import random
def hold(fd, block, attempt, release, marker, turns, seed):
    chance = random.Random(seed)
    overlaps = refused = 0
    for turn in range(turns):
        if chance.random() < 0.2:
            try:
                eval(attempt)
            except OSError:
                refused += 1
                eval(block)
        else:
            eval(block)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            os.unlink(marker)
        except FileExistsError:
            overlaps += 1
        eval(release)
    return overlaps, refused
"""

Nodes = list[Mount]
Make = Callable[[int], Nodes]
kinds = pytest.mark.parametrize("kind", list(TRY))


@pytest.fixture
def make_nodes(make_mount: MountFactory) -> Make:
    """So many mounts of one directory, which share their locks."""
    options = f"locks=leasefile,lease_seconds={LEASE_SECONDS:g}"
    return lambda count: [make_mount("-o", options) for _ in range(count)]


@pytest.fixture
def parties() -> Iterator[Callable[[], Actor]]:
    with ExitStack() as stack:

        def make() -> Actor:
            process = stack.enter_context(actor())
            process(CODE)
            process(LOOP)
            return process

        yield make


def overlaps(nodes: Nodes, parties: Callable[[], Actor], kind: str, marker: Path, holds: int) -> int:
    """How often two of six processes on these mounts were inside at the same time."""
    processes = [parties() for _ in range(6)]
    for number, process in enumerate(processes):
        opened(process, nodes[number % len(nodes)] / "x.lock")
    for number, process in enumerate(processes):
        process.start(
            "hold(fd, block, attempt, release, marker, turns, seed)",
            block=BLOCK[kind],
            attempt=TRY[kind],
            release=RELEASE[kind],
            marker=str(marker),
            turns=holds // len(processes),
            seed=number,
        )
    found = [process.result(250) for process in processes]
    return sum(overlap for overlap, _ in found)


@pytest.mark.timeout(300)
@kinds
def test_no_two_are_inside(make_nodes: Make, parties: Callable[[], Actor], kind: str, tmp_path: Path) -> None:
    assert overlaps(make_nodes(3), parties, kind, tmp_path / "marker", HOLDS) == 0


@kinds
def test_control_mounts_that_share_nothing_overlap(
    make_mount: MountFactory, parties: Callable[[], Actor], kind: str, tmp_path: Path
) -> None:
    nodes = [make_mount("-o", "locks=memory") for _ in range(3)]
    assert overlaps(nodes, parties, kind, tmp_path / "marker", 1200) > 0


@kinds
def test_a_lock_of_another_node(make_nodes: Make, parties: Callable[[], Actor], kind: str) -> None:
    """Refused, waited for, and handed over when its holder is killed."""
    nodes = make_nodes(2)
    one, two = parties(), parties()
    opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY[kind])
    assert two.errno(TRY[kind]) in BLOCKED
    two.start(BLOCK[kind])
    time.sleep(0.3)
    one.kill(signal.SIGKILL)
    two.result(10)


def test_a_waiter_on_another_node_can_be_interrupted(make_nodes: Make, parties: Callable[[], Actor]) -> None:
    nodes = make_nodes(2)
    one, two = parties(), parties()
    opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY["flock"])
    two.start(BLOCK["flock"])
    time.sleep(0.3)
    start = time.monotonic()
    two.kill(signal.SIGKILL)
    assert time.monotonic() - start < 2
    one(RELEASE["flock"])
    one(TRY["flock"])


def test_exclusive_creation(make_nodes: Make, parties: Callable[[], Actor], tmp_path: Path) -> None:
    """Of many that make one name with O_EXCL on several nodes, one does; also while nobody sees the file yet."""
    nodes = make_nodes(3)
    processes = [parties() for _ in range(6)]
    for turn in range(30):
        for number, process in enumerate(processes):
            path = nodes[number % 3] / f"file{turn}"
            process.start("os.open(p, os.O_CREAT | os.O_EXCL | os.O_WRONLY)", p=str(path))
        won = []
        for process in processes:
            try:
                won.append((process, process.result(30)))
            except FileExistsError:
                continue
        assert len(won) == 1, turn
        winner, fd = won[0]
        winner.write(fd, b"x")
        winner.closefd(fd)
        assert wait_until(lambda turn=turn: (nodes[0].backing / f"file{turn}").exists())


@kinds
def test_a_killed_daemons_locks_are_free(make_nodes: Make, parties: Callable[[], Actor], kind: str) -> None:
    """At once, because its neighbours see that its process is gone."""
    nodes = make_nodes(2)
    one, two = parties(), parties()
    opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY[kind])
    two.start(BLOCK[kind])
    time.sleep(0.3)
    nodes[0].kill()
    two.result(RECOVERY_SECONDS)


def test_a_frozen_daemon_loses_its_locks_and_knows_it(make_nodes: Make, parties: Callable[[], Actor]) -> None:
    """SIGSTOP for longer than its lease: another node gets the lock, and what was written under it is not published."""
    nodes = make_nodes(2)
    one, two = parties(), parties()
    fd = opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY["flock"])
    one.write(fd, b"under a lock that is lost")
    nodes[0].expected_log.append("the lease of this node is lost")
    two.start(BLOCK["flock"])
    time.sleep(0.3)
    nodes[0].process.send_signal(signal.SIGSTOP)
    try:
        two.result(RECOVERY_SECONDS)
        two("os.write(fd, b'mine'); os.close(fd)")
    finally:
        nodes[0].process.send_signal(signal.SIGCONT)
    assert one.errno("os.close(fd)") == 5  # EIO
    assert (nodes[0].backing / "data").read_bytes() == b"mine"
    assert status(nodes[0])["counters"].get("refused") == 1
    # And it takes part again.
    opened(one, nodes[0] / "other")
    one(TRY["flock"])
