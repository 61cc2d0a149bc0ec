"""Names that change while a draft is open: rename, link, unlink, removed directories, and other writers' versions."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.conftest import both_temps
from tests.mount.places import A, B, content, in_quarantine, leftovers, quarantined
from tests.support.mounting import STOP_SECONDS, Mount, wait_until

Nodes = tuple[Mount, Mount]
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
V, W = b"version one " * 1000, b"another version " * 700


def places(nodes: Nodes) -> list[Path]:
    """Both mounts and the directory below."""
    return [nodes[0].path, nodes[1].path, nodes[0].backing]


def assert_everywhere(nodes: Nodes, name: str, data: bytes | None) -> None:
    """The name shows `data` on both nodes and below, now."""
    for place in places(nodes):
        assert content(place / name) == data, place


def assert_nothing_left(nodes: Nodes) -> None:
    """No temporary file stays in the backing directory."""
    assert wait_until(lambda: not leftovers(nodes[0].backing)), leftovers(nodes[0].backing)


# Rename and link of open drafts.


@both_temps
def test_rename_of_an_open_draft(nodes: Nodes, writer: Actor) -> None:
    """Renaming its own open file publishes what is in it under the new name; the old name never shows."""
    first, _ = nodes
    fd = writer.open(first / "temp", CREATE)
    writer.write(fd, A)
    writer("os.rename(p, q)", p=str(first / "temp"), q=str(first / "final"))
    assert_everywhere(nodes, "temp", None)
    assert_everywhere(nodes, "final", A)
    writer.closefd(fd)
    assert_everywhere(nodes, "final", A)
    assert not list(quarantined(first.backing))
    assert_nothing_left(nodes)


@both_temps
def test_replace_inside_a_with_block(nodes: Nodes, writer: Actor) -> None:
    """The common Python idiom: NamedTemporaryFile, and os.replace over an older version before it is closed."""
    first, _ = nodes
    (first / "final").write_bytes(V)
    writer(
        "with tempfile.NamedTemporaryFile(dir=base, delete=False) as f:\n"
        "    f.write(data); f.flush()\n"
        "    os.replace(f.name, os.path.join(base, 'final'))\n",
        base=str(first.path),
        data=A,
    )
    assert_everywhere(nodes, "final", A)
    assert os.listdir(first.path) == ["final"]
    assert_nothing_left(nodes)


@both_temps
def test_writes_after_a_rename_are_a_new_draft(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """What the descriptor writes after the rename is private again, on top of what was published, until its close."""
    first, second = nodes
    fd = writer.open(first / "temp", CREATE)
    writer.write(fd, A)
    writer("os.rename(p, q)", p=str(first / "temp"), q=str(first / "final"))
    stranger("held = os.open(p, os.O_RDONLY)", p=str(second / "final"))
    writer.write(fd, B)
    assert_everywhere(nodes, "final", A)
    assert writer("os.fstat(fd).st_size", fd=fd) == len(A + B)
    writer.closefd(fd)
    assert_everywhere(nodes, "final", A + B)
    assert stranger("os.pread(held, 1 << 20, 0)") == A
    assert_nothing_left(nodes)


def test_a_killed_writer_after_a_rename(nodes: Nodes, writer: Actor) -> None:
    """Killed after the rename with more written: what the rename published stays, the rest goes to quarantine."""
    first, _ = nodes
    fd = writer.open(first / "temp", CREATE)
    writer.write(fd, A)
    writer("os.rename(p, q)", p=str(first / "temp"), q=str(first / "final"))
    writer.write(fd, B)
    writer.kill(signal.SIGKILL)
    assert in_quarantine(first.backing, lambda data: data == A + B)
    assert_everywhere(nodes, "final", A)


def test_rename_by_a_child(nodes: Nodes, writer: Actor) -> None:
    """A child (`mv` run by the writer) renames the open draft: the same as by the writer."""
    first, _ = nodes
    fd = writer.open(first / "temp", CREATE)
    writer.write(fd, A)
    writer("subprocess.run(['mv', p, q], check=True)", p=str(first / "temp"), q=str(first / "final"))
    assert_everywhere(nodes, "temp", None)
    assert_everywhere(nodes, "final", A)
    writer.closefd(fd)
    assert_everywhere(nodes, "final", A)


@both_temps
def test_rename_of_an_open_draft_into_another_directory(nodes: Nodes, writer: Actor) -> None:
    """The same across directories; what is written after it is published there."""
    first, _ = nodes
    (first / "tmp").mkdir()
    (first / "out").mkdir()
    fd = writer.open(first / "tmp" / "x", CREATE)
    writer.write(fd, A)
    writer("os.rename(p, q)", p=str(first / "tmp" / "x"), q=str(first / "out" / "y"))
    assert_everywhere(nodes, "out/y", A)
    writer.write(fd, B)
    assert_everywhere(nodes, "out/y", A)
    writer.closefd(fd)
    assert_everywhere(nodes, "tmp/x", None)
    assert_everywhere(nodes, "out/y", A + B)
    assert not list(quarantined(first.backing))
    assert_nothing_left(nodes)


MOVE = "subprocess.run(['mv', p, q], check=True)"
EXCHANGE = "ctypes.CDLL(None).renameat2(-100, os.fsencode(p), -100, os.fsencode(q), 2)"


@both_temps
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("way", ["os.rename(p, q)", MOVE, EXCHANGE], ids=["itself", "child", "exchange"])
def test_a_version_that_is_open_for_writing_goes_to_another_directory(
    nodes: Nodes, writer: Actor, way: str, written: bool
) -> None:
    """What is written after the rename is published there, and no hidden file stays in either directory."""
    first, _ = nodes
    for name, data in (("from/x", V), ("to/y", W)):
        (first / name).parent.mkdir()
        (first / name).write_bytes(data)
    fd = writer.open(first / "from" / "x", os.O_RDWR)
    writer(way, p=str(first / "from" / "x"), q=str(first / "to" / "y"))
    if written:
        writer.write(fd, A)
    assert writer.errno("os.close(fd)", fd=fd) == 0
    assert_everywhere(nodes, "to/y", A if written else V)
    assert_everywhere(nodes, "from/x", W if way == EXCHANGE else None)
    assert not list(quarantined(first.backing))
    assert_nothing_left(nodes)


def test_a_killed_daemon_after_a_draft_went_to_another_directory(make_mount: MountFactory, writer: Actor) -> None:
    """Its successor finds the hidden file where the rename has brought it."""
    dead = make_mount("-o", "temp=hidden")
    for name in ("from", "to"):
        (dead / name).mkdir()
    (dead / "from" / "x").write_bytes(V)
    fd = writer.open(dead / "from" / "x", os.O_RDWR)
    writer("os.rename(p, q)", p=str(dead / "from" / "x"), q=str(dead / "to" / "y"))
    writer.write(fd, A)
    writer("os.fsync(fd)", fd=fd)
    assert [Path(path).parent.name for path in leftovers(dead.backing)] == ["to"]
    dead.process.kill()
    dead.process.wait(STOP_SECONDS)
    successor = make_mount("-o", "temp=hidden")
    assert in_quarantine(successor.backing, lambda data: data == A)
    assert content(successor / "to" / "y") == V
    assert wait_until(lambda: not leftovers(successor.backing))


@both_temps
def test_directory_renamed_under_a_draft(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """A draft belongs to its directory, not to a path: it is published where the directory is by then."""
    first, _ = nodes
    (first / "old").mkdir()
    fd = writer.open(first / "old" / "file", CREATE)
    writer.write(fd, A)
    stranger("os.rename(p, q)", p=str(first / "old"), q=str(first / "new"))
    writer.closefd(fd)
    assert_everywhere(nodes, "new/file", A)
    assert_everywhere(nodes, "old/file", None)


def test_directory_renamed_on_another_node(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """The same when the other node renames it, and a new directory takes the old name."""
    first, second = nodes
    (first / "old").mkdir()
    fd = writer.open(first / "old" / "file", CREATE)
    writer.write(fd, A)
    stranger("os.rename(p, q); os.mkdir(p)", p=str(second / "old"), q=str(second / "new"))
    writer.closefd(fd)
    assert_everywhere(nodes, "new/file", A)
    assert_everywhere(nodes, "old/file", None)


def link_open_draft(directory: Path, writer: Actor) -> int:
    """Write A under the name `temp`, and link it to `final` before it is closed; returns the writer's descriptor."""
    fd = writer.open(directory / "temp", CREATE)
    writer.write(fd, A)
    writer("os.link(p, q)", p=str(directory / "temp"), q=str(directory / "final"))
    return fd


@both_temps
def test_link_of_an_open_draft(nodes: Nodes, writer: Actor) -> None:
    """link(2) of an open draft publishes it: both names show the same whole file."""
    first, _ = nodes
    fd = link_open_draft(first.path, writer)
    assert_everywhere(nodes, "final", A)
    writer.closefd(fd)
    assert_everywhere(nodes, "final", A)
    assert_everywhere(nodes, "temp", A)
    assert_nothing_left(nodes)


@both_temps
def test_writing_on_after_a_link_changes_neither_name(nodes: Nodes, writer: Actor) -> None:
    """The writer's inode is never the one that gets the second name: its next round would be seen there at once."""
    first, _ = nodes
    fd = link_open_draft(first.path, writer)
    writer.write(fd, B)
    for name in ("temp", "final"):
        assert_everywhere(nodes, name, A)
    writer.closefd(fd)
    assert_everywhere(nodes, "final", A)
    assert_everywhere(nodes, "temp", A + B)
    assert_nothing_left(nodes)


@pytest.mark.parametrize("final", ["x.lock", "x.db"])
def test_a_link_to_a_name_that_is_written_in_place_is_the_inode_that_is_open(
    nodes: Nodes, writer: Actor, final: str
) -> None:
    """As filelock's StrictSoftFileLock makes its lock, and asks whether it is its own."""
    first, second = nodes
    fd = writer.open(first / "temp", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    writer.write(fd, A)
    writer("os.link(p, q)", p=str(first / "temp"), q=str(first / final))
    own = writer("os.fstat(fd).st_ino, os.fstat(fd).st_nlink", fd=fd)
    assert own == ((second / final).stat().st_ino, 2)
    writer.closefd(fd)
    for place in (first, second):
        status = (place / final).stat()
        assert (status.st_ino, status.st_nlink, content(place / final)) == (*own, A)
    writer("os.unlink(p)", p=str(first / "temp"))
    assert (first / final).stat().st_nlink == 1


@both_temps
def test_a_link_of_an_open_draft_lasts_beyond_its_close(nodes: Nodes, writer: Actor) -> None:
    """Where nothing was written after it, both names stay one file."""
    first, second = nodes
    fd = link_open_draft(first.path, writer)
    writer.closefd(fd)
    assert wait_until(lambda: (second / "temp").stat().st_nlink == 2)
    assert (first / "temp").samefile(first / "final")


def test_link_then_unlink_of_the_temporary_name(nodes: Nodes, writer: Actor) -> None:
    """link(2) to the final name, unlink of the temporary one, close: the final name is there, nothing else."""
    first, _ = nodes
    fd = writer.open(first / "temp", CREATE)
    writer.write(fd, A)
    writer("os.link(p, q); os.unlink(p)", p=str(first / "temp"), q=str(first / "final"))
    writer.closefd(fd)
    assert_everywhere(nodes, "final", A)
    assert_everywhere(nodes, "temp", None)


def test_a_stranger_cannot_touch_a_draft(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """rename, link and unlink of a name that only another family sees are ENOENT; the draft goes on."""
    first, second = nodes
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, A)
    for node in nodes:
        for code in ("os.rename(p, q)", "os.link(p, q)", "os.unlink(p)", "os.truncate(p, 0)"):
            problem = stranger.errno(code, p=str(node / "file"), q=str(node / "other"))
            assert problem == errno.ENOENT, code
    writer.closefd(fd)
    assert content(second / "file") == A


def test_rename_over_a_name_with_a_draft(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """Another process puts its file under the name meanwhile: both are complete, the later close wins."""
    first, second = nodes
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, A)
    (second / "other").write_bytes(W)
    stranger("os.rename(p, q)", p=str(second / "other"), q=str(second / "file"))
    assert_everywhere(nodes, "file", W)
    assert writer.read(first / "file") == A
    writer.closefd(fd)
    assert_everywhere(nodes, "file", A)


# Unlink.


@both_temps
def test_unlink_of_its_own_draft_cancels(nodes: Nodes, writer: Actor) -> None:
    """The family removes the name it is writing: nothing is published, nothing kept, the descriptor says nlink 0."""
    first, _ = nodes
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, A)
    writer("os.unlink(p)", p=str(first / "file"))
    assert writer("os.fstat(fd).st_nlink", fd=fd) == 0
    assert writer.errno("os.stat(p)", p=str(first / "file")) == errno.ENOENT
    writer.write(fd, B)
    assert writer("os.fstat(fd).st_size", fd=fd) == len(A + B)
    writer.closefd(fd)
    assert_everywhere(nodes, "file", None)
    assert not list(quarantined(first.backing))
    assert_nothing_left(nodes)


@both_temps
def test_unlink_of_a_draft_over_a_version(nodes: Nodes, writer: Actor) -> None:
    """The same over an existing file: the name is gone, as it would be anywhere."""
    first, _ = nodes
    (first / "file").write_bytes(V)
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, A)
    writer("os.unlink(p)", p=str(first / "file"))
    assert_everywhere(nodes, "file", None)
    writer.closefd(fd)
    assert_everywhere(nodes, "file", None)
    assert_nothing_left(nodes)


def test_unlink_and_create_again_while_open(nodes: Nodes, writer: Actor) -> None:
    """After the unlink the same name can be created again: a second draft, and the first publishes nothing."""
    first, _ = nodes
    one = writer.open(first / "file", CREATE)
    writer.write(one, A)
    writer("os.unlink(p)", p=str(first / "file"))
    two = writer.open(first / "file", CREATE)
    writer.write(two, B)
    writer.closefd(one)
    assert_everywhere(nodes, "file", None)
    writer.closefd(two)
    assert_everywhere(nodes, "file", B)


def test_unlink_of_the_version_by_a_stranger(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """A stranger removes the version under a draft that started from nothing: the draft is a new file then."""
    first, second = nodes
    (first / "file").write_bytes(V)
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, A)
    stranger("os.unlink(p)", p=str(second / "file"))
    assert_everywhere(nodes, "file", None)
    writer.closefd(fd)
    assert_everywhere(nodes, "file", A)


# Directories that are removed under a draft.


def by_rmdir(place: Path) -> None:
    (place / "dir").rmdir()


def by_rmtree(place: Path) -> None:
    shutil.rmtree(place / "dir")


def by_rm(place: Path) -> None:
    subprocess.run(["rm", "-r", place / "dir"], check=True)


REMOVERS: dict[str, Callable[[Path], None]] = {"rmdir": by_rmdir, "rmtree": by_rmtree, "rm": by_rm}


@both_temps
@pytest.mark.parametrize("again", [False, True], ids=["gone", "made-again"])
@pytest.mark.parametrize("where", [0, 1], ids=["same-node", "other-node"])
@pytest.mark.parametrize("how", REMOVERS)
def test_directory_removed_under_a_draft(how: str, where: int, again: bool, nodes: Nodes, writer: Actor) -> None:
    """close() says ENOENT, the bytes are kept, and neither the directory nor the file comes back, also when a
    directory of the same name was made again."""
    first, _ = nodes
    (first / "dir").mkdir()
    fd = writer.open(first / "dir" / "file", CREATE)
    writer.write(fd, A)
    REMOVERS[how](nodes[where].path)
    if again:
        (nodes[where] / "dir").mkdir()
    assert writer.errno("os.close(fd)", fd=fd) == errno.ENOENT
    assert in_quarantine(first.backing, lambda data: data == A)
    for place in places(nodes):
        assert os.path.isdir(place / "dir") is again
        assert not again or os.listdir(place / "dir") == []


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made-again"])
def test_directory_removed_below_the_mount(again: bool, nodes: Nodes, writer: Actor) -> None:
    """The same when the directory is removed in the backing directory, behind safefs's back."""
    first, _ = nodes
    (first / "dir").mkdir()
    fd = writer.open(first / "dir" / "file", CREATE)
    writer.write(fd, A)
    shutil.rmtree(first.backing / "dir")
    if again:
        (first.backing / "dir").mkdir()
    assert writer.errno("os.close(fd)", fd=fd) == errno.ENOENT
    for place in places(nodes):
        assert os.path.isdir(place / "dir") is again
        assert not again or os.listdir(place / "dir") == []


@both_temps
def test_tree_removed_under_drafts(nodes: Nodes, writer: Actor) -> None:
    """A whole tree with drafts at several depths and other files is removed by rm -r on the other node."""
    first, second = nodes
    for name in ("t/a/b/c", "t/d"):
        (first / name).mkdir(parents=True)
        (first / name / "published").write_bytes(V)
    descriptors = [writer.open(first / name / "draft", CREATE) for name in ("t", "t/a/b", "t/a/b/c", "t/d")]
    for fd in descriptors:
        writer.write(fd, A)
    subprocess.run(["rm", "-r", second / "t"], check=True)
    for fd in descriptors:
        assert writer.errno("os.close(fd)", fd=fd) == errno.ENOENT
    assert os.listdir(first.path) == os.listdir(second.path) == []


def test_control_the_bare_directory_keeps_a_removed_writer_quiet(tmp_path: Path, writer: Actor) -> None:
    """Without safefs a writer whose directory was removed is told nothing and its bytes are gone."""
    (tmp_path / "dir").mkdir()
    fd = writer.open(tmp_path / "dir" / "file", CREATE)
    writer.write(fd, A)
    shutil.rmtree(tmp_path / "dir")
    assert writer.errno("os.close(fd)", fd=fd) == 0


def test_writers_against_rmtree_and_mkdir(nodes: Nodes) -> None:
    """Writers on one node, remove-and-make-again on the other, many times: no file of an earlier directory shows up in
    a later one, and whole files only."""
    first, second = nodes
    with actor() as writer:
        writer(
            "def work(base, stop):\n"
            "    counts = [0, 0]\n"
            "    while not os.path.exists(stop):\n"
            "        try:\n"
            "            d = os.open(f'{base}/dir', os.O_PATH)\n"
            "            try:\n"
            "                def at(name, flags): return os.open(name, flags, 0o644, dir_fd=d)\n"
            "                generation = open('generation', opener=at).read()\n"
            "                with open('file', 'w', opener=at) as f: f.write(generation * 2000)\n"
            "            finally: os.close(d)\n"
            "            counts[0] += 1\n"
            "        except (FileNotFoundError, NotADirectoryError): counts[1] += 1\n"
            "    return counts\n"
        )
        stop = first.backing.parent / "stop"
        writer.start("work(base, stop)", base=str(first.path), stop=str(stop))
        wrong, seen = [], 0
        try:
            for number in range(150):
                (second / "dir").mkdir()
                (second / "dir" / "generation").write_text(f"{number:05}")
                for _ in range(20):
                    data = content(second / "dir" / "file")
                    seen += data is not None
                    # An empty generation file was read by the writer before it was written; that cannot happen either.
                    if data is not None and data != b"%05d" % number * 2000:
                        wrong.append((number, data[:10], len(data)))
                while (second / "dir").exists():
                    # A file that is published between rmtree's listing and its rmdir makes it fail, as anywhere.
                    shutil.rmtree(second / "dir", ignore_errors=True)
        finally:
            stop.touch()
        done, lost = writer.result()
    assert not wrong
    assert done and lost and seen, f"the race did not happen: {done} published, {lost} lost, {seen} seen"


# Conflicts: drafts that started from a version.


def publish_other_node(nodes: Nodes, data: bytes) -> None:
    (nodes[1] / "file").write_bytes(data)


def publish_same_node(nodes: Nodes, data: bytes) -> None:
    (nodes[0] / "file").write_bytes(data)


def replace_below(nodes: Nodes, data: bytes) -> None:
    (nodes[0].backing / "new").write_bytes(data)
    (nodes[0].backing / "new").replace(nodes[0].backing / "file")


WINNERS = {"same-node": publish_same_node, "other-node": publish_other_node, "below": replace_below}


@both_temps
@pytest.mark.parametrize("winner", WINNERS)
def test_conflict_is_refused(winner: str, nodes: Nodes, writer: Actor) -> None:
    """A draft on top of V meets W, which has nothing to do with it: close() says ESTALE, W stays, ours is kept."""
    first, _ = nodes
    (first / "file").write_bytes(V)
    fd = writer.open(first / "file", os.O_RDWR)
    writer("os.pwrite(fd, b'changed', 100)", fd=fd)
    WINNERS[winner](nodes, W)
    assert writer.errno("os.close(fd)", fd=fd) == errno.ESTALE
    assert_everywhere(nodes, "file", W)
    assert in_quarantine(first.backing, lambda data: data == V[:100] + b"changed" + V[107:])
    assert_nothing_left(nodes)


def test_control_conflict_in_the_bare_directory(tmp_path: Path, writer: Actor) -> None:
    """Without safefs the two are blended."""
    (tmp_path / "file").write_bytes(V)
    fd = writer.open(tmp_path / "file", os.O_RDWR)
    (tmp_path / "file").write_bytes(W)
    writer("os.pwrite(fd, b'changed', 100)", fd=fd)
    writer.closefd(fd)
    assert content(tmp_path / "file") == W[:100] + b"changed" + W[107:]


def test_two_resumed_downloads_are_never_blended(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """Two processes append their own rest to one half file: one of them wins, whole, the other is told."""
    first, second = nodes
    (first / "file").write_bytes(V)
    one = writer.open(first / "file", os.O_WRONLY | os.O_APPEND)
    two = stranger.open(second / "file", os.O_WRONLY | os.O_APPEND)
    for _ in range(3):
        writer.write(one, A)
        stranger.write(two, B)
    assert stranger.errno("os.close(fd)", fd=two) == 0
    assert writer.errno("os.close(fd)", fd=one) == errno.ESTALE
    assert_everywhere(nodes, "file", V + B * 3)
    assert in_quarantine(first.backing, lambda data: data == V + A * 3)


def test_no_conflict_for_a_draft_from_nothing(nodes: Nodes, writer: Actor) -> None:
    """A draft that started by O_TRUNC replaces whatever the name shows by then."""
    first, _ = nodes
    (first / "file").write_bytes(V)
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, A)
    publish_other_node(nodes, W)
    writer.closefd(fd)
    assert_everywhere(nodes, "file", A)


@both_temps
@pytest.mark.parametrize("node", [0, 1], ids=["same-node", "other-node"])
def test_version_renamed_away(node: int, nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """V was renamed away, as a downloader does when it finishes: ours appears under our name, V keeps its own."""
    first, _ = nodes
    (first / "file").write_bytes(V)
    fd = writer.open(first / "file", os.O_WRONLY | os.O_APPEND)
    writer.write(fd, A)
    stranger("os.rename(p, q)", p=str(nodes[node] / "file"), q=str(nodes[node] / "final"))
    assert_everywhere(nodes, "final", V)
    writer.closefd(fd)
    assert_everywhere(nodes, "final", V)
    assert_everywhere(nodes, "file", V + A)


@both_temps
@pytest.mark.parametrize("node", [0, 1], ids=["same-node", "other-node"])
def test_version_deleted(node: int, nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """V was deleted: close() says ESTALE, the name stays gone, the bytes are kept."""
    first, _ = nodes
    (first / "file").write_bytes(V)
    fd = writer.open(first / "file", os.O_WRONLY | os.O_APPEND)
    writer.write(fd, A)
    stranger("os.unlink(p)", p=str(nodes[node] / "file"))
    assert writer.errno("os.close(fd)", fd=fd) == errno.ESTALE
    assert_everywhere(nodes, "file", None)
    assert in_quarantine(first.backing, lambda data: data == V + A)


def test_clean_open_has_no_conflict(nodes: Nodes, writer: Actor) -> None:
    """Who opened for write and wrote nothing has nothing to lose: close() is silent and W stays."""
    (nodes[0] / "file").write_bytes(V)
    fd = writer.open(nodes[0] / "file", os.O_RDWR)
    publish_other_node(nodes, W)
    writer.closefd(fd)
    assert_everywhere(nodes, "file", W)


def test_truncated_by_path_over_another_version(nodes: Nodes, writer: Actor) -> None:
    """truncate(2) works on the version that its name shows at that moment."""
    (nodes[0] / "file").write_bytes(V)
    publish_other_node(nodes, W)
    writer("os.truncate(p, 10)", p=str(nodes[0] / "file"))
    assert_everywhere(nodes, "file", W[:10])
