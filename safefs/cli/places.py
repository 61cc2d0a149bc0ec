"""Which backing directory, and whose state, a path on the command line means."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safefs.agreement import state_of
from safefs.control import LiveMount, find_mounts, mount_above, request
from safefs.errors import SafefsError
from safefs.identity import SERVICE, Identities, owner_of
from safefs.model import STATE_NAME
from safefs.state import StateDirectory


@dataclass(frozen=True)
class Place:
    """A backing directory with a state directory, and the live mount that was asked for it, if there was one."""

    backing: Path
    state_path: Path
    mount: LiveMount | None

    def state(self) -> StateDirectory:
        """To be used as whom it belongs to (StateDirectory.acting), which root becomes: the backing may squash him.

        Raises SafefsError where it cannot be used.
        """
        identities = identities_of(self.state_path)
        if not identities.impersonate and not os.access(self.state_path, os.R_OK | os.W_OK | os.X_OK):
            raise SafefsError(f"{self.state_path}: only its owner may look into it: run this as root", errno.EACCES)
        with identities.acting(SERVICE):
            return StateDirectory(self.state_path, identities)


def identities_of(state: Path) -> Identities:
    """For what a command does in a state directory: root acts as its owner.  SafefsError where it cannot be seen."""
    try:
        fd = os.open(state, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SafefsError(f"{state}: {error.strerror}", error.errno or errno.EIO) from None
    try:
        owner = owner_of(fd)
    finally:
        os.close(fd)
    return Identities(impersonate=os.geteuid() == 0, service=owner if owner.uid else None)


def find_place(path: Path | None) -> Place:
    """The place that a path lies in: on a mount, or in a backing directory.

    Without a path: that of the working directory, or of the only mount.
    """
    mount = mount_of(path, "name a mountpoint or a backing directory")
    if mount is not None:
        answer = request(mount.socket_path, {"op": "status"})
        return Place(Path(str(answer["backing"])), Path(str(answer["state"])), mount)
    if path is None:
        raise SafefsError("there is no mount: name a mountpoint or a backing directory", errno.EINVAL)
    absolute = Path(os.path.abspath(path))
    for directory in (absolute, *absolute.parents):
        if (directory / STATE_NAME).is_dir():
            return Place(directory, state_of(directory), None)
    raise SafefsError(f"{path}: neither on a safefs mount nor in a directory that safefs has worked on", errno.EINVAL)


def mount_of(path: Path | None, remedy: str) -> LiveMount | None:
    """The mount that a path lies on; without a path, that of the working directory, or the only one there is.

    Where there are several, `remedy` says how to name one.
    """
    if path is not None:
        return mount_above(Path(os.path.abspath(path)))
    with suppress(FileNotFoundError):  # it was removed
        mount = mount_above(Path.cwd())
        if mount is not None:
            return mount
    mounts = find_mounts()
    if len(mounts) > 1:
        raise SafefsError(f"there are {len(mounts)} mounts: {remedy}", errno.EINVAL)
    return mounts[0] if mounts else None
