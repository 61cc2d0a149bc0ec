"""The thread that closes descriptors (safefs/fuse/closer.c).

It would stay for the other tests of this process, so each test has a process of its own.
"""

from __future__ import annotations

import subprocess
import sys

# A close(2) that hangs: of a connection whose peer does not take what was sent, for `seconds`.
PROLOGUE = """
import os, socket, struct, time
from safefs.native import native

def hanging(seconds):
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peers.append(server.accept()[0])
    client.setblocking(False)
    try:
        while True:
            client.send(bytes(1 << 20))
    except BlockingIOError:
        pass
    client.setblocking(True)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    return client.detach()

def is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")

def timed(function, *arguments):
    begin = time.monotonic()
    function(*arguments)
    return time.monotonic() - begin

peers = []
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", PROLOGUE + code], check=True, timeout=60)


def test_nobody_waits_for_a_close_that_hangs() -> None:
    run("""
assert timed(os.close, hanging(1)) > 0.9  # without it
native.closer_start(100)
slow, quick = hanging(2), os.dup(0)
assert timed(native.close_later, slow) < 0.5
assert timed(native.close_later, quick) < 0.5
assert is_open(quick) and native.closer_waiting() == 2
assert not native.closer_wait(0.1)
assert native.closer_wait(30) and native.closer_waiting() == 0
assert not is_open(slow) and not is_open(quick)
""")


def test_what_is_too_much_for_it_is_closed_at_once() -> None:
    run("""
native.closer_start(3)
waiting = [hanging(2), os.dup(0), os.dup(0)]
for fd in waiting:
    native.close_later(fd)
more = os.dup(0)
native.close_later(more)
# The kernel takes a number away before it closes what is behind it: of the first one nothing can be said.
assert not is_open(more) and all(map(is_open, waiting[1:])) and native.closer_waiting() == 3
assert native.closer_wait(30) and not any(map(is_open, waiting))
""")


def test_without_it_descriptors_are_closed_at_once() -> None:
    run("""
fd = os.dup(0)
native.close_later(fd)
assert not is_open(fd)
assert native.closer_wait(0)
""")


def test_every_descriptor_is_closed_once() -> None:
    """A ring that is gone round many times, full again and again."""
    run("""
native.closer_start(7)
before = len(os.listdir("/proc/self/fd"))
for _ in range(5000):
    fd = os.dup(0)
    native.close_later(fd)
keep = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
assert native.closer_wait(30)
assert all(map(is_open, keep)) and len(os.listdir("/proc/self/fd")) == before + 50
""")
