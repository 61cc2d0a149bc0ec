"""What can be known before mounting: each check raises one line that says what is wrong and what to do.

Guaranteed: nothing is created or changed, and no request is sent into a mount that may be dead, except the one
stat of the mountpoint that finds out.  Not guaranteed: that the mount then succeeds.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from safefs.config import Settings
from safefs.control import find_mount, find_mounts
from safefs.errors import SafefsError

_CAP_SYS_ADMIN = 1 << 21
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC


def check_mount(settings: Settings, *, allow_nonempty: bool) -> None:
    """Everything that stands in the way of this mount, the most basic first."""
    check_backing(settings)
    check_mountpoint(settings.mountpoint, allow_nonempty=allow_nonempty)
    check_relation(settings.backing, settings.mountpoint)
    check_device(settings.privileged)
    if settings.privileged:
        check_capability()
    else:
        check_user(settings)


def check_backing(settings: Settings) -> None:
    backing = settings.backing
    status = _stat_directory(backing, "the backing directory")
    # Where a service user is named root may have no rights: what it makes there will show what it has.
    if settings.service is None and not os.access(backing, os.R_OK | os.X_OK):
        raise SafefsError(f"{backing}: no permission to read the backing directory", errno.EACCES)
    if any(mount.device == status.st_dev for mount in find_mounts()):
        raise SafefsError(f"{backing}: is itself on a safefs mount: mount its backing directory instead", errno.EINVAL)


def check_mountpoint(mountpoint: Path, *, allow_nonempty: bool) -> None:
    if find_mount(mountpoint):
        raise SafefsError(f"{mountpoint}: already mounted; unmount it with: safefs umount {mountpoint}", errno.EBUSY)
    _stat_directory(mountpoint, "the mountpoint")
    try:
        with os.scandir(mountpoint) as entries:
            occupied = next(entries, None) is not None
    except PermissionError:
        raise SafefsError(f"{mountpoint}: no permission to read the mountpoint", errno.EACCES) from None
    if occupied and not allow_nonempty:
        text = f"{mountpoint}: the mountpoint is not empty: empty it, or hide what is there with -o nonempty"
        raise SafefsError(text, errno.ENOTEMPTY)


def _stat_directory(path: Path, what: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise SafefsError(f"{path}: {what} does not exist: create it with: mkdir -p {path}", errno.ENOENT) from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            text = f"{path}: a mount whose daemon died is in the way; remove it with: umount {path}"
            raise SafefsError(text, errno.ENOTCONN) from None
        raise SafefsError(f"{path}: cannot look at {what}: {error.strerror}", error.errno or errno.EIO) from None
    if not stat.S_ISDIR(status.st_mode):
        raise SafefsError(f"{path}: {what} is not a directory", errno.ENOTDIR)
    return status


def check_relation(backing: Path, mountpoint: Path) -> None:
    """A mount within its own backing directory, or over it, would send the daemon's requests to itself: a hang."""
    if os.path.samefile(backing, mountpoint):
        text = f"{mountpoint}: the mountpoint is the backing directory itself: choose another directory"
        raise SafefsError(text, errno.EINVAL)
    if _is_within(mountpoint, backing):
        text = f"{mountpoint}: the mountpoint is inside the backing directory {backing}: choose one outside"
        raise SafefsError(text, errno.EINVAL)
    if _is_within(backing, mountpoint):
        text = f"{mountpoint}: the mountpoint would cover the backing directory {backing}: choose one outside"
        raise SafefsError(text, errno.EINVAL)


def _is_within(path: Path, directory: Path) -> bool:
    """Whether `directory` is above `path`; by identity, so that bind mounts do not hide it."""
    return any(os.path.samefile(parent, directory) for parent in path.parents)


def check_device(privileged: bool) -> None:
    if not os.path.exists("/dev/fuse"):
        raise SafefsError("/dev/fuse is missing: load the kernel module with: modprobe fuse", errno.ENODEV)
    if not privileged and shutil.which("fusermount3") is None:
        raise SafefsError("fusermount3 is missing: install the package fuse3", errno.ENOENT)
    try:
        # fusermount3, too, opens the device with the rights of its caller.
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedy = "give this machine or container the device" if privileged else "as root: chmod 666 /dev/fuse"
        text = f"/dev/fuse cannot be opened ({error.strerror}): {remedy}"
        raise SafefsError(text, error.errno or errno.EIO) from None


def check_capability() -> None:
    """Root in a container often lacks the right to mount."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    if not effective & _CAP_SYS_ADMIN:
        raise SafefsError("root lacks CAP_SYS_ADMIN here: give the container that capability", errno.EPERM)


def check_user(settings: Settings) -> None:
    """What fusermount3 will ask of an unprivileged user, and where his state goes."""
    if not os.access(settings.mountpoint, os.W_OK):
        text = f"{settings.mountpoint}: users may only mount on directories that they can write: choose another"
        raise SafefsError(text, errno.EACCES)
    if settings.allow_other and not _user_allow_other():
        text = "option 'allow_other' needs the line user_allow_other in /etc/fuse.conf: ask root, or leave it out"
        raise SafefsError(text, errno.EPERM)
    place = settings.state if settings.state.exists() else settings.state.parent
    if not settings.read_only and not os.access(place, os.W_OK | os.X_OK):
        text = f"{place}: no permission to write: mount with -o ro, or put safefs's state elsewhere with -o state=DIR"
        raise SafefsError(text, errno.EACCES)


def _user_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def in_initial_pid_namespace() -> bool:
    """Whether every client's process id is visible to the daemon; elsewhere some clients show up as pid 0."""
    return os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE
