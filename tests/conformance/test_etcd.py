"""etcd alone: members that fail, hang or forget who has signed in, and clients that may not come in."""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from safefs.cluster import etcd as etcd_module
from safefs.cluster import etcd_client as etcd_client_module
from safefs.cluster.backend import BackendError, DamagedError, LeaseLostError, Stored, UnreadableError
from safefs.cluster.etcd import EtcdBackend, _entries
from safefs.cluster.etcd_client import (
    MAX_IDLE,
    Access,
    Answer,
    Endpoint,
    RefusedError,
    Watch,
    decode,
    encode,
    prefix_end,
)
from safefs.cluster.record import NameRecord
from safefs.lease import Terms, boottime
from safefs.locktable import Kind, Mode
from tests.conformance.test_backends import CALM, ETCD_TERMS, access_of, etcd_node, held_by
from tests.support.etcd import PASSWORD, PREFIX, TOKEN_SECONDS, USER, Etcd, etcd
from tests.unit.test_names import Node

SECONDS = 60.0


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Etcd]:
    with etcd(tmp_path, 3) as server:
        yield server


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd"), tls=True, user=True) as server:
        yield server


def play(
    scenario: Callable[[EtcdBackend, EtcdBackend], Awaitable[None]],
    access: Access,
    terms: Terms = CALM,
) -> None:
    prefix = PREFIX + secrets.token_hex(4)

    async def main() -> None:
        one, two = (etcd_node(access, prefix, terms) for _ in range(2))
        with trio.fail_after(SECONDS):
            await one.join()
            await two.join()
            await scenario(one, two)

    trio.run(main)


async def written(node: EtcdBackend, record: NameRecord) -> None:
    """The outcome of a swap that was on its way to a member that failed is not known: who sent it reads again."""
    while True:
        with suppress(BackendError):
            if await node.swap("name", await node.read("name"), record):
                return


@pytest.mark.parametrize("how", ["kill", "pause"])
@pytest.mark.parametrize("which", ["leader", "follower"])
def test_a_member_that_fails(three: Etcd, how: str, which: str) -> None:
    """Others answer in its place: whether it is gone, or takes connections and never answers."""
    leader = three.leader()
    followers = [member for member in three.members if member is not leader]
    bad = leader if which == "leader" else followers[0]
    access = access_of(three)
    at = three.members.index(bad)
    # The one that fails is the one that was asked so far.
    access = replace(access, endpoints=access.endpoints[at:] + access.endpoints[:at])

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        assert await one.swap("name", Stored(), held_by("a"))
        getattr(bad, how)()
        try:
            for count in range(10):
                await written(one, held_by(str(count)))
            assert (await two.read("name")).record == held_by("9")
        finally:
            bad.resume()

    play(scenario, access)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_lease_outlives_the_member_that_renewed_it(three: Etcd, how: str) -> None:
    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        bad = three.leader()
        getattr(bad, how)()
        try:
            end, looks = trio.current_time() + 1.5 * ETCD_TERMS.gone_seconds, 0
            while trio.current_time() < end:
                for node in (one, two):
                    with suppress(BackendError):
                        await node.renew()
                with suppress(BackendError):
                    assert await one.gone([two.node]) == set()
                    looks += 1
                await trio.sleep(0.1)
            assert looks > 1  # the first begins the delay
            await two.renew()
        finally:
            bad.resume()

    play(scenario, access_of(three), ETCD_TERMS)


def test_a_change_is_noticed_through_a_member_that_failed(three: Etcd) -> None:
    """Who waits for a change waits at another member."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        three.members[0].kill()

        async def change() -> None:
            await written(two, held_by("b"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            latest = await one.follow("name").next_change(first, SECONDS)
        assert latest is not None and latest.record == held_by("b")

    leads = three.leader()
    if leads is three.members[0]:
        three.members.reverse()
    play(scenario, access_of(three))


@dataclass
class Firewall:
    """A way to a port that forgets, without a word, which connections went through it; new ones go through."""

    port: int
    forgotten: int = 0

    async def serve(self, near: trio.SocketStream) -> None:
        began = self.forgotten
        far = await trio.open_tcp_stream("127.0.0.1", self.port)

        async def carry(source: trio.SocketStream, target: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async for data in source:
                    if self.forgotten == began:
                        await target.send_all(data)

        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(carry, far, near)
            await carry(near, far)
            nursery.cancel_scope.cancel()


def test_kept_connections_that_are_dead(three: Etcd) -> None:
    """All of them at once, to the only endpoint: the lease is renewed all the same, and in one call."""
    (target,) = access_of(replace(three, members=three.members[:1])).endpoints

    async def main() -> None:
        wall = Firewall(target.port)
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, wall.serve, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            node = etcd_node(Access((Endpoint("127.0.0.1", port, tls=False),)), PREFIX)
            await node.join()
            async with trio.open_nursery() as reads:
                for number in range(MAX_IDLE):
                    reads.start_soon(node.read, str(number))
            assert len(node._client._idle) == MAX_IDLE
            wall.forgotten += 1
            await node.renew()
            assert await node.swap("name", Stored(), held_by("a"))
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_member_that_fails_costs_no_connection_to_another(three: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """While those to it are closed, others are asked through the connections that are kept to them."""

    async def main() -> None:
        node = etcd_node(access_of(three), PREFIX)
        await node.join()
        client, (bad, good, _) = node._client, access_of(three).endpoints
        monkeypatch.setattr(client, "_idle", [await client._connect(endpoint) for endpoint in (bad, good)])
        failed, kept = client._idle
        close, taken = failed.aclose, []

        async def close_meanwhile() -> None:
            taken.append(await client._take(good))
            await close()

        monkeypatch.setattr(failed, "aclose", close_meanwhile)
        await client._pass_over(bad)
        assert taken == [kept] and client._idle == []
        assert await kept.send("/v3/maintenance/status", b"{}", {}) == 200
        await kept.aclose()

    trio.run(main)


def test_a_connection_that_is_closed_meanwhile_is_lost(secured: Etcd) -> None:
    """By whomever: that no answer has come is all that whoever asked has to know."""

    async def scenario(one: EtcdBackend, _: EtcdBackend) -> None:
        stored = await one.swap("name", Stored(), held_by("a"))
        assert stored is not None
        for connection in one._client._idle:
            await connection.aclose()
        with pytest.raises(BackendError, match="the connection was lost"):
            await one.swap("name", stored, held_by("b"))
        assert await one.read("name") == stored

    play(scenario, access_of(secured))


def test_an_etcd_that_has_lost_its_data(tmp_path: Path) -> None:
    """Who notices first joins when the leases that etcd knew of are over for all: others may not have noticed yet."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        assert await one.swap("name", Stored(), held_by(one.node))
        await one.renew()
        server.forget()
        with pytest.raises(LeaseLostError):
            await two.renew()
        while True:
            with suppress(BackendError):
                await two.join()
                break
            await trio.sleep(0.05)
        assert boottime() > one.lease_ends()
        assert not (await two.read("name")).record

    with etcd(tmp_path) as server:
        play(scenario, access_of(server), ETCD_TERMS)


async def come_back(node: EtcdBackend) -> None:
    """As the keeper does it; the lease is over, or etcd does not know it."""
    lost = node.node
    with pytest.raises(LeaseLostError):
        await node.renew()
    with trio.fail_after(SECONDS):
        while node.node == lost:
            with suppress(BackendError):
                await node.join()
            await trio.sleep(0.05)


def test_a_node_says_which_etcd_it_joins_as_long_as_it_may_have_locks_there(tmp_path: Path) -> None:
    told: dict[str, list[tuple[str, float]]] = {"one": [], "two": []}

    async def main() -> None:
        nodes: list[EtcdBackend] = []
        prefix = PREFIX + secrets.token_hex(4)
        for each in told.values():

            async def admit(etcd: str, each: list[tuple[str, float]] = each) -> None:
                await trio.lowlevel.checkpoint()
                each.append((etcd, boottime()))

            nodes.append(EtcdBackend(access_of(server), prefix, ETCD_TERMS, {}, lambda _: False, admit))
            await nodes[-1].join()
        (first, _), *more = told["one"]
        assert first and not more
        assert [etcd for etcd, _ in told["two"]] == [first]
        one = nodes[0]
        ends = one.lease_ends()
        server.kill()
        with trio.fail_after(SECONDS):
            while len(told["one"]) < 2:
                with suppress(BackendError):
                    await (one.renew() if boottime() < ends else one.join())
        assert told["one"][1][0] == "" and told["one"][1][1] >= ends + ETCD_TERMS.delay_seconds
        server.restart()
        server.leader()
        await come_back(one)
        assert [etcd for etcd, _ in told["one"]] == [first, "", first]
        del told["one"][1:]
        server.forget()
        await come_back(one)
        assert [etcd for etcd, _ in told["one"]][:2] == [first, ""]
        (second, _) = told["one"][-1]
        assert second not in ("", first)
        assert {etcd for etcd, _ in told["one"][2:]} <= {"", second}

    with etcd(tmp_path) as server:
        trio.run(main)


def test_a_node_that_is_not_admitted_has_no_lease(secured: Etcd) -> None:
    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        async def refuse(_etcd: str) -> None:
            await trio.lowlevel.checkpoint()
            raise BackendError("others are elsewhere", is_final=True)

        nodes = one._key("nodes", "")
        before = len(await one._range(nodes, prefix_end(nodes)))
        prefix = one._prefix.decode()
        third = EtcdBackend(access_of(secured), prefix, CALM, {}, lambda _: False, refuse)
        with pytest.raises(BackendError, match="elsewhere"):
            await third.join()
        assert third.lease_ends() < boottime()
        assert len(await one._range(nodes, prefix_end(nodes))) == before

    play(scenario, access_of(secured))


def test_an_etcd_that_is_started_without_its_data_while_a_node_joins(tmp_path: Path) -> None:
    """What the node was admitted to is not what it would be in."""

    async def main() -> None:
        async def admit(etcd: str) -> None:
            if etcd and not forgotten:
                forgotten.append(etcd)
                await trio.to_thread.run_sync(server.forget)
                other = etcd_node(access_of(server), PREFIX)
                await other.join()

        forgotten: list[str] = []
        node = EtcdBackend(access_of(server), PREFIX, CALM, {}, lambda _: False, admit)
        with pytest.raises(BackendError, match="another id than a moment ago"):
            await node.join()
        assert node.lease_ends() < boottime()
        await node.join()
        assert node.lease_ends() > boottime()

    with etcd(tmp_path) as server:
        trio.run(main)


def test_an_etcd_that_this_node_is_not_in_says_nothing_of_others(tmp_path: Path) -> None:
    """One that is among the endpoints and answers while the members are away: it has a key of nobody."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        server.kill()
        end = trio.current_time() + 3 * CALM.delay_seconds
        while trio.current_time() < end:
            with pytest.raises(BackendError, match="another etcd"):
                await one.gone([two.node])
            await trio.sleep(0.05)
        server.restart()
        server.leader()
        stranger.kill()
        assert await one.gone([two.node]) == set()
        await two.renew()

    (tmp_path / "another").mkdir()
    with etcd(tmp_path) as server, etcd(tmp_path / "another") as stranger:
        play(scenario, Access(access_of(server).endpoints + access_of(stranger).endpoints))


def test_a_node_can_leave_an_etcd_without_space(tmp_path: Path) -> None:
    """Nothing more can be written there, but others need not wait for the lease."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        filling = {"key": encode(b"filling"), "value": encode(bytes(1 << 20))}
        refused = None
        while refused is None:
            try:
                await one._client.call("/v3/kv/put", filling)
            except RefusedError as error:
                refused = error
        assert "space exceeded" in str(refused)
        assert one.lease_ends() > boottime()
        await one.leave()
        assert one.lease_ends() < boottime()  # others have what it held from now on
        assert await two.gone([one.node]) == set()
        await trio.sleep(CALM.delay_seconds)
        assert await two.gone([one.node]) == {one.node}

    with etcd(tmp_path, more=["--quota-backend-bytes", str(4 << 20)]) as server:
        play(scenario, access_of(server))


# What it is asked.


# What it is asked.


@pytest.mark.parametrize("leaves", [True, False])
def test_what_was_wanted_of_a_node_goes_with_it(leaves: bool, secured: Etcd) -> None:
    """Else it would stay as long as the nodes that wanted it."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        wanted = two._key("wanted", one.node, "")
        for name in ("a", "b/c"):
            await two.notify(one.node, name)
        assert len(await two._range(wanted, prefix_end(wanted))) == 2
        if leaves:
            await one.leave()
        while not await two.gone([one.node]):
            await two.renew()
            await trio.sleep(0.2)
        assert not await two._range(wanted, prefix_end(wanted))

    play(scenario, access_of(secured), ETCD_TERMS)


def test_names_are_listed_without_their_records(secured: Etcd) -> None:
    async def scenario(one: EtcdBackend, _: EtcdBackend) -> None:
        assert await one.swap("name", Stored(), held_by("a"))
        prefix = one._key("names", "")
        (entry,) = await _entries(one._client, prefix, prefix_end(prefix), keys_only=True)
        assert "value" not in entry
        assert await one.all_names() == ["name"]

    play(scenario, access_of(secured))


@pytest.mark.parametrize("names", [0, 5, 6, 7])
def test_many_names_take_several_answers(secured: Etcd, names: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as come in one, one more, and a whole number of answers."""
    monkeypatch.setattr(etcd_module, "ENTRIES_AT_ONCE", 3)

    async def scenario(one: EtcdBackend, _: EtcdBackend) -> None:
        wanted = {f"name{number}" for number in range(names)}
        for name in wanted:
            assert await one.swap(name, Stored(), held_by("a"))
        found = await one.all_names()
        assert len(found) == names and set(found) == wanted

    play(scenario, access_of(secured))


async def write_over(node: EtcdBackend, value: bytes) -> None:
    await node._client.call("/v3/kv/put", {"key": encode(node._key("names", "name")), "value": encode(value)})


NO_RECORDS = [
    b"",
    b"{",
    b"\xff",
    b"[]",
    b"{}",
    b'{"format": 2}',
    b'{"format": 2, "delegate": "a", "wanted": [], "locks": {}, "broken": ["b"]}',
    b'{"format": 2, "delegate": "", "wanted": ["\\ud800"], "locks": {}, "broken": []}',
    b"[" * 5000,
]


@pytest.mark.parametrize("value", NO_RECORDS, ids=lambda value: repr(value[:80]))
@pytest.mark.parametrize("told", [False, True])
def test_a_value_that_is_no_record_can_be_replaced(value: bytes, told: bool, secured: Etcd) -> None:
    """All whose leases hold could be on it, and hear that it is broken."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        seen = await one.swap("name", Stored(), held_by(two.node))
        assert seen is not None
        follower = one.follow("name")
        if told:
            assert await follower.next_change(seen, 0.1) is None
        await write_over(two, value)
        with pytest.raises(DamagedError, match="'name' cannot be read") as caught:
            await (follower.next_change(seen, SECONDS) if told else one.read("name"))
        stored = caught.value.stored
        assert stored.record == NameRecord(broken=stored.record.broken)
        assert set(stored.record.broken) == {one.node, two.node}
        assert await one.swap("name", stored, held_by("a"))
        assert (await two.read("name")).record == held_by("a")
        assert await two.swap("name", stored, held_by("b")) is None
        await follower.aclose()

    play(scenario, access_of(secured))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b'{"process": "x", "lease": "1"}',
        b'{"process": [1], "lease": "1"}',
        b'{"process": null, "lease": "1"}',
        b'{"process": {"pid": 3}}',
        b"[" * 5000,
    ],
    ids=lambda value: repr(value[:80]),
)
def test_a_node_of_which_nothing_can_be_read_is_not_known_to_have_died(value: bytes, secured: Etcd) -> None:
    """And keeps nobody from joining."""

    async def scenario(one: EtcdBackend, _: EtcdBackend) -> None:
        await one._put(one._key("nodes", "foreign"), value, one._lease_id)
        prefix = one._prefix.decode()
        third = EtcdBackend(access_of(secured), prefix, CALM, {}, lambda identity: identity.get("pid") == 3)
        await third.join()
        assert await third.process_of("foreign") == {}
        assert await third.gone(["foreign"]) == set()
        await one._put(one._key("nodes", "foreign"), b'{"process": {"pid": 3}, "lease": "1"}', one._lease_id)
        assert await third.process_of("foreign") == {"pid": 3}
        assert await third.gone(["foreign"]) == {"foreign"}

    play(scenario, access_of(secured))


def test_a_record_of_another_version_is_not_damaged(secured: Etcd) -> None:
    """Whoever took it for that would put another into its place."""

    async def scenario(one: EtcdBackend, _: EtcdBackend) -> None:
        await write_over(one, b'{"format": 99}')
        with pytest.raises(UnreadableError, match=r"'name'.*another version") as caught:
            await one.read("name")
        assert not isinstance(caught.value, DamagedError)

    play(scenario, access_of(secured))


def note_requests(node: EtcdBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a node asks about records from now on."""
    asked: list[str] = []
    call, watch = node._client.call, node._client.watch

    def note(what: str, key: bytes) -> None:
        if key.startswith(node._key("names", "")):
            asked.append(what)

    async def noted_call(path: str, request: Mapping[str, Any], *, changes: bool = True) -> Answer:
        first = request.get("compare") or [request]
        note(path.rpartition("/")[2], decode(first[0].get("key", "")))
        return await call(path, request, changes=changes)

    async def noted_watch(key: bytes, end: bytes = b"") -> Watch:
        note("watch", key)
        return await watch(key, end)

    monkeypatch.setattr(node._client, "call", noted_call)
    monkeypatch.setattr(node._client, "watch", noted_watch)
    return asked


def test_what_a_hand_over_costs(secured: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transaction.  Whoever waits for it is told, record and all, on a watch that has been there since he waits."""

    async def scenario(*backends: EtcdBackend) -> None:
        one, two = (Node(backend.node, backend) for backend in backends)
        requests = {node.name: note_requests(node.backend, monkeypatch) for node in (one, two)}
        async with trio.open_nursery() as nursery:
            for node in (one, two):
                nursery.start_soon(node.names.run)
            assert await one.acquire("name", 1, Mode.EXCLUSIVE)
            for turn, (holder, waiter) in enumerate(3 * [(one, two), (two, one)]):
                granted = trio.Event()

                async def wait(node: Node, granted: trio.Event) -> None:
                    assert await node.acquire("name", 1, Mode.EXCLUSIVE)
                    granted.set()

                nursery.start_soon(wait, waiter, granted)
                while not holder.names.known("name")[Kind.FLOCK].waiting:  # noqa: ASYNC110 - it is told by etcd
                    await trio.sleep(0.001)
                if turn > 1:  # both have had to do with it for a while
                    assert requests[waiter.name] == ["txn"]  # by which it was put into the queue
                    assert requests[holder.name] == []
                requests[waiter.name].clear()
                requests[holder.name].clear()
                await holder.release("name", 1)
                await granted.wait()
                assert requests[holder.name] == ["txn"]
                assert requests[waiter.name] == []
                requests[holder.name].clear()
            nursery.cancel_scope.cancel()

    play(scenario, access_of(secured))


def test_whoever_waits_for_many_names_has_so_many_connections_and_no_more(
    secured: Etcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other names are looked at now and then, and had all the same."""
    monkeypatch.setattr(etcd_client_module, "MOST_WATCHES", 3)
    names = [f"name{number}" for number in range(8)]

    async def scenario(*backends: EtcdBackend) -> None:
        one, two = (Node(backend.node, backend) for backend in backends)
        most = 0
        async with trio.open_nursery() as nursery:
            for node in (one, two):
                nursery.start_soon(node.names.run)
            for name in names:
                assert await one.acquire(name, 1, Mode.EXCLUSIVE)
            async with trio.open_nursery() as waiting:
                for name in names:
                    waiting.start_soon(two.acquire, name, 1, Mode.EXCLUSIVE)
                for name in names:
                    await trio.sleep(0.2)
                    most = max(most, len(backends[1]._client._watches))
                    await one.release(name, 1)
            nursery.cancel_scope.cancel()
        assert most == 3

    play(scenario, access_of(secured))


def test_who_follows_a_record_misses_nothing(secured: Etcd) -> None:
    """Of what is written before the watch is there, between two waits, and while a wait is cancelled."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        seen = await one.swap("name", Stored(), held_by("0"))
        follower = one.follow("name")
        latest = seen
        for number in range(1, 50):
            assert seen is not None and latest is not None
            latest = await two.swap("name", latest, held_by(str(number)) if number % 7 else NameRecord())
            told = None
            with trio.move_on_after(0.001 * (number % 4)):
                told = await follower.next_change(seen, SECONDS)
            seen = told or await follower.next_change(seen, SECONDS)
            assert seen == latest
            if number % 10 == 0:
                await follower.aclose()
        assert seen is not None and await follower.next_change(seen, 0.01) is None
        await follower.aclose()

    play(scenario, access_of(secured))


def test_a_watch_that_takes_long_to_begin(secured: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than somebody waits, on a busy machine: he has it the next time."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        begun, watch = 0, one._client.watch

        async def slow(key: bytes, end: bytes = b"") -> Watch:
            nonlocal begun
            begun += 1
            await trio.sleep(0.2)
            return await watch(key, end)

        monkeypatch.setattr(one._client, "watch", slow)
        follower = one.follow("name")
        for _ in range(3):
            assert await follower.next_change(first, 0.01) is None
        assert begun == 1
        latest = await two.swap("name", first, held_by("b"))
        assert await follower.next_change(first, SECONDS) == latest
        await follower.aclose()

    play(scenario, access_of(secured))


def test_a_watch_that_etcd_ends(three: Etcd) -> None:
    """Its member is killed, or cut off from a revision that it has forgotten: whoever follows hears of it."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        follower = one.follow("name")
        assert await follower.next_change(first, 0.5) is None
        three.members[one._client._first].kill()
        with pytest.raises(BackendError):
            await follower.next_change(first, SECONDS)
        await written(two, held_by("b"))
        latest = await follower.next_change(first, SECONDS)
        assert latest is not None and latest.record == held_by("b")
        await follower.aclose()

    play(scenario, access_of(three))


# Certificates and passwords.


def test_tokens_that_are_too_old(secured: Etcd) -> None:
    """Signing in lasts for a while only, and a member that starts again has forgotten who did."""

    async def scenario(one: EtcdBackend, two: EtcdBackend) -> None:
        stored = await one.swap("name", Stored(), held_by("a"))
        await trio.sleep(2 * TOKEN_SECONDS + 1)
        assert await two.read("name") == stored
        secured.kill()
        secured.restart()
        secured.leader()
        assert await one.read("name") == stored
        assert stored is not None and await one.swap("name", stored, held_by("b"))

        async def notify() -> None:
            await trio.sleep(2 * TOKEN_SECONDS + 1)
            await two.notify(one.node, "name")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(notify)
            assert await one.next_notice() == "name"

    play(scenario, access_of(secured))


def refusal(access: Access, prefix: str = PREFIX) -> BackendError:
    """What comes of a node that cannot join."""

    async def main() -> None:
        await etcd_node(access, prefix).join()

    with pytest.raises(BackendError) as caught:
        trio.run(main)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def refused(access: Access, prefix: str = PREFIX) -> str:
    """What is said to a node that is not let in."""
    error = refusal(access, prefix)
    assert error.answered
    return str(error)


def test_who_may_not_come_in(secured: Etcd) -> None:
    """And is told why."""
    access = access_of(secured)
    assert "look at -o etcd_user and etcd_password_file" in refused(replace(access, password="guessed"))
    assert "permission denied" in refused(replace(access, user=""))
    assert "all keys below -o etcd_prefix" in refused(access, "/other/")
    for wrong, prefix in ((replace(access, password="guessed"), PREFIX), (access, "/other/")):
        assert refusal(wrong, prefix).is_final
    assert secured.certificates is not None
    without = ssl.create_default_context(cafile=secured.certificates.ca)
    assert "what -o etcd_cert names" in refused(replace(access, tls=without))
    unknown = refused(replace(access, tls=ssl.create_default_context()))
    assert "certificate verify failed" in unknown and "what -o etcd_ca names" in unknown


def test_a_user_where_etcd_wants_none(three: Etcd) -> None:
    error = refusal(replace(access_of(three), user=USER, password=PASSWORD))
    assert error.is_final and "leave out -o etcd_user" in str(error)


def test_http_where_there_is_tls_and_the_other_way_round(secured: Etcd, three: Etcd) -> None:
    (tls,), (plain, *_) = access_of(secured).endpoints, access_of(three).endpoints
    said = refused(Access((replace(tls, tls=False),)))
    assert "does not answer HTTP (does it want https://HOST:PORT, or -o etcd_ca?)" in said
    said = refused(replace(access_of(secured), endpoints=(replace(plain, tls=True),)))
    assert "does it want http://HOST:PORT?" in said


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b"SSH-2.0-none\r\n", "does not answer HTTP"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "answers HTTP 404, and not as etcd does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n17", "answers HTTP 200, and not as etcd does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "answers HTTP 200, and not as etcd does"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"status":"ok"}', "answers HTTP 200, and not as etcd does"),
    ],
)
def test_what_is_no_etcd(says: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert why in refused(Access((Endpoint("127.0.0.1", server.getsockname()[1], tls=False),)))
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "ü..", "☃.net"])
def test_what_is_no_name_of_a_host(host: str, three: Etcd) -> None:
    """It is said at once; where other endpoints are named, too, these are asked."""
    endpoint = Endpoint(host, 1, tls=False)
    error = refusal(Access((endpoint,)))
    assert str(error) == f"etcd at {host}:1: that is no name of a host" and error.is_final
    access = access_of(three)

    async def main() -> None:
        node = etcd_node(replace(access, endpoints=(endpoint, *access.endpoints)), "/another/")
        await node.join()
        await node.leave()

    trio.run(main)


def test_nobody_there() -> None:
    """Of that it cannot be known what etcd would say."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    error = refusal(Access((Endpoint(*address, tls=False),)))
    assert "cannot be reached" in str(error)
    assert not error.answered and not error.is_final
