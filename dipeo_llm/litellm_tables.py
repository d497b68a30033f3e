"""tmp"""

import asyncio
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dipeo_llm.adapters.usage import priced_apart
from dipeo_llm.domain import Capabilities, TokenUsage
from dipeo_llm.litellm_import import import_litellm, load_litellm

_log = logging.getLogger("dipeo_llm")


@lru_cache(maxsize=1024)
def infer_provider(model: str) -> str | None:
    """Ask LiteLLM whose a model name is; None where it cannot tell.

    Imports LiteLLM if nothing has yet.
    """
    prefix = model.partition("/")[0]
    if prefix in _SIGNS_IN:
        return prefix
    try:
        name = import_litellm().get_llm_provider(model=model)[1]
    except Exception:  # noqa: BLE001 - it raises six classes for "I do not know"
        return None
    return name or None


# Asked about these, LiteLLM starts to sign in on the device.
_SIGNS_IN = frozenset({"github_copilot", "chatgpt"})


def model_info(
    litellm: Any, litellm_name: str, model: str, name: str = ""
) -> Mapping[str, Any] | None:
    """Return the row of LiteLLM's table for a model; None where there is none.

    Read from the table itself: `litellm.get_model_info` posts to a local Ollama.
    """
    table = litellm.model_cost
    base = model.split(":")[1] if model.startswith("ft:") else model
    for row_name in (
        f"{litellm_name}/{model}",
        f"{name}/{model}",
        model,
        f"ft:{base}" if base != model else base,
    ):
        row = table.get(row_name)
        if (
            isinstance(row, dict)
            and row.get("litellm_provider") == litellm_name
            and row_name not in _registered
        ):
            return row
    return None


def supports(litellm_name: str, name: str, model: str, what: str) -> bool | None:
    """Look a capability up in LiteLLM's table; None where the model is not in it."""
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


def capabilities_of(
    service: str, litellm_name: str, model: str, *, priced: bool = True
) -> Capabilities:
    """Return what LiteLLM's table says of a model. Imports LiteLLM."""
    info = model_info(import_litellm(), litellm_name, model, service) or {}
    known: dict[str, Any] = {ours: info.get(its) for ours, its in _CAPABILITIES.items()}
    for ours, its in (
        ("input", "input_cost_per_token"),
        ("output", "output_cost_per_token"),
    ):
        price = info.get(its)
        if price is not None and priced:
            known[f"{ours}_usd_per_million"] = round(price * 1e6, 6)
    return Capabilities(service=service, model=model, **known)


async def count_tokens(
    model: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> int:
    """Count the tokens of a request with LiteLLM's tokenizer, in a thread.

    An estimate for most models: what it does not know it counts as OpenAI would.
    """
    litellm = await load_litellm()
    return int(
        await asyncio.to_thread(
            litellm.token_counter,
            model=model,
            messages=messages,
            tools=tools,
            # Else it fetches a picture, to see how large it is.
            use_default_image_token_count=True,
        )
    )


_registered: set[str] = set()


def know_model(litellm, model, rows):
    for row, facts in rows.items():
        name = f"{row}/{model}"
        if name not in litellm.model_cost:
            _registered.add(name)
            litellm.model_cost[name] = {"litellm_provider": row, **facts}


def cost(
    litellm: Any, provider: str, model: str, usage: TokenUsage | None, raw_usage: Any
) -> float | None:
    """Price tokens by LiteLLM's table, in USD; None where it has no price.

    Without the fees that a provider takes for a search or an image.
    """
    if usage is None or priced_apart(raw_usage):
        return None
    info = model_info(litellm, provider, model)
    if info is None or info.get("input_cost_per_token") is None:
        return None
    prices = _flat_prices(litellm, provider, model)
    if prices is not None:
        fresh = usage.input - usage.cached - usage.cache_written
        counts = (fresh, usage.cached, usage.cache_written, usage.output)
        return sum(count * price for count, price in zip(counts, prices, strict=True))
    try:
        for_input, for_output = litellm.cost_per_token(
            model=model,
            custom_llm_provider=provider,
            prompt_tokens=usage.input,
            completion_tokens=usage.output,
            cache_read_input_tokens=usage.cached,
            cache_creation_input_tokens=usage.cache_written,
        )
    except Exception:  # noqa: BLE001 - a price must not cost the answer
        _log.debug("no price for %s/%s", provider, model, exc_info=True)
        return None
    return float(for_input + for_output)


@lru_cache(maxsize=512)
def _flat_prices(
    litellm: Any, provider: str, model: str
) -> tuple[float, float, float, float] | None:
    """Return the USD for a token read, read from a cache, written to it, and answered.

    None where the price depends on more than that, such as on the length: LiteLLM's own
    calculation, which takes 65 µs, knows those rules.
    """
    info = model_info(litellm, provider, model) or {}
    read, said = info.get("input_cost_per_token"), info.get("output_cost_per_token")
    thought = info.get("output_cost_per_reasoning_token", said)
    tiers = any("_above_" in name and "_above_1hr" not in name for name in info)
    if read is None or said is None or thought != said or tiers:
        return None
    cached = info.get("cache_read_input_token_cost")
    written = info.get("cache_creation_input_token_cost")
    return (
        float(read),
        float(read if cached is None else cached),
        float(read if written is None else written),
        float(said),
    )
