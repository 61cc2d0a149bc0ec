"""Who waits for a lock while etcd is away or the backing filesystem hangs, and who holds one then."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from safefs.lease import DELAY_SECONDS
from tests.cluster.conftest import CALM_LEASE, LEASE_SECONDS, WHOLE, Cluster, etcd_of
from tests.cluster.hosts import LOST, Node
from tests.mount.actors import Actor
from tests.mount.lockers import BLOCK, RELEASE, TRY, opened, process_state, waits
from tests.support.mounting import status_at, wait_until
from tests.underlay.test_bad_underlay import underlay

GONE_SECONDS = LEASE_SECONDS + DELAY_SECONDS
SECONDS = 60.0
AT_ONCE_SECONDS = 5.0  # without any of the time limits of what is waited for
LONG_LEASE = 300.0

Make = Callable[[], Actor]


@dataclass
class Outage:
    """Two nodes; what their locks depend on can go away, and come back."""

    nodes: list[Node]
    begin: Callable[[], None]
    end: Callable[[], None]


@pytest.fixture
def lease() -> float:
    """Of the nodes, where a test does not say otherwise."""
    return LEASE_SECONDS


@pytest.fixture(params=["etcd that is killed", "etcd that hangs", "a link that is cut", "a backing that hangs"])
def outage(request: pytest.FixtureRequest, tmp_path: Path, lease: float) -> Iterator[Outage]:
    """Of all of etcd; or of one node's link to it, or one node's client of the backing filesystem."""
    with ExitStack() as stack:
        if request.param == "a backing that hangs":
            yield stack.enter_context(hanging_backing(tmp_path, lease=lease))
            return
        cluster: Cluster = request.getfixturevalue("etcd_cluster")
        nodes = cluster.make(2, lease=lease)
        assert cluster.etcd is not None and nodes[0].host is not None
        member = cluster.etcd.members[0]
        begin, end = {
            "etcd that is killed": (member.kill, cluster.etcd.restart),
            "etcd that hangs": (member.pause, member.resume),
            "a link that is cut": (nodes[0].host.cut_off, nodes[0].host.reconnect),
        }[request.param]
        yield Outage(nodes, begin, end)


@pytest.fixture
def etcd_cluster(tmp_path: Path, backing: Path) -> Iterator[Cluster]:
    with etcd_of(tmp_path, [backing], 1) as cluster:
        yield cluster


@contextmanager
def hanging_backing(place: Path, options: str = "", lease: float = LEASE_SECONDS) -> Iterator[Outage]:
    """Each node has its own mount of a filesystem in user space, as clients of a shared filesystem; the first hangs."""
    source = place / "disk"
    source.mkdir()
    with ExitStack() as stack:
        # Names and attributes are as fresh as a local filesystem's: this is about answers that do not come.
        fresh = ("--negative", "0", "--attr", "0")
        views = [place / f"view{number}" for number in range(2)]
        clients = [stack.enter_context(underlay(source, view, *fresh)) for view in views]
        cluster = Cluster(place, [source], f"locks=leasefile{options}", stack)
        nodes = [cluster.node(cluster.host(), backing=view, lease=lease) for view in views]
        stack.callback(clients[0].send_signal, signal.SIGCONT)
        yield Outage(
            nodes, lambda: clients[0].send_signal(signal.SIGSTOP), lambda: clients[0].send_signal(signal.SIGCONT)
        )


def waiter(process: Actor, path: Path, kind: str, place: int) -> None:
    """Waits for the lock of a file until it has it, or a signal comes; `place` of them do then."""
    opened(process, path)
    process.start(
        {"flock": "interruptible(flock, fd, LOCK_EX)", "fcntl": "interruptible(record, fd, WAIT, EXCLUSIVE)"}[kind]
    )
    assert wait_until(lambda: status_at(path.parent)["locks"]["waiting"] == place, SECONDS)
    assert waits(process)


@pytest.mark.parametrize("kind", ["flock", "fcntl"] if WHOLE else ["flock"])
def test_an_outage(outage: Outage, parties: Make, kind: str) -> None:
    """Who waits goes on waiting, can be interrupted and killed, and has the lock when everything is back; who holds a
    lock is fenced before another can have it."""
    holder, killed, interrupted, patient = (parties() for _ in range(4))
    node, other = outage.nodes
    for each in outage.nodes:
        each.may_lose_its_lease()
    place = opened(holder, node / "held.db")
    holder(TRY[kind])
    for number, process in enumerate((killed, interrupted, patient), 1):
        waiter(process, node / "held.db", kind, number)
    outage.begin()
    try:
        assert wait_until(lambda: LOST in node.mount.log_text(), GONE_SECONDS)
        assert holder.errno("os.pwrite(fd, b'late', 0)", fd=place) == errno.EIO
        os.kill(interrupted.pid, signal.SIGUSR1)
        assert interrupted.result(AT_ONCE_SECONDS) == "interrupted"
        start = time.monotonic()
        killed.kill(signal.SIGKILL)
        assert time.monotonic() - start < AT_ONCE_SECONDS
        assert waits(patient)
    finally:
        outage.end()
    assert patient.result(SECONDS) == "done"
    assert (node / "held.db").read_bytes() == b""
    patient("os.close(fd)")
    opened(interrupted, other / "held.db")
    interrupted.start(BLOCK[kind])
    interrupted.result(SECONDS)


@pytest.mark.parametrize("lease", [CALM_LEASE])
@pytest.mark.parametrize("kind", ["flock", "fcntl"] if WHOLE else ["flock"])
def test_an_outage_that_is_shorter_than_the_lease(outage: Outage, parties: Make, kind: str) -> None:
    """Nobody notices but who asks for something: and he can be killed at once, too."""
    holder, killed, patient = (parties() for _ in range(3))
    node, _ = outage.nodes
    opened(holder, node / "held.db")
    holder(TRY[kind])
    for number, process in enumerate((killed, patient), 1):
        waiter(process, node / "held.db", kind, number)
    outage.begin()
    try:
        start = time.monotonic()
        killed.kill(signal.SIGKILL)
        assert time.monotonic() - start < AT_ONCE_SECONDS
        assert waits(patient)
    finally:
        outage.end()
    holder("os.pwrite(fd, b'held', 0)")
    holder("os.close(fd)")
    assert patient.result(SECONDS) == "done"


def test_a_change_that_waits_for_a_thread(tmp_path: Path, parties: Make) -> None:
    """All threads of a daemon hang, longer than its lease: what they do then was asked for under a lost lock."""
    threads = 4
    with hanging_backing(tmp_path, f",max_threads={threads}") as outage:
        node, other = outage.nodes
        node.may_lose_its_lease()
        holder, truncating, thief, *crowd = (parties() for _ in range(3 + 2 * threads))
        for process in (holder, truncating):
            opened(process, node / f"{process.pid}.db")
            process("os.pwrite(fd, b'before', 0)")
            process(TRY["flock"])
        for number, process in enumerate(crowd):
            opened(process, node / f"{number}.log")
        outage.begin()
        try:
            for process in crowd:
                process.start("os.pwrite(fd, b'whatever', 0)")
            assert wait_until(lambda: all(process_state(process.pid) == "S" for process in crowd), SECONDS)
            time.sleep(0.5)
            assert not any(process.answered() for process in crowd)  # they hang
            holder.start("os.pwrite(fd, b'late', 0)")
            truncating.start("os.ftruncate(fd, 0)")
            for process in (holder, truncating):
                opened(thief, other / f"{process.pid}.db")
                thief.start(BLOCK["flock"])
                thief.result(SECONDS)
                thief("os.pwrite(fd, b'theirs', 0); os.fsync(fd)")
        finally:
            outage.end()
        for process in (holder, truncating):
            with pytest.raises(OSError) as refused:
                process.result(SECONDS)
            assert refused.value.errno == errno.EIO
            assert (other / f"{process.pid}.db").read_bytes() == b"theirs"
        for process in crowd:
            assert process.result(SECONDS) == len(b"whatever")


@pytest.mark.parametrize("cluster", ["leasefile", "etcd"], indirect=True)
def test_a_daemon_does_not_wait_for_its_own_old_lease(cluster: Cluster, parties: Make) -> None:
    """It is known on its host that its predecessor has died, and nowhere else before."""
    node, other = cluster.make(2, lease=LONG_LEASE)
    one, two, far = (parties() for _ in range(3))
    opened(one, node / "data")
    opened(far, other / "data")
    one(TRY["flock"])
    node.kill()
    far.start(BLOCK["flock"])
    assert waits(far)
    node.start()
    far.result(SECONDS)
    far(RELEASE["flock"])
    opened(two, node / "data")
    two.start(BLOCK["flock"])
    two.result(SECONDS)


@pytest.mark.parametrize("cluster", ["leasefile", "etcd"], indirect=True)
def test_a_neighbour_knows_that_a_daemon_has_died(cluster: Cluster, parties: Make) -> None:
    """On the same host; on another one the lease has to end."""
    nodes = [cluster.node(lease=LONG_LEASE) for _ in range(2)]
    one, two = parties(), parties()
    opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY["flock"])
    two.start(BLOCK["flock"])
    assert waits(two)
    nodes[0].kill()
    two.result(SECONDS)
