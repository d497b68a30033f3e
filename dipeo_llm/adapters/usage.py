"""Reads what a provider counts: tokens of a call, and what is left of its limits.

Pure. Every provider's own words for the same numbers are listed here and nowhere else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dipeo_llm.adapters.failures import seconds_until
from dipeo_llm.domain import RateLimits, TokenUsage


def token_usage(usage: Any) -> TokenUsage | None:
    """Read any provider's usage record, as an object or a mapping.

    Tokens from a cache count as input: OpenAI and Google say so already, Anthropic
    counts them apart
    (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching, 2026-11-23),
    and so does Bedrock's Converse. Thoughts count as output: Google counts them apart,
    its OpenAI-compatible endpoint in the total only, and xAI in both
    (https://docs.x.ai/docs/key-information/consumption-and-rate-limits, 2026-11-25).

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
        if untold > 0 and (not reasoning or untold == reasoning):
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


# Other names of the same: of the Python SDKs for Gemini, and of Bedrock's Converse
# (https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_TokenUsage.html,
# 2026-11-25).
_SAME = {
    "prompt_token_count": "promptTokenCount",
    "candidates_token_count": "candidatesTokenCount",
    "cached_content_token_count": "cachedContentTokenCount",
    "thoughts_token_count": "thoughtsTokenCount",
    "tool_use_prompt_token_count": "toolUsePromptTokenCount",
    "inputTokens": "input_tokens",
    "outputTokens": "output_tokens",
    "cacheReadInputTokens": "cache_read_input_tokens",
    "cacheWriteInputTokens": "cache_creation_input_tokens",
}
_NAMES = (
    *(*_SAME, *_INPUT, *_OUTPUT, *_CACHED, *_REASONING),
    *("total_tokens", "cache_creation_input_tokens", "toolUsePromptTokenCount"),
)

# What `token_usage` counts in with the rest though it has a price of its own: sound in
# and out, pictures out, and what Anthropic's cache keeps for an hour, told by Anthropic
# and by LiteLLM.
_PRICED_APART = (
    "prompt_tokens_details.audio_tokens",
    "input_tokens_details.audio_tokens",
    "completion_tokens_details.audio_tokens",
    "completion_tokens_details.image_tokens",
    "output_tokens_details.audio_tokens",
    "output_tokens_details.image_tokens",
    "cache_creation.ephemeral_1h_input_tokens",
    "prompt_tokens_details.cache_creation_token_details.ephemeral_1h_input_tokens",
)
# The same in lists: what a row's kind is called, which kinds it is, and its number.
_ROWS_PRICED_APART = (
    ("promptTokensDetails", "modality", {"AUDIO"}, "tokenCount"),
    ("prompt_tokens_details", "modality", {"AUDIO"}, "token_count"),
    ("candidatesTokensDetails", "modality", {"AUDIO", "IMAGE"}, "tokenCount"),
    ("candidates_tokens_details", "modality", {"AUDIO", "IMAGE"}, "token_count"),
    ("cacheDetails", "ttl", {"1h"}, "inputTokens"),
)


def priced_apart(usage: Any) -> bool:
    """Say whether a record counts tokens whose own price `token_usage` cannot tell."""
    counts = _counts(usage)
    if any(counts.get(name) for name in _PRICED_APART):
        return True
    return any(
        _count(row, number)
        for name, kind, kinds, number in _ROWS_PRICED_APART
        if isinstance(found := _value(usage, name), Sequence)
        for row in found
        # An SDK has an enum in place of a text.
        if str(getattr(said := _value(row, kind), "name", said)) in kinds
    )


_MOST = 2**63


def _counts(usage: Any) -> dict[str, int]:
    """Return the numbers of a record, those of its details as "details.number"."""
    if isinstance(usage, dict):  # JSON, which is what a call has: in one pass
        found: Iterable[tuple[str, Any]] = _flat(usage, "")
    else:
        names = (*_NAMES, *_PRICED_APART)
        found = ((name, _value(usage, name)) for name in names)
    counts = ((_SAME.get(name, name), _number(value)) for name, value in found)
    return {name: count for name, count in counts if count is not None}


def _flat(record: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            if prefix.count(".") < 2:
                yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _count(record: Any, name: str) -> int | None:
    """Return a number of a record, one of its details by "details.number"."""
    return _number(_value(record, name))


def _number(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # False for NaN and infinity too.
    return int(value) if abs(value) < _MOST else None


# What a record mostly is stands first: asking after Mapping takes its time.
_MAPPINGS = (dict, Mapping)


def _value(record: Any, name: str) -> Any:
    name, _, rest = name.partition(".")
    mapping = isinstance(record, _MAPPINGS)
    value = record.get(name) if mapping else getattr(record, name, None)
    return _value(value, rest) if rest and value is not None else value


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
