"""Routes under unusual conditions: what must hold in each of them."""

import asyncio
import base64
import gc
import json
import pickle
import random
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import stamina
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dipeo_llm import (
    APIKeyError,
    CacheMissError,
    CallError,
    ChatResult,
    Deployment,
    InvalidRequestError,
    LLMInfraService,
    LLMTimeoutError,
    Message,
    PersonLLMConfig,
    RateLimitError,
    Route,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    dipeo,
)
from dipeo_llm.cli import main
from dipeo_llm.routes import Strategy
from dipeo_llm.telemetry import Telemetry
from dipeo_llm.testing import MockLLMAdapter
from tests.conftest import HELLO, MODELS
from tests.provider_server import PNG, Answer, ProviderServer, Raw, error
from tests.test_routing import OPENAI, Ask, Fleet, at, call, each_way, read, route

ANTHROPIC = f"anthropic/{MODELS['anthropic']}"


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Run three servers."""
    async with ProviderServer() as a, ProviderServer() as b, ProviderServer() as c:
        yield Fleet([a, b, c])


def in_flight(service: LLMInfraService) -> list[int]:
    """Return the calls in flight of each deployment of the route."""
    return [each.in_flight for each in service.routes()["main"].deployments]


# Owners of keys.


@each_way
async def test_two_owners_share_no_fallback(fleet: Fleet, ask: Ask) -> None:
    """A fallback with the call's own key is asked for each of them."""
    fleet[0].default = error("openai", 503)
    fleet[1].default = Answer(delay=0.2)
    bare = Deployment(model=OPENAI, base_url=fleet[1].base_url("openai"))
    routes = {"main": route(at(0), fallbacks=("spare",)), "spare": route(bare)}
    async with fleet.open(routes, cache="memory://") as service:
        results = await asyncio.gather(
            ask(service, api_key_id="openai-1"), ask(service, api_key_id="openai-2")
        )
    assert [result.cached for result in results] == [False, False]
    assert {request.headers["authorization"] for request in fleet[1].requests} == {
        "Bearer sk-test-openai-1",
        "Bearer sk-test-openai-2",
    }


async def test_a_key_does_not_follow_a_deployments_address(fleet: Fleet) -> None:
    """Another provider's key, good for its own gateway, is not sent elsewhere."""
    foreign = at(1, api_key_id="anthropic-0", base_url=fleet[1].base_url("openai"))
    async with fleet.open({"main": route(foreign)}) as service:
        with pytest.raises(APIKeyError, match="belongs to anthropic"):
            await call(service)
    assert fleet.asked == [0, 0, 0]


# With the cache.


@each_way
async def test_only_never_sends(fleet: Fleet, ask: Ask) -> None:
    """Not even to a fallback, if no deployment of the route has a key."""
    lost = at(0, api_key_id="nobody's")
    routes = {"main": route(lost, fallbacks=("spare",)), "spare": route(at(1))}
    async with fleet.open(routes, cache="memory://") as service:
        with pytest.raises(CacheMissError):
            await ask(service, cache="only")
    assert fleet.asked == [0, 0, 0]


@each_way
async def test_the_record_of_a_shared_call_says_what_answered(
    fleet: Fleet, ask: Ask
) -> None:
    """Provider, model and address are those of the deployment that answered; so of a hit."""
    fleet[0].reply(error("openai", 503))
    both = {"main": route(at(0), at(1, ANTHROPIC))}
    async with fleet.open(both, cache="memory://") as service:
        assert [(await ask(service)).cached for _ in range(2)] == [False, True]
    for record in fleet.records:
        assert (record.deployment, record.service) == ("d1", "anthropic")
        assert (record.model, record.server) == (
            MODELS["anthropic"],
            f"http://127.0.0.1:{fleet[1].port}",
        )


async def test_the_wait_of_a_shared_call_is_reported(fleet: Fleet) -> None:
    """`queued` is not lost where identical calls share a request."""
    fleet[0].reply(error("openai", 429, retry_delay=0.4))
    one = {"main": route(at(0))}
    async with fleet.open(one, cache="memory://", max_retries=0) as service:
        with pytest.raises(RateLimitError):
            await call(service)
        assert (await call(service)).queued > 0.2


# Attempts.


@pytest.mark.parametrize("cache", [None, "memory://"])
async def test_what_was_not_sent_is_not_counted(
    fleet: Fleet, cache: str | None
) -> None:
    """Neither what a model cannot do, nor a picture that cannot be read."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,@"}}
    broken = [{"role": "user", "content": [{"type": "text", "text": "?"}, picture]}]
    schema = {"type": "object", "properties": {}}
    routes = {
        "main": route(at(0, "openai/gpt-4")),
        "seeing": route(at(0, "openai/gpt-4o"), at(1, "openai/gpt-4o")),
    }
    async with fleet.open(routes, cache=cache) as service:
        with pytest.raises(InvalidRequestError) as caught:
            await call(service, response_format=schema)
        assert caught.value.attempts == 0
        with pytest.raises(InvalidRequestError, match="base64") as caught:
            await service.complete(broken, "seeing")
        assert caught.value.attempts == 0
    assert [record.requests for record in fleet.records] == [0, 0]
    assert fleet.asked == [0, 0, 0]


async def test_an_unfit_deployment_does_not_extend_the_budget(fleet: Fleet) -> None:
    """A failure before an attempt begins takes no earlier attempt back."""
    for server in fleet.servers:
        server.default = error("openai", 500)
    # Anthropic's form takes no sound; the table knows nothing of this model.
    deaf = at(1, "anthropic/claude-of-my-own")
    sound = {
        "type": "input_audio",
        "input_audio": {"data": "UklGRg==", "format": "wav"},
    }
    listen = [{"role": "user", "content": [sound]}]
    first, last = (
        at(index, "openai/gpt-of-my-own", api_key_id=f"openai-{index}")
        for index in (0, 2)
    )
    async with fleet.open({"main": route(first, deaf, last)}, max_retries=1) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await service.complete(listen, "main")
    assert caught.value.attempts == sum(fleet.asked) == 2
    assert fleet.asked[1] == 0


async def test_a_refused_key_waits_for_a_short_cooldown(fleet: Fleet) -> None:
    """What is not worth a retry is worth a wait for another deployment."""
    fleet[0].reply(error("openai", 429, retry_delay=0.3))
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        assert (await call(service)).deployment == "d1"
        fleet[1].default = error("openai", 401)
        assert (await call(service, deadline=10)).tried == ["d1", "d0"]


async def test_switching_retries_off_switches_fallbacks_off(fleet: Fleet) -> None:
    """As `max_retries=0` does: what was not sent still leads on."""
    fleet[2].default = error("openai", 503)
    routes = {
        "main": route(at(0, api_key_id="nobody's"), at(1)),
        "failing": route(at(2), at(1)),
    }
    async with fleet.open(routes) as service:
        stamina.set_active(False)
        try:
            assert (await call(service)).deployment == "d1"
            with pytest.raises(ServiceUnavailableError):
                await service.complete(HELLO, "failing")
        finally:
            stamina.set_active(True)
    assert fleet.asked == [0, 1, 1]


async def test_a_batch_goes_on_while_a_deployment_may_answer(fleet: Fleet) -> None:
    """A refused key is fatal only if all that was tried was refused."""
    fleet[0].default = error("openai", 401)
    fleet[1].reply(error("openai", 503))
    rows = [{"messages": HELLO, "model": "main"} for _ in range(4)]
    async with fleet.open({"main": route(at(0), at(1))}, max_retries=1) as service:
        async with service.complete_many(rows, concurrency=1) as batch:
            items = [item async for item in batch]
        assert (batch.totals.succeeded, batch.totals.failed) == (3, 1)
        assert batch.totals.attempts == sum(fleet.asked) == 5
        assert isinstance(items[0].error, APIKeyError)
    fleet[1].default = error("openai", 401)
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        with pytest.raises(APIKeyError):
            _ = [item async for item in service.complete_many(rows, concurrency=1)]


# Configuration.


async def test_each_route_has_its_own_idea_of_a_deployment(fleet: Fleet) -> None:
    """Prices and context windows of one route are not another's."""
    routes = {
        "small": route(at(0, context_window=100)),
        "main": route(at(0, context_window=100_000), at(1)),
    }
    long = [{"role": "user", "content": "word " * 4_000}]
    async with fleet.open(routes) as service:
        assert (await service.complete(long, "main")).tried == ["d0"]


async def test_cycles_and_diamonds_take_each_deployment_once(fleet: Fleet) -> None:
    """However fallbacks lead to each other, and by whatever name."""
    for server in fleet.servers:
        server.default = error("openai", 503)
    routes = {
        "main": route(at(0), fallbacks=("left", "right")),
        "left": route(at(1), fallbacks=("end", "main")),
        "right": route(at(1, name="again"), fallbacks=("end",)),
        "end": route(at(2), at(0, name="zero"), fallbacks=("left",)),
    }
    async with fleet.open(routes, max_retries=2) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await call(service)
    assert fleet.asked == [1, 1, 1]
    assert len(caught.value.details["tried"]) == 3


async def test_a_session_may_be_long(fleet: Fleet) -> None:
    """It is kept as a digest; equal names in two routes are two sessions."""
    spread = Route(deployments=(at(0), at(1), at(2)))
    async with fleet.open({"main": spread, "main:a": spread}) as service:
        for session in ("é" * 1_000_000, "a\n\x00b", "🎈"):
            homes = {(await call(service, session=session)).deployment for _ in "1234"}
            assert len(homes) == 1
        kept = service._routing.states._sessions  # type: ignore[union-attr]
        assert max(map(len, kept)) == 32
        await call(service, session="a:b")
        before = len(kept)
        await service.complete(HELLO, "main:a", session="b")
        assert len(kept) == before + 1


@pytest.mark.parametrize(
    "content", [["text"], [None], [{"type": ["x"]}], {"a": 1}, 5, [{"text": 5}]]
)
async def test_odd_content_ends_as_without_a_route(fleet: Fleet, content: Any) -> None:
    """Reading what a request needs raises nothing."""
    odd = [{"role": "user", "content": content}]
    async with fleet.open({"main": route(at(0))}) as service:
        ways = [(OPENAI, "openai-0"), ("main", None)]
        plain, routed = [
            await asyncio.gather(service.complete(odd, *way), return_exceptions=True)
            for way in ways
        ]
        assert type(plain[0]) is type(routed[0])
        assert isinstance(plain[0], ChatResult | InvalidRequestError)
        assert in_flight(service) == [0]


# Ends.


async def test_closing_the_service_blames_nobody(fleet: Fleet) -> None:
    """Calls that `aclose` ends start no cool-down, which other processes would see."""
    for server in fleet.servers:
        server.default = Answer(delay=9)
    async with fleet.open({"main": route(at(0), at(1))}, close_grace=0.1) as service:
        tasks = [asyncio.create_task(ask(service)) for ask in (call, read)]
        async with asyncio.timeout(5):
            while fleet.asked[0] < 2:  # noqa: ASYNC110 - a server's doing
                await asyncio.sleep(0.01)
        await service.aclose()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        health = service.routes()["main"].deployments
    assert [type(each) for each in errors] == [ServiceUnavailableError] * 2
    assert [(each.cooling, each.failures) for each in health] == [(0.0, 0), (0.0, 0)]
    assert [each.in_flight for each in health] == [0, 0]
    assert fleet.asked == [2, 0, 0]


@pytest.mark.parametrize("cache", [None, "memory://"])
@pytest.mark.parametrize("how", ["left", "dropped", "closed elsewhere", "cancelled"])
async def test_streams_are_released_with_a_cache_too(
    fleet: Fleet, cache: str | None, how: str
) -> None:
    """At once, or when the garbage collector finds them; nobody is blamed."""
    fleet[0].default = Answer("word " * 30, pieces=30, chunk_delay=0.05)
    loaded = {"main": route(at(0), strategy="load")}
    async with fleet.open(loaded, cache=cache) as service:
        stream = await service.stream(HELLO, "main").__aenter__()
        await anext(stream)
        assert in_flight(service) == [1]
        if how == "left":
            await stream.aclose()
        elif how == "dropped":
            del stream
            gc.collect()
            await asyncio.sleep(0.1)
        else:
            reading = asyncio.create_task(stream.result())
            await asyncio.sleep(0.1)
            if how == "cancelled":
                reading.cancel()
            else:
                await asyncio.create_task(stream.aclose())
            await asyncio.gather(reading, return_exceptions=True)
            assert reading.cancelled() == (how == "cancelled")
            await stream.aclose()
        assert in_flight(service) == [0]
        (health,) = service.routes()["main"].deployments
        assert (health.failures, health.cooling) == (0, 0.0)
    assert len(fleet.records) == 1


async def test_the_span_of_a_failed_route_says_what_was_tried(fleet: Fleet) -> None:
    """Also where the error is that of the first deployment."""
    exporter, tracing = InMemorySpanExporter(), TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    fleet[0].default = error("openai", 503)
    fleet[1].default = error("openai", 401)
    async with LLMInfraService(
        fleet.keys(),
        settings=Settings(),
        routes={"main": route(at(0), at(1))},
        telemetry=Telemetry(tracer_provider=tracing),
    ) as service:
        with pytest.raises(ServiceUnavailableError):
            await call(service)
    said = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    (whole,) = (each for each in said if "dipeo.route" in each)
    assert whole["dipeo.tried"] == ("d0", "d1")
    assert whole["error.type"] == "ServiceUnavailableError"
    assert len(said) == 3


async def test_a_hundred_deployments(fleet: Fleet) -> None:
    """A call that finds 98 of them failing goes through them in little time."""
    fleet[0].default = error("openai", 503)
    bad = [at(0, f"openai/m{number}", name=f"m{number}") for number in range(98)]
    many = {"main": route(*bad, at(1), at(2))}
    async with fleet.open(many, max_retries=99) as service:
        result = await call(service)
    assert result.deployment == "d1"
    assert result.attempts == len(result.tried) == 99


class Text(str):
    """A text that a weak reference can watch."""

    __slots__ = ("__weakref__",)


@contextmanager
def no_collection() -> Iterator[None]:
    """Let only reference counts free what is dropped."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("way", [("main", None), (OPENAI, "openai-1")])
@pytest.mark.parametrize("cache", [None, "memory://"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_call_that_has_ended_is_not_kept_alive(
    fleet: Fleet,
    answers: bool,
    way: tuple[str, str | None],
    cache: str | None,
    is_stream: bool,
) -> None:
    """Neither by the errors of deployments that failed, nor by what it knew itself."""
    fleet[0].default = error("openai", 503)
    if not answers:
        fleet[1].default = error("openai", 503)
    both = {"main": route(at(0), at(1), failures=99)}

    async def ask_once() -> "weakref.ref[Text]":
        text = Text(f"Hello {random.random()}")
        try:
            messages = [{"role": "user", "content": text}]
            if not is_stream:
                await service.complete(messages, *way)
            else:
                async with service.stream(messages, *way) as stream:
                    await stream.result()
        except ServiceUnavailableError:
            assert not answers
        return weakref.ref(text)

    async with fleet.open(both, cache=cache, max_retries=1) as service:
        await ask_once()
        with no_collection():
            text = await ask_once()
            await asyncio.sleep(0.05)
            assert text() is None


async def test_a_routes_error_is_pickled(fleet: Fleet) -> None:
    """With its list of what was tried."""
    fleet[0].default = fleet[1].default = error("openai", 503)
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await call(service)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.details, again.attempts) == (caught.value.details, 4)


def test_three_event_loops_leave_no_count() -> None:
    """Calls and streams that are open when their loop ends are released."""
    kept: list[Any] = []
    loaded = Route(
        strategy="load",
        deployments=(Deployment(model=OPENAI, api_key_id="k"),),
        cooldown=0,
    )
    service = LLMInfraService(
        StaticAPIKeys({}), settings=Settings(), routes={"main": loaded}
    )

    async def run() -> None:
        async with ProviderServer() as server:
            server.default = Answer("word " * 30, pieces=30, chunk_delay=0.1)
            key = {
                "key": "sk-test-x",
                "service": "openai",
                "base_url": server.base_url("openai"),
            }
            service.api_key_service = StaticAPIKeys({"k": key})
            await call(service)
            stream = await service.stream(HELLO, "main").__aenter__()
            await anext(stream)
            server.default = Answer(delay=1)
            kept.extend([stream, asyncio.create_task(call(service))])
            async with asyncio.timeout(5):
                while in_flight(service) != [2]:  # noqa: ASYNC110 - no event says so
                    await asyncio.sleep(0.01)

    for _ in range(3):
        asyncio.run(run())
        assert in_flight(service) == [0]


# The application's own parts.


@pytest.mark.parametrize("cache", [None, "memory://"])
async def test_the_applications_own_key_error_leads_on(
    fleet: Fleet, cache: str | None
) -> None:
    """An error that is called APIKeyError, as DiPeO's is, means a missing key."""

    class Keys:
        async def get_api_key(self, api_key_id: str) -> Any:
            await asyncio.sleep(0)
            if api_key_id == "lost":
                raise type("APIKeyError", (Exception,), {})("no such key")
            return fleet.keys().get_api_key(api_key_id)

    both = {"main": route(at(0, api_key_id="lost"), at(1))}
    async with fleet.open(both, cache=cache) as service:
        service.api_key_service = Keys()
        result = await call(service)
        assert (result.tried, result.attempts) == (["d0", "d1"], 1)


@pytest.mark.parametrize("how", ["slow", "broken"])
async def test_a_key_port_that_fails_uses_no_limit_up(fleet: Fleet, how: str) -> None:
    """What was not sent is given back; the port's own error reaches the caller."""

    class Keys:
        async def get_api_key(self, api_key_id: str) -> Any:
            if how == "broken":
                raise OSError("the database is down")
            await asyncio.sleep(9)

    async with fleet.open({"main": route(at(0, rpm=1))}) as service:
        service.api_key_service = Keys()
        for ask in (call, read):
            with pytest.raises((OSError, LLMTimeoutError)):
                await ask(service, deadline=0.1)
        (health,) = service.routes()["main"].deployments
        assert (health.requests_per_minute, health.tokens_per_minute) == (0, 0)
        assert (health.in_flight, health.cooling) == (0, 0.0)
        service.api_key_service = fleet.keys()
        assert (await call(service)).deployment == "d0"


async def test_pictures_are_loaded_once_for_a_provider(
    fleet: Fleet, tmp_path: Path
) -> None:
    """However many deployments may get them; each provider gets its own form."""
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    part = {"type": "image_url", "image_url": {"url": picture}}
    look = [{"role": "user", "content": [part]}]
    fleet[0].default = fleet[1].default = error("openai", 503)
    vision = "openai/gpt-4o"
    routes = {"main": route(at(0, vision), at(1, vision), at(2, ANTHROPIC))}

    def delete(received: Any) -> Raw:
        picture.unlink()
        return error("openai", 503)

    fleet[0].reply(delete)
    async with fleet.open(routes, base_dir=tmp_path, max_retries=1) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await service.complete(look, "main")
    assert fleet.asked == [1, 1, 0]
    assert caught.value.attempts == 2
    first, second = (server.requests[0].body for server in fleet.servers[:2])
    assert first == second
    assert base64.b64encode(PNG) in first


async def test_a_mock_adapter_answers_for_a_route(fleet: Fleet) -> None:
    """An application's tests of routes need no server."""
    mock = MockLLMAdapter("Hi")
    async with LLMInfraService(
        fleet.keys(), adapter_factory=mock, routes={"main": route(at(0), at(1))}
    ) as service:
        result = await call(service)
    assert (result.text, result.route, result.deployment) == ("Hi", "main", "d0")
    assert fleet.asked == [0, 0, 0]


async def test_dipeos_service_takes_routes(fleet: Fleet) -> None:
    """Under the names and in the order of arguments that DiPeO uses."""
    config = PersonLLMConfig(model="main", api_key_id="openai-0")
    said = [Message(from_person_id="x", to_person_id="y", content="Hi")]
    async with dipeo.LLMInfraService(
        fleet.keys(), routes={"main": route(at(0), at(1))}
    ) as service:
        results = [
            await service.complete(HELLO, "main", "openai-0"),
            await service.complete_with_person(said, "y", config),
        ]
        # With a service it is the name of a model.
        plain = await service.complete(HELLO, "main", "openai-0", service_name="openai")
    assert plain.route is None
    assert [result.deployment for result in results] == ["d0", "d0"]


async def test_the_batch_command_takes_a_route(
    fleet: Fleet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the file of routes; a refused key of one deployment does not stop it."""
    monkeypatch.chdir(tmp_path)
    bases = [server.base_url("openai") for server in fleet.servers]
    deployments = [
        {"model": OPENAI, "name": f"d{index}", "base_url": base, "api_key_id": "openai"}
        for index, base in enumerate(bases)
    ]
    routes = {"fast": {"deployments": deployments}}
    (tmp_path / "routes.json").write_text(json.dumps({"routes": routes}), "utf-8")
    rows = [{"prompt": f"{number}"} for number in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    monkeypatch.setenv("DIPEO_LLM_ROUTES", "routes.json")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-of-the-environment")
    fleet[0].default = error("openai", 401)
    command = ["batch", "in.jsonl", "out.jsonl", "--model", "fast"]
    code = await asyncio.to_thread(main, command)
    said = capsys.readouterr().err
    assert (code, "12 answered, 0 failed, 0 left" in said) == (0, True), said
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
    found = [json.loads(line) for line in lines]
    assert {each["result"]["deployment"] for each in found} == {"d1", "d2"}


def test_two_threads_share_a_service() -> None:
    """Each with its event loop; the accounts are one, and end at 0."""
    loaded = Route(
        strategy="load",
        deployments=(Deployment(model=OPENAI, api_key_id="k", rpm=1000),),
    )
    service = LLMInfraService(
        StaticAPIKeys({}), settings=Settings(), routes={"main": loaded}
    )

    async def run() -> None:
        async def ask(number: int) -> None:
            async with asyncio.timeout(0.01 * number if number % 3 else None):
                await (read(service) if number % 2 else call(service))

        errors = await asyncio.gather(
            *(ask(number) for number in range(60)), return_exceptions=True
        )
        assert {type(each) for each in errors} <= {type(None), TimeoutError}

    async def serve() -> None:
        async with ProviderServer() as server:
            server.default = Answer(delay=0.02)
            key = {
                "key": "sk-test-x",
                "service": "openai",
                "base_url": server.base_url("openai"),
            }
            service.api_key_service = StaticAPIKeys({"k": key})
            await call(service)
            threads = [asyncio.to_thread(asyncio.run, run()) for _ in range(2)]
            await asyncio.gather(*threads)
            await service.aclose()

    asyncio.run(serve())
    (health,) = service.routes()["main"].deployments
    assert (health.in_flight, health.failures) == (0, 0)
    assert health.calls >= 41


# Any routes, any failures.

FAILURES = [
    *(error("openai", status) for status in (400, 401, 404, 429, 500, 503)),
    error("openai", 429, code="insufficient_quota"),
    error("openai", 400, code="context_length_exceeded"),
    Answer(error_after=1),
    Answer("one two three four", error_after=4),
    Answer(),
]


@st.composite
def any_routes(draw: st.DrawFn) -> dict[str, Route]:
    """Draw one to three routes over three servers, which may lead to each other."""
    names = ["main", "a", "b"][: draw(st.integers(1, 3))]

    def draw_deployment(index: int) -> Deployment:
        if draw(st.integers(0, 5)) == 0:
            return at(index, name=f"x{index}", api_key_id=f"nobody's-{index}")
        return at(index, rpm=draw(st.sampled_from([None, None, 1, 2])))

    def draw_route(name: str) -> Route:
        places = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
        others = st.lists(st.sampled_from(names), max_size=2).map(
            lambda found: tuple(other for other in found if other != name)
        )
        return Route(
            deployments=tuple(draw_deployment(index) for index in draw(places)),
            strategy=draw(st.sampled_from(get_args(Strategy))),
            fallbacks=draw(others),
            context_window_fallbacks=draw(others),
            cooldown=draw(st.sampled_from([0.0, 0.05, 30.0])),
            failures=draw(st.integers(1, 3)),
            when_busy=draw(st.sampled_from(["wait", "fail"])),
        )

    return {name: draw_route(name) for name in names}


@given(
    routes=any_routes(),
    failures=st.lists(
        st.lists(st.sampled_from(FAILURES), max_size=3), min_size=3, max_size=3
    ),
    asks=st.lists(st.sampled_from([call, read]), min_size=1, max_size=3),
    max_retries=st.integers(0, 4),
    cache=st.sampled_from([None, "memory://"]),
    cancel_after=st.none() | st.floats(0, 0.03),
)
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_routes(
    routes: dict[str, Route],
    failures: list[list[Any]],
    asks: list[Ask],
    max_retries: int,
    cache: str | None,
    cancel_after: float | None,
) -> None:
    """One budget; each deployment once, but the last; true accounts of what was sent."""

    async def check(
        fleet: Fleet, service: LLMInfraService, ask: Ask, limit: float | None
    ) -> None:
        before, seen = list(fleet.asked), len(fleet.records)
        outcome: Any = None
        try:
            async with asyncio.timeout(limit):
                outcome = await ask(service, deadline=2.0)
        except (TimeoutError, CallError) as exc:
            outcome = exc
        sent = [now - then for now, then in zip(fleet.asked, before, strict=True)]
        (record,) = fleet.records[seen:]
        assert sum(sent) <= max_retries + 1
        assert all(each.in_flight == 0 for each in every(service))
        *others, _ = [*record.tried, None]
        once = list(dict.fromkeys(others))
        assert others[: len(once)] == once  # only the last one is tried again
        assert set(others[len(once) :]) <= set(once[-1:])
        if isinstance(outcome, TimeoutError):
            return
        by_server = [record.tried.count(f"d{index}") for index in range(3)]
        assert by_server == sent
        begun = [each.deployment for each in record.attempts]
        assert begun == [each for each in record.tried if each[0] == "d"]
        assert outcome.attempts == record.requests == sum(sent)
        if isinstance(outcome, ChatResult) and not outcome.cached:
            assert outcome.deployment == outcome.tried[-1]

    def every(service: LLMInfraService) -> list[Any]:
        return [d for each in service.routes().values() for d in each.deployments]

    async def run() -> None:
        async with ProviderServer() as a, ProviderServer() as b, ProviderServer() as c:
            fleet = Fleet([a, b, c])
            for server, replies in zip(fleet.servers, failures, strict=True):
                server.reply(*replies)
            async with fleet.open(
                routes, cache=cache, max_retries=max_retries, retry_after_max=0.5
            ) as service:
                # The request of a cancelled call may arrive late: only the last one is.
                for ask in asks[:-1]:
                    await check(fleet, service, ask, None)
                await check(fleet, service, asks[-1], cancel_after)

    asyncio.run(run())
