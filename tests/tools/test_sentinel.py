"""Sentinels (STABLE is created after the files are closed) and directories that are cleaned under their writers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounting import Mount
from tests.tools.processes import ending

CLIENT = Path(__file__).with_name("sentinel_client.py")
ROUNDS = 500
CONTROL_RUNS = 20
# A close whose descriptor a child still holds is looked at again for 63 ms before it is left to the child: 20 files of
# such rounds take more than a second, so there are fewer of them.
CHILD_ROUNDS = {"held": 15, "forked": 15, "spawning": 30, "redirected": 10}
# The clients' bound; a machine that is busy with other things needs it.
SECONDS = 560


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, CLIENT, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def results(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """The reports of all clients, which must end well and within the time."""
    end = time.monotonic() + SECONDS
    reports = []
    for process in processes:
        output = process.communicate(timeout=max(1.0, end - time.monotonic()))[0]
        assert process.returncode == 0, (process.args, output)
        reports.append(json.loads(output))
    return reports


def sentinel(writer: Path, readers: list[tuple[str, Path]], rounds: int, mode: str) -> list[dict[str, Any]]:
    """One writer and some readers; the readers' counts."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ending(start(kind, place, rounds))) for kind, place in readers]
        processes.append(stack.enter_context(ending(start("write", writer, rounds, mode))))
        return results(processes)[:-1]


def test_control_bare_directory_shows_short_files(backing: Path) -> None:
    """Readers that do not wait for the sentinel see empty and short files there; those that wait do not."""
    for number in range(CONTROL_RUNS):
        place = backing / f"run{number}"
        place.mkdir()
        patient, eager = sentinel(place, [("read", place), ("eager", place)], 100, "plain")
        assert patient["counts"] == {"reads": 100 * 20}, patient
        if eager["counts"].get("short", 0) + eager["counts"].get("empty", 0):
            return
    pytest.fail(f"no short file in {CONTROL_RUNS} runs")


@pytest.mark.timeout(SECONDS + 40)
def test_sentinel_on_another_mount(two_mounts: tuple[Mount, Mount]) -> None:
    writer, reader = two_mounts
    patient, eager = sentinel(writer.path, [("read", reader.path), ("eager", reader.path)], ROUNDS, "plain")
    assert patient["counts"] == {"reads": ROUNDS * 20}, patient
    assert set(eager["counts"]) <= {"reads"}, eager


@pytest.mark.timeout(SECONDS + 40)
@pytest.mark.parametrize("mode", list(CHILD_ROUNDS))
def test_sentinel_with_descriptors_in_children(two_mounts: tuple[Mount, Mount], mode: str) -> None:
    writer, reader = two_mounts
    rounds = CHILD_ROUNDS[mode]
    patient, eager = sentinel(writer.path, [("read", reader.path), ("eager", writer.path)], rounds, mode)
    assert patient["counts"] == {"reads": rounds * 20}, patient
    assert set(eager["counts"]) <= {"reads"}, eager


@pytest.fixture(params=["one mount", "two mounts"])
def places(request: pytest.FixtureRequest, make_mount: Callable[[], Mount]) -> tuple[Path, Path]:
    """Where the writer and where the cleaner works."""
    first = make_mount()
    return first.path, (make_mount() if request.param == "two mounts" else first).path


@pytest.mark.parametrize("again", [True, False], ids=["made again", "gone"])
@pytest.mark.parametrize("kind", ["new", "existing", "nested", "descriptor", "killed"])
def test_writer_of_a_removed_directory(backing: Path, places: tuple[Path, Path], kind: str, again: bool) -> None:
    """What was open in a directory when it was removed is refused at close and appears nowhere."""
    writer, cleaner = places
    for round_number in range(5):
        name = f"d{round_number}"
        home = writer / name / "a" / "b" if kind == "nested" else writer / name
        home.mkdir(parents=True)
        if kind == "existing":
            (home / "file").write_bytes(b"before")
        flags = os.O_RDWR if kind == "existing" else os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        # A child does the writing, since one variant is killed.
        ready_read, ready_write = os.pipe()
        go_read, go_write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 100
            try:
                os.close(go_write)
                if kind == "descriptor":
                    descriptor = os.open("file", flags, 0o644, dir_fd=os.open(home, os.O_RDONLY | os.O_DIRECTORY))
                else:
                    descriptor = os.open(home / "file", flags, 0o644)
                os.write(descriptor, b"content")
                os.write(ready_write, b"r")
                os.read(go_read, 1)
                os.close(descriptor)
                code = 0
            except OSError as error:
                code = error.errno or 101
            finally:
                os._exit(code)
        os.close(ready_write)
        os.close(go_read)
        try:
            assert os.read(ready_read, 1) == b"r", "the writer did not come to its write"
            shutil.rmtree(cleaner / name)
            if again:
                (cleaner / name).mkdir()
            if kind == "killed":
                os.kill(child, 9)
            else:
                os.write(go_write, b"g")
        finally:
            os.close(go_write)
            os.close(ready_read)
            status = os.waitpid(child, 0)[1]
        if kind == "killed":
            assert os.WIFSIGNALED(status)
        else:
            assert errno.errorcode.get(os.waitstatus_to_exitcode(status)) == "ENOENT", "what close() returned"
        for view in (writer, cleaner, backing):
            if again:
                assert os.listdir(view / name) == []
            else:
                assert not (view / name).exists()


def churn(writer: Path, cleaner: Path, clock: Path, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Three writers in a directory that a cleaner removes and makes again; their reports and the cleaner's."""
    clock.write_bytes(bytes(16))
    (writer / "d").mkdir()
    with ExitStack() as stack:
        processes = [stack.enter_context(ending(start("churn", writer / "d", clock))) for _ in range(3)]
        processes.append(stack.enter_context(ending(start("clean", cleaner / "d", clock, rounds))))
        *writers, report = results(processes)
    assert report["counts"]["rounds"] == rounds, report
    return writers, report


def test_control_unfinished_files_in_a_bare_directory(backing: Path, tmp_path: Path) -> None:
    """How the processes share the processors can keep the cleaner from every moment at which a file is unfinished."""
    for number in range(CONTROL_RUNS):
        place = backing / f"run{number}"
        place.mkdir()
        _, report = churn(place, place, tmp_path / "clock", 60)
        assert not report["counts"].get("came back"), report
        if report["counts"].get("unfinished"):
            return
    pytest.fail(f"no unfinished file in {CONTROL_RUNS} runs")


def test_nothing_of_a_removed_directory_comes_back(places: tuple[Path, Path], tmp_path: Path) -> None:
    rounds = 60
    writers, report = churn(*places, tmp_path / "clock", rounds)
    counts = report["counts"]
    assert not report["samples"], report
    assert not counts.get("came back"), report
    assert not counts.get("unfinished"), report
    # Files were published, and files were refused: else nothing was tried.
    assert sum(one["counts"].get("closed", 0) for one in writers) > rounds, writers
    assert sum(one["counts"].get("close ENOENT", 0) for one in writers) > 0, writers
    refused = {kind for one in writers for kind in one["counts"] if kind.startswith("close ")}
    assert refused == {"close ENOENT"}, writers
