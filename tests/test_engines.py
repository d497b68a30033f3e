"""The direct engine sends the request that `litellm.acompletion` sends.

So a LiteLLM that translates in another place than the direct engine asks is found out.
"""

import base64
import copy
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    LLMInfraService,
    ToolConfig,
)
from tests.conftest import HELLO, MODELS, PROVIDERS, Open
from tests.provider_server import (
    Answer,
    ProviderServer,
    Received,
)

REASONING_MODELS = MODELS | {"openai": "gpt-5-mini"}


class Person(BaseModel):
    """Who."""

    name: str
    age: int | None = None


class Team(BaseModel):
    """Whose."""

    title: str
    people: list[Person]


def weather(city: str, days: int = 1) -> str:
    """Tell the weather of a city."""
    return f"{city} {days}"


CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tell the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
            "required": ["zone"],
        },
    },
}
CALLS: list[tuple[str, Any]] = [
    ("weather", {"city": "Bonn", "days": 2}),
    ("clock", {"zone": "UTC"}),
]
PNG = (
    "data:image/png;base64,"
    + base64.b64encode(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
            "1f15c4890000000d49444154789c6360606060000000050001a5f64540"
            "0000000049454e44ae426082"
        )
    ).decode()
)
SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": PNG}},
        ],
    }
]
TOOL_TURN: list[dict[str, Any]] = [
    {"role": "system", "content": "Use the tools."},
    {"role": "user", "content": "How is Bonn, and when?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(given)},
            }
            for i, (name, given) in enumerate(CALLS)
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "name": "weather", "content": "fair"},
    {
        "role": "tool",
        "tool_call_id": "call_1",
        "name": "clock",
        "content": '{"hour": 12}',
    },
    {"role": "user", "content": "And in a word?"},
]
CACHED = [
    {
        "role": "system",
        "content": [
            {
                "type": "text",
                "text": "A long prompt.",
                "cache_control": {"type": "ephemeral"},
            }
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Hi.", "cache_control": {"type": "ephemeral"}}
        ],
    },
]
MANY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One."},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three."},
    {"role": "user", "content": "Four."},
    {"role": "assistant", "content": ""},
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": "Five."},
]


@dataclass
class Scenario:
    """What is asked, and what the model says to it."""

    messages: list[dict[str, Any]] = field(default_factory=lambda: HELLO)
    options: dict[str, Any] = field(default_factory=dict)
    answer: Answer = field(default_factory=Answer)
    models: dict[str, str] = field(default_factory=lambda: MODELS)
    only: tuple[str, ...] = PROVIDERS


SCENARIOS: dict[str, Scenario] = {
    "plain": Scenario(),
    "a system prompt": Scenario([{"role": "system", "content": "Be brief."}, *HELLO]),
    "many turns": Scenario(MANY),
    "the assistant first": Scenario([{"role": "assistant", "content": "Yes?"}, *HELLO]),
    "parts": Scenario(
        [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    ),
    "unicode": Scenario(
        [{"role": "user", "content": "Grüße 😀 \u202e\u2028\x00 «ß» \u0000"}],
        answer=Answer("Schöne Grüße 😀\n\t«ß» \u2028"),
    ),
    "long": Scenario(
        [{"role": "user", "content": "word " * 40_000}],
        answer=Answer("".join(f"word{i} " for i in range(2_000)), pieces=500),
    ),
    "sampling": Scenario(
        options={"temperature": 0.3, "max_tokens": 50, "stop": ["END"], "seed": 7}
    ),
    "top_p": Scenario(options={"top_p": 0.9, "stop": "END"}),
    "two choices": Scenario(options={"n": 2}, answer=Answer("one", n_texts=["two"])),
    "cut": Scenario(
        options={"max_tokens": 3}, answer=Answer("cut sho", finish="length")
    ),
    "tools": Scenario(
        options={"tools": [weather, CLOCK]}, answer=Answer(tool_calls=CALLS[:1])
    ),
    "parallel tools": Scenario(
        options={"tools": [weather, CLOCK], "tool_choice": "auto"},
        answer=Answer("Both.", tool_calls=CALLS),
    ),
    "a tool that must": Scenario(
        options={
            "tools": [weather, CLOCK],
            "tool_choice": {"type": "function", "function": {"name": "clock"}},
        },
        answer=Answer(tool_calls=CALLS[1:]),
    ),
    "some tool": Scenario(
        options={"tools": [CLOCK], "tool_choice": "required"},
        answer=Answer(tool_calls=CALLS[1:]),
    ),
    "no tool": Scenario(options={"tools": [CLOCK], "tool_choice": "none"}),
    "a tool's turn": Scenario(TOOL_TURN, {"tools": [weather, CLOCK]}),
    "a class": Scenario(
        options={"response_format": Team},
        answer=Answer('{"title": "A", "people": [{"name": "B", "age": null}]}'),
    ),
    "a schema": Scenario(
        options={"response_format": Person.model_json_schema()},
        answer=Answer('{"name": "B"}'),
    ),
    "some JSON": Scenario(
        [{"role": "user", "content": "Write JSON."}],
        options={"response_format": {"type": "json_object"}},
        answer=Answer('{"name": "B"}'),
    ),
    "a class beside tools": Scenario(
        options={"response_format": Person, "tools": [CLOCK]},
        answer=Answer('{"name": "B", "age": 3}'),
        models=MODELS | {"google": "gemini-3-pro-preview"},
    ),
    "a class for an older Claude": Scenario(
        options={"response_format": Person},
        answer=Answer('{"name": "B", "age": 3}'),
        models={"anthropic": "claude-3-haiku-20240307"},
        only=("anthropic",),
    ),
    "effort": Scenario(
        options={"reasoning_effort": "low", "max_tokens": 4000},
        answer=Answer("Four.", reasoning="Two and two.", reasoning_tokens=3),
        models=REASONING_MODELS,
    ),
    "effort and tools": Scenario(
        options={"reasoning_effort": "medium", "tools": [CLOCK]},
        answer=Answer("Now.", reasoning="Which zone?", tool_calls=CALLS[1:]),
        models=REASONING_MODELS,
    ),
    "a picture": Scenario(SEEN),
    "caching": Scenario(CACHED, answer=Answer(cached_tokens=4, cache_write_tokens=2)),
    "more in the body": Scenario(
        options={"extra_body": {"model": "other-model"}, "max_tokens": 5},
    ),
    "the same again": Scenario(answer=Answer("--- " * 300, pieces=300)),
    "a web search": Scenario(
        options={"tools": [ToolConfig(type="web_search")]},
        answer=Answer("Rain.", citations=[("https://a.example/", "A")]),
        models=MODELS | {"openai": "gpt-4.1-mini"},
        only=("openai", "anthropic", "google"),
    ),
}
CASES = [(name, p) for name, s in SCENARIOS.items() for p in s.only]


async def send(
    service: LLMInfraService, name: str, provider: str, stream: bool
) -> None:
    """Play a scenario through one engine."""
    scenario = SCENARIOS[name]
    asked = (copy.deepcopy(scenario.messages), scenario.models[provider], provider)
    if stream:
        async with service.stream(*asked, **scenario.options) as opened:
            await opened.result()
    else:
        await service.complete(*asked, **scenario.options)


@pytest.mark.parametrize("stream", [False, True], ids=["complete", "stream"])
@pytest.mark.parametrize(("name", "provider"), CASES)
async def test_same_request(
    name: str, provider: str, stream: bool, server: ProviderServer, opened: Open
) -> None:
    """The two engines put the same request on the wire."""
    server.rules = False  # "json_object" without the word
    server.default = SCENARIOS[name].answer
    for engine in ("direct", "litellm"):
        async with opened(engine=engine, max_retries=0) as service:
            await send(service, name, provider, stream)

    direct, litellm = server.requests
    assert words(direct) == words(litellm)
    assert direct.path == litellm.path
    assert direct.query == litellm.query
    assert same_headers(direct) == same_headers(litellm)


def words(request: Received) -> Any:
    """Return what was sent, without what only the direct engine writes.

    Ollama pairs a tool's result with its call by `tool_name` and by the call's `id`;
    LiteLLM has no place for the name, nor has 1.105 for the id. Gemini gets schemas as
    JSON schemas; LiteLLM rewrites them to a subset of OpenAPI's.
    """
    body = copy.deepcopy(request.json)
    if request.provider == "ollama":
        for message in body["messages"]:
            message.pop("tool_name", None)
            for call in message.get("tool_calls", ()):
                call.pop("id", None)
    if request.provider == "google":
        for tool in body.get("tools", ()):
            for function in tool.get("function_declarations", ()):
                for name in ("parameters", "parametersJsonSchema"):
                    function.pop(name, None)
        for name in ("responseJsonSchema", "response_json_schema", "response_schema"):
            body.get("generationConfig", {}).pop(name, None)
    return body


def same_headers(request: Received) -> dict[str, str]:
    """A request's headers without what LiteLLM says in passing.

    Its JSON has spaces in it, which makes it longer, and where it leaves the headers to
    its HTTP client, that accepts anything.
    """
    left_out = {"content-length"}
    if request.provider in {"google", "ollama"}:
        left_out.add("accept")
    return {k: v for k, v in request.headers.items() if k not in left_out}


async def test_what_only_the_direct_engine_says(
    server: ProviderServer, direct: LLMInfraService
) -> None:
    """The direct engine tells Ollama the name and the id of the call of a result."""
    await send(direct, "a tool's turn", "ollama", stream=False)

    messages = server.requests[-1].json["messages"]
    assert [m.get("tool_name") for m in messages if m["role"] == "tool"] == [
        "weather",
        "clock",
    ]
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["call_0", "call_1"]
