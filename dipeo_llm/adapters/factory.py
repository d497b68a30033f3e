"""Which provider a model name belongs to, and what is particular to each provider.

Rows of data. A model name is looked up here first; what no row claims is LiteLLM's to
infer, which `litellm_gate` asks, since LiteLLM must not be named here.
"""

import re
from dataclasses import dataclass
from typing import Any

from dipeo_llm.errors import InvalidRequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One provider."""

    name: str
    """What it is called here, in results, errors and settings."""
    litellm: str
    """What LiteLLM calls it."""
    aliases: tuple[str, ...] = ()
    """Other names, as a service or as the prefix of a model string."""
    format: str | None = None
    """Whose wire format it speaks; None where only LiteLLM knows it."""
    base_url: str | None = None
    """Where it lives; None where only LiteLLM or the key's record can tell."""
    path: str = ""
    """What a base URL without a path is completed with."""
    key_header: str = "authorization"
    """The header that carries the key; "authorization" takes a Bearer token."""
    needs_key: bool = True
    key_variables: tuple[str, ...] = ()
    """Environment variables that hold its key, first one set wins."""
    system_role: str = "system"
    """The role of a system prompt on its wire."""
    claims: re.Pattern[str] = re.compile(r"(?!)")
    """Bare model names that are its own."""


# Families of Ollama's library (https://ollama.com/library, read 2026-11-23) that no
# hosted provider of ours serves under the bare name. A size after the family is written
# as a tag (`llama3.2:1b`), so hosted names such as `mistral-large-latest` do not match.
_OLLAMA_FAMILIES = (
    r"llama(?:\d+(?:\.\d+)?)?(?:-(?:vision|guard\d?|pro|chinese))?|llama-guard\d|codellama"
    r"|llava(?:-[\w.]+)?|bakllava|tinyllama|tinydolphin|mistral(?:-nemo|-small[\d.]*|lite)?"
    r"|mixtral|magistral|devstral|codestral|qwen[\d.]*(?:-coder|-math|vl)?|codeqwen|qwq"
    r"|gemma\d*n?|codegemma|phi[\d.]*(?:-mini|-reasoning|-mini-reasoning)?|gpt-oss"
    r"|deepseek-(?:r1|v2|v2\.5|v3|coder|coder-v2|llm)|smollm\d?|granite[\w.-]*"
    r"|nemotron(?:-mini)?|olmo\d?|falcon\d?|vicuna|zephyr|starcoder\d?|yi|yi-coder"
    r"|orca-mini|orca\d?|wizardlm\d?|wizardcoder|dolphin[\w.-]*|solar|stablelm\d?"
    r"|nous-hermes\d?|hermes\d|openchat|aya|aya-expanse|exaone[\w.-]*|cogito|minicpm-v"
    r"|moondream|nomic-embed-text|mxbai-embed-large|all-minilm|bge-m3|snowflake-arctic-embed"
)

PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="openai",
        litellm="openai",
        format="openai",
        base_url="https://api.openai.com/v1",
        path="/v1",
        key_variables=("OPENAI_API_KEY",),
        system_role="developer",
        claims=re.compile(
            r"(?:ft:)?(?:gpt-(?!oss)[\w.-]+|chatgpt-[\w.-]+|o[1-9](?:-[\w.-]+)?"
            r"|codex-[\w.-]+|davinci-002|babbage-002)(?::.*)?"
            r"|computer-use-preview[\w.-]*|text-embedding-(?:3|ada)-[\w.-]+"
            r"|dall-e-\d|whisper-1|tts-1[\w.-]*|omni-moderation-[\w.-]+"
        ),
    ),
    Provider(
        name="anthropic",
        litellm="anthropic",
        format="anthropic",
        aliases=("claude",),
        base_url="https://api.anthropic.com",
        key_header="x-api-key",
        key_variables=("ANTHROPIC_API_KEY",),
        claims=re.compile(r"claude-[\w.-]+"),
    ),
    Provider(
        name="google",
        litellm="gemini",
        format="google",
        aliases=("gemini", "google_ai_studio"),
        base_url="https://generativelanguage.googleapis.com/v1beta",
        path="/v1beta",
        key_header="x-goog-api-key",
        key_variables=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        claims=re.compile(
            r"(?:models/)?(?:gemini-[\w.-]+|gemma-\d[\w.-]*|learnlm-[\w.-]+)"
        ),
    ),
    Provider(
        name="ollama",
        litellm="ollama_chat",
        format="ollama",
        aliases=("ollama_chat",),
        base_url="http://127.0.0.1:11434",
        needs_key=False,
        claims=re.compile(rf"(?:{_OLLAMA_FAMILIES})(?::[\w.-]+)?", re.IGNORECASE),
    ),
    Provider(
        name="deepseek",
        litellm="deepseek",
        format="openai",
        base_url="https://api.deepseek.com/v1",
        key_variables=("DEEPSEEK_API_KEY",),
        claims=re.compile(r"deepseek-(?:chat|reasoner)"),
    ),
    Provider(
        name="bedrock",
        litellm="bedrock",
        aliases=("aws",),
        key_variables=("AWS_BEARER_TOKEN_BEDROCK",),
        claims=re.compile(
            r"(?:[a-z]{2,6}(?:-gov)?\.)?(?:anthropic|amazon|meta|cohere|mistral|ai21"
            r"|deepseek)\.[\w.:-]+"
        ),
    ),
    Provider(name="vertex", litellm="vertex_ai", aliases=("vertex_ai", "vertexai")),
)

_BY_NAME = {
    name: row for row in PROVIDERS for name in (row.name, row.litellm, *row.aliases)
}

# What LiteLLM reaches through the client that it is given, tried on 1.105.3 with a call
# and a stream each: tests/test_providers.py tries them again. Others it would reach with
# a client of its own, outside the fence, or not at all without an SDK's client.
_REACHED = frozenset(
    {
        *(row.name for row in PROVIDERS),
        "azure_ai",
        "databricks",
        "fireworks_ai",
        "groq",
        "hosted_vllm",
        "mistral",
        "openrouter",
        "together_ai",
        "xai",
    }
)

# `name:tag` is how Ollama writes a model, and `hf.co/user/repo` how it names a GGUF file
# on a hub. Only asked after every row and LiteLLM have declined.
_OLLAMA_TAG = re.compile(
    r"(?:hf\.co/|huggingface\.co/)[\w.-]+/[\w.-]+(?::[\w.-]+)?"
    r"|(?:[\w.-]+/)?[\w.-]+:[\w.-]+"
)


def by_name(service: Any) -> Provider:
    """Find a provider by the name of a service: a string, or an enum of strings.

    A name that no row has is passed on as LiteLLM's own name for a provider, such as
    `service="groq"`.

    Raises:
        InvalidRequestError: *service* is not a name at all.
    """
    name = str(getattr(service, "value", service)).strip().lower()
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise InvalidRequestError(f"{service!r} is not the name of a service")
    return _BY_NAME.get(name) or Provider(name=name, litellm=name)


def check_reach(provider: Provider) -> None:
    """Refuse a provider that LiteLLM knows, but would not reach over our client.

    Raises:
        InvalidRequestError: It says which are reached, and how others may be.
    """
    if provider.name not in _REACHED:
        raise InvalidRequestError(
            f"{provider.name} is not reached from here, only"
            f" {', '.join(sorted(_REACHED))}. A server that speaks OpenAI's format is"
            " reached as service='openai', with its base_url in the key's record",
            service=provider.name,
        )


def of_key(api_key_id: Any) -> Provider | None:
    """Tell whose a key is by its id: a variable's name, or one that begins with a name.

    `OPENAI_API_KEY`, `openai` and `openai_key` are all OpenAI's.
    """
    text = str(api_key_id).strip()
    for row in PROVIDERS:
        if text.upper() in row.key_variables:
            return row
    return _BY_NAME.get(re.split(r"[^a-z]", text.lower(), maxsplit=1)[0])


def split(model: str, service: Any = None) -> tuple[Provider | None, str]:
    """Find the provider of a model string, and the name without the provider's prefix.

    An explicit *service* wins over a prefix, and that over the name: with
    `service="openai"`, `anthropic/claude-x` is the name of a model on an
    OpenAI-compatible server, while `openai/gpt-4o` loses its prefix.

    Returns:
        The provider, or None where LiteLLM must be asked, and the bare name.

    Raises:
        InvalidRequestError: The model's name is empty.
    """
    name = str(model or "").strip()
    if not name:
        raise InvalidRequestError(f"{model!r} is not the name of a model")
    prefix, slash, rest = name.partition("/")
    prefixed = _BY_NAME.get(prefix.lower()) if slash else None
    if prefixed is not None and not rest:
        raise InvalidRequestError(f"{model!r} has a provider but no model")
    if service is not None and service != "":
        provider = by_name(service)
        return provider, rest if prefixed is provider else name
    if prefixed is not None:
        return prefixed, rest
    for row in PROVIDERS:
        if row.claims.fullmatch(name):
            return row, name.removeprefix("models/")
    return None, name


def local(model: str) -> Provider | None:
    """Return Ollama for a name that nobody claims and only Ollama would write."""
    hosted = any(
        row.claims.fullmatch(model.rpartition(":")[0])
        for row in PROVIDERS
        if row.needs_key
    )
    return None if hosted or not _OLLAMA_TAG.fullmatch(model) else _BY_NAME["ollama"]


def unknown_model(model: str) -> InvalidRequestError:
    """Make the error for a name that cannot be placed: it says how to place it."""
    return InvalidRequestError(
        f"no provider is known for model {model!r}: name it with service=… or a prefix,"
        f" such as service='openai' or {f'openai/{model}'!r}",
        model=model,
    )
