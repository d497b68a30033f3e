"""The HTTP under every call: one aiohttp session, what it may send, and what it saw.

Knows headers, limits and the network; knows neither LiteLLM nor the meaning of a body.
A fence stands here: a request goes to the client's own base URL or nowhere, carries the
client's own key and no header that was not asked for, is sent once an attempt, and
follows no redirect. So nothing in the environment, and nothing that LiteLLM makes of
it, changes where a call or a key goes. LiteLLM itself never holds a key.
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
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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
    import httpx

PLACEHOLDER = "key-stays-with-dipeo-llm"
"""What LiteLLM is given for a key; the real one is put in place of it on the wire."""

USER_AGENT = "dipeo-llm"

# What may travel beside the key: what the formats need. Everything else that LiteLLM or
# an SDK adds comes from the environment (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS,
# ANTHROPIC_CUSTOM_HEADERS) or is telemetry (x-stainless-*).
ALLOWED_HEADERS = frozenset(
    {
        "accept",
        "content-type",
        "anthropic-version",
        "anthropic-beta",
        "x-amzn-bedrock-accept",
    }
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client goes, and as whom."""

    service: str
    base_url: str | None
    secret: SecretStr
    key_header: str = "authorization"
    allowed_headers: frozenset[str] | None = ALLOWED_HEADERS


class Client:
    """An open HTTP client of one endpoint, on the event loop that made it.

    Args:
        endpoint: Where it goes.
        settings: Limits, proxy, TLS and extra headers.
        tls: What a https endpoint is checked against; see `tls_context`.
        permits: One for each request that may be in flight, first come first served;
            None is no limit. Taken and given back by the adapter.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        tls: ssl.SSLContext | None = None,
        permits: asyncio.Semaphore | None = None,
    ) -> None:
        import aiohttp

        self.endpoint = endpoint
        self._settings = settings
        self._origin = _origin(endpoint.base_url) if endpoint.base_url else None
        self._prefix = f"{endpoint.base_url}/" if endpoint.base_url else None
        # Found once: the look-up walks the whole environment, at 40 µs a time.
        self._proxy = (
            proxy_for(endpoint.base_url, settings) if endpoint.base_url else None
        )
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=settings.max_connections,
                ssl=tls if tls is not None else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Proxies are read here and not by aiohttp, which would read .netrc too.
            trust_env=False,
            headers={"User-Agent": USER_AGENT},
            skip_auto_headers=("Accept",),
        )
        self.permits = permits
        self.sdk: Any = None
        """What LiteLLM takes as `client=`; made by the adapter."""

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        exchange: Attempt,
        *,
        read_timeout: float | None = None,
    ) -> "aiohttp.ClientResponse":
        """Send one request and return its answer, the body still to be read.

        Args:
            method: GET or POST.
            url: Below the endpoint's base URL.
            headers: Those that the format needs; the key is added here.
            body: Bytes to send.
            read_timeout: Longest silence in seconds while reading.
            exchange: What to note it in; None takes the current one.

        Raises:
            LLMServiceError: The fence refused it; nothing was sent.
            aiohttp.ClientError, TimeoutError, OSError: As aiohttp raises them; they are
                kept in the current exchange too.
        """
        import aiohttp
        from yarl import URL

        if exchange.is_abandoned:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        try:
            self._check(url, exchange)
            if exchange is not None:
                if exchange.extra_body:
                    body = to_json(
                        merge(json.loads(body or b"{}"), exchange.extra_body)
                    )
                exchange.requests += 1
                exchange.request_body = body or b""
            response = await self.session.request(
                method,
                URL(url, encoded=True),
                headers=self._headers(headers, body_is_json=body is not None),
                data=body,
                allow_redirects=False,
                proxy=self._proxy
                if self._origin is not None
                else proxy_for(url, self._settings),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self._settings.connect_timeout,
                    sock_read=read_timeout,
                ),
            )
        except asyncio.CancelledError as exc:
            # aiohttp cancels what waits for a connection when the session is closed.
            if task is None or task.cancelling() > cancelled or not self.session.closed:
                raise
            self._note(RuntimeError("the session is closed"), exchange)
            raise AssertionError("noting it raises") from exc  # pragma: no cover
        except Exception as exc:
            self._note(exc, exchange)
            raise
        if exchange is not None:
            exchange.status = response.status
            exchange.headers = response.headers
            exchange.response = response
        return response

    async def read(self, exchange: Attempt) -> None:
        """Read a whole body into the exchange, up to the limit.

        Raises:
            ServiceUnavailableError, aiohttp.ClientError, OSError: As `pieces`.
        """
        async for _ in self.pieces(exchange):
            pass

    async def pieces(
        self,
        exchange: Attempt,
        *,
        keep: bool = True,
    ) -> AsyncGenerator[bytes, None]:
        """Yield a body as it comes.

        Leaving early, by `break`, cancellation or an error, closes the connection.

        Args:
            response: What `send` returned.
            exchange: What to note it in; None takes the current one.
            keep: Whether the exchange keeps the body.

        Raises:
            ServiceUnavailableError: It is longer than the limit.
            aiohttp.ClientError, TimeoutError, OSError: As aiohttp raises them.
        """
        response = exchange.response
        note = exchange.body.extend if keep else None
        limit = self._settings.max_response_bytes
        size = 0
        whole = False
        try:
            async for piece in response.content.iter_any():
                size += len(piece)
                if size > limit:
                    raise ServiceUnavailableError(
                        f"the answer is longer than {limit} bytes", retryable=False
                    )
                if note is not None:
                    note(piece)
                yield piece
            whole = exchange.is_whole = True
        except Exception as exc:
            self._note(exc, exchange)
            raise
        finally:
            if whole:
                response.release()
            else:
                response.close()

    async def aclose(self) -> None:
        """Close the session and every connection; calls in flight fail."""
        await self.session.close()

    def _note(self, exc: Exception, exchange: Attempt) -> None:
        """Keep a failure; one of our own `aclose` is raised as what it is."""
        closed = self.session.closed and not isinstance(exc, LLMServiceError)
        error = _closed_under() if closed else exc
        if exchange is not None:
            exchange.error = exchange.error or error
        if closed:
            raise error from exc

    def _check(self, url: str, exchange: Attempt) -> None:
        # The base URL was checked to hold no user and no odd character, so what begins
        # with it and a slash goes to the same host; anything else is looked at whole.
        known = self._prefix is not None and url.startswith(self._prefix)
        if not known and self._origin is not None and _origin(url) != self._origin:
            raise LLMServiceError(
                f"refused to send to {_origin(url)}: this client's base URL is at"
                f" {self._origin}"
            )
        if exchange is not None and exchange.requests:
            raise LLMServiceError("refused to send a second request in one attempt")

    def _headers(
        self, asked: Mapping[str, str], *, body_is_json: bool
    ) -> dict[str, str]:
        provider = self.endpoint
        secret = self.endpoint.secret.get_secret_value()
        if provider.allowed_headers is None:
            # LiteLLM alone knows how this provider is spoken to, and may have signed.
            headers = {
                k: v.replace(PLACEHOLDER, secret)
                for k, v in asked.items()
                if k.lower() not in _NOT_FORWARDED
            }
        else:
            headers = {
                k: v for k, v in asked.items() if k.lower() in provider.allowed_headers
            }
            # LiteLLM posts some bodies as text, which aiohttp would call binary.
            if body_is_json and "content-type" not in asked:
                headers["content-type"] = "application/json"
            if secret:
                bearer = provider.key_header == "authorization"
                headers[provider.key_header] = f"Bearer {secret}" if bearer else secret
        headers.update(self._settings.extra_headers)
        return headers


def _closed_under() -> ServiceUnavailableError:
    return ServiceUnavailableError(
        "the service was closed while the call was under way", retryable=False
    )


# The first four are the transport's; LiteLLM takes the others from the environment.
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


def merge(body: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return *body* with *extra* in it: objects are merged, anything else replaced."""
    merged = dict(body)
    for name, value in extra.items():
        inside = merged.get(name)
        if isinstance(value, Mapping) and isinstance(inside, Mapping):
            value = merge(inside, value)  # noqa: PLW2901 - it is the same thing, merged
        merged[name] = value
    return merged


def httpx_client(client: Client, attempt: Attempt) -> "httpx.AsyncClient":
    """Wear a client as httpx, which LiteLLM and the OpenAI SDK speak."""
    import httpx

    class Transport(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            timeout = request.extensions.get("timeout", {})
            try:
                response = await client.send(
                    request.method,
                    str(request.url),
                    request.headers,
                    await request.aread(),
                    attempt,
                    read_timeout=timeout.get("read"),
                )
            except Exception as exc:
                # Never ConnectError or RemoteProtocolError: on those LiteLLM sends the
                # request a second time, through a client of its own.
                raise httpx.ReadError(str(exc), request=request) from exc
            # aiohttp has taken off the compression and the framing.
            headers = [
                (k, v)
                for k, v in response.headers.items()
                if k.lower() not in {"content-encoding", "content-length"}
            ]
            return httpx.Response(
                response.status, headers=headers, stream=Body(response)
            )

    class Body(httpx.AsyncByteStream):
        def __init__(self, response: "aiohttp.ClientResponse") -> None:
            self._response = response

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                async for piece in client.pieces(attempt):
                    yield piece
            except Exception as exc:
                raise httpx.ReadError(str(exc)) from exc

        async def aclose(self) -> None:
            self._response.close()

    return httpx.AsyncClient(
        transport=Transport(),
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # noqa: S113 - each request has its own
    )


def from_transport(
    exc: Exception, *, service: str, secret: str, **fields: Any
) -> Exception:
    """Return the error for a failure below HTTP, or at the fence.

    What is no failure of a network is returned as it is.

    Args:
        exc: What failed.
        service: The provider.
        secret: The key: a broken answer's words are in aiohttp's, and may echo it.
        **fields: What else is known, as on every LLMServiceError.
    """
    import aiohttp

    if isinstance(exc, LLMServiceError):
        exc.service = exc.service or service
        exc.model = exc.model or fields.get("model")
        return exc
    fields["service"] = service
    if isinstance(exc, aiohttp.ClientResponseError):
        what = f"{exc.status} {exc.message}"  # not its URL: a proxy's has a password
    elif isinstance(exc, aiohttp.InvalidURL):
        what = "a URL on the way there, such as a proxy's, is none"
    else:
        what = str(exc) or type(exc).__name__
    what = failures.clean(what, secret)
    if isinstance(exc, TimeoutError):
        return LLMTimeoutError(f"{service} fell silent: {what}", **fields)
    if isinstance(exc, aiohttp.ClientSSLError | ssl.SSLError):
        return ServiceUnavailableError(
            f"no trusted connection to {service}: {what}. A private authority's"
            " certificates are named by ca_bundle or SSL_CERT_FILE",
            retryable=False,
            **fields,
        )
    if isinstance(exc, aiohttp.ClientError | OSError | EOFError):
        return ServiceUnavailableError(f"no answer from {service}: {what}", **fields)
    # Not the network's: a test's guard, a bug of ours. It is nobody else's error.
    return exc


def proxy_for(url: str, settings: Settings) -> str | None:
    """Return the proxy for a URL: the setting, else the environment's, never loopback.

    HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are read as the standard library
    reads them, which is what httpx does.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host):
        return None
    proxy = settings.proxy
    if proxy is None and settings.trust_env_proxy:
        proxies = urllib.request.getproxies()
        if proxies and not urllib.request.proxy_bypass(parts.netloc):
            proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is not None and urlsplit(proxy).scheme not in {"http", "https"}:
        raise SettingsError(
            f"a proxy of kind {urlsplit(proxy).scheme!r} cannot be used, only http://"
        )
    return proxy


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def tls_context(
    base_url: str | None, settings: Settings
) -> ssl.SSLContext | None:
    """Return what a https endpoint is checked against, None for a http one.

    The authorities are `ca_bundle`, else SSL_CERT_FILE or SSL_CERT_DIR, else certifi's,
    as for httpx. Loading them takes 20 ms, so a thread does it, once for each bundle.

    Raises:
        SettingsError: The bundle cannot be read.
    """
    if base_url is not None and base_url.startswith("http://"):
        return None
    bundle = str(settings.ca_bundle) if settings.ca_bundle is not None else None
    asked = (bundle, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    return await asyncio.to_thread(_load_tls, *asked)


@lru_cache(maxsize=8)
def _load_tls(
    bundle: str | None, cert_file: str | None, cert_dir: str | None
) -> ssl.SSLContext:
    import certifi

    try:
        # Not ssl.create_default_context, for which SSLKEYLOGFILE names a file to write
        # the secrets of each connection to. This class checks certificate and name.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if bundle or cert_file or not cert_dir:
            context.load_verify_locations(cafile=bundle or cert_file or certifi.where())
        else:
            context.load_verify_locations(capath=cert_dir)
    except (OSError, ssl.SSLError) as exc:
        name = "ca_bundle" if bundle else "SSL_CERT_FILE or SSL_CERT_DIR"
        raise SettingsError(f"{name} cannot be read: {exc}") from None
    return context


def fits_a_header(secret: SecretStr) -> bool:
    """Say whether a key can travel in a header."""
    return re.fullmatch(r"[\x21-\x7e]*", secret.get_secret_value()) is not None


def _origin(url: str) -> str:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{parts.hostname}:{port}"
