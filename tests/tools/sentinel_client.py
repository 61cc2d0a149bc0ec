"""Writers and readers of the sentinel protocol, and writers and a cleaner of one directory, as processes of their own.

`ARGV: write ROOT ROUNDS MODE`, `read ROOT ROUNDS`, `eager ROOT ROUNDS`, `churn DIR CLOCK`, `clean DIR CLOCK ROUNDS`.
Every file says in its first line how long it is, so that a reader needs nothing else to see that one is short.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILES = 20
SECONDS = 540.0
HEADER = 32


def content(round_number: int, number: int) -> bytes:
    """A file: a header of 32 bytes with its whole length, then a pattern that no other file has."""
    length = 300_000 if number == 7 else 1 + (round_number * 131 + number * 977) % 12_000
    unit = b"%06d/%02d;" % (round_number, number)
    body = (unit * (length // len(unit) + 1))[:length]
    return (b"%d %d %d" % (length + HEADER, round_number, number)).ljust(HEADER) + body


def fault(data: bytes) -> str | None:
    """What is wrong with a file that a reader has read."""
    if not data:
        return "empty"
    fields = data[:HEADER].split()
    if len(data) < HEADER or len(fields) != 3 or len(data) != int(fields[0]):
        return "short"
    return None if data == content(int(fields[1]), int(fields[2])) else "mixed"


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def halves(data: bytes) -> tuple[bytes, bytes]:
    """Two pieces, so that a file is unfinished for a while."""
    return data[: len(data) // 2], data[len(data) // 2 :]


def open_new(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)


def write_plain(directory: Path, round_number: int) -> None:
    for number in range(FILES):
        descriptor = open_new(directory / f"f{number:02d}")
        for piece in halves(content(round_number, number)):
            write_all(descriptor, piece)
        os.close(descriptor)


def write_held(directory: Path, round_number: int) -> None:
    """A child has copies of all descriptors; the parent finishes the files, and the child ends last."""
    descriptors = [open_new(directory / f"f{number:02d}") for number in range(FILES)]
    pieces = [halves(content(round_number, number)) for number in range(FILES)]
    for descriptor, piece in zip(descriptors, pieces, strict=True):
        write_all(descriptor, piece[0])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=descriptors) as child:
        for descriptor, piece in zip(descriptors, pieces, strict=True):
            write_all(descriptor, piece[1])
            os.close(descriptor)
    assert child.returncode == 0


def write_forked(directory: Path, round_number: int) -> None:
    """The parent writes a half and closes; its child writes the rest through the descriptors that it inherited."""
    descriptors = [open_new(directory / f"f{number:02d}") for number in range(FILES)]
    pieces = [halves(content(round_number, number)) for number in range(FILES)]
    for descriptor, piece in zip(descriptors, pieces, strict=True):
        write_all(descriptor, piece[0])
    go_read, go_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go_read, 1)
        for descriptor, piece in zip(descriptors, pieces, strict=True):
            write_all(descriptor, piece[1])
            os.close(descriptor)
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    os.write(go_write, b"g")
    status = os.waitpid(child, 0)[1]
    os.close(go_read)
    os.close(go_write)
    assert status == 0


def write_redirected(directory: Path, round_number: int) -> None:
    """Children whose standard output is the file; the parent closes its copy while they write."""
    children = []
    for number in range(FILES):
        with open(directory / f"f{number:02d}", "wb") as output:
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
        children.append((child, content(round_number, number)))
    for child, data in children:
        child.communicate(data)
        assert child.returncode == 0


MODES = {
    "plain": write_plain,
    "spawning": write_plain,
    "held": write_held,
    "forked": write_forked,
    "redirected": write_redirected,
}


@contextlib.contextmanager
def spawning(wanted: bool) -> Iterator[None]:
    """Threads that fork and exec all the time: their children have copies of every descriptor for a moment."""
    done = threading.Event()

    def spawn() -> None:
        while not done.is_set():
            subprocess.run(["true"], check=True, close_fds=False)

    threads = [threading.Thread(target=spawn) for _ in range(2 if wanted else 0)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def write(root: Path, rounds: int, mode: str) -> None:
    with spawning(mode == "spawning"):
        for round_number in range(rounds):
            directory = root / f"r{round_number:04d}"
            directory.mkdir()
            MODES[mode](directory, round_number)
            os.close(open_new(directory / "STABLE"))


def read_file(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = b""
        while block := os.read(descriptor, 1 << 20):
            data += block
        return data
    finally:
        os.close(descriptor)


def read(root: Path, rounds: int, *, eager: bool) -> dict[str, object]:
    """Wait for STABLE and open all; eagerly: open what is there, whether STABLE is or not."""
    counts: Counter[str] = Counter()
    samples: list[str] = []
    end = time.monotonic() + SECONDS

    def look(path: Path, *, must_exist: bool) -> None:
        try:
            problem = fault(read_file(path))
        except FileNotFoundError:
            problem = "missing" if must_exist else None
        except OSError as error:
            problem = errno.errorcode.get(error.errno or 0, str(error))
        counts["reads"] += 1
        if problem:
            counts[problem] += 1
            if len(samples) < 10:
                samples.append(f"{path}: {problem}")

    for round_number in range(rounds):
        directory = root / f"r{round_number:04d}"
        names = [directory / f"f{number:02d}" for number in range(FILES)]
        turn = 0
        while not (directory / "STABLE").exists():
            if eager:
                look(names[turn % FILES], must_exist=False)
            turn += 1
            if time.monotonic() > end:
                return {"counts": {**counts, "timeout": 1}, "samples": samples}
        if not eager:
            for name in names:
                look(name, must_exist=True)
            listed = {entry.name for entry in os.scandir(directory)}
            if listed != {name.name for name in names} | {"STABLE"}:
                counts["listing"] += 1
                samples.append(f"{directory}: {sorted(listed)}")
    return {"counts": counts, "samples": samples}


class Clock:
    """The generation of the directory, shared by all processes: even while it stands, odd while it is removed.

    Each number is stored at once; struct.pack_into clears it first, and others would read 0 in between.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as file:
            self._share = memoryview(mmap.mmap(file.fileno(), 16)).cast("q")

    @property
    def now(self) -> int:
        return self._share[0]

    @now.setter
    def now(self, value: int) -> None:
        self._share[0] = value

    @property
    def stopped(self) -> bool:
        return bool(self._share[1])

    def stop(self) -> None:
        self._share[1] = 1


def churn(directory: Path, clock: Clock) -> dict[str, object]:
    """Write files and say in each one in which generation its directory was when the file was opened."""
    counts: Counter[str] = Counter()
    chance = random.Random(os.getpid())
    number = 0
    while not clock.stopped:
        number += 1
        if clock.now % 2:
            # Writers that never pause can keep a cleaner from ever finding the directory empty, on any filesystem.
            time.sleep(0.1)
        place = directory
        try:
            if number % 3 == 0:
                place = directory / f"s{number % 5}"
                with contextlib.suppress(FileExistsError):
                    place.mkdir()
            before = clock.now
            descriptor = open_new(place / f"f{os.getpid()}-{number % 40}")
            after = clock.now
        except FileNotFoundError:
            counts["no directory"] += 1
            continue
        # The nested directory may have been made again by another writer: its generation is known all the same,
        # since it lay in this generation's directory at the moment of the open.
        with contextlib.suppress(FileNotFoundError):
            write_all(descriptor, b"%d %d\n" % (before, after))
        time.sleep(chance.random() * 0.01)
        try:
            os.close(descriptor)
            counts["closed"] += 1
        except OSError as error:
            counts[f"close {errno.errorcode.get(error.errno or 0)}"] += 1
    return {"counts": counts, "samples": []}


def survey(directory: Path, generation: int, counts: Counter[str], samples: list[str]) -> None:
    """Count files of an earlier generation."""
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                data = read_file(Path(place) / name)
            except OSError:
                continue
            counts["files"] += 1
            fields = data.split()
            if len(fields) != 2:
                counts["unfinished"] += 1
                continue
            before, after = map(int, fields)
            if before == after and before % 2 == 0 and before < generation:
                counts["came back"] += 1
                samples.append(f"{place}/{name} of generation {before} in {generation}")


def clean(directory: Path, clock: Clock, rounds: int) -> dict[str, object]:
    """rmtree and mkdir, again and again, and look at what is there in between."""
    counts: Counter[str] = Counter()
    samples: list[str] = []
    end = time.monotonic() + SECONDS
    try:
        for round_number in range(rounds):
            clock.now = 2 * round_number + 1
            while directory.exists():
                # A writer may add a file while the tree is taken down; then it is simply done once more.
                try:
                    shutil.rmtree(directory)
                except OSError as error:
                    counts[f"rmtree {errno.errorcode.get(error.errno or 0)}"] += 1
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                        samples.append(str(error))
                if time.monotonic() > end:
                    return {"counts": {**counts, "timeout": 1}, "samples": samples}
            directory.mkdir()
            clock.now = generation = 2 * round_number + 2
            begin, before = time.monotonic(), counts["files"]
            # On a busy machine a generation lives longer, so that something is written into it.
            while time.monotonic() < begin + (0.03 if counts["files"] > before else 2):
                survey(directory, generation, counts, samples)
            counts["rounds"] += 1
    finally:
        clock.stop()
    return {"counts": counts, "samples": samples[:10]}


def main() -> None:
    command, place = sys.argv[1], Path(sys.argv[2])
    report: dict[str, object] = {}
    if command == "write":
        write(place, int(sys.argv[3]), sys.argv[4])
    elif command in ("read", "eager"):
        report = read(place, int(sys.argv[3]), eager=command == "eager")
    elif command == "churn":
        report = churn(place, Clock(Path(sys.argv[3])))
    elif command == "clean":
        report = clean(place, Clock(Path(sys.argv[3])), int(sys.argv[4]))
    else:
        raise SystemExit(f"unknown command {command}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
