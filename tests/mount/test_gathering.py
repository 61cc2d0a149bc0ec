"""Small writes that the daemon gathers before the backing gets them (without kernel passthrough): nobody can tell."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor
from tests.mount.places import content, in_quarantine
from tests.support.mounting import Mount, wait_until

SMALL = b"0123456789abcdef" * 64


@pytest.fixture
def mount(make_mount: MountFactory) -> Mount:
    return make_mount("-o", "passthrough=off,temp=hidden")


def drafts(mount: Mount) -> list[Path]:
    return [path for path in mount.backing.iterdir() if path.name.startswith(".safefs") and path.is_file()]


def open_draft(mount: Mount, writer: Actor, count: int = 3) -> int:
    fd = writer.open(mount / "file", os.O_CREAT | os.O_RDWR)
    for _ in range(count):
        writer.write(fd, SMALL)
    return fd


def test_small_writes_come_to_the_backing_together(mount: Mount, writer: Actor) -> None:
    open_draft(mount, writer)
    assert [path.stat().st_size for path in drafts(mount)] == [0]


def test_and_soon_in_any_case(mount: Mount, writer: Actor) -> None:
    open_draft(mount, writer)
    assert wait_until(lambda: [path.read_bytes() for path in drafts(mount)] == [SMALL * 3])


LOOKS: dict[str, tuple[str, object]] = {
    "fstat": ("os.fstat(fd).st_size", len(SMALL) * 3),
    "stat": ("os.stat(p).st_size", len(SMALL) * 3),
    "read": ("os.pread(fd, 1 << 20, 0)", SMALL * 3),
    "seek-end": ("os.lseek(fd, 0, os.SEEK_END)", len(SMALL) * 3),
    "seek-hole": ("os.lseek(fd, 0, os.SEEK_HOLE)", len(SMALL) * 3),
    "other-handle": ("open(p, 'rb').read()", SMALL * 3),
    "map": ("mmap.mmap(fd, 0)[:]", SMALL * 3),
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_writer_sees_what_it_wrote(look: str, mount: Mount, writer: Actor) -> None:
    fd = open_draft(mount, writer)
    code, expected = LOOKS[look]
    assert writer(code, fd=fd, p=str(mount / "file")) == expected


CHANGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "truncate": ("os.ftruncate(fd, 100)", lambda data: data[:100]),
    "extend": ("os.ftruncate(fd, 5000)", lambda data: data.ljust(5000, b"\0")),
    "overwrite": ("os.pwrite(fd, b'XX', 10)", lambda data: data[:10] + b"XX" + data[12:]),
    "beyond": ("os.pwrite(fd, b'XX', 9000)", lambda data: data.ljust(9000, b"\0") + b"XX"),
    "allocate": ("os.posix_fallocate(fd, 0, 8192)", lambda data: data.ljust(8192, b"\0")),
    "large": ("os.pwrite(fd, bytes(1 << 17), 1)", lambda data: data[:1] + bytes(1 << 17)),
    "sync": ("os.fsync(fd)", lambda data: data),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_come_in_order(change: str, mount: Mount, writer: Actor) -> None:
    fd = open_draft(mount, writer)
    code, after = CHANGES[change]
    writer(code, fd=fd)
    writer("os.lseek(fd, 0, os.SEEK_END)", fd=fd)
    writer.write(fd, b"end")
    writer.closefd(fd)
    assert content(mount.backing / "file") == after(SMALL * 3) + b"end"


def test_times_that_were_set_stay(mount: Mount, writer: Actor) -> None:
    fd = open_draft(mount, writer)
    writer("os.utime(fd, ns=(1_000_000_001, 2_000_000_002))", fd=fd)
    writer.closefd(fd)
    assert (mount.backing / "file").stat().st_mtime_ns == 2_000_000_002


def test_random_writes(mount: Mount, writer: Actor) -> None:
    """Against a copy in memory, read back now and then by the writer and at the end by all."""
    chance, model = random.Random(7), bytearray()
    fd = writer.open(mount / "file", os.O_CREAT | os.O_RDWR)
    for number in range(300):
        offset = chance.choice([len(model), chance.randrange(len(model) + 1), len(model) + chance.randrange(9000)])
        data = bytes([number % 251 + 1]) * chance.choice([1, 100, 4096, 40_000, 70_000])
        model[len(model) : offset] = bytes(max(0, offset - len(model)))
        model[offset : offset + len(data)] = data
        writer("os.pwrite(fd, data, offset)", fd=fd, data=data, offset=offset)
        if number % 40 == 0:
            assert writer("os.pread(fd, 1 << 26, 0)", fd=fd) == model
    writer.closefd(fd)
    assert content(mount.backing / "file") == content(mount / "file") == model


def test_what_a_killed_writer_wrote_is_kept(mount: Mount, writer: Actor) -> None:
    open_draft(mount, writer)
    os.kill(writer("os.getpid()"), signal.SIGKILL)
    assert in_quarantine(mount.backing, lambda data: data == SMALL * 3)
    assert not (mount.backing / "file").exists()
