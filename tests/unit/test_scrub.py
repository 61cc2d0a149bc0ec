"""Walking and reading a tree again: the order, resuming, and what is found."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safefs.digest import DIGEST_ATTRIBUTE
from safefs.rules import Content, Policy
from safefs.scrub import Verdict, look, scrub, walk

parts = st.sampled_from([b"a", b"b", b"a.b", b"a-b", b"z", b"\xff"])
trees = st.sets(st.lists(parts, min_size=1, max_size=3).map(tuple), max_size=12)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def walked(root: Path, after: tuple[bytes, ...] = ()) -> list[tuple[bytes, ...]]:
    with opened(root) as fd:
        return list(walk(fd, lambda name: name == b"skipped", after))


def plain(_name: bytes, _directory: bytes) -> Policy:
    return Policy()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_a_walk_can_go_on_from_anywhere(tree: set[tuple[bytes, ...]], tmp_path: Path) -> None:
    root = tmp_path / "tree"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    files = set()
    for path in tree:
        target = os.path.join(os.fsencode(root), *path)
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "xb"):
                files.add(path)
        except OSError:
            continue  # a name cannot be a file and a directory
    everything = walked(root)
    assert set(everything) == files and len(everything) == len(files)
    for index, path in enumerate(everything):
        assert walked(root, path) == everything[index + 1 :]


def test_what_is_not_walked(tmp_path: Path) -> None:
    (tmp_path / "skipped").mkdir()
    (tmp_path / "skipped" / "file").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").touch()
    (tmp_path / "link").symlink_to("dir")
    (tmp_path / "loop").symlink_to(".")
    os.mkfifo(tmp_path / "fifo")
    assert walked(tmp_path) == [(b"dir", b"file")]


def verdict(root: Path, name: str, *content: Content) -> Verdict:
    with opened(root) as fd:
        return look(
            fd, (os.fsencode(name),), lambda _name, _directory: Policy(content=content), threading.Event()
        ).verdict


def test_verdicts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    assert verdict(tmp_path, "file") is Verdict.UNKNOWN
    assert verdict(tmp_path, "file", Content.ZIP) is Verdict.DAMAGED
    os.setxattr(tmp_path / "file", DIGEST_ATTRIBUTE, f"xxh3-128:{xxhash.xxh3_128_hexdigest(b'data')}".encode())
    assert verdict(tmp_path, "file") is Verdict.GOOD
    with open(tmp_path / "file", "r+b") as file:
        file.write(b"D")
    assert verdict(tmp_path, "file") is Verdict.DAMAGED
    assert verdict(tmp_path, "missing") is Verdict.CHANGED
    (tmp_path / "a").mkdir()
    assert verdict(tmp_path, "a") is Verdict.CHANGED


@pytest.mark.parametrize("threads", [1, 4])
def test_findings_come_in_order(tmp_path: Path, threads: int) -> None:
    for number in range(100):
        (tmp_path / f"file{number:03}").write_bytes(os.urandom(number * 1000))
    with opened(tmp_path) as fd:
        paths = list(walk(fd, lambda _name: False))
        assert [finding.path for finding in scrub(fd, iter(paths), plain, threads)] == paths
