"""What mounts leave in their lock backend, and what they say of it."""

from __future__ import annotations

import base64
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.support.etcd import Etcd, etcd
from tests.support.mounting import Mount

NAMES = 200


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
