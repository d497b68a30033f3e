"""The record of one call: its options, outcome, times, tokens and cost.

The ledger, the call log, `on_call` and telemetry are made from it and from nothing else.
It holds no message, no answer, no tool and no key, so it may be stored anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dipeo_llm.domain import TokenUsage

Status = Literal["ok", "error", "cancelled", "left"]
"""How a call ended. A stream that the caller leaves before its end is "left"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt of a call."""

    start: float
    """Seconds from the start of the call."""
    duration: float
    """Seconds, for a stream until its end."""
    error: str | None = None
    """The class of the error, None for an attempt that succeeded or was left."""
    status_code: int | None = None
    """The HTTP status of a failed attempt; None without a response."""
    wait: float | None = None
    """Seconds between this attempt and the next; None if there was to be no next."""
    deployment: str | None = None
    """The deployment of the route that it went to; None without a route."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """One call, after its end. Unknown values are None, never 0."""

    service: str | None
    """The provider; None if the call failed before it was known."""
    model: str
    """The model that was asked for, without a prefix once the provider is known."""
    is_stream: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options that were given, by name: those that steer sampling with their
    values, `tools` as a number, `response_format` as its type, such as "json_schema"."""
    server: str | None = None
    """The base URL that was called, without its path."""

    route: str | None = None
    """The name of the route that was asked for; None for a model."""
    deployment: str | None = None
    """The route's deployment that answered, or that was tried last."""
    tried: tuple[str, ...] = ()
    """The deployments that were tried, in order; empty for an answer from the cache."""

    status: Status
    error: str | None = None
    """The class of the error, such as "RateLimitError". Its message is left out because
    providers quote the prompt in theirs."""
    status_code: int | None = None
    """The HTTP status of an error."""
    finish_reason: str | None = None
    response_model: str | None = None
    """The model that answered, as the provider names it."""
    request_id: str | None = None
    """The provider's id of the request."""
    usage: TokenUsage | None = None
    """None if the provider told nothing."""
    is_usage_partial: bool = False
    """Whether the call ended before the provider had told all of `usage`. The input is
    known then; output, reasoning and total are the least, and the rest is unknown."""
    cost_usd: float | None = None
    """None if the price or the usage is unknown."""
    cached: bool = False
    """Whether the answer comes from a cache of this package."""

    started_at: float
    """The start of the call in seconds since the epoch (UTC)."""
    duration: float
    """Seconds of the whole call, with its queue, attempts and waits."""
    queued: float | None = None
    """Seconds that the last attempt waited for a permit under `max_concurrency`."""
    first_chunk: float | None = None
    """Seconds from the start of the call to the first chunk of a stream: text, reasoning
    or a tool call."""
    last_chunk: float | None = None
    """Likewise to the last chunk that was read."""
    chunks: int = 0
    """Chunks that were read."""
    attempts: tuple[AttemptRecord, ...] = ()
    """In order; empty if nothing was tried."""
    requests: int = 0
    """Requests that were sent, as `ChatResult.attempts`: an attempt that met a stale
    connection sent two."""

    prompt: str | None = None
    """The file of a person's prompt template, relative to the base directory."""
    prompt_version: str | None = None
    """The first 12 hexadecimal digits of the SHA-256 of its text."""
    person_id: str | None = None
    """The person of `complete_with_person`."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Those of `execution_phase`, `execution_id`, `trace_id`, `person_name` and `node_id`
    that were given."""
