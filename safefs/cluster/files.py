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
import os
import re
import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress

from safefs.cluster.backend import NAMELESS, DamagedError, HasDied, ProcessIdentity, Stored, UnreadableError
from safefs.cluster.record import ForeignRecordError, NameRecord
from safefs.errors import MALFORMED

MOST_PROCESSES = 10_000  # that are remembered
MOST_DAMAGED = 100  # records whose names are
LIST_ATTEMPTS = 5  # a listing can miss a file that is renamed meanwhile
LOST = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)  # what a filesystem says of bytes that it has no more

NODE, HOME = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{32}")  # names of nodes, and of directories of names
STATE = re.compile(r"(\d+)~([0-9a-f]+|none[0-9a-f]*)")
NONE = "none"  # how the id of an empty record begins: a rename that comes late must not find another one in its place
DATA, LOOK = "data~", "look~"  # how the names of a record's bytes begin, and of what is made to have a client look anew
GONE = "gone"  # the state after which there is none: gone~ID, so that nobody takes it for that of a later directory
ENDED = "ended"
ANSWER = "answer~"


def directory_of(name: str) -> str:
    """A name's directory: names can be longer than a file name."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _latest(entries: Iterable[str]) -> tuple[int, str] | None:
    """Version and id of the state that counts in a name's directory."""
    return max(((int(found[1]), found[2]) for entry in entries if (found := STATE.fullmatch(entry))), default=None)


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
        self._damaged: dict[str, str] = {}  # names, by their directories, in which they could not be read
        self._has_died = has_died
        for part in ("", "names", "nodes", "new"):
            os.makedirs(os.path.join(root, part), mode=0o700, exist_ok=True)

    def path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def _deciding(self, what: str) -> AbstractContextManager[None]:
        """Around what decides about a name or a node: a rename needs nothing more (but safefs/cluster/ofd.py)."""
        assert what
        return nullcontext()

    def _require_place(self) -> None:
        """OSError where the backing is not mounted, or nothing of ours is there: then what is missing means nothing."""
        own = self.path("nodes", self.node)
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
                entries = os.listdir(self.path("names", directory_of(name)))
            except FileNotFoundError:
                if is_missing:
                    return None
                is_missing = True
                self._require_place()
                continue
            is_missing = False
            if (state := _latest(entries)) is not None:
                return state
        return None

    def read(self, name: str) -> Stored:
        """DamagedError where the data of a record are none, UnreadableError where they are another version's."""
        seen = set[tuple[int, str]]()
        for _ in range(LIST_ATTEMPTS):
            state = self._state(name)
            if state is None:
                return Stored()
            version, token = state
            if token.startswith(NONE):
                return Stored(version, token=token)
            try:
                return self._read_data(name, version, token)
            except FileNotFoundError as error:
                missing = error
                seen.add(state)
                self.refresh(name)  # it has been replaced, just now or behind a cached listing
        if len(seen) > 1:
            raise OSError(errno.EAGAIN, "the record of a name changes faster than it can be read")
        raise self._damage(name, version, token, missing)  # a state goes before its data

    def _read_data(self, name: str, version: int, token: str) -> Stored:
        path = self.path("names", directory_of(name), DATA + token)
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            if data["name"] == name:
                return Stored(version, NameRecord.from_json(data["record"]), token)
        except ForeignRecordError as error:
            raise UnreadableError(self._unreadable(name, error)) from None
        except MALFORMED as error:
            raise self._damage(name, version, token, error) from None
        except OSError as error:
            if error.errno not in LOST:
                raise
            raise self._damage(name, version, token, error, may_pass=True) from None
        raise UnreadableError(self._unreadable(name, "it is about another name"))

    def _unreadable(self, name: str, why: object) -> str:
        return f"{self.path('names', directory_of(name))}: the record of {name!r} cannot be read: {why}"

    def _damage(self, name: str, version: int, token: str, why: Exception, *, may_pass: bool = False) -> DamagedError:
        """The name is remembered: its record does not tell it any more."""
        if len(self._damaged) >= MOST_DAMAGED:
            self._damaged.clear()
        self._damaged[self.path("names", directory_of(name))] = name
        stored = Stored(version, NameRecord(broken=tuple(self.nodes())), token)
        return DamagedError(self._unreadable(name, why), stored, may_pass=may_pass)

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
        home, token = self.path("names", directory_of(name)), stored.token
        try:
            self._write(home, name, stored)
        except FileNotFoundError:
            return None  # the record was empty, and its directory is removed
        except OSError:
            self._remove(f"{home}/{DATA}{token}")  # they do not count, and whoever waits tries again and again
            raise
        try:
            os.rename(f"{home}/{old.version}~{old.token}", f"{home}/{stored.version}~{token}")
        except FileNotFoundError:
            # Of another's rename, or of our own whose answer was lost and that the client has repeated.  Another
            # thread may have had the directory listed before that.
            self.refresh(name)
            state = self._state(name)
            if state == (old.version, old.token):
                # It was not there for the rename: so there was no space, say, for what has the client look anew.
                raise OSError(errno.EAGAIN, f"{home} is listed as it was before a change") from None
            if state != (stored.version, token):
                self._remove(f"{home}/{DATA}{token}")
                return None
        self._remove(f"{home}/{DATA}{old.token}")
        return stored

    def _create(self, name: str, stored: Stored) -> Stored | None:
        """The first state of a name comes with its directory: of several, one can be renamed to the place."""
        fresh, home = self.path("new", secrets.token_hex(8)), self.path("names", directory_of(name))
        os.mkdir(fresh, 0o700)
        try:
            self._write(fresh, name, stored)
            _touch(f"{fresh}/{stored.version}~{stored.token}")
            os.rename(fresh, home)
        except OSError as error:
            self.clear(fresh)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EACCES):
                raise
            self.look_anew(home)  # there is something that this client may not list yet
            if self._state(name) == (stored.version, stored.token):
                return stored  # ours: the answer was lost, and the client has repeated the rename
            self._bury(home)
            return None
        return stored

    def discard(self, name: str, stored: Stored) -> None:
        """Remove what an empty record has left; nothing happens where it is not empty any more."""
        with suppress(FileNotFoundError):
            self._retire(self.path("names", directory_of(name)), f"{stored.version}~{stored.token}")

    def discard_empty(self, home: str, before: float) -> None:
        """The same for a name that nobody can tell, if its record has been empty since `before` (its clock)."""
        for entry in self.listed(home):
            state = STATE.fullmatch(entry)
            if state and state[2].startswith(NONE):
                with suppress(OSError):
                    if os.stat(f"{home}/{entry}").st_ctime < before:
                        self._retire(home, entry)

    def _retire(self, home: str, state: str) -> None:
        with self._deciding(home.rpartition("/")[2]):
            os.rename(f"{home}/{state}", f"{home}/{GONE}~{secrets.token_hex(8)}")
            self._bury(home)

    def leftovers(self, name: str) -> tuple[str, ...]:
        """What is in a name's directory where there is neither a state nor the mark that it is over."""
        for look in range(2):
            found = sorted(self.listed(self.path("names", directory_of(name))))
            if any(STATE.fullmatch(entry) or entry.startswith(GONE) for entry in found):
                return ()
            if found and not look:
                self.refresh(name)  # a listing that a client remembers is none
        return tuple(found)

    def remove_leftovers(self, name: str, data: Iterable[str]) -> None:
        """The directory goes with them, unless there is anything else in it."""
        with suppress(OSError), self._deciding(directory_of(name)):
            self._empty(self.path("names", directory_of(name)), data)

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
        self.look_anew(self.path("names", directory_of(name)))

    @staticmethod
    def look_anew(directory: str) -> None:
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
        """Empty and remove a name's directory if it is over, or has nothing in it but what a node left that died.

        Another may do the same, and a third make a new one in its place, at any moment.  So only such entries are
        removed as were listed together with the state that it is over: no other directory has entries of these names.
        """
        with suppress(OSError):
            entries = os.listdir(home)
            is_over = any(entry.startswith(GONE) for entry in entries)
            if is_over or all(entry.startswith(LOOK) for entry in entries):
                self._empty(home, [entry for entry in entries if not STATE.fullmatch(entry)])

    def clear(self, directory: str) -> None:
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
        home = self.path("nodes", node)
        os.mkdir(home, 0o700)
        self.node = node
        try:
            os.mkdir(f"{home}/wanted", 0o700)
            with open(f"{home}/process", "x", encoding="utf-8") as file:
                json.dump(dict(self._identity), file)
            self._move_in(home)
            _touch(f"{home}/0")
        except OSError:
            self.remove_node(node)
            raise

    def _move_in(self, home: str) -> None:
        """What a node has in its directory before others take it for one."""

    def renew(self, node: str, count: int) -> bool:
        """From `count` to the next; False when others have ended the lease."""
        home = self.path("nodes", node)
        with self._deciding(node):
            try:
                os.rename(f"{home}/{count}", f"{home}/{count + 1}")
            except FileNotFoundError:
                return self.heartbeat(node) == str(count + 1)
        return True

    def heartbeat(self, node: str, *, anew: bool = False) -> str | None:
        """What a node's lease has come to: its count, or `ended`; None when there is nothing of it."""
        if anew:
            self.look_anew(self.path("nodes", node))
        for _ in range(LIST_ATTEMPTS):
            try:
                entries = os.listdir(self.path("nodes", node))
            except FileNotFoundError:
                self._require_place()
                self.look_anew(self.path("nodes"))
                continue
            counts = [entry for entry in entries if entry.isdigit() or entry == ENDED]
            if counts:
                return max(counts, key=lambda entry: (entry == ENDED, int(entry) if entry.isdigit() else 0))
            # It may have been listed while it was being made, and be kept so for longer than a lease: that must not
            # pass for a node without one.
            self.look_anew(self.path("nodes", node))
        return None

    def process_of(self, node: str) -> ProcessIdentity:
        """Read once: it never changes."""
        known = self._processes.get(node)
        if known is None:
            try:
                with open(self.path("nodes", node, "process"), encoding="utf-8") as file:
                    known = dict(json.load(file))
            except (OSError, *MALFORMED):
                return {}
            if len(self._processes) >= MOST_PROCESSES:
                self._processes.clear()
            self._processes[node] = known
        return known

    def has_died(self, node: str) -> bool:
        """Whether a node's process is known to have ended."""
        identity = self.process_of(node)
        return bool(identity) and self._has_died(identity)

    def nodes(self) -> list[str]:
        """All that have left anything; what else is there (.DS_Store, say) is nothing of ours."""
        return [entry for entry in self.listed(self.path("nodes")) if NODE.fullmatch(entry)]

    def homes(self) -> list[str]:
        """The directories of all names of which anything is on record; what else is there is nothing of ours."""
        home = self.path("names")
        self.look_anew(home)
        return [f"{home}/{entry}" for entry in self.listed(home) if HOME.fullmatch(entry)]

    def names_of(self, homes: Iterable[str]) -> list[str]:
        """What these directories are about, where they are still there."""
        return [name for name in map(self._name_of, homes) if name is not None]

    def _name_of(self, home: str) -> str | None:
        """What a directory is about.

        Data that are listed can be gone, and what came in their place is not in a listing that a client remembers.
        Of several data some can be on their way to the disk; so they are damaged, or missing, only where none can be
        read as long as the record is the same.
        """
        seen = set[tuple[int, str] | None]()
        for attempt in range(LIST_ATTEMPTS):
            if attempt:
                self.look_anew(home)
            entries = self.listed(home)
            state = _latest(entries)
            data = {entry for entry in entries if entry.startswith(DATA)}
            if state is not None and not state[1].startswith(NONE):
                data.add(DATA + state[1])
            if attempt and not data:
                return None
            for entry in data:
                try:
                    with open(f"{home}/{entry}", encoding="utf-8") as file:
                        return str(json.load(file)["name"])
                except (OSError, *MALFORMED):
                    pass
            if attempt:
                seen.add(state)
        return self._damaged.get(home, NAMELESS + home) if len(seen) == 1 else None

    @staticmethod
    def listed(directory: str) -> list[str]:
        """What is in a directory, if it is there, but for what a client is made to look anew by."""
        with suppress(FileNotFoundError):
            return [entry for entry in os.listdir(directory) if not entry.startswith(LOOK)]
        return []

    def remove_node(self, node: str) -> None:
        self.clear(self.path("nodes", node, "wanted"))
        self.clear(self.path("nodes", node))

    def end(self, node: str, heartbeat: str) -> bool:
        """End a lease that was seen to be at `heartbeat`; False when it has been renewed since."""
        home = self.path("nodes", node)
        with self._deciding(node):
            try:
                os.rename(f"{home}/{heartbeat}", f"{home}/{ENDED}")
            except FileNotFoundError:
                self.look_anew(home)  # another's end of it must not stay hidden
                return self.heartbeat(node) in (ENDED, None)
        return True

    # -------------------------------------------------------------- notices

    def notify(self, node: str, name: str) -> None:
        with suppress(FileNotFoundError, FileExistsError):
            self._put(self.path("nodes", node, "wanted", directory_of(name)), name)

    @staticmethod
    def _put(path: str, text: str) -> None:
        """A file that is there as a whole or not at all."""
        fd = os.open(path + ".new", os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.rename(path + ".new", path)

    def notices(self, node: str, *, anew: bool = False) -> list[str]:
        """Names that others want of a node; each is given once."""
        home = self.path("nodes", node, "wanted")
        if anew:
            self.look_anew(home)
        paths = [f"{home}/{entry}" for entry in self.listed(home) if not entry.endswith(".new")]
        return [name for name in map(self._take_notice, paths) if name is not None]

    @staticmethod
    def _take_notice(path: str) -> str | None:
        """What is in a notice, which is removed; None where that fails, and the next look may take it.

        Some never can be read (the directories that a NAS puts into all others); these must not hide the rest.
        """
        with suppress(OSError):
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                name = file.read()
            with suppress(FileNotFoundError):
                os.unlink(path)
            return name
        return None

    def answer(self, node: str, question: str, text: str) -> None:
        self._put(self.path("nodes", node, ANSWER + question), text)

    def take_answer(self, node: str, question: str, *, anew: bool = False) -> str | None:
        home = self.path("nodes", node)
        if anew:
            self.look_anew(home)
        try:
            with open(f"{home}/{ANSWER}{question}", encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        self._remove(f"{home}/{ANSWER}{question}")
        return text
