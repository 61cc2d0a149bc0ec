"""Digests of what was written, against what is read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from safefs import digest
from safefs.digest import Written, digest_text, read_file

BLOCK = 64

writes = st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=150)), max_size=12)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def difference(written: Written, data: bytes, pieces: int = 50) -> int | None:
    comparison = written.compare()
    for start in range(0, len(data), pieces):
        comparison.update(memoryview(data)[start : start + pieces])
    comparison.finish()
    return comparison.difference


def applied(operations: list[tuple[int, bytes]]) -> tuple[bytearray, Written]:
    content, written = bytearray(), Written()
    for offset, data in operations:
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
        written.add(offset, data)
    return content, written


@given(operations=writes, pieces=st.integers(1, 200))
def test_what_was_written_compares_equal(operations: list[tuple[int, bytes]], pieces: int) -> None:
    content, written = applied(operations)
    assert difference(written, bytes(content), pieces) is None


@given(data=st.binary(min_size=1, max_size=300), at=st.integers(0, 299), pieces=st.integers(1, 200))
def test_a_changed_byte_of_a_file_written_in_order_is_found(data: bytes, at: int, pieces: int) -> None:
    written = Written()
    for start in range(0, len(data), pieces):
        written.add(start, data[start : start + pieces])
    at %= len(data)
    changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    assert difference(written, changed) == at // BLOCK * BLOCK
    assert difference(written, data[:at]) is not None


@given(operations=writes, start=st.integers(0, 500), length=st.integers(1, 200))
def test_what_is_forgotten_is_not_compared(operations: list[tuple[int, bytes]], start: int, length: int) -> None:
    content, written = applied(operations)
    content.extend(bytes(max(0, start + length - len(content))))
    content[start : start + length] = os.urandom(length)
    written.forget(start, start + length)
    assert difference(written, bytes(content)) is None


def test_a_file_that_was_cut_is_compared_as_far_as_it_goes() -> None:
    written = Written()
    written.add(0, bytes(range(200)))
    written.forget(130)
    assert difference(written, bytes(range(130))) is None
    assert difference(written, bytes(range(100)) + b"x" + bytes(range(101, 130))) == BLOCK


@given(data=st.binary(max_size=300))
def test_reading_a_file_gives_all_of_it(data: bytes) -> None:
    descriptor = os.memfd_create("file")
    try:
        os.write(descriptor, data)
        hasher, seen = xxhash.xxh3_128(), bytearray()
        assert read_file(descriptor, [hasher.update, seen.extend]) == len(data)
    finally:
        os.close(descriptor)
    assert seen == data
    assert digest_text(hasher) == f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"
