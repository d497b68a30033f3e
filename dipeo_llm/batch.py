"""Many calls, a limited number at a time: results as they come, errors per request.

Input is read as work goes on. Knows no file and no command.
"""

import asyncio
import json
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Self

from dipeo_llm.domain import LEFT_OUT, ChatResult, TokenUsage
from dipeo_llm.errors import APIKeyError, QuotaExceededError

if TYPE_CHECKING:
    from dipeo_llm.service import LLMInfraService

Request = Mapping[str, Any]
Requests = Iterable[Request] | AsyncIterable[Request]

FATAL = (APIKeyError, QuotaExceededError)
"""Errors that every further request would meet too."""
_FATAL_NAMES = {"APIKeyError", "APIKeyNotFoundError", "QuotaExceededError"}

_WINDOW = 4
"""Results that wait for an earlier one, as a multiple of the concurrency."""


@dataclass(frozen=True, slots=True)
class BatchItem:
    """The result or the error of one request."""

    index: int
    """The request's place in the input, from 0."""
    request: Request = field(repr=False)
    result: ChatResult[Any] | None = None
    """None if the call failed."""
    error: Exception | None = None
    """None if it succeeded."""


@dataclass(slots=True)
class BatchTotals:
    """Counts, tokens and cost of a batch so far."""

    succeeded: int = 0
    failed: int = 0
    cached: int = 0
    """The part of `succeeded` that sent nothing."""
    attempts: int = 0
    """Requests that were sent, including retries and failures."""
    tokens: TokenUsage = field(default_factory=TokenUsage)
    cost_usd: float = 0.0
    """Of the calls whose price is known."""
    without_price: int = 0
    """Calls whose price is unknown."""

    def add(self, item: BatchItem) -> None:
        """Count one request."""
        if item.result is None:
            self.failed += 1
            self.attempts += getattr(item.error, "attempts", 0)
            return
        result = item.result
        self.succeeded += 1
        self.cached += result.cached
        self.attempts += result.attempts
        if result.cost_usd is None:
            self.without_price += 1
        else:
            self.cost_usd += result.cost_usd
        self.tokens += result.token_usage or TokenUsage()


class Batch:
    """Many calls of a service: an async iterator of `BatchItem`.

    A slow reader slows the work down. `async with` cancels what is in flight when its
    block is left early; otherwise call `aclose`.

    Args:
        service: Makes the calls.
        requests: The keywords of each call, as for `LLMInfraService.complete`; or of
            `complete_with_person`, if `person_messages` is among them. Read as work goes
            on, on the event loop.
        concurrency: Most calls in flight.
        ordered: Yield in the order of the input; False yields as calls end.

    Raises:
        ValueError: The concurrency is below 1.
    """

    def __init__(
        self,
        service: "LLMInfraService",
        requests: Requests,
        *,
        concurrency: int = 8,
        ordered: bool = True,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} must be at least 1")
        self._service = service
        self._concurrency = concurrency
        self._ordered = ordered
        self._samples = None if service.cache is None else Samples()
        self._rows: AsyncIterator[Request] | Iterator[Request] = (
            aiter(requests) if isinstance(requests, AsyncIterable) else iter(requests)
        )
        self._reading: asyncio.Task[Request | None] | None = None
        self._calls: dict[asyncio.Task[BatchItem], int] = {}
        self._ready: dict[int, BatchItem] = {}
        self._read = self._yielded = 0
        self._is_read = False
        self._fatal: Exception | None = None
        self.totals = BatchTotals()
        """Of all calls that have ended, also of those not yet yielded."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BatchItem:
        """Return what became of the next request.

        Raises:
            APIKeyError, QuotaExceededError: A call failed in a way that the others would
                too. No other was started since, and what was in flight has been yielded.
            RuntimeError: The service is closed.
        """
        self._read_ahead()
        while (item := self._take()) is None:
            waiting: set[asyncio.Task[Any]] = {*self._calls}
            if self._reading is not None and self._fatal is None:
                waiting.add(self._reading)
            if not waiting:
                await self.aclose()
                raise self._fatal or StopAsyncIteration
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._reading is not None and self._reading.done():
                row, self._reading = self._reading.result(), None
                self._start(row)
            self._collect()
            self._read_ahead()
        return item

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel the calls in flight and wait until they have ended."""
        left: list[asyncio.Task[Any]] = [*self._calls]
        if self._reading is not None:
            left.append(self._reading)
        self._is_read, self._reading, self._calls = True, None, {}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        if isinstance(self._rows, AsyncGenerator):
            await self._rows.aclose()

    def _take(self) -> BatchItem | None:
        """Return the item whose turn it is, None if it is not there yet."""
        is_end = self._fatal is not None and not self._calls
        number = self._yielded
        if number not in self._ready:
            if not self._ready or (self._ordered and not is_end):
                return None
            number = min(self._ready)
        self._yielded += 1
        return self._ready.pop(number)

    def _read_ahead(self) -> None:
        """Read as many rows as there is room for, and start their calls."""
        while (
            not self._is_read
            and self._reading is None
            and self._fatal is None
            and len(self._calls) < self._concurrency
            # A slow call, or a slow reader, must not let results pile up.
            and self._read - self._yielded < self._concurrency * _WINDOW
        ):
            if isinstance(self._rows, AsyncIterator):
                self._reading = asyncio.create_task(_next(self._rows))
            else:
                self._start(next(self._rows, None))

    def _start(self, row: Request | None) -> None:
        """Make the call of a row; None is the end of the rows."""
        if row is None:
            self._is_read = True
        elif self._fatal is None:
            call = asyncio.create_task(self._call(self._read, row))
            self._calls[call] = self._read
            self._read += 1

    def _collect(self) -> None:
        """Take the results of the calls that have ended."""
        for task in [task for task in self._calls if task.done()]:
            index, item = self._calls.pop(task), task.result()
            if _is_fatal(item.error):
                self._fatal = self._fatal or item.error
                continue
            self._ready[index] = item
            self.totals.add(item)

    async def _call(self, index: int, row: Request) -> BatchItem:
        try:
            call = self._service.complete
            if "person_messages" in row:
                call = self._service.complete_with_person  # type: ignore[assignment]
            asked = row if self._samples is None else self._samples.number(row)
            return BatchItem(index, row, await call(**asked))
        except RuntimeError:  # the service is closed
            raise
        except Exception as exc:  # noqa: BLE001 - the caller reads it from the item
            return BatchItem(index, row, error=exc)


class Samples:
    """Gives equal requests numbers, so that the cache makes each an answer of its own."""

    def __init__(self) -> None:
        self._counts: Counter[bytes] = Counter()

    def number(self, row: Request) -> Request:
        """Return a request with its `sample`; the first of its kind needs none."""
        if "sample" in row:
            return row
        counted = {name: row[name] for name in row if name not in LEFT_OUT}
        text = json.dumps(counted, sort_keys=True, default=repr)
        digest = blake2b(text.encode(), digest_size=8).digest()
        number = self._counts[digest]
        self._counts[digest] += 1
        return {**row, "sample": number} if number else row


def _is_fatal(error: Exception | None) -> bool:
    """Say whether the other requests would fail too: at each deployment of a route."""
    if not isinstance(error, FATAL):
        return False
    tried = error.details.get("tried", ())
    return all(each["error"] in _FATAL_NAMES for each in tried)


async def _next(rows: AsyncIterator[Request]) -> Request | None:
    return await anext(rows, None)
