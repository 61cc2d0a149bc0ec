"""Where the daemon's log goes, and how a line looks: `DATE TIME LEVEL logger: message`, one line a record.

Under systemd (stderr is the journal) the line starts with the journal's priority instead of a date.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from pathlib import Path

from safefs.errors import SafefsError

_PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# The numbers of syslog(3), by level of Python's logging.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


class _JournalFormatter(logging.Formatter):
    """Gives every line of a record its priority, also those of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def set_up_logging(log_file: Path | None, level: str) -> None:
    """Log to the file, reopened after logrotate moved it, or to stderr."""
    handler = _file_handler(log_file) if log_file else logging.StreamHandler(sys.stderr)
    if log_file is None and _stderr_is_journal():
        handler.setFormatter(_JournalFormatter("%(levelname)s %(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter(_PLAIN))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _file_handler(log_file: Path) -> logging.Handler:
    try:
        return logging.handlers.WatchedFileHandler(log_file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise SafefsError(f"{log_file}: cannot write the log: {error.strerror}", error.errno or 5) from None


def _stderr_is_journal() -> bool:
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    status = os.fstat(2)
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def default_log_file(mountpoint: Path) -> Path:
    """The log of a background mount: named after the mountpoint, in a directory that is made if missing."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", os.fspath(mountpoint)).strip("-") or "root"
    directory = _log_directory()
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        text = f"{directory}: cannot create the log directory: {error.strerror}; name a file with --log-file"
        raise SafefsError(text, error.errno or 5) from None
    return directory / f"{name}.log"


def _log_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/var/log/safefs")
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path.home() / ".local" / "state") / "safefs"
