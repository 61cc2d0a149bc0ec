"""Requests that the C extension answers: they must not differ from Python's, nor from the truth, in anything.

Every mount of this file has `hot=on`, also where the rest of the run has it off.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import actor
from tests.mount.test_daemon import hanging_underlay, resources
from tests.support.clients import client_program
from tests.support.mounting import Mount, safefs, status, wait_until

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, SETLK, SETLKW = 1, 2, 3, 14, 15, 18, 25, 32, 33
SECONDS = float(os.environ.get("SAFEFS_HOT_SECONDS", "4"))


@pytest.fixture
def hot_mount(make_mount: MountFactory) -> Callable[..., Mount]:
    return lambda *options: make_mount("-o", ",".join(("hot=on", *options)))


def answered(mount: Mount, opcode: int) -> int:
    return int(status(mount)["hot"]["answered"].get(str(opcode), 0))


def forget_everything() -> None:
    """Have the kernel give back what it knows of names that nobody uses."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


# What is answered by whom.


@pytest.mark.parametrize("passthrough", ["on", "off"])
def test_reading_needs_no_python(passthrough: str, hot_mount: Callable[..., Mount], backing: Path) -> None:
    """stat, open, read and close of a thousand files: all but a few requests are answered by the extension."""
    for number in range(1000):
        (backing / f"f{number}").write_bytes(b"%d" % number)
    mount = hot_mount(f"entry_timeout=0,attr_timeout=0,passthrough={passthrough}")
    for number in range(1000):
        path = mount / f"f{number}"
        assert path.stat().st_size == len(str(number))
        assert path.read_bytes() == b"%d" % number
        assert path.stat().st_ino == (backing / f"f{number}").stat().st_ino
    counts = status(mount)["hot"]
    reads = 0 if passthrough == "on" else 990
    for opcode, at_least in ((LOOKUP, 1900), (OPEN, 990), (READ, reads), (RELEASE, 990)):
        assert counts["answered"].get(str(opcode), 0) >= at_least, (opcode, counts)
        assert counts["passed"].get(str(opcode), 0) <= 50, (opcode, counts)


def test_a_close_needs_no_python_unless_the_process_has_record_locks(
    hot_mount: Callable[..., Mount], backing: Path
) -> None:
    for name in ("data", *map(str, range(300))):
        (backing / name).write_bytes(b"x")
    mount = hot_mount("flush_readers=on")

    def through_python() -> int:
        """How many FLUSHes of 300 readers went through Python."""
        before = status(mount)["hot"]
        for number in range(300):
            (mount / str(number)).read_bytes()
        after = status(mount)["hot"]
        passed, answered = (
            after[way].get(str(FLUSH), 0) - before[way].get(str(FLUSH), 0) for way in ("passed", "answered")
        )
        assert passed + answered >= 300
        return int(passed)

    assert through_python() < 20
    with opened(mount / "data", os.O_RDONLY) as fd:
        fcntl.lockf(fd, fcntl.LOCK_SH)
        assert through_python() >= 300
        fcntl.lockf(fd, fcntl.LOCK_UN)
        (mount / "data").read_bytes()  # POSIX: whatever it has locked of the file ends here
        assert through_python() < 20


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# Files that are written in place, and one that is not; opened by Python and by the extension.
lockable = pytest.mark.parametrize(
    ("name", "flags"), [("x.lock", os.O_RDWR), ("x.db", os.O_RDWR), ("data", os.O_RDONLY)]
)


@lockable
@pytest.mark.parametrize("locks", ["memory", "leasefile"])
def test_a_lock_that_nobody_contends_for_needs_no_python(
    name: str, flags: int, locks: str, hot_mount: Callable[..., Mount], backing: Path
) -> None:
    """But for the first request, and with a lease for one in each of its periods."""
    (backing / name).write_text("x")
    mount = hot_mount(f"locks={locks}")
    with opened(mount / name, flags) as fd:
        for _ in range(200):
            for operation in (fcntl.LOCK_EX, fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_UN):
                fcntl.flock(fd, operation)
        counts = status(mount)["hot"]
    assert sum(counts["answered"].get(str(opcode), 0) for opcode in (SETLK, SETLKW)) > 550
    assert sum(counts["passed"].get(str(opcode), 0) for opcode in (SETLK, SETLKW)) < 20


@lockable
@pytest.mark.parametrize("locks", ["memory", "leasefile"])
def test_what_the_extension_locks_is_locked_for_all(
    name: str, flags: int, locks: str, hot_mount: Callable[..., Mount], backing: Path
) -> None:
    """After any number of requests that it has answered: by another process, and by the report."""
    (backing / name).write_text("x")
    mount = hot_mount(f"locks={locks}")
    mounts = [mount] if locks == "memory" else [mount, hot_mount(f"locks={locks}")]
    exclusive, shared = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
    for other in mounts:
        with opened(mount / name, flags) as one, opened(other / name, flags) as two:
            for turn in ((), (fcntl.LOCK_EX,), (fcntl.LOCK_SH,), (fcntl.LOCK_SH, fcntl.LOCK_EX), ()):
                for operation in 3 * (fcntl.LOCK_EX, fcntl.LOCK_UN) + turn:
                    fcntl.flock(one, operation)
                held = {fcntl.LOCK_EX: "exclusive", fcntl.LOCK_SH: "shared", fcntl.LOCK_UN: ""}[
                    (fcntl.LOCK_UN, *turn)[-1]
                ]
                report = json.loads(safefs("locks", "--at", mount.path, "--json").stdout)
                assert [entry["mode"] for entry in report if entry["state"] == "held"] == [held] * bool(held)
                for wanted, refused in ((exclusive, bool(held)), (shared, held == "exclusive")):
                    assert (flock_errno(two, wanted) == errno.EAGAIN) == refused, (held, wanted)
                    fcntl.flock(two, fcntl.LOCK_UN)
                fcntl.flock(one, fcntl.LOCK_UN)


def flock_errno(fd: int, operation: int) -> int:
    try:
        fcntl.flock(fd, operation)
    except OSError as error:
        return error.errno or 0
    return 0


def test_a_lock_is_free_once_its_file_is_closed(hot_mount: Callable[..., Mount]) -> None:
    """However it was locked last; the descriptors of the extension have their numbers again and again."""
    mount = hot_mount("locks=memory")
    (mount / "data").write_text("x")
    for name, flags in (("x.lock", os.O_RDWR | os.O_CREAT), ("data", os.O_RDONLY)):
        for _ in range(50):
            with opened(mount / name, flags) as one:
                for operation in (fcntl.LOCK_EX, fcntl.LOCK_UN, fcntl.LOCK_EX):
                    fcntl.flock(one, operation)
            with opened(mount / name, flags) as two:
                fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert wait_until(lambda: status(mount)["locks"]["held"] == 0)


def test_off_means_off(make_mount: MountFactory) -> None:
    mount = make_mount("-o", "hot=off")
    (mount / "file").write_text("x")
    assert (mount / "file").read_text() == "x"
    assert status(mount)["hot"] is None


@pytest.mark.parametrize("name", ["a.lock", "data.sqlite", "x.part", ".safefs~a", "ünï"])
def test_names_that_only_python_can_judge(name: str, hot_mount: Callable[..., Mount], backing: Path) -> None:
    """Names of another class, and those that a glob could mean, are neither opened by the extension nor cached."""
    (backing / name).write_text("one")
    mount = hot_mount("entry_timeout=60,attr_timeout=60")
    path = mount / name
    if name.startswith(".safefs~"):
        assert not path.exists()
        return
    assert path.stat().st_size == 3
    before = answered(mount, OPEN)
    assert path.read_text() == "one"
    assert answered(mount, OPEN) == before
    if name != "ünï":
        with open(backing / name, "a") as file:
            file.write("two")
        assert path.stat().st_size == 6


@pytest.mark.parametrize("name", ["a.lock", "data.sqlite"])
def test_looking_at_a_file_that_is_written_in_place(name: str, hot_mount: Callable[..., Mount], backing: Path) -> None:
    """The extension says what it is like now: lock files are looked at all the time, and change at any time."""
    mount = hot_mount("entry_timeout=60,attr_timeout=60")
    path = mount / name
    path.write_text("")
    with opened(path) as fd:
        before = [answered(mount, opcode) for opcode in (LOOKUP, GETATTR)]
        for size in range(1, 101):
            (backing / name).write_bytes(b"x" * size)
            assert os.fstat(fd).st_size == path.stat().st_size == size
        after = [answered(mount, opcode) for opcode in (LOOKUP, GETATTR)]
    assert all(now - then >= 95 for then, now in zip(before, after, strict=True))
    (backing / "new").write_bytes(b"another")
    os.rename(backing / "new", backing / name)
    assert path.stat().st_ino == (backing / name).stat().st_ino
    path.rename(mount / "data")  # of a class that is written apart
    path.write_text("a new one")
    assert (mount / "data").read_text() == "another"
    assert path.stat().st_size == 9
    os.unlink(backing / name)
    assert not path.exists()


def test_looking_at_two_names_of_a_file_that_is_written_in_place(
    hot_mount: Callable[..., Mount], backing: Path
) -> None:
    """As they are made by locks that link one claim to the next; whichever of them was looked at last."""
    mount = hot_mount("entry_timeout=60,attr_timeout=60")
    one, two = mount / "1-v1-2.claim", mount / "2-v1-2.claim"
    one.write_text("")
    os.link(one, two)
    before = [answered(mount, opcode) for opcode in (LOOKUP, GETATTR)]
    with opened(one) as first, opened(two) as second:
        for size in range(1, 101):
            (backing / one.name).write_bytes(b"x" * size)
            assert one.stat().st_size == two.stat().st_size == size
            assert os.fstat(first).st_size == os.fstat(second).st_size == size
    after = [answered(mount, opcode) for opcode in (LOOKUP, GETATTR)]
    assert all(now - then >= 190 for then, now in zip(before, after, strict=True))
    (backing / "new").write_bytes(b"another")
    os.rename(backing / "new", backing / one.name)
    assert (one.stat().st_size, two.stat().st_size) == (7, 100)
    os.unlink(backing / two.name)
    assert not two.exists()
    os.link(one, mount / "data")  # of a class that is written apart
    (mount / "data").write_text("a new one")
    assert (mount / "data").read_text() == "a new one"
    assert one.read_text() == "another"
    assert [(mount / name).stat().st_size for name in ("data", one.name, "data")] == [9, 7, 9]


def test_what_the_extension_opened_can_do_what_other_handles_can(hot_mount: Callable[..., Mount]) -> None:
    """lseek(SEEK_DATA), copy_file_range, fsync, fstat, a map and reads past the end, on a handle of the extension."""
    mount = hot_mount()
    path = mount / "file"
    with open(path, "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    before = answered(mount, OPEN)
    with open(path, "rb") as file, open(mount / "copy", "wb") as copy:
        assert answered(mount, OPEN) > before
        fd = file.fileno()
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert os.copy_file_range(fd, copy.fileno(), 3, 1 << 20, 0) == 3
        os.fsync(fd)
        assert os.fstat(fd).st_size == (1 << 20) + 3
        assert os.pread(fd, 10, (1 << 20) + 3) == b""
        assert os.pread(fd, 10, 1 << 20) == b"end"
    assert (mount / "copy").read_bytes() == b"end"


def test_a_file_with_two_names_is_never_stale(hot_mount: Callable[..., Mount], backing: Path) -> None:
    mount = hot_mount("entry_timeout=60,attr_timeout=60")
    (mount / "one").write_text("first")
    os.link(mount / "one", mount / "two")
    for _ in range(3):
        assert (mount / "one").stat().st_nlink == (mount / "two").stat().st_nlink == 2
        assert (mount / "one").read_text() == (mount / "two").read_text() == "first"
    (backing / "new").write_text("second")
    os.replace(backing / "new", backing / "two")  # by another node
    assert (mount / "two").read_text() == "second"
    assert (mount / "one").read_text() == "first"
    assert (mount / "one").stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_a_path_through_what_another_node_replaced(kind: str, two_mounts: tuple[Mount, Mount]) -> None:
    """open(), also of a new file, goes through the directory or symbolic link that is there now."""
    first, second = two_mounts
    for number in range(20):
        for name in ("old", "new"):
            (first / f"{name}{number}").mkdir()
            (first / f"{name}{number}" / "file").write_text(name)
        if kind == "link":
            (first / "path").unlink(missing_ok=True)
            (first / "path").symlink_to(f"old{number}")
        else:
            os.rename(first / f"old{number}", first / "path")
        assert (second / "path" / "file").read_text() == "old"
        if kind == "link":
            (first / "next").symlink_to(f"new{number}")
            os.replace(first / "next", first / "path")
        else:
            os.rename(first / "path", first / f"gone{number}")
            os.rename(first / f"new{number}", first / "path")
        assert (second / "path" / "file").read_text() == "new"
        (second / "path" / "more").write_text("more")
        assert (first / "path" / "more").read_text() == "more"
        if kind == "directory":
            os.rename(first / "path", first / f"done{number}")


def test_a_name_that_the_kernel_keeps_is_checked_when_its_file_has_got_another(
    hot_mount: Callable[..., Mount], backing: Path
) -> None:
    """open() of the first name of a file is right, though the file was found under its second name since."""
    mount = hot_mount("entry_timeout=60,attr_timeout=60")
    (backing / "one").write_text("first")
    assert (mount / "one").read_text() == "first"
    os.link(backing / "one", backing / "two")
    assert (mount / "two").stat().st_nlink == 2
    (backing / "new").write_text("second")
    os.replace(backing / "new", backing / "one")  # by another node
    for _ in range(2):
        assert (mount / "one").read_text() == "second"
        assert (mount / "two").read_text() == "first"


def test_rights_are_the_callers(hot_mount: Callable[..., Mount], backing: Path) -> None:
    """A user gets no further than the backing lets him, and as far as his supplementary groups let him."""
    (backing / "secret").mkdir(mode=0o700)
    (backing / "secret" / "file").write_text("x")
    (backing / "file").write_text("x")
    (backing / "file").chmod(0o600)
    (backing / "grouped").write_text("x")
    os.chown(backing / "grouped", 0, 4242)
    (backing / "grouped").chmod(0o640)
    mount = hot_mount("nodefault_permissions")  # so that nobody but the daemon checks
    assert (mount / "secret" / "file").read_text() == (mount / "file").read_text() == "x"
    user, cwd = {"uid": 61001, "gid": 61001}, mount.path
    with actor(**user, cwd=cwd) as stranger, actor(**user, groups=(4242,), cwd=cwd) as member:
        for name in ("secret/file", "file", "grouped"):
            assert stranger.errno("open(p)", p=name) == errno.EACCES
        assert member("open(p).read()", p="grouped") == "x"
        assert member.errno("open(p)", p="file") == errno.EACCES


# Coherence.

WRITER = """
import mmap, os, sys, time
base, seconds, number, shared = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
page = mmap.mmap(os.open(shared, os.O_RDWR), 4096)
path, version, end = f"{base}/f{number}", 0, time.monotonic() + seconds
while time.monotonic() < end:
    version += 1
    data = b"%d " % version + b"x" * version
    kind = version % 3
    if kind == 0:
        open(path, "wb").write(data)
    elif kind == 1:
        open(path + ".new", "wb").write(data)
        os.replace(path + ".new", path)
    else:
        with open(path, "r+b") as file:
            file.write(data)
            file.truncate(len(data))
    page[number * 8 : number * 8 + 8] = version.to_bytes(8, "little")
    if version % 7 == 0:
        gone = f"{base}/gone{number}"
        open(gone, "w").close(); os.stat(gone)
        os.unlink(gone)
        assert not os.path.exists(gone), "unlinked and still there"
        open(gone, "w").close()
        os.rename(gone, gone + "2")
        assert not os.path.exists(gone) and os.path.exists(gone + "2"), "renamed and still there"
        os.unlink(gone + "2")
    time.sleep(0.002 * (version % 4))
"""

READER = """
import mmap, os, sys, time
base, seconds, files, shared, strict = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
page = mmap.mmap(os.open(shared, os.O_RDWR), 4096)
end, looks = time.monotonic() + seconds, 0
while time.monotonic() < end:
    for number in range(files):
        known = int.from_bytes(page[number * 8 : number * 8 + 8], "little")
        if not known:
            continue
        path = f"{base}/f{number}"
        if strict:
            size = os.stat(path).st_size
            assert size >= len(b"%d " % known) + known, f"stat: size {size}, version {known}"
        with open(path, "rb") as file:
            data = file.read()
            first, _, rest = data.partition(b" ")
            assert int(first) >= known, f"read version {int(first)}, {known} was published"
            assert len(rest) == int(first), "torn"
            assert os.fstat(file.fileno()).st_size == len(data)
        looks += 1
print(looks)
"""


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("options", ["temp=auto", "temp=hidden", "entry_timeout=30,attr_timeout=30"])
def test_readers_see_what_was_published(
    nodes: int, options: str, hot_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """After close() or rename() no reader on the mount sees what was before; on another node no open() does."""
    mounts = [hot_mount(options) for _ in range(nodes)]
    shared = tmp_path / "versions"
    shared.write_bytes(bytes(4096))
    files = 3
    for number in range(files):
        (mounts[0] / f"f{number}").write_bytes(b"0 ")

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    running = [start(WRITER, mounts[0].path, SECONDS, number, shared) for number in range(files)]
    running += [start(READER, mounts[0].path, SECONDS, files, shared, 1) for _ in range(2)]
    running += [start(READER, mount.path, SECONDS, files, shared, 0) for mount in mounts[1:]]
    for process in running:
        output = process.communicate(timeout=SECONDS + 60)[0]
        assert process.returncode == 0, output
    assert answered(mounts[0], LOOKUP) > 100


def test_a_second_node_sees_a_new_version_within_the_validity(hot_mount: Callable[..., Mount]) -> None:
    """stat() of another node may show the old version for entry_timeout; open() never does."""
    first, second = hot_mount(), hot_mount()
    (first / "file").write_text("one")
    for _ in range(8):
        (second / "file").stat()
        size = (first / "file").stat().st_size + 1
        (first / "file").write_text("x" * size)
        assert len((second / "file").read_text()) == size
        (second / "file").stat()
        (first / "file").write_text("x" * (size + 1))
        assert wait_until(lambda size=size: (second / "file").stat().st_size == size + 1, 1.5)


# Accounting.


@pytest.mark.timeout(200)
def test_references_balance(hot_mount: Callable[..., Mount], backing: Path) -> None:
    """A tree that was walked, read and forgotten leaves no node, no descriptor and little memory, time after time."""
    for directory in range(40):
        (backing / f"d{directory}").mkdir()
        for number in range(50):
            (backing / f"d{directory}" / f"f{number}").write_text("x")
    mount = hot_mount()
    walk = f"find {mount.path} -size -100k -exec cat {{}} + >/dev/null 2>&1; true"
    subprocess.run(["sh", "-c", walk], check=True)
    forget_everything()
    before = None

    def known_after_a_walk() -> int:
        subprocess.run(["sh", "-c", walk], check=True)
        return int(status(mount)["hot"]["born"])

    for _ in range(2):
        # Another test may have the kernel forget everything at this moment, too.
        assert wait_until(lambda: known_after_a_walk() > 1000, 30)
        with open(mount / "d0" / "f0", "a") as file:  # Python takes some of them over
            file.write("y")
        forget_everything()
        # The kernel forgets in its own time, and keeps what somebody looks at: what leaks never goes.
        assert wait_until(lambda: (forget_everything() or status(mount)["hot"]["born"]) < 10, 30)
        assert wait_until(lambda: status(mount)["inodes"] < 10, 10), status(mount)
        now = resources(mount)
        before = before or now
        assert now[0] <= before[0] + 20
        assert now[1] <= before[1] + 4000


def test_forgetting_under_load(hot_mount: Callable[..., Mount], backing: Path) -> None:
    """FORGETs race with lookups of the same names: nothing is lost, nothing stays."""
    for number in range(200):
        (backing / f"f{number}").write_text("x")
    mount = hot_mount("entry_timeout=0,attr_timeout=0")
    code = (
        "import time\nend = time.monotonic() + seconds\n"
        "while time.monotonic() < end:\n"
        "    for n in range(200):\n        assert open(base + '/f%d' % n).read() == 'x'\n"
    )
    with actor() as one, actor() as two:
        for party in (one, two):
            party.start(code, base=str(mount.path), seconds=SECONDS / 2)
        end = time.monotonic() + SECONDS / 2
        while time.monotonic() < end:
            forget_everything()
        for party in (one, two):
            party.result(60)
    assert wait_until(lambda: (forget_everything() or status(mount)["hot"]["born"]) == 0, 20)
    assert wait_until(lambda: status(mount)["inodes"] <= 2, 10)


def test_a_new_file_costs_the_interpreter_three_requests(hot_mount: Callable[..., Mount]) -> None:
    """CREATE, FLUSH and RELEASE: of the other two that the kernel would send it asks for no attributes before the file
    is open, and the extension knows that a new file has no capability."""
    mount, getattr_, getxattr = hot_mount(), "3", "22"
    for number in range(20):
        fd = os.open(mount / f"new{number}", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"x")
        os.close(fd)
    passed = status(mount)["hot"]["passed"]
    assert passed.get(getattr_, 0) < 15 and passed.get(getxattr, 0) == 0, passed
    assert passed["35"] == 20  # CREATE


@pytest.mark.parametrize("removed", [False, True], ids=["set", "removed"])
def test_a_capability_of_an_open_file_is_not_passed_over(hot_mount: Callable[..., Mount], removed: bool) -> None:
    """One that is set while the file is being written, or on its version while its writer still has it open."""
    mount = hot_mount()
    value = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep
    with open(mount / "tool", "wb") as file:
        file.write(b"x")
        file.flush()
        os.setxattr(mount / "tool", "security.capability", value)
        assert os.getxattr(mount / "tool", "security.capability") == value
        if removed:
            os.removexattr(mount / "tool", "security.capability")
    if removed:
        with pytest.raises(OSError, match="No data"):
            os.getxattr(mount / "tool", "security.capability")
    else:
        assert os.getxattr(mount / "tool", "security.capability") == value
    os.setxattr(mount / "tool", "security.capability", value)
    assert os.getxattr(mount.backing / "tool", "security.capability") == value


# A backing that hangs.


def test_more_hanging_readers_than_threads(hot_mount: Callable[..., Mount], backing: Path, tmp_path: Path) -> None:
    """A hundred processes that hang in stat leave the mount to the others."""
    with hanging_underlay(backing, tmp_path / "source") as underlay:
        mount = hot_mount("entry_timeout=0,attr_timeout=0")
        (mount / "work").mkdir()
        assert (mount / "slow" / "file").stat().st_size
        underlay.send_signal(signal.SIGSTOP)
        command = ["stat", str(mount / "slow" / "file")]
        hanging = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(100)]
        time.sleep(2)
        assert all(process.poll() is None for process in hanging), "nothing hung"
        begin = time.monotonic()
        for number in range(20):
            (mount / "work" / f"f{number}").write_text("x")
            assert (mount / "work" / f"f{number}").read_text() == "x"
        assert time.monotonic() - begin < 10
        underlay.send_signal(signal.SIGCONT)
        assert [process.wait(30) for process in hanging] == [0] * 100
        # The threads that answered them end, all but the two that wait for the next request.
        assert wait_until(lambda: status(mount)["hot"]["threads"] == 2, 10)


def remove_while_known(large: Path) -> None:
    """The kernel forgets the inode with this close."""
    fd = os.open(large, os.O_PATH)
    large.unlink()
    os.close(fd)


def remove_while_read(large: Path) -> None:
    with open(large, "rb") as file:
        file.read(1)
        large.unlink()


def rewrite(large: Path) -> None:
    large.write_text("new")
    assert large.read_text() == "new"


@contextmanager
def ending_the_hang(hanging: Path) -> Iterator[None]:
    """At the end of the block; earlier when that does not come, so that a mount that stands still goes on."""
    timer = threading.Timer(15, hanging.unlink, kwargs={"missing_ok": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        hanging.unlink(missing_ok=True)


def make_and_remove(mount: Mount, count: int) -> None:
    for number in range(count):
        path = mount / f"f{number}"
        path.write_text("x")
        assert path.read_text() == "x"
        path.unlink()
        assert os.statvfs(mount.path).f_bsize


@pytest.mark.parametrize("hot", ["on", "off"])
@pytest.mark.parametrize("end", [remove_while_known, remove_while_read, rewrite])
def test_the_last_close_of_an_inode_stalls_nobody(
    hot: str, end: Callable[[Path], None], make_mount: MountFactory, backing: Path, tmp_path: Path
) -> None:
    """While the close(2) that frees a file waits for the backing, the mount goes on; then nothing is left open."""
    hanging = tmp_path / "hanging"
    library = client_program("hanging_close", "-shared", "-fPIC")
    preload = {"LD_PRELOAD": str(library), "HANGING_CLOSE": str(hanging)}
    (backing / "large").write_text("old")
    mount = make_mount("-o", f"hot={hot}", environment=preload)
    make_and_remove(mount, 1)
    before = resources(mount)[0]
    assert (mount / "large").stat().st_size == 3
    hanging.touch()
    with ending_the_hang(hanging):
        end(mount / "large")
        assert wait_until(lambda: status(mount)["closing"])
        make_and_remove(mount, 20)
        assert status(mount)["closing"] >= 20, "what comes after it is closed after it"
        assert hanging.exists(), "the mount stood still"
    assert wait_until(lambda: status(mount)["closing"] == 0)
    assert wait_until(lambda: resources(mount)[0] <= before + 3), (before, resources(mount))
