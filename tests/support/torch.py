"""torch's FileBaton, out of torch's own wheel; nothing else of torch is kept.

torch is far too large to be installed for one file that needs nothing of it.  pip brings the wheel, from where it
brings everything else, the file is taken out, and the wheel is thrown away.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "2.13.0"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / f"torch-{VERSION}"
MEMBER = "torch/utils/file_baton.py"
DOWNLOAD_SECONDS = 600


def file_baton() -> Path:
    """The module that has the class, fetched if it is not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    module = CACHE / "file_baton.py"
    with open(CACHE / "fetched.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not module.exists():
            _fetch(module)
    return module


def _fetch(module: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as fetched:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", fetched]
        subprocess.run([*command, f"torch=={VERSION}"], check=True, timeout=DOWNLOAD_SECONDS, stdin=subprocess.DEVNULL)
        (wheel,) = Path(fetched).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            new = Path(fetched) / "new"
            new.write_bytes(content.read(MEMBER))
        os.rename(new, module)
