"""What the end of a daemon waits for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from safefs.closing import Closing
from safefs.gate import Gate


def test_the_end_waits_for_what_a_close_publishes() -> None:
    """Its draft is neither pending any more nor published yet."""
    draft = SimpleNamespace(gate=Gate(), pending=False)
    filesystem = cast(Any, SimpleNamespace(drafts=[draft]))
    order = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            closing = Closing(filesystem, nursery, lambda _number: None)

            async def settle() -> None:
                await closing.settle_all(all_closed=False)
                order.append("settled")

            async with draft.gate.closed():
                nursery.start_soon(settle)
                await trio.testing.wait_all_tasks_blocked()
                order.append("published")

    trio.run(main)
    assert order == ["published", "settled"]
