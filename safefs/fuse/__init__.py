"""The rim towards the kernel: mounting, and the translation of requests."""

from __future__ import annotations

import errno

from safefs.errors import SafefsError


def native_check() -> None:
    """Raise SafefsError when the C extension or pyfuse3 cannot be loaded."""
    try:
        import safefs.native
    except ImportError as error:
        raise SafefsError(
            f"the C extension cannot be loaded ({error}): install libfuse3 and build safefs again", errno.ENOSYS
        ) from None
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        raise SafefsError(
            f"pyfuse3 cannot be loaded ({error}): pip install --force-reinstall pyfuse3", errno.ENOSYS
        ) from None
