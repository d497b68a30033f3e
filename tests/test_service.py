"""What a call of the service puts on each provider's wire, and what it makes of the answer."""

import asyncio
import copy
import enum
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    ContentFilterError,
    InvalidRequestError,
    LLMInfraService,
    LLMRequestOptions,
    LLMService,
    Message,
    PersonLLMConfig,
    Settings,
    StaticAPIKeys,
    StructuredOutputError,
    TokenUsage,
)
from dipeo_llm.settings import Engine
from tests.conftest import HELLO, MODELS, PROVIDERS, Open, each_provider
from tests.provider_server import Answer, ProviderServer, Raw, Received, error

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"temperature": {}}},
    },
}


class Weather(BaseModel):
    """A form."""

    degrees: int


def says(speaker: str, content: Any, to: str = "optimist") -> Message:
    """Make a message of one person to another."""
    return Message(from_person_id=speaker, to_person_id=to, content=content)


def config(provider: str, **more: Any) -> PersonLLMConfig:
    """Make the configuration of a person that thinks with a provider's model."""
    return PersonLLMConfig(
        service=provider, model=MODELS[provider], api_key_id=provider, **more
    )


async def send(
    service: LLMInfraService, server: ProviderServer, provider: str, **options: Any
) -> dict[str, Any]:
    """Make a call and return the JSON that went over the wire for it."""
    await service.complete(HELLO, MODELS[provider], provider, **options)
    body = server.requests[-1].json
    assert isinstance(body, dict)
    return body


def turns(received: Received) -> list[tuple[str, list[str]]]:
    """Read the conversation out of any provider's body: roles and texts, no system."""
    body = received.json
    found = []
    for message in body.get("contents") or body["messages"]:
        content = message.get("parts") or message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        if message["role"] not in {"system", "developer"}:
            role = "assistant" if message["role"] == "model" else message["role"]
            found.append((role, [part["text"] for part in parts]))
    return found


# --- the request -------------------------------------------------------------------

PROMPT = "You are an optimist. ☀"
CONVERSATION = [
    says("system", "Discuss bread."),
    says("optimist", "Bread is good.", to="critic"),
    says("critic", "Is it? Ça dépend 🥖"),
    says("system", "Answer briefly."),
]
BODIES: dict[str, dict[str, Any]] = {
    "openai": {
        "model": "gpt-4.1-nano",
        "messages": [
            {"role": "developer", "content": PROMPT},
            {"role": "user", "content": "Discuss bread."},
            {"role": "assistant", "content": "Bread is good."},
            {"role": "user", "content": "Is it? Ça dépend 🥖"},
            {"role": "user", "content": "Answer briefly."},
        ],
        "temperature": 0.5,
        "max_tokens": 100,
    },
    "anthropic": {
        "model": "claude-sonnet-4-5",
        "system": [{"type": "text", "text": PROMPT}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Discuss bread."}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "Bread is good."}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Is it? Ça dépend 🥖"},
                    {"type": "text", "text": "Answer briefly."},
                ],
            },
        ],
        "temperature": 0.5,
        "max_tokens": 100,
    },
    "google": {
        "system_instruction": {"parts": [{"text": PROMPT}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Discuss bread."}]},
            {"role": "model", "parts": [{"text": "Bread is good."}]},
            {
                "role": "user",
                "parts": [
                    {"text": "Is it? Ça dépend 🥖"},
                    {"text": "Answer briefly."},
                ],
            },
        ],
        "generationConfig": {"temperature": 0.5, "max_output_tokens": 100},
    },
    "ollama": {
        "model": MODELS["ollama"],
        "messages": [
            {"role": "system", "content": PROMPT, "images": []},
            {"role": "user", "content": "Discuss bread.", "images": []},
            {"role": "assistant", "content": "Bread is good.", "images": []},
            {"role": "user", "content": "Is it? Ça dépend 🥖", "images": []},
            {"role": "user", "content": "Answer briefly.", "images": []},
        ],
        "options": {"temperature": 0.5, "num_predict": 100},
        "stream": False,
    },
}
PATHS = {
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "google": "/v1beta/models/gemini-2.5-flash:generateContent",
    "ollama": "/api/chat",
}
KEY_HEADERS = {
    "openai": {"authorization": "Bearer sk-test-openai"},
    "anthropic": {
        "x-api-key": "sk-test-anthropic",
        "anthropic-version": "2023-06-01",
    },
    "google": {"x-goog-api-key": "sk-test-google"},
    "ollama": {"authorization": "Bearer sk-test-ollama"},
}
# Of these the value is HTTP's own affair.
USUAL_HEADERS = {"host", "accept", "accept-encoding", "content-length"}


@each_provider
async def test_a_persons_conversation_on_the_wire(
    server: ProviderServer, opened: Open, tmp_path: Path, provider: str
) -> None:
    """Prompt file, two persons and "system" make this body, these headers, this URL."""
    (tmp_path / "optimist.md").write_text(PROMPT, encoding="utf-8")
    person = config(provider, prompt_file="optimist.md", system_prompt="not used")

    async with opened(base_dir=tmp_path) as service:
        await service.complete_with_person(
            CONVERSATION, "optimist", person, temperature=0.5, max_tokens=100
        )

    (request,) = server.requests
    assert request.json == BODIES[provider]
    assert (request.method, request.path, request.query) == (
        "POST",
        PATHS[provider],
        {},
    )
    headers = {k: v for k, v in request.headers.items() if k not in USUAL_HEADERS}
    assert headers == {
        "content-type": "application/json",
        "user-agent": "dipeo-llm",
        **KEY_HEADERS[provider],
    }


@pytest.mark.parametrize(
    "model",
    [
        "gpt-3.5-turbo",
        "gpt-4o",
        "gpt-4.1-nano",
        "gpt-5",
        "gpt-5-mini",
        "gpt-5.1",
        "chatgpt-4o-latest",
        "o1",
        "o1-mini",
        "o3",
        "o3-mini",
        "o4-mini",
        "ft:gpt-4o-mini:org::id",
        "a-model-of-next-year",
    ],
)
@pytest.mark.parametrize("role", ["system", "developer"])
async def test_openai_gets_the_system_prompt_as_developer(
    service: LLMInfraService, server: ProviderServer, model: str, role: str
) -> None:
    """On OpenAI's wire a system prompt has the role developer, for every model."""
    messages = [{"role": role, "content": "Be brief."}, *HELLO]

    await service.complete(messages, model, "openai", service="openai")

    sent = server.requests[-1].json
    assert sent == {
        "model": model,
        "messages": [{"role": "developer", "content": "Be brief."}, *HELLO],
    }


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_other_providers_have_their_own_place_for_a_system_prompt(
    service: LLMInfraService, server: ProviderServer, role: str
) -> None:
    """Whichever of the two roles is used, each provider gets what it understands."""
    messages = [{"role": role, "content": "Be brief."}, *HELLO]
    sent = {}

    for provider in ("anthropic", "google", "ollama"):
        await service.complete(messages, MODELS[provider], provider)
        sent[provider] = server.requests[-1].json

    assert sent["anthropic"]["system"] == [{"type": "text", "text": "Be brief."}]
    assert sent["google"]["system_instruction"] == {"parts": [{"text": "Be brief."}]}
    assert sent["ollama"]["messages"][0]["role"] == "system"
    assert all(turns(r) == [("user", ["Hello"])] for r in server.requests)


async def test_swapping_the_provider_changes_two_strings(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """The same line of code reaches another provider by its model and key id alone."""
    swaps = [
        ("gpt-4.1-nano", "openai"),
        ("claude-sonnet-4-5", "anthropic"),
        ("gemini-2.5-flash", "google"),
        ("llama3.2:1b", "ollama"),
    ]

    results = [
        await service.complete(
            HELLO, model, key, temperature=0.2, max_tokens=2000, seed=1, n=1
        )
        for model, key in swaps
    ]

    assert [request.provider for request in server.requests] == list(PROVIDERS)
    assert [result.service for result in results] == list(PROVIDERS)
    assert [result.text for result in results] == ["Hello from the loopback."] * 4


# --- options -----------------------------------------------------------------------

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "max_tokens": 2000,
    "top_p": 0.7,
    "n": 2,
    "stop": ["X"],
    "seed": 7,
    "reasoning_effort": "low",
}
# The model, its body without the conversation, and the options that are left out.
ON_THE_WIRE: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "openai/gpt-4.1-nano-2025-04-14",
        {
            "temperature": 0.5,
            "max_tokens": 2000,
            "top_p": 0.7,
            "n": 2,
            "stop": ["X"],
            "seed": 7,
        },
        ["reasoning_effort"],
    ),
    (
        "openai/gpt-5-mini-2025-08-07",
        {"max_completion_tokens": 2000, "n": 2, "seed": 7, "reasoning_effort": "low"},
        ["stop", "temperature", "top_p"],
    ),
    (
        "openai/o3-2025-04-16",
        {
            "max_completion_tokens": 2000,
            "n": 2,
            "seed": 7,
            "reasoning_effort": "low",
        },
        ["stop", "temperature", "top_p"],
    ),
    (
        "google/gemini-2.5-pro",
        {
            "generationConfig": {
                "temperature": 0.5,
                "max_output_tokens": 2000,
                "top_p": 0.7,
                "candidate_count": 2,
                "stop_sequences": ["X"],
                "seed": 7,
                "thinkingConfig": {"includeThoughts": True, "thinkingBudget": 1024},
            }
        },
        [],
    ),
]


@pytest.mark.parametrize(
    ("model", "wire"), [(model, wire) for model, *wire in ON_THE_WIRE]
)
async def test_options_on_the_wire(
    service: LLMInfraService,
    server: ProviderServer,
    caplog: pytest.LogCaptureFixture,
    model: str,
    wire: tuple[dict[str, Any], list[str]],
) -> None:
    """Each option has its provider's name; what the model takes not is logged once."""
    caplog.set_level(logging.INFO, "dipeo_llm")
    body, left_out = wire

    for _ in range(2):
        await service.complete(HELLO, model, model.partition("/")[0], **SAMPLING)

    for request in server.requests:
        sent = dict(request.json)
        for name in ("model", "messages", "contents"):
            sent.pop(name, None)
        assert sent == body
    logged = [r.getMessage() for r in caplog.records if r.name == "dipeo_llm"]
    assert sorted(logged) == [
        f"{model} does not take {option}: it was left out" for option in left_out
    ]


@pytest.mark.parametrize(
    ("provider", "given", "sent"),
    [
        ("anthropic", {"temperature": 0.5}, {"temperature": 0.5}),
        ("anthropic", {"temperature": 0}, {"temperature": 0}),
        ("anthropic", {"max_tokens": 9}, {"max_tokens": 9}),
        ("anthropic", {"top_p": 0.7}, {"top_p": 0.7}),
        ("anthropic", {"stop": ["X"]}, {"stop_sequences": ["X"]}),
        ("anthropic", {"stop": "X"}, {"stop_sequences": ["X"]}),
        ("anthropic", {"seed": 7}, {}),
        ("anthropic", {"n": 2}, {}),
        ("ollama", {"temperature": 0.5}, {"options": {"temperature": 0.5}}),
        ("ollama", {"temperature": 0}, {"options": {"temperature": 0}}),
        ("ollama", {"max_tokens": 9}, {"options": {"num_predict": 9}}),
        ("ollama", {"top_p": 0.7}, {"options": {"top_p": 0.7}}),
        ("ollama", {"stop": ["X"]}, {"options": {"stop": ["X"]}}),
        ("ollama", {"seed": 7}, {"options": {"seed": 7}}),
        ("ollama", {"n": 2}, {}),
    ],
)
async def test_one_option_on_the_wire(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    given: Mapping[str, Any],
    sent: Mapping[str, Any],
) -> None:
    """An option changes what it says and nothing else; an unknown one changes nothing."""
    plain = await send(service, server, provider)

    changed = await send(service, server, provider, **given)

    assert changed == {**plain, **sent}


@pytest.mark.parametrize(
    ("model", "given", "sent"),
    [
        (
            "anthropic/claude-sonnet-4-5",
            {"reasoning_effort": "low", "max_tokens": 2000},
            {
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "max_tokens": 2000,
            },
        ),
        # The budget must lie below max_tokens.
        (
            "anthropic/claude-sonnet-4-5",
            {"reasoning_effort": "low", "max_tokens": 9},
            {"max_tokens": 9},
        ),
        # Who thinks has no temperature.
        (
            "anthropic/claude-sonnet-4-5",
            {"reasoning_effort": "low", "max_tokens": 2000, "temperature": 0.5},
            {
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "max_tokens": 2000,
            },
        ),
        (
            "anthropic/claude-sonnet-4-5",
            {"temperature": 0.5, "top_p": 0.5, "max_tokens": 9},
            {"temperature": 0.5, "max_tokens": 9},
        ),
        (
            "openai/o1-mini",
            {"temperature": 0.5, "top_p": 0.5, "max_tokens": 9},
            {"max_completion_tokens": 9},
        ),
        (
            "anthropic/claude-3-opus-20240229",
            {"temperature": 0.5, "top_p": 0.5, "max_tokens": 9},
            {"temperature": 0.5, "top_p": 0.5, "max_tokens": 9},
        ),
        ("openai/o3", {"stop": ["X"]}, {}),
        ("openai/o4-mini", {"stop": "X"}, {}),
        ("openai/gpt-4o", {"stop": "X"}, {"stop": "X"}),
        (
            "ollama/llama3.2:1b",
            {"stop": "X"},
            {"options": {"stop": ["X"]}, "stream": False},
        ),
        (
            "ollama/llama3.2:1b",
            {"tools": [TOOL], "tool_choice": "none"},
            {"options": {}, "stream": False},
        ),
        ("openai/ft:gpt-4o-mini:org::id", {"reasoning_effort": "low"}, {}),
        ("openai/chatgpt-4o-latest", {"reasoning_effort": "low"}, {}),
        (
            "ollama/llama3.2:1b",
            {"reasoning_effort": "low"},
            {"options": {}, "stream": False},
        ),
        (
            "ollama/qwen3:4b",
            {"reasoning_effort": "low"},
            {"options": {}, "stream": False, "think": True},
        ),
    ],
)
async def test_options_that_exclude_each_other(
    service: LLMInfraService,
    server: ProviderServer,
    model: str,
    given: Mapping[str, Any],
    sent: Mapping[str, Any],
) -> None:
    """What a model would refuse beside another option, or at all, is left out."""
    await service.complete(HELLO, model, model.partition("/")[0], **given)

    body = dict(server.requests[-1].json)
    del body["model"], body["messages"]
    assert body == sent


@pytest.mark.parametrize(
    ("model", "option", "value"),
    [
        ("llama3.2:1b", "tool_choice", "required"),
        ("claude-sonnet-4-5", "response_format", {"type": "json_object"}),
    ],
)
async def test_what_a_provider_has_no_word_for_is_reported_left_out(
    service: LLMInfraService,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    server: ProviderServer,
    model: str,
    option: str,
    value: Any,
) -> None:
    """A caller reads once that the model was not told."""
    monkeypatch.setattr("dipeo_llm.adapters.base._seen_options", set())
    caplog.set_level(logging.INFO, "dipeo_llm")
    server.default = Answer("{}")
    provider = await service.get_provider_for_model(model)
    for _ in range(2):
        await service.complete(HELLO, model, provider, tools=[TOOL], **{option: value})

    assert [r.getMessage() for r in caplog.records if "left out" in r.getMessage()] == [
        f"{provider}/{model} does not take {option}: it was left out"
    ]


@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize(
    "model", ["gemini-2.0-flash", "gemini-1.5-pro", "google/tuned-by-us", "gemini-9-x"]
)
async def test_google_gets_the_system_prompt_of_models_that_litellm_does_not_know(
    server: ProviderServer, keys: StaticAPIKeys, model: str, engine: Engine
) -> None:
    """It would be the user's words: LiteLLM takes what it does not know for unable."""
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    async with LLMInfraService(keys, settings=Settings(engine=engine)) as service:
        result = await service.complete(messages, model, "google")

    body = server.requests[0].json
    assert body["system_instruction"] == {"parts": [{"text": "Be brief."}]}
    assert turns(server.requests[0]) == [("user", ["Hello"])]
    assert result.cost_usd is None


@pytest.mark.parametrize(
    ("model", "options"),
    [("gpt-5-pro", {}), ("o3-deep-research", {"tools": [{"type": "web_search"}]})],
)
@pytest.mark.parametrize("engine", ["direct", "litellm"])
async def test_models_that_openai_serves_elsewhere(
    server: ProviderServer, opened: Open, model: str, options: Any, engine: Engine
) -> None:
    """A model of the Responses endpoint is asked there, by our client, with our key."""
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]

    async with opened(engine=engine, max_retries=0) as service:
        result = await service.complete(
            messages, model, "openai", max_tokens=2000, **options
        )

    assert result.text == "Hello from the loopback."
    (request,) = server.requests
    assert request.path == "/v1/responses"
    assert request.headers["authorization"] == "Bearer sk-test-openai"
    assert request.headers["user-agent"] == "dipeo-llm"
    assert request.json["max_output_tokens"] == 2000
    assert '"system"' not in request.body.decode()
    assert "Be brief." in request.body.decode()


async def test_an_option_is_reported_left_out_beside_a_tool_that_has_its_name(
    service: LLMInfraService, server: ProviderServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A tool's parameter called temperature is not the model's temperature."""
    caplog.set_level(logging.INFO, "dipeo_llm")

    await service.complete(
        HELLO, "gpt-5-nano-2025-08-07", "openai", temperature=0.5, tools=[TOOL]
    )

    assert "temperature" not in server.requests[-1].json
    assert "does not take temperature" in caplog.text


async def test_options_as_one_object(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """`options=` bundles them, and a keyword of the call wins over the bundle."""
    bundle = LLMRequestOptions(temperature=0.1, max_tokens=7, seed=3)

    body = await send(service, server, "openai", options=bundle, temperature=0.9)

    assert {k: body[k] for k in ("temperature", "max_tokens", "seed")} == {
        "temperature": 0.9,
        "max_tokens": 7,
        "seed": 3,
    }


async def test_an_unknown_keyword_is_a_type_error(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """A misspelt option is named in a TypeError before anything is sent."""
    with pytest.raises(TypeError, match="'temprature'"):
        await service.complete(  # type: ignore[call-overload]
            HELLO, "gpt-4.1-nano", "openai", temprature=0.5
        )

    assert server.requests == []


@each_provider
async def test_two_services_for_one_call_are_an_error(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """One would have to be dropped without a word; the same one twice is fine."""
    with pytest.raises(TypeError, match="deepseek"):
        await service.complete(
            HELLO, "my-model", provider, service=provider, provider="deepseek"
        )
    assert server.requests == []

    enumerated = LLMService(provider)
    await service.complete(
        HELLO, MODELS[provider], provider, service=enumerated, provider=provider
    )
    assert server.requests[0].provider == provider


async def test_a_calls_service_wins_over_the_persons(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """It is the more explicit of the two."""
    person = PersonLLMConfig(service="openai", model="my-model", api_key_id="anthropic")

    await service.complete_with_person(
        [says("system", "Hello")], "optimist", person, service="anthropic"
    )

    assert server.requests[0].path == "/v1/messages"


@each_provider
async def test_labels_are_never_sent(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """DiPeO's labels of a call stay here: the bytes are those of a call without them."""
    await send(service, server, provider)
    await send(
        service,
        server,
        provider,
        execution_phase="planning",
        execution_id="exec-1",
        trace_id="trace-1",
        person_name="Optimist",
        node_id="node-1",
    )

    plain, labelled = server.requests
    assert labelled.body == plain.body
    assert labelled.headers == plain.headers


@pytest.mark.parametrize(
    ("provider", "extra"),
    [
        ("openai", {"user": "u-1"}),
        ("anthropic", {"metadata": {"user_id": "u-1"}}),
        ("google", {"safetySettings": [{"category": "A", "threshold": "OFF"}]}),
        ("ollama", {"keep_alive": "5m"}),
    ],
)
async def test_extra_body_reaches_the_wire(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    extra: dict[str, Any],
) -> None:
    """What this package does not know travels as it is, at the top of the body."""
    plain = await send(service, server, provider)

    body = await send(service, server, provider, extra_body=extra)

    assert body == {**plain, **extra}


async def test_extra_body_joins_the_options_that_the_body_has(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Ollama's num_ctx does not drive the temperature out, nor Google's topK."""
    ollama = await send(
        service,
        server,
        "ollama",
        temperature=0.5,
        extra_body={"options": {"num_ctx": 4096}},
    )
    google = await send(
        service,
        server,
        "google",
        temperature=0.5,
        extra_body={"generationConfig": {"topK": 5}},
    )

    assert ollama["options"] == {"temperature": 0.5, "num_ctx": 4096}
    assert google["generationConfig"] == {"temperature": 0.5, "topK": 5}


# --- messages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        [{"role": "system", "content": "Be kind."}],
        [{"role": "system", "content": "x"}, {"role": "developer", "content": "y"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
    ],
)
async def test_nothing_to_answer_is_refused_here(
    service: LLMInfraService,
    server: ProviderServer,
    messages: Sequence[Mapping[str, Any]] | None,
) -> None:
    """Without anything said, no provider is asked."""
    for provider in PROVIDERS:
        with pytest.raises(InvalidRequestError, match=r"nothing to answer|no messages"):
            await service.complete(messages, MODELS[provider], provider)

    assert server.requests == []


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "bot", "content": "x"}, "'bot'"),
        ({"content": "x"}, "None"),
        ({"role": "user", "content": 5}, "int"),
        ({"role": "user", "content": b"x"}, "bytes"),
    ],
)
async def test_a_message_of_no_possible_form_is_refused_here(
    service: LLMInfraService,
    server: ProviderServer,
    message: Mapping[str, Any],
    complaint: str,
) -> None:
    """The error counts the message and says what is wrong with it."""
    with pytest.raises(InvalidRequestError, match=rf"message 1 .*{complaint}"):
        await service.complete([*HELLO, message], "gpt-4.1-nano", "openai")

    assert server.requests == []


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("Hello", "got str"),
        (b"Hello", "got bytes"),
        ({"role": "user", "content": "Hello"}, "got dict"),
        (5, "int"),
        (["Hello"], "message 0 .* got str"),
        ([None], "message 0 .* got NoneType"),
    ],
)
async def test_messages_that_are_none_are_refused_here(
    service: LLMInfraService, server: ProviderServer, messages: Any, complaint: str
) -> None:
    """A text in place of a list is the slip that everybody makes once."""
    with pytest.raises(InvalidRequestError, match=complaint) as caught:
        await service.complete(messages, "gpt-4.1-nano", "openai")
    with pytest.raises(InvalidRequestError, match=complaint):
        service.stream(messages, "gpt-4.1-nano", "openai")

    assert caught.value.attempts == 0
    assert server.requests == []


async def test_a_request_that_cannot_be_made_counts_no_attempt(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """`attempts` is 0 where nothing was sent."""
    tool = {"type": "image_generation"}
    with pytest.raises(InvalidRequestError, match="no tool") as caught:
        await service.complete(HELLO, MODELS["anthropic"], "anthropic", tools=[tool])

    assert caught.value.attempts == 0
    assert server.requests == []


async def test_a_person_that_heard_only_silence_is_not_asked(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Empty utterances are no conversation."""
    silence = [says("critic", ""), says("system", "  ")]

    with pytest.raises(InvalidRequestError):
        await service.complete_with_person(
            silence, "optimist", config("openai", system_prompt="Be kind.")
        )

    assert server.requests == []


@each_provider
async def test_a_person_that_spoke_first(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """Every provider accepts a conversation that the person itself opened."""
    messages = [says("optimist", "Hello!", to="critic"), says("critic", "What now?")]

    result = await service.complete_with_person(
        messages, "optimist", config(provider, system_prompt="Be kind.")
    )

    assert result.text == "Hello from the loopback."
    assert turns(server.requests[-1])[-2:] == [
        ("assistant", ["Hello!"]),
        ("user", ["What now?"]),
    ]


@each_provider
async def test_neighbours_of_one_role(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """Several utterances in a row reach the model whole and in order."""
    messages = [
        says("system", "a"),
        says("critic", "b"),
        says("optimist", "c", to="critic"),
        says("optimist", "d", to="critic"),
        says("critic", "e"),
    ]

    await service.complete_with_person(messages, "optimist", config(provider))

    sent = turns(server.requests[-1])
    joined = [("user", ["a", "b"]), ("assistant", ["c", "d"]), ("user", ["e"])]
    apart = [(role, [text]) for role, texts in joined for text in texts]
    assert sent == (joined if provider in {"anthropic", "google"} else apart)


@each_provider
async def test_empty_utterances_are_left_out(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """An utterance without content is not sent: Anthropic refuses such a block."""
    messages = [says("critic", "a"), says("optimist", ""), says("critic", "b")]

    await service.complete_with_person(messages, "optimist", config(provider))

    texts = [text for _, texts in turns(server.requests[-1]) for text in texts]
    assert texts == ["a", "b"]


class ForeignService(enum.Enum):
    """An application's own enum of services."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GOOGLE = "google"
    OLLAMA = "ollama"


class ForeignPerson(enum.Enum):
    """An application's own enum of persons."""

    OPTIMIST = "optimist"
    CRITIC = "critic"
    SYSTEM = "system"


@dataclass
class ForeignMessage:
    """An application's own message, which knows more than ours."""

    from_person_id: ForeignPerson
    content: str
    to_person_id: ForeignPerson = ForeignPerson.OPTIMIST
    message_type: str = "person_to_person"
    token_count: int = 3


@dataclass
class ForeignConfig:
    """An application's own configuration of a person."""

    service: ForeignService
    model: str
    api_key_id: str
    system_prompt: str | None = "Be kind."
    prompt_file: str | None = None
    voice: str = field(default="alto")


@each_provider
async def test_the_applications_own_classes_will_do(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """Messages and configurations need the attributes, not the classes."""
    messages = [
        ForeignMessage(ForeignPerson.SYSTEM, "Discuss."),
        ForeignMessage(ForeignPerson.OPTIMIST, "Yes."),
        ForeignMessage(ForeignPerson.CRITIC, "No."),
    ]
    own = ForeignConfig(ForeignService(provider), MODELS[provider], provider)

    await service.complete_with_person(messages, "optimist", own)

    assert turns(server.requests[-1]) == [
        ("user", ["Discuss."]),
        ("assistant", ["Yes."]),
        ("user", ["No."]),
    ]
    assert server.requests[-1].path == PATHS[provider]


@each_provider
async def test_a_call_leaves_its_arguments_as_they_are(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """The same messages, tools and extra body may be used for the next call."""
    given: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        ],
        "tools": [copy.deepcopy(TOOL)],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "stop": ["X"],
        "extra_body": {},
    }
    before = copy.deepcopy(given)

    await service.complete(model=MODELS[provider], api_key_id=provider, **given)

    assert given == before
    assert len(server.requests) == 1


# --- the answer --------------------------------------------------------------------

USAGES = {
    "openai": TokenUsage(input=100, output=30, cached=40, total=130, reasoning=10),
    "anthropic": TokenUsage(
        input=100, output=30, cached=40, total=130, cache_written=20
    ),
    "google": TokenUsage(input=100, output=30, cached=40, total=130, reasoning=10),
    "ollama": TokenUsage(input=100, output=30, total=130),
}


@each_provider
async def test_an_answer_in_the_same_words_for_all(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """One answer gives one result; only what a provider does not count differs."""
    server.reply(
        Answer(
            "Grüße",
            input_tokens=100,
            output_tokens=30,
            cached_tokens=40,
            cache_write_tokens=20,
            reasoning_tokens=0 if provider == "anthropic" else 10,
        )
    )

    result = await service.complete(HELLO, MODELS[provider], provider)

    assert result.text == "Grüße"
    assert result.token_usage == USAGES[provider]
    assert result.finish_reason == "stop"
    assert result.tool_calls == []
    assert result.model == MODELS[provider]
    assert result.service == provider
    assert result.attempts == 1
    assert result.cached is False
    assert result.raw_response is not None


@each_provider
@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "tool_calls"])
async def test_why_the_model_stopped(
    service: LLMInfraService, server: ProviderServer, provider: str, reason: str
) -> None:
    """Finish reasons are OpenAI's four for every provider."""
    calls = [("weather", {"city": "Bonn"})] if reason == "tool_calls" else []
    server.reply(Answer(finish="stop" if calls else reason, tool_calls=calls))

    result = await service.complete(HELLO, MODELS[provider], provider)

    # Ollama has no word for a filter.
    no_word = provider == "ollama" and reason == "content_filter"
    assert result.finish_reason == ("stop" if no_word else reason)


@each_provider
async def test_a_turn_that_calls_tools_needs_no_form(
    service: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """With tools and a form, the answer has its form when no tool is asked for more."""
    # An older Gemini takes tools or a form.
    model = {"google": "gemini-3-pro-preview"}.get(provider, MODELS[provider])
    server.reply(Answer(tool_calls=[("weather", {"temperature": 1})]))
    result = await service.complete(
        HELLO, model, provider, tools=[TOOL], response_format=Weather
    )
    assert [call.name for call in result.tool_calls] == ["weather"]
    assert result.parsed is None

    server.reply(Answer('{"degrees": 20}'))
    async with service.stream(
        HELLO, model, provider, tools=[TOOL], response_format=Weather
    ) as stream:
        assert (await stream.result()).parsed == Weather(degrees=20)


@each_provider
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_without_its_form_is_told_like_any_failure(
    service: LLMInfraService, server: ProviderServer, provider: str, streamed: bool
) -> None:
    """The error has the status, the model that was asked, and the attempts."""
    server.reply(error(provider, 503), Answer("It is warm.", model="renamed"))
    asked = (HELLO, MODELS[provider], provider)

    async def ask() -> None:
        if not streamed:
            await service.complete(*asked, response_format=Weather)
        async with service.stream(*asked, response_format=Weather) as stream:
            await stream.result()

    with pytest.raises(StructuredOutputError) as caught:
        await ask()

    failed = caught.value
    assert (failed.text, failed.reason) == ("It is warm.", "invalid")
    assert (failed.status_code, failed.attempts) == (200, 2)
    assert (failed.service, failed.model) == (provider, MODELS[provider])


@pytest.mark.parametrize(
    ("provider", "text", "arguments"),
    [
        ("openai", '{"city": "Bo', None),
        ("openai", '["Bonn"]', None),
        ("openai", "", {}),
        ("openai", "{}", {}),
        # An object on the wire: it can be no broken JSON, but it can be no object.
        ("anthropic", '["Bonn"]', None),
        ("google", '["Bonn"]', None),
    ],
)
async def test_arguments_that_are_not_an_object(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    text: str,
    arguments: dict[str, Any] | None,
) -> None:
    """What cannot be read as an object is None, and its text is kept."""
    server.reply(Answer(tool_calls=[("weather", text)]))

    result = await service.complete(
        HELLO, MODELS[provider], provider, tools=[copy.deepcopy(TOOL)]
    )

    (call,) = result.tool_calls
    assert call.arguments == arguments
    assert call.arguments_text == text


@pytest.mark.parametrize(
    ("provider", "model", "cost"),
    [
        # USD per million tokens, in and out: 0.10 and 0.40, 3 and 15, 0.30 and 2.50.
        ("openai", "gpt-4.1-nano", 1000 * 0.10e-6 + 500 * 0.40e-6),
        ("anthropic", "claude-sonnet-4-5", 1000 * 3e-6 + 500 * 15e-6),
        ("google", "gemini-2.5-flash", 1000 * 0.30e-6 + 500 * 2.50e-6),
        ("ollama", "llama3.2:1b", None),
        ("ollama", "llama3.1", None),
        ("openai", "a-model-of-next-year", None),
        ("anthropic", "claude-9-of-next-year", None),
        ("google", "gemini-9-of-next-year", None),
    ],
)
async def test_cost(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    model: str,
    cost: float | None,
) -> None:
    """A price that is known is charged, one that is not is None and never 0."""
    server.reply(Answer(input_tokens=1000, output_tokens=500))

    result = await service.complete(HELLO, model, provider, service=provider)

    assert result.cost_usd == (cost if cost is None else pytest.approx(cost))


@each_provider
async def test_no_rate_limits_where_the_provider_says_nothing(
    service: LLMInfraService, provider: str
) -> None:
    """None, and not an object full of None."""
    result = await service.complete(HELLO, MODELS[provider], provider)

    assert result.rate_limits is None


@pytest.mark.parametrize(
    ("provider", "headers", "request_id"),
    [
        ("openai", {"x-request-id": "req_1"}, "req_1"),
        ("anthropic", {"request-id": "req_2"}, "req_2"),
        ("google", {}, "answer-1"),
        ("ollama", {}, None),
    ],
)
async def test_request_id(
    service: LLMInfraService,
    server: ProviderServer,
    provider: str,
    headers: dict[str, str],
    request_id: str | None,
) -> None:
    """The provider's name for the request, where it gives one."""
    server.reply(Answer(headers=headers, id="answer-1"))

    result = await service.complete(HELLO, MODELS[provider], provider)

    assert result.request_id == request_id


async def test_the_model_that_answered(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """`model` is the provider's account of it, not the caller's."""
    server.reply(Answer(model="gpt-4.1-nano-2025-04-14"))

    result = await service.complete(HELLO, "gpt-4.1-nano", "openai")

    assert result.model == "gpt-4.1-nano-2025-04-14"


async def test_a_prompt_that_google_blocks(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """A 200 without candidates that says why is a ContentFilterError, not retried."""
    server.reply(Raw(body=b'{"promptFeedback": {"blockReason": "SAFETY"}}'))

    with pytest.raises(ContentFilterError, match="SAFETY") as caught:
        await service.complete(HELLO, "gemini-2.5-flash", "google")

    assert caught.value.status_code == 200
    assert len(server.requests) == 1


# --- the service itself ------------------------------------------------------------


async def test_many_calls_at_once_do_not_mix(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Each of many simultaneous calls gets the answer to its own question."""

    def echo(asked: Received) -> Answer:
        return Answer(text=turns(asked)[-1][1][-1], delay=0.01)

    server.default = echo
    asked = [(provider, f"{provider} {i}") for i in range(10) for provider in PROVIDERS]

    results = await asyncio.gather(
        *(
            service.complete(
                [{"role": "user", "content": text}], MODELS[provider], provider
            )
            for provider, text in asked
        )
    )

    assert [(r.service, r.text) for r in results] == asked
    assert server.max_in_flight > 4


async def test_a_key_port_may_be_asynchronous(server: ProviderServer) -> None:
    """Keys may come out of a vault that has to be waited for."""

    class Vault:
        async def get_api_key(self, api_key_id: str) -> Mapping[str, Any]:
            await asyncio.sleep(0)
            return {"key": f"sk-of-{api_key_id}", "base_url": server.base_url("openai")}

    async with LLMInfraService(Vault(), settings=Settings()) as service:
        await service.complete(HELLO, "gpt-4.1-nano", "team-a")

    assert server.requests[-1].headers["authorization"] == "Bearer sk-of-team-a"


@pytest.fixture
async def by_settings(server: ProviderServer) -> AsyncIterator[LLMInfraService]:
    """Open a service that knows the server from its settings alone."""
    urls = {provider: server.base_url(provider) for provider in PROVIDERS}
    keys = StaticAPIKeys(dict.fromkeys(PROVIDERS, "sk-plain"))
    async with LLMInfraService(keys, settings=Settings(base_urls=urls)) as opened:
        yield opened


@each_provider
async def test_base_urls_of_the_settings(
    by_settings: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """Where the key's record names no base URL, the settings do."""
    await by_settings.complete(HELLO, MODELS[provider], provider)

    assert server.requests[-1].path == PATHS[provider]


async def test_ollama_needs_no_key(
    by_settings: LLMInfraService, server: ProviderServer
) -> None:
    """Without a key id a local model is called without any key header."""
    await by_settings.complete(HELLO, "llama3.2:1b")

    assert "authorization" not in server.requests[-1].headers
