"""What opens, what is shared and what is left, over a service's life, on real sockets."""

import asyncio
import contextlib
import gc
import random
import re
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from dipeo_llm.errors import (
    InvalidRequestError,
    LLMTimeoutError,
    ServiceUnavailableError,
    StreamInterruptedError,
)
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Engine, Settings
from tests.conftest import HELLO, MODELS, PROVIDERS, each_provider
from tests.provider_server import Answer, ProviderServer, error

# What LiteLLM and the SDK under it keep running, for the loop or the process.
LITELLMS_TASKS = {"LoggingWorker._worker_loop"}
LITELLMS_THREADS = {"litellm-logging", "AnyIO worker thread"}
ENGINES = [engine for engine in get_args(Engine) if engine != "auto"]


async def until(true: Callable[[], Any]) -> None:
    """Wait until something holds that another task or thread brings about."""
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - a server's counter tells nobody
            await asyncio.sleep(0.005)


def call(
    service: LLMInfraService, text: str = "Hello", provider: str = "openai"
) -> asyncio.Task[Any]:
    """Begin a call."""
    messages = [{"role": "user", "content": text}]
    return asyncio.create_task(service.complete(messages, MODELS[provider], provider))


class RotatingKeys:
    """Gives out the key that is the right one now."""

    def __init__(self, base_url: str) -> None:
        self.key = "sk-old"
        self._base_url = base_url

    def get_api_key(self, api_key_id: str) -> Mapping[str, Any]:
        """Return the record of a key."""
        return {"key": self.key, "service": "openai", "base_url": self._base_url}


# --- one client --------------------------------------------------------------------


async def test_a_thousand_first_calls_share_one_client(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """However many calls come at once, there is one client with its few connections."""
    async with LLMInfraService(keys, settings=Settings(max_connections=20)) as service:
        results = await asyncio.gather(*(call(service) for _ in range(1_000)))

        assert len(service._pool) == 1
    assert [result.text for result in results] == ["Hello from the loopback."] * 1_000
    assert len(server.requests) == 1_000
    assert server.connections <= 20
    assert server.max_in_flight <= 20


async def test_a_first_call_may_be_cancelled_at_any_moment(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Cancelling the call that opens the client leaves those beside it whole."""
    for turns in range(25):
        async with LLMInfraService(keys, settings=Settings()) as service:
            leader, *followers = [call(service) for _ in range(3)]
            for _ in range(turns):
                await asyncio.sleep(0)

            leader.cancel()
            results = await asyncio.gather(*followers)

            assert [r.text for r in results] == ["Hello from the loopback."] * 2
            assert len(service._pool) == 1
            with contextlib.suppress(asyncio.CancelledError):
                await leader
    await until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_call_closes_its_connection_and_no_other(
    server: ProviderServer, keys: StaticAPIKeys, engine: Engine, stream: bool
) -> None:
    """The provider sees at once that nobody listens; the client serves on."""
    server.default = Answer(delay=60)
    server.reply(Answer(text="still here", delay=1))

    async def read() -> None:
        async with service.stream(HELLO, MODELS["openai"], "openai") as chunks:
            async for _ in chunks:
                pass

    async with LLMInfraService(keys, settings=Settings(engine=engine)) as service:
        other = call(service)
        await until(lambda: server.in_flight == 1)
        task = asyncio.create_task(read()) if stream else call(service)
        await until(lambda: server.in_flight == 2)

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await until(lambda: server.open_connections == 1)
        assert (await other).text == "still here"
        server.default = Answer(text="next")
        assert (await call(service)).text == "next"
        assert server.connections == 2
        assert len(service._pool) == 1


async def test_a_rotated_key_is_used_from_the_next_call_on(
    server: ProviderServer,
) -> None:
    """A call that runs keeps its key and its client; the next call has the new key."""
    keys = RotatingKeys(server.base_url("openai"))
    server.reply(Answer(text="old key", delay=1), Answer(text="new key"))
    async with LLMInfraService(keys, settings=Settings()) as service:
        running = call(service)
        await until(lambda: server.in_flight == 1)
        keys.key = "sk-new"

        texts = [(await call(service)).text, (await running).text]

    assert texts == ["new key", "old key"]
    first, second = server.requests
    assert first.headers["authorization"] == "Bearer sk-old"
    assert second.headers["authorization"] == "Bearer sk-new"
    assert first.connection != second.connection


async def test_a_client_that_expires_under_a_call_closes_after_it(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """The call ends well, the next has a client of its own, and both close by themselves."""
    server.reply(Answer(text="slow", delay=1), Answer(text="quick"))
    service = LLMInfraService(keys, settings=Settings(client_ttl=0.1))
    await service.initialize()
    slow = call(service)
    await until(lambda: server.in_flight == 1)
    await asyncio.sleep(0.2)

    quick = await call(service)

    assert [quick.text, (await slow).text] == ["quick", "slow"]
    assert [asked.connection for asked in server.requests] == [1, 2]
    await until(lambda: server.open_connections == 0)
    assert len(service._pool) == 0
    await service.aclose()


@each_provider
async def test_a_client_that_expires_under_a_stream_closes_after_it(
    server: ProviderServer, keys: StaticAPIKeys, provider: str
) -> None:
    """The stream is read to its end, minutes of chunks after its client was retired."""
    server.reply(Answer("abcdefgh", pieces=8, chunk_delay=0.05), Answer("quick"))
    settings = Settings(client_ttl=0.05)
    async with LLMInfraService(keys, settings=settings) as service:
        async with service.stream(HELLO, MODELS[provider], provider) as stream:
            await asyncio.sleep(0.15)  # three lives of a client
            quick = await call(service, provider=provider)
            result = await stream.result()

        assert [quick.text, result.text] == ["quick", "abcdefgh"]
        assert [asked.connection for asked in server.requests] == [1, 2]
        await until(lambda: server.open_connections == 0)


async def test_a_key_is_rotated_under_load(server: ProviderServer) -> None:
    """Of 200 calls none fails, none mixes, and each has a key of its own moment."""
    keys = RotatingKeys(server.base_url("openai"))
    server.default = lambda asked: Answer(asked.json["messages"][-1]["content"])
    wanted = []
    async with LLMInfraService(keys, settings=Settings(max_clients=2)) as service:
        await service.initialize()
        calls = []
        for number in range(200):
            keys.key = f"sk-{number // 40}"
            wanted.append((str(number), f"Bearer {keys.key}"))
            calls.append(call(service, str(number)))
            await asyncio.sleep(0)
        texts = [(await each).text for each in calls]

        assert texts == [text for text, _ in wanted]
        sent = [
            (asked.json["messages"][-1]["content"], asked.headers["authorization"])
            for asked in server.requests
        ]
        assert sorted(sent) == sorted(wanted)
        # The clients of the keys that went are not kept.
        await until(lambda: len(service._pool) <= 2)


async def test_idle_clients_beyond_the_limit_close(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """With room for two clients, the provider that was not asked for longest goes."""
    async with LLMInfraService(keys, settings=Settings(max_clients=2)) as service:
        for provider in ("openai", "anthropic", "google"):
            await call(service, provider=provider)

        await until(lambda: server.open_connections == 2)
        await call(service, provider="anthropic")

    assert [asked.connection for asked in server.requests] == [1, 2, 3, 2]


# --- max_concurrency -----------------------------------------------------------------


@each_provider
async def test_no_more_requests_are_in_flight_than_allowed(
    server: ProviderServer, keys: StaticAPIKeys, provider: str
) -> None:
    """Twelve calls at once, three at a time, and all are answered."""
    server.default = Answer(delay=0.05)
    async with LLMInfraService(keys, settings=Settings(max_concurrency=3)) as service:
        await asyncio.gather(*(call(service, provider=provider) for _ in range(12)))

    assert server.max_in_flight == 3
    assert len(server.requests) == 12


async def test_a_queue_is_first_come_first_served_and_its_time_is_told(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Each call waits for all before it, and says for how long."""
    async with LLMInfraService(keys, settings=Settings(max_concurrency=1)) as service:
        await call(service)  # opens the client
        server.requests.clear()
        server.default = Answer(delay=0.03)
        calls = []
        for number in range(6):
            calls.append(call(service, str(number)))
            await asyncio.sleep(0)
        results = [await each for each in calls]

    order = [asked.json["messages"][-1]["content"] for asked in server.requests]
    waits = [result.queued for result in results]
    assert order == ["0", "1", "2", "3", "4", "5"]
    assert waits == sorted(waits)
    assert waits[0] < 0.03 <= waits[-1] / 4


async def test_each_provider_and_each_key_has_a_queue_of_its_own(
    server: ProviderServer,
) -> None:
    """A key that waits holds up no other."""
    server.default = Answer(delay=0.2)
    records = {
        name: {"key": f"sk-{name}", "service": name.rstrip("2")}
        | {"base_url": server.base_url(name.rstrip("2"))}
        for name in ("openai", "openai2", "anthropic")
    }
    settings = Settings(max_concurrency=1)
    async with LLMInfraService(StaticAPIKeys(records), settings=settings) as service:
        await asyncio.gather(
            *(
                service.complete(HELLO, MODELS[name.rstrip("2")], name)
                for name in records
                for _ in range(2)
            )
        )

    assert server.max_in_flight == 3


async def test_a_stream_keeps_its_turn_until_it_is_left(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """A stream that is being read counts as in flight; one that is left does not."""
    server.default = Answer("abcd", pieces=4, stall_after=3)
    async with LLMInfraService(keys, settings=Settings(max_concurrency=1)) as service:
        async with service.stream(HELLO, MODELS["openai"], "openai"):
            server.default = Answer("next")
            waiting = call(service)
            await asyncio.sleep(0.1)
            assert not waiting.done()

        assert (await waiting).text == "next"


async def test_a_turn_is_never_lost_to_the_cancelled(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """However waiting calls are cancelled, the others get their turns, in order."""
    server.default = Answer(delay=0.005)
    chance = random.Random(7)
    async with LLMInfraService(keys, settings=Settings(max_concurrency=2)) as service:
        await service.initialize()
        calls = [call(service, str(number)) for number in range(60)]
        gone = set(chance.sample(range(60), 30))
        for number in sorted(gone, key=lambda _: chance.random()):
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.004]))
            calls[number].cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert (await call(service, "last")).text

    failed = [end for end in ends if isinstance(end, BaseException)]
    assert all(isinstance(end, asyncio.CancelledError) for end in failed)
    assert all(
        calls[n].done() and not calls[n].cancelled() for n in {*range(60)} - gone
    )
    assert server.max_in_flight <= 2


async def test_a_client_that_takes_anothers_place_counts_its_calls(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """The limit holds over the time to live of a client."""
    server.default = Answer(delay=0.3)
    settings = Settings(max_concurrency=1, client_ttl=0.1)
    async with LLMInfraService(keys, settings=settings) as service:
        await service.initialize()
        first = call(service)
        await asyncio.sleep(0.2)
        await asyncio.gather(first, call(service))

    assert [asked.connection for asked in server.requests] == [1, 2]
    assert server.max_in_flight == 1


async def test_a_queue_counts_against_the_deadline_and_not_against_the_timeout(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """An attempt begins with its turn."""
    server.default = Answer(delay=0.4)
    async with LLMInfraService(keys, settings=Settings(max_concurrency=1)) as service:
        await service.initialize()
        first = call(service)
        await until(lambda: server.in_flight == 1)
        asked = (HELLO, MODELS["openai"], "openai")

        with pytest.raises(LLMTimeoutError, match="deadline"):
            await service.complete(*asked, deadline=0.1)
        assert len(server.requests) == 1
        await service.complete(*asked, timeout=0.6)
        await first


async def test_a_turn_that_is_handed_to_the_cancelled_goes_on(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Whenever a call is cancelled around the moment of its turn, it passes it on."""
    async with LLMInfraService(keys, settings=Settings(max_concurrency=1)) as service:
        await call(service)
        for turns in range(60):
            holder, waiter, last = (call(service) for _ in range(3))
            async with asyncio.timeout(20):
                while not server.in_flight:  # noqa: ASYNC110 - turn by turn
                    await asyncio.sleep(0)
                while server.in_flight:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                # The answer is on its way now.
                for _ in range(turns):
                    await asyncio.sleep(0)
                waiter.cancel()
                await asyncio.wait([holder, waiter])
                assert (await last).text

    assert server.max_in_flight == 1


async def test_a_failure_says_how_long_the_call_had_queued(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """`details["queued"]` is what `ChatResult.queued` is for a success."""
    server.reply(Answer(delay=0.1), error("openai", 400, "No."))
    async with LLMInfraService(keys, settings=Settings(max_concurrency=1)) as service:
        first = call(service)
        await until(lambda: server.in_flight == 1)
        with pytest.raises(InvalidRequestError) as caught:
            await call(service)
        await first

    assert 0.02 < caught.value.details["queued"] < 30


# --- closing -----------------------------------------------------------------------


async def test_calls_that_end_within_the_grace_are_answered(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """`aclose` waits for calls in flight, and refuses new ones at once."""
    server.default = Answer(delay=0.5)
    service = LLMInfraService(keys, settings=Settings(close_grace=30))
    running = [call(service, provider=provider) for provider in PROVIDERS]
    await until(lambda: server.in_flight == 4)

    closing = asyncio.create_task(service.aclose())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        await service.complete(HELLO, MODELS["openai"], "openai")
    results = await asyncio.gather(*running)
    await closing

    assert [r.text for r in results] == ["Hello from the loopback."] * 4
    assert len(server.requests) == 4
    await until(lambda: server.open_connections == 0)


@pytest.mark.parametrize("engine", ENGINES)
@each_provider
async def test_calls_past_the_grace_end_with_an_error_that_says_why(
    server: ProviderServer,
    keys: StaticAPIKeys,
    engine: Engine,
    provider: str,
) -> None:
    """They neither hang nor blame the provider, and are not tried again."""
    server.default = Answer(delay=60)
    settings = Settings(close_grace=0.05, retry_wait=0.01, engine=engine)
    service = LLMInfraService(keys, settings=settings)
    running = call(service, provider=provider)
    await until(lambda: server.in_flight == 1)

    await service.aclose()
    with pytest.raises(ServiceUnavailableError, match="closed") as caught:
        await asyncio.wait_for(running, 30)

    assert not caught.value.retryable
    assert caught.value.attempts == 1
    assert caught.value.service == provider
    assert caught.value.model == MODELS[provider]
    assert len(server.requests) == 1
    await until(lambda: server.open_connections == 0)


@pytest.mark.parametrize(
    "settings", [Settings(max_connections=1), Settings(max_concurrency=1)]
)
async def test_calls_that_queue_for_a_connection_end_like_the_others(
    server: ProviderServer, keys: StaticAPIKeys, settings: Settings
) -> None:
    """What waits its turn when the service closes gets the error, not a cancellation."""
    server.default = Answer(delay=60)
    settings = replace(settings, close_grace=0.05)
    service = LLMInfraService(keys, settings=settings)
    await service.initialize()
    running = [call(service) for _ in range(3)]
    await until(lambda: server.in_flight == 1)
    await asyncio.sleep(0.05)

    await service.aclose()
    done, _ = await asyncio.wait(running, timeout=30)

    errors = [
        asyncio.CancelledError() if task.cancelled() else task.exception()
        for task in done
    ]
    assert [type(exc) for exc in errors] == [ServiceUnavailableError] * 3
    assert len(server.requests) == 1


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_stream_past_the_grace_is_interrupted(
    server: ProviderServer, keys: StaticAPIKeys, engine: Engine
) -> None:
    """A stream that the service closes under its reader keeps what had come."""
    server.default = Answer(text="one two three", stall_after=3)
    settings = Settings(close_grace=0.05, engine=engine)
    service = LLMInfraService(keys, settings=settings)

    async with service.stream(HELLO, MODELS["openai"], "openai") as chunks:
        await anext(chunks)
        await service.aclose()
        with pytest.raises(StreamInterruptedError, match="closed") as caught:
            await chunks.result()

    assert "one two three".startswith(caught.value.partial_text)
    assert caught.value.partial_text
    await until(lambda: server.open_connections == 0)


async def test_a_call_that_loads_a_picture_ends_with_the_service(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """No connection is left open, to whomever it leads."""
    open_connections = []

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_connections.append(writer)
        await reader.read()
        open_connections.remove(writer)
        writer.close()

    site = await asyncio.start_server(stall, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}/a.png"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    settings = Settings(allow_private_urls=True, close_grace=0.1)
    async with site:
        service = LLMInfraService(keys, settings=settings)
        await service.initialize()
        loading = asyncio.create_task(
            service.complete(
                [{"role": "user", "content": content}], MODELS["google"], "google"
            )
        )
        await until(lambda: open_connections)

        await service.aclose()

        with pytest.raises(ServiceUnavailableError, match="closed"):
            await loading
        await until(lambda: not open_connections)
    assert server.requests == []


async def test_a_task_that_outlived_a_cancellation_is_told_that_the_service_closed(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Its last call queues for a connection; nobody cancels it a second time."""
    server.default = Answer(delay=60)
    service = LLMInfraService(
        keys, settings=Settings(max_connections=1, close_grace=0.1)
    )
    await service.initialize()
    first = call(service)

    async def goes_on() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return str((await call_here(service)).text)

    async def call_here(service: LLMInfraService) -> Any:
        return await service.complete(HELLO, MODELS["openai"], "openai")

    task = asyncio.create_task(goes_on())
    await until(lambda: server.in_flight)
    task.cancel()
    await asyncio.sleep(0.1)

    await service.aclose()

    with pytest.raises(ServiceUnavailableError, match="closed"):
        await task
    await asyncio.gather(first, return_exceptions=True)


@pytest.mark.parametrize("reopened", [False, True])
async def test_a_call_that_waits_to_try_again_does_not_reopen_a_closed_service(
    server: ProviderServer, keys: StaticAPIKeys, reopened: bool
) -> None:
    """What slept through `aclose` ends, without a request and without a connection."""
    server.default = error("openai", 503, "overloaded")
    settings = Settings(retry_wait=0.5, retry_wait_max=0.5, max_retries=3)
    service = LLMInfraService(keys, settings=settings)
    running = call(service)
    await until(lambda: server.requests and not server.in_flight)

    await service.aclose()
    if reopened:
        await service.initialize()
    with pytest.raises(ServiceUnavailableError, match="closed"):
        await running

    assert len(server.requests) == 1
    await until(lambda: server.open_connections == 0)
    await service.aclose()


async def test_a_service_opens_and_closes_again_and_again(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Each life has its own connection; `initialize` and `aclose` may come twice."""
    service = LLMInfraService(keys, settings=Settings())
    for life in range(1, 4):
        await service.initialize()
        await service.initialize()
        assert (await call(service)).text
        assert server.connections == life
        await asyncio.gather(service.aclose(), service.aclose())
        await service.aclose()

        with pytest.raises(RuntimeError, match="initialize"):
            await service.complete(HELLO, MODELS["openai"], "openai")
        with pytest.raises(RuntimeError, match="initialize"):
            await service.get_available_models("openai")
        await until(lambda: server.open_connections == 0)

    async with service:
        assert (await call(service)).text


@pytest.mark.parametrize("engine", ENGINES)
async def test_after_aclose_nothing_of_ours_is_left(
    keys: StaticAPIKeys, server: ProviderServer, engine: Engine
) -> None:
    """No connection, task, timer or thread outlives `aclose`.

    What stays is LiteLLM's, if it makes the call: the thread and the task of its
    logging, and a thread in which the OpenAI SDK once looked at the platform.
    """
    loop = asyncio.get_running_loop()
    before = set(threading.enumerate())
    service = LLMInfraService(keys, settings=Settings(engine=engine))
    for provider in PROVIDERS:
        await call(service, provider=provider)
        async with service.stream(HELLO, MODELS[provider], provider) as chunks:
            await chunks.result()
        await service.get_available_models(provider)

    await service.aclose()
    await until(lambda: server.open_connections == 0)
    await asyncio.sleep(0.05)

    coroutines = {
        getattr(task.get_coro(), "__qualname__", "?")
        for task in asyncio.all_tasks() - {asyncio.current_task()}
    }
    threads = {
        re.sub(r"[-_]\d+$", "", thread.name)
        for thread in set(threading.enumerate()) - before
    }
    assert coroutines <= (LITELLMS_TASKS if engine == "litellm" else set())
    assert threads <= {"asyncio", *(LITELLMS_THREADS if engine == "litellm" else ())}
    assert [t for t in vars(loop)["_scheduled"] if not t.cancelled()] == []


async def test_a_closed_service_can_be_collected(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Nothing holds a service that was used, closed and dropped."""
    service = LLMInfraService(keys, settings=Settings())
    await call(service)
    await service.aclose()
    dropped = weakref.ref(service)
    del service
    await asyncio.sleep(0.05)
    gc.collect()

    assert dropped() is None


# --- threads, loops and the end of the process -------------------------------------


async def test_two_threads_share_a_service_but_no_connection(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Two loops at once use one service; each closes its own client at its end."""
    server.default = Answer(delay=0.02)
    service = LLMInfraService(keys, settings=Settings(max_connections=5))
    start = threading.Barrier(2)

    async def calls(text: str) -> list[str]:
        start.wait()
        results = await asyncio.gather(*(call(service, text) for _ in range(50)))
        return [result.text for result in results]

    def in_a_thread(text: str) -> list[str]:
        return asyncio.run(calls(text))

    texts = await asyncio.gather(
        asyncio.to_thread(in_a_thread, "one"), asyncio.to_thread(in_a_thread, "two")
    )

    assert list(texts) == [["Hello from the loopback."] * 50] * 2
    used = {"one": set[int](), "two": set[int]()}
    for asked in server.requests:
        used[asked.json["messages"][0]["content"]].add(asked.connection)
    assert used["one"].isdisjoint(used["two"])
    assert max(len(connections) for connections in used.values()) <= 5
    await until(lambda: server.open_connections == 0)
    await service.aclose()


@pytest.mark.parametrize(("grace", "answered"), [(30.0, True), (0.05, False)])
async def test_aclose_in_one_thread_reaches_the_calls_of_another(
    server: ProviderServer, keys: StaticAPIKeys, grace: float, answered: bool
) -> None:
    """Calls of another thread have the same grace, and the same end."""
    server.default = Answer(delay=0.5 if answered else 60)
    service = LLMInfraService(keys, settings=Settings(close_grace=grace))

    async def one_call() -> str:
        try:
            return str((await call(service)).text)
        except ServiceUnavailableError as exc:
            return str(exc)

    elsewhere = asyncio.create_task(asyncio.to_thread(asyncio.run, one_call()))
    await until(lambda: server.in_flight == 1)

    await service.aclose()
    text = await asyncio.wait_for(elsewhere, 30)

    assert ("Hello" if answered else "closed") in text
    await until(lambda: server.open_connections == 0)


PROGRAM = """
import asyncio, sys, tracemalloc
from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys

url, engine = sys.argv[1:]
keys = StaticAPIKeys({"k": {"key": "sk-x", "service": "openai", "base_url": url}})
service = LLMInfraService(keys, settings=Settings(engine=engine))
hello = [{"role": "user", "content": "Hello"}]

async def main(end):
    asyncio.get_running_loop().slow_callback_duration = 60
    await service.initialize()
    if not tracemalloc.is_tracing():
        tracemalloc.start(10)
    answer = await service.complete(hello, "gpt-4.1-nano", "k")
    assert answer.text == "Hello from the loopback.", answer
    if end == "by aclose":
        await service.aclose()
    if end == "in the middle":
        # A call and a stream that nobody waits for, and that nobody closes.
        call = asyncio.create_task(service.complete(hello, "gpt-4.1-nano", "k"))
        stream = service.stream(hello, "gpt-4.1-nano", "k")
        await stream.__aenter__()
        await anext(stream)
    if end == "still held":
        for _ in range(3):
            held.append(service.stream(hello, "gpt-4.1-nano", "k"))
            await held[-1].__aenter__()
            await anext(held[-1])
    if end == "by an error":
        raise KeyError(end)

held = []
for end in ["by aclose", "without aclose", "by an error", "in the middle", "still held"]:
    for _ in range(2):
        try:
            asyncio.run(main(end))
        except KeyError:
            assert end == "by an error"
"""


@pytest.mark.parametrize("engine", ENGINES)
async def test_programs_end_in_silence(server: ProviderServer, engine: Engine) -> None:
    """One service over many `asyncio.run`, closed or not, then the interpreter's end.

    Python's development mode reports whatever is left open, and warnings are errors.
    """
    server.default = Answer(chunk_delay=0.2)
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM],
        *[server.base_url("openai"), engine],
        cwd=Path(__file__).parent.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )

    said, complained = await asyncio.wait_for(process.communicate(), 240)

    assert (said.decode(), complained.decode()) == ("", "")
    assert process.returncode == 0
    assert len(server.requests) >= 10
    await until(lambda: server.open_connections == 0)
