"""safefs scrub and safefs show, on trees that safefs wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import xxhash

from tests.mount.actors import Actor
from tests.mount.places import A, B, content, in_quarantine
from tests.support.mounting import Mount, safefs, safefs_command, wait_until

SECONDS = 60


def damage(path: Path) -> None:
    """One byte changes below the mount, and the times do not: as on a disk that forgets."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"?")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def tree(mount: Mount) -> Mount:
    for name in ("one", "two", "three"):
        (mount / name).mkdir()
        for number in range(10):
            (mount / name / f"file{number}").write_bytes(A + str(number).encode())
    return mount


@pytest.mark.parametrize("place", ["mount", "backing"])
def test_a_whole_tree(tree: Mount, place: str) -> None:
    root = tree.path if place == "mount" else tree.backing
    done = safefs("scrub", root)
    assert (done.returncode, done.stdout.count("damaged")) == (0, 0), done.stdout + done.stderr
    assert "30 files" in done.stdout and "30 good" in done.stdout
    damage(tree.backing / "two" / "file3")
    done = safefs("scrub", root, "--json")
    assert done.returncode == 1
    *findings, summary = map(json.loads, done.stdout.splitlines())
    assert [(finding["path"], finding["verdict"]) for finding in findings] == [("two/file3", "damaged")]
    assert (summary["good"], summary["damaged"]) == (29, 1)


def test_repair(tree: Mount) -> None:
    """A damaged file loses its name and is kept; nothing else is touched."""
    damage(tree.backing / "two" / "file3")
    done = safefs("scrub", tree.path, "--repair=quarantine")
    assert done.returncode == 1
    assert wait_until(lambda: content(tree / "two" / "file3") is None)
    assert in_quarantine(tree.backing, lambda data: data[1000:1001] == b"?")
    (entry,) = json.loads(safefs("quarantine", "list", tree.path, "--json").stdout)
    assert entry["path"] == "two/file3" and "it was published as" in entry["reason"]
    assert "damaged" in safefs("events", tree.path).stdout
    assert safefs("scrub", tree.path).returncode == 0
    assert len(list((tree / "two").iterdir())) == 9


def test_an_interrupted_scrub_goes_on(tree: Mount, tmp_path: Path) -> None:
    """What was reported before the interruption is not looked at again, but perhaps for the last of it."""
    with open(tree.backing / "two" / "file5", "r+b") as file:
        file.truncate(4 << 40)  # an hour's reading
    for name in ("file1", "file3"):
        damage(tree.backing / "one" / name)
    os.setxattr(tree.backing / "two" / "file5", "user.safefs.digest", b"xxh3-128:0")
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    command = safefs_command("scrub", tree.backing, "--jobs", "1", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **state}) as process:
        assert process.stdout is not None
        assert "one/file1" in process.stdout.readline()
        assert "one/file3" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
    os.truncate(tree.backing / "two" / "file5", 0)
    done = safefs("scrub", tree.backing, "--resume", "--json", **state)
    *findings, summary = map(json.loads, done.stdout.splitlines())
    assert "one/file1" not in [finding["path"] for finding in findings]
    assert "two/file5" in [finding["path"] for finding in findings]
    assert summary["good"] + summary["damaged"] < 30
    again = safefs("scrub", tree.backing, "--json", **state)
    assert "one/file1" in again.stdout


def test_show(mount: Mount, writer: Actor) -> None:
    before = int(time.time())
    writer.closefd(writer.open(mount / "empty", os.O_CREAT | os.O_WRONLY))
    fd = writer.open(mount / "file", os.O_CREAT | os.O_WRONLY)
    writer.write(fd, B)
    writer.closefd(fd)
    for place in (mount.path, mount.backing):
        report = json.loads(safefs("show", place / "file", "--json").stdout)
        assert report["digest"] == f"xxh3-128:{xxhash.xxh3_128_hexdigest(B)}"
        assert (report["uid"], report["pid"], report["size"]) == (os.getuid(), writer.pid, len(B))
        assert report["published"] >= time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(before))
    (mount.backing / "foreign").write_bytes(A)
    done = safefs("show", mount / "foreign")
    assert done.returncode == 0 and "not published by safefs" in done.stdout
    done = safefs("show", mount / "missing")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_bad_input(tmp_path: Path) -> None:
    done = safefs("scrub", tmp_path / "missing")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    (tmp_path / "file").touch()
    done = safefs("scrub", tmp_path, "--repair=quarantine")
    assert done.returncode == 1 and "neither on a safefs mount" in done.stderr
