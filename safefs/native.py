"""Loads the C extension.  Import this before pyfuse3.

The extension's symbols stand in for some of libfuse3's only when it is loaded into the global scope, ahead of pyfuse3
(safefs/fuse/native.c says which and why).
"""

from __future__ import annotations

import os
import sys

_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL | os.RTLD_NOW)
try:
    from safefs import _native as native
finally:
    sys.setdlopenflags(_flags)

__all__ = ["native"]
