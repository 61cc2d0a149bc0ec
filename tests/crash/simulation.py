"""A backing filesystem that fails or stops at the Nth call, and forgets what was not synced.

`Simulation` stands in for `os` and the native calls in the modules that carry out a publish.  The calls are real, on a
real directory; beside that every change is written down in order, so that it can be said what a machine that lost its
power at some moment may find on its disk:

- a file's bytes are safe once the file was synced after its last write; before that they may be anything;
- a change of a directory's names is safe once the directory was synced after it; before that each later change may or
  may not be there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from safefs import backing, digest, formats, placing, publisher, retained, seal, state
from safefs.native import native

MODULES: tuple[ModuleType, ...] = (backing, digest, formats, placing, publisher, retained, seal, state)

# What reaches a filesystem: each of these can fail, and the daemon can die before each.
CALLS = (
    *("open", "pwrite", "pread", "preadv", "fsync", "ftruncate", "lseek", "stat", "fstat", "unlink", "rename", "link"),
    *("setxattr", "removexattr", "getxattr", "listxattr", "chmod", "fchmod", "chown", "utime", "fstatvfs"),
)
NATIVE_CALLS = ("linkat", "renameat2", "fallocate", "link_count")


class Fault(Enum):
    """What happens at the Nth call."""

    KILL = "the daemon is killed before it"
    KILL_AFTER = "the daemon is killed after it"
    EIO = errno.EIO
    ENOSPC = errno.ENOSPC
    EDQUOT = errno.EDQUOT
    ESTALE = errno.ESTALE
    EINTR = errno.EINTR
    LOST_REPLY = "it is done, and its caller gets EIO"


class Killed(BaseException):
    """The daemon does nothing any more."""


@dataclass(frozen=True)
class Change:
    """A name of a directory shows another inode (None: it is gone) from this moment on."""

    moment: int
    directory: int
    name: bytes
    ino: int | None


@dataclass
class Simulation:
    """Counts calls, injects one fault, and keeps the history of the disk."""

    fault: Fault | None = None
    at: int = 0  # the number of the call, from 1
    calls: int = 0
    hit: bool = False
    moment: int = 0
    dead: bool = False
    changes: list[Change] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)  # ino → moment of its last change of bytes
    synced: dict[int, int] = field(default_factory=dict)  # ino, of files and directories, → moment of its last sync
    real: Any = os

    @contextmanager
    def installed(self) -> Iterator[None]:
        """For the modules that carry out a publish, calls go through here."""
        simulated, simulated_native = _Shim(os, self, CALLS), _Shim(native, self, NATIVE_CALLS)
        patches = [patch.object(module, "os", simulated) for module in MODULES]
        patches += [patch.object(module, "native", simulated_native) for module in (backing, placing)]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.dead:
            raise Killed
        self.calls += 1
        struck = self.fault is not None and self.calls == self.at
        self.hit = self.hit or struck
        if struck and self.fault is Fault.KILL:
            self.dead = True
            raise Killed
        if struck and isinstance(self.fault, Fault) and isinstance(self.fault.value, int):
            raise OSError(self.fault.value, os.strerror(self.fault.value))
        before = self._names_of(name, args, kwargs)
        result = function(*args, **kwargs)
        self.moment += 1
        self._note(name, args, before)
        if struck and self.fault is Fault.KILL_AFTER:
            self.dead = True
            raise Killed
        if struck and self.fault is Fault.LOST_REPLY:
            if name == "open":
                os.close(result)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return result

    # ------------------------------------------------------------- history

    def _names_of(self, call: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, bytes]]:
        """The names that a call may change, as (st_ino of the directory, name)."""
        if call == "unlink":
            pairs = [(kwargs["dir_fd"], args[0])]
        elif call in ("rename", "link") and "dst_dir_fd" in kwargs:
            pairs = [(kwargs["src_dir_fd"], args[0]), (kwargs["dst_dir_fd"], args[1])]
        elif call == "renameat2":
            pairs = [(args[0], args[1]), (args[2], args[3])]
        elif call == "linkat":
            pairs = [(args[2], args[3])]
        elif call == "open" and args[1] & os.O_CREAT and kwargs.get("dir_fd") is not None:
            pairs = [(kwargs["dir_fd"], args[0])]
        else:
            return []
        self._directories = [directory for directory, _ in pairs]
        return [(os.fstat(directory).st_ino, name) for directory, name in pairs]

    def _note(self, call: str, args: tuple[Any, ...], names: list[tuple[int, bytes]]) -> None:
        for descriptor, (directory, name) in zip(self._directories if names else [], names, strict=True):
            self.changes.append(Change(self.moment, directory, name, _ino_at(descriptor, name)))
        if call in ("pwrite", "ftruncate"):
            self.written[os.fstat(args[0]).st_ino] = self.moment
        elif call == "fsync":
            self.synced[os.fstat(args[0]).st_ino] = self.moment

    _directories: list[int] = field(default_factory=list)

    def wrote(self, fd: int) -> None:
        """Bytes that a client has written, past this simulation."""
        self.moment += 1
        self.written[os.fstat(fd).st_ino] = self.moment

    def may_show(self, directory: Path, name: bytes, before: int | None) -> set[int | None]:
        """The inodes that a name may show after a crash at this moment; `before` is what it showed at first, safely."""
        ino = directory.stat().st_ino
        last_sync = self.synced.get(ino, 0)
        possible = {before}
        for change in self.changes:
            if (change.directory, change.name) == (ino, name):
                possible = {change.ino} if change.moment <= last_sync else possible | {change.ino}
        return possible

    def is_whole(self, ino: int) -> bool:
        """Whether a file's bytes are safe."""
        return self.synced.get(ino, 0) >= self.written.get(ino, 0)


def _ino_at(directory: int, name: bytes) -> int | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


class _Shim:
    """A module of which some functions pass the simulation."""

    def __init__(self, module: Any, simulation: Simulation, names: tuple[str, ...]) -> None:
        self._module, self._simulation, self._names = module, simulation, names

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._module, name)
        if name not in self._names:
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._simulation.call(name, attribute, args, kwargs)

        return call
