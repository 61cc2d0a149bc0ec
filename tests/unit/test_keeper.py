"""Losing a lease and coming back, with the locks of a node: what was held is fenced, who waits goes on waiting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from safefs.cluster.backend import BackendError, LeaseLostError, Stored
from safefs.cluster.keeper import Keeper
from safefs.cluster.names import Names
from safefs.cluster.problems import Problems
from safefs.cluster.record import NameRecord
from safefs.lease import OwnLease, Sightings, Terms, boottime
from safefs.locks import Alone, Locks, Waiting
from safefs.locktable import Kind, Lock, Mode, Owner
from tests.support.memory_backend import MemoryBackend, MemoryCluster

TERMS = Terms(lease_seconds=6, delay_seconds=2)


@dataclass
class Node:
    """A node as the daemon puts it together."""

    backend: MemoryBackend
    fenced: list[set[int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = Names(self.backend)
        self.locks = Locks(self.names)
        self.names.resolve, self.names.told = self.locks.resolve, self.locks.told
        self.problems = Problems()
        self.keeper = Keeper(self.backend, TERMS, self.locks.ask_again, self.lose, self.problems)

    def lose(self, reason: str) -> None:
        self.reasons.append(reason)
        self.names.lose()
        self.fenced.append(self.locks.lose())

    def ask(self, handle: int, key: str = "name", *, may_wait: bool = True) -> Waiting | None:
        lock = Lock(Owner(self.locks.node, handle), Mode.EXCLUSIVE)
        return self.locks.acquire(key, Kind.FLOCK, lock, handle, may_wait=may_wait)

    async def acquire(self, handle: int, key: str = "name", *, may_wait: bool = True) -> bool:
        waiting = self.ask(handle, key, may_wait=may_wait)
        if waiting is None:
            return True
        await waiting.settled.wait()
        return waiting.held


def play(scenario: Callable[..., Awaitable[None]], make: Callable[[MemoryCluster, str], MemoryBackend]) -> None:
    async def main() -> None:
        cluster = MemoryCluster()
        nodes = [Node(make(cluster, name)) for name in ("one", "two")]
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.keeper.run)
                nursery.start_soon(node.names.run)
            with trio.fail_after(3600):
                await scenario(cluster, *nodes)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_what_was_held_is_fenced_and_who_waits_goes_on() -> None:
    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert await one.acquire(1)
        assert await two.acquire(2, "other")
        waiting = one.ask(3, "other")
        assert waiting is not None
        await trio.sleep(3)
        cluster.ended.add("one")
        await trio.sleep(2 * TERMS.gone_seconds)
        assert one.fenced == [{1}] and one.reasons == ["another node has ended the lease"]
        assert one.locks.node != "one"
        # The lock is another's now, and the node takes part again.
        assert await two.acquire(4)
        assert not await one.acquire(5, may_wait=False)
        assert not waiting.settled.is_set()
        two.locks.released(2)
        await waiting.settled.wait()
        assert waiting.held

    play(scenario, MemoryBackend)


def test_a_node_joins_anew_only_once_it_may() -> None:
    """Nobody asks before the first lease, which whoever mounts has looked around for."""

    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        asked = 0

        async def not_yet() -> None:
            nonlocal asked
            asked += 1
            if asked < 5:
                raise BackendError("others have mounted otherwise")

        one.keeper.before_rejoin = not_yet
        cluster.ended.add("one")
        await trio.sleep(TERMS.renew_seconds + 1)
        assert 0 < asked < 5 and not one.names.lease_holds()
        assert "mounted otherwise" in str(one.keeper.problem)
        await trio.sleep(TERMS.gone_seconds)
        assert asked == 5 and one.names.lease_holds() and one.locks.node != "one"

    play(scenario, MemoryBackend)


def test_who_asks_is_told_while_a_node_looks_around() -> None:
    """Also where it hangs in that: nothing has failed then."""

    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        looked = trio.Event()
        one.keeper.before_rejoin = looked.wait
        assert one.problems.report() is None
        cluster.ended.add("one")
        await trio.sleep(10 * TERMS.gone_seconds)
        problem = one.problems.report()
        assert problem is not None and "another node has ended the lease" in problem["text"]
        assert problem["seconds"] > TERMS.gone_seconds
        looked.set()
        await trio.sleep(1)
        assert one.problems.report() is None and one.names.lease_holds()

    play(scenario, MemoryBackend)


@pytest.mark.parametrize("reached", [True, False])
def test_who_waits_for_one_range_and_holds_another_is_fenced(reached: bool) -> None:
    """Also where the answer to its request was not there yet."""

    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        async def take(node: Node, handle: int, first: int, last: int) -> Waiting | None:
            lock = Lock(Owner(node.locks.node, handle), Mode.EXCLUSIVE, first, last)
            waiting = node.locks.acquire("name", Kind.RECORD, lock, handle, may_wait=True)
            await trio.sleep(1)
            return waiting

        assert isinstance(one.backend, Unsteady)
        await take(two, 1, 0, 9)
        await take(one, 2, 10, 19)
        await take(one, 3, 30, 39)
        one.locks.release("name", Kind.RECORD, Owner("one", 3))
        await trio.sleep(10)
        one.backend.lost = not reached
        for handle in (2, 3, 4):
            waiting = await take(one, handle, 0, 9)
            assert waiting is not None and not waiting.settled.is_set()
        one.backend.lost = True
        cluster.ended.add("one")
        await trio.sleep(20)
        assert one.fenced == [{2}]

    Unsteady.lost = False
    play(scenario, Unsteady)


def test_unlocking_after_the_loss_unlocks_nobody_elses() -> None:
    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert await one.acquire(1)
        old = Owner(one.locks.node, 1)
        cluster.ended.add("one")
        await trio.sleep(2 * TERMS.gone_seconds)
        assert await two.acquire(2)
        one.locks.release("name", Kind.FLOCK, old)
        one.locks.released(1)
        await trio.sleep(10)
        assert not await one.acquire(3, may_wait=False)

    play(scenario, MemoryBackend)


class Unsteady(MemoryBackend):
    """Cannot be reached for a while."""

    lost = False

    async def join(self) -> None:
        self._check()
        await super().join()

    async def renew(self) -> None:
        self._check()
        await super().renew()

    async def read(self, name: str) -> Stored:
        self._check()
        return await super().read(name)

    def _check(self) -> None:
        if self.lost:
            raise BackendError("no route")


class Late(MemoryBackend):
    """First it fails, then its answers are late: they come when the lease is over and the node has another name."""

    fails = 0

    async def read(self, name: str) -> Stored:
        stored = await super().read(name)
        if self.fails:
            self.fails -= 1
            if self.fails:
                raise BackendError("no route")
            await trio.sleep(3 * TERMS.lease_seconds)
        return stored


def test_an_answer_from_before_the_loss_grants_nothing() -> None:
    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert await two.acquire(1)
        waiting = one.ask(2)
        assert waiting is not None
        await trio.sleep(3)
        assert isinstance(one.backend, Late)
        one.backend.fails = 2
        await trio.sleep(1.5)
        cluster.ended.add("one")
        await trio.sleep(10 * TERMS.lease_seconds)
        assert one.locks.node != "one"
        assert not waiting.settled.is_set()
        two.locks.released(1)
        await waiting.settled.wait()
        assert waiting.held

    play(scenario, Late)


class Silent(MemoryBackend):
    """Does not answer any more, once it is silent; the lease ends meanwhile."""

    silent = False
    renewed = 0.0

    async def join(self) -> None:
        await super().join()
        self.renewed = trio.current_time()

    async def renew(self) -> None:
        if boottime() >= self.lease_ends():
            raise LeaseLostError("the lease was not renewed in time")
        if self.silent:
            await trio.sleep(100 * TERMS.lease_seconds)
        self.renewed = trio.current_time()

    def lease_ends(self) -> float:
        return boottime() + self.renewed + TERMS.lease_seconds - trio.current_time()


def test_who_waits_for_an_answer_knows_that_the_lease_has_ended() -> None:
    """And does not find out with the answer: others have the lock by then."""

    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert await one.acquire(1)
        Silent.silent = True
        await trio.sleep(TERMS.gone_seconds)
        assert one.fenced == [{1}]

    play(scenario, Silent)


@pytest.mark.parametrize("seconds", [2, 200])
def test_a_backend_that_comes_back(seconds: int) -> None:
    """For a moment, nothing is lost; for longer than the lease, everything is, and then the node joins again."""

    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert await one.acquire(1)
        Unsteady.lost = True
        await trio.sleep(seconds)
        if seconds > TERMS.lease_seconds:
            cluster.ended |= {"one", "two"}
        Unsteady.lost = False
        await trio.sleep(20)
        assert bool(one.fenced) == (seconds > TERMS.lease_seconds)
        assert await one.acquire(2, "another")

    play(scenario, Unsteady)


def test_what_is_asked_without_a_lease_is_asked_under_the_next_one() -> None:
    """It is the new name of the node that has the lock, so nobody takes it for one of a lost lease."""

    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert isinstance(one.backend, Unsteady)
        one.backend.lost = True
        cluster.ended.add("one")
        await trio.sleep(20)
        assert one.fenced
        waiting = one.ask(1)
        assert waiting is not None
        one.backend.lost = False
        await waiting.settled.wait()
        assert waiting.held
        other = two.ask(2)
        assert other is not None
        await trio.sleep(20)
        assert not other.settled.is_set()
        one.locks.released(1)
        await other.settled.wait()

    Unsteady.lost = False
    play(scenario, Unsteady)


class Slow(MemoryBackend):
    """The answers to swaps that put a lock of this node on record are under way for long."""

    def __init__(self, cluster: MemoryCluster, node: str) -> None:
        super().__init__(cluster, node)
        self.answers: defaultdict[str, trio.Event] = defaultdict(trio.Event)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        node = self.node
        stored = await super().swap(name, old, new)
        if node.startswith("one") and node in new.locks.nodes():
            await self.answers[node].wait()
        return stored


def test_an_answer_that_comes_under_the_next_lease_grants_nothing() -> None:
    async def scenario(cluster: MemoryCluster, one: Node, two: Node) -> None:
        assert isinstance(one.backend, Slow)
        before = two.locks.acquire("name", Kind.FLOCK, Lock(Owner("two", 2), Mode.SHARED), 2, may_wait=True)
        assert before is not None
        await before.settled.wait()
        waiting = one.locks.acquire("name", Kind.FLOCK, Lock(Owner("one", 1), Mode.SHARED), 1, may_wait=True)
        assert waiting is not None
        await trio.sleep(10)
        assert {*one.backend.answers} == {"one"}
        cluster.ended.add("one")
        await trio.sleep(20)
        assert {*one.backend.answers} == {"one", "one'"}
        one.backend.answers["one"].set()
        await trio.sleep(20)
        assert not waiting.settled.is_set()
        one.backend.answers["one'"].set()
        await waiting.settled.wait()
        assert waiting.held

    play(scenario, Slow)


@pytest.mark.parametrize("all_is_done", [True, False])
def test_a_node_that_ends_leaves(all_is_done: bool) -> None:
    """Unless something that it has begun under its lease can still come to pass: then others wait for that."""
    cluster = MemoryCluster()

    async def has_ended() -> bool:
        await trio.sleep(1)  # nothing else goes on by then
        return all_is_done

    async def main() -> None:
        node = Node(MemoryBackend(cluster, "one"))
        async with trio.open_nursery() as nursery:
            await nursery.start(node.keeper.run)
            node.keeper.has_ended = has_ended
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert cluster.ended == ({"one"} if all_is_done else set())


# A node alone.


def test_alone_everything_is_done_at_once() -> None:
    locks = Locks(Alone("here"))
    lock = [Lock(Owner("here", number), Mode.EXCLUSIVE) for number in range(3)]
    assert locks.acquire("name", Kind.FLOCK, lock[0], 1, may_wait=False) is None
    with pytest.raises(BlockingIOError):
        locks.acquire("name", Kind.FLOCK, lock[1], 2, may_wait=False)
    waiting = locks.acquire("name", Kind.FLOCK, lock[2], 3, may_wait=True)
    assert waiting is not None and locks.counts() == (2, 1)
    locks.released(1)
    assert waiting.held and waiting.settled.is_set()
    locks.released(3)
    assert locks.counts() == (0, 0)


def test_names_without_locks_do_not_pile_up() -> None:
    service = Alone("here")
    locks = Locks(service)
    for number in range(1000):
        key = f"name{number}"
        assert locks.acquire(key, Kind.FLOCK, Lock(Owner("here", 1), Mode.SHARED), 1, may_wait=False) is None
        locks.released(1)
    assert len(service._names) <= 2


# The arithmetic of leases.


def test_a_lease_ends_where_its_renewal_was_sent() -> None:
    lease = OwnLease(TERMS)
    assert not lease.holds(0)
    lease.renew(sent=10)
    assert lease.ends() == 16 and lease.holds(15.9) and not lease.holds(16)


def test_a_node_is_gone_when_nothing_was_seen_for_lease_and_delay() -> None:
    seen = Sightings(TERMS)
    assert not seen.see("a", 1, 0, 1)
    assert not seen.see("a", 1, 8, 9)  # read before the time was over
    assert not seen.see("a", 2, 20, 21)
    assert not seen.see("a", 2, 28.9, 29)
    assert seen.see("a", 2, 29, 29)
    seen.forget({"a"})
    assert not seen.see("a", 2, 100, 100)
