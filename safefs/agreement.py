"""That the nodes of a backing directory share their locks: what all of them have to have set alike.

Two things could make two nodes lock apart, each for itself and without an error: other settings (another lock backend,
another prefix, another lease), and another state directory.  The first stands in every daemon's record.  The second is
found out at the backing's root, where whoever keeps his state elsewhere leaves a mark.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safefs.errors import SafefsError
from safefs.model import STATE_NAME
from safefs.state import (
    BEAT_SECONDS,
    CLUSTER,
    DAEMONS,
    SHARING,
    StateDirectory,
    agreed,
    heartbeat_of,
    identity_of,
    noted,
)

log = logging.getLogger(__name__)

WATCH_SECONDS = 3 * BEAT_SECONDS + 1  # for the heartbeat of a daemon on another host
LOOK_SECONDS = 0.25


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


def require_same_settings(
    state: StateDirectory, node_id: str, sharing: Mapping[str, Any], is_dead: Callable[[Mapping[str, Any]], bool | None]
) -> None:
    """SafefsError where another living daemon shares its locks otherwise.  Blocks, where it may be a dead one's record.

    After this daemon's own record is there: of two that start at once one sees the other, and of a record that is being
    made, whose identity is empty yet, the daemon will see this one.  `is_dead` is what this host
    knows of a daemon (state.known_dead).
    """
    others = {path: identity_of(path) for path in (state.path / DAEMONS).iterdir() if path.name != node_id}
    others = {path: each for path, each in others.items() if each.get(SHARING, sharing) != sharing}
    beats = {path: heartbeat_of(path) for path in others}
    deadline = time.monotonic() + WATCH_SECONDS
    while others:
        for path, identity in list(others.items()):
            dead = is_dead(identity)
            if dead is False or (dead is None and heartbeat_of(path) not in ("", beats[path])):
                raise SafefsError(_difference(identity, sharing), errno.EBUSY)
            if dead or time.monotonic() > deadline:
                del others[path]
        if others:
            time.sleep(LOOK_SECONDS)


def _difference(identity: Mapping[str, Any], sharing: Mapping[str, Any]) -> str:
    theirs: Mapping[str, Any] = identity[SHARING]
    names = [name for name in {**theirs, **sharing} if theirs.get(name) != sharing.get(name)]
    what = " and ".join(f"{name}={theirs[name]}" if name in theirs else f"no {name}" for name in names)
    return (
        f"the daemon on {identity.get('host')} (process {identity.get('pid')}) has {what}: with other settings nodes"
        " would not exclude each other; mount with the same -o options, or unmount the others first"
    )
