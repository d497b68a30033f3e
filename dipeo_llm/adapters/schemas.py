"""JSON schemas in fewer keywords, for providers that read only some of them. Pure."""

from collections.abc import Collection, Mapping
from typing import Any

from dipeo_llm.errors import InvalidRequestError

_DATA = frozenset({"enum", "default", "examples", "required"})
_DROPPED = frozenset({"discriminator", "strict"})


def simplify(schema: Any, *, unread: Collection[str] = ()) -> Any:
    """Write a schema without `const`, `oneOf` and `allOf`, with the same meaning.

    Args:
        schema: A JSON schema, or a part of one.
        unread: Further keywords that the provider would drop silently.

    Raises:
        InvalidRequestError: The schema has a keyword of *unread*, or parts of an
            `allOf` that cannot be merged.
    """
    if schema is True:
        return {}
    if isinstance(schema, list):
        return [simplify(item, unread=unread) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    simple: dict[str, Any] = {}
    for name, value in schema.items():
        if name in unread:
            raise InvalidRequestError(
                f"the provider does not read {name!r} of a schema"
            )
        if name == "allOf":
            for part in simplify(value, unread=unread):
                _merge(simple, part)
        elif name not in _DROPPED:
            _merge(simple, _simplify_keyword(name, value, unread))
    return simple


def _simplify_keyword(name: str, value: Any, unread: Collection[str]) -> dict[str, Any]:
    if name in {"properties", "$defs"} and isinstance(value, Mapping):
        return {
            name: {key: simplify(inner, unread=unread) for key, inner in value.items()}
        }
    if name == "const":
        return {"enum": [value]}
    if name in _DATA or isinstance(value, bool):
        return {name: value}
    return {"anyOf" if name == "oneOf" else name: simplify(value, unread=unread)}


def _merge(simple: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if simple.setdefault(name, value) != value:
            raise InvalidRequestError(
                f"the parts of an `allOf` differ in {name!r}: write them as one schema"
            )
