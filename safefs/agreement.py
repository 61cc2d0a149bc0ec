"""That the nodes of a backing directory share their locks: what all of them have to have set alike.

Three things could make two nodes lock apart, each for itself and without an error: other settings (another lock
backend, another prefix, another lease), another state directory, and another etcd at the end of the same settings.  The
first stands in every daemon's record.  The second is found out at the backing's root, where whoever keeps his state
elsewhere leaves a mark.  For the third a daemon notes in its record which etcd it joins, by an id that is kept there.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safefs.errors import SafefsError
from safefs.lease import LONGEST_LEASE_SECONDS
from safefs.model import STATE_NAME
from safefs.state import (
    BEAT_SECONDS,
    CLUSTER,
    SHARING,
    DaemonRecord,
    StateDirectory,
    agreed,
    etcd_of,
    heartbeat_of,
    identity_of,
    noted,
)

log = logging.getLogger(__name__)

WATCH_SECONDS = 3 * BEAT_SECONDS + 1  # at least, for the heartbeat of a daemon on another host
LOOK_SECONDS = 0.25

IsDead = Callable[[Mapping[str, Any]], bool | None]  # what this host knows of a daemon (state.known_dead)


def require_one_state(state: StateDirectory, backing: Path) -> str:
    """What the nodes of the backing directory call themselves together.

    SafefsError where others keep their state in another directory.
    """
    own, mark = state.cluster_id()
    default = backing / STATE_NAME
    found = own
    if state.path != default:
        try:
            default.mkdir(mode=0o700, exist_ok=True)
            found, mark = agreed(default, own, os.fspath(state.path))
        except OSError as error:
            log.warning("other nodes cannot be told that the state is in %s: %s", state.path, error)
    if found != own or (mark and state.path == default):
        raise SafefsError(
            f"the nodes of {backing} keep their state in {mark or default}, not in {state.path}: locks of the two would"
            f" not exclude each other; give all the same -o state=DIR, or remove {default / CLUSTER} where no node uses"
            " it any more",
            errno.EBUSY,
        )
    return own


def state_of(backing: Path) -> Path:
    """Where the nodes of a backing directory keep their state."""
    default = backing / STATE_NAME
    with suppress(OSError):
        _, elsewhere = noted(default) or ("", "")
        if elsewhere:
            return Path(elsewhere)
    return default


def watch_seconds(lease_seconds: float) -> float:
    """How long it is waited for a daemon's heartbeat.

    One whose heart has not beaten for so long was frozen at the latest when the next beat was due; it renewed its lease
    before that for the last time.
    """
    return max(WATCH_SECONDS, lease_seconds + BEAT_SECONDS + 2)


def require_same_settings(record: DaemonRecord, sharing: Mapping[str, Any], is_dead: IsDead) -> None:
    """SafefsError where another living daemon shares its locks otherwise.  Blocks, where it may be a dead one's record.

    After this daemon's own record is there: of two that start at once one sees the other, and of a record that is being
    made, whose identity is empty yet, the daemon will see this one.
    """
    others = {path: identity_of(path) for path in _others(record)}
    others = {path: each for path, each in others.items() if each.get(SHARING, sharing) != sharing}
    longest = max((_lease_of(each) for each in others.values()), default=0.0)
    found = _one_that_lives(others, is_dead, watch_seconds(longest), beat=record.beat)
    if found is not None:
        raise SafefsError(_difference(found, sharing), errno.EBUSY)


def _settings_of(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a daemon's locks depend on; nothing where its record is damaged, or of another version."""
    settings = identity.get(SHARING)
    return settings if isinstance(settings, dict) else {}


def _lease_of(identity: Mapping[str, Any]) -> float:
    """How long a daemon's lease is; 0 where it has none, or where that is damaged: it would be waited for."""
    seconds = _settings_of(identity).get("lease_seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 < seconds <= LONGEST_LEASE_SECONDS else 0.0


def require_same_etcd(record: DaemonRecord, etcd: str, is_dead: IsDead, lease_seconds: float) -> None:
    """Note in this daemon's record which etcd it is about to join; SafefsError where another living one is in another.

    Blocks, as `require_same_settings` does, but something else has this daemon's heart beat.  The note comes before the
    look, so of two that join at once one sees the other; it goes again where this daemon is not let in, and does not
    keep those out who are in the right one.
    """
    record.note_etcd(etcd)

    def is_elsewhere(path: Path) -> bool:
        return etcd_of(path) not in ("", etcd)

    others = {path: identity_of(path) for path in _others(record) if is_elsewhere(path)}
    found = _one_that_lives(others, is_dead, watch_seconds(lease_seconds), is_elsewhere)
    if found is not None:
        record.note_etcd("")
        raise SafefsError(
            f"the daemon on {found.get('host')} (process {found.get('pid')}) keeps its locks in another etcd: nodes of"
            " different ones would not exclude each other; name the same etcd in -o locks everywhere (localhost is"
            " another host on each), or unmount the others first",
            errno.EBUSY,
        )


def _others(record: DaemonRecord) -> Iterator[Path]:
    """The records of the other daemons."""
    return (path for path in record.path.parent.iterdir() if path != record.path)


def _one_that_lives(
    others: Mapping[Path, Mapping[str, Any]],
    is_dead: IsDead,
    seconds: float,
    matters: Callable[[Path], bool] = lambda _: True,
    beat: Callable[[], None] = lambda: None,
) -> Mapping[str, Any] | None:
    """Who is the first of the daemons with these records and identities that is seen to live; None where none is.

    Those count that still matter by then.  Blocks: of one on another host only its heartbeat can tell, and to it only
    this one's.
    """
    others = dict(others)
    beats = {path: heartbeat_of(path) for path in others}
    deadline = time.monotonic() + seconds
    while others:
        for path, identity in list(others.items()):
            dead = is_dead(identity)
            lives = dead is False or (dead is None and heartbeat_of(path) not in ("", beats[path]))
            if lives and matters(path):
                return identity
            if dead or lives or time.monotonic() > deadline:
                del others[path]
        if others:
            beat()
            time.sleep(LOOK_SECONDS)
    return None


def _difference(identity: Mapping[str, Any], sharing: Mapping[str, Any]) -> str:
    theirs = _settings_of(identity)
    names = [name for name in {**theirs, **sharing} if theirs.get(name) != sharing.get(name)]
    what = " and ".join(f"{name}={theirs[name]}" if name in theirs else f"no {name}" for name in names)
    return (
        f"the daemon on {identity.get('host')} (process {identity.get('pid')}) has {what}: with other settings nodes"
        " would not exclude each other; mount with the same -o options, or unmount the others first"
    )
