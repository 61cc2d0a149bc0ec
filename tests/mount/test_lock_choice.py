"""Where a mount keeps its locks and why, as `safefs status` says it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from safefs.family import mounted_at
from tests.conftest import MountFactory
from tests.support.mounting import Mount, safefs_command, start_mount, status

SECONDS = 30


def in_words(mount: Mount) -> str:
    """What `safefs status` says of the locks to people."""
    done = subprocess.run(
        safefs_command("status", mount.path), check=True, capture_output=True, text=True, timeout=SECONDS
    )
    return next(line for line in done.stdout.splitlines() if line.split()[0] == "locks")


def test_a_filesystem_of_one_node(mount: Mount) -> None:
    kind = mounted_at(mount.backing).kind
    said = status(mount)["locks"]
    assert said["wanted"] == "auto"
    assert said["backend"].startswith(f"leasefile: {mount.backing}/.safefs/locks, as node ")
    assert said["because"] == f"{kind} is a filesystem of one node, and each daemon counts as a node of its own"
    assert said["backing"].startswith("its fcntl locks keep out all processes of this node")
    for word in ("wanted", "backend", "because", "backing"):
        assert said[word] in in_words(mount)


def test_a_filesystem_that_nobody_knows(tmp_path: Path, make_mount: MountFactory) -> None:
    """It is tried before anything rests on it."""
    source, view = tmp_path / "disk", tmp_path / "view"
    source.mkdir()
    view.mkdir()
    subprocess.run(["bindfs", source, view], check=True, timeout=SECONDS)
    try:
        mount = make_mount(backing=view)
        said = status(mount)["locks"]
        assert said["backend"].startswith("leasefile: ")
        assert said["because"].startswith("tried on fuse: a rename has one winner and")
        assert "it is not known whom (fuse is not known to safefs)" in said["backing"]
        assert said["because"] in in_words(mount)
        mount.stop()
    finally:
        subprocess.run(["umount", "-l", view], check=True, timeout=SECONDS)


def test_state_on_a_disk_of_this_node_alone(tmp_path: Path) -> None:
    source, view, state = (tmp_path / name for name in ("disk", "view", "state"))
    source.mkdir()
    view.mkdir()
    subprocess.run(["bindfs", source, view], check=True, timeout=SECONDS)
    try:
        with pytest.raises(AssertionError, match=r"where other nodes on the backing .* cannot look"):
            start_mount(view, tmp_path / "mnt", "-o", f"state={state}")
    finally:
        subprocess.run(["umount", "-l", view], check=True, timeout=SECONDS)


@pytest.mark.parametrize(
    ("options", "because"),
    [("locks=memory", "no other node uses this directory"), ("ro", "other nodes do not see its locks")],
)
def test_nothing_is_shared(make_mount: MountFactory, options: str, because: str) -> None:
    said = status(make_mount("-o", options))["locks"]
    assert said["backend"] == "memory: shared with no other node"
    assert because in said["because"]
