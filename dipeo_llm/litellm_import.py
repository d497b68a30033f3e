"""LiteLLM itself: its import, behind a fence, and the tables that it carries.

Imports LiteLLM in a thread, once, so that it touches no network, no .env file, no
stdout and no log handler. Knows nothing of requests and answers.
"""

import asyncio
import gc
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

from dipeo_llm.adapters.factory import Provider, by_name
from dipeo_llm.domain import Capabilities, TokenUsage

_log = logging.getLogger("dipeo_llm")
_lock = threading.Lock()
_lock_of_thread = threading.Lock()
_litellm: Any = None
_importing: Future[Any] | None = None

# In force while it is imported, then put back; None takes a variable away. Without the
# first three it fetches a price table over the network, reads a .env file from any
# folder above, and logs to stderr. The fourth keeps it from hanging a filter on the
# loggers of others, such as asyncio's and uvicorn's: the filter imports more of it at the
# next log line, on whichever thread writes one, in the middle of this import. The rest
# goes into HTTP clients that it makes for itself then, and that we never use: a bad value
# there would break the import.
_WHILE_IMPORTING: Mapping[str, str | None] = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_DISABLE_REDACT_SECRETS": "true",
    "REQUEST_TIMEOUT": None,
    "SSLKEYLOGFILE": None,
    **dict.fromkeys(
        [
            "SSL_CERTIFICATE",
            "SSL_VERIFY",
            "SSL_SECURITY_LEVEL",
            "SSL_ECDH_CURVE",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            *(f"{scheme}_PROXY" for scheme in ("ALL", "HTTP", "HTTPS")),
            *(f"{scheme}_proxy" for scheme in ("all", "http", "https")),
        ]
    ),
}
# Its own numbers, such as how many tokens Anthropic may answer: they would travel.
_ITS_PREFIXES = ("DEFAULT_", "LITELLM_")
# Read at each call: with the first, LiteLLM takes every provider for its proxy; with the
# second, it sends OpenAI's calls through a client of its own.
_REROUTES = ("USE_LITELLM_PROXY", "EXPERIMENTAL_OPENAI_BASE_LLM_HTTP_HANDLER")
# The first is read at the first Anthropic call that needs a beta header.
_FROM_NOW_ON: Mapping[str, str | None] = {
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    **dict.fromkeys(_REROUTES),
}


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


async def load_litellm() -> Any:
    """Return the litellm module, imported in a thread at the first call.

    One thread of its own, however many wait: it leaves the loop's other threads, which
    look names up, to the rest of the application.
    """
    global _importing  # noqa: PLW0603 - a module is imported once
    if _litellm is not None:
        return _litellm
    with _lock_of_thread:
        if _importing is None or (_importing.done() and _importing.exception()):
            _importing = Future()
            # So that a caller who is cancelled cancels nobody else's wait.
            _importing.set_running_or_notify_cancel()
            threading.Thread(
                target=_import_for, args=(_importing,), name="dipeo-llm-import"
            ).start()
    return await asyncio.wrap_future(_importing)


def _import_for(waiting: Future[Any]) -> None:
    try:
        waiting.set_result(import_litellm())
    except BaseException as exc:  # noqa: BLE001 - raised by everyone who waits for it
        waiting.set_exception(exc)


async def environment_is_whole() -> None:
    """Wait for an import that is under way, as it takes variables away meanwhile."""
    if _importing is not None and not _importing.done():
        await asyncio.wrap_future(_importing)


def import_litellm() -> Any:
    """Import LiteLLM behind the fence. Takes seconds the first time; thread-safe."""
    global _litellm  # noqa: PLW0603 - a module is imported once
    with _lock:
        if _litellm is not None:
            return _litellm
        its_own = [name for name in os.environ if name.startswith(_ITS_PREFIXES)]
        changed = {**dict.fromkeys(its_own), **_WHILE_IMPORTING, **_FROM_NOW_ON}
        before = {name: os.environ.get(name) for name in changed}
        httpx_level = logging.getLogger("httpx").level
        # What is garbage now would be kept for good by the freeze below.
        gc.collect()
        _set(changed)
        collects = gc.isenabled()
        # A third of the import is collections that find nothing; and each later one of
        # all generations would walk its million objects, for 0.2 s, on the event loop.
        gc.disable()
        try:
            import litellm
            import openai.resources  # noqa: F401 - else the first call does, on the loop

            gc.freeze()
        finally:
            if collects:
                gc.enable()
            _set(before)
            _set(_FROM_NOW_ON)
        logging.getLogger("httpx").setLevel(httpx_level)
        for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            # Else warnings reach stderr by logging's last resort.
            logger.addHandler(logging.NullHandler())
        # Now that it is whole, its filter may take keys out of log lines.
        litellm._logging._ENABLE_SECRET_REDACTION = True  # noqa: SLF001
        # It prints "Give Feedback / Get Help" to stdout on each error otherwise.
        litellm.suppress_debug_info = True
        # It breaks off a stream that says the same thing a hundred times.
        litellm.REPEATED_STREAMING_CHUNK_LIMIT = sys.maxsize
        # Its tokenizer counts names like llama-3 with one that it downloads from a hub.
        litellm.disable_hf_tokenizer_download = True
        _keep_off_localhost()
        _litellm = litellm
        return litellm


def _keep_off_localhost() -> None:
    """Stop LiteLLM's look-up of local models, a blocking post to localhost:11434.

    It is made on the event loop for every Ollama model that the table does not hold,
    the one that an answer names included.
    """
    from litellm.llms.ollama import common_utils

    def runtime_info(self: Any, model: str, *args: Any, **more: Any) -> dict[str, Any]:
        return {
            "key": model,
            "litellm_provider": "ollama",
            "mode": "chat",
            "input_cost_per_token": 0.0,
            "output_cost_per_token": 0.0,
            "max_tokens": None,
            "max_input_tokens": None,
            "max_output_tokens": None,
            "supports_function_calling": True,
        }

    for name in ("get_runtime_model_info", "get_model_info"):
        if hasattr(common_utils.OllamaModelInfo, name):
            setattr(common_utils.OllamaModelInfo, name, runtime_info)


def without_reroutes() -> None:
    """Take away for good what would lead every call elsewhere.

    LiteLLM reads it at each call, and calls overlap, so it cannot be put back after one.
    """
    for name in _REROUTES:
        os.environ.pop(name, None)


@lru_cache(maxsize=1024)
def infer_provider(model: str) -> Provider | None:
    """Ask LiteLLM whose a model name is; None where it cannot tell.

    Imports LiteLLM if nothing has yet.
    """
    prefix = model.partition("/")[0]
    if prefix in _SIGNS_IN:
        return by_name(prefix)
    try:
        name = import_litellm().get_llm_provider(model=model)[1]
    except Exception:  # noqa: BLE001 - it raises six classes for "I do not know"
        return None
    return by_name(name) if name else None


# Asked about these, LiteLLM starts to sign in on the device.
_SIGNS_IN = frozenset({"github_copilot", "chatgpt"})


def model_info(
    litellm: Any, provider: Provider, model: str
) -> Mapping[str, Any] | None:
    """Return the row of LiteLLM's table for a model; None where there is none.

    Read from the table itself: `litellm.get_model_info` posts to a local Ollama.
    """
    table = litellm.model_cost
    base = model.split(":")[1] if model.startswith("ft:") else model
    for name in (
        f"{provider.litellm}/{model}",
        f"{provider.name}/{model}",
        model,
        f"ft:{base}" if base != model else base,
    ):
        row = table.get(name)
        if (
            isinstance(row, dict)
            and row.get("litellm_provider") == provider.litellm
            and name not in _registered
        ):
            return row
    return None


def supports(provider: Provider, model: str, what: str) -> bool | None:
    """Look a capability up in LiteLLM's table; None where the model is not in it."""
    info = model_info(import_litellm(), provider, model)
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


def capabilities_of(provider: Provider, model: str) -> Capabilities:
    """Return what LiteLLM's table says of a model. Imports LiteLLM."""
    info = model_info(import_litellm(), provider, model) or {}
    known: dict[str, Any] = {ours: info.get(its) for ours, its in _CAPABILITIES.items()}
    for ours, its in (
        ("input", "input_cost_per_token"),
        ("output", "output_cost_per_token"),
    ):
        price = info.get(its)
        if price is not None and provider.format != "ollama":
            known[f"{ours}_usd_per_million"] = round(price * 1e6, 6)
    return Capabilities(service=provider.name, model=model, **known)


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


def know_model(litellm: Any, provider: Provider, model: str) -> None:
    """Tell LiteLLM about a model that its table leaves out.

    Of one of Google's it would say that it takes no system prompt, and make the prompt
    a part of the user's words. About a local one it would ask localhost:11434, on the
    event loop (seen in 1.105 to 1.109: two posts a call, wherever the call itself goes).
    """
    # Not by litellm.register_model, which looks the model up first: at localhost.
    for row, facts in _UNTOLD.get(provider.format or "", {}).items():
        name = f"{row}/{model}"
        if name not in litellm.model_cost and not _REFUSES_SYSTEM.match(name):
            _registered.add(name)
            litellm.model_cost[name] = {"litellm_provider": row, **facts}


_REFUSES_SYSTEM = re.compile("gemini/gemma-[1-3]")
_LOCAL = {
    "mode": "chat",
    "input_cost_per_token": 0.0,
    "output_cost_per_token": 0.0,
    "supports_function_calling": True,
}
# By format: what LiteLLM calls the provider, and what is true of all its models.
_UNTOLD: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "google": {"gemini": {"mode": "chat", "supports_system_messages": True}},
    "ollama": {"ollama_chat": _LOCAL, "ollama": _LOCAL},
}


def cost(
    litellm: Any, provider: Provider, model: str, usage: TokenUsage | None
) -> float | None:
    """Price tokens by LiteLLM's table, in USD; None where it has no price.

    Without the fees that a provider takes for a search or an image.
    """
    if usage is None or provider.format == "ollama":
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
            custom_llm_provider=provider.litellm,
            prompt_tokens=usage.input,
            completion_tokens=usage.output,
            cache_read_input_tokens=usage.cached,
            cache_creation_input_tokens=usage.cache_written,
        )
    except Exception:  # noqa: BLE001 - a price must not cost the answer
        _log.debug("no price for %s/%s", provider.name, model, exc_info=True)
        return None
    return float(for_input + for_output)


@lru_cache(maxsize=512)
def _flat_prices(
    litellm: Any, provider: Provider, model: str
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
