"""As whom threads act (safefs/identity.py).  The tests run as root."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from safefs.identity import DAEMON, SERVICE, Identities, owner_of, root_or, user
from safefs.model import Caller

ONE, TWO, GROUP = 61001, 61002, 61003
FIRST, SECOND = Caller(ONE, ONE, groups=()), Caller(TWO, TWO, groups=(GROUP,))


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[Path]:
    """A directory that only root may read, in one that everybody can enter."""
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(above.stat().st_mode | 0o111)
    path = tmp_path / "roots"
    path.mkdir(mode=0o700)
    yield path
    assert (os.geteuid(), os.listdir(path)) == (0, []), "this thread is root again"


def whoami() -> tuple[int, int, tuple[int, ...]]:
    with open("/proc/thread-self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    uid, gid = (int(fields[name].split()[3]) for name in ("Uid", "Gid"))
    return uid, gid, tuple(map(int, fields["Groups"].split()))


def test_calls_within_calls(roots: Path) -> None:
    identities = Identities(impersonate=True, service=FIRST)
    assert identities.call(SERVICE, whoami) == (ONE, ONE, ())
    assert identities.call(DAEMON, whoami)[:2] == (0, 0)

    def nested() -> list[int]:
        seen = [whoami(), identities.call(SECOND, whoami), identities.call(DAEMON, whoami), whoami()]
        return [uid for uid, _, _ in seen]

    assert identities.call(SERVICE, nested) == [ONE, TWO, 0, ONE]
    assert identities.call(SECOND, whoami) == (TWO, TWO, (GROUP,))
    with pytest.raises(PermissionError):
        identities.call(SERVICE, os.listdir, roots)


def test_without_a_service_user_it_is_root() -> None:
    identities = Identities(impersonate=True)
    assert identities.call(SERVICE, whoami)[0] == identities.service_uid == 0
    assert identities.call(Caller(0, 0), whoami)[0] == 0


def test_a_client_of_roots_is_not_the_service_user() -> None:
    """They are equal, and told apart by which object they are."""
    identities = Identities(impersonate=True, service=FIRST)
    client = Caller(0, 0)
    assert client == SERVICE and identities.call(client, whoami)[0] == 0


def test_a_users_daemon_is_always_its_user() -> None:
    identities = Identities(impersonate=False)
    for caller in (FIRST, SERVICE, DAEMON):
        assert identities.call(caller, whoami)[0] == 0
        with identities.acting(caller):
            assert whoami()[0] == 0


def test_acting(roots: Path) -> None:
    identities = Identities(impersonate=True, service=FIRST)
    with identities.acting(SERVICE):
        assert whoami()[0] == ONE
        with pytest.raises(PermissionError), identities.acting(SECOND):
            os.listdir(roots)
        assert whoami()[0] == ONE
    assert whoami()[0] == 0


def test_other_threads_are_not_touched() -> None:
    identities, seen = Identities(impersonate=True), []
    with identities.acting(FIRST):
        thread = threading.Thread(target=lambda: seen.append(identities.call(SECOND, whoami)[0]))
        thread.start()
        thread.join()
        assert whoami()[0] == ONE
    assert seen == [TWO]


def test_the_first_who_is_not_refused() -> None:
    identities, asked = Identities(impersonate=True), []

    def only_two(number: int) -> int:
        asked.append(whoami()[0])
        if asked[-1] != TWO:
            raise OSError(number, os.strerror(number))
        return len(asked)

    for number in (errno.EACCES, errno.EPERM):
        asked.clear()
        assert identities.call_first(root_or((DAEMON, FIRST, FIRST, SECOND, FIRST), ()), only_two, number) == 3
        assert asked == [0, ONE, TWO]
    asked.clear()
    with pytest.raises(OSError, match="No space"):
        identities.call_first((FIRST, SECOND), only_two, errno.ENOSPC)
    assert asked == [ONE]


def test_who_is_refused_last_is_told_what_the_first_was() -> None:
    errors = iter((errno.EPERM, errno.EACCES))

    def refuse() -> None:
        raise OSError(next(errors), "")

    with pytest.raises(OSError) as caught:
        Identities(impersonate=True).call_first((FIRST, SECOND), refuse)
    assert caught.value.errno == errno.EPERM


def test_owners(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.chown(path, ONE, GROUP)
    fd = os.open(path, os.O_PATH)
    assert owner_of(fd) == Caller(ONE, GROUP, groups=())  # nobody whom the user database knows
    os.close(fd)
    assert user(65534, 65534).groups == tuple(os.getgrouplist("nobody", 65534))
