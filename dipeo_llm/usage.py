"""Reads what a provider counts: tokens of a call, and what is left of its limits.

Pure. Every provider's own words for the same numbers are listed here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dipeo_llm.domain import RateLimits, TokenUsage
from dipeo_llm.failures import seconds_until


def token_usage(usage: Any) -> TokenUsage | None:
    """Read any provider's usage record, as an object or a mapping.

    Tokens from a cache count as input: OpenAI and Google say so already, Anthropic
    counts them apart
    (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching, 2026-11-23).

    Returns:
        None where *usage* holds no number at all.
    """
    if isinstance(usage, TokenUsage):
        return usage
    get = _getter(usage)
    counts = [get(name) for name in (*_INPUT, *_OUTPUT, *_CACHED, "total_tokens")]
    if all(count is None for count in counts):
        return None
    cached = _first_number(get, _CACHED)
    written = _first_number(get, ("cache_creation_input_tokens",))
    reasoning = _first_number(get, _REASONING)
    read = _first_number(get, _INPUT)
    if get("input_tokens") is not None and get("input_tokens_details") is None:
        read += _first_number(get, ("cache_read_input_tokens",)) + written
    output = _first_number(get, _OUTPUT)
    if get("candidatesTokenCount") is not None or get("thoughtsTokenCount") is not None:
        output += _first_number(get, ("thoughtsTokenCount",))
        read += _first_number(get, ("toolUsePromptTokenCount",))
    return TokenUsage(
        input=read,
        output=output,
        cached=cached,
        total=read + output,
        cache_written=written,
        reasoning=reasoning,
    )


_INPUT = (
    "prompt_tokens",
    "input_tokens",
    "promptTokenCount",
    "prompt_eval_count",
    "input",
)
_OUTPUT = (
    "completion_tokens",
    "output_tokens",
    "candidatesTokenCount",
    "eval_count",
    "output",
)
_CACHED = (
    "prompt_tokens_details.cached_tokens",
    "input_tokens_details.cached_tokens",
    "cache_read_input_tokens",
    "cachedContentTokenCount",
    "prompt_cache_hit_tokens",
    "cached",
)
_REASONING = (
    "completion_tokens_details.reasoning_tokens",
    "output_tokens_details.reasoning_tokens",
    "thoughtsTokenCount",
    "reasoning",
)


def _getter(usage: Any) -> Any:
    def get(path: str) -> Any:
        value = usage
        for name in path.split("."):
            if value is None:
                return None
            if isinstance(value, Mapping):
                value = value.get(name)
            else:
                value = getattr(value, name, None)
        return value

    return get


def _first_number(get: Any, names: Sequence[str]) -> int:
    for name in names:
        value = get(name)
        if isinstance(value, int | float):
            return int(value)
    return 0


def usage_record(body: Mapping[str, Any]) -> Any:
    """Find the usage in an answer's JSON; Ollama's counts lie at the top."""
    return body.get("usage") or body.get("usageMetadata") or body


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """Read what the provider says is left; None where it says nothing.

    OpenAI sends `x-ratelimit-remaining-*` with resets such as "1m2.5s"
    (https://platform.openai.com/docs/guides/rate-limits), Anthropic
    `anthropic-ratelimit-*` with resets as times
    (https://docs.anthropic.com/en/api/rate-limits), both read 2026-11-23.
    """
    limits = RateLimits(
        requests_left=_whole(headers, "requests-remaining", "remaining-requests"),
        requests_reset=_reset(headers, "requests-reset", "reset-requests"),
        tokens_left=_whole(headers, "tokens-remaining", "remaining-tokens"),
        tokens_reset=_reset(headers, "tokens-reset", "reset-tokens"),
    )
    return limits if limits.model_fields_set and limits != RateLimits() else None


def _limit_header(
    headers: Mapping[str, str], anthropic: str, openai: str
) -> str | None:
    return headers.get(f"anthropic-ratelimit-{anthropic}") or headers.get(
        f"x-ratelimit-{openai}"
    )


def _whole(headers: Mapping[str, str], anthropic: str, openai: str) -> int | None:
    text = _limit_header(headers, anthropic, openai)
    return int(text) if text and text.isdecimal() else None


def _reset(headers: Mapping[str, str], anthropic: str, openai: str) -> float | None:
    text = _limit_header(headers, anthropic, openai)
    return seconds_until(text) if text else None
