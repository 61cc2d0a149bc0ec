"""Nodes that are clients of a shared filesystem: they number files for themselves, and remember what they have seen.

The filesystem is our own bad one (tests/underlay/filesystem.py), with what sshfs, Gluster and JuiceFS were seen to do
(docs/decisions/0009); `make test-labs` has the same tried on them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.conftest import CALM_LEASE, Cluster
from tests.cluster.counting import Count
from tests.cluster.hosts import Node
from tests.cluster.test_exclusion import shown
from tests.mount.actors import Actor
from tests.mount.lockers import BLOCK, BLOCKED, RELEASE, TRY, opened
from tests.support.mounting import status, wait_until
from tests.underlay.test_bad_underlay import underlay

SECONDS = 60.0
COHERENT = ("--negative", "0", "--attr", "0")
LISTING_SECONDS = 60.0
KINDS = {
    "bytes that are kept": ("--keep", "--attr", "20"),
    "numbers of their own": ("--numbers",),
    "listings that are kept": ("--listing", f"{LISTING_SECONDS:g}"),
    "attributes that are kept": ("--attr", "20"),
}

Make = Callable[[], Actor]


@pytest.fixture
def views(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, ...]]:
    """A directory below the roots of two clients."""
    (tmp_path / "disk" / "shared").mkdir(parents=True)
    places = [tmp_path / f"client{number}" for number in range(2)]
    with ExitStack() as stack:
        for place in places:
            late = ("--late", os.fspath(tmp_path))
            stack.enter_context(underlay(tmp_path / "disk", place, *COHERENT, *late, *KINDS[request.param]))
        yield tuple(place / "shared" for place in places)


@pytest.fixture
def nodes_of(views: tuple[Path, ...], tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path, views, "locks=leasefile", stack)


everywhere = pytest.mark.parametrize("views", list(KINDS), indirect=True)


def of(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("views", [kind], indirect=True)


@everywhere
def test_a_count(nodes_of: Cluster, parties: Make, tmp_path: Path) -> None:
    """What is written in place under a lock is what the next one who gets the lock reads."""
    (tmp_path / "notes").mkdir()
    nodes = nodes_of.make(2, lease=CALM_LEASE)
    count = Count(tmp_path / "notes", nodes_of.backing, parties)
    noted = count.run(nodes, 5, SECONDS)
    assert len(noted) == len(set(noted))
    assert int((tmp_path / "disk" / "shared" / "count.db").read_bytes()) == max(noted)


@everywhere
def test_a_lock_of_another_node(nodes_of: Cluster, parties: Make) -> None:
    """It is seen in a directory of any depth, and handed over soon."""
    nodes = nodes_of.make(2, lease=CALM_LEASE)
    (nodes[0] / "a").mkdir()
    (nodes[0] / "a/b").mkdir()
    one, two = parties(), parties()
    opened(one, nodes[0] / "a/b/data")
    opened(two, nodes[1] / "a/b/data")
    one(TRY["flock"])
    assert two.errno(TRY["flock"]) in BLOCKED
    for holder, waiter, node in ((one, two, nodes[1]), (two, one, nodes[0]), (one, two, nodes[1])):
        waiter.start(BLOCK["flock"])
        assert wait_until(lambda node=node: status(node.mount)["locks"]["waiting"] == 1, SECONDS)
        holder(RELEASE["flock"])
        waiter.result(LISTING_SECONDS / 3)


@everywhere
@pytest.mark.parametrize("kind", ["fcntl", "flock"])
def test_what_grows_under_a_lock(nodes_of: Cluster, parties: Make, kind: str) -> None:
    """Two processes that keep the file open, each on its node, see all that the other has added."""
    nodes = nodes_of.make(2, lease=CALM_LEASE)
    writers = [parties() for _ in nodes]
    for writer, node in zip(writers, nodes, strict=True):
        opened(writer, node / "log.jsonl")
    for turn in range(1, 7):
        writer = writers[turn % 2]
        for step in (BLOCK, RELEASE, BLOCK):  # the second time it is this node's
            writer(step[kind])
        seen = writer("os.pread(fd, 1000, 0)")
        assert seen == b"line\n" * (turn - 1)
        assert writer("os.fstat(fd).st_size") == len(seen)
        writer("os.pwrite(fd, b'line\\n', os.fstat(fd).st_size)")
        writer(RELEASE[kind])


@of("bytes that are kept")
def test_a_read_that_is_under_way_when_a_lock_is_granted(nodes_of: Cluster, parties: Make, tmp_path: Path) -> None:
    """What it brings is from before: the client must not keep it for the holder of the lock."""
    nodes = nodes_of.make(2, lease=CALM_LEASE)
    reader, one, two = (parties() for _ in range(3))
    opened(two, nodes[1] / "x.db")
    two("os.pwrite(fd, b'before', 0)")
    two(BLOCK["flock"])
    opened(reader, nodes[0] / "x.db")
    opened(one, nodes[0] / "x.db")
    status = os.stat(tmp_path / "disk" / "shared" / "x.db")
    late = tmp_path / str(status.st_ino)
    late.touch()
    reader.start("os.pread(fd, 6, 0)")
    assert wait_until(late.with_suffix(".read").exists, SECONDS)
    two("os.pwrite(fd, b'behind', 0)")
    # As where times are coarse: one that has changed has the kernel wait for the read, and drop what it brings.
    os.utime(tmp_path / "disk" / "shared" / "x.db", ns=(status.st_atime_ns, status.st_mtime_ns))
    two(RELEASE["flock"])
    one.start(f"({BLOCK['flock']}, os.pread(fd, 6, 0))")
    assert wait_until(lambda: shown(nodes[0].mount) == [("x.db", "flock", "held", one.pid)], SECONDS)
    late.with_suffix(".read").unlink()
    assert reader.result(SECONDS) == b"before"
    assert one.result(SECONDS)[1] == b"behind"


@everywhere
def test_the_locks_of_all_are_shown(nodes_of: Cluster, parties: Make) -> None:
    """`safefs locks` on each node, also where its client has listed what there was before."""
    nodes = nodes_of.make(2, lease=CALM_LEASE)
    one, two = parties(), parties()
    opened(one, nodes[0] / "data")
    opened(two, nodes[1] / "data")
    assert [shown(node.mount) for node in nodes] == [[], []]
    for holder, other in ((one, two), (two, one), (one, two)):
        holder(BLOCK["flock"])
        assert other.errno(TRY["flock"]) in BLOCKED  # now it is on record
        held = [("data", "flock", "held", holder.pid)]
        assert [shown(node.mount) for node in nodes] == [held, held]
        holder(RELEASE["flock"])


@of("attributes that are kept")
def test_python_unlocks_what_was_written_under_a_lock(nodes_of: Cluster, parties: Make) -> None:
    """It has the client send it before, which the extension, that nobody contends with otherwise, does not know of."""
    nodes_of.options += ",hot=on"
    (node,) = nodes_of.make(1, lease=CALM_LEASE)
    writer, other = parties(), parties()
    opened(other, node / "x.db")
    opened(writer, node / "x.db")
    for step in (BLOCK, RELEASE, BLOCK):  # the first time the name has to be taken, and waited for
        writer(step["flock"])
    for party, passed in ((None, 0), (writer, 1), (None, 0), (other, 1)):
        before = unlocks_in_python(node)
        if party is not None:
            party("os.pwrite(fd, b'x', 0)")
        writer(RELEASE["flock"])
        assert unlocks_in_python(node) - before == passed
        writer(BLOCK["flock"])


def unlocks_in_python(node: Node) -> int:
    """Lock requests that the extension has left (FUSE_SETLK and FUSE_SETLKW)."""
    passed = status(node.mount)["hot"]["passed"]
    return sum(int(passed.get(opcode, 0)) for opcode in ("32", "33"))


# What the filesystem does by itself.


@of("bytes that are kept")
def test_control_bytes(views: tuple[Path, ...]) -> None:
    """By a descriptor that stays open."""
    (views[0] / "x").write_bytes(b"before")
    with open(views[1] / "x", "rb", 0) as held:
        assert held.read() == b"before"
        with open(views[0] / "x", "r+b") as file:
            file.write(b"behind")
        assert os.pread(held.fileno(), 6, 0) == b"before"


@of("numbers of their own")
def test_control_numbers(views: tuple[Path, ...]) -> None:
    assert os.stat(views[0]).st_ino != os.stat(views[1]).st_ino


@of("listings that are kept")
def test_control_listings(views: tuple[Path, ...]) -> None:
    assert os.listdir(views[1]) == []
    (views[0] / "x").touch()
    time.sleep(0.1)
    assert os.listdir(views[1]) == []
    assert (views[1] / "x").exists()
