"""The environment decides on proxies and certificates, and on nothing else."""

import asyncio
import json
import logging
import os
import pickle
import socket
import sqlite3
import ssl
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from dipeo_llm import (
    APIKeyError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMInfraService,
    ServiceUnavailableError,
    Settings,
    SettingsError,
    StaticAPIKeys,
    create_adapter,
)
from dipeo_llm.client import is_loopback, proxy_for
from dipeo_llm.keys import find_key
from dipeo_llm.settings import Engine
from tests.conftest import PROVIDERS, Authority
from tests.provider_server import Answer, Fault, ProviderServer, Raw, Received, error

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "a-model-that-nobody-tabled:1b",
}
HELLO = [{"role": "user", "content": "Hello"}]
ENGINES: tuple[Engine, ...] = ("direct", "litellm")

each_engine = pytest.mark.parametrize("engine", ENGINES)
each_provider = pytest.mark.parametrize("provider", PROVIDERS)


def hostile(trap: str) -> dict[str, str]:
    """Return every variable that could redirect a call, set to the trap."""
    urls = (
        "OPENAI_BASE_URL OPENAI_API_BASE ANTHROPIC_BASE_URL ANTHROPIC_API_BASE"
        " GEMINI_API_BASE GOOGLE_GEMINI_BASE_URL GOOGLE_API_BASE VERTEXAI_API_BASE"
        " VERTEX_API_BASE OLLAMA_API_BASE OLLAMA_HOST LITELLM_PROXY_API_BASE"
        " LITELLM_MODEL_COST_MAP_URL DEEPSEEK_API_BASE AZURE_API_BASE"
        " HTTP_PROXY HTTPS_PROXY http_proxy https_proxy"
    )
    words = (
        "OPENAI_API_KEY OPENAI_ORGANIZATION OPENAI_ORG_ID OPENAI_PROJECT_ID"
        " ANTHROPIC_API_KEY ANTHROPIC_AUTH_TOKEN GEMINI_API_KEY GOOGLE_API_KEY"
        " GOOGLE_CLOUD_PROJECT GOOGLE_CLOUD_LOCATION OLLAMA_API_KEY"
        " LITELLM_PROXY_API_KEY LITELLM_USER_AGENT LITELLM_API_KEY"
    )
    return {
        **dict.fromkeys(urls.split(), trap),
        **{name: f"evil-{name.lower()}" for name in words.split()},
        "OPENAI_CUSTOM_HEADERS": "X-Evil: 1\nAuthorization: Bearer evil",
        "ANTHROPIC_CUSTOM_HEADERS": "X-Evil: 1\nx-api-key: evil",
        "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/evil.json",
        "GOOGLE_GENAI_USE_VERTEXAI": "True",
        "USE_LITELLM_PROXY": "True",
        "EXPERIMENTAL_OPENAI_BASE_LLM_HTTP_HANDLER": "true",
        # LiteLLM reads these numbers once, when it is imported.
        "DEFAULT_MAX_TOKENS": "7",
        "DEFAULT_ANTHROPIC_CHAT_MAX_TOKENS": "7",
        "DEFAULT_REASONING_EFFORT_LOW_THINKING_BUDGET": "7",
        "REQUEST_TIMEOUT": "never",
        "SSLKEYLOGFILE": "/nowhere/secrets.log",
        # LiteLLM opens httpx clients when it is imported; httpx does not support this.
        "ALL_PROXY": "socks5://127.0.0.1:9",
        "SSL_VERIFY": "False",
        "SSL_CERTIFICATE": "/nowhere/evil.pem",
        "SSL_SECURITY_LEVEL": "DEFAULT@SECLEVEL=0",
        "NO_PROXY": "",
        "AIOHTTP_TRUST_ENV": "True",
        "DISABLE_AIOHTTP_TRANSPORT": "True",
        "LITELLM_LOCAL_MODEL_COST_MAP": "False",
        "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "False",
        "LITELLM_MODE": "DEV",
        "LITELLM_LOG": "DEBUG",
    }


@pytest.fixture
async def trap() -> AsyncIterator[ProviderServer]:
    """Run the server that the hostile environment names and no call may reach."""
    async with ProviderServer(strict=False) as running:
        yield running


def seen(requests: list[Received]) -> list[tuple[Any, ...]]:
    """Return everything that a server sees of requests, except the connections."""
    return [(r.method, r.path, r.query, r.headers, r.body) for r in requests]


async def call_all(service: LLMInfraService) -> None:
    """Call all four providers and ask each for its models."""
    for provider, model in MODELS.items():
        await service.complete(HELLO, model, provider, temperature=0.5)
        await service.get_available_models(provider)


# --- one variable at a time, in this process ---------------------------------------------


@pytest.mark.parametrize(
    "case",
    [(engine, name) for engine in ENGINES for name in sorted(hostile(""))],
    ids="-".join,
)
async def test_a_variable_changes_nothing(
    keys: StaticAPIKeys,
    server: ProviderServer,
    trap: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[Engine, str],
) -> None:
    """With the variable set, the same bytes go to the same server."""
    engine, name = case
    settings = Settings(engine=engine, max_retries=0)
    async with LLMInfraService(keys, settings=settings) as service:
        await call_all(service)
    before = seen(server.requests)
    server.requests.clear()
    monkeypatch.setenv(name, hostile(trap.origin)[name])

    async with LLMInfraService(keys, settings=settings) as service:
        await call_all(service)

    assert seen(server.requests) == before
    assert trap.connections == 0


@pytest.mark.parametrize("provider", ["deepseek", "groq", "xai", "openrouter"])
async def test_api_base_variables_of_other_providers(
    trap: ProviderServer, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    """An address that LiteLLM reads from the environment never gets a key of ours."""
    for name in ("API_BASE", "BASE_URL", "API_KEY"):
        monkeypatch.setenv(f"{provider.upper()}_{name}", trap.base_url("openai"))
    monkeypatch.setattr(socket, "getaddrinfo", _no_names)

    keys = StaticAPIKeys({"mine": "sk-canary-1"})
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        with pytest.raises((InvalidRequestError, ServiceUnavailableError)):
            await service.complete(HELLO, "m", "mine", service=provider)

    assert trap.connections == 0


def _no_names(*args: Any, **kwargs: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "no name is known here")


# --- a process of its own -----------------------------------------------------------------

PROBE = """
import sys

refused = []
origin, port, engine = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        allowed = args[1][0] == "127.0.0.1" and args[1][1] == port
    elif event == "socket.getaddrinfo":
        allowed = args[0] in ("127.0.0.1", b"127.0.0.1")
    elif event in ("socket.gethostbyname", "socket.sendto"):
        allowed = False
    elif event == "open":
        name = str(args[0])
        allowed = not name.endswith((".env", ".netrc", "evil.json", "evil.pem"))
    else:
        return
    if not allowed:
        refused.append((event, args[:2]))
        raise OSError(f"refused: {event} {args}")


sys.addaudithook(watch)

import asyncio

from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys

paths = {"openai": "/v1", "google": "/v1beta"}
models = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "a-model-that-nobody-tabled:1b",
}
keys = StaticAPIKeys(
    {
        provider: {
            "key": f"sk-test-{provider}",
            "base_url": origin + paths.get(provider, ""),
        }
        for provider in models
    }
)
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
schema = {"type": "object", "properties": {"a": {"type": "string"}}}


async def main():
    settings = Settings(engine=engine, max_retries=0)
    async with LLMInfraService(keys, settings=settings) as service:
        for provider, model in models.items():
            messages = [{"role": "user", "content": "Hello"}]
            await service.complete(messages, model, provider, max_tokens=20)
            await service.complete(messages, model, provider, tools=[tool])
            await service.get_available_models(provider)
            try:
                await service.complete(messages, "no-such-model", provider, service=provider)
            except LookupError:
                pass
            except Exception as exc:
                assert type(exc).__name__ == "ModelNotFoundError", exc


asyncio.run(main())
if refused:
    sys.exit(f"refused: {refused}")
"""


async def run_probe(
    server: ProviderServer,
    folder: Path,
    engine: str,
    environ: Mapping[str, str] | None = None,
) -> tuple[int, str, str]:
    """Run the probe, which may open sockets to the server only."""
    usual = ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
    env = {name: os.environ[name] for name in usual if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROBE,
        server.origin,
        str(server.port),
        engine,
        cwd=folder,
        env={**env, "HOME": str(folder), "PYTHONPATH": str(ROOT), **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@each_engine
async def test_a_process_of_its_own(
    server: ProviderServer, trap: ProviderServer, tmp_path: Path, engine: str
) -> None:
    """Import, calls and exit of a process are silent and reach the provider only.

    The second run has every hostile variable, a .env file and a .netrc, before LiteLLM
    is imported, and sends the same bytes.
    """
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    quiet.mkdir()
    loud.mkdir()
    variables = hostile(trap.origin)
    lines = [f"{name}={json.dumps(value)}\n" for name, value in variables.items()]
    (loud / ".env").write_text("".join(lines))
    (loud / ".netrc").write_text("machine 127.0.0.1 login evil password evil\n")
    (loud / ".netrc").chmod(0o600)

    first = await run_probe(server, quiet, engine)
    before = seen(server.requests)
    server.requests.clear()
    second = await run_probe(server, loud, engine, variables)

    assert first == (0, "", "")
    assert second[:2] == (0, "")
    # Each is told that it is not used, and nothing else is.
    assert all("is set but not used" in line for line in second[2].splitlines())
    assert len(before) == 4 * len(PROVIDERS)
    assert seen(server.requests) == before
    assert trap.connections == 0


# --- proxies ------------------------------------------------------------------------------

PROXY = "http://proxy.test:3128"
API = "https://api.openai.com/v1/chat/completions"


@pytest.mark.parametrize(
    ("environ", "settings", "url", "proxy"),
    [
        ({}, {}, API, None),
        ({"HTTPS_PROXY": PROXY}, {}, API, PROXY),
        ({"https_proxy": PROXY}, {}, API, PROXY),
        ({"HTTP_PROXY": PROXY}, {}, API, None),
        ({"HTTP_PROXY": PROXY}, {}, "http://api.test/v1", PROXY),
        ({"ALL_PROXY": PROXY}, {}, API, PROXY),
        ({"HTTPS_PROXY": PROXY, "ALL_PROXY": "http://other"}, {}, API, PROXY),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "api.openai.com"}, {}, API, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "openai.com"}, {}, API, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": ".openai.com"}, {}, API, None),
        ({"HTTPS_PROXY": PROXY, "no_proxy": "a.test, api.openai.com"}, {}, API, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, {}, API, None),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "evilopenai.com,ai.com"}, {}, API, PROXY),
        ({"HTTPS_PROXY": PROXY}, {"trust_env_proxy": False}, API, None),
        ({"HTTPS_PROXY": "http://other"}, {"proxy": PROXY}, API, PROXY),
        ({"NO_PROXY": "*"}, {"proxy": PROXY}, API, PROXY),
        ({}, {"proxy": PROXY, "trust_env_proxy": False}, API, PROXY),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "http://localhost:11434/api", None),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "http://LocalHost/api", None),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "http://127.0.0.1:8080/v1", None),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "http://127.8.7.6/v1", None),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "http://[::1]:8080/v1", None),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "https://a.localhost/v1", None),
        ({"ALL_PROXY": PROXY}, {"proxy": PROXY}, "http://192.168.1.2/v1", PROXY),
    ],
)
def test_the_proxy_of_a_url(
    monkeypatch: pytest.MonkeyPatch,
    environ: Mapping[str, str],
    settings: dict[str, Any],
    url: str,
    proxy: str | None,
) -> None:
    """The setting wins over the environment; loopback never has a proxy."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert proxy_for(url, Settings(**settings)) == proxy


@pytest.mark.parametrize("kind", ["socks5", "socks5h", "ftp"])
def test_a_proxy_of_a_kind_that_is_not_known(kind: str) -> None:
    """It is refused: a call must not silently bypass it."""
    settings = Settings(proxy=f"{kind}://proxy.test:1080")

    with pytest.raises(SettingsError, match=kind):
        proxy_for(API, settings)


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("localhost", True),
        ("a.b.localhost", True),
        ("127.0.0.1", True),
        ("127.255.0.1", True),
        ("::1", True),
        ("", False),
        ("localhost.evil.test", False),
        ("127.0.0.1.evil.test", False),
        ("notlocalhost", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_what_is_loopback(host: str, answer: bool) -> None:
    """Loopback is this machine, and not a name that looks like it."""
    assert is_loopback(host) is answer


@dataclass
class Reached:
    """The server and the proxy that calls to a name may reach."""

    server: ProviderServer
    proxy: ProviderServer

    @property
    def counts(self) -> tuple[int, int]:
        """Requests at the server and at the proxy."""
        return len(self.server.requests), len(self.proxy.requests)


@pytest.fixture
async def reached(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Reached]:
    """Resolve api.example.test to this machine, and run a second server as a proxy."""
    look_up = socket.getaddrinfo

    def only_ours(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in {"api.example.test", "127.0.0.1", "localhost"}:
            return _no_names()
        return look_up("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", only_ours)
    async with ProviderServer() as proxy:
        yield Reached(server, proxy)


async def call_by_name(
    reached: Reached, provider: str, *, loopback: bool = False, **settings: Any
) -> None:
    """Call the server by a name that is not loopback."""
    url = reached.server.base_url(provider)
    if not loopback:
        url = url.replace("127.0.0.1", "api.example.test")
    keys = StaticAPIKeys({provider: {"key": "sk-test", "base_url": url}})
    options = Settings(**{"max_retries": 0, **settings})
    async with LLMInfraService(keys, settings=options) as service:
        await service.complete(HELLO, MODELS[provider], provider)
        await service.get_available_models(provider)


@each_engine
@each_provider
async def test_a_proxy_of_the_environment(
    reached: Reached, monkeypatch: pytest.MonkeyPatch, engine: Engine, provider: str
) -> None:
    """HTTP_PROXY receives the requests, which name their host."""
    monkeypatch.setenv("HTTP_PROXY", reached.proxy.origin)

    await call_by_name(reached, provider, engine=engine)

    assert reached.counts == (0, 2)
    hosts = {request.headers["host"] for request in reached.proxy.requests}
    assert hosts == {f"api.example.test:{reached.server.port}"}


@pytest.mark.parametrize(
    ("settings", "no_proxy", "loopback"),
    [
        ({"trust_env_proxy": False}, "", False),
        ({}, "example.test", False),
        ({}, "*", False),
        ({}, "", True),
    ],
)
async def test_a_proxy_that_is_bypassed(
    reached: Reached,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    no_proxy: str,
    loopback: bool,
) -> None:
    """A proxy is bypassed if it is switched off, by NO_PROXY, and for loopback."""
    monkeypatch.setenv("HTTP_PROXY", reached.proxy.origin)
    monkeypatch.setenv("ALL_PROXY", reached.proxy.origin)
    monkeypatch.setenv("NO_PROXY", no_proxy)

    await call_by_name(reached, "openai", loopback=loopback, **settings)

    assert reached.counts == (2, 0)


async def test_a_proxy_of_the_settings_wins(
    reached: Reached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy of the settings wins over the environment and NO_PROXY."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")

    await call_by_name(reached, "openai", proxy=reached.proxy.origin)

    assert reached.counts == (0, 2)


# --- TLS ------------------------------------------------------------------------------------


async def call_secure(
    secure: ProviderServer, provider: str = "openai", **settings: Any
) -> None:
    """Make a call to the https server."""
    url = secure.base_url(provider)
    keys = StaticAPIKeys({provider: {"key": "sk-test", "base_url": url}})
    options = Settings(**{"max_retries": 0, "timeout": 20.0, **settings})
    async with LLMInfraService(keys, settings=options) as service:
        await service.complete(HELLO, MODELS[provider], provider)


@each_engine
@each_provider
async def test_a_certificate_that_nobody_signed(
    secure: ProviderServer, engine: Engine, provider: str
) -> None:
    """It is refused once, before a key is sent; the error says how to trust it."""
    with pytest.raises(ServiceUnavailableError, match="SSL_CERT_FILE") as caught:
        await call_secure(secure, provider, engine=engine, max_retries=3)

    assert caught.value.retryable is False
    assert caught.value.attempts == 1
    assert secure.requests == []


@each_engine
@each_provider
async def test_a_bundle_that_is_trusted(
    secure: ProviderServer, authority: Authority, engine: Engine, provider: str
) -> None:
    """`ca_bundle` makes a private authority trusted."""
    await call_secure(secure, provider, engine=engine, ca_bundle=authority.file)

    assert len(secure.requests) == 1


async def test_ssl_cert_file(
    secure: ProviderServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_FILE makes it trusted too."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))

    await call_secure(secure)

    assert len(secure.requests) == 1


@each_engine
@pytest.mark.parametrize(
    "variable",
    [
        ("SSL_VERIFY", "False"),
        ("SSL_CERTIFICATE", "{authority}"),
        ("REQUESTS_CA_BUNDLE", "{authority}"),
        ("CURL_CA_BUNDLE", ""),
        ("PYTHONHTTPSVERIFY", "0"),
    ],
)
async def test_no_other_variable_says_whom_to_trust(
    secure: ProviderServer,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    variable: tuple[str, str],
) -> None:
    """No variable of LiteLLM or another library turns the check off."""
    name, value = variable
    monkeypatch.setenv(name, value.format(authority=authority.file))

    with pytest.raises(ServiceUnavailableError, match="SSL_CERT_FILE"):
        await call_secure(secure, engine=engine)

    assert secure.requests == []


async def test_a_certificate_for_another_host(
    secure: ProviderServer, authority: Authority
) -> None:
    """A certificate of a trusted authority is refused for another host."""
    secure.host = "localhost"

    with pytest.raises(ServiceUnavailableError, match="localhost"):
        await call_secure(secure, ca_bundle=authority.file)

    assert secure.requests == []


async def test_a_bundle_that_cannot_be_read(tmp_path: Path) -> None:
    """The error names the setting, and nothing is sent."""
    bundle = tmp_path / "empty.pem"
    bundle.write_text("nothing in here")
    async with ProviderServer() as server:
        server.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        with pytest.raises(SettingsError, match="ca_bundle"):
            await call_secure(server, ca_bundle=bundle)
        with pytest.raises(SettingsError, match="ca_bundle"):
            await call_secure(server, ca_bundle=tmp_path / "missing.pem")

        assert server.connections == 0


@dataclass
class Tunnel:
    """A proxy that opens tunnels and keeps the bytes that it gets."""

    told: list[bytes]
    port: int = 0

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Open a tunnel to 127.0.0.1, whatever the host is called."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.told.append(head)
        port = int(head.split()[1].rpartition(b":")[2])
        inner, out = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(self._pipe(reader, out), self._pipe(inner, writer))

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await reader.read(65536):
                self.told.append(data)
                writer.write(data)
        finally:
            writer.close()


async def test_a_proxy_sees_no_key_of_a_https_call(
    secure: ProviderServer, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy is asked for a tunnel by name; the key travels inside."""
    tunnel = Tunnel([])
    listener = await asyncio.start_server(tunnel.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(secure, "host", "api.example.test")

    async with listener:
        await call_secure(secure, ca_bundle=authority.file)

    assert len(secure.requests) == 1
    assert secure.requests[0].headers["authorization"] == "Bearer sk-test"
    first = f"CONNECT api.example.test:{secure.port} HTTP/1.1"
    assert tunnel.told[0].startswith(first.encode())
    assert b"sk-test" not in b"".join(tunnel.told)


# --- keys are never shown ---------------------------------------------------------------

CANARY = "sk-canary-PW4xQ9vT7bN2"


@pytest.fixture
def all_loggers_at_debug() -> Iterator[None]:
    """Set every logger to DEBUG."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    loggers += [logging.getLogger(n) for n in ("LiteLLM", "openai", "httpx", "aiohttp")]
    before = [(logger, logger.level) for logger in [logging.root, *loggers]]
    for logger, _ in before:
        logger.setLevel(logging.DEBUG)
    yield
    for logger, level in before:
        logger.setLevel(level)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen_already: set[int] = set()
    todo = [exc]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen_already:
            seen_already.add(id(one))
            yield one
            shown = None if one.__suppress_context__ else one.__context__
            todo += [one.__cause__, shown]


def _words(exc: BaseException) -> Iterator[str]:
    """Yield everything that an error shows to a reader, a log or another process."""
    yield from traceback.format_exception(exc)
    for one in _chain(exc):
        yield str(one)
        yield repr(one)
        if isinstance(one, DiPeOLLMError):
            yield repr(vars(one))
            yield pickle.dumps(one).decode("latin-1")


def _locals(exc: BaseException) -> Iterator[str]:
    """Yield the locals of our own frames, as a debugger or an error tracker shows them.

    They hold the key only if the provider echoes it.
    """
    for one in _chain(exc):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if "dipeo_llm" in frame.f_code.co_filename:
                yield from (repr(value) for value in frame.f_locals.values())


@each_engine
@each_provider
@pytest.mark.usefixtures("all_loggers_at_debug")
async def test_a_key_is_in_no_word_of_ours(
    server: ProviderServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    engine: Engine,
    provider: str,
) -> None:
    """No log at any level, no repr, no error, no pickle and no output holds it."""
    url = server.base_url(provider)
    keys = StaticAPIKeys({provider: {"key": CANARY, "base_url": url}})
    settings = Settings(engine=engine, max_retries=1, retry_wait=0.01, timeout=20)
    words = [repr(keys), repr(settings)]
    replies = (
        Answer(text=f"your key is {CANARY[:6]}"),
        error(provider, 401, f"Incorrect API key provided: {CANARY}."),
        error(provider, 400, f"bad key {CANARY}"),
        error(provider, 500, f"bad key {CANARY}"),
        Raw(body=f"<html>{CANARY}</html>".encode()),
        Raw(body=json.dumps({"error": CANARY}).encode()),
        Raw(307, headers={"location": "http://127.0.0.1:9/"}),
        Fault("reset"),
        Fault("reset_mid_body"),
        Fault("stall"),
    )

    async with LLMInfraService(keys, settings=settings) as service:
        await service.initialize()
        for reply in replies:
            server.default = reply
            timeout = 0.3 if reply == Fault("stall") else 20
            try:
                result = await service.complete(
                    HELLO, MODELS[provider], provider, timeout=timeout
                )
                words += [repr(result), result.model_dump_json()]
            except DiPeOLLMError as exc:
                words += _words(exc)
                if CANARY not in repr(reply):
                    words += _locals(exc)
        await service.get_available_models(provider)
        words += [repr(service), repr(vars(service))]
    words += [record.getMessage() for record in caplog.records]
    words += [str(vars(record)) for record in caplog.records]
    words += capfd.readouterr()

    assert len(server.requests) > len(replies)
    assert [word for word in words if CANARY in word] == []


def _all_places(words: str) -> bytes:
    """Return an answer of every format at once, with the text in every place."""
    odd = {"k": words}
    body = {
        "model": odd,
        "modelVersion": odd,
        "choices": [{"message": {"content": odd}, "finish_reason": odd}],
        "content": [{"type": "text", "text": odd}],
        "stop_reason": odd,
        "candidates": [{"content": {"parts": [{"text": odd}]}, "finishReason": "STOP"}],
        "message": {"content": odd},
        "done": True,
    }
    return json.dumps(body).encode()


SLASHED = "AQ/canary+PW4xQ9vT/7bN2"
ECHOES: dict[str, Callable[[str], Raw]] = {
    "as code": lambda k: Raw(400, body=json.dumps({"error": {"code": k}}).encode()),
    "as type": lambda k: Raw(400, body=json.dumps({"error": {"type": k}}).encode()),
    "as status": lambda k: Raw(400, body=json.dumps({"error": {"status": k}}).encode()),
    "as request id": lambda k: Raw(500, headers={"x-request-id": k, "request-id": k}),
    "as request id in the body": lambda k: Raw(
        500, body=json.dumps({"request_id": k, "error": {"message": "m"}}).encode()
    ),
    "cut in two": lambda k: Raw(500, body=b"x" * (600 - len(k) // 2) + k.encode()),
    "cut in two with 200": lambda k: Raw(body=b"x" * (600 - len(k) // 2) + k.encode()),
    "as a reason to block": lambda k: Raw(
        body=json.dumps({"promptFeedback": {"blockReason": f"\x1b[31m{k}\n"}}).encode()
    ),
    "in all places": lambda k: Raw(body=_all_places(k)),
    "as a key of JSON": lambda k: Raw(body=json.dumps({k: 1}).encode()),
    "as a content type": lambda k: Raw(headers={"content-type": k}, body=b"no json"),
    "where to go": lambda k: Raw(302, headers={"location": f"http://x/?k={k}"}),
    "in a URL": lambda k: Raw(400, body=f"GET /?key={quote(k, safe='')}".encode()),
    "in JSON with its slashes escaped": lambda k: Raw(
        400, body=json.dumps({"detail": k}).replace("/", "\\/").encode()
    ),
    "as an event of a stream": lambda k: Raw(
        headers={"content-type": "text/event-stream"}, body=f"data: {k}\n\n".encode()
    ),
    "as an error event": lambda k: Raw(
        headers={"content-type": "text/event-stream"},
        body=f'data: {{"error": {{"message": "{k}", "code": "{k}"}}}}\n\n'.encode(),
    ),
    "as the length of a chunk": lambda k: Raw(
        headers={"transfer-encoding": "chunked"},
        body=f"{k}\r\n".encode(),
        framing="close",
    ),
    "as a compression": lambda k: Raw(
        headers={"content-encoding": "gzip"}, body=f"{k}\n{k}".encode()
    ),
}


class EchoServer(ProviderServer):
    """A server that answers a listing as it answers anything else."""

    def _listing(self, asked: Received) -> Raw:
        assert isinstance(self.default, Raw)
        return self.default


@each_engine
@each_provider
@pytest.mark.parametrize("key", [CANARY, SLASHED], ids=["plain", "slashed"])
@pytest.mark.parametrize("place", ECHOES)
async def test_an_echoed_key_is_in_no_word_of_ours(
    place: str, key: str, provider: str, engine: Engine
) -> None:
    """No error repeats a key that a provider echoes, not even half of it."""
    async with EchoServer(strict=False) as server:
        server.default = ECHOES[place](key)
        url = server.base_url(provider)
        keys = StaticAPIKeys({provider: {"key": key, "base_url": url}})
        settings = Settings(engine=engine, max_retries=0, timeout=20)
        asked = (HELLO, MODELS[provider], provider)
        async with LLMInfraService(keys, settings=settings) as service:
            streamed = service.stream(*asked)
            errors: list[DiPeOLLMError] = []
            for make in (
                lambda: service.complete(*asked),
                streamed.__aenter__,
                streamed.result,
                lambda: service.get_available_models(provider),
            ):
                try:
                    await make()
                except DiPeOLLMError as exc:
                    errors.append(exc)
                except RuntimeError:
                    assert errors, "a stream that opened can be read"
            await streamed.aclose()
    assert [str(exc) for exc in errors if not str(exc).isprintable()] == []
    words = [word for exc in errors for word in _words(exc)]
    assert [word for word in words if key[:12] in word] == []


async def test_a_proxys_password_is_in_no_word_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not shown if the proxy refuses it, or if the proxy's URL is invalid."""

    async def refuse(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    keys = StaticAPIKeys({"openai": "sk-test"})
    settings = Settings(
        max_retries=0, base_urls={"openai": "https://api.example.test/v1"}
    )
    async with listener:
        for proxy in (
            f"http://me:{CANARY}@127.0.0.1:{port}",
            f"http://me:{CANARY}@h:x",
        ):
            monkeypatch.setenv("HTTPS_PROXY", proxy)
            async with LLMInfraService(keys, settings=settings) as service:
                with pytest.raises(DiPeOLLMError) as caught:
                    await service.complete(HELLO, "gpt-4.1-nano", "openai")
            shown = [*traceback.format_exception(caught.value)]
            shown += [repr(vars(one)) for one in _chain(caught.value)]
            shown += [pickle.dumps(caught.value).decode("latin-1")]
            assert [line for line in shown if CANARY in line] == []


async def test_no_secret_of_a_connection_is_written_down(
    secure: ProviderServer,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SSLKEYLOGFILE is ignored: its file would make every call readable."""
    log = tmp_path / "secrets.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))

    await call_secure(secure, ca_bundle=authority.file)

    assert len(secure.requests) == 1
    assert not log.exists()


@pytest.mark.parametrize("key", [f"{CANARY}\ud800", f"{CANARY}\nx", f"{CANARY} x"])
def test_an_adapter_refuses_a_key_that_no_header_can_carry(key: str) -> None:
    """An adapter without a service does not show the key either."""
    with pytest.raises(APIKeyError, match="header") as caught:
        create_adapter("openai", "m", key)

    shown = traceback.TracebackException.from_exception(caught.value)
    assert [line for line in shown.format() if CANARY in line] == []


async def test_a_row_of_a_database_is_a_record() -> None:
    """`sqlite3.Row` has `keys` but no `get`."""
    with closing(sqlite3.connect(":memory:")) as base:
        base.row_factory = sqlite3.Row
        row = base.execute(f"select '{CANARY}' as key, 'openai' as service").fetchone()

    class Port:
        def get_api_key(self, api_key_id: str) -> Any:
            return row

    key = await find_key(
        Port(), "mine", service=None, needs_key=True, owner=lambda name: name
    )

    assert key.secret is not None
    assert key.secret.get_secret_value() == CANARY
    assert key.service == "openai"


ODD_NAMES = [
    "a#b",
    "a?key=b&x=",
    "gemini-x/../../../v1beta/other",
    "../../tenant-b/v1beta/files",
    "a%2fb",
    "a\\b",
    "gemini x HTTP/1.1",
    ".",
]


UNPRINTABLE = ["a\x00b", "a\r\nb", "a\ud83d", "a\x1b[31m"]


@pytest.mark.parametrize("name", [*ODD_NAMES, *UNPRINTABLE])
@pytest.mark.parametrize("service_name", ["google", "bytez", "vertex"])
async def test_a_models_name_steers_no_url(
    server: ProviderServer, name: str, service_name: str
) -> None:
    """A name with a meaning in URLs is refused before anything is sent."""
    record = {"key": "sk-test", "base_url": server.base_url("google")}
    keys = StaticAPIKeys({"mine": record})
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        for ask in (service.complete, service.count_tokens):
            with pytest.raises(InvalidRequestError) as caught:
                await ask(HELLO, name, "mine", service=service_name)
            assert str(caught.value).isprintable()

    assert server.connections == 0


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_a_models_name_in_the_body_steers_no_url(
    server: ProviderServer, name: str
) -> None:
    """In OpenAI's format the name is in the body, whatever it looks like."""
    record = {"key": "sk-test-openai", "base_url": server.base_url("openai")}
    keys = StaticAPIKeys({"mine": record})
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        await service.complete(HELLO, name, "mine", service="groq")

    (request,) = server.requests
    assert (request.path, request.query) == ("/v1/chat/completions", {})
    assert request.json["model"] == name


@pytest.mark.parametrize("name", UNPRINTABLE)
async def test_a_name_that_is_not_printable(server: ProviderServer, name: str) -> None:
    """It is refused before anything is sent, where it would be in the body too."""
    record = {"key": "sk-test-openai", "base_url": server.base_url("openai")}
    keys = StaticAPIKeys({"mine": record})
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        with pytest.raises(InvalidRequestError) as caught:
            await service.complete(HELLO, name, "mine", service="groq")

    assert str(caught.value).isprintable()
    assert server.connections == 0


async def test_a_key_that_no_header_can_carry() -> None:
    """A key with a line break is refused and not shown."""
    keys = StaticAPIKeys({"openai": f"{CANARY}\n{CANARY}"})

    async with LLMInfraService(keys, settings=Settings()) as service:
        with pytest.raises(APIKeyError, match="header") as caught:
            await service.complete(HELLO, "gpt-4.1-nano", "openai")

    assert [word for word in _words(caught.value) if CANARY in word] == []


async def test_a_key_in_a_base_url() -> None:
    """A base URL with a password is refused and not shown."""
    record = {"key": CANARY, "base_url": f"http://user:{CANARY}@127.0.0.1:9/v1"}
    keys = StaticAPIKeys({"openai": record})

    async with LLMInfraService(keys, settings=Settings()) as service:
        with pytest.raises(InvalidRequestError) as caught:
            await service.complete(HELLO, "gpt-4.1-nano", "openai")

    assert CANARY not in "".join(traceback.format_exception(caught.value))
