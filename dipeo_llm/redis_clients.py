"""Redis for the state that processes share: bounded in time, and never in the way.

One client per event loop, one time limit around each use, and a circuit breaker: while
Redis is down, slow, frozen or full, callers are told at once and go on without it.
Imports redis-py when it is created, not before.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from dipeo_llm.cache_url import CacheURL
from dipeo_llm.errors import ServiceUnavailableError, SettingsError
from dipeo_llm.pool import Pool

_T = TypeVar("_T")
_log = logging.getLogger("dipeo_llm")

_MOST_CONNECTIONS = 16
_CLIENT_TTL = 86_400.0


class RedisUnavailableError(Exception):
    """Redis did not do what it was asked; the call goes on without it."""


class Circuit:
    """A circuit breaker: after failures in a row, nothing is asked for a while.

    Then one caller asks, and its success closes the circuit. Logs one line when it opens
    and one when it closes. Safe for threads.

    Args:
        name: The kind of work, for the log.
        failures: The failures in a row that open it.
        wait: Seconds until one caller asks again.
    """

    def __init__(self, name: str, *, failures: int = 3, wait: float = 5.0) -> None:
        self._name = name
        self._limit = failures
        self._wait = wait
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._ask_again: float | None = None
        self.failed = 0
        """Failures so far."""
        self.refused = 0
        """Callers that were turned away while it was open."""

    @property
    def is_open(self) -> bool:
        """Whether callers are turned away."""
        return self._ask_again is not None

    def allow(self) -> bool:
        """Say whether to ask Redis; if the circuit is open, one caller may after a while."""
        with self._lock:
            if self._ask_again is None:
                return True
            now = time.monotonic()
            if now < self._ask_again:
                self.refused += 1
                return False
            # Only this caller: the next may ask if this one never reports.
            self._ask_again = now + self._wait
            return True

    def succeed(self) -> None:
        """Note a success."""
        if self._in_a_row == 0:
            return
        with self._lock:
            self._in_a_row = 0
            closes, self._ask_again = self._ask_again is not None, None
        if closes:
            _log.warning("Redis works again: %s are back", self._name)

    def fail(self, error: BaseException) -> None:
        """Note a failure."""
        with self._lock:
            self.failed += 1
            self._in_a_row += 1
            opens = self._in_a_row >= self._limit and self._ask_again is None
            if self._in_a_row >= self._limit:
                self._ask_again = time.monotonic() + self._wait
        if opens:
            reason = str(error) or type(error).__name__
            _log.warning(
                "Redis fails (%s): calls go on without %s, which are tried again every"
                " %g s",
                reason,
                self._name,
                self._wait,
            )


class _Client:
    """What a loop holds: aiocache's Redis cache, over a connection pool of ours."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    async def aclose(self) -> None:
        # aiocache's own close() uses a method that redis-py has deprecated.
        await self.cache.client.aclose(close_connection_pool=True)


class RedisClients:
    """Uses one Redis server from any number of event loops.

    Args:
        url: Its `server` is a URL for redis-py.

    Raises:
        SettingsError: redis-py is not installed, or cannot use the URL.
    """

    def __init__(self, url: CacheURL) -> None:
        self.namespace = url.namespace
        self.timeout = url.timeout
        # A command under a connection that closes would open another one.
        self._pool: Pool[_Client] = Pool(ttl=_CLIENT_TTL, grace=self.timeout)
        # A full server refuses writes and scripts, and still reads.
        self.reads, self.writes = Circuit("cached answers"), Circuit("cache writes")
        self.locks = Circuit("locks")
        try:
            import redis
            from redis.asyncio import BlockingConnectionPool
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError:
            raise SettingsError(
                'a redis:// cache needs redis-py: install "dipeo-llm[redis]"'
            ) from None
        options = {
            "max_connections": _MOST_CONNECTIONS,
            # `use` has the one time limit; redis-py's own would each cost a timer.
            "timeout": None,
            "socket_timeout": None,
            "socket_connect_timeout": None,
            # A connection that a restarted server has dropped is opened anew.
            "retry": Retry(NoBackoff(), 1),
        }
        self._errors = (redis.RedisError, OSError, ValueError, ServiceUnavailableError)

        def make_pool(**_: Any) -> Any:
            return BlockingConnectionPool.from_url(url.server or "", **options)

        self._make_pool = make_pool
        try:
            make_pool().make_connection()
        except (ValueError, TypeError, redis.RedisError):
            # The error may show the password.
            raise SettingsError(
                "redis-py cannot use the cache's URL: check its host, port, database and"
                " parameters"
            ) from None

    async def use(
        self,
        circuit: Circuit,
        work: Callable[[Any], Awaitable[_T]],
        limit: float | None = None,
    ) -> _T:
        """Do some work on Redis, within *limit* seconds.

        Args:
            circuit: The kind of work.
            work: Gets aiocache's cache, whose `client` is redis-py's.
            limit: None is the URL's `timeout`.

        Raises:
            RedisUnavailableError: It failed, took too long, or the circuit is open.
        """
        if not circuit.allow():
            raise RedisUnavailableError
        try:
            # redis-py closes a connection whose command is cancelled, so that the next
            # one does not read its reply.
            async with asyncio.timeout(self.timeout if limit is None else limit):
                async with await self._pool.lease("redis", self._open) as client:
                    done = await work(client.cache)
        except self._errors as exc:
            circuit.fail(exc)
            raise RedisUnavailableError from None
        circuit.succeed()
        return done

    async def aclose(self) -> None:
        """Close the clients of every loop."""
        await self._pool.aclose()

    def reopen(self) -> None:
        """Allow clients again after `aclose`."""
        self._pool = Pool(ttl=_CLIENT_TTL, grace=self.timeout)

    async def _open(self) -> _Client:
        from aiocache import RedisCache
        from aiocache.serializers import NullSerializer

        # aiocache knows host, port and one password; the pool is made from the whole
        # URL. Its own timeout would make a task of each command.
        return _Client(
            RedisCache(
                namespace=self.namespace,
                timeout=0,
                serializer=NullSerializer(encoding=None),
                connection_pool_class=self._make_pool,
            )
        )
