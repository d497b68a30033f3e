"""The state of one attempt: what went over the network, and what came back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Attempt:
    """One attempt at a request. `Client` fills in what it sees on the network."""

    requests: int = 0
    """Requests sent: 1, or 2 if the first one met a stale connection."""
    request_body: bytes = field(default=b"", repr=False)
    """Bytes of the request's body, as sent."""
    status: int | None = None
    """HTTP status; None until the headers of an answer have arrived."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Headers of the answer; names are case-insensitive."""
    body: bytearray = field(default_factory=bytearray, repr=False)
    """Bytes of the answer read so far, decompressed; empty if they are not kept."""
    error: Exception | None = field(default=None, repr=False)
    """The first failure below HTTP, or the refusal of the fence."""
    extra_body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """JSON merged into the body of the request just before it is sent."""
    response: Any = field(default=None, repr=False)
    """The open `aiohttp.ClientResponse`; whoever leaves it early closes it."""
    is_whole: bool = False
    """Whether the answer was read to its end."""
    is_abandoned: bool = False
    """Whether the attempt was cancelled; nothing may be sent any more."""
    is_kept: bool = True
    """Whether `httpx_client` keeps the body of a 200; errors are always kept."""
