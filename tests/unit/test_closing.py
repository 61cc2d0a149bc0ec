"""What the end of a daemon waits for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from safefs.closing import Closing
from safefs.gate import Gate
from safefs.rules import NameClass


def test_the_end_waits_for_what_a_close_publishes() -> None:
    """Its draft is neither pending any more nor published yet.  All others come before it."""
    order = []

    async def refuse(draft: SimpleNamespace, _reason: str, _errno: int) -> None:
        order.append(f"{draft.name} is kept")

    being_published = SimpleNamespace(gate=Gate(), pending=False)
    written = SimpleNamespace(name="x", gate=Gate(), pending=True, flushed=False, name_class=NameClass.PRIVATE)
    publisher = SimpleNamespace(refuse=refuse)
    filesystem = cast(Any, SimpleNamespace(drafts=[being_published, written], publisher=publisher))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            closing = Closing(filesystem, nursery, lambda _number: None)
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
