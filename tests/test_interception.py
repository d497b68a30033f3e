"""Exchanges recorded from a server and replayed without it, on every HTTP stack."""

import asyncio
import gzip
import importlib
import json
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import httpx2
import pytest
import yaml

from dipeo_llm import (
    APIKeyError,
    APIKeyNotFoundError,
    EnvironmentAPIKeys,
    LLMInfraService,
    RateLimitError,
    Settings,
    StaticAPIKeys,
    create_adapter,
)
from dipeo_llm.litellm_import import load_litellm
from dipeo_llm.testing import (
    CassetteMismatchError,
    CassetteUnusedError,
    assert_request,
    use_cassette,
)
from tests.provider_server import Answer, ProviderServer, Raw, error

HELLO = [{"role": "user", "content": "Say hello."}]
MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-haiku-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2:1b",
}
QUICK = Settings(retry_wait=0.001, retry_wait_max=0.002)


def service_on(server: ProviderServer, settings: Settings = QUICK) -> LLMInfraService:
    """Make a service whose every provider is the server, dead or alive."""
    keys = {
        name: {"key": f"sk-of-{name}-0123456789", "base_url": server.base_url(name)}
        for name in MODELS
    }
    return LLMInfraService(StaticAPIKeys(keys), settings=settings)


def text_of(path: Path) -> str:
    """Read a cassette."""
    return path.read_text("utf-8")


def files_in(folder: Path) -> list[Path]:
    """List what is in a folder, or would be."""
    return list(folder.glob("*"))


def edit(path: Path, body: str) -> None:
    """Change the first answer of a cassette by hand."""
    data = yaml.safe_load(text_of(path))
    data["interactions"][0]["response"]["body"]["string"] = body
    path.write_text(yaml.safe_dump(data), encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a test's cassette."""
    return tmp_path / "cassettes" / "test.yaml"


async def both(
    path: Path,
    program: Callable[[LLMInfraService], Awaitable[Any]],
    *replies: Any,
    settings: Settings = QUICK,
    **options: Any,
) -> tuple[Any, Any]:
    """Run a program with its server, recorded, and then without; return both results."""
    async with ProviderServer() as server, service_on(server, settings) as service:
        server.reply(*replies)
        with use_cassette(path, record="once", **options):
            was = await program(service)
    async with service_on(server, settings) as service:
        with use_cassette(path, **options):
            return was, await program(service)


async def both_by_url(
    path: Path, program: Callable[[str], Awaitable[Any]], *replies: Any, **options: Any
) -> tuple[Any, Any]:
    """Run a program that takes an address, likewise."""
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(*replies)
        with use_cassette(path, record="once", **options):
            was = await program(url)
    with use_cassette(path, **options):
        return was, await program(url)


def hello(provider: str, **options: Any) -> Callable[[LLMInfraService], Any]:
    """Return a program that says hello to a provider."""
    return lambda s: s.complete(HELLO, MODELS[provider], provider, **options)


each_engine = pytest.mark.parametrize("engine", ["direct", "litellm"])
each_provider = pytest.mark.parametrize("provider", MODELS)


# --- the package's own calls ---------------------------------------------------------


@each_engine
@each_provider
async def test_a_call_replays_without_its_server(
    path: Path, provider: str, engine: Any
) -> None:
    """The result is the same in every field, by either engine."""
    recorded = Answer("Recorded.", cached_tokens=3)
    settings = Settings(engine=engine)

    was, now = await both(path, hello(provider), recorded, settings=settings)

    assert now.text == "Recorded."
    if engine == "direct":  # LiteLLM makes an id up where a provider gives none
        assert now.raw_response == was.raw_response
    ignored = {"raw_response", "request_id"}
    assert now.model_dump(exclude=ignored) == was.model_dump(exclude=ignored)


@each_engine
@each_provider
async def test_a_stream_replays_as_a_stream(
    path: Path, provider: str, engine: Any
) -> None:
    """The chunks are those of the recording, one by one."""

    async def chunks(service: LLMInfraService) -> list[str]:
        async with service.stream(HELLO, MODELS[provider], provider) as stream:
            return [chunk.text async for chunk in stream]

    was, now = await both(
        path,
        chunks,
        Answer("one two three four", chunk_delay=0.01),
        settings=Settings(engine=engine),
    )

    assert "".join(now) == "one two three four"
    assert len(now) > 1
    assert now == was


async def test_errors_and_retries_replay(path: Path) -> None:
    """503, then 429, then 200: the same attempts, without the waits between them."""
    async with ProviderServer() as server, service_on(server) as service:
        server.reply(
            error("openai", 503),
            error("openai", 429, retry_delay=0.01),
            Answer("there"),
        )
        with use_cassette(path, record="once"):
            await hello("openai")(service)
    patient = Settings(retry_wait=100, retry_wait_max=1000)
    started = time.monotonic()
    async with service_on(server, patient) as service:
        with use_cassette(path) as cassette:
            result = await hello("openai")(service)

    assert (result.text, result.attempts) == ("there", 3)
    assert len(cassette.requests) == 3
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("status", "cls"), [(401, APIKeyError), (429, RateLimitError)])
async def test_a_provider_error_is_the_same_error(
    path: Path, status: int, cls: type[Exception]
) -> None:
    """It has its status and its words."""

    async def fail(service: LLMInfraService) -> Any:
        with pytest.raises(cls, match="said so") as caught:
            await hello("anthropic")(service)
        return type(caught.value), str(caught.value), vars(caught.value)["status_code"]

    refusal = error("anthropic", status, "said so")
    was, now = await both(path, fail, refusal, settings=Settings(max_retries=0))

    assert now == was
    assert now[2] == status


async def test_parallel_identical_requests_get_one_answer_each(path: Path) -> None:
    """No recorded answer is given twice, and none is lost."""

    async def texts(service: LLMInfraService) -> list[str]:
        calls = (hello("openai")(service) for _ in range(5))
        return sorted(result.text for result in await asyncio.gather(*calls))

    was, now = await both(path, texts, *(Answer(f"answer {i}") for i in range(5)))

    assert now == was == [f"answer {i}" for i in range(5)]


async def test_requests_may_come_in_another_order(path: Path) -> None:
    """Only identical requests are answered in the order of the recording."""
    words = ["one", "two", "three"]

    async def texts(service: LLMInfraService) -> list[str]:
        said = []
        for word in words:
            messages = [{"role": "user", "content": word}]
            result = await service.complete(messages, MODELS["openai"], "openai")
            said.append(result.text)
        words.reverse()
        return said

    def echo(asked: Any) -> Answer:
        return Answer(asked.json["messages"][-1]["content"])

    was, now = await both(path, texts, echo, echo, echo)

    assert (was, now) == (["one", "two", "three"], ["three", "two", "one"])


async def test_a_list_of_models_replays(path: Path) -> None:
    """Requests without a body are kept too."""
    was, now = await both(path, lambda s: s.get_available_models("openai"))

    assert now == was
    assert len(now) > 1


@pytest.mark.parametrize("api_key_id", ["openai", "groq", "mistral"])
def test_a_replay_has_a_key_for_every_provider(path: Path, api_key_id: str) -> None:
    """The variable need not be set, whether this package or LiteLLM knows it."""
    keys = EnvironmentAPIKeys()
    with pytest.raises(APIKeyNotFoundError):
        keys.get_api_key(api_key_id)
    with use_cassette(path):
        record = keys.get_api_key(api_key_id)
        with pytest.raises(APIKeyNotFoundError):
            keys.get_api_key("nobody")

    assert record["key"] == "key-of-the-replay"


# --- requests that do not fit --------------------------------------------------------


@pytest.fixture
async def recorded(path: Path) -> ProviderServer:
    """Record "Say hello." from each provider; the server is gone afterwards."""
    async with ProviderServer() as server, service_on(server) as service:
        with use_cassette(path, record="once"):
            for provider, model in MODELS.items():
                await service.complete(HELLO, model, provider)
    return server


@each_engine
@each_provider
async def test_a_request_without_a_recording_fails_at_once(
    recorded: ProviderServer, path: Path, provider: str, engine: Any
) -> None:
    """Nothing retries it, and nothing takes it for a provider's error."""
    patient = Settings(engine=engine, retry_wait=100, retry_wait_max=1000)
    messages = [{"role": "user", "content": "Say hello twice."}]
    started = time.monotonic()
    async with service_on(recorded, patient) as service:
        with pytest.raises(CassetteMismatchError) as caught, use_cassette(path):
            await service.complete(messages, MODELS[provider], provider)

    assert time.monotonic() - started < 60
    text = str(caught.value)
    assert "recorded: 'Say hello.'" in text
    assert "now:      'Say hello twice.'" in text
    assert f"exchange {[*MODELS].index(provider) + 1} of 4" in text


async def test_a_stream_without_a_recording_fails_at_once(
    recorded: ProviderServer, path: Path
) -> None:
    """A request for a stream is another request."""
    async with service_on(recorded) as service:
        stream = service.stream(HELLO, MODELS["openai"], "openai")
        with (
            pytest.raises(CassetteMismatchError, match=r"body\.stream\n"),
            use_cassette(path),
        ):
            await stream.__aenter__()


async def test_a_program_that_swallows_the_failure_fails_all_the_same(
    recorded: ProviderServer, path: Path
) -> None:
    """A task that nobody waits for cannot hide a request without a recording."""

    async def program() -> None:
        async with service_on(recorded) as service:
            call = service.complete([*HELLO, *HELLO], MODELS["openai"], "openai")
            await asyncio.gather(call, return_exceptions=True)

    with (
        pytest.raises(CassetteMismatchError, match=r"body\.messages\[1\]"),
        use_cassette(path),
    ):
        await program()


async def test_an_unused_exchange_fails_the_test(
    recorded: ProviderServer, path: Path
) -> None:
    """A call that is no longer made fails the test, unless that is allowed."""
    async with service_on(recorded) as service:
        with (
            pytest.raises(CassetteUnusedError, match="3 of 4 recorded exchanges"),
            use_cassette(path),
        ):
            await service.complete(HELLO, MODELS["openai"], "openai")
        with use_cassette(path, allow_unused=True):
            await service.complete(HELLO, MODELS["openai"], "openai")


async def test_one_more_call_is_explained(recorded: ProviderServer, path: Path) -> None:
    """The message does not show an empty list of differences."""
    async with service_on(recorded) as service:
        with use_cassette(path, allow_unused=True) as cassette:
            await service.complete(HELLO, MODELS["openai"], "openai")
            with pytest.raises(
                CassetteMismatchError, match="recorded once, and is made once more now"
            ):
                await service.complete(HELLO, MODELS["openai"], "openai")
            cassette.mismatches.clear()


async def test_volatile_fields_can_be_named(path: Path) -> None:
    """A seed that differs in each run need not be the recorded one."""
    seeds = iter((1, 2))

    async def seeded(service: LLMInfraService) -> Any:
        return await hello("openai", seed=next(seeds))(service)

    was, now = await both(path, seeded, ignore=["seed"])

    assert now.text == was.text


# --- what is recorded when -----------------------------------------------------------


async def test_once_records_only_where_there_is_no_file(path: Path) -> None:
    """A second run replays, whatever the server would answer now."""
    texts = []
    async with ProviderServer() as server, service_on(server) as service:
        server.reply(Answer("first"), Answer("second"))
        for _ in range(2):
            with use_cassette(path, record="once"):
                result = await service.complete(HELLO, MODELS["openai"], "openai")
                texts.append(result.text)

    assert texts == ["first", "first"]
    assert len(server.requests) == 1


async def test_new_records_what_is_missing_and_drops_what_is_not_used(
    path: Path,
) -> None:
    """After a change only what has changed is asked again."""
    goodbye = [{"role": "user", "content": "Say goodbye."}]
    async with ProviderServer() as server, service_on(server) as service:
        server.reply(Answer("hello"), Answer("old"), Answer("goodbye"))
        with use_cassette(path, record="once"):
            await service.complete(HELLO, MODELS["openai"], "openai")
            await service.complete(HELLO, MODELS["openai"], "openai", seed=1)
        with use_cassette(path, record="new") as cassette:
            await service.complete(HELLO, MODELS["openai"], "openai")
            await service.complete(goodbye, MODELS["openai"], "openai")
            assert len(server.requests) == 3
    async with service_on(server) as service:
        with use_cassette(path) as cassette:
            await service.complete(HELLO, MODELS["openai"], "openai")
            result = await service.complete(goodbye, MODELS["openai"], "openai")

    assert result.text == "goodbye"
    assert len(cassette) == 2


async def test_all_records_everything_again(path: Path) -> None:
    """Nothing of the old file stays."""
    async with ProviderServer() as server, service_on(server) as service:
        server.reply(Answer("first"), Answer("second"))
        for _ in range(2):
            with use_cassette(path, record="all"):
                await service.complete(HELLO, MODELS["openai"], "openai")

    assert len(server.requests) == 2
    assert text_of(path).count("- request:") == 1
    assert "second" in text_of(path)
    assert "first" not in text_of(path)


async def test_a_missing_cassette_is_named(path: Path) -> None:
    """The first run of a new test shows the command."""
    async with service_on(ProviderServer()) as service:
        with (
            pytest.raises(
                CassetteMismatchError, match="no such cassette yet"
            ) as caught,
            use_cassette(path),
        ):
            await service.complete(HELLO, MODELS["openai"], "openai")

    assert 'use_cassette(…, record="once")' in str(caught.value)
    assert files_in(path.parent) == []


def test_a_file_that_contains_no_cassette_is_named(path: Path) -> None:
    """A merge conflict is not an empty cassette."""
    path.parent.mkdir()
    path.write_text("<<<<<<< HEAD\n", encoding="utf-8")

    with pytest.raises(
        BaseException, match=r"test\.yaml contains no cassette"
    ) as caught:
        use_cassette(path).__enter__()

    assert type(caught.value).__name__ == "CassetteError"


async def test_a_cassette_can_be_asked_what_was_sent(
    recorded: ProviderServer, path: Path
) -> None:
    """Assertions on the bytes that a provider would have got."""
    async with service_on(recorded) as service:
        with use_cassette(path, allow_unused=True) as cassette:
            await service.complete(HELLO, MODELS["openai"], "openai")

    assert_request(
        cassette, method="POST", path="/v1/chat/completions", messages=HELLO, times=1
    )
    assert_request(cassette.requests[0], model=MODELS["openai"])


# --- both stacks, below and beside the package ---------------------------------------


@asynccontextmanager
async def _through_httpx() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False) as client:
        yield client


@asynccontextmanager
async def _through_httpx2() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(trust_env=False) as client:
        yield client


@asynccontextmanager
async def _through_aiohttp() -> AsyncIterator[httpx.AsyncClient]:
    """LiteLLM's own way: httpx in front, aiohttp below."""
    await load_litellm()
    name = "litellm.llms.custom_httpx.aiohttp_transport"
    transport = importlib.import_module(name).LiteLLMAiohttpTransport
    async with (
        aiohttp.ClientSession() as session,
        httpx.AsyncClient(transport=transport(client=session)) as client,
    ):
        yield client


STACKS = pytest.mark.parametrize(
    "stack",
    [_through_httpx, _through_httpx2, _through_aiohttp],
    ids=["httpx", "httpx2", "aiohttp"],
)


async def _pieces(stack: Any, url: str) -> list[bytes]:
    async with (
        stack() as client,
        client.stream("POST", url, json={"stream": True}) as response,
    ):
        return [piece async for piece in response.aiter_bytes()]


SSE = {"content-type": "text/event-stream"}


def _events(count: int) -> list[bytes]:
    return [
        b'data: {"n": "%d", "fill": "%s"}\n\n' % (i, b"x" * 90) for i in range(count)
    ]


def _gzipped(pieces: list[bytes]) -> list[bytes]:
    packer = zlib.compressobj(wbits=31)
    packed = [packer.compress(p) + packer.flush(zlib.Z_SYNC_FLUSH) for p in pieces]
    return [*packed, packer.flush()]


@STACKS
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_pieces_replay_as_they_came(path: Path, stack: Any, packed: bool) -> None:
    """Each event is a piece of its own, compressed or not."""
    events = _events(5)
    headers = SSE | ({"content-encoding": "gzip"} if packed else {})
    body = _gzipped(events) if packed else events
    raw = Raw(headers=headers, body=body, framing="chunked", piece_delay=0.05)

    was, now = await both_by_url(path, lambda url: _pieces(stack, url), raw)

    assert now == was == events


@STACKS
async def test_pieces_can_take_their_time(path: Path, stack: Any) -> None:
    """With real timing a replay is as slow as the recording was; without, it is not."""
    body = _events(3)
    took = []

    async def timed(url: str) -> list[bytes]:
        started = time.monotonic()
        pieces = await _pieces(stack, url)
        took.append(time.monotonic() - started)
        return pieces

    raw = Raw(headers=SSE, body=body, framing="chunked", piece_delay=0.3)
    await both_by_url(path, timed, raw)
    await both_by_url(path, timed, real_timing=True)

    assert min(took[0], *took[2:]) > 0.5
    assert took[3] > took[1] + 0.3


@STACKS
async def test_a_packed_answer_is_kept_unpacked(path: Path, stack: Any) -> None:
    """The file can be read and searched, and every stack replays it."""
    body = gzip.compress(json.dumps({"text": "packed"}).encode())
    raw = Raw(headers={"content-encoding": "gzip"}, body=body)

    async def ask(url: str, by: Any = stack) -> Any:
        async with by() as client:
            return (await client.post(url, json={})).json()

    was, now = await both_by_url(path, ask, raw)
    url = yaml.safe_load(text_of(path))["interactions"][0]["request"]["uri"]
    for other in (_through_httpx, _through_httpx2, _through_aiohttp):
        with use_cassette(path):
            assert await ask(url, other) == now

    assert now == was == {"text": "packed"}
    assert '"text": "packed"' in text_of(path)


@STACKS
async def test_a_body_read_in_small_steps_is_whole(path: Path, stack: Any) -> None:
    """Readers that take a few bytes at a time get all of it."""
    body = b"".join(_events(4))

    async def steps(url: str) -> list[bytes]:
        async with (
            stack() as client,
            client.stream("POST", url, json={"stream": True}) as response,
        ):
            return [step async for step in response.aiter_bytes(7)]

    was, now = await both_by_url(
        path, steps, Raw(headers=SSE, body=body, framing="close")
    )

    assert b"".join(now) == b"".join(was) == body
    assert {len(step) for step in now[:-1]} == {7}


async def test_aiohttp_by_itself_replays(path: Path) -> None:
    """Every way in which aiohttp gives a body is there."""

    async def ask(url: str) -> tuple[Any, bytes, list[bytes], int]:
        async with aiohttp.ClientSession() as session:
            async with session.post(url, json={"a": 1}) as response:
                whole = await response.json()
            async with session.post(url, data='{"a": 2}') as response:
                text = await response.read()
            async with session.post(url, data=b'{"a": 3}') as response:
                lines = [line async for line in response.content]
            async with session.get(url, params={"b": "4"}) as response:
                return whole, text, lines, response.status

    was, now = await both_by_url(path, ask, *(Raw(body=b'{"x":\n 1}') for _ in "123"))

    assert now == was
    assert now[:3] == ({"x": 1}, b'{"x":\n 1}', [b'{"x":\n', b" 1}"])


async def test_raise_for_status_of_aiohttp_still_raises(path: Path) -> None:
    """The error comes after the recording, and again from it."""
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(error("openai", 401))
        for mode in ("once", "none"):
            with use_cassette(path, record=mode):
                async with aiohttp.ClientSession(raise_for_status=True) as session:
                    with pytest.raises(aiohttp.ClientResponseError, match="401"):
                        await session.post(url)

    assert len(server.requests) == 1


@STACKS
async def test_a_program_that_calls_litellm_itself_replays(
    path: Path, stack: Any
) -> None:
    """Calls that bypass this package are recorded too, and a mismatch is not retried."""
    litellm = await load_litellm()
    openai = importlib.import_module("openai")

    async def ask(base_url: str, content: str, client: httpx.AsyncClient) -> str:
        sdk = openai.AsyncOpenAI(
            api_key="sk-of-the-program-01", base_url=base_url, http_client=client
        )
        answer = await litellm.acompletion(
            model="openai/gpt-4.1-nano",
            messages=[{"role": "user", "content": content}],
            client=sdk,
            num_retries=3,
        )
        return str(answer.choices[0].message.content)

    async with ProviderServer(strict=False) as server, stack() as client:
        base_url = server.base_url("openai")
        with use_cassette(path, record="once"):
            was = await ask(base_url, "Hi.", client)
    async with stack() as client:
        with use_cassette(path) as cassette:
            now = await ask(base_url, "Hi.", client)
            with pytest.raises(CassetteMismatchError, match="Hi again"):
                await ask(base_url, "Hi again.", client)
            drifted = list(cassette.mismatches)
            cassette.mismatches.clear()

    assert now == was
    assert len(drifted) == 1
    assert "sk-of-the-program-01" not in text_of(path)


async def test_transports_within_the_process_are_left_alone(path: Path) -> None:
    """An application that is tested through httpx is not a provider."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="from the application")

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        with use_cassette(path) as cassette:
            response = await client.get("http://application/")

    assert response.text == "from the application"
    assert cassette.requests == []


async def test_a_redirect_is_followed_in_a_replay_too(path: Path) -> None:
    """Each step is a request of its own to httpx, and recorded."""

    async def ask(url: str) -> Any:
        async with _through_httpx() as client:
            got = await client.post(url, json={}, follow_redirects=True)
        return got.status_code, got.url, [step.status_code for step in got.history]

    there = Raw(status=307, headers={"location": "/openai/v1/models"})
    was, now = await both_by_url(path, ask, there)

    assert now == was
    assert now[2] == [307]


# --- the file ------------------------------------------------------------------------


async def test_the_head_tells_where_it_is_from(path: Path) -> None:
    """The file begins with its origin, its age and the command that records it."""
    async with ProviderServer(strict=False) as server, service_on(server) as service:
        with use_cassette(path, record="once", origin="llama.cpp b11549"):
            await service.complete(HELLO, MODELS["openai"], "openai")
        with use_cassette(path, record="all"):
            await service.complete(HELLO, MODELS["openai"], "openai")

    head = text_of(path).splitlines()[:3]
    assert head[0] == "# Recorded from: llama.cpp b11549"
    assert head[1].startswith("# on 20")
    assert " by dipeo_llm 0." in head[1]
    assert " on litellm 1." in head[1]
    assert head[2] == '# again with: use_cassette(…, record="all")'


async def test_a_body_edited_by_hand_is_one_piece(path: Path) -> None:
    """An answer that was shortened in the file is the answer."""
    raw = Raw(headers=SSE, body=_events(3), framing="chunked", piece_delay=0.05)
    await both_by_url(path, lambda url: _pieces(_through_httpx, url), raw)
    url = yaml.safe_load(text_of(path))["interactions"][0]["request"]["uri"]
    edit(path, "data: edited\n\n")
    with use_cassette(path):
        pieces = await _pieces(_through_httpx, url)

    assert pieces == [b"data: edited\n\n"]


# --- keys ----------------------------------------------------------------------------

PLANTED = "planted.key/of=this+run"


def _plant(url: str) -> list[Callable[[aiohttp.ClientSession], Any]]:
    """Return requests that carry the key in many places."""
    quoted = httpx.QueryParams({"key": PLANTED})
    basic = aiohttp.encode_basic_auth("user", PLANTED)
    return [
        lambda s: s.post(url, headers={"Authorization": f"Bearer {PLANTED}"}, json={}),
        lambda s: s.post(url, headers={"x-api-key": PLANTED}, json={"n": 1}),
        lambda s: s.post(url, headers={"X-Goog-Api-Key": PLANTED}, json={"n": 2}),
        lambda s: s.post(url, headers={"Authorization": basic}, json={"n": 3}),
        lambda s: s.post(url, headers={"Cookie": f"session={PLANTED}"}, json={"n": 4}),
        lambda s: s.post(f"{url}?{quoted}", json={"n": 5}),
        lambda s: s.post(url, json={"content": f"my key is {PLANTED}, keep it"}),
        lambda s: s.post(url, json={"arguments": json.dumps({"key": PLANTED})}),
        lambda s: s.post(url, data=f"plain text with {PLANTED}"),
    ]


async def test_planted_keys_are_in_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No header, query, body, answer, error, cookie or stream holds one."""
    monkeypatch.setenv("OTHER_API_KEY", "key-of-the-environment")
    echoes = [
        Raw(headers={"set-cookie": f"id={PLANTED}", "x-key": PLANTED}),
        Raw(headers={"openai-organization": "org-secret", "x-request-id": "req_77"}),
        Raw(status=401, body=f'{{"error": "Incorrect API key: {PLANTED}"}}'.encode()),
        Raw(
            body=b'{"request_id": "req_011CabcdefghijKLM1", "t": "key-of-the-environment"}'
        ),
        Raw(
            headers={"content-type": "text/event-stream", "content-encoding": "gzip"},
            body=_gzipped([b"data: before planted.key", b"/of=this+run after\n\n"]),
            framing="chunked",
            piece_delay=0.05,
        ),
    ]
    async with (
        ProviderServer(strict=False) as server,
        aiohttp.ClientSession() as session,
    ):
        url = f"{server.base_url('openai')}/chat/completions"
        requests = _plant(url)
        server.reply(*echoes, *[Raw(body=b"{}")] * (len(requests) - len(echoes)))
        with use_cassette(path, record="once"):
            for request in requests:
                async with request(session) as response:
                    await response.read()
        with use_cassette(path):
            last = b""
            for request in requests:
                async with request(session) as response:
                    last = await response.read()

    text = text_of(path)
    kept = yaml.safe_load(text)["interactions"]
    stream = kept[4]["response"]
    for secret in (
        PLANTED,
        httpx.QueryParams({"k": PLANTED}).get("k"),
        "planted",
        "cGxhbnRlZ",  # its Base64
        "key-of-the-environment",
        "org-secret",
        "req_",
        "cookie",
    ):
        assert secret not in text
    assert len(kept) == len(requests) == 9
    assert stream["body"]["string"] == "data: before [scrubbed] after\n\n"
    assert [int(p.split("@")[0]) for p in stream["pieces"].split()] == [23, 8]
    assert last == b"{}"


async def test_a_key_that_was_not_sent_is_replaced_too(
    path: Path,
) -> None:
    """A key that only an adapter holds is replaced by its value."""
    async with (
        ProviderServer(strict=False) as server,
        aiohttp.ClientSession() as session,
    ):
        url = f"{server.base_url('openai')}/chat/completions"
        with use_cassette(path, record="once"):
            adapter = create_adapter("openai", "gpt-4.1", PLANTED)
            async with session.post(url, json={"content": f"it is {PLANTED}"}):
                await adapter.aclose()

    assert PLANTED not in text_of(path)
    assert "it is [scrubbed]" in text_of(path)


@pytest.mark.parametrize(
    "body",
    [
        b"".join(
            b'data: {"delta": {"content": "%s"}}\n\n' % piece
            for piece in (b"it is plan", b"ted.key/of=", b"this+run.")
        ),
        b'{"image": "AAAAcGxhbnRlZC5rZXkvb2Y9dGhpcytydW4=AAAA"}',
    ],
    ids=["over several events", "in Base64"],
)
async def test_a_file_with_a_key_that_cannot_be_scrubbed_is_not_written(
    path: Path, body: bytes
) -> None:
    """The run fails, and shows the place and not the key."""

    async def record(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            headers = {"x-api-key": PLANTED}
            await (await session.post(url, headers=headers, json={})).read()

    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(Raw(headers={"content-type": "text/event-stream"}, body=body))
        with (
            pytest.raises(BaseException, match="was not written") as caught,
            use_cassette(path, record="once"),
        ):
            await record(url)

    assert type(caught.value).__name__ == "SecretLeftError"
    assert "exchange 1, answer" in str(caught.value)
    assert "planted" not in str(caught.value)
    assert files_in(path.parent) == []
