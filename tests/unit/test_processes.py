"""What /proc says of real child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from safefs import processes
from safefs.model import Closer, Process

NOBODY = 0x7FFFFFFF  # above any pid_max
INSTRUCTED = r"""
import os, sys, threading
print(os.getpid(), flush=True)
for line in sys.stdin:
    value = eval(line)
    print(value, flush=True)
"""


class Child:
    """A process that evaluates the expressions it is sent."""

    def __init__(self, stack: ExitStack, **options: object) -> None:
        self.process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", INSTRUCTED],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                **options,  # type: ignore[call-overload]
            )
        )
        stack.callback(self.process.kill)
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())

    def __call__(self, expression: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def fork(self) -> int:
        """A child of its own that waits for a signal; returns once it is there."""
        return self("os.fork() or __import__('signal').pause()")

    def zombie(self, expression: str) -> int:
        """A child of its own that ended and was not waited for."""
        pid = self(f"os.fork() or ({expression})")
        assert self(f"os.waitid(os.P_PID, {pid}, os.WEXITED | os.WNOWAIT).si_pid") == pid
        return pid


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


@pytest.fixture
def child(stack: ExitStack) -> Iterator[Child]:
    party = Child(stack, start_new_session=True)
    yield party
    os.killpg(party.pid, signal.SIGKILL)


# ------------------------------------------------------------- who is who


def test_a_process_is_its_thread_group_and_session(child: Child) -> None:
    assert processes.identify(child.pid) == Process(child.pid, child.pid)
    assert processes.identify(os.getpid()) == Process(os.getpid(), os.getsid(0))
    grandchild = child.fork()
    assert processes.identify(grandchild) == Process(grandchild, child.pid)


def test_a_thread_is_identified_as_its_process(child: Child) -> None:
    code = (
        "[ready := threading.Event(), found := [], threading.Thread(target=lambda: (found.append("
        "threading.get_native_id()), ready.set(), threading.Event().wait()), daemon=True).start(), ready.wait()]"
        " and found[0]"
    )
    tid = child(f"(lambda: {code})()")
    assert tid != child.pid
    assert processes.identify(tid) == Process(child.pid, child.pid)
    assert processes.ancestry(tid)[:2] == [child.pid, os.getpid()]
    assert processes.closer_of(tid) == (child.pid, Closer.ALIVE)


@pytest.mark.parametrize("tid", [0, -1, NOBODY])
def test_what_cannot_be_seen_is_nobody(tid: int) -> None:
    assert processes.identify(tid) is None
    assert processes.groups(tid) == ()
    assert processes.ancestry(tid) == []
    assert processes.closer_of(tid) == (0, Closer.UNKNOWN)
    assert not processes.holds_writable(tid, 1, "8:1")
    assert list(processes.descendants(tid)) == []
    assert not processes.descendant_holds(tid, 1, "8:1")


def test_groups_are_the_supplementary_ones(stack: ExitStack) -> None:
    plain = Child(stack, extra_groups=[])
    member = Child(stack, extra_groups=[7, 1234])
    assert processes.groups(plain.pid) == ()
    assert processes.groups(member.pid) == (7, 1234)


def test_ancestry_goes_up_to_the_first_process(child: Child) -> None:
    grandchild = child.fork()
    chain = processes.ancestry(grandchild)
    assert chain[:3] == [grandchild, child.pid, os.getpid()]
    assert chain[-1] == 1
    assert len(set(chain)) == len(chain)


def test_ancestry_of_an_orphan_does_not_name_its_first_parent(child: Child) -> None:
    middle = child("os.posix_spawn(sys.executable, [sys.executable, '-ISc', 'import signal; signal.pause()'], {})")
    assert processes.ancestry(middle)[:2] == [middle, child.pid]
    os.kill(middle, signal.SIGKILL)
    assert child(f"os.waitpid({middle}, 0)[0]") == middle
    assert processes.ancestry(middle) == []


# --------------------------------------------------------- how it ended


def test_a_living_process_lives(child: Child) -> None:
    assert processes.closer_of(child.pid) == (child.pid, Closer.ALIVE)


@pytest.mark.parametrize("status", [0, 1, 9, 137, 255])
def test_an_exit_is_an_exit_whatever_its_status(child: Child, status: int) -> None:
    pid = child.zombie(f"os._exit({status})")
    assert processes.closer_of(pid) == (pid, Closer.EXITED)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGINT, signal.SIGABRT])
def test_an_end_by_a_signal_is_a_killed_writer(child: Child, number: signal.Signals) -> None:
    default = f"__import__('signal').signal({int(number)}, 0) if {int(number)} != 9 else 0"
    pid = child.zombie(f"[{default}, os.kill(os.getpid(), {int(number)})]")
    assert processes.closer_of(pid) == (pid, Closer.KILLED)


@pytest.mark.parametrize(("visible", "closer"), [(True, Closer.EXITED), (False, Closer.KILLED)])
def test_where_the_status_is_hidden_the_flag_decides(
    monkeypatch: pytest.MonkeyPatch, visible: bool, closer: Closer
) -> None:
    """Threads of a process that ends by itself have PF_SIGNALED too; only who cannot see the status goes by it."""
    flags = processes.PF_SIGNALED
    tail = ["Z", "1", "1", "1", "0", "-1", str(flags), *["0"] * 42, "0"]
    texts = {
        "/proc/77/status": "Name:\tx\nTgid:\t77\nPPid:\t1\n",
        "/proc/77/stat": "77 (a) b) " + " ".join(tail),
        "/proc/77/syscall": "running" if visible else None,
    }
    monkeypatch.setattr(processes, "_read", texts.get)
    assert processes.closer_of(77) == (77, closer)


def test_a_process_without_a_stat_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_read", {"/proc/77/status": "Name:\tx\nTgid:\t70\n"}.get)
    assert processes.closer_of(77) == (70, Closer.UNKNOWN)


def test_a_process_name_cannot_forge_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_read", {"/proc/77/status": "Name:\tTgid: 1\nTgid:\t70\nNSsid:\t5\t1\n"}.get)
    assert processes.identify(77) == Process(70, 5)


# -------------------------------------------------------- open descriptors


def device_of(path: Path) -> str:
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("flags", "writable"),
    [("os.O_RDONLY", False), ("os.O_WRONLY", True), ("os.O_RDWR", True), ("os.O_WRONLY | os.O_APPEND", True)],
)
def test_only_a_writable_descriptor_counts(child: Child, file: Path, flags: str, writable: bool) -> None:
    ino = file.stat().st_ino
    fd = child(f"os.open({os.fspath(file)!r}, {flags})")
    assert processes.holds_writable(child.pid, ino, device_of(file)) == writable
    assert not processes.holds_writable(child.pid, ino + 1, device_of(file))
    assert not processes.descendant_holds(child.pid, ino, device_of(file))
    assert processes.descendant_holds(os.getpid(), ino, device_of(file)) == writable
    child(f"os.close({fd}) or 0")
    assert not processes.holds_writable(child.pid, ino, device_of(file))


def test_one_writable_descriptor_among_readers_counts(child: Child, file: Path) -> None:
    ino = file.stat().st_ino
    for flags in ("os.O_RDONLY", "os.O_WRONLY", "os.O_RDONLY"):
        child(f"os.open({os.fspath(file)!r}, {flags})")
    assert processes.holds_writable(child.pid, ino, device_of(file))


def test_a_descendant_holds_what_it_inherited(child: Child, file: Path) -> None:
    ino = file.stat().st_ino
    fd = child(f"os.open({os.fspath(file)!r}, os.O_WRONLY)")
    grandchild = child.fork()
    child(f"os.close({fd}) or 0")
    assert not processes.holds_writable(child.pid, ino, device_of(file))
    assert processes.holds_writable(grandchild, ino, device_of(file))
    assert processes.descendant_holds(child.pid, ino, device_of(file))
    assert list(processes.descendants(child.pid)) == [grandchild]
    os.kill(grandchild, signal.SIGKILL)
    assert child(f"os.waitpid({grandchild}, 0)[0]") == grandchild
    assert not processes.descendant_holds(child.pid, ino, device_of(file))
    assert list(processes.descendants(child.pid)) == []


def test_a_zombie_holds_nothing(child: Child, file: Path) -> None:
    ino = file.stat().st_ino
    pid = child.zombie(f"[os.open({os.fspath(file)!r}, os.O_WRONLY), os._exit(0)]")
    assert not processes.holds_writable(pid, ino, device_of(file))
    assert not processes.descendant_holds(child.pid, ino, device_of(file))


def test_a_file_of_another_filesystem_with_that_number_does_not_count(child: Child, file: Path) -> None:
    """The daemon's own descriptor of a draft, on the backing, is not a copy of the one that its writer has."""
    ino = file.stat().st_ino
    child(f"os.open({os.fspath(file)!r}, os.O_WRONLY)")
    assert processes.holds_writable(child.pid, ino, device_of(file))
    assert not processes.holds_writable(child.pid, ino, "0:999999")
    assert not processes.descendant_holds(os.getpid(), ino, "0:999999")


def test_a_mount_that_is_not_known_here_counts(child: Child, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ino = file.stat().st_ino
    child(f"os.open({os.fspath(file)!r}, os.O_WRONLY)")
    monkeypatch.setattr(processes, "mounted_device", lambda _: None)
    assert processes.holds_writable(child.pid, ino, "0:999999")


def test_the_filesystem_of_a_mount_is_found_by_its_number() -> None:
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            number, _, device, _ = line.split(" ", 3)
            assert processes.mounted_device(int(number)) == device
    assert processes.mounted_device(999999999) is None


# ------------------------------------------------------------------ pidfds


def test_a_pidfd_tells_the_end_of_its_process(child: Child) -> None:
    grandchild = child.fork()
    fd = processes.open_pidfd(grandchild)
    try:
        assert processes.is_alive(fd)
        os.kill(grandchild, signal.SIGKILL)
        assert child(f"os.waitpid({grandchild}, 0)[0]") == grandchild
        assert not processes.is_alive(fd)
    finally:
        os.close(fd)
    assert processes.open_pidfd(grandchild) == -1
    assert not processes.is_alive(-1)


def test_the_start_of_a_process_stays(child: Child) -> None:
    mine = processes.start_time(os.getpid())
    assert mine == processes.start_time(os.getpid()) > 0
    assert processes.start_time(child.pid) >= mine
    assert processes.start_time(NOBODY) == 0
