"""The line of those who try in vain: when they are answered, and who gets what is unlocked meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from safefs.turns import AT_ONCE, LONGEST_SECONDS, MAX_NAMES, REFUSAL_SECONDS, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock: Clock) -> Turns:
    return Turns(clock)


def exhaust(turns: Turns, name: str = "name") -> None:
    assert [turns.seconds(name) for _ in range(AT_ONCE)] == pytest.approx([0.0] * AT_ONCE, abs=1e-9)


def test_a_few_are_refused_at_once_and_then_each_in_turn(turns: Turns) -> None:
    exhaust(turns)
    for number in range(1, 6):
        assert turns.seconds("name") == pytest.approx(number * REFUSAL_SECONDS)


def test_nobody_is_put_off_for_longer_than_a_moment(turns: Turns, clock: Clock) -> None:
    for _ in range(1000):
        assert turns.seconds("name") <= LONGEST_SECONDS + 1e-9
    clock.now += LONGEST_SECONDS
    assert turns.seconds("name") == pytest.approx(REFUSAL_SECONDS)


def test_who_tries_seldom_is_never_put_off(turns: Turns, clock: Clock) -> None:
    exhaust(turns)
    for _ in range(100):
        clock.now += 1.01 * REFUSAL_SECONDS
        assert turns.seconds("name") == pytest.approx(0.0, abs=1e-9)


def test_turns_are_saved_up_while_nobody_tries(turns: Turns, clock: Clock) -> None:
    exhaust(turns)
    clock.now += 10 * AT_ONCE * REFUSAL_SECONDS
    exhaust(turns)


def test_names_have_turns_of_their_own_and_old_ones_are_forgotten(turns: Turns, clock: Clock) -> None:
    exhaust(turns)
    for number in range(MAX_NAMES):
        assert turns.seconds(number) == 0.0
    clock.now += 60
    assert turns.seconds("another") == 0.0
    assert len(turns._last) == 1


class Lock:
    """What is tried for; `tries` says by whom."""

    def __init__(self) -> None:
        self.free = False
        self.tries: list[str] = []

    def take(self, who: str) -> str:
        self.tries.append(who)
        if not self.free:
            raise BlockingIOError
        self.free = False
        return who


def play(scenario: Callable[[Turns, Lock, list[str]], Awaitable[None]]) -> tuple[Lock, list[str], Turns]:
    """Runs it with a clock that jumps; what those in the line have come to is in the list."""
    turns, lock, results = Turns(), Lock(), list[str]()

    async def main() -> None:
        await scenario(turns, lock, results)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))
    return lock, results, turns


async def line_up(turns: Turns, lock: Lock, results: list[str], who: str, seconds: float) -> None:
    try:
        results.append(await turns.attempt("name", seconds, lambda: lock.take(who)))
    except BlockingIOError:
        results.append(f"{who} refused at {trio.current_time():.2f}")


def test_one_that_nobody_unlocks_for_is_refused_in_his_turn() -> None:
    lock, results, turns = play(lambda turns, lock, results: line_up(turns, lock, results, "one", 0.2))
    assert lock.tries == ["one"]
    assert len(results) == 1
    assert results[0].startswith("one refused")
    assert not turns.has_line("name")


def test_what_is_unlocked_goes_to_the_first_in_the_line() -> None:
    async def scenario(turns: Turns, lock: Lock, results: list[str]) -> None:
        async with trio.open_nursery() as nursery:
            for who in ("one", "two", "three"):
                nursery.start_soon(line_up, turns, lock, results, who, 60)
                await trio.testing.wait_all_tasks_blocked()
            assert turns.has_line("name")
            for number in (1, 2, 3):
                lock.free = True
                turns.unlocked("name")
                await trio.testing.wait_all_tasks_blocked()
                assert len(results) == number

    _, results, turns = play(scenario)
    assert results == ["one", "two", "three"]
    assert not turns.has_line("name")


def test_one_whom_somebody_else_forestalls_stays_the_first() -> None:
    async def scenario(turns: Turns, lock: Lock, results: list[str]) -> None:
        async with trio.open_nursery() as nursery:
            for who in ("one", "two"):
                nursery.start_soon(line_up, turns, lock, results, who, 60)
                await trio.testing.wait_all_tasks_blocked()
            turns.unlocked("name")  # and somebody who has just come is quicker
            await trio.testing.wait_all_tasks_blocked()
            assert results == []
            for _ in range(2):
                lock.free = True
                turns.unlocked("name")
                await trio.testing.wait_all_tasks_blocked()

    _, results, _ = play(scenario)
    assert results == ["one", "two"]


def test_what_leaves_room_for_more_wakes_the_next() -> None:
    """Shared locks: one unlock is for all of them."""

    async def scenario(turns: Turns, lock: Lock, results: list[str]) -> None:
        async with trio.open_nursery() as nursery:
            for who in ("one", "two", "three"):
                nursery.start_soon(hold, turns, lock, results, who)
                await trio.testing.wait_all_tasks_blocked()
            lock.free = True
            turns.unlocked("name")

    async def hold(turns: Turns, lock: Lock, results: list[str], who: str) -> None:
        def share() -> str:
            if not lock.free:
                raise BlockingIOError
            return who

        results.append(await turns.attempt("name", 60, share))

    _, results, _ = play(scenario)
    assert results == ["one", "two", "three"]


def test_one_who_gives_up_passes_his_luck_on() -> None:
    async def scenario(turns: Turns, lock: Lock, results: list[str]) -> None:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def interrupted() -> None:
                with scope:
                    await line_up(turns, lock, results, "one", 60)

            nursery.start_soon(interrupted)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(line_up, turns, lock, results, "two", 60)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            lock.free = True
            turns.unlocked("name")  # before he is out of the line

    lock, results, turns = play(scenario)
    assert results == ["two"]
    assert lock.tries == ["two"]
    assert not turns.has_line("name")
