"""What every operation of a mount shares: its tables, descriptors of nodes, attributes, and who belongs to a draft.

Operations are in tree.py (names) and files.py (contents).  All state is touched on the trio loop only; whatever can
block goes through `Backing.run`.  They raise OSError or SafefsError.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import trio

from safefs import backing, processes
from safefs.backing import Backing
from safefs.closers import Closers
from safefs.config import Settings
from safefs.draft import Draft, DraftState, DraftTable
from safefs.hot import Cold
from safefs.identity import DAEMON
from safefs.locks import Locks, name_key
from safefs.model import Caller, Identity, Process
from safefs.namespace import ROOT_NODEID, Namespace, Node, Ticket, Tickets
from safefs.native import native
from safefs.ordering import Ordering
from safefs.passthrough import Passthrough
from safefs.placing import write_gathered
from safefs.publisher import Publisher
from safefs.rules import Match, NameClass, Policy
from safefs.softlocks import SoftLocks
from safefs.workers import Workers

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOKS = 64  # threads that look at /proc
PROCESS_LOOK_SECONDS = 20.0  # how long a look at /proc may take; what is unknown after that is not published
TICKET_SWEEP_SECONDS = 1.0
ENDING_SECONDS = 10.0  # for the end of a draft whose request is cancelled
GATHERED_SECONDS = 1.0  # between looks for small writes that the backing has not got yet
# Every change of a name would be preceded by a GETATTR of its directory otherwise.  The kernel drops a directory's
# attributes itself when a change goes through this mount.
DIRECTORY_ATTR_SECONDS = 1.0


BY_PATH = ":"


def number_key(ino: int) -> str:
    """A directory as all nodes call it where clients agree on inode numbers (st_dev is each node's own)."""
    return f"{ino:x}"


def path_key(path: bytes) -> str:
    """The same where they do not: a rename of the directory splits the locks of what is in it then."""
    return BY_PATH + os.fsdecode(path)


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors of inodes: the last one of a large file that was removed takes long."""
    for fd in descriptors:
        native.close_later(fd)


@dataclass(slots=True)
class Entry:
    """An inode as a client sees it."""

    nodeid: int
    status: os.stat_result
    ino: int
    nlink: int
    entry_seconds: float
    attr_seconds: float


@dataclass(slots=True, eq=False)
class Handle:
    """An open file of a client.  Handles of a draft share its descriptor; others own theirs."""

    number: int
    node: Node
    fd: int
    caller: Caller
    writable: bool
    backing_id: int = 0  # passed through by the kernel under it; 0: read and written by the daemon
    draft: Draft | None = None
    opener_tgid: int = 0
    place: tuple[int, bytes] = (0, b"")  # directory and name that it was opened by
    released: bool = False  # its RELEASE has come
    fenced: bool = False  # what was locked through it may be another node's by now
    in_place: bool = False  # what is written goes into the version itself
    stale: bool = False  # the client may show through it what was there before a lock was another node's
    renewal: trio.Event | None = None  # the end of its being opened anew
    error: int = 0  # of sending it, for the next close


class FileSystem:
    """The tables of one mount."""

    def __init__(
        self,
        settings: Settings,
        store: Backing,
        publisher: Publisher,
        locks: Locks,
        soft_locks: SoftLocks,
        max_descriptors: int,
        hot: Cold | None = None,
    ) -> None:
        self.settings = settings
        self.backing = store
        self.publisher = publisher
        hot = hot or Cold()
        self.nodes = Namespace(max_descriptors, hot)
        self.drafts = DraftTable(hot)
        self.tickets = Tickets(hot)
        self.ordering = Ordering()
        self.closers = Closers()
        self.handles: dict[int, Handle] = {}
        self.device = ""  # major:minor of the mount, once it is mounted
        self.passthrough = Passthrough("not mounted yet")
        self.locks = locks
        self.soft_locks = soft_locks
        self.fenced_readers: set[int] = set()  # as Handle.fenced, of open files that have no Handle
        self.can_lose_locks = False  # they are shared with other nodes
        self.is_shared = False  # the backing filesystem has other clients, on other nodes
        # By node: handles through which something was written in place that the client may still keep to itself.
        self.unsent: defaultdict[int, set[int]] = defaultdict(set)
        # By node: reads under way in place, each with its end; the client may remember what they bring.
        self.reads: defaultdict[int, set[trio.Event]] = defaultdict(set)
        self.numbers_are_shared = True  # those of inodes: clients on all nodes see the same
        self.accepting = True  # False while the daemon drains: no new writers
        self.looks = Workers(LOOKS)
        self._last_handle = 0
        self.forget_attributes: Callable[[int], None] | None = None  # those of the kernel, once there is a mount
        publisher.on_publish = self._note_publish
        publisher.policy_of = self.policy
        publisher.lease = locks.lease
        status = os.stat(store.root_fd)
        self.root = self.nodes.create(backing.identity_of(status), status.st_mode, shown=True)
        self.root.lookups = self.root.pins = 1
        self.nodes.attach(self.root, os.dup(store.root_fd))
        self.nodes.offer(self.root)

    # ------------------------------------------------------------- nodes

    def node(self, nodeid: int) -> Node:
        node = self.nodes.get(nodeid)
        if node is None:
            raise failure(errno.ESTALE)
        return node

    @asynccontextmanager
    async def pinned(self, *nodes: Node) -> AsyncIterator[None]:
        """Keep the descriptors of nodes open; opens them again where the budget has closed them."""
        for node in nodes:
            node.pins += 1
        try:
            for node in nodes:
                if node.fd < 0:
                    await self._reopen(node)
                else:
                    self.nodes.touch(node)
            yield
        finally:
            for node in nodes:
                self.unpin(node)

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        close_all(self.nodes.drop_if_idle(node))

    async def _reopen(self, node: Node) -> None:
        fd = await self._open_by_file_handle(node)
        if fd < 0:
            parent = self.nodes.get(node.parent)
            if parent is None or parent is node:
                raise failure(errno.ESTALE)
            async with self.pinned(parent):
                fd = await self.backing.run(DAEMON, self._open_as_owner, parent.fd, node.name, node.identity)
        if node.fd >= 0:
            native.close_later(fd)  # another request was quicker
        else:
            close_all(self.nodes.attach(node, fd))
            if node.doubtful_until <= time.monotonic():
                self._offer(node)

    async def _open_by_file_handle(self, node: Node) -> int:
        if node.file_handle is None:
            return -1
        try:
            return await self.backing.run(
                DAEMON, native.open_by_handle, self.backing.root_fd, node.file_handle, os.O_PATH | os.O_NOFOLLOW
            )
        except OSError:
            return -1

    def _open_as_owner(self, directory: int, name: bytes, identity: Identity) -> int:
        return self.backing.identities.as_owner(directory, self._open_by_name, directory, name, identity)

    @staticmethod
    def _open_by_name(directory: int, name: bytes, identity: Identity) -> int:
        try:
            fd, status = backing.find(directory, name)
        except FileNotFoundError:
            raise failure(errno.ESTALE) from None
        if backing.identity_of(status) != identity:
            os.close(fd)
            raise failure(errno.ESTALE)
        return fd

    def intern(self, fd: int, status: os.stat_result, parent: Node, name: bytes) -> Node:
        """The node of an inode that was just found under a name; takes the descriptor over."""
        identity = backing.identity_of(status)
        node = self.nodes.find(identity)
        if node is not None and node.fd < 0 and not self._same_inode(node, fd):
            self.nodes.hide(node)  # the number was used again while nobody held the inode
            node = None
        if node is None:
            node = self.nodes.create(identity, status.st_mode, shown=True)
            node.file_handle = self._file_handle(fd)
        if node.fd < 0:
            close_all(self.nodes.attach(node, fd))
        else:
            native.close_later(fd)
            self.nodes.touch(node)
        node.mode = status.st_mode
        linked = status.st_nlink > 1
        if linked and not node.linked:
            node.first_place = (node.parent, node.name) if node.name else (parent.nodeid, name)
        node.linked = linked
        if node.nodeid != ROOT_NODEID:
            self._place(node, parent, name)
        return node

    def _place(self, node: Node, parent: Node, name: bytes) -> None:
        """Note where a node was found.  Its place before may be a name that the kernel still keeps without asking."""
        now, elsewhere = time.monotonic(), (node.parent, node.name) != (parent.nodeid, name)
        if node.name and elsewhere:
            self._end_loans(node, node.parent, node.name)
            self._hear_closes_of(name, node.name)
            node.doubtful_until = now + self.settings.entry_timeout_seconds
        node.parent, node.name = parent.nodeid, name
        if elsewhere or node.doubtful_until <= now:
            self._offer(node)

    def _offer(self, node: Node) -> None:
        parent = self.nodes.get(node.parent)
        in_place = node.is_regular and parent is not None and self.classify(parent, node.name).name_class.in_place
        self.nodes.offer(node, in_place=in_place)

    def moved(self, node: Node, parent: Node, name: bytes, before: tuple[int, bytes]) -> None:
        """A rename has given the node another place; `before`: its directory and name until then."""
        self._end_loans(node, *before)
        node.parent, node.name = parent.nodeid, name
        if node.linked:
            native.move_walks(node.nodeid, *before, parent.nodeid, name)
        self._hear_closes_of(name, before[1])
        if node.first_place == before:
            node.first_place = parent.nodeid, name
        for handle in self.handles.values() if node.opens else ():
            if handle.node is node and handle.place == before:
                handle.place = parent.nodeid, name
        self._offer(node)

    @staticmethod
    def _hear_closes_of(name: bytes, before: bytes) -> None:
        """A file has another name than before: to close it ends what is locked of it by the name before."""
        if native.hears_closes(before):
            native.hear_closes(name)

    def _end_loans(self, node: Node, parent: int, name: bytes) -> None:
        """The node has another place now: whoever locks it by the one before asks us again, who know the new one."""
        if node.is_directory and not self.numbers_are_shared:
            self.locks.end_loans(lambda _number: True)  # what is in it has other names as well
        elif (directory := self.nodes.get(parent)) is not None:
            self.locks.end_loan(name_key(self.directory_key(directory), name))

    def seen(self, node: Node, status: os.stat_result) -> bool:
        """Note what an open sees; whether the kernel may keep what it has cached since the open before."""
        stamp = (status.st_size, status.st_mtime_ns)
        unchanged = self.nodes.hot.unchanged(node.nodeid, stamp)
        if unchanged is None:
            unchanged, node.stamp = node.stamp in (None, stamp), stamp
        return unchanged

    def _file_handle(self, fd: int) -> bytes | None:
        """A handle that survives the descriptor, where the backing makes them and the daemon may open them."""
        if not self.backing.identities.impersonate:
            return None
        try:
            return native.name_to_handle(fd)
        except OSError:
            return None

    def _same_inode(self, node: Node, fd: int) -> bool:
        return node.file_handle is not None and node.file_handle == self._file_handle(fd)

    async def forget(self, references: Iterable[tuple[int, int]]) -> None:
        for nodeid, count in references:
            close_all(self.nodes.forget(nodeid, count))

    def classify(self, directory: Node, name: bytes) -> Match:
        rules = self.settings.rules
        return rules.classify(name, self._path(directory) if rules.uses_paths else b"")

    def policy(self, directory: Node, name: bytes) -> Policy:
        """What is checked of a file before this name shows it."""
        return self.settings.rules.policy(name, self._path(directory))

    def _path(self, directory: Node) -> bytes:
        """The directory's path below the root, as far as the mount has walked it."""
        parts: list[bytes] = []
        node: Node | None = directory
        while node is not None and node is not self.root and len(parts) < 2048:
            parts.append(node.name)
            node = self.nodes.get(node.parent)
        return b"/".join(reversed(parts))

    def directory_key(self, directory: Node) -> str:
        """A directory as all nodes call it."""
        ino = directory.identity.ino
        return number_key(ino) if self.numbers_are_shared else path_key(self._path(directory))

    # -------------------------------------------------------- attributes

    def entry(self, node: Node, status: os.stat_result, *, cached: bool = True) -> Entry:
        """A version, directory or other inode.

        Only names of files are kept: an open by such a name is checked, an open through a directory or a symbolic link
        that another node has replaced would not be.
        """
        settings = self.settings
        cached = cached and self._keeps(node, status)
        entry_seconds = settings.entry_timeout_seconds if cached and node.is_regular else 0.0
        attr_seconds = settings.attr_timeout_seconds if cached else 0.0
        if node.is_directory:
            attr_seconds = max(attr_seconds, DIRECTORY_ATTR_SECONDS)
        return Entry(node.nodeid, status, status.st_ino, status.st_nlink, entry_seconds, attr_seconds)

    def _keeps(self, node: Node, status: os.stat_result) -> bool:
        """Whether an inode stays as it is unless the kernel hears of it.

        What is written in place or may be taken over does not; nor does a file with further names: each of them can
        get another version, which changes the link count that the others show.
        """
        if not node.is_regular:
            return node.is_directory or stat.S_ISLNK(node.mode)
        parent = self.nodes.get(node.parent)
        return (
            status.st_nlink == 1
            and parent is not None
            and self.classify(parent, node.name).name_class is NameClass.PRIVATE
        )

    def draft_entry(self, draft: Draft, status: os.stat_result, attr_seconds: float = 0.0) -> Entry:
        """A draft: its name is never kept, always the same st_ino, and a link count as if it had its name."""
        nlink = 0 if draft.discarded else max(1, status.st_nlink if draft.state is DraftState.PUBLISHED else 1)
        return Entry(draft.node.nodeid, status, draft.shown_ino, nlink, 0.0, attr_seconds)

    def _note_publish(self, directory: Node, replaced: Identity | None) -> None:
        """A publish changed a directory's times and took a link from the version before: behind the kernel's back."""
        version = self.nodes.find(replaced) if replaced is not None else None
        for node in (directory, version):
            if node is not None and self.forget_attributes is not None:
                self.forget_attributes(node.nodeid)

    @asynccontextmanager
    async def readable(self, handle: Handle) -> AsyncIterator[int]:
        """A descriptor to read an open file by."""
        draft = handle.draft
        if draft is None:
            yield handle.fd
        else:
            async with draft.gate.passing():
                await self.write_out(draft)
                yield self.content_fd(draft)

    async def write_out(self, draft: Draft) -> None:
        """Have the private inode get what was gathered for it.  Called by those that passed the gate."""
        if draft.gathered.data:
            async with draft.gate.writing:
                await self.backing.run(DAEMON, write_gathered, draft)

    async def write_out_early(self, draft: Draft) -> None:
        """The same for everybody else; where it fails the draft's close will say so."""
        if draft.gathered.data:
            async with self.held(draft), draft.gate.passing():
                with suppress(OSError):
                    await self.write_out(draft)

    def content_fd(self, draft: Draft) -> int:
        """Where a draft's content is: its own inode, or its base until the first write."""
        return draft.fd if draft.prepared or draft.base is None else draft.base.fd

    def shown_fd(self, draft: Draft) -> int:
        """The inode that link(2) takes: the draft's, or the version that its name shows while that is written to."""
        if draft.base is not None and (draft.copied or draft.unlinkable):
            return draft.base.fd
        return self.content_fd(draft)

    # ---------------------------------------------------------- families

    async def look(self, function: Callable[..., T], *arguments: object) -> T | None:
        """Look at a process in a thread; None when that takes too long, or there is no thread to be had."""
        with trio.move_on_after(PROCESS_LOOK_SECONDS), suppress(OSError):
            return await self.looks.run(function, *arguments)
        return None

    async def identify(self, tid: int) -> Process | None:
        return await self.look(processes.identify, tid)

    async def family_draft(self, directory: Node, name: bytes, tid: int) -> Draft | None:
        """The draft of this name that belongs to the family of the calling thread."""
        drafts = [draft for draft in self.drafts.named(directory, name) if draft.found_by_family and draft.opener]
        if not drafts:
            return None
        newest = drafts[-1].opener
        chain = await self.look(processes.ancestry, tid, newest.tgid if newest else 0)
        if chain is None:
            return None
        for draft in reversed(drafts):
            opener = draft.opener
            if opener is not None and opener.tgid in chain and processes.is_alive(draft.pidfd):
                # It may have ended, or been cancelled, during the look.
                return draft if draft.found_by_family and draft.node.draft is draft else None
        return None

    async def wait_turn(self, caller: Caller) -> None:
        """Changes of names wait for what the same process closed before (docs/semantics.md, "Order")."""
        if self.ordering:
            await self.ordering.wait_process(await self.identify(caller.pid))

    def walked(self, node: Node, directory: Node, name: bytes, caller: Caller) -> None:
        """Note by which of its names a thread finds a file that has several."""
        if node.linked:
            native.note_walk(caller.pid, node.nodeid, directory.nodeid, name)

    def opened_by(self, node: Node, caller: Caller) -> tuple[int, bytes]:
        """Directory and name that a thread opens a file by.

        OPEN does not say it.  Of one with several names it is the one that the thread found it by, as it has to before
        each open; through /proc/self/fd/N, where nothing is looked up, the last one if it ever did.
        """
        walked = native.last_walk(caller.pid, node.nodeid) if node.linked else None
        return walked or (node.parent, node.name)

    # ----------------------------------------------------------- handles

    def add_handle(self, handle_of: Node, fd: int, caller: Caller, *, writable: bool, backing_id: int = 0) -> Handle:
        """One more open handle, with the backing id that it would have; what it gets is what all handles have."""
        self._last_handle += 1
        agreed = native.opens_join(handle_of.nodeid, backing_id)
        handle = Handle(self._last_handle, handle_of, fd, caller, writable, agreed)
        handle.place = self.opened_by(handle_of, caller)
        self.handles[handle.number] = handle
        handle_of.opens += 1
        return handle

    def handle(self, number: int) -> Handle:
        if number & native.FH_HOT:
            return Handle(number, self.root, number & native.FH_HOT - 1, DAEMON, writable=False)
        try:
            return self.handles[number]
        except KeyError:
            raise failure(errno.EBADF) from None

    def changeable(self, number: int) -> Handle:
        """An open file that is to be changed.  OSError: EBADF; EIO where a lock may be lost that was taken with it."""
        handle = self.handle(number)
        if self.is_fenced(handle):
            raise failure(errno.EIO)
        return handle

    def is_fenced(self, handle: Handle) -> bool:
        """Whether what was locked through an open file may be another node's by now.

        Asked for each change: a daemon that was stopped is sent changes before it has noticed that its lease is over.
        """
        return handle.fenced or self.is_lost(handle.number)

    def is_lost(self, number: int) -> bool:
        """The same of one that the extension has opened to be read."""
        return number in self.fenced_readers or self.locks.is_stale(number)

    def permit(self, handle: Handle) -> Callable[[], bool]:
        """Permission to change an open file in place: whether it still stands, for a thread to ask right before.

        OSError: EIO, as `changeable`.
        """
        lease = self.locks.lease()
        if self.is_fenced(handle):
            raise failure(errno.EIO)
        return lambda: self.locks.lease() == lease and not handle.fenced

    async def look_anew(self, handle: Handle) -> None:
        """Have a handle that may be stale show what other nodes have left; within a request on it, so that it lives.

        The client is told to forget what it remembers of the file when no read is under way that was begun before: it
        does not forget what such a read is about to bring.
        """
        while handle.renewal is not None:
            await handle.renewal.wait()
        if not handle.stale:
            return
        handle.stale, handle.renewal = False, trio.Event()
        try:
            for end in list(self.reads.get(handle.node.nodeid, ())):
                await end.wait()
            await self.backing.run_or_daemon(handle.caller, backing.open_anew, handle.fd, owned=handle.fd)
        except OSError as error:  # such as ESTALE, when it was removed: there is nothing newer to see
            log.info("%r could not be opened anew: %s", handle.node.name, error)
        except trio.Cancelled:
            handle.stale = True
            raise
        finally:
            handle.renewal.set()
            handle.renewal = None

    @asynccontextmanager
    async def reading_in_place(self, handle: Handle) -> AsyncIterator[None]:
        """Around a read of what others write in place as well."""
        while handle.stale or handle.renewal is not None:
            await self.look_anew(handle)
        nodeid, end = handle.node.nodeid, trio.Event()
        self.reads[nodeid].add(end)
        try:
            yield
        finally:
            end.set()
            self.reads[nodeid].discard(end)
            if not self.reads[nodeid]:
                del self.reads[nodeid]

    def note_unsent(self, handle: Handle) -> None:
        """Something was written in place: Python has to see who gives up a lock of the file (safefs/inplace.py)."""
        if self.is_shared and handle.in_place:
            self.unsent[handle.node.nodeid].add(handle.number)
            self.locks.end_loans(lambda number: number in self.handles and self.handles[number].node is handle.node)

    def note_sent(self, handle: Handle) -> None:
        """The server has what was written through this handle, or never gets it."""
        numbers = self.unsent.get(handle.node.nodeid, set())
        numbers.discard(handle.number)
        if not numbers:
            self.unsent.pop(handle.node.nodeid, None)

    async def backing_id(self, node: Node, fd: int, caller: Caller) -> int:
        """A backing id for the first open handle of a node, whose file `fd` has open; 0 where there can be none."""
        # The kernel will do its I/O with the rights of the thread that registers.
        return await self.backing.run(caller, self.register, fd) if self.wants_backing_id(node) else 0

    def register(self, fd: int) -> int:
        """A backing id, by a descriptor that cannot write: it lives on in the id and would count as a writer."""
        try:
            readable = backing.reopen(fd, os.O_RDONLY)
        except OSError:
            return self.passthrough.register(fd)  # a mode without read permission
        try:
            return self.passthrough.register(readable)
        finally:
            os.close(readable)

    def fence(self, numbers: Collection[int]) -> None:
        """Locks that were taken through these file handles are lost or broken: nothing more is written under them."""
        for number in numbers:
            if number & native.FH_HOT:
                self.fenced_readers.add(number)
        for handle in (self.handles[number] for number in numbers if number in self.handles):
            handle.fenced = True
            if handle.draft is not None and handle.writable:
                self._fence_draft(handle.draft)

    def fence_claims(self) -> None:
        """All claims of names are lost."""
        for draft in self.drafts:
            if draft.claim is not None:
                self._fence_draft(draft)

    @staticmethod
    def _fence_draft(draft: Draft) -> None:
        draft.fenced, draft.error = True, errno.EIO

    def publishing(self, directory: Node, name: bytes) -> AbstractAsyncContextManager[bool]:
        """Keep other nodes from changing what a name shows; yields False where that is not had."""
        return self.locks.publishing(self.directory_key(directory), name)

    async def claim(self, directory: Node, name: bytes) -> Callable[[], object]:
        """Take a name that is to be made with O_EXCL, on all nodes; how to give it up.  OSError: EEXIST."""
        claim = await self.locks.claim(self.directory_key(directory), name)
        if claim is None:
            raise failure(errno.EEXIST)
        return claim

    def wants_backing_id(self, node: Node) -> bool:
        """Whether a further handle would be the first, so that it decides for all."""
        return self.passthrough.active and native.opens_agreed(node.nodeid) is None

    @staticmethod
    def note_capability(draft: Draft) -> None:
        """The draft may have security.capability from now on."""
        draft.may_have_capability = True
        native.opens_set_bare(draft.node.nodeid, False)

    @staticmethod
    def passes_through(node: Node) -> bool:
        return bool(native.opens_agreed(node.nodeid))

    def remove_handle(self, handle: Handle) -> None:
        self.handles.pop(handle.number, None)
        self.note_sent(handle)
        handle.node.opens -= 1
        native.opens_leave(handle.node.nodeid)
        if handle.fd >= 0:
            close_all([handle.fd])
        close_all(self.nodes.drop_if_idle(handle.node))

    # ------------------------------------------------------------ drafts

    async def publish(
        self,
        draft: Draft,
        *,
        target: Node | None = None,
        name: bytes | None = None,
        replace: bool = True,
        in_place: bool = False,
    ) -> None:
        """Publish what an open draft has by now; whoever has it open can go on writing without changing that.

        Not `in_place`: then it is the very inode that he has open.
        """
        keep_private = draft.unseen and draft.writers > 0 and not in_place
        await self.publisher.publish(draft, target=target, name=name, replace=replace, keep_private=keep_private)

    def list_draft(self, draft: Draft) -> None:
        self.drafts.add(draft)
        draft.listed = True
        draft.node.draft = draft
        draft.directory.pins += 1

    async def rename_draft(self, draft: Draft, directory: Node, name: bytes) -> None:
        """The draft's file goes by another name from now on.  `directory` is pinned by the caller.

        With the gate closed: a publish that is under way needs the draft's directory until its end.
        """
        async with draft.gate.closed():
            if draft.temp_name is not None and directory is not draft.directory:
                await self._move_temp(draft, draft.temp_name, directory)
            directory.pins += 1
            if draft.listed:
                self.drafts.discard(draft)
            self._hear_closes_of(name, draft.name)
            old, draft.directory, draft.name = draft.directory, directory, name
            if draft.listed:
                self.drafts.add(draft)
            self.unpin(old)
            draft.node.parent, draft.node.name = directory.nodeid, name

    async def _move_temp(self, draft: Draft, temp_name: bytes, directory: Node) -> None:
        """The hidden name lies in the draft's directory, wherever that is: there it is published from, and removed.

        The file has its new name already, so this must not fail.  Where the hidden name stays, the draft goes on as one
        that has none, by its descriptor, and the next daemon settles what is there.
        """
        await self.publisher.note_directory(directory, draft.caller)  # on record it is in both
        moved, renaming = False, (draft.directory.fd, temp_name, directory.fd, temp_name, 0)
        try:
            await self.backing.run_for(draft, backing.rename, *renaming)
            moved = True
        except OSError as error:
            log.warning("a hidden file does not follow %r to another directory: %s", draft.name, error)
        finally:
            draft.temp_name = temp_name if moved else None
            self.publisher.has_left = self.publisher.has_left or not moved

    def unlist_draft(self, draft: Draft) -> None:
        """Nobody finds the draft by its name any more."""
        if draft.listed:
            draft.listed = False
            self.drafts.discard(draft)

    @asynccontextmanager
    async def inode(self, node: Node) -> AsyncIterator[int]:
        """A descriptor of what a node shows, be it a draft or not."""
        if node.draft is not None:
            async with self.held(node.draft):
                yield self.content_fd(node.draft)
        else:
            async with self.pinned(node):
                yield node.fd

    @asynccontextmanager
    async def attributed(self, node: Node, *, to_change: bool = True) -> AsyncIterator[list[int]]:
        """Descriptors of the inodes that have a node's attributes: the one it shows, and published copies of that."""
        own, copies = node.draft, []
        others = self.publisher.drafts_of(node.identity) if to_change else []
        async with AsyncExitStack() as stack:
            for draft in others if own is None else [own]:
                await stack.enter_async_context(self.held(draft))
                await stack.enter_async_context(draft.gate.passing())
                await self.write_out(draft)
                if draft.copied and draft.base is not None:
                    copies.append(draft.base.fd)
            if own is None:
                await stack.enter_async_context(self.pinned(node))
            yield [node.fd if own is None else self.content_fd(own), *copies]

    @asynccontextmanager
    async def held(self, draft: Draft | None) -> AsyncIterator[None]:
        """Keep a draft and its descriptors for the length of a request that has no handle of it."""
        if draft is None:
            yield
            return
        draft.reserved += 1
        draft.handles += 1
        try:
            yield
        finally:
            draft.reserved -= 1
            draft.handles -= 1
            await self.end_draft_soon(draft)

    def _is_done(self, draft: Draft) -> bool:
        busy = draft.writers or draft.reserved or draft.unpublished
        return not busy and draft.node.draft is draft

    async def end_draft_soon(self, draft: Draft) -> None:
        """Also where the request is cancelled; but a backing that hangs does not keep the daemon from ending."""
        with trio.move_on_after(ENDING_SECONDS, shield=True):
            await self.end_draft(draft)

    async def end_draft(self, draft: Draft) -> None:
        """Close the books on a draft that nobody can write to any more: its node stands for a version from now on."""
        if draft.ending:
            return  # who is at it looks again when he has the descriptor
        if self._is_done(draft):
            fd, draft.version_fd = draft.version_fd, -1
            if fd < 0:
                try:
                    fd = await self._version_fd(draft)
                except OSError as error:
                    log.warning("%r is kept as a draft until it is opened again: %s", draft.name, error)
                    return
            if self._is_done(draft):
                self._become_version(draft, fd)
                await self.drop_temp(draft)
            else:
                native.close_later(fd)
        if draft.node.draft is not draft and not draft.handles:
            await self._close_draft(draft)
        close_all(self.nodes.drop_if_idle(draft.node))

    async def _version_fd(self, draft: Draft) -> int:
        draft.ending = True
        try:
            async with draft.gate.passing():
                return await self.backing.run(DAEMON, backing.reopen, self.content_fd(draft), os.O_PATH)
        finally:
            draft.ending = False

    def _become_version(self, draft: Draft, fd: int) -> None:
        node = draft.node
        self.unlist_draft(draft)
        node.draft = None
        native.opens_set_bare(node.nodeid, False)
        close_all(self.nodes.attach(node, fd))
        if draft.state is DraftState.PUBLISHED:
            node.file_handle = self._file_handle(fd)
            self.nodes.show(node, backing.identity_of(os.fstat(fd)))
            self._offer(node)
        self.nodes.forget_private(node)

    async def _close_draft(self, draft: Draft) -> None:
        if draft.fd < 0:
            return
        base = [draft.base.fd] if draft.base else []
        self.publisher.forget(draft)
        self.nodes.forget_private(draft.node)
        descriptors, pidfd = {draft.fd, draft.version_fd, *draft.spare_fds, *base}, draft.pidfd
        draft.fd = draft.pidfd = draft.version_fd = -1
        try:
            await self.drop_temp(draft)
        finally:
            close_all(fd for fd in descriptors if fd >= 0)
            if pidfd >= 0:
                os.close(pidfd)
            self.unpin(draft.directory)

    async def drop_temp(self, draft: Draft) -> None:
        """The hidden name of a draft that has nothing to be kept, if it has one."""
        if draft.temp_name is not None and await self.publisher.drop_hidden(draft, draft.temp_name):
            draft.temp_name = None

    # ----------------------------------------------------------- tickets

    def ticket(self, caller: Caller) -> Ticket | None:
        return self.tickets.peek(caller.pid, time.monotonic()) if caller.pid and len(self.tickets) else None

    def redirect(self, node: Node, caller: Caller, *, write: bool) -> OSError:
        """Send the caller's open through the path again (kernel: fs/namei.c, do_filp_open retries ESTALE once)."""
        self.tickets.issue(caller.pid, node.nodeid, write=write, now=time.monotonic())
        return failure(errno.ESTALE)

    async def end_ticket(self, ticket: Ticket | None) -> None:
        """Give back what was kept for a redirected open; a draft that nobody came for ends."""
        if ticket is not None and ticket.draft is not None:
            draft, ticket.draft = ticket.draft, None
            draft.reserved -= 1
            await self.end_draft(draft)

    async def sweep_gathered(self) -> None:
        """What was gathered does not stay with the daemon alone: it may be killed."""
        while True:
            await trio.sleep(GATHERED_SECONDS)
            for draft in self.drafts:
                await self.write_out_early(draft)

    async def sweep_tickets(self) -> None:
        """Give back what opens reserved whose thread was killed on its way."""
        while True:
            await trio.sleep(TICKET_SWEEP_SECONDS)
            for ticket in self.tickets.expire(time.monotonic()):
                await self.end_ticket(ticket)
