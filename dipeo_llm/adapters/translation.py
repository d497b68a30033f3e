"""LiteLLM's translation of a request, without LiteLLM's call around it.

The only module that names LiteLLM's internals: the functions that its own handlers call
to turn OpenAI-shaped messages and options into a provider's URL, headers and body. Each
was tried on 1.105.0, 1.105.3 and 1.109.1. `self_check` tries them once for the installed
version, so that one which has changed them leads to the other engine and not to a
failed call. Sends nothing.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from dipeo_llm.adapters.factory import Provider, by_name
from dipeo_llm.adapters.request import Shape, copied, shape
from dipeo_llm.client import PLACEHOLDER
from dipeo_llm.domain import ChatRequest
from dipeo_llm.litellm_tables import know_model

_log = logging.getLogger("dipeo_llm")


_LOCAL = {
    "mode": "chat",
    "input_cost_per_token": 0.0,
    "output_cost_per_token": 0.0,
    "supports_function_calling": True,
}
_UNTOLD: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "google": {"gemini": {"mode": "chat", "supports_system_messages": True}},
    "ollama": {"ollama_chat": _LOCAL, "ollama": _LOCAL},
}


def untold(provider: Provider, model: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the rows that LiteLLM's table lacks for a model of a provider."""
    if provider.format == "google" and re.match("gemma-[1-3]", model):
        return {}
    return _UNTOLD.get(provider.format or "", {})


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as the provider wants it."""

    path: str
    """Below the base URL."""
    headers: Mapping[str, str]
    body: dict[str, Any]


def translate(
    litellm: Any, provider: Provider, model: str, shaped: Shape, *, stream: bool
) -> Outgoing:
    """Translate a request.

    Args:
        litellm: The module.
        provider: The provider.
        model: Its name, without a prefix.
        shaped: The request; its format is one of FORMATS. LiteLLM may change it.
        stream: Whether the answer is to come as a stream.

    Raises:
        Exception: Whatever LiteLLM raises for a request that it cannot translate.
    """
    if shaped.format == "responses":
        return _responses(litellm, model, shaped, stream)
    know_model(litellm, model, untold(provider, model))
    optional = _options(litellm, provider, model, shaped)
    return FORMATS[shaped.format or ""](
        litellm, provider, model, shaped.messages, optional, stream
    )


def _options(
    litellm: Any, provider: Provider, model: str, shaped: Shape
) -> dict[str, Any]:
    """Map options to the provider's names.

    Plain numbers and text are mapped alike every time, whatever the messages say, and
    that takes a third of a translation: so the answer is kept.
    """
    asked = shaped.parameters
    key = (
        (provider.name, model, *sorted(asked.items())) if set(asked) <= _PLAIN else None
    )
    if key is not None and all(
        isinstance(v, int | float | str) for v in asked.values()
    ):
        if key not in _kept_options:
            if len(_kept_options) >= _MOST_KEPT:
                _kept_options.clear()
            _kept_options[key] = _mapped(litellm, provider, model, shaped)
        copy: dict[str, Any] = copied(_kept_options[key])
        return copy
    return _mapped(litellm, provider, model, shaped)


_PLAIN = frozenset(
    {"temperature", "max_tokens", "max_completion_tokens", "top_p", "n", "stop", "seed"}
)
_MOST_KEPT = 512
_kept_options: dict[tuple[Any, ...], dict[str, Any]] = {}


def _mapped(
    litellm: Any, provider: Provider, model: str, shaped: Shape
) -> dict[str, Any]:
    optional: dict[str, Any] = litellm.utils.get_optional_params(
        model=model,
        custom_llm_provider=provider.litellm,
        messages=shaped.messages,
        drop_params=True,
        **shaped.parameters,
    )
    for name in ("stream", "stream_options", "max_retries", "extra_body"):
        optional.pop(name, None)
    return optional


def _config(litellm: Any, provider: Provider, model: str) -> Any:
    return litellm.utils.ProviderConfigManager.get_provider_chat_config(
        model=model, provider=litellm.LlmProviders(provider.litellm)
    )


_JSON = {"content-type": "application/json", "accept": "application/json"}


def _openai(
    litellm: Any,
    provider: Provider,
    model: str,
    messages: list[dict[str, Any]],
    optional: dict[str, Any],
    stream: bool,
) -> Outgoing:
    body = _config(litellm, provider, model).transform_request(
        model=model,
        messages=messages,
        optional_params=optional,
        litellm_params={},
        headers={},
    )
    # LiteLLM turns some roles here that must reach the wire as they are.
    body["messages"] = messages
    body.pop("extra_body", None)
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream", None)
    return Outgoing("/chat/completions", _JSON, body)


def _anthropic(
    litellm: Any,
    provider: Provider,
    model: str,
    messages: list[dict[str, Any]],
    optional: dict[str, Any],
    stream: bool,
) -> Outgoing:
    from litellm.anthropic_beta_headers_manager import (
        update_request_with_filtered_beta,
    )

    config = _config(litellm, provider, model)
    optional.pop("json_mode", None)
    headers = _anthropic_headers(config, provider, model, messages, optional)
    body = config.transform_request(
        model=model,
        messages=messages,
        optional_params={**optional, "is_vertex_request": False},
        litellm_params={},
        headers=headers,
    )
    headers, body = update_request_with_filtered_beta(
        headers=headers, request_data=body, provider=provider.litellm
    )
    body.pop("is_vertex_request", None)
    if stream:
        body["stream"] = True
    return Outgoing("/v1/messages", {**_JSON, **headers}, body)


def _anthropic_headers(
    config: Any,
    provider: Provider,
    model: str,
    messages: list[dict[str, Any]],
    optional: dict[str, Any],
) -> dict[str, str]:
    """Ask LiteLLM for the headers; they are the same for all that is plain text."""
    plain = set(optional) <= _PLAIN | {"stop_sequences"} and all(
        isinstance(m["content"], str) and len(m) == 2 for m in messages
    )
    if plain and model in _plain_headers:
        return dict(_plain_headers[model])
    headers: dict[str, str] = config.validate_environment(
        headers={},
        model=model,
        messages=messages,
        optional_params={**optional, "is_vertex_request": False},
        litellm_params={},
        api_key=PLACEHOLDER,
        api_base=provider.base_url,
    )
    if plain and len(_plain_headers) < _MOST_KEPT:
        _plain_headers[model] = dict(headers)
    return headers


_plain_headers: dict[str, dict[str, str]] = {}


def _google(
    litellm: Any,
    provider: Provider,
    model: str,
    messages: list[dict[str, Any]],
    optional: dict[str, Any],
    stream: bool,
) -> Outgoing:
    from litellm.llms.vertex_ai.gemini import transformation

    # Its name lost the underscore in 1.108.
    transform: Callable[..., dict[str, Any]] = (
        getattr(transformation, "_transform_request_body", None)
        or transformation.transform_request_body
    )
    body = transform(
        messages=messages,
        model=model,
        optional_params=optional,
        custom_llm_provider=provider.litellm,
        litellm_params={},
        cached_content=None,
    )
    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    return Outgoing(f"/models/{quote(model, safe='/')}:{verb}", _JSON, body)


def _ollama(
    litellm: Any,
    provider: Provider,
    model: str,
    messages: list[dict[str, Any]],
    optional: dict[str, Any],
    stream: bool,
) -> Outgoing:
    body = _config(litellm, provider, model).transform_request(
        model=model,
        messages=messages,
        optional_params={**optional, "stream": stream},
        litellm_params={},
        headers={},
    )
    for made, given in zip(body["messages"], messages, strict=True):
        # Ollama pairs a result with its call by name, or by id in newer versions
        # (https://github.com/ollama/ollama/blob/main/docs/api.md, 2026-11-23).
        if given["role"] == "tool" and given.get("name"):
            made["tool_name"] = given["name"]
        for call, its in zip(
            made.get("tool_calls") or (), given.get("tool_calls") or (), strict=False
        ):
            call["id"] = its.get("id")
    return Outgoing("/api/chat", _JSON, {**body, "stream": stream})


def _responses(litellm: Any, model: str, shaped: Shape, stream: bool) -> Outgoing:
    """Translate for OpenAI's Responses endpoint, which has OpenAI's own tools.

    Source: https://platform.openai.com/docs/guides/migrate-to-responses (2026-11-23).
    """
    from litellm.completion_extras.litellm_responses_transformation import (
        transformation,
    )

    handler = transformation.LiteLLMResponsesTransformationHandler()
    spoken = [m for m in shaped.messages if m["role"] != "developer"]
    items, _ = handler.convert_chat_completion_messages_to_responses_api(spoken)
    prompts = [
        {"role": "developer", "content": m["content"]}
        for m in shaped.messages
        if m["role"] == "developer"
    ]
    asked = shaped.parameters
    body: dict[str, Any] = {"model": model, "input": [*prompts, *items]}
    supported = litellm.get_supported_openai_params(
        model=model, custom_llm_provider="openai"
    )
    for name, wire_name in (
        ("max_tokens", "max_output_tokens"),
        ("max_completion_tokens", "max_output_tokens"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
    ):
        if name in asked and name in supported:
            body[wire_name] = asked[name]
    if "reasoning_effort" in asked:
        body["reasoning"] = {"effort": asked["reasoning_effort"]}
    if "response_format" in asked:
        form = asked["response_format"]
        flat = {**form.get("json_schema", {}), "type": form["type"]}
        body["text"] = {"format": flat}
    if "tools" in asked:
        body["tools"] = [
            {"type": "function", **tool["function"]}
            if tool["type"] == "function"
            else tool
            for tool in asked["tools"]
        ]
    if "tool_choice" in asked:
        body["tool_choice"] = asked["tool_choice"]
    if stream:
        body["stream"] = True
    return Outgoing("/responses", _JSON, body)


_Translate = Callable[
    [Any, Provider, str, list[dict[str, Any]], dict[str, Any], bool], Outgoing
]
FORMATS: dict[str, _Translate] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "google": _google,
    "ollama": _ollama,
}
"""The formats that have a translation here."""


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
_PROBES = {
    "openai": ("gpt-4.1-nano", ("messages", "max_tokens", "temperature", "tools")),
    "anthropic": ("claude-sonnet-4-5", ("messages", "max_tokens", "system", "tools")),
    "google": ("gemini-2.5-flash", ("contents", "generationConfig", "tools")),
    "ollama": ("dipeo-llm-probe", ("messages", "options", "tools")),
}

_checked: dict[tuple[int, str], bool] = {}


def self_check(litellm: Any, wire_format: str) -> bool:
    """Say whether the installed LiteLLM translates a format as it is called here.

    Tried once for each format, with a conversation that has a tool's turn in it; takes
    milliseconds. One log line if it does not.
    """
    key = (id(litellm), wire_format)
    if key not in _checked:
        _checked[key] = _translates(litellm, wire_format)
    return _checked[key]


def _translates(litellm: Any, wire_format: str) -> bool:
    if wire_format not in FORMATS:
        return False
    model, wanted = _PROBES[wire_format]
    provider = by_name(wire_format)
    try:
        for stream in (False, True):
            outgoing = translate(
                litellm,
                provider,
                model,
                shape(provider, model, _PROBE),
                stream=stream,
            )
            missing = [name for name in wanted if not outgoing.body.get(name)]
            if missing:
                raise KeyError(*missing)
    except Exception as exc:  # noqa: BLE001 - any change of LiteLLM's is the same to us
        _log.warning(
            "the direct engine does not fit this LiteLLM for %s (%r):"
            " litellm.acompletion is used",
            provider.name,
            exc,
        )
        return False
    return True
