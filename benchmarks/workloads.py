"""The kinds of work that measures are made of; each gives back what a measure runs on its turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import fixtures, machine
from benchmarks.client import Job
from benchmarks.turns import Cache, Turn, Value

Workload = Callable[[Turn], Value]


def contents(operation: str, *, block: int = Job.block, cache: Cache | None = None, modify: bool = False) -> Workload:
    """Once through the file: of the fixtures if `cache` tells how it is cached, else a file of one's own."""

    def run(turn: Turn) -> Value:
        size = turn.scale.file_bytes
        job = Job(operation, steps=size // block, size=size, block=block)
        if cache is not None:
            turn.settle(cache, fixtures.data)
            return Value.of(turn.loop(job, fixtures.data(turn.root)), block)
        path = turn.scratch / "data"
        if modify:
            turn.loop(Job("write-sync", steps=size // Job.block, size=size), path)
        os.sync()
        return Value.of(turn.loop(job, path), block)

    return run


def random_access(operation: str, *, block: int, clients: int = 1, fixture: bool) -> Workload:
    """Blocks at random offsets, for a time; all in caches."""

    def run(turn: Turn) -> Value:
        scale = turn.scale
        job = Job(operation, clients, scale.loop_seconds, size=scale.file_bytes, block=block)
        if fixture:
            turn.settle(Cache.WARM, fixtures.data)
            return Value.of(turn.loop(job, fixtures.data(turn.root)), block)
        os.sync()
        return Value.of(turn.loop(job, turn.scratch / "data"), block)

    return run


def names(operation: str, fixture: Callable[[Path], Path], *, clients: int = 1) -> Workload:
    """A loop over the names of a fixture, for a time; before that all of them once, for the caches there are."""

    def run(turn: Turn) -> Value:
        files = turn.scale.small_files
        steps = files if fixture is fixtures.small else 1
        for job in (
            Job(operation, 1, turn.scale.loop_seconds, steps, files=files),
            Job(operation, clients, turn.scale.loop_seconds, files=files),
        ):
            loop = turn.loop(job, fixture(turn.root))
        return Value.of(loop)

    return run


def new_files(operation: str, *, clients: int = 1) -> Workload:
    """A loop that makes small files in a directory of one's own, for a time."""

    def run(turn: Turn) -> Value:
        os.sync()
        return Value.of(turn.loop(Job(operation, clients, turn.scale.loop_seconds, files=100), turn.scratch))

    return run


def publishing(clients: int) -> Workload:
    """Small files that are whole and durable under their names: by hand, or by closing them where that is enough."""

    def run(turn: Turn) -> Value:
        os.sync()
        operation = "create" if turn.publishes else "publish"
        return Value.of(turn.loop(Job(operation, clients, turn.scale.sync_loop_seconds), turn.scratch))

    return run


def closing() -> Workload:
    """The end of writing one large file: until it is durable, by closing it where that is enough."""

    def run(turn: Turn) -> Value:
        os.sync()
        size = turn.scale.file_bytes
        operation = "close" if turn.publishes else "sync-close"
        return Value.of(turn.loop(Job(operation, steps=1, size=size), turn.scratch / "data"), size)

    return run


def repeated(command: Callable[[Path], Sequence[str | Path]]) -> Workload:
    """A program of the user's: once for the caches, then again and again for a time; the mean duration."""

    def run(turn: Turn) -> Value:
        turn.program(command(turn.root))
        seconds, cpu, count = 0.0, 0.0, 0
        while count == 0 or seconds < turn.scale.loop_seconds:
            _, more_seconds, more_cpu = turn.program(command(turn.root))
            seconds, cpu, count = seconds + more_seconds, cpu + more_cpu, count + 1
        return Value(seconds / count, cpu / count)

    return run


LOAD_MODEL = """
import sys, time
from safetensors.numpy import load_file
start = time.monotonic()
load_file(sys.argv[1])
print(time.monotonic() - start)
"""


def model_load(cache: Cache) -> Workload:
    """safetensors' own loading of a model; what is timed leaves out the start of Python."""

    def run(turn: Turn) -> Value:
        if cache is Cache.COLD:
            machine.drop_caches()
        command: list[str | Path] = [sys.executable, "-c", LOAD_MODEL, fixtures.model(turn.root)]
        if cache is Cache.WARM:
            turn.program(command)
        output, _, cpu = turn.program(command)
        return Value(float(output), cpu)

    return run


def git_status(root: Path) -> list[str | Path]:
    return ["git", "-C", fixtures.package(root), "status", "--porcelain"]


def python_import(root: Path) -> list[str | Path]:
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import {fixtures.PACKAGE[0]}"
    return [sys.executable, "-I", "-S", "-B", "-c", code, fixtures.package(root)]
