"""Eight processes that do everything at once to the same names, on two mounts of one directory.

SAFEFS_STRESS_SECONDS sets how long; the short default suits every commit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mounting import Mount
from tests.tools.processes import ending
from tests.tools.trees import STATE_DIRECTORY, differences, tree

CLIENT = Path(__file__).with_name("stress_client.py")
SECONDS = float(os.environ.get("SAFEFS_STRESS_SECONDS", "15"))
PROCESSES = 8


def stress(roots: list[Path], seconds: float) -> tuple[Counter[str], list[str]]:
    """Run the processes, spread over the roots; what they did, and what they saw that they should not have."""
    (roots[0] / "shared" / "deep").mkdir(parents=True)
    (roots[0] / "own").mkdir()
    counts: Counter[str] = Counter()
    problems: list[str] = []
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                ending(
                    subprocess.Popen(
                        [sys.executable, CLIENT, roots[number % len(roots)], str(number), str(seconds)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        text=True,
                        cwd="/",
                    )
                )
            )
            for number in range(PROCESSES)
        ]
        for process in processes:
            output = process.communicate(timeout=seconds + 120)[0]
            if process.returncode < 0:
                # Typically SIGBUS: a map of a file that somebody truncated.
                problems.append(f"a process died of {signal.Signals(-process.returncode).name}")
                continue
            assert process.returncode == 0, output
            report = json.loads(output)
            counts.update(report["counts"])
            problems += report["problems"]
    return counts, problems


def leftovers(backing: Path) -> list[str]:
    """Hidden temporaries that are still in the backing directory."""
    return [
        os.path.join(place, name)
        for place, directories, files in os.walk(backing)
        for name in directories + files
        if name.startswith(STATE_DIRECTORY) and not (Path(place) == backing and name == STATE_DIRECTORY)
    ]


def test_control_bare_directory_shows_torn_files(backing: Path) -> None:
    _, problems = stress([backing], 2)
    assert problems


@pytest.mark.timeout(int(SECONDS) + 240)
def test_stress_on_two_mounts(two_mounts: tuple[Mount, Mount], backing: Path) -> None:
    first, second = two_mounts
    counts, problems = stress([first.path, second.path], SECONDS)
    print(dict(counts))
    assert not problems, "\n".join(problems)
    # Everything was tried, and it succeeded at times.
    for operation in ("replace_in_place", "create_exclusively", "replace_by_rename", "replace_while_open", "rename"):
        assert counts[operation] > 0, counts
    for operation in ("rewrite_own", "map_own", "unlink", "link", "read", "maps checked"):
        assert counts[operation] > 0, counts
    time.sleep(1.1)  # what stat(2) may show of the other node's last changes (docs/semantics.md, "Validity")
    for mount in two_mounts:
        assert "\n".join(differences(tree(mount.path), tree(backing))) == ""
    for mount in two_mounts:
        mount.stop()
    assert not leftovers(backing)
