"""Versions that a publish replaced or an unlink removed: still there for those who have them, and for an operator."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, in_quarantine
from tests.support.mounting import Mount, safefs

SECONDS = 60


def history(path: Path) -> list[dict[str, Any]]:
    done = safefs("history", path, "--json")
    assert done.returncode == 0, done.stderr
    versions: list[dict[str, Any]] = json.loads(done.stdout)
    return versions


def kept(path: Path) -> list[bytes]:
    return [Path(version["file"]).read_bytes() for version in history(path)]


@pytest.fixture
def mount(make_mount: MountFactory) -> Mount:
    return make_mount("-o", "retain=1h")


@pytest.mark.parametrize("temp", ["auto", "hidden"])
def test_every_way_to_lose_a_version(temp: str, make_mount: MountFactory) -> None:
    mount = make_mount("-o", f"retain=1h,temp={temp}")
    path = mount / "file"
    for data in (b"one", b"two"):
        path.write_bytes(data)
    (mount / "new").write_bytes(b"three")
    (mount / "new").rename(path)
    path.unlink()
    path.write_bytes(b"four")
    assert kept(path) == [b"three", b"two", b"one"]
    assert kept(mount.backing / "file") == [b"three", b"two", b"one"]
    assert kept(mount / "new") == []
    assert sorted(os.listdir(mount.path)) == ["file"]


def test_restore(mount: Mount) -> None:
    path = mount / "file"
    for data in (A, B):
        path.write_bytes(data)
    path.chmod(0o640)
    done = safefs("restore", f"{path}@1")
    assert (done.returncode, done.stderr) == (0, "")
    assert content(path) == content(mount.backing / "file") == A
    assert kept(path) == [B, A]
    assert safefs("restore", f"{path}@1", "--to", mount / "elsewhere").returncode == 0
    assert content(mount / "elsewhere") == B
    assert (mount / "elsewhere").stat().st_mode & 0o7777 == 0o640


def test_a_removed_tree_can_be_had_back(mount: Mount) -> None:
    (mount / "dir").mkdir()
    (mount / "dir" / "file").write_bytes(A)
    subprocess.run(["rm", "-r", mount / "dir"], check=True, timeout=SECONDS)
    assert kept(mount / "dir" / "file") == [A]
    (mount / "dir").mkdir()
    assert safefs("restore", f"{mount / 'dir' / 'file'}@1").returncode == 0
    assert content(mount / "dir" / "file") == A


def test_a_deleted_base_is_deleted_all_the_same(mount: Mount, writer: Actor) -> None:
    """That a version is kept under a hidden name does not make it one that was renamed away."""
    (mount / "file").write_bytes(A)
    fd = writer.open(mount / "file", os.O_WRONLY | os.O_APPEND)
    writer.write(fd, B)
    (mount / "file").unlink()
    assert writer.errno("os.close(fd)", fd=fd) == errno.ESTALE
    assert content(mount / "file") is None
    assert in_quarantine(mount.backing, lambda data: data == A + B)


def test_a_base_that_was_renamed_away(mount: Mount, writer: Actor) -> None:
    (mount / "file").write_bytes(A)
    fd = writer.open(mount / "file", os.O_WRONLY | os.O_APPEND)
    writer.write(fd, B)
    (mount / "file").rename(mount / "away")
    writer.closefd(fd)
    assert (content(mount / "file"), content(mount / "away")) == (A + B, A)


def test_rules(make_mount: MountFactory, tmp_path: Path) -> None:
    config = tmp_path / "safefs.toml"
    config.write_text('[[rule]]\nmatch = "*.bin"\nretain = "1h"\n\n[[rule]]\nmatch = "*"\nretain = "off"\n')
    mount = make_mount("-o", "retain=2h", "--config", str(config))
    for name in ("a.bin", "a.txt"):
        for data in (A, B):
            (mount / name).write_bytes(data)
    assert kept(mount / "a.bin") == [A]
    assert kept(mount / "a.txt") == []


def test_nothing_is_kept_by_default_here(make_mount: MountFactory) -> None:
    mount = make_mount()
    for data in (A, B):
        (mount / "file").write_bytes(data)
    assert kept(mount / "file") == []


def test_users_replace_what_they_may(make_mount: MountFactory) -> None:
    """The link is the daemon's own: it does not need the caller's right to link another's file."""
    mount = make_mount("-o", "retain=1h")
    (mount / "file").write_bytes(A)
    (mount / "file").chmod(0o666)
    mount.path.chmod(0o777)
    with actor(uid=61001, gid=61003, cwd=mount.path) as user:
        fd = user.open("file", os.O_WRONLY | os.O_TRUNC)
        user.write(fd, B)
        user.closefd(fd)
    assert content(mount / "file") == B
    assert kept(mount / "file") == [A]


@pytest.mark.parametrize(
    ("version", "complaint"),
    [("file", "say which version"), ("file@x", "say which version"), ("file@7", "earlier versions are kept")],
)
def test_bad_input(version: str, complaint: str, mount: Mount) -> None:
    done = safefs("restore", mount / version)
    assert done.returncode == 1
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_backing_without_links(make_mount: MountFactory, tmp_path: Path) -> None:
    """A state directory on another filesystem: said once, and everything else goes on."""
    state = Path("/dev/shm") / f"safefs-{os.getpid()}"
    try:
        mount = make_mount("-o", f"retain=1h,state={state}")
        for data in (A, B, A):
            (mount / "file").write_bytes(data)
        assert content(mount / "file") == A
        assert mount.log_text().count("is not retained") == (state.stat().st_dev != mount.backing.stat().st_dev)
    finally:
        subprocess.run(["rm", "-rf", state], check=True, timeout=SECONDS)
