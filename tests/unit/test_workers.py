"""The threads beside the event loop."""

from __future__ import annotations

import errno
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from safefs import workers
from safefs.workers import Workers


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(10):
            await main()

    trio.run(bounded)


class Held:
    """A call that ends when it is told to, and remembers in which order calls began."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.has_begun = threading.Semaphore(0)
        self.end = threading.Event()

    def __call__(self, number: int) -> int:
        self.began.append(number)
        self.has_begun.release()
        self.end.wait(10)
        return number


def test_a_call_gives_its_result_or_its_error() -> None:
    async def main() -> None:
        threads = Workers(1)
        assert await threads.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 7, 0)
        assert await threads.run(threading.get_ident) != threading.get_ident()

    run(main)


def test_one_thread_serves_calls_that_follow_each_other() -> None:
    async def main() -> None:
        threads = Workers(8)
        assert len({await threads.run(threading.get_ident) for _ in range(20)}) == 1

    run(main)


def test_no_more_at_once_than_allowed_and_the_rest_in_order() -> None:
    async def main() -> None:
        threads, held = Workers(2), Held()
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(threads.run, held, number)
                await wait_all_tasks_blocked()
            assert threads.busy == 2
            for _ in range(2):
                await trio.to_thread.run_sync(held.has_begun.acquire)
            held.end.set()
        assert sorted(held.began[:2]) == [0, 1] and sorted(held.began) == list(range(6))
        assert threads.busy == 0

    run(main)


def test_a_call_that_is_abandoned_keeps_its_place_until_it_ends() -> None:
    async def main() -> None:
        threads, held = Workers(1), Held()
        with trio.move_on_after(0.05) as scope:
            await threads.run(held, 1)
        assert scope.cancelled_caught and threads.busy == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, held, 2)
            await wait_all_tasks_blocked()
            assert held.began == [1]
            held.end.set()
        assert held.began == [1, 2] and threads.busy == 0

    run(main)


def test_it_is_quiet_once_abandoned_calls_have_ended_too() -> None:
    async def main() -> None:
        threads, held = Workers(2), Held()
        await threads.quiet()
        with trio.move_on_after(0.05):
            await threads.run(held, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, held, 2)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.05) as scope:
                await threads.quiet()
            assert scope.cancelled_caught
            held.end.set()
            await threads.quiet()
            assert threads.busy == 0

    run(main)


def test_it_is_not_quiet_while_a_call_has_its_place_and_has_not_begun() -> None:
    async def main() -> None:
        threads, one, two = Workers(1), Held(), Held()
        quiet = trio.Event()

        async def wait() -> None:
            await threads.quiet()
            quiet.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, one, 1)
            await wait_all_tasks_blocked()
            nursery.start_soon(threads.run, two, 2)
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            one.end.set()
            await trio.to_thread.run_sync(two.has_begun.acquire)
            await wait_all_tasks_blocked()
            assert not quiet.is_set()
            two.end.set()

    for _ in range(20):  # which of two tasks comes first that can go on is drawn by lot
        run(main)


def test_who_gives_up_waiting_takes_nobodys_place() -> None:
    async def main() -> None:
        threads, held = Workers(1), Held()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, held, 1)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.05):
                await threads.run(held, 2)
            held.end.set()
        assert await threads.run(held, 3) == 3
        assert held.began == [1, 3]

    run(main)


def test_nothing_begins_for_who_is_cancelled() -> None:
    async def main() -> None:
        threads, held = Workers(1), Held()
        with trio.CancelScope() as scope:
            scope.cancel()
            await threads.run(held, 1)
        assert scope.cancelled_caught and held.began == [] and threads.busy == 0

    run(main)


def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.01)

    async def main() -> None:
        threads = Workers(1)
        thread = await threads.run(threading.current_thread)
        await trio.to_thread.run_sync(thread.join, 10)
        assert not thread.is_alive() and threads.idle == []
        assert await threads.run(int) == 0

    run(main)


class NoThreads:
    """The limit of threads is reached: none can be started."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        patch.setattr(threading.Thread, "start", self._refuse)

    def _refuse(self) -> None:
        self.refused += 1
        raise RuntimeError("can't start new thread")


def test_where_no_thread_can_be_started_calls_wait_for_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        threads, held = Workers(4), Held()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, held, 1)
            await trio.to_thread.run_sync(held.has_begun.acquire)
            with monkeypatch.context() as patch:
                none = NoThreads(patch)
                for number in (2, 3):
                    nursery.start_soon(threads.run, held, number)
                    await wait_all_tasks_blocked()
                assert held.began == [1] and none.refused >= 2
                with trio.move_on_after(0.05) as scope:
                    await threads.run(held, 4)
                assert scope.cancelled_caught and threads.busy == 3
                held.end.set()
                await threads.quiet()
        assert sorted(held.began) == [1, 2, 3] and threads.busy == 0

    run(main)


def test_a_call_gets_a_thread_once_there_are_some_though_all_others_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RETRY_SECONDS", 0.01)

    async def main() -> None:
        threads, hanging, results = Workers(2), Held(), list[int]()

        async def call() -> None:
            results.append(await threads.run(int))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.run, hanging, 1)
            await trio.to_thread.run_sync(hanging.has_begun.acquire)
            async with trio.open_nursery() as calls:
                with monkeypatch.context() as patch:
                    none = NoThreads(patch)
                    calls.start_soon(call)
                    while not none.refused:  # noqa: ASYNC110 - of another task
                        await trio.sleep(0.01)
                    assert not results
            assert results == [0]
            hanging.end.set()

    run(main)


def test_without_any_thread_a_call_raises_what_callers_expect_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError ended the tasks of the daemon that go on after an OSError, and the mount with them."""

    async def main() -> None:
        threads, held = Workers(2), Held()
        with monkeypatch.context() as patch:
            NoThreads(patch)
            with pytest.raises(OSError, match="temporarily") as caught:
                await threads.run(held, 1)
        assert caught.value.errno == errno.EAGAIN and threads.busy == 0
        held.end.set()
        assert await threads.run(held, 2) == 2

    run(main)


def test_whoever_waits_for_a_thread_of_one_that_gets_none_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wait for a call that ends, and its thread with it: else the one would wait for the other."""

    async def main() -> None:
        threads, held, told = Workers(2), Held(), list[int | None]()

        async def call(number: int) -> None:
            try:
                await threads.run(held, number)
            except OSError as error:
                told.append(error.errno)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, 1)
            await trio.to_thread.run_sync(held.has_begun.acquire)
            with monkeypatch.context() as patch:
                NoThreads(patch)
                deliver = threads.deliver

                def lose_thread(done: workers._Call) -> None:
                    threads.idle.clear()
                    deliver(done)

                patch.setattr(threads, "deliver", lose_thread)
                for number in (2, 3):  # the one has a place, the other waits for one
                    nursery.start_soon(call, number)
                    await wait_all_tasks_blocked()
                held.end.set()
                await threads.quiet()
        assert told == [errno.EAGAIN, errno.EAGAIN]

    run(main)
