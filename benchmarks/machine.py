"""The machine: what a result holds for, and the switch that empties the kernel's caches."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from benchmarks.systems import System
from safefs.cli.main import versions

COMMAND_SECONDS = 10
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PACKAGES = ("trio", "safetensors", "numpy", "filelock")


def drop_caches() -> None:
    """Everything out of the kernel's caches: pages, names and inodes.  What is dirty is written first."""
    os.sync()
    DROP_CACHES.write_text("3")


def drop_pages(path: Path) -> None:
    """The pages that one filesystem has of a file out of the kernel's cache; those of other mounts stay."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def forget_inodes() -> None:
    """Names and inodes out of the kernel's caches; FUSE daemons are told (FORGET)."""
    DROP_CACHES.write_text("2")


def describe(work: Path, systems: Iterable[System]) -> dict[str, str]:
    """The machine and the versions of what is measured on it, in words."""
    facts = {
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "processor": f"{_field('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.1f} GiB",
        "filesystem": _filesystem(work),
        "load at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        # safefs, pyfuse3, libfuse and the kernel.
        **dict(line.split(" ", 1) for line in versions().splitlines()),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--tags"),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }
    return {**facts, **{system.name: system.version_text() for system in systems if system.version}}


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _filesystem(path: Path) -> str:
    return _output("findmnt", "--noheadings", "--output", "FSTYPE,OPTIONS", "--target", str(path))


def _output(*command: str) -> str:
    """What a command prints, as one line; "unknown" where it cannot tell."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except FileNotFoundError:
        return "unknown"
    return " ".join(done.stdout.split()) or "unknown"
