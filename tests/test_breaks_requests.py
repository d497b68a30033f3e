"""Requests that broke the package: conversations, tools and schemas of callers' own.

Each case was refused by the provider, lost a part on the way, or ended in an exception
that is not the package's.
"""

import json
from collections.abc import AsyncIterator
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    InvalidRequestError,
    LLMInfraService,
    Settings,
    StaticAPIKeys,
    ToolConfig,
    ToolType,
)
from tests.conftest import HELLO, PROVIDERS, Open
from tests.provider_server import Answer, ProviderServer, Raw, Received
from tests.sent_requests import Requests, Sent, requests

MODELS = {
    "openai": "gpt-4.1-mini",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "qwen3:4b",
}
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8"
    "z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
each = pytest.mark.parametrize("provider", PROVIDERS)


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


def call(name: str, arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    """Return a call of a tool."""
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function, **fields}


def tool(parameters: Any, name: str = "look") -> dict[str, Any]:
    """Return a tool with a schema of the caller's own."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


A = {"type": "object", "properties": {"a": {"type": "integer"}}}


# --- conversations --------------------------------------------------------------------

WITHOUT_IDS = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [call("f"), call("g")]},
    {"role": "tool", "name": "g", "content": "two"},
    {"role": "tool", "name": "f", "content": "one"},
]
SAME_IDS = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("f", id="c"), call("g", id="c")],
    },
    {"role": "tool", "tool_call_id": "c", "content": "one"},
    {"role": "tool", "tool_call_id": "c", "content": "two"},
]
NUMBERS_AS_IDS = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [call("f", id=7)]},
    {"role": "tool", "tool_call_id": 7, "content": "one"},
]
LEGACY = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "f", "arguments": '{"a": 1}'},
    },
    {"role": "function", "name": "f", "content": "one"},
]
NO_CONTENT = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [call("f", id="c")]},
    {"role": "tool", "tool_call_id": "c", "content": None},
]
NO_PARTS = [*NO_CONTENT[:-1], {"role": "tool", "tool_call_id": "c", "content": []}]
NO_CALLS = [*HELLO, {"role": "assistant", "content": "x", "tool_calls": []}, *HELLO]


@each
@pytest.mark.parametrize(
    "conversation",
    [WITHOUT_IDS, SAME_IDS, NUMBERS_AS_IDS, LEGACY, NO_CONTENT, NO_PARTS, NO_CALLS],
    ids=["no ids", "same ids", "numbers", "legacy", "no content", "no parts", "none"],
)
async def test_a_loose_tool_turn_is_completed(
    asking: Requests, provider: str, conversation: list[dict[str, Any]]
) -> None:
    """Each call meets its result, whatever the conversation left out."""
    tools = [tool(A, "f"), tool(A, "g")]

    found = await sent(asking, provider, MODELS[provider], conversation, tools=tools)

    text = json.dumps(found.body)
    results = [m["content"] for m in conversation if m["role"] in {"tool", "function"}]
    assert [said for said in results if said and said not in text] == []
    if conversation is LEGACY:
        assert '"f"' in text


async def test_results_without_ids_meet_the_call_of_their_name(
    asking: Requests,
) -> None:
    """The order of the results does not matter, where they have names."""
    tools = [tool(A, "f"), tool(A, "g")]

    found = await sent(asking, "openai", MODELS["openai"], WITHOUT_IDS, tools=tools)

    messages = found.body["messages"]
    names = {c["id"]: c["function"]["name"] for c in messages[1]["tool_calls"]}
    said = {names[m["tool_call_id"]]: m["content"] for m in messages[2:]}
    assert said == {"f": "one", "g": "two"}


@each
@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ([{"role": "tool", "tool_call_id": "c", "content": "x"}], "result of a tool"),
        ([NO_CONTENT[2], NO_CONTENT[1]], "result of a tool"),
        ([NO_CONTENT[1], *HELLO], "have no result"),
        ([NO_CONTENT[1]], "have no result"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f"}], "tool_calls"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": call("f")}],
            "tool_calls",
        ),
        ([{"role": "assistant", "tool_calls": [{"id": "c"}]}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [call(None)]}], "tool_calls"),  # type: ignore[arg-type]
        ([{"role": "user", "content": [{"text": "x"}]}], "type"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "text"),
    ],
)
async def test_a_conversation_that_no_provider_takes_is_refused(
    asking: Requests, provider: str, turn: list[dict[str, Any]], words: str
) -> None:
    """Nothing is sent, and the error says what is wrong and whose call it was."""
    found = await asking.of(provider, MODELS[provider], [*HELLO, *turn])

    assert isinstance(found, InvalidRequestError)
    assert words in str(found)
    assert found.service == provider


async def test_a_picture_from_a_tool_goes_to_responses(asking: Requests) -> None:
    """OpenAI's chat completions take only text from a tool."""
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
    ]
    result = {"role": "tool", "tool_call_id": "c", "content": parts}

    found = await sent(
        asking,
        "openai",
        "gpt-4.1-mini",
        [*NO_CONTENT[:-1], result],
        tools=[tool(A, "f")],
    )

    assert found.path == "/v1/responses"


@each
@pytest.mark.parametrize("stream", [False, True])
async def test_half_a_character_is_refused(
    service: LLMInfraService, server: ProviderServer, provider: str, *, stream: bool
) -> None:
    """A text that was cut in an emoji is not JSON, and no exception of pydantic's."""
    cut: list[dict[str, Any]] = [{"role": "user", "content": "half: \ud83d"}]

    async def ask() -> None:
        if not stream:
            await service.complete(cut, MODELS[provider], provider)
            return
        async with service.stream(cut, MODELS[provider], provider) as chunks:
            async for _ in chunks:
                pass

    with pytest.raises(InvalidRequestError, match="nothing was sent"):
        await ask()

    assert server.requests == []


@pytest.mark.parametrize("blocks", [5, ["a"], {"type": "text"}])
async def test_blocks_that_are_not_blocks_are_left_out(
    asking: Requests, blocks: Any
) -> None:
    """They may come from a caller's own store."""
    own = {"content_blocks": blocks}
    turn = {"role": "assistant", "content": "x", "provider_specific_fields": own}

    found = await sent(asking, "anthropic", MODELS["anthropic"], [*HELLO, turn, *HELLO])

    assert found.body["messages"][1]["content"] == [{"type": "text", "text": "x"}]


async def test_litellms_engine_sends_the_text_of_a_turn_with_blocks(
    opened: Open, server: ProviderServer
) -> None:
    """A text that stands for the blocks on the way must not reach the model."""
    own = {"content_blocks": [{"type": "server_tool_use", "id": "s", "name": "x"}]}
    turn = {"role": "assistant", "content": "half", "provider_specific_fields": own}
    async with opened(engine="litellm", max_retries=0) as service:
        await service.complete([*HELLO, turn, *HELLO], MODELS["anthropic"], "anthropic")

    told = server.requests[-1].json["messages"][1]["content"]
    assert told == [{"type": "text", "text": "half"}]


@pytest.mark.parametrize(
    "block", ["web_fetch_tool_result", "code_execution_tool_result", "mcp_tool_use"]
)
async def test_a_block_of_any_server_tool_is_kept(
    service: LLMInfraService, server: ProviderServer, block: str
) -> None:
    """A tool that `extra_body` asks for works in the content too."""
    content = [{"type": block, "id": "x"}, {"type": "text", "text": "done"}]

    def reply(asked: Received) -> Any:
        body = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": asked.json["model"],
            "content": content,
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
        return Raw(200, {"content-type": "application/json"}, json.dumps(body).encode())

    server.default = reply

    result = await service.complete(HELLO, MODELS["anthropic"], "anthropic")

    assert result.content_blocks == content


# --- tools ----------------------------------------------------------------------------

OLDER = {
    "type": "object",
    "properties": {"p": {"$ref": "#/definitions/P"}},
    "definitions": {"P": {"type": "object", "properties": {"x": {"const": "k"}}}},
}


def counted(**options: int) -> str:
    """Count."""
    return str(options)


def marked(mark: Literal["a", 1] | None) -> str:
    """Mark."""
    return str(mark)


@each
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (counted, ["integer"]),
        (
            tool({"type": "object", "additionalProperties": {"type": "integer"}}),
            ["inte"],
        ),
        (tool({"$ref": "#/$defs/P", "$defs": {"P": A}}), ['"a"']),
        (tool({"properties": {"a": {"type": "string"}}}), ['"object"', '"a"']),
        (tool({"type": "OBJECT", "properties": {"a": {"type": "STRING"}}}), ['"str']),
        (tool({}), []),
        (tool(None), []),
        (tool(OLDER), ['"k"', '"x"']),
        (marked, ['"a"', "null"]),
    ],
)
async def test_a_tools_schema_reaches_the_model_whole(
    asking: Requests, provider: str, given: Any, words: list[str]
) -> None:
    """Schemas of MCP servers and of pydantic 1 come in these forms."""
    found = await sent(asking, provider, MODELS[provider], tools=[given])

    text = json.dumps(found.body["tools"])
    assert [word for word in words if word not in text] == []
    assert "#/definitions" not in text


@each
@pytest.mark.parametrize(
    "options",
    [
        {"tools": [tool(A), tool(A)]},
        {"tools": [tool(A, "")]},
        {"tools": [tool("x")]},
        {"tools": [{"type": ["function"], "function": {"name": "look"}}]},
        {"tools": [tool({"type": "object", "properties": {"a": 5}})]},
        {"tools": [tool({"type": "object", "$defs": 5, "properties": {}})]},
        {"stop": ["a", ""]},
        {"tools": [tool({"type": "string"})]},
        {"tools": [tool(A)], "tool_choice": {"type": "function", "function": "look"}},
        {"tools": [tool(A)], "tool_choice": {"type": "function", "name": "other"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "objekt"}},
        {"response_format": {**A, "properties": {"a": {"$ref": "#/$defs/No"}}}},
        {"response_format": {**A, "properties": {"a": {"$ref": "http://[::1]:9/x"}}}},
    ],
)
async def test_what_cannot_be_a_tool_or_a_form_is_refused(
    asking: Requests, provider: str, options: dict[str, Any]
) -> None:
    """Nothing is sent for it, and nothing is fetched."""
    found = await asking.of(provider, MODELS[provider], **options)

    assert isinstance(found, InvalidRequestError)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_alternatives_at_the_root_of_a_tool_are_refused(
    asking: Requests, provider: str
) -> None:
    """OpenAI and Anthropic answer 400; LiteLLM drops them silently for Anthropic."""
    given = tool({**A, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]})

    found = await asking.of(provider, MODELS[provider], tools=[given])

    assert isinstance(found, InvalidRequestError)
    assert "anyOf" in str(found)


async def test_anthropic_gets_the_keywords_that_litellm_drops(asking: Requests) -> None:
    """LiteLLM keeps only some keywords at the root of a tool's schema."""
    schema = {"type": "object", "patternProperties": {"^a": {"type": "integer"}}}

    found = await sent(asking, "anthropic", MODELS["anthropic"], tools=[tool(schema)])

    told = found.body["tools"][0]["input_schema"]
    assert told["patternProperties"] == schema["patternProperties"]


@each
@pytest.mark.parametrize(
    "choice",
    [{"type": "function", "name": "a.look"}, {"type": "tool", "name": "a.look"}],
)
async def test_a_choice_in_another_format_names_the_tool(
    asking: Requests, provider: str, choice: dict[str, Any]
) -> None:
    """Tools may be in the format of Responses and of Anthropic, and so may the choice."""
    found = await sent(
        asking,
        provider,
        MODELS[provider],
        tools=[tool(A, "a.look")],
        tool_choice=choice,
    )

    # Ollama has no choice of a tool.
    assert ("a_look" in json.dumps(found.body.get("tool_choice"))) is (
        provider in {"openai", "anthropic"}
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["json_tool_call", "web_search"])
async def test_a_name_that_anthropic_uses_itself_is_the_callers_too(
    service: LLMInfraService, server: ProviderServer, name: str, *, stream: bool
) -> None:
    """A call of it is a call, and the name beside Anthropic's own is not sent twice."""
    tools: list[Any] = [tool(A, name)]
    if name == "web_search":
        tools.append(ToolConfig(type=ToolType.WEB_SEARCH))
    server.default = lambda asked: Answer(
        tool_calls=[(asked.json["tools"][0]["name"], {"a": 1})]
    )
    asked = (HELLO, MODELS["anthropic"], "anthropic")

    if stream:
        async with service.stream(*asked, tools=tools) as chunks:
            names = [c.tool_call.name async for c in chunks if c.tool_call]
        result = await chunks.result()
        assert names[0] == name
    else:
        result = await service.complete(*asked, tools=tools)

    assert [(c.name, c.arguments) for c in result.tool_calls] == [(name, {"a": 1})]
    sent_names = [t["name"] for t in server.requests[-1].json["tools"]]
    assert len(sent_names) == len(set(sent_names))


# --- forms of answers -----------------------------------------------------------------


class Counts(BaseModel):
    """A class whose only field has a name that LiteLLM once used itself."""

    values: dict[str, int]


async def test_a_field_named_values_is_not_unwrapped(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """An open object goes through a tool on Anthropic."""
    server.default = Answer(tool_calls=[("json_tool_call", {"values": {"a": 1}})])

    result = await service.complete(
        HELLO, MODELS["anthropic"], "anthropic", response_format=Counts
    )

    assert result.parsed == Counts(values={"a": 1})


@each
@pytest.mark.parametrize(
    "form",
    [
        {"$ref": "#/$defs/P", "$defs": {"P": A}},
        {"properties": {"a": {"type": "integer"}}},
        {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}},
        {"type": "json_schema", "json_schema": {"schema": A}},
        {"type": "json_schema", "json_schema": {"name": "my form!", "schema": A}},
        {"type": "json_schema", "name": "of_responses", "schema": A},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
        OLDER,
    ],
)
async def test_a_form_of_the_callers_own_is_sent_as_the_provider_takes_it(
    asking: Requests, provider: str, form: dict[str, Any]
) -> None:
    """An object stands at the root, under a name that OpenAI takes."""
    found = await asking.of(provider, MODELS[provider], response_format=form)

    if "patternProperties" in form and provider == "google":
        assert isinstance(found, InvalidRequestError)
        return
    assert isinstance(found, Sent), found
    assert found.wrong() == []
    assert "#/definitions" not in json.dumps(found.body)


async def test_a_reference_to_the_root_means_the_answer(asking: Requests) -> None:
    """The root is another one after a list was wrapped into an object."""
    tree = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#"}}]}

    found = await sent(asking, "openai", MODELS["openai"], response_format=tree)

    schema = found.body["response_format"]["json_schema"]["schema"]
    items = schema["properties"]["value"]["anyOf"][1]["items"]
    assert items == {"$ref": "#/properties/value"}


# --- the role of a system prompt ------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "role"),
    [
        ("gpt-5.1", "developer"),
        ("my-deployment", "developer"),
        ("openai/gpt-4o", "developer"),
        ("Qwen/Qwen3-8B", "system"),
    ],
)
async def test_servers_of_other_models_get_the_role_system(
    server: ProviderServer, model: str, role: str
) -> None:
    """They answer 400 to "developer", or pass the prompt over."""
    record = {"key": "sk-x", "service": "openai", "base_url": server.base_url("openai")}
    async with LLMInfraService(
        StaticAPIKeys({"k": record}), settings=Settings(max_retries=0)
    ) as service:
        await service.complete(
            [{"role": "system", "content": "Be brief."}, *HELLO],
            model,
            "k",
            service="openai",
        )

    assert server.requests[-1].json["messages"][0]["role"] == role


# --- options ---------------------------------------------------------------------------

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "enormous")


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("tools", [[], [tool(A)]], ids=["plain", "tool"])
@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-5"),
        ("openai", "gpt-5.1"),
        ("openai", "gpt-5.4"),
        ("openai", "gpt-6-astra"),
        ("openai", "gpt-9-of-next-year"),
        ("anthropic", "claude-opus-4-6"),
        ("google", "gemini-3-flash-preview"),
        ("ollama", "gpt-oss:20b"),
    ],
)
async def test_any_effort_is_taken_or_left_out(
    asking: Requests, provider: str, model: str, effort: str, tools: list[Any]
) -> None:
    """Not every model knows every word, and "max" is known to Responses only."""
    found = await asking.of(provider, model, reasoning_effort=effort, tools=tools)

    assert isinstance(found, InvalidRequestError) or found.wrong() == []


@pytest.mark.parametrize(
    ("provider", "model", "options"),
    [
        ("openai", "gpt-6.1", {"max_tokens": 256_000}),
        ("openai", "ft:gpt-4.1-mini:org::id", {"max_tokens": 256_000}),
        ("openai", "gpt-9-of-next-year", {"max_tokens": 9, "temperature": 0.5}),
        ("google", "gemini-2.0-flash", {"max_tokens": 256_000}),
        ("google", "gemini-9-of-next-year", {"max_tokens": 2**40}),
    ],
)
async def test_options_of_models_outside_litellms_table(
    asking: Requests, provider: str, model: str, options: dict[str, Any]
) -> None:
    """Tuned, retired and new models are not in it, or without their limit."""
    await sent(asking, provider, model, **options)


async def test_a_seed_that_google_refuses(asking: Requests) -> None:
    """Google's seed has 32 bits."""
    found = await asking.of("google", MODELS["google"], seed=2**40)

    assert isinstance(found, InvalidRequestError)
    assert "seed" in str(found)


# --- a LiteLLM that has changed --------------------------------------------------------


async def test_a_moved_check_for_responses_leaves_calls_working(
    service: LLMInfraService,
    server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next LiteLLM may rename it or change its arguments."""
    if version("litellm").startswith("1.105."):
        pytest.skip("LiteLLM 1.105 has the check in another module")
    module = import_module("litellm.responses.bridge_check")
    from dipeo_llm.adapters import openai

    def changed() -> None: ...

    monkeypatch.setattr(module, "responses_api_bridge_check", changed)
    monkeypatch.setattr(openai, "_warned", set())

    for _ in range(2):
        result = await service.complete(
            HELLO, "gpt-4.1-nano", "openai", tools=[tool(A)]
        )
        assert result.text

    assert len([r for r in caplog.records if "Responses" in r.message]) == 1


@each
@pytest.mark.parametrize("value", [Ellipsis, {1, 2}, b"x", float("nan")], ids=repr)
async def test_arguments_that_cannot_be_json_are_refused(
    service: LLMInfraService, server: ProviderServer, provider: str, value: Any
) -> None:
    """The message says which call; nothing is sent."""
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call("f", {"a": value}, id="c")],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    with pytest.raises(InvalidRequestError, match="message 1 calls 'f' with arguments"):
        await service.complete(messages, MODELS[provider], provider)
    assert server.requests == []
