"""Opening for write: each way to open a file, who sees the draft, and what readers of the version see (nothing new)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mount.actors import Actor, actor
from tests.mount.conftest import both_temps, both_temps_exact
from tests.mount.places import A, B, content, in_quarantine, leftovers, quarantined
from tests.support.mounting import Mount, status, wait_until

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
OLD = b"0123456789" * 2000
NEW = b"NEW!"

# How a file is opened, and what it holds when 4 bytes were written through that.
KINDS: dict[str, tuple[int, bytes]] = {
    "write": (os.O_WRONLY, NEW + OLD[4:]),
    "read-write": (os.O_RDWR, NEW + OLD[4:]),
    "append": (os.O_WRONLY | os.O_APPEND, OLD + NEW),
    "read-append": (os.O_RDWR | os.O_APPEND, OLD + NEW),
    "truncate": (os.O_WRONLY | os.O_TRUNC, NEW),
    "read-write-truncate": (os.O_RDWR | os.O_TRUNC, NEW),
    "create": (os.O_WRONLY | os.O_CREAT, NEW + OLD[4:]),
    "create-truncate": (os.O_RDWR | os.O_CREAT | os.O_TRUNC, NEW),
    "create-append": (os.O_WRONLY | os.O_CREAT | os.O_APPEND, OLD + NEW),
    "nofollow": (os.O_WRONLY | os.O_NOFOLLOW, NEW + OLD[4:]),
    "sync": (os.O_WRONLY | os.O_SYNC, NEW + OLD[4:]),
}


def hold(reader: Actor, path: Path) -> None:
    """Let `reader` keep the present version open and mapped."""
    reader(
        "held = os.open(p, os.O_RDONLY); view = mmap.mmap(held, 0, prot=mmap.PROT_READ)",
        p=str(path),
    )


def held(reader: Actor) -> tuple[bytes, bytes, int]:
    """What `reader` sees through its descriptor and its mapping, and the size that fstat says."""
    result: tuple[bytes, bytes, int] = reader(
        "(os.pread(held, 1 << 20, 0), view[:], os.fstat(held).st_size)",
    )
    return result


@both_temps
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_open_is_private(kind: str, nodes: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """Whichever way an existing file is opened for write, nobody else sees a change before the close, and who had the
    version open or mapped sees none after it either."""
    flags, expected = KINDS[kind]
    first, second = nodes
    (first / "file").write_bytes(OLD)
    hold(stranger, second / "file")
    with actor() as neighbour:
        hold(neighbour, first / "file")
        fd = writer.open(first / "file", flags)
        writer.write(fd, NEW)
        for reader in (neighbour, stranger):
            assert held(reader) == (OLD, OLD, len(OLD))
        for place in (first.path, second.path, first.backing):
            assert content(place / "file") == OLD
            assert os.stat(place / "file").st_size == len(OLD)
        assert writer("os.fstat(fd).st_size", fd=fd) == len(expected)
        assert writer.read(first / "file") == expected
        writer.closefd(fd)
        for place in (first.path, second.path, first.backing):
            assert content(place / "file") == expected
        for reader in (neighbour, stranger):
            assert held(reader) == (OLD, OLD, len(OLD))


@pytest.mark.parametrize("kind", KINDS)
def test_control_a_write_open_of_the_bare_file(kind: str, tmp_path: Path, writer: Actor, stranger: Actor) -> None:
    """Without safefs the reader's view changes under it."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    stranger("held = os.open(p, os.O_RDONLY)", p=str(path))
    fd = writer.open(path, KINDS[kind][0])
    writer.write(fd, NEW)
    assert stranger("os.pread(held, 1 << 20, 0)") != OLD


def test_read_only_truncation_is_a_write_open(mount: Mount, writer: Actor, stranger: Actor) -> None:
    """O_RDONLY|O_TRUNC empties the file: for others only with the close."""
    (mount / "file").write_bytes(OLD)
    hold(stranger, mount / "file")
    fd = writer.open(mount / "file", os.O_RDONLY | os.O_TRUNC)
    assert content(mount / "file") == OLD
    writer.closefd(fd)
    assert content(mount / "file") == b""
    assert held(stranger) == (OLD, OLD, len(OLD))


PATHS = {
    "absolute": "open_at('{mount}/dir/file')",
    "relative": "open_at('dir/file')",
    "dots": "open_at('dir/../dir/./file')",
    "symlink": "open_at('link')",
    "symlinked-directory": "open_at('dirlink/file')",
    "descriptor": "open_at('file', dir_fd=os.open('dir', os.O_RDONLY))",
    "path-descriptor": "open_at('file', dir_fd=os.open('dir', os.O_PATH))",
}


@pytest.mark.parametrize("flags", [os.O_RDWR, CREATE, os.O_WRONLY | os.O_APPEND])
@pytest.mark.parametrize("way", PATHS)
def test_every_way_to_name_the_file(way: str, flags: int, mount: Mount, writer: Actor, stranger: Actor) -> None:
    """Absolute, relative, through symlinks or a directory's descriptor: it is a draft, and close publishes it."""
    (mount / "dir").mkdir()
    (mount / "dir" / "file").write_bytes(OLD)
    (mount / "link").symlink_to("dir/file")
    (mount / "dirlink").symlink_to("dir")
    hold(stranger, mount / "dir" / "file")
    writer(
        "os.chdir(base)\ndef open_at(path, **options): return os.open(path, flags, 0o644, **options)\n",
        base=str(mount.path),
        flags=flags,
    )
    fd = writer(PATHS[way].format(mount=mount.path))
    writer.write(fd, NEW)
    assert content(mount / "dir" / "file") == OLD
    writer.closefd(fd)
    writer("os.chdir('/')")
    data = content(mount / "dir" / "file")
    assert data is not None and NEW in data and data != OLD
    assert held(stranger) == (OLD, OLD, len(OLD))


@both_temps
def test_a_new_file_exists_for_its_family_only(nodes: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """The opener, its children and theirs find the draft under its name; on both nodes everybody else gets ENOENT."""
    first, second = nodes
    path = first / "file"
    before = writer.fork()
    fd = writer.open(path, CREATE)
    writer.write(fd, A)
    child = writer.fork()
    grandchild = child.fork()
    for relative in (writer, before, child, grandchild):
        assert relative.read(path) == A
        assert relative("os.stat(p).st_size", p=str(path)) == len(A)
    assert writer("subprocess.check_output(['/bin/cat', p])", p=str(path)) == A
    for place in (first.path, second.path, first.backing):
        for code in ("os.stat(p)", "os.open(p, os.O_RDONLY)", "os.chmod(p, 0o600)", "os.unlink(p)", "os.rename(p, q)"):
            names = {"p": str(place / "file"), "q": str(place / "other")}
            assert stranger.errno(code, **names) == errno.ENOENT, code
        assert "file" not in os.listdir(place)
    grandchild.exit()
    child.exit()
    before.exit()
    writer.closefd(fd)
    assert stranger.read(second / "file") == A


def test_control_a_new_bare_file_is_there_for_all(tmp_path: Path, writer: Actor, stranger: Actor) -> None:
    """Without safefs a stranger opens the empty file."""
    writer.open(tmp_path / "file", CREATE)
    assert stranger.read(tmp_path / "file") == b""


def test_the_family_sees_its_draft_over_the_version(mount: Mount, writer: Actor, stranger: Actor) -> None:
    """Over an existing file the family sees the draft by name, all others the version, each with its own size."""
    (mount / "file").write_bytes(OLD)
    fd = writer.open(mount / "file", CREATE)
    writer.write(fd, B)
    child = writer.fork()
    assert writer.read(mount / "file") == child.read(mount / "file") == B
    assert stranger.read(mount / "file") == OLD
    for _ in range(20):
        assert writer("os.stat(p).st_size", p=str(mount / "file")) == len(B)
        assert stranger("os.stat(p).st_size", p=str(mount / "file")) == len(OLD)
    child.exit()
    writer.closefd(fd)
    assert stranger.read(mount / "file") == B


@both_temps
def test_a_family_shares_one_draft(nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """Several opens for write by one process and its child are one draft, published with the last of them."""
    path = nodes[0] / "file"
    one = writer.open(path, CREATE)
    writer("os.pwrite(fd, b'1' * 10, 0)", fd=one)
    two = writer.open(path, os.O_RDWR)
    writer("os.pwrite(fd, b'2' * 10, 10)", fd=two)
    child = writer.fork()
    three = child.open(path, os.O_WRONLY)
    child("os.pwrite(fd, b'3' * 10, 20)", fd=three)
    assert writer("os.fstat(one).st_ino == os.fstat(two).st_ino", one=one, two=two)
    assert writer.read(path) == b"1" * 10 + b"2" * 10 + b"3" * 10
    writer.closefd(one)
    assert content(path) is None
    child.exit()
    assert content(path) is None
    writer.closefd(two)
    for node in nodes:
        assert wait_until(lambda node=node: content(node / "file") == b"1" * 10 + b"2" * 10 + b"3" * 10)


def test_out_of_order_pieces_through_many_handles(mount: Mount, writer: Actor) -> None:
    """A downloader that opens its target once per piece, in any order and by several threads, makes one file."""
    writer(
        "def piece(n):\n"
        "    with open(p, 'r+b', 0) as f: f.seek(n * 5000); f.write(b'%d' % n * 5000)\n"
        "base = open(p, 'wb', 0)\n"
        "threads = [threading.Thread(target=piece, args=(n,)) for n in (3, 0, 7, 5, 1, 2, 6, 4)]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()\n",
        p=str(mount / "file"),
    )
    assert content(mount / "file") is None
    writer("base.close()")
    assert content(mount / "file") == b"".join(b"%d" % n * 5000 for n in range(8))


OPEN_AT_ONCE = """
def piece(n):
    ready.wait()
    fd = os.open(p, flags)
    os.pwrite(fd, b'%d' % n * 5000, n * 5000)
    ready.wait()
    os.close(fd)
for turn in range(turns):
    with open(p, 'wb') as file: file.write(b'-' * 40000)
    ready = threading.Barrier(8)
    threads = [threading.Thread(target=piece, args=(n,)) for n in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    with open(p, 'rb') as file: assert file.read() == b''.join(b'%d' % n * 5000 for n in range(8)), turn
"""


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_CREAT])
def test_threads_that_open_at_once_share_one_draft(flags: int, mount: Mount, writer: Actor) -> None:
    """Also where none of them finds the draft of another: what each wrote is there once all have closed."""
    writer(OPEN_AT_ONCE, p=str(mount / "file"), flags=flags, turns=10)
    assert not any(quarantined(mount.backing))
    assert wait_until(lambda: status(mount)["drafts"] == 0)


@both_temps
def test_strangers_have_drafts_of_their_own(nodes: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """Two processes write one name, on one node or two: nothing is mixed, and the last complete close wins."""
    for other in nodes:
        one = writer.open(nodes[0] / "file", CREATE)
        two = stranger.open(other / "file", CREATE)
        writer.write(one, A)
        stranger.write(two, B)
        assert writer.read(nodes[0] / "file") == A
        assert stranger.read(other / "file") == B
        stranger.closefd(two)
        assert content(nodes[0] / "file") == content(nodes[1] / "file") == B
        assert writer.read(nodes[0] / "file") == A
        writer.closefd(one)
        assert content(nodes[0] / "file") == content(nodes[1] / "file") == A
        (nodes[0] / "file").unlink()


def test_control_strangers_mix_in_the_bare_file(tmp_path: Path, writer: Actor, stranger: Actor) -> None:
    """Without safefs the two writers' bytes end up in one file."""
    one, two = writer.open(tmp_path / "file", CREATE), stranger.open(tmp_path / "file", CREATE)
    writer.write(one, A + A)
    stranger.write(two, B)
    writer.closefd(one)
    stranger.closefd(two)
    assert content(tmp_path / "file") == B + A


def test_a_stranger_that_reads_gets_the_version(mount: Mount, writer: Actor, stranger: Actor) -> None:
    """An open for read by another process is an open of the version, before, during and after a draft."""
    (mount / "file").write_bytes(OLD)
    fd = writer.open(mount / "file", CREATE)
    writer.write(fd, A)
    reading = stranger.open(mount / "file", os.O_RDONLY)
    writer.closefd(fd)
    assert stranger("os.read(fd, 1 << 20)", fd=reading) == OLD
    assert stranger.read(mount / "file") == A


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_WRONLY | os.O_CREAT], ids=["w", "rw", "a", "c"]
)
def test_a_clean_write_open_publishes_nothing(flags: int, nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """Opened for write, not written: the version stays, with inode number and times, on both nodes and below."""
    first, second = nodes
    (first / "file").write_bytes(OLD)
    places = (first.path, second.path, first.backing)
    before = [os.stat(place / "file") for place in places]
    fd = writer.open(first / "file", flags)
    if flags & os.O_RDWR:
        assert writer("os.pread(fd, 1 << 20, 0)", fd=fd) == OLD
    writer.closefd(fd)
    after = [os.stat(place / "file") for place in places]
    assert [(s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for s in before] == [
        (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for s in after
    ]


def test_truncating_and_creating_are_changes(mount: Mount, writer: Actor) -> None:
    """O_TRUNC of a file and O_CREAT of a missing one publish although nothing was written."""
    (mount / "file").write_bytes(OLD)
    writer.closefd(writer.open(mount / "file", os.O_WRONLY | os.O_TRUNC))
    assert content(mount / "file") == b""
    writer.closefd(writer.open(mount / "new", os.O_WRONLY | os.O_CREAT))
    assert content(mount / "new") == b""


@both_temps
def test_writing_into_a_big_file_copies_once(nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """A non-truncating open of a big file: reads before the first write work, then all but the change is kept."""
    first, second = nodes
    data = os.urandom(1 << 20) * 48
    (first / "file").write_bytes(data)
    fd = writer.open(first / "file", os.O_RDWR)
    assert writer("os.pread(fd, 100, 30 << 20)", fd=fd) == data[30 << 20 :][:100]
    writer("os.pwrite(fd, b'changed', 20 << 20)", fd=fd)
    assert writer("os.pread(fd, 100, 30 << 20)", fd=fd) == data[30 << 20 :][:100]
    assert content(second / "file") == data
    writer.closefd(fd)
    assert content(second / "file") == data[: 20 << 20] + b"changed" + data[(20 << 20) + 7 :]


@both_temps_exact
def test_truncate_by_path(nodes: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """truncate(2) has published when it returns; who held the version sees no change of size."""
    first, second = nodes
    (first / "file").write_bytes(OLD)
    hold(stranger, second / "file")
    for size in (10, 100, 0):
        writer("os.truncate(p, size)", p=str(first / "file"), size=size)
        for place in (first.path, second.path, first.backing):
            assert os.stat(place / "file").st_size == size
    assert held(stranger) == (OLD, OLD, len(OLD))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
@pytest.mark.parametrize("kind", [os.O_RDONLY, os.O_PATH])
def test_a_version_is_never_written_through_a_magic_link(
    kind: int, flags: int, mount: Mount, writer: Actor, stranger: Actor
) -> None:
    """An open for write of /proc/self/fd/N, which names an inode and not a path: refused, or private."""
    (mount / "file").write_bytes(OLD)
    hold(stranger, mount / "file")
    fd = writer.open(mount / "file", kind)
    problem = writer.errno("again = os.open('/proc/self/fd/%d' % fd, flags)", fd=fd, flags=flags)
    assert problem in (0, errno.ETXTBSY)
    if not problem:
        writer("os.write(again, b'NEW!'); os.close(again)")
    assert held(stranger) == (OLD, OLD, len(OLD))
    assert (mount.backing / "file").read_bytes() in (OLD, NEW + OLD[4:], NEW, OLD + NEW)


def test_a_draft_can_be_opened_again_through_its_descriptor(mount: Mount, writer: Actor) -> None:
    """`cmd > /dev/stdout` in a redirected shell: the draft is opened again, and it is the same one."""
    fd = writer.open(mount / "file", CREATE)
    writer.write(fd, A)
    writer("again = os.open('/proc/self/fd/%d' % fd, os.O_WRONLY | os.O_APPEND); os.write(again, data)", fd=fd, data=B)
    writer("os.close(again)")
    assert content(mount / "file") is None
    writer.closefd(fd)
    assert content(mount / "file") == A + B


def test_shell_redirection_through_dev_stdout(mount: Mount) -> None:
    """The shell's form of the same."""
    subprocess.run(["bash", "-c", f"{{ echo one; echo two >> /dev/stdout; }} > {mount / 'file'}"], check=True)
    assert content(mount / "file") == b"one\ntwo\n"


@both_temps
def test_exclusive_creation_claims_the_name(nodes: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """While an O_EXCL draft lives nobody else of the node can create the name exclusively, though it is not there."""
    path = nodes[0] / "file"
    exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    fd = writer.open(path, exclusive)
    for party in (writer, stranger):
        assert party.errno("os.open(p, flags)", p=str(path), flags=exclusive) == errno.EEXIST
    assert stranger.errno("os.stat(p)", p=str(path)) == errno.ENOENT
    writer.write(fd, A)
    writer.closefd(fd)
    for node in nodes:
        assert stranger.errno("os.open(p, flags)", p=str(node / "file"), flags=exclusive) == errno.EEXIST
    assert content(nodes[1] / "file") == A


@pytest.mark.parametrize("end", ["unlink", "kill"])
def test_a_claim_ends_with_its_draft(end: str, mount: Mount, writer: Actor, stranger: Actor) -> None:
    """A claim whose draft was unlinked, or whose writer was killed, no longer stands in the way."""
    path, exclusive = mount / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY
    fd = writer.open(path, exclusive)
    if end == "unlink":
        writer("os.unlink(p)", p=str(path))
        writer.closefd(fd)
    else:
        writer.kill(signal.SIGKILL)
    assert wait_until(lambda: stranger.errno("fd = os.open(p, flags)", p=str(path), flags=exclusive) == 0)
    stranger("os.write(fd, b'mine'); os.close(fd)")
    assert content(path) == b"mine"


def test_exclusive_creation_has_one_winner(mount: Mount) -> None:
    """Of eight processes that create one name exclusively at once, one wins, 30 times."""
    code = (
        "import os,sys\n"
        "sys.stdin.readline()\n"
        "wins = 0\n"
        "for n in range(30):\n"
        "    try: fd = os.open(f'{sys.argv[1]}/{n}', os.O_CREAT | os.O_EXCL | os.O_WRONLY)\n"
        "    except FileExistsError: continue\n"
        "    os.write(fd, b'%d' % os.getpid()); os.close(fd); wins += 1\n"
        "print(wins)\n"
    )
    processes = [
        subprocess.Popen(
            ["/usr/bin/python3", "-ISc", code, mount.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    wins = [int(process.communicate("go\n", timeout=60)[0]) for process in processes]
    assert sum(wins) == 30, wins
    assert len(os.listdir(mount.path)) == 30


@both_temps
def test_exclusive_publish_replaces_nothing(nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """A name that came up below the mount, or on another node, while an O_EXCL draft was open is not replaced."""
    first, _ = nodes
    fd = writer.open(first / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    writer.write(fd, A)
    (first.backing / "file").write_bytes(B)
    assert writer.errno("os.close(fd)", fd=fd) != 0
    assert content(first / "file") == content(first.backing / "file") == B
    assert in_quarantine(first.backing, lambda data: data == A)
    assert not leftovers(first.backing)


def test_read_only_creation_is_at_once(nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """O_RDONLY|O_CREAT creates the empty file for everybody, as flock(1) needs."""
    fd = writer.open(nodes[0] / "file", os.O_RDONLY | os.O_CREAT)
    for place in (nodes[0].path, nodes[1].path, nodes[0].backing):
        assert content(place / "file") == b""
    writer.closefd(fd)
    subprocess.run(["flock", nodes[0] / "other", "-c", "true"], check=True, timeout=30)
    assert content(nodes[1] / "other") == b""


def test_readers_never_change_over_many_rewrites(nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """Forty versions, each held open and mapped by a reader: at the end every reader still has its own, whole."""
    first, second = nodes
    with actor() as reader:
        reader("kept = []")
        for number in range(40):
            data = b"%04d" % number * (500 + 37 * number)
            writer("f = open(p, mode, 0); f.write(d); f.close()", p=str(first / "file"), mode="wb", d=data)
            reader(
                "fd = os.open(p, os.O_RDONLY); kept.append((fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ)))",
                p=str((first, second)[number % 2] / "file"),
            )
        views = reader("[(os.pread(fd, 1 << 20, 0), view[:], os.fstat(fd).st_size) for fd, view in kept]")
        for number, (read, mapped, size) in enumerate(views):
            data = b"%04d" % number * (500 + 37 * number)
            assert (read, mapped, size) == (data, data, len(data)), number


def test_permission_to_write_is_checked(mount: Mount) -> None:
    """A user who may read a file and not write it gets EACCES from open, not from close; nothing is staged."""
    mount.path.chmod(0o755)
    (mount / "file").write_bytes(OLD)
    with actor(uid=61001, cwd=mount.path) as user:
        for flags in (os.O_WRONLY, os.O_RDWR, CREATE):
            assert user.errno("os.open('file', flags)", flags=flags) == errno.EACCES
        assert user.errno("os.open('new', flags)", flags=CREATE) == errno.EACCES
        assert user.errno("os.truncate('file', 0)") == errno.EACCES
    assert content(mount / "file") == OLD
    assert not leftovers(mount.backing) and not list(quarantined(mount.backing))


def test_a_full_write_error_is_not_published(mount: Mount, writer: Actor) -> None:
    """A write that failed on the handle (here at the process's file size limit) makes the close fail or keeps the
    short file out: the kernel stops the write, so what counts is what the program was told."""
    writer("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)")
    writer("resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))")
    fd = writer.open(mount / "file", CREATE)
    assert writer("os.write(fd, b'x' * 8192)", fd=fd) == 4096
    assert writer.errno("os.write(fd, b'x')", fd=fd) == errno.EFBIG
    writer.closefd(fd)
    # The limit is the caller's, seen by the kernel before the daemon: POSIX lets the 4096 bytes stand.
    assert content(mount / "file") == b"x" * 4096


@both_temps
def test_hidden_files_are_not_shown(nodes: tuple[Mount, Mount], writer: Actor, stranger: Actor) -> None:
    """Whatever safefs keeps in the backing directory has no name on a mount: not listed, not found, not in the way of
    rmdir."""
    first, second = nodes
    (first / "dir").mkdir()
    fd = writer.open(first / "dir" / "file", CREATE)
    writer.write(fd, A)
    below = os.listdir(first.backing / "dir")
    for node in nodes:
        assert os.listdir(node / "dir") == []
        assert os.listdir(node.path) == ["dir"]
        for name in [*below, "../.safefs"]:
            assert stranger.errno("os.stat(p)", p=str(node / "dir" / name)) == errno.ENOENT
    assert writer("[n for n in os.listdir(p) if n != 'file']", p=str(first / "dir")) == []
    writer.closefd(fd)
    assert os.listdir(second / "dir") == ["file"]
    assert os.listdir(first.backing / "dir") == ["file"]


def test_control_hidden_temps_do_exist_below(make_mount: object, nodes: tuple[Mount, Mount], writer: Actor) -> None:
    """With `-o temp=hidden` there is a file below to be hidden: else the test above says nothing."""
    node = make_mount("-o", "temp=hidden")  # type: ignore[operator]
    fd = writer.open(node / "file", CREATE)
    writer.write(fd, A)
    assert [name for name in os.listdir(node.backing) if name != ".safefs"] != []
    writer.closefd(fd)
    assert [name for name in os.listdir(node.backing) if name != ".safefs"] == ["file"]
