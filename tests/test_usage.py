"""Token counts and rate limits of every provider, under one set of names."""

import json
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from pydantic import create_model

from dipeo_llm import LLMInfraService, RateLimits, Settings, StaticAPIKeys, TokenUsage
from dipeo_llm.adapters.usage import rate_limits, token_usage

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "recordings"

# A provider's record, and the counts that are read from it.
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
    # Anthropic's input_tokens leave out cached tokens.
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
    # candidatesTokenCount leaves out thoughts.
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
    # Of google-genai and of Vertex's SDK.
    "google, in Python": (
        {
            "prompt_token_count": 100,
            "candidates_token_count": 20,
            "thoughts_token_count": 10,
            "cached_content_token_count": 40,
            "tool_use_prompt_token_count": None,
            "total_token_count": 130,
        },
        TokenUsage(input=100, output=30, cached=40, total=130, reasoning=10),
    ),
    "google, in Python, with a tool's pages": (
        {
            "prompt_token_count": 9,
            "tool_use_prompt_token_count": 50,
            "candidates_token_count": 1,
        },
        TokenUsage(input=59, output=1, total=60),
    ),
    "google, in Python, bare": (
        {
            "prompt_token_count": 9,
            "candidates_token_count": 2,
            "total_token_count": 11,
            "cached_content_token_count": None,
        },
        TokenUsage(input=9, output=2, total=11),
    ),
    "bedrock, bare": (
        {"inputTokens": 9, "outputTokens": 2, "totalTokens": 11},
        TokenUsage(input=9, output=2, total=11),
    ),
    # Converse's inputTokens leave out cached tokens, as Anthropic's do.
    "bedrock": (
        {
            "inputTokens": 40,
            "outputTokens": 30,
            "totalTokens": 130,
            "cacheReadInputTokens": 40,
            "cacheWriteInputTokens": 20,
        },
        TokenUsage(input=100, output=30, cached=40, total=130, cache_written=20),
    ),
    # xAI's total includes thoughts, its completion_tokens does not.
    "xai": (
        {
            "prompt_tokens": 32,
            "completion_tokens": 9,
            "total_tokens": 135,
            "prompt_tokens_details": {"text_tokens": 32, "cached_tokens": 6},
            "completion_tokens_details": {"reasoning_tokens": 94},
        },
        TokenUsage(input=32, output=103, cached=6, total=135, reasoning=94),
    ),
    # A total that exceeds both for another reason says nothing about thoughts.
    "a total of its own": (
        {
            "prompt_tokens": 32,
            "completion_tokens": 100,
            "total_tokens": 150,
            "completion_tokens_details": {"reasoning_tokens": 94},
        },
        TokenUsage(input=32, output=100, total=132, reasoning=94),
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


def _as_properties(value: Any) -> Any:
    """Make an object whose `__dict__` is empty, as a protocol buffer's is."""
    if not isinstance(value, dict):
        return value
    read = {
        name: property(lambda _, item=item: _as_properties(item))  # type: ignore[misc]
        for name, item in value.items()
    }
    return type("Record", (), read)()


def _as_model(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    fields: dict[str, Any] = dict.fromkeys(value, (Any, ...))
    record = create_model("Record", **fields)
    return record(**{name: _as_model(item) for name, item in value.items()})


FORMS = [dict, MappingProxyType, _as_object, _as_properties, _as_model]


@pytest.mark.parametrize("kind", USAGES)
@pytest.mark.parametrize("form", FORMS)
def test_any_providers_usage(kind: str, form: Any) -> None:
    """A mapping and an SDK's object give the same counts."""
    record, usage = USAGES[kind]

    assert token_usage(form(record)) == usage


def test_usage_that_is_usage_already() -> None:
    """A TokenUsage is returned unchanged."""
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
    """A record without a count is None, not zero."""
    assert token_usage(record) is None


@pytest.mark.parametrize(
    "record",
    [
        {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 100}},
        {"promptTokenCount": 10, "cachedContentTokenCount": 100},
        {"prompt_tokens": 10, "cache_creation_input_tokens": 100},
        {"completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 5}},
        {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": -1},
        {"prompt_tokens": 10, "completion_tokens": -1, "total_tokens": 9},
    ],
)
def test_no_part_is_larger_than_the_whole(record: dict[str, Any]) -> None:
    """Whatever a server tells; nor is a number negative."""
    usage = token_usage(record)

    assert usage is not None
    assert usage.cached + usage.cache_written <= usage.input
    assert usage.reasoning <= usage.output
    assert usage.total == usage.input + usage.output
    assert min(vars(usage).values()) >= 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_an_invalid_number(number: float) -> None:
    """Python's JSON parser accepts NaN and Infinity; they are ignored."""
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
        ("google", "google, in Python"),
        ("bedrock", "bedrock"),
        ("ollama", "ollama"),
        ("unheard-of", "openai"),
    ],
)
def test_get_token_counts(client_name: str, kind: str) -> None:
    """The client's name does not matter."""
    service = LLMInfraService(StaticAPIKeys({}), settings=Settings())
    record, usage = USAGES[kind]

    assert service.get_token_counts(client_name, record) == usage
    assert service.get_token_counts(client_name, _as_object(record)) == usage
    assert service.get_token_counts(client_name, None) == TokenUsage()


def _answers() -> list[tuple[str, dict[str, Any], int]]:
    """Return the recorded usages that have the provider's own total."""
    found = []
    for path in sorted(RECORDINGS.glob("*/*.json")):
        if path.name.startswith("cachedContents"):
            continue  # the size of a cache, not a call's usage
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
    """Input and output add up to the provider's own total."""
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
    """An unreadable header counts as absent."""
    assert rate_limits(headers) == limits
