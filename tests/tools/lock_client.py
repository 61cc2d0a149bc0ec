"""A program that takes a lock as a given tool takes it: `ARGV: TOOL PATH MARKER TURNS|hold|wait`.

With a number it takes the lock so often, and inside makes the file MARKER with O_EXCL and removes it again: who is not
alone inside finds another one's.  It prints, as JSON, how often it was inside and how often it found another one.
With `hold` it takes the lock once, prints `held` and stays inside until it is killed.  With `wait` it does the same as
with 1, and prints `begins` before.

It runs with the interpreter of the environment that has the tool, on its own: it imports nothing of this project.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

POLL_SECONDS = 0.005
# Inside, long enough for another one to come in; outside, long enough for another one to have its turn.
INSIDE_SECONDS = 0.002
OUTSIDE_SECONDS = 0.01


@contextmanager
def no_lock(path: str) -> Iterator[None]:
    """What a tool does that does not lock: the control of the marker."""
    yield


def file_lock(path: str) -> AbstractContextManager[Any]:
    return importlib.import_module("filelock").FileLock(path, poll_interval=POLL_SECONDS)


def soft_file_lock(path: str) -> AbstractContextManager[Any]:
    return importlib.import_module("filelock").SoftFileLock(path, poll_interval=POLL_SECONDS)


def strict_soft_file_lock(path: str) -> AbstractContextManager[Any]:
    """Made by link(2) of a file that is still open; compares st_ino and st_nlink of both."""
    return importlib.import_module("filelock").StrictSoftFileLock(path, poll_interval=POLL_SECONDS)


def weak_file_lock(path: str) -> AbstractContextManager[Any]:
    return importlib.import_module("huggingface_hub.utils").WeakFileLock(path)


@contextmanager
def file_baton(path: str) -> Iterator[None]:
    """torch's FileBaton: who makes the file works, the others wait until it does not exist."""
    spec = importlib.util.spec_from_file_location("file_baton", os.environ["FILE_BATON"])
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    baton = module.FileBaton(path, POLL_SECONDS)
    while not baton.try_acquire():
        baton.wait()
    try:
        yield
    finally:
        baton.release()


@contextmanager
def flock(path: str) -> Iterator[None]:
    """flock(1) on a descriptor of its caller, as shell scripts use it."""
    with open(path, "a") as file:
        subprocess.run(["flock", "--exclusive", str(file.fileno())], pass_fds=[file.fileno()], check=True)
        yield


@contextmanager
def lockfile_progs(path: str) -> Iterator[None]:
    """lockfile-create and lockfile-remove of Debian's lockfile-progs; the lock is PATH.lock."""
    create = ["lockfile-create", "--quiet", "--retry", "0", path]
    while subprocess.run(create, check=False).returncode:
        time.sleep(POLL_SECONDS)
    yield
    subprocess.run(["lockfile-remove", path], check=True)


@contextmanager
def git_index(path: str) -> Iterator[None]:
    """The index.lock of the repository PATH, which `git commit -a` holds while its pre-commit hook runs.

    The hook (`GIT_HOOK`) says on the standard error that it runs, and ends when its standard input, by another number,
    is closed.  Each turn is a commit, or none where HEAD had moved: git reads HEAD before it takes the lock.
    """
    while True:
        reader, writer = os.pipe()
        with subprocess.Popen(
            ["git", "-C", path, "commit", "--quiet", "--all", "--allow-empty", "--message=turn"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[reader],
            env={**os.environ, "LEAVE": str(reader)},
        ) as process:
            os.close(reader)
            assert process.stderr is not None
            line = process.stderr.readline()
            try:
                if line == "inside\n":
                    yield
            finally:
                os.close(writer)
            rest = process.stderr.read()
        if process.returncode == 0 or "cannot lock ref 'HEAD'" in rest:
            return
        if "index.lock': File exists" not in line:
            raise RuntimeError(f"git ended with {process.returncode}: {line}{rest}")
        time.sleep(POLL_SECONDS)


GIT_HOOK = """#!/bin/bash
echo inside >&2
read -r -u "$LEAVE"
exit 0
"""

TOOLS = {
    "none": no_lock,
    "FileLock": file_lock,
    "SoftFileLock": soft_file_lock,
    "StrictSoftFileLock": strict_soft_file_lock,
    "WeakFileLock": weak_file_lock,
    "FileBaton": file_baton,
    "flock": flock,
    "lockfile": lockfile_progs,
    "git": git_index,
}


def main() -> None:
    tool, path, marker, turns = sys.argv[1:]
    lock = TOOLS[tool]
    if turns == "hold":
        with lock(path):
            print("held", flush=True)
            while True:
                time.sleep(60)
    chance = random.Random(os.getpid())
    overlaps = inside = 0
    for _ in range(1 if turns == "wait" else int(turns)):
        context = lock(path)  # has imported what it needs
        if turns == "wait":
            print("begins", flush=True)
        with context:
            inside += 1
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                overlaps += 1
            time.sleep(INSIDE_SECONDS)
            # Whoever came in beside us may have removed it.
            with suppress(FileNotFoundError):
                os.unlink(marker)
        time.sleep(chance.random() * OUTSIDE_SECONDS)
    print(json.dumps({"inside": inside, "overlaps": overlaps}))


if __name__ == "__main__":
    main()
