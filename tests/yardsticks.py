"""`scripts/yardsticks`: lock tests that others wrote, on a bare directory and on a mount of one, compared.

They are fetched each time they are missing and never part of this repository (docs/yardsticks.md).  What counts is
what fails on the mount and passes on the bare directory of the same filesystem: then the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from tests.support.etcd import etcd
from tests.support.mounting import mounted
from tests.support.venvs import venv

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "yardsticks"
LOGS = CACHE / "logs"  # what tests that did not pass have said, of the last run
FILELOCK = "3.32.3"
FILELOCK_NEEDS = ["pytest>=9", "pytest-asyncio>=1.3", "pytest-mock>=3.15", "pytest-timeout>=2.4", "virtualenv>=20"]
FETCH_SECONDS = 600
SUITE_SECONDS = 3600
TEST_SECONDS = 300
# A plugin for pytest: what is asked is whether a lock is right, and not how fast it is.
PATIENCE = """
def pytest_collection_modifyitems(items):
    marks = {id(mark): mark for item in items for mark in item.iter_markers("timeout")}  # some share theirs
    for mark in marks.values():
        if mark.args:
            object.__setattr__(mark, "args", (10 * mark.args[0], *mark.args[1:]))
"""
PYTEST_RAN = (0, 1)  # exit statuses: all tests passed, or some failed
# Tests that open files until they may no more: the daemon has to be allowed more than they are.
TEST_DESCRIPTORS = 4096
# Every file is written in place: of its locks the same is asked, and of its data what a plain filesystem does.
IN_PLACE = '[[rule]]\nclass = "shared"\nmatch = ["*"]\n'
# How the programs of LTP say in their exit status what came of them; other bits are failures.
LTP_CONF = 32

OUTCOMES = ("passed", "failed", "skipped")

Results = dict[str, str]  # by test: passed, failed or skipped
Suite = Callable[[Path, Path], Results]  # runs with its files in the first directory, and its logs in the second


def filelock_source(version: str) -> Path:
    """filelock's own tests, out of the source distribution that pip brings from the package index."""
    source = CACHE / f"filelock-{version}"
    if not source.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as fetched:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "filelock"]
            subprocess.run([*command, "--dest", fetched, f"filelock=={version}"], check=True, timeout=FETCH_SECONDS)
            shutil.unpack_archive(Path(fetched) / f"filelock-{version}.tar.gz", fetched)
            (Path(fetched) / f"filelock-{version}").rename(source)
    return source


def filelock_suite(version: str, chosen: str) -> Suite:
    """filelock's tests, those that pytest's -k chooses, on filelock as it is installed from the package index."""
    source = filelock_source(version)
    python = venv("yardsticks", [f"filelock=={version}", *FILELOCK_NEEDS]).python

    def run(place: Path, logs: Path) -> Results:
        report = logs / "junit.xml"
        (logs / "patience.py").write_text(PATIENCE)
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "patience"]
        command += [f"--timeout={TEST_SECONDS}", f"--basetemp={place / 'pytest'}", f"--junitxml={report}"]
        with open(logs / "pytest.log", "wb") as log:
            done = subprocess.run(
                [*command, "-k", chosen, "tests"],
                cwd=source,
                env={**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(logs)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=SUITE_SECONDS,
                preexec_fn=limit_descriptors,
            )
        if done.returncode not in PYTEST_RAN:
            raise SystemExit(f"filelock's tests did not run to their end: see {log.name}")
        return junit_results(report)

    return run


def limit_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (TEST_DESCRIPTORS, TEST_DESCRIPTORS))


def junit_results(report: Path) -> Results:
    results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        results[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return results


def ltp_suite(source: Path, chosen: str) -> Suite:
    """The tests of fcntl(2) and flock(2) in a checkout of the Linux Test Project, built in it where they are not.

    `chosen`: only those whose names have one of these words in them.
    """
    calls = source / "testcases" / "kernel" / "syscalls"
    if not (source / "configure").exists():
        subprocess.run(["make", "autotools"], cwd=source, check=True, stdout=subprocess.DEVNULL)
    if not (source / "include" / "mk" / "config.mk").exists():
        subprocess.run(["./configure"], cwd=source, check=True, stdout=subprocess.DEVNULL)
    for name in ("fcntl", "flock"):
        subprocess.run(["make", "-C", calls / name], check=True, stdout=subprocess.DEVNULL)
    lines = [line.split() for line in (source / "runtest" / "syscalls").read_text().splitlines()]
    tests = {line[0]: line[1:] for line in lines if line and line[0].startswith(("fcntl", "flock"))}
    words = chosen.replace(" or ", " ").split() or [""]
    tests = {name: command for name, command in tests.items() if any(word in name for word in words)}

    def run(place: Path, logs: Path) -> Results:
        return {
            name: ltp_outcome(calls / name[:5], command, place, logs / f"{name}.log") for name, command in tests.items()
        }

    return run


def ltp_outcome(directory: Path, command: list[str], place: Path, log: Path) -> str:
    with open(log, "wb") as output:
        try:
            done = subprocess.run(
                [directory / command[0], *command[1:]],
                cwd=place,
                env={**os.environ, "TMPDIR": str(place), "PATH": f"{directory}:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TEST_SECONDS,
                preexec_fn=limit_descriptors,
            )
        except subprocess.TimeoutExpired:
            return "failed"
    outcome = {0: "passed", LTP_CONF: "skipped"}.get(done.returncode, "failed")
    if outcome == "passed":
        log.unlink()
    return outcome


@contextmanager
def lock_options(locks: str, work: Path) -> Iterator[str]:
    """The mount's options for a lock backend; `etcd` is a server of its own."""
    if locks != "etcd":
        yield f"locks={locks}"
        return
    directory = work / "etcd"
    directory.mkdir()
    with etcd(directory) as server:
        yield server.options


def fresh_logs(name: str, place: str) -> Path:
    logs = LOGS / f"{name}-{place}"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    return logs


def compare(name: str, suite: Suite, locks: str, *, in_place: bool) -> bool:
    """Run a suite in both places and print what came of it; whether the mount is as good as the bare directory."""
    work = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        (work / "bare").mkdir()
        bare = suite(work / "bare", fresh_logs(name, "bare"))
        (work / "backing").mkdir()
        (work / "safefs.toml").write_text(IN_PLACE if in_place else "")
        config = ["--config", str(work / "safefs.toml")]
        with (
            lock_options(locks, work) as options,
            mounted(work / "backing", work / "mount", "-o", options, *config) as mount,
        ):
            on_mount = suite(mount.path, fresh_logs(name, "mount"))
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
    parser.add_argument("--filelock", default=FILELOCK, metavar="VERSION", help=f"instead of {FILELOCK}")
    parser.add_argument("--ltp", type=Path, metavar="DIR", help="a checkout of the Linux Test Project, built in place")
    parser.add_argument("--only", choices=["filelock", "ltp"])
    parser.add_argument("-k", default="", dest="chosen", metavar="NAMES", help="only tests with these names: 'a or b'")
    parser.add_argument("--locks", default="leasefile", help="the mount's lock backend; etcd: a server of its own")
    parser.add_argument("--in-place", action="store_true", help="on the mount, write every file in place")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaves no mount behind
    good = True
    if options.only != "ltp":
        suite = filelock_suite(options.filelock, options.chosen)
        good &= compare("filelock", suite, options.locks, in_place=options.in_place)
    if options.ltp is not None and options.only != "filelock":
        suite = ltp_suite(options.ltp.resolve(), options.chosen)
        good &= compare("ltp", suite, options.locks, in_place=options.in_place)
    elif options.only != "filelock":
        print("ltp        not run: Debian has no package of it; give --ltp DIR, a checkout of its repository")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
