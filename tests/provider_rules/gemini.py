"""The rules of Google's Gemini API, `POST /v1beta/models/…:generateContent`.

Sources, read 2026-11-25, unless a rule names its own:
https://ai.google.dev/api/generate-content and https://ai.google.dev/api/caching (fields;
both spellings of a name are read), https://ai.google.dev/gemini-api/docs/thinking,
https://ai.google.dev/gemini-api/docs/thought-signatures,
https://ai.google.dev/gemini-api/docs/tool-combination,
https://ai.google.dev/gemini-api/docs/structured-output.
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
    one_of,
    references,
    string,
    strings,
    subschemas,
    table_row,
    types_of,
    well_formed,
)

_ROUTE = re.compile(
    r"/v1(?:alpha|beta)?/models/([^/:?]+):(generateContent|streamGenerateContent"
    r"|countTokens)"
)


def camel(value: Any) -> Any:
    """Return an object with its own names in camel case; deeper ones are not touched."""
    if not isinstance(value, Mapping):
        return value
    return {
        re.sub(r"(?<=[a-z0-9])_([a-z])", lambda m: m[1].upper(), str(name)): item
        for name, item in value.items()
    }


def _items(value: Any) -> list[Any]:
    """Return a repeated field; the server takes a single value for a list of one."""
    return value if isinstance(value, list) else [value] if value is not None else []


FIELDS: dict[str, Check] = {
    "contents": anything,
    "tools": anything,
    "toolConfig": obj,
    "safetySettings": array,
    "systemInstruction": obj,
    "generationConfig": obj,
    "cachedContent": string,
    "model": string,
    "serviceTier": string,
    "store": boolean,
    "labels": obj,
}
_CONFIG: dict[str, Check] = {
    "stopSequences": strings(5),
    "responseMimeType": one_of(
        "text/plain",
        "application/json",
        "text/x.enum",
        "application/xml",
        "application/yaml",
    ),
    "responseSchema": obj,
    "responseJsonSchema": anything,
    "_responseJsonSchema": anything,
    "responseModalities": array,
    "candidateCount": integer(1, 8),
    "maxOutputTokens": integer(1, 2**31 - 1),
    "temperature": number(0, 2),
    "topP": number(0, 1),
    "topK": number(1),
    "seed": integer(-(2**31), 2**31 - 1),
    "presencePenalty": number(-2, 2),
    "frequencyPenalty": number(-2, 2),
    "responseLogprobs": boolean,
    "logprobs": integer(0, 20),
    "enableEnhancedCivicAnswers": boolean,
    "speechConfig": obj,
    "thinkingConfig": obj,
    "imageConfig": obj,
    "mediaResolution": string,
}
_BUILT_IN = {
    "googleSearch",
    "googleSearchRetrieval",
    "codeExecution",
    "urlContext",
    "googleMaps",
    "fileSearch",
    "computerUse",
    "mcpServers",
}


def version(model: str) -> tuple[int, int] | None:
    """Return the version in a Gemini model's name, or None."""
    found = re.match(r"gemini-(\d+)(?:\.(\d+))?-", model)
    return (int(found[1]), int(found[2] or 0)) if found else None


def complaints(
    method: str, path: str, headers: Mapping[str, str], body: Json
) -> Iterator[str]:
    """Yield what Google would refuse, and as `Lost` what it would pass over."""
    yield from head(method, path, headers, "x-goog-api-key")
    found = _ROUTE.fullmatch(path.partition("?")[0])
    if found is None:
        yield f"path: {path!r} is no model's method"
        return
    model = found[1]
    asked: Any = camel(body)
    if found[2] == "countTokens":
        yield from known_fields(
            "", asked, {"contents": anything, "generateContentRequest": obj}
        )
        asked = camel(asked.get("generateContentRequest") or asked)
    yield from known_fields("", asked, FIELDS, null=True)
    config = camel(asked.get("generationConfig") or {})
    yield from known_fields("generationConfig", config, _CONFIG, null=True)
    yield from _contents(asked, model)
    if asked.get("systemInstruction") is not None:
        yield from _content(
            "systemInstruction", camel(asked["systemInstruction"]), system=True
        )
    tools = [camel(tool) for tool in _items(asked.get("tools"))]
    yield from _tools(tools, camel(asked.get("toolConfig") or {}), model)
    yield from _thinking(camel(config.get("thinkingConfig") or {}), model)
    yield from _schemas(config)
    yield from _by_model(asked, config, tools, model)


# --- Contents --------------------------------------------------------------------------

_DATA = {
    "text",
    "inlineData",
    "functionCall",
    "functionResponse",
    "fileData",
    "executableCode",
    "codeExecutionResult",
    "toolCall",
    "toolResponse",
}
_PART: dict[str, Check] = {
    **dict.fromkeys(_DATA - {"text"}, obj),
    "text": string,
    "thought": boolean,
    "thoughtSignature": string,
    "videoMetadata": obj,
    "mediaResolution": anything,
    "partMetadata": obj,
}


def _contents(body: Json, model: str) -> Iterator[str]:
    contents = [camel(content) for content in _items(body.get("contents"))]
    if not contents:
        yield "contents: is not specified"
        return
    before: list[Json] = []
    for i, content in enumerate(contents):
        at = f"contents[{i}]"
        if not isinstance(content, Mapping):
            yield f"{at}: must be an object, is {content!r}"
            continue
        role = content.get("role") or "user"
        if role not in ("user", "model", "function"):
            yield f"{at}.role: {role!r} is not user or model"
        yield from _content(at, content)
        parts = _parts(content)
        calls = [p for p in parts if p.get("functionCall") is not None]
        results = [p for p in parts if p.get("functionResponse") is not None]
        if calls and role != "model":
            yield f"{at}: a function call must come from the model"
        if results and role == "model":
            yield f"{at}: a function response cannot come from the model"
        if len(results) != len(before):
            # "Please ensure that the number of function response parts is equal to the
            # number of function call parts of the function call turn."
            yield f"{at}: {len(results)} function responses to {len(before)} calls"
        else:
            yield from _pairs(at, before, results)
        if calls and i == 0:
            yield f"{at}: a function call must come after a user's turn"
        before = calls
    if before:
        yield "contents: the last function calls have no response"
    yield from _signatures(contents, model)


def _parts(content: Any) -> list[Any]:
    return [
        p
        for p in (camel(part) for part in _items(content.get("parts")))
        if isinstance(p, Mapping)
    ]


def _content(at: str, content: Any, *, system: bool = False) -> Iterator[str]:
    yield from known_fields(at, content, {"role": string, "parts": anything})
    if not isinstance(content, Mapping):
        return
    parts = [camel(part) for part in _items(content.get("parts"))]
    if not parts:
        yield f"{at}.parts: must not be empty"
    for j, part in enumerate(parts):
        where = f"{at}.parts[{j}]"
        yield from known_fields(where, part, _PART, null=True)
        if not isinstance(part, Mapping):
            continue
        data = [name for name in sorted(_DATA) if part.get(name) is not None]
        signed = part.get("thoughtSignature") or part.get("thought")
        if len(data) > 1 or (not data and not signed):
            yield f"{where}.data: must have one initialized field, has {data}"
        if system and data not in (["text"], []):
            yield f"{where}: a system instruction takes text only"
        for name in ("inlineData", "fileData"):
            if isinstance(part.get(name), Mapping):
                yield from _blob(f"{where}.{name}", camel(part[name]), name)
        for name in ("functionCall", "functionResponse"):
            if isinstance(part.get(name), Mapping):
                yield from _function(f"{where}.{name}", camel(part[name]), name)
        if (seal := part.get("thoughtSignature")) and not _is_base64(seal):
            yield f"{where}.thoughtSignature: is not base64"


def _is_base64(text: Any) -> bool:
    # Google's decoder takes both alphabets and does without padding.
    plain = str(text).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error:
        return False
    return True


def _blob(at: str, blob: Any, name: str) -> Iterator[str]:
    data = "data" if name == "inlineData" else "fileUri"
    yield from known_fields(
        at, blob, {"mimeType": string, data: string, "displayName": string}
    )
    if not blob.get(data):
        yield f"{at}.{data}: missing"
    if name == "inlineData":
        if not blob.get("mimeType"):
            yield f"{at}.mimeType: missing"
        if blob.get("data") and not _is_base64(blob["data"]):
            yield f"{at}.data: is not base64"


def _function(at: str, value: Any, kind: str) -> Iterator[str]:
    own: dict[str, Check] = (
        {"args": obj}
        if kind == "functionCall"
        else {
            "response": obj,
            "parts": array,
            "willContinue": boolean,
            "scheduling": string,
        }
    )
    yield from known_fields(at, value, {"id": string, "name": string, **own}, null=True)
    yield from _name(f"{at}.name", value.get("name"))
    if kind == "functionResponse" and not isinstance(value.get("response"), Mapping):
        yield f"{at}.response: must be an object"


def _pairs(at: str, calls: list[Json], results: list[Json]) -> Iterator[str]:
    def names(parts: list[Json], kind: str) -> list[str]:
        return sorted(str(camel(p[kind]).get("name")) for p in parts)

    if names(calls, "functionCall") != names(results, "functionResponse"):
        yield f"{at}: the names of the function responses are not those of the calls"
    sent = {camel(p["functionCall"]).get("id") for p in calls} - {None}
    for part in results:
        ref = camel(part["functionResponse"]).get("id")
        if ref is not None and sent and ref not in sent:
            yield f"{at}: the response {ref!r} answers no call"


def _signatures(contents: list[Any], model: str) -> Iterator[str]:
    """Yield the calls of the current turn that lost their thought signature.

    "The first functionCall part in each step of the current turn must include its
    thought_signature", for Gemini 3 and later; image models do not check.
    """
    number_of = version(model)
    if number_of is None or number_of < (3, 0) or "image" in model:
        return
    start = 0
    for i, content in enumerate(contents):
        role = content.get("role") or "user"
        parts = _parts(content)
        if role == "user" and not any(p.get("functionResponse") for p in parts):
            start = i
    for i, content in enumerate(contents[start:], start):
        calls = [p for p in _parts(content) if p.get("functionCall") is not None]
        if calls and not calls[0].get("thoughtSignature"):
            yield f"contents[{i}]: its function call is missing a thought_signature"


# --- Tools -----------------------------------------------------------------------------

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,63}")
_DECLARATION: dict[str, Check] = {
    "name": string,
    "description": string,
    "behavior": string,
    "parameters": obj,
    "parametersJsonSchema": anything,
    "response": obj,
    "responseJsonSchema": anything,
}


def _name(at: str, name: Any) -> Iterator[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield (
            f"{at}: must begin with a letter or _ and have up to 64 of"
            f" a-zA-Z0-9_.:-, is {name!r}"
        )


def _tools(tools: list[Any], config: Json, model: str) -> Iterator[str]:
    names: list[Any] = []
    for i, tool in enumerate(tools):
        at = f"tools[{i}]"
        table: dict[str, Check] = dict.fromkeys(_BUILT_IN, anything)
        yield from known_fields(
            at, tool, {**table, "functionDeclarations": anything}, null=True
        )
        if not isinstance(tool, Mapping):
            continue
        if not any(value is not None for value in tool.values()):
            yield f"{at}: must have one initialized field"
        for j, raw in enumerate(_items(tool.get("functionDeclarations"))):
            declared = camel(raw)
            where = f"{at}.functionDeclarations[{j}]"
            yield from known_fields(where, declared, _DECLARATION, null=True)
            names.append(declared.get("name"))
            yield from _name(f"{where}.name", declared.get("name"))
            yield from _parameters(where, declared)
    for name in sorted({str(n) for n in names if names.count(n) > 1}):
        yield f"tools: duplicate function declaration {name!r}"
    yield from known_fields(
        "toolConfig",
        config,
        {
            "functionCallingConfig": obj,
            "retrievalConfig": obj,
            "includeServerSideToolInvocations": boolean,
        },
        null=True,
    )
    calling = camel(config.get("functionCallingConfig") or {})
    yield from _calling(calling, names)
    built_in = {
        name
        for tool in tools
        if isinstance(tool, Mapping)
        for name in _BUILT_IN & {k for k, v in tool.items() if v is not None}
    }
    number_of = version(model)
    if names and built_in - {"computerUse"} and number_of is not None:
        beside = ", ".join(sorted(built_in))
        if number_of < (3, 0):
            # "Built-in tools ({google_search}) and Function Calling cannot be combined in
            # the same request."
            yield f"tools: {model} does not take {beside} beside functions"
        elif config.get("includeServerSideToolInvocations") is not True:
            yield f"toolConfig.includeServerSideToolInvocations: missing beside {beside}"
        elif calling.get("mode") in ("AUTO", "auto"):
            yield "toolConfig.functionCallingConfig.mode: must be VALIDATED here"
    if "googleSearchRetrieval" in built_in and (number_of or (2, 0)) >= (2, 0):
        yield f"tools: {model} takes googleSearch, not googleSearchRetrieval"


def _calling(calling: Json, names: list[Any]) -> Iterator[str]:
    at = "toolConfig.functionCallingConfig"
    yield from known_fields(
        at,
        calling,
        {
            "mode": one_of("AUTO", "ANY", "NONE", "VALIDATED", "MODE_UNSPECIFIED"),
            "allowedFunctionNames": array,
        },
        null=True,
    )
    allowed = calling.get("allowedFunctionNames")
    if allowed and calling.get("mode") not in ("ANY", "VALIDATED"):
        yield f"{at}.allowedFunctionNames: only with mode ANY"
    for name in allowed or ():
        if name not in names:
            yield f"{at}.allowedFunctionNames: {name!r} is not declared"
    if calling.get("mode") in ("ANY", "VALIDATED") and not names:
        yield f"{at}: is set without function declarations"


def _parameters(at: str, declared: Json) -> Iterator[str]:
    plain = declared.get("parameters")
    schema = declared.get("parametersJsonSchema")
    if plain is not None and schema is not None:
        yield f"{at}.parameters: not beside parametersJsonSchema"
    if isinstance(plain, Mapping):
        yield from _openapi(plain, f"{at}.parameters")
        if str(plain.get("type", "")).upper() != "OBJECT":
            yield f"{at}.parameters.type: must be OBJECT, is {plain.get('type')!r}"
    if schema is not None:
        yield from _json_schema(schema, f"{at}.parametersJsonSchema")
        if isinstance(schema, Mapping) and schema.get("type") != "object":
            yield f"{at}.parametersJsonSchema.type: must be object"


_OPENAPI: dict[str, Check] = {
    "type": string,
    "format": string,
    "title": string,
    "description": string,
    "nullable": boolean,
    "enum": array,
    "maxItems": anything,
    "minItems": anything,
    "properties": obj,
    "required": array,
    "minProperties": anything,
    "maxProperties": anything,
    "minLength": anything,
    "maxLength": anything,
    "pattern": string,
    "example": anything,
    "anyOf": array,
    "propertyOrdering": array,
    "default": anything,
    "items": obj,
    "minimum": number(),
    "maximum": number(),
}
_OPENAPI_TYPES = (
    "STRING",
    "NUMBER",
    "INTEGER",
    "BOOLEAN",
    "ARRAY",
    "OBJECT",
    "NULL",
)


def _openapi(raw: Any, at: str) -> Iterator[str]:
    """Yield what is wrong with a `Schema`, Google's own subset of OpenAPI 3.0.

    Source: https://ai.google.dev/api/caching#Schema (2026-11-25).
    """
    schema = camel(raw)
    # "Invalid JSON payload received. Unknown name "$ref" …: Cannot find field."
    yield from known_fields(at, schema, _OPENAPI, null=True)
    if not isinstance(schema, Mapping):
        return
    kind = str(schema.get("type", "")).upper()
    if not kind and not schema.get("anyOf"):
        yield Lost(f"{at}.type: missing, so that it says nothing")
    elif kind and kind not in _OPENAPI_TYPES:
        yield f"{at}.type: invalid value {schema.get('type')!r}"
    enum = schema.get("enum")
    if isinstance(enum, list):
        if not all(isinstance(value, str) and value for value in enum):
            yield f"{at}.enum: takes non-empty strings only, is {enum!r}"
        if kind != "STRING":
            yield f"{at}.enum: only allowed for STRING type"
    if kind == "STRING" and schema.get("format") not in (None, "enum", "date-time"):
        yield f"{at}.format: only 'enum' and 'date-time' are supported for STRING"
    if kind == "ARRAY" and schema.get("items") is None:
        yield f"{at}.items: missing field"
    properties = schema.get("properties")
    for name in _items(schema.get("required")):
        if name not in (properties or {}):
            yield f"{at}.required: {name!r} is not among the properties"
    for name, item in (properties or {}).items():
        yield from _openapi(item, f"{at}.properties.{name}")
    if schema.get("items") is not None:
        yield from _openapi(schema["items"], f"{at}.items")
    for i, item in enumerate(_items(schema.get("anyOf"))):
        yield from _openapi(item, f"{at}.anyOf[{i}]")


# https://ai.google.dev/api/generate-content#GenerationConfig, at responseJsonSchema.
# What it does not list is passed over. Those named here say what a value may be, so that
# the model would not be told what the caller wrote.
_PASSED_OVER = ("const", "allOf", "not", "patternProperties", "if", "dependentSchemas")


def _json_schema(schema: Any, at: str) -> Iterator[str]:
    """Yield what is wrong with a schema in the JSON Schema field."""
    if not isinstance(schema, Mapping):
        yield f"{at}: must be an object, is {schema!r}"
        return
    yield from well_formed(schema, at)
    yield from references(schema, at)
    for where, node in subschemas(schema, at):
        if not isinstance(node, Mapping):
            continue
        for key in _PASSED_OVER:
            if key in node:
                yield Lost(f"{where}.{key}: is passed over")
        beside = [k for k in node if not k.startswith("$")]
        if "$ref" in node and beside:
            # "If $ref is set on a sub-schema, no other properties, except for than those
            # starting as a $, may be set."
            yield f"{where}.$ref: not beside {', '.join(sorted(beside))}"
        enum = node.get("enum")
        if isinstance(enum, list) and not all(
            isinstance(v, str | int | float) and not isinstance(v, bool) for v in enum
        ):
            yield f"{where}.enum: takes strings and numbers only, is {enum!r}"
        if (
            "array" in types_of(node)
            and "items" not in node
            and ("prefixItems" not in node)
        ):
            yield f"{where}: an array without items"


def _schemas(config: Json) -> Iterator[str]:
    plain = config.get("responseSchema")
    forms = {
        name: config[name]
        for name in ("responseJsonSchema", "_responseJsonSchema")
        if config.get(name) is not None
    }
    if plain is not None and forms:
        yield "generationConfig.responseSchema: not beside responseJsonSchema"
    if plain is not None:
        yield from _openapi(plain, "generationConfig.responseSchema")
    for name, schema in forms.items():
        yield from _json_schema(schema, f"generationConfig.{name}")
    mime = config.get("responseMimeType")
    if (plain is not None or forms) and mime not in ("application/json", "text/x.enum"):
        yield "generationConfig.responseMimeType: must be application/json here"


# --- Models ----------------------------------------------------------------------------

_BUDGETS: tuple[tuple[str, tuple[int, int, bool]], ...] = (
    # lowest, highest, and whether 0 turns it off
    (r"gemini-2\.5-pro(?!.*tts).*", (128, 32_768, False)),
    (r"gemini-2\.5-flash-lite.*", (512, 24_576, True)),
    (r"gemini-2\.5-flash(?!-image|.*tts).*", (1, 24_576, True)),
    (r"gemini-3(?:\.1)?-pro.*", (128, 32_768, False)),
)
_ALL_LEVELS = ("minimal", "low", "medium", "high")
# https://docs.cloud.google.com/gemini-enterprise-agent-platform/models/guides, the page
# of each model, "Supported thinking levels" (2026-11-25).
_LEVELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"gemini-3-pro-preview", ("low", "high")),
    (r"gemini-3\.1-pro.*", ("low", "medium", "high")),
    (r"gemini-3-flash.*|gemini-3\.1-flash-lite.*", _ALL_LEVELS),
    (r"gemini-3\.[56]-flash.*", _ALL_LEVELS),
    (r"gemini-3\.[78]-flash.*", _ALL_LEVELS[1:]),
    (r"gemini-4-argon.*", _ALL_LEVELS[1:]),
    (r"gemini-4-hydrogen.*", (*_ALL_LEVELS[1:], "xhigh")),
    (r"gemini-2\..*", ()),
)
# "thinking is not supported by this model".
_THINKS_NOT = re.compile(
    r"gemini-(?:1\.\d|2\.0)-.*|gemma-[123].*|learnlm.*|gemini-2\.5-.*(?:tts|image).*"
    r"|gemini-gemma-2-.*"
)


def thinks(model: str) -> bool:
    """Say whether a model is known to take a budget or a level of thinking."""
    return bool(table_row(_BUDGETS, model) or table_row(_LEVELS, model))


def _thinking(config: Json, model: str) -> Iterator[str]:
    at = "generationConfig.thinkingConfig"
    yield from known_fields(
        at,
        config,
        {
            "includeThoughts": boolean,
            "thinkingBudget": integer(-1),
            "thinkingLevel": string,
        },
        null=True,
    )
    budget, level = config.get("thinkingBudget"), config.get("thinkingLevel")
    if budget is not None and level is not None:
        yield f"{at}.thinkingLevel: not beside thinkingBudget"
    if _THINKS_NOT.fullmatch(model) and (budget or level is not None):
        yield f"{at}: {model} does not think"
        return
    limits = table_row(_BUDGETS, model)
    if isinstance(budget, int) and limits is not None and budget != -1:
        low, high, off = limits
        if budget == 0 and not off:
            yield f"{at}.thinkingBudget: {model} only works in thinking mode"
        elif budget and not low <= budget <= high:
            yield f"{at}.thinkingBudget: must be {low} to {high}, is {budget}"
    levels = table_row(_LEVELS, model)
    if level is not None and levels is not None and str(level).lower() not in levels:
        said = ", ".join(levels) or "none at all"
        yield f"{at}.thinkingLevel: {model} does not know {level!r}, only {said}"
    if budget == 0 and levels and "minimal" not in levels and limits is None:
        yield f"{at}.thinkingBudget: {model} cannot stop thinking"


def _by_model(body: Json, config: Json, tools: list[Any], model: str) -> Iterator[str]:
    number_of = version(model)
    as_json = config.get("responseMimeType") == "application/json"
    if as_json and tools and number_of is not None and number_of < (3, 0):
        # It answers: "Tool use with a response mime type: 'application/json' is unsupported"
        yield f"tools: {model} takes no tools beside application/json"
    if re.fullmatch(r"gemma-[123]-.*", model):
        # "Developer instruction is not enabled for models/gemma-3-27b-it"
        if body.get("systemInstruction"):
            yield f"systemInstruction: is not enabled for {model}"
        if tools:
            yield f"tools: function calling is not enabled for {model}"
        if as_json:
            yield f"generationConfig.responseMimeType: no JSON mode for {model}"
