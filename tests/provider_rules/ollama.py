"""The rules of Ollama's chat endpoint, `POST /api/chat`.

Sources, read 2026-11-25: https://docs.ollama.com/api/chat,
https://docs.ollama.com/capabilities/thinking and the types that its server decodes into,
https://github.com/ollama/ollama/blob/main/api/types.go. Go refuses a value of another
type and passes over a field that it does not know, which is told here too: what is
passed over does not have the effect that the caller asked for.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    references,
    string,
    strings,
    subschemas,
    well_formed,
)

_INTEGERS = [
    "num_keep",
    "seed",
    "num_predict",
    "top_k",
    "repeat_last_n",
    "num_ctx",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "num_thread",
    "draft_num_predict",
]
_NUMBERS = [
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "temperature",
    "presence_penalty",
    "frequency_penalty",
    "tfs_z",
    "mirostat_tau",
    "mirostat_eta",
]


def _whole(value: Any) -> str | None:
    """Check as Go's `Options.FromMap` does: a fraction is cut off without a word."""
    wrong = number()(value)
    return wrong or (None if value == int(value) else f"has a fraction: {value}")


OPTIONS: dict[str, Check] = {
    **dict.fromkeys(_INTEGERS, _whole),
    **dict.fromkeys(_NUMBERS, number()),
    **dict.fromkeys(("use_mmap", "numa", "penalize_newline", "low_vram"), boolean),
    "mirostat": integer(0, 2),
    "stop": strings(),
}
FIELDS: dict[str, Check] = {
    "model": string,
    "messages": array,
    "tools": array,
    "format": anything,
    "options": obj,
    "stream": boolean,
    "think": anything,
    "keep_alive": anything,
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "truncate": boolean,
    "shift": boolean,
}

# Families of https://ollama.com/library by its mark "thinking" (2026-11-25). Names that
# neither has get no rule.
_LEVELS = re.compile(r"gpt-oss(?:-safeguard)?")
_THINKS_NOT = re.compile(
    r"llama[\d.]*(?:-.*)?|gemma[23]?n?|phi[34](?:-mini)?|mistral(?:-.*)?|mixtral.*"
    r"|qwen(?:2(?:\.5)?)?(?:-?coder|vl)?|qwen3-coder.*|codellama|deepseek-coder.*"
    r"|codegeex4|internlm2.*|tinyllama|smollm2?"
)


def complaints(
    method: str, path: str, headers: Mapping[str, str], body: Json
) -> Iterator[str]:
    """Yield what Ollama would refuse, and as `Lost` what it would pass over."""
    yield from head(method, path, headers, None)
    if path.partition("?")[0] != "/api/chat":
        yield f"path: {path!r} is not /api/chat"
    yield from _fields("", body, FIELDS)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        yield "model: is required"
    if body.get("options") is not None:
        yield from _fields("options", body["options"], OPTIONS)
    yield from _messages(body.get("messages"))
    for i, tool in enumerate(body.get("tools") or ()):
        yield from _tool(f"tools[{i}]", tool)
    yield from _format(body.get("format"))
    yield from _think(body.get("think"), str(model))


def _fields(at: str, value: Any, table: Mapping[str, Check]) -> Iterator[str]:
    for said in known_fields(at, value, table, null=True):
        passed_over = said.endswith(": unknown field") or "has a fraction" in said
        yield Lost(said) if passed_over else said


def _think(think: Any, model: str) -> Iterator[str]:
    if think is None:
        return
    family = model.rpartition("/")[2].partition(":")[0].lower()
    if not isinstance(think, bool) and think not in ("low", "medium", "high", "max"):
        # "invalid think value"
        yield f"think: must be a boolean or a level, is {think!r}"
    elif _LEVELS.fullmatch(family):
        if isinstance(think, bool):
            yield Lost(f"think: {model} takes low, medium or high, not a boolean")
    elif think is not False and _THINKS_NOT.fullmatch(family):
        yield f"think: {model} does not support thinking"


_MESSAGE: dict[str, Check] = {
    "role": string,
    "content": string,
    "thinking": string,
    "images": array,
    "tool_calls": array,
    "tool_name": string,
    "tool_call_id": string,
}


def _messages(messages: Any) -> Iterator[str]:
    for i, message in enumerate(messages or ()):
        at = f"messages[{i}]"
        yield from _fields(at, message, _MESSAGE)
        if not isinstance(message, Mapping):
            continue
        role = message.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            yield f"{at}.role: invalid role {role!r}"
        # Results are paired by name, or by id in newer versions; none is refused.
        if role == "tool" and not (
            message.get("tool_name") or message.get("tool_call_id")
        ):
            yield Lost(f"{at}: has neither tool_name nor tool_call_id")
        for j, image in enumerate(message.get("images") or ()):
            try:
                base64.b64decode(str(image), validate=True)
            except binascii.Error:
                yield f"{at}.images[{j}]: is not base64"
        for j, call in enumerate(message.get("tool_calls") or ()):
            function = call.get("function") if isinstance(call, Mapping) else None
            where = f"{at}.tool_calls[{j}].function"
            if not isinstance(function, Mapping):
                yield f"{where}: must be an object, is {function!r}"
                continue
            yield from _fields(
                where,
                function,
                {"name": string, "arguments": obj, "index": integer(0)},
            )
            if "arguments" not in function:
                yield f"{where}.arguments: missing"


def _format(form: Any) -> Iterator[str]:
    if form in (None, "", "json"):
        return
    if not isinstance(form, Mapping):
        # It answers: "invalid format: …; expected \"json\" or a valid JSON Schema object"
        yield f"format: must be 'json' or a schema, is {form!r}"
        return
    yield from well_formed(form, "format")
    yield from references(form, "format")
    for where, node in subschemas(form, "format"):
        pattern = node.get("pattern") if isinstance(node, Mapping) else None
        # llama.cpp's grammars: "Pattern must start with '^' and end with '$'".
        if isinstance(pattern, str):
            if not (pattern.startswith("^") and pattern.endswith("$")):
                yield f"{where}.pattern: must start with ^ and end with $"
            if re.search(r"\(\?[=!<]", pattern):
                yield f"{where}.pattern: looks around, which is not supported"


# What `ToolFunctionParameters` and `ToolProperty` do not hold never reaches the model.
# Below `items` everything is kept.
_FUNCTION: dict[str, Check] = {
    "name": string,
    "description": string,
    "parameters": obj,
    "strict": boolean,
}
_PASSED_OVER = ("$ref", "allOf", "oneOf", "const")


def _tool(at: str, tool: Any) -> Iterator[str]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        yield f"{at}.function: must be an object, is {function!r}"
        return
    if tool.get("type") != "function":
        yield f"{at}.type: must be 'function', is {tool.get('type')!r}"
    yield from _fields(f"{at}.function", function, _FUNCTION)
    if not function.get("name"):
        yield f"{at}.function.name: missing"
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping):
        return
    where = f"{at}.function.parameters"
    yield from well_formed(parameters, where)
    if not isinstance(parameters.get("type"), str):
        yield f"{where}.type: must be a string, is {parameters.get('type')!r}"
    yield from _property(where, {k: v for k, v in parameters.items() if k != "type"})


def _property(at: str, schema: Any) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        yield f"{at}: must be an object, is {schema!r}"
        return
    for key in _PASSED_OVER:
        if key in schema:
            yield Lost(f"{at}.{key}: is passed over")
    for name, inner in (schema.get("properties") or {}).items():
        yield from _property(f"{at}.properties.{name}", inner)
    for i, inner in enumerate(schema.get("anyOf") or ()):
        yield from _property(f"{at}.anyOf[{i}]", inner)
