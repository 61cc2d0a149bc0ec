"""What a verdict of two probes is worth: `-o locks=native` needs a good one, of two clients, of this filesystem."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from safefs import verdict
from safefs.errors import SafefsError
from safefs.family import Mounted
from safefs.verdict import FILE, OFD_EXCLUDES, Client, Verdict, probe_command, read, why_native, write

NFS = Mounted("nfs4", "srv:/export", "0:58", ("rw", "vers=4.2", "local_lock=none"))
GOOD = Verdict(1.7e9, "nfs4", (Client("a1", "one"), Client("b2", "two")), {OFD_EXCLUDES: "yes"}, True)
RUN = "safefs probe /srv --peer"


def refusal(state: Path, mounted: Mounted = NFS) -> str:
    with pytest.raises(SafefsError) as caught:
        why_native(state, mounted, RUN)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def test_a_good_one(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert read(tmp_path) == GOOD
    words = why_native(tmp_path, NFS, RUN)
    assert "on one and two" in words and "local_lock=none" in words
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_none(tmp_path: Path) -> None:
    assert RUN in refusal(tmp_path)


def test_the_last_one_counts(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, replace(GOOD, excludes=False, results={OFD_EXCLUDES: "no: both got the lock"}))
    assert "did not find that OFD locks exclude (no: both got the lock)" in refusal(tmp_path)


def test_two_probes_on_one_client(tmp_path: Path) -> None:
    write(tmp_path, replace(GOOD, clients=(Client("a1", "one"), Client("a1", "one"))))
    assert "through one mount" in refusal(tmp_path) and RUN in refusal(tmp_path)


def test_one_client_is_all_that_a_filesystem_of_one_node_has(tmp_path: Path) -> None:
    ext4 = Mounted("ext4", "/dev/vda", "254:0", ("rw",))
    assert RUN in refusal(tmp_path, ext4)
    write(tmp_path, replace(GOOD, kind="ext4", clients=(Client("a1", "one"), Client("a1", "one"))))
    assert "ext4 is a filesystem of one node" in why_native(tmp_path, ext4, RUN)


def test_of_another_filesystem(tmp_path: Path) -> None:
    write(tmp_path, replace(GOOD, kind="fuse.glusterfs"))
    assert "was of fuse.glusterfs, and this is nfs4" in refusal(tmp_path)


@pytest.mark.parametrize("option", ["local_lock=all", "local_lock=posix", "nolock"])
def test_a_node_with_other_mount_options(tmp_path: Path, option: str) -> None:
    """Whatever two others have found out."""
    write(tmp_path, GOOD)
    assert f"mounted with {option}" in refusal(tmp_path, replace(NFS, options=("rw", option)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "clients": [1]}'])
def test_what_is_no_verdict(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert "cannot be read" in refusal(tmp_path) and RUN in refusal(tmp_path)


def test_one_that_is_listed_and_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a client that remembers the inode from before another replaced the file."""
    write(tmp_path / "fresh", GOOD)
    (tmp_path / FILE).symlink_to("current")
    arrives = threading.Timer(0.2, (tmp_path / "fresh" / FILE).rename, [tmp_path / "current"])
    arrives.start()
    assert read(tmp_path) == GOOD
    arrives.join()
    monkeypatch.setattr(verdict, "READ_SECONDS", 0.0)
    (tmp_path / "current").unlink()
    assert "cannot be read" in refusal(tmp_path)


def test_the_client_is_the_superblock() -> None:
    here = Client.here(NFS)
    assert here == Client.here(replace(NFS, source="elsewhere"))
    assert here != Client.here(replace(NFS, device="0:59"))


def test_the_command_says_where_the_state_is() -> None:
    assert probe_command(Path("/srv/a b"), Path("/srv/a b/.safefs")) == "safefs probe '/srv/a b' --peer"
    assert probe_command(Path("/srv"), Path("/state")) == "safefs probe /srv --state /state --peer"
