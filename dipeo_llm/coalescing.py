"""Identical calls in flight become one: in a process, and across processes.

In a process the call runs in a task of its own, which ends when the last caller has
left. Across processes, redis-py's lock lets one process at a time fetch an answer; the
others look for it in the cache.
"""

import asyncio
import copy
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from dipeo_llm.domain import ChatResult, StreamChunk, TokenUsage
from dipeo_llm.errors import CallError, ServiceUnavailableError
from dipeo_llm.progress import CallProgress
from dipeo_llm.redis_clients import RedisClients, RedisUnavailableError
from dipeo_llm.streaming import Items, Opened

_log = logging.getLogger("dipeo_llm")

Result = ChatResult[Any]
Start = Callable[[CallProgress], Awaitable[Opened]]
"""Opens a stream."""
Work = Callable[[CallProgress], Awaitable[Result]]


class _Flight:
    """One call that several callers wait for."""

    def __init__(self, first: CallProgress, work: Work) -> None:
        self.progress = first.branch()
        """What happens in the work. Its deadline is the latest of the callers'."""
        self.ends: list[float | None] = []
        self.is_taken = False
        """Whether a caller has taken the result as its own, with its cost."""
        # A running task is referenced by its flight, and the flight by its callers.
        self.task = asyncio.ensure_future(work(self.progress))
        self.task.add_done_callback(_retrieve)

    def join(self, caller: CallProgress) -> None:
        self.ends.append(caller.ends)
        self.progress.ends = _latest(self.ends)

    def leave(self, caller: CallProgress) -> None:
        self.ends.remove(caller.ends)
        self.progress.ends = _latest(self.ends)


def _latest(ends: Sequence[float | None]) -> float | None:
    """Return the latest deadline, None if one has none."""
    known = [end for end in ends if end is not None]
    return max(known, default=None) if len(known) == len(ends) else None


def _retrieve(task: "asyncio.Future[Any]") -> None:
    """Keep asyncio from logging a failure that no caller has waited for."""
    if not task.cancelled():
        task.exception()


class Flights:
    """The calls in flight, by what they ask for. Two event loops share none."""

    def __init__(self) -> None:
        self._loops: WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[Hashable, _Flight]
        ] = WeakKeyDictionary()

    def __contains__(self, identity: Hashable) -> bool:
        """Say whether there is such a call in flight on this event loop."""
        return identity in self._here()

    def __len__(self) -> int:
        """Return the number of calls in flight on this event loop."""
        return len(self._here())

    async def run(self, identity: Hashable, caller: CallProgress, work: Work) -> Result:
        """Return the result of *work*, which runs once for all who ask meanwhile.

        A caller that is cancelled, or whose deadline ends, leaves the others alone; the
        last to leave cancels the work and waits until it has ended. One caller gets the
        result with its cost, the others one that says that it cost nothing.

        Raises:
            Exception: As *work* does; each caller gets an object of its own.
        """
        flights = self._here()
        flight = flights.get(identity)
        is_first = flight is None
        if flight is None:
            flight = flights[identity] = _Flight(caller, work)
            flight.task.add_done_callback(lambda _: _forget(flights, identity, flight))
        flight.join(caller)
        try:
            await asyncio.wait([flight.task])
        except asyncio.CancelledError:
            if len(flight.ends) == 1:
                _forget(flights, identity, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])
            raise
        finally:
            flight.leave(caller)
            if is_first:
                caller.follow(flight.progress)
            if not flight.ends:
                # The error's traceback refers to the progress.
                flight.progress.last = None
        if flight.task.cancelled():
            raise ServiceUnavailableError("the call that was shared was cancelled")
        if (error := flight.task.exception()) is not None:
            raise _copy_error(error, is_first=is_first) from error.__cause__
        return _take(flight, flight.task.result(), caller)

    def _here(self) -> dict[Hashable, _Flight]:
        return self._loops.setdefault(asyncio.get_running_loop(), {})


def _forget(
    flights: dict[Hashable, _Flight], identity: Hashable, flight: _Flight
) -> None:
    if flights.get(identity) is flight:
        del flights[identity]


def _copy_error(error: BaseException, *, is_first: bool) -> BaseException:
    made = copy.copy(error)
    if isinstance(made, CallError):
        made.details = dict(made.details)
        made.attempts = made.attempts if is_first else 0
    return made


def _take(
    shared: "_Flight | _SharedStream", result: Result, caller: CallProgress
) -> Result:
    """Give a caller its own result: the first one with its cost."""
    if shared.is_taken:
        return as_cached(result.model_copy(deep=True))
    shared.is_taken = True
    caller.follow(shared.progress)
    return result.model_copy(deep=True)


def as_cached(result: Result) -> Result:
    """Mark a result, in place, as one that this call did not pay for."""
    if not result.cached:
        result.original_usage = result.token_usage
        result.original_cost_usd = result.cost_usd
    result.token_usage = None if result.original_usage is None else TokenUsage()
    result.cost_usd, result.attempts, result.queued = 0.0, 0, 0.0
    result.cached, result.tried = True, []
    return result


class _SharedStream:
    """A stream that several callers read from its beginning, at the fastest's pace.

    It is read on when one of them asks for more than has arrived, and closed when the
    last has left.
    """

    def __init__(self, first: CallProgress, start: Start) -> None:
        self.progress = first.branch()
        self.ends: list[float | None] = []
        self.is_over = False
        self.is_taken = False
        self._start = start
        self._source: Items | None = None
        self._items: list[StreamChunk | Result] = []
        self._pulling: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    async def item(self, number: int) -> StreamChunk | Result:
        """Return an item, waiting for it if it has not arrived.

        Raises:
            Exception: As the stream does, again for each who asks.
        """
        while number >= len(self._items):
            if self._failure is not None:
                raise self._failure
            if self._pulling is None:
                self._pulling = asyncio.create_task(self._pull())
            await asyncio.wait([self._pulling])
        return self._items[number]

    async def aclose(self) -> None:
        """Close the connection."""
        self.is_over = True
        if self._pulling is not None:
            self._pulling.cancel()
            await asyncio.wait([self._pulling])
        if self._source is not None:
            await self._source.aclose()
        # Their tracebacks refer to this object.
        self.progress.last = self._failure = None

    async def _pull(self) -> None:
        try:
            if self._source is None:
                self._source, item = await self._start(self.progress)
            else:
                item = await anext(self._source)
            self._items.append(item)
            self.is_over = isinstance(item, ChatResult)
        except StopAsyncIteration:
            self._failure = ServiceUnavailableError("it ended without a result")
        except Exception as exc:  # noqa: BLE001 - each caller raises its own
            self._failure = exc
        finally:
            self.is_over = self.is_over or self._failure is not None
            self._pulling = None


class Streams:
    """The streams in flight, by what they ask for. Two event loops share none."""

    def __init__(self) -> None:
        self._loops: WeakKeyDictionary[
            asyncio.AbstractEventLoop, dict[Hashable, _SharedStream]
        ] = WeakKeyDictionary()

    async def read(
        self, identity: Hashable, caller: CallProgress, start: Start
    ) -> Items:
        """Yield the items of the stream that *start* opens once for all who ask.

        Who asks later gets the stream from its beginning. The first caller to reach the
        result gets it with its cost, as in `Flights.run`.
        """
        streams = self._loops.setdefault(asyncio.get_running_loop(), {})
        stream = streams.get(identity)
        is_first = stream is None or stream.is_over
        if stream is None or stream.is_over:
            stream = streams[identity] = _SharedStream(caller, start)
        stream.ends.append(caller.ends)
        stream.progress.ends = _latest(stream.ends)
        number = 0
        try:
            while True:
                try:
                    item = await stream.item(number)
                except Exception as exc:  # noqa: BLE001 - the caller raises its own
                    raise _copy_error(exc, is_first=is_first) from exc.__cause__
                finally:
                    if is_first:
                        caller.follow(stream.progress)
                number += 1
                if isinstance(item, ChatResult):
                    yield _take(stream, item, caller)
                    return
                yield copy.copy(item)
        finally:
            stream.ends.remove(caller.ends)
            stream.progress.ends = _latest(stream.ends)
            if stream.ends or stream.is_taken:
                # The usage belongs to a caller that reads on, or that has the result.
                caller.watch_usage(None)
            is_done = stream.is_over or not stream.ends
            if is_done and streams.get(identity) is stream:
                del streams[identity]
            if not stream.ends:
                await stream.aclose()


class Turns:
    """Lets one process at a time fetch an answer, through locks in Redis.

    Args:
        redis: The server that the processes share.
        lease: Seconds after which the lock of a process that has died or stopped is
            free; a process that works renews it at a third of that.
        limit: Seconds after which a lock is not renewed any more.
    """

    def __init__(
        self, redis: RedisClients, *, lease: float = 9.0, limit: float = 1800.0
    ) -> None:
        self._redis = redis
        self._lease = lease
        self._limit = limit

    @asynccontextmanager
    async def take(
        self, key: str, find: Callable[[], Awaitable[Result | None]]
    ) -> "AsyncIterator[Turn]":
        """Wait for the turn of this process, or for another process' answer.

        Where Redis fails, and where the process before found that its answer cannot be
        kept, the turn comes at once. The wait has no limit but the caller's.

        Args:
            key: Of the answer.
            find: Looks for the answer in the cache.
        """
        turn = Turn()
        lock = None
        try:
            while (lock := await self._try(key)) is None:
                await asyncio.sleep(random.uniform(0.02, 0.06))  # noqa: S311
                if (found := await find()) is not None:
                    turn.found = found
                    break
        except RedisUnavailableError:
            _log.debug("Redis has no lock for a shared call")
        if lock is None or lock is _NOT_NEEDED:
            yield turn
            return
        renewing = asyncio.create_task(self._renew(lock))
        try:
            # The process before may have stored it since this one looked; a cache that
            # cannot be read is logged by its circuit.
            with suppress(RedisUnavailableError):
                turn.found = await find()
            yield turn
        except Exception:
            turn.is_kept = False
            raise
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])
            await self._release(key, lock, is_kept=turn.is_kept)

    async def _try(self, key: str) -> Any:
        """Return the lock, None if another process holds it, or that none is needed."""
        from redis.asyncio.lock import Lock

        name = f"{self._redis.namespace}:lock:{key}"

        async def acquire(cache: Any) -> Any:
            lock = Lock(cache.client, name, timeout=self._lease, thread_local=False)
            if await lock.acquire(blocking=False):
                return lock
            return _NOT_NEEDED if await cache.exists(f"alone:{key}") else None

        return await self._redis.use(self._redis.locks, acquire)

    async def _renew(self, lock: Any) -> None:
        from redis.exceptions import LockError

        async def reacquire(_: Any) -> bool:
            try:
                return bool(await lock.reacquire())
            except LockError:  # another process holds it: this one was stopped for long
                return False

        loop = asyncio.get_running_loop()
        ends = loop.time() + self._limit
        is_held = True
        while is_held and loop.time() < ends:
            await asyncio.sleep(self._lease / 3)
            try:
                is_held = await self._redis.use(self._redis.locks, reacquire)
            except RedisUnavailableError:
                continue  # logged by the circuit; it may be back before the lease ends

    async def _release(self, key: str, lock: Any, *, is_kept: bool) -> None:
        from redis.exceptions import LockError

        async def release(cache: Any) -> None:
            if not is_kept:
                # Otherwise the processes that wait would call one after the other.
                await cache.set(f"alone:{key}", b"1", ttl=_ALONE)
            try:
                await lock.release()
            except LockError:
                _log.debug("the lock of a shared call had run out")

        try:
            await self._redis.use(self._redis.locks, release)
        except RedisUnavailableError:
            _log.debug("the lock of a shared call runs out by itself")


class Turn:
    """What a process found when its turn came."""

    def __init__(self) -> None:
        self.found: Result | None = None
        """The answer, if another process has stored it."""
        self.is_kept = True
        """Whether the cache holds the answer now; to be set to False if it does not."""


_NOT_NEEDED = object()
_ALONE = 2.0
"""Seconds for which processes do not wait after an answer that is not kept."""
