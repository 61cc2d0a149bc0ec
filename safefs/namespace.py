"""Nodeids: what the kernel has been told about, and how the daemon finds it again.  No I/O, no waiting.

A node stands for one inode of the backing: a version, a directory, a symbolic link …  Nodeids are never reused while
the daemon lives, because the kernel caches data under them.  A node keeps an O_PATH descriptor while it is used, as
far as the descriptor budget goes; a node without one remembers a file handle, and its last known place, to be opened
again.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safefs.model import Identity

if TYPE_CHECKING:
    from safefs.draft import Draft

ROOT_NODEID = 1


class Node:
    """One inode as the kernel knows it."""

    __slots__ = (
        "backing_id",
        "draft",
        "fd",
        "file_handle",
        "identity",
        "lookups",
        "mode",
        "name",
        "nodeid",
        "opens",
        "parent",
        "pins",
        "stamp",
    )

    def __init__(self, nodeid: int, identity: Identity, mode: int) -> None:
        self.nodeid = nodeid
        self.identity = identity
        self.mode = mode
        self.fd = -1
        self.lookups = 0  # references that the kernel holds (FUSE_FORGET gives them back)
        self.opens = 0  # open handles
        self.backing_id = 0  # all of them pass through under this id; 0 when none does
        self.pins = 0  # requests and drafts that need the descriptor
        self.parent = 0  # nodeid of the directory it was last found in
        self.name = b""
        self.file_handle: bytes | None = None
        self.stamp: tuple[int, int] | None = None  # size and mtime_ns at the last open: changed by whom?
        self.draft: Draft | None = None

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def idle(self) -> bool:
        return not (self.lookups or self.opens or self.pins or self.draft)


class Namespace:
    """The table of nodes.  Methods return the descriptors that the caller must close."""

    def __init__(self, max_descriptors: int) -> None:
        self.max_descriptors = max_descriptors
        self._nodes: dict[int, Node] = {}
        self._by_identity: dict[Identity, Node] = {}
        self._recent: OrderedDict[int, Node] = OrderedDict()  # nodes with a descriptor, least recently used first
        self._next = ROOT_NODEID

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    @property
    def open_descriptors(self) -> int:
        return len(self._recent)

    def get(self, nodeid: int) -> Node | None:
        return self._nodes.get(nodeid)

    def find(self, identity: Identity) -> Node | None:
        """The node that shows this inode to everybody, if the kernel knows one."""
        return self._by_identity.get(identity)

    def create(self, identity: Identity, mode: int, *, shown: bool) -> Node:
        """A new node; `shown` makes it the one that lookups of this inode find."""
        node = Node(self._next, identity, mode)
        self._next += 1
        self._nodes[node.nodeid] = node
        if shown:
            self._by_identity[identity] = node
        return node

    def show(self, node: Node, identity: Identity) -> None:
        """A draft's node becomes the version's node, unless lookups have made one already."""
        node.identity = identity
        self._by_identity.setdefault(identity, node)

    def hide(self, node: Node) -> None:
        """Lookups of its inode find this node no more."""
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]

    def attach(self, node: Node, fd: int) -> list[int]:
        """Give the node a descriptor; returns those that the budget pushes out."""
        node.fd = fd
        self._recent[node.nodeid] = node
        return self._evict()

    def touch(self, node: Node) -> None:
        if node.fd >= 0:
            self._recent.move_to_end(node.nodeid)

    def detach(self, node: Node) -> list[int]:
        """Take the node's descriptor away."""
        self._recent.pop(node.nodeid, None)
        fd, node.fd = node.fd, -1
        return [fd] if fd >= 0 else []

    def _evict(self) -> list[int]:
        closing: list[int] = []
        examined = 0
        while len(self._recent) > self.max_descriptors and examined < 64:
            node = next(iter(self._recent.values()))
            examined += 1
            if node.pins or node.opens or node.draft or node.nodeid == ROOT_NODEID:
                self._recent.move_to_end(node.nodeid)
            else:
                closing += self.detach(node)
        return closing

    def forget(self, nodeid: int, count: int) -> list[int]:
        """The kernel gives `count` references back."""
        node = self._nodes.get(nodeid)
        if node is None or nodeid == ROOT_NODEID:
            return []
        node.lookups = max(0, node.lookups - count)
        return self.drop_if_idle(node)

    def drop_if_idle(self, node: Node) -> list[int]:
        if not node.idle or node.nodeid == ROOT_NODEID:
            return []
        self._nodes.pop(node.nodeid, None)
        self.hide(node)
        return self.detach(node)


TICKET_SECONDS = 2.0


@dataclass(slots=True)
class Ticket:
    """An open that was answered ESTALE: the kernel walks the path again and comes back from the same thread."""

    nodeid: int  # the version that was to be opened
    write: bool
    expires_at: float
    walked: bool = False  # a LOOKUP of the thread was seen since
    draft: Draft | None = None


class Tickets:
    """Open redirections by thread id (docs/semantics.md, "Opening")."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def issue(self, tid: int, nodeid: int, *, write: bool, now: float) -> None:
        self._tickets[tid] = Ticket(nodeid, write, now + TICKET_SECONDS)

    def peek(self, tid: int, now: float) -> Ticket | None:
        ticket = self._tickets.get(tid)
        return ticket if ticket is not None and ticket.expires_at > now else None

    def take(self, tid: int) -> Ticket | None:
        """The thread's ticket, used up."""
        return self._tickets.pop(tid, None)

    def expire(self, now: float) -> list[Ticket]:
        """Tickets whose thread never came back."""
        gone = [tid for tid, ticket in self._tickets.items() if ticket.expires_at <= now]
        return [self._tickets.pop(tid) for tid in gone]
