"""The control socket: one line asks, one line answers, and no client can hurt the daemon."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from safefs import control
from safefs.control import control_socket, daemon_pid, request, sd_notify, serve_control
from safefs.errors import SafefsError
from tests.support.mounting import wait_until


async def answer(message: dict[str, Any]) -> dict[str, Any]:
    if message["op"] == "refuse":
        raise SafefsError("no such thing", errno.ENOENT)
    if message["op"] == "hang":
        await trio.sleep_forever()
    return {"echo": message["op"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "m.sock"


def serving(path: Path, client: Callable[[], object]) -> object:
    """Run a blocking client in a thread beside a server."""

    async def main() -> object:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, path, answer)
            result = await trio.to_thread.run_sync(client)
            nursery.cancel_scope.cancel()
        return result

    return trio.run(main)


def test_a_request_is_answered(path: Path) -> None:
    assert serving(path, lambda: request(path, {"op": "hello"})) == {"echo": "hello"}


def test_names_need_not_be_utf8(path: Path) -> None:
    name = os.fsdecode(b"\xff")
    assert serving(path, lambda: request(path, {"op": name})) == {"echo": name}


def test_the_socket_is_private_and_goes_away(path: Path) -> None:
    def modes() -> tuple[int, int]:
        return stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)

    assert serving(path, modes) == (0o600, 0o700)
    assert not path.exists()


def test_an_error_answer_raises(path: Path) -> None:
    def client() -> int:
        with pytest.raises(SafefsError, match="no such thing") as raised:
            request(path, {"op": "refuse"})
        return raised.value.errno

    assert serving(path, client) == errno.ENOENT


def test_a_lack_of_descriptors_is_survived(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client that connects when the server can open nothing more is served later."""

    def client() -> bytes:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as connection:
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                connection.connect(os.fspath(path))
                assert wait_until(lambda: "cannot be accepted" in caplog.text)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            connection.sendall(b'{"op": "hello"}\n')
            return connection.recv(1000)

    assert serving(path, client) == b'{"echo": "hello"}\n'


def test_a_bug_in_an_answer_is_logged_and_survived(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def client() -> object:
        with pytest.raises(SafefsError, match="its log says why"):
            request(path, {})
        return request(path, {"op": "still there"})

    assert serving(path, client) == {"echo": "still there"}
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def raw_exchange(path: Path, text: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(os.fspath(path))
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        answer = json.loads(connection.makefile().readline())
        assert isinstance(answer, dict)
        return answer


@pytest.mark.parametrize("text", [b"", b"nonsense\n", b"[1]\n", b"\xff\n", b"[" * 60000 + b"\n"])
def test_nonsense_is_answered_with_an_error(path: Path, text: bytes) -> None:
    answer = serving(path, lambda: raw_exchange(path, text))
    assert isinstance(answer, dict) and answer["errno"] == errno.EINVAL


def test_clients_that_say_nothing_are_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than connections are served at once: the next client waits for the first to run out of time."""
    monkeypatch.setattr(control, "SERVER_SECONDS", 0.1)

    def client() -> object:
        idle = [socket.socket(socket.AF_UNIX) for _ in range(control.MAX_CONNECTIONS + 2)]
        try:
            for connection in idle:
                connection.connect(os.fspath(path))
            return request(path, {"op": "late"})
        finally:
            for connection in idle:
                connection.close()

    assert serving(path, client) == {"echo": "late"}


def test_a_silent_daemon_times_out(path: Path) -> None:
    def client() -> int:
        with pytest.raises(SafefsError, match="did not answer within") as raised:
            request(path, {"op": "hang"}, timeout_seconds=0.1)
        return raised.value.errno

    assert serving(path, client) == errno.ETIMEDOUT


def test_no_daemon(path: Path) -> None:
    assert daemon_pid(path) is None
    with pytest.raises(SafefsError, match="no daemon listens"):
        request(path, {"op": "hello"})


def test_the_daemon_is_known_by_its_pid(path: Path) -> None:
    assert serving(path, lambda: daemon_pid(path)) == os.getpid()


def test_what_a_dead_daemon_left_is_replaced(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    assert serving(path, lambda: request(path, {"op": "hello"})) == {"echo": "hello"}


def test_a_living_daemon_is_not_replaced(path: Path) -> None:
    def client() -> object:
        with pytest.raises(SafefsError, match="another daemon"):
            trio.run(serve_control, path, answer)
        return request(path, {"op": "hello"})

    assert serving(path, client) == {"echo": "hello"}


def test_a_directory_open_to_others_is_not_trusted(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(SafefsError, match="not trusting"):
        request(path, {"op": "hello"})


def test_a_planted_link_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path.parent.symlink_to("elsewhere")
    with pytest.raises(SafefsError, match="is not ours"):
        trio.run(serve_control, path, answer)


def test_socket_names_are_short_and_distinct() -> None:
    long = Path("/" + "x" * 200 + "/" + "y" * 255)
    names = {control_socket(path, 0) for path in (long, Path("/"), Path("/a/b"), Path("/a b"), Path("/a-b"))}
    assert len(names) == 5
    assert max(len(os.fspath(name)) for name in names) < 100


def test_mountinfo_lines() -> None:
    line = b"40 30 0:57 / /mnt/a\\040b rw,nosuid shared:1 - fuse.safefs /lus\\134tre rw,user_id=1000,group_id=0\n"
    mount = control._parse_mountinfo(line)
    assert mount is not None
    assert (mount.mountpoint, mount.source, mount.user_id) == (Path("/mnt/a b"), "/lus\\tre", 1000)
    assert (mount.mount_id, mount.device) == (40, os.makedev(0, 57))
    assert control._parse_mountinfo(line.replace(b"fuse.safefs", b"fuse.other")) is None


def test_sd_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sd_notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(os.fspath(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "notify"))
        sd_notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
