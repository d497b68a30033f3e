"""The HTTP client: stale connections, and what LiteLLM and the OpenAI SDK see of it."""

import asyncio
import gc
import json
import socket
import ssl
import struct
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal, Self

import aiohttp
import pytest
from httpx import HTTPError
from pydantic import SecretStr

from dipeo_llm import LLMInfraService, ServiceUnavailableError, Settings, StaticAPIKeys
from dipeo_llm.adapters.attempt import Attempt
from dipeo_llm.client import (
    Client,
    Endpoint,
    from_transport,
    httpx_client,
    tls_context,
)
from dipeo_llm.errors import LLMServiceError
from dipeo_llm.settings import Engine
from tests.conftest import Authority
from tests.provider_server import Fault, ProviderServer, Raw

Step = Literal[
    "answer",
    "answer, then close",
    "answer, then 408",
    "close",
    "reset",
    "half, then reset",
    "partial head",
    "silence",
]

CHAT = {
    "id": "a",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi"},
            "finish_reason": "stop",
        }
    ],
}
DELTA = {
    "id": "a",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}],
}


class Server:
    """A server of OpenAI's format that always says keep-alive and need not keep to it.

    Args:
        step: What to do with a request, by the numbers of its connection and of the
            request on that connection, both from 1.
        tls: Makes it a https server.
    """

    def __init__(
        self, step: Callable[[int, int], Step], tls: ssl.SSLContext | None = None
    ) -> None:
        self._step = step
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.requests: list[tuple[int, int]] = []
        """Connection and number of each request, in order of arrival."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self._tls
        )
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self._tls else ''}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        connection, number = self.connections, 1
        try:
            while await self._answer(reader, writer, connection, number):
                number += 1
        except (OSError, EOFError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: int,
        number: int,
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        self.requests.append((connection, number))
        step = self._step(connection, number)
        _, _, length = head.partition("content-length: ")
        size = int(length.split()[0]) if length else 0
        if step == "half, then reset":
            await reader.readexactly(size // 2)
            reset(writer)
            return False
        body = await reader.readexactly(size)
        if step == "silence":
            await reader.read()
        if step == "reset":
            reset(writer)
        if step == "partial head":
            writer.write(b"HTTP/1.1 200 O")
        if not step.startswith("answer"):
            return False
        if b'"stream":true' in body.replace(b" ", b""):
            event = f"data: {json.dumps(DELTA)}\n\ndata: [DONE]\n\n".encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"connection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n"
                b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
            )
        else:
            text = json.dumps(CHAT).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"connection: keep-alive\r\ncontent-length: %d\r\n\r\n%b"
                % (len(text), text)
            )
        await writer.drain()
        if step == "answer, then 408":
            await asyncio.sleep(0.02)  # until the connection is idle
            writer.write(b"HTTP/1.1 408 Late\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
        return step != "answer, then close"


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a RST in place of a FIN."""
    linger = struct.pack("ii", 1, 0)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@asynccontextmanager
async def open_client(
    server: Server, authority: Authority | None = None, **options: Any
) -> AsyncIterator[Client]:
    """Open a client of a server."""
    settings = Settings(ca_bundle=authority.file if authority else None, **options)
    endpoint = Endpoint("openai", server.url, SecretStr("sk-test"))
    client = Client(endpoint, settings, await tls_context(server.url, settings))
    try:
        yield client
    finally:
        await client.aclose()


async def post(client: Client, body: bytes = b"{}", **options: Any) -> Attempt:
    """Make an attempt at a request, and read its answer if there is one."""
    attempt = Attempt()
    url = f"{client.endpoint.base_url}/chat/completions"
    try:
        await client.send("POST", url, {}, body, attempt, **options)
        await client.read(attempt)
    except (aiohttp.ClientError, OSError, LLMServiceError):
        assert attempt.error is not None
    return attempt


def after_one(step: Step) -> Callable[[int, int], Step]:
    """Answer the first request of each connection, and treat the second as said."""
    return lambda connection, number: "answer" if number == 1 else step


# --- stale connections ---------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 1_000_000])
@pytest.mark.parametrize("is_stream", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize("step", ["answer, then close", "after one", "reset after one"])
async def test_a_server_that_drops_connections_is_not_noticed(
    engine: Engine, step: str, is_stream: bool, size: int
) -> None:
    """Sixty in a row succeed, without a retry to spend and so without a wait."""
    steps: dict[str, Callable[[int, int], Step]] = {
        "answer, then close": lambda *_: "answer, then close",
        "after one": after_one("close"),
        "reset after one": after_one("half, then reset"),
    }
    async with Server(steps[step]) as server:
        keys = StaticAPIKeys({"openai": {"key": "sk-test", "base_url": server.url}})
        settings = Settings(engine=engine, max_retries=0, timeout=20)
        messages = [{"role": "user", "content": "x" * size}]
        async with LLMInfraService(keys, settings=settings) as service:
            for _ in range(60 if size < 1000 else 15):
                if is_stream:
                    async with service.stream(
                        messages, "gpt-4.1-nano", "openai"
                    ) as stream:
                        text = "".join([chunk.text async for chunk in stream])
                else:
                    text = (
                        await service.complete(messages, "gpt-4.1-nano", "openai")
                    ).text
                assert text == "Hi"


@pytest.mark.parametrize("step", ["close", "reset", "half, then reset"])
async def test_a_stale_connection_costs_one_more_request(step: Step) -> None:
    """It goes out on a new connection, and the attempt counts both requests."""
    async with Server(after_one(step)) as server, open_client(server) as client:
        attempts = [await post(client, b"x" * 1_000_000) for _ in range(3)]

    assert [attempt.status for attempt in attempts] == [200] * 3
    assert [attempt.requests for attempt in attempts] == [1, 2, 2]
    assert server.requests == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]


async def test_a_stale_connection_with_tls(authority: Authority) -> None:
    """The same holds where the connection is encrypted."""
    async with (
        Server(after_one("close"), authority.server) as server,
        open_client(server, authority) as client,
    ):
        attempts = [await post(client) for _ in range(3)]

    assert [attempt.status for attempt in attempts] == [200] * 3
    assert [attempt.requests for attempt in attempts] == [1, 2, 2]


@pytest.mark.parametrize("max_connections", [1, 10])
async def test_the_second_request_takes_no_connection_of_the_pool(
    max_connections: int,
) -> None:
    """The other idle connections are likely stale too, and the limit still holds."""
    async with (
        Server(after_one("close")) as server,
        open_client(server, max_connections=max_connections) as client,
    ):
        await asyncio.gather(*[post(client) for _ in range(max_connections)])
        attempt = await post(client)

    assert (attempt.status, attempt.requests) == (200, 2)
    assert server.requests[-1] == (server.connections, 1)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("step", ["close", "reset"])
async def test_a_new_connection_that_fails_is_a_failure(
    step: Step, method: str
) -> None:
    """Nothing is sent again: the server may be at work on the request."""
    async with Server(lambda *_: step) as server, open_client(server) as client:
        attempt = Attempt()
        with pytest.raises(aiohttp.ClientConnectionError) as caught:
            await client.send(method, f"{server.url}/models", {}, None, attempt)

    assert attempt.error is caught.value
    assert attempt.requests == len(server.requests) == 1


async def test_a_failure_of_a_new_connection_is_retried_by_the_policy() -> None:
    """It is an error that a later attempt may mend."""
    async with Server(lambda *_: "close") as server:
        keys = StaticAPIKeys({"openai": {"key": "sk-test", "base_url": server.url}})
        settings = Settings(max_retries=2, retry_wait=0.01)
        async with LLMInfraService(keys, settings=settings) as service:
            with pytest.raises(ServiceUnavailableError) as caught:
                await service.complete(
                    [{"role": "user", "content": "Hello"}], "gpt-4.1-nano", "openai"
                )

    assert (caught.value.retryable, caught.value.attempts) == (True, 3)
    assert len(server.requests) == 3


async def test_the_second_request_is_the_last() -> None:
    """A server that is going down gets no third one."""
    steps: list[Step] = ["answer", "close", "close", "answer"]
    async with Server(lambda *_: steps.pop(0)) as server, open_client(server) as client:
        await post(client)
        attempt = await post(client)

    assert attempt.error is not None
    assert attempt.requests == 2
    assert server.requests == [(1, 1), (1, 2), (2, 1)]


async def test_an_answer_that_has_begun_is_not_asked_for_again() -> None:
    """A part of its first line is enough."""
    async with (
        Server(after_one("partial head")) as server,
        open_client(server) as client,
    ):
        await post(client)
        attempt = await post(client)

    assert isinstance(attempt.error, aiohttp.ServerDisconnectedError)
    assert attempt.requests == 1
    assert len(server.requests) == 2
    error = from_transport(attempt.error, service="openai", secret="")
    assert str(error).endswith(
        "no answer from openai: the server closed the connection"
    )


async def test_silence_is_not_a_stale_connection() -> None:
    """The server may be at work, so the request is not sent again."""
    async with Server(after_one("silence")) as server, open_client(server) as client:
        await post(client)
        attempt = await post(client, read_timeout=0.1)

    assert isinstance(attempt.error, TimeoutError)
    assert attempt.requests == 1


async def test_words_on_an_idle_connection_answer_nothing() -> None:
    """A 408 that ends an idle connection is not the answer to the next request."""
    async with (
        Server(lambda *_: "answer, then 408") as server,
        open_client(server) as client,
    ):
        attempts = []
        for _ in range(3):
            attempts.append(await post(client))
            await asyncio.sleep(0.1)

    assert [attempt.status for attempt in attempts] == [200] * 3
    assert server.requests == [(1, 1), (2, 1), (3, 1)]


async def test_closing_the_client_sends_nothing_again() -> None:
    """A request that `aclose` breaks off is over, on a reused connection too."""
    async with Server(after_one("silence")) as server, open_client(server) as client:
        await post(client)
        waiting = asyncio.create_task(post(client))
        async with asyncio.timeout(20):
            while len(server.requests) < 2:  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.005)
        await client.aclose()
        attempt = await waiting

    assert isinstance(attempt.error, ServiceUnavailableError)
    assert attempt.requests == 1
    assert server.connections == 1


# --- httpx ---------------------------------------------------------------------------

each_library = pytest.mark.parametrize("library", ["httpx", "httpx2"])


@asynccontextmanager
async def openai_sdk(
    server: ProviderServer, library: Any, **settings: Any
) -> AsyncIterator[tuple[Any, Attempt]]:
    """Open the OpenAI SDK over a client of ours, for one attempt."""
    if library == "httpx2" and version("openai").startswith("2."):
        pytest.skip("the OpenAI SDK speaks httpx2 from version 3 on")
    url = server.base_url("openai")
    client = Client(Endpoint("openai", url, SecretStr("sk-test")), Settings(**settings))
    attempt = Attempt()
    sdk = import_module("openai").AsyncOpenAI(
        api_key="not-the-key",
        base_url=url,
        http_client=httpx_client(client, attempt, library),
        max_retries=0,
    )
    try:
        yield sdk, attempt
    finally:
        await client.aclose()


HELLO: Any = [{"role": "user", "content": "Hello"}]


@each_library
async def test_the_sdk_calls_through_the_client(
    server: ProviderServer, library: str
) -> None:
    """Answers and streams come through, with the key and without the SDK's headers."""
    for is_stream in (False, True):
        async with openai_sdk(server, library) as (sdk, attempt):
            answer = await sdk.chat.completions.create(
                model="gpt-4.1-nano", messages=HELLO, stream=is_stream
            )
            if is_stream:
                assert [chunk async for chunk in answer]
            else:
                assert answer.choices[0].message.content
        # Version 2 of the SDK hangs up at the end mark, before the end.
        assert attempt.is_whole or is_stream
        assert (attempt.requests, attempt.status) == (1, 200)
        assert attempt.body
        headers = server.requests[-1].headers
        assert headers["authorization"] == "Bearer sk-test"
        assert not [name for name in headers if "stainless" in name]


@each_library
@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Raw(429, body=b'{"error": {"message": "slow"}}'), "RateLimitError"),
        (Raw(302, headers={"location": "http://127.0.0.1:9/"}), "APIStatusError"),
        (Fault("reset"), "APIConnectionError"),
        (Fault("stall"), "APITimeoutError"),
    ],
    ids=["429", "302", "reset", "stall"],
)
async def test_the_sdk_raises_its_own_errors(
    server: ProviderServer, library: str, reply: Raw | Fault, error: str
) -> None:
    """The SDK knows the exceptions of both libraries, and so does the attempt."""
    server.default = reply
    async with openai_sdk(server, library) as (sdk, attempt):
        with pytest.raises(getattr(import_module("openai"), error)):
            await sdk.chat.completions.create(
                model="gpt-4.1-nano", messages=HELLO, timeout=0.3
            )

    assert attempt.requests == 1
    assert attempt.status == (reply.status if isinstance(reply, Raw) else None)
    assert (attempt.error is None) == isinstance(reply, Raw)


@each_library
async def test_the_sdk_hears_of_a_stream_that_breaks(
    server: ProviderServer, library: str
) -> None:
    """Its reader raises, and the attempt holds the failure."""
    server.default = Fault("reset_mid_body")
    async with openai_sdk(server, library) as (sdk, attempt):
        stream = await sdk.chat.completions.create(
            model="gpt-4.1-nano", messages=HELLO, stream=True
        )
        # Version 2 of the SDK raises the library's own here.
        with pytest.raises((import_module("openai").APIConnectionError, HTTPError)):
            [chunk async for chunk in stream]

    assert attempt.error is not None
    assert not attempt.is_whole


@each_library
async def test_a_body_that_is_not_kept(server: ProviderServer, library: str) -> None:
    """A stream need not be held in memory; an error is held all the same."""
    kept = []
    for reply in (None, Raw(500, body=b'{"error": {"message": "no"}}')):
        if reply is not None:
            server.default = reply
        async with openai_sdk(server, library) as (sdk, attempt):
            attempt.is_kept = False
            try:
                await sdk.chat.completions.create(model="m", messages=HELLO)
            except import_module("openai").InternalServerError:
                pass
        kept.append(bytes(attempt.body))

    assert kept == [b"", b'{"error": {"message": "no"}}']


@each_library
def test_a_client_of_an_attempt_needs_no_closing(library: str) -> None:
    """It is dropped with its attempt: nothing warns, and no task is left on the loop."""

    async def call() -> set[Any]:
        async with ProviderServer() as server:
            async with openai_sdk(server, library) as (sdk, _):
                await sdk.chat.completions.create(model="gpt-4.1-nano", messages=HELLO)
            del sdk
            gc.collect()
        return asyncio.all_tasks() - {asyncio.current_task()}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asyncio.run(call()) == set()
