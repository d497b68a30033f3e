"""What most tests need: a clean environment, a loopback server, keys and a service."""

import os
import re
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import trustme

from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from tests.provider_server import ProviderServer
from tests.redis_server import RedisServer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs so, and the processes of the tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Every run tries the same examples: what a new one would find belongs to the change that
# broke it. `--hypothesis-profile=default` tries others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

PROVIDERS = ("openai", "anthropic", "google", "ollama")
MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "qwen3:4b",
}
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]

each_provider = pytest.mark.parametrize("provider", PROVIDERS)

Open = Callable[..., AbstractAsyncContextManager[LLMInfraService]]
"""Opens a service on the loopback server; keywords are fields of `Settings`."""

_PREFIXES = (
    "OPENAI_",
    "ANTHROPIC_",
    "GEMINI_",
    "GOOGLE_",
    "OLLAMA_",
    "DIPEO_",
    "LITELLM_",
    "SSL_CERT_",
)
_SUFFIXES = ("_API_KEY", "_PROXY")
# The package sets it with LiteLLM's import, for as long as the process lives.
_KEPT = frozenset({"LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS"})


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away every variable that could lead a call or a key elsewhere."""
    for name in set(os.environ) - _KEPT:
        upper = name.upper()
        if upper.startswith(_PREFIXES) or upper.endswith(_SUFFIXES):
            monkeypatch.delenv(name)


@pytest.fixture
async def server() -> AsyncIterator[ProviderServer]:
    """Run a loopback server that speaks the wire format of all four providers."""
    async with ProviderServer() as running:
        yield running


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis server."""
    with RedisServer(tmp_path) as running:
        yield running


@dataclass(frozen=True)
class Authority:
    """A certificate authority that no client trusts by default."""

    file: Path
    """The authority's own certificate, for a client to trust."""
    server: ssl.SSLContext
    """A server's context with a certificate for 127.0.0.1 and some names."""


def make_authority(folder: Path) -> Authority:
    """Make an authority and let it sign a server's certificate."""
    authority = trustme.CA()
    file = folder / "authority.pem"
    authority.cert_pem.write_to_path(file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(
        "127.0.0.1", "api.example.test", "pictures.example", "other.example"
    ).configure_cert(context)
    return Authority(file, context)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Make one for all tests."""
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
async def secure(authority: Authority) -> AsyncIterator[ProviderServer]:
    """Run the loopback server with https and the authority's certificate."""
    async with ProviderServer(ssl=authority.server) as running:
        yield running


def keys_for(server: ProviderServer) -> StaticAPIKeys:
    """Make one key for each provider, under its name, all leading to a server."""
    return StaticAPIKeys(
        {
            provider: {
                "key": f"sk-test-{provider}",
                "service": provider,
                "base_url": server.base_url(provider),
            }
            for provider in PROVIDERS
        }
    )


@pytest.fixture
def keys(server: ProviderServer) -> StaticAPIKeys:
    """Hold one key for each provider, under its name, all leading to the server."""
    return keys_for(server)


@pytest.fixture
def opened(keys: StaticAPIKeys) -> Open:
    """Open a service that hardly waits, with settings of the test's choice."""

    @asynccontextmanager
    async def open_service(**settings: Any) -> AsyncIterator[LLMInfraService]:
        usual = {"retry_wait": 0.01, "retry_wait_max": 0.05, "timeout": 20.0}
        async with LLMInfraService(
            keys, settings=Settings(**usual | settings)
        ) as service:
            await service.initialize()  # takes seconds, which a deadline would count
            yield service

    return open_service


@pytest.fixture
async def service(opened: Open) -> AsyncIterator[LLMInfraService]:
    """Open a service on the server that hardly waits before a retry."""
    async with opened() as made:
        yield made


@pytest.fixture
async def direct(opened: Open) -> AsyncIterator[LLMInfraService]:
    """Open a service on the direct engine that makes one attempt."""
    async with opened(engine="direct", max_retries=0) as made:
        yield made


def name_of(value: object) -> str:
    """Name a parameter in a test's id, which must be the same in every worker."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
