"""Remote-controlled processes: every party of a scenario is a process of its own, and every step is awaited.

Who sees a draft depends on who is whose descendant.  The test process starts all actors, so actors are siblings
(strangers to each other) and the test process is nobody's descendant.  `Actor.fork` makes a true child that inherits
every descriptor, which is how families are built.

An actor runs the system's /usr/bin/python3 on code passed inline, so it works as any user and in any directory.
"""

from __future__ import annotations

import itertools
import os
import pickle
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SYSTEM_PYTHON = "/usr/bin/python3"
CALL_SECONDS = 60.0

# What runs inside an actor.  `serve` evaluates one expression (or executes statements) per message.
_SERVER = r"""
import array, ast, ctypes, errno, fcntl, mmap, os, pickle, signal, socket, stat, struct, subprocess, sys, tempfile
import threading, time
NAMES = globals()
CHANNEL = None
def _connect(address):
    global CHANNEL
    CHANNEL = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    CHANNEL.connect(address)
    body = struct.pack("<I", os.getpid())
    CHANNEL.sendall(body)
def _receive(count):
    data = b""
    while len(data) < count:
        part = CHANNEL.recv(count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
def _reply(value):
    body = pickle.dumps(value)
    CHANNEL.sendall(struct.pack("<I", len(body)) + body)
def _fork(address):
    pid = os.fork()
    if pid == 0:
        CHANNEL.close()
        _connect(address)
        _serve()
    return pid
def _serve():
    while True:
        code, names = pickle.loads(_receive(struct.unpack("<I", _receive(4))[0]))
        NAMES.update(names)
        try:
            try:
                compiled = compile(code, "<actor>", "eval")
            except SyntaxError:
                compiled = compile(code, "<actor>", "exec")
            value = (True, eval(compiled, NAMES))
        except OSError as error:
            value = (False, (error.errno, str(error)))
        except BaseException as error:
            value = (None, repr(error))
        try:
            _reply(value)
        except (TypeError, AttributeError, pickle.PicklingError):
            _reply((True, None))
_connect("\0" + sys.argv[1])
_serve()
"""


class ActorError(AssertionError):
    """The actor's code raised something that is not an OSError, or the actor did not answer in time."""


class Actor:
    """One process; `actor("os.write(fd, data)", data=b"x")` runs code in it and returns what it evaluates to."""

    _numbers = itertools.count()

    def __init__(self, channel: socket.socket, pid: int, process: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self._channel = channel
        self._process = process
        self._owed = 0  # answers that nobody has fetched
        self._children: list[Actor] = []  # each lives as long as its channel

    def start(self, code: str, /, **names: Any) -> None:
        """Send code that may block; `result` fetches its outcome."""
        body = pickle.dumps((code, names))
        self._channel.sendall(struct.pack("<I", len(body)) + body)
        self._owed += 1

    def answered(self, seconds: float = 0.0) -> bool:
        """Whether it has nothing to do, has an outcome for `result`, or ends within this time."""
        return not self._owed or bool(select.select([self._channel], [], [], seconds)[0])

    def result(self, seconds: float = CALL_SECONDS) -> Any:
        """The value of what `start` sent; an OSError in the actor is raised here with the same errno."""
        self._channel.settimeout(seconds)
        try:
            header = self._exactly(4)
            done, value = pickle.loads(self._exactly(struct.unpack("<I", header)[0]))
        except TimeoutError:
            raise ActorError(f"actor {self.pid} did not answer within {seconds} s") from None
        self._owed -= 1
        if done is False:
            raise OSError(*value)
        if done is None:
            raise ActorError(f"actor {self.pid}: {value}")
        return value

    def __call__(self, code: str, /, **names: Any) -> Any:
        self.start(code, **names)
        return self.result()

    def errno(self, code: str, /, **names: Any) -> int:
        """The errno that `code` fails with; 0 when it works."""
        try:
            self(code, **names)
        except OSError as error:
            return error.errno or -1
        return 0

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._channel.recv(count - len(data))
            if not part:
                raise ActorError(f"actor {self.pid} ended")
            data += part
        return data

    def fork(self) -> Actor:
        """A child of this actor that holds a copy of each of its descriptors."""
        with _listener() as (name, accept):
            self.start("_fork(address)", address="\0" + name)
            channel, pid = accept()
            assert self.result() == pid
        self._children.append(Actor(channel, pid, None))
        return self._children[-1]

    def kill(self, signal_number: int) -> None:
        """Send a signal and wait until the process is gone (its descriptors are closed by then)."""
        os.kill(self.pid, signal_number)
        self.wait()

    def exit(self, status: int = 0) -> None:
        """`_exit(2)` with whatever is open."""
        self.start("os._exit(status)", status=status)
        self.wait()

    def wait(self) -> int | None:
        """Await the end; the exit status for a direct child of the test."""
        self._channel.settimeout(CALL_SECONDS)
        try:
            while self._channel.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        if self._process is not None:
            return self._process.wait(CALL_SECONDS)
        # A forked actor is somebody else's child: its channel closes in exit_files, where its other descriptors are
        # closed too, in the order of their numbers.  Gone, or a zombie, means that all of them are closed.
        self._await_zombie()
        return None

    def _await_zombie(self) -> None:
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            ready, _, _ = select.select([descriptor], [], [], CALL_SECONDS)
            assert ready, f"actor {self.pid} did not end"
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """End the actor: by the closing of its channel, which is a clean exit, else by SIGKILL."""
        self._channel.close()
        if self._process is not None:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(CALL_SECONDS)

    # The calls that most scenarios are made of.
    def open(self, path: Path | str | bytes, flags: int, mode: int = 0o644) -> int:
        return int(self("os.open(p, flags, mode)", p=os.fspath(path), flags=flags, mode=mode))

    def write(self, descriptor: int, data: bytes) -> None:
        self("os.write(fd, data) == len(data) or 1/0", fd=descriptor, data=data)

    def closefd(self, descriptor: int) -> None:
        self("os.close(fd)", fd=descriptor)

    def read(self, path: Path | str) -> bytes | None:
        """The whole of a file by its name; None when there is no such name."""
        try:
            return bytes(self("open(p, 'rb').read()", p=os.fspath(path)))
        except FileNotFoundError:
            return None


@contextmanager
def _listener() -> Iterator[tuple[str, Callable[[], tuple[socket.socket, int]]]]:
    name = f"safefs-test-{os.getpid()}-{next(Actor._numbers)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + name)
        listener.listen(1)
        listener.settimeout(CALL_SECONDS)

        def accept() -> tuple[socket.socket, int]:
            channel, _ = listener.accept()
            return channel, struct.unpack("<I", channel.recv(4))[0]

        yield name, accept


@contextmanager
def actor(
    *,
    uid: int | None = None,
    gid: int | None = None,
    groups: Sequence[int] = (),
    cwd: Path | None = None,
    umask: int = 0o022,
) -> Iterator[Actor]:
    """A fresh process, as another user when `uid` is given; ended at the end of the block."""
    options: dict[str, Any] = {}
    if uid is not None:
        options = {"user": uid, "group": gid if gid is not None else uid, "extra_groups": list(groups)}
    with _listener() as (name, accept):
        process = subprocess.Popen(
            [SYSTEM_PYTHON, "-I", "-S", "-c", _SERVER, name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=cwd,
            umask=umask,
            **options,
        )
        channel, pid = accept()
    party = Actor(channel, pid, process)
    try:
        yield party
    finally:
        party.close()
