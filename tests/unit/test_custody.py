"""State directories that are somebody else's, or open to others, are not used (safefs/custody.py)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from safefs.custody import take_custody, warn_of_renames
from safefs.errors import SafefsError
from safefs.identity import SERVICE, Identities
from safefs.model import Caller
from tests.support.mounting import let_everybody_through

USER, SERVICE_UID = 61001, 61002
PARTS = ("one", "two")
ROOT = Identities(impersonate=True)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def refused(state: Path, identities: Identities = ROOT) -> str:
    with pytest.raises(SafefsError) as caught, identities.acting(SERVICE):
        take_custody(state, PARTS, identities)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_it_is_made_for_its_owner_alone(state: Path) -> None:
    for _ in range(2):
        take_custody(state, PARTS, ROOT)
        assert sorted(os.listdir(state)) == ["one", "two"]
        assert {mode_of(path) for path in (state, *state.iterdir())} == {0o700}


def test_a_service_users_is_made_by_it(tmp_path: Path) -> None:
    let_everybody_through(tmp_path)
    tmp_path.chmod(0o777)
    identities = Identities(impersonate=True, service=Caller(SERVICE_UID, SERVICE_UID, groups=()))
    with identities.acting(SERVICE):
        take_custody(tmp_path / "state", PARTS, identities)
    found = [tmp_path / "state", *(tmp_path / "state").iterdir()]
    assert {path.lstat().st_uid for path in found} == {SERVICE_UID} and os.geteuid() == 0
    assert f"belongs to uid {SERVICE_UID}, not to root" in refused(tmp_path / "state")


def test_rights_of_others_are_taken_away(state: Path) -> None:
    take_custody(state, PARTS, ROOT)
    state.chmod(0o755)
    (state / "one").chmod(0o777)
    take_custody(state, PARTS, ROOT)
    assert mode_of(state) == mode_of(state / "one") == 0o700


@pytest.mark.parametrize("identities", [ROOT, Identities(impersonate=False)], ids=["roots daemon", "users daemon"])
def test_one_that_somebody_else_has_made(state: Path, identities: Identities) -> None:
    state.mkdir(mode=0o777)
    state.chmod(0o777)
    os.chown(state, USER, USER)
    message = refused(state, identities)
    assert f"belongs to uid {USER}, not to root" in message and "-o state=DIR" in message
    assert os.listdir(state) == [] and mode_of(state) == 0o777


def test_the_line_names_the_owner_as_service_user(state: Path) -> None:
    state.mkdir()
    os.chown(state, 65534, 65534)
    assert "mount with -o service_user=nobody" in refused(state)


def test_something_in_it_is_somebody_elses(state: Path) -> None:
    """It was open to others for a while: whoever has made a directory there can go on in it."""
    state.mkdir()
    (state / "one").mkdir()
    os.chown(state / "one", USER, USER)
    assert f"{state / 'one'}: belongs to uid {USER}" in refused(state)
    (state / "one").rmdir()
    (state / "names.lock").touch()
    os.chown(state / "names.lock", USER, USER)
    assert "names.lock: belongs to" in refused(state)


def test_a_link_is_not_followed(state: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    state.symlink_to("target")
    assert "symbolic link" in refused(state)
    assert os.listdir(tmp_path / "target") == []


def test_no_directory(state: Path) -> None:
    state.touch()
    assert "is no directory" in refused(state)


def test_a_directory_from_which_it_can_be_renamed_away(
    state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mode, warns in ((0o777, True), (0o775, True), (0o1777, False), (0o755, False)):
        tmp_path.chmod(mode)
        caplog.clear()
        warn_of_renames(state)
        assert ("chmod +t" in caplog.text) == warns, oct(mode)
