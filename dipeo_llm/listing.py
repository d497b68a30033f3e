"""Asks each provider for the models that it offers. LiteLLM has no such question.

Knows the listing endpoints and their paging; an adapter asks them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.errors import InvalidRequestError, ServiceUnavailableError

_Page = Mapping[str, Any]


def _google_next(page: _Page) -> dict[str, Any] | None:
    token = page.get("nextPageToken")
    return {"pageToken": token} if token else None


def _anthropic_next(page: _Page) -> dict[str, Any] | None:
    last = page.get("last_id")
    return {"after_id": last} if page.get("has_more") and last else None


def _no_next(page: _Page) -> dict[str, Any] | None:
    return None


@dataclass(frozen=True, slots=True)
class _List:
    path: str
    rows: str
    """The field that holds the rows."""
    name: str
    """The field of a row that holds the name."""
    query: Mapping[str, Any] = field(default_factory=dict)
    following: Callable[[_Page], dict[str, Any] | None] = _no_next
    may_be_left_out: bool = False
    """Whether an empty list is left out, or written as null."""


# Sources, read 2026-11-23: https://platform.openai.com/docs/api-reference/models/list,
# https://docs.anthropic.com/en/api/models-list,
# https://ai.google.dev/api/models#method:-models.list,
# https://github.com/ollama/ollama/blob/main/docs/api.md#list-local-models
_LISTS = {
    "openai": _List("/models", "data", "id"),
    "anthropic": _List("/v1/models", "data", "id", {"limit": 1000}, _anthropic_next),
    "google": _List(
        "/models", "models", "name", {"pageSize": 1000}, _google_next, True
    ),
    "ollama": _List("/api/tags", "models", "name", may_be_left_out=True),
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
    listed = _LISTS[provider.format]
    found: set[str] = set()
    after: dict[str, Any] | None = {}
    for _ in range(pages):
        if after is None:
            break
        asked = urlencode({**listed.query, **after})
        path = f"{listed.path}?{asked}" if asked else listed.path
        # The page is in no frame of an error, as none shows what came.
        names, after = _read(listed, await adapter.ask(path))
        if names is None:
            raise ServiceUnavailableError(
                f"{provider.name} answered 200, but not with a list of models",
                status_code=200,
                service=provider.name,
            )
        found.update(names)
    return sorted(found)


def _read(listed: _List, page: _Page) -> tuple[list[str] | None, dict[str, Any] | None]:
    """Return the names of a page, None for no list, and how to ask for the next page."""
    rows = page.get(listed.rows)
    if rows is None and listed.may_be_left_out:
        return [], None
    names = [
        row.get(listed.name) if isinstance(row, Mapping) else None
        for row in (rows if isinstance(rows, list) else [None])
    ]
    if not all(isinstance(name, str) for name in names):
        return None, None
    return [str(n).removeprefix("models/") for n in names], listed.following(page)
