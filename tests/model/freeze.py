"""What an object comes to as a value: two that freeze alike act alike from then on.

Whatever can be reached from an object is part of it: fields, containers, what functions close over, and where running
coroutines stand with what they know.  A coroutine's value stack is the one thing that cannot be seen, so nothing that
is frozen may wait within a `for` loop or a half-computed expression that matters.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Hashable
from enum import Enum
from typing import Any

import trio

ATOMS = (int, str, bytes, float, bool, type(None), type, Enum, types.ModuleType, types.BuiltinFunctionType)


def freeze(thing: object) -> Hashable:
    """Objects that are the same one in several places stay so: each is a number where it is met again."""
    return _freeze(thing, {})


def _freeze(thing: Any, met: dict[int, int]) -> Hashable:
    if isinstance(thing, ATOMS):
        return thing
    if _is_value(thing):
        return thing  # type: ignore[no-any-return]
    if id(thing) in met:
        return "again", met[id(thing)]
    met[id(thing)] = len(met)
    return type(thing).__name__, *(_freeze(part, met) for part in _parts(thing))


def _is_value(thing: object) -> bool:
    if not (dataclasses.is_dataclass(thing) and thing.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        return False
    try:
        hash(thing)
    except TypeError:
        return False
    return True


def _parts(thing: Any) -> list[Any]:
    match thing:
        case dict():
            return [part for item in thing.items() for part in item]
        case list() | tuple():
            return list(thing)
        case set() | frozenset():
            return sorted(thing, key=repr)
        case trio.Event():
            return [thing.is_set()]
        case types.CoroutineType():
            frame = thing.cr_frame
            known = [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]
            return [thing.__qualname__, *known, thing.cr_await]
        case types.GeneratorType():
            return [thing.__qualname__, thing.gi_frame.f_lasti, *thing.gi_frame.f_locals.values()]
        case types.MethodType():
            return [thing.__func__, thing.__self__]
        case types.FunctionType():
            return [thing.__qualname__, *(cell.cell_contents for cell in thing.__closure__ or ())]
    if type(thing).__name__ == "coroutine_wrapper":
        return []
    if dataclasses.is_dataclass(thing):
        return [getattr(thing, each.name) for each in dataclasses.fields(thing)]
    return list(vars(thing).values())
