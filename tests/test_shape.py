"""Which fields of a message reach LiteLLM."""

from typing import Any

import pytest

from dipeo_llm.adapters.factory import create_adapter
from dipeo_llm.domain import ChatRequest, ChatResult, ToolCall

EVERYWHERE = ["openai", "anthropic", "google", "ollama", "deepseek", "vertex", "groq"]


def prepare(provider: str, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Prepare some messages in a conversation that gives calls and results their other."""
    first = {"role": "user", "content": "Hello"}
    before: tuple[dict[str, Any], ...] = ()
    after: tuple[dict[str, Any], ...] = ()
    if messages[0]["role"] in {"tool", "function"}:
        call = {"role": "assistant", "content": "b", "tool_calls": [CALL]}
        before = (call,)
    if messages[-1].get("tool_calls"):
        after = ({"role": "tool", "content": "r", "tool_call_id": "a", "name": "f"},)
    adapter = create_adapter(provider, "a-model", "k", "http://127.0.0.1:9")
    request = ChatRequest(messages=[first, *before, *messages, *after])
    made = adapter.prepare(request).messages
    return made[1 + len(before) : len(made) - len(after)]


@pytest.mark.parametrize("provider", EVERYWHERE)
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "function"])
def test_a_field_that_nobody_knows_reaches_no_provider(
    provider: str, role: str
) -> None:
    """LiteLLM fetches the URLs of `images`; what else it may come to read is out too."""
    url = {"image_url": {"url": "http://evil.example/a.png"}}
    message = {"role": role, "content": "b", "tool_call_id": "a", "name": "f"}

    (got,) = prepare(
        provider, {**message, "images": [url], "video": url, "file": url, "x": url}
    )

    assert set(got) <= set(message)
    assert "evil" not in str(got)


CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "f", "arguments": "{}"},
    "provider_specific_fields": {"thought_signature": "c2ln"},
}
SAID: dict[str, Any] = {
    "role": "assistant",
    "content": "b",
    "name": "me",
    "tool_calls": [CALL],
    "reasoning_content": "Hm.",
    "thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}],
    "provider_specific_fields": {"thought_signatures": ["c2ln"]},
    "cache_control": {"type": "ephemeral"},
    "prefix": True,
}


@pytest.mark.parametrize(
    ("provider", "lacks"),
    [
        ("anthropic", {"reasoning_content"}),
        ("google", {"reasoning_content", "thinking_blocks"}),
        ("ollama", {"thinking_blocks"}),
        ("vertex", {"reasoning_content", "thinking_blocks"}),
        ("bedrock", {"thinking_blocks"}),
    ],
)
def test_what_a_turn_needs_again_goes_along(provider: str, lacks: set[str]) -> None:
    """Signatures, thoughts and marks of the cache are no strangers."""
    (got,) = prepare(provider, SAID)

    assert got == {k: v for k, v in SAID.items() if k not in lacks}


@pytest.mark.parametrize("provider", ["anthropic", "google", "ollama"])
def test_a_result_goes_back_whole(provider: str) -> None:
    """What `to_messages` writes is not cut, but for what its provider has no use for."""
    result = ChatResult(
        text="b",
        model="a-model",
        provider=provider,
        reasoning="Hm.",
        tool_calls=[
            ToolCall(
                id="a",
                name="f",
                arguments={},
                arguments_text="{}",
                thought_signature="s",
            )
        ],
    )
    (message,) = result.to_messages()
    expected = dict(message)
    if provider != "ollama":
        del expected["reasoning_content"]

    assert prepare(provider, message) == [expected]
