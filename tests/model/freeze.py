"""What an object comes to as a value: two that freeze alike act alike from then on.

Whatever can be reached from an object is part of it: fields, containers, what functions close over, and where running
coroutines stand with what they know.  A coroutine's value stack is the one thing that cannot be seen, so nothing that
is frozen may wait within a `for` loop or a half-computed expression that matters.

A search spends most of its time here, so what is to be done with a thing is looked up by its type, and found out once.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import trio

ATOMS = (int, str, bytes, float, bool, type(None), type, Enum, types.ModuleType, types.BuiltinFunctionType)


class Kind(NamedTuple):
    """What is done with things of one type."""

    name: str
    parts: Callable[[Any], Iterable[Any]] | None  # None: it is a value as it is
    is_frozen: bool  # so is this, unless it holds something that is none


def freeze(thing: object) -> Hashable:
    """Objects that are the same one in several places stay so: each is a number where it is met again."""
    return _freeze(thing, _kind(type(thing)), {})


def _freeze(thing: Any, kind: Kind, met: dict[int, int]) -> Hashable:
    name, parts, is_frozen = kind
    if parts is None or (is_frozen and _has_hash(thing)):
        return thing  # type: ignore[no-any-return]
    if id(thing) in met:
        return "again", met[id(thing)]
    met[id(thing)] = len(met)
    frozen = [name]
    for part in parts(thing):
        kind = _kind(type(part))
        frozen.append(part if kind.parts is None else _freeze(part, kind, met))
    return tuple(frozen)


def _has_hash(thing: object) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True


@cache
def _kind(cls: type) -> Kind:
    is_atom = issubclass(cls, ATOMS)
    is_frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return Kind(cls.__name__, None if is_atom else _parts_of(cls), is_frozen)


def _parts_of(cls: type) -> Callable[[Any], Iterable[Any]]:
    for base, parts in _PARTS.items():
        if issubclass(cls, base):
            return parts
    if cls.__name__ == "coroutine_wrapper":
        return lambda _wrapper: ()
    if dataclasses.is_dataclass(cls):
        names = [each.name for each in dataclasses.fields(cls)]
        return lambda thing: [getattr(thing, name) for name in names]
    return lambda thing: list(vars(thing).values())


def _of_coroutine(thing: types.CoroutineType[Any, Any, Any]) -> list[Any]:
    frame = thing.cr_frame
    known = [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]
    return [thing.__qualname__, *known, thing.cr_await]


def _of_generator(thing: types.GeneratorType[Any, Any, Any]) -> list[Any]:
    return [thing.__qualname__, thing.gi_frame.f_lasti, *thing.gi_frame.f_locals.values()]


_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    dict: lambda thing: [part for item in thing.items() for part in item],
    list: list,
    tuple: list,
    set: lambda thing: sorted(thing, key=repr),
    frozenset: lambda thing: sorted(thing, key=repr),
    trio.Event: lambda thing: [thing.is_set()],
    types.CoroutineType: _of_coroutine,
    types.GeneratorType: _of_generator,
    types.MethodType: lambda thing: [thing.__func__, thing.__self__],
    types.FunctionType: lambda thing: [thing.__qualname__, *(cell.cell_contents for cell in thing.__closure__ or ())],
}
