"""What a name promises about the bytes of its file, and whether they keep it.

Content-addressed names hold a digest of their file: huggingface_hub's `blobs/<etag>` (sha256 of large files, git's
sha1 of small ones), ollama's `sha256-<hex>`, OCI's `blobs/sha256/<hex>`.  Formats say how long they are: safetensors
in its header, zip in its central directory (PKWARE APPNOTE 4.3).  Nothing here allocates as much as a file claims.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from safefs.digest import Hasher
from safefs.rules import Content

MAX_HEADER_BYTES = 100_000_000  # of safetensors: what its own readers accept

_DIGESTS = {
    Content.SHA256: re.compile(rb"(?:.*[^0-9a-f])?([0-9a-f]{64})", re.DOTALL),
    Content.GIT_BLOB: re.compile(rb"(?:.*[^0-9a-f])?([0-9a-f]{40})", re.DOTALL),
}

# PKWARE APPNOTE 4.3.12, 4.3.14 to 4.3.16
ZIP_END = struct.Struct("<4s4H2LH")
ZIP_END_64 = struct.Struct("<4sQ2H2L4Q")
ZIP_LOCATOR_64 = struct.Struct("<4sLQL")
ZIP_ENTRY = struct.Struct("<4s6H3L5H2L")
ZIP_LOCAL_HEADER_BYTES = 30
MAX_COMMENT_BYTES = 0xFFFF
CENTRAL_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class NamedDigest:
    """The digest that a name holds, and the hasher for the file's bytes."""

    kind: Content
    expected: str
    hasher: Hasher

    def problem(self) -> str | None:
        found = self.hasher.hexdigest()
        return None if found == self.expected else f"its name says {self.kind} {self.expected}, its bytes give {found}"


def named_digest(content: Iterable[Content], name: bytes, size: int) -> NamedDigest | None:
    """What a file of this size must hash to, going by its name; None where the name holds no digest."""
    for kind in content:
        found = _DIGESTS[kind].fullmatch(name) if kind in _DIGESTS else None
        if found is not None:
            hasher = hashlib.sha256() if kind is Content.SHA256 else hashlib.sha1(usedforsecurity=False)
            if kind is Content.GIT_BLOB:
                hasher.update(b"blob %d\0" % size)
            return NamedDigest(kind, found[1].decode("ascii"), hasher)
    return None


def format_problem(content: Iterable[Content], fd: int) -> str | None:
    """Why a file is not the whole of what its format says; None if it is, or if nothing is said.  Blocks."""
    size = os.fstat(fd).st_size
    problems = (_FORMATS[kind](fd, size) for kind in content if kind in _FORMATS)
    return next((problem for problem in problems if problem is not None), None)


def _safetensors(fd: int, size: int) -> str | None:
    """8 bytes: the length of a JSON header, which says where each tensor ends; nothing comes after the last."""
    if size < 8:
        return f"no safetensors file has {size} bytes"
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if length > min(size - 8, MAX_HEADER_BYTES):
        return f"its safetensors header is said to have {length} bytes, the file has {size}"
    try:
        header = json.loads(os.pread(fd, length, 8))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        end = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "its safetensors header cannot be read"
    return None if end == size else f"its safetensors header accounts for {end} bytes, the file has {size}"


def _zip(fd: int, size: int) -> str | None:
    """The end record leads to the central directory, and that to every member: all of it inside the file.

    An empty file passes: zip(1) makes one under the name, to see whether it may, and takes its mode for the archive.
    """
    if not size:
        return None
    tail_start = max(0, size - ZIP_END.size - MAX_COMMENT_BYTES)
    tail = os.pread(fd, size - tail_start, tail_start)
    position = tail.rfind(b"PK\5\6")
    while position >= 0 and position + ZIP_END.size + _comment_bytes(tail, position) != len(tail):
        position = tail.rfind(b"PK\5\6", 0, position)
    if position < 0:
        return "it has no end of a zip file"
    end = tail_start + position
    count, length, offset, directory_end = _zip_end(fd, tail, position, end)
    before = directory_end - length - offset  # what precedes the archive: a self-extractor's program
    if before < 0:
        return "its central directory does not fit into it"
    return _central_directory(fd, offset + before, directory_end, before, count)


def _comment_bytes(tail: bytes, position: int) -> int:
    record = tail[position : position + ZIP_END.size]
    return int(ZIP_END.unpack(record)[7]) if len(record) == ZIP_END.size else len(tail)


def _zip_end(fd: int, tail: bytes, position: int, end: int) -> tuple[int, int, int, int]:
    """Number of entries, length and offset of the central directory, and where it really ends."""
    _, _, _, _, count, length, offset, _ = ZIP_END.unpack_from(tail, position)
    locator = os.pread(fd, ZIP_LOCATOR_64.size, end - ZIP_LOCATOR_64.size) if end >= ZIP_LOCATOR_64.size else b""
    if not locator.startswith(b"PK\6\7") or len(locator) < ZIP_LOCATOR_64.size:
        return count, length, offset, end
    directory_end = end - ZIP_LOCATOR_64.size - ZIP_END_64.size
    record = os.pread(fd, ZIP_END_64.size, directory_end) if directory_end >= 0 else b""
    if not record.startswith(b"PK\6\6") or len(record) < ZIP_END_64.size:
        return count, length, offset, end
    fields = ZIP_END_64.unpack(record)
    return fields[7], fields[8], fields[9], directory_end


def _central_directory(fd: int, start: int, end: int, before: int, count: int) -> str | None:
    data, at, position, found = b"", 0, start, 0
    while position < end:
        if at + ZIP_ENTRY.size > len(data):
            data, at = os.pread(fd, min(CENTRAL_READ_BYTES, end - position), position), 0
        if at + ZIP_ENTRY.size > len(data) or not data.startswith(b"PK\1\2", at):
            return "its central directory is damaged"
        fields = ZIP_ENTRY.unpack_from(data, at)
        packed, local = fields[8], fields[16]
        if 0xFFFFFFFF not in (packed, local) and before + local + ZIP_LOCAL_HEADER_BYTES + packed > start:
            return "a member of it lies beyond its end"
        length = ZIP_ENTRY.size + fields[10] + fields[11] + fields[12]
        at, position, found = at + length, position + length, found + 1
    if position != end or found & 0xFFFF != count & 0xFFFF:
        return f"its central directory has {found} members, {count} are said to be there"
    return None


_FORMATS: dict[Content, Callable[[int, int], str | None]] = {Content.SAFETENSORS: _safetensors, Content.ZIP: _zip}
