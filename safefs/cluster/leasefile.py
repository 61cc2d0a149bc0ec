"""Lock records and leases in files on the shared backing filesystem itself: no server.

What is done to the files, and why that is enough, is in safefs/cluster/files.py.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import trio

from safefs.cluster.backend import (
    Act,
    BackendError,
    DamagedError,
    HasDied,
    LeaseLostError,
    ProcessIdentity,
    Stored,
    plainly,
)
from safefs.cluster.calls import Call, Calls, batches
from safefs.cluster.files import DATA, ENDED, Files, directory_of
from safefs.cluster.housekeeping import Housekeeping
from safefs.cluster.record import NameRecord
from safefs.lease import OwnLease, Sightings, Terms, boottime

log = logging.getLogger(__name__)

MOST_DAMAGED = 10_000  # records of which it is remembered who could be on them
# For changes of a record, at first and at most: the first in the queue, and who is behind him so many times as seldom.
# No more often than every other moment is spent with it, be the filesystem as slow as it may.
POLL_SECONDS = (0.001, 0.25)
POLL_SHARE = 0.002  # in between, this part of the time that they have been waited for: so much longer it takes at most
NOTICE_SECONDS = (0.02, 0.5)  # for what others want, at first and at most;
NOTICE_SHARE = 0.1  # in between, this part of the time since a name that others can want was used
REST_SECONDS = 5.0  # at most where there is none: of a thousand nodes that do nothing each would look twice a second
# Who waits makes a file in the directory now and then, for clients that cache listings: where they are known or free to
# do so, after this part of the time that has been waited for, else only in case; at least and at most after so long.
REFRESH_SHARE, REFRESH_SECONDS = 0.05, (0.01, 0.5)


@dataclass(frozen=True)
class Site:
    """Where lease files are, and who works with them."""

    root: str
    terms: Terms
    identity: ProcessIdentity
    has_died: HasDied
    uses: Callable[[], int]  # how often names may have been used that no `expect_notices` tells of: a count
    act: Act = plainly
    stale_listings: bool = False  # clients may go on listing what a directory had before


class LeasefileBackend:
    """One node's view (backend.LockBackend)."""

    tells_changes = False

    def __init__(self, site: Site) -> None:
        self._site = site
        calls = Calls(site.root, site.act)
        self._call, self._call_own = calls.call, calls.call_own
        self._sightings = Sightings(site.terms)
        self._lease = OwnLease(site.terms)
        self._files: Files | None = None
        self._housekeeping: Housekeeping | None = None
        self._damaged: dict[str, set[str]] = {}  # records that were seen, and the nodes that could be on them
        self._count = 0
        self._wanted: list[str] = []
        self._used = float("-inf")  # when a name that is delegated to this node was used last
        self._rests = False  # there is none, and nothing else that others can want or break
        self._uses = site.uses()  # as counted when it was last looked for notices
        self._expecting = trio.Event()  # one has been used since it was last looked for notices
        self.node = ""

    def _open(self) -> Files:
        return Files(self._site.root, self._site.identity, self._site.has_died)

    @property
    def files(self) -> Files:
        if self._files is None:
            raise BackendError(f"{self._site.root} is not in use yet")
        return self._files

    # --------------------------------------------------------------- leases

    async def join(self) -> None:
        """Become a node of the cluster, with a new name: it has it, and a lease, once nothing can fail any more."""
        if self._files is None:
            self._files = await self._call_own(self._open)
            self._housekeeping = Housekeeping(self._files, self._call, self.gone, self._sightings)
        assert self._housekeeping is not None
        node = secrets.token_hex(8)
        self._housekeeping.joins(node)
        sent, count = await self._enter(node)
        self.node, self._count, self._wanted = node, count, []
        self._lease.renew(sent)

    async def _enter(self, node: str) -> tuple[float, int]:
        """Be there for the others under a name; what its lease has come to by then, and when that was sent."""
        sent = boottime()
        await self._call_own(self.files.join, node)
        return sent, 0

    async def renew(self) -> None:
        """Renew the lease; LeaseLostError when others have ended it, or it is over by this node's own clock."""
        sent = boottime()
        if not self._lease.holds(sent):
            raise LeaseLostError("the lease was not renewed in time")
        if not await self._call_own(self.files.renew, self.node, self._count):
            raise LeaseLostError("another node has ended the lease")
        self._count += 1
        self._lease.renew(sent)

    async def leave(self) -> None:
        """End this node's own lease: what it held is free at once.

        A renewal whose outcome is not known, because it was cancelled or got no answer, may have come first.  There is
        one such at most: the next begins where the last one that was heard of ended.
        """
        self._lease = OwnLease(self._site.terms)  # whatever the calls come to
        for count in (self._count, self._count + 1):
            if await self._call_own(self.files.end, self.node, str(count)):
                return

    def lease_ends(self) -> float:
        return self._lease.ends()

    async def tidy_up(self) -> None:
        if self._housekeeping is not None:
            await self._housekeeping.tidy_up(self.node)

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        ended = set()
        for node in nodes:
            if await self._is_gone(node):
                ended.add(node)
        return ended

    async def _is_gone(self, node: str) -> bool:
        before = boottime()
        # An old count would be seen for a lease and a delay, and then the new one for as long again.
        heartbeat = await self._call(self.files.heartbeat, node, anew=self._site.stale_listings)
        if heartbeat == ENDED:
            return True
        unseen = self._sightings.see(node, heartbeat, before, boottime())
        if not unseen and not await self._call(self.files.has_died, node):
            return False
        return heartbeat is None or await self._call(self.files.end, node, heartbeat)

    # -------------------------------------------------------------- records

    async def read(self, name: str) -> Stored:
        """A record that is damaged is nobody's once all others are gone that could have been on it."""
        before = boottime()
        try:
            return await self._call(self._read, name)
        except DamagedError as error:
            damaged = error.stored
            if error.may_pass or not await self._are_gone(damaged, before):
                raise
        log.warning("the record of %r was damaged; all are gone who could be on it", name)
        return replace(damaged, record=NameRecord(broken=(self.node,)))  # what this node has of it is lost

    async def _are_gone(self, damaged: Stored, before: float) -> bool:
        """Those who were there when this node first saw the damage: it never changes, so nobody comes to it later."""
        key = f"damaged/{damaged.token}"
        if key not in self._damaged and len(self._damaged) >= MOST_DAMAGED:
            oldest = next(iter(self._damaged))
            del self._damaged[oldest]
            self._sightings.forget({oldest})
        others = self._damaged.setdefault(key, set(damaged.record.broken) - {self.node})
        return self._sightings.see(key, damaged.token, before, boottime()) and not others - await self.gone(others)

    def _read(self, name: str) -> Stored:
        """Not an older record than this node has seen or written: what is missing there would be taken for granted."""
        if self._site.stale_listings:
            self.files.refresh(name)
        return self.files.read(name)

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        before = boottime()
        stored = await self._call(self.files.swap, name, old, new)
        if stored is None and not old.version:
            await self._clear_leftovers(name, before)
        return stored

    async def _clear_leftovers(self, name: str, before: float) -> None:
        """A name's directory cannot be made: BackendError as long as it may be that of a node that is just slow."""
        left, key = await self._call(self.files.leftovers, name), f"names/{directory_of(name)}"
        foreign = next((entry for entry in left if not entry.startswith(DATA)), None)
        if not left:
            self._sightings.forget({key})
        elif foreign is not None:
            raise BackendError(f"{self._site.root}: {key}/{foreign} is nothing of safefs, and has to be removed")
        elif self._sightings.see(key, left, before, boottime()):
            await self._call(self.files.remove_leftovers, name, left)
            self._sightings.forget({key})
        else:
            what = f"{key} holds data without a state; should it stay so, they are removed"
            raise BackendError(f"{self._site.root}: {what}")

    async def is_current(self, name: str, stored: Stored) -> bool:
        return await self._call(self.files.is_current, name, stored)

    def follow(self, name: str) -> Following:
        return Following(name, self.files, self._call, stale_listings=self._site.stale_listings)

    async def all_names(self) -> list[str]:
        homes, found = await self._call(self.files.homes), list[str]()
        for some in batches(homes):
            found += await self._call(self.files.names_of, some)
        return found

    async def some_names(self, most: int) -> list[str]:
        return [] if self._housekeeping is None else await self._housekeeping.some_names(self.node, most)

    async def process_of(self, node: str) -> ProcessIdentity:
        return await self._call(self.files.process_of, node)

    async def discard(self, name: str, stored: Stored) -> None:
        await self._call(self.files.discard, name, stored)

    # -------------------------------------------------------------- notices

    async def notify(self, node: str, name: str) -> None:
        await self._call(self.files.notify, node, name)

    async def answer(self, question: str, text: str) -> None:
        await self._call(self.files.answer, self.node, question, text)

    async def take_answer(self, node: str, question: str) -> str | None:
        return await self._call(self.files.take_answer, node, question, anew=self._site.stale_listings)

    def expect_notices(self) -> None:
        self._used, self._rests = trio.current_time(), False
        self._expecting.set()

    def rest(self, rests: bool) -> None:
        if self._rests and not rests:
            self._expecting.set()
        self._rests = rests

    async def next_notice(self) -> str:
        while not self._wanted:
            self._expecting = trio.Event()
            self._wanted = await self._call(self.files.notices, self.node, anew=self._site.stale_listings)
            if not self._wanted:
                await self._pause_for_notices()
        return self._wanted.pop(0)

    async def _pause_for_notices(self) -> None:
        """They are looked for soon after a name was used here, and ever less often when none is.

        So others wait for a name at most a tenth longer than it has not been used, and half a second in any case.  Uses
        that are only counted are noticed at a look, and do not make for one: whoever has such names does not rest.
        """
        shortest, longest = NOTICE_SECONDS
        if self._rests:
            longest = REST_SECONDS
        await trio.sleep(shortest)
        uses = self._site.uses()
        if uses != self._uses:
            self._uses, self._used = uses, trio.current_time()
        with trio.move_on_after(min(NOTICE_SHARE * (trio.current_time() - self._used), longest)):
            await self._expecting.wait()


class Following:
    """Looks for changes of one record (backend.Follower)."""

    def __init__(self, name: str, files: Files, call: Call, *, stale_listings: bool) -> None:
        self._name = name
        self._files = files
        self._call = call
        self._stale_listings = stale_listings
        self._version = -1  # that has been waited for the end of,
        self._since = 0.0  # so long,
        self._refreshed = 0.0  # and when the client was last made to look anew

    async def next_change(self, seen: Stored, seconds: float, turns: int = 0) -> Stored | None:
        shortest, longest = POLL_SECONDS
        if self._version != seen.version:
            self._version, self._since = seen.version, trio.current_time()
            self._refreshed = self._since
        with trio.move_on_after(seconds):
            while True:
                looks = trio.current_time()
                stored = await self._call(self._files.read_later, self._name, seen.version)
                if stored is not None:
                    return stored
                now = trio.current_time()
                pause = max(shortest, POLL_SHARE * (now - self._since), now - looks)
                await trio.sleep(min((1 + turns) * pause, longest))
                if trio.current_time() - self._refreshed > self._refresh_seconds(now - self._since):
                    await self._call(self._files.refresh, self._name)
                    self._refreshed = trio.current_time()
        return None

    def _refresh_seconds(self, waited: float) -> float:
        shortest, longest = REFRESH_SECONDS
        return min(max(shortest, REFRESH_SHARE * waited), longest) if self._stale_listings else longest

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
