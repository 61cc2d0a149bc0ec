"""As whom a thread of the daemon acts on the backing filesystem.

A daemon of root's takes on the fsuid, fsgid and groups of a caller for the time of one call, in one thread: the backing
decides what he may do.  Two callers stand for the daemon itself:

- `DAEMON` is root.  Where the backing squashes root, that is nobody there, and has no rights.
- `SERVICE` is whom the state directory belongs to: root, or the user that `-o service_user` names.

So what has to be done with users' files (a temp removed, a draft read) is tried as root, whose rights are enough on
most filesystems, and where the backing refuses him as somebody who has them there: the user whom it is for, or the
owner of the file or directory.  The service user has no part in that: its rights end with the state directory, and what
it made elsewhere would be its own.
"""

from __future__ import annotations

import errno
import os
import pwd
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from safefs import processes
from safefs.model import Caller
from safefs.native import native

T = TypeVar("T")

REFUSED = (errno.EACCES, errno.EPERM)

# Told apart, and from a client of root's, by which object they are.
DAEMON = Caller(0, 0)
SERVICE = Caller(0, 0)


def user(uid: int, gid: int) -> Caller:
    """A user in this group, and in those in which the user database knows him."""
    try:
        groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        groups = []
    return Caller(uid, gid, groups=tuple(groups))


def owner_of(fd: int) -> Caller:
    """The owner of an inode, in its group."""
    status = os.fstat(fd)
    return user(status.st_uid, status.st_gid)


def written_down(caller: Caller) -> list[Any]:
    """A caller as JSON, with the groups that he has now.  Blocks."""
    groups = processes.groups(caller.pid) if caller.groups is None else caller.groups
    return [caller.uid, caller.gid, list(groups)]


def read_back(written: Any) -> tuple[Caller, ...]:
    """Whom `written_down` has described; nobody where it is not that."""
    try:
        uid, gid, groups = written
        return (Caller(int(uid), int(gid), groups=tuple(map(int, groups))),)
    except (TypeError, ValueError, OverflowError):
        return ()


class Identities:
    """For threads that block; each goes back to whom it was."""

    def __init__(self, *, impersonate: bool, service: Caller | None = None) -> None:
        self.impersonate = impersonate
        self._service = service
        self.service_uid = os.geteuid() if service is None else service.uid
        self._groups = tuple(os.getgroups())
        self._acting = threading.local()  # as whom a thread acts at the moment; None: as the process

    def _identity(self, caller: Caller) -> Caller | None:
        if not self.impersonate:
            return None
        if caller is SERVICE:
            return self._service
        return None if caller.uid == 0 and caller.gid == 0 else caller

    def _become(self, identity: Caller | None) -> None:
        if identity is None:
            native.become(0, 0, self._groups)
        else:
            groups = processes.groups(identity.pid) if identity.groups is None else identity.groups
            native.become(identity.uid, identity.gid, groups)
        self._acting.identity = identity

    def call(self, caller: Caller, function: Callable[..., T], *args: object) -> T:
        """Call `function(*args)` as somebody, whoever this thread acts as."""
        identity, before = self._identity(caller), getattr(self._acting, "identity", None)
        if identity is before:
            return function(*args)
        try:
            self._become(identity)
            return function(*args)
        finally:
            self._become(before)

    @contextmanager
    def acting(self, caller: Caller) -> Iterator[None]:
        """The same for a block."""
        identity, before = self._identity(caller), getattr(self._acting, "identity", None)
        if identity is before:
            yield
            return
        try:
            self._become(identity)
            yield
        finally:
            self._become(before)

    def call_first(self, callers: Iterable[Caller], function: Callable[..., T], *args: object) -> T:
        """Call a function as the first of these whom the backing does not refuse; else raise what the first was told.

        It is called once for each, so it leaves nothing behind when it is refused.
        """
        tried: list[Caller | None] = []
        refusal: OSError | None = None
        for caller in callers:
            identity = self._identity(caller)
            if identity in tried:
                continue
            tried.append(identity)
            try:
                return self.call(caller, function, *args)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def as_owner(self, fd: int, function: Callable[..., T], *args: object, others: Iterable[Caller] = ()) -> T:
        """As root, and where the backing refuses him as one of `others`, or as the owner of the inode of `fd`."""
        return self.call_first(root_or(others, (fd,)), function, *args)


def root_or(callers: Iterable[Caller], owned: Iterable[int]) -> Iterator[Caller]:
    """Root, and whom to act as where he is refused: these, and the owners of these descriptors' inodes."""
    yield DAEMON
    yield from callers
    yield from map(owner_of, owned)
