"""What every lock backend promises (safefs.cluster.backend), asked of each of them in the same words.

`memory` here is the backend on which other tests put several nodes into one process; `-o locks=memory` shares nothing.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import pytest
import trio
import trio.testing

from safefs.cluster import calls as calls_module
from safefs.cluster import files as files_module
from safefs.cluster import housekeeping
from safefs.cluster import leasefile as leasefile_module
from safefs.cluster import ofd as locked_module
from safefs.cluster.backend import (
    NAMELESS,
    BackendError,
    DamagedError,
    LeaseLostError,
    LockBackend,
    Stored,
    UnreadableError,
)
from safefs.cluster.choice import etcd_access
from safefs.cluster.etcd import EtcdBackend
from safefs.cluster.etcd_client import Access
from safefs.cluster.leasefile import LeasefileBackend, Site
from safefs.cluster.ofd import NativeBackend
from safefs.cluster.record import NameRecord
from safefs.config import load_settings, parse_options
from safefs.lease import Terms, boottime
from safefs.locktable import Kind, Lock, Mode, NameLocks, Owner, Wait
from tests.support.etcd import PREFIX, Etcd, etcd
from tests.support.memory_backend import MemoryBackend, MemoryCluster

# No test waits for the end of this lease, and no busy machine uses it up.
CALM = Terms(lease_seconds=60.0, delay_seconds=0.2)
# Of nodes whose lease is to end: those of etcd's, whose clock is its own, and others, whose clock can be ours.
ETCD_TERMS = Terms(lease_seconds=10.0, delay_seconds=0.2)
SHORT = Terms(lease_seconds=0.6, delay_seconds=0.2)
SECONDS = 60.0


@dataclass
class Cluster:
    """Makes nodes that share their records."""

    make: Callable[[], LockBackend]
    terms: Terms = CALM
    clock: Callable[[], float] = boottime
    virtual: trio.testing.MockClock | None = None  # what `clock` shows, where it is not the machine's

    async def node(self) -> LockBackend:
        backend = self.make()
        await backend.join()
        return backend


def site(
    directory: str | Path,
    process: str = "",
    died: Container[str] = (),
    uses: Callable[[], int] = int,
    terms: Terms = CALM,
) -> Site:
    """A node that is known by the name of its process, and what it knows of others."""
    return Site(str(directory), terms, {"process": process}, lambda identity: identity["process"] in died, uses)


def leasefile(
    directory: str | Path, process: str = "", died: Container[str] = (), terms: Terms = CALM
) -> LeasefileBackend:
    return LeasefileBackend(site(directory, process, died, terms=terms))


def native(directory: str | Path, terms: Terms = CALM) -> NativeBackend:
    """A node on a client of its own."""
    return NativeBackend(site(directory, terms=terms), secrets.token_hex(4))


def access_of(server: Etcd) -> Access:
    """How the options of a mount say that this etcd is reached."""
    return etcd_access(load_settings(Path("/"), Path("/"), parse_options([server.options])))


def etcd_node(access: Access, prefix: str, terms: Terms = CALM) -> EtcdBackend:
    return EtcdBackend(access, prefix, terms, {}, lambda _identity: False)


@pytest.fixture(scope="module")
def etcd_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def etcd_secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """Three members, which want certificates and passwords."""
    with etcd(tmp_path_factory.mktemp("etcd"), 3, tls=True, user=True) as server:
        yield server


@pytest.fixture(params=["memory", "leasefile", "native", "etcd_one", "etcd_secured"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param == "memory":
        shared, numbers = MemoryCluster(), iter(range(100))
        yield Cluster(lambda: MemoryBackend(shared, f"node{next(numbers)}"))
        return
    if request.param.startswith("etcd"):
        access, prefix = access_of(request.getfixturevalue(request.param)), PREFIX + secrets.token_hex(4)
        yield Cluster(lambda: etcd_node(access, prefix))
        return
    with TemporaryDirectory(prefix="safefs-locks-", dir="/dev/shm") as directory:
        files = native if request.param == "native" else leasefile
        yield Cluster(lambda: files(directory))


@pytest.fixture(params=["leasefile", "native", "etcd_one", "etcd_secured"])
def lapsing(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Nodes whose leases are to end; in the memory of one process none does by itself."""
    if request.param.startswith("etcd"):
        access, prefix = access_of(request.getfixturevalue(request.param)), PREFIX + secrets.token_hex(4)
        return Cluster(lambda: etcd_node(access, prefix, ETCD_TERMS), ETCD_TERMS)
    files = native if request.param == "native" else leasefile
    clock = without_threads(monkeypatch)
    return Cluster(lambda: files(tmp_path, terms=SHORT), SHORT, trio.current_time, clock)


def without_threads(monkeypatch: pytest.MonkeyPatch, takes: float = 0) -> trio.testing.MockClock:
    """A clock for lease files whose calls are done in no time, or always take the same: it goes on when all wait."""

    async def in_place(
        _calls: object, function: Callable[..., object], *arguments: object, **options: object
    ) -> object:
        await trio.sleep(takes)
        return function(*arguments, **options)

    for call in ("call", "call_own"):
        monkeypatch.setattr(calls_module.Calls, call, in_place)
    for each in (leasefile_module, housekeeping, locked_module):
        monkeypatch.setattr(each, "boottime", trio.current_time)
    return trio.testing.MockClock(autojump_threshold=0)


def play(cluster: Cluster, scenario: Callable[..., Awaitable[None]], nodes: int = 2) -> None:
    async def main() -> None:
        members = [await cluster.node() for _ in range(nodes)]
        with trio.fail_after(SECONDS):
            await scenario(*members)

    trio.run(main, clock=cluster.virtual)


def held_by(node: str, *more: str) -> NameRecord:
    """A record that says something."""
    locks = NameLocks()
    for number, owner in enumerate((node, *more)):
        locks[Kind.FLOCK].request(Wait(number, Lock(Owner(owner, 7), Mode.EXCLUSIVE)))
    return NameRecord(locks=locks)


def test_a_record_is_what_was_written_last(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend) -> None:
        assert await one.read("name") == Stored()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        assert await two.read("name") == first
        second = await two.swap("name", first, held_by("b", "c"))
        assert second is not None and second.version > first.version
        assert (await one.read("name")).record == held_by("b", "c")

    play(cluster, scenario)


def test_names_of_all_kinds(cluster: Cluster) -> None:
    names = ["/", "a" * 1000, "with space", "\udcff\udcfe", "../../etc/passwd", "ü", "A", "a"]

    async def scenario(one: LockBackend, two: LockBackend) -> None:
        for number, name in enumerate(names):
            assert await one.swap(name, Stored(), held_by(str(number)))
        for number, name in enumerate(names):
            assert (await two.read(name)).record == held_by(str(number))

    play(cluster, scenario)


def test_what_was_read_before_replaces_nothing(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend) -> None:
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        assert await two.swap("name", Stored(), held_by("b")) is None
        second = await one.swap("name", first, held_by("c"))
        assert await two.swap("name", first, held_by("b")) is None
        assert await two.read("name") == second

    play(cluster, scenario)


def test_an_empty_record_is_none(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend) -> None:
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        empty = await one.swap("name", first, NameRecord())
        assert empty is not None and not (await two.read("name")).record
        assert await two.swap("name", first, held_by("b")) is None
        again = await two.swap("name", await two.read("name"), held_by("b"))
        assert again is not None
        assert await one.swap("name", empty, held_by("c")) is None
        assert (await one.read("name")).record == held_by("b")

    play(cluster, scenario)


def test_a_record_that_is_not_needed_any_more(cluster: Cluster) -> None:
    """It goes when it is empty, and not when somebody has used it meanwhile; either way the name can be used again."""

    async def scenario(one: LockBackend, two: LockBackend) -> None:
        for _ in range(3):
            first = await one.swap("name", await one.read("name"), held_by("a"))
            assert first is not None
            empty = await one.swap("name", first, NameRecord())
            assert empty is not None
            second = await two.swap("name", await two.read("name"), held_by("b"))
            await one.discard("name", empty)
            assert second is not None and await one.read("name") == second
            empty = await two.swap("name", second, NameRecord())
            assert empty is not None
            await one.discard("name", empty)
            await two.discard("name", empty)
            assert not (await two.read("name")).record
            # Whoever goes on from the empty record finds that it is gone, or can still replace it; nothing else.
            late = await two.swap("name", empty, held_by("b"))
            assert (await one.read("name")) == (late or Stored())

    play(cluster, scenario)


def test_of_many_that_replace_one_record_one_succeeds(cluster: Cluster) -> None:
    """A counter made of compare-and-swap: no step is lost, none counts twice."""
    steps, members = 25, 4

    async def count(backend: LockBackend, wins: list[int]) -> None:
        for _ in range(steps):
            while True:
                await backend.renew()  # on a busy machine it takes longer than a lease
                stored = await backend.read("name")
                reached = len(stored.record.wanted)
                record = NameRecord("counter", tuple(str(number) for number in range(reached + 1)))
                if await backend.swap("name", stored, record):
                    wins.append(reached)
                    break

    async def scenario(*nodes: LockBackend) -> None:
        wins: list[int] = []
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(count, node, wins)
        assert sorted(wins) == list(range(steps * members))

    play(cluster, scenario, members)


def test_a_change_wakes_who_waits(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend) -> None:
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None

        async def change() -> None:
            await trio.sleep(0.1)
            await two.swap("name", first, held_by("b"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            latest = await one.follow("name").next_change(first, SECONDS)
        assert latest is not None and latest.record == held_by("b")
        assert await one.read("name") == latest

    play(cluster, scenario)


def test_notices(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend) -> None:
        for name in ("name", "with / and \udcff"):
            await two.notify(one.node, name)
            await two.notify(one.node, name)
            assert await one.next_notice() == name
        await two.notify("nobody", "name")

    play(cluster, scenario)


def test_an_answer_is_taken_once(cluster: Cluster) -> None:
    """By whoever has asked for it, and from the node that was asked."""

    async def scenario(one: LockBackend, two: LockBackend) -> None:
        assert await one.take_answer(two.node, "a") is None
        await two.answer("a", "to a ☃")
        await two.answer("b", "to b")
        await one.answer("a", "of another")
        assert await one.take_answer(two.node, "a") == "to a ☃"
        assert await one.take_answer(two.node, "a") is None
        assert await one.take_answer(two.node, "b") == "to b"
        assert await two.take_answer(one.node, "a") == "of another"
        assert await one.take_answer("no node", "a") is None

    play(cluster, scenario)


def test_notices_to_a_node_that_has_joined_anew(cluster: Cluster) -> None:
    """Also when it has waited for one since before."""

    async def scenario(one: LockBackend, two: LockBackend) -> None:
        async def rejoin_and_notify() -> None:
            await trio.sleep(0.5)
            await one.leave()
            await one.join()
            await two.notify(one.node, "name")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(rejoin_and_notify)
            with trio.fail_after(SECONDS):
                assert await one.next_notice() == "name"

    play(cluster, scenario)


def test_some_names_come_to_be_all(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, other: LockBackend) -> None:
        names = {f"name{number}/ä" for number in range(11)}
        for name in names:
            assert await one.swap(name, Stored(), held_by("a"))
        found: set[str] = set()
        with trio.fail_after(SECONDS):
            while found != names:
                some = await other.some_names(3)
                assert len(some) <= 3 and names.issuperset(some)
                found.update(some)
        assert set(await other.all_names()) == names

    play(cluster, scenario)


def test_every_node_has_a_name_of_its_own(cluster: Cluster) -> None:
    async def scenario(*nodes: LockBackend) -> None:
        assert len({node.node for node in nodes}) == 5
        assert all(node.lease_ends() > boottime() for node in nodes)

    play(cluster, scenario, 5)


def test_a_node_that_leaves_is_gone_at_once(cluster: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend) -> None:
        assert await two.gone([one.node, two.node]) == set()
        await one.leave()
        assert await two.gone([one.node, two.node]) == {one.node}
        with pytest.raises(LeaseLostError):
            await one.renew()
        before = one.node
        await one.join()
        assert one.node != before
        assert await two.gone([before, one.node]) == {before}

    play(cluster, scenario)


@pytest.mark.parametrize("native_too", [False, True])
@pytest.mark.parametrize("how", ["cancelled before", "cancelled after", "unanswered", "ended by another"])
def test_a_node_that_leaves_beside_a_renewal_is_gone_at_once(
    how: str, native_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the renewal of which it has not heard comes to pass before the end of the lease, or finds that it is."""
    begun, goes_on, over = (threading.Event() for _ in range(3))

    async def scenario() -> None:
        one = (native if native_too else leasefile)(tmp_path)
        two = (native if native_too else leasefile)(tmp_path)
        await one.join()
        await two.join()
        await one.renew()
        renew = one.files.renew

        def renew_unheard(node: str, count: int) -> bool:
            try:
                if how == "cancelled before":
                    begun.set()
                    goes_on.wait(SECONDS)
                renew(node, count)
                begun.set()
                if how == "cancelled after":
                    goes_on.wait(SECONDS)
            finally:
                over.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(one.files, "renew", renew_unheard)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(renewal, one)
            await trio.to_thread.run_sync(begun.wait)
            if how.startswith("cancelled"):
                nursery.cancel_scope.cancel()
        if how == "ended by another":
            assert two.files.end(one.node, str(two.files.heartbeat(one.node)))
        await one.leave()
        assert await two.gone([one.node]) == {one.node}
        goes_on.set()
        await trio.to_thread.run_sync(over.wait)
        assert await two.gone([one.node]) == {one.node}

    async def renewal(one: LeasefileBackend) -> None:
        with pytest.raises(BackendError, match=os.strerror(errno.EIO)):
            await one.renew()

    trio.run(scenario)


def test_a_node_that_renews_stays_and_another_knows_that_it_is_gone_before_others_do(lapsing: Cluster) -> None:
    async def scenario(one: LockBackend, two: LockBackend, three: LockBackend) -> None:
        gone: set[str] = set()
        while not gone:
            await one.renew()
            await three.renew()
            gone = await three.gone([one.node, two.node])
            await trio.sleep(lapsing.terms.renew_seconds / 4)
        assert gone == {two.node}
        assert lapsing.clock() > two.lease_ends()
        with pytest.raises(LeaseLostError):
            await two.renew()
        await one.renew()

    play(lapsing, scenario, 3)


def test_whoever_sees_old_heartbeats_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that caches what it saw does not take the lock of a node that lives."""

    async def scenario() -> None:
        one, two = leasefile(tmp_path, terms=SHORT), leasefile(tmp_path, terms=SHORT)
        await one.join()
        await two.join()
        seen, end, refused = two.files.heartbeat(one.node), two.files.end, 0

        def attempt(node: str, heartbeat: str) -> bool:
            nonlocal refused
            ended = end(node, heartbeat)
            refused += not ended
            return ended

        monkeypatch.setattr(two.files, "heartbeat", lambda _node, *, anew=False: seen)
        monkeypatch.setattr(two.files, "end", attempt)
        with trio.fail_after(SECONDS):
            while refused < 3:
                await one.renew()
                assert await two.gone([one.node]) == set()
                await trio.sleep(SHORT.renew_seconds)
        assert trio.current_time() > SHORT.gone_seconds

    trio.run(scenario, clock=without_threads(monkeypatch))


def test_names_and_nodes_that_are_gone_leave_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        one, two = leasefile(tmp_path), leasefile(tmp_path)
        await one.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        empty = await one.swap("name", first, NameRecord())
        assert empty is not None
        await one.discard("name", empty)
        await one.leave()
        for part in ("nodes", "names"):
            (tmp_path / part / f"{files_module.LOOK}01234567").touch()
        monkeypatch.setattr(housekeeping, "BURIED_SECONDS", -1.0)
        await two.join()
        await two.tidy_up()
        assert [path.name for path in (tmp_path / "nodes").iterdir()] == [two.node]
        assert not list((tmp_path / "names").iterdir()) and not list((tmp_path / "new").iterdir())

    trio.run(scenario)


@pytest.mark.parametrize("is_old", [True, False])
def test_a_record_that_is_empty_for_long_is_removed(
    is_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a node that cannot tell of which name it is: whoever emptied it has died before it was done."""
    monkeypatch.setattr(housekeeping, "BURIED_SECONDS", -1.0 if is_old else 3600.0)

    async def scenario() -> None:
        one, two = leasefile(tmp_path), leasefile(tmp_path)
        await one.join()
        await two.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        empty = await one.swap("name", first, NameRecord())
        assert empty is not None and await one.swap("other", Stored(), held_by("a"))
        assert set(await two.some_names(10)) == {"other"}
        assert (await one.read("name")).version == (0 if is_old else empty.version)
        assert (await one.swap("name", empty, held_by("b")) is None) == is_old
        assert (await one.read("other")).record == held_by("a")

    trio.run(scenario)


def test_nodes_that_never_come_back_leave_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those that this node was itself, nor what was being made when a node died."""
    monkeypatch.setattr(housekeeping, "BURIED_SECONDS", -1.0)
    nodes = tmp_path / "nodes"

    async def scenario() -> None:
        one, lives = leasefile(tmp_path, terms=SHORT), leasefile(tmp_path, terms=SHORT)
        for _ in range(3):
            await one.join()  # each time it has lost its lease
        await lives.join()
        dead = files_module.Files(str(tmp_path), {}, lambda _identity: False)
        for number in range(2 * housekeeping.LOOKED_AT_ONCE):
            dead.join(f"dead{number:012}")
        (nodes / "dead000000000001" / "0").unlink()
        (tmp_path / "new" / "aa").mkdir()
        (tmp_path / "new" / "aa" / "data~aa").touch()
        with trio.fail_after(SECONDS):
            while len(list(nodes.iterdir())) > 2 or list((tmp_path / "new").iterdir()):
                for node in (one, lives):
                    await node.renew()
                await one.tidy_up()
                await trio.sleep(0.01)
        assert {path.name for path in nodes.iterdir()} == {one.node, lives.node}
        await lives.renew()

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("native_too", [False, True])
def test_a_lease_that_is_over_is_not_renewed(native_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where nobody has ended it: what was locked under it may be waited for by somebody who is about to."""

    async def scenario() -> None:
        one = native(tmp_path, SHORT) if native_too else leasefile(tmp_path, terms=SHORT)
        await one.join()
        await trio.sleep(SHORT.lease_seconds * 1.01)
        with pytest.raises(LeaseLostError, match="not renewed in time"):
            await one.renew()
        assert one.lease_ends() < trio.current_time()

    trio.run(scenario, clock=without_threads(monkeypatch))


def test_who_joins_asks_for_no_other_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which there may be thousands."""
    dead = files_module.Files(str(tmp_path), {}, lambda _identity: False)
    dead.join("dead")
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: real(path) if "dead" not in path else pytest.fail(path))
    trio.run(leasefile(tmp_path).join)


def test_who_could_not_join_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_files: files_module.Files, _home: str) -> None:
        raise OSError("no locks here")

    async def scenario() -> None:
        monkeypatch.setattr(files_module.Files, "_move_in", fail)
        with pytest.raises(BackendError):
            await leasefile(tmp_path).join()
        assert not list((tmp_path / "nodes").iterdir())

    trio.run(scenario)


def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        empty = await one.swap("name", first, NameRecord())
        assert empty is not None
        (home,) = (tmp_path / "names").iterdir()
        (home / f"{empty.version}~{empty.token}").rename(home / "gone")
        (home / "data~left").touch()
        assert await one.read("name") == Stored()
        again = [await one.swap("name", Stored(), held_by("b")) for _ in range(2)]
        assert any(again) and (await one.read("name")).record == held_by("b")

    trio.run(scenario)


def test_a_rename_that_comes_late_finds_no_other_empty_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the same version, in a directory that was removed and made anew meanwhile: its data would be missing."""
    files = files_module.Files(str(tmp_path), {}, lambda _identity: False)

    def use_once() -> Stored:
        first = files.swap("name", Stored(), held_by("b"))
        assert first is not None
        empty = files.swap("name", first, NameRecord())
        assert empty is not None
        return empty

    empty, rename = use_once(), os.rename

    def late(source: str, target: str) -> None:
        monkeypatch.undo()
        files.discard("name", empty)
        use_once()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert files.swap("name", empty, held_by("late")) is None
    assert not files.read("name").record
    assert files.swap("name", files.read("name"), held_by("c")) is not None


async def taken(backend: LockBackend, name: str) -> Stored:
    """A record that somebody makes, whatever stands in the way at first."""
    while True:
        with suppress(BackendError):
            if (stored := await backend.swap(name, Stored(), held_by("b"))) is not None:
                return stored
        await trio.sleep(0.01)


@pytest.mark.parametrize("native_too", [False, True])
def test_what_a_dead_node_left_of_a_removed_name_does_not_stay_in_the_way(
    native_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wrote the data of its next state when another had just emptied the directory, and died then."""

    async def scenario() -> None:
        one = native(tmp_path, SHORT) if native_too else leasefile(tmp_path, terms=SHORT)
        await one.join()
        home = tmp_path / "names" / files_module.directory_of("name")
        home.mkdir()
        (home / "data~dead").write_text("{}")
        start = trio.current_time()
        with trio.fail_after(SECONDS):
            stored = await taken(one, "name")
        assert SHORT.gone_seconds <= trio.current_time() - start < SHORT.gone_seconds + 0.1
        assert await one.read("name") == stored
        assert sorted(path.name for path in home.iterdir()) == [f"1~{stored.token}", f"data~{stored.token}"]

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("beside", ["3~1e", "3~none", "gone~1"])
def test_data_beside_which_there_is_anything_else_are_left_alone(beside: str, tmp_path: Path) -> None:
    """Also where it was not listed at first, and where the data change all the time."""

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        home = tmp_path / "names" / files_module.directory_of("name")
        home.mkdir()
        (home / "data~live").write_text("{}")
        assert one.files.leftovers("name") == ("data~live",)
        one.files.remove_leftovers("name", ("data~other",))
        (home / beside).touch()
        assert one.files.leftovers("name") == ()
        one.files.remove_leftovers("name", ("data~other",))
        assert sorted(path.name for path in home.iterdir()) == sorted([beside, "data~live"])

    trio.run(scenario)


@pytest.mark.parametrize("left", [["look~dead"], ["look~dead", "look~late"], ["data~dead", "look~dead"]])
def test_what_a_dead_node_left_in_a_names_directory_goes(
    left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had just had its client look anew."""

    async def scenario() -> None:
        one = leasefile(tmp_path, terms=SHORT)
        await one.join()
        home = tmp_path / "names" / files_module.directory_of("name")
        home.mkdir()
        for entry in left:
            (home / entry).touch()
        with trio.fail_after(2 * SHORT.gone_seconds):
            stored = await taken(one, "name")
        assert sorted(path.name for path in home.iterdir()) == [f"1~{stored.token}", f"data~{stored.token}"]

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("foreign", [".nfs000012", ".fuse_hidden01", "@eaDir"])
def test_what_is_nothing_of_ours_in_a_names_directory_is_named(foreign: str, tmp_path: Path) -> None:
    """And left alone.  When it is gone the name can be locked."""

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        home = tmp_path / "names" / files_module.directory_of("name")
        home.mkdir()
        for entry in (foreign, "data~dead", "look~dead"):
            (home / entry).touch()
        for _ in range(3):
            with pytest.raises(BackendError, match=f"{home.name}/{foreign} is nothing of safefs"):
                await one.swap("name", Stored(), held_by("a"))
        assert (home / foreign).exists()
        for path in home.iterdir():
            path.unlink()
        assert await taken(one, "name")

    trio.run(scenario)


def test_data_that_change_are_not_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        one = leasefile(tmp_path, terms=SHORT)
        await one.join()
        home = tmp_path / "names" / files_module.directory_of("name")
        home.mkdir()
        start, number = trio.current_time(), 0
        while trio.current_time() - start < 2 * SHORT.gone_seconds:
            (home / f"data~{number:x}").write_text("{}")
            (home / f"data~{number - 1:x}").unlink(missing_ok=True)
            with pytest.raises(BackendError, match="data without a state"):
                await one.swap("name", Stored(), held_by("b"))
            number += 1
            await trio.sleep(0.01)

    trio.run(scenario, clock=without_threads(monkeypatch))


def test_a_node_whose_process_died_is_gone_at_once(tmp_path: Path) -> None:
    """As its own successor knows it, and whoever else is on its host."""

    async def scenario() -> None:
        one = leasefile(tmp_path, "one")
        await one.join()
        far, near = leasefile(tmp_path, "far"), leasefile(tmp_path, "near", {"one"})
        await far.join()
        assert await far.gone([one.node]) == set()
        await near.join()
        await near.tidy_up()
        assert await far.gone([one.node]) == {one.node}
        with pytest.raises(LeaseLostError):
            await one.renew()

    trio.run(scenario)


def test_the_process_of_a_node_is_read_once(tmp_path: Path) -> None:
    one, other = (files_module.Files(str(tmp_path), {"pid": 1}, lambda _identity: False) for _ in range(2))
    assert one.process_of("node") == {}
    other.join("node")
    assert one.process_of("node") == {"pid": 1}
    (tmp_path / "nodes" / "node" / "process").unlink()
    assert one.process_of("node") == {"pid": 1} and not one.has_died("node")


@pytest.mark.parametrize("text", ["", '"x"', "[1]", "null", "[" * 5000], ids=lambda text: text[:7])
def test_a_node_whose_process_cannot_be_read_is_not_known_to_have_died(text: str, tmp_path: Path) -> None:
    one, other = (files_module.Files(str(tmp_path), {"pid": 1}, lambda _identity: True) for _ in range(2))
    other.join("node")
    (tmp_path / "nodes" / "node" / "process").write_text(text)
    assert one.process_of("node") == {} and not one.has_died("node")


def test_a_backend_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        monkeypatch.setattr(calls_module, "CALL_SECONDS", 0.05)
        one.files.read = lambda _name: time.sleep(0.5)  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(BackendError, match="does not answer"):
            await one.read("name")

    trio.run(scenario)


def test_directories_that_hang_do_not_cost_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they take more than one thread each, however often they are asked for."""
    monkeypatch.setattr(calls_module, "CALL_SECONDS", 0.05)
    goes_on, calls = threading.Event(), list[str]()

    def hang(name: str) -> Stored:
        calls.append(name)
        goes_on.wait(SECONDS)
        return Stored()

    async def ask(one: LeasefileBackend, name: str, times: int) -> None:
        for _ in range(times):
            with pytest.raises(BackendError, match="does not answer"):
                await one.read(name)

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        monkeypatch.setattr(one.files, "read", hang)
        await ask(one, "name", 5)
        assert calls == ["name"]
        async with trio.open_nursery() as nursery:
            for number in range(2 * calls_module.MAX_THREADS):
                nursery.start_soon(ask, one, str(number), 2)
        assert len(calls) == calls_module.MAX_THREADS
        await one.renew()
        goes_on.set()
        await trio.sleep(0.1)
        assert await one.read("name") == Stored()

    trio.run(scenario)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), TypeError("not what it was")])
def test_whatever_goes_wrong_is_an_error_of_the_backend(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise error

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        monkeypatch.setattr(trio.to_thread, "run_sync", fail)
        for ask in (one.read, one.process_of):
            with pytest.raises(BackendError, match=str(error)):
                await ask("name")
        with pytest.raises(BackendError):
            await one.renew()

    trio.run(scenario)


@pytest.mark.parametrize(
    ("turns", "takes", "waited", "most"),
    [
        (0, 0.0, 0.0, 850),  # at first a thousand times a second, and later less often;
        (0, 0.0, 10.0, 49),
        (0, 0.0, 1000.0, 4),
        (9, 0.0, 0.0, 87),  # the tenth in the queue a tenth of that,
        (9, 0.0, 10.0, 6),
        (0, 0.05, 0.0, 10),  # and where a look takes long, half of the time at most goes into it
    ],
)
def test_how_often_it_is_looked_for_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int, takes: float, waited: float, most: int
) -> None:
    """In a second."""

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        seen = await one.swap("name", Stored(), held_by("a"))
        assert seen is not None
        follower, looks = one.follow("name"), 0
        read_later = one.files.read_later

        def counted(name: str, version: int) -> Stored | None:
            nonlocal looks
            looks += 1
            return read_later(name, version)

        monkeypatch.setattr(one.files, "read_later", counted)
        for _ in range(round(2 * waited)):  # as who waits does, who looks now and then whether others are still there
            assert await follower.next_change(seen, 0.5, turns) is None
        looks = 0
        assert await follower.next_change(seen, 1.0, turns) is None
        assert most / 2 < looks <= most

    trio.run(scenario, clock=without_threads(monkeypatch, takes))


@dataclass
class Listener:
    """A node with lease files that listens for notices; all that takes time is waiting."""

    backend: LeasefileBackend
    uses: list[None]  # one each, of those that are only counted
    looks: list[float] = field(default_factory=list)
    heard: list[float] = field(default_factory=list)

    async def listen(self) -> None:
        notices = self.backend.files.notices

        def noted(node: str, *, anew: bool = False) -> list[str]:
            self.looks.append(trio.current_time())
            return notices(node, anew=anew)

        self.backend.files.notices = noted  # type: ignore[method-assign]
        while True:
            await self.backend.next_notice()
            self.heard.append(trio.current_time())

    async def use(self, seconds: float, *, lent: bool = False) -> None:
        """A name that is delegated to it, again and again; `lent`: without a word, as the C extension does."""
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            if lent:
                self.uses.append(None)
            else:
                self.backend.expect_notices()
            await trio.sleep(0.01 if lent else 0.001)


def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Listener], Awaitable[None]]) -> None:
    async def main() -> None:
        uses: list[None] = []
        listener = Listener(LeasefileBackend(site(tmp_path, uses=uses.__len__)), uses)
        await listener.backend.join()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.listen)
            await scenario(listener)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=without_threads(monkeypatch))


@pytest.mark.parametrize(("used", "most"), [(0.0, 2.1), (0.001, 6.5), (10.0, 51.0)])
def test_how_often_it_is_looked_for_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: float, most: float
) -> None:
    """In a second: where no name is used; in the first ten after one was; and where they are used all the time."""

    async def scenario(listener: Listener) -> None:
        await trio.sleep(100)
        listener.looks.clear()
        await listener.use(used)
        await trio.sleep(10 - used)
        assert most / 2 < len(listener.looks) / 10 <= most

    listening(tmp_path, monkeypatch, scenario)


def test_who_has_no_names_looks_for_notices_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as often as before from the moment on in which a name is used."""

    async def scenario(listener: Listener) -> None:
        await trio.sleep(100)
        listener.backend.rest(True)
        listener.looks.clear()
        await trio.sleep(100)
        assert 18 <= len(listener.looks) <= 22
        await listener.use(0.001)
        await listener.backend.notify(listener.backend.node, "name")
        await trio.sleep(0.03)
        assert len(listener.heard) == 1

    listening(tmp_path, monkeypatch, scenario)


def test_who_rests_no_more_hears_within_half_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no name is used, from that moment on."""

    async def scenario(listener: Listener) -> None:
        for step in range(10):
            listener.backend.rest(True)
            await trio.sleep(100 + step / 2)
            listener.backend.rest(False)
            sent = trio.current_time()
            await listener.backend.notify(listener.backend.node, "name")
            await trio.sleep(2)
            assert listener.heard[-1] - sent <= 0.53

    listening(tmp_path, monkeypatch, scenario)


@pytest.mark.parametrize(("idle", "most"), [(0.0, 0.021), (0.1, 0.031), (1.0, 0.121), (100.0, 0.521)])
def test_how_soon_a_notice_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: float, most: float) -> None:
    """Soon, if a name was used a short time ago."""

    async def scenario(listener: Listener) -> None:
        await trio.sleep(100)
        for step in range(10):
            await listener.use(0.001)
            await trio.sleep(idle + most * step / 10)
            sent = trio.current_time()
            await listener.backend.notify(listener.backend.node, "name")
            await trio.sleep(2)
            assert 0 <= listener.heard[-1] - sent <= most * 1.1
        assert len(listener.heard) == 10

    listening(tmp_path, monkeypatch, scenario)


def test_how_soon_a_notice_is_seen_of_a_name_that_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as of one that Python serves; and nothing is looked for oftener when it is not used any more."""

    async def scenario(listener: Listener) -> None:
        await trio.sleep(100)
        for step in range(10):
            await listener.use(5 + step / 300, lent=True)
            sent = trio.current_time()
            await listener.backend.notify(listener.backend.node, "name")
            await listener.use(1, lent=True)
            assert 0 <= listener.heard[-1] - sent <= 0.021
        assert len(listener.heard) == 10
        await trio.sleep(10)
        listener.looks.clear()
        await trio.sleep(10)
        assert len(listener.looks) <= 21

    listening(tmp_path, monkeypatch, scenario)


MIXED = '{"format": 2, "delegate": "a", "wanted": [], "locks": {}, "broken": ["b"]}'
DAMAGED = ["", "{", "\0" * 100, "[]", '{"name": "name", "record": {}}', f'{{"name": "name", "record": {MIXED}}}']


@pytest.mark.parametrize("damage", [*DAMAGED, "[" * 5000], ids=lambda damage: repr(damage[:80]))
def test_a_record_that_is_damaged(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a power cut.  It is nobody's once all are gone that could be on it; who comes later could not."""

    async def scenario() -> None:
        one, two = leasefile(tmp_path, terms=SHORT), leasefile(tmp_path, terms=SHORT)
        await two.join()
        assert await two.swap("name", Stored(), held_by(two.node))
        (data,) = (tmp_path / "names").glob("*/data~*")
        data.write_text(damage)
        await one.join()

        async def renewing(*nodes: LeasefileBackend) -> None:
            for node in nodes:
                await node.renew()
            with pytest.raises(DamagedError, match=data.parent.name) as caught:
                await one.read("name")
            assert {one.node, two.node} <= set(caught.value.stored.record.broken)
            await trio.sleep(SHORT.renew_seconds)

        end = trio.current_time() + 2 * SHORT.gone_seconds
        while trio.current_time() < end:
            await renewing(one, two)
        await two.leave()
        await leasefile(tmp_path, terms=SHORT).join()
        await one.renew()
        found = await one.read("name")
        assert found.record == NameRecord(broken=(one.node,))
        assert await one.read("name") == found
        assert await one.swap("name", found, held_by("a"))
        assert (await one.read("name")).record == held_by("a")

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("most", [leasefile_module.MOST_DAMAGED, 60])
def test_records_that_are_damaged_are_freed_however_many_are_wanted(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once; and some where there are more than are remembered, if the others are not asked for all the time."""
    monkeypatch.setattr(leasefile_module, "MOST_DAMAGED", most)
    names = [str(number) for number in range(120)]

    async def scenario() -> None:
        one = leasefile(tmp_path, terms=SHORT)
        await one.join()
        for name in names:
            assert await one.swap(name, Stored(), held_by("a"))
        for data in (tmp_path / "names").glob("*/data~*"):
            data.write_text("damaged")

        async def freed(names: list[str]) -> int:
            count = 0
            for name in names:
                with suppress(DamagedError):
                    count += (await one.read(name)).record == NameRecord(broken=(one.node,))
            return count

        assert await freed(names) == 0
        await trio.sleep(SHORT.gone_seconds)
        await one.join()
        latest = names[-most:]
        assert await freed(latest) == len(latest)

    trio.run(scenario, clock=without_threads(monkeypatch))


def unreadable(monkeypatch: pytest.MonkeyPatch, data: Path, number: int) -> None:
    """Have a file fail when it is opened."""

    def fail(path: str, mode: str = "r", **options: str) -> TextIO:
        if path == str(data):
            raise OSError(number, os.strerror(number), path)
        return open(path, mode, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(files_module, "open", fail, raising=False)


def test_a_notice_that_cannot_be_read_hides_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it for ever, as of a directory that a NAS has made, or at the moment: then it is heard later."""
    files = files_module.Files(str(tmp_path), {}, lambda _identity: False)
    files.join("node")
    names = [f"name{number}" for number in range(10)]
    wanted = tmp_path / "nodes" / "node" / "wanted"
    (wanted / "@eaDir").mkdir()
    for name in names:
        files.notify("node", name)
    with monkeypatch.context() as patch:
        unreadable(patch, wanted / files_module.directory_of("name5"), errno.EIO)
        assert sorted(files.notices("node")) == [name for name in names if name != "name5"]
        assert files.notices("node") == []
    assert files.notices("node") == ["name5"]
    assert files.notices("node") == [] and os.listdir(wanted) == ["@eaDir"]


def test_a_notice_that_cannot_be_removed_is_heard_once_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be heard again and again, without a pause."""
    files = files_module.Files(str(tmp_path), {}, lambda _identity: False)
    files.join("node")
    files.notify("node", "name")
    unlink = os.unlink

    def fail(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def unlink_unanswered(path: str) -> None:
        """As a client that repeats what it got no answer to."""
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", fail)
    assert files.notices("node") == []
    monkeypatch.setattr(os, "unlink", unlink_unanswered)
    assert files.notices("node") == ["name"]
    assert files.notices("node") == []


def test_a_record_whose_data_are_missing_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a repair of the filesystem: it stays so, and is nobody's once all are gone that could be on it."""

    async def scenario() -> None:
        one, two = leasefile(tmp_path, terms=SHORT), leasefile(tmp_path, terms=SHORT)
        await two.join()
        assert await two.swap("name", Stored(), held_by(two.node))
        (data,) = (tmp_path / "names").glob("*/data~*")
        data.unlink()
        await one.join()
        with pytest.raises(DamagedError, match="cannot be read") as caught:
            await one.read("name")
        assert set(caught.value.stored.record.broken) == {one.node, two.node}
        assert await one.all_names() == ["name"]
        assert await two.all_names() == [f"{NAMELESS}{data.parent}"]
        await two.leave()
        await trio.sleep(SHORT.gone_seconds)
        await one.join()
        assert (await one.read("name")).record.broken == (one.node,)

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EACCES])
def test_a_record_that_the_disk_has_lost_is_for_an_operator_alone(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another node may still read it, or this one later.  What is only not allowed is not lost."""

    async def scenario() -> None:
        one, two = leasefile(tmp_path, terms=SHORT), leasefile(tmp_path, terms=SHORT)
        await two.join()
        assert await two.swap("name", Stored(), held_by(two.node))
        (data,) = (tmp_path / "names").glob("*/data~*")
        await two.leave()
        await one.join()
        unreadable(monkeypatch, data, number)
        for _ in range(3):
            with pytest.raises((BackendError, OSError), match=os.strerror(number)) as caught:
                await one.read("name")
            await trio.sleep(2 * SHORT.gone_seconds)
            await one.join()
        assert isinstance(caught.value, DamagedError) == (number != errno.EACCES)
        assert len(await one.all_names()) == 1
        if isinstance(caught.value, DamagedError):
            stored = await one.swap("name", caught.value.stored, held_by("a"))
            assert stored is not None and await one.read("name") == stored

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("damage", ["damaged", "[" * 5000], ids=lambda damage: damage[:7])
def test_names_whose_records_are_damaged_are_listed(damage: str, tmp_path: Path) -> None:
    """By their places where nobody has known the names."""

    async def scenario() -> None:
        one, two = leasefile(tmp_path), leasefile(tmp_path)
        await one.join()
        await two.join()
        for name in ("name", "whole"):
            assert await one.swap(name, Stored(), held_by("a"))
        home = tmp_path / "names" / files_module.directory_of("name")
        (data,) = home.glob("data~*")
        data.write_text(damage)
        with pytest.raises(DamagedError):
            await one.read("name")
        assert set(await one.all_names()) == {"name", "whole"}
        assert set(await two.all_names()) == {f"{NAMELESS}{home}", "whole"}

    trio.run(scenario)


def test_a_record_of_another_version_is_not_damaged(tmp_path: Path) -> None:
    """Whoever took it for that would put another into its place."""

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        assert await one.swap("name", Stored(), held_by("a"))
        (data,) = (tmp_path / "names").glob("*/data~*")
        data.write_text('{"name": "name", "record": {"format": 99}}')
        with pytest.raises(UnreadableError, match=r"'name'.*another version") as caught:
            await one.read("name")
        assert not isinstance(caught.value, DamagedError)
        assert await one.all_names() == ["name"]

    trio.run(scenario)


def test_a_record_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, name=name, real=real: (steps.append(name), real(*arguments)))

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None and await one.swap("name", first, held_by("b"))
        assert steps == 2 * ["fsync", "rename"]

    trio.run(scenario)


def everything_in(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


def test_a_record_for_which_there_is_no_space_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again and again, by all who wait."""

    def fail(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def scenario() -> None:
        one = leasefile(tmp_path)
        await one.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        before = everything_in(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            for name, old in (("name", first), ("other", Stored())):
                with pytest.raises(BackendError, match="No space"):
                    await one.swap(name, old, held_by("b"))
        assert everything_in(tmp_path) == before
        assert await one.swap("name", first, held_by("b"))

    trio.run(scenario)


@pytest.mark.parametrize("appears", [False, True])
def test_a_directory_that_is_not_mounted_is_not_one_without_records(
    appears: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`umount -l` and a new mount, at any moment: no record is taken for none, and no node for gone."""

    async def scenario() -> None:
        place, away = tmp_path / "place", tmp_path / "away"
        one, other = leasefile(place), leasefile(place)
        await one.join()
        await other.join()
        stored = await one.swap("name", Stored(), held_by("a"))
        place.rename(away)
        real_exists = os.path.exists

        def exists(path: str) -> bool:
            if appears and away.exists():
                away.rename(place)
            return real_exists(path)

        monkeypatch.setattr(os.path, "exists", exists)
        if appears:
            assert await one.read("name") == stored
            return
        for ask in (one.read("name"), one.swap("name", Stored(), held_by("b")), one.is_current("name", Stored())):
            with pytest.raises(BackendError):
                await ask
        with pytest.raises(BackendError):
            await one.renew()
        with pytest.raises(BackendError):
            await one.gone([other.node])
        away.rename(place)
        await one.renew()
        assert await one.read("name") == stored
        assert await one.gone([other.node]) == set()

    trio.run(scenario)


def test_a_node_that_was_listed_while_it_was_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps what it has listed, until it changes the directory itself, does not take it for gone."""
    mine, other = (files_module.Files(str(tmp_path), {}, lambda _identity: False) for _ in range(2))
    other.join("node")
    kept, real_list, real_anew = {str(tmp_path / "nodes" / "node"): ["process"]}, os.listdir, mine.look_anew

    def look_anew(directory: str) -> None:
        kept.pop(directory, None)
        real_anew(directory)

    monkeypatch.setattr(os, "listdir", lambda path: kept.get(path) or real_list(path))
    monkeypatch.setattr(mine, "look_anew", look_anew)
    assert mine.heartbeat("node") == "0"


@pytest.mark.parametrize("foreign", [".DS_Store", ".nfs0123456789abcdef", "0123"])
@pytest.mark.parametrize("native_too", [False, True])
def test_what_others_put_beside_nodes_and_names_is_none(native_too: bool, foreign: str, tmp_path: Path) -> None:
    """All the rest is looked at and tidied up as without it."""

    async def scenario() -> None:
        other = leasefile(tmp_path, "other")
        await other.join()
        assert await other.swap("name", Stored(), held_by("a"))
        for part in ("nodes", "names", "new"):
            (tmp_path / part / foreign).write_text("not ours")
        one = native(tmp_path) if native_too else leasefile(tmp_path, "one", {"other"})
        await one.join()
        await one.tidy_up()
        assert native_too or await one.gone([other.node]) == {other.node}
        assert await one.all_names() == ["name"] == await one.some_names(10)
        assert sorted(one.files.nodes()) == sorted([one.node, other.node])

    trio.run(scenario)


@pytest.mark.parametrize("native_too", [False, True])
def test_what_clients_are_made_to_look_anew_by_is_no_node(native_too: bool, tmp_path: Path) -> None:
    """A node that died between making and removing it leaves it there."""

    async def scenario() -> None:
        await leasefile(tmp_path).join()
        for part in ("nodes", "names"):
            (tmp_path / part / f"{files_module.LOOK}0123abcd").touch()
        one = native(tmp_path) if native_too else leasefile(tmp_path)
        await one.join()
        assert await one.all_names() == []

    trio.run(scenario)


def test_a_heartbeat_that_a_client_remembers_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has renewed its lease behind a listing, and then died, is gone when lease and delay are over."""
    kept: dict[str, list[str]] = {}
    real_list, real_anew = os.listdir, files_module.Files.look_anew

    def look_anew(directory: str) -> None:
        real_anew(directory)
        kept.pop(directory, None)

    async def scenario() -> None:
        one = leasefile(tmp_path, terms=SHORT)
        two = LeasefileBackend(replace(site(tmp_path, terms=SHORT), stale_listings=True))
        await one.join()
        await two.join()
        home = str(tmp_path / "nodes" / one.node)
        monkeypatch.setattr(files_module.Files, "look_anew", staticmethod(look_anew))
        monkeypatch.setattr(
            os,
            "listdir",
            lambda path: kept.setdefault(path, real_list(path)) if path == home else real_list(path),
        )
        assert await two.gone([one.node]) == set()
        os.rename(f"{home}/0", f"{home}/1")  # its renewal, on a client of its own
        assert await two.gone([one.node]) == set()
        await trio.sleep(SHORT.gone_seconds)
        assert await two.gone([one.node]) == {one.node}

    trio.run(scenario, clock=without_threads(monkeypatch))
