"""Digests of files: of what was seen written, and of the bytes that are read back before a publish.

The digest is xxh3-128 (https://github.com/Cyan4973/xxHash): it finds what storage and software get wrong, at the speed
of memory.  It is no proof against somebody who means to deceive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

DIGEST_NAME = "xxh3-128"
PROVENANCE = "user.safefs."  # extended attributes of versions, which only safefs writes
DIGEST_ATTRIBUTE, ORIGIN_ATTRIBUTE = PROVENANCE + "digest", PROVENANCE + "origin"
BLOCK_BYTES = 4 << 20  # of what was written: one rewritten header must not cost the comparison of all the rest


class Hasher(Protocol):
    """The part of hashlib's and xxhash's objects that is used here."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


@dataclass(slots=True)
class _Run:
    """Bytes of one block that were written without a gap, one behind the other; offsets in the file."""

    start: int
    end: int
    hasher: xxhash.xxh3_128


class Written:
    """What was written to a file, as far as it can be told by digests: in each block the last run of bytes."""

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """These bytes were written."""
        view, position = memoryview(data), 0
        while position < len(view):
            start = offset + position
            block = start // BLOCK_BYTES
            part = view[position : position + (block + 1) * BLOCK_BYTES - start]
            position += len(part)
            run = self._runs.get(block)
            if run is None or run.end != start:
                run = self._runs[block] = _Run(start, start, xxhash.xxh3_128())
            run.hasher.update(part)
            run.end += len(part)

    def forget(self, offset: int, end: int | None = None) -> None:
        """Bytes in this range are not what `add` was told any more; all from `offset` on without an end."""
        first, last = offset // BLOCK_BYTES, None if end is None else (end - 1) // BLOCK_BYTES
        for block in [block for block in self._runs if block >= first and (last is None or block <= last)]:
            del self._runs[block]

    def compare(self) -> Comparison:
        return Comparison(self._runs)


class Comparison:
    """Takes a file's bytes in order, and finds where they are not what was written."""

    def __init__(self, runs: dict[int, _Run]) -> None:
        self._runs = sorted(runs.values(), key=lambda run: run.start)
        self._next = 0
        self._hasher = xxhash.xxh3_128()
        self._position = 0
        self.difference: int | None = None  # offset of the first run that differs

    def update(self, data: memoryview) -> None:
        start, end = self._position, self._position + len(data)
        while self._next < len(self._runs) and self._runs[self._next].start < end:
            run = self._runs[self._next]
            self._hasher.update(data[max(run.start, start) - start : min(run.end, end) - start])
            if run.end > end:
                break
            self._finish(run)
        self._position = end

    def _finish(self, run: _Run) -> None:
        if self._hasher.digest() != run.hasher.digest() and self.difference is None:
            self.difference = run.start
        self._hasher.reset()
        self._next += 1

    def finish(self) -> None:
        """The file has ended: what was written beyond is missing."""
        if self._next < len(self._runs) and self.difference is None:
            self.difference = self._runs[self._next].start


def read_file(fd: int, consumers: Sequence[Callable[[memoryview], object]]) -> int:
    """Give a file's bytes, in order, to all consumers; returns how many there are.  Blocks."""
    size = 0
    for data in _pieces(fd):
        for consume in consumers:
            consume(data)
        size += len(data)
    return size


def _pieces(fd: int) -> Iterator[memoryview]:
    size = os.fstat(fd).st_size
    buffer = bytearray(max(1, min(BLOCK_BYTES, size)))
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        yield memoryview(buffer)[:count]
        offset += count


def digest_text(hasher: Hasher) -> str:
    """A digest as it is written down."""
    return f"{DIGEST_NAME}:{hasher.hexdigest()}"
