"""The state of one call while it runs, and its deadline.

Notes what the record of the call will say. Knows no provider and sends nothing.
"""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from dipeo_llm.domain import ChatResult, TokenUsage, UsageSoFar, label
from dipeo_llm.errors import CallError, DiPeOLLMError, LLMTimeoutError
from dipeo_llm.record import AttemptRecord, CallRecord, Status

if TYPE_CHECKING:
    from dipeo_llm.adapters.base import Target
    from dipeo_llm.telemetry import CallTrace

_NOTHING: Mapping[str, Any] = {}


class CallProgress:
    """What has happened in one call so far.

    As an async context manager it cancels its block when the call's deadline is over:
    key, prompt, media, attempts and waits together.

    Args:
        seconds: The deadline from now, on the running event loop; None: without one.
        model: The model string.
        person_id: The person that answers.
        is_stream: Whether the answer is read as a stream.
        options: As in `CallRecord`.
        labels: Likewise.
    """

    def __init__(
        self,
        seconds: float | None = None,
        *,
        model: str = "",
        person_id: str | None = None,
        is_stream: bool = False,
        options: Mapping[str, Any] = _NOTHING,
        labels: Mapping[str, str] = _NOTHING,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._now = self.loop.time
        self._start = self._now()
        self._started_at = time.time()
        self.seconds = seconds
        self.ends = None if seconds is None else self._start + seconds
        """On the event loop's clock."""
        self.service: str | None = None
        self.model = model
        self.attempts = 0
        """Attempts started so far."""
        self.requests: int | None = None
        """Requests of the whole call; None before its end."""
        self.last: DiPeOLLMError | None = None
        """The failure of the previous attempt."""
        self.prompt: str | None = None
        """The file of the prompt template, as in `CallRecord`."""
        self.prompt_version: str | None = None
        self.route: str | None = None
        """The route that was asked for, as in `CallRecord`, like the next two."""
        self.deployment: str | None = None
        self.tried: list[str] = []
        self.queued = 0.0
        """Seconds that the call waited for a deployment of its route."""
        self.target: Target | None = None
        """What answered."""
        self.is_stream = is_stream
        self.trace: CallTrace | None = None
        """What telemetry keeps of the call, if it is on."""
        self.is_cached = False
        """Whether a stream comes from a cache of this package."""
        self.is_recorded = False
        self._person_id = person_id
        self._options = options
        self._labels = labels
        self._base_url: str | None = None
        self._attempt_start: float | None = None
        self._past_attempts: tuple[AttemptRecord, ...] = ()
        self._first_chunk: float | None = None
        self._last_chunk: float | None = None
        self._chunks = 0
        self._result: ChatResult[Any] | None = None
        self._failure: _Failure | None = None
        self._usage_so_far: UsageSoFar | None = None
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
            error = self.deadline_error()
            self.last = None
            raise error from last

    def left(self) -> float:
        """Return the seconds that remain until the deadline."""
        return math.inf if self.ends is None else self.ends - self._now()

    def deadline_error(self) -> LLMTimeoutError:
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

    @property
    def is_cancelled(self) -> bool:
        """Whether the call was cancelled."""
        return self._failure is not None and self._failure.status == "cancelled"

    def branch(self) -> "CallProgress":
        """Return a copy for work that other calls may share; it has no deadline yet."""
        made = copy(self)
        made.ends = None
        made.tried = list(self.tried)
        return made

    def follow(self, branch: "CallProgress") -> None:
        """Take over the attempts that were made for this call in a branch of it."""
        self.attempts, self.last = branch.attempts, branch.last
        self.service, self.model = branch.service, branch.model
        self._base_url, self.queued = branch._base_url, branch.queued  # noqa: SLF001
        self.deployment, self.tried = branch.deployment, list(branch.tried)
        self._attempt_start = branch._attempt_start  # noqa: SLF001 - its own class
        shift = branch._start - self._start  # noqa: SLF001
        self._past_attempts = tuple(
            replace(attempt, start=attempt.start + shift)
            for attempt in branch._past_attempts  # noqa: SLF001
        )

    # What happens in a call, in this order.

    def place(self, service: str, model: str, base_url: str | None = None) -> None:
        """Note the provider, its name of the model, and the address if it is known."""
        self.service, self.model, self._base_url = service, label(model), base_url

    def aim(self, target: "Target") -> None:
        """Note what the next attempts go to."""
        self.target, adapter = target, target.adapter
        endpoint = adapter.endpoint
        self.place(adapter.provider.name, adapter.model_name, endpoint.base_url)

    def send(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Note the whole conversation, for telemetry that reports content."""
        if self.trace is not None:
            self.trace.keep_messages(messages)

    def begin_attempt(self) -> None:
        """Note that an attempt begins."""
        self.attempts += 1
        self._attempt_start = self._now()

    def end_attempt(self, error: BaseException | None = None) -> bool:
        """Note that the attempt has ended, and whether it failed.

        Returns whether an attempt had begun.
        """
        has_begun = self._attempt_start is not None
        self._end_attempt(None if error is None else _Failure(error))
        return has_begun

    def retry(self, error: DiPeOLLMError, wait: float) -> None:
        """Note that another attempt follows the failed one after *wait* seconds."""
        self.last = error
        # A deployment without a key fails before its attempt begins.
        if self._past_attempts and self._past_attempts[-1].wait is None:
            *others, failed = self._past_attempts
            self._past_attempts = (*others, replace(failed, wait=wait))

    def watch_usage(self, usage: UsageSoFar | None) -> None:
        """Note where to find the usage of a call that ends without a result."""
        self._usage_so_far = usage

    def add_chunk(self) -> None:
        """Note that a chunk of a stream has arrived."""
        before, self._last_chunk = self._last_chunk, self._now()
        if before is None:
            self._first_chunk = self._last_chunk
        elif self.trace is not None:
            self.trace.chunk_gaps.append(self._last_chunk - before)
        self._chunks += 1

    def answer(self, result: ChatResult[Any]) -> None:
        """Note the result, and tell it how many requests the whole call sent."""
        if self.requests is None:
            # A request that met a stale connection was sent twice in its attempt.
            sent = self.attempts - 1 + result.attempts
            self.requests = 0 if result.cached else sent
        result.attempts = self.requests
        # A field of a pydantic object takes 2 µs to set.
        if self.route is not None:
            result.route = self.route
        if self.queued:
            result.queued += self.queued
            self.queued = 0.0
        if not self.is_recorded:
            self._result = result
            self.end_attempt()
            if self.trace is not None:
                self.trace.keep_result(result)

    def fail(self, error: BaseException) -> None:
        """Note how the call ended, if not with a result. The first failure counts."""
        if self._failure is None:
            self._failure = _Failure(error)
            if isinstance(error, CallError) and self.requests is None:
                self.requests = error.attempts

    def record(self) -> CallRecord:
        """Return the record of the call, which has ended."""
        duration = self._now() - self._start
        result, self._result = self._result, None
        failure = self._failure
        self._end_attempt(failure)
        # Its request, and the traceback of the last failure, refer to this object.
        self.target = self.last = None
        usage_so_far, self._usage_so_far = self._usage_so_far, None
        usage: TokenUsage | None = None
        if result is not None:
            usage = result.token_usage
        elif usage_so_far is not None:
            usage = usage_so_far()
        return CallRecord(
            service=self.service,
            model=self.model,
            is_stream=self.is_stream,
            options=self._options,
            server=_server(self._base_url),
            route=self.route,
            deployment=result.deployment if result else self.deployment,
            tried=tuple(result.tried if result else self.tried),
            status=failure.status if failure else ("ok" if result else "left"),
            error=failure.error if failure else None,
            status_code=failure.status_code if failure else None,
            finish_reason=result.finish_reason if result else None,
            response_model=result.model if result else None,
            request_id=(
                result.request_id if result else failure.request_id if failure else None
            ),
            # The caller may change its own.
            usage=usage.model_copy() if usage else None,
            is_usage_partial=result is None and usage is not None,
            cost_usd=result.cost_usd if result else None,
            cached=result.cached if result else self.is_cached,
            started_at=self._started_at,
            duration=duration,
            queued=result.queued if result else failure.queued if failure else None,
            first_chunk=self._since_start(self._first_chunk),
            last_chunk=self._since_start(self._last_chunk),
            chunks=self._chunks,
            attempts=self._past_attempts,
            requests=self.attempts if self.requests is None else self.requests,
            prompt=self.prompt,
            prompt_version=self.prompt_version,
            person_id=self._person_id,
            labels=self._labels,
        )

    def _end_attempt(self, failure: "_Failure | None") -> None:
        if self._attempt_start is None:
            return
        start, self._attempt_start = self._attempt_start, None
        attempt = AttemptRecord(
            start=start - self._start,
            duration=self._now() - start,
            error=failure.error if failure else None,
            status_code=failure.status_code if failure else None,
            deployment=self.deployment,
        )
        self._past_attempts += (attempt,)

    def _since_start(self, when: float | None) -> float | None:
        return None if when is None else when - self._start


class _Failure:
    """What a record says of an error. The error itself would keep its call alive."""

    __slots__ = ("error", "queued", "request_id", "status", "status_code")

    def __init__(self, error: BaseException) -> None:
        is_error = isinstance(error, Exception)
        self.status: Status = "error" if is_error else "cancelled"
        self.error = type(error).__name__
        self.status_code: int | None = None
        self.request_id: str | None = None
        self.queued: float | None = None
        if isinstance(error, CallError):
            self.status_code = error.status_code
            self.request_id = error.request_id
            self.queued = error.details.get("queued")


@lru_cache(maxsize=256)
def _server(base_url: str | None) -> str | None:
    """Return scheme, host and port of an address; a path may hold a secret."""
    if base_url is None:
        return None
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc}"
