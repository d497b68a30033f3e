"""The state of one attempt: what is asked, what the wire showed, and when it is late.

The adapter fills in the request; the client notes what was sent and received.
"""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipeo_llm.adapters.base import BaseLLMAdapter
    from dipeo_llm.adapters.request import PreparedRequest
    from dipeo_llm.domain import ChatRequest


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One request to a provider: what the wire showed of it, and when it is late."""

    extra_body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Merged into the body of the request just before it is sent."""
    requests: int = 0
    """Requests that were sent: 1, or 2 if the first one met a stale connection."""
    request_body: bytes = field(default=b"", repr=False)
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytearray = field(default_factory=bytearray, repr=False)
    """The bytes of the answer that were kept."""
    error: Exception | None = field(default=None, repr=False)
    """The failure below HTTP, or the fence's refusal."""
    response: Any = field(default=None, repr=False)
    """The open answer; the code that leaves it early closes it."""
    is_whole: bool = False
    """Whether the answer was read to its end."""
    is_abandoned: bool = False
    """Whether the attempt was cancelled; nothing may be sent any more."""
    is_kept: bool = True
    """Whether `httpx_client` keeps the body of a 200; other bodies are always kept."""
    queued: float = 0.0
    """Seconds that the attempt waited for a permit."""
    due: float = math.inf
    """When the next piece of the answer must be there, on the event loop's clock."""
    timeout_message: str = ""
    close_due: float = math.inf
    """When the server must have closed the stream after its terminator."""

    def allow(self, seconds: float, message: str) -> None:
        """Give the next piece of the answer *seconds* from now."""
        self.due = asyncio.get_running_loop().time() + seconds
        self.timeout_message = f"{message} {seconds:g} s"

    @property
    def is_late(self) -> bool:
        """Whether the time for the next piece is over."""
        return asyncio.get_running_loop().time() >= self.due


@dataclass(slots=True, kw_only=True)
class CompletionAttempt(Attempt):
    """One attempt at a completion."""

    adapter: "BaseLLMAdapter"
    """Makes the exchange: the adapter that was called, or another endpoint of it."""
    request: "ChatRequest" = field(repr=False)
    prepared: "PreparedRequest" = field(repr=False)
    litellm: Any = field(repr=False)
    """The imported module."""
    is_stream: bool
