"""The verified close: what was read back, what names promise, and what is written down with a version."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import xxhash

from safefs.backing import HIDDEN_PREFIX
from tests.conftest import MountFactory
from tests.mount.actors import Actor
from tests.mount.places import A, B, content, in_quarantine, quarantined
from tests.support.mounting import Mount

CREATE = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
SHA256 = hashlib.sha256(A).hexdigest()
GIT = hashlib.sha1(b"blob %d\0" % len(A) + A, usedforsecurity=False).hexdigest()
BIG = 24 << 20


def spoil(backing: Path, at: int) -> None:
    """Change one byte of the only hidden file, as bad memory or a bad disk would."""
    (hidden,) = [path for path in backing.iterdir() if path.name.startswith(HIDDEN_PREFIX.decode())]
    with open(hidden, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def write_and_spoil(mount: Mount, writer: Actor, size: int, at: int) -> int:
    """The errno of a close after which the stored bytes are not those that were written."""
    fd = writer.open(mount / "file", CREATE)
    writer("for n in range(size >> 20): os.write(fd, bytes([n]) * (1 << 20))", fd=fd, size=size)
    writer("os.fsync(fd)", fd=fd)
    spoil(mount.backing, at)
    return writer.errno("os.close(fd)", fd=fd)


# Where the daemon sees the writes.
SEEN = "passthrough=off,temp=hidden"


@pytest.mark.parametrize("verify", ["cache", "storage"])
@pytest.mark.parametrize(("size", "at"), [(1 << 20, 77), (BIG, BIG - 1), (BIG, 5 << 20)])
def test_bytes_that_changed_are_not_published(
    verify: str, size: int, at: int, make_mount: MountFactory, writer: Actor
) -> None:
    mount = make_mount("-o", f"{SEEN},verify={verify}")
    (mount / "file").write_bytes(A)
    assert write_and_spoil(mount, writer, size, at) == errno.EIO
    assert content(mount / "file") == content(mount.backing / "file") == A
    assert in_quarantine(mount.backing, lambda data: len(data) == size)


def test_control_without_verifying_they_are(make_mount: MountFactory, writer: Actor) -> None:
    mount = make_mount("-o", f"{SEEN},verify=off")
    assert write_and_spoil(mount, writer, 1 << 20, 77) == 0
    found = content(mount / "file")
    assert found is not None
    assert (len(found), found[76:79]) == (1 << 20, b"\0\1\0")


def test_a_rule_says_what_is_verified(make_mount: MountFactory, tmp_path: Path, writer: Actor) -> None:
    config = tmp_path / "safefs.toml"
    config.write_text('[[rule]]\nmatch = "file"\nverify = "storage"\n')
    mount = make_mount("-o", f"{SEEN},verify=off", "--config", str(config))
    assert write_and_spoil(mount, writer, 1 << 20, 77) == errno.EIO


@pytest.mark.parametrize("passthrough", ["on", "off"])
def test_any_order_of_writes_is_verified(passthrough: str, make_mount: MountFactory, writer: Actor) -> None:
    """Random writes, overwrites, truncates and holes never look like damage."""
    mount = make_mount("-o", f"passthrough={passthrough}")
    fd = writer.open(mount / "file", os.O_CREAT | os.O_RDWR)
    writer(
        "import random\n"
        "model = bytearray()\n"
        "for number in range(400):\n"
        "    if number % 40 == 39:\n"
        "        size = random.randrange(1 << 20); os.ftruncate(fd, size)\n"
        "        model = model[:size].ljust(size, b'\\0')\n"
        "        continue\n"
        "    at, data = random.randrange(6 << 20), random.randbytes(random.choice([10, 5000, 200000]))\n"
        "    assert os.pwrite(fd, data, at) == len(data)\n"
        "    model = model.ljust(at + len(data), b'\\0')\n"
        "    model[at:at + len(data)] = data\n",
        fd=fd,
    )
    writer.closefd(fd)
    assert content(mount / "file") == bytes(writer("bytes(model)"))


# What names promise.


@pytest.fixture
def blobs(mount: Mount) -> Path:
    """A directory of content-addressed names, as huggingface_hub lays it out."""
    directory = mount / "hub" / "models--a" / "blobs"
    directory.mkdir(parents=True)
    return directory


def below(mount: Mount, path: Path) -> Path:
    return mount.backing / path.relative_to(mount.path)


def closed(writer: Actor, path: Path, data: bytes) -> int:
    """The errno of the close of a newly written file."""
    fd = writer.open(path, CREATE)
    writer.write(fd, data)
    return writer.errno("os.close(fd)", fd=fd)


@pytest.mark.parametrize("name", [SHA256, GIT, f"sha256-{SHA256}"])
def test_content_addressed_names(name: str, mount: Mount, blobs: Path, writer: Actor) -> None:
    assert closed(writer, blobs / name, B) == errno.EIO
    assert content(blobs / name) is content(below(mount, blobs / name)) is None
    assert in_quarantine(mount.backing, lambda data: data == B)
    assert closed(writer, blobs / name, A) == 0
    assert content(blobs / name) == A


@pytest.mark.parametrize("name", [SHA256, GIT])
@pytest.mark.parametrize("temp", ["incomplete", "tmp"])
def test_rename_into_a_content_addressed_name(temp: str, name: str, mount: Mount, blobs: Path, writer: Actor) -> None:
    """A version that is not what its new name says keeps no name: it would be resumed, or taken for a finished file."""
    source, target = blobs / f"{name}.{temp}", blobs / name
    assert closed(writer, source, B) == 0
    with pytest.raises(OSError, match="Input/output error"):
        source.rename(target)
    assert content(source) is content(target) is None
    assert in_quarantine(mount.backing, lambda data: data == B)
    assert closed(writer, source, A) == 0
    source.rename(target)
    assert content(target) == content(below(mount, target)) == A


def test_rename_of_an_open_draft_into_a_content_addressed_name(blobs: Path, writer: Actor) -> None:
    fd = writer.open(blobs / "temp", CREATE)
    writer.write(fd, B)
    rename = "os.rename(p, q)"
    assert writer.errno(rename, p=str(blobs / "temp"), q=str(blobs / SHA256)) == errno.EIO
    assert content(blobs / SHA256) is None


def test_link_to_a_content_addressed_name(mount: Mount, blobs: Path) -> None:
    (mount / "file").write_bytes(B)
    with pytest.raises(OSError, match="Input/output error"):
        os.link(mount / "file", blobs / SHA256)
    assert content(mount / "file") == B
    assert content(blobs / SHA256) is None
    assert not list(quarantined(mount.backing))
    (mount / "other").write_bytes(A)
    os.link(mount / "other", blobs / SHA256)
    assert content(blobs / SHA256) == A


def test_control_the_bare_directory_takes_anything(tmp_path: Path) -> None:
    (tmp_path / "temp").write_bytes(B)
    (tmp_path / "temp").rename(tmp_path / SHA256)
    assert content(tmp_path / SHA256) == B


def safetensors() -> bytes:
    header = json.dumps({"t": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(9)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("member", b"x" * 1000)
    return buffer.getvalue()


FORMATS = {"model.safetensors": safetensors(), "a.zip": zipped(), "a-1.0-py3-none-any.whl": zipped()}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, mount: Mount, writer: Actor) -> None:
    whole = FORMATS[name]
    assert closed(writer, mount / name, whole) == 0
    assert closed(writer, mount / name, whole[:-1]) == errno.EIO
    assert content(mount / name) == whole
    # zip(1) itself makes an empty file first.
    assert closed(writer, mount / name, b"") == (errno.EIO if name.endswith(".safetensors") else 0)
    assert in_quarantine(mount.backing, lambda data: data == whole[:-1])


def test_a_rule_switches_checks_off(make_mount: MountFactory, tmp_path: Path, writer: Actor) -> None:
    config = tmp_path / "safefs.toml"
    config.write_text('[[rule]]\nmatch = ["*.zip", "**/blobs/*"]\ncontent = "off"\n')
    mount = make_mount("--config", str(config))
    (mount / "blobs").mkdir()
    for path in (mount / "a.zip", mount / "blobs" / SHA256):
        assert closed(writer, path, B) == 0
        assert content(path) == B
    assert closed(writer, mount / "a.whl", B) == errno.EIO


# What is written down with a version.


@pytest.mark.parametrize("passthrough", ["on", "off"])
@pytest.mark.parametrize("size", [0, 10, BIG])
def test_provenance(size: int, passthrough: str, make_mount: MountFactory, writer: Actor) -> None:
    mount = make_mount("-o", f"passthrough={passthrough}")
    data = os.urandom(size)
    before = time.time()
    assert closed(writer, mount / "file", data) == 0
    digest = os.getxattr(mount.backing / "file", "user.safefs.digest").decode()
    assert digest == f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"
    origin = json.loads(os.getxattr(mount / "file", "user.safefs.origin"))
    assert (origin["size"], origin["uid"], origin["pid"]) == (size, os.getuid(), writer.pid)
    assert origin["command"].startswith("python3")
    assert origin["node"] == os.uname().nodename
    assert before - 1 < origin["time"] < time.time() + 1


def test_provenance_belongs_to_safefs(mount: Mount, writer: Actor) -> None:
    """Nobody writes it through the mount, and who copies all attributes of a file does not meet it."""
    assert closed(writer, mount / "file", A) == 0
    os.setxattr(mount / "file", "user.other", b"1")
    assert os.listxattr(mount / "file") == ["user.other"]
    for name in ("user.safefs.digest", "user.safefs.new"):
        with pytest.raises(PermissionError):
            os.setxattr(mount / "file", name, b"x")
    with pytest.raises(PermissionError):
        os.removexattr(mount / "file", "user.safefs.digest")
    subprocess.run(["cp", "-a", mount / "file", mount / "copy"], check=True, timeout=60)
    first, copied = (json.loads(os.getxattr(mount.backing / n, "user.safefs.origin")) for n in ("file", "copy"))
    assert first["write_id"] != copied["write_id"]


def test_a_new_version_has_a_new_digest(mount: Mount, writer: Actor) -> None:
    """A change in the middle, and appended bytes: what the file before had is not taken over."""
    assert closed(writer, mount / "file", A) == 0
    fd = writer.open(mount / "file", os.O_WRONLY)
    writer("os.pwrite(fd, b'changed', 100)", fd=fd)
    writer.closefd(fd)
    whole = content(mount / "file")
    assert whole == A[:100] + b"changed" + A[107:]
    assert os.getxattr(mount / "file", "user.safefs.digest").decode() == f"xxh3-128:{xxhash.xxh3_128_hexdigest(whole)}"


def test_no_digest_where_nothing_is_verified(make_mount: MountFactory, writer: Actor) -> None:
    mount = make_mount("-o", "verify=off")
    assert closed(writer, mount / "file", A) == 0
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(mount / "file", "user.safefs.digest")
    assert json.loads(os.getxattr(mount / "file", "user.safefs.origin"))["size"] == len(A)
