"""Telemetry: one span a call, attempts beneath it, metrics, and no prompt unasked.

Each test looks at what OpenTelemetry's own exporters receive.
"""

import asyncio
import gc
import importlib
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm.domain import LABELS, ChatResult, Message, PersonLLMConfig, TokenUsage
from dipeo_llm.errors import DiPeOLLMError, LLMServiceError, RateLimitError
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.record import AttemptRecord, CallRecord
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Engine, Settings
from dipeo_llm.system_prompt_handler import SystemPromptHandler
from tests.conftest import HELLO, MODELS, each_provider
from tests.provider_server import DEFAULT_TEXT, Answer, ProviderServer, Raw, error

pytest.importorskip("opentelemetry.sdk", reason="the extra otel and the SDK are absent")

from opentelemetry import trace
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import (
    InMemoryLogRecordExporter,
    SimpleLogRecordProcessor,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from dipeo_llm.telemetry import (
    CONTENT_VARIABLE,
    METRICS,
    NAMES_VARIABLE,
    Names,
    Telemetry,
)

ROOT = Path(__file__).parent.parent
MODEL = MODELS["openai"]
SECONDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]
SECONDS += [1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144]
TOKENS += [1048576, 4194304, 16777216, 67108864]
OLD = {
    "gen_ai.client.operation.duration",
    "gen_ai.client.operation.time_to_first_chunk",
    "gen_ai.client.operation.time_per_output_chunk",
    "gen_ai.client.token.usage",
}
NEW = {
    "gen_ai.client.inference.duration",
    "gen_ai.client.inference.time_to_first_chunk",
    "gen_ai.client.inference.time_per_output_chunk",
    "gen_ai.client.inference.usage.input_tokens",
    "gen_ai.client.inference.usage.output_tokens",
    "gen_ai.client.inference.usage.cache_read.input_tokens",
    "gen_ai.client.inference.usage.cache_write.input_tokens",
    "gen_ai.client.inference.usage.reasoning.output_tokens",
    "gen_ai.client.inference.operation.input_tokens",
    "gen_ai.client.inference.operation.output_tokens",
}


@dataclass
class Collected:
    """A set of providers that keep what they get."""

    spans_: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)
    logs: InMemoryLogRecordExporter = field(default_factory=InMemoryLogRecordExporter)

    def __post_init__(self) -> None:
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans_))
        self.meters = MeterProvider([self.reader])
        self.loggers = LoggerProvider()
        self.loggers.add_log_record_processor(SimpleLogRecordProcessor(self.logs))

    def telemetry(self, names: Names | None = None) -> Telemetry:
        """Make telemetry that reports here."""
        return Telemetry(
            tracer_provider=self.tracers,
            meter_provider=self.meters,
            logger_provider=self.loggers,
            names=names,
        )

    @property
    def spans(self) -> list[ReadableSpan]:
        """All spans that have ended."""
        return list(self.spans_.get_finished_spans())

    @property
    def calls(self) -> list[ReadableSpan]:
        """The spans of calls."""
        return [span for span in self.spans if span.kind is SpanKind.CLIENT]

    @property
    def attempts(self) -> list[ReadableSpan]:
        """The spans of attempts."""
        return [span for span in self.spans if span.name == "attempt"]

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """The data points of each metric, by its name."""
        found: dict[str, list[Any]] = {}
        data = self.reader.get_metrics_data()
        for of_resource in data.resource_metrics if data else ():
            for of_scope in of_resource.scope_metrics:
                for metric in of_scope.metrics:
                    found.setdefault(metric.name, []).extend(metric.data.data_points)
        return found

    def everything(self) -> str:
        """All that was reported, as text."""
        spans = "".join(span.to_json() for span in self.spans)
        logs = "".join(log.to_json() for log in self.logs.get_finished_logs())
        return spans + logs + repr(self.metrics)


@pytest.fixture
def collected() -> Iterator[Collected]:
    """Collect what is reported, and shut everything down."""
    made = Collected()
    yield made
    made.tracers.shutdown()
    made.meters.shutdown()
    made.loggers.shutdown()


@pytest.fixture
async def service(keys: StaticAPIKeys, collected: Collected) -> Any:
    """Open a service with telemetry that hardly waits before a retry."""
    settings = Settings(retry_wait=0.01, retry_wait_max=0.02, timeout=20)
    telemetry = collected.telemetry()
    async with LLMInfraService(keys, settings=settings, telemetry=telemetry) as made:
        await made.initialize()
        yield made


def given(span: ReadableSpan) -> dict[str, Any]:
    """Return a span's attributes."""
    return dict(span.attributes or {})


RECORD = CallRecord(
    service="openai",
    model=MODEL,
    status="ok",
    usage=TokenUsage(input=10, output=5, cached=4, cache_written=2, reasoning=3),
    cost_usd=0.25,
    started_at=1_000_000_000.0,
    duration=2.0,
    attempts=(AttemptRecord(start=0.25, duration=1.75),),
)


# --- the span of a call


@each_provider
async def test_a_call_is_one_span(
    service: LLMInfraService,
    collected: Collected,
    server: ProviderServer,
    provider: str,
) -> None:
    """With the conventions' name, kind and attributes, for every provider."""
    await service.complete(
        HELLO, MODELS[provider], provider, temperature=0.5, max_tokens=64, stop="END"
    )

    (span,) = collected.calls
    found = given(span)
    names = {"google": "gcp.gemini"}
    assert span.name == f"chat {MODELS[provider]}"
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == names.get(provider, provider)
    assert found["gen_ai.request.model"] == MODELS[provider]
    assert found["gen_ai.request.temperature"] == 0.5
    assert found["gen_ai.request.max_tokens"] == 64
    assert found["gen_ai.request.stop_sequences"] == ("END",)
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.usage.input_tokens"] == 12
    assert found["gen_ai.usage.output_tokens"] == 5
    assert f"http://{found['server.address']}:{found['server.port']}" == server.origin
    assert found["dipeo.attempts"] == 1
    assert found["dipeo.cached"] is False
    assert "gen_ai.request.stream" not in found
    assert "error.type" not in found


async def test_the_span_lasts_as_long_as_the_call(
    service: LLMInfraService, collected: Collected, server: ProviderServer
) -> None:
    """Its times are real times, with the waits between attempts."""
    server.reply(error("openai", 503), Answer(delay=0.2))
    await service.complete(HELLO, MODEL, "openai")

    (span,) = collected.calls
    first, second = collected.attempts
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= first.start_time < first.end_time  # type: ignore[operator]
    assert first.end_time <= second.start_time < second.end_time <= span.end_time  # type: ignore[operator]
    assert second.end_time - second.start_time >= 190_000_000  # type: ignore[operator]
    metric = collected.metrics["gen_ai.client.operation.duration"][0]
    assert metric.sum == pytest.approx(
        (span.end_time - span.start_time) / 1e9, abs=1e-4
    )


@pytest.mark.parametrize("streamed", [False, True])
async def test_attempts_are_beneath_the_call_and_count_nothing(
    service: LLMInfraService,
    collected: Collected,
    server: ProviderServer,
    *,
    streamed: bool,
) -> None:
    """The sum over all spans is that of one call, for they have nothing of gen_ai."""
    server.reply(
        error("openai", 429, headers={"retry-after": "0"}), Answer(input_tokens=100)
    )
    if streamed:
        async with service.stream(HELLO, MODEL, "openai") as stream:
            await stream.result()
    else:
        await service.complete(HELLO, MODEL, "openai")

    (span,) = collected.calls
    failed, good = collected.attempts
    for attempt in (failed, good):
        assert attempt.parent is not None
        assert attempt.parent.span_id == span.context.span_id
        assert attempt.kind is SpanKind.INTERNAL
        assert not [name for name in given(attempt) if name.startswith("gen_ai")]
    assert given(failed)["error.type"] == "RateLimitError"
    assert given(failed)["http.response.status_code"] == 429
    assert failed.status.status_code is StatusCode.ERROR
    assert given(good) == {"dipeo.attempt": 2}
    total = sum(given(s).get("gen_ai.usage.input_tokens", 0) for s in collected.spans)
    assert total == 100
    assert given(span)["dipeo.attempts"] == 2
    assert span.status.status_code is StatusCode.UNSET


async def test_a_failed_call_says_its_error_without_its_words(
    service: LLMInfraService, collected: Collected, server: ProviderServer
) -> None:
    """The class and the status are reported; the message may quote the prompt."""
    server.reply(error("openai", 400, message="your prompt: Hello, secret"))
    with pytest.raises(LLMServiceError, match="secret"):
        await service.complete(HELLO, MODEL, "openai")

    (span,) = collected.calls
    assert span.status.status_code is StatusCode.ERROR
    assert given(span)["error.type"] == "InvalidRequestError"
    assert given(span)["http.response.status_code"] == 400
    assert given(span)["dipeo.status"] == "error"
    assert "secret" not in collected.everything()


async def test_labels_are_on_the_span_and_on_no_metric(
    service: LLMInfraService, collected: Collected
) -> None:
    """An id in a metric would be a time series for each user."""
    labels: dict[str, Any] = {name: f"x-{name}" for name in LABELS}
    said = [Message(from_person_id="ada", to_person_id="bob", content="Hello")]
    bob = PersonLLMConfig(model=MODEL, api_key_id="openai")

    await service.complete_with_person(said, "x-bob", bob, **labels)

    (span,) = collected.calls
    for name, value in {**labels, "person_id": "x-bob"}.items():
        assert given(span)[f"dipeo.{name}"] == value
    points = [point for points in collected.metrics.values() for point in points]
    assert points
    assert "x-" not in repr([point.attributes for point in points])


async def test_a_prompt_template_is_named(
    keys: StaticAPIKeys, collected: Collected, tmp_path: Any
) -> None:
    """With the version of its text."""
    (tmp_path / "p.j2").write_text("{{ n }}")
    settings = Settings(base_dir=tmp_path)
    bob = PersonLLMConfig(
        model=MODEL,
        api_key_id="openai",
        prompt_file="p.j2",
        prompt_variables={"n": "x-secret"},
    )
    said = [Message(from_person_id="ada", to_person_id="bob", content="Hello")]
    async with LLMInfraService(
        keys, settings=settings, telemetry=collected.telemetry()
    ) as service:
        await service.complete_with_person(said, "bob", bob)

    (span,) = collected.calls
    assert given(span)["gen_ai.prompt.name"] == "p.j2"
    assert given(span)["gen_ai.prompt.version"] == "90436f968066"
    assert "x-secret" not in collected.everything()


async def test_the_parent_is_the_span_at_the_start_of_the_call(
    service: LLMInfraService, collected: Collected
) -> None:
    """For a stream that is closed in another task too."""
    tracer = collected.tracers.get_tracer("application")
    with tracer.start_as_current_span("work") as work:
        await service.complete(HELLO, MODEL, "openai")
        stream = service.stream(HELLO, MODEL, "openai")
        await stream.__aenter__()
    with tracer.start_as_current_span("other"):
        await asyncio.create_task(stream.aclose())

    parents = [span.parent.span_id for span in collected.calls if span.parent]
    assert parents == [work.get_span_context().span_id] * 2


async def test_work_in_a_thread_sees_the_current_span(
    keys: StaticAPIKeys, collected: Collected, server: ProviderServer
) -> None:
    """A prompt is found in a thread; a call may be made in one."""
    tracer = collected.tracers.get_tracer("application")

    class Prompts(SystemPromptHandler):
        def get_system_prompt(self, *_: Any, **__: Any) -> str:
            with tracer.start_as_current_span("prompt"):
                return "Be brief."

    async def ask() -> None:
        config = PersonLLMConfig(model=MODEL, api_key_id="openai", prompt_file="p.md")
        said = [Message(from_person_id="a", to_person_id="b", content="Hi")]
        async with LLMInfraService(
            keys, telemetry=collected.telemetry(), system_prompt_handler=Prompts()
        ) as service:
            await service.complete_with_person(said, "b", config)

    with tracer.start_as_current_span("work") as work:
        await asyncio.to_thread(asyncio.run, ask())

    spans = {span.name: span for span in collected.spans}
    for name in ("prompt", f"chat {MODEL}"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == work.get_span_context().span_id


# --- streams


async def test_a_stream_measures_its_chunks(
    service: LLMInfraService, collected: Collected, server: ProviderServer
) -> None:
    """The first counts from the start of the call, each later one from the one before."""
    server.reply(Answer("abcd", pieces=4, delay=0.1, chunk_delay=0.05))
    chunks = 0
    async with service.stream(HELLO, MODEL, "openai") as stream:
        async for _ in stream:
            chunks += 1

    (span,) = collected.calls
    (first,) = collected.metrics["gen_ai.client.operation.time_to_first_chunk"]
    (later,) = collected.metrics["gen_ai.client.operation.time_per_output_chunk"]
    assert given(span)["gen_ai.request.stream"] is True
    assert given(span)["gen_ai.response.time_to_first_chunk"] == first.sum >= 0.1
    assert first.count == 1
    assert later.count == chunks - 1 == 3
    assert 0.04 <= later.min <= later.max < 5


async def test_reasoning_is_a_first_chunk(
    service: LLMInfraService, collected: Collected, server: ProviderServer
) -> None:
    """Text that comes long after it does not set the time."""
    server.reply(Answer("x", reasoning="Hm", pieces=1, chunk_delay=0.3))
    async with service.stream(HELLO, MODELS["ollama"], "ollama") as stream:
        kinds = [("reasoning" if c.reasoning else "text") async for c in stream]

    (first,) = collected.metrics["gen_ai.client.operation.time_to_first_chunk"]
    (whole,) = collected.metrics["gen_ai.client.operation.duration"]
    assert kinds[0] == "reasoning"
    assert first.sum < 0.3 < whole.sum


async def _leave(service: LLMInfraService) -> None:
    async with service.stream(HELLO, MODEL, "openai") as stream:
        async for _ in stream:
            break


async def _close_elsewhere(service: LLMInfraService) -> None:
    stream = service.stream(HELLO, MODEL, "openai")
    await stream.__aenter__()
    await anext(stream)
    await asyncio.gather(*(asyncio.create_task(stream.aclose()) for _ in range(3)))


async def _drop(service: LLMInfraService) -> None:
    stream = service.stream(HELLO, MODEL, "openai")
    await stream.__aenter__()
    await anext(stream)
    del stream
    gc.collect()
    await asyncio.sleep(0.05)


async def _drop_in_a_thread(service: LLMInfraService) -> None:
    held = [service.stream(HELLO, MODEL, "openai")]
    await held[0].__aenter__()
    await anext(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    await asyncio.sleep(0.05)


async def _cancel(service: LLMInfraService) -> None:
    task = asyncio.create_task(_read_slowly(service))
    await asyncio.sleep(0.2)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _read_slowly(service: LLMInfraService) -> None:
    async with service.stream(HELLO, MODEL, "openai") as stream:
        async for _ in stream:
            await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("end", "status", "failure"),
    [
        (_leave, "left", None),
        (_close_elsewhere, "left", None),
        (_drop, "left", None),
        (_drop_in_a_thread, "left", None),
        (_cancel, "cancelled", "CancelledError"),
    ],
)
async def test_a_stream_that_is_left_ends_its_span_once(
    service: LLMInfraService,
    collected: Collected,
    caplog: pytest.LogCaptureFixture,
    end: Any,
    status: str,
    failure: str | None,
) -> None:
    """However it is left; its usage is unknown, and not zero."""
    await end(service)
    gc.collect()
    await asyncio.sleep(0.05)

    (span,) = collected.calls
    (duration,) = collected.metrics["gen_ai.client.operation.duration"]
    assert duration.count == 1
    assert given(span)["dipeo.status"] == status
    assert given(span).get("error.type") == failure
    assert given(span)["gen_ai.response.finish_reasons"] == ("error",)
    assert "gen_ai.usage.input_tokens" not in given(span)
    assert "gen_ai.client.token.usage" not in collected.metrics
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_no_span_is_current_while_the_caller_runs(
    service: LLMInfraService, collected: Collected
) -> None:
    """What the caller does between two chunks is not the model's."""
    seen = []
    async with service.stream(HELLO, MODEL, "openai") as stream:
        async for _ in stream:
            seen.append(trace.get_current_span())
            with collected.tracers.get_tracer("a").start_as_current_span("mine"):
                pass

    mine = [span for span in collected.spans if span.name == "mine"]
    assert set(seen) == {trace.INVALID_SPAN}
    assert [span.parent for span in mine] == [None] * len(seen)


async def test_a_stream_that_breaks_off_is_an_error(
    service: LLMInfraService, collected: Collected, server: ProviderServer
) -> None:
    """Its span ends with the error's class."""
    server.reply(Answer("abcd", cut_after=2))
    with pytest.raises(DiPeOLLMError):
        async with service.stream(HELLO, MODEL, "openai") as stream:
            await stream.result()

    (span,) = collected.calls
    assert given(span)["error.type"] == "StreamInterruptedError"
    assert span.status.status_code is StatusCode.ERROR


async def test_many_calls_at_once_are_counted_exactly(
    service: LLMInfraService, collected: Collected
) -> None:
    """To the token."""
    await asyncio.gather(*(service.complete(HELLO, MODEL, "openai") for _ in range(50)))

    points = {
        point.attributes["gen_ai.token.type"]: point
        for point in collected.metrics["gen_ai.client.token.usage"]
    }
    assert len(collected.calls) == 50
    assert (points["input"].count, points["input"].sum) == (50, 600)
    assert (points["output"].count, points["output"].sum) == (50, 250)


# --- names, buckets and attributes


@pytest.mark.parametrize(
    ("names", "variable", "expected"),
    [
        (None, None, "v1.41"),
        (None, "", "v1.41"),
        (None, "http,gen_ai_latest", "v1.41"),
        (None, "gen_ai_latest_experimental", "latest"),
        (None, "http, gen_ai_latest_experimental", "latest"),
        ("v1.41", "gen_ai_latest_experimental", "v1.41"),
        ("latest", None, "latest"),
    ],
)
def test_one_switch_chooses_the_names(
    collected: Collected,
    monkeypatch: pytest.MonkeyPatch,
    names: Names | None,
    variable: str | None,
    expected: str,
) -> None:
    """Only one version's names are sent; the argument wins over the variable."""
    monkeypatch.delenv(NAMES_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(NAMES_VARIABLE, variable)

    telemetry = collected.telemetry(names)
    kept = telemetry.begin()
    kept.chunk_gaps.append(0.1)
    telemetry.report(replace(RECORD, first_chunk=0.5, chunks=2), kept)

    sent = {name for name in collected.metrics if name.startswith("gen_ai")}
    (span,) = collected.calls
    written = {name for name in given(span) if "cache_" in name}
    assert sent == (NEW if expected == "latest" else OLD)
    word = "cache_write" if expected == "latest" else "cache_creation"
    assert written == {
        "gen_ai.usage.cache_read.input_tokens",
        f"gen_ai.usage.{word}.input_tokens",
    }


def test_the_names_are_one_of_two() -> None:
    """A misspelt version is refused."""
    with pytest.raises(ValueError, match=r"'v1\.41' or 'latest'"):
        Telemetry(names="v1.42")  # type: ignore[arg-type]


@pytest.mark.parametrize("names", ["v1.41", "latest"])
def test_histograms_have_the_conventions_buckets(
    collected: Collected, names: Names
) -> None:
    """The SDK's own begin at 0 and end at 10,000, which is useless for seconds."""
    telemetry = collected.telemetry(names)
    kept = telemetry.begin()
    kept.chunk_gaps.append(0.1)
    telemetry.report(replace(RECORD, first_chunk=0.5, queued=0.1), kept)

    found = {
        name: points[0].explicit_bounds
        for name, points in collected.metrics.items()
        if hasattr(points[0], "explicit_bounds")
    }
    assert {"dipeo.client.queue.duration"} < found.keys()
    for name, bounds in found.items():
        is_tokens = name.endswith(("tokens", "token.usage"))
        assert list(bounds) == (TOKENS if is_tokens else SECONDS), name


@pytest.mark.parametrize("names", ["v1.41", "latest"])
def test_metrics_have_attributes_from_small_sets_only(
    collected: Collected, names: Names
) -> None:
    """Nothing that grows with users, calls or prompts."""
    allowed = {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.response.model",
        "gen_ai.token.type",
        "gen_ai.token.modality",
        "error.type",
        "server.address",
        "server.port",
    }
    record = replace(
        RECORD,
        person_id="x",
        labels={"execution_id": "x"},
        request_id="x",
        prompt="x",
        error="LLMTimeoutError",
        status="error",
        server="http://127.0.0.1:1",
        response_model=MODEL,
        options={"temperature": 0.5, "seed": 5},
    )
    collected.telemetry(names).report(record)

    for name, points in collected.metrics.items():
        for point in points:
            assert point.attributes.keys() <= allowed, name
            is_timed = name.endswith((".duration", "operation.input_tokens"))
            assert ("error.type" in point.attributes) == is_timed or not is_timed


@pytest.mark.parametrize(
    "record",
    [
        replace(RECORD, service=None, model="typed-by-a-user", status="error"),
        replace(
            RECORD, model="typed-by-a-user", error="ModelNotFoundError", status="error"
        ),
    ],
)
def test_a_model_that_does_not_exist_is_no_label(
    collected: Collected, record: CallRecord
) -> None:
    """Else each typing error would be a time series for ever. The span has it."""
    collected.telemetry().report(record)

    (span,) = collected.calls
    assert given(span)["gen_ai.request.model"] == "typed-by-a-user"
    assert "typed-by-a-user" not in repr(collected.metrics)


@pytest.mark.parametrize("names", ["v1.41", "latest"])
def test_a_call_without_usage(collected: Collected, names: Names) -> None:
    """v1.41 counts nothing, the newer conventions 0; the span says nothing of either."""
    collected.telemetry(names).report(replace(RECORD, usage=None, cost_usd=None))

    (span,) = collected.calls
    assert not [name for name in given(span) if "usage" in name or "cost" in name]
    assert "dipeo.client.cost" not in collected.metrics
    counted = {
        name: getattr(points[0], "value", None) or getattr(points[0], "sum", None) or 0
        for name, points in collected.metrics.items()
        if "token" in name
    }
    assert counted == (
        {}
        if names == "v1.41"
        else dict.fromkeys(
            (
                "gen_ai.client.inference.usage.input_tokens",
                "gen_ai.client.inference.usage.output_tokens",
                "gen_ai.client.inference.operation.input_tokens",
                "gen_ai.client.inference.operation.output_tokens",
            ),
            0,
        )
    )


@pytest.mark.parametrize("names", ["v1.41", "latest"])
def test_a_call_whose_output_is_unknown(collected: Collected, names: Names) -> None:
    """Of a stream that was left the input is counted, and the output is not."""
    told = TokenUsage(input=30, output=1, cached=8)
    collected.telemetry(names).report(
        replace(RECORD, status="left", usage=told, is_usage_partial=True, cost_usd=None)
    )

    (span,) = collected.calls
    usage = {name: value for name, value in given(span).items() if "usage" in name}
    assert usage == {
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.cache_read.input_tokens": 8,
    }
    metrics = collected.metrics
    if names == "v1.41":
        (tokens,) = metrics["gen_ai.client.token.usage"]
        assert (tokens.sum, tokens.attributes["gen_ai.token.type"]) == (30, "input")
        return
    (read,) = metrics["gen_ai.client.inference.usage.input_tokens"]
    (written,) = metrics["gen_ai.client.inference.usage.output_tokens"]
    assert (read.value, written.value) == (30, 0)
    assert "gen_ai.client.inference.usage.reasoning.output_tokens" not in metrics


@pytest.mark.parametrize("names", ["v1.41", "latest"])
def test_a_hit_of_our_cache_counts_no_tokens_and_no_cost(
    collected: Collected, names: Names
) -> None:
    """It is another operation, so that it does not make the model look fast."""
    collected.telemetry(names).report(replace(RECORD, cached=True, attempts=()))

    (span,) = collected.calls
    assert span.name == f"fetch_response {MODEL}"
    assert given(span)["dipeo.cached"] is True
    assert not [name for name in given(span) if "usage" in name]
    metrics = collected.metrics
    assert not [name for name in metrics if "token" in name or "cost" in name]
    (point,) = metrics["dipeo.client.cached_calls"]
    assert point.value == 1
    assert point.attributes["gen_ai.operation.name"] == "fetch_response"


def test_our_own_metrics(collected: Collected) -> None:
    """Cost, attempts and queue have names of our own."""
    telemetry = collected.telemetry()
    failed = AttemptRecord(start=0, duration=1, error="RateLimitError", wait=1.0)
    telemetry.report(replace(RECORD, queued=0.5, attempts=(failed, *RECORD.attempts)))
    telemetry.report(replace(RECORD, queued=0.0))

    metrics = collected.metrics
    assert metrics["dipeo.client.cost"][0].value == 0.5
    assert metrics["dipeo.client.attempts"][0].value == 3
    assert metrics["dipeo.client.queue.duration"][0].count == 1


@pytest.mark.parametrize(
    ("service", "name"),
    [
        ("openai", "openai"),
        ("anthropic", "anthropic"),
        ("google", "gcp.gemini"),
        ("vertex", "gcp.vertex_ai"),
        ("bedrock", "aws.bedrock"),
        ("mistral", "mistral_ai"),
        ("xai", "x_ai"),
        ("ollama", "ollama"),
        ("my_own", "my_own"),
        (None, "unknown"),
    ],
)
def test_providers_have_the_conventions_names(
    collected: Collected, service: str | None, name: str
) -> None:
    """Where there is one."""
    collected.telemetry().report(replace(RECORD, service=service))

    assert given(collected.calls[0])["gen_ai.provider.name"] == name


@pytest.mark.parametrize(
    ("server", "address", "port"),
    [
        ("https://api.openai.com", "api.openai.com", 443),
        ("http://[::1]", "::1", 80),
        ("http://localhost:11434", "localhost", 11434),
        (None, None, None),
    ],
)
def test_the_server_has_its_port(
    collected: Collected, server: str | None, address: str | None, port: int | None
) -> None:
    """The usual one too."""
    collected.telemetry().report(replace(RECORD, server=server))

    found = given(collected.calls[0])
    assert (found.get("server.address"), found.get("server.port")) == (address, port)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n": 2}, {"gen_ai.request.choice.count": 2}),
        ({"n": 1}, {}),
        ({"seed": 5}, {"gen_ai.request.seed": 5}),
        ({"top_p": 0.5}, {"gen_ai.request.top_p": 0.5}),
        ({"temperature": 0}, {"gen_ai.request.temperature": 0.0}),
        ({"stop": ["a", "b"]}, {"gen_ai.request.stop_sequences": ("a", "b")}),
        ({"response_format": "json_schema"}, {"gen_ai.output.type": "json"}),
        ({"response_format": "text"}, {"gen_ai.output.type": "text"}),
        ({"reasoning_effort": "low"}, {"gen_ai.request.reasoning.level": "low"}),
        ({"tools": 3}, {}),
    ],
)
def test_options_have_the_conventions_names(
    collected: Collected, options: Mapping[str, Any], expected: dict[str, Any]
) -> None:
    """Those that were given, and no others."""
    collected.telemetry().report(RECORD)
    collected.telemetry().report(replace(RECORD, options=options))

    without, span = map(given, collected.calls)
    found = {n: v for n, v in span.items() if n not in without}
    assert found == expected
    assert list(map(type, found.values())) == list(map(type, expected.values()))


def test_every_metric_is_in_one_of_the_versions() -> None:
    """The table has no row that is never sent, and no name twice in a version."""
    for column in ("released", "latest"):
        names = [getattr(m, column) for m in METRICS if getattr(m, column)]
        assert len(names) == len(set(names))
    assert all(metric.released or metric.latest for metric in METRICS)


def test_the_page_lists_every_metric() -> None:
    """By its two names and its unit."""
    page = (ROOT / "docs" / "telemetry.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (`[^|]+`|—) \| (`[^|]+`|—) \| (\S+) \|$", page, re.MULTILINE
    )

    listed = [
        tuple(None if cell == "—" else cell.strip("`") for cell in row) for row in rows
    ]
    assert listed == [(m.released, m.latest, m.unit) for m in METRICS]


# --- content


@pytest.mark.parametrize(
    "word", [None, "", "NO_CONTENT", "no_content", "true", "1", "yes", "SPAN", "ALL"]
)
async def test_no_content_is_reported_unasked(
    keys: StaticAPIKeys,
    collected: Collected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    word: str | None,
) -> None:
    """Nor for a word that is not one of the known; that is said once."""
    monkeypatch.delenv(CONTENT_VARIABLE, raising=False)
    if word is not None:
        monkeypatch.setenv(CONTENT_VARIABLE, word)
    messages = [{"role": "user", "content": "x-question"}]
    async with LLMInfraService(keys, telemetry=collected.telemetry()) as service:
        for _ in range(2):
            await service.complete(messages, MODEL, "openai")

    reported = collected.everything()
    assert len(collected.calls) == 2
    assert "x-question" not in reported
    assert DEFAULT_TEXT not in reported
    assert collected.logs.get_finished_logs() == ()
    is_known = (word or "NO_CONTENT").upper() == "NO_CONTENT"
    said = [r for r in caplog.records if CONTENT_VARIABLE in r.getMessage()]
    assert len(said) == (not is_known)


TOOL_TURN: list[dict[str, Any]] = [
    {"role": "system", "content": "x-system"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "x-question"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,eHh4"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "x-output"},
]
EXPECTED = {
    "gen_ai.system_instructions": [{"type": "text", "content": "x-system"}],
    "gen_ai.input.messages": [
        {
            "role": "user",
            "parts": [{"type": "text", "content": "x-question"}, {"type": "image_url"}],
        },
        {
            "role": "assistant",
            "parts": [
                {"type": "tool_call", "id": "c1", "name": "f", "arguments": '{"a": 1}'}
            ],
        },
        {
            "role": "tool",
            "parts": [
                {"type": "tool_call_response", "id": "c1", "response": "x-output"}
            ],
        },
    ],
    "gen_ai.output.messages": [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": "x-answer"}],
            "finish_reason": "stop",
        }
    ],
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("word", ["SPAN_ONLY", "EVENT_ONLY", "span_and_event"])
async def test_content_is_reported_where_it_is_asked_for(
    keys: StaticAPIKeys,
    collected: Collected,
    server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    *,
    streamed: bool,
) -> None:
    """In the conventions' form, without the bytes of a picture."""
    monkeypatch.setenv(CONTENT_VARIABLE, word)
    server.reply(Answer("x-answer"))
    async with LLMInfraService(keys, telemetry=collected.telemetry()) as service:
        if streamed:
            async with service.stream(TOOL_TURN, MODEL, "openai") as stream:
                await stream.result()
        else:
            await service.complete(TOOL_TURN, MODEL, "openai")

    (span,) = collected.calls
    on_span = {
        name: json.loads(value)
        for name, value in given(span).items()
        if name in EXPECTED
    }
    assert on_span == ({} if word == "EVENT_ONLY" else EXPECTED)
    events = collected.logs.get_finished_logs()
    assert len(events) == (word != "SPAN_ONLY")
    for event in events:
        log = event.log_record
        assert log.event_name == "gen_ai.client.inference.operation.details"
        assert log.span_id == span.context.span_id
        told = json.loads(event.to_json())["attributes"]
        assert {name: told[name] for name in EXPECTED} == EXPECTED
        assert told["gen_ai.request.model"] == MODEL
    assert "eHh4" not in collected.everything()


def test_every_choice_is_reported_and_no_picture_of_a_tool(
    collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message for each choice; a tool's picture has its kind only."""
    monkeypatch.setenv(CONTENT_VARIABLE, "SPAN_ONLY")
    telemetry = collected.telemetry()
    url = {"url": "data:image/png;base64,eHh4"}
    picture = {"type": "image_url", "image_url": url}
    kept = telemetry.begin()
    kept.keep_messages([{"role": "tool", "tool_call_id": "c1", "content": [picture]}])
    kept.keep_result(ChatResult(text="one", texts=["one", "two"], finish_reason="stop"))

    telemetry.report(RECORD, kept)

    found = given(collected.calls[0])
    messages = json.loads(found["gen_ai.output.messages"])
    assert [m["parts"][0]["content"] for m in messages] == ["one", "two"]
    assert json.loads(found["gen_ai.input.messages"])[0]["parts"] == [
        {"type": "tool_call_response", "id": "c1", "response": [{"type": "image_url"}]}
    ]


async def test_an_answer_that_calls_tools_is_reported_with_its_reasoning(
    keys: StaticAPIKeys,
    collected: Collected,
    server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As parts of their own."""
    monkeypatch.setenv(CONTENT_VARIABLE, "SPAN_ONLY")
    server.reply(Answer(tool_calls=[("f", {"a": 1})], reasoning="Hm"))
    async with LLMInfraService(keys, telemetry=collected.telemetry()) as service:
        await service.complete(HELLO, MODELS["ollama"], "ollama")

    (message,) = json.loads(given(collected.calls[0])["gen_ai.output.messages"])
    reasoning, call = message["parts"]
    assert reasoning == {"type": "reasoning", "content": "Hm"}
    assert (call["type"], call["name"]) == ("tool_call", "f")
    assert json.loads(call["arguments"]) == {"a": 1}
    assert message["finish_reason"] == "tool_calls"


# --- what must not happen


async def test_a_key_is_in_nothing_that_is_reported(
    keys: StaticAPIKeys,
    collected: Collected,
    server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With content switched on, and an error that echoes it."""
    monkeypatch.setenv(CONTENT_VARIABLE, "SPAN_AND_EVENT")
    server.reply(error("openai", 401, message="bad key sk-test-openai"))
    async with LLMInfraService(keys, telemetry=collected.telemetry()) as service:
        with pytest.raises(DiPeOLLMError):
            await service.complete(HELLO, MODEL, "openai")
        await service.complete(HELLO, MODEL, "openai")

    assert "sk-test" not in collected.everything()


async def test_the_words_of_a_server_are_fit_to_be_reported(
    service: LLMInfraService, collected: Collected, server: ProviderServer
) -> None:
    """Short, on one line, without the key.

    Half of a surrogate pair in a name would make every later export fail.
    """
    body = (
        b'{"id": "a", "model": "sk-test-openai\\n", "choices": [{"message":'
        b' {"content": "Hi"}, "finish_reason": "%b\\n"}]}' % (b"x" * 10_000)
    )
    headers = {"content-type": "application/json", "x-request-id": "sk-test-openai"}
    server.reply(Raw(headers=headers, body=body))
    result = await service.complete(HELLO, MODEL, "openai")
    with pytest.raises(DiPeOLLMError):
        await service.complete(HELLO, "\ud800", "openai", service="openai")
    await service.complete(HELLO, MODEL, "openai", execution_id="\ud800")

    assert (result.model, result.request_id) == ("[key]", "[key]")
    assert len(result.finish_reason or "") == 256
    collected.everything().encode()
    assert "sk-test" not in collected.everything()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "c"}]},
        {"role": "user", "content": [{"type": "text", "text": b"bytes"}]},
        {"role": "user", "content": "a", "reasoning_content": object()},
        {"content": "no role"},
        "no message",
    ],
)
async def test_content_of_any_shape_loses_no_span(
    keys: StaticAPIKeys,
    collected: Collected,
    server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
    message: Any,
) -> None:
    """Of a request that is refused too."""
    monkeypatch.setenv(CONTENT_VARIABLE, "SPAN_AND_EVENT")
    async with LLMInfraService(keys, telemetry=collected.telemetry()) as service:
        with suppress(DiPeOLLMError):
            await service.complete([message, *HELLO], MODEL, "openai")
        calls = service.usage().total.calls

    assert len(collected.calls) == calls
    durations = collected.metrics.get("gen_ai.client.operation.duration", [])
    assert sum(point.count for point in durations) == calls


@pytest.mark.parametrize("fails", [False, True])
async def test_telemetry_that_fails_breaks_no_call(
    keys: StaticAPIKeys,
    collected: Collected,
    server: ProviderServer,
    caplog: pytest.LogCaptureFixture,
    *,
    fails: bool,
) -> None:
    """The failure is logged, without the call's own error."""

    class Broken(SimpleSpanProcessor):
        def on_start(self, *_: Any, **__: Any) -> None:
            raise ValueError("broken processor")

    collected.tracers.add_span_processor(Broken(collected.spans_))
    seen: list[CallRecord] = []
    settings = Settings(max_retries=0)
    async with LLMInfraService(
        keys, settings=settings, telemetry=collected.telemetry(), on_call=seen.append
    ) as service:
        if fails:
            server.reply(error("openai", 429, message="x-secret"))
            with pytest.raises(RateLimitError):
                await service.complete(HELLO, MODEL, "openai")
        else:
            assert (await service.complete(HELLO, MODEL, "openai")).text

    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.getMessage() == "telemetry failed"
    assert "broken processor" in caplog.text
    assert "x-secret" not in caplog.text
    assert len(seen) == 1
    (duration,) = collected.metrics["gen_ai.client.operation.duration"]
    assert duration.count == 1


async def test_without_an_sdk_nothing_happens(
    keys: StaticAPIKeys, server: ProviderServer
) -> None:
    """The API alone does nothing, and a call is a call."""
    async with LLMInfraService(keys, telemetry=Telemetry()) as service:
        assert (await service.complete(HELLO, MODEL, "openai")).text


def test_off_imports_nothing() -> None:
    """A whole call without telemetry loads no module of OpenTelemetry."""
    code = """
import asyncio, sys
from dipeo_llm import LLMInfraService, StaticAPIKeys
from dipeo_llm.testing import MockLLMAdapter
async def main():
    keys = StaticAPIKeys({"openai": "sk-test-1"})
    async with LLMInfraService(keys, adapter_factory=MockLLMAdapter("Hi")) as service:
        hello = [{"role": "user", "content": "Hello"}]
        await service.complete(hello, "gpt-4.1-nano", "openai")
asyncio.run(main())
print([m for m in sys.modules if m.startswith(("opentelemetry", "dipeo_llm.telemetry"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


def test_without_the_api_the_extra_is_named() -> None:
    """By the import of the module."""
    code = """
import sys
sys.modules["opentelemetry"] = None
import dipeo_llm.telemetry
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "pip install 'dipeo-llm[otel]'" in done.stderr


@pytest.mark.parametrize("engine", ["direct", "litellm"])
async def test_side_by_side_with_the_openai_sdks_own_instrumentation(
    keys: StaticAPIKeys, collected: Collected, server: ProviderServer, engine: Engine
) -> None:
    """It sees a call of the SDK's own, and none of ours: nothing is counted twice."""
    name = "opentelemetry.instrumentation.openai_v2"
    instrumentor = pytest.importorskip(name).OpenAIInstrumentor()
    instrumentor.instrument(
        tracer_provider=collected.tracers,
        meter_provider=collected.meters,
        logger_provider=collected.loggers,
    )
    try:
        settings = Settings(engine=engine)
        async with LLMInfraService(
            keys, settings=settings, telemetry=collected.telemetry()
        ) as service:
            await service.complete(HELLO, MODEL, "openai")
            async with service.stream(HELLO, MODEL, "openai") as stream:
                await stream.result()
        ours = len(collected.calls)
        sdk = importlib.import_module("openai")
        url = server.base_url("openai")
        async with sdk.AsyncOpenAI(api_key="sk-test-1", base_url=url) as client:
            await client.chat.completions.create(model=MODEL, messages=HELLO)
    finally:
        instrumentor.uninstrument()

    chats = [span for span in collected.spans if "gen_ai.operation.name" in given(span)]
    durations = collected.metrics["gen_ai.client.operation.duration"]
    assert ours == 2
    assert len(chats) == 3
    assert sum(point.count for point in durations) == 3
