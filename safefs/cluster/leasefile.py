"""Lock records and leases in files on the shared backing filesystem itself: no server.

Everything rests on one thing that shared filesystems do on their servers, whatever their clients cache: rename(2) fails
with ENOENT when its source is not there (any more).  So what has to change at once is in the *name* of a file, and a
change is a rename from the old name to the new one, which one of several succeeds with:

    names/KEY/VERSION~ID      the state of a name's record, which is in names/KEY/data~ID (`none` and an ID: empty)
    nodes/NODE/COUNT          a node's lease: renewed by a rename to COUNT+1, ended by a rename to `ended`

A record's bytes are written before its name says that they count, and never changed.  A stale listing names a state
that is over, and the rename fails; a failed attempt has made a file in the directory, which has its client look anew.

A node is ended by others when they have seen no new COUNT for lease and delay by their own clocks (safefs/lease.py).
A node that was alive all the same, because its renewals were hidden by somebody's cache, is not there under the COUNT
that was seen, and nothing happens to it.  A node whose process is known to have died, which those on its host can see,
is ended at once.

A name's directory goes when nobody needs it: once its state is renamed to `gone~ID`, which nothing follows, it is
emptied and removed, by whoever comes across it.  The first state of a name comes with its directory, by one rename of
both.  A node that dies between writing the data of a state and the rename can leave them in a directory that another
has just emptied, and that is not removed then.  They are taken for that when nothing else was seen there for as long as
it takes to see that a node is gone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

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
from safefs.cluster.record import NameRecord
from safefs.lease import OwnLease, Sightings, Terms, boottime

log = logging.getLogger(__name__)

CALL_SECONDS = 5.0  # a call of the backing filesystem that takes longer counts as unanswered
MAX_THREADS = 16
MOST_PROCESSES = 10_000  # that are remembered
MAX_OWN_THREADS = 2  # for this node's own lease
HOMES_AT_ONCE = 100  # directories of names, or of nodes, that one call reads
LOOKED_AT_ONCE = 10  # nodes, for what they have left
MOST_FORMER = 10  # names of this node, which are looked at each time
MOST_UNFINISHED = 100
BURIED_SECONDS = 86400.0  # after that long nobody looks for an ended node any more
MOST_DAMAGED = 100  # records of which it is remembered who could be on them
LIST_ATTEMPTS = 5  # a listing can miss a file that is renamed meanwhile
# For changes of a record, at first and at most: the first in the queue, and who is behind him so many times as seldom.
# No more often than every other moment is spent with it, be the filesystem as slow as it may.
POLL_SECONDS = (0.001, 0.25)
POLL_SHARE = 0.005  # in between, this part of the time that they have been waited for: so much longer it takes at most
NOTICE_SECONDS = (0.02, 0.5)  # for what others want, at first and at most;
NOTICE_SHARE = 0.1  # in between, this part of the time since a name that others can want was used
# Who waits makes a file in the directory now and then, for clients that cache listings: where they are known or free to
# do so, after this part of the time that has been waited for, else only in case; at least and at most after so long.
REFRESH_SHARE, REFRESH_SECONDS = 0.05, (0.01, 0.5)

STATE = re.compile(r"(\d+)~([0-9a-f]+|none[0-9a-f]*)")
NONE = "none"  # how the id of an empty record begins: a rename that comes late must not find another one in its place
DATA, LOOK = "data~", "look~"  # how the names of a record's bytes begin, and of what is made to have a client look anew
GONE = "gone"  # the state after which there is none: gone~ID, so that nobody takes it for that of a later directory
ENDED = "ended"
ANSWER = "answer~"

T = TypeVar("T")


def directory_of(name: str) -> str:
    """A name's directory: names can be longer than a file name."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _touch(path: str) -> None:
    """A new, empty file."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


class Files:
    """The blocking half: one method for each thing that is done to the files.  Errors are OSErrors.

    `identity` says which process this node is, and `has_died` whether that of another node has ended.
    """

    def __init__(self, root: str, identity: ProcessIdentity, has_died: HasDied) -> None:
        self.root = root
        self.node = ""  # this node, once it has joined
        self._identity = identity
        self._processes: dict[str, ProcessIdentity] = {}  # of nodes that have been asked for
        self._has_died = has_died
        for part in ("", "names", "nodes", "new"):
            os.makedirs(os.path.join(root, part), mode=0o700, exist_ok=True)

    def _path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def _deciding(self, what: str) -> AbstractContextManager[None]:
        """Around what decides about a name or a node: a rename needs nothing more (but safefs/cluster/ofd.py)."""
        assert what
        return nullcontext()

    def _require_place(self) -> None:
        """OSError where the backing is not mounted, or nothing of ours is there: then what is missing means nothing."""
        own = self._path("nodes", self.node)
        if not os.path.exists(own):
            raise OSError(errno.ENXIO, f"{own} is not there; is the filesystem mounted?")

    # -------------------------------------------------------------- records

    def _state(self, name: str) -> tuple[int, str] | None:
        """Version and id of a record; None when there is none.

        A listing can miss a state that is renamed meanwhile, and in one that a client remembers there can be none.
        What is not there twice, and this node's own directory in between, is not there at all.
        """
        is_missing = False
        for attempt in range(LIST_ATTEMPTS):
            if attempt and not is_missing:
                self.refresh(name)
            try:
                entries = os.listdir(self._path("names", directory_of(name)))
            except FileNotFoundError:
                if is_missing:
                    return None
                is_missing = True
                self._require_place()
                continue
            is_missing = False
            states = [(int(found[1]), found[2]) for entry in entries if (found := STATE.fullmatch(entry))]
            if states:
                return max(states)
        return None

    def read(self, name: str) -> Stored:
        """DamagedError where the data of a record are none."""
        for _ in range(LIST_ATTEMPTS):
            state = self._state(name)
            if state is None:
                return Stored()
            version, token = state
            if token.startswith(NONE):
                return Stored(version, token=token)
            try:
                with open(self._path("names", directory_of(name), DATA + token), encoding="utf-8") as file:
                    data = json.load(file)
            except FileNotFoundError:
                self.refresh(name)  # it has been replaced, just now or behind a cached listing
                continue
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                nodes = tuple(self._listed(self._path("nodes")))
                what = f"{self._path('names', directory_of(name))}: the record of {name!r} cannot be read: {error}"
                raise DamagedError(what, Stored(version, NameRecord(broken=nodes), token)) from None
            if data["name"] != name:
                raise ValueError(f"{directory_of(name)} is about another name")
            return Stored(version, NameRecord.from_json(data["record"]), token)
        raise OSError(errno.EAGAIN, "the record of a name changes faster than it can be read")

    def read_later(self, name: str, version: int) -> Stored | None:
        """The record if it is not of that version any more."""
        state = self._state(name)
        found = 0 if state is None else state[0]
        if found == version:
            return None
        if found < version:
            self.refresh(name)  # it began anew; or the client remembers what was there before
        stored = self.read(name)
        return None if stored.version == version else stored

    def is_current(self, name: str, stored: Stored) -> bool:
        self.refresh(name)
        state = self._state(name)
        return stored.version == 0 if state is None else state == (stored.version, stored.token)

    def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        token = ("" if new else NONE) + secrets.token_hex(8)
        stored = Stored(old.version + 1, new, token)
        with self._deciding(directory_of(name)):
            if old.version:
                return self._replace(name, old, stored)
            return self._create(name, stored) if new else Stored()

    def _replace(self, name: str, old: Stored, stored: Stored) -> Stored | None:
        home, token = self._path("names", directory_of(name)), stored.token
        try:
            self._write(home, name, stored)
        except FileNotFoundError:
            return None  # the record was empty, and its directory is removed
        try:
            os.rename(f"{home}/{old.version}~{old.token}", f"{home}/{stored.version}~{token}")
        except FileNotFoundError:
            # Of another's rename, or of our own whose answer was lost and that the client has repeated.
            if self._state(name) != (stored.version, token):
                self._remove(f"{home}/{DATA}{token}")
                return None
        self._remove(f"{home}/{DATA}{old.token}")
        return stored

    def _create(self, name: str, stored: Stored) -> Stored | None:
        """The first state of a name comes with its directory: of several, one can be renamed to the place."""
        fresh, home = self._path("new", secrets.token_hex(8)), self._path("names", directory_of(name))
        os.mkdir(fresh, 0o700)
        try:
            self._write(fresh, name, stored)
            _touch(f"{fresh}/{stored.version}~{stored.token}")
            os.rename(fresh, home)
        except OSError as error:
            self._clear(fresh)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EACCES):
                raise
            self._look_anew(home)  # there is something that this client may not list yet
            if self._state(name) == (stored.version, stored.token):
                return stored  # ours: the answer was lost, and the client has repeated the rename
            self._bury(home)
            return None
        return stored

    def discard(self, name: str, stored: Stored) -> None:
        """Remove what an empty record has left; nothing happens where it is not empty any more."""
        home = self._path("names", directory_of(name))
        with suppress(FileNotFoundError), self._deciding(directory_of(name)):
            os.rename(f"{home}/{stored.version}~{stored.token}", f"{home}/{GONE}~{secrets.token_hex(8)}")
            self._bury(home)

    def leftovers(self, name: str) -> tuple[str, ...]:
        """Data in a name's directory where there is nothing else: neither a state nor the mark that it is over."""
        for look in range(2):
            data = sorted(self._listed(self._path("names", directory_of(name))))
            if not all(entry.startswith(DATA) for entry in data):
                return ()
            if data and not look:
                self.refresh(name)  # a listing that a client remembers is none
        return tuple(data)

    def remove_leftovers(self, name: str, data: Iterable[str]) -> None:
        """The directory goes with them, unless there is anything else in it."""
        with suppress(OSError), self._deciding(directory_of(name)):
            self._empty(self._path("names", directory_of(name)), data)

    def _write(self, directory: str, name: str, stored: Stored) -> None:
        if stored.token.startswith(NONE):
            return
        path = f"{directory}/{DATA}{stored.token}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:  # closed before its name says that it counts
            json.dump({"name": name, "record": stored.record.to_json()}, file)
            file.flush()
            os.fsync(fd)  # else after a power cut there could be the name without them

    def refresh(self, name: str) -> None:
        """Have this node's client look anew at the directory of a name."""
        self._look_anew(self._path("names", directory_of(name)))

    @staticmethod
    def _look_anew(directory: str) -> None:
        """Have this node's client forget what it knows of a directory: it changes it."""
        probe = f"{directory}/{LOOK}{secrets.token_hex(4)}"
        with suppress(OSError):
            _touch(probe)
            os.unlink(probe)

    @staticmethod
    def _remove(path: str) -> None:
        with suppress(OSError):
            os.unlink(path)

    def _bury(self, home: str) -> None:
        """Empty and remove a name's directory if it is over.

        Another may do the same, and a third make a new one in its place, at any moment.  So only such entries are
        removed as were listed together with the state that it is over: no other directory has entries of these names.
        """
        with suppress(OSError):
            entries = os.listdir(home)
            if any(entry.startswith(GONE) for entry in entries):
                self._empty(home, [entry for entry in entries if not STATE.fullmatch(entry)])

    def _clear(self, directory: str) -> None:
        """Empty and remove a directory that nobody else uses."""
        with suppress(OSError):
            self._empty(directory, os.listdir(directory))

    def _empty(self, directory: str, entries: Iterable[str]) -> None:
        for entry in sorted(entries, key=lambda entry: entry.startswith(GONE)):
            self._remove(f"{directory}/{entry}")
        os.rmdir(directory)

    # --------------------------------------------------------------- leases

    def join(self, node: str) -> None:
        """A new node, with its lease and the place for what others want of it."""
        home = self._path("nodes", node)
        os.mkdir(home, 0o700)
        self.node = node
        try:
            os.mkdir(f"{home}/wanted", 0o700)
            with open(f"{home}/process", "x", encoding="utf-8") as file:
                json.dump(dict(self._identity), file)
            self._move_in(home)
            _touch(f"{home}/0")
        except OSError:
            self._remove_node(node)
            raise

    def _move_in(self, home: str) -> None:
        """What a node has in its directory before others take it for one."""

    def renew(self, node: str, count: int) -> bool:
        """From `count` to the next; False when others have ended the lease."""
        home = self._path("nodes", node)
        with self._deciding(node):
            try:
                os.rename(f"{home}/{count}", f"{home}/{count + 1}")
            except FileNotFoundError:
                return self.heartbeat(node) == str(count + 1)
        return True

    def heartbeat(self, node: str, *, anew: bool = False) -> str | None:
        """What a node's lease has come to: its count, or `ended`; None when there is nothing of it."""
        if anew:
            self._look_anew(self._path("nodes", node))
        for _ in range(LIST_ATTEMPTS):
            try:
                entries = os.listdir(self._path("nodes", node))
            except FileNotFoundError:
                self._require_place()
                self._look_anew(self._path("nodes"))
                continue
            counts = [entry for entry in entries if entry.isdigit() or entry == ENDED]
            if counts:
                return max(counts, key=lambda entry: (entry == ENDED, int(entry) if entry.isdigit() else 0))
            # It may have been listed while it was being made, and be kept so for longer than a lease: that must not
            # pass for a node without one.
            self._look_anew(self._path("nodes", node))
        return None

    def process_of(self, node: str) -> ProcessIdentity:
        """Read once: it never changes."""
        known = self._processes.get(node)
        if known is None:
            try:
                with open(self._path("nodes", node, "process"), encoding="utf-8") as file:
                    known = dict(json.load(file))
            except (OSError, ValueError):
                return {}
            if len(self._processes) >= MOST_PROCESSES:
                self._processes.clear()
            self._processes[node] = known
        return known

    def has_died(self, node: str) -> bool:
        """Whether a node's process is known to have ended."""
        identity = self.process_of(node)
        return bool(identity) and self._has_died(identity)

    def homes(self) -> list[str]:
        """The directories of all names of which anything is on record."""
        home = self._path("names")
        self._look_anew(home)
        return [f"{home}/{directory}" for directory in self._listed(home)]

    def names_of(self, homes: Iterable[str]) -> list[str]:
        """What these directories are about, where they are still there."""
        return [name for name in map(self._name_of, homes) if name is not None]

    def _name_of(self, home: str) -> str | None:
        """What a directory is about.

        Data that are listed can be gone, and what came in their place is not in a listing that a client remembers.
        """
        for attempt in range(LIST_ATTEMPTS):
            if attempt:
                self._look_anew(home)
            data = [entry for entry in self._listed(home) if entry.startswith(DATA)]
            if attempt and not data:
                return None
            for entry in data:
                with suppress(OSError, ValueError, KeyError), open(f"{home}/{entry}", encoding="utf-8") as file:
                    return str(json.load(file)["name"])
        return None

    @staticmethod
    def _listed(directory: str) -> list[str]:
        """What is in a directory, if it is there, but for what a client is made to look anew by."""
        with suppress(FileNotFoundError):
            return [entry for entry in os.listdir(directory) if not entry.startswith(LOOK)]
        return []

    def others(self, node: str) -> list[str]:
        """All other nodes that have left anything; what dead ones have left beside them is removed."""
        before = self._now(node) - BURIED_SECONDS
        for part in ("nodes", "names"):
            self._remove_looks(self._path(part), before)
        return [other for other in self._listed(self._path("nodes")) if other != node]

    def end_the_dead(self, others: Iterable[str]) -> None:
        """Those of them whose processes are known to have died."""
        for other in others:
            if self.has_died(other) and (heartbeat := self.heartbeat(other)) not in (None, ENDED):
                self.end(other, str(heartbeat))

    def bury(self, node: str, others: Iterable[str]) -> None:
        """Remove what is left of nodes that are gone, and have been for long."""
        now = self._now(node)
        for other in others:
            home, heartbeat = self._path("nodes", other), self.heartbeat(other)
            with suppress(OSError):
                if heartbeat in (None, ENDED):
                    ended = os.stat(home if heartbeat is None else f"{home}/{ENDED}").st_ctime
                    if now - ended > BURIED_SECONDS:
                        self._remove_node(other)

    def _now(self, node: str) -> float:
        """By the filesystem's clock: it renamed this node's own heartbeat just now."""
        home = self._path("nodes", node)
        return os.stat(f"{home}/{self.heartbeat(node)}").st_ctime

    def _remove_node(self, node: str) -> None:
        self._clear(self._path("nodes", node, "wanted"))
        self._clear(self._path("nodes", node))

    def unfinished(self) -> list[str]:
        """First states of names that are not in their place yet."""
        return self._listed(self._path("new"))[:MOST_UNFINISHED]

    def remove_unfinished(self, entry: str) -> None:
        """Whoever is about to rename it finds that it is gone, and not that a part of it is."""
        path = self._path("new", entry)
        over = path if entry.startswith(GONE) else self._path("new", f"{GONE}~{entry}")
        with suppress(OSError):
            os.rename(path, over)
            self._clear(over)

    @staticmethod
    def _remove_looks(directory: str, before: float) -> None:
        """What nodes have left that died while they had their client look anew."""
        for entry in os.listdir(directory):
            path = f"{directory}/{entry}"
            with suppress(OSError):
                if entry.startswith(LOOK) and os.stat(path).st_ctime < before:
                    os.unlink(path)

    def end(self, node: str, heartbeat: str) -> bool:
        """End a lease that was seen to be at `heartbeat`; False when it has been renewed since."""
        home = self._path("nodes", node)
        with self._deciding(node):
            try:
                os.rename(f"{home}/{heartbeat}", f"{home}/{ENDED}")
            except FileNotFoundError:
                self._look_anew(home)  # another's end of it must not stay hidden
                return self.heartbeat(node) in (ENDED, None)
        return True

    # -------------------------------------------------------------- notices

    def notify(self, node: str, name: str) -> None:
        with suppress(FileNotFoundError, FileExistsError):
            self._put(self._path("nodes", node, "wanted", directory_of(name)), name)

    @staticmethod
    def _put(path: str, text: str) -> None:
        """A file that is there as a whole or not at all."""
        fd = os.open(path + ".new", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.rename(path + ".new", path)

    def notices(self, node: str, *, anew: bool = False) -> list[str]:
        """Names that others want of a node; each is given once."""
        home, names = self._path("nodes", node, "wanted"), []
        if anew:
            self._look_anew(home)
        for entry in self._listed(home):
            if not entry.endswith(".new"):
                with suppress(FileNotFoundError):
                    with open(f"{home}/{entry}", encoding="utf-8", errors="surrogateescape") as file:
                        names.append(file.read())
                    os.unlink(f"{home}/{entry}")
        return names

    def answer(self, node: str, question: str, text: str) -> None:
        self._put(self._path("nodes", node, ANSWER + question), text)

    def take_answer(self, node: str, question: str, *, anew: bool = False) -> str | None:
        home = self._path("nodes", node)
        if anew:
            self._look_anew(home)
        try:
            with open(f"{home}/{ANSWER}{question}", encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        self._remove(f"{home}/{ANSWER}{question}")
        return text


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


class _Call(Generic[T]):
    """What a thread does, which may be given up."""

    def __init__(self, act: Act, function: Callable[[], T]) -> None:
        self._act = act
        self._function = function
        self.is_running = False

    def run(self) -> T:
        self.is_running = True
        try:
            return self._act(self._function)
        finally:
            self.is_running = False


class LeasefileBackend:
    """One node's view (backend.LockBackend)."""

    tells_changes = False

    def __init__(self, site: Site) -> None:
        self._site = site
        self._limiter = trio.CapacityLimiter(MAX_THREADS)
        self._own_limiter = trio.CapacityLimiter(MAX_OWN_THREADS)
        self._hanging: dict[str, _Call[Any]] = {}  # calls that were given up, by what they are about
        self._sightings = Sightings(site.terms)
        self._lease = OwnLease(site.terms)
        self._files: Files | None = None
        self._former: list[str] = []  # this node's names, with the one that it has
        self._known, self._unfinished = set[str](), set[str]()  # nodes and first states, as listed last
        self._to_look_at: list[str] = []
        self._tidied_as = ""
        self._damaged: dict[str, set[str]] = {}  # records, by their ids, and the nodes that could be on them
        self._count = 0
        self._wanted: list[str] = []
        self._used = float("-inf")  # when a name that is delegated to this node was used last
        self._uses = site.uses()  # as counted when it was last looked for notices
        self._expecting = trio.Event()  # one has been used since it was last looked for notices
        self.node = ""

    def _open(self) -> Files:
        return Files(self._site.root, self._site.identity, self._site.has_died)

    async def _call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """In a thread; BackendError for whatever goes wrong, also where there is no answer in time.

        What a call is about is its first argument: while one for it hangs there is no other.  So a directory that hangs
        takes few of the threads.
        """
        about = str(arguments[0]) if arguments else function.__name__
        return await self._run(about, self._limiter, partial(function, *arguments, **options))

    async def _call_own(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same for this node's own lease, which other calls that hang must not cost."""
        return await self._run("", self._own_limiter, partial(function, *arguments))

    async def _run(self, about: str, limiter: trio.CapacityLimiter, function: Callable[[], T]) -> T:
        hanging = self._hanging.get(about)
        if hanging is not None and hanging.is_running:
            raise BackendError(f"{self._site.root} does not answer to an earlier call")
        self._hanging.pop(about, None)
        call = _Call(self._site.act, function)
        try:
            with trio.fail_after(CALL_SECONDS):
                return await trio.to_thread.run_sync(call.run, abandon_on_cancel=True, limiter=limiter)
        except trio.TooSlowError:
            if call.is_running:  # it may also have had no thread
                self._hanging[about] = call
            raise BackendError(f"{self._site.root} does not answer") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendError(f"{self._site.root}: {error}") from None
        except RuntimeError as error:  # there are no more threads to be had
            raise BackendError(str(error)) from None

    @property
    def files(self) -> Files:
        if self._files is None:
            raise BackendError(f"{self._site.root} is not in use yet")
        return self._files

    # --------------------------------------------------------------- leases

    async def join(self) -> None:
        """Become a node of the cluster, with a new name."""
        if self._files is None:
            self._files = await self._call_own(self._open)
        node, sent = secrets.token_hex(8), boottime()
        self._former = [*self._former[-MOST_FORMER:], node]
        await self._call_own(self.files.join, node)
        self.node, self._count, self._wanted = node, 0, []
        self._lease.renew(sent)

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
        """End this node's own lease: what it held is free at once."""
        await self._call_own(self.files.end, self.node, str(self._count))

    def lease_ends(self) -> float:
        return self._lease.ends()

    async def tidy_up(self) -> None:
        """Some of the others are looked at each time: of a thousand nodes, each would else look at a thousand.

        Nodes that do not renew are ended, as by who waits for them: so also those of hosts that never come back have
        ended at some time, and are buried a day later.  The first time it is about those before this one on its host.
        """
        if self._tidied_as != self.node:
            others, self._tidied_as = await self._call(self.files.others, self.node), self.node
            for at in range(0, len(others), HOMES_AT_ONCE):
                await self._call(self.files.end_the_dead, others[at : at + HOMES_AT_ONCE])
        if not self._to_look_at:
            self._to_look_at = await self._call(self.files.others, self.node)
            random.shuffle(self._to_look_at)
            self._sightings.forget(self._known - set(self._to_look_at))
            self._known = set(self._to_look_at)
        some, self._to_look_at = self._to_look_at[:LOOKED_AT_ONCE], self._to_look_at[LOOKED_AT_ONCE:]
        own = {node for node in self._former if node != self.node}  # lost, or it was not known that it had joined
        gone = await self.gone({*some, *own})
        self._former = [node for node in self._former if node not in gone]
        await self._call(self.files.bury, self.node, gone)
        await self._remove_unfinished()

    async def _remove_unfinished(self) -> None:
        """What nodes have left that died while they made a name's first state."""
        before = boottime()
        entries = await self._call(self.files.unfinished)
        keys = {f"new/{entry}": entry for entry in entries}
        self._sightings.forget(self._unfinished - keys.keys())
        self._unfinished = set(keys)
        for key, entry in keys.items():
            if self._sightings.see(key, entry, before, boottime()):
                await self._call(self.files.remove_unfinished, entry)

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
            if not await self._are_gone(name, damaged, before):
                raise
        log.warning("the record of %r was damaged; all are gone who could be on it", name)
        return replace(damaged, record=NameRecord(broken=(self.node,)))  # what this node has of it is lost

    async def _are_gone(self, name: str, damaged: Stored, before: float) -> bool:
        """Those who were there when this node first saw the damage: it never changes, so nobody comes to it later."""
        if damaged.token not in self._damaged and len(self._damaged) >= MOST_DAMAGED:
            self._damaged.clear()
        others = self._damaged.setdefault(damaged.token, set(damaged.record.broken) - {self.node})
        is_lasting = self._sightings.see(f"names/{directory_of(name)}", damaged.token, before, boottime())
        return is_lasting and not others - await self.gone(others)

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
        data, key = await self._call(self.files.leftovers, name), f"names/{directory_of(name)}"
        if not data:
            self._sightings.forget({key})
        elif self._sightings.see(key, data, before, boottime()):
            await self._call(self.files.remove_leftovers, name, data)
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
        for at in range(0, len(homes), HOMES_AT_ONCE):
            found += await self._call(self.files.names_of, homes[at : at + HOMES_AT_ONCE])
        return found

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
        self._used = trio.current_time()
        self._expecting.set()

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
        that are only counted are noticed at a look, and do not make for one.
        """
        shortest, longest = NOTICE_SECONDS
        await trio.sleep(shortest)
        uses = self._site.uses()
        if uses != self._uses:
            self._uses, self._used = uses, trio.current_time()
        with trio.move_on_after(min(NOTICE_SHARE * (trio.current_time() - self._used), longest)):
            await self._expecting.wait()


class Following:
    """Looks for changes of one record (backend.Follower)."""

    def __init__(self, name: str, files: Files, call: Callable[..., Awaitable[Any]], *, stale_listings: bool) -> None:
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
                    return cast(Stored, stored)
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
