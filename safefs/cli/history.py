"""`safefs history` and `safefs restore`: versions that a name showed before."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import click

from safefs.cli.places import Place, find_place
from safefs.cli.publishing import publish_copy
from safefs.cli.tables import print_rows, size_text, time_text
from safefs.digest import DIGEST_ATTRIBUTE
from safefs.errors import SafefsError
from safefs.retained import RetainedVersion
from safefs.state import StateDirectory


def show_history(path: Path, *, as_json: bool) -> None:
    """Print the versions that are still kept, the newest first."""
    place = find_place(path)
    state = place.state()
    with state.acting():
        versions = _versions(place, state, path)
        described = [_described(number, version) for number, version in enumerate(versions, 1)]
    if as_json:
        click.echo(json.dumps(described, indent=2))
    elif not described:
        click.echo("no earlier version is kept")
    else:
        columns = ("version", "until", "kept until", "size", "digest")
        print_rows(columns, ([entry[column] for column in columns] for entry in described))


def restore_version(text: str, target: Path | None) -> None:
    """Publish an earlier version through the mount, under its own name or another."""
    name, _, number = text.rpartition("@")
    if not name or not number.isdecimal():
        raise SafefsError(f"{text}: say which version: PATH@N, with N from safefs history PATH", errno.EINVAL)
    path = Path(name)
    place = find_place(path)
    if place.mount is None:
        raise SafefsError(f"{path}: restoring is a publish: give the path on a mount", errno.EINVAL)
    state = place.state()
    with state.acting():
        versions = _versions(place, state, path)
    if not 1 <= int(number) <= len(versions):
        raise SafefsError(f"{text}: {len(versions)} earlier versions are kept; see safefs history", errno.ENOENT)
    destination = Path(os.path.abspath(target or path))
    try:
        publish_copy(state.open_kept(versions[int(number) - 1].file), destination)
    except OSError as error:
        raise SafefsError(f"{destination}: not restored: {error.strerror}", error.errno or errno.EIO) from None
    click.echo(f"restored {destination}")


def _versions(place: Place, state: StateDirectory, path: Path) -> list[RetainedVersion]:
    absolute = Path(os.path.abspath(path))
    on_mount = place.mount is not None and absolute.is_relative_to(place.mount.mountpoint)
    top = place.mount.mountpoint if place.mount is not None and on_mount else place.backing
    return state.retained.of(os.fspath(absolute.relative_to(top)))


def _described(number: int, version: RetainedVersion) -> dict[str, object]:
    status = version.file.stat()
    try:
        digest = os.getxattr(version.file, DIGEST_ATTRIBUTE).decode("ascii", "replace")
    except OSError:
        digest = ""
    return {
        "version": number,
        "until": time_text(version.replaced),
        "kept until": time_text(version.expires),
        "size": size_text(status.st_size),
        "size_bytes": status.st_size,
        "digest": digest,
        "file": os.fspath(version.file),
    }
