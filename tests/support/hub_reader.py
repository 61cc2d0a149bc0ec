"""A reader of a shared cache in a tight loop, as a thousand ranks of a training job are.

`ARGV: REPOSITORY_DIR`, standard input: one line of JSON, `{commit sha: sha256 of its config.json}`.  Reads refs/main
and each commit's config.json until standard input ends, and prints a JSON object: how many reads, and what was bad.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
from collections import Counter
from pathlib import Path


def read(path: Path) -> bytes | None:
    """The content, or None where the name does not exist."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        content = b""
        while block := os.read(descriptor, 65536):
            content += block
        return content
    finally:
        os.close(descriptor)


def main() -> None:
    repository = Path(sys.argv[1])
    configs: dict[str, str] = json.loads(sys.stdin.readline())
    counts: Counter[str] = Counter(ref_reads=0, config_reads=0)
    samples: list[str] = []
    seen: set[Path] = set()

    def bad(kind: str, sample: str) -> None:
        counts[kind] += 1
        if len(samples) < 10:
            samples.append(f"{kind}: {sample}")

    def look(path: Path, kind: str) -> bytes | None:
        try:
            content = read(path)
        except OSError as error:
            bad(f"{kind}_error", f"{path}: {error}")
            return None
        if content is None:
            if path in seen:
                bad(f"{kind}_vanished", str(path))
            return None
        seen.add(path)
        counts[f"{kind}_reads"] += 1
        return content

    while not select.select([sys.stdin], [], [], 0)[0]:
        # refs/main is where the window is narrow: look there most.
        for _ in range(20):
            content = look(repository / "refs" / "main", "ref")
            if content is not None and content.decode() not in configs:
                bad("ref_empty" if not content else "ref_wrong", repr(content[:60]))
        for sha, digest in configs.items():
            content = look(repository / "snapshots" / sha / "config.json", "config")
            if content is None:
                continue
            if hashlib.sha256(content).hexdigest() != digest:
                bad("config_wrong", f"{len(content)} bytes: {content[:60]!r}")
            else:
                json.loads(content)
    print(json.dumps({"counts": counts, "samples": samples}))


main()
