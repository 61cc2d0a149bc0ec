"""Lock records and leases in etcd (version 3.4 and later).

    PREFIX/id                 which etcd this is: made at random by the first node that joins, and never changed
    PREFIX/names/NAME         the record of a name; its version is the key's mod_revision
    PREFIX/nodes/NODE         goes with the node's lease (value: which process it is, and the lease)
    PREFIX/ended/NODE         a node that has left, or whose process has died: nobody waits for its lease
    PREFIX/wanted/NODE/NAME   what others want of a node
    PREFIX/answer/NODE/NAME   what a node has answered to a question, until it is taken

A swap is a transaction that also asks whether the node's own key is still there: a node that has lost its lease cannot
change a record, whatever its clock says.  So is a look whether others are gone: of those that are in another etcd than
this node nobody knows anything there.

etcd's own cluster_id does not tell two of them apart: it is made of URLs and a token, which are the same by default.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from safefs.cluster.backend import (
    Admit,
    BackendError,
    DamagedError,
    HasDied,
    LeaseLostError,
    ProcessIdentity,
    Stored,
    UnreadableError,
)
from safefs.cluster.etcd_client import Access, Answer, EtcdClient, RefusedError, Watch, decode, encode, prefix_end
from safefs.cluster.record import ForeignRecordError, NameRecord
from safefs.errors import MALFORMED, NOT_JSON
from safefs.lease import OwnLease, Terms, boottime

log = logging.getLogger(__name__)

NOTICE_SECONDS = 5.0  # after so long without a notice it is looked whether the watch has missed one
ENDED_SECONDS = 3600  # how long it is remembered that a node has ended
MOST_MISSING = 10_000  # nodes of which it is remembered since when they have no key
ENTRIES_AT_ONCE = 1000  # in one answer
NODES_AT_ONCE = 50  # in one question: etcd takes 128 operations in a transaction, if it has not been told otherwise

NOT_THERE = "the lease of this node has ended in etcd, or what answers is another etcd"


class EtcdBackend:
    """One node's view (backend.LockBackend)."""

    tells_changes = True

    def __init__(
        self,
        access: Access,
        prefix: str,
        terms: Terms,
        identity: ProcessIdentity,
        has_died: HasDied,
        admit: Admit | None = None,
    ) -> None:
        self._client = EtcdClient(access)
        self._prefix = prefix.encode("utf-8", "surrogateescape").rstrip(b"/") + b"/"
        self._terms = terms
        self._identity = identity
        self._has_died = has_died
        self._admit = admit
        self._etcd = ""  # the id of the one that this node was admitted to
        self._lease = OwnLease(terms)
        self._lease_id = ""
        self._listening = trio.CancelScope()  # for notices
        self._notices: Notices | None = None
        self._notice: Answer | None = None  # the last one that was given
        self._missing: dict[str, float] = {}  # nodes without a key, and since when this node knows it
        self._not_before = float("-inf")  # may this node join again
        # Where the names begin that are looked at next; nodes that are mounted together begin at different ones.
        self._swept = self._key("names", secrets.token_hex(1))
        self.node = ""

    def _key(self, kind: str, *parts: str) -> bytes:
        return self._prefix + "/".join((kind, *parts)).encode("utf-8", "surrogateescape")

    # --------------------------------------------------------------- leases

    async def join(self) -> None:
        """Become a node of the cluster, with a new name."""
        if (left := self._not_before - boottime()) > 0:
            raise BackendError(f"etcd has forgotten leases that may hold: no new one for {math.ceil(left)} s")
        etcd = await self._be_admitted()
        await self._end_the_dead()
        node, sent = secrets.token_hex(8), boottime()
        granted = await self._client.call("/v3/lease/grant", {"TTL": str(math.ceil(self._terms.lease_seconds))})
        value = json.dumps({"process": dict(self._identity), "lease": granted["ID"]}).encode()
        same = {"key": encode(self._key("id")), "target": "VALUE", "result": "EQUAL", "value": encode(etcd)}
        put = {"key": encode(self._key("nodes", node)), "value": encode(value), "lease": granted["ID"]}
        answer = await self._client.call("/v3/kv/txn", {"compare": [same], "success": [{"request_put": put}]})
        if not answer.get("succeeded"):
            raise BackendError("etcd has another id than a moment ago: it was started without its data, or is another")
        self.node, self._lease_id = node, str(granted["ID"])
        self._lease.renew(sent)
        self._listening.cancel()  # for notices to the name that this node had before

    async def _be_admitted(self) -> bytes:
        """The id of this etcd.  Its nodes are on record with it as long as what they have there may count.

        So it is withdrawn also where etcd cannot be reached: an etcd that takes the place of one that is lost for good
        is joined by the others once this node has given up.
        """
        if self._etcd and self._may_have_locks_until() <= boottime():
            await self._tell("")
        etcd = await self._id()
        if etcd.decode() != self._etcd:
            if self._etcd:
                raise BackendError("this is another etcd, and the lease that this node had in the one before may hold")
            await self._tell(etcd.decode())
        return etcd

    def _may_have_locks_until(self) -> float:
        return self._lease.ends() + self._terms.delay_seconds

    async def _tell(self, etcd: str) -> None:
        if self._admit is not None:
            await self._admit(etcd)
        self._etcd = etcd

    async def _id(self) -> bytes:
        """Which etcd this is; made where there is none."""
        key = encode(self._key("id"))
        none = {"key": key, "target": "VERSION", "result": "EQUAL", "version": "0"}
        put = {"request_put": {"key": key, "value": encode(secrets.token_hex(8).encode())}}
        look = {"request_range": {"key": key}}
        request = {"compare": [none], "success": [put, look], "failure": [look]}
        answer = await self._client.call("/v3/kv/txn", request, changes=False)  # twice is as good as once
        found = _value(answer["responses"][-1]["response_range"].get("kvs", []))
        if not found or not found.isalnum():
            raise BackendError(f"what is in etcd at {self._key('id')!r} is none of safefs's")
        return found

    async def renew(self) -> None:
        """Renew the lease; LeaseLostError when it is over."""
        sent = boottime()
        if not self._lease.holds(sent):
            raise LeaseLostError("the lease was not renewed in time")
        answer = await self._client.call("/v3/lease/keepalive", {"ID": self._lease_id}, changes=False)
        if not int(answer.get("result", {}).get("TTL", 0)) or not await self._get(self._key("nodes", self.node)):
            # Before its time.  If etcd was started without its data, it has forgotten the leases of others as well, who
            # go on until they notice: whoever joined now would find what they have free.
            self._not_before = boottime() + self._terms.gone_seconds
            raise LeaseLostError("the lease has ended in etcd")
        self._lease.renew(sent)

    async def leave(self) -> None:
        """End this node's own lease: what it held is free at once, so nothing more is done under it from now on."""
        self._lease = OwnLease(self._terms)
        await self._end(self.node, self._lease_id)
        await self._client.aclose()

    def lease_ends(self) -> float:
        return self._lease.ends()

    async def _end(self, node: str, lease: str) -> None:
        try:
            remembered = await self._client.call("/v3/lease/grant", {"TTL": str(ENDED_SECONDS)})
            await self._put(self._key("ended", node), b"", str(remembered["ID"]))
        except RefusedError as error:
            log.info("others wait for what %s had: %s", node, error)  # for the delay, where etcd has no space left
        await self._forget_wanted(node)
        try:
            await self._client.call("/v3/lease/revoke", {"ID": lease})
        except RefusedError as error:
            if error.status != 404:
                raise

    async def _forget_wanted(self, node: str) -> None:
        """What others wanted of a node that is gone would stay as long as they live."""
        prefix = self._key("wanted", node, "")
        request = {"key": encode(prefix), "range_end": encode(prefix_end(prefix))}
        await self._client.call("/v3/kv/deleterange", request, changes=False)

    async def _end_the_dead(self) -> None:
        """Nodes whose processes have died on this host: a daemon that is started again does not wait for itself."""
        prefix = self._key("nodes", "")
        for entry in await self._range(prefix, prefix_end(prefix)):
            node = decode(entry["key"])[len(prefix) :].decode("utf-8", "replace")
            await self._end_if_dead(node, _value([entry]))

    async def _end_if_dead(self, node: str, value: bytes | None) -> bool:
        """End a node whose process is known to have died, by what it has on record."""
        process, lease = _node(value)
        died = bool(process) and self._has_died(process)
        if died:
            await self._end(node, lease)
        return died

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        ended, due = set(), list(nodes)
        while due:
            some, due = due[:NODES_AT_ONCE], due[NODES_AT_ONCE:]
            for node, (is_over, value) in zip(some, await self._states(some), strict=True):
                if is_over or await self._is_gone(node, value):
                    ended.add(node)
        return ended

    async def _states(self, nodes: list[str]) -> list[tuple[bool, bytes | None]]:
        """Of each node: whether it is known to have ended, and what it has on record as long as its lease holds."""
        keys = [self._key(kind, node) for node in nodes for kind in ("ended", "nodes")]
        looks = [{"request_range": {"key": encode(key)}} for key in keys]
        request = {"compare": [self._is_there(self.node)], "success": looks}
        answer = await self._client.call("/v3/kv/txn", request, changes=False)
        if not answer.get("succeeded"):
            raise BackendError(NOT_THERE)
        found = [_value(response["response_range"].get("kvs", [])) for response in answer["responses"]]
        return [(over is not None, value) for over, value in zip(found[::2], found[1::2], strict=True)]

    def _is_there(self, node: str) -> dict[str, str]:
        """To compare in a transaction: a node's lease holds, in this etcd."""
        return {"key": encode(self._key("nodes", node)), "target": "VERSION", "result": "GREATER", "version": "0"}

    async def _is_gone(self, node: str, value: bytes | None) -> bool:
        if value is not None:
            self._missing.pop(node, None)
            return await self._end_if_dead(node, value)
        # etcd's clock ended the lease; the delay is for what the node began before.
        is_gone = boottime() - self._missing.setdefault(node, boottime()) >= self._terms.delay_seconds
        while len(self._missing) > MOST_MISSING:
            del self._missing[next(iter(self._missing))]
        if is_gone:
            await self._forget_wanted(node)
        return is_gone

    # -------------------------------------------------------------- records

    async def read(self, name: str) -> Stored:
        key = self._key("names", name)
        answer = await self._client.call("/v3/kv/range", {"key": encode(key)}, changes=False)
        try:
            return _stored(answer.get("kvs", []), answer["header"]["revision"])
        except UnreadableError as error:
            what = f"etcd: the record of {name!r} cannot be read: {error}"
            if not isinstance(error, DamagedError):
                raise UnreadableError(what) from None
            # Whoever comes later cannot be on it: it is as it is until it is replaced.
            broken = NameRecord(broken=tuple(await self._nodes()))
            raise DamagedError(what, replace(error.stored, record=broken)) from None

    async def _nodes(self) -> list[str]:
        """All whose leases hold."""
        prefix = self._key("nodes", "")
        entries = await _entries(self._client, prefix, prefix_end(prefix), keys_only=True)
        return [decode(entry["key"])[len(prefix) :].decode("utf-8", "replace") for entry in entries]

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        key, mine = encode(self._key("names", name)), self._is_there(self.node)
        value = encode(json.dumps(new.to_json()).encode())
        change: dict[str, Any] = {"request_put": {"key": key, "value": value}}
        if not new:
            change = {"request_delete_range": {"key": key}}
        answer = await self._client.call(
            "/v3/kv/txn",
            {
                "compare": [
                    {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(old.version)},
                    mine,
                ],
                "success": [change],
                "failure": [{"request_range": {"key": mine["key"]}}],
            },
        )
        revision = answer["header"]["revision"]
        if answer.get("succeeded"):
            return Stored(int(revision) if new else 0, new, revision)
        if not answer["responses"][0]["response_range"].get("kvs"):
            raise BackendError(NOT_THERE)
        return None

    async def tidy_up(self) -> None:
        """Nothing stays."""
        await trio.lowlevel.checkpoint()

    async def all_names(self) -> list[str]:
        prefix = self._key("names", "")
        entries = await _entries(self._client, prefix, prefix_end(prefix), keys_only=True)
        return _names(prefix, entries)

    async def some_names(self, most: int) -> list[str]:
        prefix = self._key("names", "")
        entries = await _page(self._client, self._swept or prefix, prefix_end(prefix), most, keys_only=True)
        self._swept = _after(entries[-1]) if len(entries) == most else b""
        return _names(prefix, entries)

    async def process_of(self, node: str) -> ProcessIdentity:
        return _node(await self._get(self._key("nodes", node)))[0]

    async def discard(self, name: str, stored: Stored) -> None:
        """An empty record has no key."""
        await trio.lowlevel.checkpoint()
        assert not stored.record, name

    async def is_current(self, name: str, stored: Stored) -> bool:
        return (await self.read(name)).version == stored.version

    def follow(self, name: str) -> Following:
        return Following(self._client, self._key("names", name), partial(self.read, name))

    # -------------------------------------------------------------- notices

    async def notify(self, node: str, name: str) -> None:
        """Only while the node is there: nobody else would clear it away before this node's own lease ends."""
        put = {"key": encode(self._key("wanted", node, name)), "lease": self._lease_id}
        request = {"compare": [self._is_there(node)], "success": [{"request_put": put}]}
        await self._client.call("/v3/kv/txn", request, changes=False)  # twice is as good as once

    def expect_notices(self) -> None:
        """They are told."""

    def rest(self, rests: bool) -> None:
        """There is nothing to rest from."""

    async def next_notice(self) -> str:
        while True:
            self._listening = trio.CancelScope()
            with self._listening:
                try:
                    return await self._take_notice()
                except BaseException:
                    await self._stop_listening()
                    raise

    async def _take_notice(self) -> str:
        await self._clear_notice()
        prefix = self._key("wanted", self.node, "")
        if self._notices is None or self._notices.prefix != prefix:
            await self._stop_listening()
            self._notices = Notices(self._client, prefix)
        self._notice = await self._notices.next()
        return decode(self._notice["key"])[len(prefix) :].decode("utf-8", "surrogateescape")

    async def _clear_notice(self) -> None:
        """The last one has been heard by now.  Unless it came again since, it goes."""
        notice, self._notice = self._notice, None
        if notice is not None:
            same = {"key": notice["key"], "target": "MOD", "result": "EQUAL", "mod_revision": notice["mod_revision"]}
            gone = {"request_delete_range": {"key": notice["key"]}}
            await self._client.call("/v3/kv/txn", {"compare": [same], "success": [gone]})

    async def answer(self, question: str, text: str) -> None:
        await self._put(self._key("answer", self.node, question), text.encode(), self._lease_id)

    async def take_answer(self, node: str, question: str) -> str | None:
        key = self._key("answer", node, question)
        text = await self._get(key)
        if text is None:
            return None
        await self._client.call("/v3/kv/deleterange", {"key": encode(key)})
        return text.decode()

    async def _stop_listening(self) -> None:
        notices, self._notices = self._notices, None
        if notices is not None:
            await notices.aclose()

    # ---------------------------------------------------------------- keys

    async def _get(self, key: bytes) -> bytes | None:
        return _value(await self._range(key))

    async def _range(self, key: bytes, end: bytes = b"") -> list[dict[str, Any]]:
        return await _entries(self._client, key, end)

    async def _put(self, key: bytes, value: bytes, lease: str) -> None:
        await self._client.call("/v3/kv/put", {"key": encode(key), "value": encode(value), "lease": lease})


class Following:
    """One record, for as long as this node has to do with it (backend.Follower)."""

    def __init__(self, client: EtcdClient, key: bytes, read: Callable[[], Awaitable[Stored]]) -> None:
        self._client = client
        self._key = key
        self._read = read
        self._watch: Watch | None = None
        self._unknown_before = 0  # this revision: what happened then was not told

    async def next_change(self, seen: Stored, seconds: float, _turns: int = 0) -> Stored | None:
        if self._watch is None and not self._client.may_watch():
            now = await self._read()  # what it is waited for may have been
            if now.version != seen.version:
                return now
            await trio.sleep(seconds)  # and then whoever waits reads it again
            return None
        try:
            latest = await self._begin(seen)  # in its own time: on a busy machine it would never be done otherwise
            if latest is None:
                with trio.move_on_after(seconds):
                    latest = await self._hear(seen)
        except BackendError:
            await self.aclose()
            raise
        return latest

    async def _begin(self, seen: Stored) -> Stored | None:
        """Have a watch; the record if it has changed since it was seen, and that was not told."""
        if self._watch is None:
            self._watch = await self._client.watch(self._key)
            self._unknown_before = self._watch.begins_after
        if int(seen.token or 0) >= self._unknown_before:
            return None
        latest = await self._read()
        self._unknown_before = 0
        return None if latest.version == seen.version else latest

    async def _hear(self, seen: Stored) -> Stored:
        assert self._watch is not None
        while True:
            event = (await self._watch.events())[-1]
            revision = event["kv"]["mod_revision"]
            # Others can have been under way while this node read or wrote a later one.
            if int(revision) > int(seen.token or 0):
                try:
                    return _stored([] if event.get("type") == "DELETE" else [event["kv"]], revision)
                except UnreadableError:
                    return await self._read()  # which says it better

    async def aclose(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            await watch.aclose()


class Notices:
    """What others want of a node."""

    def __init__(self, client: EtcdClient, prefix: bytes) -> None:
        self.prefix = prefix
        self._client = client
        self._watch: Watch | None = None
        self._entries: deque[Answer] = deque()

    async def next(self) -> Answer:
        """The key of the next one, as it is there."""
        while not self._entries:
            self._entries.extend(await self._listen())
        return self._entries.popleft()

    async def _listen(self) -> list[Answer]:
        if self._watch is None:
            self._watch = await self._client.watch(self.prefix, prefix_end(self.prefix))
            return await _entries(self._client, self.prefix, prefix_end(self.prefix))
        with trio.move_on_after(NOTICE_SECONDS):
            return [event["kv"] for event in await self._watch.events() if event.get("type") != "DELETE"]
        await self.aclose()  # and look whether it has missed any
        return []

    async def aclose(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            await watch.aclose()


async def _entries(client: EtcdClient, key: bytes, end: bytes = b"", *, keys_only: bool = False) -> list[Answer]:
    """What is there under a key, or under all up to `end`: each as it was when its page was asked for."""
    entries: list[Answer] = []
    while True:
        page = await _page(client, key, end, ENTRIES_AT_ONCE, keys_only=keys_only)
        entries += page
        if len(page) < ENTRIES_AT_ONCE:
            return entries
        key = _after(page[-1])


async def _page(client: EtcdClient, key: bytes, end: bytes, most: int, *, keys_only: bool) -> list[Answer]:
    """The first entries of a range, so many at most."""
    request: dict[str, Any] = {"key": encode(key), "keys_only": keys_only, "limit": str(most)}
    if end:
        request["range_end"] = encode(end)
    answer = await client.call("/v3/kv/range", request, changes=False)
    return list(answer.get("kvs", []))


def _after(entry: Answer) -> bytes:
    """The first key that comes after an entry's."""
    return decode(entry["key"]) + b"\0"


def _names(prefix: bytes, entries: list[Answer]) -> list[str]:
    """What the keys have after the prefix."""
    return [decode(entry["key"])[len(prefix) :].decode("utf-8", "surrogateescape") for entry in entries]


def _value(entries: list[Answer]) -> bytes | None:
    return decode(entries[0].get("value", "")) if entries else None


def _node(value: bytes | None) -> tuple[ProcessIdentity, str]:
    """Which process a node is, and its lease, by what it has on record; empty where that says neither."""
    try:
        known = json.loads(value or b"")
        return dict(known["process"]), str(known["lease"])
    except MALFORMED:
        return {}, ""


def _stored(entries: list[dict[str, Any]], revision: str) -> Stored:
    """What is under the key of a name.  Of who could be on a record that is damaged this knows nothing."""
    if not entries:
        return Stored(token=revision)
    version = int(entries[0]["mod_revision"])
    try:
        record = NameRecord.from_json(json.loads(_value(entries) or b""))
    except ForeignRecordError as error:
        raise UnreadableError(str(error)) from None
    except NOT_JSON as error:
        raise DamagedError(str(error), Stored(version, token=revision)) from None
    return Stored(version, record, revision)
