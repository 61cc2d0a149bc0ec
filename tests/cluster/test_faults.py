"""What happens to processes, daemons, servers, links and clocks while processes on several nodes count under one lock.

No number is written twice (tests/cluster/counting.py), and after each fault all who can go on do so within the time
that a lease, the delay after it, and two seconds take.  SAFEFS_CLUSTER_ROUNDS says how many faults of each kind there
are (`make test-nightly`).
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safefs.lease import DELAY_SECONDS
from tests.cluster.conftest import CALM_LEASE, LEASE_SECONDS, Cluster
from tests.cluster.counting import Count
from tests.cluster.hosts import LOST, Node
from tests.mount.actors import Actor
from tests.mount.lockers import BLOCK, TRY, opened, waits
from tests.mount.places import content, in_quarantine, leftovers
from tests.mount.test_daemon import hanging_underlay
from tests.support.mounting import status, wait_until

GONE_SECONDS = LEASE_SECONDS + DELAY_SECONDS
RECOVERY_SECONDS = GONE_SECONDS + 2.0
# After an election etcd lets all leases run anew, also those of nodes that have lost theirs meanwhile.
ELECTION_SECONDS = 5.0
FROZEN_SECONDS = 1.0  # of a lease that is much longer
ROUNDS = int(os.environ.get("SAFEFS_CLUSTER_ROUNDS", "1"))
SECONDS = 60.0

Make = Callable[[], Actor]


@pytest.fixture
def count(cluster: Cluster, parties: Make, tmp_path: Path) -> Iterator[Count]:
    """Everybody counts until the end; then the numbers have to be right."""
    (tmp_path / "notes").mkdir()
    counting = Count(tmp_path / "notes", cluster.backing, parties)
    yield counting
    counting.stop()
    noted = counting.noted()
    assert len(noted) == len(set(noted))
    assert wait_until(lambda: counting.reached() >= max(noted))  # a client beside the mounts is late


def three_kinds(count: Count, nodes: list[Node]) -> None:
    """Two processes on each node.  They use record locks of one process and of one open file, which know each other."""
    for node in nodes:
        count.add(node, "fcntl")
        count.add(node, "ofd")
    assert count.goes_on(nodes, SECONDS)


def test_control_without_shared_locks_numbers_are_written_twice(
    unshared: Cluster, parties: Make, tmp_path: Path
) -> None:
    count = Count(tmp_path, unshared.backing, parties)
    nodes = unshared.make(2)
    three_kinds(count, nodes)
    for _ in range(20):
        assert count.goes_on(nodes, SECONDS)
    count.stop()
    noted = count.noted()
    assert len(noted) > len(set(noted))


def test_a_killed_holder(cluster: Cluster, count: Count) -> None:
    nodes = cluster.make(2, lease=CALM_LEASE)
    three_kinds(count, nodes)
    for _ in range(5 * ROUNDS):
        victim = random.choice(count.counters)
        count.remove(victim, signal.SIGKILL)
        assert count.goes_on(nodes, RECOVERY_SECONDS)
        count.add(victim.node, victim.kind)
    assert count.goes_on(nodes, SECONDS)


def test_a_killed_daemon(cluster: Cluster, count: Count) -> None:
    """Nobody can see that it is dead but by its lease; a new daemon on its host takes part at once."""
    nodes = cluster.make(3)
    three_kinds(count, nodes)
    for number in range(ROUNDS):
        victim = nodes[number % len(nodes)]
        others = [node for node in nodes if node is not victim]
        victim.kill()
        assert count.goes_on(others, RECOVERY_SECONDS)
        victim.start()
        assert count.goes_on(nodes, RECOVERY_SECONDS)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_daemon_that_ends_while_a_publish_hangs(cluster: Cluster, parties: Make, tmp_path: Path, hangs: bool) -> None:
    """It may come to pass yet: others have the lock when its lease is over, and not with the end of the daemon.

    Did it not, what was written is found by the next one.
    """
    with hanging_underlay(cluster.backing, tmp_path / "source") as underlay:
        cluster.options += ",drain_seconds=1"
        one, two = cluster.make(2)
        writer, other = parties(), parties()
        opened(writer, one / "slow" / "file", os.O_RDWR)
        opened(other, two / "slow" / "file", os.O_RDWR)
        writer(f"{BLOCK['fcntl']}; os.pwrite(fd, b'written', 0); os.fsync(fd)")
        other.start(BLOCK["fcntl"])
        assert waits(other)
        if hangs:
            one.mount.expect_log("gave up waiting")
            one.mount.expect_log("what could not be settled is for the next daemon")
            underlay.send_signal(signal.SIGSTOP)
            writer.start("os.close(fd)")
            assert waits(writer)
        one.mount.process.send_signal(signal.SIGTERM)
        one.mount.process.wait(SECONDS)
        began = time.monotonic()
        underlay.send_signal(signal.SIGCONT)
        other.result(SECONDS)
        assert (time.monotonic() - began > DELAY_SECONDS) == hangs
        other("os.close(fd)")
        if hangs:
            one.start()  # on its host it is known that the one before is dead
            assert in_quarantine(cluster.backing, lambda data: data.startswith(b"written"))
        assert wait_until(lambda: not leftovers(cluster.backing))


def test_a_daemon_that_is_frozen_for_longer_than_its_lease(cluster: Cluster, count: Count) -> None:
    nodes = cluster.make(3)
    three_kinds(count, nodes)
    for number in range(ROUNDS):
        victim = nodes[number % len(nodes)]
        victim.may_lose_its_lease()
        others = [node for node in nodes if node is not victim]
        victim.freeze()
        try:
            start = time.monotonic()
            assert count.goes_on(others, RECOVERY_SECONDS)
            time.sleep(max(0.0, start + GONE_SECONDS + 1 - time.monotonic()))
        finally:
            victim.thaw()
        assert count.goes_on(nodes, RECOVERY_SECONDS)
        assert LOST in victim.mount.log_text()


def test_a_daemon_that_is_frozen_for_less_than_its_lease(cluster: Cluster, count: Count) -> None:
    """Nobody loses a lease, which his log would say; all go on when it does."""
    nodes = cluster.make(3, lease=CALM_LEASE)
    three_kinds(count, nodes)
    for number in range(ROUNDS):
        victim = nodes[number % len(nodes)]
        victim.freeze()
        try:
            time.sleep(FROZEN_SECONDS)
        finally:
            victim.thaw()
        assert count.goes_on(nodes, RECOVERY_SECONDS)


@pytest.mark.parametrize("cluster", ["etcd3"], indirect=True)
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_leader_that_fails(cluster: Cluster, count: Count, how: str) -> None:
    nodes = cluster.make(2)
    three_kinds(count, nodes)
    assert cluster.etcd is not None
    for _ in range(ROUNDS):
        leader = cluster.etcd.leader()
        for node in nodes:
            node.may_lose_its_lease()  # an election can take longer than this short one
        getattr(leader, how)()
        try:
            assert count.goes_on(nodes, ELECTION_SECONDS + RECOVERY_SECONDS)
        finally:
            leader.resume()
            cluster.etcd.restart()
        assert count.goes_on(nodes, ELECTION_SECONDS + RECOVERY_SECONDS)


@pytest.mark.parametrize("cluster", ["etcd", "etcd3"], indirect=True)
def test_a_node_that_is_cut_off(cluster: Cluster, count: Count) -> None:
    nodes = cluster.make(3)
    three_kinds(count, nodes)
    for number in range(ROUNDS):
        victim = nodes[number % len(nodes)]
        assert victim.host is not None
        victim.may_lose_its_lease()
        others = [node for node in nodes if node is not victim]
        victim.host.cut_off()
        try:
            assert count.goes_on(others, RECOVERY_SECONDS)
        finally:
            victim.host.reconnect()
        assert count.goes_on(nodes, RECOVERY_SECONDS)


def test_a_clock_that_is_stepped(cluster: Cluster, count: Count, tmp_path: Path) -> None:
    """The time of day of one node jumps by hours and days, in both directions: nobody loses a lease over it."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    stepped = cluster.node(cluster.host(), lease=CALM_LEASE, environment=with_clock(clock))
    nodes = [stepped, *cluster.make(1, lease=CALM_LEASE)]
    three_kinds(count, nodes)
    for step in ROUNDS * ["-1h", "+1h", "-10d", "+10d"]:
        clock.write_text(step)
        assert count.goes_on(nodes, RECOVERY_SECONDS)
    count.stop()
    stepped.stop()  # would say if it had lost its lease
    last = stepped.mount.log_text().splitlines()[-1]
    assert time.strptime(last[:10], "%Y-%m-%d") > time.localtime(time.time() + 9 * 24 * 3600), "it was not stepped"


def with_clock(path: Path) -> dict[str, str]:
    """For a process that takes the time of day from a file ("+1h"), by Debian's libfaketime; no other clock."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(path),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


# What holders and waiters see.


def test_what_was_written_under_a_lost_lock(cluster: Cluster, parties: Make) -> None:
    """The daemon stops for longer than its lease: when it wakes up nothing is written or published, whatever was sent
    to it meanwhile, and close() says so."""
    nodes = cluster.make(2)
    one, two = parties(), parties()
    (cluster.backing / "place.db").write_bytes(b"before")
    draft = opened(one, nodes[0] / "data")
    one(TRY["flock"])
    one.write(draft, b"under a lock that is lost")
    place = opened(one, nodes[0] / "place.db")
    one(TRY["flock"])
    one("os.pwrite(fd, b'before', 0)")
    nodes[0].may_lose_its_lease()
    nodes[0].freeze()
    try:
        one.start("os.pwrite(fd, b'late', 0)")
        for name in ("data", "place.db"):
            opened(two, nodes[1] / name)
            two.start(BLOCK["flock"])
            two.result(RECOVERY_SECONDS)
            two("os.pwrite(fd, b'theirs', 0); os.close(fd)")
    finally:
        nodes[0].thaw()
    with pytest.raises(OSError) as late:
        one.result(SECONDS)
    assert late.value.errno == errno.EIO
    assert one.errno("os.ftruncate(fd, 0)") == errno.EIO
    assert one.errno("os.posix_fallocate(fd, 0, 100)") == errno.EIO
    assert one.errno("os.close(fd)", fd=place) == errno.EIO
    assert one.errno("os.close(fd)", fd=draft) == errno.EIO
    for name in ("data", "place.db"):
        assert wait_until(lambda name=name: content(cluster.backing / name) == b"theirs"), name
    assert status(nodes[0].mount)["counters"].get("refused") == 1
    # And it takes part again.
    opened(one, nodes[0] / "other")
    one.start(BLOCK["flock"])
    one.result(RECOVERY_SECONDS)
