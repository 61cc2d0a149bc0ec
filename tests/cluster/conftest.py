"""Clusters for tests: several nodes on one backing directory, on each of the lock backends.

What three members of etcd do otherwise than one is tried always (test_faults.py, tests/conformance/test_etcd.py);
`SAFEFS_CLUSTER=whole` has everything else tried on them, too, and with each kind of lock (`make test-nightly`).
`SAFEFS_CLUSTER_LAB` names a shared filesystem of tests/labs: the nodes are on its clients then, in turn
(`make test-labs`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESS, Host, Network, Node, host, network
from tests.labs.filesystems import LABS, Views
from tests.mount.actors import Actor, actor
from tests.mount.lockers import CODE
from tests.support.etcd import Etcd, etcd
from tests.support.mounting import wait_until

LEASE_SECONDS = 3.0
CALM_LEASE = 30.0  # nothing is to happen to it, on a busy machine neither
BACKENDS = {"leasefile": 0, "etcd": 1, "etcd3": 3}  # with so many members of etcd
WHOLE = os.environ.get("SAFEFS_CLUSTER") == "whole"
LAB = os.environ.get("SAFEFS_CLUSTER_LAB")
SMALL_LAB = "sshfs"  # for test_labs.py where none is named


@dataclass
class Cluster:
    """Makes nodes of one backing directory that share their locks; `views` are the ways to it, one for each client."""

    place: Path  # a plain directory
    views: Sequence[Path]
    options: str
    stack: ExitStack
    etcd: Etcd | None = None
    network: Network | None = None
    nodes: list[Node] = field(default_factory=list)

    @property
    def backing(self) -> Path:
        return self.views[0]

    def node(
        self, host: Host | None = None, backing: Path | None = None, lease: float = LEASE_SECONDS, **more: object
    ) -> Node:
        """One more; without a host of its own it is the test's neighbour."""
        if host is None and self.network is not None:
            # The servers' own network, and the test's own name and clocks.
            more["prefix"] = self.network.prefix
        number = len(self.nodes)
        options = ("-o", f"{self.options},lease_seconds={lease:g}")
        backing = backing or self.views[number % len(self.views)]
        node = Node(backing, self.place / f"node{number}", options, host=host, **more)  # type: ignore[arg-type]
        self.stack.callback(node.stop)
        self.nodes.append(node)
        return node

    def host(self) -> Host:
        return self.stack.enter_context(host(len(self.nodes) + 1, self.network))

    def make(self, count: int, **more: object) -> list[Node]:
        """Nodes on one host each."""
        return [self.node(self.host(), **more) for _ in range(count)]  # type: ignore[arg-type]


@contextmanager
def etcd_of(place: Path, views: Sequence[Path], members: int, **more: bool) -> Iterator[Cluster]:
    """A cluster with its locks in etcd, and a network."""
    with ExitStack() as stack:
        net = stack.enter_context(network())
        (place / "etcd").mkdir()
        servers = stack.enter_context(etcd(place / "etcd", members, address=ADDRESS, prefix=net.prefix, **more))
        yield Cluster(place, views, servers.options, stack, servers, net)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Views]:
    """Both clients of a shared filesystem."""
    name = LAB or SMALL_LAB
    with LABS[name](tmp_path_factory.mktemp(name)) as views:
        yield views


@pytest.fixture
def clients(lab: Views, tmp_path: Path) -> Views:
    """An empty directory, as each of them sees it."""
    first, second = (view / tmp_path.name for view in lab)
    first.mkdir()
    assert wait_until(second.is_dir)
    return first, second


@pytest.fixture
def views(request: pytest.FixtureRequest) -> tuple[Path, ...]:
    """The ways to one empty directory: of the machine's own filesystem there is one."""
    if LAB is None:
        return (request.getfixturevalue("backing"),)
    both: Views = request.getfixturevalue("clients")
    return both


@pytest.fixture(params=[name for name, members in BACKENDS.items() if members <= (0 if LAB else 3 if WHOLE else 1)])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, views: tuple[Path, ...]) -> Iterator[Cluster]:
    members = BACKENDS[request.param]
    with ExitStack() as stack:
        if members:
            yield stack.enter_context(etcd_of(tmp_path, views, members))
        else:
            yield Cluster(tmp_path, views, f"locks={request.param}", stack)


@pytest.fixture
def unshared(tmp_path: Path, views: tuple[Path, ...]) -> Iterator[Cluster]:
    """The control: nodes that share no locks."""
    with ExitStack() as stack:
        yield Cluster(tmp_path, views, "locks=memory", stack)


@pytest.fixture
def parties() -> Iterator[Callable[[], Actor]]:
    """Processes that know the lock calls."""
    with ExitStack() as stack:

        def make() -> Actor:
            process = stack.enter_context(actor())
            process(CODE)
            return process

        yield make
