"""What OpenAI's series of models take, and the schemas that it enforces.

Sources, read 2026-11-25, unless a rule names its own:
https://developers.openai.com/api/docs/guides/reasoning (efforts, defaults),
https://developers.openai.com/api/docs/guides/latest-model (sampling parameters beside
an effort), https://developers.openai.com/api/docs/guides/responses-vs-chat-completions
(endpoints), https://developers.openai.com/api/docs/guides/structured-outputs (schemas),
https://community.openai.com/t/1371738 (efforts of each model to gpt-5.2, measured), and
the errors of the API itself where a rule quotes them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.provider_rules.schemas import (
    ANNOTATIONS,
    TYPES,
    Json,
    depth,
    references,
    subschemas,
    table_row,
    types_of,
    well_formed,
)

_OWN = re.compile(
    r"(?:ft:)?(?:gpt-(?!oss)|chatgpt-|o[1-9](?:-|:|$)|codex-|computer-use-|chat-latest)"
)


def series(model: Any) -> str:
    """Return a model's name without `ft:` and what follows it, and without its date."""
    name = str(model).removeprefix("ft:").partition(":")[0]
    return re.sub(r"-20\d\d-\d\d-\d\d$|-(?:0\d|1[0-2])[0-3]\d$", "", name)


def own(model: Any) -> bool:
    """Say whether a name is OpenAI's; other servers speak its format by other rules."""
    return bool(_OWN.match(str(model)))


_O_SERIES = r"o[1-9](?:-mini|-pro|-preview|-deep-research|-mini-deep-research)?"
_CHAT = r"(?:chat-latest|gpt-5\.\d+-chat(?:-latest)?)"
_REASONS = re.compile(
    rf"{_O_SERIES}|gpt-5(?:-mini|-nano|-pro|-codex)?"
    r"|gpt-5\.\d+(?:-(?!chat)[a-z-]+)?|gpt-[6-9](?:\.\d+)?(?:-[a-z-]+)?"
    rf"|gpt-(?:astra|sol|terra|luna|mini)-latest|codex-mini-latest|{_CHAT}"
)


def reasons(model: Any) -> bool:
    """Say whether a model always or by default reasons, and so has its own options."""
    return bool(_REASONS.fullmatch(series(model)))


# Which models have /v1/responses only: their pages at
# https://developers.openai.com/api/docs/models list no other endpoint (2026-11-25).
_RESPONSES_ONLY = re.compile(
    r"o[13]-pro|gpt-5(?:\.\d+)?-pro|gpt-5(?:\.\d+)?-codex(?:-max|-mini)?"
    r"|codex-mini-latest|o[34](?:-mini)?-deep-research|computer-use-preview"
)


def responses_only(model: Any) -> bool:
    """Say whether /v1/chat/completions does not serve a model."""
    return bool(_RESPONSES_ONLY.fullmatch(series(model)))


_LOW_HIGH = ("low", "medium", "high")
_TO_XHIGH = (*_LOW_HIGH, "xhigh")
_EFFORTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"o1-(?:mini|preview)", ()),
    (r"o[34](?:-mini)?-deep-research", ("medium",)),
    (r"o[1-4](?:-mini|-pro)?", _LOW_HIGH),
    (r"gpt-5(?:-mini|-nano)?", ("minimal", *_LOW_HIGH)),
    (r"gpt-5-pro", ("high",)),
    (r"gpt-5-chat(?:-latest)?|gpt-5-search-api", ()),
    (r"gpt-5\.\d+-chat-latest|chat-latest", ("medium",)),
    (r"gpt-5-codex|gpt-5\.1-codex(?:-mini)?", _LOW_HIGH),
    (r"gpt-5\.1-codex-max|gpt-5\.[23]-codex", _TO_XHIGH),
    (r"gpt-5\.1", ("none", *_LOW_HIGH)),
    (r"gpt-5\.[2-9]-pro", ("medium", "high", "xhigh")),
    (r"gpt-5\.[2-5](?:-mini|-nano)?", ("none", *_TO_XHIGH)),
    (r"gpt-5\.6(?:-sol|-luna|-terra)?", ("none", *_TO_XHIGH, "max")),
    # Measured: https://github.com/UKGovernmentBEIS/inspect_ai/pull/5254 (2026-09-04).
    (r"gpt-6-astra(?:-law)?|gpt-6\.1-sol", (*_TO_XHIGH, "max")),
    (r"gpt-6-sol|gpt-6-luna|gpt-6\.1-terra", ("none", *_TO_XHIGH, "max")),
    (r"gpt-(?:3\.5|4|audio)[\w.-]*|chatgpt-4o-latest", ()),
)
# https://github.com/genkit-ai/genkit-dart/pull/423 (2026-09-09): chat has no "max".
_MAX_ONLY_AT_RESPONSES = re.compile(r"gpt-[6-9].*")


def efforts(model: Any, *, chat: bool) -> tuple[str, ...] | None:
    """Return the efforts that a model knows; None if nothing is known of it."""
    name = series(model)
    known: tuple[str, ...] | None = table_row(_EFFORTS, name)
    if known and chat and _MAX_ONLY_AT_RESPONSES.match(name):
        return tuple(effort for effort in known if effort != "max")
    return known


# The others reason unless they are told not to.
_STILL_BY_DEFAULT = re.compile(r"gpt-5\.[124](?:-mini|-nano)?")


def thinks(model: Any, effort: Any) -> bool:
    """Say whether a reasoning model reasons at an effort (None: nothing was asked)."""
    if effort is None:
        return not _STILL_BY_DEFAULT.fullmatch(series(model))
    return bool(effort != "none")


# "Function tools with reasoning_effort are not supported for … in /v1/chat/completions.
# To use function tools, use /v1/responses or set reasoning_effort to 'none'."
# From gpt-5.4 (https://github.com/pipecat-ai/pipecat/issues/4043, 2026-03-16); without an
# effort too from the first whose default is not "none"
# (https://github.com/BerriAI/litellm/pull/34569, 2026-07-24).
_TOOLS_AT_RESPONSES = re.compile(
    r"gpt-5\.(?:[4-9]|\d\d)(?!.*chat).*|gpt-[6-9].*|gpt-(?:astra|sol|terra|luna)-latest"
)


def tools_need_responses(model: Any, effort: Any) -> bool:
    """Say whether function tools at this effort are refused in chat completions."""
    return bool(_TOOLS_AT_RESPONSES.fullmatch(series(model))) and thinks(model, effort)


_MOST_TOKENS: tuple[tuple[str, int], ...] = (
    (r"gpt-3\.5-turbo.*", 4096),
    (r"gpt-4|gpt-4-turbo.*|gpt-4-1106-preview", 8192),
    (r"gpt-4o-2024-05-13", 4096),
    (r"gpt-4o.*|gpt-audio.*|chatgpt-4o-latest", 16384),
    (r"gpt-4\.1.*", 32768),
    (r"gpt-5(?:\.[0-3])?-chat(?:-latest)?", 16384),
    (r"o[1-4].*", 100_000),
    (r"gpt-5-pro", 272_000),
    (r"gpt-5.*|gpt-6.*", 128_000),
)


def most_tokens(model: Any) -> int | None:
    """Return how many tokens a model may be asked for, or None."""
    exact = "gpt-4o-2024-05-13"
    limit: int | None = table_row(
        _MOST_TOKENS, exact if model == exact else series(model)
    )
    return limit


# It answers: "Model incompatible request argument supplied: temperature"
# (https://github.com/crmne/ruby_llm/issues/155, 2025-05-07; NextChat #6569, 2025-07-16).
_SEARCHES = re.compile(r"gpt-4o(?:-mini)?-search-preview|gpt-5-search-api")
SEARCH_REFUSES = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "top_logprobs",
    "n",
    "seed",
    "stop",
    "reasoning_effort",
    "tools",
)


def searches(model: Any) -> bool:
    """Say whether a model is one of those that always search the web."""
    return bool(_SEARCHES.fullmatch(series(model)))


# https://developers.openai.com/api/docs/guides/structured-outputs: "gpt-4o-2024-08-06 and
# later"; JSON mode since gpt-4-1106 and gpt-3.5-turbo-1106.
_NO_SCHEMA = re.compile(
    r"gpt-3\.5.*|gpt-4|gpt-4-.*|o1-(?:mini|preview)|chatgpt-4o-latest"
)
_NO_JSON_MODE = re.compile(r"gpt-4|o1-(?:mini|preview)")


def takes_schema(model: Any) -> bool:
    """Say whether a model takes a response format of type json_schema."""
    old = str(model).removeprefix("ft:").startswith("gpt-4o-2024-05-13")
    return not old and not _NO_SCHEMA.fullmatch(series(model))


def takes_json_mode(model: Any) -> bool:
    """Say whether a model takes a response format of type json_object."""
    return not _NO_JSON_MODE.fullmatch(series(model))


def option_violations(
    body: Json, model: str, effort: Any, *, effort_at: str, chat: bool
) -> Iterator[str]:
    """Yield the options that a series of models refuses."""
    known = efforts(model, chat=chat)
    if effort is not None and known is not None and effort not in known:
        said = ", ".join(known) or "none at all"
        yield f"{effort_at}: {model} does not know {effort!r}, only {said}"
    if not reasons(model):
        return
    # It answers: "Unsupported parameter: 'temperature' is not supported with this model."
    if thinks(model, effort):
        for name in ("temperature", "top_p"):
            if body.get(name) not in (None, 1):
                yield f"{name}: {model} takes no other value than 1 while it reasons"
        for name in ("presence_penalty", "frequency_penalty"):
            if body.get(name) not in (None, 0):
                yield f"{name}: {model} takes no other value than 0 while it reasons"
        for name in ("logprobs", "top_logprobs", "logit_bias"):
            if body.get(name):
                yield f"{name}: {model} does not take it while it reasons"


# --- Names, tools and schemas ----------------------------------------------------------

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
# https://developers.openai.com/api/reference/resources/$shared (2026-11-25).


def name_violations(at: str, name: Any) -> Iterator[str]:
    """Yield what is wrong with the name of a function or of a schema."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        yield f"{at}: must match ^[a-zA-Z0-9_-]{{1,64}}$, is {name!r}"


def function_violations(at: str, function: Any) -> Iterator[str]:
    """Yield what is wrong with the definition of a function."""
    if not isinstance(function, Mapping):
        yield f"{at}: must be an object, is {function!r}"
        return
    yield from name_violations(f"{at}.name", function.get("name"))
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        yield f"{at}.description: must be a string, is {description!r}"
    elif description is not None and len(description) > 1024:
        # "string too long. Expected a string with maximum length 1024"
        yield f"{at}.description: has {len(description)} characters, at most 1024"
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        yield f"{at}.strict: must be a boolean, is {strict!r}"
    parameters = function.get("parameters")
    if parameters is None:
        return
    where = f"{at}.parameters"
    if parameters == {} and not strict:
        return  # reads as a function without parameters
    yield from root_violations(where, parameters)
    if not isinstance(parameters, Mapping):
        return
    if strict:
        yield from strict_violations(parameters, where)
    else:
        yield from loose_violations(parameters, where)


def root_violations(at: str, schema: Any) -> Iterator[str]:
    """Yield what is wrong with the root of a schema, enforced or not.

    "schema must be a JSON Schema of 'type: "object"'", "… and not have 'oneOf'/'anyOf'/
    'allOf'/'enum'/'not' at the top level".
    """
    if not isinstance(schema, Mapping):
        yield f"{at}: must be an object, is {schema!r}"
        return
    if schema.get("type") != "object":
        yield f"{at}: its root must have type 'object', has {schema.get('type')!r}"
    for key in ("anyOf", "oneOf", "allOf", "enum", "not"):
        if key in schema:
            yield f"{at}.{key}: is refused at the root"


def loose_violations(schema: Json, at: str) -> Iterator[str]:
    """Yield what is refused in a schema that is not enforced."""
    yield from well_formed(schema, at)
    yield from references(schema, at)
    for where, node in subschemas(schema, at):
        # "array schema missing items"
        if (
            isinstance(node, Mapping)
            and "array" in types_of(node)
            and "items" not in node
            and "prefixItems" not in node
        ):
            yield f"{where}: an array without items"


_STRICT_KEYWORDS = ANNOTATIONS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "const",
    "anyOf",
    "$ref",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "$comment",
    "pattern",
    "format",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
}
_FORMATS = {
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
}
_LOOKS_AROUND = re.compile(r"\(\?[=!<]")


def strict_violations(schema: Json, at: str) -> Iterator[str]:
    """Yield why a schema is not in the subset that OpenAI enforces."""
    yield from well_formed(schema, at)
    yield from references(schema, at)
    properties = values = length = 0
    for where, node in subschemas(schema, at):
        if not isinstance(node, Mapping):
            yield f"{where}: must be an object, is {node!r}"
            continue
        yield from _strict_node(where, node)
        inside = node.get("properties")
        names = list(inside) if isinstance(inside, Mapping) else []
        enum = node.get("enum") if isinstance(node.get("enum"), list) else []
        properties += len(names)
        values += len(enum or ())
        words = [*names, *(node.get("$defs") or ()), *(enum or ()), node.get("const")]
        length += sum(len(word) for word in words if isinstance(word, str))
    if properties > 5000:
        yield f"{at}: has {properties} properties, at most 5000"
    if values > 1000:
        yield f"{at}: has {values} enum values, at most 1000"
    if length > 120_000:
        yield f"{at}: its names and values have {length} characters, at most 120000"
    levels = depth(schema, schema)
    if levels > 10:
        yield f"{at}: has {levels} levels of objects, at most 10"


def _strict_node(where: str, node: Json) -> Iterator[str]:
    for key in sorted(set(node) - _STRICT_KEYWORDS):
        yield f"{where}.{key}: is not permitted in a strict schema"
    if "$ref" in node:
        beside = sorted(set(node) - {"$ref", "$defs", "definitions"})
        if beside:
            yield f"{where}.$ref: cannot have keywords beside it: {', '.join(beside)}"
        return
    if not {"type", "anyOf", "enum", "const"} & set(node):
        yield f"{where}: must have a 'type' key"
    kinds = types_of(node)
    if unknown := sorted(map(str, kinds - TYPES)):
        yield f"{where}.type: {', '.join(unknown)} is not a type"
    if "object" in kinds:
        yield from _strict_object(where, node)
    if "array" in kinds and not isinstance(node.get("items"), Mapping):
        yield f"{where}: an array without items"
    if "format" in node and node["format"] not in _FORMATS:
        yield f"{where}.format: {node['format']!r} is not a format that is enforced"
    if _LOOKS_AROUND.search(str(node.get("pattern", ""))):
        yield f"{where}.pattern: looks around, which is not supported"


def _strict_object(where: str, node: Json) -> Iterator[str]:
    if node.get("additionalProperties") is not False:
        yield f"{where}.additionalProperties: must be false"
    names = set(node.get("properties") or ())
    if missing := sorted(names - set(node.get("required") or ())):
        yield f"{where}.required: must list every property; missing {', '.join(missing)}"
    if extra := sorted(set(node.get("required") or ()) - names):
        yield f"{where}.required: has {', '.join(extra)}, which is not a property"


def format_violations(at: str, form: Json, model: str) -> Iterator[str]:
    """Yield what is wrong with a json_schema format (`name`, `schema`, `strict`)."""
    unknown = set(form) - {"name", "schema", "strict", "description", "type"}
    for name in sorted(unknown):
        yield f"{at}.{name}: unknown field"
    yield from name_violations(f"{at}.name", form.get("name"))
    strict = form.get("strict")
    if strict is not None and not isinstance(strict, bool):
        yield f"{at}.strict: must be a boolean, is {strict!r}"
    schema = form.get("schema")
    if schema is None:
        yield f"{at}.schema: missing"
        return
    yield from root_violations(f"{at}.schema", schema)
    if isinstance(schema, Mapping):
        if strict:
            yield from strict_violations(schema, f"{at}.schema")
        else:
            yield from loose_violations(schema, f"{at}.schema")
    if own(model) and not takes_schema(model):
        yield f"{at}: {model} does not take a schema"
