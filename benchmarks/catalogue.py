"""The systems that are compared, as they come: the options that they need, and no tuning."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchError, SystemFailedError
from benchmarks.servers import redis_url, start_redis
from benchmarks.systems import COMMAND_SECONDS, Command, Place, Profile, Request, System, find_program
from safefs.cli.status import describe
from safefs.control import find_mount


def _options(*words: str) -> list[str]:
    texts = [word for word in words if word]
    return ["-o", ",".join(texts)] if texts else []


def _validity(request: Request, entry: str, attr: str) -> list[str]:
    """The two options for names and attributes; none by default."""
    if request.profile is Profile.DEFAULT:
        return []
    return [f"{entry}={request.profile.seconds}", f"{attr}={request.profile.seconds}"]


def mount_safefs(option: str) -> Command:
    """How safefs is mounted with an option more than its defaults."""

    def command(request: Request) -> list[str | Path]:
        options = _options(option, *_validity(request, "entry_timeout", "attr_timeout"))
        # The machine's own configuration is not what is measured.
        program = [sys.executable, "-m", "safefs", "mount", "--foreground", "--config", "/dev/null"]
        return [*program, *options, request.backing, request.mountpoint]

    return command


def _bindfs(request: Request) -> list[str | Path]:
    options = _options(*_validity(request, "entry_timeout", "attr_timeout"))
    return ["bindfs", "-f", *options, request.backing, request.mountpoint]


def _mergerfs(request: Request) -> list[str | Path]:
    options = _options(*_validity(request, "cache.entry", "cache.attr"))
    return ["mergerfs", "-f", *options, request.backing, request.mountpoint]


def _fuse_overlayfs(request: Request) -> list[str | Path]:
    timeout = "" if request.profile is Profile.DEFAULT else f"timeout={request.profile.seconds}"
    layers = (f"lowerdir={request.backing}", f"upperdir={request.own('upper')}", f"workdir={request.own('work')}")
    return ["fuse-overlayfs", "-f", *_options(*layers, timeout), request.mountpoint]


def _rclone(request: Request) -> list[str | Path]:
    # Without a cache of writes rclone refuses most of them.
    command = ["rclone", "mount", "--config", "/dev/null", "--vfs-cache-mode", "writes"]
    command += ["--cache-dir", request.own("cache")]
    if request.profile is not Profile.DEFAULT:
        command += ["--attr-timeout", f"{request.profile.seconds}s"]
    return [*command, request.backing, request.mountpoint]


def _juicefs(request: Request) -> list[str | Path]:
    command = [find_program("juicefs") or "juicefs", "mount", "--no-usage-report", "--no-syslog", "--backup-meta", "0"]
    command += ["--metrics", "127.0.0.1:0", "--cache-dir", request.own("cache")]
    if request.profile is not Profile.DEFAULT:
        for cache in ("--attr-cache", "--entry-cache", "--dir-entry-cache"):
            command += [cache, f"{request.profile.seconds}s"]
    return [*command, redis_url(request.place), request.mountpoint]


def _format_juicefs(place: Place) -> None:
    """An empty JuiceFS volume on a redis of the run."""
    start_redis(place)
    bucket = place.directory("juicefs")
    volume = ["format", "--storage", "file", "--bucket", f"{bucket}/", "--trash-days", "0", redis_url(place), "bench"]
    done = subprocess.run(
        [find_program("juicefs") or "juicefs", *volume],
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS,
    )
    if done.returncode:
        raise SystemFailedError(f"juicefs format failed: {done.stderr.strip().splitlines()[-1]}")


def _safefs_state(mountpoint: Path) -> str:
    """Which of its two data paths, and which of its two ways to answer requests, a mount has."""
    mount = find_mount(mountpoint)
    status = describe(mount) if mount else {}
    requests = "in C" if status.get("hot") else "by the interpreter"
    return f"data path: {status.get('data_path', 'daemon')}; requests are answered {requests}"


def _safefs_system(name: str, title: str, option: str = "", *, once: bool = False) -> System:
    command = mount_safefs(option)
    return System(name, title, command, safefs_option=option, publishes=True, once=once, state=_safefs_state)


SYSTEMS = (
    System("native", "the bare directory"),
    _safefs_system("safefs", "safefs"),
    _safefs_system("safefs-fallback", "safefs -o passthrough=off", "passthrough=off"),
    _safefs_system("safefs-python", "safefs -o hot=off", "hot=off", once=True),
    System("bindfs", "bindfs", _bindfs, ("bindfs",), ("bindfs", "--version")),
    System("mergerfs", "mergerfs", _mergerfs, ("mergerfs",), ("mergerfs", "--version")),
    System(
        "fuse-overlayfs",
        "fuse-overlayfs",
        _fuse_overlayfs,
        ("fuse-overlayfs",),
        ("fuse-overlayfs", "--version"),
        once=True,
    ),
    System("rclone", "rclone mount --vfs-cache-mode writes", _rclone, ("rclone",), ("rclone", "version"), once=True),
    System(
        "juicefs",
        "JuiceFS on redis and a local bucket",
        _juicefs,
        ("juicefs", "redis-server"),
        ("juicefs", "version"),
        shares=False,
        once=True,
        prepare=_format_juicefs,
        helper="redis",
    ),
)


def select_systems(names: Sequence[str]) -> list[System]:
    """The systems of these names, in the order of the table; all without names.  Native is always among them."""
    known = {system.name: system for system in SYSTEMS}
    for name in names:
        if name not in known:
            raise BenchError(f"no system {name!r}; there are: {', '.join(known)}")
    return [system for system in SYSTEMS if not names or system.name in names or system.command is None]
