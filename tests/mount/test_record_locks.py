"""When record locks end: with any close of the file by its process (fcntl(2)), and only then.

Where nothing else is said the tests also run on the bare directory: what they expect is what the kernel does.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor
from tests.mount.lockers import (
    BLOCK,
    BLOCKED,
    CREATE,
    NAMES,
    RELEASE,
    SECONDS,
    TRY,
    Make,
    hold_publishes,
    hot,
    opened,
    waits,
)
from tests.support.mounting import Mount, safefs, status, wait_until


@pytest.mark.parametrize("name", NAMES)
def test_a_process_loses_its_locks_by_any_close(place: Path, party: Make, name: str) -> None:
    """fcntl(2): closing any descriptor of the file, also one that was opened for reading later."""
    one, two = party(), party()
    opened(one, place / name)
    opened(two, place / name)
    one(TRY["fcntl"])
    one("os.close(os.open(p, os.O_RDONLY))", p=str(place / name))
    two(TRY["fcntl"])


@pytest.fixture(params=["bare", "mount"])
def place(request: pytest.FixtureRequest, tmp_path: Path, make_mount: MountFactory) -> Path:
    """A directory where each close is heard of: on a mount, or as the control a bare one."""
    if request.param == "mount":
        return make_mount("-o", "flush_readers=on").path
    (tmp_path / "bare").mkdir()
    return tmp_path / "bare"


READ = ["data", "x.lock", "db.sqlite"]  # whoever writes takes a partial file over
CLOSE_LATER = "other = os.open(p, os.O_RDONLY); os.close(other)"
CLOSE_COPY = "other = os.dup(fd); os.close(other)"
CLOSE_FIRST = "other = os.dup(fd); os.close(fd)"


def reader_and_writer(path: Path, party: Make) -> tuple[Actor, Actor]:
    """One has locked a file for reading, through a descriptor that only reads; the other tries to for writing."""
    reader, writer = party(), party()
    opened(reader, path, os.O_RDONLY)
    opened(writer, path, os.O_RDWR)
    reader("record(fd, SET, SHARED)")
    assert writer.errno(TRY["fcntl"]) in BLOCKED
    return reader, writer


@pytest.mark.parametrize("closes", [CLOSE_LATER, CLOSE_COPY, CLOSE_FIRST], ids=["later", "copy", "first"])
@pytest.mark.parametrize("name", READ)
def test_a_reader_loses_its_locks_by_any_close(place: Path, party: Make, name: str, closes: str) -> None:
    (place / name).write_text("x")
    before, _ = reader_and_writer(place / name, party)  # now it is known that such files are locked
    before.exit()
    reader, writer = reader_and_writer(place / name, party)
    reader(closes, p=str(place / name))
    writer(TRY["fcntl"])


@hot
@pytest.mark.parametrize("closes", [CLOSE_COPY, CLOSE_FIRST], ids=["copy", "first"])
def test_what_a_reader_opened_before_anybody_locked(
    make_mount: MountFactory, party: Make, hot: str, closes: str
) -> None:
    path = make_mount("-o", f"hot={hot},flush_readers=on") / "data"
    path.write_text("x")
    reader, writer = reader_and_writer(path, party)
    reader(closes)
    writer(TRY["fcntl"])


@hot
def test_a_killed_reader_whose_parent_has_the_file_open(make_mount: MountFactory, party: Make, hot: str) -> None:
    path = make_mount("-o", f"hot={hot},flush_readers=on") / "data"
    path.write_text("x")
    parent, writer = party(), party()
    opened(parent, path, os.O_RDONLY)
    opened(writer, path, os.O_RDWR)
    child = parent.fork()
    child("record(fd, SET, SHARED)")
    assert writer.errno(TRY["fcntl"]) in BLOCKED
    child.kill(signal.SIGKILL)
    assert wait_until(lambda: writer.errno(TRY["fcntl"]) == 0, SECONDS)


@hot
def test_what_is_heard_of_closes_without_flush_readers(make_mount: MountFactory, party: Make, hot: str) -> None:
    """Of what was open before the first lock the last close alone, of what is opened then each (0005-locks.md)."""
    path = make_mount("-o", f"hot={hot},flush_readers=off") / "data"
    path.write_text("x")
    reader, writer = reader_and_writer(path, party)
    reader(CLOSE_COPY)
    assert writer.errno(TRY["fcntl"]) in BLOCKED
    reader(CLOSE_LATER, p=str(path))
    writer(TRY["fcntl"])


@pytest.mark.parametrize("name", READ)
def test_a_reader_keeps_the_locks_of_its_open_file(place: Path, party: Make, name: str) -> None:
    """OFD: closing another descriptor of the file does not end them."""
    (place / name).write_text("x")
    one, two = party(), party()
    opened(one, place / name, os.O_RDONLY)
    opened(two, place / name, os.O_RDWR)
    for _ in range(2):
        one("record(fd, OFD_SET, SHARED)")
        one(CLOSE_LATER, p=str(place / name))
        one(CLOSE_COPY)
        assert two.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(fd)")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


# Two files that one name has shown, one after the other; and two names of one file.


# How a name comes to show another file; `p` is its path.
CHANGES = {
    "renamed": "os.rename(p, p + '.1')",
    "removed": "os.unlink(p)",
    "replaced": "open(p + '.new', 'w').close(); os.rename(p + '.new', p)",
    "replaced by a draft": "new = open(p + '.new', 'w'); os.rename(p + '.new', p); new.close()",
}


def rotated(
    place: Path, party: Make, how: str = "renamed", *, name: str = "data", unlocks: bool = False
) -> tuple[Actor, Actor]:
    """One has locked a file, and the one that has its name then (`other`), which somebody else opens."""
    one, two = party(), party()
    opened(one, place / name)
    one(TRY["fcntl"])
    if unlocks:
        one(RELEASE["fcntl"])
    one(CHANGES[how], p=str(place / name))
    one("other = os.open(p, os.O_RDWR | os.O_CREAT)")
    one("record(other, SET, EXCLUSIVE)")
    opened(two, place / name)
    assert two.errno(TRY["fcntl"]) in BLOCKED
    return one, two


@pytest.mark.parametrize("step", ["os.close(fd)", "os.close(os.dup(fd))", RELEASE["fcntl"]])
@pytest.mark.parametrize("unlocks", [False, True])
@pytest.mark.parametrize("how", list(CHANGES))
@pytest.mark.parametrize("name", ["data", "x.lock"])
def test_the_old_file_is_closed_after_a_rotation(
    place: Path, party: Make, name: str, how: str, unlocks: bool, step: str
) -> None:
    """What is locked of the new one stays."""
    one, two = rotated(place, party, how, name=name, unlocks=unlocks)
    one(step)
    assert two.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(os.dup(other))")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


def test_the_old_file_is_locked_again_after_a_rotation(place: Path, party: Make) -> None:
    """By the name that it has now."""
    one, _ = rotated(place, party, unlocks=True)
    one(TRY["fcntl"])
    three = party()
    opened(three, place / "data.1")
    assert three.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(fd)")
    assert wait_until(lambda: three.errno(TRY["fcntl"]) == 0, SECONDS)


def test_a_new_file_is_opened_after_a_rotation(mount: Mount, party: Make) -> None:
    """To close it ends nothing of the old one, which keeps the name that it was locked by."""
    one, two = party(), party()
    opened(one, mount / "data")
    one(TRY["fcntl"])
    one("os.rename(p, p + '.1'); os.close(os.open(p, os.O_RDWR | os.O_CREAT))", p=str(mount / "data"))
    opened(two, mount / "data")
    assert two.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(fd)")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


OPENS_AGAIN = "other = os.open(p, os.O_RDWR | os.O_CREAT); record(other, SET, EXCLUSIVE)"
# How `fd` comes to be of another file than the one that `other` has locked, which has the name that was that one's.
STORIES = {
    "not locked, and removed": "os.unlink(p)",
    "not locked, and replaced": "open(p + '.new', 'w').close(); os.rename(p + '.new', p)",
    "locked after it was removed": "os.unlink(p); record(fd, SET, EXCLUSIVE); record(fd, SET, UNLOCK)",
    "renamed and removed": "record(fd, SET, EXCLUSIVE); os.rename(p, p + '.1'); os.unlink(p + '.1')",
    "renamed, and replaced there": "os.rename(p, p + '.1'); open(p + '.2', 'w').close(); os.rename(p + '.2', p + '.1')",
    "written to, and renamed": "open(p, 'w').write('y'); os.rename(p, p + '.1')",
    "removed twice": "os.unlink(p); f = os.open(p, CREATE); record(f, SET, EXCLUSIVE); os.unlink(p); os.close(f)",
}


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
@pytest.mark.parametrize("story", list(STORIES))
@pytest.mark.parametrize("name", ["data", "x.lock"])
def test_a_file_is_closed_that_had_the_name_before(place: Path, party: Make, name: str, story: str, flags: int) -> None:
    """Nothing ends of what is locked of the one that has it now."""
    (place / name).write_text("x")
    one, two = party(), party()
    opened(one, place / name, flags)
    happens = STORIES[story].replace("EXCLUSIVE", "SHARED") if flags == os.O_RDONLY else STORIES[story]
    one(happens, p=str(place / name), CREATE=CREATE)
    one(OPENS_AGAIN)
    opened(two, place / name)
    for step in ("os.close(os.dup(fd))", "record(fd, SET, UNLOCK)", "os.close(fd)"):
        one(step)
        assert two.errno(TRY["fcntl"]) in BLOCKED, step
    one("os.close(other)")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


PLACES = {
    "renamed": "os.rename(p + '.tmp', p)",
    "linked": "os.link(p + '.tmp', p)",
    "renamed over another": "open(p, 'w').write('old'); os.rename(p + '.tmp', p)",
}


@hot
@pytest.mark.parametrize("how", list(PLACES))
@pytest.mark.parametrize("name", ["data", "db.sqlite"])
def test_what_is_locked_before_who_wrote_it_has_closed_it(
    make_mount: MountFactory, party: Make, name: str, how: str, hot: str
) -> None:
    """The file is the same afterwards: whoever has locked it can unlock it, and lock it again."""
    mount = make_mount("-o", f"hot={hot},flush_readers=on")
    writer, one, two = party(), party(), party()
    writer("f = open(p + '.tmp', 'w'); f.write('x'); f.flush()", p=str(mount / name))
    writer(PLACES[how])
    opened(one, mount / name, os.O_RDONLY)
    opened(two, mount / name, os.O_RDWR)
    one("record(fd, SET, SHARED)")
    assert two.errno(TRY["fcntl"]) in BLOCKED
    writer("f.close()")
    assert two.errno(TRY["fcntl"]) in BLOCKED
    for ends in (RELEASE["fcntl"], "os.close(os.dup(fd))", "record(fd, SET, SHARED); os.close(fd)"):
        one("record(fd, SET, SHARED)")
        assert two.errno(TRY["fcntl"]) in BLOCKED
        one(ends)
        assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)
        two(RELEASE["fcntl"])
    assert wait_until(lambda: json.loads(safefs("locks", "--at", mount.path, "--json").stdout) == [], SECONDS)


def test_a_reader_is_closed_after_what_is_published_later(mount: Mount, party: Make) -> None:
    """By a process that others share the file with: its locks end when what it wrote under them is there."""
    (mount / "data").write_text("old")
    for _ in range(10):
        (mount / "data").write_text("old")
        parent, two = party(), party()
        opened(parent, mount / "data", os.O_RDWR)
        opened(two, mount / "data", os.O_RDWR)
        child = parent.fork()
        parent("os.close(fd)")
        child("fcntl.lockf(fd, fcntl.LOCK_EX); other = os.open(p, os.O_RDONLY)", p=str(mount / "data"))
        child("os.pwrite(fd, b'new', 0)")
        two.start("record(fd, WAIT, EXCLUSIVE)")
        time.sleep(0.05)
        child.start("os.closerange(fd, max(fd, other) + 1); os._exit(0)")
        two.result(SECONDS)
        assert two("os.pread(fd, 9, 0)") == b"new"
        two("os.close(fd)")


@pytest.mark.parametrize("step", ["os.close(other)", "record(other, SET, UNLOCK)"])
@pytest.mark.parametrize(
    "change", ["", "os.rename(p, p + '.1')", "open(p + '.2', 'w').close(); os.rename(p + '.2', p)"]
)
def test_a_reader_and_a_writer_are_of_one_file(make_mount: MountFactory, party: Make, change: str, step: str) -> None:
    """Whatever has become of its name, also where it is a version and a draft."""
    mount = make_mount("-o", "flush_readers=on")
    (mount / "data").write_text("x")
    one, three = party(), party()
    opened(one, mount / "data", os.O_RDONLY)
    one("record(fd, SET, SHARED)")
    if "'.1'" in change:
        one(change, p=str(mount / "data"))
        one("other = os.open(p + '.1', os.O_RDWR)")
    else:
        one("other = os.open(p, os.O_RDWR)", p=str(mount / "data"))
        one(change or "None")
    opened(three, mount / "data")
    assert three.errno(TRY["fcntl"]) in BLOCKED
    one(step)
    assert wait_until(lambda: three.errno(TRY["fcntl"]) == 0, SECONDS)


ENDS = ["os.close(other)", "record(other, SET, UNLOCK)", "record(other, SET, SHARED); os.close(fd)"]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
@pytest.mark.parametrize("ends", ENDS)
def test_a_file_is_opened_by_another_name_than_it_was_locked_by(
    make_mount: MountFactory, party: Make, ends: str, flags: int
) -> None:
    """Whatever ends the locks of a process on a file ends those by the name before, and by the new one."""
    mount = make_mount("-o", "flush_readers=on")
    (mount / "data").write_text("x")
    one, two = party(), party()
    opened(one, mount / "data", flags)
    one("record(fd, SET, SHARED)")
    one("os.rename(p, p + '.1'); other = os.open(p + '.1', flags)", p=str(mount / "data"), flags=flags)
    opened(two, mount / "data")  # a new file of the name that the lock is on
    assert two.errno(TRY["fcntl"]) in BLOCKED
    one(ends)
    two(TRY["fcntl"])
    two("fd = os.open(p, os.O_RDWR)", p=str(mount / "data.1"))
    two(TRY["fcntl"])


@pytest.mark.parametrize("name", ["old", "new"])
def test_readers_of_a_file_that_was_renamed_are_heard_of(make_mount: MountFactory, party: Make, name: str) -> None:
    """With flush_readers=off as well: of a draft that appears under its new name alone, and of a version."""
    mount = make_mount("-o", "flush_readers=off")
    (mount / "old").write_text("x")
    one, two = party(), party()
    opened(one, mount / name)
    one("os.write(fd, b'y')")
    one(TRY["fcntl"])
    one("os.rename(p, p + '.1'); other = os.open(p + '.1', os.O_RDONLY)", p=str(mount / name))
    opened(two, mount / name)
    assert two.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(os.dup(other))")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


@pytest.mark.parametrize("first", ["fd", "os.open(p + '.other', os.O_RDWR | os.O_CREAT)"])
def test_a_draft_is_locked_by_its_new_name(place: Path, party: Make, first: str) -> None:
    """While it is not known yet whether a close before that, by a process with locks, was the last one."""
    one, two = party(), party()
    opened(one, place / "data.tmp")
    one("os.write(fd, b'x')")
    one(f"record({first}, SET, EXCLUSIVE)", p=str(place / "data"))
    one("os.close(os.dup(fd)); os.rename(p + '.tmp', p); record(fd, SET, EXCLUSIVE)", p=str(place / "data"))
    opened(two, place / "data")
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert two.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(fd)")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


def test_what_is_locked_after_a_close_does_not_end_with_it(place: Path, party: Make) -> None:
    """While it is not known yet whether the close, of what was written under a lock, was the last one."""
    (place / "data").write_text("x")
    parent, two, three = party(), party(), party()
    opened(parent, place / "data", os.O_RDWR)
    for process in (two, three):
        opened(process, place / "data", os.O_RDWR)
    child = parent.fork()
    child("os.pwrite(fd, b'y', 0); record(fd, SET, EXCLUSIVE, 0, 10)")
    two("record(fd, SET, EXCLUSIVE, 20, 10)")
    child(
        """
        import threading, time
        thread = threading.Thread(target=record, args=(fd, WAIT, EXCLUSIVE, 20, 10))
        thread.start()
        time.sleep(0.3)
        """.replace("\n        ", "\n")
    )
    child("os.close(os.dup(fd)); record(fd, SET, SHARED, 5, 1)")
    two("record(fd, SET, UNLOCK, 20, 10)")
    child("thread.join()")
    for start, length in ((0, 5), (6, 14), (30, 0)):
        assert wait_until(
            lambda at=(start, length): three.errno("record(fd, SET, EXCLUSIVE, *at)", at=at) == 0, SECONDS
        )
    for start in (5, 20, 29):
        assert three.errno("record(fd, SET, EXCLUSIVE, start, 1)", start=start) in BLOCKED
    child("os.close(fd)")
    assert wait_until(lambda: three.errno(TRY["fcntl"]) == 0, SECONDS)


def test_a_new_file_is_locked_while_the_old_one_is_to_be_published(place: Path, party: Make) -> None:
    """And what else is closed, or unlocked, of either by then ends in its own time."""
    one, two = party(), party()
    opened(one, place / "data", CREATE)
    one("os.write(fd, b'x'); reads = os.open(p, os.O_RDONLY)", p=str(place / "data"))
    one(TRY["fcntl"])
    one.fork()  # shares the file
    one("os.close(fd); os.rename(p, p + '.1'); other = os.open(p, os.O_RDWR | os.O_CREAT)")
    one("record(other, SET, EXCLUSIVE, 0, 10); record(other, SET, EXCLUSIVE, 20, 10); os.close(reads)")
    one("record(other, SET, UNLOCK, 0, 10)")
    opened(two, place / "data")
    assert wait_until(lambda: two.errno("record(fd, SET, EXCLUSIVE, 0, 10)") == 0, SECONDS)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert two.errno("record(fd, SET, EXCLUSIVE, 20, 1)") in BLOCKED
    one("os.close(other)")
    two("record(fd, WAIT, EXCLUSIVE, 20, 1)")


@pytest.mark.parametrize(
    "how",
    ["os._exit(0)", "os.closerange(3, 10000); os._exit(0)", "os.close(reads); time.sleep(0.01); os.close(fd)"],
    ids=["exits", "in one call", "in two calls"],
)
@pytest.mark.parametrize("first", [os.O_RDWR, os.O_RDONLY], ids=["writes", "reads"])
def test_who_has_a_file_open_twice_ends(place: Path, party: Make, first: int, how: str) -> None:
    """What was written under the lock is there before it is free, whichever is closed first."""
    for _ in range(10):
        (place / "data").write_text("old")
        one, two = party(), party()
        one("reads = os.open(p, flags)", p=str(place / "data"), flags=first)
        opened(one, place / "data", os.O_RDWR)
        opened(two, place / "data", os.O_RDWR)
        one(TRY["fcntl"])
        one("os.pwrite(fd, b'new', 0)")
        two.start("record(fd, WAIT, EXCLUSIVE)")
        time.sleep(0.05)
        one.start(how)
        two.result(SECONDS)
        assert two("os.pread(fd, 9, 0)") == b"new"
        two("os.close(fd)")


# Calls that close many files.

OPENS_MANY = r"""
def open_many():
    # What is written under the lock, files that are only read, and one that can take long to publish.
    fcntl.lockf(fd, fcntl.LOCK_EX)
    os.pwrite(fd, b"new", 0)
    first = os.dup2(fd, 300)
    os.close(fd)
    for last, (path, flags) in enumerate(others, first + 1):
        other = os.open(path, flags)
        os.dup2(other, last)
        os.close(other)
    os.pwrite(last, b"y" * fill, 0)
    fcntl.lockf(first, fcntl.LOCK_EX)
    return first, last
"""


@pytest.mark.parametrize("many", ["readers", "publish"])
def test_a_lock_is_free_once_what_is_closed_with_others_is_published(
    make_mount: MountFactory, party: Make, many: str
) -> None:
    """RELEASE comes at the end of the call, however long the thread sleeps in it for other files."""
    mount = make_mount("-o", "flush_readers=on")
    (mount / "data").write_text("old")
    (mount / "read").write_text("x")
    parent, two = party(), party()
    opened(parent, mount / "data", os.O_RDWR)
    opened(two, mount / "data", os.O_RDWR)
    child = parent.fork()
    parent("os.close(fd)")
    others = [(str(mount / "read"), os.O_RDONLY)] * (600 if many == "readers" else 0)
    others += [(str(mount / "large"), os.O_RDWR | os.O_CREAT)]
    child(OPENS_MANY)
    first, last = child("open_many()", others=others, fill=0 if many == "readers" else 300 << 20)
    assert two.errno(TRY["fcntl"]) in BLOCKED
    child.start(f"os.closerange({first}, {last + 1}); os._exit(0)")
    two("record(fd, WAIT, EXCLUSIVE)")
    assert two("os.pread(fd, 9, 0)") == b"new"


# What is closed while it is published, or before.


def test_a_copy_is_closed_while_another_close_publishes(mount: Mount, party: Make) -> None:
    """By a process that is no child of who publishes: what it wrote is published when its close returns."""
    (mount / "data").write_text("old")
    parent, other = party(), party()
    opened(parent, mount / "data", os.O_RDWR)
    child = parent.fork()
    grandchild = child.fork()
    child.exit()
    grandchild("os.pwrite(fd, b'new', 0)")
    let_publish = hold_publishes(mount, other)
    parent.start("os.close(fd)")
    assert waits(parent)
    grandchild.start("os.close(fd)")
    assert waits(grandchild)
    let_publish()
    grandchild.result(SECONDS)
    assert (mount / "data").read_text() == "new"
    parent.result(SECONDS)


def require_with_the_lock(process: Actor, let_publish: Callable[[], None]) -> None:
    """What is published by then comes with the lock that a process waits for, and the lock not before."""
    assert waits(process)
    let_publish()
    process.result(SECONDS)
    assert process("os.pread(fd, 9, 0)") == b"new"


def test_a_lock_is_not_free_before_another_thread_has_published(mount: Mount, party: Make) -> None:
    """The thread that has closed a copy is gone, and what the last close publishes is on its way."""
    (mount / "data").write_text("old")
    one, two, other = party(), party(), party()
    for process in (one, two):
        opened(process, mount / "data", os.O_RDWR)
    one("import threading; copy = os.dup(fd); thread = threading.Thread(target=os.close, args=(fd,))")
    one(TRY["fcntl"])
    one("os.pwrite(fd, b'new', 0)")
    let_publish = hold_publishes(mount, other)
    one.start("thread.start(); thread.join(); os.close(copy)")
    assert waits(one)
    two.start("record(fd, WAIT, EXCLUSIVE)")
    require_with_the_lock(two, let_publish)


def test_a_lock_comes_with_what_is_published_by_then(mount: Mount, party: Make) -> None:
    """A child has written it, whose RELEASE publishes, and the parent unlocks before that is done."""
    (mount / "data").write_text("old")
    parent, two, other = party(), party(), party()
    opened(two, mount / "data", os.O_RDWR)
    opened(parent, mount / "data", os.O_RDONLY)
    parent("flock(fd, LOCK_EX); out = os.open(p, os.O_WRONLY | os.O_TRUNC)", p=str(mount / "data"))
    two.start(BLOCK["flock"])
    assert waits(two)
    child = parent.fork()
    parent("os.close(out)")
    let_publish = hold_publishes(mount, other)
    child("os.write(out, b'new'); os.close(out)")
    assert wait_until(lambda: status(mount)["publishing"] == 1, SECONDS)
    parent(RELEASE["flock"])
    require_with_the_lock(two, let_publish)


def test_what_is_got_between_two_closes_ends_with_the_second(place: Path, party: Make) -> None:
    """Also where the first is the one of which it is known last that it was not the last of its open file."""
    (place / "data").write_text("x")
    one, two = party(), party()
    opened(one, place / "data", os.O_RDWR)
    opened(two, place / "data", os.O_RDWR)
    one("second = os.open(p, os.O_RDWR); reads = os.open(p, os.O_RDONLY)", p=str(place / "data"))
    child = one.fork()
    child("os.close(second); os.close(reads)")
    for _ in range(5):
        one("os.pwrite(fd, b'y', 0); record(fd, SET, EXCLUSIVE, 0, 10)")
        one("os.close(os.dup(fd)); record(reads, SET, SHARED, 20, 10); os.close(second)")
        for start in (0, 20):
            assert wait_until(lambda at=start: two.errno("record(fd, SET, EXCLUSIVE, at, 10)", at=at) == 0, SECONDS)
        two(RELEASE["fcntl"])
        one("second = os.open(p, os.O_RDWR)", p=str(place / "data"))


def test_who_closes_a_lock_waits_for_who_waits_for_it(place: Path, party: Make) -> None:
    """It is no deadlock: what is closed is about to be free, and never mind that it is to be published first."""
    for name in ("data", "other"):
        (place / name).write_text("x")
    one, two = party(), party()
    for process in (one, two):
        opened(process, place / "data", os.O_RDWR)
        process("other = os.open(p, os.O_RDWR)", p=str(place / "other"))
    one.fork()  # shares the file
    one("os.pwrite(fd, b'y', 0); record(fd, SET, EXCLUSIVE)")
    two("record(other, SET, EXCLUSIVE)")
    two.start("record(fd, WAIT, EXCLUSIVE); os.close(other)")
    assert waits(two)
    one.start("os.close(fd); record(other, WAIT, EXCLUSIVE)")
    two.result(SECONDS)
    one.result(SECONDS)


def test_readers_of_a_file_that_has_lost_its_other_names_are_heard_of(make_mount: MountFactory, party: Make) -> None:
    """With flush_readers=off as well."""
    mount = make_mount("-o", "flush_readers=off")
    (mount / "one").write_text("x")
    one, two = party(), party()
    opened(two, mount / "one", os.O_RDWR)
    opened(one, mount / "one", os.O_RDONLY)
    one("record(fd, SET, SHARED)")
    one("os.link(p, q); os.unlink(p); other = os.open(q, os.O_RDONLY)", p=str(mount / "one"), q=str(mount / "two"))
    assert two.errno(TRY["fcntl"]) in BLOCKED
    one("os.close(os.dup(other))")
    assert wait_until(lambda: two.errno(TRY["fcntl"]) == 0, SECONDS)


# Locks that were lost.


@hot
@pytest.mark.parametrize("kind", list(TRY))
def test_a_reader_whose_lock_is_broken_is_told_at_its_close(
    make_mount: MountFactory, party: Make, hot: str, kind: str
) -> None:
    """Whoever has opened the file, the extension or Python."""
    mount = make_mount("-o", f"hot={hot},flush_readers=on")
    (mount / "data").write_text("x")
    one = party()
    opened(one, mount / "data", os.O_RDONLY)
    one(TRY[kind].replace("EXCLUSIVE", "SHARED"))
    assert safefs("locks", "break", mount / "data").stdout == "1 broken\n"
    assert one.errno("os.close(fd)") == errno.EIO
    opened(one, mount / "data", os.O_RDONLY)
    one("os.close(fd)")
    if hot == "on":
        assert status(mount)["hot"]["answered"]["14"] >= 2  # FUSE_OPEN
