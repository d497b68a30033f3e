"""What the environment and the application may decide, read once and checked at start.

Nothing else in the environment has a say in where a call or a key goes: besides this
module, `keys` reads the keys, `system_prompt_handler` DIPEO_BASE_DIR, and `wire` the
standard proxy and certificate variables.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args
from urllib.parse import urlsplit

from dipeo_llm.errors import SettingsError

_T = TypeVar("_T")

Engine = Literal["auto", "direct", "litellm"]

_OLLAMA_PORT = 11434


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How calls are made. Times are seconds, sizes bytes."""

    base_dir: Path | None = None
    """Where prompt files are found; None is DIPEO_BASE_DIR, else the working directory."""
    timeout: float = 300.0
    """Seconds for one attempt, from sending to the whole answer."""
    connect_timeout: float = 10.0
    """Seconds for a connection to open, TLS included."""
    max_retries: int = 3
    """Attempts after the first; 0 is one attempt."""
    engine: Engine = "auto"
    """Who makes a call: this package with LiteLLM's translation ("direct"), or
    `litellm.acompletion`; "auto" is direct wherever the installed LiteLLM allows it."""
    idle_timeout: float | None = None
    """Seconds to wait for a stream's next chunk; None takes `timeout`."""
    retry_wait: float = 0.5
    """Seconds before the first retry; doubled each time, with jitter."""
    retry_wait_max: float = 30.0
    """Longest wait in seconds that backoff grows to."""
    retry_after_max: float = 60.0
    """Longest `Retry-After` in seconds that is waited for; a longer one fails at once."""
    base_urls: Mapping[str, str] = field(default_factory=dict)
    """Provider name to base URL, where it is not the provider's own."""
    proxy: str | None = field(default=None, repr=False)
    """http:// URL of a proxy for every call but loopback; wins over the environment."""
    trust_env_proxy: bool = True
    """Whether HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are honoured."""
    ca_bundle: Path | None = None
    """PEM file of trusted authorities; None asks SSL_CERT_FILE, then certifi's."""
    extra_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every request, to every provider."""
    max_connections: int = 1000
    """Open connections of one client."""
    max_concurrency: int | None = None
    """Requests in flight of one client; the others queue, first come first served."""
    max_clients: int = 64
    """Open clients, one per loop, provider, base URL and key; the oldest idle one goes."""
    allow_private_urls: bool = False
    """Whether a picture or file in a message may be fetched from a private address."""
    client_ttl: float = 3600.0
    """Seconds that a client is reused; then it closes when its last call has ended."""
    close_grace: float = 5.0
    """Seconds that `aclose` leaves to calls in flight."""
    max_response_bytes: int = 64 * 1024 * 1024
    """Largest answer that is read, after decompression."""

    def __post_init__(self) -> None:
        """Refuse what no call could be made with.

        Raises:
            SettingsError: The message names the field.
        """
        for names, least, kinds in _NUMBERS:
            for name in names:
                value = getattr(self, name)
                if value is None and name in _MAY_BE_NONE:
                    continue
                if type(value) not in kinds or not least <= value < math.inf:
                    raise SettingsError(
                        f"{name}={value!r} must be {kinds[-1].__name__}, {least} or more"
                    )
        for provider, url in self.base_urls.items():
            try:
                http_url(url)
            except ValueError as exc:
                # Not shown: it may hold a password.
                raise SettingsError(
                    f"base_urls[{str(provider)!r}] cannot be used: {exc}"
                ) from None
        if self.engine not in get_args(Engine):
            raise SettingsError(
                f"engine={self.engine!r} must be one of {', '.join(get_args(Engine))}"
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read the settings from the environment.

        DIPEO_BASE_DIR, DIPEO_LLM_TIMEOUT (s), DIPEO_LLM_MAX_RETRIES, DIPEO_LLM_ENGINE,
        and for the base URLs DIPEO_LLM_OPENAI_BASE_URL, DIPEO_LLM_ANTHROPIC_BASE_URL,
        DIPEO_LLM_GOOGLE_BASE_URL, DIPEO_LLM_OLLAMA_BASE_URL or OLLAMA_HOST.

        Args:
            environ: In place of `os.environ`.

        Raises:
            SettingsError: A value cannot be read; the message names the variable.
        """
        env = os.environ if environ is None else environ
        urls = {
            provider: url
            for provider in ("openai", "anthropic", "google", "ollama")
            if (url := _read(env, f"DIPEO_LLM_{provider.upper()}_BASE_URL", http_url))
        }
        if "ollama" not in urls and (host := _read(env, "OLLAMA_HOST", _ollama_url)):
            urls["ollama"] = host
        timeout = _read(env, "DIPEO_LLM_TIMEOUT", _seconds)
        retries = _read(env, "DIPEO_LLM_MAX_RETRIES", _count)
        engine = _read(env, "DIPEO_LLM_ENGINE", _engine)
        return cls(
            base_dir=_read(env, "DIPEO_BASE_DIR", _folder),
            timeout=_DEFAULTS.timeout if timeout is None else timeout,
            max_retries=_DEFAULTS.max_retries if retries is None else retries,
            engine=engine or _DEFAULTS.engine,
            base_urls=urls,
        )


_MAY_BE_NONE = frozenset({"idle_timeout", "max_concurrency"})
_NUMBERS: tuple[tuple[tuple[str, ...], float, tuple[type, ...]], ...] = (
    (
        ("timeout", "connect_timeout", "idle_timeout", "client_ttl"),
        0.001,
        (int, float),
    ),
    (
        ("retry_wait", "retry_wait_max", "retry_after_max", "close_grace"),
        0,
        (int, float),
    ),
    (("max_retries",), 0, (int,)),
    (
        ("max_connections", "max_concurrency", "max_clients", "max_response_bytes"),
        1,
        (int,),
    ),
)
"""Fields, the least they may be, and of which types."""

# Slotted dataclasses keep no class attribute for a default, so the two that from_env
# falls back on are read off an instance.
_DEFAULTS = Settings()


def _read(env: Mapping[str, str], name: str, convert: Callable[[str], _T]) -> _T | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    try:
        return convert(text)
    except ValueError as exc:
        # A URL may hold a password; everything else is shown.
        if "@" in text:
            raise SettingsError(
                f"{name} cannot be read: it must not carry a user name or password"
            ) from None
        raise SettingsError(f"{name}={text!r} cannot be read: {exc}") from None


def _seconds(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError("it must be a number of seconds above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("it must be 0 or more")
    return value


def _engine(text: str) -> Engine:
    if text.lower() not in get_args(Engine):
        raise ValueError(f"it must be one of {', '.join(get_args(Engine))}")
    return cast("Engine", text.lower())


def _folder(text: str) -> Path:
    # It need not exist yet: a prompt file that is missing has a fallback of its own.
    return Path(text).expanduser()


def http_url(text: str) -> str:
    """Check a base URL and take the slash off its end.

    Raises:
        ValueError: It is not an http or https URL with a host, or it carries a user, a
            password, a query or a fragment.
    """
    # urlsplit drops newlines and tabs without a word.
    if any(c.isspace() or not c.isprintable() for c in text.strip()):
        raise ValueError("a URL has no white space")
    parts = urlsplit(text.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("it must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError("a URL must not carry a user name or password")
    if parts.query or parts.fragment:
        raise ValueError("a base URL has no query and no fragment")
    _ = parts.port  # raises ValueError for one that is out of range
    return text.strip().rstrip("/")


def _ollama_url(text: str) -> str:
    """Read OLLAMA_HOST as Ollama's own tools do: host, host:port, :port or a URL.

    Source: https://github.com/ollama/ollama-python/blob/main/ollama/_client.py
    (`_parse_host`, read 2026-11-23): 11434 without a scheme, else 80 or 443. An address
    to listen on, such as 0.0.0.0, is turned into one to call.
    """
    if any(c.isspace() for c in text):
        raise ValueError("a host has no white space")
    if "@" in text:
        raise ValueError("a host must not carry a user name or password")
    url = text if "://" in text else f"http://{text}"
    if "://" not in text and text.count(":") > 1 and not text.startswith("["):
        url = f"http://[{text}]"
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    port = parts.port
    if port is None:
        port = (
            _OLLAMA_PORT
            if "://" not in text
            else 443
            if parts.scheme == "https"
            else 80
        )
    host = f"[{host}]" if ":" in host else host
    return http_url(f"{parts.scheme}://{host}:{port}{parts.path}")
