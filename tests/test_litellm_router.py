"""What `litellm.Router` does when it is used only to choose a deployment.

Each test pins one fact that stands between that Router and what routing needs here. One
that fails says that LiteLLM has changed, and that its Router is worth another look. The
last section pins facts that speak for it.

The Router is asked through its entry points: `select`, `health().record_failure` and
`retire`. The load of a call made elsewhere is reported to its selectors by hand: LiteLLM
has no other way.
"""

import asyncio
import contextlib
import gc
import importlib.metadata
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm.litellm_import import import_litellm
from tests.provider_server import Answer, ProviderServer
from tests.redis_server import RedisServer, needs_redis
from tests.test_lifecycle import until

VERSION = tuple(map(int, importlib.metadata.version("litellm").split(".")[:2]))
pytestmark = pytest.mark.skipif(
    VERSION < (1, 110), reason="older Routers have other entry points"
)

MODEL = "openai/gpt-4.1-nano"
HELLO = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "user", "content": "word " * 60}]  # 60 tokens and a few
NOON = datetime(2026, 11, 30, 12)  # noqa: DTZ001 - LiteLLM takes naive times
STRATEGIES = (
    "simple-shuffle",
    "least-busy",
    "cost-based-routing",
    "latency-based-routing",
    "usage-based-routing-v2",
)

Make = Callable[..., Any]
"""Makes a Router over deployments of the group `fast`; keywords are the Router's."""


class StatusError(Exception):
    """A failure with a status, as any library may raise it."""

    def __init__(self, status: int, text: str = "failed") -> None:
        super().__init__(text)
        self.status_code = status


def deployment(id_: str, model: str = MODEL, **params: Any) -> dict[str, Any]:
    """Return a deployment of the group `fast`."""
    return {
        "model_name": "fast",
        "litellm_params": {"model": model, "api_key": "sk-none", **params},
        "model_info": {"id": id_},
    }


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Make Routers, and take away afterwards what they registered."""
    made: list[Any] = []

    def router(*deployments: dict[str, Any], **options: Any) -> Any:
        both = deployments or (deployment("a"), deployment("b"))
        made.append(import_litellm().Router(model_list=list(both), **options))
        return made[-1]

    yield router
    for one in made:
        one.retire()
    await asyncio.sleep(0)  # its tasks end


async def pick(router: Any, messages: Any = HELLO, **request: Any) -> str:
    """Return the id of the deployment that it chooses."""
    found = await router.select("fast", request, messages=messages)
    return str(found["model_info"]["id"])


async def picks(router: Any, times: int = 60, **request: Any) -> Counter[str]:
    """Choose many times, one after another; return how often each was chosen."""
    return Counter([await pick(router, **request) for _ in range(times)])


def report(id_: str, **more: Any) -> dict[str, Any]:
    """Return what a selector reads of a call that was made elsewhere."""
    return {
        "litellm_params": {
            "metadata": {"model_group": "fast", "deployment": MODEL},
            "model_info": {"id": id_},
        },
        "call_type": "acompletion",
        **more,
    }


def answer_of(tokens: int) -> Any:
    """Return an answer of that many tokens, as LiteLLM holds one."""
    litellm = import_litellm()
    usage = litellm.Usage(
        prompt_tokens=0, completion_tokens=tokens, total_tokens=tokens
    )
    return litellm.ModelResponse(usage=usage)


def fail(router: Any, error: Exception, times: int = 1) -> bool:
    """Report failures of `a`; return whether the last one took it out."""
    status = getattr(error, "status_code", 500)
    health = router.health()
    return bool([health.record_failure("a", error, status) for _ in range(times)][-1])


# --- what it leaves in the process ----------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
async def test_a_router_that_is_dropped_stays_registered(
    make: Make, strategy: str
) -> None:
    """Its selector hears of every call of the process, until `retire` is called."""
    litellm = import_litellm()
    before = len(litellm.callbacks)
    router = make(routing_strategy=strategy)
    assert len(litellm.callbacks) == before + 1

    kept = litellm.callbacks[-1]
    litellm.Router(model_list=[deployment("a")], routing_strategy=strategy)
    gc.collect()
    left = [c for c in litellm.callbacks[before:] if c is not kept]
    try:
        # Least busy adds one for each Router; of the others a process keeps the first.
        assert len(left) == (strategy == "least-busy")
        router.retire()
        assert kept not in litellm.callbacks
    finally:
        for one in left:
            for registered in (litellm.callbacks, litellm.input_callback):
                registered.remove(one)


async def test_only_calls_of_litellm_with_its_metadata_are_counted(
    make: Make, server: ProviderServer
) -> None:
    """The books are of any call that names the group, whoever makes it."""
    litellm = import_litellm()
    router = make(routing_strategy="least-busy")
    server.default = Answer(delay=60)
    base = server.base_url("openai")

    async def call(**labels: Any) -> None:
        await litellm.acompletion(
            model=MODEL,
            messages=HELLO,
            api_key="sk-test",
            api_base=base,
            max_retries=0,
            **labels,
        )

    labels = {"metadata": {"model_group": "fast"}, "model_info": {"id": "a"}}
    async with started(call(), server):
        assert await picks(router) == {"a": 60}
    async with started(call(**labels), server):
        assert await picks(router) == {"b": 60}

    # That call was cancelled: nobody tells the selector, for an hour.
    assert await picks(router) == {"b": 60}
    await litellm.close_litellm_async_clients()


@contextlib.asynccontextmanager
async def started(
    call: Coroutine[Any, Any, None], server: ProviderServer
) -> AsyncIterator[None]:
    """Start a call, wait until it has reached the server, and cancel it in the end."""
    task = asyncio.create_task(call)
    await until(lambda: server.in_flight == 1)
    yield
    task.cancel()
    await asyncio.wait([task])
    await until(lambda: server.in_flight == 0)


# --- which one it chooses -------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["least-busy", "cost-based-routing"])
async def test_of_equals_the_first_is_always_chosen(make: Make, strategy: str) -> None:
    """Many at once are no different: choosing reserves nothing."""
    router = make(routing_strategy=strategy)

    assert await picks(router) == {"a": 60}
    assert set(await asyncio.gather(*(pick(router) for _ in range(60)))) == {"a"}


async def test_a_price_of_zero_is_taken_for_no_price(make: Make) -> None:
    """The deployment that is said to be free loses against one that is not."""
    prices = {"free": 0, "cheap": 1e-9}
    router = make(
        *(
            deployment(name, input_cost_per_token=price, output_cost_per_token=price)
            for name, price in prices.items()
        ),
        routing_strategy="cost-based-routing",
    )

    assert await picks(router) == {"cheap": 60}


async def test_the_price_of_a_prefixed_name_is_not_found(make: Make) -> None:
    """All of them cost the same: the dearest model is chosen if it stands first."""
    names = ("o1-pro", "gpt-4.1-nano")
    prefixed = make(
        *(deployment(name, f"openai/{name}") for name in names),
        routing_strategy="cost-based-routing",
    )
    bare = make(
        *(deployment(name, name) for name in names),
        routing_strategy="cost-based-routing",
    )

    assert await picks(prefixed) == {"o1-pro": 60}
    assert await picks(bare) == {"gpt-4.1-nano": 60}


async def test_latency_is_divided_by_tokens_and_never_measured_again(
    make: Make,
) -> None:
    """Ten seconds for a long answer beat half a second for a short one, for good."""
    router = make(routing_strategy="latency-based-routing")
    log = router.lowestlatency_logger.async_log_success_event
    await log(report("a"), answer_of(1000), NOON, NOON + timedelta(seconds=10))
    await log(report("b"), answer_of(10), NOON, NOON + timedelta(seconds=0.5))

    assert await picks(router, 300) == {"a": 300}


async def test_a_picture_goes_to_a_model_that_takes_none(make: Make) -> None:
    """Its own check before a call looks at tokens and schemas, not at pictures."""
    router = make(
        deployment("blind", "openai/gpt-3.5-turbo"),
        deployment("sees"),
        enable_pre_call_checks=True,
    )
    url = "data:image/png;base64,iVBORw0KGgo="
    part = {"type": "image_url", "image_url": {"url": url}}
    asked = [{"role": "user", "content": [part]}]

    assert set(await picks(router, messages=asked)) == {"blind", "sees"}


# --- limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_any_number_at_once_passes_a_limit(make: Make, strategy: str) -> None:
    """Tokens and requests count when the answer has come, not when it is chosen."""
    router = make(deployment("a", tpm=100, rpm=3), routing_strategy=strategy)

    chosen = await asyncio.gather(*(pick(router, LONG) for _ in range(20)))

    assert len(chosen) == 20


# --- what takes a deployment out ------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 409, 413, 422])
async def test_most_client_errors_never_take_a_deployment_out(
    make: Make, status: int
) -> None:
    """403 is one: a key without permission is asked again and again."""
    router = make(allowed_fails=0)

    assert not fail(router, StatusError(status), 50)
    assert set(await picks(router)) == {"a", "b"}


async def test_an_account_without_credit_is_not_taken_out(make: Make) -> None:
    """Anthropic says it with a 400; the router-wide policy does not change it."""
    litellm = import_litellm()
    error = litellm.BadRequestError(
        "Your credit balance is too low to access the Anthropic API",
        model="claude-sonnet-4-5",
        llm_provider="anthropic",
    )
    router = make(allowed_fails_policy={"BadRequestErrorAllowedFails": 0})

    assert not fail(router, error, 50)
    assert set(await picks(router)) == {"a", "b"}


async def test_a_host_that_cannot_be_reached_is_not_taken_out(make: Make) -> None:
    """The class decides; the same words in another exception do not."""
    litellm = import_litellm()
    error = litellm.APIConnectionError("refused", llm_provider="gemini", model="m")
    router = make(allowed_fails=0)

    assert not fail(router, error, 50)
    assert set(await picks(router)) == {"a", "b"}
    assert fail(router, StatusError(500, str(error)))


@pytest.mark.parametrize("status", [402, 429, 500, 503])
async def test_a_single_deployment_is_not_taken_out(make: Make, status: int) -> None:
    """A provider that is out of quota is asked again with every call."""
    router = make(deployment("a"))

    assert not fail(router, StatusError(status), 50)
    assert await picks(router) == {"a": 60}


async def test_with_all_out_it_fails_at_once(make: Make) -> None:
    """The error says how long; waiting is left to the caller."""
    litellm = import_litellm()
    router = make(deployment("a"), cooldown_time=0.5)
    fail(router, StatusError(401))

    with pytest.raises(litellm.types.router.RouterRateLimitError) as caught:
        await asyncio.wait_for(pick(router), 0.4)
    assert caught.value.cooldown_time <= 1


# --- Redis ----------------------------------------------------------------------------


@needs_redis
async def test_a_frozen_redis_stops_the_event_loop(make: Make, tmp_path: Path) -> None:
    """Counting a call that starts is a blocking command, without a short limit.

    It took 59 s to come back when nobody thawed the server.
    """
    with RedisServer(tmp_path) as redis:
        router = make(
            routing_strategy="least-busy",
            redis_host="127.0.0.1",
            redis_port=redis.port,
        )
        count = router.leastbusy_logger.log_pre_api_call
        count(MODEL, HELLO, report("a"))
        redis.freeze()
        # The test's own loop would stop.
        thread = threading.Thread(target=count, args=(MODEL, HELLO, report("a")))
        thread.start()
        thread.join(2)
        is_blocked = thread.is_alive()
        redis.thaw()
        thread.join(30)

    assert is_blocked


# --- what speaks for it ---------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 402, 404, 429])
async def test_these_take_a_deployment_out_at_once(make: Make, status: int) -> None:
    """With 401 and 404 also the only one of its group."""
    router = make()

    assert fail(router, StatusError(status))
    assert await picks(router) == {"b": 60}
    if status in {401, 404}:
        assert fail(make(deployment("a")), StatusError(status))


@pytest.mark.parametrize("status", [408, 500, 502, 503, 529])
async def test_five_failures_in_a_minute_take_one_out(make: Make, status: int) -> None:
    """Or the first one, if that is asked for."""
    router = make()

    assert not fail(router, StatusError(status), 4)
    assert fail(router, StatusError(status))
    assert await picks(router) == {"b": 60}
    assert fail(make(allowed_fails=0), StatusError(status))


@pytest.mark.parametrize(
    "strategy", ["simple-shuffle", "latency-based-routing", "usage-based-routing-v2"]
)
async def test_these_share_out_among_equals(make: Make, strategy: str) -> None:
    """At random."""
    assert set(await picks(make(routing_strategy=strategy))) == {"a", "b"}


async def test_a_model_without_a_price_is_not_the_cheapest(make: Make) -> None:
    """It comes last; a price of 0 that is in LiteLLM's own table is one."""
    router = make(
        deployment("unknown", "openai/of-mine"),
        deployment("dear", "o1-pro"),
        routing_strategy="cost-based-routing",
    )
    local = make(
        deployment("paid", "gpt-4.1-nano"),
        deployment("local", "ollama/llama3"),
        routing_strategy="cost-based-routing",
    )

    assert await picks(router) == {"dear": 60}
    assert await picks(local) == {"local": 60}


async def test_counts_do_not_go_below_zero(make: Make) -> None:
    """An end that is reported twice does not draw the traffic."""
    router = make(routing_strategy="least-busy")
    selector = router.leastbusy_logger
    for _ in range(3):
        await selector.async_log_success_event(report("a"), None, NOON, NOON)
    selector.log_pre_api_call(MODEL, HELLO, report("a"))

    assert await picks(router) == {"b": 60}


async def test_tokens_that_were_reported_count(make: Make) -> None:
    """With everything filled in that the selector reads."""
    router = make(
        deployment("a", tpm=100),
        deployment("b", tpm=100),
        routing_strategy="usage-based-routing-v2",
    )
    payload = {
        "model_group": "fast",
        "model_id": "a",
        "total_tokens": 90,
        "hidden_params": {"litellm_model_name": MODEL},
    }
    call = report("a", standard_logging_object=payload)
    await router.lowesttpm_logger_v2.async_log_success_event(
        call, answer_of(90), NOON, NOON
    )

    assert await picks(router) == {"b": 60}


async def test_what_does_not_fit_is_passed_over(make: Make) -> None:
    """By tokens and by schema, if checks before the call are switched on."""
    router = make(
        deployment("small", "openai/gpt-4"),
        deployment("large"),
        enable_pre_call_checks=True,
    )
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    much = [{"role": "user", "content": "word " * 20_000}]

    assert await picks(router, 20, messages=much) == {"large": 20}
    assert await picks(router, 20, response_format=schema) == {"large": 20}
