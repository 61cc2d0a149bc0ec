"""Many processes with `snapshot_download` at once: `ARGV: REPO PROCESSES CALLS CACHE_DIR…`.

The library is imported once and the processes are forked from there, so that they start together even on two cores.
Process number i uses cache directory i modulo their number.  Prints how many processes failed; exit status 0 if none.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback


def main() -> int:
    repo, processes, calls = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    caches = sys.argv[4:]
    hub = importlib.import_module("huggingface_hub")
    snapshot_download = hub.snapshot_download
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(calls):
                    snapshot_download(repo, cache_dir=caches[number % len(caches)], max_workers=2)
            except BaseException:  # noqa: BLE001 - a forked child must not run on into its parent's code
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    print(failed)
    return 1 if failed else 0


sys.exit(main())
