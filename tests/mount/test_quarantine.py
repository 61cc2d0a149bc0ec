"""What was not published: safefs quarantine and safefs events, as an operator uses them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, quarantined
from tests.support.mounting import Mount, safefs, safefs_command, wait_until

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
SECONDS = 60


def listed(mount: Mount) -> list[dict[str, Any]]:
    done = safefs("quarantine", "list", mount.path, "--json")
    assert done.returncode == 0, done.stderr
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    return entries


def seen_events(mount: Mount) -> list[tuple[str, str]]:
    """Kinds and paths of all events; they are written twice a second."""
    done = safefs("events", mount.path, "--json")
    assert done.returncode == 0, done.stderr
    return [(event["event"], event["path"]) for event in map(json.loads, done.stdout.splitlines())]


def kill_a_writer(path: Path, data: bytes = A) -> int:
    """Leave a draft of a killed process; its pid."""
    with actor() as party:
        party.write(party.open(path, CREATE), data)
        party.kill(signal.SIGKILL)
        return party.pid


def await_entries(mount: Mount, count: int) -> list[dict[str, Any]]:
    assert wait_until(lambda: len(listed(mount)) == count), listed(mount)
    return listed(mount)


def test_a_killed_writer(mount: Mount) -> None:
    """Who, when, why, how much and which bytes; then it is published after all, and gone from quarantine."""
    (mount / "dir").mkdir()
    pid = kill_a_writer(mount / "dir" / "file")
    (entry,) = await_entries(mount, 1)
    assert (entry["path"], entry["pid"], entry["uid"], entry["size_bytes"]) == ("dir/file", pid, os.getuid(), len(A))
    assert "killed" in entry["reason"]
    shown = safefs("quarantine", "show", entry["write_id"], "--at", mount.path, "--json")
    assert json.loads(shown.stdout)["digest"] == f"xxh3-128:{xxhash.xxh3_128_hexdigest(A)}"
    assert content(mount / "dir" / "file") is None
    done = safefs("quarantine", "restore", entry["write_id"], "--at", mount.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(mount / "dir" / "file") == content(mount.backing / "dir" / "file") == A
    assert listed(mount) == []
    assert not list(quarantined(mount.backing))
    expected = [("killed writer", "dir/file"), ("restored", "dir/file")]
    assert wait_until(lambda: [pair for pair in seen_events(mount) if pair in expected] == expected)


def test_restore_keeps_owner_mode_and_time(mount: Mount) -> None:
    with actor() as party:
        fd = party.open(mount / "file", CREATE)
        party.write(fd, A)
        party("os.fchmod(fd, 0o640); os.fchown(fd, 61001, 61003); os.utime(fd, ns=(10**18, 10**18))", fd=fd)
        party.kill(signal.SIGKILL)
    (entry,) = await_entries(mount, 1)
    target = mount / "elsewhere"
    assert safefs("quarantine", "restore", entry["write_id"], "--at", mount.path, "--to", target).returncode == 0
    status = target.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid, status.st_mtime_ns) == (0o640, 61001, 61003, 10**18)
    assert content(mount / "file") is None


def test_a_restore_is_checked_like_any_publish(mount: Mount, writer: Actor) -> None:
    name = "a" * 64
    (mount / "blobs").mkdir()
    fd = writer.open(mount / "blobs" / name, CREATE)
    writer.write(fd, A)
    assert writer.errno("os.close(fd)", fd=fd) == errno.EIO
    (entry,) = await_entries(mount, 1)
    done = safefs("quarantine", "restore", entry["write_id"], "--at", mount.path)
    assert done.returncode == 1
    assert "not restored" in done.stderr and len(done.stderr.splitlines()) == 1
    assert content(mount / "blobs" / name) is None
    assert entry["write_id"] in [kept["write_id"] for kept in listed(mount)]


def test_purge(mount: Mount) -> None:
    for number in range(4):
        kill_a_writer(mount / f"file{number}", A if number % 2 else B[:1000])
    entries = await_entries(mount, 4)
    assert safefs("quarantine", "purge", entries[1]["write_id"], "--at", mount.path).returncode == 0
    assert len(listed(mount)) == 3
    # The oldest go until the others fit.
    assert safefs("quarantine", "purge", "--over", "65K", "--at", mount.path).returncode == 0
    left = [entry["path"] for entry in listed(mount)]
    assert left == [entry["path"] for entry in entries[2:]]
    assert 0 < sum(entry["size_bytes"] for entry in listed(mount)) <= 65 << 10
    assert safefs("quarantine", "purge", "--older", "1d", "--at", mount.path).returncode == 0
    assert listed(mount)
    assert safefs("quarantine", "purge", "--all", "--at", mount.path).returncode == 0
    assert listed(mount) == []
    assert not list(quarantined(mount.backing))


def test_what_is_old_goes_by_itself(make_mount: MountFactory) -> None:
    """quarantine_age and quarantine_size are kept by the daemon, at its start and every hour."""
    mount = make_mount()
    for number in range(3):
        kill_a_writer(mount / f"file{number}")
    entries = await_entries(mount, 3)
    record = mount.backing / ".safefs" / "quarantine" / f"{entries[0]['write_id']}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "time": 1.0}))
    again = make_mount()
    assert wait_until(lambda: len(listed(again)) == 2)
    assert wait_until(lambda: ("purged", entries[0]["path"]) in seen_events(again))
    smaller = make_mount("-o", "quarantine_size=100K")
    assert wait_until(lambda: len(listed(smaller)) == 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["quarantine", "show", "nothing"], "nothing in quarantine has this id"),
        (["quarantine", "restore", "nothing"], "nothing in quarantine has this id"),
        (["quarantine", "purge"], "say what to purge"),
        (["quarantine", "purge", "--older", "soon"], "is no time"),
        (["quarantine", "purge", "--over", "much"], "is no size"),
    ],
)
def test_bad_input(arguments: list[str], complaint: str, mount: Mount) -> None:
    done = safefs(*arguments, "--at", mount.path)
    assert done.returncode == 1
    assert complaint in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_directory_that_safefs_does_not_know(tmp_path: Path) -> None:
    for command in (["quarantine", "list"], ["events"]):
        done = safefs(*command, tmp_path)
        assert done.returncode == 1
        assert "neither on a safefs mount" in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_a_mount_the_directory_can_be_looked_at(make_mount: MountFactory) -> None:
    mount = make_mount()
    kill_a_writer(mount / "file")
    (entry,) = await_entries(mount, 1)
    assert safefs("umount", mount.path).returncode == 0
    done = safefs("quarantine", "list", mount.backing)
    assert done.returncode == 0 and entry["write_id"] in done.stdout
    done = safefs("quarantine", "restore", entry["write_id"], "--at", mount.backing)
    assert done.returncode == 1 and "name a mountpoint" in done.stderr


# Events.


def test_events_of_two_nodes(two_mounts: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """Published, joined, superseded and a conflict, from either node's point of view."""
    first, second = two_mounts
    (first / "file").write_bytes(b"one\n")
    append = os.O_WRONLY | os.O_APPEND
    one, two = writer.open(first / "file", append), stranger.open(second / "file", append)
    writer.write(one, b"two\n")
    stranger.write(two, b"three\n")
    writer.closefd(one)
    stranger.closefd(two)
    assert content(first / "file") == b"one\ntwo\nthree\n"
    one, two = writer.open(first / "file", os.O_RDWR), stranger.open(second / "file", os.O_RDWR)
    writer("os.pwrite(fd, b'ONE', 0)", fd=one)
    stranger("os.pwrite(fd, b'ONE', 0)", fd=two)
    writer.closefd(one)
    stranger.closefd(two)
    one, two = writer.open(first / "file", os.O_RDWR), stranger.open(second / "file", os.O_RDWR)
    writer("os.pwrite(fd, b'One', 0)", fd=one)
    stranger("os.pwrite(fd, b'oNe', 0)", fd=two)
    writer.closefd(one)
    assert stranger.errno("os.close(fd)", fd=two) == errno.ESTALE
    kinds = ["published", "published", "joined", "published", "superseded", "published", "conflict"]
    assert wait_until(lambda: [kind for kind, path in seen_events(second) if path == "file"] == kinds), seen_events(
        first
    )


def test_follow(mount: Mount) -> None:
    command = safefs_command("events", mount.path, "--follow", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        try:
            (mount / "file").write_bytes(A)
            assert following.stdout is not None
            event = json.loads(following.stdout.readline())
        finally:
            following.kill()
    assert (event["event"], event["path"], event["size"], event["uid"]) == ("published", "file", len(A), os.getuid())


def test_a_daemon_that_died_is_on_record(make_mount: MountFactory, writer: Actor) -> None:
    dead = make_mount("-o", "temp=hidden")
    writer.write(writer.open(dead / "file", CREATE), A)
    dead.process.kill()
    dead.process.wait(SECONDS)
    successor = make_mount()
    assert wait_until(lambda: "recovered" in [kind for kind, _ in seen_events(successor)])
