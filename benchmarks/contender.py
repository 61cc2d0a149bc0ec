"""A program that takes and gives back one lock again and again: `python contender.py KIND TARGET SECONDS HOLD_SECONDS`.

Says "ready", waits for a line, and goes on for so many seconds; HOLD_SECONDS is how long it keeps the lock each time.
Then it prints a list of [asked, granted, released] in seconds of CLOCK_MONOTONIC, which all processes of a machine
share; `released` is taken before the unlock is asked for.

It is in Python for every kind of lock, so that the interpreter costs all of them the same, and a script of its own, so
that it starts with nothing but what its kind needs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

Take = Callable[[], Callable[[], None]]  # returns how to give back

ETCD_LEASE_SECONDS = 300


def flock(path: str) -> Take:
    """flock(2) of a file that stays open."""
    import fcntl

    file = open(path, "a+b")  # noqa: SIM115 - until the process ends

    def take() -> Callable[[], None]:
        fcntl.flock(file, fcntl.LOCK_EX)
        return lambda: fcntl.flock(file, fcntl.LOCK_UN)

    return take


def strict_soft(path: str) -> Take:
    """filelock's lock that rests on files alone, with its own settings."""
    from filelock import StrictSoftFileLock

    lock = StrictSoftFileLock(path)

    def take() -> Callable[[], None]:
        lock.acquire()
        release: Callable[[], None] = lock.release
        return release

    return take


def etcd(address: str) -> Take:
    """etcd's own lock service, through its JSON gateway, on a connection that stays."""
    import base64
    import http.client

    connection = http.client.HTTPConnection(address)

    def call(path: str, request: dict[str, str]) -> dict[str, str]:
        connection.request("POST", path, json.dumps(request).encode())
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise OSError(f"etcd answers {answer.status}: {body[:200]!r}")
        return dict(json.loads(body))

    name = base64.b64encode(b"benchmark").decode()
    lease = call("/v3/lease/grant", {"TTL": str(ETCD_LEASE_SECONDS)})["ID"]

    def take() -> Callable[[], None]:
        key = call("/v3/lock/lock", {"name": name, "lease": lease})["key"]
        return lambda: void(call("/v3/lock/unlock", {"key": key}))

    def void(_answer: object) -> None:
        return None

    return take


KINDS: dict[str, Callable[[str], Take]] = {"flock": flock, "strict-soft": strict_soft, "etcd": etcd}


def main(kind: str, target: str, seconds: float, hold_seconds: float) -> None:
    """Contend, and print what came of it."""
    take = KINDS[kind](target)
    print("ready", flush=True)
    sys.stdin.readline()
    holds, end = [], time.monotonic() + seconds
    while (asked := time.monotonic()) < end:
        give_back = take()
        granted = time.monotonic()
        if hold_seconds:
            time.sleep(hold_seconds)
        released = time.monotonic()
        give_back()
        holds.append((asked, granted, released))
    print(json.dumps(holds))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
