"""Builds the C client programs in tests/support/clients, once per test session.

C is used where Python cannot show the case: writers with several threads that are killed, true segmentation faults,
a main thread that ends before the others, mappings that outlive their descriptor.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SOURCES = Path(__file__).with_name("clients")
CLIENT_SECONDS = 60.0


@functools.cache
def _build_directory() -> tempfile.TemporaryDirectory[str]:
    directory = tempfile.TemporaryDirectory(prefix="safefs-clients-")
    os.chmod(directory.name, 0o755)
    return directory


@functools.cache
def client_program(name: str, *flags: str) -> Path:
    """The path of the compiled program, or library; readable and executable by every user."""
    target = Path(_build_directory().name) / name
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", *flags, "-o", target, SOURCES / f"{name}.c"],
        check=True,
    )
    return target


class Client:
    """A running C client: it prints the name of each step and waits for a line before it goes on."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid

    def _pipe(self, stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None
        return stream

    def at(self, step: str) -> None:
        """Await the step `step`."""
        line = self._pipe(self.process.stdout).readline().decode().strip()
        assert line == step, f"expected step {step!r}, the client is at {line!r}"

    def go(self) -> None:
        """Let the client leave its present step."""
        stdin = self._pipe(self.process.stdin)
        stdin.write(b"\n")
        stdin.flush()

    def kill(self, number: int) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(CLIENT_SECONDS)


@contextmanager
def client(program: str, *arguments: str | os.PathLike[str]) -> Iterator[Client]:
    """Run a client for the length of a block; it is killed if it is still there at the end."""
    # A client that spins ends by its own alarm(2) even if the test process itself is killed.
    with subprocess.Popen(
        [client_program(program), *(os.fspath(argument) for argument in arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield Client(process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
