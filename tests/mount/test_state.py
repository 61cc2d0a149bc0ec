"""Whose the state directory is, and what becomes of drafts that it can keep only a copy of."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import actor
from tests.mount.places import A, B, content, leftovers, quarantined
from tests.support.mounting import Mount, let_everybody_through, safefs, wait_until

SERVICE = "games"
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
ONE, TWO, GROUP = 61001, 61002, 61003


@pytest.fixture
def elsewhere(backing: Path) -> Iterator[Path]:
    """A directory on another filesystem than the backing, to which nothing can be renamed or linked."""
    path = Path(tempfile.mkdtemp(prefix="safefs-state-", dir="/dev/shm"))
    try:
        assert path.stat().st_dev != backing.stat().st_dev
        yield path
    finally:
        shutil.rmtree(path)


def test_a_state_directory_that_a_user_has_made(backing: Path, tmp_path: Path) -> None:
    """Whoever may make names in the backing's root can be there first: then he could read what others wrote."""
    backing.chmod(0o1777)
    planted = backing / ".safefs"
    planted.mkdir(mode=0o777)
    os.chown(planted, ONE, ONE)
    (tmp_path / "mnt").mkdir()
    done = safefs("mount", backing, tmp_path / "mnt")
    assert done.returncode == 1 and not (tmp_path / "mnt").is_mount()
    (line,) = done.stderr.splitlines()
    assert f"{planted}: the state directory belongs to uid {ONE}, not to root" in line
    assert os.listdir(planted) == []


def test_a_state_directory_that_others_may_read(make_mount: MountFactory, backing: Path) -> None:
    (backing / ".safefs").mkdir()
    (backing / ".safefs").chmod(0o755)
    mount = make_mount()
    assert stat.S_IMODE((backing / ".safefs").stat().st_mode) == 0o700
    assert "others had rights to safefs's state" in mount.log_text()


def test_a_service_user_where_root_is_root(make_mount: MountFactory, backing: Path) -> None:
    """Root's rights over users' files stay, and who was there before finds his way: copies are kept, owners stay."""
    let_everybody_through(backing)
    backing.chmod(0o777)
    mount = make_mount("-o", f"service_user={SERVICE}")
    uid = pwd.getpwnam(SERVICE).pw_uid
    assert {path.lstat().st_uid for path in (backing / ".safefs").rglob("*")} == {uid}
    (mount / "roots").mkdir(mode=0o755)
    (mount / "roots" / "file").write_bytes(A)
    (mount / "roots" / "file").chmod(0o666)
    os.chown(mount / "roots" / "file", ONE, ONE)
    with actor(uid=TWO, cwd=Path("/")) as two:
        fd = two.open(mount / "roots" / "file", os.O_WRONLY | os.O_APPEND)
        two.write(fd, B)
        two.closefd(fd)
        fd = two.open(mount / "new", CREATE, 0o600)
        two.write(fd, A)
        two.kill(signal.SIGKILL)
    assert content(backing / "roots" / "file") == A + B
    assert (backing / "roots" / "file").stat().st_uid == ONE
    assert wait_until(lambda: list(quarantined(backing)))
    assert not leftovers(backing)


def test_a_service_user_and_a_mount_that_only_reads(make_mount: MountFactory, backing: Path) -> None:
    """Its state is a scratch directory of root's, and the backing stays as it is."""
    (backing / "file").write_bytes(A)
    mount = make_mount("-o", f"ro,service_user={SERVICE}")
    assert (mount / "file").read_bytes() == A
    assert os.listdir(backing) == ["file"]


def test_what_can_only_be_copied(make_mount: MountFactory, backing: Path, elsewhere: Path) -> None:
    """No hidden name stays behind, and a restore gives the writer his file, not root."""
    mount = make_mount("-o", f"temp=hidden,state={elsewhere}")
    mount.path.chmod(0o777)
    with actor(uid=ONE, gid=GROUP, cwd=mount.path) as victim:
        fd = victim.open("file", CREATE, 0o640)
        victim.write(fd, A)
        victim("os.utime(fd, ns=(10**18, 10**18))", fd=fd)
        victim.kill(signal.SIGKILL)
    assert wait_until(lambda: os.listdir(backing) == [".safefs"]), os.listdir(backing)  # the mark
    (entry,) = json.loads(safefs("quarantine", "list", "--json", mount.path).stdout)
    assert content(elsewhere / "quarantine" / entry["write_id"]) == A
    done = safefs("quarantine", "restore", entry["write_id"], "--at", mount.path)
    assert done.returncode == 0, done.stderr
    found = (backing / "file").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (ONE, GROUP, 0o640, 10**18)
    assert content(backing / "file") == A


def test_a_user_removes_a_directory_with_anothers_draft(make_mount: MountFactory) -> None:
    """rmdir(2) on another node, by a user who may not look into the quarantine: the bytes get there all the same."""
    first, second = (make_mount("-o", "temp=hidden") for _ in range(2))
    first.path.chmod(0o777)
    with actor(uid=ONE, cwd=second.path) as one, actor(uid=TWO, cwd=first.path) as two:
        one("os.mkdir('dir'); os.chmod('dir', 0o777)")
        fd = two.open("dir/file", CREATE, 0o600)
        two.write(fd, A)
        two("os.fsync(fd)", fd=fd)
        one("os.rmdir('dir')")
        assert not (first.backing / "dir").exists()
        assert two.errno("os.close(fd)", fd=fd) == errno.ENOENT
    assert wait_until(lambda: A in quarantined(first.backing))


def test_rights_of_a_group_last_until_the_publish(mount: Mount) -> None:
    """Who exits with the file open has no groups any more when it is published: what he had at the open counts."""
    (mount / "dir").mkdir()
    os.chown(mount / "dir", 0, GROUP)
    (mount / "dir").chmod(0o770)
    with actor(uid=ONE, groups=[GROUP], cwd=mount.path) as member:
        member.write(member.open("dir/file", CREATE), A)
        member.exit()
    assert wait_until(lambda: content(mount.backing / "dir" / "file") == A)
    assert (mount.backing / "dir" / "file").stat().st_uid == ONE
