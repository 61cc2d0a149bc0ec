"""The two races of a shared Hugging Face cache, arranged so that they happen every time.

`race` is two downloaders of one file: the second opens the first one's `.incomplete` while the first is still
writing, and goes on appending when the first has finished and renamed it.  Without a working flock, on a plain
directory, huggingface_hub 1.17.0 so appends to the finished blob.  The hub holds both responses at the byte where the
other one has to move, so that nothing depends on timing.

`storm` is many processes with snapshot_download and readers of what they write.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.support.hub import Hub
from tests.support.hub_http import Request
from tests.support.venvs import Venv

SUPPORT = Path(__file__).resolve().parent
MODEL = "model.bin"
# huggingface_hub writes in pieces of this size (constants.DOWNLOAD_CHUNK_SIZE).
PIECE = 10 * 1024 * 1024
MODEL_SIZE = 24 * 1024 * 1024
CLIENT_SECONDS = 120


def model_hub() -> Hub:
    """A hub with one model of three pieces, the last one short."""
    return Hub({MODEL: random.Random(2).randbytes(MODEL_SIZE), "config.json": b'{"architectures": ["Acme"]}\n'})


def wrote(process: subprocess.Popen[str], size: int) -> bool:
    """Whether a process has written that many bytes with write(2), to whatever directory it is."""
    try:
        fields = Path(f"/proc/{process.pid}/io").read_text()
    except OSError:
        return False
    return any(line.startswith("wchar:") and int(line.split()[1]) >= size for line in fields.splitlines())


def start_download(hub: Hub, venv: Venv, home: Path, name: str, *, flock: bool = False) -> subprocess.Popen[str]:
    """A process that downloads the model; `name` tells its requests apart."""
    home.mkdir(parents=True, exist_ok=True)
    command = [venv.python, SUPPORT / "hub_download_client.py", "flock" if flock else "noflock", hub.repo, MODEL]
    return subprocess.Popen(
        command,
        env=hub.environment(home, name),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a client (bounded); its standard error."""
    try:
        return process.communicate(timeout=CLIENT_SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[1] + "\n(killed: it did not end)"


def blob_path(hub: Hub, home: Path) -> Path:
    return home / "hub" / hub.cache_name / "blobs" / hub.main.blobs[MODEL]


@dataclass(frozen=True)
class Outcome:
    """How a race ended."""

    exits: tuple[int, int]
    errors: tuple[str, str]
    # The blob after both have ended, and through a descriptor that was opened when the first had just finished.
    size: int
    sha256: str
    reader_sha256: str
    expected: str
    # Where the responses began: 0 is a download from the start, anything else was resumed.
    starts: dict[str, list[int]]

    @property
    def intact(self) -> bool:
        return self.sha256 == self.expected

    @property
    def reader_undisturbed(self) -> bool:
        return self.reader_sha256 == self.expected

    @property
    def description(self) -> str:
        return f"exits {self.exits}, {self.size} bytes, starts {self.starts}\n" + "\n---\n".join(self.errors)


@dataclass(frozen=True)
class MatchModel:
    """Requests for the model by one client."""

    name: str

    def __call__(self, request: Request) -> bool:
        return f"origin/{self.name}" in request.agent and request.path.endswith(MODEL)


def leave_partial(hub: Hub, venv: Venv, home: Path, *, kill: bool) -> None:
    """A downloader that got one piece: its connection broke, or it was killed in the middle."""
    if kill:
        hold = hub.hold(PIECE + PIECE // 5, MatchModel("earlier"))
    else:
        hub.cut(PIECE + PIECE // 5, MatchModel("earlier"))
    process = start_download(hub, venv, home, "earlier")
    if kill:
        hold.wait_reached(process)
        wait_written(process, PIECE)
        process.send_signal(signal.SIGKILL)
    error = finish(process)
    assert process.returncode == (-signal.SIGKILL if kill else 1), error
    if kill:
        hold.release()


def wait_written(process: subprocess.Popen[str], size: int) -> None:
    """Until the process has handed `size` bytes to write(2)."""
    for _ in range(3000):
        if wrote(process, size):
            return
        if process.poll() is not None:
            break
        threading.Event().wait(0.01)
    raise AssertionError(f"the client did not write {size} bytes:\n{finish(process)}")


def race(hub: Hub, venv: Venv, first_home: Path, second_home: Path, *, resumed: bool = False) -> Outcome:
    """Two downloaders, the second appending while the first finishes; the homes may be two mounts of one directory.

    With `resumed` both find the partial file of an earlier one whose connection broke.
    """
    if resumed:
        leave_partial(hub, venv, first_home, kill=False)
    already = PIECE if resumed else 0
    first_hold = hub.hold(already + PIECE + PIECE // 5, MatchModel("first"))
    second_hold = hub.hold(0, MatchModel("second"))
    processes: list[subprocess.Popen[str]] = []
    try:
        first = start_download(hub, venv, first_home, "first")
        processes.append(first)
        first_hold.wait_reached(first)
        wait_written(first, PIECE)
        second = start_download(hub, venv, second_home, "second")
        processes.append(second)
        # It has opened its file and asked for the rest of it (or for the whole) by now.
        second_hold.wait_reached(second)
        first_hold.release()
        first_error = finish(first)
        # A reader who trusts the finished blob, with a descriptor that stays.
        with open(blob_path(hub, first_home), "rb") if first.returncode == 0 else open(os.devnull, "rb") as reader:
            second_hold.release()
            second_error = finish(second)
            reader_digest = hashlib.file_digest(reader, "sha256").hexdigest()
        blob = blob_path(hub, second_home)
        content = blob.read_bytes() if blob.exists() else b""
    finally:
        first_hold.release()
        second_hold.release()
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return Outcome(
        exits=(first.returncode, second.returncode),
        errors=(first_error, second_error),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        reader_sha256=reader_digest,
        expected=hub.main.blobs[MODEL],
        starts={name: [seen.first for seen in hub.seen(MatchModel(name))] for name in ("first", "second")},
    )


@dataclass(frozen=True)
class StormOutcome:
    """What readers saw during a storm of snapshot_download."""

    failed: int
    errors: str
    counts: dict[str, int]
    samples: list[str]

    def bad(self, *, pointers_may_vanish: bool = False) -> dict[str, int]:
        """The reads that should not have been, by kind."""
        harmless = {"ref_reads", "config_reads"} | ({"config_vanished"} if pointers_may_vanish else set())
        return {kind: count for kind, count in self.counts.items() if count and kind not in harmless}


def storm_files(number: int) -> dict[str, bytes]:
    """A small repository; every commit has another config.json."""
    config = {"commit": number, "layers": list(range(800)), "architectures": ["Acme"]}
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": random.Random(3).randbytes(100_000),
        "model.safetensors": random.Random(4).randbytes(1_500_000),
    }


def storm(venv: Venv, homes: list[Path], *, processes: int = 16, calls: int = 8) -> StormOutcome:
    """Processes with snapshot_download of a branch that moves, and one reader per home."""
    with Hub(storm_files(0)) as hub:
        commits = [hub.main, *(hub.commit(storm_files(number)) for number in (1, 2))]
        configs = {commit.sha: commit.files["config.json"].sha256 for commit in commits}
        done = threading.Event()

        def move_branch() -> None:
            number = 0
            while not done.wait(0.2):
                number += 1
                hub.main = commits[number % len(commits)]

        mover = threading.Thread(target=move_branch)
        readers = [
            subprocess.Popen(
                [sys.executable, SUPPORT / "hub_reader.py", home / "hub" / hub.cache_name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for home in (homes * 2)[:2]
        ]
        counts: dict[str, int] = {}
        samples: list[str] = []
        try:
            for reader in readers:
                assert reader.stdin is not None
                reader.stdin.write(json.dumps(configs) + "\n")
                reader.stdin.flush()
            mover.start()
            command: list[str | Path] = [
                venv.python,
                SUPPORT / "hub_storm_client.py",
                hub.repo,
                str(processes),
                str(calls),
            ]
            clients = subprocess.run(
                [*command, *(home / "hub" for home in homes)],
                env=hub.environment(homes[0], "storm"),
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=CLIENT_SECONDS,
                check=False,
            )
        finally:
            done.set()
            if mover.ident is not None:
                mover.join()
            for reader in readers:
                try:
                    output = reader.communicate(timeout=30)[0]
                except subprocess.TimeoutExpired:
                    reader.kill()
                    output = reader.communicate()[0]
                if output:
                    report = json.loads(output)
                    samples += report["samples"]
                    for kind, count in report["counts"].items():
                        counts[kind] = counts.get(kind, 0) + count
        return StormOutcome(int(clients.stdout or processes), clients.stderr, counts, samples)
