"""Processes that lock files, and what a test sees of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.actors import Actor
from tests.support.mounting import Mount, wait_until

NAMES = ["data", "x.lock", "db.sqlite", "weights.incomplete"]  # private, lock, shared, partial
CREATE = os.O_RDWR | os.O_CREAT
SECONDS = 20.0
WAITS_SECONDS = 0.3  # an answer that is not there by then is one that somebody waits for

# Loaded into the actors: record locks as a process (fcntl) or as an open file (OFD), and flock.
CODE = r"""
import fcntl, os, signal, struct
def record(fd, command, kind, start=0, length=0):
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    kind, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, command, request))
    return {fcntl.F_RDLCK: "shared", fcntl.F_WRLCK: "exclusive", fcntl.F_UNLCK: ""}[kind], start, length, pid
SHARED, EXCLUSIVE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
GET, SET, WAIT = fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW
OFD_GET, OFD_SET, OFD_WAIT = 36, 37, 38
def flock(fd, operation):
    fcntl.flock(fd, operation)
LOCK_SH, LOCK_EX, LOCK_UN, LOCK_NB = fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN, fcntl.LOCK_NB
def interruptible(function, *arguments):
    '''The call, which a signal ends: Python would begin it again.'''
    class Interrupted(BaseException):
        pass
    def raised(*_):
        raise Interrupted
    signal.signal(signal.SIGUSR1, raised)
    try:
        function(*arguments)
    except Interrupted:
        return "interrupted"
    return "done"
"""
BLOCKED = (errno.EAGAIN, errno.EACCES)

Make = Callable[[], Actor]


def opened(process: Actor, path: Path, flags: int = CREATE) -> int:
    fd = process.open(path, flags)
    process("globals().__setitem__(name, fd)", name="fd", fd=fd)
    return fd


def waits(process: Actor, seconds: float = SECONDS) -> bool:
    """Whether what was started in the process comes to sleep in a system call that a signal ends, and goes on doing so.

    `seconds` are for coming there, on a busy machine.
    """
    return (
        wait_until(lambda: process.answered() or process_state(process.pid) == "S", seconds)
        and not process.answered(WAITS_SECONDS)
        and process_state(process.pid) == "S"
    )


def hold_publishes(mount: Mount, process: Actor) -> Callable[[], None]:
    """Nothing is published on the mount until what this returns is called."""
    held = process.open(mount.backing / ".safefs" / "names.lock", os.O_RDWR)
    process("fcntl.lockf(held, LOCK_EX)", held=held)
    return lambda: process("fcntl.lockf(held, LOCK_UN)", held=held)


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text().partition("State:\t")[2][0]


TRY = {
    "flock": "flock(fd, LOCK_EX | LOCK_NB)",
    "fcntl": "record(fd, SET, EXCLUSIVE)",
    "ofd": "record(fd, OFD_SET, EXCLUSIVE)",
}
BLOCK = {
    "flock": "flock(fd, LOCK_EX)",
    "fcntl": "record(fd, WAIT, EXCLUSIVE)",
    "ofd": "record(fd, OFD_WAIT, EXCLUSIVE)",
}
RELEASE = {
    "flock": "flock(fd, LOCK_UN)",
    "fcntl": "record(fd, SET, UNLOCK)",
    "ofd": "record(fd, OFD_SET, UNLOCK)",
}
kinds = pytest.mark.parametrize("kind", list(TRY))
hot = pytest.mark.parametrize("hot", ["on", "off"])
