"""Hands the data of open files to the kernel: FUSE passthrough (Linux 6.9, fs/fuse/passthrough.c).

The kernel reads and writes the backing inode itself under a *backing id*.  All open handles of one node must agree:
either every one passes through, with the same id, or none does.  That agreement, made at the first open and kept until
the last handle is released, is the C extension's (safefs/fuse/opens.c), because it opens files as well.
"""

from __future__ import annotations

import errno
import logging
import os

from safefs.native import native

log = logging.getLogger(__name__)

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
        self.reason = ""
        self._device = device
        native.backing_enable(device)

    def disable(self, reason: str) -> None:
        """From now on no file passes through that does not yet."""
        self.reason = reason
        native.backing_enable(-1)

    def requests_wait(self) -> bool:
        """False: what the kernel had to say until now has been received.  On the event loop only."""
        return native.hot_requests_wait(self._device)

    def register(self, fd: int) -> int:
        """A backing id for the inode of `fd`, with the rights of the calling thread; 0 where the kernel refuses."""
        try:
            return native.backing_register(fd)
        except OSError as error:
            if error.errno in _REASONS:
                self.disable(_REASONS[error.errno])
                log.warning("no kernel passthrough: %s", self.reason)
            return 0

    def probe(self, path: os.PathLike[str]) -> None:
        """Find out whether the kernel takes files of the backing, by a regular file of it."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        number = self.register(fd)
        os.close(fd)
        if number:
            native.backing_close(number)
