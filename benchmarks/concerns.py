"""Measure what each concern around a call costs: telemetry, routing, cache, and so on.

`python -m benchmarks.concerns` takes about five minutes and writes its tables into
docs/performance.md; `--quick` takes one on an idle machine and only prints. Parts of a call are so
small that they are measured on a mock, in this process: the smallest of many turns, in
which all variants take their turn. Everything else is a ratio inside one run.
"""

import argparse
import ast
import asyncio
import contextlib
import datetime as dt
import io
import json
import os
import statistics
import sys
import tempfile
import time
import tokenize
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import run
from benchmarks.report import machine

BEGIN, END = "<!-- concerns: begin -->", "<!-- concerns: end -->"
PACKAGE = run.ROOT / "dipeo_llm"
MODEL = "gpt-4o-mini"
ASKED = [{"role": "user", "content": "Say hello."}]
CHUNKS = 50
CONCERNS = {
    "response cache": ("cache.py", "cache_url.py", "redis_clients.py"),
    "identical calls in flight": ("coalescing.py",),
    "routing": ("routing.py", "routes.py", "deployments.py", "cli/routes.py"),
    "limits": ("limits.py",),
    "batch, with its command": ("batch.py", "cli/batch.py"),
    "record, ledger, call log, hook": (
        "record.py",
        "ledger.py",
        "call_log.py",
        "reports.py",
    ),
    "telemetry": ("telemetry.py",),
    "templates": ("templates.py",),
}


def table(head: str, *rows: str) -> str:
    """Return a table in Markdown."""
    line = "| --- |" + " ---: |" * (head.count("|") - 2)
    return "\n".join((head, line, *rows))


# --- telemetry, hook, ledger: on a mock -----------------------------------------------


async def per_call(rounds: int) -> str:
    """Compare calls of services that differ in one concern. A route needs LiteLLM."""
    with contextlib.ExitStack() as stack:
        services = _services(stack)
        least = await _compare(services, rounds)
        for service in services.values():
            await service.aclose()
    base = [least["all off", kind] for kind in (0, 1)]
    rows = [
        f"| {name} | {least[name, 0] - base[0]:+.1f} |"
        f" {(least[name, 1] - base[1]) / CHUNKS:+.2f} |"
        for name in services
        if name != "all off"
    ]
    for name, cost in parts().items():
        rows.append(f"| {name} | {cost[0]:+.2f} | {cost[1]:+.3f} |")
    return (
        f"A call to a mock takes {base[0]:.0f} µs, a stream of {CHUNKS} chunks"
        f" {base[1]:.0f} µs. On top of that:\n\n"
        + table("| | a call, µs | a chunk, µs |", *rows)
    )


def _services(stack: contextlib.ExitStack) -> dict[str, Any]:
    """Open a service on a mock for each concern."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import (
        BatchSpanProcessor,
        SpanExporter,
        SpanExportResult,
    )

    from dipeo_llm import Deployment, LLMInfraService, Route, Settings, StaticAPIKeys
    from dipeo_llm.telemetry import Telemetry
    from dipeo_llm.testing import MockLLMAdapter, Reply

    def route(strategy: Any, **limits: int) -> dict[str, Any]:
        """Name the model a route over three deployments."""
        deployments = tuple(
            Deployment(
                model=f"openai/{MODEL}", api_key_id="key", name=name, base_url=url
            )
            for name, url in (("a", "http://127.0.0.1:1"), ("b", "http://127.0.0.1:2"))
        )
        limited = Deployment(
            model=f"openai/{MODEL}", api_key_id="key", name="c", **limits
        )
        return {MODEL: Route(deployments=(*deployments, limited), strategy=strategy)}

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    tracing = TracerProvider()
    tracing.add_span_processor(BatchSpanProcessor(Nowhere()))
    metering = MeterProvider([InMemoryMetricReader()])
    stack.callback(tracing.shutdown)
    stack.callback(metering.shutdown)
    variants: dict[str, dict[str, Any]] = {
        "all off": {},
        "`on_call`, a function": {"on_call": lambda record: None},
        "`on_call`, a coroutine": {"on_call": _hook},
        "telemetry, API without an SDK": {"telemetry": Telemetry()},
        "telemetry, SDK": {
            "telemetry": Telemetry(tracer_provider=tracing, meter_provider=metering)
        },
        "a route of three, shuffle": {"routes": route("shuffle")},
        "a route of three, load": {"routes": route("load")},
        "a route of three, cost": {"routes": route("cost")},
        "a route of three, usage, with limits": {
            "routes": route("usage", rpm=10**9, tpm=10**12)
        },
    }
    reply = Reply(text="word " * CHUNKS, pieces=["word "] * CHUNKS)
    return {
        name: LLMInfraService(
            StaticAPIKeys({"key": "sk-x"}),
            settings=Settings(max_retries=0),
            adapter_factory=MockLLMAdapter(default=reply),
            **options,
        )
        for name, options in variants.items()
    }


async def _compare(
    services: dict[str, Any], rounds: int
) -> dict[tuple[str, int], float]:
    """Return the least CPU in µs of a call (0) and of a stream (1) of each service."""

    async def call(service: Any) -> None:
        await service.complete(ASKED, MODEL, "key")

    async def stream(service: Any) -> None:
        async with service.stream(ASKED, MODEL, "key") as chunks:
            async for _ in chunks:
                pass

    least: dict[tuple[str, int], float] = {}
    for turn in range(rounds + 1):
        for name, service in services.items():
            for kind, (one, times) in enumerate(((call, 100), (stream, 10))):
                cpu = await _cpu(partial(one, service), times)
                if turn:
                    least[name, kind] = min(cpu, least.get((name, kind), cpu))
    return least


async def _hook(record: Any) -> None:
    pass


async def _cpu(one: Callable[[], Awaitable[None]], times: int) -> float:
    """Return the CPU of one call in µs, all threads included."""
    start = time.process_time()
    for _ in range(times):
        await one()
    return (time.process_time() - start) / times * 1e6


def parts() -> dict[str, tuple[float, float]]:
    """Measure what cannot be switched off, on a running loop: µs a call and a chunk."""
    from dipeo_llm.domain import ChatResult, TokenUsage
    from dipeo_llm.ledger import Ledger
    from dipeo_llm.progress import CallProgress
    from dipeo_llm.reports import CallReporter

    reporter, ledger = CallReporter(), Ledger()
    usage = TokenUsage(input=9, output=9, total=18)
    result = ChatResult(text="x", service="openai", model="m", token_usage=usage)

    def answered() -> CallProgress:
        progress = CallProgress(model="m")
        progress.place("openai", "m", "http://localhost/v1")
        progress.begin_attempt()
        progress.answer(result)
        return progress

    progress = answered()
    record = progress.record()
    begun = _best(lambda: reporter.begin(progress)) - _best(lambda: None)
    recorded = _best(lambda: answered().record()) - _best(answered)
    return {
        "telemetry off: the checks": (begun, 0.0),
        "a chunk's times, for the record": (0.0, _best(progress.add_chunk)),
        "the record of a call": (recorded, 0.0),
        "the ledger": (_best(lambda: ledger.add(record)), 0.0),
    }


def _best(one: Callable[[], Any], times: int = 2000, turns: int = 15) -> float:
    """Return the least CPU of one turn in µs."""
    least = float("inf")
    for _ in range(turns):
        start = time.thread_time()
        for _ in range(times):
            one()
        least = min(least, time.thread_time() - start)
    return least / times * 1e6


# --- cache hits, beside LiteLLM: a process each ---------------------------------------

HITS = {
    "litellm": "`litellm.acompletion`, a call",
    "litellm-memory": "LiteLLM's cache in memory, a hit",
    "litellm-redis": "LiteLLM's cache in Redis, a hit",
    "direct": "dipeo_llm, a call",
    "cached-memory": "dipeo_llm's cache in memory, a hit",
    "cached-redis": "dipeo_llm's cache in Redis, a hit",
}


def hits(origins: dict[str, Any], rounds: int) -> str:
    """Compare hits of the caches with calls."""
    with contextlib.ExitStack() as stack:
        workers = {name: _worker(stack, name, origins) for name in HITS}
        cpu: dict[str, list[float]] = {name: [] for name in HITS}
        for turn in range(rounds + 1):
            for name, worker in workers.items():
                n = 20 if name.startswith("litellm") else 200
                got = worker.ask(do="calls", format="openai", n=n)
                if turn:
                    cpu[name].append(got["cpu"] / n * 1e6)
    rows = []
    for name, title in HITS.items():
        ratios = [a / b for a, b in zip(cpu["litellm"], cpu[name], strict=True)]
        rows.append(
            f"| {title} | {statistics.median(cpu[name]):,.0f} | {min(cpu[name]):,.0f} |"
            f" 1/{statistics.median(ratios):.0f} |"
        )
    return table("| | CPU, µs, median | least | of a LiteLLM call |", *rows)


def _worker(
    stack: contextlib.ExitStack, name: str, origins: dict[str, Any]
) -> run.Process:
    worker = str(Path(__file__).parent / "worker.py")
    start = {"name": name, "format": "openai", "origins": origins, "core": None}
    process = run.Process([sys.executable, worker, json.dumps(start)])
    stack.callback(process.close)
    process.begin()
    return process


# --- processes ------------------------------------------------------------------------

WORK = {
    "direct": "calls to the server",
    "cached-memory": "hits in memory",
    "cached-redis": "hits in one Redis",
}
MANY = 8


def processes(
    origins: dict[str, Any], kinds: list[str], rounds: int, seconds: float
) -> str:
    """Compare calls a second of many processes with those of one."""
    rows = []
    for name in kinds:
        with contextlib.ExitStack() as stack:
            workers = [_worker(stack, name, origins) for _ in range(MANY)]
            each = 1.0 / _rate(workers[:1], 300)[0]
            ratios, used, cpus = [], [], []
            for _ in range(rounds):
                one, _, alone = _rate(workers[:1], int(seconds / each))
                many, cores, cpu = _rate(workers, int(seconds / each / MANY * 2))
                ratios.append(many / one)
                used.append(cores)
                cpus.append(cpu / alone)
        rows.append(
            f"| {WORK[name]} | {max(ratios):.2f} | {statistics.median(ratios):.2f} |"
            f" {statistics.median(used):.2f} | {statistics.median(cpus):.2f} |"
            f" {(os.cpu_count() or 1) / statistics.median(cpus):.2f} |"
        )
    return table(
        "| | best | median | cores that the processes got | CPU a call, of one's |"
        " by this CPU, on free cores |",
        *rows,
    )


def _rate(workers: list[run.Process], n: int) -> tuple[float, float, float]:
    """Return calls a second, the cores in use, and the CPU of a call in s."""
    for worker in workers:
        worker.tell(do="calls", format="openai", n=n, in_flight=16)
    got = [worker.hear() for worker in workers]
    rate = sum(n / each["wall"] for each in got)
    cores = sum(each["cpu"] / each["wall"] for each in got)
    return rate, cores, sum(each["cpu"] for each in got) / n / len(workers)


# --- lines ----------------------------------------------------------------------------


def lines_of_concerns() -> str:
    """Count the lines of code that each concern costs."""
    rows = []
    for name, files in CONCERNS.items():
        found = [PACKAGE / file for file in files if (PACKAGE / file).exists()]
        if found:
            count = sum(sum(1 for _ in code_lines(path)) for path in found)
            names = ", ".join(f"`{path.relative_to(PACKAGE)}`" for path in found)
            rows.append(f"| {name} | {count:,} | {names} |")
    whole = sum(sum(1 for _ in code_lines(path)) for path in PACKAGE.rglob("*.py"))
    rows.append(f"| the whole package | {whole:,} | |")
    return table("| | lines | modules |", *rows)


def code_lines(path: Path) -> Iterator[int]:
    """Yield the numbers of lines that hold code: no blank, comment or docstring."""
    text = path.read_text("utf-8")
    spoken: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            spoken.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    idle = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    held = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in idle
        for line in range(token.start[0], token.end[0] + 1)
    }
    yield from sorted(held - spoken)


# --- the run --------------------------------------------------------------------------


def measure(*, quick: bool) -> str:
    """Measure everything; return the tables in Markdown."""
    from tests.redis_server import RedisServer

    rounds = 3 if quick else 15
    began = time.monotonic()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    calls = asyncio.run(per_call(rounds * 2))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        redis = stack.enter_context(RedisServer(Path(folder)))
        os.environ["BENCHMARK_REDIS"] = redis.url
        serving = run.Process([sys.executable, "-m", "benchmarks.server"])
        stack.callback(serving.close)
        origins, _ = serving.begin()
        hit = hits(origins, rounds)
        many = (
            processes(origins, ["cached-memory"], 2, 0.5)
            if quick
            else processes(origins, list(WORK), 7, 1.5)
        )
    about = (
        f"Measured on {dt.datetime.now(dt.UTC):%Y-%m-%d} in"
        f" {time.monotonic() - began:.0f} s, {machine()}, load {load:.1f} at the"
        " beginning."
    )
    return "\n\n".join(
        (
            about,
            "### Telemetry, hook, ledger, routes\n\n" + calls,
            "### A hit in the cache\n\n" + hit,
            f"### {MANY} processes, of the calls a second of one\n\n" + many,
            "### Lines of code\n\n" + lines_of_concerns(),
        )
    )


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, only printed")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    text = measure(quick=options.quick)
    sys.stdout.write(f"{text}\n")
    if not options.quick:
        page = run.ROOT / "docs" / "performance.md"
        before, _, rest = page.read_text("utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
