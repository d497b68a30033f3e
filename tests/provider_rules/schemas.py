"""What the rules of several providers share: fields, headers and JSON schemas."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema

Json = Mapping[str, Any]
Check = Callable[[Any], str | None]
"""Returns what is wrong with a value, or None."""


class Lost(str):
    """Something that the provider accepts and does not do: the caller would not know."""

    __slots__ = ()


def refused(found: Iterable[str]) -> list[str]:
    """Return what the provider answers with an error."""
    return [said for said in found if not isinstance(said, Lost)]


def lost(found: Iterable[str]) -> list[str]:
    """Return what the provider passes over."""
    return [said for said in found if isinstance(said, Lost)]


# --- Fields ----------------------------------------------------------------------------


def integer(low: int | None = None, high: int | None = None) -> Check:
    """Check for a JSON integer in a range; `1.0` is a decimal to most servers."""

    def check(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return f"must be an integer, is {value!r}"
        return _in_range(value, low, high)

    return check


def number(low: float | None = None, high: float | None = None) -> Check:
    """Check for a JSON number in a range."""

    def check(value: Any) -> str | None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"must be a number, is {value!r}"
        return _in_range(value, low, high)

    return check


def _in_range(value: float, low: float | None, high: float | None) -> str | None:
    if low is not None and value < low:
        return f"must be at least {low}, is {value}"
    if high is not None and value > high:
        return f"must be at most {high}, is {value}"
    return None


def boolean(value: Any) -> str | None:
    """Check for a JSON boolean."""
    return None if isinstance(value, bool) else f"must be a boolean, is {value!r}"


def string(value: Any) -> str | None:
    """Check for a JSON string."""
    return None if isinstance(value, str) else f"must be a string, is {value!r}"


def one_of(*words: Any) -> Check:
    """Check for one of some values."""

    def check(value: Any) -> str | None:
        known = any(value == word and type(value) is type(word) for word in words)
        return None if known else f"must be one of {list(words)}, is {value!r}"

    return check


def obj(value: Any) -> str | None:
    """Check for a JSON object."""
    return None if isinstance(value, Mapping) else f"must be an object, is {value!r}"


def array(value: Any) -> str | None:
    """Check for a JSON array."""
    return None if isinstance(value, list) else f"must be an array, is {value!r}"


def strings(most: int | None = None) -> Check:
    """Check for an array of non-empty strings."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            return f"must be an array of strings, is {value!r}"
        if "" in value:
            return "has an empty string"
        if most is not None and len(value) > most:
            return f"has {len(value)} strings, at most {most} are taken"
        return None

    return check


def anything(value: Any) -> str | None:
    """Take any value: the field is known, its value is not checked here."""
    return None


def known_fields(
    at: str, value: Any, table: Mapping[str, Check], *, null: bool = False
) -> Iterator[str]:
    """Yield what is wrong with the fields of an object.

    Args:
        at: The path of the object; empty at the root.
        value: The object.
        table: A check for each known field.
        null: Whether the server reads null as "not set".
    """
    if not isinstance(value, Mapping):
        yield f"{at or 'body'}: must be an object, is {value!r}"
        return
    for name, item in value.items():
        where = f"{at}.{name}" if at else str(name)
        if name not in table:
            yield f"{where}: unknown field"
        elif item is None:
            if not null and table[name](None) is not None:
                yield f"{where}: must not be null"
        elif (wrong := table[name](item)) is not None:
            yield f"{where}: {wrong}"


# --- Headers ---------------------------------------------------------------------------


def head(
    method: str, path: str, headers: Mapping[str, str], key_header: str | None
) -> Iterator[str]:
    """Yield what is wrong around the body: the method, the type, the place of the key.

    Args:
        method: The HTTP method.
        path: The path with its query.
        headers: The request's headers.
        key_header: Where the provider wants its key; None if it takes none.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    if method.upper() != "POST":
        yield f"method: must be POST, is {method}"
    kind = lower.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        yield f"headers.content-type: must be application/json, is {kind!r}"
    for name in parse_qs(urlsplit(path).query, keep_blank_values=True):
        if name.lower() in {"key", "api_key", "apikey", "access_token", "token"}:
            yield f"path: the query has {name!r}; a key belongs in a header"
    if key_header and not lower.get(key_header):
        yield f"headers.{key_header}: missing"
    if key_header == "authorization" and lower.get(key_header):
        scheme, _, token = lower[key_header].partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            yield "headers.authorization: must be a Bearer token"
    for name in {"authorization", "x-api-key", "x-goog-api-key", "api-key"} & set(
        lower
    ):
        if name != key_header and key_header is not None:
            yield f"headers.{name}: is not where this provider takes a key"


# --- JSON schemas ----------------------------------------------------------------------

TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = (
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedProperties",
    "unevaluatedItems",
)
ANNOTATIONS = frozenset(
    {"title", "description", "examples", "deprecated", "readOnly", "writeOnly"}
)
"""Keywords that check nothing."""


def subschemas(schema: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Yield every schema in a schema, the whole first, each with its path.

    A property may be called like a keyword: only the places that hold schemas are
    followed.
    """
    yield at, schema
    if not isinstance(schema, Mapping):
        return
    for key in _MAPS:
        inside = schema.get(key)
        for name, item in inside.items() if isinstance(inside, Mapping) else ():
            yield from subschemas(item, f"{at}.{key}.{name}")
    for key in _LISTS:
        inside = schema.get(key)
        for i, item in enumerate(inside) if isinstance(inside, list) else ():
            yield from subschemas(item, f"{at}.{key}[{i}]")
    for key in _ONES:
        inside = schema.get(key)
        if isinstance(inside, list):  # `items` of older drafts
            for i, item in enumerate(inside):
                yield from subschemas(item, f"{at}.{key}[{i}]")
        elif isinstance(inside, Mapping):
            yield from subschemas(inside, f"{at}.{key}")


def resolve(root: Any, reference: str) -> Any:
    """Return what a local reference points at.

    Raises:
        LookupError: Nothing is there, or the reference is not local.
    """
    if not reference.startswith("#"):
        raise LookupError(reference)
    node = root
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            raise LookupError(reference)
    return node


def references(schema: Any, at: str) -> Iterator[str]:
    """Yield the references that lead nowhere."""
    for where, node in subschemas(schema, at):
        if isinstance(node, Mapping) and "$ref" in node:
            try:
                resolve(schema, str(node["$ref"]))
            except LookupError:
                yield f"{where}.$ref: {node['$ref']!r} is not in the schema"


def recursive(schema: Any) -> bool:
    """Say whether a schema refers to itself, directly or through its definitions."""

    def visit(node: Any, inside: tuple[str, ...]) -> bool:
        for _, part in subschemas(node, ""):
            if not isinstance(part, Mapping) or not isinstance(part.get("$ref"), str):
                continue
            reference = part["$ref"]
            if reference in inside:
                return True
            try:
                target = resolve(schema, reference)
            except LookupError:
                continue
            if visit(target, (*inside, reference)):
                return True
        return False

    root = {k: v for k, v in schema.items() if k not in {"$defs", "definitions"}}
    return visit(root, ("#",))


def well_formed(schema: Any, at: str) -> Iterator[str]:
    """Yield what makes a value no JSON schema of draft 2020-12."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as exc:
        where = "".join(
            f"[{step}]" if isinstance(step, int) else f".{step}"
            for step in exc.absolute_path
        )
        yield f"{at}{where}: is not valid JSON schema: {exc.message[:80]}"


def types_of(schema: Json) -> set[str]:
    """Return the types that a schema names."""
    named = schema.get("type")
    return set(named) if isinstance(named, list) else {named} if named else set()


def depth(schema: Any, root: Any, most: int = 40) -> int:
    """Count the levels of objects and arrays in a schema, references followed once."""

    def count(node: Any, inside: tuple[str, ...], left: int) -> int:
        if not isinstance(node, Mapping) or not left:
            return 0
        if isinstance(node.get("$ref"), str):
            reference = node["$ref"]
            if reference in inside:
                return 0
            try:
                target = resolve(root, reference)
            except LookupError:
                return 0
            return count(target, (*inside, reference), left - 1)
        below = [
            count(item, inside, left - 1)
            for key in ("properties",)
            for item in (node.get(key) or {}).values()
        ]
        below += [count(node.get("items"), inside, left - 1)]
        own = 1 if types_of(node) & {"object"} else 0
        below = [own + n for n in below]
        below += [
            count(item, inside, left - 1)
            for key in _LISTS
            for item in node.get(key) or ()
        ]
        return max(below, default=own)

    return count(schema, (), most)


def texts(value: Any) -> str:
    """Return every string in a value in one text, for rules about words."""
    return json.dumps(value, ensure_ascii=False)


def parse_object(text: Any) -> str | None:
    """Say why a string is not a JSON object; None if it is one."""
    if not isinstance(text, str):
        return f"must be a string of JSON, is {text!r}"
    try:
        value = json.loads(text)
    except ValueError:
        return f"is not JSON: {text[:40]!r}"
    return None if isinstance(value, dict) else f"is not a JSON object: {text[:40]!r}"


def table_row(rows: Sequence[tuple[str, Any]], model: str) -> Any:
    """Return the value of the first row whose pattern matches a whole name, or None."""
    for pattern, value in rows:
        if re.fullmatch(pattern, model):
            return value
    return None
