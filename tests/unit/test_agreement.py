"""Which of the others' notes keep a daemon out of its etcd: those of daemons that live, and no others."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from safefs import agreement
from safefs.agreement import require_same_etcd, require_same_settings
from safefs.backing import Backing
from safefs.errors import SafefsError
from safefs.identity import DAEMON, Identities
from safefs.state import DaemonRecord, StateDirectory, etcd_of, heartbeat_of, identity_of

HERE, THERE = {"host": "here", "pid": 1}, {"host": "there", "pid": 2}


def known_here(*, dead: bool) -> Callable[[Mapping[str, Any]], bool | None]:
    """What a host knows of daemons: whether its own are dead, and nothing of others'."""
    return lambda identity: dead if identity.get("host") == "here" else None


@dataclass
class Daemons:
    """One whose record is its own, and another."""

    state: StateDirectory
    own: DaemonRecord
    other: DaemonRecord

    def require(self, etcd: str, *, dead: bool = False) -> None:
        require_same_etcd(self.own, etcd, known_here(dead=dead), 0.0)

    def identify(self, identity: Mapping[str, Any]) -> None:
        self.other.identity.write_text(json.dumps(identity))


@pytest.fixture
def daemons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemons]:
    monkeypatch.setattr(agreement, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(agreement, "LOOK_SECONDS", 0.01)
    store = Backing(tmp_path, Identities(impersonate=False), max_threads=2)
    state = StateDirectory(tmp_path / ".safefs", store.identities)
    yield Daemons(state, DaemonRecord(state, "own", {}), DaemonRecord(state, "other", {}))
    os.close(state.quarantine_fd)
    os.close(store.root_fd)


class During:
    """Something that happens again and again while the block runs, as another host would do it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._done.wait(0.02):
            self._action()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def test_a_living_one_on_this_host(daemons: Daemons) -> None:
    daemons.identify(HERE)
    daemons.other.note_etcd("b")
    with pytest.raises(SafefsError, match=r"daemon on here \(process 1\) keeps its locks in another etcd") as refused:
        daemons.require("a")
    assert "\n" not in refused.value.message
    assert etcd_of(daemons.own.path) == ""  # who is not let in keeps nobody else out


def test_a_dead_one_on_this_host(daemons: Daemons) -> None:
    daemons.identify(HERE)
    daemons.other.note_etcd("b")
    daemons.require("a", dead=True)
    assert etcd_of(daemons.own.path) == "a"


def test_one_on_another_host_lives_as_long_as_its_heart_beats(daemons: Daemons) -> None:
    daemons.identify(THERE)
    daemons.other.note_etcd("b")
    with During(daemons.other.beat), pytest.raises(SafefsError, match="on there"):
        daemons.require("a")
    daemons.require("a")
    assert etcd_of(daemons.own.path) == "a"


def test_one_whose_heartbeat_is_damaged(daemons: Daemons) -> None:
    """It lives where another beat follows."""
    daemons.identify(THERE)
    daemons.other.note_etcd("b")
    (daemons.other.path / "heartbeat").write_bytes(b"\xff")
    daemons.require("a")
    with During(daemons.other.beat), pytest.raises(SafefsError, match="on there"):
        daemons.require("a")


@pytest.mark.parametrize(
    "seconds", [10**400, math.inf, math.nan, -1, 0, 3601, "15", None], ids=lambda each: repr(each)[:9]
)
def test_a_lease_that_is_damaged_is_not_waited_for(daemons: Daemons, seconds: object) -> None:
    """Not for longer than nodes can agree on; and it keeps nobody from starting."""
    daemons.identify({**HERE, "sharing": {"lease_seconds": seconds}})
    assert agreement._lease_of(identity_of(daemons.other.path)) == 0
    require_same_settings(daemons.own, {"lease_seconds": 15.0}, known_here(dead=True))


@pytest.mark.parametrize("identity", ["3", "[]", "\xff"])
def test_one_whose_identity_is_damaged(daemons: Daemons, identity: str) -> None:
    daemons.other.identity.write_text(identity, encoding="latin-1")
    require_same_settings(daemons.own, {"locks": "native"}, known_here(dead=False))


def test_one_whose_settings_are_damaged(daemons: Daemons) -> None:
    """They differ, as far as anybody can tell."""
    daemons.identify({**HERE, "sharing": 3})
    with pytest.raises(SafefsError, match="has no locks"):
        require_same_settings(daemons.own, {"locks": "native"}, known_here(dead=False))


@pytest.mark.parametrize("etcd", ["a", ""])
def test_the_same_etcd_or_none(daemons: Daemons, etcd: str) -> None:
    daemons.identify(HERE)
    daemons.require("a")  # it has noted nothing yet
    daemons.other.note_etcd(etcd)
    daemons.require("a")
    assert etcd_of(daemons.own.path) == "a"


def test_one_that_has_come_to_the_same_etcd_by_the_time_it_beats(daemons: Daemons) -> None:
    daemons.identify(THERE)
    daemons.other.note_etcd("b")

    def follow() -> None:
        daemons.other.note_etcd("a")
        daemons.other.beat()

    with During(follow):
        daemons.require("a")


def test_of_two_that_join_at_once_one_at_least_sees_the_other(daemons: Daemons) -> None:
    """The note comes before the look."""
    daemons.identify(HERE)
    refused: list[bool] = []

    def join(record: DaemonRecord, etcd: str) -> None:
        try:
            require_same_etcd(record, etcd, lambda _: False, 0.0)
        except SafefsError:
            refused.append(True)

    for _ in range(50):
        refused.clear()
        both = [threading.Thread(target=join, args=each) for each in ((daemons.own, "a"), (daemons.other, "b"))]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert refused
        daemons.own.note_etcd("")
        daemons.other.note_etcd("")


def test_a_record_that_goes_leaves_nothing(daemons: Daemons) -> None:
    daemons.other.note_etcd("a")
    daemons.other.remove()
    assert not daemons.other.path.exists()


def test_who_looks_whether_others_live_shows_that_it_does(daemons: Daemons) -> None:
    """Of two that start at once on two hosts, neither would hear the other's heart else."""
    sharing = {record: {"locks": str(number)} for number, record in enumerate((daemons.own, daemons.other))}
    refused: list[DaemonRecord] = []

    def start(record: DaemonRecord) -> None:
        try:
            require_same_settings(record, sharing[record], lambda _: None)
        except SafefsError:
            refused.append(record)

    for record, settings in sharing.items():
        record.identity.write_text(json.dumps({**THERE, "sharing": settings}))
    both = [threading.Thread(target=start, args=(record,)) for record in sharing]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert refused


def test_the_lease_of_one_that_is_frozen_is_waited_for(daemons: Daemons) -> None:
    """It may be longer than a heart can stand still."""
    theirs = {"locks": "leasefile", "lease_seconds": 1.5}
    daemons.identify({**THERE, "sharing": theirs})
    began = time.monotonic()
    require_same_settings(daemons.own, {"locks": "native"}, known_here(dead=False))
    assert time.monotonic() - began > 2.5


def test_a_record_that_others_have_settled_is_made_again(daemons: Daemons) -> None:
    """Of a daemon that was frozen for long; but not of one that has ended."""
    own = daemons.own
    own.note_directory(b"/a", DAEMON)
    own.path.rename(own.path.with_name("settling"))
    own.beat()
    assert identity_of(own.path) == identity_of(own.path.with_name("settling")) and heartbeat_of(own.path)
    assert not own.has_noted(b"/a")
    own.note_directory(b"/b", DAEMON)
    assert "/b" in (own.path / "journal").read_text() and "/a" not in (own.path / "journal").read_text()
    own.remove()
    own.beat()
    assert not own.path.exists()


def test_a_record_that_cannot_be_made_again_yet(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk: half of one would pass for it later, and say nothing of who the daemon is."""
    own = daemons.own
    own.path.rename(own.path.with_name("settling"))
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            own.beat()
    own.beat()
    assert identity_of(own.path) == identity_of(own.path.with_name("settling"))
    assert (own.path / "journal").exists()
