"""Keys: where they come from, and how they are held so that nothing prints them.

Reads the environment for keys and for nothing else.
"""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from dipeo_llm.adapters.factory import PROVIDERS, by_name, of_key
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.client import fits_a_header
from dipeo_llm.errors import APIKeyError, APIKeyNotFoundError
from dipeo_llm.ports import APIKeyPort


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the rest of the package holds it."""

    secret: SecretStr | None
    """None for a record that is none."""
    service: str | None = None
    base_url: str | None = None


NO_KEY = Key(SecretStr(""))


async def find_key(
    port: APIKeyPort, api_key_id: str | None, provider: Provider | None
) -> Key:
    """Ask the application for a key and wrap it.

    Args:
        port: Where keys are kept.
        api_key_id: The key's name.
        provider: Whose key it is to be; None where the key's own record decides.

    Raises:
        APIKeyNotFoundError: No id, or an empty key, for a provider that needs one.
        APIKeyError: The application does not know the id.
    """
    needed = provider is None or provider.needs_key
    service = provider.name if provider else None
    if api_key_id is None or api_key_id == "":
        if needed:
            raise APIKeyNotFoundError(
                f"{service or 'this call'} needs a key: give the api_key_id of one",
                service=service,
            )
        return NO_KEY
    try:
        key = await _read(port, api_key_id)
    except Exception as exc:
        if not needed and (isinstance(exc, APIKeyError) or _is_key_error(exc)):
            return NO_KEY
        raise
    if provider and key.service and not key.base_url:
        owner = by_name(key.service)
        if owner.name != provider.name:
            if not needed:
                return NO_KEY
            raise APIKeyError(
                f"key {api_key_id!r} is {owner.name}'s and was not sent to"
                f" {provider.name}",
                service=service,
            )
    _check(key, api_key_id, service, needed=needed)
    return key


def _check(key: Key, api_key_id: str, service: str | None, *, needed: bool) -> None:
    if key.secret is None:
        raise APIKeyError(
            f"the record of key {api_key_id!r} is no mapping with a text under 'key'",
            service=service,
        )
    if needed and not key.secret:
        raise APIKeyNotFoundError(f"key {api_key_id!r} is empty", service=service)
    if not fits_a_header(key.secret):
        # It would break the header that carries it, in an error that shows it.
        raise APIKeyError(
            f"key {api_key_id!r} holds a character that no header can carry",
            service=service,
        )


async def _read(port: APIKeyPort, api_key_id: str) -> Key:
    """Read a record and wrap its key, so that no other frame ever holds it bare."""
    found = port.get_api_key(api_key_id)
    record = await found if inspect.isawaitable(found) else found
    # A port of the application's may return anything, a row of a database among it.
    if not hasattr(record, "keys"):
        return Key(None)
    fields: dict[str, Any] = dict(record)
    named = fields.get("service")
    return Key(
        _wrapped(fields.pop("key", None) or ""),
        service=str(getattr(named, "value", named)) if named else None,
        base_url=fields.get("base_url") or None,
    )


def _wrapped(secret: Any) -> SecretStr | None:
    if isinstance(secret, SecretStr):
        secret = secret.get_secret_value()
    return SecretStr(secret.strip()) if isinstance(secret, str) else None


def _is_key_error(exc: Exception) -> bool:
    """Tell the application's own APIKeyError, which is not ours, by its name."""
    return any(c.__name__ == "APIKeyError" for c in type(exc).__mro__)


class EnvironmentAPIKeys:
    """Finds a provider's key in its usual variable.

    An id is the variable's name (`OPENAI_API_KEY`), the provider's (`openai`), or
    begins with the provider's (`openai_key`, `anthropic-team-a`). The variable is read
    at each call, so a rotated key is seen.
    """

    def get_api_key(self, api_key_id: str) -> Mapping[str, Any]:
        """Return the record of a key.

        Raises:
            APIKeyNotFoundError: The id names no provider, or its variable is not set.
        """
        provider = of_key(api_key_id)
        if provider is None:
            known = ", ".join(row.name for row in PROVIDERS if row.key_variables)
            raise APIKeyNotFoundError(
                f"{_shown(api_key_id)} names no provider; an id begins with one of"
                f" {known}"
            )
        named = str(api_key_id).strip().upper()
        variables = provider.key_variables
        for variable in (named,) if named in variables else variables:
            if key := os.environ.get(variable):
                return {"id": api_key_id, "service": provider.name, "key": key}
        if not provider.needs_key:
            return {"id": api_key_id, "service": provider.name, "key": ""}
        raise APIKeyNotFoundError(
            f"set {' or '.join(variables) or 'a key'} for {api_key_id!r}",
            service=provider.name,
        )


class StaticAPIKeys:
    """Holds keys that the application already has.

    Args:
        mapping: Key id to the key itself, or to a record with `key` and, where wanted,
            `service`, `base_url` and `label`.
    """

    def __init__(
        self, mapping: Mapping[str, str | SecretStr | Mapping[str, Any]]
    ) -> None:
        self._records: dict[str, dict[str, Any]] = {}
        for api_key_id, value in mapping.items():
            record = dict(value) if isinstance(value, Mapping) else {"key": value}
            key = record.get("key", "")
            record["key"] = key if isinstance(key, SecretStr) else SecretStr(key)
            self._records[api_key_id] = {"id": api_key_id, **record}

    def __repr__(self) -> str:
        return f"StaticAPIKeys({sorted(self._records)})"

    def get_api_key(self, api_key_id: str) -> Mapping[str, Any]:
        """Return the record of a key.

        Raises:
            APIKeyNotFoundError: The id is unknown.
        """
        record = self._records.get(api_key_id)
        if record is None:
            known = ", ".join(sorted(self._records)) or "none"
            raise APIKeyNotFoundError(
                f"no key {_shown(api_key_id)}; known are: {known}"
            )
        return {**record, "key": record["key"].get_secret_value()}


def _shown(api_key_id: Any) -> str:
    """Return an id for a message, unless somebody gave the key in place of its id."""
    text = str(api_key_id)
    is_key = len(text) > 64 or re.search(
        r"\b(?:sk-|AIza|AQ\.|gsk_|xai-|key-|hf_|pplx-|r8_|nvapi-)|[0-9a-f]{32}", text
    )
    return "what looks like a key, not the id of one," if is_key else repr(text)
