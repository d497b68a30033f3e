"""The response cache: what an answer is kept under, which answers are kept, and where.

Values are JSON that is checked when it is read. A cache that fails never fails a call.
"""

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

from pydantic_core import from_json, to_json

from dipeo_llm.adapters.base import BaseLLMAdapter, Target
from dipeo_llm.adapters.tools import sort_tools
from dipeo_llm.cache_url import CacheURL
from dipeo_llm.coalescing import Flights, Streams, Turns
from dipeo_llm.domain import (
    LEFT_OUT,
    ChatRequest,
    ChatResult,
    StreamChunk,
    TokenUsage,
    ToolCallDelta,
)
from dipeo_llm.errors import CacheMissError, SettingsError, StructuredOutputError
from dipeo_llm.progress import CallProgress
from dipeo_llm.redis_clients import RedisClients, RedisUnavailableError
from dipeo_llm.streaming import Items, Opened
from dipeo_llm.structured import Form, parse

_log = logging.getLogger("dipeo_llm")

Result = ChatResult[Any]

_VERSION = 1
"""Of the key and of the value: an entry of another version is not found."""

# The key.

_COUNTED = tuple(f.name for f in fields(ChatRequest) if f.name not in LEFT_OUT)


class _NotPlainError(ValueError):
    """A value is not plain JSON, so that two different requests might look alike."""


def cache_key(
    adapter: BaseLLMAdapter, request: ChatRequest, *, shared: bool = False
) -> str | None:
    """Return the key of a request's answer: 64 hexadecimal digits.

    It covers the provider, its address, the model, and all of the request that its
    answer may depend on. It is keyed with the API key, so that two owners of keys never
    meet, and nobody without the key can compute it.

    Args:
        adapter: Says which provider, address, model and API key.
        request: With its media loaded, so that their bytes count.
        shared: Leave the API key out.

    Returns:
        None if a value in the request is not plain JSON.
    """
    asked = {name: getattr(request, name) for name in _COUNTED}
    tools = sort_tools(request.tools)
    asked["tools"] = tools.functions
    asked["own_tools"] = [tool.model_dump(mode="json") for tool in tools.provided]
    if isinstance(request.response_format, Form):
        asked["response_format"] = request.response_format.response_format
    asked |= {
        "version": _VERSION,
        "provider": adapter.provider.name,
        "model": adapter.model_name,
        "base_url": adapter.endpoint.base_url,
        "headers": adapter.settings.extra_headers,
    }
    try:
        text = _to_text(_plain(asked))
    except (ValueError, RecursionError):
        return None
    secret = b"" if shared else adapter.endpoint.secret.get_secret_value().encode()
    owner = blake2b(secret, digest_size=32, person=b"dipeo_llm owner").digest()
    return blake2b(text.encode(), digest_size=32, key=owner).hexdigest()


def _digest(keys: list[str]) -> str:
    return blake2b("".join(keys).encode(), digest_size=32).hexdigest()


def _plain(value: Any) -> Any:
    """Copy a value as plain JSON.

    Raises:
        _NotPlainError: It is not, such as a mapping with a number as a key.
    """
    # The types themselves first: isinstance takes several times as long.
    kind = type(value)
    if value is None or kind in _LEAVES:
        return value
    if kind is dict or isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise _NotPlainError
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float)):
        return value
    raise _NotPlainError


_LEAVES = frozenset({str, int, float, bool})
_to_text = json.JSONEncoder(
    sort_keys=True, allow_nan=False, separators=(",", ":")
).encode


# The value.

_KEPT = {
    *("text", "token_usage", "raw_response", "tool_outputs", "tool_calls"),
    *("finish_reason", "model", "service", "cost_usd", "request_id", "reasoning"),
    *("thinking_blocks", "content_blocks"),
}
_WHOLE = frozenset({"stop", "tool_calls"})


def _is_whole(result: Result, form: Form | None) -> bool:
    """Say whether an answer is worth keeping; parse it in the form that was asked for.

    Not one that was cut off, filtered, declined, empty, or not in its form. Of several
    answers (`n`), only the first one's end is known.
    """
    if result.finish_reason not in _WHOLE or result.refusal or len(result.texts) > 1:
        return False
    if any(call.arguments is None for call in result.tool_calls):
        return False
    if not (result.text.strip() or result.tool_calls or result.tool_outputs):
        return False
    if form is None or not form.is_json or result.tool_calls:
        return True
    try:
        result.parsed = parse(form, result)
    except StructuredOutputError:
        return False
    return True


def _write_value(key: str, result: Result, expires: float) -> bytes:
    """Write an answer as JSON.

    Raises:
        ValueError: It holds something that is not JSON.
    """
    kept = result.model_dump(mode="json", include=_KEPT, exclude_none=True)
    if not isinstance(result.raw_response, dict):
        kept.pop("raw_response", None)  # LiteLLM's own object
    return to_json({"v": _VERSION, "key": key, "expires": expires, "result": kept})


def _read_value(key: str, value: bytes) -> Result | None:
    """Read an answer as one that this call did not pay for; None if its time is over.

    Raises:
        ValueError: It was not written by this version, or not under this key.
    """
    found = from_json(value)
    if not isinstance(found, dict) or (found.get("v"), found.get("key")) != (
        _VERSION,
        key,
    ):
        raise ValueError("it is not a value of this version under this key")
    expires = found.get("expires")
    if not isinstance(expires, int | float) or not expires > time.time():
        return None
    answer = found.get("result")
    if not isinstance(answer, dict) or not answer.keys() <= _KEPT:
        raise ValueError("it does not hold an answer")
    original = answer.pop("token_usage", None)
    answer |= {
        "original_usage": original,
        "original_cost_usd": answer.get("cost_usd"),
        "token_usage": None if original is None else TokenUsage(),
        "cost_usd": 0.0,
        "attempts": 0,
        "cached": True,
    }
    return Result.model_validate(answer)


# Where values are.


class Store(Protocol):
    """Holds values for a while. Each method has *limit* seconds."""

    async def get(self, key: str, limit: float) -> bytes | None:
        """Return a value; None if there is none.

        Raises:
            RedisUnavailableError: It cannot be read.
        """
        ...

    async def set(self, key: str, value: bytes, ttl: float, limit: float) -> None:
        """Hold a value for *ttl* seconds.

        Raises:
            RedisUnavailableError: It cannot be written.
        """
        ...

    async def aclose(self) -> None:
        """Close what is open."""
        ...


class _MemoryStore:
    """Values in this process, for all of its event loops, up to a limit.

    aiocache's memory has no limit, and expires a value by a timer of the event loop that
    stored it: after that loop, never. Little of it would be left here.
    """

    def __init__(self, url: CacheURL) -> None:
        self.values: OrderedDict[str, bytes] = OrderedDict()
        self.size = 0
        """Bytes of all values."""
        self._url = url
        self._lock = threading.Lock()

    async def get(self, key: str, limit: float) -> bytes | None:
        with self._lock:
            value = self.values.get(key)
            if value is not None:
                self.values.move_to_end(key)
            return value

    async def set(self, key: str, value: bytes, ttl: float, limit: float) -> None:
        # The reader looks at the value's own time.
        url = self._url
        with self._lock:
            self.size += len(value) - len(self.values.pop(key, b""))
            self.values[key] = value
            while len(self.values) > url.max_entries or self.size > url.max_bytes:
                self.size -= len(self.values.popitem(last=False)[1])

    async def aclose(self) -> None:
        """Keep the values: a service that is opened again finds them."""


class _RedisStore:
    """Values in Redis, for all processes."""

    def __init__(self, redis: RedisClients) -> None:
        self.redis = redis

    async def get(self, key: str, limit: float) -> bytes | None:
        return await self.redis.use(
            self.redis.reads, partial(_get_value, key), max(limit, 0.0)
        )

    async def set(self, key: str, value: bytes, ttl: float, limit: float) -> None:
        async def write(cache: Any) -> None:
            await cache.set(key, value, ttl=float(ttl))

        await self.redis.use(self.redis.writes, write, max(limit, 0.0))

    async def aclose(self) -> None:
        await self.redis.aclose()


async def _get_value(key: str, cache: Any) -> bytes | None:
    from redis.exceptions import ResponseError

    try:
        value: bytes | None = await cache.get(key)
    except ResponseError as exc:
        if not str(exc).startswith("WRONGTYPE"):
            raise
        return b""  # somebody else's list or hash
    return value


# The cache.


@dataclass(slots=True)
class CacheStats:
    """What a cache has done since it was made."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    not_kept: int = 0
    """Answers that are not worth keeping, or too large."""
    bypassed: int = 0
    """Requests that hold something other than plain JSON."""
    unreadable: int = 0
    """Values of another version, or that something else has written."""


class ResponseCache:
    """Answers requests from earlier answers, and identical requests by one.

    Args:
        url: `memory://` or a Redis URL, as `CacheURL` reads it.

    Raises:
        SettingsError: The URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        try:
            self._url = CacheURL.read(url)
        except ValueError as exc:
            raise SettingsError(f"the cache's URL cannot be used: {exc}") from None
        self.redis = RedisClients(self._url) if self._url.server else None
        """The server that processes share; None in memory."""
        self._store: Store = (
            _MemoryStore(self._url) if self.redis is None else _RedisStore(self.redis)
        )
        self._turns = None if self.redis is None else Turns(self.redis)
        self._flights = Flights()
        self._streams = Streams()
        self._reading: set[str] = set()
        """The keys that a caller looks for."""
        self.stats = CacheStats()
        self._has_logged = False

    async def aclose(self) -> None:
        """Close the connections; answers in memory stay. May be called twice."""
        await self._store.aclose()

    def reopen(self) -> None:
        """Allow connections again after `aclose`."""
        if self.redis is not None:
            self.redis.reopen()

    async def answer(
        self,
        targets: Sequence[Target],
        progress: CallProgress,
        send: Callable[[CallProgress], Awaitable[Result]],
        shared_by: Hashable = None,
    ) -> Result:
        """Answer a request from the cache, or by *send*, whose answer is then kept.

        Args:
            targets: Whose answers would do: one, or each deployment of a route.
            progress: Of the call.
            send: Sets `target` of its progress to what answered; the answer is kept
                under that.
            shared_by: What identical calls must have in common to be one call.

        Raises:
            CacheMissError: The request says `cache="only"`, and there is no answer.
            Exception: As *send* does.
        """
        request = targets[0].request
        entry = self._entry(targets, progress)
        if entry is None:
            return await send(progress)
        shares = request.coalesce and request.cache is None
        # Callers with another timeout must not get each other's timeout error.
        flight = (entry.key, shared_by, request.timeout)
        # Of many that ask at once, one looks in Redis and the others join a flight.
        joins = shares and (flight in self._flights or entry.key in self._reading)
        if not joins and (found := await self._find(entry, progress)) is not None:
            return found
        if shares:
            return await self._flights.run(
                flight, progress, partial(self._fetch, entry, send)
            )
        return await self._send(entry, send, progress)

    async def open(
        self,
        targets: Sequence[Target],
        progress: CallProgress,
        send: Callable[[CallProgress], Awaitable[Opened]],
        shared_by: Hashable = None,
    ) -> Opened:
        """Do as `answer` for a stream, which is kept when it was read to its end."""
        request = targets[0].request
        entry = self._entry(targets, progress)
        if entry is None:
            return await send(progress)
        if (found := await self._find(entry, progress)) is not None:
            progress.is_cached = True
            items = replay(found)
        elif request.coalesce and request.cache is None:
            items = self._streams.read(
                (entry.key, shared_by, request.timeout, request.idle_timeout),
                progress,
                partial(_open_kept, entry, send),
            )
        else:
            items = _keep_stream(entry, await send(progress), progress)
        # A generator that has not begun would not close the stream below it.
        return Opened(items, await anext(items))

    def _entry(
        self, targets: Sequence[Target], progress: CallProgress
    ) -> "_Entry | None":
        """Return the places of a request's answer; None if it has none."""
        adapter, request, _ = targets[0]
        progress.aim(targets[0])
        if request.cache == "bypass":
            return None
        keys = [self.key(target) for target in targets]
        if None in keys:
            self.stats.bypassed += 1
            if request.cache == "only":
                raise _miss(adapter)
            return None
        places = {key: target for key, target in zip(keys, targets, strict=True) if key}
        return _Entry(self, places)

    def key(self, target: Target) -> str | None:
        """Return the key of a target's answer, as `cache_key` does."""
        return cache_key(target.adapter, target.request, shared=self._url.shared)

    async def _find(self, entry: "_Entry", progress: CallProgress) -> Result | None:
        if entry.request.cache == "refresh":
            return None
        self._reading.add(entry.key)
        try:
            found = await entry.find(progress)
        finally:
            self._reading.discard(entry.key)
        if found is None and entry.request.cache == "only":
            raise _miss(entry.adapter)
        return found

    async def _fetch(
        self,
        entry: "_Entry",
        send: Callable[[CallProgress], Awaitable[Result]],
        progress: CallProgress,
    ) -> Result:
        """Fetch an answer once, for all who wait for it."""
        if self._turns is None:
            return await self._send(entry, send, progress)
        if (found := await entry.find(progress)) is not None:
            return found
        if entry.is_failing:
            return await send(progress)
        find = partial(entry.find_again, progress)
        async with self._turns.take(entry.key, find) as turn:
            if turn.found is not None:
                return turn.found
            result = await send(progress)
            turn.is_kept = await entry.keep(result, progress.target)
            return result

    async def _send(
        self,
        entry: "_Entry",
        send: Callable[[CallProgress], Awaitable[Result]],
        progress: CallProgress,
    ) -> Result:
        result = await send(progress)
        await entry.keep(result, progress.target)
        return result

    def note_unreadable(self, error: Exception) -> None:
        """Count a value that cannot be read; log the first."""
        self.stats.unreadable += 1
        if not self._has_logged:
            self._has_logged = True
            reason = str(error).partition("\n")[0][:200]
            _log.warning("the cache holds a value that cannot be read: %s", reason)


def _miss(adapter: BaseLLMAdapter) -> CacheMissError:
    return CacheMissError(
        'the cache does not hold the answer, and cache="only" sends nothing',
        service=adapter.provider.name,
        model=adapter.model_name,
    )


class _Entry:
    """The places of one request's answer, for one call.

    All its work has one time limit; after a failure it does none.

    Args:
        cache: What it is a part of.
        places: The target of each key.
    """

    def __init__(self, cache: ResponseCache, places: Mapping[str, Target]) -> None:
        self._cache = cache
        self._places = places
        self.adapter, self.request, _ = next(iter(places.values()))
        self._form: Form | None = self.request.response_format
        self._left = cache._url.timeout  # noqa: SLF001 - a part of it
        self.key = next(iter(places)) if len(places) == 1 else _digest(sorted(places))
        """Of the request: its only place, or a digest of all."""
        self.is_failing = False

    async def find(self, progress: CallProgress) -> Result | None:
        """Return the answer, None if there is none that can be used."""
        cache = self._cache
        found = await self._read(progress)
        if found is None:
            cache.stats.misses += 1
            return None
        cache.stats.hits += 1
        return found

    async def find_again(self, progress: CallProgress) -> Result | None:
        """Do as `find`, while the call waits for another process.

        Raises:
            RedisUnavailableError: The cache cannot be read; waiting is of no use.
        """
        self._left = self._cache._url.timeout  # noqa: SLF001
        found = await self._read(progress)
        if self.is_failing:
            raise RedisUnavailableError
        if found is None:
            return None
        self._cache.stats.hits += 1
        return found

    async def keep(self, result: Result, target: Target | None) -> bool:
        """Store an answer that is worth it, under what answered.

        Returns whether `find` finds it, for the same request.
        """
        stats, url = self._cache.stats, self._cache._url  # noqa: SLF001
        if target is None or not _is_whole(result, self._form):
            stats.not_kept += 1
            return False
        places = self._places.items()
        key = next((key for key, place in places if place is target), None)
        # A fallback of the route is not one of the places.
        is_found = key is not None
        key = key or self._cache.key(target)
        try:
            value = _write_value(key or "", result, time.time() + url.ttl)
        except ValueError:  # such as half a surrogate pair
            value = b""
        if not key or not value or len(value) > url.max_value_bytes:
            stats.not_kept += 1
            return False
        if await self._timed(self._cache._store.set, key, value, url.ttl) is _FAILED:  # noqa: SLF001
            return False
        stats.stored += 1
        return is_found

    async def _read(self, progress: CallProgress) -> Result | None:
        for key, target in self._places.items():
            value = await self._timed(self._cache._store.get, key)  # noqa: SLF001
            if value is None or value is _FAILED:
                continue
            try:
                found = _read_value(key, value)
            except (ValueError, RecursionError) as exc:
                self._cache.note_unreadable(exc)
                continue
            # A class of the same schema may have been stricter, or a value made by hand.
            if found is not None and _is_whole(found, self._form):
                progress.aim(target)
                if target.deployment is not None:
                    found.deployment = target.deployment
                return found
        return None

    async def _timed(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Do some work in what is left of the time; return _FAILED if it fails."""
        if self.is_failing:
            return _FAILED
        begun = time.monotonic()
        try:
            return await work(*args, self._left)
        except RedisUnavailableError:  # logged and counted by its circuit
            self.is_failing = True
            return _FAILED
        finally:
            self._left -= time.monotonic() - begun


_FAILED = object()

# Streams.


async def _open_kept(
    entry: _Entry,
    send: Callable[[CallProgress], Awaitable[Opened]],
    progress: CallProgress,
) -> Opened:
    """Open a stream that is kept."""
    items = _keep_stream(entry, await send(progress), progress)
    return Opened(items, await anext(items))


async def _keep_stream(entry: _Entry, opened: Opened, progress: CallProgress) -> Items:
    """Pass a stream on, and keep its result."""
    item: StreamChunk | Result = opened.first
    try:
        while not isinstance(item, ChatResult):
            yield item
            item = await anext(opened.items)
        await entry.keep(item, progress.target)
        yield item
    except StopAsyncIteration:
        return
    finally:
        await opened.items.aclose()


async def replay(result: Result) -> Items:
    """Yield a whole answer as a stream: reasoning, text by words, tool calls, result."""
    for piece in _words(result.reasoning or ""):
        yield StreamChunk(reasoning=piece)
    for piece in _words(result.text):
        yield StreamChunk(text=piece)
    for index, call in enumerate(result.tool_calls):
        yield StreamChunk(
            tool_call=ToolCallDelta(index, call.id, call.name, call.arguments_text)
        )
    yield result


def _words(text: str) -> list[str]:
    """Split a text after each word; the pieces are the text."""
    return re.findall(r"\s*\S+|\s+\Z", text)
