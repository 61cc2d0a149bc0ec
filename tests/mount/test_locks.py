"""Advisory locks through one mount: what fcntl(2) and flock(2) promise, on files of every class.

Most tests also run on the bare directory: what they expect is what the kernel's own filesystems do.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safefs.turns import AT_ONCE, REFUSAL_SECONDS
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
    WAITS_SECONDS,
    Make,
    hold_publishes,
    hot,
    kinds,
    opened,
    process_state,
    waits,
)
from tests.support.mounting import Mount, safefs, status, wait_until

# What a test sees of who waits.


@kinds
def test_control_who_has_a_free_lock_does_not_wait(place: Path, party: Make, kind: str) -> None:
    """Nor does who was told nothing since, who sleeps all the same."""
    one = party()
    opened(one, place / "data")
    one.start(BLOCK[kind])
    assert one.answered(SECONDS)
    assert not waits(one)
    one.result()
    assert wait_until(lambda: process_state(one.pid) == "S", SECONDS)
    assert not waits(one)


def test_control_who_a_signal_does_not_end_does_not_wait(mount: Mount, party: Make) -> None:
    """Of a daemon that is frozen nobody hears that the call was interrupted: who has made it is in state D."""
    one = party()
    opened(one, mount / "data")
    mount.process.send_signal(signal.SIGSTOP)
    try:
        one.start("interruptible(flock, fd, LOCK_EX)")
        assert waits(one)
        os.kill(one.pid, signal.SIGUSR1)
        assert wait_until(lambda: process_state(one.pid) == "D", SECONDS)
        assert not waits(one, seconds=1.0)
    finally:
        mount.process.send_signal(signal.SIGCONT)
    assert one.result(SECONDS) in ("interrupted", "done")


# One lock, two processes.


@kinds
@pytest.mark.parametrize("name", NAMES)
def test_it_excludes_until_it_is_released(place: Path, party: Make, name: str, kind: str) -> None:
    one, two = party(), party()
    opened(one, place / name)
    one("os.write(fd, b'x')")
    opened(two, place / name)
    one(TRY[kind])
    assert two.errno(TRY[kind]) in BLOCKED
    one(RELEASE[kind])
    two(TRY[kind])
    assert one.errno(TRY[kind]) in BLOCKED


@kinds
@pytest.mark.parametrize("end", ["close", "exit", "kill"])
def test_a_waiter_gets_it_when_the_holder_ends(place: Path, party: Make, kind: str, end: str) -> None:
    one, two = party(), party()
    fd = opened(one, place / "x.lock")
    opened(two, place / "x.lock")
    one(TRY[kind])
    two.start(BLOCK[kind])
    assert waits(two)
    if end == "close":
        one.closefd(fd)
    elif end == "exit":
        one.exit()
    else:
        one.kill(signal.SIGKILL)
    two.result(SECONDS)


@kinds
def test_a_try_right_after_a_close_succeeds(place: Path, party: Make, kind: str) -> None:
    """Also where the kernel tells of the close later than close(2) returns."""
    one, two = party(), party()
    for number in range(100):
        name = place / NAMES[number % len(NAMES)]
        fd = opened(one, name)
        other = opened(two, name)
        one(TRY[kind])
        one.closefd(fd)
        two(TRY[kind])
        two.closefd(other)


@kinds
def test_a_waiter_that_gets_a_signal_is_interrupted(place: Path, party: Make, kind: str) -> None:
    one, two = party(), party()
    opened(one, place / "data")
    opened(two, place / "data")
    one(TRY[kind])
    two("call = lambda: eval(code)", code=BLOCK[kind])
    two.start("interruptible(call)")
    assert waits(two)
    os.kill(two.pid, signal.SIGUSR1)
    assert two.result(SECONDS) == "interrupted"
    one(RELEASE[kind])
    one(TRY[kind])  # nobody stands in the queue any more


@kinds
def test_a_waiter_that_is_killed_is_gone(place: Path, party: Make, kind: str) -> None:
    one, two, three = party(), party(), party()
    for process in (one, two, three):
        opened(process, place / "data")
    one(TRY[kind])
    two.start(BLOCK[kind])
    assert waits(two)
    start = time.monotonic()
    two.kill(signal.SIGKILL)
    assert time.monotonic() - start < SECONDS / 4
    three.start(BLOCK[kind])
    assert waits(three)
    one(RELEASE[kind])
    three.result(SECONDS)


@kinds
def test_readers_share(place: Path, party: Make, kind: str) -> None:
    one, two, three = party(), party(), party()
    for process in (one, two, three):
        opened(process, place / "data")
    shared = {name: text.replace("EXCLUSIVE", "SHARED").replace("LOCK_EX", "LOCK_SH") for name, text in TRY.items()}
    one(shared[kind])
    two(shared[kind])
    assert three.errno(TRY[kind]) in BLOCKED
    one(RELEASE[kind])
    assert three.errno(TRY[kind]) in BLOCKED
    two(RELEASE[kind])
    three(TRY[kind])


# Record locks.


def test_ranges(place: Path, party: Make) -> None:
    one, two = party(), party()
    opened(one, place / "db.sqlite")
    opened(two, place / "db.sqlite")
    one("record(fd, SET, EXCLUSIVE, 10, 10)")
    two("record(fd, SET, EXCLUSIVE, 0, 10)")
    two("record(fd, SET, EXCLUSIVE, 20, 0)")
    assert two.errno("record(fd, SET, SHARED, 19, 1)") in BLOCKED
    one("record(fd, SET, UNLOCK, 15, 1)")
    two("record(fd, SET, SHARED, 15, 1)")
    assert two.errno("record(fd, SET, SHARED, 16, 1)") in BLOCKED
    # One's lock is in two parts now, of which a question about everything finds the first.
    assert two("record(fd, GET, EXCLUSIVE, 10, 10)") == ("exclusive", 10, 5, one.pid)
    assert one("record(fd, GET, SHARED, 1 << 40, 5)") == ("exclusive", 20, 0, two.pid)
    assert one("record(fd, GET, EXCLUSIVE, 10, 5)")[0] == ""
    one("record(fd, SET, SHARED, 12, 1)")
    assert two("record(fd, GET, SHARED, 10, 3)")[:3] == ("exclusive", 10, 2)


def test_two_that_would_wait_for_each_other(place: Path, party: Make) -> None:
    one, two = party(), party()
    opened(one, place / "data")
    opened(two, place / "data")
    one("record(fd, SET, EXCLUSIVE, 0, 1)")
    two("record(fd, SET, EXCLUSIVE, 1, 1)")
    one.start("record(fd, WAIT, EXCLUSIVE, 1, 1)")
    assert waits(one)
    assert two.errno("record(fd, WAIT, EXCLUSIVE, 0, 1)") == errno.EDEADLK
    two("record(fd, SET, UNLOCK)")
    one.result(SECONDS)


def test_two_that_would_wait_for_each_other_on_two_files(place: Path, party: Make) -> None:
    one, two = party(), party()
    for process in (one, two):
        opened(process, place / "x.lock")
        process("other = os.open(p, os.O_RDWR | os.O_CREAT)", p=str(place / "y.lock"))
    one("record(fd, SET, EXCLUSIVE)")
    two("record(other, SET, EXCLUSIVE)")
    one.start("record(other, WAIT, EXCLUSIVE)")
    assert waits(one)
    assert two.errno("record(fd, WAIT, EXCLUSIVE)") == errno.EDEADLK
    two("record(other, SET, UNLOCK)")
    one.result(SECONDS)


THREADS = """
import threading
fd, other = os.open(p, os.O_RDWR | os.O_CREAT), os.open(p, os.O_RDWR)
record(fd, OFD_SET, EXCLUSIVE, 0, 1)
record(other, OFD_SET, EXCLUSIVE, 1, 1)
ends = []
def wait_for(descriptor, byte):
    try:
        record(descriptor, OFD_WAIT, EXCLUSIVE, byte, 1)
        ends.append(0)
    except OSError as error:
        ends.append(error.errno)
threads = [threading.Thread(target=wait_for, args=(descriptor, byte)) for descriptor, byte in ((fd, 1), (other, 0))]
for thread in threads:
    thread.start()
    time.sleep(0.2)
record(fd, OFD_SET, UNLOCK, 0, 1)
threads[1].join(20)
record(other, OFD_SET, UNLOCK, 1, 1)
threads[0].join(20)
"""


def test_open_files_of_one_process_wait_for_each_other(place: Path, party: Make) -> None:
    """OFD: a third thread can unlock what two others wait for."""
    one = party()
    one(THREADS, p=str(place / "x.lock"))
    assert one("ends") == [0, 0]


def test_the_locks_of_an_open_file_itself(mount: Mount, party: Make) -> None:
    """F_OFD_GETLK with F_UNLCK, as far as the kernel has that."""
    answers = []
    for directory in (mount.backing, mount.path):
        one, two = party(), party()
        for process in (one, two):
            opened(process, directory / "x.lock")
        one("record(fd, OFD_SET, SHARED, 3, 4)")
        two("record(fd, OFD_SET, SHARED, 0, 9)")
        asked = "try: own = record(fd, OFD_GET, UNLOCK, start, 9)\nexcept OSError as error: own = error.errno"
        answers.append([])
        for start in (0, 5, 20):
            one(asked, start=start)
            answers[-1].append(one("own"))
    assert answers[0] == answers[1]
    assert answers[0][0] in (("shared", 3, 4, -1), errno.EINVAL)


def test_a_child_does_not_inherit_record_locks(place: Path, party: Make) -> None:
    one, two = party(), party()
    opened(one, place / "x.lock")
    opened(two, place / "x.lock")
    one(TRY["fcntl"])
    child = one.fork()
    assert child.errno(TRY["fcntl"]) in BLOCKED
    child("os.close(fd)")
    assert two.errno(TRY["fcntl"]) in BLOCKED
    child.exit()
    assert two.errno(TRY["fcntl"]) in BLOCKED


@pytest.mark.parametrize("kind", ["flock", "ofd"])
@pytest.mark.parametrize("name", ["x.lock", "data"])
def test_a_child_shares_the_locks_of_open_files(place: Path, party: Make, kind: str, name: str) -> None:
    """They end with the last copy of the descriptor."""
    one, two = party(), party()
    opened(one, place / name)
    one(TRY[kind])
    child = one.fork()
    one("os.close(fd)")
    opened(two, place / name)
    assert two.errno(TRY[kind]) in BLOCKED
    child.exit()
    assert wait_until(lambda: two.errno(TRY[kind]) == 0, SECONDS)


def test_record_locks_and_flock_know_nothing_of_each_other(place: Path, party: Make) -> None:
    one, two = party(), party()
    opened(one, place / "data")
    opened(two, place / "data")
    one(TRY["flock"])
    two(TRY["fcntl"])


def test_record_locks_and_ofd_locks_exclude_each_other(place: Path, party: Make) -> None:
    one, two = party(), party()
    opened(one, place / "data")
    opened(two, place / "data")
    one(TRY["ofd"])
    assert two.errno(TRY["fcntl"]) in BLOCKED


def test_a_lock_for_writing_needs_a_descriptor_for_writing(place: Path, party: Make) -> None:
    (place / "data").write_text("x")
    one = party()
    opened(one, place / "data", os.O_RDONLY)
    assert one.errno(TRY["fcntl"]) == errno.EBADF
    one("record(fd, SET, SHARED)")


# flock.


def test_a_conversion(place: Path, party: Make) -> None:
    one, two = party(), party()
    opened(one, place / "data")
    opened(two, place / "data")
    one("flock(fd, LOCK_EX)")
    one("flock(fd, LOCK_SH)")
    two("flock(fd, LOCK_SH)")
    assert one.errno("flock(fd, LOCK_EX | LOCK_NB)") in BLOCKED
    two("flock(fd, LOCK_EX)")  # one has lost his: flock(2)
    assert one.errno("flock(fd, LOCK_SH | LOCK_NB)") in BLOCKED


def test_a_reader_that_the_extension_has_opened(place: Path, party: Make) -> None:
    """flock(2) needs no right to write; what is locked so ends with the descriptor all the same."""
    (place / "data").write_text("x")
    one, two = party(), party()
    for _ in range(50):
        fd = opened(one, place / "data", os.O_RDONLY)
        other = opened(two, place / "data", os.O_RDONLY)
        one("flock(fd, LOCK_EX)")
        assert two.errno(TRY["flock"]) in BLOCKED
        one.closefd(fd)
        two(TRY["flock"])
        two.closefd(other)


# What only a mount has: versions, and a queue.


def test_a_lock_is_on_the_name(mount: Mount, party: Make) -> None:
    """A publish changes the inode; whoever opens the name afterwards still finds it locked."""
    one, two, writer = party(), party(), party()
    (mount / "data").write_text("old")
    opened(one, mount / "data", os.O_RDONLY)
    one("flock(fd, LOCK_EX)")
    writer("open(p, 'w').write('new')", p=str(mount / "data"))
    opened(two, mount / "data", os.O_RDONLY)
    assert two("os.read(fd, 9)") == b"new"
    assert two.errno(TRY["flock"]) in BLOCKED
    one("flock(fd, LOCK_UN)")
    two(TRY["flock"])


def test_removing_and_making_a_lock_file_anew_does_not_split_the_lock(mount: Mount, party: Make) -> None:
    one, two = party(), party()
    opened(one, mount / "x.lock")
    one(TRY["flock"])
    (mount / "x.lock").unlink()
    opened(two, mount / "x.lock")
    assert two.errno(TRY["flock"]) in BLOCKED
    one.exit()
    two(TRY["flock"])


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_whoever_gets_the_lock_sees_what_was_written_under_it(mount: Mount, party: Make, kind: str) -> None:
    """Locked through the very file that is written, which is published and unlocked by one close(2)."""
    one, two = party(), party()
    path = mount / "data"
    path.write_text("0")
    for number in range(1, 20):
        writer, reader = (one, two) if number % 2 else (two, one)
        fd = opened(writer, path, os.O_RDWR)
        writer(TRY[kind])
        other = opened(reader, path, os.O_RDWR)
        reader("os.pread(fd, 9000, 0)")  # the kernel has pages of what is there now
        reader.start(BLOCK[kind])
        text = str(number).encode() * (number * 500 if number % 3 else 1)
        writer("os.ftruncate(fd, 0); os.pwrite(fd, text, 0)", text=text)
        writer.closefd(fd)
        reader.result(SECONDS)
        assert reader("os.pread(fd, 20000, 0)") == text
        assert reader("os.lseek(fd, 0, os.SEEK_END)") == len(text)
        assert reader.read(path) == text
        reader.closefd(other)


def test_readers_do_not_starve_a_writer(mount: Mount, party: Make, tmp_path: Path) -> None:
    """Shared locks that overlap without end."""
    readers, writer = [party() for _ in range(3)], party()
    for process in (*readers, writer):
        opened(process, mount / "x.lock")
    code = """
while not os.path.exists(stop):
    flock(fd, LOCK_SH)
    time.sleep(0.05)
    flock(fd, LOCK_UN)
"""
    for number, reader in enumerate(readers):
        time.sleep(0.02 * number)
        reader.start(code, stop=str(tmp_path / "stop"))
    writer.start("flock(fd, LOCK_EX)")
    try:
        writer.result(SECONDS)
    finally:
        (tmp_path / "stop").touch()
    writer("flock(fd, LOCK_UN)")
    for reader in readers:
        reader.result(SECONDS)


def test_a_reader_that_comes_later_waits_behind_a_writer(mount: Mount, party: Make) -> None:
    one, two, writer = party(), party(), party()
    for process in (one, two, writer):
        opened(process, mount / "x.lock")
    one("flock(fd, LOCK_SH)")
    writer.start("flock(fd, LOCK_EX)")
    assert waits(writer)
    two.start("flock(fd, LOCK_SH)")
    assert waits(two)
    one("flock(fd, LOCK_UN)")
    writer.result(SECONDS)
    assert not two.answered()
    writer("flock(fd, LOCK_UN)")
    two.result(SECONDS)


def test_control_on_a_bare_directory_readers_starve_a_writer(tmp_path: Path, party: Make) -> None:
    one, two, writer = party(), party(), party()
    for process in (one, two, writer):
        opened(process, tmp_path / "x.lock")
    one("flock(fd, LOCK_SH)")
    writer.start("flock(fd, LOCK_EX)")
    assert waits(writer)
    for holder, other in 20 * [(one, two), (two, one)]:
        other("flock(fd, LOCK_SH)")
        holder("flock(fd, LOCK_UN)")
    assert waits(writer)
    one("flock(fd, LOCK_UN)")
    writer.result(SECONDS)


def test_a_child_passes_a_writer_that_waits_for_its_parent(place: Path, party: Make) -> None:
    """A parent that holds a shared lock and waits for a child that asks for one, too."""
    parent, writer = party(), party()
    opened(parent, place / "x.lock")
    opened(writer, place / "x.lock")
    parent("flock(fd, LOCK_SH)")
    writer.start("flock(fd, LOCK_EX)")
    assert waits(writer)
    child = parent.fork()
    opened(child, place / "x.lock")
    child("flock(fd, LOCK_SH | LOCK_NB)")
    child.exit()
    parent("os.close(fd)")
    writer.result(SECONDS)


@kinds
@pytest.mark.parametrize("broken", [True, False])
def test_what_an_operator_breaks_is_not_published(mount: Mount, party: Make, kind: str, broken: bool) -> None:
    """Once he has broken the lock that it was written under; with a control."""
    (mount / "data").write_text("before")
    one, two = party(), party()
    opened(one, mount / "data")
    one(TRY[kind])
    one("os.pwrite(fd, b'under a lock', 0)")
    if broken:
        assert safefs("locks", "break", mount / "data").stdout == "1 broken\n"
        opened(two, mount / "data")
        two(TRY[kind])
        assert one.errno("os.close(fd)") == errno.EIO
        two("os.pwrite(fd, b'second', 0); os.close(fd)")
    else:
        one("os.close(fd)")
    assert (mount / "data").read_text() == ("second" if broken else "under a lock")
    if broken:
        mount.expected_log.append("another's by now")


def test_an_operator_breaks_a_lock_while_its_file_is_published(mount: Mount, party: Make) -> None:
    """Its close fails, and its name shows what it showed before."""
    (mount / "data").write_text("before")
    one, two = party(), party()
    opened(one, mount / "data")
    one(TRY["flock"])
    one("os.pwrite(fd, b'under a lock', 0)")
    go_on = hold_publishes(mount, two)
    one.start("os.close(fd)")
    assert waits(one)
    assert safefs("locks", "break", mount / "data").stdout == "1 broken\n"
    go_on()
    with pytest.raises(OSError) as refused:
        one.result(SECONDS)
    assert refused.value.errno == errno.EIO
    assert (mount / "data").read_text() == "before"
    mount.expected_log.append("another's by now")


def test_those_who_try_again_and_again_take_turns(mount: Mount, party: Make) -> None:
    """So many refusals a second has a name: a hundred who poll for a lock must not keep from work who has it."""
    holder, one, two = party(), party(), party()
    for process in (holder, one, two):
        opened(process, mount / "x.lock")
    holder(TRY["flock"])
    code = """
for turn in range(tries):
    try:
        flock(fd, LOCK_EX | LOCK_NB)
        raise AssertionError("it was had")
    except BlockingIOError:
        pass
"""
    start = time.monotonic()
    for process in (one, two):
        process.start(code, tries=AT_ONCE)
    for process in (one, two):
        process.result(SECONDS)
    assert time.monotonic() - start > 0.8 * (AT_ONCE - 2) * REFUSAL_SECONDS
    holder(RELEASE["flock"])
    one(TRY["flock"])


@pytest.mark.parametrize("name", NAMES)
def test_many_who_poll_as_filelock_does(place: Path, party: Make, name: str, tmp_path: Path) -> None:
    """Each look opens the file anew.  No two are inside, and all get in."""
    code = """
import threading
def poll(path, marker, turns):
    overlaps = 0
    for _ in range(turns):
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                flock(fd, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                os.close(fd)
                time.sleep(0.002)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            os.unlink(marker)
        except FileExistsError:
            overlaps += 1
        flock(fd, LOCK_UN)
        os.close(fd)
    counts.append(overlaps)
counts = []
threads = [threading.Thread(target=poll, args=(path, marker, 5)) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
globals()["overlaps"] = counts
"""
    processes = [party() for _ in range(3)]
    for process in processes:
        process.start(code, path=str(place / name), marker=str(tmp_path / "marker"))
    for process in processes:
        process.result(3 * SECONDS)
    assert [process("overlaps") for process in processes] == [[0] * 8] * 3


def counts(mount: Mount) -> tuple[int, int]:
    locks = status(mount)["locks"]
    return locks["held"], locks["waiting"]


def test_nothing_is_left_of_locks(mount: Mount, party: Make) -> None:
    processes = [party() for _ in range(4)]
    for process in processes:
        opened(process, mount / "x.lock")
        process("flock(fd, LOCK_SH)")
        process("record(fd, SET, SHARED)")
    processes[0].start("record(fd, WAIT, EXCLUSIVE)")
    assert waits(processes[0])
    assert counts(mount) == (8, 1)
    for process in processes[1:]:
        process.exit()
    processes[0].result(SECONDS)
    processes[0].exit()
    assert wait_until(lambda: counts(mount) == (0, 0))


# What is closed while somebody waits, and what is published after the lock is given up.


@pytest.mark.parametrize("name", NAMES)
def test_a_close_while_another_thread_of_the_process_waits(place: Path, party: Make, name: str) -> None:
    """It ends the locks that the process has, not those that it gets later; these end with the process."""
    holder, waiter, last = party(), party(), party()
    opened(holder, place / name)
    opened(waiter, place / name)
    holder(TRY["fcntl"])
    waiter(
        "global other, thread; import threading; other = os.open(p, os.O_RDONLY);"
        "thread = threading.Thread(target=record, args=(fd, WAIT, EXCLUSIVE)); thread.start()",
        p=str(place / name),
    )
    time.sleep(0.3)
    waiter("os.close(other)")
    holder(RELEASE["fcntl"])
    waiter("thread.join(20); assert not thread.is_alive()")
    opened(last, place / name)
    assert last.errno(TRY["fcntl"]) in BLOCKED
    waiter.exit()
    assert wait_until(lambda: last.errno(TRY["fcntl"]) == 0, SECONDS)


INCREMENT = r"""
def increment(path, times):
    '''Opened by this process, counted by a child that has the descriptor alone by then.'''
    for _ in range(times):
        fd = os.open(path, os.O_RDWR)
        child = os.fork()
        if not child:
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                count = int(os.pread(fd, 20, 0))
                os.pwrite(fd, str(count + 1).encode(), 0)
                os.close(fd)
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(fd)
        assert os.waitpid(child, 0)[1] == 0
"""


def test_what_a_child_writes_under_a_record_lock(place: Path, party: Make) -> None:
    """Its close is not the opener's, so RELEASE publishes; who gets the lock then counts on from there."""
    (place / "data").write_text("0")
    counting = [party() for _ in range(3)]
    for process in counting:
        process(INCREMENT)
    for process in counting:
        process.start("increment(p, 20)", p=str(place / "data"))
    for process in counting:
        process.result(3 * SECONDS)
    assert (place / "data").read_text() == "60"


def writes_under_a_lock(place: Path, party: Make) -> tuple[Actor, Actor]:
    """A process whose parent has the file open as well; and somebody else who has opened it."""
    (place / "data").write_text("old")
    parent, other = party(), party()
    opened(parent, place / "data", os.O_RDWR)
    child = parent.fork()
    child(TRY["fcntl"])
    child("os.pwrite(fd, b'new', 0)")
    opened(other, place / "data", os.O_RDWR)
    return child, other


def test_a_lock_that_others_have_the_file_open_for(place: Path, party: Make) -> None:
    """A process that closes a file of which others have copies gives its record locks up all the same."""
    child, two = writes_under_a_lock(place, party)
    assert two.errno(TRY["fcntl"]) in BLOCKED
    child("os.close(fd)")
    two(TRY["fcntl"])


@pytest.mark.parametrize("how", ["fcntl", "flock"])
def test_a_signal_ends_the_wait_for_a_publish(mount: Mount, party: Make, how: str) -> None:
    """Who wants the lock of a name waits until what was closed under it is published, however long that takes."""
    (mount / "data").write_text("old")
    writer, child_of, waiter, tries = party(), party(), party(), party()
    opened(waiter, mount / "data", os.O_RDWR)
    opened(tries, mount / "data", os.O_RDWR)
    opened(child_of, mount / "data", os.O_RDWR)
    child_of("os.pwrite(fd, b'new', 0)")
    child = child_of.fork()
    child_of("os.close(fd)")
    let_publish = hold_publishes(mount, writer)
    child.start("os.close(fd); os._exit(0)")  # its RELEASE publishes, and waits
    assert wait_until(lambda: status(mount)["publishing"] == 1, SECONDS)
    for process, operation in ((waiter, BLOCK[how]), (tries, TRY[how])):
        process.start(operation)
        time.sleep(0.3)
        process.kill(signal.SIGKILL)
    let_publish()
    assert wait_until(lambda: (mount / "data").read_text() == "new", SECONDS)


def test_who_asks_for_a_lock_that_was_closed_sees_none(place: Path, party: Make) -> None:
    """F_GETLK, while it is not known yet whether the close was the last one, which publishes."""
    child, two = writes_under_a_lock(place, party)
    assert two("record(fd, GET, EXCLUSIVE)") == ("exclusive", 0, 0, child.pid)
    child("os.close(fd)")
    assert two("record(fd, GET, EXCLUSIVE)")[0] == ""


@pytest.mark.parametrize("how", ["fcntl", "flock"])
def test_a_try_that_a_signal_interrupts_is_made_again(mount: Mount, party: Make, how: str) -> None:
    """Nobody has the lock: a handler that the program has (SA_RESTART) does not make it one that somebody has."""
    (mount / "data").write_text("old")
    writer, child_of, tries = party(), party(), party()
    opened(tries, mount / "data", os.O_RDWR)
    opened(child_of, mount / "data", os.O_RDWR)
    child_of("os.pwrite(fd, b'new', 0)")
    child = child_of.fork()
    child_of("os.close(fd)")
    let_publish = hold_publishes(mount, writer)
    child.start("os.close(fd); os._exit(0)")  # its RELEASE publishes, and waits
    assert wait_until(lambda: status(mount)["publishing"] == 1, SECONDS)
    tries("seen = []; signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))")
    tries("signal.siginterrupt(signal.SIGUSR1, False)")
    tries.start(TRY[how])
    for _ in range(3):
        assert waits(tries)
        os.kill(tries.pid, signal.SIGUSR1)
    assert waits(tries)
    let_publish()
    tries.result(SECONDS)
    assert tries("len(seen)") >= 1


@pytest.mark.parametrize(
    "step", ["record(fd, SET, UNLOCK)", "flock(fd, LOCK_UN)", "os.close(fd)", "record(fd, GET, EXCLUSIVE)"]
)
def test_who_is_killed_does_not_wait_for_a_record_that_cannot_be_read(
    two_mounts: tuple[Mount, Mount], party: Make, step: str
) -> None:
    """It stays so until an operator breaks the locks: whoever unlocks, asks or closes must be able to end before."""
    one, two = party(), party()
    for mount, process in zip(two_mounts, (one, two), strict=True):
        opened(process, mount / "x.lock")
    for kind in ("flock", "fcntl"):  # from the second node's try on they share the name
        one(TRY[kind])
        assert two.errno(TRY[kind]) in BLOCKED
    (record,) = (two_mounts[0].backing / ".safefs/locks/names").glob("*/data~*")
    record.write_bytes(b"damaged")
    one.start(step)
    assert not one.answered(WAITS_SECONDS)
    os.kill(one.pid, signal.SIGKILL)
    assert wait_until(lambda: process_state(one.pid) == "Z", SECONDS)
    safefs("locks", "break", two_mounts[1] / "x.lock")  # so that the other need not wait to end


def record_of(mount: Mount, ending: str) -> Path:
    """What the lease files have of the name that ends so."""
    records = (mount.backing / ".safefs/locks/names").glob("*/data~*")
    (found,) = (each for each in records if json.loads(each.read_text())["name"].endswith(ending))
    return found


def locks_of(mount: Mount) -> list[dict[str, Any]]:
    """What is shown of all locks."""
    return list(json.loads(safefs("locks", "--at", mount.path, "--json").stdout))


@pytest.mark.parametrize("directory", ["d", ""], ids=["below the root", "the root"])
def test_what_is_on_record_of_names_that_are_being_made_can_be_broken(
    two_mounts: tuple[Mount, Mount], party: Make, directory: str
) -> None:
    """By the path that `safefs locks` shows: where it cannot be read nobody can make a file there with O_EXCL."""
    (two_mounts[0] / directory).mkdir(exist_ok=True)
    one, two = party(), party()
    for mount, process in zip(two_mounts, (one, two), strict=True):
        opened(process, mount / directory / f"of {process.pid}", CREATE | os.O_EXCL)
    record = record_of(two_mounts[0], "/")
    record.write_bytes(b"damaged")
    two.start("os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)", path=str(two_mounts[1] / directory / "new"))
    assert wait_until(lambda: status(two_mounts[1])["lock_problem"] is not None, SECONDS)
    (shown,) = (entry["path"] for entry in locks_of(two_mounts[1]) if entry["state"].startswith("unknown"))
    assert not two.answered(0)
    done = safefs("locks", "break", f"{two_mounts[1].path}/{shown}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 broken\n", "")
    two.result(SECONDS)
    one("os.write(fd, b'one'); os.close(fd)")
    two("os.write(fd, b'two'); os.close(fd)")
    for mount in two_mounts:
        assert [(mount / directory / f"of {each.pid}").read_text() for each in (one, two)] == ["one", "two"]


def test_a_lock_in_a_directory_that_this_mount_has_not_come_to_can_be_broken(
    two_mounts: tuple[Mount, Mount], party: Make
) -> None:
    """By the number that `safefs locks` shows in place of a path, unless a directory has that for its name."""
    (two_mounts[0] / "d").mkdir()
    (two_mounts[0] / "d/data").touch()
    one = party()
    opened(one, two_mounts[0] / "d/data")
    one(TRY["flock"])
    (shown,) = (entry["path"] for entry in locks_of(two_mounts[1]))
    directory = f"inode {(two_mounts[0].backing / 'd').stat().st_ino}"
    assert shown == f"{directory}/data"
    (two_mounts[0].backing / directory).mkdir()
    assert "nobody holds a lock" in safefs("locks", "break", two_mounts[1] / shown).stderr
    (two_mounts[0].backing / directory).rmdir()
    for unknown in ("inode", "inode 0x1", "inode 1 "):
        assert "No such file" in safefs("locks", "break", two_mounts[1] / unknown / "data").stderr
    done = safefs("locks", "break", two_mounts[1] / shown)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 broken\n", "")
    assert locks_of(two_mounts[1]) == []


def test_a_soft_lock_is_broken_also_where_the_locks_of_its_name_cannot_be(
    two_mounts: tuple[Mount, Mount], party: Make
) -> None:
    """What could not be broken is said, and what was is on record."""
    one, two = party(), party()
    opened(one, two_mounts[0] / "x.lock", CREATE | os.O_EXCL)
    opened(two, two_mounts[1] / "x.lock")
    one(TRY["flock"])
    assert two.errno(TRY["flock"]) in BLOCKED
    assert wait_until(lambda: "file" in {entry["kind"] for entry in locks_of(two_mounts[1])}, SECONDS)
    record = record_of(two_mounts[0], "/x.lock")
    whole = record.read_text()
    record.write_text(json.dumps({**json.loads(whole), "record": {"format": 99}}))
    assert "Not a directory" in safefs("locks", "break", f"{two_mounts[1] / 'x.lock'}/").stderr
    assert (two_mounts[0] / "x.lock").exists()
    done = safefs("locks", "break", two_mounts[1] / "x.lock")
    record.write_text(whole)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "1 broken, but not all: " in done.stderr and "another version of safefs" in done.stderr
    assert not (two_mounts[0] / "x.lock").exists()
    assert wait_until(lambda: '"lock broken"' in safefs("events", two_mounts[1].path, "--json").stdout, SECONDS)


# Locks that were broken.


def test_a_second_lock_through_a_fenced_file(mount: Mount, party: Make) -> None:
    """It ends with the process's close like any other, although that says EIO."""
    one, two = party(), party()
    for process in (one, two):
        opened(process, mount / "db.sqlite")
    one(TRY["fcntl"])
    assert safefs("locks", "break", mount / "db.sqlite").stdout == "1 broken\n"
    one(TRY["fcntl"])
    one.fork()  # has a copy
    assert two.errno(TRY["fcntl"]) in BLOCKED
    assert one.errno("os.close(fd)") == errno.EIO
    two(TRY["fcntl"])


def test_a_refused_draft_gets_no_name_by_link(mount: Mount, party: Make) -> None:
    one = party()
    opened(one, mount / "data")
    one(TRY["flock"])
    one("os.write(fd, b'under the lock')")
    assert safefs("locks", "break", mount / "data").stdout == "1 broken\n"
    link = "os.link(f'/proc/self/fd/{fd}', p, src_dir_fd=os.open('/', os.O_PATH), follow_symlinks=True)"
    for _ in range(2):
        assert one.errno(link, p=str(mount / "other")) == errno.EIO
    assert os.listdir(mount.path) == []
    assert one.errno("os.close(fd)") == errno.EIO


def test_a_file_that_was_opened_before_it_was_one_to_write_in_place(mount: Mount, party: Make) -> None:
    """The kernel reads it by itself; it must not write by itself what a lost lock forbids."""
    one = party()
    (mount / "data").write_text("old")
    with open(mount / "data") as reader:
        os.rename(mount / "data", mount / "data.db")
        opened(one, mount / "data.db", os.O_RDWR)
        one(TRY["flock"])
        assert safefs("locks", "break", mount / "data.db").stdout == "1 broken\n"
        assert one.errno("os.pwrite(fd, b'new', 0)") == errno.EIO
        assert reader.read() == "old"
    assert one.errno("os.close(fd)") == errno.EIO
    assert (mount / "data.db").read_text() == "old"


# Names.


@hot
@pytest.mark.parametrize("name", ["data", "db.sqlite"])
def test_another_name_of_a_file_is_looked_at_meanwhile(
    make_mount: MountFactory, party: Make, name: str, hot: str
) -> None:
    mount = make_mount("-o", f"hot={hot}")
    (mount.backing / name).write_text("x")
    os.link(mount.backing / name, mount.backing / f"copy-{name}")
    one, two = party(), party()
    for process in (one, two):
        opened(process, mount / name, os.O_RDONLY)
    one("flock(fd, LOCK_EX)")
    os.stat(mount / f"copy-{name}")
    assert two.errno(TRY["flock"]) in BLOCKED


LOOKED_AT = """
import os, sys
while True:
    os.stat(sys.argv[1])
"""
OPENED_EVERY_TIME = """
for _ in range(100):
    fd = os.open(p, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
    else:
        raise AssertionError("two have the lock")
"""


@hot
@pytest.mark.parametrize("name", ["x.lock", "db.sqlite"])
def test_another_name_of_what_is_written_in_place_is_looked_at_meanwhile(
    make_mount: MountFactory, party: Make, name: str, hot: str
) -> None:
    """Whoever opens it is known by the thread that walked to it, whatever others look at in between."""
    mount = make_mount("-o", f"hot={hot}")
    one, two = party(), party()
    opened(one, mount / name)
    one("flock(fd, LOCK_EX)")
    link = mount / f"copy-{name}"
    os.link(mount / name, link)
    os.stat(link)
    opened(two, mount / name)
    assert two.errno(TRY["flock"]) in BLOCKED
    with subprocess.Popen([sys.executable, "-c", LOOKED_AT, link]) as watcher:
        try:
            two(OPENED_EVERY_TIME, p=str(mount / name))
        finally:
            watcher.kill()


AGAIN = {"reading": (os.O_RDONLY, "flock"), **{kind: (os.O_RDWR, kind) for kind in TRY}}
EXCHANGE = "ctypes.CDLL(None).renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2)"


@pytest.mark.parametrize("way", list(AGAIN))
@pytest.mark.parametrize("name", NAMES)
def test_locked_again_after_a_rename(place: Path, party: Make, name: str, way: str) -> None:
    """Through the old descriptor, by the name that others find the file by."""
    (flags, kind), new = AGAIN[way], place / f"new-{name}"
    (place / name).write_text("x")
    one, two = party(), party()
    opened(one, place / name, flags)
    for _ in range(3):
        one(TRY[kind])
        one(RELEASE[kind])
    one("os.rename(a, b)", a=str(place / name), b=str(new))
    opened(two, new, flags)
    two(TRY[kind])
    assert one.errno(TRY[kind]) in BLOCKED
    two(RELEASE[kind])
    one(TRY[kind])
    assert two.errno(TRY[kind]) in BLOCKED


@pytest.mark.parametrize("name", ["data", "db.sqlite"])
def test_locked_across_a_rename_and_again(place: Path, party: Make, name: str) -> None:
    """What is held keeps its name; what is locked after that has the new one, also where C answers for the old."""
    (place / name).write_text("x")
    one, two, three = party(), party(), party()
    for process in (one, two):
        opened(process, place / name, os.O_RDONLY)
        for _ in range(3):
            process(TRY["flock"])
            process(RELEASE["flock"])
    one(TRY["flock"])
    os.rename(place / name, place / "new")
    one("flock(fd, LOCK_SH | LOCK_NB)")
    one(TRY["flock"])
    for _ in range(3):
        one(RELEASE["flock"])
        one(TRY["flock"])
    opened(three, place / "new", os.O_RDONLY)
    for process in (two, three):
        assert process.errno(TRY["flock"]) in BLOCKED
    one(RELEASE["flock"])
    three(TRY["flock"])
    for process in (one, two):
        assert process.errno(TRY["flock"]) in BLOCKED


@pytest.mark.parametrize("locked", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("way", ["data", "db.sqlite", "x.lock"])
def test_locked_after_an_exchange_of_two_names(place: Path, party: Make, way: str, locked: bool) -> None:
    first, second = place / way, place / f"other-{way}"
    flags = os.O_RDONLY if way == "data" else os.O_RDWR
    one, two, three = party(), party(), party()
    for process, path in ((one, first), (two, second)):
        path.write_text(path.name)
        opened(process, path, flags)
        if locked:
            process(TRY["flock"])
            process(RELEASE["flock"])
    assert one(EXCHANGE, a=str(first), b=str(second)) == 0
    for process in (one, two):
        process(TRY["flock"])
    opened(three, second, flags)
    assert three("os.read(fd, 100)") == os.fsencode(way)
    assert three.errno(TRY["flock"]) in BLOCKED
    one(RELEASE["flock"])
    three(TRY["flock"])


def test_what_is_open_for_writing_follows_an_exchange(place: Path, party: Make) -> None:
    one = party()
    (place / "other").write_text("other")
    opened(one, place / "data")
    one("os.write(fd, b'one')")
    assert one(EXCHANGE, a=str(place / "data"), b=str(place / "other")) == 0
    one("os.write(fd, b' and more')")
    one("os.close(fd)")
    assert (place / "data").read_text() == "other"
    assert (place / "other").read_text() == "one and more"


def test_an_open_file_of_which_a_link_is_made(place: Path, party: Make) -> None:
    """The extension opened it; only Python knows by now that it had one name then."""
    (place / "data").write_text("x")
    one, two = party(), party()
    opened(one, place / "data", os.O_RDONLY)
    os.link(place / "data", place / "link")
    os.stat(place / "link")
    one(TRY["flock"])
    opened(two, place / "data", os.O_RDONLY)
    assert two.errno(TRY["flock"]) in BLOCKED


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("way", ["bare", "mount"])
def test_a_conversion_that_is_refused_loses_the_lock(
    make_mount: MountFactory, tmp_path: Path, party: Make, way: str, shared: bool
) -> None:
    first = second = tmp_path
    if way == "mount":
        first = make_mount().path
        second = make_mount().path if shared else first
    one, two, three = party(), party(), party()
    opened(one, first / "x.lock")
    for process in (two, three):
        opened(process, second / "x.lock")
    for process in (one, two):
        process("flock(fd, LOCK_SH)")
    assert one.errno(TRY["flock"]) in BLOCKED
    two(RELEASE["flock"])
    three(TRY["flock"])
