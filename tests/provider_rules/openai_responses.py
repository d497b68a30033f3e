"""The rules of OpenAI's Responses endpoint, `POST /v1/responses`.

Source: https://platform.openai.com/docs/api-reference/responses/create (2026-11-25).
What differs by model stands in `openai_models`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.provider_rules import openai_models as models
from tests.provider_rules.schemas import (
    Check,
    Json,
    Lost,
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

FIELDS: dict[str, Check] = {
    "model": string,
    "input": anything,
    "background": boolean,
    "context_management": anything,
    "conversation": anything,
    "include": array,
    "instructions": anything,
    "max_output_tokens": integer(16),
    "max_tool_calls": integer(1),
    "metadata": obj,
    "moderation": anything,
    "parallel_tool_calls": boolean,
    "previous_response_id": string,
    "prompt": obj,
    "prompt_cache_key": string,
    "prompt_cache_options": obj,
    "prompt_cache_retention": string,
    "reasoning": obj,
    "safety_identifier": string,
    "service_tier": one_of("auto", "default", "flex", "scale", "priority"),
    "store": boolean,
    "stream": boolean,
    "stream_options": obj,
    "temperature": number(0, 2),
    "text": obj,
    "tool_choice": anything,
    "tools": array,
    "top_logprobs": integer(0, 20),
    "top_p": number(0, 1),
    "truncation": one_of("auto", "disabled"),
    "user": string,
}
_REASONING: dict[str, Check] = {
    "effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "summary": one_of("auto", "concise", "detailed"),
    "generate_summary": string,
    "mode": string,
    "context": string,
}
_TEXT: dict[str, Check] = {
    "format": obj,
    "verbosity": one_of("low", "medium", "high"),
}


def complaints(
    method: str, path: str, headers: Mapping[str, str], body: Json
) -> Iterator[str]:
    """Yield what OpenAI would refuse of a response, and as `Lost` what it would pass over."""
    yield from head(method, path, headers, "authorization")
    if not path.partition("?")[0].endswith("/responses"):
        yield f"path: {path!r} is not /responses"
    yield from known_fields("", body, FIELDS, null=True)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        if not body.get("prompt"):
            yield "model: missing"
        model = ""
    if body.get("input") in (None, "", []) and not body.get("prompt"):
        yield "input: missing"
    yield from _input(body.get("input"))
    if body.get("reasoning") is not None:
        yield from known_fields("reasoning", body["reasoning"], _REASONING, null=True)
    if body.get("text") is not None:
        yield from known_fields("text", body["text"], _TEXT, null=True)
        yield from _format(body, model)
    yield from _tools(body, model)
    if models.own(model):
        yield from _by_model(body, model)


def _by_model(body: Json, model: str) -> Iterator[str]:
    effort = (body.get("reasoning") or {}).get("effort")
    yield from models.option_violations(
        body, model, effort, effort_at="reasoning.effort", chat=False
    )
    limit, asked = models.most_tokens(model), body.get("max_output_tokens")
    if isinstance(asked, int) and limit is not None and asked > limit:
        yield f"max_output_tokens: is too large: {asked}; {model} gives at most {limit}"
    name = models.series(model)
    kinds = {t.get("type") for t in body.get("tools") or () if isinstance(t, Mapping)}
    searching = {k for k in kinds if str(k).startswith("web_search")}
    # https://developers.openai.com/api/docs/guides/tools-web-search, "Limitations".
    if searching and name.startswith("gpt-4.1-nano"):
        yield f"tools: {model} does not search the web"
    if searching and effort == "minimal":
        yield "tools: web_search is not taken with reasoning.effort 'minimal'"
    # https://developers.openai.com/api/docs/guides/deep-research.
    if name.endswith("-deep-research"):
        if not searching and not kinds & {"mcp", "file_search"}:
            yield f"tools: {model} needs one of web_search, file_search and mcp"
        if "function" in kinds:
            yield f"tools: {model} does not call functions"
    # https://developers.openai.com/api/docs/guides/tools-computer-use.
    if name == "computer-use-preview" and body.get("truncation") != "auto":
        yield f"truncation: {model} needs 'auto'"


# --- Input -----------------------------------------------------------------------------

_PARTS = {
    "assistant": {"output_text", "refusal", "input_text"},
    "user": {"input_text", "input_image", "input_file", "input_audio"},
}
_PART_FIELDS = {
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_MESSAGE_FIELDS = {"type", "role", "content", "id", "status", "phase"}


def _input(value: Any) -> Iterator[str]:
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list):
        yield f"input: must be a string or an array, is {value!r}"
        return
    called: set[str] = set()
    answered: set[str] = set()
    for i, item in enumerate(value):
        at = f"input[{i}]"
        if not isinstance(item, Mapping):
            yield f"{at}: must be an object, is {item!r}"
            continue
        kind = item.get("type", "message")
        if kind == "message":
            yield from _message(at, item)
        elif kind == "function_call":
            yield from _call(at, item)
            called.add(str(item.get("call_id")))
        elif kind == "function_call_output":
            if item.get("call_id") not in called:
                # "No tool call found for function call output with call_id …"
                yield f"{at}.call_id: answers no call before it"
            answered.add(str(item.get("call_id")))
            if not isinstance(item.get("output"), str | list):
                yield f"{at}.output: must be a string or an array"
        elif not isinstance(kind, str) or not re.fullmatch(r"[a-z_]+", kind):
            yield f"{at}.type: invalid value {kind!r}"
    if missing := sorted(called - answered):
        # "No tool output found for function call …"
        yield f"input: the calls {', '.join(missing)} have no output"


def _message(at: str, item: Json) -> Iterator[str]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        yield f"{at}.role: invalid value {role!r}"
    for name in sorted(set(item) - _MESSAGE_FIELDS):
        yield f"{at}.{name}: unknown field"
    content = item.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        yield f"{at}.content: must be a string or a non-empty array, is {content!r}"
        return
    taken = _PARTS.get(str(role), _PARTS["user"])
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in taken:
            # It answers: "Invalid value: 'text'. Supported values are: 'input_text', …"
            yield f"{at}.content[{j}].type: {kind!r} is not taken from a {role}"
            continue
        field = _PART_FIELDS.get(str(kind))
        if field and not isinstance(part.get(field), str):
            yield f"{at}.content[{j}].{field}: must be a string"
        if kind == "input_image" and not (part.get("image_url") or part.get("file_id")):
            yield f"{at}.content[{j}]: needs image_url or file_id"
        if kind == "input_image" and not isinstance(
            part.get("image_url", ""), str | None
        ):
            yield f"{at}.content[{j}].image_url: must be a string"
        if kind == "input_file" and not (
            part.get("file_id") or part.get("file_url") or part.get("file_data")
        ):
            yield f"{at}.content[{j}]: needs file_id, file_url or file_data"


def _call(at: str, item: Json) -> Iterator[str]:
    ref = item.get("call_id")
    if not isinstance(ref, str) or not 1 <= len(ref) <= 64:
        yield f"{at}.call_id: must be a string of 1 to 64 characters, is {ref!r}"
    yield from models.name_violations(f"{at}.name", item.get("name"))
    if wrong := parse_object(item.get("arguments")):
        yield f"{at}.arguments: {wrong}"
    if (own := item.get("id")) is not None and not str(own).startswith("fc"):
        # It answers: "Invalid 'input[2].id': … Expected an ID that begins with 'fc'."
        yield f"{at}.id: must begin with 'fc', is {own!r}"


# --- Tools and formats -----------------------------------------------------------------

_FUNCTION: dict[str, Check] = {
    "type": string,
    "name": string,
    "description": string,
    "parameters": obj,
    "strict": anything,
    "defer_loading": boolean,
    "output_schema": obj,
    "allowed_callers": array,
}
_PROVIDED = re.compile(
    r"web_search(?:_preview)?(?:_\d{4}_\d\d_\d\d)?|file_search|code_interpreter|mcp"
    r"|image_generation|computer(?:_use)?(?:_preview)?|local_shell|shell|apply_patch"
    r"|custom|namespace|tool_search|programmatic_tool_calling"
)


def _tools(body: Json, model: str) -> Iterator[str]:
    tools = body.get("tools")
    if tools is None:
        if body.get("tool_choice") not in (None, "none", "auto"):
            yield "tool_choice: only allowed when 'tools' are specified"
        return
    if not isinstance(tools, list):
        return
    if len(tools) > 128:
        yield f"tools: has {len(tools)}, at most 128"
    names, kinds = [], []
    for i, tool in enumerate(tools):
        at = f"tools[{i}]"
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        kinds.append(kind)
        if kind == "function":
            if "function" in tool:
                # It answers: "Missing required parameter: 'tools[0].name'."
                yield f"{at}.function: is chat's form; the name belongs in the tool"
                continue
            names.append(tool.get("name"))
            yield from known_fields(at, tool, _FUNCTION, null=True)
            yield from models.function_violations(at, tool)
            # Left out, strict is true here, and optional parameters become required:
            # https://developers.openai.com/api/docs/guides/function-calling.
            if tool.get("strict") is None and any(
                models.strict_violations(tool.get("parameters") or {}, "parameters")
            ):
                yield Lost(
                    f"{at}.strict: missing, so that every parameter becomes required"
                )
        elif not isinstance(kind, str) or not _PROVIDED.fullmatch(kind):
            yield f"{at}.type: invalid value {kind!r}"
        elif kind == "custom":
            names.append(tool.get("name"))
    yield from _choice(body.get("tool_choice"), names, kinds)


def _choice(choice: Any, names: list[Any], kinds: list[Any]) -> Iterator[str]:
    if choice is None or choice in ("none", "auto", "required"):
        return
    if not isinstance(choice, Mapping):
        yield f"tool_choice: must be none, auto, required or an object, is {choice!r}"
        return
    kind = choice.get("type")
    if kind in ("function", "custom"):
        if set(choice) != {"type", "name"}:
            # It answers: "Missing required parameter: 'tool_choice.name'."
            yield "tool_choice.name: missing, the name belongs beside the type"
        elif choice["name"] not in names:
            yield f"tool_choice: {choice['name']!r} is not among the tools"
    elif kind not in ("allowed_tools", "mcp") and kind not in kinds:
        yield f"tool_choice.type: {kind!r} is not among the tools"


def _format(body: Json, model: str) -> Iterator[str]:
    form = (body.get("text") or {}).get("format")
    if not isinstance(form, Mapping):
        return
    kind = form.get("type")
    if kind == "json_schema":
        if "json_schema" in form:
            yield "text.format.json_schema: is chat's form; it is flat here"
        yield from models.format_violations("text.format", form, model)
    elif kind == "json_object":
        if "json" not in texts([body.get("input"), body.get("instructions")]).lower():
            yield "input: must contain the word 'json' beside json_object"
    elif kind != "text":
        yield f"text.format.type: invalid value {kind!r}"
