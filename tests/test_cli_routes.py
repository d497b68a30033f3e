"""Routes on the command line: `routes`, `chat`, `batch` and `doctor`."""

import json
from pathlib import Path

import pytest

from tests.provider_server import Answer, ProviderServer, error
from tests.test_cli import Run, environment, folder, run

__all__ = ["environment", "folder", "run"]

# ruff: noqa: ASYNC240 - small files
ROUTES = """\
routes:
  fast:
    fallbacks: [smart]
    deployments:
      - {model: gpt-4.1-nano, name: nano, api_key_id: openai, rpm: 500}
  smart:
    deployments: [{model: claude-haiku-4-5, api_key_id: anthropic, weight: 2}]
"""


@pytest.fixture
def file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a file of routes, and name it in the environment."""
    path = folder / "routes.yaml"
    path.write_text(ROUTES)
    monkeypatch.setenv("DIPEO_LLM_ROUTES", "routes.yaml")
    return path


@pytest.mark.usefixtures("file")
async def test_routes_prints_a_file(run: Run) -> None:
    """As text and as JSON; without a file the environment's."""
    expected = (
        "fast: shuffle, then smart\n"
        "fast -> nano: gpt-4.1-nano, weight 1, rpm 500\n"
        "smart: shuffle\n"
        "smart -> claude-haiku-4-5@anthropic: claude-haiku-4-5, weight 2\n"
    )
    assert await run("routes", "routes.yaml") == (0, expected, "")
    assert await run("routes") == (0, expected, "")
    code, out, _ = await run("routes", "--json")
    assert code == 0
    assert json.loads(out)["routes"]["fast"]["fallbacks"] == ["smart"]


async def test_routes_says_what_is_wrong(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With file and line; a model that nobody knows too."""
    file.write_text(ROUTES.replace("[smart]", "[smrt]"))
    code, _, said = await run("routes")
    assert code == 2
    assert "routes.yaml:3: " in said
    assert "did you mean 'smart'" in said
    file.write_text(ROUTES.replace("gpt-4.1-nano", "no-such-model"))
    code, _, said = await run("routes")
    assert code == 1
    assert "deployment 'nano' of route 'fast'" in said
    monkeypatch.delenv("DIPEO_LLM_ROUTES")
    code, _, said = await run("routes")
    assert code == 2
    assert "DIPEO_LLM_ROUTES" in said


@pytest.mark.usefixtures("environment", "file")
async def test_chat_takes_a_route(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each deployment gets its own provider's key; a failure leads to the next."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "1")
    server.reply(error("openai", 503), Answer("Ave"))
    code, out, _ = await run("chat", "fast", "Hello", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["text"], answer["route"]) == ("Ave", "fast")
    assert answer["tried"] == ["nano", "claude-haiku-4-5@anthropic"]
    assert server.requests[1].headers["x-api-key"] == "sk-anthropic"
    monkeypatch.setenv("DIPEO_LLM_MODEL", "fast")
    assert (await run("chat", "Hello"))[0] == 0
    code, _, said = await run("chat", "fast", "Hi", "--base-url", "http://127.0.0.1:9")
    assert (code, "not a route" in said) == (2, True)


@pytest.mark.usefixtures("environment", "file")
async def test_batch_takes_a_route(run: Run, folder: Path) -> None:
    """Rows are answered by the route's deployments."""
    (folder / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, _, _ = await run("batch", "in.jsonl", "out.jsonl", "--model", "fast")
    assert code == 0
    rows = [
        json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()
    ]
    assert {row["result"]["deployment"] for row in rows} == {"nano"}


@pytest.mark.usefixtures("environment")
async def test_doctor_checks_the_routes(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the routes, or what is wrong with their file."""
    monkeypatch.setenv("DIPEO_LLM_MODEL", "smart")
    _, out, _ = await run("doctor", "--offline")
    assert "routes: fast, smart (routes.yaml)" in out
    assert "DIPEO_LLM_MODEL smart is a route" in out
    file.write_text("routes: 5")
    _, out, _ = await run("doctor", "--offline")
    assert "fail  routes: routes.yaml:1: routes=5 cannot be used" in out
