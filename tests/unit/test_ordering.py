"""Publishes on their way: who waits for which, and for how long."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from safefs.draft import Draft
from safefs.gate import Gate
from safefs.model import Caller, Identity, Process
from safefs.namespace import Node
from safefs.ordering import Ordering, Publishing
from safefs.rules import NameClass


def make_directory(number: int) -> Node:
    return Node(number, Identity(1, number), stat.S_IFDIR | 0o755)


HERE, ELSEWHERE = make_directory(2), make_directory(3)
WRITER, SAME_SESSION, STRANGER = Process(10, 1), Process(11, 1), Process(20, 2)


def make_draft(directory: Node = HERE, name: bytes = b"name", opener: Process | None = WRITER) -> Draft:
    return Draft(
        write_id="0123456789abcdef",
        node=Node(1000, Identity(1, 1000), stat.S_IFREG | 0o644),
        directory=directory,
        name=name,
        name_class=NameClass.PRIVATE,
        caller=Caller(0, 0),
        opener=opener,
        pidfd=-1,
        fd=-1,
        temp_name=None,
        shown_ino=1000,
        gate=Gate(),
    )


def waits(ordering: Ordering, wait: Callable[[], Awaitable[None]], *ending: Publishing) -> list[bool]:
    """Whether `wait` still waits: at once, and after the end of each of `ending`; it must be through at the end."""
    observed: list[bool] = []

    async def main() -> None:
        through = trio.Event()

        async def waiter() -> None:
            await wait()
            through.set()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(waiter)
                await wait_all_tasks_blocked()
                observed.append(not through.is_set())
                for publishing in ending:
                    ordering.end(publishing)
                    await wait_all_tasks_blocked()
                    observed.append(not through.is_set())
                nursery.cancel_scope.cancel()

    trio.run(main)
    return observed


def test_an_end_wakes_one_of_many() -> None:
    """A process that ends with many files open: each publish waits for the one before it, not for all of them."""
    ordering = Ordering()
    publishings = [ordering.begin(make_draft(name=b"%d" % number)) for number in range(50)]
    order: list[int] = []

    async def publish(number: int) -> None:
        await ordering.wait_process(WRITER, before=publishings[number])
        order.append(number)
        ordering.end(publishings[number])

    async def main() -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for number in range(1, 50):
                    nursery.start_soon(publish, number)
                await wait_all_tasks_blocked()
                waiting = [publishing.done.statistics().tasks_waiting for publishing in publishings]
                assert waiting == [1] * 49 + [0]
                ordering.end(publishings[0])

    trio.run(main)
    assert order == list(range(1, 50))


def test_begin_and_end_are_counted() -> None:
    ordering = Ordering()
    assert not ordering
    first, second = ordering.begin(make_draft()), ordering.begin(make_draft())
    assert ordering
    assert len(ordering) == 2
    ordering.end(first)
    ordering.end(first)
    assert len(ordering) == 1
    ordering.end(second)
    assert not ordering


def test_a_publish_is_about_the_name_the_draft_had_when_it_was_closed() -> None:
    draft = make_draft()
    publishing = Ordering().begin(draft)
    draft.directory, draft.name = ELSEWHERE, b"other"
    assert (publishing.directory, publishing.name, publishing.process) == (HERE, b"name", WRITER)


@pytest.mark.parametrize(
    ("mine", "theirs", "concerned"),
    [
        (WRITER, WRITER, True),
        (WRITER, Process(10, 9), True),
        (WRITER, SAME_SESSION, True),
        (WRITER, STRANGER, False),
        (Process(10, 0), Process(20, 0), False),  # a session of another pid namespace says nothing
        (None, STRANGER, True),
    ],
)
def test_whom_a_publish_concerns(mine: Process | None, theirs: Process, concerned: bool) -> None:
    assert Publishing(1, HERE, b"name", mine).concerns(theirs) == concerned


def test_a_name_waits_for_all_its_publishes_and_no_others() -> None:
    ordering = Ordering()
    other = ordering.begin(make_draft(name=b"other"))
    away = ordering.begin(make_draft(ELSEWHERE))
    first, second = ordering.begin(make_draft()), ordering.begin(make_draft())
    assert waits(ordering, lambda: ordering.wait_name(HERE, b"name"), second, first) == [True, True, False]
    assert waits(ordering, lambda: ordering.wait_name(HERE, b"free")) == [False]
    assert waits(ordering, lambda: ordering.wait_name(None, b"name")) == [False]
    ordering.end(other)
    ordering.end(away)
    assert not ordering


def test_a_directory_waits_for_every_publish_in_it() -> None:
    ordering = Ordering()
    ordering.begin(make_draft(ELSEWHERE))
    first, second = ordering.begin(make_draft(name=b"a")), ordering.begin(make_draft(name=b"b"))
    assert waits(ordering, lambda: ordering.wait_directory(HERE), first, second) == [True, True, False]


def test_a_process_waits_for_what_it_and_its_session_closed() -> None:
    ordering = Ordering()
    ordering.begin(make_draft(opener=STRANGER))
    own, session = ordering.begin(make_draft(opener=WRITER)), ordering.begin(make_draft(opener=SAME_SESSION))
    assert waits(ordering, lambda: ordering.wait_process(WRITER), own, session) == [True, True, False]


def test_a_process_that_is_not_known_waits_for_everything() -> None:
    ordering = Ordering()
    one, two = ordering.begin(make_draft(opener=STRANGER)), ordering.begin(make_draft(opener=WRITER))
    assert waits(ordering, lambda: ordering.wait_process(None), one, two) == [True, True, False]


def test_a_publish_waits_for_those_before_it_and_not_for_those_behind() -> None:
    ordering = Ordering()
    before, mine = ordering.begin(make_draft(name=b"a")), ordering.begin(make_draft(name=b"b"))
    behind = ordering.begin(make_draft(name=b"c"))
    assert waits(ordering, lambda: ordering.wait_process(WRITER, before=mine), before) == [True, False]
    assert waits(ordering, lambda: ordering.wait_process(WRITER, before=mine)) == [False]
    assert len(ordering) == 2
    ordering.end(behind)


def test_what_begins_later_is_not_waited_for() -> None:
    ordering = Ordering()
    first = ordering.begin(make_draft())

    async def main() -> None:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ordering.wait_name, HERE, b"name")
                await wait_all_tasks_blocked()
                ordering.begin(make_draft())
                ordering.end(first)

    trio.run(main)
    assert len(ordering) == 1
