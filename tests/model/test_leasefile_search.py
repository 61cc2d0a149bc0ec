"""Every order of file operations of nodes that replace one record: the lease files, searched through.

The code of safefs.cluster.files.Files runs; each of its calls to the filesystem is a step, on a directory that is a
value (tests.model.shared_directory).  Asked of every step: the record changes by a swap from just the record that was
read to the one that is to follow, and no other way; and a swap says that it was carried out if it was, and only then.
One exception: where the client of a filesystem has repeated a rename whose answer was lost, a swap can say that it was
not, as far as it can tell: its node reads again, as after a swap without an answer (safefs.cluster.backend).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from errno import ENOENT
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import pytest

from safefs.cluster import files as files_module
from safefs.cluster.backend import Stored
from safefs.cluster.files import STATE, Files, directory_of
from safefs.cluster.record import NameRecord
from tests.model.explore import Violation, explore
from tests.model.shared_directory import Answer, Call, Replay, Tree, Waits, carry_out

KEY = "name"
MOST_TRIES = 14  # reads, swaps and discards of one node: more of them never end
NODE = "node"
HOME = f"/names/{directory_of(KEY)}"
EMPTY: Tree = frozenset({(each, None) for each in ("", "/", "/names", "/new", "/nodes", f"/nodes/{NODE}")})
Marks = tuple[str, ...]


class Actor(NamedTuple):
    """A node that puts its mark on the record (`a`, `b` ...), or takes all marks off and removes what is left (`-`)."""

    mark: str
    number: int
    doing: str = "read"  # swap, discard; done
    old: tuple[int, Marks, str] = (0, (), "")  # what it has read: version, marks, token
    answers: tuple[Answer, ...] = ()  # of the calls that it has made in what it is doing
    tried: int = 0  # makes its tokens its own, with its number
    committed: bool = False  # its swap has become the record
    unsure: bool = False  # a rename of its swap has been repeated
    dead: bool = False
    away: bool = False  # nothing is mounted where it looks, until it is done at the latest
    none: bool = True  # there was no record at some time since it began what it is doing
    past: frozenset[tuple[str, ...]] = frozenset()  # listings that it may still be given


class State(NamedTuple):
    tree: Tree
    actors: tuple[Actor, ...]
    faults: int
    wrong: str = ""


def record_of(marks: Marks) -> NameRecord:
    return NameRecord("somebody", marks) if marks else NameRecord()


def marks_after(actor: Actor) -> Marks:
    return () if actor.mark == "-" else (*actor.old[1], actor.mark)


def current(tree: Tree) -> Marks:
    """What is on record."""
    entries = dict(tree)
    names = [path.removeprefix(HOME + "/") for path in entries if path.startswith(HOME + "/")]
    states = sorted((int(found[1]), found[2]) for name in names if (found := STATE.fullmatch(name)))
    if not states or states[-1][1].startswith(files_module.NONE):
        return ()
    text = entries.get(f"{HOME}/data~{states[-1][1]}")
    return tuple(json.loads(text)["record"]["wanted"]) if text else ("nothing that can be read",)


def run(actor: Actor) -> Call | Any:
    """What an actor does next: a call; or what came out of it, where all calls are answered."""
    replay = Replay(actor.answers)
    files = Files.__new__(Files)
    files.root, files.node = "/", NODE
    version, marks, token = actor.old
    old = Stored(version, record_of(marks), token)
    numbers = count()

    def token_of(_bytes: int) -> str:
        return f"{actor.number:x}{actor.tried:x}{next(numbers):x}"

    with (
        mock.patch.object(files_module, "os", replay),
        mock.patch.object(files_module, "open", replay.open_to_read, create=True),
        mock.patch.object(files_module.secrets, "token_hex", token_of),
    ):
        try:
            match actor.doing:
                case "read":
                    return "result", files.read(KEY)
                case "swap":
                    return "result", files.swap(KEY, old, record_of(marks_after(actor)))
                case _:
                    return "result", files.discard(KEY, old)
        except Waits as waits:
            return waits.call
        except OSError as error:
            return "result", error


def follow(actor: Actor, result: object) -> tuple[Actor, str]:
    """What an actor does after what it has done; and what was wrong with the result."""
    fresh = actor._replace(answers=(), tried=actor.tried + 1, away=False)
    if isinstance(result, OSError) or actor.doing == "discard":
        over = fresh._replace(doing="done" if actor.committed or actor.doing == "discard" else "read")
        return over, ""
    if actor.doing == "read":
        assert isinstance(result, Stored)
        old = result.version, result.record.wanted, result.token
        if actor.mark in old[1]:
            return fresh._replace(doing="done"), ""
        if actor.mark == "-" and not old[1]:
            return fresh._replace(doing="discard" if result.version else "done", old=old), ""
        return fresh._replace(doing="swap", old=old), ""
    if (result is not None) != actor.committed and not (result is None and actor.unsure):
        return fresh, f"a swap of {actor.mark} says {result}, and was {'' if actor.committed else 'not '}carried out"
    if result is None:
        return fresh._replace(doing="read", committed=False), ""
    assert isinstance(result, Stored)
    old = result.version, result.record.wanted, result.token
    return fresh._replace(doing="discard" if actor.mark == "-" else "done", old=old), ""


class Search:
    """The steps of some actors; `kinds` of faults: death, lost (answers), stale (listings), away (no mount)."""

    def __init__(self, marks: str, faults: int = 0, kinds: tuple[str, ...] = ()) -> None:
        self.first = State(
            EMPTY, tuple(self._settle(Actor(mark, number))[0] for number, mark in enumerate(marks, 1)), faults
        )
        self._kinds = kinds
        self._calls: dict[Actor, Call] = {}

    @staticmethod
    def _settle(actor: Actor) -> tuple[Actor, str]:
        """As far as an actor goes without a call."""
        while actor.doing != "done" and (next_call := run(actor))[0] == "result":
            actor, wrong = follow(actor, next_call[1])
            if wrong:
                return actor, wrong
        return actor, ""

    def steps(self, state: State) -> Iterator[tuple[str, State, bool]]:
        for at, actor in enumerate(state.actors):
            if actor.dead or actor.doing == "done":
                continue
            call = self._calls.get(actor) or self._calls.setdefault(actor, run(actor))
            if actor.away:
                answer = ("value", False) if call[0] == "exists" else ("error", ENOENT)
                yield f"{actor.mark}: nothing is there", self._after(state, at, call, state.tree, answer), True
                yield f"{actor.mark}: all is there again", self._mounted(state, at, away=False), False
                continue
            tree, answer = carry_out(state.tree, call)
            what = f"{actor.mark} {actor.doing}: {' '.join(call)}"
            yield what, self._after(state, at, call, tree, answer), False
            if not state.faults:
                continue
            one_less = state._replace(faults=state.faults - 1)
            if "death" in self._kinds:
                dead = (*state.actors[:at], actor._replace(dead=True), *state.actors[at + 1 :])
                yield f"{actor.mark} dies", one_less._replace(actors=dead), True
            if "away" in self._kinds:
                yield f"{actor.mark}: nothing is mounted", self._mounted(one_less, at, away=True), True
            if "lost" in self._kinds and call[0] == "rename" and answer[0] == "value":
                unsure = (*state.actors[:at], actor._replace(unsure=True), *state.actors[at + 1 :])
                repeated = self._after(one_less._replace(actors=unsure), at, call, tree, ("error", ENOENT))
                yield f"{what}, carried out and repeated", repeated, True
            if "stale" in self._kinds and call == ("listdir", HOME):
                for listing in actor.past - {answer[1]}:
                    stale = self._after(one_less, at, call, tree, ("value", listing))
                    yield f"{what}, as it was: {listing}", stale, True

    @staticmethod
    def _mounted(state: State, at: int, *, away: bool) -> State:
        actors = state.actors
        return state._replace(actors=(*actors[:at], actors[at]._replace(away=away), *actors[at + 1 :]))

    def _after(self, state: State, at: int, call: Call, tree: Tree, answer: Answer) -> State:
        actor = state.actors[at]
        before, now, wrong = current(state.tree), current(tree), ""
        if before != now:
            if actor.doing != "swap" or before != actor.old[1] or now != marks_after(actor) or actor.committed:
                wrong = f"{before} becomes {now} when {actor.mark} does {actor.doing} from {actor.old[1]}"
            actor = actor._replace(committed=True)
        elif actor.doing == "swap" and call[0] == "rename" and before == marks_after(actor) and tree != state.tree:
            actor = actor._replace(committed=True)  # from nothing to nothing
        before_it = actor
        actor, said = self._settle(actor._replace(answers=(*actor.answers, answer)))
        if before_it.doing == "read" != actor.doing and not actor.old[0] and not before_it.none:
            said = f"{actor.mark} reads that there is no record"
        actors = [*state.actors[:at], actor, *state.actors[at + 1 :]]
        if "away" in self._kinds:
            actors = [each._replace(none=not now or (each.none and bool(each.answers))) for each in actors]
        if "stale" in self._kinds:
            carried_out = answer[0] == "value"
            actors = [
                self._remember(each, number == at and carried_out, state, tree, call)
                for number, each in enumerate(actors)
            ]
        return State(tree, tuple(actors), state.faults, wrong or said)

    @staticmethod
    def _remember(actor: Actor, its_own: bool, state: State, tree: Tree, call: Call) -> Actor:
        """Who has made or renamed something in a directory is not given listings from before that.

        But where he was not told that it was done, he may have been given one in between.
        """
        if its_own and call[-1].startswith(HOME) and call[0] in ("create", "rename"):
            return actor._replace(past=frozenset())
        kind, listing = carry_out(state.tree, ("listdir", HOME))[1]
        same = carry_out(tree, ("listdir", HOME))[1] == (kind, listing)
        return actor if kind == "error" or same else actor._replace(past=actor.past | {listing})

    @staticmethod
    def check(state: State) -> str:
        if "nothing that can be read" in current(state.tree):
            return "a record has lost its data"
        if any(actor.tried > MOST_TRIES for actor in state.actors):
            return "a node tries again and again"
        return state.wrong

    @staticmethod
    def is_settled(state: State) -> bool:
        return all(actor.dead or actor.doing == "done" for actor in state.actors)


def search(marks: str, faults: int = 0, kinds: tuple[str, ...] = ()) -> set[Marks]:
    """Go through all states; what is on record when all are done."""
    searched = Search(marks, faults, kinds)
    found = explore(searched.first, searched.steps, searched.check, 2_000_000)
    ends = found.require_within_reach(searched.is_settled)
    print(f"{len(found.states)} states, {found.steps} steps, {ends} ends")
    return {current(state.tree) for state in found.states if searched.is_settled(state) and state.faults == faults}


DEEP = [("ab-", 0, ()), ("ab-", 1, ("death",)), ("ab-", 1, ("lost",)), ("a--", 1, ("death", "lost", "stale"))]
BOTH = {("a", "b"), ("b", "a")}
ENDS = {"ab": BOTH, "a-": {("a",), ()}, "a--": {("a",), ()}, "ab-": BOTH | {("a",), ("b",), ()}}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("marks", "faults", "kinds"),
    [
        *(DEEP if os.environ.get("SAFEFS_SEARCH") == "deep" else []),
        ("ab", 0, ()),
        ("a-", 0, ()),
        ("ab", 1, ("death", "lost")),
        ("ab", 1, ("stale",)),
        ("a-", 1, ("death", "lost")),
        ("a-", 1, ("stale",)),
        ("ab", 1, ("away",)),
        ("a-", 1, ("away",)),
        ("a-", 2, ("death", "lost", "stale")),
        ("ab", 2, ("death", "lost", "stale")),
        ("a--", 1, ("death",)),
    ],
)
def test_all_orders(marks: str, faults: int, kinds: tuple[str, ...]) -> None:
    ends = search(marks, faults, kinds)
    assert ends == ENDS[marks]


def test_who_cannot_have_his_client_look_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without space for the file that makes it: he does not take a listing from before his rename for the truth."""
    monkeypatch.setattr(Files, "refresh", lambda _files, _name: None)
    assert search("ab", 2, ("lost", "stale")) == BOTH


# Controls.


def test_control_swaps_that_look_and_then_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that does not ask whether its source is there: the state is looked up before, and made anew."""

    def swap(files: Files, name: str, old: Stored, new: NameRecord) -> Stored | None:
        token = files_module.secrets.token_hex(8)
        stored = Stored(old.version + 1, new, token)
        if not old.version:
            return files._create(name, stored)
        if files._state(name) != (old.version, old.token):
            return None
        files._write(HOME, name, stored)
        files_module._touch(f"{HOME}/{stored.version}~{token}")
        files._remove(f"{HOME}/{old.version}~{old.token}")
        return stored

    monkeypatch.setattr(Files, "swap", swap)
    with pytest.raises(Violation, match="becomes"):
        search("abc")


def test_control_whatever_is_missing_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "_require_place", lambda _files: None)
    with pytest.raises(Violation, match="no record"):
        search("ab", 1, ("away",))


def test_control_who_believes_a_listing_after_a_rename_whose_answer_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes the data for those of a state that was never there."""

    def replace(files: Files, name: str, old: Stored, stored: Stored) -> Stored | None:
        files._write(HOME, name, stored)
        with suppress(FileNotFoundError):
            files_module.os.rename(f"{HOME}/{old.version}~{old.token}", f"{HOME}/{stored.version}~{stored.token}")
        if files._state(name) == (stored.version, stored.token):
            return stored
        files._remove(f"{HOME}/data~{stored.token}")
        return None

    monkeypatch.setattr(Files, "_replace", replace)
    with pytest.raises(Violation, match="lost its data"):
        search("ab", 2, ("lost", "stale"))


def test_control_whoever_empties_a_directory_empties_what_is_there_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is over is emptied by its path, when another may be in its place."""

    def bury(files: Files, home: str) -> None:
        with suppress(OSError):
            files._empty(home, [entry for entry in files_module.os.listdir(home) if not STATE.fullmatch(entry)])

    monkeypatch.setattr(Files, "_bury", bury)
    with pytest.raises(Violation, match="lost its data"):
        search("ab-")


def test_control_a_record_whose_state_comes_before_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer may die in between."""
    write = Files._write

    def swap(files: Files, name: str, old: Stored, new: NameRecord) -> Stored | None:
        stored = Stored(old.version + 1, new, files_module.secrets.token_hex(8))
        if not old.version:
            return files._create(name, stored)
        files_module.os.rename(f"{HOME}/{old.version}~{old.token}", f"{HOME}/{stored.version}~{stored.token}")
        write(files, HOME, name, stored)
        return stored

    monkeypatch.setattr(Files, "swap", swap)
    with pytest.raises(Violation, match=r"becomes|lost its data"):
        search("ab")
