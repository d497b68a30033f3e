"""The HTTP client under every call: one aiohttp session with a fence around it.

Knows headers, limits and the network; knows neither LiteLLM nor the meaning of a body.
The fence: a request goes to the client's own base URL, carries the client's own key and
only the headers that the provider's format needs, and follows no redirect. An attempt
sends one request, or two if the first one met a stale connection. So neither the
environment nor LiteLLM can change where a call or a key goes. LiteLLM never holds a key.
"""

import asyncio
import ipaddress
import json
import os
import re
import ssl
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from weakref import WeakSet

from pydantic import SecretStr
from pydantic_core import to_json

from dipeo_llm.adapters import failures
from dipeo_llm.adapters.attempt import Attempt
from dipeo_llm.errors import (
    LLMServiceError,
    LLMTimeoutError,
    ServiceUnavailableError,
    SettingsError,
)
from dipeo_llm.settings import Settings

if TYPE_CHECKING:
    import aiohttp

PLACEHOLDER = "key-stays-with-dipeo-llm"
"""Given to LiteLLM in place of the key; replaced by the real one when a request is sent."""

USER_AGENT = "dipeo-llm"

STANDARD_HEADERS = frozenset({"accept", "content-type"})
"""Headers that every format needs. A provider adds its own, such as a version."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a provider, and how the client identifies itself there."""

    service: str
    """Name of the provider, for error messages."""
    base_url: str | None
    """URL that every request begins with; None if only LiteLLM knows it, and then
    nothing checks the host."""
    secret: SecretStr
    """The key; may be empty."""
    key_header: str = "authorization"
    """Header that carries the key; "authorization" carries it as a Bearer token."""
    allowed_headers: frozenset[str] | None = STANDARD_HEADERS
    """Lower-case names of the headers that may be sent beside the key. Everything else
    that LiteLLM or an SDK adds is dropped: it comes from the environment
    (OPENAI_ORG_ID, ANTHROPIC_CUSTOM_HEADERS) or is telemetry (x-stainless-*). None if
    only LiteLLM knows the provider's headers: all are forwarded, apart from a few, and
    `PLACEHOLDER` in them is replaced by the key."""


def fits_a_header(secret: SecretStr) -> bool:
    """Tell whether a key has only characters that a header can carry."""
    return re.fullmatch(r"[\x21-\x7e]*", secret.get_secret_value()) is not None


class Client:
    """An open HTTP client of one endpoint, on the event loop that made it.

    Args:
        endpoint: Where requests go.
        settings: Limits, proxy and extra headers.
        tls: What the certificate is checked against; see `tls_context`.
        permits: Limits the requests in flight, in the order of their arrival; None is
            no limit. The adapter acquires and releases them.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        tls: ssl.SSLContext | None = None,
        permits: asyncio.Semaphore | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.permits = permits
        self._settings = settings
        url = endpoint.base_url
        self._origin = _origin(url) if url else None
        self._prefix = f"{url}/" if url else None
        # Looked up once: it reads the whole environment, which takes 40 µs.
        self._proxy = proxy_for(url, settings) if url else None
        self.session = open_session(tls, limit=settings.max_connections)
        self._responses: WeakSet[Any] = WeakSet()

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        attempt: Attempt,
        *,
        read_timeout: float | None = None,
    ) -> None:
        """Send a request and wait for the headers of its answer.

        The status, the headers and the open response are in *attempt* afterwards; the
        body is still to be read.

        A server may close an idle connection just as it is used again. A request that
        fails on a reused connection, before a byte of an answer, is sent once more at
        once, on a new connection; see RFC 9112, section 9.3.1
        (https://www.rfc-editor.org/rfc/rfc9112#section-9.3.1, read 2026-11-25).

        Args:
            method: GET or POST.
            url: Below the endpoint's base URL.
            headers: Those that the format needs; the key is added here.
            body: Bytes to send.
            attempt: Where to record what happens.
            read_timeout: Longest silence in seconds while reading.

        Raises:
            LLMServiceError: The fence refused the request; nothing was sent.
            aiohttp.ClientError, TimeoutError, OSError: As aiohttp raises them. They are
                in *attempt* too.

        Cancelling it closes the connection.
        """
        if attempt.is_abandoned:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        cancelling = task.cancelling() if task is not None else 0
        try:
            self._check(url, attempt)
            if attempt.extra_body:
                body = to_json(merge(json.loads(body or b"{}"), attempt.extra_body))
            attempt.request_body = body or b""
            response = await self._request(
                method, url, headers, body, attempt, read_timeout
            )
        except asyncio.CancelledError as exc:
            # If the session is closed, aiohttp cancels tasks that wait for a connection.
            is_ours = task is not None and task.cancelling() > cancelling
            if is_ours or not self.session.closed:
                raise
            attempt.error = attempt.error or _session_closed()
            raise attempt.error from exc
        except Exception as exc:
            self._record(exc, attempt)
            raise
        attempt.status = response.status
        attempt.headers = response.headers
        attempt.response = response
        self._responses.add(response)

    async def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        attempt: Attempt,
        read_timeout: float | None,
    ) -> "aiohttp.ClientResponse":
        """Send a request, and a second time if the connection was stale."""
        import aiohttp
        from yarl import URL

        target = URL(url, encoded=True)
        proxy = self._proxy if self._origin else proxy_for(url, self._settings)
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=self._settings.connect_timeout,
            sock_read=read_timeout,
        )

        async def deliver(delivery: _Delivery) -> aiohttp.ClientResponse:
            attempt.requests += 1
            try:
                return await self.session.request(
                    method,
                    target,
                    # Not in a variable: tracebacks may show those, and this has the key.
                    headers=self._headers(headers, body),
                    data=body,
                    allow_redirects=False,
                    proxy=proxy,
                    timeout=timeout,
                    middlewares=(delivery.follow,),
                )
            finally:
                delivery.error = None  # a reference cycle through its traceback

        first = _Delivery(self.session)
        try:
            return await deliver(first)
        except (aiohttp.ClientConnectionError, OSError) as exc:
            is_over = isinstance(exc, TimeoutError) or self.session.closed
            if is_over or not first.was_stale:
                raise
        return await deliver(_Delivery(self.session, on_new_connection=True))

    async def read(self, attempt: Attempt) -> None:
        """Read the whole body of an attempt's answer into `attempt.body`.

        Raises:
            ServiceUnavailableError, aiohttp.ClientError, OSError: As `pieces`.
        """
        async for _ in self.pieces(attempt):
            pass

    async def pieces(
        self, attempt: Attempt, *, keep: bool = True
    ) -> AsyncGenerator[bytes, None]:
        """Yield the body of an attempt's answer as it arrives.

        Leaving early, by `break`, cancellation or an error, closes the connection.

        Args:
            attempt: What `send` has filled in.
            keep: Whether `attempt.body` collects the body.

        Raises:
            ServiceUnavailableError: The body is longer than the limit.
            aiohttp.ClientError, TimeoutError, OSError: As aiohttp raises them.
        """
        response = attempt.response
        limit = self._settings.max_response_bytes
        size = 0
        try:
            async for piece in response.content.iter_any():
                size += len(piece)
                if size > limit:
                    raise ServiceUnavailableError(
                        f"the answer is longer than {limit} bytes", retryable=False
                    )
                if keep:
                    attempt.body += piece
                yield piece
            attempt.is_whole = True
        except Exception as exc:
            self._record(exc, attempt)
            raise
        finally:
            if attempt.is_whole:
                response.release()
            else:
                response.close()

    async def aclose(self) -> None:
        """Close the session and every connection; calls in flight fail."""
        # The session closes their connections without waking the tasks that read.
        for response in list(self._responses):
            response.close()
        await self.session.close()

    def _record(self, exc: Exception, attempt: Attempt) -> None:
        """Keep a failure in the attempt; if `aclose` caused it, raise an error instead."""
        is_closed = self.session.closed and not isinstance(exc, LLMServiceError)
        error = _session_closed() if is_closed else exc
        attempt.error = attempt.error or error
        if is_closed:
            raise error from exc

    def _check(self, url: str, attempt: Attempt) -> None:
        # The base URL has no user name and no odd character, so a URL that begins with
        # it and a slash goes to the same host. Any other URL is parsed and compared.
        is_below = self._prefix is not None and url.startswith(self._prefix)
        if not is_below and self._origin is not None and _origin(url) != self._origin:
            raise LLMServiceError(
                f"refused to send to {_origin(url)}: this client's base URL is at"
                f" {self._origin}"
            )
        if attempt.requests:
            raise LLMServiceError("refused to send a second request in one attempt")

    def _headers(self, given: Mapping[str, str], body: bytes | None) -> dict[str, str]:
        endpoint = self.endpoint
        allowed = endpoint.allowed_headers
        secret = endpoint.secret.get_secret_value()
        if allowed is None:
            # LiteLLM may have signed the request.
            headers = {
                k: v.replace(PLACEHOLDER, secret)
                for k, v in given.items()
                if k.lower() not in _NOT_FORWARDED
            }
        else:
            headers = {k: v for k, v in given.items() if k.lower() in allowed}
            # LiteLLM posts some bodies as text, which aiohttp would call binary.
            if body is not None and "content-type" not in given:
                headers["content-type"] = "application/json"
            if secret:
                is_bearer = endpoint.key_header == "authorization"
                headers[endpoint.key_header] = (
                    f"Bearer {secret}" if is_bearer else secret
                )
        headers.update(self._settings.extra_headers)
        return headers


# The transport sets the first four; LiteLLM reads the others from the environment.
_NOT_FORWARDED = frozenset(
    {
        "host",
        "content-length",
        "connection",
        "user-agent",
        "http-referer",
        "x-title",
        "request-source",
    }
)


def _session_closed() -> ServiceUnavailableError:
    return ServiceUnavailableError(
        "the service was closed while the call was under way", retryable=False
    )


def merge(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return *body* with *extra* in it: objects are merged, anything else is replaced."""
    merged = dict(body)
    for name, value in extra.items():
        inside = merged.get(name)
        if isinstance(value, Mapping) and isinstance(inside, Mapping):
            value = merge(inside, value)  # noqa: PLW2901 - the same value, merged
        merged[name] = value
    return merged


# --- the session ---------------------------------------------------------------------


def open_session(
    tls: ssl.SSLContext | None,
    *,
    headers: Mapping[str, str] | None = None,
    **connector: Any,
) -> "aiohttp.ClientSession":
    """Open an aiohttp session that keeps no cookies and reads no environment.

    Args:
        tls: What certificates are checked against; None takes aiohttp's default.
        headers: Sent with every request, beside the user agent.
        **connector: Options of aiohttp's TCPConnector.
    """
    import aiohttp

    return aiohttp.ClientSession(
        connector=_connector_class()(ssl=True if tls is None else tls, **connector),
        cookie_jar=aiohttp.DummyCookieJar(),
        # aiohttp would read .netrc too; `proxy_for` reads the proxies.
        trust_env=False,
        headers={"User-Agent": USER_AGENT, **(headers or {})},
        skip_auto_headers=("Accept",),
    )


class _Delivery:
    """One request of a session, and what happened to the connection that carried it."""

    def __init__(
        self, session: "aiohttp.ClientSession", *, on_new_connection: bool = False
    ) -> None:
        self._connector: Any = session.connector
        self.on_new_connection = on_new_connection
        """Whether a connection of the pool may not be used."""
        self.watch: _Watch | None = None
        """The connection; None until there is one."""
        self.is_reused = False
        """Whether the connection has carried a request before."""
        self.error: Exception | None = None

    @property
    def was_stale(self) -> bool:
        """Whether a reused connection failed before it brought a byte of an answer."""
        return self.is_reused and not (self.watch is None or self.watch.has_received)

    async def follow(self, request: Any, handler: Any) -> Any:
        """Let the session's connector know this delivery; a middleware of aiohttp."""
        if self.error is not None:
            # aiohttp sends a failed GET a second time, even after a new connection
            # failed. That is decided in `Client`, as for a POST.
            raise self.error
        self._connector.deliveries[request] = self
        try:
            return await handler(request)
        except Exception as exc:
            self.error = exc
            raise


class _Watch(asyncio.Protocol):
    """Passes everything from a connection's transport on, and notes whether bytes came.

    aiohttp raises the same exceptions before and after the first byte of an answer.
    """

    def __init__(self, inner: Any) -> None:
        self.has_received = False
        """Whether bytes have arrived since the connection was taken from the pool."""
        self._inner = inner

    def data_received(self, data: bytes) -> None:
        self.has_received = True
        self._inner.data_received(data)

    def eof_received(self) -> None:
        self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


@cache
def _connector_class() -> Any:
    import aiohttp

    class Connector(aiohttp.TCPConnector):
        """Tells each delivery which connection it got, and whether that was used before."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.deliveries: dict[aiohttp.ClientRequest, _Delivery] = {}

        async def connect(self, req: Any, *args: Any, **options: Any) -> Any:
            delivery = self.deliveries.pop(req, None)
            while True:
                connection: Any = await super().connect(req, *args, **options)
                transport = connection.transport
                if delivery is None or transport is None:
                    return connection
                watch = transport.get_protocol()
                if not isinstance(watch, _Watch):
                    delivery.watch = _Watch(watch)
                    transport.set_protocol(delivery.watch)
                    return connection
                # A server may have written into an idle connection, say a 408. aiohttp
                # would take that for the answer to the next request.
                if not (delivery.on_new_connection or connection.protocol.should_close):
                    watch.has_received = False
                    delivery.watch, delivery.is_reused = watch, True
                    return connection
                connection.close()

    return Connector


# --- httpx ---------------------------------------------------------------------------


def httpx_client(
    client: Client, attempt: Attempt, library: Literal["httpx", "httpx2"] = "httpx"
) -> Any:
    """Return an `AsyncClient` that sends the one request of an attempt through *client*.

    LiteLLM speaks httpx; the OpenAI SDK speaks httpx, and httpx2 from version 3 on. The
    client takes about 15 µs to make, holds nothing open and need not be closed.

    Args:
        client: What sends the request, inside its fence.
        attempt: Where to record what happens.
        library: Whose `AsyncClient` to return.
    """
    httpx: Any = import_module(library)
    return httpx.AsyncClient(
        transport=_transport_class(library)(client, attempt),
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # each request has its own
    )


@cache
def _transport_class(library: str) -> Any:
    httpx: Any = import_module(library)

    def as_httpx(exc: Exception) -> Exception:
        # Never ConnectError or RemoteProtocolError: after those LiteLLM sends the
        # request a second time, through a client of its own.
        timed_out = isinstance(exc, TimeoutError)
        error: Exception = (httpx.ReadTimeout if timed_out else httpx.ReadError)(
            str(exc)
        )
        return error

    class Transport(httpx.AsyncBaseTransport):  # type: ignore[misc] # either library's
        def __init__(self, client: Client, attempt: Attempt) -> None:
            self._client = client
            self._attempt = attempt

        async def handle_async_request(self, request: Any) -> Any:
            attempt = self._attempt
            try:
                await self._client.send(
                    request.method,
                    str(request.url),
                    request.headers,
                    await request.aread(),
                    attempt,
                    read_timeout=request.extensions.get("timeout", {}).get("read"),
                )
            except Exception as exc:
                raise as_httpx(exc) from exc
            # aiohttp has removed the compression and the framing.
            headers = [
                (k, v)
                for k, v in attempt.headers.items()
                if k.lower() not in {"content-encoding", "content-length"}
            ]
            body = Body(self._client, attempt)
            return httpx.Response(attempt.status, headers=headers, stream=body)

    class Body(httpx.AsyncByteStream):  # type: ignore[misc] # either library's
        def __init__(self, client: Client, attempt: Attempt) -> None:
            self._client = client
            self._attempt = attempt

        async def __aiter__(self) -> AsyncIterator[bytes]:
            keep = self._attempt.is_kept or self._attempt.status != 200
            try:
                async for piece in self._client.pieces(self._attempt, keep=keep):
                    yield piece
            except Exception as exc:
                raise as_httpx(exc) from exc

        async def aclose(self) -> None:
            self._attempt.response.close()

    return Transport


# --- failures, proxies, TLS ----------------------------------------------------------


def from_transport(
    exc: Exception, *, service: str, secret: str, **fields: Any
) -> Exception:
    """Return the package's error for a failure of the network or a refusal of the fence.

    Any other exception, such as a bug or a test's network guard, is returned unchanged.

    Args:
        exc: The failure.
        service: The provider.
        secret: The key. A server may echo it in a malformed answer, which aiohttp
            quotes in its exceptions.
        **fields: Other fields of LLMServiceError.
    """
    import aiohttp

    if isinstance(exc, LLMServiceError):
        exc.service = exc.service or service
        exc.model = exc.model or fields.get("model")
        return exc
    fields["service"] = service
    if isinstance(exc, aiohttp.ClientResponseError):
        text = f"{exc.status} {exc.message}"  # not its URL: a proxy's has a password
    elif isinstance(exc, aiohttp.InvalidURL):
        text = "a URL on the way, such as the proxy's, is invalid"
    elif isinstance(exc, aiohttp.ServerDisconnectedError):
        text = "the server closed the connection"  # its text may be a parsed head
    else:
        text = str(exc) or type(exc).__name__
    text = failures.clean(text, secret)
    if isinstance(exc, TimeoutError):
        return LLMTimeoutError(f"{service} fell silent: {text}", **fields)
    if isinstance(exc, aiohttp.ClientSSLError | ssl.SSLError):
        return ServiceUnavailableError(
            f"no trusted connection to {service}: {text}. If a private authority signed"
            " the certificate, set ca_bundle or SSL_CERT_FILE",
            retryable=False,
            **fields,
        )
    if isinstance(exc, aiohttp.ClientError | OSError | EOFError):
        return ServiceUnavailableError(f"no answer from {service}: {text}", **fields)
    return exc


def proxy_for(url: str, settings: Settings) -> str | None:
    """Return the proxy for a URL: the setting, else the environment's, never for loopback.

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are read as the standard library
    reads them, and so does httpx.

    Raises:
        SettingsError: The proxy is not an http:// or https:// URL.
    """
    parts = urlsplit(url)
    if is_loopback(parts.hostname or ""):
        return None
    proxy = settings.proxy
    if proxy is None and settings.trust_env_proxy:
        proxies = urllib.request.getproxies()
        if proxies and not urllib.request.proxy_bypass(parts.netloc):
            proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is not None and urlsplit(proxy).scheme not in {"http", "https"}:
        raise SettingsError(
            f"a proxy of kind {urlsplit(proxy).scheme!r} is not supported; use an"
            " http:// proxy"
        )
    return proxy


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def tls_context(url: str | None, settings: Settings) -> ssl.SSLContext | None:
    """Return the context that checks the certificates of a URL; None for http://.

    The authorities are those of `ca_bundle`, else of SSL_CERT_FILE or SSL_CERT_DIR, else
    certifi's, as for httpx. Loading them takes 20 ms, so it happens in a thread, once
    for each bundle.

    Raises:
        SettingsError: The bundle cannot be read.
    """
    if url is not None and url.startswith("http://"):
        return None
    bundle = str(settings.ca_bundle) if settings.ca_bundle is not None else None
    files = (bundle, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    return await asyncio.to_thread(_load_tls, *files)


@lru_cache(maxsize=8)
def _load_tls(
    bundle: str | None, cert_file: str | None, cert_dir: str | None
) -> ssl.SSLContext:
    import certifi

    try:
        # ssl.create_default_context would honour SSLKEYLOGFILE, which writes the secrets
        # of each connection to a file. This class checks certificate and host name too.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if bundle or cert_file or not cert_dir:
            context.load_verify_locations(cafile=bundle or cert_file or certifi.where())
        else:
            context.load_verify_locations(capath=cert_dir)
    except (OSError, ssl.SSLError) as exc:
        name = "ca_bundle" if bundle else "SSL_CERT_FILE or SSL_CERT_DIR"
        raise SettingsError(f"{name} cannot be read: {exc}") from None
    return context


def _origin(url: str) -> str:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{parts.hostname}:{port}"
