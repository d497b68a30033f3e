"""How often and how soon a call is tried again, and what ends it."""

import asyncio
import contextlib
import gc
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMInfraService,
    LLMServiceError,
    LLMTimeoutError,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.adapters.attempt import Attempt
from dipeo_llm.progress import CallProgress
from dipeo_llm.retry import RetryPolicy
from dipeo_llm.testing import MockLLMAdapter
from tests.conftest import PROVIDERS
from tests.provider_server import Answer, Fault, ProviderServer, Raw, Received, error

MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2:1b",
}
HELLO = [{"role": "user", "content": "Hello"}]

Open = Callable[..., AbstractAsyncContextManager[LLMInfraService]]

each_provider = pytest.mark.parametrize("provider", PROVIDERS)


@pytest.fixture
def opened(keys: StaticAPIKeys) -> Open:
    """Open a service that hardly waits, with settings of the test's choice."""

    @asynccontextmanager
    async def open_service(**settings: Any) -> AsyncIterator[LLMInfraService]:
        usual = {"retry_wait": 0.01, "retry_wait_max": 0.02, "timeout": 20.0}
        async with LLMInfraService(
            keys, settings=Settings(**usual | settings)
        ) as service:
            await service.initialize()  # its seconds are no part of a deadline
            yield service

    return open_service


async def ask(
    service: LLMInfraService, provider: str = "openai", **options: Any
) -> Any:
    """Make a call."""
    return await service.complete(HELLO, MODELS[provider], provider, **options)


def times(server: ProviderServer, *replies: Answer | Raw | Fault) -> list[float]:
    """Queue replies, and note when each of their requests came in."""
    came: list[float] = []

    def noted(reply: Answer | Raw | Fault) -> Callable[[Received], Any]:
        def answer(_: Received) -> Answer | Raw | Fault:
            came.append(time.monotonic())
            return reply

        return answer

    server.reply(*map(noted, replies))
    return came


# --- the decision -------------------------------------------------------------------


BACKOFF = pytest.approx(3.0, abs=1.0)


@pytest.mark.parametrize(
    ("error", "left", "wait"),
    [
        (ServiceUnavailableError("x"), math.inf, BACKOFF),
        (ServiceUnavailableError("x", retryable=False), math.inf, None),
        (LLMTimeoutError("x"), math.inf, BACKOFF),
        (InvalidRequestError("x"), math.inf, None),
        (InvalidRequestError("x", retryable=True), math.inf, BACKOFF),
        (APIKeyError("x"), math.inf, None),
        (RateLimitError("x"), math.inf, BACKOFF),
        (RateLimitError("x", retry_after=0.0), math.inf, 0.0),
        (RateLimitError("x", retry_after=0.3), math.inf, 0.3),
        (RateLimitError("x", retry_after=30.0), math.inf, 30.0),
        (RateLimitError("x", retry_after=30.1), math.inf, None),
        (RateLimitError("x", retry_after=5.0), 6.0, 5.0),
        (RateLimitError("x", retry_after=5.0), 5.0, None),
        (RateLimitError("x", retry_after=5.0), 4.0, None),
        (ServiceUnavailableError("x"), 0.1, BACKOFF),
        (ServiceUnavailableError("x"), 0.0, None),
        (ServiceUnavailableError("x"), -1.0, None),
        (RateLimitError("x", retryable=False, retry_after=1.0), math.inf, None),
        (DiPeOLLMError("x"), math.inf, None),
    ],
)
async def test_decision(error: DiPeOLLMError, left: float, wait: float | None) -> None:
    """Give up, back off, or wait as long as the provider asks and the deadline lets."""
    settings = Settings(retry_after_max=30.0, retry_wait=2.0, retry_wait_max=9.0)
    progress = CallProgress(None if left == math.inf else left + 0.05)
    progress.begin_attempt()
    if left <= 0 or left == getattr(error, "retry_after", None):
        await asyncio.sleep(0.1)

    assert RetryPolicy(settings, progress).next_wait(error) == wait


async def test_the_backoff_grows_to_its_limit() -> None:
    """Doubled each time, with jitter, whatever the number of attempts."""
    settings = Settings(max_retries=100_000, retry_wait=1.0, retry_wait_max=9.0)
    progress = CallProgress()
    policy = RetryPolicy(settings, progress)

    waits = []
    for _ in range(2_000):
        progress.begin_attempt()
        waits.append(policy.next_wait(ServiceUnavailableError("x")))

    assert [math.floor(wait or 0.0) for wait in waits[:3]] == [1, 2, 4]
    assert set(waits[4:]) == {9.0}


async def test_a_deadline_tells_what_failed_before() -> None:
    """The error at the deadline is a timeout that is not worth another try."""
    progress = CallProgress(2.5)
    progress.place("openai", "m")
    progress.begin_attempt()
    progress.last = ServiceUnavailableError("it is down")

    got = progress.deadline_error()

    assert type(got) is LLMTimeoutError
    assert "2.5 s" in str(got)
    assert "it is down" in str(got)
    assert (got.service, got.model, got.retryable) == ("openai", "m", False)
    assert got.attempts == 1


# --- how often ------------------------------------------------------------------------


@each_provider
@pytest.mark.parametrize("retries", [0, 1, 4])
async def test_n_retries_are_n_plus_one_requests(
    server: ProviderServer, opened: Open, provider: str, retries: int
) -> None:
    """Never one more, whatever stands below the retry policy, and the error counts them."""
    server.default = error(provider, 503)

    async with opened(max_retries=retries) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await ask(service, provider)

    assert len(server.requests) == retries + 1
    assert caught.value.attempts == retries + 1
    assert caught.value.retryable


@each_provider
async def test_two_failures_and_an_answer(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """A call that ends well tells how many requests it took."""
    server.reply(Fault("reset"), error(provider, 529), Answer("At last."))

    async with opened() as service:
        result = await ask(service, provider)

    assert (result.text, result.attempts) == ("At last.", 3)
    assert len(server.requests) == 3
    assert len({request.body for request in server.requests}) == 1


@each_provider
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_is_refused_is_not_asked_again(
    server: ProviderServer, opened: Open, provider: str, status: int
) -> None:
    """A request or a key that is wrong is wrong the second time too."""
    server.default = error(provider, status)

    async with opened() as service:
        with pytest.raises(DiPeOLLMError) as caught:
            await ask(service, provider)

    assert len(server.requests) == 1
    assert getattr(caught.value, "attempts", None) == 1


async def test_calls_count_their_own_attempts(
    server: ProviderServer, opened: Open
) -> None:
    """Many calls that fail at once do not add up each other's numbers."""
    server.default = lambda asked: error("openai", 503)

    async with opened(max_retries=2) as service:
        got = await asyncio.gather(
            *(ask(service) for _ in range(8)), return_exceptions=True
        )

    assert [getattr(exc, "attempts", None) for exc in got] == [3] * 8
    assert len({id(exc) for exc in got}) == 8
    assert len(server.requests) == 24


# --- how soon -------------------------------------------------------------------------


@each_provider
async def test_the_wait_that_the_provider_asks_for(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """The next request comes no sooner than Retry-After or RetryInfo says."""
    slow = error(provider, 429, retry_delay=0.3)
    came = times(server, slow, slow, Answer())

    async with opened() as service:
        result = await ask(service, provider)

    assert result.attempts == 3
    assert min(b - a for a, b in itertools.pairwise(came)) >= 0.3


@pytest.mark.parametrize("headers", [{"retry-after-ms": "300"}, {"retry-after": "0.3"}])
async def test_the_wait_in_either_header(
    server: ProviderServer, opened: Open, headers: dict[str, str]
) -> None:
    """Milliseconds are read too; and a 503 may ask for a wait as a 429 does."""
    came = times(server, error("openai", 503, headers=headers), Answer())

    async with opened() as service:
        await ask(service)

    assert came[1] - came[0] >= 0.3


async def test_a_wait_of_nothing(server: ProviderServer, opened: Open) -> None:
    """Retry-After: 0 is tried again at once, however long the backoff would be."""
    server.reply(error("openai", 429, retry_delay=0), Answer())

    async with opened(retry_wait=300.0, retry_wait_max=300.0) as service:
        async with asyncio.timeout(10):
            result = await ask(service)

    assert result.attempts == 2


@each_provider
async def test_a_wait_that_is_too_long(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """It is not waited for: the error comes at once and says when to come back."""
    server.default = error(provider, 429, retry_delay=61)

    async with opened() as service:
        async with asyncio.timeout(10):
            with pytest.raises(RateLimitError) as caught:
                await ask(service, provider)

    assert len(server.requests) == 1
    assert (caught.value.retry_after, caught.value.attempts) == (61.0, 1)
    assert caught.value.retryable


async def test_backoff_grows(server: ProviderServer, opened: Open) -> None:
    """Without a word from the provider the waits grow up to their limit."""
    down = error("anthropic", 529)
    came = times(server, down, down, down, Answer())

    async with opened(retry_wait=0.1, retry_wait_max=0.2) as service:
        await ask(service, "anthropic")

    waits = [b - a for a, b in itertools.pairwise(came)]
    assert waits[0] >= 0.1
    assert min(waits[1:]) >= 0.19


# --- what ends it ------------------------------------------------------------------------


@each_provider
async def test_a_deadline_ends_the_whole_call(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """A server that falls silent is left when the deadline comes, for good."""
    server.default = Fault("stall")

    async with opened() as service:
        async with asyncio.timeout(15):
            with pytest.raises(LLMTimeoutError, match="deadline of 1 s") as caught:
                await ask(service, provider, deadline=1)

    assert (caught.value.attempts, len(server.requests)) == (1, 1)
    assert caught.value.retryable is False
    assert (caught.value.service, caught.value.model) == (provider, MODELS[provider])


async def test_a_deadline_in_the_midst_of_retries(
    server: ProviderServer, opened: Open
) -> None:
    """It ends the waiting between attempts, and tells what the last one failed with."""
    server.default = error("openai", 503, "it is down")

    async with opened(
        max_retries=10_000, retry_wait=0.05, retry_wait_max=0.1
    ) as service:
        async with asyncio.timeout(15):
            with pytest.raises(LLMServiceError, match="it is down") as caught:
                await ask(service, deadline=0.5)

    assert caught.value.attempts == len(server.requests) > 1


async def test_a_wait_beyond_the_deadline(server: ProviderServer, opened: Open) -> None:
    """It fails at once as what it is, with the wait that the provider asked for."""
    server.default = error("openai", 429, retry_delay=30)

    async with opened() as service:
        async with asyncio.timeout(10):
            with pytest.raises(RateLimitError) as caught:
                await ask(service, deadline=20)

    assert (caught.value.retry_after, caught.value.attempts) == (30.0, 1)


async def test_a_deadline_that_is_met(server: ProviderServer, opened: Open) -> None:
    """A call that ends in time does not know of its deadline."""
    server.reply(error("openai", 503), Answer(delay=0.1))

    async with opened() as service:
        result = await ask(service, deadline=15)

    assert result.attempts == 2


@each_provider
async def test_a_timeout_ends_an_attempt(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """After `timeout` seconds the next attempt begins, on another connection."""
    server.reply(Fault("stall"), Fault("stall"), Answer("At last."))

    async with opened() as service:
        result = await ask(service, provider, timeout=1)

    assert (result.text, result.attempts) == ("At last.", 3)
    assert server.connections == 3


@each_provider
async def test_a_timeout_of_the_settings(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """Where a call names none, the settings' holds for each attempt."""
    server.default = Fault("stall")

    async with opened(timeout=0.5, max_retries=1) as service:
        with pytest.raises(LLMTimeoutError, match=r"within 0\.5 s") as caught:
            await ask(service, provider)

    assert (caught.value.attempts, len(server.requests)) == (2, 2)
    assert caught.value.retryable
    assert caught.value.status_code is None


@each_provider
async def test_a_timeout_counts_the_whole_answer(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """A server that never falls silent but never ends is left as well."""
    server.default = Fault("drip", delay=0.05)

    async with opened(max_retries=0) as service:
        with pytest.raises(LLMTimeoutError):
            await ask(service, provider, timeout=0.5)

    assert len(server.requests) == 1


async def test_a_connection_that_never_opens(keys: StaticAPIKeys) -> None:
    """`connect_timeout` counts the handshake, which is an attempt like any other."""

    async def silent(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.read()
        writer.close()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    settings = Settings(
        connect_timeout=0.2,
        max_retries=1,
        retry_wait=0.01,
        base_urls={"openai": f"https://127.0.0.1:{port}/v1"},
    )
    async with listener:
        plain = StaticAPIKeys({"openai": "sk-test"})
        async with LLMInfraService(plain, settings=settings) as service:
            await service.initialize()
            async with asyncio.timeout(15):
                with pytest.raises(LLMTimeoutError) as caught:
                    await ask(service)

    assert caught.value.attempts == 2


# --- cancelling ---------------------------------------------------------------------------


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.005)


@each_provider
async def test_cancelling_closes_the_connection(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """CancelledError passes untouched, the server sees the end, the service lives on."""
    server.reply(Fault("stall"))

    async with opened() as service:
        task = asyncio.create_task(ask(service, provider))
        await _until(lambda: server.in_flight == 1)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        await _until(lambda: server.open_connections == 0)
        after = await ask(service, provider)

    assert type(caught.value) is asyncio.CancelledError
    assert task.cancelled()
    assert after.text == "Hello from the loopback."
    assert len(server.requests) == 2


async def test_cancelling_while_it_waits(server: ProviderServer, opened: Open) -> None:
    """Between two attempts there is nothing to close, and no further attempt."""
    server.default = error("openai", 429, retry_delay=30)

    async with opened() as service:
        task = asyncio.create_task(ask(service))
        await _until(lambda: len(server.requests) == 1 and server.in_flight == 0)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert len(server.requests) == 1


async def test_the_callers_own_timeout(server: ProviderServer, opened: Open) -> None:
    """A TimeoutError of the caller's is the caller's, and no error of a provider."""
    server.default = Fault("stall")

    async with opened() as service:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1):
                await ask(service, deadline=10)
        await _until(lambda: server.open_connections == 0)

    assert not isinstance(caught.value, DiPeOLLMError)
    assert len(server.requests) == 1


class SlowKeys:
    """Takes its time to find a key."""

    def __init__(self, url: str) -> None:
        self._record = {"key": "sk-test", "service": "openai", "base_url": url}

    async def get_api_key(self, api_key_id: str) -> Mapping[str, Any]:
        """Return the record, a minute later."""
        await asyncio.sleep(60)
        return self._record


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
async def test_a_deadline_covers_the_look_up_of_the_key(
    server: ProviderServer, streamed: bool
) -> None:
    """A store of keys that hangs holds no call beyond its deadline."""
    keys = SlowKeys(server.base_url("openai"))
    async with LLMInfraService(keys, settings=Settings()) as service:
        stream = service.stream(HELLO, "gpt-4.1-nano", "k", deadline=0.2)
        opening = stream.__aenter__() if streamed else None
        calling = service.complete(HELLO, "gpt-4.1-nano", "k", deadline=0.2)
        with pytest.raises(LLMTimeoutError, match="nothing was sent") as caught:
            await (opening or calling)
        calling.close()

    assert (caught.value.attempts, caught.value.retryable) == (0, False)
    assert server.connections == 0


async def test_a_deadline_covers_the_fetching_of_a_picture(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """A site that stalls is left when the call is over."""
    held = asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        held.set()

    site = await asyncio.start_server(stall, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}/a.png"
    part = {"type": "image_url", "image_url": {"url": url}}
    settings = Settings(allow_private_urls=True)
    async with site, LLMInfraService(keys, settings=settings) as service:
        await service.initialize()
        with pytest.raises(LLMTimeoutError, match=r"deadline of 0\.3 s"):
            await service.complete(
                [{"role": "user", "content": [part]}],
                MODELS["anthropic"],
                "anthropic",
                deadline=0.3,
            )
        await asyncio.wait_for(held.wait(), 20)

    assert server.requests == []


async def test_a_timeout_of_somebody_else_is_not_the_deadlines(
    keys: StaticAPIKeys,
) -> None:
    """An adapter's own TimeoutError comes out as it went in."""
    mock = MockLLMAdapter(TimeoutError("mine"), default="x")
    async with LLMInfraService(
        keys, adapter_factory=mock, settings=Settings()
    ) as service:
        for deadline in (None, 20):
            mock.add(TimeoutError("mine"))
            with pytest.raises(TimeoutError, match="mine"):
                await service.complete(HELLO, "gpt-4o", "openai", deadline=deadline)


def attempts() -> list[Attempt]:
    """Find what there is of calls, other tests' included."""
    return [found for found in gc.get_objects() if isinstance(found, Attempt)]


@pytest.mark.parametrize("max_retries", [0, 2])
@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize(
    "reply",
    [
        error("openai", 400),
        error("openai", 503),
        Answer("abc", cut_after=2),
        Fault("reset"),
    ],
    ids=["400", "503", "cut", "reset"],
)
async def test_a_failed_call_leaves_nothing_to_the_collector(
    opened: Open, server: ProviderServer, reply: Any, streamed: bool, max_retries: int
) -> None:
    """No cycle of frames keeps a conversation after its error is gone."""
    server.default = reply

    async def fail(service: LLMInfraService) -> None:
        with contextlib.suppress(DiPeOLLMError):
            if streamed:
                async with service.stream(HELLO, MODELS["openai"], "openai") as stream:
                    await stream.result()
            else:
                await service.complete(HELLO, MODELS["openai"], "openai")

    async with opened(max_retries=max_retries) as service:
        await fail(service)
        gc.collect()
        gc.disable()
        try:
            others = attempts()
            for _ in range(5):
                await fail(service)
            await asyncio.sleep(0.05)  # the loop lets go of what has just closed
            left = [one for one in attempts() if all(one is not o for o in others)]
        finally:
            gc.enable()

    assert left == []
