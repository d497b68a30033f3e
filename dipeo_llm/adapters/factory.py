"""Which provider a model string names, and which adapter talks to it.

Rows of data, in the order in which they are asked. Model names that no row claims are
LiteLLM's to infer, which `litellm_tables` asks.
"""

import re
from typing import Any

from pydantic import SecretStr

from dipeo_llm import litellm_tables
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.claude import ClaudeAdapter
from dipeo_llm.adapters.gemini import GeminiAdapter
from dipeo_llm.adapters.litellm import LiteLLMAdapter
from dipeo_llm.adapters.ollama import OllamaAdapter
from dipeo_llm.adapters.openai import ChatGPTAdapter
from dipeo_llm.adapters.openai_responses import ResponsesAdapter
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.client import Client
from dipeo_llm.domain import Capabilities
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.pool import Pool
from dipeo_llm.settings import Settings

ADAPTERS: tuple[type[BaseLLMAdapter], ...] = (
    ChatGPTAdapter,
    ClaudeAdapter,
    GeminiAdapter,
    OllamaAdapter,
    LiteLLMAdapter,
)
"""One line for each format, in the order in which its rows claim model names."""
ENDPOINTS: dict[str, type[BaseLLMAdapter]] = {
    "litellm": LiteLLMAdapter,
    "responses": ResponsesAdapter,
}
"""Other ways to reach a provider, for `BaseLLMAdapter.sibling`."""
PROVIDERS = tuple(row for adapter in ADAPTERS for row in adapter.rows)

_ADAPTER_OF = {row.name: adapter for adapter in ADAPTERS for row in adapter.rows}
_BY_NAME = {
    name: row for row in PROVIDERS for name in (row.name, row.litellm, *row.aliases)
}

# Ollama writes a model as `name:tag`, and a GGUF file on a hub as `hf.co/user/repo`. Asked
# only after every row and LiteLLM have declined.
_OLLAMA_TAG = re.compile(
    r"(?:hf\.co/|huggingface\.co/)[\w.-]+/[\w.-]+(?::[\w.-]+)?"
    r"|(?:[\w.-]+/)?[\w.-]+:[\w.-]+"
)


def create_adapter(
    provider: Any,
    model_name: str,
    api_key: str | SecretStr | None,
    base_url: str | None = None,
    *,
    settings: Settings | None = None,
    pool: "Pool[Client] | None" = None,
) -> BaseLLMAdapter:
    """Make the adapter of a provider. Imports and opens nothing yet.

    Args:
        provider: Its name, as a string or a `LLMService`, or its row.
        model_name: The model, without a prefix.
        api_key: The key; None or empty where the provider needs none.
        base_url: The provider's address, if not its own.
        settings: How calls are made.
        pool: Where open clients are shared; without one, call `aclose` at the end.

    Raises:
        APIKeyNotFoundError: The provider needs a key.
        InvalidRequestError: The provider's name or the base URL cannot be used.
    """
    row = provider if isinstance(provider, Provider) else by_name(provider)
    adapter = _ADAPTER_OF.get(row.name, LiteLLMAdapter)
    return adapter(row, model_name, api_key, base_url, settings=settings, pool=pool)


def capabilities(provider: Provider, model: str) -> Capabilities:
    """Say what a model takes and costs, by LiteLLM's table. Imports LiteLLM."""
    return litellm_tables.capabilities_of(
        provider.name, provider.litellm, model, priced=provider.has_prices
    )


def by_name(service: Any) -> Provider:
    """Find a provider by the name of a service: a string, or a member of a string enum.

    A name that no row has is taken for LiteLLM's name of a provider, such as
    `service="groq"`.

    Raises:
        InvalidRequestError: *service* is not a name, or the provider is not reached.
    """
    name = str(getattr(service, "value", service)).strip().lower()
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise InvalidRequestError(f"{service!r} is not the name of a service")
    return _BY_NAME.get(name) or Provider(name=name, litellm=name)


def of_key(api_key_id: Any) -> Provider | None:
    """Find the provider that a key's id names.

    The id is a variable's name, or begins with a provider's: `OPENAI_API_KEY`, `openai`
    and `openai_key` are all OpenAI's.
    """
    text = str(api_key_id).strip()
    for row in PROVIDERS:
        if text.upper() in row.key_variables:
            return row
    return _BY_NAME.get(re.split(r"[^a-z]", text.lower(), maxsplit=1)[0])


def resolve(model: str, service: Any = None) -> tuple[Provider | None, str]:
    """Find the provider of a model string, and the name without the provider's prefix.

    An explicit *service* wins over a prefix, and a prefix over the name: with
    `service="openai"`, `anthropic/claude-x` is the name of a model on an
    OpenAI-compatible server, while `openai/gpt-4o` loses its prefix.

    Returns:
        The provider, or None where LiteLLM must be asked, and the bare name.

    Raises:
        InvalidRequestError: The model's name is empty.
    """
    name = str(model or "").strip()
    if not name:
        raise InvalidRequestError(f"{model!r} is not the name of a model")
    prefix, slash, rest = name.partition("/")
    prefixed = _BY_NAME.get(prefix.lower()) if slash else None
    if prefixed is not None and not rest:
        raise InvalidRequestError(f"{model!r} has a provider but no model")
    if service is not None and service != "":
        provider = by_name(service)
        return provider, rest if prefixed is provider else name
    if prefixed is not None:
        return prefixed, rest
    for row in PROVIDERS:
        if row.claims.fullmatch(name):
            return row, name.removeprefix("models/")
    return None, name


def find_local(model: str) -> Provider | None:
    """Return Ollama for a name that no provider claims and that Ollama would write."""
    is_hosted = any(
        row.claims.fullmatch(model.rpartition(":")[0])
        for row in PROVIDERS
        if row.needs_key
    )
    return None if is_hosted or not _OLLAMA_TAG.fullmatch(model) else _BY_NAME["ollama"]


def unknown_model(model: str) -> InvalidRequestError:
    """Make the error for a name that cannot be placed: it says how to place it."""
    return InvalidRequestError(
        f"no provider is known for model {model!r}: name it with service=… or a prefix,"
        f" such as service='openai' or {f'openai/{model}'!r}",
        model=model,
    )
