"""docs/web.md under uvicorn: its service answers, streams, fails and is hung up on."""

import asyncio
import types
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser

from tests.provider_server import Answer, ProviderServer, error
from tests.test_cancellation import until

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

PAGE = Path(__file__).parent.parent / "docs" / "web.md"
QUESTION = {"text": "Hello"}


def load_page() -> types.ModuleType:
    """Run the page's example as the module that a reader would save."""
    module = types.ModuleType("app")
    document = Document.parse(
        str(PAGE), CodeBlockParser("python", lambda example: None)
    )
    (example,) = document
    exec(compile(example.parsed, str(PAGE), "exec"), module.__dict__)
    return module


@pytest.fixture
async def caller(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the page's application under uvicorn; return a client of it.

    OpenAI is at the loopback server.
    """
    monkeypatch.setenv("DIPEO_LLM_OPENAI_BASE_URL", server.base_url("openai"))
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "0")
    monkeypatch.setattr("dipeo_llm.adapters.factory.is_loopback", lambda host: False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    config = uvicorn.Config(load_page().app, port=0, lifespan="on", log_level="error")
    web = uvicorn.Server(config)
    serving = asyncio.create_task(web.serve())
    await until(lambda: web.started or serving.done())
    (socket,) = web.servers[0].sockets
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        yield client
    web.should_exit = True
    async with asyncio.timeout(10):
        await serving


async def test_an_answer(caller: httpx.AsyncClient, server: ProviderServer) -> None:
    """The text comes as JSON."""
    server.reply(Answer("A river."))

    response = await caller.post("/answer", json=QUESTION)

    assert (response.status_code, response.json()) == (200, {"text": "A river."})


async def test_a_stream(caller: httpx.AsyncClient, server: ProviderServer) -> None:
    """Chunks come as events, as the page shows them."""
    server.reply(Answer("A river.", pieces=2))

    response = await caller.post("/stream", json=QUESTION)

    shown = PAGE.read_text("utf-8").partition("```text\n")[2].partition("```")[0]
    assert response.text.strip() == shown.strip()
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("path", ["/answer", "/stream"])
@pytest.mark.parametrize(
    ("status", "ours"), [(400, 422), (401, 500), (404, 500), (429, 429), (503, 503)]
)
async def test_a_failure(
    caller: httpx.AsyncClient,
    server: ProviderServer,
    path: str,
    status: int,
    ours: int,
) -> None:
    """It has a status also where a stream was asked for, and repeats no word."""
    server.default = error("openai", status, "a secret", headers={"retry-after": "90"})

    response = await caller.post(path, json=QUESTION)

    assert response.status_code == ours
    assert response.json().keys() == {"error"}
    assert response.headers["retry-after"] == "90"


async def test_a_stream_that_breaks_off(
    caller: httpx.AsyncClient, server: ProviderServer
) -> None:
    """The last event says so."""
    server.reply(Answer("A river.", pieces=4, cut_after=2))

    response = await caller.post("/stream", json=QUESTION)

    last = response.text.strip().split("\n\n")[-1]
    assert last == 'event: error\ndata: {"error": "StreamInterruptedError"}'


async def test_a_caller_that_hangs_up_on_a_stream(
    caller: httpx.AsyncClient, server: ProviderServer
) -> None:
    """The connection to the provider is closed, long before the stream would end."""
    server.reply(Answer("word " * 50, pieces=50, chunk_delay=0.2))

    async with caller.stream("POST", "/stream", json=QUESTION) as response:
        lines = response.aiter_lines()
        assert "word" in await anext(lines)

    await server.wait_closed_by_client(2)


async def test_a_caller_that_hangs_up_before_the_answer(
    caller: httpx.AsyncClient, server: ProviderServer
) -> None:
    """The call to the provider is cancelled, long before it would be answered."""
    server.reply(Answer("A river.", delay=20))

    with pytest.raises(httpx.ReadTimeout):
        await caller.post("/answer", json=QUESTION, timeout=0.5)

    assert len(server.requests) == 1
    async with asyncio.timeout(5):
        await until(lambda: server.open_connections == 0)


async def test_a_caller_after_one_that_hung_up(
    caller: httpx.AsyncClient, server: ProviderServer
) -> None:
    """The service goes on."""
    server.reply(Answer("A river.", delay=20), Answer("A lake."))
    with pytest.raises(httpx.ReadTimeout):
        await caller.post("/answer", json=QUESTION, timeout=0.5)

    response = await caller.post("/answer", json=QUESTION)

    assert response.json() == {"text": "A lake."}
