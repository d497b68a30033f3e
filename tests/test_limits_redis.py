"""Limits in a real Redis: many processes, and a server that fails in every way."""

import asyncio
import json
import logging
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dipeo_llm.cache_url import CacheURL
from dipeo_llm.errors import RateLimitError
from dipeo_llm.limits import Limit, RateLimits, Reservation
from dipeo_llm.redis_clients import RedisClients
from tests.redis_server import RedisServer, end, needs_redis
from tests.test_limits import most_in

pytestmark = needs_redis
ONE = Limit(rpm=1)


@asynccontextmanager
async def open_limits(
    server: RedisServer, *, window: float = 60.0, query: str = ""
) -> AsyncIterator[RateLimits]:
    """Make limits with connections of their own, as another process would."""
    redis = RedisClients(CacheURL.read(server.url + query))
    limits = RateLimits(redis, window=window)
    limits.circuit._wait = 0.3
    yield limits
    await limits.aclose()
    await redis.aclose()


@pytest.fixture
async def limits(redis_server: RedisServer) -> AsyncIterator[RateLimits]:
    """Make limits in Redis."""
    async with open_limits(redis_server) as made:
        yield made


@pytest.fixture
async def others(redis_server: RedisServer) -> AsyncIterator[RateLimits]:
    """Make limits as in another process."""
    async with open_limits(redis_server) as made:
        yield made


def window_in(server: RedisServer) -> tuple[int, int]:
    """Return the requests and tokens that the one key in Redis holds."""
    with server.client() as client:
        (key,) = client.keys("*")
        rows = list(struct.iter_unpack("<3d", client.get(key)))
    return sum(int(row[1]) for row in rows), sum(int(row[2]) for row in rows)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged as a warning."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_window_is_shared(
    limits: RateLimits, others: RateLimits, redis_server: RedisServer
) -> None:
    """What one process reserves, the other cannot; the key says nothing."""
    limit = Limit(rpm=2, tpm=100)
    await limits.reserve("secret name", limit, 60)
    assert await others.wait_time("secret name", limit, 40) == 0
    assert 59 < await others.wait_time("secret name", limit, 41) <= 61
    assert await others.wait_time("secret name", limit, 101) == math.inf
    assert others.used("secret name") == (1, 60)
    await others.reserve("secret name", limit, 40)
    for one in (limits, others):
        for options in (
            {"wait": False},
            {"ends": asyncio.get_running_loop().time() + 9},
        ):
            with pytest.raises(RateLimitError) as raised:
                await one.reserve("secret name", limit, 0, **options)
            assert 55 < (raised.value.retry_after or 0) <= 61
            assert one.used("secret name") == (2, 100)
    await limits.reserve("another", limit, 100, wait=False)
    with redis_server.client() as client:
        keys = client.keys("*")
        assert {len(key) for key in keys} == {len("dipeo_llm:limit:") + 32}
        assert not any(b"secret" in key for key in keys)
        assert {60 < client.ttl(key) <= 130 for key in keys} == {True}


async def test_corrections_are_shared(
    limits: RateLimits, others: RateLimits, redis_server: RedisServer
) -> None:
    """A settlement and a refund reach Redis, and let a call of another process go."""
    limit = Limit(tpm=100)
    one = await limits.reserve("a", limit, 70)
    two = await limits.reserve("a", limit, 30)
    waiting = asyncio.create_task(others.reserve("a", limit, 50))
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    one.settle(40)
    one.settle(0)
    two.refund()
    made = await waiting
    assert time.monotonic() - begun < 2
    assert made.queued > 0.1
    assert window_in(redis_server) == (2, 90)
    made.settle(150)
    await others.aclose()
    assert window_in(redis_server) == (2, 190)
    assert await limits.wait_time("a", limit, 1) > 50


async def test_calls_without_a_limit_do_not_ask(
    limits: RateLimits, redis_server: RedisServer
) -> None:
    """They are counted in this process."""
    (await limits.reserve("a", Limit(), 70)).settle(50)
    assert limits.used("a") == (1, 50)
    with redis_server.client() as client:
        assert client.keys("*") == []


async def test_order_and_large_calls(redis_server: RedisServer) -> None:
    """First come, first served: a small call does not overtake a large one."""
    # The first one looks every 10 s, and does not wait for that.
    async with open_limits(redis_server, window=600) as limits:
        begun = time.monotonic()
        await serve_in_order(limits)
        assert time.monotonic() - begun < 5


async def serve_in_order(limits: RateLimits) -> None:
    """Make a large call wait, and small ones behind it."""
    limit = Limit(tpm=100)
    made = await limits.reserve("a", limit, 60)
    turns: list[int] = []

    async def call(tokens: int) -> None:
        await limits.reserve("a", limit, tokens)
        turns.append(tokens)

    tasks = [asyncio.create_task(call(tokens)) for tokens in (80, 10, 5)]
    await asyncio.sleep(0.1)
    with pytest.raises(RateLimitError):
        await limits.reserve("a", limit, 1, wait=False)
    assert turns == []
    made.refund()
    await asyncio.gather(*tasks)
    assert turns == [80, 10, 5]


async def test_many_at_once(limits: RateLimits, redis_server: RedisServer) -> None:
    """A burst is served in few commands, and nothing fails for lack of connections."""
    limit = Limit(rpm=4000, tpm=10**7)
    begun = time.monotonic()
    made = await asyncio.gather(
        *(limits.reserve("a", limit, number) for number in range(3000)),
        *(limits.reserve("a", limit, 7, wait=False) for _ in range(50)),
    )
    assert time.monotonic() - begun < 10
    for number, reservation in enumerate(made):
        reservation.refund() if number % 2 else reservation.settle(1)
    await limits.aclose()
    assert window_in(redis_server) == (1525, 1525)
    assert limits.used("a") == (1525, 1525)
    assert limits.circuit.failed == 0


async def test_cancelled_at_any_moment(
    limits: RateLimits, redis_server: RedisServer
) -> None:
    """Also while Redis is asked: what is counted there is what is held."""
    chance = random.Random(5)
    limit = Limit(rpm=40, tpm=600)
    held: list[int] = []

    async def call(tokens: int, *, wait: bool) -> None:
        made = await limits.reserve("a", limit, tokens, wait=wait)
        held.append(tokens)
        await asyncio.sleep(chance.random() * 0.003)
        if chance.random() < 0.5:
            held.remove(tokens)
            made.refund()

    for _ in range(20):
        tasks = [
            asyncio.create_task(call(chance.randrange(30), wait=chance.random() < 0.8))
            for _ in range(20)
        ]
        for task in chance.sample(tasks, 20):
            await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.001]))
            task.cancel()
        await asyncio.wait(tasks)
        await limits.aclose()
        assert limits.used("a") == (len(held), sum(held))
        assert window_in(redis_server) == (len(held), sum(held))
    assert limits.circuit.failed == 0


# A server that fails.


async def reserve_many(
    limits: RateLimits, number: int, limit: Limit
) -> list[Reservation]:
    """Reserve one after the other, and see that none takes long."""
    made = []
    for _ in range(number):
        begun = time.monotonic()
        made.append(await limits.reserve("a", limit, 1))
        assert time.monotonic() - begun < 1
    return made


@pytest.mark.parametrize("how", ["killed", "frozen", "full"])
async def test_calls_go_on_without_redis(
    redis_server: RedisServer, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each process keeps to its own window; two lines of log; then all share again."""
    limit = Limit(rpm=30)
    async with (
        open_limits(redis_server, query="?timeout=0.2") as limits,
        open_limits(redis_server) as others,
    ):
        made = await reserve_many(limits, 5, limit)
        match how:
            case "killed":
                redis_server.stop()
            case "frozen":
                redis_server.freeze()
            case _:
                with redis_server.client() as client:
                    client.config_set("maxmemory", 1)
        begun = time.monotonic()
        made += await reserve_many(limits, 10, limit)
        made += await asyncio.gather(
            *(limits.reserve("a", limit, 1, wait=n % 2 > 0) for n in range(10))
        )
        for reservation in made[::2]:
            reservation.settle(5)
        assert time.monotonic() - begun < 3
        assert limits.circuit.is_open
        assert limits.used("a") == (25, 25 + 13 * 4)
        with pytest.raises(RateLimitError):
            await limits.reserve("a", Limit(rpm=25), 1, wait=False)
        made[0].refund()
        match how:
            case "killed":
                redis_server.start()
            case "frozen":
                redis_server.thaw()
            case _:
                with redis_server.client() as client:
                    client.config_set("maxmemory", 0)
        await asyncio.sleep(0.4)
        await limits.reserve("a", limit, 1, wait=False)
        assert not limits.circuit.is_open
        before = others.used("a")
        await others.wait_time("a", limit, 1)
        assert before == (0, 0)
        assert others.used("a")[0] >= 1
        # What was reserved without Redis still counts here.
        with pytest.raises(RateLimitError):
            await limits.reserve("a", Limit(rpm=25), 1, wait=False)
    said = warnings(caplog)
    assert len(said) == 2, said
    assert "calls go on without shared limits" in said[0]
    assert "works again" in said[1]


async def test_redis_that_is_lost_while_calls_wait(redis_server: RedisServer) -> None:
    """They get their turn by the window of their process."""
    async with (
        open_limits(redis_server, window=1.2) as limits,
        open_limits(redis_server, window=1.2) as others,
    ):
        await others.reserve("a", Limit(rpm=3), 1)
        first = await limits.reserve("a", Limit(rpm=3), 1)
        await limits.reserve("a", Limit(rpm=3), 1)
        waiting = [
            asyncio.create_task(limits.reserve("a", Limit(rpm=3), 1)) for _ in range(2)
        ]
        await asyncio.sleep(0.1)
        redis_server.stop()
        made = await waiting[0]  # for it the other process' call does not count now
        assert made.queued < 0.6
        assert (await waiting[1]).queued > 0.8
        first.settle(3)
        redis_server.start()


async def test_redis_that_is_down_from_the_start(redis_server: RedisServer) -> None:
    """Nothing fails, and Redis is used when it is there."""
    redis_server.stop()
    async with open_limits(redis_server) as limits:
        assert await limits.wait_time("a", ONE, 1) == 0
        await reserve_many(limits, 4, Limit(rpm=10))
        redis_server.start()
        await asyncio.sleep(0.4)
        await limits.reserve("a", Limit(rpm=10), 1)
        assert window_in(redis_server) == (1, 1)


async def test_scripts_are_flushed(
    limits: RateLimits, redis_server: RedisServer
) -> None:
    """The script is loaded again, and nobody notices."""
    await limits.reserve("a", Limit(rpm=5), 1)
    with redis_server.client() as client:
        client.script_flush()
    await limits.reserve("a", Limit(rpm=5), 1)
    assert window_in(redis_server) == (2, 2)
    assert limits.circuit.failed == 0


@pytest.mark.parametrize(
    "value", [b"", b"x", b"\xff" * 24, b"\0" * 48, b"abcdefgh" * 6, b"a" * 10**6]
)
async def test_a_value_that_is_not_ours(
    limits: RateLimits, redis_server: RedisServer, value: bytes
) -> None:
    """It is an empty window."""
    (await limits.reserve("a", ONE, 1)).settle(9)
    await limits.aclose()
    with redis_server.client() as client:
        (key,) = client.keys("*")
        client.set(key, value)
    async with open_limits(redis_server) as others:
        await others.reserve("a", ONE, 5, wait=False)
        assert others.used("a") == (1, 5)


async def test_a_clock_that_was_set_back(
    limits: RateLimits, redis_server: RedisServer
) -> None:
    """Buckets of the next minute count, those of the next hour do not."""
    await limits.reserve("a", Limit(rpm=9), 1)
    with redis_server.client() as client:
        (key,) = client.keys("*")
        bucket, *_ = struct.unpack("<3d", client.get(key))
        ahead = (bucket + 3600, 5, 50, bucket + 20, 3, 30)
        client.set(key, struct.pack("<6d", *ahead))
    async with open_limits(redis_server) as others:
        await others.reserve("a", Limit(rpm=9), 1, wait=False)
        assert others.used("a") == (4, 31)
        assert window_in(redis_server) == (4, 31)
        assert 75 < await others.wait_time("a", Limit(rpm=1), 1) < 82


# Loops.


def test_loops_in_a_row_and_at_once(redis_server: RedisServer) -> None:
    """One object serves them all, and leaves no task behind."""
    redis = RedisClients(CacheURL.read(redis_server.url))
    limits = RateLimits(redis)
    limit = Limit(rpm=100)

    async def work() -> None:
        made = await asyncio.gather(*(limits.reserve("a", limit, 10) for _ in range(5)))
        for reservation in made:
            reservation.settle(2)
        made[0].refund()

    for _ in range(3):
        asyncio.run(work())

    async def at_once() -> None:
        await asyncio.gather(
            *(asyncio.to_thread(asyncio.run, work()) for _ in range(2))
        )
        await limits.aclose()
        await redis.aclose()

    asyncio.run(at_once())
    requests, _ = window_in(redis_server)
    assert requests == 25


def test_a_loop_that_ends_with_corrections_under_way(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What calls correct as they are cancelled with their loop is sent before it ends."""
    redis = RedisClients(CacheURL.read(redis_server.url))
    limits = RateLimits(redis)

    async def call() -> None:
        made = await limits.reserve("a", Limit(rpm=5), 10)
        try:
            await asyncio.sleep(60)
        finally:
            made.settle(3)

    async def work() -> None:
        for _ in range(8):
            calls.add(asyncio.create_task(call()))
        await asyncio.sleep(0.1)

    calls: set[asyncio.Task[None]] = set()
    begun = time.monotonic()
    asyncio.run(work())
    calls.clear()
    assert time.monotonic() - begun < 5
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []
    assert window_in(redis_server) == (5, 15)


def test_a_generator_that_corrects_as_its_loop_ends(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is too late for Redis: the estimate lapses, and no connection is left open."""
    redis = RedisClients(CacheURL.read(redis_server.url))
    limits = RateLimits(redis)

    async def stream() -> AsyncIterator[int]:
        made = await limits.reserve("a", Limit(rpm=5), 10)
        try:
            yield 1
        finally:
            await asyncio.sleep(0.05)
            made.settle(3)

    streams = [stream() for _ in range(3)]

    async def work() -> None:
        for one in streams:
            await anext(one)

    asyncio.run(work())
    assert [r.getMessage() for r in caplog.records if r.name == "asyncio"] == []
    assert limits.circuit.failed == 0
    with redis_server.client() as client:
        assert client.info("clients")["connected_clients"] == 1


async def test_a_thread_without_a_loop_gives_back(
    limits: RateLimits, redis_server: RedisServer
) -> None:
    """The correction is sent from the loop of the reservation."""
    made = await limits.reserve("a", ONE, 4)
    await asyncio.to_thread(made.refund)
    await asyncio.sleep(0.05)
    await limits.aclose()
    assert window_in(redis_server) == (0, 0)


# Across processes.

WORKER = """
import asyncio, json, sys, time
from dipeo_llm.cache_url import CacheURL
from dipeo_llm.limits import Limit, RateLimits
from dipeo_llm.redis_clients import RedisClients

url, window, calls, rpm, tpm = sys.argv[1:]

async def main():
    redis = RedisClients(CacheURL.read(url))
    limits = RateLimits(redis, window=float(window))
    limit = Limit(rpm=int(rpm), tpm=int(tpm))
    await limits.wait_time("a", limit, 1)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)

    async def call(number):
        made = await limits.reserve("a", limit, 10)
        at = time.time()
        print(json.dumps([at, number]), flush=True)
        made.settle(10 if number % 2 else 5)
        if number % 5 == 4:
            made.refund()

    await asyncio.gather(*(call(number) for number in range(int(calls))))
    print(json.dumps({"failed": limits.circuit.failed}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await limits.aclose()
    await redis.aclose()

asyncio.run(main())
"""


class Workers:
    """Processes that reserve at the same moment."""

    def __init__(self) -> None:
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, number: int, url: str, *arguments: str) -> None:
        """Start processes and wait until each is ready."""
        # The machine may be busy, and no process is to go on without Redis.
        url = f"{url}?timeout=10"
        for _ in range(number):
            self.processes.append(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", WORKER, url, *arguments),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
        for index in range(number):
            assert await self.read(index) == "ready"

    def go(self, *which: int) -> None:
        """Let processes reserve."""
        for index in which or range(len(self.processes)):
            stdin = self.processes[index].stdin
            assert stdin is not None
            stdin.write(b"\n")

    async def read(self, index: int) -> Any:
        """Read a line of one."""
        stdout = self.processes[index].stdout
        assert stdout is not None
        async with asyncio.timeout(60):
            line = (await stdout.readline()).decode().strip()
        return line if line == "ready" else json.loads(line)

    async def turns(self, *which: int) -> list[float]:
        """Read all turns of some processes, and that Redis did not fail them."""
        found = []
        for index in which:
            while isinstance(line := await self.read(index), list):
                found.append(line[0])
            assert line == {"failed": 0}
        return found


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    """Kill what is left of the processes at the end."""
    made = Workers()
    yield made
    await end(made.processes)


async def test_processes_keep_to_one_limit(
    redis_server: RedisServer, workers: Workers
) -> None:
    """8 processes together have no more than one may have, and are not slower."""
    await workers.start(8, redis_server.url, "3", "15", "40", "100000")
    begun = time.time()
    workers.go()
    times = await workers.turns(*range(8))
    assert len(times) == 120
    # A process notes a turn a moment after Redis gave it.
    assert most_in(times, 2.6) <= 40
    assert max(times) - begun < 10


async def test_processes_keep_to_one_limit_of_tokens(
    redis_server: RedisServer, workers: Workers
) -> None:
    """Half of the calls give half of their 10 tokens back, which the others use."""
    await workers.start(4, redis_server.url, "3", "20", "1000", "300")
    workers.go()
    times = await workers.turns(*range(4))
    assert len(times) == 80
    assert 30 <= most_in(times, 2.6) <= 60


async def test_what_a_killed_process_reserved_lapses(
    redis_server: RedisServer, workers: Workers
) -> None:
    """After SIGKILL, with calls in the line, others wait for a window and no longer."""
    await workers.start(2, redis_server.url, "2", "8", "5", "100000")
    workers.go(0)
    for _ in range(5):
        await workers.read(0)
    killed = time.time()
    workers.processes[0].kill()
    workers.go(1)
    times = await workers.turns(1)
    assert len(times) == 8
    assert 1.5 < times[0] - killed < 2.6
    assert most_in(times, 1.7) <= 5


async def test_a_stopped_process_holds_up_no_other(
    redis_server: RedisServer, workers: Workers
) -> None:
    """After SIGSTOP at the head of its line, the others go on."""
    await workers.start(2, redis_server.url, "2", "8", "5", "100000")
    workers.go(0)
    for _ in range(5):
        await workers.read(0)
    workers.processes[0].send_signal(signal.SIGSTOP)
    workers.go(1)
    assert len(await workers.turns(1)) == 8
    workers.processes[0].send_signal(signal.SIGCONT)
    assert len(await workers.turns(0)) == 3
