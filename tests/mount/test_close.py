"""Close, case by case: which close of which process publishes a file, and what others see until then.

Every case runs twice: on two mounts of one directory, where an observer polls the name on both mounts and in the
backing directory and must never see less than the whole; and on a bare directory, where the same observer must see
the unfinished file.  Without that control a case could pass because nobody looked.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from tests.mount.actors import SYSTEM_PYTHON, Actor, actor
from tests.mount.places import (
    ALL_SECONDS,
    PIECE,
    WHOLE,
    A,
    B,
    Stage,
    content,
    in_quarantine,
    leftovers,
    quarantined,
    stage_on_bare,
    stage_on_mounts,
    watch,
)
from tests.support.clients import client
from tests.support.mounting import Mount, status, wait_until

Scenario = Callable[[Stage], None]
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
QUARTERS = b"".join(letter * PIECE for letter in (b"a", b"b", b"c", b"d"))
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]


# ---------------------------------------------------------------------------------------------------------------------
# Cases in which the whole file is published, and nothing before that.


def plain(stage: Stage) -> None:
    """open, write, write, close in one process: the close publishes."""
    with actor() as writer:
        fd = writer.open(stage.path, CREATE)
        stage.absent()
        writer.write(fd, A)
        stage.absent()
        writer.write(fd, B)
        stage.absent()
        writer.closefd(fd)
        stage.published(WHOLE)


def duplicated(stage: Stage) -> None:
    """dup: the close of the first copy publishes nothing, the close of the second does."""
    with actor() as writer:
        fd = writer.open(stage.path, CREATE)
        writer.write(fd, A)
        copy = writer("os.dup(fd)", fd=fd)
        writer.closefd(fd)
        stage.absent()
        writer.write(copy, B)
        writer.closefd(copy)
        stage.published(WHOLE)


def duplicated_high(stage: Stage) -> None:
    """A copy at a high descriptor number counts like any other."""
    with actor() as writer:
        fd = writer.open(stage.path, CREATE)
        writer.write(fd, A)
        copy = writer("fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 900)", fd=fd)
        assert copy >= 900
        writer.closefd(fd)
        stage.absent()
        writer.write(copy, B)
        writer.closefd(copy)
        stage.published(WHOLE)


def inheritable(parent: Actor, path: Path) -> int:
    """Open for write without close-on-exec, as C programs and shells do."""
    fd = parent.open(path, CREATE)
    parent("os.set_inheritable(fd, True)", fd=fd)
    return fd


def fork_parent_closes_first(stage: Stage) -> None:
    """A forked child writes on after its parent closed: the child's close is the one that counts."""
    with actor() as parent:
        fd = inheritable(parent, stage.path)
        parent.write(fd, A)
        child = parent.fork()
        parent.closefd(fd)
        stage.absent()
        child.write(fd, B)
        stage.absent()
        child.closefd(fd)
        stage.published(WHOLE, everywhere_at_once=False)


def fork_cloexec_parent_closes_first(stage: Stage) -> None:
    """The same with a close-on-exec descriptor, as Python opens files: a child that does not exec holds it."""
    with actor() as parent:
        fd = parent.open(stage.path, CREATE)
        parent.write(fd, A)
        child = parent.fork()
        parent.closefd(fd)
        stage.absent()
        child.write(fd, B)
        stage.absent()
        child.closefd(fd)
        stage.published(WHOLE, everywhere_at_once=False)


def fork_child_exits_last(stage: Stage) -> None:
    """The same, but the child ends without a close."""
    with actor() as parent:
        fd = inheritable(parent, stage.path)
        parent.write(fd, A)
        child = parent.fork()
        parent.closefd(fd)
        stage.absent()
        child.write(fd, B)
        child.exit()
        stage.published(WHOLE, everywhere_at_once=False)


def fork_child_closes_first(stage: Stage) -> None:
    """A child that closes its copy, or ends, publishes nothing while its parent still writes."""
    with actor() as parent:
        fd = parent.open(stage.path, CREATE)
        parent.write(fd, A)
        first, second = parent.fork(), parent.fork()
        first.closefd(fd)
        stage.absent()
        second.exit()
        stage.absent()
        parent.write(fd, B)
        parent.closefd(fd)
        # `first` has closed its copy and lives on: it holds nothing.
        stage.published(WHOLE)
        first.close()


def grandchild_writes_last(stage: Stage) -> None:
    """Three generations; the parent and the child close, the grandchild goes on while the child lives."""
    with actor() as parent:
        fd = inheritable(parent, stage.path)
        parent.write(fd, A)
        child = parent.fork()
        grandchild = child.fork()
        child.closefd(fd)
        parent.closefd(fd)
        stage.absent()
        grandchild.write(fd, B)
        grandchild.closefd(fd)
        stage.published(WHOLE, everywhere_at_once=False)
        grandchild.close()
        child.close()


def exec_with_cloexec(stage: Stage) -> None:
    """A child that execs another program closes its copy in execve: that close publishes nothing, and hangs nothing."""
    with actor() as writer:
        fd = writer.open(stage.path, CREATE)
        writer.write(fd, A)
        writer("child = subprocess.Popen(['/bin/cat'], stdin=subprocess.PIPE)")
        stage.absent()
        for _ in range(20):
            writer("subprocess.run(['/bin/true'], check=True)")
        writer("pid = os.fork() or os.execv('/bin/true', ['true']); os.waitpid(pid, 0)")
        stage.absent()
        writer.write(fd, B)
        writer.closefd(fd)
        stage.published(WHOLE)
        writer("child.communicate()")


def own_exec_with_inherited(stage: Stage) -> None:
    """The writer itself execs another program, which inherits the descriptor and finishes."""
    code = (
        f"import os,sys; print('half', flush=True); sys.stdin.readline(); os.write(7, b'b'*{PIECE}); os.close(7); "
        "print('closed', flush=True); sys.stdin.readline()"
    )
    opener = (
        f"import os,sys; fd=os.open({str(stage.path)!r}, {CREATE}); os.write(fd, b'a'*{PIECE}); "
        f"os.dup2(fd, 7, True); os.execv('{SYSTEM_PYTHON}', ['python3', '-ISc', {code!r}])"
    )
    with step_process([SYSTEM_PYTHON, "-ISc", opener]) as process:
        process.at("half")
        stage.absent()
        process.go()
        process.at("closed")
        stage.published(WHOLE)
        process.go()


def own_exec_with_cloexec(stage: Stage) -> None:
    """The writer's own execve closes the descriptor (CLOEXEC): that is its last close, and it publishes."""
    opener = (
        f"import os,sys; fd=os.open({str(stage.path)!r}, {CREATE}); os.write(fd, b'a'*{PIECE}); "
        f"print('half', flush=True); sys.stdin.readline(); os.write(fd, b'b'*{PIECE}); "
        "os.execv('/bin/sh', ['sh', '-c', 'echo closed; read x'])"
    )
    with step_process([SYSTEM_PYTHON, "-ISc", opener]) as process:
        process.at("half")
        stage.absent()
        process.go()
        process.at("closed")
        stage.published(WHOLE, everywhere_at_once=False)
        process.go()


def popen_stdout(stage: Stage) -> None:
    """Popen(stdout=f); f.close(): nothing is published until the child, which writes everything, has ended."""
    code = f"import sys; w=sys.stdout; w.write('a'*{PIECE}); w.flush(); sys.stdin.readline(); w.write('b'*{PIECE})"
    with actor() as parent:
        parent(
            "f = open(path, 'wb')\n"
            "child = subprocess.Popen([python, '-ISc', code], stdin=subprocess.PIPE, stdout=f)\n"
            "f.close()",
            path=str(stage.path),
            python=SYSTEM_PYTHON,
            code=code,
        )
        stage.absent()
        parent("child.communicate(b'go\\n')")
        stage.published(WHOLE, everywhere_at_once=False)


def popen_stdout_with_block(stage: Stage) -> None:
    """`with open(...) as f: Popen(stdout=f)` where the parent wrote the head before."""
    code = f"import sys; sys.stdin.readline(); sys.stdout.write('b'*{PIECE})"
    with actor() as parent:
        parent(
            "with open(path, 'wb') as f:\n"
            "    f.write(head)\n"
            "    f.flush()\n"
            "    child = subprocess.Popen([python, '-ISc', code], stdin=subprocess.PIPE, stdout=f)\n",
            path=str(stage.path),
            python=SYSTEM_PYTHON,
            code=code,
            head=A,
        )
        stage.absent()
        parent("child.communicate(b'go\\n')")
        stage.published(WHOLE, everywhere_at_once=False)


def run_stdout(stage: Stage) -> None:
    """`with open(...) as f: run(cmd, stdout=f)`: the parent's close comes last, and publishes."""
    with actor() as parent:
        parent(
            "f = open(path, 'wb')\nsubprocess.run([python, '-ISc', code], stdout=f, check=True)",
            path=str(stage.path),
            python=SYSTEM_PYTHON,
            code=f"print('a'*{PIECE}, end='')",
        )
        stage.absent()
        parent(
            "subprocess.run([python, '-ISc', code], stdout=f, check=True)",
            python=SYSTEM_PYTHON,
            code=f"print('b'*{PIECE}, end='')",
        )
        stage.absent()
        parent("f.close()")
        stage.published(WHOLE)


class StepProcess:
    """A process that prints each step on stdout and waits for a line on stdin."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)
        self.process.stdout.close()

    def at(self, step: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == step, f"expected {step!r}, the process is at {line!r}"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def step_process(argv: list[str]) -> StepProcess:
    return StepProcess(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))


def shell(interpreter: str, redirected: str, at_once: bool) -> Scenario:
    """A redirection of a shell: `redirected` is run with HALF, BREAK and REST in it and has `> f` somewhere."""

    def scenario(stage: Stage) -> None:
        parts = {
            "HALF": f"head -c {PIECE} /dev/zero | tr '\\0' a",
            "BREAK": "echo half >&3; read x",
            "REST": f"head -c {PIECE} /dev/zero | tr '\\0' b",
        }
        script = redirected
        for word, text in parts.items():
            script = script.replace(word, text)
        script = f"exec 3>&1; {script.replace('FILE', str(stage.path))}\necho closed >&3; read x"
        with step_process([interpreter, "-c", script]) as process:
            process.at("half")
            stage.absent()
            process.go()
            process.at("closed")
            stage.published(WHOLE, everywhere_at_once=at_once)
            process.go()

    scenario.__doc__ = f"{interpreter}: {redirected}"
    return scenario


def two_commands_with_a_pause(stage: Stage) -> None:
    """`(a; b) > f` where a and b are programs: neither end of a publishes."""
    script = (
        f"exec 3>&1; (/usr/bin/head -c {PIECE} {{0}}; echo half >&3; read x; /usr/bin/head -c {PIECE} {{1}})"
        f" > {stage.path}; echo closed >&3; read x"
    )
    with actor() as maker:
        sources = [maker("tempfile.mkstemp()[1]"), maker("tempfile.mkstemp()[1]")]
        try:
            Path(sources[0]).write_bytes(A)
            Path(sources[1]).write_bytes(B)
            with step_process(["sh", "-c", script.format(*sources)]) as process:
                process.at("half")
                stage.absent()
                process.go()
                process.at("closed")
                stage.published(WHOLE, everywhere_at_once=False)
                process.go()
        finally:
            for source in sources:
                os.unlink(source)


def scm_to_descendant(stage: Stage) -> None:
    """A descriptor sent to a child that had closed its inherited copy: a descendant holds it, nothing is published."""
    ours, theirs = socket.socketpair()
    with actor() as parent:
        parent("left, right = socket.socketpair()")
        fd = parent.open(stage.path, CREATE)
        parent.write(fd, A)
        child = parent.fork()
        child.closefd(fd)
        parent("socket.send_fds(left, [b'x'], [fd])", fd=fd)
        got = child("got[1][0]" if child("got = socket.recv_fds(right, 1, 1)") is None else "0")
        parent.closefd(fd)
        stage.absent()
        child.write(got, B)
        child.closefd(got)
        stage.published(WHOLE, everywhere_at_once=False)
        child.close()
    ours.close()
    theirs.close()


def c_client(name: str, whole: bytes = WHOLE, at_once: bool = True) -> Scenario:
    """A C writer that goes through half → closed."""

    def scenario(stage: Stage) -> None:
        with client("writer", name, stage.path) as writer:
            writer.at("half")
            stage.absent()
            writer.go()
            writer.at("closed")
            stage.published(whole, everywhere_at_once=at_once)
            writer.go()
            assert writer.wait() == 0

    return scenario


def c_exit(name: str, status: int) -> Scenario:
    """A C writer that goes through half and ends by exit(status) with the file open."""

    def scenario(stage: Stage) -> None:
        with client("writer", name, stage.path, str(status)) as writer:
            writer.at("half")
            if name.startswith("leader"):
                stage.absent()
            writer.go()
            assert writer.wait() == status
            stage.published(WHOLE if name.startswith("leader") else A)

    return scenario


def python_end(ending: str, status: int) -> Scenario:
    """A Python program that ends by `ending` with its file open; what was written is published whatever the status."""

    def scenario(stage: Stage) -> None:
        code = (
            f"import os, signal, sys, threading\nf = open({str(stage.path)!r}, 'wb', 0)\nf.write(b'a' * {PIECE})\n"
            f"print('half', flush=True); sys.stdin.readline()\nf.write(b'b' * {PIECE})\n{ending}"
        )
        with subprocess.Popen(
            [SYSTEM_PYTHON, "-ISc", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "half\n"
            stage.absent()
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.wait(60) == status
            stage.published(WHOLE)

    return scenario


def killed_child_of_living_parent(stage: Stage) -> None:
    """A child that holds a copy is killed; its parent, who wrote the file, closes in order: published."""
    with actor() as parent:
        fd = parent.open(stage.path, CREATE)
        parent.write(fd, A)
        child = parent.fork()
        child.kill(signal.SIGKILL)
        stage.absent()
        parent.write(fd, B)
        parent.closefd(fd)
        stage.published(WHOLE)


def killed_parent_of_living_child(stage: Stage) -> None:
    """The opener is killed, its child finishes the file and closes it: the last closer decides, published."""
    with actor() as parent:
        fd = parent.open(stage.path, CREATE)
        parent.write(fd, A)
        child = parent.fork()
        parent.kill(signal.SIGKILL)
        stage.absent()
        child.write(fd, B)
        stage.absent()
        child.closefd(fd)
        stage.published(WHOLE, everywhere_at_once=False)
        child.close()


PUBLISHED: dict[str, tuple[Scenario, bytes]] = {
    "plain": (plain, WHOLE),
    "dup": (duplicated, WHOLE),
    "dup-high": (duplicated_high, WHOLE),
    "fork-parent-closes-first": (fork_parent_closes_first, WHOLE),
    "fork-cloexec-parent-closes-first": (fork_cloexec_parent_closes_first, WHOLE),
    "fork-child-exits-last": (fork_child_exits_last, WHOLE),
    "fork-child-closes-first": (fork_child_closes_first, WHOLE),
    "grandchild-writes-last": (grandchild_writes_last, WHOLE),
    "exec-with-cloexec": (exec_with_cloexec, WHOLE),
    "own-exec-inherited": (own_exec_with_inherited, WHOLE),
    "own-exec-cloexec": (own_exec_with_cloexec, WHOLE),
    "popen-stdout": (popen_stdout, WHOLE),
    "popen-stdout-with-block": (popen_stdout_with_block, WHOLE),
    "run-stdout": (run_stdout, WHOLE),
    "dash-group": (shell("dash", "(HALF; BREAK; REST) > FILE", False), WHOLE),
    "bash-group": (shell("bash", "(HALF; BREAK; REST) > FILE", False), WHOLE),
    "bash-braces": (shell("bash", "{ HALF; BREAK; REST; } > FILE", False), WHOLE),
    "bash-exec": (shell("bash", "exec 5> FILE; HALF >&5; BREAK; REST >&5; exec 5>&-", True), WHOLE),
    "sh-command": (
        shell("dash", f'export P={PIECE}; dash -c "HALF; BREAK; REST" > FILE', False),
        WHOLE,
    ),
    "two-commands": (two_commands_with_a_pause, WHOLE),
    "scm-to-descendant": (scm_to_descendant, WHOLE),
    "thread-open-close": (c_client("thread_open_close"), WHOLE),
    "threads-write": (c_client("threads_write", QUARTERS), QUARTERS),
    "leader-exit-close": (c_client("leader_exit"), WHOLE),
    "leader-exit-exit": (c_exit("leader_exit", 3), WHOLE),
    "exit-0": (c_exit("exit", 0), A),
    "exit-3": (c_exit("exit", 3), A),
    "exit-worker-0": (c_exit("exit_worker", 0), A),
    "exit-worker-3": (c_exit("exit_worker", 3), A),
    "_exit-3": (python_end("os._exit(3)", 3), WHOLE),
    "sys.exit-3": (python_end("sys.exit(3)", 3), WHOLE),
    "uncaught-exception": (python_end("raise ValueError", 1), WHOLE),
    "handled-sigterm": (
        python_end("signal.signal(15, lambda *_: sys.exit(7)); signal.raise_signal(15)", 7),
        WHOLE,
    ),
    "exit-with-threads": (
        python_end("threading.Thread(target=signal.pause, daemon=True).start(); os._exit(3)", 3),
        WHOLE,
    ),
    "killed-child": (killed_child_of_living_parent, WHOLE),
    "killed-parent": (killed_parent_of_living_child, WHOLE),
}
# In these cases the one write comes before the observer can look, so the bare directory may show no shorter file;
# what it does show is the file while its writer still has it open.
WHOLE_BEFORE_END = {"exit-0", "exit-3", "exit-worker-0", "exit-worker-3", "threads-write"}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_last_close_publishes_the_whole(case: str, two_mounts: tuple[Mount, Mount]) -> None:
    """Nobody sees the name before the last close; with it, everybody sees all of the file."""
    scenario, whole = PUBLISHED[case]
    stage = stage_on_mounts(two_mounts, "file.bin")
    watch(stage, scenario, None, whole)
    assert content(two_mounts[1] / "file.bin") == whole
    assert not list(quarantined(stage.paths[2].parent)), "a file that was published is in quarantine too"
    assert not leftovers(stage.paths[2].parent)


@pytest.mark.parametrize("case", [case for case in PUBLISHED if case not in WHOLE_BEFORE_END])
def test_control_the_bare_directory_shows_less(case: str, tmp_path: Path) -> None:
    """The same case and the same observer on a directory without safefs: the unfinished file is seen."""
    scenario, whole = PUBLISHED[case]
    assert not watch(stage_on_bare(tmp_path, "file.bin"), scenario, None, whole)


OVERWRITE = [
    "plain",
    "dup",
    "fork-parent-closes-first",
    "popen-stdout",
    "dash-group",
    "exec-with-cloexec",
    "leader-exit-close",
    "killed-child",
]


@pytest.mark.parametrize("case", OVERWRITE)
def test_over_an_older_version(case: str, two_mounts: tuple[Mount, Mount]) -> None:
    """The same over an existing file: until the last close everybody sees all of the old one, then all of the new."""
    scenario, whole = PUBLISHED[case]
    stage = OverOld(*stage_on_mounts(two_mounts, "file.bin").__dict__.values())
    stage.path.write_bytes(OverOld.OLD)
    watch(stage, scenario, OverOld.OLD, whole)


class OverOld(Stage):
    """A stage on which "absent" means that the old version shows."""

    OLD = b"old version " * 1000

    def absent(self) -> None:
        self.only(self.OLD)


# ---------------------------------------------------------------------------------------------------------------------
# Writers that a signal ends.

KILLED_C = ["spin", "spin_threads", "spin_main", "spin_worker"]


def kill_client(name: str, number: signal.Signals) -> Scenario:
    """Kill a C writer that is in the middle of its writes."""

    def scenario(stage: Stage) -> None:
        with client("writer", name, stage.path) as writer:
            writer.at("half")
            stage.absent()
            writer.go()
            stage.absent()
            assert writer.kill(number) == -number, "the signal hit nothing"
        stage.absent()

    return scenario


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", KILLED_C)
def test_a_killed_writer_publishes_nothing(name: str, number: signal.Signals, two_mounts: tuple[Mount, Mount]) -> None:
    """A signal ends the writer in mid-write, whichever thread wrote: no name, and the bytes are in quarantine."""
    stage = stage_on_mounts(two_mounts, "file.bin")
    watch(stage, kill_client(name, number), None)
    assert in_quarantine(two_mounts[0].backing, lambda data: len(data) >= PIECE and set(data) == {ord("x")})
    assert [content(path) for path in stage.paths] == [None] * 3
    assert not leftovers(two_mounts[0].backing)


@pytest.mark.parametrize("name", KILLED_C)
def test_control_a_killed_writer_on_the_bare_directory(name: str, tmp_path: Path) -> None:
    """Without safefs the killed writer's half stays under the name."""
    assert not watch(stage_on_bare(tmp_path, "file.bin"), kill_client(name, signal.SIGKILL), None)
    assert (tmp_path / "file.bin").stat().st_size >= PIECE


CRASHES = {"crash": signal.SIGSEGV, "crash_worker": signal.SIGSEGV, "abort_worker": signal.SIGABRT}


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_publishes_nothing(name: str, two_mounts: tuple[Mount, Mount]) -> None:
    """A true segmentation fault or abort(), in the main thread or another, is a killed writer."""

    def scenario(stage: Stage) -> None:
        with client("writer", name, stage.path) as writer:
            writer.at("half")
            stage.absent()
            writer.go()
            assert writer.wait() == -CRASHES[name]
        stage.absent()

    stage = stage_on_mounts(two_mounts, "file.bin")
    watch(stage, scenario, None)
    assert in_quarantine(two_mounts[0].backing, lambda data: data == A)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_killed_writer_leaves_the_older_version(number: signal.Signals, two_mounts: tuple[Mount, Mount]) -> None:
    """A file that was there before stays as it was, inode and all, when its next writer is killed."""
    first, second = two_mounts
    (first / "file.bin").write_bytes(OverOld.OLD)
    before = (first / "file.bin").stat()
    stage = OverOld(*stage_on_mounts(two_mounts, "file.bin").__dict__.values())
    watch(stage, kill_client("spin", number), OverOld.OLD)
    after = (second / "file.bin").stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert in_quarantine(first.backing, lambda data: set(data[:PIECE]) == {ord("x")})


def test_an_empty_draft_of_a_killed_writer(two_mounts: tuple[Mount, Mount]) -> None:
    """Killed between open and the first write: not even the empty file appears."""
    stage = stage_on_mounts(two_mounts, "file.bin")

    def scenario(stage: Stage) -> None:
        with actor() as writer:
            writer.open(stage.path, CREATE)
            stage.absent()
            writer.kill(signal.SIGKILL)
        stage.absent()

    watch(stage, scenario, None)


def last_closer_child_killed(stage: Stage) -> None:
    """The parent closes first; the child writes on and is killed."""
    with actor() as parent:
        fd = inheritable(parent, stage.path)
        parent.write(fd, A)
        child = parent.fork()
        parent.closefd(fd)
        stage.absent()
        child.write(fd, B)
        child.kill(signal.SIGKILL)
        stage.absent()


def parent_killed_last(stage: Stage) -> None:
    """The child ends in order; then the parent, the last closer, is killed."""
    with actor() as parent:
        fd = parent.open(stage.path, CREATE)
        parent.write(fd, A)
        child = parent.fork()
        child.write(fd, B)
        child.exit()
        stage.absent()
        parent.kill(signal.SIGKILL)
        stage.absent()


def popen_child_killed(stage: Stage) -> None:
    """Popen(stdout=f); f.close(); the child is killed while it writes."""
    code = f"import sys; sys.stdout.write('a'*{PIECE}); sys.stdout.flush(); sys.stdin.readline()"
    with actor() as parent:
        parent(
            "f = open(path, 'wb')\n"
            "child = subprocess.Popen([python, '-ISc', code], stdin=subprocess.PIPE, stdout=f)\n"
            "f.close()",
            path=str(stage.path),
            python=SYSTEM_PYTHON,
            code=code,
        )
        stage.absent()
        # The kill must hit after the child has written its half; its parent is family and sees how far it came.
        size = "os.path.exists(path) and os.path.getsize(path)"
        assert wait_until(lambda: parent(size) == PIECE), "the child wrote nothing that the kill could spoil"
        parent("child.kill(); child.wait()")
        stage.absent()


KILLED_LAST: dict[str, Scenario] = {
    "child-after-parent-closed": last_closer_child_killed,
    "parent-after-child-ended": parent_killed_last,
    "popen-stdout-child": popen_child_killed,
}


@pytest.mark.parametrize("case", KILLED_LAST)
def test_the_last_closer_decides(case: str, two_mounts: tuple[Mount, Mount]) -> None:
    """Of several holders the last one ends by a signal: nothing is published, the bytes are kept."""
    stage = stage_on_mounts(two_mounts, "file.bin")
    watch(stage, KILLED_LAST[case], None)
    assert in_quarantine(two_mounts[0].backing, lambda data: data.startswith(b"a"))
    assert [content(path) for path in stage.paths] == [None] * 3


@pytest.mark.parametrize("case", KILLED_LAST)
def test_control_the_last_closer_on_the_bare_directory(case: str, tmp_path: Path) -> None:
    """Without safefs each of these leaves its bytes under the name."""
    assert not watch(stage_on_bare(tmp_path, "file.bin"), KILLED_LAST[case], None)


def test_kills_at_any_moment(mount: Mount) -> None:
    """40 writers killed at whatever point they had reached: never a name, and every draft is accounted for."""
    for number in range(40):
        with client("writer", "spin_threads" if number % 2 else "spin", mount / f"file{number}.bin") as writer:
            writer.at("half")
            writer.go()
            assert writer.kill(SIGNALS[number % 2]) < 0
        assert content(mount / f"file{number}.bin") is None
    assert wait_until(lambda: len(list(quarantined(mount.backing))) >= 40)
    assert os.listdir(mount.path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Early by design: the opener's last close is an end that nobody can see behind.


def somebody_left(mount: Mount) -> None:
    """Wait until the daemon knows that what was published is still open for writing.

    Where the kernel writes for whoever has it, that takes a moment (docs/semantics.md, "What it does not promise").
    """
    if status(mount)["data_path"] == "kernel passthrough":
        assert wait_until(lambda: status(mount)["counters"].get("late write"), ALL_SECONDS)


def test_scm_rights_to_a_stranger(two_mounts: tuple[Mount, Mount]) -> None:
    """A descriptor sent to a process that is no descendant: what the opener's last close found is published, and what
    the stranger wrote is published again with its close.  Readers see one or the other, each of them whole."""

    def scenario(stage: Stage) -> None:
        left, right = socket.socketpair()
        with actor() as sender, actor() as receiver, left, right:
            name = f"\0safefs-scm-{os.getpid()}"
            receiver("l = socket.socket(socket.AF_UNIX); l.bind(name); l.listen(1)", name=name)
            sender("s = socket.socket(socket.AF_UNIX); s.connect(name)", name=name)
            receiver("c = l.accept()[0]")
            fd = sender.open(stage.path, CREATE)
            sender.write(fd, A)
            sender("socket.send_fds(s, [b'x'], [fd])", fd=fd)
            receiver("got = socket.recv_fds(c, 1, 1)[1][0]")
            got = receiver("got")
            stage.absent()
            sender.closefd(fd)
            stage.published(A)
            somebody_left(two_mounts[0])
            receiver.write(got, B)
            receiver.closefd(got)
            stage.published(WHOLE, everywhere_at_once=False)

    watch(stage_on_mounts(two_mounts, "file.bin"), scenario, None, A, WHOLE)


def test_orphan_of_a_double_fork(two_mounts: tuple[Mount, Mount]) -> None:
    """An orphan that inherited the descriptor writes on after the opener's last close: published then, and again when
    the orphan has ended."""

    def scenario(stage: Stage) -> None:
        with actor() as parent:
            fd = parent.open(stage.path, CREATE)
            parent.write(fd, A)
            child = parent.fork()
            orphan = child.fork()
            child.exit()
            parent("os.waitpid(-1, 0)")
            stage.absent()
            parent.closefd(fd)
            stage.published(A)
            somebody_left(two_mounts[0])
            orphan.write(fd, B)
            orphan.exit()
            stage.published(WHOLE, everywhere_at_once=False)

    watch(stage_on_mounts(two_mounts, "file.bin"), scenario, None, A, WHOLE)


@pytest.mark.parametrize("name", ["map_after_close", "map_exit"])
def test_a_mapping_that_outlives_close(name: str, two_mounts: tuple[Mount, Mount]) -> None:
    """Stores through a mapping after the last close are in the file when the mapping has ended."""
    before, after = b"a" * 8192, b"a" * 4096 + b"b" * 4096
    first, second = two_mounts
    with client("writer", name, first / "file.bin") as writer:
        writer.at("closed")
        assert content(first / "file.bin") in (None, before)
        assert content(second / "file.bin") in (None, before)
        writer.go()
        if name == "map_after_close":
            writer.at("unmapped")
            writer.go()
        assert writer.wait() == 0
        for path in (first / "file.bin", second / "file.bin", first.backing / "file.bin"):
            assert wait_until(lambda path=path: content(path) == after), f"{path}: the last stores are missing"


# ---------------------------------------------------------------------------------------------------------------------
# The order of publishes.


def test_publishes_show_in_the_order_of_the_closes(two_mounts: tuple[Mount, Mount]) -> None:
    """A reader on another node that sees the n-th file of a process sees all that it closed before, whole."""
    first, second = two_mounts
    rounds, files = 25, 8
    with actor() as writer, actor() as reader:
        reader(
            "def follow(base, rounds, files, size):\n"
            "    bad = []\n"
            "    for r in range(rounds):\n"
            "        deadline = time.monotonic() + 60\n"
            "        while not os.path.exists(f'{base}/{r}.done'):\n"
            "            if time.monotonic() > deadline: return ['no sentinel %d' % r]\n"
            "        for n in range(files):\n"
            "            try:\n"
            "                if len(open(f'{base}/{r}.{n}', 'rb').read()) != size: bad.append((r, n, 'short'))\n"
            "            except OSError as e: bad.append((r, n, e.errno))\n"
            "    return bad\n"
        )
        reader.start("follow(base, rounds, files, size)", base=str(second.path), rounds=rounds, files=files, size=PIECE)
        writer(
            "for r in range(rounds):\n"
            "    kids = []\n"
            "    for n in range(files):\n"
            "        f = open(f'{base}/{r}.{n}', 'wb', 0)\n"
            "        f.write(data)\n"
            "        if n % 3 == 0: kids.append(subprocess.Popen(['/bin/true'], stdout=f, pass_fds=[f.fileno()]))\n"
            "        if n % 3 == 1: os.close(os.dup(f.fileno()))\n"
            "        f.close()\n"
            "    for k in kids: k.wait()\n"
            "    open(f'{base}/{r}.done', 'w').close()\n",
            base=str(first.path),
            rounds=rounds,
            files=files,
            data=A,
        )
        assert reader.result(120) == []


def test_read_back_after_close(mount: Mount) -> None:
    """The writer, its child and a stranger open the name right after the close: they find what was written."""
    with actor() as writer, actor() as stranger:
        for number in range(60):
            data = b"%d" % number
            writer("f = open(path, 'wb', 0); f.write(data); f.close()", path=str(mount / "name"), data=data)
            assert writer.read(mount / "name") == data
            assert stranger.read(mount / "name") == data
            assert writer("subprocess.check_output(['/bin/cat', path])", path=str(mount / "name")) == data
