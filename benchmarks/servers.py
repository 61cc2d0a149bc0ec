"""The servers that some systems need: on free loopback ports, for the length of a run, in directories of the run."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from benchmarks.errors import SystemFailedError
from benchmarks.mounts import Service
from benchmarks.systems import COMMAND_SECONDS, Place


def redis_url(place: Place) -> str:
    """Of the server that `start_redis` has started."""
    return (place.directory("redis") / "url").read_text()


def start_redis(place: Place) -> None:
    """A redis-server that keeps nothing on disk."""
    port, directory = free_port(), place.directory("redis")
    (directory / "url").write_text(f"redis://127.0.0.1:{port}/1")
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(directory)]
    _start(place, "redis", [*command, "--save", "", "--appendonly", "no"], directory, port)


def etcd_address(place: Place) -> str:
    """HOST:PORT of the server that `start_etcd` has started."""
    return (place.directory("etcd") / "address").read_text()


def start_etcd(place: Place) -> None:
    """One member, with its data on the filesystem that is measured on."""
    port, peer, directory = free_port(), free_port(), place.directory("etcd")
    address, other = f"127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
    (directory / "address").write_text(address)
    command = ["etcd", "--name", "bench", "--data-dir", str(directory / "data"), "--logger", "zap"]
    command += ["--listen-client-urls", f"http://{address}", "--advertise-client-urls", f"http://{address}"]
    command += ["--listen-peer-urls", other, "--initial-advertise-peer-urls", other]
    _start(place, "etcd", [*command, "--initial-cluster", f"bench={other}"], directory, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(place: Place, name: str, command: list[str], directory: Path, port: int) -> None:
    service = Service(command, directory / "log")
    place.services[name] = service
    place.stack.callback(service.end, 0)
    deadline = time.monotonic() + COMMAND_SECONDS
    while service.running() and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise SystemFailedError(f"{name} does not answer: {service.last_words()}")
