"""`-o locks=native`: refused without a good verdict of two probes, and nodes that exclude each other with one.

Two nodes are two bindfs mounts of one directory with a safefs on each.  bindfs keeps fcntl locks to each mount, as
Lustre does with localflock, unless it is told to forward them: one filesystem on which locks exclude nobody, and one
on which they do.  Nothing in the mount options tells the two from each other.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from safefs.cluster.ofd import is_locked
from safefs.family import mounted_at
from safefs.lease import DELAY_SECONDS
from safefs.model import STATE_NAME
from safefs.verdict import FILE, Client, Verdict, write
from tests.cluster.conftest import CALM_LEASE, LEASE_SECONDS
from tests.cluster.test_exclusion import HOLDS, HOLDS_TIMEOUT, kinds, overlaps, overlaps_one_inside
from tests.conftest import MountFactory
from tests.mount.actors import Actor
from tests.mount.lockers import BLOCK, BLOCKED, TRY, opened
from tests.support.mounting import Mount, safefs_command, status, wait_until

SECONDS = 30
PROBE_SECONDS = 120
NATIVE = ("-o", f"locks=native,lease_seconds={LEASE_SECONDS:g}")
CALM_NATIVE = ("-o", f"locks=native,lease_seconds={CALM_LEASE:g}")
FORWARDING = ("--multithreaded", "--enable-lock-forwarding")
RECOVERY_SECONDS = LEASE_SECONDS + DELAY_SECONDS + 2.0


def held(nodes: Path) -> int:
    """How many nodes hold the locks on their own files, as the disk below all views shows it."""
    count = 0
    for path in nodes.glob("*/alive~*"):
        fd = os.open(path, os.O_RDWR)
        count += is_locked(fd)
        os.close(fd)
    return count


@contextmanager
def bound(source: Path, place: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One node's view of a directory: a filesystem of its own for the kernel."""
    place.mkdir()
    with subprocess.Popen(["bindfs", "-f", *options, source, place]) as process:
        try:
            assert wait_until(lambda: place.is_mount() or process.poll() is not None, SECONDS)
            assert process.poll() is None
            yield process
        finally:
            subprocess.run(["umount", "-l", place], check=False, capture_output=True, timeout=SECONDS)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


Places = Callable[..., tuple[Path, ...]]


Servers = dict[Path, subprocess.Popen[bytes]]


@pytest.fixture
def servers() -> Servers:
    """The process of each view."""
    return {}


@pytest.fixture
def places(tmp_path: Path, servers: Servers) -> Iterator[Places]:
    """Views of one directory, each with its options of bindfs."""
    source = tmp_path / "disk"
    source.mkdir()
    with ExitStack() as stack:
        numbers = iter(range(10))

        def make(*options: tuple[str, ...]) -> tuple[Path, ...]:
            views = tuple(tmp_path / f"view{next(numbers)}" for _ in options)
            for view, each in zip(views, options, strict=True):
                servers[view] = stack.enter_context(bound(source, view, *each))
            return views

        yield make


def probed(*directories: Path) -> list[dict[str, object]]:
    """What two probes that met find out; both say the same."""
    processes = [
        subprocess.Popen(
            safefs_command("probe", directory, "--peer", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for directory in directories
    ]
    answers = [process.communicate(timeout=PROBE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(answer) for answer in answers)
    assert first == second
    return list(first)


def result(findings: list[dict[str, object]], what: str) -> str:
    return str(next(entry["result"] for entry in findings if entry["what"] == what))


def refused(backing: Path, mountpoint: Path) -> str:
    """What a mount says that is not to be had: one line."""
    mountpoint.mkdir(exist_ok=True)
    done = subprocess.run(
        safefs_command("mount", backing, mountpoint, "--foreground", *NATIVE),
        capture_output=True,
        text=True,
        timeout=SECONDS + 20,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


def test_without_a_verdict(backing: Path, tmp_path: Path) -> None:
    line = refused(backing, tmp_path / "mnt")
    assert f"run `safefs probe {backing} --peer` on two nodes at once" in line


def test_two_probes_on_one_mount_say_nothing_of_two_clients(places: Places, tmp_path: Path) -> None:
    """Within a mount the locks of bindfs exclude, and between two they do not."""
    (view,) = places(())
    findings = probed(view, view)
    assert result(findings, "OFD excludes") == "yes"
    assert result(findings, "two clients").startswith("no")
    assert "came through one mount" in refused(view, tmp_path / "mnt")


def test_bind_mounts_are_one_client(backing: Path, tmp_path: Path, make_mount: MountFactory) -> None:
    """On ext4 as well; but there no second client is to be had, and the kernel's locks are all there is."""
    other = tmp_path / "bind"
    other.mkdir()
    subprocess.run(["mount", "--bind", backing, other], check=True, timeout=SECONDS)
    try:
        findings = probed(backing, other)
        assert result(findings, "OFD excludes") == "yes"
        assert result(findings, "two clients").startswith("no")
        one, two = make_mount(*NATIVE), make_mount(*NATIVE, backing=other)
        said = status(one)["locks"]
        assert said["wanted"] == "native" and said["backend"].startswith("native: ")
        assert "OFD locks exclude" in said["because"] and "filesystem of one node" in said["because"]
        for mount in (one, two):
            mount.stop()
    finally:
        subprocess.run(["umount", "-l", other], check=True, timeout=SECONDS)


def test_control_locks_that_exclude_nobody_are_found_out(places: Places, tmp_path: Path) -> None:
    one, two = places((), ())
    findings = probed(one, two)
    assert result(findings, "OFD excludes") == "no: both got the lock"
    assert result(findings, "two clients") == "yes"
    for view in (one, two):
        assert "did not find that OFD locks exclude" in refused(view, tmp_path / "mnt")


@pytest.mark.timeout(len(TRY) * HOLDS_TIMEOUT)
def test_no_two_are_inside(
    places: Places, make_mount: MountFactory, parties: Callable[[], Actor], tmp_path: Path
) -> None:
    views = places(FORWARDING, FORWARDING)
    findings = probed(*views)
    assert result(findings, "OFD excludes") == result(findings, "two clients") == "yes"
    mounts = [make_mount(*CALM_NATIVE, backing=view) for view in views]
    said = status(mounts[0])["locks"]
    assert "OFD locks exclude" in said["because"] and "it is not known whom" in said["backing"]
    for kind in TRY:
        place = tmp_path / kind
        place.mkdir()
        assert overlaps(mounts, parties, kind, place, HOLDS) == 0
    for mount in mounts:
        mount.stop()


@pytest.fixture
def nodes(places: Places, make_mount: MountFactory) -> Iterator[list[Mount]]:
    """Two nodes on a filesystem whose locks exclude, with the verdict that two probes come to."""
    views = places(FORWARDING, FORWARDING)
    clients = Client("one", "here"), Client("two", "there")
    write(views[0] / STATE_NAME, Verdict(0.0, mounted_at(views[0]).kind, clients, {}, True))
    mounts = [make_mount(*NATIVE, backing=view) for view in views]
    yield mounts
    for mount in mounts:
        mount.stop()


@kinds
def test_control_two_who_share_nothing_overlap(
    places: Places, make_mount: MountFactory, parties: Callable[[], Actor], kind: str, tmp_path: Path
) -> None:
    mounts = [make_mount("-o", "locks=memory", backing=view) for view in places(FORWARDING, FORWARDING)]
    assert overlaps_one_inside(mounts, parties, kind, tmp_path, HOLDS) == HOLDS
    for mount in mounts:
        mount.stop()


def test_a_frozen_daemon_loses_its_locks_though_the_backing_leaves_them_to_it(
    nodes: list[Mount], parties: Callable[[], Actor]
) -> None:
    one, two = parties(), parties()
    fd = opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY["flock"])
    assert two.errno(TRY["flock"]) in BLOCKED
    one.write(fd, b"under a lock that is lost")
    nodes[0].expected_log.append("the lease of this node is lost")
    two.start(BLOCK["flock"])
    nodes[0].process.send_signal(signal.SIGSTOP)
    try:
        two.result(RECOVERY_SECONDS + LEASE_SECONDS)
    finally:
        nodes[0].process.send_signal(signal.SIGCONT)
    assert one.errno("os.close(fd)") == 5  # EIO
    assert not (nodes[0].backing / "data").exists() or (nodes[0].backing / "data").read_bytes() == b""


def test_a_node_whose_client_is_cut_off(nodes: list[Mount], servers: Servers, parties: Callable[[], Actor]) -> None:
    """Its locks on the backing are gone at once, and nobody takes that for its death: it may act until its lease ends.

    The backing's own lock is the control: whoever relied on that alone would have got it while the daemon lived.
    """
    one, two = parties(), parties()
    fd = opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    one(TRY["flock"])
    one.write(fd, b"under a lock that is lost")
    disk = nodes[0].backing.parent / "disk" / STATE_NAME / "locks/nodes"
    assert held(disk) == 2
    nodes[0].expected_log += ["the lease of this node is lost", "not connected", "is for the next daemon"]
    two.start(BLOCK["flock"])
    start = time.monotonic()
    servers[nodes[0].backing].kill()
    assert wait_until(lambda: held(disk) == 1, SECONDS)
    assert time.monotonic() - start < LEASE_SECONDS
    two.result(RECOVERY_SECONDS + LEASE_SECONDS)
    assert time.monotonic() - start > LEASE_SECONDS
    assert one.errno("os.close(fd)") in (errno.EIO, errno.ENOTCONN)
    two("os.write(fd, b'mine'); os.close(fd)")
    assert (nodes[1] / "data").read_bytes() == b"mine"


def test_a_node_with_other_mount_options_takes_no_part(nodes: list[Mount], places: Places, tmp_path: Path) -> None:
    """The verdict is good, and nothing tells this view from the two: but it sees nodes whose locks it does not see."""
    (view,) = places(())
    assert (view / ".safefs" / FILE).exists()
    assert "locks do not exclude here" in refused(view, tmp_path / "mnt")
    assert status(nodes[0])["locks"]["held"] == 0
