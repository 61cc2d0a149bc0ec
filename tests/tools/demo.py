"""`python -m tests.tools.demo`: two downloaders that corrupt a shared cache, and the same on a safefs mount.

What runs is huggingface_hub 1.17.0 itself, against a hub on this machine.  Its flock does nothing here, as on Lustre
and GPFS in their usual set-ups.  The mount is made and taken away with the commands that a user types.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support.hub_race import MODEL_SIZE, Outcome, model_hub, race
from tests.support.venvs import Venv, hub_venv

COMMAND_SECONDS = 60


def safefs(*arguments: str | Path) -> None:
    """A safefs command as a user runs it; its message is shown when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "safefs", *arguments],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.DEVNULL,
        # The daemon stays in the background: with a pipe we would wait for its end.
        stdout=sys.stderr,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"safefs {arguments[0]} failed")


@contextmanager
def mounted(backing: Path, mountpoint: Path) -> Iterator[None]:
    """A mount in the background, and its end."""
    mountpoint.mkdir()
    safefs("mount", backing, mountpoint)
    try:
        yield
    finally:
        safefs("umount", mountpoint)
    if os.path.ismount(mountpoint):
        raise SystemExit(f"{mountpoint} is still mounted")


def run_race(venv: Venv, home: Path) -> Outcome:
    with model_hub() as hub:
        return race(hub, venv, home, home)


def row(name: str, outcome: Outcome) -> tuple[str, ...]:
    """One line of the table."""
    over = outcome.size - MODEL_SIZE
    size = f"{outcome.size:,}" + (f" ({over:+,})" if over else "")
    digest = "[green]right[/]" if outcome.intact else "[red]wrong[/]"
    reader = "[green]undisturbed[/]" if outcome.reader_undisturbed else "[red]sees it change[/]"
    exits = " and ".join(str(status) for status in outcome.exits)
    return name, size, digest, reader, exits


def main() -> int:
    console = Console()
    venv = hub_venv("1.17.0")
    console.print(
        f"Two downloaders (huggingface_hub {venv.versions['huggingface_hub']}, flock without effect) fetch one file of "
        f"{MODEL_SIZE:,} bytes into one cache; the second opens it while the first still writes, and appends after "
        "the first has finished.\n",
        highlight=False,
    )
    with tempfile.TemporaryDirectory(prefix="safefs-demo-") as directory:
        place = Path(directory)
        (place / "bare").mkdir()
        (place / "backing").mkdir()
        bare = run_race(venv, place / "bare" / "hf")
        with mounted(place / "backing", place / "mount"):
            safe = run_race(venv, place / "mount" / "hf")
    table = Table(title="The blob in the cache afterwards")
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("sha256")
    table.add_column("an open reader")
    table.add_column("exits")
    table.add_row(*row("bare directory", bare))
    table.add_row(*row("safefs mount", safe))
    console.print(table)
    corrupted = bare.exits[0] == 0 and not bare.intact
    intact = safe.intact and safe.reader_undisturbed and safe.exits == (0, 0)
    if not corrupted:
        console.print("The bare directory was not corrupted: the race did not happen.", bare.description)
    if not intact:
        console.print("The mount did not keep the blob intact.", safe.description)
    return 0 if corrupted and intact else 1


if __name__ == "__main__":
    sys.exit(main())
