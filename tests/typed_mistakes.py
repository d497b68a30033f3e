"""Calls with one mistake each, which a type checker must refuse; never run.

mypy refuses an ignored line that has no mistake, and `test_typing` takes the comments
away and asks all three checkers. ty 0.0.107 does not see an unknown keyword of a
TypedDict.
"""

from pydantic import BaseModel

from dipeo_llm import (
    ChatResult,
    LLMInfraService,
    LLMRequestOptions,
    Person,
    PersonLLMConfig,
    Settings,
)

HELLO = [{"role": "user", "content": "hello"}]


class River(BaseModel):
    """A form for an answer."""

    name: str


def forecast(city: str) -> str:
    """Tell the weather."""
    return city


async def complete(service: LLMInfraService) -> None:
    """Options of a call."""
    await service.complete(HELLO, "m", temprature=1)  # type: ignore[call-overload]  # not seen by ty
    await service.complete(HELLO, "m", temperature="hot")  # type: ignore[call-overload]
    await service.complete(HELLO, "m", max_tokens="no")  # type: ignore[call-overload]
    await service.complete(HELLO, "m", max_tokens=1.5)  # type: ignore[call-overload]
    await service.complete(HELLO, "m", stop=5)  # type: ignore[call-overload]
    await service.complete(HELLO, "m", tools=3)  # type: ignore[call-overload]
    await service.complete(HELLO, "m", tools=forecast)  # type: ignore[call-overload]
    await service.complete(HELLO, "m", tools=["forecast"])  # type: ignore[list-item]
    await service.complete(HELLO, "m", tool_choice="maybe")  # type: ignore[call-overload]
    await service.complete(HELLO, "m", service=5)  # type: ignore[call-overload]
    await service.complete(HELLO, "m", response_format=3)  # type: ignore[call-overload]
    await service.complete(HELLO, "m", timeout="5")  # type: ignore[call-overload]
    await service.complete("hello", "m")  # type: ignore[arg-type]
    await service.complete(HELLO)  # type: ignore[call-overload]


async def the_others(service: LLMInfraService, ada: Person) -> None:
    """The same options of the other calls."""
    config = PersonLLMConfig(model="m")
    await service.complete_with_person([], "ada", config, sed=1)  # type: ignore[call-overload]  # not seen by ty
    await ada.complete("Hello?", service, variables=5)  # type: ignore[call-overload]
    service.stream(HELLO, "m", idle_timout=1)  # type: ignore[call-overload]  # not seen by ty
    service.stream_with_person([], "ada", config, n="2")  # type: ignore[call-overload]
    await ada.complete("Hello?", service, reasoning_efort="low")  # type: ignore[call-overload]  # not seen by ty


async def answers(service: LLMInfraService, ada: Person) -> None:
    """What is known of an answer."""
    result = await service.complete(HELLO, "m", response_format=River)
    _ = result.parsed.length  # type: ignore[attr-defined]
    with_tools = await service.complete(
        HELLO, "m", response_format=River, tools=[forecast]
    )
    _ = with_tools.parsed.name  # type: ignore[union-attr]
    async with service.stream(HELLO, "m", response_format=list[River]) as stream:
        _ = (await stream.result()).parsed.name  # type: ignore[attr-defined]
    wrong: ChatResult[str] = await ada.complete("?", service, response_format=River)  # type: ignore[arg-type]
    wrong.parsed.upper()


def objects() -> None:
    """The models and the settings."""
    LLMRequestOptions(temprature=1)  # type: ignore[call-arg]
    PersonLLMConfig(model="m", promptfile="x")  # type: ignore[call-arg]
    Settings(time_out=5)  # type: ignore[call-arg]
    Settings(engine="steam")  # type: ignore[arg-type]
