"""What `-o locks=auto` makes of a filesystem: it is known, or it is tried, or there are no locks."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safefs import probe
from safefs.errors import SafefsError
from safefs.family import Mounted

EXT4 = Mounted("ext4", "/dev/vda", "254:0", ("rw",))
NFS = Mounted("nfs4", "srv:/export", "0:58", ("rw", "local_lock=none"))
UNKNOWN = Mounted("newfs", "srv:/x", "0:74", ("rw",))


def refusal(state: Path, mounted: Mounted, backing: Mounted) -> str:
    with pytest.raises(SafefsError) as caught:
        probe.why_lease_files(state, mounted, backing)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def never(*_: Any) -> None:
    raise AssertionError("nothing has to be tried")


def copied(source: str, target: str) -> None:
    """A rename as of a filesystem that does not decide it in one place: all of several succeed."""
    shutil.copy(source, target)
    time.sleep(0.02)


def refused_call(number: int) -> Callable[..., None]:
    def call(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_filesystem_of_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe_alone", never)
    assert "each daemon counts as a node" in probe.why_lease_files(tmp_path, EXT4, EXT4)


@pytest.mark.parametrize("mounted", [NFS, UNKNOWN, Mounted()])
def test_others_are_tried(tmp_path: Path, mounted: Mounted) -> None:
    assert "a rename has one winner" in probe.why_lease_files(tmp_path, mounted, mounted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mounted", [NFS, UNKNOWN])
def test_where_several_rename_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: Mounted) -> None:
    monkeypatch.setattr(probe.os, "rename", copied)
    assert "a rename has one winner: no" in refusal(tmp_path, mounted, mounted)


def test_what_does_not_answer_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, in bounded time, and there are no locks rather than this node's own."""
    monkeypatch.setattr(probe, "CALL_SECONDS", 0.1)
    monkeypatch.setattr(probe, "rename_is_decided_once", lambda _directory: time.sleep(60))
    start = time.monotonic()
    assert os.strerror(errno.ETIMEDOUT) in refusal(tmp_path, UNKNOWN, UNKNOWN)
    assert time.monotonic() - start < 30


def test_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.os, "rename", refused_call(errno.EIO))
    assert "a rename has one winner: no" in refusal(tmp_path, UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("kind", sorted(probe.REFUSED))
def test_filesystems_that_are_known_not_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whatever a probe from one node would find."""
    monkeypatch.setattr(probe, "probe_alone", never)
    assert probe.REFUSED[kind] in refusal(tmp_path, Mounted(kind), Mounted(kind))


def test_state_that_other_nodes_do_not_see(tmp_path: Path) -> None:
    """A state directory on this node's disk, for a backing that others have as well."""
    assert "other nodes on the backing (nfs4) cannot look" in refusal(tmp_path, EXT4, NFS)
    assert probe.why_lease_files(tmp_path, NFS, NFS)
