"""Every chat provider of LiteLLM: its address, its key, the format that it speaks.

LiteLLM's own tables and functions give the answers. The few rows here correct them, or
fill in what LiteLLM keeps inside `completion()`; tests/test_litellm_providers.py turns
red when one is no longer needed. Sends nothing: LiteLLM's functions are only called
where they send nothing either. `litellm` is an argument, never an import at the top.
"""

import difflib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from dipeo_llm.errors import InvalidRequestError

Engine: TypeAlias = Literal["direct", "litellm", "refused"]

ALIASES: Mapping[str, str] = MappingProxyType(
    {"chatgpt": "openai", "gpt": "openai", "llama": "ollama"}
)
"""Names that other programs give a provider, such as DiPeO's, and LiteLLM's name."""

_SIGNS_IN = "signs in with OAuth on a device, outside the client that holds the key"
_EXCHANGES = (
    "LiteLLM exchanges the key for a token at another host, with a client of its own"
)
_WATSONX = (
    f"{_EXCHANGES}; its model gateway is reached as 'custom_openai', with the base_url"
    " https://REGION.ml.cloud.ibm.com/ml/gateway/v1 and an IAM token for a key"
)
_OWN_CLIENT = "LiteLLM sends the call with a client of its own"
_COMPLETES_TEXT = (
    "completes text: LiteLLM would flatten the conversation into one prompt"
)

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "claude-code": (
            "is a program that runs on this machine, not an API; use service="
            "'anthropic' for the same models"
        ),
        "chatgpt": _SIGNS_IN,
        "github_copilot": _SIGNS_IN,
        "microsoft_365_copilot": (
            "takes a Microsoft Graph user token and is an agent, not a model"
        ),
        "aiohttp_openai": "is a transport of LiteLLM for 'openai'; use 'openai'",
        "custom": "is LiteLLM's name for a handler of your own; use 'custom_openai'",
        "fal_ai": "answers one picture with text, and takes no conversation",
        "gigachat": _EXCHANGES,
        "sap": _EXCHANGES,
        "scaledown": "makes prompts shorter, and is not a model",
        "watsonx": _WATSONX,
        "watsonx_text": _WATSONX,
        "gdc": "needs google-auth and a project of Google Distributed Cloud",
        "openai_like": "is LiteLLM's name for embeddings; use 'custom_openai'",
        "oobabooga": "is a local server of 2023; a newer one is reached as 'custom_openai'",
        "oci": "signs each request with a private key file, not with an API key",
        "vllm": "runs the model inside this process; use 'hosted_vllm' for a server",
        "anthropic_text": _COMPLETES_TEXT,
        "azure_text": _COMPLETES_TEXT,
        "text-completion-codestral": _COMPLETES_TEXT,
        "text-completion-inception": _COMPLETES_TEXT,
        "text-completion-openai": _COMPLETES_TEXT,
        "vertex_ai_beta": "is LiteLLM's older name for 'vertex_ai'",
        "ollama": _COMPLETES_TEXT + "; use 'ollama_chat'",
    }
)
"""Names that are not called, and why. Seen on LiteLLM 1.110.2, 2026-11-25."""

DIFFERS: Mapping[str, str] = MappingProxyType(
    {
        "bigmodel": "a base_url gets /api/paas/v4 where it has none",
        "datarobot": "acompletion takes a base_url for the whole URL",
        "docker_model_runner": (
            "acompletion leaves out the /v1 that the server and LiteLLM's own config ask"
            " for"
        ),
        "groq": (
            "a stream with response_format: acompletion sends it without `stream` and"
            " cuts the whole answer into pieces"
        ),
        "tencent": "a base_url gets /v1 where it has none",
    }
)
"""Where a direct request is not what `litellm.acompletion` sends, and why."""

_THROUGH_HANDLER = frozenset(
    {
        *("a2a", "anthropic", "bedrock", "bedrock_mantle", "bytez", "cometapi"),
        *("compactifai", "databricks", "databricks_agent", "datarobot", "deepseek"),
        *("edenai", "fireworks_ai", "gemini", "groq", "heroku", "hosted_vllm"),
        *("langflow", "langgraph", "minimax", "mistral", "nadir", "ollama_chat"),
        *("opencode_go", "openrouter", "ovhcloud", "ragflow", "sagemaker_chat"),
        *("sagemaker_nova", "snowflake", "together_ai", "xai"),
    }
)
"""`acompletion` sends each request of these over the AsyncHTTPHandler it is given."""

_THROUGH_NEITHER = frozenset({"lemonade"})
"""In LiteLLM's lists of OpenAI's format, and still with a client of its own."""

# What LiteLLM keeps inside `completion()` (litellm/main.py, 1.105.0 to 1.110.2), where
# no other function of it tells: the address, and the variables of the key.
_INSIDE_COMPLETION: Mapping[str, tuple[str | None, tuple[str, ...]]] = MappingProxyType(
    {
        "ai21": ("https://api.ai21.com/studio/v1", ("AI21_API_KEY",)),
        "amazon_nova": ("https://api.nova.amazon.com/v1", ("AMAZON_NOVA_API_KEY",)),
        "bytez": ("https://api.bytez.com", ("BYTEZ_API_KEY",)),
        "cometapi": (None, ("COMETAPI_KEY",)),
        "compactifai": ("https://api.compactif.ai/v1", ("COMPACTIFAI_API_KEY",)),
        "databricks": (None, ("DATABRICKS_API_KEY",)),
        "maritalk": ("https://chat.maritaca.ai/api", ("MARITALK_API_KEY",)),
        "minimax": (None, ("MINIMAX_API_KEY",)),
        "openai": ("https://api.openai.com/v1", ("OPENAI_API_KEY",)),
        "openrouter": (
            "https://openrouter.ai/api/v1",
            ("OPENROUTER_API_KEY", "OR_API_KEY"),
        ),
        "ovhcloud": (None, ("OVHCLOUD_API_KEY",)),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Door:
    """Where a provider takes OpenAI's format, beside the format LiteLLM speaks to it."""

    address: str | None
    key_variables: tuple[str, ...]
    key_header: str = "authorization"
    config: str = "custom_openai"
    """LiteLLM's name of the provider whose config translates."""


# LiteLLM reaches these with a client of its own, or through another host first.
# Sources, read 2026-11-25:
# https://learn.microsoft.com/en-us/azure/foundry/openai/api-version-lifecycle,
# https://docs.cohere.com/docs/compatibility-api,
# https://huggingface.co/changelog/inference-providers-openai-compatible,
# https://docs.cloud.google.com/vertex-ai/generative-ai/docs/migrate/openai/examples.
_COHERE = _Door(
    address="https://api.cohere.ai/compatibility/v1",
    key_variables=("COHERE_API_KEY", "CO_API_KEY"),
)
_DOORS: Mapping[str, _Door] = MappingProxyType(
    {
        # https://RESOURCE.openai.azure.com/openai/v1; the model is the deployment.
        "azure": _Door(
            address=None,
            key_variables=("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
            key_header="api-key",
            config="openai",
        ),
        # https://RESOURCE.services.ai.azure.com/openai/v1
        "azure_ai": _Door(
            address=None, key_variables=("AZURE_AI_API_KEY",), key_header="api-key"
        ),
        "cohere": _COHERE,
        "cohere_chat": _COHERE,
        "huggingface": _Door(
            address="https://router.huggingface.co/v1",
            key_variables=("HF_TOKEN", "HUGGINGFACE_API_KEY"),
        ),
        # https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/
        # LOCATION/endpoints/openapi, with an access token of Google's for a key.
        "vertex_ai": _Door(address=None, key_variables=()),
    }
)

_PATH = "/chat/completions"
_NOWHERE = "http://dipeo-llm.invalid/base"
_MODEL = "dipeo.llm.probe"  # clarifai wants three parts
_SECRET = "key-of-the-probe"  # noqa: S105 - LiteLLM wants one, and nothing is sent

# A variable that holds a key, by its name: GROQ_API_KEY, FRIENDLI_TOKEN, SNOWFLAKE_JWT.
_KEY_VARIABLE = re.compile(r"\w*(?:KEY|TOKEN|JWT)")

# What a provider that speaks OpenAI's format must leave as it is.
_PROBE_MESSAGES: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "add", "arguments": "{}"},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "user", "content": "Again."},
)
_PROBE_TOOL: Mapping[str, Any] = MappingProxyType(
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderFacts:
    """What LiteLLM knows of one provider, whatever the environment holds."""

    name: str
    """LiteLLM's name, which is the prefix of a model string."""
    address: str | None = None
    """The base URL, without a slash at its end; None where it is the user's own."""
    key_variables: tuple[str, ...] = ()
    """The environment variables of its key, in LiteLLM's order."""
    needs_key: bool = True
    """False for a server on this machine, or one that only its user knows."""
    speaks_openai: bool = False
    """Whether request, path and key's header are those of OpenAI's format."""
    path: str = _PATH
    """What follows `address` in the URL of a call, if it speaks OpenAI's format."""
    key_header: str = "authorization"
    """The header of the key; "authorization" takes a Bearer token."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers that its config adds to those of OpenAI's format."""
    config: str = ""
    """LiteLLM's name of the provider whose config translates."""
    client: Literal["sdk", "handler"] | None = None
    """What `acompletion` takes as `client=` for `config`: AsyncOpenAI ("sdk") or
    AsyncHTTPHandler ("handler"); None where it ignores both."""
    refusal: str | None = None
    """Why it is not called; None where it is."""

    @property
    def engine(self) -> Engine:
        """The way that a call takes."""
        if self.refusal is not None:
            return "refused"
        return "direct" if self.speaks_openai else "litellm"


def chat_providers(litellm: Any) -> tuple[str, ...]:
    """List the names of all providers that LiteLLM can chat with, sorted.

    Those of `LlmProviders`, and those that only its JSON of providers has.
    """
    return tuple(name for name in all_names(litellm) if _has_chat(litellm, name))


@lru_cache(maxsize=8)
def all_names(litellm: Any) -> tuple[str, ...]:
    """List every name of a provider that LiteLLM has, with chat or without, sorted."""
    return tuple(
        sorted({member.value for member in litellm.LlmProviders} | set(_json_names()))
    )


@lru_cache(maxsize=512)
def describe(litellm: Any, name: str) -> ProviderFacts:
    """Say what LiteLLM knows of a provider. Takes milliseconds once, then 0.1 µs.

    The answer is the same whatever the environment holds: LiteLLM's functions run while
    the environment is hidden from this thread.

    Args:
        litellm: The module.
        name: LiteLLM's name of the provider.

    Raises:
        InvalidRequestError: LiteLLM has no such provider; the error names the nearest.
    """
    if name in REFUSED and name not in all_names(litellm):
        return ProviderFacts(name=name, refusal=REFUSED[name])
    if name not in all_names(litellm):
        raise unknown_provider(litellm, name)
    if name in _CONFIG_SIGNS_IN:
        return ProviderFacts(name=name, refusal=REFUSED[name])
    if (door := _DOORS.get(name)) is not None:
        return ProviderFacts(
            name=name,
            address=door.address,
            key_variables=door.key_variables,
            speaks_openai=True,
            key_header=door.key_header,
            config=door.config,
            client=_client(litellm, door.config),
        )
    with _hidden_environment() as reads:
        config = _config(litellm, name, _MODEL)
        if config is None:
            return ProviderFacts(name=name, refusal="LiteLLM has no chat for it")
        url, variables, invents_key = _address_and_key(litellm, name, config, reads)
        reason = REFUSED.get(name) or _not_openai(litellm, name, config)
        address = None if url is None else url.rstrip("/").removesuffix(_PATH)
        fields: dict[str, Any] = {
            "name": name,
            "address": address,
            "key_variables": variables,
            "config": name,
            "client": _client(litellm, name),
        }
        if reason is None:
            path = _path(config, _MODEL, url or _NOWHERE)
            key_header, headers = _headers(config, url or _NOWHERE)
            if path is None:
                reason = "its URL does not end with /chat/completions"
            elif key_header is None:
                reason = "its key does not travel in a header of its own"
            else:
                fields |= {"path": path, "key_header": key_header, "headers": headers}
    served_here = _is_loopback(address)
    if reason is None:
        theirs = address is None and (invents_key or not variables)
        return ProviderFacts(
            **fields, speaks_openai=True, needs_key=not (served_here or theirs)
        )
    refusal = REFUSED.get(name) or (None if fields["client"] else _OWN_CLIENT)
    if refusal is not None:
        return ProviderFacts(name=name, key_variables=variables, refusal=refusal)
    return ProviderFacts(**fields, needs_key=not served_here)


# Their configs sign in, or read the files of an earlier sign-in, as soon as they exist.
_CONFIG_SIGNS_IN = frozenset({"chatgpt", "github_copilot"})


def suggest(litellm: Any, name: str, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Return up to three names that are close to an unknown one, the nearest first.

    Args:
        litellm: The module.
        name: What was asked for.
        also: Further names that would have been right.
    """
    known = {*chat_providers(litellm), *ALIASES, *also} - set(REFUSED)
    plain = {_plain(candidate): candidate for candidate in sorted(known)}
    close = difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.7)
    return tuple(plain[match] for match in close)


def unknown_provider(
    litellm: Any, name: str, also: Iterable[str] = ()
) -> InvalidRequestError:
    """Make the error for a name that no provider has; it names the nearest ones."""
    close = suggest(litellm, name, also)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return InvalidRequestError(f"{name!r} names no provider{hint}", service=name)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


# What LiteLLM knows.


@contextmanager
def _hidden_environment() -> Iterator[list[str]]:
    """Hide the environment from this thread, and list the variables that it reads.

    `os.environ` encodes a name before each look-up, with a function that is an attribute
    of it. While this lasts, that function gives this thread a name that no variable has;
    other threads get their own name, as before. No variable is ever changed. Iteration
    fails with a KeyError, so that no HTTP client is built here: all of them read proxies.
    """
    reads: list[str] = []
    owner = threading.get_ident()
    environ = os.environ
    with _hiding:
        encode = environ.encodekey

        def hide(name: str) -> Any:
            encoded = encode(name)
            if threading.get_ident() != owner:
                return encoded
            reads.append(name)
            return encode("=" + name)  # no variable's name has this character

        environ.encodekey = hide
        try:
            yield reads
        finally:
            environ.encodekey = encode


_hiding = threading.Lock()


def _json_registry() -> Any:
    from litellm.llms.openai_like.json_loader import JSONProviderRegistry

    return JSONProviderRegistry


def _json_names() -> list[str]:
    return list(_json_registry().list_providers())


def _has_chat(litellm: Any, name: str) -> bool:
    if name in _CONFIG_SIGNS_IN:
        return True
    with _hidden_environment():
        return _config(litellm, name, _MODEL) is not None


def _config(litellm: Any, name: str, model: str) -> Any:
    """Return LiteLLM's config of a provider for chat; None where it has none.

    Arguments of a config's constructor would stay in its class, so there are none.
    """
    manager = litellm.utils.ProviderConfigManager
    try:
        provider = litellm.LlmProviders(name)
    except ValueError:
        from litellm.llms.openai_like.dynamic_config import create_config_class

        return create_config_class(_json_registry().get(name))()
    config = manager.get_provider_chat_config(model=model, provider=provider)
    if config is not None:
        return config
    # lemonade has a chat config, but only as the source of its models' facts; aiml and
    # xinference have none, and `acompletion` treats them as OpenAI.
    info = manager.get_provider_model_info(model=model, provider=provider)
    if hasattr(info, "transform_request"):
        return info
    if name in litellm.openai_compatible_providers:
        return litellm.OpenAIGPTConfig()
    return None


def _address_and_key(
    litellm: Any, name: str, config: Any, reads: list[str]
) -> tuple[str | None, tuple[str, ...], bool]:
    """Return the address, the key's variables, and whether LiteLLM invents a key.

    Three functions of LiteLLM know some providers each; the first that does wins.
    """
    inside_address, inside_variables = _INSIDE_COMPLETION.get(name, (None, ()))
    row = _json_registry().get(name)
    del reads[:]
    found = _ask(litellm.get_llm_provider, f"{name}/{_MODEL}")
    _, _, key, address = found if isinstance(found, tuple) else (None,) * 4
    variables = _keys_among(reads)
    info = _model_info(litellm, name)
    if not variables and info is not None:
        del reads[:]
        _ask(info.get_api_key, None)
        variables = _keys_among(reads)
    if not variables:
        del reads[:]
        _ask(litellm.validate_environment, f"{name}/{_MODEL}")
        variables = _keys_among(reads)
    if row is not None:
        address = row.base_url
        variables = (row.api_key_env,)
    if address is None:
        url = _url(config, _MODEL, None)
        if url is not None and url.rstrip("/").endswith(_PATH) and not _is_openai(url):
            address = url
    if address is None and info is not None:
        url = _ask(info.get_api_base, None)
        if isinstance(url, str) and not _is_openai(url):
            address = url
    # An application may have set this for calls of its own.
    if litellm.api_base and str(address).startswith(litellm.api_base):
        address = None
    return inside_address or address, inside_variables or variables, bool(key)


def _model_info(litellm: Any, name: str) -> Any:
    try:
        provider = litellm.LlmProviders(name)
    except ValueError:
        return None
    return litellm.utils.ProviderConfigManager.get_provider_model_info(
        model=_MODEL, provider=provider
    )


def _ask(function: Any, *args: Any, **named: Any) -> Any:
    """Call a function of LiteLLM's; return what it raises, if it does.

    Where a provider lacks a key, a region or a project, LiteLLM raises an exception of
    any class, some of them bare `Exception`. That is an answer here, not a failure.
    """
    try:
        return function(*args, **named)
    except Exception as exc:  # noqa: BLE001 - see above
        return exc


def _keys_among(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for n in names if _KEY_VARIABLE.fullmatch(n)))


def _client(litellm: Any, name: str) -> Literal["sdk", "handler"] | None:
    """Say which client `acompletion` takes; `completion()` in litellm/main.py decides.

    The names that it compares one by one are named here; the rest are in its lists.
    """
    if name in _THROUGH_HANDLER:
        return "handler"
    if name in _THROUGH_NEITHER:
        return None
    sdk = {"azure", "bigmodel", "clf_ai_gateway", "custom_openai", "openai"}
    listed = {*litellm.openai_compatible_providers, *_json_names()}
    return "sdk" if name in sdk | listed else None


def _not_openai(litellm: Any, name: str, config: Any) -> str | None:
    """Say why a provider does not speak OpenAI's format; None where it does.

    Its config must be a kind of OpenAI's and leave a conversation with tools as it is.
    Cohere's, Snowflake's and SAP's are kinds of OpenAI's too, and rewrite it.
    """
    if not isinstance(config, litellm.OpenAIGPTConfig):
        return f"{type(config).__name__} is not a kind of OpenAIGPTConfig"
    body = _ask(
        config.transform_request,
        model=_MODEL,
        messages=deepcopy(list(_PROBE_MESSAGES)),
        optional_params={"tools": [deepcopy(dict(_PROBE_TOOL))]},
        litellm_params={"custom_llm_provider": name},
        headers={},
    )
    if not isinstance(body, Mapping):
        return f"its config translates no plain conversation: {body!r}"
    # clarifai and fireworks_ai make a path of the model's name.
    if not str(body.get("model")).endswith("probe"):
        return "its config sends no model"
    if body.get("tools") != [_PROBE_TOOL]:
        return "its config rewrites the tools"
    roles = [message.get("role") for message in body.get("messages") or ()]
    if roles != [message["role"] for message in _PROBE_MESSAGES]:
        return "its config rewrites the conversation"
    return None


def _url(config: Any, model: str, base: str | None) -> str | None:
    url = _ask(
        config.get_complete_url,
        api_base=base,
        api_key=_SECRET,
        model=model,
        optional_params={},
        litellm_params={},
        stream=False,
    )
    return url if isinstance(url, str) and url else None


def _path(config: Any, model: str, base: str) -> str | None:
    """Return what LiteLLM's URL of a call has after a base URL.

    None where the URL is elsewhere, or not one of OpenAI's format.
    """
    below = base.rstrip("/").removesuffix(_PATH)
    # A few configs have another rule for their own address.
    own = _url(config, model, None)
    url = own if own and own.startswith(below + "/") else _url(config, model, base)
    if url is None or not url.startswith(below):
        return None
    path = "/" + url[len(below) :].lstrip("/")
    # And a few append /v1 to a base URL that has it.
    if below.endswith("/v1"):
        path = path.removeprefix("/v1")
    return path if path.rstrip("/").endswith(_PATH) else None


def _headers(config: Any, base: str) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Return the header of the key, and the headers beside OpenAI's.

    The first is None where the key is not sent as it is, or as a Bearer token.
    """
    made = config.validate_environment(
        headers={},
        model=_MODEL,
        messages=deepcopy(list(_PROBE_MESSAGES)),
        optional_params={},
        litellm_params={},
        api_key=_SECRET,
        api_base=base,
    )
    key_header = None
    others = []
    for name, value in made.items():
        header = name.lower()
        expected = f"Bearer {_SECRET}" if header == "authorization" else _SECRET
        if value == expected:
            key_header = header
        elif header not in _UNSENT and _SECRET not in value:
            others.append((header, value))
    return key_header, tuple(others)


# Not sent: what every request has, a note on who calls, and the kind of Snowflake's
# token, which LiteLLM only knows by a prefix of its own, and Snowflake by the token
# (https://docs.snowflake.com/en/developer-guide/sql-api/authenticating, 2026-11-25).
_UNSENT = frozenset(
    {
        *("accept", "content-type", "user-agent", "x-novita-source"),
        "x-snowflake-authorization-token-type",
    }
)


def _is_openai(url: str) -> bool:
    return urlsplit(url).hostname == "api.openai.com"


def _is_loopback(url: str | None) -> bool:
    return urlsplit(url or "").hostname in {"localhost", "127.0.0.1", "::1"}


# The direct translation.


@lru_cache(maxsize=512)
def path_below(litellm: Any, facts: ProviderFacts, model: str, base_url: str) -> str:
    """Return what the URL of a call has after a base URL.

    Raises:
        InvalidRequestError: LiteLLM does not send this model to a URL of OpenAI's
            format below that base URL.
    """
    if facts.name in _DOORS:
        return _PATH
    with _hidden_environment():
        config = _config(litellm, facts.config, model)
        base = base_url
        if base != facts.address:
            # mistral's appends a /v1 that is missing.
            named = f"{facts.config}/{model}"
            found = litellm.get_llm_provider(named, api_base=base, api_key=_SECRET)
            base = found[3] or base
        path = _path(config, model, base)
        if path is None and _url(config, model, base) == base:
            path = facts.path  # datarobot's wants a URL that is whole already
        elif path is not None and base.startswith(base_url):
            path = base[len(base_url) :].rstrip("/") + path
    if path is None:
        raise InvalidRequestError(
            f"{facts.name} does not serve {model!r} in OpenAI's format below {base_url}",
            service=facts.name,
            model=model,
        )
    return path


def translate_openai(
    litellm: Any,
    facts: ProviderFacts,
    model: str,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any],
    stream: bool,
    *,
    base_url: str | None = None,
) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Translate a request for a provider that speaks OpenAI's format.

    Takes 80 µs to 1 ms, most of it for tools. Nothing that is passed is changed.

    Args:
        litellm: The module.
        facts: The provider.
        model: The model's name, without the prefix.
        messages: The conversation, in OpenAI's form.
        options: OpenAI's options, `tools` and `response_format` among them; one that
            the model does not take is left out.
        stream: Whether the answer is to come as a stream.
        base_url: Where the server is; None is the provider's own address.

    Returns:
        The path after the base URL, the headers without the key's, and the body.

    Raises:
        InvalidRequestError: This model of the provider is served in another format.
        Exception: Whatever LiteLLM raises for a request that it cannot translate.
    """
    name = facts.config
    base_url = base_url or facts.address or _NOWHERE
    path = path_below(litellm, facts, model, base_url)
    config = _config(litellm, name, model)
    if not isinstance(config, litellm.OpenAIGPTConfig):
        raise InvalidRequestError(
            f"{facts.name} does not serve {model!r} in OpenAI's format",
            service=facts.name,
            model=model,
        )
    asked = deepcopy(dict(options))
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    optional = litellm.utils.get_optional_params(
        model=model,
        custom_llm_provider=name,
        messages=deepcopy(messages),
        drop_params=True,
        allowed_openai_params=unlisted_tools(litellm, name, model, asked),
        **asked,
    )
    for own in _NOT_SENT:
        optional.pop(own, None)
    body = config.transform_request(
        model=model,
        messages=_without_null_content(messages),
        optional_params=optional,
        litellm_params={"custom_llm_provider": name},
        headers={},
    )
    extra = body.pop("extra_body", None) or {}
    body = {**body, **extra}
    if stream:
        body["stream"] = True
    else:
        body.pop("stream", None)
    headers = {"content-type": "application/json", **dict(facts.headers)}
    return path, headers, body


# LiteLLM's notes to itself.
_NOT_SENT = ("json_mode", "fake_stream", "max_retries")


def unlisted_tools(
    litellm: Any, name: str, model: str, options: Mapping[str, Any]
) -> list[str]:
    """Name the options for tools that LiteLLM would drop only for want of a row.

    For providers whose table it trusts, LiteLLM drops `tools` for every model that the
    table leaves out. A model that it does not know may well take them.
    """
    if f"{name}/{model}" in litellm.model_cost or model in litellm.model_cost:
        return []
    return [option for option in ("tools", "tool_choice") if option in options]


def _without_null_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages, without a `content` of None, as `acompletion` does."""
    copies = deepcopy(messages)
    for message in copies:
        if message.get("role") == "assistant" and message.get("content", "") is None:
            del message["content"]
    return copies


# For people.


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderRow:
    """A line of the list of providers."""

    prefix: str
    key_variable: str
    """The first one; empty where no key is needed or no variable is known."""
    address: str
    """Empty where the user gives the base URL."""
    engine: Engine
    tried: str
    """What was tried, or why the provider is refused."""


_TRIED: Mapping[Engine, str] = MappingProxyType(
    {
        "direct": "loopback: call, stream, tools, response_format",
        "litellm": "loopback: call through acompletion",
    }
)


def provider_rows(
    litellm: Any,
    own: Iterable[str] = ("anthropic", "gemini", "ollama_chat", "openai"),
) -> list[ProviderRow]:
    """List all chat providers, for `models --providers` and docs/providers.md.

    Args:
        litellm: The module.
        own: LiteLLM's names of those that have an adapter of their own; they are direct
            whatever LiteLLM says of them.
    """
    rows = []
    adapters = frozenset(own)
    for name in chat_providers(litellm):
        facts = describe(litellm, name)
        engine: Engine = "direct" if name in adapters else facts.engine
        tried = facts.refusal or _TRIED[engine]
        if engine == "direct" and name in DIFFERS:
            tried += f"; {DIFFERS[name]}"
        rows.append(
            ProviderRow(
                prefix=name,
                key_variable=next(iter(facts.key_variables), ""),
                address=facts.address or "",
                engine=engine,
                tried=tried,
            )
        )
    return rows


def providers_table(rows: Iterable[ProviderRow]) -> str:
    """Return rows as a table in Markdown, with a line feed at its end."""
    lines = [
        "| prefix | key variable | address | engine | tried |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        key = f"`{row.key_variable}`" if row.key_variable else ""
        address = f"<{row.address}>" if row.address else ""
        lines.append(
            f"| `{row.prefix}/` | {key} | {address} | {row.engine} | {row.tried} |"
        )
    return "\n".join(lines) + "\n"
