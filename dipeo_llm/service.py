"""The order of things in a call: whose model, which key, what to say, how often to try.

Knows no provider's name and no LiteLLM; each step is another module's, and they are
written out here in the order in which they happen.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar, cast
from weakref import WeakSet

from dipeo_llm import counting, listing, media
from dipeo_llm.adapters import base as adapters
from dipeo_llm.adapters import factory as providers
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.factory import Provider
from dipeo_llm.adapters.usage import token_usage
from dipeo_llm.domain import (
    Capabilities,
    ChatRequest,
    ChatResult,
    TokenCount,
    TokenUsage,
    request_from_options,
)
from dipeo_llm.errors import (
    APIKeyError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMServiceError,
    ServiceUnavailableError,
    StructuredOutputError,
)
from dipeo_llm.keys import find_key
from dipeo_llm.litellm_import import load_litellm
from dipeo_llm.litellm_tables import capabilities_of, infer_provider
from dipeo_llm.message_formatter import MessageFormatter, checked
from dipeo_llm.ports import APIKeyPort, LLMDomainService
from dipeo_llm.retry import Deadline, RetryDecision
from dipeo_llm.settings import Settings
from dipeo_llm.streaming import ChatStream, Opened, Start
from dipeo_llm.structured import form_of, parse
from dipeo_llm.system_prompt_handler import SystemPromptHandler

_T = TypeVar("_T")

AdapterFactory = Callable[..., BaseLLMAdapter]
"""Called as `create_adapter` is: provider, model, key, base URL, and keywords."""


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
    """

    def __init__(
        self,
        api_key_service: APIKeyPort,
        llm_domain_service: LLMDomainService | None = None,
        *,
        settings: Settings | None = None,
        system_prompt_handler: SystemPromptHandler | None = None,
        adapter_factory: AdapterFactory | None = None,
    ) -> None:
        self.api_key_service = api_key_service
        self.llm_domain_service = llm_domain_service
        self.settings = settings if settings is not None else Settings.from_env()
        self._prompts = system_prompt_handler or SystemPromptHandler(
            self.settings.base_dir
        )
        self._formatter = MessageFormatter()
        self._create_adapter = adapter_factory or adapters.create_adapter
        self._pool = adapters.new_pool(self.settings)
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
        """
        self._reopen()
        await load_litellm()

    async def aclose(self) -> None:
        """Close every open client. May be called twice.

        Calls in flight have `settings.close_grace` seconds to end; then their
        connection is closed and they raise ServiceUnavailableError.
        """
        self._closed = True
        grace = self.settings.close_grace
        await asyncio.gather(self._pool.aclose(grace), self._end_loading(grace))

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: Any = None,
        **options: Any,
    ) -> ChatResult:
        """Answer a conversation.

        Args:
            messages: OpenAI-shaped, oldest first. A system prompt may have the role
                "system" or "developer"; each provider gets it in its own place.
            model: A model string, such as "gpt-4.1-nano" or "anthropic/claude-opus-4-1".
            api_key_id: The key's name; None for a provider that needs none.
            service: The provider, where the model string does not tell it; wins over a
                prefix. `provider` and `service_name` mean the same.
            **options: temperature, max_tokens, top_p, n, stop, seed, tools,
                tool_choice, response_format, text_format, reasoning_effort,
                options (an LLMRequestOptions), timeout (s, one attempt), deadline (s,
                the whole call), extra_body, and the labels execution_phase,
                execution_id and trace_id, which are never sent.

        Raises:
            InvalidRequestError: There are no messages, or the model cannot be placed.
            APIKeyError: The key is missing, or the provider refuses it.
            LLMServiceError: Any other failure, as its subclasses describe.
            SettingsError: A proxy or the trusted authorities cannot be used.
            TypeError: An unknown option; the message names it.
            RuntimeError: The service is closed.

        Cancelling the call closes its connection; the pooled client lives on.
        """
        service = _service(options, service)
        request = self._request(options, messages=checked(messages))
        async with Deadline(request.deadline) as deadline:
            result = await self._answer(request, model, service, api_key_id, deadline)
        return _finished(request, result, deadline)

    async def complete_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        **options: Any,
    ) -> ChatResult:
        """Answer a conversation as one of its persons.

        Args:
            person_messages: Objects with the attributes of `Message`, oldest first.
            person_id: Who answers; its own messages become the assistant's.
            llm_config: An object with the attributes of `PersonLLMConfig`.
            **options: As for `complete`; a `service` wins over the configuration's.

        Raises:
            DiPeOLLMError, TypeError, RuntimeError: As `complete`.

        A prompt file is read in a thread. Cancelling is as for `complete`.
        """
        service = _service(options) or getattr(llm_config, "service", None)
        request = self._request(options)
        model, api_key_id = llm_config.model, llm_config.api_key_id
        async with Deadline(request.deadline) as deadline:
            messages = await self._compose(person_messages, person_id, llm_config)
            request = replace(request, messages=checked(messages))
            result = await self._answer(request, model, service, api_key_id, deadline)
        return _finished(request, result, deadline)

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: Any = None,
        **options: Any,
    ) -> ChatStream:
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
        service = _service(options, service)
        request = self._request(options, messages=checked(messages))

        async def start(deadline: Deadline) -> Opened:
            return await self._open(request, model, service, api_key_id, deadline)

        return self._stream(start, request)

    def stream_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        **options: Any,
    ) -> ChatStream:
        """Answer a conversation as one of its persons, as a stream.

        Arguments are as for `complete_with_person`, the rest as for `stream`.
        """
        service = _service(options) or getattr(llm_config, "service", None)
        request = self._request(options)

        model, api_key_id = llm_config.model, llm_config.api_key_id

        async def start(deadline: Deadline) -> Opened:
            # Composed when it is entered, as that may read a file.
            messages = await self._compose(person_messages, person_id, llm_config)
            whole = replace(request, messages=checked(messages))
            return await self._open(whole, model, service, api_key_id, deadline)

        return self._stream(start, request)

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
        request = self._request({"tools": list(tools)}, messages=checked(messages))
        adapter = await self._adapter(model, service, api_key_id)
        prepared = self._prepared(request, adapter)

        async def attempt() -> TokenCount:
            return await counting.count(adapter, await prepared())

        return await self._retried(adapter, attempt, Deadline())

    def capabilities(self, model: str, *, service: Any = None) -> Capabilities:
        """Say what a model takes and costs, by LiteLLM's table.

        Imports LiteLLM if nothing has yet, which takes seconds: `await initialize()`
        does that off the event loop.

        Raises:
            InvalidRequestError: The model cannot be placed.
        """
        provider, name = _placed(model, service)
        return capabilities_of(
            provider.name, provider.litellm, name, priced=provider.format != "ollama"
        )

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
        adapter = await self._key_adapter(api_key_id, None)
        return await self._retried(adapter, lambda: listing.models(adapter), Deadline())

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
        adapter = await self._key_adapter(api_key_id, provider)
        try:
            await self._retried(
                adapter, lambda: listing.models(adapter, pages=1), Deadline()
            )
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

        What no row of `providers` claims is asked of LiteLLM, whose import takes
        seconds the first time, in a thread.
        """
        try:
            return (await self._place(model, None))[0].name
        except InvalidRequestError:
            return None

    def _reopen(self) -> None:
        if self._closed:
            # The old pool stays closed: a call that outlived `aclose` finds no way back.
            self._pool = adapters.new_pool(self.settings)
        self._closed = False

    # The steps of a call, in order.

    async def _compose(
        self, person_messages: Sequence[Any], person_id: Any, config: Any
    ) -> list[dict[str, Any]]:
        if getattr(config, "prompt_file", None):
            prompt = await asyncio.to_thread(self._prompts.get_system_prompt, config)
        else:
            prompt = self._prompts.get_system_prompt(config)
        # The role "system" is every adapter's to translate: only it knows the provider
        # for certain when the model string decides.
        return self._formatter.format_messages_for_llm(
            person_messages or (), person_id, prompt
        )

    def _request(
        self,
        options: Mapping[str, Any],
        *,
        messages: Sequence[Mapping[str, Any]] = (),
    ) -> ChatRequest:
        self._check_open()
        request = request_from_options(
            messages,
            options,
            default_timeout=self.settings.timeout,
            default_idle_timeout=self.settings.idle_timeout,
        )
        return replace(request, response_format=form_of(request.response_format))

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the service is closed; initialize() opens it again")

    async def _place(self, model: str, service: Any) -> tuple[Provider, str]:
        if providers.split(model, service)[0] is None:
            # It is asked now, and its import takes seconds.
            await load_litellm()
        return _placed(model, service)

    async def _adapter(
        self, model: str, service: Any, api_key_id: str | None
    ) -> BaseLLMAdapter:
        provider, name = await self._place(model, service)
        key = await find_key(self.api_key_service, api_key_id, provider)
        return self._create_adapter(
            provider,
            name,
            key.secret,
            key.base_url,
            settings=self.settings,
            pool=self._pool,
        )

    def _prepared(
        self, request: ChatRequest, adapter: BaseLLMAdapter
    ) -> Callable[[], Awaitable[ChatRequest]]:
        """Return what gives the request with its media loaded, once for all attempts."""
        loaded = [request] if _is_text(request) else []

        async def prepared() -> ChatRequest:
            if not loaded:
                # Its import takes the proxy's variables away for a while.
                await load_litellm()
                preparing = media.prepare(
                    request.messages,
                    adapter.provider,
                    base_dir=self._prompts.base_dir,
                    settings=self.settings,
                    allow_outside_base_dir=self._prompts.allow_outside_base_dir,
                )
                messages = await self._loaded(asyncio.create_task(preparing))
                loaded.append(replace(request, messages=messages))
            return loaded[0]

        return prepared

    async def _loaded(self, task: asyncio.Task[_T]) -> _T:
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
        """End what loads media when the grace is over."""
        here = asyncio.get_running_loop()
        ours = [task for task in self._loading if task.get_loop() is here]
        if ours:
            await asyncio.wait(ours, timeout=grace)
        for task in list(self._loading):
            self._ended.add(task)
            task.get_loop().call_soon_threadsafe(task.cancel)
        if ours:
            await asyncio.wait(ours)

    def _stream(self, start: Start, request: ChatRequest) -> ChatStream:
        return ChatStream(
            start,
            lambda result, deadline: _finished(request, result, deadline),
            deadline=request.deadline,
        )

    async def _answer(
        self,
        request: ChatRequest,
        model: str,
        service: Any,
        api_key_id: str | None,
        deadline: Deadline,
    ) -> ChatResult:
        """Place the model, find the key, load the media, and try until it answers."""
        adapter = await self._adapter(model, service, api_key_id)
        prepared = self._prepared(request, adapter)

        async def attempt() -> ChatResult:
            return await adapter.complete(await prepared())

        return await self._retried(adapter, attempt, deadline)

    async def _open(
        self,
        request: ChatRequest,
        model: str,
        service: Any,
        api_key_id: str | None,
        deadline: Deadline,
    ) -> Opened:
        """Do the same for a stream, until its first chunk is there."""
        adapter = await self._adapter(model, service, api_key_id)
        prepared = self._prepared(request, adapter)

        async def attempt() -> Opened:
            items = adapter.stream(await prepared())
            try:
                return Opened(items, await anext(items))
            except BaseException:
                await items.aclose()
                raise

        return await self._retried(adapter, attempt, deadline)

    async def _key_adapter(
        self, api_key_id: str, provider: str | None
    ) -> BaseLLMAdapter:
        self._check_open()
        row = providers.by_name(provider) if provider else providers.of_key(api_key_id)
        key = await find_key(self.api_key_service, api_key_id, row)
        if key.service and not provider:
            row = providers.by_name(key.service)
        if row is None:
            raise InvalidRequestError(
                f"whose key {api_key_id!r} is cannot be told: give its record a service"
            )
        return self._create_adapter(
            row, "", key.secret, key.base_url, settings=self.settings, pool=self._pool
        )

    async def _retried(
        self,
        adapter: BaseLLMAdapter,
        attempt: Callable[[], Awaitable[_T]],
        deadline: Deadline,
    ) -> _T:
        """Make attempts until one succeeds or no other is worth it.

        N retries are N + 1 attempts, and an attempt is at most one request. The deadline
        counts them; an error carries their number in `attempts`.
        """
        settings = self.settings
        deadline.service, deadline.model = adapter.provider.name, adapter.model_name
        decision = RetryDecision(settings, deadline.left)

        def is_last(exc: DiPeOLLMError) -> bool:
            deadline.last = exc
            made = deadline.attempts
            if isinstance(exc, LLMServiceError | APIKeyError):
                unsent = isinstance(exc, InvalidRequestError) and not exc.status_code
                exc.attempts = made - unsent
            return made > settings.max_retries or decision(exc) is False

        # The first attempt is made outside stamina's loop, which costs more than all
        # else here; a failure is then told to it as its first. The last failure is not
        # told to it: it would keep it, and with it the conversation, in a cycle.
        deadline.attempts = 1
        try:
            return await attempt()
        except DiPeOLLMError as exc:
            if is_last(exc):
                raise
        import stamina

        async for step in stamina.retry_context(
            on=decision,
            attempts=settings.max_retries + 1,
            timeout=None,
            wait_initial=settings.retry_wait,
            wait_max=settings.retry_wait_max,
            wait_jitter=settings.retry_wait,
        ):
            with step:
                if step.num == 1:
                    raise cast("DiPeOLLMError", deadline.last)
                deadline.attempts += 1
                try:
                    return await attempt()
                except DiPeOLLMError as exc:
                    if is_last(exc):
                        break
                    raise
        del step
        try:
            raise cast("DiPeOLLMError", deadline.last)
        finally:
            deadline.last = None


def _placed(model: str, service: Any) -> tuple[Provider, str]:
    """Find the provider of a model string, and the model's name without a prefix."""
    provider, name = providers.split(model, service)
    if provider is None:
        inferred = infer_provider(name)
        provider = providers.by_name(inferred) if inferred else providers.local(name)
        if provider is None:
            raise providers.unknown_model(model)
        name = name.removeprefix(f"{provider.litellm}/")
    return provider, name


def _is_text(request: ChatRequest) -> bool:
    return all(isinstance(m.get("content"), str | None) for m in request.messages)


def _finished(
    request: ChatRequest, result: ChatResult, deadline: Deadline
) -> ChatResult:
    """Complete a result with what the call knows, and with what was asked of it.

    A turn that calls tools is not the answer yet, and has no form.
    """
    result.attempts = deadline.attempts
    form = request.response_format
    if form is None or not form.is_json:
        return result
    if result.parsed is None and not result.tool_calls:
        try:
            result.parsed = parse(form, result)
        except StructuredOutputError as exc:
            exc.model, exc.attempts = deadline.model, deadline.attempts
            raise
    return result


def _service(options: dict[str, Any], given: Any = None) -> Any:
    """Take the service, under any of its names, out of a call's keywords.

    Raises:
        TypeError: Two of its names were given, and they differ.
    """
    named = {name: options.pop(name, None) for name in _SERVICE_NAMES}
    named["service"] = named["service"] or given
    found = {str(getattr(v, "value", v)): v for v in named.values() if v is not None}
    if len(found) > 1:
        raise TypeError(f"two services for one call: {' and '.join(found)}")
    return next(iter(found.values()), None)


_SERVICE_NAMES = ("service", "provider", "service_name")
