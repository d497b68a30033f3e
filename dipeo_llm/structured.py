"""Structured output: the schema that is sent, and the check of the answer.

Pure. A form is a type that pydantic can describe, a JSON schema, or OpenAI's own
`response_format`.
"""

import functools
import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json

from dipeo_llm.domain import ChatResult
from dipeo_llm.errors import InvalidRequestError, StructuredOutputError
from dipeo_llm.functions import explain, reason


@dataclass(frozen=True, slots=True)
class Form:
    """The form that an answer must have."""

    response_format: dict[str, Any]
    """In OpenAI's format, which LiteLLM translates for every other provider."""
    check: Any = None
    """A TypeAdapter, or a JSON schema; None accepts any JSON."""
    is_wrapped: bool = False
    """Whether the schema asks for an object whose one property, `value`, is the answer:
    OpenAI takes no other type at the root."""
    is_recursive: bool = False
    """Whether the schema refers to itself, through `$ref` into its `$defs`."""

    @property
    def is_json(self) -> bool:
        """Whether the answer must be JSON at all."""
        return self.response_format.get("type") != "text"


def form_of(asked: Any) -> Form | None:
    """Read what a caller gave as `response_format`.

    Args:
        asked: A pydantic class or another type that pydantic can describe, a JSON
            schema, OpenAI's dict, or None.

    Raises:
        InvalidRequestError: It is something else; the message has pydantic's reason.
    """
    if asked is None or isinstance(asked, Form):
        return asked
    if isinstance(asked, Mapping):
        return _form_of_mapping(asked)
    try:
        return _form_of_type(asked)
    except TypeError:  # not hashable, such as an Annotated with a dict
        return _form_of_type.__wrapped__(asked)


@functools.lru_cache(maxsize=256)  # describing a class takes as long as a call
def _form_of_type(asked: Any) -> Form:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(asked)
        described = adapter.json_schema()
    except Exception as exc:
        raise InvalidRequestError(
            f"`response_format` must be a type or a JSON schema, and"
            f" {reprlib.repr(asked)} cannot be described as one: {reason(exc)}"
        ) from exc
    schema = inline_references(described)
    if is_wrapped := schema.get("type") != "object":
        schema = _wrap(schema)
    name = _clean_name(getattr(asked, "__name__", "") or described.get("title", ""))
    enforced = make_strict(schema)
    return Form(
        _json_schema(name, enforced or schema, strict=enforced is not None),
        adapter,
        is_wrapped=is_wrapped,
        is_recursive="$defs" in schema,
    )


def _form_of_mapping(asked: Mapping[str, Any]) -> Form:
    if asked.get("type") in ("text", "json_object"):
        return Form(dict(asked))
    if asked.get("type") == "json_schema":  # the chat API's, or the Responses API's
        given = asked.get("json_schema", asked)
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if not isinstance(schema, Mapping):
            raise InvalidRequestError(
                "`response_format` has no schema:"
                ' {"type": "json_schema", "json_schema": {"name": …, "schema": …}}'
            )
        return _form_of_schema(schema, given.get("name"), given.get("strict"))
    if not asked.keys() & {"type", "properties", "anyOf", "oneOf", "$ref", "enum"}:
        raise InvalidRequestError(
            "`response_format` is a dict, but not a JSON schema: it has none of type,"
            " properties, anyOf, oneOf, $ref, enum"
        )
    return _form_of_schema(asked, asked.get("title"), strict=False)


def _form_of_schema(asked: Mapping[str, Any], name: Any, strict: Any) -> Form:
    _check_references(check_schema(asked, "`response_format`"))
    schema = object_schema(asked)
    form = _json_schema(
        _clean_name(str(name or "")),
        _wrap(_use_defs(asked)) if schema is None else schema,
        strict=strict,
    )
    if strict is None:
        del form["json_schema"]["strict"]
    return Form(
        form, dict(asked), is_wrapped=schema is None, is_recursive=_is_recursive(asked)
    )


def check_schema(schema: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return a schema that is valid.

    Args:
        schema: A JSON schema of the caller's.
        what: How to name it in the error.

    Raises:
        InvalidRequestError: It is not valid, or not JSON.
    """
    try:
        _check_schema(to_json(schema), what)
    except PydanticSerializationError as exc:
        raise InvalidRequestError(f"{what}: not JSON: {reason(exc)}") from exc
    return schema


@functools.lru_cache(maxsize=256)  # it takes milliseconds
def _check_schema(text: bytes, what: str) -> None:
    import jsonschema

    schema = json.loads(text)
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as exc:
        where = ".".join(map(str, exc.absolute_path)) or "the root"
        raise InvalidRequestError(
            f"{what}: not a valid JSON schema: {exc.message[:200]} at {where}"
        ) from exc


def _check_references(schema: Mapping[str, Any]) -> None:
    """Refuse a schema with a dangling reference.

    The answer could not be checked, and nothing may be fetched for that.
    """
    references = _all_references(schema)
    if not references:
        return
    import referencing
    from referencing.jsonschema import DRAFT202012

    root = referencing.Resource.from_contents(dict(schema), DRAFT202012)
    resolver = referencing.Registry().resolver_with_root(root)
    for reference in references:
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable as exc:
            raise InvalidRequestError(
                f"`response_format` refers to {reference!r}, which is not in the schema"
            ) from exc


def _all_references(node: Any) -> list[str]:
    found = node.get("$ref") if isinstance(node, Mapping) else None
    references = [found] if isinstance(found, str) else []
    _map(node, lambda child: references.extend(_all_references(child)))
    return references


def object_schema(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a schema that says `"type": "object"` at its root, as providers want it.

    A reference at the root is replaced by its definition, `definitions` become `$defs`,
    and a type that only follows from the properties is added. None: it describes
    something else than an object.
    """
    read = _use_defs(schema)
    if read.get("type") == "OBJECT":  # as Google's own SDK writes types
        read = _lower_types(read)
    followed: set[str] = set()
    while (name := _reference(read)) and name not in followed:
        followed.add(name)
        target = read.get("$defs", {}).get(name)
        if not isinstance(target, Mapping):
            return None
        read = {**target, **{key: read[key] for key in read if key != "$ref"}}
    others = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const", "not"}
    if read.get("type") == ["object"] or not read.keys() & {"type", *others}:
        read = {**read, "type": "object"}
    return read if read.get("type") == "object" else None


def _lower_types(node: Any) -> Any:
    changed = _map(node, _lower_types)
    kind = changed.get("type") if isinstance(changed, Mapping) else None
    return {**changed, "type": kind.lower()} if isinstance(kind, str) else changed


def _use_defs(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with `$defs` in place of `definitions`, their older name.

    Gemini and Ollama read only `$defs`.
    """
    if not isinstance(schema.get("definitions"), Mapping) or "$defs" in schema:
        return dict(schema)
    newer = {key: value for key, value in schema.items() if key != "definitions"}
    newer["$defs"] = schema["definitions"]
    renamed: dict[str, Any] = _refer(newer, "#/definitions/", "#/$defs/")
    return renamed


def _refer(node: Any, old: str, new: str) -> Any:
    """Return a schema with the beginning of its references changed."""
    changed = _map(node, lambda child: _refer(child, old, new))
    reference = changed.get("$ref") if isinstance(changed, Mapping) else None
    if isinstance(reference, str) and reference.startswith(old):
        return {**changed, "$ref": new + reference.removeprefix(old)}
    return changed


def _wrap(schema: dict[str, Any]) -> dict[str, Any]:
    """Make a schema the one property of an object; its definitions stay at the root."""
    inner = {key: value for key, value in schema.items() if key not in _ROOT_KEYS}
    rest = {key: schema[key] for key in _ROOT_KEYS if key in schema}
    wrapped = {
        "type": "object",
        "properties": {"value": inner},
        "required": ["value"],
        "additionalProperties": False,
        **rest,
    }
    if "#" not in _all_references(wrapped):
        return wrapped
    # A reference to the root now means the property.
    referred: dict[str, Any] = _refer_to_value(wrapped)
    return referred


def _refer_to_value(node: Any) -> Any:
    changed = _map(node, _refer_to_value)
    is_root = isinstance(changed, Mapping) and changed.get("$ref") == "#"
    return {**changed, "$ref": "#/properties/value"} if is_root else changed


_ROOT_KEYS = ("$defs", "definitions", "$schema")


def _clean_name(name: str) -> str:
    """Return a name that OpenAI accepts: 1 to 64 of a-z, A-Z, 0-9, `_` and `-`."""
    return re.sub(r"[^a-zA-Z0-9-]+", "_", name).strip("_")[:64] or "answer"


def _json_schema(name: str, schema: dict[str, Any], *, strict: Any) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": schema, "strict": strict},
    }


def inline_references(schema: dict[str, Any]) -> dict[str, Any]:
    """Replace each reference by its definition.

    A definition that refers to itself stays in `$defs`; the root is never a reference.
    """
    definitions = schema.get("$defs", {})
    root = {key: value for key, value in schema.items() if key != "$defs"}
    inlined = _inline(root, definitions, ())
    kept: dict[str, Any] = {}
    pending = _referenced(inlined)
    while pending:
        name = pending.pop()
        if name in definitions and name not in kept:
            kept[name] = _inline(definitions[name], definitions, (name,))
            pending += _referenced(kept[name])
    return {**inlined, "$defs": kept} if kept else inlined


def _inline(node: Any, definitions: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    name = _reference(node)
    if name in inside:
        return {"$ref": node["$ref"]}
    if name in definitions:
        target = _inline(definitions[name], definitions, (*inside, name))
        node = {key: value for key, value in node.items() if key != "$ref"}
        return {**target, **_inline(node, definitions, inside)}
    return _map(node, lambda child: _inline(child, definitions, inside))


def _referenced(node: Any) -> list[str]:
    """Name the definitions that a schema refers to."""
    names = [_reference(node)]
    _map(node, lambda child: names.extend(_referenced(child)))
    return names


def _reference(node: Any) -> str:
    """Return the name that a schema refers to, or an empty text."""
    reference = node.get("$ref") if isinstance(node, Mapping) else None
    is_ours = isinstance(reference, str) and reference.startswith("#/$defs/")
    return str(reference).removeprefix("#/$defs/") if is_ours else ""


def _map(node: Any, change: Callable[[Any], Any]) -> Any:
    """Return a schema with its direct subschemas changed."""
    if not isinstance(node, Mapping):
        return node
    changed = dict(node)
    for key, value in node.items():
        if key in _NAMED and isinstance(value, Mapping):
            changed[key] = {name: change(child) for name, child in value.items()}
        elif key in _LISTED and isinstance(value, list):
            changed[key] = [change(child) for child in value]
        elif key in _SINGLE:
            changed[key] = change(value)
    return changed


# Where JSON Schema 2020-12 has subschemas: under names, in lists, and by themselves.
_NAMED = {"properties", "patternProperties", "dependentSchemas", "$defs"}
_NAMED |= {"definitions"}
_LISTED = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SINGLE = {"items", "contains", "additionalProperties", "unevaluatedProperties"}
_SINGLE |= {"propertyNames", "not", "if", "then", "else"}


def _is_recursive(schema: Any) -> bool:
    if not isinstance(schema, Mapping) or not isinstance(schema.get("$defs"), Mapping):
        return False
    return "$defs" in inline_references(dict(schema))


# What OpenAI enforces (https://platform.openai.com/docs/guides/structured-outputs,
# "Supported schemas" and "Supported properties", read 2026-11-25).
_SUPPORTED = {"type", "properties", "required", "additionalProperties", "items"}
_SUPPORTED |= {"enum", "const", "anyOf", "$ref", "$defs", "title", "description"}
_SUPPORTED |= {"pattern", "format", "multipleOf", "minItems", "maxItems"}
_SUPPORTED |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname"}
_FORMATS |= {"ipv4", "ipv6", "uuid"}
_MOST_PROPERTIES, _MOST_LEVELS, _MOST_ENUM_VALUES = 5000, 10, 1000
_LOOKS_AROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
# Keywords that say nothing about a value's form.
_ANNOTATIONS = {"default", "examples", "deprecated", "readOnly", "writeOnly", "$schema"}
_ANNOTATIONS |= {"discriminator", "contentMediaType", "contentEncoding", "$comment"}


class _NotStrictError(Exception):
    """OpenAI cannot enforce the schema."""


def make_strict(schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return a schema in the form that OpenAI enforces, or None if it has no such form.

    Every object is closed and every property required. Limits that OpenAI does not
    enforce, such as `minLength`, move into the description. A value or a key of any
    form (`Any`, `dict[str, int]`), a tuple, and a class with `extra="allow"` have no
    such form.

    Args:
        schema: The result of `inline_references`, with an object at its root.
    """
    counts = {"properties": 0, "enum": 0}
    try:
        strict = _close(schema, counts, 0)
    except _NotStrictError:
        return None
    if counts["properties"] > _MOST_PROPERTIES or counts["enum"] > _MOST_ENUM_VALUES:
        return None
    return strict


def _close(node: Any, counts: dict[str, int], level: int) -> dict[str, Any]:
    if not isinstance(node, Mapping):  # `true` and `false` are schemas too
        raise _NotStrictError
    if "$ref" in node:
        return {"$ref": node["$ref"]}
    closed = _describe_limits({k: v for k, v in node.items() if k not in _ANNOTATIONS})
    if "oneOf" in closed and "anyOf" not in closed:
        closed["anyOf"] = closed.pop("oneOf")
    if not (closed.keys() <= _SUPPORTED and closed.keys() & {"type", "anyOf"}):
        raise _NotStrictError
    counts["enum"] += len(closed.get("enum", ()))
    is_object = _allows(closed, "object")
    if is_object:
        is_open = closed.pop("additionalProperties", False) is not False
        if "properties" not in closed or is_open or level >= _MOST_LEVELS:
            raise _NotStrictError
        counts["properties"] += len(closed["properties"])
        closed["required"] = list(closed["properties"])
    elif _allows(closed, "array") and "items" not in closed:
        raise _NotStrictError
    closed = _map(closed, lambda child: _close(child, counts, level + is_object))
    return {**closed, "additionalProperties": False} if is_object else closed


def _allows(schema: Mapping[str, Any], kind: str) -> bool:
    kinds = schema.get("type")
    return kind in kinds if isinstance(kinds, list) else kinds == kind


def _describe_limits(node: dict[str, Any]) -> dict[str, Any]:
    """Move the limits that OpenAI does not enforce into the description."""
    limits = {
        key: value
        for key, value in node.items()
        if key in {"minLength", "maxLength", "uniqueItems"}
        or (key == "format" and value not in _FORMATS)
        or (key == "pattern" and _LOOKS_AROUND.search(value))
    }
    if not limits:
        return node
    texts = [f"{key}: {json.dumps(value)}" for key, value in limits.items()]
    description = " ".join(filter(None, [node.get("description"), ", ".join(texts)]))
    rest = {key: value for key, value in node.items() if key not in limits}
    return {**rest, "description": description}


def parse(form: Form, result: ChatResult[Any]) -> Any:
    """Return the answer in its form.

    JSON may stand in one fenced block (three backticks) or after a byte order mark.

    Raises:
        StructuredOutputError: The model declined (`reason` "refusal"), the answer was
            cut off ("truncation"), or it does not have the form ("invalid"). `text` is
            the whole answer.
    """
    if result.finish_reason == "content_filter" or result.refusal:
        refusal = result.refusal or "its content was filtered"
        raise _error(result, "refusal", f"the model declined: {refusal}")
    if result.finish_reason == "length":
        raise _error(result, "truncation", "the answer was cut off; raise max_tokens")
    text = result.text.strip().removeprefix("\ufeff")
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    if form.is_wrapped:
        text = _unwrap(text)
    if isinstance(form.check, TypeAdapter):
        try:
            return form.check.validate_json(text)
        except ValidationError as exc:
            raise _error(result, "invalid", explain(exc)) from exc
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _error(result, "invalid", f"the answer is not JSON: {exc}") from exc
    if form.check:
        _validate(data, form.check, result)
    return data


_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\s*```\s*", re.DOTALL | re.IGNORECASE)


def _unwrap(text: str) -> str:
    """Take the answer out of its object; a server may have ignored the schema."""
    try:
        data = from_json(text)
    except ValueError:
        return text
    is_object = isinstance(data, dict) and data.keys() == {"value"}
    return to_json(data["value"]).decode() if is_object else text


def _validate(data: Any, schema: Mapping[str, Any], result: ChatResult[Any]) -> None:
    import jsonschema
    import referencing

    # jsonschema's own registry fetches what a reference names; an empty one does not.
    kind = jsonschema.validators.validator_for(schema)
    validator = kind(schema, registry=referencing.Registry())
    error = jsonschema.exceptions.best_match(validator.iter_errors(data))
    if error is not None:
        where = ".".join(map(str, error.absolute_path)) or "the root"
        raise _error(result, "invalid", f"{error.message} at {where}")


def _error(result: ChatResult[Any], reason: str, what: str) -> StructuredOutputError:
    return StructuredOutputError(
        f"no structured answer: {' '.join(what.split())[:300]}",
        reason=reason,
        text=result.text,
        service=result.service,
        model=result.model,
        status_code=200,
        request_id=result.request_id,
    )
