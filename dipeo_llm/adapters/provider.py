"""A provider as a row of data, and the records with which an adapter describes itself.

Pure data: knows no LiteLLM, no network and no other provider.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dipeo_llm.media import MediaRules


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One provider."""

    name: str
    """The name in results, errors and settings."""
    litellm: str
    """LiteLLM's name for it."""
    aliases: tuple[str, ...] = ()
    """Other names, as a service or as the prefix of a model string."""
    base_url: str | None = None
    """The provider's address; None where only a key record or LiteLLM has one."""
    base_url_example: str | None = None
    """A base URL to be filled in, where only its user knows the address."""
    path: str = ""
    """Appended to a base URL that has no path."""
    key_header: str = "authorization"
    """The header that carries the key; "authorization" carries a Bearer token."""
    needs_key: bool = True
    key_variables: tuple[str, ...] = ()
    """Environment variables that hold the key; the first one that is set wins."""
    system_role: str = "system"
    """The role of a system prompt in the request's body."""
    client: Literal["sdk", "handler"] | None = "handler"
    """What `litellm.acompletion` takes as `client=` for it: an `AsyncOpenAI` ("sdk") or
    LiteLLM's `AsyncHTTPHandler`; None if it uses a client of its own."""
    speaks_openai: bool = False
    """Whether a provider without an adapter of its own speaks OpenAI's format."""
    extra_headers: tuple[tuple[str, str], ...] = ()
    """Headers that the provider requires beside its format's."""
    most_stops: int | None = None
    """Most texts of `stop`; None if no limit is known."""
    highest_temperature: float | None = None
    """None if no limit is known."""
    has_prices: bool = True
    """Whether its tokens have a price; False for models that run locally."""
    claims: re.Pattern[str] = re.compile(r"(?!)")
    """Bare model names that belong to this provider."""
    media: MediaRules = field(default_factory=MediaRules)
    """The pictures, files and sounds that its models take."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the provider, its own first."""
        return (self.name, self.litellm, *self.aliases)

    def find_base_url(self, base_urls: Mapping[str, str]) -> str | None:
        """Return the base URL that is set under one of the names, or None.

        Dashes count as underscores: a variable's name cannot have a dash.
        """
        if not base_urls or self.name in base_urls:
            return base_urls.get(self.name)
        urls = {
            # A member of a string enum may stand for a name.
            _plain(str(getattr(name, "value", name))): url
            for name, url in base_urls.items()
        }
        plain = map(_plain, self.names)
        return next((urls[name] for name in plain if name in urls), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


Page = Mapping[str, Any]
"""One page of a list of models."""


def no_next_page(page: Page) -> dict[str, Any] | None:
    """Return None: the list has one page."""
    return None


@dataclass(frozen=True, slots=True)
class ModelList:
    """Where a format lists its models, and how to read a page."""

    path: str
    rows: str
    """The field of a page that holds the rows."""
    name: str
    """The field of a row that holds the model's name."""
    query: Mapping[str, Any] = field(default_factory=dict)
    next_page: Callable[[Page], dict[str, Any] | None] = no_next_page
    """Returns the query of the page that follows, None after the last one."""
    is_optional: bool = False
    """Whether an empty list is left out of the page, or is null."""


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """Where a provider counts the input tokens of a request."""

    path: str
    """Below the base URL; `{model}` stands for the model's name, quoted."""
    answer: str
    """The field of the answer that holds the number."""
    takes: frozenset[str]
    """The fields of a request's body that the endpoint takes."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A model and the body fields that a translation for it must fill."""

    model: str
    fields: tuple[str, ...]
