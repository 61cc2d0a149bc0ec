"""What the open handles of a node agree on (safefs/fuse/opens.c)."""

from __future__ import annotations

import errno
import os

import pytest

from safefs.native import native

NODE, OTHER = 1 << 40, (1 << 40) + 4096  # in one chain of the table


def test_the_first_handle_decides() -> None:
    assert native.opens_agreed(NODE) is None
    assert native.opens_join(NODE, 0) == 0
    assert native.opens_join(NODE, 7) == 0  # too late: 7 is given back
    assert native.opens_agreed(NODE) == 0
    native.opens_leave(NODE)
    assert native.opens_agreed(NODE) == 0
    native.opens_leave(NODE)
    assert native.opens_agreed(NODE) is None


def test_a_backing_id_lives_until_the_last_handle() -> None:
    assert native.opens_join(NODE, 5) == 5
    assert native.opens_join(NODE, 0) == native.opens_join(NODE, 6) == 5
    for _ in range(3):
        assert native.opens_agreed(NODE) == 5
        native.opens_leave(NODE)
    assert native.opens_agreed(NODE) is None


def test_nodes_of_one_chain_are_told_apart() -> None:
    assert native.opens_join(NODE, 5) == 5
    assert native.opens_agreed(OTHER) is None
    assert native.opens_join(OTHER, 0) == 0
    assert native.opens_agreed(NODE) == 5
    native.opens_leave(NODE)
    assert (native.opens_agreed(NODE), native.opens_agreed(OTHER)) == (None, 0)
    native.opens_leave(OTHER)
    native.opens_leave(OTHER)  # once too often: nothing happens
    assert native.opens_agreed(OTHER) is None


def test_without_a_connection_nothing_is_registered() -> None:
    with open(os.devnull, "rb") as file, pytest.raises(OSError) as caught:
        native.backing_register(file.fileno())
    assert caught.value.errno == errno.EOPNOTSUPP


def test_what_is_known_of_a_draft_goes_with_its_last_handle() -> None:
    native.opens_set_bare(NODE, True)  # nobody has it open: nothing happens
    assert native.opens_agreed(NODE) is None
