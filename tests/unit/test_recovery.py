"""What a dead daemon left behind is settled once, and a living daemon's work is never touched."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from safefs import backing
from safefs import recovery as recovery_module
from safefs import state as state_files
from safefs.backing import Backing
from safefs.events import EventLog
from safefs.identity import DAEMON, Identities, read_back
from safefs.model import Caller, Identity
from safefs.namespace import Node as Directory
from safefs.publisher import Publisher
from safefs.recovery import DEAD_AFTER_SECONDS, Recovery
from safefs.rules import Verify
from safefs.state import RECORD_VERSION, SOFT_LOCKS, DaemonRecord, StateDirectory, host_identity

OTHER = "0badcafe"
HIDDEN = f".safefs~{OTHER}~d~1"
DEAD_HERE = {"start": 1}  # this process's number, taken by another before it
ELSEWHERE = {"machine": "another", "host": "another"}


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
                before = state_files.heartbeat_of(node.record.path)
                with trio.fail_after(10):
                    while state_files.heartbeat_of(node.record.path) == before:  # noqa: ASYNC110 - a file
                        await trio.sleep(0.01)
            finally:
                done.set()
                nursery.cancel_scope.cancel()

    trio.run(main)


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
    node.recovery.settle_dead()
    clock.now += DEAD_AFTER_SECONDS
    node.recovery.settle_dead()
    assert OTHER in node.daemons
    clock.now += 1
    node.recovery.settle_dead()
    assert node.settled


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
    assert (node.record.path / "heartbeat").read_text() == "2\n"


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


@pytest.mark.parametrize("journal", [(NOTE,), ({"directory": ""}, NOTE), (NOTE, {"directory": ""})])
def test_a_partial_file_goes_back_under_its_name(node: Node, journal: tuple[dict[str, str], ...]) -> None:
    node.other(DEAD_HERE, *journal)
    (node.root / PARTIAL).write_bytes(b"half")
    node.recovery.settle_dead()
    assert (node.root / "x.part").read_bytes() == b"half"
    assert not (node.root / PARTIAL).exists()
    assert node.kept() == {}
    assert node.settled


def test_a_partial_file_whose_name_is_taken_is_kept(node: Node) -> None:
    node.other(DEAD_HERE, NOTE)
    (node.root / PARTIAL).write_bytes(b"half")
    (node.root / "x.part").write_bytes(b"a new download")
    node.recovery.settle_dead()
    assert (node.root / "x.part").read_bytes() == b"a new download"
    assert node.kept() == {"its daemon ended, and its name has a new file": b"half"}
    assert not (node.root / PARTIAL).exists()


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
    assert Recovery._journal(node.record.path / "journal") == [
        {"directory": "", "hidden": os.fsdecode(b"hid\xffden"), "name": "name", "writer": [7, 8, [9, 10]]},
        {"directory": "a", "writer": [0, 0, []]},
    ]
    assert read_back([7, 8, [9, 10]]) == (writer,)
    assert read_back(None) == read_back([7, 8]) == read_back(["x", 8, []]) == ()  # of another version
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
    noted = [entry["directory"] for entry in Recovery._journal(node.record.path / "journal")]
    assert noted == ["a", "b", "c"]


def test_what_is_on_record_is_not_remembered_without_end(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "MAX_NOTED", 2)
    for path in (b"a", b"b", b"c", b"a"):
        node.record.note_directory(path, DAEMON)
        assert node.record.has_noted(path)
        assert len(node.record._noted) <= 2
    assert [entry["directory"] for entry in Recovery._journal(node.record.path / "journal")] == ["a", "b", "c", "a"]


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
    lock = {"path": str(node.root / "x.lock"), "stale": "signalled", "ino": 1, "born": 1, "changed": 1}
    (node.other({}) / SOFT_LOCKS).write_text(json.dumps({"node": "lost", "locks": [lock]}))
    node.recovery.settle_dead()
    monkeypatch.setattr(node.recovery, "_others", lambda: pytest.fail("listed"))
    assert [noted.node for noted in node.recovery._noted_by_others()] == ["lost"]


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
