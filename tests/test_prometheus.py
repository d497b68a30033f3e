"""Telemetry in Prometheus: names and units, and that the Grafana board finds them.

`promtool` and `prometheus` are looked for on the PATH; what needs one is skipped without.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm.domain import TokenUsage
from dipeo_llm.record import AttemptRecord, CallRecord

pytest.importorskip("opentelemetry.exporter.prometheus")

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import generate_latest, start_http_server

from dipeo_llm.telemetry import Names, Telemetry

BOARD = Path(__file__).parent.parent / "docs" / "grafana-dashboard.json"
QUERIES: list[str] = [
    target["expr"]
    for panel in json.loads(BOARD.read_text("utf-8"))["panels"]
    for target in panel["targets"]
]
DEADLINE = 60.0

ATTEMPT = AttemptRecord(start=0.1, duration=1.5)
GOOD = CallRecord(
    service="openai",
    model="gpt-4.1-nano",
    is_stream=True,
    status="ok",
    usage=TokenUsage(input=10, output=5, cached=4, cache_written=2, reasoning=3),
    cost_usd=0.25,
    started_at=1_000_000_000.0,
    duration=2.0,
    queued=0.1,
    first_chunk=0.5,
    chunks=2,
    server="https://api.openai.com",
    attempts=(ATTEMPT, ATTEMPT),
)
RECORDS = [
    GOOD,
    replace(GOOD, status="error", error="RateLimitError", usage=None, cost_usd=None),
    replace(GOOD, cached=True, attempts=()),
    replace(GOOD, service=None, model="", status="error", error="ValueError"),
]

each_version = pytest.mark.parametrize("names", ["v1.41", "latest"])
Report = Callable[[], None]


@contextmanager
def exported(names: Names) -> Iterator[Report]:
    """Export to prometheus_client's registry; give what reports some calls."""
    meters = MeterProvider([PrometheusMetricReader()])
    telemetry = Telemetry(meter_provider=meters, names=names)

    def report() -> None:
        for record in RECORDS:
            kept = telemetry.begin()
            kept.chunk_gaps.append(0.2)
            telemetry.report(record, kept)

    try:
        yield report
    finally:
        meters.shutdown()


@each_version
def test_prometheus_finds_nothing_to_complain_about(names: Names) -> None:
    """`promtool check metrics` checks names, units, types and help texts."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    with exported(names) as report:
        report()
        text = generate_latest()

    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, check=False
    )

    assert b"gen_ai_client" in text
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_metric_of_the_board_is_exported() -> None:
    """In one version of the names or the other; and its labels are there."""
    text = ""
    for names in ("v1.41", "latest"):
        with exported(names) as report:
            report()
            text += generate_latest().decode()
    series = set(re.findall(r"^(\w+)\{", text, re.MULTILINE))
    labels = set(re.findall(r'[{,](\w+)="', text)) | {"job", "__name__"}
    asked = [
        name.replace("(operation|inference)", version)
        for query in QUERIES
        for name in re.findall(r"(?:gen_ai_client|dipeo_client)[\w(|)]+", query)
        for version in ("operation", "inference")
    ]

    assert len(QUERIES) > 10
    assert set(asked) - series == set()
    matched = {name for q in QUERIES for name in re.findall(r"(\w+)(?:=~|!=|=)", q)}
    assert matched - labels == set()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def prometheus(program: str, folder: Path, target: int) -> Iterator[str]:
    """Run Prometheus on an exporter; give its address."""
    settings = folder / "prometheus.yml"
    settings.write_text(f"""
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: dipeo
    static_configs: [{{targets: ["127.0.0.1:{target}"]}}]
""")
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={settings}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def ask(url: str, query: str) -> list[float]:
    """Return the values that a query of the board has now."""
    for variable in ("$job", "$provider", "$model"):
        query = query.replace(variable, ".*")
    query = query.replace("$__rate_interval", "10s")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with opener.open(asked, timeout=5) as answer:
            found: Any = json.load(answer)["data"]["result"]
    except ConnectionError:
        return []
    except urllib.error.HTTPError as exc:
        with exc:
            if exc.code == 503:  # it is starting
                return []
            raise AssertionError(f"{query}: {exc.read().decode()}") from None
    except urllib.error.URLError as exc:
        if isinstance(exc.reason, ConnectionError):  # it has not started
            return []
        raise
    values = [float(row["value"][1]) for row in found]
    return [value for value in values if not math.isnan(value)]


@each_version
def test_every_query_of_the_board_has_an_answer(names: Names, tmp_path: Path) -> None:
    """From a Prometheus that has scraped some calls."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    with exported(names) as report:
        server, thread = start_http_server(0, "127.0.0.1")
        done = threading.Event()

        def call() -> None:
            while not done.wait(0.2):
                report()

        calling = threading.Thread(target=call)
        calling.start()
        try:
            missing = list(QUERIES)
            give_up_at = time.monotonic() + DEADLINE
            with prometheus(program, tmp_path, server.server_port) as url:
                while missing and time.monotonic() < give_up_at:
                    time.sleep(0.5)
                    missing = [query for query in missing if not ask(url, query)]
        finally:
            done.set()
            calling.join()
            server.shutdown()
            server.server_close()
            thread.join()

    assert missing == []


def test_grafanas_own_sdk_reads_the_whole_board() -> None:
    """A field with a wrong name or in a wrong place would be lost on the way."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    board = json.loads(BOARD.read_text("utf-8"))

    read = json.loads(JSONEncoder().encode(models.Dashboard.from_json(board)))

    assert list(lost("board", board, read)) == []


def lost(at: str, given: Any, read: Any) -> Iterator[str]:
    """Yield the places of what was given and is not there; more may be there."""
    if isinstance(given, dict):
        for name, value in given.items():
            yield from lost(f"{at}.{name}", value, read.get(name))
    elif isinstance(given, list) and len(given) == len(read):
        for index, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from lost(f"{at}[{index}]", one, other)
    elif given != read:
        yield at
