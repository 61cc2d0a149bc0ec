"""The control socket of a mount: how the command line and the daemon talk, and how live mounts are found.

One Unix socket per mount, in a directory that only its user (and root) can enter; one JSON line asks, one JSON line
answers, then the connection ends.  Guaranteed: a client that sends nothing, too much or nonsense costs the daemon a
bounded time and memory and never an exception; nothing here sends a request into the mount itself.
Not guaranteed: an answer.  A daemon that is busy or gone makes `request` raise within its timeout.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from safefs.errors import NOT_JSON, SafefsError

MOUNT_TYPE = "fuse.safefs"
MAX_REQUEST_BYTES = 64 * 1024
MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_CONNECTIONS = 16
SERVER_SECONDS = 30.0  # for one request; what an answer waits for is bounded more tightly
CLIENT_SECONDS = 5.0
RETRY_SECONDS = 0.02
ACCEPT_SECONDS = 0.5  # before the next try where no descriptor is to be had

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveMount:
    """A safefs mount as the kernel lists it; nobody has been asked whether its daemon still answers."""

    mountpoint: Path
    source: str
    device: int
    mount_id: int
    user_id: int

    @property
    def socket_path(self) -> Path:
        return control_socket(self.mountpoint, self.user_id)


def find_mounts() -> list[LiveMount]:
    """The safefs mounts of this mount namespace, in the order in which they were mounted."""
    with open("/proc/self/mountinfo", "rb") as lines:
        found = [_parse_mountinfo(line) for line in lines]
    return [mount for mount in found if mount is not None]


def find_mount(mountpoint: Path) -> LiveMount | None:
    """The topmost safefs mount on exactly this directory."""
    return next((mount for mount in reversed(find_mounts()) if mount.mountpoint == mountpoint), None)


def mount_above(path: Path) -> LiveMount | None:
    """The innermost mount that an absolute path lies on, judged by its text: nothing is looked up on the mount."""
    above = [mount for mount in reversed(find_mounts()) if mount.mountpoint in (path, *path.parents)]
    return max(above, key=lambda mount: len(mount.mountpoint.parts), default=None)


def _parse_mountinfo(line: bytes) -> LiveMount | None:
    before, _, after = line.rstrip(b"\n").partition(b" - ")
    filesystem, source, options = after.split(b" ", 2)
    if filesystem.decode() != MOUNT_TYPE:
        return None
    fields = before.split(b" ")
    major, minor = (int(number) for number in fields[2].split(b":"))
    user = re.search(rb"\buser_id=(\d+)", options)
    return LiveMount(
        mountpoint=Path(os.fsdecode(_unescape(fields[4]))),
        source=os.fsdecode(_unescape(source)),
        device=os.makedev(major, minor),
        mount_id=int(fields[0]),
        user_id=int(user[1]) if user else 0,
    )


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), field)


def runtime_directory(user_id: int) -> Path:
    """Where the sockets of a user's mounts are."""
    if user_id == 0:
        return Path("/run/safefs")
    own = os.environ.get("XDG_RUNTIME_DIR") if user_id == os.geteuid() else None
    base = Path(own or f"/run/user/{user_id}")
    return base / "safefs" if base.is_dir() else Path(f"/tmp/safefs-{user_id}")


def control_socket(mountpoint: Path, user_id: int | None = None) -> Path:
    """The control socket of a mount; short enough for a socket address, however long the mountpoint is."""
    owner = os.geteuid() if user_id is None else user_id
    encoded = os.fsencode(mountpoint)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", mountpoint.name)[:24].strip("-")
    return runtime_directory(owner) / f"{readable}-{hashlib.sha256(encoded).hexdigest()[:16]}.sock"


def _require_private(directory: Path) -> None:
    """Refuse a directory that somebody else could have put there (/tmp/safefs-1000)."""
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        raise SafefsError(f"{directory} is not ours: remove it, or set XDG_RUNTIME_DIR", errno.EPERM)
    if status.st_mode & 0o077:
        os.chmod(directory, 0o700)


def _prepare_directory(directory: Path) -> None:
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise SafefsError(f"cannot create {directory}: {error.strerror}", error.errno or errno.EIO) from None
    _require_private(directory)


async def serve_control(
    socket_path: Path,
    answer: Answer,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until cancelled; for `nursery.start`, which returns once the socket listens."""
    listener = _listen(socket_path)
    limit = trio.Semaphore(MAX_CONNECTIONS)
    try:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await limit.acquire()
                connection = await _accept(listener)
                nursery.start_soon(_serve_connection, connection, answer, limit)
    finally:
        _stop_listening(listener, socket_path)


async def _accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next client.  One that cannot be had waits: the mount does not end for want of a descriptor or memory."""
    while True:
        try:
            return (await listener.accept())[0]
        except OSError as error:
            _log.warning("a control connection cannot be accepted at the moment: %s", error)
            await trio.sleep(ACCEPT_SECONDS)


def _stop_listening(listener: trio.socket.SocketType, socket_path: Path) -> None:
    listener.close()
    socket_path.unlink(missing_ok=True)


def _listen(socket_path: Path) -> trio.socket.SocketType:
    _prepare_directory(socket_path.parent)
    if daemon_pid(socket_path) is not None:
        raise SafefsError(f"another daemon serves {socket_path}: unmount it first", errno.EBUSY)
    socket_path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(socket_path))
        os.chmod(socket_path, 0o600)
        listener.listen(MAX_CONNECTIONS)
        return trio.socket.from_stdlib_socket(listener)
    except OSError as error:
        listener.close()
        raise SafefsError(f"cannot listen at {socket_path}: {error.strerror}", error.errno or errno.EIO) from None


async def _serve_connection(connection: trio.socket.SocketType, answer: Answer, limit: trio.Semaphore) -> None:
    try:
        with trio.move_on_after(SERVER_SECONDS):
            reply = await _reply(await _receive_line(connection), answer)
            await trio.SocketStream(connection).send_all(reply + b"\n")
    except (OSError, trio.BrokenResourceError):
        # The client went away; there is nobody left to tell.
        pass
    finally:
        connection.close()
        limit.release()


async def _receive_line(connection: trio.socket.SocketType) -> bytes:
    received = b""
    while b"\n" not in received and len(received) <= MAX_REQUEST_BYTES:
        chunk = await connection.recv(MAX_REQUEST_BYTES)
        if not chunk:
            break
        received += chunk
    return received.partition(b"\n")[0]


async def _reply(line: bytes, answer: Answer) -> bytes:
    try:
        return json.dumps(await answer(_parse_request(line))).encode()
    except SafefsError as error:
        return json.dumps({"error": error.message, "errno": error.errno}).encode()
    except Exception:  # noqa: BLE001 - the rim of the daemon: a bug in an answer must not end the mount.
        _log.exception("a control request failed: %.200r", line)
        return json.dumps({"error": "the daemon failed to answer; its log says why", "errno": errno.EIO}).encode()


def _parse_request(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except NOT_JSON:
        message = None
    if not isinstance(message, dict):
        raise SafefsError("a request is one line with a JSON object", errno.EINVAL)
    return message


def request(socket_path: Path, message: Mapping[str, Any], timeout_seconds: float = CLIENT_SECONDS) -> dict[str, Any]:
    """Ask a daemon; SafefsError when there is none, it does not answer in time, or its answer is an error."""
    with _connect(socket_path, timeout_seconds) as connection:
        try:
            connection.sendall(json.dumps(message).encode() + b"\n")
            line = _read_answer(connection)
        except TimeoutError:
            text = f"the daemon did not answer within {timeout_seconds:g} s"
            raise SafefsError(text, errno.ETIMEDOUT) from None
        except OSError as error:
            raise SafefsError(f"the daemon hung up: {error.strerror}", errno.ENOTCONN) from None
    return _checked_answer(line)


def _connect(socket_path: Path, timeout_seconds: float) -> socket.socket:
    _require_private_parent(socket_path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_seconds)
    try:
        _connect_patiently(connection, os.fspath(socket_path), timeout_seconds)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise SafefsError(f"no daemon listens at {socket_path}", errno.ENOTCONN) from None
    except TimeoutError:
        connection.close()
        raise SafefsError(f"the daemon did not answer within {timeout_seconds:g} s", errno.ETIMEDOUT) from None
    except PermissionError:
        connection.close()
        raise SafefsError("the mount belongs to another user: ask as that user or as root", errno.EACCES) from None
    except OSError as error:
        connection.close()
        raise SafefsError(f"cannot reach the daemon at {socket_path}: {error}", errno.ENOTCONN) from None
    return connection


def _connect_patiently(connection: socket.socket, address: str, timeout_seconds: float) -> None:
    """Connect; while the daemon's queue is full the kernel says EAGAIN at once, whatever the socket's timeout."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return connection.connect(address)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(RETRY_SECONDS)


def _require_private_parent(socket_path: Path) -> None:
    """Do not talk to a socket that a third user could have planted under /tmp."""
    try:
        status = os.lstat(socket_path.parent)
    except FileNotFoundError:
        raise SafefsError(f"no daemon listens at {socket_path}", errno.ENOTCONN) from None
    if stat.S_ISLNK(status.st_mode) or status.st_mode & 0o022:
        raise SafefsError(f"{socket_path.parent} is open to others: not trusting it", errno.EPERM)


def _read_answer(connection: socket.socket) -> bytes:
    received = bytearray()
    while len(received) <= MAX_ANSWER_BYTES:
        chunk = connection.recv(65536)
        if not chunk:
            break
        received += chunk
    return bytes(received)


def _checked_answer(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise SafefsError("the daemon sent no complete answer", errno.EPROTO)
    if "error" in answer:
        raise SafefsError(str(answer["error"]), int(answer.get("errno", errno.EIO)))
    return answer


def daemon_pid(socket_path: Path, timeout_seconds: float = 1.0) -> int | None:
    """The process that listens at a control socket, also when it is too busy to answer; None when there is none."""
    try:
        connection = _connect(socket_path, timeout_seconds)
    except SafefsError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return None
    with connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def sd_notify(state: str) -> None:
    """Tell systemd (`READY=1`, `STOPPING=1`, `STATUS=…`); does nothing when it is not listening."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            channel.sendall(state.encode())
        except OSError as error:
            _log.warning("cannot notify systemd: %s", error)
