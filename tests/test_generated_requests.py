"""Generated requests: types, functions, names of tools, conversations and options.

For each provider, either the request keeps the provider's rules or the caller gets an
InvalidRequestError before anything is sent. Nothing of a schema's meaning is lost on the
way: a value that the caller's type allows is valid under the schema that is sent, and a
value that it refuses is not. `python -m tests.test_generated_requests` does not stop at
the first example that breaks this and prints them all, grouped, the shortest of each.
"""

import asyncio
import enum
import json
import re
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from types import UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import jsonschema
import pytest
import referencing.exceptions
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, create_model

from dipeo_llm import InvalidRequestError, LLMInfraService, ToolConfig, ToolType
from tests.conftest import PROVIDERS
from tests.provider_rules.gemini import camel
from tests.provider_server import Answer, ProviderServer, Received
from tests.sent_requests import HELLO, Requests, Sent, requests

MODELS: dict[str, list[str]] = {
    "openai": [
        "gpt-4.1",
        "gpt-4o-mini",
        "o3",
        "o4-mini",
        "gpt-5",
        "gpt-5.1",
        "gpt-5.4",
        "gpt-5.6-terra",
        "gpt-6-astra",
        "gpt-5-pro",
        "gpt-5.1-codex",
        "chat-latest",
        "gpt-4o-search-preview",
    ],
    "anthropic": [
        "claude-haiku-4-5",
        "claude-opus-4-5",
        "claude-opus-4-1",
        "claude-sonnet-4-6",
        "claude-opus-4-8",
        "claude-sonnet-5",
        "claude-opus-5-5",
        "claude-fable-5",
    ],
    "google": [
        "gemini-2.5-flash",
        "gemini-2.5-pro",
        "gemini-2.5-flash-lite",
        "gemini-3-flash-preview",
        "gemini-3.1-pro-preview",
        "gemini-3.8-flash",
    ],
    "ollama": ["llama3.2", "qwen3", "qwen3-coder", "gpt-oss:20b", "deepseek-r1"],
}
T = TypeVar("T")


# --- Types with values -----------------------------------------------------------------


@dataclass(frozen=True)
class Typed:
    """A type, JSON values that it allows and some that it refuses."""

    annotation: Any
    allowed: tuple[Any, ...]
    refused: tuple[Any, ...] = ()


class Speed(enum.Enum):
    """A choice of words."""

    FAST = "fast"
    SLOW = "slow"


class Level(enum.IntEnum):
    """A choice of numbers."""

    LOW = 1
    HIGH = 2


class Cat(BaseModel):
    """One of two."""

    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    """The other of two."""

    kind: Literal["dog"]
    name: str


class Node(BaseModel):
    """A class that refers to itself."""

    value: int
    children: list["Node"]


class Page(BaseModel, Generic[T]):
    """A class with a parameter."""

    items: list[T]
    total: int


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
CAT, DOG = {"kind": "cat", "lives": 9}, {"kind": "dog", "name": "Rex"}
LEAF = {"value": 1, "children": []}
LEAVES: tuple[Typed, ...] = (
    Typed(str, ("x", ""), (5,)),
    Typed(int, (3,), ("x", 1.5)),
    Typed(float, (1.5, 2), ("x",)),
    Typed(bool, (True,), ("x",)),
    Typed(Literal["fast"], ("fast",), ("slow", 1)),
    Typed(Literal["a", "b"], ("a", "b"), ("c",)),
    Typed(Literal["a", 1], ("a", 1), ("c", 2)),
    Typed(Speed, ("fast", "slow"), ("x",)),
    Typed(Level, (1, 2), (7, "x")),
    Typed(Decimal, (1.5, "1.50"), ([1],)),
    Typed(datetime, ("2026-11-25T12:00:00Z",), (["x"],)),
    Typed(uuid.UUID, (str(uuid.UUID(int=5)),), (5,)),
    Typed(Annotated[int, Field(ge=1, le=5)], (1, 5), ("x",)),
    Typed(Annotated[str, Field(min_length=2, pattern="^a+$")], ("aa",), (5,)),
    Typed(Annotated[list[int], Field(min_length=1, max_length=3)], ([1],), (["x"],)),
    Typed(Any, ({"x": 1}, "x", 5, [1, "x"], None)),
    Typed(str | int, ("x", 5), ([1],)),
    Typed(tuple[int, str], ([1, "x"],), (["x", 1], "x")),
    Typed(tuple[int, ...], ([1, 2],), (["x"],)),
    Typed(dict[str, Any], ({"x": 1},), ("x",)),
    Typed(Pet, (CAT, DOG), ({"kind": "cow"}, {"kind": "cat", "name": "Rex"})),
    Typed(
        Node,
        (LEAF, {"value": 1, "children": [LEAF]}),
        ({"value": "x", "children": []}, {"value": 1, "children": [{"value": "x"}]}),
    ),
)
NAMES = ("a", "b", "strict", "$ref", "type", "properties", "items", "enum", "title")


def optional(typed: Typed) -> Typed:
    """Allow None too."""
    return Typed(typed.annotation | None, (*typed.allowed, None), typed.refused)


def listed(typed: Typed) -> Typed:
    """Return a list of a type."""
    return Typed(
        list[typed.annotation],  # type: ignore[name-defined]
        ([], [*typed.allowed]),
        tuple([bad] for bad in typed.refused),
    )


def mapped(typed: Typed) -> Typed:
    """Return a mapping to a type."""
    return Typed(
        dict[str, typed.annotation],  # type: ignore[name-defined]
        ({"k": typed.allowed[0]},),
        tuple({"k": bad} for bad in typed.refused),
    )


def paged(typed: Typed) -> Typed:
    """Return a generic class of a type."""
    return Typed(
        Page[typed.annotation],  # type: ignore[name-defined]
        ({"items": [*typed.allowed], "total": 1},),
        tuple({"items": [bad], "total": 1} for bad in typed.refused),
    )


def classed(fields: Mapping[str, Typed]) -> Typed:
    """Return a class with fields, some of them named like keywords of JSON schema."""
    made: dict[str, Any] = {
        f"field{i}": (typed.annotation, Field(alias=name))
        for i, (name, typed) in enumerate(fields.items())
    }
    good = {name: typed.allowed[0] for name, typed in fields.items()}
    bad = [
        {**good, name: value}
        for name, typed in fields.items()
        for value in typed.refused[:1]
    ]
    return Typed(create_model("Thing", **made), (good,), tuple(bad))


def widened(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    """Put a type into another."""
    return st.one_of(
        inner.filter(lambda typed: typed.annotation is not Any).map(optional),
        inner.map(listed),
        inner.map(mapped),
        inner.map(paged),
        st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=3).map(
            classed
        ),
    )


types = st.recursive(st.sampled_from(LEAVES), widened, max_leaves=3)
classes = st.dictionaries(st.sampled_from(NAMES), types, min_size=1, max_size=3).map(
    classed
)


# --- Cases -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call, and what its schema must say."""

    model: str
    messages: list[dict[str, Any]] = field(default_factory=lambda: HELLO)
    options: dict[str, Any] = field(default_factory=dict)
    schema: str = ""
    """Where the caller's schema goes: tool or answer; empty if there is none."""
    allowed: tuple[Any, ...] = ()
    refused: tuple[Any, ...] = ()
    wraps: bool = False
    """Whether the schema's root is not an object, so that it may be put into one."""
    told: str = ""
    """What the caller asked for, in short."""

    def __repr__(self) -> str:
        return f"{self.model}: {self.told}"


def shown(annotation: Any) -> str:
    """Return a type in a few words; a class by its fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        own = annotation.__pydantic_generic_metadata__["args"]
        if own:
            return f"Page[{shown(own[0])}]"
        if annotation.__name__ != "Thing":
            return annotation.__name__
        fields = annotation.model_fields.items()
        said = [f"{f.alias or name}: {shown(f.annotation)}" for name, f in fields]
        return f"class {{{', '.join(said)}}}"
    origin, own = get_origin(annotation), get_args(annotation)
    if annotation == Pet:
        return "Cat | Dog"
    if origin is Annotated:
        return f"{shown(own[0])} constrained"
    if origin in (Union, UnionType):
        return " | ".join(map(shown, own))
    if origin in (list, tuple, dict):
        return f"{origin.__name__}[{', '.join(map(shown, own))}]"
    plain = getattr(annotation, "__name__", str(annotation))
    return str(annotation).removeprefix("typing.") if origin else plain


def weather(city: str, days: int = 1) -> str:
    """Tell the weather of a city."""
    return f"{city}: {days}"


def function_of(typed: Typed) -> Callable[..., Any]:
    """Return a function with one parameter of a type."""

    def look(value: Any) -> str:
        """Look something up."""
        return str(value)

    look.__annotations__ = {"value": typed.annotation, "return": str}
    return look


def tool_dict(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI's dict of a function tool."""
    function = {"name": name, "description": "Do it.", "parameters": parameters}
    return {"type": "function", "function": function}


Draw = Callable[[st.SearchStrategy[Any]], Any]


def functions(draw: Draw, provider: str) -> Case:
    """Draw a call with a Python function as its tool."""
    typed = draw(types)
    return Case(
        draw(st.sampled_from(MODELS[provider])),
        options={"tools": [function_of(typed)]},
        schema="tool",
        allowed=tuple({"value": value} for value in typed.allowed),
        refused=tuple({"value": value} for value in typed.refused),
        told=f"def look(value: {shown(typed.annotation)})",
    )


def tool_dicts(draw: Draw, provider: str) -> Case:
    """Draw a call with a tool's dict, of a class or of what only a schema can say."""
    typed = draw(classes)
    schema = TypeAdapter(typed.annotation).json_schema()
    extra: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"also": {"allOf": [{"type": "string"}, {"maxLength": 5}]}},
                {"also": {"type": ["string", "null"]}},
                {"also": {"const": "x"}},
                {"also": {"not": {"type": "string"}}},
                {"also": True},
            ]
        )
    )
    schema["properties"] = {**schema["properties"], **extra}
    return Case(
        draw(st.sampled_from(MODELS[provider])),
        options={"tools": [tool_dict("look", schema)]},
        schema="tool",
        allowed=typed.allowed,
        refused=typed.refused,
        told=f"tool {shown(typed.annotation)} {json.dumps(extra) if extra else ''}",
    )


def answers(draw: Draw, provider: str) -> Case:
    """Draw a call for an answer of a type."""
    typed = draw(st.one_of(classes, types))
    return Case(
        draw(st.sampled_from(MODELS[provider])),
        options={"response_format": typed.annotation},
        schema="answer",
        allowed=typed.allowed,
        refused=typed.refused,
        wraps=TypeAdapter(typed.annotation).json_schema().get("type") != "object",
        told=f"response_format={shown(typed.annotation)}",
    )


TOOL_NAMES = (
    "ok_name",
    "fs.read",
    "fs_read",
    "fs-read",
    "get weather",
    "größe",
    "天气",
    "1st",
    "_x",
    "a:b",
    "a/b",
    "x" * 64,
    "x" * 65,
    "x" * 129,
    "json_tool_call",
)


def names(draw: Draw, provider: str) -> Case:
    """Draw a call with tools of any names, one of them forced now and then."""
    drawn = draw(
        st.lists(st.sampled_from(TOOL_NAMES), min_size=1, max_size=3, unique=True)
    )
    options: dict[str, Any] = {
        "tools": [tool_dict(n, {"type": "object", "properties": {}}) for n in drawn]
    }
    if draw(st.booleans()):
        forced = {"type": "function", "function": {"name": drawn[0]}}
        options["tool_choice"] = forced
    said = ", ".join(name if len(name) < 20 else f"x*{len(name)}" for name in drawn)
    forced_said = " (first forced)" if "tool_choice" in options else ""
    model = draw(st.sampled_from(MODELS[provider]))
    return Case(model, options=options, told=f"tools named {said}{forced_said}")


ARGUMENTS = ("{}", "", " ", None, '{"city": "Köln"}', '{"city": ', "[]", "null", "5")


def _turn(draw: Draw, serial: int) -> list[dict[str, Any]]:
    """Draw a tool's turn: calls and their results."""
    count = draw(st.integers(1, 2))
    ids = draw(
        st.sampled_from(
            [
                [f"call_{serial}_{i}" for i in range(count)],
                [f"a.b:{serial}{i}" for i in range(count)],
                [f"{i}" * 70 for i in range(count)],
            ]
        )
    )
    called = [
        {
            "id": ref,
            "type": "function",
            "function": {
                "name": "weather",
                "arguments": draw(st.sampled_from(ARGUMENTS)),
            },
        }
        for ref in ids
    ]
    content = draw(st.sampled_from([None, "", "I look."]))
    results = [
        {
            "role": "tool",
            "tool_call_id": ref,
            "name": "weather",
            "content": draw(st.sampled_from(["rain", "", '{"ok": true}'])),
        }
        for ref in ids
    ]
    return [{"role": "assistant", "content": content, "tool_calls": called}, *results]


SAID: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "More."},
    {"role": "user", "content": [{"type": "text", "text": "More."}]},
    {"role": "assistant", "content": "Well."},
    {"role": "assistant", "content": [{"type": "text", "text": "Well. "}]},
    {"role": "assistant", "content": "Well", "reasoning_content": "Hm."},
    {"role": "system", "content": "Be brief."},
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "  "},
    {"role": "user", "content": "More.", "name": "Ann Lee"},
)


def conversations(draw: Draw, provider: str) -> Case:
    """Draw a conversation with system prompts and tool turns anywhere."""
    messages: list[dict[str, Any]] = []
    for serial in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            messages += _turn(draw, serial)
        else:
            messages.append(draw(st.sampled_from(SAID)))
    messages.insert(draw(st.integers(0, 1)) and len(messages), HELLO[0])
    said = [
        f"{m['role']} {[c['function']['arguments'] for c in m['tool_calls']]}"
        if m.get("tool_calls")
        else f"{m['role']} {m['content']!r}"
        for m in messages
    ]
    return Case(
        draw(st.sampled_from(MODELS[provider])),
        messages=messages,
        options={"tools": [weather]},
        told=" | ".join(said),
    )


class Form(BaseModel):
    """A plain answer."""

    title: str
    note: str | None = None


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0, 0.7, 1, 2]),
    "top_p": st.sampled_from([0.5, 1]),
    "max_tokens": st.sampled_from([1, 50, 200.0, 5000, 256_000]),
    "stop": st.sampled_from(["END", ["a", "b"], [*"abcdef"], " ", []]),
    "seed": st.sampled_from([0, 7]),
    "n": st.sampled_from([1, 2]),
    "reasoning_effort": st.sampled_from(
        ["none", "minimal", "low", "medium", "high", "xhigh"]
    ),
    "tools": st.sampled_from(
        [
            [weather],
            [ToolConfig(type=ToolType.WEB_SEARCH)],
            [weather, ToolConfig(type=ToolType.WEB_SEARCH)],
        ]
    ),
    "tool_choice": st.sampled_from(
        [
            "auto",
            "none",
            "required",
            {"type": "function", "function": {"name": "weather"}},
        ]
    ),
    "response_format": st.sampled_from([Form, {"type": "json_object"}]),
    "stream": st.just(True),
}


def options(draw: Draw, provider: str) -> Case:
    """Draw options beside each other."""
    asked = draw(st.fixed_dictionaries({}, optional=OPTIONS))
    messages = [{"role": "user", "content": "Answer in JSON."}]
    told = {k: getattr(v, "__name__", v) for k, v in asked.items()}
    if "tools" in told:
        told["tools"] = [getattr(t, "__name__", "search") for t in asked["tools"]]
    model = draw(st.sampled_from(MODELS[provider]))
    return Case(model, messages=messages, options=asked, told=str(told))


KINDS: dict[str, Callable[[Draw, str], Case]] = {
    "functions": functions,
    "tool dicts": tool_dicts,
    "answers": answers,
    "names": names,
    "conversations": conversations,
    "options": options,
}


def cases(kind: str, provider: str) -> st.SearchStrategy[Case]:
    """Return cases of one kind for a provider."""
    return st.composite(lambda draw: KINDS[kind](draw, provider))()


# --- What is checked -------------------------------------------------------------------


def plain_schema(schema: Any) -> Any:
    """Turn Google's own schema into JSON schema."""
    own = camel(schema)
    made = {k: v for k, v in own.items() if k not in ("nullable", "propertyOrdering")}
    if "type" in made:
        made["type"] = str(made["type"]).lower()
    for name in ("items",):
        if name in made:
            made[name] = plain_schema(made[name])
    if "properties" in made:
        made["properties"] = {k: plain_schema(v) for k, v in made["properties"].items()}
    if "anyOf" in made:
        made["anyOf"] = [plain_schema(v) for v in made["anyOf"]]
    return {"anyOf": [made, {"type": "null"}]} if own.get("nullable") else made


def tool_schemas(sent: Sent) -> list[Any]:
    """Return the schemas of the tools in a request."""
    found = []
    for raw in sent.body.get("tools") or ():
        if sent.provider == "google":
            for declared in map(camel, camel(raw).get("functionDeclarations") or ()):
                schema = declared.get("parametersJsonSchema")
                found.append(
                    schema
                    if schema is not None
                    else plain_schema(declared.get("parameters") or {})
                )
        elif "input_schema" in raw:
            found.append(raw["input_schema"])
        elif raw.get("type") == "function":
            found.append((raw.get("function") or raw).get("parameters"))
    return found


def answer_schema(sent: Sent) -> Any:
    """Return the schema of the answer in a request; None if there is none."""
    body = sent.body
    if sent.provider == "google":
        config = camel(body.get("generationConfig") or {})
        if config.get("responseSchema") is not None:
            return plain_schema(config["responseSchema"])
        return config.get("responseJsonSchema")
    if sent.provider == "ollama":
        return body.get("format")
    if sent.provider == "anthropic":
        form = body.get("output_format") or body.get("output_config", {}).get("format")
        if form:
            return form.get("schema")
        return next(iter(tool_schemas(sent)), None)
    chat = (body.get("response_format") or {}).get("json_schema") or {}
    return chat.get("schema") or (body.get("text") or {}).get("format", {}).get(
        "schema"
    )


def valid(schema: Any, value: Any, *, wrapped: bool) -> bool:
    """Say whether a value fits a schema, by itself or as its only property."""
    check = jsonschema.Draft202012Validator(schema)
    if check.is_valid(value):
        return True
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not wrapped or not isinstance(properties, dict) or len(properties) != 1:
        return False
    (name,) = properties
    return check.is_valid({name: value})


def meaning(case: Case, sent: Sent) -> Iterator[str]:
    """Yield what of the caller's schema is lost in the one that is sent."""
    if not case.schema:
        return
    schemas = tool_schemas(sent) if case.schema == "tool" else [answer_schema(sent)]
    if not schemas or schemas[0] is None:
        yield f"{case.schema}: its schema is left out"
        return
    try:
        for value in case.allowed:
            if not valid(schemas[0], value, wrapped=case.wraps):
                yield f"{case.schema}: its schema refuses a value that the type allows"
        for value in case.refused:
            if valid(schemas[0], value, wrapped=case.wraps):
                yield f"{case.schema}: its schema allows a value that the type refuses"
    except (referencing.exceptions.Unresolvable, jsonschema.SchemaError):
        yield f"{case.schema}: its schema has a reference that leads nowhere"


def sent_names(sent: Sent) -> list[str]:
    """Return the names of the functions in a request."""
    names: list[str] = []
    for raw in sent.body.get("tools") or ():
        if sent.provider == "google":
            declared = camel(raw).get("functionDeclarations") or ()
            names += [str(function.get("name")) for function in declared]
        elif "input_schema" in raw or raw.get("type") == "function":
            names.append(str((raw.get("function") or raw).get("name")))
    return names


async def problems(asking: Requests, provider: str, case: Case) -> list[str] | None:
    """Return what is wrong with what a case sends; None if it was refused here."""
    try:
        outcome = await asking.of(provider, case.model, case.messages, **case.options)
    except Exception as exc:  # noqa: BLE001 - told as a problem
        return [f"raised {type(exc).__name__} and no InvalidRequestError"]
    if isinstance(outcome, InvalidRequestError):
        return None
    found = [*outcome.wrong(), *meaning(case, outcome)]
    named = sent_names(outcome)
    if case.told.startswith("tools named"):
        if len(named) != len(case.options["tools"]):
            found.append(
                f"tools: {len(named)} of {len(case.options['tools'])} are sent"
            )
        if len(set(named)) != len(named):
            found.append("tools: two are sent by one name")
    return list(dict.fromkeys(found))


BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def run(
    provider: str, kind: str, see: Callable[[Case, list[str]], None], **more: Any
) -> tuple[int, int]:
    """Generate cases and show each with its problems.

    Returns:
        How many there were, and how many of them were refused here.
    """
    counts = [0, 0]
    with asyncio.Runner() as runner:
        opened = requests()
        asking = runner.run(opened.__aenter__())

        @settings(BOUNDED, **more)
        @given(case=cases(kind, provider))
        def check(case: Case) -> None:
            found = runner.run(problems(asking, provider, case))
            counts[0] += 1
            counts[1] += found is None
            see(case, found or [])

        try:
            check()
        finally:
            runner.run(opened.__aexit__(None, None, None))
    return counts[0], counts[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_request_keeps_the_rules_or_is_refused_here(provider: str, kind: str) -> None:
    """And its schema means what the caller's type means."""

    def see(case: Case, found: list[str]) -> None:
        assert found == [], case

    made, refused = run(provider, kind, see)

    assert made >= 30
    # To refuse everything would keep the rules too.
    assert refused <= 0.9 * made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_is_taken_is_what_goes_over_the_wire(
    provider: str, stream: bool, server: ProviderServer, service: LLMInfraService
) -> None:
    """The rules are asked about the same bytes and headers that a server gets."""
    asked: dict[str, Any] = {"tools": [weather], "max_tokens": 50}
    model = MODELS[provider][0]
    if stream:
        async with service.stream(HELLO, model, provider, **asked) as chunks:
            await chunks.result()
    else:
        await service.complete(HELLO, model, provider, **asked)
    async with requests() as asking:
        taken = await asking.of(provider, model, stream=stream, **asked)

    (sent,) = server.requests
    assert isinstance(taken, Sent)
    assert taken.body == sent.json
    assert taken.path.partition("?")[0] == sent.path
    for name, value in taken.headers.items():
        assert name == "host" or sent.headers[name.lower()] == value


@pytest.mark.parametrize("name", ["fs.read", "größe", "get weather", "x" * 65, "1st"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_call_comes_back_by_the_callers_name(
    provider: str, name: str, server: ProviderServer, service: LLMInfraService
) -> None:
    """In an answer and in a stream, or the name is refused before anything is sent."""
    model = {
        "openai": "gpt-4.1",
        "anthropic": "claude-sonnet-4-5",
        "google": "gemini-2.5-flash",
    }
    tools = [tool_dict(name, {"type": "object", "properties": {}})]
    asked: tuple[Any, ...] = (HELLO, model.get(provider, "qwen3"), provider)

    def call(request: Received) -> Answer:
        sent = Sent(provider, "POST", request.path, request.headers, request.json)
        return Answer(tool_calls=[(sent_names(sent)[0], {})])

    server.default = call
    try:
        whole = await service.complete(*asked, tools=tools)
    except InvalidRequestError:
        assert server.requests == []
        return
    async with service.stream(*asked, tools=tools) as stream:
        chunks = [chunk async for chunk in stream]
        streamed = await stream.result()

    assert [made.name for made in whole.tool_calls] == [name]
    assert [made.name for made in streamed.tool_calls] == [name]
    heard = [c.tool_call.name for c in chunks if c.tool_call and c.tool_call.name]
    assert heard == [name]


# --- The table of what breaks ----------------------------------------------------------


def rule(said: str) -> str:
    """Return a sentence without its indices and values, to group by."""
    bare = re.sub(r"\[\d+\]", "[]", said)
    bare = re.sub(r"properties\.[^.:\s]+", "properties.X", bare)
    bare = re.sub(r"(?:\$defs|definitions)\.[^.:\s]+", "$defs.X", bare)
    bare = re.sub(
        r"((?:properties\.X|items|anyOf\[\]|\$defs\.X|additionalProperties)\.?)+",
        "…",
        bare,
    )
    return re.sub(r"'[^']*'|\d+", "_", bare)[:110]


def main(asked: list[str]) -> bool:
    """Print every group of failing examples; say whether there was none.

    Args:
        asked: Providers and kinds to try; all of those that it does not name.
    """
    clean = True
    for provider in [p for p in PROVIDERS if p in asked] or PROVIDERS:
        for kind in [k for k in KINDS if k in asked] or KINDS:
            groups: dict[str, list[Case]] = defaultdict(list)
            wrong: list[Case] = []

            def see(case: Case, found: list[str]) -> None:
                wrong.extend([case] if found else [])  # noqa: B023 - called in the turn
                for said in found:
                    groups[rule(said)].append(case)  # noqa: B023

            generated = [Phase.generate]
            made, refused = run(provider, kind, see, phases=generated, max_examples=200)
            clean &= not wrong
            sys.stdout.write(
                f"{provider}, {kind}: {made - len(wrong)} of {made} right,"
                f" {refused} of them refused here\n"
            )
            for said, found in sorted(groups.items(), key=lambda item: -len(item[1])):
                shortest = min(found, key=lambda case: len(repr(case)))
                sys.stdout.write(f"  {len(found)} x {said}\n      {shortest}\n")
    return clean


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
