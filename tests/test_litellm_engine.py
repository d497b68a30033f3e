"""`engine="litellm"`: LiteLLM makes the call and reads the answer.

Status, headers and the number of requests come from the wire. What LiteLLM takes for an
answer is an answer here; `UNTOLD` lists what it takes for one and is not. The table is
published in docs/litellm.md and docs/reliability.md: `python -m tests.test_litellm_engine`
writes it there, and a test holds the three together.
"""

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import APIKeyError, DiPeOLLMError, LLMInfraService, LLMServiceError
from dipeo_llm.adapters.factory import by_name
from tests.conftest import HELLO, MODELS, PROVIDERS, Open, each_provider
from tests.provider_server import DEFAULT_TEXT, Answer, ProviderServer, Raw, Received
from tests.test_fault_matrix import MATRIX, Seen

ROWS = {row.name: row for row in MATRIX}
TITLES = {
    "openai": "OpenAI",
    "anthropic": "Anthropic",
    "google": "Google",
    "ollama": "Ollama",
}

each_way = pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])


@pytest.fixture
async def service(opened: Open) -> AsyncIterator[LLMInfraService]:
    """Open a service on LiteLLM's engine that makes two attempts at most."""
    async with opened(engine="litellm", max_retries=1) as made:
        yield made


async def ask(
    service: LLMInfraService, provider: str, *, streamed: bool, **options: Any
) -> Any:
    """Make a call, or read a stream to its end, and return the result."""
    asked = (HELLO, options.pop("model", MODELS[provider]), provider)
    if not streamed:
        return await service.complete(*asked, **options)
    async with service.stream(*asked, **options) as stream:
        text = "".join([chunk.text async for chunk in stream])
        result = await stream.result()
    assert text == result.text
    return result


@each_way
@each_provider
async def test_an_answer(
    service: LLMInfraService, server: ProviderServer, provider: str, streamed: bool
) -> None:
    """The text is LiteLLM's; headers and the request are what was on the wire."""
    row = by_name(provider)
    server.reply(
        Answer(
            input_tokens=20,
            output_tokens=5,
            cached_tokens=8,
            reasoning="Hm.",
            headers={"x-request-id": "req-1", "x-ratelimit-remaining-requests": "9"},
        )
    )

    result = await ask(service, provider, streamed=streamed)

    assert (result.text, result.finish_reason) == (DEFAULT_TEXT, "stop")
    assert (result.service, result.model) == (provider, MODELS[provider])
    usage = result.token_usage
    assert (usage.input, usage.output) == (20, 5)
    assert usage.cached == (0 if provider == "ollama" else 8)
    assert result.reasoning == (None if provider == "openai" else "Hm.")
    assert (result.request_id, result.attempts) == ("req-1", 1)
    assert result.rate_limits.requests_left == 9
    (request,) = server.requests
    assert request.headers[row.key_header].endswith(f"sk-test-{provider}")
    assert f"sk-test-{provider}" not in str(request.query)
    assert request.headers["user-agent"] == "dipeo-llm"


CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tell the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}


@each_way
@each_provider
async def test_a_tool_call(
    service: LLMInfraService, server: ProviderServer, provider: str, streamed: bool
) -> None:
    """Calls of tools are read too."""
    server.reply(Answer(tool_calls=[("clock", {"zone": "UTC"})]))

    result = await ask(service, provider, streamed=streamed, tools=[CLOCK])

    (call,) = result.tool_calls
    assert (call.name, call.arguments) == ("clock", {"zone": "UTC"})
    assert result.finish_reason == "tool_calls"


async def test_a_tool_has_the_callers_name_in_a_stream(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """A name that the provider does not take is changed on the way, and back."""
    tool = {"type": "function", "function": {**CLOCK["function"], "name": "the clock"}}

    def call(asked: Received) -> Answer:
        return Answer(tool_calls=[(asked.json["tools"][0]["function"]["name"], {})])

    server.default = call
    async with service.stream(
        HELLO, MODELS["openai"], "openai", tools=[tool]
    ) as stream:
        names = [c.tool_call.name async for c in stream if c.tool_call is not None]

    assert "the clock" in names
    assert set(names) <= {"the clock", None}
    assert " " not in server.requests[0].json["tools"][0]["function"]["name"]


async def test_several_texts_in_a_stream(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """LiteLLM gives one finish reason for all choices, and the stream is whole."""
    server.reply(Answer("one", n_texts=["two"]))

    async with service.stream(HELLO, MODELS["openai"], "openai", n=2) as stream:
        result = await stream.result()

    assert result.texts == ["one", "two"]


STATUSES = [
    *(
        "400",
        "401",
        "404",
        "429, seconds",
        "no money",
        "500",
        "529",
        "307 to elsewhere",
    ),
    *("closed before the answer", "half a body", "stall"),
]


@each_way
@each_provider
@pytest.mark.parametrize("name", STATUSES)
async def test_a_failure_is_what_the_wire_showed(
    opened: Open, server: ProviderServer, provider: str, name: str, streamed: bool
) -> None:
    """Class, status, wait and the count of requests are those of the direct engine."""
    row = ROWS[name]
    server.default = row.reply(provider)

    async with opened(engine="litellm", max_retries=1, timeout=row.timeout) as service:
        with pytest.raises((LLMServiceError, APIKeyError)) as caught:
            await ask(service, provider, streamed=streamed)

    failed = caught.value
    seen = Seen(
        type(failed),
        failed.status_code,
        failed.retryable,
        failed.attempts,
        failed.retry_after,
    )
    assert seen == row.seen(provider, streamed=streamed), failed
    assert failed.service == provider
    assert f"sk-test-{provider}" not in f"{failed!r}"
    assert len(server.requests) == failed.attempts


@each_way
async def test_a_model_of_the_responses_endpoint_goes_direct(
    service: LLMInfraService, server: ProviderServer, streamed: bool
) -> None:
    """LiteLLM would send such a request through a client of its own."""
    result = await ask(service, "openai", model="gpt-5-pro", streamed=streamed)

    assert result.text == DEFAULT_TEXT
    (request,) = server.requests
    assert request.path == "/v1/responses"
    assert request.headers["authorization"] == "Bearer sk-test-openai"


@each_way
@each_provider
async def test_a_body_that_is_too_long(
    opened: Open, server: ProviderServer, provider: str, streamed: bool
) -> None:
    """Reading stops at the limit, and the call is not tried again."""
    server.default = Raw(body=[b'{"x": "' + b"x" * 10_000] * 20, framing="chunked")
    async with opened(engine="litellm", max_response_bytes=50_000) as service:
        with pytest.raises(LLMServiceError, match="longer than 50000 bytes"):
            await ask(service, provider, streamed=streamed)

    assert len(server.requests) == 1


@each_provider
async def test_calls_at_once_do_not_mix(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """Each call has its own attempt, though LiteLLM sends for all of them."""

    def echo(asked: Received) -> Answer:
        return Answer(str(asked.json).partition("number ")[2][:2], delay=0.01)

    server.default = echo
    tasks = [
        service.complete(
            [{"role": "user", "content": f"number {i}"}], MODELS[provider], provider
        )
        for i in range(10, 30)
    ]
    results = await asyncio.gather(*tasks)

    assert [result.text for result in results] == [str(i) for i in range(10, 30)]


# --- what is not promised -------------------------------------------------------------

UNTOLD: dict[str, dict[str, str]] = {
    "HTML with 200": dict.fromkeys(PROVIDERS, "stream"),
    "empty body": dict.fromkeys(PROVIDERS, "stream"),
    "malformed JSON": dict.fromkeys(PROVIDERS, "stream"),
    "an answer without an answer": {
        "openai": "call, stream",
        "anthropic": "stream",
        "google": "call",
    },
    "error object with 200": {"openai": "stream", "anthropic": "stream"},
    "cut before the first chunk": {},
    "cut after some chunks": {},
    "error event": {},
    "malformed event": {"google": "stream", "ollama": "stream"},
    "no terminator": {"google": "stream"},
    "silence after some chunks": {},
}
"""Where LiteLLM takes a fault for an answer: by row of the fault matrix and provider."""

CELLS = [
    (name, provider, streamed)
    for name in UNTOLD
    for provider in PROVIDERS
    for streamed in (False, True)
    if streamed or ROWS[name].call is not None
]
VERSION = tuple(map(int, importlib.metadata.version("litellm").split(".")[:2]))


@pytest.mark.skipif(
    VERSION < (1, 108), reason="the table is of LiteLLM 1.108 and later"
)
@pytest.mark.parametrize(("name", "provider", "streamed"), CELLS)
async def test_what_litellm_takes_for_an_answer(
    opened: Open, server: ProviderServer, name: str, provider: str, streamed: bool
) -> None:
    """The published table lists it, and everything else is an error."""
    row = ROWS[name]
    server.default = row.reply(provider)
    is_told = True
    async with opened(
        engine="litellm", max_retries=0, idle_timeout=row.timeout
    ) as service:
        try:
            await ask(service, provider, streamed=streamed)
            is_told = False
        except DiPeOLLMError:
            pass

    way = "stream" if streamed else "call"
    assert is_told is (way not in UNTOLD[name].get(provider, ""))
    assert len(server.requests) == 1


DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS / "litellm.md", DOCS / "reliability.md"]
BEGIN, END = "<!-- litellm-engine -->", "<!-- /litellm-engine -->"


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        f"| fault | {' | '.join(TITLES[p] for p in PROVIDERS)} |",
        "| --- |" + " --- |" * len(PROVIDERS),
    ]
    for name, untold in UNTOLD.items():
        cells = [
            f"taken for an answer: {untold[p]}" if p in untold else "an error"
            for p in PROVIDERS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_is_published(page: Path) -> None:
    """A user reads what this engine does not promise."""
    published = page.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()

    assert published == table(), "write it anew: python -m tests.test_litellm_engine"


def main() -> None:
    """Write the table into the pages."""
    for page in PAGES:
        before, _, rest = page.read_text("utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
