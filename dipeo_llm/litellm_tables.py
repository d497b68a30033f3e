"""What LiteLLM's tables say about models: provider, abilities, tokens, prices.

Takes LiteLLM's own names of providers ("gemini", "ollama_chat"); knows no adapter.
"""

import asyncio
import logging
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from dipeo_llm.domain import Capabilities, TokenUsage
from dipeo_llm.litellm_import import import_litellm, load_litellm, loaded_litellm

_log = logging.getLogger("dipeo_llm")


@lru_cache(maxsize=1024)
def infer_provider(model: str) -> str | None:
    """Return LiteLLM's name of a model's provider, None if LiteLLM knows none.

    Imports LiteLLM if needed, which takes seconds.
    """
    prefix = model.partition("/")[0]
    if prefix in _SIGN_IN:
        return prefix
    try:
        return import_litellm().get_llm_provider(model=model)[1] or None
    except Exception:  # noqa: BLE001 - six classes of exception mean "unknown"
        return None


# Asking LiteLLM about a model of these providers starts a sign-in on the device.
_SIGN_IN = frozenset({"github_copilot", "chatgpt"})


def model_info(
    litellm: Any, litellm_name: str, model: str, name: str = ""
) -> Mapping[str, Any] | None:
    """Return a model's row of LiteLLM's table, or None.

    Reads the table itself, because `litellm.get_model_info` posts to a local Ollama.

    Args:
        litellm: The module.
        litellm_name: LiteLLM's name of the provider.
        model: The model, without a prefix.
        name: Our name of the provider, where it differs.
    """
    table = litellm.model_cost
    base = model.split(":")[1] if model.startswith("ft:") else model
    for key in (
        f"{litellm_name}/{model}",
        f"{name}/{model}",
        model,
        f"ft:{base}" if base != model else base,
    ):
        row = table.get(key)
        if (
            isinstance(row, dict)
            and row.get("litellm_provider") == litellm_name
            and key not in _registered
        ):
            return row
    return None


def known_model_info(litellm_name: str, model: str, name: str) -> Mapping[str, Any]:
    """Return a model's row, {} where there is none or nothing has imported LiteLLM."""
    litellm = loaded_litellm()
    found = model_info(litellm, litellm_name, model, name) if litellm else None
    return found or {}


def supports(litellm_name: str, name: str, model: str, what: str) -> bool | None:
    """Look up an ability in LiteLLM's table, None if the table does not say.

    Imports LiteLLM if needed, which takes seconds.
    """
    info = model_info(import_litellm(), litellm_name, model, name)
    value = info.get(what) if info else None
    return None if value is None else bool(value)


_CAPABILITIES = {
    "tools": "supports_function_calling",
    "parallel_tools": "supports_parallel_function_calling",
    "vision": "supports_vision",
    "pdf": "supports_pdf_input",
    "audio": "supports_audio_input",
    "structured_output": "supports_response_schema",
    "reasoning": "supports_reasoning",
    "prompt_caching": "supports_prompt_caching",
    "web_search": "supports_web_search",
    "context_window": "max_input_tokens",
    "max_output": "max_output_tokens",
}
_PRICES = {
    "input_usd_per_million": "input_cost_per_token",
    "output_usd_per_million": "output_cost_per_token",
}


def capabilities_of(
    service: str, litellm_name: str, model: str, *, priced: bool = True
) -> Capabilities:
    """Return what LiteLLM's table says about a model.

    Imports LiteLLM if needed, which takes seconds.

    Args:
        service: Our name of the provider.
        litellm_name: LiteLLM's name of it.
        model: The model, without a prefix.
        priced: Whether the provider charges for tokens.
    """
    info = model_info(import_litellm(), litellm_name, model, service) or {}
    known: dict[str, Any] = {ours: info.get(its) for ours, its in _CAPABILITIES.items()}
    for ours, its in _PRICES.items():
        if priced and info.get(its) is not None:
            known[ours] = round(info[its] * 1e6, 6)
    return Capabilities(service=service, model=model, **known)


async def count_tokens(
    model: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> int:
    """Estimate the tokens of a request with LiteLLM's tokenizer, in a thread.

    LiteLLM counts as OpenAI does for models whose tokenizer it lacks.
    """
    litellm = await load_litellm()
    return int(
        await asyncio.to_thread(
            litellm.token_counter,
            model=model,
            messages=messages,
            tools=tools,
            # Otherwise LiteLLM downloads each image to learn its size.
            use_default_image_token_count=True,
        )
    )


_registered: set[str] = set()


def know_model(litellm: Any, model: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a model to LiteLLM's table, unless the table has it.

    Args:
        litellm: The module.
        model: The model, without a prefix.
        rows: LiteLLM's name of a provider, and the row for its model.
    """
    # `litellm.register_model` would first ask localhost:11434 about the model.
    for litellm_name, row in rows.items():
        key = f"{litellm_name}/{model}"
        if key not in litellm.model_cost:
            _registered.add(key)
            litellm.model_cost[key] = {"litellm_provider": litellm_name, **row}


def cost(
    litellm: Any,
    litellm_name: str,
    model: str,
    usage: TokenUsage | None,
    raw_usage: Mapping[str, Any] | None = None,
) -> float | None:
    """Return the price of a call's tokens in USD, None if it is unknown.

    The fees that providers take for a web search are not included.

    Args:
        litellm: The module.
        litellm_name: LiteLLM's name of the provider.
        model: The model, without a prefix.
        usage: The tokens as `usage.token_usage` counts them.
        raw_usage: The provider's own record. It tells which tokens have a price of their
            own (audio, images, a cache of an hour), and the service tier.
    """
    if usage is None:
        return None
    raw_usage = raw_usage or {}
    if "cost_details" in raw_usage:
        return _reported_cost(raw_usage)
    try:
        prices = _flat_prices(litellm, litellm_name, model)
        if prices is not None and usage.input < prices.up_to and _is_plain(raw_usage):
            return (
                max(0, usage.input - usage.cached - usage.cache_written) * prices.input
                + usage.cached * prices.cached
                + usage.cache_written * prices.written
                + usage.output * prices.output
            )
        info = model_info(litellm, litellm_name, model)
        if info is None or info.get("input_cost_per_token") is None:
            return None
        counts = _litellm_usage(litellm, usage, raw_usage)
        if _lacks_price(info, counts):
            return None
        tier = raw_usage.get("service_tier")
        total = _litellm_cost(litellm, litellm_name, model, counts, tier)
    except Exception:  # noqa: BLE001 - a missing price must not fail the call
        _log.debug("no price for %s/%s", litellm_name, model, exc_info=True)
        return None
    return total if math.isfinite(total) else None


def _reported_cost(raw_usage: Mapping[str, Any]) -> float | None:
    """Return the price that OpenRouter reports in credits, which are dollars.

    LiteLLM 1.109 has no prices for OpenRouter. With the caller's own key at the provider
    the price is OpenRouter's fee only
    (https://openrouter.ai/docs/use-cases/usage-accounting, 2026-11-25).
    """
    reported = raw_usage.get("cost")
    if isinstance(reported, bool) or not isinstance(reported, int | float):
        return None
    is_whole = math.isfinite(reported) and not raw_usage.get("is_byok")
    return float(reported) if is_whole else None


def _litellm_cost(
    litellm: Any, litellm_name: str, model: str, counts: Any, tier: str | None = None
) -> float:
    for_input, for_output = litellm.cost_per_token(
        model=model,
        custom_llm_provider=litellm_name,
        usage_object=counts,
        service_tier=tier,
    )
    return float(for_input + for_output)


class _Prices(NamedTuple):
    """USD per token."""

    input: float
    cached: float
    written: float
    output: float
    up_to: float
    """The number of input tokens from which other prices apply."""


@lru_cache(maxsize=512)
def _flat_prices(litellm: Any, litellm_name: str, model: str) -> _Prices | None:
    """Return a model's prices, None if it has none, or they depend on anything else.

    LiteLLM calculates them once. Its calculation takes 100 µs, a third of a call.
    """
    info = model_info(litellm, litellm_name, model) or {}
    if info.get("input_cost_per_token") is None:
        return None
    if "tiered_pricing" in info or "off_peak_pricing" in info:
        return None

    def price(**counts: int) -> float:
        one = _litellm_usage(litellm, TokenUsage(**counts), {})
        return _litellm_cost(litellm, litellm_name, model, one)

    output = price(output=1)
    if price(output=1, reasoning=1) != output:
        return None
    tiers = (_TIER.search(name) for name in info)
    return _Prices(
        price(input=1),
        price(input=1, cached=1),
        price(input=1, cache_written=1),
        output,
        min((int(tier[1]) * 1000 for tier in tiers if tier), default=math.inf),
    )


_TIER = re.compile(r"_above_(\d+)k_tokens")
# LiteLLM prices all other details of a usage record.
_PLAIN_DETAILS = frozenset(
    {
        "cached_tokens",
        "text_tokens",
        "reasoning_tokens",
        "thinking_tokens",
        "accepted_prediction_tokens",
        "rejected_prediction_tokens",
        "ephemeral_5m_input_tokens",
    }
)
_RATES = frozenset({"service_tier", "inference_geo", "speed"})
_USUAL_RATES = frozenset({None, "standard", "default", "not_available", "global"})


def _is_plain(raw_usage: Mapping[str, Any]) -> bool:
    """Return whether the price depends on nothing but what `TokenUsage` counts."""
    for name, value in raw_usage.items():
        if isinstance(value, (dict, list)):
            if _has_own_price(value):
                return False
        elif name in _RATES and value not in _USUAL_RATES:
            return False
    return True


def _has_own_price(details: dict[str, Any] | list[Any]) -> bool:
    if isinstance(details, list):  # Gemini's modalities, Anthropic's iterations
        return any(
            row.get("modality") != "TEXT" for row in details if isinstance(row, dict)
        )
    return any(
        _has_own_price(value)
        if isinstance(value, (dict, list))
        else value and name.endswith("tokens") and name not in _PLAIN_DETAILS
        for name, value in details.items()
    )


def _litellm_usage(
    litellm: Any, usage: TokenUsage, raw_usage: Mapping[str, Any]
) -> Any:
    """Return a record of usage as LiteLLM's `Usage`."""
    if "promptTokenCount" in raw_usage:
        return litellm.VertexGeminiConfig._calculate_usage(  # noqa: SLF001
            {"usageMetadata": raw_usage}
        )
    if "input_tokens" in raw_usage and "input_tokens_details" not in raw_usage:
        # Anthropic's record; that of OpenAI's Responses endpoint has details.
        return litellm.AnthropicConfig().calculate_usage(raw_usage, None)
    input_details = raw_usage.get(
        "prompt_tokens_details", raw_usage.get("input_tokens_details")
    )
    output_details = raw_usage.get(
        "completion_tokens_details", raw_usage.get("output_tokens_details")
    )
    # The sums are ours: they count thoughts and caches alike for all providers.
    return litellm.Usage(
        prompt_tokens=usage.input,
        completion_tokens=usage.output,
        # The sum tells LiteLLM that the output of xAI includes the thoughts.
        total_tokens=usage.input + usage.output,
        prompt_tokens_details={
            **(input_details or {}),
            "cached_tokens": usage.cached,
            "cache_creation_tokens": usage.cache_written,
        },
        completion_tokens_details={
            **(output_details or {}),
            "reasoning_tokens": usage.reasoning,
        },
    )


def _lacks_price(info: Mapping[str, Any], counts: Any) -> bool:
    """Return whether LiteLLM would price audio or images in an answer as text."""
    details = counts.completion_tokens_details
    return any(
        getattr(details, f"{kind}_tokens", None)
        and info.get(f"output_cost_per_{kind}_token") is None
        for kind in ("audio", "image")
    )
