"""By which name a thread found a file that has several."""

from __future__ import annotations

import pytest

from safefs.native import native

NODE, OTHER_NODE = 1 << 50, 1 + (1 << 50)
THREAD, SAME_SLOT = 7, 7 + 1024


def test_the_last_name_by_which_the_thread_found_it() -> None:
    native.note_walk(THREAD, NODE, 1, b"x")
    native.note_walk(THREAD, NODE, 2, b"y")
    native.note_walk(THREAD + 1, NODE, 1, b"x")
    assert native.last_walk(THREAD, NODE) == (2, b"y")
    assert native.last_walk(THREAD, OTHER_NODE) is None
    native.note_walk(SAME_SLOT, NODE, 1, b"x")
    assert native.last_walk(THREAD, NODE) is None


def test_nothing_is_known_of_who_has_no_number_here() -> None:
    native.note_walk(0, NODE, 1, b"x")
    assert native.last_walk(0, NODE) is None


def test_a_rename_of_that_name_and_of_another() -> None:
    native.note_walk(THREAD, NODE, 1, b"y")
    native.move_walks(NODE, 1, b"x", 1, b"z")
    native.move_walks(NODE, 2, b"y", 1, b"z")
    native.move_walks(OTHER_NODE, 1, b"y", 1, b"z")
    assert native.last_walk(THREAD, NODE) == (1, b"y")
    native.move_walks(NODE, 1, b"y", 2, b"w" * 255)
    assert native.last_walk(THREAD, NODE) == (2, b"w" * 255)
    with pytest.raises(ValueError, match="too long"):
        native.move_walks(NODE, 1, b"y", 2, b"w" * 256)
