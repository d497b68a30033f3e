"""Finds keys, and wraps them so that nothing prints them.

Reads the environment for keys and for nothing else.
"""

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from dipeo_llm.adapters.factory import by_name, of_key, own_of_key, unknown_key
from dipeo_llm.client import fits_a_header
from dipeo_llm.errors import APIKeyError, APIKeyNotFoundError
from dipeo_llm.key_shapes import is_like_key
from dipeo_llm.litellm_import import load_litellm
from dipeo_llm.ports import APIKeyPort, APIKeyRecord


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the rest of the package holds it."""

    secret: SecretStr | None
    """None if the record is not a mapping with a text under "key"."""
    service: str | None = None
    base_url: str | None = None


NO_KEY = Key(SecretStr(""))


async def find_key(
    port: APIKeyPort,
    api_key_id: str | None,
    *,
    service: str | None,
    needs_key: bool,
    owner: Callable[[str], str],
    is_local: Callable[[str], bool] = lambda base_url: False,
    base_url: str | None = None,
) -> Key:
    """Ask the application for a key and wrap it.

    Without an id, `EnvironmentAPIKeys` is asked for the provider's usual variable. It is
    not asked for a hosted provider's key if the call goes to a server on this machine.

    Args:
        port: The application's keys.
        api_key_id: The key's id.
        service: The provider that is called; None if the key's record decides.
        needs_key: False for a server that can be called without a key.
        owner: Returns a provider's own name for any of its names.
        is_local: Says whether a record's base URL is a server that needs no key.
        base_url: Where the call goes; None is the record's, or the provider's.

    Raises:
        APIKeyNotFoundError: There is no id, or the key is empty, and one is needed.
        APIKeyError: The id is unknown, or the key belongs to another provider.
    """
    given = api_key_id or _usual_id(port, service, needs_key=needs_key)
    if given is None:
        return NO_KEY
    if isinstance(port, EnvironmentAPIKeys) and own_of_key(given) is None:
        await load_litellm()  # it knows the other providers' variables
    try:
        key = await _read(port, given)
    except Exception as exc:
        is_missing = isinstance(exc, APIKeyError) or is_key_error(exc)
        if is_missing and service is not None and not by_name(service).needs_key:
            return NO_KEY
        raise
    belongs_to = owner(key.service) if key.service else None
    # A base URL of its own says where the key may go, whatever the service is called.
    goes_there = key.base_url is not None and base_url in {None, key.base_url}
    is_for_all = goes_there or _is_shared(port, given, service)
    if service and belongs_to and belongs_to != service and not is_for_all:
        if not needs_key:
            return NO_KEY
        raise APIKeyError(
            f"key {given!r} belongs to {belongs_to} and was not sent to {service}",
            service=service,
        )
    to = base_url or key.base_url
    needs_key = needs_key and not (to and is_local(to))
    _check(key, given, service, needs_key=needs_key)
    return key


def _usual_id(port: APIKeyPort, service: str | None, *, needs_key: bool) -> str | None:
    """Return the id of the environment's key for a provider; None for no key.

    Raises:
        APIKeyNotFoundError: A key is needed, and the application must say which.
    """
    is_own = service is not None and (needs_key or not by_name(service).needs_key)
    if is_own and isinstance(port, EnvironmentAPIKeys):
        return service
    if needs_key:
        raise APIKeyNotFoundError(
            f"{service or 'this call'} needs a key; pass its api_key_id",
            service=service,
        )
    return None


def _is_shared(port: APIKeyPort, api_key_id: str, service: str | None) -> bool:
    """Say whether a variable is this provider's as well, as DASHSCOPE_API_KEY may be."""
    is_environment = isinstance(port, EnvironmentAPIKeys) and service is not None
    return is_environment and (
        api_key_id.strip().upper() in by_name(service).key_variables
    )


def _check(key: Key, api_key_id: str, service: str | None, *, needs_key: bool) -> None:
    if key.secret is None:
        raise APIKeyError(
            f"the record of key {api_key_id!r} must be a mapping with a text under"
            " 'key'",
            service=service,
        )
    if needs_key and not key.secret:
        raise APIKeyNotFoundError(f"key {api_key_id!r} is empty", service=service)
    if not fits_a_header(key.secret):
        # The header's own error would show the key.
        raise APIKeyError(
            f"key {api_key_id!r} has a character that an HTTP header cannot carry",
            service=service,
        )


async def _read(port: APIKeyPort, api_key_id: str) -> Key:
    """Read a record and wrap its key, so that no other stack frame holds it bare."""
    found = port.get_api_key(api_key_id)
    record = await found if inspect.isawaitable(found) else found
    # A row of a database has keys, and is not a Mapping.
    if not hasattr(record, "keys"):
        return Key(None)
    fields: dict[str, Any] = dict(record)
    service = fields.get("service")
    return Key(
        _wrap(fields.pop("key", None) or ""),
        service=str(getattr(service, "value", service)) if service else None,
        base_url=fields.get("base_url") or None,
    )


def _wrap(secret: Any) -> SecretStr | None:
    if isinstance(secret, SecretStr):
        secret = secret.get_secret_value()
    return SecretStr(secret.strip()) if isinstance(secret, str) else None


def is_key_error(exc: Exception) -> bool:
    """Recognise the application's own APIKeyError by its name."""
    return any(c.__name__ == "APIKeyError" for c in type(exc).__mro__)


class EnvironmentAPIKeys:
    """Finds a provider's key in its usual variable.

    An id is the variable's name (`OPENAI_API_KEY`), the provider's name (`openai`), or
    begins with it (`openai_key`, `anthropic-team-a`). A call without an id uses its
    provider's name. The variable is read at each call, so that a rotated key is seen.
    """

    def get_api_key(self, api_key_id: str) -> APIKeyRecord:
        """Return the record of a key.

        Raises:
            APIKeyNotFoundError: The id names no provider, or its variable is not set.
        """
        provider = of_key(api_key_id)
        if provider is None:
            raise _not_found(api_key_id, unknown_key(str(api_key_id)))
        name = str(api_key_id).strip().upper()
        variables = provider.key_variables
        for variable in (name,) if name in variables else variables:
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

    A key may be a function without arguments that returns a fresh token, or a coroutine
    with one, such as those of azure-identity and google-auth. It is called before each
    call; one that is not a coroutine runs in a thread, because it may block.

    Args:
        mapping: Key id to the key itself, to a function that returns it, or to its
            record, whose "key" is one of both.
    """

    def __init__(
        self,
        mapping: Mapping[
            str,
            str | SecretStr | Callable[[], Any] | APIKeyRecord | Mapping[str, Any],
        ],
    ) -> None:
        self._records: dict[str, dict[str, Any]] = {}
        for api_key_id, value in mapping.items():
            record: dict[str, Any] = (
                dict(value) if isinstance(value, Mapping) else {"key": value}
            )
            key = record.get("key", "")
            if not isinstance(key, SecretStr) and not callable(key):
                record["key"] = SecretStr(key)
            self._records[api_key_id] = {"id": api_key_id, **record}

    def __repr__(self) -> str:
        return f"StaticAPIKeys({sorted(self._records)})"

    def get_api_key(
        self, api_key_id: str
    ) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Return the record of a key, an `APIKeyRecord`; await it if it has a function.

        Raises:
            APIKeyNotFoundError: The id is unknown.
            Exception: As the function raises.
        """
        record = self._records.get(api_key_id)
        if record is None:
            known = ", ".join(sorted(self._records)) or "none"
            raise _not_found(api_key_id, f"known ids are: {known}")
        key = record["key"]
        if callable(key):
            return _with_token(record, key)
        return {**record, "key": key.get_secret_value()}


async def _with_token(
    record: Mapping[str, Any], function: Callable[[], Any]
) -> Mapping[str, Any]:
    """Return a record with the token that its function returns."""
    if inspect.iscoroutinefunction(function):
        token = await function()
    else:
        token = await asyncio.to_thread(function)
        if inspect.isawaitable(token):
            token = await token
    return {**record, "key": token}


def _not_found(api_key_id: Any, hint: str) -> APIKeyNotFoundError:
    text = str(api_key_id)
    if is_like_key(text):
        return APIKeyNotFoundError(
            "the given api_key_id looks like a key; pass the id under which the key is"
            f" kept ({hint})"
        )
    return APIKeyNotFoundError(f"there is no key {text!r}; {hint}")
