"""The seal of a draft: what has to be true of its bytes before a name may show them.

Guaranteed when `seal` returns: the bytes are on stable storage, what was read back is what was seen written, and it is
what the file's name and format promise.  Otherwise it raises, and says which of these does not hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import xxhash

from safefs.digest import Written, digest_text, read_file
from safefs.errors import PublishRefusedError
from safefs.formats import NamedDigest, format_problem, named_digest
from safefs.rules import Policy, Verify

ALONGSIDE_BYTES = 8 << 20  # from here on a file is synced and read at the same time


@dataclass(frozen=True)
class Demands:
    """What is asked of one file."""

    name: bytes  # under which it will be shown
    policy: Policy
    verify: Verify
    written: Written | None = None  # what the daemon saw of it being written


def seal(fd: int, demands: Demands) -> str | None:
    """Sync and check the file of a descriptor; its digest, None where none was asked for.  Blocks.

    Raises PublishRefusedError (EIO) where a check fails, OSError where syncing or reading does.
    """
    size = os.fstat(fd).st_size
    named = named_digest(demands.policy.content, demands.name, size)
    reads = demands.verify is not Verify.OFF or named is not None
    if reads and demands.verify is not Verify.STORAGE and size >= ALONGSIDE_BYTES:
        return _alongside(lambda: os.fsync(fd), lambda: _check(fd, size, demands, named))
    os.fsync(fd)
    if demands.verify is Verify.STORAGE:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return _check(fd, size, demands, named)


def check_name(fd: int, demands: Demands) -> None:
    """The part of the seal that depends on the name: for a file that is given another one.  Blocks."""
    size = os.fstat(fd).st_size
    named = named_digest(demands.policy.content, demands.name, size)
    _check(fd, size, replace(demands, verify=Verify.OFF), named)


def _leave_atime(fd: int) -> None:
    """That safefs reads a file is no access to it; who may not ask for that (open(2), O_NOATIME) goes without."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NOATIME)


def _check(fd: int, size: int, demands: Demands, named: NamedDigest | None) -> str | None:
    _leave_atime(fd)
    whole = None if demands.verify is Verify.OFF else xxhash.xxh3_128()
    comparison = demands.written.compare() if whole and demands.written else None
    readers = (whole, comparison, named.hasher if named else None)
    consumers = [reader.update for reader in readers if reader is not None]
    if consumers and (found := read_file(fd, consumers)) != size:
        raise PublishRefusedError(f"{found} of its {size} bytes could be read back", errno.EIO)
    if comparison is not None:
        comparison.finish()
        if comparison.difference is not None:
            at = comparison.difference
            raise PublishRefusedError(f"what was read back is not what was written, at or behind byte {at}", errno.EIO)
    _refuse(named.problem() if named else None)
    _refuse(format_problem(demands.policy.content, fd))
    return digest_text(whole) if whole else None


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise PublishRefusedError(problem, errno.EIO)


def _alongside(sync: Callable[[], None], check: Callable[[], str | None]) -> str | None:
    """Both at the same time: the disk has its part to do and the processor another.  Without a thread in turn."""
    failures: list[OSError] = []

    def run() -> None:
        try:
            sync()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="safefs-sync", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # "can't start new thread": the limit of the user, the cgroup or the system
        sync()
        return check()
    try:
        digest = check()
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return digest
