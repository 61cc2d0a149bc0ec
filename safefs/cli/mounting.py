"""`safefs mount`: in the foreground, or as a parent that waits until the daemon in the background is ready.

The two talk through a pipe: the daemon writes `ready` or `error: …`, one line.  Guaranteed: the parent returns 0 only
after `ready`; when it fails, no daemon of its own is left behind.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import safefs
from safefs.cli.checks import check_mount, in_initial_pid_namespace
from safefs.cli.logs import default_log_file, set_up_logging
from safefs.config import Option, Settings, has_option, load_settings, parse_options
from safefs.errors import SafefsError

START_SECONDS = 60.0
END_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MountRequest:
    """The arguments of `safefs mount`, as given."""

    backing: Path
    mountpoint: Path
    option_texts: tuple[str, ...] = ()
    config: Path | None = None
    log_file: Path | None = None

    def settings(self) -> Settings:
        """Validated settings, after every check that is possible beforehand."""
        options = parse_options(self.option_texts)
        config, others = _take_config(options, self.config)
        settings = load_settings(self.backing, self.mountpoint, others, config)
        if self.log_file:
            settings = replace(settings, log_file=Path(os.path.abspath(self.log_file)))
        check_mount(settings, allow_nonempty=has_option(options, "nonempty"))
        return settings

    def arguments(self) -> list[str]:
        """The same request as command-line arguments, valid in any working directory."""
        arguments = [os.path.abspath(self.backing), os.path.abspath(self.mountpoint)]
        for text in self.option_texts:
            arguments += ["-o", text]
        if self.config:
            arguments += ["--config", os.path.abspath(self.config)]
        return arguments


def _take_config(options: list[Option], config: Path | None) -> tuple[Path | None, list[Option]]:
    """fstab can name a configuration file only as an option: config=FILE; the command line's --config wins."""
    named = [Path(option.value) for option in options if option.name == "config" and option.value]
    others = [option for option in options if option.name != "config" or not option.value]
    return config or (named[-1] if named else None), others


def mount_foreground(request: MountRequest, ready_fd: int | None) -> None:
    """Serve the mount until it is unmounted; reports to `ready_fd` when a parent waits there."""
    report = _Report(ready_fd)
    try:
        settings = request.settings()
        set_up_logging(settings.log_file, settings.log_level)
        _serve(settings, report.ready)
    except SafefsError as error:
        report.failed(error.message)
        raise
    except BaseException as error:
        report.failed(f"the daemon failed: {type(error).__name__}: {error}")
        raise


def _serve(settings: Settings, ready: Callable[[], None]) -> None:
    # The module needs pyfuse3 and the extension: a missing one is an error of the mount, not of every command.
    from safefs.fuse import native_check

    native_check()
    from safefs import daemon

    # Neither the directory of the caller nor one on some other mount shall be kept busy.
    os.chdir("/")
    if not in_initial_pid_namespace():
        _log.warning("not in the initial pid namespace: processes outside this one get no protection for their writes")
    daemon.run(settings, ready)


class _Report:
    """The daemon's end of the pipe: one line, once."""

    def __init__(self, ready_fd: int | None) -> None:
        self._fd = ready_fd
        if ready_fd is not None:
            os.set_inheritable(ready_fd, False)

    def ready(self) -> None:
        self._send("ready")

    def failed(self, message: str) -> None:
        self._send("error: " + " ".join(message.split()))

    def _send(self, line: str) -> None:
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            os.write(fd, line.encode("utf-8", "surrogateescape") + b"\n")
        except BrokenPipeError:
            # The parent gave up waiting; whether to go on is not its decision once the mount is live.
            pass
        finally:
            os.close(fd)


def mount_background(request: MountRequest) -> None:
    """Start a daemon of its own session and return once its mount is live; SafefsError when it does not get there."""
    settings = request.settings()
    log_file = settings.log_file or default_log_file(settings.mountpoint)
    ready_read, ready_write = os.pipe()
    with open(ready_read, "rb", buffering=0) as answer:
        try:
            process = _spawn(request, log_file, ready_write)
        finally:
            os.close(ready_write)
        line = _wait_for_line(answer.fileno())
    if line != "ready":
        _end(process)
        raise SafefsError(_failure(line, log_file, process.returncode))


def _spawn(request: MountRequest, log_file: Path, ready_fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "safefs", "mount", *request.arguments(), "--foreground"]
    command += ["--ready-fd", str(ready_fd), "--log-file", os.fspath(log_file)]
    try:
        # What Python itself says when it dies goes to the log as well.
        with open(log_file, "ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[ready_fd],
                cwd="/",
                env=_environment(),
                start_new_session=True,
            )
    except OSError as error:
        raise SafefsError(f"{log_file}: cannot start the daemon: {error.strerror}", error.errno or 5) from None


def _environment() -> dict[str, str]:
    """With -P the working directory is no place to import from, so a checkout that is not installed is named."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(safefs.__file__)))
    if "site-packages" in root.split("/") or "dist-packages" in root.split("/"):
        return dict(os.environ)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}:{inherited}" if inherited else root}


def _wait_for_line(fd: int) -> str:
    """The daemon's line; empty when it ended without one or START_SECONDS are over."""
    received = b""
    deadline = time.monotonic() + START_SECONDS
    while b"\n" not in received:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([fd], [], [], remaining)[0]:
            break
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        received += chunk
    return received.decode("utf-8", "surrogateescape").strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """The daemon unmounts on SIGTERM; one that does not even do that is killed."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            process.wait(END_SECONDS if signal_number == signal.SIGKILL else 0.5)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal_number)
    process.wait(END_SECONDS)


def _failure(line: str, log_file: Path, exit_code: int | None) -> str:
    if line.startswith("error: "):
        return line.removeprefix("error: ")
    if exit_code is not None and exit_code > 0:
        return f"the daemon ended before the mount was live (exit code {exit_code}); its log: {log_file}"
    return f"the mount was not live within {START_SECONDS:g} s; the daemon's log: {log_file}"
