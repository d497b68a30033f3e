"""Tokens and limits, counted alike for every provider."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dipeo_llm import LLMInfraService, RateLimits, Settings, StaticAPIKeys, TokenUsage
from dipeo_llm.usage import rate_limits, token_usage

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "recordings"

# As each provider writes it, and as it is counted here.
USAGES: dict[str, tuple[dict[str, Any], TokenUsage]] = {
    "openai": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 30,
            "total_tokens": 130,
            "prompt_tokens_details": {"cached_tokens": 40, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 10},
        },
        TokenUsage(input=100, output=30, cached=40, total=130, reasoning=10),
    ),
    "openai, bare": (
        {"prompt_tokens": 9, "completion_tokens": 1},
        TokenUsage(input=9, output=1, total=10),
    ),
    "openai, details null": (
        {
            "prompt_tokens": 9,
            "completion_tokens": 1,
            "prompt_tokens_details": None,
            "completion_tokens_details": {"reasoning_tokens": None},
        },
        TokenUsage(input=9, output=1, total=10),
    ),
    "responses": (
        {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 40},
            "output_tokens": 30,
            "output_tokens_details": {"reasoning_tokens": 10},
            "total_tokens": 130,
        },
        TokenUsage(input=100, output=30, cached=40, total=130, reasoning=10),
    ),
    # Anthropic's input_tokens are those that no cache knows.
    "anthropic": (
        {
            "input_tokens": 40,
            "cache_creation_input_tokens": 20,
            "cache_read_input_tokens": 40,
            "output_tokens": 30,
        },
        TokenUsage(input=100, output=30, cached=40, total=130, cache_written=20),
    ),
    "anthropic, bare": (
        {"input_tokens": 9, "output_tokens": 1},
        TokenUsage(input=9, output=1, total=10),
    ),
    # Google's candidates hold no thoughts.
    "google": (
        {
            "promptTokenCount": 100,
            "candidatesTokenCount": 20,
            "thoughtsTokenCount": 10,
            "cachedContentTokenCount": 40,
            "totalTokenCount": 130,
        },
        TokenUsage(input=100, output=30, cached=40, total=130, reasoning=10),
    ),
    "google, only thoughts": (
        {"promptTokenCount": 9, "thoughtsTokenCount": 5, "totalTokenCount": 14},
        TokenUsage(input=9, output=5, total=14, reasoning=5),
    ),
    "google, blocked": (
        {"promptTokenCount": 9, "totalTokenCount": 9},
        TokenUsage(input=9, total=9),
    ),
    "google, with a tool's pages": (
        {
            "promptTokenCount": 9,
            "toolUsePromptTokenCount": 50,
            "candidatesTokenCount": 1,
        },
        TokenUsage(input=59, output=1, total=60),
    ),
    "ollama": (
        {"model": "m", "done": True, "prompt_eval_count": 100, "eval_count": 30},
        TokenUsage(input=100, output=30, total=130),
    ),
    "ollama, prompt from its cache": (
        {"model": "m", "done": True, "eval_count": 30},
        TokenUsage(output=30, total=30),
    ),
    "deepseek": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 30,
            "prompt_cache_hit_tokens": 40,
            "prompt_cache_miss_tokens": 60,
        },
        TokenUsage(input=100, output=30, cached=40, total=130),
    ),
    "the application's own": (
        {"input": 100, "output": 30, "cached": 40, "total": 130},
        TokenUsage(input=100, output=30, cached=40, total=130),
    ),
    "nothing was counted, and said so": (
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        TokenUsage(),
    ),
}


def _as_object(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{name: _as_object(item) for name, item in value.items()})


@pytest.mark.parametrize("kind", USAGES)
@pytest.mark.parametrize("form", [dict, _as_object])
def test_any_providers_usage(kind: str, form: Any) -> None:
    """The same numbers come of a mapping and of an SDK's object."""
    record, usage = USAGES[kind]

    assert token_usage(form(record)) == usage


def test_usage_that_is_usage_already() -> None:
    """Our own is returned as it is."""
    usage = TokenUsage(input=3, total=3)

    assert token_usage(usage) is usage


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        "",
        5,
        [],
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": "many"},
        {"usage": None, "output": [{"type": "message"}], "input": "Hello"},
        {"prompt_tokens": {}},
        {"prompt_tokens": True},
    ],
)
def test_no_number_is_no_usage(record: Any) -> None:
    """Where nothing is counted, None says so, and not a zero."""
    assert token_usage(record) is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none(number: float) -> None:
    """JSON as Python reads it may hold such a number; a good answer survives it."""
    usage = token_usage({"prompt_tokens": number, "completion_tokens": 5})

    assert usage == TokenUsage(output=5, total=5)


@pytest.mark.parametrize(
    ("client_name", "kind"),
    [
        ("openai", "openai"),
        ("openai", "responses"),
        ("claude", "anthropic"),
        ("anthropic", "anthropic"),
        ("google", "google"),
        ("gemini", "google"),
        ("ollama", "ollama"),
        ("unheard-of", "openai"),
    ],
)
def test_get_token_counts(client_name: str, kind: str) -> None:
    """The service reads a usage whatever the client is called."""
    service = LLMInfraService(StaticAPIKeys({}), settings=Settings())
    record, usage = USAGES[kind]

    assert service.get_token_counts(client_name, record) == usage
    assert service.get_token_counts(client_name, _as_object(record)) == usage
    assert service.get_token_counts(client_name, None) == TokenUsage()


def _answers() -> list[tuple[str, dict[str, Any], int]]:
    """Return the recorded usages that come with a total of the provider's own."""
    found = []
    for path in sorted(RECORDINGS.glob("*/*.json")):
        if path.name.startswith("cachedContents"):
            continue  # it counts what it keeps, not what a call took
        response = json.loads(path.read_text("utf-8"))["response"]
        try:
            body = json.loads(response["body"])
        except ValueError:
            continue
        if not isinstance(body, dict):
            continue
        usage = body.get("usage") or body.get("usageMetadata")
        if not isinstance(usage, dict):
            continue
        total = usage.get("total_tokens") or usage.get("totalTokenCount")
        if isinstance(total, int):
            found.append((f"{path.parent.name}/{path.stem}", usage, total))
    return found


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not here")
def test_totals_of_real_answers() -> None:
    """What is counted here adds up to the provider's own total."""
    answers = _answers()

    counted = [(name, token_usage(usage), total) for name, usage, total in answers]
    off = [
        (name, usage, total)
        for name, usage, total in counted
        if usage is None or usage.total != total
    ]

    assert len(answers) > 50
    assert off == []


@pytest.mark.parametrize(
    ("headers", "limits"),
    [
        ({}, None),
        ({"content-type": "application/json"}, None),
        (
            {
                "x-ratelimit-limit-requests": "60",
                "x-ratelimit-remaining-requests": "59",
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-tokens": "149984",
                "x-ratelimit-reset-tokens": "6m0s",
            },
            RateLimits(
                requests_left=59,
                requests_reset=1.0,
                tokens_left=149984,
                tokens_reset=360.0,
            ),
        ),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2020-01-01T00:00:00Z",
                "anthropic-ratelimit-tokens-remaining": "39000",
            },
            RateLimits(requests_left=0, requests_reset=0.0, tokens_left=39000),
        ),
        ({"x-ratelimit-remaining-requests": "many"}, None),
        ({"x-ratelimit-remaining-requests": "-1"}, None),
        ({"x-ratelimit-remaining-requests": "1.5"}, None),
        ({"x-ratelimit-remaining-requests": "\u00b2"}, None),
        ({"x-ratelimit-remaining-requests": "9" * 10_000}, None),
        ({"x-ratelimit-reset-requests": "soon"}, None),
    ],
)
def test_rate_limits(headers: dict[str, str], limits: RateLimits | None) -> None:
    """Numbers that can be read are, a header that cannot is as none at all."""
    assert rate_limits(headers) == limits
