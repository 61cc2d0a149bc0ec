"""Several nodes in one process, on records that can fail: no two hold the same lock, and nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from safefs.cluster.backend import BackendError, Stored
from safefs.cluster.memory import MemoryBackend, MemoryCluster
from safefs.cluster.names import Names
from safefs.cluster.record import Acquire, GiveUp, NameRecord, Release, Step, carry_out
from safefs.locks import Locks
from safefs.locktable import OFFSET_MAX, Kind, Lock, Mode, NameLocks, Owner, Wait

HOURS = 3600.0


class Faulty(MemoryBackend):
    """Answers come late, and some not at all: of a swap that was carried out, or of one that was not."""

    def __init__(self, cluster: MemoryCluster, node: str, chance: random.Random, share: float) -> None:
        super().__init__(cluster, node)
        self._chance = chance
        self._share = share
        self.calls = 0

    async def _may_fail(self) -> None:
        self.calls += 1
        await trio.sleep(self._chance.random() / 100)
        if self._chance.random() < self._share:
            raise BackendError("no answer")

    async def read(self, name: str) -> Stored:
        await self._may_fail()
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        await self._may_fail()
        stored = await super().swap(name, old, new)
        await self._may_fail()
        return stored

    async def wait_for_change(self, name: str, seen: Stored, seconds: float) -> None:
        await self._may_fail()
        await super().wait_for_change(name, seen, seconds)

    async def notify(self, node: str, name: str) -> None:
        if self._chance.random() > self._share:  # notices are lost without a word
            await super().notify(node, name)


@dataclass
class Node:
    """A node and its requests, as safefs.locks will use it."""

    name: str
    backend: MemoryBackend
    outcomes: dict[int, trio.Event] = field(default_factory=dict)
    held: dict[int, bool] = field(default_factory=dict)
    last: int = 0

    def __post_init__(self) -> None:
        self.names = Names(self.backend)
        self.names.resolve = self._resolve

    def _resolve(self, ticket: int, granted: bool) -> bool:
        if ticket not in self.outcomes:
            return False
        self.held[ticket] = granted
        self.outcomes[ticket].set()
        return True

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
        self.submit(key, Acquire(kind, wait, may_wait))
        try:
            await event.wait()
        except trio.Cancelled:
            del self.outcomes[wait.ticket]
            if not event.is_set():
                self.submit(key, GiveUp(kind, wait))
                raise
        return self.held.pop(wait.ticket)

    async def release(self, key: str, owner: int) -> None:
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
    return lambda cluster, node: Faulty(cluster, node, chance, share)


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
                await overlap.hold(key, mode, chance.random() / 20)
                await node.release(key, owner)

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
    """Counts what goes to the others."""

    messages = 0

    async def read(self, name: str) -> Stored:
        self.messages += 1
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        self.messages += 1
        return await super().swap(name, old, new)


def test_a_name_that_is_delegated_costs_no_message() -> None:
    async def scenario(nodes: list[Node]) -> None:
        node = nodes[0]
        assert await node.acquire("name", 1, Mode.EXCLUSIVE)
        await node.release("name", 1)
        backend: Any = node.backend
        before = backend.messages
        for _ in range(100):
            assert await node.acquire("name", 1, Mode.EXCLUSIVE)
            await node.release("name", 1)
        assert backend.messages == before

    play(scenario, Counting)


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


class Late(MemoryBackend):
    """Sees what others have changed some time after it happened, as who polls does."""

    async def wait_for_change(self, name: str, seen: Stored, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await trio.sleep(0.25)
            await super().wait_for_change(name, seen, seconds)


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


def test_nodes_that_wanted_a_name_and_are_gone_do_not_keep_it_shared() -> None:
    async def scenario(nodes: list[Node]) -> None:
        node = nodes[0]
        cluster = node.backend._cluster
        cluster.ended.add("gone")
        cluster.records["name"] = Stored(cluster.new_version(), NameRecord(wanted=("gone",)))
        assert node.names.local("name") is None
        assert await node.acquire("name", 2, Mode.EXCLUSIVE)
        await node.release("name", 2)
        assert await node.acquire("name", 2, Mode.EXCLUSIVE)
        assert node.names.local("name") is not None

    play(scenario, MemoryBackend)


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
        for _ in range(100):
            if await nodes[1].acquire("name", 1, Mode.EXCLUSIVE, may_wait=False):
                return
            await trio.sleep(0.1)
        pytest.fail("never got it")

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
    with pytest.raises(ValueError, match="another version"):
        NameRecord.from_json({"format": 99})
    with pytest.raises(ValueError, match="no lock record"):
        NameRecord.from_json({"format": 1, "delegate": "a"})
    record = NameRecord("a", ("b",), NameLocks())
    assert NameRecord.from_json(record.to_json()) == record


class Distant(MemoryBackend):
    """Every answer takes a while, and a notice of a change as long again."""

    async def read(self, name: str) -> Stored:
        await trio.sleep(0.001)
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        await trio.sleep(0.001)
        return await super().swap(name, old, new)

    async def wait_for_change(self, name: str, seen: Stored, seconds: float) -> None:
        await super().wait_for_change(name, seen, seconds)
        await trio.sleep(0.001)


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
