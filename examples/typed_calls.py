"""Typed calls: what a type checker and an editor know of options, tools and answers.

Runs without a key or a network, on a mock. mypy, basedpyright and ty check this file.
"""

import asyncio
import datetime as dt
from typing import Any, Unpack, assert_type

from pydantic import BaseModel

from dipeo_llm import (
    CallOptions,
    ChatResult,
    LLMInfraService,
    LLMServicePort,
    Person,
    PersonLLMConfig,
    StaticAPIKeys,
)
from dipeo_llm.testing import MockLLMAdapter, Reply

MODEL = "gpt-4.1-nano"


class River(BaseModel):
    """The answer's form."""

    name: str
    length_km: int


async def forecast(city: str, day: dt.date) -> str:
    """Tell the weather.

    Args:
        city: The city's name, in English.
        day: The day of the forecast.
    """
    return f"sunny in {city} on {day:%A}"


async def ask_for_a_river(service: LLMServicePort) -> str:
    """`response_format` decides the type of `parsed`."""
    result = await service.complete(
        [{"role": "user", "content": "A river in Austria?"}],
        MODEL,
        "openai",
        temperature=0.2,
        max_tokens=100,
        response_format=River,
    )
    assert_type(result, ChatResult[River])
    return f"{result.parsed.name}: {result.parsed.length_km} km"


async def ask_for_rivers(service: LLMServicePort) -> list[str]:
    """Any type that pydantic describes will do, such as a list of models."""
    async with service.stream(
        [{"role": "user", "content": "Two rivers?"}],
        MODEL,
        "openai",
        response_format=list[River],
        idle_timeout=20,
    ) as stream:
        async for chunk in stream:
            print(chunk.text, end="")
        result = await stream.result()
    assert_type(result.parsed, list[River])
    return [river.name for river in result.parsed]


async def ask_with_a_tool(service: LLMServicePort) -> str:
    """With tools `parsed` may be None: such a turn has no answer yet."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "The Inn tomorrow?"}]
    while True:
        result = await service.complete(
            messages, MODEL, "openai", tools=[forecast], response_format=River
        )
        assert_type(result.parsed, River | None)
        if result.parsed is not None:
            return result.parsed.name
        messages += result.to_messages()
        for call in result.tool_calls:
            output = await forecast(**call.arguments_for(forecast))
            messages.append(call.to_message(output))


async def ask_a_person(service: LLMServicePort) -> str:
    """A person's answer is typed in the same way."""
    config = PersonLLMConfig(model=MODEL, api_key_id="openai", temperature=0.8)
    ada = Person("ada", llm_config=config)
    result = await ada.complete("A river?", service, response_format=River)
    assert_type(result.parsed, River)
    return result.parsed.name


async def ask(
    service: LLMServicePort, question: str, **options: Unpack[CallOptions]
) -> str:
    """A function of your own passes the options on, typed."""
    messages = [{"role": "user", "content": question}]
    result = await service.complete(messages, MODEL, "openai", **options)
    return result.text


async def main() -> None:
    """Make the calls above, answered by a script."""
    inn, rivers = '{"name": "Inn", "length_km": 517}', '{"value": []}'
    call = ("forecast", {"city": "Innsbruck", "day": "2026-11-26"})
    script = MockLLMAdapter(inn, rivers, Reply(tool_calls=[call]), inn, inn, "Hello.")
    keys = StaticAPIKeys({"openai": "not-used-by-the-mock"})
    async with LLMInfraService(keys, adapter_factory=script) as service:
        print(await ask_for_a_river(service))
        print(await ask_for_rivers(service))
        print(await ask_with_a_tool(service))
        print(await ask_a_person(service))
        print(await ask(service, "Hello?", temperature=0, seed=7))


if __name__ == "__main__":
    asyncio.run(main())
