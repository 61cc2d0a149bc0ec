"""`safefs locks`: who holds and who waits for which lock, on all nodes; and taking locks from their holders."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import click

from safefs.cli.places import mount_of
from safefs.cli.tables import print_rows, problem_text
from safefs.control import mount_above, request
from safefs.errors import SafefsError

ANSWER_SECONDS = 30.0


def show_locks(path: Path | None, *, as_json: bool) -> None:
    """Print every lock and every waiting request of the mount's cluster."""
    mount = mount_of(path, "say which with --at PATH")
    if mount is None:
        raise SafefsError(f"{path}: no safefs mount there" if path else "there is no safefs mount here", errno.EINVAL)
    answer = request(mount.socket_path, {"op": "locks"}, ANSWER_SECONDS)
    entries = answer["locks"]
    entries.sort(key=lambda entry: (entry["path"], entry["kind"], entry["first"]))
    if as_json:
        click.echo(json.dumps(entries, indent=2))
    elif not entries:
        click.echo("no locks")
    else:
        print_rows(("path", "lock", "state", "bytes", "host", "pid", "node"), map(_row, entries))
    if answer.get("problem"):
        click.echo(f"safefs: {problem_text(answer['problem'])}", err=True)


def break_locks(path: str) -> None:
    """Take all locks on `path` from their holders: what these still write through the files fails with EIO.

    They are of names, which need not be there any more: of the name that `path` leads to, as far as it can be followed.
    With a slash at its end it is what a directory has of names that are being made in it, shown in the same way.
    """
    named = Path(os.path.realpath(path))
    mount = mount_above(named)
    if mount is None:
        raise SafefsError(f"{_shown(path, named)}: no safefs mount there", errno.EINVAL)
    below = os.fspath(named.relative_to(mount.mountpoint)) + ("/" if path.endswith("/") else "")
    broken = request(mount.socket_path, {"op": "break", "path": below}, ANSWER_SECONDS)["broken"]
    if not broken:
        text = (
            f"nobody holds a lock on {_shown(path, named)}; `safefs locks --at {mount.mountpoint}` shows what is locked"
        )
        raise SafefsError(text, errno.ENOENT)
    click.echo(f"{broken} broken")


def _shown(path: str, named: Path) -> str:
    """A path as it was written, and where that leads."""
    return path if Path(os.path.abspath(path)) == named else f"{path} (which is {named})"


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    whole = not entry["first"] and entry["last"] is None
    part = "all" if whole else f"{entry['first']} to {'the end' if entry['last'] is None else entry['last']}"
    lock = f"{entry['kind']}, {entry['mode']}"
    return entry["path"], lock, entry["state"], part, entry["host"], str(entry["pid"] or ""), entry["node"]
