"""Real mounts for tests: the daemon runs as a child process through the command line that users type.

A `Mount` is a running `safefs mount --foreground`.  Two mounts of one backing directory stand for two nodes.
Leaving the context unmounts, waits for the daemon and fails when it did not end by itself or logged an exception.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 30
STOP_SECONDS = 30


def let_everybody_through(path: Path) -> None:
    """To a directory of pytest's: it makes those above for their owner alone, one more of them with several workers."""
    for above in path.parents:
        mode = above.stat().st_mode
        if not mode & 0o001:
            above.chmod(mode | 0o111)


def safefs_command(*arguments: str | os.PathLike[str], python: str = sys.executable) -> list[str]:
    """The argv of a safefs command, run by this test's own interpreter or another one."""
    return [python, "-m", "safefs", *(os.fspath(argument) for argument in arguments)]


def safefs(
    *arguments: str | os.PathLike[str], seconds: float = 60.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A safefs command, run to its end; `environment` is added to the one here."""
    return subprocess.run(
        safefs_command(*arguments),
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@dataclass
class Mount:
    """A live mount: `path` is where clients look, `backing` the bare directory below it."""

    backing: Path
    path: Path
    process: subprocess.Popen[bytes]
    log: Path
    expected_log: list[str] = field(default_factory=list)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def expect_log(self, fragment: str) -> None:
        """Allow log lines of level ERROR that contain `fragment`."""
        self.expected_log.append(fragment)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def unexpected_log(self) -> list[str]:
        """Lines of level ERROR or worse, and tracebacks, that no test announced."""
        return [
            line
            for line in self.log_text().splitlines()
            if (" ERROR " in line or " CRITICAL " in line or "Traceback (most recent call last)" in line)
            and not any(fragment in line for fragment in self.expected_log)
        ]

    def is_mounted(self) -> bool:
        target = os.fsencode(self.path)
        with open("/proc/self/mountinfo", "rb") as mounts:
            return any(line.split(b" ")[4] == target for line in mounts)

    def umount(self) -> None:
        """Plain umount(8), as an administrator does it."""
        subprocess.run(["umount", self.path], check=True, timeout=STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL the daemon, and take the dead mount away."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        subprocess.run(["umount", "-l", self.path], check=False, timeout=STOP_SECONDS)

    def stop(self) -> None:
        """Unmount and wait for the daemon, which SIGTERM ends where the mount is busy; AssertionError if it hangs."""
        if self.process.poll() is None and self.is_mounted():
            subprocess.run(["umount", self.path], check=False, timeout=STOP_SECONDS, capture_output=True)
        if is_busy := self.is_mounted():
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            abort_connection(self.path)
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            after = "SIGTERM" if is_busy else "umount, which leaves it where another mount namespace has the mount"
            raise AssertionError(f"{self.path}: did not end after {after}; its log:\n{self.log_text()}") from None
        finally:
            if self.is_mounted():
                subprocess.run(["umount", "-l", self.path], check=False, timeout=STOP_SECONDS)


def abort_connection(path: Path) -> None:
    """Free every client of a hung FUSE mount (kernel: Documentation/filesystems/fuse/fuse.rst, "abort")."""
    target = os.fsencode(path)
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = line.split(b" ")
            if fields[4] == target:
                minor = fields[2].split(b":")[1].decode()
                Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1")


def start_mount(
    backing: Path,
    path: Path,
    *arguments: str,
    log: Path | None = None,
    environment: dict[str, str] | None = None,
    prefix: list[str] | None = None,
    python: str = sys.executable,
) -> Mount:
    """Start a daemon in the foreground and return once its mount is live."""
    backing.mkdir(parents=True, exist_ok=True)
    path.mkdir(parents=True, exist_ok=True)
    log = log or path.with_name(path.name + ".log")
    everywhere = os.environ.get("SAFEFS_TEST_OPTIONS")  # for every mount, e.g. hot=off,passthrough=off
    arguments = (*(["-o", everywhere] if everywhere else []), *arguments)
    ready_read, ready_write = os.pipe()
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [
                *(prefix or []),
                *safefs_command("mount", backing, path, "--foreground", python=python),
                *("--ready-fd", str(ready_write)),
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[ready_write],
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    os.close(ready_write)
    try:
        ready, _, _ = select.select([ready_read], [], [], START_SECONDS)
        answer = os.read(ready_read, 4096) if ready else b""
    finally:
        os.close(ready_read)
    if not answer.startswith(b"ready"):
        process.kill()
        process.wait()
        raise AssertionError(f"safefs mount failed: {answer!r}\n{log.read_text(errors='replace')}")
    return Mount(backing, path, process, log)


@contextmanager
def mounted(backing: Path, path: Path, *arguments: str, **options: object) -> Iterator[Mount]:
    """A mount for the length of a with block; checks the daemon's log at the end."""
    mount = start_mount(backing, path, *arguments, **options)  # type: ignore[arg-type]
    try:
        yield mount
    finally:
        mount.stop()
    assert not mount.unexpected_log(), f"the daemon logged errors:\n{mount.log_text()}"


def status(mount: Mount) -> dict[str, Any]:
    """What `safefs status` says of a mount."""
    return status_at(mount.path)


def status_at(path: Path) -> dict[str, Any]:
    """What `safefs status` says of what is mounted at a path."""
    done = subprocess.run(safefs_command("status", "--json", path), check=True, capture_output=True, timeout=30)
    found = json.loads(done.stdout)
    return dict(found[0] if isinstance(found, list) else found)


def wait_until(condition: object, seconds: float = 10.0) -> bool:
    """Poll a callable until it is true; False when the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.005)
    return False
