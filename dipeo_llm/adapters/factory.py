"""Which provider a model string names, and which adapter talks to it.

The rows of the adapters are asked first, in order; then LiteLLM, which knows every other
provider.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from dipeo_llm import litellm_providers, litellm_tables
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.claude import ClaudeAdapter
from dipeo_llm.adapters.gemini import GeminiAdapter
from dipeo_llm.adapters.litellm import LiteLLMAdapter
from dipeo_llm.adapters.ollama import OllamaAdapter
from dipeo_llm.adapters.openai import ChatGPTAdapter
from dipeo_llm.adapters.openai_responses import ResponsesAdapter
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.client import Client, is_loopback
from dipeo_llm.domain import Capabilities
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.litellm_import import import_litellm
from dipeo_llm.litellm_providers import DIFFERS, EXAMPLES, REFUSED, ProviderRow
from dipeo_llm.litellm_tables import infer_provider
from dipeo_llm.pool import Pool
from dipeo_llm.settings import Settings, warn_once

ADAPTERS: list[type[BaseLLMAdapter]] = [
    ChatGPTAdapter,
    ClaudeAdapter,
    GeminiAdapter,
    OllamaAdapter,
    LiteLLMAdapter,
]
"""One line for each format, in the order in which its rows claim model names."""
ENDPOINTS: dict[str, type[BaseLLMAdapter]] = {
    "litellm": LiteLLMAdapter,
    "responses": ResponsesAdapter,
}
"""Other ways to reach a provider, for `BaseLLMAdapter.sibling`."""
PROVIDERS = [row for adapter in ADAPTERS for row in adapter.rows]

_ADAPTER_OF = {row.name: adapter for adapter in ADAPTERS for row in adapter.rows}
_BY_NAME = {name: row for row in PROVIDERS for name in row.names}


def register(adapter: type[BaseLLMAdapter]) -> None:
    """Add the adapter of a format from outside the package, for the whole process.

    Its rows claim model names after those of this package.

    Raises:
        ValueError: A provider of that name is known already.
    """
    names = {n: row for row in adapter.rows for n in (row.name, *row.aliases)}
    if taken := names.keys() & _BY_NAME.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: the name is taken")
    ADAPTERS.append(adapter)
    PROVIDERS.extend(adapter.rows)
    _ADAPTER_OF.update({row.name: adapter for row in adapter.rows})
    _BY_NAME.update(names)


# Names of LiteLLM's other providers that begin with one of ours and an underscore.
_LONGER_NAMES = ("bedrock_mantle",)

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
    other = ChatGPTAdapter if row.speaks_openai else LiteLLMAdapter
    adapter = _ADAPTER_OF.get(row.name, other)
    return adapter(row, model_name, api_key, base_url, settings=settings, pool=pool)


def capabilities(provider: Provider, model: str) -> Capabilities:
    """Say what a model takes and costs, by LiteLLM's table. Imports LiteLLM."""
    return litellm_tables.capabilities_of(
        provider.name, provider.litellm, model, priced=provider.has_prices
    )


def by_name(service: Any) -> Provider:
    """Find a provider by the name of a service: a string, or a member of a string enum.

    Imports LiteLLM, if nothing has yet, for a name that no row has: every chat provider
    of LiteLLM has a row, made from what LiteLLM knows of it.

    Raises:
        InvalidRequestError: The provider is unknown, or cannot be reached; the message
            names the nearest ones, or says why.
    """
    name = _read_name(service)
    return _BY_NAME.get(name) or _row_of(name)


def _read_name(service: Any) -> str:
    name = str(getattr(service, "value", service)).strip().lower()
    if name in _BY_NAME:
        return name
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise InvalidRequestError(f"{service!r} is not the name of a service")
    if name in REFUSED:
        raise InvalidRequestError(
            f"{name} is not reached: {REFUSED[name]}", service=name
        )
    return name


@lru_cache(maxsize=512)
def _row_of(name: str) -> Provider:
    """Make the row of a provider that only LiteLLM knows."""
    litellm = import_litellm()
    if name not in litellm_providers.all_names(litellm):
        raise litellm_providers.unknown_provider(litellm, name, _BY_NAME)
    facts = litellm_providers.describe(litellm, name)
    if facts.refusal is not None:
        raise InvalidRequestError(
            f"{name} is not reached: {facts.refusal}", service=name
        )
    return Provider(
        name=name,
        litellm=name,
        base_url=facts.address,
        base_url_example=EXAMPLES.get(name),
        path=litellm_providers.PATHS.get(name, ""),
        key_header=facts.key_header,
        needs_key=facts.needs_key,
        key_variables=facts.key_variables,
        client=facts.client,
        extra_headers=facts.headers,
        speaks_openai=facts.speaks_openai,
    )


def check_base_urls(base_urls: Mapping[str, str]) -> None:
    """Warn, once per process, of names that look misspelt. Imports LiteLLM."""
    _check_names(tuple(str(getattr(n, "value", n)).lower() for n in base_urls))


@lru_cache(maxsize=64)
def _check_names(names: tuple[str, ...]) -> None:
    litellm = import_litellm()
    known = {*_BY_NAME, *litellm_providers.all_names(litellm)}
    plain = {name.replace("-", "_") for name in known}
    for name in names:
        close = litellm_providers.suggest(litellm, name, _BY_NAME)
        if name.replace("-", "_") not in plain and close:
            warn_once(
                f"base_urls has an unknown provider {name!r}; did you mean {close[0]!r}?"
            )


def is_local(base_url: str) -> bool:
    """Say whether a base URL is a server on this machine, which needs no key."""
    return is_loopback(urlsplit(base_url).hostname or "")


def needs_key(
    provider: Provider, settings: Settings, base_url: str | None = None
) -> bool:
    """Say whether calls to a provider need a key, at an address or at the one set for it."""
    url = base_url or provider.find_base_url(settings.base_urls)
    return provider.needs_key and not (url and is_local(url))


def of_key(api_key_id: Any) -> Provider | None:
    """Find the provider that a key's id names; imports LiteLLM for one without a row.

    The id is a variable's name, or begins with a provider's: `OPENAI_API_KEY`, `openai`
    and `openai_key` are all OpenAI's.
    """
    text = str(api_key_id).strip()
    if (row := own_of_key(text)) is not None:
        return row
    litellm = import_litellm()
    names = litellm_providers.chat_providers(litellm)
    if text.isupper():
        for name in names:
            if text in litellm_providers.describe(litellm, name).key_variables:
                return by_name(name)
    words = re.sub(r"\W", "_", text.lower()) + "_"
    begins = [
        name
        for name in {*names, *_BY_NAME}
        if words.startswith(f"{name.replace('-', '_')}_")
    ]
    return by_name(max(begins, key=len)) if begins else None


def own_of_key(api_key_id: str) -> Provider | None:
    """Find the provider that a key's id names among the rows.

    None for a variable that is not a row's: LLAMA_API_KEY is Meta's, although `llama` is
    a name of Ollama.
    """
    for row in PROVIDERS:
        if api_key_id.upper() in row.key_variables:
            return row
    if api_key_id.isupper() or api_key_id.lower().startswith(_LONGER_NAMES):
        return None
    first = re.split(r"[^a-z]", api_key_id.lower(), maxsplit=1)[0]
    return _BY_NAME.get(first)


def unknown_key(api_key_id: str) -> str:
    """Say what to do about a key's id that names no provider. Imports LiteLLM."""
    close = litellm_providers.suggest(import_litellm(), api_key_id, _BY_NAME)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    names = [row.name for row in PROVIDERS if row.key_variables]
    return (
        f"an id begins with one of {', '.join(names)}, or another name that"
        " `dipeo-llm models --providers` lists"
    )


def needs_litellm(model: str, service: Any = None) -> bool:
    """Say whether `resolve` asks LiteLLM, whose import takes seconds."""
    if service is not None and service != "":
        return _read_name(service) not in _BY_NAME
    return _resolve_by_rows(str(model or "").strip()) is None


def resolve(model: str, service: Any = None) -> tuple[Provider, str]:
    """Find the provider of a model string, and the name without the provider's prefix.

    An explicit *service* wins over a prefix, and a prefix over the name: with
    `service="openai"`, `anthropic/claude-x` is the name of a model on an
    OpenAI-compatible server, while `openai/gpt-4o` loses its prefix. Imports LiteLLM, if
    nothing has yet, where no row claims the name; see `needs_litellm`.

    Raises:
        InvalidRequestError: The name is empty, or no provider is known for it.
    """
    found = find(model, service)
    if found is None:
        raise unknown_model(model)
    return found


def find(model: str, service: Any = None) -> tuple[Provider, str] | None:
    """Do as `resolve`, and return None where no provider is known for the name.

    Raises:
        InvalidRequestError: As `resolve`, for anything else.
    """
    name = str(model or "").strip()
    if not name:
        raise InvalidRequestError(f"{model!r} is not the name of a model")
    prefix, slash, rest = name.partition("/")
    if slash and not rest and _BY_NAME.get(prefix.lower()):
        raise InvalidRequestError(f"{model!r} has a provider but no model")
    if service is not None and service != "":
        provider = by_name(service)
        is_prefix = bool(rest) and prefix.lower() in provider.names
        return provider, _bare(provider, rest if is_prefix else name)
    return _resolve_by_rows(name) or _resolve_by_litellm(name)


def find_by_key(model: str, service: str) -> tuple[Provider, str] | None:
    """Place a name that nothing else places, by the service of the key's record.

    Returns None for OpenAI, Anthropic, Google, Ollama and Bedrock: their models are known
    by name, so an unknown name would be sent to a guess. Imports LiteLLM.
    """
    row = by_name(service)
    has_names = any(row is adapter.rows[0] for adapter in ADAPTERS)
    return None if has_names else find(model, service)


def _resolve_by_rows(name: str) -> tuple[Provider, str] | None:
    prefix, slash, rest = name.partition("/")
    if slash and rest:
        row = _BY_NAME.get(prefix.lower())
        if row is not None:
            return row, _bare(row, rest)
    for row in PROVIDERS:
        if row.claims.fullmatch(name):
            return row, _bare(row, name)
    return None


def _bare(row: Provider, name: str) -> str:
    """Return a name without "models/", with which Google's list writes its own."""
    return name.removeprefix("models/") if row.claims.fullmatch(name) else name


def _resolve_by_litellm(name: str) -> tuple[Provider, str] | None:
    """Ask LiteLLM about a prefix, then about the name; then look for Ollama's spelling."""
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if slash and rest:
        known = {*REFUSED, *litellm_providers.all_names(import_litellm())}
        if prefix in known:
            return by_name(prefix), rest
    inferred = infer_provider(name)
    row = by_name(inferred) if inferred else find_local(name)
    return (row, name.removeprefix(f"{row.litellm}/")) if row is not None else None


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
    litellm = import_litellm()
    served = sorted(key for key in litellm.model_cost if key.endswith(f"/{model}"))
    known = [key for key in served if key.count("/") == model.count("/") + 1]
    prefix, slash, rest = model.partition("/")
    if slash and not known:
        close = litellm_providers.suggest(litellm, prefix, _BY_NAME)
        known = [f"{name}/{rest}" for name in close]
    hint = (
        f"did you mean {' or '.join(map(repr, known[:3]))}?"
        if known
        else "name it with service=… or a prefix, such as service='openai' or"
        f" {f'openai/{model}'!r}"
    )
    return InvalidRequestError(
        f"no provider is known for model {model!r}: {hint}", model=model
    )


_TRIED_OWN = "everything, on loopback and on recordings"
_TRIED_DIRECT = (
    "on loopback: call, stream, tools, 401, 429, 500, cut stream; the body is"
    " acompletion's"
)
_TRIED_LITELLM = "on loopback: acompletion sends one request, through our client"
_NOTES = {
    "bedrock": "on loopback: Converse, call and stream, with a key and with SigV4",
    "bytez": f"{_TRIED_LITELLM}; LiteLLM ignores a base_url, so the fence refuses one",
    "deepseek": _TRIED_DIRECT,
    "vertex": "on loopback: call and stream, in Gemini's format with Google's token",
}


def list_providers() -> list[ProviderRow]:
    """List all providers, ours first, for `models --providers` and docs/providers.md.

    Imports LiteLLM, which takes seconds.
    """
    litellm = import_litellm()
    rows = [
        ProviderRow(
            prefix=row.name,
            other_prefixes=tuple(sorted({*row.names} - {row.name})),
            key_variables=row.key_variables,
            address=row.base_url,
            example=row.base_url_example,
            engine="litellm" if row in LiteLLMAdapter.rows else "direct",
            notes=_NOTES.get(row.name, _TRIED_OWN),
        )
        for row in PROVIDERS
    ]
    for name in litellm_providers.chat_providers(litellm):
        if name in _BY_NAME:
            continue
        facts = litellm_providers.describe(litellm, name)
        tried = _TRIED_DIRECT if facts.speaks_openai else _TRIED_LITELLM
        notes = facts.refusal or _NOTES.get(name, tried)
        if name in DIFFERS:
            notes += f", but for: {DIFFERS[name]}"
        rows.append(
            ProviderRow(
                prefix=name,
                key_variables=facts.key_variables,
                address=facts.address,
                example=EXAMPLES.get(name),
                engine=facts.engine,
                notes=notes,
            )
        )
    return rows
