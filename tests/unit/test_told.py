"""What a node has told its owners that they have is what is on the record that it shares, and nothing else is there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import pytest
import trio
import trio.testing

from safefs.cluster.backend import BackendError, Stored
from safefs.cluster.names import Names
from safefs.cluster.record import Acquire, Break, NameRecord, Step
from safefs.locks import Locks, Waiting
from safefs.locktable import OFFSET_MAX, Kind, Lock, Mode, NameLocks, Owner, Wait
from tests.support.memory_backend import MemoryBackend, MemoryCluster, MemoryFollower

NAME = "1/x.lock"
SETTLED_SECONDS = 10.3  # of a clock that jumps, and never when a node looks, which is twice a second
ME, NEIGHBOUR, FAR, READER = Owner("here", 1), Owner("here", 2), Owner("there", 3), Owner("there", 4)
EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED


async def until(condition: Callable[[], bool]) -> None:
    """No time passes meanwhile."""
    for _ in range(1000):
        if condition():
            return
        await trio.lowlevel.checkpoint()
    pytest.fail("it does not come to that")


class LateFollower(MemoryFollower):
    """What others have changed its node sees when it looks for itself, which takes time."""

    async def next_change(self, _seen: Stored, seconds: float, _turns: int = 0) -> Stored | None:
        await trio.sleep(seconds)
        return None


class LateBackend(MemoryBackend):
    def follow(self, name: str) -> MemoryFollower:
        return LateFollower(self._cluster, name)


class Nodes:
    """Two nodes that share the record of one name, because both have a lock somewhere behind all others."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.cluster = MemoryCluster()
        self.here, self.there = (self._join(nursery, name) for name in ("here", "there"))
        self.fenced = set[int]()
        self.here.fence = self.fenced.update

    def _join(self, nursery: trio.Nursery, node: str) -> Locks:
        names = Names(LateBackend(self.cluster, node))
        locks = Locks(names)
        locks.serve(names)
        nursery.start_soon(names.run)
        return locks

    @property
    def record(self) -> NameRecord:
        return self.cluster.records[NAME].record

    def on_record(self, kind: Kind, owner: Owner) -> list[tuple[int, int, Mode]]:
        table = self.record.locks.tables.get(kind)
        return [(each.first, each.last, each.mode) for each in table.held if each.owner == owner] if table else []

    def ask(self, kind: Kind, lock: Lock, handle: int = 1) -> Waiting | None:
        locks = self.here if lock.owner.node == "here" else self.there
        return locks.acquire(NAME, kind, lock, handle, may_wait=True, file=1)

    async def lock(self, kind: Kind, lock: Lock, handle: int = 1) -> None:
        waiting = self.ask(kind, lock, handle)
        if waiting is not None:
            await waiting.settled.wait()
            assert waiting.held

    async def is_granted(self, kind: Kind, lock: Lock) -> None:
        """Until it is on record; no time passes, so that the other node has not looked by then."""
        await until(lambda: self.record.has(kind, lock))

    async def granted_behind_another(self, lock: Lock, handle: int = 1) -> Waiting:
        """A request that has waited for a range of the other node's, and has its lock on record by now."""
        await self.lock(Kind.RECORD, Lock(FAR, EXCLUSIVE, 50, 59), 5)
        waiting = self.ask(Kind.RECORD, lock, handle)
        assert waiting is not None
        await trio.sleep(SETTLED_SECONDS)
        self.there.release(NAME, Kind.RECORD, FAR)
        await self.is_granted(Kind.RECORD, lock)
        return waiting


Scenario = Callable[[Nodes], Awaitable[None]]


def play(scenario: Scenario) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nodes = Nodes(nursery)
            await trio.testing.wait_all_tasks_blocked()
            for number, (node, kind) in enumerate((node, kind) for node in ("here", "there") for kind in Kind):
                if kind is Kind.RECORD:
                    await nodes.lock(kind, Lock(Owner(node, 90 + number), SHARED, 1000, 1000), 90 + number)
            await trio.sleep(SETTLED_SECONDS)
            await scenario(nodes)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("kind", list(Kind))
def test_one_of_two_requests_of_an_owner_is_given_up_as_both_are_granted(kind: Kind) -> None:
    """Two children wait through an open file that both have inherited, and a signal ends one of them."""

    async def scenario(nodes: Nodes) -> None:
        last = OFFSET_MAX if kind is Kind.FLOCK else 9
        await nodes.lock(kind, Lock(FAR, EXCLUSIVE, 0, last), 5)
        mine = Lock(ME, EXCLUSIVE, 0, last)
        first, second = nodes.ask(kind, mine), nodes.ask(kind, mine)
        assert first is not None and second is not None
        await trio.sleep(SETTLED_SECONDS)
        nodes.there.release(NAME, kind, FAR)
        await nodes.is_granted(kind, mine)
        nodes.here.give_up(first)
        await second.settled.wait()
        await trio.sleep(SETTLED_SECONDS)
        assert second.held and nodes.on_record(kind, ME) == [(0, last, EXCLUSIVE)]

    play(scenario)


def test_two_requests_and_the_end_of_the_first_in_one_step() -> None:
    async def scenario(nodes: Nodes) -> None:
        mine = Lock(ME, EXCLUSIVE, 0, 9)
        first, second = nodes.ask(Kind.RECORD, mine), nodes.ask(Kind.RECORD, mine)
        assert first is not None and second is not None
        nodes.here.give_up(first)
        await second.settled.wait()
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.on_record(Kind.RECORD, ME) == [(0, 9, EXCLUSIVE)]

    play(scenario)


@pytest.mark.parametrize("had", list(Mode))
def test_a_wider_lock_is_given_up_as_it_is_granted(had: Mode) -> None:
    """What the process had before is what it has, in the mode in which it had it; and it can unlock that."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(ME, had, 0, 9))
        nodes.here.give_up(await nodes.granted_behind_another(Lock(ME, EXCLUSIVE, 0, 59)))
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.on_record(Kind.RECORD, ME) == [(0, 9, had)]
        for event in nodes.here.unlock_records(ME, 1, 0, 9):
            await event.wait()
        assert not nodes.on_record(Kind.RECORD, ME)

    play(scenario)


@pytest.mark.parametrize("had", list(Mode))
def test_a_conversion_is_given_up_before_it_is_on_record(had: Mode) -> None:
    """Nobody is left with the new lock; the old one is known of and on record alike.  So if they are the same."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.FLOCK, Lock(ME, had))
        waiting = nodes.ask(Kind.FLOCK, Lock(ME, EXCLUSIVE))
        assert waiting is not None
        nodes.here.give_up(waiting)
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.on_record(Kind.FLOCK, ME) == [(0, OFFSET_MAX, had)]
        assert nodes.here.told(NAME, Kind.FLOCK, ME) == [Lock(ME, had)]

    play(scenario)


@pytest.mark.parametrize("ends", ["given up", "refused", "granted"])
def test_a_conversion_that_waits(ends: str) -> None:
    """flock(2): what was to be converted is lost as soon as the other lock cannot be had at once."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.FLOCK, Lock(FAR, SHARED), 5)
        await nodes.lock(Kind.FLOCK, Lock(ME, SHARED))
        wanted = Lock(ME, EXCLUSIVE)
        waiting = nodes.here.acquire(NAME, Kind.FLOCK, wanted, 1, may_wait=ends != "refused", file=1)
        assert waiting is not None
        await trio.sleep(SETTLED_SECONDS)
        assert not nodes.on_record(Kind.FLOCK, ME) and not nodes.here.told(NAME, Kind.FLOCK, ME)
        if ends == "given up":
            nodes.here.give_up(waiting)
        nodes.there.release(NAME, Kind.FLOCK, FAR)
        await trio.sleep(SETTLED_SECONDS)
        assert waiting.held == (ends == "granted")
        assert nodes.here.told(NAME, Kind.FLOCK, ME) == ([wanted] if waiting.held else [])
        assert len(nodes.on_record(Kind.FLOCK, ME)) == waiting.held
        assert (1 in nodes.here.lose()) == waiting.held  # what is fenced

    play(scenario)


def test_who_converts_is_not_fenced_by_the_break_that_gives_him_his_lock() -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.FLOCK, Lock(FAR, SHARED), 5)
        await nodes.lock(Kind.FLOCK, Lock(ME, SHARED))
        waiting = nodes.ask(Kind.FLOCK, Lock(ME, EXCLUSIVE))
        assert waiting is not None
        await trio.sleep(SETTLED_SECONDS)
        nodes.here._names.submit(NAME, Break(frozenset({FAR})))
        await waiting.settled.wait()
        assert waiting.held and not nodes.fenced

    play(scenario)


def test_a_part_of_what_is_given_up_is_left_by_an_unlock() -> None:
    """Granted on record, and not told of: a thread unlocks the rest, and a signal comes to the one that waits."""

    async def scenario(nodes: Nodes) -> None:
        wanted = Lock(ME, EXCLUSIVE, 0, 9)
        await nodes.lock(Kind.RECORD, Lock(FAR, EXCLUSIVE, 0, 9), 5)
        waiting = nodes.ask(Kind.RECORD, wanted)
        assert waiting is not None
        await trio.sleep(SETTLED_SECONDS)
        nodes.there.release(NAME, Kind.RECORD, FAR)
        await nodes.is_granted(Kind.RECORD, wanted)
        unlocking = nodes.here.unlock_records(ME, 1, 5, 9)
        nodes.here.give_up(waiting)
        await unlocking[0].wait()
        await trio.sleep(SETTLED_SECONDS)
        assert not nodes.on_record(Kind.RECORD, ME)

    play(scenario)


@pytest.mark.parametrize("taken", [False, True])
def test_a_weaker_and_wider_lock_is_given_up_as_it_is_granted(taken: bool) -> None:
    """The exclusive one is exclusive again, if nobody has come into its place since the process asked to weaken it."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
        reader = nodes.ask(Kind.RECORD, Lock(READER, SHARED, 0, 9), 6) if taken else None
        nodes.here.give_up(await nodes.granted_behind_another(Lock(ME, SHARED, 0, 59)))
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.on_record(Kind.RECORD, ME) == [(0, 9, SHARED if taken else EXCLUSIVE)]
        assert reader is None or reader.held

    play(scenario)


def test_who_waits_is_not_told_while_his_unlock_is_on_its_way() -> None:
    """It is asked for while the swap is under way that gives him the lock; and he gets it again after it."""

    async def scenario(nodes: Nodes) -> None:
        wanted = Lock(ME, EXCLUSIVE, 20, 29)
        await nodes.lock(Kind.RECORD, Lock(NEIGHBOUR, EXCLUSIVE, 20, 29), 5)
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
        waiting = nodes.ask(Kind.RECORD, wanted, 2)
        assert waiting is not None
        await trio.sleep(SETTLED_SECONDS)
        backend = nodes.here._names._backend
        swap, begun, goes_on = backend.swap, trio.Event(), trio.Event()

        async def slow(name: str, old: Stored, new: NameRecord) -> Stored | None:
            begun.set()
            await goes_on.wait()
            return await swap(name, old, new)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "swap", slow)
            nodes.here.release(NAME, Kind.RECORD, NEIGHBOUR)
            await begun.wait()
            unlocking = nodes.here.unlock_records(ME, 1, 0, OFFSET_MAX)
            goes_on.set()
            await unlocking[0].wait()
        await waiting.settled.wait()
        await trio.sleep(SETTLED_SECONDS)
        assert waiting.held and nodes.here.told(NAME, Kind.RECORD, ME) == [wanted]
        assert nodes.on_record(Kind.RECORD, ME) == [(20, 29, EXCLUSIVE)]

    play(scenario)


@pytest.mark.parametrize("closes", [False, True])
def test_what_is_granted_to_who_has_unlocked_meanwhile_is_asked_for_again(closes: bool) -> None:
    """A thread waits for a range; another unlocks all, or closes, and that comes to the record after the grant."""

    async def scenario(nodes: Nodes) -> None:
        wanted = Lock(ME, EXCLUSIVE, 20, 29)
        await nodes.lock(Kind.RECORD, Lock(FAR, EXCLUSIVE, 20, 29), 5)
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
        waiting = nodes.ask(Kind.RECORD, wanted, 2)
        assert waiting is not None
        await trio.sleep(SETTLED_SECONDS)
        nodes.there.release(NAME, Kind.RECORD, FAR)
        await nodes.is_granted(Kind.RECORD, wanted)
        if closes:
            estate = nodes.here.hand_over(ME, 1, 1)
            assert estate is not None
            await estate.recorded[0].wait()
            nodes.here.let_go(estate, 1)
        else:
            await nodes.here.unlock_records(ME, 1, 0, OFFSET_MAX)[0].wait()
        await waiting.settled.wait()
        await trio.sleep(SETTLED_SECONDS)
        assert waiting.held and nodes.here.told(NAME, Kind.RECORD, ME) == [wanted]
        assert nodes.on_record(Kind.RECORD, ME) == [(20, 29, EXCLUSIVE)]

    play(scenario)


def test_what_is_handed_over_while_an_operator_breaks_another_lock_is_not_broken() -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9), 1)
        await nodes.lock(Kind.RECORD, Lock(NEIGHBOUR, EXCLUSIVE, 20, 29), 2)
        await trio.sleep(SETTLED_SECONDS)
        done = nodes.there._names.submit(NAME, Break(frozenset({NEIGHBOUR})))
        await trio.lowlevel.checkpoint()
        await until(lambda: bool(nodes.record.broken))
        estate = nodes.here.hand_over(ME, 1, 1)  # this node has not heard of it
        assert estate is not None
        await estate.recorded[0].wait()
        await done.wait()
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.fenced == {2}
        assert nodes.on_record(Kind.RECORD, estate.heir) == [(0, 9, EXCLUSIVE)]

    play(scenario)


def test_what_is_handed_over_before_a_wider_lock_is_taken_back_stays_held() -> None:
    """The owner has nothing more, as far as it knows, and its heir nothing yet, as far as the record goes."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
        nodes.here.give_up(await nodes.granted_behind_another(Lock(ME, EXCLUSIVE, 0, 59), 2))
        estate = nodes.here.hand_over(ME, 1, 1)
        assert estate is not None
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.record.has(Kind.RECORD, Lock(estate.heir, EXCLUSIVE, 0, 9))
        assert not nodes.on_record(Kind.RECORD, ME)
        nodes.here.let_go(estate, 1)
        await trio.sleep(SETTLED_SECONDS)
        assert not nodes.on_record(Kind.RECORD, estate.heir)

    play(scenario)


def test_what_was_granted_right_before_an_operator_breaks_it_is_not_had() -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
        again = nodes.ask(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9), 2)
        assert again is not None
        await nodes.here._names.submit(NAME, Break(frozenset({ME}))).wait()
        await trio.sleep(SETTLED_SECONDS)
        assert again.held and nodes.fenced == {1, 2}
        assert not nodes.on_record(Kind.RECORD, ME) and not nodes.here.told(NAME, Kind.RECORD, ME)

    play(scenario)


def test_who_has_it_in_parts_since_another_was_broken_is_not_fenced() -> None:
    """It asks for an exclusive lock within, and gives up; there is no answer, but both are on record."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(ME, SHARED, 0, 9))
        had = NameLocks()
        had[Kind.RECORD].held = [Lock(ME, SHARED, 0, 2), Lock(ME, EXCLUSIVE, 3, 6), Lock(ME, SHARED, 7, 9)]
        nodes.here.broken(NAME, had)
        assert 1 not in nodes.fenced and nodes.here.told(NAME, Kind.RECORD, ME) == [Lock(ME, SHARED, 0, 9)]
        had[Kind.RECORD].held.pop()
        nodes.here.broken(NAME, had)
        assert 1 in nodes.fenced and nodes.here.told(NAME, Kind.RECORD, ME) == [Lock(ME, SHARED, 0, 6)]

    play(scenario)


@pytest.mark.parametrize("may_wait", [False, True])
def test_what_was_granted_without_an_answer_is_not_left_in_part(may_wait: bool) -> None:
    """A narrower request was given up, and what it got is taken back; by then another waits for a part of that."""

    async def scenario(nodes: Nodes) -> None:
        mine, theirs = Lock(ME, SHARED, 0, 7), Lock(FAR, EXCLUSIVE, 3, 3)
        backend = nodes.here._names._backend
        swap = backend.swap

        async def lost(name: str, old: Stored, new: NameRecord) -> Stored | None:
            stored = await swap(name, old, new)
            if nodes.record.has(Kind.RECORD, mine):
                patch.undo()
                nodes.ask(Kind.RECORD, theirs, 5)
                await trio.sleep(SETTLED_SECONDS)
                raise BackendError("no answer")
            return stored

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "swap", lost)
            narrower = nodes.ask(Kind.RECORD, Lock(ME, SHARED, 3, 7))
            assert narrower is not None
            nodes.here.give_up(narrower)
            waiting = nodes.here.acquire(NAME, Kind.RECORD, mine, 1, may_wait=may_wait, file=1)
            assert waiting is not None
            await trio.sleep(2 * SETTLED_SECONDS)
        assert nodes.record.has(Kind.RECORD, theirs)
        assert waiting.settled.is_set() != may_wait and not waiting.held
        assert not nodes.on_record(Kind.RECORD, ME)
        nodes.there.release(NAME, Kind.RECORD, FAR)
        await trio.sleep(SETTLED_SECONDS)
        assert waiting.held == may_wait and len(nodes.on_record(Kind.RECORD, ME)) == may_wait

    play(scenario)


def test_a_swap_that_arrives_late_asks_for_nothing_that_is_given_up() -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(FAR, EXCLUSIVE, 0, 9), 5)
        await trio.sleep(SETTLED_SECONDS)
        backend = nodes.here._names._backend
        late = list[tuple[str, Stored, NameRecord]]()

        async def slow(name: str, old: Stored, new: NameRecord) -> Stored | None:
            late.append((name, old, new))
            patch.undo()
            raise BackendError("no answer in time")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "swap", slow)
            waiting = nodes.ask(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
            assert waiting is not None
            await until(lambda: bool(late))
            nodes.here.give_up(waiting)
            await trio.sleep(SETTLED_SECONDS)
        assert await backend.swap(*late[0]) is None
        assert not nodes.record.locks[Kind.RECORD].waiting

    play(scenario)


def test_who_holds_and_tries_for_more_changes_nothing_on_record() -> None:
    """As SQLite does, which holds a shared lock and tries for an exclusive one."""

    async def scenario(nodes: Nodes) -> None:
        for owner, handle in ((ME, 1), (FAR, 5)):
            await nodes.lock(Kind.RECORD, Lock(owner, SHARED, 0, 9), handle)
        await trio.sleep(SETTLED_SECONDS)
        version = nodes.cluster.records[NAME].version
        for locks, owner, handle in [(nodes.here, ME, 1), (nodes.there, FAR, 5)] * 3:
            wanted = Lock(owner, EXCLUSIVE, 0, 9)
            waiting = locks.acquire(NAME, Kind.RECORD, wanted, handle, may_wait=False, file=1)
            assert waiting is not None
            await waiting.settled.wait()
            assert not waiting.held
            await trio.sleep(SETTLED_SECONDS)
        assert nodes.cluster.records[NAME].version == version

    play(scenario)


def test_a_name_that_is_taken_late_is_taken_with_all_that_was_on_record() -> None:
    """It was asked for since another node is gone, and there was no answer; the next try did not know that it is."""

    async def scenario(nodes: Nodes) -> None:
        mine, more = Lock(ME, EXCLUSIVE, 0, 9), Lock(ME, EXCLUSIVE, 20, 29)
        await nodes.lock(Kind.RECORD, mine)
        await trio.sleep(SETTLED_SECONDS)
        backend = nodes.here._names._backend
        swap, gone = backend.swap, backend.gone
        late = list[tuple[str, Stored, NameRecord]]()

        async def slow(name: str, old: Stored, new: NameRecord) -> Stored | None:
            if new.delegate and not late:
                late.append((name, old, new))
                raise BackendError("no answer in time")
            if late:
                patch.undo()
                assert await swap(*late.pop()) is not None
            return await swap(name, old, new)

        async def has_ended(nodes_asked: Iterable[str]) -> set[str]:
            found = await gone(nodes_asked)
            if found:
                nodes.ask(Kind.RECORD, more, 2)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "swap", slow)
            patch.setattr(backend, "gone", has_ended)
            nodes.cluster.ended.add("there")
            nodes.ask(Kind.RECORD, Lock(NEIGHBOUR, EXCLUSIVE, 40, 49), 3)
            await trio.sleep(SETTLED_SECONDS)
        assert nodes.record.delegate == "here" and not late
        with pytest.raises(BlockingIOError):
            nodes.here.acquire(NAME, Kind.RECORD, Lock(NEIGHBOUR, EXCLUSIVE, 0, 9), 3, may_wait=False, file=1)
        assert nodes.here.told(NAME, Kind.RECORD, ME) == [mine, more]

    play(scenario)


def test_an_operator_whose_node_loses_its_lease_is_not_told_that_something_is_broken() -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.lock(Kind.RECORD, Lock(FAR, EXCLUSIVE, 0, 9), 5)
        await trio.sleep(SETTLED_SECONDS)
        names = nodes.here._names
        submit = names.submit

        def lost(key: str, step: Step) -> trio.Event:
            done = submit(key, step)
            nodes.cluster.ended.add("here")
            names.lose()
            return done

        names.submit = lost  # type: ignore[method-assign]
        with pytest.raises(BackendError, match="lost its lease"):
            await nodes.here.break_locks(NAME)
        await trio.sleep(SETTLED_SECONDS)
        assert nodes.on_record(Kind.RECORD, FAR) == [(0, 9, EXCLUSIVE)]

    play(scenario)


def test_what_is_granted_as_another_is_trimmed_is_not_trimmed_itself() -> None:
    """In memory: a lock that nobody wants is taken back, and who waited for it is told at once that he has it."""

    async def scenario(nodes: Nodes) -> None:
        names, wanted = nodes.here._names, Lock(NEIGHBOUR, EXCLUSIVE, 0, 4)
        nodes.there.release(NAME, Kind.RECORD, Owner("there", 94))
        await trio.sleep(SETTLED_SECONDS)
        await nodes.lock(Kind.RECORD, Lock(ME, EXCLUSIVE, 0, 9))
        waiting = nodes.ask(Kind.RECORD, wanted, 2)
        name = names._names[NAME]
        assert waiting is not None and name.mine is not None
        nodes.here.cut(NAME, Kind.RECORD, ME, NameLocks())  # it has never been told
        for owner in (ME, NEIGHBOUR):
            name.unwanted.append(Acquire(Kind.RECORD, Wait(1000, Lock(owner, EXCLUSIVE, 0, 9)), may_wait=True))
        names._work_locally(name, name.mine)
        assert waiting.held and nodes.here.told(NAME, Kind.RECORD, NEIGHBOUR) == [wanted]
        assert [lock for lock in name.mine[Kind.RECORD].held if lock.overlaps(0, 9)] == [wanted]

    play(scenario)
