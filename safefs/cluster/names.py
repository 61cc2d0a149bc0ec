"""This node's part in the names of a cluster: which are delegated to it, and its steps on those that are shared.

A name that is delegated to this node is worked on at once, in memory (`local`).  Everything else is a step that is
queued (`submit`); one task for each name takes its steps to the record, as many at a time as there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator

import trio

from safefs.cluster.backend import (
    BackendError,
    DamagedError,
    Follower,
    LeaseLostError,
    LockBackend,
    Stored,
    UnreadableError,
)
from safefs.cluster.name import Name, Pending, ends_locks, is_refused, queued_in
from safefs.cluster.problems import NOTICES, Problems
from safefs.cluster.record import Acquire, Break, GiveUp, HandOver, LetPass, NameRecord, Release, Step, Trim, carry_out
from safefs.cluster.survey import QUESTION, Answers, Survey, survey
from safefs.cluster.sweep import Sweep
from safefs.lease import boottime
from safefs.locktable import Kind, Lock, Mode, NameLocks, Owner, Wait

log = logging.getLogger(__name__)

# How often who waits looks whether the nodes that he waits for are still there, and whether a change was missed.
LOOK_SECONDS = 0.5
FOLLOW_SECONDS = 5.0  # the same for who does not wait, and only wants to know the record when he needs it
LINGER_SECONDS = 1.0  # so long after it was last used a record that others use, too, is followed
MOST_FOLLOWED = 32  # names at once, with those on which somebody waits: these are followed however many there are
MOST_LOST = 1000  # nodes of which it is remembered that they are gone
RETRY_SECONDS = (0.05, 1.0)  # after a failure of the backend, at first and at most
CALM_SECONDS = 10.0  # without a failure, longer than a call takes: then notices only do not come
GIVE_BACK_SECONDS = 2.0  # at the end, for names that are not used any more,
GIVE_BACK_AT_ONCE = 8  # so many at a time
IDLE_SECONDS = 60.0  # a name that nobody has used for so long is given back without being asked for

# Before the locks of a name are looked at: what is kept elsewhere is put into them.
TakeBack = Callable[[str, NameLocks], None]
# This node's owners have of a name no more than what is in these locks: the rest an operator has broken.
Broken = Callable[[str, NameLocks], None]
# An owner of this node has no more of a name than what is in these locks, and knows of no more from now on.
Cut = Callable[[str, Kind, Owner, NameLocks], None]
# What an owner of this node has been told that it has.
Told = Callable[[str, Kind, Owner], Iterable[Lock]]
# Of a ticket: its lock is held (True), or refused; returns whether somebody still wanted to know.
Resolve = Callable[[int, bool], bool]


class Names:
    """The names that this node has to do with."""

    def __init__(self, backend: LockBackend) -> None:
        self._backend = backend
        self._answers = Answers(backend)
        self._sweep = Sweep(backend, lambda key: key in self._names, self._gone, self._hear)
        self.problems = Problems()
        self.resolve: Resolve = lambda _ticket, _held: False
        self.told: Told = lambda _key, _kind, _owner: ()
        self.cut: Cut = lambda _key, _kind, _owner, _locks: None
        self.take_back: TakeBack = lambda _key, _locks: None
        self.broken: Broken = lambda _key, _locks: None
        self._names: dict[str, Name] = {}
        self._on_record: set[str] = set()  # names that are shared, with locks of this node when they were seen last
        self._looked: dict[str, float] = {}  # when it was asked last whether a node is still there
        self._lost: dict[str, None] = {}  # nodes that are known to be gone
        self._followed = 0  # names that are followed, for whatever reason
        self._lost_as = ""  # the last name under which this node has lost its lease
        self._nursery: trio.Nursery | None = None
        self._is_over = False

    # ------------------------------------------------------------ requests

    def local(self, key: str) -> NameLocks | None:
        """The locks of a name that is delegated to this node, to be worked on at once; None when it is not."""
        name = self._names.get(key)
        if name is None or name.mine is None or name.has_steps or not self.lease_holds():
            return None
        name.used, name.idle = boottime(), False
        self._backend.expect_notices()
        return self._mine(name)

    def _mine(self, name: Name) -> NameLocks:
        """The locks of a name that is delegated to this node, with what was lent of them."""
        assert name.mine is not None
        self.take_back(name.key, name.mine)
        return name.mine

    @property
    def node(self) -> str:
        return self._backend.node

    def lease_holds(self) -> bool:
        return boottime() < self.lease_ends()

    def lease_ends(self) -> float:
        return -math.inf if self._is_over else self._backend.lease_ends()

    def _has_lease_to_serve(self) -> bool:
        """False between a lost lease and the next one."""
        return self._backend.node != self._lost_as

    def known(self, key: str) -> NameLocks:
        """What is known of the locks of a name, perhaps not the latest."""
        name = self._names.get(key)
        if name is None:
            return NameLocks()
        if name.mine is not None:
            return self._mine(name)
        return name.leaving or (name.stored.record.locks.copy() if name.stored else NameLocks())

    def submit(self, key: str, step: Step) -> trio.Event:
        """Queue a step; those of one name are carried out in their order.  The event is set once it is on record."""
        return self._queue(key, step).done

    def _queue(self, key: str, step: Step, *, clears: bool = False) -> Pending:
        """Between a lost lease and the next one nothing is queued.

        There is nothing to unlock, and who waits will ask again under the node's new name: what was asked under the old
        one would never be its own.
        """
        pending = Pending(step, clears=clears)
        if not self._has_lease_to_serve():
            pending.done.set()
            return pending
        name = self._names.setdefault(key, Name(key))
        name.used, name.idle = boottime(), False
        name.pending.append(pending)
        self._wake(name)
        return pending

    async def look(self, key: str) -> NameLocks:
        """The locks of a name as they are now; what another node serves from memory is put on record for it.

        Raises BackendError where this node has no lease: then it cannot say.
        """
        return self._found(await self._see(key))

    async def clear(self, key: str) -> NameLocks | None:
        """The same for an operator who is going to break them: a damaged record is taken from everybody.

        None where there was one: nobody can tell what was on it, and what is locked now was locked later.  Raises
        UnreadableError for one that is not damaged, but another version's of safefs.
        """
        pending = await self._see(key, clears=True)
        if pending.refused is not None:
            raise pending.refused
        return None if pending.cleared else self._found(pending)

    async def _see(self, key: str, *, clears: bool = False) -> Pending:
        nobody = Wait(0, Lock(Owner(self.node, 0), Mode.SHARED))
        pending = self._queue(key, LetPass(Kind.FLOCK, nobody), clears=clears)
        await pending.done.wait()
        return pending

    @staticmethod
    def _found(pending: Pending) -> NameLocks:
        if pending.found is None:
            raise BackendError("this node has no lease at the moment")
        return pending.found

    async def survey(self) -> Survey:
        """The locks of all names of the cluster.  Raises BackendError."""
        return await survey(self._backend, self._served)

    def _served(self) -> dict[str, NameLocks]:
        """The locks of all names that this node serves from memory."""
        served = {key: name.leaving for key, name in self._names.items() if name.leaving is not None}
        return served | {key: self._mine(name) for key, name in self._names.items() if name.mine is not None}

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        """Those of the nodes that have lost their leases.  Raises BackendError."""
        return await self._backend.gone(nodes)

    async def host_of(self, node: str) -> str:
        """The host that a node is on, as far as that is known."""
        return str((await self._backend.process_of(node)).get("host", ""))

    def lose(self) -> None:
        """The lease is over: nothing of what this node held, or waited for, counts any more."""
        names, self._names = self._names, {}
        self._on_record.clear()
        self._lost_as = self._backend.node
        for name in names.values():
            self.problems.over(name.key, is_known=True)
            name.lost = True
            name.poke.set()
            for pending in name.pending:
                pending.done.set()

    # --------------------------------------------------------------- tasks

    async def run(self) -> None:
        """Serve until cancelled; from then on this node has no locks: its keeper, cancelled as well, leaves them."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for name in self._names.values():
                self._wake(name)
            nursery.start_soon(self._heed)
            nursery.start_soon(self._tidy)
            nursery.start_soon(self._sweep.run, self.lease_holds)
            try:
                await trio.sleep_forever()
            finally:  # within the nursery, which is closed later: it takes no tasks then
                self._nursery, self._is_over = None, True

    async def _heed(self) -> None:
        """Names that others want are given back."""
        while True:
            try:
                key = await self._backend.next_notice()
            except BackendError as error:
                self.problems.note(NOTICES, error)
                await trio.sleep(RETRY_SECONDS[1])
                continue
            self.problems.over(NOTICES)
            if self._nursery is None:
                return
            if key.startswith(QUESTION):
                self._nursery.start_soon(self._answers.give, key.removeprefix(QUESTION), self._served())
            else:
                self._hear(key)

    def _hear(self, key: str) -> None:
        """Something is on record that this node has to see.

        Also of a name that it does not know of: a swap may have been carried out long after it was given up.
        """
        if self._has_lease_to_serve():
            name = self._names.setdefault(key, Name(key, used=boottime()))
            name.asked = True
            self._wake(name)

    async def _tidy(self) -> None:
        """Names that are not used any more leave no record behind, and nodes that are gone nothing else."""
        while True:
            try:
                await self._backend.tidy_up()
            except BackendError as error:
                log.info("the lock backend: %s", error)
            await trio.sleep(IDLE_SECONDS / 4)
            for name in list(self._names.values()):
                if boottime() - name.used > IDLE_SECONDS:
                    self._put_away(name)
            self.problems.over(NOTICES, unless_within=CALM_SECONDS)  # notices that do not fail need not come
            self._backend.rest(not (self._names or self._on_record))

    def _put_away(self, name: Name) -> None:
        if name.mine is not None and self._mine(name):
            return
        if not name.busy:
            name.idle = True
            name.asked = name.mine is not None
            self._wake(name)

    async def give_back(self) -> None:
        """An orderly end: no record of a name stays on which this node has nothing, as far as there is time.

        What it leaves, whoever needs the name next has to find out that the node is gone; and if nobody ever does, it
        stays for good.  What is locked still is free when the node has left.
        """
        if not self.lease_holds():
            return
        due = [name for name in self._names.values() if not name.busy and self._has_only_its_record(name)]
        with trio.move_on_after(GIVE_BACK_SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(GIVE_BACK_AT_ONCE):
                    nursery.start_soon(self._give_back_some, due)

    def _has_only_its_record(self, name: Name) -> bool:
        if name.mine is not None:
            return not self._mine(name)
        return name.stored is not None and not name.stored.record

    async def _give_back_some(self, due: list[Name]) -> None:
        while due:
            name = due.pop()
            if not name.busy:
                name.idle, name.asked, name.busy = True, name.mine is not None, True
                await self._work(name)

    def _wake(self, name: Name) -> None:
        name.poke.set()
        if not name.busy and self._has_work(name) and self._nursery is not None:
            name.busy = True
            self._nursery.start_soon(self._work, name)

    async def _work(self, name: Name) -> None:
        seconds, longest = RETRY_SECONDS
        try:
            while self._has_work(name):
                name.poke = trio.Event()
                try:
                    await self._advance(name)
                except LeaseLostError:
                    break
                except BackendError as error:
                    if not name.lost:
                        self.problems.note(name.key, error)
                    name.stored = None
                    await trio.sleep(seconds)
                    seconds = min(2 * seconds, longest)
                else:
                    seconds = RETRY_SECONDS[0]
                    if not name.gone:  # else what it was for is still to be put on record
                        self._is_well(name)
            self._is_well(name)
        finally:
            name.busy = False
            self._forget(name)
            await self._unfollow(name)

    def _is_well(self, name: Name) -> None:
        """Nothing has failed, or nothing is tried any more."""
        if not name.lost:
            self.problems.over(name.key)

    def _forget(self, name: Name) -> None:
        """Where there is nothing more to do; but empty records that are there are remembered until they are removed."""
        if self._names.get(name.key) is not name:
            return
        self._note_locks(name)
        is_remembered = name.stored is not None and name.stored.version and not name.stored.record
        if name.mine is None and not name.has_work and not is_remembered:
            del self._names[name.key]

    def _note_locks(self, name: Name) -> None:
        """Only this node puts locks of its own on record; others can break them, and then it is to hear of it soon."""
        if name.stored is None:
            return
        if self._backend.node in name.stored.record.locks.nodes():
            self._on_record.add(name.key)
            self._backend.rest(False)
        else:
            self._on_record.discard(name.key)

    def _follower(self, name: Name) -> Follower:
        if name.follower is None:
            name.follower = self._backend.follow(name.key)
            self._followed += 1
        return name.follower

    async def _unfollow(self, name: Name) -> None:
        follower, name.follower = name.follower, None
        if follower is not None:
            self._followed -= 1
            await follower.aclose()

    def _has_work(self, name: Name) -> bool:
        return name.has_work or (not name.lost and self._follows(name))

    def _follows(self, name: Name) -> bool:
        """Whether to know a record as it changes: who then unlocks what is on it, or locks again, needs one swap."""
        if name.mine is not None or name.stored is None or not self._backend.tells_changes:
            return False
        if self._followed + (name.follower is None) > MOST_FOLLOWED:
            return False
        nodes = name.stored.record.locks.nodes()
        return self._backend.node in nodes or (bool(nodes) and self._lingers(name))

    def _lingers(self, name: Name) -> bool:
        """Whether a name has been used lately."""
        return boottime() - name.used < LINGER_SECONDS

    # ------------------------------------------------------------ protocol

    async def _advance(self, name: Name) -> None:
        """One step of the protocol."""
        if name.mine is not None and (name.has_steps or not name.asked):
            # First what this node took the name for: else two could take it from each other for ever, and use it never.
            self._require_lease(name)
            self._work_locally(name, self._mine(name))
            return
        if name.mine is not None:
            name.leaving, name.mine = self._mine(name), None
        stored = await self._look(name)
        if name.leaving is not None:
            await self._give_back(name, stored, name.leaving)
            return
        if name.idle:
            name.stored = None
            if not stored.record:
                await self._backend.discard(name.key, stored)
            return
        node, record = self._backend.node, stored.record
        if record.delegate == node:  # by a swap whose answer was lost, or by one that nobody answered yet
            name.mine, name.taking = name.taking or NameLocks(), None
            self._backend.expect_notices()
            name.asked, name.waits = bool(record.wanted), {}
            return
        if not name.may_be_replaced(stored):
            name.taking = None  # else it may be taken still, whatever is tried now
        if node in record.broken:
            self.broken(name.key, self._as_asked(name, record.locks))
            record = record.heeded(node)
        name.telling = bool(record.broken)  # whoever broke it may be gone
        if name.gone:
            record, name.gone = record.without(name.gone), set()
        else:
            self._settle_waits(name, record)
        await self._proceed(name, stored, record)

    async def _proceed(self, name: Name, stored: Stored, record: NameRecord) -> None:
        """With what is to be done on a record that is not this node's."""
        node = self._backend.node
        if record.delegate:
            if name.has_steps or name.waits:
                await self._ask(name, stored, record)
        elif name.has_steps and record.may_take(node) and not name.waits:
            name.taking = record.locks.copy()
            await self._swap(name, stored, record.taken(node))  # nobody else has to do with it: it is served from here
        else:
            await self._share(name, stored, record)

    async def _look(self, name: Name) -> Stored:
        """The record, read again where what is known of it may not be the latest."""
        replaced, name.replaced = name.replaced, None
        if name.asked:
            name.stored, name.asked = None, False  # somebody has put it on record that he wants the name
        elif replaced is not None and name.follower is not None:
            name.stored = await self._pause(name, replaced, LOOK_SECONDS)  # it is about to be told
        try:
            stored = name.stored or await self._backend.read(name.key)
        except UnreadableError as error:
            stored = self._cleared(name, error)
        if replaced is not None and stored.version == replaced.version:
            await trio.sleep(RETRY_SECONDS[0])  # what is in the way of a swap is nothing that can be read
        self._require_lease(name)
        name.stored = stored
        return stored

    def _cleared(self, name: Name, error: UnreadableError) -> Stored:
        """What an operator puts into the place of a record that cannot be read; raises `error` where nobody may."""
        clearing = [pending for pending in name.pending if pending.clears]
        if not clearing:
            raise error
        if not isinstance(error, DamagedError):
            for pending in clearing:
                pending.refused = error
                pending.done.set()
                name.pending.remove(pending)
            raise error
        name.substitute = error.stored
        return error.stored

    async def _share(self, name: Name, stored: Stored, record: NameRecord) -> None:
        """The locks of all are on record."""
        if name.telling and stored is not name.substitute and trio.current_time() >= name.tells_again:
            await self._tell(name, record)  # first: there can be steps without end
        if name.has_steps:
            await self._step(name, stored, record)
        elif record != stored.record:
            await self._swap(name, stored, record)
        elif name.telling or name.waits:
            await self._wait_for_others(name, stored)
        elif self._follows(name):
            holds = self._backend.node in record.locks.nodes()
            await self._await_change(name, stored, FOLLOW_SECONDS if holds else LINGER_SECONDS)

    async def _wait_for_others(self, name: Name, stored: Stored) -> None:
        name.gone = await self._gone(stored.record.in_the_way(self._backend.node))
        if not name.gone:
            await self._await_change(name, stored, LOOK_SECONDS)

    async def _tell(self, name: Name, record: NameRecord) -> None:
        """Those whose locks are broken have no other reason to look at the record."""
        name.tells_again = trio.current_time() + LOOK_SECONDS  # whatever comes of it: there are steps to be taken
        for node in record.broken:
            await self._backend.notify(node, name.key)

    async def _gone(self, nodes: set[str]) -> set[str]:
        """Those of some nodes that have lost their leases; each is looked at once in LOOK_SECONDS, for all names.

        One that is gone never comes back under its name.
        """
        now = trio.current_time()
        self._looked = {node: at for node, at in self._looked.items() if now - at < LOOK_SECONDS}
        due = nodes - {self._backend.node} - self._looked.keys() - self._lost.keys()
        self._looked.update(dict.fromkeys(due, now))
        if due:
            self._lost.update(dict.fromkeys(await self._backend.gone(due)))
            for node in list(self._lost)[:-MOST_LOST]:
                del self._lost[node]
        return nodes & self._lost.keys()

    def _work_locally(self, name: Name, locks: NameLocks) -> None:
        while name.has_steps:
            if name.unwanted:  # one at a time: what comes of it may be told, and the next has to know of that
                pending = Pending(self._trim(name, name.unwanted.pop(0)))
            else:
                name.pending = self._unlocks_first(name)
                pending = name.pending.pop(0)
            pending.try_again()
            step = pending.step
            queued = queued_in(locks)
            done, others = carry_out(locks, step)
            if isinstance(step, Break):
                self.broken(name.key, self._as_asked(name, locks))
            for wait in others:
                self._granted(name, queued[wait.ticket])
            self._note(name, step, done, locks)
            pending.settle(locks)
            name.unwanted += self._left(name, pending, done, locks)

    async def _give_back(self, name: Name, stored: Stored, locks: NameLocks) -> None:
        node, record = self._backend.node, stored.record
        # Where the name is not this node's any more, an earlier swap did it whose answer was lost; or others did,
        # because the lease of this node is over, which its own clock has told it before.
        if record.delegate != node or await self._swap(name, stored, record.given_back(node, locks)):
            name.waits = queued_in(locks)
            name.leaving, name.asked = None, False

    async def _ask(self, name: Name, stored: Stored, record: NameRecord) -> None:
        node = self._backend.node
        if node not in record.wanted or record != stored.record:
            if not await self._swap(name, stored, record.want(node)):
                return
            assert name.stored is not None
            stored = name.stored
        await self._backend.notify(record.delegate, name.key)
        await self._wait_for_others(name, stored)

    async def _step(self, name: Name, stored: Stored, record: NameRecord) -> None:
        trims = self._trims(name)
        name.pending = self._unlocks_first(name)
        batch = trims + self._batch(name.pending)
        locks = record.locks.copy()
        outcomes = [carry_out(locks, pending.step)[0] for pending in batch]
        if any(is_refused(pending.step, done) for pending, done in zip(batch, outcomes, strict=True)):
            # Who only tries does not wait, and who tries again and again must get what a dead node held all the same.
            name.gone = await self._gone(record.nodes())
            if name.gone:
                return
        node = self._backend.node
        after = record.stepped(node, locks)
        breaks = [pending.step.owners for pending in batch if isinstance(pending.step, Break)]
        if breaks:
            after = after.broke({owner.node for owner in record.locks.holders() & frozenset().union(*breaks)} - {node})
        for pending in batch:
            pending.try_again()
        if not await self._put(name, stored, after):
            return
        if breaks:
            name.telling, name.tells_again = True, -math.inf
            self.broken(name.key, self._as_asked(name, locks))
        name.unwanted = []
        del name.pending[: len(batch) - len(trims)]
        for pending, done in zip(batch, outcomes, strict=True):
            if isinstance(pending.step, Acquire) and pending.step.may_wait and not done:
                name.waits[pending.step.wait.ticket] = pending.step
            self._note(name, pending.step, done, locks)
            pending.settle(locks)
            name.unwanted += self._left(name, pending, done, locks)
        self._withdraw(name, batch[-1].step)
        self._settle_waits(name, after)
        # Also where all got what they wanted: else the name would stay shared.
        name.gone = await self._gone(after.nodes())

    def _left(self, name: Name, pending: Pending, done: bool, locks: NameLocks) -> list[Acquire]:
        """A request that is not had, if part of it is on record: it was granted without an answer, and trimmed then."""
        step = pending.step
        if done or not pending.repeated or not isinstance(step, Acquire):
            return []
        trimmed = locks.copy()
        carry_out(trimmed, self._trim(name, step))
        return [step] if trimmed != locks else []

    @staticmethod
    def _unlocks_first(name: Name) -> list[Pending]:
        """What is pending; whoever asks for an unlock has not been told yet of what he has asked for before."""
        return sorted(name.pending, key=lambda each: not isinstance(each.step, Release | HandOver))

    @staticmethod
    def _batch(pending: list[Pending]) -> list[Pending]:
        """What is put on record together: up to a request that is given up, which may leave something to unlock.

        An operator's break goes alone: what is granted before it is not had any more.
        """
        for at, each in enumerate(pending):
            if isinstance(each.step, Break):
                return pending[: max(at, 1)]
            if isinstance(each.step, GiveUp):
                return pending[: at + 1]
        return pending

    @staticmethod
    def _withdraw(name: Name, step: Step) -> None:
        """Who gave up waits no more, but may have got his lock before, or a part of it; a GiveUp is last in a batch."""
        if isinstance(step, GiveUp) and (asked := name.waits.pop(step.wait.ticket, None)) is not None:
            name.unwanted.append(asked)

    def _note(self, name: Name, step: Step, done: bool, locks: NameLocks) -> None:
        """What a step that has been carried out means for those who asked for it."""
        if isinstance(step, Trim):
            self.cut(name.key, step.kind, step.owner, locks)  # to a shared one, where others have that as well by now
        if not isinstance(step, Acquire):
            return
        if done:
            self._granted(name, step)
            return
        if step.kind is Kind.FLOCK:
            self.cut(name.key, step.kind, step.wait.lock.owner, locks)  # one that was to be converted is gone
        if is_refused(step, done):
            self.resolve(step.wait.ticket, False)

    def _granted(self, name: Name, asked: Acquire) -> None:
        """A request has its lock.  What nobody wants of it any more is unlocked, once all have been told what they got.

        That is before everything else that is pending: the owner may have asked for another lock since.  Who has asked
        for an unlock meanwhile is told after that is done (`_settle_waits`), which may take from it.
        """
        if any(ends_locks(each.step, asked.kind, asked.wait.lock.owner) for each in name.pending):
            name.waits[asked.wait.ticket] = asked
        elif not self.resolve(asked.wait.ticket, True):
            name.unwanted.append(asked)

    def _trims(self, name: Name) -> list[Pending]:
        """The steps by which no owner has more than it has been told of, because it gave up waiting."""
        return [Pending(self._trim(name, each)) for each in name.unwanted]

    def _trim(self, name: Name, asked: Acquire) -> Trim:
        kind, lock = asked.kind, asked.wait.lock
        return Trim(kind, lock.owner, lock.first, lock.last, tuple(self._known_to(name, kind, lock.owner)))

    def _known_to(self, name: Name, kind: Kind, owner: Owner) -> Iterator[Lock]:
        """What an owner has been told of, with what it has handed over while that is not on record."""
        hand_overs = (pending.step for pending in name.pending if isinstance(pending.step, HandOver))
        heirs = [step.heir for step in hand_overs if (step.kind, step.owner) == (kind, owner)]
        for each in (owner, *heirs):
            yield from self.told(name.key, kind, each)

    @staticmethod
    def _as_asked(name: Name, locks: NameLocks) -> NameLocks:
        """The locks of a name with what is handed over and not on record yet: for this node it counts already."""
        locks = locks.copy()
        for pending in name.pending:
            if isinstance(pending.step, HandOver):
                carry_out(locks, pending.step)
        return locks

    def _settle_waits(self, name: Name, record: NameRecord) -> None:
        """Requests of ours that are not in the queue any more have their locks, if the record says so.

        Nobody else takes them out of it.  But an operator may have broken the lock since, or a step of ours have
        unlocked it; and etcd may have been restored from an older snapshot.  Then it is asked for again.
        """
        if record.delegate:
            return
        for ticket, asked in list(name.waits.items()):
            if not record.waits(self._backend.node, asked.kind, ticket):
                del name.waits[ticket]
                if record.has(asked.kind, asked.wait.lock):
                    self._granted(name, asked)
                else:
                    name.pending.insert(0, Pending(asked))  # before it is given up, if it is
                    name.unwanted.append(asked)  # a part of it may be left

    async def _put(self, name: Name, stored: Stored, new: NameRecord) -> bool:
        """A swap; but a record that would only be written anew is left alone, if it is still there.

        Writing it would fail the swaps of others and wake all who wait, as often as somebody tries what he cannot have.
        It is written all the same where a swap of ours may still arrive, which asks for what is given up by now.
        """
        if name.may_be_replaced(stored) or new.to_json() != stored.record.to_json():
            return await self._swap(name, stored, new)
        name.stored = None
        if await self._backend.is_current(name.key, stored):
            name.stored = stored
        self._require_lease(name)
        return name.stored is not None

    async def _swap(self, name: Name, stored: Stored, new: NameRecord) -> bool:
        self._require_lease(name)
        name.stored, name.under_way = None, stored  # what becomes of it is not known until the answer is there
        name.stored = await self._backend.swap(name.key, stored, new)
        name.under_way = stored if name.stored is None else None
        name.replaced = name.under_way
        if name.stored is not None and stored is name.substitute:
            for pending in name.pending:
                pending.cleared = pending.clears
        self._require_lease(name)
        return name.stored is not None

    def _require_lease(self, name: Name) -> None:
        """No answer is acted on that comes after the lease: it may be about a name that this node has not any more."""
        if name.lost:
            raise LeaseLostError("the lease was lost meanwhile")
        if not self.lease_holds():
            raise BackendError("the lease of this node is over")

    async def _await_change(self, name: Name, stored: Stored, seconds: float) -> None:
        """Until the record changes, there is something else to do, or it is time to look around."""
        latest = await self._pause(name, stored, seconds)
        if latest is None and not name.poke.is_set() and self._has_work(name):
            latest = await self._backend.read(name.key)
            if latest != stored:
                await self._unfollow(name)  # it was not told
        if latest is not None:
            name.stored = latest

    async def _pause(self, name: Name, stored: Stored, seconds: float) -> Stored | None:
        """The record once it is a later one; None where there is something else to do, or the time is over."""
        follower, latest = self._follower(name), None
        kinds = {asked.kind for asked in name.waits.values()}
        turns = min((stored.record.turns_before(self._backend.node, kind) for kind in kinds), default=0)
        failures: list[BackendError] = []
        if name.poke.is_set():
            return None
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                nonlocal latest
                try:
                    latest = await follower.next_change(stored, seconds, turns)
                except BackendError as error:  # a nursery would make a group of it
                    failures.append(error)
                nursery.cancel_scope.cancel()

            nursery.start_soon(follow)
            await name.poke.wait()
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        return latest
