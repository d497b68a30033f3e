"""What LiteLLM does that this package works around: red when an upgrade changes it.

Each test is one line of docs/litellm.md. They ask LiteLLM itself, without this package,
so that a test that fails names a work-around that may go, or one that is now needed
elsewhere.
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
    """Call LiteLLM as its documentation says."""
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
def test_a_request_that_cannot_be_made_has_a_status(
    litellm: Any, name: str, status: int
) -> None:
    """LiteLLM's refusals before sending are told from its bugs by their status."""
    made = getattr(litellm.exceptions, name)(message="", model="m", llm_provider="p")

    assert made.status_code == status


async def test_developer_becomes_system(litellm: Any, server: ProviderServer) -> None:
    """LiteLLM sends "system" for "developer" to every gpt model."""
    await bare(litellm, server, "openai/gpt-4.1-nano")

    assert server.requests[-1].json["messages"][0]["role"] == "system"


@pytest.mark.parametrize(
    ("model", "provider"),
    [("gemini-2.5-flash", "vertex_ai"), ("gpt-4.1-nano", "openai")],
)
def test_a_bare_gemini_name_is_vertex(litellm: Any, model: str, provider: str) -> None:
    """LiteLLM takes Google AI Studio's names for Vertex's."""
    assert litellm.get_llm_provider(model=model)[1] == provider


@pytest.mark.parametrize(
    "model", ["llama3.2:1b", "o1-mini", "claude-3-5-haiku-latest", "gemma3"]
)
def test_some_names_are_unknown(litellm: Any, model: str) -> None:
    """LiteLLM does not know local names and retired ones."""
    with pytest.raises(litellm.exceptions.BadRequestError):
        litellm.get_llm_provider(model=model)


@pytest.mark.parametrize(
    ("model", "status", "told"),
    [
        ("anthropic/claude-sonnet-4-5", 529, 500),
        ("gemini/gemini-2.5-flash", 502, 500),
        ("anthropic/claude-sonnet-4-5", 413, 400),
    ],
)
async def test_a_status_is_lost(
    litellm: Any, server: ProviderServer, model: str, status: int, told: int
) -> None:
    """LiteLLM changes the numbers of some statuses."""
    provider = "google" if model.startswith("gemini") else "anthropic"
    server.default = error(provider, status, "No.")

    with pytest.raises(Exception, match=r"No\.") as caught:
        await bare(litellm, server, model)

    assert getattr(caught.value, "status_code", None) == told


async def test_an_answer_without_choices_is_taken(
    litellm: Any, server: ProviderServer
) -> None:
    """LiteLLM takes a 200 without a choice for an answer."""
    server.default = Raw(
        200,
        {"content-type": "application/json"},
        b'{"id": "x", "object": "chat.completion", "choices": []}',
    )

    response = await bare(litellm, server, "openai/gpt-4.1-nano")

    assert not response.choices or response.choices[0].message.content is None


@pytest.mark.parametrize(
    ("model", "mended_in"),
    [
        ("openai/gpt-4.1-nano", (1, 108)),
        ("anthropic/claude-sonnet-4-5", (1, 108)),
        ("gemini/gemini-2.5-flash", None),
    ],
)
async def test_a_cut_stream_is_a_whole_one(
    litellm: Any,
    server: ProviderServer,
    model: str,
    mended_in: tuple[int, int] | None,
) -> None:
    """LiteLLM reports a stream without its end mark as one that has stopped."""
    server.default = Answer(drop_end=True)
    version = tuple(map(int, importlib.metadata.version("litellm").split(".")[:2]))
    mended = mended_in is not None and version >= mended_in

    stream = await bare(litellm, server, model, stream=True)
    finish = None
    with pytest.raises(Exception, match="finish_reason") if mended else nullcontext():
        async for chunk in stream:
            finish = chunk.choices[0].finish_reason or finish

    assert finish == (None if mended else "stop")


async def test_a_client_of_the_wrong_type_is_passed_over(
    litellm: Any, server: ProviderServer
) -> None:
    """LiteLLM ignores a client that is not of the type that the provider takes."""

    class NoClient:
        """Would fail if it were used."""

    response = await bare(litellm, server, "gemini/gemini-2.5-flash", client=NoClient())

    assert response.choices[0].message.content == "Hello from the loopback."
