"""What touches the backing filesystem, on a real directory."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safefs import backing
from safefs.backing import HIDDEN_PREFIX, Backing, identity_of
from safefs.identity import Identities
from safefs.model import Identity
from tests.support.underlays import rename_without_flags

HIDDEN = HIDDEN_PREFIX + b"0~r~1"
TEMPS = pytest.mark.parametrize("temp", ["auto", "hidden"])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opened."""
    with ExitStack() as closing:
        yield closing


@pytest.fixture
def keep(stack: ExitStack) -> Callable[[int], int]:
    """Close a descriptor at the end of the test."""

    def kept(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    return kept


@pytest.fixture
def directory(tmp_path: Path, keep: Callable[[int], int]) -> int:
    """An O_PATH descriptor of tmp_path, as nodes have them."""
    return keep(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY))


@pytest.fixture
def make_store(tmp_path: Path, stack: ExitStack) -> Callable[[str], Backing]:
    def make(temp: str = "auto") -> Backing:
        store = Backing(tmp_path, Identities(impersonate=False), max_threads=2, temp=temp)
        stack.callback(os.close, store.root_fd)
        return store

    return make


def fill(fd: int, data: bytes) -> int:
    assert os.pwrite(fd, data, 0) == len(data)
    return fd


# ------------------------------------------------------------------- temps


def test_a_nameless_temp_leaves_no_name(
    tmp_path: Path, directory: int, make_store: Callable[[str], Backing], keep: Callable[[int], int]
) -> None:
    store = make_store("auto")
    fd, name, status = store.make_temp(directory, 0o640, HIDDEN)
    keep(fd)
    assert store.uses_tmpfile
    assert name is None
    assert status.st_nlink == 0
    assert os.listdir(tmp_path) == []
    assert os.pread(fill(fd, b"x"), 1, 0) == b"x"


def test_a_hidden_temp_has_the_name_it_was_given(
    tmp_path: Path, directory: int, make_store: Callable[[str], Backing], keep: Callable[[int], int]
) -> None:
    store = make_store("hidden")
    fd, name, status = store.make_temp(directory, 0o600, HIDDEN)
    keep(fd)
    assert not store.uses_tmpfile
    assert name == HIDDEN
    assert os.listdir(os.fsencode(tmp_path)) == [HIDDEN]
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert os.pread(fill(fd, b"x"), 1, 0) == b"x"


def test_a_hidden_temp_never_takes_an_existing_file(
    tmp_path: Path, directory: int, make_store: Callable[[str], Backing]
) -> None:
    (tmp_path / os.fsdecode(HIDDEN)).write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        make_store("hidden").make_temp(directory, 0o600, HIDDEN)


def test_without_o_tmpfile_the_hidden_kind_is_used_from_then_on(
    directory: int,
    make_store: Callable[[str], Backing],
    keep: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, real_open = make_store("auto"), os.open

    def refusing(path: object, flags: int, *arguments: object, **options: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    fd, name, _ = store.make_temp(directory, 0o600, HIDDEN)
    keep(fd)
    assert name == HIDDEN
    assert not store.uses_tmpfile


class TwoFilesystems:
    """A directory of the backing is another filesystem; those named here have no O_TMPFILE."""

    def __init__(self, root: Path, refusing: set[str], patch: pytest.MonkeyPatch) -> None:
        (root / "other").mkdir()
        self.root = root
        self.refusing = refusing
        self.looks = 0
        self._other = (root / "other").stat().st_ino
        self._open, self._fstat = os.open, os.fstat
        patch.setattr(os, "open", self._opened)
        patch.setattr(os, "fstat", self._looked_at)

    def make(self, store: Backing, name: str) -> bytes | None:
        """A temp in the root ("") or in the other filesystem; its hidden name."""
        directory = self._open(self.root / name, os.O_PATH)
        try:
            fd, hidden, _ = store.make_temp(directory, 0o600, store.hidden_name(b"d"))
            os.close(fd)
        finally:
            os.close(directory)
        return hidden

    def identity(self, name: str) -> Identity:
        status = (self.root / name).stat()
        return Identity(status.st_dev + bool(name), status.st_ino)

    def _opened(self, path: Any, flags: int, *arguments: Any, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE and dir_fd is not None and self._name(dir_fd) in self.refusing:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return self._open(path, flags, *arguments, dir_fd=dir_fd)

    def _name(self, fd: int) -> str:
        path = os.readlink(f"/proc/self/fd/{fd}")
        return "other" if path.startswith(f"{self.root}/other") else ""

    def _looked_at(self, fd: int) -> os.stat_result:
        status = self._fstat(fd)
        self.looks += stat.S_ISDIR(status.st_mode)
        fields = list(status)
        fields[stat.ST_DEV] += bool(self._name(fd))
        return os.stat_result(fields)


@pytest.mark.parametrize("refused_first", [False, True])
@pytest.mark.parametrize("refusing", ["", "other"])
def test_each_filesystem_of_a_backing_has_its_own_kind_of_temps(
    tmp_path: Path,
    make_store: Callable[[str], Backing],
    monkeypatch: pytest.MonkeyPatch,
    refusing: str,
    refused_first: bool,
) -> None:
    """Whoever has heard that a filesystem needs no hidden names gets none, whatever happens on another meanwhile."""
    both, store = TwoFilesystems(tmp_path, {refusing}, monkeypatch), make_store("auto")
    working = "" if refusing else "other"
    for _ in range(2):
        for name in (refusing, working) if refused_first else (working, refusing):
            nameless = store.is_nameless(both.identity(name))
            hidden = both.make(store, name)
            assert hidden is None or not nameless
    assert both.make(store, refusing) is not None
    assert not store.is_nameless(both.identity(refusing))
    if refusing or not refused_first:  # a root without O_TMPFILE is taken for all, as long as no other has shown it
        assert both.make(store, working) is None
        assert store.is_nameless(both.identity(working))
    assert store.uses_tmpfile == bool(refusing)


@pytest.mark.parametrize("refusing", [set(), {"", "other"}], ids=["O_TMPFILE", "hidden"])
def test_a_backing_of_one_kind_is_not_asked_which_filesystem_a_temp_is_on(
    tmp_path: Path, make_store: Callable[[str], Backing], monkeypatch: pytest.MonkeyPatch, refusing: set[str]
) -> None:
    both, store = TwoFilesystems(tmp_path, refusing, monkeypatch), make_store("auto")
    both.make(store, "")
    both.looks = 0
    for _ in range(3):
        assert (both.make(store, "") is None) == (not refusing)
    assert both.looks == 0


def test_a_filesystem_that_refuses_o_tmpfile_in_places_has_hidden_names_from_then_on(
    tmp_path: Path, make_store: Callable[[str], Backing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As unions of several do: what is made next has to be on record."""
    both, store = TwoFilesystems(tmp_path, set(), monkeypatch), make_store("auto")
    assert both.make(store, "other") is None
    assert store.is_nameless(both.identity("other"))
    both.refusing.add("other")
    assert both.make(store, "other") is not None
    both.refusing.clear()
    assert not store.is_nameless(both.identity("other"))
    assert both.make(store, "other") is not None


@TEMPS
def test_a_removed_directory_takes_no_temp_and_changes_no_mind(
    tmp_path: Path, make_store: Callable[[str], Backing], keep: Callable[[int], int], temp: str
) -> None:
    store = make_store(temp)
    (tmp_path / "gone").mkdir()
    gone = keep(os.open(tmp_path / "gone", os.O_PATH))
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError):
        store.make_temp(gone, 0o600, HIDDEN)
    assert store.uses_tmpfile == (temp == "auto")


def test_hidden_names_are_hidden_and_never_repeat(make_store: Callable[[str], Backing]) -> None:
    store = make_store("auto")
    names = {store.hidden_name(b"d") for _ in range(100)}
    assert len(names) == 100
    assert all(backing.is_hidden(name) and store.node_id.encode() in name for name in names)
    assert not backing.is_hidden(b"name")
    assert not backing.is_hidden(b".safefs")


# ------------------------------------------------------------------- place


@pytest.fixture(params=["nameless", "hidden"])
def temp(
    request: pytest.FixtureRequest,
    directory: int,
    make_store: Callable[[str], Backing],
    keep: Callable[[int], int],
) -> tuple[int, bytes | None]:
    """A draft's inode with content, of either kind."""
    store = make_store("auto" if request.param == "nameless" else "hidden")
    fd, name, _ = store.make_temp(directory, 0o644, HIDDEN_PREFIX + b"0~d~1")
    fill(keep(fd), b"new")
    return fd, name


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_place_gives_a_free_name_the_drafts_inode(
    tmp_path: Path,
    directory: int,
    temp: tuple[int, bytes | None],
    keep: Callable[[int], int],
    replace: bool,
    elsewhere: bool,
) -> None:
    fd, temp_name = temp
    place = tmp_path / "sub" if elsewhere else tmp_path
    place.mkdir(exist_ok=True)
    target = keep(os.open(place, os.O_PATH))
    backing.place(fd, temp_name, directory, target, b"name", replace=replace, hidden=HIDDEN)
    assert (place / "name").read_bytes() == b"new"
    assert identity_of((place / "name").stat()) == identity_of(os.fstat(fd))
    assert (place / "name").stat().st_nlink == 1
    assert sorted(os.listdir(tmp_path)) == (["sub"] if elsewhere else ["name"])


def test_place_replaces_in_one_step(tmp_path: Path, directory: int, temp: tuple[int, bytes | None]) -> None:
    fd, temp_name = temp
    (tmp_path / "name").write_bytes(b"old")
    reader = (tmp_path / "name").open("rb")
    with reader:
        backing.place(fd, temp_name, directory, directory, b"name", replace=True, hidden=HIDDEN)
        assert reader.read() == b"old"
    assert (tmp_path / "name").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["name"]


def test_place_without_replacing_leaves_a_taken_name(
    tmp_path: Path, directory: int, temp: tuple[int, bytes | None]
) -> None:
    fd, temp_name = temp
    (tmp_path / "name").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        backing.place(fd, temp_name, directory, directory, b"name", replace=False, hidden=HIDDEN)
    assert (tmp_path / "name").read_bytes() == b"old"
    assert sorted(os.listdir(os.fsencode(tmp_path))) == sorted([b"name", *([temp_name] if temp_name else [])])
    assert os.pread(fd, 9, 0) == b"new"


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("taken", [False, True])
def test_place_is_forbidden_at_the_last_moment(
    tmp_path: Path, directory: int, temp: tuple[int, bytes | None], taken: bool, replace: bool
) -> None:
    """Neither the name nor a hidden one shows what was not to be placed."""
    fd, temp_name = temp
    if taken:
        (tmp_path / "name").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))

    def forbid() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        backing.place(fd, temp_name, directory, directory, b"name", replace=replace, hidden=HIDDEN, require=forbid)
    assert sorted(os.listdir(tmp_path)) == before
    assert not taken or (tmp_path / "name").read_bytes() == b"old"


def test_place_never_replaces_a_directory(tmp_path: Path, directory: int, temp: tuple[int, bytes | None]) -> None:
    fd, temp_name = temp
    (tmp_path / "name").mkdir()
    with pytest.raises(IsADirectoryError):
        backing.place(fd, temp_name, directory, directory, b"name", replace=True, hidden=HIDDEN)
    assert (tmp_path / "name").is_dir()
    assert not (tmp_path / os.fsdecode(HIDDEN)).exists()


def test_place_into_a_removed_directory_fails(
    tmp_path: Path, directory: int, temp: tuple[int, bytes | None], keep: Callable[[int], int]
) -> None:
    fd, temp_name = temp
    (tmp_path / "gone").mkdir()
    gone = keep(os.open(tmp_path / "gone", os.O_PATH))
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").mkdir()
    for replace in (False, True):
        with pytest.raises(FileNotFoundError):
            backing.place(fd, temp_name, directory, gone, b"name", replace=replace, hidden=HIDDEN)
    assert os.listdir(tmp_path / "gone") == []


def test_a_name_that_is_taken_at_the_last_moment_is_replaced(
    tmp_path: Path,
    directory: int,
    make_store: Callable[[str], Backing],
    keep: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fd, _, _ = make_store("auto").make_temp(directory, 0o644, HIDDEN)
    fill(keep(fd), b"new")
    (tmp_path / "name").write_bytes(b"came in between")
    monkeypatch.setattr(backing, "identity_at", lambda *_: None)
    backing.place(fd, None, directory, directory, b"name", replace=True, hidden=HIDDEN)
    assert (tmp_path / "name").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("taken", [None, "other", "same"])
def test_where_renameat2_cannot_keep_a_link_does(
    tmp_path: Path,
    directory: int,
    make_store: Callable[[str], Backing],
    keep: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
    taken: str | None,
) -> None:
    """As on NFS; `same` is the answer to a request that was repeated after it had worked."""
    fd, temp_name, _ = make_store("hidden").make_temp(directory, 0o644, HIDDEN)
    fill(keep(fd), b"new")
    if taken == "other":
        (tmp_path / "name").write_bytes(b"old")
    elif taken == "same":
        os.link(tmp_path / os.fsdecode(HIDDEN), tmp_path / "name")

    monkeypatch.setattr(backing, "rename", rename_without_flags)
    if taken == "other":
        with pytest.raises(FileExistsError):
            backing.place(fd, temp_name, directory, directory, b"name", replace=False, hidden=HIDDEN)
        assert (tmp_path / "name").read_bytes() == b"old"
        assert (tmp_path / os.fsdecode(HIDDEN)).exists()
    else:
        backing.place(fd, temp_name, directory, directory, b"name", replace=False, hidden=HIDDEN)
        assert (tmp_path / "name").read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["name"]


# --------------------------------------------------------------- take over


def test_take_over_renames_the_partial_file_and_writes_into_it(
    tmp_path: Path, directory: int, keep: Callable[[int], int]
) -> None:
    (tmp_path / "x.part").write_bytes(b"half")
    base = keep(os.open(tmp_path / "x.part", os.O_RDONLY))
    fd = backing.take_over(base, identity_of(os.fstat(base)), directory, b"x.part", HIDDEN)
    assert fd is not None
    os.pwrite(keep(fd), b" done", 4)
    assert os.listdir(os.fsencode(tmp_path)) == [HIDDEN]
    assert (tmp_path / os.fsdecode(HIDDEN)).read_bytes() == b"half done"


@pytest.mark.parametrize("replaced", [False, True])
def test_take_over_leaves_what_is_not_its_base(
    tmp_path: Path, directory: int, keep: Callable[[int], int], replaced: bool
) -> None:
    (tmp_path / "x.part").write_bytes(b"half")
    base = keep(os.open(tmp_path / "x.part", os.O_RDONLY))
    (tmp_path / "x.part").unlink()
    if replaced:
        (tmp_path / "x.part").write_bytes(b"another's")
    assert backing.take_over(base, identity_of(os.fstat(base)), directory, b"x.part", HIDDEN) is None
    assert os.listdir(tmp_path) == (["x.part"] if replaced else [])


@pytest.mark.parametrize("rename", [backing.rename, rename_without_flags])
@pytest.mark.parametrize("third", [None, b"a third's"])
def test_take_over_puts_back_a_file_that_came_between_look_and_rename(
    tmp_path: Path,
    directory: int,
    keep: Callable[[int], int],
    monkeypatch: pytest.MonkeyPatch,
    rename: Callable[..., None],
    third: bytes | None,
) -> None:
    """Unless yet another has come there while it was out of its place: he would have replaced it."""
    (tmp_path / "x.part").write_bytes(b"half")
    base = keep(os.open(tmp_path / "x.part", os.O_RDONLY))
    identity, real = identity_of(os.fstat(base)), backing.identity_at

    def look_and_be_overtaken(where: int, name: bytes) -> object:
        seen = real(where, name)
        if seen == identity:
            (tmp_path / "x.new").write_bytes(b"another's")
            (tmp_path / "x.new").rename(tmp_path / "x.part")
        elif name == HIDDEN and third is not None:
            (tmp_path / "x.part").write_bytes(third)
        return seen

    monkeypatch.setattr(backing, "rename", rename)
    monkeypatch.setattr(backing, "identity_at", look_and_be_overtaken)
    assert backing.take_over(base, identity, directory, b"x.part", HIDDEN) is None
    assert os.listdir(tmp_path) == ["x.part"]
    assert (tmp_path / "x.part").read_bytes() == (third or b"another's")


def test_of_two_that_take_a_file_over_one_has_it(
    tmp_path: Path, directory: int, keep: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is not told that there is no such file: he opens it with O_CREAT."""
    (tmp_path / "x.part").write_bytes(b"half")
    base = keep(os.open(tmp_path / "x.part", os.O_RDONLY))
    identity, real, taken = identity_of(os.fstat(base)), backing.identity_at, list[int | None]()

    def look_and_be_overtaken(where: int, name: bytes) -> object:
        seen = real(where, name)
        monkeypatch.setattr(backing, "identity_at", real)
        taken.append(backing.take_over(base, identity, directory, b"x.part", HIDDEN))
        return seen

    monkeypatch.setattr(backing, "identity_at", look_and_be_overtaken)
    assert backing.take_over(base, identity, directory, b"x.part", HIDDEN + b"2") is None
    (fd,) = taken
    assert fd is not None
    assert os.pread(keep(fd), 10, 0) == b"half"
    assert os.listdir(os.fsencode(tmp_path)) == [HIDDEN]


# ---------------------------------------------------------------- contents


def two_files(tmp_path: Path, keep: Callable[[int], int]) -> tuple[int, int]:
    flags = os.O_CREAT | os.O_RDWR | os.O_TRUNC
    return keep(os.open(tmp_path / "source", flags, 0o644)), keep(os.open(tmp_path / "target", flags, 0o600))


def test_a_copy_keeps_holes(tmp_path: Path, keep: Callable[[int], int]) -> None:
    source, target = two_files(tmp_path, keep)
    size = 64 << 20
    os.pwrite(source, b"in the middle", 32 << 20)
    os.ftruncate(source, size)
    backing.copy_contents(source, target)
    assert os.fstat(target).st_size == size
    assert os.fstat(target).st_blocks <= os.fstat(source).st_blocks + 16
    assert os.pread(target, 13, 32 << 20) == b"in the middle"
    assert os.pread(target, 4096, size - 4096) == bytes(4096)


def test_a_copy_of_an_empty_file_is_empty(tmp_path: Path, keep: Callable[[int], int]) -> None:
    source, target = two_files(tmp_path, keep)
    backing.copy_contents(source, target)
    assert os.fstat(target).st_size == 0


def test_a_copy_works_where_holes_cannot_be_asked_for(
    tmp_path: Path, keep: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = two_files(tmp_path, keep)
    data = os.urandom(backing.COPY_CHUNK_BYTES * 2 + 123)
    fill(source, data)

    def unsupported(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "lseek", unsupported)
    backing.copy_contents(source, target)
    assert os.pread(target, len(data) + 1, 0) == data


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    extents=st.lists(st.tuples(st.integers(0, 300_000), st.binary(min_size=1, max_size=50)), max_size=5),
    size=st.integers(0, 400_000),
)
def test_a_copy_is_the_same(tmp_path: Path, extents: list[tuple[int, bytes]], size: int) -> None:
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        source, target = two_files(tmp_path, keep)
        for offset, data in extents:
            os.pwrite(source, data, offset)
        os.ftruncate(source, size)
        backing.copy_contents(source, target)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_write_all_and_read_full(tmp_path: Path, keep: Callable[[int], int]) -> None:
    source, _ = two_files(tmp_path, keep)
    assert backing.write_all(source, b"abcdef", 2) == 6
    assert backing.read_full(source, 100, 0) == b"\0\0abcdef"
    assert backing.read_full(source, 3, 2) == b"abc"
    assert backing.read_full(source, 3, 100) == b""


def test_write_all_goes_on_after_short_writes_and_counts_before_an_error(
    tmp_path: Path, keep: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = two_files(tmp_path, keep)
    real, room = os.pwrite, 7

    def short(fd: int, data: bytes, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[: min(3, room - offset)], offset)

    monkeypatch.setattr(os, "pwrite", short)
    assert backing.write_all(source, b"abcdef", 0) == 6
    assert backing.write_all(source, b"abcdef", 4) == 3
    with pytest.raises(OSError, match="No space"):
        backing.write_all(source, b"abcdef", 7)


# -------------------------------------------------------------- attributes


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o4755, 0o2775, 0o000])
def test_a_draft_gets_its_bases_mode_owner_and_xattrs(tmp_path: Path, keep: Callable[[int], int], mode: int) -> None:
    source, target = two_files(tmp_path, keep)
    os.fchown(source, 12, 34)
    os.fchmod(source, mode)
    os.setxattr(source, "user.one", b"1")
    os.setxattr(source, "user.two", b"\0\xff")
    backing.copy_metadata(source, target)
    status = os.fstat(target)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 12, 34)
    assert {name: os.getxattr(target, name) for name in os.listxattr(target)} == {
        "user.one": b"1",
        "user.two": b"\0\xff",
    }


def test_a_draft_gets_its_bases_acl(tmp_path: Path, keep: Callable[[int], int]) -> None:
    source, target = two_files(tmp_path, keep)
    undefined = 0xFFFFFFFF
    entries = [(1, 6, undefined), (2, 4, 1234), (4, 4, undefined), (16, 4, undefined), (32, 0, undefined)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(source, "system.posix_acl_access", acl)
    backing.copy_metadata(source, target)
    assert os.getxattr(target, "system.posix_acl_access") == acl
    assert os.fstat(target).st_mode == os.fstat(source).st_mode


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o4755, 0o755), (0o2755, 0o755), (0o6755, 0o755), (0o2644, 0o2644), (0o1644, 0o1644), (0o644, 0o644)],
)
def test_a_write_takes_privileges_away(tmp_path: Path, keep: Callable[[int], int], before: int, after: int) -> None:
    source, _ = two_files(tmp_path, keep)
    os.fchmod(source, before)
    backing.strip_privileges(source)
    assert stat.S_IMODE(os.fstat(source).st_mode) == after


def test_change_attributes_changes_what_it_names(tmp_path: Path, keep: Callable[[int], int]) -> None:
    source, _ = two_files(tmp_path, keep)
    path_fd = keep(os.open(tmp_path / "source", os.O_PATH))
    os.utime(source, ns=(1_000_000_007, 2_000_000_009))
    backing.change_attributes(path_fd, backing.AttributeChange(mode=0o640, gid=34, mtime=(5, 6)))
    status = os.fstat(source)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 0, 34)
    assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_007, 5_000_000_006)


# ------------------------------------------------------------------- names


def test_find_opens_an_entry_itself(tmp_path: Path, directory: int, keep: Callable[[int], int]) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    fd, status = backing.find(directory, b"link")
    assert stat.S_ISLNK(status.st_mode)
    assert os.readlink(b"", dir_fd=keep(fd)) == b"nowhere"
    with pytest.raises(FileNotFoundError):
        backing.find(directory, b"missing")


def test_find_refreshed_finds_what_is_there_and_misses_what_is_not(
    tmp_path: Path, directory: int, keep: Callable[[int], int]
) -> None:
    (tmp_path / "name").write_bytes(b"x")
    fd, status = backing.find_refreshed(directory, b"name")
    assert identity_of(os.fstat(keep(fd))) == identity_of(status)
    with pytest.raises(FileNotFoundError):
        backing.find_refreshed(directory, b"missing")


def test_find_refreshed_does_not_believe_a_remembered_miss(
    tmp_path: Path, directory: int, keep: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "name").write_bytes(b"x")
    real, listed = os.open, False

    def remembering(path: object, flags: int, *arguments: object, **options: object) -> int:
        nonlocal listed
        listed = listed or path == b"."
        if path == b"name" and not listed:
            raise FileNotFoundError(errno.ENOENT, "remembered")
        return real(path, flags, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", remembering)
    fd, _ = backing.find_refreshed(directory, b"name")
    keep(fd)
    assert listed


def test_find_refreshed_in_a_removed_directory(tmp_path: Path, keep: Callable[[int], int]) -> None:
    (tmp_path / "gone").mkdir()
    gone = keep(os.open(tmp_path / "gone", os.O_PATH))
    (tmp_path / "gone").rmdir()
    assert backing.is_removed(gone)
    with pytest.raises(FileNotFoundError):
        backing.find_refreshed(gone, b"name")


def test_identity_at_says_which_inode(tmp_path: Path, directory: int) -> None:
    (tmp_path / "name").write_bytes(b"x")
    assert backing.identity_at(directory, b"name") == identity_of((tmp_path / "name").stat())
    assert backing.identity_at(directory, b"missing") is None


def test_hidden_entries_only_of_a_directory_that_has_no_others(tmp_path: Path, directory: int) -> None:
    assert backing.hidden_entries(directory) == []
    (tmp_path / os.fsdecode(HIDDEN)).touch()
    assert backing.hidden_entries(directory) == [HIDDEN]
    (tmp_path / "name").touch()
    assert backing.hidden_entries(directory) is None


def test_path_below_follows_renames(tmp_path: Path, directory: int, keep: Callable[[int], int]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    fd = keep(os.open(tmp_path / "a" / "b", os.O_PATH))
    root = os.fsencode(tmp_path)
    assert backing.path_below(root, directory) == b""
    assert backing.path_below(root, fd) == b"a/b"
    (tmp_path / "a").rename(tmp_path / "c")
    assert backing.path_below(root, fd) == b"c/b"
    with pytest.raises(FileNotFoundError):
        backing.path_below(root + b"/c/b/x", fd)
    with pytest.raises(FileNotFoundError):
        backing.path_below(root + b"/c/", directory)


# ----------------------------------------------------------------- READDIR


def parse(answer: bytes) -> list[tuple[bytes, int, int]]:
    """struct fuse_dirent: name, offset of the next, type."""
    entries, position = [], 0
    while position < len(answer):
        _, offset, length, kind = struct.unpack_from("=QqII", answer, position)
        entries.append((answer[position + 24 : position + 24 + length], offset, kind))
        position += 24 + (length + 7) // 8 * 8
    assert position == len(answer)
    return entries


def read_all(fd: int, size: int, state: bytes = b"") -> list[bytes]:
    """Every name, by as many READDIRs as it takes, each resuming where the one before ended."""
    names: list[bytes] = []
    offset = 0
    while True:
        answer = backing.read_directory(fd, offset, size, state)
        assert len(answer) <= size
        if not answer:
            return names
        entries = parse(answer)
        names += [name for name, _, _ in entries]
        offset = entries[-1][1]


@pytest.mark.parametrize("size", [64, 512, 1 << 16])
def test_a_directory_is_read_whole_whatever_the_buffer(
    tmp_path: Path, directory: int, keep: Callable[[int], int], size: int
) -> None:
    names = {b"file %d" % number for number in range(60)}
    for name in names:
        (tmp_path / os.fsdecode(name)).touch()
    seen = read_all(keep(backing.open_directory(directory)), size)
    assert sorted(name for name in seen if name not in (b".", b"..")) == sorted(names)


def test_reading_resumes_at_any_offset(tmp_path: Path, directory: int, keep: Callable[[int], int]) -> None:
    for number in range(20):
        (tmp_path / str(number)).touch()
    fd = keep(backing.open_directory(directory))
    entries = parse(backing.read_directory(fd, 0, 1 << 16, b""))
    for index, (_, offset, _) in enumerate(entries):
        rest = parse(backing.read_directory(fd, offset, 1 << 16, b""))
        assert rest == entries[index + 1 :]
    assert parse(backing.read_directory(fd, 0, 1 << 16, b"")) == entries


@pytest.mark.parametrize("size", [64, 1 << 16])
def test_hidden_names_and_the_state_directory_are_not_read(
    tmp_path: Path, directory: int, keep: Callable[[int], int], size: int
) -> None:
    for number in range(30):
        (tmp_path / f".safefs~0~d~{number}").touch()
    (tmp_path / ".safefs").mkdir()
    (tmp_path / "name").touch()
    (tmp_path / ".safefs-other").touch()
    fd = keep(backing.open_directory(directory))
    shown = {b".", b".."}
    assert set(read_all(fd, size, b".safefs")) - shown == {b"name", b".safefs-other"}
    assert set(read_all(fd, size)) - shown == {b"name", b".safefs-other", b".safefs"}


def test_entries_say_what_they_are(tmp_path: Path, directory: int, keep: Callable[[int], int]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    fd = keep(backing.open_directory(directory))
    kinds = {name: kind for name, _, kind in parse(backing.read_directory(fd, 0, 1 << 16, b""))}
    assert (kinds[b"file"], kinds[b"directory"], kinds[b"link"]) == (8, 4, 10)


def test_a_copy_without_the_right_to_a_reflink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server of NFS 4.2 refuses it, and the look for holes, to who was handed the descriptors."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "source").write_bytes(b"x" * 100_000)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "lseek", refuse)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb") as target:
        backing.copy_contents(source.fileno(), target.fileno())
    assert (tmp_path / "target").read_bytes() == b"x" * 100_000


def test_a_rename_that_nfs_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so in another way where the file that would be replaced is open: somebody else may have the right."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))

    monkeypatch.setattr(os, "rename", refuse)
    directory = os.open(tmp_path, os.O_PATH)
    with pytest.raises(PermissionError):
        backing.rename(directory, b"a", directory, b"b", 0)
    os.close(directory)
