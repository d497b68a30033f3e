"""Requests and tokens per minute: each call waits until its deployment has room for it.

The minute slides: it is cut into 60 buckets, and a bucket counts until 60 whole ones have
passed after it. Memory holds the window of this process. With Redis, one script reserves,
corrects and reads the window of all processes, by the clock of Redis.
"""

import asyncio
import logging
import math
import random
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    Callable,
    Collection,
    Coroutine,
    Sequence,
)
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Self
from weakref import WeakKeyDictionary, WeakSet

from dipeo_llm.errors import InvalidRequestError, RateLimitError
from dipeo_llm.redis_clients import Circuit, RedisClients, RedisUnavailableError

_log = logging.getLogger("dipeo_llm")

_BUCKETS = 60
_KEPT = _BUCKETS + 1
"""Buckets that count: the current one, and all that a full window before it touches."""
_BATCH = 100
"""The most calls that one script reserves."""
_FORECAST_STEPS = 64
"""The most calls of a line, on average, that are looked at to refuse one."""
_LOOKS = 5
"""Buckets after which a call looks whether the event loop of the one before it runs."""
_CLOCK_ERROR = 1_000_000
"""Microseconds that Redis' clock may go back before its answers count as newer."""
_LINES = 64
"""Deployments from which on idle ones are forgotten."""
_CLOSE_TIME = 2.0
"""Seconds that `aclose` waits."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a deployment allows; None is no limit.

    Raises:
        ValueError: A limit is below 1.
    """

    rpm: int | None = None
    """Requests per minute."""
    tpm: int | None = None
    """Tokens per minute."""

    def __post_init__(self) -> None:
        for name, value in (("rpm", self.rpm), ("tpm", self.tpm)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be above 0, or None; got {value!r}")


class Reservation:
    """The room that a call has in the window. Only the first correction counts."""

    __slots__ = ("_correct", "_tokens", "queued")

    def __init__(
        self, correct: Callable[[int, int], None], tokens: int, queued: float
    ) -> None:
        self._correct: Callable[[int, int], None] | None = correct
        self._tokens = tokens
        self.queued = queued
        """Seconds that the call waited for it."""

    def settle(self, tokens: int | None) -> None:
        """Count the tokens that the call really used; None keeps the estimate."""
        correct, self._correct = self._correct, None
        if correct is not None and tokens is not None:
            correct(0, max(tokens, 0) - self._tokens)

    def refund(self) -> None:
        """Give the request and its tokens back: nothing was sent."""
        correct, self._correct = self._correct, None
        if correct is not None:
            correct(-1, -self._tokens)


class RateLimits:
    """Keeps calls within the limits of their deployments.

    Safe for several event loops and threads. Calls of one deployment get their turn in the
    order in which they asked this process.

    Args:
        redis: The server that holds the windows of all processes. While it fails, each
            process keeps to its own window.
        window: Seconds of a "minute"; shorter in tests.
    """

    def __init__(
        self, redis: RedisClients | None = None, *, window: float = 60.0
    ) -> None:
        self.circuit = Circuit("shared limits")
        self._redis = redis
        self._span = math.ceil(window * 1e6 / _BUCKETS)
        # Reentrant: the garbage collector may end a call while this thread holds it.
        self._lock = threading.RLock()
        self._lines: dict[str, _Line] = {}
        self._most_lines = _LINES
        self._tasks: set[asyncio.Task[None]] = set()
        self._keepers: WeakKeyDictionary[
            asyncio.AbstractEventLoop, AsyncGenerator[None, None]
        ] = WeakKeyDictionary()
        self._ended: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
        self._script: Any = None

    async def reserve(
        self,
        name: str,
        limit: Limit,
        tokens: int,
        *,
        ends: float | None = None,
        wait: bool = True,
    ) -> Reservation:
        """Wait for a turn, and reserve one request and some tokens.

        Args:
            name: Of the deployment.
            limit: Of the deployment.
            tokens: An estimate; correct it with `Reservation.settle`.
            ends: The latest time on the loop's clock; None waits as long as it takes.
            wait: False raises if there is no room now.

        Raises:
            RateLimitError: There is no room now, or not before *ends*; `retry_after` says
                when there could have been.
            InvalidRequestError: The call has more tokens than the limit.
        """
        _check(name, limit, tokens)
        waiter = _Waiter(limit, tokens, ends)
        if not wait:
            waiter.latest = waiter.begun
        is_shared = self._is_shared(limit)
        with self._lock:
            line = self._find(name)
            turn = line.turn(waiter, waiter.begun)
            if waiter.is_late(turn):
                raise _refuse(line, waiter, turn)
            if not (is_shared or line.waiters) and turn <= waiter.begun:
                return self._grant(line, waiter, turn)
            if wait:
                line.append(waiter)
        try:
            if not wait:
                # It does not queue: those that are in the line are being served.
                asking = self._start(self._ask(line, [waiter]))
                await asyncio.wait([asking])
                asking.result()
                if waiter.reservation is None:
                    raise _refuse(line, waiter, line.ready(waiter, _now()))
            while waiter.reservation is None:
                with self._lock:
                    again = self._drive(line, waiter, is_shared=is_shared)
                if waiter.reservation is None:
                    await waiter.sleep(again)
        except BaseException:
            self._leave(line, waiter)
            raise
        return waiter.reservation

    async def wait_time(self, name: str, limit: Limit, tokens: int) -> float:
        """Return the seconds until such a call could be sent: 0.0 now, `inf` never.

        Reserves nothing.
        """
        if limit.tpm is not None and tokens > limit.tpm:
            return math.inf
        waiter = _Waiter(limit, tokens, None)
        waiter.latest = waiter.begun
        with self._lock:
            line = self._find(name)
            is_known = bool(line.waiters) or not self._is_shared(limit)
        if not is_known:
            try:
                await self._run_script(line, limit, [], {})
            except RedisUnavailableError:
                line.forget()
        with self._lock:
            now = _now()
            turn = line.turn(waiter, now) if line.waiters else line.ready(waiter, now)
            return (turn - now) / 1e6

    def used(self, name: str) -> tuple[int, int]:
        """Return the requests and tokens in the window, as this process last knew it."""
        with self._lock:
            if (line := self._lines.get(name)) is None:
                return 0, 0
            window = line.shared or line.own
            window.advance(_now())
            return window.all_requests, window.all_tokens

    async def aclose(self) -> None:
        """Wait until Redis knows what calls have used, for two seconds at most."""
        await self._finish(list(self._tasks))

    async def _finish(self, tasks: Collection["asyncio.Task[None]"]) -> None:
        gives_up = time.monotonic() + _CLOSE_TIME
        # A task of another event loop cannot be awaited here.
        while any(map(_is_running, tasks)) and time.monotonic() < gives_up:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def _finish_with(
        self, loop: asyncio.AbstractEventLoop
    ) -> AsyncGenerator[None, None]:
        """Let a loop end with the last correction, even if `aclose` is never called.

        `asyncio.run` closes asynchronous generators after it has cancelled all tasks.
        """
        try:
            yield
        finally:
            self._ended.add(loop)
            await self._finish([t for t in self._tasks if t.get_loop() is loop])

    def _is_shared(self, limit: Limit) -> bool:
        return self._redis is not None and limit != _NO_LIMIT

    def _find(self, name: str) -> "_Line":
        """Return the line of a deployment; from time to time, forget idle ones."""
        line = self._lines.get(name)
        if line is None:
            if len(self._lines) >= self._most_lines:
                now = _now()
                for other in list(self._lines.values()):
                    if other.is_idle(now):
                        del self._lines[other.name]
                self._most_lines = max(_LINES, 2 * len(self._lines))
            line = self._lines[name] = _Line(name, self._span)
        return line

    def _drive(
        self, line: "_Line", waiter: "_Waiter", *, is_shared: bool
    ) -> int | None:
        """Serve a line, if this call is the first in it. With the lock.

        Returns:
            When to do so again; None if the call is woken.

        Raises:
            RateLimitError: The call's turn comes too late.
        """
        if waiter.reservation is None and line.first() is waiter and not is_shared:
            self._serve(line)
        if waiter.reservation is not None:
            line.wake_first()
            return None
        now = _now()
        is_over = waiter.latest is not None and now >= waiter.latest
        if (busy := line.busy_loop(waiter)) is not None:
            if is_over:
                raise _refuse(line, waiter, max(waiter.turn, line.ready(waiter, now)))
            # Another loop may stop, and then it wakes nobody.
            looks = busy is not waiter.loop
            return waiter.no_later(now + _LOOKS * self._span if looks else None)
        ready = line.own.ready(now, waiter.limit, waiter.tokens)
        again = max(ready, line.ask_at) if is_shared else ready
        if is_shared and again <= now:
            line.asking = self._start(self._ask(line, line.batch(now)))
            line.asking.add_done_callback(lambda _: self._wake(line))
            return self._drive(line, waiter, is_shared=is_shared)
        if line.ask_at > now:  # so that Redis has just been asked
            ready = line.ready(waiter, now)
        if is_over or waiter.is_late(ready):
            raise _refuse(line, waiter, ready)
        return waiter.no_later(again)

    def _serve(self, line: "_Line") -> None:
        """Give turns by the window of this process."""
        now = _now()
        while (waiter := line.first()) is not None:
            if line.own.ready(now, waiter.limit, waiter.tokens) > now:
                return
            self._grant(line, waiter, now)

    def _grant(
        self, line: "_Line", waiter: "_Waiter", now: int, shared: int | None = None
    ) -> Reservation:
        bucket = line.own.add(now, 1, waiter.tokens)
        correct = partial(self._correct, line, waiter.loop, bucket, shared)
        queued = (now - waiter.begun) / 1e6
        waiter.reservation = Reservation(correct, waiter.tokens, queued)
        line.remove(waiter)
        waiter.wake()
        if waiter.has_left:
            waiter.reservation.refund()
        return waiter.reservation

    def _leave(self, line: "_Line", waiter: "_Waiter") -> None:
        """Take a call away that was refused or cancelled."""
        with self._lock:
            waiter.has_left = True
            if waiter.reservation is not None:
                waiter.reservation.refund()
            line.remove(waiter)
            line.is_stale = True
            line.wake_first()

    def _correct(
        self,
        line: "_Line",
        loop: asyncio.AbstractEventLoop,
        bucket: int,
        shared: int | None,
        requests: int,
        tokens: int,
    ) -> None:
        """Change what a reservation counts."""
        if not (requests or tokens):
            return
        with self._lock:
            line.own.correct(bucket, requests, tokens)
            line.is_stale = True
            if shared is not None:
                line.owe(shared, requests, tokens)
            line.wake_first()
        if shared is not None:
            self._start_settling(line, loop)

    def _start_settling(self, line: "_Line", loop: asyncio.AbstractEventLoop) -> None:
        """Let Redis know what is owed: from this loop, or from the reservation's."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            try:
                loop.call_soon_threadsafe(self._start_settling, line, loop)
            except RuntimeError:  # it is closed
                _log.debug("a reservation is not corrected: it lapses by itself")
            return
        with self._lock:
            if line.owed and not _is_running(line.settling):
                line.settling = self._start(self._settle(line))
                # Another thread may owe more while the task ends.
                line.settling.add_done_callback(
                    lambda task: self._start_settling(line, task.get_loop())
                )

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start a task that the cancellation of a caller does not reach."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _take_owed(self, line: "_Line") -> dict[int, list[int]]:
        with self._lock:
            owed, line.owed = line.owed, {}
        return owed

    async def _settle(self, line: "_Line") -> None:
        try:
            while owed := self._take_owed(line):
                await self._run_script(line, _NO_LIMIT, [], owed)
        except RedisUnavailableError:
            _log.debug("reservations are not corrected: they lapse by themselves")

    async def _ask(self, line: "_Line", batch: Sequence["_Waiter"]) -> None:
        """Give turns by the window in Redis; by that of this process if Redis fails."""
        needs = [waiter.tokens for waiter in batch]
        try:
            granted, bucket = await self._run_script(
                line, batch[0].limit, needs, self._take_owed(line)
            )
        except RedisUnavailableError:
            with self._lock:
                line.forget()
                self._serve(line)
                now = _now()
                if not batch[0].is_queued and line.turn(batch[0], now) <= now:
                    self._grant(line, batch[0], now)
            return
        with self._lock:
            now = _now()
            for waiter in batch[:granted]:
                self._grant(line, waiter, now, bucket)
            if batch[0].is_queued:
                line.ask_at = 0
                if granted < len(batch):
                    line.ask_at = self._next_look(line, batch[granted], now)

    def _wake(self, line: "_Line") -> None:
        with self._lock:
            line.is_stale = True
            line.wake_first()

    def _next_look(self, line: "_Line", waiter: "_Waiter", now: int) -> int:
        ready = line.ready(waiter, now)
        # Sooner than that: another process may give room back. Not all at once.
        look = min(ready, now + self._span)
        look += random.randrange(self._span // 20 + 2)  # noqa: S311
        if waiter.latest is not None and ready <= waiter.latest:
            look = min(look, waiter.latest)
        return look

    async def _run_script(
        self,
        line: "_Line",
        limit: Limit,
        needs: Sequence[int],
        owed: dict[int, list[int]],
    ) -> tuple[int, int]:
        """Correct the window in Redis, and reserve what has room of *needs*, in order.

        Returns:
            How many of *needs* are reserved, and in which bucket.

        Raises:
            RedisUnavailableError: As `RedisClients.use`.
        """
        redis = self._redis
        assert redis is not None  # noqa: S101 - only shared limits run it
        loop = asyncio.get_running_loop()
        if loop in self._ended:
            raise RedisUnavailableError
        if loop not in self._keepers:
            self._keepers[loop] = self._finish_with(loop)
            await anext(self._keepers[loop])
        key = f"{redis.namespace}:limit:{line.digest}"
        arguments: list[Any] = [
            self._span,
            math.ceil(2 * _KEPT * self._span / 1000),
            *("" if most is None else most for most in (limit.rpm, limit.tpm)),
            len(needs),
            *needs,
        ]
        for bucket, change in owed.items():
            arguments += [bucket, *change]

        async def run(cache: Any) -> tuple[int, int]:
            if self._script is None:
                self._script = cache.client.register_script(_SCRIPT)
            granted, time, value = await self._script([key], arguments, cache.client)
            with self._lock:
                line.note(time, _now(), value)
            return granted, time // self._span

        return await redis.use(self.circuit, run)


_NO_LIMIT = Limit()


def _now() -> int:
    """Return the time in microseconds: integers, so that borders are exact."""
    return int(time.monotonic() * 1e6)


def _check(name: str, limit: Limit, tokens: int) -> None:
    if limit.tpm is not None and tokens > limit.tpm:
        raise InvalidRequestError(
            f"a call of {tokens} tokens never fits the limit of {name}, whose tpm is"
            f" {limit.tpm}: send less, or raise tpm"
        )


def _is_running(task: "asyncio.Task[None] | None") -> bool:
    return task is not None and not task.done() and task.get_loop().is_running()


def _refuse(line: "_Line", waiter: "_Waiter", turn: int) -> RateLimitError:
    wait = max(turn - _now(), 0) / 1e6
    limit = waiter.limit
    known = [
        f"{value} {what}"
        for value, what in ((limit.rpm, "requests"), (limit.tpm, "tokens"))
        if value is not None
    ]
    return RateLimitError(
        f"{line.name} has no room within {' and '.join(known)} per minute; it has in"
        f" {wait:.3g} s",
        retry_after=wait,
        retryable=False,
        details={"queued": (_now() - waiter.begun) / 1e6},
    )


class _Window:
    """Requests and tokens by bucket. Times are microseconds; *origin* is bucket 0."""

    __slots__ = ("all_requests", "all_tokens", "last", "origin", "requests", "span", "tokens")  # fmt: skip

    def __init__(self, span: int, origin: int = 0) -> None:
        self.span = span
        self.origin = origin
        self.last = 0
        # Rings: bucket b is in slot b % _KEPT.
        self.requests = [0] * _KEPT
        self.tokens = [0] * _KEPT
        self.all_requests = 0
        self.all_tokens = 0

    @classmethod
    def read(cls, span: int, time: int, here: int, value: bytes) -> Self:
        """Read what the script wrote, when it was *time* there and *here* here."""
        made = cls(span, here - time)
        rows = list(struct.iter_unpack("<3d", value))
        made.last = int(max([time // span, *(bucket for bucket, _, _ in rows)]))
        for bucket, requests, tokens in rows:
            made.correct(int(bucket), int(requests), int(tokens))
        return made

    def copy(self) -> "_Window":
        made = _Window.__new__(_Window)
        made.span, made.origin, made.last = self.span, self.origin, self.last
        made.requests, made.tokens = self.requests[:], self.tokens[:]
        made.all_requests, made.all_tokens = self.all_requests, self.all_tokens
        return made

    def advance(self, now: int) -> int:
        """Let go what has lapsed; return the current bucket."""
        bucket = (now - self.origin) // self.span
        if bucket > self.last:
            for passed in range(max(self.last + 1, bucket - _BUCKETS), bucket + 1):
                slot = passed % _KEPT
                self.all_requests -= self.requests[slot]
                self.all_tokens -= self.tokens[slot]
                self.requests[slot] = self.tokens[slot] = 0
            self.last = bucket
        return self.last

    def ready(self, now: int, limit: Limit, tokens: int, requests: int = 1) -> int:
        """Return when a call fits if nothing else is added: now, or a later time."""
        last = self.advance(now)
        too_many = 0 if limit.rpm is None else self.all_requests + requests - limit.rpm
        too_long = 0 if limit.tpm is None else self.all_tokens + tokens - limit.tpm
        if too_many <= 0 and too_long <= 0:
            return now
        for bucket in range(last - _BUCKETS, last):
            too_many -= self.requests[bucket % _KEPT]
            too_long -= self.tokens[bucket % _KEPT]
            if too_many <= 0 and too_long <= 0:
                last = bucket
                break
        return self.origin + (last + _KEPT) * self.span

    def add(self, now: int, requests: int, tokens: int) -> int:
        """Count something now; return its bucket."""
        bucket = self.advance(now)
        self.correct(bucket, requests, tokens)
        return bucket

    def correct(self, bucket: int, requests: int, tokens: int) -> None:
        """Change a bucket; one that has lapsed does not count any more."""
        if self.last - _BUCKETS <= bucket <= self.last:
            self.requests[bucket % _KEPT] += requests
            self.tokens[bucket % _KEPT] += tokens
            self.all_requests += requests
            self.all_tokens += tokens


class _Waiter:
    """A call that asks for its turn. Times are those of `_now`."""

    __slots__ = (
        *("_woken", "begun", "has_left", "latest", "limit", "loop", "reservation"),
        *("tokens", "turn"),
    )

    def __init__(self, limit: Limit, tokens: int, ends: float | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.limit = limit
        self.tokens = max(tokens, 0)
        self.begun = self.turn = _now()
        self.latest: int | None = None
        if ends is not None:
            self.latest = self.begun + round((ends - self.loop.time()) * 1e6)
        self.reservation: Reservation | None = None
        self.has_left = False
        self._woken: asyncio.Event | None = None

    def no_later(self, time: int | None) -> int | None:
        """Return a time, or the call's deadline if that is sooner; None is never."""
        return min((t for t in (time, self.latest) if t is not None), default=None)

    def is_late(self, turn: int) -> bool:
        return self.latest is not None and turn > self.latest

    @property
    def is_queued(self) -> bool:
        return self._woken is not None

    def wake(self) -> None:
        """Let the call look again, on its own loop."""
        if self._woken is not None:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._woken.set)

    def queue(self) -> None:
        self._woken = asyncio.Event()

    async def sleep(self, until: int | None) -> None:
        """Wait until the call is woken, or a time."""
        woken = self._woken
        assert woken is not None  # noqa: S101 - it is in a line
        timer = None
        if until is not None:
            timer = self.loop.call_later((until - _now()) / 1e6, woken.set)
        try:
            await woken.wait()
        finally:
            if timer is not None:
                timer.cancel()
        woken.clear()


class _Forecast:
    """A window as it will be when the last call of a line has had its turn."""

    def __init__(self, window: _Window, now: int) -> None:
        self._window = window.copy()
        self._time = now

    def ready(self, waiter: _Waiter, now: int) -> int:
        return self._window.ready(max(now, self._time), waiter.limit, waiter.tokens)

    def add(self, waiter: _Waiter, now: int) -> int:
        self._time = self.ready(waiter, now)
        self._window.add(self._time, 1, waiter.tokens)
        return self._time


class _Line:
    """The windows of a deployment, and the calls that wait, in order."""

    def __init__(self, name: str, span: int) -> None:
        self.name = name
        self.digest = blake2b(name.encode(), digest_size=16).hexdigest()
        self.own = _Window(span)
        """What this process has reserved, with and without Redis."""
        self._shared: _Window | None = None
        self._noted: tuple[int, int, bytes] | None = None
        self._latest = 0
        self.waiters: OrderedDict[_Waiter, None] = OrderedDict()
        self.forecast: _Forecast | None = None
        self.is_stale = False
        """Whether room was given back since the forecast was made."""
        self._refused = 0
        self.owed: dict[int, list[int]] = {}
        """Requests and tokens by bucket, to be added to the window in Redis."""
        self.settling: asyncio.Task[None] | None = None
        self.asking: asyncio.Task[None] | None = None
        self.ask_at = 0
        """When Redis is to be asked next."""

    @property
    def shared(self) -> "_Window | None":
        """What all processes have reserved, as Redis last said; None if it fails."""
        if self._noted is not None:  # read when it is needed: most never are
            self._shared = _Window.read(self.own.span, *self._noted)
            self._noted = None
        return self._shared

    def note(self, time: int, here: int, value: bytes) -> None:
        """Keep what Redis said."""
        if 0 < self._latest - time < _CLOCK_ERROR:
            return  # of two answers, the earlier one came later
        if self._shared is None:
            self.forecast = None
        self._noted, self._latest = (time, here, value), time

    def forget(self) -> None:
        """Redis fails: what it said does not count."""
        self._shared = self._noted = None
        self.ask_at = 0

    def is_idle(self, now: int) -> bool:
        self.own.advance(now)
        return not (
            self.waiters
            or self.owed
            or _is_running(self.asking)
            or _is_running(self.settling)
            or self.own.all_requests
        )

    def first(self) -> _Waiter | None:
        """Return the first call whose event loop runs."""
        while self.waiters and (waiter := next(iter(self.waiters))).loop.is_closed():
            self.remove(waiter)
        for waiter in self.waiters:
            if waiter.loop.is_running():
                return waiter
        return None

    def busy_loop(self, waiter: _Waiter) -> asyncio.AbstractEventLoop | None:
        """Return the loop that serves the line, None if that is for this call to do."""
        first = self.first()
        if first is not None and first is not waiter:
            return first.loop
        if self.asking is None:
            return None
        if _is_running(self.asking):
            return self.asking.get_loop()
        asked, self.asking = self.asking, None
        if asked.done() and not asked.cancelled():
            asked.result()  # raises what was not foreseen
        return None

    def batch(self, now: int) -> list[_Waiter]:
        """Return the first calls that this process' own window has room for."""
        made: list[_Waiter] = []
        tokens = 0
        for waiter in self.waiters:
            if not waiter.loop.is_running():
                continue
            tokens += waiter.tokens
            ready = self.own.ready(now, waiter.limit, tokens, len(made) + 1)
            if made and (ready > now or waiter.limit != made[0].limit):
                break
            made.append(waiter)
            if len(made) == _BATCH:
                break
        return made

    def ready(self, waiter: _Waiter, now: int) -> int:
        """Return when a call could have its turn if it were the first."""
        ready = self.own.ready(now, waiter.limit, waiter.tokens)
        if self.shared is not None:
            ready = max(ready, self.shared.ready(now, waiter.limit, waiter.tokens))
        return ready

    def turn(self, waiter: _Waiter, now: int) -> int:
        """Return when a call could have its turn after those that wait.

        Without such, Redis is asked first: others may have given room back.
        """
        if not self.waiters:
            return self.own.ready(now, waiter.limit, waiter.tokens)
        turn = self._predict(now).ready(waiter, now)
        if self.is_stale and waiter.is_late(turn):
            # A new forecast looks at each call that waits, so not every time.
            self._refused += 1
            if self._refused * _FORECAST_STEPS >= len(self.waiters):
                self.forecast = None
                turn = self._predict(now).ready(waiter, now)
        return turn

    def append(self, waiter: _Waiter) -> None:
        waiter.queue()
        if self.waiters:
            waiter.turn = self._predict(waiter.begun).add(waiter, waiter.begun)
        self.waiters[waiter] = None

    def remove(self, waiter: _Waiter) -> None:
        self.waiters.pop(waiter, None)
        if not self.waiters:
            self.forecast = None

    def wake_first(self) -> None:
        if (waiter := self.first()) is not None:
            waiter.wake()

    def owe(self, bucket: int, requests: int, tokens: int) -> None:
        change = self.owed.setdefault(bucket, [0, 0])
        change[0] += requests
        change[1] += tokens
        self.ask_at = 0

    def _predict(self, now: int) -> _Forecast:
        if self.forecast is None:
            self.forecast = _Forecast(self.shared or self.own, now)
            for waiter in list(self.waiters):
                self.forecast.add(waiter, now)
            self.is_stale, self._refused = False, 0
        return self.forecast


_SCRIPT = """
local span, rpm, tpm = tonumber(ARGV[1]), tonumber(ARGV[3]), tonumber(ARGV[4])
local asked = tonumber(ARGV[5])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local bucket = math.floor(now / span)
local changes = {}
for i = 6 + asked, #ARGV, 3 do
  changes[tonumber(ARGV[i])] = {tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])}
end
local text = redis.call('GET', KEYS[1]) or ''
if #text % 24 ~= 0 or #text > 4000 then text = '' end
local old = {struct.unpack('<' .. string.rep('d', #text / 8), text)}
local kept, n, requests, tokens, is_changed = {}, 0, 0, 0, false
for i = 1, #text / 8, 3 do
  local b, r, t = old[i], old[i + 1], old[i + 2]
  -- One that lies far ahead is of a clock that was set back.
  if math.abs(bucket - b) <= 60 then
    local change = changes[b]
    if change then
      r, t = math.max(r + change[1], 0), math.max(t + change[2], 0)
      is_changed = true
    end
    kept[n + 1], kept[n + 2], kept[n + 3] = b, r, t
    n, requests, tokens = n + 3, requests + r, tokens + t
  end
end
local granted, size = 0, 0
while granted < asked do
  local need = tonumber(ARGV[6 + granted])
  if rpm and requests + granted + 1 > rpm then break end
  if tpm and tokens + size + need > tpm then break end
  granted, size = granted + 1, size + need
end
if granted > 0 then
  if kept[n - 2] ~= bucket then
    kept[n + 1], kept[n + 2], kept[n + 3] = bucket, 0, 0
    n = n + 3
  end
  kept[n - 1], kept[n] = kept[n - 1] + granted, kept[n] + size
end
text = struct.pack('<' .. string.rep('d', n), unpack(kept))
if granted > 0 or is_changed then
  redis.call('SET', KEYS[1], text, 'PX', ARGV[2])
end
return {granted, now, text}
"""
"""Arguments: width of a bucket in µs, expiry in ms, rpm, tpm, number of needs, needs,
then bucket, requests and tokens of each correction. The value: doubles, three a bucket."""
