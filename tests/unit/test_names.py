"""Several nodes in one process, on records that can fail: no two hold the same lock, and nobody waits for ever."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import trio
import trio.testing

from safefs.cluster import names as module
from safefs.cluster.backend import BackendError, DamagedError, Stored, UnreadableError
from safefs.cluster.names import GIVE_BACK_SECONDS, IDLE_SECONDS, LOOK_SECONDS, RETRY_SECONDS, Names
from safefs.cluster.problems import MOST_LINES
from safefs.cluster.record import (
    FORMAT,
    Acquire,
    Break,
    ForeignRecordError,
    GiveUp,
    HandOver,
    NameRecord,
    Release,
    Step,
    carry_out,
)
from safefs.cluster.survey import MOST_ANSWERS, QUESTION
from safefs.cluster.sweep import SWEEP_SECONDS
from safefs.locks import Locks
from safefs.locktable import OFFSET_MAX, Kind, Lock, Mode, NameLocks, Owner, Wait
from tests.support.faulty_backend import FaultyBackend
from tests.support.memory_backend import MemoryBackend, MemoryCluster, MemoryFollower

HOURS = 3600.0


@dataclass
class Node:
    """A node and its requests, as safefs.locks will use it."""

    name: str
    backend: MemoryBackend
    outcomes: dict[int, trio.Event] = field(default_factory=dict)
    held: dict[int, bool] = field(default_factory=dict)
    asked: dict[int, tuple[str, Kind, Lock]] = field(default_factory=dict)
    told: dict[tuple[str, Kind, Owner], Lock] = field(default_factory=dict)
    last: int = 0

    def __post_init__(self) -> None:
        self.names = Names(self.backend)
        self.names.resolve, self.names.told = self._resolve, self._told

    def _resolve(self, ticket: int, granted: bool) -> bool:
        if ticket not in self.outcomes:
            return False
        self.held[ticket] = granted
        self.outcomes[ticket].set()
        if granted:
            key, kind, lock = self.asked[ticket]
            self.told[key, kind, lock.owner] = lock
        return True

    def _told(self, key: str, kind: Kind, owner: Owner) -> list[Lock]:
        lock = self.told.get((key, kind, owner))
        return [lock] if lock is not None else []

    def submit(self, key: str, step: Step) -> trio.Event:
        """As a step on a name is done: at once where it is delegated to this node."""
        locks = self.names.local(key)
        if locks is None:
            return self.names.submit(key, step)
        done, others = carry_out(locks, step)
        for wait in others:
            self._resolve(wait.ticket, True)
        if isinstance(step, Acquire) and (done or not step.may_wait):
            self._resolve(step.wait.ticket, done)
        event = trio.Event()
        event.set()
        return event

    async def acquire(
        self, key: str, owner: int, mode: Mode, *, may_wait: bool = True, kind: Kind = Kind.FLOCK
    ) -> bool:
        self.last += 1
        wait = Wait(self.last, Lock(Owner(self.name, owner), mode))
        event = self.outcomes[wait.ticket] = trio.Event()
        self.asked[wait.ticket] = key, kind, wait.lock
        self.submit(key, Acquire(kind, wait, may_wait))
        try:
            await event.wait()
        except trio.Cancelled:
            del self.outcomes[wait.ticket]
            if not event.is_set():
                self.submit(key, GiveUp(kind, wait))
                raise
        return self.held.pop(wait.ticket)

    async def hand_over(self, key: str, owner: int, heir: int) -> None:
        step = HandOver(Kind.FLOCK, Owner(self.name, owner), Owner(self.name, heir))
        self.told[key, Kind.FLOCK, step.heir] = self.told.pop((key, Kind.FLOCK, step.owner))
        await self.submit(key, step).wait()

    async def release(self, key: str, owner: int) -> None:
        self.told.pop((key, Kind.FLOCK, Owner(self.name, owner)), None)
        with trio.CancelScope(shield=True):
            await self.submit(key, Release(Kind.FLOCK, Owner(self.name, owner), 0, OFFSET_MAX)).wait()


Scenario = Callable[[list[Node]], Awaitable[None]]


def play(scenario: Scenario, backends: Callable[[MemoryCluster, str], MemoryBackend], nodes: int = 3) -> MemoryCluster:
    """Run a scenario on some nodes; time passes whenever all wait."""

    async def main() -> MemoryCluster:
        cluster = MemoryCluster()
        names = [f"node{number}" for number in range(nodes)]
        members = [Node(name, backends(cluster, name)) for name in names]
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(member.names.run)
            with trio.fail_after(HOURS):
                await scenario(members)
            nursery.cancel_scope.cancel()
        return cluster

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def faulty(seed: int, share: float) -> Callable[[MemoryCluster, str], MemoryBackend]:
    chance = random.Random(seed)
    return lambda cluster, node: FaultyBackend(cluster, node, chance, share)


class Overlap:
    """Who holds what: notices two holders who exclude each other."""

    def __init__(self) -> None:
        self.inside: Counter[tuple[str, Mode]] = Counter()
        self.holds = 0

    async def hold(self, key: str, mode: Mode, seconds: float) -> None:
        self.holds += 1
        assert not self.inside[key, Mode.EXCLUSIVE]
        assert mode is Mode.SHARED or not self.inside[key, Mode.SHARED]
        self.inside[key, mode] += 1
        await trio.sleep(seconds)
        self.inside[key, mode] -= 1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_exclusion(seed: int, share: float) -> None:
    """Three nodes with three tasks each, two names, exclusive and shared; waiting, trying, and giving up."""
    chance = random.Random(seed)
    overlap = Overlap()

    async def task(node: Node, owner: int) -> None:
        for _ in range(12):
            key, mode = chance.choice(["one", "two"]), chance.choice(list(Mode))
            kind = chance.random()
            held = False
            if kind < 0.2:
                held = await node.acquire(key, owner, mode, may_wait=False)
            elif kind < 0.4:
                with trio.move_on_after(chance.random() / 10):
                    held = await node.acquire(key, owner, mode)
            else:
                held = await node.acquire(key, owner, mode)
            if held:
                holder = owner
                if chance.random() < 0.3:  # it is to be published first: who held it may want it again by then
                    holder = -owner - 1
                    await node.hand_over(key, owner, holder)
                await overlap.hold(key, mode, chance.random() / 20)
                await node.release(key, holder)

    async def scenario(nodes: list[Node]) -> None:
        async with trio.open_nursery() as nursery:
            for node in nodes:
                for owner in range(3):
                    nursery.start_soon(task, node, owner)

    play(scenario, faulty(seed, share))
    assert overlap.holds > 50


def test_control_nodes_that_share_nothing_overlap() -> None:
    """The detector does find two holders."""
    overlap = Overlap()

    async def scenario(nodes: list[Node]) -> None:
        async with trio.open_nursery() as nursery:
            for node in nodes:
                assert await node.acquire("name", 1, Mode.EXCLUSIVE)
                nursery.start_soon(overlap.hold, "name", Mode.EXCLUSIVE, 1.0)

    with pytest.raises(BaseExceptionGroup):
        play(scenario, lambda _cluster, node: MemoryBackend(MemoryCluster(), node))


class Counting(MemoryBackend):
    """Notes what goes to the backend; only that it is told of changes costs nothing."""

    def __init__(self, cluster: MemoryCluster, node: str) -> None:
        super().__init__(cluster, node)
        self.calls: list[str] = []

    async def read(self, name: str) -> Stored:
        self.calls.append("read")
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        self.calls.append("swap")
        return await super().swap(name, old, new)

    async def is_current(self, name: str, stored: Stored) -> bool:
        self.calls.append("is_current")
        return (await super().read(name)).version == stored.version

    async def notify(self, node: str, name: str) -> None:
        self.calls.append("notify")
        await super().notify(node, name)

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        self.calls.append("gone")
        return await super().gone(nodes)

    async def answer(self, question: str, text: str) -> None:
        self.calls.append("answer")
        await super().answer(question, text)


class CountingPolls(Counting):
    """Where changes have to be looked for."""

    tells_changes = False


def test_a_name_that_is_delegated_costs_no_message() -> None:
    async def scenario(nodes: list[Node]) -> None:
        node = nodes[0]
        assert await node.acquire("name", 1, Mode.EXCLUSIVE)
        await node.release("name", 1)
        calls = calls_of(node)
        calls.clear()
        for _ in range(100):
            assert await node.acquire("name", 1, Mode.EXCLUSIVE)
            await node.release("name", 1)
        assert calls == []

    play(scenario, Counting)


def calls_of(node: Node) -> list[str]:
    assert isinstance(node.backend, Counting)
    return node.backend.calls


@pytest.mark.parametrize("held_seconds", [0.01, 0.7, 20.0])
@pytest.mark.parametrize(("backends", "unlocking"), [(Counting, ["swap"]), (CountingPolls, ["read", "swap"])])
def test_what_a_hand_over_costs(
    backends: type[Counting], unlocking: list[str], held_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks, and who unlocks, writes one record, which he knows where changes are told; who waits is told, too."""
    monkeypatch.setattr(module, "boottime", trio.current_time)

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        for turn, (holder, waiter) in enumerate(3 * [(one, two), (two, one)]):
            async with trio.open_nursery() as nursery:
                granted = trio.Event()

                async def wait(node: Node, granted: trio.Event) -> None:
                    assert await node.acquire("name", 1, Mode.EXCLUSIVE)
                    granted.set()

                nursery.start_soon(wait, waiter, granted)
                # So that it does not look at that moment whether everybody is still there.
                await trio.sleep(held_seconds + 0.1)
                assert turn < 2 or calls_of(waiter)[: len(unlocking)] == unlocking
                for node in (holder, waiter):
                    calls_of(node).clear()
                nursery.start_soon(holder.release, "name", 1)
                await granted.wait()
                assert calls_of(waiter) == []
                # That he looks after the others once it is done is nothing that anybody waits for.
                assert calls_of(holder) in (unlocking, [*unlocking, "gone"])
                calls_of(holder).clear()

    play(scenario, backends)


@pytest.mark.parametrize("backends", [Counting, CountingPolls])
def test_who_only_tries_changes_nothing(backends: type[Counting]) -> None:
    """Else the swaps of others would fail for it, and all who wait would wake, as often as somebody tries."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        assert not await two.acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)
        before = await two.backend.read("name")
        calls_of(two).clear()
        for _ in range(20):
            assert not await two.acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)
            await trio.sleep(0.1)
        assert await two.backend.read("name") == before
        assert "swap" not in calls_of(two)

    play(scenario, backends)


class Slow(Counting):
    """Told of changes much later than they can be read."""

    def follow(self, name: str) -> MemoryFollower:
        return LateFollower(self._cluster, name, 30.0)


class Trusting(Slow):
    """Who believes that a record is still the one that he knows."""

    async def is_current(self, name: str, stored: Stored) -> bool:
        return True


@pytest.mark.parametrize(("backends", "had"), [(Slow, True), (Trusting, False)])
def test_who_tries_after_an_unlock_has_the_lock(backends: type[Slow], had: bool) -> None:
    """Whatever he has been told of it by then; with a control."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        assert not await two.acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)
        assert not await two.acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)
        await one.release("name", 1)
        assert await two.acquire("name", 1, Mode.EXCLUSIVE, may_wait=False) is had

    play(scenario, backends)


def test_a_change_that_was_not_told_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch can be lost without a word; who waits looks by himself, and listens anew from then on."""

    class Deaf(MemoryFollower):
        async def next_change(self, seen: Stored, seconds: float, turns: int = 0) -> Stored | None:
            await trio.sleep(seconds)
            return None

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        follow = two.backend.follow
        followers = iter([Deaf(two.backend._cluster, "name"), *[follow("name") for _ in range(10)]])
        monkeypatch.setattr(two.backend, "follow", lambda _name: next(followers))
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        for seconds in (2 * LOOK_SECONDS, LOOK_SECONDS / 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(two.acquire, "name", 1, Mode.EXCLUSIVE)
                await trio.sleep(10.2 * LOOK_SECONDS)
                await one.release("name", 1)
                nursery.cancel_scope.deadline = trio.current_time() + seconds
            assert not nursery.cancel_scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.acquire, "name", 1, Mode.EXCLUSIVE)
                await trio.sleep(1)  # it waits, so the name stays shared
                await two.release("name", 1)

    play(scenario, MemoryBackend)


def test_who_is_far_behind_in_the_queue_looks_less_often() -> None:
    """It is said how many are before him; of shared locks one is had with the other."""
    record = NameRecord()
    table = record.locks[Kind.FLOCK]
    for number, (node, mode) in enumerate(
        [("a", Mode.EXCLUSIVE), ("b", Mode.EXCLUSIVE), ("c", Mode.SHARED), ("d", Mode.SHARED), ("b", Mode.SHARED)]
    ):
        table.request(Wait(number, Lock(Owner(node, number), mode)))
    assert [record.turns_before(node, Kind.FLOCK) for node in "abcde"] == [0, 0, 1, 1, 0]
    assert record.turns_before("a", Kind.RECORD) == 0


def test_a_notice_that_comes_too_late() -> None:
    """The name is another's by then, and this node does not want it."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await two.acquire("name", 1, Mode.EXCLUSIVE)
        await two.backend.notify("node0", "name")
        await trio.sleep(10)
        assert one.names.local("name") is None and two.names.local("name") is not None
        assert (await one.backend.read("name")).record == NameRecord("node1")

    play(scenario, MemoryBackend)


def test_no_more_names_are_followed_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For who waits on none of them: with etcd each costs a connection."""
    monkeypatch.setattr(module, "MOST_FOLLOWED", 5)

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        for number in range(20):
            assert await one.acquire(f"name{number}", 1, Mode.SHARED)
            assert await two.acquire(f"name{number}", 1, Mode.SHARED)
        assert [node.names._followed for node in nodes] == [5, 5, 0]
        for number in range(20):
            await two.release(f"name{number}", 1)
            await one.release(f"name{number}", 1)
        await trio.sleep(60)
        assert [node.names._followed for node in nodes] == [0, 0, 0]

    play(scenario, MemoryBackend)


def test_it_is_given_back_when_another_node_asks_and_locks_stay() -> None:
    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.SHARED)
        assert await two.acquire("name", 1, Mode.SHARED)
        assert not await two.acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)

    play(scenario, MemoryBackend)


def test_what_is_held_on_another_node_is_seen() -> None:
    """By F_GETLK and `safefs locks`: when the name is still the other node's, and when it is shared."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        locks = Locks(two.names)
        held = Lock(Owner("node0", 1), Mode.EXCLUSIVE)
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        for _ in range(2):
            assert await locks.conflict("name", Kind.FLOCK, Lock(Owner("node1", 1), Mode.SHARED)) == held
        assert [(entry["node"], entry["state"]) for entry in await locks.report()] == [("node0", "held")]
        await one.release("name", 1)
        assert await locks.conflict("name", Kind.FLOCK, Lock(Owner("node1", 1), Mode.SHARED)) is None

    play(scenario, MemoryBackend)


def held(entries: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """The nodes and names in a report, in which there is nothing else."""
    assert {entry["state"] for entry in entries} == {"held"}
    return {(entry["node"], entry["key"]) for entry in entries}


def test_a_survey_leaves_names_where_they_are() -> None:
    """Also of those which this node serves, and of those that are shared; and each node is asked once."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, three = nodes
        keys = [str(number) for number in range(50)]
        for key in keys:
            assert await one.acquire(key, 1, Mode.EXCLUSIVE)
        assert await two.acquire("mine", 1, Mode.EXCLUSIVE)
        for node in (one, three):
            assert await node.acquire("shared", 1, Mode.SHARED)
        everything = {*((one.name, key) for key in (*keys, "shared")), (two.name, "mine"), (three.name, "shared")}
        for node in nodes:
            calls_of(node).clear()
        assert held(await Locks(two.names).report()) == everything
        assert calls_of(one) == ["answer"] and calls_of(three) == []
        assert all(one.names.local(key) is not None for key in keys)

    play(scenario, Counting)


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("fails", ["answer", "notify"])
def test_a_survey_tells_of_whom_it_does_not_know(fails: str, leaves: bool) -> None:
    """A node that does not answer, or cannot be asked, may hold all that it serves; unless it is gone."""

    class Silent(MemoryBackend):
        async def answer(self, question: str, text: str) -> None:
            self._may_fail("answer")
            await super().answer(question, text)

        async def notify(self, node: str, name: str) -> None:
            self._may_fail("notify")
            await super().notify(node, name)

        def _may_fail(self, call: str) -> None:
            if call == fails:
                raise BackendError("no space")

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        assert await two.acquire("another", 1, Mode.EXCLUSIVE)
        if leaves:
            await one.backend.leave()
        start = trio.current_time()
        said = [(entry["node"], entry["key"], entry["state"]) for entry in await Locks(two.names).report()]
        assert not leaves or trio.current_time() == start  # who is gone is not asked
        unknown = ("node0", "name", "unknown: the node does not answer")
        assert said == [("node1", "another", "held"), *([] if leaves else [unknown])]

    play(scenario, Silent)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 7}', '{"name": {"flock": {}}}', "[" * 100_000])
def test_a_survey_takes_no_answer_that_is_none(text: str) -> None:
    class Foreign(MemoryBackend):
        async def answer(self, question: str, _text: str) -> None:
            await super().answer(question, text)

    async def scenario(nodes: list[Node]) -> None:
        assert await nodes[0].acquire("name", 1, Mode.EXCLUSIVE)
        (said,) = await Locks(nodes[1].names).report()
        assert said["state"] == "unknown: the node does not answer"

    play(scenario, Foreign)


def test_a_node_without_a_lease_does_not_say_that_nobody_has_a_lock() -> None:
    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        locks = Locks(two.names)
        two.names.lose()
        with pytest.raises(BackendError, match="no lease"):
            await locks.break_locks("name")
        with pytest.raises(BackendError, match="no lease"):
            await locks.conflict("name", Kind.FLOCK, Lock(Owner("x", 1), Mode.SHARED))

    play(scenario, MemoryBackend)


def test_answers_that_nobody_takes_do_not_pile_up() -> None:
    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        for number in range(MOST_ANSWERS + 5):
            await two.backend.notify(one.name, f"{QUESTION}{number}")
        await trio.sleep(1)

    answers = play(scenario, MemoryBackend).answers
    assert len(answers) == MOST_ANSWERS
    assert all(json.loads(text)["name"] for text in answers.values())


def test_a_survey_finds_what_is_given_back_meanwhile() -> None:
    """After it was read that a node serves a name, and before that node is asked."""

    class GivesBack(MemoryBackend):
        async def notify(self, node: str, name: str) -> None:
            if name.startswith(QUESTION):
                with trio.fail_after(10):
                    assert await other.acquire("name", 1, Mode.SHARED)
            await super().notify(node, name)

    async def scenario(nodes: list[Node]) -> None:
        nonlocal other
        one, two, other = nodes
        assert await one.acquire("name", 1, Mode.SHARED)
        assert held(await Locks(two.names).report()) == {("node0", "name"), ("node2", "name")}

    other: Node
    play(scenario, GivesBack)


class Late(MemoryBackend):
    """Sees what others have changed some time after it happened, as who polls does."""

    tells_changes = False

    def follow(self, name: str) -> MemoryFollower:
        return LateFollower(self._cluster, name, 0.25)


@dataclass
class LateFollower(MemoryFollower):
    late_seconds: float

    async def next_change(self, seen: Stored, seconds: float, turns: int = 0) -> Stored | None:
        with trio.move_on_after(seconds):
            await trio.sleep(self.late_seconds)
            return await super().next_change(seen, seconds)
        return None


def test_a_node_that_needs_a_name_all_the_time_leaves_it_to_others() -> None:
    """It is between two holds when the name is free for others to take, and much quicker than they can see that."""

    async def scenario(nodes: list[Node]) -> None:
        busy, other, _ = nodes
        holds = 0

        async def use() -> None:
            nonlocal holds
            while True:
                assert await busy.acquire("name", 1, Mode.EXCLUSIVE)
                holds += 1
                await trio.sleep(0.02)
                await busy.release("name", 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            await trio.sleep(1)
            before = holds
            with trio.fail_after(20):
                assert await other.acquire("name", 1, Mode.EXCLUSIVE)
            nursery.cancel_scope.cancel()
        assert 0 < holds - before < 50

    play(scenario, Late)


@pytest.mark.parametrize("record", [NameRecord(wanted=("gone",)), NameRecord(broken=("gone",))])
def test_nodes_that_are_named_and_are_gone_do_not_keep_a_name_shared(record: NameRecord) -> None:
    """Neither one that wanted it, nor one that has not heard that what it held is broken."""

    async def scenario(nodes: list[Node]) -> None:
        node = nodes[0]
        cluster = node.backend._cluster
        cluster.ended.add("gone")
        cluster.records["name"] = Stored(cluster.new_version(), record)
        assert node.names.local("name") is None
        assert await node.acquire("name", 2, Mode.EXCLUSIVE)
        await node.release("name", 2)
        assert await node.acquire("name", 2, Mode.EXCLUSIVE)
        assert node.names.local("name") is not None

    play(scenario, MemoryBackend)


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("breaker", [0, 1])
def test_a_node_hears_that_what_it_held_is_broken(share: float, breaker: int) -> None:
    """Also where answers and notices are lost; who gets the lock then is left alone."""
    chance = random.Random(share)

    async def scenario(nodes: list[Node]) -> None:
        holder, next_one = nodes[0], nodes[2]
        heard = trio.Event()

        def hear(_key: str, locks: NameLocks) -> None:
            assert Owner("node0", 1) not in locks.holders()
            heard.set()

        holder.names.broken = hear
        assert await holder.acquire("name", 1, Mode.EXCLUSIVE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(next_one.acquire, "name", 7, Mode.EXCLUSIVE)
            await trio.sleep(2)
            broken = Break(frozenset({Owner("node0", 1)}))
            await nodes[breaker].submit("name", broken).wait()
        with trio.fail_after(60):
            await heard.wait()
        await next_one.release("name", 7)
        with trio.fail_after(60):
            while True:  # nothing is left that keeps the name shared
                await next_one.acquire("name", 7, Mode.EXCLUSIVE)
                await next_one.release("name", 7)
                if next_one.names.local("name") is not None:
                    break
                await trio.sleep(1)

    play(scenario, lambda cluster, node: FaultyBackend(cluster, node, chance, share))


async def share(one: Node, two: Node) -> None:
    """A lock of the first on a name that is shared, of which it knows nothing any more."""
    for node in (two, one):
        assert await node.acquire("name", 1, Mode.SHARED)
    await two.release("name", 1)
    await trio.sleep(1)
    assert (await two.backend.read("name")).record.locks.holders() == {Owner(one.name, 1)}
    assert not one.names._names and not two.names._names


async def break_on_record(node: Node) -> None:
    """As somebody does who dies before he has told anybody."""
    stored = await node.backend.read("name")
    assert await node.backend.swap("name", stored, NameRecord().broke(stored.record.locks.nodes()))


def test_a_node_whose_sweep_finds_that_its_lock_is_broken_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works on the name no more: its lock is on record."""

    async def lose(_backend: MemoryBackend, _node: str, _name: str) -> None:
        await trio.lowlevel.checkpoint()

    async def scenario(nodes: list[Node]) -> None:
        holder, other, _ = nodes
        heard = list[str]()
        holder.names.broken = lambda key, locks: None if locks else heard.append(key)
        await share(holder, other)
        monkeypatch.setattr(MemoryBackend, "notify", lose)
        await break_on_record(other)
        await trio.sleep(20 * SWEEP_SECONDS)
        assert heard == ["name"] and not (await other.backend.read("name")).record

    play(scenario, CountingPolls)


@pytest.mark.parametrize("locks", [True, False])
def test_whoever_finds_that_a_lock_is_broken_tells_its_node(locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who broke it is gone: soon where another locks the name, and else by the sweep of any node."""

    async def scenario(nodes: list[Node]) -> None:
        holder, breaker, other = nodes
        heard = list[float]()
        holder.names.broken = lambda _key, _locks: heard.append(trio.current_time())
        monkeypatch.setattr(holder.names._sweep, "_knows", lambda _key: True)
        await share(holder, breaker)
        await break_on_record(breaker)
        await breaker.backend.leave()
        assert not heard
        if locks:
            assert await other.acquire("name", 1, Mode.EXCLUSIVE)
        await trio.sleep(LOOK_SECONDS if locks else 2 * SWEEP_SECONDS)
        assert len(heard) == 1
        told = calls_of(other).count("notify")
        await trio.sleep(HOURS / 2)
        assert len(heard) == 1 and calls_of(other).count("notify") == told == 1

    play(scenario, CountingPolls)


class Unhurried(MemoryBackend):
    """Every answer takes a while."""

    seconds = 0.001

    async def read(self, name: str) -> Stored:
        await trio.sleep(self.seconds)
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        await trio.sleep(self.seconds)
        return await super().swap(name, old, new)


class Slower(Unhurried, CountingPolls):
    """As through sshfs: while one batch of steps is on its way the next comes."""

    seconds = 0.02

    async def is_current(self, name: str, stored: Stored) -> bool:
        await trio.sleep(self.seconds)
        return await super().is_current(name, stored)


@pytest.mark.parametrize("lost", [0, 1])
def test_who_always_has_something_to_do_on_a_name_still_tells_whose_lock_he_broke(
    lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again only after a while."""
    notify, notices = MemoryBackend.notify, list[float]()

    async def lose_some(backend: MemoryBackend, node: str, name: str) -> None:
        notices.append(trio.current_time())
        if len(notices) > lost:
            await notify(backend, node, name)

    async def scenario(nodes: list[Node]) -> None:
        holder, breaker, _ = nodes
        heard = trio.Event()
        holder.names.broken = lambda _key, _locks: heard.set()
        await share(holder, breaker)

        async def poll(owner: int) -> None:
            while not heard.is_set():
                await breaker.acquire("name", owner, Mode.EXCLUSIVE, may_wait=False)

        async with trio.open_nursery() as nursery:
            for owner in (2, 3):
                nursery.start_soon(poll, owner)
                await trio.sleep(0.03)  # so that the one asks while the other's step is on its way
            monkeypatch.setattr(MemoryBackend, "notify", lose_some)
            breaker.submit("name", Break(frozenset({Owner(holder.name, 1)})))
            with trio.fail_after(0.2 + lost * LOOK_SECONDS):
                await heard.wait()
        await trio.sleep(2)
        assert all(after - before >= LOOK_SECONDS for before, after in pairwise(notices))

    play(scenario, Slower)


def test_nobody_is_told_of_a_damaged_record_before_another_is_in_its_place() -> None:
    """He would find nothing that he can read, and be told anew only after a while."""

    class Watched(Damaged):
        tells_changes = False

        async def notify(self, node: str, name: str) -> None:
            assert self._cluster.records[name].record != NameRecord(wanted=("damaged",))
            await super().notify(node, name)

    async def scenario(nodes: list[Node]) -> None:
        holder, other, _ = nodes
        cluster, heard = holder.backend._cluster, trio.Event()
        holder.names.broken = lambda _key, _locks: heard.set()
        await share(holder, other)
        cluster.records["name"] = Stored(cluster.new_version(), NameRecord(wanted=("damaged",)))
        assert await other.names.clear("name") is None
        with trio.fail_after(LOOK_SECONDS / 2):
            await heard.wait()

    play(scenario, Watched)


def test_a_swap_that_nothing_is_seen_in_the_way_of_is_not_tried_again_at_once() -> None:
    """As where a directory holds what is no record: it would be tried for ever, and nothing else done."""

    class Blocked(CountingPolls):
        async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
            await trio.lowlevel.checkpoint()
            self.calls.append("swap")
            assert self.calls.count("swap") <= 10 / RETRY_SECONDS[0] + 1
            return None

    async def scenario(nodes: list[Node]) -> None:
        with trio.move_on_after(10) as scope:
            await nodes[0].acquire("name", 1, Mode.EXCLUSIVE)
        assert scope.cancelled_caught
        assert calls_of(nodes[0]).count("swap") > 20

    play(scenario, Blocked)


class Resting(CountingPolls):
    """Knows whether it need not look for notices soon."""

    rests = False

    def rest(self, rests: bool) -> None:
        self.rests = rests


def test_who_has_a_lock_on_a_shared_name_does_not_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be broken, and that is said by a notice."""
    monkeypatch.setattr(module, "boottime", trio.current_time)

    async def scenario(nodes: list[Node]) -> None:
        holder, other, idle = nodes

        def resting() -> list[bool]:
            assert all(isinstance(node.backend, Resting) for node in nodes)
            return [node.backend.rests for node in nodes]  # type: ignore[attr-defined]

        await share(holder, other)
        await trio.sleep(3 * IDLE_SECONDS)
        assert resting() == [False, True, True]
        assert await other.acquire("name", 1, Mode.SHARED)
        await trio.sleep(0.1)
        assert resting() == [False, False, True]
        await holder.release("name", 1)
        await trio.sleep(3 * IDLE_SECONDS)
        assert resting() == [True, False, True]
        await break_on_record(idle)
        await other.backend.notify(other.name, "name")
        await trio.sleep(3 * IDLE_SECONDS)
        assert resting() == [True, True, True]

    play(scenario, Resting)


class Damaged(MemoryBackend):
    """What is on record without a lock cannot be read."""

    async def read(self, name: str) -> Stored:
        stored = await super().read(name)
        if stored.record == NameRecord(wanted=("damaged",)):
            raise DamagedError("damaged", Stored(stored.version, NameRecord(broken=("node0", "node1", "node2"))))
        return stored


def test_an_operator_can_break_a_record_that_is_damaged() -> None:
    """All who could be on it hear that what they had is broken; and whoever waited goes on."""

    async def scenario(nodes: list[Node]) -> None:
        holder, waiter, other = nodes
        cluster, heard = holder.backend._cluster, set[str]()
        for node in nodes:
            node.names.broken = lambda _key, locks, name=node.name: heard.add(name) if not locks.holders() else None
        assert await holder.acquire("name", 1, Mode.EXCLUSIVE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter.acquire, "name", 1, Mode.EXCLUSIVE)
            await trio.sleep(2)
            cluster.records["name"] = Stored(cluster.new_version(), NameRecord(wanted=("damaged",)))
            with trio.move_on_after(60) as scope:
                await other.names.look("name")
            assert scope.cancelled_caught
            assert await other.names.clear("name") is None
        await trio.sleep(60)
        assert {"node0", "node2"} <= heard

    play(scenario, Damaged)


def test_a_damaged_record_counts_and_who_waited_on_the_operators_node_keeps_the_lock() -> None:
    async def scenario(nodes: list[Node]) -> None:
        holder, mine, _ = nodes
        cluster, fenced = holder.backend._cluster, list[set[int]]()
        assert await holder.acquire("name", 1, Mode.EXCLUSIVE)
        locks = Locks(mine.names)
        locks.fence = fenced.append
        locks.serve(mine.names)
        waiting = locks.acquire("name", Kind.FLOCK, Lock(Owner(mine.name, 1), Mode.EXCLUSIVE), 1, may_wait=True)
        assert waiting is not None
        await trio.sleep(2)
        cluster.records["name"] = Stored(cluster.new_version(), NameRecord(wanted=("damaged",)))
        await trio.sleep(2)
        assert not waiting.settled.is_set()
        assert await locks.break_locks("name") == 1
        await waiting.settled.wait()
        assert waiting.held and not fenced
        assert await locks.break_locks("name") == 1
        assert fenced == [{1}]
        assert await locks.break_locks("name") == 0

    play(scenario, Damaged)


def test_what_could_not_be_read_once_is_not_taken_for_cleared() -> None:
    """The swap that would have cleared it failed, and the next read is fine: the lock on it is there to be broken."""

    class Hiccup(CountingPolls):
        fails: ClassVar[list[str]] = []

        async def read(self, name: str) -> Stored:
            stored = await super().read(name)
            if "read" in self.fails:
                self.fails.remove("read")
                everybody = Stored(stored.version, NameRecord(broken=("node0", "node1", "node2")))
                raise DamagedError("no such bytes", everybody, may_pass=True)
            return stored

        async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
            if "swap" in self.fails:
                self.fails.remove("swap")
                raise BackendError("no space")
            return await super().swap(name, old, new)

    async def scenario(nodes: list[Node]) -> None:
        holder, other, _ = nodes
        heard = list[str]()
        holder.names.broken = lambda key, _locks: heard.append(key)
        await share(holder, other)
        Hiccup.fails[:] = ["read", "swap"]
        assert await Locks(other.names).break_locks("name") == 1
        assert not Hiccup.fails
        await trio.sleep(LOOK_SECONDS)
        assert heard == ["name"] and not (await other.backend.read("name")).record.locks

    play(scenario, Hiccup)


def test_a_record_that_cannot_be_read_hides_no_others() -> None:
    class Foreign(Damaged):
        async def read(self, name: str) -> Stored:
            if name == "foreign":
                raise UnreadableError("another version's")
            return await super().read(name)

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        cluster = one.backend._cluster
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        for key in ("damaged", "foreign"):
            cluster.records[key] = Stored(cluster.new_version(), NameRecord(wanted=("damaged",)))
        said = {(entry["key"], entry["node"], entry["state"]) for entry in await Locks(two.names).report()}
        unknown = {("damaged", "", "unknown: damaged"), ("foreign", "", "unknown: another version's")}
        assert said == {("name", "node0", "held"), *unknown}

    play(scenario, Foreign)


# Problems, as they are shown and logged.


class Failing(MemoryBackend):
    """What is in `failing` fails, and says so."""

    failing: ClassVar[dict[str, str]] = {}

    async def _may_fail(self, call: str, name: str = "") -> None:
        await trio.lowlevel.checkpoint()
        if call in self.failing:
            raise BackendError(self.failing[call].format(name))

    async def renew(self) -> None:
        await self._may_fail("renew")
        await super().renew()

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        await self._may_fail("swap", name)
        return await super().swap(name, old, new)

    async def next_notice(self) -> str:
        await self._may_fail("next_notice")
        return await super().next_notice()


@pytest.fixture
def failing() -> Iterator[dict[str, str]]:
    yield Failing.failing
    Failing.failing.clear()


def problem_of(node: Node) -> tuple[str, float, int] | None:
    found = node.names.problems.report()
    return None if found is None else (found["text"], found["seconds"], found["names"])


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return said


def test_problems_are_shown_as_long_as_they_last(failing: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever else goes well meanwhile; and the log has each once, however often it is tried and by whom."""

    async def scenario(nodes: list[Node]) -> None:
        one, *_ = nodes
        assert await one.acquire("another", 1, Mode.EXCLUSIVE)
        failing["swap"] = "no space"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.acquire, "name0", 1, Mode.EXCLUSIVE)
            await trio.sleep(40)
            nursery.start_soon(one.acquire, "name1", 1, Mode.EXCLUSIVE)
            await trio.sleep(20)
            await one.backend.renew()
            await one.release("another", 1)
            assert problem_of(one) == ("no space", pytest.approx(60, abs=0.2), 2)
            assert logged(caplog) == ["the lock backend: no space"]
            failing["swap"] = "no quorum"
            await trio.sleep(40)
            assert problem_of(one) == ("no quorum", pytest.approx(100, abs=0.2), 2)
            assert logged(caplog) == ["the lock backend: no quorum"]
            failing.clear()
        await trio.sleep(2)
        assert problem_of(one) is None
        (over,) = logged(caplog)
        assert re.fullmatch(r"the lock backend: over, after 10[01] s: no quorum", over)

    play(scenario, Failing)


def test_what_is_tried_again_before_the_next_failure_ends_no_problem(failing: dict[str, str]) -> None:
    """A node that is gone and named on record: it is found to be gone, and then cannot be taken off it."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.SHARED) and await two.acquire("name", 1, Mode.SHARED)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.acquire, "name", 2, Mode.EXCLUSIVE)
            await trio.sleep(2)
            failing["swap"] = "no space"
            await one.backend.leave()
            seconds = list[float]()
            for _ in range(40):
                await trio.sleep(0.77)
                seconds.append((problem_of(two) or ("", 0.0, 0))[1])
            assert seconds == sorted(seconds) and seconds[-1] > 25
            nursery.cancel_scope.cancel()

    play(scenario, Failing)


def test_many_problems_leave_few_lines(failing: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(nodes: list[Node]) -> None:
        failing["swap"] = "no space for {}"
        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(nodes[0].acquire, f"name{number}", 1, Mode.EXCLUSIVE)
            await trio.sleep(5)
            found = problem_of(nodes[0])
            assert found is not None and found[2] == 1000
            assert len(logged(caplog)) == MOST_LINES
            failing.clear()
        assert problem_of(nodes[0]) is None
        assert len(logged(caplog)) <= MOST_LINES + 1

    play(scenario, Failing)


@pytest.mark.parametrize("comes", [False, True])
def test_a_problem_with_notices_is_over_when_they_are_heard_again(comes: bool, failing: dict[str, str]) -> None:
    """Or could be: perhaps nobody wants anything of this node for hours."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        await two.backend.notify(one.name, "name")
        failing["next_notice"] = "no answer"
        await two.backend.notify(one.name, "another")  # wakes the one that listens
        await trio.sleep(20)
        assert problem_of(one) == ("no answer", pytest.approx(20, abs=2), 0)
        failing.clear()
        if comes:
            await two.backend.notify(one.name, "a third")
        await trio.sleep(2 if comes else module.CALM_SECONDS + module.IDLE_SECONDS / 4 + 2)
        assert problem_of(one) is None

    play(scenario, Failing)


def test_a_lost_lease_ends_the_problems_of_its_names(failing: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of them is tried any more; the log has said why."""

    async def scenario(nodes: list[Node]) -> None:
        failing["swap"] = "no space"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nodes[0].acquire, "name", 1, Mode.EXCLUSIVE)
            await trio.sleep(20.5)
            nodes[0].names.lose()
            assert problem_of(nodes[0]) is None
            await trio.sleep(20)
            assert problem_of(nodes[0]) is None
            nursery.cancel_scope.cancel()
        assert logged(caplog) == ["the lock backend: no space"]

    play(scenario, Failing)


def test_waiters_of_all_nodes_get_the_lock_in_turn() -> None:
    order: list[str] = []

    async def wait(node: Node) -> None:
        assert await node.acquire("name", 1, Mode.EXCLUSIVE)
        order.append(node.name)
        await node.release("name", 1)

    async def scenario(nodes: list[Node]) -> None:
        assert await nodes[0].acquire("name", 9, Mode.EXCLUSIVE)
        async with trio.open_nursery() as nursery:
            for node in (nodes[1], nodes[2], nodes[0]):
                nursery.start_soon(wait, node)
                await trio.sleep(5)
            await nodes[0].release("name", 9)
        assert order == ["node1", "node2", "node0"]

    play(scenario, MemoryBackend)


def test_a_record_that_has_lost_a_request_grants_nothing() -> None:
    """One from an old snapshot of etcd: it is asked again."""

    async def scenario(nodes: list[Node]) -> None:
        holder, waiter, _ = nodes
        cluster, got = holder.backend._cluster, trio.Event()

        async def wait() -> None:
            assert await waiter.acquire("name", 1, Mode.EXCLUSIVE)
            got.set()

        assert await holder.acquire("name", 1, Mode.EXCLUSIVE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(5)
            locks = cluster.records["name"].record.locks.copy()
            locks[Kind.FLOCK].waiting.clear()
            cluster.records["name"] = Stored(cluster.new_version(), NameRecord(locks=locks))
            await trio.sleep(5)
            assert not got.is_set()
            await holder.release("name", 1)
            with trio.fail_after(5):
                await got.wait()

    play(scenario, MemoryBackend)


def test_all_names_of_a_lost_node_are_free_at_once() -> None:
    """It is looked for once whether it is gone, for all of them."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        keys = [f"name{number}" for number in range(40)]
        for key in keys:
            assert await one.acquire(key, 1, Mode.EXCLUSIVE)
        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(two.acquire, key, 1, Mode.EXCLUSIVE)
            await trio.sleep(5)
            one.names.submit = lambda *_: None  # type: ignore[method-assign, assignment]
            await one.backend.leave()
            nursery.cancel_scope.deadline = trio.current_time() + 3 * LOOK_SECONDS
        assert not nursery.cancel_scope.cancelled_caught

    play(scenario, MemoryBackend)


def test_records_of_lost_nodes_that_nobody_asks_for_are_removed() -> None:
    """Also what they held, or waited for, on names that are shared; nothing of those who live."""

    async def scenario(nodes: list[Node]) -> None:
        dies, lives, other = nodes
        for number in range(30):
            assert await dies.acquire(f"left{number}", 1, Mode.EXCLUSIVE)
        assert await lives.acquire("kept", 1, Mode.EXCLUSIVE)
        for node in (dies, lives):
            assert await node.acquire("shared", 1, Mode.SHARED)
        before = set(await lives.backend.all_names())
        await trio.sleep(2 * SWEEP_SECONDS)
        assert set(await lives.backend.all_names()) == before
        dies.names.submit = lambda *_: None  # type: ignore[method-assign, assignment]
        await dies.backend.leave()
        await trio.sleep(20 * SWEEP_SECONDS)
        assert set(await lives.backend.all_names()) == {"kept", "shared"}
        assert dies.name not in (await other.backend.read("shared")).record.nodes()
        assert not await other.acquire("kept", 1, Mode.SHARED, may_wait=False)

    play(scenario, MemoryBackend)


def test_who_waits_looks_after_those_who_stand_in_his_way() -> None:
    """Not after all who wait: of a hundred nodes each would look after a hundred."""
    locks = NameLocks()
    table = locks[Kind.FLOCK]
    table.held = [Lock(Owner("holder", 1), Mode.SHARED)]
    modes = {"reader": Mode.SHARED, "first": Mode.EXCLUSIVE, "second": Mode.EXCLUSIVE, "me": Mode.SHARED}
    table.waiting = [Wait(1, Lock(Owner(node, 1), mode)) for node, mode in modes.items()]
    record = NameRecord(locks=locks, wanted=("late",), broken=("fenced",))
    assert record.in_the_way("me") == {"holder", "first", "second", "fenced"}
    assert record.in_the_way("first") == {"holder", "fenced", "reader"}
    others = [f"node{number}" for number in range(100)]
    table.waiting = [Wait(1, Lock(Owner(node, 1), Mode.EXCLUSIVE)) for node in (*others, "me")]
    assert record.in_the_way("me") == {"holder", "fenced", *others[:8]}
    table.held, table.waiting = [], [Wait(number, Lock(Owner("one", 1), Mode.EXCLUSIVE)) for number in range(100)]
    table.waiting += [Wait(1, Lock(Owner(node, 1), Mode.EXCLUSIVE)) for node in ("two", "me")]
    assert record.in_the_way("me") == {"one", "two", "fenced"}  # nodes, not requests
    assert NameRecord("delegate", ("me", "other")).in_the_way("me") == {"delegate"}


def test_one_who_waits_and_is_gone_stands_in_nobodys_way() -> None:
    """Readers who came after a writer that is gone go on, though another reader holds the lock for long."""

    async def scenario(nodes: list[Node]) -> None:
        reader, writer, late = nodes
        assert await reader.acquire("name", 1, Mode.SHARED)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.acquire, "name", 1, Mode.EXCLUSIVE)
            await trio.sleep(1)
            nursery.start_soon(writer.acquire, "name", 2, Mode.EXCLUSIVE)
            await trio.sleep(1)
            writer.names.submit = lambda *_: None  # type: ignore[method-assign, assignment]
            await writer.backend.leave()
            with trio.fail_after(5):
                assert await late.acquire("name", 1, Mode.SHARED)
            nursery.cancel_scope.cancel()

    play(scenario, MemoryBackend)


@pytest.mark.parametrize("shared_before", [False, True])
def test_what_a_lost_node_held_is_free(shared_before: bool) -> None:
    """Delegated to it, or on record."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, three = nodes
        if shared_before:
            assert await two.acquire("name", 1, Mode.SHARED)
        assert await one.acquire("name", 1, Mode.SHARED)
        if shared_before:
            await two.release("name", 1)
        backend: Any = one.backend
        got = trio.Event()

        async def wait() -> None:
            assert await three.acquire("name", 1, Mode.EXCLUSIVE)
            got.set()

        async with trio.open_nursery() as nursery:
            # The lost node does not answer any more.
            one.names.submit = lambda *_: None  # type: ignore[method-assign, assignment]
            backend.swap = lost
            nursery.start_soon(wait)
            await trio.sleep(20)
            assert not got.is_set()
            backend._cluster.ended.add("node0")
            await trio.sleep(20)
            assert got.is_set()

    play(scenario, MemoryBackend)


def test_who_only_tries_gets_what_a_lost_node_held() -> None:
    """Tries are refused at once and leave nothing in the queue: they look all the same whether the holder is there."""

    async def scenario(nodes: list[Node]) -> None:
        assert await nodes[0].acquire("name", 1, Mode.EXCLUSIVE)
        assert not await nodes[1].acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)
        await nodes[0].backend.leave()
        await trio.sleep(LOOK_SECONDS)
        assert await nodes[1].acquire("name", 1, Mode.EXCLUSIVE, may_wait=False)

    play(scenario, MemoryBackend)


def test_a_name_that_a_swap_took_too_late_is_given_back() -> None:
    """The node has given the swap up, and does not know that it has the name; it lives, so nobody takes it from it."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        one.backend._cluster.records["name"] = Stored(one.backend._cluster.new_version(), NameRecord(delegate="node0"))
        assert await two.acquire("name", 1, Mode.EXCLUSIVE)

    play(scenario, MemoryBackend)


def test_two_nodes_that_take_a_name_from_each_other_use_it() -> None:
    """Whoever is asked for a name that it has taken, and not used yet, uses it before it gives it back."""

    async def scenario(nodes: list[Node]) -> None:
        one = nodes[0]
        taken = 0
        swap = one.backend.swap

        async def taken_and_wanted(name: str, old: Stored, new: NameRecord) -> Stored | None:
            nonlocal taken
            stored = await swap(name, old, new)
            if stored is not None and new == NameRecord("node0"):
                taken += 1
                assert taken == 1, "it was given back unused, and is taken again"
                await swap(name, stored, new.want("node1"))
                raise BackendError("the answer is lost")
            return stored

        one.backend.swap = taken_and_wanted  # type: ignore[method-assign]
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        assert taken == 1

    play(scenario, MemoryBackend)


@pytest.mark.parametrize("hangs", [False, True])
def test_an_orderly_end_gives_back_what_nothing_is_locked_of(hangs: bool) -> None:
    """In bounded time, also where the backend does not answer any more."""

    async def scenario(nodes: list[Node]) -> None:
        node, other, _ = nodes
        for number in range(50):
            assert await node.acquire(f"name{number}", 1, Mode.EXCLUSIVE)
            if number:
                await node.release(f"name{number}", 1)
        assert len(await other.backend.all_names()) == 50
        if hangs:
            node.backend.swap = forever  # type: ignore[method-assign]
        began = trio.current_time()
        await node.names.give_back()
        assert trio.current_time() - began <= GIVE_BACK_SECONDS
        assert len(await other.backend.all_names()) == (50 if hangs else 1)
        assert hangs or not await other.acquire("name0", 1, Mode.SHARED, may_wait=False)

    play(scenario, MemoryBackend)


async def forever(*_: object) -> Stored | None:
    await trio.sleep_forever()
    return None


def test_what_is_asked_when_it_is_over() -> None:
    """By publishes that are finished after something else has failed: no lock counts, and nothing new is raised."""

    async def main() -> None:
        node = Node("node", MemoryBackend(MemoryCluster(), "node"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.names.run)
            assert await node.acquire("name", 1, Mode.EXCLUSIVE)
            nursery.cancel_scope.cancel()
        assert not node.names.lease_holds() and node.names.local("name") is None
        node.submit("other", Release(Kind.FLOCK, Owner("node", 1), 0, OFFSET_MAX))

    trio.run(main)


@pytest.mark.parametrize("turns", range(6))
def test_what_is_asked_while_it_ends(turns: int) -> None:
    """So many turns of the loop after the end has begun: by publishes that are given up at the same time."""

    async def unlock_late(node: Node) -> None:
        for _ in range(turns):
            await trio.lowlevel.cancel_shielded_checkpoint()
        node.submit("other", Release(Kind.FLOCK, Owner("node", 1), 0, OFFSET_MAX))

    async def main() -> None:
        for _ in range(20):  # in one turn trio lets them run in any order
            node = Node("node", MemoryBackend(MemoryCluster(), "node"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.names.run)
                await node.acquire("name", 1, Mode.EXCLUSIVE)
                nursery.start_soon(unlock_late, node)
                nursery.cancel_scope.cancel()
            assert not node.names.lease_holds()

    trio.run(main)


async def lost(*_: object) -> Stored | None:
    raise BackendError("no answer")


def test_names_that_are_not_used_leave_no_record() -> None:
    async def scenario(nodes: list[Node]) -> None:
        for number in range(20):
            assert await nodes[0].acquire(f"name{number}", 1, Mode.EXCLUSIVE)
            await nodes[0].release(f"name{number}", 1)

    cluster = play(scenario, MemoryBackend)
    assert len(cluster.records) == 20


def test_a_record_that_another_version_wrote() -> None:
    with pytest.raises(ForeignRecordError, match="another version"):
        NameRecord.from_json({"format": 99})
    whole = NameRecord().to_json()
    parts: list[dict[str, Any]] = [{"locks": []}, {"locks": {"none": {}}}]
    parts += [{part: value} for part in ("wanted", "broken") for value in (1, "ab", [[]], [1], None)]
    parts += [{"delegate": value} for value in (1, [], None)]
    waiting = {"flock": {"held": [], "waiting": [[1, False, "a", 7, "shared", 0, 1, 7]]}}
    parts += [{"delegate": "a", "locks": waiting}, {"delegate": "a", "broken": ["b"]}]  # no step makes such
    parts += [{"delegate": "\ud800"}, {"wanted": ["\ud800"]}, {"broken": ["a", "\ud800"]}]
    parts += [{"locks": json.loads(json.dumps(waiting).replace('"a"', '"\\ud800"'))}]
    assert NameRecord.from_json({**whole, "locks": waiting}).locks.nodes() == {"a"}
    for none in ({"format": FORMAT, "delegate": "a"}, {}, [], None, 17, *({**whole, **part} for part in parts)):
        with pytest.raises(ValueError, match="no lock record") as caught:
            NameRecord.from_json(none)
        assert not isinstance(caught.value, ForeignRecordError)
    record = NameRecord("a", ("b",), NameLocks())
    assert NameRecord.from_json(record.to_json()) == record


class Distant(Unhurried):
    """A notice of a change takes as long again."""

    def follow(self, name: str) -> MemoryFollower:
        return LateFollower(self._cluster, name, self.seconds)


def test_who_gives_a_name_back_does_not_take_it_again_at_once() -> None:
    """He is nearer to it than those who have to hear of it first."""

    async def scenario(nodes: list[Node]) -> None:
        async def go_on() -> None:
            while True:
                await nodes[0].acquire("name", 1, Mode.EXCLUSIVE)
                await trio.sleep(0.0001)
                await nodes[0].release("name", 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            await trio.sleep(0.1)
            with trio.fail_after(2):
                await nodes[1].acquire("name", 2, Mode.EXCLUSIVE)
            nursery.cancel_scope.cancel()

    play(scenario, Distant, 2)


def test_nothing_is_granted_after_the_lease() -> None:
    """Not of a name that is delegated to the node either, and whoever asks meanwhile gets it under the next lease."""

    async def scenario(nodes: list[Node]) -> None:
        one, two, _ = nodes
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)
        await one.release("name", 1)
        await one.backend.leave()  # what it has not noticed yet
        with trio.move_on_after(10) as scope:
            await one.acquire("name", 1, Mode.EXCLUSIVE)
        assert scope.cancelled_caught
        assert await two.acquire("name", 1, Mode.EXCLUSIVE)
        await two.release("name", 1)
        one.names.lose()
        await one.backend.join()
        assert await one.acquire("name", 1, Mode.EXCLUSIVE)

    play(scenario, MemoryBackend)
