"""What `-o locks=auto` makes of a filesystem: it is known, or it is tried, or there are no locks; and two who probe."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safefs import probe
from safefs.errors import SafefsError
from safefs.family import Mounted
from safefs.probe import MEETING, Finding, Meeting
from safefs.verdict import FILE, RACES, Client, Verdict, write
from tests.support.mounting import safefs_command

EXT4 = Mounted("ext4", "/dev/vda", "254:0", ("rw",))
NFS = Mounted("nfs4", "srv:/export", "0:58", ("rw", "local_lock=none"))
UNKNOWN = Mounted("newfs", "srv:/x", "0:74", ("rw",))
NAMELESS = Mounted("fuse", "bucket", "0:75", ("rw",))
DECIDED = Verdict(1.7e9, "fuse", (Client("a1", "one"), Client("b2", "two")), dict.fromkeys(RACES, "yes"), False)


def refusal(state: Path, mounted: Mounted, backing: Mounted) -> str:
    with pytest.raises(SafefsError) as caught:
        probe.why_lease_files(state, mounted, backing)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def never(*_: Any) -> None:
    raise AssertionError("nothing has to be tried")


def copied(source: str, target: str) -> None:
    """A rename as of a filesystem that does not decide it in one place: all of several succeed."""
    shutil.copy(source, target)
    time.sleep(0.02)


def refused_call(number: int) -> Callable[..., None]:
    def call(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_filesystem_of_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe_alone", never)
    assert "each daemon counts as a node" in probe.why_lease_files(tmp_path, EXT4, EXT4)


@pytest.mark.parametrize("mounted", [NFS, UNKNOWN, Mounted()])
def test_others_are_tried(tmp_path: Path, mounted: Mounted) -> None:
    assert "a rename has one winner" in probe.why_lease_files(tmp_path, mounted, mounted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mounted", [NFS, UNKNOWN])
def test_where_several_rename_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: Mounted) -> None:
    monkeypatch.setattr(probe.os, "rename", copied)
    assert "a rename has one winner: no" in refusal(tmp_path, mounted, mounted)


def test_what_does_not_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, in bounded time, and there are no locks rather than this node's own."""
    monkeypatch.setattr(probe, "CALL_SECONDS", 0.1)
    monkeypatch.setattr(probe, "rename_is_decided_once", lambda _directory: time.sleep(60))
    start = time.monotonic()
    assert os.strerror(errno.ETIMEDOUT) in refusal(tmp_path, UNKNOWN, UNKNOWN)
    assert time.monotonic() - start < 30


def test_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.os, "rename", refused_call(errno.EIO))
    assert "a rename has one winner: no" in refusal(tmp_path, UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("kind", sorted(probe.REFUSED))
def test_filesystems_that_are_known_not_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whatever a probe from one node would find."""
    monkeypatch.setattr(probe, "probe_alone", never)
    assert probe.REFUSED[kind] in refusal(tmp_path, Mounted(kind), Mounted(kind))


def test_fuse_that_does_not_say_which_is_what_two_nodes_found(tmp_path: Path) -> None:
    """From one node all is well there, since its kernel decides.  Locks need not exclude: lease files use none."""
    assert all(finding.good is not False for finding in probe.probe_alone(tmp_path, NAMELESS))
    state = tmp_path / ".safefs"
    state.mkdir()
    line = refusal(state, NAMELESS, NAMELESS)
    assert f"run `safefs probe {tmp_path} --peer` on two nodes at once, or use -o locks=etcd://HOST:PORT" in line
    assert "-o locks=memory where no other node uses this directory" in line
    write(state, DECIDED)
    words = probe.why_lease_files(state, NAMELESS, NAMELESS)
    assert words.startswith("tried on fuse: ") and "the probe of" in words and "on one and two found" in words


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (replace(DECIDED, clients=(Client("a1", "one"),) * 2), "through one mount"),
        (replace(DECIDED, kind="fuse.sshfs"), "was of fuse.sshfs, and this is fuse"),
        *[
            (replace(DECIDED, results={**DECIDED.results, race: "of 100 races, both won 57"}), f"{race}: of 100 races")
            for race in RACES
        ],
        (replace(DECIDED, results={}), "not tried"),
    ],
)
def test_what_two_nodes_found_that_is_not_enough(tmp_path: Path, found: Verdict, why: str) -> None:
    write(tmp_path, found)
    assert why in refusal(tmp_path, NAMELESS, NAMELESS)


def test_a_verdict_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    assert "cannot be read" in refusal(tmp_path, NAMELESS, NAMELESS)


def test_fuse_over_a_directory_of_this_node(tmp_path: Path) -> None:
    """Is tried as before (bindfs): no bucket has such a name."""
    bindfs = replace(NAMELESS, source="/srv/directory")
    assert probe.why_lease_files(tmp_path, bindfs, bindfs).startswith("tried on fuse: ")


def test_one_probe_says_that_it_takes_two(tmp_path: Path) -> None:
    (known,) = [finding for finding in probe.probe_alone(tmp_path, NAMELESS) if finding.what == "known of it"]
    assert "two have to find out" in known.result and known.good is None


def test_state_that_other_nodes_do_not_see(tmp_path: Path) -> None:
    """A state directory on this node's disk, for a backing that others have as well."""
    assert "other nodes on the backing (nfs4) cannot look" in refusal(tmp_path, EXT4, NFS)
    assert probe.why_lease_files(tmp_path, NFS, NFS)


# Two who meet.  In one process they look in turns.

SECONDS = 60.0
AT_ONCE = 5.0  # on a busy machine
OLD = ("here-c0ffee00", "first-1-0123.6e", "second-1-0123.6e", "second-3-refused", "lock.flock", "O_EXCL.0")


def leave(directory: Path) -> Path:
    """What killed probes have left: of today and of before, waiting and in the middle."""
    hall = directory / MEETING
    place = hall / "0aaa0000-1bbb0000"
    place.mkdir(parents=True)
    for name in OLD:
        (hall / name).touch()
        (place / name).touch()
    (hall / "here-0aaa0000-17-1bbb0000").mkdir()
    (hall / "here-00000000-3-").mkdir()
    (hall / "look-00000000-1234abcd").touch()
    return hall


def rounds(*meetings: Meeting, most: int = 20) -> set[Meeting]:
    """Those who have met, after they have looked in turns."""
    met: set[Meeting] = set()
    for _ in range(most):
        met |= {meeting for meeting in meetings if meeting not in met and meeting._meet()}
    return met


@pytest.fixture
def is_quiet_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "QUIET_SECONDS", 0.3)


def test_two_meet_whatever_others_have_left(tmp_path: Path) -> None:
    """They choose each other, and hear no word of an earlier meeting."""
    hall = leave(tmp_path)
    one, two = Meeting(tmp_path), Meeting(tmp_path)
    assert rounds(one, two) == {one, two}
    assert (one._me.chosen, two._me.chosen) == (two._me.name, one._me.name)
    for meeting in (one, two):
        meeting.open()
    assert one.path == two.path and one.first is not two.first
    assert [entry for entry in os.listdir(one.path) if "look" not in entry] == []
    one.say("hello")
    assert two.hear() == "hello"
    for meeting in (one, two):
        meeting.close()
    assert not Path(one.path).exists()
    assert not list(hall.glob("here-*" + one._me.name + "*"))


def test_leftovers_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_quiet_soon: None) -> None:
    """By this node's own clock: those who have not changed for a while; places later, since much is done in silence."""
    hall = leave(tmp_path)
    for path in hall.iterdir():
        os.utime(path, (time.time() + 9999,) * 2)
    one = Meeting(tmp_path)
    rounds(one)
    time.sleep(0.4)
    rounds(one)
    assert sorted(os.listdir(hall)) == ["0aaa0000-1bbb0000", str(one._me)]
    monkeypatch.setattr(probe, "STEP_SECONDS", 0.1)
    rounds(one)
    one.close()
    assert not list(tmp_path.iterdir())


def test_a_place_in_which_something_is_said_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_quiet_soon: None
) -> None:
    monkeypatch.setattr(probe, "STEP_SECONDS", 0.3)
    one, two, third = (Meeting(tmp_path) for _ in range(3))
    assert rounds(one, two) == {one, two}
    one.open()
    two.open()
    for word in range(10):
        one.say(str(word))
        assert rounds(third, most=1) == set()
        assert two.hear() == str(word)
        time.sleep(0.1)
    third.close()
    one.say("still here")
    assert two.hear() == "still here"
    for meeting in (one, two):
        meeting.close()
    assert not list(tmp_path.iterdir())


def test_who_is_taken_for_gone_and_lives(tmp_path: Path, is_quiet_soon: None) -> None:
    """Loses a name, which costs nothing: two who were both frozen meet."""
    one, two = Meeting(tmp_path), Meeting(tmp_path)
    rounds(two, most=1)
    rounds(one, most=1)
    time.sleep(0.4)
    rounds(one, most=3)
    assert not list((tmp_path / MEETING).glob(f"here-{two._me.name}-*"))
    assert rounds(one, two) == {one, two}
    for meeting in (one, two):
        meeting.close()


@pytest.mark.parametrize("come", [3, 4])
def test_of_several_each_meets_one(tmp_path: Path, come: int) -> None:
    """Whatever the order in which they look: who goes to a place finds the one there whom he has chosen."""
    for attempt in range(8):
        order, meetings = random.Random(attempt), [Meeting(tmp_path) for _ in range(come)]
        met: dict[str, str] = {}
        for _ in range(40 * come):
            one = order.choice(meetings)
            if one._me.name not in met and one._meet():
                met[one._me.name] = one._me.chosen
            if len(met) == come - come % 2:
                break
        assert len(met) == come - come % 2
        assert all(met[chosen] == name for name, chosen in met.items())
        for meeting in meetings:
            meeting.close()
        assert not list(tmp_path.iterdir())


def test_who_is_gone_before_he_is_chosen(tmp_path: Path, is_quiet_soon: None) -> None:
    """He has been seen to change, and is not any more; somebody else is chosen."""
    one, gone, two = (Meeting(tmp_path) for _ in range(3))
    for _ in range(2):
        gone._meet()
        one._meet()
    assert one._me.chosen == gone._me.name
    time.sleep(0.4)
    assert rounds(one, two) == {one, two}
    for meeting in (one, two):
        meeting.close()
    assert not list(tmp_path.iterdir())


def test_nobody_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MEET_SECONDS", 0.5)
    leave(tmp_path)
    start = time.monotonic()
    with pytest.raises(SafefsError, match=r"^no other probe came to .* within 0.5 s: run `safefs probe DIR --peer`"):
        probe.probe_with_peer(tmp_path, EXT4)
    assert time.monotonic() - start < AT_ONCE


@contextmanager
def probing(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """`safefs probe --peer`, of which the first line has been read: it waits."""
    process = subprocess.Popen(
        safefs_command("probe", directory, "--peer"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None and process.stderr.readline().startswith("waiting for the other node")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def await_here(directory: Path, count: int) -> None:
    hall = directory / MEETING
    assert probe.until(lambda: hall.exists() and len({name[:13] for name in os.listdir(hall)}) >= count, SECONDS)


def ended(process: subprocess.Popen[str]) -> str:
    """The one line with which it fails, soon."""
    output, said = process.communicate(timeout=AT_ONCE)
    assert process.returncode == 1 and not output
    assert said.startswith("safefs: ") and said.count("\n") == 1, said
    return said


def test_probes_after_one_that_was_killed(tmp_path: Path) -> None:
    leave(tmp_path)
    with probing(tmp_path) as killed:
        await_here(tmp_path, 4)
        killed.kill()
    with probing(tmp_path) as one, probing(tmp_path) as two:
        for process in (one, two):
            output, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said
            assert said.startswith("recorded in ") and "OFD excludes" in output
            assert "good" in next(line for line in output.splitlines() if line.startswith("OFD excludes"))


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_an_interrupt(tmp_path: Path, kill: Callable[[int, int], None]) -> None:
    """Of the process, or of all that the terminal's Ctrl-C reaches."""
    with probing(tmp_path) as process:
        await_here(tmp_path, 1)
        kill(process.pid, signal.SIGINT)
        assert "the probe was interrupted" in ended(process)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_an_interrupt_in_the_middle(tmp_path: Path, kill: Callable[[int, int], None]) -> None:
    """Whoever is still there hears it at once, and nothing is on record."""
    with probing(tmp_path) as process:
        peer = Meeting(tmp_path)
        peer.open()
        kill(process.pid, signal.SIGINT)
        assert "the probe was interrupted" in ended(process)
        with pytest.raises(FileNotFoundError):
            peer.say()
        peer.close()
    assert not list(tmp_path.iterdir())


def test_the_other_ends_in_the_middle(tmp_path: Path) -> None:
    with probing(tmp_path) as process:
        peer = Meeting(tmp_path)
        peer.open()
        assert probe._introduced(peer, Client("other", "there"))
        peer.close()
        assert "the other probe has ended: run `safefs probe DIR --peer` on two nodes at once" in ended(process)
    assert not list(tmp_path.iterdir())


# Two who try each other's locks.

KINDS = ("flock", "fcntl", "OFD")


def both_find(directory: Path, kind: str, before: Callable[[], None] = lambda: None) -> Finding:
    """What two probes say of a kind of lock; the second is a process of its own, in which `before` is called first."""
    meetings = Meeting(directory), Meeting(directory)
    rounds(*meetings)
    for meeting in meetings:
        meeting.open()
    first, second = sorted(meetings, key=lambda meeting: not meeting.first)
    fork = multiprocessing.get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)

    def run() -> None:
        before()
        sending.send(probe._excludes(second, kind))

    process = fork.Process(target=run)
    process.start()
    try:
        found = probe._excludes(first, kind)
        assert receiving.poll(SECONDS) and receiving.recv() == found
        return found
    finally:
        process.join(SECONDS)
        for meeting in meetings:
            meeting.close()


@pytest.mark.parametrize("kind", KINDS)
def test_locks_that_exclude(tmp_path: Path, kind: str) -> None:
    assert both_find(tmp_path, kind) == Finding(f"{kind} excludes", "yes", True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_locks_of_a_file_that_the_other_may_not_open(tmp_path: Path, kind: str) -> None:
    """As where the two probes are different users to the server: the locks have not been tried."""

    def other_user() -> None:
        opened = os.open

        def refuse(path: str, flags: int, *rest: Any) -> int:
            if path.endswith(f"/lock.{kind}"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return opened(path, flags, *rest)

        probe.os.open = refuse  # in a process of its own

    assert both_find(tmp_path, kind, other_user) == Finding(f"{kind} excludes", "open: EACCES", None)


@pytest.mark.parametrize(("kind", "number"), [("flock", errno.EAGAIN), ("fcntl", errno.EACCES), ("OFD", errno.EAGAIN)])
def test_locks_that_are_refused_whatever_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    """Which takes the first as long as some clients need for an unlock."""
    monkeypatch.setattr(probe, "CALL_SECONDS", 1.0)

    def never_grant() -> None:
        probe._LOCKS[kind] = refused_call(number)  # in a process of its own

    found = both_find(tmp_path, kind, never_grant)
    assert found == Finding(f"{kind} excludes", "no: it is refused also when nobody has the lock", False)


def test_an_unlock_that_the_server_hears_of_late(tmp_path: Path) -> None:
    """As from clients that release a lock after the process is gone."""

    def refuse_for_a_while() -> None:
        lock, until = probe._LOCKS["OFD"], time.monotonic() + 1

        def late(fd: int) -> object:
            return lock(fd) if time.monotonic() > until else refused_call(errno.EAGAIN)()

        probe._LOCKS["OFD"] = late

    assert both_find(tmp_path, "OFD", refuse_for_a_while).good is True


@contextmanager
def older_peer(directory: Path, name: str) -> Iterator[Meeting]:
    """Plays one who says what versions before this one said: the first with a small name, the second with a big one."""
    peer = Meeting(directory)
    peer._me = replace(peer._me, name=name)
    peer.open()
    probe._introduced(peer, Client("older", "there"))
    try:
        yield peer
    finally:
        peer.close()


def test_an_older_probe_that_locks_first(tmp_path: Path) -> None:
    """It does not let go for a second try, so nothing is known: both end at once."""
    with probing(tmp_path) as process, older_peer(tmp_path, "00000000") as older:
        with probe._held("flock", f"{older.path}/lock.flock") as problem:
            assert not problem
            older.say("held")
            assert older.hear() == "out"
        older.say("held")
        assert "another version of safefs" in ended(process)


def test_an_older_probe_that_locks_second(tmp_path: Path) -> None:
    """Its `refused` may be an open(2) that failed."""
    with probing(tmp_path) as process, older_peer(tmp_path, "ffffffff") as older:
        assert older.hear() == "held"
        older.say("refused")
        assert "another version of safefs" in ended(process)
