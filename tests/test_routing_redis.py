"""Routes in several processes, which share their state through a real Redis."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from dipeo_llm import LLMInfraService, RateLimitError, Route, Settings
from dipeo_llm.deployments import DeploymentStates
from tests.conftest import HELLO
from tests.provider_server import Answer, ProviderServer, error
from tests.redis_server import RedisServer, needs_redis
from tests.test_routing import Fleet, at, call, route

pytestmark = needs_redis


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


@pytest.mark.parametrize("kind", ["list", "bytes", "large"])
async def test_foreign_values_are_passed_over(
    fleet: Fleet,
    redis_server: RedisServer,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They cost no call, and what else is shared goes on to be."""
    loaded = {
        "main": Route(deployments=(at(0), at(1)), strategy="load"),
        "other": route(at(2), at(1)),
    }
    async with fleet.open(loaded, state_url=redis_server.url) as service:
        await call(service, session="s")
        await asyncio.sleep(0.3)
        with redis_server.client() as client:
            (session,) = client.keys("dipeo_llm:session:*")
            cools = [f"dipeo_llm:cool:{at(index).id}" for index in range(2)]
            flights = [f"dipeo_llm:flight:{at(index).id}" for index in range(2)]
            for name in (session, *cools, *flights):
                client.delete(name)
                if kind == "list":
                    client.rpush(name, "x")
                else:
                    client.set(name, b"\xff\xfe" if kind == "bytes" else b"x" * 4**10)
            client.set(f"dipeo_llm:cool:{at(2).id}", "RateLimitError 429", px=20_000)
        for _ in range(8):
            assert (await call(service, session="s")).text
        assert (await service.complete(HELLO, "other")).tried == ["d1"]
        assert not any(each.cooling for each in service.routes()["main"].deployments)
    assert "shared routing" not in caplog.text


async def test_a_cooldown_has_an_end(fleet: Fleet, redis_server: RedisServer) -> None:
    """Whatever Redis or a provider says, it is a day at most, and its reason is short."""
    fleet[0].reply(error("openai", 429, retry_delay=1e300))
    routes = {"main": route(at(0), at(1), at(2))}
    async with fleet.open(routes, state_url=redis_server.url) as service:
        assert (await call(service)).tried == ["d0", "d1"]
        with redis_server.client() as client:
            await asyncio.sleep(0.3)
            assert client.pttl(f"dipeo_llm:cool:{at(0).id}") <= 86_400_000
            client.set(f"dipeo_llm:cool:{at(1).id}", b"\xff" * 99_999, ex=10**9)
        assert (await call(service)).tried == ["d2"]
        first, second, _ = service.routes()["main"].deployments
    assert 0 < first.cooling <= 86_400
    assert 80_000 < second.cooling <= 86_400
    assert second.reason is not None
    assert len(second.reason) <= 100


async def test_redis_freezes_in_the_middle_of_a_stream(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """The stream goes on, its call is released, and the service closes in time."""
    fleet[0].default = Answer("word " * 20, pieces=20, chunk_delay=0.01)
    loaded = {"main": route(at(0, rpm=100), strategy="load")}
    url = f"{redis_server.url}?timeout=0.1"
    async with fleet.open(loaded, state_url=url) as service:
        async with service.stream(HELLO, "main") as stream:
            await anext(stream)
            redis_server.freeze()
            result = await stream.result()
        assert result.text
        assert service.routes()["main"].deployments[0].in_flight == 0
        begun = time.monotonic()
        await service.aclose()
        assert time.monotonic() - begun < 4
        redis_server.thaw()


async def test_a_call_of_a_loop_that_has_ended_is_forgotten_quietly(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """Dropped later, in another loop or in none, it leaves its lease to end."""
    shared = states(
        service := LLMInfraService(
            fleet.keys(),
            settings=Settings(state_url=redis_server.url),
            routes={"main": route(at(0), strategy="load")},
        )
    )

    def begin_elsewhere() -> Callable[[], None]:
        async def begin() -> Callable[[], None]:
            return shared.begin(at(0).id, is_shared=True)

        return asyncio.run(begin())

    end = await asyncio.to_thread(begin_elsewhere)
    end()
    await asyncio.to_thread(await asyncio.to_thread(begin_elsewhere))
    assert service.routes()["main"].deployments[0].in_flight == 0
    await service.aclose()


async def test_processes_do_not_queue_for_a_fallbacks_answer(
    fleet: Fleet, redis_server: RedisServer
) -> None:
    """It is not stored where they look, so none waits for another one's."""
    fleet[0].default = error("openai", 401)
    fleet[1].default = Answer(delay=0.5)
    routes = {"main": route(at(0), fallbacks=("spare",)), "spare": route(at(1))}
    async with AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(fleet.open(routes, redis_server.url))
            for _ in range(6)
        ]
        begun = time.monotonic()
        results = await asyncio.gather(*(call(service) for service in services))
        assert time.monotonic() - begun < 2.5
    assert {result.deployment for result in results} == {"d1"}
