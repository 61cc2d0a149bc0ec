"""The commands against live mounts: what an administrator types, and what is left when it ends."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from safefs.control import find_mount
from tests.conftest import MountFactory
from tests.mount.user_python import NOBODY, as_nobody, user_python
from tests.support.mounting import Mount, safefs_command, wait_until

COMMAND_SECONDS = 90


def safefs(
    *arguments: str | Path, prefix: Sequence[str] = (), python: str = sys.executable, cwd: str | Path = "/"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *safefs_command(*arguments, python=python)],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        cwd=cwd,
        check=False,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that failed as all commands do."""
    assert done.returncode == 1, done
    assert done.stderr.startswith("safefs: ") and done.stderr.count("\n") == 1, done
    return done.stderr


@pytest.fixture
def background(backing: Path, tmp_path: Path) -> Iterator[Path]:
    """A mount that went to the background; yields the mountpoint, its log is `log` beside it."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    done = safefs("mount", backing, mountpoint, "--log-file", tmp_path / "log", "-o", "noatime")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    yield mountpoint
    if find_mount(mountpoint):
        assert safefs("umount", mountpoint).returncode == 0


def daemon_pid(mountpoint: Path) -> int:
    return int(json.loads(safefs("status", mountpoint, "--json").stdout)["pid"])


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that init has not collected yet."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_mount_returns_when_the_mount_is_live(background: Path, backing: Path) -> None:
    (background / "file").write_text("hello")
    assert (backing / "file").read_text() == "hello"


def test_the_daemon_is_on_its_own(background: Path) -> None:
    """It survives the terminal, holds no directory, and logs to its file."""
    pid = daemon_pid(background)
    assert os.getsid(pid) == pid != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert " INFO safefs.daemon: mounted " in (background.parent / "log").read_text()


def test_umount_waits_for_the_daemon(background: Path) -> None:
    pid = daemon_pid(background)
    assert safefs("umount", background).returncode == 0
    assert has_ended(pid)
    assert find_mount(background) is None


def test_umount_of_a_busy_mount_names_the_holder(background: Path) -> None:
    with subprocess.Popen(["sleep", "60"], cwd=background) as sleeper:
        message = one_line(safefs("umount", background))
        sleeper.kill()
    assert "busy" in message and f"sleep (pid {sleeper.pid})" in message


def test_mounting_twice_on_one_mountpoint(background: Path, backing: Path) -> None:
    assert "already mounted" in one_line(safefs("mount", backing, background))


def test_a_mount_of_a_mount(background: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert "itself on a safefs mount" in one_line(safefs("mount", background, tmp_path / "other"))


def test_a_dead_mount_is_named_and_can_be_removed(background: Path, backing: Path) -> None:
    pid = daemon_pid(background)
    os.kill(pid, 9)
    assert wait_until(lambda: has_ended(pid))
    report = safefs("status", background, "--json")
    assert report.returncode == 1 and json.loads(report.stdout)["live"] is False
    assert "already mounted; unmount it with" in one_line(safefs("mount", backing, background))
    assert safefs("umount", background).returncode == 0
    assert safefs("mount", backing, background, "--log-file", background.parent / "log").returncode == 0


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_unmounts_in_order(make_mount: MountFactory, number: int) -> None:
    mount = make_mount()
    (mount / "file").write_text("whole")
    mount.process.send_signal(number)
    assert mount.process.wait(30) == 0
    assert not mount.is_mounted()
    assert (mount.backing / "file").read_text() == "whole"


def test_status(two_mounts: tuple[Mount, Mount]) -> None:
    listed = json.loads(safefs("status", "--json").stdout)
    for mount in two_mounts:
        (report,) = [entry for entry in listed if entry["mountpoint"] == str(mount.path)]
        assert (report["source"], report["live"], report["pid"]) == (str(mount.backing), True, mount.process.pid)
        details = safefs("status", mount.path)
        assert details.returncode == 0 and str(mount.process.pid) in details.stdout


def test_status_counts_drafts(mount: Mount) -> None:
    def drafts() -> int:
        return int(json.loads(safefs("status", mount.path, "--json").stdout)["drafts"])

    with open(mount / "file", "w") as file:
        file.write("x")
        file.flush()
        assert drafts() == 1
    assert drafts() == 0


def test_rules_of_the_mount_that_is_asked(make_mount: MountFactory, tmp_path: Path) -> None:
    config = tmp_path / "rules.toml"
    config.write_text('[[rule]]\nclass = "shared"\nmatch = "live/*.csv"\nreason = "a dashboard reads them"\n')
    mount = make_mount("--config", str(config))
    done = safefs("rules", mount / "live/loss.csv")
    assert done.stderr == ""
    assert done.stdout == f"live/loss.csv: shared ({config}:1, glob live/*.csv): a dashboard reads them\n"
    (mount / "live").mkdir()
    with open(mount / "live/loss.csv", "w") as file:
        file.write("1,2\n")
        file.flush()
        assert (mount.backing / "live/loss.csv").read_text() == "1,2\n"


@pytest.fixture
def locked(mount: Mount) -> Iterator[Path]:
    """A file in a directory of the mount, locked by this process."""
    path = mount / "d" / "x.lock"
    path.parent.mkdir()
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield path
    with suppress(OSError):  # EIO, where the lock was broken
        os.close(fd)


def breaks(mount: Mount) -> list[str]:
    """The paths of what is on record as broken."""
    noted = [json.loads(line) for line in safefs("events", mount.path, "--json").stdout.splitlines()]
    return [event["path"] for event in noted if event["event"] == "lock broken"]


@pytest.mark.parametrize("way", ["itself", "link to it", "link to its directory", "link from elsewhere", "unlinked"])
def test_a_lock_is_broken_whatever_leads_to_it(mount: Mount, locked: Path, tmp_path: Path, way: str) -> None:
    path = locked
    if way == "link to it":
        path = mount / "link"
        path.symlink_to("d/x.lock")
    elif way == "link to its directory":
        (mount / "link").symlink_to("d")
        path = mount / "link" / locked.name
    elif way == "link from elsewhere":
        (tmp_path / "link").symlink_to(mount.path)
        path = tmp_path / "link" / "d" / locked.name
    elif way == "unlinked":
        locked.unlink()
    done = safefs("locks", "break", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 broken\n", "")
    assert wait_until(lambda: breaks(mount) == ["d/x.lock"])


def test_where_nothing_is_broken(mount: Mount, locked: Path, tmp_path: Path) -> None:
    """One line that says so, and nothing on record."""
    (mount / "file").touch()
    (mount / "link").symlink_to("file")
    (mount / "out").symlink_to(tmp_path)
    for path in (mount / "file", mount / "missing", mount / "d", mount.path, mount / ".safefs" / "x", mount / "link"):
        assert f"nobody holds a lock on {path}" in one_line(safefs("locks", "break", path))
    assert f"link (which is {mount / 'file'})" in one_line(safefs("locks", "break", mount / "link"))
    assert "No such file or directory" in one_line(safefs("locks", "break", mount / "no/such/dir/file"))
    assert "Not a directory" in one_line(safefs("locks", "break", mount / "file/x"))
    assert "no safefs mount there" in one_line(safefs("locks", "break", mount / "out/x"))
    assert safefs("locks", "break", locked).stdout == "1 broken\n"
    assert wait_until(lambda: breaks(mount))
    assert breaks(mount) == ["d/x.lock"]


def record_of(mount: Mount, path: Path) -> Path:
    """What the lease files have of the lock on a path of the mount."""
    (data,) = (
        data
        for data in (mount.backing / ".safefs/locks/names").glob("*/data~*")
        if json.loads(data.read_text())["name"].endswith(f"/{path.name}")
    )
    return data


@pytest.fixture
def spoilt(two_mounts: tuple[Mount, Mount], locked: Path) -> Iterator[Path]:
    """The record of the lock, which only the second mount has to read; there is one more lock."""
    with open(two_mounts[0] / "other.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield record_of(two_mounts[0], locked)


def states(mount: Mount) -> dict[str, str]:
    done = safefs("locks", "--at", mount.path, "--json")
    assert done.returncode == 0, done
    return {os.path.basename(entry["path"]): entry["state"] for entry in json.loads(done.stdout)}


def problem_of(mount: Mount) -> dict[str, object] | None:
    found: dict[str, object] | None = json.loads(safefs("status", mount.path, "--json").stdout)["lock_problem"]
    return found


@pytest.fixture
def waiter(two_mounts: tuple[Mount, Mount], locked: Path, spoilt: Path) -> Iterator[subprocess.Popen[bytes]]:
    """It wants the lock on the second mount, once its record is damaged."""
    spoilt.write_bytes(b"damaged")
    waits = subprocess.Popen(["flock", two_mounts[1] / "d" / locked.name, "true"])
    yield waits
    waits.kill()
    waits.wait(COMMAND_SECONDS)


def test_a_damaged_record_is_shown_and_can_be_broken(
    two_mounts: tuple[Mount, Mount], locked: Path, waiter: subprocess.Popen[bytes]
) -> None:
    """With all other locks; and how long somebody has waited because of it."""
    one, two = two_mounts
    assert wait_until(lambda: problem_of(two) is not None)
    found = problem_of(two)
    assert found is not None and found["names"] == 1 and "'" in str(found["text"])
    assert problem_of(one) is None
    shown = states(two)
    assert shown["other.lock"] == "held" and "cannot be read" in shown[locked.name]
    done = safefs("locks", "--at", two.path, "--json")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "cannot be read" in done.stderr
    assert "safefs: the lock backend: " in done.stderr and " 1 name)" in done.stderr
    assert "the lock backend: " in safefs("status").stdout
    assert "lock_problem" in safefs("status", two.path).stdout
    done = safefs("locks", "break", two / "d" / locked.name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 broken\n", "")
    assert waiter.wait(COMMAND_SECONDS) == 0
    assert wait_until(lambda: problem_of(two) is None)
    assert "lock_problem" not in safefs("status", two.path).stdout
    assert safefs("locks", "--at", two.path).stderr == ""
    assert wait_until(lambda: breaks(two) == ["d/x.lock"])


def test_a_record_that_nobody_can_name(two_mounts: tuple[Mount, Mount], spoilt: Path) -> None:
    """It tells its name no more, and nobody waits for it on this node."""
    spoilt.write_bytes(b"damaged")
    assert states(two_mounts[1]) == {"other.lock": "held", spoilt.parent.name: "unknown: its record is damaged"}


def test_a_record_of_another_version_is_shown(two_mounts: tuple[Mount, Mount], spoilt: Path, locked: Path) -> None:
    whole = spoilt.read_text()
    spoilt.write_text(json.dumps({**json.loads(whole), "record": {"format": 99}}))
    shown = states(two_mounts[1])
    assert shown["other.lock"] == "held" and "another version of safefs" in shown[locked.name]
    done = safefs("locks", "break", two_mounts[1] / "d" / locked.name)
    assert "another version of safefs" in one_line(done)
    assert wait_until(lambda: problem_of(two_mounts[1]) is None)
    spoilt.write_text(whole)
    assert states(two_mounts[1]) == {"other.lock": "held", locked.name: "held"}


def test_locks_of_the_mount_that_is_meant(two_mounts: tuple[Mount, Mount], locked: Path) -> None:
    """Of several, that of the working directory; else --at says which."""
    assert "--at" in one_line(safefs("locks"))
    for done in (safefs("locks", cwd=locked.parent), safefs("locks", "--at", locked)):
        assert done.returncode == 0, done
        assert "d/x.lock" in done.stdout
    assert "--at PATH" in one_line(safefs("locks", locked))
    assert "no safefs mount there" in one_line(safefs("locks", "--at", "/"))


def test_options_reach_the_kernel(make_mount: MountFactory) -> None:
    mount = make_mount("-o", "noexec,noatime,fsname=the hub")
    with open("/proc/self/mountinfo") as lines:
        (fields,) = [line.split() for line in lines if line.split()[4] == str(mount.path)]
    assert {"nosuid", "nodev", "noexec", "noatime"} <= set(fields[5].split(","))
    separator = fields.index("-")
    assert fields[separator + 1 : separator + 3] == ["fuse.safefs", "the\\040hub"]


def test_a_read_only_mount(make_mount: MountFactory, backing: Path) -> None:
    (backing / "file").write_text("x")
    mount = make_mount("-o", "ro")
    assert (mount / "file").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (mount / "new").touch()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that `nobody` owns and can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="safefs-user-", dir="/tmp"))
    for name in ("backing", "mnt"):
        (path / name).mkdir()
    for directory in (path, *path.iterdir()):
        os.chown(directory, NOBODY, NOBODY)
    yield path
    subprocess.run(["umount", "-l", path / "mnt"], check=False, capture_output=True)
    shutil.rmtree(path)


def home_of_nobody(place: Path) -> list[str]:
    return as_nobody("env", "-u", "XDG_RUNTIME_DIR", f"HOME={place}", f"XDG_STATE_HOME={place}")


def test_a_user_mounts_for_himself(place: Path) -> None:
    prefix, python = home_of_nobody(place), user_python()
    done = safefs("mount", place / "backing", place / "mnt", prefix=prefix, python=python)
    assert (done.returncode, done.stderr) == (0, "")
    script = f"echo hello > {place}/mnt/file && cat {place}/mnt/file"
    written = subprocess.run([*prefix, "sh", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert written.stdout == "hello\n"
    assert safefs("status", place / "mnt", prefix=prefix, python=python).returncode == 0
    assert safefs("umount", place / "mnt", prefix=prefix, python=python).returncode == 0
    assert (place / "backing/file").stat().st_uid == NOBODY


def test_a_user_cannot_ask_roots_mount(mount: Mount, place: Path) -> None:
    done = safefs("status", prefix=home_of_nobody(place), python=user_python())
    assert done.returncode == 0 and "belongs to another user" in done.stdout


def test_mount_helper_of_fstab(backing: Path, tmp_path: Path) -> None:
    """What mount(8) runs as /sbin/mount.fuse.safefs."""
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    mountpoint.mkdir()
    helper = "from safefs.cli.main import mount_main; mount_main()"
    command = [*safefs_command()[:1], "-c", helper, backing, mountpoint, "-o", f"rw,_netdev,log_file={log}"]
    assert subprocess.run(command, timeout=COMMAND_SECONDS, check=False).returncode == 0
    assert find_mount(mountpoint)
    assert safefs("umount", mountpoint).returncode == 0


def test_a_start_that_fails_leaves_nothing(backing: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    (tmp_path / "state").write_text("not a directory")
    begin = time.monotonic()
    done = safefs("mount", backing, mountpoint, "--log-file", tmp_path / "log", "-o", f"state={tmp_path}/state")
    assert "state" in one_line(done)
    assert time.monotonic() - begin < 30
    assert find_mount(mountpoint) is None
