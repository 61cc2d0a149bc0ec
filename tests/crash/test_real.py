"""A sample of the same on the real kernel: strace(1) makes a system call of the living daemon fail, or kills it there.

Also writers that are killed at some moment of their close.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, in_quarantine, leftovers, quarantined
from tests.support.mounting import Mount, wait_until

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
SECONDS = 30
# By the kind of temporary file: what a publish over an existing name consists of.
STEPS = {
    "auto": ["fsync", "linkat", "renameat,renameat2", "fsetxattr"],
    "hidden": ["fsync", "renameat,renameat2", "fsetxattr"],
}
PLACES = [(temp, calls) for temp, steps in STEPS.items() for calls in steps]
ERRORS = ["EIO", "ENOSPC", "EDQUOT", "ESTALE", "EINTR"]


@contextmanager
def injected(mount: Mount, calls: str, what: str, log: Path) -> Iterator[None]:
    """Have strace follow the daemon and strike at system calls of these names."""
    command = ["strace", "-f", "-qq", "-o", log, "-e", f"trace={calls}", "-e", f"inject={calls}:{what}"]
    with subprocess.Popen([*command, "-p", str(mount.process.pid)], stderr=subprocess.PIPE) as tracer:
        try:
            assert wait_until(lambda: _is_traced(mount.process.pid)), "strace does not trace the daemon"
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.wait(SECONDS)


def _is_traced(pid: int) -> bool:
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        texts = [Path(f"/proc/{pid}/task/{thread}/status").read_text() for thread in threads]
    except OSError:
        return False
    return all(re.search(r"^TracerPid:\t[1-9]", text, re.MULTILINE) for text in texts)


def open_new_version(mount: Mount, writer: Actor) -> int:
    """A descriptor whose close publishes B over A."""
    (mount / "file").write_bytes(A)
    fd = writer.open(mount / "file", CREATE)
    writer.write(fd, B)
    return fd


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("temp", "calls"), PLACES)
def test_a_failing_call(
    temp: str, calls: str, error: str, make_mount: MountFactory, writer: Actor, tmp_path: Path
) -> None:
    """The close says so, or the file is there; whole it is in any case, and nothing that was written is lost."""
    mount = make_mount("-o", f"temp={temp}")
    mount.expect_log("not published")
    fd = open_new_version(mount, writer)
    with injected(mount, calls, f"error={error}:when=1", tmp_path / "trace"):
        closed = writer.errno("os.close(fd)", fd=fd)
    assert "(INJECTED)" in (tmp_path / "trace").read_text()
    shown = content(mount.backing / "file")
    if closed == 0:
        assert shown == B
    else:
        assert closed == getattr(errno, error)
        assert shown in (A, B)
        assert shown == B or in_quarantine(mount.backing, lambda data: data == B)
    assert content(mount / "file") == shown
    (mount / "next").write_bytes(A)  # the daemon goes on
    assert content(mount.backing / "next") == A


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("temp", "calls"), PLACES)
def test_a_daemon_that_is_killed(
    temp: str, calls: str, number: int, make_mount: MountFactory, writer: Actor, tmp_path: Path
) -> None:
    """At the Nth call of a kind: the name shows a whole version, and the next daemon leaves nothing behind."""
    mount = make_mount("-o", f"temp={temp}")
    fd = open_new_version(mount, writer)
    with injected(mount, calls, f"signal=SIGKILL:when={number}", tmp_path / "trace"):
        closed, allowed = writer.errno("os.close(fd)", fd=fd), {B}
        if closed == 0:
            # Not each kind of call comes so often within one publish: then it comes in the next.
            # strace counts for each thread: in the end the same one has its turn again.
            rewrite, again = "file = open(p, 'wb', 0); file.write(data); file.close()", 0
            for _ in range(200):
                again = again or writer.errno(rewrite, p=str(mount / "file"), data=A)
            allowed = {B, A} if again else {A}
        else:
            allowed |= {A}
        assert mount.process.wait(SECONDS) == -signal.SIGKILL
    assert "killed by SIGKILL" in (tmp_path / "trace").read_text()
    assert content(mount.backing / "file") in allowed
    successor = make_mount("-o", f"temp={temp}")
    assert wait_until(lambda: not leftovers(mount.backing)), leftovers(mount.backing)
    assert content(successor / "file") == content(mount.backing / "file")


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4, 8])
def test_a_writer_that_is_killed_while_it_closes(milliseconds: int, mount: Mount) -> None:
    """SIGKILL at some moment of close(): all or nothing, and what is not published is kept."""
    outcomes = set()
    for number in range(8):
        name = f"file{number}"
        with actor() as party:
            fd = party.open(mount / name, CREATE)
            party.write(fd, A)
            party.start("os.close(fd)", fd=fd)
            time.sleep(milliseconds / 1000)
            party.kill(signal.SIGKILL)
        assert wait_until(lambda: content(mount.backing / name) == A or A in quarantined(mount.backing))  # noqa: B023
        outcomes.add(content(mount.backing / name))
        assert outcomes <= {None, A}
    assert outcomes
