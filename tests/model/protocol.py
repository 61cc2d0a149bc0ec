"""Nodes that share one name, for a search: what each of them does is done by the code of the daemon itself.

A node here is safefs.cluster.names.Names and safefs.locks.Locks, put together as in safefs.daemon, without an event
loop: every call to the backend stops its coroutine, until the search says what the answer is.  What a node does next
follows from what came to it before, so it is a table: its state (safefs' own objects, as a value) and what comes in
give the next state.  The table is filled on demand, by running the code; all else is looking up.
"""

from __future__ import annotations

import json
import logging
import math
import types
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import trio

from safefs.cluster import names as module
from safefs.cluster.backend import BackendError, LockBackend, ProcessIdentity, Stored
from safefs.cluster.name import Name
from safefs.cluster.names import Names
from safefs.cluster.problems import Problems
from safefs.cluster.record import Break, NameRecord, Step
from safefs.locks import Locks, Waiting
from safefs.locktable import Kind, Lock, Mode, Owner
from tests.model.freeze import freeze
from tests.support.lending import Extension

KEY = "name"
LEASE = 1.0  # so long it lasts; times are told from now, and it ends at once or not yet

Call = tuple[Any, ...]  # what it is, and its arguments
Input = tuple[Any, ...]  # what comes to a node
Version = tuple[int, str]  # of the record, with the record as JSON; 0 when there is none
NO_RECORD = json.dumps(NameRecord().to_json())


@types.coroutine
def ask(*call: Any) -> Generator[Call, Any, Any]:
    """Stop until the search has an answer; it may be an exception."""
    answer = yield call
    if isinstance(answer, Exception):
        raise answer
    return answer


def stored_of(version: Version) -> Stored:
    number, text = version
    return Stored(number, NameRecord.from_json(json.loads(text)))


class Follower:
    """The node's side of a record that it follows (backend.Follower)."""

    async def next_change(self, seen: Stored, seconds: float, _turns: int = 0) -> Stored | None:
        version = await ask("change", seen.version)
        return None if version is None else stored_of(version)

    async def aclose(self) -> None:
        pass


class Backend:
    """The node's side of the records (backend.LockBackend): asks the search."""

    def __init__(self, node: str, tells_changes: bool) -> None:
        self.node = node
        self.tells_changes = tells_changes
        self.lapsed = False

    async def join(self) -> None:
        raise AssertionError("the search joins")

    renew = leave = join

    async def read(self, name: str) -> Stored:
        return stored_of(await ask("read"))

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        version = await ask("swap", old.version, json.dumps(new.to_json()))
        return None if version is None else stored_of(version)

    async def discard(self, name: str, stored: Stored) -> None:
        assert not stored.record

    async def is_current(self, name: str, stored: Stored) -> bool:
        return bool(await ask("current", stored.version))

    def follow(self, name: str) -> Follower:
        return Follower()

    def expect_notices(self) -> None:
        pass

    def rest(self, rests: bool) -> None:
        pass

    async def notify(self, node: str, name: str) -> None:
        await ask("notify", node)

    async def next_notice(self) -> str:
        await ask("notice")
        return KEY

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        return set(await ask("gone", frozenset(nodes)))

    async def tidy_up(self) -> None:
        raise AssertionError("the search has no time")

    async def all_names(self) -> list[str]:
        return [KEY]

    async def some_names(self, most: int) -> list[str]:
        raise AssertionError("the search has no time")

    async def process_of(self, node: str) -> ProcessIdentity:
        return {}

    def lease_ends(self) -> float:
        return 0.0 if self.lapsed else LEASE


class Untold(Problems):
    """Nobody is told what is wrong: nothing that a node does depends on it, and each moment would be another state."""

    def __init__(self) -> None:
        pass

    def note(self, about: str, error: BackendError | str) -> None:
        pass

    def over(self, about: str, *, is_known: bool = False, unless_within: float = 0.0) -> None:
        pass


class SearchedNames(Names):
    """As daemons run it; only that the search decides when a pause is over, and that it looks as often as it may."""

    tells_changes = False

    def __init__(self, backend: LockBackend) -> None:
        super().__init__(backend)
        self.problems = Untold()

    async def _pause(self, name: Name, stored: Stored, seconds: float) -> Stored | None:
        """Without tasks of its own."""
        return await self._follower(name).next_change(stored, seconds)

    def _lingers(self, name: Name) -> bool:
        return False

    async def _gone(self, nodes: set[str]) -> set[str]:
        others = nodes - {self.node}
        return await self._backend.gone(others) if others else set()


class ToldNames(SearchedNames):
    """Where changes are told."""

    tells_changes = True


class LingeringNames(ToldNames):
    """Where a record is followed for as long as there is something on it."""

    def _lingers(self, name: Name) -> bool:
        return True


async def sleep(_seconds: float) -> None:
    """After a failure: for as long as the search says."""
    await ask("sleep")


async def wait(event: trio.Event) -> None:
    """Stands in for `trio.Event.wait`."""
    await ask("event", event)


def boottime() -> float:
    """Times are told from now.  No mock: it would keep a list of its calls, of which there are many."""
    return 0.0


def current_time() -> float:
    """What is done again only after a while is always due: it is done as often as it may."""
    return -math.inf


class Tasks:
    """Runs coroutines as far as they go without an answer; stands in for a nursery."""

    def __init__(self) -> None:
        self._fresh: list[Coroutine[Call, Any, None]] = []
        self.waiting: dict[int, tuple[Coroutine[Call, Any, None], Call]] = {}

    def start_soon(self, function: Callable[..., Coroutine[Call, Any, None]], *arguments: Any) -> None:
        self._fresh.append(function(*arguments))

    def answer(self, number: int, answer: object) -> None:
        self._go(self.waiting.pop(number)[0], number, answer)

    def settle(self) -> None:
        while True:
            if self._fresh:
                number = next(number for number in range(100) if number not in self.waiting)
                self._go(self._fresh.pop(0), number, None)
            elif (number := self._with_its_event()) is not None:
                self.answer(number, None)
            else:
                return

    def _with_its_event(self) -> int | None:
        return next((at for at, (_, call) in self.waiting.items() if call[0] == "event" and call[1].is_set()), None)

    def _go(self, coroutine: Coroutine[Call, Any, None], number: int, answer: object) -> None:
        with suppress(StopIteration):
            self.waiting[number] = coroutine, coroutine.send(answer)

    def close(self) -> None:
        for coroutine, _ in self.waiting.values():
            coroutine.close()


@dataclass
class Client:
    """A process that wants the lock: it asks, and closes its file when it has it; `G` waits, and may give up.

    `R` locks and unlocks again and again before that.  On its node, locks are lent: the extension answers everybody as
    often as it likes.  `B` is an operator, who breaks what others hold, once.
    """

    mode: Mode
    may_wait: bool = True
    may_give_up: bool = False
    turns: int = 1  # of its requests so many come to Python
    is_operator: bool = False
    # asking, asking-again for what it has, holding, unlocking, free, and in the end done, refused, gave-up or fenced
    phase: str = "idle"
    waiting: Waiting | None = None
    unlocking: trio.Event | None = None


CLIENTS = {
    "X": Client(Mode.EXCLUSIVE),
    "S": Client(Mode.SHARED),
    "T": Client(Mode.EXCLUSIVE, may_wait=False),
    "G": Client(Mode.EXCLUSIVE, may_give_up=True),
    "R": Client(Mode.EXCLUSIVE, turns=2),
    "B": Client(Mode.EXCLUSIVE, is_operator=True),
}


HOLDS = ("holding", "asking-again")


class WatchedLocks(Locks):
    """As daemons have them; `ordered` are those whose locks operators of this node have broken."""

    ordered: frozenset[Owner] = frozenset()

    def _do(self, key: str, step: Step) -> trio.Event | None:
        if isinstance(step, Break):
            self.ordered |= step.owners
        return super()._do(key, step)


class Node:
    """One node, live: what the table is filled with."""

    def __init__(self, name: str, clients: str, names: type[SearchedNames], extension: type[Extension]) -> None:
        self.backend = Backend(name, names.tells_changes)
        self.names = names(self.backend)
        self.extension = extension() if "R" in clients else None
        self.locks = WatchedLocks(self.names, self.extension)
        self.locks.fence = self._broken
        self.names.resolve, self.names.told = self.locks.resolve, self.locks.told
        self.names.cut, self.names.broken = self.locks.cut, self.locks.broken
        self.clients = [replace(CLIENTS[each]) for each in clients]
        self.joined = True
        self.too_late = False  # somebody got a lock when the lease was over
        self.broken = frozenset[Owner]()  # who was told that his lock is broken
        self.tasks = Tasks()
        self.names._nursery = self.tasks  # type: ignore[assignment]
        self.tasks.start_soon(self.names._heed)
        self.tasks.settle()

    def take(self, what: str, *arguments: Any) -> None:
        """What comes to the node."""
        getattr(self, f"_{what}")(*arguments)
        self.tasks.settle()
        self._answer_clients()

    def _answer_clients(self) -> None:
        for client in self.clients:
            if client.waiting is not None and client.waiting.settled.is_set():
                self._got(client, held=client.waiting.held)
                client.waiting = None
            if client.unlocking is not None and client.unlocking.is_set():
                client.phase, client.unlocking = "free", None

    def _got(self, client: Client, *, held: bool) -> None:
        self.too_late |= held and self.backend.lapsed
        client.phase = "holding" if held else "refused"

    def _asks(self, number: int) -> None:
        client = self.clients[number]
        if client.is_operator:
            client.phase = "breaking"
            self.tasks.start_soon(self._break, client)
            return
        lock = Lock(Owner(self.locks.node, number + 1), client.mode)
        client.phase = "asking-again" if client.phase == "holding" else "asking"
        client.turns -= 1
        try:
            client.waiting = self.locks.acquire(KEY, Kind.FLOCK, lock, number + 1, may_wait=client.may_wait)
        except BlockingIOError:
            self._got(client, held=False)
            return
        if client.waiting is None:
            self._got(client, held=True)
            self.locks.lend(KEY, number + 1, number + 1)

    async def _break(self, operator: Client) -> None:
        with suppress(BackendError):  # he is told that it is not known what is broken, and may try again
            await self.locks.break_locks(KEY)
        operator.phase = "done"

    def _broken(self, handles: set[int]) -> None:
        self._answer_clients()  # who got his lock a moment ago, too
        self.broken |= {Owner(self.locks.node, handle) for handle in handles}
        for handle in handles:
            self._fence(self.clients[handle - 1])

    @staticmethod
    def _fence(client: Client) -> None:
        if client.phase in HOLDS:
            client.phase = "fenced" if client.waiting is None else "asking"

    def _unlocks(self, number: int) -> None:
        client = self.clients[number]
        client.phase = "unlocking"
        client.turns -= 1
        client.unlocking = self.locks.release(KEY, Kind.FLOCK, Owner(self.locks.node, number + 1))
        if client.unlocking is None:
            client.phase = "free"
            self.locks.lend(KEY, number + 1, number + 1)

    def _uses_loan(self, number: int) -> None:
        """The extension answers: what is free is locked, and what is held unlocked."""
        client = self.clients[number]
        wanted = client.mode if client.phase == "free" else None
        assert self.extension is not None
        assert self.extension.use(number + 1, number + 1, wanted, pid=0)
        if wanted is None:
            client.phase = "free"
        else:
            self._got(client, held=True)

    def _closes(self, number: int) -> None:
        self.locks.released(number + 1)
        self.clients[number].phase = "done"

    def _gives_up(self, number: int) -> None:
        client = self.clients[number]
        assert client.waiting is not None
        client.phase = "gave-up"
        self.locks.give_up(client.waiting)
        self.locks.released(number + 1)
        client.waiting = None

    def _answer(self, number: int, answer: object) -> None:
        self.tasks.answer(number, answer)

    def _error(self, number: int) -> None:
        self.tasks.answer(number, BackendError("no answer"))

    def _tidies_up(self) -> None:
        """Nobody has used the name for long (`Names._tidy`)."""
        for name in list(self.names._names.values()):
            self.names._put_away(name)

    def _lapses(self) -> None:
        """The lease is over by the node's own clock, whatever the node does now."""
        self.backend.lapsed = True
        self._loans_end()

    def _loans_end(self) -> None:
        """The lease as it was when they were made; where it was renewed since, it goes on."""
        if self.extension is not None:
            self.extension.later(LEASE)

    def _loses(self) -> None:
        """The keeper has noticed (safefs.daemon, `_on_lost`)."""
        self.joined = False
        self.names.lose()
        fenced = self.locks.lose()
        for number, client in enumerate(self.clients):
            if client.phase in HOLDS:
                assert number + 1 in fenced, "a lock is lost, and its holder is not told"
                self._fence(client)

    def view(self) -> View:
        numbers = range(len(self.clients))
        return View(
            name=self.backend.node,
            lapsed=self.backend.lapsed,
            joined=self.joined,
            phases=tuple(client.phase for client in self.clients),
            calls=tuple(sorted((at, call) for at, (_, call) in self.tasks.waiting.items() if call[0] != "event")),
            poked=any(name.poke.is_set() for name in self.names._names.values()),
            turns=tuple(client.turns for client in self.clients),
            lent=tuple(at for at in numbers if self.extension is not None and self.extension.answers(at + 1, at + 1)),
            too_late=self.too_late,
            ordered=self.locks.ordered,
            broken=self.broken,
        )

    def _joins(self) -> None:
        """The keeper has a new lease (`_on_joined`)."""
        self.backend.node += "'"
        self.backend.lapsed, self.joined = False, True
        self.locks.ask_again()


class View(NamedTuple):
    """What the search sees of a node."""

    name: str
    lapsed: bool
    joined: bool
    phases: tuple[str, ...]
    calls: tuple[tuple[int, Call], ...]
    poked: bool  # something has come that a pause ends with
    turns: tuple[int, ...]  # of each client
    lent: tuple[int, ...]  # clients whom the extension answers
    too_late: bool
    ordered: frozenset[Owner]  # whose locks operators of this node have broken
    broken: frozenset[Owner]  # of this node, who was told that his lock is broken


@contextmanager
def without_an_event_loop() -> Iterator[None]:
    """Within it the code can run that a table is filled with."""
    with (
        mock.patch.object(trio, "sleep", sleep),
        mock.patch.object(trio.Event, "wait", wait),
        mock.patch.object(module, "boottime", boottime),
        mock.patch.object(trio, "current_time", current_time),
    ):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class Table:
    """What a node does: its states are numbers, 0 is the first."""

    def __init__(
        self,
        name: str,
        clients: str,
        names: type[SearchedNames] = SearchedNames,
        extension: type[Extension] = Extension,
    ) -> None:
        self._make = lambda: Node(name, clients, names, extension)
        self.views: list[View] = []
        self._histories: list[tuple[int, Input] | None] = []
        self._numbers: dict[Hashable, int] = {}
        self._next: dict[tuple[int, Input], int] = {}
        self._add(self._make(), None)

    def after(self, number: int, *given: Any) -> int:
        """The state that follows."""
        known = self._next.get((number, given))
        if known is None:
            node = self._again(number)
            node.take(*given)
            known = self._next[number, given] = self._add(node, (number, given))
        return known

    def _again(self, number: int) -> Node:
        """A node in a state that has been found before."""
        came = []
        at = number
        while (step := self._histories[at]) is not None:
            at, given = step
            came.append(given)
        node = self._make()
        for given in reversed(came):
            node.take(*given)
        return node

    def _add(self, node: Node, came: tuple[int, Input] | None) -> int:
        number = self._numbers.setdefault(freeze(node), len(self.views))
        if number == len(self.views):
            self.views.append(node.view())
            self._histories.append(came)
        node.tasks.close()
        return number
