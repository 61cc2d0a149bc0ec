"""Versions that a name showed before: kept for a while by a further, hidden name.

Some filesystems (Gluster, JuiceFS) break the descriptors that other nodes hold when a file loses its last name; and an
operator may want yesterday's file back.  One directory for each name, in it one link for each version, named after when
it was replaced, when it may go, and its st_ino.  Times are for retention alone: clocks of nodes need not agree.

Everything here blocks, as the daemon.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from safefs.errors import NOT_JSON

PATH_FILE = "path.json"
# The backing has none, or none to here; or the state directory is of a service user, who may not link files of others.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class RetainedVersion:
    """One version: `replaced` and `expires` in seconds since the epoch."""

    file: Path
    path: str  # below the backing directory, when it was replaced
    replaced: float
    expires: float
    ino: int


class RetainedVersions:
    """The versions below one state directory; `Path.mkdir` of what is missing is left to the first that is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.usable = True  # False once the backing has refused for good

    def keep(self, directory: int, name: bytes, slot: str, shown_path: str, seconds: float) -> None:
        """Link the version that the name shows.  OSError where the backing has no links, or too many of this one."""
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        home = self._path / slot
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = time.time()
        link = f"{time.time_ns():020d}-{int(now + seconds):d}-{status.st_ino:x}"
        os.link(name, home / link, src_dir_fd=directory, follow_symlinks=False)
        with suppress(FileExistsError), open(home / PATH_FILE, "x", encoding="ascii") as file:
            json.dump(shown_path, file)

    def has(self, slot: str, ino: int) -> bool:
        """Whether a version of this name with this st_ino is kept: then one of its names is the hidden one."""
        try:
            return any(entry.endswith(f"-{ino:x}") for entry in os.listdir(self._path / slot))
        except FileNotFoundError:
            return False

    def all(self) -> Iterator[RetainedVersion]:
        """Every version that is kept."""
        with suppress(FileNotFoundError):
            for home in self._path.iterdir():
                yield from self._slot(home)

    def _slot(self, home: Path) -> Iterator[RetainedVersion]:
        with suppress(FileNotFoundError, NotADirectoryError):
            names = sorted(os.listdir(home))
            try:
                path = str(json.loads((home / PATH_FILE).read_text(encoding="ascii")))
            except (OSError, *NOT_JSON):
                path = ""  # cut short by a crash, or damaged
            for name in names:
                with suppress(ValueError):
                    replaced, expires, ino = name.split("-")
                    yield RetainedVersion(home / name, path, int(replaced) / 1e9, float(expires), int(ino, 16))

    def of(self, path: str) -> list[RetainedVersion]:
        """The versions of a path, the newest first."""
        return sorted((kept for kept in self.all() if kept.path == path), key=lambda kept: -kept.replaced)

    def sweep(self) -> int:
        """Remove what has been kept for long enough; how many these were."""
        gone = 0
        for kept in self.all():
            if kept.expires <= time.time():
                kept.file.unlink(missing_ok=True)
                gone += 1
                with suppress(OSError):  # others are kept there
                    self._remove_empty(kept.file.parent)
        return gone

    @staticmethod
    def _remove_empty(home: Path) -> None:
        if os.listdir(home) == [PATH_FILE]:
            (home / PATH_FILE).unlink()
            home.rmdir()


def slot_of(directory: int, name: bytes) -> str:
    """The directory for the versions of a name, by the st_ino of its directory."""
    return f"{directory:x}-{xxhash.xxh3_64_hexdigest(name)}"
