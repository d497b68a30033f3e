"""Reads what a provider counts: tokens of a call, and what is left of its limits.

Pure. Every provider's own words for the same numbers are listed here and nowhere else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from dipeo_llm.domain import RateLimits, TokenUsage
from dipeo_llm.failures import seconds_until


def token_usage(usage: Any) -> TokenUsage | None:
    """Read any provider's usage record, as an object or a mapping.

    Tokens from a cache count as input: OpenAI and Google say so already, Anthropic
    counts them apart
    (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching, 2026-11-23).
    Thoughts count as output: Google counts them apart, and its OpenAI-compatible
    endpoint in the total only.

    Returns:
        None where *usage* holds no number of tokens.
    """
    if isinstance(usage, TokenUsage):
        return usage
    counts = _counts(usage)
    read = _first(counts, _INPUT)
    output = _first(counts, _OUTPUT)
    if read is None and output is None:
        return None
    read, output = read or 0, output or 0
    cached = _first(counts, _CACHED) or 0
    written = counts.get("cache_creation_input_tokens", 0)
    reasoning = _first(counts, _REASONING) or 0
    if "promptTokenCount" in counts:
        read += counts.get("toolUsePromptTokenCount", 0)
        output += reasoning
    elif "prompt_tokens" in counts:
        untold = counts.get("total_tokens", 0) - read - output
        if untold > 0 and not reasoning:
            reasoning = untold
            output += untold
    elif (
        "input_tokens" in counts and "input_tokens_details.cached_tokens" not in counts
    ):
        read += counts.get("cache_read_input_tokens", 0) + written
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
    "output_tokens_details.thinking_tokens",
    "thoughtsTokenCount",
    "reasoning",
)


_MOST = 2**63


def _counts(usage: Any) -> dict[str, int]:
    """Return the numbers of a record, those of its details as "details.number"."""
    counts: dict[str, int] = {}
    for name, value in _items(usage):
        if isinstance(value, int | float):
            # False for NaN and infinity too.
            if not isinstance(value, bool) and abs(value) < _MOST:
                counts[name] = int(value)
        elif name.endswith("_details") and value is not None:
            counts.update((f"{name}.{k}", v) for k, v in _counts(value).items())
    return counts


def _items(record: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(record, Mapping):
        return record.items()
    if isinstance(record, BaseModel):
        return record.model_dump().items()
    return getattr(record, "__dict__", {}).items()


def _first(counts: Mapping[str, int], names: Sequence[str]) -> int | None:
    return next((counts[name] for name in names if name in counts), None)


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """Read what the provider says is left; None where it says nothing.

    OpenAI sends `x-ratelimit-remaining-*` with resets such as "1m2.5s"
    (https://platform.openai.com/docs/guides/rate-limits), Anthropic
    `anthropic-ratelimit-*` with resets as times
    (https://docs.anthropic.com/en/api/rate-limits), both read 2026-11-23.
    """
    told = {
        "requests_left": _whole(headers, "requests-remaining", "remaining-requests"),
        "requests_reset": _reset(headers, "requests-reset", "reset-requests"),
        "tokens_left": _whole(headers, "tokens-remaining", "remaining-tokens"),
        "tokens_reset": _reset(headers, "tokens-reset", "reset-tokens"),
    }
    if all(value is None for value in told.values()):
        return None
    return RateLimits.model_validate(told)


def _limit_header(
    headers: Mapping[str, str], anthropic: str, openai: str
) -> str | None:
    return headers.get(f"anthropic-ratelimit-{anthropic}") or headers.get(
        f"x-ratelimit-{openai}"
    )


def _whole(headers: Mapping[str, str], anthropic: str, openai: str) -> int | None:
    text = _limit_header(headers, anthropic, openai)
    return int(text) if text and text.isdecimal() and len(text) < 19 else None


def _reset(headers: Mapping[str, str], anthropic: str, openai: str) -> float | None:
    text = _limit_header(headers, anthropic, openai)
    return seconds_until(text) if text else None
