"""The cache in a real Redis: many processes, and a server that fails in every way."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import LLMInfraService, SettingsError
from dipeo_llm.cache import ResponseCache
from dipeo_llm.cache_url import CacheURL
from dipeo_llm.coalescing import Turns
from dipeo_llm.redis_clients import Circuit, RedisClients, RedisUnavailableError
from tests.conftest import HELLO, Authority, keys_for
from tests.provider_server import Answer, ProviderServer, error
from tests.redis_server import RedisServer, TLSFront, end, needs_redis
from tests.test_cache import BROKEN_VALUES, ask, in_flight, open_cached, read

pytestmark = needs_redis
MODEL = "gpt-4.1-nano"


@pytest.fixture
async def cached(
    server: ProviderServer, redis_server: RedisServer
) -> AsyncIterator[LLMInfraService]:
    """Open a service with a cache in Redis."""
    async with open_cached(server, redis_server.url) as service:
        yield service


async def test_answers_are_shared_by_services(
    cached: LLMInfraService, server: ProviderServer, redis_server: RedisServer
) -> None:
    """What one service stores the other finds, whole or as a stream, for its time."""
    first = await ask(cached)
    async with open_cached(server, redis_server.url) as other:
        second = await ask(other)
        assert (second.cached, second.original_usage) == (True, first.token_usage)
        _, third = await read(other.stream(HELLO, MODEL, "openai"))
        assert third.cached
    with redis_server.client() as client:
        (name,) = client.keys("*")
        assert name.startswith(b"dipeo_llm:")
        assert len(name) == len("dipeo_llm:") + 64
        assert 3590 < client.ttl(name) <= 3600
        assert b"Hello from" in client.get(name)
        assert b"sk-test" not in client.get(name)


async def test_a_url_says_namespace_and_time(
    server: ProviderServer, redis_server: RedisServer
) -> None:
    """Two namespaces never meet, and an entry ends after its time."""
    url = f"{redis_server.url}?namespace=one&ttl=0.3"
    async with open_cached(server, url) as one:
        await ask(one)
        async with open_cached(server, f"{redis_server.url}?namespace=two") as two:
            assert not (await ask(two)).cached
        assert (await ask(one)).cached
        await asyncio.sleep(0.35)
        assert not (await ask(one)).cached


@pytest.mark.parametrize("kind", BROKEN_VALUES)
async def test_a_damaged_value_is_a_miss(
    cached: LLMInfraService, redis_server: RedisServer, kind: str
) -> None:
    """A damaged value is a miss and is replaced."""
    await ask(cached)
    with redis_server.client() as client:
        (name,) = client.keys("*")
        client.set(name, BROKEN_VALUES[kind](client.get(name)))
        assert not (await ask(cached)).cached
        assert (await ask(cached)).cached


async def test_somebody_elses_type_is_a_miss(
    cached: LLMInfraService, redis_server: RedisServer
) -> None:
    """A key that holds a list is a miss, and not a failure of Redis."""
    await ask(cached)
    with redis_server.client() as client:
        (name,) = client.keys("*")
        client.delete(name)
        client.rpush(name, "x")
        assert not (await ask(cached)).cached
    assert cached.cache is not None
    assert cached.cache.redis is not None
    assert cached.cache.redis.reads.failed == 0


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged as a warning."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


async def answer_many(service: LLMInfraService, number: int, prefix: str) -> float:
    """Make calls one after the other, none of which may fail; return the slowest."""
    slowest = 0.0
    for count in range(number):
        begun = time.monotonic()
        assert (await ask(service, f"{prefix} {count}")).text
        slowest = max(slowest, time.monotonic() - begun)
    return slowest


def circuits(service: LLMInfraService) -> list[Circuit]:
    """Return the three circuits of a service's cache, which wait less than usual."""
    assert service.cache is not None
    assert service.cache.redis is not None
    redis = service.cache.redis
    found = [redis.reads, redis.writes, redis.locks]
    for circuit in found:
        circuit._wait = 0.3
    return found


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_calls_go_on_without_redis(
    server: ProviderServer,
    redis_server: RedisServer,
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Down or frozen, Redis costs no call, little time, and two lines of log."""
    async with open_cached(server, f"{redis_server.url}?timeout=0.2") as service:
        reads, *_ = circuits(service)
        await ask(service)
        redis_server.stop() if how == "killed" else redis_server.freeze()
        together = await asyncio.gather(*(ask(service, f"load {n}") for n in range(20)))
        assert {r.cached for r in together} == {False}
        assert await answer_many(service, 20, how) < 2
        assert reads.is_open
        assert reads.refused > 0
        redis_server.start() if how == "killed" else redis_server.thaw()
        await asyncio.sleep(0.4)
        await ask(service, "back")
        assert (await ask(service, "back")).cached
        assert not reads.is_open
    said = warnings(caplog)
    assert len(said) == 2, said
    assert "calls go on without" in said[0]
    assert "works again" in said[1]


async def test_redis_that_is_down_from_the_start(
    server: ProviderServer, redis_server: RedisServer
) -> None:
    """A service starts without Redis, and uses it when it is there."""
    redis_server.stop()
    async with open_cached(server, redis_server.url) as service:
        circuits(service)
        await answer_many(service, 5, "down")
        redis_server.start()
        await asyncio.sleep(0.4)
        await ask(service)
        assert (await ask(service)).cached


async def test_a_server_that_never_answers(server: ProviderServer) -> None:
    """A proxy that accepts and says nothing costs a fraction of a second."""

    async def say_nothing(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    try:
        async with open_cached(server, f"redis://127.0.0.1:{port}") as service:
            assert await answer_many(service, 5, "silent") < 2
    finally:
        silent.close()


async def test_a_full_server_still_serves_what_it_holds(
    server: ProviderServer, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes and locks fail, reads go on, and calls do not notice."""
    async with open_cached(server, redis_server.url) as service:
        reads, writes, locks = circuits(service)
        await ask(service, "held")
        with redis_server.client() as client:
            client.config_set("maxmemory", 1)
            await answer_many(service, 6, "full")
            assert (await ask(service, "held")).cached
            assert not reads.is_open
            assert locks.is_open
            # A call that does not wait for others writes without a lock.
            for number in range(6):
                await ask(service, f"apart {number}", coalesce=False)
            assert writes.is_open
            client.config_set("maxmemory", 0)
            await asyncio.sleep(0.4)
            await ask(service, "back")
            assert (await ask(service, "back")).cached
    assert len(warnings(caplog)) == 4


async def test_an_exhausted_pool(
    server: ProviderServer, redis_server: RedisServer
) -> None:
    """More calls at once than connections all get their answer."""
    url = f"{redis_server.url}?timeout=0.2"
    async with open_cached(server, url, max_connections=50) as service:
        assert service.cache is not None
        results = await asyncio.gather(*(ask(service, f"{n}") for n in range(200)))
        assert all(r.text for r in results)
        redis_server.freeze()
        results = await asyncio.gather(*(ask(service, f"x{n}") for n in range(200)))
        assert all(r.text for r in results)


async def test_a_cancelled_command_leaves_no_reply_behind(
    cached: LLMInfraService, server: ProviderServer
) -> None:
    """A caller that leaves at any moment does not give its answer to the next."""
    server.default = lambda asked: Answer(asked.json["messages"][0]["content"])
    texts = [f"question {n}" for n in range(5)]
    for text in texts:
        assert (await ask(cached, text)).text == text
    for count in range(60):
        call = asyncio.create_task(ask(cached, texts[count % 5]))
        await asyncio.sleep(count % 12 * 0.0002)
        call.cancel()
        await asyncio.wait([call])
        other = texts[(count + 1) % 5]
        assert (await ask(cached, other)).text == other


def test_loops_have_clients_of_their_own(redis_server: RedisServer) -> None:
    """Three loops in a row and two at once use one service."""

    async def serve() -> None:
        async with (
            ProviderServer() as server,
            LLMInfraService(keys_for(server), cache=redis_server.url) as service,
        ):
            await ask(service)
            assert (await ask(service)).cached
            await asyncio.gather(
                *(asyncio.to_thread(asyncio.run, ask(service)) for _ in range(2))
            )

    for _ in range(3):
        asyncio.run(serve())
    with redis_server.client() as client:
        assert client.info("clients")["connected_clients"] == 1


async def test_user_password_and_tls(
    server: ProviderServer, tmp_path: Path, authority: Authority
) -> None:
    """A URL's user name, password, database and TLS are used; a wrong one is harmless."""
    with RedisServer(tmp_path) as redis_server:
        with redis_server.client() as client:
            client.acl_setuser(
                "ada", enabled=True, passwords=["+p@ss"], keys=["*"], commands=["+@all"]
            )
            client.acl_setuser("default", enabled=False)
        async with TLSFront(redis_server.port, authority.server) as front:
            where = f"127.0.0.1:{front.port}/1?ssl_ca_certs={authority.file}"
            async with open_cached(server, f"rediss://ada:p%40ss@{where}") as service:
                await ask(service)
                assert (await ask(service)).cached
            url = f"rediss://ada:secret-word@{where}"
            async with open_cached(server, url) as service:
                await answer_many(service, 5, "wrong")
                reads, *_ = circuits(service)
                assert reads.is_open


async def test_no_log_shows_the_password(
    server: ProviderServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why Redis fails, without the password."""
    with RedisServer(tmp_path, "--requirepass", "right") as redis_server:
        url = f"redis://:secret-word@127.0.0.1:{redis_server.port}"
        async with open_cached(server, url) as service:
            await answer_many(service, 4, "wrong")
    assert any("invalid username-password" in said for said in warnings(caplog))
    assert "secret-word" not in caplog.text


def test_a_parameter_that_redis_does_not_know() -> None:
    """It is refused at start, and the error shows no password."""
    with pytest.raises(SettingsError, match="redis-py cannot use") as raised:
        ResponseCache("redis://:secret-word@host/0?nonsense=1")
    assert "secret-word" not in str(raised.value)


def test_the_circuit_lets_one_caller_ask(caplog: pytest.LogCaptureFixture) -> None:
    """After failures in a row callers are refused, then one asks for all."""
    circuit = Circuit("tests", failures=2, wait=0.1)
    for _ in range(2):
        assert circuit.allow()
        circuit.fail(OSError("gone"))
    assert [circuit.allow() for _ in range(3)] == [False] * 3
    time.sleep(0.11)
    assert [circuit.allow() for _ in range(3)] == [True, False, False]
    circuit.fail(OSError("gone"))
    assert not circuit.allow()
    time.sleep(0.11)
    assert circuit.allow()
    circuit.succeed()
    assert circuit.allow()
    assert len(warnings(caplog)) == 2


# Across processes.

WORKER = """
import asyncio, json, sys
from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys
from dipeo_llm.coalescing import Turns

url, origin, number, lease, text = sys.argv[1:]
number = int(number)

async def main():
    keys = StaticAPIKeys(
        {"openai": {"key": "sk-test", "service": "openai", "base_url": origin + "/v1"}}
    )
    made = Settings(timeout=60, retry_wait=0.01, max_retries=1)
    async with LLMInfraService(keys, settings=made, cache=url) as service:
        service.cache._turns = Turns(service.cache.redis, lease=float(lease))
        await service.initialize()
        print("ready", flush=True)
        sys.stdin.readline()
        messages = [{"role": "user", "content": text}]
        results = await asyncio.gather(
            *(service.complete(messages, "gpt-4.1-nano", "openai") for _ in range(number)),
            return_exceptions=True,
        )
        failed = [repr(r) for r in results if isinstance(r, Exception)]
        texts = sorted({r.text for r in results if not isinstance(r, Exception)})
        paid = sum(not r.cached for r in results if not isinstance(r, Exception))
        print(json.dumps({"failed": failed, "texts": texts, "paid": paid}), flush=True)

asyncio.run(main())
"""


class Workers:
    """Processes that ask the same at the same moment."""

    def __init__(self) -> None:
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, number: int, *arguments: str) -> None:
        """Start processes and wait until each is ready."""
        for _ in range(number):
            self.processes.append(
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-c", WORKER, *arguments),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                )
            )
        for process in self.processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"

    def go(self, *which: int) -> None:
        """Let processes ask."""
        for index in which or range(len(self.processes)):
            stdin = self.processes[index].stdin
            assert stdin is not None
            stdin.write(b"\n")

    async def results(self, *which: int) -> list[dict[str, Any]]:
        """Read what each has got."""
        found = []
        for index in which or range(len(self.processes)):
            stdout = self.processes[index].stdout
            assert stdout is not None
            async with asyncio.timeout(60):
                found.append(json.loads(await stdout.readline()))
        return found


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    """Kill what is left of the processes at the end."""
    made = Workers()
    yield made
    await end(made.processes)


async def test_many_processes_make_one_call(
    server: ProviderServer, redis_server: RedisServer, workers: Workers
) -> None:
    """8 processes with 200 identical requests each are one upstream call."""
    server.default = Answer(delay=1.0)
    await workers.start(8, redis_server.url, server.origin, "200", "9", "Hello")
    workers.go()
    found = await workers.results()
    assert len(server.requests) == 1
    assert [f["failed"] for f in found] == [[]] * 8
    assert sum(f["paid"] for f in found) == 1
    with redis_server.client() as client:
        assert len(client.keys("*")) == 1  # no lock is left


async def test_one_process_follows_a_killed_holder(
    server: ProviderServer, redis_server: RedisServer, workers: Workers
) -> None:
    """After SIGKILL exactly one of the others makes the call, and all get its answer."""
    server.default = Answer(delay=1.5)
    await workers.start(4, redis_server.url, server.origin, "20", "1.5", "Hello")
    workers.go(0)
    await in_flight(server)
    workers.go(1, 2, 3)
    await asyncio.sleep(0.3)
    workers.processes[0].kill()
    found = await workers.results(1, 2, 3)
    assert len(server.requests) == 2
    assert [f["failed"] for f in found] == [[]] * 3
    assert sum(f["paid"] for f in found) == 1


async def test_a_holder_that_is_stopped_loses_its_lease(
    server: ProviderServer, redis_server: RedisServer, workers: Workers
) -> None:
    """After SIGSTOP one other makes the call; the first one goes on unharmed."""
    server.default = Answer(delay=1.0)
    await workers.start(3, redis_server.url, server.origin, "5", "1.2", "Hello")
    workers.go(0)
    await in_flight(server)
    workers.processes[0].send_signal(signal.SIGSTOP)
    workers.go(1, 2)
    found = await workers.results(1, 2)
    assert len(server.requests) == 2
    assert sum(f["paid"] for f in found) == 1
    workers.processes[0].send_signal(signal.SIGCONT)
    (first,) = await workers.results(0)
    assert (first["failed"], first["paid"]) == ([], 1)
    assert len(server.requests) == 2


async def test_a_long_call_keeps_its_lease(
    server: ProviderServer, redis_server: RedisServer, workers: Workers
) -> None:
    """The lock is renewed for as long as the call takes."""
    server.default = Answer(delay=2.0)
    await workers.start(2, redis_server.url, server.origin, "5", "0.6", "Hello")
    workers.go()
    found = await workers.results()
    assert len(server.requests) == 1
    assert [f["failed"] for f in found] == [[]] * 2


async def test_processes_do_not_queue_for_a_failure(
    server: ProviderServer, redis_server: RedisServer, workers: Workers
) -> None:
    """When an answer cannot be kept, the processes that wait call at once, each once."""
    refusal = error("openai", 400)
    server.default = lambda _: refusal
    server.reply(Answer("cut", finish="length", delay=1.0))
    await workers.start(3, redis_server.url, server.origin, "5", "9", "Hello")
    workers.go(0)
    await in_flight(server)
    workers.go(1, 2)
    await asyncio.sleep(0.3)
    found = await workers.results()
    assert len(server.requests) == 3
    assert sorted(len(f["failed"]) for f in found) == [0, 5, 5]


async def test_redis_that_dies_while_processes_wait(
    server: ProviderServer, redis_server: RedisServer, workers: Workers
) -> None:
    """Processes that wait make their own call when Redis is gone; none fails."""
    server.default = Answer(delay=1.5)
    await workers.start(2, redis_server.url, server.origin, "5", "9", "Hello")
    workers.go(0)
    await in_flight(server)
    workers.go(1)
    await asyncio.sleep(0.3)
    redis_server.stop()
    found = await workers.results()
    redis_server.start()
    assert len(server.requests) == 2
    assert [f["failed"] for f in found] == [[]] * 2


async def test_a_cache_that_cannot_be_read_under_the_lock(
    redis_server: RedisServer,
) -> None:
    """The turn comes all the same, and the lock is given back."""

    async def fail() -> None:
        raise RedisUnavailableError

    redis = RedisClients(CacheURL.read(redis_server.url))
    async with Turns(redis).take("key", fail) as turn:
        assert turn.found is None
        with redis_server.client() as client:
            assert client.keys("*") == [b"dipeo_llm:lock:key"]
    with redis_server.client() as client:
        assert client.keys("*") == []
    await redis.aclose()


async def test_a_waiter_ends_at_its_own_deadline(
    cached: LLMInfraService, server: ProviderServer, redis_server: RedisServer
) -> None:
    """The wait for another process is part of the call's deadline."""
    from dipeo_llm import LLMTimeoutError

    server.default = Answer(delay=1.0)
    first = asyncio.create_task(ask(cached))
    await in_flight(server)
    async with open_cached(server, redis_server.url) as other:
        begun = time.monotonic()
        with pytest.raises(LLMTimeoutError):
            await ask(other, deadline=0.2)
        assert time.monotonic() - begun < 0.8
        assert (await first).text
        assert (await ask(other)).cached
    assert len(server.requests) == 1


async def test_a_cancelled_holder_hands_over(
    cached: LLMInfraService, server: ProviderServer, redis_server: RedisServer
) -> None:
    """The lock of a call that is cancelled is free at once."""
    server.default = Answer(delay=0.5)
    first = asyncio.create_task(ask(cached))
    await in_flight(server)
    async with open_cached(server, redis_server.url) as other:
        second = asyncio.create_task(ask(other))
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        first.cancel()
        assert not (await second).cached
        assert time.monotonic() - begun < 2
    assert len(server.requests) == 2
