"""The rules of OpenAI's chat completions, `POST /v1/chat/completions`.

Source: https://platform.openai.com/docs/api-reference/chat/create (2026-11-25). What
differs by model stands in `openai_models`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.provider_rules import openai_models as models
from tests.provider_rules.schemas import (
    Check,
    Json,
    anything,
    array,
    boolean,
    head,
    integer,
    known_fields,
    number,
    obj,
    one_of,
    parse_object,
    string,
    texts,
)


def _stop(value: Any) -> str | None:
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return f"must be a string or an array of strings, is {value!r}"
    return None if len(value) <= 4 else f"has {len(value)} strings, at most 4"


FIELDS: dict[str, Check] = {
    "model": string,
    "messages": array,
    "audio": obj,
    "frequency_penalty": number(-2, 2),
    "function_call": anything,
    "functions": array,
    "logit_bias": obj,
    "logprobs": boolean,
    "max_completion_tokens": integer(1),
    "max_tokens": integer(1),
    "metadata": obj,
    "modalities": array,
    "moderation": anything,
    "n": integer(1, 128),
    "parallel_tool_calls": boolean,
    "prediction": obj,
    "presence_penalty": number(-2, 2),
    "prompt_cache_key": string,
    "prompt_cache_options": obj,
    "prompt_cache_retention": string,
    "reasoning_effort": one_of(
        "none", "minimal", "low", "medium", "high", "xhigh", "max"
    ),
    "response_format": obj,
    "safety_identifier": string,
    "seed": integer(-(2**63), 2**63 - 1),
    "service_tier": one_of("auto", "default", "flex", "scale", "priority"),
    "stop": _stop,
    "store": boolean,
    "stream": boolean,
    "stream_options": obj,
    "temperature": number(0, 2),
    "tool_choice": anything,
    "tools": array,
    "top_logprobs": integer(0, 20),
    "top_p": number(0, 1),
    "user": string,
    "verbosity": one_of("low", "medium", "high"),
    "web_search_options": obj,
}


def complaints(
    method: str, path: str, headers: Mapping[str, str], body: Json
) -> Iterator[str]:
    """Yield what OpenAI would refuse of a chat completion, and as `Lost` what it would pass over."""
    yield from head(method, path, headers, "authorization")
    if not path.partition("?")[0].endswith("/chat/completions"):
        yield f"path: {path!r} is not /chat/completions"
    model = body.get("model")
    if not isinstance(model, str) or not model:
        yield "model: you must provide a model parameter"
        return
    own = models.own(model)
    known = {k: v for k, v in body.items() if own or k in FIELDS}
    yield from known_fields("", known, FIELDS, null=True)
    yield from _messages(body.get("messages"), own=own)
    yield from _tools(body)
    yield from _format(body, model)
    if (options := body.get("stream_options")) is not None:
        if not body.get("stream"):
            yield "stream_options: only allowed when 'stream' is enabled"
        yield from known_fields(
            "stream_options",
            options,
            {"include_usage": boolean, "include_obfuscation": boolean},
        )
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        yield "top_logprobs: needs logprobs"
    if own:
        yield from _by_model(body, model, at_openai=_at_openai(headers))


def _at_openai(headers: Mapping[str, str]) -> bool:
    """Say whether a request goes to OpenAI itself: another host may have no /responses."""
    host = next((v for k, v in headers.items() if k.lower() == "host"), "")
    return host.partition(":")[0] in ("", "api.openai.com")


def _by_model(body: Json, model: str, *, at_openai: bool) -> Iterator[str]:
    effort = body.get("reasoning_effort")
    if models.responses_only(model):
        yield f"path: {model} is served at /v1/responses only"
    tools = [t for t in body.get("tools") or () if isinstance(t, Mapping)]
    functions = any(tool.get("type") == "function" for tool in tools)
    if at_openai and functions and models.tools_need_responses(model, effort):
        yield (
            f"tools: {model} takes function tools here with reasoning_effort 'none'"
            " only; use /v1/responses"
        )
    yield from models.option_violations(
        body, model, effort, effort_at="reasoning_effort", chat=True
    )
    yield from _tokens(body, model)
    name = models.series(model)
    # "Unsupported parameter: 'stop' is not supported with this model." (a recorded
    # answer of gpt-5-mini; "not supported with latest reasoning models `o3` and
    # `o4-mini`" in the reference).
    if body.get("stop") and (
        re.fullmatch(r"o[34](?:-mini)?", name)
        or (re.match(r"gpt-[5-9]", name) and models.reasons(model))
    ):
        yield f"stop: {model} does not take it"
    if "parallel_tool_calls" in body and re.match(r"o[1-4]", name):
        yield f"parallel_tool_calls: {model} does not take it"
    if models.searches(model):
        for refused in models.SEARCH_REFUSES:
            if body.get(refused) is not None:
                yield f"{refused}: {model} does not take it"
    elif "web_search_options" in body:
        yield f"web_search_options: {model} does not search the web here"
    if re.fullmatch(r"gpt-audio.*|gpt-4o(?:-mini)?-audio-preview", name):
        spoken = "audio" in (body.get("modalities") or ())
        if not spoken and '"input_audio"' not in texts(body.get("messages")):
            yield "modalities: this model needs audio in the input or in the output"


def _tokens(body: Json, model: str) -> Iterator[str]:
    if body.get("max_tokens") is not None:
        if models.reasons(model):
            yield f"max_tokens: {model} takes max_completion_tokens"
        if body.get("max_completion_tokens") is not None:
            yield "max_tokens: not beside max_completion_tokens"
    limit = models.most_tokens(model)
    for name in ("max_tokens", "max_completion_tokens"):
        asked = body.get(name)
        if isinstance(asked, int) and limit is not None and asked > limit:
            yield f"{name}: is too large: {asked}; {model} gives at most {limit}"


# --- Messages --------------------------------------------------------------------------

_PARTS = {
    "system": {"text"},
    "developer": {"text"},
    "tool": {"text"},
    "user": {"text", "image_url", "input_audio", "file"},
    "assistant": {"text", "refusal"},
}
_MESSAGE_FIELDS = {
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "refusal",
    "audio",
    "function_call",
    "annotations",
}
_AUTHOR = re.compile(r"[^\s<|\\/>]+")


def _messages(messages: Any, *, own: bool) -> Iterator[str]:
    if not isinstance(messages, list):
        yield "messages: missing"
        return
    if not messages:
        yield "messages: empty array"
    waiting: list[str] = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, Mapping):
            yield f"{at}: must be an object, is {message!r}"
            continue
        role = message.get("role")
        if role not in (*_PARTS, "function"):
            yield f"{at}.role: invalid value {role!r}"
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                if not own:
                    continue  # Ollama's server with this format takes it
                yield f"{at}.tool_call_id: answers no call of the message before"
            else:
                waiting.remove(message["tool_call_id"])
        elif waiting and own:
            yield f"{at}: the calls {', '.join(waiting)} have no result before it"
            waiting = []
        if own:
            for field in sorted(set(message) - _MESSAGE_FIELDS):
                yield f"{at}.{field}: unknown field"
        if message.get("name") is not None and not _AUTHOR.fullmatch(
            str(message["name"])
        ):
            yield f"{at}.name: has a space or one of <|\\/>"
        yield from _content(at, message)
        if "tool_calls" in message:
            if role != "assistant":
                yield f"{at}.tool_calls: only an assistant calls tools"
            yield from _calls(f"{at}.tool_calls", message["tool_calls"])
            if isinstance(message["tool_calls"], list):
                waiting = [
                    str(call.get("id"))
                    for call in message["tool_calls"]
                    if isinstance(call, Mapping)
                ]
    if waiting and own:
        yield f"messages: the calls {', '.join(waiting)} have no result"


def _content(at: str, message: Json) -> Iterator[str]:
    content, role = message.get("content"), message.get("role")
    if content is None:
        excused = role == "function" or (
            role == "assistant"
            and any(
                message.get(k)
                for k in ("tool_calls", "function_call", "refusal", "audio")
            )
        )
        if not excused:
            yield f"{at}.content: expected a string, got null"
    elif isinstance(content, list):
        if not content:
            yield f"{at}.content: empty array"
        for j, part in enumerate(content):
            yield from _part(f"{at}.content[{j}]", part, str(role))
    elif not isinstance(content, str):
        yield f"{at}.content: must be a string or an array, is {content!r}"


_PART_FIELDS = {
    "text": {"text": string},
    "refusal": {"refusal": string},
    "image_url": {"image_url": obj},
    "input_audio": {"input_audio": obj},
    "file": {"file": obj},
}


def _part(at: str, part: Any, role: str) -> Iterator[str]:
    if not isinstance(part, Mapping) or "type" not in part:
        yield f"{at}.type: missing"
        return
    kind = part["type"]
    if kind not in _PARTS.get(role, {"text"}):
        yield f"{at}.type: {kind!r} is not taken from a {role}"
        return
    fields = _PART_FIELDS[str(kind)]
    table: dict[str, Check] = {"type": string, **fields, "prompt_cache_key": anything}
    yield from known_fields(at, part, table)
    for name in fields:
        if name not in part:
            yield f"{at}.{name}: missing"
    if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
        image = part["image_url"]
        if not re.match(
            r"https?://|data:image/[\w.+-]+;base64,", str(image.get("url"))
        ):
            yield f"{at}.image_url.url: must be a URL or base64 data of an image"
        yield from known_fields(
            f"{at}.image_url",
            image,
            {"url": string, "detail": one_of("auto", "low", "high", "original")},
        )


def _calls(at: str, calls: Any) -> Iterator[str]:
    if not isinstance(calls, list) or not calls:
        yield f"{at}: must be a non-empty array, is {calls!r}"
        return
    seen: set[str] = set()
    for i, call in enumerate(calls):
        where = f"{at}[{i}]"
        if not isinstance(call, Mapping):
            yield f"{where}: must be an object, is {call!r}"
            continue
        made_by = call.get("id")
        if not isinstance(made_by, str) or not made_by:
            yield f"{where}.id: must be a non-empty string, is {made_by!r}"
        elif made_by in seen:
            yield f"{where}.id: {made_by!r} stands twice"
        elif len(made_by) > 64:
            yield f"{where}.id: has {len(made_by)} characters, at most 64"
        seen.add(str(made_by))
        if call.get("type") == "custom":
            continue
        if call.get("type") != "function":
            yield f"{where}.type: must be 'function', is {call.get('type')!r}"
        function = call.get("function")
        if not isinstance(function, Mapping):
            yield f"{where}.function: must be an object, is {function!r}"
            continue
        yield from models.name_violations(
            f"{where}.function.name", function.get("name")
        )
        # OpenAI reads the text as it is; servers with its format parse it (vLLM answers
        # 500 to "": https://github.com/vllm-project/vllm/issues/20611, 2025-07-08).
        if wrong := parse_object(function.get("arguments")):
            yield f"{where}.function.arguments: {wrong}"


# --- Tools and formats -----------------------------------------------------------------


def _tools(body: Json) -> Iterator[str]:
    tools = body.get("tools")
    if tools is None:
        for name in ("tool_choice", "parallel_tool_calls"):
            if body.get(name) is not None and body.get(name) != "none":
                yield f"{name}: only allowed when 'tools' are specified"
        return
    if not isinstance(tools, list):
        return
    if not 1 <= len(tools) <= 128:
        yield f"tools: has {len(tools)}, 1 to 128 are taken"
    names = []
    for i, tool in enumerate(tools):
        at = f"tools[{i}]"
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind == "function":
            yield from known_fields(at, tool, {"type": string, "function": obj})
            function = tool.get("function")
            if isinstance(function, Mapping):
                names.append(function.get("name"))
                yield from known_fields(
                    f"{at}.function",
                    function,
                    {
                        "name": string,
                        "description": string,
                        "parameters": obj,
                        "strict": anything,
                    },
                    null=True,
                )
            yield from models.function_violations(f"{at}.function", function)
        elif kind == "custom":
            names.append((tool.get("custom") or {}).get("name"))
        else:
            # It answers: "Invalid value: 'web_search'. Supported values are: 'function' and 'custom'."
            yield f"{at}.type: {kind!r} is not taken here, only 'function' and 'custom'"
    yield from _choice(body.get("tool_choice"), names)


def _choice(choice: Any, names: list[Any]) -> Iterator[str]:
    if choice is None or choice in ("none", "auto", "required"):
        return
    if not isinstance(choice, Mapping):
        yield f"tool_choice: must be none, auto, required or an object, is {choice!r}"
    elif choice.get("type") in ("function", "custom"):
        inner = choice.get(str(choice["type"]))
        if set(choice) != {"type", choice["type"]} or not isinstance(inner, Mapping):
            yield f"tool_choice.{choice['type']}: missing, the name belongs in it"
        elif inner.get("name") not in names:
            yield f"tool_choice: {inner.get('name')!r} is not among the tools"
    elif choice.get("type") != "allowed_tools":
        yield f"tool_choice.type: invalid value {choice.get('type')!r}"


def _format(body: Json, model: str) -> Iterator[str]:
    form = body.get("response_format")
    if not isinstance(form, Mapping):
        return
    kind = form.get("type")
    if kind == "json_schema":
        inner = form.get("json_schema")
        if not isinstance(inner, Mapping):
            yield "response_format.json_schema: missing"
        else:
            yield from models.format_violations(
                "response_format.json_schema", inner, model
            )
    elif kind == "json_object":
        # "'messages' must contain the word 'json' in some form"
        if "json" not in texts(body.get("messages")).lower():
            yield "messages: must contain the word 'json' beside json_object"
        if models.own(model) and not models.takes_json_mode(model):
            yield f"response_format.type: {model} has no JSON mode"
    elif kind != "text":
        yield f"response_format.type: invalid value {kind!r}"
