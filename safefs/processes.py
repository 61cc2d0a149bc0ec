"""What the daemon can see of client processes, in /proc.  Every function blocks: call them in a worker thread.

Some files of /proc are off limits.  While a client waits for a FLUSH that its execve sent (close-on-exec), reading
/proc/PID/{stat,maps,exe,fd/N,…} of it waits for that very FLUSH: daemon, `ps` and machine would hang for good.
`status`, `fdinfo`, listings of directories and `children` are safe.  `stat`, which alone tells how a process ended, is
read only of a thread without `VmSize`, which is exiting and can no longer be in execve.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator

from safefs.model import Closer, Process
from safefs.native import native

PF_SIGNALED = 0x400  # include/linux/sched.h
PROC_BYTES = 1 << 16
MAX_DEPTH = 128
MAX_DESCENDANTS = 4096


def _read(path: str) -> str | None:
    """A whole file of /proc, without the costs of a file object: it is done for every open and close."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        parts = []
        while part := os.read(fd, PROC_BYTES):
            parts.append(part)
        return b"".join(parts).decode("utf-8", "replace")
    except OSError:
        return None
    finally:
        os.close(fd)


def _field(status: str, name: str) -> int:
    """The first number of a line of /proc/PID/status, 0 when there is none."""
    _, found, rest = status.partition(f"\n{name}:")
    return int(rest.split(None, 1)[0]) if found else 0


def identify(tid: int) -> Process | None:
    """The process of a thread; None when it is gone or cannot be seen (another pid namespace)."""
    status = _read(f"/proc/{tid}/status") if tid > 0 else None
    if status is None:
        return None
    command = status.partition("\n")[0].removeprefix("Name:\t")
    return Process(_field(status, "Tgid"), _field(status, "NSsid"), command, _groups(status))


def groups(tid: int) -> tuple[int, ...]:
    """Supplementary groups of a thread; none when it is gone."""
    status = _read(f"/proc/{tid}/status") if tid > 0 else None
    return () if status is None else _groups(status)


def _groups(status: str) -> tuple[int, ...]:
    _, _, rest = status.partition("\nGroups:")
    return tuple(map(int, rest.partition("\n")[0].split()))


def ancestry(tid: int, until: int = 0) -> list[int]:
    """Thread group ids of the thread's process, its parent, and so on up; no further than `until`."""
    chain: list[int] = []
    while tid > 0 and len(chain) < MAX_DEPTH:
        status = _read(f"/proc/{tid}/status")
        if status is None:
            break
        chain.append(_field(status, "Tgid"))
        tid = _field(status, "PPid") if chain[-1] != until else 0
    return chain


def closer_of(tid: int, *, guesses: bool = True) -> tuple[int, Closer]:
    """Thread group id of a thread that sent FLUSH, and whether it lives, exits or was killed.

    Without the right to trace the process exit_code reads 0, and PF_SIGNALED is also set when threads of a process that
    exits by itself are ended.  Where the truth is hidden so, a thread that may have been killed counts as that: what is
    unsure is not published.  Not `guesses`: then it is unknown.
    """
    status = _read(f"/proc/{tid}/status") if tid > 0 else None
    if status is None:
        return 0, Closer.UNKNOWN
    tgid = _field(status, "Tgid")
    if "\nVmSize:" in status:
        return tgid, Closer.ALIVE
    stat = _read(f"/proc/{tid}/stat")
    if stat is None:
        return tgid, Closer.UNKNOWN
    fields = stat[stat.rindex(")") + 2 :].split()
    flags, exit_code = int(fields[6]), int(fields[49])
    if exit_code & 0x7F:
        return tgid, Closer.KILLED
    if exit_code == 0 and flags & PF_SIGNALED and not _exit_code_visible(tid):
        return tgid, Closer.KILLED if guesses else Closer.UNKNOWN
    return tgid, Closer.EXITED


# In the place of a thread's CPU time: its process ends, which is when its files are released; or it has left the call.
ENDING, LEFT = 0, -1


def time_while_closing(tid: int, may_flush: bool) -> int:
    """CPU time (ns) of a thread whose FLUSH was answered; LEFT when it is not in the call that closes any more.

    The kernel lets go of a closed file when that call ends, of all files of an ending process together at its end
    (fs/file_table.c, fput), and a thread that does not wait for a FLUSH does not sleep until then; `may_flush`: it has
    just sent others, so perhaps it waits for one.  A thread that runs, or waits so, may be in the call or behind it;
    how long it has run tells, since the rest of the call takes it microseconds.
    """
    status = _read(f"/proc/{tid}/status")
    if status is None:
        return LEFT
    state = status.partition("\nState:\t")[2][:1]
    if "\nVmSize:" not in status:
        return LEFT if state in "ZX" else ENDING
    if state != "R" and not may_flush:
        return LEFT
    times = _read(f"/proc/{tid}/schedstat")
    return int(times.split()[0]) if times else time.monotonic_ns()  # without CONFIG_SCHED_INFO


def _exit_code_visible(tid: int) -> bool:
    return _read(f"/proc/{tid}/syscall") is not None


def holds_writable(tgid: int, ino: int, device: str) -> bool:
    """Whether the process has a writable descriptor on the file with this st_ino on this filesystem (major:minor).

    /proc/PID/fdinfo names the mount of a descriptor, not its filesystem.  A mount that is not in the daemon's own list
    may be ours in another mount namespace (a container), so it counts; the only harm is a publish that comes later.
    """
    return any(mounted_device(mount) in (device, None) for mount in native.writable_mounts(tgid, ino))


def maps_writable(tgid: int, ino: int) -> bool | None:
    """Whether the process has a shared, writable mapping of a file with this st_ino; None when that cannot be seen.

    /proc/PID/maps waits for the FLUSH of a process in execve: only in a thread that may be given up, with a deadline.
    """
    text = _read(f"/proc/{tgid}/maps")
    if text is None:
        return None
    found = (line.split(None, 5) for line in text.splitlines())
    return any(fields[4] == str(ino) and fields[1][1] == "w" and fields[1][3] == "s" for fields in found)


def mounted_device(mount_id: int) -> str | None:
    """The filesystem (major:minor) of a mount; None when it is not in this mount namespace."""
    for line in (_read("/proc/self/mountinfo") or "").splitlines():
        fields = line.split(" ", 3)
        if int(fields[0]) == mount_id:
            return fields[2]
    return None


def descendants(tgid: int) -> Iterator[int]:
    """Thread group ids of all living descendants that are still linked to the process."""
    waiting, count = [tgid], 0
    while waiting and count < MAX_DESCENDANTS:
        parent = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for thread in threads:
            for child in (_read(f"/proc/{parent}/task/{thread}/children") or "").split():
                count += 1
                waiting.append(int(child))
                yield int(child)


def descendant_holds(tgid: int, ino: int, device: str) -> bool:
    """Whether a descendant has a writable descriptor on the file.

    A close-on-exec descriptor counts as well: a forked worker keeps it.  In a child that is on its way through execve
    it is gone some milliseconds later, so a positive answer is worth a second look.
    """
    return any(holds_writable(child, ino, device) for child in descendants(tgid))


def is_alive(pidfd: int) -> bool:
    """Whether the process behind a pidfd has not ended (a pidfd becomes readable when it does)."""
    if pidfd < 0:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def is_reaped(pidfd: int) -> bool:
    """Whether nothing is left of the process behind a pidfd, not even a zombie."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def open_pidfd(tgid: int) -> int:
    """A descriptor of the process, so that a later one with its number is not taken for it; -1 when it is gone."""
    try:
        return os.pidfd_open(tgid)
    except OSError:
        return -1


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when it is gone.  Only for daemons, never for clients."""
    stat = _read(f"/proc/{pid}/stat")
    return int(stat[stat.rindex(")") + 2 :].split()[19]) if stat else 0
