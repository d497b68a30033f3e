"""Routes in several processes, which share their state through a real Redis."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import LLMInfraService, RateLimitError, Route
from dipeo_llm.deployments import DeploymentStates
from tests.conftest import HELLO
from tests.provider_server import Answer, ProviderServer, error
from tests.redis_server import RedisServer, needs_redis
from tests.test_routing import Fleet, at, call, route

pytestmark = needs_redis


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis server."""
    with RedisServer(tmp_path) as running:
        yield running


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Run three servers."""
    async with ProviderServer() as a, ProviderServer() as b, ProviderServer() as c:
        yield Fleet([a, b, c])


def states(service: LLMInfraService) -> DeploymentStates:
    """Return the shared states of a service's deployments."""
    assert service._routing is not None
    return service._routing.states


async def test_services_see_each_others_cooldowns(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """What one service learns by a failure, the other need not learn again."""
    fleet[0].reply(error("openai", 429, retry_delay=20.0))
    routes = {"main": route(at(0), at(1))}
    async with (
        fleet.open(routes, state_url=redis_server.url) as one,
        fleet.open(routes, state_url=redis_server.url) as other,
    ):
        assert (await call(one)).tried == ["d0", "d1"]
        await asyncio.sleep(0.3)
        assert (await call(other)).tried == ["d1"]
        health = other.routes()["main"].deployments[0]
        assert 15 < health.cooling <= 20
        assert health.reason == "RateLimitError 429"
        async with fleet.open(routes, state_url=redis_server.url) as new:
            assert (await call(new)).tried == ["d1"]
    with redis_server.client() as client:
        assert not any(b"sk-test" in name for name in client.keys("*"))


async def test_the_caches_server_holds_the_state_too(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """One Redis URL is enough."""
    fleet[0].reply(error("openai", 401))
    routes = {"main": route(at(0), at(1))}
    async with fleet.open(routes, cache_url=redis_server.url) as service:
        await call(service)
    with redis_server.client() as client:
        assert client.keys("dipeo_llm:cool:*")


async def test_least_busy_counts_other_processes(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """A deployment that another service keeps busy is left alone."""
    fleet[0].default = fleet[1].default = Answer(delay=0.6)
    busy = {"main": Route(deployments=(at(0), at(1)), strategy="load")}
    alone = {"main": route(at(0), strategy="load")}
    async with (
        fleet.open(alone, state_url=redis_server.url) as one,
        fleet.open(busy, state_url=redis_server.url) as other,
    ):
        held = [asyncio.create_task(call(one)) for _ in range(4)]
        await asyncio.sleep(0.2)
        first = [asyncio.create_task(call(other)) for _ in range(2)]
        await asyncio.gather(*held, *first)
        assert {task.result().deployment for task in first} == {"d1"}
    with redis_server.client() as client:
        assert client.keys("dipeo_llm:flight:*") == []


async def test_a_hundred_streams_that_are_left_leave_no_count(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """Neither here nor in Redis."""
    fleet[0].default = Answer("word " * 20, pieces=20, chunk_delay=0.005)
    loaded = {"main": route(at(0), strategy="load")}

    async def leave(service: LLMInfraService, number: int) -> None:
        async with asyncio.timeout(0.003 * number):
            async with service.stream(HELLO, "main") as stream:
                async for _ in stream:
                    if number % 7 == 0:
                        break

    async with fleet.open(loaded, state_url=redis_server.url) as service:
        await asyncio.gather(
            *(leave(service, number) for number in range(100)), return_exceptions=True
        )
        assert service.routes()["main"].deployments[0].in_flight == 0
    with redis_server.client() as client:
        assert client.keys("dipeo_llm:flight:*") == []


KILLED = """
import asyncio, json, sys
from dipeo_llm import *
routes, keys, url = json.loads(sys.argv[1])
async def main():
    settings = Settings(state_url=url)
    async with LLMInfraService(StaticAPIKeys(keys), settings=settings, routes=routes) as s:
        calls = [asyncio.create_task(s.complete([{"role": "user", "content": "x"}], "main"))
                 for _ in range(5)]
        await asyncio.sleep(3600)
asyncio.run(main())
"""


async def test_the_count_of_a_killed_process_ends_with_its_lease(
    fleet: Fleet, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls stop counting, and no number is negative."""
    fleet[0].default = Answer(delay=60.0)
    loaded = route(at(0), strategy="load")
    key = {
        "key": "sk-test-x",
        "service": "openai",
        "base_url": fleet[0].base_url("openai"),
    }
    given = json.dumps(
        [
            {"main": loaded.model_dump(mode="json")},
            {"openai-0": key},
            redis_server.url,
        ]
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, given)
    try:
        with redis_server.client() as client:
            async with asyncio.timeout(60):
                while len(fleet[0].requests) < 5:  # noqa: ASYNC110 - a process' doing
                    await asyncio.sleep(0.05)
            async with fleet.open({"main": loaded}, state_url=redis_server.url) as here:
                assert await states(here).count_in_flight([at(0).id]) == [5]
                os.kill(process.pid, signal.SIGKILL)
                await process.wait()
                assert await states(here).count_in_flight([at(0).id]) == [5]
                (name,) = client.keys("dipeo_llm:flight:*")
                for member, ends in client.zrange(name, 0, -1, withscores=True):
                    assert ends <= time.time() + 30
                    client.zadd(name, {member: time.time() - 1})  # the lease has ended
                assert await states(here).count_in_flight([at(0).id]) == [0]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sessions_are_shared(fleet: Fleet, redis_server: RedisServer) -> None:
    """A conversation that goes on in another process stays at its deployment."""
    spread = {"main": Route(deployments=(at(0), at(1), at(2)))}
    async with (
        fleet.open(spread, state_url=redis_server.url) as one,
        fleet.open(spread, state_url=redis_server.url) as other,
    ):
        for number in range(8):
            home = (await call(one, session=f"s{number}")).deployment
            await asyncio.sleep(0.02)
            again = [(await call(other, session=f"s{number}")).deployment]
            assert again == [home]


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_routes_go_on_without_redis(
    fleet: Fleet,
    redis_server: RedisServer,
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No call fails; each process uses what it knows, and hears of others again later."""
    loaded = {"main": Route(deployments=(at(0), at(1, rpm=1000)), strategy="load")}
    url = f"{redis_server.url}?timeout=0.1"
    async with fleet.open(loaded, state_url=url) as service:
        await call(service)
        if how == "killed":
            redis_server.stop()
        else:
            redis_server.freeze()
        results: list[Any] = await asyncio.gather(
            *(call(service, session=f"s{n}") for n in range(30))
        )
        assert all(result.text for result in results)
        begun = time.monotonic()
        for _ in range(10):
            await call(service)
        assert (
            time.monotonic() - begun < 3
        )  # the circuit is open: nothing is waited for
        if how == "killed":
            redis_server.start()
        else:
            redis_server.thaw()
        await call(service)
    opened = [r for r in caplog.messages if "shared routing" in r]
    assert 1 <= len(opened) <= 2


async def test_limits_are_shared(fleet: Fleet, redis_server: RedisServer) -> None:
    """Two services together keep within a deployment's limit."""
    limited = {"main": route(at(0, rpm=5), when_busy="fail")}
    async with (
        fleet.open(limited, state_url=redis_server.url) as one,
        fleet.open(limited, state_url=redis_server.url) as other,
    ):
        results = await asyncio.gather(
            *(call(service) for service in (one, other) for _ in range(6)),
            return_exceptions=True,
        )
    assert sum(isinstance(result, RateLimitError) for result in results) == 7
    assert fleet.asked == [5, 0, 0]
