"""A streamed answer as a caller sees it: chunks as they come, then the whole result.

Knows that an adapter yields chunks and, last, a result. Nothing is tried again here:
that ends with the first chunk.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple, Self

from dipeo_llm.domain import ChatResult, StreamChunk
from dipeo_llm.errors import (
    APIKeyError,
    LLMServiceError,
    LLMTimeoutError,
    StreamInterruptedError,
)

Items = AsyncGenerator[StreamChunk | ChatResult, None]
"""What an adapter's `stream` gives: chunks, and as the last item the result."""


class Opened(NamedTuple):
    """A stream that has begun."""

    items: Items
    first: StreamChunk | ChatResult
    """The first of its items, already taken from them."""
    attempts: int
    """How many it took to come that far."""
    service: str
    model: str


Start = Callable[[], Awaitable[Opened]]
"""Opens a stream, trying again if need be."""


class ChatStream:
    """A streamed answer: `async with` opens it, `async for` reads it.

    Leaving the block, by its end, `break`, an error or cancellation, closes the
    connection at once, as does dropping the stream. A slow reader slows the provider
    down: nothing is read ahead but a socket's buffer.

    Args:
        start: Opens the stream, with retries.
        finish: Completes the result of a model, such as by parsing it.
        deadline: Seconds for the whole stream, from opening it.
    """

    def __init__(
        self,
        start: Start,
        finish: Callable[[ChatResult, str], ChatResult],
        *,
        deadline: float | None = None,
    ) -> None:
        self._start = start
        self._finish = finish
        self._deadline = deadline
        self._ends: float | None = None
        self._opened = False
        self._items: Items | None = None
        self._next: StreamChunk | ChatResult | None = None
        self._text: list[str] = []
        self._attempts = 0
        self._service = ""
        self._model = ""
        self._result: ChatResult | None = None
        self._error: Exception | None = None

    async def __aenter__(self) -> Self:
        """Open the stream and wait for its first chunk.

        Raises:
            DiPeOLLMError: As `LLMInfraService.complete`.
            RuntimeError: It was opened before; ask the service for another.
        """
        if self._opened:
            raise RuntimeError("a stream is opened once: ask the service for another")
        self._opened = True
        if self._deadline is not None:
            self._ends = asyncio.get_running_loop().time() + self._deadline
        opened = await self._start()
        self._items, self._next, self._attempts, self._service, self._model = opened
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        """Return the next chunk.

        Raises:
            StreamInterruptedError: The stream broke off; `partial_text` is what came.
        """
        if self._next is not None:
            item, self._next = self._next, None
        else:
            item = await self._pull()
        if isinstance(item, ChatResult):
            item.attempts = self._attempts
            self._result = item
            raise StopAsyncIteration
        if item.text:
            self._text.append(item.text)
        return item

    async def result(self) -> ChatResult:
        """Read the rest of the stream, if any, and return the whole result.

        It is what `complete` would have returned. May be called again, also after the
        block, if the stream had ended.

        Raises:
            StreamInterruptedError: The stream broke off.
            StructuredOutputError: The answer does not have the form asked for.
            RuntimeError: The stream was left before its end.
        """
        while self._result is None:
            try:
                await anext(self)
            except StopAsyncIteration:
                break
        if self._result is None:
            raise RuntimeError("the stream was left before its end: no whole result")
        return self._finish(self._result, self._model)

    async def aclose(self) -> None:
        """Close the connection. May be called twice."""
        items, self._items = self._items, None
        self._next = None
        if items is not None:
            await items.aclose()

    async def _pull(self) -> StreamChunk | ChatResult:
        if self._error is not None:
            raise self._error
        if self._result is not None:
            raise StopAsyncIteration
        if self._items is None:
            raise RuntimeError(
                "the stream is not open: read it inside `async with`, before its end"
            )
        try:
            if self._ends is None:
                return await anext(self._items)
            async with asyncio.timeout_at(self._ends):
                return await anext(self._items)
        except TimeoutError as exc:
            if self._deadline is None:
                raise
            what = f"the deadline of {self._deadline:g} s has passed"
            late = LLMTimeoutError(what, service=self._service, model=self._model)
            raise await self._interrupted(late) from exc
        except (LLMServiceError, APIKeyError) as exc:
            raise await self._interrupted(exc) from exc

    async def _interrupted(
        self, cause: LLMServiceError | APIKeyError
    ) -> StreamInterruptedError:
        """Make the error of a broken stream, and remember it for whoever asks again."""
        await self.aclose()
        self._error = error = StreamInterruptedError(
            f"the stream broke off after {sum(map(len, self._text))} characters:"
            f" {cause}",
            partial_text="".join(self._text),
            service=cause.service,
            model=cause.model,
            status_code=cause.status_code,
            retry_after=cause.retry_after,
            request_id=cause.request_id,
            attempts=self._attempts,
            details={"cause": type(cause).__name__, **cause.details},
        )
        return error
