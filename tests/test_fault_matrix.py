"""Every fault, on every provider, whole and streamed, by both engines.

`MATRIX` says what each fault is and what a caller must see of it. The same table is
published in docs/reliability.md, which `python -m tests.test_fault_matrix` writes anew;
a test holds the two together.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMInfraService,
    LLMServiceError,
    LLMTimeoutError,
    ModelNotFoundError,
    QuotaExceededError,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    StreamInterruptedError,
)
from dipeo_llm.settings import Engine
from tests.conftest import PROVIDERS
from tests.provider_server import Answer, Fault, ProviderServer, Raw, error

MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2",
}
JSON = {"content-type": "application/json"}
EMPTY: dict[str, dict[str, Any]] = {
    "openai": {"id": "x", "object": "chat.completion", "choices": []},
    "anthropic": {"id": "x", "type": "message", "role": "assistant"},
    "google": {"usageMetadata": {"promptTokenCount": 3}},
    "ollama": {"model": "x", "done": True},
}
WHOLE: dict[str, dict[str, Any]] = {
    "openai": {
        "choices": [
            {"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}
        ]
    },
    "anthropic": {
        "type": "message",
        "role": "assistant",
        "model": "x",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
    "google": {
        "candidates": [{"content": {"parts": [{"text": "Hello"}]}, "finishReason": "STOP"}]
    },
    "ollama": {"model": "x", "message": {"role": "assistant", "content": "Hello"}, "done": True},
}  # fmt: skip
TIMEOUT = 0.6
"""Seconds of an attempt."""

Reply = Answer | Raw | Fault


@dataclass(frozen=True)
class Seen:
    """What a caller sees. With one retry allowed, a retryable fault is two requests."""

    error: type[DiPeOLLMError] | None
    status: int | None = None
    retryable: bool = False
    requests: int = 1

    def __str__(self) -> str:
        if self.error is None:
            return "the answer"
        status = "" if self.status is None else f" {self.status}"
        again = ", tried again" if self.retryable else ""
        return f"{self.error.__name__}{status}{again}"


def unavailable(status: int | None = None, requests: int = 2) -> Seen:
    """A fault of the provider's or the way's, tried again."""
    return Seen(ServiceUnavailableError, status, retryable=True, requests=requests)


INTERRUPTED = Seen(StreamInterruptedError, 200)


@dataclass(frozen=True)
class Row:
    """A fault: what the server does, and what is seen of it."""

    name: str
    reply: Callable[[str], Reply]
    call: Seen
    stream: Seen | None = None
    """None where it is what a call sees."""

    def seen(self, streamed: bool) -> Seen:
        """Return what is seen of it."""
        return self.stream if streamed and self.stream is not None else self.call


def whole(provider: str) -> bytes:
    """A good answer's bytes."""
    return json.dumps(WHOLE[provider]).encode()


def status(code: int, seen: Seen, **options: Any) -> Row:
    """A status with the provider's own error in the body."""
    return Row(str(code), lambda p: error(p, code, "No.", **options), seen)


def limited(name: str, headers: dict[str, str], delay: float | None = None) -> Row:
    """A 429 that says in some way when to come back."""

    def reply(provider: str) -> Raw:
        made = error(provider, 429, "Slow down.", headers=headers)
        if delay is not None and provider == "google":
            made = error(provider, 429, "Slow down.", retry_delay=delay)
        return made

    return Row(name, reply, Seen(RateLimitError, 429, retryable=True, requests=2))


def no_money(provider: str) -> Raw:
    """An account without money, in each provider's words."""
    if provider == "openai":
        return error(
            provider, 429, "You exceeded your quota.", code="insufficient_quota"
        )
    if provider == "anthropic":
        return error(provider, 400, "Your credit balance is too low.")
    return error(provider, 402, "Payment required.")


def error_with_200(provider: str) -> Raw:
    """An error object where an answer should be."""
    return Raw(200, JSON, error(provider, 503, "Overloaded.").body)


PAST = format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)
NO_STATUS = unavailable()
NOT_AN_ANSWER = unavailable(200)
LATE = Seen(LLMTimeoutError, None, retryable=True, requests=2)
LATE_STREAM = Seen(StreamInterruptedError, None)

MATRIX = (
    Row("reset before the answer", lambda p: Fault("reset"), NO_STATUS),
    Row("closed before the answer", lambda p: Fault("close"), NO_STATUS),
    Row(
        "reset in mid-body",
        lambda p: Raw(200, JSON, whole(p)[:20], framing="short"),
        NOT_AN_ANSWER,
    ),
    Row("HTML with 200", lambda p: Raw(200, {"content-type": "text/html"}, b"<html>no"), NOT_AN_ANSWER),
    Row("empty body", lambda p: Raw(200, JSON, b""), NOT_AN_ANSWER),
    Row("an answer without an answer", lambda p: Raw(200, JSON, json.dumps(EMPTY[p]).encode()), NOT_AN_ANSWER, NOT_AN_ANSWER),
    Row("malformed JSON", lambda p: Raw(200, JSON, whole(p)[:-3]), NOT_AN_ANSWER),
    Row("error object with 200", error_with_200, unavailable(200)),
    Row("stall", lambda p: Fault("stall"), LATE),
    Row("slow drip", lambda p: Fault("drip", delay=0.05), LATE),
    status(400, Seen(InvalidRequestError, 400)),
    status(401, Seen(APIKeyError, 401)),
    status(403, Seen(APIKeyError, 403)),
    status(404, Seen(ModelNotFoundError, 404)),
    status(408, Seen(LLMTimeoutError, 408, retryable=True, requests=2)),
    status(409, Seen(LLMServiceError, 409, retryable=True, requests=2)),
    status(413, Seen(InvalidRequestError, 413)),
    status(422, Seen(InvalidRequestError, 422)),
    limited("429, seconds", {"retry-after": "0.05"}),
    limited("429, a date", {"retry-after": PAST}),
    limited("429, milliseconds", {"retry-after-ms": "50"}),
    limited("429, RetryInfo", {}, delay=0.05),
    limited("429, no hint", {}),
    Row("429, too long to wait", lambda p: error(p, 429, "Later.", headers={"retry-after": "3600"}), Seen(RateLimitError, 429, retryable=True)),
    Row("no money", no_money, Seen(QuotaExceededError)),
    status(500, unavailable(500)),
    status(502, unavailable(502)),
    Row("503 as text", lambda p: Raw(503, {"content-type": "text/plain"}, b"upstream connect error"), unavailable(503)),
    status(529, unavailable(529)),
    Row("307 to elsewhere", lambda p: Raw(307, {"location": "http://127.0.0.1:9/"}, b""), Seen(LLMServiceError, 307)),
)  # fmt: skip
"""Faults of whole answers, which a stream meets too."""

CUTS = (
    Row("cut before the first chunk", lambda p: Answer(cut_after=0), unavailable(200)),
    Row("cut after some chunks", lambda p: Answer(cut_after=4, pieces=9), INTERRUPTED),
    Row("error event", lambda p: Answer(error_after=4, pieces=9), INTERRUPTED),
    Row("malformed event", lambda p: Answer(garbage_after=4, pieces=9), INTERRUPTED),
    Row("no end mark", lambda p: Answer(drop_end=True), INTERRUPTED),
    Row("silence after some chunks", lambda p: Answer(stall_after=4, pieces=9), LATE_STREAM),
)  # fmt: skip
"""Faults that only a stream has."""


_warm: set[tuple[str, str, bool]] = set()


async def warm_up(provider: str, engine: Engine, *, streamed: bool) -> None:
    """Make LiteLLM's late imports, which take longer than an attempt may here."""
    if (provider, engine, streamed) in _warm:
        return
    _warm.add((provider, engine, streamed))
    async with ProviderServer() as server:
        keys = StaticAPIKeys({"k": {"key": "k", "base_url": server.base_url(provider)}})
        async with LLMInfraService(keys, settings=Settings(engine=engine)) as service:
            messages = [{"role": "user", "content": "Hello?"}]
            if streamed:
                async with service.stream(messages, MODELS[provider], "k") as stream:
                    await stream.result()
            else:
                await service.complete(messages, MODELS[provider], "k")


async def see(
    server: ProviderServer, provider: str, engine: Engine, *, streamed: bool
) -> tuple[Seen, DiPeOLLMError | None]:
    """Make a call, or read a stream, and say what was seen."""
    settings = Settings(
        engine=engine,
        max_retries=1,
        retry_wait=0.01,
        timeout=TIMEOUT,
        idle_timeout=TIMEOUT,
    )
    keys = StaticAPIKeys(
        {"k": {"key": "sk-canary-key", "base_url": server.base_url(provider)}}
    )
    failed: DiPeOLLMError | None = None
    messages = [{"role": "user", "content": "Hello?"}]
    await warm_up(provider, engine, streamed=streamed)
    async with LLMInfraService(keys, settings=settings) as service:
        began = time.monotonic()
        try:
            if streamed:
                stream = service.stream(
                    messages, MODELS[provider], "k", service=provider
                )
                async with stream:
                    async for _ in stream:
                        pass
                await stream.result()
            else:
                await service.complete(
                    messages, MODELS[provider], "k", service=provider
                )
        except DiPeOLLMError as exc:
            failed = exc
        assert time.monotonic() - began < 20 * TIMEOUT
    if not isinstance(failed, LLMServiceError | APIKeyError):
        return Seen(None, requests=len(server.requests)), failed
    if server.requests:
        assert failed.attempts == len(server.requests)
    seen = Seen(
        type(failed), failed.status_code, failed.retryable, len(server.requests)
    )
    return seen, failed


async def nothing_open(server: ProviderServer) -> None:
    """Wait until the server has seen every connection closed."""
    for _ in range(500):
        if not server.open_connections:
            return
        await asyncio.sleep(0.01)
    assert server.open_connections == 0


@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
async def test_a_fault_of_an_answer(
    server: ProviderServer, row: Row, provider: str, streamed: bool, engine: Engine
) -> None:
    """A fault is the same class, status and number of requests for every provider."""
    server.default = row.reply(provider)

    seen, failed = await see(server, provider, engine, streamed=streamed)

    expected = row.seen(streamed)
    if expected.error is QuotaExceededError:
        expected = Seen(QuotaExceededError, seen.status)
    assert seen == expected, failed
    assert "sk-canary-key" not in f"{failed!r}{failed}"
    await nothing_open(server)


@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("row", CUTS, ids=lambda row: row.name)
async def test_a_fault_of_a_stream(
    server: ProviderServer, row: Row, provider: str, engine: Engine
) -> None:
    """A stream that breaks off is told from a whole one, and what came is kept."""
    # Anthropic's first two events, and a ping, carry no text.
    server.default = row.reply(provider)
    text = server.default.text if isinstance(server.default, Answer) else ""

    seen, failed = await see(server, provider, engine, streamed=True)

    if isinstance(failed, StreamInterruptedError):
        assert failed.partial_text == text[: len(failed.partial_text)]
        assert seen == Seen(StreamInterruptedError, seen.status)
        assert failed.partial_text
    else:
        assert seen == row.call, failed
    assert (row.call.error is StreamInterruptedError) == isinstance(
        failed, StreamInterruptedError
    )
    await nothing_open(server)


@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_nobody_listens(provider: str, engine: Engine) -> None:
    """A refused connection is tried again and sends nothing."""
    async with ProviderServer() as gone:
        pass

    seen, _ = await see(gone, provider, engine, streamed=False)

    assert (seen.error, seen.status, seen.retryable) == (
        ServiceUnavailableError,
        None,
        True,
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_pooled_connection_that_went_stale(
    server: ProviderServer, keys: StaticAPIKeys, provider: str, streamed: bool
) -> None:
    """A connection that the server closed meanwhile costs nothing but a new one."""
    settings = Settings(max_retries=1, retry_wait=0.01)
    messages = [{"role": "user", "content": "Hello?"}]
    async with LLMInfraService(keys, settings=settings) as service:
        await service.complete(messages, MODELS[provider], provider)
        await server.drop_connections()
        await asyncio.sleep(0.05)

        if streamed:
            async with service.stream(messages, MODELS[provider], provider) as stream:
                result = await stream.result()
        else:
            result = await service.complete(messages, MODELS[provider], provider)

        assert result.text == "Hello from the loopback."
        assert result.attempts == 1


# --- The published table ---------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| fault | a call sees | a stream sees |", "| --- | --- | --- |"]
    lines += [f"| {r.name} | {r.call} | {r.seen(True)} |" for r in MATRIX]
    lines += [f"| {r.name} | | {r.call} |" for r in CUTS]
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with the table in it."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def test_the_published_table_is_the_tested_one() -> None:
    """docs/reliability.md says what these tests check, no more and no less."""
    text = PAGE.read_text("utf-8")

    assert page(text) == text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
