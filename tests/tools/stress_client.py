"""One process of the stress test: `ARGV: ROOT NUMBER SECONDS`; prints a JSON report.

Every file says in its header how long it is and what its checksum is, so any reader sees at once when one is torn,
short or empty.  Names are of two kinds: `shared/*`, which every process replaces, renames and unlinks as it likes, and
`own/N-*`, which only process N changes (but all read), since a rewrite in place that meets another version is refused
by the conflict rules and would prove nothing here.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import xxhash

HEADER = struct.Struct("<8sQQ")
MAGIC = b"stressed"
NAMES = 12
OWN_NAMES = 4
HELD_MAPS = 16
# What an operation may meet because another process was quicker; nothing else may ever be seen.
EXPECTED = {errno.ENOENT, errno.EEXIST}


def make(chance: random.Random) -> bytes:
    """A whole file."""
    size = chance.choice([0, 1, 100, 4096 - HEADER.size, 10_000, 70_000, chance.randrange(300_000)])
    body = chance.randbytes(size)
    return HEADER.pack(MAGIC, HEADER.size + size, xxhash.xxh3_64_intdigest(body)) + body


def fault(data: bytes | mmap.mmap) -> str | None:
    """What is wrong with the bytes of a file."""
    if len(data) < HEADER.size:
        return f"{len(data)} bytes"
    magic, length, digest = HEADER.unpack_from(data)
    if magic != MAGIC:
        return "no header"
    if length != len(data):
        return f"{len(data)} bytes instead of {length}"
    return None if xxhash.xxh3_64_intdigest(data[HEADER.size :]) == digest else "checksum"


class Stress:
    """The operations; each is small, and all of them meet those of the other processes."""

    def __init__(self, root: Path, number: int) -> None:
        self.root = root
        self.number = number
        self.chance = random.Random(number * 7919 + 1)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        # Maps of versions that may be replaced or unlinked by now, with what was in them.
        self.maps: deque[tuple[mmap.mmap, int, str]] = deque()

    def problem(self, text: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(f"process {self.number}: {text}")
        self.counts["problems"] += 1

    def shared(self) -> Path:
        place = self.root / "shared" / ("deep" if self.chance.random() < 0.3 else "")
        return place / f"f{self.chance.randrange(NAMES)}"

    def own(self) -> Path:
        return self.root / "own" / f"{self.number}-{self.chance.randrange(OWN_NAMES)}"

    def anyone(self) -> Path:
        if self.chance.random() < 0.6:
            return self.shared()
        return self.root / "own" / f"{self.chance.randrange(8)}-{self.chance.randrange(OWN_NAMES)}"

    def put(self, descriptor: int, data: bytes) -> None:
        """Write in pieces, so that the file is unfinished for a while."""
        view = memoryview(data)
        pieces = self.chance.choice([1, 1, 2, 5])
        step = max(1, len(data) // pieces)
        while view:
            view = view[os.write(descriptor, view[:step]) :]

    def write_through(self, path: Path, flags: int, data: bytes) -> None:
        descriptor = os.open(path, flags, 0o644)
        try:
            self.put(descriptor, data)
            if flags & os.O_ACCMODE == os.O_RDWR:
                os.ftruncate(descriptor, len(data))
        finally:
            os.close(descriptor)

    def replace_in_place(self) -> None:
        self.write_through(self.shared(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, make(self.chance))

    def create_exclusively(self) -> None:
        self.write_through(self.shared(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, make(self.chance))

    def replace_by_rename(self) -> None:
        target = self.shared()
        temporary = target.with_name(f"tmp.{self.number}")
        self.write_through(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, make(self.chance))
        os.replace(temporary, target)

    def replace_while_open(self) -> None:
        """The way of tempfile: renamed before it is closed."""
        target = self.shared()
        temporary = target.with_name(f"open.{self.number}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self.put(descriptor, make(self.chance))
            os.replace(temporary, target)
        finally:
            os.close(descriptor)

    def rewrite_own(self) -> None:
        self.write_through(self.own(), os.O_RDWR | os.O_CREAT, make(self.chance))

    def map_own(self) -> None:
        """A file that is written through a shared mapping."""
        data = make(self.chance)
        descriptor = os.open(self.own(), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(descriptor, len(data))
            with mmap.mmap(descriptor, len(data)) as view:
                view[: len(data)] = data
        finally:
            os.close(descriptor)

    def rename(self) -> None:
        os.rename(self.shared(), self.shared())

    def unlink(self) -> None:
        os.unlink(self.shared())

    def link(self) -> None:
        os.link(self.shared(), self.shared())

    def read(self) -> None:
        path = self.anyone()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            data = b""
            while block := os.read(descriptor, 1 << 17):
                data += block
        finally:
            os.close(descriptor)
        if wrong := fault(data):
            self.problem(f"read {path}: {wrong}")
        if size != len(data):
            self.problem(f"read {path}: fstat said {size}, {len(data)} bytes came")

    def stat(self) -> None:
        path = self.anyone()
        if path.stat().st_size < HEADER.size:
            self.problem(f"stat {path}: too short")

    def map_and_keep(self) -> None:
        path = self.anyone()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size < HEADER.size:
                self.problem(f"map {path}: too short")
                return
            view = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        except ValueError:
            self.problem(f"map {path}: empty by now")
            return
        finally:
            os.close(descriptor)
        if wrong := fault(view):
            self.problem(f"map {path}: {wrong}")
        self.maps.append((view, xxhash.xxh3_64_intdigest(view), str(path)))
        if len(self.maps) > HELD_MAPS:
            self.check_map(*self.maps.popleft())

    def check_map(self, view: mmap.mmap, digest: int, path: str) -> None:
        if xxhash.xxh3_64_intdigest(view) != digest:
            self.problem(f"a map of {path} changed")
        self.counts["maps checked"] += 1
        view.close()

    def list_names(self) -> None:
        for entry in os.scandir(self.root / "shared"):
            if entry.name.startswith(".safefs"):
                self.problem(f"listed {entry.name}")

    def run(self, seconds: float) -> None:
        operations: list[tuple[int, Callable[[], None]]] = [
            (4, self.replace_in_place),
            (2, self.create_exclusively),
            (4, self.replace_by_rename),
            (2, self.replace_while_open),
            (3, self.rewrite_own),
            (2, self.map_own),
            (2, self.rename),
            (2, self.unlink),
            (1, self.link),
            (10, self.read),
            (3, self.stat),
            (5, self.map_and_keep),
            (1, self.list_names),
        ]
        weights = [weight for weight, _ in operations]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            operation = self.chance.choices(operations, weights)[0][1]
            name = operation.__name__
            try:
                operation()
                self.counts[name] += 1
            except OSError as error:
                if error.errno not in EXPECTED:
                    self.problem(f"{name}: {error}")
                self.counts[f"{name} {errno.errorcode.get(error.errno or 0)}"] += 1
        while self.maps:
            self.check_map(*self.maps.popleft())


def main() -> None:
    stress = Stress(Path(sys.argv[1]), int(sys.argv[2]))
    stress.run(float(sys.argv[3]))
    print(json.dumps({"counts": stress.counts, "problems": stress.problems}))


main()
