"""Fetches a file by its https URL without reaching the private network (SSRF).

Knows URLs, addresses, redirects and limits; knows neither messages nor providers. A
fetch carries no key, no cookie and no header of the application.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dipeo_llm.adapters.failures import clean
from dipeo_llm.client import open_session, proxy_for, tls_context
from dipeo_llm.settings import Settings

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

MAX_REDIRECTS = 3
FETCH_TIMEOUT = 30.0
"""Seconds for one URL, redirects included."""


class FetchError(Exception):
    """A URL cannot be fetched; the text says why, and names its host only."""

    def __init__(self, host: str, why: str) -> None:
        # Not the path or the query, which may hold a secret.
        at = f" at {clean(host)}" if host else ""
        super().__init__(f"the URL{at} cannot be used: {why}")


@dataclass(frozen=True, slots=True)
class Download:
    """A file that was fetched."""

    data: bytes = field(repr=False)
    media_type: str
    """As the server names it, in lower case and without parameters."""
    host: str
    """The server that sent the file, after redirects."""


async def fetch(
    url: str,
    settings: Settings,
    *,
    accept: str,
    is_accepted: Callable[[str], bool],
    max_bytes: int,
) -> Download:
    """Fetch a file. Every redirect is checked as the URL itself is.

    The address is checked after the look-up whose result is connected to, so a name
    cannot change its address in between. A proxy looks the name up again; there the
    check holds only if both look-ups agree.

    Args:
        url: An https URL; with `allow_private_urls` http too.
        settings: Proxy, TLS, and whether private addresses are allowed.
        accept: The Accept header.
        is_accepted: Tells by its media type whether the body is worth reading.
        max_bytes: Largest body.

    Raises:
        FetchError: The URL may not be fetched, cannot be, or is not such a file.

    Cancelling it closes the connection.
    """
    import aiohttp

    allow_private = settings.allow_private_urls
    target = check_url(url, allow_private=allow_private)
    host = target.raw_host or ""
    resolver = _resolver(allow_private=allow_private)
    session = open_session(
        await tls_context(None, settings),
        headers={"Accept": accept, "Accept-Encoding": "identity"},
        resolver=resolver,
        use_dns_cache=False,
        force_close=True,
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout)
    try:
        async with asyncio.timeout(FETCH_TIMEOUT), session:
            for _ in range(MAX_REDIRECTS + 1):
                proxy = proxy_for(str(target), settings)
                if proxy is not None:
                    await resolver.check(target)
                resolver.proxy = urlsplit(proxy).hostname if proxy else None
                async with session.get(
                    target,
                    allow_redirects=False,
                    proxy=proxy,
                    timeout=timeout,
                    auto_decompress=False,
                ) as response:
                    if response.status not in _REDIRECTS:
                        media_type = _check_headers(response, host, is_accepted)
                        data = await _read(response, host, max_bytes)
                        return Download(data, media_type, host)
                    target = _next_target(response, host, allow_private=allow_private)
                    host = target.raw_host or ""
            raise FetchError(host, f"there are more than {MAX_REDIRECTS} redirects")
    except TimeoutError:
        why = f"it was not read within {FETCH_TIMEOUT:g} s"
    except aiohttp.ClientConnectorDNSError:
        why = "its name cannot be resolved"
    except aiohttp.ClientSSLError:
        why = "there is no trusted connection to it"
    except (aiohttp.ClientError, OSError, EOFError) as exc:
        # The class only: the text of some holds the whole URL.
        why = f"the connection failed ({type(exc).__name__})"
    raise FetchError(host, why)


_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def _next_target(
    response: "aiohttp.ClientResponse", host: str, *, allow_private: bool
) -> "URL":
    from yarl import URL

    try:
        location = response.url.join(URL(response.headers.get("location", "")))
        return check_url(str(location), allow_private=allow_private)
    except ValueError:
        raise FetchError(host, "it redirects to an invalid URL") from None
    except FetchError as why:
        raise FetchError(host, f"it redirects: {why}") from None


def _check_headers(
    response: "aiohttp.ClientResponse", host: str, is_accepted: Callable[[str], bool]
) -> str:
    """Return the media type of an answer that is worth reading."""
    if response.status != 200:
        raise FetchError(host, f"it answered {response.status}")
    content_type = response.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if not is_accepted(media_type):
        raise FetchError(host, f"it answered {clean(media_type) or 'no media type'}")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise FetchError(host, "it answered with a compressed body")
    return media_type


async def _read(response: "aiohttp.ClientResponse", host: str, max_bytes: int) -> bytes:
    too_large = f"it is larger than {max_bytes} bytes"
    if (response.content_length or 0) > max_bytes:
        raise FetchError(host, too_large)
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > max_bytes:
            raise FetchError(host, too_large)
    return bytes(body)


# --- addresses -----------------------------------------------------------------------

# IPv4 networks, and networks of 2000::/3 in IPv6, that are not public, by the registries
# https://www.iana.org/assignments/iana-ipv4-special-registry and
# https://www.iana.org/assignments/iana-ipv6-special-registry (read 2026-11-23). Written
# out, because `ipaddress.is_global` differs between releases of Python.
_PRIVATE_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's machine agent, on a public address
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # Teredo and others that stand for another address
            "2001:db8::/32",
            "2002::/16",  # 6to4
            "3fff::/20",
        ),
    )
)
# The last 32 bits are an IPv4 address: mapped, and NAT64.
_HOLDS_4 = (
    ipaddress.IPv6Network("::ffff:0:0/96"),
    ipaddress.IPv6Network("64:ff9b::/96"),
)


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in _HOLDS_4):
            return ip in _GLOBAL_6 and not any(ip in network for network in _PRIVATE_6)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _PRIVATE_4)


# A name of the public DNS has two labels or more. The last does not begin with a digit,
# as it does in every old spelling of an IPv4 address (`0x7f.1`, `2130706433`).
_NAME = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z][a-z0-9-]*")
# RFC 6761, 6762, 8375 and ICANN's resolution 2024.07.29.06.
_LOCAL = (".localhost", ".local", ".internal", ".home.arpa")

_NOT_PUBLIC = "it is not on the public internet"


def check_url(url: str, *, allow_private: bool = False) -> "URL":
    """Parse a URL and check its text; names are checked again when they are resolved.

    Args:
        url: The URL.
        allow_private: Allows http, this machine and private networks.

    Raises:
        FetchError: The URL may not be fetched.
    """
    from yarl import URL

    try:
        parsed = URL(url)
    except ValueError:
        raise FetchError("", "it is invalid") from None
    host = (parsed.raw_host or "").lower()
    if parsed.scheme not in ({"https", "http"} if allow_private else {"https"}):
        raise FetchError(host, "only https: URLs are fetched")
    if not host:
        raise FetchError(host, "it has no host")
    if "@" in parsed.raw_authority:
        raise FetchError(host, "it carries a user name or password")
    if allow_private:
        return parsed
    name = host.removesuffix(".")
    try:
        public = is_public(name) and "%" not in name
    except ValueError:
        public = bool(_NAME.fullmatch(name)) and not name.endswith(_LOCAL)
    if not public:
        raise FetchError(host, _NOT_PUBLIC)
    return parsed


def _resolver(*, allow_private: bool) -> Any:
    """Make a resolver that refuses names with an address off the public internet."""
    import aiohttp

    class PublicResolver(aiohttp.ThreadedResolver):
        proxy: str | None = None
        """The proxy's own name, which may have any address."""

        async def resolve(
            self,
            host: str,
            port: int = 0,
            family: socket.AddressFamily = socket.AF_UNSPEC,
        ) -> Any:
            found = await super().resolve(host, port, family)
            if (
                not allow_private
                and host != self.proxy
                and not all(is_public(entry["host"]) for entry in found)
            ):
                raise FetchError(host, _NOT_PUBLIC)
            return found

        async def check(self, target: "URL") -> None:
            """Check a name that a proxy will resolve, if it can be resolved here."""
            self.proxy = None
            try:
                await self.resolve(target.raw_host or "", target.port or 443)
            except OSError:
                return  # only the proxy knows the name

    return PublicResolver()
