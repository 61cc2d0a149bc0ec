"""Eight processes on four nodes want the same file of a Hugging Face hub: one downloads it, the others wait for it.

The clients are huggingface_hub itself with its own locks.  The hub counts the bytes of content that it serves; it holds
the first response in the middle until all clients have asked about the file, so that none comes too late to compete.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import MountFactory
from tests.support.hub import Hub
from tests.support.hub_race import MODEL, MatchModel, blob_path, finish, start_download
from tests.support.mounting import wait_until
from tests.support.venvs import hub_venv
from tests.tools.processes import ending

SIZE = 64 * 1024 * 1024
PROCESSES = 8
NODES = 4

versions = pytest.mark.parametrize("version", ["1.17.0", "newest"])


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({MODEL: random.Random(3).randbytes(SIZE)}) as running:
        yield running


def download(hub: Hub, version: str, homes: list[Path], competitors: int) -> list[str]:
    """One client in each home: what those that failed say.

    The first response stands until so many have asked for content.
    """
    hold = hub.hold(SIZE // 2, MODEL)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(ending(start_download(hub, hub_venv(version), home, f"client{number}", flock=True)))
            for number, home in enumerate(homes)
        ]
        hold.wait_reached()
        names = [f"client{number}" for number in range(len(homes))]
        assert wait_until(lambda: all(hub.seen(MatchModel(name), "HEAD") for name in names), 60), hub.requests
        assert wait_until(lambda: len(hub.seen(MODEL)) >= competitors, 60), hub.requests
        hold.release()
        errors = [finish(client) for client in clients]
        return [error for client, error in zip(clients, errors, strict=True) if client.returncode]


@versions
def test_one_downloads_and_the_others_wait(hub: Hub, version: str, make_mount: MountFactory) -> None:
    mounts = [make_mount("-o", "locks=leasefile") for _ in range(NODES)]
    homes = [mounts[number % NODES] / "hf" for number in range(PROCESSES)]
    assert download(hub, version, homes, competitors=1) == []
    assert hub.content_bytes(MODEL) == SIZE
    for mount in mounts:
        assert blob_path(hub, mount / "hf").read_bytes() == hub.main.files[MODEL].data
    assert blob_path(hub, mounts[0].backing / "hf").read_bytes() == hub.main.files[MODEL].data


@versions
def test_control_nodes_that_share_no_locks_download_more_than_once(
    hub: Hub, version: str, make_mount: MountFactory
) -> None:
    mounts = [make_mount("-o", "locks=memory") for _ in range(NODES)]
    homes = [mounts[number % NODES] / "hf" for number in range(PROCESSES)]
    download(hub, version, homes, competitors=2)  # where clients take each other's partial files some fail
    assert hub.content_bytes(MODEL) > SIZE
