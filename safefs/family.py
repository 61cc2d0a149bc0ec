"""What the kernel tells of the filesystem below a directory, and how far its fcntl(2) locks are meant to reach.

Pure, but for `mounted_at`.  What is said here is what the mount options promise; what a filesystem does, only a probe
can tell (safefs/probe.py).  Options that are not in /proc/self/mountinfo (of FUSE filesystems, and what BeeGFS has in
its own configuration) cannot be known, so their locks are `UNKNOWN`, and nothing rests on them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# Filesystems of one node, which do with names and locks what the kernel's own do.
LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "bcachefs", "tmpfs", "ramfs", "overlay"))


# Filesystems on which a rename is not decided in one place.
_OBJECTS = ("blobfuse", "blobfuse2", "cosfs", "gcsfuse", "geesefs", "goofys", "ossfs", "ossfs2", "s3fs")
REFUSED = {
    "fuse.rclone": "both of two nodes win a race for one name",
    "fuse.mountpoint-s3": "it has no rename",
    **{f"fuse.{name}": "a rename is a copy and a deletion" for name in _OBJECTS},
}


class Reach(StrEnum):
    """Whom an fcntl lock keeps out."""

    NODE = "all processes of this node, which is all that use the filesystem"
    CLUSTER = "processes on all nodes"
    CLIENT = "processes on this mount alone, and nobody on other nodes"
    NOBODY = "nobody: locks fail"
    UNKNOWN = "it is not known whom"


@dataclass(frozen=True)
class Mounted:
    """One line of /proc/self/mountinfo.  `device` is the superblock: within a boot, what is one client of a server."""

    kind: str = ""  # with the subtype of a FUSE filesystem; empty: the kernel does not say
    source: str = ""
    device: str = ""
    options: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.kind in LOCAL

    @property
    def is_nameless(self) -> bool:
        """Whether it is FUSE and does not say which, as clients of object stores do whose source is a bucket.

        What shows a directory or device of this node has its path for a source (bindfs); who gives none has /dev/fuse.
        """
        return self.kind == "fuse" and (not self.source.startswith("/") or self.source == "/dev/fuse")

    def option(self, name: str) -> str | None:
        """The last value of an option, empty where it has none; None when it is not there."""
        values = [text.partition("=")[2] for text in self.options if text.partition("=")[0] == name]
        return values[-1] if values else None

    def reach(self) -> tuple[Reach, str]:
        """Whom its fcntl locks keep out, and what says so."""
        if self.is_local:
            return Reach.NODE, f"{self.kind} is a filesystem of one node"
        for family in FAMILIES:
            if self.kind in family.kinds:
                return self._reach_in(family)
        return Reach.UNKNOWN, f"{self.kind or 'a filesystem without a name'} is not known to safefs"

    @property
    def shares_numbers(self) -> bool:
        """Whether a file or directory has the same st_ino on all nodes.

        Clients of FUSE filesystems number for themselves where they are told nothing else: of others it is not known.
        """
        if self.is_local:
            return True
        numbered = any(self.kind in family.kinds and family.numbers for family in FAMILIES)
        return numbered and self.option("noserverino") is None

    @property
    def caches_listings(self) -> bool:
        """Whether its clients may go on listing what a directory had before another one changed it."""
        shown = any(self.kind in family.kinds and family.listings for family in FAMILIES)
        return not (self.is_local or shown)

    def _reach_in(self, family: Family) -> tuple[Reach, str]:
        for name, value, reach in family.options:
            found = self.option(name)
            if found is not None and value in (None, found):
                return reach, f"{self.kind} is mounted with {name}{'=' + found if found else ''}"
        return family.reach, f"{self.kind}: {family.why}"


@dataclass(frozen=True)
class Family:
    """Filesystems of one kind; the first of the options (name, value or None for any, reach) that is there decides."""

    kinds: tuple[str, ...]
    reach: Reach
    why: str
    options: tuple[tuple[str, str | None, Reach], ...] = ()
    numbers: bool = True  # of inodes, that are the same for all clients
    listings: bool = False  # that show at once what another client has changed


FAMILIES = (
    Family(
        ("nfs", "nfs4"),
        Reach.CLUSTER,
        "the server keeps the locks",
        (
            ("nolock", None, Reach.CLIENT),
            ("local_lock", "all", Reach.CLIENT),
            ("local_lock", "posix", Reach.CLIENT),
            ("local_lock", "none", Reach.CLUSTER),
            ("local_lock", "flock", Reach.CLUSTER),  # fcntl goes to the server
        ),
    ),
    Family(
        ("lustre", "lustre_lite"),
        Reach.UNKNOWN,
        "mounted with neither flock nor localflock, which means one thing or another by version",
        (
            ("noflock", None, Reach.NOBODY),
            ("localflock", None, Reach.CLIENT),
            ("flock", None, Reach.CLUSTER),
        ),
        listings=True,
    ),
    Family(("gpfs",), Reach.CLUSTER, "its token manager keeps the locks", listings=True),
    Family(
        ("ceph", "fuse.ceph", "fuse.ceph-fuse"), Reach.CLUSTER, "the metadata server keeps the locks", listings=True
    ),
    Family(
        ("gfs2",),
        Reach.CLUSTER,
        "its lock manager keeps the locks",
        (("localflocks", None, Reach.CLIENT),),
        listings=True,
    ),
    Family(("cifs", "smb3"), Reach.CLUSTER, "the server keeps the locks", (("nobrl", None, Reach.CLIENT),)),
    Family(("fuse.glusterfs",), Reach.CLUSTER, "the bricks keep the locks", listings=True),
    Family(("fuse.juicefs",), Reach.CLUSTER, "the metadata engine keeps the locks", listings=True),
    Family(("fuse.sshfs",), Reach.CLIENT, "the protocol has no locks", numbers=False),
    Family(("afs",), Reach.CLIENT, "the server locks files as a whole, and ranges stay with the client"),
    Family(("beegfs",), Reach.UNKNOWN, "tuneUseGlobalFileLocks of its client decides, which mount options do not show"),
    Family(
        ("fuse.mfs", "fuse.moosefs"),
        Reach.UNKNOWN,
        "mfsnoposixlocks of its client decides, which is not shown",
        listings=True,
    ),
    Family(("9p", "virtiofs"), Reach.UNKNOWN, "options of the server decide, which are not shown"),
)


def parse(lines: Iterable[str], mount_id: int) -> Mounted:
    """The mount with this id, of the lines of a mountinfo; an empty one where there is none."""
    for line in lines:
        before, separator, after = line.rstrip("\n").partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if separator and fields[0] == str(mount_id) and len(rest) >= 2:
            options = (*fields[5].split(","), *(rest[2].split(",") if len(rest) > 2 else ()))
            source = _unescaped(rest[1])
            return Mounted(_kind(rest[0], source), source, fields[2], options)
    return Mounted()


def _kind(kind: str, source: str) -> str:
    """Some give their type in the source alone: MooseFS, and clients of object stores (mountpoint-s3, blobfuse2)."""
    if kind == "fuse" and source.startswith("mfs#"):
        return "fuse.mfs"
    return f"fuse.{source}" if kind == "fuse" and f"fuse.{source}" in REFUSED else kind


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def mounted_at(path: Path) -> Mounted:
    """The mount that a path lies on: by the id of the mount, since st_dev is not always in the list (btrfs)."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            mount_id = next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(fd)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        return parse(mounts, mount_id)
