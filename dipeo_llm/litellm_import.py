"""LiteLLM itself: its import, behind a fence, and the tables that it carries.

Imports LiteLLM in a thread, once, so that it touches no network, no .env file, no
stdout and no log handler. Knows nothing of requests and answers.
"""

import asyncio
import gc
import logging
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

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
