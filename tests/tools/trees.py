"""What a directory tree looks like, to compare what a tool made on a mount with what it made on a plain directory."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

# Kept by safefs at the root of a backing directory and not shown in its mounts.
STATE_DIRECTORY = ".safefs"


@dataclass(frozen=True)
class Entry:
    """One name: everything that a tool can set and a user can see."""

    kind: str
    mode: int
    size: int
    content: str
    links: int
    mtime: int


@dataclass(frozen=True)
class Rules:
    """What may differ between two runs of the same tool: patterns are matched against the path in the tree."""

    # Left out altogether: names that the tool draws by chance.
    ignored: tuple[str, ...] = ()
    # Must be there, may have other bytes (time stamps, inode numbers).
    volatile: tuple[str, ...] = ()
    # Only some tools set the time; elsewhere it is the time of the run.
    mtimes: bool = False


ANY_TIME = Rules()
EXACT = Rules(mtimes=True)


def tree(root: Path, rules: Rules = EXACT) -> dict[str, Entry]:
    """All names below `root`."""
    found: dict[str, Entry] = {}
    for place, directories, files in os.walk(root):
        if Path(place) == root and STATE_DIRECTORY in directories:
            directories.remove(STATE_DIRECTORY)
        for name in directories + files:
            path = Path(place) / name
            key = str(path.relative_to(root))
            if any(fnmatch(key, pattern) for pattern in rules.ignored):
                continue
            found[key] = _entry(path, key, rules)
    return found


def _entry(path: Path, key: str, rules: Rules) -> Entry:
    info = path.lstat()
    kind = stat.filemode(info.st_mode)[0]
    size, content = 0, ""
    if kind == "l":
        content = os.readlink(path)
    elif kind == "-" and not any(fnmatch(key, pattern) for pattern in rules.volatile):
        data = path.read_bytes()
        # What stat says and what is there must agree as well.
        size, content = info.st_size, f"{len(data)}:{hashlib.sha256(data).hexdigest()}"
    # A directory's size, links and time are its filesystem's own business, but not those of a file.
    return Entry(
        kind=kind,
        mode=stat.S_IMODE(info.st_mode),
        size=size,
        content=content,
        links=1 if kind == "d" else info.st_nlink,
        mtime=info.st_mtime_ns if rules.mtimes and kind == "-" else 0,
    )


def differences(one: dict[str, Entry], other: dict[str, Entry]) -> list[str]:
    """What differs, a line per name."""
    names = sorted(one.keys() | other.keys())
    return [f"{key}: {one.get(key)} != {other.get(key)}" for key in names if one.get(key) != other.get(key)]
