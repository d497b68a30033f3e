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
JSONObject = dict[str, Any]


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
    # Check str and dict first: isinstance(x, Mapping) is slow.
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, Mapping)):
        return {k: copy_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_json(v) for v in value]
    return value


def copy_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Copy the messages that are not empty; some providers answer 400 to an empty one."""
    return [
        copy_json(message)
        for message in messages
        if message.get("role") in {"tool", "function"}
        or _has_calls(message)
        or has_content(message.get("content"))
    ]


def _has_calls(message: Mapping[str, Any]) -> bool:
    calls = message.get("tool_calls") or message.get("function_call")
    return message.get("role") == "assistant" and bool(calls)


@dataclass(frozen=True, slots=True, eq=False)
class _OpenCall:
    """A call of a tool that waits for its result."""

    id: str
    """As the conversation has it."""
    call: JSONObject


def complete_tool_turns(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose calls of tools and results are in one form.

    The form that `tool_calls` replaced, `function_call`, becomes `tool_calls`. Each call
    gets an id and arguments as a JSON object, and each result the id of its call, where
    the conversation leaves them out; a result without content is an empty text.

    Raises:
        InvalidRequestError: A call has no name, or its arguments are not a JSON object,
            such as those of an answer that was cut off; a call has no result before the
            conversation goes on, or a result has no call. OpenAI, Anthropic and Google
            answer 400 to these.
    """
    open_calls: list[_OpenCall] = []
    complete = []
    for number, message in enumerate(messages):
        role = message["role"]
        if role in {"tool", "function"}:
            complete.append(_complete_result(number, message, open_calls))
            continue
        if role in {"user", "assistant"} and open_calls:
            raise _unanswered(open_calls)
        calls, legacy = (
            message.pop("tool_calls", None),
            message.pop("function_call", None),
        )
        if role == "assistant" and (calls or legacy):
            message["tool_calls"] = calls = calls or [{"function": legacy}]
            for index, call in enumerate(_check_calls(number, calls)):
                _complete_call(number, index, call, open_calls)
        complete.append(message)
    if open_calls:
        raise _unanswered(open_calls)
    return complete


def _check_calls(number: int, calls: Any) -> list[JSONObject]:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not (isinstance(name, str) and name):
            raise InvalidRequestError(
                f"`tool_calls` of message {number} must be a list of dicts such as"
                ' {"id": …, "type": "function", "function": {"name": …, "arguments": …}}'
            )
    return list(calls)


def _complete_call(
    number: int, index: int, call: JSONObject, open_calls: list[_OpenCall]
) -> None:
    """Complete a call in place, and add it to those that wait for a result."""
    given = call.get("id")
    call["id"] = f"call_{number}_{index}" if given in (None, "") else str(given)
    call.setdefault("type", "function")
    open_calls.append(_OpenCall(call["id"], call))
    if any(other.call["id"] == call["id"] for other in open_calls[:-1]):
        call["id"] += f"_{index}"  # some servers give every call the same id
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        function["arguments"] = _to_json(number, function["name"], arguments)
    elif arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        # vLLM fails at an empty text, Gemini gets invented arguments for it, Ollama's
        # translation raises.
        function["arguments"] = "{}"
    elif not _is_json_object(arguments):
        raise InvalidRequestError(
            f"message {number} calls {function['name']!r} with arguments that are not a"
            " JSON object; leave the call out, or complete them"
        )


def _to_json(number: int, name: str, arguments: JSONObject) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequestError(
            f"message {number} calls {name!r} with arguments that cannot be JSON: {exc}"
        ) from None


def _complete_result(
    number: int, message: Message, open_calls: list[_OpenCall]
) -> Message:
    """Return the result of a tool with the id of its call, which is answered then."""
    given, name = message.get("tool_call_id"), message.get("name")
    fitting = [
        each
        for each in open_calls
        if given in (None, "", each.id) or str(given) == each.id
    ]
    named = [each for each in fitting if each.call["function"]["name"] == name]
    if not fitting or (given in (None, "") and name and not named):
        raise InvalidRequestError(
            f"message {number} is the result of a tool, but no call with its id"
            f" ({given!r}) waits for one; append `ChatResult.to_messages()` before the"
            " results"
        )
    answered = (named or fitting)[0]
    open_calls.remove(answered)
    content = message.get("content") or ""
    call_id = answered.call["id"]
    return {**message, "role": "tool", "tool_call_id": call_id, "content": content}


def _unanswered(open_calls: Sequence[_OpenCall]) -> InvalidRequestError:
    names = ", ".join(f"{o.call['function']['name']} ({o.id})" for o in open_calls)
    return InvalidRequestError(
        f"calls of tools have no result: {names}; append `ToolCall.to_message(…)` of each"
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
    if not holders:
        return
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
    is_plain = all(
        set(part) == {"type", "text"} and part["type"] == "text" for part in prompts
    )
    joined = "\n\n".join(part["text"] for part in prompts) if is_plain else prompts
    return [{"role": "system", "content": joined}, *spoken]
