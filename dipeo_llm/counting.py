"""Counts the tokens of a request before it is sent, by whoever can.

Knows the providers' counting endpoints; an adapter asks them.
"""

from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from dipeo_llm import litellm_tables as litellm_gate
from dipeo_llm.adapters import failures, translation
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.request import shape
from dipeo_llm.domain import ChatRequest, TokenCount
from dipeo_llm.errors import InvalidRequestError, LLMServiceError


@dataclass(frozen=True, slots=True)
class _Endpoint:
    path: str
    answer: str
    """The field that holds the number."""
    takes: frozenset[str]
    """What of a request's body it takes."""
    format: str
    """Whose words the body is in."""


# Sources, read 2026-11-23:
# https://platform.openai.com/docs/api-reference/responses/input-tokens
# https://docs.anthropic.com/en/api/messages-count-tokens
# https://ai.google.dev/api/tokens#method:-models.counttokens
_ENDPOINTS = {
    "openai": _Endpoint(
        "/responses/input_tokens",
        "input_tokens",
        frozenset({"model", "input", "tools", "tool_choice"}),
        "responses",
    ),
    "anthropic": _Endpoint(
        "/v1/messages/count_tokens",
        "input_tokens",
        frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking"}),
        "anthropic",
    ),
    "google": _Endpoint(
        "/models/{model}:countTokens",
        "totalTokens",
        frozenset({"contents", "tools", "toolConfig", "system_instruction"}),
        "google",
    ),
}


async def count(adapter: BaseLLMAdapter, request: ChatRequest) -> TokenCount:
    """Count the input tokens of a request.

    LiteLLM's tokenizer counts for Ollama, and for a server that speaks a provider's
    format without this endpoint of it.

    Raises:
        InvalidRequestError: It cannot be translated, or holds what cannot be counted.
        APIKeyError, LLMServiceError: As the provider answers.
    """
    endpoint = _ENDPOINTS.get(adapter.provider.name)
    if endpoint is not None and adapter.endpoint.base_url is not None:
        tokens = await _asked(adapter, request, endpoint)
        if isinstance(tokens, int):
            return TokenCount(tokens=tokens, source="provider")
    shaped = shape(adapter.provider, adapter.model_name, request)
    tools = shaped.parameters.get("tools")
    try:
        tokens = await litellm_gate.count_tokens(
            adapter.model_name, shaped.messages, tools
        )
    except Exception as exc:
        raise _uncountable(adapter, exc) from exc
    return TokenCount(tokens=tokens, source="tokenizer")


def _uncountable(adapter: BaseLLMAdapter, exc: Exception) -> InvalidRequestError:
    return InvalidRequestError(
        f"the request cannot be counted, nothing was sent: {failures.clean(str(exc))}",
        service=adapter.provider.name,
        model=adapter.model_name,
    )


async def _asked(
    adapter: BaseLLMAdapter, request: ChatRequest, endpoint: _Endpoint
) -> Any:
    """Ask the provider; None if there is no such endpoint."""
    provider, model = adapter.provider, adapter.model_name
    litellm = await litellm_gate.load_litellm()
    shaped = replace(shape(provider, model, request), format=endpoint.format)
    try:
        outgoing = translation.translate(litellm, provider, model, shaped, stream=False)
    except Exception as exc:
        raise _uncountable(adapter, exc) from exc
    body = {k: v for k, v in outgoing.body.items() if k in endpoint.takes}
    if endpoint.format == "google" and set(body) > {"contents"}:
        # A system prompt and tools count only inside a whole request.
        body = {"generateContentRequest": {"model": f"models/{model}", **body}}
    path = endpoint.path.format(model=quote(model, safe="/"))
    try:
        return (await adapter.ask(path, body, outgoing.headers)).get(endpoint.answer)
    except LLMServiceError as exc:
        # A local server: vLLM answers 405, LM Studio 200 and an error
        # (https://github.com/vllm-project/vllm/issues/49533, 2026-11-25).
        local = adapter.endpoint.base_url != provider.base_url
        if exc.status_code in {404, 405, 501} or (local and exc.status_code == 200):
            return None
        raise
