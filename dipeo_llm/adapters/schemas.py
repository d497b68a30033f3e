"""JSON schemas in fewer keywords, for providers that read only some of them. Pure."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from dipeo_llm.errors import InvalidRequestError

_DATA = frozenset({"enum", "default", "examples", "required"})
_DROPPED = frozenset({"discriminator", "strict"})


def simplify(
    schema: Any, *, unread: Collection[str] = (), plain_enums: bool = False
) -> Any:
    """Write a schema without `const`, `oneOf` and `allOf`, with the same meaning.

    Args:
        schema: A JSON schema, or a part of one.
        unread: Further keywords that the provider would drop silently.
        plain_enums: Whether an `enum` holds only texts and numbers there.

    Raises:
        InvalidRequestError: The schema has a keyword of *unread*, parts of an `allOf`
            that cannot be merged, or an `enum` that cannot be made plain.
    """
    if schema is True:
        return {}
    inner = partial(simplify, unread=unread, plain_enums=plain_enums)
    if isinstance(schema, list):
        return [inner(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    simple: dict[str, Any] = {}
    for name, value in schema.items():
        if name in unread:
            raise InvalidRequestError(
                f"the provider does not read {name!r} of a schema"
            )
        if name == "allOf":
            for part in inner(value):
                _merge(simple, part)
        elif name in {"const", "enum"} and plain_enums:
            _merge(simple, _plain_enum([value] if name == "const" else value))
        elif name not in _DROPPED:
            _merge(simple, _simplify_keyword(name, value, inner))
    return simple


def _simplify_keyword(
    name: str, value: Any, inner: Callable[[Any], Any]
) -> dict[str, Any]:
    if name in {"properties", "$defs"} and isinstance(value, Mapping):
        return {name: {key: inner(each) for key, each in value.items()}}
    if name == "const":
        return {"enum": [value]}
    if name in _DATA or isinstance(value, bool):
        return {name: value}
    return {"anyOf" if name == "oneOf" else name: inner(value)}


def _plain_enum(values: list[Any]) -> dict[str, Any]:
    """Write an `enum` whose null and whose two truth values are types of their own."""
    plain = [v for v in values if type(v) in {str, int, float}]
    truths = [value for value in values if isinstance(value, bool)]
    ways: list[dict[str, Any]] = [{"enum": plain}] if plain else []
    ways += [{"type": "null"}] * (None in values)
    ways += [{"type": "boolean"}] * (len(set(truths)) == 2)
    if len(plain) + len(truths) + values.count(None) < len(values) or len(truths) == 1:
        raise InvalidRequestError(
            f"the provider takes no `enum` with {values}: use texts and numbers"
        )
    return ways[0] if len(ways) == 1 else {"anyOf": ways}


def _merge(simple: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if simple.setdefault(name, value) != value:
            raise InvalidRequestError(
                f"the parts of an `allOf` differ in {name!r}: write them as one schema"
            )
