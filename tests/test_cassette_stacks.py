"""Every HTTP stack of Python: recorded and replayed, or refused, never passed over."""

import asyncio
import gzip
import http.client
import importlib
import io
import json
import socket
import ssl
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import httpx2
import pytest
import requests
import respx
import urllib3
import yaml
from aioresponses import aioresponses
from pytest_httpx import HTTPXMock

from dipeo_llm import (
    LLMInfraService,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.testing import (
    CassetteMismatchError,
    NetworkBlockedError,
    network_guard,
    use_cassette,
)
from tests.conftest import Authority
from tests.provider_server import Answer, Fault, ProviderServer, Raw

PING: dict[str, Any] = {"ping": "pong", "n": 1}
EVENTS = [b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"]
SSE = {"content-type": "text/event-stream"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's cassette is."""
    return tmp_path / "test.yaml"


@pytest.fixture(autouse=True)
def _nothing_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat this machine as any other, so that the guard would refuse the server."""
    monkeypatch.setattr(network_guard, "is_loopback", lambda host: False)


@pytest.fixture
async def server() -> AsyncIterator[ProviderServer]:
    """Run a server that answers anything."""
    async with ProviderServer(strict=False) as running:
        yield running


def url_of(server: ProviderServer) -> str:
    """Return an address of the server, which may be gone."""
    return f"{server.base_url('openai')}/chat/completions"


def exchanges_in(path: Path) -> list[dict[str, Any]]:
    """Read a cassette without the code that is tested."""
    kept: list[dict[str, Any]] = yaml.safe_load(path.read_text("utf-8"))["interactions"]
    return kept


def kept_in(path: Path) -> int:
    """Count the exchanges of a cassette that may not be there."""
    return len(exchanges_in(path)) if path.exists() else 0


# --- one request, by each stack ------------------------------------------------------


async def _aiohttp(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.post(url, json=PING) as got:
        return got.status, await got.json()


async def _httpx_async(url: str, module: Any = httpx) -> Any:
    async with module.AsyncClient(trust_env=False) as client:
        got = await client.post(url, json=PING)
        return got.status_code, got.json()


def _httpx_sync(url: str, module: Any = httpx) -> Any:
    with module.Client(trust_env=False) as client:
        got = client.post(url, json=PING)
        return got.status_code, got.json()


def _httpx2_function(url: str) -> Any:
    got = httpx2.post(url, json=PING)
    return got.status_code, got.json()


def _requests(url: str) -> Any:
    got = requests.post(url, json=PING, timeout=20)
    return got.status_code, got.json()


def _urllib3(url: str) -> Any:
    got = urllib3.PoolManager(retries=False).request("POST", url, json=PING)
    return got.status, got.json()


def _urllib(url: str) -> Any:
    asked = urllib.request.Request(url, json.dumps(PING).encode())
    with urllib.request.urlopen(asked) as got:
        return got.status, json.load(got)


def _http_client(url: str) -> Any:
    parts = urlsplit(url)
    client = http.client.HTTPConnection(parts.netloc)
    client.request("POST", parts.path, json.dumps(PING))
    got = client.getresponse()
    result = got.status, json.load(got)
    client.close()
    return result


async def _openai_async(url: str) -> Any:
    openai = importlib.import_module("openai")
    base_url = url.removesuffix("/chat/completions")
    async with openai.AsyncOpenAI(
        api_key="sk-of-the-program-01", base_url=base_url, max_retries=0
    ) as client:
        got = await client.chat.completions.create(
            model="gpt-4.1-nano", messages=[{"role": "user", "content": "Hi."}]
        )
        return got.choices[0].message.content


def _openai_sync(url: str) -> Any:
    openai = importlib.import_module("openai")
    base_url = url.removesuffix("/chat/completions")
    with openai.OpenAI(
        api_key="sk-of-the-program-01", base_url=base_url, max_retries=0
    ) as client:
        stream = client.chat.completions.create(
            model="gpt-4.1-nano",
            messages=[{"role": "user", "content": "Hi."}],
            stream=True,
        )
        return [chunk.choices[0].delta.content for chunk in stream if chunk.choices]


STACKS: dict[str, Callable[[str], Any]] = {
    "aiohttp": _aiohttp,
    "httpx": _httpx_async,
    "httpx, blocking": _httpx_sync,
    "httpx2": lambda url: _httpx_async(url, httpx2),
    "httpx2, blocking": lambda url: _httpx_sync(url, httpx2),
    "httpx2.post": _httpx2_function,
    "AsyncOpenAI": _openai_async,
    "OpenAI, a stream": _openai_sync,
    "requests": _requests,
    "urllib3": _urllib3,
    "urllib": _urllib,
    "http.client": _http_client,
}
BLOCKING = {"requests", "urllib3", "urllib", "http.client"}
each_stack = pytest.mark.parametrize("stack", STACKS)


async def ask(stack: str, url: str) -> Any:
    """Make the request of a stack, a blocking one in a thread."""
    made = await asyncio.to_thread(STACKS[stack], url)
    return await made if isinstance(made, Awaitable) else made


async def error_of(call: Awaitable[Any]) -> Exception:
    """Return the error that a call ends with."""
    try:
        await call
    except Exception as exc:  # noqa: BLE001 - which one it is, the test compares
        return exc
    pytest.fail("there was no error")


async def outcome(stack: str, url: str) -> tuple[type[Exception], str]:
    """Make a request that fails; return the error's class and text."""
    error = await error_of(ask(stack, url))
    return type(error), str(error)


@each_stack
async def test_a_request_is_recorded_and_replayed(
    server: ProviderServer, path: Path, stack: str
) -> None:
    """The answer of the replay is the one of the recording, and nothing is sent."""
    if "AI" not in stack:
        server.reply(Raw(body=b'{"a": 1}'))

    with use_cassette(path, record="once"):
        was = await ask(stack, url_of(server))
    with use_cassette(path):
        now = await ask(stack, url_of(server))

    assert now == was
    assert len(server.requests) == len(exchanges_in(path)) == 1


@each_stack
async def test_a_request_that_is_not_on_the_cassette_is_refused(
    server: ProviderServer, path: Path, stack: str
) -> None:
    """No client passes the cassette by."""
    with (
        pytest.raises(CassetteMismatchError, match="There is no such cassette yet"),
        use_cassette(path),
    ):
        await ask(stack, url_of(server))

    assert server.requests == []


@each_stack
async def test_an_ignored_host_is_reached_and_not_recorded(
    server: ProviderServer, path: Path, stack: str
) -> None:
    """Neither a recording nor a replay is in its way."""
    server.default = Answer("Hi.") if "AI" in stack else Raw(body=b'{"a": 1}')
    for mode in ("once", "none"):
        with use_cassette(path, record=mode, ignore_hosts=[server.host]):
            await ask(stack, url_of(server))

    assert len(server.requests) == 2
    assert kept_in(path) == 0


def _by_https(stack: str, url: str, tls: ssl.SSLContext, file: str) -> Any:
    parts = urlsplit(url)
    if stack == "requests":
        return requests.post(url, json=PING, verify=file, timeout=20).json()
    if stack == "urllib3":
        with urllib3.PoolManager(ssl_context=tls) as pool:
            return pool.request("POST", url, json=PING).json()
    if stack == "urllib":
        with urllib.request.urlopen(url, json.dumps(PING).encode(), context=tls) as got:
            return json.load(got)
    client = http.client.HTTPSConnection(parts.netloc, context=tls)
    client.request("POST", parts.path, json.dumps(PING))
    result = json.load(client.getresponse())
    client.close()
    return result


@pytest.mark.parametrize("stack", sorted(BLOCKING))
async def test_https_is_recorded_too(
    authority: Authority, path: Path, stack: str
) -> None:
    """By the stacks that vcrpy answers; the others have one way for both."""
    tls = ssl.create_default_context(cafile=authority.file)
    async with ProviderServer(strict=False, ssl=authority.server) as server:
        url = url_of(server)
        server.reply(Raw(body=b'{"a": 1}'))
        for mode in ("once", "none"):
            with use_cassette(path, record=mode):
                got = await asyncio.to_thread(
                    _by_https, stack, url, tls, str(authority.file)
                )
            assert got == {"a": 1}

    assert len(server.requests) == 1


@pytest.mark.parametrize("stack", ["requests", "urllib3"])
async def test_no_request_of_many_threads_is_missed(
    server: ProviderServer, path: Path, stack: str
) -> None:
    """One that sends does not open a way out to the others."""
    server.default = Raw(body=b'{"a": 1}')
    for mode in ("once", "none"):
        with use_cassette(path, record=mode):
            await asyncio.gather(*(ask(stack, url_of(server)) for _ in range(20)))

    assert len(server.requests) == len(exchanges_in(path)) == 20


@pytest.mark.parametrize("stack", sorted(BLOCKING - {"urllib", "http.client"}))
async def test_a_packed_answer_is_the_same_in_the_replay(
    server: ProviderServer, path: Path, stack: str
) -> None:
    """Where vcrpy leaves the compression on, the file has it off all the same."""
    body = gzip.compress(b'{"packed": true}')
    server.reply(Raw(headers={"content-encoding": "gzip"}, body=body))

    with use_cassette(path, record="once"):
        was = await ask(stack, url_of(server))
    with use_cassette(path):
        now = await ask(stack, url_of(server))

    assert now == was == (200, {"packed": True})
    assert exchanges_in(path)[0]["response"]["body"]["string"] == '{"packed": true}'


async def test_all_of_httpx2s_streams_replay(
    server: ProviderServer, path: Path
) -> None:
    """Bytes, lines and events, asynchronous and blocking."""

    def blocking(url: str) -> list[Any]:
        with (
            httpx2.Client(trust_env=False) as client,
            client.stream("POST", url, json={"way": 1}) as got,
        ):
            lines = list(got.iter_lines())
        with httpx2.stream("POST", url, json={"way": 2}) as got:
            return [lines, [event.data for event in httpx2.EventSource(got)]]

    async def read(url: str) -> list[Any]:
        async with (
            httpx2.AsyncClient(trust_env=False) as client,
            client.stream("POST", url, json={"way": 3}) as got,
        ):
            pieces = [piece async for piece in got.aiter_bytes()]
        return [pieces, await asyncio.to_thread(blocking, url)]

    server.default = Raw(headers=SSE, body=EVENTS, framing="chunked", piece_delay=0.02)
    with use_cassette(path, record="once"):
        was = await read(url_of(server))
    with use_cassette(path):
        now = await read(url_of(server))

    assert now == was
    assert now[0] == EVENTS
    assert len(server.requests) == 3


async def test_httpx2_within_the_process_is_left_alone(path: Path) -> None:
    """An application that is tested through httpx2 is not a provider."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"from the application"})

    transports = (
        httpx2.ASGITransport(app),
        httpx2.MockTransport(lambda _: httpx2.Response(200, text="mock")),
    )
    with use_cassette(path, record="once") as cassette:
        texts = []
        for transport in transports:
            async with httpx2.AsyncClient(transport=transport) as client:
                texts.append((await client.get("http://application/")).text)

    assert texts == ["from the application", "mock"]
    assert len(cassette) == 0


@pytest.mark.parametrize("mode", ["once", "none"])
async def test_a_web_socket_is_refused(
    server: ProviderServer, path: Path, mode: Any
) -> None:
    """It cannot be recorded, and the test learns it while recording."""

    async def connect() -> None:
        async with aiohttp.ClientSession() as session:
            await session.ws_connect(url_of(server))

    with (
        pytest.raises(CassetteMismatchError, match="a WebSocket cannot be recorded"),
        use_cassette(path, record=mode),
    ):
        await connect()

    assert server.requests == []


# --- what is none of these -----------------------------------------------------------


def connect(host: str) -> None:
    """Open a connection as a database's driver does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((host, 9))


@pytest.mark.parametrize("mode", ["once", "none"])
@pytest.mark.parametrize("is_swallowed", [True, False])
def test_a_connection_of_an_unknown_stack_fails_the_test(
    path: Path, mode: Any, is_swallowed: bool
) -> None:
    """While recording as in the replay, and however the program takes it."""

    def program() -> None:
        with suppress(*([NetworkBlockedError] if is_swallowed else [])):
            connect("192.0.2.1")

    with (
        pytest.raises((NetworkBlockedError, CassetteMismatchError)) as caught,
        use_cassette(path, record=mode),
    ):
        program()

    assert "refused to connect to 192.0.2.1:9" in str(caught.value)
    assert "ignore_hosts" in str(caught.value)


@pytest.mark.parametrize("mode", ["once", "none"])
def test_an_ignored_host_is_open_to_every_stack(
    path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, and by the addresses that the name has."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.9", 5432))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    with use_cassette(path, record=mode, ignore_hosts=["*.internal"]):
        socket.getaddrinfo("db.internal", 5432)
        connect("127.0.0.9")


# --- bodies --------------------------------------------------------------------------


async def _parts() -> AsyncIterator[bytes]:
    yield b"one "
    yield b"two"


def _form(file: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData({"model": "whisper-1"})
    form.add_field("file", io.BytesIO(file), filename="a.wav", content_type="audio/wav")
    return form


AIOHTTP_BODIES: dict[str, tuple[Callable[[], dict[str, Any]], Any]] = {
    "a dictionary": (lambda: {"data": {"a": "1", "b": "ü"}}, {"a": "1", "b": "ü"}),
    "pairs": (lambda: {"data": [("a", "1"), ("a", "2")]}, {"a": ["1", "2"]}),
    "FormData": (lambda: {"data": aiohttp.FormData({"a": "1"})}, {"a": "1"}),
    "a file": (lambda: {"data": io.BytesIO(b'{"a": 1}')}, {"a": 1}),
    "a text file": (lambda: {"data": io.StringIO("text")}, "text"),
    "a generator": (lambda: {"data": _parts()}, "one two"),
    "text": (lambda: {"data": "text"}, "text"),
    "JSON": (lambda: {"json": {"a": 1}}, {"a": 1}),
    "an upload": (
        lambda: {"data": _form(b"sound")},
        {
            "model": "whisper-1",
            "file": {"filename": "a.wav", "type": "audio/wav", "content": "sound"},
        },
    ),
}


@pytest.mark.parametrize("kind", AIOHTTP_BODIES)
async def test_every_body_of_aiohttp_is_sent_recorded_and_replayed(
    server: ProviderServer, path: Path, kind: str
) -> None:
    """The server gets the whole of it, and the cassette says what it means."""
    make, meaning = AIOHTTP_BODIES[kind]
    server.reply(Raw(body=b"{}"))
    made = []
    for mode in ("once", "none"):
        async with aiohttp.ClientSession() as session:
            with use_cassette(path, record=mode) as cassette:
                async with session.post(url_of(server), **make()) as got:
                    assert await got.json(content_type=None) == {}
                made += cassette.requests

    (sent,) = server.requests
    assert sent.body == made[0].body
    expected = meaning if isinstance(meaning, dict) else {"body": meaning}
    for request in made:
        fields = request.as_data()
        assert {name: fields[name] for name in expected} == expected


async def _upload(stack: str, url: str, file: bytes) -> None:
    files = {"file": ("a.wav", file, "audio/wav")}
    if stack == "aiohttp":
        async with aiohttp.ClientSession() as session:
            await session.post(url, data=_form(file))
    elif stack == "requests":
        data = {"model": "whisper-1"}
        await asyncio.to_thread(requests.post, url, files=files, data=data, timeout=20)
    else:
        module = importlib.import_module(stack)
        async with module.AsyncClient(trust_env=False) as client:
            await client.post(url, files=files, data={"model": "whisper-1"})


@pytest.mark.parametrize("stack", ["aiohttp", "requests", "httpx", "httpx2"])
async def test_an_upload_replays_whatever_its_boundary(
    server: ProviderServer, path: Path, stack: str
) -> None:
    """Another file is another request, and is named by its field."""
    server.reply(Raw(body=b"{}"))
    for mode in ("once", "none"):
        with use_cassette(path, record=mode):
            await _upload(stack, url_of(server), b"sound")

    with (
        pytest.raises(CassetteMismatchError, match=r"body\.file\.content\n"),
        use_cassette(path),
    ):
        await _upload(stack, url_of(server), b"noise")


async def test_a_transcription_of_litellm_replays(path: Path) -> None:
    """It is an upload with a boundary of its own each time."""
    litellm = importlib.import_module("litellm")

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"RIFF")
        body = b'{"text": "hello"}'
        head = f"content-type: application/json\r\ncontent-length: {len(body)}"
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\nconnection: close\r\n\r\n".encode())
        writer.write(body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]

    async def transcribe() -> str:
        result = await litellm.atranscription(
            model="openai/whisper-1",
            file=("a.wav", b"RIFF", "audio/wav"),
            api_base=f"http://127.0.0.1:{port}/v1",
            api_key="sk-of-the-program-01",
            max_retries=0,
        )
        return str(result.text)

    with use_cassette(path, record="once"):
        assert await transcribe() == "hello"
    server.close()
    await server.wait_closed()
    with use_cassette(path):
        assert await transcribe() == "hello"


# --- connections that fail -----------------------------------------------------------


@each_stack
async def test_a_refused_connection_replays(
    path: Path, stack: str, unused_tcp_port: int
) -> None:
    """The same error, from the same class, without a try to connect."""
    url = f"http://127.0.0.1:{unused_tcp_port}/v1/chat/completions"
    with use_cassette(path, record="once"):
        was = await outcome(stack, url)
    with use_cassette(path):
        now = await outcome(stack, url)

    assert now[0] is was[0]
    assert len(exchanges_in(path)) == 1
    if stack not in {"requests", "urllib3"}:  # these show the address of an object
        assert now[1] == was[1]


@each_stack
@pytest.mark.parametrize("kind", ["close", "reset"])
async def test_a_connection_without_an_answer_replays(
    server: ProviderServer, path: Path, stack: str, kind: str
) -> None:
    """A server that hangs up does so again."""
    server.default = Fault(kind)
    with use_cassette(path, record="once"):
        was = await outcome(stack, url_of(server))
    with use_cassette(path):
        now = await outcome(stack, url_of(server))

    assert now[0] is was[0]


CLIENTS: dict[str, Callable[[], Any]] = {
    "httpx": lambda: httpx.AsyncClient(trust_env=False, timeout=0.2),
    "httpx2": lambda: httpx2.AsyncClient(trust_env=False, timeout=0.2),
    "aiohttp": lambda: aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(sock_read=0.2)
    ),
    "aiohttp, total": lambda: aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=0.2)
    ),
}
each_client = pytest.mark.parametrize("client", CLIENTS)


@each_client
async def test_a_timeout_replays(
    server: ProviderServer, path: Path, client: str
) -> None:
    """The client's own timeout is the same error in the replay."""
    server.default = Fault("stall")
    classes = []
    for mode in ("once", "none"):
        async with CLIENTS[client]() as opened:
            with use_cassette(path, record=mode):
                error = await error_of(opened.post(url_of(server), json=PING))
                classes.append(type(error))

    assert classes[0] is classes[1]
    assert len(server.requests) == 1


@each_client
@pytest.mark.parametrize("headers", [SSE, {}], ids=["stream", "whole"])
async def test_a_body_that_is_cut_replays(
    server: ProviderServer, path: Path, client: str, headers: dict[str, str]
) -> None:
    """What arrived arrives, and then the same error."""
    server.reply(Raw(headers=headers, body=EVENTS[:2], framing="short"))
    outcomes = []
    for mode in ("once", "none"):
        pieces: list[bytes] = []
        async with CLIENTS[client]() as opened:
            with use_cassette(path, record=mode):
                error = await error_of(_read(opened, url_of(server), pieces))
        outcomes.append((b"".join(pieces), type(error)))

    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == b"".join(EVENTS[:2])


async def _read(client: Any, url: str, pieces: list[bytes]) -> None:
    async for piece in _pieces(client, url):
        pieces.append(piece)  # noqa: PERF401 - the pieces before an error count


async def _pieces(client: Any, url: str) -> AsyncGenerator[bytes]:
    if isinstance(client, aiohttp.ClientSession):
        async with client.post(url, json=PING) as got:
            async for piece in got.content.iter_any():
                yield piece
    else:
        async with client.stream("POST", url, json=PING) as got:
            async for piece in got.aiter_bytes():
                yield piece


@each_client
async def test_a_stream_is_passed_on_while_it_is_recorded(
    server: ProviderServer, path: Path, client: str
) -> None:
    """A program that stops reading early records what it read, and no wait for more."""
    server.reply(Raw(headers=SSE, body=EVENTS, framing="chunked", piece_delay=0.1))
    async with CLIENTS[client]() as opened:
        with use_cassette(path, record="once"):
            pieces = _pieces(opened, url_of(server))
            first = await anext(pieces)
            await pieces.aclose()
    async with CLIENTS[client]() as opened:
        with use_cassette(path):
            pieces = _pieces(opened, url_of(server))
            assert await anext(pieces) == first == EVENTS[0]
            await pieces.aclose()
        with (
            pytest.raises(CassetteMismatchError, match="closed this answer"),
            use_cassette(path),
        ):
            assert [piece async for piece in _pieces(opened, url_of(server))]


@each_client
async def test_a_request_that_is_given_up_stays_silent(
    server: ProviderServer, path: Path, client: str
) -> None:
    """The program's own timeout runs out in the replay as in the recording."""
    server.default = Fault("stall")
    for mode in ("once", "none"):
        async with CLIENTS[client]() as opened:
            with use_cassette(path, record=mode), pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await opened.post(url_of(server), json=PING)

    assert exchanges_in(path)[0]["response"]["failure"] == {"kind": "silence"}


@pytest.mark.parametrize("by", ["httpx", "aiohttp"])
async def test_a_failure_replays_on_another_stack(
    path: Path, by: str, unused_tcp_port: int
) -> None:
    """A program that changes its client meets an error of the same kind."""
    url = f"http://127.0.0.1:{unused_tcp_port}/v1/chat/completions"
    with use_cassette(path, record="once"):
        await outcome(by, url)

    for stack, cls in (
        ("httpx", httpx.ConnectError),
        ("httpx2", httpx2.ConnectError),
        ("aiohttp", aiohttp.ClientConnectorError),
        ("requests", requests.ConnectionError),
    ):
        with use_cassette(path):
            assert (await outcome(stack, url))[0] is cls


async def test_a_fallback_after_a_failed_connection_replays(
    server: ProviderServer, path: Path, unused_tcp_port: int
) -> None:
    """The first provider is down again, the second answers again."""
    keys = StaticAPIKeys(
        {
            "dead": {
                "key": "sk-of-openai-0123456789",
                "service": "openai",
                "base_url": f"http://127.0.0.1:{unused_tcp_port}/v1",
            },
            "alive": {
                "key": "sk-of-openai-9876543210",
                "service": "openai",
                "base_url": server.base_url("openai"),
            },
        }
    )

    async def program() -> list[str]:
        said = []
        async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
            for key in ("dead", "alive"):
                messages = [{"role": "user", "content": "Hi."}]
                try:
                    result = await service.complete(messages, "gpt-4.1-nano", key)
                    said.append(result.text)
                except ServiceUnavailableError as exc:
                    said.append(type(exc).__name__)
        return said

    with use_cassette(path, record="once"):
        was = await program()
    with use_cassette(path):
        now = await program()

    assert now == was == ["ServiceUnavailableError", Answer().text]


# --- neighbours ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["once", "none"])
@pytest.mark.parametrize("is_outer", [True, False])
async def test_respx_answers_first(path: Path, mode: Any, is_outer: bool) -> None:
    """What it mocks is not recorded, and not asked of the cassette."""
    with ExitStack() as stack:
        router = respx.mock(assert_all_called=True)
        cassette = use_cassette(path, record=mode)
        for each in (router, cassette) if is_outer else (cassette, router):
            stack.enter_context(each)
        router.post("http://mocked.example/").mock(httpx.Response(200, json={"a": 1}))
        assert await _httpx_async("http://mocked.example/") == (200, {"a": 1})
        if not is_outer:
            error = await error_of(_httpx_async("http://other.example/"))
            assert "not mocked" in str(error)

    assert kept_in(path) == 0


async def test_respx_passes_on_to_the_cassette(
    server: ProviderServer, path: Path
) -> None:
    """What it lets through is recorded and replayed."""
    server.reply(Raw(body=b'{"a": 1}'))
    for mode in ("once", "none"):
        with use_cassette(path, record=mode) as cassette, respx.mock:
            respx.route(host=server.host).pass_through()
            assert await _httpx_async(url_of(server)) == (200, {"a": 1})

        assert len(cassette.requests) == 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("mode", ["once", "none"])
@pytest.mark.parametrize("is_outer", [True, False])
async def test_aioresponses_answers_first(
    path: Path, mode: Any, is_outer: bool
) -> None:
    """Opened before the cassette or inside it."""
    with ExitStack() as stack:
        mock = aioresponses()
        cassette = use_cassette(path, record=mode)
        for each in (mock, cassette) if is_outer else (cassette, mock):
            stack.enter_context(each)
        # Its answers need an older aiohttp; its errors do not.
        mock.post("http://mocked.example/", exception=ZeroDivisionError("mocked"))
        with pytest.raises(ZeroDivisionError, match="mocked"):
            await _aiohttp("http://mocked.example/")

    assert kept_in(path) == 0


@pytest.mark.parametrize("mode", ["once", "none"])
async def test_pytest_httpx_answers_first(
    path: Path, mode: Any, httpx_mock: HTTPXMock
) -> None:
    """Its fixture is there before a cassette that a test opens by itself."""
    httpx_mock.add_response(json={"a": 1})
    with use_cassette(path, record=mode):
        assert await _httpx_async("http://mocked.example/") == (200, {"a": 1})

    assert kept_in(path) == 0


@pytest.mark.parametrize("options", ["ignore_localhost", "ignore_hosts"])
async def test_an_application_on_localhost_is_no_provider(
    server: ProviderServer, path: Path, options: str
) -> None:
    """It answers by itself, beside a cassette that answers for the provider."""
    given = {
        "ignore_localhost": True,
        "ignore_hosts": [f"{server.host}:{server.port}"],
    }
    server.default = Raw(body=b'{"a": 1}')
    for mode in ("once", "none"):
        with use_cassette(path, record=mode, **{options: given[options]}):
            for stack in ("aiohttp", "httpx", "requests"):
                assert await ask(stack, url_of(server)) == (200, {"a": 1})

    assert len(server.requests) == 6
    assert kept_in(path) == 0
