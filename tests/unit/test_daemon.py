"""What a daemon does beside its mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import trio
import trio.testing

from safefs import daemon as daemon_module
from safefs.backing import Backing
from safefs.closing import Closing
from safefs.daemon import Daemon
from safefs.events import EventKind, EventLog, EventReader
from safefs.gate import Gate
from safefs.identity import Identities
from safefs.state import StateDirectory


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


@dataclass
class Keeping:
    """What a daemon tidies up with, on a backing of its own."""

    store: Backing
    state: StateDirectory
    events: EventLog

    def keep(self, write_id: str, record: str) -> Path:
        """A file in quarantine."""
        file = self.state.path / "quarantine" / write_id
        file.write_bytes(b"bytes")
        file.with_name(f"{write_id}.json").write_text(record)
        return file

    def run(self, task: Callable[[Daemon], Awaitable[None]], until: Callable[[], bool]) -> None:
        """A task of a daemon, until something has come of it."""
        settings = SimpleNamespace(read_only=False, quarantine_age_seconds=60.0, quarantine_bytes=0)
        parts = {"backing": self.store, "state": self.state, "events": self.events, "settings": settings}

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task, cast(Daemon, SimpleNamespace(**parts)))
                with trio.fail_after(30):
                    while not until():  # noqa: ASYNC110 - files
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()

        trio.run(main)


@pytest.fixture
def keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeping]:
    monkeypatch.setattr(daemon_module, "HOUSEKEEPING_SECONDS", 0.01)
    monkeypatch.setattr(daemon_module, "SWEEP_SECONDS", 0.01)
    store = Backing(tmp_path, Identities(impersonate=False), max_threads=1)
    state = StateDirectory(tmp_path / ".safefs", store.identities)
    yield Keeping(store, state, EventLog(state.events, "node"))
    os.close(state.quarantine_fd)
    os.close(store.root_fd)


def test_what_was_purged_is_told_where_the_next_step_fails(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = list[str]()

    def fail(_seconds: float) -> None:
        failures.append("events")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(keeping.state, "prune_events", fail)
    keeping.keep("old", '{"time": 5, "path": "dir/file"}')
    keeping.run(Daemon._keep_house, lambda: len(failures) > 1)
    assert [(event["event"], event["path"]) for event in keeping.events.taken()] == [("purged", "dir/file")]


@pytest.mark.parametrize("task", [Daemon._keep_house, Daemon._sweep_retained], ids=["quarantine", "versions"])
def test_whatever_fails_while_a_daemon_tidies_up_does_not_end_the_mount(
    keeping: Keeping,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    task: Callable[[Daemon], Awaitable[None]],
) -> None:
    """It is logged, and tried again."""
    calls = list[str]()

    def fail(*_: Any) -> list[Any]:
        calls.append("call")
        if len(calls) == 1:
            raise OverflowError("out of what somebody else has written")
        return []

    monkeypatch.setattr(keeping.state, "prune", fail)
    monkeypatch.setattr(keeping.state.retained, "sweep", fail)
    keeping.run(task, lambda: len(calls) > 1)
    assert ["OverflowError" in record.getMessage() for record in caplog.records] == [True]


# ------------------------------------------------------ requests at the end


def serving(monkeypatch: pytest.MonkeyPatch, main: Callable[..., Awaitable[None]], **state: Any) -> Any:
    """A daemon whose connection is over, and what is left of its requests."""
    monkeypatch.setattr(daemon_module.pyfuse3, "main", main)
    daemon = SimpleNamespace(
        settings=SimpleNamespace(drain_seconds=30),
        fs=SimpleNamespace(publisher=SimpleNamespace(has_left=False), drafts=[]),
        connection=SimpleNamespace(is_over=True),
        terminated=False,
        **state,
    )
    daemon._give_up_requests = partial(Daemon._give_up_requests, daemon)
    return daemon


def closing_of(daemon: Any) -> Closing:
    return Closing(daemon.fs, cast(trio.Nursery, None), lambda _number: None)


async def answered(*_tasks: int) -> None:
    await trio.sleep(0.1)


async def hangs(*_tasks: int) -> None:
    await trio.sleep_forever()


async def fails(*_tasks: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(("request_", "given_up"), [(answered, False), (hangs, True), (fails, True)])
def test_what_a_request_that_is_given_up_may_yet_make_is_left_for_the_next_daemon(
    request_: Callable[..., Awaitable[None]], given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call goes on without it: nobody would know of a hidden name that it makes."""
    daemon = serving(monkeypatch, request_)
    with suppress(BaseExceptionGroup):
        trio.run(Daemon._serve, daemon, closing_of(daemon), clock=trio.testing.MockClock(autojump_threshold=0))
    assert daemon.fs.publisher.has_left is given_up


def test_requests_that_the_end_of_something_else_gives_up_are_left_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = serving(monkeypatch, hangs)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Daemon._serve, daemon, closing_of(daemon))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert daemon.fs.publisher.has_left


@pytest.mark.parametrize("pause", [0, 0.5])
@pytest.mark.parametrize(("seconds", "is_published"), [(20, True), (40, False)])
def test_a_rename_that_publishes_has_the_time_of_a_publish(
    seconds: float, is_published: bool, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up as early as other requests, it would end in the middle of a publish, and nameless bytes would be lost.

    What it publishes after that is waited for as well.
    """
    drafts = [SimpleNamespace(gate=Gate()), SimpleNamespace(gate=Gate())]
    published = []

    async def rename(*_tasks: int) -> None:
        for draft in reversed(drafts):
            async with draft.gate.closed():
                await trio.sleep(seconds / 2)
            published.append(draft)
            await trio.sleep(pause)  # whoever waits his turn has no gate closed yet

    daemon = serving(monkeypatch, rename)
    daemon.fs.drafts = drafts

    async def main() -> float:
        began = trio.current_time()
        await Daemon._serve(daemon, closing_of(daemon))
        return trio.current_time() - began

    seconds_of_end = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert (len(published) == len(drafts)) is is_published
    assert seconds_of_end == pytest.approx(min(seconds, 30), abs=2)


def test_the_session_is_closed_after_the_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that waits for a lock: it is answered when it is given up, and libfuse has freed the session then."""
    order = list[str]()

    async def nothing(*_arguments: Any, **_named: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def start(*_arguments: Any, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def wait_for_a_lock() -> None:
        try:
            await trio.sleep_forever()
        finally:
            order.append("the request is answered")

    def make(*arguments: Any, **_named: Any) -> Any:
        """Operations, with the nursery of the requests as the last argument, or what they consist of."""
        if arguments and isinstance(arguments[-1], trio.Nursery):
            arguments[-1].start_soon(wait_for_a_lock)
        return SimpleNamespace(drain=nothing, give_up=lambda: None, run=start, beat=start)

    async def serve(_closing: Any) -> None:
        await trio.testing.wait_all_tasks_blocked()

    for name in ("Recovery", "Files", "Closing", "Tree", "InPlace", "Operations"):
        monkeypatch.setattr(daemon_module, name, make)
    monkeypatch.setattr(daemon_module, "serve_control", start)
    monkeypatch.setattr(daemon_module, "control_socket", lambda _path: "")
    monkeypatch.setattr(daemon_module, "find_mount", lambda _path: None)
    monkeypatch.setattr(daemon_module, "native", MagicMock())
    monkeypatch.setattr(daemon_module.pyfuse3, "close", lambda **_how: order.append("the session is closed"))
    daemon = MagicMock(names=None, stopping=True)
    daemon.settings.hot = False
    daemon.backing.run = nothing
    for name in ("_write_events", "_keep_house", "_sweep_retained", "_leaves_nothing"):
        setattr(daemon, name, nothing)
    daemon.soft_locks.run = daemon.fs.sweep_tickets = daemon.fs.sweep_gathered = nothing
    daemon._await_signals, daemon._serve = start, serve
    for method in (Daemon._run_mount, Daemon._end):
        setattr(daemon, method.__name__, partial(method, daemon))
    trio.run(Daemon._run, daemon, lambda: None)
    assert order == ["the request is answered", "the session is closed"]
