"""`scripts/yardsticks`: lock tests that others wrote, on a bare directory and on a mount of one, compared.

They are fetched each time they are missing and never part of this repository (docs/yardsticks.md).  What counts is
what fails on the mount and passes on the bare directory of the same filesystem: then the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from tests.support.mounting import mounted
from tests.support.venvs import venv

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "yardsticks"
FILELOCK = "4.1.2"
# What asks something of the filesystem; the rest is about threads, forks and signals, and takes most of the time.
FILELOCK_TESTS = [f"tests/test_{name}.py" for name in ("filelock", "soft_stale", "soft_lease", "strict_soft", "error")]
FILELOCK_NEEDS = ["pytest>=9", "pytest-asyncio>=1.3", "pytest-mock>=3.15", "pytest-timeout>=2.4", "virtualenv>=21"]
SUITE_SECONDS = 900
TEST_SECONDS = 300
# Every file is written in place: of its locks the same is asked, and of its data what a plain filesystem does.
IN_PLACE = '[[rule]]\nclass = "shared"\nmatch = ["*"]\n'
# How the programs of LTP say in their exit status what came of them; other bits are failures.
LTP_CONF = 32

OUTCOMES = ("passed", "failed", "skipped")

Results = dict[str, str]  # by test: passed, failed or skipped
Suite = Callable[[Path], Results]  # runs with its files in this directory


def filelock_source() -> Path:
    """filelock's own tests, out of the source distribution that pip brings from the package index."""
    source = CACHE / f"filelock-{FILELOCK}"
    if not source.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as fetched:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "filelock"]
            subprocess.run([*command, "--dest", fetched, f"filelock=={FILELOCK}"], check=True, timeout=SUITE_SECONDS)
            shutil.unpack_archive(Path(fetched) / f"filelock-{FILELOCK}.tar.gz", fetched)
            (Path(fetched) / f"filelock-{FILELOCK}").rename(source)
    return source


def filelock_suite(source: Path) -> Suite:
    """filelock's tests, on filelock as it is installed from the package index."""
    python = venv("yardsticks", [f"filelock=={FILELOCK}", *FILELOCK_NEEDS]).python

    def run(place: Path) -> Results:
        with tempfile.TemporaryDirectory() as reports:
            report = Path(reports) / "junit.xml"
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
            done = subprocess.run(
                [*command, f"--basetemp={place / 'pytest'}", f"--junitxml={report}", *FILELOCK_TESTS],
                cwd=source,
                env={**os.environ, "TMPDIR": str(place)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=SUITE_SECONDS,
            )
            if not report.exists():
                raise SystemExit(f"filelock's tests did not run:\n{done.stdout}")
            return junit_results(report)

    return run


def junit_results(report: Path) -> Results:
    results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        results[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return results


def ltp_suite(source: Path) -> Suite:
    """The tests of fcntl(2) and flock(2) in a checkout of the Linux Test Project, built in it where they are not."""
    calls = source / "testcases" / "kernel" / "syscalls"
    if not (source / "configure").exists():
        subprocess.run(["make", "autotools"], cwd=source, check=True, stdout=subprocess.DEVNULL)
    if not (source / "include" / "mk" / "config.mk").exists():
        subprocess.run(["./configure"], cwd=source, check=True, stdout=subprocess.DEVNULL)
    for name in ("fcntl", "flock"):
        subprocess.run(["make", "-C", calls / name], check=True, stdout=subprocess.DEVNULL)
    lines = [line.split() for line in (source / "runtest" / "syscalls").read_text().splitlines()]
    tests = {line[0]: line[1:] for line in lines if line and line[0].startswith(("fcntl", "flock"))}

    def run(place: Path) -> Results:
        return {name: ltp_outcome(calls / name[:5], command, place) for name, command in tests.items()}

    return run


def ltp_outcome(directory: Path, command: list[str], place: Path) -> str:
    try:
        done = subprocess.run(
            [directory / command[0], *command[1:]],
            cwd=place,
            env={**os.environ, "TMPDIR": str(place), "PATH": f"{directory}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "failed"
    return {0: "passed", LTP_CONF: "skipped"}.get(done.returncode, "failed")


def compare(name: str, suite: Suite, *, in_place: bool) -> bool:
    """Run a suite in both places and print what came of it; whether the mount is as good as the bare directory."""
    work = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        (work / "bare").mkdir()
        bare = suite(work / "bare")
        (work / "backing").mkdir()
        (work / "safefs.toml").write_text(IN_PLACE if in_place else "")
        config = ["--config", str(work / "safefs.toml")]
        with mounted(work / "backing", work / "mount", "-o", "locks=leasefile", *config) as mount:
            on_mount = suite(mount.path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for place, results in (("bare directory", bare), ("mount", on_mount)):
        counts = Counter(results.values())
        print(f"{name:10} {place:15}", *(f"{counts[outcome]:4} {outcome}" for outcome in OUTCOMES))
    pairs = {test: (outcome, on_mount.get(test, "missing")) for test, outcome in bare.items()}
    for test, (outcome, there) in sorted(pairs.items()):
        if "failed" in (outcome, there) or outcome != there:
            print(f"{name:10} {outcome} on the bare directory, {there} on the mount: {test}")
    return all(there == "passed" for outcome, there in pairs.values() if outcome == "passed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/yardsticks", description="Lock tests of others, on a mount.")
    parser.add_argument("--filelock", type=Path, metavar="DIR", help="filelock's source, instead of pip's download")
    parser.add_argument("--ltp", type=Path, metavar="DIR", help="a checkout of the Linux Test Project, built in place")
    parser.add_argument("--only", choices=["filelock", "ltp"])
    parser.add_argument("--in-place", action="store_true", help="on the mount, write every file in place")
    options = parser.parse_args()
    in_place = options.in_place
    CACHE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no mount behind
    good = True
    if options.only != "ltp":
        good &= compare("filelock", filelock_suite(options.filelock or filelock_source()), in_place=in_place)
    if options.ltp is not None and options.only != "filelock":
        good &= compare("ltp", ltp_suite(options.ltp.resolve()), in_place=in_place)
    elif options.only != "filelock":
        print("ltp        not run: Debian has no package of it; give --ltp DIR, a checkout of its repository")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
