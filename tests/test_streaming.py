"""A stream comes whole however its bytes are cut, and stops when nobody reads it."""

import asyncio
import contextlib
import gc
import json
import random
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    ChatResult,
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
    ToolConfig,
    ToolType,
)
from dipeo_llm.domain import StreamChunk
from dipeo_llm.streaming import ChatStream
from tests.conftest import HELLO, MODELS, PROVIDERS, Open, each_provider
from tests.provider_server import Answer, Fault, ProviderServer, Raw, error

TEXT = "Grüße 😀\n«ß»"
CALLS: list[tuple[str, Any]] = [
    ("weather", {"city": "Köln"}),
    ("clock", {"zone": "UTC", "parts": [1, {"two": None}]}),
]


def weather(city: str) -> None:
    """Tell the weather."""


def clock(zone: str, parts: list[Any]) -> None:
    """Tell the time."""


@pytest.fixture
async def service(opened: Open) -> AsyncIterator[LLMInfraService]:
    """Open a service on the direct engine that makes two attempts at most."""
    async with opened(engine="direct", max_retries=1) as made:
        yield made


def hello(service: LLMInfraService, provider: str, **options: Any) -> ChatStream:
    """Ask a provider's model for a stream."""
    return service.stream(HELLO, MODELS[provider], provider, **options)


async def read(stream: ChatStream) -> tuple[list[StreamChunk], ChatResult]:
    """Read a stream to its end."""
    async with stream:
        chunks = [chunk async for chunk in stream]
        return chunks, await stream.result()


async def collect(stream: ChatStream, chunks: list[StreamChunk]) -> None:
    """Add what a stream says to *chunks*, until it breaks off."""
    async for chunk in stream:
        chunks.append(chunk)  # noqa: PERF401 - what came before an error counts


# --- However it is cut ---------------------------------------------------------------


# Short but whole streams, as each provider writes them.
SHORT: dict[str, str] = {
    "openai": (
        'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
        '"choices":[{"index":0,"delta":{"content":"ß"},"finish_reason":null}]}\n\n'
        'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
        '"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        "data: [DONE]\n\n"
    ),
    "anthropic": (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"i","type":'
        '"message","role":"assistant","model":"m","content":[],"stop_reason":null,'
        '"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"text_delta","text":"ß"}}\n\n'
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":'
        '"end_turn"},"usage":{"output_tokens":2}}\n\n'
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    ),
    "google": (
        'data: {"candidates": [{"content": {"parts": [{"text": "ß"}],"role": "model"},'
        '"index": 0}],"modelVersion": "m"}\r\n\r\n'
        'data: {"candidates": [{"finishReason": "STOP","index": 0}],"modelVersion":'
        ' "m"}\r\n\r\n'
    ),
    "ollama": (
        '{"model":"m","message":{"role":"assistant","content":"ß"},"done":false}\n'
        '{"model":"m","message":{"role":"assistant","content":""},"done":true,'
        '"done_reason":"stop"}\n'
    ),
}


@each_provider
async def test_cut_at_every_byte(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A stream cut in two, at any byte, says what it says uncut."""
    body = SHORT[provider].encode()
    headers = {"content-type": "text/event-stream"}

    for at in range(1, len(body)):
        server.reply(Raw(200, headers, [body[:at], body[at:]], framing="chunked"))
        chunks, result = await read(hello(service, provider))

        assert "".join(chunk.text for chunk in chunks) == "ß", at
        assert (result.text, result.finish_reason) == ("ß", "stop"), at

    assert len(server.requests) == len(body) - 1


@each_provider
async def test_every_byte_alone(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A stream that comes byte by byte says what it says at once."""
    server.default = Answer(TEXT, reasoning="Hm: ß.", tool_calls=CALLS)
    options = {"tools": [weather, clock]}
    _, whole = await read(hello(service, provider, **options))
    server.default.split = lambda data: [data[i : i + 1] for i in range(len(data))]

    chunks, result = await read(hello(service, provider, **options))

    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert without_chance(result) == without_chance(whole)
    assert calls_of(chunks) == CALLS


@each_provider
@pytest.mark.parametrize("seed", range(2))
async def test_cut_at_random(
    server: ProviderServer, service: LLMInfraService, provider: str, seed: int
) -> None:
    """A long stream in two thousand random pieces says what it says uncut."""
    draw = random.Random(f"{provider} {seed}")
    text = "".join(draw.choice('aß😀\n" \\{«\u2028\x1b') for _ in range(6_000))
    thought = "".join(draw.choice("xy ß") for _ in range(500))

    def split(data: bytes) -> Iterator[bytes]:
        cuts = sorted(draw.randrange(len(data)) for _ in range(2_000))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            yield data[start:end]

    server.reply(
        Answer(text, reasoning=thought, tool_calls=CALLS, pieces=250, split=split)
    )

    chunks, result = await read(hello(service, provider, tools=[weather, clock]))

    assert result.text == "".join(chunk.text for chunk in chunks) == text
    assert "".join(chunk.reasoning for chunk in chunks) == (
        "" if provider == "openai" else thought
    )
    assert calls_of(chunks) == CALLS
    assert [(c.name, c.arguments) for c in result.tool_calls] == CALLS


def calls_of(chunks: Iterable[StreamChunk]) -> list[tuple[str, Any]]:
    """Put streamed tool calls together, as a caller would."""
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    for delta in (chunk.tool_call for chunk in chunks):
        if delta is not None:
            names[delta.index] = names.get(delta.index, "") + (delta.name or "")
            texts[delta.index] = texts.get(delta.index, "") + delta.arguments
    return [(names[i], json.loads(texts[i] or "{}")) for i in sorted(names)]


def without_chance(result: ChatResult) -> dict[str, Any]:
    """Everything that a result says but the provider's ids and its raw answer."""
    told = result.model_dump(exclude={"raw_response", "request_id", "content_blocks"})
    told["blocks"] = [block["type"] for block in result.content_blocks]
    for call in told["tool_calls"]:
        del call["id"]
        call["thought_signature"] = bool(call["thought_signature"])
    for block in told["thinking_blocks"]:
        block["signature"] = bool(block["signature"])
    return told


# What a server or a proxy may do to the lines of a stream and mean no harm.
LINES: dict[str, Callable[[bytes], bytes]] = {
    "LF": lambda data: data.replace(b"\r\n", b"\n"),
    "CRLF": lambda data: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
    "comments": lambda data: b": begin\n\n" + data.replace(b"data:", b": ping\ndata:"),
    "no spaces": lambda data: data.replace(b"data: ", b"data:"),
    "ids": lambda data: data.replace(b"data:", b"id: 7\nretry: 10\ndata:"),
    "a field of its own": lambda data: data.replace(b"data:", b"x-trace: 1\ndata:"),
    "a mark of bytes": lambda data: b"\xef\xbb\xbf" + data,
    "empty lines": lambda data: b"\n\n" + data + b"\n\n\n",
    "no last line end": lambda data: data.rstrip(b"\r\n"),
}
SSE_ONLY = {"comments", "no spaces", "ids", "a field of its own", "a mark of bytes"}


@pytest.mark.parametrize(
    ("provider", "lines"),
    [
        (provider, lines)
        for provider in PROVIDERS
        for lines in LINES
        if provider != "ollama" or lines not in SSE_ONLY
    ],
)
async def test_lines(
    server: ProviderServer, service: LLMInfraService, provider: str, lines: str
) -> None:
    """Line ends, comments, ids and fields that nobody asked for change nothing."""
    server.default = Answer(TEXT, split=lambda data: [LINES[lines](data)])

    chunks, result = await read(hello(service, provider))

    assert result.text == "".join(chunk.text for chunk in chunks) == TEXT
    assert result.finish_reason == "stop"
    assert result.attempts == 1


# --- The same as a whole answer ------------------------------------------------------

SEARCH = ToolConfig(type=ToolType.WEB_SEARCH)
ANSWERS: dict[str, tuple[Answer, dict[str, Any]]] = {
    "text": (Answer(TEXT), {}),
    "nothing": (Answer(""), {}),
    "reasoning": (Answer("4", reasoning="2 + 2", reasoning_tokens=2), {}),
    "cut": (Answer("and th", finish="length"), {}),
    "filtered": (Answer("", finish="content_filter"), {}),
    "refused": (Answer(refusal="I will not."), {}),
    "caching": (Answer(cached_tokens=5, cache_write_tokens=3), {}),
    "a call": (Answer(tool_calls=CALLS[:1]), {"tools": [weather]}),
    "calls": (Answer("So:", tool_calls=CALLS), {"tools": [weather, clock]}),
    "a call without arguments": (
        Answer(tool_calls=[("clock", {})]),
        {"tools": [clock]},
    ),
    "choices": (Answer("one", n_texts=["two", "three"]), {"n": 3}),
    "a schema": (Answer('{"a": 1}'), {"response_format": {"type": "object"}}),
    "limits": (
        Answer(
            headers={
                "x-ratelimit-remaining-requests": "9",
                "anthropic-ratelimit-requests-remaining": "9",
            }
        ),
        {},
    ),
    "a search": (
        Answer("Rain.", citations=[("https://a.example/", "A")]),
        {"tools": [SEARCH]},
    ),
}


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        (provider, name)
        for provider in PROVIDERS
        for name in ANSWERS
        if (provider, name) != ("ollama", "a search")
    ],
)
async def test_same_as_a_whole_answer(
    server: ProviderServer, service: LLMInfraService, provider: str, name: str
) -> None:
    """What `result()` gives is what `complete` gives for the same answer."""
    server.rules = False  # "json_object" without the word
    server.default, options = ANSWERS[name]
    model = MODELS[provider]
    if (provider, name) == ("openai", "a search"):
        model = "gpt-4.1-mini"  # gpt-4.1-nano does not search
    whole = await service.complete(HELLO, model, provider, **options)

    chunks, result = await read(service.stream(HELLO, model, provider, **options))

    assert without_chance(result) == without_chance(whole)
    assert bool(result.request_id) == bool(whole.request_id)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert "".join(chunk.reasoning for chunk in chunks) == (result.reasoning or "")


# --- Before and after the first chunk ------------------------------------------------

# What goes wrong before the first chunk: one more attempt cures it.
BEFORE: dict[str, Callable[[str], Answer | Raw | Fault]] = {
    "503": lambda provider: error(provider, 503),
    "429": lambda provider: error(provider, 429, retry_delay=0.01),
    "529": lambda provider: error(provider, 529),
    "reset": lambda provider: Fault("reset"),
    "an error for the first event": lambda provider: Answer(error_after=0),
    "a cut for the first event": lambda provider: Answer(cut_after=0),
    "garbage for the first event": lambda provider: Answer(garbage_after=0),
    "no bytes": lambda provider: Raw(200, {"content-type": "text/event-stream"}, b""),
    "a page": lambda provider: Raw(200, {"content-type": "text/html"}, b"<html>\n</html>"),
    "an error as JSON": lambda provider: Raw(200, {}, error(provider, 503).body),
}  # fmt: skip


@each_provider
@pytest.mark.parametrize("trouble", BEFORE)
async def test_trouble_before_the_first_chunk(
    server: ProviderServer, service: LLMInfraService, provider: str, trouble: str
) -> None:
    """Until the first chunk a stream is tried again, as a call is."""
    server.reply(BEFORE[trouble](provider))

    chunks, result = await read(hello(service, provider))

    assert "".join(chunk.text for chunk in chunks) == result.text
    assert result.text == "Hello from the loopback."
    assert result.attempts == 2
    assert len(server.requests) == 2


AFTER = ("cut_after", "error_after", "garbage_after", "drop_end")


@each_provider
@pytest.mark.parametrize("trouble", AFTER)
async def test_trouble_after_the_first_chunk(
    server: ProviderServer, service: LLMInfraService, provider: str, trouble: str
) -> None:
    """After the first chunk nothing is tried again, and what came is kept."""
    text = "0123456789" * 2
    for events in range(4, 10):
        value = True if trouble == "drop_end" else events
        server.requests.clear()
        server.reply(Answer(text, pieces=20, **{trouble: value}))  # type: ignore[arg-type]
        chunks: list[StreamChunk] = []

        async with hello(service, provider) as stream:
            with pytest.raises(StreamInterruptedError) as caught:
                await collect(stream, chunks)
            with pytest.raises(StreamInterruptedError) as again:
                await stream.result()

        came = "".join(chunk.text for chunk in chunks)
        assert caught.value.partial_text == came == text[: len(came)]
        assert len(came) == 20 if trouble == "drop_end" else 0 < len(came) < 10
        assert caught.value.retryable is False
        assert caught.value.service == provider
        assert caught.value.model == MODELS[provider]
        assert caught.value.status_code == 200
        assert caught.value.attempts == 1
        assert str(again.value) == str(caught.value)
        assert vars(again.value) == vars(caught.value)
        assert len(server.requests) == 1


@each_provider
async def test_a_class_of_error_in_mid_stream(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """The error tells what the provider said, and what it would have been in a call."""
    server.default = Answer("a" * 9, pieces=9, error_after=5)

    async with hello(service, provider) as stream:
        with pytest.raises(StreamInterruptedError) as caught:
            await stream.result()

    assert caught.value.details["cause"] == "ServiceUnavailableError"
    assert isinstance(caught.value.__cause__, ServiceUnavailableError)
    assert any(
        word in str(caught.value)
        for word in ("The server had an error", "verloaded", "was encountered")
    )


# --- Silence -------------------------------------------------------------------------


@each_provider
async def test_no_first_chunk(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A first chunk that does not come within `timeout` is a timeout, tried again."""
    server.default = Answer("abc", stall_after=0)

    with pytest.raises(LLMTimeoutError) as caught:
        await hello(service, provider, timeout=0.3).__aenter__()

    await server.wait_closed_by_client()
    assert caught.value.attempts == 2
    assert len(server.requests) == 2


@each_provider
async def test_a_slow_stream_is_no_silent_one(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """Neither limit counts against a stream that takes long but goes on."""
    server.default = Answer("abcdefghij", pieces=10, chunk_delay=0.15)

    _, result = await read(hello(service, provider, timeout=1.2, idle_timeout=1.2))

    assert result.text == "abcdefghij"


@each_provider
async def test_a_read_that_was_cancelled_is_no_end(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """Who gives a chunk too little time and reads on is told that text is missing."""
    server.default = Answer("abcdef", pieces=6, stall_after=4)
    chunks: list[StreamChunk] = []

    async with hello(service, provider) as stream:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collect(stream, chunks), 0.3)
        with pytest.raises(StreamInterruptedError, match="cancelled") as caught:
            await anext(stream)
        with pytest.raises(StreamInterruptedError):
            await stream.result()
        await server.wait_closed_by_client()

    assert caught.value.partial_text == "".join(chunk.text for chunk in chunks) != ""
    assert (caught.value.service, caught.value.model) == (provider, MODELS[provider])


@each_provider
async def test_another_task_may_close_a_stream_that_is_read(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """Whoever waits for a chunk is told so; nobody's task is cancelled."""
    server.default = Answer("abcdef", pieces=6, stall_after=4)
    chunks: list[StreamChunk] = []

    async with hello(service, provider) as stream:
        reader = asyncio.create_task(collect(stream, chunks))
        async with asyncio.timeout(20):
            while not chunks:  # noqa: ASYNC110 - a list tells nobody
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)

        await asyncio.gather(stream.aclose(), stream.aclose())

        with pytest.raises(StreamInterruptedError, match="closed") as caught:
            await reader
        await server.wait_closed_by_client()

    assert reader.cancelling() == 0
    assert caught.value.partial_text == "".join(chunk.text for chunk in chunks)
    server.default = Answer("next")
    assert (await service.complete(HELLO, MODELS[provider], provider)).text == "next"


async def test_a_reader_that_is_cancelled_while_its_stream_is_closed_is_cancelled(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """A cancellation of somebody else's is never turned into an error of ours."""
    server.default = Answer("abcdef", pieces=6, stall_after=4)
    async with (
        LLMInfraService(keys, settings=Settings()) as service,
        hello(service, "openai") as stream,
    ):
        reader = asyncio.create_task(collect(stream, []))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(stream.aclose())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader, closing])

    assert reader.cancelled()


@pytest.mark.parametrize("ending", [b"", b": still here\n\n"])
async def test_a_stream_that_has_said_all_is_whole(
    server: ProviderServer, service: LLMInfraService, ending: bytes
) -> None:
    """A server that keeps the connection open after the end mark delays it, no more."""
    whole = SHORT["openai"].encode() + ending
    server.default = Raw(
        headers={"content-type": "text/event-stream"},
        body=[whole, b": never"],
        framing="chunked",
        piece_delay=60,
    )

    chunks, result = await read(hello(service, "openai"))

    assert result.text == "".join(chunk.text for chunk in chunks) == "ß"
    assert len(server.requests) == 1


async def test_comments_after_the_end_hold_nobody(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """However often a server says that it is still there."""
    server.default = Raw(
        headers={"content-type": "text/event-stream"},
        body=[SHORT["openai"].encode(), *[b": still here\n\n"] * 600],
        framing="chunked",
        piece_delay=0.1,
    )
    async with LLMInfraService(keys, settings=Settings()) as service:
        await service.initialize()
        async with asyncio.timeout(20):
            _, result = await read(hello(service, "openai"))

    assert result.text == "ß"


async def test_an_error_event_is_told_at_once(
    server: ProviderServer, service: LLMInfraService
) -> None:
    """Whatever becomes of the connection."""
    event = b'data: {"error": {"message": "Who are you?", "code": 401}}\n\n'
    server.default = Raw(
        headers={"content-type": "text/event-stream"},
        body=[event, b": never"],
        framing="chunked",
        piece_delay=60,
    )

    with pytest.raises(APIKeyError, match="Who are you"):
        await hello(service, "openai").__aenter__()

    assert len(server.requests) == 1


@each_provider
async def test_a_deadline(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """`deadline` ends a stream that goes on for too long, and what came is kept."""
    server.default = Answer("x" * 400, pieces=400, chunk_delay=0.02)

    with pytest.raises(StreamInterruptedError) as caught:
        await read(hello(service, provider, deadline=0.4))

    await server.wait_closed_by_client()
    assert "deadline of 0.4 s" in str(caught.value)
    assert set(caught.value.partial_text) == {"x"}
    assert caught.value.details["cause"] == "LLMTimeoutError"


@each_provider
async def test_a_deadline_before_the_first_chunk(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """`deadline` counts from the opening, waits between attempts included."""
    server.default = error(provider, 429, retry_delay=0.2)

    with pytest.raises((LLMTimeoutError, RateLimitError)) as caught:
        await hello(service, provider, deadline=0.1).__aenter__()

    assert caught.value.attempts == 1
    assert len(server.requests) == 1


# --- Leaving -------------------------------------------------------------------------


def endless(count: list[int]) -> Answer:
    """A stream that goes on for as long as it is read; *count* counts its bytes."""

    def split(data: bytes) -> Iterator[bytes]:
        mark = b"\n" if b'{"model"' in data[:20] else b"\n\n"
        events = data.replace(b"\r\n", b"\n").split(mark)
        at = next(i for i, event in enumerate(events) if b"xxxx" in event)
        yield mark.join(events[:at]) + (mark if at else b"")
        while True:
            count[0] += len(events[at])
            yield events[at] + mark

    return Answer("x" * 4_000, pieces=2, split=split)


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


async def leave_by_cancelling(stream: ChatStream) -> None:
    """Cancel the task that reads."""

    async def reading() -> None:
        async with stream:
            async for _ in stream:
                started.set()

    started = asyncio.Event()
    task = asyncio.create_task(reading())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_without_reading(stream: ChatStream) -> None:
    """Open it and read nothing."""
    async with stream:
        pass


async def leave_by_closing(stream: ChatStream) -> None:
    """Close it by hand, twice."""
    async with stream:
        await anext(stream)
        await stream.aclose()
        await stream.aclose()


async def leave_by_forgetting(stream: ChatStream) -> None:
    """Drop the last reference to it, without closing it."""
    await stream.__aenter__()
    await anext(stream)


LEAVING = (
    leave_by_break,
    leave_by_error,
    leave_by_cancelling,
    leave_without_reading,
    leave_by_closing,
    leave_by_forgetting,
)


@each_provider
@pytest.mark.parametrize("leave", LEAVING)
async def test_leaving_closes_the_connection(
    server: ProviderServer,
    service: LLMInfraService,
    provider: str,
    leave: Callable[[ChatStream], Any],
) -> None:
    """However a stream is left before its end, its connection is closed at once."""
    server.default = endless([0])

    held = [hello(service, provider)]

    await leave(held[0])
    if leave is leave_by_forgetting:
        held.clear()
        gc.collect()

    await server.wait_closed_by_client(timeout=2)
    assert len(server.requests) == 1
    server.default = Answer()
    _, result = await read(hello(service, provider))
    assert result.text == "Hello from the loopback."


@each_provider
async def test_a_stream_that_was_never_opened_sends_nothing(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """Making a stream asks nothing; only entering it does."""
    stream = hello(service, provider)

    with pytest.raises(RuntimeError, match="async with"):
        await anext(stream)
    with pytest.raises(RuntimeError):
        async for _ in stream:
            pass

    assert server.requests == []


@each_provider
async def test_a_stream_is_opened_once(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A stream cannot be entered again, neither inside its block nor after it."""
    stream = hello(service, provider)

    async with stream:
        with pytest.raises(RuntimeError):
            await stream.__aenter__()
        result = await stream.result()
    with pytest.raises(RuntimeError):
        await stream.__aenter__()

    assert result.text == "Hello from the loopback."
    assert len(server.requests) == 1


@each_provider
async def test_a_person_streams(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A person's stream asks what a person's call asks, and answers alike."""
    heard = [
        Message(from_person_id="critic", to_person_id="poet", content="Rhyme."),
        Message(from_person_id="poet", to_person_id="critic", content="Why?"),
        Message(from_person_id="critic", to_person_id="poet", content="Because."),
    ]
    config = PersonLLMConfig(
        service=provider,
        model=MODELS[provider],
        api_key_id=provider,
        system_prompt="You are a poet.",
    )
    whole = await service.complete_with_person(heard, "poet", config, max_tokens=9)

    chunks, result = await read(
        service.stream_with_person(heard, "poet", config, max_tokens=9)
    )

    one, other = (asked.json for asked in server.requests)
    differ = {"stream", "stream_options"}
    assert {k: v for k, v in one.items() if k not in differ} == {
        k: v for k, v in other.items() if k not in differ
    }
    assert without_chance(result) == without_chance(whole)
    assert "".join(chunk.text for chunk in chunks) == result.text


@each_provider
async def test_the_result(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """The result is there inside the block, after it, and as often as it is asked."""
    async with hello(service, provider) as stream:
        first = await anext(stream)
        inside = await stream.result()
        rest = [chunk async for chunk in stream]

    after = await stream.result()

    assert first.text
    assert rest == []
    assert inside == after
    assert inside.text == "Hello from the loopback."
    assert len(server.requests) == 1


@each_provider
async def test_no_result_of_what_was_left(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A stream that was left before its end has no result, and says so."""
    async with hello(service, provider) as stream:
        await anext(stream)

    with pytest.raises(RuntimeError, match="before its end"):
        await stream.result()
    with pytest.raises(RuntimeError):
        await anext(stream)


async def test_the_result_is_in_its_form(
    server: ProviderServer, service: LLMInfraService
) -> None:
    """A stream's result is parsed, and a form that it lacks is an error each time."""
    form = {"type": "object", "required": ["a"], "properties": {"a": {}}}
    server.reply(Answer('{"a": 1}'), Answer('{"b": 1}'))

    _, good = await read(hello(service, "openai", response_format=form))
    async with hello(service, "openai", response_format=form) as stream:
        with pytest.raises(StructuredOutputError):
            await stream.result()
        with pytest.raises(StructuredOutputError) as caught:
            await stream.result()

    assert good.parsed == {"a": 1}
    assert caught.value.reason == "invalid"
    assert caught.value.text == '{"b": 1}'


@each_provider
async def test_a_connection_is_used_again(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A stream that was read to its end gives its connection back."""
    for _ in range(4):
        await read(hello(service, provider))
        await service.complete(HELLO, MODELS[provider], provider)

    assert server.connections == 1


@each_provider
async def test_many_streams_at_once(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """Streams that run side by side do not mix."""
    texts = [f"number {i} says {i * i} " * 5 for i in range(20)]

    def reply(asked: Any) -> Answer:
        number = int(json.dumps(asked.json).partition("number ")[2][:2])
        return Answer(texts[number], pieces=9, chunk_delay=0.001)

    async def one(i: int) -> str:
        messages = [{"role": "user", "content": f"number {i:02}"}]
        stream = service.stream(messages, MODELS[provider], provider)
        chunks, result = await read(stream)
        assert "".join(chunk.text for chunk in chunks) == result.text
        return result.text

    server.default = reply

    assert await asyncio.gather(*(one(i) for i in range(20))) == texts


# --- Memory --------------------------------------------------------------------------


@each_provider
async def test_a_slow_reader_slows_the_provider(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """What nobody reads is not fetched: the provider has to wait."""
    sent = [0]
    server.default = endless(sent)

    async with hello(service, provider) as stream:
        await anext(stream)
        before = -1
        while before != sent[0]:
            before = sent[0]
            await asyncio.sleep(0.1)
        for _ in range(100):
            await anext(stream)
        await asyncio.sleep(0.1)

    # The kernel's buffers of two sockets hold some megabytes, and may grow.
    assert before < 20_000_000
    assert sent[0] < before + 10_000_000


async def peak(
    server: ProviderServer, service: LLMInfraService, provider: str, n: int
) -> int:
    """Read a stream of *n* chunks and return the peak of what was kept for it."""

    def split(data: bytes) -> Iterator[bytes]:
        mark = b"\n" if b'{"model"' in data[:20] else b"\n\n"
        events = data.replace(b"\r\n", b"\n").split(mark)
        at = next(i for i, event in enumerate(events) if b"xyz" in event)
        yield mark.join(events[:at]) + (mark if at else b"")
        batch = (events[at] + mark) * 100
        for _ in range(n // 100):
            yield batch
        yield mark.join(events[at + 1 :])

    server.reply(Answer("xyz xyz ", pieces=2, split=split))
    seen = 0
    gc.collect()
    tracemalloc.start()
    try:
        async with hello(service, provider) as stream:
            async for chunk in stream:
                seen += bool(chunk.text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        assert seen == n + 1


@each_provider
async def test_memory_is_flat(
    server: ProviderServer, service: LLMInfraService, provider: str
) -> None:
    """A stream of a hundred thousand chunks holds on to its text and to nothing else."""
    chunks = 100_000 if provider == "openai" else 20_000
    await read(hello(service, provider))

    short = await peak(server, service, provider, 5_000)
    long = await peak(server, service, provider, chunks)

    # A string of Python's with a few letters in it, and its place in a list.
    assert (long - short) / (chunks - 5_000) < 80
