"""A project of its own with tests of its own, for the tests of the pytest plugin.

A test module that names it in `pytest_plugins` has its fixtures. PYTEST_DONT_REWRITE: the
module imports it too, for its types.
"""

import asyncio
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dipeo_llm.litellm_import import import_litellm
from tests.provider_server import ProviderServer

APP = '''\
"""Somebody's program."""

TOOLS = []
MODEL = "gpt-4.1-nano"


async def greet(service, name):
    messages = [{"role": "user", "content": f"Greet {name}."}]
    options = {"tools": TOOLS} if TOOLS else {}
    result = await service.complete(messages, MODEL, "openai", **options)
    return result.text


async def greet_all(service, names):
    return [await greet(service, name) for name in names]
'''

CONFTEST = """\
import pytest
from dipeo_llm import EnvironmentAPIKeys, LLMInfraService


@pytest.fixture
async def service():
    async with LLMInfraService(EnvironmentAPIKeys()) as opened:
        yield opened
"""

TESTS = """\
import app
import pytest

NAMES = ["Ann", "Bob"]


@pytest.mark.llm_cassette
async def test_greets(service):
    assert await app.greet(service, "Ann") == "Hello from the loopback."


async def test_greets_all(service, llm_cassette):
    assert len(await app.greet_all(service, NAMES)) == len(NAMES)
    assert len(llm_cassette.requests) == len(NAMES)


def test_adds():
    assert 1 + 1 == 2
"""

INI = """\
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
strict_markers = true
addopts = -p no:randomly
"""


@pytest.fixture(scope="session")
def loaded() -> None:
    """Import what a run inside this process would import and forget again.

    LiteLLM brings importlib_metadata, which takes the place of the standard finder of
    plugins; forgotten, it leaves none.
    """
    import_litellm()
    for module in ("testing.cassettes", "service", "testing.mock"):
        importlib.import_module(f"dipeo_llm.{module}")


class Project:
    """A project of its own, and the server that its tests are recorded from."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        pytester.makeini(INI)
        pytester.makepyfile(app=APP, conftest=CONFTEST, test_app=TESTS)

    @property
    def folder(self) -> Path:
        """Its root."""
        return self.pytester.path

    def cassette(self, name: str) -> Path:
        """Return the path of a cassette."""
        return self.folder / "cassettes" / f"{name}.yaml"

    def change(self, file: str, old: str, new: str) -> None:
        """Edit a file."""
        path = self.folder / file
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def run(self, *arguments: str) -> pytest.RunResult:
        """Run its tests in this process."""
        without = ("-p", "no:xdist", "-p", "no:recording")
        return self.pytester.runpytest_inprocess(*without, *arguments)

    def run_alone(self, *arguments: str) -> pytest.RunResult:
        """Run its tests in a process that has not imported anything yet."""
        return self.pytester.runpytest_subprocess(*arguments, timeout=120)


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, loaded: None
) -> Project:
    """Make the project; no server answers, and no key is known."""
    monkeypatch.delenv("CI", raising=False)
    # Files that are edited within a second would otherwise be run as they were.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    # Nobody listens there.
    monkeypatch.setenv("DIPEO_LLM_OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    return Project(pytester)


@pytest.fixture
def alive(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ProviderServer]:
    """Run a server, in a thread of its own, that the project's calls reach."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = ProviderServer()

    def wait_for(step: "asyncio.Future[None] | object") -> None:
        asyncio.run_coroutine_threadsafe(step, loop).result(20)  # type: ignore[arg-type]

    wait_for(server.__aenter__())
    with monkeypatch.context() as patch:
        patch.setenv("DIPEO_LLM_OPENAI_BASE_URL", server.base_url("openai"))
        patch.setenv("OPENAI_API_KEY", "sk-real-key-of-somebody-0123")
        yield server
    wait_for(server.__aexit__())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.fixture
def recorded(
    project: Project, alive: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """Record the project's tests; then it is without key and server again."""
    project.run("--llm-record=once").assert_outcomes(passed=3)
    assert len(alive.requests) == 3
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("DIPEO_LLM_OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    return project
