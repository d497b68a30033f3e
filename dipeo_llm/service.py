"""The order of things in a call: compose, check, place, key, media, cache, route, retry.

Knows no provider's name and no LiteLLM. Each step is another module's; the methods
below stand in the order in which a call runs through them.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload
from weakref import WeakSet

from dipeo_llm import media
from dipeo_llm.adapters import factory
from dipeo_llm.adapters.base import BaseLLMAdapter, Target, new_pool
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.adapters.usage import token_usage
from dipeo_llm.cache_url import CacheURL
from dipeo_llm.domain import (
    Capabilities,
    ChatRequest,
    ChatResult,
    CommonOptions,
    ResponseFormat,
    ServiceName,
    T,
    TokenCount,
    TokenUsage,
    Tool,
    label,
    person_defaults,
    request_from_options,
)
from dipeo_llm.errors import (
    APIKeyError,
    CacheMissError,
    CallError,
    DiPeOLLMError,
    InvalidRequestError,
    ServiceUnavailableError,
    StructuredOutputError,
)
from dipeo_llm.keys import Key, find_key, is_key_error
from dipeo_llm.ledger import Usage
from dipeo_llm.litellm_import import load_litellm
from dipeo_llm.message_formatter import MessageFormatter, check_messages
from dipeo_llm.ports import APIKeyPort, LLMDomainService
from dipeo_llm.progress import CallProgress
from dipeo_llm.reports import CallHook, CallReporter
from dipeo_llm.retry import RetryPolicy
from dipeo_llm.settings import Settings, warn_about_environment
from dipeo_llm.streaming import ChatStream, Opened
from dipeo_llm.structured import form_of, parse
from dipeo_llm.system_prompt_handler import SystemPromptHandler

if TYPE_CHECKING:
    from dipeo_llm.batch import Batch, Requests
    from dipeo_llm.cache import ResponseCache
    from dipeo_llm.redis_clients import RedisClients
    from dipeo_llm.routes import Deployment, Routes
    from dipeo_llm.routing import RouteHealth, Routing
    from dipeo_llm.telemetry import Telemetry

_T = TypeVar("_T")

AdapterFactory = Callable[..., BaseLLMAdapter]
"""Called as `create_adapter` is: provider, model, key, base URL, and keywords."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a caller asked, checked."""

    request: ChatRequest
    model: str
    """The model string."""
    api_key_id: str | None
    service: Any
    """The name of the provider, None where the model string decides."""
    person_id: str | None = None
    targets: dict[str, Target] = field(default_factory=dict, compare=False)
    """Those of a route's deployments that were found so far, by the deployments' ids."""

    @property
    def session(self) -> str | None:
        """The name of the conversation: the caller's own, or the person's."""
        own, execution = self.request.session, self.request.labels.get("execution_id")
        if own or self.person_id is None:
            return own
        return f"{self.person_id}:{execution or ''}"


class LLMInfraService:
    """Talks to language models; implements `LLMServicePort`.

    Safe for any number of tasks, and for several event loops. Open clients are shared
    and closed by `aclose`, at the end of `async with`, or with the event loop.

    Args:
        api_key_service: Where keys are kept.
        llm_domain_service: The application's own rules about models; kept for it.
        settings: How calls are made; None reads the environment, and raises
            SettingsError now for a value that cannot be read.
        system_prompt_handler: Finds system prompts; None makes one on the settings'
            base directory.
        adapter_factory: Makes the adapter of a call, such as
            a `dipeo_llm.testing.MockLLMAdapter()` in a test; None is `create_adapter`.
        on_call: A function or a coroutine function, called once after each call with
            its `CallRecord`, however the call ended. The call returns after it, or at
            once if it was cancelled; `aclose` waits for it. Its exceptions are logged.
        telemetry: A `dipeo_llm.telemetry.Telemetry()`, to report calls to OpenTelemetry.
        cache: Where answers are cached: a URL, as `Settings.cache_url`, or
            a `ResponseCache` that several services share and the application closes.
            None is the settings' URL.
        routes: Names of the application's own for models, as `Routes.read` takes them:
            a mapping of names to `Route`, or the path of a YAML or JSON file. None is
            the settings' file.
    """

    def __init__(
        self,
        api_key_service: APIKeyPort,
        llm_domain_service: LLMDomainService | None = None,
        *,
        settings: Settings | None = None,
        system_prompt_handler: SystemPromptHandler | None = None,
        adapter_factory: AdapterFactory | None = None,
        on_call: CallHook | None = None,
        telemetry: "Telemetry | None" = None,
        cache: "ResponseCache | str | None" = None,
        routes: "Routes | Mapping[str, Any] | str | Path | None" = None,
    ) -> None:
        self.api_key_service = api_key_service
        self.llm_domain_service = llm_domain_service
        self.settings = settings if settings is not None else Settings.from_env()
        warn_about_environment(self.settings, os.environ)
        self._prompts = system_prompt_handler or SystemPromptHandler(
            self.settings.base_dir, on_missing=self.settings.missing_prompt
        )
        self._formatter = MessageFormatter()
        self._create_adapter = adapter_factory or factory.create_adapter
        self._reporter = CallReporter(on_call, telemetry)
        self._pool = new_pool(self.settings)
        self._owns_cache = cache is None or isinstance(cache, str)
        self.cache = self._open_cache(cache)
        """The cache of answers, with its statistics; None if there is none."""
        self._routing = self._open_routing(routes)
        self._loading: set[asyncio.Task[Any]] = set()
        self._ended: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._closed = False

    async def __aenter__(self) -> Self:
        self._reopen()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def initialize(self) -> None:
        """Import LiteLLM in a thread, which the first call would do otherwise.

        May be called twice; opens a service again that was closed.

        Raises:
            InvalidRequestError: The model of a route's deployment cannot be placed.
        """
        self._reopen()
        await self._load_litellm()
        if self._routing is not None:
            self._routing.check()

    async def aclose(self) -> None:
        """Close every open client. May be called twice.

        Calls in flight have `settings.close_grace` seconds to end; then their
        connection is closed and they raise ServiceUnavailableError. `on_call` has as
        long, and is then cancelled.
        """
        self._closed = True
        if self._routing is not None:
            self._routing.is_closing = True
        grace = self.settings.close_grace
        await asyncio.gather(self._pool.aclose(grace), self._end_loading(grace))
        if self.cache is not None and self._owns_cache:
            await self.cache.aclose()
        if self._routing is not None:
            await self._routing.aclose()
        await self._reporter.aclose(grace)

    @overload
    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: None = None,
        **options: Unpack[CommonOptions],
    ) -> ChatResult[T]: ...
    @overload
    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: Sequence[Tool] | None,
        **options: Unpack[CommonOptions],
    ) -> ChatResult[T | None]: ...
    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        **options: Any,
    ) -> ChatResult[Any]:
        """Answer a conversation.

        Args:
            messages: OpenAI-shaped, oldest first. A system prompt may have the role
                "system" or "developer"; each provider gets it in its own place.
            model: A model string, such as "gpt-4.1-nano" or "anthropic/claude-opus-4-1";
                or, without a service, the name of a route.
            api_key_id: The key's name; None for a provider that needs none.
            service: The provider, where the model string does not tell it; wins over a
                prefix. `provider` and `service_name` mean the same.
            **options: temperature, max_tokens, top_p, n, stop, seed, tools,
                tool_choice, response_format, text_format, reasoning_effort,
                options (an LLMRequestOptions), timeout (s, one attempt), deadline (s,
                the whole call), extra_body, cache, sample, coalesce, session, and the
                labels execution_phase, execution_id, trace_id, person_name and node_id,
                which are never sent.

        Raises:
            InvalidRequestError: There are no messages, or the model cannot be placed.
            APIKeyError: The key is missing, or the provider refuses it.
            LLMServiceError: Any other failure, as its subclasses describe.
            SettingsError: A proxy or the trusted authorities cannot be used.
            TypeError: An unknown option; the message names it.
            RuntimeError: The service is closed.

        Cancelling the call closes its connection; the pooled client lives on.
        """
        call = self._check_call(options, model, api_key_id, messages)
        progress = self._begin(call)
        async with self._reporter.watch(progress), progress:
            result = await self._answer(call, progress)
            return self._finish(call.request, result, progress)

    @overload
    async def complete_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: None = None,
        **options: Unpack[CommonOptions],
    ) -> ChatResult[T]: ...
    @overload
    async def complete_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: Sequence[Tool] | None,
        **options: Unpack[CommonOptions],
    ) -> ChatResult[T | None]: ...
    async def complete_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChatResult[Any]:
        """Answer a conversation as one of its persons.

        Args:
            person_messages: Objects with the attributes of `Message`, oldest first.
            person_id: Who answers; its own messages become the assistant's.
            llm_config: An object with the attributes of `PersonLLMConfig`.
            variables: Values for a prompt template, beside the configuration's
                `prompt_variables`; with either, the person's prompt is a template.
            **options: As for `complete`; a `service` wins over the configuration's.

        Raises:
            DiPeOLLMError, TypeError, RuntimeError: As `complete`.

        A prompt file is read, and a template rendered, in a thread. Cancelling is as
        for `complete`.
        """
        call = self._check_person_call(options, person_id, llm_config)
        progress = self._begin(call)
        async with self._reporter.watch(progress), progress:
            call = await self._compose(
                call, person_messages, person_id, llm_config, variables, progress
            )
            result = await self._answer(call, progress)
            return self._finish(call.request, result, progress)

    @overload
    def stream(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: None = None,
        **options: Unpack[CommonOptions],
    ) -> ChatStream[T]: ...
    @overload
    def stream(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: Sequence[Tool] | None,
        **options: Unpack[CommonOptions],
    ) -> ChatStream[T | None]: ...
    def stream(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        **options: Any,
    ) -> ChatStream[Any]:
        """Answer a conversation as a stream.

        Args:
            messages: As for `complete`.
            model: Likewise.
            api_key_id: Likewise.
            service: Likewise.
            **options: Likewise; `timeout` is for the first chunk, and `idle_timeout`
                (s) for each later one.

        Returns:
            An async context manager that is also an async iterator of `StreamChunk`;
            `await stream.result()` is the whole result. Nothing is sent before it is
            entered. Opening it is tried again as `complete` is; after the first chunk
            nothing is.

        Raises:
            InvalidRequestError, TypeError, RuntimeError: At once, as `complete`.
        """
        call = self._check_call(options, model, api_key_id, messages)
        return ChatStream[Any](
            partial(self._begin, call, is_stream=True),
            partial(self._open, call),
            partial(self._finish, call.request),
            self._reporter,
        )

    @overload
    def stream_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: None = None,
        **options: Unpack[CommonOptions],
    ) -> ChatStream[T]: ...
    @overload
    def stream_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        service: ServiceName | None = None,
        response_format: ResponseFormat[T] | None = None,
        tools: Sequence[Tool] | None,
        **options: Unpack[CommonOptions],
    ) -> ChatStream[T | None]: ...
    def stream_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChatStream[Any]:
        """Answer a conversation as one of its persons, as a stream.

        Arguments are as for `complete_with_person`, the rest as for `stream`.
        """
        call = self._check_person_call(options, person_id, llm_config)
        return ChatStream(
            partial(self._begin, call, is_stream=True),
            partial(
                self._open_with_person,
                call,
                person_messages,
                person_id,
                llm_config,
                variables,
            ),
            partial(self._finish, call.request),
            self._reporter,
        )

    def complete_many(
        self, requests: "Requests", *, concurrency: int = 8, ordered: bool = True
    ) -> "Batch":
        """Make many calls, a limited number at a time.

        Args:
            requests: The keywords of each call, as for `complete`; or those of
                `complete_with_person`. Any iterable or async iterable; it is read as
                work goes on.
            concurrency: Most calls in flight.
            ordered: Yield in the order of the input; False yields as calls end.

        Returns:
            An async iterator of `BatchItem`: each has a result or an error. Its
            `totals` add up tokens and USD. A refused key and a used-up quota end it.

        Raises:
            ValueError: The concurrency is below 1.

        With a cache, equal requests get a `sample` number each, unless they have one:
        the same prompt many times is as many answers.
        """
        from dipeo_llm.batch import Batch

        return Batch(self, requests, concurrency=concurrency, ordered=ordered)

    async def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str,
        api_key_id: str | None = None,
        *,
        service: Any = None,
        tools: Sequence[Any] = (),
    ) -> TokenCount:
        """Count the input tokens of a conversation, before it is sent.

        Args:
            messages: As for `complete`.
            model: Likewise.
            api_key_id: Likewise.
            service: Likewise.
            tools: Likewise; they count too.

        Returns:
            The number, and who counted: the provider where it has an endpoint for it
            (OpenAI, Anthropic, Google), else LiteLLM's tokenizer.

        Raises:
            DiPeOLLMError: As `complete`.
        """
        options = {"tools": list(tools), "service": service}
        call = self._check_call(options, model, api_key_id, messages)
        async with CallProgress() as progress:
            deployment = self._first_deployment(call.model, call.service)
            target = await self._find_target(call, progress, deployment)
            return await self._retry(target, _count_tokens, progress)

    def capabilities(self, model: str, *, service: Any = None) -> Capabilities:
        """Say what a model takes and costs, by LiteLLM's table.

        For a route it is the model of the first deployment. Imports LiteLLM if nothing
        has yet, which takes seconds: `await initialize()` does that off the event loop.

        Raises:
            InvalidRequestError: The model cannot be placed.
        """
        if (deployment := self._first_deployment(model, service)) is not None:
            return _describe(deployment)
        row, name = factory.resolve(model, service)
        return factory.capabilities(row, name)

    async def get_available_models(self, api_key_id: str) -> list[str]:
        """Return the names of the models that the provider offers to a key, sorted.

        Args:
            api_key_id: The key's name. Its record's `service` says whose it is; without
                one, an id that begins with a provider's name does.

        Raises:
            InvalidRequestError: It cannot be told whose key it is.
            APIKeyError, LLMServiceError: As `complete`.

        Every page of the provider's own list is read.
        """
        adapter = await self._find_key_adapter(api_key_id, None)
        return await self._retry_question(adapter, adapter.list_models)

    async def validate_api_key(
        self, api_key_id: str, provider: str | None = None
    ) -> bool:
        """Ask the provider whether it takes a key, by listing its models.

        Args:
            api_key_id: The key's name.
            provider: Whose key it is, where its record does not say.

        Returns:
            False if the provider refuses the key.

        Raises:
            APIKeyError: The key is unknown to the application, so nothing was asked.
            LLMServiceError: The provider could not be asked.
        """
        adapter = await self._find_key_adapter(api_key_id, provider)
        try:
            await self._retry_question(adapter, partial(adapter.list_models, pages=1))
        except APIKeyError:
            return False
        return True

    def get_token_counts(self, client_name: str, usage: Any) -> TokenUsage:
        """Read a provider's usage record, as an object or a mapping.

        Args:
            client_name: The provider; the record's own fields tell its form.
            usage: The record. None, or one without a number, counts nothing.
        """
        return token_usage(usage) or TokenUsage()

    async def get_provider_for_model(self, model: str) -> str | None:
        """Return the provider of a model string, None where it cannot be told.

        For a route it is the provider of the first deployment.
        LiteLLM is asked about a name that no row claims; its import takes seconds the
        first time, in a thread.
        """
        service = None
        if (deployment := self._first_deployment(model, None)) is not None:
            model, service = deployment.model, deployment.service
        try:
            placed = await self._place(model, service)
        except InvalidRequestError:
            return None
        return placed[0].name if placed else None

    def routes(self) -> "dict[str, RouteHealth]":
        """Return the state of every route: cool-downs, latencies, calls in flight, limits.

        It is what this process knows; with a shared state it hears of the others'
        cool-downs at its next call. Empty if the service has no routes.
        """
        return self._routing.health() if self._routing is not None else {}

    def usage(self, *, reset: bool = False) -> Usage:
        """Return what the calls of this service have used so far.

        Tokens and USD, in all and by person, model, provider and `execution_id`. A
        stream counts when it has ended or was left.

        Args:
            reset: Whether to start again at zero; no call is lost in between.
        """
        return self._reporter.ledger.usage(reset=reset)

    def _reopen(self) -> None:
        if self._closed:
            # The old pool stays closed: a call that outlived `aclose` finds no way back.
            self._pool = new_pool(self.settings)
            if self.cache is not None and self._owns_cache:
                self.cache.reopen()
            if self._routing is not None:
                self._routing.reopen()
        self._closed = False

    def _open_cache(
        self, cache: "ResponseCache | str | None"
    ) -> "ResponseCache | None":
        url = self.settings.cache_url if cache is None else cache
        if not url:
            return None
        if not isinstance(url, str):
            return url
        from dipeo_llm.cache import ResponseCache

        return ResponseCache(url)

    def _open_routing(
        self, routes: "Routes | Mapping[str, Any] | str | Path | None"
    ) -> "Routing | None":
        source = self.settings.routes_file if routes is None else routes
        if source is None:
            return None
        from dipeo_llm.routes import Routes
        from dipeo_llm.routing import Routing

        return Routing(
            Routes.read(source),
            describe=_describe,
            settings=self.settings,
            redis=self._open_state(),
        )

    def _first_deployment(self, model: str, service: Any) -> "Deployment | None":
        """Return the first deployment of a route; None if the model is not a route."""
        name = self._routing.find(model, service) if self._routing else None
        if self._routing is None or name is None:
            return None
        return self._routing.deployments(name)[0]

    def _open_state(self) -> "RedisClients | None":
        """Open the state that routes share with other processes."""
        url = self.settings.state_url or self.settings.cache_url
        where = CacheURL.read(url) if url else None
        if where is None or where.server is None:
            return None
        from dipeo_llm.redis_clients import RedisClients

        return RedisClients(where)

    # The steps of a call, in the order in which it takes them.

    def _check_call(
        self,
        options: dict[str, Any],
        model: str,
        api_key_id: str | None,
        messages: Sequence[Mapping[str, Any]] | None,
    ) -> _Call:
        """Check what a caller gave for a conversation in OpenAI's shape."""
        service = _take_service(options)
        request = self._check_options(options)
        request = replace(request, messages=check_messages(messages))
        return _Call(request, model, api_key_id, service)

    def _check_person_call(
        self, options: dict[str, Any], person_id: Any, llm_config: Any
    ) -> _Call:
        """Check what a caller gave for a person; `_compose` adds the messages."""
        service = _take_service(options) or getattr(llm_config, "service", None)
        request = self._check_options(options, person_defaults(llm_config))
        return _Call(
            request,
            llm_config.model,
            llm_config.api_key_id,
            service,
            label(person_id),
        )

    def _check_options(
        self, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> ChatRequest:
        if self._closed:
            raise RuntimeError("the service is closed; initialize() opens it again")
        request = request_from_options(
            (),
            options,
            default_timeout=self.settings.timeout,
            default_idle_timeout=self.settings.idle_timeout,
            defaults=defaults,
        )
        if request.cache == "only" and self.cache is None:
            raise InvalidRequestError(
                'cache="only" needs a cache: LLMInfraService(cache="memory://"), or'
                " DIPEO_LLM_CACHE_URL"
            )
        form = form_of(request.response_format)
        return request if form is None else replace(request, response_format=form)

    def _begin(self, call: _Call, *, is_stream: bool = False) -> CallProgress:
        """Start the clock of a call."""
        request, form = call.request, call.request.response_format
        options = dict(request.sampling)
        if request.tools:
            options["tools"] = len(request.tools)
        if form is not None:
            options["response_format"] = form.response_format.get("type")
        progress = CallProgress(
            request.deadline,
            model=label(call.model),
            person_id=call.person_id,
            is_stream=is_stream,
            options=options,
            labels=request.labels,
        )
        return self._reporter.begin(progress)

    async def _compose(
        self,
        call: _Call,
        person_messages: Sequence[Any],
        person_id: Any,
        config: Any,
        variables: Mapping[str, Any] | None,
        progress: CallProgress,
    ) -> _Call:
        """Add the conversation as the person sees it, with the system prompt."""
        find = self._prompts.get_system_prompt
        # A handler of the application's own may know no variables.
        given = () if variables is None else (variables,)
        is_template = given or getattr(config, "prompt_variables", None) is not None
        if is_template or getattr(config, "prompt_file", None):
            prompt = await asyncio.to_thread(find, config, *given)
        else:
            prompt = find(config)
        progress.prompt = getattr(prompt, "template", None)
        progress.prompt_version = getattr(prompt, "version", None)
        # The adapter translates the role "system": only it knows the provider for
        # certain when the model string decides.
        messages = self._formatter.format_messages_for_llm(
            person_messages or (), person_id, prompt
        )
        request = replace(call.request, messages=check_messages(messages))
        return replace(call, request=request)

    async def _answer(self, call: _Call, progress: CallProgress) -> ChatResult[Any]:
        """Answer from the cache, or by a call."""
        progress.send(call.request.messages)
        targets, send = await self._find_way(call, progress, _complete)
        if self.cache is None or not targets:
            return await send(progress)
        return await self.cache.answer(
            targets, progress, send, _shared_by(call, progress)
        )

    async def _open_with_person(
        self,
        call: _Call,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        variables: Mapping[str, Any] | None,
        progress: CallProgress,
    ) -> Opened:
        """Compose a person's conversation, which may read a file, and open a stream."""
        call = await self._compose(
            call, person_messages, person_id, llm_config, variables, progress
        )
        return await self._open(call, progress)

    async def _open(self, call: _Call, progress: CallProgress) -> Opened:
        """Do as `_answer` for a stream, until its first chunk is there."""
        progress.send(call.request.messages)
        targets, send = await self._find_way(call, progress, _open_stream)
        if self.cache is None or not targets:
            return await send(progress)
        return await self.cache.open(
            targets, progress, send, _shared_by(call, progress)
        )

    async def _find_way(
        self,
        call: _Call,
        progress: CallProgress,
        attempt: Callable[[Target], Awaitable[_T]],
    ) -> tuple[Sequence[Target], Callable[[CallProgress], Awaitable[_T]]]:
        """Find who may answer a call, and what sends it: to one target, or by a route.

        The targets are for the cache; without one, a route's are found one at a time.
        """
        routing = self._routing
        name = routing.find(call.model, call.service) if routing else None
        if routing is None or name is None:
            target = await self._find_target(call, progress)
            return (target,), partial(self._retry, target, attempt)
        progress.route = name
        await self._load_litellm()
        targets: list[Target] = []
        if self.cache is not None and call.request.cache != "bypass":
            for deployment in routing.deployments(name):
                # The call itself says what is wrong with a deployment without a key.
                with suppress(CallError):
                    targets.append(await self._find_target(call, progress, deployment))
            if not targets and call.request.cache == "only":
                raise CacheMissError(
                    f"no deployment of route {name!r} can be called, so the cache was"
                    ' not asked; cache="only" sends nothing',
                    model=name,
                )
        return targets, partial(self._send_by_route, routing, name, call, attempt)

    async def _find_target(
        self,
        call: _Call,
        progress: CallProgress,
        deployment: "Deployment | None" = None,
    ) -> Target:
        """Find the adapter of a call, or of a route's deployment, and load the media."""
        if deployment is None:
            adapter = await self._find_adapter(call, progress)
            request = await self._prepare_media(call.request, adapter)
            request = replace(request, watch_usage=progress.watch_usage)
            return Target(adapter, request)
        if (found := call.targets.get(deployment.id)) is not None:
            return found
        to = replace(
            call,
            model=deployment.model,
            service=deployment.service,
            api_key_id=deployment.api_key_id or call.api_key_id,
        )
        try:
            adapter = await self._find_adapter(to, progress, deployment.base_url)
        except Exception as exc:
            # The application's own error leads on to another deployment, as ours does.
            if isinstance(exc, DiPeOLLMError) or not is_key_error(exc):
                raise
            raise APIKeyError(str(exc), service=progress.service) from exc
        # Two deployments of a provider get the same pictures, loaded once.
        for each in call.targets.values():
            if each.adapter.provider is adapter.provider:
                request = each.request
                break
        else:
            request = await self._prepare_media(call.request, adapter)
        request = replace(request, watch_usage=progress.watch_usage)
        target = Target(adapter, request, deployment.label)
        call.targets[deployment.id] = target
        return target

    async def _find_adapter(
        self, call: _Call, progress: CallProgress, base_url: str | None = None
    ) -> BaseLLMAdapter:
        """Place the model, find the key, and make the adapter."""
        placed = await self._place(call.model, call.service)
        if placed is None and call.api_key_id:
            key = await self._find_key(call.api_key_id, None)
            if key.service:
                placed = factory.find_by_key(call.model, key.service)
        if placed is None:
            raise factory.unknown_model(call.model)
        provider, name = placed
        progress.place(provider.name, name)
        key = await self._find_key(call.api_key_id, provider, base_url)
        return self._make_adapter(provider, name, key)

    async def _place(self, model: str, service: Any) -> tuple[Provider, str] | None:
        """Find the provider of a model string, and the name without a prefix."""
        if factory.needs_litellm(model, service):
            await self._load_litellm()
        return factory.find(model, service)

    async def _load_litellm(self) -> None:
        """Import LiteLLM, which knows whether the settings name its providers rightly."""
        await load_litellm()
        factory.check_base_urls(self.settings.base_urls)

    async def _find_key(
        self,
        api_key_id: str | None,
        provider: Provider | None,
        base_url: str | None = None,
    ) -> Key:
        """Ask the application for the key of a provider, or of the key's own.

        A base URL of a route's deployment wins over that of the key's record.
        """
        key = await find_key(
            self.api_key_service,
            api_key_id,
            service=provider.name if provider else None,
            # An id that was given is looked up, also where no key is needed.
            needs_key=provider is None
            or (bool(api_key_id) and provider.needs_key)
            or factory.needs_key(provider, self.settings, base_url),
            owner=lambda name: factory.by_name(name).name,
            is_local=factory.is_local,
            base_url=base_url,
        )
        return key if base_url is None else replace(key, base_url=base_url)

    def _make_adapter(self, provider: Provider, name: str, key: Key) -> BaseLLMAdapter:
        return self._create_adapter(
            provider,
            name,
            key.secret,
            key.base_url,
            settings=self.settings,
            pool=self._pool,
        )

    async def _prepare_media(
        self, request: ChatRequest, adapter: BaseLLMAdapter
    ) -> ChatRequest:
        """Load pictures, files and sounds, once for all attempts."""
        contents = [message.get("content") for message in request.messages]
        if all(content is None or isinstance(content, str) for content in contents):
            return request
        # LiteLLM's import takes the proxy's variables away for a while.
        await load_litellm()
        preparing = media.prepare(
            request.messages,
            adapter.provider.media,
            service=adapter.provider.name,
            base_dir=self._prompts.base_dir,
            settings=self.settings,
            allow_outside_base_dir=self._prompts.allow_outside_base_dir,
        )
        messages = await self._run_until_closed(asyncio.create_task(preparing))
        return replace(request, messages=messages)

    async def _retry(
        self,
        target: Target,
        attempt: Callable[[Target], Awaitable[_T]],
        progress: CallProgress,
    ) -> _T:
        """Make attempts until one succeeds or another is not worth it.

        N retries are N + 1 attempts, and an attempt sends at most one request. The
        progress counts them; an error carries their number in `attempts`.
        """
        progress.aim(target)
        policy = RetryPolicy(self.settings, progress)
        while True:
            progress.begin_attempt()
            try:
                return await attempt(target)
            except DiPeOLLMError as exc:
                wait = policy.next_wait(exc)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def _send_by_route(
        self,
        routing: "Routing",
        name: str,
        call: _Call,
        attempt: Callable[[Target], Awaitable[_T]],
        progress: CallProgress,
    ) -> _T:
        """Make attempts at a route's deployments until one answers or none is left.

        One budget of attempts and one deadline are for all of them together.
        """
        choices = await routing.choose(name, call.request, call.session, progress)
        try:
            while True:
                async with await choices.take() as turn:
                    try:
                        target = await self._find_target(
                            call, progress, turn.deployment
                        )
                        progress.aim(target)
                        progress.begin_attempt()
                        return await turn.hold(await attempt(target))
                    except DiPeOLLMError as exc:
                        wait = turn.fail(exc)
                        if wait is None:
                            raise choices.error(exc) from None
                await asyncio.sleep(wait)
        finally:
            choices.forget()

    def _finish(
        self, request: ChatRequest, result: ChatResult[Any], progress: CallProgress
    ) -> ChatResult[Any]:
        """Complete a result with what the call knows, and parse a structured answer.

        A turn that calls tools is not the answer yet, and is not parsed.
        """
        progress.answer(result)
        form = request.response_format
        if form is None or not form.is_json:
            return result
        if result.parsed is None and not result.tool_calls:
            try:
                result.parsed = parse(form, result)
            except StructuredOutputError as exc:
                exc.model, exc.attempts = progress.model, progress.attempts
                raise
        return result

    # Around a call.

    async def _retry_question(
        self, adapter: BaseLLMAdapter, attempt: Callable[[], Awaitable[_T]]
    ) -> _T:
        """Do as `_retry` for what is not a call: it has no deadline and no record."""

        async def ask(_: Target) -> _T:
            return await attempt()

        async with CallProgress() as progress:
            return await self._retry(Target(adapter, ChatRequest(())), ask, progress)

    async def _find_key_adapter(
        self, api_key_id: str, provider: str | None
    ) -> BaseLLMAdapter:
        """Make the adapter of a key's provider, for questions about the key."""
        if self._closed:
            raise RuntimeError("the service is closed; initialize() opens it again")
        if factory.own_of_key(provider or api_key_id) is None:
            await load_litellm()
        row = factory.by_name(provider) if provider else factory.of_key(api_key_id)
        key = await self._find_key(api_key_id, row)
        if key.service and not provider:
            row = factory.by_name(key.service)
        if row is None:
            raise InvalidRequestError(
                f"cannot tell which provider key {api_key_id!r} belongs to; set"
                ' "service" in its record'
            )
        return self._make_adapter(row, "", key)

    async def _run_until_closed(self, task: asyncio.Task[_T]) -> _T:
        """Wait for a task that `aclose` may end."""
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            raise ServiceUnavailableError(
                "the service was closed while the call was under way", retryable=False
            ) from None

    async def _end_loading(self, grace: float) -> None:
        """End the tasks that load media when the grace is over."""
        here = asyncio.get_running_loop()
        ours = [task for task in self._loading if task.get_loop() is here]
        if ours:
            await asyncio.wait(ours, timeout=grace)
        for task in list(self._loading):
            self._ended.add(task)
            task.get_loop().call_soon_threadsafe(task.cancel)
        if ours:
            await asyncio.wait(ours)


async def _complete(target: Target) -> ChatResult[Any]:
    """Make one attempt at an answer."""
    return await target.adapter.complete(target.request)


async def _count_tokens(target: Target) -> TokenCount:
    return await target.adapter.count_tokens(target.request)


async def _open_stream(target: Target) -> Opened:
    """Make one attempt at a stream, until its first chunk is there."""
    items = target.adapter.stream(target.request)
    try:
        return Opened(items, await anext(items))
    except BaseException:
        await items.aclose()
        raise


def _shared_by(call: _Call, progress: CallProgress) -> Hashable:
    """Return what identical calls have in common, or else they must not be one call.

    Fallbacks are not among the targets of a call by a route: they depend on the route,
    and their keys may be the call's.
    """
    return progress.route and (progress.route, call.api_key_id)


def _describe(deployment: "Deployment") -> Capabilities:
    """Return what LiteLLM's table says about the model of a deployment."""
    return factory.capabilities(*factory.resolve(deployment.model, deployment.service))


_SERVICE_NAMES = ("service", "provider", "service_name")


def _take_service(options: dict[str, Any]) -> Any:
    """Take the service, under any of its names, out of a call's keywords.

    Raises:
        TypeError: Two of the names were given, with different values.
    """
    named = {name: options.pop(name, None) for name in _SERVICE_NAMES}
    found = {str(getattr(v, "value", v)): v for v in named.values() if v is not None}
    if len(found) > 1:
        raise TypeError(f"two services for one call: {' and '.join(found)}")
    return next(iter(found.values()), None)
