"""A reader that polls names in a tight loop and remembers every distinct thing that it ever saw.

The claim of safefs is about what readers *never* see, so a test looks all the time and not only at its own steps.
`Observer.look` returns after a full round that began after the call: each step of a scenario is certain to be seen.
Runs as its own process, a stranger to every writer.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LOOK_SECONDS = 60.0
ABSENT = None

_LOOP = r"""
import errno, json, mmap, os, sys
# Each number is stored at once; struct.pack_into clears it first, and others would read less in between.
share = memoryview(mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 16)).cast("Q")
paths = sys.argv[2:]
seen = {path: {} for path in paths}
errors = {path: {} for path in paths}
sizes = {path: {} for path in paths}
listed = {path: {} for path in paths}
rounds = 0
while not share[1]:
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                data = b""
                size = os.fstat(fd).st_size
                while part := os.read(fd, 1 << 20):
                    data += part
                again = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if not size == len(data) == again:
                errors[path]["sizes %d read %d then %d" % (size, len(data), again)] = 1
            seen[path].setdefault(data, rounds)
        except FileNotFoundError:
            seen[path].setdefault(None, rounds)
        except OSError as error:
            errors[path][errno.errorcode.get(error.errno, str(error.errno))] = 1
        try:
            sizes[path].setdefault(os.stat(path).st_size, rounds)
        except FileNotFoundError:
            sizes[path].setdefault(None, rounds)
        except OSError as error:
            errors[path]["stat " + errno.errorcode.get(error.errno, str(error.errno))] = 1
        try:
            listed[path][os.path.basename(path) in os.listdir(os.path.dirname(path))] = 1
        except OSError as error:
            errors[path]["readdir " + errno.errorcode.get(error.errno, str(error.errno))] = 1
    rounds += 1
    share[0] = rounds
json.dump({path: {
    "contents": [None if data is None else data.hex() for data in seen[path]],
    "sizes": list(sizes[path]), "errors": list(errors[path]), "listed": list(listed[path]),
} for path in paths}, sys.stdout)
"""


@dataclass
class Seen:
    """What one name showed over time, in the order of first sight; None stands for ENOENT."""

    contents: list[bytes | None]
    sizes: list[int | None]
    errors: list[str]
    listed: list[bool]

    def summary(self) -> str:
        shown = [None if data is None else f"{len(data)} bytes {data[:8]!r}…{data[-8:]!r}" for data in self.contents]
        return f"contents {shown}, sizes {self.sizes}, errors {self.errors}, listed {self.listed}"


@dataclass
class Observer:
    """A running observer; `results` is filled when its block ends."""

    paths: list[Path]
    results: dict[Path, Seen] = field(default_factory=dict)
    _share: memoryview | None = None
    _process: subprocess.Popen[bytes] | None = None

    def rounds(self) -> int:
        assert self._share is not None
        return int(self._share[0])

    def look(self) -> None:
        """Return after a whole round over all names that began after this call."""
        assert self._process is not None
        # The round under way may have passed a name already: two ends of rounds hold one whole round.
        target = self.rounds() + 2
        deadline = time.monotonic() + LOOK_SECONDS
        while self.rounds() < target:
            assert self._process.poll() is None, "the observer died"
            assert time.monotonic() < deadline, "the observer hangs in a read"
            time.sleep(0.0005)

    def assert_only(self, *allowed: bytes | None) -> None:
        """Nobody ever saw anything but `allowed`: no other bytes, size, error or early directory entry."""
        for path, seen in self.results.items():
            assert set(seen.contents) <= set(allowed), f"{path}: {seen.summary()}"
            assert set(seen.sizes) <= {None if data is None else len(data) for data in allowed}, (
                f"{path}: {seen.summary()}"
            )
            assert not seen.errors, f"{path}: {seen.summary()}"
            if set(allowed) == {ABSENT}:
                assert True not in seen.listed, f"{path}: a name that never was is listed"


@contextmanager
def observing(*paths: Path) -> Iterator[Observer]:
    """Watch `paths` until the block ends, then fill in `results`."""
    with tempfile.NamedTemporaryFile(prefix="safefs-observer-") as shared:
        shared.truncate(16)
        observer = Observer(list(paths), _share=memoryview(mmap.mmap(shared.fileno(), 16)).cast("Q"))
        observer._process = process = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-S", "-c", _LOOP, shared.name, *map(os.fspath, paths)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        try:
            observer.look()
            yield observer
            observer.look()
        finally:
            assert observer._share is not None
            observer._share[1] = 1
            try:
                output, _ = process.communicate(timeout=LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
    for path, result in json.loads(output).items():
        contents = [None if data is None else bytes.fromhex(data) for data in result["contents"]]
        observer.results[Path(path)] = Seen(contents, result["sizes"], result["errors"], result["listed"])


def everywhere(name: str, places: Sequence[Path]) -> list[Path]:
    """The same name in several places: each mount, and the bare directory below them."""
    return [place / name for place in places]
