"""LiteLLM: a request in, a result out, its exceptions read by what the wire really said.

The only module that names LiteLLM, and only inside functions: its import takes seconds,
so it happens in a thread, once, behind a fence. LiteLLM translates; it is given no key,
no retry, and no client but ours. Knows nothing of persons, prompts or retries.
"""

import asyncio
import json
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from pydantic import SecretStr

from dipeo_llm import failures, wire
from dipeo_llm.domain import ChatRequest, ChatResult, TokenUsage, ToolCall
from dipeo_llm.errors import (
    APIKeyNotFoundError,
    ContentFilterError,
    InvalidRequestError,
    LLMServiceError,
    LLMTimeoutError,
    ServiceUnavailableError,
)
from dipeo_llm.failures import CallError
from dipeo_llm.pool import Lease, Pool
from dipeo_llm.providers import Provider, by_name
from dipeo_llm.settings import Settings, http_url
from dipeo_llm.usage import rate_limits, token_usage, usage_record
from dipeo_llm.wire import PLACEHOLDER, Client, Endpoint, Exchange

_log = logging.getLogger("dipeo_llm")


class BaseLLMAdapter(ABC):
    """Talks to one model of one provider with one key.

    Args:
        provider: The provider's row.
        model_name: The model, without a prefix.
        api_key: The key; wrapped at once. Empty where the provider needs none.
        base_url: Where the provider lives; None asks the settings, then the provider.
        settings: How calls are made; None takes the defaults.
        pool: Where open clients are shared; None makes a pool of this adapter's own,
            which `aclose` closes.
    """

    def __init__(
        self,
        provider: Provider,
        model_name: str,
        api_key: str | SecretStr | None,
        base_url: str | None = None,
        *,
        settings: Settings | None = None,
        pool: "Pool[Client] | None" = None,
    ) -> None:
        self.provider = provider
        self.model_name = model_name
        self.settings = settings or Settings()
        secret = api_key if isinstance(api_key, SecretStr) else SecretStr(api_key or "")
        if provider.needs_key and not secret.get_secret_value():
            raise APIKeyNotFoundError(
                f"{provider.name} needs a key", service=provider.name, model=model_name
            )
        self.endpoint = Endpoint(
            provider, _base_url(provider, base_url, self.settings), secret
        )
        self._pool = pool if pool is not None else _own_pool(self.settings)
        self._owns_pool = pool is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.provider.name!r}, {self.model_name!r})"

    @abstractmethod
    async def complete(self, request: ChatRequest) -> ChatResult:
        """Make one attempt at a request.

        Args:
            request: Checked, with nothing left to look up.

        Raises:
            APIKeyError, LLMServiceError: As `errors` describes them.

        Cancelling it closes the connection that the request went out on.
        """

    async def client(self) -> Lease[Client]:
        """Lease the open client of this endpoint, opening it if need be."""
        return await self._pool.lease(_pool_key(self.endpoint), self._open)

    def common_parameters(self, request: ChatRequest) -> dict[str, Any]:
        """Return what every provider is asked alike, under OpenAI's names."""
        parameters = dict(request.sampling)
        if request.tools:
            parameters["tools"] = list(request.tools)
            if request.tool_choice is not None:
                parameters["tool_choice"] = request.tool_choice
        if request.response_format is not None:
            parameters["response_format"] = request.response_format
        return parameters

    def get_token_usage(self, usage: Any) -> TokenUsage | None:
        """Read a usage record of this provider's; None for none."""
        return token_usage(usage)

    def supports_tools(self) -> bool | None:
        """Say whether the model takes function tools; None where LiteLLM cannot tell.

        Imports LiteLLM if nothing has yet, which takes seconds.
        """
        return supports(self.provider, self.model_name, "supports_function_calling")

    async def aclose(self) -> None:
        """Close what this adapter opened for itself. May be called twice."""
        if self._owns_pool:
            await self._pool.aclose()

    async def _open(self) -> Client:
        tls = await wire.tls_context(self.endpoint, self.settings)
        return Client(self.endpoint, self.settings, tls)


def create_adapter(
    provider: Any,
    model_name: str,
    api_key: str | SecretStr | None,
    base_url: str | None = None,
    *,
    settings: Settings | None = None,
    pool: "Pool[Client] | None" = None,
) -> BaseLLMAdapter:
    """Make the adapter of a provider. Nothing is imported or opened yet.

    Args:
        provider: Its name, as a string or a `LLMService`.
        model_name: The model, without a prefix.
        api_key: The key; None or empty where the provider needs none.
        base_url: Where the provider lives, if not at its own address.
        settings: How calls are made.
        pool: Where open clients are shared; without it, call `aclose` at the end.

    Raises:
        APIKeyNotFoundError: The provider needs a key.
        InvalidRequestError: The provider's name or the base URL is not one.
    """
    row = provider if isinstance(provider, Provider) else by_name(provider)
    return LiteLLMAdapter(
        row, model_name, api_key, base_url, settings=settings, pool=pool
    )


class LiteLLMAdapter(BaseLLMAdapter):
    """Reaches a model through `litellm.acompletion`."""

    async def complete(self, request: ChatRequest) -> ChatResult:
        """Make one attempt at a request."""
        exchange = Exchange()
        litellm = await load_litellm()
        async with await self.client() as client:
            response = await self._attempt(litellm, client, request, exchange)
        body = self._checked(exchange)
        self._log_left_out(request, exchange)
        return self._result(litellm, response, body, exchange)

    async def _attempt(
        self, litellm: Any, client: Client, request: ChatRequest, exchange: Exchange
    ) -> Any:
        arguments = self._arguments(litellm, client, request)
        token = wire.current.set(exchange)
        limit = asyncio.timeout(request.timeout)
        try:
            async with limit:
                return await litellm.acompletion(**arguments)
        except Exception as exc:
            if limit.expired():
                raise LLMTimeoutError(
                    f"{self.provider.name} did not answer within {request.timeout:g} s",
                    service=self.provider.name,
                    model=self.model_name,
                ) from None
            raise self._failure(litellm, exc, exchange) from exc
        finally:
            wire.current.reset(token)

    def _arguments(
        self, litellm: Any, client: Client, request: ChatRequest
    ) -> dict[str, Any]:
        messages = [dict(message) for message in request.messages]
        extra_body = dict(request.extra_body)
        if self.provider.format == "openai":
            for message in messages:
                if message["role"] in {"system", "developer"}:
                    message["role"] = self.provider.system_role
            # LiteLLM turns "developer" into "system" for all but the o-series, and
            # "system" into "user" for some of those. The SDK merges extra_body over
            # what LiteLLM made, so this is what goes out.
            if self.provider.system_role != "system":
                extra_body.setdefault("messages", messages)
        _know_model(litellm, self.provider, self.model_name)
        arguments = {
            "model": f"{self.provider.litellm}/{self.model_name}",
            "custom_llm_provider": self.provider.litellm,
            "messages": messages,
            **self.common_parameters(request),
            "client": _sdk_client(client),
            "api_key": PLACEHOLDER,
            "timeout": request.timeout,
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": True,
        }
        if self.endpoint.base_url is not None:
            arguments["api_base"] = self.endpoint.base_url
        if extra_body:
            arguments["extra_body"] = extra_body
        return arguments

    def _failure(self, litellm: Any, exc: Exception, exchange: Exchange) -> Exception:
        """Say what went wrong by what the wire saw, not by what LiteLLM raised."""
        fields: dict[str, Any] = {
            "service": self.provider.name,
            "model": self.model_name,
        }
        if exchange.error is not None:
            return wire.from_transport(exchange.error, **fields)
        if exchange.status is not None and exchange.status >= 300:
            return self._refusal(exchange)
        if exchange.status is not None:
            self._checked(exchange)
            return LLMServiceError(
                f"LiteLLM could not read the answer of {self.provider.name}: {_first(exc)}",
                status_code=exchange.status,
                request_id=failures.request_id(exchange.headers),
                **fields,
            )
        status = getattr(exc, "status_code", None)
        cls = InvalidRequestError if status in {400, 404, 422} else LLMServiceError
        return cls(
            f"LiteLLM refused the request, nothing was sent: {_first(exc)}", **fields
        )

    def _refusal(
        self, exchange: Exchange, effective_status: int | None = None
    ) -> CallError:
        return failures.from_answer(
            exchange.status or 0,
            exchange.headers,
            bytes(exchange.body),
            service=self.provider.name,
            model=self.model_name,
            secret=self.endpoint.secret.get_secret_value(),
            effective_status=effective_status,
        )

    def _checked(self, exchange: Exchange) -> dict[str, Any]:
        """Return the JSON of a 200, or raise what it is in place of an answer."""
        body = bytes(exchange.body)
        content_type = exchange.headers.get("content-type", "")
        reason = failures.not_an_answer(self.provider.format, content_type, body)
        if reason is not None and reason[1]:
            raise self._refusal(exchange)
        fields: dict[str, Any] = {
            "service": self.provider.name,
            "model": self.model_name,
            "status_code": exchange.status,
            "request_id": failures.request_id(exchange.headers),
        }
        if reason is not None:
            what = failures.clean(reason[0], self.endpoint.secret.get_secret_value())
            raise ServiceUnavailableError(
                f"{self.provider.name} answered {exchange.status}, but {what}", **fields
            )
        try:
            data = json.loads(body)
        except ValueError:
            data = {}
        if why := failures.blocked(data):
            raise ContentFilterError(
                f"{self.provider.name} refused the prompt: {why}", **fields
            )
        return data if isinstance(data, dict) else {}

    def _log_left_out(self, request: ChatRequest, exchange: Exchange) -> None:
        for option in request.sampling:
            _log_if_left_out(
                self.provider, self.model_name, option, exchange.request_body
            )

    def _result(
        self, litellm: Any, response: Any, body: dict[str, Any], exchange: Exchange
    ) -> ChatResult:
        choice = response.choices[0]
        message = choice.message
        tool_calls = [
            tool_call(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls or ()
        ]
        finish = choice.finish_reason
        if tool_calls and finish in {"stop", "function_call", None}:
            finish = "tool_calls"
        return ChatResult(
            text=message.content or "",
            token_usage=token_usage(usage_record(body)),
            raw_response=body,
            tool_calls=tool_calls,
            finish_reason=finish,
            model=body.get("model") or body.get("modelVersion") or self.model_name,
            service=self.provider.name,
            cost_usd=_cost(litellm, response, self.provider, self.model_name),
            request_id=failures.request_id(exchange.headers)
            or body.get("id")
            or body.get("responseId"),
            reasoning=getattr(message, "reasoning_content", None),
            rate_limits=rate_limits(exchange.headers),
        )


def tool_call(call_id: str | None, name: str | None, arguments: str | None) -> ToolCall:
    """Make a tool call; arguments that are not a JSON object stay text only."""
    text = arguments or ""
    try:
        parsed = json.loads(text) if text.strip() else {}
    except ValueError:
        parsed = None
    return ToolCall(
        id=call_id or "",
        name=name or "",
        arguments=parsed if isinstance(parsed, dict) else None,
        arguments_text=text,
    )


def _base_url(provider: Provider, given: str | None, settings: Settings) -> str | None:
    url = given or settings.base_urls.get(provider.name) or provider.base_url
    if url is None:
        return None
    try:
        url = http_url(url)
    except ValueError as exc:
        raise InvalidRequestError(
            f"base URL {url!r}: {exc}", service=provider.name
        ) from None
    if provider.format == "anthropic":
        return url.removesuffix("/v1")
    scheme, _, rest = url.partition("://")
    return url if "/" in rest else f"{scheme}://{rest}{provider.path}"


def _own_pool(settings: Settings) -> "Pool[Client]":
    return Pool(ttl=settings.client_ttl, max_clients=settings.max_clients)


def _pool_key(endpoint: Endpoint) -> tuple[str, str | None, bytes]:
    # The key of the process keeps the digest from being compared with anything.
    secret = endpoint.secret.get_secret_value().encode()
    digest = blake2b(secret, digest_size=16, key=_PROCESS).digest()
    return endpoint.provider.name, endpoint.base_url, digest


_PROCESS = os.urandom(16)


def _sdk_client(client: Client) -> Any:
    """Return what LiteLLM takes as `client=` for the client's provider."""
    if client.sdk is None:
        http = wire.httpx_client(client)
        if client.endpoint.provider.litellm == "openai":
            from openai import AsyncOpenAI

            client.sdk = AsyncOpenAI(
                api_key=PLACEHOLDER,
                base_url=client.endpoint.base_url,
                http_client=http,
                max_retries=0,
            )
        else:
            from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

            # The transport in the constructor spares it a client of its own; the
            # client set afterwards is one that follows no redirect.
            client.sdk = AsyncHTTPHandler(transport=http._transport)  # noqa: SLF001 - made above
            client.sdk.client = http
    return client.sdk


def _first(exc: BaseException) -> str:
    """Return one clean line of what LiteLLM said."""
    return failures.clean(str(exc))


# --- LiteLLM itself: its import, its tables ------------------------------------------

_import_lock = threading.Lock()
_litellm: Any = None

# Read while it is imported: without them it fetches a price table over the network,
# reads a .env file from any folder above, and logs to stderr. The second is read later
# too, so it stays; the others are put back as they were.
_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
}
_ENVIRONMENT_THAT_STAYS = {"LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True"}


async def load_litellm() -> Any:
    """Return the litellm module, imported in a thread at the first call."""
    return _litellm if _litellm is not None else await asyncio.to_thread(import_litellm)


def import_litellm() -> Any:
    """Import LiteLLM behind the fence. Takes seconds the first time; thread-safe."""
    global _litellm  # noqa: PLW0603 - a module is imported once
    with _import_lock:
        if _litellm is not None:
            return _litellm
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        httpx_level = logging.getLogger("httpx").level
        os.environ.update(_ENVIRONMENT)
        os.environ.update(_ENVIRONMENT_THAT_STAYS)
        try:
            import litellm
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        logging.getLogger("httpx").setLevel(httpx_level)
        for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
            logging.getLogger(name).handlers.clear()
        # It prints "Give Feedback / Get Help" to stdout on each error otherwise.
        litellm.suppress_debug_info = True
        _litellm = litellm
        return litellm


async def infer_provider(model: str) -> Provider | None:
    """Ask LiteLLM whose a model name is; None where it cannot tell."""
    litellm = await load_litellm()
    return _infer(litellm, model)


@lru_cache(maxsize=1024)
def _infer(litellm: Any, model: str) -> Provider | None:
    try:
        name = litellm.get_llm_provider(model=model)[1]
    except Exception:  # noqa: BLE001 - it raises six classes for "I do not know"
        return None
    return by_name(name) if name else None


def supports(provider: Provider, model: str, what: str) -> bool | None:
    """Look a capability up in LiteLLM's table; None where the model is not in it."""
    info = model_info(import_litellm(), provider, model)
    value = info.get(what) if info else None
    return None if value is None else bool(value)


def model_info(
    litellm: Any, provider: Provider, model: str
) -> Mapping[str, Any] | None:
    """Return the row of LiteLLM's table for a model; None where there is none.

    Read from the table itself: `litellm.get_model_info` posts to a local Ollama.
    """
    table = litellm.model_cost
    for name in (f"{provider.litellm}/{model}", f"{provider.name}/{model}", model):
        row = table.get(name)
        if isinstance(row, dict) and name not in _registered:
            return row
    return None


_registered: set[str] = set()


def _know_model(litellm: Any, provider: Provider, model: str) -> None:
    """Tell LiteLLM about a local model, or it asks localhost:11434, on the event loop."""
    if provider.format != "ollama":
        return
    name = f"{provider.litellm}/{model}"
    if name in _registered:
        return
    facts = {
        "mode": "chat",
        "input_cost_per_token": 0.0,
        "output_cost_per_token": 0.0,
        "supports_function_calling": True,
    }
    if name not in litellm.model_cost:
        _registered.update((name, f"ollama/{model}"))
    litellm.register_model(
        {
            name: {"litellm_provider": provider.litellm, **facts},
            f"ollama/{model}": {"litellm_provider": "ollama", **facts},
        }
    )


def _cost(litellm: Any, response: Any, provider: Provider, model: str) -> float | None:
    """Price an answer by LiteLLM's table, in USD; None where the model is not in it."""
    if provider.format == "ollama" or model_info(litellm, provider, model) is None:
        return None
    cost = response._hidden_params.get("response_cost")  # noqa: SLF001 - documented
    return None if cost is None else float(cost)


# What an option may be called on a wire; the last part of a path in any body.
_WIRE_NAMES = {
    "max_tokens": (
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "maxOutputTokens",
        "num_predict",
    ),
    "top_p": ("top_p", "topP"),
    "n": ("n", "candidateCount", "candidate_count"),
    "stop": ("stop", "stop_sequences", "stopSequences"),
    "reasoning_effort": (
        "reasoning_effort",
        "reasoning",
        "thinking",
        "think",
        "thinkingConfig",
        "thinking_config",
        "output_config",
    ),
}


@lru_cache(maxsize=4096)
def _first_time(provider: str, model: str, option: str) -> list[bool]:
    return [True]


def _log_if_left_out(provider: Provider, model: str, option: str, sent: bytes) -> None:
    """Log once for each model and option if the option did not reach the wire."""
    first = _first_time(provider.name, model, option)
    if not first or not sent:
        return
    first.clear()
    names = _WIRE_NAMES.get(option, (option,))
    if not any(f'"{name}"'.encode() in sent for name in names):
        _log.info("%s/%s takes no %s: it was left out", provider.name, model, option)
