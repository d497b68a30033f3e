"""The ledger: exact sums, whoever calls and however many at once, in bounded memory."""

import asyncio
import itertools
import random
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from dipeo_llm import (
    CallRecord,
    ChatResult,
    LLMInfraService,
    Message,
    PersonLLMConfig,
    RateLimitError,
    Settings,
    StaticAPIKeys,
    TokenUsage,
    UsageTotals,
)
from dipeo_llm.ledger import Ledger
from dipeo_llm.testing import MockLLMAdapter, Reply
from tests.conftest import MODELS, PROVIDERS, Open, each_provider
from tests.provider_server import Answer, Fault, ProviderServer, error

ASKED = [{"role": "user", "content": "Hello"}]


def mocked(*replies: Any, **options: Any) -> LLMInfraService:
    """Make a service that answers from a script, with a key for each provider."""
    keys = {name: {"key": f"sk-test-{name}", "service": name} for name in PROVIDERS}
    return LLMInfraService(
        StaticAPIKeys(keys),
        adapter_factory=MockLLMAdapter(*replies, **options),
        settings=Settings(retry_wait=0.001, retry_wait_max=0.002),
    )


def made(**fields: Any) -> CallRecord:
    """Make a record of a call that succeeded."""
    usual: dict[str, Any] = {
        "service": "openai",
        "model": "m",
        "status": "ok",
        "started_at": 0.0,
        "duration": 1.0,
        "requests": 1,
    }
    return CallRecord(**usual | fields)


@each_provider
async def test_a_call_is_counted(
    server: ProviderServer, opened: Open, provider: str
) -> None:
    """With the tokens and the price that its result tells."""
    server.reply(Answer(input_tokens=7, output_tokens=3), Answer(input_tokens=100))
    model = MODELS[provider]

    async with opened() as service:
        first = await service.complete(ASKED, model, provider, execution_id="a")
        second = await service.complete(ASKED, model, provider, execution_id="b")
        used = service.usage()

    assert first.token_usage is not None
    assert second.token_usage is not None
    assert used.total.tokens == first.token_usage + second.token_usage
    assert (used.total.tokens.input, used.total.tokens.output) == (107, 8)
    assert used.total.cost_usd == (first.cost_usd or 0) + (second.cost_usd or 0)
    assert used.total.unknown_cost == (2 if first.cost_usd is None else 0)
    assert used.by_service == {provider: used.total}
    assert used.by_model == {model: used.total}
    assert used.by_execution["a"].tokens == first.token_usage
    assert used.by_execution["b"].tokens == second.token_usage
    assert used.by_person == {}


async def test_all_kinds_of_tokens_are_added(
    server: ProviderServer, opened: Open
) -> None:
    """Cached and reasoning tokens are parts of input and output."""
    server.default = Answer(
        input_tokens=20, output_tokens=9, cached_tokens=12, reasoning_tokens=4
    )

    async with opened() as service:
        for _ in range(3):
            await service.complete(ASKED, MODELS["openai"], "openai")
        got = service.usage().total.tokens

    assert (got.input, got.output, got.total) == (60, 27, 87)
    assert (got.cached, got.reasoning) == (36, 12)


async def test_failures_and_cancelled_calls_are_counted_as_unknown(
    server: ProviderServer, opened: Open
) -> None:
    """Whether they used tokens is not known; a call that sent nothing used none."""
    server.reply(error("openai", 400), Fault("stall"), Answer(stall_after=2))
    model = MODELS["openai"]

    async with opened(max_retries=0) as service:
        with pytest.raises(Exception, match="400"):
            await service.complete(ASKED, model, "openai")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await service.complete(ASKED, model, "openai")
        async with service.stream(ASKED, model, "openai") as stream:
            await anext(stream)
        with pytest.raises(Exception, match="unknown"):
            await service.complete(ASKED, model, "unknown")
        got = service.usage().total

    assert (got.calls, got.errors, got.cancelled, got.requests) == (4, 2, 2, 3)
    assert (got.unknown_usage, got.unknown_cost) == (3, 3)
    assert (got.tokens, got.cost_usd) == (TokenUsage(), 0.0)


async def test_retries_are_counted_as_requests() -> None:
    """One call with three requests is one call."""
    async with mocked(RateLimitError("x"), RateLimitError("x"), "Hello") as service:
        await service.complete(ASKED, MODELS["openai"], "openai")
        got = service.usage().total

    assert (got.calls, got.errors, got.requests) == (1, 0, 3)


async def test_an_answer_from_a_cache_uses_nothing() -> None:
    """It is counted, and adds neither tokens nor cost, whatever its result says."""
    hit = ChatResult(
        text="Hello", cached=True, token_usage=TokenUsage(input=9), cost_usd=1.0
    )

    async with mocked(hit) as service:
        await service.complete(ASKED, MODELS["openai"], "openai")
        got = service.usage().total

    assert got == UsageTotals(calls=1, cached=1)


async def test_ten_thousand_calls_at_once_are_exact() -> None:
    """To the token: whole answers, streams, failures, cancelled calls, all mixed."""
    rng = random.Random(7)
    plan = [
        (
            rng.choice(PROVIDERS),
            f"person{rng.randrange(20)}",
            f"run{rng.randrange(50)}",
            rng.choice(["ok", "ok", "ok", "stream", "error", "left", "cancelled"]),
            TokenUsage(input=rng.randrange(5_000), output=rng.randrange(900)),
        )
        for _ in range(10_000)
    ]

    async def answer(request: Any) -> Reply | Exception:
        *_, kind, usage = plan[int(request.messages[-1]["content"])]
        if kind == "cancelled":
            await asyncio.Event().wait()
        await asyncio.sleep(rng.random() / 50)
        if kind == "error":
            return RateLimitError("x", retryable=False)
        return Reply(pieces=["a", "b"], usage=usage)

    async def call(service: LLMInfraService, number: int) -> None:
        provider, person, run, kind, _ = plan[number]
        model = MODELS[provider]
        said = [
            Message(from_person_id="system", to_person_id=person, content=f"{number}")
        ]
        config = PersonLLMConfig(model=model, api_key_id=provider, service=provider)
        options: Any = {"execution_id": run}
        if kind in {"stream", "left"}:
            async with service.stream_with_person(
                said, person, config, **options
            ) as stream:
                await (stream.result() if kind == "stream" else anext(stream))
            return
        asking = service.complete_with_person(said, person, config, **options)
        if kind == "cancelled":
            task = asyncio.create_task(asking)
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.wait([task])
        elif kind == "error":
            with pytest.raises(RateLimitError):
                await asking
        else:
            await asking

    async with mocked(default=answer) as service:
        await asyncio.gather(*(call(service, number) for number in range(len(plan))))
        used = service.usage()

    def expected(where: int, key: str) -> TokenUsage:
        return sum(
            (p[4] for p in plan if p[where] == key and p[3] in {"ok", "stream"}),
            TokenUsage(),
        )

    kinds = [kind for *_, kind, _ in plan]
    answered = kinds.count("ok") + kinds.count("stream")
    assert used.total.calls == 10_000
    assert used.total.errors == kinds.count("error")
    assert used.total.cancelled == kinds.count("left") + kinds.count("cancelled")
    assert used.total.unknown_usage == 10_000 - answered
    for where, found in (
        (0, used.by_service),
        (1, used.by_person),
        (2, used.by_execution),
    ):
        assert set(found) == {p[where] for p in plan}
        for key, totals in found.items():
            assert totals.tokens == expected(where, key)
            assert totals.calls == sum(p[where] == key for p in plan)
    every = sum((t.tokens for t in used.by_model.values()), TokenUsage())
    assert every == used.total.tokens


def test_threads_lose_nothing_to_each_other_nor_to_a_reset() -> None:
    """Each call is in exactly one of the snapshots."""
    ledger = Ledger(most_keys=10)
    record = made(usage=TokenUsage(input=3, output=2), cost_usd=0.5)
    each, threads = 5_000, 4
    taken = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def add(number: int) -> None:
        for i in range(each):
            ledger.add(replace(record, person_id=f"{number}-{i % 50}"))

    running = [threading.Thread(target=add, args=(n,)) for n in range(threads)]
    try:
        for thread in running:
            thread.start()
        while any(thread.is_alive() for thread in running):
            taken.append(ledger.usage(reset=True))
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    taken.append(ledger.usage())

    assert len(taken) > 1
    assert sum(used.total.calls for used in taken) == each * threads
    tokens = sum((used.total.tokens for used in taken), TokenUsage())
    assert tokens == TokenUsage(input=3 * each * threads, output=2 * each * threads)
    by_person = itertools.chain(*(used.by_person.values() for used in taken))
    assert sum(totals.calls for totals in by_person) == each * threads


async def test_a_snapshot_does_not_change_and_a_reset_starts_anew() -> None:
    """What was returned stays as it was."""
    async with mocked() as service:
        await service.complete(ASKED, MODELS["openai"], "openai")
        before = service.usage()
        await service.complete(ASKED, MODELS["openai"], "openai")
        assert before.total.calls == 1
        assert service.usage(reset=True).total.calls == 2
        assert service.usage().total == UsageTotals()
        assert service.usage().by_model == {}


def test_memory_is_bounded_and_nothing_is_lost() -> None:
    """Of ever new keys the least recently used go into one sum."""
    ledger = Ledger(most_keys=100)

    for i in range(10_000):
        for key in (f"run{i}", "again and again"):
            labels = {"execution_id": key}
            ledger.add(made(labels=labels, usage=TokenUsage(input=1), cost_usd=1.0))
    used = ledger.usage()

    assert used.total.calls == 20_000
    assert len(used.by_execution) == 101
    assert used.by_execution["again and again"].calls == 10_000
    assert used.by_execution["run9999"].calls == 1
    other = used.by_execution["(other)"]
    assert (other.calls, other.tokens.input, other.cost_usd) == (9_901, 9_901, 9_901.0)


def test_a_person_may_have_the_name_of_the_rest() -> None:
    """Both are in one sum, and no call is lost."""
    ledger = Ledger(most_keys=2)

    for person in ("(other)", "a", "b", "(other)"):
        ledger.add(made(person_id=person))

    assert {k: v.calls for k, v in ledger.usage().by_person.items()} == {
        "b": 1,
        "(other)": 3,
    }
    assert sum(v.calls for v in ledger.usage().by_person.values()) == 4


def test_usages_add_up() -> None:
    """Every number by itself, and `sum` works from an empty usage."""
    first = TokenUsage(input=5, output=3, cached=2, cache_written=1, reasoning=2)
    second = TokenUsage(input=10, output=1)

    got = first + second

    assert got == TokenUsage(
        input=15, output=4, cached=2, total=19, cache_written=1, reasoning=2
    )
    assert sum([first, second], TokenUsage()) == got
    assert (first.input, second.input) == (5, 10)
    with pytest.raises(TypeError):
        _ = first + 1  # type: ignore[operator]
