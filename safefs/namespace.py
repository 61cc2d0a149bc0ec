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

from safefs.hot import Born, Cold, Settled, Stamp
from safefs.model import Identity

if TYPE_CHECKING:
    from safefs.draft import Draft

ROOT_NODEID = 1


class Node:
    """One inode as the kernel knows it."""

    __slots__ = (
        "doubtful_until",
        "draft",
        "fd",
        "file_handle",
        "first_place",
        "identity",
        "linked",
        "lookups",
        "mode",
        "name",
        "nodeid",
        "opens",
        "origin",
        "parent",
        "pins",
        "stamp",
    )

    def __init__(self, nodeid: int, identity: Identity, mode: int) -> None:
        self.nodeid = nodeid
        self.identity = identity
        self.mode = mode
        self.fd = -1
        # References that the kernel holds (FUSE_FORGET gives them back), without those that the C extension gave it.
        self.lookups = 0
        self.opens = 0  # open handles
        self.pins = 0  # requests and drafts that need the descriptor
        self.origin = nodeid  # of a draft or version that was made from another node's file here: that one's; constant
        self.parent = 0  # nodeid of the directory it was last found in
        self.name = b""
        self.linked = False  # a file with several names, of which `name` is the last that it was looked up by
        self.first_place = (0, b"")  # of a linked one: directory and name when it had no other yet
        self.doubtful_until = 0.0  # time.monotonic(): until then the kernel may believe in another place of it
        self.file_handle: bytes | None = None
        self.stamp: Stamp | None = None  # at the last open that Python answered: changed by whom?
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

    def __init__(self, max_descriptors: int, hot: Cold | None = None) -> None:
        self.max_descriptors = max_descriptors
        self.hot = hot or Cold()
        self._nodes: dict[int, Node] = {}
        self._by_identity: dict[Identity, Node] = {}
        self._privates: dict[int, Identity] = {}  # inodes of drafts, by nodeid
        self._origins: dict[Identity, Node] = {}  # nodes of drafts, by these inodes
        self._recent: OrderedDict[int, Node] = OrderedDict()  # nodes with a descriptor, least recently used first

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    @property
    def open_descriptors(self) -> int:
        return len(self._recent)

    def get(self, nodeid: int) -> Node | None:
        return self._nodes.get(nodeid) or self._adopt(self.hot.adopt(nodeid))

    def origin(self, nodeid: int) -> int:
        """What tells files apart as programs do: drafts and versions that were made from a file here are that file."""
        node = self.get(nodeid)
        return nodeid if node is None else node.origin

    def note_private(self, node: Node, identity: Identity) -> None:
        """The inode that a draft is written to: whoever finds it finds the same file (`origin`).

        That can be before the draft has ended (`forget_private`), for its name can show it before.
        """
        self.forget_private(node)
        self._privates[node.nodeid] = identity
        self._origins[identity] = node

    def forget_private(self, node: Node) -> None:
        """The draft has no such inode any more: its number can be used again."""
        identity = self._privates.pop(node.nodeid, None)
        if identity is not None and self._origins.get(identity) is node:  # or another's, which has the number since
            del self._origins[identity]

    def find(self, identity: Identity) -> Node | None:
        """The node that shows this inode to everybody, if the kernel knows one."""
        return self._by_identity.get(identity) or self._adopt(self.hot.adopt_inode(identity))

    def create(self, identity: Identity, mode: int, *, shown: bool) -> Node:
        """A new node; `shown` makes it the one that lookups of this inode find.

        Between the caller's `find` and this the C extension can have made a node of the inode: then it is that one.
        """
        while not (nodeid := self.hot.register(0, identity) if shown else self.hot.new_nodeid()):
            found = self.find(identity)
            if found is not None:
                return found
        return self._add(self._node(nodeid, identity, mode), shown=shown)

    def _node(self, nodeid: int, identity: Identity, mode: int) -> Node:
        node = Node(nodeid, identity, mode)
        if identity in self._origins:
            node.origin = self._origins[identity].origin
        return node

    def _add(self, node: Node, *, shown: bool) -> Node:
        self._nodes[node.nodeid] = node
        if shown:
            self._by_identity[node.identity] = node
        return node

    def _adopt(self, born: Born | None) -> Node | None:
        """Take over a node that the C extension has made; the budget counts its descriptor from now on."""
        if born is None:
            return None
        node = self._add(self._node(born.nodeid, born.identity, born.mode), shown=True)
        node.fd, node.parent, node.name = born.fd, born.parent, born.name
        node.stamp, node.file_handle = born.stamp, born.file_handle
        if node.fd >= 0:
            self._recent[node.nodeid] = node
        return node

    def offer(self, node: Node, *, in_place: bool = False) -> None:
        """Let the C extension answer for a node that has a descriptor and was just found in its place.

        `in_place`: a file whose name has a class that is written in place, of which the kernel keeps nothing.
        """
        if node.fd >= 0 and self._by_identity.get(node.identity) is node:
            self.hot.offer(node.nodeid, node.mode, node.fd, node.parent, node.name, node.stamp, in_place=in_place)

    def show(self, node: Node, identity: Identity) -> None:
        """A draft's node becomes the version's node, unless lookups have made one already."""
        node.identity = identity
        if self.find(identity) is None and self.hot.register(node.nodeid, identity):
            self._by_identity[identity] = node

    def hide(self, node: Node) -> None:
        """Lookups of its inode find this node no more."""
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]
            settled = self.hot.unregister(node.nodeid, always=True)
            if settled is not None:
                self._settle(node, settled)

    @staticmethod
    def _settle(node: Node, settled: Settled) -> None:
        node.lookups += settled.lookups
        node.stamp = settled.stamp or node.stamp
        if settled.keeps_descriptor:
            node.fd = -1

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
        self._settle(node, self.hot.withdraw(node.nodeid))
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
        if count > node.lookups:
            self.hot.give_back(nodeid, count - node.lookups)
        node.lookups = max(0, node.lookups - count)
        return self.drop_if_idle(node)

    def drop_if_idle(self, node: Node) -> list[int]:
        if not node.idle or node.nodeid == ROOT_NODEID:
            return []
        settled = self.hot.unregister(node.nodeid, always=False)
        if settled is None:
            return []  # the C extension has told the kernel of it again
        self._settle(node, settled)
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
    found: int = 0  # the nodeid that the last one was answered with
    draft: Draft | None = None

    def answers(self, node: Node) -> bool:
        """Whether the open that comes back is to have this node: the walk found it, or there was none to do.

        A magic link (/proc/self/fd/N) leads to the same node without a walk.
        """
        return node.nodeid == (self.found if self.walked else self.nodeid)


class Tickets:
    """Open redirections by thread id (docs/semantics.md, "Opening")."""

    def __init__(self, hot: Cold | None = None) -> None:
        self._hot = hot or Cold()
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def issue(self, tid: int, nodeid: int, *, write: bool, now: float) -> None:
        if tid not in self._tickets:
            self._hot.mark_thread(tid, 1)
        self._tickets[tid] = Ticket(nodeid, write, now + TICKET_SECONDS)

    def peek(self, tid: int, now: float) -> Ticket | None:
        ticket = self._tickets.get(tid)
        return ticket if ticket is not None and ticket.expires_at > now else None

    def take(self, tid: int) -> Ticket | None:
        """The thread's ticket, used up."""
        ticket = self._tickets.pop(tid, None)
        if ticket is not None:
            self._hot.mark_thread(tid, -1)
        return ticket

    def expire(self, now: float) -> list[Ticket]:
        """Tickets whose thread never came back."""
        gone = [tid for tid, ticket in self._tickets.items() if ticket.expires_at <= now]
        return [ticket for tid in gone if (ticket := self.take(tid)) is not None]
