"""The response cache in memory: its key, what is kept, what a hit says, coalescing."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dipeo_llm import (
    CacheMissError,
    ChatRequest,
    ChatResult,
    InvalidRequestError,
    LLMInfraService,
    LLMTimeoutError,
    PersonLLMConfig,
    ServiceUnavailableError,
    Settings,
    SettingsError,
    StaticAPIKeys,
    StreamInterruptedError,
    StructuredOutputError,
    TokenUsage,
    ToolCall,
    create_adapter,
)
from dipeo_llm.cache import ResponseCache, cache_key, replay
from dipeo_llm.cache_url import CacheURL
from dipeo_llm.record import CallRecord
from tests.conftest import HELLO, MODELS, each_provider, keys_for
from tests.provider_server import PNG, Answer, ProviderServer, error

MODEL = MODELS["openai"]


@asynccontextmanager
async def open_cached(
    server: ProviderServer, url: Any = "memory://", **options: Any
) -> AsyncIterator[LLMInfraService]:
    """Open a service with a cache on the server."""
    keys = options.pop("keys", None) or keys_for(server)
    usual = {"retry_wait": 0.01, "retry_wait_max": 0.05, "timeout": 20.0}
    made = Settings(**usual | options)
    async with LLMInfraService(keys, settings=made, cache=url) as service:
        await service.initialize()
        yield service


@pytest.fixture
async def cached(server: ProviderServer) -> AsyncIterator[LLMInfraService]:
    """Open a service with a cache in memory."""
    async with open_cached(server) as service:
        yield service


async def ask(service: LLMInfraService, text: str = "Hello", **options: Any) -> Any:
    """Ask OpenAI's model a question."""
    model = options.pop("model", MODEL)
    key = options.pop("api_key_id", "openai")
    messages = options.pop("messages", [{"role": "user", "content": text}])
    return await service.complete(messages, model, key, **options)


# What a hit says.


@each_provider
async def test_the_second_call_is_a_hit(
    cached: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A hit costs nothing, and keeps the original usage apart."""
    first = await cached.complete(HELLO, MODELS[provider], provider)
    second = await cached.complete(HELLO, MODELS[provider], provider)
    assert len(server.requests) == 1
    assert (first.cached, first.attempts) == (False, 1)
    assert (first.original_usage, first.original_cost_usd) == (None, None)
    assert (second.cached, second.attempts, second.cost_usd) == (True, 0, 0.0)
    assert second.token_usage == TokenUsage()
    assert second.original_usage == first.token_usage
    assert second.original_cost_usd == first.cost_usd
    same = {"text", "finish_reason", "model", "service", "request_id", "raw_response"}
    assert second.model_dump(include=same) == first.model_dump(include=same)
    # Each caller may change its own.
    third = await cached.complete(HELLO, MODELS[provider], provider)
    assert third.raw_response == second.raw_response
    assert third.raw_response is not second.raw_response


async def test_tool_calls_reasoning_and_parsed_survive(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A hit has everything that a caller needs to go on."""
    server.default = Answer(
        tool_calls=[("add", {"a": 1})], reasoning="I think.", text=""
    )
    options: dict[str, Any] = {"tools": [add]}
    first = await ask(
        cached, model=MODELS["anthropic"], api_key_id="anthropic", **options
    )
    again = await ask(
        cached, model=MODELS["anthropic"], api_key_id="anthropic", **options
    )
    assert again.cached
    assert again.tool_calls == first.tool_calls
    assert again.to_messages() == first.to_messages()

    server.default = Answer('{"degrees": 7}')
    parsed = [await ask(cached, response_format=Weather) for _ in range(2)]
    assert [r.parsed for r in parsed] == [Weather(degrees=7)] * 2
    assert [r.cached for r in parsed] == [False, True]


def add(a: int) -> int:
    """Add."""
    return a


class Weather(BaseModel):
    """A form."""

    degrees: int


async def test_a_value_that_does_not_have_the_form_is_a_miss(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """An answer is checked against the caller's own form before it is served."""
    schema = {"type": "object", "properties": {"degrees": {"type": "integer"}}}
    server.default = Answer('{"degrees": 7}')
    await ask(cached, response_format=schema)
    store: Any = cached.cache._store  # type: ignore[union-attr]
    (key,) = store.values
    value = json.loads(store.values[key])
    value["result"]["text"] = '{"degrees": "seven"}'
    store.values[key] = json.dumps(value).encode()
    result = await ask(cached, response_format=schema)
    assert (result.cached, result.parsed) == (False, {"degrees": 7})


async def test_modes(cached: LLMInfraService, server: ProviderServer) -> None:
    """Each mode reads and stores what it says."""
    with pytest.raises(CacheMissError) as missed:
        await ask(cached, cache="only")
    assert (missed.value.attempts, missed.value.service) == (0, "openai")
    await ask(cached, cache="bypass")
    with pytest.raises(CacheMissError):
        await ask(cached, cache="only")
    server.reply(Answer("old"), Answer("new"))
    assert (await ask(cached)).text == "old"
    assert not (await ask(cached, cache="refresh")).cached
    assert (await ask(cached, cache="only")).text == "new"
    assert not (await ask(cached, cache="bypass")).cached
    with pytest.raises(InvalidRequestError, match="cache"):
        await ask(cached, cache="always")


async def test_without_a_cache(service: LLMInfraService) -> None:
    """Without a cache the modes change nothing, and `only` is refused."""
    assert service.cache is None
    with pytest.raises(InvalidRequestError, match="needs a cache"):
        await ask(service, cache="only")
    assert not (await ask(service, cache="refresh", sample=3, coalesce=False)).cached


async def test_samples_are_other_answers_and_are_not_sent(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """The sample number is in the key and not on the wire."""
    server.reply(*(Answer(f"sample {n}") for n in range(3)))
    first = [await ask(cached, sample=n, temperature=1) for n in range(3)]
    again = [await ask(cached, sample=n, temperature=1) for n in range(3)]
    assert [r.text for r in first] == [r.text for r in again]
    assert len({r.text for r in first}) == 3
    assert all(r.cached for r in again)
    assert len({received.body for received in server.requests}) == 1


# What is kept.

NOT_KEPT = {
    "length": Answer("cut", finish="length"),
    "content_filter": Answer("", finish="content_filter"),
    "refusal": Answer(refusal="I will not."),
    "empty": Answer(""),
    "several": Answer("a", n_texts=("a", "b")),
}


@pytest.mark.parametrize("answer", NOT_KEPT.values(), ids=NOT_KEPT)
async def test_what_is_not_whole_is_not_kept(
    cached: LLMInfraService, server: ProviderServer, answer: Answer
) -> None:
    """An answer that is cut, filtered, declined, empty or one of several is not kept."""
    server.reply(answer, Answer("whole"))
    options: dict[str, Any] = {"n": 2} if answer.n_texts else {}
    await ask(cached, **options)
    result = await ask(cached, **options)
    assert not result.cached
    assert len(server.requests) == 2
    assert cached.cache is not None
    assert cached.cache.stats.not_kept == 1 + bool(options)


async def test_what_is_invalid_under_the_schema_is_not_kept(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A retry of an invalid answer reaches the model."""
    server.reply(Answer('{"degrees": "warm"}'), Answer('{"degrees": 1}'))
    with pytest.raises(StructuredOutputError):
        await ask(cached, response_format=Weather)
    assert (await ask(cached, response_format=Weather)).parsed.degrees == 1
    assert (await ask(cached, response_format=Weather)).cached


async def test_errors_are_not_kept(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A failed call leaves nothing behind."""
    server.reply(error("openai", 400))
    with pytest.raises(InvalidRequestError):
        await ask(cached)
    assert not (await ask(cached)).cached


async def test_an_entry_lives_for_its_time_whichever_loop_stored_it(
    server: ProviderServer,
) -> None:
    """An entry outlives its loop, and not its time."""
    async with open_cached(server, "memory://?ttl=0.2") as service:
        # Stored by a loop that is closed when it is read.
        await asyncio.to_thread(asyncio.run, ask(service))
        assert (await ask(service)).cached
        await asyncio.sleep(0.25)
        assert not (await ask(service)).cached


async def test_memory_is_bounded(server: ProviderServer) -> None:
    """Entries and bytes have a limit; the entry used longest ago goes first."""
    async with open_cached(server, "memory://?max_entries=5&ttl=86400") as service:
        for number in range(12):
            await ask(service, f"{number}")
            await ask(service, "0")  # used all the time
        store: Any = service.cache._store  # type: ignore[union-attr]
        assert len(store.values) == 5
        assert (await ask(service, "0")).cached
        assert not (await ask(service, "1")).cached
        assert store.size == sum(map(len, store.values.values()))
    async with open_cached(server, "memory://?max_bytes=3000") as service:
        for number in range(12):
            await ask(service, f"{number}")
        store = service.cache._store  # type: ignore[union-attr]
        assert 0 < store.size <= 3000
    async with open_cached(server, "memory://?max_value_bytes=100") as service:
        await ask(service)
        assert not (await ask(service)).cached


BROKEN_VALUES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda value: value[: len(value) // 2],
    "empty": lambda value: b"",
    "bytes": lambda value: b"\x80\x04\x95\xff\x00",
    "older": lambda value: value.replace(b'{"v":1', b'{"v":0'),
    "newer": lambda value: value.replace(b'{"v":1', b'{"v":2'),
    "another key": lambda value: value.replace(b'"key":"', b'"key":"0'),
    "a list": lambda value: b"[1, 2]",
    "no result": lambda value: value.replace(b'"result":', b'"other":'),
    "an empty result": lambda value: value.split(b'"result":')[0] + b'"result":{}}',
    "another shape": lambda value: value.replace(b'"text":', b'"text":[],"x":'),
    "deep": lambda value: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", BROKEN_VALUES.values(), ids=BROKEN_VALUES)
async def test_a_value_that_cannot_be_read_is_a_miss(
    cached: LLMInfraService,
    server: ProviderServer,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A damaged value is a miss, logged at most once, and replaced."""
    await ask(cached)
    held = cached.cache._store.values  # type: ignore[union-attr]
    (key,) = held
    for _ in range(2):
        held[key] = damage(held[key])
        assert not (await ask(cached)).cached
        assert (await ask(cached)).cached
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) <= 1


# The key.


def request(**options: Any) -> ChatRequest:
    """Make a request."""
    return ChatRequest(messages=HELLO, **options)


def key(
    asked: ChatRequest | None = None,
    model: str = MODEL,
    secret: str = "sk-one",
    base_url: str | None = None,
    provider: str = "openai",
    **settings: Any,
) -> str | None:
    """Return the key of a request."""
    adapter = create_adapter(
        provider, model, secret, base_url, settings=Settings(**settings)
    )
    return cache_key(adapter, asked or request())


LITERAL = "9ec7f56374c621df943d189c7c6ffbb42896b74e5551ff53e976458f5c405b01"
LITERAL_WHOLE = "bfe6a9aa65f6a2e56d265a3c88235fd4a2562818244b7c7834ce1214cf513a34"
WHOLE = ChatRequest(
    messages=[
        {"role": "system", "content": "Be brief. \u00e9"},
        {"role": "user", "content": [{"type": "text", "text": "e\u0301"}]},
    ],
    sampling={"temperature": 0.5, "max_tokens": 7, "stop": ["a", "b"]},
    tools=(
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "type": "object",
                    "properties": {"a": {"type": "string"}},
                },
            },
        },
    ),
    tool_choice="auto",
    extra_body={"b": {"y": 1, "x": [1, 2.0, True, None]}, "a": 0},
    sample=2,
)


def test_keys_are_pinned() -> None:
    """A change of these digests empties every cache: raise the version with it."""
    assert key() == LITERAL
    assert key(WHOLE) == LITERAL_WHOLE


@pytest.mark.parametrize("seed", ["1", "2"])
def test_other_processes_make_the_same_key(seed: str) -> None:
    """A key does not depend on the process or its hash seed."""
    code = "from tests.test_cache import *; print(key(), key(WHOLE))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join([".", *sys.path])},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [LITERAL, LITERAL_WHOLE]


DIFFERENT: dict[str, str | None] = {
    "plain": key(),
    "model": key(model="gpt-4.1-mini"),
    "base_url": key(base_url="http://127.0.0.1:9/v1"),
    "provider": key(provider="deepseek"),
    "owner": key(secret="sk-two"),
    "headers": key(extra_headers={"x-tenant": "a"}),
    "effort": key(request(sampling={"reasoning_effort": "low"})),
    "other effort": key(request(sampling={"reasoning_effort": "high"})),
    "float": key(request(sampling={"temperature": 1.0})),
    "int": key(request(sampling={"temperature": 1})),
    "seed": key(request(sampling={"seed": 1})),
    "n": key(request(sampling={"n": 2})),
    "stop": key(request(sampling={"stop": ["a"]})),
    "stop, as text": key(request(sampling={"stop": "a"})),
    "deep": key(request(extra_body={"a": {"b": {"c": 1}}})),
    "deep, other": key(request(extra_body={"a": {"b": {"c": 2}}})),
    "deep, true": key(request(extra_body={"a": {"b": {"c": True}}})),
    "deep, text": key(request(extra_body={"a": {"b": {"c": "1"}}})),
    "list": key(request(extra_body={"a": [1, 2]})),
    "list, other order": key(request(extra_body={"a": [2, 1]})),
    "sample": key(request(sample=0)),
    "other sample": key(request(sample=1)),
    "tool": key(request(tools=(add,))),
    "choice": key(request(tools=(add,), tool_choice="required")),
    "composed": key(ChatRequest([{"role": "user", "content": "\u00e9"}])),
    "decomposed": key(ChatRequest([{"role": "user", "content": "e\u0301"}])),
    "role": key(ChatRequest([{"role": "system", "content": "Hello"}])),
    "picture": key(ChatRequest([{"role": "user", "content": [PNG.hex()]}])),
}


def test_different_requests_have_different_keys() -> None:
    """Whatever an answer may depend on is in the key."""
    assert None not in DIFFERENT.values()
    assert len(set(DIFFERENT.values())) == len(DIFFERENT)


def test_a_tools_definition_counts() -> None:
    """Names, descriptions, types and order of tools are in the key."""

    def tool(name: str, about: str, kind: str) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"a": {"type": kind}}}
        function = {"name": name, "description": about, "parameters": parameters}
        return {"type": "function", "function": function}

    tools = [
        (tool("f", "x", "string"),),
        (tool("g", "x", "string"),),
        (tool("f", "y", "string"),),
        (tool("f", "x", "number"),),
        (tool("f", "x", "string"), tool("g", "x", "string")),
        (tool("g", "x", "string"), tool("f", "x", "string")),
    ]
    assert len({key(request(tools=found)) for found in tools}) == len(tools)


def test_a_function_and_its_definition_are_one_key() -> None:
    """A function counts as the definition that is sent."""
    from dipeo_llm.functions import function_tool

    assert key(request(tools=(add,))) == key(request(tools=(function_tool(add),)))


def test_the_order_of_mappings_does_not_count() -> None:
    """Mappings are canonical at every depth."""
    one = request(
        sampling={"temperature": 0, "max_tokens": 5}, extra_body={"a": {"b": 1, "c": 2}}
    )
    two = request(
        sampling={"max_tokens": 5, "temperature": 0}, extra_body={"a": {"c": 2, "b": 1}}
    )
    assert key(one) == key(two)


def test_times_and_modes_do_not_count() -> None:
    """Times, modes and the proxy are left out of the key."""
    other = request(
        timeout=1.0, idle_timeout=2.0, deadline=3.0, cache="refresh", coalesce=False
    )
    assert key(other) == key()
    assert key(proxy="http://127.0.0.1:1") == key()


def test_a_new_field_of_a_request_counts() -> None:
    """A field is in the key unless it is listed."""
    from dipeo_llm.domain import LEFT_OUT

    counted = {f.name for f in fields(ChatRequest)} - LEFT_OUT
    assert counted == {
        *("messages", "sampling", "tools", "tool_choice", "response_format"),
        *("extra_body", "sample"),
    }


@pytest.mark.parametrize(
    "value",
    [{1: "x"}, float("nan"), float("inf"), object(), b"x", {("a",): 1}],
    ids=["int key", "nan", "inf", "object", "bytes", "tuple key"],
)
async def test_what_is_not_plain_json_has_no_key(
    value: Any, cached: LLMInfraService
) -> None:
    """A value that might be mistaken for another bypasses the cache."""
    assert key(request(extra_body={"a": [value]})) is None
    assert cached.cache is not None
    with pytest.raises(CacheMissError):
        await ask(cached, extra_body={"a": [value]}, cache="only")
    assert cached.cache.stats.bypassed == 1


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def _shuffle(value: Any) -> Any:
    """Turn the order of every mapping round."""
    if isinstance(value, dict):
        return {k: _shuffle(v) for k, v in reversed(list(value.items()))}
    return [_shuffle(v) for v in value] if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    """Say whether two JSON values are the same, types included."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@settings(deadline=None)
@given(
    one=st.dictionaries(st.text(), _json, max_size=4),
    other=st.dictionaries(st.text(), _json, max_size=4),
)
def test_equal_requests_meet_and_different_ones_never(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """Two requests have one key if, and only if, they are the same JSON."""
    finite = "Infinity" not in json.dumps([one, other])
    if not finite:
        return
    first = key(request(extra_body=one))
    assert first is not None
    assert first == key(request(extra_body=_shuffle(one)))
    assert (first == key(request(extra_body=other))) == _same(one, other)


async def test_every_message_counts(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A tool loop does not get its first turn again."""
    call = ToolCall(
        id="call_1", name="add", arguments={"a": 1}, arguments_text='{"a":1}'
    )
    turn = ChatResult(tool_calls=[call]).to_messages()
    for messages in (HELLO, [*HELLO, *turn, call.to_message("2")]):
        assert not (await ask(cached, messages=messages, tools=[add])).cached
    other = [*HELLO, *turn, call.to_message("3")]
    assert not (await ask(cached, messages=other, tools=[add])).cached


async def test_the_bytes_of_a_file_count(
    server: ProviderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path with other bytes is another request, and the reverse."""
    monkeypatch.chdir(tmp_path)

    async def look(name: str, data: bytes) -> bool:
        await asyncio.to_thread(Path(name).write_bytes, data)
        messages = [{"role": "user", "content": ["What is this?", Path(name)]}]
        return bool((await ask(service, messages=messages)).cached)

    async with open_cached(server) as service:
        assert not await look("a.png", PNG)
        assert await look("a.png", PNG)
        assert not await look("a.png", PNG + b"\0")
        assert await look("b.png", PNG)


async def test_two_owners_never_meet_unless_asked(server: ProviderServer) -> None:
    """Each API key has entries of its own; no key is in the store."""

    def record(key: str) -> dict[str, str]:
        url = server.base_url("openai")
        return {"key": key, "service": "openai", "base_url": url}

    keys = StaticAPIKeys({"a": record("sk-one"), "b": record("sk-two")})
    async with open_cached(server, keys=keys) as service:
        assert not (await ask(service, api_key_id="a")).cached
        assert not (await ask(service, api_key_id="b")).cached
        held = service.cache._store.values  # type: ignore[union-attr]
        assert len(held) == 2
        assert all("sk-" not in f"{k}{v!r}" for k, v in held.items())
        assert all(len(k) == 64 for k in held)
    async with open_cached(server, "memory://?shared=true", keys=keys) as service:
        assert not (await ask(service, api_key_id="a")).cached
        assert (await ask(service, api_key_id="b")).cached


async def test_a_person_and_plain_messages_meet(cached: LLMInfraService) -> None:
    """A person's conversation is cached as it is sent."""
    config = PersonLLMConfig(service="openai", model=MODEL, api_key_id="openai")
    from dipeo_llm import Message

    said = [Message(from_person_id="x", to_person_id="p", content="Hello")]
    first = await cached.complete_with_person(said, "p", config)
    assert not first.cached
    assert (await cached.complete_with_person(said, "p", config)).cached


# Streams.


async def read(stream: Any) -> tuple[list[Any], Any]:
    """Read a stream to its end."""
    async with stream as opened:
        chunks = [chunk async for chunk in opened]
        return chunks, await opened.result()


@each_provider
async def test_a_stream_is_kept_and_replayed(
    cached: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A stream that was read to its end comes again, in several chunks."""
    call = (HELLO, MODELS[provider], provider)
    chunks, first = await read(cached.stream(*call))
    again, second = await read(cached.stream(*call))
    assert len(server.requests) == 1
    assert "".join(c.text for c in again) == "".join(c.text for c in chunks)
    assert len(again) > 1
    assert (second.cached, second.attempts, second.cost_usd) == (True, 0, 0.0)
    assert second.original_usage == first.token_usage
    assert second.finish_reason == first.finish_reason
    assert (await cached.complete(*call)).cached


async def test_a_replay_has_everything_in_order() -> None:
    """A replay is reasoning, text, tool calls and the result."""
    call = ToolCall(id="c", name="add", arguments={"a": 1}, arguments_text='{"a": 1}')
    result = ChatResult(
        text=" Hello,\n world. \n", reasoning="I see. Well.", tool_calls=[call, call]
    )
    items = [item async for item in replay(result)]
    assert items[-1] is result
    chunks: list[Any] = items[:-1]
    assert "".join(c.text for c in chunks) == result.text
    assert "".join(c.reasoning for c in chunks) == result.reasoning
    kinds = ["r" if c.reasoning else "t" if c.text else "c" for c in chunks]
    assert kinds == sorted(kinds, key="rtc".index)
    assert [c.tool_call.index for c in chunks if c.tool_call] == [0, 1]


async def test_a_stream_that_was_left_is_not_kept(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A stream that was left stores nothing and closes its connection."""
    server.default = Answer("one two three four", chunk_delay=0.05)
    async with cached.stream(HELLO, MODEL, "openai") as stream:
        await anext(stream)
    await server.wait_closed_by_client()
    server.default = Answer()
    async with cached.stream(HELLO, MODEL, "openai"):
        pass  # closed before its first chunk was read
    _, result = await read(cached.stream(HELLO, MODEL, "openai"))
    assert not result.cached


async def test_a_stream_that_breaks_is_not_kept(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A broken stream stores nothing."""
    server.reply(Answer(drop_end=True))
    with pytest.raises(StreamInterruptedError):
        await read(cached.stream(HELLO, MODEL, "openai"))


# Identical calls in flight.


async def in_flight(server: ProviderServer, number: int = 1) -> None:
    """Wait until the server has begun a number of requests."""
    async with asyncio.timeout(5):
        while len(server.requests) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_identical_calls_are_one(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Identical calls in flight are one request, paid for once."""
    server.default = Answer(delay=0.1)
    results = await asyncio.gather(*(ask(cached) for _ in range(50)))
    assert len(server.requests) == 1
    assert [r.cached for r in results].count(False) == 1
    assert sum(r.cost_usd for r in results) == max(r.cost_usd for r in results) > 0
    assert sum(r.token_usage.total for r in results) == 17
    assert sum(r.attempts for r in results) == 1
    assert len({id(r.raw_response) for r in results}) == 50
    assert len(cached.cache._flights) == 0  # type: ignore[union-attr]


async def test_an_answer_that_is_not_kept_is_shared_too(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Callers that wait together get the same answer."""
    server.default = Answer("cut", finish="length", delay=0.1)
    results = await asyncio.gather(*(ask(cached) for _ in range(5)))
    assert len(server.requests) == 1
    assert {r.finish_reason for r in results} == {"length"}


async def test_calls_can_be_made_apart(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A switch, a sample and any difference make a request of their own."""
    server.default = Answer(delay=0.1)
    calls = [ask(cached, coalesce=False) for _ in range(3)]
    calls += [ask(cached, cache="bypass") for _ in range(3)]
    calls += [ask(cached, sample=n) for n in range(3)]
    calls += [ask(cached, "Other"), ask(cached, seed=1)]
    results = await asyncio.gather(*calls)
    assert len(server.requests) == len(calls)
    assert not any(r.cached for r in results)


async def test_the_first_caller_leaves_alone(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Cancelling the first caller leaves the request to the others."""
    server.default = Answer(delay=0.2)
    first = asyncio.create_task(ask(cached))
    await in_flight(server)
    second = asyncio.create_task(ask(cached))
    await asyncio.sleep(0.05)
    first.cancel()
    result = await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len(server.requests) == 1
    # Who stays has paid for it.
    assert (result.cached, result.attempts) == (False, 1)


async def test_the_last_caller_closes_the_connection(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """The request is cancelled when nobody waits for it any more."""
    server.default = Answer(delay=30)
    calls = [asyncio.create_task(ask(cached)) for _ in range(3)]
    await in_flight(server)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    async with asyncio.timeout(5):
        while server.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(server.requests) == 1
    server.default = Answer()
    assert not (await ask(cached)).cached


async def test_each_caller_gets_an_error_of_its_own(server: ProviderServer) -> None:
    """No two callers share an exception; one of them has sent the requests."""
    async with open_cached(server, max_retries=1) as service:
        refusal = error("openai", 500)
        server.default = replace(refusal, delay=0.1)
        failures = await asyncio.gather(
            *(ask(service) for _ in range(3)), return_exceptions=True
        )
        assert len(server.requests) == 2
        found = [f for f in failures if isinstance(f, ServiceUnavailableError)]
        assert len({id(f) for f in found}) == 3
        assert len({id(f.details) for f in found}) == 3
        assert sorted(f.attempts for f in found) == [0, 0, 2]
        assert {f.status_code for f in found} == {500}
        server.default = Answer()
        assert not (await ask(service)).cached


async def test_deadlines_are_each_callers_own(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A caller waits for its own deadline, and not for another's."""
    server.default = Answer(delay=0.5)
    first = asyncio.create_task(ask(cached, deadline=0.2))
    await in_flight(server)
    longer = asyncio.create_task(ask(cached))
    shorter = asyncio.create_task(ask(cached, deadline=0.05))
    with pytest.raises(LLMTimeoutError) as late:
        await shorter
    assert late.value.attempts == 0
    with pytest.raises(LLMTimeoutError) as late:
        await first
    assert (late.value.attempts, late.value.service) == (1, "openai")
    assert (await longer).text == Answer().text
    assert len(server.requests) == 1


async def test_a_wait_beyond_every_deadline_ends_the_call_at_once(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """The retries of a shared call know the latest deadline."""
    from dipeo_llm import RateLimitError

    server.default = error("openai", 429, headers={"retry-after": "20"})
    with pytest.raises(RateLimitError):
        await ask(cached, deadline=5)
    assert len(server.requests) == 1


async def test_two_loops_share_answers_but_no_calls(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Calls are shared within a loop, answers between loops."""
    server.default = Answer(delay=0.2)

    def elsewhere() -> Any:
        async def both() -> Any:
            try:
                return await asyncio.gather(ask(cached), ask(cached))
            finally:
                await asyncio.sleep(0)

        return asyncio.run(both())

    results = await asyncio.gather(
        asyncio.to_thread(elsewhere), asyncio.to_thread(elsewhere), ask(cached)
    )
    assert len(server.requests) == 3
    assert [r.cached for r in results[0]].count(False) == 1
    assert (await ask(cached)).cached


# The URL.

BAD_URLS = [
    "memory",
    "http://127.0.0.1",
    "memory://?ttl=0",
    "memory://?ttl=x",
    "memory://?max_entries=1.5",
    "memory://?sise=1",
    "memory://?shared=1",
    "memory://host",
    "redis://:password@a b",
    "redis://:password@a:x",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_cannot_be_used(url: str) -> None:
    """A bad URL is refused at start, and never shown."""
    with pytest.raises(SettingsError, match="cache"):
        ResponseCache(url)
    with pytest.raises(SettingsError, match="cache_url"):
        Settings(cache_url=url)
    with pytest.raises(SettingsError, match="DIPEO_LLM_CACHE_URL") as raised:
        Settings.from_env({"DIPEO_LLM_CACHE_URL": url})
    assert "password" not in str(raised.value)


def test_a_url_is_read() -> None:
    """Own parameters are taken out of the URL; no repr shows the password."""
    url = CacheURL.read(
        "rediss://user:p%40ss@host:1/2?ttl=60&namespace=x&ssl_ca_certs=a.pem&shared=true"
    )
    assert url == CacheURL(
        "rediss://user:p%40ss@host:1/2?ssl_ca_certs=a.pem",
        ttl=60,
        namespace="x",
        shared=True,
    )
    assert "p%40ss" not in repr(url)
    assert "p%40ss" not in repr(Settings(cache_url="redis://:p%40ss@host"))


async def test_the_environment_sets_the_cache(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DIPEO_LLM_CACHE_URL switches the cache on."""
    monkeypatch.setenv("DIPEO_LLM_CACHE_URL", "memory://?ttl=60")
    async with LLMInfraService(keys_for(server)) as service:
        await ask(service)
        assert (await ask(service)).cached


async def test_services_can_share_a_cache(server: ProviderServer) -> None:
    """A cache may be made once and given to several services."""
    shared = ResponseCache("memory://")
    async with open_cached(server, shared) as one, open_cached(server, shared) as two:
        await ask(one)
        assert (await ask(two)).cached


def test_off_costs_no_import() -> None:
    """Without a cache nothing of it is imported."""
    code = (
        "import sys, dipeo_llm; dipeo_llm.LLMInfraService(dipeo_llm.StaticAPIKeys({}));"
        "print([m for m in ('redis', 'aiocache', 'dipeo_llm.cache') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_page_lists_every_parameter_with_its_default() -> None:
    """docs/scaling.md says what a URL can say."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `?([\w.]+)`? \|", page, re.MULTILINE))
    defaults = {f.name: f.default for f in fields(CacheURL) if f.name != "server"}
    assert listed.keys() == defaults.keys()
    for name, default in defaults.items():
        assert listed[name] == (
            str(default).lower()
            if default is False
            else f"{default:g}"
            if isinstance(default, float)
            else str(default)
        )


# A hit is a call.


async def test_hits_and_shared_calls_are_recorded(server: ProviderServer) -> None:
    """Each call has a record; those that sent nothing add nothing to the totals."""
    records: list[CallRecord] = []
    server.default = Answer(delay=0.05)
    async with LLMInfraService(
        keys_for(server), cache="memory://", on_call=records.append
    ) as service:
        await asyncio.gather(*(ask(service, trace_id="t") for _ in range(3)))
        await ask(service)
        await read(service.stream(HELLO, MODEL, "openai"))
        with pytest.raises(CacheMissError):
            await ask(service, "Other", cache="only")
        totals = service.usage().total
    assert [r.status for r in records] == ["ok"] * 5 + ["error"]
    assert sorted(r.cached for r in records) == [False] * 2 + [True] * 4
    assert sum(r.requests for r in records) == 1
    assert sum(len(r.attempts) for r in records) == 1
    assert sum(r.cost_usd or 0 for r in records) == totals.cost_usd > 0
    assert sum(r.usage.total for r in records if r.usage) == totals.tokens.total == 17
    assert {r.service for r in records} == {"openai"}
    assert {r.server for r in records} == {server.origin}
    assert records[-1].error == "CacheMissError"
    assert records[-2].chunks > 1


async def test_a_cancelled_first_caller_is_recorded(server: ProviderServer) -> None:
    """Its record has the attempt, and the one who stays has it too, as its own."""
    records: list[CallRecord] = []
    server.default = Answer(delay=0.2)
    async with LLMInfraService(
        keys_for(server), cache="memory://", on_call=records.append
    ) as service:
        await service.initialize()
        first = asyncio.create_task(ask(service))
        await in_flight(server)
        second = asyncio.create_task(ask(service))
        await asyncio.sleep(0.02)
        first.cancel()
        await asyncio.wait([first, second])
    assert [r.status for r in records] == ["cancelled", "ok"]
    assert [len(r.attempts) for r in records] == [1, 1]
    assert [a.error for r in records for a in r.attempts] == ["CancelledError", None]
    assert records[1].cost_usd


# Identical streams in flight.


async def test_identical_streams_are_one(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Each gets every chunk from the beginning; one of them has paid."""
    server.default = Answer("one two three four", chunk_delay=0.05)
    streams = [cached.stream(HELLO, MODEL, "openai") for _ in range(4)]
    first = asyncio.create_task(read(streams[0]))
    await in_flight(server)
    await asyncio.sleep(0.08)  # in the middle of it
    found = [await first, *await asyncio.gather(*map(read, streams[1:]))]
    late = await asyncio.gather(*map(read, [cached.stream(HELLO, MODEL, "openai")]))
    assert len(server.requests) == 1
    for chunks, result in [*found, *late]:
        assert "".join(c.text for c in chunks) == result.text == "one two three four"
        assert len(chunks) > 1
    assert [r.cached for _, r in found].count(False) == 1
    assert sum(r.attempts for _, r in found) == 1
    assert sum(r.token_usage.total for _, r in found) == 17


async def test_streams_at_once_share_the_one_in_flight(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Readers of different speed get the same; those set apart get their own."""
    server.default = Answer("one two three four", chunk_delay=0.03)

    async def slowly(seconds: float) -> str:
        async with cached.stream(HELLO, MODEL, "openai") as stream:
            text = ""
            async for chunk in stream:
                text += chunk.text
                await asyncio.sleep(seconds)
            return text

    texts = await asyncio.gather(slowly(0), slowly(0.1), slowly(0.02))
    assert set(texts) == {"one two three four"}
    assert len(server.requests) == 1
    apart = [
        cached.stream(HELLO, MODEL, "openai", seed=1, coalesce=False) for _ in range(2)
    ]
    await asyncio.gather(*map(read, apart))
    assert len(server.requests) == 3


async def test_the_first_reader_of_a_stream_leaves_alone(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """The others read on; when the last one leaves, the connection closes."""
    server.default = Answer("one two three four", chunk_delay=0.1)
    async with cached.stream(HELLO, MODEL, "openai") as first:
        await anext(first)
        second = cached.stream(HELLO, MODEL, "openai")
        await second.__aenter__()
    chunks = [chunk async for chunk in second]
    result = await second.result()
    await second.aclose()
    assert "".join(c.text for c in chunks) == "one two three four"
    assert (result.cached, result.attempts) == (False, 1)
    async with (
        cached.stream(HELLO, MODEL, "openai", seed=1) as one,
        cached.stream(HELLO, MODEL, "openai", seed=1) as two,
    ):
        await anext(one)
        await anext(two)
    await server.wait_closed_by_client()
    assert len(server.requests) == 2
    assert not cached.cache._streams._loops[asyncio.get_running_loop()]  # type: ignore[union-attr]


async def test_a_shared_stream_that_breaks(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """Each reader gets an error of its own with the text that it had."""
    server.reply(Answer("one two three four", drop_end=True, chunk_delay=0.05))
    failures = await asyncio.gather(
        *(read(cached.stream(HELLO, MODEL, "openai")) for _ in range(3)),
        return_exceptions=True,
    )
    assert len(server.requests) == 1
    found = [f for f in failures if isinstance(f, StreamInterruptedError)]
    assert len({id(f) for f in found}) == 3
    assert {f.partial_text for f in found} == {"one two three four"}
    server.reply(error("openai", 400))
    failures = await asyncio.gather(
        *(read(cached.stream(HELLO, MODEL, "openai")) for _ in range(3)),
        return_exceptions=True,
    )
    assert [type(f) for f in failures] == [InvalidRequestError] * 3
    assert len({id(f) for f in failures}) == 3
    assert not (await read(cached.stream(HELLO, MODEL, "openai")))[1].cached


async def test_a_reader_of_a_shared_stream_has_its_own_deadline(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """The first one's deadline ends its own reading and nobody else's."""
    server.default = Answer(delay=0.4)
    first = asyncio.create_task(
        read(cached.stream(HELLO, MODEL, "openai", deadline=0.15))
    )
    await in_flight(server)
    second = asyncio.create_task(read(cached.stream(HELLO, MODEL, "openai")))
    with pytest.raises(LLMTimeoutError):
        await first
    assert (await second)[1].text == Answer().text
    assert len(server.requests) == 1


def test_redis_without_redis_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error at start says what to install."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(SettingsError, match=r"dipeo-llm\[redis\]"):
        ResponseCache("redis://:secret-word@127.0.0.1:1")
