"""`safefs umount`: unmount, and return only when the daemon has ended, so that everything closed is published.

Nothing is killed and nothing is detached lazily: a busy mount stays and the error says who holds it, as far as that
can be found within a deadline.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

from safefs.control import LiveMount, daemon_pid, find_mount
from safefs.errors import SafefsError

# Longer than the default drain, which comes on top of what the kernel still writes back.
END_SECONDS = 120.0
SCAN_SECONDS = 2.0
FUSERMOUNT_SECONDS = 60.0
_UMOUNT_NOFOLLOW = 0x8


def unmount(mountpoint: Path) -> None:
    """Unmount a safefs mount and wait for its daemon; SafefsError when either does not work."""
    path = Path(os.path.abspath(mountpoint))
    mount = find_mount(path) or find_mount(Path(os.path.realpath(path)))
    if mount is None:
        raise SafefsError(f"{mountpoint}: no safefs mount here", errno.EINVAL)
    daemon = _open_daemon(mount)
    try:
        _detach(mount)
        if daemon is not None:
            _wait_for(daemon, mount)
    finally:
        if daemon is not None:
            os.close(daemon)


def _open_daemon(mount: LiveMount) -> int | None:
    """A pidfd of the mount's daemon, taken before the unmount; None when it is gone already."""
    try:
        pid = daemon_pid(mount.socket_path)
        return os.pidfd_open(pid) if pid else None
    except (SafefsError, OSError):
        # Not ours to ask, or just ending: the unmount itself will tell.
        return None


def _detach(mount: LiveMount) -> None:
    if os.geteuid() == 0:
        _umount2(mount)
    else:
        _fusermount(mount)


def _umount2(mount: LiveMount) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mount.mountpoint), _UMOUNT_NOFOLLOW) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        raise SafefsError(_busy_text(mount), errno.EBUSY)
    raise SafefsError(f"{mount.mountpoint}: cannot unmount: {os.strerror(code)}", code)


def _fusermount(mount: LiveMount) -> None:
    command = ["fusermount3", "-u", "--", os.fspath(mount.mountpoint)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=FUSERMOUNT_SECONDS)
    except FileNotFoundError:
        raise SafefsError("fusermount3 is missing: install the package fuse3", errno.ENOENT) from None
    except subprocess.TimeoutExpired:
        raise SafefsError(f"{mount.mountpoint}: fusermount3 hangs; the mount stays", errno.ETIMEDOUT) from None
    if done.returncode == 0:
        return
    message = " ".join(done.stderr.split())
    if "busy" in message.lower():
        raise SafefsError(_busy_text(mount), errno.EBUSY)
    raise SafefsError(message or f"{mount.mountpoint}: fusermount3 failed", errno.EIO)


def _wait_for(daemon: int, mount: LiveMount) -> None:
    if not select.select([daemon], [], [], END_SECONDS)[0]:
        text = f"{mount.mountpoint}: unmounted, but its daemon still runs after {END_SECONDS:g} s: see its log"
        raise SafefsError(text, errno.ETIMEDOUT)


def _busy_text(mount: LiveMount) -> str:
    holders = find_holders(mount)
    who = ", ".join(f"{name} (pid {pid})" for pid, name in holders[:5])
    more = f" and {len(holders) - 5} more" if len(holders) > 5 else ""
    held = f": in use by {who}{more}" if holders else ": in use"
    return f"{mount.mountpoint}: busy{held}; end them or leave the directory, then try again"


@dataclass
class _Scan:
    """What a look through /proc has found so far."""

    mount: LiveMount
    holders: list[tuple[int, str]] = field(default_factory=list)

    def run(self) -> None:
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                if _holds(pid, self.mount):
                    self.holders.append((pid, Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()))
            except OSError:
                # Ended in between, or another user's.
                continue


def find_holders(mount: LiveMount) -> list[tuple[int, str]]:
    """Processes with a descriptor or working directory on the mount, as many as show within SCAN_SECONDS.

    The look runs in a thread that is left alone when it blocks: parts of /proc wait for a process in execve, which
    can wait for the mount.  Only fdinfo and cwd are read.
    """
    scan = _Scan(mount)
    thread = threading.Thread(target=scan.run, daemon=True)
    thread.start()
    thread.join(SCAN_SECONDS)
    return list(scan.holders)


def _holds(pid: int, mount: LiveMount) -> bool:
    return _has_descriptor(pid, mount.mount_id) or _works_in(pid, mount.mountpoint)


def _has_descriptor(pid: int, mount_id: int) -> bool:
    directory = f"/proc/{pid}/fdinfo"
    wanted = f"mnt_id:\t{mount_id}\n"
    return any(wanted in _read_fdinfo(f"{directory}/{fd}") for fd in os.listdir(directory))


def _read_fdinfo(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as info:
            return info.read()
    except FileNotFoundError:
        return ""


def _works_in(pid: int, mountpoint: Path) -> bool:
    directory = Path(os.readlink(f"/proc/{pid}/cwd"))
    return directory == mountpoint or mountpoint in directory.parents
