"""Unmodified tools: what they make on a mount equals what they make in a plain directory of the same filesystem."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.hub_http import Answer, Hold, RangeServer
from tests.support.hub_race import wait_written
from tests.support.mounting import Mount, wait_until
from tests.support.venvs import Venv, venv
from tests.tools.processes import ending
from tests.tools.recipes import RECIPES, Recipe
from tests.tools.trees import Rules, differences, tree

SCRIPT_SECONDS = 240
OLD = 1_600_000_000_123_456_789
BIG = bytes(range(256)) * 2048 + b"the end"
DOWNLOAD = hashlib.shake_256(b"download").digest(6 * 1024 * 1024)


@pytest.fixture(scope="session")
def tools() -> Venv:
    return venv("tools", ["numpy", "safetensors", "uv", "setuptools>=70", "wheel"])


class Index(RangeServer):
    """A web server that is a package index too (PEP 503)."""

    def answer(self, path: str, query: str) -> Answer | None:
        project = path.removeprefix("/simple/").rstrip("/")
        if path.startswith("/simple/"):
            names = [name for name in self.files if name.replace("_", "-").startswith(f"packages/{project}-")]
            if not names:
                return None
            links = "".join(f'<a href="/{name}">{name.partition("/")[2]}</a>\n' for name in names)
            page = f"<!DOCTYPE html><html><body>\n{links}</body></html>\n".encode()
            return Answer(page, etag=hashlib.sha256(page).hexdigest(), headers=(("Content-Type", "text/html"),))
        answer = super().answer(path, query)
        if answer is not None and path.startswith("/packages/"):
            return Answer(answer.body, answer.etag, headers=(("Cache-Control", "max-age=3600"),))
        return answer


def wheel() -> bytes:
    """A package as a wheel, with a module, data and metadata."""
    files = {
        "acme_wheel/__init__.py": b"N = 1\n",
        "acme_wheel/data.bin": BIG,
        "acme_wheel-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: acme-wheel\nVersion: 1.0\n",
        "acme_wheel-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    record = "acme_wheel-1.0.dist-info/RECORD"
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0)), data)
    return output.getvalue()


def sdist() -> bytes:
    """A package as source: pip builds a wheel of it and keeps that in its cache."""
    files = {
        "acme_sdist/__init__.py": b"N = 2\n",
        "PKG-INFO": b"Metadata-Version: 2.1\nName: acme-sdist\nVersion: 1.0\n",
        "setup.py": b"from setuptools import setup\nsetup(name='acme-sdist', version='1.0', packages=['acme_sdist'])\n",
    }
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"acme-sdist-1.0/{name}")
            info.size = len(data)
            info.mtime = 1_704_067_200
            archive.addfile(info, io.BytesIO(data))
    return output.getvalue()


@pytest.fixture
def server() -> Iterator[Index]:
    files = {
        "packages/acme_wheel-1.0-py3-none-any.whl": wheel(),
        "packages/acme-sdist-1.0.tar.gz": sdist(),
        "big.bin": DOWNLOAD,
        "big.bin.part": DOWNLOAD,
    }
    with Index(files) as running:
        yield running


def make_source(root: Path) -> Path:
    """A tree with what archivers have to keep: modes, symlinks, hard links, holes, old times, odd names."""
    source = root / "source"
    (source / "sub" / "deep").mkdir(parents=True)
    for number in range(1, 15):
        file = source / "sub" / f"f{number}.txt"
        file.write_text("".join(f"line {line} of {number}\n" for line in range(number * 10)))
        file.chmod(0o600 + number)
    (source / "big.bin").write_bytes(BIG)
    (source / "empty").touch()
    (source / "sub" / "deep" / "with space ünd newline\n").write_text("odd\n")
    (source / "script").write_text("#!/bin/sh\necho hello\n")
    (source / "script").chmod(0o755)
    (source / "link").symlink_to("sub/f1.txt")
    (source / "dangling").symlink_to("nowhere")
    os.link(source / "sub" / "f2.txt", source / "hard")
    (source / "sub" / "deep").chmod(0o2750)
    for number, path in enumerate(sorted(path for path in source.rglob("*") if not path.is_symlink())):
        os.utime(path, ns=(OLD, OLD + number * 1_000_000_007))
    with zipfile.ZipFile(root / "archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.txt", "d/b.txt", "d/big.bin"):
            info = zipfile.ZipInfo(name, (2020, 2, 2, 2, 2, 2))
            info.external_attr = 0o100640 << 16
            archive.writestr(info, BIG if name.endswith(".bin") else name)
    return source


def environment(extra: dict[str, str]) -> dict[str, str]:
    """The same small environment everywhere: no configuration of the machine's user, one identity, one date."""
    return {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "HOME": "/nonexistent",
        "PIP_CONFIG_FILE": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_COUNT": "3",
        "GIT_CONFIG_KEY_0": "pack.threads",
        "GIT_CONFIG_VALUE_0": "1",
        "GIT_CONFIG_KEY_1": "init.defaultBranch",
        "GIT_CONFIG_VALUE_1": "main",
        # The test's directories may belong to another user than the one who runs git.
        "GIT_CONFIG_KEY_2": "safe.directory",
        "GIT_CONFIG_VALUE_2": "*",
        **{f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER") for field, value in IDENTITY.items()},
        **extra,
    }


IDENTITY = {"NAME": "Acme", "EMAIL": "acme@example.org", "DATE": "2024-01-01T00:00:00Z"}

MAKE_REPOSITORY = r"""
    git init -q "$REPO"; cd "$REPO"
    mkdir dir; for n in $(seq 1 30); do seq "$n" $((n * 30)) > "dir/file$n.txt"; done
    ln -s dir/file1.txt link; printf '#!/bin/sh\n' > run; chmod +x run
    git add -A; git commit -qm first
    for n in 1 2 3; do echo "$n" >> "dir/file$n.txt"; git commit -qam "more $n"; done
"""


def run_script(script: str, place: Path, variables: dict[str, str]) -> None:
    """Run a script with bash -eu; its output is part of the failure."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", textwrap.dedent(script)],
        cwd=place,
        env=environment(variables),
        umask=0o022,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SCRIPT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"in {place}: exit {done.returncode}\n{done.stdout.decode(errors='replace')}"


def assert_same(bare: Path, mount: Mount, name: str, rules: Rules) -> None:
    """The mount shows what the plain directory has, and the backing directory has what the mount shows."""
    assert not differences(tree(bare, rules), tree(mount / name, rules))
    assert not differences(tree(mount.backing / name), tree(mount / name))


@pytest.mark.parametrize("name", list(RECIPES))
def test_tool(name: str, tmp_path: Path, mount: Mount, server: Index, tools: Venv) -> None:
    recipe: Recipe = RECIPES[name]
    plain = tmp_path / "plain"
    plain.mkdir()
    variables = {
        "SRC": str(make_source(plain)),
        "REPO": str(plain / "repository"),
        "URL": server.url,
        "PY": str(tools.python),
        "TOOLS": str(tools.path / "bin"),
    }
    if "$REPO" in recipe.script:
        run_script(MAKE_REPOSITORY, plain, variables)
    # The same name at both places, for tools that write it down.
    bare = plain / "work"
    for place in (bare, mount / "work"):
        place.mkdir()
        run_script(recipe.script, place, variables)
    assert_same(bare, mount, "work", recipe.rules)


DOWNLOADERS = {
    "wget": ["wget", "-q", "-c", "--tries=1", "-O", "{name}", "{url}/{name}"],
    "curl": ["curl", "-sS", "-f", "-R", "-C", "-", "-o", "{name}", "{url}/{name}"],
    "aria2": [
        "aria2c",
        "-q",
        "-c",
        "--no-conf",
        "--split=1",
        "--file-allocation=none",
        "--disk-cache=0",
        "--remote-time=true",
        "--auto-save-interval=1",
        "--out={name}",
        "{url}/{name}",
    ],
}


def start_downloader(tool: str, name: str, place: Path, server: Index) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [argument.format(name=name, url=server.url) for argument in DOWNLOADERS[tool]],
        cwd=place,
        env=environment({}),
        umask=0o022,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def aria2_has_progress(control: Path) -> bool:
    """Whether a control file says that a piece is there: after 30 bytes come the bitfield's length and the bitfield."""
    try:
        data = control.read_bytes()
    except FileNotFoundError:
        return False
    length = int.from_bytes(data[30:34], "big")
    return any(data[34 : 34 + length])


def interrupted_download(tool: str, name: str, place: Path, server: Index) -> int:
    """Kill a download in its middle and start it again; where the second one began."""
    place.mkdir()
    with ExitStack() as stack:
        hold: Hold = server.hold(4 * 1024 * 1024, f"/{name}")
        first = stack.enter_context(ending(start_downloader(tool, name, place, server)))
        hold.wait_reached(first)
        wait_written(first, 2 * 1024 * 1024)
        if tool == "aria2":
            # It notes every second how far it came; without that note it cannot resume anywhere.
            assert wait_until(lambda: aria2_has_progress(place / f"{name}.aria2")), "no control file"
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        hold.release()
    before = len(server.seen(f"/{name}"))
    with ending(start_downloader(tool, name, place, server)) as second:
        output = second.communicate(timeout=60)[0]
        assert second.returncode == 0, (tool, place, output)
    assert (place / name).read_bytes() == DOWNLOAD
    return max(request.first for request in server.seen(f"/{name}")[before:])


@pytest.mark.parametrize("tool", list(DOWNLOADERS))
@pytest.mark.parametrize("name", ["big.bin", "big.bin.part"])
def test_download_resumed_after_sigkill(tool: str, name: str, tmp_path: Path, mount: Mount, server: Index) -> None:
    """A name that says that it is partial is resumed; under any other name the killed one leaves nothing behind."""
    on_bare = interrupted_download(tool, name, tmp_path / "work", server)
    on_mount = interrupted_download(tool, name, mount / "work", server)
    assert on_bare > 0
    assert (on_mount > 0) == name.endswith(".part")
    assert_same(tmp_path / "work", mount, "work", Rules(mtimes=True))


SQLITE_WRITER = """
import sqlite3, sys
path, writer, mode = sys.argv[1:]
base = sqlite3.connect(path, timeout=120, isolation_level=None)
assert base.execute("PRAGMA journal_mode").fetchone() == (mode,)
for n in range(40):
    base.execute("BEGIN IMMEDIATE")
    total = base.execute("SELECT count(*) FROM t").fetchone()[0]
    base.execute("INSERT INTO t VALUES (?, ?, ?)", (int(writer), n, f"{total} " * 200))
    base.execute("COMMIT")
    assert base.execute("SELECT count(*) FROM t WHERE writer = ?", (int(writer),)).fetchone()[0] == n + 1
base.close()
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("place", ["bare", "mount"])
def test_sqlite_with_four_writers(mode: str, place: str, backing: Path, request: pytest.FixtureRequest) -> None:
    """Every transaction sees all earlier ones, none is lost, and the file is sound."""
    root = backing if place == "bare" else request.getfixturevalue("mount").path
    database = root / "data.sqlite3"
    # Before the writers start: SQLite does not wait for others when it changes the journal mode.
    schema = f"PRAGMA journal_mode={mode}; CREATE TABLE t(writer INTEGER, n INTEGER, s TEXT, UNIQUE(writer, n));"
    subprocess.run(["sqlite3", database, schema], stdout=subprocess.DEVNULL, timeout=60, check=True)
    command = [sys.executable, "-c", SQLITE_WRITER, str(database)]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ending(subprocess.Popen([*command, str(number), mode], stderr=subprocess.PIPE)))
            for number in range(4)
        ]
        for writer in writers:
            errors = writer.communicate(timeout=200)[1]
            assert writer.returncode == 0, errors.decode()
    checks = "PRAGMA integrity_check; SELECT count(*), count(DISTINCT s), count(DISTINCT writer) FROM t;"
    answer = subprocess.run(["sqlite3", database, checks], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.split() == ["ok", "160|160|4"], answer
