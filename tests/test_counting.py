"""Tokens counted before a call: by the provider, else by a tokenizer on this machine."""

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dipeo_llm import (
    InvalidRequestError,
    LLMInfraService,
    LLMServiceError,
    TokenCount,
)
from tests.provider_server import ProviderServer, Raw, Received, error

HELLO = [{"role": "user", "content": "Hello, how many tokens is this?"}]
MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
}


class CountingServer(ProviderServer):
    """A server whose counting endpoint answers what the test says."""

    answer: Raw | None = None

    def _listing(self, asked: Received) -> Raw:
        return self.answer or super()._listing(asked)


@pytest.fixture
async def server() -> AsyncIterator[CountingServer]:
    """Run a loopback server whose counting endpoint can be replaced."""
    async with CountingServer() as running:
        yield running


ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1/responses/input_tokens", {"input_tokens": 41}),
    "anthropic": ("/v1/messages/count_tokens", {"input_tokens": 41}),
    "google": ("/v1beta/models/gemini-2.5-flash:countTokens", {"totalTokens": 41}),
}


@pytest.mark.parametrize("provider", ANSWERS)
async def test_the_provider_counts(
    service: LLMInfraService, server: CountingServer, provider: str
) -> None:
    """The system prompt and the tools are sent along, no option of an answer is."""
    path, answer = ANSWERS[provider]
    server.answer = Raw(body=str(answer).replace("'", '"').encode())
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]

    def weather(city: str) -> str:
        """Tell the weather."""
        return city

    counted = await service.count_tokens(
        messages, MODELS[provider], provider, tools=[weather]
    )

    assert counted == TokenCount(tokens=41, source="provider")
    asked = server.requests[0]
    assert asked.path == path
    for word in (b"Be brief.", b"Hello, how", b"weather"):
        assert asked.body.count(word)
    for word in (b"max_tokens", b"stream", b"temperature"):
        assert word not in asked.body


@pytest.mark.parametrize(
    "answer",
    [
        error("openai", 404, "Not found."),
        # vLLM, https://github.com/vllm-project/vllm/issues/49533 (2026-11-25)
        Raw(405, body=b'{"detail":"Method Not Allowed"}'),
        Raw(501, body=b"Not implemented"),
        # LM Studio
        Raw(200, body=b'{"error":"Unexpected endpoint or method."}'),
    ],
    ids=["404", "405", "501", "200"],
)
async def test_a_server_that_does_not_count_is_counted_for(
    service: LLMInfraService, server: CountingServer, answer: Raw
) -> None:
    """A server of one's own, behind OpenAI's format, has no such endpoint."""
    server.answer = answer

    counted = await service.count_tokens(HELLO, "my-model", "openai", service="openai")

    assert counted.source == "tokenizer"
    assert 8 < counted.tokens < 20
    assert len(server.requests) == 1


async def test_any_other_failure_is_one(
    service: LLMInfraService, server: CountingServer
) -> None:
    """A provider that cannot count just now is not counted for by a guess."""
    server.answer = error("openai", 400, "No.")

    with pytest.raises(LLMServiceError, match="No"):
        await service.count_tokens(HELLO, "gpt-4.1-nano", "openai")


@pytest.mark.parametrize(
    "model",
    [
        "llama3.2",
        "llama-3.1:8b",
        "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
        "command-r-plus:104b",
    ],
)
async def test_the_tokenizer_looks_up_no_host(
    service: LLMInfraService,
    server: CountingServer,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    """LiteLLM would fetch a tokenizer from a hub for such names, on the event loop."""
    await service.initialize()
    looked_up = []

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        looked_up.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "not in a test")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    counted = await service.count_tokens(HELLO, model, service="ollama")

    assert counted.source == "tokenizer"
    assert 8 < counted.tokens < 20
    assert looked_up == []
    assert server.requests == []


@pytest.mark.parametrize(
    ("model", "provider", "content", "tools"),
    [
        ("claude-sonnet-4-5", "anthropic", "x", [{"function": {"name": ""}}]),
        ("claude-sonnet-4-5", "anthropic", "half a character: \ud83d", []),
        ("gemini-2.5-flash", "google", "half a character: \ud83d", []),
        ("llama3.2", "ollama", [{"type": "weird"}], []),
    ],
)
async def test_what_cannot_be_counted_is_refused_here(
    service: LLMInfraService,
    server: CountingServer,
    model: str,
    provider: str,
    content: Any,
    tools: list[Any],
) -> None:
    """Errors of LiteLLM's and of the JSON writer's do not reach a caller."""
    messages = [{"role": "user", "content": content}]

    with pytest.raises(InvalidRequestError, match=r"cannot be|needs") as caught:
        await service.count_tokens(messages, model, provider, tools=tools)

    assert caught.value.service == provider
    assert server.requests == []
