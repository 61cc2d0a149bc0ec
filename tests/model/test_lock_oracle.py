"""Locks of two nodes against the kernel's own: every request is made of a file on the mounts and of one on tmpfs, by
the same processes, and is answered alike.

What may differ: the pid that F_GETLK names, which is 0 for a holder on another node, and for OFD locks the kernel's own
is -1; and for a moment what a close has
unlocked, where somebody on another node asks: close(2) does not wait for the daemon (FUSE_RELEASE), so there a refused
request is made again.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.lockers import CODE

EXAMPLES = int(os.environ.get("SAFEFS_MODEL_EXAMPLES", "12"))
PARTIES = 4
SETTLE_SECONDS = 10.0  # for what a close has unlocked

STEP = r"""
opened = {}
def act(path, action, slot, mode, start, length):
    key = path, slot
    if action in ("close", "close copy"):
        if key in opened:
            os.close(opened.pop(key) if action == "close" else os.dup(opened[key]))
        return "closed"
    if key not in opened:
        opened[key] = os.open(path, os.O_RDONLY if slot == READS else os.O_RDWR)
    fd = opened[key]
    try:
        if action == "flock":
            return flock(fd, {"shared": LOCK_SH, "exclusive": LOCK_EX, "": LOCK_UN}[mode] | LOCK_NB)
        kind = {"shared": SHARED, "exclusive": EXCLUSIVE, "": UNLOCK}[mode]
        return record(fd, {"set": SET, "get": GET, "ofd set": OFD_SET, "ofd get": OFD_GET}[action], kind, start, length)
    except OSError as error:
        return "refused" if error.errno in (errno.EAGAIN, errno.EACCES) else errno.errorcode[error.errno]
"""

READS = 2  # of the open files of each process the one that only reads
actions = st.sampled_from(["flock", "set", "set", "ofd set", "get", "ofd get", "close", "close copy"])
modes = st.sampled_from(["shared", "exclusive", ""])
steps = st.tuples(
    st.integers(0, PARTIES - 1), actions, st.integers(0, READS), modes, st.integers(0, 6), st.sampled_from([0, 1, 3])
)
Step = tuple[int, str, int, str, int, int]


@pytest.fixture
def parties() -> Iterator[list[Actor]]:
    with ExitStack() as stack:
        made = [stack.enter_context(actor()) for _ in range(PARTIES)]
        for party in made:
            party(CODE)
            party(STEP, READS=READS)
        yield made


def alike(found: object, wanted: object, named: set[int]) -> bool:
    """Whether two answers are the same; the pid of a lock counts where the kernel's own is one of these."""
    if isinstance(found, tuple) and isinstance(wanted, tuple) and wanted[3] not in named:
        return found[:3] == wanted[:3]
    return found == wanted


class Trial:
    """One plan, on a file of its own."""

    def __init__(self, parties: list[Actor], nodes: list[Path], real: Path) -> None:
        self.parties, self.nodes, self.real = parties, nodes, real
        self.closed: set[int] = set()  # nodes on which something was closed

    def take(self, step: Step) -> None:
        number, action, slot, mode, start, length = step
        if action in ("get", "ofd get"):
            mode = mode or "exclusive"
        party, node = self.parties[number], number % len(self.nodes)
        # For F_OFD_GETLK the kernel says -1 of every lock of a FUSE filesystem (locks_translate_pid, fs/locks.c).
        ours = () if action == "ofd get" else enumerate(self.parties)
        neighbours = {each.pid for at, each in ours if at % len(self.nodes) == node}
        rest = f"{action!r}, {slot}, {mode!r}, {start}, {length}"
        wanted = party(f"act({str(self.real)!r}, {rest})")
        deadline = time.monotonic() + (SETTLE_SECONDS if self.closed - {node} else 0)
        while True:
            found = party(f"act({str(self.nodes[node])!r}, {rest})")
            if alike(found, wanted, neighbours) or time.monotonic() > deadline:
                break
        assert alike(found, wanted, neighbours), (step, found, wanted)
        if "close" in action:
            self.closed.add(node)

    def end(self) -> None:
        for party in self.parties:
            party("for fd in opened.values(): os.close(fd)\nopened.clear()")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["x.lock", "x.db", "data"])
def test_answers_are_the_kernels(count: int, name: str, parties: list[Actor], make_mount: MountFactory) -> None:
    mounts = [make_mount("-o", "locks=leasefile,lease_seconds=60,flush_readers=on") for _ in range(count)]
    numbers = itertools.count()

    @settings(
        max_examples=EXAMPLES,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(steps, min_size=10, max_size=30))
    def run(plan: list[Step]) -> None:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as real:
            trial = Trial(parties, [mount / f"{next(numbers)}{name}" for mount in mounts], Path(real.name))
            trial.nodes = [path.with_name(trial.nodes[0].name) for path in trial.nodes]
            trial.nodes[0].write_bytes(b"x")
            try:
                for step in plan:
                    trial.take(step)
            finally:
                trial.end()

    run()


def test_control_two_nodes_that_share_nothing(parties: list[Actor], make_mount: MountFactory) -> None:
    mounts = [make_mount("-o", "locks=memory") for _ in range(2)]
    (mounts[0] / "x.db").write_bytes(b"x")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as real:
        trial = Trial(parties, [mount / "x.db" for mount in mounts], Path(real.name))
        trial.take((0, "set", 0, "exclusive", 0, 0))
        with pytest.raises(AssertionError, match="set"):
            trial.take((1, "set", 0, "exclusive", 0, 0))
        trial.end()
