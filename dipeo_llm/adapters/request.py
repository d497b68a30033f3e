"""The first half of a translation: a request as LiteLLM's functions take it.

Pure. Holds what the formats share: a copy that LiteLLM may change, the fields a message
may have, and the steps that several providers need.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dipeo_llm.message_formatter import has_content

Message = dict[str, Any]


@dataclass(slots=True)
class PreparedRequest:
    """A request in OpenAI's words, ready for LiteLLM's translation."""

    messages: list[Message] = field(repr=False)
    options: dict[str, Any] = field(repr=False)
    """Options under OpenAI's names, `tools` and `response_format` among them."""
    tool_names: dict[str, str] = field(default_factory=dict)
    """The caller's name of each tool that is sent under another one."""


# An allow-list, because LiteLLM reads fields of its own: it fetches the URLs of an
# assistant's `images` itself, on the event loop (_gemini_convert_messages_with_history
# in its llms/vertex_ai/gemini/transformation.py, 1.105 to 1.110).
OPENAI_FIELDS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio"}
)
COMMON_FIELDS = OPENAI_FIELDS | {
    "cache_control",
    "function_call",
    "prefix",
    "provider_specific_fields",
}


def copy_json(value: Any) -> Any:
    """Copy lists and dicts, which LiteLLM changes in place; share the leaves."""
    if isinstance(value, Mapping):
        return {k: copy_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [copy_json(v) for v in value]
    return value


def copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copy the messages that are not empty; some providers answer 400 to an empty one."""
    return [
        copy_json(message)
        for message in messages
        if message.get("role") == "tool"
        or message.get("tool_calls")
        or has_content(message.get("content"))
    ]


def keep_fields(
    messages: Sequence[Message], fields: Collection[str], *, system_role: str = "system"
) -> list[Message]:
    """Keep only these fields, and give system prompts the provider's role."""
    kept = []
    for message in messages:
        made = {k: v for k, v in message.items() if k in fields}
        if made["role"] in {"system", "developer"}:
            made["role"] = system_role
        kept.append(made)
    return kept


def drop_cache_control(messages: Sequence[Message]) -> None:
    """Take `cache_control` out of the parts of messages, in place."""
    for message in messages:
        if isinstance(content := message.get("content"), list):
            message["content"] = [
                {k: v for k, v in part.items() if k != "cache_control"}
                if isinstance(part, Mapping)
                else part
                for part in content
            ]


def put_system_first(
    messages: Sequence[Message], fields: Collection[str]
) -> list[Message]:
    """Join all system prompts into one in front, and let a user speak first.

    Anthropic and Google take one system prompt, outside the conversation, and a
    conversation that begins with the user.
    """
    prompts: list[Any] = []
    spoken: list[Message] = []
    for message in keep_fields(messages, fields):
        if message["role"] != "system":
            spoken.append(message)
        elif isinstance(content := message["content"], str):
            prompts.append({"type": "text", "text": content})
        else:
            prompts += content
    if spoken and spoken[0]["role"] == "assistant":
        spoken.insert(0, {"role": "user", "content": "."})
    if not prompts:
        return spoken
    is_plain = all(set(part) == {"type", "text"} for part in prompts)
    joined = "\n\n".join(part["text"] for part in prompts) if is_plain else prompts
    return [{"role": "system", "content": joined}, *spoken]
