"""Two nodes change one file: what a close acknowledged is not lost, also where the backing's own locks exclude nobody.

Each writer reads the file, adds a line of its own and writes it whole.  A close that succeeds says that the version it
was based on was still there, so the line is in every version from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.support.mounting import Mount
from tests.underlay.test_bad_underlay import underlay

TURNS = 12
CONTROL_ROUNDS = 10
SECONDS = 200.0
# Whoever is refused (ESTALE, or EBUSY) tries again, as a program would that checks what close(2) says.
ADD = r"""
import errno, os
def add(path, who, turns):
    done = []
    for turn in range(turns):
        fd = os.open(path, os.O_RDWR)
        line = b"%s-%d\n" % (who, turn)
        text = os.pread(fd, 1 << 20, 0) + line
        os.pwrite(fd, text[::-1], 0)  # so that no version is the beginning of another
        os.pwrite(fd, text, 0)
        try:
            os.close(fd)
            done.append(line)
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EBUSY):
                raise
    return done
"""


@pytest.fixture
def backings(tmp_path: Path, backing: Path) -> Iterator[list[Path]]:
    """Two ways to one directory, as two clients of a filesystem whose locks stay with each of them."""
    with ExitStack() as stack:
        places = [tmp_path / f"way{number}" for number in range(2)]
        for place in places:
            stack.enter_context(underlay(backing, place, "--negative", "0", "--attr", "0"))
        yield places


def lost(nodes: list[Mount], backing: Path, name: str = "counted") -> set[bytes]:
    """Acknowledged lines that a file does not have in the end."""
    path = backing / name
    path.write_bytes(b"begin\n")
    with ExitStack() as stack:
        parties: list[Actor] = [stack.enter_context(actor()) for _ in range(4)]
        for number, party in enumerate(parties):
            party(ADD)
            where = nodes[number % len(nodes)] / name
            party.start("add(path, who, turns)", path=str(where), who=b"w%d" % number, turns=TURNS)
        done = {line for party in parties for line in party.result(SECONDS)}
    assert len(done) > TURNS / 4
    return done - set(path.read_bytes().splitlines(keepends=True))


def make(make_mount: MountFactory, backings: list[Path], locks: str) -> list[Mount]:
    return [make_mount("-o", f"locks={locks}", backing=place) for place in backings]


def test_no_acknowledged_change_is_lost(backings: list[Path], make_mount: MountFactory, backing: Path) -> None:
    assert lost(make(make_mount, backings, "leasefile"), backing) == set()


def test_control_nodes_that_share_no_locks_lose_some(
    backings: list[Path], make_mount: MountFactory, backing: Path
) -> None:
    nodes = make(make_mount, backings, "memory")
    assert any(lost(nodes, backing, f"counted{number}") for number in range(CONTROL_ROUNDS))
