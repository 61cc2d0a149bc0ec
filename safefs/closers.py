"""Threads that close files: whether one is still in the call by which it closes.

RELEASE comes at the end of that call, of everything that it closes (close_range(2), execve(2), the end of a process);
by then the thread can have sent many FLUSHes, and sleeps while it waits for the answer to each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from safefs.native import native

CLOSING_NS = 20_000_000  # of CPU time: more than the end of a close(2) or close_range(2) takes
CALL_SECONDS = 5.0  # for that long a thread that goes on closing is taken to be in one call


class Closers:
    """Those of one mount."""

    def __init__(self) -> None:
        self._waiting: Counter[int] = Counter()

    @contextmanager
    def waits(self, tid: int) -> Iterator[None]:
        """Meanwhile a thread waits for the answer to a FLUSH."""
        self._waiting[tid] += 1
        try:
            yield
        finally:
            self._waiting[tid] -= 1
            self._waiting += Counter()  # drops what is 0

    def is_waiting(self, tid: int) -> bool:
        """Nobody knows that of callers whose threads have no number here (0): those of other pid namespaces."""
        return tid != 0 and self._waiting[tid] > 0

    @staticmethod
    def flushes(tid: int) -> int:
        """How many FLUSHes a thread has sent, and those that share its slot with it (hot_table.c)."""
        return native.flushes_of(tid)
