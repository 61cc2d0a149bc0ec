"""The rim towards the kernel: mounting, and the translation of requests."""

from __future__ import annotations

import errno
import importlib

from safefs.errors import SafefsError


def native_check() -> None:
    """Raise SafefsError when the C extension or pyfuse3 cannot be loaded, or not work together.

    The extension first: its symbols have to stand before those of libfuse3 (safefs/native.py).
    """
    _load("safefs.native", "install libfuse3 and build safefs again")
    _load("pyfuse3", "pip install --force-reinstall pyfuse3")
    libraries = _loaded_libfuse()
    if len(libraries) != 1:
        raise SafefsError(
            f"safefs and pyfuse3 use different copies of libfuse3 ({', '.join(sorted(libraries))}): build both on this "
            "machine with pip install --force-reinstall --no-binary pyfuse3 pyfuse3 safefs",
            errno.ENOSYS,
        )


def _load(module: str, remedy: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise SafefsError(f"{module} cannot be loaded ({error}): {remedy}", errno.ENOSYS) from None


def _loaded_libfuse() -> set[str]:
    """Paths of the libfuse3 libraries in this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        return {line.split(None, 5)[5].strip() for line in maps if "/libfuse3.so" in line}
