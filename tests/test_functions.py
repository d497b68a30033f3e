"""Functions as tools: what a model is told of them, and what they are called with."""
# ruff: noqa: D416, D417 - docstrings of other styles, and some with gaps

import asyncio
import datetime as dt
import functools
import sys
import typing
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from typing_extensions import Doc

from dipeo_llm.adapters.tools import sort_tools
from dipeo_llm.domain import ToolCall, ToolConfig, ToolType
from dipeo_llm.errors import InvalidRequestError, StructuredOutputError
from dipeo_llm.functions import function_tool
from dipeo_llm.service import LLMInfraService
from tests.conftest import name_of
from tests.provider_server import Answer, ProviderServer

HELLO = [{"role": "user", "content": "hello"}]


class Unit(Enum):
    """A unit of temperature."""

    CELSIUS = "C"
    FAHRENHEIT = "F"


class Place(BaseModel):
    """Where on earth."""

    lat: float
    lon: float = 0.0


def google(city: str, day: dt.date, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    It knows a week.

    Args:
        city: The city's name,
            in English.
        day (date): The day.

    Returns:
        A sentence.

    Raises:
        KeyError: Never.
    """
    return f"{city} {day} {unit}"


def numpy(city: str, day: dt.date, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    It knows a week.

    Parameters
    ----------
    city : str
        The city's name,
        in English.
    day
        The day.

    Returns
    -------
    str
        A sentence.
    """
    return google(city, day, unit)


def sphinx(city: str, day: dt.date, unit: Literal["C", "F"] = "C") -> str:
    """Tell the weather.

    It knows a week.

    :param city: The city's name,
        in English.
    :param date day: The day.
    :returns: A sentence.
    """
    return google(city, day, unit)


def annotated(
    city: Annotated[str, "The city's name."],
    day: Annotated[dt.date, Doc("The day.")],
    unit: Annotated[str, Field(description="The unit.")] = "C",
) -> str:
    """Tell the weather.

    Args:
        city: Not this one.
        unit: Nor this one.
    """
    return google(city, day, "C" if unit == "C" else "F")


class Weather:
    """Tell the weather."""

    async def __call__(self, city: str, *, unit: Unit = Unit.CELSIUS) -> str:
        """Return it."""
        await asyncio.sleep(0)
        return f"{city} {unit.name}"

    def at(self, place: Place, times: tuple[int, ...] = ()) -> str:
        """Tell the weather at a place."""
        return f"{place.lat} {times}"


def described(tool: Any) -> tuple[str, str, dict[str, Any]]:
    """Return a tool's name, description and properties."""
    function = function_tool(tool)["function"]
    return (
        function["name"],
        function["description"],
        function["parameters"]["properties"],
    )


def call(arguments: Any, text: str = "") -> ToolCall:
    """Make a call of a tool."""
    return ToolCall(id="1", name="tool", arguments=arguments, arguments_text=text)


@pytest.mark.parametrize("function", [google, numpy, sphinx])
def test_a_docstring_describes_the_tool_and_its_arguments(
    function: Callable[..., Any],
) -> None:
    """Each of the three styles is read; what a model needs not is left out."""
    name, description, properties = described(function)

    assert name == function.__name__
    assert description.startswith("Tell the weather.\n\nIt knows a week.")
    assert description.endswith("Returns: A sentence.")
    assert "Never" not in description
    texts = {key: value.get("description") for key, value in properties.items()}
    texts["city"] = " ".join(texts["city"].split())
    assert texts == {
        "city": "The city's name, in English.",
        "day": "The day.",
        "unit": None,
    }


def test_an_annotation_wins_over_the_docstring() -> None:
    """The text of Annotated, PEP 727's Doc, and pydantic's own Field describe."""
    _, _, properties = described(annotated)

    assert [value["description"] for value in properties.values()] == [
        "The city's name.",
        "The day.",
        "The unit.",
    ]


def test_a_docstring_without_arguments_is_kept_as_it_is() -> None:
    """A description that is written for the model reaches it."""

    def note(text: str) -> None:
        """Note: anything.

        - a list
          of things
        """

    assert described(note)[1] == "Note: anything.\n\n- a list\n  of things"


def test_what_a_partial_binds_is_not_the_models() -> None:
    """The bound arguments are hidden, and the model cannot give them."""
    bound = functools.partial(google, "Wien", unit="F")

    name, description, properties = described(bound)

    assert (name, list(properties)) == ("google", ["day"])
    assert description.startswith("Tell the weather.")
    given = call({"day": "2026-11-25"}).arguments_for(bound)
    assert bound(**given) == "Wien 2026-11-25 F"
    with pytest.raises(StructuredOutputError, match="unit: Unexpected"):
        call({"day": "2026-11-25", "unit": "C"}).arguments_for(bound)


async def test_an_object_and_a_method_are_tools() -> None:
    """Whatever can be called by name is named, described and called."""
    weather = Weather()

    assert described(weather)[:2] == ("Weather", "Tell the weather.")
    assert described(weather.at)[:2] == ("at", "Tell the weather at a place.")
    arguments = call({"city": "Wien", "unit": "F"}).arguments_for(weather)
    assert await weather(**arguments) == "Wien FAHRENHEIT"
    arguments = call({"place": {"lat": 1}, "times": [2]}).arguments_for(weather.at)
    assert weather.at(**arguments) == "1.0 (2,)"


def test_a_decorated_function_is_the_one_inside() -> None:
    """A wrapper that says what it wraps is described as it."""

    @functools.wraps(google)
    def wrapper(*args: Any, **keywords: Any) -> str:
        return google(*args, **keywords)

    name, _, properties = described(wrapper)

    assert (name, list(properties)) == ("google", ["city", "day", "unit"])
    assert properties["day"]["format"] == "date"


def test_a_class_is_a_tool_whose_arguments_are_its_fields() -> None:
    """A pydantic class describes itself, and its call can be made into one."""
    assert described(Place)[:2] == ("Place", "Where on earth.")
    assert Place(**call({"lat": 1}).arguments_for(Place)) == Place(lat=1)
    with pytest.raises(StructuredOutputError, match="lat: Field required"):
        call({}).arguments_for(Place)
    with pytest.raises(InvalidRequestError, match="fields"):
        function_tool(int)


def test_arguments_come_in_the_types_of_the_function() -> None:
    """A model, a date, an enum and a default arrive as such."""

    def tool(place: Place, day: dt.date, unit: Unit = Unit.CELSIUS, n: int = 3) -> None:
        """Do something."""

    given = call({"place": {"lat": 1}, "day": "2026-11-25", "unit": "F"})

    assert given.arguments_for(tool) == {
        "place": Place(lat=1),
        "day": dt.date(2026, 11, 25),
        "unit": Unit.FAHRENHEIT,
        "n": 3,
    }


def test_names_that_python_or_pydantic_use_are_plain_names() -> None:
    """A parameter may be called like an attribute of a model."""

    def tool(
        json: str, copy: int, model_fields: str, _hidden: int = 1, **more: int
    ) -> Any:
        return None

    given = {"json": "a", "copy": 1, "model_fields": "b", "other": 2}

    assert call(given).arguments_for(tool) == {**given, "_hidden": 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"city": "Wien", "day": "someday"}, "day: Input should be a valid date"),
        ({"city": "Wien"}, "day: Missing required"),
        ({"city": 5, "day": "2026-11-25"}, "city: Input should be a valid string"),
        ({"city": "W", "day": "2026-11-25", "hour": 1}, "hour: Unexpected keyword"),
        (None, "not a JSON object"),
    ],
)
def test_arguments_that_do_not_fit_are_told_for_the_model(
    arguments: Any, said: str
) -> None:
    """The error says which and why in one line, and keeps the text."""
    with pytest.raises(StructuredOutputError, match=said) as caught:
        call(arguments, "[text").arguments_for(google)

    assert (caught.value.reason, caught.value.text) == ("invalid", "[text")
    assert "\n" not in str(caught.value)


def _positional(city: str, /) -> None: ...
def _starred(*cities: str) -> None: ...
def _unknown(city: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def _indescribable(city: object = None, *, loop: asyncio.AbstractEventLoop) -> None: ...
def _typed_dict(city: typing.TypedDict("Plain", {"a": int})) -> None: ...  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_positional, "by name"),
        (_starred, "by name"),
        (_unknown, "Nowhere"),
        (_indescribable, "AbstractEventLoop"),
        (lambda city: city, "lambda"),
        pytest.param(
            _typed_dict,
            "typing_extensions.TypedDict",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12), reason="pydantic takes it since 3.12"
            ),
        ),
    ],
    ids=name_of,
)
def test_a_function_that_cannot_be_described_says_why(
    function: Callable[..., Any], said: str
) -> None:
    """The error names what is in the way, on one line."""
    with pytest.raises(InvalidRequestError, match=said) as caught:
        function_tool(function)

    assert "\n" not in str(caught.value)


def test_a_function_is_described_once() -> None:
    """Its schema takes as long as a call, so it is kept while the function lives."""
    assert function_tool(google) is function_tool(google)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
OPENAI = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell.", "parameters": SCHEMA},
}


@pytest.mark.parametrize(
    "tool",
    [
        OPENAI,
        {"function": OPENAI["function"]} | {"type": "function"},
        {
            "type": "function",
            "name": "weather",
            "description": "Tell.",
            "parameters": SCHEMA,
        },
        {"name": "weather", "description": "Tell.", "input_schema": SCHEMA},
        {
            "type": "custom",
            "name": "weather",
            "description": "Tell.",
            "input_schema": SCHEMA,
        },
        {"name": "weather", "description": "Tell.", "inputSchema": SCHEMA},
    ],
    ids=["chat", "chat again", "responses", "anthropic", "anthropic custom", "mcp"],
)
def test_a_tool_may_be_written_as_any_provider_writes_it(tool: Any) -> None:
    """OpenAI's two forms, Anthropic's and MCP's mean the same."""
    assert sort_tools([tool]).functions == [OPENAI]


def test_what_a_provider_adds_to_a_tool_is_kept() -> None:
    """Anthropic's mark for its cache, and OpenAI's own strictness, go along."""
    (tool,) = sort_tools(
        [
            {
                "name": "weather",
                "input_schema": SCHEMA,
                "strict": True,
                "cache_control": {"type": "ephemeral"},
            }
        ]
    ).functions

    assert tool["cache_control"] == {"type": "ephemeral"}
    assert tool["function"] == {
        "name": "weather",
        "strict": True,
        "parameters": SCHEMA,
    }


@pytest.mark.parametrize(
    "tool",
    [
        ToolConfig(type=ToolType.WEB_SEARCH, config={"a": 1}),
        {"type": "web_search", "a": 1},
        {"type": ToolType.WEB_SEARCH, "a": 1},
        SimpleNamespace(type="web_search", config={"a": 1}),
    ],
    ids=name_of,
)
def test_a_providers_own_tool_is_sorted_out(tool: Any) -> None:
    """Ours, an application's own, or a dict: it is the provider's to run."""
    (found,) = sort_tools([tool]).provided

    assert (found.type, found.config) == (ToolType.WEB_SEARCH, {"a": 1})


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (5, "got 5"),
        ("weather", "got 'weather'"),
        ({"type": "function"}, "needs a name"),
        ({"type": "function", "function": {"parameters": SCHEMA}}, "needs a name"),
        ({"functionDeclarations": []}, "needs a name"),
        ({"type": "web_search_20250305", "name": "web_search"}, "ToolConfig"),
        (SimpleNamespace(type="telepathy"), "telepathy"),
    ],
    ids=name_of,
)
async def test_what_is_not_a_tool_is_refused_before_it_is_sent(
    service: LLMInfraService, server: ProviderServer, tool: Any, said: str
) -> None:
    """The error says what is wrong, and nothing is sent."""
    with pytest.raises(InvalidRequestError, match=said):
        await service.complete(HELLO, "gpt-4.1-nano", "openai", tools=[tool])

    assert server.requests == []


@pytest.mark.parametrize(
    "tools",
    [google, Place, OPENAI, functools.partial(google, unit="C"), (google,), {google}],
    ids=name_of,
)
async def test_one_tool_needs_no_list(
    service: LLMInfraService, server: ProviderServer, tools: Any
) -> None:
    """Where the meaning is plain it is taken."""
    server.reply(Answer("Hi."))

    await service.complete(HELLO, "gpt-4.1-nano", "openai", tools=tools)

    assert len(server.requests[0].json["tools"]) == 1


@pytest.mark.parametrize("tools", [3, "google", b"google"], ids=name_of)
async def test_what_is_not_a_list_of_tools_is_refused_before_it_is_sent(
    service: LLMInfraService, server: ProviderServer, tools: Any
) -> None:
    """One clear error, whatever was given."""
    with pytest.raises(InvalidRequestError, match=r"tools=.* must be a list"):
        await service.complete(HELLO, "gpt-4.1-nano", "openai", tools=tools)

    assert server.requests == []


async def test_the_loop_of_the_guide(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Async tools, typed arguments, and a tool that fails: the model hears of it."""

    async def forecast(place: Place, day: dt.date) -> str:
        """Tell the weather."""
        await asyncio.sleep(0)
        return f"{place.lat} {day:%A}"

    tools = {tool.__name__: tool for tool in (forecast, google)}
    server.reply(
        Answer(
            tool_calls=[
                ("forecast", {"place": {"lat": 1}, "day": "2026-11-25"}),
                ("google", {"city": "Wien", "day": "someday"}),
            ]
        ),
        Answer("Fine."),
    )
    messages: list[Any] = [*HELLO]
    asked = ("gpt-4.1-nano", "openai")
    result = await service.complete(messages, *asked, tools=[*tools.values()])
    while result.tool_calls:
        messages += result.to_messages()
        for made in result.tool_calls:
            tool: Any = tools[made.name]
            try:
                output = tool(**made.arguments_for(tool))
                output = await output if asyncio.iscoroutine(output) else output
            except Exception as exc:  # noqa: BLE001 - the model is told
                output = f"error: {exc}"
            messages.append(made.to_message(output))
        result = await service.complete(messages, *asked, tools=[*tools.values()])

    contents = [m["content"] for m in server.requests[1].json["messages"][-2:]]
    assert contents[0] == "1.0 Wednesday"
    assert contents[1].startswith("error: the arguments of 'google' are invalid: day:")
    assert result.text == "Fine."
