"""The life of a draft: its transition table, who closes last, and the table that finds drafts by name."""

from __future__ import annotations

import itertools
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safefs.draft import (
    TRANSITIONS,
    Decision,
    Draft,
    DraftEvent,
    DraftState,
    DraftTable,
    FlushFacts,
    InvalidTransitionError,
    decide_flush,
)
from safefs.gate import Gate
from safefs.model import Caller, Closer, Identity
from safefs.namespace import Namespace, Node
from safefs.rules import NameClass

S, E = DraftState, DraftEvent
ALLOWED = [
    (S.WRITING, E.SEAL, S.PUBLISHING),
    (S.WRITING, E.REFUSED, S.QUARANTINED),
    (S.WRITING, E.CANCELLED, S.DISCARDED),
    (S.PUBLISHING, E.RENAMED, S.PUBLISHED),
    (S.PUBLISHING, E.REFUSED, S.QUARANTINED),
    (S.PUBLISHED, E.WRITTEN, S.WRITING),
    (S.PUBLISHED, E.CANCELLED, S.DISCARDED),
    (S.QUARANTINED, E.CANCELLED, S.DISCARDED),
]
REFUSED = [
    pair
    for pair in itertools.product(DraftState, DraftEvent)
    if pair not in {(old, event) for old, event, _ in ALLOWED}
]


def make_node(number: int, mode: int = stat.S_IFDIR | 0o755) -> Node:
    return Node(number, Identity(1, number), mode)


def make_draft(directory: Node, name: bytes = b"name", *, exclusive: bool = False) -> Draft:
    return Draft(
        write_id="0123456789abcdef",
        node=make_node(1000, stat.S_IFREG | 0o644),
        directory=directory,
        name=name,
        name_class=NameClass.PRIVATE,
        caller=Caller(0, 0),
        opener=None,
        pidfd=-1,
        fd=-1,
        temp_name=None,
        shown_ino=1000,
        gate=Gate(),
        exclusive=exclusive,
    )


@pytest.fixture
def directory() -> Node:
    return make_node(2)


# ------------------------------------------------------------- transitions


@pytest.mark.parametrize(("old", "event", "new"), ALLOWED)
def test_an_allowed_event_moves_the_round(directory: Node, old: DraftState, event: DraftEvent, new: DraftState) -> None:
    draft = make_draft(directory)
    draft.state = old
    draft.move(event)
    assert draft.state is new


@pytest.mark.parametrize(("state", "event"), REFUSED)
def test_every_other_event_is_a_defect_and_changes_nothing(
    directory: Node, state: DraftState, event: DraftEvent
) -> None:
    draft = make_draft(directory)
    draft.state = state
    with pytest.raises(InvalidTransitionError, match=event.name):
        draft.move(event)
    assert draft.state is state


def test_the_table_is_exactly_what_is_tested_here() -> None:
    assert {(old, event): new for old, event, new in ALLOWED} == TRANSITIONS


def test_nothing_leaves_discarded() -> None:
    assert not [key for key in TRANSITIONS if key[0] is S.DISCARDED]


@given(st.lists(st.sampled_from(DraftEvent)))
def test_only_a_sealed_round_is_ever_published(events: list[DraftEvent]) -> None:
    draft = make_draft(make_node(2))
    before = draft.state
    for event in events:
        before = draft.state
        try:
            draft.move(event)
        except InvalidTransitionError:
            assert draft.state is before
        else:
            assert (draft.state is S.PUBLISHED) == (before is S.PUBLISHING and event is E.RENAMED)


@pytest.mark.parametrize("state", DraftState)
def test_what_a_state_means_to_the_family(directory: Node, state: DraftState) -> None:
    draft = make_draft(directory)
    draft.state = state
    assert draft.visible_to_family == (state in (S.WRITING, S.PUBLISHING, S.PUBLISHED))
    assert draft.discarded == (state is S.DISCARDED)
    assert not draft.pending
    draft.modified = True
    assert draft.pending == (state is S.WRITING)


def test_drafts_are_told_apart_by_identity_not_by_value(directory: Node) -> None:
    first, second = make_draft(directory), make_draft(directory)
    assert first != second


# ---------------------------------------------------------- who closes last

flush_facts = st.builds(FlushFacts, st.sampled_from(Closer), st.booleans(), st.booleans(), st.booleans(), st.booleans())


@given(flush_facts)
def test_flush_publishes_only_a_provably_last_close(facts: FlushFacts) -> None:
    lives_or_exits = facts.closer in (Closer.ALIVE, Closer.EXITED)
    alone = facts.is_opener and not facts.other_writers and not facts.holds_another
    if lives_or_exits and alone:
        assert decide_flush(facts) is (Decision.LOOK_AGAIN if facts.descendant_holds else Decision.PUBLISH)
    else:
        assert decide_flush(facts) is Decision.WAIT


@given(flush_facts)
def test_what_is_not_looked_up_yet_can_only_make_flush_more_careful(facts: FlushFacts) -> None:
    """A first look without /proc that says WAIT is never overruled by what /proc would have shown."""
    if decide_flush(FlushFacts(facts.closer, facts.is_opener, facts.other_writers)) is Decision.WAIT:
        assert decide_flush(facts) is Decision.WAIT


@pytest.mark.parametrize("closer", [Closer.KILLED, Closer.UNKNOWN, Closer.NOBODY])
def test_a_closer_that_may_have_been_killed_never_publishes(closer: Closer) -> None:
    assert decide_flush(FlushFacts(closer, is_opener=True, other_writers=False)) is Decision.WAIT


# ---------------------------------------------------------- table of drafts


def test_drafts_of_one_name_are_listed_in_the_order_they_came(directory: Node) -> None:
    table = DraftTable()
    drafts = [make_draft(directory) for _ in range(3)]
    for draft in drafts:
        table.add(draft)
    assert table.named(directory, b"name") == drafts
    assert table.has(directory, b"name")
    assert len(table) == 3
    assert list(table) == drafts


def test_a_name_in_another_directory_is_another_name(directory: Node) -> None:
    table = DraftTable()
    table.add(make_draft(directory))
    assert not table.has(make_node(3), b"name")
    assert table.named(make_node(3), b"name") == []
    assert table.named(directory, b"other") == []


def test_discard_takes_out_one_draft_and_may_be_repeated(directory: Node) -> None:
    table = DraftTable()
    first, second = make_draft(directory), make_draft(directory)
    table.add(first)
    table.add(second)
    table.discard(first)
    table.discard(first)
    assert table.named(directory, b"name") == [second]
    table.discard(second)
    assert not table.has(directory, b"name")
    assert len(table) == 0
    assert table.below(directory) == []
    table.discard(second)


def test_below_names_the_drafts_of_one_directory(directory: Node) -> None:
    table = DraftTable()
    here = [make_draft(directory, name) for name in (b"a", b"b")]
    elsewhere = make_draft(make_node(3), b"a")
    for draft in (*here, elsewhere):
        table.add(draft)
    assert table.below(directory) == here
    assert table.below(elsewhere.directory) == [elsewhere]
    assert table.below(make_node(4)) == []
    table.discard(here[0])
    assert table.below(directory) == here[1:]


def test_the_table_may_change_while_it_is_walked(directory: Node) -> None:
    table = DraftTable()
    drafts = [make_draft(directory, name) for name in (b"a", b"a", b"b")]
    for draft in drafts:
        table.add(draft)
    seen = []
    for draft in table:
        table.discard(draft)
        seen.append(draft)
    assert seen == drafts
    assert len(table) == 0


def test_an_exclusive_creation_claims_its_name_while_it_lives(directory: Node) -> None:
    table = DraftTable()
    table.add(make_draft(directory))
    assert not table.claims(directory, b"name")
    claim = make_draft(directory, exclusive=True)
    table.add(claim)
    assert table.claims(directory, b"name")
    assert not table.claims(directory, b"other")
    assert not table.claims(make_node(3), b"name")
    claim.move(DraftEvent.REFUSED)
    assert not table.claims(directory, b"name")


def test_a_claim_ends_with_its_draft(directory: Node) -> None:
    table = DraftTable()
    claim = make_draft(directory, exclusive=True)
    table.add(claim)
    table.discard(claim)
    assert not table.claims(directory, b"name")


@given(st.lists(st.tuples(st.integers(2, 4), st.sampled_from([b"a", b"b"]), st.booleans()), max_size=30))
def test_the_table_agrees_with_a_plain_list(steps: list[tuple[int, bytes, bool]]) -> None:
    namespace = Namespace(10)
    directories = {number: namespace.create(Identity(1, number), stat.S_IFDIR, shown=True) for number in range(2, 5)}
    table, expected = DraftTable(), []
    for number, name, adding in steps:
        matching = [draft for draft in expected if (draft.directory, draft.name) == (directories[number], name)]
        if adding:
            draft = make_draft(directories[number], name)
            table.add(draft)
            expected.append(draft)
        elif matching:
            table.discard(matching[0])
            expected.remove(matching[0])
    assert len(table) == len(expected)
    for node in directories.values():
        assert set(map(id, table.below(node))) == {id(draft) for draft in expected if draft.directory is node}
        for name in (b"a", b"b"):
            wanted = [draft for draft in expected if draft.directory is node and draft.name == name]
            assert table.named(node, name) == wanted
            assert table.has(node, name) == bool(wanted)
