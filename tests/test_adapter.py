"""An adapter by itself: what it opens, what it sends, and the fence around it."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyNotFoundError,
    BaseLLMAdapter,
    InvalidRequestError,
    LLMService,
    LLMServiceError,
    ServiceUnavailableError,
    Settings,
    create_adapter,
)
from dipeo_llm.adapters.attempt import Attempt
from dipeo_llm.domain import ChatRequest
from tests.conftest import HELLO, MODELS, each_provider
from tests.provider_server import Answer, Fault, ProviderServer, Raw

REQUEST = ChatRequest(messages=tuple(HELLO), timeout=20)
CANARY = "sk-canary-0123456789abcdef"
SAID = "Hello from the loopback."


def adapter_of(
    server: ProviderServer, provider: str, base_url: str | None = None, **settings: Any
) -> BaseLLMAdapter:
    """Make an adapter that leads to the server and owns what it opens."""
    return create_adapter(
        provider,
        MODELS[provider],
        CANARY,
        base_url or server.base_url(provider),
        settings=Settings(**settings),
    )


@pytest.fixture
async def other() -> AsyncIterator[ProviderServer]:
    """Run a second server, which nobody should reach."""
    async with ProviderServer(strict=False) as running:
        yield running


# --- opening and closing -------------------------------------------------------------


@each_provider
async def test_an_adapter_by_itself(server: ProviderServer, provider: str) -> None:
    """It opens a connection with its first call, and closes it for good when told to."""
    adapter = adapter_of(server, provider)
    before = server.connections
    result = await adapter.complete(REQUEST)
    during = server.open_connections
    await adapter.aclose()
    await adapter.aclose()
    with pytest.raises(ServiceUnavailableError, match="closed") as caught:
        await adapter.complete(REQUEST)

    assert (before, during) == (0, 1)
    assert (result.text, result.service, result.model) == (
        SAID,
        provider,
        MODELS[provider],
    )
    assert caught.value.retryable is False
    assert server.connections == 1


@each_provider
async def test_no_repr_shows_the_key(server: ProviderServer, provider: str) -> None:
    """Neither the adapter nor what it is made of shows the key."""
    adapter = adapter_of(server, provider)

    async with await adapter.client() as client:
        shown = [
            repr(thing)
            for thing in (
                adapter,
                adapter.endpoint,
                client,
                vars(adapter),
                vars(client),
            )
        ]
    await adapter.aclose()

    assert repr(adapter).endswith(f"({provider!r}, {MODELS[provider]!r})")
    assert not [text for text in shown if CANARY in text]


@pytest.mark.parametrize("provider", ["openai", "anthropic", "google", "deepseek"])
@pytest.mark.parametrize("key", [None, ""])
def test_a_provider_that_needs_a_key(provider: str, key: str | None) -> None:
    """Without one there is no adapter, so nothing can be sent."""
    with pytest.raises(APIKeyNotFoundError, match=f"{provider} needs a key"):
        create_adapter(provider, "m", key)


def test_ollama_needs_no_key() -> None:
    """A local server has no lock."""
    assert create_adapter(LLMService.OLLAMA, "qwen3", None).provider.name == "ollama"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "host:80",
        "http://",
        "http://user:secret@host/v1",
        "http://host/v1?key=secret",
        "http://host:99999/v1",
    ],
)
def test_a_base_url_that_is_none(url: str) -> None:
    """A base URL that cannot be one, or that carries a secret, is refused at once."""
    with pytest.raises(InvalidRequestError, match="base URL"):
        create_adapter("openai", "m", "k", url)


@pytest.mark.parametrize(
    ("model", "answer"),
    [("gpt-4.1-nano", True), ("gpt-3.5-turbo-instruct", None), ("unheard-of", None)],
)
def test_supports_tools(model: str, answer: bool | None) -> None:
    """LiteLLM's table says whether a model takes tools; None where it does not say."""
    assert create_adapter("openai", model, "k").supports_tools() is answer


def test_a_local_model_that_nobody_tabled_supports_nobody_knows_what() -> None:
    """What is told to LiteLLM to keep it quiet is not taken for knowledge."""
    assert create_adapter("ollama", "mine:1b", None).supports_tools() is None


@pytest.mark.parametrize(
    ("provider", "below", "path"),
    [
        ("openai", "", "/v1/chat/completions"),
        ("openai", "/", "/v1/chat/completions"),
        ("openai", "/v1", "/v1/chat/completions"),
        ("openai", "/v1/", "/v1/chat/completions"),
        ("openai", "/gate/way", "/gate/way/chat/completions"),
        ("anthropic", "", "/v1/messages"),
        ("anthropic", "/v1", "/v1/messages"),
        ("anthropic", "/v1/", "/v1/messages"),
        ("anthropic", "/gate/way", "/gate/way/v1/messages"),
        ("google", "", "/v1beta/models/gemini-2.5-flash:generateContent"),
        ("google", "/v1beta", "/v1beta/models/gemini-2.5-flash:generateContent"),
        ("google", "/v1beta/", "/v1beta/models/gemini-2.5-flash:generateContent"),
        ("google", "/v1", "/v1/models/gemini-2.5-flash:generateContent"),
        (
            "google",
            "/gate/v1beta",
            "/gate/v1beta/models/gemini-2.5-flash:generateContent",
        ),
        ("ollama", "", "/api/chat"),
        ("ollama", "/", "/api/chat"),
        ("ollama", "/gate/way", "/gate/way/api/chat"),
    ],
)
async def test_where_a_base_url_leads(
    server: ProviderServer, provider: str, below: str, path: str
) -> None:
    """The version's path is added where it is missing; a gateway's path is kept."""
    server.strict = False
    adapter = adapter_of(server, provider, server.origin + below)

    try:
        await adapter.complete(REQUEST)
    except LLMServiceError:
        assert "gate" in path or path.startswith("/v1/models")
    await adapter.aclose()

    assert [request.path for request in server.requests] == [path]


# --- the pooled client -------------------------------------------------------------


@each_provider
async def test_calls_in_a_row_use_one_connection(
    server: ProviderServer, provider: str
) -> None:
    """The open client is really the one that LiteLLM sends through."""
    adapter = adapter_of(server, provider)

    for _ in range(20):
        await adapter.complete(REQUEST)
    await adapter.aclose()

    assert len(server.requests) == 20
    assert server.connections == 1


# --- the bytes of an answer -----------------------------------------------------------


async def _answer_bytes(server: ProviderServer, provider: str) -> bytes:
    """Fetch what the server would say, as bytes."""
    adapter = adapter_of(server, provider)
    result = await adapter.complete(REQUEST)
    await adapter.aclose()
    return json.dumps(result.raw_response).encode()


@each_provider
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_in_any_framing(
    server: ProviderServer, provider: str, framing: str, packed: bool
) -> None:
    """Lengths, chunks, an end by closing, and gzip all give the same answer."""
    body = await _answer_bytes(server, provider)
    headers = {"content-encoding": "gzip"} if packed else {}
    data = gzip.compress(body) if packed else body
    third = len(data) // 3
    pieces = [data[:third], data[third : 2 * third], data[2 * third :]]
    server.reply(Raw(headers=headers, body=pieces, framing=framing, piece_delay=0.01))
    adapter = adapter_of(server, provider)

    result = await adapter.complete(REQUEST)
    await adapter.aclose()

    assert result.text == SAID
    assert result.raw_response == json.loads(body)


@each_provider
async def test_an_answer_that_drips(server: ProviderServer, provider: str) -> None:
    """A byte at a time is as good as the whole at once."""
    server.reply(Fault("drip"))
    adapter = adapter_of(server, provider)

    result = await adapter.complete(REQUEST)
    await adapter.aclose()

    assert result.text == SAID


@each_provider
async def test_an_answer_shorter_than_it_said(
    server: ProviderServer, provider: str
) -> None:
    """A body that ends before its length is no answer, though it be whole JSON."""
    body = await _answer_bytes(server, provider)
    server.reply(Raw(body=body, framing="short"))
    adapter = adapter_of(server, provider)

    with pytest.raises(ServiceUnavailableError) as caught:
        await adapter.complete(REQUEST)
    await adapter.aclose()

    assert caught.value.retryable


@each_provider
@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_longer_than_the_limit(
    server: ProviderServer, provider: str, packed: bool
) -> None:
    """Reading stops at the limit, which counts the bytes after decompression."""
    body = b'{"x": "' + b"x" * 100_000 + b'"}'
    if packed:
        headers = {"content-encoding": "gzip"}
        server.reply(Raw(headers=headers, body=gzip.compress(body)))
    else:
        server.reply(Raw(body=body))
    adapter = adapter_of(server, provider, max_response_bytes=10_000)

    with pytest.raises(ServiceUnavailableError, match="longer than 10000") as caught:
        await adapter.complete(REQUEST)
    await adapter.aclose()

    assert caught.value.retryable is False
    assert (caught.value.service, caught.value.model) == (provider, MODELS[provider])


# --- the fence -----------------------------------------------------------------------


@each_provider
async def test_the_fence_lets_one_request_through_an_attempt(
    server: ProviderServer, provider: str
) -> None:
    """A second request in one attempt is refused, whoever makes it."""
    adapter = adapter_of(server, provider)
    url = f"{server.origin}/image.png"
    attempt = Attempt()

    async with await adapter.client() as client:
        await client.send("GET", url, {}, None, attempt)
        await client.read(attempt)
        with pytest.raises(LLMServiceError, match="second request"):
            await client.send("GET", url, {}, None, attempt)
    await adapter.aclose()

    assert len(server.requests) == 1


@each_provider
async def test_the_fence_keeps_the_origin(
    server: ProviderServer, other: ProviderServer, provider: str
) -> None:
    """Another host, port or scheme is refused before a connection is opened."""
    adapter = adapter_of(server, provider)
    urls = [
        other.base_url(provider),
        server.origin.replace("http://", "https://"),
        server.origin.replace("127.0.0.1", "127.0.0.2"),
        server.origin.replace("http://", f"http://127.0.0.1:{server.port}@localhost:"),
    ]

    async with await adapter.client() as client:
        for url in urls[:3]:
            with pytest.raises(LLMServiceError, match="base URL is at"):
                await client.send("POST", url + "/v1/x", {}, b"{}", Attempt())
        with pytest.raises((LLMServiceError, ValueError)):
            await client.send("POST", urls[3], {}, b"{}", Attempt())
    await adapter.aclose()

    assert (server.connections, other.connections) == (0, 0)


@each_provider
async def test_the_fence_keeps_headers_that_nobody_asked_for(
    server: ProviderServer, provider: str
) -> None:
    """A header that is not of the format is dropped, a key that is not ours replaced."""
    adapter = adapter_of(server, provider)
    asked = {
        "X-Stainless-OS": "Linux",
        "OpenAI-Organization": "org-1",
        "X-Evil": "1",
        "Cookie": "a=b",
        "Authorization": "Bearer sk-of-somebody",
        "x-api-key": "sk-of-somebody",
        "x-goog-api-key": "sk-of-somebody",
        "Host": "evil.test",
    }

    async with await adapter.client() as client:
        url = f"{server.origin}/image.png"
        attempt = Attempt()
        await client.send("GET", url, asked, None, attempt)
        await client.read(attempt)
    await adapter.aclose()

    (request,) = server.requests
    assert set(request.headers) == {
        "host",
        "user-agent",
        "accept-encoding",
        adapter.provider.key_header,
    }
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert request.headers[adapter.provider.key_header].endswith(CANARY)


@each_provider
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed(
    server: ProviderServer, other: ProviderServer, provider: str, status: int
) -> None:
    """The server that a redirect names never hears of it, and never sees the key."""
    server.reply(Raw(status, headers={"location": f"{other.origin}/v1/messages"}))
    adapter = adapter_of(server, provider)

    with pytest.raises(LLMServiceError, match="redirect is never followed") as caught:
        await adapter.complete(REQUEST)
    await adapter.aclose()

    assert caught.value.status_code == status
    assert caught.value.retryable is False
    assert len(server.requests) == 1
    assert other.connections == 0


@each_provider
async def test_cookies_are_not_kept(server: ProviderServer, provider: str) -> None:
    """What one answer sets does not travel with the next request."""
    server.reply(Answer(headers={"set-cookie": "session=1; Path=/"}))
    url = server.base_url(provider).replace("127.0.0.1", "localhost")
    adapter = adapter_of(server, provider, url)

    await adapter.complete(REQUEST)
    await adapter.complete(REQUEST)
    await adapter.aclose()

    assert "cookie" not in server.requests[-1].headers


@each_provider
async def test_headers_of_the_settings(server: ProviderServer, provider: str) -> None:
    """What the application wants on every request is the one thing that is added."""
    adapter = adapter_of(server, provider, extra_headers={"X-Tenant": "t-1"})

    await adapter.complete(REQUEST)
    await adapter.aclose()

    assert server.requests[-1].headers["x-tenant"] == "t-1"
