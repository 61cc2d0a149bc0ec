"""Nodes of one backing directory that would lock apart, each for itself, are not mounted."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.support.mounting import start_mount

LEASES = "locks=leasefile,lease_seconds=7"


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
    records = list((mount.backing / ".safefs" / "daemons").iterdir())
    assert len(records) == 1  # and nothing is left of the one that was refused
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
