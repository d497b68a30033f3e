"""Keys: where they are found, and that they are seen by nobody but the provider."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from dipeo_llm.adapters.factory import by_name
from dipeo_llm.domain import LLMService
from dipeo_llm.errors import APIKeyError, APIKeyNotFoundError
from dipeo_llm.keys import NO_KEY, EnvironmentAPIKeys, Key, StaticAPIKeys, find_key
from dipeo_llm.ports import APIKeyPort
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from tests.provider_server import ProviderServer

USER = [{"role": "user", "content": "hello"}]
PACKAGE = Path(find_key.__code__.co_filename).parent


class Vault:
    """An application's own store of keys; every answer is made by a function."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer = answer

    def get_api_key(
        self, api_key_id: str
    ) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Return what the function makes of the id."""
        found: Mapping[str, Any] = self.answer(api_key_id)
        return found


def foreign_key_error(name: str) -> type[Exception]:
    """Make an application's own error class, which is not this package's."""
    return type(name, (Exception,), {})


def failing(error: Exception) -> Vault:
    """Make a store that fails at every id."""

    def fail(api_key_id: str) -> Mapping[str, Any]:
        raise error

    return Vault(fail)


async def find(port: Any, api_key_id: str | None = "id", **asked: Any) -> Key:
    """Find a key as the service does, for OpenAI where nothing else is said."""
    asked.setdefault("service", "openai")
    asked.setdefault("needs_key", True)
    return await find_key(
        port, api_key_id, owner=lambda name: by_name(name).name, **asked
    )


@pytest.mark.parametrize(
    ("api_key_id", "variable", "service"),
    [
        ("openai", "OPENAI_API_KEY", "openai"),
        ("openai_key", "OPENAI_API_KEY", "openai"),
        ("OpenAI-team-a", "OPENAI_API_KEY", "openai"),
        ("OPENAI_API_KEY", "OPENAI_API_KEY", "openai"),
        (LLMService.OPENAI, "OPENAI_API_KEY", "openai"),
        ("anthropic", "ANTHROPIC_API_KEY", "anthropic"),
        ("claude", "ANTHROPIC_API_KEY", "anthropic"),
        ("ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY", "anthropic"),
        ("google", "GEMINI_API_KEY", "google"),
        ("google", "GOOGLE_API_KEY", "google"),
        ("gemini_key", "GEMINI_API_KEY", "google"),
        ("GOOGLE_API_KEY", "GOOGLE_API_KEY", "google"),
        ("deepseek", "DEEPSEEK_API_KEY", "deepseek"),
    ],
    ids=repr,
)
def test_an_id_leads_to_the_usual_variable(
    monkeypatch: pytest.MonkeyPatch, api_key_id: str, variable: str, service: str
) -> None:
    """A provider's key is found under the provider's name, or the variable's."""
    monkeypatch.setenv(variable, "sk-1")

    record = EnvironmentAPIKeys().get_api_key(api_key_id)

    assert record == {"id": api_key_id, "service": service, "key": "sk-1"}


@pytest.mark.parametrize(
    ("gemini", "google", "key"), [("a", "b", "a"), ("", "b", "b"), ("a", "", "a")]
)
def test_gemini_api_key_wins_over_google_api_key(
    monkeypatch: pytest.MonkeyPatch, gemini: str, google: str, key: str
) -> None:
    """Of Google's two variables the first one that is not empty counts."""
    monkeypatch.setenv("GEMINI_API_KEY", gemini)
    monkeypatch.setenv("GOOGLE_API_KEY", google)

    assert EnvironmentAPIKeys().get_api_key("google")["key"] == key


def test_a_rotated_variable_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is changed in the environment is used from the next call on."""
    keys = EnvironmentAPIKeys()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-old")
    before = keys.get_api_key("openai")["key"]

    monkeypatch.setenv("OPENAI_API_KEY", "sk-new")

    assert (before, keys.get_api_key("openai")["key"]) == ("sk-old", "sk-new")


@pytest.mark.parametrize(
    ("api_key_id", "variables"),
    [
        ("openai", ["OPENAI_API_KEY"]),
        ("anthropic_key", ["ANTHROPIC_API_KEY"]),
        ("google", ["GEMINI_API_KEY", "GOOGLE_API_KEY"]),
    ],
)
def test_a_missing_variable_is_named(api_key_id: str, variables: list[str]) -> None:
    """Whoever forgot to set a key learns which variable holds it."""
    with pytest.raises(APIKeyNotFoundError) as caught:
        EnvironmentAPIKeys().get_api_key(api_key_id)

    assert [name for name in variables if name not in str(caught.value)] == []


@pytest.mark.parametrize("api_key_id", ["", "my_openai_key", "mistress", "42", "key"])
def test_an_id_that_names_no_provider_is_an_error(api_key_id: str) -> None:
    """An id that begins with no provider's name says which names there are."""
    with pytest.raises(
        APIKeyNotFoundError, match="openai, deepseek, anthropic, google"
    ):
        EnvironmentAPIKeys().get_api_key(api_key_id)


def test_ollama_needs_no_variable_and_reads_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key for some hosted Ollama in the environment is not sent to the local one."""
    monkeypatch.setenv("OLLAMA_API_KEY", "sk-1")

    record = EnvironmentAPIKeys().get_api_key("ollama")

    assert record == {"id": "ollama", "service": "ollama", "key": ""}


@pytest.mark.parametrize(
    ("value", "record"),
    [
        ("sk-1", {"id": "a", "key": "sk-1"}),
        (SecretStr("sk-1"), {"id": "a", "key": "sk-1"}),
        (
            {"key": "sk-1", "service": "openai", "base_url": "http://x", "label": "A"},
            {
                "id": "a",
                "key": "sk-1",
                "service": "openai",
                "base_url": "http://x",
                "label": "A",
            },
        ),
        ({"key": SecretStr("sk-1")}, {"id": "a", "key": "sk-1"}),
        ({"service": "ollama"}, {"id": "a", "key": "", "service": "ollama"}),
    ],
)
def test_static_keys_are_given_back_as_records(value: Any, record: Any) -> None:
    """A key that the application holds is found under its id, as a record."""
    assert StaticAPIKeys({"a": value}).get_api_key("a") == record


def test_static_keys_are_their_own_copy() -> None:
    """Neither the mapping that they were made of nor a record changes them later."""
    mapping = {"a": {"key": "sk-1"}}
    keys = StaticAPIKeys(mapping)
    untouched = mapping == {"a": {"key": "sk-1"}}

    mapping["a"]["key"] = "sk-2"
    record: Any = keys.get_api_key("a")
    record["key"] = "sk-3"

    assert untouched
    again: Any = keys.get_api_key("a")
    assert again["key"] == "sk-1"


def test_an_unknown_static_id_lists_the_known_ones() -> None:
    """A misspelt id is answered with the ids that there are, and no key."""
    with pytest.raises(APIKeyNotFoundError) as caught:
        StaticAPIKeys({"b": "sk-secret", "a": "sk-secret"}).get_api_key("c")

    assert str(caught.value) == "there is no key 'c'; known ids are: a, b"


def test_nothing_that_holds_a_key_prints_it() -> None:
    """Keys are in no repr, of the store, its inside or the key on its way."""
    keys = StaticAPIKeys({"a": "sk-secret", "b": {"key": "sk-secret"}})

    shown = f"{keys!r} {keys!s} {vars(keys)!r} {Key(SecretStr('sk-secret'))!r}"

    assert "sk-secret" not in shown
    assert repr(keys) == "StaticAPIKeys(['a', 'b'])"


def test_the_ready_stores_are_key_ports() -> None:
    """Both stores fit where an application's own would."""
    assert isinstance(EnvironmentAPIKeys(), APIKeyPort)
    assert isinstance(StaticAPIKeys({}), APIKeyPort)


async def _coroutine(record: Mapping[str, Any]) -> Mapping[str, Any]:
    await asyncio.sleep(0)
    return record


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda record: record, id="at once"),
        pytest.param(_coroutine, id="by a coroutine"),
        pytest.param(lambda r: asyncio.ensure_future(_coroutine(r)), id="by a task"),
    ],
)
async def test_a_port_may_answer_at_once_or_later(
    server: ProviderServer, answer: Callable[[Any], Any]
) -> None:
    """A store of keys may be synchronous or asynchronous; the key arrives either way."""
    record = {"key": "sk-vault", "base_url": server.base_url("openai")}
    vault = Vault(lambda api_key_id: answer({"id": api_key_id, **record}))

    async with LLMInfraService(vault, settings=Settings()) as service:
        await service.complete(USER, "gpt-4o-mini", "any")

    assert server.requests[0].headers["authorization"] == "Bearer sk-vault"


async def test_a_key_is_asked_for_at_every_call(server: ProviderServer) -> None:
    """A key that was rotated in the store goes out with the next call."""
    rotating = iter(["sk-one", "sk-two"])
    vault = Vault(
        lambda _: {"key": next(rotating), "base_url": server.base_url("openai")}
    )

    async with LLMInfraService(vault, settings=Settings()) as service:
        await service.complete(USER, "gpt-4o-mini", "any")
        await service.complete(USER, "gpt-4o-mini", "any")

    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == ["Bearer sk-one", "Bearer sk-two"]


class _Service(StrEnum):
    ANTHROPIC = "anthropic"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"key": "sk-1"}, ("sk-1", None, None)),
        ({"key": SecretStr("sk-1")}, ("sk-1", None, None)),
        ({"key": " sk-1\n"}, ("sk-1", None, None)),
        ({"key": "sk-1", "service": "groq"}, ("sk-1", "groq", None)),
        ({"key": "sk-1", "service": _Service.ANTHROPIC}, ("sk-1", "anthropic", None)),
        ({"key": "sk-1", "base_url": "http://x"}, ("sk-1", None, "http://x")),
        ({"key": "sk-1", "base_url": "", "service": ""}, ("sk-1", None, None)),
    ],
)
async def test_what_a_record_says_is_read(record: Any, expected: Any) -> None:
    """A record's key is trimmed; its service and base URL are taken where given."""
    service = record.get("service") or "openai"

    key = await find(Vault(lambda _: record), service=str(service))

    assert key.secret is not None
    assert (key.secret.get_secret_value(), key.service, key.base_url) == expected


async def test_a_key_goes_to_no_other_provider(server: ProviderServer) -> None:
    """A key that is known to be another provider's is not sent."""
    vault = Vault(lambda _: {"key": "sk-1", "service": "anthropic"})

    async with LLMInfraService(vault, settings=Settings()) as service:
        with pytest.raises(APIKeyError, match="anthropic and was not sent to openai"):
            await service.complete(USER, "gpt-4o-mini", "team-a")


@pytest.mark.parametrize("record", [None, 5, "sk-1", ["sk-1"], {"key": 5}])
async def test_a_record_that_is_none_is_refused(record: Any) -> None:
    """A port that returns something else than a record is named, without the value."""
    with pytest.raises(APIKeyError, match="must be a mapping") as caught:
        await find(Vault(lambda _: record))

    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "port", [EnvironmentAPIKeys(), StaticAPIKeys({"team": "sk-1"})]
)
@pytest.mark.parametrize(
    "key", ["sk-proj-1234567890", "AKIA1234567890", "xoxb-1234567890", "x" * 65]
)
def test_a_key_in_place_of_its_id_is_refused_and_not_shown(
    port: APIKeyPort, key: str
) -> None:
    """The error says in a sentence what was mixed up, and which ids there are."""
    with pytest.raises(APIKeyNotFoundError, match="pass the id") as caught:
        port.get_api_key(key)

    assert key[4:] not in str(caught.value)
    assert "team" in str(caught.value) or "openai" in str(caught.value)


async def test_the_environment_needs_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the provider is known, its usual variable is found without one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")

    key = await find(EnvironmentAPIKeys(), None)

    assert key.secret is not None
    assert key.secret.get_secret_value() == "sk-1"
    with pytest.raises(APIKeyNotFoundError, match="ANTHROPIC_API_KEY"):
        await find(EnvironmentAPIKeys(), None, service="anthropic")
    with pytest.raises(APIKeyNotFoundError, match="api_key_id"):
        await find(EnvironmentAPIKeys(), None, service=None)


async def test_no_key_of_the_environment_goes_where_none_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server on loopback that is called as OpenAI's is not told OpenAI's key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")

    assert await find(EnvironmentAPIKeys(), None, needs_key=False) == NO_KEY


@pytest.mark.parametrize(
    ("base_url", "is_refused"), [("http://127.0.0.1:8000", False), ("http://x", True)]
)
async def test_a_local_server_needs_no_key(base_url: str, is_refused: bool) -> None:
    """A record may name a server on loopback and have no key for it."""
    vault = Vault(lambda _: {"key": "", "base_url": base_url})
    looked = find(vault, is_local=lambda url: url == "http://127.0.0.1:8000")

    if is_refused:
        with pytest.raises(APIKeyNotFoundError, match="is empty"):
            await looked
    else:
        assert (await looked).base_url == base_url


@pytest.mark.parametrize("api_key_id", [None, ""])
async def test_a_call_without_a_key_id_is_refused_before_it_is_sent(
    service: LLMInfraService, server: ProviderServer, api_key_id: str | None
) -> None:
    """A provider that needs a key is not asked without one."""
    with pytest.raises(APIKeyNotFoundError, match="openai needs a key") as caught:
        await service.complete(USER, "gpt-4o-mini", api_key_id)

    assert (caught.value.service, server.requests) == ("openai", [])


@pytest.mark.parametrize("key", ["", "  ", "\n", None, SecretStr("")])
async def test_an_empty_key_is_refused_before_it_is_sent(key: Any) -> None:
    """A key that is set but empty is reported as missing, by its id."""
    vault = Vault(lambda _: {"key": key, "base_url": "https://llm.example.com/v1"})

    async with LLMInfraService(vault, settings=Settings()) as service:
        with pytest.raises(APIKeyNotFoundError, match="'team-a'"):
            await service.complete(USER, "gpt-4o-mini", "team-a")


async def test_a_server_on_this_machine_is_called_without_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server such as llama.cpp's needs none, and is not told the environment's."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-cloud")
    async with ProviderServer(strict=False) as server:
        server.rules = False  # OpenAI's own would refuse a call without a key
        settings = Settings(base_urls={"openai": server.base_url("openai")})

        async with LLMInfraService(EnvironmentAPIKeys(), settings=settings) as service:
            result = await service.complete(USER, "my-model", service="openai")

    assert result.text == "Hello from the loopback."
    assert "sk-of-the-cloud" not in str(server.requests[0].headers)


@pytest.mark.parametrize("bad", ["\r\n", "\n", "\0", "\t", "\x7f", " ", "é", "\u2028"])
@pytest.mark.parametrize("model", ["gpt-4o-mini", "llama3.2"])
async def test_a_key_that_would_break_its_header_is_refused(
    server: ProviderServer, bad: str, model: str
) -> None:
    """A key with a control character is neither sent, nor shown, nor left in a frame."""
    vault = Vault(
        lambda _: {"key": f"sk-hid{bad}den", "base_url": server.origin + "/v1"}
    )

    async with LLMInfraService(vault, settings=Settings()) as service:
        with pytest.raises(APIKeyError, match="'team-a'") as caught:
            await service.complete(USER, model, "team-a")

    shown = traceback.TracebackException.from_exception(
        caught.value, capture_locals=True
    )
    ours = [
        f"{frame.name}: {name} = {value}"
        for frame in shown.stack
        if Path(frame.filename).parent == PACKAGE
        for name, value in (frame.locals or {}).items()
        if "sk-hid" in value
    ]
    assert server.requests == []
    assert "sk-hid" not in str(caught.value)
    assert ours == []


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(foreign_key_error("APIKeyError")("no such key"), id="foreign"),
        pytest.param(
            type("Missing", (foreign_key_error("APIKeyError"),), {})(), id="subclass"
        ),
        pytest.param(APIKeyNotFoundError("no such key"), id="ours"),
    ],
)
async def test_ollama_is_called_without_a_key_that_nobody_has(
    server: ProviderServer, error: Exception
) -> None:
    """An application that keeps no key for Ollama can call it all the same."""
    settings = Settings(base_urls={"ollama": server.base_url("ollama")})

    async with LLMInfraService(failing(error), settings=settings) as service:
        result = await service.complete(USER, "llama3.2", "ollama")

    assert result.text == "Hello from the loopback."
    assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("gpt-4o-mini", foreign_key_error("APIKeyError")("no such key")),
        ("gpt-4o-mini", APIKeyNotFoundError("no such key")),
        ("gpt-4o-mini", RuntimeError("the vault is sealed")),
        ("llama3.2", RuntimeError("the vault is sealed")),
    ],
)
async def test_any_other_failure_of_the_store_reaches_the_caller(
    server: ProviderServer, model: str, error: Exception
) -> None:
    """What the application raises for a key is what its caller sees; nothing is sent."""
    settings = Settings(
        base_urls={name: server.base_url(name) for name in ("openai", "ollama")}
    )

    async with LLMInfraService(failing(error), settings=settings) as service:
        with pytest.raises(type(error)) as caught:
            await service.complete(USER, model, "any")

    assert caught.value is error
    assert server.requests == []


async def test_ollama_behind_a_gateway_gets_its_key(server: ProviderServer) -> None:
    """A key that is there for Ollama is sent."""
    keys = StaticAPIKeys(
        {"gpu": {"key": "sk-gpu", "base_url": server.base_url("ollama")}}
    )

    async with LLMInfraService(keys, settings=Settings()) as service:
        await service.complete(USER, "llama3.2", "gpu")

    assert server.requests[0].headers["authorization"] == "Bearer sk-gpu"


async def test_ollama_passes_over_a_key_of_somebody_else(
    server: ProviderServer,
) -> None:
    """A swap to a local model by its name alone neither fails nor tells it the key."""
    vault = Vault(lambda _: {"key": "sk-openais", "service": "openai"})
    settings = Settings(base_urls={"ollama": server.origin})

    async with LLMInfraService(vault, settings=settings) as service:
        await service.complete(USER, "llama3.2", "team-a")

    assert "authorization" not in server.requests[0].headers
    assert b"sk-openais" not in server.requests[0].body


async def test_no_id_is_no_key_where_none_is_needed() -> None:
    """Without an id the store is not even asked on behalf of Ollama."""
    vault = failing(RuntimeError("asked"))

    key = await find(vault, None, service="ollama", needs_key=False)

    assert key.secret is not None
    assert key.secret.get_secret_value() == ""
