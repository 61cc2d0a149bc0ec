"""Versions that are kept: by name, for their time, and no longer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from safefs.retained import RetainedVersions, slot_of


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "dir").mkdir()
    fd = os.open(tmp_path / "dir", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def replaced(kept: RetainedVersions, directory: int, root: Path, data: bytes, seconds: float) -> int:
    """Write a version, and replace it by nothing; its st_ino."""
    path = root / "dir" / "file"
    path.write_bytes(data)
    ino = path.stat().st_ino
    kept.keep(directory, b"file", slot_of(7, b"file"), "dir/file", seconds)
    path.unlink()
    return ino


def test_versions_of_a_name(tmp_path: Path, directory: int) -> None:
    kept = RetainedVersions(tmp_path / "retained")
    assert kept.of("dir/file") == [] and not kept.has(slot_of(7, b"file"), 1)
    inos = [replaced(kept, directory, tmp_path, data, 60) for data in (b"one", b"two", b"three")]
    found = kept.of("dir/file")
    assert [version.file.read_bytes() for version in found] == [b"three", b"two", b"one"]
    assert [version.ino for version in found] == inos[::-1]
    assert all(time.time() - 10 < version.replaced <= time.time() for version in found)
    assert kept.has(slot_of(7, b"file"), inos[0])
    assert not kept.has(slot_of(8, b"file"), inos[0]) and not kept.has(slot_of(7, b"other"), inos[0])
    assert kept.of("dir/other") == []


def test_what_is_over_goes(tmp_path: Path, directory: int) -> None:
    kept = RetainedVersions(tmp_path / "retained")
    replaced(kept, directory, tmp_path, b"old", -1)
    replaced(kept, directory, tmp_path, b"new", 60)
    assert kept.sweep() == 1
    assert [version.file.read_bytes() for version in kept.of("dir/file")] == [b"new"]
    kept.of("dir/file")[0].file.rename(tmp_path / "retained" / slot_of(7, b"file") / "1-1-1")
    assert kept.sweep() == 1
    assert list((tmp_path / "retained").iterdir()) == []


def test_nonsense_in_the_directory_is_left_alone(tmp_path: Path, directory: int) -> None:
    kept = RetainedVersions(tmp_path / "retained")
    replaced(kept, directory, tmp_path, b"one", 60)
    (tmp_path / "retained" / "file").touch()
    (tmp_path / "retained" / slot_of(7, b"file") / "what").touch()
    assert len(list(kept.all())) == 1
    assert kept.sweep() == 0


@pytest.mark.parametrize("text", ['"dir/fi', 100_000 * "[", f"1{5000 * '0'}"], ids=["cut short", "deep", "long"])
def test_a_damaged_path_keeps_no_version_from_going(tmp_path: Path, directory: int, text: str) -> None:
    kept = RetainedVersions(tmp_path / "retained")
    replaced(kept, directory, tmp_path, b"old", -1)
    (tmp_path / "retained" / slot_of(7, b"file") / "path.json").write_text(text)
    assert [version.path for version in kept.all()] == [""]
    assert kept.sweep() == 1
