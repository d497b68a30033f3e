"""The first half of a translation: a request as LiteLLM's functions take it.

Pure. Holds what the formats share: a copy that LiteLLM may change, the fields a message
may have, and the steps that several providers need.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from dipeo_llm.errors import InvalidRequestError
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


def complete_arguments(messages: Sequence[Message]) -> None:
    """Write the arguments of tool calls as JSON objects, in place; none are "{}".

    vLLM fails at an empty text, Gemini gets invented arguments for it, Ollama's
    translation raises.

    Raises:
        InvalidRequestError: The arguments are not a JSON object, such as those of an
            answer that was cut off.
    """
    for number, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            if not isinstance(function, dict):
                continue
            given = function.get("arguments")
            if isinstance(given, dict):
                function["arguments"] = json.dumps(given, ensure_ascii=False)
            elif given is None or (isinstance(given, str) and not given.strip()):
                function["arguments"] = "{}"
            elif not _is_json_object(given):
                raise InvalidRequestError(
                    f"message {number} calls {function.get('name')!r} with arguments that"
                    " are not a JSON object; leave the call out, or complete them"
                )


def _is_json_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def rename_tools(
    prepared: PreparedRequest, valid: re.Pattern[str], longest: int
) -> None:
    """Give tools whose names the provider refuses a name that it takes, in place.

    The caller's names come back with the answer, also where two names would become the
    same.

    Args:
        prepared: The request; its `tool_names` get the caller's name of each new one.
        valid: Matches a whole valid name.
        longest: Most characters of a name.
    """
    holders = list(_name_holders(prepared))
    taken = {holder["name"] for holder in holders}
    new_names: dict[str, str] = {}
    for name in sorted(taken):
        if valid.fullmatch(name):
            continue
        made = re.sub(r"[^a-zA-Z0-9_-]", "_", name)
        if not valid.fullmatch(made):
            made = f"tool_{made}"
        if len(made) > longest or made in taken:
            made = f"{made[: longest - 9]}_{blake2b(name.encode(), digest_size=4).hexdigest()}"
        taken.add(made)
        new_names[name] = made
        prepared.tool_names[made] = name
    for holder in holders:
        holder["name"] = new_names.get(holder["name"], holder["name"])


def _name_holders(prepared: PreparedRequest) -> Iterator[dict[str, Any]]:
    """Yield every dict of a request whose `name` is a function's."""
    choice = prepared.options.get("tool_choice")
    calls = [
        call
        for message in prepared.messages
        for call in message.get("tool_calls") or ()
    ]
    for owner in (*prepared.options.get("tools", ()), *calls, choice):
        function = owner.get("function") if isinstance(owner, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function
    for message in prepared.messages:
        if message.get("role") == "tool" and isinstance(message.get("name"), str):
            yield message


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
