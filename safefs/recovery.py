"""Settles what a dead daemon left behind: hidden temps, partial files that it had taken over, and lock files.

Whether another daemon is dead is never guessed.  On this host its process is gone (same boot, same pid namespace); a
host that has booted again has no processes of before; any other daemon is watched, and is dead when its heartbeat has
not changed for `DEAD_AFTER_SECONDS` of this daemon's own monotonic clock, in which its own heart has beaten.  No clocks
or mtimes are compared.

Where nodes have leases (safefs/cluster), the lock files of one whose lease is over go at once, dead or not; and by its
heartbeat alone no daemon is dead as long as the lease under which it has lock files is not known to be over.

What is damaged in a record is not taken for nothing: once the rest is settled it goes to quarantine, where people see
it.  A record that cannot be read or settled at the moment stays, and keeps no other from being settled.

With many nodes not everybody watches everybody: the daemons on record are a ring, and each watches the next ones, up to
the second that it sees alive.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from safefs import backing
from safefs.backing import Backing
from safefs.cluster.backend import BackendError
from safefs.errors import NOT_JSON
from safefs.events import EventKind, EventLog
from safefs.identity import DAEMON, SERVICE, read_back
from safefs.model import Caller
from safefs.softlocks import Noted, read_noted, remove_noted
from safefs.state import (
    BEAT_SECONDS,
    DAEMONS,
    JOURNAL,
    RECORD_VERSION,
    SOFT_LOCKS,
    WRITER,
    DaemonRecord,
    StateDirectory,
    heartbeat_of,
    identity_of,
    is_name,
    known_dead,
)
from safefs.workers import Workers

log = logging.getLogger(__name__)

DEAD_AFTER_SECONDS = 60.0
ALIVE_SECONDS = 15.0  # since the last heartbeat
WATCHED = 2  # daemons that are alive
LEASE_LOOK_SECONDS = 1.0
FREE_AGAIN_SECONDS = 5.0  # after the lock files of a node whose lease is over could not all be removed
FREE_SECONDS = 600.0  # for which what a dead daemon left is tried, before its record goes
SETTLING_SUFFIX = ".settling"


def _node_id(record: Path) -> str:
    """Whose record it is; one that is being settled has the settler's name behind that."""
    return record.name.partition(".")[0]


def _read_journal(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """What a daemon has on record of its hidden names, and whether that is all.  Raises OSError.

    What stands behind the last end of a line is what was being written when the daemon or its machine ended.
    """
    *lines, cut_short = path.read_bytes().split(b"\n")
    entries = [_entry(line) for line in lines]
    sound = [entry for entry in (*entries, _entry(cut_short)) if entry is not None]
    # Partial files first: they have a name to go back to, and are hidden files of their directory as well.
    return sorted(sound, key=lambda entry: "hidden" not in entry), None not in entries


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line of a journal says; None where it is not what a daemon writes."""
    try:
        found = json.loads(line.decode("ascii"))
    except NOT_JSON:
        return None
    if not isinstance(found, dict):
        return None
    names = ("directory", "hidden", "name") if "hidden" in found else ("directory",)
    return found if all(is_name(found.get(name)) for name in names) else None


class Recovery:
    """Keeps this daemon's heartbeat and looks for daemons that have lost theirs."""

    def __init__(self, store: Backing, state: StateDirectory, record: DaemonRecord, events: EventLog) -> None:
        self._backing = store
        self._events = events
        self._state = state
        self._record = record
        self._beats: dict[str, tuple[str, float]] = {}  # node id → heartbeat, and when it was first seen so
        self._living: set[str] = set()  # node ids whose heartbeat was seen to change lately
        self._identities: dict[str, dict[str, Any]] = {}  # by node id; they never change
        self._watched: tuple[Path, ...] = ()  # the records that this daemon watches, as of the last look at all of them
        # By names in the cluster of nodes that have lost their leases: when to look at their lock files again.
        self._freed: dict[str, float] = {}
        self._watches_leases = False
        self._failing: dict[str, float] = {}  # node ids of records that could not be settled yet → since when
        self._heart = Workers(1)
        self._beat_began = math.inf  # since when a heartbeat of this daemon's own is on its way
        self._missed_beat = -math.inf  # when one failed last, or came late

    async def beat(self) -> None:
        """Until cancelled: show others that this daemon lives.

        Beside `run`: thousands of leftovers take minutes, and a daemon that does not beat meanwhile is taken for dead
        itself, with all that is being written through it.  And in a thread of its own: calls of clients can hang in
        another part of the backing, as many as there are threads for them.
        """
        await self._again_and_again(self._beat)

    async def _beat(self) -> None:
        self._beat_began = time.monotonic()
        is_in_time = False
        try:
            await self._heart.run(self._backing.identities.call, SERVICE, self._record.beat)
            is_in_time = time.monotonic() - self._beat_began <= ALIVE_SECONDS
        finally:
            if not is_in_time:
                self._missed_beat = time.monotonic()
            self._beat_began = math.inf

    async def run(self) -> None:
        """Until cancelled: settle what dead daemons left."""
        await self._again_and_again(partial(self._backing.run, SERVICE, self.settle_dead))

    async def _again_and_again(self, call: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await call()
            except OSError as error:
                log.warning("the state directory cannot be used at the moment: %s", error)
            await trio.sleep(BEAT_SECONDS)

    async def watch_leases(self, gone: Callable[[Iterable[str]], Awaitable[set[str]]]) -> None:
        """Until cancelled: remove the lock files of nodes that have lost their leases, as `gone` tells."""
        self._watches_leases = True
        while True:
            await trio.sleep(LEASE_LOOK_SECONDS)
            noted = list[Noted]()
            try:
                noted = await self._backing.run(SERVICE, self._noted_by_others)
            except OSError as error:
                log.warning("the lock files of other nodes cannot be looked at: %s", error)
            for each in noted:  # one by one: where one cannot be asked for, it keeps no other's from being removed
                try:
                    if await gone((each.node,)):
                        await self._backing.run(SERVICE, self._free_lost, each)
                except (OSError, BackendError) as error:
                    log.warning("the lock files of node %s cannot be looked at: %s", each.node, error)

    def _noted_by_others(self) -> list[Noted]:
        found = list[Noted | None]()
        for path in self._watched:
            with suppress(OSError):  # there is another look in a moment
                found.append(read_noted(path))
        nodes = [noted for noted in found if noted is not None and noted.node and noted.locks]
        names, now = {noted.node for noted in nodes}, time.monotonic()
        self._freed = {node: again for node, again in self._freed.items() if node in names}
        return [noted for noted in nodes if self._freed.get(noted.node, now) <= now]

    def _free_lost(self, noted: Noted) -> None:
        """Once for each lost lease; what could not be removed is tried again, for as long as it is on record."""
        failure = self._free(noted)
        if failure is not None and noted.node not in self._freed:
            log.warning("of a node whose lease is over %s", failure)
        self._freed[noted.node] = math.inf if failure is None else time.monotonic() + FREE_AGAIN_SECONDS

    def _free(self, noted: Noted) -> OSError | None:
        """Remove the lock files of a node; what kept some of them, of which one is named."""
        failure = None
        for entry in noted.locks:
            try:
                if remove_noted(self._backing, entry):
                    reason = "the lease of its node is over"
                    self._events.note(EventKind.LOCK_REMOVED, entry["path"], reason=reason, holder=noted.node)
            except OSError as error:
                failure = OSError(error.errno, f"lock files stay, among them {entry['path']}: {error.strerror}")
        return failure

    def _others(self) -> list[Path]:
        """The records of the other daemons, in the order of the ring: those that come after this one first."""
        with os.scandir(self._state.path / DAEMONS) as found:  # what is no directory is nobody's record
            paths = sorted(Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False))
        after = [path for path in paths if path > self._record.path]
        return after + [path for path in paths if path < self._record.path]

    def _ring(self, paths: list[Path]) -> Iterator[Path]:
        """Those that this daemon watches."""
        living = 0
        for path in paths:
            yield path
            living += path.name in self._living
            if living == WATCHED:
                return

    def settle_dead(self) -> None:
        """Look at the records of other daemons once.  Blocks."""
        others = self._others()
        names = {path.name for path in others}
        self._identities = {name: identity for name, identity in self._identities.items() if name in names}
        self._beats = {name: beat for name, beat in self._beats.items() if name in names}
        node_ids = {_node_id(path) for path in others}
        self._failing = {node_id: since for node_id, since in self._failing.items() if node_id in node_ids}
        self._watched = tuple(self._ring(others))
        watched = set(self._watched)
        for path in others:
            try:
                if path.name != _node_id(path) and _node_id(path) in names:
                    # It was frozen, and is alive or settled itself: what it has there by now is not left.  Lock files
                    # that are left stand under its new name.
                    (path / SOFT_LOCKS).unlink(missing_ok=True)
                elif self._is_dead(path, watched=path in watched):
                    self._settle(path)
            except OSError as error:
                self._note_failure(_node_id(path), error)
        self._watched = tuple(self._ring(others))  # of those who live some more are known to

    def _note_failure(self, node_id: str, error: OSError) -> None:
        """It is tried again in each round, and said once."""
        if node_id not in self._failing:
            self._failing[node_id] = time.monotonic()
            log.warning("what the dead daemon %s left cannot be settled yet: %s", node_id, error)

    def _is_dead(self, path: Path, *, watched: bool) -> bool:
        identity = self._identity_of(path)  # of an empty one only the heartbeat can tell
        if identity.get("version", RECORD_VERSION) != RECORD_VERSION:
            return False
        known = self._backing.identities.call(DAEMON, known_dead, identity)
        if known is None:
            return watched and self._has_stopped_beating(path) and not self._may_have_lease(path)
        (self._living.discard if known else self._living.add)(path.name)
        return known

    def _identity_of(self, path: Path) -> dict[str, Any]:
        """Read once: of a thousand nodes, each would else read a thousand files in the time between two heartbeats."""
        identity = self._identities.get(path.name) or identity_of(path)
        if identity:
            self._identities[path.name] = identity
        return identity

    def _has_stopped_beating(self, path: Path) -> bool:
        """Who could not beat himself counts from then on: what kept him from it may have kept the others.

        Where the directory is full, or does not answer, all stop at once; and when that ends, one may look before the
        next has beaten again.
        """
        beat, now = heartbeat_of(path), time.monotonic()
        last, since = self._beats.get(path.name, (None, now))
        if beat != last:
            self._beats[path.name] = (beat, now)
            if last is not None:
                self._living.add(path.name)
            return False
        if now - self._beat_began > ALIVE_SECONDS:  # looked at first: once it has ended, the other is known
            return False
        since = max(since, self._missed_beat)
        if now - since > ALIVE_SECONDS:
            self._living.discard(path.name)
        return now - since > DEAD_AFTER_SECONDS

    def _may_have_lease(self, path: Path) -> bool:
        """Whether a daemon has lock files under a lease that is not known to be over: it may just not reach the state.

        One without lock files is not asked for: of a lease nothing else on record depends.
        """
        noted = read_noted(path) if self._watches_leases else None
        return noted is not None and bool(noted.node and noted.locks) and noted.node not in self._freed

    def _settle(self, path: Path) -> None:
        """Clean up after one dead daemon; of several that want to, the one whose rename succeeds does.

        Raises OSError where it has to be tried again: what could not be read, or removed, is then still on record.
        """
        mine = self._claim(path)
        if mine is None:
            return
        node_id = _node_id(mine)
        noted = read_noted(mine)
        files_stay = None if noted is None else self._free(noted)
        is_whole, leftovers_stay = self._settle_journal(mine, node_id)
        failure = files_stay or leftovers_stay
        if failure is not None:
            now = time.monotonic()
            if now - self._failing.get(node_id, now) < FREE_SECONDS:
                raise failure
            log.warning("of the dead daemon %s for good %s", node_id, failure)
        if leftovers_stay is not None or not is_whole:
            self._keep_unsettled(mine, JOURNAL, node_id)
        if noted is not None and not noted.is_whole:
            self._keep_unsettled(mine, SOFT_LOCKS, node_id)
        with suppress(FileNotFoundError):  # another daemon has claimed it meanwhile
            shutil.rmtree(mine)

    def _claim(self, path: Path) -> Path | None:
        """Make a record this daemon's to settle; None where another is quicker.

        Under a new name: one who was frozen can have been settled in part before, and have a record again.
        """
        own = f"{_node_id(path)}{SETTLING_SUFFIX}-{self._backing.node_id}-"
        if path.name.startswith(own):
            return path
        mine = path.with_name(f"{own}{secrets.token_hex(4)}")
        try:
            path.rename(mine)
        except FileNotFoundError:
            return None
        self._living.discard(path.name)
        if path.name in self._beats:
            self._beats[mine.name] = self._beats.pop(path.name)  # dead already, should it have to be tried again
        return mine

    def _settle_journal(self, record: Path, node_id: str) -> tuple[bool, OSError | None]:
        """Settle what a journal names: whether it could be read as a whole, and what kept something from being settled.

        To settle again what is settled changes nothing.
        """
        try:
            entries, is_whole = _read_journal(record / JOURNAL)
        except FileNotFoundError:
            return True, None
        settled, failure = 0, None
        for entry in entries:
            try:
                settled += self._settle_directory(entry, node_id)
            except (FileNotFoundError, NotADirectoryError):
                pass  # the directory is gone, and what was in it went to quarantine with its rmdir
            except OSError as error:
                failure = OSError(error.errno, f"leftovers stay, among them in {entry['directory']}: {error.strerror}")
        if settled or failure is None:
            self._events.note(EventKind.RECOVERED, "", daemon=node_id, files=settled)
            log.info("settled what the dead daemon %s left behind: %d files", node_id, settled)
        return is_whole, failure

    def _keep_unsettled(self, record: Path, name: str, node_id: str) -> None:
        """It is damaged, or what it names cannot be settled: whoever looks into it may find out more."""
        log.warning("the %s of the dead daemon %s goes to quarantine: not all that it named is settled", name, node_id)
        fd = os.open(record, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            reason = f"the {name} of the dead daemon {node_id}: files that it named were not settled"
            self._state.keep_leftover(fd, name.encode(), reason)
        finally:
            os.close(fd)

    def _settle_directory(self, entry: dict[str, Any], node_id: str) -> int:
        writers = read_back(entry.get(WRITER))
        fd = self._backing.open_below(os.fsencode(entry["directory"]), writers)
        try:
            if "hidden" in entry:
                return self._put_back(fd, os.fsencode(entry["hidden"]), os.fsencode(entry["name"]), writers)
            prefix = backing.HIDDEN_PREFIX + node_id.encode() + b"~"
            settled = 0
            for name in map(os.fsencode, os.listdir(fd)):
                if name.startswith(prefix):
                    with suppress(FileNotFoundError):  # another daemon has settled it, or an rmdir, since the look
                        self._state.keep_leftover(fd, name, "its daemon ended before it was published", writers)
                        settled += 1
            return settled
        finally:
            os.close(fd)

    def _put_back(self, directory: int, hidden: bytes, name: bytes, writers: tuple[Caller, ...]) -> int:
        """A partial file that was taken over goes back under its name, unless there is a new one."""
        give_back = backing.give_back, directory, hidden, name
        try:
            self._backing.identities.as_owner(directory, *give_back, others=writers)
        except FileNotFoundError:
            return 0  # it was published, or another daemon has settled it
        except FileExistsError:
            reason = "its name has a new file"
        except OSError as error:
            reason = f"it could not go back under its name: {error.strerror}"
        else:
            return 1
        self._state.keep_leftover(directory, hidden, f"its daemon ended, and {reason}", writers)
        return 1
