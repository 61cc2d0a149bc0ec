"""What one publish does in its worker thread: seal, settle a conflict, put the name in place, make it durable.

Every function blocks and raises OSError, or PublishRefusedError where a check fails.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

from safefs import backing
from safefs.digest import DIGEST_ATTRIBUTE, ORIGIN_ATTRIBUTE
from safefs.draft import Draft
from safefs.errors import PublishRefusedError
from safefs.native import native
from safefs.seal import Demands, seal

RECORD_BYTES = 4096  # what a writer with O_APPEND can add to a file that another has added to
# After these the server may have done what it was asked for: only a look tells.
REPLY_LOST = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EINTR, errno.ECONNRESET, errno.ENOTCONN)


@dataclass(frozen=True, slots=True)
class PrivateInode:
    """An inode that no name shows yet."""

    fd: int
    temp_name: bytes | None  # its hidden name, None for O_TMPFILE
    version_fd: int = -1  # O_PATH, once a name shows it


class NameKeeper(Protocol):
    """What all daemons on a backing agree on for one name of a directory (safefs/publisher.py has it)."""

    def locked(self) -> AbstractContextManager[None]:
        """Nobody else changes meanwhile what the name shows."""

    def retain(self) -> None:
        """The version that the name shows is about to be replaced."""

    def retains(self, ino: int) -> bool:
        """Whether one of the names of this inode is the hidden one under which it is retained."""


@dataclass(frozen=True, slots=True)
class Order:
    """One publish, as the worker thread gets it."""

    draft: Draft
    inode: PrivateInode  # what becomes the version: the draft's own, or a copy
    directory: int  # where a hidden temp lies
    target: int
    name: bytes
    may_replace: bool
    hidden: bytes
    make_temp: Callable[[], tuple[int, bytes | None, os.stat_result]]  # for what a conflict is settled with
    keeper: NameKeeper
    sync_target: Callable[[], None]
    demands: Demands
    check_space: Callable[[], None]
    require_lease: Callable[[], None]  # PublishRefusedError where it was written under a lock that is lost


def write_gathered(draft: Draft) -> None:
    """Give the private inode what was gathered for it; only one thread at a time."""
    gathered, done = draft.gathered, 0
    try:
        while done < len(gathered.data):
            done += write_draft(draft, memoryview(gathered.data)[done:], gathered.offset + done)
    except OSError as error:
        draft.error = draft.error or error.errno or errno.EIO
        raise
    finally:
        gathered.data = bytearray()


def write_draft(draft: Draft, data: bytes | memoryview, offset: int) -> int:
    """Write to the private inode, and note what was written; only one thread at a time."""
    done = backing.write_all(draft.fd, data, offset)
    draft.written.add(offset, memoryview(data)[:done])
    return done


def check_written(draft: Draft) -> None:
    """The file is as long as its writes made it, or a write was lost on the way."""
    if draft.unseen:
        return
    size = os.fstat(draft.fd).st_size
    if size != draft.size:
        raise PublishRefusedError(f"it has {size} bytes, {draft.size} were written", errno.EIO)


class Verdict(Enum):
    """What becomes of a draft whose name shows another version than the one that it started from."""

    OURS = auto()  # it takes the name
    THEIRS = auto()  # what the name shows has all of it
    BOTH = auto()  # its record is added to what the name shows


def judge(ours: int, base: int, theirs: int, *, appended: bool) -> Verdict | None:
    """Compare three files (docs/semantics.md, "Conflicts"); None where both have what the other has not.

    `appended`: ours was written to with O_APPEND alone.
    """
    tail = os.fstat(ours).st_size - os.fstat(base).st_size
    adds_record = appended and 0 < tail <= RECORD_BYTES
    if adds_record and backing.starts_with(theirs, base) and backing.starts_with(ours, base):
        return Verdict.BOTH
    if backing.starts_with(theirs, ours):
        return Verdict.THEIRS
    return Verdict.OURS if backing.starts_with(ours, theirs) else None


@dataclass(frozen=True, slots=True)
class Placed:
    """How a publish went: the inode that the name shows now, and whether it is another one than the draft's."""

    inode: PrivateInode
    verdict: Verdict = Verdict.OURS


def carry_out(order: Order) -> Placed:
    """Seal a draft, make its name show it, and make that durable.  Runs as the caller."""
    draft = order.draft
    if backing.is_removed(order.target):
        raise PublishRefusedError("its directory was removed", errno.ENOENT)
    write_gathered(draft)
    check_written(draft)
    if draft.unseen:  # one of its writes may have failed for want of space
        order.check_space()
    if draft.copied and draft.base is not None:
        # Whoever changed attributes since then found the copy; the draft's own family changed both.
        backing.copy_metadata(draft.base.fd, order.inode.fd)
    note_provenance(order.inode.fd, draft, seal(order.inode.fd, order.demands))
    with order.keeper.locked():
        order.require_lease()  # also where the name is left as it is
        placed = _settle(order)
        try:
            _sync_names(order)
            version_fd = backing.reopen(placed.inode.fd, os.O_PATH)
        except BaseException:
            if placed.inode is not order.inode:
                os.close(placed.inode.fd)
            raise
    return replace(placed, inode=replace(placed.inode, version_fd=version_fd))


def _sync_names(order: Order) -> None:
    try:
        order.sync_target()
    except OSError as error:
        # There is no way back that would not be a second change of the name: it shows a whole file, unproven.
        reason = f"its name shows it, but its directory could not be synced: {error.strerror}"
        raise PublishRefusedError(reason, error.errno or errno.EIO) from None


def _settle(order: Order) -> Placed:
    """Put the draft where its name is, or what comes of it and of another's version there.  Under the name's lock."""
    draft = order.draft
    if not order.may_replace or draft.fresh or draft.base is None:
        return _place(order, order.inode, over=order.may_replace)
    shown = backing.identity_at(order.target, order.name)
    if shown == draft.base.identity:
        return _place(order, order.inode, over=True)
    if shown is not None:
        return _settle_conflict(order, draft.base.fd)
    links = native.link_count(draft.base.fd)
    if links - order.keeper.retains(draft.base.identity.ino) <= 0:
        raise PublishRefusedError("the version that it was based on was deleted", errno.ESTALE)
    return _place(order, order.inode, over=False)  # renamed away: that is how a downloader finishes


def _settle_conflict(order: Order, base: int) -> Placed:
    theirs = os.open(order.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=order.target)
    try:
        regular, appended = stat.S_ISREG(os.fstat(theirs).st_mode), order.draft.append_only
        verdict = judge(order.inode.fd, base, theirs, appended=appended) if regular else None
        if verdict is None:
            raise PublishRefusedError("the version that it was based on is not what its name shows", errno.ESTALE)
        if verdict is Verdict.OURS:
            return _place(order, order.inode, over=True)
        if verdict is Verdict.BOTH:
            placed = _place_joined(order, base, theirs)
        else:
            placed = Placed(PrivateInode(os.dup(theirs), None))
    finally:
        os.close(theirs)
    if order.inode.temp_name is not None:
        backing.unlink(order.directory, order.inode.temp_name)
    return replace(placed, verdict=verdict)


def _place_joined(order: Order, base: int, theirs: int) -> Placed:
    inode = _joined(order, base, theirs)
    try:
        return _place(order, inode, over=True)
    except BaseException:
        drop_inode(order.directory, inode)
        raise


def _joined(order: Order, base: int, theirs: int) -> PrivateInode:
    """A private inode with another's version and, behind it, what this draft added to its base."""
    start = os.fstat(base).st_size
    tail = os.pread(order.inode.fd, RECORD_BYTES, start)
    fd, temp_name, _ = order.make_temp()
    inode = PrivateInode(fd, temp_name)
    try:
        backing.copy_contents(theirs, fd)
        if backing.write_all(fd, tail, os.fstat(fd).st_size) != len(tail):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        backing.copy_metadata(theirs, fd)
        note_provenance(fd, order.draft, seal(fd, replace(order.demands, written=None)))
    except BaseException:
        drop_inode(order.directory, inode)
        raise
    return inode


def _place(order: Order, inode: PrivateInode, *, over: bool) -> Placed:
    if over:
        order.keeper.retain()
    try:
        # Between its look at the lease and the system call a node can be frozen: nothing can be done about that.
        backing.place(
            inode.fd,
            inode.temp_name,
            order.directory,
            order.target,
            order.name,
            replace=over,
            hidden=order.hidden,
            require=order.require_lease,
        )
    except OSError as error:
        own = backing.identity_of(os.fstat(inode.fd))
        if error.errno not in REPLY_LOST or backing.identity_at(order.target, order.name) != own:
            raise
    return Placed(inode)


def note_provenance(fd: int, draft: Draft, digest: str | None) -> None:
    """Write down with a version what it is and where it comes from, where the backing has extended attributes."""
    opener = draft.opener
    origin = {
        "write_id": draft.write_id,
        "node": socket.gethostname(),
        "uid": draft.caller.uid,
        "pid": opener.tgid if opener else 0,
        "command": opener.command if opener else "",
        "time": round(time.time(), 3),
        "size": os.fstat(fd).st_size,
    }
    with suppress(OSError):
        os.setxattr(fd, ORIGIN_ATTRIBUTE, json.dumps(origin, separators=(",", ":")).encode("ascii"))
        if digest is not None:
            os.setxattr(fd, DIGEST_ATTRIBUTE, digest.encode("ascii"))


def take_place(order: Order) -> bool:
    """Put the copy where the draft's own inode is shown; False, and the copy has no name, where it no longer is."""
    own = backing.identity_of(os.fstat(order.draft.fd))
    placed = False
    if backing.identity_at(order.target, order.name) == own:
        note_provenance(order.inode.fd, order.draft, seal(order.inode.fd, order.demands))
        inode = order.inode
        with order.keeper.locked():
            placed = backing.swap(inode.fd, inode.temp_name, order.directory, order.name, own, order.hidden)
            order.sync_target()
    elif order.inode.temp_name is not None:
        backing.unlink(order.directory, order.inode.temp_name)
    return placed


def drop_inode(directory: int, inode: PrivateInode) -> None:
    """Forget a private inode that nobody needs."""
    os.close(inode.fd)
    if inode.temp_name is not None:
        backing.unlink(directory, inode.temp_name)
