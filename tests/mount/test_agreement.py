"""Nodes of one backing directory that would lock apart, each for itself, are not mounted."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.support.etcd import Etcd, etcd
from tests.support.mounting import Mount, safefs, start_mount, wait_until

LEASES = "locks=leasefile,lease_seconds=7"
SHORT = "lease_seconds=3"
ANOTHER = "keeps its locks in another etcd"
ELSEWHERE = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "sh"]  # a command, on another host
OUTAGE_SECONDS = 60.0  # to come back after a lease that was lost, on a busy machine


@pytest.fixture
def etcds(tmp_path: Path) -> Iterator[tuple[Etcd, Etcd]]:
    """Two that know nothing of each other."""
    places = [tmp_path / "etcd1", tmp_path / "etcd2"]
    for place in places:
        place.mkdir()
    with etcd(places[0]) as one, etcd(places[1]) as two:
        yield one, two


def records(backing: Path) -> list[Path]:
    return list((backing / ".safefs" / "daemons").iterdir())


def try_lock(mount: Mount, seconds: float = 5) -> bool:
    """Whether somebody has a lock within this time; he gives it back."""
    command = ["flock", "--exclusive", "--wait", str(seconds), mount.path / "x.lock", "true"]
    return subprocess.run(command, check=False, timeout=OUTAGE_SECONDS).returncode == 0


def assert_exclusive(one: Mount, two: Mount) -> None:
    for holder, other in ((one, two), (two, one)):
        with open(holder / "x.lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert not try_lock(other, 0.5)
        assert try_lock(other)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (LEASES, "locks=memory", "locks=leasefile"),
        ("locks=memory", LEASES, "locks=memory"),
        (LEASES, "locks=leasefile,lease_seconds=8", "lease_seconds=7"),
        (LEASES, "locks=leasefile", "lease_seconds=7"),
    ],
)
def test_other_settings_than_a_living_node(
    tmp_path: Path, make_mount: MountFactory, ours: str, theirs: str, difference: str
) -> None:
    mount = make_mount("-o", ours)
    with pytest.raises(AssertionError, match=f"has .*{difference}.*would not exclude each other"):
        start_mount(mount.backing, tmp_path / "other", "-o", theirs)
    assert len(records(mount.backing)) == 1  # and nothing is left of the one that was refused
    make_mount("-o", ours, backing=mount.backing)


def test_a_node_that_is_gone_binds_nobody(make_mount: MountFactory) -> None:
    mount = make_mount("-o", LEASES)
    backing = mount.backing
    mount.kill()
    make_mount("-o", "locks=memory", backing=backing)


def test_another_state_directory(tmp_path: Path, make_mount: MountFactory) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    mount = make_mount("-o", f"state={one}")
    for options in ([], ["-o", f"state={two}"]):
        with pytest.raises(AssertionError, match=f"keep their state in {one}.*not exclude each other"):
            start_mount(mount.backing, tmp_path / "other", *options)
    other = make_mount("-o", f"state={one}", backing=mount.backing)
    (mount / "x.lock").touch()
    with open(mount / "x.lock") as ours, open(other / "x.lock") as theirs:
        fcntl.flock(ours, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_state_was_on_the_backing_before(tmp_path: Path, make_mount: MountFactory) -> None:
    mount = make_mount()
    backing = mount.backing
    with pytest.raises(AssertionError, match=f"keep their state in {backing}/.safefs, not in {tmp_path}/elsewhere"):
        start_mount(backing, tmp_path / "other", "-o", f"state={tmp_path}/elsewhere")
    mount.stop()
    (mark,) = (backing / ".safefs").glob("cluster-id/*")
    mark.unlink()
    mark.parent.rmdir()
    make_mount("-o", f"state={tmp_path}/elsewhere", backing=backing)


def test_one_that_was_frozen_while_another_was_mounted_otherwise(make_mount: MountFactory) -> None:
    """Nobody could tell it from one that is gone; so it looks around before it has locks again."""
    frozen = make_mount("-o", f"locks=leasefile,{SHORT}", prefix=ELSEWHERE)
    assert try_lock(frozen)
    frozen.expect_log("the lease of this node is lost")
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        other = make_mount("-o", "locks=memory", backing=frozen.backing)
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    assert try_lock(other)
    assert not try_lock(frozen, 10)
    problem = json.loads(safefs("status", frozen.path, "--json").stdout)["lock_problem"]
    assert "with other settings nodes would not exclude each other" in problem["text"]
    other.stop()
    assert try_lock(frozen, OUTAGE_SECONDS)


@pytest.mark.parametrize("host", [[], ELSEWHERE], ids=["this host", "another host"])
def test_another_etcd_at_the_end_of_the_same_settings(
    host: list[str], tmp_path: Path, make_mount: MountFactory, etcds: tuple[Etcd, Etcd]
) -> None:
    """As etcd://localhost is another one on each host."""
    one, two = (server.options for server in etcds)
    mount = make_mount("-o", one, prefix=host)
    with pytest.raises(AssertionError, match=rf"process {mount.process.pid}\) {ANOTHER}.*unmount the others"):
        start_mount(mount.backing, tmp_path / "other", "-o", two).stop()
    assert len(records(mount.backing)) == 1
    assert_exclusive(mount, make_mount("-o", one, backing=mount.backing))


def test_two_that_start_at_once_with_another_etcd(tmp_path: Path, backing: Path, etcds: tuple[Etcd, Etcd]) -> None:
    """On two hosts, where one knows of the other only that its heart beats."""
    mounts: list[Mount] = []

    def start(number: int, host: list[str]) -> None:
        with suppress(AssertionError):
            options = etcds[number].options
            mounts.append(start_mount(backing, tmp_path / f"mnt{number}", "-o", options, prefix=host))

    both = [threading.Thread(target=start, args=each) for each in enumerate(([], ELSEWHERE))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for mount in mounts:
        mount.stop()
    assert len(mounts) < 2
    assert any(ANOTHER in (tmp_path / f"mnt{number}.log").read_text() for number in range(2))


@pytest.mark.parametrize("end", [Mount.stop, Mount.kill])
def test_the_etcd_of_a_node_that_is_gone_binds_nobody(
    end: Callable[[Mount], None], make_mount: MountFactory, etcds: tuple[Etcd, Etcd]
) -> None:
    one, two = (server.options for server in etcds)
    mount = make_mount("-o", one)
    backing = mount.backing
    end(mount)
    make_mount("-o", two, backing=backing)


def test_an_etcd_that_has_lost_its_data_locks_nobody_out(make_mount: MountFactory, etcds: tuple[Etcd, Etcd]) -> None:
    """It is another one, as far as anybody can tell; all come over to it."""
    server = etcds[0]
    one, two = (make_mount("-o", f"{server.options},{SHORT}") for _ in range(2))
    for mount in (one, two):
        mount.expect_log("the lease of this node is lost")
    assert_exclusive(one, two)
    server.forget()
    for mount in (one, two):
        assert wait_until(lambda mount=mount: "the lease of this node is lost" in mount.log_text(), OUTAGE_SECONDS)
        assert try_lock(mount, OUTAGE_SECONDS / 2)
    assert_exclusive(one, two)
    three = make_mount("-o", f"{server.options},{SHORT}", backing=one.backing)
    assert_exclusive(one, three)


def test_a_node_that_comes_back_to_another_etcd(make_mount: MountFactory, etcds: tuple[Etcd, Etcd]) -> None:
    """It has no locks, rather than locks apart, until those who have theirs in the other one are gone."""
    first, second = etcds
    one = make_mount("-o", f"{first.options},{SHORT}")
    two = make_mount("-o", f"locks=etcd://{first.endpoints},{second.endpoints},{SHORT}", backing=one.backing)
    for mount in (one, two):
        mount.expect_log("the lease of this node is lost")
    assert_exclusive(one, two)
    first.kill()
    assert try_lock(two, OUTAGE_SECONDS / 2)
    first.restart()
    assert wait_until(lambda: ANOTHER in one.log_text(), OUTAGE_SECONDS)
    with open(two / "x.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not try_lock(one)
    assert not try_lock(one)
    assert try_lock(two)
    two.stop()
    assert try_lock(one, OUTAGE_SECONDS / 2)
