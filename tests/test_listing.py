"""Which models a provider offers to a key, and whether it takes the key at all."""

from collections.abc import AsyncIterator

import pytest

from dipeo_llm import (
    APIKeyError,
    APIKeyNotFoundError,
    InvalidRequestError,
    LLMInfraService,
    LLMServiceError,
    LLMTimeoutError,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
)
from tests.conftest import PROVIDERS, each_provider
from tests.provider_server import ProviderServer, Raw, Received, error


class ListingServer(ProviderServer):
    """A server whose listing fails in a way of the test's choice."""

    listing: Raw | None = None
    fails: int = 10**6
    """How often, before it lists as usual."""

    def _listing(self, asked: Received) -> Raw:
        if self.listing is not None and len(self.requests) <= self.fails:
            return self.listing
        return super()._listing(asked)


@pytest.fixture
async def server() -> AsyncIterator[ListingServer]:
    """Run a loopback server whose listing can be replaced."""
    async with ListingServer() as running:
        yield running


MANY = {
    "openai": [f"gpt-{i}" for i in range(7)],
    "anthropic": [f"claude-{i}" for i in range(7)],
    "google": [f"gemini-{i}" for i in range(7)],
    "ollama": [f"llama{i}:latest" for i in range(7)],
}


@each_provider
@pytest.mark.parametrize("page_size", [None, 7, 3, 1])
async def test_all_models_of_all_pages(
    service: LLMInfraService,
    server: ListingServer,
    provider: str,
    page_size: int | None,
) -> None:
    """Every page is read; the names are sorted, and nothing but names."""
    server.models[provider] = list(reversed(MANY[provider]))
    server.page_size = page_size

    models = await service.get_available_models(provider)

    assert models == MANY[provider]
    paged = page_size is not None and provider in {"anthropic", "google"}
    assert len(server.requests) == (-(-7 // (page_size or 7)) if paged else 1)


@each_provider
async def test_what_is_asked(
    service: LLMInfraService, server: ListingServer, provider: str
) -> None:
    """A GET with the key in its header, and no header that the format does not need."""
    await service.get_available_models(provider)

    (request,) = server.requests
    paths = {"google": "/v1beta/models", "ollama": "/api/tags"}
    assert (request.method, request.body) == ("GET", b"")
    assert request.path == paths.get(provider, "/v1/models")
    assert "key" not in request.query
    keys = {
        "anthropic": {
            "x-api-key": "sk-test-anthropic",
            "anthropic-version": "2023-06-01",
        },
        "google": {"x-goog-api-key": "sk-test-google"},
    }
    bearer = {"authorization": f"Bearer sk-test-{provider}"}
    assert request.headers == {
        "host": f"127.0.0.1:{server.port}",
        "user-agent": "dipeo-llm",
        "accept": "application/json",
        "accept-encoding": request.headers["accept-encoding"],
        **keys.get(provider, bearer),
    }


@pytest.mark.parametrize(
    ("provider", "below"),
    [
        ("openai", ""),
        ("openai", "/v1"),
        ("openai", "/v1/"),
        ("anthropic", ""),
        ("anthropic", "/"),
        ("anthropic", "/v1"),
        ("google", ""),
        ("google", "/v1beta"),
        ("google", "/v1beta/"),
        ("ollama", ""),
        ("ollama", "/"),
    ],
)
async def test_with_and_without_the_version(
    server: ListingServer, provider: str, below: str
) -> None:
    """A base URL may end in the version's path or not."""
    record = {"key": "k", "service": provider, "base_url": server.origin + below}

    async with LLMInfraService(
        StaticAPIKeys({"mine": record}), settings=Settings()
    ) as service:
        models = await service.get_available_models("mine")

    assert models == sorted(server.models[provider])


async def test_no_models(service: LLMInfraService, server: ListingServer) -> None:
    """A provider that offers nothing offers an empty list."""
    server.models = {provider: [] for provider in PROVIDERS}

    assert [await service.get_available_models(p) for p in PROVIDERS] == [[]] * 4


# --- whose key it is ----------------------------------------------------------------


async def test_whose_key_it_is(server: ListingServer) -> None:
    """The record's service says it, else the id does."""
    url = server.base_url
    keys = StaticAPIKeys(
        {
            "team-a": {"key": "k", "service": "google", "base_url": url("google")},
            "openai-team-b": {"key": "k", "base_url": url("openai")},
            "openai-in-name-only": {
                "key": "k",
                "service": "anthropic",
                "base_url": url("anthropic"),
            },
        }
    )

    async with LLMInfraService(keys, settings=Settings()) as service:
        for api_key_id in ("team-a", "openai-team-b", "openai-in-name-only"):
            await service.get_available_models(api_key_id)

    assert [r.provider for r in server.requests] == ["google", "openai", "anthropic"]


async def test_a_key_of_nobody(server: ListingServer) -> None:
    """Where neither tells, nothing is asked; `provider=` can tell for a validation."""
    keys = StaticAPIKeys({"mine": {"key": "k", "base_url": server.base_url("openai")}})

    async with LLMInfraService(keys, settings=Settings()) as service:
        with pytest.raises(InvalidRequestError, match="'mine'"):
            await service.get_available_models("mine")
        with pytest.raises(InvalidRequestError, match="'mine'"):
            await service.validate_api_key("mine")
        assert server.requests == []
        assert await service.validate_api_key("mine", provider="openai") is True


async def test_an_id_that_is_not_kept(
    service: LLMInfraService, server: ListingServer
) -> None:
    """An unknown id raises: it is no key that a provider could refuse."""
    with pytest.raises(APIKeyNotFoundError, match="'nobody'"):
        await service.get_available_models("nobody")
    with pytest.raises(APIKeyNotFoundError, match="'nobody'"):
        await service.validate_api_key("nobody")
    with pytest.raises(APIKeyNotFoundError, match="'nobody'"):
        await service.validate_api_key("nobody", provider="openai")

    assert server.requests == []


async def test_a_provider_without_a_list(server: ListingServer) -> None:
    """LiteLLM's engine has no list of models."""
    record = {"key": "k", "service": "bedrock", "base_url": server.base_url("openai")}

    async with LLMInfraService(
        StaticAPIKeys({"bedrock": record}), settings=Settings()
    ) as service:
        with pytest.raises(InvalidRequestError, match="no list of models"):
            await service.get_available_models("bedrock")

    assert server.requests == []


# --- a key's validity -----------------------------------------------------------------


@each_provider
async def test_a_valid_key(
    service: LLMInfraService, server: ListingServer, provider: str
) -> None:
    """One page of the list is proof enough."""
    server.models[provider] = MANY[provider]
    server.page_size = 2

    assert await service.validate_api_key(provider) is True
    assert len(server.requests) == 1


@pytest.mark.parametrize("provider", ["openai", "anthropic", "google"])
async def test_a_key_that_the_provider_refuses(
    server: ListingServer, provider: str
) -> None:
    """Each provider's own refusal, Google's 400 too, is False and not tried again."""
    record = {"key": "sk-bad", "base_url": server.base_url(provider)}
    keys = StaticAPIKeys({provider: record})

    async with LLMInfraService(keys, settings=Settings()) as service:
        assert await service.validate_api_key(provider) is False
        with pytest.raises(APIKeyError):
            await service.get_available_models(provider)

    assert len(server.requests) == 2


@each_provider
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_is_false(
    service: LLMInfraService, server: ListingServer, provider: str, status: int
) -> None:
    """401 and 403 say that the key is not taken."""
    server.listing = error(provider, status)

    assert await service.validate_api_key(provider) is False
    assert len(server.requests) == 1


@each_provider
@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (404, LLMServiceError),
        (429, RateLimitError),
        (500, ServiceUnavailableError),
        (529, ServiceUnavailableError),
    ],
)
async def test_any_other_failure_raises(
    service: LLMInfraService,
    server: ListingServer,
    provider: str,
    status: int,
    cls: type[LLMServiceError],
) -> None:
    """A provider that is down has said nothing about the key."""
    server.listing = error(provider, status)

    with pytest.raises(cls) as caught:
        await service.validate_api_key(provider)

    assert caught.value.status_code == status
    assert caught.value.service == provider
    assert caught.value.attempts == len(server.requests) == (1 if status == 404 else 4)


async def test_a_key_without_an_account_raises(
    service: LLMInfraService, server: ListingServer
) -> None:
    """An empty account is no bad key."""
    server.listing = error("openai", 429, code="insufficient_quota")

    with pytest.raises(RateLimitError):
        await service.validate_api_key("openai")


# --- what else may come ------------------------------------------------------------------


async def test_a_listing_is_tried_again(
    service: LLMInfraService, server: ListingServer
) -> None:
    """The retry policy of calls holds for questions too."""
    server.listing = error("openai", 503)
    server.fails = 2

    models = await service.get_available_models("openai")

    assert models == sorted(server.models["openai"])
    assert len(server.requests) == 3


@each_provider
async def test_a_listing_that_is_slow(
    keys: StaticAPIKeys, server: ListingServer, provider: str
) -> None:
    """The timeout of an attempt holds for questions too."""
    body = [b"{", b'"data": []}']
    server.listing = Raw(body=body, piece_delay=30)
    settings = Settings(timeout=0.3, max_retries=0)

    async with LLMInfraService(keys, settings=settings) as service:
        with pytest.raises(LLMTimeoutError, match=r"within 0\.3 s"):
            await service.get_available_models(provider)


@each_provider
async def test_a_listing_that_redirects(
    service: LLMInfraService, server: ListingServer, provider: str
) -> None:
    """The key is not carried to where a redirect leads."""
    async with ProviderServer(strict=False) as other:
        server.listing = Raw(307, headers={"location": f"{other.origin}/v1/models"})

        with pytest.raises(LLMServiceError, match="redirect") as caught:
            await service.get_available_models(provider)

    assert caught.value.status_code == 307
    assert (len(server.requests), other.connections) == (1, 0)


@each_provider
@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        b"",
        b"null",
        b"[]",
        b'{"data": 5, "models": 5}',
        b'{"data": {"a": 1}, "models": {"a": 1}}',
        b'{"data": [5], "models": [5]}',
        b'{"data": [{}], "models": [{}]}',
        b'{"error": {"message": "down", "code": 503, "type": "overloaded_error"}}',
    ],
)
async def test_a_200_that_is_no_list(
    keys: StaticAPIKeys, server: ListingServer, provider: str, body: bytes
) -> None:
    """It is no empty list, and no crash: the provider has not answered."""
    server.listing = Raw(body=body)

    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        with pytest.raises(ServiceUnavailableError) as caught:
            await service.get_available_models(provider)

    assert caught.value.status_code == 200
    assert caught.value.service == provider


@pytest.mark.parametrize(
    ("provider", "is_list"),
    # Google leaves an empty list out, an old Ollama writes null for it.
    [("openai", False), ("anthropic", False), ("google", True), ("ollama", True)],
)
@pytest.mark.parametrize("body", [b"{}", b'{"data": null, "models": null}'])
async def test_a_list_that_is_left_out(
    keys: StaticAPIKeys,
    server: ListingServer,
    provider: str,
    is_list: bool,
    body: bytes,
) -> None:
    """Where a provider writes an empty list so, it is one; elsewhere it is no answer."""
    server.listing = Raw(body=body)

    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        try:
            found: bool = await service.get_available_models(provider) == []
        except ServiceUnavailableError:
            found = False

    assert found is is_list
