"""Reads the tokens that a provider counts, and what is left of its rate limits.

Pure. The names that providers give to the same numbers are listed here only, because
compatible servers mix them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dipeo_llm.adapters.failures import seconds_until
from dipeo_llm.domain import RateLimits, TokenUsage


def token_usage(usage: Any) -> TokenUsage | None:
    """Return the tokens of any provider's usage record, None if it counts none.

    Cached tokens count as input. OpenAI and Google include them; Anthropic
    (https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching, 2026-11-23)
    and Bedrock's Converse count them separately. Reasoning counts as output. Google
    counts it separately, Google's OpenAI-compatible endpoint only in the total, and xAI
    separately and in the total
    (https://docs.x.ai/docs/key-information/consumption-and-rate-limits, 2026-11-25).

    Args:
        usage: A mapping, a model of an SDK, or any object with such attributes.
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
        rest = counts.get("total_tokens", 0) - read - output
        if rest > 0 and (not reasoning or rest == reasoning):
            reasoning = rest
            output += rest
    elif (
        "input_tokens" in counts and "input_tokens_details.cached_tokens" not in counts
    ):
        read += counts.get("cache_read_input_tokens", 0) + written
    # Some servers tell a part that is larger than the whole.
    cached = min(cached, read)
    return TokenUsage(
        input=read,
        output=output,
        cached=cached,
        total=read + output,
        cache_written=min(written, read - cached),
        reasoning=min(reasoning, output),
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


_OTHERS = (
    "total_tokens",
    "cache_creation_input_tokens",
    "toolUsePromptTokenCount",
)

# Names that differ only in spelling, in the Python SDKs for Gemini and in Bedrock's
# Converse
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
_NAMES = frozenset(
    part
    for name in (*_SAME, *_INPUT, *_OUTPUT, *_CACHED, *_REASONING, *_OTHERS)
    for part in name.split(".")
)
_MOST = 2**63


def _counts(usage: Any) -> dict[str, int]:
    """Return the numbers of a record; those of its details as "details.number"."""
    counts: dict[str, int] = {}
    for name, value in _fields(usage).items():
        if (number := _number(value)) is not None:
            counts[_SAME.get(name, name)] = number
        elif not isinstance(value, _LEAVES):
            for inner, detail in _fields(value).items():
                if (number := _number(detail)) is not None:
                    counts[f"{name}.{inner}"] = number
    return counts


_LEAVES = (int, float, str, list, type(None))


def _fields(record: Any) -> Mapping[str, Any]:
    """Return the fields of a mapping, of an SDK's model, or of any other object."""
    # Check dict first: isinstance(x, Mapping) is slow.
    if isinstance(record, (dict, Mapping)):
        return record
    if callable(dump := getattr(record, "model_dump", None)):
        fields: Mapping[str, Any] = dump()
        return fields
    # A protocol buffer, such as those of Vertex's SDK, cannot list its fields.
    return {name: getattr(record, name, None) for name in _NAMES}


def _number(value: Any) -> int | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # The comparison is False for NaN too.
    return int(value) if 0 <= value < _MOST else None


def _first(counts: Mapping[str, int], names: Sequence[str]) -> int | None:
    for name in names:
        if name in counts:
            return counts[name]
    return None


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """Return what is left of the provider's rate limits, None if it does not say.

    OpenAI sends `x-ratelimit-remaining-*` with resets such as "1m2.5s"
    (https://platform.openai.com/docs/guides/rate-limits), Anthropic
    `anthropic-ratelimit-*` with resets as times
    (https://docs.anthropic.com/en/api/rate-limits), both read 2026-11-23.
    """
    if "ratelimit" not in " ".join(headers).lower():
        return None
    limits = {
        "requests_left": _integer(headers, "requests-remaining", "remaining-requests"),
        "requests_reset": _reset(headers, "requests-reset", "reset-requests"),
        "tokens_left": _integer(headers, "tokens-remaining", "remaining-tokens"),
        "tokens_reset": _reset(headers, "tokens-reset", "reset-tokens"),
    }
    if all(value is None for value in limits.values()):
        return None
    return RateLimits.model_validate(limits)


def _limit_header(
    headers: Mapping[str, str], anthropic: str, openai: str
) -> str | None:
    return headers.get(f"anthropic-ratelimit-{anthropic}") or headers.get(
        f"x-ratelimit-{openai}"
    )


def _integer(headers: Mapping[str, str], anthropic: str, openai: str) -> int | None:
    text = _limit_header(headers, anthropic, openai)
    return int(text) if text and text.isdecimal() and len(text) < 19 else None


def _reset(headers: Mapping[str, str], anthropic: str, openai: str) -> float | None:
    text = _limit_header(headers, anthropic, openai)
    return seconds_until(text) if text else None
