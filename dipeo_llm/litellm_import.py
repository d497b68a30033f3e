"""Imports LiteLLM without letting its import change the process.

The import runs in a thread, once. It opens no connection, reads no .env file, prints
nothing, and leaves the loggers and the environment of the application alone. What
LiteLLM knows about models is in `litellm_tables`.
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

_lock = threading.Lock()
_lock_of_thread = threading.Lock()
_litellm: Any = None
_importing: Future[Any] | None = None

# Set during the import and restored after it; None hides a variable.
_WHILE_IMPORTING: Mapping[str, str | None] = {
    # Otherwise LiteLLM downloads its price table, reads a .env file from any parent
    # folder, and logs to stderr.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    # LiteLLM adds filters to loggers such as asyncio's and uvicorn's. A log record on
    # another thread would run them, and they import modules that are still half
    # imported.
    "LITELLM_DISABLE_REDACT_SECRETS": "true",
    # "true" makes LiteLLM replace `sys.excepthook`.
    "JSON_LOGS": None,
    # LiteLLM builds HTTP clients that this package never uses. An invalid value here
    # would break the import.
    **dict.fromkeys(
        [
            "REQUEST_TIMEOUT",
            "SSLKEYLOGFILE",
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
# LiteLLM's defaults, such as Anthropic's `max_tokens`. They would change requests.
_LITELLM_PREFIXES = ("DEFAULT_", "LITELLM_")
# LiteLLM reads these on every call. The first sends every call to a LiteLLM proxy, the
# second sends OpenAI's calls through LiteLLM's own client.
_REROUTES = ("USE_LITELLM_PROXY", "EXPERIMENTAL_OPENAI_BASE_LLM_HTTP_HANDLER")
# Set for as long as the process lives. LiteLLM reads the first when an Anthropic call
# first needs a beta header, and would download the list of them.
_AFTER_IMPORT: Mapping[str, str | None] = {
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    **dict.fromkeys(_REROUTES),
}
_LITELLM_LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")
# LiteLLM sets these loggers to WARNING.
_QUIETED_LOGGERS = ("httpx", "apscheduler.executors.default", "apscheduler.scheduler")


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def loaded_litellm() -> Any:
    """Return the litellm module, None before its import has ended."""
    return _litellm


async def load_litellm() -> Any:
    """Return the litellm module; the first call imports it in a thread.

    All callers share one thread. It does not come from the event loop's executor, whose
    threads the application needs for DNS look-ups.
    """
    global _importing  # noqa: PLW0603 - a module is imported once
    if _litellm is not None:
        return _litellm
    with _lock_of_thread:
        if _importing is None or (_importing.done() and _importing.exception()):
            _importing = Future()
            # A running future cannot be cancelled, so a cancelled caller leaves the
            # other callers waiting undisturbed.
            _importing.set_running_or_notify_cancel()
            threading.Thread(
                target=_import_for, args=(_importing,), name="dipeo-llm-import"
            ).start()
    return await asyncio.wrap_future(_importing)


def _import_for(waiting: Future[Any]) -> None:
    try:
        waiting.set_result(import_litellm())
    except BaseException as exc:  # noqa: BLE001 - raised in every waiting caller
        waiting.set_exception(exc)


async def environment_is_whole() -> None:
    """Wait for a running import, which hides environment variables meanwhile."""
    if _importing is not None and not _importing.done():
        await asyncio.wrap_future(_importing)


def import_litellm() -> Any:
    """Return the litellm module; the first call imports it, which takes seconds.

    Thread-safe.
    """
    global _litellm  # noqa: PLW0603 - a module is imported once
    with _lock:
        if _litellm is None:
            litellm = _import()
            _configure(litellm)
            _litellm = litellm
        return _litellm


def _import() -> Any:
    defaults = [name for name in os.environ if name.startswith(_LITELLM_PREFIXES)]
    changes = {**dict.fromkeys(defaults), **_WHILE_IMPORTING, **_AFTER_IMPORT}
    before = {name: os.environ.get(name) for name in changes}
    levels = {name: logging.getLogger(name).level for name in _QUIETED_LOGGERS}
    # Garbage that exists now would be kept for good by the freeze below.
    gc.collect()
    _set(changes)
    collects = gc.isenabled()
    # Collections take a third of the import's time and find nothing. After the freeze,
    # later full collections skip LiteLLM's million objects, which would block the event
    # loop for 0.2 s.
    gc.disable()
    try:
        import litellm
        import openai.resources  # noqa: F401 - the first call would import it, on the loop

        gc.freeze()
    finally:
        if collects:
            gc.enable()
        _set(before)
        _set(_AFTER_IMPORT)
        _restore_loggers(levels)
    return litellm


def _restore_loggers(levels: Mapping[str, int]) -> None:
    """Undo LiteLLM's changes to other packages' loggers, and keep its own quiet."""
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and not name.startswith("LiteLLM"):
            for log_filter in logger.filters[:]:
                if type(log_filter).__module__ == "litellm._logging":
                    logger.removeFilter(log_filter)
    for name in _LITELLM_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        # Without a handler, logging prints warnings to stderr.
        logger.addHandler(logging.NullHandler())
        # At INFO it names models that nobody called, at DEBUG it prints prompts.
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def _configure(litellm: Any) -> None:
    # The filters of LiteLLM's own loggers may redact keys now.
    litellm._logging._ENABLE_SECRET_REDACTION = True  # noqa: SLF001
    # Otherwise it prints "Give Feedback / Get Help" to stdout on each error.
    litellm.suppress_debug_info = True
    # Otherwise it aborts a stream that repeats a chunk a hundred times.
    litellm.REPEATED_STREAMING_CHUNK_LIMIT = sys.maxsize
    # Otherwise counting the tokens of a Llama model downloads its tokenizer.
    litellm.disable_hf_tokenizer_download = True
    _keep_off_localhost()


def _keep_off_localhost() -> None:
    """Stop LiteLLM from asking localhost:11434 about Ollama models.

    It posts there from the event loop, and blocks it, for each Ollama model that its
    table lacks, the model named in an answer included.
    """
    from litellm.llms.ollama import common_utils

    def describe(self: Any, model: str, *args: Any, **more: Any) -> dict[str, Any]:
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
            setattr(common_utils.OllamaModelInfo, name, describe)


def without_reroutes() -> None:
    """Remove the variables that would send every call elsewhere, for good.

    LiteLLM reads them on each call. Calls overlap, so they cannot be restored after one.
    """
    for name in _REROUTES:
        os.environ.pop(name, None)
