"""Python's side of the requests that the C extension answers (docs/decisions/0002-hot-requests.md).

`Hot` tells the extension which nodes it may answer for, and what is going on that only Python can answer for; `Cold` is
the same for a mount without it.  Both give out the nodeids, because the extension makes nodes of its own.
"""

from __future__ import annotations

import fcntl
from typing import NamedTuple

from safefs.locktable import Held, Mode
from safefs.model import Identity
from safefs.native import native
from safefs.rules import NameClass, RuleSet

Stamp = tuple[int, int]  # size and mtime_ns

LOCK_OPCODES = (32, 33)  # FUSE_SETLK and FUSE_SETLKW

TYPE_MODES = {fcntl.F_RDLCK: Mode.SHARED, fcntl.F_WRLCK: Mode.EXCLUSIVE}
MODE_TYPES = {mode: number for number, mode in TYPE_MODES.items()}


class Settled(NamedTuple):
    """What the extension gives back with a node: references that it gave the kernel, and what its last open saw."""

    lookups: int
    stamp: Stamp | None
    keeps_descriptor: bool  # a thread works with it, and closes it


class Born(NamedTuple):
    """A node that the extension has made, on its way to Python."""

    nodeid: int
    identity: Identity
    mode: int
    fd: int
    parent: int
    name: bytes
    stamp: Stamp | None
    file_handle: bytes | None


NOTHING = Settled(0, None, False)


def locks_answered() -> int:
    """How many lock requests the extension has answered."""
    answered = native.hot_counters()["answered"]
    return sum(answered.get(opcode, 0) for opcode in LOCK_OPCODES)


class Cold:
    """Every request comes to Python."""

    def __init__(self) -> None:
        self._last = 0

    def new_nodeid(self) -> int:
        self._last += 1
        return self._last

    def register(self, nodeid: int, identity: Identity) -> int:
        """Claim an inode for a node, or for a new one (0); its nodeid, 0 when the inode has a node already."""
        return nodeid or self.new_nodeid()

    def offer(
        self, nodeid: int, mode: int, fd: int, parent: int, name: bytes, stamp: Stamp | None, *, in_place: bool
    ) -> None:
        """The node has a descriptor, and was found under a name; `in_place`: of a class that is written in place."""

    def withdraw(self, nodeid: int) -> Settled:
        """The node is about to lose its descriptor."""
        return NOTHING

    def give_back(self, nodeid: int, count: int) -> None:
        """The kernel gave back more references than Python had given it: these are the extension's."""

    def unregister(self, nodeid: int, *, always: bool) -> Settled | None:
        """The node is about to go; None when the kernel has references to it from the extension."""
        return NOTHING

    def adopt(self, nodeid: int) -> Born | None:
        """A node that Python does not know."""
        return None

    def adopt_inode(self, identity: Identity) -> Born | None:
        """The node of an inode that Python does not know."""
        return None

    def unchanged(self, nodeid: int, stamp: Stamp) -> bool | None:
        """Whether the last open by the extension saw the same; None when it keeps no stamp for the node."""
        return None

    def mark_name(self, parent: int, name: bytes, change: int) -> None:
        """There is one draft more or less of the name."""

    def mark_thread(self, tid: int, change: int) -> None:
        """There is one ticket more or less of the thread."""

    def mark_handle(self, number: int, change: int) -> None:
        """There is one file handle more or less of the extension's through which something is locked."""

    def mark_owner(self, number: int, change: int) -> None:
        """There is one owner of record locks more or less: what he closes is not answered without Python."""

    def lend_lock(self, number: int, owner: int, held: Held, until: float) -> bool:
        """Answer flock(2) on an open file that nobody else is in the way of, until a moment of CLOCK_BOOTTIME."""
        return False

    def take_lock_back(self, number: int) -> Held:
        """What an open file holds that was lent."""
        raise AssertionError(f"nothing was lent to {number}")


class Hot(Cold):
    """The extension answers what it can."""

    def new_nodeid(self) -> int:
        return native.hot_new_nodeid()

    def register(self, nodeid: int, identity: Identity) -> int:
        return native.hot_register(nodeid, identity.dev, identity.ino)

    def offer(
        self, nodeid: int, mode: int, fd: int, parent: int, name: bytes, stamp: Stamp | None, *, in_place: bool
    ) -> None:
        native.hot_offer(nodeid, mode, fd, parent, name, stamp, in_place)

    def withdraw(self, nodeid: int) -> Settled:
        settled = native.hot_withdraw(nodeid)
        return NOTHING if settled is None else Settled(*settled)

    def give_back(self, nodeid: int, count: int) -> None:
        native.hot_give_back(nodeid, count)

    def unregister(self, nodeid: int, *, always: bool) -> Settled | None:
        settled = native.hot_unregister(nodeid, always)
        return None if settled is None else Settled(*settled)

    def adopt(self, nodeid: int) -> Born | None:
        return self._born(native.hot_adopt(nodeid))

    def adopt_inode(self, identity: Identity) -> Born | None:
        return self._born(native.hot_adopt_inode(identity.dev, identity.ino))

    @staticmethod
    def _born(found: native.BornNode | None) -> Born | None:
        if found is None:
            return None
        nodeid, dev, ino, *_ = found
        return Born(nodeid, Identity(dev, ino), *found[3:])

    def unchanged(self, nodeid: int, stamp: Stamp) -> bool | None:
        return native.hot_stamp(nodeid, *stamp)

    def mark_name(self, parent: int, name: bytes, change: int) -> None:
        native.hot_mark_name(parent, name, change)

    def mark_thread(self, tid: int, change: int) -> None:
        native.hot_mark_thread(tid, change)

    def mark_handle(self, number: int, change: int) -> None:
        native.hot_mark_handle(number, change)

    def mark_owner(self, number: int, change: int) -> None:
        native.hot_mark_owner(number, change)

    def lend_lock(self, number: int, owner: int, held: Held, until: float) -> bool:
        kind = fcntl.F_UNLCK if held.mode is None else MODE_TYPES[held.mode]
        native.hot_lend_lock(number, owner, kind, held.pid, until)
        return True

    def take_lock_back(self, number: int) -> Held:
        taken = native.hot_take_lock_back(number)
        assert taken is not None, number
        return Held(TYPE_MODES.get(taken[0]), taken[1])


def doubtful_globs(rules: RuleSet) -> tuple[bytes, ...]:
    """Globs that match the last component of every name that can have another class than private.

    An earlier rule may make such a name private all the same; it is answered by Python, which knows.
    """
    others = (rule for rule in rules.rules if rule.name_class not in (None, NameClass.PRIVATE))
    globs = (glob for rule in others for glob in rule.globs)
    last = {glob.rpartition("/")[2].replace("**", "*") for glob in globs}
    return tuple(sorted(glob.encode("utf-8", "surrogateescape") for glob in last))
