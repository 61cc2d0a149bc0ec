"""What belongs to a file besides its bytes, and how fresh it is: owner, mode, xattrs, ACLs, inode numbers, names."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.conftest import both_temps, both_temps_exact
from tests.mount.places import A, B, content
from tests.support.mounting import Mount, wait_until

Nodes = tuple[Mount, Mount]
CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
USER, GROUP = 61001, 61003
EXTENDED_ACL = ["-m", f"u:{USER}:rw", "-m", "g::r"]


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def rewrite(writer: Actor, path: Path, data: bytes, flags: int = CREATE) -> None:
    """Open, write and close in another process."""
    fd = writer.open(path, flags)
    writer.write(fd, data)
    writer.closefd(fd)


@both_temps
@pytest.mark.parametrize("flags", [CREATE, os.O_WRONLY | os.O_APPEND], ids=["truncate", "append"])
def test_a_rewrite_keeps_what_belongs_to_the_file(flags: int, nodes: Nodes, writer: Actor) -> None:
    """Owner, group, mode, xattrs and ACL of an existing file are the same after it was rewritten."""
    first, second = nodes
    path = first / "file"
    path.write_bytes(A)
    subprocess.run(["setfacl", *EXTENDED_ACL, path], check=True)
    os.chown(path, USER, GROUP)
    os.chmod(path, 0o751)
    os.setxattr(path, "user.kept", b"value")
    before = os.stat(path)
    acl = os.getxattr(path, "system.posix_acl_access")
    rewrite(writer, path, B, flags)
    for place in (first.path, second.path, first.backing):
        after = os.stat(place / "file")
        assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
        assert os.getxattr(place / "file", "user.kept") == b"value"
        assert os.getxattr(place / "file", "system.posix_acl_access") == acl


@both_temps
def test_new_files_take_after_their_directory(nodes: Nodes, writer: Actor) -> None:
    """A setgid directory gives its group, a default ACL its entries, as without safefs."""
    first, second = nodes
    for base in (first.path, first.backing.parent / "reference"):
        base.mkdir(exist_ok=True)
        directory = base / "dir"
        directory.mkdir()
        os.chown(directory, 0, GROUP)
        os.chmod(directory, 0o2775)
        subprocess.run(["setfacl", "-d", "-m", f"u:{USER}:rwx,g::rx,o::-", directory], check=True)
        rewrite(writer, directory / "file", A)
    reference = first.backing.parent / "reference" / "dir" / "file"
    for place in (first.path, second.path, first.backing):
        path = place / "dir" / "file"
        assert os.getxattr(path, "system.posix_acl_access") == os.getxattr(reference, "system.posix_acl_access")
        assert os.stat(path).st_gid == GROUP
        assert os.stat(path).st_mode == os.stat(reference).st_mode


@both_temps
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_umask_is_honoured(umask: int, nodes: Nodes) -> None:
    """The mode of a new file is what open(2) was given, less the caller's umask, also while it is a draft."""
    with actor(umask=umask) as writer:
        fd = writer.open(nodes[0] / "file", CREATE, 0o666)
        assert stat.S_IMODE(writer("os.fstat(fd).st_mode", fd=fd)) == 0o666 & ~umask
        writer.closefd(fd)
    for place in (nodes[0].path, nodes[1].path, nodes[0].backing):
        assert stat.S_IMODE(os.stat(place / "file").st_mode) == 0o666 & ~umask


@both_temps_exact
def test_changes_to_the_descriptor_are_published(nodes: Nodes, writer: Actor) -> None:
    """fchmod, fchown, futimens and fsetxattr on a draft are there with its publish and not before."""
    first, second = nodes
    (first / "file").write_bytes(A)
    fd = writer.open(first / "file", CREATE)
    writer.write(fd, B)
    writer("os.fchmod(fd, 0o600); os.fchown(fd, 61001, 61003); os.setxattr(fd, 'user.x', b'1')", fd=fd)
    writer("os.utime(fd, ns=(1_000_000_007, 2_000_000_009))", fd=fd)
    assert stat.S_IMODE(os.stat(second / "file").st_mode) == 0o644
    assert "user.x" not in os.listxattr(first / "file")
    writer.closefd(fd)
    for place in (first.path, second.path, first.backing):
        status = os.stat(place / "file")
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (USER, GROUP, 0o600)
        assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_007, 2_000_000_009)
        assert os.getxattr(place / "file", "user.x") == b"1"


def test_changes_by_name_while_a_stranger_writes(nodes: Nodes, writer: Actor, stranger: Actor) -> None:
    """chmod by name of a stranger changes the version that he sees."""
    first, second = nodes
    (first / "file").write_bytes(A)
    fd = writer.open(first / "file", CREATE)
    stranger("os.chmod(p, 0o640)", p=str(second / "file"))
    assert stat.S_IMODE(os.stat(second.backing / "file").st_mode) == 0o640
    writer.write(fd, B)
    writer.closefd(fd)
    assert content(first / "file") == B


def drop_caches() -> None:
    """Make the kernel forget dentries and inodes that nobody uses."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def test_what_a_publish_changes_beside_the_file_is_seen_at_once(mount: Mount, writer: Actor) -> None:
    """A publish gives the directory a new time and takes a link from the version before, whatever the kernel has
    cached of them: rsync compares the times of directories."""
    for name in ("one", "two"):
        (mount / name).mkdir()
    with opened(mount / "one") as directory:
        publish_beside(mount, writer, directory)


def publish_beside(mount: Mount, writer: Actor, directory: int) -> None:
    for number in range(20):
        first, other = mount / "one" / f"file{number}", mount / "two" / f"file{number}"
        first.write_bytes(A)
        os.link(first, other)
        for flags in (CREATE, os.O_WRONLY | os.O_APPEND):
            before, _ = os.fstat(directory).st_mtime_ns, os.stat(other)
            rewrite(writer, first, B, flags)
            assert os.fstat(directory).st_mtime_ns == os.stat(mount.backing / "one").st_mtime_ns != before
            assert os.stat(other).st_nlink == 1


def test_inode_numbers_are_stable(make_mount: MountFactory, backing: Path, writer: Actor) -> None:
    """st_ino is the backing's own number: the same on each node, after the kernel forgot, and after a new mount."""
    first = make_mount()
    (first / "dir").mkdir()
    (first / "link").symlink_to("dir")
    rewrite(writer, first / "file", A)
    rewrite(writer, first / "dir" / "other", B)
    os.link(first / "file", first / "hard")
    names = ["file", "hard", "dir", "dir/other", "link", "."]

    def numbers(place: Path) -> list[int]:
        return [os.lstat(place / name).st_ino for name in names]

    # The root directory is the mount's own node.
    expected = numbers(backing)[:-1]
    assert numbers(first.path)[:-1] == expected
    root = os.stat(first.path).st_ino
    drop_caches()
    assert numbers(first.path) == [*expected, root]
    assert numbers(make_mount().path)[:-1] == expected
    first.umount()
    first.process.wait(30)
    assert numbers(make_mount().path)[:-1] == expected


def test_inode_number_of_a_draft_once_published(nodes: Nodes, writer: Actor) -> None:
    """What fstat said of the descriptor after the publish, a later stat says of the name (tail -f, rsync, git)."""
    first, _ = nodes
    rewrite(writer, first / "file", A)
    number = os.stat(first / "file").st_ino
    drop_caches()
    assert os.stat(first / "file").st_ino == number
    with open(first / "file", "rb") as file:
        assert os.fstat(file.fileno()).st_ino == number


def test_inode_numbers_are_kept_while_open(nodes: Nodes, writer: Actor) -> None:
    """A descriptor on an old version keeps number, size and link count 0 when the kernel forgets everything else."""
    first, second = nodes
    (first / "file").write_bytes(A)
    with open(first / "file", "rb") as file:
        number = os.fstat(file.fileno()).st_ino
        rewrite(writer, second / "file", B)
        drop_caches()
        assert content(first / "file") == B
        status = os.fstat(file.fileno())
        assert (status.st_ino, status.st_size) == (number, len(A))
        assert file.read() == A


# Freshness.

SHARE = mmap.PAGESIZE


def replace_through(base: Path) -> str:
    """Code that writes version n under `base`/file in one step; on a mount a plain rewrite does it."""
    if base.name == "backing":
        return "t = base + '/new'; open(t, 'wb').write(data); os.replace(t, base + '/file')"
    return "open(base + '/file', 'wb').write(data)"


@pytest.mark.parametrize("where", ["same-node", "other-node", "below"])
def test_open_is_never_stale(where: str, nodes: Nodes, tmp_path: Path, writer: Actor, stranger: Actor) -> None:
    """Each open gives the last completed version or a newer one, whole, however often the name was looked up before
    and wherever the version came from."""
    first, second = nodes
    base = {"same-node": first.path, "other-node": second.path, "below": first.backing}[where]
    (first.backing / "file").write_bytes(struct.pack("<Q", 0) * 500)
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(SHARE))
    for party in (writer, stranger):
        # Numbers that are stored at once; struct.pack_into clears them first, and the other would read less in between.
        party("share = memoryview(mmap.mmap(os.open(p, os.O_RDWR), 4096)).cast('Q')", p=str(shared))
    writer(
        f"def run(base, count):\n"
        f"    for n in range(1, count + 1):\n"
        f"        data = struct.pack('<Q', n) * 500\n"
        f"        {replace_through(base)}\n"
        f"        share[0] = n\n"
        # A writer below the mount is so fast that the reader would see a dozen of its versions: it lets each be seen.
        f"        seen, end = share[2], time.monotonic() + 1\n"
        f"        while share[2] == seen and time.monotonic() < end: os.sched_yield()\n"
        f"    share[1] = 1\n"
    )
    stranger(
        "def run(p):\n"
        "    bad, opens, changes, last = [], 0, 0, 0\n"
        "    while not share[1]:\n"
        "        least = share[0]\n"
        "        try:\n"
        "            fd = os.open(p, os.O_RDONLY)\n"
        "            data = os.read(fd, 1 << 20); os.close(fd)\n"
        "        except OSError as error:\n"
        "            bad.append(str(error)); continue\n"
        "        found = struct.unpack_from('<Q', data)[0] if len(data) == 4000 else -1\n"
        "        opens += 1; changes += found != last; last = found\n"
        "        share[2] = opens\n"
        "        if found < least or data != data[:8] * 500: bad.append((found, least, len(data)))\n"
        "    return bad, opens, changes\n"
    )
    stranger.start("run(p)", p=str(first / "file"))
    writer("run(base, 400)", base=str(base))
    bad, opens, changes = stranger.result()
    assert not bad, bad[:5]
    assert opens > 100 and changes > 20, f"nothing was raced: {opens} opens, {changes} changes"


def create_on_other_node(nodes: Nodes, name: str) -> None:
    (nodes[1] / name).write_bytes(A)


def create_below(nodes: Nodes, name: str) -> None:
    (nodes[0].backing / name).write_bytes(A)


def create_directory(nodes: Nodes, name: str) -> None:
    (nodes[1] / name).mkdir()


def create_by_rename(nodes: Nodes, name: str) -> None:
    (nodes[1] / "temporary").write_bytes(A)
    (nodes[1] / "temporary").rename(nodes[1] / name)


def create_symlink(nodes: Nodes, name: str) -> None:
    (nodes[1] / name).symlink_to("x")


CREATORS: dict[str, Callable[[Nodes, str], None]] = {
    "file": create_on_other_node,
    "below": create_below,
    "directory": create_directory,
    "rename": create_by_rename,
    "symlink": create_symlink,
}


@pytest.mark.parametrize("how", CREATORS)
def test_a_missing_name_is_asked_again(how: str, nodes: Nodes, stranger: Actor) -> None:
    """A name that was just looked up in vain is there at once when another node, or the directory below, has it."""
    for number in range(20):
        name = f"name{number}"
        for _ in range(3):
            assert stranger.errno("os.lstat(p)", p=str(nodes[0] / name)) == errno.ENOENT
        CREATORS[how](nodes, name)
        assert stranger.errno("os.lstat(p)", p=str(nodes[0] / name)) == 0
        assert name in stranger("os.listdir(p)", p=str(nodes[0].path))


def test_removed_names_are_gone_at_once(nodes: Nodes, stranger: Actor) -> None:
    """A file or directory that another node removed cannot be opened any more."""
    first, second = nodes
    for number in range(20):
        (first / f"f{number}").write_bytes(A)
        assert stranger.read(first / f"f{number}") == A
        (second / f"f{number}").unlink()
        assert stranger.errno("os.open(p, os.O_RDONLY)", p=str(first / f"f{number}")) == errno.ENOENT


def test_execution_is_never_stale(nodes: Nodes, stranger: Actor) -> None:
    """execve runs the version that was published last."""
    first, second = nodes
    for number in range(15):
        (second / "prog").write_bytes(b"#!/bin/sh\necho %d\n" % number)
        (second / "prog").chmod(0o755)
        assert stranger("subprocess.check_output([p])", p=str(first / "prog")) == b"%d\n" % number


def test_a_binary_can_be_replaced_while_it_runs(nodes: Nodes, stranger: Actor) -> None:
    """Rewriting a program that is running, which is ETXTBSY elsewhere, leaves the running one alone."""
    first, second = nodes
    shutil.copy("/bin/cat", first / "prog")
    stranger(
        "child = subprocess.Popen([p], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "child.stdin.write(b'x'); child.stdin.flush(); child.stdout.read(1)",
        p=str(first / "prog"),
    )
    shutil.copy("/bin/true", second / "prog")
    assert stranger("child.communicate(b'still here')[0]") == b"still here"
    assert stranger("subprocess.run([p]).returncode", p=str(first / "prog")) == 0


# A daemon that is killed.


def kill_daemon(mount: Mount) -> None:
    """kill -9 of the daemon, and the dead mount taken away."""
    mount.process.kill()
    mount.process.wait(30)
    subprocess.run(["umount", "-l", mount.path], check=True, timeout=30)


def unpublished(backing: Path) -> list[str]:
    """Hidden files in the backing directory outside safefs's own state."""
    found = []
    for directory, directories, names in os.walk(backing):
        if Path(directory) == backing and ".safefs" in directories:
            directories.remove(".safefs")
        found += [os.path.relpath(os.path.join(directory, name), backing) for name in names]
    return sorted(found)


def test_leftovers_of_a_killed_daemon_are_cleaned(make_mount: MountFactory, backing: Path) -> None:
    """kill -9 of the daemon leaves hidden drafts; the next daemon clears them away, and touches neither published
    files nor the drafts of a daemon that lives."""
    dead, alive = make_mount("-o", "temp=hidden"), make_mount("-o", "temp=hidden")
    (dead / "dir").mkdir()
    (dead / "published").write_bytes(A)
    with actor() as survivor, actor() as victim:
        kept = survivor.open(alive / "dir" / "kept", CREATE)
        survivor.write(kept, B)
        for name in ("one", "two"):
            victim.write(victim.open(dead / "dir" / name, CREATE), A)
        hidden = unpublished(backing)
        assert len(hidden) == 4, f"the kill left nothing to clean: {hidden}"
        kill_daemon(dead)
        assert len(unpublished(backing)) == 4
        successor = make_mount("-o", "temp=hidden")
        assert wait_until(lambda: len(unpublished(backing)) == 2), unpublished(backing)
        assert content(successor / "published") == A
        assert content(alive / "dir" / "kept") is None
        survivor.write(kept, A)
        survivor.closefd(kept)
        assert content(successor / "dir" / "kept") == B + A
    assert unpublished(backing) == ["dir/kept", "published"]


def test_nothing_unfinished_after_a_killed_daemon(make_mount: MountFactory, backing: Path, writer: Actor) -> None:
    """A draft whose daemon was killed is published by nobody, whatever its writer does then."""
    dead = make_mount()
    (dead / "file").write_bytes(B)
    fd = writer.open(dead / "file", CREATE)
    writer.write(fd, A)
    kill_daemon(dead)
    assert dead.process.poll() is not None
    writer.errno("os.write(fd, b'x')", fd=fd)  # the kernel may still write to the draft by itself
    writer.errno("os.close(fd)", fd=fd)
    assert content(backing / "file") == B
    assert content(make_mount() / "file") == B
