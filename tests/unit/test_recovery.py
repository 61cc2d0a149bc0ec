"""What a dead daemon left behind is settled once, and a living daemon's work is never touched."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from safefs import backing
from safefs import recovery as recovery_module
from safefs import state as state_files
from safefs.backing import Backing
from safefs.cli.locks import _row as lock_row
from safefs.cluster.backend import BackendError
from safefs.events import EventLog
from safefs.identity import DAEMON, Identities, read_back
from safefs.model import Caller, Identity
from safefs.namespace import Node as Directory
from safefs.publisher import Publisher
from safefs.recovery import DEAD_AFTER_SECONDS, Recovery, _read_journal
from safefs.rules import Verify
from safefs.softlocks import Mark, all_noted
from safefs.state import RECORD_VERSION, SOFT_LOCKS, DaemonRecord, StateDirectory, host_identity
from tests.support.underlays import rename_without_flags

OTHER = "0badcafe"
LOST = "0123456789abcdef"  # its name in the cluster
HIDDEN = f".safefs~{OTHER}~d~1"
DEAD_HERE = {"start": 1}  # this process's number, taken by another before it
ELSEWHERE = {"machine": "another", "host": "another"}


def entry_of(file: Path) -> dict[str, Any]:
    """A lock file in the root, as its daemon has it on record."""
    fd = os.open(file, os.O_PATH)
    try:
        mark = Mark.of(fd)
    finally:
        os.close(fd)
    known = {"ino": mark.ino, "born": mark.born, "changed": mark.changed}
    return {"path": file.name, "creator": "alive", "stale": "signalled", "pid": 1, **known}


def touched(path: Path) -> Path:
    path.touch()
    return path


@dataclass
class Clock:
    """time.monotonic, by hand."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Node:
    """This daemon, with another daemon's record beside its own."""

    root: Path
    state: StateDirectory
    record: DaemonRecord
    recovery: Recovery
    me: dict[str, Any]  # what this host says of itself

    @property
    def daemons(self) -> list[str]:
        return sorted(os.listdir(self.state.path / "daemons"))

    @property
    def settled(self) -> bool:
        return self.daemons == [self.record.path.name]

    def kept(self) -> dict[str, bytes]:
        """The quarantine: reason and bytes."""
        directory = self.state.path / "quarantine"
        return {
            json.loads(path.read_text())["reason"]: path.with_suffix("").read_bytes()
            for path in directory.glob("*.json")
        }

    def other(self, identity: dict[str, Any] | str | None, *journal: dict[str, str] | str, name: str = OTHER) -> Path:
        """The record that another daemon left; `identity` is what differs from a daemon of this process."""
        path = self.state.path / "daemons" / name
        path.mkdir()
        if isinstance(identity, str):
            (path / "identity.json").write_text(identity)
        elif identity is not None:
            (path / "identity.json").write_text(json.dumps({**host_identity(), **identity}))
        (path / "heartbeat").write_text("1\n")
        lines = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in journal]
        (path / "journal").write_text("".join(lines))
        return path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hand = Clock()
    monkeypatch.setattr(time, "monotonic", hand)
    return hand


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    me = {**host_identity(), "machine": "0123456789abcdef"}  # a test machine need not have a machine-id
    monkeypatch.setattr(state_files, "host_identity", lambda: dict(me))
    monkeypatch.setitem(globals(), "host_identity", lambda: dict(me))
    store = Backing(tmp_path, Identities(impersonate=False), max_threads=2)
    state = StateDirectory(tmp_path / ".safefs", store.identities)
    record = DaemonRecord(state, store.node_id, {})
    yield Node(tmp_path, state, record, Recovery(store, state, record, EventLog(state.events, store.node_id)), me)
    record.remove()
    os.close(state.quarantine_fd)
    os.close(store.root_fd)


# ------------------------------------------------------------- who is dead


@pytest.mark.parametrize(
    "identity",
    [DEAD_HERE, {"boot": "before"}, {"boot": "before", "pid_namespace": 1}],
    ids=["another process has its number", "booted again", "booted again, a container"],
)
def test_a_daemon_that_is_known_to_be_dead_is_settled_at_once(node: Node, identity: dict[str, Any]) -> None:
    node.other(identity, {"directory": ""})
    (node.root / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert node.settled
    assert not (node.root / HIDDEN).exists()
    assert node.kept() == {"its daemon ended before it was published": b"left"}


async def until_it_beats(node: Node) -> None:
    before = state_files.heartbeat_of(node.record.path)
    with trio.fail_after(10):
        while state_files.heartbeat_of(node.record.path) == before:  # noqa: ASYNC110 - a file
            await trio.sleep(0.01)


def test_who_settles_for_long_goes_on_beating(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else others would take it for dead, and what is being written through it for leftovers."""
    monkeypatch.setattr(recovery_module, "BEAT_SECONDS", 0.01)
    settling, done = threading.Event(), threading.Event()

    def settle_for_long() -> None:
        settling.set()
        assert done.wait(60)

    monkeypatch.setattr(node.recovery, "settle_dead", settle_for_long)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.recovery.beat)
            nursery.start_soon(node.recovery.run)
            try:
                await trio.to_thread.run_sync(settling.wait, 60)
                await until_it_beats(node)
            finally:
                done.set()
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_calls_that_hang_in_the_backing_stop_no_heartbeat(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many: the state directory may answer while they do not come back."""
    monkeypatch.setattr(recovery_module, "BEAT_SECONDS", 0.01)
    hang, store = threading.Event(), node.recovery._backing

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(store.run, DAEMON, hang.wait, 60)
            try:
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(node.recovery.beat)
                await until_it_beats(node)
                await until_it_beats(node)
            finally:
                hang.set()
                nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("failing", ["open", "close"])
def test_a_daemon_goes_on_beating_where_there_is_no_space(
    node: Node, monkeypatch: pytest.MonkeyPatch, number: int, failing: str
) -> None:
    """In the room that its last heartbeat has, of which a reader never sees less; and as before once there is space."""
    heartbeat, real, seen = node.record.path / "heartbeat", open, set[tuple[int, int, str]]()

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if failing == "close":
            real(path, *arguments, **options).close()
        raise OSError(number, os.strerror(number))

    def note() -> None:
        seen.add((heartbeat.stat().st_ino, heartbeat.stat().st_size, state_files.heartbeat_of(node.record.path)))

    with monkeypatch.context() as patch:
        patch.setattr(state_files, "open", full, raising=False)
        for _ in range(12):  # over a number that takes one digit more
            note()
            node.record.beat()
    note()
    assert len({ino for ino, _, _ in seen}) == len({size for _, size, _ in seen}) == 1
    assert sorted(int(text) for _, _, text in seen) == list(range(1, 14))
    node.record.beat()
    note()
    assert len({ino for ino, _, _ in seen}) == 2 and len(seen) == 14


def test_a_record_that_is_gone_is_not_made_of_a_heartbeat_where_there_is_no_space(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor taken for gone where only the heartbeat is missing: what else is on record stays."""
    (node.record.path / "heartbeat").unlink()

    def full(*_arguments: Any, **_options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state_files, "open", full, raising=False)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            node.record.beat()
    assert sorted(os.listdir(node.record.path)) == ["identity.json", "journal"]
    node.record.beat()
    assert state_files.heartbeat_of(node.record.path)


@dataclass
class Heart:
    """This daemon's: of its beats the first does not end, or not well."""

    fails: bool
    beats: int = 0

    def __post_init__(self) -> None:
        self.may_end = threading.Event()

    def beat(self) -> None:
        self.beats += 1
        if self.beats == 1:
            assert self.may_end.wait(60)
            if self.fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def until(self, beats: int) -> None:
        with trio.fail_after(30):
            while self.beats < beats:  # noqa: ASYNC110 - another thread
                await trio.sleep(0.01)


def is_dead_after_a_minute(node: Node, clock: Clock) -> None:
    """The other daemon, which is looked at from now on."""
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    clock.now += 1
    node.recovery.settle_dead()
    assert node.settled


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "hangs"])
def test_who_cannot_beat_himself_takes_nobody_for_dead(
    node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """What keeps him from it keeps the others too, and when it ends he may be the first."""
    heart = Heart(fails)
    monkeypatch.setattr(recovery_module, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(node.record, "beat", heart.beat)
    node.other(ELSEWHERE, {"directory": ""})
    (node.root / HIDDEN).write_bytes(b"being written")
    node.recovery.settle_dead()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            if fails:
                clock.now += DEAD_AFTER_SECONDS + 1
            nursery.start_soon(node.recovery.beat)
            await heart.until(1)
            if not fails:
                clock.now += DEAD_AFTER_SECONDS + 1
                node.recovery.settle_dead()
                assert OTHER in node.daemons
            heart.may_end.set()
            await heart.until(2)
            nursery.cancel_scope.cancel()

    trio.run(main)
    is_dead_after_a_minute(node, clock)


def test_a_living_daemon_of_this_host_is_left_alone_however_slow_its_heart(node: Node, clock: Clock) -> None:
    node.other({}, {"directory": ""})
    (node.root / HIDDEN).write_bytes(b"being written")
    node.recovery.settle_dead()
    clock.now += 10 * DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    assert (node.root / HIDDEN).read_bytes() == b"being written"
    assert node.kept() == {}


@pytest.mark.parametrize(
    "identity",
    [ELSEWHERE, {"host": "another"}, {"machine": "another"}, {"pid_namespace": 1}, '{"vers', None],
    ids=["elsewhere", "other name", "other machine", "a container", "cut short", "being made"],
)
def test_what_cannot_be_known_is_judged_by_the_heartbeat(
    node: Node, clock: Clock, identity: dict[str, Any] | str | None
) -> None:
    other = node.other(identity, {"directory": ""})
    (node.root / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    (other / "heartbeat").write_text("2\n")
    clock.now += 1
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    assert (node.root / HIDDEN).exists()
    clock.now += 1
    node.recovery.settle_dead()
    assert node.settled
    assert list(node.kept().values()) == [b"left"]


def test_a_record_without_a_heartbeat_is_given_its_time(node: Node, clock: Clock) -> None:
    (node.other(ELSEWHERE) / "heartbeat").unlink()
    is_dead_after_a_minute(node, clock)


def test_a_machine_without_an_id_sees_the_end_of_its_own_processes(node: Node) -> None:
    node.me["machine"] = ""
    node.other({"machine": "", **DEAD_HERE})
    node.recovery.settle_dead()
    assert node.settled


def test_a_machine_without_an_id_judges_another_boot_by_the_heartbeat(node: Node, clock: Clock) -> None:
    node.me["machine"] = ""
    node.other({"machine": "", "boot": "before"})
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    clock.now += DEAD_AFTER_SECONDS + 1
    node.recovery.settle_dead()
    assert node.settled


MACHINE = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "known"),
    [
        (MACHINE.encode() + b"\n", MACHINE),
        (MACHINE.encode(), MACHINE),
        (b"uninitialized\n", ""),  # an image that has not been booted
        (b"", ""),
        (b"\xff" + MACHINE.encode(), ""),
        (MACHINE[:-1].encode(), ""),
        (MACHINE.upper().encode(), ""),
        (b"0" * 32, ""),
    ],
)
def test_what_counts_as_a_machine_id(
    content: bytes, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """machine-id(5).  Two hosts with one of anything else would each take the other for itself, booted again."""
    (tmp_path / "machine-id").write_bytes(content)
    read = state_files._read_first_line
    places = {"/etc/machine-id": os.fspath(tmp_path / "machine-id")}
    monkeypatch.setattr(state_files, "_read_first_line", lambda path: read(places.get(path, path)))
    me = host_identity()
    assert me["machine"] == known
    another_boot = {**me, "boot": "another"}
    assert state_files.known_dead(another_boot) is (True if known else None)
    for older in ("uninitialized", ""):  # what a daemon of before has on record, and one that has none either
        assert state_files.known_dead({**another_boot, "machine": older}) is None
    assert state_files.known_dead(me) is False


@pytest.mark.parametrize("identity", [DEAD_HERE, ELSEWHERE])
def test_a_record_of_an_unknown_version_is_left_alone(node: Node, clock: Clock, identity: dict[str, Any]) -> None:
    node.other({**identity, "version": RECORD_VERSION + 1}, {"directory": ""})
    (node.root / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    clock.now += 10 * DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    assert (node.root / HIDDEN).exists()


def test_its_own_record_is_never_settled(node: Node, clock: Clock) -> None:
    clock.now += 10 * DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert node.settled
    node.record.beat()
    assert int((node.record.path / "heartbeat").read_text()) == 2


@pytest.mark.parametrize("late", ["soft locks", "etcd"])
def test_what_is_noted_while_a_daemon_ends_leaves_no_record(
    node: Node, late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have no heartbeat, and others would settle it: lock files of processes that live were removed so."""
    record, rmdir = DaemonRecord(node.state, OTHER, {}), Path.rmdir

    def note_before(path: Path) -> None:
        if late == "etcd":
            record.note_etcd("id")
        else:
            record.write_soft_locks({"node": "", "locks": []})
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", note_before)
    record.remove()
    assert node.settled


def test_a_note_that_takes_long_stops_no_heartbeat_and_is_removed_at_the_end(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, fsync = DaemonRecord(node.state, OTHER, {}), os.fsync
    syncing, go_on = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        syncing.set()
        assert go_on.wait(60)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    noting = threading.Thread(target=record.write_soft_locks, args=({"node": "", "locks": []},))
    noting.start()
    ending = threading.Thread(target=record.remove)
    try:
        assert syncing.wait(60)
        before = state_files.heartbeat_of(record.path)
        record.beat()
        assert state_files.heartbeat_of(record.path) != before
        ending.start()
    finally:
        go_on.set()
        noting.join(60)
    ending.join(60)
    assert not ending.is_alive() and node.settled


def test_a_settling_that_was_cut_short_is_taken_up(node: Node) -> None:
    """The record goes by the name of its settler; the hidden names still bear the dead daemon's."""
    node.other(DEAD_HERE, {"directory": ""}, name=f"{OTHER}.settling-11111111")
    (node.root / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert node.settled
    assert list(node.kept().values()) == [b"left"]


def test_another_settler_may_be_quicker(node: Node) -> None:
    path = node.other(DEAD_HERE, {"directory": ""})
    (node.root / HIDDEN).write_bytes(b"left")
    path.rename(node.root / "taken")
    node.recovery._settle(path)
    assert (node.root / HIDDEN).exists()


# ------------------------------------------------------- what it left behind


def test_leftovers_of_every_directory_are_kept_and_empty_ones_removed(node: Node) -> None:
    (node.root / "a" / "b").mkdir(parents=True)
    node.other(DEAD_HERE, {"directory": "a/b"}, {"directory": "a"}, {"directory": "gone"}, {"directory": ""})
    (node.root / "a" / "b" / HIDDEN).write_bytes(b"deep")
    (node.root / "a" / HIDDEN).touch()
    mine = node.root / "a" / f".safefs~{node.record.path.name}~d~1"
    others = node.root / "a" / ".safefs~0badcafe2~d~1"
    for path in (mine, others, node.root / "a" / "name"):
        path.write_bytes(b"not its own")
    node.recovery.settle_dead()
    assert node.settled
    assert list(node.kept().values()) == [b"deep"]
    assert os.listdir(node.root / "a" / "b") == []
    assert sorted(os.listdir(node.root / "a")) == sorted([mine.name, others.name, "b", "name"])


def test_what_another_settles_meanwhile_keeps_nothing_else_from_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who was slow to settle goes on with what there is, beside the one who took the record over."""
    node.other(DEAD_HERE, {"directory": ""})
    names = [f".safefs~{OTHER}~d~{number}" for number in range(4)]
    for name in names:
        (node.root / name).write_bytes(name.encode())
    keep, taken = node.state.keep_leftover, list[bytes]()

    def lose_the_first(directory: int, hidden: bytes, *others: Any) -> None:
        if not taken:
            taken.append(hidden)
            (node.root / os.fsdecode(hidden)).rename(node.root / "taken")
        keep(directory, hidden, *others)

    monkeypatch.setattr(node.state, "keep_leftover", lose_the_first)
    node.recovery.settle_dead()
    assert node.settled
    assert not any((node.root / name).exists() for name in names)
    (event,) = node.recovery._events.taken()
    assert event["files"] == len(list((node.state.path / "quarantine").glob("*.json"))) == len(names) - 1


def test_a_directory_that_became_something_else_is_passed_over(node: Node) -> None:
    node.other(DEAD_HERE, {"directory": "file"}, {"directory": ""})
    (node.root / "file").touch()
    (node.root / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert node.settled
    assert list(node.kept().values()) == [b"left"]


def test_a_symbolic_link_in_a_directorys_place_leads_nowhere(
    node: Node, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / HIDDEN).write_bytes(b"outside")
    node.other(DEAD_HERE, {"directory": "swapped"}, {"directory": ""})
    (node.root / "swapped").symlink_to(outside)
    (node.root / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert (outside / HIDDEN).read_bytes() == b"outside"
    assert node.settled
    assert list(node.kept().values()) == [b"left"]


def test_a_symbolic_link_on_the_way_to_a_directory_leads_nowhere(
    node: Node, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "sub").mkdir()
    (outside / "sub" / HIDDEN).write_bytes(b"outside")
    node.other(DEAD_HERE, {"directory": "swapped/sub"})
    (node.root / "swapped").symlink_to(outside)
    node.recovery.settle_dead()
    assert (outside / "sub" / HIDDEN).read_bytes() == b"outside"
    assert node.settled


def test_a_journal_that_was_cut_short_counts_as_far_as_it_goes(node: Node) -> None:
    (node.root / "a").mkdir()
    node.other(DEAD_HERE, {"directory": "a"}, '{"directory": "b')
    (node.root / "a" / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert node.settled
    assert list(node.kept().values()) == [b"left"]


def test_a_record_without_a_journal_is_removed(node: Node) -> None:
    (node.other(DEAD_HERE) / "journal").unlink()
    node.recovery.settle_dead()
    assert node.settled


def test_names_need_not_be_utf8(node: Node) -> None:
    name = os.fsdecode(b"d\xff")
    (node.root / name).mkdir()
    node.other(DEAD_HERE, {"directory": name})
    (node.root / name / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert list(node.kept().values()) == [b"left"]


# ------------------------------------------------------------ partial files

PARTIAL = f".safefs~{OTHER}~p~7"
NOTE = {"directory": "", "hidden": PARTIAL, "name": "x.part"}


@pytest.fixture(params=["renameat2", "rename"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without RENAME_NOREPLACE, which NFS and others do not have."""
    if request.param == "rename":
        monkeypatch.setattr(backing, "rename", rename_without_flags)


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("journal", [(NOTE,), ({"directory": ""}, NOTE), (NOTE, {"directory": ""})])
def test_a_partial_file_goes_back_under_its_name(node: Node, journal: tuple[dict[str, str], ...]) -> None:
    node.other(DEAD_HERE, *journal)
    (node.root / PARTIAL).write_bytes(b"half")
    node.recovery.settle_dead()
    assert (node.root / "x.part").read_bytes() == b"half"
    assert not (node.root / PARTIAL).exists()
    assert node.kept() == {}
    assert node.settled


@pytest.mark.usefixtures("renames")
def test_a_partial_file_whose_name_is_taken_is_kept(node: Node) -> None:
    node.other(DEAD_HERE, NOTE)
    (node.root / PARTIAL).write_bytes(b"half")
    (node.root / "x.part").write_bytes(b"a new download")
    node.recovery.settle_dead()
    assert (node.root / "x.part").read_bytes() == b"a new download"
    assert node.kept() == {"its daemon ended, and its name has a new file": b"half"}
    assert not (node.root / PARTIAL).exists()


def test_a_partial_file_that_cannot_go_back_is_kept(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record says what was wrong; nobody has taken its name."""

    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    node.other(DEAD_HERE, NOTE)
    (node.root / PARTIAL).write_bytes(b"half")
    monkeypatch.setattr(backing, "rename", fail)
    node.recovery.settle_dead()
    assert not (node.root / "x.part").exists()
    assert node.kept() == {"its daemon ended, and it could not go back under its name: Disk quota exceeded": b"half"}


def test_a_partial_file_that_went_back_in_part_has_its_name_alone(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no RENAME_NOREPLACE it has both names for a moment, in which who settles it can end."""
    node.other(DEAD_HERE, NOTE)
    (node.root / "x.part").write_bytes(b"half")
    (node.root / PARTIAL).hardlink_to(node.root / "x.part")
    monkeypatch.setattr(backing, "rename", rename_without_flags)
    node.recovery.settle_dead()
    assert (node.root / "x.part").read_bytes() == b"half"
    assert not (node.root / PARTIAL).exists()
    assert node.kept() == {}


def test_a_partial_file_that_was_published_again_is_not_missed(node: Node) -> None:
    node.other(DEAD_HERE, NOTE)
    (node.root / "x.part").write_bytes(b"whole")
    node.recovery.settle_dead()
    assert (node.root / "x.part").read_bytes() == b"whole"
    assert node.kept() == {}
    assert node.settled


# ---------------------------------------------------- what records it writes


def test_what_a_daemon_notes_is_what_its_successor_reads(node: Node) -> None:
    writer = Caller(7, 8, groups=(9, 10))
    node.record.note_directory(b"a", DAEMON)
    node.record.note_directory(b"a", DAEMON)
    node.record.note_partial(b"", b"hid\xffden", b"name", writer)
    entries, is_whole = _read_journal(node.record.path / "journal")
    assert is_whole
    assert entries == [
        {"directory": "", "hidden": os.fsdecode(b"hid\xffden"), "name": "name", "writer": [7, 8, [9, 10]]},
        {"directory": "a", "writer": [0, 0, []]},
    ]
    assert read_back([7, 8, [9, 10]]) == (writer,)
    assert read_back(None) == read_back([7, 8]) == read_back(["x", 8, []]) == ()  # of another version
    assert read_back(json.loads("[1e9999, 8, []]")) == ()
    assert backing.HIDDEN_PREFIX.decode() in HIDDEN


def test_a_directory_is_on_record_where_it_lies_whatever_its_inode_number(node: Node) -> None:
    """A new one can have the number of one that was removed; one that was renamed has the number that it had."""
    store = node.recovery._backing
    publisher = Publisher(
        store, node.state, node.record, EventLog(node.state.events, store.node_id), Verify.STORAGE, retain_seconds=0
    )

    def note(name: str) -> None:
        directory = Directory(2, Identity(1, 1), stat.S_IFDIR)
        directory.fd = os.open(node.root / name, os.O_PATH)
        try:
            trio.run(publisher.note_directory, directory, DAEMON)
        finally:
            os.close(directory.fd)

    for name in ("a", "b"):
        (node.root / name).mkdir()
        note(name)
    (node.root / "b").rename(node.root / "c")
    note("c")
    note("c")
    entries, _ = _read_journal(node.record.path / "journal")
    assert [entry["directory"] for entry in entries] == ["a", "b", "c"]


def test_what_is_on_record_is_not_remembered_without_end(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "MAX_NOTED", 2)
    for path in (b"a", b"b", b"c", b"a"):
        node.record.note_directory(path, DAEMON)
        assert node.record.has_noted(path)
        assert len(node.record._noted) <= 2
    entries, _ = _read_journal(node.record.path / "journal")
    assert [entry["directory"] for entry in entries] == ["a", "b", "c", "a"]


# --------------------------------------------------------- damaged records

NOT_ASCII = b"\xff"
TOO_DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\n",
        b"3\n",
        b'["directory"]\n',
        b"{}\n",
        b'{"directory": 3}\n',
        b'{"directory": "\\u0000"}\n',
        b'{"directory": "\\ud800"}\n',
        b'{"directory": "", "hidden": "x"}\n',
        b"\n",
        TOO_DEEP + b"\n",
    ],
)
def test_a_damaged_journal_counts_for_what_it_says_and_is_kept(node: Node, line: bytes) -> None:
    """What the damaged line named cannot be found: whoever looks into the quarantine sees what is missing."""
    (node.root / "a").mkdir()
    record = node.other(DEAD_HERE, {"directory": "a"})
    (record / "journal").write_bytes(line + (record / "journal").read_bytes())
    damaged = (record / "journal").read_bytes()
    (node.root / "a" / HIDDEN).write_bytes(b"left")
    node.recovery.settle_dead()
    assert node.settled
    assert node.kept() == {
        "its daemon ended before it was published": b"left",
        f"the journal of the dead daemon {OTHER}: files that it named were not settled": damaged,
    }


@pytest.mark.parametrize("for_good", [False, True])
def test_a_directory_that_cannot_be_settled_is_tried_again(
    node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch, for_good: bool
) -> None:
    """For ten minutes; all others are settled at once, and what was on record goes to quarantine at last."""
    (node.root / "a").mkdir()
    journal = (node.other(DEAD_HERE, {"directory": "a"}, {"directory": ""}) / "journal").read_bytes()
    for directory in (node.root / "a", node.root):
        (directory / HIDDEN).write_bytes(b"left")
    settle = node.recovery._settle_directory

    def fail(entry: dict[str, Any], node_id: str) -> int:
        if entry["directory"] == "a":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return settle(entry, node_id)

    with monkeypatch.context() as patch:
        patch.setattr(node.recovery, "_settle_directory", fail)
        for _ in range(3):
            node.recovery.settle_dead()
            assert list(node.kept().values()) == [b"left"] and not node.settled
        if for_good:
            clock.now += recovery_module.FREE_SECONDS + 1
            node.recovery.settle_dead()
    node.recovery.settle_dead()
    assert node.settled
    assert (node.root / "a" / HIDDEN).exists() is for_good
    unsettled = {f"the journal of the dead daemon {OTHER}: files that it named were not settled": journal}
    assert node.kept() == {"its daemon ended before it was published": b"left", **(unsettled if for_good else {})}


def test_a_line_for_which_the_disk_has_no_space_is_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was to announce does not happen, and the next line counts."""
    write, writer = os.write, Caller(os.getuid(), os.getgid())
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda fd, data: write(fd, data[:9]))
        for name in (b"one", b"two"):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                node.record.note_directory(name, writer)
    node.record.note_directory(b"two", writer)
    found, is_whole = _read_journal(node.record.path / "journal")
    assert [entry["directory"] for entry in found] == ["two"] and not is_whole


@pytest.mark.parametrize(
    "damaged",
    [NOT_ASCII, TOO_DEEP, b"{", b"3", b'{"node": ""}', b'{"node": "", "locks": [3]}'],
    ids=lambda damaged: repr(damaged[:30]),
)
def test_a_damaged_list_of_lock_files_is_kept(node: Node, damaged: bytes) -> None:
    (node.other(DEAD_HERE, {"directory": ""}) / SOFT_LOCKS).write_bytes(damaged)
    (node.root / HIDDEN).write_bytes(b"left")
    assert [entry["path"] for entry in all_noted(node.state)] == []
    node.recovery.settle_dead()
    assert node.settled
    assert sorted(node.kept().values()) == sorted([b"left", damaged])


@pytest.mark.parametrize("missing", ["path", "creator", "stale", "pid", "ino", "born", "changed"])
def test_a_lock_file_of_which_a_part_is_missing_is_not_shown(node: Node, missing: str) -> None:
    """`safefs locks` shows the others."""
    whole, damaged = [entry_of(touched(node.root / name)) for name in ("x.lock", "y.lock")]
    del damaged[missing]
    (node.other({}) / SOFT_LOCKS).write_text(json.dumps({"node": LOST, "locks": [damaged, whole]}))
    host = node.me["host"]
    assert [lock_row(entry) for entry in all_noted(node.state)] == [
        ("x.lock", "file, exclusive", "held", "all", host, "1", LOST)
    ]


def test_lock_files_that_a_damaged_list_still_names_are_removed(node: Node) -> None:
    file = node.root / "x.lock"
    file.touch()
    (node.other(DEAD_HERE) / SOFT_LOCKS).write_text(json.dumps({"node": "", "locks": [{"path": "y"}, entry_of(file)]}))
    node.recovery.settle_dead()
    assert not file.exists()
    assert node.settled


@pytest.mark.parametrize(
    "name", ["\ud800", "\0", "n", "../../x", LOST + "\n", LOST.upper(), 3, None, [], {}], ids=ascii
)
def test_lock_files_stay_where_the_record_names_no_node(node: Node, name: object) -> None:
    """Under whose lease they stand is not known: no backend is asked for such a node, and they are not removed."""
    file = node.root / "x.lock"
    file.touch()
    record = node.other({})
    (record / SOFT_LOCKS).write_text(json.dumps({"node": name, "locks": [entry_of(file)]}))
    node.recovery.settle_dead()
    assert node.recovery._noted_by_others() == []
    (record / "identity.json").write_text(json.dumps({**host_identity(), **DEAD_HERE}))
    node.recovery._identities.clear()
    damaged = (record / SOFT_LOCKS).read_bytes()
    node.recovery.settle_dead()
    assert node.settled
    assert file.exists()
    assert list(node.kept().values()) == [damaged]


@pytest.mark.parametrize(
    "identity", ["3", "[]", "[[1, 2]]", '{"pid": "x"}', NOT_ASCII, TOO_DEEP], ids=lambda identity: repr(identity[:30])
)
def test_who_cannot_be_known_of_a_damaged_record_is_judged_by_the_heartbeat(
    node: Node, clock: Clock, identity: str | bytes
) -> None:
    record = node.other("")
    (record / "identity.json").write_bytes(identity if isinstance(identity, bytes) else identity.encode())
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    clock.now += DEAD_AFTER_SECONDS + 1
    node.recovery.settle_dead()
    assert node.settled


@pytest.mark.parametrize("name", ["pid", "start"])
def test_a_process_of_which_a_part_is_missing_is_not_known_to_be_dead(node: Node, name: str) -> None:
    identity = host_identity()
    del identity[name]
    node.other(json.dumps(identity))
    node.recovery.settle_dead()
    assert OTHER in node.daemons


def test_a_damaged_heartbeat_is_replaced_by_the_next(node: Node, clock: Clock) -> None:
    record = node.other(ELSEWHERE)
    (record / "heartbeat").write_bytes(NOT_ASCII)
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS
    (record / "heartbeat").write_text("2\n")
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons


def test_what_is_no_directory_is_nobodys_record(node: Node, clock: Clock) -> None:
    """It is left as it is, and comes in nobody's way: neither before nor behind it in the ring."""
    stray = node.state.path / "daemons" / f"{node.record.path.name}-stray"
    stray.write_bytes(b"whose?")
    node.other(DEAD_HERE)
    node.other(DEAD_HERE, name=f"{node.record.path.name}-z")
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS + 1
    node.recovery.settle_dead()
    assert node.daemons == [node.record.path.name, stray.name]
    assert stray.read_bytes() == b"whose?"


def fail_to_read(monkeypatch: pytest.MonkeyPatch, node_id: str, number: int = errno.EIO) -> None:
    """The journal of this daemon cannot be read."""
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "journal" and path.parent.name.startswith(node_id):
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)


def test_a_record_that_cannot_be_settled_stays_and_keeps_no_other_from_it(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = node.record.path.name
    names = [f"{own}-{letter}" for letter in "abc"]
    for name in names:
        node.other(DEAD_HERE, {"directory": ""}, name=name)
        (node.root / f".safefs~{name}~d~1").write_bytes(name.encode())
    with monkeypatch.context() as patch:
        fail_to_read(patch, names[0])
        for _ in range(3):
            node.recovery.settle_dead()
            left = [name for name in node.daemons if name != own]
            assert [name.partition(".")[0] for name in left] == names[:1]
        assert (node.root / f".safefs~{names[0]}~d~1").exists()
        assert [names[0] in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]
    node.recovery.settle_dead()
    assert node.settled
    assert not list(node.root.glob(".safefs~*"))


def begin_to_settle(node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of another host has left, and cannot be read at the moment."""
    node.other(ELSEWHERE, {"directory": ""})
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS + 1
    with monkeypatch.context() as patch:
        fail_to_read(patch, OTHER)
        node.recovery.settle_dead()
        assert not node.settled


def test_a_record_of_another_host_that_could_not_be_settled_is_not_watched_anew(
    node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_to_settle(node, clock, monkeypatch)
    node.recovery.settle_dead()
    assert node.settled


def test_one_that_has_a_record_again_keeps_what_it_has_there(
    node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was frozen, and others had begun to settle; once it is dead both records are settled."""
    begin_to_settle(node, clock, monkeypatch)
    again = node.other(ELSEWHERE)
    (node.root / HIDDEN).write_bytes(b"being written")
    node.recovery.settle_dead()
    assert (node.root / HIDDEN).exists()
    (again / "heartbeat").write_text("2\n")
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS + 1
    node.recovery.settle_dead()
    node.recovery.settle_dead()
    assert node.settled
    assert list(node.kept().values()) == [b"being written"]


# ------------------------------------------------- lock files that stay


def fail_to_open(monkeypatch: pytest.MonkeyPatch, number: int, times: int | None = None) -> list[bytes]:
    """No directory of the backing can be opened, so many times; which ones were tried."""
    works, tried = Backing.open_below, list[bytes]()

    def fail(store: Backing, path: bytes, others: Any = ()) -> int:
        tried.append(path)
        if times is None or len(tried) <= times:
            raise OSError(number, os.strerror(number))
        return works(store, path, others)

    monkeypatch.setattr(Backing, "open_below", fail)
    return tried


@pytest.fixture
def lock_file(node: Node) -> Path:
    """A lock file of another daemon's, on record."""
    file = node.root / "x.lock"
    file.touch()
    (node.other(DEAD_HERE) / SOFT_LOCKS).write_text(json.dumps({"node": LOST, "locks": [entry_of(file)]}))
    return file


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_lock_file_of_a_dead_daemon_that_cannot_be_removed_stays_on_record(
    node: Node, lock_file: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        fail_to_open(patch, number)
        for _ in range(3):
            node.recovery.settle_dead()
    assert not node.settled
    assert lock_file.exists()
    node.recovery.settle_dead()
    assert node.settled
    assert not lock_file.exists()
    assert ["x.lock" in record.message for record in caplog.records if record.levelname == "WARNING"] == [True]


def test_a_lock_file_that_can_never_be_removed_does_not_keep_a_record_for_ever(
    node: Node, lock_file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, errno.EIO)
    node.recovery.settle_dead()
    clock.now += recovery_module.FREE_SECONDS - 1
    node.recovery.settle_dead()
    assert not node.settled
    clock.now += 1
    node.recovery.settle_dead()
    assert node.settled
    assert lock_file.exists()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR])
def test_a_lock_file_whose_directory_is_gone_is_not_waited_for(
    node: Node, lock_file: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail_to_open(monkeypatch, number)
    node.recovery.settle_dead()
    assert node.settled
    assert tried == [b""]


def test_lock_files_of_one_that_has_a_record_again_are_its_own(
    node: Node, lock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was frozen; what is left of them stands under the name that it has in the cluster now."""
    with monkeypatch.context() as patch:
        fail_to_open(patch, errno.EIO)
        node.recovery.settle_dead()
        node.recovery.settle_dead()  # this host forgets that there was another process of that name
    again = node.other({})
    node.recovery.settle_dead()
    again.rename(node.root / "ended")
    node.recovery.settle_dead()
    assert node.settled
    assert lock_file.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_lock_files_of_a_lost_lease_are_removed_as_soon_as_that_works(
    node: Node, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then are not looked at any more."""
    monkeypatch.setattr(recovery_module, "LEASE_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(recovery_module, "FREE_AGAIN_SECONDS", 0.002)
    file = node.root / "x.lock"
    file.touch()
    (node.other({}) / SOFT_LOCKS).write_text(json.dumps({"node": LOST, "locks": [entry_of(file)]}))
    node.recovery.settle_dead()
    tried = fail_to_open(monkeypatch, number, times=3)

    async def gone(nodes: Iterable[str]) -> set[str]:
        return set(nodes)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.recovery.watch_leases, gone)
            with trio.fail_after(30):
                while file.exists() or node.recovery._freed != {LOST: math.inf}:  # noqa: ASYNC110 - a file
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(tried) == 4
    assert node.recovery._noted_by_others() == []


def test_a_node_that_cannot_be_asked_for_keeps_no_others_lock_files(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recovery_module, "LEASE_LOOK_SECONDS", 0.001)
    files = {name: node.root / f"{name}.lock" for name in (LOST, f"{1:016}", f"{2:016}")}
    for number, (name, file) in enumerate(files.items()):
        file.touch()
        record = node.other({}, name=f"{OTHER}{number}")
        (record / SOFT_LOCKS).write_text(json.dumps({"node": name, "locks": [entry_of(file)]}))
    node.recovery._watched = tuple(node.recovery._others())
    unknown = f"{1:016}"  # neither the first nor the last

    async def gone(nodes: Iterable[str]) -> set[str]:
        asked = set(nodes)
        if unknown in asked:
            raise BackendError("its heartbeat cannot be read")
        return asked

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.recovery.watch_leases, gone)
            with trio.fail_after(30):
                while sum(file.exists() for file in files.values()) > 1:  # noqa: ASYNC110 - a file
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert files[unknown].exists()
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert set(said) == {f"the lock files of node {unknown} cannot be looked at: its heartbeat cannot be read"}


def test_lock_files_of_a_node_with_a_lease_stay_though_its_heart_stops(
    node: Node, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may just not reach the state directory; once its lease is over they go, and the rest is settled."""
    monkeypatch.setattr(recovery_module, "LEASE_LOOK_SECONDS", 0.001)
    file, lost = node.root / "x.lock", set[str]()
    file.touch()
    other = node.other(ELSEWHERE, {"directory": ""})
    (other / SOFT_LOCKS).write_text(json.dumps({"node": LOST, "locks": [entry_of(file)]}))
    (node.root / HIDDEN).write_bytes(b"being written")

    async def gone(nodes: Iterable[str]) -> set[str]:
        return lost & set(nodes)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.recovery.watch_leases, gone)
            await trio.testing.wait_all_tasks_blocked()
            node.recovery.settle_dead()
            clock.now += 10 * DEAD_AFTER_SECONDS
            node.recovery.settle_dead()
            assert file.exists() and (node.root / HIDDEN).exists() and OTHER in node.daemons
            lost.add(LOST)
            with trio.fail_after(30):
                while file.exists() or not node.recovery._freed:  # noqa: ASYNC110 - a file
                    await trio.sleep(0.01)
            node.recovery.settle_dead()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert node.settled
    assert list(node.kept().values()) == [b"being written"]


@pytest.mark.parametrize("time_text", ['"then"', "true", "-1e300", "-1", "NaN", "1e999", "1e18", f"1{400 * '0'}"])
def test_a_damaged_time_of_a_file_in_quarantine(node: Node, time_text: str) -> None:
    """It is shown with that of its file, which is what its age is then."""
    quarantine = node.state.path / "quarantine"
    (quarantine / "id").write_bytes(b"bytes")
    (quarantine / "id.json").write_text(f'{{"time": {time_text}}}')
    assert [entry.time for entry in node.state.kept()] == [(quarantine / "id").stat().st_mtime]
    assert node.state.prune(3600, 0) == []


@pytest.mark.parametrize("record", ["3", '{"path": "file"}'])
def test_a_damaged_record_of_a_file_in_quarantine(node: Node, record: str) -> None:
    """It is shown, and goes when its time is over."""
    quarantine = node.state.path / "quarantine"
    (quarantine / "id").write_bytes(b"bytes")
    (quarantine / "id.json").write_text(record)
    assert [entry.time for entry in node.state.kept()] == [(quarantine / "id").stat().st_mtime]


def test_directories_that_others_make_come_in_no_retentions_way(node: Node) -> None:
    """A NAS puts `@eaDir` everywhere.  It stays, is no draft, and keeps nothing else from being removed."""
    for name in ("quarantine", "events"):
        (node.state.path / name / "@eaDir").mkdir()
        (node.state.path / name / "old").write_bytes(b"bytes")
        for old in ("@eaDir", "old"):
            os.utime(node.state.path / name / old, (1, 1))
    assert node.state.count() == 1
    assert [entry.write_id for entry in node.state.prune(60, 0)] == ["old"]
    node.state.prune_events(60)
    assert os.listdir(node.state.path / "quarantine") == os.listdir(node.state.path / "events") == ["@eaDir"]


# ----------------------------------------------------------- who watches whom


def test_who_a_daemon_is_is_read_once(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is something to read: a thousand daemons would else read a million files every few seconds."""
    read = list[str]()

    def noted(record: Path) -> dict[str, Any]:
        read.append(record.name)
        return state_files.identity_of(record)

    monkeypatch.setattr(recovery_module, "identity_of", noted)
    node.other({})
    unfinished = node.other("", name="unfinished")
    for _ in range(3):
        node.recovery.settle_dead()
    assert sorted(read) == [OTHER, *["unfinished"] * 3]
    (unfinished / "identity.json").write_text(json.dumps({**host_identity(), **DEAD_HERE}))
    node.recovery.settle_dead()
    assert "unfinished" not in node.daemons


def test_looks_for_lock_files_list_no_directory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one each second, and the directory has an entry for every daemon: it was listed for the heartbeats."""
    lock = entry_of(touched(node.root / "x.lock"))
    (node.other({}) / SOFT_LOCKS).write_text(json.dumps({"node": LOST, "locks": [lock]}))
    node.recovery.settle_dead()
    monkeypatch.setattr(node.recovery, "_others", lambda: pytest.fail("listed"))
    assert [noted.node for noted in node.recovery._noted_by_others()] == [LOST]


def test_a_daemon_watches_up_to_the_second_that_is_alive(node: Node, clock: Clock) -> None:
    """In the order of the ring, which goes on from its end to its beginning; the dead between them are watched too."""
    mine = node.state.path / "daemons"
    own = node.record.path.name
    names = [f"{own}{letter}" for letter in "abcd"] + ["0"]  # four after this daemon, one before it
    for name in names:
        node.other(ELSEWHERE, name=name)

    def beat(*living: str) -> None:
        for name in living:
            (mine / name / "heartbeat").write_text(f"{clock.now}\n")
        node.recovery.settle_dead()
        clock.now += 2 * DEAD_AFTER_SECONDS / 3

    beat(*names)
    beat(*names[1:])  # the first is not seen to be alive
    assert [path.name for path in node.recovery._watched] == names[:3]
    beat(*names[1:])
    assert names[0] not in node.daemons  # settled
    # What happens to those that are not watched is the business of others.
    beat(*names[1:3])
    beat(*names[1:3])
    beat(*names[1:3])
    assert set(names[1:]) <= set(node.daemons)
