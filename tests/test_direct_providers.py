"""Every provider that is called directly, at its own address and at one of the user's.

Generated over LiteLLM's own list, so that a provider that it adds is tried by the next
run. A proxy on loopback plays all hosts; nothing else of the network can be reached.
`python -m tests.test_direct_providers` writes the list in docs/providers.md.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    APIKeyError,
    APIKeyNotFoundError,
    DiPeOLLMError,
    EnvironmentAPIKeys,
    InvalidRequestError,
    LLMInfraService,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    StreamInterruptedError,
    ToolType,
)
from dipeo_llm import litellm_providers as providers
from dipeo_llm.adapters.factory import (
    by_name,
    list_providers,
    of_key,
    resolve,
)
from dipeo_llm.adapters.openai import ChatGPTAdapter
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.litellm_import import import_litellm
from dipeo_llm.testing import block_network
from dipeo_llm.testing.network_guard import replaced
from tests.conftest import HELLO
from tests.provider_world import CALL, TEXT, USAGE, Reply, World

FAILS: Mapping[str, str] = {}
"""Direct providers that fail in these tests, and why; docs/providers.md lists them."""
KEY = "sk-test-of-the-world"
MODEL = "user.app.model"  # clarifai wants three parts
MODELS = {"databricks": "model"}  # three parts are a model of its gateway
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
    path = urlsplit(row.base_url_example or "https://x/v1").path
    return row.base_url or f"https://{name.replace('_', '-')}.example{path}"


def path_of(name: str, base_url: str) -> str:
    """Return the path of a call below a base URL."""
    facts = providers.describe(import_litellm(), name)
    below = providers.path_below(
        import_litellm(), facts, MODELS.get(name, MODEL), base_url
    )
    return urlsplit(base_url).path + below


@pytest.fixture(autouse=True)
def sealed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take every key away, and let nothing but the world be reached."""
    litellm = import_litellm()
    for name in providers.chat_providers(litellm):
        for variable in providers.describe(litellm, name).key_variables:
            monkeypatch.delenv(variable, raising=False)
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    ports = set()
    with block_network():
        connect = socket.socket.connect

        def note(self: socket.socket, address: Any) -> None:
            ports.add(address[1])
            connect(self, address)

        with replaced([(socket.socket, "connect", note)]):
            yield
    # LiteLLM asks a server on this machine about its models, for some providers.
    assert ports <= World.ports


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Run the servers of all providers."""
    rows = find_direct()
    hosts = {
        urlsplit(address_of(name, row)).hostname or "" for name, row in rows.items()
    }
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

    async def expect(
        what: str, reply: Reply, how: str, check: Any, **more: Any
    ) -> None:
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
    wanted = (
        host,
        path_of(name, base_url),
        KEY if header != "authorization" else f"Bearer {KEY}",
    )
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
            found = await try_all(service, world, f"{name}/{MODELS.get(name, MODEL)}")
        odd = check_requests(world, name, row, base_url)
        if found or odd:
            wrong[name] = (found, odd)
    assert {name: why for name, why in wrong.items() if name not in FAILS} == {}
    assert FAILS.keys() <= wrong.keys(), "takes no part in the list any more"
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
            model = f"{name}/{MODELS.get(name, MODEL)}"
            for variable in row.key_variables[:1]:
                with monkeypatch.context() as patch:
                    patch.setenv(variable, KEY)
                    for how in ("call", "stream"):
                        assert (
                            await ask(service, model, how, api_key_id=variable)
                        ).text
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
    assert len(rows) >= 100


# What is particular to the ten most used.


class Sum(BaseModel):
    """An answer with a form."""

    sum: int


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the first variable of each of them."""
    for name in _MOST_USED:
        monkeypatch.setenv(by_name(name).key_variables[0], KEY)


_MOST_USED = (
    *("groq", "mistral", "xai", "deepseek", "openrouter"),
    *("together_ai", "fireworks_ai", "perplexity", "cerebras", "moonshot"),
)
each_way = pytest.mark.parametrize("how", ["call", "stream"])
ANY = object()
# Model, options, and what of the body they become; None is left out.
PARAMETERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "groq/llama-3.3-70b-versatile",
        {"reasoning_effort": "low"},
        {"reasoning_effort": None},
    ),
    (
        "groq/openai/gpt-oss-120b",
        {"reasoning_effort": "low"},
        {"reasoning_effort": "low"},
    ),
    ("groq/openai/gpt-oss-120b", {"response_format": Sum}, {"response_format": ANY}),
    (
        "mistral/mistral-large-latest",
        {"seed": 3, "tools": [TOOL], "tool_choice": "required"},
        {"seed": None, "random_seed": 3, "tool_choice": "any", "stream_options": None},
    ),
    ("xai/grok-4", {"stop": ["END"], "seed": 3}, {"stop": None, "seed": 3}),
    (
        "deepseek/deepseek-chat",
        {"temperature": 0.5, "stop": ["a"]},
        {"temperature": 0.5, "stop": ["a"]},
    ),
    (
        "deepseek/deepseek-reasoner",
        {"reasoning_effort": "low"},
        {"thinking": {"type": "enabled"}},
    ),
    (
        "openrouter/anthropic/claude-sonnet-4.5",
        {"extra_body": {"provider": {"order": ["a"]}, "transforms": ["middle-out"]}},
        {
            "extra_body": None,
            "provider": {"order": ["a"]},
            "transforms": ["middle-out"],
            "usage": {"include": True},
        },
    ),
    (
        "together_ai/a/b",
        {"tools": [TOOL], "tool_choice": "required"},
        {"tool_choice": "required", "tools": [TOOL]},
    ),
    (
        "together_ai/a/b",
        {"response_format": Sum, "seed": 1},
        {"response_format": ANY, "seed": 1},
    ),
    (
        "fireworks_ai/llama-v3p3-70b-instruct",
        {"max_tokens": 9},
        {"model": "accounts/fireworks/models/llama-v3p3-70b-instruct", "max_tokens": 9},
    ),
    (
        "perplexity/sonar",
        {"temperature": 0.5, "stop": ["a"]},
        {"temperature": 0.5, "stop": None},
    ),
    (
        "cerebras/llama-3.3-70b",
        {"seed": 3, "top_p": 0.5},
        {"seed": 3, "top_p": 0.5, "stream_options": None},
    ),
    ("moonshot/moonshot-v1-8k", {"temperature": 1.7}, {"temperature": 1}),
    (
        "moonshot/kimi-k2.6",
        {"tools": [TOOL], "tool_choice": "required"},
        {"tool_choice": None, "tools": [TOOL]},
    ),
]


@each_way
@pytest.mark.usefixtures("keyed")
@pytest.mark.parametrize(("model", "options", "wanted"), PARAMETERS)
async def test_parameters(
    service: LLMInfraService,
    world: World,
    how: str,
    model: str,
    options: dict[str, Any],
    wanted: dict[str, Any],
) -> None:
    """An option has the provider's name, or is left out where it does not take it."""
    if "response_format" in options:
        world.reply = Reply(message={"role": "assistant", "content": '{"sum": 3}'})

    await ask(service, model, how, **options)

    body = world.requests[0].body
    assert body.get("stream", False) is (how == "stream")
    for name, value in wanted.items():
        found = body.get(name)
        assert found == value or (value is ANY and found is not None), name


@each_way
@pytest.mark.usefixtures("keyed")
async def test_groq_answers_in_a_form_without_schemas(
    service: LLMInfraService, world: World, how: str
) -> None:
    """The tool that LiteLLM asks such a model through is not the caller's: it is text."""
    function = {"name": "json_tool_call", "arguments": '{"sum": 3}'}
    call = {"id": "call_1", "type": "function", "function": function}
    world.reply = Reply(
        message={"role": "assistant", "content": None, "tool_calls": [call]}
    )

    result = await ask(
        service, "groq/a-model-without-schemas", how, response_format=Sum
    )

    body = world.requests[0].body
    assert body["tool_choice"]["function"]["name"] == "json_tool_call"
    assert body["tools"][0]["function"]["parameters"]["required"] == ["sum"]
    assert "response_format" not in body
    assert (result.text, result.parsed) == ('{"sum": 3}', Sum(sum=3))
    assert (result.tool_calls, result.finish_reason) == ([], "stop")


@pytest.mark.usefixtures("keyed")
async def test_groq_takes_no_tools_beside_such_a_form(
    service: LLMInfraService, world: World
) -> None:
    """Both would be tools; the error says so, and nothing is sent."""
    with pytest.raises(InvalidRequestError, match="structured outputs"):
        await service.complete(
            HELLO, "groq/a-model-without-schemas", response_format=Sum, tools=[TOOL]
        )
    assert world.requests == []


@each_way
@pytest.mark.usefixtures("keyed")
async def test_mistral_thinks_in_parts(
    service: LLMInfraService, world: World, how: str
) -> None:
    """Content may be a list, of thoughts and of text."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    content = [thought, {"type": "text", "text": "Yes"}, {"type": "text", "text": "!"}]
    world.reply = Reply(message={"role": "assistant", "content": content})

    result = await ask(service, "mistral/magistral-medium-latest", how)

    assert (result.text, result.reasoning) == ("Yes!", "Hm.")


@each_way
@pytest.mark.usefixtures("keyed")
async def test_xai_counts_thoughts_beside_the_output(
    service: LLMInfraService, world: World, how: str
) -> None:
    """They are output here, as everywhere, and are paid for."""
    usage = {
        "prompt_tokens": 12,
        "completion_tokens": 5,
        "total_tokens": 117,
        "completion_tokens_details": {"reasoning_tokens": 100},
    }
    world.reply = Reply(more={"usage": usage, "citations": ["https://a.example/"]})
    table = import_litellm().model_cost
    model = next(
        name
        for name, row in table.items()
        if name.startswith("xai/grok") and row.get("input_cost_per_token")
    )
    price = [table[model][f"{side}_cost_per_token"] for side in ("input", "output")]

    result = await ask(service, model, how)

    counted = result.token_usage
    assert (counted.input, counted.output, counted.reasoning) == (12, 105, 100)
    assert result.cost_usd == pytest.approx(12 * price[0] + 105 * price[1])
    assert [page.url for page in result.tool_outputs[0].result] == [
        "https://a.example/"
    ]


@each_way
@pytest.mark.usefixtures("keyed")
@pytest.mark.parametrize(
    ("model", "goes_back"),
    [
        ("deepseek/deepseek-reasoner", True),
        ("moonshot/kimi-k2.6", True),
        ("fireworks_ai/accounts/fireworks/models/kimi-k2", True),
        ("openrouter/moonshotai/kimi-k2.6", True),
        ("groq/openai/gpt-oss-120b", False),
        ("mistral/magistral-medium-latest", False),
        ("cerebras/gpt-oss-120b", False),
    ],
)
async def test_thoughts_go_back_with_a_tools_answer(
    service: LLMInfraService, world: World, how: str, model: str, goes_back: bool
) -> None:
    """Where the provider asks for them, and not where it refuses an unknown field."""
    message = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I must add.",
        "tool_calls": [CALL],
    }
    world.reply = Reply(message=message)
    first = await ask(service, model, how, tools=[TOOL])
    assert first.reasoning == "I must add."
    (call,) = first.tool_calls
    turn = [*HELLO, *first.to_messages(), call.to_message("3")]
    world.reply = Reply()

    await service.complete(turn, model)

    sent = world.requests[1].body["messages"]
    assert [part["role"] for part in sent] == ["user", "assistant", "tool"]
    wanted = "I must add." if goes_back else None
    assert sent[1].get("reasoning_content") == wanted
    assert sent[1]["tool_calls"] == [CALL]
    assert sent[2]["content"] == "3"


@each_way
@pytest.mark.usefixtures("keyed")
async def test_openrouters_fields(
    service: LLMInfraService, world: World, how: str
) -> None:
    """Its name for thoughts, its price, its annotations; its blocks go back."""
    cited = {
        "type": "url_citation",
        "url_citation": {"url": "https://a.example/", "title": "A"},
    }
    details = [{"type": "reasoning.text", "text": "Hm.", "signature": "s"}]
    message = {
        "role": "assistant",
        "content": TEXT,
        "reasoning": "Hm.",
        "reasoning_details": details,
        "annotations": [cited],
    }
    usage = {**USAGE, "cost": 0.0125, "cost_details": {"upstream_inference_cost": None}}
    world.reply = Reply(message=message, more={"usage": usage})

    result = await ask(service, "openrouter/openai/gpt-4o", how)

    assert (result.text, result.reasoning, result.cost_usd) == (TEXT, "Hm.", 0.0125)
    (page,) = result.tool_outputs[0].result
    assert (page.url, page.title) == ("https://a.example/", "A")
    back = {"role": "assistant", "content": TEXT, "reasoning_details": details}
    await service.complete([*HELLO, back, *HELLO], "openrouter/openai/gpt-4o")
    assert world.requests[1].body["messages"][1]["reasoning_details"] == details
    assert not {"http-referer", "x-title"} & world.requests[1].headers.keys()


@pytest.mark.usefixtures("keyed")
async def test_openrouters_error_in_a_chunk(
    service: LLMInfraService, world: World
) -> None:
    """After the first text the stream is interrupted; before it the error is as usual."""
    text = {
        "choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]
    }
    end = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
    error = {"error": {"code": 429, "message": "Slow down."}, "choices": [end]}
    world.reply = Reply(events=[text, error])
    with pytest.raises(StreamInterruptedError, match=r"Slow down\.") as caught:
        await ask(service, "openrouter/a/b", "stream")
    assert caught.value.partial_text == "Hel"

    world.reply = Reply(events=[error])
    with pytest.raises(RateLimitError, match=r"Slow down\."):
        await ask(service, "openrouter/a/b", "stream")

    world.reply = Reply(body={"error": {"code": 502, "message": "No answer."}})
    with pytest.raises(ServiceUnavailableError, match=r"No answer\."):
        await ask(service, "openrouter/a/b", "call")


@each_way
@pytest.mark.usefixtures("keyed")
async def test_perplexity_says_what_it_found(
    service: LLMInfraService, world: World, how: str
) -> None:
    """Its results have titles; a citation that is none of them has its URL alone."""
    found = {
        "title": "A",
        "url": "https://a.example/",
        "date": "2026-01-01",
        "snippet": "s",
    }
    more = {
        "search_results": [found],
        "citations": ["https://a.example/", "https://b.example/"],
    }
    world.reply = Reply(more=more)

    result = await ask(service, "perplexity/sonar", how)

    (output,) = result.tool_outputs
    assert output.type is ToolType.WEB_SEARCH
    assert [(page.url, page.title, page.snippet) for page in output.result] == [
        ("https://a.example/", "A", "s"),
        ("https://b.example/", "", ""),
    ]


@each_way
@pytest.mark.usefixtures("keyed")
@pytest.mark.parametrize(
    ("model", "finish", "ours"),
    [("together_ai/a/b", "eos", "stop"), ("mistral/a", "model_length", "length")],
)
async def test_other_words_for_the_end(
    service: LLMInfraService, world: World, how: str, model: str, finish: str, ours: str
) -> None:
    """A finish reason is the same word for every provider."""
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    world.reply = Reply(
        body={"id": "1", "model": "m", "choices": [choice], "usage": USAGE}
    )
    if how == "stream":
        world.reply = Reply(events=[{"choices": [{**choice, "delta": message}]}])

    assert (await ask(service, model, how)).finish_reason == ours


# Clouds.

JWT = "eyJhbGciOiJub25lIn0.eyJhdWQiOiJ0ZXN0In0.c2lnbmF0dXJl"


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[World]:
    """Run the servers of the clouds."""
    hosts = (
        "r.openai.azure.com",
        "europe-west1-aiplatform.googleapis.com",
        "api.bytez.com",
        "bedrock-runtime.eu-central-1.amazonaws.com",
        "runtime.sagemaker.eu-central-1.amazonaws.com",
    )
    async with World(tmp_path, hosts) as running:
        yield running


def open_cloud(world: World, keys: Any, **settings: Any) -> LLMInfraService:
    """Make a service that goes through the proxy."""
    usual: dict[str, Any] = {
        "max_retries": 0,
        "proxy": world.origin,
        "ca_bundle": world.ca_bundle,
    }
    return LLMInfraService(keys, settings=Settings(**usual | settings))


@each_way
@pytest.mark.parametrize(
    ("key", "header", "value"),
    [(KEY, "api-key", KEY), (JWT, "authorization", f"Bearer {JWT}")],
    ids=["key", "token"],
)
async def test_azure(cloud: World, how: str, key: str, header: str, value: str) -> None:
    """The model is the deployment; a key and an Entra token have a header each.

    The endpoint that Azure's portal shows gets the path of the v1 API.
    """
    record = {"key": key, "base_url": "https://r.openai.azure.com/"}
    async with open_cloud(cloud, StaticAPIKeys({"mine": record})) as service:
        result = await ask(service, "azure/my-deployment", how, api_key_id="mine")

    assert (result.text, result.service) == (TEXT, "azure")
    (request,) = cloud.requests
    assert (request.host, request.path) == (
        "r.openai.azure.com",
        "/openai/v1/chat/completions",
    )
    assert request.body["model"] == "my-deployment"
    assert request.headers[header] == value
    assert str(request.headers).count(key) == 1


@pytest.mark.parametrize("kind", ["function", "coroutine", "record"])
async def test_a_function_gives_a_fresh_token(cloud: World, kind: str) -> None:
    """It is called before each call; one that may block runs in a thread."""
    loops = []

    def token() -> str:
        with contextlib.suppress(RuntimeError):
            loops.append(asyncio.get_running_loop())
        return f"{JWT}{next(serial)}"

    async def coroutine() -> str:
        return f"{JWT}{next(serial)}"

    serial = itertools.count(1)
    key: Any = coroutine if kind == "coroutine" else token
    if kind == "record":
        key = {"key": token, "service": "azure", "label": "Entra"}
    urls = {"azure": "https://r.openai.azure.com/openai/v1"}
    keys = StaticAPIKeys({"mine": key})
    async with open_cloud(cloud, keys, base_urls=urls) as service:
        for _ in range(2):
            await service.complete(HELLO, "azure/my-deployment", "mine")

    sent = [request.headers["authorization"] for request in cloud.requests]
    assert sent == [f"Bearer {JWT}1", f"Bearer {JWT}2"]
    assert loops == []
    assert JWT not in repr(keys)


@pytest.mark.parametrize(
    ("failing", "kind", "match"),
    [
        (RuntimeError("no sign-in"), RuntimeError, "no sign-in"),
        (None, APIKeyError, "text under 'key'"),
    ],
)
async def test_a_function_that_gives_no_token(
    cloud: World, failing: Exception | None, kind: type[Exception], match: str
) -> None:
    """Its own exception reaches the caller; nothing is sent."""

    def token() -> Any:
        if failing is not None:
            raise failing
        return 42

    urls = {"azure": "https://r.openai.azure.com/openai/v1"}
    async with open_cloud(
        cloud, StaticAPIKeys({"mine": token}), base_urls=urls
    ) as service:
        with pytest.raises(kind, match=match):
            await service.complete(HELLO, "azure/my-deployment", "mine")

    assert cloud.requests == []


@each_way
async def test_vertex(cloud: World, how: str) -> None:
    """Gemini's format, below the project's address, with Google's token."""
    base = (
        "https://europe-west1-aiplatform.googleapis.com/v1/projects/p/locations"
        "/europe-west1/publishers/google"
    )
    content = {"role": "model", "parts": [{"text": TEXT}]}
    usage = {"promptTokenCount": 12, "candidatesTokenCount": 5, "totalTokenCount": 17}
    answer = {
        "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
        "usageMetadata": usage,
        "modelVersion": "gemini-2.5-flash",
    }
    cloud.reply = Reply(events=[answer]) if how == "stream" else Reply(body=answer)
    keys = StaticAPIKeys({"mine": {"key": lambda: "ya29.token", "base_url": base}})
    async with open_cloud(cloud, keys) as service:
        result = await ask(
            service, "vertex_ai/gemini-2.5-flash", how, api_key_id="mine", max_tokens=9
        )

    assert (result.text, result.service) == (TEXT, "vertex")
    assert result.token_usage.total == 17
    (request,) = cloud.requests
    method = "generateContent" if how == "call" else "streamGenerateContent?alt=sse"
    assert request.path == f"{urlsplit(base).path}/models/gemini-2.5-flash:{method}"
    assert request.headers["authorization"] == "Bearer ya29.token"
    assert "x-goog-api-key" not in request.headers
    assert request.body["contents"] == [{"role": "user", "parts": [{"text": "Hello"}]}]
    assert request.body["generationConfig"]["max_output_tokens"] == 9


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("azure/d", r"azure needs a base_url such as https://RESOURCE\.openai"),
        (
            "vertex/gemini-2.5-flash",
            r"vertex needs a base_url such as https://LOCATION",
        ),
        ("databricks/m", r"databricks needs a base_url such as https://WORKSPACE"),
        ("snowflake/m", r"snowflake needs a base_url such as https://ACCOUNT"),
        ("custom_openai/m", "custom_openai needs a base_url"),
    ],
)
async def test_an_address_that_only_the_user_knows(model: str, match: str) -> None:
    """The error shows the form of the address."""
    async with LLMInfraService(
        StaticAPIKeys({"mine": KEY}), settings=Settings()
    ) as service:
        with pytest.raises(InvalidRequestError, match=match):
            await service.complete(HELLO, model, "mine")


CONVERSE = {
    "output": {"message": {"role": "assistant", "content": [{"text": TEXT}]}},
    "stopReason": "end_turn",
    "usage": {"inputTokens": 12, "outputTokens": 5, "totalTokens": 17},
    "metrics": {"latencyMs": 1},
}
CLAUDE = "anthropic.claude-3-5-sonnet-20240620-v1:0"


def frame(kind: str, payload: Mapping[str, Any]) -> bytes:
    """Return an event of Bedrock's stream.

    Source: https://smithy.io/2.0/aws/amazon-eventstream.html (2026-11-25).
    """
    head = b"".join(
        bytes([len(name)]) + name + b"\x07" + struct.pack(">H", len(value)) + value
        for name, value in (
            (b":event-type", kind.encode()),
            (b":content-type", b"application/json"),
            (b":message-type", b"event"),
        )
    )
    body = json.dumps(payload).encode()
    prelude = struct.pack(">II", 16 + len(head) + len(body), len(head))
    start = prelude + struct.pack(">I", zlib.crc32(prelude)) + head + body
    return start + struct.pack(">I", zlib.crc32(start))


async def test_bedrock_as_a_stream(
    cloud: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converse's stream has events of its own."""
    pytest.importorskip("botocore")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", KEY)
    events: list[tuple[str, dict[str, Any]]] = [
        ("messageStart", {"role": "assistant"}),
        ("contentBlockDelta", {"delta": {"text": TEXT}, "contentBlockIndex": 0}),
        ("contentBlockStop", {"contentBlockIndex": 0}),
        ("messageStop", {"stopReason": "end_turn"}),
        ("metadata", {"usage": CONVERSE["usage"], "metrics": {"latencyMs": 1}}),
    ]
    stream = b"".join(frame(kind, payload) for kind, payload in events)
    kind = {"content-type": "application/vnd.amazon.eventstream"}
    cloud.reply = Reply(headers=kind, body=stream)
    async with open_cloud(cloud, EnvironmentAPIKeys()) as service:
        result = await ask(service, f"bedrock/{CLAUDE}", "stream")

    assert (result.text, result.finish_reason) == (TEXT, "stop")
    assert result.token_usage.total == 17
    (request,) = cloud.requests
    assert request.host == "bedrock-runtime.eu-central-1.amazonaws.com"
    assert unquote(request.path) == f"/model/{CLAUDE}/converse-stream"
    assert request.headers["authorization"] == f"Bearer {KEY}"


async def test_bedrock_with_a_key(
    cloud: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converse, at the host of the region, with the key as a Bearer token."""
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", KEY)
    cloud.reply = Reply(body=CONVERSE)
    async with open_cloud(cloud, EnvironmentAPIKeys()) as service:
        result = await ask(service, f"bedrock/{CLAUDE}", "call")

    assert (result.text, result.service) == (TEXT, "bedrock")
    assert result.token_usage.total == 17
    (request,) = cloud.requests
    assert request.host == "bedrock-runtime.eu-central-1.amazonaws.com"
    assert unquote(request.path) == f"/model/{CLAUDE}/converse"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert str(request.headers).count(KEY) == 1


@pytest.mark.parametrize(
    ("model", "host", "path", "answer"),
    [
        (
            f"bedrock/{CLAUDE}",
            "bedrock-runtime.eu-central-1.amazonaws.com",
            f"/model/{CLAUDE}/converse",
            CONVERSE,
        ),
        (
            "sagemaker_chat/endpoint",
            "runtime.sagemaker.eu-central-1.amazonaws.com",
            "/endpoints/endpoint/invocations",
            None,
        ),
    ],
)
async def test_aws_signs(
    cloud: World,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    host: str,
    path: str,
    answer: Any,
) -> None:
    """With credentials and no key, LiteLLM signs for the host of the region."""
    pytest.importorskip("botocore")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    cloud.reply = Reply(body=answer)
    async with open_cloud(cloud, EnvironmentAPIKeys()) as service:
        result = await service.complete(HELLO, model)

    assert result.text == TEXT
    (request,) = cloud.requests
    assert (request.host, unquote(request.path)) == (host, path)
    signed = request.headers["authorization"]
    assert signed.startswith("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/")
    assert "/eu-central-1/" in signed
    assert "secret-of-the-test" not in str(request.headers)


async def test_no_variable_and_no_model_leads_bedrock_elsewhere(
    cloud: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LiteLLM would follow both; the key stays with the host of the region."""
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", KEY)
    monkeypatch.setenv("AWS_BEDROCK_RUNTIME_ENDPOINT", "https://elsewhere.example")
    cloud.reply = Reply(body=CONVERSE)
    async with open_cloud(cloud, EnvironmentAPIKeys()) as service:
        await service.complete(HELLO, f"bedrock/{CLAUDE}")
        with contextlib.suppress(DiPeOLLMError):
            await service.complete(HELLO, f"bedrock/us-west-2/{CLAUDE}")

    hosts = {request.host for request in cloud.requests}
    assert hosts == {"bedrock-runtime.eu-central-1.amazonaws.com"}


@pytest.mark.parametrize("name", ["bedrock", "sagemaker_chat", "sagemaker_nova"])
async def test_aws_without_a_region_or_credentials(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing is guessed, and no address of the machine's network is asked for them."""
    async with LLMInfraService(EnvironmentAPIKeys(), settings=Settings()) as service:
        with pytest.raises(InvalidRequestError, match="needs a region: set AWS_REGION"):
            await service.complete(HELLO, f"{name}/{CLAUDE}")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        with pytest.raises(APIKeyNotFoundError, match="AWS_SECRET_ACCESS_KEY"):
            await service.complete(HELLO, f"{name}/{CLAUDE}")


# LiteLLM's engine.


async def test_litellm_sends_the_call_through_our_client_or_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `engine="litellm"`; a provider with a client of LiteLLM's own is refused."""
    rows = find_direct()
    urls = {
        n: f"{world.origin}{urlsplit(address_of(n, r)).path}" for n, r in rows.items()
    }
    settings = Settings(max_retries=0, engine="litellm", base_urls=urls, timeout=20.0)
    keys = StaticAPIKeys({"mine": KEY})
    wrong: dict[str, Any] = {}
    refused = []
    # LiteLLM 1.110 fails at an answer of groq's without it.
    world.reply = Reply(more={"service_tier": "default"})
    async with LLMInfraService(keys, settings=settings) as service:
        for name, row in rows.items():
            try:
                result = await service.complete(
                    HELLO, f"{name}/{MODELS.get(name, MODEL)}", "mine"
                )
            except InvalidRequestError as exc:
                if row.client is None and "a client of its own" in str(exc):
                    refused.append(name)
                    assert world.requests == []
                    continue
                raise
            if result.text != TEXT or len(world.requests) != 1:
                wrong[name] = (result.text, len(world.requests))
            odd = check_requests(world, name, row, urls[name])
            if odd and name not in providers.DIFFERS:
                wrong[name] = odd
    assert wrong == {}
    assert set(refused) == {name for name, row in rows.items() if row.client is None}
    assert "lemonade" in refused


async def test_formats_that_only_litellm_knows(cloud: World) -> None:
    """Each is asked once, at the given address, with the key in one header or the body.

    The answer is not in its format: an error of ours is as good as a result.
    """
    models = {"ragflow": "chat/id/model"}
    litellm = import_litellm()
    names = [
        name
        for name in providers.chat_providers(litellm)
        if providers.describe(litellm, name).engine == "litellm"
        and name not in _WITH_ADAPTERS
    ]
    wrong = {}
    urls = dict.fromkeys(names, cloud.origin)
    del urls["bytez"]  # LiteLLM ignores its base URL, which the fence would refuse
    async with open_cloud(
        cloud, StaticAPIKeys({"mine": KEY}), base_urls=urls
    ) as service:
        for name in names:
            with contextlib.suppress(DiPeOLLMError):
                await service.complete(HELLO, f"{name}/{models.get(name, 'm')}", "mine")
            sent = [(r.method, str(r.headers).count(KEY)) for r in cloud.requests]
            if sent != [("POST", 1)]:
                wrong[name] = sent
            cloud.requests.clear()
    assert wrong == {}
    assert len(names) >= 5


_WITH_ADAPTERS = frozenset(
    {
        *("anthropic", "gemini", "ollama", "ollama_chat"),
        *("bedrock", "sagemaker_chat", "sagemaker_nova"),  # tried above
    }
)


async def test_litellm_does_not_sign_in_at_google(world: World) -> None:
    """Vertex is called directly only."""
    keys = StaticAPIKeys({"mine": {"key": "ya29.token", "base_url": world.origin}})
    async with LLMInfraService(keys, settings=Settings(engine="litellm")) as service:
        with pytest.raises(InvalidRequestError, match="a client of its own"):
            await service.complete(HELLO, "vertex/gemini-2.5-flash", "mine")
    assert world.requests == []


# Questions besides completions.


async def test_questions_about_every_provider(
    service: LLMInfraService, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models are listed beside the chat's path; LiteLLM's tokenizer and table answer.

    Nothing but the list is asked of anybody, which `block_network` holds.
    """
    wrong: dict[str, Any] = {}
    for name, row in find_direct().items():
        base_url = address_of(name, row)
        if not base_url.startswith("https") or not row.key_variables:
            continue
        model = f"{name}/{MODELS.get(name, MODEL)}"
        monkeypatch.setenv(row.key_variables[0], KEY)
        listing = {"object": "list", "data": [{"id": "b"}, {"id": "a"}]}
        # Together's list is bare: https://docs.together.ai/reference/models-1
        # (2026-11-25).
        bare = name == "together_ai"
        world.reply = Reply(body=listing["data"] if bare else listing)
        assert await service.get_available_models(name) == ["a", "b"], name
        assert await service.validate_api_key(name) is True
        world.reply = Reply(401)
        assert await service.validate_api_key(name) is False
        path = path_of(name, base_url).rstrip("/").removesuffix("/chat/completions")
        seen = {(r.method, r.host, r.path) for r in world.requests}
        if seen != {("GET", urlsplit(base_url).hostname, f"{path}/models")}:
            wrong[name] = seen
        world.requests.clear()
        if name != "openai":  # it counts them itself
            count = await service.count_tokens(HELLO, model)
            assert (count.source, count.tokens > 0) == ("tokenizer", True)
        known = service.capabilities(model)
        assert (known.service, known.model) == (row.name, model.partition("/")[2])
        assert world.requests == []
        monkeypatch.delenv(row.key_variables[0])
    assert wrong == {}


async def test_the_table_knows_models_of_other_providers(
    service: LLMInfraService,
) -> None:
    """Abilities and prices are LiteLLM's, where it has the model."""
    model = next(
        name
        for name, row in import_litellm().model_cost.items()
        if name.startswith("groq/")
        and row.get("supports_function_calling")
        and row.get("input_cost_per_token")
    )
    known = service.capabilities(model)

    assert (known.service, known.tools) == ("groq", True)
    assert (known.context_window or 0) > 1000
    assert (known.input_usd_per_million or 0) > 0


# Names.


@pytest.mark.parametrize("wrong", ["gorq", "Groqq", "groqs"])
async def test_did_you_mean(service: LLMInfraService, wrong: str) -> None:
    """As a prefix, as a service, as the id of a key: each is answered with the name."""
    with pytest.raises(InvalidRequestError, match="did you mean 'groq/x'"):
        await service.complete(HELLO, f"{wrong}/x")
    with pytest.raises(InvalidRequestError, match="did you mean 'groq'"):
        await service.complete(HELLO, "x", service=wrong)
    with pytest.raises(APIKeyError, match="did you mean 'groq'"):
        await service.complete(HELLO, "groq/x", wrong)


async def test_a_service_that_is_nearly_right(service: LLMInfraService) -> None:
    """Ours and LiteLLM's names are known alike."""
    with pytest.raises(InvalidRequestError, match="did you mean 'openai'"):
        await service.complete(HELLO, "gpt-4o", service="opnai")
    with pytest.raises(InvalidRequestError, match="did you mean 'google'"):
        await service.complete(HELLO, "gemini-2.5-flash", service="gogle")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("claude-code", "a program that runs on this machine"),
        ("watsonx", "exchanges the key for a token"),
        ("github_copilot", "OAuth"),
        ("replicate", "a client of its own"),
    ],
)
async def test_refused_before_a_key_is_looked_up(name: str, reason: str) -> None:
    """By its name as a prefix and as a service, with the reason."""

    class Keys:
        def get_api_key(self, api_key_id: str) -> Any:
            raise AssertionError("a key was looked up")

    async with LLMInfraService(Keys(), settings=Settings()) as service:
        with pytest.raises(InvalidRequestError, match=reason):
            await service.complete(HELLO, f"{name}/model", "mine")
        with pytest.raises(InvalidRequestError, match=reason):
            await service.complete(HELLO, "model", "mine", service=name)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("chatgpt", "openai"), ("gpt", "openai"), ("llama", "ollama")],
)
def test_other_names(alias: str, name: str) -> None:
    """Those of DiPeO are names as a service, a prefix, and in `base_urls`."""
    assert by_name(alias).name == name
    row, model = resolve(f"{alias}/some-model")
    assert (row.name, model) == (name, "some-model")
    assert row.find_base_url({alias: "http://x"}) == "http://x"


async def test_a_keys_service_places_a_model(world: World) -> None:
    """A name that nothing else places belongs to the provider of the key's record."""
    keys = StaticAPIKeys(
        {
            "work": {"key": KEY, "service": "groq"},
            "home": {"key": KEY, "service": "openai"},
            "odd": {"key": KEY, "service": "gorq"},
        }
    )
    async with open_cloud(world, keys) as opened:
        result = await opened.complete(HELLO, "llama-3.3-70b-versatile", "work")
        with pytest.raises(InvalidRequestError, match="no provider is known"):
            await opened.complete(HELLO, "llama-3.3-70b-versatile", "home")
        with pytest.raises(InvalidRequestError, match="did you mean 'groq'"):
            await opened.complete(HELLO, "llama-3.3-70b-versatile", "odd")
        with pytest.raises(APIKeyError, match="belongs to groq"):
            await opened.complete(HELLO, "gpt-4.1-nano", "work")

    assert result.service == "groq"
    (request,) = world.requests
    assert request.host == "api.groq.com"
    assert request.body["model"] == "llama-3.3-70b-versatile"


def test_every_name_is_that_of_its_key() -> None:
    """The name of a provider, and of each of its variables, lead to its key."""
    for name in find_direct():
        row = by_name(name)
        assert of_key(name) == row
        assert of_key(f"{name}-team-a") == row
        for variable in row.key_variables:
            owner = of_key(variable)
            assert owner is not None
            assert variable in owner.key_variables


async def test_a_misspelt_name_in_base_urls(caplog: pytest.LogCaptureFixture) -> None:
    """It is warned of as soon as LiteLLM's names are known; other names are not."""
    urls = {
        "gorq": "http://127.0.0.1:9",
        "groq": "http://127.0.0.1:9",
        "nano_gpt": "http://x",
    }
    async with LLMInfraService(
        StaticAPIKeys({}), settings=Settings(base_urls=urls)
    ) as made:
        await made.initialize()

    said = [record.getMessage() for record in caplog.records]
    (line,) = [text for text in said if "base_urls" in text]
    assert "'gorq'" in line
    assert "did you mean 'groq'" in line


# The page.

PAGE = Path(__file__).parent.parent / "docs" / "providers.md"
BEGIN, END = "<!-- written by tests.test_direct_providers -->", "<!-- end -->"


def count_providers() -> dict[str, int]:
    """Count LiteLLM's chat providers by how they are reached."""
    rows = {row.prefix: row for row in list_providers()}
    direct = [row for row in rows.values() if row.engine == "direct"]
    through = [row for row in rows.values() if row.engine == "litellm"]
    reached = [*direct, *through]
    alone = [
        row
        for row in reached
        if (row.address and row.key_variables)
        or (row.address and not by_name(row.prefix).needs_key)
    ]
    return {
        "all": len(rows),
        "direct": len(direct),
        "litellm": len(through),
        "refused": len(rows) - len(reached),
        "alone": len(alone),
        "alone, direct": len([row for row in alone if row.engine == "direct"]),
    }


def page() -> str:
    """Return what is generated: how many, which, and what differs."""
    counts = count_providers()
    rows = list_providers()
    alone = f"{counts['alone']}, {counts['alone, direct']} of them directly"
    failing = [f"- `{name}`: {why}" for name, why in FAILS.items()] or ["None."]
    differing = [
        f"- `{name}`: {how}" for name, how in sorted(providers.DIFFERS.items())
    ]
    return "\n".join(
        [
            f"LiteLLM {version('litellm')} has {counts['all']} providers of chat:",
            "",
            "| how | providers |",
            "| --- | --- |",
            f"| called directly | {counts['direct']} |",
            f"| called through `litellm.acompletion` | {counts['litellm']} |",
            f"| refused, with the reason below | {counts['refused']} |",
            f"| reached by the model string and the key's variable alone | {alone} |",
            "",
            "Direct providers that failed when they were tried:",
            "",
            *failing,
            "",
            "Requests that differ from those of `acompletion`:",
            "",
            *differing,
            "",
            providers.providers_table(rows).rstrip(),
        ]
    )


def test_the_counts() -> None:
    """At least a hundred are reached by their name and key, eighty of them directly.

    LiteLLM 1.105, the oldest that is supported, has fewer providers.
    """
    counts = count_providers()

    is_old = version("litellm").startswith("1.105.")
    assert counts["alone"] >= (95 if is_old else 100)
    assert counts["alone, direct"] >= 80
    assert counts["all"] == counts["direct"] + counts["litellm"] + counts["refused"]


def test_the_page_is_written() -> None:
    """What a user reads is what this LiteLLM knows."""
    published = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    if f"LiteLLM {version('litellm')} has" not in published:
        pytest.skip("the page was written with another LiteLLM")

    assert published == page(), "write it anew: python -m tests.test_direct_providers"


def main() -> None:
    """Write the generated part of the page."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{page()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
