"""Two nodes on real shared filesystems: what is chosen, what is refused, and that files and locks arrive.

`make test` does so on sshfs and rclone, which are small; SAFEFS_CLUSTER_LAB names another one (`make test-labs`).
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safefs.model import STATE_NAME
from safefs.verdict import read
from tests.cluster.conftest import LAB, SMALL_LAB
from tests.cluster.counting import Count
from tests.cluster.hosts import Node
from tests.conftest import MountFactory
from tests.labs.filesystems import LABS, Views
from tests.mount.actors import Actor
from tests.mount.places import content
from tests.support.mounting import safefs, safefs_command, status, wait_until

NAME = LAB or SMALL_LAB
LOCKS_EXCLUDE = {"sshfs": False, "moosefs-nolocks": False, "gluster": True, "juicefs": True, "moosefs": True}
KEEP_BYTES = ("gluster",)  # that were written through a client, whatever others write later
SECONDS = 60.0
FILES = 5
TURNS = 30


def test_what_is_chosen(clients: Views, make_mount: MountFactory) -> None:
    said = status(make_mount(backing=clients[0]))
    assert said["locks"]["backend"].startswith("leasefile: ")
    assert "a rename has one winner" in said["locks"]["because"]
    assert said["temp"] == "hidden"


def test_what_is_published_on_one_node_is_there_on_the_other(clients: Views, make_mount: MountFactory) -> None:
    """A download as most tools do it, a file written by its name, and both replaced."""
    one, two = (make_mount(backing=view) for view in clients)
    for turn in range(FILES):
        data = b"%d" % turn * 100_000
        for name in ("downloaded", "written", f"new{turn}"):
            (two / name).exists()
            temporary = one / f"{name}.incomplete" if name == "downloaded" else one / name
            temporary.write_bytes(data)
            os.replace(temporary, one / name)
            assert content(one / name) == data
            assert wait_until(lambda name=name, data=data: content(two / name) == data, SECONDS), name


def stale_reads(one: Path, two: Path) -> int:
    """How often a file is not what was last written to it, in turn on one and the other, when the writer has closed it.

    Bytes of one size, and a file that grows.
    """
    stale = 0
    for turn in range(TURNS):
        writer, reader = (one, two) if turn % 2 else (two, one)
        for name, data in (("place.db", b"%020d" % turn), ("grows.db", b"x" * (turn + 1))):
            fd = os.open(writer / name, os.O_RDWR | os.O_CREAT)
            os.read(fd, TURNS)
            os.pwrite(fd, data, 0)
            os.close(fd)
            stale += content(reader / name) != data
    return stale


def test_what_is_written_in_place_is_there_for_who_opens_it(clients: Views, make_mount: MountFactory) -> None:
    """Without a lock."""
    one, two = (make_mount(backing=view) for view in clients)
    assert stale_reads(one.path, two.path) == 0


def test_control_bytes_that_a_client_keeps(clients: Views) -> None:
    assert (stale_reads(*clients) > 0) is (NAME in KEEP_BYTES)


def test_control_the_bare_locks(clients: Views, parties: Callable[[], Actor]) -> None:
    """Where the filesystem's own locks exclude nobody on the other client, what the mounts do is their own doing."""
    one, two = parties(), parties()
    for party, view in zip((one, two), clients, strict=True):
        party("fd = os.open(path, os.O_RDWR | os.O_CREAT)", path=os.fspath(view / "x"))
    one("record(fd, SET, EXCLUSIVE)")
    assert (two.errno("record(fd, SET, EXCLUSIVE)") != 0) is LOCKS_EXCLUDE[NAME]


def test_a_reader_loses_its_record_locks_by_any_close(
    clients: Views, make_mount: MountFactory, parties: Callable[[], Actor]
) -> None:
    """Also one that was opened before anybody on the mount had locked anything; for the other node as well."""
    one, two = (make_mount(backing=view) for view in clients)
    (one / "data").write_text("x")
    reader, writer = parties(), parties()
    reader("fd = os.open(p, os.O_RDONLY)", p=os.fspath(one / "data"))
    writer("fd = os.open(p, os.O_RDWR)", p=os.fspath(two / "data"))
    reader("record(fd, SET, SHARED)")
    assert writer.errno("record(fd, SET, EXCLUSIVE)") in (errno.EAGAIN, errno.EACCES)
    reader("os.close(os.dup(fd))")
    assert wait_until(lambda: writer.errno("record(fd, SET, EXCLUSIVE)") == 0, SECONDS)


def test_a_count_on_two_nodes(clients: Views, parties: Callable[[], Actor], tmp_path: Path) -> None:
    """Below a directory of the backing, whose number each client of sshfs makes up."""
    (tmp_path / "notes").mkdir()
    nodes = [Node(view, tmp_path / f"node{number}", ("-o", "lease_seconds=30")) for number, view in enumerate(clients)]
    count = Count(tmp_path / "notes", clients[0], parties)
    try:
        noted = count.run(nodes, 10, SECONDS)
        assert len(noted) == len(set(noted))
        assert wait_until(lambda: count.reached() == max(noted), SECONDS)
    finally:
        for node in nodes:
            node.stop()


def probe_both(views: Views) -> list[dict[str, dict[str, object]]]:
    """What two probes that run at the same time say, by what was tried."""
    command = [safefs_command("probe", view, "--peer", "--json") for view in views]
    running = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in command]
    answers = [process.communicate(timeout=10 * SECONDS) for process in running]
    return [{finding["what"]: finding for finding in json.loads(output)} for output, _ in answers]


def test_a_probe_of_both_and_what_native_makes_of_it(clients: Views, tmp_path: Path) -> None:
    for found in probe_both(clients):
        assert found["two clients"]["result"] == "yes"
        assert found["O_EXCL has one winner"]["good"] is True
        assert found["rename has one winner"]["good"] is True
        for kind in ("flock", "fcntl", "OFD"):
            assert found[f"{kind} excludes"]["good"] is LOCKS_EXCLUDE[NAME], kind
    verdict = read(clients[0] / STATE_NAME)
    assert verdict is not None and verdict.excludes is LOCKS_EXCLUDE[NAME]
    (tmp_path / "mnt").mkdir()
    mounted = safefs("mount", clients[0], tmp_path / "mnt", "-o", "locks=native")
    assert (mounted.returncode == 0) is LOCKS_EXCLUDE[NAME]
    if mounted.returncode == 0:
        assert safefs("umount", tmp_path / "mnt").returncode == 0
    else:
        assert "-o locks=native cannot be had" in mounted.stderr


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Views]:
    with LABS["rclone"](tmp_path_factory.mktemp("rclone")) as views:
        yield views


@pytest.mark.parametrize("locks", ["auto", "leasefile", "native"])
def test_rclone_is_refused(rclone: Views, tmp_path: Path, locks: str) -> None:
    """By one node alone, in a line that says why and what to do."""
    (tmp_path / "mnt").mkdir()
    refused = safefs("mount", rclone[0], tmp_path / "mnt", "-o", f"locks={locks}")
    assert refused.returncode != 0
    assert "both of two nodes win a race for one name" in refused.stderr
    assert "locks=etcd://HOST:PORT" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
