"""Lock records and leases in etcd (version 3.4 and later).

    PREFIX/names/NAME         the record of a name; its version is the key's mod_revision
    PREFIX/nodes/NODE         goes with the node's lease (value: which process it is, and the lease)
    PREFIX/ended/NODE         a node that has left, or whose process has died: nobody waits for its lease
    PREFIX/wanted/NODE/NAME   what others want of a node

A swap is a transaction that also asks whether the node's own key is still there: a node that has lost its lease cannot
change a record, whatever its clock says.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable
from typing import Any

import trio

from safefs.cluster.backend import BackendError, HasDied, LeaseLostError, ProcessIdentity, Stored
from safefs.cluster.etcd_client import Access, EtcdClient, RefusedError, decode, encode, prefix_end
from safefs.cluster.record import NameRecord
from safefs.lease import OwnLease, Terms, boottime

NOTICE_SECONDS = 5.0  # how long one watch for notices lasts
ENDED_SECONDS = 3600  # how long it is remembered that a node has ended


class EtcdBackend:
    """One node's view (backend.LockBackend)."""

    def __init__(self, access: Access, prefix: str, terms: Terms, identity: ProcessIdentity, has_died: HasDied) -> None:
        self._client = EtcdClient(access)
        self._prefix = prefix.encode("utf-8", "surrogateescape").rstrip(b"/") + b"/"
        self._terms = terms
        self._identity = identity
        self._has_died = has_died
        self._lease = OwnLease(terms)
        self._lease_id = ""
        self._listening = trio.CancelScope()  # the watch for notices
        self._missing: dict[str, float] = {}  # nodes without a key, and since when this node knows it
        self.node = ""

    def _key(self, kind: str, *parts: str) -> bytes:
        return self._prefix + "/".join((kind, *parts)).encode("utf-8", "surrogateescape")

    # --------------------------------------------------------------- leases

    async def join(self) -> None:
        """Become a node of the cluster, with a new name."""
        await self._end_the_dead()
        node, sent = secrets.token_hex(8), boottime()
        granted = await self._client.call("/v3/lease/grant", {"TTL": str(math.ceil(self._terms.lease_seconds))})
        value = json.dumps({"process": dict(self._identity), "lease": granted["ID"]}).encode()
        await self._put(self._key("nodes", node), value, granted["ID"])
        self.node, self._lease_id = node, str(granted["ID"])
        self._lease.renew(sent)
        self._listening.cancel()  # for notices to the name that this node had before

    async def renew(self) -> None:
        """Renew the lease; LeaseLostError when it is over."""
        sent = boottime()
        if not self._lease.holds(sent):
            raise LeaseLostError("the lease was not renewed in time")
        answer = await self._client.call("/v3/lease/keepalive", {"ID": self._lease_id}, changes=False)
        if not int(answer.get("result", {}).get("TTL", 0)) or not await self._get(self._key("nodes", self.node)):
            raise LeaseLostError("the lease has ended in etcd")
        self._lease.renew(sent)

    async def leave(self) -> None:
        """End this node's own lease: what it held is free at once."""
        await self._end(self.node, self._lease_id)
        await self._client.aclose()

    def lease_ends(self) -> float:
        return self._lease.ends()

    async def _end(self, node: str, lease: str) -> None:
        remembered = await self._client.call("/v3/lease/grant", {"TTL": str(ENDED_SECONDS)})
        await self._put(self._key("ended", node), b"", str(remembered["ID"]))
        try:
            await self._client.call("/v3/lease/revoke", {"ID": lease})
        except RefusedError as error:
            if error.status != 404:
                raise

    async def _end_the_dead(self) -> None:
        """Nodes whose processes have died on this host: a daemon that is started again does not wait for itself."""
        prefix = self._key("nodes", "")
        for entry in await self._range(prefix, prefix_end(prefix)):
            node = decode(entry["key"])[len(prefix) :].decode("utf-8", "replace")
            await self._end_if_dead(node, decode(entry["value"]))

    async def _end_if_dead(self, node: str, value: bytes) -> bool:
        """End a node whose process is known to have died, by what it has on record."""
        try:
            known = json.loads(value)
            died, lease = self._has_died(known["process"]), str(known["lease"])
        except (ValueError, KeyError, TypeError):
            return False
        if died:
            await self._end(node, lease)
        return died

    async def gone(self, nodes: Iterable[str]) -> set[str]:
        ended = set()
        for node in nodes:
            if await self._get(self._key("ended", node)) is not None:
                ended.add(node)
            elif (value := await self._get(self._key("nodes", node))) is not None:
                self._missing.pop(node, None)
                if await self._end_if_dead(node, value):
                    ended.add(node)
            # etcd's clock ended the lease; the delay is for what the node began before.
            elif boottime() - self._missing.setdefault(node, boottime()) >= self._terms.delay_seconds:
                ended.add(node)
        return ended

    # -------------------------------------------------------------- records

    async def read(self, name: str) -> Stored:
        key = self._key("names", name)
        answer = await self._client.call("/v3/kv/range", {"key": encode(key)}, changes=False)
        return _stored(answer.get("kvs", []), answer["header"]["revision"])

    async def swap(self, name: str, old: Stored, new: NameRecord) -> Stored | None:
        key, mine = encode(self._key("names", name)), encode(self._key("nodes", self.node))
        value = encode(json.dumps(new.to_json()).encode())
        change: dict[str, Any] = {"request_put": {"key": key, "value": value}}
        if not new:
            change = {"request_delete_range": {"key": key}}
        answer = await self._client.call(
            "/v3/kv/txn",
            {
                "compare": [
                    {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(old.version)},
                    {"key": mine, "target": "VERSION", "result": "GREATER", "version": "0"},
                ],
                "success": [change],
                "failure": [{"request_range": {"key": mine}}],
            },
        )
        revision = answer["header"]["revision"]
        if answer.get("succeeded"):
            return Stored(int(revision) if new else 0, new, revision)
        if not answer["responses"][0]["response_range"].get("kvs"):
            raise BackendError("the lease of this node has ended in etcd")
        return None

    async def all_names(self) -> list[str]:
        prefix = self._key("names", "")
        entries = await self._range(prefix, prefix_end(prefix))
        return [decode(entry["key"])[len(prefix) :].decode("utf-8", "surrogateescape") for entry in entries]

    async def process_of(self, node: str) -> ProcessIdentity:
        value = await self._get(self._key("nodes", node))
        try:
            return dict(json.loads(value)["process"]) if value else {}
        except (ValueError, KeyError, TypeError):
            return {}

    async def discard(self, name: str, stored: Stored) -> None:
        """An empty record has no key."""
        await trio.lowlevel.checkpoint()
        assert not stored.record, name

    async def wait_for_change(self, name: str, seen: Stored, seconds: float) -> None:
        # From the latest revision on: etcd looks only ten times a second after watches that begin before it, and
        # whatever anybody has written since the record was seen makes that one older than the latest.
        latest = await self.read(name)
        if latest.version == seen.version:
            await self._watch({"key": encode(self._key("names", name))}, int(latest.token), seconds)

    async def _watch(self, what: dict[str, str], revision: int, seconds: float) -> None:
        """Until something happens to keys after a revision, or the time is over."""
        request = {"create_request": {**what, "start_revision": str(revision + 1)}}
        with trio.move_on_after(seconds):
            async with self._client.stream("/v3/watch", request) as answers:
                async for answer in answers:
                    result = answer.get("result", {})
                    if result.get("events") or result.get("canceled"):
                        return

    # -------------------------------------------------------------- notices

    async def notify(self, node: str, name: str) -> None:
        if await self._get(self._key("nodes", node)) is not None:
            await self._put(self._key("wanted", node, name), b"", self._lease_id)

    async def next_notice(self) -> str:
        while True:
            self._listening = trio.CancelScope()
            prefix = self._key("wanted", self.node, "")
            answer = await self._client.call(
                "/v3/kv/range",
                {"key": encode(prefix), "range_end": encode(prefix_end(prefix)), "limit": "1"},
                changes=False,
            )
            for entry in answer.get("kvs", []):
                await self._client.call("/v3/kv/deleterange", {"key": entry["key"]})
                return decode(entry["key"])[len(prefix) :].decode("utf-8", "surrogateescape")
            where = {"key": encode(prefix), "range_end": encode(prefix_end(prefix))}
            with self._listening:
                await self._watch(where, int(answer["header"]["revision"]), NOTICE_SECONDS)

    # ---------------------------------------------------------------- keys

    async def _get(self, key: bytes) -> bytes | None:
        entries = await self._range(key)
        return decode(entries[0].get("value", "")) if entries else None

    async def _range(self, key: bytes, end: bytes = b"") -> list[dict[str, Any]]:
        request = {"key": encode(key), **({"range_end": encode(end)} if end else {})}
        answer = await self._client.call("/v3/kv/range", request, changes=False)
        return list(answer.get("kvs", []))

    async def _put(self, key: bytes, value: bytes, lease: str) -> None:
        await self._client.call("/v3/kv/put", {"key": encode(key), "value": encode(value), "lease": lease})


def _stored(entries: list[dict[str, Any]], revision: str) -> Stored:
    if not entries:
        return Stored(token=revision)
    try:
        record = NameRecord.from_json(json.loads(decode(entries[0]["value"])))
    except (ValueError, KeyError) as error:
        raise BackendError(f"etcd: {error}") from None
    return Stored(int(entries[0]["mod_revision"]), record, revision)
