"""`dipeo-llm doctor`, against a server that speaks the providers' formats."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import metadata
from pathlib import Path

import pytest

from dipeo_llm import LLMInfraService, ServiceUnavailableError
from dipeo_llm.cli import main
from tests.conftest import PROVIDERS
from tests.provider_server import ProviderServer

Examine = Callable[..., Awaitable[tuple[int, dict[str, str]]]]
KEYS = {"openai": "OPENAI_API_KEY", "google": "GOOGLE_API_KEY"}


@pytest.fixture
def environment(server: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead every provider to the server; hold keys of two of them."""
    for provider in PROVIDERS:
        name = f"DIPEO_LLM_{provider.upper()}_BASE_URL"
        monkeypatch.setenv(name, server.base_url(provider))
    for provider, variable in KEYS.items():
        monkeypatch.setenv(variable, f"sk-secret-{provider}")


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run doctor; give its exit code and its lines, by what they are about."""

    async def examining(*argv: str) -> tuple[int, dict[str, str]]:
        code = await asyncio.to_thread(main, ["doctor", *argv])
        out, _ = capsys.readouterr()
        assert "sk-secret" not in out
        lines = [line.split(maxsplit=2) for line in out.splitlines()]
        return code, {
            about.rstrip(":"): f"{state} {rest}" for state, about, rest in lines
        }

    return examining


@pytest.mark.usefixtures("environment")
async def test_an_installation_that_works_is_ok(examine: Examine) -> None:
    """Versions, LiteLLM, the folder, and each provider that there is a key for."""
    code, lines = await examine()

    assert code == 0
    assert lines["Python"].startswith("ok 3.")
    assert lines["litellm"].startswith(f"ok {metadata.version('litellm')} (required: ")
    assert lines["LiteLLM"] == "ok self-check: openai, anthropic, google, ollama"
    assert lines["prompt"] == f"ok folder {Path.cwd()} (the working directory)"
    assert lines["openai"].startswith("ok key in OPENAI_API_KEY, http://127.0.0.1:")
    assert lines["openai"].endswith(" answers and accepts the key")
    assert lines["google"].startswith("ok key in GOOGLE_API_KEY, http://127.0.0.1:")
    assert lines["ollama"].endswith(" answers")
    assert lines["anthropic"] == "note no key; to use it, set ANTHROPIC_API_KEY"


@pytest.mark.usefixtures("environment")
async def test_offline_asks_nobody(examine: Examine, server: ProviderServer) -> None:
    """What can be told without the network is told."""
    code, lines = await examine("--offline")

    assert (code, server.requests) == (0, [])
    assert lines["openai"].endswith(" was not asked")


@pytest.mark.usefixtures("environment")
async def test_a_key_that_is_refused_fails(
    examine: Examine, server: ProviderServer
) -> None:
    """The line names the variable, and the others are still asked."""
    server.keys["openai"] = {"sk-another"}

    code, lines = await examine()

    assert code == 1
    assert lines["openai"].startswith("fail ")
    assert lines["openai"].endswith("the key in OPENAI_API_KEY; set a valid one")
    assert lines["google"].startswith("ok ")


@pytest.fixture
async def silent_url() -> AsyncIterator[str]:
    """Listen on a port and say nothing."""
    ends = asyncio.Event()

    async def wait(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ends.wait()
        writer.close()

    async with await asyncio.start_server(wait, "127.0.0.1", 0) as silent:
        yield f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        ends.set()


@pytest.mark.usefixtures("environment")
async def test_a_provider_that_does_not_answer_fails_in_time(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, silent_url: str
) -> None:
    """Seconds after --timeout are what it is given, without a retry."""
    monkeypatch.setenv("DIPEO_LLM_OPENAI_BASE_URL", silent_url)
    monkeypatch.setenv("DIPEO_LLM_OLLAMA_BASE_URL", "http://127.0.0.1:9")

    code, lines = await examine("--timeout", "0.5")

    assert code == 1
    assert f"{silent_url}: openai did not answer within 0.5 s; check" in lines["openai"]
    assert lines["ollama"].startswith("fail http://127.0.0.1:9: no answer from ollama")
    assert lines["google"].startswith("ok ")


async def test_without_a_key_it_says_what_to_set(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who has just installed it learns the next step."""

    async def fail(*_: object) -> bool:
        raise ServiceUnavailableError("no answer from ollama")

    # An Ollama may be running on this machine.
    monkeypatch.setattr(LLMInfraService, "validate_api_key", fail)

    code, lines = await examine()

    assert code == 1
    assert lines["openai"] == "note no key; to use it, set OPENAI_API_KEY"
    assert lines["ollama"].startswith("note nothing answers at http://127.0.0.1:11434;")
    assert lines["no"].startswith("fail provider can be used: set one of the keys")


@pytest.mark.parametrize(
    ("variable", "value", "about", "line"),
    [
        (
            "DIPEO_LLM_TIMEOUT",
            "soon",
            "settings",
            "fail DIPEO_LLM_TIMEOUT='soon' cannot",
        ),
        (
            "DIPEO_BASE_DIR",
            "/nowhere",
            "prompt",
            "fail folder /nowhere: it does not ex",
        ),
        (
            "DIPEO_LLM_MODEL",
            "gpt-5",
            "DIPEO_LLM_MODEL",
            "ok gpt-5 is a model of openai",
        ),
        ("DIPEO_LLM_MODEL", "nobodys", "DIPEO_LLM_MODEL", "fail no provider is known"),
        ("OPENAI_API_KEY", "sk-secret\u00e9", "openai", "fail key in OPENAI_API_KEY"),
    ],
)
@pytest.mark.usefixtures("environment")
async def test_what_is_set_is_checked(
    examine: Examine,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    about: str,
    line: str,
) -> None:
    """A mistake has a line that begins with fail, and the exit code 1."""
    monkeypatch.setenv(variable, value)

    code, lines = await examine()

    assert lines[about].startswith(line)
    assert code == int(line.startswith("fail"))


@pytest.mark.usefixtures("environment")
async def test_a_version_out_of_range_fails(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is the command that installs another."""
    needed = ["litellm>=99; python_version > '3'", "not-there", "x; extra == 'testing'"]
    monkeypatch.setattr("dipeo_llm.cli.doctor.requires", lambda _: needed)

    code, lines = await examine("--offline")

    assert code == 1
    assert "(required: >=99); pip install 'litellm>=99'" in lines["litellm"]
    assert lines["not-there"].endswith(
        "is missing (required: any); pip install 'not-there'"
    )
    assert "x" not in lines
