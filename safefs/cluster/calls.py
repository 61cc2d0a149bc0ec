"""Calls of a shared filesystem, which may not answer: in threads that can be given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import trio

from safefs.cluster.backend import Act, BackendError

CALL_SECONDS = 5.0  # a call that takes longer counts as unanswered
MAX_THREADS = 16
MAX_OWN_THREADS = 2  # for this node's own lease
AT_ONCE = 100  # directories of names, or of nodes, that one call reads

T = TypeVar("T")


class Call(Protocol):
    """Runs a function in a thread; BackendError for whatever goes wrong, also where there is no answer in time."""

    async def __call__(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> T: ...


def batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as a call may be about: thousands in one would take longer than calls may."""
    return (things[at : at + AT_ONCE] for at in range(0, len(things), AT_ONCE))


class _Running(Generic[T]):
    """What a thread does, which may be given up."""

    def __init__(self, act: Act, function: Callable[[], T]) -> None:
        self._act = act
        self._function = function
        self.is_running = False

    def run(self) -> T:
        self.is_running = True
        try:
            return self._act(self._function)
        finally:
            self.is_running = False


class Calls:
    """Of the filesystem at `root`, as whom `act` acts."""

    def __init__(self, root: str, act: Act) -> None:
        self._root = root
        self._act = act
        self._limiter = trio.CapacityLimiter(MAX_THREADS)
        self._own_limiter = trio.CapacityLimiter(MAX_OWN_THREADS)
        self._hanging: dict[str, _Running[Any]] = {}  # calls that were given up, by what they are about

    async def call(self, function: Callable[..., T], /, *arguments: Any, **options: Any) -> T:
        """`Call`.  What one is about is its first argument: while one for it hangs there is no other.

        So a directory that hangs takes few of the threads.
        """
        about = str(arguments[0]) if arguments else function.__name__
        return await self._run(about, self._limiter, partial(function, *arguments, **options))

    async def call_own(self, function: Callable[..., T], /, *arguments: Any) -> T:
        """The same for this node's own lease, which other calls that hang must not cost."""
        return await self._run("", self._own_limiter, partial(function, *arguments))

    async def _run(self, about: str, limiter: trio.CapacityLimiter, function: Callable[[], T]) -> T:
        hanging = self._hanging.get(about)
        if hanging is not None and hanging.is_running:
            raise BackendError(f"{self._root} does not answer to an earlier call")
        self._hanging.pop(about, None)
        running = _Running(self._act, function)
        try:
            with trio.fail_after(CALL_SECONDS):
                return await trio.to_thread.run_sync(running.run, abandon_on_cancel=True, limiter=limiter)
        except trio.TooSlowError:
            if running.is_running:  # it may also have had no thread
                self._hanging[about] = running
            raise BackendError(f"{self._root} does not answer") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendError(f"{self._root}: {error}") from None
        except RuntimeError as error:  # there are no more threads to be had
            raise BackendError(str(error)) from None
