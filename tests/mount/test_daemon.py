"""The daemon itself: how it starts and ends, what it does when its backing hangs, and that it stays small."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.mount.actors import Actor, actor
from tests.mount.places import A, B, content, in_quarantine, leftovers
from tests.support.mounting import Mount, safefs, safefs_command, status, wait_until

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
MANY_OPENS = int(os.environ.get("SAFEFS_MANY_OPENS", "20000"))
END_SECONDS = 60


def is_mounted(path: Path) -> bool:
    with open("/proc/self/mountinfo") as lines:
        return any(line.split()[4] == str(path) for line in lines)


# Ending.


def by_umount(mount: Mount) -> None:
    subprocess.run(["umount", mount.path], check=True, timeout=END_SECONDS)


def by_fusermount(mount: Mount) -> None:
    subprocess.run(["fusermount3", "-u", mount.path], check=True, timeout=END_SECONDS)


def by_safefs(mount: Mount) -> None:
    done = safefs("umount", mount.path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert mount.process.poll() is not None or wait_until(lambda: mount.process.poll() is not None, 1), (
        "safefs umount returned before its daemon had ended"
    )


def by_sigterm(mount: Mount) -> None:
    mount.process.send_signal(signal.SIGTERM)


def by_sigint(mount: Mount) -> None:
    mount.process.send_signal(signal.SIGINT)


def by_lazy_umount(mount: Mount) -> None:
    subprocess.run(["umount", "-l", mount.path], check=True, timeout=END_SECONDS)


ENDINGS = {
    "umount": by_umount,
    "fusermount3": by_fusermount,
    "safefs": by_safefs,
    "SIGTERM": by_sigterm,
    "SIGINT": by_sigint,
    "umount-l": by_lazy_umount,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_in_order(ending: str, make_mount: MountFactory) -> None:
    """However it is ended: exit 0, the mount is gone, what was published is there, and it can be mounted again."""
    mount = make_mount()
    (mount / "file").write_bytes(A)
    ENDINGS[ending](mount)
    assert mount.process.wait(END_SECONDS) == 0
    assert not mount.is_mounted()
    assert content(mount.backing / "file") == A
    assert not leftovers(mount.backing)
    again = make_mount()
    assert content(again / "file") == A


@pytest.mark.parametrize("temp", ["auto", "hidden"])
def test_sigterm_keeps_open_drafts(temp: str, make_mount: MountFactory) -> None:
    """A draft that is open at shutdown is not published and not lost; one that nobody wrote to leaves nothing."""
    mount = make_mount("-o", f"temp={temp}")
    (mount / "old").write_bytes(B)
    (mount / "read").write_bytes(B)
    with actor() as writer:
        writer.open(mount / "read", os.O_RDWR)
        for name in ("new", "old"):
            writer.write(writer.open(mount / name, CREATE), A)
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(END_SECONDS) == 0
        assert not mount.is_mounted()
    assert content(mount.backing / "new") is None
    assert content(mount.backing / "old") == B
    assert in_quarantine(mount.backing, lambda data: data == A)
    assert not leftovers(mount.backing)


def test_sigterm_waits_for_publishes(make_mount: MountFactory) -> None:
    """A close that was under way when SIGTERM came either says that it failed, or its file is there, whole."""
    mount = make_mount()
    outcomes = []
    with actor() as writer:
        # By a descriptor of the mount's root: once unmounted, the path would show the directory below.
        writer(
            "def work(root):\n"
            "    done = []\n"
            "    try:\n"
            "        for n in range(100000):\n"
            "            fd = os.open(str(n), os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=root)\n"
            "            os.write(fd, b'x' * 300000); os.close(fd); done.append(n)\n"
            "    except OSError as error: return done, error.errno\n"
        )
        writer("root = os.open(path, os.O_DIRECTORY)", path=str(mount.path))
        writer.start("work(root)")
        assert wait_until(lambda: len(os.listdir(mount.backing)) > 20)
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(END_SECONDS) == 0
        outcomes, problem = writer.result()
    assert len(outcomes) > 5 and problem
    for number in outcomes:
        assert (mount.backing / str(number)).stat().st_size == 300_000
    for name in os.listdir(mount.backing):
        assert name == ".safefs" or (mount.backing / name).stat().st_size == 300_000, name


def test_sigterm_ends_the_wait_for_a_lock(make_mount: MountFactory) -> None:
    """And who waits does not keep the daemon from ending."""
    mount = make_mount()
    (mount / "file").write_bytes(A)
    with actor() as holder, actor() as waiter:
        for each in (holder, waiter):
            each("import fcntl; opened = open(p, 'rb')", p=str(mount / "file"))
        holder("fcntl.flock(opened, fcntl.LOCK_EX)")
        waiter.start("fcntl.flock(opened, fcntl.LOCK_EX)")
        with pytest.raises(AssertionError, match="did not answer"):
            waiter.result(0.2)
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(END_SECONDS) == 0
        with pytest.raises(OSError):  # which one is left to the kernel
            waiter.result(END_SECONDS)


def test_a_busy_mount_stays(make_mount: MountFactory) -> None:
    """umount of a mount in use says busy and changes nothing; the draft goes on."""
    mount = make_mount()
    with actor() as writer:
        fd = writer.open(mount / "file", CREATE)
        writer.write(fd, A)
        done = subprocess.run(["umount", mount.path], capture_output=True, text=True, timeout=END_SECONDS)
        assert done.returncode != 0 and "busy" in done.stderr
        done = safefs("umount", mount.path)
        assert done.returncode != 0 and "busy" in done.stderr and len(done.stderr.splitlines()) == 1
        writer.write(fd, B)
        writer.closefd(fd)
        assert content(mount / "file") == A + B


def test_lazy_umount_with_an_open_draft(make_mount: MountFactory) -> None:
    """umount -l takes the name away; the open file works on and is published by its close, then the daemon ends."""
    mount = make_mount()
    with actor() as writer:
        fd = writer.open(mount / "file", CREATE)
        writer.write(fd, A)
        by_lazy_umount(mount)
        writer.write(fd, B)
        assert writer.errno("os.close(fd)", fd=fd) == 0
        assert mount.process.wait(END_SECONDS) == 0
    assert content(mount.backing / "file") == A + B


# Starting.


def test_in_the_background(backing: Path, tmp_path: Path) -> None:
    """Without --foreground the command returns 0 when the mount is live; status shows it; umount ends it."""
    target, log = tmp_path / "mnt", tmp_path / "log"
    target.mkdir()
    done = safefs("mount", backing, target, "--log-file", log)
    try:
        assert (done.returncode, done.stderr) == (0, "")
        (target / "file").write_bytes(A)
        assert content(backing / "file") == A
        status = json.loads(safefs("status", "--json").stdout)
        assert str(target) in json.dumps(status)
        assert str(target) in safefs("status").stdout
    finally:
        ended = safefs("umount", target)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not is_mounted(target)
    assert "Traceback" not in log.read_text()


def test_two_mounts_of_one_directory_in_the_background(backing: Path, tmp_path: Path) -> None:
    """Twice over one backing directory: two nodes on one machine."""
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.mkdir()
    try:
        for target in targets:
            assert safefs("mount", backing, target, "--log-file", tmp_path / "log").returncode == 0
        (targets[0] / "file").write_bytes(A)
        assert content(targets[1] / "file") == A
    finally:
        results = [safefs("umount", target).returncode for target in targets]
    assert results == [0, 0]


WRONG = {
    "no-such-backing": (["{tmp}/none", "{mnt}"], "does not exist"),
    "backing-is-a-file": (["{tmp}/a-file", "{mnt}"], "not a directory"),
    "no-such-mountpoint": (["{backing}", "{tmp}/none"], "does not exist"),
    "mountpoint-is-a-file": (["{backing}", "{tmp}/a-file"], "not a directory"),
    "mountpoint-not-empty": (["{backing}", "{tmp}/full"], "not empty"),
    "same-directory": (["{backing}", "{backing}"], "{backing}"),
    "mountpoint-inside": (["{backing}", "{backing}/inside"], "inside"),
    "backing-inside": (["{tmp}/full/backing", "{tmp}/full"], "{tmp}/full"),
    "unknown-option": (["{backing}", "{mnt}", "-o", "allow_othr"], "allow_othr"),
    "unknown-option-among-others": (["{backing}", "{mnt}", "-o", "rw,nosuid,frobnicate=3"], "frobnicate"),
    "bad-value": (["{backing}", "{mnt}", "-o", "temp=banana"], "banana"),
    "missing-value": (["{backing}", "{mnt}", "-o", "temp"], "temp"),
    "no-such-config": (["{backing}", "{mnt}", "--config", "{tmp}/none.toml"], "none.toml"),
    "bad-config": (["{backing}", "{mnt}", "--config", "{tmp}/a-file"], "a-file"),
}


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_lines(case: str, foreground: bool, backing: Path, tmp_path: Path) -> None:
    """Each is refused with a non-zero status and one line that names what is wrong; nothing is mounted or created."""
    (tmp_path / "a-file").write_text("this = is not [ toml")
    (tmp_path / "full" / "backing").mkdir(parents=True)
    (tmp_path / "mnt").mkdir()
    if case == "mountpoint-inside":
        (backing / "inside").mkdir()
    words = {"tmp": tmp_path, "mnt": tmp_path / "mnt", "backing": backing}
    arguments, fragment = WRONG[case]
    done = safefs(
        "mount", *(argument.format(**words) for argument in arguments), *(["--foreground"] if foreground else [])
    )
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and fragment.format(**words) in lines[0], done.stderr
    assert not is_mounted(tmp_path / "mnt")
    assert os.listdir(backing) == (["inside"] if case == "mountpoint-inside" else [])


def test_already_mounted(mount: Mount) -> None:
    """A second mount on the same mountpoint is refused; the first goes on."""
    done = safefs("mount", mount.backing, mount.path)
    assert done.returncode != 0 and "already mounted" in done.stderr
    (mount / "file").write_bytes(A)
    assert content(mount.backing / "file") == A


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
def test_a_mount_where_the_one_before_has_not_ended(mount: Mount, tmp_path: Path, foreground: bool) -> None:
    """Its daemon still listens: the next is refused with one line, and leaves the mountpoint as it is."""
    with open(mount / "file", "wb") as file:
        file.write(A)
        by_lazy_umount(mount)
        assert not mount.is_mounted() and mount.process.poll() is None
        arguments = ["--log-file", tmp_path / "log", *(["--foreground"] if foreground else [])]
        done = safefs("mount", mount.backing, mount.path, *arguments)
        assert done.returncode != 0
        (line,) = done.stderr.splitlines()
        assert "another daemon serves" in line
        assert not mount.is_mounted() and os.listdir(mount.path) == []
    assert wait_until(lambda: mount.process.poll() is not None)
    assert content(mount.backing / "file") == A


def test_a_start_that_fails_last_leaves_no_mount(backing: Path, tmp_path: Path) -> None:
    """Whoever waits for it cannot be told."""
    (tmp_path / "mnt").mkdir()
    with open("/dev/null") as not_to_be_written:
        command = safefs_command("mount", backing, tmp_path / "mnt", "--foreground", "--ready-fd")
        number = not_to_be_written.fileno()
        done = subprocess.run([*command, str(number)], pass_fds=[number], capture_output=True, timeout=END_SECONDS)
    try:
        assert done.returncode != 0 and b"Bad file descriptor" in done.stderr
        assert not is_mounted(tmp_path / "mnt")
        assert os.listdir(backing / ".safefs/daemons") == []
    finally:
        subprocess.run(["umount", "-q", tmp_path / "mnt"], check=False, timeout=END_SECONDS)


def test_umount_of_what_is_not_mounted(tmp_path: Path) -> None:
    """safefs umount of some directory: one line, non-zero, the directory is left alone."""
    done = safefs("umount", tmp_path)
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1


def test_a_mount_of_a_mount_is_refused(mount: Mount, tmp_path: Path) -> None:
    """The backing directory of a mount must not be a safefs mount itself."""
    (tmp_path / "second").mkdir()
    done = safefs("mount", mount.path, tmp_path / "second")
    assert done.returncode != 0 and not is_mounted(tmp_path / "second")


def test_read_only_mount(make_mount: MountFactory, backing: Path) -> None:
    """-o ro: reading works, every change is EROFS, and the backing directory is not touched."""
    (backing / "file").write_bytes(A)
    mount = make_mount("-o", "ro")
    assert content(mount / "file") == A
    with actor() as user:
        for code in ("open('file', 'wb')", "os.mkdir('d')", "os.unlink('file')", "os.truncate('file', 0)"):
            user("os.chdir(p)", p=str(mount.path))
            assert user.errno(code) == errno.EROFS, code
            user("os.chdir('/')")
    assert os.listdir(backing) == ["file"]


def test_mount_options_reach_the_kernel(make_mount: MountFactory) -> None:
    """Root's mount is nosuid, nodev and for all users; noexec and noatime are taken from -o."""

    def options(mount: Mount) -> set[str]:
        with open("/proc/self/mountinfo") as lines:
            fields = next(line for line in lines if line.split()[4] == str(mount.path)).split()
        return set(fields[5].split(",")) | set(fields[-1].split(",")) | {fields[fields.index("-") + 1]}

    assert {"nosuid", "nodev", "allow_other", "default_permissions", "fuse.safefs"} <= options(make_mount())
    assert {"noexec", "noatime", "nosuid"} <= options(make_mount("-o", "noexec,noatime"))


# Hanging.


@contextmanager
def hanging_underlay(backing: Path, source: Path) -> Iterator[subprocess.Popen[bytes]]:
    """backing/slow is a mount of bindfs, whose daemon the test stops and continues: a backing that hangs."""
    source.mkdir()
    (source / "file").write_bytes(A)
    (source / "dir").mkdir()
    (backing / "slow").mkdir()
    # Attributes and names must not be cached in the kernel, or there would be nothing to wait for.
    options = "attr_timeout=0,entry_timeout=0,negative_timeout=0,ac_attr_timeout=0"
    process = subprocess.Popen(["bindfs", "-f", "-o", options, source, backing / "slow"])
    try:
        assert wait_until(lambda: is_mounted(backing / "slow"))
        yield process
    finally:
        # The mount above still has files of it open, so it would not end by itself.
        process.kill()
        process.wait(20)
        subprocess.run(["umount", "-l", backing / "slow"], check=False)


HANGING = {
    "stat": "os.stat(slow + '/file').st_size",
    "list": "len(os.listdir(slow))",
    "read": "len(open(slow + '/file', 'rb').read())",
    "create": "open(slow + '/new', 'wb').write(b'x')",
    "rewrite": "open(slow + '/file', 'r+b').write(b'x')",
    "mkdir": "os.mkdir(slow + '/made')",
    "rename": "os.rename(slow + '/file', slow + '/renamed')",
    "unlink": "os.unlink(slow + '/file')",
    "chmod": "os.chmod(slow + '/file', 0o600)",
    "statfs": "os.statvfs(slow).f_bsize",
}


@pytest.mark.parametrize("what", HANGING)
def test_a_hanging_backing_operation_stalls_nobody_else(
    what: str, make_mount: MountFactory, backing: Path, tmp_path: Path
) -> None:
    """While one request waits for a backing that hangs, others of the mount are served in their usual time.

    In other directories, that is: the kernel itself holds a directory's lock while it looks up a name there.
    """
    with hanging_underlay(backing, tmp_path / "source") as underlay:
        mount = make_mount()
        (mount / "work").mkdir()
        with actor() as stuck, actor() as lively:
            stuck("slow = p", p=str(mount / "slow"))
            underlay.send_signal(signal.SIGSTOP)
            stuck.start(HANGING[what])
            work = (
                "for n in range(30):\n"
                "    open(base + '/f%d' % n, 'wb').write(b'x' * 100000)\n"
                "    assert len(open(base + '/f%d' % n, 'rb').read()) == 100000\n"
                "    os.mkdir(base + '/d%d' % n); os.rename(base + '/f%d' % n, base + '/d%d/f' % n)\n"
                "    os.listdir(base + '/d%d' % n); os.unlink(base + '/d%d/f' % n); os.rmdir(base + '/d%d' % n)\n"
            )
            begin = time.monotonic()
            lively.start(work, base=str(mount / "work"))
            lively.result(30)
            assert time.monotonic() - begin < 15
            with pytest.raises(AssertionError, match="did not answer"):
                stuck.result(0.2)
            underlay.send_signal(signal.SIGCONT)
            stuck.result(30)


@pytest.mark.parametrize("what", ["mkdir", "write", "rewrite"])
def test_the_end_waits_for_no_request_that_hangs(
    what: str, make_mount: MountFactory, backing: Path, tmp_path: Path
) -> None:
    """And what others have open elsewhere is kept, as ever.  The process itself may have to wait for its threads."""
    with hanging_underlay(backing, tmp_path / "source") as underlay:
        mount = make_mount("-o", "drain_seconds=1,passthrough=off")
        mount.expected_log += ["gave up waiting", "is for the next daemon", "not connected"]
        with actor() as stuck, actor() as writer:
            stuck("slow = p; fd = os.open(slow + '/file', os.O_RDWR)", p=str(mount / "slow"))
            writer.write(writer.open(mount / "open", CREATE), A)
            underlay.send_signal(signal.SIGSTOP)
            stuck.start("os.write(fd, b'x' * (1 << 20))" if what == "write" else HANGING[what])
            with pytest.raises(AssertionError, match="did not answer"):
                stuck.result(0.2)
            mount.process.send_signal(signal.SIGTERM)
            assert wait_until(lambda: "safefs.daemon: unmounted" in mount.log.read_text(), END_SECONDS)
            assert in_quarantine(backing, lambda data: data == A)
            underlay.send_signal(signal.SIGCONT)
            mount.process.wait(END_SECONDS)


def test_many_hanging_operations(make_mount: MountFactory, backing: Path, tmp_path: Path) -> None:
    """Twenty processes that hang in the backing leave room for the others."""
    with hanging_underlay(backing, tmp_path / "source") as underlay:
        mount = make_mount()
        (mount / "work").mkdir()
        stat_it = subprocess.list2cmdline(["stat", str(mount / "slow" / "file")])
        underlay.send_signal(signal.SIGSTOP)
        hanging = [subprocess.Popen(["sh", "-c", f"exec {stat_it}"], stdout=subprocess.DEVNULL) for _ in range(20)]
        with actor() as lively:
            lively.start("open(p, 'wb').write(b'x')", p=str(mount / "work" / "file"))
            lively.result(30)
        assert all(process.poll() is None for process in hanging), "nothing hung"
        underlay.send_signal(signal.SIGCONT)
        assert [process.wait(30) for process in hanging] == [0] * 20


# Staying small.


def resources(mount: Mount) -> tuple[int, int]:
    """Open descriptors and resident KiB of the daemon."""
    descriptors = len(os.listdir(f"/proc/{mount.process.pid}/fd"))
    status = Path(f"/proc/{mount.process.pid}/status").read_text()
    return descriptors, int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))


def test_many_opens(mount: Mount) -> None:
    """20,000 opens for read of 1,000 files (a million with SAFEFS_MANY_OPENS): descriptors and memory stay level."""
    for number in range(1000):
        (mount.backing / f"f{number}").write_bytes(b"x" * 100)
    code = "for n in range(count): os.close(os.open(base + '/f%d' % (n % 1000), os.O_RDONLY))"
    with actor() as one, actor() as two:
        for party in (one, two):
            party(code, count=3000, base=str(mount.path))
        before = resources(mount)
        for party in (one, two):
            party.start(code, count=MANY_OPENS // 2, base=str(mount.path))
        for party in (one, two):
            party.result(60 + MANY_OPENS / 100)
    after = resources(mount)
    assert after[0] <= before[0] + 100
    assert after[1] <= before[1] + 30_000, f"{before} → {after}"


def test_many_rewrites(mount: Mount) -> None:
    """2,000 publishes leave no descriptor, no memory and no file behind."""
    code = "for n in range(count): open(base + '/f%d' % (n % 10), 'wb').write(b'x' * 1000)"
    with actor() as writer:
        writer(code, count=500, base=str(mount.path))
        before = resources(mount)
        writer.start(code, count=2000, base=str(mount.path))
        writer.result(200)
    assert wait_until(lambda: resources(mount)[0] <= before[0] + 20), (before, resources(mount))
    assert resources(mount)[1] <= before[1] + 20_000, (before, resources(mount))
    assert not leftovers(mount.backing)


def test_many_files_with_few_descriptors(make_mount: MountFactory, backing: Path) -> None:
    """With at most 256 descriptors the daemon serves a tree of 5,000 files in 100 directories, read and rewritten."""
    for directory in range(100):
        (backing / f"d{directory}").mkdir()
        for number in range(50):
            (backing / f"d{directory}" / f"f{number}").write_bytes(b"%d" % number)
    mount = make_mount(prefix=["prlimit", "--nofile=256:256"])
    with actor() as user:
        user.start(
            "total = 0\n"
            "for directory, _, names in os.walk(base):\n"
            "    for name in names:\n"
            "        path = os.path.join(directory, name)\n"
            "        os.stat(path); total += len(open(path, 'rb').read())\n"
            "        if name == 'f7': open(path, 'ab').write(b'!')\n",
            base=str(mount.path),
        )
        user.result(200)
        assert user("total") == 100 * (10 + 40 * 2)
    assert content(backing / "d99" / "f7") == b"7!"
    assert resources(mount)[0] <= 256


def test_many_open_files(make_mount: MountFactory, backing: Path) -> None:
    """1,500 files open at once, read and write, by one process each its own: the limit of the daemon is raised."""
    mount = make_mount(prefix=["prlimit", "--nofile=1024:20000"])
    with actor() as user:
        user("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 20000))")
        user.start(
            "fds = [os.open(base + '/f%d' % n, os.O_CREAT | os.O_RDWR) for n in range(1500)]\n"
            "for n, fd in enumerate(fds): os.write(fd, b'%d' % n)\n"
            "for fd in fds: os.close(fd)\n",
            base=str(mount.path),
        )
        user.result(200)
    assert all(content(backing / f"f{number}") == b"%d" % number for number in range(1500))


# A daemon that cannot raise its limit, whoever starts it.
FEW_DESCRIPTORS = ["setpriv", "--bounding-set=-sys_resource", "prlimit", "--nofile=512:512"]
OPEN_ALL_ONE_CAN = """
files = []
try:
    while len(files) < 8000:
        files.append(os.open(base + '/' + name % len(files), flags))
        if data: os.write(files[-1], data)
except OSError as error:
    number = error.errno
"""


@pytest.mark.parametrize(
    ("name", "flags", "data"),
    [
        ("f%d", os.O_CREAT | os.O_RDWR, b"data"),
        ("f%d", os.O_CREAT | os.O_EXCL | os.O_WRONLY, b"data"),
        ("%d.lock", os.O_CREAT | os.O_EXCL | os.O_RDWR, b"data"),
        ("%d.log", os.O_CREAT | os.O_WRONLY, b"data"),
        ("old%d", os.O_RDONLY, b""),
        ("old%d", os.O_RDWR, b"data"),
        ("dir%d", os.O_RDONLY | os.O_DIRECTORY, b""),
    ],
)
def test_open_files_leave_the_daemon_descriptors(
    name: str, flags: int, data: bytes, make_mount: MountFactory, backing: Path
) -> None:
    """More than the daemon can have open: the open fails with ENFILE, what is open is published, and all goes on."""
    if not flags & os.O_CREAT:
        for number in range(600):
            (backing / f"old{number}").write_bytes(b"0123456789")
            (backing / f"dir{number}").mkdir()
    mount = make_mount(prefix=FEW_DESCRIPTORS)
    assert status(mount)["descriptor_limit"] == 512
    with actor() as greedy, actor() as other:
        greedy("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 20000))")
        greedy.start(OPEN_ALL_ONE_CAN, base=str(mount.path), name=name, flags=flags, data=data)
        greedy.result(200)
        count = greedy("len(files)")
        assert greedy("number") == errno.ENFILE
        assert 64 <= count < 512
        assert other.errno("os.stat(p)", p=str(mount.path)) == 0
        assert status(mount)["descriptor_limit"] == 512
        greedy("for fd in files: os.close(fd)")
        if data:
            expected = data if flags & os.O_CREAT else b"data456789"
            assert all(content(backing / (name % number)) == expected for number in range(count))
        other("open(p, 'w').write('x')", p=str(mount / "after"))
        assert content(backing / "after") == b"x"
        assert wait_until(lambda: status(mount)["drafts"] == 0)


def test_bad_requests_do_not_end_the_mount(mount: Mount) -> None:
    """The backing directory changes in every unkind way under a working client: errors, but the mount lives."""
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            for name in ("dir", "dir2"):
                directory = mount.backing / name
                try:
                    directory.mkdir(exist_ok=True)
                    (directory / "file").write_bytes(B)
                    directory.chmod(0)
                    (directory / "file").unlink()
                    (directory / "file").mkdir()
                    directory.rename(mount.backing / "other")
                    subprocess.run(["rm", "-rf", mount.backing / "other"], check=False)
                except OSError:
                    continue

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        with actor() as user:
            user.start(
                "end = time.monotonic() + 4; good = bad = 0; odd = set()\n"
                "while time.monotonic() < end:\n"
                "    for code in ('os.listdir(d)', \"open(d + '/file', 'rb').read()\", "
                "\"open(d + '/file', 'wb').write(b'x')\", \"open(d + '/new', 'ab').write(b'x')\", "
                "\"os.rename(d + '/new', d + '/file')\", \"os.unlink(d + '/file')\", \"os.mkdir(d + '/sub')\", "
                "'os.stat(d)'):\n"
                "        try: eval(code, {'os': os, 'open': open, 'd': d}); good += 1\n"
                "        except OSError as e:\n"
                "            bad += 1; odd.add(errno.errorcode[e.errno])\n",
                d=str(mount / "dir"),
            )
            user.result(60)
            good, bad, odd = user("(good, bad, odd)")
    finally:
        stop.set()
        disturber.join()
    assert good and bad
    assert not odd & {"ENOTCONN", "EIO", "ECONNABORTED", "ENOSYS"}, odd
    (mount / "alive").write_bytes(A)
    assert content(mount / "alive") == A


def test_interrupted_clients(mount: Mount) -> None:
    """Clients that are killed inside requests, 150 times: the mount goes on and keeps nothing of them."""
    before = resources(mount)
    for number in range(150):
        process = subprocess.Popen(
            ["sh", "-c", f"while :; do echo x > {mount / 'file'}; cat {mount / 'file'}; ls {mount.path}; done"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(0.001 * (number % 20))  # the moment of the kill is what varies, there is nothing to await
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    (mount / "file").write_bytes(A)
    assert content(mount / "file") == A
    assert wait_until(lambda: resources(mount)[0] <= before[0] + 20), (before, resources(mount))
    assert wait_until(lambda: not leftovers(mount.backing))


def stopped(actor_party: Actor) -> None:
    """SIGSTOP a client."""
    os.kill(actor_party.pid, signal.SIGSTOP)


def test_a_stopped_writer_blocks_nobody(mount: Mount) -> None:
    """A writer that is stopped with its draft open is in nobody's way; when it goes on it publishes."""
    with actor() as writer, actor() as other:
        fd = writer.open(mount / "file", CREATE)
        writer.write(fd, A)
        stopped(writer)
        try:
            other.start("open(p, 'wb').write(b'other'); os.listdir(d)", p=str(mount / "file"), d=str(mount.path))
            other.result(20)
            assert content(mount / "file") == b"other"
        finally:
            os.kill(writer.pid, signal.SIGCONT)
        writer.closefd(fd)
        assert content(mount / "file") == A
