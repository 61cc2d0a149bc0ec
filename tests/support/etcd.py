"""The real etcd-server, on loopback, for the time of a test: one member, or three whose leader can be killed."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Member:
    """One etcd process."""

    name: str
    client: str  # host:port
    process: subprocess.Popen[bytes]

    def ask(self, path: str) -> dict[str, object]:
        """An answer of the gateway; OSError while there is none."""
        request = urllib.request.Request(f"http://{self.client}{path}", data=b"{}", method="POST")
        with urllib.request.urlopen(request, timeout=2) as answer:
            return dict(json.load(answer))

    def leads(self) -> bool:
        try:
            status = self.ask("/v3/maintenance/status")
        except OSError:
            return False
        return status.get("leader") == dict(status["header"])["member_id"]  # type: ignore[call-overload]


@dataclass
class Etcd:
    """A cluster of members."""

    members: list[Member]

    @property
    def endpoints(self) -> str:
        return ",".join(member.client for member in self.members)

    @property
    def option(self) -> str:
        """For -o locks=; commas are escaped as mount options need it."""
        return "etcd://" + self.endpoints.replace(",", r"\,")

    def leader(self) -> Member:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for member in self.members:
                if member.process.poll() is None and member.leads():
                    return member
            time.sleep(0.05)
        raise AssertionError("no member of etcd leads")


@contextmanager
def etcd(directory: Path, count: int = 1) -> Iterator[Etcd]:
    """A cluster that answers; it is gone at the end."""
    peers = {f"m{number}": f"127.0.0.1:{free_port()}" for number in range(count)}
    members: list[Member] = []
    try:
        for name, peer in peers.items():
            client = f"127.0.0.1:{free_port()}"
            members.append(Member(name, client, _start(directory, name, client, peer, peers)))
        cluster = Etcd(members)
        cluster.leader()
        yield cluster
    finally:
        for member in members:
            member.process.kill()
        for member in members:
            member.process.wait(START_SECONDS)


def _start(directory: Path, name: str, client: str, peer: str, peers: dict[str, str]) -> subprocess.Popen[bytes]:
    command = ["etcd", "--name", name, "--data-dir", str(directory / name), "--logger", "zap"]
    command += ["--listen-client-urls", f"http://{client}", "--advertise-client-urls", f"http://{client}"]
    command += ["--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}"]
    command += ["--initial-cluster", ",".join(f"{member}=http://{where}" for member, where in peers.items())]
    command += ["--initial-cluster-state", "new", "--log-outputs", str(directory / f"{name}.log")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
