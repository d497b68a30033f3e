"""Whether an attempt is retried, after how long, and until when.

The only retry policy: LiteLLM and the SDKs below it get 0 retries. stamina runs the loop
and sleeps; this module decides.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

from dipeo_llm.errors import (
    CallError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMTimeoutError,
)
from dipeo_llm.settings import Settings


class Deadline:
    """The deadline of a whole call: key, prompt, media, attempts and waits together.

    As an async context manager it cancels its block when the time is over.

    Args:
        seconds: From now, on the running event loop; None: without a deadline.
    """

    def __init__(self, seconds: float | None = None) -> None:
        now = asyncio.get_running_loop().time()
        self.seconds = seconds
        self.ends = None if seconds is None else now + seconds
        """On the event loop's clock."""
        self.service: str | None = None
        self.model: str | None = None
        self.attempts = 0
        """Attempts started so far."""
        self.requests: int | None = None
        """Requests of the whole call; None before its end."""
        self.last: DiPeOLLMError | None = None
        """The failure of the previous attempt."""
        self._limit = asyncio.timeout_at(self.ends)

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        last, self.last = self.last, None
        try:
            await self._limit.__aexit__(kind, exc, trace)
        except TimeoutError:
            self.last = last
            raise self.error() from last

    def left(self) -> float:
        """Return the seconds that remain."""
        if self.ends is None:
            return math.inf
        return self.ends - asyncio.get_running_loop().time()

    def error(self) -> LLMTimeoutError:
        """Return the error for a call that took too long."""
        before = f"; the previous attempt failed with: {self.last}" if self.last else ""
        outcome = (
            f"{self.service} did not answer" if self.attempts else "nothing was sent"
        )
        return LLMTimeoutError(
            f"{outcome} within the deadline of {self.seconds:g} s{before}",
            service=self.service,
            model=self.model,
            attempts=self.attempts,
            retryable=False,
        )


class RetryPolicy:
    """Decides, after each failed attempt of one call, whether to make another and when.

    Args:
        settings: The waits and their limits.
        deadline: Counts the attempts, and ends the call.
    """

    def __init__(self, settings: Settings, deadline: Deadline) -> None:
        self._settings = settings
        self._deadline = deadline

    def __call__(self, error: Exception) -> bool | float:
        """Return False to give up, True to back off, or the seconds to wait.

        A wait that the provider asks for and that is longer than `retry_after_max`, or
        than the rest of the deadline, ends the call at once: the error says in
        `retry_after` when to come back.
        """
        if not getattr(error, "retryable", False):
            return False
        wait = getattr(error, "retry_after", None)
        if self._deadline.left() <= (wait or 0.0):
            return False
        if wait is None:
            return True
        return False if wait > self._settings.retry_after_max else float(wait)

    def is_last(self, error: DiPeOLLMError) -> bool:
        """Note a failed attempt, and say whether it was the last."""
        deadline = self._deadline
        deadline.last = error
        if isinstance(error, CallError):
            was_sent = bool(error.status_code) or not isinstance(
                error, InvalidRequestError
            )
            error.attempts = deadline.attempts - (not was_sent)
        return deadline.attempts > self._settings.max_retries or self(error) is False

    def steps(self) -> AsyncIterator[Any]:
        """Return stamina's steps; it waits between them."""
        import stamina

        settings = self._settings
        return aiter(
            stamina.retry_context(
                on=self,
                attempts=settings.max_retries + 1,
                timeout=None,
                wait_initial=settings.retry_wait,
                wait_max=settings.retry_wait_max,
                wait_jitter=settings.retry_wait,
            )
        )
