"""Real programs that lock, as parties of a test: who they are, several that contend, and one that is killed inside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.torch import file_baton
from tests.support.venvs import Venv, hub_venv
from tests.tools.lock_client import GIT_HOOK
from tests.tools.processes import ending

CLIENT = Path(__file__).with_name("lock_client.py")
CONTEND_SECONDS = 150
START_SECONDS = 60


@dataclass(frozen=True)
class Tool:
    """A way to lock: its name in `lock_client.py`, the huggingface_hub whose environment has it, what it locks."""

    name: str
    hub: str
    target: str

    @property
    def venv(self) -> Venv:
        return hub_venv(self.hub)

    @property
    def environment(self) -> dict[str, str]:
        """What its client runs with."""
        return {**ENVIRONMENT, "FILE_BATON": str(file_baton())} if self.name == "FileBaton" else ENVIRONMENT


# Locks of the kernel, which end with their holder.
KERNEL_LOCKS = {
    "FileLock": Tool("FileLock", "newest", "x.lock"),
    "WeakFileLock 1.17.0": Tool("WeakFileLock", "1.17.0", "weights.lock"),
    "WeakFileLock newest": Tool("WeakFileLock", "newest", "weights.lock"),
    "flock": Tool("flock", "newest", "x.lock"),
}
# Files whose existence is the lock, which a killed holder leaves behind.
SOFT_LOCKS = {
    "SoftFileLock": Tool("SoftFileLock", "newest", "x.lock"),
    "FileBaton": Tool("FileBaton", "newest", "lock"),
    "git": Tool("git", "newest", "repository"),
}
# The same, made by link(2): not safefs, but filelock itself sees to those of the dead.
STRICT = Tool("StrictSoftFileLock", "newest", "x.lock")
# Its locks outlive whoever made them.
LOCKFILE = Tool("lockfile", "newest", "mailbox")
NO_LOCK = Tool("none", "newest", "x.lock")

# git asks for an identity, and must not read anybody's configuration.
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "LANG": "C.UTF-8",
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{role}_{field}": "acme" for role in ("AUTHOR", "COMMITTER") for field in ("NAME", "EMAIL")},
}


def prepare(tool: Tool, place: Path, hooks: Path) -> None:
    """Make what the tool locks in `place`, where it is not made by the locking; git's hook is put below `hooks`."""
    if tool.name != "git":
        return
    hooks.mkdir()
    (hooks / "pre-commit").write_text(GIT_HOOK)
    (hooks / "pre-commit").chmod(0o755)
    git(place / tool.target, "init", "--quiet", str(place / tool.target), directory=place)
    for name, value in (("core.hooksPath", str(hooks)), ("gc.auto", "0"), ("core.checkStat", "minimal")):
        git(place / tool.target, "config", name, value)


def git(repository: Path, *arguments: str, directory: Path | None = None) -> str:
    """Run git in a repository; what it prints."""
    done = subprocess.run(
        ["git", "-C", directory or repository, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(tool: Tool, place: Path, marker: Path, turns: str, node: str | None = None) -> list[str | Path]:
    """The client's argv; with `node` it has that name as its host's, as on another machine."""
    on_node: list[str | Path] = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', node] if node else []
    return [*on_node, tool.venv.python, CLIENT, tool.name, place / tool.target, marker, turns]


def contend(tool: Tool, places: Sequence[Path], marker: Path, *, turns: int) -> int:
    """Let one process in each place take the lock so often: how many found another one inside."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                ending(
                    subprocess.Popen(
                        command(tool, place, marker, str(turns)),
                        env=tool.environment,
                        cwd="/",
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            )
            for place in places
        ]
        overlaps = 0
        for client in clients:
            output, error = client.communicate(timeout=CONTEND_SECONDS)
            assert client.returncode == 0, error
            found = json.loads(output)
            assert found["inside"] == turns
            overlaps += found["overlaps"]
        return overlaps


class Holder:
    """A process that holds the lock, with everything that it started."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def kill(self) -> None:
        """SIGKILL the process and its children at once, as a batch system does, and wait for its end."""
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL


@contextmanager
def holding(tool: Tool, place: Path, node: str | None = None) -> Iterator[Holder]:
    """A process of its own session that is inside when the block begins."""
    with subprocess.Popen(
        command(tool, place, Path(os.devnull), "hold", node),
        env=tool.environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n", f"{tool.name} did not get its lock"
            yield Holder(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def waiting(tool: Tool, place: Path, marker: Path, node: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that is about to take the lock once, and ends then; `got_it` awaits that."""
    process = subprocess.Popen(
        command(tool, place, marker, "wait", node),
        env=tool.environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n", f"{tool.name} did not begin"
            yield process
        finally:
            # What it started sleeps in a lock that nobody gives it any more.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def got_it(waiter: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the waiting process got the lock within `seconds`, alone."""
    try:
        output = waiter.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return False
    assert waiter.returncode == 0
    return bool(json.loads(output) == {"inside": 1, "overlaps": 0})
