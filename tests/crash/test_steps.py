"""Every step of a publish times every fault, on a disk that forgets what was not synced.

Whatever happens at whichever call: the name shows a whole version, now and after a crash at that moment; a publish that
was acknowledged is there after the crash; one that failed has not taken the place of what was there, unless its own
bytes stand there whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from safefs import backing, placing
from safefs.backing import Backing, identity_of
from safefs.digest import Written
from safefs.draft import Base, Draft, DraftEvent
from safefs.errors import PublishRefusedError
from safefs.gate import Gate
from safefs.identity import Identities
from safefs.model import Caller
from safefs.placing import Order, PrivateInode, carry_out, take_place
from safefs.publisher import Keeper
from safefs.rules import NameClass, Policy, Verify
from safefs.seal import Demands
from safefs.state import StateDirectory
from tests.crash.simulation import Fault, Killed, Simulation

NAME = b"name"
V, W, OURS = b"version one\n", b"version one\nanother line\n", b"our bytes\n" * 1000
MAX_CALLS = 400


@dataclass(frozen=True)
class Case:
    """What the name shows when the draft starts and when it is published, and what the draft holds."""

    base: bytes | None  # None: it started from nothing
    shown: bytes | None
    ours: bytes
    result: bytes  # what the name shows when all goes well
    replace: bool = True
    appends: bool = False


CASES = {
    "new name": Case(None, None, OURS, OURS),
    "new name, exclusive": Case(None, None, OURS, OURS, replace=False),
    "over another": Case(None, W, OURS, OURS),
    "over its base": Case(V, V, V + OURS, V + OURS),
    "empty": Case(None, V, b"", b""),
    "a record behind another's": Case(V, W, V + b"our line\n", W + b"our line\n", appends=True),
    "another has it all": Case(V, W, W, W),
    "it has all of another's": Case(V, W, W + OURS, W + OURS),
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


@contextmanager
def descriptors_closed() -> Iterator[ExitStack]:
    """What is opened inside does not outlive it: a daemon that is killed in the simulation closes nothing."""
    before = set(os.listdir("/proc/self/fd"))
    try:
        with ExitStack() as closing:
            yield closing
    finally:
        for name in set(os.listdir("/proc/self/fd")) - before:
            with suppress(OSError):
                os.close(int(name))


@dataclass
class Stage:
    """A directory with a draft that is about to be published."""

    directory: Path
    order: Order
    before: int | None  # what the name shows

    def content(self) -> bytes | None:
        try:
            return (self.directory / os.fsdecode(NAME)).read_bytes()
        except FileNotFoundError:
            return None


def prepare(place: Path, case: Case, temp: str, stack: ExitStack, simulation: Simulation) -> Stage:
    """Everything before the close: these steps do not fail."""
    place.mkdir()
    directory = place / "dir"
    directory.mkdir()
    path = directory / os.fsdecode(NAME)
    store = Backing(place, Identities(impersonate=False), max_threads=1, temp=temp)
    stack.callback(os.close, store.root_fd)
    state = StateDirectory(place / ".safefs", store.identities)
    home = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    stack.callback(os.close, home)
    base = None
    if case.base is not None:
        path.write_bytes(case.base)
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        base = Base(fd, identity_of(os.fstat(fd)))
    if case.shown is not None and case.shown != case.base:
        (directory / "other").write_bytes(case.shown)
        (directory / "other").rename(path)
    fd, temp_name, status = store.make_temp(home, 0o644, backing.HIDDEN_PREFIX + b"0~d~1")
    os.pwrite(fd, case.ours, 0)
    simulation.wrote(fd)
    written = Written()
    written.add(0, case.ours)
    draft = Draft(
        write_id="0123456789abcdef",
        node=cast(Any, None),
        directory=cast(Any, None),
        name=NAME,
        name_class=NameClass.PRIVATE,
        caller=Caller(os.getuid(), os.getgid()),
        opener=None,
        pidfd=-1,
        fd=fd,
        temp_name=temp_name,
        shown_ino=status.st_ino,
        gate=Gate(),
        base=base,
        fresh=base is None,
        append_only=case.appends,
        size=len(case.ours),
        written=written,
    )
    draft.move(DraftEvent.SEAL)
    order = Order(
        draft=draft,
        inode=PrivateInode(fd, temp_name),
        directory=home,
        target=home,
        name=NAME,
        may_replace=case.replace,
        hidden=backing.HIDDEN_PREFIX + b"0~r~2",
        make_temp=partial(store.make_temp, home, 0o600, backing.HIDDEN_PREFIX + b"0~j~3"),
        keeper=Keeper(state, store, home, os.fstat(home).st_ino, NAME, 60.0),
        sync_target=partial(backing.sync_directory, home),
        demands=Demands(NAME, Policy(), Verify.CACHE, written),
        check_space=lambda: None,
        require_lease=lambda: None,
    )
    return Stage(directory, order, path.stat().st_ino if case.shown is not None else None)


def publish(stage: Stage, simulation: Simulation) -> bool:
    """Whether the publish was acknowledged.  Errors are what a close returns; anything else is a defect."""
    with simulation.installed():
        try:
            carry_out(stage.order)
        except (OSError, PublishRefusedError, Killed):
            return False
    return not simulation.dead


def check(stage: Stage, case: Case, simulation: Simulation, *, acknowledged: bool) -> None:
    wholes = {case.shown, case.result}
    assert stage.content() in ({case.result} if acknowledged else wholes)
    for ino in simulation.may_show(stage.directory, NAME, stage.before):
        assert ino is None or simulation.is_whole(ino), "a crash at this moment leaves a torn file"
        if acknowledged:
            assert ino == (stage.directory / os.fsdecode(NAME)).stat().st_ino, "a crash undoes what was acknowledged"
    if case.shown is not None:
        assert stage.content() is not None


@pytest.mark.parametrize("temp", ["auto", "hidden"])
@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", CASES)
def test_every_call(name: str, fault: Fault, temp: str, tmp_path: Path) -> None:
    case, hits = CASES[name], 0
    for number in range(1, MAX_CALLS):
        with descriptors_closed() as stack:
            simulation = Simulation(fault, number)
            stage = prepare(tmp_path / str(number), case, temp, stack, simulation)
            acknowledged = publish(stage, simulation)
            check(stage, case, simulation, acknowledged=acknowledged)
            if not simulation.hit:
                assert acknowledged and stage.content() == case.result
                break
            hits += 1
    assert 8 < hits < MAX_CALLS - 1, f"{hits} calls were hit"


@pytest.mark.parametrize("temp", ["auto", "hidden"])
@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_every_call_of_a_late_writers_copy(fault: Fault, temp: str, tmp_path: Path) -> None:
    """The published inode, to which somebody still writes, changes places with a copy of it."""
    case, hits = CASES["over another"], 0
    for number in range(1, MAX_CALLS):
        with descriptors_closed() as stack:
            simulation = Simulation(fault, number)
            stage = prepare(tmp_path / str(number), case, temp, stack, Simulation())
            placed = carry_out(stage.order)
            order = copied(stage.order, simulation)
            with simulation.installed(), suppress(OSError, Killed):
                take_place(order)
            assert stage.content() == OURS
            for ino in simulation.may_show(stage.directory, NAME, os.fstat(placed.inode.fd).st_ino):
                assert ino is not None and simulation.is_whole(ino)
            if not simulation.hit:
                assert (stage.directory / os.fsdecode(NAME)).stat().st_ino == os.fstat(order.inode.fd).st_ino
                break
            hits += 1
    assert 8 < hits < MAX_CALLS - 1, f"{hits} calls were hit"


def copied(order: Order, simulation: Simulation) -> Order:
    """The order to put a copy in the place of what the draft has published."""
    fd, temp_name, _ = order.make_temp()
    backing.copy_contents(order.draft.fd, fd)
    simulation.wrote(fd)
    return replace(order, inode=PrivateInode(fd, temp_name), demands=Demands(NAME, Policy(), Verify.CACHE))


# Controls: the checks see what is wrong where it is wrong.


@pytest.mark.parametrize("temp", ["auto", "hidden"])
def test_control_without_syncing_the_file(temp: str, tmp_path: Path, stack: ExitStack) -> None:
    simulation = Simulation()
    stage = prepare(tmp_path / "place", CASES["over another"], temp, stack, simulation)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placing, "seal", lambda _fd, _demands: None)
        assert publish(stage, simulation)
    with pytest.raises(AssertionError, match="torn"):
        check(stage, CASES["over another"], simulation, acknowledged=True)


@pytest.mark.parametrize("temp", ["auto", "hidden"])
def test_control_without_syncing_the_directory(temp: str, tmp_path: Path, stack: ExitStack) -> None:
    simulation = Simulation()
    stage = prepare(tmp_path / "place", CASES["over another"], temp, stack, simulation)
    stage.order = replace(stage.order, sync_target=lambda: None)
    assert publish(stage, simulation)
    with pytest.raises(AssertionError, match="undoes"):
        check(stage, CASES["over another"], simulation, acknowledged=True)
