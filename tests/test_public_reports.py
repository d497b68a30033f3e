"""Requests that users of these libraries reported as refused, in 2025 and 2026.

Each test is one report: what the caller writes, and what must be sent for it. The whole
range is generated in test_generated_requests and test_current_models; these are the
cases that people met.
"""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Generic, Literal, TypeVar

import pytest
from pydantic import BaseModel, Field, RootModel

from dipeo_llm import (
    ChatResult,
    InvalidRequestError,
    LLMInfraService,
    Settings,
    StaticAPIKeys,
    ToolConfig,
    ToolType,
)
from tests.provider_server import Answer, ProviderServer, Raw
from tests.sent_requests import HELLO, Requests, Sent, requests

SEARCH = ToolConfig(type=ToolType.WEB_SEARCH)


def weather(city: str, days: int = 1) -> str:
    """Tell the weather."""
    return f"{city} {days}"


@pytest.fixture
async def asking() -> AsyncIterator[Requests]:
    """Take what is sent to the providers themselves."""
    async with requests() as taken:
        yield taken


async def sent(asking: Requests, *args: Any, **options: Any) -> Sent:
    """Return a request that keeps the provider's rules."""
    found = await asking.of(*args, **options)
    assert isinstance(found, Sent), found
    assert found.wrong() == []
    return found


def tool_turn(arguments: Any) -> list[dict[str, Any]]:
    """Return a conversation with one tool call and its result."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "name": "weather",
            "content": "fair",
        },
    ]


# --- OpenAI: the endpoint and the body of Responses -----------------------------------


@pytest.mark.parametrize("effort", ["medium", None])
async def test_function_tools_with_reasoning_go_to_responses(
    asking: Requests, effort: Any
) -> None:
    """gpt-5.4 refuses them at /chat/completions, also without an explicit effort."""
    found = await sent(
        asking, "openai", "gpt-5.4", tools=[weather], reasoning_effort=effort
    )

    assert found.path == "/v1/responses"
    assert found.body["tools"][0]["strict"] is False


async def test_a_forced_tool_has_the_form_of_responses(asking: Requests) -> None:
    """The name stands beside the type there, not below "function"."""
    choice = {"type": "function", "function": {"name": "weather"}}

    found = await sent(asking, "openai", "gpt-5.4", tools=[weather], tool_choice=choice)

    assert found.body["tool_choice"] == {"type": "function", "name": "weather"}


async def test_a_system_prompt_in_parts_is_input_text(asking: Requests) -> None:
    """Responses has no parts of the type "text"."""
    prompt = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}

    found = await sent(asking, "openai", "gpt-5-pro", [prompt, *HELLO])

    first = found.body["input"][0]
    assert first["role"] == "developer"
    assert first["content"] == [{"type": "input_text", "text": "Be brief."}]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("gpt-5-pro", {}),
        ("gpt-5.1-codex", {}),
        ("gpt-5", {"tools": [SEARCH]}),
    ],
)
async def test_a_temperature_that_responses_refuses_is_left_out(
    asking: Requests, model: str, options: dict[str, Any]
) -> None:
    """These models take no temperature."""
    found = await sent(asking, "openai", model, temperature=0.5, **options)

    assert found.path == "/v1/responses"
    assert "temperature" not in found.body


@pytest.mark.parametrize(
    ("model", "effort"),
    [
        ("o3", "none"),
        ("o4-mini", "minimal"),
        ("gpt-5-pro", "low"),
        ("gpt-5-codex", "none"),
        ("gpt-5.3-chat-latest", "high"),
    ],
)
async def test_an_effort_that_a_model_does_not_know_is_left_out(
    asking: Requests, model: str, effort: str
) -> None:
    """Each series has its own levels."""
    found = await sent(asking, "openai", model, reasoning_effort=effort)

    assert "reasoning_effort" not in found.body
    assert "reasoning" not in found.body


async def test_a_search_preview_takes_no_temperature(asking: Requests) -> None:
    """OpenAI answers 400 to it."""
    found = await sent(asking, "openai", "gpt-4o-search-preview", temperature=0.5)

    assert "temperature" not in found.body


@pytest.mark.parametrize("model", ["gpt-4.1-mini", "claude-sonnet-4-5"])
async def test_max_tokens_are_lowered_to_the_models_limit(
    asking: Requests, model: str
) -> None:
    """DiPeO asks for 256,000; a whole float is an int."""
    provider = "openai" if model.startswith("gpt") else "anthropic"

    found = await sent(asking, provider, model, max_tokens=256000.0)

    assert type(found.body["max_tokens"]) is int
    assert found.body["max_tokens"] < 256_000


# --- Claude ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "claude-opus-4-6"])
async def test_an_effort_gives_way_to_a_forced_tool(
    asking: Requests, model: str
) -> None:
    """Thinking and a forced tool are a 400 together."""
    found = await sent(
        asking,
        *("anthropic", model),
        tools=[weather],
        tool_choice="required",
        reasoning_effort="high",
    )

    assert found.body["tool_choice"]["type"] == "any"
    assert "thinking" not in found.body
    assert "effort" not in found.body.get("output_config", {})


async def test_adaptive_thinking_needs_no_budget(asking: Requests) -> None:
    """A small max_tokens drops the effort of the older models only."""
    found = await sent(
        asking, "anthropic", "claude-opus-4-7", max_tokens=500, reasoning_effort="low"
    )

    assert found.body["output_config"]["effort"] == "low"
    assert found.body["max_tokens"] == 500


class Node(BaseModel):
    """Refers to itself."""

    name: str
    children: list["Node"] = []


async def test_a_recursive_class_goes_through_a_tool(asking: Requests) -> None:
    """Structured output takes no recursive schema."""
    found = await sent(asking, "anthropic", "claude-sonnet-4-5", response_format=Node)

    schema = found.body["tools"][0]["input_schema"]
    assert found.body["tool_choice"] == {"type": "tool", "name": "json_tool_call"}
    assert "Node" in schema["$defs"]


# --- Gemini ---------------------------------------------------------------------------


class Cat(BaseModel):
    """One of two."""

    kind: Literal["cat"]


class Dog(BaseModel):
    """The other."""

    kind: Literal["dog"]


def _literal(speed: Literal["fast"]) -> None: ...
def _union(pet: Annotated[Cat | Dog, Field(discriminator="kind")]) -> None: ...
def _tuple(place: tuple[int, int]) -> None: ...
def _anything(value: Any) -> None: ...
def _named(strict: bool) -> None: ...


@pytest.mark.parametrize("function", [_literal, _union, _tuple, _anything, _named])
async def test_a_schema_reaches_gemini_whole(asking: Requests, function: Any) -> None:
    """LiteLLM's own schemas lose literals, unions, tuples and some names."""
    found = await sent(asking, "google", "gemini-2.5-flash", tools=[function])

    (tool,) = found.body["tools"]
    (declared,) = tool["function_declarations"]
    assert "parameters" not in declared
    schema = declared["parametersJsonSchema"]
    assert set(schema["properties"]) == set(function.__annotations__) - {"return"}
    if function is _literal:
        assert schema["properties"]["speed"]["enum"] == ["fast"]
    if function is _tuple:
        assert len(schema["properties"]["place"]["prefixItems"]) == 2


async def test_pro_that_always_thinks_gets_the_smallest_budget(
    asking: Requests,
) -> None:
    """Gemini 2.5 Pro refuses a budget of 0."""
    found = await sent(asking, "google", "gemini-2.5-pro", reasoning_effort="none")

    thinking = found.body["generationConfig"]["thinkingConfig"]
    assert thinking["thinkingBudget"] >= 128


async def test_a_search_beside_a_function(asking: Requests) -> None:
    """Gemini 3 takes both; an older model's caller is told."""
    both: dict[str, Any] = {"tools": [weather, SEARCH]}

    found = await sent(asking, "google", "gemini-3.1-pro-preview", **both)
    refused = await asking.of("google", "gemini-2.5-flash", **both)

    kinds = [kind for tool in found.body["tools"] for kind in tool]
    assert kinds == ["function_declarations", "googleSearch"]
    assert found.body["toolConfig"]["includeServerSideToolInvocations"] is True
    assert isinstance(refused, InvalidRequestError)


# --- Ollama ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "effort"), [("qwen3-coder", "low"), ("gpt-oss:20b", "none")]
)
async def test_think_is_left_out_where_it_is_refused(
    asking: Requests, model: str, effort: str
) -> None:
    """qwen3-coder does not think, and gpt-oss cannot stop."""
    found = await sent(asking, "ollama", model, reasoning_effort=effort)

    assert "think" not in found.body


# --- Structured output ----------------------------------------------------------------


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """A generic class, whose name has brackets."""

    items: list[T]


class Names(RootModel[list[str]]):
    """Its root is not an object."""


@pytest.mark.parametrize(
    "asked", [Page[int], Names, list[int], dict[str, int], int, tuple[int, str]]
)
async def test_a_form_that_openai_enforces_or_is_not_asked_to(
    asking: Requests, asked: Any
) -> None:
    """Names are cleaned, roots wrapped, and open types are not strict."""
    found = await sent(asking, "openai", "gpt-4.1-mini", response_format=asked)

    form = found.body["response_format"]["json_schema"]
    assert form["schema"]["type"] == "object"
    assert form["strict"] is (asked not in (dict[str, int], tuple[int, str]))


@pytest.mark.parametrize(
    "text", ["```json\n[1, 2]\n```", "\ufeff[1, 2]", '{"value": [1, 2]}']
)
async def test_an_answer_in_a_fence_is_read(
    service: LLMInfraService, server: ProviderServer, text: str
) -> None:
    """Models wrap JSON in one fenced block, or put a byte order mark first."""
    server.reply(Answer(text))

    result = await service.complete(
        HELLO, "gpt-4.1-mini", "openai", response_format=list[int]
    )

    assert result.parsed == [1, 2]


# --- Conversations --------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", " ", None, {}])
@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4.1-mini"),
        ("anthropic", "claude-sonnet-4-5"),
        ("google", "gemini-2.5-flash"),
        ("ollama", "qwen3:4b"),
    ],
)
async def test_a_call_without_arguments_goes_back_as_an_object(
    asking: Requests, provider: str, model: str, given: Any
) -> None:
    """An empty text makes vLLM fail, and Gemini gets invented arguments for it."""
    found = await sent(asking, provider, model, tool_turn(given))

    said = json.dumps(found.body)
    empty = {
        "openai": '"arguments": "{}"',
        "anthropic": '"input": {}',
        "google": '"args": {}',
        "ollama": '"arguments": {}',
    }
    assert empty[provider] in said


@pytest.mark.parametrize("provider", ["openai", "anthropic", "google", "ollama"])
async def test_arguments_that_were_cut_are_refused(
    asking: Requests, provider: str
) -> None:
    """One error for all providers, before anything is sent."""
    models = {
        "openai": "gpt-4.1-mini",
        "anthropic": "claude-sonnet-4-5",
        "google": "gemini-2.5-flash",
        "ollama": "qwen3:4b",
    }

    found = await asking.of(provider, models[provider], tool_turn('{"city": "Bo'))

    assert isinstance(found, InvalidRequestError)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["fs.read", "größe", "a/b", "x" * 80])
@pytest.mark.parametrize("provider", ["openai", "anthropic", "google", "ollama"])
async def test_a_tools_name_comes_back_as_the_caller_wrote_it(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    name: str,
    stream: bool,
) -> None:
    """A name that a provider refuses is sent as another one."""
    models = {
        "openai": "gpt-4.1-mini",
        "anthropic": "claude-sonnet-4-5",
        "google": "gemini-2.5-flash",
        "ollama": "qwen3:4b",
    }
    tools = [
        {
            "type": "function",
            "function": {"name": each, "parameters": {"type": "object"}},
        }
        for each in (name, name.replace(".", "_").replace("/", "_"))
    ][: 1 + ("." in name or "/" in name)]
    names: list[str] = []

    def reply(sent: Any) -> Answer:
        found = json.dumps(sent.json)
        names.append(found)
        wanted = _first_name(sent.json)
        return Answer(tool_calls=[(wanted, {})])

    server.default = reply

    if stream:
        async with service.stream(HELLO, models[provider], provider, tools=tools) as s:
            chunks = [chunk async for chunk in s]
        result: ChatResult = await s.result()
        told = [c.tool_call.name for c in chunks if c.tool_call and c.tool_call.name]
        assert told == [name]
    else:
        result = await service.complete(HELLO, models[provider], provider, tools=tools)

    assert [call.name for call in result.tool_calls] == [name]


def _first_name(body: Any) -> str:
    tool = body["tools"][0]
    if "function_declarations" in tool:
        tool = tool["function_declarations"][0]
    name: str = (tool.get("function") or tool)["name"]
    return name


async def test_reasoning_goes_back_with_a_tool_turn(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """DeepSeek and Kimi answer 400 without it; OpenAI itself never gets it."""
    result = ChatResult(reasoning="Hm.", tool_calls=[], text="")
    messages = tool_turn("{}")
    messages[1]["reasoning_content"] = result.reasoning
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        await service.complete(messages, "deepseek-chat", "openai", service="openai")
    async with requests() as asking:
        found = await asking.of("openai", "gpt-5-mini", messages)

    assert server.requests[0].json["messages"][1]["reasoning_content"] == "Hm."
    assert isinstance(found, Sent)
    assert "reasoning_content" not in found.body["messages"][1]


async def test_a_thought_signature_behind_openais_format(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Gemini 3 wants it back where it was: in `extra_content`."""
    extra = {"google": {"thought_signature": "c2ln"}}
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
        "extra_content": extra,
    }
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    body = {"id": "x", "model": "gemini-3-pro", "choices": [choice]}
    server.reply(
        Raw(200, {"content-type": "application/json"}, json.dumps(body).encode())
    )

    first = await service.complete(
        HELLO, "my-gemini", "openai", tools=[weather], service="openai"
    )
    again = [*HELLO, *first.to_messages(), first.tool_calls[0].to_message("fair")]
    await service.complete(again, "my-gemini", "openai", service="openai")

    assert first.tool_calls[0].thought_signature == "c2ln"
    assert (
        server.requests[1].json["messages"][1]["tool_calls"][0]["extra_content"]
        == extra
    )


async def test_the_form_that_tool_calls_replaced(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """An old `function_call` is a tool call."""
    message = {"content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    choice = {"index": 0, "message": message, "finish_reason": "function_call"}
    body = {"id": "x", "model": "m", "choices": [choice]}
    server.reply(
        Raw(200, {"content-type": "application/json"}, json.dumps(body).encode())
    )

    result = await service.complete(HELLO, "gpt-4.1-mini", "openai", tools=[weather])

    assert result.finish_reason == "tool_calls"
    assert [call.name for call in result.tool_calls] == ["weather"]


async def test_mistrals_thinking_parts_are_reasoning(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """They stand in the content, before the text."""
    content = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": "Hi"},
    ]
    choice = {"index": 0, "message": {"content": content}, "finish_reason": "stop"}
    body = {"id": "x", "model": "magistral", "choices": [choice]}
    server.reply(
        Raw(200, {"content-type": "application/json"}, json.dumps(body).encode())
    )

    result = await service.complete(HELLO, "magistral", "openai", service="openai")

    assert (result.text, result.reasoning) == ("Hi", "Hm.")


async def test_a_turn_that_paused_goes_on(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Anthropic's pause_turn is not the end, and its blocks go back as they came."""
    blocks = [
        {"type": "text", "text": "Let me look."},
        {
            "type": "server_tool_use",
            "id": "srvtoolu_1",
            "name": "web_search",
            "input": {},
        },
    ]
    body = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-4-6",
        "content": blocks,
        "stop_reason": "pause_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    server.reply(
        Raw(200, {"content-type": "application/json"}, json.dumps(body).encode())
    )

    paused = await service.complete(
        HELLO, "claude-opus-4-6", "anthropic", tools=[SEARCH]
    )
    await service.complete(
        [*HELLO, *paused.to_messages()], "claude-opus-4-6", "anthropic", tools=[SEARCH]
    )

    assert paused.finish_reason == "pause"
    assert server.requests[1].json["messages"][-1]["content"] == blocks


async def test_litellms_engine_keeps_inside_the_fence(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """A Responses request goes direct: LiteLLM would send it with a client of its own."""
    async with LLMInfraService(keys, settings=Settings(engine="litellm")) as service:
        result = await service.complete(
            HELLO, "gpt-5.4", "openai", tools=[weather], reasoning_effort="medium"
        )

    assert result.text == "Hello from the loopback."
    assert server.requests[0].path == "/v1/responses"
