"""Every order of events between two nodes that share a lock: the protocol of safefs.cluster.names, searched through.

The very code runs that daemons run; only its calls to the backend wait at a gate.  Whenever nothing else can happen,
the search decides which call goes on, and whether it is carried out, fails, or is carried out and its answer lost; or
that a node stops for ever, or sleeps until its lease is over.  Then it starts again with the next decision, until all
sequences of decisions have been tried.  `SAFEFS_SEARCH_FAULTS` allows that many faults in one run (1: some minutes).

Asked of every run: never do two nodes with live leases hold the lock, and every request of a node that lives is
answered in the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from safefs.cluster.backend import BackendError, Stored
from safefs.cluster.memory import MemoryBackend, MemoryCluster
from safefs.cluster.record import NameRecord
from safefs.locktable import Mode
from tests.unit.test_names import Node

FAULTS = int(os.environ.get("SAFEFS_SEARCH_FAULTS", "0"))
MAX_RUNS = int(os.environ.get("SAFEFS_SEARCH_RUNS", "2000000"))
MAX_DECISIONS = 400
KEY = "name"


class Choices:
    """The decisions of one run: those that are given, then always the first possibility."""

    def __init__(self, given: list[int]) -> None:
        self._given = given
        self.made: list[tuple[int, int]] = []  # (decision, how many there were)

    def choose(self, count: int) -> int:
        at = len(self.made)
        decision = self._given[at] if at < len(self._given) else 0
        self.made.append((decision, count))
        return decision

    def next(self) -> list[int] | None:
        """The decisions of the next run; None when all have been tried."""
        made = list(self.made)
        while made:
            decision, count = made.pop()
            if decision + 1 < count:
                return [each for each, _ in made] + [decision + 1]
        return None


@dataclass(eq=False)
class Call:
    """A call that waits at the gate."""

    node: str
    changes: bool
    outcome: str = ""
    goes_on: trio.Event = field(default_factory=trio.Event)


class Gated(MemoryBackend):
    """A backend whose calls wait until the search lets them go."""

    def __init__(self, cluster: MemoryCluster, node: str, waiting: list[Call]) -> None:
        super().__init__(cluster, node)
        self._waiting = waiting

    async def _pass(self, *, changes: bool) -> str:
        call = Call(self.node, changes)
        self._waiting.append(call)
        await call.goes_on.wait()
        if call.outcome == "fail":
            raise BackendError("the call fails")
        return call.outcome

    async def read(self, name: str) -> Stored:
        await self._pass(changes=False)
        return await super().read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        outcome = await self._pass(changes=True)
        stored = await super().swap(name, old, new)
        if outcome == "lost":
            raise BackendError("the answer is lost")
        return stored

    async def notify(self, node: str, name: str) -> None:
        if await self._pass(changes=True) != "lost":
            await super().notify(node, name)


@dataclass
class Search:
    """One run."""

    choices: Choices
    faults: int
    cluster: MemoryCluster = field(default_factory=MemoryCluster)
    waiting: list[Call] = field(default_factory=list)
    inside: dict[str, Mode] = field(default_factory=dict)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    asleep: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)

    def lives(self, node: str) -> bool:
        return node not in self.cluster.ended

    async def task(self, node: Node, mode: Mode) -> None:
        """What a client does: lock, work, unlock."""
        assert await node.acquire(KEY, 1, mode)
        self.inside[node.name] = mode
        self.check()
        await self.step(node.name)
        self.check()
        self.inside.pop(node.name, None)
        await node.release(KEY, 1)
        self.finished.add(node.name)

    async def step(self, node: str) -> None:
        call = Call(node, changes=False, outcome="work")
        self.waiting.append(call)
        await call.goes_on.wait()

    def check(self) -> None:
        held = [mode for node, mode in self.inside.items() if self.lives(node)]
        assert len(held) < 2 or set(held) == {Mode.SHARED}, f"{self.inside} hold it"

    def possibilities(self) -> Iterator[Callable[[], None]]:
        """All that can happen next."""
        for call in self.waiting:
            if call.node not in self.asleep:
                yield lambda call=call: self.let_go(call, call.outcome or "go")
        if self.faults:
            for call in self.waiting:
                if call.node not in self.asleep and call.outcome != "work":
                    yield lambda call=call: self.fault(lambda: self.let_go(call, "fail"))
                    if call.changes:
                        yield lambda call=call: self.fault(lambda: self.let_go(call, "lost"))
            for node in self.scopes:
                if node not in self.asleep | self.finished:
                    yield lambda node=node: self.fault(lambda: self.sleep(node))

    def let_go(self, call: Call, outcome: str) -> None:
        self.waiting.remove(call)
        call.outcome = outcome
        call.goes_on.set()

    def fault(self, what: Callable[[], None]) -> None:
        self.faults -= 1
        what()

    def sleep(self, node: str) -> None:
        """The node stops, and its calls with it; its lease will end."""
        self.asleep.add(node)

    async def go(self, modes: list[Mode]) -> None:
        nodes = [Node(f"n{number}", Gated(self.cluster, f"n{number}", self.waiting)) for number in range(len(modes))]
        async with trio.open_nursery() as nursery:
            for node, mode in zip(nodes, modes, strict=True):
                self.scopes[node.name] = trio.CancelScope()
                nursery.start_soon(self.live, node, mode)
            await self.decide()
            nursery.cancel_scope.cancel()

    async def live(self, node: Node, mode: Mode) -> None:
        with self.scopes[node.name]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.names.run)
                await self.task(node, mode)

    async def decide(self) -> None:
        while {*self.scopes} - self.finished - self.asleep:
            await trio.testing.wait_all_tasks_blocked()
            possible = list(self.possibilities())
            if possible:
                assert len(self.choices.made) < MAX_DECISIONS, "somebody waits for ever"
                possible[self.choices.choose(len(possible))]()
            else:  # time passes: for those who look again, and for the leases of those who sleep
                self.cluster.ended |= self.asleep
                assert trio.current_time() < 1000, f"{self.finished} have had the lock, the others wait for ever"
                await trio.sleep(1)


def search(modes: list[Mode], faults: int) -> int:
    """Try everything; how many runs that took."""
    given: list[int] | None = []
    for runs in range(MAX_RUNS):
        trio._core._run._r.seed(0)  # trio would run tasks in another order each time
        choices = Choices(given)
        current = Search(choices, faults)
        try:
            trio.run(current.go, modes, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseException as error:
            raise AssertionError(f"decisions: {[decision for decision, _ in choices.made]}") from error
        given = choices.next()
        if given is None:
            return runs + 1
    return MAX_RUNS


@pytest.mark.parametrize("modes", [[Mode.EXCLUSIVE] * 2, [Mode.SHARED, Mode.EXCLUSIVE]], ids=["writers", "reader"])
def test_all_orders(modes: list[Mode], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    assert search(modes, FAULTS) > 50
