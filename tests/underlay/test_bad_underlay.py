"""safefs on a shared filesystem without cluster locks, with stale negative names, short writes and unsynced data.

Two nodes are two mounts of the bad filesystem (tests/underlay/filesystem.py) with a safefs on each.  The controls use
the two mounts of the bad filesystem as they are.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.model.test_conflicts import WRITERS, Parties, interleave
from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, in_quarantine
from tests.mount.test_metadata import kill_daemon
from tests.support.hub_race import model_hub, race
from tests.support.mounting import Mount, safefs, safefs_command, status, wait_until
from tests.support.venvs import hub_venv
from tests.tools.test_sentinel import sentinel

ROOT = Path(__file__).resolve().parents[2]
SECONDS, PROBE_SECONDS = 30, 90
SENTINEL_ROUNDS = 15
CONTROL_RUNS = 30
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY


@contextmanager
def underlay(source: Path, mountpoint: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One node's mount of the bad filesystem."""
    mountpoint.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.underlay.filesystem", source, mountpoint, *options]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            assert wait_until(lambda: mountpoint.is_mount() or process.poll() is not None, SECONDS)
            assert process.poll() is None
            yield process
        finally:
            subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True, timeout=SECONDS)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Cluster:
    """Two nodes: `bare` the bad filesystem on each, `mounts` the safefs above it, `source` what is on the disk."""

    source: Path
    bare: tuple[Path, Path]
    processes: tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]
    mounts: tuple[Mount, Mount]


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path, make_mount: MountFactory) -> Iterator[Cluster]:
    """With the options of the bad filesystem as parameter."""
    source = tmp_path / "disk"
    source.mkdir()
    bare = (tmp_path / "bare1", tmp_path / "bare2")
    with ExitStack() as stack:
        options = getattr(request, "param", ())
        processes = tuple(stack.enter_context(underlay(source, place, *options)) for place in bare)
        mounts = tuple(make_mount("-o", "negative_refresh=on", backing=place) for place in bare)
        yield Cluster(source, bare, (processes[0], processes[1]), (mounts[0], mounts[1]))
        for mount in mounts:
            mount.stop()


@pytest.mark.parametrize("below", [False, True], ids=["the backing itself", "below its root"])
def test_the_first_draft_of_a_daemon_that_is_killed(
    tmp_path: Path, backing: Path, make_mount: MountFactory, below: bool
) -> None:
    """Nobody knows before it that drafts have hidden names there; the next daemon finds it all the same."""
    (tmp_path / "disk" / "dir").mkdir(parents=True)
    with underlay(tmp_path / "disk", backing / "nested" if below else tmp_path / "view") as process, actor() as writer:
        root = backing if below else tmp_path / "view"
        doomed = make_mount(backing=root)
        place = doomed / "nested/dir" if below else doomed / "dir"
        writer("os.write(fd, data); os.fsync(fd)", fd=writer.open(place / "first", CREATE), data=A)
        (hidden,) = os.listdir(tmp_path / "disk/dir")
        assert hidden.startswith(".safefs~")
        kill_daemon(doomed)
        successor = make_mount(backing=root)
        assert in_quarantine(root, lambda data: data == A)
        assert wait_until(lambda: os.listdir(tmp_path / "disk/dir") == [])
        successor.stop()
        assert process.poll() is None


def locked(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def test_one_that_does_not_say_what_it_is(tmp_path: Path, make_mount: MountFactory) -> None:
    """Has no lease files before two probes raced for names; that locks exclude nobody is no matter then."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "mnt").mkdir()
    with ExitStack() as stack:
        bare = [tmp_path / "bare1", tmp_path / "bare2"]
        for place in bare:
            stack.enter_context(underlay(tmp_path / "disk", place, "--nameless"))
        refused = safefs("mount", bare[0], tmp_path / "mnt")
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
        assert f"run `safefs probe {bare[0]} --peer` on two nodes at once, or use -o locks=etcd" in refused.stderr
        probes = [subprocess.Popen(safefs_command("probe", place, "--peer")) for place in bare]
        assert [process.wait(PROBE_SECONDS) for process in probes] == [0, 0]
        for place in bare:
            mount = make_mount(backing=place)
            said = status(mount)["locks"]
            assert said["backend"].startswith("leasefile: ") and "O_EXCL has one winner" in said["because"]
            mount.stop()


def test_control_flock_excludes_nobody(cluster: Cluster) -> None:
    """The filesystem is as bad as it has to be: two nodes hold one exclusive lock."""
    (cluster.source / "file").touch()
    for fd in [locked(place / "file") for place in cluster.bare]:
        os.close(fd)


def test_names_that_were_missing(cluster: Cluster) -> None:
    """The other node remembers that a name was missing; through safefs it is there when close() has returned."""
    first, second = cluster.mounts
    assert content(second / "file") is None
    (first / "file").write_bytes(A)
    assert content(second / "file") == A


def test_control_names_that_were_missing(cluster: Cluster) -> None:
    first, second = cluster.bare
    assert content(second / "file") is None
    (first / "file").write_bytes(A)
    assert content(second / "file") is None


def test_sizes_on_the_other_node(cluster: Cluster) -> None:
    """Attributes are remembered for 3 s; a file that grows is a new inode each time, of which nothing is."""
    first, second = cluster.mounts
    for size in (1, 2, 3):
        (first / "file").write_bytes(A * size)
        with open(second / "file", "rb") as reader:
            assert (os.fstat(reader.fileno()).st_size, reader.read()) == (size * len(A), A * size)


def test_control_sizes_on_the_other_node(cluster: Cluster) -> None:
    first, second = cluster.bare
    (first / "file").write_bytes(A)
    with open(second / "file", "rb") as reader, open(first / "file", "ab") as writer:
        assert os.fstat(reader.fileno()).st_size == len(A)
        writer.write(B)
        writer.flush()
        assert os.fstat(reader.fileno()).st_size == len(A)


@pytest.mark.parametrize("cluster", [("--estale",)], indirect=True)
@pytest.mark.parametrize("retain", ["1h", "off"])
def test_readers_of_a_replaced_file(cluster: Cluster, make_mount: MountFactory, retain: str) -> None:
    """The filesystem breaks descriptors of files without a name; a retained version has one.  `off` is the control."""
    first, second = (make_mount("-o", f"retain={retain}", backing=place) for place in cluster.bare)
    (first / "file").write_bytes(A)
    with open(second / "file", "rb", buffering=0) as reader:
        (first / "file").write_bytes(B)
        assert content(second / "file") == B
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if retain == "off":
            with pytest.raises(OSError, match="Stale file handle"):
                reader.read()
        else:
            assert reader.read() == A
    for mount in (first, second):
        mount.stop()


@pytest.mark.parametrize("cluster", [("--short", "5000")], indirect=True)
def test_short_writes(cluster: Cluster, make_mount: MountFactory, writer: Actor) -> None:
    """What the daemon writes it goes on with; a file is whole.  (With passthrough the writer is told, as always.)"""
    mount = make_mount("-o", "passthrough=off", backing=cluster.bare[0])
    fd = writer.open(mount / "file", CREATE)
    for data in (A, B):
        writer.write(fd, data)
    writer.closefd(fd)
    assert content(cluster.source / "file") == A + B
    mount.stop()


@pytest.mark.parametrize("cluster", [("--short", "5000")], indirect=True)
def test_control_short_writes(cluster: Cluster) -> None:
    fd = os.open(cluster.bare[0] / "file", CREATE)
    written = os.write(fd, A)
    os.close(fd)
    assert written < len(A)


def test_what_was_closed_survives_the_power(cluster: Cluster, writer: Actor) -> None:
    for number in range(5):
        fd = writer.open(cluster.mounts[0] / f"file{number}", CREATE)
        writer.write(fd, A)
        writer.closefd(fd)
    cluster.processes[0].send_signal(signal.SIGUSR2)
    cluster.processes[0].wait(SECONDS)
    for number in range(5):
        assert content(cluster.source / f"file{number}") == A
    cluster.mounts[0].process.kill()


def test_control_what_was_closed_does_not(cluster: Cluster) -> None:
    (cluster.bare[0] / "file").write_bytes(A)
    cluster.processes[0].send_signal(signal.SIGUSR2)
    cluster.processes[0].wait(SECONDS)
    assert content(cluster.source / "file") == bytes(len(A))


def test_conflicts(cluster: Cluster) -> None:
    """The whole table, in any interleaving."""
    with ExitStack() as stack:
        parties = Parties(cluster.mounts, [stack.enter_context(actor()) for _ in range(WRITERS)])
        interleave(parties, examples=25)


def test_control_conflicts(cluster: Cluster, writer: Actor) -> None:
    """Two nodes append to one file: the records of one are written over."""
    (cluster.source / "file").write_bytes(b"one\n")
    first = writer.open(cluster.bare[0] / "file", os.O_WRONLY | os.O_APPEND)
    with actor() as stranger:
        second = stranger.open(cluster.bare[1] / "file", os.O_WRONLY | os.O_APPEND)
        writer.write(first, b"two\n")
        stranger.write(second, b"three\n")
    found = content(cluster.source / "file")
    assert found is not None and not (b"two\n" in found and b"three\n" in found)


@pytest.mark.timeout(200)
def test_sentinel(cluster: Cluster) -> None:
    """What was closed before the sentinel is there, whole, when the sentinel is."""
    writer, reader = (mount.path for mount in cluster.mounts)
    patient, eager = sentinel(writer, [("read", reader), ("eager", reader)], SENTINEL_ROUNDS, "plain")
    assert patient["counts"] == {"reads": SENTINEL_ROUNDS * 20}, patient
    assert set(eager["counts"]) <= {"reads"}, eager


def test_control_sentinel(cluster: Cluster) -> None:
    """How the processes share the processors can keep the reader from every moment at which a file is short."""
    for number in range(CONTROL_RUNS):
        place = cluster.bare[0] / f"run{number}"
        place.mkdir()
        (eager,) = sentinel(place, [("eager", place)], SENTINEL_ROUNDS, "plain")
        if eager["counts"].get("short", 0) + eager["counts"].get("empty", 0):
            return
    pytest.fail(f"no short file in {CONTROL_RUNS} runs")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("version", ["1.17.0", "newest"])
def test_hub_race(cluster: Cluster, version: str) -> None:
    first, second = (mount / "hf" for mount in cluster.mounts)
    with model_hub() as hub:
        outcome = race(hub, hub_venv(version), first, second)
    assert outcome.intact, outcome.description
    assert outcome.exits == (0, 0), outcome.description


@pytest.mark.timeout(200)
def test_control_hub_race(cluster: Cluster) -> None:
    with model_hub() as hub:
        outcome = race(hub, hub_venv("1.17.0"), cluster.bare[0] / "hf", cluster.bare[1] / "hf")
    assert not outcome.intact, outcome.description
