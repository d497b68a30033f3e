"""A process with one library in it, which does as it is told and counts what it took.

One JSON object a line, in and out. It is a file of its own and not a module of the
package, so that it runs where only the library is installed.
"""

import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import clients

_DRAIN = 0.02
"""Seconds given to what a library still does behind an answer, such as logging it."""


class Worker:
    """Keeps the open clients of one library.

    Args:
        name: The library, as in `clients.CLIENTS`.
        origins: The server's, by name.
    """

    def __init__(self, name: str, origins: dict[str, str]) -> None:
        self._name = name
        self._origins = origins
        self._open: dict[tuple[str, str], clients.Client] = {}

    async def client(self, wire_format: str, server: str) -> clients.Client:
        """Return the open client of a format."""
        key = (wire_format, server)
        if key not in self._open:
            made = clients.CLIENTS[self._name](wire_format, self._origins[server])
            await made.open()
            self._open[key] = made
        return self._open[key]

    async def calls(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make calls, so many at once."""
        client = await self.client(order["format"], order.get("server", "short"))
        latencies: list[float] = []

        async def one() -> None:
            began = time.perf_counter()
            text = await client.call()
            latencies.append(time.perf_counter() - began)
            if not text:
                raise RuntimeError("an empty answer")

        return await _measure(one, order, latencies=latencies)

    async def streams(self, order: dict[str, Any]) -> dict[str, Any]:
        """Read streams, so many at once."""
        client = await self.client(order["format"], order["server"])
        first: list[float] = []
        latencies: list[float] = []

        async def one() -> None:
            pieces = 0
            began = time.perf_counter()
            async for _ in client.stream():
                if not pieces:
                    first.append(time.perf_counter() - began)
                pieces += 1
            latencies.append(time.perf_counter() - began)
            if pieces != order["chunks"]:
                raise RuntimeError(f"{pieces} pieces in place of {order['chunks']}")

        return await _measure(one, order, latencies=latencies, first=first)

    async def pool(self, order: dict[str, Any]) -> dict[str, Any]:
        """Take the open client out of the pool."""
        client = await self.client(order["format"], "short")
        await client.pool_hit()
        return await _measure(client.pool_hit, order)

    async def profile(self, order: dict[str, Any]) -> dict[str, Any]:
        """Say what part of a call's CPU each package takes, built-ins by who called."""
        client = await self.client(order["format"], "short")
        await _repeat(client.call, 20, 1)
        profiler = cProfile.Profile(time.process_time)
        profiler.enable()
        await _repeat(client.call, order["n"], 1)
        profiler.disable()
        shares: dict[str, float] = defaultdict(float)
        stats: Any = pstats.Stats(profiler)
        for function, (_, _, own, _, callers) in stats.stats.items():
            if function[0] != "~":
                shares[_package(function[0])] += own
                continue
            for caller, (_, _, of_caller, _) in callers.items():
                shares[_package(caller[0])] += of_caller
        whole = sum(shares.values())
        return {"shares": {name: own / whole for name, own in shares.items()}}

    async def memory(self, order: dict[str, Any]) -> dict[str, Any]:
        """Say how much memory the process holds, in bytes."""
        return {"rss": _rss()}

    async def close(self) -> None:
        """Close every client."""
        for client in self._open.values():
            with contextlib.suppress(Exception):
                await client.close()


async def _measure(
    one: Callable[[], Awaitable[None]], order: dict[str, Any], **lists: list[float]
) -> dict[str, Any]:
    """Do one thing so many times, so many at once, after as many to get warm."""
    in_flight = order.get("in_flight", 1)
    # Idle connections close between two orders; opening them is no part of a call.
    await _repeat(one, order.get("warm", in_flight), in_flight)
    for values in lists.values():
        values.clear()
    cpu, wall = time.process_time(), time.perf_counter()
    await _repeat(one, order["n"], in_flight)
    wall = time.perf_counter() - wall
    await asyncio.sleep(_DRAIN)
    return {"cpu": time.process_time() - cpu, "wall": wall, **lists}


async def _repeat(
    one: Callable[[], Awaitable[Any]], times: int, in_flight: int
) -> None:
    async def some() -> None:
        nonlocal times
        while times > 0:
            times -= 1
            await one()

    if in_flight == 1:
        await some()
    else:
        await asyncio.gather(*(some() for _ in range(in_flight)))


def _package(path: str) -> str:
    parts = Path(path).parts
    for name in ("dipeo_llm", "asyncio", "benchmarks"):
        if name in parts:
            return name
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    return "the standard library"


def _rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


async def main(start: dict[str, Any]) -> None:
    """Make a first call, say what it took, and read orders until stdin closes."""
    worker = Worker(start["name"], start["origins"])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer of ours

    def answer(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    client = await worker.client(start["format"], "short")
    await client.call()
    # Since the process began, so the interpreter's own start is in it.
    answer({"cpu": time.process_time(), "rss": _rss()})
    if start["core"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {start["core"]})
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        order = json.loads(line)
        try:
            answer(await getattr(worker, order["do"])(order))
        except Exception as exc:  # noqa: BLE001 - the other end decides
            answer({"error": f"{type(exc).__name__}: {exc}"})
    await worker.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
