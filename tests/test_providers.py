"""Model names: whose they are, and that no name is ever sent to a guess."""

import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm.adapters.factory import by_name
from dipeo_llm.domain import LLMService
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.service import LLMInfraService
from tests.provider_server import ProviderServer

USER = [{"role": "user", "content": "hello"}]

OPENAI = [
    "gpt-4.1-nano",
    "gpt-4o",
    "gpt-4o-mini-2024-07-18",
    "gpt-3.5-turbo",
    "gpt-5",
    "gpt-5.1-codex-mini",
    "gpt-5-pro",
    "gpt-4o-search-preview",
    "chatgpt-4o-latest",
    "o1",
    "o1-mini",
    "o3",
    "o4-mini",
    "o4-mini-deep-research",
    "codex-mini-latest",
    "computer-use-preview",
    "ft:gpt-4o-mini:org::id",
    "ft:gpt-4.1-nano-2025-04-14:my-org:suffix:AbC123",
    "ft:gpt-3.5-turbo-0125:org::id",
    "ft:o4-mini-2025-04-16:org::id",
    "ft:gpt-6-nano:org::id",
    "openai/gpt-4o",
    "openai/o3",
    "OpenAI/gpt-4o",
    "openai/my-own-fine-tune",
    "openai/gpt-oss-120b",
    "openai/ft:gpt-4o-mini:org::id",
]
ANTHROPIC = [
    "claude-opus-4-1",
    "claude-opus-4-1-20250805",
    "claude-sonnet-4-5",
    "claude-haiku-4-5",
    "claude-3-7-sonnet-latest",
    "claude-3-5-haiku-latest",
    "claude-3-5-haiku-20241022",
    "claude-3-opus-20240229",
    "claude-instant-1.2",
    "anthropic/claude-sonnet-4-5",
    "claude/claude-sonnet-4-5",
]
GOOGLE = [
    "gemini-2.5-flash",
    "gemini-2.5-pro",
    "gemini-2.5-flash-lite-preview-09-2025",
    "gemini-2.0-flash",
    "gemini-1.5-pro",
    "gemini-1.5-flash-8b",
    "gemini-flash-latest",
    "gemini-3-pro-preview",
    "gemma-3-27b-it",
    "learnlm-2.0-flash-experimental",
    "models/gemini-2.5-flash",
    "gemini/gemini-2.5-flash",
    "google/gemini-2.5-flash",
    "google/gemma-3-27b-it",
]
OLLAMA = [
    "llama3.2:1b",
    "llama3.2",
    "llama3.1:8b-instruct-q4_K_M",
    "llama3.2-vision:11b",
    "qwen3",
    "qwen3:0.6b",
    "qwen2.5-coder:7b",
    "qwen2.5vl:7b",
    "gemma3",
    "gemma3:1b",
    "gemma3n:e2b",
    "phi4",
    "phi4-mini",
    "mistral",
    "mistral:7b",
    "mistral-nemo",
    "mistral-small3.2",
    "mixtral:8x7b",
    "deepseek-r1:8b",
    "deepseek-r1",
    "gpt-oss",
    "gpt-oss:20b",
    "smollm2:135m",
    "tinyllama",
    "llava",
    "codellama",
    "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
    "somebody/their-model:latest",
    "ollama/llama3.2:1b",
    "ollama_chat/llama3.2:1b",
    "ollama/anything-at-all",
]
OTHERS = {
    "deepseek-chat": "deepseek",
    "deepseek-reasoner": "deepseek",
    "deepseek/deepseek-chat": "deepseek",
    "anthropic.claude-3-5-sonnet-20240620-v1:0": "bedrock",
    "us.anthropic.claude-sonnet-4-20250514-v1:0": "bedrock",
    "eu.anthropic.claude-sonnet-4-20250514-v1:0": "bedrock",
    "us-gov.anthropic.claude-3-5-sonnet-20240620-v1:0": "bedrock",
    "ca.amazon.nova-lite-v1:0": "bedrock",
    "amazon.nova-pro-v1:0": "bedrock",
    "meta.llama3-1-8b-instruct-v1:0": "bedrock",
    "bedrock/anthropic.claude-3-haiku-20240307-v1:0": "bedrock",
    "vertex_ai/gemini-2.5-pro": "vertex",
    "vertex/gemini-2.5-pro": "vertex",
    "groq/llama-3.1-8b-instant": "groq",
    "mistral/mistral-large-latest": "mistral",
    "xai/grok-4": "xai",
    "openrouter/openai/gpt-4o": "openrouter",
    "openrouter/anthropic/claude-sonnet-4-5:beta": "openrouter",
    "together_ai/meta-llama/Llama-3-70b-chat-hf": "together_ai",
    "perplexity/sonar": "perplexity",
    "fireworks_ai/accounts/fireworks/models/llama-v3-8b": "fireworks_ai",
    "azure/my-deployment": "azure",
    "azure/command-r-plus": "azure",
    "cohere/command-r-plus": "cohere",
    "cerebras/llama3.1-8b": "cerebras",
    "hosted_vllm/my-model": "hosted_vllm",
    "nvidia_nim/meta/llama3-70b-instruct": "nvidia_nim",
}
KNOWN: dict[str, str] = {
    **dict.fromkeys(OPENAI, "openai"),
    **dict.fromkeys(ANTHROPIC, "anthropic"),
    **dict.fromkeys(GOOGLE, "google"),
    **dict.fromkeys(OLLAMA, "ollama"),
    **OTHERS,
}
UNKNOWN = [
    "unknown-model-xyz",
    "mistral-large-latest",
    "mistral-small-latest",
    "codestral-latest",
    "command-r-plus",
    "grok-4",
    "sonar",
    "gpt-oss-120b",
    "deepseek-whatever",
    "llama-3.3-70b-versatile",
    "meta-llama/Llama-3-70b-chat-hf",
    "somebody/their-model",
    "claude",
    "claude-sonnet-4-5:thinking",
    "claude-3-5-sonnet@20240620",
    "gemini-2.5-flash:free",
    "gpt",
    "openai",
    "anthropic",
    "ollama",
    "openai/",
    "/gpt-4o",
    "my model:latest",
    "https://example.com:8000",
    "no\nsuch\nmodel",
]
# LiteLLM would ask a person to log in with a browser for these.
LOGIN = ["github_copilot/gpt-4", "chatgpt/gpt-5"]
NO_NAME: list[Any] = ["", " ", "\n", None]


@pytest.mark.parametrize(("model", "provider"), KNOWN.items())
async def test_a_model_string_tells_its_provider(
    service: LLMInfraService, server: ProviderServer, model: str, provider: str
) -> None:
    """Real names, bare or with a prefix or a tag, lead to the provider they belong to."""
    assert await service.get_provider_for_model(model) == provider
    assert server.connections == 0


@pytest.mark.parametrize("model", [*UNKNOWN, *NO_NAME])
async def test_a_name_that_nobody_claims_has_no_provider(
    service: LLMInfraService, model: Any
) -> None:
    """A name that could be several providers', or nobody's, is not guessed at."""
    assert await service.get_provider_for_model(model) is None


@pytest.mark.parametrize("model", [*UNKNOWN, *NO_NAME])
async def test_a_call_for_an_unknown_name_is_refused(
    service: LLMInfraService, server: ProviderServer, model: Any
) -> None:
    """Nothing is sent for a name that cannot be placed, whatever key was named."""
    with pytest.raises(InvalidRequestError):
        await service.complete(USER, model, "openai")

    assert server.connections == 0


async def test_the_refusal_says_how_to_name_the_service(
    service: LLMInfraService,
) -> None:
    """Whoever used an unknown name learns two ways to say whose it is."""
    with pytest.raises(InvalidRequestError) as caught:
        await service.complete(USER, "unknown-model-xyz", "openai")

    message = str(caught.value)
    assert "'unknown-model-xyz'" in message
    assert "service='openai'" in message
    assert "'openai/unknown-model-xyz'" in message
    assert caught.value.model == "unknown-model-xyz"


class _Service(Enum):
    OPENAI = "openai"


WINNERS: list[tuple[str, Any, str, str]] = [
    # model, service, key, the path or name that must be on the wire
    ("gpt-4o", None, "openai", "openai gpt-4o"),
    ("openai/gpt-4o", None, "openai", "openai gpt-4o"),
    ("openai/gpt-4o", "openai", "openai", "openai gpt-4o"),
    ("openai/llama3.2:1b", None, "openai", "openai llama3.2:1b"),
    ("openai/llama-9", None, "openai", "openai llama-9"),
    ("claude-9-of-next-year", None, "anthropic", "anthropic claude-9-of-next-year"),
    ("gpt-4o", "ollama", "ollama", "ollama gpt-4o"),
    ("llama3.2:1b", "openai", "openai", "openai llama3.2:1b"),
    ("claude-sonnet-4-5", LLMService.OPENAI, "openai", "openai claude-sonnet-4-5"),
    ("anthropic/claude-x", _Service.OPENAI, "openai", "openai anthropic/claude-x"),
    ("unknown-model-xyz", "openai", "openai", "openai unknown-model-xyz"),
    ("ft:gpt-4o-mini:org::id", None, "openai", "openai ft:gpt-4o-mini:org::id"),
    ("anthropic/claude-x", None, "anthropic", "anthropic claude-x"),
    ("anthropic/gpt-4o", None, "anthropic", "anthropic gpt-4o"),
    ("claude-opus-4-1", "claude", "anthropic", "anthropic claude-opus-4-1"),
    ("claude/claude-opus-4-1", "anthropic", "anthropic", "anthropic claude-opus-4-1"),
    ("google/gemini-2.5-flash", "gemini", "google", "google gemini-2.5-flash"),
    ("gemini/gemini-2.5-flash", LLMService.GOOGLE, "google", "google gemini-2.5-flash"),
    ("models/gemini-2.5-flash", None, "google", "google gemini-2.5-flash"),
    ("models/gemini-2.5-flash", "google", "google", "google gemini-2.5-flash"),
    ("gemini/models/gemini-2.5-flash", None, "google", "google gemini-2.5-flash"),
    ("ollama/gpt-4o", None, "ollama", "ollama gpt-4o"),
    ("ollama_chat/llama3.2:1b", "ollama", "ollama", "ollama llama3.2:1b"),
    ("gpt-oss:20b", None, "ollama", "ollama gpt-oss:20b"),
    ("hf.co/a/b-GGUF:Q4_K_M", None, "ollama", "ollama hf.co/a/b-GGUF:Q4_K_M"),
]


@pytest.mark.parametrize(("model", "named", "key", "wire"), WINNERS)
async def test_the_service_wins_over_the_prefix_and_that_over_the_name(
    service: LLMInfraService,
    server: ProviderServer,
    model: str,
    named: Any,
    key: str,
    wire: str,
) -> None:
    """The call reaches the provider that was said most plainly, under the bare name."""
    await service.complete(USER, model, key, service=named)

    (request,) = server.requests
    name = request.json.get("model") or request.path.split("/")[-1].split(":")[0]
    assert f"{request.provider} {name}" == wire


@pytest.mark.parametrize("keyword", ["service", "provider", "service_name"])
async def test_a_service_has_three_keywords(
    service: LLMInfraService, server: ProviderServer, keyword: str
) -> None:
    """The older names of the keyword mean the same."""
    options: dict[str, Any] = {keyword: "openai"}

    await service.complete(USER, "unknown-model-xyz", "openai", **options)

    assert server.requests[0].provider == "openai"


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        *((service, service.value) for service in LLMService if service != "gemini"),
        (LLMService.GEMINI, "google"),
        ("ollama_chat", "ollama"),
        ("claude", "anthropic"),
        ("google_ai_studio", "google"),
        ("vertex_ai", "vertex"),
        ("vertexai", "vertex"),
        ("aws", "bedrock"),
        (" OpenAI ", "openai"),
        (_Service.OPENAI, "openai"),
        ("groq", "groq"),
    ],
)
def test_a_service_is_found_by_any_of_its_names(name: Any, provider: str) -> None:
    """A service may be a string, an alias or any enum; LiteLLM's others pass through."""
    assert by_name(name).name == provider


@pytest.mark.parametrize("name", ["", "a b", "open/ai", "1", object(), 3, ["openai"]])
def test_what_is_no_name_is_no_service(name: Any) -> None:
    """A service that cannot be a name is refused before anything is looked up."""
    with pytest.raises(
        InvalidRequestError, match=r"name of a service|unknown provider"
    ):
        by_name(name)


LEADING_ELSEWHERE = {
    "USE_LITELLM_PROXY": "True",
    "LITELLM_PROXY_API_BASE": "http://127.0.0.1:1",
    "OPENAI_API_BASE": "http://127.0.0.1:1",
    "GROQ_API_BASE": "http://127.0.0.1:1",
}


@pytest.mark.parametrize("more", [{}, LEADING_ELSEWHERE], ids=["bare", "leading"])
def test_placing_a_name_asks_nobody(tmp_path: Path, more: dict[str, str]) -> None:
    """No name and no variable makes it look a host up, connect, or write a file."""
    names = [*KNOWN, *UNKNOWN]

    seen = _in_a_new_process(
        [*names, *LOGIN], {**os.environ, "HOME": str(tmp_path), **more}
    )

    placed = dict(zip(names, seen["providers"], strict=False))
    assert {n: p for n, p in placed.items() if p != KNOWN.get(n)} == {}
    assert seen["network"] == []
    assert seen["stdout"] == ""
    assert list(tmp_path.iterdir()) == []


_PLACE = """
import asyncio, contextlib, io, json, sys
from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys

network = []
def watch(event, args):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
        network.append(f"{event} {args[-1] if event == 'socket.connect' else args[0]}")

async def main():
    service = LLMInfraService(StaticAPIKeys({}), settings=Settings())
    await service.initialize()
    sys.addaudithook(watch)
    return [await service.get_provider_for_model(m) for m in json.loads(sys.argv[1])]

with contextlib.redirect_stdout(io.StringIO()) as stdout:
    providers = asyncio.run(main())
seen = {"providers": providers, "network": network, "stdout": stdout.getvalue()}
print(json.dumps(seen))
"""


def _in_a_new_process(models: list[str], environment: dict[str, str]) -> Any:
    """Place names in a process of its own, and say what it did besides."""
    done = subprocess.run(
        [sys.executable, "-c", _PLACE, json.dumps(models)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)
