"""The rules of Anthropic's Messages API, `POST /v1/messages`.

Sources, read 2026-11-25, unless a rule names its own:
https://platform.claude.com/docs/en/api/messages (fields),
https://platform.claude.com/docs/en/about-claude/models/migration-guide and the
migration guide of each 5.5 model (what a model refuses),
https://platform.claude.com/docs/en/build-with-claude/effort (efforts),
https://platform.claude.com/docs/en/build-with-claude/extended-thinking (budgets),
https://platform.claude.com/docs/en/build-with-claude/structured-outputs (schemas).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.provider_rules.schemas import (
    ANNOTATIONS,
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
    recursive,
    references,
    string,
    subschemas,
    table_row,
    types_of,
    well_formed,
)


@dataclass(frozen=True)
class Series:
    """What a series of models takes."""

    most_tokens: int
    thinking: tuple[str, ...] = ()
    """Values of thinking.type."""
    always_thinks: bool = False
    """Thinks with no `thinking` field, so that no tool can be forced."""
    efforts: tuple[str, ...] = ()
    sampling: bool = True
    """Takes temperature, top_p and top_k."""
    both: bool = False
    """Takes temperature beside top_p."""
    prefill: bool = True
    """May end with an assistant's turn."""
    forced_beside_adaptive: bool = True
    schema: bool = True
    """Takes output_format and output_config.format, and strict tools."""


_ALL = ("low", "medium", "high", "xhigh", "max")
_BUDGET = ("enabled", "disabled")
_ADAPTIVE = ("adaptive", "disabled")
_NEW = Series(128_000, _ADAPTIVE, efforts=_ALL, sampling=False, prefill=False)

# https://platform.claude.com/docs/en/models/sonnet-5-5/whats-new-sonnet-5-5,
# …/models/haiku-5-5/migration-guide, and for forced tools beside adaptive thinking
# https://github.com/langchain-ai/langchain-aws/pull/1141 (2026-07-02, tried live).
_SERIES: tuple[tuple[str, Series], ...] = (
    (
        r"claude-(?:2|instant).*",
        Series(4096, both=True, schema=False),
    ),
    (
        r"claude-3-(?:opus|sonnet|haiku).*",
        Series(4096, both=True, schema=False),
    ),
    (r"claude-3-5-.*", Series(8192, both=True, schema=False)),
    (r"claude-3-7-.*", Series(64_000, _BUDGET, both=True, schema=False)),
    (
        r"claude-opus-4(?:-0|-2025\d+)?",
        Series(32_000, _BUDGET, both=True, schema=False),
    ),
    (
        r"claude-sonnet-4(?:-0|-2025\d+)?",
        Series(64_000, _BUDGET, both=True, schema=False),
    ),
    (r"claude-opus-4-1.*", Series(32_000, _BUDGET)),
    (r"claude-(?:sonnet|haiku)-4-5.*", Series(64_000, _BUDGET)),
    (r"claude-opus-4-5.*", Series(64_000, _BUDGET, efforts=_ALL[:3])),
    (
        r"claude-(?:opus|sonnet)-4-6.*",
        Series(
            128_000,
            ("enabled", *_ADAPTIVE),
            efforts=("low", "medium", "high", "max"),
            prefill=False,
            forced_beside_adaptive=False,
        ),
    ),
    (r"claude-opus-4-7.*", replace(_NEW, forced_beside_adaptive=False)),
    (r"claude-opus-4-8.*", _NEW),
    (r"claude-(?:sonnet|opus)-5(?:-2026\d+)?", _NEW),
    (
        r"claude-(?:fable|mythos)-5(?:-2026\d+)?|claude-mythos-preview",
        replace(_NEW, thinking=("adaptive",)),
    ),
    (
        r"claude-(?:fable|mythos)-5-1.*|claude-opus-5-5.*|claude-(?:fable|opus)-latest",
        replace(_NEW, thinking=("adaptive",), always_thinks=True),
    ),
    (
        r"claude-sonnet-5-5.*|claude-sonnet-latest",
        replace(_NEW, thinking=("adaptive", "between_tools"), always_thinks=True),
    ),
    (r"claude-haiku-5-5.*|claude-haiku-latest", _NEW),
)


def series_of(model: str) -> Series | None:
    """Return what a model takes, or None if nothing is known of it."""
    found: Series | None = table_row(_SERIES, model)
    return found


def _metadata(value: Any) -> str | None:
    if not isinstance(value, Mapping) or set(value) - {"user_id"}:
        return f"takes user_id only, is {value!r}"
    return None


def _stops(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return f"must be an array of strings, is {value!r}"
    # It answers: "stop_sequences: each stop sequence must contain non-whitespace"
    if any(not v.strip() for v in value):
        return "each stop sequence must contain non-whitespace"
    return None


def _text_or_blocks(value: Any) -> str | None:
    return (
        None if isinstance(value, str | list) else f"must be text or blocks: {value!r}"
    )


FIELDS: dict[str, Check] = {
    "model": string,
    "messages": array,
    "max_tokens": integer(1),
    "cache_control": obj,
    "container": anything,
    "context_management": obj,
    "inference_geo": string,
    "mcp_servers": array,
    "metadata": _metadata,
    "output_config": obj,
    "output_format": obj,
    "service_tier": one_of("auto", "standard_only"),
    "speed": string,
    "stop_sequences": _stops,
    "stream": boolean,
    "system": _text_or_blocks,
    "temperature": number(0, 1),
    "thinking": obj,
    "tool_choice": obj,
    "tools": array,
    "top_k": integer(0),
    "top_p": number(0, 1),
}


def complaints(
    method: str, path: str, headers: Mapping[str, str], body: Json
) -> Iterator[str]:
    """Yield what Anthropic would refuse, and as `Lost` what it would pass over."""
    lower = {name.lower(): value for name, value in headers.items()}
    yield from head(method, path, headers, "x-api-key")
    if not lower.get("anthropic-version"):
        yield "headers.anthropic-version: missing"
    route = path.partition("?")[0]
    counting = route.endswith("/v1/messages/count_tokens")
    if not counting and not route.endswith("/v1/messages"):
        yield f"path: {route!r} is not /v1/messages"
    yield from known_fields("", body, FIELDS)
    for name in ("model", "messages", *(() if counting else ("max_tokens",))):
        if name not in body:
            yield f"{name}: field required"
    model = str(body.get("model", ""))
    series = series_of(model)
    yield from _messages(body, series)
    yield from _blocks("system", body.get("system"), {"text"})
    yield from _tools(body, series)
    yield from _thinking(body, model, series)
    yield from _output(body, model, series, lower.get("anthropic-beta", ""))
    yield from _cache(body)
    if series is not None:
        yield from _sampling(body, model, series)
        if isinstance(body.get("max_tokens"), int) and (
            body["max_tokens"] > series.most_tokens
            and "output-128k" not in lower.get("anthropic-beta", "")
        ):
            most = series.most_tokens
            yield f"max_tokens: {body['max_tokens']} > {most}, the most of {model}"


def _thinking_type(body: Json) -> str | None:
    thinking = body.get("thinking")
    return str(thinking.get("type")) if isinstance(thinking, Mapping) else None


def _sampling(body: Json, model: str, series: Series) -> Iterator[str]:
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if not series.sampling:
        # "`temperature` is deprecated for this model."
        for name, usual in (("temperature", 1), ("top_p", 1), ("top_k", None)):
            if body.get(name) not in (None, usual):
                yield f"{name}: {model} does not take it"
    elif _thinking_type(body) in ("enabled", "adaptive"):
        if temperature not in (None, 1):
            yield "temperature: may only be 1 while it thinks"
        if top_p is not None and not 0.95 <= top_p <= 1:
            yield "top_p: must be 0.95 to 1 while it thinks"
        if body.get("top_k") is not None:
            yield "top_k: must be unset while it thinks"
    if not series.both and temperature is not None and top_p is not None:
        yield f"top_p: {model} does not take it beside temperature"


def _thinking(body: Json, model: str, series: Series | None) -> Iterator[str]:
    thinking, kind = body.get("thinking"), _thinking_type(body)
    if isinstance(thinking, Mapping):
        table: dict[str, Check] = {"type": string, "display": string}
        if kind == "enabled":
            table["budget_tokens"] = integer(1024)
            if "budget_tokens" not in thinking:
                yield "thinking.budget_tokens: field required"
        yield from known_fields(
            "thinking", thinking, {**table, "block_binding": anything}
        )
        if kind not in ("enabled", "disabled", "adaptive", "between_tools"):
            yield f"thinking.type: invalid value {kind!r}"
        elif series is not None and kind not in series.thinking:
            yield f"thinking.type: {model} does not take {kind!r}"
        budget, most = thinking.get("budget_tokens"), body.get("max_tokens")
        if isinstance(budget, int) and isinstance(most, int) and budget >= most:
            yield f"thinking.budget_tokens: {budget} must be less than max_tokens {most}"
    forced = (body.get("tool_choice") or {}).get("type") in ("any", "tool")
    if not forced:
        return
    # "Thinking may not be enabled when tool_choice forces tool use."
    if kind == "enabled" or (
        kind == "adaptive" and series is not None and not series.forced_beside_adaptive
    ):
        yield "tool_choice: may not force a tool while thinking is enabled"
    if series is not None and series.always_thinks:
        yield f"tool_choice: {model} does not take a forced tool"


def _cache(body: Json) -> Iterator[str]:
    marks = sum(
        1
        for place in ("system", "messages", "tools")
        for node in _walk(body.get(place))
        if node.get("cache_control") is not None
    )
    if marks > 4:
        # "A maximum of 4 blocks with cache_control may be provided."
        yield f"cache_control: stands on {marks} blocks, at most 4"


def _walk(value: Any) -> Iterator[Json]:
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)


# --- Messages --------------------------------------------------------------------------

_BLOCKS: dict[str, dict[str, Check]] = {
    "text": {"text": string, "citations": anything},
    "image": {"source": obj},
    "document": {
        "source": obj,
        "title": string,
        "context": string,
        "citations": anything,
    },
    "search_result": {
        "source": anything,
        "title": string,
        "content": array,
        "citations": anything,
    },
    "thinking": {"thinking": string, "signature": string},
    "redacted_thinking": {"data": string},
    "tool_use": {"id": string, "name": string, "input": obj, "caller": obj},
    "tool_result": {"tool_use_id": string, "content": anything, "is_error": boolean},
    "server_tool_use": {"id": string, "name": string, "input": obj, "caller": obj},
}
_REQUIRED = {
    "text": ("text",),
    "image": ("source",),
    "document": ("source",),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "server_tool_use": ("id", "name", "input"),
}
_FROM_USER = {"text", "image", "document", "search_result", "tool_result"}
_FROM_ASSISTANT = {
    "text",
    "thinking",
    "redacted_thinking",
    "tool_use",
    "server_tool_use",
}
_ID = re.compile(r"[a-zA-Z0-9_-]+")


def _messages(body: Json, series: Series | None) -> Iterator[str]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    if not messages:
        yield "messages: at least one message is required"
    before: Json = {}
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, Mapping):
            yield f"{at}: must be an object, is {message!r}"
            continue
        role = message.get("role")
        for name in sorted(set(message) - {"role", "content"}):
            yield f"{at}.{name}: extra inputs are not permitted"
        # The newest take a system message, not as the first one.
        later = role == "system" and i and series is not None and not series.sampling
        if role not in ("user", "assistant") and not later:
            yield f"{at}.role: unexpected role {role!r}"
        if i == 0 and role == "assistant":
            yield f"{at}.role: the first message must use the 'user' role"
        content = message.get("content")
        last = i == len(messages) - 1
        if not isinstance(content, str | list):
            yield f"{at}.content: must be text or blocks, is {content!r}"
        elif not content and not (last and role == "assistant"):
            yield f"{at}.content: must be non-empty"
        elif isinstance(content, str) and not content.strip():
            yield f"{at}.content: must contain non-whitespace text"
        taken = _FROM_USER if role == "user" else _FROM_ASSISTANT
        yield from _blocks(f"{at}.content", content, taken)
        yield from _pairs(at, before, message)
        before = message
    yield from _end(body, messages, series)


def _end(body: Json, messages: list[Any], series: Series | None) -> Iterator[str]:
    if not messages or not isinstance(messages[-1], Mapping):
        return
    last = messages[-1]
    at = f"messages[{len(messages) - 1}]"
    if last.get("role") == "assistant":
        if _of(last, "tool_use"):
            yield f"{at}: tool_use ids were found without tool_result after it"
        content = last.get("content")
        paused = bool(_of(last, "server_tool_use"))
        if series is not None and not series.prefill and not paused:
            # "This model does not support assistant message prefill."
            yield f"{at}: must be the user's, this model takes no prefill"
        elif _thinking_type(body) == "enabled" and not paused:
            yield f"{at}: no prefill while thinking is enabled"
        text = (
            content[-1].get("text") if isinstance(content, list) and content else None
        )
        ending = content if isinstance(content, str) else text
        if isinstance(ending, str) and ending != ending.rstrip():
            yield f"{at}: the final assistant content cannot end with whitespace"
    elif _thinking_type(body) == "enabled" and _of(last, "tool_result"):
        # "Expected `thinking` or `redacted_thinking`, but found `tool_use`."
        turn = messages[-2].get("content") if len(messages) > 1 else None
        first = turn[0].get("type") if isinstance(turn, list) and turn else None
        if first not in ("thinking", "redacted_thinking"):
            yield f"messages[{len(messages) - 2}].content[0]: must be thinking"


def _of(message: Any, kind: str) -> list[Json]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return [
        block
        for block in (content if isinstance(content, list) else ())
        if isinstance(block, Mapping) and block.get("type") == kind
    ]


def _pairs(at: str, before: Json, message: Json) -> Iterator[str]:
    called = [b.get("id") for b in _of(before, "tool_use")]
    results = [b.get("tool_use_id") for b in _of(message, "tool_result")]
    for ref in results:
        if ref not in called:
            yield f"{at}.content: tool_use_id {ref!r} has no tool_use just before"
    for ref in called:
        if results.count(ref) != 1:
            yield f"{at}.content: the tool_use {ref!r} has {results.count(ref)} results"
    content = message.get("content")
    if results and isinstance(content, list):
        kinds = [b.get("type") for b in content if isinstance(b, Mapping)]
        if "tool_result" in kinds[kinds.count("tool_result") :]:
            yield f"{at}.content: tool_result blocks must come first"


def _blocks(at: str, content: Any, taken: set[str]) -> Iterator[str]:
    for j, block in enumerate(content if isinstance(content, list) else ()):
        where = f"{at}[{j}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(kind, str):
            yield f"{where}.type: field required"
            continue
        if kind not in _BLOCKS:
            if not kind.endswith("_tool_result") and kind != "container_upload":
                yield f"{where}.type: unknown block {kind!r}"
            continue
        if kind not in taken:
            yield f"{where}.type: {kind!r} is not taken here"
        table: dict[str, Check] = {
            "type": string,
            "cache_control": obj,
            **_BLOCKS[kind],
        }
        yield from known_fields(
            where, {k: v for k, v in block.items() if v is not None}, table
        )
        for name in _REQUIRED.get(kind, ()):
            if block.get(name) is None:
                yield f"{where}.{name}: field required"
        if kind == "text" and not str(block.get("text", "")).strip():
            yield f"{where}.text: must contain non-whitespace text"
        if kind in ("tool_use", "tool_result"):
            ref = block.get("id") if kind == "tool_use" else block.get("tool_use_id")
            if not _ID.fullmatch(str(ref)):
                yield f"{where}: the id {ref!r} must match ^[a-zA-Z0-9_-]+$"
        if kind == "tool_use":
            yield from _name(f"{where}.name", block.get("name"), 200)
        if kind == "tool_result":
            yield from _blocks(
                f"{where}.content",
                block.get("content"),
                {"text", "image", "document", "search_result"},
            )
        if kind in ("thinking", "redacted_thinking") and block.get("cache_control"):
            yield f"{where}.cache_control: not on thinking"


def _name(at: str, name: Any, most: int = 128) -> Iterator[str]:
    if not isinstance(name, str) or not re.fullmatch(
        rf"[a-zA-Z0-9_-]{{1,{most}}}", name
    ):
        yield f"{at}: must match ^[a-zA-Z0-9_-]{{1,{most}}}$, is {name!r}"


# --- Tools and formats -----------------------------------------------------------------

_CUSTOM: dict[str, Check] = {
    "type": one_of("custom"),
    "name": string,
    "description": string,
    "input_schema": obj,
    "strict": boolean,
    "cache_control": obj,
    "input_examples": array,
    "defer_loading": boolean,
    "allowed_callers": array,
    "eager_input_streaming": boolean,
}
_PROVIDED = re.compile(r"[a-z_]+_20\d{6}|mcp_toolset|computer_toolset_\d+")
# It answers: "tools.0.custom.input_schema.properties: Property keys should match pattern …"
_PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def _tools(body: Json, series: Series | None) -> Iterator[str]:
    tools, choice = body.get("tools"), body.get("tool_choice")
    names: list[Any] = []
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        at = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            yield f"{at}: must be an object, is {tool!r}"
            continue
        names.append(tool.get("name"))
        if tool.get("type", "custom") != "custom":
            if not _PROVIDED.fullmatch(str(tool["type"])):
                yield f"{at}.type: unknown tool {tool['type']!r}"
            elif not tool.get("name") and "toolset" not in str(tool["type"]):
                yield f"{at}.name: field required"
            continue
        yield from known_fields(at, tool, _CUSTOM)
        yield from _name(f"{at}.name", tool.get("name"))
        yield from _input_schema(f"{at}.input_schema", tool, series)
    strict = sum(bool(t.get("strict")) for t in tools or () if isinstance(t, dict))
    if strict > 20:
        yield f"tools: {strict} are strict, at most 20"
    for name in sorted({str(n) for n in names if names.count(n) > 1}):
        yield f"tools: tool names must be unique, {name!r} stands twice"
    if isinstance(choice, Mapping):
        yield from _choice(choice, names)


def _choice(choice: Json, names: list[Any]) -> Iterator[str]:
    table: dict[str, Check] = {
        "type": one_of("auto", "any", "tool", "none"),
        "disable_parallel_tool_use": boolean,
    }
    if choice.get("type") == "none":
        del table["disable_parallel_tool_use"]
    if choice.get("type") == "tool":
        table["name"] = string
        if choice.get("name") not in names:
            yield f"tool_choice.name: {choice.get('name')!r} is not among the tools"
    yield from known_fields("tool_choice", choice, table)
    if not names:
        yield "tool_choice: may only be specified while providing tools"


def _input_schema(at: str, tool: Json, series: Series | None) -> Iterator[str]:
    schema = tool.get("input_schema")
    if not isinstance(schema, Mapping):
        yield f"{at}: field required"
        return
    if schema.get("type") != "object":
        yield f"{at}.type: must be 'object', is {schema.get('type')!r}"
    for key in ("oneOf", "allOf", "anyOf"):
        if key in schema:
            yield f"{at}.{key}: is not supported at the top level"
    yield from well_formed(schema, at)
    # A recorded answer of claude-haiku-4-5 shows that these are accepted.
    yield from map(Lost, references(schema, at))
    for where, node in subschemas(schema, at):
        inside = node.get("properties") if isinstance(node, Mapping) else None
        for name in inside if isinstance(inside, Mapping) else ():
            if not _PROPERTY.fullmatch(str(name)):
                yield f"{where}.properties: the key {name!r} is not taken"
    if tool.get("strict"):
        yield from _subset(schema, at)
        if series is not None and not series.schema:
            yield f"{at}: this model has no strict tools"


_KEYWORDS = ANNOTATIONS | {
    "type",
    "enum",
    "const",
    "default",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "minItems",
    "anyOf",
    "allOf",
    "$ref",
    "$defs",
    "definitions",
    "format",
    "pattern",
    "$schema",
    "$id",
    "$comment",
}
_FORMATS = {
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "uri",
    "ipv4",
    "ipv6",
    "uuid",
}


def _subset(schema: Json, at: str) -> Iterator[str]:
    """Yield why a schema is not in the subset that Anthropic enforces."""
    yield from well_formed(schema, at)
    yield from references(schema, at)
    if recursive(schema):
        yield f"{at}: recursive schemas are not supported"
    for where, node in subschemas(schema, at):
        if not isinstance(node, Mapping):
            if where.endswith(".additionalProperties"):
                continue
            yield f"{where}: must be an object, is {node!r}"
            continue
        for key in sorted(set(node) - _KEYWORDS):
            yield f"{where}.{key}: is not supported"
        if "object" in types_of(node) and node.get("additionalProperties") is not False:
            yield f"{where}.additionalProperties: must be false"
        if node.get("minItems", 0) not in (0, 1):
            yield f"{where}.minItems: only 0 and 1 are supported"
        if any(isinstance(value, dict | list) for value in node.get("enum") or ()):
            yield f"{where}.enum: takes plain values only"
        if "format" in node and node["format"] not in _FORMATS:
            yield f"{where}.format: {node['format']!r} is not supported"
        if re.search(r"\(\?[=!<]|\\[bB1-9]", str(node.get("pattern", ""))):
            yield f"{where}.pattern: looks around, or back, or at words' ends"


def _output(body: Json, model: str, series: Series | None, beta: str) -> Iterator[str]:
    config = body.get("output_config")
    if isinstance(config, Mapping):
        yield from known_fields(
            "output_config",
            config,
            {"effort": one_of(*_ALL), "format": obj, "task_budget": obj},
        )
        effort = config.get("effort")
        if effort is not None and series is not None and effort not in series.efforts:
            said = ", ".join(series.efforts) or "none at all"
            yield f"output_config.effort: {model} does not know {effort!r}, only {said}"
        if _thinking_type(body) == "between_tools" and effort in ("xhigh", "max"):
            yield "output_config.effort: not above 'high' beside between_tools"
    for at, form in (
        ("output_format", body.get("output_format")),
        (
            "output_config.format",
            config.get("format") if isinstance(config, Mapping) else None,
        ),
    ):
        if not isinstance(form, Mapping):
            continue
        yield from known_fields(
            at, form, {"type": one_of("json_schema"), "schema": obj}
        )
        if not isinstance(form.get("schema"), Mapping):
            yield f"{at}.schema: field required"
            continue
        yield from _subset(form["schema"], f"{at}.schema")
        if series is not None and not series.schema:
            yield f"{at}: {model} does not take a schema"
        if at == "output_format" and "structured-outputs-" not in beta:
            yield "headers.anthropic-beta: output_format needs structured-outputs"
    if (
        body.get("output_format")
        and isinstance(config, Mapping)
        and config.get("format")
    ):
        yield "output_format: not beside output_config.format"
