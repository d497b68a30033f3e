"""Gives a request the form that its provider takes, before LiteLLM translates it.

Pure. What is said here is what LiteLLM does not do, or does in a way that a provider
refuses: OpenAI's developer role, one system prompt for those that take one, no empty
message, no field of another provider, no options that exclude each other.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dipeo_llm.adapters.factory import Provider
from dipeo_llm.adapters.tools import needs_responses, provided_parameters, sort_tools
from dipeo_llm.domain import ChatRequest
from dipeo_llm.message_formatter import has_content
from dipeo_llm.structured import form_of


@dataclass(frozen=True, slots=True)
class Shape:
    """A request as LiteLLM gets it."""

    format: str | None
    """Whose words it will be in: the provider's format, or "responses"."""
    messages: list[dict[str, Any]]
    parameters: dict[str, Any]
    """Options under OpenAI's names."""


def shape(
    provider: Provider, model: str, request: ChatRequest, *, responses: bool = False
) -> Shape:
    """Shape a request for a model. Nothing in it is shared with the request.

    Args:
        provider: The provider.
        model: Its name, without a prefix.
        request: What the caller asked.
        responses: Whether OpenAI serves the model at its Responses endpoint only.

    Raises:
        InvalidRequestError: The provider cannot do what is asked.
    """
    tools = sort_tools(request.tools)
    provided, parameters = provided_parameters(provider, model, tools.provided)
    all_tools = copied([*tools.functions, *provided])
    sampling = dict(request.sampling)
    if provider.name in _TAKES:
        _TAKES[provider.name](model, sampling)
    parameters = {**sampling, **parameters}
    if provider.format == "ollama" and request.tool_choice == "none":
        all_tools = []  # it has no tool_choice, and would call what it is shown
    if all_tools:
        parameters["tools"] = all_tools
        if request.tool_choice is not None:
            parameters["tool_choice"] = copied(request.tool_choice)
    form = form_of(request.response_format)
    if form is not None:
        parameters["response_format"] = copied(form.response_format)
    responses = responses or needs_responses(provider, all_tools)
    return Shape(
        format="responses" if responses else provider.format,
        # Some providers answer 400 to an empty message.
        messages=_MESSAGES.get(provider.format or "", _plain_messages)(
            [
                message
                for message in copied(request.messages)
                if message.get("role") == "tool"
                or message.get("tool_calls")
                or has_content(message.get("content"))
            ],
            provider,
        ),
        parameters=parameters,
    )


def copied(value: Any) -> Any:
    """Copy lists and dicts, which LiteLLM changes in place, and share what is in them."""
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [copied(v) for v in value]
    return value


def _openai_takes(model: str, sampling: dict[str, Any]) -> None:
    """Older chat models take no reasoning effort, o3 and o4-mini no `stop`.

    LiteLLM knows retired o-series models no more. Source:
    https://platform.openai.com/docs/api-reference/chat/create (2026-11-25).
    """
    if _OPENAI_CHATS.match(model):
        sampling.pop("reasoning_effort", None)
    if _OPENAI_REASONS.match(model):
        if "max_tokens" in sampling:
            sampling["max_completion_tokens"] = sampling.pop("max_tokens")
        sampling.pop("temperature", None)
        sampling.pop("top_p", None)
    if _OPENAI_NEVER_STOPS.match(model):
        sampling.pop("stop", None)


def _anthropic_takes(model: str, sampling: dict[str, Any]) -> None:
    """No temperature while it thinks, and more tokens than it thinks with.

    Models since Claude 4 take temperature or top_p, but not both. Sources, 2026-11-23:
    https://docs.anthropic.com/en/docs/build-with-claude/extended-thinking,
    https://docs.anthropic.com/en/docs/about-claude/models/migrating-to-claude-4.
    """
    effort = sampling.get("reasoning_effort")
    budget = _ANTHROPIC_BUDGETS.get(str(effort), 0)
    if budget and sampling.get("max_tokens", budget + 1) <= budget:
        del sampling["reasoning_effort"]
    elif effort and effort != "none":
        sampling.pop("temperature", None)
        sampling.pop("top_p", None)
    if "temperature" in sampling and not _ANTHROPIC_TAKES_BOTH.match(model):
        sampling.pop("top_p", None)


def _ollama_takes(model: str, sampling: dict[str, Any]) -> None:
    """400 to `think` for a model that cannot, and to a `stop` that is no list.

    Source: https://github.com/ollama/ollama/blob/main/api/types.go (`Options.FromMap`,
    2026-11-25).
    """
    if not _OLLAMA_THINKS.match(model):
        sampling.pop("reasoning_effort", None)
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]


_TAKES = {
    "openai": _openai_takes,
    "anthropic": _anthropic_takes,
    "ollama": _ollama_takes,
}
"""By provider: leave out what a model refuses, beside another option or at all."""

_OPENAI_CHATS = re.compile(r"(?:ft:)?(?:gpt-[34]|chatgpt-)")
_OPENAI_NEVER_STOPS = re.compile(r"o[34](?:-|$)")
_ANTHROPIC_TAKES_BOTH = re.compile(r"claude-(?:instant|[23])\b")
_OPENAI_REASONS = re.compile(r"(?:ft:)?o[1-9](?:-|:|$)")
_OLLAMA_THINKS = re.compile(
    r"qwen3|deepseek-(?:r1|v3\.1)|gpt-oss|magistral|cogito|phi4-.*reasoning|glm|kimi",
    re.IGNORECASE,
)
# What LiteLLM turns an effort into (litellm/constants.py, 1.105 to 1.109).
_ANTHROPIC_BUDGETS = {"minimal": 1024, "low": 1024, "medium": 2048, "high": 4096}


# What a message may hold, as a list of what is harmless: LiteLLM fetches the URLs of an
# assistant's `images` by itself, on the event loop (_gemini_convert_messages_with_history
# in its llms/vertex_ai/gemini/transformation.py, 1.105 to 1.109).
_OPENAI_KEYS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio"}
)
_KEYS = _OPENAI_KEYS | {
    "cache_control",
    "function_call",
    "prefix",
    "provider_specific_fields",
}


def _openai_messages(
    messages: Sequence[Mapping[str, Any]], provider: Provider
) -> list[dict[str, Any]]:
    shaped = []
    for message in messages:
        made = {k: v for k, v in message.items() if k in _OPENAI_KEYS}
        if made["role"] in {"system", "developer"}:
            made["role"] = provider.system_role
        if made["role"] == "tool":
            made.pop("name", None)
        if made.get("tool_calls"):
            made["tool_calls"] = [
                {k: v for k, v in call.items() if k in {"id", "type", "function"}}
                for call in made["tool_calls"]
            ]
        made["content"] = _without_cache_control(made.get("content"))
        shaped.append(made)
    return shaped


def _without_cache_control(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {k: v for k, v in part.items() if k != "cache_control"}
        if isinstance(part, Mapping)
        else part
        for part in content
    ]


_PLAIN_KEYS = _KEYS | {"reasoning_content"}


def _plain_messages(
    messages: Sequence[Mapping[str, Any]], provider: Provider
) -> list[dict[str, Any]]:
    shaped = []
    for message in messages:
        made = {k: v for k, v in message.items() if k in _PLAIN_KEYS}
        if made["role"] == "developer":
            made["role"] = "system"
        made["content"] = _without_cache_control(made.get("content"))
        shaped.append(made)
    return shaped


_HEADED_KEYS = _KEYS | {"thinking_blocks"}


def _headed_messages(
    messages: Sequence[Mapping[str, Any]], provider: Provider
) -> list[dict[str, Any]]:
    """Put all system prompts into one in front, and let a user speak first.

    Anthropic and Google take one system prompt, outside the conversation, and a
    conversation that begins with the user.
    """
    system: list[Any] = []
    spoken: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] in {"system", "developer"}:
            content = message["content"]
            system += (
                [{"type": "text", "text": content}]
                if isinstance(content, str)
                else content
            )
        else:
            spoken.append({k: v for k, v in message.items() if k in _HEADED_KEYS})
    if spoken and spoken[0]["role"] == "assistant":
        spoken.insert(0, {"role": "user", "content": "."})
    if not system:
        return spoken
    plain = all(set(part) == {"type", "text"} for part in system)
    joined = "\n\n".join(part["text"] for part in system) if plain else system
    return [{"role": "system", "content": joined}, *spoken]


def _google_messages(
    messages: Sequence[Mapping[str, Any]], provider: Provider
) -> list[dict[str, Any]]:
    shaped = _headed_messages(messages, provider)
    for message in shaped:
        message.pop("thinking_blocks", None)
        message["content"] = _without_cache_control(message.get("content"))
    return shaped


_MESSAGES = {
    "openai": _openai_messages,
    "anthropic": _headed_messages,
    "google": _google_messages,
    "ollama": _plain_messages,
}
