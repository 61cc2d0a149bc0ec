"""The table of POSIX cases: each runs in a bare directory and on a mount, with the same assertions.

What the bare filesystem does is what the mount must do.  A case is a function that works in its current directory,
which is empty and its own.  The number of cases is pinned, so that none can be lost unnoticed.

Left out on purpose, because a mount answers differently by design: a write through one hard link does not show
through the others (a publish is a new inode), and st_ino changes with a publish.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import pickle
import select
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounting import mounted

Case = Callable[[], None]
CASES: dict[str, Case] = {}
COUNT = 213
USER, OTHER, GROUP = 61001, 61002, 61003
BIG = int(os.environ.get("SAFEFS_BIG_DIRECTORY", "8000"))
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.telldir.restype = ctypes.c_long
LIBC.opendir.restype = ctypes.c_void_p
LIBC.readdir.restype = ctypes.c_void_p
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
ACL_EA_VERSION = 2


def case(function: Case) -> Case:
    """Put a function into the table."""
    assert function.__name__ not in CASES
    CASES[function.__name__] = function
    return function


@contextlib.contextmanager
def fails(*numbers: int) -> Iterator[None]:
    """The block must raise an OSError with one of these errnos."""
    found: int | None = 0
    try:
        yield
    except OSError as error:
        found = error.errno
    assert found in numbers, f"errno {found}, expected {[errno.errorcode[n] for n in numbers]}"


def put(name: str | bytes, data: bytes = b"data", mode: int = 0o644) -> None:
    """Create or replace a file."""
    fd = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, mode)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)


def get(name: str | bytes) -> bytes:
    """The whole of a file."""
    with open(name, "rb") as file:
        return file.read()


@contextlib.contextmanager
def opened(name: str | bytes, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """A descriptor for the length of a block."""
    fd = os.open(name, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def as_user(function: Callable[[], Any], uid: int = USER, gid: int | None = None, groups: Sequence[int] = ()) -> Any:
    """Run `function` in a child with other credentials, in the same directory; its result or OSError comes back."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read_end)
            os.setgroups(list(groups))
            os.setresgid(*[gid if gid is not None else uid] * 3)
            os.setresuid(uid, uid, uid)
            try:
                outcome: tuple[str, Any] = ("value", function())
            except OSError as error:
                outcome = ("errno", error.errno)
            except BaseException as error:  # noqa: BLE001  the parent raises it
                outcome = ("error", repr(error))
            os.write(write_end, pickle.dumps(outcome))
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        body = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0
    kind, value = pickle.loads(body)
    if kind == "errno":
        raise OSError(value, os.strerror(value))
    assert kind == "value", value
    return value


def checked(result: int, what: str = "") -> int:
    """Turn a C call's -1 into an OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def renameat2(old: str, new: str, flags: int) -> None:
    checked(LIBC.renameat2(AT_FDCWD, old.encode(), AT_FDCWD, new.encode(), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    checked(LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL in the kernel's xattr form: (tag, permissions, id)."""
    return struct.pack("<I", ACL_EA_VERSION) + b"".join(
        struct.pack("<HHI", tag, permissions, identity & 0xFFFFFFFF) for tag, permissions, identity in entries
    )


USER_OBJ, USER_ENTRY, GROUP_OBJ, GROUP_ENTRY, MASK, OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


def acl_for(user: int, permissions: int, others: int = 0) -> bytes:
    return acl(
        (USER_OBJ, 6, -1), (USER_ENTRY, permissions, user), (GROUP_OBJ, 0, -1), (MASK, 7, -1), (OTHERS, others, -1)
    )


# -------------------------------------------------------------------------------------------------------- directories


@case
def mkdir_and_rmdir() -> None:
    os.mkdir("d", 0o750)
    assert stat.S_IMODE(os.stat("d").st_mode) == 0o750
    os.rmdir("d")
    assert not os.path.lexists("d")


@case
def mkdir_existing() -> None:
    os.mkdir("d")
    put("f")
    with fails(errno.EEXIST):
        os.mkdir("d")
    with fails(errno.EEXIST):
        os.mkdir("f")


@case
def mkdir_below_a_file() -> None:
    put("f")
    with fails(errno.ENOTDIR):
        os.mkdir("f/d")


@case
def mkdir_without_parent() -> None:
    with fails(errno.ENOENT):
        os.mkdir("no/d")


@case
def mkdir_honours_umask() -> None:
    before = os.umask(0o027)
    try:
        os.mkdir("d", 0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("d").st_mode) == 0o750


@case
def rmdir_not_empty() -> None:
    os.makedirs("d/e")
    with fails(errno.ENOTEMPTY):
        os.rmdir("d")
    put("d/f")
    os.rmdir("d/e")
    with fails(errno.ENOTEMPTY):
        os.rmdir("d")


@case
def rmdir_of_a_file() -> None:
    put("f")
    with fails(errno.ENOTDIR):
        os.rmdir("f")


@case
def rmdir_dot() -> None:
    os.mkdir("d")
    with fails(errno.EINVAL):
        os.rmdir("d/.")
    with fails(errno.ENOTEMPTY):
        os.rmdir("d/..")


@case
def unlink_of_a_directory() -> None:
    os.mkdir("d")
    with fails(errno.EISDIR, errno.EPERM):
        os.unlink("d")


@case
def directory_link_count() -> None:
    os.mkdir("d")
    assert os.stat("d").st_nlink == 2
    os.mkdir("d/e")
    assert os.stat("d").st_nlink == 3
    os.rmdir("d/e")
    assert os.stat("d").st_nlink == 2


@case
def listing() -> None:
    names = {"a", "b", "ü", ".hidden", "with space", "new\nline", "-dash"}
    for name in names:
        put(name)
    os.mkdir("dir")
    os.symlink("nowhere", "link")
    assert set(os.listdir(".")) == names | {"dir", "link"}


@case
def listing_types() -> None:
    put("f")
    os.mkdir("d")
    os.symlink("f", "l")
    os.mkfifo("p")
    with os.scandir(".") as entries:
        types = {
            e.name: (e.is_file(follow_symlinks=False), e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries
        }
    assert types == {
        "f": (True, False, False),
        "d": (False, True, False),
        "l": (False, False, True),
        "p": (False, False, False),
    }


@case
def listing_inode_numbers() -> None:
    put("f")
    os.mkdir("d")
    os.symlink("f", "l")
    with os.scandir(".") as entries:
        for entry in entries:
            assert entry.inode() == os.lstat(entry.name).st_ino, entry.name


@case
def listing_dot_and_dot_dot() -> None:
    os.mkdir("d")
    names = [name for name, _ in read_directory("d")]
    assert sorted(names) == [b".", b".."]


@case
def listing_after_changes() -> None:
    for number in range(50):
        put(f"f{number}")
        assert len(os.listdir(".")) == number + 1
    for number in range(50):
        os.unlink(f"f{number}")
        assert len(os.listdir(".")) == 49 - number


@case
def listing_of_a_removed_directory() -> None:
    os.mkdir("d")
    with opened("d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.rmdir("d")
        assert os.listdir(fd) == []
        with fails(errno.ENOENT):
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        with fails(errno.ENOENT):
            os.mkdir("new", dir_fd=fd)


@case
def current_directory_removed() -> None:
    os.mkdir("d")
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir("d")
        os.rmdir("../d")
        with fails(errno.ENOENT):
            os.getcwd()
        with fails(errno.ENOENT):
            os.mkdir("x")
    finally:
        os.fchdir(here)
        os.close(here)


class Dirent(ctypes.Structure):
    _fields_ = [
        ("ino", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("reclen", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    ]


class Stream:
    """A DIR* of libc: readdir with telldir, seekdir and rewinddir."""

    def __init__(self, name: str) -> None:
        self._stream = ctypes.c_void_p(LIBC.opendir(name.encode()))
        assert self._stream

    def next(self) -> bytes | None:
        entry = LIBC.readdir(self._stream)
        return None if not entry else bytes(Dirent.from_address(entry).name)

    def tell(self) -> int:
        return int(LIBC.telldir(self._stream))

    def seek(self, position: int) -> None:
        LIBC.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        LIBC.rewinddir(self._stream)

    def close(self) -> None:
        LIBC.closedir(self._stream)


def read_directory(name: str) -> list[tuple[bytes, int]]:
    """All entries, each with the position that telldir gave before it."""
    stream = Stream(name)
    found: list[tuple[bytes, int]] = []
    try:
        while True:
            position = stream.tell()
            entry = stream.next()
            if entry is None:
                return found
            found.append((entry, position))
    finally:
        stream.close()


@case
def seekdir_returns_to_an_entry() -> None:
    os.mkdir("d")
    for number in range(300):
        put(f"d/{number:03}")
    stream = Stream("d")
    try:
        entries = []
        while True:
            position = stream.tell()
            name = stream.next()
            if name is None:
                break
            entries.append((name, position))
        assert len(entries) == 302
        for name, position in entries[::-7]:
            stream.seek(position)
            assert stream.next() == name
    finally:
        stream.close()


@case
def rewinddir_shows_new_entries() -> None:
    os.mkdir("d")
    put("d/one")
    stream = Stream("d")
    try:
        while stream.next() is not None:
            pass
        put("d/two")
        stream.rewind()
        names = set()
        while (name := stream.next()) is not None:
            names.add(name)
        assert names == {b".", b"..", b"one", b"two"}
    finally:
        stream.close()


@case
def readdir_while_entries_are_removed() -> None:
    """What was there from the begin to the end is listed exactly once (`rm -r` reads and unlinks)."""
    os.mkdir("d")
    for number in range(2000):
        os.mknod(f"d/{number}")
    stream = Stream("d")
    seen = []
    try:
        while (name := stream.next()) is not None:
            if name in (b".", b".."):
                continue
            seen.append(name)
            os.unlink(os.path.join(b"d", name))
    finally:
        stream.close()
    assert len(seen) == len(set(seen)) == 2000
    os.rmdir("d")


@case
def readdir_while_entries_are_added() -> None:
    os.mkdir("d")
    for number in range(500):
        put(f"d/old{number}", b"")
    stream = Stream("d")
    seen = []
    try:
        while (name := stream.next()) is not None:
            seen.append(name)
            if len(seen) % 50 == 0:
                put(f"d/new{len(seen)}", b"")
    finally:
        stream.close()
    old = [name for name in seen if name.startswith(b"old")]
    assert len(old) == len(set(old)) == 500


@case
def big_directory() -> None:
    """Every entry is listed once; each can be looked up; positions are good for a second stream."""
    os.mkdir("d")
    directory = os.open("d", os.O_RDONLY)
    try:
        for number in range(BIG):
            os.symlink("x", f"entry-{number:07}", dir_fd=directory)
    finally:
        os.close(directory)
    names = os.listdir("d")
    assert len(names) == len(set(names)) == BIG
    entries = read_directory("d")
    assert len(entries) == BIG + 2
    stream = Stream("d")
    try:
        for name, position in entries[:: BIG // 20 or 1]:
            stream.seek(position)
            assert stream.next() == name
    finally:
        stream.close()
    assert os.readlink(f"d/entry-{BIG - 1:07}") == "x"


@case
def deep_directories() -> None:
    path = "/".join(["d"] * 200)
    os.makedirs(path)
    put(path + "/f", b"deep")
    assert get(path + "/f") == b"deep"
    assert sum(len(names) for _, names, _ in os.walk(".")) == 200


@case
def dot_dot_of_subdirectories() -> None:
    os.makedirs("a/b/c")
    assert os.stat("a/b/c/..").st_ino == os.stat("a/b").st_ino
    assert os.stat("a/b/c/../../..").st_ino == os.stat(".").st_ino
    os.rename("a/b/c", "c")
    assert os.stat("c/..").st_ino == os.stat(".").st_ino


@case
def rename_directory_with_contents() -> None:
    os.makedirs("a/b")
    put("a/b/f", b"kept")
    os.rename("a", "z")
    assert get("z/b/f") == b"kept"
    assert not os.path.exists("a")


@case
def rename_directory_over_empty_one() -> None:
    os.makedirs("a/b")
    os.mkdir("z")
    os.rename("a", "z")
    assert os.listdir("z") == ["b"]


@case
def rename_directory_over_full_one() -> None:
    os.mkdir("a")
    os.makedirs("z/x")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rename("a", "z")


@case
def rename_directory_into_itself() -> None:
    os.makedirs("a/b")
    with fails(errno.EINVAL):
        os.rename("a", "a/b/c")


@case
def rename_between_kinds() -> None:
    put("f")
    os.mkdir("d")
    with fails(errno.EISDIR):
        os.rename("f", "d")
    with fails(errno.ENOTDIR):
        os.rename("d", "f")


@case
def directory_handle_survives_rename() -> None:
    os.mkdir("a")
    with opened("a") as fd:
        os.rename("a", "b")
        with open(os.open("f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd), "wb") as file:
            file.write(b"x")
    assert get("b/f") == b"x"


@case
def open_directory_for_write() -> None:
    os.mkdir("d")
    with fails(errno.EISDIR):
        os.open("d", os.O_RDWR)
    with fails(errno.EISDIR):
        os.open("d", os.O_WRONLY | os.O_CREAT)


# ----------------------------------------------------------------------------------------------------------- symlinks


@case
def symlink_and_readlink() -> None:
    os.symlink("some/where", "l")
    assert os.readlink("l") == "some/where"
    status = os.lstat("l")
    assert stat.S_ISLNK(status.st_mode) and status.st_size == len("some/where")


@case
def symlink_long_target() -> None:
    target = "x" * 4095
    os.symlink(target, "l")
    assert os.readlink("l") == target
    with fails(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, "m")


@case
def symlink_bytes_target() -> None:
    os.symlink(b"\xff\xfe/\x80", b"l")
    assert os.readlink(b"l") == b"\xff\xfe/\x80"


@case
def symlink_loop() -> None:
    os.symlink("b", "a")
    os.symlink("a", "b")
    with fails(errno.ELOOP):
        os.stat("a")
    with fails(errno.ELOOP):
        os.open("a", os.O_WRONLY | os.O_CREAT)


@case
def symlink_existing() -> None:
    put("f")
    with fails(errno.EEXIST):
        os.symlink("x", "f")


@case
def symlink_dangling() -> None:
    os.symlink("missing", "l")
    with fails(errno.ENOENT):
        os.stat("l")
    put("l", b"through")
    assert get("missing") == b"through"
    assert os.path.islink("l")


@case
def symlink_exclusive_create() -> None:
    os.symlink("missing", "l")
    with fails(errno.EEXIST):
        os.open("l", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert not os.path.exists("missing")


@case
def symlink_write_through() -> None:
    put("f", b"old")
    os.symlink("f", "l")
    put("l", b"new")
    assert get("f") == b"new" and os.path.islink("l")


@case
def symlink_nofollow() -> None:
    put("f")
    os.symlink("f", "l")
    with fails(errno.ELOOP):
        os.open("l", os.O_RDONLY | os.O_NOFOLLOW)
    with fails(errno.ELOOP):
        os.open("l", os.O_WRONLY | os.O_NOFOLLOW)
    with opened("f", os.O_RDONLY | os.O_NOFOLLOW):
        pass


@case
def symlink_owner() -> None:
    os.symlink("x", "l")
    os.lchown("l", USER, GROUP)
    status = os.lstat("l")
    assert (status.st_uid, status.st_gid) == (USER, GROUP)


@case
def symlink_times() -> None:
    os.symlink("x", "l")
    os.utime("l", ns=(1_000_000_001, 2_000_000_002), follow_symlinks=False)
    assert (os.lstat("l").st_atime_ns, os.lstat("l").st_mtime_ns) == (1_000_000_001, 2_000_000_002)


@case
def symlink_to_directory_with_slash() -> None:
    os.mkdir("d")
    os.symlink("d", "l")
    put("l/f", b"x")
    assert get("d/f") == b"x"
    with fails(errno.ENOTDIR):
        os.rmdir("l")


@case
def symlink_rename_keeps_link() -> None:
    put("f", b"x")
    os.symlink("f", "l")
    os.rename("l", "m")
    assert os.readlink("m") == "f" and get("f") == b"x"


@case
def readlink_of_a_file() -> None:
    put("f")
    with fails(errno.EINVAL):
        os.readlink("f")


# --------------------------------------------------------------------------------------------------------- hard links


@case
def link_counts() -> None:
    put("a", b"x")
    os.link("a", "b")
    os.link("a", "c")
    assert {os.stat(name).st_nlink for name in "abc"} == {3}
    assert len({os.stat(name).st_ino for name in "abc"}) == 1
    os.unlink("a")
    assert os.stat("b").st_nlink == 2 and get("c") == b"x"


@case
def link_existing_target() -> None:
    put("a")
    put("b")
    with fails(errno.EEXIST):
        os.link("a", "b")


@case
def link_of_a_directory() -> None:
    os.mkdir("d")
    with fails(errno.EPERM):
        os.link("d", "e")


@case
def link_of_a_missing_file() -> None:
    with fails(errno.ENOENT):
        os.link("no", "b")


@case
def link_of_a_symlink() -> None:
    put("f")
    os.symlink("f", "l")
    os.link("l", "m", follow_symlinks=False)
    assert os.readlink("m") == "f" and os.lstat("l").st_nlink == 2


@case
def link_into_a_directory() -> None:
    put("f", b"x")
    os.mkdir("d")
    os.link("f", "d/g")
    assert os.stat("d/g").st_ino == os.stat("f").st_ino


@case
def link_changes_ctime() -> None:
    put("f")
    before = os.stat("f").st_ctime_ns
    wait_for_tick()
    os.link("f", "g")
    assert os.stat("f").st_ctime_ns > before


@case
def link_attributes_are_shared() -> None:
    put("f")
    os.link("f", "g")
    os.chmod("g", 0o600)
    os.chown("g", USER, GROUP)
    os.utime("g", ns=(5, 7))
    status = os.stat("f")
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns) == (0o600, USER, GROUP, 7)


@case
def link_rename_onto_itself() -> None:
    """rename of one link over another of the same file does nothing."""
    put("a", b"x")
    os.link("a", "b")
    os.rename("a", "b")
    assert get("a") == get("b") == b"x"


@case
def link_many() -> None:
    put("f", b"x")
    for number in range(200):
        os.link("f", f"l{number}")
    assert os.stat("f").st_nlink == 201
    for number in range(200):
        os.unlink(f"l{number}")
    assert os.stat("f").st_nlink == 1


# -------------------------------------------------------------------------------------------- FIFOs, sockets, devices


@case
def fifo_passes_data() -> None:
    os.mkfifo("p", 0o640)
    status = os.stat("p")
    assert stat.S_ISFIFO(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o640
    with opened("p", os.O_RDONLY | os.O_NONBLOCK) as reader, opened("p", os.O_WRONLY | os.O_NONBLOCK) as writer:
        os.write(writer, b"through")
        assert os.read(reader, 100) == b"through"


@case
def fifo_without_reader() -> None:
    os.mkfifo("p")
    with fails(errno.ENXIO):
        os.open("p", os.O_WRONLY | os.O_NONBLOCK)


@case
def fifo_is_not_replaced_by_open() -> None:
    os.mkfifo("p")
    with opened("p", os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        pass
    assert stat.S_ISFIFO(os.stat("p").st_mode)


@case
def socket_connects() -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("s")
        server.listen(1)
        assert stat.S_ISSOCK(os.stat("s").st_mode)
        client.connect("s")
        peer, _ = server.accept()
        with peer:
            client.sendall(b"hello")
            assert peer.recv(10) == b"hello"
    with socket.socket(socket.AF_UNIX) as again, fails(errno.EADDRINUSE):
        again.bind("s")


@case
def socket_cannot_be_opened() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with fails(errno.ENXIO):
            os.open("s", os.O_RDONLY)


@case
def device_numbers() -> None:
    os.mknod("c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod("b", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    character, block = os.stat("c"), os.stat("b")
    assert stat.S_ISCHR(character.st_mode) and character.st_rdev == os.makedev(1, 3)
    assert stat.S_ISBLK(block.st_mode) and block.st_rdev == os.makedev(7, 200)


@case
def device_as_another_user() -> None:
    os.chmod(".", 0o777)
    with fails(errno.EPERM):
        as_user(lambda: os.mknod("c", stat.S_IFCHR | 0o600, os.makedev(1, 3)))
    as_user(lambda: os.mkfifo("p"))
    assert os.stat("p").st_uid == USER


@case
def mknod_regular_file() -> None:
    os.mknod("f", stat.S_IFREG | 0o604)
    status = os.stat("f")
    assert stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o604 and status.st_size == 0
    with fails(errno.EEXIST):
        os.mknod("f", stat.S_IFREG | 0o604)


# ----------------------------------------------------------------------------------------------- attributes and times


CLOCK_REALTIME_COARSE = 5  # <linux/time.h>; the time module does not name it


def wait_for_tick() -> None:
    """Until the kernel's coarse clock, which stamps files, has moved on."""
    start = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= start:
        time.sleep(0.001)


@case
def chmod_modes() -> None:
    put("f")
    for mode in (0o000, 0o444, 0o600, 0o755, 0o777, 0o1777, 0o2755, 0o4755, 0o7777):
        os.chmod("f", mode)
        assert stat.S_IMODE(os.stat("f").st_mode) == mode


@case
def fchmod_of_an_open_file() -> None:
    with opened("f", os.O_CREAT | os.O_WRONLY, 0o600) as fd:
        os.write(fd, b"x")
        os.fchmod(fd, 0o641)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o641
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o641


@case
def chmod_directory_bits() -> None:
    os.mkdir("d")
    for mode in (0o000, 0o700, 0o1777, 0o2775):
        os.chmod("d", mode)
        assert stat.S_IMODE(os.stat("d").st_mode) == mode


@case
def chmod_not_owner() -> None:
    put("f")
    with fails(errno.EPERM):
        as_user(lambda: os.chmod("f", 0o777))


@case
def chmod_of_a_missing_file() -> None:
    with fails(errno.ENOENT):
        os.chmod("no", 0o600)


@case
def chown_as_root() -> None:
    put("f")
    os.chown("f", USER, GROUP)
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (USER, GROUP)
    os.chown("f", -1, OTHER)
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (USER, OTHER)
    os.chown("f", OTHER, -1)
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (OTHER, OTHER)


@case
def fchown_of_an_open_file() -> None:
    with opened("f", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"x")
        os.fchown(fd, USER, GROUP)
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (USER, GROUP)


@case
def chown_as_owner() -> None:
    put("f")
    os.chown("f", USER, USER)
    with fails(errno.EPERM):
        as_user(lambda: os.chown("f", OTHER, -1))
    with fails(errno.EPERM):
        as_user(lambda: os.chown("f", -1, GROUP))
    as_user(lambda: os.chown("f", -1, GROUP), groups=[GROUP])
    assert os.stat("f").st_gid == GROUP


@case
def chown_clears_setuid() -> None:
    put("f")
    os.chmod("f", 0o6755)
    os.chown("f", USER, GROUP)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o755


@case
def write_clears_setuid() -> None:
    put("f")
    os.chmod("f", 0o6777)

    def write() -> None:
        with opened("f", os.O_WRONLY) as fd:
            os.write(fd, b"x")

    as_user(write)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o777


@case
def truncate_clears_setuid() -> None:
    put("f")
    os.chmod("f", 0o6777)
    as_user(lambda: os.truncate("f", 1))
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o777


@case
def root_write_keeps_setuid() -> None:
    put("f")
    os.chmod("f", 0o4755)
    with opened("f", os.O_WRONLY) as fd:
        os.write(fd, b"x")
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o4755


@case
def setgid_cleared_by_chmod_outside_group() -> None:
    put("f")
    os.chown("f", USER, GROUP)
    as_user(lambda: os.chmod("f", 0o2755))
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o755
    as_user(lambda: os.chmod("f", 0o2755), groups=[GROUP])
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o2755


@case
def utime_nanoseconds() -> None:
    put("f")
    os.utime("f", ns=(1_234_567_890_123_456_789, 1_111_111_111_987_654_321))
    status = os.stat("f")
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_234_567_890_123_456_789, 1_111_111_111_987_654_321)


@case
def utime_before_1970() -> None:
    put("f")
    os.utime("f", ns=(-1_500_000_000, -2_000_000_000))
    assert (os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns) == (-1_500_000_000, -2_000_000_000)


@case
def utime_after_2038() -> None:
    put("f")
    os.utime("f", (2**32 + 5, 2**33))
    assert (os.stat("f").st_atime, os.stat("f").st_mtime) == (2**32 + 5, 2**33)


class Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]


UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


def utimensat(name: str, access: int, modification: int, flags: int = 0) -> None:
    times = (Timespec * 2)(Timespec(11, access), Timespec(22, modification))
    checked(LIBC.utimensat(AT_FDCWD, name.encode(), times, flags))


@case
def utime_omit() -> None:
    put("f")
    os.utime("f", ns=(1, 2))
    utimensat("f", UTIME_OMIT, 5)
    assert (os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns) == (1, 22_000_000_005)
    utimensat("f", 6, UTIME_OMIT)
    assert (os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns) == (11_000_000_006, 22_000_000_005)


@case
def utime_now() -> None:
    put("f")
    os.utime("f", ns=(1, 2))
    before = time.time_ns()
    utimensat("f", UTIME_OMIT, UTIME_NOW)
    assert os.stat("f").st_atime_ns == 1
    assert abs(os.stat("f").st_mtime_ns - before) < 10**9
    utimensat("f", UTIME_NOW, UTIME_OMIT)
    assert abs(os.stat("f").st_atime_ns - before) < 10**9


@case
def utime_permissions() -> None:
    put("f", mode=0o666)
    os.chmod("f", 0o666)
    as_user(lambda: os.utime("f"))
    with fails(errno.EPERM):
        as_user(lambda: os.utime("f", ns=(1, 2)))
    os.chmod("f", 0o644)
    with fails(errno.EACCES):
        as_user(lambda: os.utime("f"))


@case
def futimens_of_an_open_file_is_kept_by_close() -> None:
    """cp -p and tar set the times before they close."""
    with opened("f", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"x")
        os.utime(fd, ns=(3_000_000_003, 4_000_000_004))
    assert (os.stat("f").st_atime_ns, os.stat("f").st_mtime_ns) == (3_000_000_003, 4_000_000_004)


@case
def times_move_forward() -> None:
    put("f", b"1")
    first = os.stat("f")
    wait_for_tick()
    put("f", b"2")
    second = os.stat("f")
    assert second.st_mtime_ns > first.st_mtime_ns and second.st_ctime_ns > first.st_ctime_ns
    wait_for_tick()
    os.chmod("f", 0o600)
    third = os.stat("f")
    assert third.st_mtime_ns == second.st_mtime_ns and third.st_ctime_ns > second.st_ctime_ns


@case
def directory_times_change_with_entries() -> None:
    os.mkdir("d")
    stamps = [os.stat("d").st_mtime_ns]
    steps: list[Callable[[], object]] = [
        lambda: put("d/f"),
        lambda: os.rename("d/f", "d/g"),
        lambda: os.link("d/g", "d/h"),
        lambda: os.unlink("d/g"),
        lambda: os.mkdir("d/s"),
        lambda: os.rmdir("d/s"),
    ]
    for step in steps:
        wait_for_tick()
        step()
        stamps.append(os.stat("d").st_mtime_ns)
    assert stamps == sorted(set(stamps))


@case
def ctime_after_rename() -> None:
    put("f")
    before = os.stat("f")
    wait_for_tick()
    os.rename("f", "g")
    after = os.stat("g")
    assert after.st_ctime_ns >= before.st_ctime_ns and after.st_mtime_ns == before.st_mtime_ns


@case
def stat_fields() -> None:
    put("f", b"x" * 10000, 0o640)
    status = os.stat("f")
    assert (status.st_size, status.st_nlink, stat.S_IMODE(status.st_mode)) == (10000, 1, 0o640)
    assert status.st_blocks * 512 >= 10000 and status.st_blksize >= 4096
    assert (status.st_uid, status.st_gid) == (0, 0)


@case
def stat_equals_fstat() -> None:
    put("f", b"abc")
    with opened("f") as fd:
        by_name, by_descriptor = os.stat("f"), os.fstat(fd)
    assert by_name == by_descriptor


@case
def inode_numbers_are_distinct() -> None:
    for number in range(100):
        put(f"f{number}")
    assert len({os.stat(f"f{number}").st_ino for number in range(100)}) == 100
    assert len({os.stat(f"f{number}").st_dev for number in range(100)}) == 1


@case
def inode_number_survives_rename_and_chmod() -> None:
    put("f")
    number = os.stat("f").st_ino
    os.rename("f", "g")
    os.chmod("g", 0o600)
    os.utime("g")
    assert os.stat("g").st_ino == number


@case
def blocks_of_a_sparse_file() -> None:
    with opened("f", os.O_CREAT | os.O_WRONLY) as fd:
        os.pwrite(fd, b"end", 100 << 20)
    status = os.stat("f")
    assert status.st_size == (100 << 20) + 3 and status.st_blocks * 512 < 1 << 20


@case
def statfs_numbers() -> None:
    here, root = os.statvfs("."), os.statvfs("/tmp")
    assert here.f_blocks == root.f_blocks and here.f_bsize == root.f_bsize and here.f_frsize == root.f_frsize
    assert here.f_files == root.f_files and here.f_namemax == 255
    assert 0 < here.f_bavail <= here.f_bfree <= here.f_blocks


@case
def fstatfs_of_an_open_file() -> None:
    put("f")
    with opened("f") as fd:
        assert os.fstatvfs(fd).f_blocks == os.statvfs(".").f_blocks


@case
def access_as_root() -> None:
    put("f", mode=0o000)
    os.chmod("f", 0)
    assert os.access("f", os.R_OK | os.W_OK) and not os.access("f", os.X_OK)
    assert not os.access("no", os.F_OK)


@case
def access_as_user() -> None:
    put("f")
    os.chown("f", USER, GROUP)
    os.chmod("f", 0o640)
    assert as_user(lambda: os.access("f", os.R_OK | os.W_OK))
    assert as_user(lambda: os.access("f", os.R_OK), OTHER, GROUP)
    assert not as_user(lambda: os.access("f", os.W_OK), OTHER, GROUP)
    assert as_user(lambda: os.access("f", os.R_OK), OTHER, OTHER, [GROUP])
    assert not as_user(lambda: os.access("f", os.R_OK), OTHER)


# ---------------------------------------------------------------------------------------------------- xattrs and ACLs


@case
def xattr_round_trip() -> None:
    put("f")
    os.setxattr("f", "user.one", b"\x00\xff" * 100)
    os.setxattr("f", "user.empty", b"")
    assert os.getxattr("f", "user.one") == b"\x00\xff" * 100
    assert os.getxattr("f", "user.empty") == b""
    assert {"user.one", "user.empty"} <= set(os.listxattr("f"))
    os.removexattr("f", "user.one")
    assert "user.one" not in os.listxattr("f")


@case
def xattr_flags() -> None:
    put("f")
    with fails(errno.ENODATA):
        os.setxattr("f", "user.x", b"1", os.XATTR_REPLACE)
    os.setxattr("f", "user.x", b"1", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr("f", "user.x", b"2", os.XATTR_CREATE)
    os.setxattr("f", "user.x", b"2", os.XATTR_REPLACE)
    assert os.getxattr("f", "user.x") == b"2"


@case
def xattr_missing() -> None:
    put("f")
    with fails(errno.ENODATA):
        os.getxattr("f", "user.no")
    with fails(errno.ENODATA):
        os.removexattr("f", "user.no")


@case
def xattr_on_directories() -> None:
    os.mkdir("d")
    os.setxattr("d", "user.x", b"1")
    assert os.getxattr("d", "user.x") == b"1"


@case
def xattr_on_symlinks() -> None:
    os.symlink("x", "l")
    with fails(errno.EPERM):
        os.setxattr("l", "user.x", b"1", follow_symlinks=False)
    os.setxattr("l", "trusted.x", b"1", follow_symlinks=False)
    assert os.getxattr("l", "trusted.x", follow_symlinks=False) == b"1"


@case
def xattr_of_an_open_file() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x")
        os.setxattr(fd, "user.x", b"1")
        assert os.getxattr(fd, "user.x") == b"1"
    assert os.getxattr("f", "user.x") == b"1"


@case
def xattr_permissions() -> None:
    put("f")
    os.setxattr("f", "user.x", b"1")
    assert as_user(lambda: os.getxattr("f", "user.x")) == b"1"
    with fails(errno.EACCES):
        as_user(lambda: os.setxattr("f", "user.x", b"2"))
    with fails(errno.EPERM):
        as_user(lambda: os.setxattr("f", "trusted.x", b"2"))


@case
def xattr_size_query() -> None:
    put("f")
    os.setxattr("f", "user.x", b"12345")
    path, name = b"f", b"user.x"
    assert LIBC.getxattr(path, name, None, 0) == 5
    small = ctypes.create_string_buffer(2)
    with fails(errno.ERANGE):
        checked(LIBC.getxattr(path, name, small, 2))
    assert LIBC.listxattr(path, None, 0) >= len(name) + 1


@case
def xattr_too_big() -> None:
    put("f")
    with fails(errno.E2BIG, errno.ENOSPC):
        os.setxattr("f", "user.x", b"x" * 65537)


@case
def xattr_survive_rename_and_link() -> None:
    put("f")
    os.setxattr("f", "user.x", b"1")
    os.rename("f", "g")
    os.link("g", "h")
    assert os.getxattr("h", "user.x") == b"1"


@case
def acl_grants_a_user() -> None:
    put("f", b"secret", 0o600)
    with fails(errno.EACCES):
        as_user(lambda: get("f"))
    os.setxattr("f", "system.posix_acl_access", acl_for(USER, 4))
    assert as_user(lambda: get("f")) == b"secret"
    with fails(errno.EACCES):
        as_user(lambda: get("f"), OTHER)
    with fails(errno.EACCES):
        as_user(lambda: os.open("f", os.O_WRONLY))


@case
def acl_mask_shows_as_group_mode() -> None:
    put("f", mode=0o600)
    os.setxattr("f", "system.posix_acl_access", acl_for(USER, 6))
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o670
    os.chmod("f", 0o600)
    with fails(errno.EACCES):
        as_user(lambda: get("f"))


@case
def acl_default_is_inherited() -> None:
    os.mkdir("d")
    os.setxattr("d", "system.posix_acl_default", acl_for(USER, 4))
    put("d/f", b"secret", 0o640)
    os.chmod("d", 0o755)
    assert as_user(lambda: get("d/f")) == b"secret"
    assert "system.posix_acl_access" in os.listxattr("d/f")
    os.mkdir("d/e")
    assert os.getxattr("d/e", "system.posix_acl_default") == os.getxattr("d", "system.posix_acl_default")


@case
def acl_default_replaces_umask() -> None:
    os.mkdir("d")
    os.setxattr("d", "system.posix_acl_default", acl((USER_OBJ, 6, -1), (GROUP_OBJ, 6, -1), (OTHERS, 6, -1)))
    before = os.umask(0o077)
    try:
        put("d/f", mode=0o666)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("d/f").st_mode) == 0o666


@case
def acl_remove() -> None:
    put("f", b"x", 0o600)
    os.setxattr("f", "system.posix_acl_access", acl_for(USER, 4))
    os.removexattr("f", "system.posix_acl_access")
    with fails(errno.EACCES):
        as_user(lambda: get("f"))


@case
def acl_on_a_directory_grants_creation() -> None:
    os.mkdir("d", 0o700)
    entries = ((USER_OBJ, 7, -1), (USER_ENTRY, 7, USER), (GROUP_OBJ, 0, -1), (MASK, 7, -1), (OTHERS, 0, -1))
    os.setxattr("d", "system.posix_acl_access", acl(*entries))
    as_user(lambda: put("d/f", b"mine"))
    assert os.stat("d/f").st_uid == USER
    with fails(errno.EACCES):
        as_user(lambda: put("d/g"), OTHER)


@case
def getfacl_tool() -> None:
    put("f")
    subprocess.run(["setfacl", "-m", f"u:{USER}:rw", "f"], check=True)
    text = subprocess.check_output(["getfacl", "-n", "f"], text=True)
    assert f"user:{USER}:rw-" in text


# -------------------------------------------------------------------------------------------------------- permissions


@case
def create_in_a_foreign_directory() -> None:
    os.mkdir("d", 0o755)
    with fails(errno.EACCES):
        as_user(lambda: put("d/f"))
    with fails(errno.EACCES):
        as_user(lambda: os.mkdir("d/e"))
    with fails(errno.EACCES):
        as_user(lambda: os.symlink("x", "d/l"))
    assert os.listdir("d") == []


@case
def remove_in_a_foreign_directory() -> None:
    os.mkdir("d", 0o755)
    put("d/f")
    os.chmod("d/f", 0o666)
    with fails(errno.EACCES):
        as_user(lambda: os.unlink("d/f"))
    with fails(errno.EACCES):
        as_user(lambda: os.rename("d/f", "d/g"))


@case
def read_and_write_bits() -> None:
    put("f", b"x")
    os.chown("f", USER, GROUP)
    os.chmod("f", 0o420)
    assert as_user(lambda: get("f")) == b"x"
    with fails(errno.EACCES):
        as_user(lambda: os.open("f", os.O_WRONLY))
    with fails(errno.EACCES):
        as_user(lambda: os.open("f", os.O_RDONLY), OTHER, GROUP)
    with fails(errno.EACCES):
        as_user(lambda: os.open("f", os.O_RDONLY), OTHER)


@case
def write_only_file() -> None:
    """A file that its user may write and not read can be replaced, and stays unreadable."""
    put("f", b"old")
    os.chown("f", USER, USER)
    os.chmod("f", 0o200)
    as_user(lambda: put("f", b"new"))
    with fails(errno.EACCES):
        as_user(lambda: get("f"))
    assert get("f") == b"new" and stat.S_IMODE(os.stat("f").st_mode) == 0o200


@case
def write_in_a_directory_without_write_permission() -> None:
    """Permission to write a file is the file's own: its directory need not be writable."""
    os.mkdir("d")
    put("d/f", b"old")
    os.chown("d/f", USER, USER)
    os.chmod("d", 0o555)
    as_user(lambda: put("d/f", b"new"))
    assert get("d/f") == b"new" and os.stat("d/f").st_uid == USER


@case
def write_foreign_file_by_mode_bits() -> None:
    """Another user's file with mode 666: the rewrite keeps its owner."""
    put("f", b"old")
    os.chown("f", OTHER, OTHER)
    os.chmod("f", 0o666)
    as_user(lambda: put("f", b"new"))
    assert get("f") == b"new"
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (OTHER, OTHER)


@case
def search_permission() -> None:
    os.makedirs("d/e")
    put("d/e/f")
    os.chmod("d", 0o600)
    with fails(errno.EACCES):
        as_user(lambda: get("d/e/f"))
    os.chmod("d", 0o711)
    as_user(lambda: get("d/e/f"))
    with fails(errno.EACCES):
        as_user(lambda: os.listdir("d"))


@case
def supplementary_groups() -> None:
    put("f", b"x")
    os.chown("f", OTHER, GROUP)
    os.chmod("f", 0o060)
    assert as_user(lambda: get("f"), groups=[GROUP]) == b"x"
    as_user(lambda: put("f", b"y"), groups=[5, 6, GROUP])
    assert get("f") == b"y"
    with fails(errno.EACCES):
        as_user(lambda: get("f"), groups=[5, 6])


@case
def supplementary_group_directory() -> None:
    os.mkdir("d")
    os.chown("d", OTHER, GROUP)
    os.chmod("d", 0o070)
    as_user(lambda: put("d/f"), groups=[GROUP])
    as_user(lambda: os.unlink("d/f"), groups=[GROUP])
    with fails(errno.EACCES):
        as_user(lambda: put("d/f"))


@case
def owner_of_new_entries() -> None:
    os.chmod(".", 0o777)

    def make() -> None:
        put("f")
        os.mkdir("d")
        os.symlink("x", "l")
        os.mkfifo("p")

    as_user(make, USER, GROUP)
    for name in "fdlp":
        assert (os.lstat(name).st_uid, os.lstat(name).st_gid) == (USER, GROUP), name


@case
def setgid_directory() -> None:
    os.mkdir("d")
    os.chown("d", 0, GROUP)
    os.chmod("d", 0o2777)

    def make() -> None:
        put("d/f")
        os.mkdir("d/s")
        os.symlink("x", "d/l")

    as_user(make)
    assert {os.lstat("d/" + name).st_gid for name in "fsl"} == {GROUP}
    assert os.stat("d/s").st_mode & stat.S_ISGID and not os.stat("d/f").st_mode & stat.S_ISGID


@case
def sticky_directory() -> None:
    os.mkdir("d")
    os.chmod("d", 0o1777)
    as_user(lambda: put("d/f"), OTHER)
    for action in (lambda: os.unlink("d/f"), lambda: os.rename("d/f", "d/g")):
        with fails(errno.EPERM, errno.EACCES):
            as_user(action)
    as_user(lambda: os.rename("d/f", "d/g"), OTHER)
    as_user(lambda: os.unlink("d/g"), OTHER)


@case
def sticky_directory_rename_over() -> None:
    os.mkdir("d")
    os.chmod("d", 0o1777)
    as_user(lambda: put("d/theirs", b"theirs"), OTHER)
    as_user(lambda: put("d/mine"))
    with fails(errno.EPERM, errno.EACCES):
        as_user(lambda: os.rename("d/mine", "d/theirs"))
    assert get("d/theirs") == b"theirs"


@case
def umask_of_new_files() -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o000, 0o666), (0o777, 0o000)):
        before = os.umask(mask)
        try:
            put("f", mode=0o666)
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.stat("f").st_mode) == mode
        os.unlink("f")


@case
def mode_of_an_existing_file_is_kept() -> None:
    put("f", b"1", 0o604)
    os.chmod("f", 0o604)
    put("f", b"2", 0o777)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o604


@case
def create_read_only_file_writable_descriptor() -> None:
    """open(O_CREAT, 0444) gives a descriptor that can write although nobody could open the file so again."""
    os.chmod(".", 0o777)

    def write() -> int:
        with opened("f", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444) as fd:
            count = os.write(fd, b"data")
        with fails(errno.EACCES):
            os.open("f", os.O_WRONLY)
        return count

    assert as_user(write) == 4
    assert get("f") == b"data" and stat.S_IMODE(os.stat("f").st_mode) == 0o444


@case
def create_mode_zero() -> None:
    os.chmod(".", 0o777)

    def write() -> None:
        with opened("f", os.O_CREAT | os.O_RDWR, 0) as fd:
            os.write(fd, b"x")
            assert os.pread(fd, 1, 0) == b"x"

    as_user(write)
    assert stat.S_IMODE(os.stat("f").st_mode) == 0 and get("f") == b"x"


@case
def execute_a_program() -> None:
    shutil.copy("/bin/true", "prog")
    assert subprocess.run(["./prog"], check=False).returncode == 0
    os.chmod("prog", 0o644)
    with fails(errno.EACCES):
        subprocess.run(["./prog"], check=False)


@case
def execute_a_script() -> None:
    put("s", b"#!/bin/sh\necho ran\n", 0o755)
    assert subprocess.check_output(["./s"]) == b"ran\n"


# --------------------------------------------------------------------------------------------------------- open flags


@case
def open_missing() -> None:
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        with fails(errno.ENOENT):
            os.open("no", flags)
    with fails(errno.ENOENT):
        os.open("no/f", os.O_CREAT | os.O_WRONLY)


@case
def open_exclusive() -> None:
    with opened("f", os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
        os.write(fd, b"x")
    with fails(errno.EEXIST):
        os.open("f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert get("f") == b"x"


@case
def open_directory_flag() -> None:
    put("f")
    os.mkdir("d")
    with fails(errno.ENOTDIR):
        os.open("f", os.O_RDONLY | os.O_DIRECTORY)
    with opened("d", os.O_RDONLY | os.O_DIRECTORY):
        pass


@case
def open_trailing_slash() -> None:
    put("f")
    with fails(errno.ENOTDIR):
        os.open("f/", os.O_RDONLY)
    with fails(errno.EISDIR):
        os.open("new/", os.O_CREAT | os.O_WRONLY)
    with fails(errno.ENOTDIR):
        os.stat("f/.")


@case
def open_path_only() -> None:
    put("f", b"x")
    with opened("f", os.O_PATH) as fd:
        assert os.fstat(fd).st_size == 1
        with fails(errno.EBADF):
            os.read(fd, 1)
        with opened(f"/proc/self/fd/{fd}") as again:
            assert os.read(again, 10) == b"x"


@case
def open_path_directory() -> None:
    os.mkdir("d")
    with opened("d", os.O_PATH | os.O_DIRECTORY) as fd:
        with open(os.open("f", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd), "wb") as file:
            file.write(b"x")
        assert os.stat("f", dir_fd=fd).st_size == 1


@case
def open_create_read_only() -> None:
    """O_RDONLY|O_CREAT makes the empty file at once."""
    with opened("f", os.O_RDONLY | os.O_CREAT, 0o640) as fd:
        assert os.path.exists("f")
        assert os.read(fd, 10) == b""
        with fails(errno.EBADF):
            os.write(fd, b"x")
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o640


@case
def open_read_descriptor_cannot_write() -> None:
    put("f")
    with opened("f") as fd:
        with fails(errno.EBADF):
            os.write(fd, b"x")
        with fails(errno.EINVAL, errno.EBADF):
            os.ftruncate(fd, 0)


@case
def open_write_descriptor_cannot_read() -> None:
    with opened("f", os.O_CREAT | os.O_WRONLY) as fd, fails(errno.EBADF):
        os.read(fd, 1)


@case
def open_truncates() -> None:
    put("f", b"long content")
    with opened("f", os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"x")
    assert get("f") == b"x"
    with opened("f", os.O_WRONLY | os.O_TRUNC):
        pass
    assert get("f") == b""


@case
def open_noatime_nonblock_sync() -> None:
    put("f", b"x")
    for flags in (os.O_NOATIME, os.O_NONBLOCK, os.O_CLOEXEC):
        with opened("f", os.O_RDONLY | flags) as fd:
            assert os.read(fd, 9) == b"x"
    with opened("f", os.O_WRONLY | os.O_SYNC) as fd:
        os.write(fd, b"y")
    with opened("f", os.O_WRONLY | os.O_DSYNC) as fd:
        os.write(fd, b"z")
    assert get("f") == b"z"


@case
def open_flags_are_kept() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR | os.O_APPEND) as fd:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        assert flags & os.O_APPEND and flags & os.O_ACCMODE == os.O_RDWR
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_APPEND)
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND


@case
def open_through_descriptor_link() -> None:
    put("f", b"x")
    with opened("f") as fd, opened(f"/proc/self/fd/{fd}") as again:
        assert os.read(again, 10) == b"x"


# ------------------------------------------------------------------------------------------------ reading and writing


@case
def read_and_write() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.write(fd, b"hello world") == 11
        assert os.lseek(fd, 6, os.SEEK_SET) == 6
        assert os.read(fd, 100) == b"world"
        assert os.read(fd, 100) == b""
        assert os.lseek(fd, -5, os.SEEK_END) == 6
        os.write(fd, b"there")
    assert get("f") == b"hello there"


@case
def pread_and_pwrite() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.pwrite(fd, b"0123456789", 5) == 10
        assert os.pread(fd, 4, 7) == b"2345"
        assert os.pread(fd, 5, 0) == b"\0" * 5
        assert os.pread(fd, 5, 100) == b""
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    assert get("f") == b"\0" * 5 + b"0123456789"


@case
def vectored() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.writev(fd, [b"ab", b"", b"cde"]) == 5
        assert os.pwritev(fd, [b"X", b"Y"], 1) == 2
        parts = [bytearray(2), bytearray(10)]
        assert os.preadv(fd, parts, 0) == 5
        assert bytes(parts[0]) == b"aX" and bytes(parts[1][:3]) == b"Yde"


@case
def append() -> None:
    put("f", b"start")
    with opened("f", os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b" one")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b" two")
        assert os.fstat(fd).st_size == 13
    assert get("f") == b"start one two"


@case
def append_read_write() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR | os.O_APPEND) as fd:
        os.write(fd, b"abc")
        os.lseek(fd, 1, os.SEEK_SET)
        assert os.read(fd, 1) == b"b"
        os.write(fd, b"d")
        assert os.pread(fd, 10, 0) == b"abcd"


@case
def two_descriptors_of_one_writer() -> None:
    """A process's own second descriptor sees what it wrote through the first, before any close."""
    with opened("f", os.O_CREAT | os.O_RDWR) as one:
        os.write(one, b"first")
        with opened("f", os.O_RDWR) as two:
            assert os.read(two, 10) == b"first"
            os.write(two, b" second")
            assert os.pread(one, 100, 0) == b"first second"
        with opened("f") as three:
            assert os.read(three, 100) == b"first second"
    assert get("f") == b"first second"


@case
def big_write_and_read() -> None:
    data = os.urandom(1 << 20) * 33 + b"tail"
    put("f", data)
    assert get("f") == data
    assert os.stat("f").st_size == len(data)


@case
def odd_sizes() -> None:
    for size in (1, 511, 4095, 4096, 4097, 65535, 131073, 1048577):
        data = os.urandom(size)
        put("f", data)
        assert get("f") == data, size


@case
def overwrite_middle() -> None:
    data = bytearray(os.urandom(300_000))
    put("f", bytes(data))
    with opened("f", os.O_RDWR) as fd:
        os.pwrite(fd, b"M" * 5000, 123_457)
        data[123_457:128_457] = b"M" * 5000
        assert os.pread(fd, 300_000, 0) == bytes(data)
    assert get("f") == bytes(data)


@case
def many_small_writes() -> None:
    with open("f", "wb", 0) as file:
        for number in range(2000):
            line = b"%07d\n" % number
            assert file.write(line) == len(line)
    assert get("f") == b"".join(b"%07d\n" % number for number in range(2000))


@case
def sparse_reads_zeros() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"a", 0)
        os.pwrite(fd, b"z", 5_000_000)
        assert os.pread(fd, 4096, 2_000_000) == b"\0" * 4096
    assert get("f")[4_999_990:] == b"\0" * 10 + b"z"


@case
def seek_data_and_hole() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 65536, 1 << 20)
        os.ftruncate(fd, 4 << 20)
        os.fsync(fd)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
        assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 65536
        with fails(errno.ENXIO):
            os.lseek(fd, 2 << 20, os.SEEK_DATA)
        with fails(errno.ENXIO):
            os.lseek(fd, 5 << 20, os.SEEK_HOLE)
    with opened("f") as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
        assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 65536


@case
def seek_beyond_end() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        assert os.lseek(fd, 1000, os.SEEK_SET) == 1000
        assert os.fstat(fd).st_size == 0
        with fails(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)


@case
def direct_io() -> None:
    buffer = mmap.mmap(-1, 65536)
    buffer[:] = os.urandom(65536)
    with opened("f", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as fd:
        assert os.write(fd, buffer) == 65536
        back = mmap.mmap(-1, 65536)
        assert os.preadv(fd, [back], 0) == 65536
        assert back[:] == buffer[:]
    assert get("f") == buffer[:]
    with opened("f", os.O_RDONLY | os.O_DIRECT) as fd:
        back = mmap.mmap(-1, 65536)
        assert os.readv(fd, [back]) == 65536 and back[:] == buffer[:]


@case
def file_size_limit_position() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"end", 1 << 40)
        assert os.fstat(fd).st_size == (1 << 40) + 3
        assert os.pread(fd, 10, 1 << 40) == b"end"
        os.ftruncate(fd, 0)


@case
def ftruncate_grows_and_shrinks() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"0123456789")
        os.ftruncate(fd, 4)
        assert os.pread(fd, 100, 0) == b"0123"
        os.ftruncate(fd, 8)
        assert os.pread(fd, 100, 0) == b"0123\0\0\0\0"
    assert get("f") == b"0123\0\0\0\0"


@case
def truncate_by_path() -> None:
    put("f", b"0123456789")
    os.truncate("f", 3)
    assert get("f") == b"012"
    os.truncate("f", 6)
    assert get("f") == b"012\0\0\0"
    os.truncate("f", 0)
    assert get("f") == b""


@case
def truncate_errors() -> None:
    os.mkdir("d")
    put("f")
    with fails(errno.EISDIR):
        os.truncate("d", 0)
    with fails(errno.ENOENT):
        os.truncate("no", 0)
    with fails(errno.EINVAL):
        os.truncate("f", -1)
    with fails(errno.EACCES):
        as_user(lambda: os.truncate("f", 0))
    assert get("f") == b"data"


@case
def truncate_of_an_open_file() -> None:
    """A process that has the file open for write and truncates it by name truncates its own."""
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"0123456789")
        os.truncate("f", 5)
        assert os.fstat(fd).st_size == 5
        os.pwrite(fd, b"X", 9)
    assert get("f") == b"01234\0\0\0\0X"


@case
def fallocate_extends() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        fallocate(fd, 0, 0, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        assert os.pread(fd, 10, 1000) == b"\0" * 10
    assert os.stat("f").st_size == 1 << 20


@case
def fallocate_keep_size() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x")
        fallocate(fd, KEEP_SIZE, 0, 1 << 20)
        assert os.fstat(fd).st_size == 1
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20


@case
def fallocate_punch_hole() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x" * 65536)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4096, 8192)
        data = os.pread(fd, 65536, 0)
        assert data == b"x" * 4096 + b"\0" * 8192 + b"x" * (65536 - 12288)
    assert get("f") == data


@case
def fallocate_zero_range() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x" * 65536)
        fallocate(fd, ZERO_RANGE, 100, 60000)
        data = os.pread(fd, 65536, 0)
        assert data == b"x" * 100 + b"\0" * 60000 + b"x" * (65536 - 60100)
    assert get("f") == data


@case
def fallocate_on_an_existing_file() -> None:
    put("f", b"kept")
    with opened("f", os.O_RDWR) as fd:
        os.posix_fallocate(fd, 0, 8192)
    assert get("f") == b"kept" + b"\0" * 8188


@case
def fallocate_errors() -> None:
    put("f")
    with opened("f") as fd, fails(errno.EBADF):
        fallocate(fd, 0, 0, 10)
    with opened("f", os.O_RDWR) as fd, fails(errno.EINVAL):
        fallocate(fd, 0, 0, 0)


@case
def copy_file_range_copies() -> None:
    data = os.urandom(300_000)
    put("a", data)
    with opened("a") as source, opened("b", os.O_CREAT | os.O_WRONLY) as target:
        left, offset = len(data), 0
        while left:
            count = os.copy_file_range(source, target, left, offset, offset)
            assert count > 0
            left, offset = left - count, offset + count
    assert get("b") == data


@case
def copy_file_range_within_parts() -> None:
    put("a", b"0123456789" * 1000)
    put("b", b"." * 5000)
    with opened("a") as source, opened("b", os.O_RDWR) as target:
        assert os.copy_file_range(source, target, 100, 5, 1000) == 100
        assert os.pread(target, 100, 1000) == (b"0123456789" * 11)[5:105]
    assert get("b")[:1000] == b"." * 1000 and len(get("b")) == 5000


@case
def sendfile_both_ways() -> None:
    data = os.urandom(200_000)
    put("a", data)
    with opened("a") as source, opened("b", os.O_CREAT | os.O_WRONLY) as target:
        sent = 0
        while sent < len(data):
            sent += os.sendfile(target, source, sent, len(data) - sent)
    assert get("b") == data


@case
def splice_from_a_pipe() -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"spliced")
        with opened("f", os.O_CREAT | os.O_WRONLY) as fd:
            assert os.splice(read_end, fd, 7) == 7
    finally:
        os.close(read_end)
        os.close(write_end)
    assert get("f") == b"spliced"


@case
def copy_tools() -> None:
    put("a", os.urandom(100_000), 0o640)
    os.utime("a", ns=(10**18, 10**18 + 1))
    os.setxattr("a", "user.x", b"1")
    shutil.copy2("a", "b")
    subprocess.run(["cp", "-a", "a", "c"], check=True)
    for name in "bc":
        status = os.stat(name)
        assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 10**18 + 1)
        assert get(name) == get("a") and os.getxattr(name, "user.x") == b"1"


@case
def fsync_kinds() -> None:
    with opened("f", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"x")
        os.fsync(fd)
        os.fdatasync(fd)
        checked(LIBC.syncfs(fd))
    with opened("f") as fd:
        os.fsync(fd)
    with opened(".") as fd:
        os.fsync(fd)


@case
def advice() -> None:
    put("f", b"x" * 10000)
    with opened("f") as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.read(fd, 10) == b"x" * 10


@case
def poll_says_ready() -> None:
    put("f", b"x")
    with opened("f", os.O_RDWR) as fd:
        poller = select.poll()
        poller.register(fd, select.POLLIN | select.POLLOUT)
        assert poller.poll(0) == [(fd, select.POLLIN | select.POLLOUT)]


@case
def terminal_ioctl() -> None:
    put("f")
    with opened("f") as fd:
        assert not os.isatty(fd)
        with fails(errno.ENOTTY):
            fcntl.ioctl(fd, 0x5401, b"\0" * 64)


# ----------------------------------------------------------------------------------------------------------- mappings


@case
def mmap_read() -> None:
    data = os.urandom(100_000)
    put("f", data)
    with opened("f") as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
        assert view[:] == data


@case
def mmap_shared_write() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, 20_000)
        with mmap.mmap(fd, 20_000) as view:
            view[5000:5010] = b"0123456789"
            view.flush()
            assert os.pread(fd, 10, 5000) == b"0123456789"
            view[19_990:] = b"abcdefghij"
    data = get("f")
    assert len(data) == 20_000 and data[5000:5010] == b"0123456789" and data[-10:] == b"abcdefghij"


@case
def mmap_shared_write_of_an_existing_file() -> None:
    put("f", b"." * 10_000)
    with opened("f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as view:
        view[0:3] = b"abc"
        view[9_997:] = b"xyz"
        view.flush()
    assert get("f") == b"abc" + b"." * 9_994 + b"xyz"


@case
def mmap_private_write() -> None:
    put("f", b"original")
    with opened("f") as fd, mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view:
        view[0:3] = b"XXX"
        assert view[:] == b"XXXginal"
    assert get("f") == b"original"


@case
def mmap_sees_own_writes() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"a" * 8192)
        with mmap.mmap(fd, 8192) as view:
            os.pwrite(fd, b"changed", 4096)
            assert view[4096:4103] == b"changed"


@case
def mmap_of_an_unlinked_file() -> None:
    put("f", b"still here")
    with opened("f") as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
        os.unlink("f")
        assert view[:] == b"still here"


@case
def mmap_shared_between_processes() -> None:
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096) as view:
            pid = os.fork()
            if pid == 0:
                view[0:5] = b"child"
                os._exit(0)
            os.waitpid(pid, 0)
            assert view[0:5] == b"child"
    assert get("f")[:5] == b"child"


# -------------------------------------------------------------------------------------------------- rename and unlink


@case
def rename_file() -> None:
    put("a", b"x")
    number = os.stat("a").st_ino
    os.rename("a", "b")
    assert not os.path.exists("a") and get("b") == b"x" and os.stat("b").st_ino == number


@case
def rename_over_file() -> None:
    put("a", b"new")
    put("b", b"old")
    os.rename("a", "b")
    assert get("b") == b"new" and os.listdir(".") == ["b"]


@case
def rename_over_open_file() -> None:
    put("a", b"new")
    put("b", b"old")
    with opened("b") as fd:
        os.rename("a", "b")
        assert os.read(fd, 10) == b"old"
        assert os.fstat(fd).st_nlink == 0
    assert get("b") == b"new"


@case
def rename_of_open_file() -> None:
    put("a", b"x" * 100)
    with opened("a") as fd:
        os.rename("a", "b")
        assert os.read(fd, 1000) == b"x" * 100
        assert os.fstat(fd).st_nlink == 1


@case
def rename_missing() -> None:
    with fails(errno.ENOENT):
        os.rename("no", "b")


@case
def rename_noreplace() -> None:
    put("a", b"a")
    put("b", b"b")
    with fails(errno.EEXIST):
        renameat2("a", "b", RENAME_NOREPLACE)
    assert get("b") == b"b"
    renameat2("a", "c", RENAME_NOREPLACE)
    assert get("c") == b"a" and not os.path.exists("a")


@case
def rename_exchange() -> None:
    put("a", b"a")
    os.mkdir("d")
    put("d/f", b"f")
    renameat2("a", "d", RENAME_EXCHANGE)
    assert get("d") == b"a" and get("a/f") == b"f"
    with fails(errno.ENOENT):
        renameat2("d", "no", RENAME_EXCHANGE)


@case
def rename_bad_flags() -> None:
    put("a")
    with fails(errno.EINVAL):
        renameat2("a", "b", RENAME_NOREPLACE | RENAME_EXCHANGE)


@case
def rename_across_directories() -> None:
    os.makedirs("x/y")
    os.mkdir("z")
    put("x/y/f", b"1")
    os.rename("x/y/f", "z/g")
    assert get("z/g") == b"1" and os.listdir("x/y") == []


@case
def rename_loop_of_names() -> None:
    """The temp-and-rename idiom, many times: the name is never missing and never short."""
    put("f", b"%06d" % 0)
    stop = threading.Event()
    bad: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                data = get("f")
                if len(data) != 6:
                    bad.append(data)
            except OSError as error:
                bad.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(300):
            put("t", b"%06d" % number)
            os.replace("t", "f")
    finally:
        stop.set()
        reader.join()
    assert not bad


@case
def unlink_open_file() -> None:
    put("f", b"kept")
    with opened("f") as fd:
        os.unlink("f")
        assert os.fstat(fd).st_nlink == 0
        assert os.read(fd, 10) == b"kept"
        with fails(errno.ENOENT):
            os.stat("f")


@case
def unlink_own_open_file() -> None:
    """A file that is removed by its writer while open can be written and read on, and is gone."""
    with opened("f", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"one")
        os.unlink("f")
        os.write(fd, b" two")
        assert os.pread(fd, 10, 0) == b"one two"
        assert os.fstat(fd).st_nlink == 0
    assert os.listdir(".") == []


@case
def unlink_missing() -> None:
    with fails(errno.ENOENT):
        os.unlink("no")


@case
def unlink_and_create_again() -> None:
    for number in range(50):
        put("f", b"%d" % number)
        assert get("f") == b"%d" % number
        os.unlink("f")
        assert not os.path.exists("f")


@case
def temporary_files() -> None:
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"x" * 1000)
        file.seek(0)
        assert len(file.read()) == 1000
    with tempfile.NamedTemporaryFile(dir=".") as named:
        named.write(b"y")
        named.flush()
        assert get(named.name) == b"y"
    assert os.listdir(".") == []


@case
def rmtree() -> None:
    for number in range(10):
        os.makedirs(f"t/{number}/x")
        put(f"t/{number}/f")
        os.symlink("f", f"t/{number}/l")
    shutil.rmtree("t")
    assert os.listdir(".") == []


# -------------------------------------------------------------------------------------------------------------- names


@case
def name_of_255_bytes() -> None:
    name = "n" * 255
    put(name, b"x")
    assert get(name) == b"x" and os.listdir(".") == [name]
    os.rename(name, "m" * 255)
    put("m" * 255, b"y")
    os.mkdir("d" * 255)
    os.symlink("x", "l" * 255)
    os.unlink("m" * 255)


@case
def name_of_256_bytes() -> None:
    name = "n" * 256
    put("f")
    for action in (
        lambda: put(name),
        lambda: os.stat(name),
        lambda: os.mkdir(name),
        lambda: os.rename("f", name),
        lambda: os.link("f", name),
        lambda: os.symlink("x", name),
        lambda: os.unlink(name),
    ):
        with fails(errno.ENAMETOOLONG):
            action()


@case
def name_of_255_bytes_in_utf8() -> None:
    name = "ü" * 127 + "x"
    put(name)
    with opened(name, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"more")
    assert get(name) == b"datamore" and os.listdir(".") == [name]


@case
def name_not_utf8() -> None:
    name = b"\xff\xfe\x80name"
    put(name, b"x")
    assert get(name) == b"x" and os.listdir(b".") == [name]
    os.rename(name, b"\x01\x02\xf0")
    assert os.listdir(b".") == [b"\x01\x02\xf0"]
    os.unlink(b"\x01\x02\xf0")


@case
def name_special_characters() -> None:
    names = [b" ", b"a b", b"tab\t", b"new\nline", b"quote'\"", b"back\\slash", b"*", b"?", b"~", b"-", b"...", b"\x7f"]
    for name in names:
        put(name, name)
    assert sorted(os.listdir(b".")) == sorted(names)
    assert all(get(name) == name for name in names)


@case
def name_case_is_significant() -> None:
    put("a", b"lower")
    put("A", b"upper")
    assert get("a") == b"lower" and get("A") == b"upper"


@case
def path_near_path_max() -> None:
    piece = "p" * 199
    depth = 20  # 200 bytes each
    path = "/".join([piece] * depth)
    os.makedirs(path)
    name = "f" * (4095 - len(path) - 1)
    full = f"{path}/{name}"
    assert len(full) == 4095
    put(full, b"at the limit")
    assert get(full) == b"at the limit"
    with opened(full, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"!")
    assert get(full) == b"at the limit!"
    with fails(errno.ENAMETOOLONG):
        os.stat(full + "f")


@case
def path_beyond_path_max() -> None:
    """With chdir a tree is deeper than any path can say."""
    here = os.open(".", os.O_RDONLY)
    try:
        for _ in range(30):
            os.mkdir("q" * 250)
            os.chdir("q" * 250)
        put("f", b"very deep")
        assert get("f") == b"very deep"
        os.rename("f", "g")
        assert os.listdir(".") == ["g"]
    finally:
        os.fchdir(here)
        os.close(here)
    shutil.rmtree("q" * 250)


# --------------------------------------------------------------------------------------------------- locks and events


@case
def flock_excludes() -> None:
    put("x.lock", b"")
    with opened("x.lock", os.O_RDWR) as one, opened("x.lock", os.O_RDWR) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_SH)
        fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)


@case
def record_locks_between_processes() -> None:
    put("x.lock", b"0123456789")
    with opened("x.lock", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 5, 0)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            answers = b""
            with opened("x.lock", os.O_RDWR) as mine:
                for start in (0, 5):
                    try:
                        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, start)
                        answers += b"y"
                    except OSError:
                        answers += b"n"
            os.write(write_end, answers)
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(read_end, 10) == b"ny"
        os.close(read_end)
        os.close(write_end)


@case
def inotify_of_own_changes() -> None:
    """A watcher is told of what happens through the same mount."""
    close_write, moved_from, moved_to, create, delete = 0x8, 0x40, 0x80, 0x100, 0x200
    fd = checked(LIBC.inotify_init1(os.O_NONBLOCK))
    try:
        checked(LIBC.inotify_add_watch(fd, b".", close_write | moved_from | moved_to | create | delete))
        put("f")
        os.rename("f", "g")
        os.unlink("g")
        os.mkdir("d")
        data, events = os.read(fd, 65536), []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            events.append((mask & 0xFFF, data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
        wanted = [(close_write, b"f"), (moved_from, b"f"), (moved_to, b"g"), (delete, b"g"), (create, b"d")]
        assert [event for event in events if event in wanted] == wanted, events
    finally:
        os.close(fd)


@case
def threads_in_one_directory() -> None:
    errors: list[object] = []

    def work(number: int) -> None:
        try:
            for step in range(40):
                name = f"{number}-{step}"
                put(name, name.encode())
                os.rename(name, name + "x")
                assert get(name + "x") == name.encode()
                os.unlink(name + "x")
        except (OSError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(".") == []


# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bare", "mount"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory in which the cases run; one mount serves them all."""
    base = tmp_path_factory.mktemp("posix")
    if request.param == "bare":
        yield base
        return
    with mounted(base / "backing", base / "mnt") as mount:
        yield mount.path


def test_number_of_cases() -> None:
    """No case disappears without notice."""
    assert len(CASES) == COUNT


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, place: Path) -> None:
    """The case does in this place what POSIX, and the bare filesystem, say."""
    directory = place / name.replace("_", "-")
    directory.mkdir()
    before, mask = os.getcwd(), os.umask(0o022)
    os.chdir(directory)
    try:
        CASES[name]()
    finally:
        os.chdir(before)
        os.umask(mask)
    shutil.rmtree(directory)
