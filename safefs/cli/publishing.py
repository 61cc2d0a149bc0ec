"""Publishing a file that safefs kept: written through a mount, so that every check of a close is made."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from io import FileIO
from pathlib import Path

from safefs.digest import PROVENANCE
from safefs.identity import DAEMON, Identities, user

COPY_BYTES = 4 << 20


def publish_copy(source: int, target: Path, original: tuple[int, int, int] | None = None) -> None:
    """Write a whole file as its owner's and close it; the mount publishes it or refuses.

    By root, and where the backing squashes him by the owner.  `original` is owner, group and mode of the file where
    `source`, which is closed, is a copy of it.
    """
    with open(source, "rb", buffering=0) as reading:
        status = os.fstat(source)
        uid, gid, mode = original or (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
        identities = Identities(impersonate=os.geteuid() == 0)
        identities.call_first((DAEMON, user(uid, gid)), _publish, reading, target, uid, gid, mode)


def _publish(reading: FileIO, target: Path, uid: int, gid: int, mode: int) -> None:
    status = os.fstat(reading.fileno())
    reading.seek(0)
    # Under a name of its own first: a restore that is interrupted changes nothing.
    temporary = target.with_name(f"{target.name}.restore-{secrets.token_hex(4)}.partial")
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(fd, "wb", buffering=0) as writing:
            shutil.copyfileobj(reading, writing, COPY_BYTES)
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)
            for name in os.listxattr(reading.fileno()):
                if name.startswith("user.") and not name.startswith(PROVENANCE):
                    os.setxattr(fd, name, os.getxattr(reading.fileno(), name))
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
