"""A streamed answer as a caller sees it: chunks as they come, then the whole result.

Knows that an adapter yields chunks and, last, a result. Nothing is tried again here:
that ends with the first chunk.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, NamedTuple, Self

from dipeo_llm.domain import ChatResult, StreamChunk, T
from dipeo_llm.errors import (
    APIKeyError,
    LLMServiceError,
    ServiceUnavailableError,
    StreamInterruptedError,
)
from dipeo_llm.progress import CallProgress
from dipeo_llm.reports import CallReporter

Items = AsyncGenerator[StreamChunk | ChatResult[Any], None]
"""What an adapter's `stream` gives: chunks, and as the last item the result."""


class Opened(NamedTuple):
    """A stream that has begun."""

    items: Items
    first: StreamChunk | ChatResult[Any]
    """The first of its items, already taken from them."""


Start = Callable[[CallProgress], Awaitable[Opened]]
"""Opens a stream before its deadline, trying again if need be."""


class ChatStream(Generic[T]):
    """A streamed answer: `async with` opens it, `async for` reads it.

    Leaving the block, by its end, `break`, an error or cancellation, closes the
    connection at once, as does dropping the stream. A slow reader slows the provider
    down: nothing is read ahead but a socket's buffer. One task reads it; any other may
    close it.

    Args:
        begin: Starts the clock of the call.
        start: Opens the stream, with retries.
        finish: Completes the result, such as by parsing it.
        reporter: Reports the call when the stream has ended or was left.
    """

    def __init__(
        self,
        begin: Callable[[], CallProgress],
        start: Start,
        finish: Callable[[ChatResult[Any], CallProgress], ChatResult[Any]],
        reporter: CallReporter,
    ) -> None:
        self._begin = begin
        self._start = start
        self._finish = finish
        self._reporter = reporter
        self._progress: CallProgress | None = None
        self._items: Items | None = None
        self._next: StreamChunk | ChatResult[Any] | None = None
        self._text: list[str] = []
        self._result: ChatResult[Any] | None = None
        # What to make the error of, anew for each who asks: one that is kept would keep
        # the frames that it passed, and they this stream.
        self._broken: dict[str, Any] | None = None
        self._reader: asyncio.Task[object] | None = None
        self._left_alone: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        """Open the stream and wait for its first chunk.

        Raises:
            DiPeOLLMError: As `LLMInfraService.complete`.
            RuntimeError: It was opened before; ask the service for another.
        """
        if self._progress is not None:
            raise RuntimeError("a stream is opened once: ask the service for another")
        progress = self._progress = self._begin()
        try:
            async with progress:
                self._items, self._next = await self._start(progress)
        except BaseException as exc:
            progress.fail(exc)
            await self._reporter.report(progress)
            raise
        if isinstance(self._next, StreamChunk):
            progress.add_chunk()
        self._reporter.streams.add(self)
        return self

    @property
    def progress(self) -> CallProgress | None:
        """The state of the call; None before the stream was opened."""
        return self._progress

    def is_read_beside(self, task: "asyncio.Task[object] | None") -> bool:
        """Say whether a task other than *task* waits for the next chunk."""
        return self._reader is not None and self._reader is not task

    async def __aexit__(self, *raised: object) -> None:
        for error in raised:
            if isinstance(error, asyncio.CancelledError) and self._progress is not None:
                self._progress.fail(error)
        await self.aclose()

    # Bound here, because the interpreter clears a module's names when it ends.
    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._progress is not None and not is_ending():
            self._reporter.report_dropped(self._progress)

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
            self._result = item
            await self._end()
            raise StopAsyncIteration
        if item.text:
            self._text.append(item.text)
        return item

    async def result(self) -> ChatResult[T]:
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
        if self._result is None or self._progress is None:
            raise RuntimeError("the stream was left before its end: no whole result")
        return self._finish(self._result, self._progress)

    async def aclose(self) -> None:
        """Close the connection. May be called twice, and by any task of the loop.

        A task that waits for the next chunk meanwhile gets a StreamInterruptedError.
        """
        reader = self._reader
        if reader is not None and reader is not asyncio.current_task():
            if self._left_alone is None:
                self._left_alone = asyncio.get_running_loop().create_future()
                reader.cancel()
            await asyncio.wait([self._left_alone])
        items, self._items = self._items, None
        self._next = None
        try:
            if items is not None:
                await items.aclose()
        finally:
            if self._progress is not None:
                await self._reporter.report(self._progress)

    async def _end(self) -> None:
        """Report a stream that was read to its end."""
        if self._result is None or self._progress is None:
            return
        try:
            self._finish(self._result, self._progress)
        except LLMServiceError as exc:
            self._progress.fail(exc)  # `result` raises it
        await self._reporter.report(self._progress)

    async def _pull(self) -> StreamChunk | ChatResult[Any]:
        """Take the next item, in time."""
        if self._broken is not None:
            raise StreamInterruptedError(**self._broken)
        if self._result is not None:
            raise StopAsyncIteration
        if self._items is None or self._progress is None:
            raise RuntimeError(
                "the stream is not open: read it inside `async with`, before its end"
            )
        self._reader = asyncio.current_task()
        cancelled = self._reader.cancelling() if self._reader is not None else 0
        try:
            if self._progress.ends is None:
                item = await anext(self._items)
            else:
                async with asyncio.timeout_at(self._progress.ends):
                    item = await anext(self._items)
        except asyncio.CancelledError:
            self._cancelled(self._reader, cancelled)
            raise
        except (StopAsyncIteration, TimeoutError, LLMServiceError, APIKeyError) as exc:
            raise await self._interrupted(exc, self._progress) from exc
        finally:
            self._reader = None
            if self._left_alone is not None and not self._left_alone.done():
                self._left_alone.set_result(None)
        if isinstance(item, StreamChunk):
            self._progress.add_chunk()
        return item

    def _cancelled(self, reader: "asyncio.Task[object] | None", before: int) -> None:
        """Note that a stream cannot be read on: what waited for the chunk is gone.

        Raises:
            StreamInterruptedError: It was `aclose` that cancelled the read, in another
                task, and nobody else.
        """
        if self._left_alone is None or reader is None:
            self._break(LLMServiceError("its reading was cancelled"))
            if self._progress is not None:
                self._progress.fail(asyncio.CancelledError())
            return
        error = self._break(LLMServiceError("it was closed while it was read"))
        if reader.uncancel() <= before:
            raise error from None

    async def _interrupted(self, exc: Exception, progress: CallProgress) -> Exception:
        """Close a broken stream; make its error, and remember it for who asks again."""
        error = self._explain(exc, progress)
        progress.fail(error)
        await self.aclose()
        return error

    def _explain(self, exc: Exception, progress: CallProgress) -> Exception:
        if isinstance(exc, TimeoutError):
            if progress.left() > 0:
                return exc  # somebody else's
            exc = progress.deadline_error()
        if not isinstance(exc, LLMServiceError | APIKeyError):
            exc = ServiceUnavailableError("it ended without a result")
        return self._break(exc)

    def _break(self, cause: LLMServiceError | APIKeyError) -> StreamInterruptedError:
        progress = self._progress
        self._broken = {
            "message": f"the stream broke off after {sum(map(len, self._text))} characters:"
            f" {cause}",
            "partial_text": "".join(self._text),
            "service": cause.service or (progress.service if progress else None),
            "model": cause.model or (progress.model if progress else None),
            "status_code": cause.status_code,
            "retry_after": cause.retry_after,
            "request_id": cause.request_id,
            "attempts": progress.attempts if progress else 0,
            "details": {"cause": type(cause).__name__, **cause.details},
        }
        return StreamInterruptedError(**self._broken)
