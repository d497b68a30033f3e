"""Puts a source of answers in the way of aiohttp and httpx, LiteLLM's two HTTP stacks.

What a caller gets while recording is built from the very record that a replay reads, so
the two cannot differ. Bodies are kept without their compression, and those of streams
with the length and the time of each piece.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.testing.network_guard import replaced
from dipeo_llm.testing.scrubbing import Secrets

if TYPE_CHECKING:
    import httpx

Answer = dict[str, Any]
"""A response as vcrpy keeps it (status, headers, body), the body as bytes, and for a
stream `pieces`: "bytes@milliseconds" of each, counted from when the request was sent."""

Piece = tuple[bytes, int]
"""A part of a body, and the milliseconds after which it came."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was, or would have been, sent."""

    method: str
    uri: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def as_data(self) -> dict[str, Any]:
        """Return where it goes, beside the fields of its JSON."""
        parts = urlsplit(self.uri)
        where = {"method": self.method, "host": parts.hostname, "path": parts.path}
        try:
            data = json.loads(self.body)
        except ValueError:
            data = {"body": self.body} if self.body else {}
        return {**where, **(data if isinstance(data, dict) else {"body": data})}


class Source(Protocol):
    """What answers requests, or keeps what the network answered."""

    secrets: Secrets
    real_timing: bool

    def answer(self, request: Request) -> Answer | None:
        """Return the answer; None if the request is to be sent, and then kept."""
        ...

    def keep(self, request: Request, answer: Answer) -> None:
        """Take what the network answered."""
        ...


def intercept(source: Source) -> AbstractContextManager[None]:
    """Lead every request of aiohttp and httpx to *source*, for as long as it lasts.

    In-process transports of httpx (ASGI, WSGI, mock) are left alone. The keys that
    adapters are made with meanwhile are told to `source.secrets`.
    """
    import aiohttp
    import httpx

    attributes = (
        (aiohttp.ClientSession, "_request", _aiohttp),
        (httpx.AsyncHTTPTransport, "handle_async_request", _async_httpx),
        (httpx.HTTPTransport, "handle_request", _httpx),
        (BaseLLMAdapter, "__init__", _telling_keys),
    )
    return replaced(
        [
            (owner, name, made(source, getattr(owner, name)))
            for owner, name, made in attributes
        ]
    )


def pieces_of(answer: Answer) -> list[Piece]:
    """Cut a body as it came; one that was edited by hand since is one piece."""
    body = answer["body"].get("string") or b""
    pieces: list[Piece] = []
    end = 0
    for entry in (answer.get("pieces") or "").split():
        length, _, after = entry.partition("@")
        pieces.append((body[end : end + int(length)], int(after)))
        end += int(length)
    return pieces if end == len(body) else [(body, 0)]


def with_pieces(answer: Answer, pieces: Iterable[Piece]) -> Answer:
    """Return an answer with a body in these pieces."""
    came = [(piece, after) for piece, after in pieces if piece]
    body = b"".join(piece for piece, _ in came)
    whole = {**answer, "body": {"string": body}}
    whole.pop("pieces", None)
    if len(came) > 1:
        whole["pieces"] = " ".join(f"{len(piece)}@{after}" for piece, after in came)
    return whole


_STREAMS: Final = (
    "text/event-stream",
    "application/x-ndjson",
    "application/vnd.amazon",
)
# Of the transport and not of the answer: a kept body has neither.
_FRAMING: Final = frozenset(
    {
        "content-encoding",
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
    }
)


def _answer(
    status: int,
    reason: str | None,
    headers: Iterable[tuple[str, str]],
    came: list[Piece],
) -> Answer:
    kept: dict[str, list[str]] = {}
    for name, value in headers:
        if name.lower() not in _FRAMING:
            kept.setdefault(str(name), []).append(value)
    kind = next((kept[name][0] for name in kept if name.lower() == "content-type"), "")
    answer = {"status": {"code": status, "message": reason or ""}, "headers": kept}
    if not kind.startswith(_STREAMS):
        came = [(b"".join(piece for piece, _ in came), 0)]
    return with_pieces(answer, came)


def _waits(answer: Answer, *, real_timing: bool) -> Iterator[tuple[bytes, float]]:
    """Yield each piece with the seconds to wait before it."""
    last = 0
    for piece, after in pieces_of(answer):
        yield piece, (after - last) / 1000 if real_timing else 0.0
        last = after


def _since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _telling_keys(source: Source, real: Any) -> Any:
    def __init__(self: BaseLLMAdapter, *args: Any, **options: Any) -> None:  # noqa: N807
        real(self, *args, **options)
        source.secrets.learn(self.endpoint.secret.get_secret_value())

    return __init__


# --- aiohttp -------------------------------------------------------------------------


def _aiohttp(source: Source, real: Any) -> Any:
    async def _request(session: Any, method: str, url: Any, **options: Any) -> Any:
        request = await _from_aiohttp(session, method, url, options)
        answer, real_timing = source.answer(request), source.real_timing
        if answer is None:
            answer, real_timing = await live(session, method, url, options), False
            source.keep(request, answer)
        response = _for_aiohttp(request, answer, real_timing=real_timing)
        check = options.get("raise_for_status")
        check = session.raise_for_status if check is None else check
        if callable(check):
            await check(response)
        elif check:
            response.raise_for_status()
        return response

    async def live(session: Any, method: str, url: Any, options: Any) -> Answer:
        own = {"auto_decompress": True, "raise_for_status": False}
        started = time.monotonic()
        response = await real(session, method, url, **{**options, **own})
        try:
            body = response.content.iter_any()
            came = [(piece, _since(started)) async for piece in body]
        finally:
            response.close()
        headers = response.headers.items()
        return _answer(response.status, response.reason, headers, came)

    return _request


async def _from_aiohttp(
    session: Any, method: str, url: Any, options: dict[str, Any]
) -> Request:
    from yarl import URL

    address = URL(url)
    if options.get("params"):
        address = address.extend_query(options["params"])
    body: Any = options.get("data")
    if options.get("json") is not None:
        body = json.dumps(options["json"])
    elif hasattr(body, "__aiter__"):
        body = options["data"] = b"".join([bytes(part) async for part in body])
    if not isinstance(body, str | bytes | bytearray | None):
        raise TypeError(f"a body of type {type(body).__name__} cannot be recorded")
    headers = {**session.headers, **dict(options.get("headers") or {})}
    raw = body.encode() if isinstance(body, str) else bytes(body or b"")
    return Request(method.upper(), str(address), headers, raw)


def _for_aiohttp(request: Request, answer: Answer, *, real_timing: bool) -> Any:
    from vcr.request import Request as VcrRequest
    from vcr.stubs.aiohttp_stubs import MockStream, build_response

    class Stream(MockStream):  # type: ignore[misc] # vcrpy has no types
        """Feeds itself one piece whenever its reader has nothing left."""

        def __init__(self) -> None:
            super().__init__(b"")
            self.set_read_chunk_size(len(answer["body"].get("string") or b""))
            self._eof = False
            self._left = _waits(answer, real_timing=real_timing)

        async def _wait(self, func_name: str) -> None:
            piece, wait = next(self._left, (None, 0.0))
            await asyncio.sleep(wait)
            if piece is None:
                self.feed_eof()
            else:
                self.feed_data(piece)

    asked = VcrRequest(request.method, request.uri, request.body, request.headers)
    response = build_response(asked, answer, ())
    response.content = Stream()
    return response


# --- httpx ---------------------------------------------------------------------------


def _async_httpx(source: Source, real: Any) -> Any:
    async def handle_async_request(
        transport: Any, request: "httpx.Request"
    ) -> "httpx.Response":
        await request.aread()
        asked = _from_httpx(request)
        answer, real_timing = source.answer(asked), source.real_timing
        if answer is None:
            answer, real_timing = await live(transport, request), False
            source.keep(asked, answer)
        return _for_httpx(answer, real_timing=real_timing)

    async def live(transport: Any, request: "httpx.Request") -> Answer:
        started = time.monotonic()
        response = await real(transport, request)
        try:
            came = [(piece, _since(started)) async for piece in response.stream]
        finally:
            await response.stream.aclose()
        return _answer_of_httpx(response, came)

    return handle_async_request


def _httpx(source: Source, real: Any) -> Any:
    def handle_request(transport: Any, request: "httpx.Request") -> "httpx.Response":
        request.read()
        asked = _from_httpx(request)
        answer, real_timing = source.answer(asked), source.real_timing
        if answer is None:
            answer, real_timing = live(transport, request), False
            source.keep(asked, answer)
        return _for_httpx(answer, real_timing=real_timing)

    def live(transport: Any, request: "httpx.Request") -> Answer:
        started = time.monotonic()
        response = real(transport, request)
        try:
            came = [(piece, _since(started)) for piece in response.stream]
        finally:
            response.stream.close()
        return _answer_of_httpx(response, came)

    return handle_request


def _from_httpx(request: "httpx.Request") -> Request:
    headers = dict(request.headers)
    return Request(request.method, str(request.url), headers, request.content)


def _answer_of_httpx(response: "httpx.Response", came: list[Piece]) -> Answer:
    headers = response.headers.multi_items()
    encoding = response.headers.get("content-encoding", "")
    unpacked = unpack(encoding, came) if encoding else came
    return _answer(response.status_code, response.reason_phrase, headers, unpacked)


def unpack(encoding: str, came: list[Piece]) -> list[Piece]:
    """Take the compression off a body that came in pieces.

    Raises:
        httpx.DecodingError: It is not what its header says.
    """
    import httpx

    after = 0

    def packed() -> Iterator[bytes]:
        nonlocal after
        for piece, came_after in came:
            after = came_after
            yield piece

    whole = httpx.Response(
        200, headers={"content-encoding": encoding}, content=packed()
    )
    return [(piece, after) for piece in whole.iter_bytes()]


def _for_httpx(answer: Answer, *, real_timing: bool) -> "httpx.Response":
    import httpx

    class Stream(httpx.AsyncByteStream, httpx.SyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece, wait in _waits(answer, real_timing=real_timing):
                await asyncio.sleep(wait)
                yield piece

        def __iter__(self) -> Iterator[bytes]:
            for piece, wait in _waits(answer, real_timing=real_timing):
                time.sleep(wait)
                yield piece

    reason = answer["status"].get("message") or ""
    return httpx.Response(
        answer["status"]["code"],
        headers=[(k, v) for k, values in answer["headers"].items() for v in values],
        stream=Stream(),
        extensions={"reason_phrase": reason.encode()} if reason else {},
    )
