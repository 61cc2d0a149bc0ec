"""Hands the data of open files to the kernel: FUSE passthrough (Linux 6.9, fs/fuse/passthrough.c).

The kernel reads and writes the backing inode itself under a *backing id*.  All open handles of one node must agree:
either every one passes through, with the same id, or none does; `Node.backing_id` is that agreement, made at the first
open and kept until the last handle is released.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from contextlib import suppress

log = logging.getLogger(__name__)

# include/uapi/linux/fuse.h
BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_BACKING_MAP = "=iIQ"  # fd, flags, padding
MAX_BACKING_ID = 0x3FFFFF  # what the C extension carries (FH_BACKING_MASK)

_REASONS = {
    errno.EPERM: "the daemon lacks CAP_SYS_ADMIN",
    errno.ELOOP: "the backing is itself a stacked filesystem (overlayfs, FUSE passthrough)",
    errno.EOPNOTSUPP: "the backing filesystem cannot be passed through",
    errno.ENOTTY: "the kernel has no FUSE passthrough",
}


class Passthrough:
    """Backing ids of one connection; inactive until `enable`, and again once the kernel has refused for good."""

    def __init__(self, reason: str) -> None:
        self.reason = reason  # why it is not active
        self._device = -1

    @property
    def active(self) -> bool:
        return not self.reason

    def enable(self, device: int) -> None:
        """Use the connection behind this /dev/fuse descriptor, which negotiated FUSE_PASSTHROUGH."""
        self._device, self.reason = device, ""

    def register(self, fd: int) -> int:
        """A backing id for the inode of `fd`, with the rights of the calling thread; 0 where the kernel refuses."""
        try:
            number: int = fcntl.ioctl(self._device, BACKING_OPEN, bytearray(struct.pack(_BACKING_MAP, fd, 0, 0)))
        except OSError as error:
            if error.errno in _REASONS:
                self.reason = _REASONS[error.errno]
                log.warning("no kernel passthrough: %s", self.reason)
            return 0
        if number > MAX_BACKING_ID:
            self.close(number)
            return 0
        return number

    def close(self, number: int) -> None:
        with suppress(OSError):
            fcntl.ioctl(self._device, BACKING_CLOSE, struct.pack("=I", number))

    def probe(self, path: os.PathLike[str]) -> None:
        """Find out whether the kernel takes files of the backing, by a regular file of it."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        number = self.register(fd)
        os.close(fd)
        if number:
            self.close(number)
