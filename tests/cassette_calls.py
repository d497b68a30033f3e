"""The calls of the project's own cassettes.

`examples/record_cassettes.py` makes them with a server, `test_cassettes.py` without.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from dipeo_llm import ChatResult, LLMInfraService, Person, PersonLLMConfig

PROVIDERS = ("openai", "anthropic", "google", "ollama")
PROMPT_FILE = "prompts/optimist.md"
TOO_LONG = "1" * 4096
"""A digit is a token: more than the local model's context holds."""
NO_MODEL = "no-such-model"

Call = Callable[[LLMInfraService, str, str], Awaitable[list[ChatResult]]]
"""Takes a service, a provider and a model; returns a result for each request."""


class Opinion(BaseModel):
    """What somebody thinks of something."""

    mood: Literal["good", "bad"]
    sure: bool


def weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"It is sunny in {city}."


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def plain(
    service: LLMInfraService, provider: str, model: str
) -> list[ChatResult]:
    """Ask without a person and without a system prompt."""
    return [
        await service.complete(
            _user("Say hello."),
            model,
            provider,
            service=provider,
            temperature=0,
            max_tokens=16,
        )
    ]


async def person_prompt_file(
    service: LLMInfraService, provider: str, model: str
) -> list[ChatResult]:
    """Ask a person whose system prompt is in a file."""
    optimist = Person(
        id="optimist",
        llm_config=PersonLLMConfig(
            service=provider,
            model=model,
            api_key_id=provider,
            prompt_file=PROMPT_FILE,
        ),
    )
    said = "Let us open a small bakery."
    return [await optimist.complete(said, service, temperature=0, max_tokens=16)]


async def streamed(
    service: LLMInfraService, provider: str, model: str
) -> list[ChatResult]:
    """Ask for the answer in pieces; they must be the answer."""
    async with service.stream(
        _user("Say hello."),
        model,
        provider,
        service=provider,
        temperature=0,
        max_tokens=12,
    ) as stream:
        pieces = [chunk.text async for chunk in stream if chunk.text]
        result = await stream.result()
    assert "".join(pieces) == result.text
    assert len(pieces) > 1
    return [result]


async def tools(
    service: LLMInfraService, provider: str, model: str
) -> list[ChatResult]:
    """Let the model call a function, and answer with what it gave."""
    messages = _user("What is the weather in Rome?")
    asked = await service.complete(
        messages, model, provider, service=provider, tools=[weather], max_tokens=64
    )
    (call,) = asked.tool_calls
    messages += [*asked.to_messages(), call.to_message(weather(**call.arguments or {}))]
    answer = await service.complete(
        messages, model, provider, service=provider, tools=[weather], max_tokens=64
    )
    return [asked, answer]


async def structured(
    service: LLMInfraService, provider: str, model: str
) -> list[ChatResult]:
    """Ask for an answer in the form of a class."""
    return [
        await service.complete(
            _user("What do you think of bakeries?"),
            model,
            provider,
            service=provider,
            response_format=Opinion,
            temperature=0,
            max_tokens=40,
        )
    ]


async def error(
    service: LLMInfraService, provider: str, model: str
) -> list[ChatResult]:
    """Ask too much of a model that is not there.

    A server that knows its models says so; the local one answers to any name, and
    complains of the length.
    """
    return [
        await service.complete(
            _user(TOO_LONG), NO_MODEL, provider, service=provider, max_tokens=16
        )
    ]


CALLS: Mapping[str, Call] = {
    call.__name__: call
    for call in (plain, person_prompt_file, streamed, tools, structured, error)
}
NAMES = tuple(f"{provider}_{kind}" for provider in PROVIDERS for kind in CALLS)
