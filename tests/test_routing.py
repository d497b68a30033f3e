"""Routes: which deployment answers, what follows a failure, what is counted."""

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dipeo_llm import (
    APIKeyError,
    CallRecord,
    ContextWindowError,
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
    StreamInterruptedError,
)
from dipeo_llm.telemetry import Telemetry
from tests.conftest import HELLO, MODELS
from tests.provider_server import Answer, Fault, ProviderServer, error

OPENAI = f"openai/{MODELS['openai']}"


class Fleet:
    """Loopback servers, each a deployment: `openai-0` is the first as OpenAI's."""

    def __init__(self, servers: list[ProviderServer]) -> None:
        self.servers = servers
        self.records: list[CallRecord] = []

    def __getitem__(self, index: int) -> ProviderServer:
        return self.servers[index]

    @property
    def asked(self) -> list[int]:
        """The requests that each server got."""
        return [len(server.requests) for server in self.servers]

    def keys(self) -> StaticAPIKeys:
        """Return a key for each provider at each server."""
        return StaticAPIKeys(
            {
                f"{provider}-{index}": {
                    "key": f"sk-test-{provider}-{index}",
                    "service": provider,
                    "base_url": server.base_url(provider),
                }
                for index, server in enumerate(self.servers)
                for provider in ("openai", "anthropic", "google", "ollama")
            }
        )

    @asynccontextmanager
    async def open(
        self, routes: Any, cache: Any = None, **settings: Any
    ) -> AsyncIterator[LLMInfraService]:
        """Open a service with routes on these servers."""
        usual = {"retry_wait": 0.01, "retry_wait_max": 0.05, "timeout": 20.0}
        async with LLMInfraService(
            self.keys(),
            settings=Settings(**usual | settings),
            routes=routes,
            cache=cache,
            on_call=self.records.append,
        ) as service:
            await service.initialize()
            yield service


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Run three servers."""
    async with ProviderServer() as a, ProviderServer() as b, ProviderServer() as c:
        yield Fleet([a, b, c])


def at(index: int, model: str = OPENAI, **fields: Any) -> Deployment:
    """Return the deployment of a model at a server, called d0, d1 or d2."""
    provider = model.partition("/")[0]
    made = {"name": f"d{index}", "api_key_id": f"{provider}-{index}", **fields}
    return Deployment(model=model, **made)


def route(*deployments: Deployment, **fields: Any) -> Route:
    """Return a route that takes its deployments in order: they cost more and more."""
    priced = [
        each.model_copy(
            update={
                "input_usd_per_million": float(place),
                "output_usd_per_million": float(place),
            }
        )
        for place, each in enumerate(deployments)
    ]
    return Route(deployments=tuple(priced), **{"strategy": "cost", **fields})


async def read(service: LLMInfraService, **options: Any) -> Any:
    """Read a stream of a route to its end."""
    async with service.stream(HELLO, "main", **options) as stream:
        return await stream.result()


async def call(service: LLMInfraService, **options: Any) -> Any:
    """Ask a route."""
    return await service.complete(HELLO, "main", **options)


each_way = pytest.mark.parametrize("ask", [call, read])
Ask = Callable[..., Any]


# Which deployment.


@each_way
async def test_a_route_answers_as_its_deployment_does(fleet: Fleet, ask: Ask) -> None:
    """Result, record and log say which deployment answered."""
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        result = await ask(service)
        assert (result.route, result.deployment, result.tried) == ("main", "d0", ["d0"])
        assert (result.service, result.attempts, result.queued) == ("openai", 1, 0.0)
    assert fleet.asked == [1, 0, 0]
    assert fleet[0].requests[0].headers["authorization"] == "Bearer sk-test-openai-0"
    (record,) = fleet.records
    assert (record.route, record.deployment, record.tried) == ("main", "d0", ("d0",))
    assert [each.deployment for each in record.attempts] == ["d0"]
    assert record.model == MODELS["openai"]


async def test_models_beside_routes_are_called_as_before(fleet: Fleet) -> None:
    """A name that is not a route's is a model; so is a route's name with a service."""
    async with fleet.open({"main": route(at(0)), "gpt-5": route(at(1))}) as service:
        result = await service.complete(HELLO, OPENAI, "openai-2")
        assert (result.route, result.deployment, result.tried) == (None, None, [])
        await service.complete(HELLO, "gpt-5", "openai-2", service="openai")
        assert fleet.asked == [0, 0, 2]
        await service.complete(HELLO, "gpt-5")
        assert fleet.asked == [0, 1, 2]


async def test_a_person_speaks_by_a_route(fleet: Fleet) -> None:
    """`complete_with_person` and `stream_with_person` take routes too."""
    config = PersonLLMConfig(model="main", system_prompt="Be brief.")
    said = [Message(from_person_id="b", to_person_id="a", content="Hi")]
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        result = await service.complete_with_person(said, "a", config)
        assert (result.deployment, result.text) == ("d0", Answer().text)
        async with service.stream_with_person(said, "a", config) as stream:
            assert (await stream.result()).deployment == "d0"
    assert [r.route for r in fleet.records] == ["main", "main"]


async def test_the_key_of_the_call_is_for_deployments_without_one(fleet: Fleet) -> None:
    """A deployment's own key wins over the call's."""
    bare = Deployment(model=OPENAI, name="bare", base_url=fleet[2].base_url("openai"))
    async with fleet.open({"main": route(bare), "own": route(at(1))}) as service:
        await service.complete(HELLO, "main", "openai-0")
        await service.complete(HELLO, "own", "openai-0")
    assert fleet.asked == [0, 1, 1]
    assert fleet[2].requests[0].headers["authorization"] == "Bearer sk-test-openai-0"


async def test_a_local_deployment_needs_no_key(fleet: Fleet) -> None:
    """A base URL on this machine is called without a key, as elsewhere."""
    fleet[0].strict = fleet[0].rules = False  # OpenAI itself requires a key
    local = Deployment(model="openai/local", base_url=fleet[0].base_url("openai"))
    async with fleet.open({"main": Route(deployments=(local,))}) as service:
        result = await call(service)
    assert result.deployment == f"openai/local@127.0.0.1:{fleet[0].port}"
    assert "authorization" not in fleet[0].requests[0].headers


async def test_shuffle_goes_by_weight(fleet: Fleet) -> None:
    """Equal deployments share the calls by their weights."""
    random.seed(7)
    heavy = Route(deployments=(at(0, weight=3.0), at(1)))
    async with fleet.open({"main": heavy}) as service:
        for _ in range(80):
            await call(service)
    assert 50 <= fleet.asked[0] <= 70


async def test_load_takes_the_least_busy_and_shares_ties(fleet: Fleet) -> None:
    """Calls in flight are spread evenly; the first of equals gets no more than its share."""
    for server in fleet.servers:
        server.default = Answer(delay=0.3)
    busy = Route(deployments=(at(0), at(1), at(2)), strategy="load")
    async with fleet.open({"main": busy}) as service:
        await asyncio.gather(*(call(service) for _ in range(30)))
        assert fleet.asked == [10, 10, 10]
        idle = Counter([(await call(service)).deployment for _ in range(12)])
        assert len(idle) > 1
        assert all(d.in_flight == 0 for d in service.routes()["main"].deployments)


@each_way
async def test_latency_prefers_the_soonest_first_content(
    fleet: Fleet, ask: Ask
) -> None:
    """Each is tried, then the quick one gets nearly all, the slow one still some."""
    random.seed(3)
    fleet[0].default = Answer(delay=0.5)
    # Slow to end, quick to begin.
    fleet[1].default = Answer(chunk_delay=0.15 if ask is read else 0)
    quick = Route(deployments=(at(0), at(1)), strategy="latency")
    async with fleet.open({"main": quick}) as service:
        for _ in range(25):
            await ask(service)
        slow, fast = service.routes()["main"].deployments
    assert fast.latency is not None
    assert slow.latency is not None
    assert fast.latency < slow.latency
    assert fleet.asked[1] > 18
    assert fleet.asked[0] >= 1


async def test_cost_goes_by_price_and_size(fleet: Fleet) -> None:
    """0 is a price, an unknown price comes last, and a long question changes the order."""
    free = at(0, input_usd_per_million=0, output_usd_per_million=0)
    cheap_to_read = at(1, input_usd_per_million=1, output_usd_per_million=100)
    cheap_to_write = at(2, input_usd_per_million=10, output_usd_per_million=1)
    unknown = Deployment(model="openai/my-own", name="unknown", api_key_id="openai-0")

    def cheapest(*deployments: Deployment) -> dict[str, Route]:
        return {"main": Route(deployments=deployments, strategy="cost")}

    async with fleet.open(cheapest(unknown, cheap_to_read, free)) as service:
        assert (await call(service)).deployment == "d0"
    async with fleet.open(cheapest(unknown, cheap_to_write, cheap_to_read)) as service:
        assert (await call(service)).deployment == "d2"
        long = [{"role": "user", "content": "word " * 20_000}]
        assert (await service.complete(long, "main")).deployment == "d1"
    async with fleet.open(cheapest(unknown)) as service:
        assert (await call(service)).deployment == "unknown"


async def test_the_models_own_price_counts(fleet: Fleet) -> None:
    """Without prices in the configuration, LiteLLM's table decides."""
    dear, cheap = at(0, "openai/gpt-4o"), at(1, "openai/gpt-4.1-nano")
    async with fleet.open(
        {"main": Route(deployments=(dear, cheap), strategy="cost")}
    ) as service:
        assert (await call(service)).deployment == "d1"


async def test_usage_takes_the_one_with_most_room(fleet: Fleet) -> None:
    """The share of the limits that is used up decides."""
    both = Route(deployments=(at(0, rpm=100), at(1, rpm=10)), strategy="usage")
    async with fleet.open({"main": both}) as service:
        for _ in range(22):
            await call(service)
        assert service.routes()["main"].deployments[0].requests_per_minute >= 18
    assert fleet.asked[1] <= 4


# After a failure.


@each_way
@pytest.mark.parametrize(
    "failure",
    [
        error("openai", 500),
        error("openai", 503),
        error("openai", 429),
        error("openai", 429, code="insufficient_quota"),
        error("openai", 401),
        error("openai", 404, code="model_not_found"),
        Fault("reset"),
    ],
    ids=["500", "503", "429", "quota", "401", "404", "reset"],
)
async def test_another_deployment_answers(fleet: Fleet, ask: Ask, failure: Any) -> None:
    """A failure of a deployment's own is not the caller's; no time is lost in waiting."""
    fleet[0].default = failure
    async with fleet.open({"main": route(at(0), at(1))}, retry_wait=5.0) as service:
        result = await ask(service, deadline=4.0)
        assert (result.deployment, result.tried) == ("d1", ["d0", "d1"])
        assert result.attempts == 2
    (record,) = fleet.records
    assert (record.status, record.tried) == ("ok", ("d0", "d1"))
    assert [each.deployment for each in record.attempts] == ["d0", "d1"]
    assert record.attempts[0].error is not None
    assert record.attempts[0].wait == 0.0


@each_way
async def test_a_missing_key_is_the_deployments_fault(fleet: Fleet, ask: Ask) -> None:
    """A key that the application does not know leads to the next deployment."""
    lost = at(0, api_key_id="nobody's")
    async with fleet.open({"main": route(lost, at(1))}, max_retries=0) as service:
        result = await ask(service)
        assert (result.deployment, result.attempts) == ("d1", 1)
        assert result.tried == ["d0", "d1"]
        assert service.routes()["main"].deployments[0].cooling > 0


@each_way
@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (error("openai", 400, "Invalid value"), InvalidRequestError),
        (
            error("openai", 400, "content management policy", code="content_filter"),
            Exception,
        ),
    ],
)
async def test_the_requests_own_fault_ends_the_call(
    fleet: Fleet, ask: Ask, failure: Any, kind: type[Exception]
) -> None:
    """A request that is wrong is wrong everywhere, and says nothing of the deployment."""
    fleet[0].default = failure
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        with pytest.raises(kind):
            await ask(service)
        health = service.routes()["main"].deployments[0]
        assert (health.cooling, health.failures, health.calls) == (0.0, 0, 1)
    assert fleet.asked == [1, 0, 0]


async def test_an_account_without_credit_is_the_deployments_fault(fleet: Fleet) -> None:
    """Anthropic says it with status 400."""
    fleet[0].default = error(
        "anthropic", 400, "Your credit balance is too low to access the Anthropic API."
    )
    first = at(0, f"anthropic/{MODELS['anthropic']}")
    async with fleet.open({"main": route(first, at(1))}) as service:
        assert (await call(service)).deployment == "d1"
        health = service.routes()["main"].deployments[0]
        assert (health.cooling > 20, health.reason) == (True, "QuotaExceededError 400")


@each_way
async def test_a_fallback_route_answers(fleet: Fleet, ask: Ask) -> None:
    """When the deployments of a route fail, those of its fallbacks are next."""
    fleet[0].default = fleet[1].default = error("openai", 503)
    other = at(2, f"anthropic/{MODELS['anthropic']}")
    routes = {"main": route(at(0), at(1), fallbacks=("spare",)), "spare": route(other)}
    async with fleet.open(routes) as service:
        result = await ask(service)
    assert (result.route, result.service) == ("main", "anthropic")
    assert result.tried == ["d0", "d1", "d2"]
    assert fleet.asked == [1, 1, 1]


async def test_the_budget_of_attempts_is_one(fleet: Fleet) -> None:
    """Two routes that fall back to each other end; retries and fallbacks share a budget."""
    for server in fleet.servers:
        server.default = error("openai", 500)
    routes = {
        "main": route(at(0), fallbacks=("spare",)),
        "spare": route(at(1), fallbacks=("main",)),
    }
    async with fleet.open(routes, max_retries=3) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await call(service)
    assert sum(fleet.asked) == 4
    assert fleet.asked[0] == 1  # no deployment twice by fallback, the last one by retry
    assert caught.value.attempts == 4
    assert [each["deployment"] for each in caught.value.details["tried"]] == [
        *("d0", "d1", "d1", "d1")
    ]
    async with fleet.open(routes, max_retries=0) as service:
        with pytest.raises(ServiceUnavailableError):
            await call(service)
    assert sum(fleet.asked) == 5


async def test_the_deadline_is_one(fleet: Fleet) -> None:
    """Slow deployments together get no more than the call's deadline."""
    for server in fleet.servers:
        server.default = Answer(delay=5.0)
    async with fleet.open({"main": route(at(0), at(1), at(2))}, timeout=0.3) as service:
        begun = time.monotonic()
        with pytest.raises(LLMTimeoutError):
            await call(service, deadline=0.5)
        assert time.monotonic() - begun < 2.0
    assert fleet.asked == [1, 1, 0]


async def test_the_first_error_is_raised_with_the_others(fleet: Fleet) -> None:
    """What the user asked for explains the failure; the rest is in its details."""
    fleet[0].default = error("openai", 429, "slow down")
    fleet[1].default = error("openai", 401)
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        with pytest.raises(RateLimitError) as caught:
            await call(service)
    assert caught.value.details["route"] == "main"
    assert caught.value.details["tried"] == [
        {"deployment": "d0", "error": "RateLimitError", "status_code": 429},
        {"deployment": "d1", "error": "APIKeyError", "status_code": 401},
    ]
    (record,) = fleet.records
    assert (record.error, record.tried) == ("RateLimitError", ("d0", "d1"))
    assert "sk-test" not in repr(caught.value.details)


# Fitness.


async def test_a_deployment_that_is_too_small_is_passed_over(fleet: Fleet) -> None:
    """A request that a context window cannot hold goes to one that can."""
    small, large = at(0, context_window=1_000), at(1, context_window=100_000)
    long = [{"role": "user", "content": "word " * 4_000}]
    async with fleet.open({"main": route(small, large)}) as service:
        assert (await service.complete(long, "main")).tried == ["d1"]
        assert (await call(service)).tried == ["d0"]


async def test_context_window_fallbacks(fleet: Fleet) -> None:
    """They serve what is too long, whether estimated or said by the provider."""
    routes = {
        "main": route(
            at(0, context_window=1_000),
            fallbacks=("spare",),
            context_window_fallbacks=("long",),
        ),
        "spare": route(at(1, context_window=1_000)),
        "long": route(at(2, context_window=100_000)),
    }
    long = [{"role": "user", "content": "word " * 4_000}]
    async with fleet.open(routes) as service:
        assert (await service.complete(long, "main")).tried == ["d2"]
        fleet[0].default = error(
            "openai", 400, "too long", code="context_length_exceeded"
        )
        assert (await call(service)).tried == ["d0", "d2"]
        assert service.routes()["main"].is_available
        fleet[2].default = error("openai", 503)
        with pytest.raises(ContextWindowError) as caught:
            await call(service)
    tried = [each["deployment"] for each in caught.value.details["tried"]]
    assert tried[:2] == ["d0", "d2"]


async def test_pictures_and_tools_go_to_who_takes_them(fleet: Fleet) -> None:
    """LiteLLM's table says that gpt-4 has no eyes and deepseek-reasoner no tools."""
    blind, seeing = at(0, "openai/gpt-4"), at(1, "openai/gpt-4o")
    pixel = "data:image/png;base64,iVBORw0KGgo="
    look = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": pixel}},
            ],
        }
    ]
    fleet[1].rules = False
    async with fleet.open({"main": route(blind, seeing)}) as service:
        assert (await service.complete(look, "main")).tried == ["d1"]
        assert (await call(service)).tried == ["d0"]


async def test_a_model_that_cannot_do_what_is_asked_is_passed_over(
    fleet: Fleet,
) -> None:
    """A refusal of ours before sending costs no attempt."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    fleet[1].default = Answer('{"a": 1}')
    async with fleet.open(
        {"main": route(at(0, "openai/gpt-4"), at(1))}, max_retries=0
    ) as service:
        result = await call(service, response_format=schema)
        assert (result.parsed, result.tried, result.attempts) == (
            {"a": 1},
            ["d0", "d1"],
            1,
        )
        assert service.routes()["main"].deployments[0].cooling == 0
    assert fleet.asked == [0, 1, 0]


# Cool-downs.


async def test_a_failing_deployment_gets_no_calls_for_a_while(fleet: Fleet) -> None:
    """The cool-down is seen in `routes()`, and ends."""
    fleet[0].reply(error("openai", 429))
    async with fleet.open({"main": route(at(0), at(1), cooldown=0.3)}) as service:
        assert (await call(service)).tried == ["d0", "d1"]
        health = service.routes()["main"]
        assert 0 < health.deployments[0].cooling <= 0.3
        assert health.deployments[0].reason == "RateLimitError 429"
        assert health.is_available
        assert (await call(service)).tried == ["d1"]
        await asyncio.sleep(0.35)
        assert (await call(service)).tried == ["d0"]


async def test_retry_after_sets_the_length(fleet: Fleet) -> None:
    """The provider knows best when it is back."""
    fleet[0].reply(error("openai", 429, retry_delay=7.0))
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        await call(service)
        assert 6 < service.routes()["main"].deployments[0].cooling <= 7


async def test_server_errors_cool_down_after_some_in_a_row(fleet: Fleet) -> None:
    """One 500 is no outage; a success in between starts again."""
    async with fleet.open({"main": route(at(0), at(1), failures=2)}) as service:
        fleet[0].reply(error("openai", 500), Answer(), error("openai", 500))
        tried = [(await call(service)).tried for _ in range(3)]
        assert tried == [["d0", "d1"], ["d0"], ["d0", "d1"]]
        assert service.routes()["main"].deployments[0].cooling == 0
        fleet[0].reply(error("openai", 500))
        await call(service)
        assert service.routes()["main"].deployments[0].cooling > 0


async def test_an_unreachable_host_cools_down_at_once(fleet: Fleet) -> None:
    """A refused connection says that nobody is there."""
    gone = Deployment(
        model=OPENAI,
        name="gone",
        api_key_id="openai-0",
        base_url="http://127.0.0.1:9/v1",
    )
    async with fleet.open({"main": route(gone, at(1))}) as service:
        assert (await call(service)).tried == ["gone", "d1"]
        assert (await call(service)).tried == ["d1"]


async def test_all_cooled_down_waits_for_the_earliest(fleet: Fleet) -> None:
    """Within the deadline the call waits; `queued` says how long."""
    for server in fleet.servers:
        server.reply(error("openai", 429, retry_delay=0.4))
    async with fleet.open(
        {"main": route(at(0), at(1)), "other": route(at(0), at(1))}, max_retries=1
    ) as service:
        with pytest.raises(RateLimitError):
            await call(service)
        result = await service.complete(HELLO, "other")  # the same deployments
        assert 0.1 < result.queued < 2
        assert fleet.records[-1].queued == result.queued


@pytest.mark.parametrize("options", [{"deadline": 1.0}, {}])
async def test_all_cooled_down_fails_at_once_with_the_time(
    fleet: Fleet, options: dict[str, Any]
) -> None:
    """A wait beyond the deadline, or a route that does not wait, is an error with a time."""
    fleet[0].reply(error("openai", 429, retry_delay=30.0))
    busy = "wait" if options else "fail"
    async with fleet.open(
        {"main": route(at(0), when_busy=busy)}, max_retries=0
    ) as service:
        with pytest.raises(RateLimitError):
            await call(service)
        begun = time.monotonic()
        with pytest.raises(RateLimitError, match="takes calls now") as caught:
            await call(service, **options)
        assert time.monotonic() - begun < 0.5
        assert caught.value.retry_after is not None
        assert 28 < caught.value.retry_after <= 30
        assert (caught.value.attempts, caught.value.retryable) == (0, False)
    assert fleet.asked == [1, 0, 0]


async def test_without_cooldowns_a_deployment_is_asked_each_time(fleet: Fleet) -> None:
    """`cooldown=0` switches them off."""
    fleet[0].default = error("openai", 401)
    async with fleet.open({"main": route(at(0), at(1), cooldown=0)}) as service:
        assert [(await call(service)).tried for _ in range(2)] == [["d0", "d1"]] * 2


# Streams.


async def test_an_error_after_the_role_frame_moves_on(fleet: Fleet) -> None:
    """Nothing has reached the caller yet, so another deployment begins afresh."""
    fleet[0].default = Answer(error_after=1)
    async with (
        fleet.open({"main": route(at(0), at(1))}) as service,
        service.stream(HELLO, "main") as stream,
    ):
        text = "".join([chunk.text async for chunk in stream])
        result = await stream.result()
    assert (text, result.tried) == (Answer().text, ["d0", "d1"])


async def test_an_error_after_the_first_words_does_not(fleet: Fleet) -> None:
    """The reader would see the beginning twice."""
    fleet[0].default = Answer("one two three four five six", error_after=4)
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        with pytest.raises(StreamInterruptedError) as caught:
            await read(service)
        assert service.routes()["main"].deployments[0].in_flight == 0
        assert service.routes()["main"].deployments[0].failures == 1
    assert caught.value.partial_text
    assert fleet.asked == [1, 0, 0]


async def test_streams_are_counted_until_they_end_or_are_left(fleet: Fleet) -> None:
    """However a stream is left, its deployment is released once."""
    fleet[0].default = Answer("word " * 30, pieces=30, chunk_delay=0.01)
    async with fleet.open({"main": route(at(0), strategy="load")}) as service:

        def in_flight() -> int:
            return service.routes()["main"].deployments[0].in_flight

        async with service.stream(HELLO, "main") as stream:
            await anext(stream)
            assert in_flight() == 1
        assert in_flight() == 0

        async def read_some(seconds: float) -> None:
            async with asyncio.timeout(seconds):
                await read(service)

        # A cancelled attempt is waited for, so none is left in the pool.
        cut = [read_some(0.004 * n) for n in range(50)]
        await asyncio.gather(*cut, return_exceptions=True)
        assert in_flight() == 0

        dropped = await service.stream(HELLO, "main").__aenter__()
        assert in_flight() == 1
        del dropped
        gc.collect()
        await asyncio.sleep(0.1)
        assert in_flight() == 0


async def test_cancelled_calls_are_released(fleet: Fleet) -> None:
    """Cancelling at any moment leaves no call counted, and no blame."""
    fleet[0].default = Answer(delay=0.05)
    async with fleet.open({"main": route(at(0), strategy="load")}) as service:
        tasks = [asyncio.create_task(call(service)) for _ in range(60)]
        for task in tasks:
            await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        health = service.routes()["main"].deployments[0]
        assert (health.in_flight, health.failures, health.cooling) == (0, 0, 0.0)


# Sessions.


async def test_a_persons_conversation_stays_where_it_is(fleet: Fleet) -> None:
    """Turns of a person meet the warm prompt cache; other persons are spread."""
    config = PersonLLMConfig(model="main")
    said = [Message(from_person_id="x", to_person_id="y", content="Hi")]
    shuffled = Route(deployments=(at(0), at(1), at(2)))
    async with fleet.open({"main": shuffled}) as service:
        homes = set()
        for person in range(20):
            turns = {
                (
                    await service.complete_with_person(said, f"p{person}", config)
                ).deployment
                for _ in range(4)
            }
            assert len(turns) == 1
            homes |= turns
        assert len(homes) == 3


async def test_a_session_moves_once(fleet: Fleet) -> None:
    """When its deployment fails, a session moves, and does not move back."""
    both = Route(deployments=(at(0), at(1)), cooldown=0.1)
    async with fleet.open({"main": both}) as service:
        home = (await call(service, session="s")).deployment
        fleet[int(home[1])].reply(error("openai", 429, retry_delay=0.1))
        moved = (await call(service, session="s")).deployment
        assert moved != home
        await asyncio.sleep(0.15)
        after = {(await call(service, session="s")).deployment for _ in range(10)}
        assert after == {moved}


async def test_affinity_can_be_switched_off(fleet: Fleet) -> None:
    """Then a session is spread like any other calls."""
    random.seed(1)
    loose = Route(deployments=(at(0), at(1)), affinity=False)
    async with fleet.open({"main": loose}) as service:
        seen = {(await call(service, session="s")).deployment for _ in range(20)}
    assert seen == {"d0", "d1"}


# With the cache.


async def test_an_answer_of_any_deployment_is_a_hit(fleet: Fleet) -> None:
    """A hit is found whichever deployment answered, and says which one did."""
    shuffled = Route(deployments=(at(0), at(1), at(2)))
    async with fleet.open({"main": shuffled}, cache="memory://") as service:
        first = await call(service)
        hits = [await call(service) for _ in range(10)]
        streamed = await read(service)
    assert sum(fleet.asked) == 1
    for hit in [*hits, streamed]:
        assert (hit.cached, hit.deployment, hit.tried) == (True, first.deployment, [])
        assert (hit.route, hit.attempts) == ("main", 0)
    assert fleet.records[1].route == "main"


async def test_a_fallbacks_answer_is_stored_under_what_answered(fleet: Fleet) -> None:
    """Once the route's own deployment is back, it is asked."""
    fleet[0].reply(error("openai", 429, retry_delay=0.1))
    routes = {"main": route(at(0), fallbacks=("spare",)), "spare": route(at(1))}
    async with fleet.open(routes, cache="memory://") as service:
        assert (await call(service)).deployment == "d1"
        spare = await service.complete(HELLO, "spare")
        assert (spare.cached, spare.deployment) == (True, "d1")
        await asyncio.sleep(0.15)
        assert (await call(service)).deployment == "d0"
    assert fleet.asked == [2, 1, 0]


async def test_identical_calls_of_a_route_are_one_request(fleet: Fleet) -> None:
    """They would be spread over the deployments otherwise."""
    for server in fleet.servers:
        server.default = Answer(delay=0.1)
    shuffled = Route(deployments=(at(0), at(1), at(2)))
    async with fleet.open({"main": shuffled}, cache="memory://") as service:
        results = await asyncio.gather(*(call(service) for _ in range(20)))
    assert sum(fleet.asked) == 1
    assert len({result.deployment for result in results}) == 1
    assert sum(not result.cached for result in results) == 1


# Limits.


async def test_a_call_waits_its_turn(fleet: Fleet) -> None:
    """A limit that is reached makes calls go elsewhere, then wait or fail."""
    limited = at(0, rpm=2)
    async with fleet.open({"main": route(limited, at(1, rpm=1))}) as service:
        tried = [(await call(service)).tried for _ in range(3)]
        assert tried == [["d0"], ["d0"], ["d1"]]
        begun = time.monotonic()
        with pytest.raises(RateLimitError) as caught:
            await call(service, deadline=0.5)
        assert time.monotonic() - begun < 0.4
        assert caught.value.retry_after is not None
        assert 50 < caught.value.retry_after <= 62
        assert caught.value.attempts == 0


async def test_a_route_that_does_not_wait_falls_back(fleet: Fleet) -> None:
    """`when_busy="fail"`: to the fallbacks, then to an error at once."""
    routes = {
        "main": route(at(0, rpm=1), when_busy="fail", fallbacks=("spare",)),
        "spare": route(at(1, rpm=1)),
    }
    async with fleet.open(routes) as service:
        assert (await call(service)).deployment == "d0"
        assert (await call(service)).deployment == "d1"
        with pytest.raises(RateLimitError, match="route 'main'"):
            await call(service)
    assert fleet.asked == [1, 1, 0]


async def test_tokens_are_settled_by_what_was_used(fleet: Fleet) -> None:
    """The estimate is replaced by the usage; what was not sent is given back."""
    fleet[0].default = Answer(input_tokens=700, output_tokens=200)
    async with fleet.open({"main": route(at(0, tpm=2_000))}) as service:
        await call(service, max_tokens=1_500)
        health = service.routes()["main"].deployments[0]
        assert (health.requests_per_minute, health.tokens_per_minute) == (1, 900)
        await call(service, max_tokens=1_000)
        assert service.routes()["main"].deployments[0].tokens_per_minute == 1_800
        with pytest.raises(RateLimitError):
            await call(service, max_tokens=1_000, deadline=0.5)


async def test_a_large_max_tokens_fits_a_limit(fleet: Fleet) -> None:
    """DiPeO asks for 256,000 tokens of any model; no more than the limit is reserved."""
    async with fleet.open({"main": route(at(0, tpm=10_000))}) as service:
        await call(service, max_tokens=256_000)
        assert service.routes()["main"].deployments[0].tokens_per_minute == 17


async def test_a_request_above_a_limit_goes_elsewhere(fleet: Fleet) -> None:
    """A question that is longer than a deployment's minute is never for it."""
    long = [{"role": "user", "content": "word " * 4_000}]
    async with fleet.open({"main": route(at(0, tpm=1_000), at(1))}) as service:
        assert (await service.complete(long, "main")).tried == ["d1"]
    async with fleet.open({"main": route(at(0, tpm=1_000))}) as service:
        with pytest.raises(InvalidRequestError, match="tokens"):
            await service.complete(long, "main")
    assert fleet.asked == [0, 1, 0]


async def test_an_outage_is_not_hidden_by_an_unfit_model(fleet: Fleet) -> None:
    """The error to act on is that of the server."""
    fleet[1].default = error("openai", 503)
    async with fleet.open(
        {"main": route(at(0, "openai/gpt-4"), at(1))}, max_retries=0
    ) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await call(service, response_format={"type": "object", "properties": {}})
    assert [each["error"] for each in caught.value.details["tried"]] == [
        *("InvalidRequestError", "ServiceUnavailableError")
    ]


# Telemetry.


async def test_spans_say_which_deployment(fleet: Fleet) -> None:
    """The call's span has route and deployments, an attempt's span its own."""
    exporter = InMemorySpanExporter()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    fleet[0].default = error("openai", 503)
    async with LLMInfraService(
        fleet.keys(),
        settings=Settings(),
        routes={"main": route(at(0), at(1))},
        telemetry=Telemetry(tracer_provider=tracing),
    ) as service:
        await call(service)
    spans = exporter.get_finished_spans()
    said = [dict(span.attributes or {}) for span in spans]
    attempts = [each["dipeo.deployment"] for each in said if "dipeo.attempt" in each]
    (whole,) = (each for each in said if "dipeo.route" in each)
    assert attempts == ["d0", "d1"]
    assert (whole["dipeo.route"], whole["dipeo.deployment"]) == ("main", "d1")
    assert whole["dipeo.tried"] == ("d0", "d1")


# Questions.


async def test_questions_about_a_route_are_for_its_first_deployment(
    fleet: Fleet,
) -> None:
    """Counting, abilities and provider of a route."""
    first = at(0, f"anthropic/{MODELS['anthropic']}")
    async with fleet.open({"main": route(first, at(1))}) as service:
        assert await service.get_provider_for_model("main") == "anthropic"
        assert service.capabilities("main").service == "anthropic"
        assert (await service.count_tokens(HELLO, "main")).source == "provider"
        assert service.routes().keys() == {"main"}
    async with LLMInfraService(fleet.keys()) as plain:
        assert plain.routes() == {}


async def test_a_deployment_that_cannot_be_placed_is_found_at_the_start(
    fleet: Fleet,
) -> None:
    """`initialize` looks every model up."""
    with pytest.raises(InvalidRequestError, match="deployment 'd0' of route 'main'"):
        async with fleet.open({"main": route(at(0, "no-such-model-at-all"))}):
            pass


async def test_keys_stay_inside(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """No health, record, error or log of a route holds a key."""
    caplog.set_level("DEBUG")
    fleet[0].default = error("openai", 401, "Incorrect API key: sk-test-openai-0")
    fleet[1].default = error("openai", 401, "Incorrect API key: sk-test-openai-1")
    async with fleet.open({"main": route(at(0), at(1))}) as service:
        with pytest.raises(APIKeyError) as caught:
            await call(service)
        said = [repr(service.routes()), repr(fleet.records), caplog.text]
    said += [str(caught.value), repr(caught.value.details)]
    assert not any("sk-test" in each for each in said)
