"""What two probes found out about one directory, on record in the state directory; and what rests on it.

`-o locks=native` is for filesystems whose fcntl locks keep out processes on other nodes, which nothing on one node can
tell.  So it needs a verdict: two probes met in the directory (`safefs probe DIR --peer`), they were two clients, and an
OFD lock of one kept the other out.

Two clients are two superblocks: of different boots, or of one boot with different device numbers (two mounts that are
one superblock, such as bind mounts, ask the server as one client, and its kernel decides between them alone).  On a
filesystem of one node there is no second client, and two probes on this one have shown all that there is to see.

Lease files need one as well on a filesystem that does not say what it is (FUSE without a subtype), since of two renames
on one node its kernel decides, whatever the filesystem does.

Not guaranteed: that every other client is mounted as those two were.  What its mount options tell is looked at here;
for what they do not show, a node that joins looks whether it sees the locks of those that are there
(safefs/cluster/ofd.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safefs.errors import SafefsError
from safefs.family import REFUSED, Mounted, Reach
from safefs.model import STATE_NAME

FORMAT = 2  # 1 took a file that the other could not open for a lock that excludes
FILE = "probe.json"
READ_SECONDS, AGAIN_SECONDS = 3.0, 0.05  # clients remember for a second which inode a name shows
OFD_EXCLUDES = "OFD excludes"
ONE_MOUNT = "came through one mount, which says nothing of a second client"
# Whether names are decided in one place.  Not by renames alone: on rclone they had one winner, and new names had two.
RACES = ("rename has one winner", "O_EXCL has one winner")


@dataclass(frozen=True)
class Client:
    """Who probed: a superblock on a host.  `id` is a hash of boot and device, the same for all on that superblock."""

    id: str
    host: str

    @classmethod
    def here(cls, mounted: Mounted) -> Client:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return cls(hashlib.sha256(f"{boot} {mounted.device}".encode()).hexdigest()[:16], socket.gethostname())


@dataclass(frozen=True)
class Verdict:
    """One meeting of two probes.  `time` is for people (seconds since the epoch); nothing is decided by it."""

    time: float
    kind: str
    clients: tuple[Client, ...]
    results: Mapping[str, str]  # by what was tried, in words
    excludes: bool

    @property
    def two_clients(self) -> bool:
        return len({client.id for client in self.clients}) > 1

    @property
    def undecided(self) -> str:
        """A race for names that did not have one winner each time, in words; empty where all had."""
        results = {race: self.results.get(race, "not tried") for race in RACES}
        return next((f"{race}: {result}" for race, result in results.items() if result != "yes"), "")

    def text(self) -> str:
        hosts = " and ".join(client.host for client in self.clients)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        return f"the probe of {when} on {hosts}"

    def to_json(self) -> dict[str, Any]:
        clients = [{"id": client.id, "host": client.host} for client in self.clients]
        return {
            "format": FORMAT,
            "time": self.time,
            "filesystem": self.kind,
            "clients": clients,
            "results": dict(self.results),
            "excludes": self.excludes,
        }

    @classmethod
    def from_json(cls, data: Any) -> Verdict:
        """ValueError for what another version has written, or is no verdict."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"a verdict of format {data['format']!r}")
            clients = tuple(Client(str(client["id"]), str(client["host"])) for client in data["clients"])
            kind, results = str(data["filesystem"]), dict(data["results"])
            return cls(float(data["time"]), kind, clients, results, data["excludes"] is True)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no verdict: {error!r}") from None


def write(state: Path, verdict: Verdict) -> Path:
    """Put a verdict on record in place of the one before, whole or not at all.  Raises OSError."""
    state.mkdir(mode=0o700, exist_ok=True)
    path = state / FILE
    fresh = path.with_name(f"{FILE}.{secrets.token_hex(4)}")
    try:
        fresh.write_text(json.dumps(verdict.to_json(), indent=1) + "\n", encoding="utf-8")
        os.rename(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def read(state: Path) -> Verdict | None:
    """The verdict on record.  Raises OSError and ValueError.

    A client that remembers which inode the name showed before another replaced it has no such file, for a while
    (JuiceFS), or a stale one: what is listed and not there is looked for again.
    """
    deadline = time.monotonic() + READ_SECONDS
    while True:
        try:
            return Verdict.from_json(json.loads((state / FILE).read_text(encoding="utf-8")))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            if not _is_listed(state):
                return None
            if time.monotonic() > deadline:
                raise
        time.sleep(AGAIN_SECONDS)


def _is_listed(state: Path) -> bool:
    with suppress(FileNotFoundError):
        return FILE in os.listdir(state)
    return False


def probe_command(backing: Path, state: Path) -> str:
    """What an operator runs for a verdict in this state directory."""
    options: Iterable[str] = () if state == backing / STATE_NAME else ("--state", os.fspath(state))
    return shlex.join(["safefs", "probe", os.fspath(backing), *options, "--peer"])


def on_record(state: Path, mounted: Mounted, what: str) -> Verdict:
    """The verdict of this filesystem, `what` it is about in words; LookupError, in words, where there is none."""
    try:
        verdict = read(state)
    except (OSError, ValueError) as error:
        raise LookupError(f"{state / FILE} cannot be read ({error})") from None
    if verdict is None:
        raise LookupError(f"nobody has found out yet whether {what}")
    if verdict.kind != mounted.kind:
        raise LookupError(f"{verdict.text()} was of {verdict.kind}, and this is {mounted.kind}")
    return verdict


def why_native(state: Path, mounted: Mounted, command: str) -> str:
    """Why the backing's own locks may be relied on, in words; SafefsError (EOPNOTSUPP) where they may not."""

    def refusal(reason: str, remedy: str = f"run `{command}` on two nodes at once") -> SafefsError:
        return SafefsError(f"-o locks=native cannot be had: {reason}; {remedy}", errno.EOPNOTSUPP)

    if mounted.kind in REFUSED:
        raise refusal(f"{mounted.kind}: {REFUSED[mounted.kind]}", "use -o locks=etcd://HOST:PORT")
    reach, by = mounted.reach()
    if reach in (Reach.CLIENT, Reach.NOBODY):
        raise refusal(f"{by}, so its locks keep out {reach.value}", "use -o locks=leasefile or etcd://HOST:PORT")
    try:
        verdict = on_record(state, mounted, f"the locks of {mounted.kind or 'this filesystem'} exclude")
    except LookupError as missing:
        raise refusal(str(missing)) from None
    if not verdict.excludes:
        result = verdict.results.get(OFD_EXCLUDES, "not tried")
        raise refusal(
            f"{verdict.text()} did not find that OFD locks exclude ({result})",
            "use -o locks=leasefile or etcd://HOST:PORT",
        )
    if not (verdict.two_clients or mounted.is_local):
        raise refusal(f"{verdict.text()} {ONE_MOUNT}")
    return f"{verdict.text()} found that OFD locks exclude, and {by}"
