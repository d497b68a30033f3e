"""Counts the tokens of a request before it is sent, by whoever can.

Knows the providers' counting endpoints; uses an adapter's client to reach them.
"""

from collections.abc import Callable
from typing import Any

from dipeo_llm import listing, translation
from dipeo_llm.adapter import BaseLLMAdapter
from dipeo_llm.domain import ChatRequest, TokenCount
from dipeo_llm.errors import ModelNotFoundError
from dipeo_llm.litellm_gate import load_litellm
from dipeo_llm.shape import Shape, shape

_ANTHROPIC = ("model", "messages", "system", "tools", "tool_choice", "thinking")
_GOOGLE = ("contents", "tools")
_OPENAI = ("model", "input", "tools", "tool_choice")


def _pick(body: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: body[name] for name in names if name in body}


def _anthropic_body(model: str, body: dict[str, Any]) -> dict[str, Any]:
    return _pick(body, _ANTHROPIC)


def _google_body(model: str, body: dict[str, Any]) -> dict[str, Any]:
    if not set(body) - {"contents"}:
        return _pick(body, _GOOGLE)
    whole = {k: v for k, v in body.items() if k != "generationConfig"}
    return {"generateContentRequest": {"model": f"models/{model}", **whole}}


def _openai_body(model: str, body: dict[str, Any]) -> dict[str, Any]:
    return _pick(body, _OPENAI)


# Sources, read 2026-11-23:
# https://platform.openai.com/docs/api-reference/responses/input-tokens
# https://docs.anthropic.com/en/api/messages-count-tokens
# https://ai.google.dev/api/tokens#method:-models.counttokens
_ENDPOINTS: dict[
    str, tuple[str, str, Callable[[str, dict[str, Any]], dict[str, Any]]]
] = {
    "openai": ("/responses/input_tokens", "input_tokens", _openai_body),
    "anthropic": ("/v1/messages/count_tokens", "input_tokens", _anthropic_body),
    "google": ("/models/{model}:countTokens", "totalTokens", _google_body),
}


async def count(adapter: BaseLLMAdapter, request: ChatRequest) -> TokenCount:
    """Count the input tokens of a request.

    A server that has no such endpoint, as a local one behind OpenAI's format, answers
    404: then LiteLLM's tokenizer counts, as it does for Ollama.

    Raises:
        APIKeyError, LLMServiceError: As the provider answers.
    """
    provider, model = adapter.provider, adapter.model_name
    litellm = await load_litellm()
    shaped = shape(provider, model, request)
    endpoint = _ENDPOINTS.get(provider.name)
    if endpoint is not None and adapter.endpoint.base_url is not None:
        path, answer, pick = endpoint
        form = "responses" if provider.name == "openai" else shaped.format
        outgoing = translation.translate(
            litellm, provider, model, _as(shaped, form), stream=False
        )
        try:
            found = await listing.ask(
                adapter,
                path.format(model=model),
                pick(model, outgoing.body),
                outgoing.headers,
            )
        except ModelNotFoundError:
            found = {}
        if isinstance(found.get(answer), int):
            return TokenCount(tokens=found[answer], source="provider")
    tokens = litellm.token_counter(
        model=model,
        messages=shaped.messages,
        tools=shaped.parameters.get("tools"),
    )
    return TokenCount(tokens=int(tokens), source="tokenizer")


def _as(shaped: Shape, form: str | None) -> Shape:
    return Shape(form, shaped.messages, shaped.parameters, shaped.extra_body)
