"""The loopback provider, through its bytes and through real clients."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests import provider_server
from tests.conftest import MODELS, PROVIDERS, each_provider
from tests.provider_server import PNG, Answer, Fault, ProviderServer, Raw, error

USER: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
HEADERS = {
    "openai": {"authorization": "Bearer sk-test"},
    "anthropic": {"x-api-key": "sk-ant-test", "anthropic-version": "2023-06-01"},
    "google": {"x-goog-api-key": "AIza-test"},
    "ollama": {},
}


@pytest.fixture
async def server() -> AsyncIterator[ProviderServer]:
    """A strict server."""
    async with ProviderServer() as running:
        yield running


def chat(provider: str, *, stream: bool = False, **more: Any) -> tuple[str, Any]:
    """The path and the body of a small chat call."""
    if provider == "google":
        method = "streamGenerateContent?alt=sse" if stream else "generateContent"
        contents = [{"role": "user", "parts": [{"text": "hello"}]}]
        body: dict[str, Any] = {"contents": contents}
        return f"/v1beta/models/gemini-2.5-flash:{method}", body | more
    path = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
    body = {"model": MODELS[provider], "messages": USER, "stream": stream}
    if provider == "anthropic":
        body["max_tokens"] = 16
    return path.get(provider, "/api/chat"), body | more


async def call(
    server: ProviderServer,
    path: str,
    body: Any = None,
    provider: str = "openai",
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own, to the last byte."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    data = b"" if body is None else data
    method = "GET" if body is None else "POST"
    sent = HEADERS[provider] if headers is None else headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{lines}"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    try:
        got = await reader.read()
    finally:
        writer.close()
    first, _, rest = got.partition(b"\r\n\r\n")
    status, *pairs = first.decode().split("\r\n")
    answered = dict(pair.split(": ", 1) for pair in pairs)
    if answered.get("transfer-encoding") == "chunked":
        rest = b"".join(unchunk(rest))
    return int(status.split()[1]), answered, rest


def unchunk(data: bytes) -> Iterator[bytes]:
    """The pieces of a chunked body."""
    while data:
        size, _, data = data.partition(b"\r\n")
        yield data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]


@each_provider
async def test_bytes_of_a_stream(server: ProviderServer, provider: str) -> None:
    """A stream has its content type and its end mark, unless that is dropped."""
    path, body = chat(provider, stream=True)
    status, headers, data = await call(server, path, body, provider)
    assert status == 200
    kind = "x-ndjson" if provider == "ollama" else "event-stream"
    assert kind in headers["content-type"]
    end = {
        "openai": b'"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
        "anthropic": b'data: {"type":"message_stop"',
        "google": b"}\r\n\r\n",
        "ollama": b'"eval_duration":814595750}\n',
    }[provider]
    assert end in data
    server.reply(Answer(drop_end=True))
    _, _, cut = await call(server, path, body, provider)
    marks = (b"[DONE]", b'finish_reason":"', b"message_stop", b"STOP", b'"done":true')
    assert not [mark for mark in marks if mark in cut]
    assert server.requests[-1].provider == provider
    assert server.requests[-1].stream


@each_provider
@pytest.mark.parametrize("status", [400, 401, 429, 500, 503, 529])
async def test_errors(server: ProviderServer, provider: str, status: int) -> None:
    """Each provider's error shape carries the words and the delay."""
    server.reply(error(provider, status, "no luck", retry_delay=12))
    path, body = chat(provider)
    got, headers, data = await call(server, path, body, provider)
    value = json.loads(data)
    assert got == status
    assert "no luck" in str(value["error"])
    if provider == "google":
        assert value["error"]["details"][-1]["retryDelay"] == "12s"
    else:
        assert headers["retry-after"] == "12"


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("openai", {"foo": 1}, 400, "Unrecognized request argument supplied: foo"),
    ("openai", {"messages": []}, 400, "empty array"),
    ("openai", {"messages": None}, 400, "Missing required parameter"),
    ("openai", {"model": ""}, 400, "you must provide a model"),
    ("openai", {"model": "no-such-model"}, 404, "model_not_found"),
    ("openai", {"model": "o3", "max_tokens": 5}, 400, "max_completion_tokens"),
    ("openai", {"model": "o4-mini", "temperature": 0}, 400, "unsupported_parameter"),
    ("openai", {"messages": [{"role": "bot", "content": "x"}]}, 400, "'bot'"),
    ("openai", {"messages": [{"role": "user", "content": None}]}, 400, "got null"),
    (
        "openai",
        {"messages": [*USER, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
        400,
        "preceeding message",
    ),
    (
        "openai",
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}, *USER]},
        400,
        "did not have response messages: a",
    ),
    ("anthropic", {"foo": 1}, 400, "foo: Extra inputs are not permitted"),
    ("anthropic", {"max_tokens": None}, 400, "max_tokens: Field required"),
    ("anthropic", {"model": "no-such-model"}, 404, "not_found_error"),
    (
        "anthropic",
        {"messages": [{"role": "system", "content": "x"}, *USER]},
        400,
        "Unexpected role",
    ),
    (
        "anthropic",
        {"messages": [{"role": "assistant", "content": "x"}, *USER]},
        400,
        "first message",
    ),
    (
        "anthropic",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]},
        400,
        "text content blocks must be non-empty",
    ),
    (
        "anthropic",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}],
                }
            ]
        },
        400,
        "toolu_1",
    ),
    ("google", {"foo": 1}, 400, 'Unknown name \\"foo\\"'),
    ("google", {"generationConfig": {"foo": 1}}, 400, "at 'generation_config'"),
    ("google", {"contents": []}, 400, "contents is not specified"),
    ("google", {"contents": [{"role": "user", "parts": []}]}, 400, "must not be empty"),
    (
        "google",
        {"contents": [{"role": "assistant", "parts": [{"text": "x"}]}]},
        400,
        "valid role",
    ),
    ("ollama", {"model": "no-such-model"}, 404, "not found"),
    ("ollama", {"messages": [{"role": "developer"}]}, 400, "invalid role"),
]


@pytest.mark.parametrize(("provider", "change", "status", "words"), BAD)
async def test_refusals(
    server: ProviderServer,
    provider: str,
    change: dict[str, Any],
    status: int,
    words: str,
) -> None:
    """A strict server refuses what the provider refuses, in its words."""
    path, body = chat(provider)
    got, _, data = await call(server, path, body | change, provider)
    assert (got, words in data.decode()) == (status, True), data


@each_provider
async def test_malformed_body_and_path(server: ProviderServer, provider: str) -> None:
    """Broken JSON is a 400, an unknown path a 404."""
    path, _ = chat(provider)
    assert (await call(server, path, b"{nope", provider))[0] == 400
    prefix = {"google": "/v1beta", "ollama": "/api"}.get(provider, "/v1")
    assert (await call(server, f"{prefix}/nothing", None, provider))[0] == 404


@pytest.mark.parametrize(
    ("provider", "headers", "status", "words"),
    [
        ("openai", {}, 401, "You didn't provide an API key"),
        ("openai", {"authorization": "Bearer sk-bad-1"}, 401, "invalid_api_key"),
        ("anthropic", {"anthropic-version": "x"}, 401, "x-api-key"),
        ("anthropic", {"x-api-key": "k"}, 400, "anthropic-version"),
        (
            "anthropic",
            {"x-api-key": "bad", "anthropic-version": "x"},
            401,
            "authentication_error",
        ),
        ("google", {}, 403, "PERMISSION_DENIED"),
        ("google", {"x-goog-api-key": "bad"}, 400, "API_KEY_INVALID"),
    ],
)
async def test_keys(
    server: ProviderServer,
    provider: str,
    headers: dict[str, str],
    status: int,
    words: str,
) -> None:
    """A missing or bad key gets the provider's own refusal."""
    path, body = chat(provider)
    got, _, data = await call(server, path, body, provider, headers)
    assert (got, words in data.decode()) == (status, True), data


async def test_key_lists_and_key_in_url(server: ProviderServer) -> None:
    """Listed keys alone pass, and never in the URL."""
    server.keys["google"] = {"AIza-other"}
    path, body = chat("google")
    assert (await call(server, path, body, "google"))[0] == 400
    status, _, data = await call(server, path + "?key=AIza-other", body, "google")
    assert (status, b"key in URL" in data) == (400, True)


async def test_a_refused_stream_of_google_is_labelled_as_one(
    server: ProviderServer,
) -> None:
    """Plain JSON labelled as an event stream, as the real one."""
    path, body = chat("google", stream=True, foo=1)
    _, headers, data = await call(server, path, body, "google")
    assert headers["content-type"] == "text/event-stream"
    assert json.loads(data)["error"]["code"] == 400


async def test_listings(server: ProviderServer) -> None:
    """Models are listed, in pages where the provider has pages."""
    server.page_size = 2
    _, _, data = await call(server, "/v1/models")
    assert [m["id"] for m in json.loads(data)["data"]] == server.models["openai"]
    _, _, data = await call(server, "/v1/models", None, "anthropic")
    page = json.loads(data)
    assert page["has_more"]
    rest = f"/v1/models?after_id={page['last_id']}"
    _, _, data = await call(server, rest, None, "anthropic")
    names = [m["id"] for m in page["data"] + json.loads(data)["data"]]
    assert names == server.models["anthropic"]
    _, _, data = await call(server, "/v1beta/models", None, "google")
    page = json.loads(data)
    rest = f"/v1beta/models?pageToken={page['nextPageToken']}"
    _, _, data = await call(server, rest, None, "google")
    assert "nextPageToken" not in json.loads(data)
    names = [m["name"] for m in page["models"] + json.loads(data)["models"]]
    assert names == [f"models/{name}" for name in server.models["google"]]
    _, _, data = await call(server, "/api/tags", None, "ollama")
    assert json.loads(data)["models"][1]["name"] == "qwen3:4b"
    for model, status in (("llama3.2", 200), ("nobody", 404)):
        got, _, _ = await call(server, "/api/show", {"model": model}, "ollama")
        assert got == status


async def test_files_and_counts(server: ProviderServer) -> None:
    """Media files and the token counts."""
    status, headers, data = await call(server, "/image.png")
    assert (status, headers["content-type"], data) == (200, "image/png", PNG)
    assert (await call(server, "/file.pdf"))[2].startswith(b"%PDF")
    assert len((await call(server, "/huge.bin"))[2]) == 64 * 1024 * 1024
    path, body = chat("anthropic")
    body.pop("max_tokens")
    _, _, data = await call(server, f"{path}/count_tokens", body, "anthropic")
    assert json.loads(data)["input_tokens"] > 0
    path, body = chat("google")
    path = path.replace("generateContent", "countTokens")
    _, _, data = await call(server, path, body, "google")
    assert json.loads(data)["totalTokens"] > 0


@each_provider
async def test_stream_faults(server: ProviderServer, provider: str) -> None:
    """Cuts, errors and garbage in a stream, and any TCP split."""
    path, body = chat(provider, stream=True)
    server.reply(Answer(cut_after=2))
    with pytest.raises(ConnectionResetError):
        await call(server, path, body, provider)
    server.reply(Answer(error_after=2))
    _, _, data = await call(server, path, body, provider)
    assert b'"error"' in data.replace(b"\r", b"").rstrip().split(b"\n")[-1]
    server.reply(Answer(garbage_after=1))
    _, _, data = await call(server, path, body, provider)
    pieces = re.findall(rb"(?m)^(?:data: )?(\{.*?)\r?$", data)
    assert sum(not is_json(piece) for piece in pieces) == 1
    server.reply(
        Answer("häß 😀", split=lambda b: (b[i : i + 1] for i in range(len(b))))
    )
    _, _, data = await call(server, path, body, provider)
    assert "😀" in data.decode()


def is_json(data: bytes) -> bool:
    """Whether it can be parsed."""
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@each_provider
async def test_faults_below_http(server: ProviderServer, provider: str) -> None:
    """Resets, closes, stalls and drips; a stall ends with its client."""
    path, body = chat(provider)
    for kind in ("reset", "reset_mid_body"):
        server.reply(Fault(kind))
        with pytest.raises(ConnectionResetError):
            await call(server, path, body, provider)
    server.reply(Fault("drip"))
    assert (await call(server, path, body, provider))[0] == 200
    server.reply(Fault("close"))
    with pytest.raises((ValueError, IndexError)):
        await call(server, path, body, provider)
    server.reply(Fault("stall"), Answer(delay=30))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call(server, path, body, provider)
    async with asyncio.timeout(5):
        while server.open_connections or server.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("framing", ["length", "chunked", "close", "short"])
async def test_raw(server: ProviderServer, framing: str) -> None:
    """Exact bytes in each framing."""
    raw = Raw(418, {"X-Odd": "1"}, [b"<ht", b"ml>"], framing=framing)
    server.reply(lambda asked: raw)
    path, body = chat("openai")
    status, headers, data = await call(server, path, body)
    assert (status, headers["x-odd"], data) == (418, "1", b"<html>")
    assert ("content-length" in headers) == (framing in ("length", "short"))


async def test_abandoned_stream_is_seen(server: ProviderServer) -> None:
    """An abandoned stream is noticed, an open one waited for."""
    server.default = Answer(stall_after=2)
    path, body = chat("openai", stream=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await call(server, path, body)
    await server.wait_closed_by_client()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nauthorization: Bearer k\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    await reader.readuntil(b"data: ")
    with pytest.raises(TimeoutError):
        await server.wait_closed_by_client(0.05)
    writer.close()
    await server.wait_closed_by_client()


async def test_many_at_once_and_dropped_connections(server: ProviderServer) -> None:
    """512 requests at once, and a stale pool."""
    import aiohttp

    server.default = Answer(delay=0.2)
    path, body = chat("openai")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.origin, connector=connector) as session:

        async def one() -> int:
            headers = HEADERS["openai"]
            async with session.post(path, json=body, headers=headers) as response:
                await response.read()
                return response.status

        statuses = await asyncio.gather(*(one() for _ in range(512)))
        assert set(statuses) == {200}
        assert server.max_in_flight == server.connections == 512
        server.default = Answer()
        assert await one() == 200
        assert server.connections == 512
        await server.drop_connections()
        assert server.open_connections == 0
        # The client has yet to see that they are closed.
        await asyncio.sleep(0.05)
        assert await one() == 200


@pytest.fixture
async def openai_client(server: ProviderServer) -> AsyncIterator[Any]:
    """The OpenAI SDK against the server."""
    import openai

    base = server.base_url("openai")
    async with openai.AsyncOpenAI(
        api_key="sk-test", base_url=base, max_retries=0
    ) as client:
        yield client


async def test_openai_sdk_chat(server: ProviderServer, openai_client: Any) -> None:
    """The SDK reads refusals, broken arguments, streams and listings."""
    create = openai_client.chat.completions.create
    server.reply(Answer(refusal="no"), Answer(tool_calls=[("f", '{"cut": "of')]))
    got = await create(model="gpt-4o-mini", messages=USER)
    assert (got.choices[0].message.refusal, got.choices[0].message.content) == (
        "no",
        None,
    )
    got = await create(model="gpt-4o-mini", messages=USER)
    call_ = got.choices[0].message.tool_calls[0]
    assert call_.function.arguments == '{"cut": "of'
    stream = await create(model="gpt-4o-mini", messages=USER, stream=True)
    text = "".join([c.choices[0].delta.content or "" async for c in stream])
    assert text == Answer().text
    assert [model.id async for model in openai_client.models.list()]


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (Answer("hi", reasoning="so"), ["reasoning", "message"]),
        (
            Answer(tool_calls=[("weather", {"city": c}) for c in ("Oslo", "Rome")]),
            ["function_call", "function_call"],
        ),
        (Answer(images=[PNG]), ["image_generation_call"]),
        (Answer("s", citations=[("http://a", "A")]), ["web_search_call", "message"]),
        (Answer(refusal="no"), ["message"]),
        (Answer("cut", finish="length"), ["message"]),
    ],
)
async def test_openai_sdk_responses(
    server: ProviderServer, openai_client: Any, answer: Answer, kinds: list[str]
) -> None:
    """The SDK reads each kind of item, whole and streamed."""
    server.default = answer
    create = openai_client.responses.create
    got = await create(model="gpt-4o-mini", input="hello")
    assert [item.type for item in got.output] == kinds
    events = [e async for e in await create(model="m", input="hello", stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == f"response.{got.status}"
    assert [item.type for item in last.response.output] == kinds
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == got.output_text == last.response.output_text


async def test_openai_sdk_sees_the_error_in_a_stream(
    server: ProviderServer, openai_client: Any
) -> None:
    """An error event is an error to the SDK."""
    import openai

    server.default = Answer(error_after=1)
    for create, body in (
        (openai_client.chat.completions.create, {"messages": USER}),
        (openai_client.responses.create, {"input": "hello"}),
    ):
        stream = await create(model="gpt-4o-mini", stream=True, **body)
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass


@pytest.mark.parametrize("fast", [False, True])
async def test_command(fast: bool) -> None:
    """The command serves until stdin closes or SIGTERM."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", "-m", "tests.provider_server", "--chunks", "3"),
        *(["--fast"] if fast else []),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    remote = ProviderServer()
    remote.port = int(line.rpartition(":")[2])
    for provider, stream in itertools.product(PROVIDERS, (False, True)):
        path, body = chat(provider, stream=stream)
        sent = HEADERS[provider] | {"x-none": ""}
        reader, writer = await asyncio.open_connection(remote.host, remote.port)
        data = json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        head = f"POST {path} HTTP/1.1\r\n{lines}content-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        got = await reader.readuntil(b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200")
        assert (b"chunked" in got) == stream
        writer.close()
    if fast:
        process.send_signal(signal.SIGTERM)
    else:
        assert process.stdin is not None
        process.stdin.close()
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


async def test_a_request_that_the_provider_would_refuse_fails_the_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the package sends is checked, unless the test says that it is wrong."""
    monkeypatch.setattr(provider_server, "CHECK_RULES", True)
    path, body = chat("openai", top_k=5)
    ours = HEADERS["openai"] | {"user-agent": "dipeo-llm"}
    with pytest.raises(AssertionError, match="top_k: unknown field"):
        async with ProviderServer() as running:
            await call(running, path, body, headers=ours)
    async with ProviderServer() as running:
        running.rules = False
        await call(running, path, body, headers=ours)
    async with ProviderServer() as running:
        await call(running, path, body)
