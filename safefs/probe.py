"""What a directory's filesystem does between two nodes, found out by doing it.

Run on two nodes at once (`--peer`), the two meet in the directory and take turns.  Run alone it says what the kernel
tells of the filesystem, and tries what lease files rest on between processes, which is all that one node can find out.

Everything that could hang runs in a child process that is given up after a while.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import pickle
import re
import secrets
import select
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safefs import verdict
from safefs.errors import SafefsError
from safefs.family import REFUSED, Mounted
from safefs.verdict import OFD_EXCLUDES, Client, Verdict

CALL_SECONDS = 10.0
MEET_SECONDS = 120.0
STEP_SECONDS = 90.0  # a client of NFS can go on missing a new file for half a minute
RACES_SECONDS, MOST_PACED_SECONDS = 60.0, 30.0
POLL_SECONDS = 0.02
BEAT_SECONDS = 0.1  # between the names of one who waits
QUIET_SECONDS = 10.0  # who waits and is not seen to change his name for so long is not there any more
RACES, PEER_RACES = 20, 100
MEETING = ".safefs-probe"
PLACE = re.compile("[0-9a-f]+-[0-9a-f]+")  # of two who have met there
OPEN = "open."  # before the errno of an open(2): a word is part of a file's name

NAMELESS = "it is FUSE and does not say which"
AGAIN = "run `safefs probe DIR --peer` on two nodes at once"

F_OFD_SETLK = 37
_WRITE_LOCK = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: whether it came out as locks need it (None: it only says something)."""

    what: str
    result: str
    good: bool | None = None


def bounded(function: Callable[..., T], *arguments: Any, seconds: float = CALL_SECONDS) -> T:
    """Call a function in a child process; OSError is passed on, TimeoutError (ETIMEDOUT) when it takes too long."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = _fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            try:
                answer: tuple[bool, Any] = True, function(*arguments)
            except OSError as error:
                answer = False, error.errno
            os.write(writing, pickle.dumps(answer))
            status = 0
        os._exit(status)
    os.close(writing)
    try:
        if not select.select([reading], [], [], seconds)[0]:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        worked, value = pickle.loads(os.read(reading, 1 << 16) or pickle.dumps((False, errno.EIO)))
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)  # a child that hangs in the filesystem ends when that lets it go
    if not worked:
        raise OSError(value, os.strerror(value))
    return value  # type: ignore[no-any-return]


def _fork() -> int:
    """As os.fork(); the child ends without a word where the terminal interrupts both."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------ one node


def rename_is_decided_once(directory: str) -> bool:
    """Whether of several processes that rename one file away, one does, time after time."""
    for race in range(RACES):
        source = f"{directory}/race{race}"
        _touch(source)
        pids = [_fork_rename(source, f"{source}.{number}") for number in range(3)]
        winners = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids)
        if winners != 1:
            return False
    return True


def _fork_rename(source: str, target: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.rename(source, target)
        except OSError:
            os._exit(1)
        os._exit(0)
    return pid


def directories_are_made_whole(directory: str) -> bool:
    """Whether a directory with something in it cannot be replaced by a rename, and comes with what is in it."""
    for name in ("one", "two"):
        os.mkdir(f"{directory}/{name}")
        _touch(f"{directory}/{name}/inside")
    try:
        os.rename(f"{directory}/one", f"{directory}/two")
    except OSError as error:
        return error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EACCES)
    return False


def why_lease_files(state: Path, mounted: Mounted, backing: Mounted) -> str:
    """Why lease files in the state directory keep two nodes from holding one lock, in words.

    SafefsError (EOPNOTSUPP) where they would not: what is not known to be one node's is tried, and a filesystem that
    fails, or does not answer in time, has no locks rather than locks of this node alone.
    """

    def refusal(reason: str, remedy: str = "") -> SafefsError:
        return SafefsError(
            f"locks cannot be kept in {state}: {reason}; {remedy}use -o locks=etcd://HOST:PORT, or -o locks=memory"
            " where no other node uses this directory",
            errno.EOPNOTSUPP,
        )

    if mounted.is_local and not backing.is_local:
        raise refusal(
            f"that is {mounted.kind}, where other nodes on the backing ({backing.kind or 'no known type'}) cannot look"
        )
    if mounted.is_local:
        return f"{mounted.kind} is a filesystem of one node, and each daemon counts as a node of its own"
    if mounted.kind in REFUSED:
        raise refusal(f"{mounted.kind}: {REFUSED[mounted.kind]}")
    said = ""
    if mounted.is_nameless:
        try:
            found = _raced(state, mounted)
        except LookupError as missing:
            command = verdict.probe_command(state.parent, state)
            raise refusal(f"{NAMELESS}, and {missing}", f"run `{command}` on two nodes at once, or ") from None
        if found.undecided:
            raise refusal(f"{NAMELESS}, and {found.text()} found that {found.undecided}")
        said = f", and {found.text()} found that {' and '.join(verdict.RACES)}"
    findings = probe_alone(state, mounted)
    bad = next((finding for finding in findings if finding.good is False), None)
    if bad is not None:
        raise refusal(f"{bad.what}: {bad.result}")
    tried = " and ".join(finding.what for finding in findings if finding.good)
    return f"tried on {mounted.kind or 'a filesystem that the kernel does not name'}: {tried}{said}"


def _raced(state: Path, mounted: Mounted) -> Verdict:
    """The verdict of two clients that raced for names; LookupError, in words, where there is none."""
    found = verdict.on_record(state, mounted, "two nodes can both take one name")
    if not found.two_clients:
        raise LookupError(f"{found.text()} {verdict.ONE_MOUNT}")
    return found


def probe_alone(directory: Path, mounted: Mounted) -> list[Finding]:
    """What can be said from here.  Raises SafefsError where nothing can be made in the directory."""
    kind = mounted.kind
    findings = [Finding("filesystem", kind, False if kind in REFUSED else None)]
    if kind in REFUSED:
        findings.append(Finding("known of it", REFUSED[kind], False))
    if mounted.is_nameless:
        findings.append(Finding("known of it", f"{NAMELESS}: what it does between two nodes, two have to find out"))
    with _scratch(directory) as scratch:
        checks = {
            "a rename has one winner": rename_is_decided_once,
            "a directory comes whole, and once": directories_are_made_whole,
        }
        for what, check in checks.items():
            findings.append(_tried(what, check, scratch))
    return findings


def _tried(what: str, check: Callable[[str], bool], directory: str) -> Finding:
    try:
        good = bounded(check, directory, seconds=3 * CALL_SECONDS)
    except OSError as error:
        return Finding(what, str(error.strerror), False)
    return Finding(what, "yes" if good else "no", good)


@contextmanager
def _scratch(directory: Path) -> Iterator[str]:
    path = directory / f"{MEETING}-{secrets.token_hex(4)}"
    try:
        try:
            bounded(os.mkdir, path)
        except OSError as error:
            reason = f"nothing can be made in {directory}: {error.strerror}"
            raise SafefsError(reason, error.errno or errno.EIO) from None
        yield os.fspath(path)
    finally:
        with suppress(OSError):
            bounded(shutil.rmtree, path)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def until(condition: Callable[[], bool], seconds: float, pause: float = POLL_SECONDS) -> bool:
    """Poll; False when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


# ----------------------------------------------------------------- two nodes


@dataclass(frozen=True)
class _Here:
    """What a probe that waits is known by: a name that goes on changing, with the one whom it has chosen.

    It is a directory's, since some clients send a file to the server only when it has been there for seconds (rclone).
    """

    name: str
    beat: int
    chosen: str

    @classmethod
    def parse(cls, entry: str) -> _Here | None:
        found = re.fullmatch(r"here-([0-9a-f]+)-(\d+)-([0-9a-f]*)", entry)
        return cls(found[1], int(found[2]), found[3]) if found else None

    def __str__(self) -> str:
        return f"here-{self.name}-{self.beat}-{self.chosen}"


class Meeting:
    """Two probes in one directory: they say things to each other by making files there.

    Two who have chosen each other go on in a place of their own, so they hear nothing that others have left.  Who is
    chosen has been seen to change, or has chosen this one, whose name is new.  What is not seen to change is a leftover
    and goes: of one who lives after all, no more goes than a name that it has already replaced, or is about to.
    """

    def __init__(self, directory: Path) -> None:
        self.hall = os.fspath(directory / MEETING)
        self.path = ""  # of the place of these two, once they have met
        self.first = False
        self._shown_since: int | None = None  # the beat of who is chosen, when he could see it first
        self._is_others = False  # to take away what is in the place
        self._me = _Here(secrets.token_hex(4), 0, "")
        self._changed: dict[str, tuple[int, float]] = {}  # others: the latest beat, and when it was seen to rise
        self._same: dict[str, tuple[int, float]] = {}  # entries of others: what is in it, and since when
        self._said = 0
        self._heard = 0

    def open(self) -> None:
        """Wait for the other; the one with the smaller name is the first.  SafefsError when nobody comes."""
        if not until(self._meet, MEET_SECONDS, BEAT_SECONDS):
            raise SafefsError(f"no other probe came to {self.hall} within {MEET_SECONDS:g} s: {AGAIN}", errno.ETIMEDOUT)
        self.first = self._me.name < self._me.chosen
        self.path = f"{self.hall}/{self._place()}"
        with suppress(FileExistsError):
            bounded(os.mkdir, self.path)

    def _place(self) -> str:
        return "-".join(sorted((self._me.name, self._me.chosen)))

    def _meet(self) -> bool:
        """Show that this one is here, and look who else is; whether two have chosen each other."""
        self._me = replace(self._me, beat=self._me.beat + 1)
        leftovers = [entry for entry in self._leftovers() if not entry.endswith(f"-{self._me.name}")]  # he waits for us
        try:
            others = self._note(bounded(self._look_around, leftovers))
        except FileNotFoundError:
            return False  # two who left have just removed the directory
        chosen = self._choose(others)
        if chosen != self._me.chosen:
            self._me, self._shown_since = replace(self._me, chosen=chosen), None
        elif chosen and self._shown_since is None:
            self._shown_since = others[chosen].beat
        elif chosen and others[chosen].chosen == self._me.name and others[chosen].beat > (self._shown_since or 0):
            # He has looked since he could see that this one has chosen him, and stays with it.
            self._me = replace(self._me, beat=self._me.beat + 1)
            bounded(os.mkdir, f"{self.hall}/{self._me}")  # for him to see the same
            return True
        return False

    def _look_around(self, leftovers: list[str]) -> dict[str, int]:
        """The entries of others, and a hash of what is in each."""
        with suppress(FileExistsError):
            os.mkdir(self.hall)  # again and again: those who leave remove it
        os.mkdir(f"{self.hall}/{self._me}")
        entries = set(self._look(self.hall))
        mine = {entry for entry in entries if self._is_mine(entry)}
        _remove_all(self.hall, [*(mine - {str(self._me)}), *leftovers])
        return {entry: self._inside(entry) for entry in entries - mine}

    def _is_mine(self, entry: str) -> bool:
        return entry.startswith((f"here-{self._me.name}-", f"look-{self._me.name}-"))

    def _inside(self, entry: str) -> int:
        return hash(frozenset(_listed(f"{self.hall}/{entry}")))

    def _note(self, entries: dict[str, int]) -> dict[str, _Here]:
        """Remember what has changed, by this node's clock alone; the probes that are, or were, here."""
        now = time.monotonic()
        same, self._same = self._same, {}
        for entry, inside in entries.items():
            before, since = same.get(entry, (inside, now))
            self._same[entry] = (inside, since if inside == before else now)
        others: dict[str, _Here] = {}
        for here in sorted(filter(None, map(_Here.parse, entries)), key=lambda here: here.beat):
            others[here.name] = here  # some go on seeing names that are gone: the latest counts
            beat, at = self._changed.get(here.name, (here.beat, -math.inf))
            self._changed[here.name] = (max(beat, here.beat), now if here.beat > beat else at)
        return others

    def _choose(self, others: dict[str, _Here]) -> str:
        """One who has chosen this one, or lives and has chosen nobody; whoever was chosen before, if that is one."""
        lately = time.monotonic() - QUIET_SECONDS
        choosing = sorted(name for name, here in others.items() if here.chosen == self._me.name)
        free = sorted(name for name, here in others.items() if not here.chosen and self._changed[name][1] > lately)
        candidates = [*choosing, *free]
        return self._me.chosen if self._me.chosen in candidates else next(iter(candidates), "")

    def _leftovers(self) -> list[str]:
        """Names of those who do not change them, and places in which nobody says anything any more."""
        now = time.monotonic()
        patience = {entry: STEP_SECONDS if PLACE.fullmatch(entry) else QUIET_SECONDS for entry in self._same}
        return [entry for entry, (_, since) in self._same.items() if now - since > patience[entry]]

    def _look(self, directory: str) -> list[str]:
        """What is there, as the server has it: a file that is made there has this client look anew."""
        look = f"{directory}/look-{self._me.name}-{secrets.token_hex(4)}"  # some go on seeing a name that is removed
        _touch(look)
        with suppress(OSError):
            os.unlink(look)
        return os.listdir(directory)

    def say(self, word: str = "") -> None:
        """Something that the other waits for; `word` is without a dash."""
        self._said += 1
        bounded(_touch, f"{self.path}/{'first' if self.first else 'second'}-{self._said}-{word}")

    def hear(self) -> str:
        """The other's next word; SafefsError when none comes."""
        self._heard += 1
        start = f"{'second' if self.first else 'first'}-{self._heard}-"
        words: list[str] = []

        def said() -> bool:
            entries = bounded(self._look, self.path)
            words[:] = [entry.removeprefix(start) for entry in entries if entry.startswith(start)]
            return bool(words)

        if not until(said, STEP_SECONDS):
            raise SafefsError(f"the other probe does not go on: {AGAIN}", errno.ETIMEDOUT)
        return words[0]

    def word_seconds(self) -> float:
        """Both wait for each other, and agree on how long the one who waited longer has waited."""
        start = time.monotonic()
        self.say()
        self.hear()
        waited = min(time.monotonic() - start, MOST_PACED_SECONDS / 2)
        self.say(f"{waited:.6f}")
        return max(waited, float(self.hear()))

    def part(self) -> None:
        """All is said: the second leaves last."""
        if self.first:
            self.say("done")
            self._is_others = True
        else:
            self.hear()

    def close(self) -> None:
        """Take away what these two have here, and what others have left; whoever goes on in it finds it gone."""
        with suppress(OSError):
            bounded(self._take_away)

    def _take_away(self) -> None:
        if self._me.chosen and not self._is_others:  # who was chosen may have gone there before
            place, gone = self._place(), f"gone-{self._me.name}"
            with suppress(OSError):  # at once, since the other may be making files in it: one is on its way yet
                os.rename(f"{self.hall}/{place}", f"{self.hall}/{gone}")
            _remove_all(self.hall, 3 * [place, gone])
        entries = _listed(self.hall)
        _remove_all(self.hall, [entry for entry in entries if self._is_mine(entry)])
        still = [entry for entry in self._leftovers() if entry in entries]
        _remove_all(self.hall, [entry for entry in still if self._same[entry][0] == self._inside(entry)])
        with suppress(OSError):
            os.rmdir(self.hall)


def _listed(path: str) -> list[str]:
    """What is in a directory; nothing where that is none, or gone."""
    try:
        return os.listdir(path)
    except OSError:
        return []


def _remove_all(directory: str, entries: Iterable[str]) -> None:
    """Files, and directories with what is in them; what cannot be removed stays."""
    for entry in entries:
        try:
            os.unlink(f"{directory}/{entry}")
        except OSError:
            shutil.rmtree(f"{directory}/{entry}", ignore_errors=True)


_LOCKS: dict[str, Callable[[int], object]] = {
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "fcntl": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "OFD": lambda fd: fcntl.fcntl(fd, F_OFD_SETLK, _WRITE_LOCK),
}


def probe_with_peer(directory: Path, mounted: Mounted) -> tuple[list[Finding], Verdict]:
    """Both nodes come to the same findings.  Raises SafefsError when the other does not come, or stops."""
    meeting = Meeting(directory)
    try:
        meeting.open()
        clients = _introduced(meeting, Client.here(mounted))
        findings = [_excludes(meeting, kind) for kind in _LOCKS]
        findings.append(_race(meeting, "O_EXCL", _touch))
        findings.append(_race(meeting, "rename", _rename_away))
        findings += [_new_file(meeting), _replaced_file(meeting)]
        meeting.part()
    except OSError as error:
        place = meeting.path or meeting.hall
        if meeting.path and error.errno in (errno.ENOENT, errno.ESTALE):
            raise SafefsError(f"the other probe has ended: {AGAIN}", errno.ECONNRESET) from None
        raise SafefsError(f"{place}: {error.strerror}", error.errno or errno.EIO) from None
    finally:
        meeting.close()
    excludes = any(finding.what == OFD_EXCLUDES and finding.good is True for finding in findings)
    results = {finding.what: finding.result for finding in findings}
    found = Verdict(time.time(), mounted.kind, clients, results, excludes)
    clients_text = "yes" if found.two_clients else "no: both came through one mount, which shows only what it does"
    findings.insert(0, Finding("two clients", clients_text))
    return findings, found


def record(state: Path, found: Verdict) -> Path:
    """Put what two nodes found out on record, for `-o locks=native`; where it is.  SafefsError when it cannot be."""
    try:
        return verdict.write(state, found)
    except OSError as error:
        raise SafefsError(f"nothing can be recorded in {state}: {error.strerror}", error.errno or errno.EIO) from None


def _introduced(meeting: Meeting, me: Client) -> tuple[Client, Client]:
    """Both clients, in the same order for both."""
    meeting.say(f"{me.id}.{me.host.encode().hex()}")
    number, _, host = meeting.hear().partition(".")
    other = Client(number, bytes.fromhex(host).decode())
    return (me, other) if meeting.first else (other, me)


def _excludes(meeting: Meeting, kind: str) -> Finding:
    """The first locks and the second is refused; the first lets go and the second gets it.

    Without the second half, who is refused whatever others do would count as kept out.
    """
    path = f"{meeting.path}/lock.{kind}"
    answer = _hold_and_free(meeting, kind, path) if meeting.first else _try_twice(meeting, kind, path)
    if answer.startswith(OPEN):
        return Finding(f"{kind} excludes", answer.replace(OPEN, "open: "))  # which says nothing of locks
    words = {
        "granted": "no: both got the lock",
        "excludes": "yes",
        "never": "no: it is refused also when nobody has the lock",
    }
    return Finding(f"{kind} excludes", words.get(answer, f"it fails with {answer}"), answer == "excludes")


def _hold_and_free(meeting: Meeting, kind: str, path: str) -> str:
    with _held(kind, path) as problem:
        meeting.say(problem or "held")
        answer = problem or meeting.hear()
    if answer == "refused":  # the last word of versions that did not try again
        raise _other_version()
    if answer != "out":
        return answer
    meeting.say("free")
    return meeting.hear()


def _try_twice(meeting: Meeting, kind: str, path: str) -> str:
    answer = meeting.hear()
    if answer != "held":
        return answer
    answer = _attempt(kind, path)
    meeting.say(answer)
    if answer != "out":
        return answer
    if meeting.hear() != "free":
        raise _other_version()
    tries: list[str] = []

    def is_answered() -> bool:
        tries.append(_attempt(kind, path))
        return tries[-1] != "out"

    until(is_answered, CALL_SECONDS, BEAT_SECONDS)  # some clients tell the server of an unlock later
    answer = {"granted": "excludes", "out": "never"}.get(tries[-1], tries[-1])
    meeting.say(answer)
    return answer


def _attempt(kind: str, path: str) -> str:
    """A try to lock, in a word: granted, kept out, or what else it failed with."""
    with _held(kind, path) as problem:
        return "out" if problem in ("EAGAIN", "EACCES") else problem or "granted"


def _other_version() -> SafefsError:
    reason = "the other probe is of another version of safefs, and tries locks otherwise: use one version on both nodes"
    return SafefsError(reason, errno.EPROTO)


@contextmanager
def _held(kind: str, path: str) -> Iterator[str]:
    """A lock, held by a child process; yields what went wrong where it cannot be had (`_lock`)."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = _fork()
    if pid == 0:
        os.write(writing, _lock(kind, path).encode() or b"held")
        time.sleep(STEP_SECONDS + CALL_SECONDS)
        os._exit(0)
    os.close(writing)
    try:
        ready = select.select([reading], [], [], CALL_SECONDS)[0]
        answer = os.read(reading, 100).decode() if ready else "ETIMEDOUT"
        yield "" if answer == "held" else answer
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # one that hangs in the filesystem ends when that lets it go
            until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, CALL_SECONDS)


def _lock(kind: str, path: str) -> str:
    """Lock for as long as this process lives; the name of the errno, after `OPEN` where the file cannot be opened.

    The two are told apart because both can be EACCES: the other node's user may have no right to the file (0600).
    """
    step = OPEN
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        step = ""
        _LOCKS[kind](fd)
    except OSError as error:
        return step + errno.errorcode.get(error.errno or 0, "EIO")
    return ""


def _rename_away(source: str) -> None:
    os.rename(f"{source}.source", f"{source}.{secrets.token_hex(4)}")


def _race(meeting: Meeting, what: str, attempt: Callable[[str], None]) -> Finding:
    """Both do the same to the same names, one after the other: how often one, both or none of them did it.

    First as fast as they can: they begin about at the same time, and as a rule losing takes less time than winning, so
    who is behind catches up.  Then towards each other, over twice the time that a word takes between them: so they meet
    at names that the other has made or taken too lately to be seen by a client that does not ask its server.
    """
    paths = [f"{meeting.path}/{what}.{race}" for race in range(PEER_RACES)]
    if meeting.first and attempt is _rename_away:
        bounded(_make_all, [f"{path}.source" for path in paths], seconds=RACES_SECONDS)
    pause = 2 * meeting.word_seconds() / (PEER_RACES // 2)
    half = PEER_RACES // 2
    later = list(enumerate(paths))[half:]
    won = bounded(_wins, attempt, list(enumerate(paths))[:half], 0.0, seconds=RACES_SECONDS)
    won |= bounded(_wins, attempt, later if meeting.first else later[::-1], pause, seconds=RACES_SECONDS)
    meeting.say(f"{won:x}")
    other = int(meeting.hear(), 16)
    both, none = (won & other).bit_count(), PEER_RACES - (won | other).bit_count()
    result = "yes" if both == none == 0 else f"of {PEER_RACES} races, both won {both} and nobody {none}"
    return Finding(f"{what} has one winner", result, both == 0)


def _make_all(paths: list[str]) -> None:
    for path in paths:
        _touch(path)


def _wins(attempt: Callable[[str], None], paths: list[tuple[int, str]], pause: float) -> int:
    """Which attempts succeeded, as bits."""
    won = 0
    for number, path in paths:
        with suppress(OSError):
            attempt(path)
            won |= 1 << number
        time.sleep(pause)
    return won


def _new_file(meeting: Meeting) -> Finding:
    """How long a node that has seen a name missing goes on missing it."""
    return _delay(meeting, "a new file is seen within", "new", None)


def _replaced_file(meeting: Meeting) -> Finding:
    """How long a node that has read a file goes on reading what another has renamed onto it."""
    return _delay(meeting, "a replaced file is seen within", "old", b"before")


def _delay(meeting: Meeting, what: str, name: str, before: bytes | None) -> Finding:
    """The first changes what the name shows, and hears when the second sees it, who does nothing but look."""
    path = Path(meeting.path, f"see.{name}")
    if meeting.first:
        if before is not None:
            path.write_bytes(before)
        meeting.say()
        meeting.hear()  # the other has looked
        fresh = path.with_name(f"fresh.{name}")
        fresh.write_bytes(b"after")
        start = time.monotonic()
        fresh.rename(path)
        seen = meeting.hear()
        result = f"{time.monotonic() - start:.3f} s" if seen == "seen" else f"more than {STEP_SECONDS / 2:g} s"
        meeting.say(result.replace(" ", "_"))
        return Finding(what, result)
    meeting.hear()
    _read(path)
    meeting.say()
    is_seen = until(lambda: _read(path) == b"after", STEP_SECONDS / 2)
    meeting.say("seen" if is_seen else "missed")
    return Finding(what, meeting.hear().replace("_", " "))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
