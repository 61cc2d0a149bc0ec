"""Several mounts of one directory as several nodes: a lock is held by one, whatever its kind, and everybody gets it.

Who is inside makes a marker file with O_EXCL in a plain directory and removes it again; two inside find each other's.
SAFEFS_CLUSTER_HOLDS says how often each kind of lock is held for that, on each backend (`make test-nightly`).
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from safefs.locking import PATIENCE_SECONDS
from tests.cluster.conftest import CALM_LEASE, LAB, Cluster
from tests.cluster.hosts import Node
from tests.mount.actors import Actor
from tests.mount.lockers import BLOCK, BLOCKED, RELEASE, TRY, opened, waits
from tests.support.mounting import Mount, safefs, status, wait_until

HOLDS = int(os.environ.get("SAFEFS_CLUSTER_HOLDS", "90"))  # by each kind of lock
PARTIES = 6
MANY = 50 if LAB else 500  # locks of one node
FAIR_SHARE = 0.2  # of an equal share: what each gets at least while all want the lock, if that is long enough
LONG = 1000  # holds: of less a node that the machine keeps waiting misses most
AT_ONCE_SECONDS = 5.0  # and not only once the lock is free, or START_SECONDS are over
START_SECONDS, HOLD_SECONDS = 60.0, 0.25  # many times what it takes on a busy machine

# Each turn takes the lock, by waiting or by trying, looks whether anybody else is inside, and says who it was.
LOOP = r"""
import random
def hold(fd, block, attempt, release, place, turns, number):
    chance = random.Random(number)
    overlaps = 0
    marker, order = place + "/marker", os.open(place + "/order", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for turn in range(turns):
        if chance.random() < 0.2:
            try:
                eval(attempt)
            except OSError:
                eval(block)
        else:
            eval(block)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            os.write(order, bytes([number]))
            os.unlink(marker)
        except FileExistsError:
            overlaps += 1
        eval(release)
    return overlaps
"""

# The same in bursts with pauses between them: a node has the lock to itself now and then, and answers for it in C.
BURSTS = r"""
def bursts(fd, place, turns, number):
    chance = random.Random(number)
    overlaps = 0
    for turn in range(turns):
        overlaps += hold(fd, "flock(fd, LOCK_EX)", "flock(fd, LOCK_EX | LOCK_NB)", "flock(fd, LOCK_UN)", place,
                         chance.randrange(1, 40), number)
        time.sleep(chance.random() * 0.2)
    return overlaps
"""

Make = Callable[[], Actor]
kinds = pytest.mark.parametrize("kind", list(TRY))
HOLDS_TIMEOUT = 2 * int(START_SECONDS + HOLDS * HOLD_SECONDS)


def overlaps(nodes: list[Mount], parties: Make, kind: str, place: Path, holds: int) -> int:
    """How often two of the processes on these mounts were inside at the same time; at first all wait."""
    processes, first = [parties() for _ in range(PARTIES)], parties()
    opened(first, nodes[0] / "x.lock")
    first(BLOCK[kind])
    for number, process in enumerate(processes):
        process(LOOP)
        opened(process, nodes[number % len(nodes)] / "x.lock")
    for number, process in enumerate(processes):
        process.start(
            "hold(fd, block, attempt, release, place, turns, number)",
            block=BLOCK[kind],
            attempt=TRY[kind],
            release=RELEASE[kind],
            place=str(place),
            turns=holds // PARTIES,
            number=number,
        )
    assert wait_until(lambda: sum(status(node)["locks"]["waiting"] for node in nodes) == PARTIES, START_SECONDS)
    first(RELEASE[kind])
    return sum(process.result(START_SECONDS + holds * HOLD_SECONDS) for process in processes)


def overlaps_one_inside(nodes: list[Mount], parties: Make, kind: str, place: Path, holds: int) -> int:
    """How often one by the second mount finds one inside who stays there, and came by the first."""
    inside, other = parties(), parties()
    for process, node in ((inside, nodes[0]), (other, nodes[1])):
        process(LOOP)
        opened(process, node / "x.lock")
    inside(BLOCK[kind])
    (place / "marker").touch()
    found = other(
        "hold(fd, block, attempt, release, place, turns, 0)",
        block=BLOCK[kind],
        attempt=TRY[kind],
        release=RELEASE[kind],
        place=str(place),
        turns=holds,
    )
    return int(found)


def shares(order: bytes) -> list[float]:
    """How much of an equal share each had until the first had finished."""
    end = min(order.rindex(number) for number in range(PARTIES))
    counts = Counter(order[:end])
    return [counts[number] * PARTIES / end for number in range(PARTIES)]


@pytest.mark.timeout(HOLDS_TIMEOUT)
@pytest.mark.parametrize(("count", "kind"), [(2, "flock"), (3, "fcntl"), (5, "ofd")])
def test_no_two_are_inside_and_everybody_gets_in(
    cluster: Cluster, parties: Make, kind: str, count: int, tmp_path: Path
) -> None:
    nodes = cluster.make(count, lease=CALM_LEASE)
    assert overlaps([node.mount for node in nodes], parties, kind, tmp_path, HOLDS) == 0
    order = (tmp_path / "order").read_bytes()
    assert len(order) == HOLDS // PARTIES * PARTIES
    assert set(order[:PARTIES]) == set(range(PARTIES)), "somebody who waited was overtaken"
    assert HOLDS < LONG or min(shares(order)) > FAIR_SHARE


@pytest.mark.timeout(HOLDS_TIMEOUT)
@kinds
def test_one_node_that_shares_nothing(unshared: Cluster, parties: Make, kind: str, tmp_path: Path) -> None:
    (node,) = unshared.make(1)
    assert overlaps([node.mount], parties, kind, tmp_path, HOLDS) == 0


def answered_in_c(node: Mount) -> int:
    """Lock requests that needed no interpreter (FUSE_SETLK and FUSE_SETLKW)."""
    answered = status(node)["hot"]["answered"]
    return sum(int(answered.get(opcode, 0)) for opcode in ("32", "33"))


@pytest.mark.timeout(HOLDS_TIMEOUT)
def test_bursts_on_two_nodes(cluster: Cluster, parties: Make, tmp_path: Path) -> None:
    """A name goes to and fro between those who share it and a node that has it alone."""
    cluster.options += ",hot=on"
    nodes = [node.mount for node in cluster.make(2, lease=CALM_LEASE)]
    processes = [parties() for _ in range(4)]
    for number, process in enumerate(processes):
        process(LOOP)
        process(BURSTS)
        opened(process, nodes[number % 2] / "x.lock")
        process.start("bursts(fd, place, turns, number)", place=str(tmp_path), turns=HOLDS // 9, number=number)
    assert sum(process.result(START_SECONDS + HOLDS * HOLD_SECONDS) for process in processes) == 0
    assert all(answered_in_c(node) for node in nodes)


@kinds
def test_control_mounts_that_share_nothing_overlap(unshared: Cluster, parties: Make, kind: str, tmp_path: Path) -> None:
    nodes = [node.mount for node in unshared.make(2)]
    assert overlaps_one_inside(nodes, parties, kind, tmp_path, HOLDS) == HOLDS


def one_on_each(cluster: Cluster, parties: Make) -> tuple[list[Node], Actor, Actor]:
    """Two nodes, and a process on each, with the same file open."""
    nodes = cluster.make(2, lease=CALM_LEASE)
    one, two = parties(), parties()
    for process, node in zip((one, two), nodes, strict=True):
        opened(process, node / "data")
    return nodes, one, two


@kinds
def test_a_lock_of_another_node(cluster: Cluster, parties: Make, kind: str) -> None:
    """Refused, waited for, and handed over when its holder is killed."""
    _, one, two = one_on_each(cluster, parties)
    one(TRY[kind])
    assert two.errno(TRY[kind]) in BLOCKED
    two.start(BLOCK[kind])
    assert waits(two)
    one.kill(signal.SIGKILL)
    two.result(START_SECONDS)


@pytest.mark.parametrize(
    ("kind", "name", "at"),
    [("flock", "data", 0), ("fcntl", "x.db", 1), ("flock", "data", 1)],
    ids=["by its own node", "written in place", "by another node"],
)
def test_an_operator_breaks_a_lock(cluster: Cluster, parties: Make, kind: str, at: int, name: str) -> None:
    """Whoever held it publishes and writes nothing more; who has waited for it does."""
    nodes = [node.mount for node in cluster.make(2, lease=CALM_LEASE)]
    (nodes[0] / name).write_text("before")
    holder, waiter, bystander = parties(), parties(), parties()
    opened(holder, nodes[0] / name)
    opened(waiter, nodes[1] / name)
    opened(bystander, nodes[0] / "other")
    holder(BLOCK[kind])
    bystander(BLOCK[kind])
    holder("os.write(fd, b'held')")
    waiter.start(BLOCK[kind])
    assert wait_until(lambda: status(nodes[1])["locks"]["waiting"] == 1, START_SECONDS)
    done = safefs("locks", "break", nodes[at] / name)
    assert done.stdout == "1 broken\n", done.stderr
    waiter.result(START_SECONDS)
    assert wait_until(lambda: holder.errno("os.write(fd, b'later')") == errno.EIO, START_SECONDS)
    assert holder.errno("os.close(fd)") == errno.EIO
    waiter("os.pwrite(fd, b'waiter', 0); os.close(fd)")
    assert (nodes[1] / name).read_text().startswith("waiter")
    # Who reads without a lock sees it as soon as the backing shows it to his node.
    assert wait_until(lambda: (nodes[0] / name).read_text().startswith("waiter"), START_SECONDS)
    bystander("os.write(fd, b'more'); os.close(fd)")
    assert (nodes[1] / "other").read_text() == "more"
    nodes[0].expected_log.append("another's by now")


def shown(node: Mount) -> list[tuple[object, ...]]:
    """What `safefs locks` says on a node: path, kind, state and pid of each lock."""
    done = safefs("locks", "--at", node.path, "--json")
    assert done.returncode == 0, done.stderr
    return sorted((entry["path"], entry["kind"], entry["state"], entry["pid"]) for entry in json.loads(done.stdout))


def test_every_node_sees_very_many_locks(cluster: Cluster, parties: Make) -> None:
    """Their names stay where they are served, so that it takes no longer than to read them."""
    nodes = cluster.make(2, lease=CALM_LEASE)
    holder = parties()
    names = [f"{nodes[0].path}/{number}.lock" for number in range(MANY)]
    holder("fds = [os.open(name, os.O_CREAT | os.O_RDWR) for name in names]", names=names)
    holder("[fcntl.flock(fd, fcntl.LOCK_EX) for fd in fds]")
    expected = sorted((f"{number}.lock", "flock", "held", holder.pid) for number in range(MANY))
    for node in nodes:
        assert shown(node.mount) == expected


def test_every_node_sees_the_locks_of_all(cluster: Cluster, parties: Make) -> None:
    """By F_GETLK, which names the holder on his own node, and by `safefs locks`; whoever has the name in memory."""
    nodes = cluster.make(3, lease=CALM_LEASE)
    holder, neighbour, far, waiter = (parties() for _ in range(4))
    opened(holder, nodes[0] / "data")
    opened(neighbour, nodes[0] / "data")
    opened(far, nodes[1] / "data")
    opened(waiter, nodes[2] / "data")
    holder("record(fd, SET, EXCLUSIVE, 10, 5)")
    for _ in range(2):  # the name is on record after the first
        assert far("record(fd, GET, SHARED)") == ("exclusive", 10, 5, 0)
        assert far("record(fd, GET, SHARED, 0, 10)")[0] == ""
        assert neighbour("record(fd, GET, SHARED)") == ("exclusive", 10, 5, holder.pid)
    held = ("data", "record", "held", holder.pid)
    for node in nodes[:2]:
        assert shown(node.mount) == [held]
    waiter.start("record(fd, WAIT, EXCLUSIVE)")
    waiting = ("data", "record", "waiting", waiter.pid)
    for node in (*nodes, *nodes):
        assert wait_until(lambda node=node: shown(node.mount) == [held, waiting], START_SECONDS)
    holder("record(fd, SET, UNLOCK)")
    waiter.result(START_SECONDS)
    for node in nodes:
        assert shown(node.mount) == [("data", "record", "held", waiter.pid)]


def test_two_of_one_node_that_would_wait_for_each_other(cluster: Cluster, parties: Make) -> None:
    """EDEADLK, also on names that other nodes have to do with."""
    nodes = cluster.make(2, lease=CALM_LEASE)
    one, two, far = (parties() for _ in range(3))
    for process, node in ((one, nodes[0]), (two, nodes[0]), (far, nodes[1])):
        opened(process, node / "b")
        process("globals().__setitem__('b', fd)")
        opened(process, node / "a")
    far("record(fd, WAIT, EXCLUSIVE, 100, 1)")
    far("record(b, WAIT, EXCLUSIVE, 100, 1)")
    one("record(fd, WAIT, EXCLUSIVE, 0, 1)")
    two("record(b, WAIT, EXCLUSIVE, 0, 1)")
    one.start("record(b, WAIT, EXCLUSIVE, 0, 1)")
    assert wait_until(lambda: status(nodes[0].mount)["locks"]["waiting"] == 1, START_SECONDS)
    assert two.errno("record(fd, WAIT, EXCLUSIVE, 0, 1)") == errno.EDEADLK
    two("record(b, SET, UNLOCK, 0, 1)")
    one.result(START_SECONDS)


def test_a_child_passes_those_of_another_node_that_wait_for_its_parent(cluster: Cluster, parties: Make) -> None:
    """As on one node: it is one that the parent, who holds a shared lock, waits for."""
    nodes, parent, far = one_on_each(cluster, parties)
    parent("flock(fd, LOCK_SH)")
    far.start("flock(fd, LOCK_EX)")
    assert wait_until(lambda: status(nodes[1].mount)["locks"]["waiting"] == 1, START_SECONDS)
    child = parent.fork()
    opened(child, nodes[0] / "data")
    start = time.monotonic()
    child("flock(fd, LOCK_SH)")
    assert time.monotonic() - start < PATIENCE_SECONDS  # from when on everybody passes
    child.exit()
    parent("flock(fd, LOCK_UN)")
    far.result(START_SECONDS)


def test_a_waiter_on_another_node_can_be_interrupted(cluster: Cluster, parties: Make) -> None:
    _, one, two = one_on_each(cluster, parties)
    one(TRY["flock"])
    two.start(BLOCK["flock"])
    assert waits(two)
    start = time.monotonic()
    two.kill(signal.SIGKILL)
    assert time.monotonic() - start < AT_ONCE_SECONDS
    # Its request, too, is gone soon, whether it was still in the queue at the unlock or not.
    one(RELEASE["flock"])
    one.start(BLOCK["flock"])
    one.result(START_SECONDS)


def test_exclusive_creation(cluster: Cluster, parties: Make) -> None:
    """Of many that make one name with O_EXCL on several nodes, one does; also while nobody sees the file yet."""
    nodes = cluster.make(3, lease=CALM_LEASE)
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
        assert wait_until(lambda turn=turn: (cluster.backing / f"file{turn}").exists())
