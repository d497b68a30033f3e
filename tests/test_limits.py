"""Limits in memory, on a clock that passes only while a loop sleeps."""

import asyncio
import gc
import itertools
import math
import random
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipeo_llm.errors import InvalidRequestError, RateLimitError
from dipeo_llm.limits import Limit, RateLimits, Reservation

T = TypeVar("T")
ONE = Limit(rpm=1)
LONGEST = 61.0
"""Seconds that a reservation counts at most: a window and a bucket."""


class _Sleeper(selectors.DefaultSelector):
    """Lets time pass instead of waiting."""

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            assert timeout is not None, "everybody waits, and nobody is to wake them"
            Clock.now += timeout
        return found


class Clock:
    """What `time.monotonic` says in `run`."""

    now = 1000.0


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the clock above; what it begins has ended after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: Clock.now)
        Clock.now = 1000.0
        loop = asyncio.SelectorEventLoop(_Sleeper())
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(work)


def start(
    limits: RateLimits, tokens: int = 1, limit: Limit = ONE, **options: Any
) -> "asyncio.Task[Reservation]":
    """Start a reservation under the name "a"."""
    return asyncio.create_task(limits.reserve("a", limit, tokens, **options))


async def pause(turns: int = 10) -> None:
    """Let other tasks run, in no time."""
    for _ in range(turns):
        await asyncio.sleep(0)


def test_a_call_within_the_limits_goes_at_once() -> None:
    """It waits for nothing, and is counted."""

    async def work() -> None:
        limits = RateLimits()
        assert limits.used("a") == (0, 0)
        made = await limits.reserve("a", Limit(rpm=2, tpm=100), 60)
        assert made.queued == 0
        assert limits.used("a") == (1, 60)
        assert limits.used("b") == (0, 0)
        await limits.reserve("a", Limit(), 10**9)
        assert limits.used("a") == (2, 60 + 10**9)
        await limits.aclose()
        assert Clock.now == 1000

    run(work())


@pytest.mark.parametrize("limit", [Limit(rpm=3), Limit(tpm=30), Limit(rpm=3, tpm=30)])
def test_a_window_that_slides(limit: Limit) -> None:
    """Two bursts at the border of a minute do not pass, and the wait is no minute more."""

    async def work() -> None:
        limits = RateLimits()
        await asyncio.sleep(59.95)
        for _ in range(3):
            await limits.reserve("a", limit, 10)
        begun = Clock.now
        made = await limits.reserve("a", limit, 10)
        assert 60 <= Clock.now - begun <= LONGEST
        assert made.queued == pytest.approx(Clock.now - begun, abs=1e-3)
        assert limits.used("a") == (1, 10)

    run(work())


def test_a_reservation_lapses_with_its_minute() -> None:
    """Whether it is corrected or not; a correction after that changes nothing."""

    async def work() -> None:
        limits = RateLimits()
        made = await limits.reserve("a", ONE, 5)
        await asyncio.sleep(59.9)
        assert limits.used("a") == (1, 5)
        await asyncio.sleep(1.2)
        assert limits.used("a") == (0, 0)
        made.settle(500)
        made.refund()
        assert limits.used("a") == (0, 0)
        await limits.reserve("a", ONE, 5, wait=False)

    run(work())


def test_corrections() -> None:
    """The first one counts, and None keeps the estimate."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=1000)
        made = [await limits.reserve("a", limit, 100) for _ in range(5)]
        made[0].settle(10)
        made[0].refund()
        made[0].settle(1)
        made[1].refund()
        made[1].settle(1000)
        made[2].settle(None)
        made[2].settle(7)
        made[3].settle(700)
        assert limits.used("a") == (4, 10 + 100 + 700 + 100)
        made[4].settle(2000)
        assert limits.used("a") == (4, 10 + 100 + 700 + 2000)
        assert 60 < await limits.wait_time("a", limit, 1) <= LONGEST

    run(work())


def test_room_that_is_given_back_is_used_at_once() -> None:
    """A refund and a small settlement let the next calls go."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(rpm=2, tpm=100)
        one, two = [await limits.reserve("a", limit, 50) for _ in range(2)]
        waiting = [start(limits, 40, limit) for _ in range(2)]
        await pause()
        one.settle(5)  # tokens, but no request
        await pause()
        assert not waiting[0].done()
        two.refund()
        await pause()
        assert waiting[0].done()
        assert not waiting[1].done()
        (await waiting[0]).refund()
        await waiting[1]
        assert Clock.now == 1000
        assert limits.used("a") == (2, 45)

    run(work())


def test_a_refused_call_changes_nothing() -> None:
    """It fails at once, says when it could have been, and is not counted."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(rpm=1, tpm=50)
        await limits.reserve("a", limit, 50)
        wait = await limits.wait_time("a", limit, 1)
        ends = Clock.now + 60
        for options in ({"wait": False}, {"ends": ends}, {"ends": Clock.now - 1}):
            with pytest.raises(RateLimitError) as raised:
                await limits.reserve("a", limit, 1, **options)
            error = raised.value
            assert error.retry_after == pytest.approx(wait)
            assert (error.status_code, error.retryable) == (None, False)
            assert "1 requests and 50 tokens per minute" in str(error)
            assert "61 s" in str(error)
        assert Clock.now == 1000
        assert limits.used("a") == (1, 50)
        await limits.reserve("a", limit, 1, ends=Clock.now + wait)
        assert Clock.now == pytest.approx(1000 + wait, abs=1e-3)

    run(work())


def test_a_call_that_can_never_fit() -> None:
    """It is an error of the request, and the wait has no end."""

    async def work() -> None:
        limits = RateLimits()
        with pytest.raises(
            InvalidRequestError, match=r"51 tokens never fits .*tpm is 50"
        ):
            await limits.reserve("a", Limit(tpm=50), 51)
        assert await limits.wait_time("a", Limit(tpm=50), 51) == math.inf
        assert await limits.wait_time("a", Limit(tpm=50), 50) == 0
        assert limits.used("a") == (0, 0)

    run(work())


def test_a_limit_that_is_none() -> None:
    """It is refused where it is written."""
    with pytest.raises(ValueError, match="rpm must be above 0"):
        Limit(rpm=0)
    with pytest.raises(ValueError, match="tpm must be above 0"):
        Limit(tpm=-5)


def test_a_large_call_is_not_starved() -> None:
    """Small calls behind it wait, also those that would fit and those that do not wait."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=100)
        await limits.reserve("a", limit, 30)
        large = start(limits, 80, limit)
        await pause()
        small = [start(limits, 1, limit) for _ in range(5)]
        await pause()
        assert not any(task.done() for task in [large, *small])
        with pytest.raises(RateLimitError) as raised:
            await limits.reserve("a", limit, 1, wait=False)
        wait = await limits.wait_time("a", limit, 1)
        assert raised.value.retry_after == pytest.approx(wait)
        assert 60 <= wait <= LONGEST
        # It could go after the large one, and not with what is left after the small ones.
        assert await limits.wait_time("a", limit, 16) > 100
        await asyncio.gather(large, *small)
        assert Clock.now == pytest.approx(1000 + wait, abs=1e-3)
        assert limits.used("a") == (6, 85)

    run(work())


def test_a_deadline_behind_others() -> None:
    """The calls ahead count; when they leave, there is room for another one."""

    async def work() -> None:
        limits = RateLimits()
        await limits.reserve("a", ONE, 1)
        ahead = [start(limits) for _ in range(3)]
        await pause()
        with pytest.raises(RateLimitError) as raised:
            await limits.reserve("a", ONE, 1, ends=Clock.now + 3 * LONGEST)
        assert raised.value.retry_after == pytest.approx(4 * LONGEST, abs=0.1)
        ahead[1].cancel()
        await pause()
        await limits.reserve("a", ONE, 1, ends=Clock.now + 3 * LONGEST)
        assert Clock.now == pytest.approx(1000 + 3 * LONGEST, abs=0.1)

    run(work())


def test_a_deadline_that_a_larger_answer_breaks() -> None:
    """The first in the line fails as soon as its turn moves behind its deadline."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=100)
        await limits.reserve("a", limit, 10)
        await asyncio.sleep(30)
        late = await limits.reserve("a", limit, 80)
        waiting = start(limits, 20, limit, ends=Clock.now + 35)
        await asyncio.sleep(10)
        late.settle(100)
        with pytest.raises(RateLimitError) as raised:
            await waiting
        assert Clock.now == 1040
        assert raised.value.details["queued"] == pytest.approx(10)
        assert raised.value.retry_after == pytest.approx(51, abs=0.001)

    run(work())


def test_a_call_behind_others_ends_in_its_own_time() -> None:
    """Its deadline is kept where the line does not move as it was to."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=100)
        await limits.reserve("a", limit, 90)
        await asyncio.sleep(30)
        late = await limits.reserve("a", limit, 10)
        ahead = start(limits, 40, limit)
        behind = start(limits, 40, limit, ends=1089)
        await pause()
        late.settle(100)
        with pytest.raises(RateLimitError) as raised:
            await behind
        assert Clock.now == pytest.approx(1089)
        assert 1 < (raised.value.retry_after or 0) <= 2
        await ahead
        assert Clock.now == pytest.approx(1091, abs=0.001)

    run(work())


def test_a_cancelled_head_lets_the_next_go() -> None:
    """The one behind it fits, and need not wait for the minute."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=100)
        await limits.reserve("a", limit, 50)
        large, small = start(limits, 100, limit), start(limits, 50, limit)
        await pause()
        large.cancel()
        await small
        assert Clock.now == 1000
        assert limits.used("a") == (2, 100)

    run(work())


def test_a_call_that_is_cancelled_as_its_turn_comes() -> None:
    """It has its reservation, has not run since, and the next one gets the room."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=100)
        made = await limits.reserve("a", limit, 100)
        first, second, third = (start(limits, 50, limit) for _ in range(3))
        await pause()
        made.refund()
        while not first.done():  # noqa: ASYNC110 - the very next moment counts
            await asyncio.sleep(0)
        assert (second.done(), limits.used("a")) == (False, (2, 100))
        second.cancel()
        await third
        assert second.cancelled()
        assert (limits.used("a"), Clock.now) == ((2, 100), 1000)

    run(work())


def test_names_are_forgotten() -> None:
    """Of many deployments only those in use are remembered."""

    async def work() -> None:
        limits = RateLimits()
        for number in range(10_000):
            await limits.reserve(str(number), ONE, 1)
            await asyncio.sleep(1)
        assert len(limits._lines) < 200
        assert limits.used("9999") == (1, 1)

    run(work())


def test_ten_thousand_at_once() -> None:
    """They go in order, as many a minute as may, and none is lost."""

    async def work() -> None:
        limits = RateLimits()
        times: list[float] = []

        async def call() -> None:
            await limits.reserve("a", Limit(rpm=2500), 1)
            times.append(Clock.now)

        begun = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(10_000)))
        assert time.perf_counter() - begun < 20
        assert len(times) == 10_000
        assert [times.count(at) for at in sorted(set(times))] == [2500] * 4
        assert times[-1] - times[0] <= 3 * LONGEST

    run(work())


def test_a_long_line_is_not_looked_at_for_each_call() -> None:
    """Refusing calls behind thousands is quick, though answers give room back."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(tpm=10_000)
        made = [await limits.reserve("a", limit, 10) for _ in range(1000)]
        line = [start(limits, 10, limit) for _ in range(5000)]
        await pause()
        begun = time.perf_counter()
        for reservation in made:
            reservation.settle(9)
            with pytest.raises(RateLimitError) as raised:
                await limits.reserve("a", limit, 10, ends=Clock.now + 300)
            assert (raised.value.retry_after or 0) > 300
        assert time.perf_counter() - begun < 5
        await pause()
        assert sum(task.done() for task in line) == 100
        for task in line[200:]:
            task.cancel()
        await asyncio.wait(line[200:])
        # The line is short now: each call is looked at.
        await limits.reserve("a", limit, 10, ends=Clock.now + 62)

    run(work())


# Sequences.

gaps = st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0, 7.77, 31.0, 60.0, 61.0, 200.0])
sizes = st.integers(0, 50)
limits_ = st.builds(
    Limit,
    rpm=st.none() | st.integers(1, 6),
    tpm=st.none() | st.integers(50, 120),
)


def reference(limit: Limit, asked: list[tuple[float, int]]) -> list[float]:
    """Return the turns of calls that ask at given times: slow, and written anew."""
    turns: list[tuple[float, int]] = []

    def fits(now: float, tokens: int) -> bool:
        second = math.floor(now + 1e-6)
        held = [size for at, size in turns if math.floor(at + 1e-6) >= second - 60]
        return (limit.rpm is None or len(held) < limit.rpm) and (
            limit.tpm is None or sum(held) + tokens <= limit.tpm
        )

    earliest = 0.0
    for at, tokens in asked:
        earliest = max(earliest, at)
        while not fits(earliest, tokens):
            earliest = math.floor(earliest + 1e-6) + 1.0
        turns.append((earliest, tokens))
    return [at for at, _ in turns]


@given(limit=limits_, calls=st.lists(st.tuples(gaps, sizes), max_size=25))
def test_turns_are_those_of_a_plain_count(
    limit: Limit, calls: list[tuple[float, int]]
) -> None:
    """No minute has more than the limits, nobody overtakes, nobody waits longer."""

    async def work() -> None:
        limits = RateLimits()
        asked: list[tuple[float, int]] = []
        turns: list[float] = []
        foreseen: list[float] = []

        async def call(tokens: int) -> None:
            made = await limits.reserve("a", limit, tokens)
            turns.append(Clock.now)
            assert made.queued >= 0

        async with asyncio.TaskGroup() as group:
            for gap, tokens in calls:
                await asyncio.sleep(gap)
                foreseen.append(Clock.now + await limits.wait_time("a", limit, tokens))
                asked.append((Clock.now, tokens))
                group.create_task(call(tokens))
                await pause(3)
        expected = reference(limit, asked)
        assert turns == pytest.approx(expected, abs=0.01)
        assert foreseen == pytest.approx(expected, abs=0.01)

    run(work())


actions = st.sampled_from(["keep", "less", "more", "refund", "cancel"])


@given(
    limit=limits_,
    calls=st.lists(
        st.tuples(gaps, sizes, actions, st.sampled_from([0.0, 0.5, 30.0, 90.0])),
        max_size=25,
    ),
)
def test_no_minute_has_more_than_the_limits(
    limit: Limit, calls: list[tuple[float, int, str, float]]
) -> None:
    """With corrections and cancellations, whenever a call gets its turn there is room."""

    async def work() -> None:
        limits = RateLimits()
        counted: dict[int, tuple[float, int]] = {}
        turns: dict[int, float] = {}
        before: dict[int, tuple[float, int]] = {}

        def size(number: int) -> int:
            """Return what a call counts; it may have been corrected since the turn."""
            corrected_at, reserved = before.get(number, (0.0, 0))
            counts = counted[number][1]
            return min(counts, reserved) if corrected_at == Clock.now else counts

        async def call(number: int, tokens: int, action: str, after: float) -> None:
            made = await limits.reserve("a", limit, tokens)
            turns[number] = Clock.now
            held = [size(n) for n, (at, _) in counted.items() if at > Clock.now - 60]
            assert limit.rpm is None or len(held) < limit.rpm
            assert limit.tpm is None or sum(held) + tokens <= limit.tpm
            counted[number] = (Clock.now, tokens)
            await asyncio.sleep(after)
            at = counted[number][0]
            before[number] = (Clock.now, tokens)
            match action:
                case "less":
                    made.settle(tokens // 3)
                    counted[number] = (at, tokens // 3)
                case "more":
                    made.settle(tokens * 3)
                    counted[number] = (at, tokens * 3)
                case "refund":
                    made.refund()
                    del counted[number]
                case _:
                    made.settle(None)

        tasks = []
        for number, (gap, tokens, action, after) in enumerate(calls):
            await asyncio.sleep(gap)
            tasks.append(asyncio.create_task(call(number, tokens, action, after)))
            if action == "cancel":
                asyncio.get_running_loop().call_later(after, tasks[-1].cancel)
        failed = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [e for e in failed if isinstance(e, Exception)]
        in_order = [turns[number] for number in sorted(turns)]
        assert in_order == sorted(in_order)
        await asyncio.sleep(62)
        assert limits.used("a") == (0, 0)

    run(work())


@given(
    before=st.lists(st.tuples(gaps, sizes), max_size=5),
    given_back=st.lists(st.tuples(gaps, sizes), max_size=8),
    asked=sizes,
)
def test_refunds_restore_exactly(
    before: list[tuple[float, int]],
    given_back: list[tuple[float, int]],
    asked: int,
) -> None:
    """What is given back might as well not have been."""
    limit = Limit(rpm=100, tpm=1000)

    async def outcome(*, with_them: bool) -> tuple[Any, float]:
        limits = RateLimits()
        made = []
        for gap, tokens in before:
            await asyncio.sleep(min(gap, 10))
            await limits.reserve("a", limit, tokens)
        for gap, tokens in given_back:
            await asyncio.sleep(min(gap, 10))
            if with_them:
                made.append(await limits.reserve("a", limit, tokens, wait=False))
        for reservation in made:
            reservation.refund()
        return limits.used("a"), await limits.wait_time("a", Limit(tpm=60), asked)

    assert run(outcome(with_them=True)) == run(outcome(with_them=False))


@given(st.randoms(use_true_random=False))
def test_cancelled_at_any_moment(chance: random.Random) -> None:
    """No call is left in the line, and what is counted is what was reserved."""

    async def work() -> None:
        limits = RateLimits()
        limit = Limit(rpm=5, tpm=60)
        held: list[int] = []

        async def call(tokens: int) -> None:
            made = await limits.reserve("a", limit, tokens)
            held.append(tokens)
            await pause(chance.randrange(4))
            if chance.random() < 0.5:
                held.remove(tokens)
                made.refund()

        tasks = [asyncio.create_task(call(chance.randrange(1, 30))) for _ in range(30)]
        for task in chance.sample(tasks, 30):
            await pause(chance.randrange(4))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limits.used("a") == (len(held), sum(held))
        await asyncio.sleep(61)
        await limits.reserve("a", limit, 60, wait=False)
        assert limits.used("a") == (1, 60)

    run(work())


# Real time: several loops.


def most_in(times: list[float], window: float) -> int:
    """Return the most of some times that are within a window."""
    times = sorted(times)
    return max(
        sum(1 for t in itertools.islice(times, i, None) if t < at + window)
        for i, at in enumerate(times)
    )


def test_two_loops_in_two_threads() -> None:
    """They share a window: none is lost, and no window has more than the limit."""
    limits = RateLimits(window=0.6)
    times: list[float] = []
    together = threading.Barrier(2)

    async def call(number: int) -> None:
        made = await limits.reserve("a", Limit(rpm=50, tpm=500), 10)
        times.append(time.monotonic())
        made.settle(10 if number % 3 else 4)

    async def work() -> None:
        together.wait()
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for number in range(100):
                task = group.create_task(call(number))
                if number % 10 == 0:
                    group.create_task(call(number))
                    asyncio.get_running_loop().call_later(0.3, task.cancel)

    threads = [threading.Thread(target=asyncio.run, args=[work()]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert 180 <= len(times) <= 220
    # A turn is noted a moment after it was given.
    assert most_in(times, 0.5) <= 50
    assert len(limits._lines["a"].waiters) == 0


def test_a_loop_that_stands_still_holds_up_no_other() -> None:
    """Its call is passed over, and gets its turn when the loop runs again."""
    limits = RateLimits(window=0.3)
    still = asyncio.new_event_loop()
    first = still.run_until_complete(limits.reserve("a", ONE, 1))
    waiting = still.create_task(limits.reserve("a", ONE, 1))
    still.run_until_complete(asyncio.sleep(0.01))
    first.settle(None)

    async def work() -> Reservation:
        async with asyncio.timeout(5):
            return await limits.reserve("a", ONE, 1)

    assert asyncio.run(work()).queued < 1
    assert still.run_until_complete(waiting).queued > 0.2
    still.close()


def test_a_loop_that_stops_before_its_turn() -> None:
    """A call that already waits behind it, on another loop, goes on."""
    limits = RateLimits(window=0.3)
    still = asyncio.new_event_loop()
    waiting = still.create_task(limits.reserve("a", ONE, 1))
    still.run_until_complete(waiting)
    waiting = still.create_task(limits.reserve("a", ONE, 1))

    async def behind() -> Reservation:
        async with asyncio.timeout(5):
            return await limits.reserve("a", ONE, 1)

    async def stop_soon() -> None:
        await asyncio.sleep(0.01)
        others.start()
        await asyncio.sleep(0.1)

    made: list[Reservation] = []
    others = threading.Thread(target=lambda: made.append(asyncio.run(behind())))
    still.run_until_complete(stop_soon())
    others.join(10)
    assert 0.15 < made[0].queued < 2
    still.run_until_complete(waiting)
    still.close()


def test_a_loop_that_is_closed_with_a_call_in_the_line() -> None:
    """The call is forgotten."""
    limits = RateLimits(window=0.3)
    closed = asyncio.new_event_loop()
    closed.run_until_complete(limits.reserve("a", ONE, 1))
    waiting = closed.create_task(limits.reserve("a", ONE, 1))
    closed.run_until_complete(asyncio.sleep(0.01))
    closed.close()

    async def work() -> None:
        async with asyncio.timeout(5):
            await limits.reserve("a", ONE, 1)

    asyncio.run(work())
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    del waiting
    gc.collect()
    assert limits.used("a")[0] == 1


def test_corrections_from_another_thread_wake_the_first() -> None:
    """A thread without a loop gives room back, and the waiting call gets it."""

    async def work() -> None:
        limits = RateLimits()
        made = await limits.reserve("a", ONE, 1)
        waiting = start(limits)
        await pause()
        await asyncio.to_thread(made.refund)
        async with asyncio.timeout(5):
            await waiting

    asyncio.run(work())


def test_no_redis_without_redis() -> None:
    """The module imports nothing that is large."""
    code = (
        "import sys, dipeo_llm.limits as m; m.RateLimits();"
        "print([n for n in ('redis', 'aiocache', 'litellm', 'aiohttp') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
