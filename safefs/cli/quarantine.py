"""`safefs quarantine`: what was written and not published, and what becomes of it."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import click
import xxhash

from safefs.cli.places import find_place
from safefs.cli.publishing import publish_copy
from safefs.cli.tables import print_details, print_rows, size_text, time_text
from safefs.config import parse_size
from safefs.digest import digest_text, read_file
from safefs.errors import SafefsError
from safefs.events import EventKind, append_events, event_of
from safefs.rules import parse_duration
from safefs.state import Kept, StateDirectory


def list_quarantine(path: Path | None, *, as_json: bool) -> None:
    """Print what is in quarantine, the oldest first."""
    entries = _kept(find_place(path).state())
    if as_json:
        click.echo(json.dumps([_described(entry) for entry in entries], indent=2))
    elif not entries:
        click.echo("nothing is in quarantine")
    else:
        print_rows(("id", "when", "size", "uid", "pid", "path", "why"), map(_row, entries))


def _row(entry: Kept) -> tuple[object, ...]:
    uid, pid, why = (entry.record.get(key, "") for key in ("uid", "pid", "reason"))
    return entry.write_id, time_text(entry.time), size_text(entry.size_bytes), uid, pid, entry.path, why


def show_quarantined(write_id: str, path: Path | None, *, as_json: bool) -> None:
    """Print all that is known of one file, with the digest of its bytes."""
    state = find_place(path).state()
    entry = _entry(state, write_id)
    description = {**_described(entry), "digest": _digest(state.open_kept(entry.file))}
    click.echo(json.dumps(description, indent=2)) if as_json else print_details(description.items())


def restore_quarantined(write_id: str, path: Path | None, target: Path | None) -> None:
    """Publish a file through the mount: with every check that a close makes, under the name that it was meant for."""
    place = find_place(path)
    state = place.state()
    entry = _entry(state, write_id)
    if place.mount is None:
        raise SafefsError(
            f"{place.backing}: restoring is a publish: name a mountpoint, not the directory", errno.EINVAL
        )
    if target is None:
        if not entry.path:
            raise SafefsError(f"{write_id}: where it belongs was not written down: say it with --to", errno.EINVAL)
        target = place.mount.mountpoint / entry.path
    absolute = Path(os.path.abspath(target))
    if place.mount.mountpoint not in absolute.parents:
        raise SafefsError(f"{target}: not on the mount {place.mount.mountpoint}", errno.EINVAL)
    try:
        publish_copy(state.open_kept(entry.file), absolute, entry.copied_from)
    except OSError as error:
        number = error.errno or errno.EIO
        raise SafefsError(f"{target}: not restored: {error.strerror}; it stays in quarantine", number) from None
    with state.acting():
        state.purge(write_id)
        _note(state, EventKind.RESTORED, [entry], to=os.fspath(absolute.relative_to(place.mount.mountpoint)))
    click.echo(f"restored {target}")


def purge(
    write_ids: tuple[str, ...], path: Path | None, *, older: str | None, over: str | None, everything: bool
) -> None:
    """Remove files for good: by id, by age, by what all of them together may take, or all."""
    if not (write_ids or older or over or everything):
        raise SafefsError("say what to purge: ids, --older 30d, --over 100G or --all", errno.EINVAL)
    state = find_place(path).state()
    gone = [_entry(state, write_id) for write_id in write_ids]
    gone += _kept(state) if everything else []
    limits = _limits(older, over)
    with state.acting():
        for entry in gone:
            state.purge(entry.write_id)
        if older or over:
            gone += state.prune(*limits)
        _note(state, EventKind.PURGED, gone)
    click.echo(f"purged {len(gone)} files, {size_text(sum(entry.size_bytes for entry in gone))}")


def _limits(older: str | None, over: str | None) -> tuple[float, int]:
    try:
        return parse_duration(older or "off"), parse_size(over or "off")
    except ValueError as error:
        raise SafefsError(f"{older or over!r} {error}", errno.EINVAL) from None


def _kept(state: StateDirectory) -> list[Kept]:
    with state.acting():
        return state.kept()


def _entry(state: StateDirectory, write_id: str) -> Kept:
    for entry in _kept(state):
        if entry.write_id == write_id:
            return entry
    raise SafefsError(f"{write_id}: nothing in quarantine has this id; see safefs quarantine list", errno.ENOENT)


def _described(entry: Kept) -> dict[str, object]:
    known = {"write_id": entry.write_id, "path": entry.path, "size_bytes": entry.size_bytes, "file": str(entry.file)}
    return {**entry.record, **known, "time": entry.time, "when": time_text(entry.time)}


def _digest(fd: int) -> str:
    hasher = xxhash.xxh3_128()
    with open(fd, "rb", buffering=0) as file:
        read_file(file.fileno(), [hasher.update])
    return digest_text(hasher)


def _note(state: StateDirectory, kind: EventKind, entries: list[Kept], **details: str) -> None:
    known = ({"write_id": entry.write_id, "size": entry.size_bytes, "uid": os.getuid()} for entry in entries)
    events = [event_of(kind, entry.path, {**more, **details}) for entry, more in zip(entries, known, strict=True)]
    append_events(state.events, f"cli-{socket.gethostname()}", events)
