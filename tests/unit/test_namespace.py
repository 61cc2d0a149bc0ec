"""Nodeids, their descriptors and reference counts; and the tickets of redirected opens."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safefs.model import Identity
from safefs.namespace import ROOT_NODEID, TICKET_SECONDS, Namespace, Node, Tickets

FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755


def with_root(max_descriptors: int = 8) -> Namespace:
    namespace = Namespace(max_descriptors)
    root = namespace.create(Identity(1, 1), DIRECTORY, shown=True)
    root.lookups = 1
    namespace.attach(root, 1000)
    return namespace


def add(namespace: Namespace, ino: int, *, lookups: int = 1, shown: bool = True) -> Node:
    node = namespace.create(Identity(1, ino), FILE, shown=shown)
    node.lookups = lookups
    return node


# ------------------------------------------------------------------- nodes


def test_the_first_node_is_the_root_and_numbers_are_never_used_again() -> None:
    namespace = with_root()
    first = add(namespace, 2)
    namespace.forget(first.nodeid, 1)
    second = add(namespace, 2)
    assert next(iter(namespace)).nodeid == ROOT_NODEID
    assert second.nodeid > first.nodeid > ROOT_NODEID
    assert namespace.get(first.nodeid) is None


def test_a_shown_node_is_found_by_its_inode_a_draft_is_not() -> None:
    namespace = with_root()
    shown, draft = add(namespace, 2), add(namespace, 3, shown=False)
    assert namespace.find(Identity(1, 2)) is shown
    assert namespace.find(Identity(1, 3)) is None
    assert namespace.find(Identity(2, 2)) is None
    assert namespace.get(draft.nodeid) is draft
    assert len(namespace) == 3


def test_a_published_draft_is_shown_under_its_inode() -> None:
    namespace = with_root()
    draft = add(namespace, 3, shown=False)
    namespace.show(draft, Identity(1, 4))
    assert namespace.find(Identity(1, 4)) is draft
    assert draft.identity == Identity(1, 4)


def test_a_version_that_lookups_found_first_stays_the_one_that_is_shown() -> None:
    namespace = with_root()
    draft, found = add(namespace, 3, shown=False), add(namespace, 4)
    namespace.show(draft, Identity(1, 4))
    assert namespace.find(Identity(1, 4)) is found
    namespace.forget(draft.nodeid, 1)
    assert namespace.find(Identity(1, 4)) is found


def test_drafts_and_versions_are_of_the_file_that_they_were_made_from() -> None:
    """Also a version that is found before its draft has ended; and that never changes."""
    namespace = with_root()
    version, draft, new = add(namespace, 2), add(namespace, 3, shown=False), add(namespace, 4, shown=False)
    draft.origin = version.origin
    for each in (draft, new):
        namespace.note_private(each, each.identity)
    found = add(namespace, 3)
    again = add(namespace, 5, shown=False)
    again.origin = found.origin
    namespace.note_private(again, Identity(1, 5))
    namespace.note_private(again, Identity(1, 6))  # it is written to again after it was published
    assert [namespace.origin(each.nodeid) for each in (version, draft, found, again)] == 4 * [version.nodeid]
    assert namespace.origin(new.nodeid) == new.nodeid
    namespace.show(new, Identity(1, 2))  # what is there already is kept, and is another file
    assert namespace.find(Identity(1, 2)) is version and version.origin == version.nodeid
    assert add(namespace, 5).origin != version.origin and add(namespace, 6).origin == version.origin
    for each in (draft, new, again, draft):
        namespace.forget_private(each)
    assert namespace.origin(add(namespace, 4).nodeid) not in (new.nodeid, version.nodeid)  # the number was used again
    assert not namespace._origins and not namespace._privates


def test_two_drafts_have_one_inode_after_the_other() -> None:
    """Published, and taken over or freed, before the first draft has ended."""
    namespace = with_root()
    first, second = add(namespace, 3, shown=False), add(namespace, 4, shown=False)
    for each in (first, second):
        namespace.note_private(each, Identity(1, 9))
    namespace.forget_private(second)
    namespace.forget_private(first)
    for each in (first, second):
        namespace.note_private(each, Identity(1, 9))
    namespace.forget_private(first)
    assert add(namespace, 9).origin == second.nodeid


def test_a_hidden_node_is_not_found_but_still_there() -> None:
    namespace = with_root()
    node = add(namespace, 2)
    namespace.hide(node)
    assert namespace.find(Identity(1, 2)) is None
    assert namespace.get(node.nodeid) is node
    namespace.hide(node)


def test_hiding_an_old_node_leaves_the_new_one_of_that_number() -> None:
    namespace = with_root()
    old = add(namespace, 2)
    namespace.hide(old)
    new = add(namespace, 2)
    namespace.hide(old)
    assert namespace.find(Identity(1, 2)) is new


@pytest.mark.parametrize(
    ("mode", "regular", "directory"), [(FILE, True, False), (DIRECTORY, False, True), (stat.S_IFLNK, False, False)]
)
def test_what_kind_of_inode_it_is(mode: int, regular: bool, directory: bool) -> None:
    node = Node(2, Identity(1, 2), mode)
    assert (node.is_regular, node.is_directory) == (regular, directory)


# ------------------------------------------------------------------ counts


def test_forget_drops_a_node_with_its_last_reference() -> None:
    namespace = with_root()
    node = add(namespace, 2, lookups=3)
    namespace.attach(node, 7)
    assert namespace.forget(node.nodeid, 2) == []
    assert namespace.get(node.nodeid) is node
    assert namespace.forget(node.nodeid, 1) == [7]
    assert namespace.get(node.nodeid) is None
    assert namespace.find(Identity(1, 2)) is None
    assert namespace.forget(node.nodeid, 1) == []


def test_references_never_go_below_zero() -> None:
    namespace = with_root()
    node = add(namespace, 2, lookups=1)
    node.opens = 1
    assert namespace.forget(node.nodeid, 5) == []
    assert node.lookups == 0


def test_the_root_is_never_forgotten() -> None:
    namespace = with_root()
    assert namespace.forget(ROOT_NODEID, 99) == []
    root = namespace.get(ROOT_NODEID)
    assert root is not None
    root.lookups = 0
    assert namespace.drop_if_idle(root) == []
    assert namespace.get(ROOT_NODEID) is root


USES: dict[str, Callable[[Node, int], None]] = {
    "lookups": lambda node, value: setattr(node, "lookups", value),
    "opens": lambda node, value: setattr(node, "opens", value),
    "pins": lambda node, value: setattr(node, "pins", value),
    "draft": lambda node, value: setattr(node, "draft", object() if value else None),
}


@pytest.mark.parametrize("use", USES)
def test_a_node_in_use_is_kept_until_it_is_not(use: str) -> None:
    namespace = with_root()
    node = add(namespace, 2, lookups=0)
    namespace.attach(node, 7)
    USES[use](node, 1)
    assert not node.idle
    assert namespace.drop_if_idle(node) == []
    USES[use](node, 0)
    assert node.idle
    assert namespace.drop_if_idle(node) == [7]
    assert namespace.get(node.nodeid) is None


def test_dropping_a_node_twice_closes_its_descriptor_once() -> None:
    namespace = with_root()
    node = add(namespace, 2, lookups=0)
    namespace.attach(node, 7)
    assert namespace.drop_if_idle(node) == [7]
    assert namespace.drop_if_idle(node) == []


# ------------------------------------------------------------- descriptors


def test_the_budget_pushes_out_the_least_recently_used() -> None:
    namespace = with_root(max_descriptors=3)
    nodes = [add(namespace, ino) for ino in range(2, 5)]
    assert namespace.attach(nodes[0], 10) == []
    assert namespace.attach(nodes[1], 11) == []
    namespace.touch(nodes[0])
    assert namespace.attach(nodes[2], 12) == [11]
    assert [node.fd for node in nodes] == [10, -1, 12]
    assert namespace.open_descriptors == 3
    assert namespace.get(nodes[1].nodeid) is nodes[1]
    assert namespace.find(Identity(1, 3)) is nodes[1]


def test_touching_a_node_without_a_descriptor_does_nothing() -> None:
    namespace = with_root()
    node = add(namespace, 2)
    namespace.touch(node)
    assert namespace.open_descriptors == 1


def test_detach_gives_the_descriptor_back_once() -> None:
    namespace = with_root()
    node = add(namespace, 2)
    namespace.attach(node, 7)
    assert namespace.detach(node) == [7]
    assert namespace.detach(node) == []
    assert node.fd == -1


@pytest.mark.parametrize("use", ["opens", "pins", "draft"])
def test_a_descriptor_that_is_needed_is_never_pushed_out(use: str) -> None:
    namespace = with_root(max_descriptors=2)
    needed = add(namespace, 2)
    namespace.attach(needed, 10)
    USES[use](needed, 1)
    other = add(namespace, 3)
    closed = namespace.attach(other, 11)
    assert closed == [11]
    assert needed.fd == 10


def test_a_budget_full_of_needed_descriptors_is_exceeded() -> None:
    namespace = with_root(max_descriptors=2)
    for ino in range(2, 200):
        node = add(namespace, ino)
        node.pins = 1
        assert namespace.attach(node, ino) == []
    assert namespace.open_descriptors == 199


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(["", "opens", "pins", "draft"]), st.booleans()), max_size=40),
)
def test_eviction_only_takes_what_nobody_needs(budget: int, steps: list[tuple[str, bool]]) -> None:
    namespace = with_root(budget)
    numbers = itertools.count(10)
    alive: list[Node] = []
    for use, touching in steps:
        node = add(namespace, next(numbers))
        if use:
            USES[use](node, 1)
        if touching and alive:
            namespace.touch(alive[0])
        alive.append(node)
        before = {known.fd: known for known in namespace if known.fd >= 0}
        fd = next(numbers)
        closed = namespace.attach(node, fd)
        before[fd] = node
        for gone in closed:
            victim = before[gone]
            assert victim.fd == -1
            assert not (victim.pins or victim.opens or victim.draft or victim.nodeid == ROOT_NODEID)
        held = [known for known in namespace if known.fd >= 0]
        assert namespace.open_descriptors == len(held)
        evictable = [
            known for known in held if not (known.pins or known.opens or known.draft) and known.nodeid != ROOT_NODEID
        ]
        assert len(held) <= budget or not evictable


# ----------------------------------------------------------------- tickets


def test_a_ticket_is_seen_until_it_is_taken() -> None:
    tickets = Tickets()
    tickets.issue(5, 77, write=True, now=100.0)
    seen = tickets.peek(5, 100.0)
    assert seen is not None
    assert (seen.nodeid, seen.write, seen.walked, seen.draft) == (77, True, False, None)
    assert tickets.peek(6, 100.0) is None
    assert tickets.take(5) is seen
    assert tickets.take(5) is None
    assert len(tickets) == 0


def test_a_ticket_lasts_its_time_and_no_longer() -> None:
    tickets = Tickets()
    tickets.issue(5, 77, write=False, now=100.0)
    assert tickets.peek(5, 100.0 + TICKET_SECONDS - 0.001) is not None
    assert tickets.peek(5, 100.0 + TICKET_SECONDS) is None
    assert len(tickets) == 1  # what it reserved is given back by expire


def test_a_new_ticket_of_a_thread_replaces_its_old_one() -> None:
    tickets = Tickets()
    tickets.issue(5, 77, write=False, now=100.0)
    tickets.issue(5, 78, write=True, now=101.0)
    taken = tickets.take(5)
    assert taken is not None
    assert (taken.nodeid, taken.write) == (78, True)
    assert len(tickets) == 0


def test_expire_returns_the_overdue_and_keeps_the_rest() -> None:
    tickets = Tickets()
    tickets.issue(5, 77, write=True, now=100.0)
    tickets.issue(6, 78, write=True, now=101.0)
    assert tickets.expire(100.0 + TICKET_SECONDS - 0.001) == []
    assert [ticket.nodeid for ticket in tickets.expire(100.0 + TICKET_SECONDS)] == [77]
    assert tickets.peek(6, 101.5) is not None
    assert [ticket.nodeid for ticket in tickets.expire(1000.0)] == [78]
    assert len(tickets) == 0
