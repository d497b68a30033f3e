"""What is known of each deployment: calls in flight, latency, cool-downs, sessions.

Kept in this process. With Redis, processes share cool-downs, sessions, and the number of
calls in flight; each of them goes on with what it knows itself while Redis fails.
"""

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from dipeo_llm.redis_clients import Circuit, RedisClients, RedisUnavailableError

_REFRESH = 0.25
"""Seconds for which a process does not ask again for the others' cool-downs."""
_LEASE = 30.0
"""Seconds after which the calls in flight of a process that has died are forgotten."""
_LONGEST = 86_400.0
"""The longest cool-down in seconds."""
_MOST_SESSIONS = 10_000
_SESSION_TTL = 3600.0
_WEIGHT_OF_THE_NEW = 0.3
"""The share of the newest time in an average of latencies."""


@dataclass(slots=True)
class DeploymentState:
    """What this process knows of one deployment."""

    calls: int = 0
    """Requests that ended, however they did."""
    failures: int = 0
    """Those that failed through the deployment's fault."""
    failures_in_a_row: int = 0
    in_flight: int = 0
    cooling_until: float = 0.0
    """By the monotonic clock."""
    reason: str | None = None
    """The error that started the last cool-down, without its message."""
    latency: dict[bool, float] = field(default_factory=dict)
    """Average seconds to the first content of a stream (True), and to a whole answer."""

    @property
    def cooling(self) -> float:
        """Seconds until the cool-down ends; 0 while the deployment takes calls."""
        return max(0.0, self.cooling_until - time.monotonic())

    def cool(self, seconds: float, reason: str) -> None:
        """Start a cool-down; one that ends later goes on."""
        ends = time.monotonic() + min(seconds, _LONGEST)
        self.cooling_until = max(self.cooling_until, ends)
        self.reason = reason

    def add_latency(self, seconds: float, *, is_stream: bool) -> None:
        """Add a time to the average."""
        before = self.latency.get(is_stream, seconds)
        self.latency[is_stream] = before + _WEIGHT_OF_THE_NEW * (seconds - before)


class DeploymentStates:
    """The states of all deployments of a service, by their ids.

    Safe for threads and for several event loops.

    Args:
        redis: The server that processes share; None for this process alone.
    """

    def __init__(self, redis: RedisClients | None = None) -> None:
        self._states: dict[str, DeploymentState] = {}
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()
        # Reentrant: the garbage collector may end a call while this thread holds it.
        self._lock = threading.RLock()
        self._redis = redis
        self._circuit = Circuit("shared routing")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._in_flight: dict[str, str] = {}
        """The deployment of each call in flight, by a name of the call."""
        self._renewing: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self._refreshed = -math.inf

    def __getitem__(self, deployment_id: str) -> DeploymentState:
        with self._lock:
            return self._states.setdefault(deployment_id, DeploymentState())

    # Cool-downs.

    def cool(self, deployment_id: str, seconds: float, reason: str) -> None:
        """Give a deployment no calls for a while, in any process."""
        seconds = min(seconds, _LONGEST)
        self[deployment_id].cool(seconds, reason)

        async def publish(cache: Any) -> None:
            key, milliseconds = self._key("cool", deployment_id), int(seconds * 1000)
            await cache.client.set(key, reason, px=max(milliseconds, 1))

        self._later(publish)

    async def refresh(self, deployment_ids: Sequence[str]) -> None:
        """Learn the cool-downs that other processes have started, at most every 0.25 s."""
        now = time.monotonic()
        if self._redis is None or now < self._refreshed + _REFRESH:
            return
        self._refreshed = now

        async def ask(cache: Any) -> list[Any]:
            pipeline = cache.client.pipeline(transaction=False)
            for each in deployment_ids:
                pipeline.pttl(self._key("cool", each)).get(self._key("cool", each))
            return await _execute(pipeline)

        found = await self._use(ask) or []
        pairs = zip(found[::2], found[1::2], strict=True)
        for each, (left, reason) in zip(deployment_ids, pairs, strict=False):
            if left > 0 and reason:
                self[each].cool(left / 1000, reason[:100].decode(errors="replace"))

    # Calls in flight.

    def begin(self, deployment_id: str, *, is_shared: bool) -> Callable[[], None]:
        """Count a call in flight.

        Args:
            deployment_id: Where it goes.
            is_shared: Whether other processes ask for the number.

        Returns:
            What takes the call back; only its first call counts.
        """
        state = self[deployment_id]
        name = uuid4().hex
        published = self._publish(name, deployment_id) if is_shared else None
        is_over = False
        with self._lock:
            state.in_flight += 1

        def end() -> None:
            nonlocal is_over
            with self._lock:
                if is_over:
                    return
                is_over = True
                state.in_flight -= 1
            if published is not None:
                self._withdraw(name, deployment_id, published)

        return end

    async def count_in_flight(self, deployment_ids: Sequence[str]) -> list[int]:
        """Return the calls in flight of each deployment, in all processes."""

        async def count(cache: Any) -> list[Any]:
            pipeline = cache.client.pipeline(transaction=False)
            for each in deployment_ids:
                pipeline.zcount(self._key("flight", each), time.time(), math.inf)
            return await _execute(pipeline)

        own = [self[each].in_flight for each in deployment_ids]
        shared = await self._use(count) if self._redis is not None else None
        # A call of this process may not have reached Redis yet.
        return [max(*pair) for pair in zip(own, shared or own, strict=True)]

    # Sessions.

    async def find_session(self, session: str) -> str | None:
        """Return the deployment where a session is, None for a new one."""

        async def get(cache: Any) -> bytes:
            pipeline = cache.client.pipeline(transaction=False)
            (found,) = await _execute(pipeline.get(self._key("session", session)))
            return found or b""

        shared = await self._use(get) if self._redis is not None else None
        if shared is not None:
            return shared.decode(errors="replace") or None
        with self._lock:
            found, ends = self._sessions.get(session, (None, 0.0))
        return found if ends > time.monotonic() else None

    def keep_session(self, session: str, deployment_id: str) -> None:
        """Note where a session is, for an hour from now."""
        with self._lock:
            ends = time.monotonic() + _SESSION_TTL
            self._sessions[session] = (deployment_id, ends)
            self._sessions.move_to_end(session)
            while len(self._sessions) > _MOST_SESSIONS:
                self._sessions.popitem(last=False)

        async def put(cache: Any) -> None:
            key = self._key("session", session)
            await cache.client.set(key, deployment_id, ex=int(_SESSION_TTL))

        self._later(put)

    async def aclose(self) -> None:
        """Wait for what is on its way to Redis; each has the time limit of Redis."""
        here = asyncio.get_running_loop()
        if (renewing := self._renewing.pop(here, None)) is not None:
            renewing.cancel()
        while tasks := [task for task in self._tasks if task.get_loop() is here]:
            await asyncio.wait(tasks)

    # Redis.

    def _key(self, kind: str, name: str) -> str:
        namespace = self._redis.namespace if self._redis else ""
        return f"{namespace}:{kind}:{name}"

    async def _use(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """Do some work on Redis; return None if it fails, which its circuit logs."""
        if self._redis is not None:
            with suppress(RedisUnavailableError):
                return await self._redis.use(self._circuit, work)
        return None

    def _later(
        self, work: Callable[[Any], Awaitable[Any]]
    ) -> "asyncio.Task[Any] | None":
        """Do some work on Redis in a task that cancelling the call does not reach."""
        if self._redis is None:
            return None
        return self._start(self._use(work))

    def _start(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _publish(self, name: str, deployment_id: str) -> "asyncio.Task[Any] | None":
        """Count a call in flight for all processes, and renew it until it ends."""
        if self._redis is None:
            return None
        self._in_flight[name] = deployment_id
        loop = asyncio.get_running_loop()
        if loop not in self._renewing:
            self._renewing[loop] = self._start(self._renew(loop))
        return self._later(lambda cache: self._write(cache, {name: deployment_id}))

    async def _write(self, cache: Any, in_flight: dict[str, str]) -> None:
        pipeline = cache.client.pipeline(transaction=False)
        for name, deployment_id in in_flight.items():
            key, now = self._key("flight", deployment_id), time.time()
            pipeline.zremrangebyscore(key, -math.inf, now)
            pipeline.zadd(key, {name: now + _LEASE}).expire(key, int(2 * _LEASE))
        await _execute(pipeline)

    async def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while self._in_flight:
                await asyncio.sleep(_LEASE / 3)
                await self._use(lambda cache: self._write(cache, {**self._in_flight}))
        finally:
            self._renewing.pop(loop, None)

    def _withdraw(
        self, name: str, deployment_id: str, published: "asyncio.Task[Any]"
    ) -> None:
        self._in_flight.pop(name, None)

        async def remove(cache: Any) -> None:
            pipeline = cache.client.pipeline(transaction=False)
            await _execute(pipeline.zrem(self._key("flight", deployment_id), name))

        async def withdraw() -> None:
            await asyncio.wait([published])
            await self._use(remove)

        loop = published.get_loop()
        with suppress(RuntimeError):  # no loop runs here
            if asyncio.get_running_loop() is loop:
                self._start(withdraw())
                return
        with suppress(RuntimeError):  # the loop has ended; the lease will, too
            loop.call_soon_threadsafe(lambda: self._start(withdraw()))


async def _execute(pipeline: Any) -> list[Any]:
    """Return the replies of a pipeline; 0 for a key with somebody else's value.

    Raises:
        redis.RedisError: Redis refuses something else.
    """
    replies: list[Any] = await pipeline.execute(raise_on_error=False)
    for index, reply in enumerate(replies):
        if isinstance(reply, Exception):
            if not str(reply).startswith("WRONGTYPE"):
                raise reply
            replies[index] = 0
    return replies
