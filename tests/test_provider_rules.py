"""The rules of the providers: real requests pass, and each rule refuses its own.

The rules are the oracle of other tests, so they are checked against what the providers
themselves answered: every recorded request that got a 200 has no violation, and every
one that was refused for its form has one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.provider_rules import losses_of, violations_of
from tests.provider_rules.openai_models import series

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "recordings"
JSON = {"content-type": "application/json"}
HEADERS = {
    "openai": {**JSON, "authorization": "Bearer sk-test"},
    "anthropic": {**JSON, "x-api-key": "sk-test", "anthropic-version": "2023-06-01"},
    "google": {**JSON, "x-goog-api-key": "sk-test"},
    "ollama": JSON,
}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES, OLLAMA = "/v1/messages", "/api/chat"


def provider_of(path: str) -> str | None:
    """Return whose API a path belongs to; None where no rules are written for it."""
    route = path.partition("?")[0]
    if route.endswith((CHAT, RESPONSES)):
        return "openai"
    if MESSAGES in route:
        return "anthropic"
    if route == OLLAMA:
        return "ollama"
    return "google" if route.startswith("/v1beta/models/") and ":" in route else None


def recorded() -> Iterator[Any]:
    """Yield every recorded request that has rules, as a parameter."""
    for file in sorted(FOLDER.glob("*/*.json")):
        exchange = json.loads(file.read_text("utf-8"))
        path = "/" + exchange["request"]["url"].split("/", 3)[3]
        if exchange["request"]["method"] == "POST" and provider_of(path):
            yield pytest.param(exchange, path, id=f"{file.parent.name}/{file.stem}")


# Refused for what only the provider can know: the key, the account, the length of the
# prompt, what it stores, the names of its models.
UNFORESEEN = ("API key", "too long", "context window", "not found", "does not exist")

needs_recordings = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the recordings are not beside this copy of the project"
)


@needs_recordings
@pytest.mark.parametrize(("exchange", "path"), [*recorded()])
def test_a_real_request_is_judged_as_the_provider_judged_it(
    exchange: dict[str, Any], path: str
) -> None:
    """What got a 200 passes; what got a 400 for its form does not."""
    provider = provider_of(path)
    assert provider
    answered = exchange["response"]
    headers = {**JSON, **exchange["request"]["headers"], **HEADERS[provider]}

    found = violations_of(provider, "POST", path, headers, exchange["request"]["body"])

    if answered["status"] == 200:
        assert found == []
    elif answered["status"] in (400, 422):
        text = answered["body"].lower()
        foreseen = not any(words.lower() in text for words in UNFORESEEN)
        assert bool(found) is foreseen, (found, answered["body"])


# --- One bad body for each rule --------------------------------------------------------

Body = dict[str, Any]
USER: Body = {"role": "user", "content": "Hello"}
OBJECT: Body = {"type": "object", "properties": {"a": {"type": "string"}}}
STRICT: Body = {**OBJECT, "required": ["a"], "additionalProperties": False}


def chat(model: str = "gpt-4.1", **fields: Any) -> Body:
    """Return a good body for chat completions with some fields of its own."""
    return {"model": model, "messages": [USER], **fields}


def responses(model: str = "gpt-4.1", **fields: Any) -> Body:
    """Return a good body for the Responses endpoint."""
    return {"model": model, "input": [USER], **fields}


def claude(model: str = "claude-sonnet-4-5", **fields: Any) -> Body:
    """Return a good body for Anthropic."""
    return {"model": model, "max_tokens": 100, "messages": [USER], **fields}


def gemini(**fields: Any) -> Body:
    """Return a good body for Gemini."""
    return {"contents": [{"role": "user", "parts": [{"text": "Hello"}]}], **fields}


def ollama(model: str = "qwen3", **fields: Any) -> Body:
    """Return a good body for Ollama."""
    return {"model": model, "messages": [USER], **fields}


def tool(name: str = "f", parameters: Any = OBJECT, **more: Any) -> Body:
    """Return a function tool in the form of chat completions."""
    function = {"name": name, "parameters": parameters, **more}
    return {"type": "function", "function": function}


def flat(name: str = "f", parameters: Any = OBJECT, **more: Any) -> Body:
    """Return a function tool in the form of the Responses endpoint."""
    more = {"strict": False, **more}
    return {"type": "function", "name": name, "parameters": parameters, **more}


def own_tool(name: str = "f", schema: Any = OBJECT, **more: Any) -> Body:
    """Return a tool in Anthropic's form."""
    return {"name": name, "input_schema": schema, **more}


def declared(**declaration: Any) -> list[Body]:
    """Return Gemini's tools with one function."""
    return [{"functionDeclarations": [{"name": "f", **declaration}]}]


def as_schema(schema: Any, *, name: str = "x", strict: bool = True) -> Body:
    """Return a response format of chat completions."""
    inner = {"name": name, "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": inner}


def having(node: Any) -> Body:
    """Return a strict schema with one property."""
    return {
        "type": "object",
        "properties": {"a": node},
        "required": ["a"],
        "additionalProperties": False,
    }


def calls(arguments: Any = "{}", name: str = "f", ref: str = "c1") -> Body:
    """Return an assistant's message with a call, in the form of chat completions."""
    function = {"name": name, "arguments": arguments}
    call = {"id": ref, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def uses(given: Any, ref: str = "t1") -> Body:
    """Return an assistant's message with a call, in Anthropic's form."""
    block = {"type": "tool_use", "id": ref, "name": "f", "input": given}
    return {"role": "assistant", "content": [block]}


def result(ref: str = "t1") -> Body:
    """Return a tool's result in Anthropic's form."""
    block = {"type": "tool_result", "tool_use_id": ref, "content": "ok"}
    return {"role": "user", "content": [block]}


def turn(*, signed: bool) -> list[Body]:
    """Return the contents of a tool's turn for Gemini."""
    call: Body = {"functionCall": {"name": "f", "args": {}}}
    if signed:
        call["thoughtSignature"] = "c2lnbmVk"
    answer = {"functionResponse": {"name": "f", "response": {"ok": True}}}
    return [
        {"role": "user", "parts": [{"text": "Hello"}]},
        {"role": "model", "parts": [call]},
        {"role": "user", "parts": [answer]},
    ]


def thinking(**config: Any) -> Body:
    """Return a generation config that thinks."""
    return {"generationConfig": {"thinkingConfig": config}}


SEARCH: Body = {"googleSearch": {}}
FLASH, PRO = "gemini-2.5-flash", "gemini-2.5-pro"
TOOLED = {"reasoning_effort": "medium", "tools": [tool()]}
ENABLED = {"type": "enabled", "budget_tokens": 1024}
FORCED = {"type": "tool", "name": "f"}
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "ok"}

# The beginning of the sentence, and a body that is refused for it.
BAD_CHAT: list[tuple[str, Body]] = [
    ("model", {"messages": [USER]}),
    ("messages", {"model": "gpt-4.1"}),
    ("messages", chat(messages=[])),
    ("foo", chat(foo=1)),
    ("top_k", chat(top_k=5)),
    ("max_tokens", chat(max_tokens=100.0)),
    ("max_tokens", chat(max_tokens=0)),
    ("max_tokens", chat(max_tokens=256_000)),
    ("max_tokens", chat(max_tokens=5, max_completion_tokens=5)),
    ("max_tokens", chat("gpt-5-mini", max_tokens=5)),
    ("temperature", chat(temperature=3)),
    ("temperature", chat("o3", temperature=0.5)),
    ("temperature", chat("gpt-5.4", temperature=0.5, reasoning_effort="low")),
    ("temperature", chat("gpt-6-sol", temperature=0.5)),
    ("temperature", chat("gpt-4o-search-preview", temperature=0.5)),
    ("top_p", chat("gpt-5", top_p=0.5)),
    ("logprobs", chat("o4-mini", logprobs=True)),
    ("top_logprobs", chat(top_logprobs=3)),
    ("stop", chat("gpt-5-mini", stop=["x"])),
    ("stop", chat("o3", stop="x")),
    ("stop", chat(stop=["a", "b", "c", "d", "e"])),
    ("n", chat(n=0)),
    ("stream_options", chat(stream_options={"include_usage": True})),
    ("parallel_tool_calls", chat("o3", parallel_tool_calls=True, tools=[tool()])),
    ("tool_choice", chat(tool_choice="auto")),
    (
        "tool_choice.function",
        chat(tools=[tool()], tool_choice={"type": "function", "name": "f"}),
    ),
    (
        "tool_choice",
        chat(
            tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}
        ),
    ),
    ("tool_choice", chat(tools=[tool()], tool_choice="any")),
    ("reasoning_effort", chat(reasoning_effort="low")),
    ("reasoning_effort", chat("o3", reasoning_effort="minimal")),
    ("reasoning_effort", chat("gpt-5", reasoning_effort="none")),
    ("reasoning_effort", chat("gpt-5.1", reasoning_effort="minimal")),
    ("reasoning_effort", chat("gpt-6-astra", reasoning_effort="none")),
    ("reasoning_effort", chat("gpt-6.1-sol", reasoning_effort="max")),
    ("reasoning_effort", chat("chat-latest", reasoning_effort="high")),
    ("path", chat("gpt-5-pro")),
    ("path", chat("gpt-5.1-codex-max")),
    ("path", chat("o3-pro-2025-06-10")),
    ("path", chat("o4-mini-deep-research")),
    ("tools", chat("gpt-5.4", **TOOLED)),
    ("tools", chat("gpt-5.6-terra", tools=[tool()])),
    ("tools", chat("gpt-6-luna", tools=[tool()])),
    ("tools", chat("gpt-4o-search-preview", tools=[tool()])),
    ("web_search_options", chat(web_search_options={})),
    ("modalities", chat("gpt-audio")),
    ("tools[0].type", chat(tools=[{"type": "web_search"}])),
    ("tools[0].function.name", chat(tools=[tool("fs.read")])),
    ("tools[0].function.name", chat(tools=[tool("f" * 65)])),
    ("tools[0].function.description", chat(tools=[tool(description="x" * 1025)])),
    ("tools[0].function.parameters", chat(tools=[tool(parameters={"type": "array"})])),
    (
        "tools[0].function.parameters.anyOf",
        chat(tools=[tool(parameters={**OBJECT, "anyOf": [OBJECT]})]),
    ),
    (
        "tools[0].function.parameters.properties.a",
        chat(
            tools=[tool(parameters={**OBJECT, "properties": {"a": {"type": "array"}}})]
        ),
    ),
    (
        "tools[0].function.parameters.properties.a.$ref",
        chat(
            tools=[
                tool(parameters={**OBJECT, "properties": {"a": {"$ref": "#/$defs/A"}}})
            ]
        ),
    ),
    ("tools[0].function.parameters.required", chat(tools=[tool(strict=True)])),
    ("messages[0].role", chat(messages=[{"role": "critic", "content": "x"}])),
    ("messages[0].content", chat(messages=[{"role": "user", "content": None}])),
    ("messages[0].content", chat(messages=[{"role": "user", "content": []}])),
    (
        "messages[0].content[0].type",
        chat(messages=[{"role": "user", "content": [{"text": "x"}]}]),
    ),
    (
        "messages[0].content[0].type",
        chat(
            messages=[
                {"role": "system", "content": [{"type": "image_url", "image_url": {}}]}
            ]
        ),
    ),
    ("messages[0].foo", chat(messages=[{**USER, "foo": 1}])),
    ("messages[0].tool_call_id", chat(messages=[ANSWER])),
    ("messages", chat(messages=[USER, calls()])),
    ("messages[2]", chat(messages=[USER, calls(), USER])),
    (
        "messages[1].tool_calls[0].function.arguments",
        chat(messages=[USER, calls(""), ANSWER]),
    ),
    (
        "messages[1].tool_calls[0].function.arguments",
        chat(messages=[USER, calls('{"a": '), ANSWER]),
    ),
    (
        "messages[1].tool_calls[0].function.name",
        chat(messages=[USER, calls(name="fs.read"), ANSWER]),
    ),
    (
        "response_format.json_schema.name",
        chat(response_format=as_schema(STRICT, name="Page[River]")),
    ),
    (
        "response_format.json_schema.name",
        chat(response_format=as_schema(STRICT, name="ß")),
    ),
    (
        "response_format.json_schema.schema",
        chat(response_format=as_schema({"type": "array"})),
    ),
    (
        "response_format.json_schema.schema.anyOf",
        chat(response_format=as_schema({"anyOf": [STRICT]})),
    ),
    (
        "response_format.json_schema.schema.additionalProperties",
        chat(response_format=as_schema(OBJECT)),
    ),
    (
        "response_format.json_schema.schema.properties.a",
        chat(response_format=as_schema(having({}))),
    ),
    (
        "response_format.json_schema.schema.properties.a.additionalProperties",
        chat(
            response_format=as_schema(
                having({"type": "object", "additionalProperties": {"type": "string"}})
            )
        ),
    ),
    (
        "response_format.json_schema.schema.properties.a.prefixItems",
        chat(
            response_format=as_schema(
                having({"type": "array", "prefixItems": [{"type": "string"}]})
            )
        ),
    ),
    (
        "response_format.json_schema.schema.properties.a.pattern",
        chat(
            response_format=as_schema(having({"type": "string", "pattern": "^(?!x)"}))
        ),
    ),
    (
        "response_format.json_schema.schema.properties.a.format",
        chat(response_format=as_schema(having({"type": "string", "format": "uri"}))),
    ),
    (
        "response_format.json_schema.schema.properties.a.default",
        chat(response_format=as_schema(having({"type": "string", "default": "x"}))),
    ),
    (
        "response_format.json_schema.schema.properties.a.$ref",
        chat(
            response_format=as_schema(
                {
                    **having({"$ref": "#/$defs/A", "description": "x"}),
                    "$defs": {"A": STRICT},
                }
            )
        ),
    ),
    (
        "response_format.json_schema",
        chat("gpt-4-turbo", response_format=as_schema(STRICT)),
    ),
    ("messages", chat(response_format={"type": "json_object"})),
]
BAD_RESPONSES: list[tuple[str, Body]] = [
    ("input", {"model": "gpt-4.1"}),
    ("model", {"input": "x"}),
    ("messages", responses(messages=[USER])),
    ("stop", responses(stop="x")),
    ("max_tokens", responses(max_tokens=100)),
    ("max_output_tokens", responses(max_output_tokens=5)),
    ("max_output_tokens", responses(max_output_tokens=256_000)),
    ("temperature", responses("gpt-5-pro", temperature=0.5)),
    ("temperature", responses("gpt-5.1-codex", temperature=0.5)),
    (
        "temperature",
        responses("gpt-5", temperature=0.5, tools=[{"type": "web_search"}]),
    ),
    ("reasoning_effort", responses("o3", reasoning_effort="low")),
    ("reasoning.effort", responses("gpt-5-pro", reasoning={"effort": "low"})),
    ("reasoning.effort", responses("gpt-5.2-codex", reasoning={"effort": "none"})),
    ("reasoning.effort", responses("o4-mini", reasoning={"effort": "minimal"})),
    ("reasoning.effort", responses("gpt-4.1", reasoning={"effort": "low"})),
    ("tools", responses("gpt-4.1-nano", tools=[{"type": "web_search"}])),
    ("tools", responses("o3-deep-research")),
    ("truncation", responses("computer-use-preview")),
    ("tools[0].function", responses(tools=[tool()])),
    ("tools[0].name", responses(tools=[flat("fs.read")])),
    ("tools[0].type", responses(tools=[{"type": "search the web"}])),
    (
        "tool_choice.name",
        responses(
            tools=[flat()], tool_choice={"type": "function", "function": {"name": "f"}}
        ),
    ),
    (
        "tool_choice",
        responses(tools=[flat()], tool_choice={"type": "function", "name": "g"}),
    ),
    ("tool_choice", responses(tool_choice="required")),
    (
        "input[0].content[0].type",
        responses(
            input=[{"role": "developer", "content": [{"type": "text", "text": "x"}]}]
        ),
    ),
    (
        "input[0].content[0].type",
        responses(
            input=[{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
        ),
    ),
    ("input[0].role", responses(input=[{"role": "tool", "content": "x"}])),
    (
        "input[0].call_id",
        responses(
            input=[{"type": "function_call_output", "call_id": "c", "output": "x"}]
        ),
    ),
    (
        "input",
        responses(
            input=[
                {
                    "type": "function_call",
                    "call_id": "c",
                    "name": "f",
                    "arguments": "{}",
                }
            ]
        ),
    ),
    (
        "input[0].arguments",
        responses(
            input=[
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            ]
        ),
    ),
    ("text.format.json_schema", responses(text={"format": as_schema(STRICT)})),
    (
        "text.format.schema",
        responses(
            text={
                "format": {
                    "type": "json_schema",
                    "name": "x",
                    "schema": {"type": "string"},
                }
            }
        ),
    ),
]
BAD_CLAUDE: list[tuple[str, Body]] = [
    ("max_tokens", {"model": "claude-sonnet-4-5", "messages": [USER]}),
    ("max_tokens", claude(max_tokens=256_000)),
    ("max_tokens", claude("claude-3-5-haiku-latest", max_tokens=10_000)),
    ("max_tokens", claude(max_tokens=10.0)),
    ("seed", claude(seed=1)),
    ("tools[0].type", claude(tools=[tool()])),
    ("temperature", claude(temperature=1.5)),
    ("temperature", claude("claude-opus-4-7", temperature=0.5)),
    ("temperature", claude("claude-sonnet-5-5", temperature=0.5)),
    ("top_p", claude(temperature=0.5, top_p=0.5)),
    ("top_p", claude("claude-haiku-5-5", top_p=0.5)),
    ("stop_sequences", claude(stop_sequences=[" "])),
    ("temperature", claude(max_tokens=2000, temperature=0.5, thinking=ENABLED)),
    ("thinking.budget_tokens", claude(max_tokens=1024, thinking=ENABLED)),
    (
        "thinking.budget_tokens",
        claude(max_tokens=1024, thinking={**ENABLED, "budget_tokens": 100}),
    ),
    ("thinking.type", claude("claude-opus-4-7", max_tokens=2000, thinking=ENABLED)),
    (
        "thinking.type",
        claude("claude-3-5-sonnet-latest", max_tokens=2000, thinking=ENABLED),
    ),
    ("thinking.type", claude(thinking={"type": "adaptive"})),
    ("thinking.type", claude("claude-fable-5", thinking={"type": "disabled"})),
    ("thinking.type", claude("claude-opus-5-5", thinking={"type": "disabled"})),
    (
        "thinking.budget_tokens",
        claude("claude-opus-4-6", thinking={"type": "adaptive", "budget_tokens": 1024}),
    ),
    (
        "tool_choice",
        claude(
            max_tokens=2000, thinking=ENABLED, tools=[own_tool()], tool_choice=FORCED
        ),
    ),
    (
        "tool_choice",
        claude(
            "claude-opus-4-6",
            thinking={"type": "adaptive"},
            tools=[own_tool()],
            tool_choice={"type": "any"},
        ),
    ),
    ("tool_choice", claude("claude-opus-5-5", tools=[own_tool()], tool_choice=FORCED)),
    (
        "tool_choice",
        claude("claude-sonnet-5-5", tools=[own_tool()], tool_choice=FORCED),
    ),
    ("tool_choice", claude(tool_choice={"type": "auto"})),
    ("tool_choice.type", claude(tools=[own_tool()], tool_choice={"type": "function"})),
    (
        "tool_choice.name",
        claude(tools=[own_tool()], tool_choice={"type": "tool", "name": "g"}),
    ),
    (
        "output_config.effort",
        claude("claude-opus-4-6", output_config={"effort": "xhigh"}),
    ),
    ("output_config.effort", claude(output_config={"effort": "low"})),
    ("output_config.effort", claude("claude-opus-5", output_config={"effort": "none"})),
    ("system[0].type", claude(system=[{"type": "image", "source": {}}])),
    ("messages", claude(messages=[])),
    ("messages[0].role", claude(messages=[{"role": "system", "content": "x"}, USER])),
    (
        "messages[0].role",
        claude(messages=[{"role": "assistant", "content": "x"}, USER]),
    ),
    ("messages[0].name", claude(messages=[{**USER, "name": "x"}])),
    ("messages[0].content", claude(messages=[{"role": "user", "content": " "}])),
    (
        "messages[0].content[0].text",
        claude(messages=[{"role": "user", "content": [{"type": "text", "text": ""}]}]),
    ),
    (
        "messages[1]",
        claude(
            "claude-sonnet-5", messages=[USER, {"role": "assistant", "content": "x"}]
        ),
    ),
    ("messages[1]", claude(messages=[USER, {"role": "assistant", "content": "x "}])),
    ("messages[1]", claude(messages=[USER, uses({})])),
    ("messages[2].content", claude(messages=[USER, uses({}), USER])),
    ("messages[1].content", claude(messages=[USER, result()])),
    ("messages[2].content", claude(messages=[USER, uses({}), result("t2")])),
    ("messages[1].content[0].input", claude(messages=[USER, uses("{}"), result()])),
    ("messages[1].content[0]", claude(messages=[USER, uses({}, "a.b"), result("a.b")])),
    (
        "messages[1].content[0].signature",
        claude(
            messages=[
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "x"}],
                },
                USER,
            ]
        ),
    ),
    (
        "messages[1].content[0]",
        claude(max_tokens=2000, thinking=ENABLED, messages=[USER, uses({}), result()]),
    ),
    ("tools[0].name", claude(tools=[own_tool("fs.read")])),
    ("tools[0].name", claude(tools=[own_tool("f" * 129)])),
    ("tools", claude(tools=[own_tool(), own_tool()])),
    ("tools[0].input_schema.type", claude(tools=[own_tool(schema={})])),
    (
        "tools[0].input_schema.anyOf",
        claude(tools=[own_tool(schema={**OBJECT, "anyOf": [OBJECT]})]),
    ),
    (
        "tools[0].input_schema.properties",
        claude(
            tools=[own_tool(schema={"type": "object", "properties": {"$ref": OBJECT}})]
        ),
    ),
    (
        "tools[0].input_schema.additionalProperties",
        claude(tools=[own_tool(strict=True)]),
    ),
    (
        "output_config.format.schema.additionalProperties",
        claude(output_config={"format": {"type": "json_schema", "schema": OBJECT}}),
    ),
    (
        "output_config.format.schema.properties.a.minLength",
        claude(
            output_config={
                "format": {
                    "type": "json_schema",
                    "schema": having({"type": "string", "minLength": 2}),
                }
            }
        ),
    ),
    (
        "output_config.format.schema",
        claude(
            output_config={
                "format": {
                    "type": "json_schema",
                    "schema": having({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
                }
            }
        ),
    ),
    (
        "output_config.format.schema.properties.a.$ref",
        claude(
            output_config={
                "format": {
                    "type": "json_schema",
                    "schema": having({"$ref": "#/$defs/A"}),
                }
            }
        ),
    ),
    (
        "output_config.format",
        claude(
            "claude-sonnet-4-0",
            output_config={"format": {"type": "json_schema", "schema": STRICT}},
        ),
    ),
    (
        "headers.anthropic-beta",
        claude(output_format={"type": "json_schema", "schema": STRICT}),
    ),
    (
        "cache_control",
        claude(
            system=[
                {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
            ]
            * 5
        ),
    ),
]
BAD_GEMINI: list[tuple[str, str, Body]] = [
    ("contents", FLASH, {}),
    ("messages", FLASH, gemini(messages=[USER])),
    ("generationConfig.stop", FLASH, gemini(generationConfig={"stop": ["x"]})),
    (
        "generationConfig.temperature",
        FLASH,
        gemini(generationConfig={"temperature": 3}),
    ),
    (
        "generationConfig.maxOutputTokens",
        FLASH,
        gemini(generationConfig={"max_output_tokens": 1.5}),
    ),
    (
        "generationConfig.stopSequences",
        FLASH,
        gemini(generationConfig={"stopSequences": [*"abcdef"]}),
    ),
    (
        "contents[0].role",
        FLASH,
        {"contents": [{"role": "assistant", "parts": [{"text": "x"}]}]},
    ),
    ("contents[0].parts", FLASH, {"contents": [{"role": "user", "parts": []}]}),
    ("contents[0].parts[0].data", FLASH, {"contents": [{"parts": [{}]}]}),
    (
        "contents[0].parts[0].inlineData.mimeType",
        FLASH,
        {"contents": [{"parts": [{"inlineData": {"data": "YQ=="}}]}]},
    ),
    (
        "contents[2]",
        FLASH,
        gemini(
            contents=[
                *turn(signed=False)[:2],
                {"role": "user", "parts": [{"text": "x"}]},
            ]
        ),
    ),
    ("contents", FLASH, gemini(contents=turn(signed=False)[:2])),
    (
        "contents[1].parts[0].functionCall.args",
        FLASH,
        gemini(
            contents=[
                {"role": "user", "parts": [{"text": "x"}]},
                {
                    "role": "model",
                    "parts": [{"functionCall": {"name": "f", "args": "{}"}}],
                },
                {
                    "role": "user",
                    "parts": [{"functionResponse": {"name": "f", "response": {}}}],
                },
            ]
        ),
    ),
    (
        "contents[2]",
        FLASH,
        gemini(
            contents=[
                *turn(signed=False)[:2],
                {
                    "role": "user",
                    "parts": [{"functionResponse": {"name": "g", "response": {}}}],
                },
            ]
        ),
    ),
    ("contents[1]", "gemini-3-flash-preview", gemini(contents=turn(signed=False))),
    (
        "systemInstruction",
        "gemma-3-27b-it",
        gemini(systemInstruction={"parts": [{"text": "x"}]}),
    ),
    ("tools", "gemma-3-27b-it", gemini(tools=declared())),
    (
        "generationConfig.thinkingConfig.thinkingBudget",
        PRO,
        gemini(**thinking(thinkingBudget=0)),
    ),
    (
        "generationConfig.thinkingConfig.thinkingBudget",
        FLASH,
        gemini(**thinking(thinkingBudget=30_000)),
    ),
    (
        "generationConfig.thinkingConfig.thinkingBudget",
        "gemini-2.5-flash-lite",
        gemini(**thinking(thinkingBudget=100)),
    ),
    (
        "generationConfig.thinkingConfig.thinkingLevel",
        FLASH,
        gemini(**thinking(thinkingLevel="low")),
    ),
    (
        "generationConfig.thinkingConfig.thinkingLevel",
        "gemini-3-pro-preview",
        gemini(**thinking(thinkingLevel="minimal")),
    ),
    (
        "generationConfig.thinkingConfig.thinkingLevel",
        "gemini-3.8-flash",
        gemini(**thinking(thinkingLevel="minimal")),
    ),
    (
        "generationConfig.thinkingConfig.thinkingLevel",
        "gemini-3-flash-preview",
        gemini(**thinking(thinkingLevel="low", thinkingBudget=100)),
    ),
    (
        "generationConfig.thinkingConfig",
        "gemini-2.0-flash",
        gemini(**thinking(thinkingBudget=100)),
    ),
    ("tools", FLASH, gemini(tools=[SEARCH, *declared()])),
    (
        "toolConfig.includeServerSideToolInvocations",
        "gemini-3-flash-preview",
        gemini(tools=[SEARCH, *declared()]),
    ),
    (
        "tools",
        FLASH,
        gemini(
            tools=declared(), generationConfig={"responseMimeType": "application/json"}
        ),
    ),
    ("tools", FLASH, gemini(tools=[*declared(), *declared()])),
    ("tools[0].type", FLASH, gemini(tools=[tool()])),
    ("tools[0]", FLASH, gemini(tools=[{}])),
    (
        "tools[0].functionDeclarations[0].name",
        FLASH,
        gemini(tools=declared(name="1st")),
    ),
    (
        "tools[0].functionDeclarations[0].name",
        FLASH,
        gemini(tools=declared(name="größe")),
    ),
    (
        "tools[0].functionDeclarations[0].parameters.$ref",
        FLASH,
        gemini(tools=declared(parameters={"type": "object", "$ref": "#"})),
    ),
    (
        "tools[0].functionDeclarations[0].parameters.additionalProperties",
        FLASH,
        gemini(tools=declared(parameters={**OBJECT, "additionalProperties": False})),
    ),
    (
        "tools[0].functionDeclarations[0].parameters.required",
        FLASH,
        gemini(tools=declared(parameters={**OBJECT, "required": ["b"]})),
    ),
    (
        "tools[0].functionDeclarations[0].parameters.properties.a.enum",
        FLASH,
        gemini(
            tools=declared(
                parameters={
                    "type": "object",
                    "properties": {"a": {"type": "integer", "enum": [1, 2]}},
                }
            )
        ),
    ),
    (
        "tools[0].functionDeclarations[0].parameters.properties.a.items",
        FLASH,
        gemini(
            tools=declared(
                parameters={"type": "object", "properties": {"a": {"type": "array"}}}
            )
        ),
    ),
    (
        "tools[0].functionDeclarations[0].parameters.properties.a.format",
        FLASH,
        gemini(
            tools=declared(
                parameters={
                    "type": "object",
                    "properties": {"a": {"type": "string", "format": "uuid"}},
                }
            )
        ),
    ),
    (
        "tools[0].functionDeclarations[0].parameters",
        FLASH,
        gemini(tools=declared(parameters=OBJECT, parametersJsonSchema=OBJECT)),
    ),
    (
        "tools[0].functionDeclarations[0].parametersJsonSchema.properties.a.$ref",
        FLASH,
        gemini(tools=declared(parametersJsonSchema=having({"$ref": "#/$defs/A"}))),
    ),
    (
        "toolConfig.functionCallingConfig.mode",
        FLASH,
        gemini(
            tools=declared(), toolConfig={"functionCallingConfig": {"mode": "required"}}
        ),
    ),
    (
        "toolConfig.functionCallingConfig.allowedFunctionNames",
        FLASH,
        gemini(
            tools=declared(),
            toolConfig={
                "functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["g"]}
            },
        ),
    ),
    (
        "toolConfig.functionCallingConfig",
        FLASH,
        gemini(toolConfig={"functionCallingConfig": {"mode": "ANY"}}),
    ),
    (
        "generationConfig.responseSchema",
        FLASH,
        gemini(
            generationConfig={
                "responseSchema": OBJECT,
                "responseJsonSchema": OBJECT,
                "responseMimeType": "application/json",
            }
        ),
    ),
    (
        "generationConfig.responseMimeType",
        FLASH,
        gemini(generationConfig={"responseSchema": OBJECT}),
    ),
    (
        "generationConfig.responseJsonSchema.properties.a.$ref",
        FLASH,
        gemini(
            generationConfig={
                "responseJsonSchema": {
                    **having({"$ref": "#/$defs/A", "description": "x"}),
                    "$defs": {"A": STRICT},
                },
                "responseMimeType": "application/json",
            }
        ),
    ),
]
BAD_OLLAMA: list[tuple[str, Body]] = [
    ("model", {"messages": [USER]}),
    ("options.stop", ollama(options={"stop": "x"})),
    ("options.num_predict", ollama(options={"num_predict": "5"})),
    ("options.temperature", ollama(options={"temperature": "hot"})),
    ("messages[0].role", ollama(messages=[{"role": "developer", "content": "x"}])),
    ("messages[0].content", ollama(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}])),
    ("messages[0].images[0]", ollama(messages=[{**USER, "images": ["https://x.example/a.png"]}])),
    (
        "messages[1].tool_calls[0].function.arguments",
        ollama(messages=[USER, {"role": "assistant", "content": "", "tool_calls": calls()["tool_calls"]}]),
    ),
    ("think", ollama(think="none")),
    ("think", ollama("gpt-oss:20b", think="none")),
    ("think", ollama("llama3.2", think=True)),
    ("think", ollama("qwen3-coder:30b", think=True)),
    ("format", ollama(format="xml")),
    ("format.properties.a.$ref", ollama(format=having({"$ref": "#/$defs/A"}))),
    ("format.properties.a.pattern", ollama(format=having({"type": "string", "pattern": "^(?!x)$"}))),
    ("tools[0].function.parameters.type", ollama(tools=[tool(parameters={"properties": {}})])),
    ("tools[0].function.parameters.properties.a", ollama(tools=[tool(parameters={**OBJECT, "properties": {"a": True}})])),
]  # fmt: skip
CASES = [
    *(("openai", CHAT, at, body) for at, body in BAD_CHAT),
    *(("openai", RESPONSES, at, body) for at, body in BAD_RESPONSES),
    *(("anthropic", MESSAGES, at, body) for at, body in BAD_CLAUDE),
    *(
        ("google", f"/v1beta/models/{model}:generateContent", at, body)
        for at, model, body in BAD_GEMINI
    ),
    *(("ollama", OLLAMA, at, body) for at, body in BAD_OLLAMA),
]


def fields(found: list[str]) -> list[str]:
    """Return the path that each sentence begins with."""
    return [said.partition(":")[0] for said in found]


@pytest.mark.parametrize(
    ("provider", "path", "at", "body"),
    CASES,
    ids=[f"{i}-{path}-{at}" for i, (_, path, at, _) in enumerate(CASES)],
)
def test_a_bad_body_is_refused_where_it_is_bad(
    provider: str, path: str, at: str, body: Body
) -> None:
    """Each rule names the field, in one sentence of one line."""
    found = violations_of(provider, "POST", path, HEADERS[provider], body)

    assert at in fields(found), found
    assert all("\n" not in said and ": " in said for said in found)


GOOD: list[tuple[str, str, Body]] = [
    ("openai", CHAT, chat()),
    ("openai", CHAT, chat("gpt-5.4", tools=[tool()])),
    ("openai", CHAT, chat("gpt-5.6-terra", tools=[tool()], reasoning_effort="none")),
    ("openai", CHAT, chat("gpt-5.2", temperature=0.5, reasoning_effort="none")),
    ("openai", CHAT, chat("o1", reasoning_effort="low", max_completion_tokens=50_000)),
    ("openai", CHAT, chat(messages=[USER, calls(), ANSWER])),
    ("openai", CHAT, chat(response_format=as_schema(STRICT))),
    ("openai", CHAT, chat(response_format=as_schema(OBJECT, strict=False))),
    ("openai", CHAT, chat("gpt-9-nova", reasoning_effort="none", top_p=1)),
    ("openai", CHAT, chat("deepseek-chat", messages=[{**USER, "reasoning_content": "x"}])),
    ("openai", RESPONSES, responses("gpt-5-pro", reasoning={"effort": "high"})),
    ("openai", RESPONSES, responses("gpt-6-astra", tools=[flat()], reasoning={"effort": "max"})),
    ("openai", RESPONSES, responses(tools=[flat()], tool_choice={"type": "function", "name": "f"})),
    ("anthropic", MESSAGES, claude(max_tokens=2000, thinking=ENABLED)),
    ("anthropic", MESSAGES, claude("claude-opus-4-6", thinking={"type": "adaptive"}, output_config={"effort": "max"})),
    ("anthropic", MESSAGES, claude("claude-sonnet-5", tools=[own_tool()], tool_choice=FORCED)),
    ("anthropic", MESSAGES, claude("claude-sonnet-5-5", thinking={"type": "between_tools"})),
    ("anthropic", MESSAGES, claude(messages=[USER, uses({}), result()])),
    ("anthropic", MESSAGES, claude("claude-unheard-of-9", temperature=0.5, thinking=ENABLED, max_tokens=3000)),
    ("google", f"/v1beta/models/{PRO}:generateContent", gemini(**thinking(thinkingBudget=128))),
    ("google", "/v1beta/models/gemini-3-flash-preview:generateContent", gemini(contents=turn(signed=True))),
    ("google", "/v1beta/models/gemini-3-flash-preview:generateContent", gemini(
        tools=[SEARCH, *declared()],
        toolConfig={"includeServerSideToolInvocations": True, "functionCallingConfig": {"mode": "VALIDATED"}},
    )),
    ("google", f"/v1beta/models/{FLASH}:streamGenerateContent?alt=sse", gemini(tools=declared(parametersJsonSchema=STRICT))),
    ("ollama", OLLAMA, ollama(think=True, options={"stop": ["x"], "num_predict": 5})),
    ("ollama", OLLAMA, ollama(options={"num_predict": 5.0})),
    ("ollama", OLLAMA, ollama(tools=[tool(parameters={"type": "object", "$defs": {"A": OBJECT}, "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/A"}}}})])),
    ("ollama", OLLAMA, ollama("gpt-oss:20b", think="low")),
    ("ollama", OLLAMA, ollama("llama3.2", think=False, format=STRICT, tools=[tool()])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "path", "body"), GOOD, ids=[str(i) for i in range(len(GOOD))]
)
def test_a_good_body_passes(provider: str, path: str, body: Body) -> None:
    """Nothing is refused that is documented to be taken."""
    assert violations_of(provider, "POST", path, HEADERS[provider], body) == []
    assert losses_of(provider, "POST", path, HEADERS[provider], body) == []


LOST: list[tuple[str, str, str, Body]] = [
    ("openai", RESPONSES, "tools[0].strict", responses(tools=[flat(strict=None)])),
    ("anthropic", MESSAGES, "tools[0].input_schema.properties.a.$ref", claude(
        tools=[own_tool(schema={**OBJECT, "properties": {"a": {"$ref": "#/$defs/A"}}})]
    )),
    ("google", f"/v1beta/models/{FLASH}:generateContent", "tools[0].functionDeclarations[0].parameters.properties.a.type", gemini(
        tools=declared(parameters={"type": "object", "properties": {"a": {}}})
    )),
    ("google", f"/v1beta/models/{FLASH}:generateContent", "tools[0].functionDeclarations[0].parametersJsonSchema.properties.a.const", gemini(
        tools=declared(parametersJsonSchema=having({"const": "x"}))
    )),
    ("ollama", OLLAMA, "tool_choice", ollama(tool_choice="none")),
    ("ollama", OLLAMA, "options.max_tokens", ollama(options={"max_tokens": 5})),
    ("ollama", OLLAMA, "options.num_predict", ollama(options={"num_predict": 1.5})),
    ("ollama", OLLAMA, "tools[0].function.parameters.properties.a.const", ollama(
        tools=[tool(parameters={**OBJECT, "properties": {"a": {"const": "x"}}})]
    )),
    ("ollama", OLLAMA, "think", ollama("gpt-oss:20b", think=True)),
    ("ollama", OLLAMA, "messages[1]", ollama(messages=[USER, {"role": "tool", "content": "x"}])),
    ("ollama", OLLAMA, "tools[0].function.parameters.properties.a.$ref", ollama(
        tools=[tool(parameters={**OBJECT, "properties": {"a": {"$ref": "#/$defs/A"}}})]
    )),
]  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "path", "at", "body"), LOST, ids=[at for _, _, at, _ in LOST]
)
def test_what_a_provider_passes_over_is_told_apart(
    provider: str, path: str, at: str, body: Body
) -> None:
    """It is accepted, and does not have the effect that was asked for."""
    lost = losses_of(provider, "POST", path, HEADERS[provider], body)

    assert at in fields(lost), lost
    assert at not in fields(
        violations_of(provider, "POST", path, HEADERS[provider], body)
    )


@pytest.mark.parametrize(
    ("provider", "path", "headers", "at"),
    [
        ("openai", CHAT, JSON, "headers.authorization"),
        ("openai", CHAT, {**JSON, "authorization": "sk-x"}, "headers.authorization"),
        (
            "openai",
            CHAT,
            {**HEADERS["openai"], "content-type": "text/plain"},
            "headers.content-type",
        ),
        ("openai", f"{CHAT}?api_key=sk-x", HEADERS["openai"], "path"),
        (
            "anthropic",
            MESSAGES,
            {**JSON, "x-api-key": "x"},
            "headers.anthropic-version",
        ),
        (
            "anthropic",
            MESSAGES,
            {**HEADERS["anthropic"], "authorization": "Bearer x"},
            "headers.authorization",
        ),
        ("google", f"/v1beta/models/{FLASH}:generateContent?key=x", JSON, "path"),
        (
            "google",
            f"/v1beta/models/{FLASH}:generateContent",
            {**JSON, "authorization": "Bearer x"},
            "headers.x-goog-api-key",
        ),
        ("google", "/v1beta/models", HEADERS["google"], "path"),
        ("ollama", "/api/generate", JSON, "path"),
    ],
)
def test_the_key_travels_in_its_header(
    provider: str, path: str, headers: Mapping[str, str], at: str
) -> None:
    """A key elsewhere, in a URL above all, is a violation."""
    bodies = {"openai": chat(), "anthropic": claude(), "google": gemini()}
    body = bodies.get(provider, ollama())

    assert at in fields(violations_of(provider, "POST", path, headers, body))


def test_another_host_may_have_no_responses_endpoint() -> None:
    """Which endpoint takes function tools is a rule of OpenAI's own host."""
    body = chat("gpt-5.6-terra", tools=[tool()])
    there, here = "api.openai.com", "127.0.0.1:8000"

    at_openai = {**HEADERS["openai"], "host": there}
    assert fields(violations_of("openai", "POST", CHAT, at_openai, body)) == ["tools"]
    elsewhere = {**HEADERS["openai"], "host": here}
    assert violations_of("openai", "POST", CHAT, elsewhere, body) == []


def test_a_get_is_no_request_for_a_chat() -> None:
    """The method is checked too."""
    found = violations_of("ollama", "GET", OLLAMA, JSON, ollama())

    assert fields(found) == ["method"]


@pytest.mark.parametrize(
    ("model", "bare"),
    [
        ("gpt-5-2025-08-07", "gpt-5"),
        ("ft:gpt-4o-2024-08-06:org:name:id", "gpt-4o"),
        ("gpt-4-0613", "gpt-4"),
        ("gpt-5.1-codex-max", "gpt-5.1-codex-max"),
    ],
)
def test_a_snapshot_has_the_rules_of_its_series(model: str, bare: str) -> None:
    """A date at the end of a name makes no other model."""
    assert series(model) == bare
