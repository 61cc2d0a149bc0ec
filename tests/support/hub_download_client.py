"""One `hf_hub_download`, run by the interpreter of a huggingface_hub venv: `ARGV: noflock|flock REPO FILE`.

`noflock` makes fcntl.flock succeed without a lock, which is what it does on Lustre mounted without -o flock and
between the nodes of some GPFS and NFS set-ups.  The library itself is left alone.
"""

from __future__ import annotations

import fcntl
import importlib
import sys


def main() -> None:
    mode, repo, name = sys.argv[1:]
    if mode == "noflock":
        fcntl.flock = lambda descriptor, operation: None
    hub = importlib.import_module("huggingface_hub")
    print(hub.hf_hub_download(repo, name))


main()
