"""An interpreter with safefs that an unprivileged user can run, wherever the tests' own interpreter lies.

Root's interpreter often lies in root's home, which nobody else may enter.  Then a virtual environment is made from
the system's Python in a directory that everybody can reach, and the project is installed there.  It is kept, and the
project is installed again only when its sources changed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
_PROBE = "import pyfuse3, trio, safefs.daemon"


def as_nobody(*argv: str | Path) -> list[str]:
    """The command line that runs argv as nobody, with no group but nogroup."""
    # No --no-new-privs: fusermount3 is setuid.
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *map(str, argv)]


@functools.cache
def user_python() -> str:
    """The path of the interpreter."""
    if _works(sys.executable):
        return sys.executable
    base = _reachable_cache()
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(base)
    python = str(base / "venv" / "bin" / "python")
    assert _works(python), f"{python} cannot run safefs as nobody"
    return python


def _works(python: str) -> bool:
    command = as_nobody(python, "-c", _PROBE)
    return subprocess.run(command, cwd="/", check=False, capture_output=True, timeout=60).returncode == 0


def _reachable_cache() -> Path:
    """The checkout's own cache, or one under /var/tmp when the checkout lies where nobody may go."""
    probe = as_nobody("test", "-x", ROOT)
    if subprocess.run(probe, cwd="/", check=False, capture_output=True).returncode == 0:
        return ROOT / ".cache" / "user-python"
    return Path("/var/tmp") / f"safefs-user-python-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}"


def _sources() -> Iterator[Path]:
    for pattern in ("pyproject.toml", "setup.py", "safefs/**/*.py", "safefs/**/*.c", "safefs/**/*.h", "safefs/*.toml"):
        yield from sorted(ROOT.glob(pattern))


def _build(base: Path) -> None:
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(str(source).encode() + b"\0" + source.read_bytes())
    stamp = base / "stamp"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    python = base / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", base / "venv"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as copy:
        # Building leaves files beside the sources: not in the checkout.
        ignore = shutil.ignore_patterns(
            ".git", ".venv", ".cache", "tests", "build", "*.egg-info", "*.so", "__pycache__"
        )
        shutil.copytree(ROOT, Path(copy) / "safefs", ignore=ignore)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--upgrade", f"{copy}/safefs"], check=True)
        again = [*pip, "--no-deps", "--force-reinstall", f"{copy}/safefs"]
        subprocess.run(again, check=True)
    stamp.write_text(digest.hexdigest())
