"""The doubles for an application's tests: a scripted model, assertions, a closed network."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import httpx
import pytest

from dipeo_llm import (
    ChatResult,
    LLMInfraService,
    LLMServiceError,
    LLMTimeoutError,
    Person,
    PersonLLMConfig,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    StreamInterruptedError,
    TokenUsage,
    ToolCall,
)
from dipeo_llm.domain import ChatRequest
from dipeo_llm.testing import (
    MockLLMAdapter,
    MockRequest,
    NetworkBlockedError,
    Reply,
    ScriptError,
    assert_request,
    block_network,
)
from tests.provider_server import ProviderServer

HELLO = [{"role": "user", "content": "Say hello."}]
KEYS = StaticAPIKeys({"openai": "sk-of-nobody", "anthropic": "sk-of-nobody"})
MODEL = "gpt-4.1-nano"


def on(mock: MockLLMAdapter, **settings: Any) -> LLMInfraService:
    """Make a service that talks to a mock and does not wait before retries."""
    quick = {"retry_wait": 0.001, "retry_wait_max": 0.002, **settings}
    return LLMInfraService(KEYS, settings=Settings(**quick), adapter_factory=mock)


# --- the scripted model --------------------------------------------------------------


async def test_replies_answer_in_order() -> None:
    """Each request takes the next reply of the script."""
    mock = MockLLMAdapter("one", "two")
    async with on(mock) as service:
        texts = [(await service.complete(HELLO, MODEL, "openai")).text for _ in "12"]

    assert texts == ["one", "two"]
    assert mock.replies_left == 0


async def test_a_mock_without_a_script_answers_all_the_same() -> None:
    """A test that does not care for the answer needs no script."""
    async with on(MockLLMAdapter()) as service:
        results = [await service.complete(HELLO, MODEL, "openai") for _ in range(3)]

    assert {result.text for result in results} == {"Hello from the mock."}


async def test_a_result_looks_like_a_real_one() -> None:
    """It has tokens, a model, a service and a finish reason."""
    async with on(MockLLMAdapter("Hello there, you.")) as service:
        result = await service.complete(HELLO, "anthropic/claude-x", "anthropic")

    assert result == ChatResult(
        text="Hello there, you.",
        token_usage=TokenUsage(input=2, output=3, total=5),
        finish_reason="stop",
        model="claude-x",
        service="anthropic",
        attempts=1,
    )


async def test_the_default_answers_when_the_script_has_run_out() -> None:
    """Any number of calls may follow the scripted ones."""
    mock = MockLLMAdapter("first", default="again")
    async with on(mock) as service:
        texts = [(await service.complete(HELLO, MODEL, "openai")).text for _ in "123"]

    assert texts == ["first", "again", "again"]


async def test_a_script_that_has_run_out_says_what_was_asked() -> None:
    """The failure names the number of replies and the request that got none."""
    mock = MockLLMAdapter("one")
    async with on(mock) as service:
        await service.complete(HELLO, MODEL, "openai")
        with pytest.raises(ScriptError) as caught:
            await service.complete(HELLO, MODEL, "openai")

    assert str(caught.value) == (
        "the mock has no reply left: it was given 1, and this is request 2:\n"
        "  openai/gpt-4.1-nano, user: 'Say hello.'\n"
        "Give it one more, or a default"
    )


async def test_replies_can_be_added_later() -> None:
    """A fixture makes the mock, and each test adds its replies."""
    mock = MockLLMAdapter("one")
    mock.add("two", "three")
    async with on(mock) as service:
        texts = [(await service.complete(HELLO, MODEL, "openai")).text for _ in "123"]

    assert texts == ["one", "two", "three"]


async def test_an_error_in_the_script_is_raised_with_its_owner() -> None:
    """A scripted error has the fields that a real one has."""
    async with on(
        MockLLMAdapter(RateLimitError("slow down")), max_retries=0
    ) as service:
        with pytest.raises(RateLimitError, match="slow down") as caught:
            await service.complete(HELLO, MODEL, "openai")

    error = caught.value
    assert (error.service, error.model, error.attempts) == ("openai", MODEL, 1)


async def test_the_service_retries_what_is_worth_it() -> None:
    """Retries above the adapter are the real ones."""
    mock = MockLLMAdapter(ServiceUnavailableError, RateLimitError("wait"), "there")
    async with on(mock) as service:
        result = await service.complete(HELLO, MODEL, "openai")

    assert (result.text, result.attempts, len(mock.requests)) == ("there", 3, 3)


async def test_a_reply_slower_than_the_timeout_is_a_timeout() -> None:
    """A delay meets the same limit as a slow provider."""
    mock = MockLLMAdapter(Reply(text="late", delay=60))
    async with on(mock, max_retries=0) as service:
        started = time.monotonic()
        with pytest.raises(
            LLMTimeoutError, match=r"openai did not answer within 0\.05 s"
        ):
            await service.complete(HELLO, MODEL, "openai", timeout=0.05)

    assert time.monotonic() - started < 30


async def test_a_call_can_be_cancelled_while_it_waits() -> None:
    """Cancelling reaches a mock as it reaches a connection."""
    async with on(MockLLMAdapter(Reply(delay=60))) as service:
        call = asyncio.create_task(service.complete(HELLO, MODEL, "openai"))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_tool_calls_are_scripted_by_name_and_arguments() -> None:
    """The loop of a tool-using program can be tested without a model."""
    mock = MockLLMAdapter(
        Reply(
            tool_calls=[("weather", {"city": "Wien"}), ToolCall(id="x", name="stop")]
        ),
        lambda request: f"it is {request.messages[-1]['content']}",
    )
    async with on(mock) as service:
        first = await service.complete(HELLO, MODEL, "openai")
        answer = first.tool_calls[0].to_message("warm")
        second = await service.complete(
            [*HELLO, *first.to_messages(), answer], MODEL, "openai"
        )

    assert first.finish_reason == "tool_calls"
    assert first.tool_calls[0].arguments == {"city": "Wien"}
    assert first.tool_calls[0].arguments_text == '{"city": "Wien"}'
    assert [call.name for call in first.tool_calls] == ["weather", "stop"]
    assert second.text == "it is warm"


async def _coroutine(request: ChatRequest) -> str:
    await asyncio.sleep(0)
    return f"heard {request.messages[0]['content']}"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        pytest.param(
            lambda r: r.messages[0]["content"].upper(), "SAY HELLO.", id="text"
        ),
        pytest.param(lambda r: Reply(text="made"), "made", id="function"),
        pytest.param(_coroutine, "heard Say hello.", id="coroutine"),
        pytest.param(ChatResult(text="ready", model="other"), "ready", id="result"),
        pytest.param(["in ", "pieces"], "in pieces", id="list"),
        pytest.param(Reply(pieces=["in ", "pieces"]), "in pieces", id="pieces"),
    ],
)
async def test_a_reply_may_be_made_of_many_things(script: Any, text: str) -> None:
    """Functions see the request; results and pieces are taken as they are."""
    async with on(MockLLMAdapter(script)) as service:
        result = await service.complete(HELLO, MODEL, "openai")

    assert result.text == text


async def test_what_a_function_returns_may_be_an_error() -> None:
    """A function decides for each request whether it fails."""
    mock = MockLLMAdapter(lambda request: RateLimitError("no"))
    async with on(mock, max_retries=0) as service:
        with pytest.raises(RateLimitError, match="no"):
            await service.complete(HELLO, MODEL, "openai")


async def test_a_result_in_the_script_is_not_changed() -> None:
    """The same object can be scripted twice; a caller's changes stay the caller's."""
    scripted = ChatResult(text="same", model="mine")
    mock = MockLLMAdapter(scripted, scripted)
    async with on(mock) as service:
        first = await service.complete(HELLO, MODEL, "openai")
        first.text = "changed"
        second = await service.complete(HELLO, MODEL, "openai")

    assert (second.text, second.model, second.service) == ("same", "mine", "openai")
    assert scripted.service is None


async def test_an_invalid_reply_is_refused() -> None:
    """A mistake in a script is a TypeError."""
    async with on(MockLLMAdapter(17)) as service:  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="int is not a reply"):
            await service.complete(HELLO, MODEL, "openai")


async def test_a_stream_comes_in_the_scripted_pieces() -> None:
    """Pieces, reasoning and tool calls arrive one by one, the whole result last."""
    mock = MockLLMAdapter(
        Reply(pieces=["He", "llo"], reasoning="greet", tool_calls=[("wave", {})])
    )
    async with (
        on(mock) as service,
        service.stream(HELLO, MODEL, "openai") as stream,
    ):
        chunks = [chunk async for chunk in stream]
        result = await stream.result()

    assert [chunk.text for chunk in chunks] == ["", "He", "llo", ""]
    assert chunks[0].reasoning == "greet"
    assert chunks[3].tool_call is not None
    assert chunks[3].tool_call.name == "wave"
    assert (result.text, result.reasoning) == ("Hello", "greet")
    assert mock.requests[0].streamed


async def test_a_text_streams_word_by_word() -> None:
    """A text without pieces still streams in several."""
    async with (
        on(MockLLMAdapter("one two  three")) as service,
        service.stream(HELLO, MODEL, "openai") as stream,
    ):
        texts = [chunk.text async for chunk in stream]

    assert texts == ["one ", "two  ", "three"]


async def test_a_stream_can_break_off() -> None:
    """An error after pieces is a connection that is lost in the middle."""
    mock = MockLLMAdapter(
        Reply(pieces=["He", "llo"], error=ServiceUnavailableError("cut"))
    )
    async with (
        on(mock) as service,
        service.stream(HELLO, MODEL, "openai") as stream,
    ):
        with pytest.raises(StreamInterruptedError, match="cut") as caught:
            await stream.result()

    assert caught.value.partial_text == "Hello"


async def test_a_stream_that_cannot_begin_is_tried_again() -> None:
    """An error before any piece is one that the service may retry."""
    mock = MockLLMAdapter(ServiceUnavailableError("down"), ["up"])
    async with (
        on(mock) as service,
        service.stream(HELLO, MODEL, "openai") as stream,
    ):
        texts = [chunk.text async for chunk in stream]

    assert texts == ["up"]
    assert len(mock.requests) == 2


async def test_a_silent_stream_meets_the_idle_timeout() -> None:
    """A delay between pieces meets the same limit as a stalled provider."""
    mock = MockLLMAdapter(Reply(pieces=["a", "b"], piece_delay=60))
    async with (
        on(mock, max_retries=0) as service,
        service.stream(HELLO, MODEL, "openai", idle_timeout=0.05) as stream,
    ):
        with pytest.raises(StreamInterruptedError, match="sent nothing for"):
            await stream.result()


async def test_requests_are_recorded_with_provider_and_model() -> None:
    """A test can see the provider, the model and the options of a request."""
    mock = MockLLMAdapter()
    async with on(mock) as service:
        await service.complete(HELLO, MODEL, "openai", temperature=0)
        await service.complete(HELLO, "anthropic/claude-x", "anthropic")

    asked = [(r.provider, r.model, r.streamed) for r in mock.requests]
    assert asked == [("openai", MODEL, False), ("anthropic", "claude-x", False)]
    assert mock.requests[0].messages == HELLO
    assert mock.requests[0].request.sampling == {"temperature": 0}


async def test_a_person_talks_through_a_mock() -> None:
    """System prompt and roles reach the mock as they would reach the real adapter."""
    mock = MockLLMAdapter("Wonderful!")
    config = PersonLLMConfig(
        model=MODEL, api_key_id="openai", system_prompt="You are an optimist."
    )
    async with on(mock) as service:
        await Person(id="optimist", llm_config=config).complete("A bakery?", service)

    assert [m["role"] for m in mock.requests[0].messages] == ["system", "user"]


async def test_a_mock_stands_alone() -> None:
    """Without a service it is an adapter like any other."""
    mock = MockLLMAdapter("hi")

    result = await mock.complete(ChatRequest(messages=HELLO))

    assert (result.text, result.service, result.model) == ("hi", "openai", "mock-model")
    await mock.aclose()


async def test_parallel_calls_get_one_reply_each() -> None:
    """No reply is given twice, and none is lost."""
    mock = MockLLMAdapter(*(str(i) for i in range(20)))
    async with on(mock) as service:
        calls = (service.complete(HELLO, MODEL, "openai") for _ in range(20))
        results = await asyncio.gather(*calls)

    assert sorted(int(result.text) for result in results) == list(range(20))


async def test_a_mock_has_no_connection_to_ask_for_models() -> None:
    """Such a question does not reach the provider."""
    async with on(MockLLMAdapter()) as service:
        with pytest.raises(
            (ScriptError, LLMServiceError), match="only answers complete"
        ):
            await service.get_available_models("openai")


# --- what was asked ------------------------------------------------------------------


@pytest.fixture
async def asked() -> MockLLMAdapter:
    """Return a mock that received two requests."""
    mock = MockLLMAdapter()
    async with on(mock) as service:
        await service.complete(HELLO, MODEL, "openai", temperature=0, max_tokens=9)
        await service.complete(
            [{"role": "user", "content": "Say goodbye."}], MODEL, "openai"
        )
    return mock


@pytest.mark.parametrize(
    "expected",
    [
        {},
        {"provider": "openai", "model": MODEL},
        {"messages": HELLO, "temperature": 0},
        {"messages": [{"role": "user", "content": "Say goodbye."}]},
        {"temperature": ...},
        {"streamed": False, "times": 2},
        {"temperature": 1, "times": 0},
        {"max_tokens": pytest.approx(9), "times": 1},
    ],
)
def test_a_request_that_was_made_satisfies(
    asked: MockLLMAdapter, expected: dict[str, Any]
) -> None:
    """Any fields may be given, with or without a number of times."""
    assert_request(asked, **expected)
    assert_request(asked.requests, **expected)


def test_one_request_can_be_looked_at(asked: MockLLMAdapter) -> None:
    """The argument may be one request of the list."""
    assert_request(asked.requests[1], messages=[{"role": "user", "content": ...}])


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "Say bye."}], "temperature": 0},
            (
                "no request was made with messages=[{'role': 'user', 'content': 'Say bye.'}],"
                " temperature=0\n"
                "request 1 of 2 differs in:\n"
                "  messages[0].content\n"
                "    expected: 'Say bye.'\n"
                "    was:      'Say hello.'"
            ),
        ),
        (
            {"temperature": 1, "max_tokens": 9},
            (
                "no request was made with temperature=1, max_tokens=9\n"
                "request 1 of 2 differs in:\n"
                "  temperature\n"
                "    expected: 1\n"
                "    was:      0"
            ),
        ),
        (
            {"seed": ...},
            (
                "no request was made with seed=...\n"
                "request 1 of 2 differs in:\n"
                "  seed\n"
                "    expected: (anything)\n"
                "    was:      (nothing)"
            ),
        ),
        (
            {"model": MODEL, "times": 3},
            f"2 of 2 requests were made with model={MODEL!r}, not 3",
        ),
    ],
)
def test_a_missing_request_is_explained_field_by_field(
    asked: MockLLMAdapter, expected: dict[str, Any], message: str
) -> None:
    """The failure shows the nearest request, and only its different fields."""
    with pytest.raises(AssertionError) as caught:
        assert_request(asked, **expected)

    assert str(caught.value) == message


def test_a_program_without_requests_is_explained() -> None:
    """The message says that there was no request."""
    with pytest.raises(AssertionError, match=r"^no request was made with model='x'$"):
        assert_request(MockLLMAdapter(), model="x")


def test_a_single_request_has_no_number() -> None:
    """The message does not count a single request."""
    only = MockRequest("openai", MODEL, ChatRequest(messages=HELLO))

    with pytest.raises(AssertionError, match="\nthe request differs in:\n  model\n"):
        assert_request(only, model="other")


# --- the closed network --------------------------------------------------------------


def _connect(address: tuple[str, int]) -> None:
    with socket.socket() as client:
        client.connect(address)


def _httpx_get(url: str) -> None:
    with httpx.Client(trust_env=False) as client:
        client.get(url)


async def _get(url: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(url):
        pass


@pytest.mark.parametrize(
    "reach",
    [
        pytest.param(lambda: _connect(("192.0.2.1", 443)), id="connect"),
        pytest.param(lambda: socket.create_connection(("192.0.2.1", 443)), id="create"),
        pytest.param(lambda: socket.getaddrinfo("api.openai.com", 443), id="look up"),
        pytest.param(lambda: socket.gethostbyname("api.openai.com"), id="by name"),
        pytest.param(lambda: _httpx_get("https://api.openai.com"), id="httpx"),
        pytest.param(lambda: asyncio.run(_get("https://192.0.2.1")), id="aiohttp"),
        pytest.param(
            lambda: asyncio.run(_get("https://api.openai.com")), id="resolver"
        ),
    ],
)
def test_nothing_leaves_a_closed_network(reach: Callable[[], None]) -> None:
    """No way in Python looks a name up or connects to an address."""
    with (
        block_network(),
        pytest.raises(NetworkBlockedError, match=r"refused to .*(openai|192\.0\.2\.1)"),
    ):
        reach()


async def test_this_machine_can_be_reached(server: ProviderServer) -> None:
    """A loopback server of the test's own still answers."""
    with block_network():
        async with httpx.AsyncClient(trust_env=False) as client:
            response = await client.get(f"{server.base_url('openai')}/models")

    assert response.status_code == 401


async def test_this_machine_can_be_closed_too(server: ProviderServer) -> None:
    """Without loopback no socket connects at all."""
    with (
        block_network(allow_loopback=False),
        pytest.raises(
            NetworkBlockedError, match=r"refused to connect to 127\.0\.0\.1:"
        ),
    ):
        _connect((server.host, server.port))


def test_the_network_is_as_before_afterwards() -> None:
    """Blocks may nest, and put everything back, even after an error."""

    def block_and_fail() -> None:
        with block_network(), block_network(allow_loopback=False):
            raise ZeroDivisionError

    before = dict(vars(socket.socket)), socket.getaddrinfo
    with pytest.raises(ZeroDivisionError):
        block_and_fail()

    assert (dict(vars(socket.socket)), socket.getaddrinfo) == before
    assert not {"connect", "connect_ex", "sendto"} & set(vars(socket.socket))
    assert socket.getaddrinfo.__module__ == "socket"


async def test_a_blocked_call_of_the_service_tells_why() -> None:
    """The error says that the network is closed."""
    async with LLMInfraService(KEYS, settings=Settings(max_retries=0)) as service:
        with (
            block_network(),
            pytest.raises((NetworkBlockedError, LLMServiceError), match="is closed by"),
        ):
            await service.complete(HELLO, MODEL, "openai")
