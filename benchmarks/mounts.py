"""A running system: its mount, what its daemon costs, and its end, also when it hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.errors import SystemFailedError

START_SECONDS = 30
STOP_SECONDS = 30


def device_of(mountpoint: Path) -> str | None:
    """MAJOR:MINOR of what is mounted exactly there.  From the kernel's list, since a stat would ask the daemon."""
    target = os.fspath(mountpoint)
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split(" ")
        if fields[4] == target:
            return fields[2]
    return None


def family(pid: int) -> Iterator[int]:
    """A process and its living descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except OSError:
            continue
        for child in pids:
            yield from family(int(child))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process with all threads it ever had, to the nanosecond; 0 if it is gone."""
    try:
        # The clock of a process, as in <linux/posix-timers.h>; /proc/PID/stat counts in steps of 10 ms.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def memory_bytes(pid: int) -> int:
    """Memory of a process, shared pages counted by their share; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


class Service:
    """A program that runs as long as it is needed, with a log."""

    def __init__(self, command: Iterable[str | os.PathLike[str]], log: Path) -> None:
        self.log = log
        with open(log, "ab") as output:
            # Should this run be killed, its daemons end too, and unmount as they do so.
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else "no message"

    def end(self, patience_seconds: float = STOP_SECONDS) -> None:
        """See it end: by itself within the patience, else by a signal."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self.process.wait(patience_seconds)
                return
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal_number)
                patience_seconds = STOP_SECONDS
        self.process.wait(STOP_SECONDS)


class LiveMount:
    """A directory to measure on: a mount with its daemon, or a bare directory without one."""

    def __init__(self, path: Path, service: Service | None = None, helpers: Iterable[Service] = ()) -> None:
        """`helpers` are services that the daemon needs: what they use counts as the daemon's."""
        self.path = path
        self._service = service
        self._services = [*([service] if service else []), *helpers]

    def pids(self) -> list[int]:
        return [pid for service in self._services if service.running() for pid in family(service.process.pid)]

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(pid) for pid in self.pids())

    def memory_bytes(self) -> int:
        return sum(memory_bytes(pid) for pid in self.pids())

    def await_start(self) -> None:
        """Return once the mount is there; SystemFailedError with the daemon's last line if it does not come."""
        assert self._service is not None
        deadline = time.monotonic() + START_SECONDS
        while device_of(self.path) is None:
            if not self._service.running():
                raise SystemFailedError(f"the mount failed: {self._service.last_words()}")
            if time.monotonic() > deadline:
                raise SystemFailedError(f"no mount after {START_SECONDS} s: {self._service.last_words()}")
            time.sleep(0.02)

    def abort(self) -> None:
        """Make every request to a hung FUSE mount fail, which frees its clients."""
        device = device_of(self.path)
        control = Path(f"/sys/fs/fuse/connections/{device.partition(':')[2] if device else ''}/abort")
        if device and control.exists():
            control.write_text("1")

    @contextmanager
    def watched(self, limit_seconds: float) -> Iterator[None]:
        """Aborts the mount if the block takes longer: whoever waits for its daemon then gets an error."""
        timer = threading.Timer(limit_seconds, self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def stop(self) -> None:
        """Unmount and see the daemon end."""
        if self._service is None:
            return
        with self.watched(STOP_SECONDS):
            for options in ([], ["-l"]):
                if device_of(self.path) is not None:
                    subprocess.run(["umount", *options, self.path], check=False, capture_output=True)
        self._service.end()
