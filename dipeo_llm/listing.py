"""Asks each provider for the models that it offers. LiteLLM has no such question.

Knows the listing endpoints and their paging; uses an adapter's client to reach them.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

from pydantic_core import to_json

from dipeo_llm import failures, wire
from dipeo_llm.adapter import BaseLLMAdapter
from dipeo_llm.errors import (
    InvalidRequestError,
    LLMTimeoutError,
    ServiceUnavailableError,
)
from dipeo_llm.wire import Exchange

_Page = Mapping[str, Any]


def _names(field: str) -> Callable[[_Page], list[str]]:
    def read(page: _Page) -> list[str]:
        return [str(m[field]) for m in page.get("data") or page.get("models") or ()]

    return read


def _google_next(page: _Page) -> dict[str, Any] | None:
    token = page.get("nextPageToken")
    return {"pageToken": token} if token else None


def _anthropic_next(page: _Page) -> dict[str, Any] | None:
    return {"after_id": page["last_id"]} if page.get("has_more") else None


# Path, first query, the names on a page, and the query of the next page.
# Sources, read 2026-11-23: https://platform.openai.com/docs/api-reference/models/list,
# https://docs.anthropic.com/en/api/models-list,
# https://ai.google.dev/api/models#method:-models.list,
# https://github.com/ollama/ollama/blob/main/docs/api.md#list-local-models
_LISTS: dict[
    str,
    tuple[
        str,
        dict[str, Any],
        Callable[[_Page], list[str]],
        Callable[[_Page], dict[str, Any] | None],
    ],
] = {
    "openai": ("/models", {}, _names("id"), lambda page: None),
    "anthropic": ("/v1/models", {"limit": 1000}, _names("id"), _anthropic_next),
    "google": ("/models", {"pageSize": 1000}, _names("name"), _google_next),
    "ollama": ("/api/tags", {}, _names("name"), lambda page: None),
}

_MOST_PAGES = 100


async def models(adapter: BaseLLMAdapter, pages: int = _MOST_PAGES) -> list[str]:
    """Return the names of the provider's models, sorted, without Google's "models/".

    Args:
        adapter: Whose client to use.
        pages: How many pages to read at most.

    Raises:
        InvalidRequestError: The provider has no list that is known here.
        APIKeyError, LLMServiceError: As the provider answers.
    """
    provider = adapter.provider
    if provider.format is None or adapter.endpoint.base_url is None:
        raise InvalidRequestError(
            f"{provider.name} has no list of models that is known here",
            service=provider.name,
        )
    path, query, names, following = _LISTS[provider.format]
    found: set[str] = set()
    after: dict[str, Any] | None = {}
    for _ in range(pages):
        if after is None:
            break
        asked = urlencode({**query, **after})
        page = await ask(adapter, f"{path}?{asked}" if asked else path)
        found.update(name.removeprefix("models/") for name in names(page))
        after = following(page)
    return sorted(found)


async def ask(
    adapter: BaseLLMAdapter,
    path: str,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> _Page:
    """Ask a provider something besides a completion; return the JSON object it answers.

    Args:
        adapter: Whose client and base URL to use.
        path: Below the base URL, with the query.
        body: JSON to post; None gets.
        headers: What the format needs.

    Raises:
        APIKeyError, LLMServiceError: As the provider answers.
    """
    fields: dict[str, Any] = {
        "service": adapter.provider.name,
        "model": adapter.model_name or None,
    }
    exchange = Exchange()
    asked = {"accept": "application/json", **(headers or {})}
    if adapter.provider.format == "anthropic":
        asked["anthropic-version"] = "2023-06-01"
    limit = asyncio.timeout(adapter.settings.timeout)
    try:
        async with limit, await adapter.client() as client:
            response = await client.send(
                "GET" if body is None else "POST",
                f"{adapter.endpoint.base_url}{path}",
                asked,
                None if body is None else to_json(body),
                exchange=exchange,
            )
            async for _ in client.pieces(response, exchange):
                pass
    except TimeoutError as exc:
        if not limit.expired():
            raise wire.from_transport(exc, **fields) from exc
        raise LLMTimeoutError(
            f"{adapter.provider.name} did not answer within"
            f" {adapter.settings.timeout:g} s",
            **fields,
        ) from None
    except Exception as exc:
        raise wire.from_transport(exc, **fields) from exc
    answer = bytes(exchange.body)
    if response.status != 200:
        raise failures.from_answer(
            response.status,
            response.headers,
            answer,
            secret=adapter.endpoint.secret.get_secret_value(),
            **fields,
        )
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServiceUnavailableError(
            f"{adapter.provider.name} answered 200, but not with a JSON object",
            status_code=response.status,
            **fields,
        )
    return found
