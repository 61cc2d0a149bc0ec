"""What a daemon does beside its mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from safefs import daemon as daemon_module
from safefs.backing import Backing
from safefs.daemon import Daemon
from safefs.events import EventKind, EventLog, EventReader
from safefs.identity import Identities


def test_events_that_cannot_be_written_for_want_of_a_thread_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of that task would be the end of the mount."""
    monkeypatch.setattr(daemon_module, "EVENTS_SECONDS", 0.01)
    store, log = Backing(tmp_path, Identities(impersonate=False), max_threads=1), EventLog(tmp_path, "node")
    run, refusals = store.run, iter(range(3))

    async def refuse(*arguments: Any) -> Any:
        if next(refusals, None) is not None:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await run(*arguments)

    monkeypatch.setattr(store, "run", refuse)
    log.note(EventKind.PUBLISHED, "file")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Daemon._write_events, cast(Daemon, SimpleNamespace(backing=store, events=log)))
            with trio.fail_after(30):
                while not EventReader(tmp_path).read():  # noqa: ASYNC110 - a file
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
    os.close(store.root_fd)
