"""Reads the files of a tree again and compares them with what is known of them: their digest, and their name's promise.

For trees that safefs wrote and for those it never did: a cache of huggingface_hub says by its names what its files are.
Everything here blocks.  Nothing is changed.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto

import xxhash

from safefs.digest import DIGEST_ATTRIBUTE, digest_text, read_file
from safefs.formats import format_problem, named_digest
from safefs.rules import Policy

WINDOW = 8  # files for each thread that may be waiting to be reported in order

Path = tuple[bytes, ...]  # the components of a path below the root
PolicyOf = Callable[[bytes, bytes], Policy]  # of a name and its directory below the root


class Verdict(Enum):
    """What a look at one file has brought."""

    GOOD = auto()
    UNKNOWN = auto()  # it has neither a digest nor a name that says anything
    DAMAGED = auto()
    CHANGED = auto()  # somebody wrote to it meanwhile
    UNREADABLE = auto()


@dataclass(frozen=True)
class Finding:
    """One file: what was found, why, how many bytes were read, and the inode that was looked at."""

    path: Path
    verdict: Verdict
    problem: str = ""
    size_bytes: int = 0
    ino: int = 0


def walk(root: int, skip: Callable[[bytes], bool], after: Path = ()) -> Iterator[Path]:
    """The regular files below a directory's descriptor, in a fixed order, from behind `after`; no link is followed.

    A directory that cannot be read is yielded as if it were a file, so that looking at it says why.
    """
    yield from _walk(root, (), skip, after)


def _walk(directory: int, above: Path, skip: Callable[[bytes], bool], after: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        found = sorted((os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_directory in found:
        path = (*above, name)
        if skip(name) or path < after[: len(path)] or (path == after and not is_directory):
            continue
        if not is_directory:
            if stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                yield path
            continue
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            yield path
            continue
        try:
            yield from _walk(below, path, skip, after if after[: len(path)] == path else ())
        finally:
            os.close(below)


class StoppedError(Exception):
    """The scrub has ended while a file was being read."""


def look(root: int, path: Path, policy_of: PolicyOf, stopping: threading.Event) -> Finding:
    """Read one file and compare it with what is known of it; StoppedError once `stopping` is set."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(b"/".join(path), flags, dir_fd=root)
    except FileNotFoundError:
        return Finding(path, Verdict.CHANGED, "it was removed")
    except OSError as error:
        return Finding(path, Verdict.UNREADABLE, str(error.strerror))
    try:
        return _look(fd, path, policy_of(path[-1], b"/".join(path[:-1])), stopping)
    except OSError as error:
        return Finding(path, Verdict.UNREADABLE, str(error.strerror))
    finally:
        os.close(fd)


def _look(fd: int, path: Path, policy: Policy, stopping: threading.Event) -> Finding:
    def go_on(_data: memoryview) -> None:
        if stopping.is_set():
            raise StoppedError

    before = os.fstat(fd)
    if not stat.S_ISREG(before.st_mode):
        return Finding(path, Verdict.CHANGED, "it is no regular file any more")
    recorded = _recorded(fd)
    named = named_digest(policy.content, path[-1], before.st_size)
    whole = xxhash.xxh3_128()
    consumers: list[Callable[[memoryview], object]] = [whole.update] if recorded else []
    consumers += [named.hasher.update] if named else []
    size = read_file(fd, [go_on, *consumers]) if consumers else 0
    problems = [format_problem(policy.content, fd), named.problem() if named else None]
    if recorded and digest_text(whole) != recorded:
        problems.append(f"it was published as {recorded}, its bytes give {digest_text(whole)}")
    problem = next((text for text in problems if text is not None), "")
    verdict = Verdict.DAMAGED if problem else Verdict.GOOD if consumers or policy.content else Verdict.UNKNOWN
    after = os.fstat(fd)
    if problem and (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        verdict = Verdict.CHANGED
    return Finding(path, verdict, problem, size, before.st_ino)


def _recorded(fd: int) -> str | None:
    try:
        return os.getxattr(fd, DIGEST_ATTRIBUTE).decode("ascii", "replace")
    except OSError:
        return None


def scrub(root: int, paths: Iterator[Path], policy_of: PolicyOf, threads: int) -> Iterator[Finding]:
    """Look at files side by side; the findings come in the order of the paths."""
    waiting: deque[Future[Finding]] = deque()
    stopping = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="safefs-scrub") as pool:
        try:
            for path in paths:
                waiting.append(pool.submit(look, root, path, policy_of, stopping))
                if len(waiting) >= threads * WINDOW:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # whoever interrupts this does not wait until a file of 140 GB is read
            stopping.set()
            for future in waiting:
                future.cancel()
