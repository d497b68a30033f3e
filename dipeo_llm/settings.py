"""Settings from code and from the environment, validated when they are created.

No other part of the environment changes where a call or a key goes: besides this module,
`keys` reads the keys, `system_prompt_handler` DIPEO_BASE_DIR, and `client` the standard
proxy and certificate variables.
"""

import difflib
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from dipeo_llm.cache_url import CacheURL
from dipeo_llm.domain import LLMService
from dipeo_llm.errors import SettingsError

_T = TypeVar("_T")
_log = logging.getLogger("dipeo_llm")

Engine = Literal["auto", "direct", "litellm"]
MissingPrompt = Literal["fallback", "error"]

_OLLAMA_PORT = 11434


@functools.lru_cache(maxsize=256)  # every call checks its base URL
def http_url(text: str) -> str:
    """Check a base URL and remove the slash at its end.

    Raises:
        ValueError: It is not an http or https URL with a host, or it has a user, a
            password, a query or a fragment.
    """
    # urlsplit drops newlines and tabs silently.
    if any(c.isspace() or not c.isprintable() for c in text.strip()):
        raise ValueError("a URL must not contain white space")
    try:
        parts = urlsplit(text.strip())
        _ = parts.port
    except ValueError:
        # The error of the standard library may show a password.
        raise ValueError("a URL must have a valid host and port") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("it must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError("a URL must not carry a user name or password")
    if parts.query or parts.fragment:
        raise ValueError("a base URL must not have a query or a fragment")
    return text.strip().rstrip("/")


def _cache_url(text: str) -> str:
    CacheURL.read(text)
    return text


_Positive = Annotated[float, Field(strict=True, ge=0.001, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(strict=True, ge=1)]


def _raise_settings_errors(cls: type[_T]) -> type[_T]:
    """Make a pydantic class raise SettingsError instead of ValidationError."""
    validate: Callable[..., None] = cls.__init__

    @functools.wraps(validate)
    def init(self: _T, **fields: Any) -> None:
        try:
            validate(self, **fields)
        except ValidationError as exc:
            raise _explain(exc) from None

    setattr(cls, "__init__", init)  # noqa: B010 - to a type checker it is the class's own
    return cls


def _explain(error: ValidationError) -> Exception:
    found = error.errors(include_url=False, include_context=False)[0]
    name, *rest = found["loc"]
    if found["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(str(name), Settings.__annotations__, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return TypeError(f"Settings has no field {name!r}{hint}")
    is_mapping = name in {"base_urls", "extra_headers"}
    where = f"{name}[{rest[0]!r}]" if rest and is_mapping else str(name)
    # A URL or a header may hold a password.
    value = "" if name in _SECRET else f"={found['input']!r}"
    problem = found["msg"].removeprefix("Value error, ")
    problem = problem.replace("Input should be", "it must be")
    return SettingsError(f"{where}{value} cannot be used: {problem}")


_SECRET = frozenset({"base_urls", "proxy", "extra_headers", "cache_url", "state_url"})


@_raise_settings_errors
@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Settings:
    """How calls are made. Times are seconds, sizes bytes.

    Raises:
        SettingsError: A value cannot be used; the message names the field.
    """

    base_dir: Path | None = None
    """Folder of the prompt files; None is DIPEO_BASE_DIR, else the working directory."""
    missing_prompt: MissingPrompt = "fallback"
    """What a prompt file that cannot be read means: "fallback" uses the person's
    `system_prompt` and logs a warning, "error" fails the call."""
    timeout: _Positive = 300.0
    """Seconds for one attempt, from sending to the end of the answer."""
    connect_timeout: _Positive = 10.0
    """Seconds to open a connection, including TLS."""
    max_retries: Annotated[int, Field(strict=True, ge=0)] = 3
    """Attempts after the first; 0 is one attempt."""
    engine: Engine = "auto"
    """Who sends a call: "direct" is this package, with LiteLLM's translation; "litellm"
    is `litellm.acompletion`; "auto" is direct if the installed LiteLLM allows it."""
    idle_timeout: _Positive | None = None
    """Seconds to wait for a stream's next chunk; None is `timeout`."""
    retry_wait: _NotNegative = 0.5
    """Seconds before the first retry; doubled for each later one, with jitter."""
    retry_wait_max: _NotNegative = 30.0
    """Longest backoff in seconds."""
    retry_after_max: _NotNegative = 60.0
    """Longest `Retry-After` in seconds that is honoured; a longer one fails at once."""
    base_urls: Mapping[str, Annotated[str, AfterValidator(http_url)]] = field(
        default_factory=dict
    )
    """Provider name to base URL, where it is not the provider's own."""
    proxy: str | None = field(default=None, repr=False)
    """http:// URL of a proxy for all calls except loopback; wins over the environment."""
    trust_env_proxy: bool = True
    """Whether HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are honoured."""
    ca_bundle: Path | None = None
    """PEM file of trusted authorities; None is SSL_CERT_FILE, else certifi's."""
    extra_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every request, to every provider."""
    max_connections: _Count = 1000
    """Open connections of one client."""
    max_concurrency: _Count | None = None
    """Requests in flight of one client; the others wait in order."""
    max_clients: _Count = 64
    """Open clients, one per loop, provider, base URL and key; the longest idle closes."""
    allow_private_urls: bool = False
    """Whether a file in a message may be fetched from a private address."""
    client_ttl: _Positive = 3600.0
    """Seconds that a client is reused; then it closes when its last call has ended."""
    close_grace: _NotNegative = 5.0
    """Seconds that `aclose` waits for calls in flight."""
    max_response_bytes: _Count = 64 * 1024 * 1024
    """Largest response body, after decompression."""
    cache_url: Annotated[str, AfterValidator(_cache_url)] | None = field(
        default=None, repr=False
    )
    """Where answers are cached: `memory://`, `redis://…` or `rediss://…`, as `CacheURL`
    reads it; None caches nothing."""
    routes_file: Path | None = None
    """YAML or JSON file of routes, as `Routes.read` takes it; None has no routes."""
    state_url: Annotated[str, AfterValidator(_cache_url)] | None = field(
        default=None, repr=False
    )
    """Where routes keep what processes share (cool-downs, limits, sessions): a Redis URL.
    None is the server of `cache_url`, if that is Redis, else this process' memory."""

    def __post_init__(self) -> None:
        """Warn about a base URL under a name that looks misspelt."""
        for name in self.base_urls:
            near = difflib.get_close_matches(name.lower(), LLMService, 1, cutoff=0.7)
            # LiteLLM's names may contain one of ours, such as "vertex_ai".
            if near and near[0] not in name.lower():
                warn_once(
                    f"base_urls has an unknown provider {name!r};"
                    f" did you mean '{near[0]}'?"
                )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read the settings from the environment.

        DIPEO_BASE_DIR, DIPEO_LLM_TIMEOUT (s), DIPEO_LLM_MAX_RETRIES, DIPEO_LLM_ENGINE,
        DIPEO_LLM_CACHE_URL, DIPEO_LLM_ROUTES, DIPEO_LLM_STATE_URL, and DIPEO_LLM_<PROVIDER>_BASE_URL for any provider, such as
        DIPEO_LLM_OPENAI_BASE_URL; for Ollama also OLLAMA_HOST. `warn_about_environment`
        is called.

        Args:
            environ: Used instead of `os.environ`.

        Raises:
            SettingsError: A value cannot be read; the message names the variable.
        """
        env = os.environ if environ is None else environ
        fields: dict[str, Any] = {}
        for variable, (name, convert) in _VARIABLES.items():
            value = _read(env, variable, functools.partial(_check, name, convert))
            if value is not None:
                fields[name] = value
        urls = {}
        for variable in env:
            if match := _BASE_URL.fullmatch(variable):
                urls[match[1].lower()] = _read(env, variable, http_url)
        urls.setdefault("ollama", _read(env, "OLLAMA_HOST", _ollama_url))
        fields["base_urls"] = {name: url for name, url in urls.items() if url}
        settings = cls(**fields)
        warn_about_environment(settings, env)
        return settings


_BASE_URL = re.compile(r"DIPEO_LLM_([A-Z0-9_]+)_BASE_URL")
_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    # The folder need not exist yet: a missing prompt file has a rule of its own.
    "DIPEO_BASE_DIR": ("base_dir", lambda text: Path(text).expanduser()),
    "DIPEO_LLM_TIMEOUT": ("timeout", float),
    "DIPEO_LLM_MAX_RETRIES": ("max_retries", int),
    "DIPEO_LLM_ENGINE": ("engine", str.lower),
    "DIPEO_LLM_CACHE_URL": ("cache_url", str),
    "DIPEO_LLM_ROUTES": ("routes_file", lambda text: Path(text).expanduser()),
    "DIPEO_LLM_STATE_URL": ("state_url", str),
}
"""Variable to field, and what converts its text."""
# Of the command.
_OTHER_VARIABLES = ("DIPEO_LLM_MODEL", "DIPEO_LLM_COMPLETE")
_FOREIGN_BASE_URLS = {
    "OPENAI_BASE_URL": "openai",
    "OPENAI_API_BASE": "openai",
    "ANTHROPIC_BASE_URL": "anthropic",
    "ANTHROPIC_API_BASE": "anthropic",
    "GOOGLE_GEMINI_BASE_URL": "google",
    "OLLAMA_API_BASE": "ollama",
}
"""Variables of other libraries, which this package does not read."""


def _check(name: str, convert: Callable[[str], Any], text: str) -> Any:
    return getattr(Settings(**{name: convert(text)}), name)


def _read(env: Mapping[str, str], name: str, convert: Callable[[str], _T]) -> _T | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    try:
        return convert(text)
    except ValueError as exc:
        problem = str(exc).rpartition(" cannot be used: ")[2]
        # A URL may hold a password; any other value is shown.
        if name in {"DIPEO_LLM_CACHE_URL", "DIPEO_LLM_STATE_URL"}:
            raise SettingsError(f"{name} cannot be read: {problem}") from None
        if "@" in text:
            raise SettingsError(
                f"{name} cannot be read: it must not carry a user name or password"
            ) from None
        raise SettingsError(f"{name}={text!r} cannot be read: {problem}") from None


def warn_about_environment(settings: Settings, environ: Mapping[str, str]) -> None:
    """Log variables that look as if they had an effect, once per process.

    An unknown DIPEO_LLM_* variable is probably misspelt. A base URL of another library,
    such as OPENAI_BASE_URL, is not used here, so that calls meant for a gateway would
    go to the provider.
    """
    known = [*_VARIABLES, *_OTHER_VARIABLES]
    for name in environ:
        if name.startswith("DIPEO_LLM_") and not (
            name in known or _BASE_URL.fullmatch(name)
        ):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warn_once(f"the environment variable {name} is unknown{hint}")
        provider = _FOREIGN_BASE_URLS.get(name)
        if provider and environ[name] and provider not in settings.base_urls:
            warn_once(
                f"{name} is set but not used: calls go to the provider's own address;"
                f" set DIPEO_LLM_{provider.upper()}_BASE_URL to change it"
            )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless it has been logged before."""
    _log.warning(message)


def _ollama_url(text: str) -> str:
    """Read OLLAMA_HOST as Ollama's own tools do: host, host:port, :port or a URL.

    Source: https://github.com/ollama/ollama-python/blob/main/ollama/_client.py
    (`_parse_host`, read 2026-11-23): the port is 11434 without a scheme, else 80 or 443.
    An address to listen on, such as 0.0.0.0, becomes the loopback address.
    """
    if any(c.isspace() for c in text):
        raise ValueError("a host must not contain white space")
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
