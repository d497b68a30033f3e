"""Structured output: what form is asked for, and whether the answer has it.

Pure. A form is a pydantic class, a JSON schema, or OpenAI's own `response_format`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dipeo_llm.domain import ChatResult
from dipeo_llm.errors import InvalidRequestError, StructuredOutputError

_OPENAI_TYPES = frozenset({"text", "json_object", "json_schema"})


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must look like."""

    response_format: dict[str, Any]
    """As OpenAI writes it; LiteLLM turns it into every other provider's words."""
    check: Any = None
    """A TypeAdapter, or a JSON schema; None takes any JSON."""

    @property
    def is_json(self) -> bool:
        """Whether the answer is to be JSON at all."""
        return self.response_format.get("type") != "text"


def form_of(asked: Any) -> Form | None:
    """Read what a caller gave as `response_format`.

    Args:
        asked: A pydantic class or any type that pydantic can describe, a JSON schema,
            OpenAI's dict, or None.

    Raises:
        InvalidRequestError: It is none of these.
    """
    if asked is None or isinstance(asked, Form):
        return asked
    if isinstance(asked, Mapping):
        return _form_of_mapping(asked)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(asked)
        schema = adapter.json_schema()
    except Exception as exc:
        raise InvalidRequestError(
            f"response_format {asked!r} is neither a pydantic class nor a JSON schema"
        ) from exc
    name = getattr(asked, "__name__", "answer")
    return Form(_json_schema(name, strict(schema), strict=True), adapter)


def _form_of_mapping(asked: Mapping[str, Any]) -> Form:
    if asked.get("type") in _OPENAI_TYPES:
        inner = asked.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        return Form(dict(asked), schema)
    if not asked.keys() & {"type", "properties", "anyOf", "oneOf", "$ref", "enum"}:
        raise InvalidRequestError(
            "response_format is a dict that is no JSON schema: it has none of type,"
            " properties, anyOf, oneOf, $ref, enum"
        )
    name = str(asked.get("title") or "answer")
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:64]
    return Form(_json_schema(name, dict(asked), strict=False), dict(asked))


def _json_schema(name: str, schema: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "schema": schema, "strict": strict},
    }


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema in the form that OpenAI enforces.

    Every object closed, every property required, no defaults, references resolved. A
    schema that refers to itself keeps its references, which OpenAI takes.

    Source: https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
    (read 2026-11-23).
    """
    definitions = schema.get("$defs", {})
    closed: dict[str, Any] = _strict(schema, definitions, ())
    if "$ref" in json.dumps(closed):
        closed["$defs"] = {
            name: _strict(value, definitions, (name,))
            for name, value in definitions.items()
        }
    return closed


def _strict(node: Any, definitions: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    if isinstance(node, list):
        return [_strict(item, definitions, inside) for item in node]
    if not isinstance(node, dict):
        return node
    name = str(node.get("$ref", "")).removeprefix("#/$defs/")
    if name in definitions:
        if name in inside:
            return {"$ref": node["$ref"]}
        resolved = _strict(definitions[name], definitions, (*inside, name))
        return {**resolved, **{k: v for k, v in node.items() if k == "description"}}
    closed = {
        key: {k: _strict(v, definitions, inside) for k, v in value.items()}
        if key == "properties"
        else _strict(value, definitions, inside)
        for key, value in node.items()
        if key not in {"$defs", "default", "discriminator"}
    }
    if "oneOf" in closed:  # OpenAI takes anyOf only
        closed["anyOf"] = closed.pop("oneOf")
    if closed.get("type") == "object" and "properties" in closed:
        closed["additionalProperties"] = False
        closed["required"] = list(closed["properties"])
    return closed


def parse(form: Form, result: ChatResult) -> Any:
    """Return the answer in its form.

    Raises:
        StructuredOutputError: The model declined (`reason` "refusal"), the answer was
            cut ("truncation"), or it does not have the form ("invalid"). The text is
            kept.
    """
    if result.finish_reason == "content_filter" or result.refusal:
        said = result.refusal or "its content was filtered"
        raise _error(result, "refusal", f"the model declined: {said}")
    if result.finish_reason == "length":
        raise _error(
            result, "truncation", "the answer was cut: give it more max_tokens"
        )
    if isinstance(form.check, TypeAdapter):
        try:
            return form.check.validate_json(result.text)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "the top"
            raise _error(result, "invalid", f"{first['msg']} at {where}") from exc
    try:
        data = json.loads(result.text)
    except (ValueError, RecursionError) as exc:
        raise _error(result, "invalid", f"the answer is not JSON: {exc}") from exc
    if form.check:
        _validate(data, form.check, result)
    return data


def _validate(data: Any, schema: Mapping[str, Any], result: ChatResult) -> None:
    import jsonschema

    try:
        jsonschema.validate(data, schema)
    except jsonschema.ValidationError as exc:
        where = ".".join(map(str, exc.absolute_path)) or "the top"
        raise _error(result, "invalid", f"{exc.message} at {where}") from exc
    except jsonschema.SchemaError as exc:
        raise InvalidRequestError(
            f"response_format is not a valid JSON schema: {exc.message}"
        ) from exc


def _error(result: ChatResult, reason: str, what: str) -> StructuredOutputError:
    return StructuredOutputError(
        f"no structured answer: {' '.join(what.split())[:300]}",
        reason=reason,
        text=result.text,
        service=result.service,
        model=result.model,
        status_code=200,
        request_id=result.request_id,
    )
