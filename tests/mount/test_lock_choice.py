"""Where a mount keeps its locks and why, as `safefs status` says it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from safefs.agreement import WATCH_SECONDS
from safefs.daemon import JOIN_SECONDS
from safefs.family import mounted_at
from tests.conftest import MountFactory
from tests.support.etcd import PREFIX, Etcd, etcd, free_port
from tests.support.mounting import Mount, safefs, safefs_command, start_mount, status

SECONDS = 30
FIRST_LEASE_SECONDS = JOIN_SECONDS + WATCH_SECONDS  # with a lease as short as by default


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


# etcd, which has its own word to say about who comes in.


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd"), tls=True, user=True) as server:
        yield server


def refusal(backing: Path, mountpoint: Path, options: str) -> tuple[str, float]:
    """The one line of a mount that is not to be had, which leaves nothing of its daemon's; and after how long."""
    mountpoint.mkdir(exist_ok=True)
    start = time.monotonic()
    done = safefs("mount", backing, mountpoint, "-o", options)
    seconds = time.monotonic() - start
    assert done.returncode == 1
    assert done.stderr.startswith("safefs: ") and done.stderr.count("\n") == 1, done.stderr
    assert not list((backing / ".safefs/daemons").iterdir())
    return done.stderr, seconds


def test_who_etcd_does_not_let_in(secured: Etcd, backing: Path, tmp_path: Path) -> None:
    """At once, with what to do; that nobody else uses the directory is not known from that."""
    assert secured.password_file is not None
    guessed = tmp_path / "guessed"
    guessed.write_text("guessed\n")
    options = secured.options + f",etcd_prefix={PREFIX}x"
    for wrong, why in (
        (options.replace(str(secured.password_file), str(guessed)), "look at -o etcd_user and etcd_password_file"),
        (options + ",etcd_prefix=/elsewhere", "read and write all keys below -o etcd_prefix"),
    ):
        line, seconds = refusal(backing, tmp_path / "mnt", wrong)
        assert why in line and "locks=memory" not in line
        assert seconds < FIRST_LEASE_SECONDS / 2


def test_an_etcd_that_is_asked_in_the_wrong_way(secured: Etcd, backing: Path, tmp_path: Path) -> None:
    """It may be starting, so it is asked for a while."""
    plain = f"locks=etcd://{secured.endpoints.replace('https', 'http')}"
    line, seconds = refusal(backing, tmp_path / "mnt", plain)
    assert "does it want https://HOST:PORT" in line and "locks=memory" not in line
    assert FIRST_LEASE_SECONDS - 1 < seconds < 2 * FIRST_LEASE_SECONDS


def test_an_etcd_that_is_not_there(backing: Path, tmp_path: Path) -> None:
    line, _ = refusal(backing, tmp_path / "mnt", f"locks=etcd://127.0.0.1:{free_port()},127.0.0.1:{free_port()}")
    assert "cannot be reached" in line and "where no other node uses this directory, -o locks=memory" in line


def test_files_that_are_not_there(backing: Path, tmp_path: Path) -> None:
    (backing / ".safefs/daemons").mkdir(parents=True)
    line, _ = refusal(backing, tmp_path / "mnt", "locks=etcd://a:1,etcd_ca=/no/such/file")
    assert line == "safefs: -o etcd_ca=/no/such/file: No such file or directory\n"


def test_the_endpoints_of_etcd_in_fstab(tmp_path: Path, backing: Path, make_mount: MountFactory) -> None:
    """With commas between them, as in the README; one of the members is enough."""
    with etcd(tmp_path) as server:
        nobody, member = f"127.0.0.1:{free_port()}", server.members[0].url.removeprefix("http://")
        mount = make_mount("-o", f"noatime,locks=etcd://{nobody},{member},lease_seconds=9")
        assert status(mount)["locks"]["backend"].startswith("etcd://127.0.0.1:")
        mount.stop()
