"""Answers that broke the package on their way back into a conversation.

What a result says is the same for a stream and for a whole answer, and it continues the
conversation with every provider.
"""

import json
from typing import Any

import pytest

from dipeo_llm import ChatResult, LLMInfraService, ToolConfig, ToolType
from tests.conftest import HELLO, MODELS
from tests.provider_server import Answer, ProviderServer, Raw, Received

SSE = {"content-type": "text/event-stream"}
JSON = {"content-type": "application/json"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def events(*bodies: Any) -> bytes:
    """Write events as a server does."""
    return b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies)


async def both(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    model: str,
    *,
    whole: Any,
    stream: bytes,
    tools: list[Any],
) -> list[ChatResult[Any]]:
    """Return the results of a whole answer and of the same answer as a stream."""

    def reply(asked: Received) -> Raw:
        if asked.stream:
            return Raw(200, SSE, stream)
        return Raw(200, JSON, json.dumps(whole).encode())

    server.default = reply
    asked: tuple[Any, ...] = (HELLO, model, provider)
    first = await service.complete(*asked, service=provider, tools=tools)
    async with service.stream(*asked, service=provider, tools=tools) as chunks:
        async for _ in chunks:
            pass
    return [first, await chunks.result()]


async def test_a_legacy_call_has_the_same_id_in_a_stream(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """The id is made here: the form that `tool_calls` replaced has none."""

    def piece(key: str, value: Any, finish: Any = None) -> dict[str, Any]:
        choice = {"index": 0, key: value, "finish_reason": finish}
        return {"id": "c", "model": "m", "choices": [choice]}

    call = {"name": "look", "arguments": '{"a": 1}'}
    message = {"role": "assistant", "content": None, "function_call": call}
    results = await both(
        service,
        server,
        "openai",
        "gpt-4.1-nano",
        whole=piece("message", message, "function_call"),
        stream=events(
            piece("delta", {"function_call": {"name": "look", "arguments": '{"a"'}}),
            piece("delta", {"function_call": {"arguments": ": 1}"}}),
            piece("delta", {}, "function_call"),
        )
        + b"data: [DONE]\n\n",
        tools=[TOOL],
    )

    assert results[0].to_messages() == results[1].to_messages()
    assert results[0].tool_calls[0].arguments == {"a": 1}


PARTS = [
    {
        "toolCall": {"toolType": "GOOGLE_SEARCH_WEB", "args": {}, "id": "s1"},
        "thoughtSignature": "S1",
    },
    {"toolResponse": {"toolType": "GOOGLE_SEARCH_WEB", "response": {}, "id": "s1"}},
    {"text": "let me look"},
    {
        "functionCall": {"name": "look", "args": {"a": 1}, "id": "f1"},
        "thoughtSignature": "S2",
    },
    {"functionCall": {"name": "look", "args": {"a": 1}, "id": "f2"}},
]


async def test_googles_own_search_goes_back_beside_functions(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Google wants the parts of its own tools back; another provider gets the text.

    https://ai.google.dev/gemini-api/docs/tool-combination (2026-11-25)
    """
    body = {
        "candidates": [
            {
                "index": 0,
                "content": {"role": "model", "parts": PARTS},
                "finishReason": "STOP",
            }
        ],
        "responseId": "r",
    }
    tools: list[Any] = [TOOL, ToolConfig(type=ToolType.WEB_SEARCH)]
    model = "gemini-3-flash-preview"
    results = await both(
        service,
        server,
        "google",
        model,
        whole=body,
        stream=events(body),
        tools=tools,
    )
    assert results[0].to_messages() == results[1].to_messages()
    calls = [call.to_message("fair") for call in results[0].tool_calls]
    conversation = [*HELLO, *results[0].to_messages(), *calls]
    server.default = Answer("ok")

    await service.complete(conversation, model, "google", tools=tools)

    contents = server.requests[-1].json["contents"]
    assert contents[1] == {"role": "model", "parts": PARTS}
    assert len(contents[2]["parts"]) == 2
    for provider in ("openai", "anthropic", "ollama"):
        await service.complete(conversation, MODELS[provider], provider, tools=[TOOL])
        assert "toolCall" not in server.requests[-1].body.decode()
        assert "let me look" in server.requests[-1].body.decode()


@pytest.mark.parametrize(
    ("model", "is_kept"), [("deepseek-reasoner", True), ("gpt-5-mini", False)]
)
async def test_reasoning_goes_back_only_where_it_is_known(
    service: LLMInfraService, server: ProviderServer, model: str, *, is_kept: bool
) -> None:
    """OpenAI's own models refuse the field behind a proxy too."""
    call = {"id": "c", "type": "function", "function": {"name": "look"}}
    turn = {"role": "assistant", "content": None, "reasoning_content": "because"}
    conversation: list[dict[str, Any]] = [
        *HELLO,
        {**turn, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]

    await service.complete(
        conversation, model, "openai", service="openai", tools=[TOOL]
    )

    assert ("because" in server.requests[-1].body.decode()) is is_kept
