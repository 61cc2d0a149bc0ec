"""The boundary between handlers and the kernel."""

from __future__ import annotations

import errno

import pytest

from safefs.errors import SafefsError
from safefs.fuse.operations import error_number


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOENT, errno.ENOENT),
        (511, 511),
        (512, errno.EIO),  # ERESTARTSYS
        (524, errno.EOPNOTSUPP),  # ENOTSUPP
        (528, errno.EIO),  # EJUKEBOX
        (0, errno.EIO),
    ],
)
def test_the_kernel_takes_no_errno_from_512_on(number: int, told: int) -> None:
    """Its request would never be answered.  NFS clients let such numbers out."""
    assert error_number(OSError(number, "text"), "operation") == told
    assert error_number(SafefsError("text", number), "operation") == told
