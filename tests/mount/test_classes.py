"""Classes of names: partial files that can be resumed, lock files and shared files that are written in place."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from tests.mount.actors import Actor, actor
from tests.mount.conftest import both_temps
from tests.mount.places import A, B, content, leftovers
from tests.support.mounting import Mount, wait_until

Nodes = tuple[Mount, Mount]
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def eventually(nodes: Nodes, name: str, data: bytes | None) -> None:
    """Both nodes and the directory below come to show `data`."""
    for place in (nodes[0].path, nodes[1].path, nodes[0].backing):
        assert wait_until(lambda place=place: content(place / name) == data), f"{place}: {content(place / name)!r:.60}"


# partial

PARTIAL = ["f.part", "blob.incomplete", "x.partial", "y.crdownload"]


@both_temps
@pytest.mark.parametrize("name", PARTIAL)
def test_a_killed_writer_of_a_partial_file_can_resume(name: str, nodes: Nodes, stranger: Actor) -> None:
    """What a killed writer had comes back under its partial name, for another process and node to go on with."""
    first, second = nodes
    with actor() as writer:
        fd = writer.open(first / name, CREATE)
        writer.write(fd, A)
        assert content(second / name) is None
        writer.kill(signal.SIGKILL)
    eventually(nodes, name, A)
    fd = stranger.open(second / name, APPEND)
    assert stranger("os.fstat(fd).st_size", fd=fd) == len(A)
    stranger.write(fd, B)
    stranger.closefd(fd)
    eventually(nodes, name, A + B)
    assert not leftovers(first.backing)


@both_temps
def test_append_takes_the_partial_file_over(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """A non-truncating open of a partial file moves it into the draft without a copy: nobody else has it meanwhile,
    who comes second starts from nothing, and the last complete close is what shows."""
    first, second = nodes
    (first / "f.part").write_bytes(A)
    number = os.stat(first.backing / "f.part").st_ino
    fd = writer.open(first / "f.part", APPEND)
    assert writer("os.fstat(fd).st_size", fd=fd) == len(A)
    writer.write(fd, B)
    assert writer.read(first / "f.part") == A + B
    assert content(second / "f.part") is None
    other = stranger.open(second / "f.part", APPEND)
    assert stranger("os.fstat(fd).st_size", fd=other) == 0
    writer.closefd(fd)
    assert content(second / "f.part") == A + B
    assert os.stat(first.backing / "f.part").st_ino == number
    assert stranger("os.fstat(fd).st_size", fd=other) == 0


@both_temps
def test_killed_after_taking_over(nodes: Nodes, writer: Actor) -> None:
    """Taken over, appended to, killed: all of it is back under the partial name."""
    first, _ = nodes
    (first / "f.part").write_bytes(A)
    fd = writer.open(first / "f.part", APPEND)
    writer.write(fd, B)
    writer.kill(signal.SIGKILL)
    eventually(nodes, "f.part", A + B)


def test_killed_before_writing_after_taking_over(nodes: Nodes, writer: Actor) -> None:
    """Taken over and killed at once: the file is back as it was."""
    first, _ = nodes
    (first / "f.part").write_bytes(A)
    writer.open(first / "f.part", APPEND)
    writer.kill(signal.SIGKILL)
    eventually(nodes, "f.part", A)


def test_taken_over_and_closed_clean(nodes: Nodes, writer: Actor) -> None:
    """Taken over and closed without a write: the file is back as it was."""
    first, _ = nodes
    (first / "f.part").write_bytes(A)
    writer.closefd(writer.open(first / "f.part", APPEND))
    eventually(nodes, "f.part", A)


@both_temps
def test_finished_by_rename(nodes: Nodes, writer: Actor) -> None:
    """The end of a download: the partial name is renamed to the final one, open or closed."""
    first, _ = nodes
    for name, close_first in (("one", True), ("two", False)):
        (first / f"{name}.part").write_bytes(A)
        fd = writer.open(first / f"{name}.part", APPEND)
        writer.write(fd, B)
        if close_first:
            writer.closefd(fd)
        writer("os.rename(p, q)", p=str(first / f"{name}.part"), q=str(first / name))
        eventually(nodes, name, A + B)
        eventually(nodes, f"{name}.part", None)
        if not close_first:
            writer.closefd(fd)
            eventually(nodes, name, A + B)


def test_readers_of_a_partial_file_that_is_taken_over(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """A partial file is private like others: nobody sees it by name while it is being written."""
    first, second = nodes
    fd = writer.open(first / "f.part", CREATE)
    for _ in range(5):
        writer.write(fd, A)
        assert stranger.read(second / "f.part") is None
    writer.closefd(fd)
    assert stranger.read(second / "f.part") == A * 5


def test_other_names_cannot_resume(nodes: Nodes, writer: Actor) -> None:
    """The control: under any other name a killed writer leaves nothing, and what was there stays."""
    first, _ = nodes
    (first / "f.bin").write_bytes(A)
    fd = writer.open(first / "f.bin", APPEND)
    writer.write(fd, B)
    writer.kill(signal.SIGKILL)
    eventually(nodes, "f.bin", A)


# lock


@pytest.mark.parametrize("name", ["x.lock", "lock", "x.lck"])
def test_a_lock_file_is_visible_at_once(name: str, nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """Created with O_EXCL on one node, it is there on all: one identity, one winner, its bytes visible as written."""
    first, second = nodes
    exclusive = os.O_CREAT | os.O_EXCL | os.O_RDWR
    fd = writer.open(first / name, exclusive)
    for node in nodes:
        assert stranger.errno("os.open(p, flags)", p=str(node / name), flags=exclusive) == errno.EEXIST
    writer.write(fd, b"4711\n")
    assert content(second / name) == content(first.backing / name) == b"4711\n"
    numbers = {
        writer("os.fstat(fd).st_ino", fd=fd),
        writer("os.stat(p).st_ino", p=str(first / name)),
        stranger("os.stat(p).st_ino", p=str(second / name)),
        os.stat(first.backing / name).st_ino,
    }
    assert len(numbers) == 1
    writer("os.unlink(p)", p=str(first / name))
    assert writer("os.fstat(fd).st_nlink", fd=fd) == 0
    assert content(second / name) is None
    other = stranger.open(second / name, exclusive)
    writer.closefd(fd)
    assert content(first / name) == b""
    stranger.closefd(other)


def test_a_removed_lock_file_shows_on_the_other_node(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """filelock asks its descriptor whether the file is still the one of that name: removed elsewhere is seen."""
    first, second = nodes
    fd = writer.open(first / "x.lock", os.O_CREAT | os.O_RDWR)
    stranger("os.unlink(p)", p=str(second / "x.lock"))
    assert writer("os.fstat(fd).st_nlink", fd=fd) == 0
    assert writer.errno("os.stat(p)", p=str(first / "x.lock")) == errno.ENOENT


def test_flock_on_lock_files(mount: Mount, writer: Actor, stranger: Actor) -> None:
    """flock and fcntl locks on a lock file exclude processes of one mount, and end with the process."""
    for take in ("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)"):
        with actor() as holder:
            holder("fd = os.open(p, os.O_CREAT | os.O_RDWR)", p=str(mount / "x.lock"))
            stranger("fd = os.open(p, os.O_CREAT | os.O_RDWR)", p=str(mount / "x.lock"))
            holder(take)
            assert stranger.errno(take) in (errno.EWOULDBLOCK, errno.EACCES)
            stranger.start(take.replace(" | fcntl.LOCK_NB", ""))
            holder.kill(signal.SIGKILL)
            stranger.result()
            stranger("os.close(fd)")


@pytest.mark.parametrize("name", ["uv.lock", "Cargo.lock", "poetry.lock"])
def test_data_files_named_lock_are_private(name: str, nodes: Nodes, writer: Actor) -> None:
    """A package manager's lock file is data: not seen before its close."""
    fd = writer.open(nodes[0] / name, CREATE)
    writer.write(fd, A)
    assert content(nodes[1] / name) is None
    writer.closefd(fd)
    assert content(nodes[1] / name) == A


# shared


@pytest.mark.parametrize("name", ["x.log", "x.db", "x.jsonl", "events.out.tfevents.1"])
def test_shared_files_are_written_in_place(name: str, nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """Each write is visible at once on both nodes and below, and the inode never changes."""
    first, second = nodes
    fd = writer.open(first / name, APPEND)
    stranger("held = os.open(p, os.O_RDONLY)", p=str(second / name))
    number = os.stat(first.backing / name).st_ino
    for count in range(1, 20):
        writer.write(fd, b"line %03d\n" % count)
        expected = b"".join(b"line %03d\n" % n for n in range(1, count + 1))
        assert content(first / name) == content(second / name) == content(first.backing / name) == expected
        assert stranger("os.pread(held, 1 << 20, 0)") == expected
        assert stranger("os.fstat(held).st_size") == len(expected)
    writer.closefd(fd)
    assert {os.stat(place / name).st_ino for place in (first.path, second.path, first.backing)} == {number}


def test_appends_of_both_nodes_are_all_kept(nodes: Nodes) -> None:
    """Lines that two nodes append to one log by O_APPEND: none is lost, none is torn."""
    with actor() as one, actor() as two:
        for party, node, letter in ((one, nodes[0], b"a"), (two, nodes[1], b"b")):
            party(
                "fd = os.open(p, os.O_WRONLY | os.O_APPEND | os.O_CREAT)",
                p=str(node / "x.log"),
            )
            party.start("for n in range(500): os.write(fd, letter * 63 + b'\\n')", letter=letter)
        one.result()
        two.result()
    lines = (nodes[0] / "x.log").read_bytes().splitlines()
    assert sorted(set(lines)) == [b"a" * 63, b"b" * 63]
    assert len(lines) == 1000


def test_a_killed_writer_of_a_log_keeps_its_lines(nodes: Nodes, writer: Actor) -> None:
    """What a killed process had logged is there: shared files have no draft."""
    fd = writer.open(nodes[0] / "x.log", APPEND)
    writer.write(fd, b"last words\n")
    writer.kill(signal.SIGKILL)
    assert content(nodes[1] / "x.log") == b"last words\n"


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite(journal: str, mount: Mount) -> None:
    """A database written by one connection and read by another, with either journal."""
    path = mount / "data.db"
    with sqlite3.connect(path, timeout=30) as one, sqlite3.connect(path, timeout=30) as two:
        assert one.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        one.execute("create table t (n integer, data blob)")
        for number in range(50):
            one.execute("insert into t values (?, ?)", (number, os.urandom(2000)))
            one.commit()
            assert two.execute("select count(*) from t").fetchone() == (number + 1,)
        assert two.execute("pragma integrity_check").fetchone() == ("ok",)
    one.close()
    two.close()


def test_mapping_of_a_shared_file(mount: Mount, writer: Actor, stranger: Actor) -> None:
    """MAP_SHARED of a shared file is one memory for all processes of a mount."""
    (mount / "x.db").write_bytes(bytes(8192))
    for party in (writer, stranger):
        party("fd = os.open(p, os.O_RDWR); view = mmap.mmap(fd, 8192)", p=str(mount / "x.db"))
    writer("view[100:105] = b'hello'")
    assert stranger("view[100:105]") == b"hello"


def test_rename_from_private_to_shared_and_back(mount: Mount, writer: Actor) -> None:
    """The class is the name's: a file that is renamed is of its new name's class from the next open on."""
    (mount / "a.bin").write_bytes(A)
    (mount / "a.bin").rename(mount / "a.log")
    fd = writer.open(mount / "a.log", APPEND)
    writer.write(fd, B)
    assert content(mount / "a.log") == A + B
    writer.closefd(fd)
    (mount / "a.log").rename(mount / "b.bin")
    fd = writer.open(mount / "b.bin", APPEND)
    writer.write(fd, A)
    assert content(mount / "b.bin") == A + B
    writer.closefd(fd)
    assert content(mount / "b.bin") == A + B + A


def test_rules_of_an_administrator(make_mount: object, tmp_path: Path, writer: Actor) -> None:
    """Rules in the configuration come before the shipped ones."""
    config = tmp_path / "safefs.toml"
    config.write_text('[[rule]]\nclass = "private"\nmatch = ["secret.log"]\nreason = "test"\n')
    mount = make_mount("--config", str(config))  # type: ignore[operator]
    for name, visible in (("secret.log", None), ("other.log", A)):
        fd = writer.open(mount / name, CREATE)
        writer.write(fd, A)
        assert content(mount / name) == visible
        writer.closefd(fd)
        assert content(mount / name) == A
