"""Reports calls to OpenTelemetry: a span, its attempts, and metrics, from a CallRecord.

Knows the record of a call and OpenTelemetry's conventions for generative AI; knows no
provider's format. `opentelemetry-api` comes with the extra `otel`; an application that
wants to see anything sets up the SDK too.

The spans are made after the call, with the times of the record. So none is ever the
current span while a caller runs, a stream that is left or dropped ends its span once, in
whichever task, and a sampler sees every attribute.

Sources: https://github.com/open-telemetry/semantic-conventions/tree/v1.41.0/docs/gen-ai
and https://github.com/open-telemetry/semantic-conventions-genai (read 2026-11-25).
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

from dipeo_llm.domain import ChatResult
from dipeo_llm.record import AttemptRecord, CallRecord

try:
    from opentelemetry import context as contexts
    from opentelemetry import metrics, trace
    from opentelemetry._logs import LoggerProvider, get_logger
    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
except ImportError as exc:
    raise ImportError(
        "dipeo_llm.telemetry needs opentelemetry-api: pip install 'dipeo-llm[otel]'"
        f" ({exc})"
    ) from exc

_log = logging.getLogger("dipeo_llm")

Names = Literal["v1.41", "latest"]
"""A version of the conventions: the last release, or their own repository's main branch."""

NAMES_VARIABLE = "OTEL_SEMCONV_STABILITY_OPT_IN"
_LATEST_WORD = "gen_ai_latest_experimental"
CONTENT_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_ON_SPANS = ("SPAN_ONLY", "SPAN_AND_EVENT")
_ON_EVENTS = ("EVENT_ONLY", "SPAN_AND_EVENT")

_SECONDS = tuple(0.01 * 2**power for power in range(14))
_TOKENS = tuple(4**power for power in range(14))


class _Metric(NamedTuple):
    key: str
    """Its name in this module."""
    unit: str
    buckets: Sequence[float] | None
    """Of a histogram; None for a counter."""
    released: str | None
    """The name in v1.41; None: it is not sent."""
    latest: str | None
    """The name in the conventions' own repository."""
    description: str


_OPERATION = "gen_ai.client.operation."
_INFERENCE = "gen_ai.client.inference."
METRICS = (
    _Metric(
        "duration",
        "s",
        _SECONDS,
        _OPERATION + "duration",
        _INFERENCE + "duration",
        "Duration of a call with its retries",
    ),
    _Metric(
        "first_chunk",
        "s",
        _SECONDS,
        _OPERATION + "time_to_first_chunk",
        _INFERENCE + "time_to_first_chunk",
        "Time from the start of a call to the first chunk of its stream",
    ),
    _Metric(
        "next_chunk",
        "s",
        _SECONDS,
        _OPERATION + "time_per_output_chunk",
        _INFERENCE + "time_per_output_chunk",
        "Time from one chunk of a stream to the next",
    ),
    _Metric(
        "tokens",
        "{token}",
        _TOKENS,
        "gen_ai.client.token.usage",
        None,
        "Tokens of a call, by gen_ai.token.type",
    ),
    _Metric(
        "input",
        "{token}",
        None,
        None,
        _INFERENCE + "usage.input_tokens",
        "Input tokens",
    ),
    _Metric(
        "output",
        "{token}",
        None,
        None,
        _INFERENCE + "usage.output_tokens",
        "Output tokens",
    ),
    _Metric(
        "cache_read",
        "{token}",
        None,
        None,
        _INFERENCE + "usage.cache_read.input_tokens",
        "Input tokens that the provider read from its prompt cache",
    ),
    _Metric(
        "cache_written",
        "{token}",
        None,
        None,
        _INFERENCE + "usage.cache_write.input_tokens",
        "Input tokens that the provider wrote to its prompt cache",
    ),
    _Metric(
        "reasoning",
        "{token}",
        None,
        None,
        _INFERENCE + "usage.reasoning.output_tokens",
        "Output tokens that were reasoning",
    ),
    _Metric(
        "input_of_call",
        "{token}",
        _TOKENS,
        None,
        _INFERENCE + "operation.input_tokens",
        "Input tokens of a call",
    ),
    _Metric(
        "output_of_call",
        "{token}",
        _TOKENS,
        None,
        _INFERENCE + "operation.output_tokens",
        "Output tokens of a call",
    ),
    # The conventions have no name for these.
    _Metric(
        "attempts",
        "{attempt}",
        None,
        *("dipeo.client.attempts",) * 2,
        "Attempts of calls; more than the calls by the number of retries",
    ),
    _Metric(
        "cached",
        "{call}",
        None,
        *("dipeo.client.cached_calls",) * 2,
        "Calls that were answered from a cache of this package",
    ),
    _Metric(
        "cost",
        "{USD}",
        None,
        *("dipeo.client.cost",) * 2,
        "Cost of the calls whose price and usage are known, in USD",
    ),
    _Metric(
        "queued",
        "s",
        _SECONDS,
        *("dipeo.client.queue.duration",) * 2,
        "Time that a call waited for a permit under max_concurrency",
    ),
)
"""Every metric, with its name in both versions."""

_CACHE_WRITTEN = {
    "v1.41": "gen_ai.usage.cache_creation.input_tokens",
    "latest": "gen_ai.usage.cache_write.input_tokens",
}
"""The one attribute of a span that differs between the versions."""

PROVIDERS = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "cohere_chat": "cohere",
    "gemini": "gcp.gemini",
    "google": "gcp.gemini",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "vertex": "gcp.vertex_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
"""Providers whose name in the conventions is not the one in this package."""

_OPTIONS: dict[str, tuple[str, type]] = {
    "temperature": ("gen_ai.request.temperature", float),
    "top_p": ("gen_ai.request.top_p", float),
    "max_tokens": ("gen_ai.request.max_tokens", int),
    "seed": ("gen_ai.request.seed", int),
    "reasoning_effort": ("gen_ai.request.reasoning.level", str),
}


class CallTrace:
    """Keeps, until the end of a call, the values that its record does not hold.

    Args:
        context: The context of the call's start; its span is the parent of the call's.
        captures_content: Whether messages and the result are kept.
    """

    __slots__ = ("_captures_content", "chunk_gaps", "context", "messages", "result")

    def __init__(self, context: Context, *, captures_content: bool = False) -> None:
        self.context = context
        self.chunk_gaps: list[float] = []
        """Seconds from each chunk of a stream to the next."""
        self.messages: Sequence[Mapping[str, Any]] = ()
        self.result: ChatResult[Any] | None = None
        self._captures_content = captures_content

    def keep_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Keep the conversation, if content is reported."""
        if self._captures_content:
            self.messages = messages

    def keep_result(self, result: ChatResult[Any]) -> None:
        """Keep the answer, if content is reported."""
        if self._captures_content:
            self.result = result


class Telemetry:
    """Reports calls to OpenTelemetry.

    `LLMInfraService(keys, telemetry=Telemetry())` switches it on. Safe for any number of
    services and threads.

    Args:
        tracer_provider: Where spans go; None is the application's global one, like the
            two below.
        meter_provider: Where metrics go.
        logger_provider: Where events with content go.
        names: The version of the conventions; None is "latest" if the variable
            OTEL_SEMCONV_STABILITY_OPT_IN lists `gen_ai_latest_experimental`, else "v1.41".

    Messages and answers are reported only if the variable
    OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT is SPAN_ONLY, EVENT_ONLY or
    SPAN_AND_EVENT. Any other value but NO_CONTENT is logged and means NO_CONTENT.

    Raises:
        ValueError: `names` is neither.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
        names: Names | None = None,
    ) -> None:
        names = names or _names()
        if names not in get_args(Names):
            raise ValueError(f"names={names!r} must be 'v1.41' or 'latest'")
        content = _content_mode()
        self._content_on_spans = content in _ON_SPANS
        self._content_on_events = content in _ON_EVENTS
        self.captures_content = self._content_on_spans or self._content_on_events
        """Whether messages and answers are reported."""
        self._cache_written = _CACHE_WRITTEN[names]
        schema = "https://opentelemetry.io/schemas/1.41.0" if names == "v1.41" else None
        scope = ("dipeo_llm", version("dipeo-llm"))
        self._tracer = trace.get_tracer(*scope, tracer_provider, schema)
        self._events = get_logger(*scope, logger_provider, schema)
        meter = metrics.get_meter(*scope, meter_provider, schema)
        self._record = _instruments(meter, names)

    def begin(self) -> "CallTrace":
        """Return a trace with the current context, for a call that begins."""
        return CallTrace(contexts.get_current(), captures_content=self.captures_content)

    def report(self, record: CallRecord, kept: "CallTrace | None" = None) -> None:
        """Report a call that has ended.

        Args:
            record: Its record.
            kept: What `begin` returned; None is the current context, without content.
        """
        kept = self.begin() if kept is None else kept
        content: dict[str, Any] = {}
        if self.captures_content:
            try:
                content = _content(kept.messages, kept.result)
            # A message that was refused may have any shape.
            except Exception as exc:  # noqa: BLE001 - logged
                _log.warning("the content of a call has no telemetry: %r", exc)
        attributes = self._span_attributes(record)
        if self._content_on_spans:
            attributes |= {
                name: json.dumps(value, ensure_ascii=False, default=str)
                for name, value in content.items()
            }
        span: Span = trace.INVALID_SPAN
        try:
            span = self._tracer.start_span(
                f"{_operation(record)} {record.model}".strip(),
                kept.context,
                SpanKind.CLIENT,
                attributes,
                start_time=int(record.started_at * 1e9),
            )
            self._report_details(span, record, kept.context, content)
        # A span processor may raise; the metrics are measured nevertheless.
        finally:
            within = trace.set_span_in_context(span, kept.context)
            self._measure(record, kept, within)

    def _report_details(
        self,
        span: Span,
        record: CallRecord,
        context: Context,
        content: Mapping[str, Any],
    ) -> None:
        """Report what lies within the span of a call, and end it."""
        start = int(record.started_at * 1e9)
        end = start + int(record.duration * 1e9)
        within = trace.set_span_in_context(span, context)
        if span.is_recording():
            for number, attempt in enumerate(record.attempts, 1):
                self._report_attempt(attempt, number, start, within)
            if record.error:
                span.set_status(Status(StatusCode.ERROR))
        if self._content_on_events:
            self._events.emit(
                event_name="gen_ai.client.inference.operation.details",
                timestamp=end,
                context=within,
                attributes={**self._span_attributes(record), **content},
            )
        span.end(end)

    def _report_attempt(
        self, attempt: AttemptRecord, number: int, call_start: int, within: Context
    ) -> None:
        start = call_start + int(attempt.start * 1e9)
        given = {
            "dipeo.attempt": number,
            "dipeo.wait": attempt.wait,
            "dipeo.deployment": attempt.deployment,
            "error.type": attempt.error,
            "http.response.status_code": attempt.status_code,
        }
        # Neither a client span nor an attribute of gen_ai: usage is counted once.
        span = self._tracer.start_span(
            "attempt", within, SpanKind.INTERNAL, _given(given), start_time=start
        )
        if attempt.error:
            span.set_status(Status(StatusCode.ERROR))
        span.end(start + int(attempt.duration * 1e9))

    def _span_attributes(self, record: CallRecord) -> dict[str, Any]:
        options, usage = record.options, None if record.cached else record.usage
        found: dict[str, Any] = {
            **_identity(record),
            "error.type": record.error,
            "http.response.status_code": record.status_code,
            "gen_ai.request.model": record.model or None,
            "gen_ai.request.stream": record.is_stream or None,
            "gen_ai.response.model": record.response_model,
            "gen_ai.response.finish_reasons": _finish_reasons(record),
            "gen_ai.response.time_to_first_chunk": record.first_chunk,
            "gen_ai.prompt.name": record.prompt,
            "gen_ai.prompt.version": record.prompt_version,
            "dipeo.status": record.status,
            "dipeo.cached": record.cached,
            "dipeo.attempts": len(record.attempts),
            "dipeo.requests": record.requests,
            "dipeo.request_id": record.request_id,
            "dipeo.queued": record.queued,
            "dipeo.cost_usd": record.cost_usd,
            "dipeo.person_id": record.person_id,
            "dipeo.route": record.route,
            "dipeo.deployment": record.deployment,
            "dipeo.tried": record.tried or None,
        }
        for name, (attribute, kind) in _OPTIONS.items():
            if name in options:
                found[attribute] = kind(options[name])
        if options.get("n", 1) != 1:
            found["gen_ai.request.choice.count"] = options["n"]
        if "stop" in options:
            stop = options["stop"]
            stops = [stop] if isinstance(stop, str) else list(stop)
            found["gen_ai.request.stop_sequences"] = stops
        if "response_format" in options:
            is_text = options["response_format"] == "text"
            found["gen_ai.output.type"] = "text" if is_text else "json"
        if usage is not None:
            found["gen_ai.usage.input_tokens"] = usage.input
            # 0 where the provider does not tell.
            found["gen_ai.usage.cache_read.input_tokens"] = usage.cached or None
            found[self._cache_written] = usage.cache_written or None
        if usage is not None and not record.is_usage_partial:
            found["gen_ai.usage.output_tokens"] = usage.output
            found["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning or None
        for name, value in record.labels.items():
            found[f"dipeo.{name}"] = value
        return _given(found)

    def _measure(self, record: CallRecord, kept: "CallTrace", context: Context) -> None:
        attributes = _metric_attributes(record)
        for key, value, more in _measures(record, kept.chunk_gaps):
            if key in self._record:
                self._record[key](value, {**attributes, **more}, context)


_Record = Callable[[float, Mapping[str, Any], Context], None]


def _instruments(meter: Meter, names: Names) -> dict[str, _Record]:
    """Make the instruments of a version; return how each is recorded, by its key."""
    made: dict[str, _Record] = {}
    for metric in METRICS:
        name = metric.latest if names == "latest" else metric.released
        if name is None:
            continue
        if metric.buckets is None:
            counter = meter.create_counter(name, metric.unit, metric.description)
            made[metric.key] = counter.add
        else:
            made[metric.key] = meter.create_histogram(
                name,
                metric.unit,
                metric.description,
                explicit_bucket_boundaries_advisory=metric.buckets,
            ).record
    return made


def _measures(
    record: CallRecord, chunk_gaps: Iterable[float]
) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Yield each measurement of a call: the metric's key, the value, more attributes."""
    error = {"error.type": record.error} if record.error else {}
    yield "duration", record.duration, error
    if record.first_chunk is not None:
        yield "first_chunk", record.first_chunk, {}
    for gap in chunk_gaps:
        yield "next_chunk", gap, {}
    yield "attempts", len(record.attempts), {}
    if record.queued:
        yield "queued", record.queued, {}
    if record.cached:
        yield "cached", 1, {}
        return
    if record.cost_usd is not None:
        yield "cost", record.cost_usd, {}
    usage = record.usage
    # The newer conventions count 0 for usage that is unknown; v1.41 counts nothing. The
    # providers do not tell how many tokens were text and how many an image.
    modality = {"gen_ai.token.modality": "unknown"}
    read = written = 0
    if usage is not None:
        read = usage.input
        yield "tokens", read, {"gen_ai.token.type": "input"}
        yield "cache_read", usage.cached, modality
        yield "cache_written", usage.cache_written, modality
    if usage is not None and not record.is_usage_partial:
        written = usage.output
        yield "tokens", written, {"gen_ai.token.type": "output"}
        yield "reasoning", usage.reasoning, modality
    yield "input", read, modality
    yield "output", written, modality
    yield "input_of_call", read, error
    yield "output_of_call", written, error


def _operation(record: CallRecord) -> str:
    # The conventions' operation for an answer that was generated before; it has no
    # token usage.
    return "fetch_response" if record.cached else "chat"


def _identity(record: CallRecord) -> dict[str, Any]:
    """Return the attributes that a span and the metrics of a call share."""
    service = record.service
    found: dict[str, Any] = {
        "gen_ai.operation.name": _operation(record),
        "gen_ai.provider.name": PROVIDERS.get(service, service)
        if service
        else "unknown",
    }
    if record.server:
        found |= _server(record.server)
    return found


def _metric_attributes(record: CallRecord) -> dict[str, Any]:
    """Return the attributes of a call's metrics, all from small sets.

    A model that no provider knows may be anything, so it is left out.
    """
    found = _identity(record)
    if record.service and record.error != "ModelNotFoundError":
        found["gen_ai.request.model"] = record.model
    if record.response_model:
        found["gen_ai.response.model"] = record.response_model
    return found


@lru_cache(maxsize=256)
def _server(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    default = 80 if parts.scheme == "http" else 443
    return {"server.address": parts.hostname, "server.port": parts.port or default}


def _finish_reasons(record: CallRecord) -> list[str] | None:
    if record.finish_reason:
        return [record.finish_reason]
    # The conventions' word for an answer that ended early.
    return ["error"] if record.chunks and record.status != "ok" else None


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _names() -> Names:
    listed = os.environ.get(NAMES_VARIABLE, "").split(",")
    return "latest" if _LATEST_WORD in map(str.strip, listed) else "v1.41"


def _content_mode() -> str:
    """Return the variable's mode; an unknown word means no content."""
    word = os.environ.get(CONTENT_VARIABLE, "").strip()
    mode = word.upper() or "NO_CONTENT"
    if mode not in {"NO_CONTENT", *_ON_SPANS, *_ON_EVENTS}:
        _log.warning(
            "%s=%r is unknown, so no content is reported; known are NO_CONTENT,"
            " SPAN_ONLY, EVENT_ONLY and SPAN_AND_EVENT",
            CONTENT_VARIABLE,
            word,
        )
        return "NO_CONTENT"
    return mode


# Content, in the form of the conventions' JSON schemas.


def _content(
    messages: Iterable[Mapping[str, Any]], result: ChatResult[Any] | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    instructions: list[Any] = []
    sent: list[Any] = []
    for message in messages:
        if message["role"] in {"system", "developer"}:
            instructions += _parts(message.get("content"))
        else:
            sent.append({"role": message["role"], "parts": _message_parts(message)})
    if instructions:
        found["gen_ai.system_instructions"] = instructions
    if sent:
        found["gen_ai.input.messages"] = sent
    if result is not None:
        (answer,) = result.to_messages()
        if result.reasoning:
            answer = {**answer, "reasoning_content": result.reasoning}
        choices = [_message_parts(answer), *map(_parts, result.texts[1:])]
        reason = result.finish_reason or "error"
        found["gen_ai.output.messages"] = [
            {"role": "assistant", "parts": parts, "finish_reason": reason}
            for parts in choices
        ]
    return found


def _message_parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a message in OpenAI's format."""
    content = message.get("content")
    if message["role"] == "tool":
        response = content if isinstance(content, str) else _parts(content)
        call_id = message.get("tool_call_id")
        return [{"type": "tool_call_response", "id": call_id, "response": response}]
    parts: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        parts.append({"type": "reasoning", "content": message["reasoning_content"]})
    parts += _parts(content)
    for call in message.get("tool_calls") or ():
        asked = call["function"]
        parts.append(
            {
                "type": "tool_call",
                "id": call.get("id"),
                "name": asked["name"],
                "arguments": asked.get("arguments"),
            }
        )
    return parts


def _parts(content: Any) -> list[dict[str, Any]]:
    """Return text parts whole, and of other parts only the type: a picture is large."""
    if not isinstance(content, list | tuple):
        return [{"type": "text", "content": content}] if content else []
    found: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            found.append({"type": "text", "content": part})
        elif isinstance(part, Mapping) and part.get("type") == "text":
            found.append({"type": "text", "content": part.get("text")})
        else:
            kind = part.get("type") if isinstance(part, Mapping) else "file"
            found.append({"type": str(kind)})
    return found
