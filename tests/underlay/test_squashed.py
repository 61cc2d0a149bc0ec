"""safefs on a filesystem that squashes root, with a service user for its state.

Two nodes are two mounts of the bad filesystem (tests/underlay/filesystem.py, `--squash`) with a safefs on each.  Files
are those of users who are neither root nor the service user.  What is on the disk is looked at as on the server.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content
from tests.mount.user_python import as_nobody, user_python
from tests.support.mounting import Mount, mounted, safefs, start_mount, status, wait_until
from tests.underlay.test_bad_underlay import underlay

SERVICE = "games"  # a user of every Debian
ONE, TWO, GROUP, NOBODY = 61001, 61002, 61003, 65534
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
OPTIONS = f"negative_refresh=on,service_user={SERVICE}"
REMEDY = "install -d -o safefs -m 700 {}/.safefs"


@contextmanager
def reachable() -> Iterator[Path]:
    """A directory that users can enter."""
    base = Path(tempfile.mkdtemp(prefix="safefs-squashed-"))
    try:
        base.chmod(0o755)
        yield base
    finally:
        shutil.rmtree(base)


@dataclass
class Cluster:
    """`disk`: what the server has; `bare`: the filesystem as two nodes have it; `mounts`: the safefs above each."""

    disk: Path
    bare: tuple[Path, ...]
    mounts: tuple[Mount, ...]

    def home(self, name: str, owner: int, mode: int = 0o700, group: int | None = None) -> str:
        """A directory of a user's, made on the server."""
        path = self.disk / name
        path.mkdir()
        os.chown(path, owner, owner if group is None else group)
        path.chmod(mode)
        return name


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        base = stack.enter_context(reachable())
        disk, bare = base / "disk", (base / "bare1", base / "bare2")
        disk.mkdir(mode=0o755)
        (disk / ".safefs").mkdir(mode=0o700)
        shutil.chown(disk / ".safefs", SERVICE)
        for place in bare:
            stack.enter_context(underlay(disk, place, "--squash"))
        mounts = [
            stack.enter_context(mounted(place, base / f"mnt{number}", "-o", OPTIONS))
            for number, place in enumerate(bare)
        ]
        yield Cluster(disk, bare, tuple(mounts))
        for mount in mounts:
            mount.stop()


@contextmanager
def as_user(uid: int = ONE, groups: tuple[int, ...] = ()) -> Iterator[Actor]:
    with actor(uid=uid, groups=list(groups), cwd=Path("/")) as party:
        yield party


def owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, stat.S_IMODE(found.st_mode)


def write(party: Actor, path: Path, data: bytes, flags: int = CREATE, mode: int = 0o600) -> None:
    fd = party.open(path, flags, mode)
    party.write(fd, data)
    party.closefd(fd)


def quarantine(mount: Mount) -> dict[str, Any]:
    """What root is told of the quarantine, by path."""
    done = safefs("quarantine", "list", "--json", mount.path)
    assert done.returncode == 0, done.stderr
    return {entry["path"]: entry for entry in json.loads(done.stdout)}


def refusal(backing: Path, mountpoint: Path, *options: str) -> str:
    """The one line that a mount is refused with."""
    mountpoint.mkdir()
    done = safefs("mount", *options, "--log-file", mountpoint.with_name("log"), backing, mountpoint)
    assert done.returncode == 1 and not mountpoint.is_mount()
    (line,) = done.stderr.splitlines()
    return line


# ------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("root_mode", "said"),
    [(0o755, "Permission denied for root"), (0o777, "what root makes there belongs to nobody")],
)
def test_refused_without_a_service_user(root_mode: int, said: str) -> None:
    """Where root can make nothing, and where what he makes is nobody's: the line names the remedy."""
    with reachable() as base:
        disk, bare = base / "disk", base / "bare"
        disk.mkdir()
        disk.chmod(root_mode)
        with underlay(disk, bare, "--squash"):
            line = refusal(bare, base / "mnt")
        assert said in line and REMEDY.format(bare) in line and "-o service_user=safefs" in line
        assert os.listdir(disk) == []


def test_refused_where_the_state_is_another_users() -> None:
    """Root's daemon, and that of another service user, do not touch it; who mounts is told whose it is."""
    with reachable() as base:
        disk, bare = base / "disk", base / "bare"
        disk.mkdir(mode=0o755)
        (disk / ".safefs").mkdir(mode=0o700)
        shutil.chown(disk / ".safefs", SERVICE)
        with underlay(disk, bare, "--squash"):
            line = refusal(bare, base / "mnt")
            assert f"belongs to {SERVICE}, not to root" in line and f"-o service_user={SERVICE}" in line
            line = refusal(bare, base / "mnt2", "-o", "service_user=daemon")
            assert f"belongs to {SERVICE}, not to daemon" in line
        assert os.listdir(disk / ".safefs") == []


# --------------------------------------------------------------------- users


def test_control_root_has_no_rights(cluster: Cluster) -> None:
    """The filesystem does squash root, and lets users do what they may."""
    home = cluster.bare[0] / cluster.home("control", ONE)
    for call in (lambda: os.listdir(home), lambda: os.mkdir(home / "x"), lambda: os.listdir(home.parent / ".safefs")):
        with pytest.raises(PermissionError):
            call()
    with as_user() as one:
        write(one, home / "file", A)
    assert owner(cluster.disk / "control" / "file") == (ONE, 0o600)


def test_the_state_is_the_service_users(cluster: Cluster) -> None:
    """All of it, and nobody else has rights to it, nor sees it in a mount."""
    uid = pwd.getpwnam(SERVICE).pw_uid
    state = cluster.disk / ".safefs"
    found = [state, *state.rglob("*")]
    assert {path.lstat().st_uid for path in found} == {uid} and len(found) > 10
    assert owner(state) == (uid, 0o700)
    assert status(cluster.mounts[0])["service_user"] == SERVICE
    with as_user() as one:
        for place in cluster.bare:
            assert one.errno("os.listdir(p)", p=str(place / ".safefs")) == errno.EACCES
        for mount in cluster.mounts:
            assert one.errno("os.listdir(p)", p=str(mount / ".safefs")) == errno.ENOENT


def test_users_write(cluster: Cluster) -> None:
    """Create, replace, append, truncate, rename and remove, in a directory that only its owner may enter."""
    home = cluster.home("writes", ONE)
    here, there, disk = (place / home for place in (cluster.mounts[0], cluster.mounts[1], cluster.disk))
    with as_user() as one, as_user() as elsewhere, as_user(TWO) as two:
        write(one, here / "file", A)
        assert elsewhere.read(there / "file") == A
        write(one, here / "file", B)
        assert elsewhere.read(there / "file") == B
        write(one, here / "file", A, os.O_WRONLY | os.O_APPEND)
        assert elsewhere.read(there / "file") == B + A
        one("os.truncate(p, 10)", p=str(here / "file"))
        assert elsewhere.read(there / "file") == B[:10]
        fd = one.open(here / "file", os.O_RDWR)
        one("os.pwrite(fd, b'x', 3); os.ftruncate(fd, 7); os.fsync(fd)", fd=fd)
        one.closefd(fd)
        assert elsewhere.read(there / "file") == B[:3] + b"x" + B[4:7]
        assert owner(disk / "file") == (ONE, 0o600)
        assert two.errno("os.stat(p)", p=str(here / "file")) == errno.EACCES
        one("os.rename(p, q)", p=str(here / "file"), q=str(here / "renamed"))
        write(one, here / "partial.part", A)
        write(one, here / "partial.part", B, os.O_WRONLY | os.O_APPEND)
        one("os.mkdir(p + '/sub'); os.rmdir(p + '/sub'); os.unlink(p + '/renamed')", p=str(here))
        assert elsewhere("sorted(os.listdir(p))", p=str(there)) == ["partial.part"]
        assert elsewhere.read(there / "partial.part") == A + B
    assert os.listdir(disk) == ["partial.part"], "hidden files are left"


def test_a_mapping_that_outlives_its_descriptor(cluster: Cluster) -> None:
    """The draft of a mode that only its owner may read is opened anew when it is closed."""
    path = cluster.mounts[0] / cluster.home("mapped", ONE) / "file"
    with as_user() as one:
        fd = one.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        one("os.write(fd, data); m = mmap.mmap(fd, 4096); os.close(fd); m[:1] = b'x'", fd=fd, data=bytes(4096))
        one("m.close()")
        assert wait_until(lambda: content(cluster.disk / "mapped" / "file") == b"x" + bytes(4095))


def test_a_name_that_promises_something_else(cluster: Cluster) -> None:
    """A file that is renamed to the digest of another is in quarantine, and its name is gone."""
    home = cluster.home("promises", ONE)
    (cluster.disk / home / "blobs").mkdir()
    os.chown(cluster.disk / home / "blobs", ONE, ONE)
    blobs = cluster.mounts[0] / home / "blobs"
    with as_user() as one:
        write(one, blobs / "file", A)
        code = "os.rename(p, q)"
        assert one.errno(code, p=str(blobs / "file"), q=str(blobs / ("0" * 64))) == errno.EIO
    assert os.listdir(cluster.disk / home / "blobs") == []
    entry = quarantine(cluster.mounts[0])[f"{home}/blobs/file"]
    assert content(cluster.disk / ".safefs" / "quarantine" / entry["write_id"]) == A


def test_a_directory_of_a_group(cluster: Cluster) -> None:
    """Only members may write there, as a supplementary group, and the directory is root's: nobody helps out."""
    home = cluster.home("group", 0, 0o770, GROUP)
    here, disk = cluster.mounts[0] / home, cluster.disk / home
    with as_user(ONE, (GROUP,)) as one, as_user(TWO, (GROUP,)) as two:
        fd = one.open(here / "exits", CREATE, 0o660)
        one.write(fd, A)
        write(two, here / "closes", A)
        write(two, here / "closes", B, os.O_WRONLY | os.O_APPEND)
        one.exit()  # it has the file open: RELEASE publishes, when nothing of the process is left to ask for its groups
        assert wait_until(lambda: content(disk / "exits") == A)
    assert content(disk / "closes") == A + B
    with as_user(TWO, (GROUP,)) as two:
        fd = two.open(here / "killed", CREATE, 0o600)
        two.write(fd, B)
        two.kill(signal.SIGKILL)
    assert wait_until(lambda: sorted(os.listdir(disk)) == ["closes", "exits"]), "a hidden file is left"
    assert "group/killed" in quarantine(cluster.mounts[0])


def test_a_file_in_a_directory_that_is_anothers(cluster: Cluster) -> None:
    """Who may write to a file in a directory in which he may make none: the directory's owner stands in."""
    home = cluster.home("anothers", ONE, 0o755)
    here, disk = cluster.mounts[0] / home, cluster.disk / home
    with as_user() as one, as_user(TWO) as two:
        write(one, here / "file", A, mode=0o666)
        one("os.chmod(p, 0o666)", p=str(here / "file"))
        write(two, here / "file", B, os.O_WRONLY | os.O_APPEND)
        assert one.read(here / "file") == A + B
        assert two.errno("os.open(p, os.O_CREAT | os.O_WRONLY)", p=str(here / "new")) == errno.EACCES
    assert owner(disk / "file") == (ONE, 0o666) and os.listdir(disk) == ["file"]


def test_a_client_of_roots(cluster: Cluster) -> None:
    """Gets what the filesystem gives root: the rights of nobody."""
    mine, everybodys = cluster.home("roots", ONE, 0o755), cluster.home("everybodys", ONE, 0o777)
    with as_user() as one, actor(cwd=Path("/")) as root:
        write(one, cluster.mounts[0] / mine / "file", A)
        for place in (cluster.bare[0], cluster.mounts[0].path):
            assert root.errno("os.open(p, os.O_RDONLY)", p=str(place / mine / "file")) == errno.EACCES
            assert root.errno("os.open(p, os.O_WRONLY)", p=str(place / mine / "file")) == errno.EACCES
            assert root.errno("open(p, 'w')", p=str(place / mine / "new")) == errno.EACCES
            assert root.errno("os.unlink(p)", p=str(place / mine / "file")) == errno.EACCES
        write(root, cluster.mounts[0] / everybodys / "file", B)
        assert root.read(cluster.mounts[1] / everybodys / "file") == B
    assert owner(cluster.disk / everybodys / "file") == (NOBODY, 0o600)
    assert os.listdir(cluster.disk / everybodys) == ["file"]


# --------------------------------------------------------------------- locks


def locks_of(places: list[Path], path: str) -> list[bool]:
    """Whether processes of two users, one on each node, get one exclusive lock at the same time."""
    with as_user() as one, as_user(TWO) as two:
        got = []
        for party, place in zip((one, two), places, strict=True):
            fd = party.open(place / path, os.O_RDWR)
            code = "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)"
            got.append(party.errno(code, fd=fd) == 0)
        return got


def test_locks_exclude(cluster: Cluster) -> None:
    """Lease files are the service user's; on the filesystem as it is both get the lock."""
    home = cluster.home("locks", ONE, 0o755)
    path = f"{home}/data"
    with as_user() as one:
        write(one, cluster.mounts[0] / path, A, mode=0o666)
    (cluster.disk / path).chmod(0o666)
    assert locks_of([mount.path for mount in cluster.mounts], path) == [True, False]
    assert locks_of(list(cluster.bare), path) == [True, True], "the control"


def test_a_lock_file_goes_with_its_creator(cluster: Cluster) -> None:
    """In a directory in which root may remove nothing."""
    path = cluster.home("softlocks", ONE) + "/it.lock"
    with as_user() as victim:
        victim.open(cluster.mounts[0] / path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        assert (cluster.disk / path).exists()
        victim.kill(signal.SIGKILL)
    assert wait_until(lambda: not os.listdir(cluster.disk / "softlocks"))  # it has a hidden name before it is gone


def test_a_probe(cluster: Cluster) -> None:
    """Root tries the filesystem as the service user, in its directory: he could make nothing himself."""
    done = safefs("probe", "--json", cluster.bare[0])
    assert done.returncode == 0, done.stderr
    found = {finding["what"]: finding["good"] for finding in json.loads(done.stdout)}
    assert found["a rename has one winner"] is True


# ---------------------------------------------------------------- quarantine


def test_a_killed_writer(cluster: Cluster) -> None:
    """A copy is kept: the service user may not move the file.  Root can look at it, and restore it as the user's."""
    mount, home = cluster.mounts[0], cluster.home("killed", ONE)
    with as_user() as victim:
        fd = victim.open(mount / home / "file", CREATE, 0o640)
        victim.write(fd, A)
        victim.kill(signal.SIGKILL)
    assert wait_until(lambda: os.listdir(cluster.disk / home) == []), "the hidden file is left"
    entry = quarantine(mount)[f"{home}/file"]
    kept = cluster.disk / ".safefs" / "quarantine" / entry["write_id"]
    assert content(kept) == A and owner(kept)[0] == pwd.getpwnam(SERVICE).pw_uid
    shown = safefs("quarantine", "show", entry["write_id"], "--at", mount.path)
    assert shown.returncode == 0 and "xxh3-128:" in shown.stdout
    done = safefs("quarantine", "restore", entry["write_id"], "--at", mount.path)
    assert done.returncode == 0, done.stderr
    assert content(cluster.disk / home / "file") == A
    assert owner(cluster.disk / home / "file") == (ONE, 0o640)
    assert f"{home}/file" not in quarantine(mount)
    events = safefs("events", mount.path)
    assert events.returncode == 0 and "restored" in events.stdout and "killed writer" in events.stdout


@pytest.mark.parametrize("command", ["quarantine list", "events"])
def test_users_are_told_nothing(cluster: Cluster, command: str) -> None:
    argv = as_nobody(user_python(), "-m", "safefs", *command.split(), cluster.bare[0])
    done = subprocess.run(argv, cwd="/", capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "only its owner may look into it: run this as root" in line
    assert safefs(*command.split(), cluster.bare[0]).returncode == 0, "root may, beside the mounts too"


def test_what_a_dead_daemon_left(cluster: Cluster) -> None:
    """Hidden files and a partial file in a user's own directory are settled by the next daemon."""
    home, base = cluster.home("left", ONE), cluster.disk.parent
    disk = cluster.disk / home
    before = set(quarantine(cluster.mounts[0]))
    doomed = start_mount(cluster.bare[0], base / "doomed", "-o", OPTIONS)
    try:
        with as_user() as one:
            write(one, doomed / home / "model.part", A)
            fd, part = (one.open(doomed / home / name, os.O_CREAT | os.O_WRONLY) for name in ("file", "model.part"))
            for each in (fd, part):
                one("os.pwrite(fd, data, 0); os.fsync(fd)", fd=each, data=B)
            hidden = os.listdir(disk)
            assert len(hidden) == 2 and all(name.startswith(".safefs~") for name in hidden), hidden
            doomed.kill()
    finally:
        doomed.kill()
    assert wait_until(lambda: os.listdir(disk) == ["model.part"], 20), os.listdir(disk)
    assert content(disk / "model.part") == B + A[len(B) :] and owner(disk / "model.part") == (ONE, 0o600)
    (name,) = set(quarantine(cluster.mounts[0])) - before
    assert name.startswith(".safefs~")


def test_what_a_dead_daemon_left_in_a_directory_of_a_group(cluster: Cluster) -> None:
    """The directory is root's: who wrote there has the rights that its owner has not."""
    home, base = cluster.home("groups-left", 0, 0o770, GROUP), cluster.disk.parent
    disk = cluster.disk / home
    doomed = start_mount(cluster.bare[0], base / "doomed", "-o", OPTIONS)
    try:
        with as_user(ONE, (GROUP,)) as one, as_user(TWO, (GROUP,)) as two:
            for number, party in enumerate((one, two)):
                fd = party.open(doomed / home / f"file{number}", CREATE, 0o600)
                party("os.write(fd, data); os.fsync(fd)", fd=fd, data=A)
            one.open(doomed / home / "a.lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            assert wait_until(lambda: noted(cluster.disk, f"{home}/a.lock"))
            doomed.kill()
    finally:
        doomed.kill()
    assert wait_until(lambda: os.listdir(disk) == [], 20), os.listdir(disk)


def noted(disk: Path, path: str) -> bool:
    """Whether a lock file is on record for the case that its daemon dies."""
    records = (disk / ".safefs" / "daemons").glob("*/softlocks")
    return any(path in (content(record) or b"").decode() for record in records)


def test_a_directory_with_leftovers_is_removed(cluster: Cluster) -> None:
    """rmdir(2) by a user, of a directory in which only the hidden file of another user's draft lies."""
    home = cluster.home("removed", ONE, 0o777)
    before = set(quarantine(cluster.mounts[0]))
    with as_user() as one, as_user(TWO) as two:
        one("os.mkdir(p); os.chmod(p, 0o777)", p=str(cluster.mounts[1] / home / "dir"))
        fd = two.open(cluster.mounts[0] / home / "dir" / "file", CREATE, 0o600)
        two.write(fd, A)
        two("os.fsync(fd)", fd=fd)
        one("os.rmdir(p)", p=str(cluster.mounts[1] / home / "dir"))
        assert not (cluster.disk / home / "dir").exists()
        assert two.errno("os.close(fd)", fd=fd) == errno.ENOENT
    assert any("removed/dir/file" in name for name in set(quarantine(cluster.mounts[0])) - before)
