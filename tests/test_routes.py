"""Routes as configuration: from Python, YAML and JSON, with errors that name the line."""

import json
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    Deployment,
    LLMInfraService,
    Route,
    Routes,
    Settings,
    SettingsError,
    StaticAPIKeys,
)

WHOLE = """\
routes:
  fast:
    strategy: latency
    fallbacks: [smart]
    context_window_fallbacks: [smart]
    cooldown: 10
    failures: 2
    when_busy: fail
    affinity: false
    deployments:
      - model: openai/gpt-4.1-nano
        api_key_id: team-a
        weight: 2
        rpm: 500
        tpm: 200000
      - name: ours
        model: my-model
        service: openai
        base_url: http://127.0.0.1:8000/v1/
        context_window: 8192
        input_usd_per_million: 0
        output_usd_per_million: 0
  smart:
    deployments:
      - model: claude-opus-4-1
"""
IN_PYTHON = {
    "fast": Route(
        strategy="latency",
        fallbacks=("smart",),
        context_window_fallbacks=("smart",),
        cooldown=10,
        failures=2,
        when_busy="fail",
        affinity=False,
        deployments=(
            Deployment(
                model="openai/gpt-4.1-nano",
                api_key_id="team-a",
                weight=2,
                rpm=500,
                tpm=200_000,
            ),
            Deployment(
                name="ours",
                model="my-model",
                service="openai",
                base_url="http://127.0.0.1:8000/v1",
                context_window=8192,
                input_usd_per_million=0,
                output_usd_per_million=0,
            ),
        ),
    ),
    "smart": {"deployments": [{"model": "claude-opus-4-1"}]},
}


def write(folder: Path, text: str, name: str = "routes.yaml") -> Path:
    """Write a file of routes."""
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_every_source_gives_the_same_routes(tmp_path: Path) -> None:
    """YAML, JSON, objects and dicts mean the same."""
    expected = Routes.read(IN_PYTHON)
    dumped = json.dumps(expected.model_dump(mode="json"), indent="\t")
    assert Routes.read(write(tmp_path, WHOLE)) == expected
    assert Routes.read(str(write(tmp_path, dumped, "routes.json"))) == expected
    assert Routes.read(expected) is expected
    labels = [each.label for each in expected.routes["fast"].deployments]
    assert labels == ["openai/gpt-4.1-nano@team-a", "ours"]


def test_the_state_of_a_deployment_is_shared_by_routes() -> None:
    """What is called makes the id; names, weights and limits do not."""
    one = Deployment(model="openai/a", api_key_id="k", rpm=5, name="x")
    assert one.id == Deployment(model="openai/a", api_key_id="k").id
    for other in (
        Deployment(model="openai/b", api_key_id="k"),
        Deployment(model="openai/a", api_key_id="l"),
        Deployment(model="openai/a", api_key_id="k", base_url="http://127.0.0.1/v1"),
        Deployment(model="openai/a", api_key_id="k", service="groq"),
    ):
        assert one.id != other.id


BROKEN = {
    "a misspelt field": (
        "routes:\n  fast:\n    deployments:\n      - model: a\n        weights: 2\n",
        r"yaml:5: routes\.fast\.deployments\.0\.weights is not a known .* mean 'weight'",
    ),
    "a misspelt field of a route": (
        "routes:\n  fast:\n    stratgy: cost\n    deployments: [{model: a}]\n",
        "yaml:3: .*did you mean 'strategy'",
    ),
    "an unknown strategy": (
        "routes:\n  fast:\n    deployments: [{model: a}]\n    strategy: best\n",
        "yaml:4: .*strategy='best' cannot be used: it must be 'shuffle', 'cost'",
    ),
    "a weight of 0": (
        "routes:\n  fast:\n    deployments:\n      - {model: a, weight: 0}\n",
        "yaml:4: .*weight=0 cannot be used: it must be greater than 0",
    ),
    "a weight whose sum is infinite": (
        "routes:\n  fast:\n    deployments:\n      - {model: a, weight: 1.0e+308}\n",
        "yaml:4: .*weight=1e.308 cannot be used: it must be less than or equal to 1000000",
    ),
    "a weight that is no number": (
        "routes:\n  fast:\n    deployments:\n      - {model: a, weight: .nan}\n",
        "yaml:4: .*weight=nan cannot be used: it must be a finite number",
    ),
    "one deployment under two names": (
        "routes:\n  fast:\n    deployments: [{model: a}, {model: a, name: b}]\n",
        "yaml:2: .*'a' and 'b' are the same model with the same key",
    ),
    "a limit that is a text": (
        "routes:\n  fast:\n    deployments:\n      - {model: a, rpm: '5'}\n",
        "yaml:4: .*rpm='5' cannot be used: it must be a valid integer",
    ),
    "a model that is missing": (
        "routes:\n  fast:\n    deployments:\n      - {rpm: 5}\n",
        r"yaml:4: routes\.fast\.deployments\.0\.model is missing",
    ),
    "no deployment": (
        "routes:\n  fast:\n    deployments: []\n",
        "yaml:3: .*at least 1",
    ),
    "an unknown fallback": (
        "routes:\n  fast: {fallbacks: [smrt], deployments: &d [{model: a}]}\n  smart: {deployments: *d}\n",
        "yaml:2: .*'smrt' is not another route; did you mean 'smart'",
    ),
    "a route that falls back to itself": (
        "routes:\n  fast:\n    deployments: [{model: a}]\n    fallbacks: [fast]\n",
        "yaml:4: .*'fast' is not another route",
    ),
    "two deployments of one name": (
        "routes:\n  fast:\n    deployments: [{model: a}, {model: a}]\n",
        "yaml:2: .*two deployments are called 'a'",
    ),
    "a route twice": (
        "routes:\n  fast:\n    deployments: [{model: a}]\n  fast:\n    deployments: []\n",
        "yaml:4: the key 'fast' is there twice",
    ),
    "broken YAML": ("routes:\n  fast: [\n", "yaml:3: "),
    "no routes": ("fast:\n  deployments: [{model: a}]\n", "yaml:1: routes is missing"),
    "a list": ("- fast\n", "yaml:1: the top level must be a mapping"),
    "nothing": ("", "yaml:1: the top level must be a mapping"),
    "a document within itself": ("a: &a [*a]\n", "yaml: it is nested too deeply"),
    "an object of Python": (
        "routes: !!python/object/apply:os.system ['true']\n",
        "yaml:1: could not determine a constructor",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_error_names_the_line(tmp_path: Path, kind: str) -> None:
    """File, line, field, and what to write instead."""
    text, expected = BROKEN[kind]
    with pytest.raises(SettingsError, match=expected):
        Routes.read(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"routes":\n {"fast": {"deployments":\n [{"model": 5}]}}}',
            "json:3: .*model=5",
        ),
        ('{"routes": {\n\t"fast": {"deployments": [{"model": "a"},]}}}', "json:2: "),
        (
            '{"routes": {\n\t"fast": {\n\t\t"deployments": []}}}',
            "json:3: .*deployments",
        ),
    ],
)
def test_json_has_lines_too(tmp_path: Path, text: str, expected: str) -> None:
    """Also where it is indented by tabs, which YAML does not allow."""
    with pytest.raises(SettingsError, match=expected):
        Routes.read(write(tmp_path, text, "routes.json"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing, binary or huge file is a SettingsError that names it."""
    with pytest.raises(SettingsError, match=r"none\.yaml cannot be read: No such file"):
        Routes.read(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match="it is not UTF-8"):
        Routes.read(binary)
    huge = tmp_path / "huge.yaml"
    huge.write_text("#" * (1024 * 1024 + 1))
    with pytest.raises(SettingsError, match="larger than 1 MiB"):
        Routes.read(huge)


def test_aliases_of_aliases_end(tmp_path: Path) -> None:
    """A small file that stands for 10^12 values is refused soon."""
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 12):
        inner = ", ".join([f"*a{number - 1}"] * 10)
        layers.append(f"a{number}: &a{number} [{inner}]")
    begun = time.process_time()
    with pytest.raises(SettingsError, match="routes is missing"):
        Routes.read(write(tmp_path, "\n".join(layers)))
    assert time.process_time() - begun < 20


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    """A base URL with a password is refused, and the password stays unsaid."""
    text = "routes: {fast: {deployments: [{model: a, base_url: 'http://u:geheim@h'}]}}"
    with pytest.raises(SettingsError) as caught:
        Routes.read(write(tmp_path, text))
    assert "geheim" not in str(caught.value)


def test_the_environment_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DIPEO_LLM_ROUTES is read with the settings; an argument wins."""
    monkeypatch.setenv("DIPEO_LLM_ROUTES", str(write(tmp_path, WHOLE)))
    service = LLMInfraService(StaticAPIKeys({}))
    assert set(service.routes()) == {"fast", "smart"}
    own: dict[str, Any] = {"mine": Route(deployments=(Deployment(model="gpt-5"),))}
    assert set(LLMInfraService(StaticAPIKeys({}), routes=own).routes()) == {"mine"}
    monkeypatch.setenv("DIPEO_LLM_ROUTES", str(tmp_path / "none.yaml"))
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        LLMInfraService(StaticAPIKeys({}))


def test_a_state_url_is_checked_and_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """DIPEO_LLM_STATE_URL may hold a password."""
    monkeypatch.setenv("DIPEO_LLM_STATE_URL", "redis://u:geheim@h:notaport/0")
    with pytest.raises(SettingsError, match="DIPEO_LLM_STATE_URL") as caught:
        Settings.from_env()
    assert "geheim" not in str(caught.value)
    assert "geheim" not in repr(Settings(state_url="redis://u:geheim@h/0"))
