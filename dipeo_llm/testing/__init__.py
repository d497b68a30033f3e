"""Doubles for a provider, for the tests of applications.

`MockLLMAdapter` answers from a script, `use_cassette` from a recording of a real
exchange. `assert_request` checks the requests, and `block_network` fails a test that
opens any other connection. Only the cassettes need `dipeo-llm[testing]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dipeo_llm.testing.cassettes import (
        CassetteError,
        CassetteMismatchError,
        CassetteUnusedError,
        SecretLeftError,
        StaleCassetteWarning,
        use_cassette,
    )
    from dipeo_llm.testing.mock import (
        MockLLMAdapter,
        MockRequest,
        Reply,
        ScriptError,
        assert_request,
    )
    from dipeo_llm.testing.network_guard import NetworkBlockedError, block_network

__all__ = [
    "CassetteError",
    "CassetteMismatchError",
    "CassetteUnusedError",
    "MockLLMAdapter",
    "MockRequest",
    "NetworkBlockedError",
    "Reply",
    "ScriptError",
    "SecretLeftError",
    "StaleCassetteWarning",
    "assert_request",
    "block_network",
    "use_cassette",
]

_MODULES = {
    "MockLLMAdapter": "mock",
    "MockRequest": "mock",
    "NetworkBlockedError": "network_guard",
    "Reply": "mock",
    "ScriptError": "mock",
    "assert_request": "mock",
    "block_network": "network_guard",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        # Lazily, because the cassettes import vcrpy and pytest.
        module = import_module(f"{__name__}.{_MODULES.get(name, 'cassettes')}")
        return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
