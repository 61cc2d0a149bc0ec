"""Users: the daemon acts as its caller, and a user without rights can mount for himself."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, in_quarantine
from tests.mount.user_python import NOBODY, as_nobody, user_python
from tests.support.mounting import Mount, mounted, wait_until

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
ONE, TWO, GROUP = 61001, 61002, 61003


# Acting as the caller.


def test_files_belong_to_who_made_them(mount: Mount) -> None:
    """Below a root mount every entry belongs to the caller that made it, in the backing directory too."""
    mount.path.chmod(0o777)
    for uid, gid in ((ONE, GROUP), (TWO, TWO)):
        with actor(uid=uid, gid=gid, cwd=mount.path) as user:
            fd = user.open(f"file{uid}", CREATE)
            user.write(fd, A)
            assert user("(os.fstat(fd).st_uid, os.fstat(fd).st_gid)", fd=fd) == (uid, gid)
            user.closefd(fd)
            user("os.mkdir('dir%d' % uid); os.symlink('x', 'link%d' % uid); os.mkfifo('fifo%d' % uid)", uid=uid)
        for kind in ("file", "dir", "link", "fifo"):
            status = os.lstat(mount.backing / f"{kind}{uid}")
            assert (status.st_uid, status.st_gid) == (uid, gid), kind


def test_the_backing_refuses_whom_it_would_refuse(mount: Mount) -> None:
    """What a user may not do in the backing directory he may not do on the mount, and errors come at once."""
    (mount / "dir").mkdir(mode=0o755)
    (mount / "dir" / "file").write_bytes(A)
    with actor(uid=ONE, cwd=mount.path) as user:
        for code in (
            "os.open('dir/new', os.O_CREAT | os.O_WRONLY)",
            "os.open('dir/file', os.O_WRONLY)",
            "os.mkdir('dir/new')",
            "os.unlink('dir/file')",
            "os.rename('dir/file', 'dir/other')",
            "os.link('dir/file', 'dir/other')",
            "os.symlink('x', 'dir/new')",
            "os.truncate('dir/file', 0)",
        ):
            assert user.errno(code) in (errno.EACCES, errno.EPERM), code
    assert os.listdir(mount.backing / "dir") == ["file"] and content(mount / "dir" / "file") == A


def test_supplementary_groups_count(mount: Mount) -> None:
    """A directory that only a supplementary group may write: its members publish there, others do not."""
    (mount / "dir").mkdir()
    os.chown(mount / "dir", 0, GROUP)
    (mount / "dir").chmod(0o770)
    with actor(uid=ONE, groups=[5, GROUP, 6], cwd=mount.path) as member:
        fd = member.open("dir/file", CREATE)
        member.write(fd, A)
        member.closefd(fd)
        assert member.read("dir/file") == A
    assert content(mount.backing / "dir" / "file") == A
    assert os.stat(mount.backing / "dir" / "file").st_uid == ONE
    with actor(uid=TWO, groups=[5, 6], cwd=mount.path) as other:
        assert other.errno("os.open('dir/file', os.O_RDONLY)") == errno.EACCES


def test_rights_are_those_of_the_open(mount: Mount) -> None:
    """A descriptor goes on working after its process gave up its rights, and its publish is carried out."""
    (mount / "dir").mkdir(mode=0o700)
    with actor(cwd=mount.path) as user:
        fd = user.open("dir/file", CREATE)
        user.write(fd, A)
        user("os.setgroups([]); os.setresgid(61001, 61001, 61001); os.setresuid(61001, 61001, 61001)")
        user.write(fd, B)
        user.closefd(fd)
    assert content(mount / "dir" / "file") == A + B
    assert os.stat(mount.backing / "dir" / "file").st_uid == 0


def test_many_users_at_once(mount: Mount) -> None:
    """Four users and root create files at the same time: no file belongs to somebody else."""
    mount.path.chmod(0o777)
    users = [0, ONE, TWO, GROUP, NOBODY]
    with (
        actor(cwd=mount.path) as a,
        actor(uid=ONE, cwd=mount.path) as b,
        actor(uid=TWO, cwd=mount.path) as c,
        actor(uid=GROUP, cwd=mount.path) as d,
        actor(uid=NOBODY, cwd=mount.path) as e,
    ):
        parties = [a, b, c, d, e]
        for uid, party in zip(users, parties, strict=True):
            party.start(
                "for n in range(60):\n"
                "    open('f-%d-%d' % (uid, n), 'wb').write(b'x')\n"
                "    os.mkdir('d-%d-%d' % (uid, n))\n"
                "    os.rename('f-%d-%d' % (uid, n), 'd-%d-%d/f' % (uid, n))\n",
                uid=uid,
            )
        for party in parties:
            party.result()
    for uid in users:
        for number in range(60):
            directory = mount.backing / f"d-{uid}-{number}"
            assert os.stat(directory).st_uid == os.stat(directory / "f").st_uid == uid


# A mount of a user for himself.


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user can enter, with nobody's own directories in it; /dev/fuse as udev sets it up."""
    before = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    base = Path(tempfile.mkdtemp(prefix="safefs-user-"))
    try:
        base.chmod(0o755)
        for name in ("backing", "mnt"):
            (base / name).mkdir()
            os.chown(base / name, NOBODY, NOBODY)
        yield base
    finally:
        os.chmod("/dev/fuse", before)
        shutil.rmtree(base)


@pytest.fixture
def users_mount(reachable: Path) -> Iterator[Mount]:
    """A mount made by nobody, through fusermount3."""
    places = reachable / "backing", reachable / "mnt"
    with mounted(*places, prefix=as_nobody(), python=user_python(), environment={"HOME": "/nonexistent"}) as mount:
        yield mount


@pytest.fixture
def nobody(users_mount: Mount) -> Iterator[Actor]:
    """A process of the user who mounted; nobody else, not even root, may look into such a mount."""
    with actor(uid=NOBODY, cwd=Path("/")) as party:
        yield party


def test_a_user_mounts_for_himself(users_mount: Mount, nobody: Actor) -> None:
    """It is a mount of the kernel's, owned by him, and closed to others."""
    with open("/proc/self/mountinfo") as lines:
        line = next(line for line in lines if line.split()[4] == str(users_mount.path))
    assert f"user_id={NOBODY}" in line and "nosuid" in line and "nodev" in line
    nobody("open(p, 'w').write('hello')", p=str(users_mount / "file"))
    assert nobody.read(users_mount / "file") == b"hello"
    assert content(users_mount.backing / "file") == b"hello"
    assert os.stat(users_mount.backing / "file").st_uid == NOBODY
    with actor(uid=ONE, cwd=Path("/")) as other:
        assert other.errno("os.stat(p)", p=str(users_mount / "file")) == errno.EACCES


def test_a_users_drafts_are_safe(users_mount: Mount, nobody: Actor) -> None:
    """Draft, family, publish and rename on a user's mount."""
    path = users_mount / "file"
    with actor(uid=NOBODY, cwd=Path("/")) as stranger:
        fd = nobody.open(path, CREATE)
        nobody.write(fd, A)
        child = nobody.fork()
        assert child.read(path) == A
        assert stranger.read(path) is None
        child.close()
        nobody.closefd(fd)
        assert stranger.read(path) == A
        fd = nobody.open(path, os.O_WRONLY | os.O_APPEND)
        nobody.write(fd, B)
        assert stranger.read(path) == A
        nobody("os.rename(p, q)", p=str(path), q=str(users_mount / "final"))
        nobody.closefd(fd)
        assert stranger.read(users_mount / "final") == A + B


def test_a_users_killed_writer(users_mount: Mount, nobody: Actor) -> None:
    """The daemon sees the end of its user's own processes: a killed one publishes nothing, an exit does."""
    for end, shown in (("kill", None), ("exit", A)):
        with actor(uid=NOBODY, cwd=Path("/")) as victim:
            fd = victim.open(users_mount / end, CREATE)
            victim.write(fd, A)
            if end == "kill":
                victim.kill(9)
                assert in_quarantine(users_mount.backing, lambda data: data == A)
            else:
                victim.exit(3)
        assert nobody.read(users_mount / end) == shown


def test_a_user_unmounts(reachable: Path) -> None:
    """fusermount3 -u by the user ends the daemon in order."""
    with mounted(reachable / "backing", reachable / "mnt", prefix=as_nobody(), python=user_python()) as mount:
        subprocess.run(as_nobody("fusermount3", "-u", mount.path), check=True, cwd="/")
        assert mount.process.wait(30) == 0
        assert not mount.is_mounted()


def test_a_users_mount_in_the_background(reachable: Path) -> None:
    """`safefs mount` and `safefs umount` as a user types them."""
    command = as_nobody(user_python(), "-m", "safefs")
    options = {"cwd": "/", "timeout": 60, "env": {"HOME": str(reachable / "mnt"), "PATH": os.environ["PATH"]}}
    log = reachable / "backing" / "daemon.txt"
    subprocess.run(
        [*command, "mount", "--log-file", log, reachable / "backing", reachable / "mnt"],
        check=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        with actor(uid=NOBODY, cwd=Path("/")) as user:
            user("open(p, 'w').write('x')", p=str(reachable / "mnt" / "file"))
        assert content(reachable / "backing" / "file") == b"x"
    finally:
        subprocess.run([*command, "umount", reachable / "mnt"], check=True, **options)  # type: ignore[call-overload]
    assert wait_until(lambda: not os.path.ismount(reachable / "mnt"))


def test_allow_other_needs_permission(reachable: Path) -> None:
    """allow_other without user_allow_other in fuse.conf is refused with a line that says so."""
    with open("/etc/fuse.conf") as lines:
        assert "user_allow_other" not in [line.strip() for line in lines], "this machine allows it: nothing to test"
    command = as_nobody(
        user_python(), "-m", "safefs", "mount", reachable / "backing", reachable / "mnt", "-o", "allow_other"
    )
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "user_allow_other" in done.stderr and len(done.stderr.strip().splitlines()) == 1
