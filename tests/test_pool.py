"""The pool alone, with a small client that knows when and how often it was closed.

What the loop's clock does is decided here: no test waits for a time to live.
"""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import logging
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dipeo_llm import pool as pool_module
from dipeo_llm.errors import ServiceUnavailableError
from dipeo_llm.pool import Lease, Pool

PassTime = Callable[[float], Awaitable[None]]


class Client:
    """Closes as a real one does: not at once, and on the loop that made it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closings = 0
        self.closed = 0

    async def aclose(self) -> None:
        """Close it in two turns of the loop."""
        assert asyncio.get_running_loop() is self.loop
        self.closings += 1
        await asyncio.sleep(0)
        self.closed += 1


@dataclass
class Factory:
    """Makes clients, when the gate is open, unless it is told to fail."""

    made: list[Client] = field(default_factory=list)
    calls: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    failure: BaseException | None = None
    deaf: bool = False

    async def __call__(self) -> Client:
        """Make one."""
        self.calls += 1
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.deaf:
                    raise
                self.gate.set()
        if self.failure is not None:
            raise self.failure
        self.made.append(Client())
        return self.made[-1]

    @property
    def closed(self) -> list[int]:
        """How often each client was closed, in the order in which they were made."""
        return [client.closed for client in self.made]


@pytest.fixture
def make() -> Factory:
    """Make clients at once."""
    factory = Factory()
    factory.gate.set()
    return factory


@pytest.fixture
def slow() -> Factory:
    """Make clients when the test opens the gate."""
    return Factory()


@pytest.fixture
async def pool() -> AsyncIterator[Pool[Client]]:
    """Open a pool with room for three clients, an hour each."""
    opened: Pool[Client] = Pool(ttl=3600, max_clients=3)
    yield opened
    await opened.aclose()


@pytest.fixture
async def pass_time(monkeypatch: pytest.MonkeyPatch) -> PassTime:
    """Turn the loop's clock forward; what is then due has run on return."""
    loop = asyncio.get_running_loop()
    real = loop.time
    passed = 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + passed)

    async def turn(seconds: float) -> None:
        nonlocal passed
        passed += seconds
        await settle()

    return turn


@pytest.fixture
async def complaints() -> AsyncIterator[list[dict[str, Any]]]:
    """Collect what the loop would log, such as an exception that nobody retrieved."""
    loop = asyncio.get_running_loop()
    seen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: seen.append(context))
    yield seen
    loop.set_exception_handler(None)


async def settle() -> None:
    """Let everything run that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


async def use(pool: Pool[Client], key: object, make: Factory) -> Client:
    """Make one short call."""
    async with await pool.lease(key, make) as client:
        return client


async def ask(
    pool: Pool[Client], key: object, make: Factory, callers: int = 1
) -> list[asyncio.Task[Lease[Client]]]:
    """Start callers that all wait for the client of a key."""
    tasks = [asyncio.create_task(pool.lease(key, make)) for _ in range(callers)]
    await settle()
    return tasks


def left_over() -> list[Any]:
    """Tasks and timers of the running loop, this test's own task apart."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    timers = [timer for timer in vars(loop)["_scheduled"] if not timer.cancelled()]
    return [*tasks, *timers]


# --- making one --------------------------------------------------------------------


@pytest.mark.parametrize("callers", [1_000, 10_000])
async def test_callers_that_ask_at_once_share_one_client(
    pool: Pool[Client], slow: Factory, callers: int
) -> None:
    """However many first calls come at once, one client is made for all."""
    tasks = await ask(pool, "key", slow, callers)

    slow.gate.set()
    leases = await asyncio.gather(*tasks)

    assert slow.calls == 1
    assert {id(lease.client) for lease in leases} == {id(slow.made[0])}
    await asyncio.gather(*(lease.release() for lease in leases))
    assert slow.closed == [0]


async def test_a_hit_does_not_wait(pool: Pool[Client], make: Factory) -> None:
    """A client that is there is handed out without a turn of the loop or a new task."""
    client = await use(pool, "key", make)
    before = left_over()

    lease = pool.lease("key", make)
    with pytest.raises(StopIteration) as done:
        lease.send(None)

    assert done.value.value.client is client
    assert left_over() == before
    with pytest.raises(StopIteration):
        done.value.value.release().send(None)

    started = time.perf_counter()
    for _ in range(10_000):
        await use(pool, "key", make)
    took = (time.perf_counter() - started) / 10_000
    print(f"a hit, lease and release: {took * 1e6:.1f} us")  # noqa: T201
    assert make.calls == 1


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(
    pool: Pool[Client], slow: Factory
) -> None:
    """All who waited get the error, each with a traceback of its own; the next, none."""
    slow.failure = OSError("no route")
    depths = set()

    async def call() -> None:
        try:
            await pool.lease("key", slow)
        except OSError as exc:
            depths.add(len(traceback.extract_tb(exc.__traceback__)))
            raise

    tasks = [asyncio.create_task(call()) for _ in range(100)]
    await settle()
    slow.gate.set()
    got = await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(exc) for exc in got] == ["no route"] * 100
    assert len(depths) == 1
    assert slow.calls == 1
    slow.failure = None
    assert await use(pool, "key", slow) is slow.made[0]
    assert slow.calls == 2


async def test_a_cancelled_leader_does_not_fail_its_followers(
    pool: Pool[Client], slow: Factory
) -> None:
    """Whoever asked first may go; those who came later get the client all the same."""
    leader, *followers = await ask(pool, "key", slow, 3)

    leader.cancel()
    await settle()
    slow.gate.set()
    leases = await asyncio.gather(*followers)

    assert leader.cancelled()
    assert [lease.client for lease in leases] == slow.made * 2
    assert slow.calls == 1


async def test_a_client_that_nobody_waits_for_any_more_stays_in_the_pool(
    pool: Pool[Client], slow: Factory
) -> None:
    """When all callers are cancelled, the client is there for the next, and closed."""
    for task in await ask(pool, "key", slow, 5):
        task.cancel()
    await settle()
    slow.gate.set()
    await settle()

    assert len(pool) == 1
    assert await use(pool, "key", slow) is slow.made[0]
    await pool.aclose()
    assert slow.closed == [1]


async def test_a_failure_that_nobody_waits_for_any_more_is_silent(
    pool: Pool[Client], slow: Factory, complaints: list[dict[str, Any]]
) -> None:
    """When all callers are cancelled, a failure is neither reported nor kept."""
    slow.failure = OSError("no route")
    for task in await ask(pool, "key", slow, 5):
        task.cancel()
    await settle()
    slow.gate.set()
    await settle()
    gc.collect()

    assert complaints == []
    assert len(pool) == 0
    slow.failure = None
    assert await use(pool, "key", slow) is slow.made[0]


async def test_callers_do_not_catch_a_cancellation_that_is_not_theirs(
    pool: Pool[Client], slow: Factory
) -> None:
    """If the making itself is cancelled, callers get an error that may be retried."""
    slow.failure = asyncio.CancelledError()
    tasks = await ask(pool, "key", slow, 2)
    slow.gate.set()

    got = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(exc) for exc in got] == [ServiceUnavailableError] * 2
    assert all(exc.retryable for exc in got if isinstance(exc, ServiceUnavailableError))


async def test_a_client_holds_nothing_of_the_call_that_made_it(
    pool: Pool[Client], make: Factory
) -> None:
    """The context of the first call is not kept for as long as the client is."""

    class Request:
        """What an application keeps in a context variable."""

    variable: contextvars.ContextVar[Request] = contextvars.ContextVar("request")

    async def call() -> weakref.ref[Request]:
        request = Request()
        variable.set(request)
        await use(pool, "key", make)
        return weakref.ref(request)

    request = await asyncio.create_task(call())
    await settle()
    gc.collect()

    assert len(pool) == 1
    assert request() is None


# --- its end -----------------------------------------------------------------------


async def test_an_idle_client_closes_when_its_time_is_over(
    pool: Pool[Client], make: Factory, pass_time: PassTime
) -> None:
    """An expired client closes by itself, not before, and the next call makes one."""
    await use(pool, "key", make)

    await pass_time(3599)
    assert make.closed == [0]
    await pass_time(2)
    assert make.closed == [1]
    assert len(pool) == 0
    assert left_over() == []
    assert await use(pool, "key", make) is make.made[1]


async def test_use_does_not_lengthen_a_clients_life(
    pool: Pool[Client], make: Factory, pass_time: PassTime
) -> None:
    """The time to live runs from the making, however often a client is used."""
    for _ in range(3):
        await use(pool, "key", make)
        await pass_time(1300)

    assert make.closed == [1]


async def test_an_expired_client_closes_with_its_last_call(
    pool: Pool[Client], make: Factory, pass_time: PassTime
) -> None:
    """Running calls keep an expired client open; new calls get another one."""
    first = await pool.lease("key", make)
    second = await pool.lease("key", make)
    await pass_time(3601)
    third = await pool.lease("key", make)

    await first.release()
    await first.release()
    assert make.closed == [0, 0]
    await second.release()
    assert make.closed == [1, 0]
    assert third.client is make.made[1]
    await third.release()
    assert make.closed == [1, 0]


async def test_a_cancelled_call_still_closes_its_expired_client(
    pool: Pool[Client], make: Factory, pass_time: PassTime
) -> None:
    """Cancelling a call while it gives back an expired client does not stop that."""
    lease = await pool.lease("key", make)
    await pass_time(3601)
    task = asyncio.create_task(lease.release())
    await asyncio.sleep(0)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()

    assert make.closed == [1]


async def test_a_rotated_key_gets_a_new_client(
    pool: Pool[Client], make: Factory
) -> None:
    """Another key is another client; calls with the old one go on."""
    old = await pool.lease("key 1", make)

    new = await pool.lease("key 2", make)

    assert [old.client, new.client] == make.made
    assert make.closed == [0, 0]


async def test_keys_are_told_apart_by_equality_alone(
    pool: Pool[Client], make: Factory
) -> None:
    """Keys that only look alike as text are different."""
    clients = [await use(pool, key, make) for key in (1, "1", ("1",))]

    assert clients == make.made


async def test_a_client_that_fails_to_close_ends_no_call(
    pool: Pool[Client],
    make: Factory,
    pass_time: PassTime,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, and the pool goes on without the client."""

    class Stubborn(Client):
        async def aclose(self) -> None:
            raise OSError("will not")

    async def make_stubborn() -> Client:
        return Stubborn()

    lease = await pool.lease("key", make_stubborn)
    await pass_time(3601)
    with caplog.at_level(logging.WARNING, "dipeo_llm"):
        await lease.release()

    assert "could not be closed" in caplog.text
    assert len(pool) == 0
    assert await use(pool, "key", make) is make.made[0]


async def test_a_cache_that_is_switched_off_costs_clients_but_leaks_none(
    pool: Pool[Client], make: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under AIOCACHE_DISABLE=1 each call has a client of its own and closes it."""
    monkeypatch.setenv("AIOCACHE_DISABLE", "1")

    await use(pool, "key", make)
    await use(pool, "key", make)

    assert make.closed == [1, 1]
    assert left_over() == []


# --- the limit ---------------------------------------------------------------------


async def test_the_client_unused_for_longest_makes_room(
    pool: Pool[Client], make: Factory
) -> None:
    """Past the limit the oldest idle client closes, one in use never."""
    busy = await pool.lease("a", make)
    for key in ("b", "c", "b"):
        await use(pool, key, make)

    await use(pool, "d", make)
    await settle()

    assert make.closed == [0, 0, 1, 0]
    assert len(pool) == 3
    await busy.release()
    assert await use(pool, "a", make) is make.made[0]


async def test_a_long_call_counts_as_use_until_its_end(
    pool: Pool[Client], make: Factory
) -> None:
    """A client whose call has just ended is not the one unused for longest."""
    long_call = await pool.lease("a", make)
    for key in ("b", "c"):
        await use(pool, key, make)
    await long_call.release()

    await use(pool, "d", make)
    await settle()

    assert make.closed == [0, 1, 0, 0]


async def test_clients_beyond_the_limit_close_when_their_calls_end(
    pool: Pool[Client], make: Factory
) -> None:
    """More clients than the limit may be in use, but not idle."""
    leases = [await pool.lease(key, make) for key in range(5)]
    assert len(pool) == 5

    for lease in leases:
        await lease.release()
    await settle()

    assert make.closed == [1, 1, 0, 0, 0]


async def test_a_client_about_to_close_is_not_handed_out(
    pool: Pool[Client], make: Factory, slow: Factory
) -> None:
    """A call that comes between the decision to close a client and that gets another."""
    for key in ("a", "b", "c"):
        await use(pool, key, make)
    (caller,) = await ask(pool, "d", slow)
    slow.gate.set()
    await asyncio.sleep(0)

    client = await use(pool, "a", make)

    assert client is make.made[3]
    assert make.closed[0] == 1
    await (await caller).release()


async def test_many_keys_at_once_are_made_once_each(
    pool: Pool[Client], slow: Factory
) -> None:
    """A client that was just made is not thrown out before its caller has it."""
    tasks = [asyncio.create_task(pool.lease(key, slow)) for key in range(200)]
    await settle()

    slow.gate.set()
    leases = await asyncio.gather(*tasks)

    assert slow.calls == 200
    assert all(client.closings == 0 for client in slow.made)
    await asyncio.gather(*(lease.release() for lease in leases))
    await settle()
    assert len(pool) == 3
    assert sum(slow.closed) == 197


# --- closing the pool --------------------------------------------------------------


async def test_after_aclose_nothing_is_left(pool: Pool[Client], make: Factory) -> None:
    """No client, task or timer outlives `aclose`, which may be called twice."""
    threads = threading.active_count()
    for key in range(3):
        await use(pool, key, make)

    await pool.aclose()
    await pool.aclose(grace=1)

    assert make.closed == [1, 1, 1]
    assert len(pool) == 0
    assert left_over() == []
    assert threading.active_count() == threads


async def test_a_closed_pool_makes_no_client(pool: Pool[Client], make: Factory) -> None:
    """A lease after `aclose` is an error that no retry would cure."""
    await pool.aclose()

    with pytest.raises(ServiceUnavailableError, match="closed") as caught:
        await pool.lease("key", make)

    assert not caught.value.retryable
    assert make.calls == 0


async def test_aclose_waits_for_calls(
    pool: Pool[Client], make: Factory, pass_time: PassTime
) -> None:
    """Within the grace a call goes on and no other begins; idle clients close."""
    lease = await pool.lease("busy", make)
    await use(pool, "idle", make)
    closing = asyncio.create_task(pool.aclose(grace=5))
    await settle()
    await pass_time(4)

    assert make.closed == [0, 1]
    with pytest.raises(ServiceUnavailableError, match="closed"):
        await pool.lease("busy", make)
    assert not closing.done()
    await lease.release()
    await closing
    assert make.closed == [1, 1]


async def test_aclose_closes_under_calls_when_the_grace_is_over(
    pool: Pool[Client], make: Factory, pass_time: PassTime
) -> None:
    """Past the grace a client closes though it is in use, and only once."""
    lease = await pool.lease("key", make)
    closing = asyncio.create_task(pool.aclose(grace=5))
    await settle()
    await pass_time(6)

    await closing
    await lease.release()

    assert make.closed == [1]
    assert make.made[0].closings == 1
    assert left_over() == []


async def test_two_acloses_at_once_both_end_with_everything_closed(
    pool: Pool[Client], make: Factory
) -> None:
    """The second does not return before the clients are closed, and may be harsher."""
    lease = await pool.lease("key", make)
    patient = asyncio.create_task(pool.aclose(grace=60))
    await settle()

    await pool.aclose(grace=0)

    assert make.closed == [1]
    await patient
    await lease.release()
    assert make.closed == [1]


async def test_a_cancelled_aclose_can_be_called_again(
    pool: Pool[Client], make: Factory
) -> None:
    """Cancelling it during the grace loses no client."""
    lease = await pool.lease("key", make)
    patient = asyncio.create_task(pool.aclose(grace=60))
    await settle()
    patient.cancel()
    await settle()
    assert make.closed == [0]

    await pool.aclose()

    assert make.closed == [1]
    await lease.release()


async def test_a_client_made_during_the_grace_serves_its_callers(
    pool: Pool[Client], slow: Factory
) -> None:
    """A call that already waits when `aclose` begins is a call in flight."""
    (caller,) = await ask(pool, "key", slow)
    closing = asyncio.create_task(pool.aclose(grace=60))
    await settle()

    slow.gate.set()
    lease = await caller
    await settle()

    assert slow.closed == [0]
    assert not closing.done()
    await lease.release()
    await closing
    assert slow.closed == [1]
    assert left_over() == []


@pytest.mark.parametrize("deaf", [False, True])
async def test_a_client_that_comes_too_late_is_given_to_nobody(
    pool: Pool[Client], slow: Factory, deaf: bool
) -> None:
    """Without grace a making is cancelled; a client that comes all the same closes."""
    slow.deaf = deaf
    callers = await ask(pool, "key", slow, 2)

    await pool.aclose()

    assert slow.closed == [1] * deaf
    got = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(exc) for exc in got] == [ServiceUnavailableError] * 2
    assert "closed" in str(got[0])
    assert left_over() == []


# --- the end of the loop -----------------------------------------------------------


class StopError(Exception):
    """What ends a program in a test."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run as most programs do."""
    asyncio.run(main)


def run_in_a_runner(main: Coroutine[Any, Any, None]) -> None:
    """Run as frameworks do, in two steps on one loop."""
    with asyncio.Runner() as runner:
        runner.run(asyncio.sleep(0))
        runner.run(main)


def run_by_hand(main: Coroutine[Any, Any, None]) -> None:
    """Run as programs did before `asyncio.run`."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def return_normally() -> None:
    """End well."""


async def fail() -> None:
    """End with an error."""
    raise StopError


async def be_cancelled() -> None:
    """End by cancellation."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize("runner", [run, run_in_a_runner, run_by_hand])
@pytest.mark.parametrize("end", [return_normally, fail, be_cancelled])
def test_a_loop_that_ends_without_aclose_closes_its_clients(
    runner: Callable[[Coroutine[Any, Any, None]], None],
    end: Callable[[], Coroutine[Any, Any, None]],
    make: Factory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever ends the program, idle and leased clients close on their loop."""
    pool: Pool[Client] = Pool()

    async def main() -> None:
        await use(pool, "idle", make)
        async with await pool.lease("in use", make):
            await pool.lease("never given back", make)
            await end()

    for _ in range(2):
        with contextlib.suppress(StopError, asyncio.CancelledError):
            runner(main())

    assert make.closed == [1] * 6
    assert len(pool) == 0
    assert caplog.records == []


def test_a_loop_that_ends_while_a_client_closes_still_closes_it(
    make: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelling all tasks at the end of the loop also cancels what closes a client."""
    pool: Pool[Client] = Pool(max_clients=1)

    async def main() -> None:
        await use(pool, "a", make)
        await use(pool, "b", make)
        await asyncio.sleep(0)
        assert make.made[0].closings == 1

    asyncio.run(main())

    assert make.closed == [1, 1]
    assert caplog.records == []


def test_a_loop_that_ends_while_a_client_is_made_leaves_none(slow: Factory) -> None:
    """A making that the end of the loop cancels leaves no client behind."""
    pool: Pool[Client] = Pool()

    async def main() -> None:
        await ask(pool, "key", slow, 3)

    asyncio.run(main())

    assert slow.calls == 1
    assert slow.made == []
    assert len(pool) == 0


def test_each_loop_has_its_own_client(make: Factory) -> None:
    """Loops in a row share a pool, never a client."""
    pool: Pool[Client] = Pool()

    async def main() -> Client:
        client = await use(pool, "key", make)
        assert await use(pool, "key", make) is client
        return client

    clients = [asyncio.run(main()) for _ in range(3)]

    assert clients == make.made
    assert make.closed == [1, 1, 1]


@pytest.mark.parametrize("close", [True, False])
def test_a_loop_that_has_ended_can_be_collected(make: Factory, close: bool) -> None:
    """The pool keeps no loop alive, closed by `aclose` or by the loop's end."""
    pool: Pool[Client] = Pool()

    async def main() -> weakref.ref[asyncio.AbstractEventLoop]:
        await use(pool, "key", make)
        if close:
            await pool.aclose()
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(main())
    assert make.closed == [1]
    make.made.clear()  # a client knows its loop
    gc.collect()

    assert loop() is None


def test_a_loop_that_was_just_dropped_is_forgotten_with_the_next_use(
    make: Factory,
) -> None:
    """A loop closed without closing its generators is let go of, if late."""
    pool: Pool[Client] = Pool()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(pool, "key", make))
    loop.close()
    dropped = weakref.ref(loop)
    del loop

    asyncio.run(use(pool, "key", make))
    make.made.clear()
    gc.collect()

    assert dropped() is None


# --- several threads ---------------------------------------------------------------


@dataclass
class Elsewhere:
    """A loop in a thread of its own, that runs until it is told to stop."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    tidy: bool = True
    """Whether it ends as `asyncio.run` does, or is just closed."""

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def _run(self) -> None:
        self.loop.run_forever()
        if self.tidy:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()

    async def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something there and wait for it here."""
        done = asyncio.run_coroutine_threadsafe(work, self.loop)
        return await asyncio.wrap_future(done)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Run a second loop in a second thread."""
    with Elsewhere() as other:
        yield other


def test_loops_in_threads_each_have_a_client(make: Factory) -> None:
    """Threads that use one pool at once do not get in each other's way."""
    pool: Pool[Client] = Pool()
    start = threading.Barrier(8)
    clients: list[set[int]] = []

    async def main() -> None:
        start.wait()
        leases = await asyncio.gather(*(pool.lease("key", make) for _ in range(50)))
        clients.append({id(lease.client) for lease in leases})
        await asyncio.gather(*(lease.release() for lease in leases))

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [len(used) for used in clients] == [1] * 8
    assert len(set.union(*clients)) == 8
    assert make.closed == [1] * 8
    assert len(pool) == 0


async def test_aclose_closes_the_clients_of_other_threads_on_their_loops(
    pool: Pool[Client], make: Factory, elsewhere: Elsewhere
) -> None:
    """`aclose` in one thread waits for the calls of another and ends new ones there."""
    await use(pool, "key", make)
    lease = await elsewhere.do(pool.lease("key", make))
    closing = asyncio.create_task(pool.aclose(grace=30))
    async with asyncio.timeout(30):
        while make.closed != [1, 0]:  # noqa: ASYNC110 - another thread closes none yet
            await asyncio.sleep(0.01)

    with pytest.raises(ServiceUnavailableError):
        await elsewhere.do(pool.lease("key", make))
    assert not closing.done()
    await elsewhere.do(lease.release())
    await closing

    assert make.closed == [1, 1]
    assert len(pool) == 0


async def test_aclose_closes_under_calls_of_other_threads(
    pool: Pool[Client], make: Factory, elsewhere: Elsewhere
) -> None:
    """The grace holds for other threads too."""
    lease = await elsewhere.do(pool.lease("key", make))

    await pool.aclose(grace=0.05)

    assert make.closed == [1]
    await elsewhere.do(lease.release())
    assert make.closed == [1]


@pytest.mark.parametrize("tidy", [True, False])
async def test_aclose_does_not_hang_on_a_loop_that_ends_meanwhile(
    pool: Pool[Client], make: Factory, tidy: bool
) -> None:
    """A thread that ends during the grace closes its clients, or dies with them."""
    with Elsewhere(tidy=tidy) as other:
        await other.do(pool.lease("key", make))
        closing = asyncio.create_task(pool.aclose(grace=30))
        await asyncio.sleep(0.02)

    await asyncio.wait_for(closing, 10)

    assert make.closed == [int(tidy)]


async def test_aclose_does_not_wait_for_a_loop_that_is_stuck(
    pool: Pool[Client],
    make: Factory,
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A thread that blocks its loop is given up on; it closes its clients later."""
    monkeypatch.setattr(pool_module, "_LOOP_TIMEOUT", 0.05)
    await elsewhere.do(use(pool, "key", make))
    unblock = threading.Event()
    elsewhere.loop.call_soon_threadsafe(unblock.wait, 60)

    async with asyncio.timeout(30):
        await pool.aclose()

    assert "did not close" in caplog.text
    assert make.closed == [0]
    unblock.set()
    await elsewhere.do(settle())
    assert make.closed == [1]


async def test_a_loop_that_stands_still_closes_its_clients_when_it_runs_again(
    pool: Pool[Client], make: Factory
) -> None:
    """A loop that is not running is not waited for, and not used after `aclose`."""

    async def lease() -> None:
        await pool.lease("key", make)

    def run_here(loop: asyncio.AbstractEventLoop, work: Any) -> Any:
        return loop.run_until_complete(work)

    loop = asyncio.new_event_loop()
    await asyncio.to_thread(run_here, loop, use(pool, "key", make))

    async with asyncio.timeout(10):
        await pool.aclose(grace=30)

    assert make.closed == [0]
    with pytest.raises(ServiceUnavailableError):
        await asyncio.to_thread(run_here, loop, lease())
    await asyncio.to_thread(run_here, loop, settle())
    assert make.closed == [1]
    loop.close()


async def test_threads_that_lease_while_the_pool_closes_leak_nothing(
    make: Factory,
) -> None:
    """Every client made by any thread around `aclose` is closed, exactly once."""
    pool: Pool[Client] = Pool(max_clients=2)
    started = threading.Barrier(5)

    async def calls() -> None:
        started.wait()
        with contextlib.suppress(ServiceUnavailableError):
            for i in itertools.count():
                await use(pool, i % 5, make)
                await asyncio.sleep(0)

    threads = [threading.Thread(target=asyncio.run, args=(calls(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(started.wait)
    await asyncio.sleep(0.05)

    await pool.aclose(grace=5)

    assert set(make.closed) == {1}
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert set(make.closed) == {1}
    assert len(pool) == 0


# --- any order of events -----------------------------------------------------------


@dataclass(eq=False)
class Making:
    """A client that is being made or was made, as the model sees it."""

    key: tuple[str, int]
    gate: asyncio.Future[None]
    client: Client | None = None
    made_at: float = 0.0
    used: int = 0
    """When it was made, or the last call with it ended."""


@dataclass(eq=False)
class Caller:
    """A call: waiting for its client, or holding it."""

    making: Making
    task: asyncio.Task[Lease[Client]]
    lease: Lease[Client] | None = None


class PoolMachine(RuleBasedStateMachine):
    """Does things to a pool in any order, and holds it against a simple model."""

    TTL = 100.0
    MAX = 2
    complaints: ClassVar[list[dict[str, Any]]] = []
    """What the loops of all runs would have logged."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.now  # type: ignore[method-assign]
        self.loop.set_exception_handler(lambda _, what: self.complaints.append(what))
        self.pool: Pool[Client] = Pool(ttl=self.TTL, max_clients=self.MAX)
        self.generation = 0
        self.count = itertools.count(1)
        self.being_made: dict[tuple[str, int], Making] = {}
        self.made: list[Making] = []
        self.callers: list[Caller] = []
        self.grace_ends: float | None = None
        self.closing: asyncio.Task[None] | None = None

    # --- what the model knows

    def calls_of(self, making: Making) -> list[Caller]:
        """Return who waits for a client or holds it."""
        return [caller for caller in self.callers if caller.making is making]

    def expired(self, making: Making) -> bool:
        """Say whether its time to live is over."""
        return self.now >= making.made_at + self.TTL

    def current(self, key: tuple[str, int]) -> Making | None:
        """The client that a new call with this key has to get."""
        for making in self.made:
            client = making.client
            usable = client is not None and not client.closings
            if making.key == key and usable and not self.expired(making):
                return making
        return None

    def settle(self) -> None:
        """Let the pool run, and look at what callers got."""
        self.loop.run_until_complete(settle())
        for caller in list(self.callers):
            if caller.lease is None and caller.task.done():
                self.take(caller)

    def take(self, caller: Caller) -> None:
        """Note how a caller's wait ended."""
        making = caller.making
        if caller.task.cancelled() or caller.task.exception() is not None:
            self.callers.remove(caller)
            return
        caller.lease = caller.task.result()
        assert caller.lease.client is making.client
        assert not caller.lease.client.closings, "a closed client was handed out"

    # --- what may happen

    @rule(name=st.sampled_from("ab"))
    def ask(self, name: str) -> None:
        """Begin a call."""
        key = (name, self.generation)
        expected = self.current(key) or self.being_made.get(key)
        started: list[Making] = []

        async def make() -> Client:
            making = Making(key, self.loop.create_future())
            started.append(making)
            await making.gate
            making.client = Client()
            making.made_at = self.now
            return making.client

        task = self.loop.create_task(self.pool.lease(key, make))
        self.loop.run_until_complete(settle())
        if self.closing is not None:
            assert isinstance(task.exception(), ServiceUnavailableError)
            return
        assert len(started) == (expected is None), "made twice, or not at all"
        if expected is None:
            (expected,) = started
            self.being_made[key] = expected
        caller = Caller(expected, task)
        self.callers.append(caller)
        self.settle()

    @precondition(lambda self: self.being_made)
    @rule(data=st.data(), fails=st.booleans())
    def finish_making(self, data: st.DataObject, fails: bool) -> None:
        """Make a client that is waited for, or fail to."""
        making = data.draw(st.sampled_from(list(self.being_made.values())))
        waiting = self.calls_of(making)
        del self.being_made[making.key]
        if fails:
            making.gate.set_exception(OSError("no route"))
        else:
            making.gate.set_result(None)
            making.used = next(self.count)
            self.made.append(making)
        self.settle()
        if fails:
            assert all(isinstance(c.task.exception(), OSError) for c in waiting)
        else:
            assert all(caller.lease is not None for caller in waiting)

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def end_call(self, data: st.DataObject) -> None:
        """Give a client back, or cancel the wait for it."""
        caller = data.draw(st.sampled_from(self.callers))
        self.callers.remove(caller)
        caller.making.used = next(self.count)
        if caller.lease is None:
            caller.task.cancel()
            self.settle()
            assert caller.task.cancelled()
        else:
            task = self.loop.create_task(caller.lease.release())
            self.settle()
            assert task.done()

    @rule(seconds=st.sampled_from([1.0, 60.0, TTL]))
    def pass_time(self, seconds: float) -> None:
        """Turn the clock forward."""
        self.now += seconds
        self.settle()
        if self.grace_ends is not None and self.now >= self.grace_ends:
            self.being_made.clear()

    @rule()
    def rotate_keys(self) -> None:
        """Let later calls come with other keys."""
        self.generation += 1

    @precondition(lambda self: self.closing is None)
    @rule(grace=st.sampled_from([0.0, 30.0]))
    def close(self, grace: float) -> None:
        """Begin to close the pool."""
        self.grace_ends = self.now + grace
        self.closing = self.loop.create_task(self.pool.aclose(grace))
        self.pass_time(0.0)

    # --- what must hold

    @invariant()
    def no_client_closes_twice(self) -> None:
        """A client closes once."""
        assert all(m.client is None or m.client.closings <= 1 for m in self.made)

    @invariant()
    def clients_close_when_they_should(self) -> None:
        """A client closes when nobody uses it and nobody will, and not before."""
        over = self.grace_ends is not None and self.now >= self.grace_ends
        live = [m for m in self.made if m.client and not m.client.closings]
        fresh = [m for m in live if not self.expired(m)]
        idle = [m for m in fresh if not self.calls_of(m)]
        for making in self.made:
            assert making.client is not None
            gone = bool(making.client.closed)
            if over:
                assert gone, "open after the grace"
            elif self.calls_of(making):
                assert not gone, "closed under a call"
            elif self.closing is not None or self.expired(making):
                assert gone, "idle, and neither closed nor of use"
            elif gone:
                older = [m for m in idle if m.used < making.used]
                assert not older, "an idle one was kept that is unused for longer"
        assert not idle or len(fresh) <= self.MAX, "idle ones beyond the limit"
        keys = [making.key for making in fresh]
        assert len(keys) == len(set(keys)), "two live clients of one key"
        assert len(self.pool) == len(live)

    @invariant()
    def nothing_is_reported(self) -> None:
        """The loop has nothing to complain about."""
        assert self.complaints == []

    def teardown(self) -> None:
        """Close the pool; nothing is left."""
        if self.closing is None:
            self.close(0.0)
        assert self.grace_ends is not None
        self.pass_time(max(0.0, self.grace_ends - self.now))
        assert self.closing is not None
        assert self.closing.done()
        self.closing.result()
        self.clients_close_when_they_should()
        assert not asyncio.all_tasks(self.loop)
        timers = [t for t in vars(self.loop)["_scheduled"] if not t.cancelled()]
        assert timers == []
        self.loop.close()


def test_any_order_of_events_leaves_the_pool_right() -> None:
    """Lease, fail, cancel, release, expire, rotate and close, in any order."""
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=150,
            stateful_step_count=25,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    gc.collect()
    assert PoolMachine.complaints == []
