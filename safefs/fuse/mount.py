"""Mounting: our own mount(2) or fusermount3, and the INIT handover.

pyfuse3 and libfuse negotiate features with the kernel in FUSE_INIT, but know fewer of them than the kernel.  So they
are given one end of a socket pair as their device; INIT and its answer are relayed, the answer is corrected on its
way, and then the kernel's descriptor takes the socket's place.
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import struct
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyfuse3

from safefs.config import Settings
from safefs.errors import SafefsError
from safefs.native import native

FUSERMOUNT_SECONDS = 20.0
MAX_READ_BYTES = 1 << 20
READAHEAD = "/sys/class/bdi/{}/read_ahead_kb"  # of a filesystem, by its device number

# Of include/uapi/linux/fuse.h.
FUSE_INIT = 26
FUSE_POSIX_LOCKS = 1 << 1
FUSE_ATOMIC_O_TRUNC = 1 << 3
FUSE_DONT_MASK = 1 << 6
FUSE_SPLICE = 1 << 7 | 1 << 8 | 1 << 9
FUSE_FLOCK_LOCKS = 1 << 10
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_HANDLE_KILLPRIV = 1 << 19
FUSE_POSIX_ACL = 1 << 20
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_INIT_EXT = 1 << 30
FUSE2_DIRECT_IO_ALLOW_MMAP = 1 << 4  # of flags2, which carries bits 32 and up
FUSE2_PASSTHROUGH = 1 << 5

# struct fuse_in_header (40 bytes) before struct fuse_init_in; struct fuse_out_header (16) before fuse_init_out.
_IN_OPCODE, _IN_FLAGS, _IN_FLAGS2 = 4, 40 + 12, 40 + 16
_OUT_ERROR, _OUT_FLAGS, _OUT_BACKGROUND, _OUT_FLAGS2, _OUT_STACK_DEPTH = 4, 16 + 12, 16 + 16, 16 + 32, 16 + 36

# Without FUSE_ATOMIC_O_TRUNC a truncation would arrive as a SETATTR of the version.  The background queue must never
# be full: a RELEASE that waits there would be overtaken by the requests that come after close().
_WANTED = (
    FUSE_ATOMIC_O_TRUNC
    | FUSE_PARALLEL_DIROPS
    | FUSE_HANDLE_KILLPRIV_V2
    | FUSE_DONT_MASK
    | FUSE_POSIX_LOCKS
    | FUSE_FLOCK_LOCKS
)
_UNWANTED = FUSE_WRITEBACK_CACHE | FUSE_HANDLE_KILLPRIV | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_SPLICE
MAX_BACKGROUND = 65535
CONGESTION_THRESHOLD = MAX_BACKGROUND * 3 // 4
STACK_DEPTH = 1


@dataclass(frozen=True)
class Features:
    """What the mount asks of the kernel beyond what pyfuse3 does."""

    posix_acl: bool = False
    passthrough: bool = False


@dataclass(frozen=True)
class Connection:
    """A live connection to the kernel: its descriptor, and the INIT flags that are in force."""

    fd: int
    flags: int
    flags2: int

    @property
    def passthrough(self) -> bool:
        return bool(self.flags2 & FUSE2_PASSTHROUGH)

    @property
    def is_over(self) -> bool:
        """Whether the kernel has ended it: poll(2) says POLLERR then (fs/fuse/dev.c, fuse_dev_poll)."""
        poller = select.poll()
        poller.register(self.fd, 0)
        return bool(poller.poll(0))


def open_device() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SafefsError("/dev/fuse is missing: load the kernel module with `modprobe fuse`", errno.ENODEV) from None
    except OSError as error:
        raise SafefsError(f"cannot open /dev/fuse: {error.strerror}", error.errno or errno.EACCES) from None


def mount_as_root(settings: Settings) -> int:
    """mount(2); returns the connection's descriptor."""
    fd = open_device()
    words = [f"fd={fd}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    words += ["default_permissions"] if settings.default_permissions else []
    words += ["allow_other"] if settings.allow_other else []
    words.append(f"max_read={MAX_READ_BYTES}")
    try:
        native.mount(
            os.fsencode(settings.fsname),
            os.fsencode(settings.mountpoint),
            "fuse.safefs",
            settings.mount_flags,
            os.fsencode(",".join(words)),
        )
    except OSError as error:
        os.close(fd)
        hint = ": root needs CAP_SYS_ADMIN here" if error.errno == errno.EPERM else ""
        raise SafefsError(
            f"cannot mount {settings.mountpoint}: {error.strerror}{hint}", error.errno or errno.EIO
        ) from None
    return fd


def mount_as_user(settings: Settings) -> int:
    """fusermount3, which passes the descriptor back over a socket (fusermount3(1), _FUSE_COMMFD)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command = ["fusermount3", "-o", settings.fusermount_options(), "--", os.fspath(settings.mountpoint)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                capture_output=True,
                timeout=FUSERMOUNT_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise SafefsError("fusermount3 is missing: install the package fuse3", errno.ENOENT) from None
        except subprocess.TimeoutExpired:
            raise SafefsError("fusermount3 does not answer", errno.ETIMEDOUT) from None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise SafefsError(lines[-1] if lines else "fusermount3 failed", errno.EPERM)
        ours.settimeout(FUSERMOUNT_SECONDS)
        descriptors = array.array("i")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(descriptors.itemsize))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: descriptors.itemsize])
        if not descriptors:
            raise SafefsError("fusermount3 passed no descriptor", errno.EIO)
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]


def widen_readahead(device: str) -> None:
    """Have the kernel read ahead as much as one READ carries, for files that it does not pass through.

    FUSE starts with 128 KiB, and INIT can only make that less (fs/fuse/inode.c, process_init_reply): a mapping that is
    read for the first time would wait for a request every 32 pages.  Only root may ask for more.
    """
    with suppress(OSError):
        Path(READAHEAD.format(device)).write_text(f"{MAX_READ_BYTES >> 10}\n", encoding="ascii")


def umount(mountpoint: Path, privileged: bool, flags: int) -> None:
    """Unmount from inside the daemon; lazily, so that open files do not keep it."""
    if privileged:
        try:
            native.umount2(os.fsencode(mountpoint), flags)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody else was quicker
                raise
    else:
        subprocess.run(
            ["fusermount3", "-u", "-z", "-q", "--", os.fspath(mountpoint)],
            capture_output=True,
            timeout=FUSERMOUNT_SECONDS,
            check=False,
        )


def corrected_init(request: bytes, reply: bytes, features: Features) -> tuple[bytes, int, int]:
    """libfuse's answer to INIT with our flags; what the kernel does not offer is not asked for."""
    answer = bytearray(reply)
    (offered,) = struct.unpack_from("<I", request, _IN_FLAGS)
    offered2 = struct.unpack_from("<I", request, _IN_FLAGS2)[0] if len(request) >= _IN_FLAGS2 + 4 else 0
    (flags,) = struct.unpack_from("<I", answer, _OUT_FLAGS)
    (flags2,) = struct.unpack_from("<I", answer, _OUT_FLAGS2)
    wanted = _WANTED | (FUSE_POSIX_ACL if features.posix_acl else 0)
    flags = (flags | wanted & offered) & ~_UNWANTED
    if not features.posix_acl:
        flags &= ~FUSE_POSIX_ACL
    if offered & FUSE_INIT_EXT:
        flags |= FUSE_INIT_EXT
        flags2 |= offered2 & FUSE2_DIRECT_IO_ALLOW_MMAP
        if features.passthrough and offered2 & FUSE2_PASSTHROUGH:
            flags2 |= FUSE2_PASSTHROUGH
            struct.pack_into("<I", answer, _OUT_STACK_DEPTH, STACK_DEPTH)
    struct.pack_into("<I", answer, _OUT_FLAGS, flags)
    struct.pack_into("<I", answer, _OUT_FLAGS2, flags2)
    struct.pack_into("<HH", answer, _OUT_BACKGROUND, MAX_BACKGROUND, CONGESTION_THRESHOLD)
    return bytes(answer), flags, flags2


def forget_attributes(nodeid: int) -> None:
    """Make the kernel ask for the attributes of an inode anew.

    Of attributes alone (no pages, no names) this takes no lock in the kernel (fs/fuse/inode.c,
    fuse_reverse_inval_inode), so that it may be called while requests on the inode wait for an answer.
    """
    with suppress(OSError):  # ENOENT: the kernel does not know the inode any more
        pyfuse3.invalidate_inode(pyfuse3.InodeT(nodeid), attr_only=True)


def forget_pages(nodeid: int) -> None:
    """Make the kernel drop what it has cached of an inode's content and attributes.

    Waits for requests on pages of the inode that are under way: in a thread, and never while they wait for the caller.
    """
    with suppress(OSError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(nodeid))


def connect(operations: pyfuse3.Operations, kernel_fd: int, features: Features) -> Connection:
    """Start pyfuse3 on a mounted connection; it owns the returned descriptor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        native.install(operations)
        pyfuse3.init(operations, f"/dev/fd/{theirs.fileno()}", set())
        session_fd = theirs.detach()
        if not native.session_seen():
            raise SafefsError(
                "pyfuse3 uses another libfuse3 than safefs was built with: reinstall both "
                "(pip install --no-binary pyfuse3 --force-reinstall pyfuse3 safefs)"
            )
        request = os.read(kernel_fd, 1 << 17)
        if struct.unpack_from("<I", request, _IN_OPCODE)[0] != FUSE_INIT:
            raise SafefsError("the kernel did not begin with FUSE_INIT")
        ours.send(request)
        native.process_one()
        reply = ours.recv(1 << 16)
        if struct.unpack_from("<i", reply, _OUT_ERROR)[0]:
            raise SafefsError("libfuse3 refused the kernel's protocol version")
        answer, flags, flags2 = corrected_init(request, reply, features)
        os.write(kernel_fd, answer)
        os.dup2(kernel_fd, session_fd, inheritable=False)
        os.close(kernel_fd)
    return Connection(session_fd, flags, flags2)
