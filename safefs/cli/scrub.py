"""`safefs scrub` and `safefs show`: whether files are still what they were published as, and what is known of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from safefs.backing import STATE_NAME, is_hidden
from safefs.cli.places import Place, find_place
from safefs.cli.tables import print_details, printable, size_text, time_text
from safefs.config import load_rules
from safefs.digest import DIGEST_ATTRIBUTE, ORIGIN_ATTRIBUTE
from safefs.errors import SafefsError
from safefs.events import EventKind, append_events, event_of
from safefs.rules import Policy
from safefs.scrub import Finding, Verdict, scrub, walk
from safefs.scrub import Path as Components

if TYPE_CHECKING:
    from rich.progress import Progress

CHECKPOINT_SECONDS = 5.0
DAMAGED_CODE, FAILED_CODE = 1, 2


def show_version(path: Path, *, as_json: bool) -> None:
    """Print what was written down when a file was published."""
    report: dict[str, object] = {"path": os.fspath(path)}
    try:
        status = os.stat(path)
        report |= {"size": status.st_size, "inode": status.st_ino, "modified": time_text(status.st_mtime)}
        report["digest"] = os.getxattr(path, DIGEST_ATTRIBUTE).decode("ascii", "replace")
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise SafefsError(f"{path}: {error.strerror}", error.errno or errno.EIO) from None
        report["digest"] = "none: not published by safefs, or without verifying"
    with suppress(OSError, ValueError):
        origin = json.loads(os.getxattr(path, ORIGIN_ATTRIBUTE))
        report |= {key: value for key, value in origin.items() if key not in ("time", "size")}
        report["published"] = time_text(float(origin["time"]))
    click.echo(json.dumps(report, indent=2)) if as_json else print_details(report.items())


@dataclass(frozen=True)
class _Tree:
    """What is scrubbed.  `below`: where it lies under the mount's root, which is what rules speak of."""

    path: Path
    below: Path
    place: Place | None  # None: safefs has never worked on it


def scrub_tree(path: Path, config: Path | None, *, threads: int, repair: bool, resume: bool, as_json: bool) -> None:
    """Check every file below `path`; exits 1 when one is damaged, 2 when some could not be read."""
    tree = _tree(path, repair=repair)
    try:
        root = os.open(tree.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SafefsError(f"{path}: {error.strerror}", error.errno or errno.EIO) from None
    rules, below = load_rules(config), os.fsencode(tree.below)

    def policy_of(name: bytes, directory: bytes) -> Policy:
        return rules.policy(name, os.path.normpath(os.path.join(below, directory)))

    checkpoint = Checkpoint(tree.path)
    paths = walk(root, lambda name: name == STATE_NAME or is_hidden(name), checkpoint.load() if resume else ())
    counts: Counter[Verdict] = Counter()
    read = 0
    with _progress() as progress:
        task = progress.add_task("", total=None)
        for finding in checkpoint.kept(scrub(root, paths, policy_of, threads)):
            counts[finding.verdict] += 1
            read += finding.size_bytes
            progress.update(task, description=f"{counts.total():,} files, {size_text(read)}")
            _report(finding, path, as_json=as_json)
            if finding.verdict is Verdict.DAMAGED and repair and tree.place is not None:
                _quarantine(tree.place, tree.below, root, finding)
    checkpoint.remove()
    os.close(root)
    _summary(counts, read, as_json=as_json)
    if counts[Verdict.DAMAGED]:
        sys.exit(DAMAGED_CODE)
    if counts[Verdict.UNREADABLE]:
        sys.exit(FAILED_CODE)


def _tree(path: Path, *, repair: bool) -> _Tree:
    absolute = Path(os.path.abspath(path))
    try:
        place = find_place(absolute)
    except SafefsError:
        if repair:
            raise
        return _Tree(absolute, absolute.relative_to("/"), None)
    top = place.mount.mountpoint if place.mount and absolute.is_relative_to(place.mount.mountpoint) else place.backing
    below = absolute.relative_to(top)
    if not repair:
        return _Tree(absolute, below, place)
    place.state()  # says now, and not after an hour, that it cannot be used
    return _Tree(place.backing / below, below, place)  # what is taken away is taken from the backing directory


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _report(finding: Finding, root: Path, *, as_json: bool) -> None:
    name = os.fsdecode(b"/".join(finding.path))
    if as_json:
        known = {"path": name, "verdict": finding.verdict.name.lower(), "problem": finding.problem}
        if finding.verdict not in (Verdict.GOOD, Verdict.UNKNOWN):
            click.echo(json.dumps(known))
    elif finding.verdict in (Verdict.DAMAGED, Verdict.UNREADABLE):
        click.echo(printable(f"{root / name}: {finding.verdict.name.lower()}: {finding.problem}"))


def _summary(counts: Counter[Verdict], read: int, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({verdict.name.lower(): counts[verdict] for verdict in Verdict} | {"bytes": read}))
        return
    parts = [f"{counts.total():,} files, {size_text(read)} read", f"{counts[Verdict.GOOD]:,} good"]
    parts += [f"{counts[verdict]:,} {text}" for verdict, text in _WORDS.items() if counts[verdict]]
    click.echo("; ".join(parts))


_WORDS = {
    Verdict.DAMAGED: "damaged",
    Verdict.UNREADABLE: "not readable",
    Verdict.CHANGED: "changed meanwhile",
    Verdict.UNKNOWN: "of which nothing is known",
}


def _quarantine(place: Place, below: Path, root: int, finding: Finding) -> None:
    """Take a damaged file's name away and keep its bytes, unless the name shows another file by now."""
    state, write_id, name = place.state(), secrets.token_hex(8), finding.path[-1]
    record: dict[str, object] = {
        "write_id": write_id,
        "name": os.fsdecode(name),
        "path": os.fspath(below / os.fsdecode(b"/".join(finding.path))),
        "reason": f"scrub: {finding.problem}",
        "errno": "EIO",
        "size_bytes": finding.size_bytes,
    }
    directory = os.open(b"/".join((b".", *finding.path[:-1])), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        with state.name_lock(os.fstat(directory).st_ino, name):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if status.st_ino != finding.ino:
                return
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                with state.acting():
                    state.keep(fd, write_id, {**record, "uid": status.st_uid, "gid": status.st_gid}, (directory, name))
            finally:
                os.close(fd)
    finally:
        os.close(directory)
    event = event_of(EventKind.DAMAGED, str(record["path"]), {"write_id": write_id, "reason": finding.problem})
    with state.acting():
        append_events(state.events, f"cli-{socket.gethostname()}", [event])


class Checkpoint:
    """How far a scrub of a tree has come, for one that was interrupted."""

    def __init__(self, root: Path) -> None:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
        self._file = base / "safefs" / f"scrub-{name}.json"

    def load(self) -> Components:
        try:
            return tuple(os.fsencode(part) for part in json.loads(self._file.read_text(encoding="ascii")))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError) as error:
            raise SafefsError(f"{self._file}: cannot be read ({error}): start without --resume", errno.EINVAL) from None

    def kept(self, findings: Iterator[Finding]) -> Iterator[Finding]:
        """The findings, of which the last is written down now and then."""
        written = time.monotonic()
        last: Components = ()
        try:
            for finding in findings:
                yield finding
                last = finding.path
                if time.monotonic() - written > CHECKPOINT_SECONDS:
                    self._write(last)
                    written = time.monotonic()
        finally:
            if last:
                self._write(last)

    def _write(self, path: Components) -> None:
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(".new")
            temporary.write_text(json.dumps([os.fsdecode(part) for part in path]), encoding="ascii")
            temporary.rename(self._file)

    def remove(self) -> None:
        with suppress(OSError):
            self._file.unlink()
