"""To whom a state directory has to belong.

Whoever else could write in it could read what is in quarantine, and forge the records by which nodes exclude each
other.  A user who may make names in the backing's root can be there first with a directory of his own.  So a state
directory is used only where it, and all that lies in it, belongs to whom the daemon acts as, and nobody else has rights
to it.
"""

from __future__ import annotations

import errno
import logging
import os
import pwd
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safefs.errors import SafefsError
from safefs.identity import Identities

log = logging.getLogger(__name__)

OF_OTHERS = 0o077
EXAMPLE_USER = "safefs"


def take_custody(path: Path, parts: Iterable[str], identities: Identities) -> None:
    """Have a state directory with these directories in it; as whom it belongs to (identity.SERVICE).

    Raises SafefsError, which says who owns it and what to do.
    """
    try:
        made = _make(path)
        owner = identities.service_uid if identities.impersonate else _owner_here(path, made=made)
        if made:
            _require_made(path, owner, identities)
        _require(path, owner, identities)
        for entry in sorted(os.listdir(path)):
            with suppress(FileNotFoundError):  # another node's, that it has just renamed
                _require_part(path / entry, owner)
        for part in parts:
            _make(path / part)
    except OSError as error:
        raise SafefsError(_why_not(path, error, identities), error.errno or errno.EIO) from None


def warn_of_renames(path: Path) -> None:
    """A state directory that is in use can still be put out of the way, by who may write in the directory above."""
    with suppress(OSError):
        mode = path.parent.stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
            log.warning("whoever may write in %s may rename %s away: chmod +t %s", path.parent, path, path.parent)


def _make(path: Path) -> bool:
    """Whether the directory had to be made.  NFS asks for it first, and then who may not make it is told no more."""
    try:
        path.lstat()
        return False
    except FileNotFoundError:
        pass
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _owner_here(path: Path, *, made: bool) -> int:
    """Who this user is on the filesystem, as he mounted it for himself: sshfs can show him as another."""
    if made:
        return path.lstat().st_uid
    probe = path / f"owner~{secrets.token_hex(4)}"
    probe.mkdir(mode=0o700)
    try:
        return probe.lstat().st_uid
    finally:
        probe.rmdir()


def _require_made(path: Path, owner: int, identities: Identities) -> None:
    """What is made belongs to who makes it, or the server takes him for another."""
    found = path.lstat().st_uid
    if found != owner:
        with suppress(OSError):
            path.rmdir()
        text = f"cannot keep state in {path}: what {name_of(owner)} makes there belongs to {name_of(found)}"
        raise SafefsError(f"{text}: {_remedy(path, identities)}", errno.EACCES)


def _require(path: Path, owner: int, identities: Identities) -> None:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        text = f"{path}: the state directory is a symbolic link: remove it, or name its target with -o state=DIR"
        raise SafefsError(text, errno.ELOOP)
    if not stat.S_ISDIR(status.st_mode):
        raise SafefsError(f"{path}: the state directory is no directory: remove it", errno.ENOTDIR)
    if status.st_uid != owner:
        raise SafefsError(_foreign(path, status.st_uid, owner, identities), errno.EPERM)
    if _close(path, status):
        log.warning("%s: others had rights to safefs's state; they have none any more", path)


def _foreign(path: Path, found: int, owner: int, identities: Identities) -> str:
    text = f"{path}: the state directory belongs to {name_of(found)}, not to {name_of(owner)}"
    if not identities.impersonate:
        return f"{text}: name another one with -o state=DIR"
    try:
        user = pwd.getpwuid(found).pw_name
    except KeyError:
        return f"{text}: remove it if it is nobody's, or name another one with -o state=DIR"
    meant = f"if that is meant, mount with -o service_user={user}" if found else "leave out -o service_user"
    return f"{text}: {meant}; else remove it, or name another one with -o state=DIR"


def _require_part(path: Path, owner: int) -> None:
    status = path.lstat()
    if status.st_uid != owner:
        text = f"{path}: belongs to {name_of(status.st_uid)}, not to {name_of(owner)} as the rest of safefs's state"
        raise SafefsError(f"{text}: somebody else could write there; look what it is, and remove it", errno.EPERM)
    if stat.S_ISDIR(status.st_mode):
        _close(path, status)  # nobody could get there but through what lies above


def _close(path: Path, status: os.stat_result) -> bool:
    """Take everybody else's rights away; whether there were any."""
    if not status.st_mode & OF_OTHERS:
        return False
    path.chmod(0o700)
    if path.lstat().st_mode & OF_OTHERS:
        text = f"{path}: others have rights to safefs's state, and the filesystem keeps them there"
        raise SafefsError(f"{text}: name another directory with -o state=DIR", errno.EPERM)
    return True


def _why_not(path: Path, error: OSError, identities: Identities) -> str:
    text = f"cannot keep state in {path}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM) and identities.impersonate:
        return f"{text} for {name_of(identities.service_uid)}: {_remedy(path, identities)}"
    return f"{text}; name a directory that safefs may write to with -o state=DIR"


def _remedy(path: Path, identities: Identities) -> str:
    """For a backing that squashes root, or on which the service user has no directory yet."""
    service = identities.service_uid
    user = name_of(service) if service else EXAMPLE_USER
    make = f"run `install -d -o {user} -m 700 {path}` where root is root (on the server)"
    if service:
        return f"{make}, or name another directory with -o state=DIR"
    return f"the backing squashes root: {make}, and mount with -o service_user={user}"


def name_of(uid: int) -> str:
    """A user for people."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
