"""What the end of a daemon waits for."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
import trio.testing

from safefs.closing import Closing
from safefs.draft import DraftState
from safefs.filesystem import Handle
from safefs.gate import Gate
from safefs.model import Closer
from safefs.ordering import Ordering
from safefs.rules import NameClass


def written(name: str, **state: object) -> Any:
    """An open draft, if nothing else is said."""
    described = {"name": name, "gate": Gate(), "pending": True, "flushed": False, "name_class": NameClass.PRIVATE}
    described["unpublished"] = True
    return SimpleNamespace(**{**described, **state})


def filesystem(order: list[str], *drafts: SimpleNamespace) -> Any:
    async def refuse(draft: SimpleNamespace, _reason: str, _errno: int) -> None:
        await trio.lowlevel.checkpoint()
        if draft.name == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        async with draft.gate.closed():
            draft.pending = draft.unpublished = False
        order.append(f"{draft.name} is kept")

    return SimpleNamespace(drafts=drafts, publisher=SimpleNamespace(refuse=refuse), ordering=Ordering())


def test_the_end_waits_for_what_a_close_publishes() -> None:
    """Its draft is neither pending any more nor published yet.  All others come before it."""
    order = list[str]()
    being_published = written("", pending=False)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            closing = Closing(filesystem(order, being_published, written("x")), nursery, lambda _number: None)
            async with being_published.gate.closed():
                settled = closing.settle_all(all_closed=False)
                with trio.move_on_after(0):
                    await settled.wait()  # who gives up waiting does not end it
                await trio.testing.wait_all_tasks_blocked()
                order.append("published")
                assert not settled.is_set()
            await settled.wait()

    trio.run(main)
    assert order == ["x is kept", "published"]


def test_who_ends_by_an_error_settles_all_the_same() -> None:
    """All tasks are cancelled by then; and one draft that cannot be settled is not all."""
    order = list[str]()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            drafts = filesystem(order, written("x"), written("bad"), written("y"))
            closing = Closing(drafts, nursery, lambda _number: None)
            nursery.cancel_scope.cancel()
            with trio.fail_after(10), trio.CancelScope(shield=True):
                await closing.settle_all(all_closed=False).wait()

    trio.run(main)
    assert sorted(order) == ["x is kept", "y is kept"]


def test_what_is_given_up_ends() -> None:
    being_published = written("", pending=False)

    async def main() -> None:
        async with being_published.gate.closed(), trio.open_nursery() as nursery:
            closing = Closing(filesystem([], being_published), nursery, lambda _number: None)
            settled = closing.settle_all(all_closed=False)
            await trio.testing.wait_all_tasks_blocked()
            closing.give_up()
        assert not settled.is_set()

    trio.run(main)


def hidden(name: str, **state: bool) -> SimpleNamespace:
    """A draft with a hidden file."""
    return SimpleNamespace(**{"name": name, "temp_name": name, "gate": Gate(), "unpublished": False, **state})


def test_of_what_is_not_settled_the_hidden_files_stay() -> None:
    """Also while their bytes are copied to quarantine: they count as refused by then."""
    dropped = list[str]()

    async def drop_temp(draft: SimpleNamespace) -> None:
        await trio.lowlevel.checkpoint()
        dropped.append(draft.name)
        draft.temp_name = None

    async def main(*drafts: SimpleNamespace) -> bool:
        async with trio.open_nursery() as nursery:
            return await Closing(
                SimpleNamespace(drafts=drafts, drop_temp=drop_temp),
                nursery,
                lambda _number: None,  # type: ignore[arg-type]
            ).drop_temps()

    async def while_one_is_kept() -> bool:
        draft = hidden("kept")
        async with draft.gate.closed():
            return await main(draft, hidden("read only"))

    assert not trio.run(while_one_is_kept)
    assert not trio.run(main, hidden("unpublished", unpublished=True))
    assert trio.run(main, hidden("read"))
    assert dropped == ["read only", "read"]


@pytest.mark.parametrize("released", [True, False])
def test_what_is_open_is_kept_whatever_a_publish_takes(released: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One by RELEASE, or by a FLUSH; and what waits for its turn behind one is not to be seen before it."""
    order = list[str]()
    big = written("big", pending=False, flushed=True, directory=None, opener=None)
    waits = [written("what waits for its turn", flushed=True, writers=0)] if released else []
    fs = filesystem(order, big, *waits, written("open"))

    async def main() -> None:
        async with big.gate.closed(), trio.open_nursery() as nursery:
            closing = Closing(fs, nursery, lambda _number: None)
            if released:
                fs.ordering.begin(big)
            began = trio.current_time()
            for _ in range(2):  # at a signal, and at the end
                await closing.drain(30, all_closed=False)
            assert trio.current_time() == began + 30
            closing.give_up()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sorted(order) == ["open is kept", *(f"{each.name} is kept" for each in waits)]
    assert not fs.accepting and "gave up waiting" in caplog.text


def test_one_that_cannot_be_settled_keeps_no_other_from_being_kept() -> None:
    """A small write into it hangs in the backing, and passes its gate all the time."""
    order = list[str]()
    hangs, other = written("hangs"), written("other")

    async def main() -> None:
        async with hangs.gate.passing(), trio.open_nursery() as nursery:
            closing = Closing(filesystem(order, hangs, other), nursery, lambda _number: None)
            await closing.drain(30, all_closed=False)
            closing.give_up()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert order == ["other is kept"]


# ---------------------------------------------- a RELEASE that goes wrong


def released(draft: SimpleNamespace, trace: list[str], failure: Exception, *, looks: bool) -> Any:
    """A filesystem where settling a draft fails, or the look before that whether it is mapped."""

    async def fail(*_arguments: object, **_named: object) -> None:
        await trio.lowlevel.checkpoint()
        raise failure

    async def publish(_draft: SimpleNamespace, **_how: object) -> None:
        await trio.lowlevel.checkpoint()
        trace.append("published")

    async def refuse(_draft: SimpleNamespace, reason: str, number: int) -> None:
        await trio.lowlevel.checkpoint()
        trace.append(f"kept: {reason}, {errno.errorcode[number]}")

    async def end_draft(_draft: SimpleNamespace) -> None:
        await trio.lowlevel.checkpoint()
        trace.append(f"ended, {draft.reserved} reserved")

    return SimpleNamespace(
        backing=SimpleNamespace(run_for=fail if looks else publish),
        publisher=SimpleNamespace(publish=publish if looks else fail, refuse=refuse),
        ordering=Ordering(),
        remove_handle=lambda _handle: trace.append("the handle is gone"),
        end_draft=end_draft,
    )


FAILURES = pytest.mark.parametrize("failure", [OSError(errno.ENFILE, "no more files"), MemoryError()], ids=repr)


@FAILURES
@pytest.mark.parametrize("looks", [False, True])
def test_what_cannot_be_settled_when_it_is_released_is_kept(
    looks: bool, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """And its handle goes all the same: nobody would release it once more."""
    trace = list[str]()
    draft = written("x", unseen=looks, mappable=True, state=DraftState.WRITING, writers=0, reserved=1)
    draft.fd, draft.closer, draft.opener, draft.directory = -1, Closer.ALIVE, None, None
    fs = released(draft, trace, failure, looks=looks)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            closing = Closing(fs, nursery, lambda number: trace.append(f"{number} is unlocked"))
            await closing.release(cast(Handle, SimpleNamespace(number=7)), draft, fs.ordering.begin(draft))

    trio.run(main)
    kept = f"kept: publishing failed: {failure!r}, EIO"
    assert trace == [kept, "7 is unlocked", "the handle is gone", "ended, 0 reserved"]
    assert not fs.ordering
    assert failure in [record.exc_info[1] for record in caplog.records if record.exc_info]


@FAILURES
def test_where_it_is_not_known_who_maps_what_is_published_the_handle_goes(failure: Exception) -> None:
    trace = list[str]()
    draft = written("x", unseen=True, mappable=True, state=DraftState.PUBLISHED, writers=0, reserved=0, fd=-1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            closing = Closing(released(draft, trace, failure, looks=True), nursery, lambda _number: None)
            await closing.release(cast(Handle, SimpleNamespace(number=7, writable=True)), draft, None)

    trio.run(main)
    assert trace == ["the handle is gone", "ended, 0 reserved"]
