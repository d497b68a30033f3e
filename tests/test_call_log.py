"""The log of calls: one line after each, one before each retry, with nothing secret."""

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest
import stamina

from dipeo_llm import (
    InvalidRequestError,
    LLMInfraService,
    Message,
    PersonLLMConfig,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.testing import MockLLMAdapter, Reply
from tests.conftest import MODELS, Open, each_provider
from tests.provider_server import Answer, ProviderServer, error

SECRET = "a-secret-of-the-prompt"
ASKED = [{"role": "user", "content": SECRET}]


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    """Return what the log of calls said."""
    found = [r for r in caplog.records if r.name == "dipeo_llm.calls"]
    return [r for r in found if r.levelno == level]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Collect the log of calls from INFO on."""
    caplog.set_level(logging.INFO, "dipeo_llm.calls")
    return caplog


@each_provider
async def test_a_call_is_one_line(
    server: ProviderServer,
    opened: Open,
    log: pytest.LogCaptureFixture,
    provider: str,
) -> None:
    """As text and as fields; without the prompt, the answer and the key."""
    server.reply(Answer(SECRET, input_tokens=7, output_tokens=3))
    model = MODELS[provider]

    async with opened() as service:
        result = await service.complete(ASKED, model, provider, execution_id="run 7")

    [line] = lines(log, logging.INFO)
    text = line.getMessage()
    assert text.startswith(f"{provider}/{model}: ok in ")
    for said in ("7 + 3 tokens", "1 attempt,", "finish stop", "execution_id run 7"):
        assert said in text
    fields = vars(line)
    assert (fields["provider"], fields["model"]) == (provider, model)
    assert (fields["status"], fields["finish_reason"]) == ("ok", "stop")
    assert (fields["attempts"], fields["labels"]) == (1, {"execution_id": "run 7"})
    assert fields["tokens"]["total"] == 10
    assert fields["cost_usd"] == result.cost_usd
    assert fields["request_id"] == result.request_id
    assert 0 < fields["seconds"] < 20
    assert SECRET not in repr(fields)
    assert "sk-test" not in repr(fields)
    assert "\n" not in text


async def test_a_person_is_named(log: pytest.LogCaptureFixture) -> None:
    """By its id; a text that could pass for another line is quoted."""
    service = LLMInfraService(
        StaticAPIKeys({"k": {"key": "sk-test-openai", "service": "openai"}}),
        adapter_factory=MockLLMAdapter(),
    )
    said = [Message(from_person_id="system", to_person_id="a", content=SECRET)]
    config = PersonLLMConfig(model="gpt-4.1-nano", api_key_id="k")

    async with service:
        await service.complete_with_person(said, "alice", config)
        await service.complete_with_person(said, "a\nERROR forged", config)

    first, second = lines(log, logging.INFO)
    assert "person alice" in first.getMessage()
    assert vars(first)["person_id"] == "alice"
    assert "\n" not in second.getMessage()
    assert r"person 'a\nERROR forged'" in second.getMessage()


async def test_a_failed_call_is_one_line(
    server: ProviderServer, opened: Open, log: pytest.LogCaptureFixture
) -> None:
    """With the class of its error, but not its words: providers quote the prompt."""
    server.reply(error("openai", 400, f"cannot answer {SECRET!r}"))

    async with opened() as service:
        with pytest.raises(InvalidRequestError, match=SECRET):
            await service.complete(ASKED, MODELS["openai"], "openai")

    [line] = lines(log, logging.INFO)
    assert "InvalidRequestError 400 in " in line.getMessage()
    assert "unknown tokens, unknown cost" in line.getMessage()
    assert vars(line)["error"] == "InvalidRequestError"
    assert vars(line)["status_code"] == 400
    assert SECRET not in log.text


@pytest.mark.parametrize("is_left", [False, True])
async def test_a_stream_is_one_line(
    server: ProviderServer,
    opened: Open,
    log: pytest.LogCaptureFixture,
    *,
    is_left: bool,
) -> None:
    """When it has ended or was left."""
    async with (
        opened() as service,
        service.stream(ASKED, MODELS["openai"], "openai") as stream,
    ):
        await (anext(stream) if is_left else stream.result())

    [line] = lines(log, logging.INFO)
    assert vars(line)["status"] == ("left" if is_left else "ok")


@each_provider
async def test_a_retry_is_a_warning(
    server: ProviderServer,
    opened: Open,
    log: pytest.LogCaptureFixture,
    provider: str,
) -> None:
    """Before its wait, with the reason, the wait, and which attempt comes next."""
    server.reply(error(provider, 429, SECRET, retry_delay=0.3), error(provider, 503))
    name = f"{provider}/{MODELS[provider]}"

    async with opened(max_retries=3) as service:
        call = asyncio.create_task(service.complete(ASKED, MODELS[provider], provider))
        while not lines(log, logging.WARNING):  # noqa: ASYNC110 - logging has no event
            await asyncio.sleep(0.01)
        assert not call.done()
        assert len(server.requests) == 1
        await call

    first, second = lines(log, logging.WARNING)
    assert first.getMessage() == f"{name}: 429, next attempt in 0.3 s (2 of 4)"
    assert second.getMessage() == f"{name}: 503, next attempt in 0.0 s (3 of 4)"
    assert (vars(first)["wait"], vars(first)["attempt"]) == (0.3, 2)
    [line] = lines(log, logging.INFO)
    assert "3 attempts" in line.getMessage()
    assert SECRET not in log.text


async def test_the_last_failure_is_no_retry(log: pytest.LogCaptureFixture) -> None:
    """N retries are N warnings; questions besides calls are warned of too."""
    nobody = {"key": "sk-test", "service": "openai", "base_url": "http://127.0.0.1:1"}
    settings = Settings(max_retries=2, retry_wait=0.01, retry_wait_max=0.01)

    async with LLMInfraService(StaticAPIKeys({"k": nobody}), settings=settings) as it:
        with pytest.raises(ServiceUnavailableError):
            await it.complete(ASKED, MODELS["openai"], "k")
        assert len(lines(log, logging.WARNING)) == 2
        with pytest.raises(ServiceUnavailableError):
            await it.get_available_models("k")

    _, _, third, fourth = lines(log, logging.WARNING)
    assert third.getMessage() == (
        "openai: ServiceUnavailableError, next attempt in 0.0 s (2 of 3)"
    )
    assert "(3 of 3)" in fourth.getMessage()


async def test_nothing_is_said_where_nobody_listens(
    server: ProviderServer, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A call is logged at INFO, which an application has to ask for."""
    async with opened() as service:
        await service.complete(ASKED, MODELS["openai"], "openai")

    assert [r for r in caplog.records if r.name == "dipeo_llm.calls"] == []


# --- stamina --------------------------------------------------------------------------


def failing_once(*errors: Exception, **settings: Any) -> LLMInfraService:
    """Make a service whose first requests fail."""
    return LLMInfraService(
        StaticAPIKeys({"k": {"key": "sk-test-openai", "service": "openai"}}),
        adapter_factory=MockLLMAdapter(*errors, default=Reply(text="Hello")),
        settings=Settings(**settings),
    )


_PROGRAM = """
import asyncio
from dipeo_llm import *
from dipeo_llm.testing import MockLLMAdapter

async def main():
    service = LLMInfraService(
        StaticAPIKeys({"k": {"key": "sk-test", "service": "openai"}}),
        adapter_factory=MockLLMAdapter(RateLimitError("x", status_code=429), "Hello"),
        settings=Settings(retry_wait=0.01, retry_wait_max=0.01),
    )
    async with service:
        await service.complete([{"role": "user", "content": "x"}], "gpt-4.1-nano", "k")

asyncio.run(main())
"""


def test_a_program_without_logging_sees_a_sentence() -> None:
    """And not stamina's bare "stamina.retry_scheduled"."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )

    assert done.stdout == ""
    assert done.stderr == "openai/gpt-4.1-nano: 429, next attempt in 0.0 s (2 of 4)\n"


async def test_the_hooks_of_stamina_are_the_applications() -> None:
    """They are neither called for a retry here nor changed."""
    called: list[Any] = []

    def hook(details: stamina.instrumentation.RetryDetails) -> None:
        called.append(details)

    stamina.instrumentation.set_on_retry_hooks([hook])
    try:
        async with failing_once(RateLimitError("x"), retry_wait=0.0) as service:
            await service.complete(ASKED, "gpt-4.1-nano", "k")
        assert stamina.instrumentation.get_on_retry_hooks() == (hook,)
        assert called == []

        @stamina.retry(on=ValueError, attempts=2, wait_initial=0.0, wait_jitter=0.0)
        async def fail() -> None:
            raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011 - it has no message
            await fail()
        assert len(called) == 1
    finally:
        stamina.instrumentation.set_on_retry_hooks(None)


async def test_stamina_switches_retries_off() -> None:
    """An application that calls `stamina.set_active(False)` means these too."""
    stamina.set_active(False)
    try:
        async with failing_once(RateLimitError("x")) as service:
            with pytest.raises(RateLimitError) as caught:
                await service.complete(ASKED, "gpt-4.1-nano", "k")
    finally:
        stamina.set_active(True)

    assert caught.value.attempts == 1


async def test_stamina_ends_the_waits_in_tests() -> None:
    """Under `stamina.set_testing(True)` an attempt follows at once."""
    slow = RateLimitError("x", retry_after=50.0)

    with stamina.set_testing(True):
        async with failing_once(slow, slow) as service, asyncio.timeout(5):
            result = await service.complete(ASKED, "gpt-4.1-nano", "k")

    assert result.attempts == 3
