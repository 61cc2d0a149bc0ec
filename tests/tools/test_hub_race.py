"""Real huggingface_hub clients that share a cache, on the bare directory and on mounts.

The bare directory is the control: there the damage must be seen, else the test would prove nothing.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.hub import Hub
from tests.support.hub_race import (
    MODEL,
    MODEL_SIZE,
    PIECE,
    MatchModel,
    blob_path,
    finish,
    leave_partial,
    model_hub,
    race,
    start_download,
    storm,
)
from tests.support.mounting import Mount, safefs_command
from tests.support.venvs import HUB_REQUIREMENTS, hub_venv

VERSIONS = list(HUB_REQUIREMENTS)
# An empty refs/main is a matter of microseconds; each storm on the bare directory shows it hundreds of times.
CONTROL_STORMS = 6


@pytest.fixture
def hub() -> Iterator[Hub]:
    with model_hub() as running:
        yield running


@pytest.fixture(params=["one mount", "two mounts"])
def homes(request: pytest.FixtureRequest, make_mount: Callable[[], Mount]) -> tuple[Path, Path]:
    """HF_HOME of the first and the second downloader: the same directory, on one mount or through two."""
    first = make_mount()
    second = make_mount() if request.param == "two mounts" else first
    return first / "hf", second / "hf"


@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
def test_control_bare_directory_is_poisoned(hub: Hub, backing: Path, resumed: bool) -> None:
    outcome = race(hub, hub_venv("1.17.0"), backing / "hf", backing / "hf", resumed=resumed)
    assert outcome.exits[0] == 0, outcome.description
    assert not outcome.intact, outcome.description
    assert not outcome.reader_undisturbed, outcome.description
    # The rest of the file a second time, behind its end.
    assert outcome.size == MODEL_SIZE + (MODEL_SIZE - outcome.starts["second"][0]), outcome.description
    # Who has such a cache already finds out, though safefs never wrote to it.
    found = subprocess.run(safefs_command("scrub", backing / "hf"), capture_output=True, text=True, timeout=60)
    assert found.returncode == 1, found.stderr
    assert f"{blob_path(hub, backing / 'hf')}: damaged: its name says sha256" in found.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_blob_is_intact_on_mounts(hub: Hub, homes: tuple[Path, Path], version: str) -> None:
    outcome = race(hub, hub_venv(version), *homes)
    assert outcome.intact, outcome.description
    assert outcome.reader_undisturbed, outcome.description
    assert outcome.exits == (0, 0), outcome.description


def test_resumed_blob_is_intact_on_mounts(hub: Hub, homes: tuple[Path, Path]) -> None:
    outcome = race(hub, hub_venv("1.17.0"), *homes, resumed=True)
    assert outcome.intact, outcome.description
    assert outcome.reader_undisturbed, outcome.description
    assert outcome.exits == (0, 0), outcome.description
    # One of them took the partial file over, the other one started from nothing: nobody lost what was there.
    assert sorted(outcome.starts["first"] + outcome.starts["second"]) == [0, PIECE], outcome.description


@pytest.mark.parametrize("place", ["bare", "mount"])
def test_download_resumes_after_sigkill(hub: Hub, backing: Path, make_mount: Callable[[], Mount], place: str) -> None:
    home = (backing if place == "bare" else make_mount().path) / "hf"
    venv = hub_venv("1.17.0")
    leave_partial(hub, venv, home, kill=True)
    assert not blob_path(hub, home).exists()
    process = start_download(hub, venv, home, "again")
    error = finish(process)
    assert process.returncode == 0, error
    assert [request.first for request in hub.seen(MatchModel("again"))] == [PIECE]
    assert blob_path(hub, home).read_bytes() == hub.main.files[MODEL].data


@pytest.mark.parametrize("version", ["1.17.0", "1.18.0"])
def test_control_bare_directory_shows_empty_refs(tmp_path: Path, version: str) -> None:
    seen: dict[str, int] = {}
    for number in range(CONTROL_STORMS):
        outcome = storm(hub_venv(version), [tmp_path / f"storm{number}"])
        assert outcome.counts["ref_reads"] > 100, outcome
        seen = outcome.bad()
        if seen.get("ref_empty"):
            return
    pytest.fail(f"no empty refs/main in {CONTROL_STORMS} storms: {seen}")


def test_newest_writes_refs_by_rename(tmp_path: Path) -> None:
    """The newest client needs no help for its refs: what is seen on mounts must not be worse."""
    outcome = storm(hub_venv("newest"), [tmp_path / "storm"])
    assert outcome.failed == 0, outcome.errors
    assert not outcome.bad(), outcome.samples


@pytest.mark.parametrize("version", VERSIONS)
def test_no_bad_read_on_one_mount(mount: Mount, version: str) -> None:
    outcome = storm(hub_venv(version), [mount / "hf"])
    assert outcome.counts["ref_reads"] > 100, outcome
    assert not outcome.bad(), (outcome.counts, outcome.samples)
    assert outcome.failed == 0, outcome.errors


@pytest.mark.parametrize("version", VERSIONS)
def test_no_bad_read_on_two_mounts(two_mounts: tuple[Mount, Mount], version: str) -> None:
    outcome = storm(hub_venv(version), [two_mounts[0] / "hf", two_mounts[1] / "hf"])
    assert outcome.counts["ref_reads"] > 100, outcome
    # Without a lock between the nodes two clients can both find no pointer; the second one then does
    # os.remove + os.symlink on what the first one made.  That gap is the client's own doing.
    assert not outcome.bad(pointers_may_vanish=True), (outcome.counts, outcome.samples)
