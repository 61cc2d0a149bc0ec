"""What a node knows of one name, and has to do for it: what safefs/cluster/names.py works on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import trio

from safefs.cluster.backend import Follower, Stored, UnreadableError
from safefs.cluster.record import Acquire, HandOver, LetPass, Release, Step
from safefs.locktable import Kind, NameLocks, Owner


@dataclass(eq=False)
class Pending:
    """A step on its way; `done` once it is on record."""

    step: Step
    found: NameLocks | None = None  # the locks then, for who only looks
    clears: bool = False  # a record that is damaged
    cleared: bool = False  # there was one, and another is in its place
    refused: UnreadableError | None = None  # it is not damaged, and nobody's to clear
    tried: bool = False
    repeated: bool = False  # it was tried before, which may have been carried out without an answer
    done: trio.Event = field(default_factory=trio.Event)

    def try_again(self) -> None:
        self.repeated, self.tried = self.tried, True

    def settle(self, locks: NameLocks) -> None:
        if isinstance(self.step, LetPass):
            self.found = locks.copy()
        self.done.set()


def ends_locks(step: Step, kind: Kind, owner: Owner) -> bool:
    """Whether by this step an owner has less: as far as it knows, since it asked for that."""
    return isinstance(step, Release | HandOver) and (step.kind, step.owner) == (kind, owner)


def is_refused(step: Step, done: bool) -> bool:
    """Whether a request that may not wait is not had."""
    return isinstance(step, Acquire) and not step.may_wait and not done


def queued_in(locks: NameLocks) -> dict[int, Acquire]:
    """All requests in the queues, by ticket."""
    tables = locks.tables.items()
    return {wait.ticket: Acquire(kind, wait, may_wait=True) for kind, table in tables for wait in table.waiting}


@dataclass(eq=False)
class Name:
    """One name, as this node sees it."""

    key: str
    mine: NameLocks | None = None  # delegated to this node: all its locks
    taking: NameLocks | None = None  # what they will be once a record that delegates the name to this node is there
    leaving: NameLocks | None = None  # what is to be on record once the name is shared
    stored: Stored | None = None  # as last read, written or told; None: has to be read
    replaced: Stored | None = None  # a record that a swap has found replaced
    under_way: Stored | None = None  # a record that a swap may still replace of which there is no answer
    substitute: Stored | None = None  # what an operator puts into the place of a record that is damaged
    follower: Follower | None = None
    asked: bool = False  # somebody else wants the name of this node
    gone: set[str] = field(default_factory=set)  # nodes that have lost their leases
    telling: bool = False  # other nodes, that what they held is broken, until they have seen it,
    tells_again: float = -math.inf  # and when next
    pending: list[Pending] = field(default_factory=list)
    waits: dict[int, Acquire] = field(default_factory=dict)  # requests of ours in the queue, or not told yet, by ticket
    unwanted: list[Acquire] = field(default_factory=list)  # by which more may be on record than their owners know of
    poke: trio.Event = field(default_factory=trio.Event)
    busy: bool = False
    used: float = 0.0
    idle: bool = False  # nobody has used it for long

    lost: bool = False  # with the lease of this node

    def may_be_replaced(self, stored: Stored) -> bool:
        """Whether a swap of this node may still replace a record of which there is no answer."""
        return self.under_way is not None and self.under_way.version == stored.version

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to be changed on record."""
        return bool(self.pending or self.unwanted)

    @property
    def has_work(self) -> bool:
        if self.lost:
            return False
        if self.mine is not None:
            return self.asked or self.has_steps
        if self.idle and self.stored is not None:
            return True
        return self.asked or self.leaving is not None or self.telling or self.has_steps or bool(self.waits or self.gone)
