"""How much is measured: sizes, times and limits of a full run and of a quick one."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Scale:
    """Sizes in bytes, counts of files, times in seconds."""

    rounds: int
    # The rounds have this much time; the measures of growth come after them.
    rounds_seconds: float
    # The file for everything that is about contents.
    file_bytes: int
    # How long a loop over names or random offsets goes on; loops that wait for the disk need longer.
    loop_seconds: float
    sync_loop_seconds: float
    client_counts: tuple[int, ...]
    small_files: int
    tree_files: int
    listed_files: int
    walk_sizes: tuple[int, ...]
    # A system whose next walk would take longer than this, going by its last, is not sent on it.
    walk_seconds: float
    # Systems whose files have to be made through their mount are not given larger trees than this.
    made_files: int
    mount_counts: tuple[int, ...]
    crowd_files: int
    # Processes that contend for one lock; how long a loop over locks goes on; how long who is waited for has the lock.
    lock_clients: tuple[int, ...]
    lock_seconds: float
    hold_seconds: float
    long_hold_seconds: float
    # A mount that has not finished a measure by then counts as stuck.
    turn_seconds: float


FULL = Scale(
    rounds=5,
    rounds_seconds=5400,
    file_bytes=1024 * MIB,
    loop_seconds=0.5,
    sync_loop_seconds=1.5,
    client_counts=(1, 2, 4, 8),
    small_files=1000,
    tree_files=10_000,
    listed_files=100_000,
    walk_sizes=(1_000, 10_000, 100_000, 1_000_000),
    walk_seconds=300,
    made_files=100_000,
    mount_counts=(1, 2, 4, 8),
    crowd_files=10_000,
    lock_clients=(1, 2, 4),
    lock_seconds=1.5,
    hold_seconds=0.02,
    long_hold_seconds=0.5,
    turn_seconds=300,
)

QUICK = Scale(
    rounds=3,
    rounds_seconds=80,
    file_bytes=32 * MIB,
    loop_seconds=0.05,
    sync_loop_seconds=0.1,
    client_counts=(1, 4),
    small_files=200,
    tree_files=500,
    listed_files=2_000,
    walk_sizes=(1_000, 10_000),
    walk_seconds=5,
    made_files=1_000,
    mount_counts=(1, 2),
    crowd_files=500,
    lock_clients=(1, 2),
    lock_seconds=0.1,
    hold_seconds=0.02,
    long_hold_seconds=0.1,
    turn_seconds=20,
)
