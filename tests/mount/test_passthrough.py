"""File data by the kernel itself: that it is, that it changes nothing of the promises, and what happens without it."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, quarantined
from tests.support.mounting import Mount, safefs_command, status, wait_until

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
BIG = 32 << 20


def io_counts(mount: Mount) -> dict[str, int]:
    """What the daemon has read and written so far, requests included (proc(5), /proc/PID/io)."""
    lines = Path(f"/proc/{mount.process.pid}/io").read_text().splitlines()
    return {name: int(number) for name, number in (line.split(": ") for line in lines)}


def bytes_moved(mount: Mount) -> int:
    counts = io_counts(mount)
    return counts["rchar"] + counts["wchar"]


def write_and_read(mount: Mount) -> int:
    """What the daemon moves for one new file, written and read back."""
    before = bytes_moved(mount)
    with open(mount / "big", "wb") as file:
        file.writelines(b"x" * (1 << 20) for _ in range(BIG >> 20))
    os.posix_fadvise(descriptor := os.open(mount / "big", os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, BIG, 0) == b"x" * BIG
    os.close(descriptor)
    return bytes_moved(mount) - before


def test_data_does_not_pass_the_daemon(make_mount: MountFactory) -> None:
    """But for reading it back at close, which is switched off here."""
    mount = make_mount("-o", "passthrough=on,verify=off")
    assert status(mount)["data_path"] == "kernel passthrough"
    assert write_and_read(mount) < BIG / 8


def test_control_without_passthrough_it_does(make_mount: MountFactory) -> None:
    mount = make_mount("-o", "passthrough=off,verify=off")
    assert status(mount)["data_path"] == "daemon: switched off (-o passthrough=off)"
    assert write_and_read(mount) >= BIG


def test_a_mapping_is_read_ahead_in_large_requests(make_mount: MountFactory) -> None:
    """Where the daemon carries the data, a request brings a mebibyte, not the 128 KiB that FUSE starts with."""
    mount = make_mount("-o", "passthrough=off")
    (mount.backing / "big").write_bytes(bytes(BIG))
    before = io_counts(mount)["syscr"]
    with open(mount / "big", "rb") as file, mmap.mmap(file.fileno(), BIG, prot=mmap.PROT_READ) as mapped:
        assert mapped.find(b"x") == -1
    # A request takes the daemon two to three calls: one for itself, one for the bytes, one that finds no other.
    assert io_counts(mount)["syscr"] - before < BIG >> 17


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A backing directory that is itself a stacked filesystem."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "merged"], check=True)
    yield tmp_path / "merged"
    subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_a_backing_that_cannot_be_passed_through(overlay: Path, tmp_path: Path, make_mount: MountFactory) -> None:
    """The mount works on the other path and says why; who insists is told in one line."""
    mount = make_mount("-o", "passthrough=auto", backing=overlay)
    assert "stacked" in str(status(mount)["data_path"])
    (mount / "file").write_bytes(A)
    assert content(overlay / "file") == A
    (tmp_path / "other").mkdir()
    command = safefs_command("mount", overlay, tmp_path / "other", "-o", "passthrough=on")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "stacked" in done.stderr
    mount.umount()
    assert mount.process.wait(30) == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A backing filesystem of 4 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("passthrough", ["on", "off"])
def test_a_full_filesystem(passthrough: str, small: Path, make_mount: MountFactory, writer: Actor) -> None:
    """A write that failed for want of space, seen by the daemon or not: close() says so, the name stays as it was."""
    mount = make_mount("-o", f"passthrough={passthrough}", backing=small)
    mount.expect_log("not published and not kept")
    (mount / "file").write_bytes(A)
    fd = writer.open(mount / "file", CREATE)
    assert writer.errno("while True: os.write(fd, bytes(1 << 16))", fd=fd) == errno.ENOSPC
    assert writer.errno("os.close(fd)", fd=fd) == errno.ENOSPC
    assert content(mount / "file") == content(small / "file") == A
    mount.umount()
    assert mount.process.wait(30) == 0


def test_checking_for_space_leaves_the_file_alone(mount: Mount, writer: Actor) -> None:
    fd = writer.open(mount / "file", CREATE)
    writer.write(fd, A)
    writer("os.utime(fd, ns=(1_000_000_001, 2_000_000_002))", fd=fd)
    writer.closefd(fd)
    found = os.stat(mount / "file")
    assert (found.st_mtime_ns, found.st_size) == (2_000_000_002, len(A))
    assert os.stat(mount.backing / "file").st_blocks * 512 < len(A) + 8192


def test_writes_after_the_rename_are_private(two_mounts: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """tempfile + os.replace while the file is open: readers of what the rename published see no later write, until the
    close publishes that in its turn."""
    first, second = two_mounts
    fd = writer.open(first / "temp", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    writer.write(fd, A)
    writer("os.replace(p, q)", p=str(first / "temp"), q=str(first / "file"))
    stranger("held = os.open(p, os.O_RDONLY)", p=str(second / "file"))
    writer.write(fd, B)
    for place in (first, second, first.backing):
        assert content(place / "file") == A
    assert writer("os.fstat(fd).st_size", fd=fd) == len(A + B)
    writer.closefd(fd)
    for place in (first, second, first.backing):
        assert content(place / "file") == A + B
    assert stranger("os.pread(held, 1 << 20, 0)") == A
    assert not list(quarantined(first.backing))


def test_a_rename_and_nothing_more_publishes_once(mount: Mount, writer: Actor) -> None:
    """The close after such a rename finds nothing new and leaves the version as it is."""
    fd = writer.open(mount / "temp", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    writer.write(fd, A)
    writer("os.replace(p, q)", p=str(mount / "temp"), q=str(mount / "file"))
    before = os.stat(mount / "file").st_ino
    writer.closefd(fd)
    assert os.stat(mount / "file").st_ino == before and content(mount / "file") == A
    assert wait_until(lambda: status(mount)["drafts"] == 0)
    assert status(mount)["counters"] == {"published": 1}


def test_nothing_is_copied_before_the_first_write(mount: Mount, writer: Actor) -> None:
    """A big file opened for update and not written costs no copy, though its draft will pass through later."""
    (mount / "big").write_bytes(bytes(BIG))
    before = bytes_moved(mount)
    fd = writer.open(mount / "big", os.O_RDWR)
    writer.closefd(fd)
    assert bytes_moved(mount) - before < BIG / 8


def test_shared_files_are_one_to_two_mounts(make_mount: MountFactory, writer: Actor, stranger: Actor) -> None:
    """Class shared passes through as well, where no locks can be lost: mappings on two mounts are the same pages."""
    first, second = (make_mount("-o", "passthrough=on,locks=memory") for _ in range(2))
    (first / "data.db").write_bytes(bytes(4096))
    code = "m = mmap.mmap(os.open(p, os.O_RDWR), 4096)"
    writer(code, p=str(first / "data.db"))
    stranger(code, p=str(second / "data.db"))
    writer("m[:4] = b'here'")
    assert stranger("m[:4]") == b"here"


def test_a_file_that_could_have_been_mapped_is_published_once(mount: Mount, writer: Actor) -> None:
    """Opened for reading and writing, closed without a mapping: its inode is the version, nothing is copied."""
    for number in range(20):
        fd = writer.open(mount / f"file{number}", os.O_CREAT | os.O_RDWR)
        writer.write(fd, A)
        before = writer("os.fstat(fd).st_ino", fd=fd)
        writer.closefd(fd)
        assert os.stat(mount / f"file{number}").st_ino == before
    assert wait_until(lambda: status(mount)["drafts"] == 0)
    assert status(mount)["counters"] == {"published": 20}


def test_a_busy_daemon_takes_no_closer_for_a_late_writer(mount: Mount) -> None:
    """RELEASE waits behind other requests: until it was read nobody knows, and a copy of a model costs minutes."""
    script = """
def work(base):
    for number in range(200):
        fd = os.open(f"{base}.{number}", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"x" * 3000)
        os.close(fd)
        os.link(f"{base}.{number}", f"{base}.{number}.link")
"""
    with ExitStack() as stack:
        parties = [stack.enter_context(actor()) for _ in range(4)]
        for number, party in enumerate(parties):
            party(script)
            party.start("work(base)", base=str(mount / f"file{number}"))
        for party in parties:
            party.result()
    assert status(mount)["counters"] == {"published": 800}


def test_what_is_changed_while_a_late_writer_is_found_out(mount: Mount, writer: Actor) -> None:
    """A descriptor under way between two processes is seen by nobody: the file gets a copy, with its attributes as they
    were set at whatever moment."""
    writer("import array; pairs = []")
    for number in range(16):
        path = mount / f"file{number}"
        fd = writer.open(path, CREATE)
        writer.write(fd, A)
        writer("pairs.append(socket.socketpair())")
        rights = "[(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [fd]))]"
        writer(f"pairs[-1][0].sendmsg([b'x'], {rights})", fd=fd)
        writer.closefd(fd)
        time.sleep(number / 1600)
        os.chmod(path, 0o612)
        os.utime(path, ns=(1, 2))
        os.setxattr(path, "user.note", b"kept")
        assert wait_until(lambda: status(mount)["counters"].get("late write", 0) == number + 1)  # noqa: B023
        for place in (path, mount.backing / path.name):
            found = place.stat()
            assert (found.st_mode & 0o777, found.st_mtime_ns, os.getxattr(place, "user.note")) == (0o612, 2, b"kept")


# Python's mmap keeps a descriptor of its own: libc's does not.
MAP = """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, *[ctypes.c_size_t] * 5)
def map_file(fd, size):
    return libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
def unmap(address, size):
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
"""


@pytest.mark.parametrize("stores", [True, False], ids=["stored", "idle"])
def test_a_mapping_that_outlives_the_close(mount: Mount, writer: Actor, stores: bool) -> None:
    """What was written is there after the close, what is stored later once the mapping has ended, as one version; and
    attributes are those that were set in between."""
    path, below = mount / "file", mount.backing / "file"
    writer(MAP)
    fd = writer.open(path, os.O_CREAT | os.O_RDWR)
    writer.write(fd, A)
    writer("address = map_file(fd, size)", fd=fd, size=len(A))
    writer.closefd(fd)
    assert wait_until(below.exists)
    assert content(path) == content(below) == A
    os.chmod(path, 0o755)
    os.setxattr(path, "user.note", b"kept")
    assert os.stat(below).st_mode & 0o777 == 0o755
    if stores:
        writer("ctypes.memmove(address, b'here', 4)")
        assert content(path) == content(below) == A
    writer("unmap(address, size)")
    assert wait_until(lambda: status(mount)["drafts"] == 0)
    assert content(path) == content(below) == (b"here" + A[4:] if stores else A)
    assert os.stat(below).st_mode & 0o777 == 0o755
    assert os.getxattr(below, "user.note") == b"kept"


def test_what_is_removed_while_it_is_mapped_stays_removed(mount: Mount, writer: Actor, stranger: Actor) -> None:
    writer(MAP)
    for number in range(20):
        path = mount / f"file{number}"
        fd = writer.open(path, os.O_CREAT | os.O_RDWR)
        writer.write(fd, A)
        writer("address = map_file(fd, size)", fd=fd, size=len(A))
        writer.closefd(fd)
        (writer if number % 2 else stranger)("os.unlink(p)", p=str(path))
        writer("ctypes.memmove(address, b'here', 4); unmap(address, size)")
    assert wait_until(lambda: status(mount)["drafts"] == 0)
    assert os.listdir(mount.path) == []


@pytest.mark.parametrize("passthrough", ["on", "off"])
def test_a_new_writer_does_not_join_a_file_that_was_closed(
    passthrough: str, make_mount: MountFactory, writer: Actor, stranger: Actor
) -> None:
    """Also a child of who closed it: what the child writes is its own until it closes, though the kernel still holds
    the handle (here for a mapping, else for the moment until RELEASE)."""
    mount = make_mount("-o", f"passthrough={passthrough}")
    path = mount / "file"
    writer(MAP)
    fd = writer.open(path, os.O_CREAT | os.O_RDWR)
    writer.write(fd, A)
    writer("place = map_file(fd, size)", fd=fd, size=len(A))
    writer.closefd(fd)
    child = writer.fork()
    other = child.open(path, os.O_WRONLY | os.O_APPEND)
    child.write(other, B)
    for party in (writer, stranger):
        assert party.read(path) == A
    assert content(path) == content(mount.backing / "file") == A
    child.closefd(other)
    child.exit()
    for party in (writer, stranger):
        assert party.read(path) == A + B
    assert content(mount.backing / "file") == A + B
    writer("unmap(place, size)", size=len(A))
    assert wait_until(lambda: status(mount)["drafts"] == 0)
    assert content(mount.backing / "file") == A + B
    assert not list(quarantined(mount.backing))
