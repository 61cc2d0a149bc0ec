"""SQLite with its rollback journal, written from two nodes: every transaction counts, and the file stays sound.

SQLite excludes with record locks and writes in place.  Where the mounts share no locks (`locks=memory`, the control)
writers overwrite each other.  WAL mode needs memory that all processes share (https://sqlite.org/wal.html), which two
nodes do not have, on whatever filesystem.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import MountFactory
from tests.tools.processes import ending

WRITERS = 4
TRANSACTIONS = 60
WRITER_SECONDS = 200

# Each transaction reads what there is, and writes a row with it.
WRITER = """
import sqlite3, sys
path, writer, transactions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
base = sqlite3.connect(path, timeout=120, isolation_level=None)
assert base.execute("PRAGMA journal_mode").fetchone() == ("delete",)
for n in range(transactions):
    base.execute("BEGIN IMMEDIATE")
    total = base.execute("SELECT count(*) FROM t").fetchone()[0]
    base.execute("INSERT INTO t VALUES (?, ?, ?)", (writer, n, f"{total} " * 200))
    base.execute("COMMIT")
"""
ROWS = "SELECT count(*), count(DISTINCT s) FROM t;"


def sqlite(database: Path, script: str) -> list[str]:
    """What sqlite3(1) answers; its complaints are part of the answer."""
    done = subprocess.run(
        ["sqlite3", database, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    return done.stdout.split("\n")[:-1]


def write(places: list[Path]) -> tuple[list[str], list[str]]:
    """Writers in these places: what those that failed said, and what a check of the database says afterwards."""
    database = places[0] / "data.sqlite"
    assert sqlite(database, "CREATE TABLE t(writer INTEGER, n INTEGER, s TEXT, UNIQUE(writer, n));") == []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                ending(
                    subprocess.Popen(
                        [sys.executable, "-c", WRITER, place / "data.sqlite", str(number), str(TRANSACTIONS)],
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            )
            for number, place in enumerate(places)
        ]
        errors = [writer.communicate(timeout=WRITER_SECONDS)[1] for writer in writers]
        failed = [error for writer, error in zip(writers, errors, strict=True) if writer.returncode]
    return failed, sqlite(database, "PRAGMA integrity_check; " + ROWS)


# As many distinct texts as rows: no transaction worked on a state that another one was replacing.
EVERY_ROW = ["ok", f"{WRITERS * TRANSACTIONS}|{WRITERS * TRANSACTIONS}"]


def test_four_writers_on_two_nodes(make_mount: MountFactory) -> None:
    nodes = [make_mount("-o", "locks=leasefile") for _ in range(2)]
    failed, answer = write([nodes[number % 2].path for number in range(WRITERS)])
    assert failed == []
    assert answer == EVERY_ROW
    for place in (nodes[1].path, nodes[0].backing):
        assert sqlite(place / "data.sqlite", "PRAGMA integrity_check; " + ROWS) == EVERY_ROW
    assert not (nodes[0].backing / "data.sqlite-journal").exists()


def test_control_nodes_that_share_no_locks(make_mount: MountFactory) -> None:
    nodes = [make_mount("-o", "locks=memory") for _ in range(2)]
    failed, answer = write([nodes[number % 2].path for number in range(WRITERS)])
    assert failed or answer != EVERY_ROW
