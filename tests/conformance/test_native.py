"""What the backing's own locks add to lease files (safefs.cluster.ofd), and what does not rest on them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import trio
import xxhash

from safefs.cluster import files as files_module
from safefs.cluster import ofd as module
from safefs.cluster.backend import BackendError, LeaseLostError, Stored
from safefs.cluster.calls import AT_ONCE
from safefs.cluster.files import directory_of
from safefs.cluster.leasefile import LeasefileBackend
from safefs.cluster.ofd import RANGE, NativeBackend
from safefs.cluster.record import NameRecord
from tests.conformance.test_backends import SHORT, held_by, leasefile, native, without_threads

SECONDS = 20.0

Make = Callable[[Path], LeasefileBackend]


def locked_byte(directory: Path, name: str) -> int:
    """Hold what a step on the name is taken under, as a node that does not go on; a descriptor to close."""
    fd = os.open(directory / "serial", os.O_RDWR | os.O_CREAT, 0o600)
    assert module.try_lock(fd, xxhash.xxh3_64_intdigest(directory_of(name).encode()) & RANGE)
    return fd


def undecided_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem that looks for the source first and renames then: of several that are on their way, all win."""
    rename = os.rename

    def rename_late(source: str, target: str) -> None:
        os.stat(source)
        time.sleep(0.002)
        with suppress(FileNotFoundError):
            rename(source, target)
            return
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))

    monkeypatch.setattr(files_module.os, "rename", rename_late)


def counted_twice(make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many swaps of one and the same record succeeded that another had replaced."""

    async def main() -> int:
        nodes = [make(directory) for _ in range(4)]
        for node in nodes:
            await node.join()
        stored = await nodes[0].swap("name", Stored(), held_by("a"))
        undecided_rename(monkeypatch)
        more = 0
        for turn in range(10):
            assert stored is not None
            winners: list[Stored] = []

            async def attempt(node: LeasefileBackend, old: Stored, won: list[Stored], turn: int = turn) -> None:
                swapped = await node.swap("name", old, held_by(str(turn)))
                if swapped:
                    won.append(swapped)

            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(attempt, node, stored, winners)
            more += len(winners) - 1
            stored = winners[0]
        return more

    return trio.run(main)


def test_where_a_rename_has_several_winners_the_lock_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted_twice(native, tmp_path, monkeypatch) == 0


def test_control_without_the_lock_several_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted_twice(leasefile, tmp_path, monkeypatch) > 0


def test_a_step_waits_for_the_lock_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)

    async def scenario() -> None:
        one = native(tmp_path)
        await one.join()
        other = await one.swap("other", Stored(), held_by("a"))
        fd = locked_byte(tmp_path, "name")
        with pytest.raises(BackendError, match="holds the lock"):
            await one.swap("name", Stored(), held_by("a"))
        assert not (await one.read("name")).record
        assert other is not None and await one.swap("other", other, held_by("b"))
        os.close(fd)
        assert await one.swap("name", Stored(), held_by("a"))

    trio.run(scenario)


def test_a_lock_that_a_frozen_node_keeps_is_passed_after_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)

    async def scenario() -> None:
        one = native(tmp_path, SHORT)
        await one.join()
        fd, start = locked_byte(tmp_path, "name"), trio.current_time()
        swapped = None
        while swapped is None:
            with suppress(BackendError):
                swapped = await one.swap("name", Stored(), held_by("a"))
        assert trio.current_time() - start > SHORT.gone_seconds
        os.close(fd)

    trio.run(scenario)


def test_who_has_lost_the_lock_without_a_word_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that was evicted in the middle of a step goes on, and another has been there."""

    async def scenario() -> None:
        one, two = native(tmp_path), native(tmp_path)
        await one.join()
        await two.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None
        write, seen = one.files._write, []

        def write_and_be_overtaken(directory: str, name: str, stored: Stored) -> None:
            write(directory, name, stored)
            if not seen:
                seen.append(two.files.swap("name", first, held_by("b")))

        monkeypatch.setattr(one.files, "_deciding", lambda _what: nullcontext())
        monkeypatch.setattr(one.files, "_write", write_and_be_overtaken)
        assert await one.swap("name", first, held_by("c")) is None
        assert seen[0] is not None and await one.read("name") == seen[0]

    trio.run(scenario)


def test_a_node_whose_lock_was_taken_away_gives_its_lease_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = native(tmp_path), native(tmp_path)
        await one.join()
        await two.join()
        before = one.node
        await one.renew()
        module.unlock(one._locked._alive, 0)
        with pytest.raises(LeaseLostError, match="taken this node's lock"):
            await one.renew()
        await one.join()
        assert one.node != before
        await one.renew()

    trio.run(scenario)


def test_a_lock_that_is_gone_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a client that was cut off the process goes on until its own lease is over: so long others wait."""

    async def scenario() -> None:
        one, two = native(tmp_path, SHORT), native(tmp_path, SHORT)
        await one.join()
        await two.join()
        module.unlock(one._locked._alive, 0)
        with trio.fail_after(SECONDS):
            while not await two.gone([one.node]):  # noqa: ASYNC110 - it is told by files
                await trio.sleep(0.02)
        assert trio.current_time() > one.lease_ends()

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("renews", [True, False])
def test_who_does_not_see_the_lock_of_a_node_that_lives_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renews: bool
) -> None:
    """As on a client with other mount options; a node that was killed has no lock either, and is in nobody's way."""

    async def scenario() -> None:
        one, two = native(tmp_path, SHORT), native(tmp_path, SHORT)
        await one.join()
        is_locked = module.is_locked
        monkeypatch.setattr(module, "is_locked", lambda fd: fd == two._locked._look and is_locked(fd))

        async def keep() -> None:
            while renews:
                await LeasefileBackend.renew(one)
                await trio.sleep(SHORT.renew_seconds)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep)
            if renews:
                with pytest.raises(BackendError, match=f"locks do not exclude here: node {one.node}"):
                    await two.join()
                assert not two.node and two.lease_ends() < trio.current_time()
                (refused,) = {*one.files.nodes()} - {one.node}
                assert await one.gone([refused]) == {refused}
            else:
                await two.join()
            nursery.cancel_scope.cancel()

    trio.run(scenario, clock=without_threads(monkeypatch))


def look_around_with(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[str], object]) -> None:
    """There is always one node that looks free, and does not renew; `meanwhile` is told the name of who looks."""

    def unlocked(files: module.LockedFiles, _nodes: Sequence[str]) -> dict[str, str]:
        meanwhile(files.node)
        return {"another": "0"}

    monkeypatch.setattr(module.LockedFiles, "unlocked", unlocked)


@pytest.mark.parametrize("fails", [True, False])
def test_who_still_looks_around_has_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Nor a new name: what he were given under one that he does not keep would stay with him, and be another's."""

    async def scenario() -> None:
        node = native(tmp_path, SHORT)
        await node.join()
        lost, seen = node.node, list[tuple[str, bool]]()
        await trio.sleep(SHORT.gone_seconds)

        def look(_node: str) -> None:
            seen.append((node.node, trio.current_time() < node.lease_ends()))
            if fails and len(seen) > module.LOOKS:
                raise BackendError("no answer")

        look_around_with(monkeypatch, look)
        with pytest.raises(BackendError, match="no answer") if fails else nullcontext():
            await node.join()
        assert seen == [(lost, False)] * (module.LOOKS + 1)
        if fails:
            assert node.node == lost and node.lease_ends() < trio.current_time()
        else:
            assert node.node != lost and node.lease_ends() == trio.current_time() + SHORT.lease_seconds
            await node.renew()

    trio.run(scenario, clock=without_threads(monkeypatch))


@pytest.mark.parametrize("what", ["its lock is taken away", "others end it"])
def test_a_lease_that_is_lost_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Nothing was held under it: it is tried again."""
    first: list[str] = []

    async def scenario() -> None:
        node = native(tmp_path, SHORT)

        def lose(name: str) -> None:
            first.append(name)
            if name != first[0]:
                return
            if what == "others end it":
                node.files.end(name, "0")
            else:
                module.unlock(node._locked._alive, 0)

        look_around_with(monkeypatch, lose)
        with pytest.raises(BackendError, match="was over before"):
            await node.join()
        assert not node.node and node.lease_ends() < trio.current_time()
        await node.join()
        assert node.node not in ("", first[0])
        await node.renew()

    trio.run(scenario, clock=without_threads(monkeypatch))


def test_a_lease_counts_from_when_a_slow_look_around_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        node = native(tmp_path, SHORT)
        look_around_with(monkeypatch, lambda _name: None)
        began = trio.current_time()
        await node.join()
        assert began + SHORT.lease_seconds < trio.current_time() < node.lease_ends()
        await node.renew()

    trio.run(scenario, clock=without_threads(monkeypatch, SHORT.lease_seconds / module.LOOKS))


def test_who_joins_looks_at_some_of_the_others_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that looked at a thousand could take longer than calls may; the one that lives is found among them."""
    others = files_module.Files(str(tmp_path), {}, lambda _identity: False)
    crowd = 2 * AT_ONCE + 1
    for number in range(crowd):
        others.join(f"dead{number:012}")
    unlocked, looked = module.LockedFiles.unlocked, list[int]()

    def counted(files: module.LockedFiles, nodes: Sequence[str]) -> dict[str, str]:
        looked.append(len(nodes))
        return unlocked(files, nodes)

    async def scenario() -> None:
        one, two = native(tmp_path, SHORT), native(tmp_path, SHORT)
        await one.join()
        module.unlock(one._locked._alive, 0)
        monkeypatch.setattr(module.LockedFiles, "unlocked", counted)
        await two.join()
        assert max(looked) == AT_ONCE and sum(looked[:3]) == crowd + 2
        assert looked[3:] == [1] * module.LOOKS

    trio.run(scenario, clock=without_threads(monkeypatch))


def test_nodes_with_and_without_locks_share_their_records(tmp_path: Path) -> None:
    async def scenario() -> None:
        one, two = native(tmp_path), leasefile(tmp_path)
        await two.join()
        await one.join()
        first = await one.swap("name", Stored(), held_by("a"))
        assert first is not None and await two.read("name") == first
        assert await two.swap("name", first, NameRecord())
        assert await one.swap("name", first, held_by("b")) is None

    trio.run(scenario)


def test_without_locks_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is fallen back to."""

    def none(*_: object) -> None:
        raise OSError(37, os.strerror(37))  # ENOLCK

    async def scenario() -> None:
        one: NativeBackend = native(tmp_path)
        await one.join()
        monkeypatch.setattr(module.fcntl, "fcntl", none)
        with pytest.raises(BackendError, match="No locks available"):
            await one.swap("name", Stored(), held_by("a"))
        with pytest.raises(BackendError, match="No locks available"):
            await native(tmp_path).join()

    trio.run(scenario)
