"""A request, its answer, and what went wrong between the two.

Pure. An answer is whatever has arrived so far: it begins silent, and the code that reads
the connection adds to it. So an exchange that was cancelled, cut or never finished is as
true a record as a whole one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from dipeo_llm.testing import matching

Piece = tuple[bytes, int]
"""A part of a body, and the milliseconds from the request to its arrival."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was, or would have been, sent."""

    method: str
    uri: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def content_type(self) -> str:
        """The Content-Type header, or an empty string."""
        return header(self.headers, "content-type")

    def as_data(self) -> dict[str, Any]:
        """Return the destination, and the fields of the body."""
        parts = urlsplit(self.uri)
        where = {"method": self.method, "host": parts.hostname, "path": parts.path}
        fields = matching.fields_of(self.body, self.content_type) if self.body else {}
        return {**where, **(fields if isinstance(fields, dict) else {"body": fields})}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer ended, or never began."""

    kind: str
    """"connect", "connect timeout", "timeout" or "disconnect": an exception, which a
    replay raises again. "silence": the program stopped waiting, and a replay waits until
    it does so again. "unread": the program closed the answer here."""
    type: str = ""
    """The exception's class, such as `httpcore.ConnectError`."""
    message: str = ""
    errno: int | None = None

    @classmethod
    def of(cls, exc: BaseException) -> "Failure":
        """Describe an exception of an HTTP client."""
        kind = type(exc)
        text = getattr(exc, "strerror", None) or str(exc)
        errno = getattr(exc, "errno", None)
        name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        return cls(
            _kind_of(exc), name, str(text), errno if isinstance(errno, int) else None
        )


SILENCE: Final = Failure("silence")
UNREAD: Final = Failure("unread")

_NO_CONNECTION: Final = (
    "ClientConnector",
    "ClientProxyConnection",
    "ConnectError",
    "ConnectionRefused",
    "NameResolution",
    "NewConnection",
    "ProxyError",
    "ServerFingerprint",
    "SSL",
    "gaierror",
)


def _kind_of(exc: BaseException) -> str:
    name = type(exc).__name__
    if "Timeout" in name or isinstance(exc, TimeoutError):
        return "connect timeout" if name.startswith("Connect") else "timeout"
    return "connect" if name.startswith(_NO_CONNECTION) else "disconnect"


@dataclass(slots=True, eq=False)
class Answer:
    """What a server has said so far."""

    status: int | None = None
    """None if it has said nothing."""
    reason: str = ""
    headers: dict[str, list[str]] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    failure: Failure | None = SILENCE
    unpack: Callable[[list[Piece]], list[Piece]] | None = None
    """Decompresses the pieces; None if they are not compressed, or not any more."""

    @property
    def body(self) -> bytes:
        """The body, all pieces together."""
        return b"".join(piece for piece, _ in self.pieces)

    @property
    def is_stream(self) -> bool:
        """Whether its pieces arrive one by one, and matter one by one."""
        return header(self.headers, "content-type").startswith(_STREAMS)

    def begin(
        self, status: int, reason: str | None, headers: Iterable[tuple[str, str]]
    ) -> None:
        """Take the head of a response."""
        self.status, self.reason = status, reason or ""
        for name, value in headers:
            self.headers.setdefault(str(name), []).append(value)

    def settle(self) -> None:
        """Make a record of it: without compression, and in pieces only if streamed."""
        if self.unpack is not None:
            self.pieces, self.unpack = self.unpack(self.pieces), None
        for name in [name for name in self.headers if name.lower() in FRAMING]:
            del self.headers[name]
        if not self.is_stream:
            self.pieces = [(self.body, 0)]
        self.pieces = [(piece, after) for piece, after in self.pieces if piece]

    def waits(self, *, real_timing: bool) -> Iterator[tuple[bytes, float]]:
        """Yield each piece with the seconds to wait before it."""
        last = 0
        for piece, after in self.pieces:
            yield piece, (after - last) / 1000 if real_timing else 0.0
            last = after


def header(headers: Mapping[str, Any], name: str) -> str:
    """Return a header's first value whatever the case of its name, or ""."""
    for key, value in headers.items():
        if key.lower() == name:
            return str(value[0] if isinstance(value, list) else value)
    return ""


_STREAMS: Final = (
    "text/event-stream",
    "application/x-ndjson",
    "application/vnd.amazon",
)
# These describe one transfer of a body; a recorded body is whole and not compressed.
FRAMING: Final = frozenset(
    {
        "content-encoding",
        "content-length",
        "transfer-encoding",
        "connection",
        "keep-alive",
    }
)
