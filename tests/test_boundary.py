"""LiteLLM's behaviour that this package works around.

Each test is one line of docs/litellm.md. They call LiteLLM without this package. A
failure after an upgrade means that a work-around can go, or must be changed.
"""

import importlib.metadata
from contextlib import nullcontext
from typing import Any

import pytest

from dipeo_llm.litellm_import import import_litellm
from tests.provider_server import Answer, ProviderServer, Raw, error

HELLO = [{"role": "developer", "content": "Brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Import LiteLLM as the package does."""
    return import_litellm()


async def bare(litellm: Any, server: ProviderServer, model: str, **options: Any) -> Any:
    """Call LiteLLM as its documentation shows."""
    provider = model.partition("/")[0]
    name = {"gemini": "google", "ollama_chat": "ollama"}.get(provider, provider)
    return await litellm.acompletion(
        model=model,
        messages=options.pop("messages", HELLO),
        api_key="sk-x",
        api_base=server.base_url(name),
        num_retries=0,
        max_retries=0,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "status"),
    [("BadRequestError", 400), ("UnsupportedParamsError", 400), ("NotFoundError", 404)],
)
def test_an_untranslatable_request_has_a_status(
    litellm: Any, name: str, status: int
) -> None:
    """LiteLLM's errors before sending differ from its bugs by their status."""
    made = getattr(litellm.exceptions, name)(message="", model="m", llm_provider="p")

    assert made.status_code == status


async def test_developer_becomes_system(litellm: Any, server: ProviderServer) -> None:
    """LiteLLM sends the role "system" in place of "developer" to every gpt model."""
    await bare(litellm, server, "openai/gpt-4.1-nano")

    assert server.requests[-1].json["messages"][0]["role"] == "system"


@pytest.mark.parametrize(
    ("model", "provider"),
    [("gemini-2.5-flash", "vertex_ai"), ("gpt-4.1-nano", "openai")],
)
def test_a_bare_gemini_name_is_vertex(litellm: Any, model: str, provider: str) -> None:
    """LiteLLM infers Vertex for the names of Google AI Studio's models."""
    assert litellm.get_llm_provider(model=model)[1] == provider


@pytest.mark.parametrize(
    "model", ["llama3.2:1b", "o1-mini", "claude-3-5-haiku-latest", "gemma3"]
)
def test_some_names_are_unknown(litellm: Any, model: str) -> None:
    """LiteLLM infers no provider for local and retired models."""
    with pytest.raises(litellm.exceptions.BadRequestError):
        litellm.get_llm_provider(model=model)


@pytest.mark.parametrize(
    ("model", "status", "reported"),
    [
        ("anthropic/claude-sonnet-4-5", 529, 500),
        ("gemini/gemini-2.5-flash", 502, 500),
        ("anthropic/claude-sonnet-4-5", 413, 400),
    ],
)
async def test_a_status_is_changed(
    litellm: Any, server: ProviderServer, model: str, status: int, reported: int
) -> None:
    """LiteLLM reports some statuses as others."""
    provider = "google" if model.startswith("gemini") else "anthropic"
    server.default = error(provider, status, "No.")

    with pytest.raises(Exception, match=r"No\.") as caught:
        await bare(litellm, server, model)

    assert getattr(caught.value, "status_code", None) == reported


async def test_an_answer_without_choices_is_accepted(
    litellm: Any, server: ProviderServer
) -> None:
    """LiteLLM accepts a 200 without choices as an answer."""
    server.default = Raw(
        200,
        {"content-type": "application/json"},
        b'{"id": "x", "object": "chat.completion", "choices": []}',
    )

    response = await bare(litellm, server, "openai/gpt-4.1-nano")

    assert not response.choices or response.choices[0].message.content is None


@pytest.mark.parametrize(
    ("model", "fixed_in"),
    [
        ("openai/gpt-4.1-nano", (1, 108)),
        ("anthropic/claude-sonnet-4-5", (1, 108)),
        ("gemini/gemini-2.5-flash", None),
    ],
)
async def test_a_cut_stream_is_complete(
    litellm: Any,
    server: ProviderServer,
    model: str,
    fixed_in: tuple[int, int] | None,
) -> None:
    """LiteLLM reports "stop" for a stream that ends without its terminator."""
    server.default = Answer(drop_end=True)
    version = tuple(map(int, importlib.metadata.version("litellm").split(".")[:2]))
    fixed = fixed_in is not None and version >= fixed_in

    stream = await bare(litellm, server, model, stream=True)
    finish = None
    with pytest.raises(Exception, match="finish_reason") if fixed else nullcontext():
        async for chunk in stream:
            finish = chunk.choices[0].finish_reason or finish

    assert finish == (None if fixed else "stop")


async def test_a_client_of_the_wrong_type_is_ignored(
    litellm: Any, server: ProviderServer
) -> None:
    """LiteLLM ignores a client whose type does not fit the provider."""

    class NoClient:
        """A client without methods, so that any use fails."""

    response = await bare(litellm, server, "gemini/gemini-2.5-flash", client=NoClient())

    assert response.choices[0].message.content == "Hello from the loopback."
