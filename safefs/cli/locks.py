"""`safefs locks`: who holds and who waits for which lock, on all nodes; and taking locks from their holders."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import click

from safefs.cli.tables import print_rows
from safefs.control import LiveMount, find_mounts, request
from safefs.errors import SafefsError

ANSWER_SECONDS = 30.0


def show_locks(path: Path | None, *, as_json: bool) -> None:
    """Print every lock and every waiting request of the mount's cluster."""
    entries = request(_mount_of(path).socket_path, {"op": "locks"}, ANSWER_SECONDS)["locks"]
    entries.sort(key=lambda entry: (entry["path"], entry["kind"], entry["first"]))
    if as_json:
        click.echo(json.dumps(entries, indent=2))
    elif not entries:
        click.echo("no locks")
    else:
        print_rows(("path", "lock", "state", "bytes", "host", "pid", "node"), map(_row, entries))


def break_locks(path: Path) -> None:
    """Take all locks on `path` from their holders: what these still write through the files fails with EIO."""
    absolute = Path(os.path.abspath(path))
    mount = _mount_of(absolute)
    below = os.fspath(absolute.relative_to(mount.mountpoint))
    broken = request(mount.socket_path, {"op": "break", "path": below}, ANSWER_SECONDS)["broken"]
    click.echo(f"{broken} broken" if broken else f"0 broken: nobody holds a lock on {path} any more")


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    whole = not entry["first"] and entry["last"] is None
    part = "all" if whole else f"{entry['first']} to {'the end' if entry['last'] is None else entry['last']}"
    lock = f"{entry['kind']}, {entry['mode']}"
    return entry["path"], lock, entry["state"], part, entry["host"], str(entry["pid"] or ""), entry["node"]


def _mount_of(path: Path | None) -> LiveMount:
    mounts = find_mounts()
    if path is None:
        if len(mounts) != 1:
            raise SafefsError(f"there are {len(mounts)} safefs mounts here: name one", errno.EINVAL)
        return mounts[0]
    absolute = Path(os.path.abspath(path))
    above = [mount for mount in mounts if mount.mountpoint == absolute or mount.mountpoint in absolute.parents]
    if not above:
        raise SafefsError(f"{path}: no safefs mount here", errno.EINVAL)
    return max(above, key=lambda mount: len(mount.mountpoint.parts))
