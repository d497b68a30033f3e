"""LiteLLM's translation of a request, without LiteLLM's call around it.

Holds what the formats share of it: the mapping of options, the lookup of a provider's
configuration class, and the check that the installed LiteLLM still translates as it is
called here. Sends nothing. The functions were tried on 1.105.0, 1.109.3 and 1.110.2.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dipeo_llm.adapters.provider import Provider
from dipeo_llm.adapters.request import PreparedRequest, copy_json
from dipeo_llm.domain import ChatRequest

if TYPE_CHECKING:
    from dipeo_llm.adapters.base import BaseLLMAdapter

_log = logging.getLogger("dipeo_llm")

JSON_HEADERS = {"content-type": "application/json", "accept": "application/json"}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as the provider wants it."""

    path: str
    """Below the base URL."""
    headers: Mapping[str, str]
    body: dict[str, Any]


def find_config(litellm: Any, provider: Provider, model: str) -> Any:
    """Return LiteLLM's configuration object of a provider for a model.

    Finding one takes a tenth of a translation; it keeps no state, so it is kept.
    """
    return _find_config(litellm, provider.litellm, model)


@lru_cache(maxsize=512)
def _find_config(litellm: Any, name: str, model: str) -> Any:
    return litellm.utils.ProviderConfigManager.get_provider_chat_config(
        model=model, provider=litellm.LlmProviders(name)
    )


PLAIN_OPTIONS = frozenset(
    {"temperature", "max_tokens", "max_completion_tokens", "top_p", "n", "stop", "seed"}
)
"""Options that LiteLLM maps alike, whatever the messages say."""
_MOST_KEPT = 512
_kept: dict[tuple[Any, ...], dict[str, Any]] = {}


def map_options(
    litellm: Any, provider: Provider, model: str, prepared: PreparedRequest
) -> dict[str, Any]:
    """Map options to the provider's names; leave out those that the model does not take.

    Mapping takes a third of a translation, so the result for plain numbers and text is
    kept.
    """
    options = prepared.options
    if not options.keys() <= PLAIN_OPTIONS or not all(
        isinstance(value, (int, float, str)) for value in options.values()
    ):
        return _map(litellm, provider, model, prepared)
    key = (provider.name, model, *sorted(options.items()))
    if key not in _kept:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = _map(litellm, provider, model, prepared)
    copy: dict[str, Any] = copy_json(_kept[key])
    return copy


def _map(
    litellm: Any, provider: Provider, model: str, prepared: PreparedRequest
) -> dict[str, Any]:
    has_tools = "tools" in prepared.options
    mapped: dict[str, Any] = litellm.utils.get_optional_params(
        model=model,
        custom_llm_provider=provider.litellm,
        messages=prepared.messages,
        drop_params=True,
        # LiteLLM would drop the tools of a model that its table does not know.
        allowed_openai_params=["tools", "tool_choice"] if has_tools else None,
        **prepared.options,
    )
    for name in ("stream", "stream_options", "max_retries", "extra_body"):
        mapped.pop(name, None)
    return mapped


# A conversation that uses most of what a translation must be able to do.
_PROBE = ChatRequest(
    messages=(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "2"},
        {"role": "user", "content": "Again."},
    ),
    sampling={"temperature": 0.5, "max_tokens": 7},
    tools=(
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Add.",
                "parameters": {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}},
                    "required": ["a"],
                },
            },
        },
    ),
)
_known: dict[tuple[int, type[Any]], bool] = {}


def check_translation(litellm: Any, adapter: type["BaseLLMAdapter"]) -> bool:
    """Say whether the installed LiteLLM translates a format as the adapter calls it.

    Tried once per format, with a conversation that has a tool turn; takes milliseconds.
    Logs one warning if the translation fails.
    """
    key = (id(litellm), adapter)
    if key not in _known:
        _known[key] = _translates(litellm, adapter)
    return _known[key]


def _translates(litellm: Any, kind: type["BaseLLMAdapter"]) -> bool:
    probe = kind.probe
    if probe is None:
        return False
    adapter = kind(kind.rows[0], probe.model, "key-of-the-self-check")
    try:
        for stream in (False, True):
            outgoing = adapter.translate(
                litellm, adapter.prepare(_PROBE), stream=stream
            )
            missing = [name for name in probe.fields if not outgoing.body.get(name)]
            if missing:
                raise KeyError(*missing)
    except Exception as exc:  # noqa: BLE001 - any change in LiteLLM means the same here
        _log.warning(
            "the direct engine does not fit the installed LiteLLM for %s (%r);"
            " calls go through litellm.acompletion",
            adapter.provider.name,
            exc,
        )
        return False
    return True
