"""Lock files that stand for a lock by being there: they go when their creator was killed, and only then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.support.mounting import Mount, safefs, wait_until

EXCLUSIVE = os.O_CREAT | os.O_EXCL | os.O_WRONLY
SECONDS = 10.0
LEASE_SECONDS = 3.0
STAYS_SECONDS = 1.0  # what is going to be removed goes within milliseconds


@pytest.fixture
def creator() -> Iterator[Actor]:
    """A process of its own, which is killed in some tests."""
    with actor() as party:
        yield party


def stays(path: Path) -> bool:
    return not wait_until(lambda: not path.exists(), STAYS_SECONDS)


def goes(path: Path) -> bool:
    return wait_until(lambda: not path.exists(), SECONDS)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("content", [b"", b"1234\n"], ids=["empty", "written"])
def test_it_goes_with_a_killed_creator(mount: Mount, creator: Actor, closed: bool, content: bytes) -> None:
    path = mount / "x.lock"
    fd = creator.open(path, EXCLUSIVE)
    creator.write(fd, content)
    if closed:
        creator.closefd(fd)
    assert stays(path)
    creator.kill(signal.SIGKILL)
    assert goes(path)
    assert not (mount.backing / "x.lock").exists()
    assert wait_until(lambda: events_of(mount), SECONDS)
    event = next(event for event in events_of(mount) if event["event"] == "lock removed")
    assert (event["path"], event["pid"], event["reason"]) == ("x.lock", creator.pid, "its creator killed by a signal")


def test_control_on_the_bare_directory_it_stays(mount: Mount, creator: Actor) -> None:
    path = mount.backing / "x.lock"
    creator.open(path, EXCLUSIVE)
    creator.kill(signal.SIGKILL)
    assert stays(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGSEGV, signal.SIGINT])
def test_any_signal_that_kills(mount: Mount, creator: Actor, number: signal.Signals) -> None:
    path = mount / "x.lock"
    creator("__import__('signal').signal(number, __import__('signal').SIG_DFL)", number=int(number))
    creator.closefd(creator.open(path, EXCLUSIVE))
    creator.kill(number)
    assert goes(path)


@pytest.mark.parametrize("code", [0, 1])
def test_it_outlives_a_creator_that_exits(mount: Mount, code: int) -> None:
    """lockfile-create(1) makes a lock, exits, and the lock stands."""
    path = mount / "x.lock"
    script = f"import os, sys; os.open(sys.argv[1], {EXCLUSIVE}); os._exit({code})"
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == code
    assert stays(path)
    assert wait_until(lambda: [entry["state"] for entry in locks_of(mount)] == ["creator exited"], SECONDS)
    path.unlink()
    assert wait_until(lambda: locks_of(mount) == [], SECONDS)


def events_of(mount: Mount) -> list[dict[str, object]]:
    return [json.loads(line) for line in safefs("events", mount.path, "--json").stdout.splitlines()]


def locks_of(mount: Mount) -> list[dict[str, object]]:
    done = safefs("locks", "--at", mount.path, "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_a_child_that_is_killed_takes_nothing_of_its_parent(mount: Mount, creator: Actor) -> None:
    path = mount / "x.lock"
    creator.open(path, EXCLUSIVE)
    creator("p = os.fork()\nif p == 0: os.kill(os.getpid(), 9)\nos.waitpid(p, 0)")
    assert stays(path)


def test_a_zombie_is_gone_as_well(mount: Mount) -> None:
    """Nobody waits for the creator: how it ended is seen all the same."""
    path = mount / "x.lock"
    script = f"import os, sys; os.close(os.open(sys.argv[1], {EXCLUSIVE})); sys.stdin.read(); os.kill(os.getpid(), 9)"
    with subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert wait_until(path.exists, SECONDS)
        process.stdin.close()
        assert goes(path)
        assert process.wait(SECONDS) == -signal.SIGKILL


def test_what_others_made_after_it_stays(two_mounts: tuple[Mount, Mount], creator: Actor, writer: Actor) -> None:
    """The lock was released and taken by another, on another node, before its first creator was killed."""
    one, two = two_mounts
    for way in ("unlinked", "replaced"):
        path, other = one / f"{way}.lock", two / f"{way}.lock"
        creator.closefd(creator.open(path, EXCLUSIVE))
        shown = (f"{way}.lock", creator.pid)
        assert wait_until(
            lambda shown=shown: shown in [(entry["path"], entry["pid"]) for entry in locks_of(two)], SECONDS
        )
        if way == "unlinked":
            os.unlink(other)
            writer.closefd(writer.open(other, EXCLUSIVE))
        else:
            writer.closefd(writer.open(two / "y.lock", EXCLUSIVE))
            os.rename(two / "y.lock", other)
    creator.kill(signal.SIGKILL)
    assert stays(one / "unlinked.lock") and stays(one / "replaced.lock")


def test_what_was_renamed_stays(mount: Mount, creator: Actor) -> None:
    """As git does: index.lock is written and becomes the index."""
    fd = creator.open(mount / "index.lock", EXCLUSIVE)
    creator.write(fd, b"DIRC")
    creator.closefd(fd)
    creator("os.rename(a, b)", a=str(mount / "index.lock"), b=str(mount / "index"))
    creator.kill(signal.SIGKILL)
    assert stays(mount / "index")
    assert (mount / "index").read_bytes() == b"DIRC"


def test_what_was_exchanged_is_no_lock_any_more(mount: Mount, creator: Actor) -> None:
    """Its name shows something else now, also when that is exchanged back."""
    (mount / "other").write_text("x")
    creator.closefd(creator.open(mount / "x.lock", EXCLUSIVE))
    exchange = "ctypes.CDLL(None).renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2)"
    for _ in range(2):
        assert creator(exchange, a=str(mount / "x.lock"), b=str(mount / "other")) == 0
    creator.kill(signal.SIGKILL)
    assert stays(mount.backing / "x.lock")  # on the mount the kernel shows for a second what it remembers


def test_what_was_not_made_with_o_excl_stays(mount: Mount, creator: Actor) -> None:
    """A file that is locked with flock(2): its being there says nothing."""
    creator.open(mount / "x.lock", os.O_CREAT | os.O_RDWR)
    creator.kill(signal.SIGKILL)
    assert stays(mount / "x.lock")


def test_a_lock_in_a_directory_that_was_renamed(mount: Mount, creator: Actor) -> None:
    (mount / "a").mkdir()
    creator.closefd(creator.open(mount / "a" / "x.lock", EXCLUSIVE))
    (mount / "a").rename(mount / "b")
    creator.kill(signal.SIGKILL)
    assert goes(mount / "b" / "x.lock")


@pytest.mark.parametrize(
    ("stale", "end", "remains"),
    [("off", "kill", True), ("dead", "kill", False), ("dead", "exit", False), ("signalled", "exit", True)],
)
def test_the_rule_says_when(make_mount: MountFactory, tmp_path: Path, stale: str, end: str, remains: bool) -> None:
    config = tmp_path / "safefs.toml"
    config.write_text(f'[[rule]]\nmatch = "*.lock"\nstale = "{stale}"\n')
    mount = make_mount("--config", str(config))
    with actor() as creator:
        creator.closefd(creator.open(mount / "x.lock", EXCLUSIVE))
        if end == "kill":
            creator.kill(signal.SIGKILL)
    assert (stays if remains else goes)(mount / "x.lock")


def test_locks_of_all_nodes_are_shown(make_mount: MountFactory, creator: Actor) -> None:
    one, two = (make_mount("-o", "locks=leasefile") for _ in range(2))
    creator.closefd(creator.open(one / "x.lock", EXCLUSIVE))
    assert wait_until(lambda: len(locks_of(two)) == 1, SECONDS)
    entry = locks_of(two)[0]
    assert (entry["path"], entry["kind"], entry["state"], entry["pid"]) == ("x.lock", "file", "held", creator.pid)


def test_an_operator_breaks_it(mount: Mount, creator: Actor) -> None:
    creator.closefd(creator.open(mount / "x.lock", EXCLUSIVE))
    assert wait_until(lambda: len(locks_of(mount)) == 1, SECONDS)
    done = safefs("locks", "break", mount / "x.lock")
    assert done.stdout == "1 broken\n"
    assert not (mount / "x.lock").exists()


def test_the_locks_of_a_dead_node_go(make_mount: MountFactory, creator: Actor, writer: Actor) -> None:
    """Its daemon was killed: other nodes see that its lease is over; a lock that somebody else has made stays."""
    one, two = (make_mount("-o", f"locks=leasefile,lease_seconds={LEASE_SECONDS:g}") for _ in range(2))
    creator.closefd(creator.open(one / "x.lock", EXCLUSIVE))
    creator.closefd(creator.open(one / "taken.lock", EXCLUSIVE))
    assert wait_until(lambda: len(locks_of(two)) == 2, SECONDS)
    os.unlink(two / "taken.lock")
    writer.closefd(writer.open(two / "taken.lock", EXCLUSIVE))
    one.kill()
    assert goes(two / "x.lock")
    assert stays(two / "taken.lock")


def test_the_locks_of_a_frozen_node_go(make_mount: MountFactory, creator: Actor) -> None:
    """It comes back: what it holds then is its own again."""
    one, two = (make_mount("-o", f"locks=leasefile,lease_seconds={LEASE_SECONDS:g}") for _ in range(2))
    creator.closefd(creator.open(one / "x.lock", EXCLUSIVE))
    assert wait_until(lambda: len(locks_of(two)) == 1, SECONDS)
    one.expected_log.append("the lease of this node is lost")
    one.process.send_signal(signal.SIGSTOP)
    try:
        assert wait_until(lambda: not (two / "x.lock").exists(), LEASE_SECONDS + 3 + 2 + SECONDS)
    finally:
        one.process.send_signal(signal.SIGCONT)
    creator.closefd(creator.open(one / "y.lock", EXCLUSIVE))
    creator.kill(signal.SIGKILL)
    assert goes(one / "y.lock")


def test_many_locks_of_one_process(mount: Mount, creator: Actor) -> None:
    def descriptors() -> list[str]:
        """Of processes, and of the directory; files that the kernel still knows have some, too."""
        fds = f"/proc/{mount.process.pid}/fd"
        links = [os.readlink(f"{fds}/{fd}") for fd in os.listdir(fds)]
        return sorted(link for link in links if "pidfd" in link or link == str(mount.backing))

    before = descriptors()
    creator("for i in range(200): os.close(os.open(f'{d}/{i}.lock', flags))", d=str(mount.path), flags=EXCLUSIVE)
    creator("for i in range(100): os.unlink(f'{d}/{i}.lock')", d=str(mount.path))
    creator.kill(signal.SIGKILL)
    assert wait_until(lambda: not list(mount.backing.glob("*.lock")), SECONDS)
    assert wait_until(lambda: descriptors() == before, SECONDS)
