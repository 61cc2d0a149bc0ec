"""Errors that carry a POSIX errno and one line for people.

The message says what is wrong and, where it can, what to do; it ends up on a terminal or in a log as it is.
"""

from __future__ import annotations

import errno as _errno

# What json.loads raises of what is no JSON; the latter where lists are nested deeper than anybody writes.
NOT_JSON = (ValueError, RecursionError)
MALFORMED = (*NOT_JSON, KeyError, TypeError)  # and of JSON that is not what it should be


class SafefsError(Exception):
    """A failure that safefs understood: shown as one line, never as a traceback."""

    def __init__(self, message: str, errno: int = _errno.EIO) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno


class PublishRefusedError(SafefsError):
    """A check failed: nothing was published, and what was written is in quarantine."""


class ConfigError(SafefsError):
    """A setting, option or rule that cannot be honoured."""

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.EINVAL)
