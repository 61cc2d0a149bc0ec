"""Machines for daemons, as far as one kernel can tell them apart, and the daemons on them.

A host has a name of its own, so no other knows at once when its processes die; boot and monotonic clocks of its own;
and where there is a network, a network namespace of its own with one link to etcd's, which can be cut: packets are lost
then, as in a cable that was pulled, and nothing says so to either side.  Only the mounts are the test's, which has to
look into them.  The kernel ends the namespaces, with all that is in them, when the processes end that hold them.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.mounting import Mount, mounted, wait_until

SECONDS = 20.0
ADDRESS = "10.99.0.1"  # of etcd, in its namespace
# What a daemon says that loses its lease, or cannot reach what it needs.
LOST = "the lease of this node is lost"


@dataclass
class Host:
    """`prefix` begins every command that runs on it."""

    number: int
    prefix: list[str]
    network: Network | None

    def cut_off(self) -> None:
        """From the network: nothing comes through, in either direction."""
        assert self.network is not None
        self.network.set_link(self.number, "down")

    def reconnect(self) -> None:
        assert self.network is not None
        self.network.set_link(self.number, "up")


class Network:
    """A namespace for servers, and one for each host with a link to it."""

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []
        self.servers = self._namespace()
        self._on(self.servers, "ip link set lo up", f"ip address add {ADDRESS}/32 dev lo")

    @property
    def prefix(self) -> list[str]:
        """For commands that run where the servers are."""
        return self._enter(self.servers)

    def link(self, number: int) -> list[str]:
        """A new namespace; what commands in it begin with."""
        pid = self._namespace()
        here, there = f"10.98.{number}.2", f"10.98.{number}.1"
        self._on(
            self.servers,
            f"ip link add h{number} type veth peer name eth netns {pid}",
            f"ip address add {there}/30 dev h{number}",
            f"ip link set h{number} up",
        )
        self._on(
            pid,
            "ip link set lo up",
            f"ip address add {here}/30 dev eth",
            "ip link set eth up",
            f"ip route add default via {there}",
        )
        return self._enter(pid)

    def set_link(self, number: int, state: str) -> None:
        self._on(self.servers, f"ip link set h{number} {state}")

    def close(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def _namespace(self) -> int:
        """Held by a process, whose pid stands for it."""
        mine = Path("/proc/self/ns/net").readlink()
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._holders.append(holder)
        assert wait_until(lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != mine, SECONDS)
        return holder.pid

    def _enter(self, pid: int) -> list[str]:
        return ["nsenter", f"--net=/proc/{pid}/ns/net"]

    def _on(self, pid: int, *commands: str) -> None:
        for command in commands:
            subprocess.run([*self._enter(pid), *command.split()], check=True, timeout=SECONDS)


@contextmanager
def host(number: int, network: Network | None) -> Iterator[Host]:
    """Its clocks are an hour and more from all others', and the same ones for every daemon that is started on it."""
    clocks = [f"--boottime={number * 5000 + 3600}", f"--monotonic={number * 7000 + 3600}"]
    named = f"hostname host{number}; echo; exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--uts", "--time", *clocks, "sh", "-c", named], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        spaces = f"/proc/{holder.pid}/ns"
        enter = ["nsenter", f"--uts={spaces}/uts", f"--time={spaces}/time_for_children"]
        yield Host(number, [*(network.link(number) if network is not None else []), *enter], network)
    finally:
        holder.kill()
        holder.communicate()


@dataclass
class Node:
    """The daemon of one host, which can be killed and started again; clients go on looking at the same `path`."""

    backing: Path
    path: Path
    arguments: Sequence[str] = ()
    prefix: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    host: Host | None = None
    _starts: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._running = ExitStack()
        self.start()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def start(self) -> None:
        """The daemon, and its mount."""
        log = self.path.with_name(f"{self.path.name}.{next(self._starts)}.log")
        prefix = [*(self.host.prefix if self.host is not None else []), *self.prefix]
        self.mount: Mount = self._running.enter_context(
            mounted(self.backing, self.path, *self.arguments, log=log, prefix=prefix, environment=self.environment)
        )

    def may_lose_its_lease(self) -> None:
        self.mount.expect_log(LOST)

    def kill(self) -> None:
        """SIGKILL; what is left of the mount is taken away."""
        self.mount.kill()
        self._running.close()

    def freeze(self) -> None:
        self.mount.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.mount.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self._running.close()


@contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.close()
