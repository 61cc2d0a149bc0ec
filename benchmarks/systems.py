"""What a system is: how it is mounted, and what is missing for it here."""

from __future__ import annotations

import enum
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.mounts import LiveMount, Service
from safefs.config import known_options

COMMAND_SECONDS = 60
CACHED_SECONDS = 60


class Profile(enum.Enum):
    """How long the kernel may keep names and attributes: a system's own default, or the same for all."""

    DEFAULT = "default"
    CACHED = "cached"
    UNCACHED = "uncached"

    @property
    def seconds(self) -> int:
        return CACHED_SECONDS if self is Profile.CACHED else 0


@dataclass
class Place:
    """The directories of one run on one filesystem, and the services that live as long as the run."""

    work: Path
    stack: ExitStack
    services: dict[str, Service] = field(default_factory=dict)
    _mounts: int = 0

    def directory(self, *names: str) -> Path:
        path = self.work.joinpath(*names)
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def backing(self) -> Path:
        return self.directory("backing")

    def new_name(self, system: str) -> str:
        """A name for what one mount needs for itself."""
        self._mounts += 1
        return f"{system}-{self._mounts}"


@dataclass(frozen=True)
class Request:
    """One mount to be made."""

    place: Place
    name: str
    backing: Path
    mountpoint: Path
    profile: Profile

    def own(self, directory: str) -> str:
        """A private directory of this mount."""
        return str(self.place.directory("own", self.name, directory))


Command = Callable[[Request], Sequence[str | Path]]


@dataclass(frozen=True)
class System:
    """One of those compared.

    `shares` says that it shows the backing directory itself, `publishes` that a close on it is durable, `helper` names
    the service that `prepare` starts, `state` tells what a live mount says about itself.  With `once` it is measured in
    the first round only: no target is about it, and with all of them in each round a run would take half a day.
    """

    name: str
    title: str
    command: Command | None = None
    programs: tuple[str, ...] = ()
    version: tuple[str, ...] = ()
    safefs_option: str = ""
    shares: bool = True
    publishes: bool = False
    once: bool = False
    prepare: Callable[[Place], None] | None = None
    helper: str = ""
    state: Callable[[Path], str] | None = None

    def missing(self) -> str | None:
        """Why it cannot be measured here; None if it can."""
        absent = [program for program in self.programs if find_program(program) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        option = self.safefs_option.partition("=")[0]
        if option and option not in known_options():
            return f"this safefs has no option {option}"
        return None

    def version_text(self) -> str:
        """What its program says about its version."""
        if not self.version:
            return ""
        command = [find_program(self.version[0]) or self.version[0], *self.version[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
        lines = (done.stdout + done.stderr).splitlines()
        return next((line.strip() for line in lines if self.version[0] in line), "unknown")

    @contextmanager
    def mounted(self, place: Place, profile: Profile, backing: Path) -> Iterator[LiveMount]:
        """A mount of its own of the directory, or the directory itself; SystemFailedError if it cannot be had."""
        if self.command is None:
            yield LiveMount(backing)
            return
        if self.prepare is not None and self.helper not in place.services:
            self.prepare(place)
        name = place.new_name(self.name)
        mountpoint = place.directory("mnt", name)
        command = self.command(Request(place, name, backing, mountpoint, profile))
        service = Service(command, place.directory("logs") / name)
        helpers = [place.services[self.helper]] if self.helper else []
        mount = LiveMount(mountpoint, service, helpers)
        try:
            mount.await_start()
            yield mount
        finally:
            mount.stop()


def find_program(name: str) -> str | None:
    """A program on the path, or beside this interpreter, where pip puts them."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
