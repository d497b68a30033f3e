"""Say whether a real provider would accept a request, by its own documentation.

One module a provider, each with `complaints(method, path, headers, body)`. They are the
oracle of the tests: written from the providers' pages, which each rule names with a
date, and importing neither this package nor LiteLLM. A rule for a series of models is
a regular expression or a row of a table; a model that no row names gets the general
rules only.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tests.provider_rules import anthropic, gemini, ollama, openai, openai_responses
from tests.provider_rules.schemas import lost, refused

_BY_NAME = {
    "anthropic": anthropic,
    "google": gemini,
    "gemini": gemini,
    "ollama": ollama,
}


def _rules(provider: str, path: str) -> ModuleType:
    if provider == "openai":
        responses = path.partition("?")[0].endswith("/responses")
        return openai_responses if responses else openai
    return _BY_NAME[provider]


def violations_of(
    provider: str,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
) -> list[str]:
    """Return what the provider would refuse, one short sentence each.

    Args:
        provider: openai, anthropic, google (or gemini) or ollama.
        method: The HTTP method.
        path: The path with its query, from the root of the host.
        headers: The request's headers; the case of a name does not matter.
        body: The decoded JSON body.

    Returns:
        Sentences that begin with the path of the field; empty if all is well.

    Raises:
        KeyError: No rules are written for the provider.
    """
    return refused(_rules(provider, path).complaints(method, path, headers, body))


def losses_of(
    provider: str,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
) -> list[str]:
    """Return what the provider would accept and pass over, one short sentence each.

    A field that Ollama does not know, a keyword that Gemini does not read: the request
    succeeds, and does not have the effect that the caller asked for. Arguments, form
    and errors are those of `violations_of`.
    """
    return lost(_rules(provider, path).complaints(method, path, headers, body))
