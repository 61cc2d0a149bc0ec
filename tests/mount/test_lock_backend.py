"""What mounts leave in their lock backend, and what they say of it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MountFactory
from tests.support.etcd import Etcd, etcd
from tests.support.mounting import Mount, safefs, wait_until

NAMES = 200
SECONDS = 60.0
FILLING = base64.b64encode(b"filling").decode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Etcd]:
    with etcd(tmp_path) as one:
        yield one


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def left_in_files(mount: Mount) -> list[str]:
    return os.listdir(mount.backing / ".safefs/locks/names")


def left_in_etcd(server: Etcd) -> list[object]:
    everything = {"key": "AA==", "range_end": "AA==", "keys_only": True}
    kinds = (b"/names/", b"/wanted/")
    keys = [_decode(str(entry["key"])) for entry in server.members[0].ask("/v3/kv/range", everything).get("kvs", [])]
    return [key for key in keys if any(kind in key for kind in kinds)]


def _decode(text: str) -> bytes:
    return base64.b64decode(text)


@pytest.mark.parametrize("backend", ["leasefile", "etcd"])
def test_nothing_is_left_of_names_that_are_not_used_any_more(
    backend: str, request: pytest.FixtureRequest, make_mount: MountFactory
) -> None:
    """Whoever was the last to need one may never be asked for it."""
    server: Etcd | None = request.getfixturevalue("server") if backend == "etcd" else None
    mount = make_mount("-o", server.options if server else "locks=leasefile")

    def left() -> list[object] | list[str]:
        return left_in_etcd(server) if server else left_in_files(mount)

    for number in range(NAMES):
        with locked(mount / f"{number}.lock"):
            pass
    assert len(left()) >= NAMES
    started = time.monotonic()
    mount.stop()
    assert time.monotonic() - started < 8
    assert not left()


def post(server: Etcd, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(server.members[0].url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return dict(json.load(answer))


def fill(server: Etcd) -> None:
    """Until it takes no more."""
    filling = {"key": FILLING, "value": base64.b64encode(bytes(1 << 20)).decode()}
    with suppress(urllib.error.HTTPError):
        while True:
            post(server, "/v3/kv/put", filling)


def make_space(server: Etcd) -> None:
    """As etcd's documentation has it: compact, defragment, disarm."""
    revision = post(server, "/v3/kv/deleterange", {"key": FILLING})["header"]["revision"]
    post(server, "/v3/kv/compaction", {"revision": revision, "physical": True})
    post(server, "/v3/maintenance/defragment", {})
    for alarm in post(server, "/v3/maintenance/alarm", {"action": "GET"})["alarms"]:
        post(server, "/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})


def problem_of(mount: Mount) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(safefs("status", mount.path, "--json").stdout)["lock_problem"]
    return found


def test_an_etcd_without_space_is_seen(tmp_path: Path, make_mount: MountFactory) -> None:
    """Its leases are renewed all the time; and it stands in the log once."""
    with etcd(tmp_path, more=["--quota-backend-bytes", str(4 << 20)]) as server:
        mount = make_mount("-o", f"{server.options},lease_seconds=3")
        assert problem_of(mount) is None
        fill(server)
        waiters = [subprocess.Popen(["flock", mount / f"{number}.lock", "true"]) for number in range(3)]
        try:
            started = time.monotonic()
            time.sleep(7)
            found = problem_of(mount)
            assert found is not None and "space exceeded" in found["text"] and found["names"] >= 3
            assert 5 < found["seconds"] < time.monotonic() - started + 1
            done = safefs("locks", "--at", str(mount.path))
            assert done.returncode == 0 and "space exceeded" in done.stderr and done.stderr.count("\n") == 1
            assert mount.log_text().count("space exceeded") == 1
            make_space(server)
            assert [waiter.wait(SECONDS) for waiter in waiters] == [0, 0, 0]
        finally:
            for waiter in waiters:
                waiter.kill()
                waiter.wait(SECONDS)
        assert wait_until(lambda: problem_of(mount) is None)
        assert mount.log_text().count("space exceeded") == 2
        assert "the lock backend: over, after " in mount.log_text()


def test_a_value_in_etcd_that_is_no_record_can_be_broken(server: Etcd, make_mount: MountFactory) -> None:
    mount = make_mount("-o", server.options)
    with locked(mount / "other.lock"), locked(mount / "x.lock"):
        pass
    mount.stop()
    assert not left_in_etcd(server)
    mount = make_mount("-o", server.options)
    with locked(mount / "other.lock"):
        everything = {"key": "AA==", "range_end": "AA==", "keys_only": True}
        keys = [_decode(entry["key"]) for entry in post(server, "/v3/kv/range", everything)["kvs"]]
        (other,) = (key for key in keys if key.endswith(b"/other.lock"))
        key = other.removesuffix(b"other.lock") + b"x.lock"
        post(server, "/v3/kv/put", {"key": base64.b64encode(key).decode(), "value": base64.b64encode(b"?").decode()})
        waiter = subprocess.Popen(["flock", mount / "x.lock", "true"])
        try:
            assert wait_until(lambda: problem_of(mount) is not None)
            shown = json.loads(safefs("locks", "--at", str(mount.path), "--json").stdout)
            states = {os.path.basename(entry["path"]): entry["state"] for entry in shown}
            assert states["other.lock"] == "held" and "cannot be read" in states["x.lock"]
            done = safefs("locks", "break", str(mount / "x.lock"))
            assert (done.returncode, done.stdout, done.stderr) == (0, "1 broken\n", "")
            assert waiter.wait(SECONDS) == 0
        finally:
            waiter.kill()
            waiter.wait(SECONDS)
