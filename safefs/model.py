"""Frozen values that every layer speaks of: who asks, and who closed last."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

STATE_NAME = ".safefs"  # the state directory at the backing's root, where -o state= names no other


@dataclass(frozen=True, slots=True)
class Caller:
    """The filesystem identity of the thread that sent a request (fuse_ctx; uid and gid are its fsuid and fsgid)."""

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0
    groups: tuple[int, ...] | None = None  # supplementary ones; None: those that the thread `pid` has when asked


@dataclass(frozen=True, slots=True)
class Identity:
    """One inode of the backing filesystem.  Reliable only while something keeps the inode alive: numbers recur."""

    dev: int
    ino: int


@dataclass(frozen=True, slots=True)
class Process:
    """A client process: the thread group and the session (setsid(2)) it belongs to, as the daemon numbers them."""

    tgid: int
    session: int
    command: str = field(default="", compare=False)  # at most 15 bytes, as the process calls itself
    groups: tuple[int, ...] = field(default=(), compare=False)  # supplementary ones of the thread that was looked at


class Closer(Enum):
    """What is known of the process that closed a descriptor last."""

    NOBODY = "nobody has closed yet"
    ALIVE = "a living process"
    EXITED = "an exiting process"
    KILLED = "a process killed by a signal"
    UNKNOWN = "a process that could not be looked at"
