"""The URL that says where answers are cached: memory, or a Redis server.

Pure: nothing is opened, and Redis' client is not imported.
"""

from dataclasses import dataclass, field, fields
from urllib.parse import parse_qsl, urlencode, urlsplit

_SCHEMES = ("memory", "redis", "rediss")


@dataclass(frozen=True, slots=True)
class CacheURL:
    """A cache URL, read. Times are seconds, sizes bytes."""

    server: str | None = field(default=None, repr=False)
    """The URL for redis-py, which may hold a password; None is this process's memory."""
    namespace: str = "dipeo_llm"
    """The prefix of every key in Redis."""
    ttl: float = 3600.0
    """How long an answer is kept."""
    timeout: float = 0.5
    """The most that one call waits for Redis in all."""
    max_entries: int = 10_000
    """Most answers in memory; above it, the one that was used longest ago goes."""
    max_bytes: int = 64 * 1024 * 1024
    """Most bytes of answers in memory."""
    max_value_bytes: int = 8 * 1024 * 1024
    """Largest answer that is stored."""
    shared: bool = False
    """Whether all API keys share one cache; by default each has its own entries."""

    @classmethod
    def read(cls, text: str) -> "CacheURL":
        """Read `memory://?ttl=60` or `redis://user:password@host:6379/0?namespace=x`.

        A parameter that is not a field of this class goes to redis-py, such as
        `ssl_ca_certs`.

        Raises:
            ValueError: It cannot be used. The message shows no part of the URL that may
                hold a password.
        """
        if any(c.isspace() or not c.isprintable() for c in text):
            raise ValueError("a URL must not contain white space")
        try:
            parts = urlsplit(text)
            _ = parts.port
        except ValueError:
            # The error of the standard library may show a password.
            raise ValueError("a URL must have a valid host and port") from None
        if parts.scheme not in _SCHEMES or "://" not in text:
            raise ValueError("it must be a memory://, redis:// or rediss:// URL")
        is_redis = parts.scheme != "memory"
        if not is_redis and (parts.netloc or parts.path):
            raise ValueError("memory:// takes neither a host nor a path")
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        own = {name: given.pop(name) for name in _KINDS if name in given}
        if given and not is_redis:
            raise ValueError(
                f"memory:// has no parameter {min(given)!r}; known are"
                f" {', '.join(sorted(_KINDS))}"
            )
        values = {name: _KINDS[name](name, value) for name, value in own.items()}
        server = parts._replace(query=urlencode(given)).geturl() if is_redis else None
        return cls(server=server, **values)  # type: ignore[arg-type]


def _positive(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}={text!r} must be a number above 0")
    return number


def _count(name: str, text: str) -> int:
    number = _positive(name, text)
    if not number.is_integer():
        raise ValueError(f"{name}={text!r} must be a whole number")
    return int(number)


def _flag(name: str, text: str) -> bool:
    if text not in {"true", "false"}:
        raise ValueError(f"{name}={text!r} must be true or false")
    return text == "true"


def _name(name: str, text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(f"{name} must not be empty")
    return text


_READERS = {float: _positive, int: _count, bool: _flag, str: _name}
_KINDS = {
    item.name: _READERS[item.type]  # type: ignore[index]
    for item in fields(CacheURL)
    if item.name != "server"
}
