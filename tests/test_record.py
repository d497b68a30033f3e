"""The record of a call: made once, however the call ends; the hook that gets it."""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    CallRecord,
    ChatResult,
    ContentFilterError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMInfraService,
    LLMTimeoutError,
    Message,
    PersonLLMConfig,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    StreamInterruptedError,
    StructuredOutputError,
    TokenUsage,
)
from dipeo_llm.streaming import ChatStream
from dipeo_llm.testing import MockLLMAdapter, Reply
from tests.conftest import MODELS, each_provider
from tests.provider_server import Answer, Fault, ProviderServer, Raw, error

SECRET = "a-secret-of-the-prompt"
ASKED = [{"role": "user", "content": SECRET}]

OpenRecorded = Callable[
    ..., AbstractAsyncContextManager[tuple[LLMInfraService, list[CallRecord]]]
]


@pytest.fixture
def recorded(keys: StaticAPIKeys) -> OpenRecorded:
    """Open a service on the loopback server, with the list that its hook fills."""

    @asynccontextmanager
    async def open_service(
        **settings: Any,
    ) -> AsyncIterator[tuple[LLMInfraService, list[CallRecord]]]:
        records: list[CallRecord] = []
        usual = {"retry_wait": 0.01, "retry_wait_max": 0.02, "timeout": 20.0}
        service = LLMInfraService(
            keys, settings=Settings(**usual | settings), on_call=records.append
        )
        async with service:
            await service.initialize()
            yield service, records

    return open_service


def mocked(*replies: Any, **options: Any) -> LLMInfraService:
    """Make a service that answers from a script."""
    return LLMInfraService(
        StaticAPIKeys({"k": {"key": "sk-test-openai", "service": "openai"}}),
        adapter_factory=MockLLMAdapter(*replies),
        settings=Settings(retry_wait=0.01, close_grace=1.0),
        **options,
    )


async def ask(
    service: LLMInfraService, provider: str = "openai", **options: Any
) -> ChatResult[Any]:
    """Make a call."""
    result: ChatResult[Any] = await service.complete(
        ASKED, MODELS[provider], provider, **options
    )
    return result


async def ask_by_stream(service: LLMInfraService, **options: Any) -> ChatResult[Any]:
    """Make a call and read it as a stream."""
    async with service.stream(ASKED, MODELS["openai"], "openai", **options) as stream:
        return await stream.result()


async def ask_mock(service: LLMInfraService, **options: Any) -> ChatResult[Any]:
    """Make a call of a service that answers from a script."""
    result: ChatResult[Any] = await service.complete(
        ASKED, "gpt-4.1-nano", "k", **options
    )
    return result


# --- a whole answer -------------------------------------------------------------------


@each_provider
async def test_an_answer_is_recorded(
    server: ProviderServer, recorded: OpenRecorded, provider: str
) -> None:
    """The record says what the result says, and holds neither prompt, answer nor key."""
    server.reply(Answer(SECRET, input_tokens=7, output_tokens=3, delay=0.05))

    async with recorded() as (service, records):
        result = await ask(service, provider, temperature=0.5, max_tokens=9)

    [record] = records
    assert (record.service, record.model) == (provider, MODELS[provider])
    assert (record.status, record.error, record.is_stream) == ("ok", None, False)
    assert record.options == {"temperature": 0.5, "max_tokens": 9}
    assert record.usage == result.token_usage
    assert record.usage is not None
    assert (record.usage.input, record.usage.output) == (7, 3)
    assert record.cost_usd == result.cost_usd
    assert record.finish_reason == result.finish_reason == "stop"
    assert record.request_id == result.request_id
    assert record.response_model == result.model
    assert record.requests == result.attempts == 1
    assert [a.error for a in record.attempts] == [None]
    assert 0.05 <= record.attempts[0].duration <= record.duration < 5
    assert record.first_chunk is None
    assert server.base_url(provider).startswith(str(record.server))
    assert SECRET not in repr(record)
    assert "sk-test" not in repr(record)


async def test_a_record_is_plain_data(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """It can be stored and sent to another process, but not changed."""
    async with recorded() as (service, records):
        await ask(service)

    [record] = records
    assert pickle.loads(pickle.dumps(record)) == record
    assert dataclasses.asdict(record)["model"] == MODELS["openai"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.model = "another"  # type: ignore[misc]


async def test_a_caller_that_changes_its_usage_changes_no_record() -> None:
    """The record holds a copy."""
    records: list[CallRecord] = []

    async with mocked(Reply(usage=TokenUsage(input=1)), on_call=records.append) as it:
        result = await ask_mock(it)
        assert result.token_usage is not None
        result.token_usage.input = 99

    assert records[0].usage == TokenUsage(input=1)


async def test_attempts_are_recorded_with_their_waits(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """Each with its error, its status, and the seconds before the next one."""
    server.reply(
        Fault("reset"), error("openai", 429, SECRET, retry_delay=0.2), Answer()
    )

    async with recorded() as (service, records):
        await ask(service)

    [record] = records
    first, second, last = record.attempts
    assert (first.error, first.status_code) == ("ServiceUnavailableError", None)
    assert 0.0 < (first.wait or 0.0) <= 0.02
    assert (second.error, second.status_code) == ("RateLimitError", 429)
    assert second.wait == 0.2
    assert (last.error, last.wait) == (None, None)
    assert last.start >= second.start + second.duration + 0.2
    assert record.status == "ok"
    assert record.requests == 3
    assert SECRET not in repr(record)


@each_provider
@pytest.mark.parametrize("status", [400, 401, 404, 503])
async def test_a_failure_is_recorded(
    server: ProviderServer, recorded: OpenRecorded, provider: str, status: int
) -> None:
    """With the class of its error and the status; its usage is unknown, not zero."""
    server.default = error(provider, status, SECRET)

    async with recorded(max_retries=0) as (service, records):
        with pytest.raises(DiPeOLLMError) as caught:
            await ask(service, provider)

    [record] = records
    assert record.status == "error"
    assert record.error == type(caught.value).__name__
    assert record.status_code == status
    assert record.request_id == getattr(caught.value, "request_id", None)
    assert (record.usage, record.cost_usd, record.requests) == (None, None, 1)
    assert SECRET not in repr(record)


async def test_a_call_that_sends_nothing_is_recorded(recorded: OpenRecorded) -> None:
    """A missing key and a model without a provider are failed calls without attempts."""
    async with recorded() as (service, records):
        for model, key in (("gpt-4.1-nano", "unknown"), ("no-such-model", "openai")):
            with pytest.raises(DiPeOLLMError):
                await service.complete(ASKED, model, key)

    assert [r.service for r in records] == ["openai", None]
    assert [r.model for r in records] == ["gpt-4.1-nano", "no-such-model"]
    assert [r.status for r in records] == ["error", "error"]
    assert [(r.attempts, r.requests) for r in records] == [((), 0)] * 2


async def test_misuse_is_not_a_call(recorded: OpenRecorded) -> None:
    """What is refused before anything begins is not recorded."""
    async with recorded() as (service, records):
        with pytest.raises(TypeError):
            await ask(service, temprature=1)
        with pytest.raises(InvalidRequestError):
            await service.complete([], "gpt-4.1-nano", "openai")

    assert records == []


async def test_questions_are_not_calls(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """Listing models and counting tokens use no tokens."""
    async with recorded() as (service, records):
        await service.get_available_models("openai")
        await service.count_tokens(ASKED, "claude-sonnet-4-5", "anthropic")

    assert records == []


@each_provider
async def test_a_cancelled_call_is_recorded(
    server: ProviderServer, recorded: OpenRecorded, provider: str
) -> None:
    """Once, with the attempt that was under way."""
    server.default = Fault("stall")

    async with recorded() as (service, records):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await ask(service, provider)

    [record] = records
    assert (record.status, record.error) == ("cancelled", "CancelledError")
    assert (record.usage, record.cost_usd) == (None, None)
    assert [a.error for a in record.attempts] == ["CancelledError"]


async def test_a_call_that_is_cancelled_between_attempts(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """The attempts that there were are recorded, and no other."""
    server.default = error("openai", 429, retry_delay=30)

    async with recorded() as (service, records):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await ask(service)

    [record] = records
    assert [(a.error, a.wait) for a in record.attempts] == [("RateLimitError", 30.0)]
    assert (record.status, record.requests) == ("cancelled", 1)


async def test_a_deadline_is_recorded(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """As the error that the caller sees, not as a cancellation."""
    server.default = Fault("stall")

    async with recorded() as (service, records):
        with pytest.raises(LLMTimeoutError):
            await ask(service, deadline=0.2)

    [record] = records
    assert (record.status, record.error) == ("error", "LLMTimeoutError")
    assert record.duration >= 0.2


class River(BaseModel):
    """A typed answer."""

    name: str


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_answer_of_the_wrong_form_is_recorded(
    server: ProviderServer, recorded: OpenRecorded, *, is_stream: bool
) -> None:
    """As an error, whose tokens were used all the same."""
    server.reply(Answer("no JSON"))
    options: dict[str, Any] = {"response_format": River}

    async with recorded() as (service, records):
        call = ask_by_stream if is_stream else ask
        with pytest.raises(StructuredOutputError):
            await call(service, **options)

    [record] = records
    assert (record.status, record.error) == ("error", "StructuredOutputError")
    assert record.options == {"response_format": "json_schema"}
    assert record.usage is not None
    assert record.usage.output == 5
    assert [a.error for a in record.attempts] == [None]


async def test_the_wait_for_a_permit_is_recorded(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """The second of two calls waits until the first has ended."""
    server.default = Answer(delay=0.2)

    async with recorded(max_concurrency=1) as (service, records):
        await asyncio.gather(ask(service), ask(service))

    first, second = sorted(record.queued or 0.0 for record in records)
    assert first < 0.1 < second < 5


class Phase(Enum):
    """An application's own enumeration."""

    CHOICE = "choice"


async def test_labels_and_persons_are_recorded() -> None:
    """As text, of a bounded length, from keywords and from a bundle of options."""
    records: list[CallRecord] = []
    config = PersonLLMConfig(model="gpt-4.1-nano", api_key_id="k")
    said = [Message(from_person_id="system", to_person_id="7", content=SECRET)]

    async with mocked(on_call=records.append) as service:
        await ask_mock(service, execution_id=42, execution_phase=Phase.CHOICE)
        await ask_mock(service, options={"trace_id": "t" * 999}, node_id="n")
        await service.complete_with_person(said, 7, config, execution_id="e")
        async with service.stream_with_person(said, 7, config) as stream:
            await stream.result()

    assert [record.labels for record in records] == [
        {"execution_id": "42", "execution_phase": "choice"},
        {"trace_id": "t" * 256, "node_id": "n"},
        {"execution_id": "e"},
        {},
    ]
    assert [record.person_id for record in records] == [None, None, "7", "7"]


# --- a stream -------------------------------------------------------------------------


@each_provider
async def test_a_stream_is_recorded(
    server: ProviderServer, recorded: OpenRecorded, provider: str
) -> None:
    """With its chunks and their times; asking for the result again changes nothing."""
    server.reply(Answer(SECRET * 4, delay=0.1, chunk_delay=0.05))

    async with recorded() as (service, records):
        async with service.stream(ASKED, MODELS[provider], provider) as stream:
            chunks = [chunk async for chunk in stream]
            assert len(records) == 1
            result = await stream.result()
        await stream.result()

    [record] = records
    assert (record.status, record.is_stream) == ("ok", True)
    assert record.usage == result.token_usage
    assert record.finish_reason == "stop"
    assert record.chunks == len(chunks) > 1
    assert record.first_chunk is not None
    assert record.last_chunk is not None
    assert 0.1 <= record.first_chunk < record.last_chunk <= record.duration
    assert SECRET not in repr(record)


async def leave_by_break(stream: ChatStream) -> None:
    """Break out of the loop."""
    async with stream:
        async for _ in stream:
            break


async def leave_by_error(stream: ChatStream) -> None:
    """Raise something else in the loop."""
    with contextlib.suppress(ZeroDivisionError):
        async with stream:
            async for _ in stream:
                raise ZeroDivisionError


async def leave_by_closing(stream: ChatStream) -> None:
    """Close it by hand, twice."""
    async with stream:
        await anext(stream)
        await stream.aclose()
        await stream.aclose()


async def leave_by_closing_elsewhere(stream: ChatStream) -> None:
    """Close it while another task reads."""
    async with stream:
        await anext(stream)
        reader = asyncio.create_task(stream.result())
        await asyncio.sleep(0.05)
        await stream.aclose()
        with pytest.raises(StreamInterruptedError):
            await reader


async def leave_by_forgetting(stream: ChatStream) -> None:
    """Drop the last reference to it, without closing it."""
    await stream.__aenter__()
    await anext(stream)


async def cancel_reading(stream: ChatStream) -> None:
    """Cancel the task that waits for a chunk."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2), stream:
            await stream.result()


async def cancel_elsewhere(stream: ChatStream) -> None:
    """Cancel the task while it does something else in the block."""

    async def block() -> None:
        async with stream:
            await anext(stream)
            await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(block(), 0.2)


@pytest.mark.parametrize(
    ("leave", "status"),
    [
        (leave_by_break, "left"),
        (leave_by_error, "left"),
        (leave_by_closing, "left"),
        (leave_by_closing_elsewhere, "left"),
        (leave_by_forgetting, "left"),
        (cancel_reading, "cancelled"),
        (cancel_elsewhere, "cancelled"),
    ],
)
async def test_a_stream_that_is_left_is_recorded_once(
    server: ProviderServer,
    recorded: OpenRecorded,
    leave: Callable[[ChatStream], Coroutine[Any, Any, None]],
    status: str,
) -> None:
    """However it is left; what it used is unknown, not zero."""
    server.reply(Answer("x" * 40, stall_after=2))

    async with recorded() as (service, records):
        held = [service.stream(ASKED, MODELS["openai"], "openai")]
        await leave(held[0])
        held.clear()
        gc.collect()
        await asyncio.sleep(0.01)
        assert len(records) == 1

    [record] = records
    assert record.status == status
    assert (record.usage, record.cost_usd, record.finish_reason) == (None, None, None)
    assert record.chunks >= 1
    assert len(record.attempts) == 1


TOLD = pytest.mark.parametrize(
    ("provider", "answer", "told"),
    [
        # message_start tells the input; its 1 token of output is only a start.
        (
            "anthropic",
            Answer("x" * 40, input_tokens=30, cached_tokens=8, cache_write_tokens=9),
            TokenUsage(input=30, output=1, cached=8, cache_written=9),
        ),
        # Each response tells what has been counted so far.
        (
            "google",
            Answer("x" * 40, input_tokens=30),
            TokenUsage(input=30),
        ),
    ],
)
"""What a provider has told of the usage before the end of a stream."""


@TOLD
@pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_closing_elsewhere, leave_by_forgetting, cancel_reading],
)
async def test_a_stream_that_is_left_keeps_the_usage_that_was_told(
    server: ProviderServer,
    recorded: OpenRecorded,
    provider: str,
    answer: Answer,
    told: TokenUsage,
    leave: Callable[[ChatStream], Coroutine[Any, Any, None]],
) -> None:
    """The rest is unknown: the cost too, and the call counts as one of unknown usage."""
    server.reply(dataclasses.replace(answer, pieces=8, stall_after=5))

    async with recorded() as (service, records):
        held = [service.stream(ASKED, MODELS[provider], provider)]
        await leave(held[0])
        held.clear()
        gc.collect()
        await asyncio.sleep(0.01)
        totals = service.usage().total

    [record] = records
    assert (record.usage, record.is_usage_partial) == (told, True)
    assert (record.cost_usd, totals.cost_usd) == (None, 0.0)
    assert totals.tokens == told
    assert (totals.unknown_usage, totals.unknown_cost) == (1, 1)


@TOLD
async def test_a_stream_that_breaks_off_keeps_the_usage_that_was_told(
    server: ProviderServer,
    recorded: OpenRecorded,
    provider: str,
    answer: Answer,
    told: TokenUsage,
) -> None:
    """By the provider's error, the end of the connection, or the deadline."""
    faults: list[dict[str, Any]] = [
        {"error_after": 5},
        {"cut_after": 5},
        {"stall_after": 5},
    ]
    server.reply(*(dataclasses.replace(answer, pieces=8, **each) for each in faults))

    async with recorded() as (service, records):
        for _ in faults:
            with pytest.raises(StreamInterruptedError):
                async with service.stream(
                    ASKED, MODELS[provider], provider, deadline=0.5
                ) as stream:
                    await stream.result()

    assert [r.usage for r in records] == [told] * 3
    assert all(r.is_usage_partial for r in records)


async def test_a_stream_that_ends_before_its_first_chunk_keeps_the_usage(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """Anthropic tells the input before the model has said anything."""
    server.default = Answer("x" * 40, input_tokens=30, stall_after=1)

    async with recorded() as (service, records):
        with pytest.raises(LLMTimeoutError):
            async with service.stream(
                ASKED, MODELS["anthropic"], "anthropic", deadline=0.3
            ):
                pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await service.stream(
                    ASKED, MODELS["anthropic"], "anthropic"
                ).__aenter__()

    assert [record.status for record in records] == ["error", "cancelled"]
    for record in records:
        assert record.usage == TokenUsage(input=30, output=1)
        assert record.chunks == 0


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_prompt_that_google_blocks_keeps_its_usage(
    server: ProviderServer, recorded: OpenRecorded, *, is_stream: bool
) -> None:
    """The answer has no text, but it says how many tokens were read."""
    body = (
        b'{"promptFeedback": {"blockReason": "SAFETY"},'
        b' "usageMetadata": {"promptTokenCount": 30, "totalTokenCount": 30}}'
    )
    headers = {"content-type": "application/json"}
    if is_stream:
        headers, body = {"content-type": "text/event-stream"}, b"data: %b\n\n" % body
    server.default = Raw(headers=headers, body=body)

    async with recorded() as (service, records):
        call = (
            service.stream(ASKED, MODELS["google"], "google").__aenter__()
            if is_stream
            else service.complete(ASKED, MODELS["google"], "google")
        )
        with pytest.raises(ContentFilterError):
            await call

    [record] = records
    assert record.usage == TokenUsage(input=30)


async def test_a_stream_from_the_cache_that_is_left_is_cached(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Its model was not asked, and did not answer within a millisecond."""
    records: list[CallRecord] = []
    service = LLMInfraService(keys, cache="memory://", on_call=records.append)

    async with service:
        await service.complete(ASKED, MODELS["openai"], "openai")
        async with service.stream(ASKED, MODELS["openai"], "openai") as stream:
            await anext(stream)

    assert [(r.status, r.cached) for r in records] == [("ok", False), ("left", True)]
    assert service.usage().total.cached == 1


async def test_callers_that_share_a_stream_count_its_usage_once(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """One leaves early, the other reads to the end: the tokens are the other's."""
    server.default = Answer("x" * 40, input_tokens=30, chunk_delay=0.05)
    service = LLMInfraService(keys, cache="memory://")

    async with service:
        first, second = (
            service.stream(ASKED, MODELS["anthropic"], "anthropic") for _ in range(2)
        )
        async with first, second:
            await anext(first)
            await first.aclose()
            await second.result()
        total = service.usage().total

    assert len(server.requests) == 1
    assert total.tokens.input == 30


@each_provider
async def test_a_broken_stream_is_recorded(
    server: ProviderServer, recorded: OpenRecorded, provider: str
) -> None:
    """As the error that its reader gets."""
    server.reply(Answer("x" * 40, pieces=8, cut_after=6))

    async with recorded() as (service, records):
        with pytest.raises(StreamInterruptedError):
            async with service.stream(ASKED, MODELS[provider], provider) as stream:
                await stream.result()

    [record] = records
    assert (record.status, record.error) == ("error", "StreamInterruptedError")
    assert record.cost_usd is None
    if provider in {"openai", "ollama"}:  # they tell it at the end
        assert record.usage is None


async def test_a_stream_that_is_late_is_recorded(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """The deadline is its error, before the first chunk and after it."""
    server.reply(Fault("stall"), Answer("x" * 40, stall_after=2))

    async with recorded() as (service, records):
        for expected in (LLMTimeoutError, StreamInterruptedError):
            with pytest.raises(expected):
                async with service.stream(
                    ASKED, MODELS["openai"], "openai", deadline=0.3
                ) as stream:
                    await stream.result()

    assert [(r.status, r.error) for r in records] == [
        ("error", "LLMTimeoutError"),
        ("error", "StreamInterruptedError"),
    ]


async def test_a_stream_that_cannot_be_opened_is_recorded(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """With its attempts, as a whole answer; one that was never entered is not."""
    server.default = error("openai", 503)

    async with recorded(max_retries=1) as (service, records):
        service.stream(ASKED, MODELS["openai"], "openai")
        with pytest.raises(ServiceUnavailableError):
            async with service.stream(ASKED, MODELS["openai"], "openai"):
                pass

    [record] = records
    assert [a.status_code for a in record.attempts] == [503, 503]
    assert (record.first_chunk, record.chunks, record.requests) == (None, 0, 2)


@pytest.mark.parametrize("is_coroutine", [False, True])
def test_a_stream_that_outlives_its_loop_is_recorded(
    caplog: pytest.LogCaptureFixture, *, is_coroutine: bool
) -> None:
    """The garbage collector finds it; there is no loop any more to run a coroutine."""
    hook = _Hook()
    service = mocked(
        ["a", "b"], on_call=hook.coroutine if is_coroutine else hook.function
    )
    held: list[ChatStream] = []

    async def main() -> None:
        held.append(service.stream(ASKED, "gpt-4.1-nano", "k"))
        await held[0].__aenter__()

    asyncio.run(main())
    held.clear()
    gc.collect()

    statuses = [record.status for record in hook.records]
    assert statuses == ([] if is_coroutine else ["left"])
    assert ("on_call was not awaited" in caplog.text) is is_coroutine
    assert service.usage().total.cancelled == 1


# --- the hook -------------------------------------------------------------------------


class _Hook:
    """Hooks of every kind, which fill one list."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []

    def function(self, record: CallRecord) -> None:
        self.records.append(record)

    async def coroutine(self, record: CallRecord) -> None:
        await asyncio.sleep(0.01)
        self.records.append(record)

    async def __call__(self, record: CallRecord) -> None:
        await self.coroutine(record)


@pytest.mark.parametrize(
    "kind",
    [
        lambda hook: hook.function,
        lambda hook: hook.coroutine,
        lambda hook: functools.partial(hook.coroutine),
        lambda hook: hook,
    ],
    ids=["function", "coroutine", "partial", "object"],
)
async def test_a_hook_is_a_function_or_a_coroutine_function(
    kind: Callable[[_Hook], Any],
) -> None:
    """It has run when the call returns, and when the stream has ended or was left."""
    hook = _Hook()

    async with mocked(on_call=kind(hook)) as service:
        await ask_mock(service)
        assert len(hook.records) == 1
        async with service.stream(ASKED, "gpt-4.1-nano", "k") as stream:
            await stream.result()
            assert len(hook.records) == 2
        async with service.stream(ASKED, "gpt-4.1-nano", "k") as stream:
            await anext(stream)
        assert len(hook.records) == 3

    assert [record.status for record in hook.records] == ["ok", "ok", "left"]


async def _failing_later(record: CallRecord) -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError("of the hook")


def _failing(record: CallRecord) -> None:
    raise ZeroDivisionError("of the hook")


def _cancelling(record: CallRecord) -> None:
    raise asyncio.CancelledError("of the hook")


async def _cancelling_later(record: CallRecord) -> None:
    raise asyncio.CancelledError("of the hook")


class _OfAnApplicationError(BaseException):
    pass


def _leaving(record: CallRecord) -> None:
    raise _OfAnApplicationError("of the hook")


async def _leaving_later(record: CallRecord) -> None:
    raise _OfAnApplicationError("of the hook")


@pytest.mark.parametrize(
    "hook",
    [
        _failing,
        _failing_later,
        _cancelling,
        _cancelling_later,
        _leaving,
        _leaving_later,
    ],
)
async def test_a_failing_hook_breaks_nothing(
    hook: Callable[[CallRecord], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither an answer nor an error; it is logged, without the error of the call."""
    refused = RateLimitError(f"too many: {SECRET}", retryable=False)

    async with mocked("Hello", refused, on_call=hook) as service:
        assert (await ask_mock(service)).text == "Hello"
        with pytest.raises(RateLimitError):
            await ask_mock(service)

    failed = [r for r in caplog.records if r.getMessage() == "on_call failed"]
    assert [r.levelno for r in failed] == [logging.ERROR] * 2
    assert caplog.text.count("Error: of the hook") == 2
    assert SECRET not in caplog.text
    assert service.usage().total.calls == 2


async def test_a_hook_cannot_change_what_is_counted() -> None:
    """It gets a record of its own; its mappings and its usage can be written to."""

    def forge(record: CallRecord) -> None:
        dict.clear(record.labels)  # type: ignore[arg-type] # it is one
        if record.usage is not None:
            record.usage.input = 1_000_000

    async with mocked("Hello", on_call=forge) as service:
        result = await ask_mock(service, execution_id="run-1")
        used = service.usage()

    assert used.by_execution["run-1"].tokens == result.token_usage


async def test_a_hook_may_call_the_service() -> None:
    """Its calls are calls like any other, also where one at a time is allowed."""
    records: list[CallRecord] = []

    async def ask_again(record: CallRecord) -> None:
        records.append(record)
        if len(records) < 3:
            await ask_mock(service)

    async with mocked("a", "b", "c", on_call=ask_again) as service:
        async with asyncio.timeout(5):
            assert (await ask_mock(service)).text == "a"

    assert len(records) == service.usage().total.calls == 3


async def test_a_cancelled_call_does_not_wait_for_its_hook() -> None:
    """`aclose` does, so that the hook ends before the service is closed."""
    ended: list[CallRecord] = []

    async def slow(record: CallRecord) -> None:
        await asyncio.sleep(0.3)
        ended.append(record)

    async with mocked(Reply(delay=30.0), on_call=slow) as service:
        call = asyncio.create_task(ask_mock(service))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.wait([call], timeout=0.1)
        assert call.cancelled()
        assert ended == []

    assert [record.status for record in ended] == ["cancelled"]


async def test_cancelling_a_call_does_not_cancel_its_hook() -> None:
    """The answer is there and the hook runs: it runs on, once."""
    ended: list[CallRecord] = []

    async def slow(record: CallRecord) -> None:
        await asyncio.sleep(0.2)
        ended.append(record)

    async with mocked(on_call=slow) as service:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ask_mock(service)
        assert ended == []

    assert [record.status for record in ended] == ["ok"]


async def test_a_hook_that_never_ends_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`aclose` waits for its grace, says so, and leaves no task."""
    cancelled = asyncio.Event()

    async def stuck(record: CallRecord) -> None:
        try:
            await asyncio.sleep(300)
        finally:
            cancelled.set()

    before = asyncio.all_tasks()
    service = mocked(on_call=stuck)
    call = asyncio.create_task(ask_mock(service))
    await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await service.aclose()
        await call
    await asyncio.sleep(0)

    assert cancelled.is_set()
    assert "did not end" in caplog.text
    assert asyncio.all_tasks() <= before


async def test_a_hook_may_close_the_service() -> None:
    """`aclose` does not wait for the task that calls it."""

    async def close(record: CallRecord) -> None:
        await service.aclose()

    service = mocked(on_call=close)
    async with asyncio.timeout(0.9):
        await ask_mock(service)


async def test_calls_in_flight_are_reported_before_aclose_returns(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Calls whose connection `aclose` closes have had their hook when it returns."""
    server.default = Fault("stall")
    hook = _Hook()
    service = LLMInfraService(
        keys, settings=Settings(close_grace=0.1), on_call=hook.coroutine
    )
    await service.initialize()
    calls = [asyncio.create_task(ask(service)) for _ in range(5)]
    await asyncio.sleep(0.3)

    await service.aclose()

    assert [record.error for record in hook.records] == ["ServiceUnavailableError"] * 5
    assert service.usage().total.errors == 5
    got = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(exc) for exc in got} == {ServiceUnavailableError}


async def test_streams_that_are_open_are_reported_before_aclose_returns(
    server: ProviderServer, recorded: OpenRecorded
) -> None:
    """One that is being read breaks off; one that nobody reads counts as left."""
    server.default = Answer("x" * 40, stall_after=2)

    async with recorded(close_grace=0.05) as (service, records):
        held, read = (service.stream(ASKED, MODELS["openai"], "openai") for _ in "ab")
        await held.__aenter__()
        await read.__aenter__()
        reader = asyncio.create_task(read.result())
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            await service.aclose()
        assert sorted(record.status for record in records) == ["error", "left"]

        with pytest.raises(StreamInterruptedError, match="closed"):
            await reader
        with pytest.raises(StreamInterruptedError, match="closed"):
            await held.result()
        await held.aclose()
    assert len(records) == 2


def test_one_hook_serves_two_event_loops() -> None:
    """Each call's hook runs on the call's own loop; nothing is lost between them."""
    loops: list[Any] = []

    async def hook(record: CallRecord) -> None:
        await asyncio.sleep(0.001)
        loops.append(asyncio.get_running_loop())

    service = mocked(on_call=hook)

    async def calls() -> Any:
        await asyncio.gather(*(ask_mock(service) for _ in range(50)))
        return asyncio.get_running_loop()

    seen: list[Any] = []
    threads = [
        threading.Thread(target=lambda: seen.append(asyncio.run(calls())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(loops.count, seen)) == [50, 50]
    assert service.usage().total.calls == 100
