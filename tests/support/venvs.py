"""Virtual environments with tools of exact versions, built once and kept in `.cache/venvs` of the checkout.

A venv counts only when its marker file is there, and the marker is written last: one that was left half-made (an
interrupted run, no network) is built again.  A file lock keeps two test runs from building the same one at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "venvs"
BUILD_SECONDS = 600
MARKER = "complete.json"

# The newest is resolved on the package index when its venv is built; `Venv.versions` says which one it is.
HUB_REQUIREMENTS = {
    "1.17.0": "huggingface_hub==1.17.0",
    "1.18.0": "huggingface_hub==1.18.0",
    "newest": "huggingface_hub>=2",
}


@dataclass(frozen=True)
class Venv:
    """A finished environment: its interpreter and the versions that are in it."""

    path: Path
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def tool(self, name: str) -> Path:
        """A command that a package brought along."""
        return self.path / "bin" / name


def hub_venv(version: str) -> Venv:
    """The environment of one huggingface_hub: "1.17.0", "1.18.0" or "newest"."""
    return venv(f"hub-{version}", [HUB_REQUIREMENTS[version]])


def venv(name: str, requirements: list[str]) -> Venv:
    """The environment `name` with these requirements, built if it is not there yet."""
    # Another interpreter or other requirements make another environment.
    key = {"requirements": requirements, "python": sys.version, "base": os.path.realpath(sys.executable)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{name}-{digest}"
    with open(CACHE / f"{name}-{digest}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = path / MARKER
        if not marker.exists():
            _build(path, requirements)
            versions = _versions(path)
            partial = marker.with_suffix(".new")
            partial.write_text(json.dumps({**key, "versions": versions}, indent=1))
            partial.rename(marker)
        return Venv(path, json.loads(marker.read_text())["versions"])


def _build(path: Path, requirements: list[str]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _run([sys.executable, "-m", "venv", path])
    _run([path / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-input", *requirements])


def _versions(path: Path) -> dict[str, str]:
    listing = _run([path / "bin" / "python", "-m", "pip", "list", "--format=json"])
    return {package["name"]: package["version"] for package in json.loads(listing)}


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout
