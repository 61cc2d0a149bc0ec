"""The shared record of one name's locks, and everything that a node may make of it.

Decides; does no I/O.  A record is replaced as a whole, by compare-and-swap, so each of these functions is one step of
the protocol, and `tests/model` goes through all orders of such steps.

A record is in one of three states:

- *nobody's*: there is none.  Whoever needs the name first makes it his.
- *delegated*: one node serves the name from its own memory, without a message for each lock.  What it holds is not on
  record.  Others put themselves into `wanted` and wait until it gives the name back.
- *shared*: the locks of all nodes are on record, waiting requests too, and every lock or unlock of any node is a step
  on it.  So whoever unlocks also decides who is next, and that one sees it.  Nodes that wanted the name stay in
  `wanted` until their first step.

A node that is the only one on a shared record takes the name over again with its next step.

Where an operator breaks locks of other nodes, these are in `broken` until they have seen it: what is still written
through such files fails, as under a lost lease.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from safefs.locktable import Kind, Lock, NameLocks, Owner, Wait, of_type

FORMAT = 2
MOST_NEXT = 8  # nodes of which is found out at once whether they are gone


@dataclass(frozen=True)
class Acquire:
    """Ask for a lock; who may not wait is refused at once where it cannot be had."""

    kind: Kind
    wait: Wait
    may_wait: bool


@dataclass(frozen=True)
class Release:
    """Unlock a range."""

    kind: Kind
    owner: Owner
    first: int
    last: int


@dataclass(frozen=True)
class HandOver:
    """What an owner holds is from now on another's, who holds nothing yet; it is not free in between."""

    kind: Kind
    owner: Owner
    heir: Owner


@dataclass(frozen=True)
class Trim:
    """In a range an owner keeps no more than it has been told of: nobody waits any more for what it got besides."""

    kind: Kind
    owner: Owner
    first: int
    last: int
    told: tuple[Lock, ...]


@dataclass(frozen=True)
class GiveUp:
    """A waiting request is withdrawn; too late where it has its lock by then (`Trim`)."""

    kind: Kind
    wait: Wait


@dataclass(frozen=True)
class LetPass:
    """A waiting request need not wait for those that came before it and hold nothing."""

    kind: Kind
    wait: Wait


@dataclass(frozen=True)
class Break:
    """What these hold on the name is taken from them, by an operator who has seen that they hold it."""

    owners: frozenset[Owner]


class ForeignRecordError(ValueError):
    """Another version of safefs has written a record: it is not for this one to replace."""


Step = Acquire | Release | HandOver | Trim | GiveUp | LetPass | Break


def carry_out(locks: NameLocks, step: Step) -> tuple[bool, list[Wait]]:
    """Change the locks of a name: whether it did what was asked for, and which waiting requests got their locks."""
    if isinstance(step, Break):
        tables = [table for table in locks.tables.values() if table.held]
        return bool(tables), [wait for table in tables for wait in table.break_held(step.owners)]
    table = locks[step.kind]
    if isinstance(step, Acquire):
        return table.request(step.wait) if step.may_wait else table.attempt(step.wait)
    if isinstance(step, Release):
        return True, table.release(step.owner, step.first, step.last)
    if isinstance(step, HandOver):
        table.hand_over(step.owner, step.heir)
        return True, []
    if isinstance(step, Trim):
        return True, table.trim(step.owner, step.first, step.last, step.told)
    node, ticket = step.wait.lock.owner.node, step.wait.ticket
    was_waiting = table.waits(node, ticket)
    return was_waiting, table.cancel(node, ticket) if isinstance(step, GiveUp) else table.let_pass(node, ticket)


def _except(nodes: tuple[str, ...], gone: set[str]) -> tuple[str, ...]:
    return tuple(node for node in nodes if node not in gone)


def _nodes_from(values: object) -> tuple[str, ...]:
    return tuple(of_type(str, node) for node in of_type(list, values))


@dataclass(frozen=True)
class NameRecord:
    """What is on record of one name."""

    delegate: str = ""  # the node that serves the name; empty: `locks` are all there are
    wanted: tuple[str, ...] = ()  # nodes that wait for it to be given back, or have not come since it was
    locks: NameLocks = field(default_factory=NameLocks)
    broken: tuple[str, ...] = ()  # nodes that held what an operator has broken, and have not seen it yet

    def __bool__(self) -> bool:
        return bool(self.delegate or self.wanted or self.locks or self.broken)

    def nodes(self) -> set[str]:
        """All nodes that are named."""
        return {node for node in (self.delegate, *self.wanted, *self.locks.nodes(), *self.broken) if node}

    def in_the_way(self, node: str) -> set[str]:
        """The nodes that one that waits has to look after: were one of these gone it could wait for ever.

        Of those who wait before it, the next are enough: as those get their turns, others are.  Not the first alone: to
        find out that a node is gone takes its lease or more, which nodes that end together would cost one by one.
        """
        found = {self.delegate, *self.broken}
        for table in self.locks.tables.values():
            found.update(held.owner.node for held in table.held)
            for at, wait in enumerate(table.waiting):
                if wait.lock.owner.node == node:
                    before = [other.lock for other in table.waiting[:at] if other.lock.conflicts(wait.lock)]
                    found.update(list(dict.fromkeys(lock.owner.node for lock in before))[:MOST_NEXT])
        return found - {"", node}

    # -------------------------------------------------------------- steps

    def may_take(self, node: str) -> bool:
        """Whether nobody else has to do with the name."""
        return not self.nodes() - {node}

    def taken(self, node: str) -> NameRecord:
        """The name is the node's; the locks that were on record are now in its memory."""
        assert self.may_take(node)
        return NameRecord(delegate=node)

    def want(self, node: str) -> NameRecord:
        """The node waits for the name to be given back."""
        assert self.delegate not in ("", node)
        return replace(self, wanted=tuple(dict.fromkeys((*self.wanted, node))))

    def given_back(self, node: str, locks: NameLocks) -> NameRecord:
        """The delegate puts on record what it has in memory.

        Those who wanted the name stay named until they have come: the delegate, which may need the name again at once,
        would take it back before they see that it is free.
        """
        assert self.delegate == node
        return NameRecord(wanted=self.wanted, locks=locks)

    def stepped(self, node: str, locks: NameLocks) -> NameRecord:
        """The node has worked on the locks on record."""
        assert not self.delegate
        return replace(self, wanted=_except(self.wanted, {node}), locks=locks)

    def broke(self, nodes: Iterable[str]) -> NameRecord:
        """An operator has broken what these nodes held: the name is shared until they have seen it."""
        assert not self.delegate
        return replace(self, broken=tuple(dict.fromkeys((*self.broken, *sorted(nodes)))))

    def heeded(self, node: str) -> NameRecord:
        """The node has seen that what it held is broken."""
        return replace(self, broken=_except(self.broken, {node}))

    def without(self, gone: Iterable[str]) -> NameRecord:
        """Nodes have lost their leases, and with them all that they had."""
        nodes = set(gone)
        locks = self.locks.copy()
        for node in nodes:
            for table in locks.tables.values():
                table.forget(node)
        delegate = "" if self.delegate in nodes else self.delegate
        return NameRecord(delegate, _except(self.wanted, nodes), locks, _except(self.broken, nodes))

    def waits(self, node: str, kind: Kind, ticket: int) -> bool:
        """Whether a request is still in the queue."""
        table = self.locks.tables.get(kind)
        return table is not None and table.waits(node, ticket)

    def has(self, kind: Kind, lock: Lock) -> bool:
        """Whether a lock is held as a whole."""
        table = self.locks.tables.get(kind)
        return table is not None and table.has(lock)

    def turns_before(self, node: str, kind: Kind) -> int:
        """How many requests have to get their locks before the first of the node's can."""
        before: list[Lock] = []
        for wait in self.locks.tables[kind].waiting if kind in self.locks.tables else []:
            if wait.lock.owner.node == node:
                return sum(lock.conflicts(wait.lock) for lock in before)
            before.append(wait.lock)
        return 0

    # -------------------------------------------------------------- format

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "delegate": self.delegate,
            "wanted": list(self.wanted),
            "locks": self.locks.to_record(),
            "broken": list(self.broken),
        }

    @classmethod
    def from_json(cls, data: Any) -> NameRecord:
        """ValueError where it is none, and ForeignRecordError for one that another version of safefs has written."""
        if not isinstance(data, dict) or "format" not in data:
            raise ValueError(f"no lock record: {data!r:.100}")
        if data["format"] != FORMAT:
            raise ForeignRecordError(f"a lock record of format {data['format']!r}: another version of safefs wrote it")
        try:
            locks = NameLocks.from_record(data["locks"])
            delegate, wanted = of_type(str, data["delegate"]), _nodes_from(data["wanted"])
            record = cls(delegate, wanted, locks, _nodes_from(data["broken"]))
            record._require_sound()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"no lock record: {error!r}") from None
        return record

    def _require_sound(self) -> None:
        """ValueError for what no step makes: what comes after each relies on it."""
        if self.delegate and (self.locks or self.broken):
            raise ValueError("a name is delegated, and has locks on record")
        for node in self.nodes():
            node.encode()  # UnicodeEncodeError is a ValueError: a backend could not ask for a node of that name
