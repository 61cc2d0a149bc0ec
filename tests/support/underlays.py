"""What filesystems below the mount do not have."""

from __future__ import annotations

import errno
import os


def rename_without_flags(source: int, name: bytes, target: int, new_name: bytes, flags: int) -> None:
    """backing.rename where there is no RENAME_NOREPLACE and no RENAME_EXCHANGE, as on NFS."""
    if flags:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
