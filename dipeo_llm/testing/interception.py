"""Puts a source of answers into the HTTP clients of this process.

Each client is intercepted where other test tools do not: aiohttp by a middleware, httpx
and httpx2 at their connection pools (httpcore), and all that is built on `http.client`
(requests, urllib3, boto3, urllib) by vcrpy's own stubs. A mock of a neighbour, such as
respx, pytest-httpx or aioresponses, therefore answers first, and is not recorded.
"""

import asyncio
import builtins
import functools
import importlib
import inspect
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.testing.exchange import (
    SILENCE,
    UNREAD,
    Answer,
    Failure,
    Piece,
    Request,
    header,
)
from dipeo_llm.testing.network_guard import open_network, replaced
from dipeo_llm.testing.scrubbing import Secrets


class Source(Protocol):
    """Answers requests, or keeps what the network answered."""

    secrets: Secrets
    real_timing: bool

    def ignores(self, uri: str) -> bool:
        """Say whether requests to this address are passed through."""
        ...

    def answer(self, request: Request) -> Answer | None:
        """Return the answer, or None if the request is to be sent and kept."""
        ...

    def keep(self, request: Request) -> Answer:
        """Return the answer to fill while the network answers."""
        ...

    def refuse(self, message: str) -> BaseException:
        """Return the error to raise where something cannot be answered or kept."""
        ...


@contextmanager
def intercept(source: Source) -> Iterator[None]:
    """Lead the requests of every known HTTP client to *source*, for as long as it lasts.

    In-process transports of httpx (ASGI, WSGI, mock) are left alone. The keys that
    adapters are made with meanwhile are told to `source.secrets`.
    """
    with ExitStack() as stack:
        stack.enter_context(
            replaced(
                (owner, name, wrap(source, getattr(owner, name)))
                for owner, name, wrap in _find_clients()
            )
        )
        stack.enter_context(_http_client(source))
        yield


def _find_clients() -> Iterator[tuple[Any, str, Callable[[Source, Any], Any]]]:
    import aiohttp

    yield BaseLLMAdapter, "__init__", _learn_keys
    yield aiohttp.ClientSession, "_request", _aiohttp
    seen = set()
    for name in ("httpcore", "httpcore2"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        # httpx2.alias_httpx() makes the two names one module.
        if module in seen:
            continue
        seen.add(module)
        for owner, method, wrap in (
            (module.AsyncConnectionPool, "handle_async_request", _async_httpcore),
            (module.ConnectionPool, "handle_request", _httpcore),
        ):
            # A mock that was there first, such as respx's, stays in front: what it
            # passes on meets the closed network instead of a wrong recording.
            if getattr(owner, method).__module__.startswith(name):
                yield owner, method, functools.partial(wrap, module)


# The default is the real clock even where a test freezes time: freezegun replaces the
# names of modules, not the defaults of functions.
def _now(clock: Callable[[], float] = time.monotonic) -> float:
    return clock()


def _since(started: float) -> int:
    return round((_now() - started) * 1000)


def _learn_keys(source: Source, real: Any) -> Any:
    signature = inspect.signature(real)

    @functools.wraps(real)
    def __init__(self: BaseLLMAdapter, *args: Any, **options: Any) -> None:  # noqa: N807
        real(self, *args, **options)
        key = signature.bind(self, *args, **options).arguments.get("api_key") or ""
        source.secrets.learn(getattr(key, "get_secret_value", lambda: key)())

    return __init__


def _raise_failure(
    source: Source, failure: Failure | None, error: Callable[..., Any]
) -> None:
    """Raise what ended an answer, unless it came to its own end."""
    if failure == UNREAD:
        raise source.refuse(
            "The program that was recorded closed this answer before its end, and reads"
            " on now. Record it again."
        )
    if failure is not None:
        raise error(failure)


def _record_stream(
    answer: Answer, live: AsyncIterator[bytes], started: float
) -> AsyncGenerator[bytes]:
    """Pass a stream on while it arrives, and record it."""

    async def pass_on() -> AsyncGenerator[bytes]:
        try:
            async for piece in live:
                answer.pieces.append((piece, _since(started)))
                yield piece
            answer.failure = None
        except asyncio.CancelledError:
            answer.failure = SILENCE
            raise
        except Exception as exc:
            answer.failure = Failure.of(exc)
            raise

    answer.failure = UNREAD
    return pass_on()


async def _record_body(
    answer: Answer, live: AsyncIterator[bytes], started: float
) -> None:
    """Record a whole body; if it is cut, its end raises the error."""
    try:
        async for piece in live:
            answer.pieces.append((piece, _since(started)))
        answer.failure = None
    except Exception as exc:  # noqa: BLE001 - raised where the body is read
        answer.failure = Failure.of(exc)
    answer.settle()


async def _replay(
    source: Source, answer: Answer, error: Callable[[Failure], Exception]
) -> AsyncGenerator[bytes]:
    """Yield a recorded body, and end as it ended."""
    for piece, wait in answer.waits(real_timing=source.real_timing):
        await asyncio.sleep(wait)
        yield piece
    if answer.failure == SILENCE:
        await asyncio.get_running_loop().create_future()
    _raise_failure(source, answer.failure, error)


# --- aiohttp -------------------------------------------------------------------------


def _aiohttp(source: Source, real: Any) -> Any:
    @functools.wraps(real)
    async def _request(session: Any, *args: Any, **options: Any) -> Any:
        own = options.get("middlewares")
        own = session._middlewares if own is None else own  # noqa: SLF001 - no other way
        decoded = options.get("auto_decompress")
        decoded = session.auto_decompress if decoded is None else decoded
        middleware = functools.partial(_answer_aiohttp, source, decoded)
        return await real(
            session, *args, **{**options, "middlewares": (*own, middleware)}
        )

    return _request


async def _answer_aiohttp(
    source: Source, decoded: bool, request: Any, send: Any
) -> Any:
    """Answer one request of aiohttp, which is one step where it follows redirects."""
    if source.ignores(str(request.url)):
        with open_network():
            return await send(request)
    body = await request.body.as_bytes() if request.body else b""
    headers = {str(name): value for name, value in request.headers.items()}
    asked = Request(request.method, str(request.url), headers, body)
    answer = source.answer(asked)
    if answer is None:
        answer, started = source.keep(asked), _now()
        try:
            with open_network():
                response = await send(request)
        except Exception as exc:
            answer.failure = Failure.of(exc)
            raise
        answer.begin(response.status, response.reason, response.headers.items())
        encoding = response.headers.get("content-encoding")
        if encoding and not decoded:
            answer.unpack = functools.partial(unpack, "httpx", encoding)
        live = response.content.iter_any()
        if answer.is_stream:
            response.content = _aiohttp_body(
                _record_stream(answer, live, started), request
            )
            return response
        try:
            await _record_body(answer, live, started)
        finally:
            response.close()
    return await _aiohttp_response(source, answer, request)


def _aiohttp_body(pieces: AsyncIterator[bytes], request: Any) -> Any:
    from vcr.stubs.aiohttp_stubs import MockStream

    class Body(MockStream):  # type: ignore[misc] # vcrpy has no types
        """Feeds itself one piece whenever its reader has nothing left."""

        def __init__(self) -> None:
            super().__init__(b"")
            self.set_read_chunk_size(2**30)
            self._eof = False
            # So that the request's total timeout holds for the body too.
            self._timer = request._timer  # noqa: SLF001 - aiohttp shows it nowhere

        async def _wait(self, func_name: str) -> None:
            try:
                with self._timer:
                    piece = await anext(pieces, None)
            except Exception as exc:
                self.set_exception(exc)
                raise
            if piece is None:
                self.feed_eof()
            else:
                self.feed_data(piece)

    return Body()


async def _aiohttp_response(source: Source, answer: Answer, request: Any) -> Any:
    """Make a response of aiohttp's own class."""
    import aiohttp
    from multidict import CIMultiDict, CIMultiDictProxy
    from vcr.stubs.aiohttp_stubs import MockClientResponse

    error = functools.partial(_aiohttp_error, request)
    if answer.status is None:
        await anext(_replay(source, answer, error), None)

    class Response(MockClientResponse):  # type: ignore[misc] # vcrpy has no types
        """Reads as the real one does; vcrpy's does not check the type of JSON."""

        json = aiohttp.ClientResponse.json
        text = aiohttp.ClientResponse.text
        read = aiohttp.ClientResponse.read
        release = aiohttp.ClientResponse.release

    headers = CIMultiDict(
        (k, v) for k, values in answer.headers.items() for v in values
    )
    response = Response(request.method, request.url, request.request_info)
    response.version = aiohttp.HttpVersion11
    response._traces = ()  # noqa: SLF001 - vcrpy gives none
    response.status, response.reason = answer.status, answer.reason
    response._headers = CIMultiDictProxy(headers)  # noqa: SLF001 - as aiohttp itself
    response._raw_headers = tuple(  # noqa: SLF001
        (name.encode(), value.encode()) for name, value in headers.items()
    )
    response._raw_cookie_headers = tuple(headers.getall("set-cookie", ()))  # noqa: SLF001
    response.content = _aiohttp_body(_replay(source, answer, error), request)
    return response


def _aiohttp_error(request: Any, failure: Failure) -> Exception:
    """Make the exception of aiohttp that was raised, or one of its kind."""
    import aiohttp

    kinds: dict[str, Any] = {
        "connect": aiohttp.ClientConnectorError,
        "connect timeout": aiohttp.ConnectionTimeoutError,
        "timeout": aiohttp.SocketTimeoutError,
    }
    cls: Any = (
        _class_of(failure, "aiohttp", aiohttp)
        or _class_of(failure, "builtins", builtins)
        or kinds.get(failure.kind, aiohttp.ServerDisconnectedError)
    )
    if issubclass(cls, aiohttp.ClientConnectorError):
        os_error = OSError(failure.errno, failure.message)
        error: Exception = cls(request.connection_key, os_error)
        return error
    return _make_exception(cls, failure)


def _make_exception(cls: type[Exception], failure: Failure) -> Exception:
    """Make an exception with what is known of it, whatever its class asks for."""
    if issubclass(cls, OSError) and failure.errno is not None:
        return cls(failure.errno, failure.message)
    try:
        return cls(failure.message)
    except TypeError:  # its arguments are objects that no file can keep
        return cls.__new__(cls, failure.message)


def _class_of(failure: Failure, package: str, module: Any) -> type[Exception] | None:
    """Return the exception's class if it is one that *module* shows."""
    root, _, name = failure.type.rpartition(".")
    cls = getattr(module, name, None) if root.startswith(package) else None
    return cls if isinstance(cls, type) and issubclass(cls, Exception) else None


# --- httpx and httpx2, at httpcore's and httpcore2's pools ---------------------------


def _async_httpcore(module: Any, source: Source, real: Any) -> Any:
    @functools.wraps(real)
    async def handle_async_request(self: Any, request: Any) -> Any:
        if source.ignores(_uri(request)):
            with open_network():
                return await real(self, request)
        body = b"".join([part async for part in request.stream])
        asked, again = _from_httpcore(module, request, body)
        answer = source.answer(asked)
        error = functools.partial(_httpcore_error, module)
        if answer is None:
            answer, started = source.keep(asked), _now()
            try:
                with open_network():
                    response = await real(self, again)
            except Exception as exc:
                answer.failure = Failure.of(exc)
                raise
            _begin(module, answer, response)
            if answer.is_stream:
                live = _record_stream(answer, aiter(response.stream), started)
                content = _Body(live, response.stream.aclose)
                return module.Response(
                    response.status,
                    headers=response.headers,
                    content=content,
                    extensions=response.extensions,
                )
            try:
                await _record_body(answer, aiter(response.stream), started)
            finally:
                await response.stream.aclose()
        if answer.status is None:
            await anext(_replay(source, answer, error), None)
        return _httpcore_response(module, answer, _Body(_replay(source, answer, error)))

    return handle_async_request


def _httpcore(module: Any, source: Source, real: Any) -> Any:
    @functools.wraps(real)
    def handle_request(self: Any, request: Any) -> Any:
        if source.ignores(_uri(request)):
            with open_network():
                return real(self, request)
        asked, again = _from_httpcore(module, request, b"".join(request.stream))
        answer = source.answer(asked)
        if answer is None:
            answer, started = source.keep(asked), _now()
            try:
                with open_network():
                    response = real(self, again)
            except Exception as exc:
                answer.failure = Failure.of(exc)
                raise
            _begin(module, answer, response)
            try:
                for piece in response.stream:
                    answer.pieces.append((piece, _since(started)))
                answer.failure = None
            except Exception as exc:  # noqa: BLE001 - raised where the body is read
                answer.failure = Failure.of(exc)
            finally:
                response.stream.close()
            answer.settle()

        def pieces() -> Iterator[bytes]:
            for piece, wait in answer.waits(real_timing=source.real_timing):
                time.sleep(wait)
                yield piece
            _raise_failure(
                source, answer.failure, functools.partial(_httpcore_error, module)
            )

        if answer.status is None:
            next(pieces(), None)
        return _httpcore_response(module, answer, pieces())

    return handle_request


class _Body:
    """The asynchronous stream of a response of httpcore."""

    def __init__(self, pieces: Any, close: Any = None) -> None:
        self._pieces, self._close = pieces, close

    def __aiter__(self) -> Any:
        return self._pieces

    async def aclose(self) -> None:
        """Close the connection below, if there is one."""
        await self._pieces.aclose()
        if self._close is not None:
            await self._close()


def _uri(request: Any) -> str:
    return bytes(request.url).decode("ascii")


def _from_httpcore(module: Any, request: Any, body: bytes) -> tuple[Request, Any]:
    """Return what is asked, and a request to send, as its stream has been read."""
    headers = {
        name.decode(): value.decode("latin-1") for name, value in request.headers
    }
    again = module.Request(
        request.method,
        request.url,
        headers=request.headers,
        content=body,
        extensions=request.extensions,
    )
    return Request(request.method.decode(), _uri(request), headers, body), again


def _begin(module: Any, answer: Answer, response: Any) -> None:
    headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in response.headers]
    reason = response.extensions.get("reason_phrase", b"").decode("ascii", "replace")
    answer.begin(response.status, reason, headers)
    encoding = ", ".join(v for k, v in headers if k.lower() == "content-encoding")
    if encoding:
        httpx = module.__name__.replace("core", "x")
        answer.unpack = functools.partial(unpack, httpx, encoding)


def _httpcore_response(module: Any, answer: Answer, content: Any) -> Any:
    return module.Response(
        answer.status,
        headers=[(k, v) for k, values in answer.headers.items() for v in values],
        content=content,
        extensions={"http_version": b"HTTP/1.1"}
        | ({"reason_phrase": answer.reason.encode()} if answer.reason else {}),
    )


def _httpcore_error(module: Any, failure: Failure) -> Exception:
    """Make the exception of httpcore that was raised, or one of its kind."""
    kinds = {
        "connect": module.ConnectError,
        "connect timeout": module.ConnectTimeout,
    }
    silent = failure.kind in {"timeout", "silence"}
    default = module.ReadTimeout if silent else module.RemoteProtocolError
    cls = _class_of(failure, "httpcore", module) or kinds.get(failure.kind, default)
    return cls(failure.message)


def unpack(httpx: str, encoding: str, pieces: list[Piece]) -> list[Piece]:
    """Take the compression off a body that arrived in pieces.

    Args:
        httpx: The name of the module that decodes: httpx, or httpx2.
        encoding: The Content-Encoding header.
        pieces: The body.

    Raises:
        Exception: The module's DecodingError; the body is not what its header says.
    """
    module = importlib.import_module(httpx)
    after = 0

    def packed() -> Iterator[bytes]:
        nonlocal after
        for piece, arrived_after in pieces:
            after = arrived_after
            yield piece

    headers = {"content-encoding": encoding}
    whole = module.Response(200, headers=headers, content=packed())
    return [(piece, after) for piece in whole.iter_bytes()]


# --- http.client, and all that is built on it ----------------------------------------


@contextmanager
def _http_client(source: Source) -> Iterator[None]:
    """Let vcrpy's stubs of http.client, urllib3, requests and boto3 ask the source."""
    from vcr import patch
    from vcr.stubs import VCRConnection

    cassette = _VcrCassette(source)
    wrap = functools.partial(_wrap_vcrpy, cassette)
    with ExitStack() as stack:
        stack.enter_context(
            replaced(
                [
                    (VCRConnection, name, wrap(getattr(VCRConnection, name)))
                    for name in ("connect", "getresponse")
                ]
                + [
                    (VCRConnection, "__init__", _wrap_init(VCRConnection.__init__)),
                    (patch, "force_reset", _reset_if_needed(patch.force_reset)),
                ]
            )
        )
        for patcher in patch.CassettePatcherBuilder(cassette).build():
            stack.enter_context(patcher)
        yield


def _wrap_vcrpy(cassette: "_VcrCassette", real: Any) -> Any:
    """Open the network to a request that vcrpy sends, and keep its failure."""

    @functools.wraps(real)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        try:
            with open_network():
                return real(self, *args, **options)
        except Exception as exc:
            cassette.fail(getattr(self, "_vcr_request", None), exc)
            raise

    return wrapped


# vcrpy puts all real classes back while it sends, and a request of another thread would
# go out beside the cassette meanwhile. Only the constructor of http.client's own
# HTTPSConnection needs that, as it looks its class up by its name.
_needs_reset: ContextVar[bool] = ContextVar("needs_reset", default=False)
_reset_lock = threading.RLock()


def _wrap_init(real: Any) -> Any:
    from vcr.stubs import HTTPSConnection

    @functools.wraps(real)
    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        token = _needs_reset.set(self._baseclass is HTTPSConnection)
        try:
            real(self, *args, **options)
        finally:
            _needs_reset.reset(token)

    return __init__


def _reset_if_needed(real: Any) -> Any:
    @contextmanager
    def force_reset() -> Iterator[None]:
        if _needs_reset.get():
            with _reset_lock, real():
                yield
        else:
            yield

    return force_reset


class _VcrCassette:
    """Stands where vcrpy's stubs expect vcrpy's cassette."""

    # These have stubs here, or none: without one, the network guard speaks up.
    skip_patchers = ("aiohttp", "httpx", "httpx2", "tornado")
    custom_patches = ()
    write_protected = False
    _path = ""

    def __init__(self, source: Source) -> None:
        self._source = source

    def can_play_response_for(self, request: Any) -> bool:
        """Ask the source once for each request, however often the stubs ask."""
        if not hasattr(request, "kept"):
            asked = from_vcrpy(request)
            request.answer = request.kept = None
            if not self._source.ignores(asked.uri):
                request.answer = self._source.answer(asked)
                request.kept = None if request.answer else self._source.keep(asked)
        return request.answer is not None

    def play_response(self, request: Any) -> dict[str, Any]:
        """Return the recorded answer in vcrpy's form."""
        answer: Answer = request.answer
        _raise_failure(self._source, answer.failure, _http_client_error)
        return {
            "status": {"code": answer.status, "message": answer.reason},
            "headers": {name: list(values) for name, values in answer.headers.items()},
            "body": {"string": answer.body},
        }

    def append(self, request: Any, response: dict[str, Any]) -> None:
        """Take what the network answered."""
        answer: Answer | None = request.kept
        if answer is not None:
            status = response["status"]
            headers = response["headers"].items()
            answer.begin(
                status["code"],
                status["message"],
                ((k, v) for k, vs in headers for v in vs),
            )
            answer.pieces = [(response["body"]["string"], 0)]
            answer.failure = None
            answer.unpack = unpack_of_vcrpy(answer)

    def fail(self, request: Any, exc: Exception) -> None:
        """Take the exception that came in place of an answer."""
        answer: Answer | None = getattr(request, "kept", None)
        if answer is not None and answer.failure == SILENCE:
            answer.failure = Failure.of(exc)


def unpack_of_vcrpy(answer: Answer) -> Callable[[list[Piece]], list[Piece]] | None:
    """Return what unpacks an answer that vcrpy took."""
    encoding = header(answer.headers, "content-encoding")

    def unpack_if_packed(pieces: list[Piece]) -> list[Piece]:
        try:
            return unpack("httpx", encoding, pieces)
        except Exception:  # noqa: BLE001 - the client unpacked it and left the header
            return pieces

    return unpack_if_packed if encoding else None


def from_vcrpy(request: Any) -> Request:
    """Read a request of vcrpy's, whatever its body is made of."""
    body, headers = request.body, dict(request.headers)
    if hasattr(body, "read"):
        body = body.read()
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, bytes | bytearray | None):
        # aiohttp's stub keeps what the program gave: JSON, a form, or a list of pairs.
        import json
        from urllib.parse import urlencode

        body = body if isinstance(body, dict) else list(body)
        if isinstance(body, list) and all(isinstance(part, bytes) for part in body):
            body = b"".join(body)
        elif isinstance(body, list) and all(
            isinstance(part, list | tuple) and len(part) == 2 for part in body
        ):
            body = urlencode(body).encode()
            headers.setdefault("content-type", "application/x-www-form-urlencoded")
        else:
            body = json.dumps(body).encode()
    return Request(request.method, request.uri, headers, bytes(body or b""))


def _http_client_error(failure: Failure) -> Exception:
    """Make the exception of `http.client` or urllib3 that was raised, or of its kind."""
    import http.client
    import socket

    import urllib3.exceptions

    for package, module in (
        ("builtins", builtins),
        ("socket", socket),
        ("http", http.client),
        ("urllib3", urllib3.exceptions),
    ):
        cls = _class_of(failure, package, module)
        if cls is not None:
            return _make_exception(cls, failure)
    if failure.kind == "connect":
        return ConnectionRefusedError(failure.errno, failure.message)
    if failure.kind == "disconnect":
        return http.client.RemoteDisconnected(failure.message)
    return TimeoutError(failure.message)
