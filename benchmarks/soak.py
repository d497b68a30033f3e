"""Runs the package for long and under load, and looks at what it keeps.

A hundred thousand calls, ten thousand streams and ten thousand first calls at once,
against a loopback server in a process of its own, with the memory, sockets, tasks and
threads of this process sampled on the way. Then the stalls of the event loop under two
hundred calls at once, beside bare LiteLLM in a process of its own.

A full run writes its figures into docs/reliability.md and draws docs/reliability.png;
`--quick` is a tenth of it and only prints.
"""

import argparse
import asyncio
import contextlib
import datetime as dt
import gc
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
PICTURE = ROOT / "docs" / "reliability.png"
BEGIN, END = "<!-- soak -->", "<!-- /soak -->"

MODELS = {
    "openai": "gpt-4o-mini",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2",
}
PATHS = {"openai": "/v1", "anthropic": "", "google": "/v1beta", "ollama": ""}
HELLO = [{"role": "user", "content": "Hello"}]
CALLS, STREAMS, FIRST, LOADED, AT_ONCE = 100_000, 10_000, 10_000, 20_000, 200
SAMPLES = 100
"""Taken over a series. The first tenth warms up and has no part in a slope."""


# --- the server and the clients ----------------------------------------------------------


@contextlib.contextmanager
def running_server() -> Iterator[str]:
    """Run the fast loopback server in a process; give its origin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.provider_server", "--fast"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def service_at(origin: str) -> LLMInfraService:
    """Return a service whose providers are all the server."""
    keys = {
        name: {"key": "sk-soak", "service": name, "base_url": origin + path}
        for name, path in PATHS.items()
    }
    return LLMInfraService(StaticAPIKeys(keys), settings=Settings(max_retries=0))


def call_of(service: LLMInfraService) -> Callable[[int], Awaitable[Any]]:
    """Return what makes call number n; the providers take turns."""
    names = list(MODELS)

    async def call(number: int) -> None:
        name = names[number % len(names)]
        result = await service.complete(HELLO, MODELS[name], name)
        assert result.text

    return call


def stream_of(service: LLMInfraService) -> Callable[[int], Awaitable[Any]]:
    """Return what reads stream number n; every tenth is left after its first chunk."""
    names = list(MODELS)

    async def stream(number: int) -> None:
        name = names[number % len(names)]
        async with service.stream(HELLO, MODELS[name], name) as chunks:
            async for _ in chunks:
                if number % 10 == 9:
                    return
            assert (await chunks.result()).text

    return stream


def litellm_call(origin: str) -> Callable[[int], Awaitable[Any]]:
    """Return what makes call number n through bare LiteLLM."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    litellm.suppress_debug_info = True
    names = list(MODELS)
    prefixes = {"google": "gemini", "ollama": "ollama_chat"}

    async def call(number: int) -> None:
        name = names[number % len(names)]
        # It adds the path of Google's and Anthropic's API by itself.
        base = f"{origin}/v1beta/models/{MODELS[name]}" if name == "google" else origin
        answer = await litellm.acompletion(
            f"{prefixes.get(name, name)}/{MODELS[name]}",
            [dict(message) for message in HELLO],
            api_key="sk-soak",
            api_base=base + ("/v1" if name == "openai" else ""),
            max_retries=0,
        )
        assert answer.choices[0].message.content

    return call


# --- samples -----------------------------------------------------------------------------


def numbers() -> "array[float]":
    """Return a list whose numbers are no objects, which a count of objects would see."""
    return array("d")


@dataclass(slots=True)
class Series:
    """What a process held after so many rounds."""

    name: str
    done: "array[float]" = field(default_factory=numbers)
    rss: "array[float]" = field(default_factory=numbers)
    blocks: "array[float]" = field(default_factory=numbers)
    sockets: "array[float]" = field(default_factory=numbers)
    tasks: "array[float]" = field(default_factory=numbers)
    threads: "array[float]" = field(default_factory=numbers)
    seconds: float = 0.0

    def sample(self, done: int) -> None:
        """Look now. Memory is in MiB."""
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        self.done.append(done)
        self.rss.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.blocks.append(sys.getallocatedblocks())
        self.sockets.append(open_sockets())
        self.tasks.append(len(asyncio.all_tasks()))
        self.threads.append(threading.active_count())


def open_sockets() -> int:
    """Count the sockets of this process."""
    found = 0
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            found += str(Path(entry.path).readlink()).startswith("socket:")
    return found


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the line of least squares, and its standard error."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    steep = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum(
        (b - mean_y - steep * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True)
    )
    return steep, math.sqrt(rest / (len(x) - 2) / spread)


async def series(
    name: str, rounds: int, work: Callable[[int], Awaitable[Any]]
) -> Series:
    """Do work one round after another, and sample on the way."""
    found = Series(name)
    every = max(1, rounds // SAMPLES)
    began = time.perf_counter()
    for number in range(1, rounds + 1):
        await work(number)
        if number % every == 0:
            found.sample(number)
    found.seconds = time.perf_counter() - began
    return found


# --- first calls at once -----------------------------------------------------------------


async def first_calls(origin: str, count: int) -> dict[str, float]:
    """Begin calls all at once on a service that is new; every one must be answered."""
    service = service_at(origin)
    await service.initialize()
    before = open_sockets()
    call = call_of(service)
    began = time.perf_counter()
    outcomes = await asyncio.gather(
        *(call(number) for number in range(count)), return_exceptions=True
    )
    seconds = time.perf_counter() - began
    found = {
        "calls": count,
        "errors": sum(outcome is not None for outcome in outcomes),
        "clients": len(service._pool),  # noqa: SLF001
        "sockets": open_sockets() - before,
        "seconds": seconds,
    }
    await service.aclose()
    return found | {"left": open_sockets() - before}


# --- the event loop under load -----------------------------------------------------------


async def lag(work: Callable[[int], Awaitable[Any]], count: int) -> dict[str, float]:
    """Make calls, so many at once; see how late the loop comes to a timer, in ms.

    Wall time tells what a neighbour on the loop sees, other processes included. A
    callback is one step of one task, whose CPU time is its own.
    """
    for number in range(40):
        await work(number)
    gc.collect()
    todo = iter(range(count))
    walls: list[float] = []
    pause = 0.001
    steps: list[float] = []
    run = asyncio.Handle._run  # noqa: SLF001 - as asyncio's own debug mode times it

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        steps.append((time.thread_time() - began) * 1e3)

    async def worker() -> None:
        for number in todo:
            await work(number)

    async def probe() -> None:
        while True:
            wall = time.perf_counter()
            await asyncio.sleep(pause)
            walls.append((time.perf_counter() - wall - pause) * 1e3)

    looking = asyncio.create_task(probe())
    began = time.perf_counter()
    asyncio.Handle._run = timed  # type: ignore[assignment,method-assign]  # noqa: SLF001
    try:
        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]  # noqa: SLF001
    seconds = time.perf_counter() - began
    looking.cancel()
    walls.sort()
    return {
        "calls a second": count / seconds,
        "timer late, median ms": walls[len(walls) // 2],
        "p99": walls[len(walls) * 99 // 100],
        "longest": walls[-1],
        "longest callback, CPU ms": max(steps),
        "callbacks over 50 ms": sum(step > 50 for step in steps),
    }


async def lag_of(who: str, origin: str, count: int) -> dict[str, float]:
    """Measure one of the two."""
    if who == "litellm":
        return await lag(litellm_call(origin), count)
    async with service_at(origin) as service:
        await service.initialize()
        return await lag(call_of(service), count)


def lag_in_a_process(who: str, origin: str, count: int) -> dict[str, float]:
    """Measure it where nothing else has run before."""
    command = [sys.executable, "-m", "benchmarks.soak", "--lag", who]
    done = subprocess.run(
        [*command, "--origin", origin, "--count", str(count)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- the report --------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    """Return rows, the first of them the head, as Markdown."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def span(values: Sequence[float]) -> str:
    """Tell the least and the most."""
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def report(
    first: dict[str, float],
    found: list[Series],
    lags: dict[str, dict[str, float]],
    load: float,
) -> str:
    """Return the figures as Markdown."""
    held = [["", "rounds", "seconds", "memory, first and last", "its slope",
             "Python's blocks, slope", "sockets", "tasks", "threads"]]  # fmt: skip
    for one in found:
        warm = len(one.done) // 10
        steep, error = slope(one.done[warm:], one.rss[warm:])
        more, doubt = slope(one.done[warm:], one.blocks[warm:])
        kib = 2**10 * 1_000
        held.append(
            [
                one.name,
                f"{one.done[-1]:,.0f}",
                f"{one.seconds:.0f}",
                f"{one.rss[warm]:.1f} and {one.rss[-1]:.1f} MiB",
                f"{steep * kib:+.2f} ± {error * kib:.2f} KiB for 1,000",
                f"{more * 1_000:+.1f} ± {doubt * 1_000:.1f} for 1,000",
                span(one.sockets[warm:]),
                span(one.tasks[warm:]),
                span(one.threads[warm:]),
            ]
        )
    names = list(next(iter(lags.values())))
    lagging = [["", *names]]
    for who, values in lags.items():
        lagging.append([who, *(f"{values[name]:,.1f}" for name in names)])
    machine = (
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {os.cpu_count()} cores"
        f" ({platform.machine()}), Python {platform.python_version()},"
        f" LiteLLM {version('litellm')}, aiohttp {version('aiohttp')}; the load of the"
        f" machine before the run was {load:.1f}."
    )
    at_once = (
        f"**First calls at once.** {first['calls']:,.0f} calls to four providers,"
        f" begun together on a new service: {first['errors']:.0f} errors,"
        f" {first['clients']:.0f} clients (one for each provider),"
        f" {first['sockets']:.0f} sockets at the end, {first['seconds']:.1f} s;"
        f" after `aclose`, {first['left']:.0f} sockets left."
    )
    under_load = (
        f"**The event loop under {AT_ONCE} calls at once**, the four providers mixed."
    )
    parts = [machine, at_once, "**One after another.**", table(held), under_load]
    return "\n\n".join([*parts, table(lagging)])


def draw(found: list[Series]) -> None:
    """Draw the samples."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(11, 6), sharex="col")
    for column, one in enumerate(found):
        warm = len(one.done) // 10
        top, bottom = axes[0][column], axes[1][column]
        steep, error = slope(one.done[warm:], one.rss[warm:])
        top.plot(one.done, one.rss, ".", markersize=3, label="memory")
        middle = sum(one.rss[warm:]) / len(one.rss[warm:])
        centre = sum(one.done[warm:]) / len(one.done[warm:])
        ends = [one.done[warm], one.done[-1]]
        kib = 2**10 * 1_000
        top.plot(
            ends,
            [middle + steep * (end - centre) for end in ends],
            label=f"{steep * kib:+.2f} ± {error * kib:.2f} KiB for 1,000",
        )
        top.set_ylim(0, max(one.rss) * 1.2)
        top.set_title(f"{one.done[-1]:,.0f} {one.name}")
        top.set_ylabel("resident memory, MiB")
        top.legend(loc="lower right")
        for name in ("sockets", "tasks", "threads"):
            bottom.step(one.done, getattr(one, name), label=name, where="post")
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("open")
        bottom.set_xlabel(f"{one.name} done")
        bottom.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


async def soak(origin: str, scale: int) -> tuple[dict[str, float], list[Series]]:
    """Run the series."""
    found = []
    async with service_at(origin) as service:
        for name, rounds, work in (
            ("calls", CALLS, call_of(service)),
            ("streams", STREAMS, stream_of(service)),
        ):
            found.append(await series(name, rounds // scale, work))
            print(name, f"{found[-1].seconds:.0f} s", flush=True)
    # Last, as the memory that it frees would hide a leak of the others.
    first = await first_calls(origin, FIRST // scale)
    print(first, flush=True)
    return first, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth; only prints")
    parser.add_argument("--lag", choices=["dipeo_llm", "litellm"], help="only this")
    parser.add_argument("--origin", help="of a server that runs")
    parser.add_argument("--count", type=int, default=LOADED)
    options = parser.parse_args()
    if options.lag:
        print(
            json.dumps(asyncio.run(lag_of(options.lag, options.origin, options.count)))
        )
        return
    scale = 10 if options.quick else 1
    load = os.getloadavg()[0]
    with running_server() as origin:
        first, found = asyncio.run(soak(origin, scale))
        lags = {
            who: lag_in_a_process(who, origin, LOADED // scale)
            for who in ("dipeo_llm", "litellm")
        }
    text = report(first, found, lags, load)
    print(text)
    if not options.quick:
        draw(found)
        page = PAGE.read_text("utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
