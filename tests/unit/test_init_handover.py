"""The correction of libfuse's answer to FUSE_INIT, on the bytes that go over the wire."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safefs.fuse import mount
from safefs.fuse.mount import Features, corrected_init

ALWAYS_ASKED = {
    "FUSE_ATOMIC_O_TRUNC": mount.FUSE_ATOMIC_O_TRUNC,
    "FUSE_PARALLEL_DIROPS": mount.FUSE_PARALLEL_DIROPS,
    "FUSE_HANDLE_KILLPRIV_V2": mount.FUSE_HANDLE_KILLPRIV_V2,
    "FUSE_DONT_MASK": mount.FUSE_DONT_MASK,
    "FUSE_POSIX_LOCKS": mount.FUSE_POSIX_LOCKS,
    "FUSE_FLOCK_LOCKS": mount.FUSE_FLOCK_LOCKS,
}
NEVER_ASKED = {
    "FUSE_WRITEBACK_CACHE": mount.FUSE_WRITEBACK_CACHE,
    "FUSE_HANDLE_KILLPRIV": mount.FUSE_HANDLE_KILLPRIV,
    "FUSE_DO_READDIRPLUS": mount.FUSE_DO_READDIRPLUS,
    "FUSE_READDIRPLUS_AUTO": mount.FUSE_READDIRPLUS_AUTO,
    "FUSE_SPLICE": mount.FUSE_SPLICE,
}
EVERYTHING = 0xFFFFFFFF
OTHER_FLAG = 1 << 0  # FUSE_ASYNC_READ: libfuse's own affair

flags32 = st.integers(0, EVERYTHING)
features = st.builds(Features, st.booleans(), st.booleans())


def init_request(flags: int, flags2: int | None = 0) -> bytes:
    """struct fuse_in_header and fuse_init_in (before 7.36 without flags2)."""
    body = struct.pack("<IIII", 7, 40, 1 << 17, flags)
    if flags2 is not None:
        body += struct.pack("<I11I", flags2, *[0] * 11)
    return struct.pack("<IIQQIIIHH", 40 + len(body), mount.FUSE_INIT, 2, 0, 0, 0, 0, 0, 0) + body


def init_reply(flags: int, flags2: int = 0) -> bytes:
    """struct fuse_out_header and fuse_init_out."""
    body = struct.pack("<IIIIHHIIHHII6I", 7, 40, 1 << 17, flags, 12, 9, 1 << 20, 1, 256, 0, flags2, 0, *[0] * 6)
    return struct.pack("<IiQ", 16 + len(body), 0, 2) + body


def parse(answer: bytes) -> dict[str, int]:
    names = (
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages "
        "map_alignment flags2 max_stack_depth"
    )
    return dict(zip(names.split(), struct.unpack_from("<IIIIHHIIHHII", answer, 16), strict=True))


@pytest.mark.parametrize("flag", ALWAYS_ASKED.values(), ids=ALWAYS_ASKED)
def test_what_safefs_needs_is_asked_for(flag: int) -> None:
    answer, flags, _ = corrected_init(init_request(EVERYTHING), init_reply(0), Features())
    assert parse(answer)["flags"] & flag == flag
    assert flags & flag == flag


@pytest.mark.parametrize("flag", ALWAYS_ASKED.values(), ids=ALWAYS_ASKED)
def test_what_the_kernel_does_not_offer_is_not_asked_for(flag: int) -> None:
    answer, flags, _ = corrected_init(init_request(EVERYTHING & ~flag), init_reply(0), Features())
    assert not parse(answer)["flags"] & flag
    assert not flags & flag


@pytest.mark.parametrize("flag", NEVER_ASKED.values(), ids=NEVER_ASKED)
def test_what_would_break_a_promise_is_cleared(flag: int) -> None:
    answer, flags, _ = corrected_init(init_request(EVERYTHING), init_reply(EVERYTHING), Features(True, True))
    assert not parse(answer)["flags"] & flag
    assert not flags & flag


def test_other_flags_of_libfuse_stay_as_they_are() -> None:
    for given_flags in (0, OTHER_FLAG):
        answer, _, _ = corrected_init(init_request(EVERYTHING), init_reply(given_flags), Features())
        assert parse(answer)["flags"] & OTHER_FLAG == given_flags


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("offered", [0, mount.FUSE_POSIX_ACL])
@pytest.mark.parametrize("by_libfuse", [False, True])
def test_acls_are_on_when_asked_for_and_offered(asked: bool, offered: int, by_libfuse: bool) -> None:
    reply = init_reply(offered if by_libfuse else 0)
    _, flags, _ = corrected_init(init_request(offered), reply, Features(posix_acl=asked))
    assert bool(flags & mount.FUSE_POSIX_ACL) == bool(asked and offered)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("offered", [False, True])
def test_passthrough_comes_with_a_stack_depth(asked: bool, offered: bool) -> None:
    flags2 = mount.FUSE2_PASSTHROUGH if offered else 0
    request = init_request(mount.FUSE_INIT_EXT, flags2)
    answer, _, got = corrected_init(request, init_reply(0), Features(passthrough=asked))
    assert bool(got & mount.FUSE2_PASSTHROUGH) == (asked and offered)
    assert parse(answer)["max_stack_depth"] == (mount.STACK_DEPTH if asked and offered else 0)


def test_extended_flags_need_a_kernel_that_knows_them() -> None:
    both = mount.FUSE2_PASSTHROUGH | mount.FUSE2_DIRECT_IO_ALLOW_MMAP
    _, flags, flags2 = corrected_init(init_request(0, both), init_reply(0), Features(passthrough=True))
    assert not flags & mount.FUSE_INIT_EXT
    assert flags2 == 0


def test_a_kernel_from_before_flags2_is_answered() -> None:
    answer, _, flags2 = corrected_init(init_request(EVERYTHING, None), init_reply(0), Features(passthrough=True))
    assert flags2 == 0
    assert parse(answer)["flags2"] == 0


def test_files_in_place_can_be_mapped() -> None:
    request = init_request(mount.FUSE_INIT_EXT, mount.FUSE2_DIRECT_IO_ALLOW_MMAP)
    _, flags, flags2 = corrected_init(request, init_reply(0), Features())
    assert flags & mount.FUSE_INIT_EXT
    assert flags2 == mount.FUSE2_DIRECT_IO_ALLOW_MMAP


@given(flags32, flags32, flags32, flags32, features)
def test_nothing_is_asked_that_the_kernel_does_not_offer(
    offered: int, offered2: int, replied: int, replied2: int, wanted: Features
) -> None:
    """Given that libfuse asked for nothing but what was offered."""
    replied2 = replied2 & offered2 if offered & mount.FUSE_INIT_EXT else 0
    reply = init_reply(replied & offered, replied2)
    answer, flags, flags2 = corrected_init(init_request(offered, offered2), reply, wanted)
    assert not flags & ~offered
    assert not flags2 & ~offered2
    fields = parse(answer)
    assert (fields["flags"], fields["flags2"]) == (flags, flags2)


@given(flags32, flags32, flags32, features)
def test_the_background_queue_never_fills_and_nothing_else_changes(
    offered: int, offered2: int, replied: int, wanted: Features
) -> None:
    reply = init_reply(replied)
    answer, _, _ = corrected_init(init_request(offered, offered2), reply, wanted)
    assert len(answer) == len(reply)
    assert answer[:16] == reply[:16]
    before, after = parse(reply), parse(answer)
    assert after["max_background"] == 65535
    assert 0 < after["congestion_threshold"] < after["max_background"]
    changeable = {"flags", "flags2", "max_background", "congestion_threshold", "max_stack_depth"}
    assert {name: value for name, value in before.items() if name not in changeable} == {
        name: value for name, value in after.items() if name not in changeable
    }
