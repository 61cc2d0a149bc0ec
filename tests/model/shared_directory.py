"""A directory that several machines share, as a value: what each call does to it, and what it answers.

Calls happen one after another, as on the server of a shared filesystem; rename(2) is atomic and fails with ENOENT where
its source is gone.  Paths are keys; what a path leads to is a file's text, or `None` for a directory.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from typing import Any

Tree = frozenset[tuple[str, str | None]]
Call = tuple[str, ...]
Answer = tuple[str, Any]  # ("value", what is returned) or ("error", errno)


class Waits(BaseException):
    """The code has come to a call that is not answered yet."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.call = call


def carry_out(tree: Tree, call: Call) -> tuple[Tree, Answer]:
    """One call: the directory after it, and its answer."""
    entries = dict(tree)
    try:
        value = _CALLS[call[0]](entries, *call[1:])
    except OSError as error:
        return tree, ("error", error.errno)
    return frozenset(entries.items()), ("value", value)


def children(entries: dict[str, str | None], path: str) -> list[str]:
    return sorted(each for each in entries if os.path.dirname(each) == path)


def _require(condition: bool, number: int) -> None:
    if not condition:
        raise OSError(number, os.strerror(number))


def _list(entries: dict[str, str | None], path: str) -> tuple[str, ...]:
    _require(path in entries, errno.ENOENT)
    return tuple(os.path.basename(each) for each in children(entries, path))


def _read(entries: dict[str, str | None], path: str) -> str | None:
    _require(path in entries, errno.ENOENT)
    return entries[path]


def _exists(entries: dict[str, str | None], path: str) -> bool:
    return path in entries


def _create(entries: dict[str, str | None], path: str, text: str | None = "") -> None:
    _require(os.path.dirname(path) in entries, errno.ENOENT)
    _require(path not in entries, errno.EEXIST)
    entries[path] = text


def _write(entries: dict[str, str | None], path: str, text: str) -> None:
    if path in entries:  # else into a file that has no name any more
        entries[path] = text


def _mkdir(entries: dict[str, str | None], path: str) -> None:
    _create(entries, path, None)


def _unlink(entries: dict[str, str | None], path: str) -> None:
    _require(path in entries, errno.ENOENT)
    del entries[path]


def _rmdir(entries: dict[str, str | None], path: str) -> None:
    _require(path in entries, errno.ENOENT)
    _require(not children(entries, path), errno.ENOTEMPTY)
    del entries[path]


def _rename(entries: dict[str, str | None], source: str, target: str) -> None:
    _require(source in entries and os.path.dirname(target) in entries, errno.ENOENT)
    is_directory = entries[source] is None
    _require(not (is_directory and children(entries, target)), errno.ENOTEMPTY)
    for path in [each for each in entries if each == source or (is_directory and each.startswith(source + "/"))]:
        entries[target + path[len(source) :]] = entries.pop(path)


_CALLS: dict[str, Callable[..., Any]] = {
    "listdir": _list,
    "read": _read,
    "exists": _exists,
    "create": _create,
    "write": _write,
    "mkdir": _mkdir,
    "unlink": _unlink,
    "rmdir": _rmdir,
    "rename": _rename,
}


class Replay:
    """Stands in for the module `os`: calls are answered as they were before; the first new one ends the run."""

    O_CREAT, O_EXCL, O_WRONLY, O_CLOEXEC = os.O_CREAT, os.O_EXCL, os.O_WRONLY, os.O_CLOEXEC

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self._answers = list(answers)
        self._waits = False
        self._descriptors: list[str] = []
        self.path = self

    def call(self, *call: str) -> Any:
        if not self._answers:
            self._waits = True
            raise Waits(call)
        kind, value = self._answers.pop(0)
        if kind == "error":
            raise OSError(value, os.strerror(value), call[-1])
        return value

    def join(self, *parts: str) -> str:
        return os.path.join(*parts)

    def exists(self, path: str) -> bool:
        return bool(self.call("exists", path))

    def listdir(self, path: str) -> list[str]:
        return list(self.call("listdir", path))

    def mkdir(self, path: str, _mode: int) -> None:
        self.call("mkdir", path)

    def rename(self, source: str, target: str) -> None:
        self.call("rename", source, target)

    def unlink(self, path: str) -> None:
        self.call("unlink", path)

    def rmdir(self, path: str) -> None:
        self.call("rmdir", path)

    def open(self, path: str, _flags: int, _mode: int) -> int:
        self.call("create", path)
        self._descriptors.append(path)
        return len(self._descriptors) - 1

    def close(self, _descriptor: int) -> None:
        """What was created is empty."""

    def fsync(self, _descriptor: int) -> None:
        """Nothing is ever lost here."""

    def fdopen(self, descriptor: int, _mode: str, encoding: str) -> io.StringIO:
        replay, path = self, self._descriptors[descriptor]

        class Written(io.StringIO):
            def close(self) -> None:
                if not self.closed and not replay._waits:
                    text = self.getvalue()
                    super().close()
                    replay.call("write", path, text)

        return Written()

    def open_to_read(self, path: str, encoding: str) -> io.StringIO:
        return io.StringIO(self.call("read", path))
