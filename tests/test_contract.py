"""One contract for whatever answers: a server, a recording of it, and a mock.

Who tests a program against a double relies on it: what is promised here is the same
for all three.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    CallError,
    LLMInfraService,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.factory import create_adapter
from dipeo_llm.domain import ChatRequest, ChatResult, StreamChunk
from dipeo_llm.testing import MockLLMAdapter, Reply, use_cassette
from tests.conftest import HELLO
from tests.provider_server import Answer, ProviderServer, error

MODEL = "gpt-4.1-nano"
KEY = "sk-of-the-contract-01"

Do = Callable[[BaseLLMAdapter], Any]


class Real:
    """The adapter itself, against the loopback server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def run(self, do: Do, *answers: Any) -> Any:
        """Do something with an adapter whose provider answers so."""
        async with ProviderServer() as server:
            server.reply(*answers)
            async with self.adapter(server) as adapter:
                return await do(adapter)

    @asynccontextmanager
    async def adapter(self, server: ProviderServer) -> AsyncIterator[BaseLLMAdapter]:
        """Open an adapter on a server, dead or alive."""
        adapter = create_adapter("openai", MODEL, KEY, server.base_url("openai"))
        try:
            yield adapter
        finally:
            await adapter.aclose()


class Replayed(Real):
    """The same, from a cassette, when the server is gone."""

    async def run(self, do: Do, *answers: Any) -> Any:
        """Record what is done, and do it again without a server."""
        path = self.folder / "contract.yaml"
        async with ProviderServer() as server:
            server.reply(*answers)
            async with self.adapter(server) as adapter:
                with use_cassette(path, record="once"):
                    await asyncio.gather(do(adapter), return_exceptions=True)
        async with self.adapter(server) as adapter:
            with use_cassette(path):
                return await do(adapter)


class Mocked(Real):
    """A mock with the same script."""

    async def run(self, do: Do, *answers: Any) -> Any:
        """Do something with a mock that answers so."""
        mock = MockLLMAdapter(*map(self.reply, answers))
        bound = mock(create_adapter("openai", MODEL, KEY).provider, MODEL)
        return await do(bound)

    @staticmethod
    def reply(answer: Any) -> Any:
        """Say the same as the server's answer."""
        if isinstance(answer, Answer):
            calls: Any = answer.tool_calls
            finish = None if answer.finish == "stop" else answer.finish
            return Reply(text=answer.said, tool_calls=calls, finish_reason=finish)
        classes = {401: APIKeyError, 429: RateLimitError, 503: ServiceUnavailableError}
        wait = 7.0 if answer.status == 429 else None
        return classes[answer.status](status_code=answer.status, retry_after=wait)


@pytest.fixture(params=[Real, Replayed, Mocked], ids=["real", "replayed", "mocked"])
def provider(request: pytest.FixtureRequest, tmp_path: Path) -> Real:
    """Each of the three."""
    made: Real = request.param(tmp_path)
    return made


async def _complete(adapter: BaseLLMAdapter) -> ChatResult:
    return await adapter.complete(ChatRequest(messages=HELLO))


async def _stream(adapter: BaseLLMAdapter) -> list[Any]:
    return [item async for item in adapter.stream(ChatRequest(messages=HELLO))]


async def test_an_answer_is_a_result(provider: Real) -> None:
    """Text, tokens, end, model and service are there."""
    result = await provider.run(_complete, Answer("Hello there."))

    usage = result.token_usage
    assert result.text == "Hello there."
    assert result.finish_reason == "stop"
    assert (result.model, result.service) == (MODEL, "openai")
    assert usage.total == usage.input + usage.output > 0
    assert result.tool_calls == []
    assert not result.cached


async def test_a_cut_answer_says_so(provider: Real) -> None:
    """The reason for the end is in the same words."""
    result = await provider.run(_complete, Answer("Hello", finish="length"))

    assert result.finish_reason == "length"


async def test_a_tool_call_has_arguments(provider: Real) -> None:
    """Name and arguments are there, as data and as the model wrote them."""
    asked = Answer(tool_calls=[("weather", {"city": "Wien"})])

    result = await provider.run(_complete, asked)

    (call,) = result.tool_calls
    assert result.finish_reason == "tool_calls"
    assert (call.name, call.arguments) == ("weather", {"city": "Wien"})
    assert call.id
    assert "Wien" in call.arguments_text


async def test_a_stream_is_chunks_and_then_the_result(provider: Real) -> None:
    """Several chunks join to the text of the result, which comes last and once."""
    items = await provider.run(_stream, Answer("one two three"))

    *chunks, result = items
    assert all(isinstance(chunk, StreamChunk) for chunk in chunks)
    assert len([chunk for chunk in chunks if chunk.text]) > 1
    assert isinstance(result, ChatResult)
    assert "".join(chunk.text for chunk in chunks) == result.text == "one two three"


@pytest.mark.parametrize("do", [_complete, _stream], ids=["complete", "stream"])
@pytest.mark.parametrize(
    ("status", "cls"),
    [(401, APIKeyError), (429, RateLimitError), (503, ServiceUnavailableError)],
)
async def test_a_failure_is_its_class_with_its_fields(
    provider: Real, do: Do, status: int, cls: type[CallError]
) -> None:
    """What a caller decides by is there, whoever answered."""
    answer = error("openai", status, retry_delay=7 if status == 429 else None)

    with pytest.raises(cls) as caught:
        await provider.run(do, answer)

    failure = caught.value
    assert type(failure) is cls
    assert (failure.service, failure.model) == ("openai", MODEL)
    assert failure.status_code == status
    assert failure.retry_after == (7 if status == 429 else None)
    assert failure.retryable is (status != 401)


async def test_a_stream_can_be_left(provider: Real) -> None:
    """Closing it early is no error, and leaves nothing open."""

    async def first(adapter: BaseLLMAdapter) -> str:
        items = adapter.stream(ChatRequest(messages=HELLO))
        try:
            async for item in items:
                if isinstance(item, StreamChunk) and item.text:
                    return item.text
        finally:
            await items.aclose()
        raise AssertionError

    assert await provider.run(first, Answer("one two three")) != "one two three"


async def test_an_adapter_can_be_asked_again(provider: Real) -> None:
    """Two requests, one after the other, get two answers."""

    async def twice(adapter: BaseLLMAdapter) -> list[str]:
        return [(await _complete(adapter)).text for _ in "12"]

    assert await provider.run(twice, Answer("one"), Answer("two")) == ["one", "two"]


async def test_requests_may_be_parallel(provider: Real) -> None:
    """Each of several at once gets an answer of its own."""

    async def many(adapter: BaseLLMAdapter) -> list[str]:
        results = await asyncio.gather(*(_complete(adapter) for _ in range(5)))
        return sorted(result.text for result in results)

    answers = [Answer(f"answer {i}") for i in range(5)]

    assert await provider.run(many, *answers) == [f"answer {i}" for i in range(5)]


async def test_the_service_above_is_the_same(provider: Real) -> None:
    """Retries end with the same number of attempts over each of them."""

    async def through_a_service(adapter: BaseLLMAdapter) -> ChatResult:
        settings = Settings(retry_wait=0.001, retry_wait_max=0.002)
        keys = StaticAPIKeys({"openai": KEY})
        async with LLMInfraService(
            keys, settings=settings, adapter_factory=lambda *_, **__: adapter
        ) as service:
            return await service.complete(HELLO, MODEL, "openai")

    result = await provider.run(
        through_a_service, error("openai", 503), error("openai", 503), Answer("there")
    )

    assert (result.text, result.attempts) == ("there", 3)
