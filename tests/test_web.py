"""docs/web.md: its service answers, streams, reports failures and notices a lost caller."""

import asyncio
import json
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser

from tests.provider_server import Answer, ProviderServer, error

pytest.importorskip("fastapi")

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
async def app(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """Start the page's application, with OpenAI at the loopback server."""
    monkeypatch.setenv("DIPEO_LLM_OPENAI_BASE_URL", server.base_url("openai"))
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "0")
    monkeypatch.setattr("dipeo_llm.adapters.factory.is_loopback", lambda host: False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    page = load_page()
    async with page.lifespan(page.app):
        yield page.app


@pytest.fixture
async def browser(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of the application."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


async def test_an_answer(browser: httpx.AsyncClient, server: ProviderServer) -> None:
    """The text comes as JSON."""
    server.reply(Answer("A river."))

    response = await browser.post("/answer", json=QUESTION)

    assert (response.status_code, response.json()) == (200, {"text": "A river."})


async def test_a_stream(browser: httpx.AsyncClient, server: ProviderServer) -> None:
    """Chunks come as events, and the last one says how it ended."""
    server.reply(Answer("A river.", pieces=4))

    response = await browser.post("/stream", json=QUESTION)

    *chunks, end = response.text.strip().split("\n\n")
    texts = [json.loads(chunk.removeprefix("data: "))["text"] for chunk in chunks]
    assert len(texts) == 4
    assert "".join(texts) == "A river."
    assert end == 'event: end\ndata: {"reason": "stop"}'
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("path", ["/answer", "/stream"])
@pytest.mark.parametrize(
    ("status", "ours"), [(400, 422), (401, 500), (404, 500), (429, 429), (503, 503)]
)
async def test_a_failure(
    browser: httpx.AsyncClient,
    server: ProviderServer,
    path: str,
    status: int,
    ours: int,
) -> None:
    """It has a status also where a stream was asked for, and repeats no word."""
    server.default = error("openai", status, "a secret", headers={"retry-after": "90"})

    response = await browser.post(path, json=QUESTION)

    assert response.status_code == ours
    assert response.json().keys() == {"error"}
    assert response.headers["retry-after"] == "90"


async def test_a_stream_that_breaks_off(
    browser: httpx.AsyncClient, server: ProviderServer
) -> None:
    """The last event says so."""
    server.reply(Answer("A river.", pieces=4, cut_after=2))

    response = await browser.post("/stream", json=QUESTION)

    last = response.text.strip().split("\n\n")[-1]
    assert last == 'event: error\ndata: {"error": "StreamInterruptedError"}'


async def ask_and_leave(app: Any, path: str, leave: asyncio.Event) -> list[Any]:
    """Post the question, and hang up once *leave* is set; return what was sent back.

    httpx's own transport cannot hang up.
    """
    body = json.dumps(QUESTION).encode()
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent = []

    async def receive() -> dict[str, Any]:
        for request in requests:
            return request
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message.get("body"):
            leave.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("app", 80),
    }
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    return sent


async def test_a_caller_that_leaves_a_stream(app: Any, server: ProviderServer) -> None:
    """The connection to the provider is closed, long before the stream would end."""
    server.reply(Answer("word " * 50, pieces=50, chunk_delay=0.2))

    sent = await ask_and_leave(app, "/stream", asyncio.Event())

    await server.wait_closed_by_client()
    assert len(sent) < 10


async def test_a_caller_that_does_not_wait_for_an_answer(
    app: Any, server: ProviderServer
) -> None:
    """The handler runs on: FastAPI does not cancel it."""
    server.reply(Answer("A river.", delay=0.3))
    gone = asyncio.Event()
    gone.set()

    sent = await ask_and_leave(app, "/answer", gone)

    assert sent[-1]["body"] == b'{"text":"A river."}'
