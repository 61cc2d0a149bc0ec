"""Publishing a file that safefs kept: written through a mount, so that every check of a close is made."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from pathlib import Path

from safefs.digest import PROVENANCE

COPY_BYTES = 4 << 20


def publish_copy(source: Path, target: Path) -> None:
    """Write a whole file as its owner's and close it; the mount publishes it or refuses."""
    with open(source, "rb", buffering=0) as reading:
        status = os.fstat(reading.fileno())
        # Under a name of its own first: a restore that is interrupted changes nothing.
        temporary = target.with_name(f"{target.name}.restore-{secrets.token_hex(4)}.partial")
        try:
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with open(fd, "wb", buffering=0) as writing:
                shutil.copyfileobj(reading, writing, COPY_BYTES)
                os.fchown(fd, status.st_uid, status.st_gid)
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
                for name in os.listxattr(source):
                    if name.startswith("user.") and not name.startswith(PROVENANCE):
                        os.setxattr(fd, name, os.getxattr(source, name))
                os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
            temporary.rename(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
