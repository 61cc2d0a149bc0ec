"""Settles what a dead daemon left behind: hidden temps, and partial files that it had taken over.

Whether another daemon is dead is never guessed.  On this host its process is gone (same boot, same pid namespace); a
host that has booted again has no processes of before; any other daemon is watched, and is dead when its heartbeat has
not changed for `DEAD_AFTER_SECONDS` of this daemon's own monotonic clock.  No clocks or mtimes are compared.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import trio

from safefs import backing
from safefs.backing import DAEMON, RENAME_NOREPLACE, Backing
from safefs.events import EventKind, EventLog
from safefs.state import DAEMONS, RECORD_VERSION, DaemonRecord, StateDirectory, known_dead

log = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 60.0
SETTLING_SUFFIX = ".settling"


class Recovery:
    """Keeps this daemon's heartbeat and looks for daemons that have lost theirs."""

    def __init__(self, store: Backing, state: StateDirectory, record: DaemonRecord, events: EventLog) -> None:
        self._backing = store
        self._events = events
        self._state = state
        self._record = record
        self._beats: dict[str, tuple[str, float]] = {}  # node id → heartbeat, and when it was first seen so

    async def run(self) -> None:
        """Until cancelled: beat, and settle what dead daemons left."""
        while True:
            try:
                await self._backing.run(DAEMON, self._record.beat)
                await self._backing.run(DAEMON, self.settle_dead)
            except OSError as error:
                log.warning("the state directory cannot be used at the moment: %s", error)
            await trio.sleep(BEAT_SECONDS)

    def settle_dead(self) -> None:
        """Look at every other daemon's record once.  Blocks."""
        for path in sorted((self._state.path / DAEMONS).iterdir()):
            if path != self._record.path and self._is_dead(path):
                self._settle(path)

    def _is_dead(self, path: Path) -> bool:
        try:
            identity = json.loads((path / "identity.json").read_text(encoding="ascii"))
        except (OSError, ValueError):
            identity = {}  # being made, or cut short by a crash: only its heartbeat can tell
        if identity.get("version", RECORD_VERSION) != RECORD_VERSION:
            return False
        known = known_dead(identity)
        return self._has_stopped_beating(path) if known is None else known

    def _has_stopped_beating(self, path: Path) -> bool:
        try:
            beat = (path / "heartbeat").read_text(encoding="ascii")
        except OSError:
            beat = ""
        now = time.monotonic()
        last, since = self._beats.get(path.name, (None, now))
        if beat != last:
            self._beats[path.name] = (beat, now)
            return False
        return now - since > DEAD_AFTER_SECONDS

    def _settle(self, path: Path) -> None:
        """Clean up after one dead daemon; of several that want to, the one whose rename succeeds does."""
        mine = path.with_name(f"{path.name.partition('.')[0]}{SETTLING_SUFFIX}-{self._backing.node_id}")
        try:
            path.rename(mine)
        except FileNotFoundError:
            return
        self._beats.pop(path.name, None)
        settled = 0
        for entry in self._journal(mine / "journal"):
            try:
                settled += self._settle_directory(entry, path.name.partition(".")[0])
            except (FileNotFoundError, NotADirectoryError):
                pass  # the directory is gone, and what was in it went to quarantine with its rmdir
            except OSError as error:
                log.warning("leftovers in %r could not be settled: %s", entry["directory"], error)
        shutil.rmtree(mine)
        self._events.note(EventKind.RECOVERED, "", daemon=path.name.partition(".")[0], files=settled)
        log.info("settled what the dead daemon %s left behind: %d files", path.name, settled)

    @staticmethod
    def _journal(path: Path) -> list[dict[str, str]]:
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except OSError:
            return []
        entries = []
        for line in lines:
            with suppress(ValueError):  # the last line may be cut short
                entries.append(json.loads(line))
        # Partial files first: they have a name to go back to, and are hidden files of their directory as well.
        return sorted(entries, key=lambda entry: "hidden" not in entry)

    def _settle_directory(self, entry: dict[str, str], node_id: str) -> int:
        fd = backing.open_below(self._backing.root_fd, os.fsencode(entry["directory"]))
        try:
            if "hidden" in entry:
                return self._put_back(fd, os.fsencode(entry["hidden"]), os.fsencode(entry["name"]))
            prefix = backing.HIDDEN_PREFIX + node_id.encode() + b"~"
            names = [name for name in map(os.fsencode, os.listdir(fd)) if name.startswith(prefix)]
            for name in names:
                self._state.keep_leftover(fd, name, "its daemon ended before it was published")
            return len(names)
        finally:
            os.close(fd)

    def _put_back(self, directory: int, hidden: bytes, name: bytes) -> int:
        """A partial file that was taken over goes back under its name, unless there is a new one."""
        if backing.identity_at(directory, hidden) is None:
            return 0
        try:
            backing.rename(directory, hidden, directory, name, RENAME_NOREPLACE)
        except OSError:
            self._state.keep_leftover(directory, hidden, "its daemon ended, and its name has a new file")
        return 1
