"""Two probes on rclone, which `make test-labs` runs: its clients need seconds for each word, so it takes minutes."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.test_labs import probe_both
from tests.labs.filesystems import rclone


def test_a_probe_of_rclone(tmp_path: Path) -> None:
    """What is known of it is what they see."""
    with rclone(tmp_path) as views:
        for found in probe_both(views):
            assert found["known of it"]["good"] is False
            assert found["O_EXCL has one winner"]["good"] is False
            assert found["OFD excludes"]["good"] is False
