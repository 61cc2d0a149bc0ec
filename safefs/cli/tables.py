"""Tables of text: folded on a terminal, one line a row in a pipe.

Rich is imported by what prints a table alone: it is a tenth of what a mount needs to start.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PIPE_COLUMNS = 10_000


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(printable, row))
    _print(table)


def print_details(pairs: Iterable[tuple[str, object]]) -> None:
    from rich.table import Column, Table

    table = Table("key", Column("value", overflow="fold"), box=None, show_header=False, pad_edge=False)
    for key, value in pairs:
        table.add_row(key, printable(value))
    _print(table)


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    console.print(table)


def printable(value: object) -> str:
    """A text for a terminal: JSON for what has parts, and bytes that are no UTF-8 escaped."""
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()


def problem_text(problem: dict[str, Any]) -> str:
    """What is wrong with the lock backend, as a daemon says it."""
    count = problem["names"]
    names = f", {count} {'name' if count == 1 else 'names'}" if count else ""
    return f"the lock backend: {problem['text']} (for {problem['seconds']:.0f} s{names})"


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def time_text(seconds: float) -> str:
    """A moment of the wall clock, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
