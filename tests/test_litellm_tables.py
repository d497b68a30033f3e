"""What LiteLLM's tables are asked for: providers, abilities, prices."""

import json
from typing import Any

import pytest

from dipeo_llm import LLMInfraService, TokenUsage
from dipeo_llm.adapters.usage import token_usage
from dipeo_llm.litellm_import import import_litellm
from dipeo_llm.litellm_tables import (
    capabilities_of,
    cost,
    infer_provider,
    know_model,
    model_info,
    supports,
)
from tests.provider_server import ProviderServer, Raw


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Import LiteLLM as the package does."""
    return import_litellm()


# --- models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "litellm_name"),
    [
        ("groq/llama-3.3-70b-versatile", "groq"),
        ("gpt-4.1-nano", "openai"),
        ("gemini-2.5-flash", "vertex_ai"),
        ("github_copilot/gpt-4o", "github_copilot"),
        ("chatgpt/gpt-5", "chatgpt"),
        ("a-model-of-nobody", None),
        ("", None),
    ],
)
def test_infer_provider(model: str, litellm_name: str | None) -> None:
    """LiteLLM's name of the provider, without a sign-in for those that need one."""
    assert infer_provider(model) == litellm_name


def test_a_fine_tuned_model_has_a_row(litellm: Any) -> None:
    """The organisation and the suffix after the base model are ignored."""
    row = model_info(litellm, "openai", "ft:gpt-4o-2024-08-06:acme::id")

    assert row is not None
    assert row["litellm_provider"] == "openai"


@pytest.mark.parametrize(
    ("litellm_name", "model"),
    [("anthropic", "gpt-4.1-nano"), ("openai", "a-model-of-nobody"), ("openai", "")],
)
def test_another_providers_row_is_not_used(
    litellm: Any, litellm_name: str, model: str
) -> None:
    """A model's name alone does not make a row fit."""
    assert model_info(litellm, litellm_name, model) is None
    assert supports(litellm_name, litellm_name, model, "supports_vision") is None


def test_what_a_model_supports() -> None:
    """The table says yes, no, or nothing."""
    assert supports("openai", "openai", "gpt-4.1-nano", "supports_vision") is True
    assert supports("openai", "openai", "gpt-4.1-nano", "supports_nothing") is None
    assert supports("gemini", "google", "gemini-2.5-flash", "supports_pdf_input")


def test_capabilities() -> None:
    """Abilities and prices have our names; prices are left out where none are charged."""
    able = capabilities_of("google", "gemini", "gemini-2.5-flash")
    free = capabilities_of("google", "gemini", "gemini-2.5-flash", priced=False)
    unknown = capabilities_of("openai", "openai", "a-model-of-nobody")

    assert (able.service, able.model) == ("google", "gemini-2.5-flash")
    assert (able.tools, able.context_window) == (True, 1048576)
    assert (able.input_usd_per_million, able.output_usd_per_million) == (0.3, 2.5)
    assert free.tools
    assert free.input_usd_per_million is None
    assert unknown.tools is None


def test_a_model_that_is_added(litellm: Any) -> None:
    """LiteLLM knows it then, and our own questions still find it unknown."""
    model, rows = "gemini-of-this-test", {"gemini": {"supports_system_messages": True}}
    assert not litellm.utils.supports_system_messages(model, "gemini")

    know_model(litellm, model, rows)

    assert litellm.utils.supports_system_messages(model, "gemini")
    assert model_info(litellm, "gemini", model) is None


def test_a_row_of_litellms_own_is_kept(litellm: Any) -> None:
    """Adding a model that the table has changes nothing."""
    before = dict(litellm.model_cost["gemini/gemini-2.5-flash"])

    know_model(litellm, "gemini-2.5-flash", {"gemini": {"mode": "changed"}})

    assert litellm.model_cost["gemini/gemini-2.5-flash"] == before
    assert model_info(litellm, "gemini", "gemini-2.5-flash") == before


# --- prices --------------------------------------------------------------------------

# A provider's usage, and its price by hand. USD per million tokens, read 2026-11-25:
# https://openai.com/api/pricing, https://platform.claude.com/docs/en/about-claude/pricing
# and https://ai.google.dev/gemini-api/docs/pricing, as LiteLLM's table has them.
PRICED: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "plain": (
        "openai",
        "gpt-4.1-nano",
        {
            "prompt_tokens": 1000,
            "completion_tokens": 500,
            "prompt_tokens_details": {"cached_tokens": 400, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        600 * 0.10e-6 + 400 * 0.025e-6 + 500 * 0.40e-6,
    ),
    "a cache of five minutes": (
        "anthropic",
        "claude-sonnet-4-5",
        {
            "input_tokens": 100,
            "cache_read_input_tokens": 1000,
            "cache_creation_input_tokens": 3000,
            "cache_creation": {
                "ephemeral_5m_input_tokens": 3000,
                "ephemeral_1h_input_tokens": 0,
            },
            "output_tokens": 500,
            "service_tier": "standard",
        },
        100 * 3e-6 + 1000 * 0.3e-6 + 3000 * 3.75e-6 + 500 * 15e-6,
    ),
    "a cache of an hour": (
        "anthropic",
        "claude-sonnet-4-5",
        {
            "input_tokens": 100,
            "cache_read_input_tokens": 1000,
            "cache_creation_input_tokens": 3000,
            "cache_creation": {
                "ephemeral_5m_input_tokens": 1000,
                "ephemeral_1h_input_tokens": 2000,
            },
            "output_tokens": 500,
        },
        100 * 3e-6 + 1000 * 0.3e-6 + 1000 * 3.75e-6 + 2000 * 6e-6 + 500 * 15e-6,
    ),
    "a cache of an hour, as LiteLLM counts it": (
        "anthropic",
        "claude-sonnet-4-5",
        {
            "prompt_tokens": 3100,
            "completion_tokens": 500,
            "cache_creation_input_tokens": 3000,
            "prompt_tokens_details": {
                "cache_creation_token_details": {
                    "ephemeral_5m_input_tokens": 1000,
                    "ephemeral_1h_input_tokens": 2000,
                }
            },
        },
        100 * 3e-6 + 1000 * 3.75e-6 + 2000 * 6e-6 + 500 * 15e-6,
    ),
    "only in the United States": (
        "anthropic",
        "claude-opus-4-6",
        {"input_tokens": 1000, "output_tokens": 500, "inference_geo": "us"},
        1.1 * (1000 * 5e-6 + 500 * 25e-6),
    ),
    "anywhere": (
        "anthropic",
        "claude-opus-4-6",
        {"input_tokens": 1000, "output_tokens": 500, "inference_geo": "global"},
        1000 * 5e-6 + 500 * 25e-6,
    ),
    "audio in and out": (
        "openai",
        "gpt-audio",
        {
            "prompt_tokens": 1000,
            "completion_tokens": 500,
            "total_tokens": 1500,
            "prompt_tokens_details": {"audio_tokens": 800, "cached_tokens": 0},
            "completion_tokens_details": {"audio_tokens": 400, "text_tokens": 100},
        },
        200 * 2.5e-6 + 800 * 32e-6 + 100 * 10e-6 + 400 * 64e-6,
    ),
    "audio in and out, Responses": (
        "openai",
        "gpt-audio",
        {
            "input_tokens": 1000,
            "output_tokens": 500,
            "input_tokens_details": {"audio_tokens": 800, "cached_tokens": 0},
            "output_tokens_details": {"audio_tokens": 400},
        },
        200 * 2.5e-6 + 800 * 32e-6 + 100 * 10e-6 + 400 * 64e-6,
    ),
    "audio in, Gemini": (
        "gemini",
        "gemini-2.5-flash",
        {
            "promptTokenCount": 1000,
            "candidatesTokenCount": 200,
            "thoughtsTokenCount": 100,
            "totalTokenCount": 1300,
            "promptTokensDetails": [
                {"modality": "TEXT", "tokenCount": 200},
                {"modality": "AUDIO", "tokenCount": 800},
            ],
        },
        200 * 0.30e-6 + 800 * 1.00e-6 + 300 * 2.50e-6,
    ),
    "text in, Gemini": (
        "gemini",
        "gemini-2.5-flash",
        {
            "promptTokenCount": 1000,
            "candidatesTokenCount": 200,
            "thoughtsTokenCount": 100,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1000}],
        },
        1000 * 0.30e-6 + 300 * 2.50e-6,
    ),
    "an image in, Gemini": (
        "gemini",
        "gemini-2.5-flash",
        {
            "promptTokenCount": 264,
            "candidatesTokenCount": 6,
            "promptTokensDetails": [
                {"modality": "TEXT", "tokenCount": 6},
                {"modality": "IMAGE", "tokenCount": 258},
            ],
        },
        264 * 0.30e-6 + 6 * 2.50e-6,
    ),
    "an image out, Gemini": (
        "gemini",
        "gemini-2.5-flash-image",
        {
            "promptTokenCount": 1000,
            "candidatesTokenCount": 1300,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1000}],
            "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 1290}],
        },
        1000 * 0.30e-6 + 1290 * 30e-6 + 10 * 2.50e-6,
    ),
    "a short prompt": (
        "gemini",
        "gemini-2.5-pro",
        {"promptTokenCount": 3000, "candidatesTokenCount": 1000},
        3000 * 1.25e-6 + 1000 * 10e-6,
    ),
    "a long prompt": (
        "gemini",
        "gemini-2.5-pro",
        {"promptTokenCount": 300_000, "candidatesTokenCount": 1000},
        300_000 * 2.5e-6 + 1000 * 15e-6,
    ),
    # The example of https://openrouter.ai/docs/use-cases/usage-accounting
    "reported by OpenRouter": (
        "openrouter",
        "a-model-of-nobody",
        {
            "completion_tokens": 2,
            "cost": 0.95,
            "cost_details": {"upstream_inference_cost": 19},
            "prompt_tokens": 194,
            "total_tokens": 196,
        },
        0.95,
    ),
    "the priority tier": (
        "openai",
        "gpt-5.4",
        {
            "prompt_tokens": 3000,
            "completion_tokens": 1000,
            "service_tier": "priority",
        },
        3000 * 5e-6 + 1000 * 30e-6,
    ),
}


@pytest.mark.parametrize("kind", PRICED)
def test_a_price_by_hand(litellm: Any, kind: str) -> None:
    """Each kind of token is charged at its own price."""
    litellm_name, model, raw, usd = PRICED[kind]

    got = cost(litellm, litellm_name, model, token_usage(raw), raw)

    assert got == pytest.approx(usd)


# The providers whose answers are read here, and gateways that LiteLLM reaches.
_PROVIDERS = (
    *("openai", "anthropic", "gemini", "deepseek", "groq", "mistral", "xai"),
    *("fireworks_ai", "together_ai", "openrouter", "perplexity", "moonshot"),
)


@pytest.mark.parametrize("input_tokens", [5_000, 400_000])
def test_the_fast_way_and_litellms_agree(litellm: Any, input_tokens: int) -> None:
    """For every model of the table, whatever its rules are."""
    usage = TokenUsage(
        input=input_tokens, output=300, cached=1000, cache_written=500, reasoning=100
    )
    counts = litellm.Usage(
        prompt_tokens=input_tokens,
        completion_tokens=300,
        total_tokens=input_tokens + 300,
        prompt_tokens_details={"cached_tokens": 1000, "cache_creation_tokens": 500},
        completion_tokens_details={"reasoning_tokens": 100},
    )
    tried, different = 0, []
    for key, row in list(litellm.model_cost.items()):
        litellm_name = row.get("litellm_provider")
        model = key.removeprefix(f"{litellm_name}/")
        if row.get("mode") != "chat" or litellm_name not in _PROVIDERS:
            continue
        got = cost(litellm, litellm_name, model, usage, {})
        if got is None:
            continue
        wanted = sum(
            litellm.cost_per_token(
                model=model, custom_llm_provider=litellm_name, usage_object=counts
            )
        )
        tried += 1
        if got != pytest.approx(wanted):
            different.append((key, got, wanted))

    assert tried > 300
    assert different == []


@pytest.mark.parametrize(
    ("litellm_name", "model", "raw"),
    [
        ("openai", "a-model-of-nobody", {"prompt_tokens": 9, "completion_tokens": 1}),
        ("ollama_chat", "llama3.1", {"prompt_eval_count": 9, "eval_count": 1}),
        ("openai", "gpt-4.1-nano", None),
        ("openai", "gpt-4.1-nano", {}),
        ("openrouter", "x", {"prompt_tokens": 9, "cost": True, "cost_details": {}}),
        (
            "openrouter",
            "x",
            {"prompt_tokens": 9, "cost": 0.1, "cost_details": {}, "is_byok": True},
        ),
        ("openrouter", "x", {"prompt_tokens": 9, "cost": 1e999, "cost_details": {}}),
        # The table has no price of audio or images in this model's answer.
        (
            "openai",
            "gpt-4o",
            {"prompt_tokens": 9, "completion_tokens_details": {"audio_tokens": 9}},
        ),
        (
            "openai",
            "gpt-4o",
            {"prompt_tokens": 9, "completion_tokens_details": {"image_tokens": 9}},
        ),
        # What LiteLLM cannot read costs the price, and not the answer.
        (
            "openai",
            "gpt-4o",
            {"prompt_tokens": 9, "prompt_tokens_details": {"audio_tokens": "many"}},
        ),
        (
            "gemini",
            "gemini-2.5-flash",
            {
                "promptTokenCount": 9,
                "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 9}],
                "cacheTokensDetails": [5],
            },
        ),
    ],
)
def test_no_price(
    litellm: Any, litellm_name: str, model: str, raw: dict[str, Any] | None
) -> None:
    """An unknown price is None, never 0, and never an exception."""
    assert cost(litellm, litellm_name, model, token_usage(raw), raw) is None


def test_no_price_without_a_number(litellm: Any) -> None:
    """Python reads NaN from JSON; a price is always a finite number."""
    raw = {"prompt_tokens": 9, "prompt_tokens_details": {"audio_tokens": float("nan")}}

    assert cost(litellm, "openai", "gpt-audio", token_usage(raw), raw) is None


async def test_the_price_of_an_answer_with_audio(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """The usage of a real answer reaches the calculation."""
    server.rules = False  # its answer is all that counts
    _, model, usage, usd = PRICED["audio in and out"]
    message = {"role": "assistant", "content": "Hi"}
    answer = {
        "id": "x",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }
    server.default = Raw(
        headers={"content-type": "application/json"}, body=json.dumps(answer).encode()
    )

    result = await service.complete(
        [{"role": "user", "content": "Hi"}], model, "openai"
    )

    assert result.cost_usd == pytest.approx(usd)
