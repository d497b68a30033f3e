"""Every fault, on every provider, whole and streamed, on the direct engine.

`MATRIX` says what each fault is and what a caller must see of it. The same table is
published in docs/reliability.md: `python -m tests.test_fault_matrix` makes every fault
and writes there how many cells came out right; a test holds the two together.
"""

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    ChatResult,
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
from tests.conftest import MODELS, PROVIDERS, Authority, make_authority
from tests.provider_server import Answer, Fault, ProviderServer, Raw, error

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
KEY = "sk-canary-key"
DEADLINE = 30.0
"""Seconds of a call, attempts and waits together."""
SHORT = 0.6
"""Seconds of an attempt where the fault is that nothing comes."""
SENT = -1
"""In place of a status: the one that the server sent, which is each provider's own."""

Reply = Answer | Raw | Fault


@dataclass(frozen=True)
class Seen:
    """What a caller sees, with one retry allowed."""

    error: type[DiPeOLLMError] | None
    status: int | None = None
    retryable: bool = False
    attempts: int = 1
    retry_after: float | None = None


@dataclass(frozen=True)
class Row:
    """A fault: what the server does, and what is seen of it."""

    name: str
    reply: Callable[[str], Reply]
    call: Seen | None
    """None where only a stream can have the fault."""
    stream: Seen | None = None
    """None where it is what a call sees."""
    leads_to: str = "server"
    """What the base URL leads to: see `Places.url`."""
    timeout: float = 20.0
    """Seconds of an attempt, and of a silence in a stream."""
    providers: tuple[str, ...] = PROVIDERS

    def seen(self, provider: str, *, streamed: bool) -> Seen:
        """Return what is seen of it."""
        seen = (self.stream or self.call) if streamed else self.call
        assert seen is not None
        if seen.status == SENT:
            reply = self.reply(provider)
            assert isinstance(reply, Raw)
            seen = replace(seen, status=reply.status)
        return seen

    def in_words(self, *, streamed: bool) -> str:
        """Return the same for the published table."""
        if self.call is None and not streamed:
            return ""
        all_seen = [self.seen(p, streamed=streamed) for p in self.providers]
        seen = all_seen[0]
        if seen.error is None:
            return "the answer"
        statuses = sorted({str(s.status) for s in all_seen if s.status is not None})
        words = f"{seen.error.__name__} {' or '.join(statuses)}".strip()
        if seen.attempts > 1:
            return f"{words}, tried again"
        return f"{words}, to be tried later" if seen.retryable else words


def whole(provider: str) -> bytes:
    """A good answer's bytes."""
    return json.dumps(WHOLE[provider]).encode()


def again(
    error: type[DiPeOLLMError] = ServiceUnavailableError,
    status: int | None = None,
    *,
    after: float | None = None,
) -> Seen:
    """What is worth another try, and gets it."""
    return Seen(error, status, retryable=True, attempts=2, retry_after=after)


def status(code: int, seen: Seen) -> Row:
    """A status with the provider's own error in the body."""
    return Row(str(code), lambda p: error(p, code, "No."), seen)


def limited(name: str, after: float | None, headers: dict[str, str]) -> Row:
    """A 429 that says in a header when to come back."""
    return Row(
        f"429, {name}",
        lambda p: error(p, 429, "Slow down.", headers=headers),
        again(RateLimitError, 429, after=after),
    )


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


def raw(body: Callable[[str], bytes], **options: Any) -> Callable[[str], Raw]:
    """A 200 with any body."""
    options = {"headers": JSON} | options
    return lambda provider: Raw(200, body=body(provider), **options)


PAST = format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)
NO_STATUS = again()
NOT_AN_ANSWER = again(status=200)
LATE = again(LLMTimeoutError)
INTERRUPTED = Seen(StreamInterruptedError, 200)
THE_ANSWER = Seen(None)
UNTRUSTED = Seen(ServiceUnavailableError)
HTML = {"content-type": "text/html"}

MATRIX = (
    # On the way to a server.
    Row("no such host", lambda p: Answer(), NO_STATUS, leads_to="no such host"),
    Row("connection refused", lambda p: Answer(), NO_STATUS, leads_to="nobody"),
    Row("a certificate that nobody trusts", lambda p: Answer(), UNTRUSTED, leads_to="untrusted"),
    Row("silence in the TLS handshake", lambda p: Answer(), LATE, leads_to="no TLS", timeout=SHORT),
    Row("a pooled connection that went stale", lambda p: Answer(), THE_ANSWER, leads_to="server, after a break"),
    # In place of an answer.
    Row("reset before the answer", lambda p: Fault("reset"), NO_STATUS),
    Row("closed before the answer", lambda p: Fault("close"), NO_STATUS),
    Row("reset in mid-body", lambda p: Fault("reset_mid_body"), NOT_AN_ANSWER, INTERRUPTED),
    Row("half a body", raw(lambda p: whole(p)[:20], framing="short"), NOT_AN_ANSWER),
    Row("HTML with 200", raw(lambda p: b"<html>no", headers=HTML), NOT_AN_ANSWER),
    Row("an answer labelled as HTML", lambda p: Answer(headers=HTML), THE_ANSWER),
    Row("empty body", raw(lambda p: b""), NOT_AN_ANSWER),
    Row("an answer without an answer", raw(lambda p: json.dumps(EMPTY[p]).encode()), NOT_AN_ANSWER),
    Row("malformed JSON", raw(lambda p: whole(p)[:-3]), NOT_AN_ANSWER),
    Row("error object with 200", error_with_200, NOT_AN_ANSWER),
    Row("stall", lambda p: Fault("stall"), LATE, timeout=SHORT),
    Row("slow drip", lambda p: Fault("drip", delay=0.05), LATE, timeout=SHORT),
    # A status.
    status(400, Seen(InvalidRequestError, 400)),
    status(401, Seen(APIKeyError, 401)),
    status(403, Seen(APIKeyError, 403)),
    status(404, Seen(ModelNotFoundError, 404)),
    status(408, again(LLMTimeoutError, 408)),
    status(409, again(LLMServiceError, 409)),
    status(413, Seen(InvalidRequestError, 413)),
    status(422, Seen(InvalidRequestError, 422)),
    limited("seconds", 0.05, {"retry-after": "0.05"}),
    limited("a date", 0.0, {"retry-after": PAST}),
    limited("milliseconds", 0.05, {"retry-after-ms": "50"}),
    Row("429, RetryInfo", lambda p: error(p, 429, "No.", retry_delay=0.05), again(RateLimitError, 429, after=0.05), providers=("google",)),
    limited("no hint", None, {}),
    Row("429, too long to wait", lambda p: error(p, 429, "Later.", headers={"retry-after": "3600"}), Seen(RateLimitError, 429, retryable=True, retry_after=3600)),
    Row("no money", no_money, Seen(QuotaExceededError, SENT)),
    status(500, again(status=500)),
    status(502, again(status=502)),
    Row("503 as text", lambda p: Raw(503, {"content-type": "text/plain"}, b"upstream connect error"), again(status=503)),
    status(529, again(status=529)),
    Row("307 to elsewhere", lambda p: Raw(307, {"location": "http://127.0.0.1:9/"}, b""), Seen(LLMServiceError, 307)),
    # In a stream.
    Row("cut before the first chunk", lambda p: Answer(cut_after=0), None, NOT_AN_ANSWER),
    Row("cut after some chunks", lambda p: Answer(cut_after=4, pieces=9), None, INTERRUPTED),
    Row("error event", lambda p: Answer(error_after=4, pieces=9), None, INTERRUPTED),
    Row("malformed event", lambda p: Answer(garbage_after=4, pieces=9), None, INTERRUPTED),
    Row("no terminator", lambda p: Answer(drop_end=True), None, INTERRUPTED),
    Row("silence after some chunks", lambda p: Answer(stall_after=4, pieces=9), None, INTERRUPTED, timeout=SHORT),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One fault of one provider, for a call or a stream."""

    row: Row
    provider: str
    streamed: bool

    def __str__(self) -> str:
        kind = "stream" if self.streamed else "call"
        return f"{self.row.name}-{self.provider}-{kind}"


def cells(row: Row) -> Iterator[Cell]:
    """All cells of a row."""
    kinds = [True] if row.call is None else [False, True]
    for provider, streamed in itertools.product(row.providers, kinds):
        yield Cell(row, provider, streamed)


@dataclass
class Places:
    """Where a base URL may lead."""

    server: ProviderServer
    secure: ProviderServer
    nobody: ProviderServer
    """One that has gone."""

    @classmethod
    @asynccontextmanager
    async def open(cls, authority: Authority) -> AsyncIterator["Places"]:
        """Open them all."""
        async with ProviderServer() as nobody:
            pass
        async with (
            ProviderServer() as server,
            ProviderServer(ssl=authority.server) as secure,
        ):
            yield cls(server, secure, nobody)

    def url(self, leads_to: str, provider: str) -> str:
        """Return the base URL that leads there."""
        url = self.server.base_url(provider)
        if leads_to == "no such host":
            return url.replace("127.0.0.1", "nowhere.invalid")
        if leads_to == "no TLS":
            return url.replace("http:", "https:")
        other = {"nobody": self.nobody, "untrusted": self.secure}.get(leads_to)
        return other.base_url(provider) if other is not None else url


async def ask(service: LLMInfraService, cell: Cell) -> str:
    """Make a call, or read a stream to its end, and return the text."""
    asked: Any = {
        "messages": [{"role": "user", "content": "Hello?"}],
        "model": MODELS[cell.provider],
        "api_key_id": "k",
        "service": cell.provider,
        "deadline": DEADLINE,
    }
    if not cell.streamed:
        result: ChatResult = await service.complete(**asked)
        return result.text
    async with service.stream(**asked) as stream:
        async for _ in stream:
            pass
    return (await stream.result()).text


def service_at(url: str, **settings: Any) -> LLMInfraService:
    """Return a service whose one key leads to a base URL."""
    keys = StaticAPIKeys({"k": {"key": KEY, "base_url": url}})
    options = Settings(engine="direct", max_retries=1, retry_wait=0.01, **settings)
    return LLMInfraService(keys, settings=options)


_warm: set[tuple[str, bool]] = set()


async def warm_up(places: Places, cell: Cell) -> None:
    """Make LiteLLM's late imports, which take longer than some attempts here may."""
    if (cell.provider, cell.streamed) in _warm:
        return
    _warm.add((cell.provider, cell.streamed))
    url = places.url("server", cell.provider)
    async with service_at(url) as service:
        await ask(service, cell)
    places.server.requests.clear()


async def check(cell: Cell, authority: Authority) -> None:
    """Make the fault and assert that it is seen as the table says."""
    row, provider = cell.row, cell.provider
    expected = row.seen(provider, streamed=cell.streamed)
    async with Places.open(authority) as places:
        await warm_up(places, cell)
        server = places.server
        url = places.url(row.leads_to, provider)
        failed: DiPeOLLMError | None = None
        text = ""
        async with service_at(
            url, timeout=row.timeout, idle_timeout=row.timeout
        ) as service:
            if row.leads_to == "server, after a break":
                await ask(service, cell)
                await server.drop_connections()
                await asyncio.sleep(0.05)
                server.requests.clear()
            server.default = row.reply(provider)
            began = time.monotonic()
            try:
                text = await ask(service, cell)
            except DiPeOLLMError as exc:
                failed = exc
            assert time.monotonic() - began < DEADLINE

        requests = [len(server.requests), len(places.secure.requests)]
        reached = row.leads_to.startswith("server")
        assert requests == [expected.attempts if reached else 0, 0]
        if expected.error is None:
            assert failed is None
            assert text == Answer().text
        else:
            assert isinstance(failed, LLMServiceError | APIKeyError)
            assert expected == Seen(
                type(failed),
                failed.status_code,
                failed.retryable,
                failed.attempts,
                failed.retry_after,
            ), failed
            assert failed.service == provider
            assert KEY not in f"{failed!r}{failed}"
        if isinstance(failed, StreamInterruptedError):
            said = server.default.text if isinstance(server.default, Answer) else ""
            said = said or Answer().text
            assert failed.partial_text
            assert said.startswith(failed.partial_text)
        async with asyncio.timeout(DEADLINE):
            while server.open_connections + places.secure.open_connections:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "cell", [cell for row in MATRIX for cell in cells(row)], ids=str
)
async def test_a_fault(cell: Cell, authority: Authority) -> None:
    """It has one class, status and number of attempts, and leaves nothing open."""
    await check(cell, authority)


# --- The published table ---------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"


def line(row: Row, right: int) -> str:
    """Return a row in Markdown, with the number of its cells that came out right."""
    call, stream = row.in_words(streamed=False), row.in_words(streamed=True)
    return f"| {row.name} | {call} | {stream} | {right} of {len([*cells(row)])} |"


def page(text: str, lines: list[str]) -> str:
    """Return the page with the table in it."""
    head, _, rest = text.partition(BEGIN)
    table = [
        "| fault | a call sees | a stream sees | cells that came out so |",
        "| --- | --- | --- | --- |",
        *lines,
    ]
    return "\n".join([f"{head}{BEGIN}", *table, f"{END}{rest.partition(END)[2]}"])


def test_the_published_table_is_the_tested_one() -> None:
    """docs/reliability.md says what these tests check, no more and no less."""
    text = PAGE.read_text("utf-8")

    assert page(text, [line(row, len([*cells(row)])) for row in MATRIX]) == text


async def publish() -> bool:
    """Make every fault, write the table, and say whether all cells came out right."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        authority = make_authority(Path(folder))
        for row in MATRIX:
            wrong = await asyncio.gather(
                *(check(cell, authority) for cell in cells(row)), return_exceptions=True
            )
            for exc in filter(None, wrong):
                sys.stderr.write(f"{exc!r}\n")
            lines.append(line(row, wrong.count(None)))
            sys.stdout.write(f"{lines[-1]}\n")
    PAGE.write_text(page(PAGE.read_text("utf-8"), lines), "utf-8")
    return lines == [line(row, len([*cells(row)])) for row in MATRIX]


if __name__ == "__main__":
    sys.exit(not asyncio.run(publish()))
