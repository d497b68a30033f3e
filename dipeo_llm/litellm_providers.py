"""What LiteLLM knows of each chat provider: address, key variables, wire format.

LiteLLM's own tables and functions give the answers. The few rows here correct them, or
add what LiteLLM keeps inside `completion()`. Nothing is sent: LiteLLM's functions are
called only where they send nothing. `litellm` is an argument, or is imported inside a
function, because its import takes seconds.
"""

import difflib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from dipeo_llm.errors import InvalidRequestError

Engine: TypeAlias = Literal["direct", "litellm", "refused"]

_SIGNS_IN = "it signs in with OAuth on a device; there is no API key to send"
_EXCHANGES = (
    "LiteLLM exchanges the key for a token at another host, with a client of its own"
)
_WATSONX = (
    f"{_EXCHANGES}; its model gateway is reached as 'custom_openai', with the base_url"
    " https://REGION.ml.cloud.ibm.com/ml/gateway/v1 and an IAM token for a key"
)
_OWN_CLIENT = "LiteLLM sends the call with a client of its own"
_COMPLETES_TEXT = (
    "it completes text: LiteLLM would flatten the conversation into one prompt"
)

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "claude-code": (
            "it is a program that runs on this machine, not an API; use service="
            "'anthropic' for the same models"
        ),
        "chatgpt": _SIGNS_IN,
        "github_copilot": _SIGNS_IN,
        "microsoft_365_copilot": (
            "it takes a Microsoft Graph user token, and is an agent, not a model"
        ),
        "aiohttp_openai": "it is a transport of LiteLLM for 'openai'; use 'openai'",
        "custom": "it is LiteLLM's name for a handler of your own; use 'custom_openai'",
        "fal_ai": "it answers one picture with text, and takes no conversation",
        "gigachat": _EXCHANGES,
        "sap": _EXCHANGES,
        "scaledown": "it makes prompts shorter, and is not a model",
        "watsonx": _WATSONX,
        "watsonx_text": _WATSONX,
        "gdc": "it needs google-auth and a project of Google Distributed Cloud",
        "openai_like": "it is LiteLLM's name for embeddings; use 'custom_openai'",
        "oobabooga": "it is a local server of 2023; a newer one is reached as 'custom_openai'",
        "oci": "it signs each request with a private key file, not with an API key",
        "vllm": "it runs the model inside this process; use 'hosted_vllm' for a server",
        "anthropic_text": _COMPLETES_TEXT,
        "azure_text": _COMPLETES_TEXT,
        "text-completion-codestral": _COMPLETES_TEXT,
        "text-completion-inception": _COMPLETES_TEXT,
        "text-completion-openai": _COMPLETES_TEXT,
    }
)
"""Providers that are refused before a key is looked up, and why.

Seen on LiteLLM 1.105.0, 1.109.3 and 1.110.2 on 2026-11-25.
"""

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
"""Providers to which a direct request differs from `acompletion`'s, and how."""

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "azure": "https://RESOURCE.openai.azure.com/openai/v1",
        "azure_ai": "https://RESOURCE.services.ai.azure.com/openai/v1",
        "cloudflare": "https://api.cloudflare.com/client/v4/accounts/ACCOUNT/ai/v1",
        "custom_openai": "https://HOST/v1",
        "databricks": "https://WORKSPACE.cloud.databricks.com/serving-endpoints",
        "heroku": "https://us.inference.heroku.com",
        "hosted_vllm": "http://HOST:8000/v1",
        "litellm_proxy": "http://HOST:4000/v1",
        "snowflake": "https://ACCOUNT.snowflakecomputing.com",
        "vertex_ai": (
            "https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations"
            "/LOCATION/publishers/google"
        ),
        "xinference": "http://HOST:9997/v1",
    }
)
"""Base URLs of providers whose address only their user knows, to be filled in.

Sources, read 2026-11-25:
https://learn.microsoft.com/en-us/azure/foundry/openai/api-version-lifecycle,
https://developers.cloudflare.com/workers-ai/configuration/open-ai-compatibility,
https://docs.databricks.com/aws/en/machine-learning/model-serving/score-foundation-models,
https://devcenter.heroku.com/articles/heroku-inference-api-v1-chat-completions,
https://docs.snowflake.com/en/user-guide/snowflake-cortex/cortex-rest-api,
https://cloud.google.com/vertex-ai/generative-ai/docs/model-reference/inference.
"""

PATHS: Mapping[str, str] = MappingProxyType(
    {"azure": "/openai/v1", "azure_ai": "/openai/v1"}
)
"""What a base URL without a path gets, such as an endpoint that Azure's portal shows."""

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
"""Providers for which `acompletion` uses the AsyncHTTPHandler that it is given."""

_THROUGH_NEITHER = frozenset({"lemonade"})
"""Providers in LiteLLM's lists of OpenAI's format that ignore `client=` all the same."""

# Address and key variables that correct LiteLLM's functions; None or () leaves theirs.
# Most are inside `completion()` (litellm/main.py, 1.105.0 to 1.110.2), where no function
# returns them. `MISTRAL_AZURE_API_KEY`, which LiteLLM reads first, belongs to an address
# that is not used here. LiteLLM 1.105 has no address of openrouter.
_ROWS: Mapping[str, tuple[str | None, tuple[str, ...]]] = MappingProxyType(
    {
        "ai21": ("https://api.ai21.com/studio/v1", ()),
        "amazon_nova": ("https://api.nova.amazon.com/v1", ("AMAZON_NOVA_API_KEY",)),
        "bytez": ("https://api.bytez.com", ("BYTEZ_API_KEY",)),
        "cometapi": (None, ("COMETAPI_KEY",)),
        "compactifai": ("https://api.compactif.ai/v1", ("COMPACTIFAI_API_KEY",)),
        "databricks": (None, ("DATABRICKS_API_KEY",)),
        # https://lmstudio.ai/docs/developer/core/server (2026-11-25)
        "lm_studio": ("http://localhost:1234/v1", ()),
        # https://github.blog/changelog/2025-07-17-deprecation-of-azure-endpoint-for-
        # github-models (2026-11-25): LiteLLM's address was switched off.
        "github": (
            "https://models.github.ai/inference",
            ("GITHUB_API_KEY", "GITHUB_TOKEN"),
        ),
        "maritalk": ("https://chat.maritaca.ai/api", ("MARITALK_API_KEY",)),
        "minimax": (None, ("MINIMAX_API_KEY",)),
        "mistral": (None, ("MISTRAL_API_KEY",)),
        "openai": ("https://api.openai.com/v1", ()),
        "openrouter": (
            "https://openrouter.ai/api/v1",
            ("OPENROUTER_API_KEY", "OR_API_KEY"),
        ),
        "ovhcloud": (None, ("OVHCLOUD_API_KEY",)),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compatible:
    """An endpoint in OpenAI's format that LiteLLM does not use for the provider."""

    address: str | None
    key_variables: tuple[str, ...]
    key_header: str = "authorization"
    config: str = "custom_openai"
    """LiteLLM's name of the provider whose config translates."""


# LiteLLM calls another endpoint of these, with a client of its own, or after a request to
# another host. Sources, read 2026-11-25:
# https://learn.microsoft.com/en-us/azure/foundry/openai/api-version-lifecycle,
# https://docs.cohere.com/docs/compatibility-api,
# https://huggingface.co/changelog/inference-providers-openai-compatible,
# https://docs.cloud.google.com/vertex-ai/generative-ai/docs/migrate/openai/examples.
_COHERE = _Compatible(
    address="https://api.cohere.ai/compatibility/v1",
    key_variables=("COHERE_API_KEY", "CO_API_KEY"),
)
_COMPATIBLE: Mapping[str, _Compatible] = MappingProxyType(
    {
        # https://RESOURCE.openai.azure.com/openai/v1; the model is the deployment.
        "azure": _Compatible(
            address=None,
            key_variables=("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"),
            key_header="api-key",
            config="openai",
        ),
        # https://RESOURCE.services.ai.azure.com/openai/v1
        "azure_ai": _Compatible(
            address=None, key_variables=("AZURE_AI_API_KEY",), key_header="api-key"
        ),
        "cohere": _COHERE,
        "cohere_chat": _COHERE,
        "huggingface": _Compatible(
            address="https://router.huggingface.co/v1",
            key_variables=("HF_TOKEN", "HUGGINGFACE_API_KEY"),
        ),
        # https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/
        # LOCATION/endpoints/openapi, with an access token of Google's for a key.
        "vertex_ai": _Compatible(address=None, key_variables=()),
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
    """The base URL, without a trailing slash; None if the user must give it."""
    key_variables: tuple[str, ...] = ()
    """The environment variables of its key, in LiteLLM's order."""
    needs_key: bool = True
    """False for a server on this machine, or at an address that only its user knows."""
    speaks_openai: bool = False
    """Whether body, path and key header are those of OpenAI's format."""
    path: str = _PATH
    """What follows `address` in the URL of a call in OpenAI's format."""
    key_header: str = "authorization"
    """The header of the key; "authorization" takes a Bearer token."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers that LiteLLM's config requires beside those of OpenAI's format."""
    config: str = ""
    """LiteLLM's name of the provider whose config translates a direct request."""
    client: Literal["sdk", "handler"] | None = None
    """What `acompletion` takes as `client=` for `config`: AsyncOpenAI ("sdk") or
    AsyncHTTPHandler ("handler"); None where it ignores both."""
    refusal: str | None = None
    """Why it is refused; None if it is not."""

    @property
    def engine(self) -> Engine:
        """Which engine calls it."""
        if self.refusal is not None:
            return "refused"
        return "direct" if self.speaks_openai else "litellm"


@lru_cache(maxsize=8)
def chat_providers(litellm: Any) -> tuple[str, ...]:
    """List the names of all providers that LiteLLM has a chat config for, sorted."""
    return tuple(
        name
        for name in all_names(litellm)
        if name in _CONFIG_SIGNS_IN or _config(litellm, name, _MODEL) is not None
    )


@lru_cache(maxsize=8)
def all_names(litellm: Any) -> tuple[str, ...]:
    """List every provider of LiteLLM's enum and of its JSON, with chat or without."""
    return tuple(
        sorted({member.value for member in litellm.LlmProviders} | set(_json_names()))
    )


@lru_cache(maxsize=512)
def describe(litellm: Any, name: str) -> ProviderFacts:
    """Return what LiteLLM knows of a provider, whatever the environment holds.

    Takes 2 ms the first time, then 0.1 µs.

    Args:
        litellm: The module.
        name: LiteLLM's name of the provider.

    Raises:
        InvalidRequestError: LiteLLM has no such provider; the error names the nearest.
    """
    if name in _SAME_AS:
        return replace(describe(litellm, _SAME_AS[name]), name=name)
    if name in REFUSED:
        return ProviderFacts(name=name, refusal=REFUSED[name])
    if name not in all_names(litellm):
        raise unknown_provider(litellm, name)
    if (endpoint := _COMPATIBLE.get(name)) is not None:
        return ProviderFacts(
            name=name,
            address=endpoint.address,
            key_variables=endpoint.key_variables,
            speaks_openai=True,
            key_header=endpoint.key_header,
            config=endpoint.config,
            client=_client(litellm, endpoint.config),
        )
    # Modules that LiteLLM imports here see the whole environment.
    config = _config(litellm, name, _MODEL)
    if config is None:
        return ProviderFacts(name=name, refusal="LiteLLM has no chat for it")
    with _hidden_environment() as reads:
        return _ask_config(litellm, name, config, reads)


def _ask_config(
    litellm: Any, name: str, config: Any, reads: list[str]
) -> ProviderFacts:
    url, variables, invents_key = _address_and_key(litellm, name, config, reads)
    address = None if url is None else url.rstrip("/").removesuffix(_PATH)
    fields: dict[str, Any] = {
        "name": name,
        "address": address,
        "key_variables": variables,
        "config": name,
        "client": _client(litellm, name),
    }
    local = _is_loopback(address)
    if _not_openai(litellm, name, config) is None and not _signs(config, variables):
        path = _path(config, _MODEL, url or _NOWHERE)
        key_header, headers = _headers(config, url or _NOWHERE)
        if path is not None and key_header is not None:
            of_the_user = address is None and (invents_key or not variables)
            return ProviderFacts(
                **fields,
                speaks_openai=True,
                needs_key=not (local or of_the_user),
                path=path,
                key_header=key_header,
                headers=headers,
            )
    if fields["client"] is None:
        return ProviderFacts(name=name, key_variables=variables, refusal=_OWN_CLIENT)
    is_signed = _signs(config, variables)
    return ProviderFacts(**fields, needs_key=not (local or is_signed))


# LiteLLM's "ollama" flattens the conversation into one prompt for another endpoint.
_SAME_AS = MappingProxyType({"ollama": "ollama_chat", "vertex_ai_beta": "vertex_ai"})

# Creating their config signs in, or reads the files of an earlier sign-in.
_CONFIG_SIGNS_IN = frozenset({"chatgpt", "github_copilot"})


def suggest(litellm: Any, name: str, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Return up to three names that are close to an unknown one, the nearest first.

    Args:
        litellm: The module.
        name: What was asked for.
        also: Further names that would have been right.
    """
    known = ({*chat_providers(litellm)} - set(REFUSED)) | {*also}
    plain = {_plain(candidate): candidate for candidate in sorted(known)}
    close = difflib.get_close_matches(_plain(name), plain, n=3, cutoff=0.7)
    return tuple(plain[match] for match in close)


def unknown_provider(
    litellm: Any, name: str, also: Iterable[str] = ()
) -> InvalidRequestError:
    """Make the error for an unknown provider; it names the nearest ones."""
    close = suggest(litellm, name, also)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "`dipeo-llm models --providers` lists them all"
    )
    return InvalidRequestError(f"unknown provider {name!r}; {hint}", service=name)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


# What LiteLLM knows.


@contextmanager
def _hidden_environment() -> Iterator[list[str]]:
    """Hide the environment from this thread, and record the variables that it reads.

    `os.environ` encodes the name in each lookup with its attribute `encodekey`. Inside
    this context that function encodes another name, which no variable has, if this
    thread asks, and the name itself if another thread does. So no variable is changed,
    and other threads notice nothing. Iteration over `os.environ` raises KeyError in this
    thread, so LiteLLM cannot create an HTTP client here: clients read proxies that way.
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


def _config(litellm: Any, name: str, model: str) -> Any:
    """Return LiteLLM's config of a provider for chat; None where it has none.

    It is constructed without arguments, because LiteLLM keeps them in the class.
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
    # lemonade's chat config is only listed as model info; aiml and xinference have no
    # config, and `acompletion` treats them as OpenAI.
    info = manager.get_provider_model_info(model=model, provider=provider)
    if hasattr(info, "transform_request"):
        return info
    if name in litellm.openai_compatible_providers:
        return litellm.OpenAIGPTConfig()
    return None


def _address_and_key(
    litellm: Any, name: str, config: Any, reads: list[str]
) -> tuple[str | None, tuple[str, ...], bool]:
    """Return the address, the key variables, and whether LiteLLM invents a key.

    Three functions of LiteLLM know some providers each; the first that does wins.
    """
    our_address, our_variables = _ROWS.get(name, (None, ()))
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
    # The application may have set this global for its own calls.
    if litellm.api_base and str(address).startswith(litellm.api_base):
        address = None
    return our_address or address, our_variables or variables, bool(key)


def _model_info(litellm: Any, name: str) -> Any:
    try:
        provider = litellm.LlmProviders(name)
    except ValueError:
        return None
    return litellm.utils.ProviderConfigManager.get_provider_model_info(
        model=_MODEL, provider=provider
    )


def _ask(function: Any, *args: Any, **named: Any) -> Any:
    """Call a function of LiteLLM; return the exception if it raises one.

    LiteLLM raises exceptions of any class, even `Exception` itself, if a provider lacks
    a key, a region or a project. Here that means "unknown", which the caller expects.
    """
    try:
        return function(*args, **named)
    except Exception as exc:  # noqa: BLE001 - see above
        return exc


def _keys_among(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for n in names if _KEY_VARIABLE.fullmatch(n)))


def _client(litellm: Any, name: str) -> Literal["sdk", "handler"] | None:
    """Return the kind of client that `acompletion` uses for a provider.

    `completion()` in litellm/main.py decides by comparing names, which are repeated
    here, and by LiteLLM's lists.
    """
    if name in _THROUGH_HANDLER:
        return "handler"
    if name in _THROUGH_NEITHER:
        return None
    sdk = {"azure", "bigmodel", "clf_ai_gateway", "custom_openai", "openai"}
    listed = {*litellm.openai_compatible_providers, *_json_names()}
    return "sdk" if name in sdk | listed else None


def _not_openai(litellm: Any, name: str, config: Any) -> str | None:
    """Return why a provider does not speak OpenAI's format; None if it does.

    Its config must derive from OpenAI's and leave a conversation with tools as it is.
    Deriving is not enough: SAP's config, for one, derives from OpenAI's and rewrites it.
    """
    if not isinstance(config, litellm.OpenAIGPTConfig):
        return f"{type(config).__name__} does not derive from OpenAIGPTConfig"
    body = _ask(
        config.transform_request,
        model=_MODEL,
        messages=deepcopy(list(_PROBE_MESSAGES)),
        optional_params={"tools": [deepcopy(dict(_PROBE_TOOL))]},
        litellm_params={"custom_llm_provider": name},
        headers={},
    )
    if not isinstance(body, Mapping):
        return f"its config cannot translate a plain conversation: {body!r}"
    # clarifai and fireworks_ai put a path before the model's name.
    if not str(body.get("model")).endswith("probe"):
        return "its config drops the model"
    if body.get("tools") != [_PROBE_TOOL]:
        return "its config rewrites the tools"
    roles = [message.get("role") for message in body.get("messages") or ()]
    if roles != [message["role"] for message in _PROBE_MESSAGES]:
        return "its config rewrites the conversation"
    return None


def _signs(config: Any, variables: tuple[str, ...]) -> bool:
    """Tell whether requests are signed, rather than sent with a key in a header."""
    from litellm.llms.base_llm.chat.transformation import BaseConfig

    overridden = type(config).sign_request is not BaseConfig.sign_request
    return overridden and not variables  # bedrock_mantle takes a key as well


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
    """Return the part of LiteLLM's URL after a base URL.

    None if the URL does not begin with the base URL, or is not one of OpenAI's format.
    """
    below = base.rstrip("/").removesuffix(_PATH)
    # gradient_ai's config has another rule for its own address.
    own = _url(config, model, None)
    url = own if own and own.startswith(below + "/") else _url(config, model, base)
    if url is None or not url.startswith(below):
        return None
    path = "/" + url[len(below) :].lstrip("/")
    # docker_model_runner's config appends /v1 to a base URL that ends with it.
    if below.endswith("/v1"):
        path = path.removeprefix("/v1")
    return path if path.rstrip("/").endswith(_PATH) else None


def _headers(config: Any, base: str) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Return the header that carries the key, and the headers beside OpenAI's.

    The first is None if the key is sent neither as it is nor as a Bearer token.
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


# Headers that are not required: those of every request, LiteLLM's own name, and the type
# of Snowflake's token, which Snowflake finds out itself if the header is absent
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
    """Return the part of a call's URL after a base URL.

    Raises:
        InvalidRequestError: LiteLLM calls this model at a URL that is not below the
            base URL, or not one of OpenAI's format.
    """
    if facts.name in _COMPATIBLE:
        return _PATH
    config = _config(litellm, facts.config, model)
    with _hidden_environment():
        base = base_url
        if base != facts.address:
            # mistral's config appends /v1 here.
            named = f"{facts.config}/{model}"
            found = litellm.get_llm_provider(named, api_base=base, api_key=_SECRET)
            base = found[3] or base
        path = _path(config, model, base)
        if path is None and _url(config, model, base) == base:
            path = facts.path  # datarobot's config returns the base URL as it is
        elif path is not None and base.startswith(base_url):
            path = base[len(base_url) :].rstrip("/") + path
    # Some of LiteLLM's URLs hold the model's name, which must lead nowhere else.
    is_plain = path is not None and re.fullmatch(r"(?:/(?!\.\.?/)[\w.~-]+)+/?", path)
    if path is None or not is_plain:
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

    Takes 0.1 to 1 ms, most of it for tools. The arguments are not changed.

    Args:
        litellm: The module.
        facts: The provider.
        model: The model's name, without the prefix.
        messages: The conversation, in OpenAI's form.
        options: OpenAI's options, such as `tools` and `response_format`; options that
            the model does not take are left out.
        stream: Whether the answer is to come as a stream.
        base_url: The server; None means the provider's own address.

    Returns:
        The path after the base URL, the headers except the key's, and the body.

    Raises:
        InvalidRequestError: The provider serves this model in another format.
        Exception: LiteLLM cannot translate the request; the class is LiteLLM's.
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


# Options that LiteLLM adds for its own use.
_NOT_SENT = ("json_mode", "fake_stream", "max_retries")


def unlisted_tools(
    litellm: Any, name: str, model: str, options: Mapping[str, Any]
) -> list[str]:
    """List the tool options to be kept for a model that LiteLLM's table lacks.

    For many providers LiteLLM drops `tools` if the model is not in its table, although
    an unknown model may well take them. For a model in the table, the table decides.
    """
    if f"{name}/{model}" in litellm.model_cost or model in litellm.model_cost:
        return []
    return [option for option in ("tools", "tool_choice") if option in options]


def _without_null_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages without an assistant's null `content`, as `acompletion` does."""
    copies = deepcopy(messages)
    for message in copies:
        if message.get("role") == "assistant" and message.get("content", "") is None:
            del message["content"]
    return copies


# For people.


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderRow:
    """One line in the list of providers."""

    prefix: str
    other_prefixes: tuple[str, ...] = ()
    key_variables: tuple[str, ...] = ()
    """Empty if LiteLLM knows no variable."""
    address: str | None = None
    """None if the user must give the base URL, or a region gives it."""
    example: str | None = None
    """The form of a base URL that the user must give."""
    engine: Engine
    notes: str
    """What was tried, or why the provider is refused."""


def providers_table(rows: Iterable[ProviderRow]) -> str:
    """Return rows as a Markdown table."""
    lines = [
        "| prefix | key variable | address | engine | tried |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        prefixes = ", ".join(f"`{p}/`" for p in (row.prefix, *row.other_prefixes))
        keys = ", ".join(f"`{variable}`" for variable in row.key_variables)
        example = f"`{row.example}`" if row.example else ""
        address = f"<{row.address}>" if row.address else example
        lines.append(
            f"| {prefixes} | {keys} | {address} | {row.engine} | {row.notes} |"
        )
    return "\n".join(lines) + "\n"
