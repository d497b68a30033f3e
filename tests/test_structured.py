"""Structured output: what is sent for a type, and what is taken as its answer."""

import dataclasses
import datetime as dt
import ipaddress
import json
import re
import sys
import typing
import uuid
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    RootModel,
    TypeAdapter,
    create_model,
)
from typing_extensions import TypedDict

from dipeo_llm.domain import ChatResult
from dipeo_llm.errors import InvalidRequestError, StructuredOutputError
from dipeo_llm.service import LLMInfraService
from dipeo_llm.structured import form_of, parse
from tests.conftest import name_of
from tests.provider_server import Answer, ProviderServer

T = TypeVar("T")

# The subset that OpenAI documents for `strict: true`:
# https://platform.openai.com/docs/guides/structured-outputs (read 2026-11-25).
_DESCRIBED = {"title": {"type": "string"}, "description": {"type": "string"}}


def _node(kind: Any, **keywords: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **_DESCRIBED, **keywords},
        "required": ["type"],
        "additionalProperties": False,
    }


_SCHEMA = {"$ref": "#/$defs/schema"}
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NUMBERS = {key: {"type": "number"} for key in _LIMITS}
_CHOICES: dict[str, Any] = {"enum": {"type": "array", "minItems": 1}, "const": {}}
_OBJECT: dict[str, Any] = _node(
    "object",
    properties={"type": "object", "additionalProperties": _SCHEMA},
    required={"type": "array"},
    additionalProperties={"const": False},
)
_OBJECT["required"] = ["type", "properties", "required", "additionalProperties"]
_FORMATS = ["date-time", "time", "date", "duration", "email", "hostname"]
STRICT: dict[str, Any] = {
    "$defs": {
        "schema": {
            "anyOf": [
                _OBJECT,
                {
                    **_node("array", items=_SCHEMA, minItems={}, maxItems={}),
                    "required": ["type", "items"],
                },
                _node(
                    "string",
                    **_CHOICES,
                    pattern={"type": "string", "not": {"pattern": r"\(\?[=!<]"}},
                    format={"enum": [*_FORMATS, "ipv4", "ipv6", "uuid"]},
                ),
                _node("integer", **_CHOICES, **_NUMBERS),
                _node("number", **_CHOICES, **_NUMBERS),
                _node("boolean", **_CHOICES),
                _node("null", **_CHOICES),
                {
                    "type": "object",
                    "properties": {
                        "anyOf": {"type": "array", "items": _SCHEMA},
                        **_DESCRIBED,
                    },
                    "required": ["anyOf"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {"$ref": {"pattern": r"^#/\$defs/"}},
                    "required": ["$ref"],
                    "additionalProperties": False,
                },
            ]
        }
    },
    **_OBJECT,
    "properties": {
        **_OBJECT["properties"],
        "$defs": {"type": "object", "additionalProperties": _SCHEMA},
    },
}


class River(BaseModel):
    """A river."""

    name: str
    length_km: Annotated[int, Field(ge=1)] = 1
    mouth: str | None = None


class Lake(BaseModel):
    """A lake, told from a river by its kind."""

    kind: Literal["lake"] = "lake"
    depth: float


class Pond(BaseModel):
    """A pond, likewise."""

    kind: Literal["pond"] = "pond"
    fish: list[str]


class Node(BaseModel):
    """A class that refers to itself."""

    value: int
    children: list["Node"] = []


class Page(BaseModel, Generic[T]):
    """A generic class."""

    items: list[T]


class Colour(Enum):
    """An enum of strings."""

    RED = "red"
    BLUE = "blue"


class Keywords(BaseModel):
    """A class whose fields are named like keywords of a schema."""

    type: str
    enum: int
    default: str
    properties: list[int]
    required: bool
    description: str
    ref: str = Field(alias="$ref")


class Open(BaseModel):
    """A class that keeps fields it does not know."""

    model_config = ConfigDict(extra="allow")

    name: str


class Place(TypedDict):
    """A typed dict."""

    where: str


@dataclasses.dataclass
class Point:
    """A dataclass."""

    x: int
    y: int = 0


class Names(RootModel[list[str]]):
    """A model that is a list."""


Water = Annotated[Lake | Pond, Field(discriminator="kind")]
NESTED: Any = River
for _ in range(12):
    NESTED = create_model("Nested", inner=(NESTED, ...))

STRICT_TYPES: list[tuple[Any, Any]] = [
    (River, River(name="Inn", length_km=517)),
    (Page[River], Page[River](items=[River(name="Inn")])),
    (list[River], [River(name="Inn")]),
    (River | Lake, Lake(depth=2.5)),
    (Water, Pond(fish=["carp"])),
    (Names, Names(["a"])),
    (int, 3),
    (str, "three"),
    (bool, True),
    (Colour, Colour.BLUE),
    (Literal["a", "b"], "b"),
    (list[int | None], [1, None]),
    (Node, Node(value=1, children=[Node(value=2)])),
    (list[Node], [Node(value=1, children=[Node(value=2)])]),
    (Keywords, Keywords(type="a", enum=1, default="b", properties=[2], required=True,
                        description="c", **{"$ref": "d"})),
    (Place, {"where": "here"}),
    (Point, Point(1, 2)),
    (Decimal, Decimal("1.5")),
    (Annotated[str, Field(min_length=2, max_length=9)], "three"),
    (Annotated[str, Field(pattern=r"^a+$")], "aaa"),
    (set[int], {1, 2}),
    (dt.datetime, dt.datetime(2026, 11, 25, tzinfo=dt.UTC)),
    (dt.timedelta, dt.timedelta(seconds=5)),
    (uuid.UUID, uuid.UUID(int=1)),
    (ipaddress.IPv4Address, ipaddress.IPv4Address("127.0.0.1")),
    (HttpUrl, HttpUrl("https://x.org/")),
    (Path, Path("a/b")),
]  # fmt: skip
FREE_TYPES: list[tuple[Any, Any]] = [
    (dict[str, int], {"a": 1}),
    (list[dict[str, River]], [{"a": River(name="Inn")}]),
    (Any, {"a": [1]}),
    (list[Any], [1, "a"]),
    (tuple[int, str], (1, "a")),
    (Open, Open.model_validate({"name": "a", "more": 1})),
    (Literal["a", 1], 1),
    (NESTED, None),
]


def sent(asked: Any) -> dict[str, Any]:
    """Return what is sent under `json_schema` for a type."""
    form = form_of(asked)
    assert form is not None
    assert form.response_format["type"] == "json_schema"
    described: dict[str, Any] = form.response_format["json_schema"]
    return described


def answer(asked: Any, text: str, **fields: Any) -> Any:
    """Read a text as the answer to a form."""
    form = form_of(asked)
    assert form is not None
    return parse(form, ChatResult(text=text, finish_reason="stop", **fields))


def written(asked: Any, value: Any) -> Any:
    """Return a value as the model must write it under the schema that was sent."""
    data = TypeAdapter(asked).dump_python(value, mode="json", by_alias=True)
    form = form_of(asked)
    return {"value": data} if form is not None and form.is_wrapped else data


@pytest.mark.parametrize(("asked", "value"), STRICT_TYPES, ids=name_of)
def test_a_type_is_enforced_within_what_openai_documents(
    asked: Any, value: Any
) -> None:
    """The schema is strict, in the documented subset, and allows the type's values."""
    described = sent(asked)

    assert described["strict"] is True
    jsonschema.validate(described["schema"], STRICT)
    jsonschema.Draft202012Validator.check_schema(described["schema"])
    data = written(asked, value)
    jsonschema.validate(data, described["schema"])
    assert answer(asked, json.dumps(data)) == value


@pytest.mark.parametrize(("asked", "value"), FREE_TYPES, ids=name_of)
def test_a_type_that_cannot_be_enforced_says_so(asked: Any, value: Any) -> None:
    """`strict` is false, and the schema still says what the type says."""
    described = sent(asked)

    assert described["strict"] is False
    assert described["schema"]["type"] == "object"
    if value is not None:
        data = written(asked, value)
        jsonschema.validate(data, described["schema"])
        assert answer(asked, json.dumps(data)) == value


@pytest.mark.parametrize(
    "asked", [t for t, _ in STRICT_TYPES if t is not NESTED], ids=name_of
)
def test_every_object_is_closed_and_whole(asked: Any) -> None:
    """All properties are required, also those with a default."""

    def objects(node: Any) -> list[Any]:
        children = [*node.get("properties", {}).values(), *node.get("anyOf", [])]
        children += [node["items"]] if "items" in node else []
        own = [node] if node.get("type") == "object" else []
        return own + [found for child in children for found in objects(child)]

    schema = sent(asked)["schema"]
    for found in [*objects(schema), *schema.get("$defs", {}).values()]:
        assert found["required"] == list(found["properties"])
        assert found["additionalProperties"] is False


@pytest.mark.parametrize(
    "asked",
    [Page[River], list[River], dict[str, int], River | Lake, Water, int, Any],
    ids=name_of,
)
def test_a_name_is_one_that_openai_takes(asked: Any) -> None:
    """Whatever the type is called, its name has letters, digits, `_` and `-` only."""
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", sent(asked)["name"])


@pytest.mark.parametrize("title", ["Größe in m²", "a" * 80, "", "!!"])
def test_the_title_of_a_schema_is_cleaned(title: str) -> None:
    """A schema's own title becomes a name that OpenAI takes."""
    name = sent({"title": title, "type": "object"})["name"]

    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)


def test_a_limit_that_is_not_enforced_is_described() -> None:
    """The model reads it, and the answer is checked against it."""
    limited = Annotated[str, Field(min_length=3, description="A word.")]

    described = sent(limited)["schema"]["properties"]["value"]

    assert described == {"type": "string", "description": "A word. minLength: 3"}
    with pytest.raises(StructuredOutputError, match="at least 3"):
        answer(limited, '{"value": "ab"}')


@pytest.mark.parametrize(
    ("asked", "is_recursive"),
    [
        (River, False),
        (Page[River], False),
        (Node, True),
        (list[Node], True),
        (Node.model_json_schema(), True),
        (Page[River].model_json_schema(), False),
        ({"type": "json_schema", "json_schema": {"schema": Node.model_json_schema()}},
         True),
        ({"type": "json_object"}, False),
    ],
    ids=name_of,
)  # fmt: skip
def test_a_form_says_whether_it_refers_to_itself(
    asked: Any, is_recursive: bool
) -> None:
    """A provider that takes no recursion can be told so before anything is sent."""
    form = form_of(asked)

    assert form is not None
    assert form.is_recursive is is_recursive


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "array", "items": {"type": "integer"}}, '{"value": [1]}', [1]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, '{"value": null}', None),
        ({"enum": ["a", "b"]}, '{"value": "a"}', "a"),
        ({"type": ["string", "null"]}, '{"value": "a"}', "a"),
        ({"type": "object", "properties": {"value": {}}}, '{"value": 1}', {"value": 1}),
        ({"properties": {"a": {}}}, '{"a": 1}', {"a": 1}),
    ],
    ids=name_of,
)
def test_a_schema_of_the_callers_own_has_an_object_at_its_root(
    schema: Any, text: str, value: Any
) -> None:
    """OpenAI refuses any other root, strict or not; the answer is taken out again."""
    described = sent(schema)

    root = described["schema"]
    assert root.get("type", "object") == "object"
    assert described["strict"] is False
    jsonschema.validate(json.loads(text), root)
    assert answer(schema, text) == value


def test_definitions_stay_at_the_root() -> None:
    """A wrapped schema's references still lead to its definitions."""
    schema = {
        "$defs": {"n": {"type": "integer"}},
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
    }

    jsonschema.validate({"value": [1]}, sent(schema)["schema"])
    with pytest.raises(StructuredOutputError, match="not of type"):
        answer(schema, '{"value": ["a"]}')


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Inn"}',
        ' \n{"name": "Inn"}\n',
        '\ufeff{"name": "Inn"}',
        '```json\n{"name": "Inn"}\n```',
        '```\n{"name": "Inn"}\n```\n',
        '\n```JSON\n{\n"name": "Inn"\n}\n```',
        '\ufeff```json\n{"name": "Inn"}```',
    ],
    ids=name_of,
)
def test_json_may_stand_in_one_fenced_block(text: str) -> None:
    """White space, a byte order mark and one fenced block around it are taken off."""
    assert answer(River, text) == River(name="Inn")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Here it is:",
        '```json\n{"name": "Inn"}\n```\n```json\n{"name": "Po"}\n```',
        '{"name": "Inn"} {"name": "Po"}',
        '{"name": 5}',
        "[]",
    ],
    ids=name_of,
)
def test_anything_else_is_invalid_and_kept(text: str) -> None:
    """Two answers are none; the text is in the error."""
    with pytest.raises(StructuredOutputError) as caught:
        answer(River, text)

    assert (caught.value.reason, caught.value.text) == ("invalid", text)


def test_a_fence_in_a_text_is_part_of_it() -> None:
    """Only a block around the whole answer is taken off."""
    text = json.dumps({"name": "```json\n{}\n```"})

    assert answer(River, text).name == "```json\n{}\n```"


def test_an_answer_that_is_not_wrapped_is_taken_too() -> None:
    """A server may enforce the type and ignore the object around it."""
    assert answer(list[int], "[1, 2]") == [1, 2]
    assert answer(int, "5") == 5


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (3, "3"),
        ({"a": 1}, "not a JSON schema"),
        (object(), "pydantic"),
        (typing.Callable[[int], int], "CallableSchema"),
        pytest.param(
            typing.TypedDict("Plain", {"a": int}),  # type: ignore[operator]
            "typing_extensions.TypedDict",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12), reason="pydantic takes it since 3.12"
            ),
        ),
    ],
    ids=name_of,
)
def test_a_type_that_cannot_be_described_says_why(asked: Any, why: str) -> None:
    """The error has pydantic's reason, on one line."""
    with pytest.raises(InvalidRequestError, match="response_format") as caught:
        form_of(asked)

    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"refusal": "I would rather not."}, "refusal"),
        ({"finish_reason": "content_filter"}, "refusal"),
        ({"finish_reason": "length"}, "truncation"),
    ],
)
def test_an_answer_that_is_not_one_says_why(fields: Any, reason: str) -> None:
    """A refusal and a cut are told from an invalid answer."""
    form = form_of(River)
    assert form is not None

    with pytest.raises(StructuredOutputError) as caught:
        parse(form, ChatResult(text="{", **fields))

    assert caught.value.reason == reason


def test_a_type_is_described_once() -> None:
    """Describing a class takes as long as a call, so the form is kept."""
    unhashable = Annotated[int, {"a": 1}]

    assert form_of(River) is form_of(River)
    assert sent(unhashable) == sent(int) | {"name": sent(unhashable)["name"]}


async def test_a_list_comes_back_as_a_list(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Over the wire it is an object, and to the caller the list that was asked for."""
    server.reply(Answer('{"value": [{"name": "Inn"}]}'))

    result = await service.complete(
        [{"role": "user", "content": "Rivers?"}],
        "gpt-4.1-nano",
        "openai",
        response_format=list[River],
    )

    asked = server.requests[0].json["response_format"]["json_schema"]
    jsonschema.validate(asked["schema"], STRICT)
    assert result.parsed == [River(name="Inn")]


_LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (str, st.text()),
    (bool, st.booleans()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (Decimal, st.decimals(-1000, 1000, places=2)),
    (dt.date, st.dates()),
    (uuid.UUID, st.uuids()),
    (Colour, st.sampled_from(Colour)),
    (type(None), st.none()),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (Any, st.one_of(st.integers(), st.lists(st.text(max_size=3), max_size=2))),
]
Typed = tuple[Any, st.SearchStrategy[Any]]


def _list(inner: Typed) -> Typed:
    return list.__class_getitem__(inner[0]), st.lists(inner[1], max_size=3)


def _optional(inner: Typed) -> Typed:
    return Union[inner[0], None], st.none() | inner[1]  # noqa: UP007


def _dict(inner: Typed) -> Typed:
    kind = dict.__class_getitem__((str, inner[0]))
    return kind, st.dictionaries(st.text(), inner[1], max_size=2)


def _pair(inner: tuple[Typed, Typed]) -> Typed:
    (one, ones), (two, twos) = inner
    return tuple.__class_getitem__((one, two)), st.tuples(ones, twos)


def _record(fields: list[Typed]) -> Typed:
    kinds: Any = {f"field_{i}": (kind, ...) for i, (kind, _) in enumerate(fields)}
    made: Any = create_model("Record", **kinds)
    values = {f"field_{i}": values for i, (_, values) in enumerate(fields)}
    return made, st.fixed_dictionaries(values).map(lambda given: made(**given))


def _combined(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    return st.one_of(
        inner.map(_list),
        inner.map(_optional),
        inner.map(_dict),
        st.tuples(inner, inner).map(_pair),
        st.lists(inner, min_size=1, max_size=3).map(_record),
    )


TYPES = st.recursive(st.sampled_from(_LEAVES), _combined, max_leaves=5)


# The first examples import what describes a pydantic class.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(typed=TYPES, data=st.data())
def test_any_type_is_sent_in_a_form_that_openai_takes(
    typed: Typed, data: st.DataObject
) -> None:
    """Strict is within the subset, and a value of the type is valid and comes back."""
    asked, values = typed
    value = data.draw(values)
    described = sent(asked)

    if described["strict"]:
        jsonschema.validate(described["schema"], STRICT)
    assert described["schema"]["type"] == "object"
    wire = written(asked, value)
    jsonschema.validate(wire, described["schema"])
    again = answer(asked, json.dumps(wire))
    assert written(asked, again) == wire
