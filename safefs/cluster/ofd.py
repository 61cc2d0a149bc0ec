"""Lease files whose steps are decided under the backing's own locks: fcntl(2), by open file description.

For filesystems on which two probes have found that such locks keep other nodes out (safefs/verdict.py).  Two things
stand between two nodes and one lock, and either is enough:

- Each step on a record or on a lease is taken under an exclusive lock on a byte of `serial`.  So renames do not race,
  and it need not be the filesystem that decides a race for a name.
- The steps are still those of safefs/cluster/files.py, renames from a name that must be there.  A lock is no cache
  barrier: what is read under one can be old (Gluster), so nothing that was read decides, but whether the old name is
  there, on the server.  And a lock can be lost without a word (a client that was evicted, or frozen): who goes on as if
  he had it finds that the name has changed.

Nodes with lease files alone and nodes with this use the same files and can be mixed where the filesystem decides races.

While it lives a node holds a lock on its own file `nodes/NODE/alive~CLIENT`, which the lock server takes away from a
client that it takes for dead.  A node that finds its own lock gone gives its lease up.  Others do not take a lock that
is gone for a death: of a client that was cut off the process can go on until its own lease is over, so they wait for
that, as they do for a frozen node, whose lock stays held.  But who joins, and sees a node renew its lease whose lock
looks free from here, has found two clients between which locks do not exclude, and takes no part.

Open file descriptions, because traditional record locks end with any close of the file in the process.  A FUSE daemon
can turn ours into such locks of its own (bindfs does), and then our close of a file ends what its mount holds there.
So files that something is locked in stay open, and no second descriptor of theirs is closed, nor are files looked at
that a node on the same client holds a lock on.  There is no other lock to fall back to: where these fail, the call
fails.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import trio
import xxhash

from safefs.cluster.backend import BackendError, HasDied, LeaseLostError, ProcessIdentity
from safefs.cluster.calls import batches
from safefs.cluster.files import ENDED, Files
from safefs.cluster.leasefile import LeasefileBackend, Site
from safefs.lease import Terms, boottime

log = logging.getLogger(__name__)

LOCK_SECONDS = 1.0  # for a byte that another holds; less than a call may take
PAUSE_SECONDS = (0.0005, 0.02)  # between attempts, at first and at most
RANGE = (1 << 62) - 1
WITNESS_RENEWALS = 1.5  # how long a node that joins looks whether another renews its lease
LOOKS = 12  # meanwhile

ALIVE = "alive~"  # and the client: the name of the file that a node holds a lock on

F_OFD_GETLK, F_OFD_SETLK = 36, 37
_FLOCK = "hhqqi4x"


def try_lock(fd: int, byte: int) -> bool:
    """Whether the description has the byte now.  OSError where there are no locks."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def unlock(fd: int, byte: int) -> None:
    """Whoever of the process has locked it through this description."""
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def is_locked(fd: int) -> bool:
    """Whether another open file description holds the first byte."""
    answer = fcntl.fcntl(fd, F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


class LockedFiles(Files):
    """Lease files, each step under a lock; for worker threads, which are never kept longer than `LOCK_SECONDS`.

    A node that is frozen while it holds a byte keeps it.  Whoever has found it held for longer than a lease and its
    delay goes on without: the lease of the one who holds it is over by then, and a rename that he wakes up with finds
    its source gone.
    """

    def __init__(self, root: str, identity: ProcessIdentity, has_died: HasDied, terms: Terms, client: str) -> None:
        super().__init__(root, identity, has_died)
        self._terms = terms
        self._client = client
        self._serial = os.open(self.path("serial"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._mutex = threading.Lock()
        self._bytes: set[int] = set()  # that a thread of ours holds or tries
        self._held_up: dict[str, tuple[float, float]] = {}  # since when something was found held, and when last
        self._alive = self._look = -1  # this node's own file: the description with the lock, and one that looks

    @contextmanager
    def _deciding(self, what: str) -> Iterator[None]:
        byte = xxhash.xxh3_64_intdigest(what.encode()) & RANGE
        held = self._lock(byte, what)
        try:
            yield
        finally:
            if held:
                self._release(byte)

    def _lock(self, byte: int, what: str) -> bool:
        """Take a byte; False where it is passed instead.  TimeoutError (ETIMEDOUT) when another holds it."""
        start, pause = boottime(), PAUSE_SECONDS[0]
        while not self._attempt(byte):
            if boottime() - start > LOCK_SECONDS:
                if self._held_too_long(what, start):
                    log.warning("going on without the lock of %s, which has been held for longer than a lease", what)
                    return False
                raise TimeoutError(errno.ETIMEDOUT, f"another node holds the lock of {what}")
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS[1])
        self._held_up.pop(what, None)
        return True

    def _attempt(self, byte: int) -> bool:
        """Threads share the description, which excludes none of them."""
        with self._mutex:
            if byte in self._bytes:
                return False
            self._bytes.add(byte)
        held = False
        try:
            held = try_lock(self._serial, byte)
        finally:
            if not held:
                self._bytes.discard(byte)
        return held

    def _release(self, byte: int) -> None:
        try:
            unlock(self._serial, byte)
        finally:
            self._bytes.discard(byte)

    def _held_too_long(self, what: str, start: float) -> bool:
        since, last = self._held_up.get(what, (start, start))
        if start - last > self._terms.gone_seconds:  # nobody has looked for so long: another matter
            since = start
        now = boottime()
        self._held_up[what] = since, now
        return now - since > self._terms.gone_seconds

    # --------------------------------------------------------------- nodes

    def _move_in(self, home: str) -> None:
        """The lock is there before the node is."""
        path = f"{home}/{ALIVE}{self._client}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(fd, 0):
                raise OSError(errno.EAGAIN, "a new file is locked")
            look = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.close(fd)
            raise
        self.let_go()
        self._alive, self._look = fd, look

    def let_go(self) -> None:
        """This node lives no longer."""
        descriptors = [fd for fd in (self._alive, self._look) if fd >= 0]
        self._alive = self._look = -1
        for fd in descriptors:
            with suppress(OSError):
                unlock(fd, 0)  # the close alone would do it once no copy of the descriptor is left
            os.close(fd)

    def keeps_its_lock(self) -> bool:
        """Whether this node's own lock is still there, as another open file description sees it.

        A client whose locks were taken away can go on showing them to itself.  Then its node goes on, by its lease.
        """
        return self._look >= 0 and is_locked(self._look)

    def unlocked(self, nodes: Iterable[str]) -> dict[str, str]:
        """Those on other clients whose locks look free from here, not known to be dead, and their heartbeats."""
        found = {}
        for node in nodes:
            # The heartbeat first: a node that ends meanwhile unlocks after that.
            heartbeat = self.heartbeat(node)
            if heartbeat not in (None, ENDED) and self._looks_free(node) and not self.has_died(node):
                found[node] = str(heartbeat)
        return found

    def _looks_free(self, node: str) -> bool:
        """False for a node on this client, with which the kernel settles it, and for one with lease files alone."""
        with suppress(FileNotFoundError):
            for entry in os.listdir(self.path("nodes", node)):
                if entry.startswith(ALIVE) and entry != f"{ALIVE}{self._client}":
                    fd = os.open(self.path("nodes", node, entry), os.O_RDWR | os.O_CLOEXEC)
                    try:
                        return not is_locked(fd)
                    finally:
                        os.close(fd)
        return False


class NativeBackend(LeasefileBackend):
    """One node's view (backend.LockBackend)."""

    _locked: LockedFiles

    def __init__(self, site: Site, client: str) -> None:
        """`client` is which client of the backing this is: the same for all nodes on it, and no other's."""
        super().__init__(site)
        self._client = client

    def _open(self) -> Files:
        site = self._site
        self._locked = LockedFiles(site.root, site.identity, site.has_died, site.terms, self._client)
        return self._locked

    async def _enter(self, node: str) -> tuple[float, int]:
        """BackendError where another one lives whose lock is not seen here."""
        await super()._enter(node)
        witness = await self._contradiction()
        if witness:
            host = (await self.process_of(witness)).get("host", "an unknown host")
            await self._call_own(self.files.end, node, "0")
            raise BackendError(
                f"locks do not exclude here: node {witness} on {host} renews its lease, and its lock looks free; are"
                " both filesystems mounted with the same options?"
            )
        # That can have taken longer than a lease, and others may have ended it.
        sent = boottime()
        if not await self._call_own(self._locked.keeps_its_lock) or not await self._call_own(self.files.renew, node, 0):
            raise BackendError("the lease of this node was over before it had looked around")
        return sent, 1

    async def _contradiction(self) -> str:
        """A node that lives and whose lock looks free; empty when there is none."""
        nodes, first = await self._call(self._locked.nodes), dict[str, str]()
        for some in batches(nodes):
            first |= await self._call(self._locked.unlocked, some)
        pause = WITNESS_RENEWALS * self._site.terms.renew_seconds / LOOKS
        for _ in range(LOOKS if first else 0):
            await trio.sleep(pause)
            now = await self._call(self._locked.unlocked, tuple(first))
            for node in first.keys() & now.keys():
                if first[node] != now[node]:
                    return node
        return ""

    async def renew(self) -> None:
        """Renew the lease; LeaseLostError also where the backing has taken this node's lock away."""
        if not await self._call_own(self._locked.keeps_its_lock):
            raise LeaseLostError("the backing filesystem has taken this node's lock away")
        await super().renew()

    async def leave(self) -> None:
        """End the lease, and only then the lock that says that this node lives."""
        try:
            await super().leave()
        finally:
            await self._call_own(self._locked.let_go)
