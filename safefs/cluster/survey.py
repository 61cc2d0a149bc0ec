"""The locks of all nodes, for somebody who wants to see them: no name changes hands for that.

What is shared is on record.  What a node serves from memory it alone knows, and it is asked, once for all of its names.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from safefs.cluster.backend import NAMELESS, BackendError, LockBackend, UnreadableError
from safefs.cluster.record import NameRecord
from safefs.errors import MALFORMED
from safefs.locktable import NameLocks

log = logging.getLogger(__name__)

QUESTION = "?"  # how notices begin that want an answer, and are about no name
ANSWER_SECONDS = 3.0  # for a node to answer
LOOK_SECONDS = (0.02, 0.2)  # between looks for the answer, at first and at most
MOST_CALLS = 8  # to the backend at a time
MOST_ANSWERS = 8  # that are kept for who has asked

T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """What is known of all names."""

    locks: dict[str, NameLocks] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)  # names of which only a node knows that does not answer
    unreadable: dict[str, str] = field(default_factory=dict)  # names whose records cannot be read, and why


class Answers:
    """What this node has told others.  The last few stay until they are taken: who has asked may not wait any more."""

    def __init__(self, backend: LockBackend) -> None:
        self._backend = backend
        self._given: list[str] = []

    async def give(self, question: str, served: Mapping[str, NameLocks]) -> None:
        """Tell another node the locks of the names that this one serves from memory."""
        told = {key: locks.to_record() for key, locks in served.items()}
        try:
            await self._backend.answer(question, json.dumps(told))
            self._given.append(question)
            while len(self._given) > MOST_ANSWERS:
                await self._backend.take_answer(self._backend.node, self._given.pop(0))
        except BackendError as error:
            log.warning("another node wanted to know the locks of this one: %s", error)


async def survey(backend: LockBackend, served: Callable[[], dict[str, NameLocks]]) -> Survey:
    """The locks of all names; `served` tells those that this node serves.  Raises BackendError."""
    found = Survey(served())
    others = set(await backend.all_names()) - found.locks.keys()
    records = await _records(backend, others, found)
    found.locks.update((key, record.locks) for key, record in records.items())
    by_node = defaultdict[str, list[str]](list)
    for key, record in records.items():
        if record.delegate:
            by_node[record.delegate].append(key)
    nodes = by_node.keys() - {backend.node}
    nodes -= await backend.gone(nodes)  # before they are asked: each would be waited for
    answers = await _for_each(nodes, lambda node: _ask(backend, node))
    nodes -= await backend.gone(node for node in nodes if answers[node] is None)
    for node in nodes:
        told = answers[node]
        if told is None:
            found.silent.update(dict.fromkeys(by_node[node], node))
            continue
        found.locks.update((key, told[key]) for key in by_node[node] if key in told)
        given_back = await _records(backend, by_node[node] - told.keys(), found)
        found.locks.update((key, record.locks) for key, record in given_back.items())
    found.locks.update(served())
    return found


async def _records(backend: LockBackend, keys: Iterable[str], found: Survey) -> dict[str, NameRecord]:
    """Of some names; those that cannot be read are noted in what is found, and hide no others."""

    async def read(key: str) -> NameRecord | None:
        try:
            if key.startswith(NAMELESS):
                raise UnreadableError("its record is damaged")
            return (await backend.read(key)).record
        except UnreadableError as error:
            found.unreadable[key] = str(error)
            return None

    records = await _for_each(keys, read)
    return {key: record for key, record in records.items() if record is not None}


async def _ask(backend: LockBackend, node: str) -> dict[str, NameLocks] | None:
    """What a node serves; None where it does not answer, is gone, or cannot be asked (no space for the question)."""
    question = secrets.token_hex(8)
    pause, longest = LOOK_SECONDS
    try:
        with trio.move_on_after(ANSWER_SECONDS):
            await backend.notify(node, QUESTION + question)
            while True:
                text = await backend.take_answer(node, question)
                if text is not None:
                    return {key: NameLocks.from_record(locks) for key, locks in json.loads(text).items()}
                await trio.sleep(pause)
                pause = min(2 * pause, longest)
    except BackendError as error:
        log.warning("the locks of node %s are not known: %s", node, error)
    except (*MALFORMED, AttributeError):  # what is there is no answer of ours
        log.warning("the locks of node %s are not known: its answer is damaged", node)
    return None


async def _for_each(things: Iterable[str], function: Callable[[str], Awaitable[T]]) -> dict[str, T]:
    """What a function returns for each of them, some at a time; the first BackendError where there is one."""
    results, failures = dict[str, T](), list[BackendError]()
    limit = trio.CapacityLimiter(MOST_CALLS)

    async def call(thing: str) -> None:
        async with limit:
            try:
                results[thing] = await function(thing)
            except BackendError as error:  # a nursery would make a group of it
                failures.append(error)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for thing in things:
            nursery.start_soon(call, thing)
    if failures:
        raise failures[0]
    return results
