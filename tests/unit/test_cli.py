"""The command line without a mount: every failure is one line and a non-zero exit, and the start is reported once."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from safefs import control
from safefs.cli import checks, logs, mounting, status, unmounting
from safefs.cli import rules as rules_command
from safefs.cli.main import cli, mount_helper
from safefs.cli.mounting import MountRequest, mount_background, mount_foreground
from safefs.config import Settings, load_settings
from safefs.control import LiveMount
from safefs.errors import SafefsError

LIVE = LiveMount(Path("/nowhere/mnt"), "/nowhere/backing", device=0, mount_id=0, user_id=0)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [os.fspath(argument) for argument in arguments])


def failure(*arguments: str | Path) -> str:
    """The one line that a failing command prints."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("safefs: ") and result.output.count("\n") == 1, result.output
    return result.output


class TestMountRefuses:
    def test_a_missing_backing_directory(self, mountpoint: Path) -> None:
        message = failure("mount", "/no/such/directory", mountpoint)
        assert "/no/such/directory: the backing directory does not exist" in message and "mkdir" in message

    def test_a_backing_file(self, tmp_path: Path, mountpoint: Path) -> None:
        (tmp_path / "file").touch()
        assert "the backing directory is not a directory" in failure("mount", tmp_path / "file", mountpoint)

    def test_a_missing_mountpoint(self, backing: Path, tmp_path: Path) -> None:
        assert "the mountpoint does not exist" in failure("mount", backing, tmp_path / "missing")

    def test_a_mountpoint_that_is_not_empty(self, backing: Path, mountpoint: Path) -> None:
        (mountpoint / "file").touch()
        message = failure("mount", backing, mountpoint)
        assert "not empty" in message and "-o nonempty" in message

    def test_a_mountpoint_inside_the_backing_directory(self, backing: Path) -> None:
        (backing / "a" / "b").mkdir(parents=True)
        assert "is inside the backing directory" in failure("mount", backing, backing / "a" / "b")

    def test_a_mountpoint_over_the_backing_directory(self, backing: Path) -> None:
        assert "would cover the backing" in failure("mount", backing, backing.parent, "-o", "nonempty")

    def test_the_backing_directory_as_mountpoint(self, backing: Path) -> None:
        (backing.parent / "alias").symlink_to(backing)
        assert "is the backing directory itself" in failure("mount", backing, backing.parent / "alias")

    def test_what_is_mounted_already(self, backing: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "find_mount", lambda path: LIVE if path == mountpoint else None)
        message = failure("mount", backing, mountpoint)
        assert "already mounted" in message and f"safefs umount {mountpoint}" in message

    def test_a_backing_directory_on_a_mount(
        self, backing: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stacked = replace(LIVE, device=backing.stat().st_dev)
        monkeypatch.setattr(checks, "find_mounts", lambda: [stacked])
        assert "is itself on a safefs mount" in failure("mount", backing, mountpoint)

    def test_a_machine_without_the_device(
        self, backing: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exists = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda path: path != "/dev/fuse" and exists(path))
        assert "modprobe fuse" in failure("mount", backing, mountpoint)

    def test_an_unknown_option(self, backing: Path, mountpoint: Path) -> None:
        assert "unknown option 'noatim'" in failure("mount", backing, mountpoint, "-o", "ro,noatim")

    def test_a_missing_configuration(self, backing: Path, mountpoint: Path) -> None:
        assert "no such configuration" in failure("mount", backing, mountpoint, "--config", "/no/such.toml")

    def test_a_missing_configuration_named_as_an_option(self, backing: Path, mountpoint: Path) -> None:
        assert "no such configuration" in failure("mount", backing, mountpoint, "-o", "config=/no/such.toml")

    def test_missing_arguments(self) -> None:
        assert run("mount").exit_code == 2


class TestUsersMount:
    """What fusermount3 would refuse is said beforehand."""

    @pytest.fixture
    def settings(self, backing: Path, mountpoint: Path) -> Settings:
        return load_settings(backing, mountpoint, privileged=False)

    def test_nothing_in_the_way(self, settings: Settings) -> None:
        checks.check_mount(settings, allow_nonempty=False)

    def test_allow_other_without_roots_consent(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "_user_allow_other", lambda: False)
        with pytest.raises(SafefsError, match=r"user_allow_other in /etc/fuse\.conf"):
            checks.check_mount(replace(settings, allow_other=True), allow_nonempty=False)

    def test_a_mountpoint_of_somebody_else(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        deny_writing(monkeypatch, settings.mountpoint)
        with pytest.raises(SafefsError, match="that they can write"):
            checks.check_mount(settings, allow_nonempty=False)

    def test_a_backing_directory_without_room_for_state(
        self, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deny_writing(monkeypatch, settings.backing)
        with pytest.raises(SafefsError, match="-o state=DIR"):
            checks.check_mount(settings, allow_nonempty=False)
        checks.check_mount(replace(settings, state=tmp_path / "state"), allow_nonempty=False)

    def test_no_fusermount(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(SafefsError, match="install the package fuse3"):
            checks.check_mount(settings, allow_nonempty=False)


def deny_writing(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """The tests run as root, who may write everywhere."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == place and mode & os.W_OK))


class TestForeground:
    """`mount_foreground` with a daemon that is not one."""

    @pytest.fixture(autouse=True)
    def restored(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.chdir("/")
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        yield
        root.handlers[:] = handlers
        root.setLevel(level)

    @pytest.fixture
    def start(self, backing: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
        """Runs the command with this daemon; returns what it reported."""

        def start(daemon: Callable[[Settings, Callable[[], None]], None], *options: str) -> bytes:
            fake = ModuleType("safefs.daemon")
            fake.run = daemon  # type: ignore[attr-defined]
            native = ModuleType("safefs.fuse")
            native.native_check = lambda: None  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "safefs.daemon", fake)
            monkeypatch.setattr("safefs.daemon", fake, raising=False)
            monkeypatch.setitem(sys.modules, "safefs.fuse", native)
            reader, writer = os.pipe()
            try:
                mount_foreground(MountRequest(backing, mountpoint, options), writer)
            finally:
                self.reported = os.read(reader, 1000)
                os.close(reader)
            return self.reported

        return start

    def test_ready_is_reported_once(self, start: Callable[..., bytes]) -> None:
        def daemon(settings: Settings, ready: Callable[[], None]) -> None:
            assert settings.drain_seconds == 3
            assert os.getcwd() == "/"
            ready()

        assert start(daemon, "drain_seconds=3") == b"ready\n"

    def test_a_failure_is_reported_in_one_line(self, start: Callable[..., bytes]) -> None:
        def daemon(settings: Settings, ready: Callable[[], None]) -> None:
            raise SafefsError("the kernel\nsaid no")

        with pytest.raises(SafefsError):
            start(daemon)
        assert self.reported == b"error: the kernel said no\n"

    def test_a_bug_is_reported_too(self, start: Callable[..., bytes]) -> None:
        def daemon(settings: Settings, ready: Callable[[], None]) -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            start(daemon)
        assert self.reported == b"error: the daemon failed: KeyError: 'x'\n"

    def test_a_failure_after_ready_is_not_reported(self, start: Callable[..., bytes]) -> None:
        def daemon(settings: Settings, ready: Callable[[], None]) -> None:
            ready()
            raise SafefsError("later")

        with pytest.raises(SafefsError, match="later"):
            start(daemon)
        assert self.reported == b"ready\n"

    def test_the_log_has_level_and_logger(self, start: Callable[..., bytes], tmp_path: Path) -> None:
        def daemon(settings: Settings, ready: Callable[[], None]) -> None:
            ready()
            logging.getLogger("safefs.test").error("it broke")

        log = tmp_path / "log"
        start(daemon, f"log_file={log}")
        assert " ERROR safefs.test: it broke\n" in log.read_text()


class TestBackground:
    """`mount_background` with a child that is not a daemon."""

    @pytest.fixture
    def start(
        self, backing: Path, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., None]:
        def start(script: str) -> None:
            def spawn(_request: MountRequest, _log: Path, ready_fd: int) -> subprocess.Popen[bytes]:
                self.child = subprocess.Popen(["bash", "-c", script.format(fd=ready_fd)], pass_fds=[ready_fd])
                return self.child

            monkeypatch.setattr(mounting, "_spawn", spawn)
            mount_background(MountRequest(backing, mountpoint, log_file=tmp_path / "log"))

        return start

    def test_returns_at_ready_and_leaves_the_daemon(self, start: Callable[..., None]) -> None:
        start("echo ready >&{fd}; exec sleep 60")
        assert self.child.poll() is None
        self.child.kill()
        self.child.wait()

    def test_repeats_the_daemons_error(self, start: Callable[..., None]) -> None:
        with pytest.raises(SafefsError, match=r"^no luck today$"):
            start("echo 'error: no luck today' >&{fd}")
        assert self.child.returncode is not None

    def test_names_the_log_of_a_daemon_that_died(self, start: Callable[..., None], tmp_path: Path) -> None:
        with pytest.raises(SafefsError, match=f"exit code 3.*{tmp_path}/log"):
            start("exit 3")

    def test_ends_a_daemon_that_does_not_get_ready(
        self, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mounting, "START_SECONDS", 0.1)
        with pytest.raises(SafefsError, match="not live within"):
            start("exec sleep 60")
        assert self.child.returncode is not None


def test_the_daemons_command_line_works_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = MountRequest(Path("b"), Path("m"), ("ro", "fsname=x"), Path("c.toml"))
    expected = [f"{tmp_path}/b", f"{tmp_path}/m", "-o", "ro", "-o", "fsname=x", "--config", f"{tmp_path}/c.toml"]
    assert request.arguments() == expected


def test_log_files_of_root_are_named_after_the_mountpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_log_directory", lambda: tmp_path / "log")
    assert logs.default_log_file(Path("/mnt/hf hub")) == tmp_path / "log" / "mnt-hf-hub.log"
    assert (tmp_path / "log").is_dir()


def test_journal_lines_carry_priorities() -> None:
    formatter = logs._JournalFormatter("%(message)s")
    record = logging.LogRecord("x", logging.ERROR, "", 0, "one\ntwo", (), None)
    assert formatter.format(record) == "<3>one\n<3>two"


class TestUmount:
    def test_what_is_no_mount(self, tmp_path: Path) -> None:
        assert "no safefs mount here" in failure("umount", tmp_path)

    def test_names_who_holds_a_busy_mount(self, tmp_path: Path) -> None:
        with open(tmp_path / "file", "w") as held:
            info = Path(f"/proc/self/fdinfo/{held.fileno()}").read_text()
            mount_id = int(info.partition("mnt_id:\t")[2].split()[0])
            holders = unmounting.find_holders(replace(LIVE, mount_id=mount_id))
        assert os.getpid() in [pid for pid, _ in holders]

    def test_names_who_works_in_a_busy_mount(self, tmp_path: Path) -> None:
        with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as sleeper:
            text = unmounting._busy_text(replace(LIVE, mountpoint=tmp_path.parent))
            sleeper.kill()
        assert f"sleep (pid {sleeper.pid})" in text

    def test_a_look_that_blocks_is_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forever = threading.Event()
        monkeypatch.setattr(unmounting, "SCAN_SECONDS", 0.05)
        monkeypatch.setattr(unmounting, "_holds", lambda pid, mount: forever.wait())
        assert unmounting.find_holders(LIVE) == []
        forever.set()


class TestStatus:
    def test_no_mounts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(status, "find_mounts", list)
        assert run("status").output == "no safefs mounts\n"
        assert json.loads(run("status", "--json").output) == []

    def test_what_is_no_mount(self, tmp_path: Path) -> None:
        assert "no safefs mount here" in failure("status", tmp_path)

    def test_live_mounts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(status, "find_mounts", lambda: [LIVE])
        monkeypatch.setattr(status, "request", lambda path, message: {"pid": 42, "drafts": 3})
        assert "/nowhere/backing" in run("status").output
        report = {"mountpoint": "/nowhere/mnt", "source": "/nowhere/backing", "live": True, "pid": 42, "drafts": 3}
        assert json.loads(run("status", "--json").output) == [report]

    def test_a_mount_whose_daemon_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(status, "find_mounts", lambda: [LIVE])
        monkeypatch.setattr(status, "find_mount", lambda path: LIVE)
        assert run("status").exit_code == 0
        assert "no daemon listens" in run("status").output
        one = run("status", "/nowhere/mnt", "--json")
        assert one.exit_code == 1
        assert json.loads(one.stdout)["live"] is False


class TestRules:
    def test_a_shipped_rule(self) -> None:
        assert run("rules", "/x/y.lock").output.startswith("x/y.lock: lock (shipped rules.toml:")

    def test_the_default(self) -> None:
        assert run("rules", "a/model.bin").output == "a/model.bin: private (default): no rule matches the name\n"

    def test_a_configuration(self, tmp_path: Path) -> None:
        config = tmp_path / "c.toml"
        text = (
            '[[rule]]\nclass = "shared"\nmatch = "a/*.bin"\nreason = "why not"\ncontent = "zip"\nverify = "storage"\n'
        )
        config.write_text(text)
        answer = json.loads(run("rules", "a/x.bin", "--config", config, "--json").output)
        found = {"class": "shared", "glob": "a/*.bin", "source": f"{config}:1", "reason": "why not"}
        assert answer == {**found, "verify": "storage", "content": "zip", "retain": "default", "stale": "signalled"}
        shown = run("rules", "a/x.bin", "--config", config).output
        assert "; when it is published: verify storage, content zip" in shown

    def test_names_that_are_not_utf8(self) -> None:
        assert run("rules", os.fsdecode(b"\xff.part")).output.startswith("\\xff.part: partial")

    def test_a_live_mount_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def request(_path: Path, message: dict[str, str]) -> dict[str, str]:
            asked.append(message)
            return {"class": "lock", "glob": "g", "source": "s", "reason": "r"}

        monkeypatch.setattr(control, "find_mounts", lambda: [LIVE])
        monkeypatch.setattr(rules_command, "request", request)
        assert run("rules", "/nowhere/mnt/a/b").output == "a/b: lock (s, glob g): r\n"
        assert asked == [{"op": "rules", "path": "a/b"}]

    def test_a_silent_mount_is_no_hindrance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(control, "find_mounts", lambda: [LIVE])
        result = run("rules", "/nowhere/mnt/a/b.lock")
        assert result.stdout.startswith("a/b.lock: lock (shipped rules.toml:")
        assert "no daemon listens" in result.stderr


def test_version() -> None:
    lines = run("--version").output.splitlines()
    assert [line.split()[0] for line in lines] == ["safefs", "pyfuse3", "libfuse", "kernel"]


def test_the_program_fails_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "safefs", "umount", os.fspath(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"safefs: {tmp_path}: no safefs mount here\n"


def test_mount_helper_takes_what_mount_passes(backing: Path, mountpoint: Path) -> None:
    flags = ["-f", "-n", "-s", "-v", "-t", "fuse.safefs", "-o", "rw,_netdev"]
    assert CliRunner().invoke(mount_helper, [os.fspath(backing), os.fspath(mountpoint), *flags]).exit_code == 0
