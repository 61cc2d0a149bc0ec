"""What names promise: digests, safetensors and zip, whole and damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safefs.formats import format_problem, named_digest
from safefs.rules import Content

BOTH = (Content.SHA256, Content.GIT_BLOB)


@contextmanager
def file_of(data: bytes) -> Iterator[int]:
    descriptor = os.memfd_create("file")
    try:
        os.write(descriptor, data)
        yield descriptor
    finally:
        os.close(descriptor)


def problem(content: Content, data: bytes) -> str | None:
    with file_of(data) as descriptor:
        return format_problem((content,), descriptor)


def name_problem(name: bytes, data: bytes) -> str | None:
    named = named_digest(BOTH, name, len(data))
    assert named is not None
    named.hasher.update(memoryview(data))
    return named.problem()


@pytest.mark.parametrize("prefix", [b"", b"sha256-", b"sha256:", b"layer_"])
def test_sha256_names(prefix: bytes) -> None:
    name = prefix + hashlib.sha256(b"data").hexdigest().encode()
    assert name_problem(name, b"data") is None
    assert name_problem(name, b"date") is not None


def test_git_names() -> None:
    """The sha1 that `git hash-object` prints for the three bytes of "hi\\n"."""
    name = b"45b983be36b73c0788dc9cbcb76cbb80fc7bb057"
    assert name_problem(name, b"hi\n") is None
    assert name_problem(name, b"ho\n") is not None


@pytest.mark.parametrize(
    "name", [b"", b"a" * 39, b"a" * 41, b"a" * 63, b"a" * 65, b"A" * 64, b"a" * 64 + b".incomplete", b"model.bin"]
)
def test_other_names_promise_nothing(name: bytes) -> None:
    assert named_digest(BOTH, name, 0) is None


def test_a_name_promises_only_what_the_rules_ask_for() -> None:
    assert named_digest((Content.GIT_BLOB,), b"a" * 64, 0) is None
    assert named_digest((Content.SHA256,), b"a" * 40, 0) is None


def safetensors(lengths: list[int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, length in enumerate(lengths):
        header[f"t{number}"] = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


@given(lengths=st.lists(st.integers(0, 50), max_size=5))
def test_safetensors_of_the_right_length(lengths: list[int]) -> None:
    data = safetensors(lengths)
    assert problem(Content.SAFETENSORS, data) is None
    assert problem(Content.SAFETENSORS, data + b"x") is not None
    for cut in range(1, min(len(data), 40)):
        assert problem(Content.SAFETENSORS, data[:-cut]) is not None


@pytest.mark.parametrize(
    "header",
    [b"{}x", b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": []}}', b"[" * 5000, b"\xff", b'{"a": null}'],
)
def test_safetensors_with_another_header(header: bytes) -> None:
    assert problem(Content.SAFETENSORS, struct.pack("<Q", len(header)) + header) is not None


def test_safetensors_that_claims_a_huge_header() -> None:
    assert problem(Content.SAFETENSORS, struct.pack("<Q", 1 << 62) + b"{}") is not None


def zipped(names: list[str], comment: bytes = b"", before: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    buffer.write(before)
    with zipfile.ZipFile(buffer, "a" if before else "w") as archive:
        for name in names:
            archive.writestr(name, name * 20)
        archive.comment = comment
    return buffer.getvalue()


@pytest.mark.parametrize("comment", [b"", b"a comment", b"PK\5\6" * 10])
@pytest.mark.parametrize("before", [b"", b"#!/usr/bin/env python3\n"])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_zip_files(comment: bytes, before: bytes, count: int) -> None:
    data = zipped([f"member{number}" for number in range(count)], comment, before)
    assert problem(Content.ZIP, data) is None
    if comment != b"PK\5\6" * 10:  # of which every end looks like another archive's
        assert problem(Content.ZIP, data[: len(data) - 1]) is not None


def test_zip_files_with_a_gap() -> None:
    """Bytes that are missing in the middle move the members, and the directory tells."""
    data = zipped([f"member{number}" for number in range(300)])
    assert problem(Content.ZIP, data[:1000] + data[1010:]) is not None
    directory = data.index(b"PK\1\2")
    assert problem(Content.ZIP, data[: directory + 3] + b"x" + data[directory + 4 :]) is not None


def test_zip64() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(70_000):
            archive.writestr(f"{number}", b"")
    data = buffer.getvalue()
    assert data.count(b"PK\6\6") == 1
    assert problem(Content.ZIP, data) is None
    assert problem(Content.ZIP, data[:200] + data[300:]) is not None


@given(data=st.binary(min_size=1, max_size=400))
def test_anything_else_is_no_zip_file(data: bytes) -> None:
    assert problem(Content.ZIP, data) is not None


@given(data=st.binary(max_size=200), at=st.integers(0, 2000))
def test_damaged_archives_raise_nothing(data: bytes, at: int) -> None:
    whole = zipped(["a", "b", "c"])
    at %= len(whole)
    problem(Content.ZIP, whole[:at] + data + whole[at + len(data) :])
