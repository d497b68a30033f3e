"""Every provider that is called directly, at its own address and at one of the user's.

Generated over LiteLLM's own list, so that a provider that it adds is tried by the next
run. A proxy on loopback plays all hosts; nothing else of the network can be reached.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from dipeo_llm import (
    APIKeyError,
    DiPeOLLMError,
    EnvironmentAPIKeys,
    InvalidRequestError,
    LLMInfraService,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    StreamInterruptedError,
)
from dipeo_llm import litellm_providers as providers
from dipeo_llm.adapters.factory import by_name
from dipeo_llm.adapters.openai import ChatGPTAdapter
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.litellm_import import import_litellm
from dipeo_llm.testing import block_network
from tests.conftest import HELLO
from tests.provider_world import TEXT, Reply, World

KEY = "sk-test-of-the-world"
MODEL = "user.app.model"  # clarifai wants three parts
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def find_direct() -> dict[str, Provider]:
    """Return the row of each provider that speaks OpenAI's format, by LiteLLM's name."""
    litellm = import_litellm()
    own = {row.litellm: row for row in ChatGPTAdapter.rows}
    return {
        name: own.get(name) or by_name(name)
        for name in providers.chat_providers(litellm)
        if providers.describe(litellm, name).speaks_openai and name not in _OTHER_FORMAT
    }


# Vertex speaks OpenAI's format too, and is called in Gemini's.
_OTHER_FORMAT = frozenset({"vertex_ai", "vertex_ai_beta"})


def address_of(name: str, row: Provider) -> str:
    """Return the provider's address, or one of a user's own."""
    return row.base_url or f"https://{name.replace('_', '-')}.example/v1"


def path_of(name: str, base_url: str) -> str:
    """Return the path of a call below a base URL."""
    facts = providers.describe(import_litellm(), name)
    below = providers.path_below(import_litellm(), facts, MODEL, base_url)
    return urlsplit(base_url).path + below


@pytest.fixture(autouse=True)
def sealed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take every key away, and close the network."""
    litellm = import_litellm()
    for name in providers.chat_providers(litellm):
        for variable in providers.describe(litellm, name).key_variables:
            monkeypatch.delenv(variable, raising=False)
    with block_network():
        yield


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Run the servers of all providers."""
    rows = find_direct()
    hosts = {urlsplit(address_of(name, row)).hostname or "" for name, row in rows.items()}
    async with World(tmp_path, hosts) as running:
        yield running


@pytest.fixture
async def service(world: World) -> AsyncIterator[LLMInfraService]:
    """Open a service that goes through the proxy, with addresses for who has none."""
    base_urls = {
        name: address_of(name, row)
        for name, row in find_direct().items()
        if row.base_url is None
    }
    settings = Settings(
        max_retries=0,
        timeout=20.0,
        proxy=world.origin,
        ca_bundle=world.ca_bundle,
        base_urls=base_urls,
    )
    async with LLMInfraService(EnvironmentAPIKeys(), settings=settings) as opened:
        yield opened


async def ask(service: LLMInfraService, model: str, how: str, **options: Any) -> Any:
    """Make a call, or read a stream to its end, and return the result."""
    if how == "call":
        return await service.complete(HELLO, model, **options)
    async with service.stream(HELLO, model, **options) as stream:
        text = "".join([chunk.text async for chunk in stream])
        result = await stream.result()
    assert text == result.text
    return result


async def try_all(service: LLMInfraService, world: World, model: str) -> dict[str, str]:
    """Try what can happen in a call and in a stream; return what went wrong."""
    wrong: dict[str, str] = {}

    async def expect(what: str, reply: Reply, how: str, check: Any, **more: Any) -> None:
        world.reply = reply
        before = len(world.requests)
        try:
            outcome: Any = await ask(service, model, how, **more)
        except DiPeOLLMError as exc:
            outcome = exc
        found = check(outcome)
        if KEY in f"{outcome!r}{outcome}":
            found = "shows the key"
        if not found and (sent := len(world.requests) - before) != 1:
            found = f"{sent} requests"
        if found:
            wrong[f"{what}, {how}"] = f"{found}: {outcome!r}"[:300]

    def is_text(result: Any) -> str | None:
        if not isinstance(result, Exception) and result.text == TEXT:
            usage = result.token_usage
            return None if usage and usage.total == 17 else f"usage {usage}"
        return "no text"

    def is_call(result: Any) -> str | None:
        calls = [] if isinstance(result, Exception) else result.tool_calls
        found = [(call.name, call.arguments) for call in calls]
        return None if found == [("add", {"a": 1})] else "no call"

    def is_error(kind: type[Exception], status: int | None, wait: float | None) -> Any:
        def check(exc: Any) -> str | None:
            seen = (
                isinstance(exc, kind)
                and getattr(exc, "status_code", None) == status
                and getattr(exc, "retry_after", None) == wait
            )
            return None if seen else "another error"

        return check

    refused = is_error(APIKeyError, 401, None)
    limited = is_error(RateLimitError, 429, 7.0)
    broken = is_error(ServiceUnavailableError, 500, None)
    for how in ("call", "stream"):
        await expect("text", Reply(), how, is_text)
        await expect("tools", Reply(), how, is_call, tools=[TOOL])
        await expect("401", Reply(401), how, refused)
        await expect("429", Reply(429, {"retry-after": "7"}), how, limited)
        await expect("500", Reply(500), how, broken)
    cut = is_error(StreamInterruptedError, 200, None)
    await expect("cut", Reply(cuts=True), "stream", cut)
    return wrong


def check_requests(world: World, name: str, row: Provider, base_url: str) -> list[str]:
    """Return what is wrong with the requests that arrived, and forget them."""
    host = urlsplit(base_url).hostname if base_url.startswith("https") else ""
    header = row.key_header
    wanted = (host, path_of(name, base_url), KEY if header != "authorization" else f"Bearer {KEY}")
    wrong = []
    for request in world.requests:
        seen = (request.host, request.path, request.headers.get(header))
        if seen != wanted:
            wrong.append(f"sent {seen} instead of {wanted}")
        others = {k: v for k, v in request.headers.items() if k != header}
        if KEY in f"{request.path}{others}{request.body}":
            wrong.append("the key is in another place too")
        if request.headers.keys() - {*_HEADERS, header}:
            wrong.append(f"headers {sorted(request.headers)}")
    world.requests.clear()
    return sorted(set(wrong))


_HEADERS = frozenset(
    {
        *("host", "user-agent", "accept", "accept-encoding"),
        *("content-type", "content-length"),
    }
)


async def test_a_model_string_and_a_variable_are_enough(
    service: LLMInfraService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its own address, with the key of its first variable, without an id of a key."""
    wrong: dict[str, Any] = {}
    tried = 0
    for name, row in find_direct().items():
        base_url = address_of(name, row)
        if not base_url.startswith("https") or not row.key_variables:
            continue
        tried += 1
        with monkeypatch.context() as patch:
            patch.setenv(row.key_variables[0], KEY)
            found = await try_all(service, world, f"{name}/{MODEL}")
        odd = check_requests(world, name, row, base_url)
        if found or odd:
            wrong[name] = (found, odd)
    assert wrong == {}
    assert tried >= 80


async def test_an_address_in_the_environment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `DIPEO_LLM_<PROVIDER>_BASE_URL` and the id of a key, on this machine.

    A server on this machine is told a hosted provider's key only if a call names it.
    """
    rows = find_direct()
    urls = {}
    for name, row in rows.items():
        path = urlsplit(address_of(name, row)).path
        urls[name] = f"{world.origin}{path}"
        variable = name.upper().replace("-", "_")
        monkeypatch.setenv(f"DIPEO_LLM_{variable}_BASE_URL", urls[name])
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "0")
    wrong: dict[str, Any] = {}
    async with LLMInfraService(EnvironmentAPIKeys()) as service:
        for name, row in rows.items():
            model = f"{name}/{MODEL}"
            for variable in row.key_variables[:1]:
                with monkeypatch.context() as patch:
                    patch.setenv(variable, KEY)
                    for how in ("call", "stream"):
                        assert (await ask(service, model, how, api_key_id=variable)).text
                    odd = check_requests(world, name, row, urls[name])
                    assert (await ask(service, model, "call")).text
                    (request,) = world.requests
                    if (KEY in str(request.headers)) is row.needs_key:
                        odd.append("without an id")
                if odd:
                    wrong[name] = odd
            world.requests.clear()
            assert (await ask(service, model, "call")).text  # without a key
            (request,) = world.requests
            assert not {"authorization", "api-key"} & request.headers.keys()
            world.requests.clear()
    assert wrong == {}
    assert len(rows) >= 110
