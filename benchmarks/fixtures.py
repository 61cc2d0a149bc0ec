"""What is read and walked: files and trees that are made once for all systems that show the backing directory.

A system with a store of its own gets the same through its mount.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

from benchmarks.errors import BenchError
from benchmarks.scale import MIB, Scale

DIRECTORY = "fixtures"
SMALL_FILE_BYTES = 4096
FILES_PER_DIRECTORY = 1000
GIT_SECONDS = 120
# Of a package with its own shared libraries beside it: what `import` looks at.
PACKAGE = ("numpy", "numpy.libs")


def data(root: Path) -> Path:
    return root / DIRECTORY / "data"


def model(root: Path) -> Path:
    return root / DIRECTORY / "model.safetensors"


def small(root: Path) -> Path:
    return root / DIRECTORY / "small"


def tree(root: Path) -> Path:
    return root / DIRECTORY / "tree"


def listed(root: Path) -> Path:
    return root / DIRECTORY / "listed"


def package(root: Path) -> Path:
    return root / DIRECTORY / "package"


def lay_out(root: Path, scale: Scale) -> None:
    """Everything that the measures need below `root`."""
    (root / DIRECTORY).mkdir()
    _make_data(data(root), scale.file_bytes)
    _make_model(model(root), scale.file_bytes)
    make_files(small(root), scale.small_files, b"x" * SMALL_FILE_BYTES)
    make_tree(tree(root), scale.tree_files)
    make_files(listed(root), scale.listed_files)


def _make_data(path: Path, size: int) -> None:
    """A file that no filesystem can store as a hole."""
    block = bytes(range(256)) * (MIB // 256)
    with open(path, "wb") as file:
        file.writelines(block for _ in range(size // MIB))


def _make_model(path: Path, size: int) -> None:
    """A model of some tensors, as the library itself writes it."""
    import numpy
    from safetensors.numpy import save_file

    count = 8
    weights = numpy.zeros(size // count // 4, dtype=numpy.float32) + 1
    save_file({f"layer.{number}.weight": weights for number in range(count)}, path)


def make_files(directory: Path, count: int, content: bytes = b"") -> None:
    """Files f000000, f000001 … in a new directory; client_program/names.c counts on these names."""
    directory.mkdir()
    for number in range(count):
        with open(directory / f"f{number:06d}", "wb") as file:
            file.write(content)


def make_tree(root: Path, files: int) -> None:
    """Empty files in directories of at most 1,000 each, or a tenth of all: small trees have several as well."""
    root.mkdir()
    share = min(FILES_PER_DIRECTORY, files // 10)
    for number in range(files // share):
        make_files(root / f"d{number:04d}", share)


def make_package(root: Path) -> None:
    """A copy of an installed package, with its compiled modules, as a git repository with everything committed."""
    for name in PACKAGE:
        shutil.copytree(_installed() / name, package(root) / name)
    # Inode numbers and ctime differ between systems; git shall not read every file because of that.
    _git(root, "init", "--quiet")
    settings = ("core.checkStat=minimal", "core.trustctime=false", "core.compression=0", "pack.window=0")
    for setting in (*settings, "user.name=bench", "user.email=bench@localhost"):
        _git(root, "config", *setting.split("="))
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "-m", "all")
    # As a clone has them: packed.
    _git(root, "repack", "-a", "-d", "--quiet")


def copy_package(source: Path, target: Path) -> None:
    """The same repository for a system with a store of its own."""
    shutil.copytree(package(source), package(target), symlinks=True)


def _installed() -> Path:
    found = importlib.util.find_spec(PACKAGE[0])
    if found is None or found.origin is None:
        raise BenchError(f"{PACKAGE[0]} is not installed; run scripts/setup bench")
    return Path(found.origin).parent.parent


def _git(root: Path, *arguments: str) -> None:
    command: list[str | Path] = ["git", "-C", package(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_SECONDS)
    if done.returncode:
        raise BenchError(f"git {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
