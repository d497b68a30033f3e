"""One attempt at a request, for one model of one provider with one key.

`BaseLLMAdapter` makes the exchange that all formats share: prepare, translate, send,
read. A subclass declares what is particular to its provider. Knows nothing of persons,
prompts or retries.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from pydantic import SecretStr
from pydantic_core import PydanticSerializationError, to_json

from dipeo_llm import client as http
from dipeo_llm import litellm_import, litellm_tables
from dipeo_llm.adapters import failures
from dipeo_llm.adapters.attempt import Attempt, CompletionAttempt
from dipeo_llm.adapters.events import MalformedStreamError, StreamReader
from dipeo_llm.adapters.provider import ModelList, Page, Probe, Provider, TokenCounter
from dipeo_llm.adapters.reading import JSON, Reading
from dipeo_llm.adapters.request import (
    COMMON_FIELDS,
    Message,
    PreparedRequest,
    complete_tool_turns,
    copy_json,
    copy_messages,
    drop_cache_control,
    keep_fields,
    rename_tools,
)
from dipeo_llm.adapters.tools import read_choice, sort_tools
from dipeo_llm.adapters.translation import Outgoing, check_translation
from dipeo_llm.adapters.usage import rate_limits, token_usage
from dipeo_llm.client import Client, Endpoint, fits_a_header
from dipeo_llm.domain import (
    ChatRequest,
    ChatResult,
    StreamChunk,
    TokenCount,
    TokenUsage,
    ToolConfig,
)
from dipeo_llm.errors import (
    APIKeyError,
    APIKeyNotFoundError,
    CallError,
    ContentFilterError,
    InvalidRequestError,
    LLMServiceError,
    LLMTimeoutError,
    ServiceUnavailableError,
)
from dipeo_llm.message_formatter import check_messages
from dipeo_llm.pool import Lease, Pool
from dipeo_llm.settings import Settings, http_url
from dipeo_llm.streaming import Items
from dipeo_llm.structured import form_of

_log = logging.getLogger("dipeo_llm")

# Seconds that a server gets to close a stream after its terminator.
_AFTER_THE_END = 0.5
_MOST_PAGES = 100
_LONGEST_WORD = 256


class Target(NamedTuple):
    """A request, and the adapter that it is for."""

    adapter: "BaseLLMAdapter"
    request: ChatRequest
    deployment: str | None = None
    """The deployment of a route that the adapter talks to; None without a route."""


class BaseLLMAdapter:
    """Talks to one model of one provider with one key.

    Args:
        provider: The provider: its row, or its name as a string or a `LLMService`.
        model_name: The model, without a prefix.
        api_key: The key; wrapped at once. Empty where the provider needs none.
        base_url: The provider's address; None asks the settings, then the row.
        settings: How calls are made; None takes the defaults.
        pool: Where open clients are shared; None makes a pool of the adapter's own,
            which `aclose` closes.

    Raises:
        APIKeyNotFoundError: The provider needs a key.
        APIKeyError: The key holds a character that no header can carry.
        InvalidRequestError: The model's name or the base URL cannot be used.
    """

    # What an adapter declares about its format.

    rows: ClassVar[tuple[Provider, ...]] = ()
    """The providers that speak the format, the one it belongs to first."""
    probe: ClassVar[Probe | None] = None
    """Checks the translation; None where the format has none here."""
    model_list: ClassVar[ModelList | None] = None
    token_counter: ClassVar[TokenCounter | None] = None
    question_headers: ClassVar[Mapping[str, str]] = {}
    """Headers of a question besides completions."""
    tool_name: ClassVar[re.Pattern[str]] = re.compile(r"[a-zA-Z0-9_-]{1,64}")
    """Matches a name that the provider takes for a tool."""
    longest_tool_name: ClassVar[int] = 64
    """Most characters of such a name."""
    headers: ClassVar[frozenset[str] | None] = http.STANDARD_HEADERS
    """Headers that may leave beside the key; None forwards what LiteLLM sets."""

    def __init__(
        self,
        provider: Provider | str,
        model_name: str,
        api_key: str | SecretStr | None,
        base_url: str | None = None,
        *,
        settings: Settings | None = None,
        pool: "Pool[Client] | None" = None,
    ) -> None:
        self.provider = (
            provider if isinstance(provider, Provider) else _find_row(provider)
        )
        self.model_name = model_name
        self.settings = settings or Settings()
        self.check_model()
        url = self._find_base_url(base_url)
        api_key = self._check_key(api_key, url)
        self.endpoint = Endpoint(
            service=self.provider.name,
            base_url=url,
            secret=api_key,
            key_header=self._find_key_header(api_key),
            allowed_headers=self._allow_headers(),
        )
        self._pool = pool if pool is not None else new_pool(self.settings)
        self._owns_pool = pool is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.provider.name!r}, {self.model_name!r})"

    # One attempt, from the caller's request to the result.

    async def complete(
        self, request: ChatRequest | Sequence[Mapping[str, Any]]
    ) -> ChatResult:
        """Make one attempt at a request.

        Args:
            request: Checked, with nothing left to look up; or OpenAI-shaped messages,
                without any option.

        Raises:
            APIKeyError, LLMServiceError: As `errors` describes them.

        Cancelling it closes the connection of the request.
        """
        attempt = await self._begin(request, is_stream=False)
        async with _Permit(self, attempt) as client:
            with self._map_errors(attempt):
                async with asyncio.timeout_at(attempt.due):
                    return await attempt.adapter.exchange(attempt, client)

    async def stream(self, request: ChatRequest | Sequence[Mapping[str, Any]]) -> Items:
        """Make one attempt at a stream.

        Args:
            request: As for `complete`.

        Yields:
            Chunks as they arrive, and as the last item the whole result. The first one
            has `request.timeout` seconds, each later one `request.idle_timeout`.

        Raises:
            APIKeyError, LLMServiceError: Also between two chunks.

        Closing the generator, or cancelling its reader, closes the connection.
        """
        attempt = await self._begin(request, is_stream=True)
        idle = attempt.request.idle_timeout or attempt.request.timeout
        async with _Permit(self, attempt) as client:
            items = attempt.adapter.receive(attempt, client)
            try:
                with self._map_errors(attempt):
                    async for item in items:
                        yield item
                        attempt.allow(idle, "sent nothing for")
            finally:
                await items.aclose()

    def request(self, asked: ChatRequest | Sequence[Mapping[str, Any]]) -> ChatRequest:
        """Return a request as it is, and messages as a request without options.

        Raises:
            InvalidRequestError: The messages cannot be answered.
        """
        if isinstance(asked, ChatRequest):
            return asked
        return ChatRequest(check_messages(asked), timeout=self.settings.timeout)

    async def _begin(
        self, request: ChatRequest | Sequence[Mapping[str, Any]], *, is_stream: bool
    ) -> CompletionAttempt:
        """Prepare an attempt: load LiteLLM, prepare the request, select the endpoint."""
        litellm = await litellm_import.load_litellm()
        request = self.request(request)
        prepared = self._prepare(request)
        return CompletionAttempt(
            adapter=self._select(litellm, prepared),
            request=request,
            prepared=prepared,
            litellm=litellm,
            is_stream=is_stream,
            extra_body=request.extra_body,
        )

    def _select(self, litellm: Any, prepared: PreparedRequest) -> "BaseLLMAdapter":
        """Return the adapter that makes the exchange: this one or one beside it."""
        if (other := self.other_endpoint(litellm, prepared)) is not None:
            return other
        engine = self.settings.engine
        is_direct = engine == "direct" or (
            engine == "auto" and check_translation(litellm, type(self))
        )
        if self.probe is None or is_direct:
            return self
        return self.sibling("litellm")

    async def exchange(self, attempt: CompletionAttempt, client: Client) -> ChatResult:
        """Send a request and read the whole answer."""
        await self._send(attempt, client)
        body = self._check_answer(attempt)
        self._log_left_out(attempt)
        return self._make_result(attempt, body)

    async def receive(self, attempt: CompletionAttempt, client: Client) -> Items:
        """Send a request and read the answer as a stream."""
        reader = self.open_reader(attempt)
        names = attempt.prepared.tool_names
        async with asyncio.timeout_at(attempt.due):
            await self._send(attempt, client)
        pieces = client.pieces(attempt, keep=False)
        try:
            while (piece := await _next_piece(attempt, reader, pieces)) is not None:
                for chunk in reader.feed(piece):
                    yield rename_tool(chunk, names) if names else chunk
            for chunk in reader.close():
                yield rename_tool(chunk, names) if names else chunk
        finally:
            await pieces.aclose()
            attempt.response.close()
        body = self._check_stream(attempt, reader)
        self._log_left_out(attempt)
        yield self._make_result(attempt, body)

    def open_reader(self, attempt: CompletionAttempt) -> StreamReader:
        """Make the reader of an attempt, and let the call watch its usage."""
        reader = self.stream_reader()
        self._tell_usage(attempt, lambda: reader.usage)
        return reader

    def _tell_usage(
        self, attempt: CompletionAttempt, record: Callable[[], Any]
    ) -> None:
        """Let the call find what the provider tells of an answer that ends early."""
        if attempt.request.watch_usage is not None:
            attempt.request.watch_usage(lambda: _usage_so_far(record))

    async def _send(self, attempt: CompletionAttempt, client: Client) -> None:
        """Send the request; read the body unless a stream has begun with 200."""
        outgoing = self._translate(attempt)
        await client.send(
            "POST",
            f"{self.endpoint.base_url}{outgoing.path}",
            outgoing.headers,
            to_json(outgoing.body),
            attempt,
        )
        if not (attempt.is_stream and attempt.status == 200):
            await client.read(attempt)
        if attempt.status != 200:
            raise self._refusal(attempt)

    def _translate(self, attempt: CompletionAttempt) -> Outgoing:
        try:
            return self.translate(
                attempt.litellm, attempt.prepared, stream=attempt.is_stream
            )
        except CallError:
            raise
        except Exception as exc:
            raise self._untranslatable(exc) from exc

    # The preparation of a request, before LiteLLM translates it.

    def _prepare(self, request: ChatRequest) -> PreparedRequest:
        """Prepare a request; an error says whose it was."""
        try:
            return self.prepare(request)
        except CallError as exc:
            exc.service = exc.service or self.provider.name
            exc.model = exc.model or self.model_name
            raise

    def prepare(self, request: ChatRequest) -> PreparedRequest:
        """Prepare a request. The result shares no list or dict with it.

        Raises:
            InvalidRequestError: The provider cannot do what is asked.
        """
        messages = complete_tool_turns(copy_messages(request.messages))
        prepared = PreparedRequest(
            self.prepare_messages(messages), dict(request.sampling)
        )
        options = prepared.options
        tools = sort_tools(request.tools)
        all_tools = copy_json(tools.functions)
        for tool in tools.provided:
            all_tools += self.own_tool(tool, options)
        if all_tools:
            options["tools"] = all_tools
            if request.tool_choice is not None:
                options["tool_choice"] = read_choice(request.tool_choice)
        form = form_of(request.response_format)
        if form is not None:
            options["response_format"] = copy_json(form.response_format)
        self._limit_tokens(options)
        self._check_options(options)
        rename_tools(prepared, self.tool_name, self.longest_tool_name)
        self.adjust_options(prepared)
        return prepared

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the provider refuses, whatever the model."""
        row, stop = self.provider, options.get("stop")
        most, highest = row.most_stops, row.highest_temperature
        if "" in ([stop] if isinstance(stop, str) else stop or ()):
            raise self.invalid("`stop` has an empty text")
        if most and isinstance(stop, list) and len(stop) > most:
            raise self.invalid(
                f"`stop` has {len(stop)} texts; {row.name} takes at most {most}"
            )
        if highest is not None and options.get("temperature", 0) > highest:
            raise self.invalid(
                f"temperature={options['temperature']} is too high; {row.name} takes at"
                f" most {highest:g}"
            )
        if isinstance(choice := options.get("tool_choice"), dict):
            function = choice["function"]
            functions = (tool.get("function") or {} for tool in options["tools"])
            if function["name"] not in {each.get("name") for each in functions}:
                raise self.invalid(
                    f"tool_choice names {function['name']!r}, which is not a tool"
                )

    def invalid(self, what: str) -> InvalidRequestError:
        """Make the error for a request that is refused before it is sent."""
        return InvalidRequestError(what, **self._fields())

    def output_limit(self) -> int | None:
        """Return the most tokens of an answer by LiteLLM's table, None if unknown."""
        info = litellm_tables.known_model_info(
            self.provider.litellm, self.model_name, self.provider.name
        )
        limit = info.get("max_output_tokens")
        return limit if isinstance(limit, int) and limit > 0 else None

    def _limit_tokens(self, options: dict[str, Any]) -> None:
        """Lower `max_tokens` to the model's limit, and log it once; drop fractions of 0.

        DiPeO asks for 256,000 tokens of any model.
        """
        for name in ("max_tokens", "n", "seed"):
            if isinstance(value := options.get(name), float) and value.is_integer():
                options[name] = int(value)
        asked = options.get("max_tokens")
        if asked is None:
            return
        limit = self.output_limit()
        if limit is not None and limit < asked:
            options["max_tokens"] = limit
            key = (self.provider.name, self.model_name, "max_tokens over the limit")
            if key not in _seen_options:
                _seen_options.add(key)
                _log.info(
                    "%s/%s writes at most %d tokens: max_tokens=%s was lowered",
                    self.provider.name,
                    self.model_name,
                    limit,
                    asked,
                )

    def prepare_messages(self, messages: list[Message]) -> list[Message]:
        """Return copied messages in the shape that the provider takes."""
        prepared = keep_fields(messages, COMMON_FIELDS | {"reasoning_content"})
        drop_cache_control(prepared)
        return prepared

    def own_tool(self, tool: ToolConfig, options: dict[str, Any]) -> list[JSON]:
        """Return one of the provider's own tools in its words; may set options.

        Raises:
            InvalidRequestError: The provider, or this model of it, has no such tool.
        """
        raise InvalidRequestError(
            f"{self.provider.name}'s {self.model_name} has no tool"
            f" {tool.type.value!r} of its own",
            **self._fields(),
        )

    def adjust_options(self, prepared: PreparedRequest) -> None:
        """Change options, in place, that the model refuses and LiteLLM would send."""

    def teach(self, litellm: Any) -> None:
        """Tell LiteLLM what its table leaves out about the model."""

    def other_endpoint(
        self, litellm: Any, prepared: PreparedRequest
    ) -> "BaseLLMAdapter | None":
        """Return the adapter of the endpoint that must serve a request, if not this."""
        return None

    # The translation and the reading: a format overrides them.

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Translate a prepared request with LiteLLM's functions, which may change it.

        Raises:
            Exception: As LiteLLM raises for a request that it cannot translate.
        """
        raise NotImplementedError

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether the JSON of a 200 holds an answer in this format."""
        raise NotImplementedError

    def blocked_prompt(self, body: Mapping[str, Any]) -> str | None:
        """Return the reason why the provider refused the prompt, None if it did not."""
        return None

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read the JSON of a whole answer."""
        raise NotImplementedError

    def stream_reader(self) -> StreamReader:
        """Return a reader for one stream."""
        raise NotImplementedError

    # The answer.

    def _check_answer(self, attempt: CompletionAttempt) -> JSON:
        """Return the JSON of a 200.

        Raises:
            LLMServiceError: It does not hold an answer.
        """
        content_type = attempt.headers.get("content-type", "")
        data, reason = failures.answer_in(
            content_type, bytes(attempt.body), self.has_answer
        )
        if data.get("error"):
            raise self._refusal(attempt)
        self._check_prompt(attempt, data)
        if reason is not None:
            raise ServiceUnavailableError(
                f"{self.provider.name} answered {attempt.status}, but"
                f" {self._clean(reason)}",
                **self._answer_fields(attempt),
            )
        return data

    def _check_stream(self, attempt: CompletionAttempt, reader: StreamReader) -> JSON:
        """Return the JSON of a whole stream.

        Raises:
            LLMServiceError: The stream holds an error, or lacks its terminator.
        """
        if reader.error is not None:
            attempt.body = bytearray(reader.error)
            raise self._refusal(attempt)
        if not reader.is_ended:
            how = "ended without its terminator" if reader.events else "was empty"
            raise ServiceUnavailableError(
                f"{self.provider.name}: the stream {how}",
                **self._answer_fields(attempt),
            )
        with self._map_unreadable(attempt):
            body = reader.body()
        self._check_prompt(attempt, body)
        return body

    def _check_prompt(self, attempt: CompletionAttempt, body: JSON) -> None:
        if reason := self.blocked_prompt(body):
            self._tell_usage(attempt, lambda: self.read(body).usage)
            raise ContentFilterError(
                f"{self.provider.name} refused the prompt: {self._clean(reason)}",
                **self._answer_fields(attempt),
            )

    def _make_result(self, attempt: CompletionAttempt, body: JSON) -> ChatResult:
        with self._map_unreadable(attempt):
            reading = self.read(body)
            if reading.tool_calls and reading.finish in {"stop", None}:
                reading.finish = "tool_calls"
            names = attempt.prepared.tool_names
            for call in reading.tool_calls:
                call.name = names.get(call.name, call.name)
            usage = token_usage(reading.usage)
            return ChatResult(
                text=reading.text,
                texts=reading.texts,
                token_usage=usage,
                raw_response=body,
                tool_outputs=reading.tool_outputs,
                tool_calls=reading.tool_calls,
                finish_reason=self._clean_word(reading.finish),
                model=self._clean_word(reading.model) or self.model_name,
                service=self.provider.name,
                cost_usd=self._cost(attempt.litellm, usage, reading.usage),
                request_id=self._clean_word(
                    failures.request_id(attempt.headers) or reading.id
                ),
                attempts=max(attempt.requests, 1),
                queued=attempt.queued,
                reasoning=reading.reasoning,
                rate_limits=rate_limits(attempt.headers),
                refusal=reading.refusal,
                thinking_blocks=reading.thinking_blocks,
                content_blocks=reading.content_blocks,
            )

    def _cost(
        self, litellm: Any, usage: TokenUsage | None, raw_usage: Any
    ) -> float | None:
        """Return the price in USD by LiteLLM's table; None where it has no price."""
        if not self.provider.has_prices:
            return None
        return litellm_tables.cost(
            litellm, self.provider.litellm, self.model_name, usage, raw_usage
        )

    # The errors.

    @contextmanager
    def _map_errors(self, attempt: Attempt) -> Iterator[None]:
        """Raise the error of ours for a failure, by what the wire showed."""
        try:
            yield
        except CallError as exc:
            exc.service = exc.service or self.provider.name
            exc.model = exc.model or self.model_name
            raise
        except PydanticSerializationError as exc:
            # Such as half of an emoji, where a text was cut.
            raise InvalidRequestError(
                f"the request is not JSON, nothing was sent: {self._clean(str(exc))}",
                **self._fields(),
            ) from None
        except MalformedStreamError as exc:
            attempt.body = bytearray(str(exc).encode())
            raise ServiceUnavailableError(
                f"{self.provider.name} sent an invalid event: {self._clean(str(exc))}",
                **self._answer_fields(attempt),
            ) from None
        except Exception as exc:  # noqa: BLE001 - mapped
            cause = _safe_cause(exc, attempt)
            # aiohttp's reader keeps the exception, and its traceback this attempt with
            # the conversation; clear it to break the cycle.
            exc.__traceback__ = None
            raise self._from_network(exc, attempt) from cause

    @contextmanager
    def _map_unreadable(self, attempt: Attempt) -> Iterator[None]:
        """Raise a ServiceUnavailableError for JSON of an unknown shape."""
        try:
            yield
        except _UNREADABLE as exc:
            raise ServiceUnavailableError(
                f"{self.provider.name} answered {attempt.status}, but in a form that"
                f" cannot be read: {self._clean(repr(exc))}",
                **self._answer_fields(attempt),
            ) from None

    def _untranslatable(self, exc: Exception) -> LLMServiceError:
        """Make the error for a request that LiteLLM could not translate."""
        text = self._clean(str(exc))
        status = getattr(exc, "status_code", None)
        if status in {400, 404, 422} or "surrogates not allowed" in text:
            return InvalidRequestError(
                f"the request cannot be made, nothing was sent: {text}",
                **self._fields(),
            )
        return LLMServiceError(
            f"LiteLLM failed at the request, nothing was sent: {text}", **self._fields()
        )

    def _refusal(self, attempt: Attempt) -> CallError:
        return failures.from_answer(
            attempt.status or 0,
            attempt.headers,
            bytes(attempt.body),
            secret=self.endpoint.secret.get_secret_value(),
            **self._fields(),
        )

    def _from_network(self, exc: Exception, attempt: Attempt) -> Exception:
        """Make the error for a failure below HTTP, or for an answer that is late."""
        if isinstance(exc, TimeoutError) and attempt.is_late:
            return LLMTimeoutError(
                f"{self.provider.name} {attempt.timeout_message}",
                **self._answer_fields(attempt),
            )
        return http.from_transport(
            exc,
            secret=self.endpoint.secret.get_secret_value(),
            **self._answer_fields(attempt),
        )

    def _clean(self, text: str) -> str:
        """Redact the key in somebody else's words, and drop what is not printable."""
        return failures.clean(text, self.endpoint.secret.get_secret_value())

    def _clean_word(self, text: str | None) -> str | None:
        """Do as `_clean` for a word that metrics and logs repeat for each call."""
        secret = self.endpoint.secret.get_secret_value()
        # The check is fast; `_clean` takes 20 µs.
        if text and not (text.isprintable() and (not secret or secret not in text)):
            text = self._clean(text)
        return text[:_LONGEST_WORD] if text else None

    def _fields(self) -> dict[str, Any]:
        return {"service": self.provider.name, "model": self.model_name or None}

    def _answer_fields(self, attempt: Attempt) -> dict[str, Any]:
        """Return the fields of an error once there is an answer."""
        request_id = failures.request_id(attempt.headers)
        return self._fields() | {
            "status_code": attempt.status,
            "request_id": self._clean(request_id) if request_id else None,
        }

    # The options that were left out.

    def _log_left_out(self, attempt: CompletionAttempt) -> None:
        """Log, once per model and option, an option that was asked for and not sent."""
        request = attempt.request
        names = [*request.sampling]
        form = form_of(request.response_format)
        if request.tools and request.tool_choice not in (None, "auto", "none"):
            names.append("tool_choice")
        if form and form.response_format == {"type": "json_object"}:
            names.append("response_format")
        model = (self.provider.name, self.model_name)
        new = [name for name in names if (*model, name) not in _seen_options]
        for name in new:
            _seen_options.add((*model, name))
            if not self.sends(attempt, name):
                _log.info("%s/%s does not take %s: it was left out", *model, name)

    def sends(self, attempt: CompletionAttempt, option: str) -> bool:
        """Say whether an option changes the request, by translating it without."""
        request = attempt.request
        without = replace(
            request,
            sampling={k: v for k, v in request.sampling.items() if k != option},
            tool_choice=None if option == "tool_choice" else request.tool_choice,
            response_format=(
                None if option == "response_format" else request.response_format
            ),
        )
        bodies = [
            self.translate(
                attempt.litellm, self.preparer.prepare(each), stream=attempt.is_stream
            ).body
            for each in (request, without)
        ]
        return bodies[0] != bodies[1]

    # Questions besides completions.

    async def list_models(self, pages: int = _MOST_PAGES) -> list[str]:
        """Return the names of the provider's models, sorted, without "models/".

        LiteLLM's own `get_valid_models` is synchronous, over a client of its own, and
        reads one page.

        Args:
            pages: How many pages to read at most.

        Raises:
            InvalidRequestError: The provider has no list that is known here.
            APIKeyError, LLMServiceError: As the provider answers.
        """
        listed = await self.find_model_list()
        if listed is None or self.endpoint.base_url is None:
            raise InvalidRequestError(
                f"{self.provider.name} has no list of models that is known here",
                service=self.provider.name,
            )
        found: set[str] = set()
        following: Mapping[str, Any] | None = {}
        for _ in range(pages):
            if following is None:
                break
            query = urlencode({**listed.query, **following})
            page = await self.ask(f"{listed.path}?{query}" if query else listed.path)
            found.update(self._read_names(listed, page))
            following = listed.next_page(page)
        return sorted(found)

    async def find_model_list(self) -> ModelList | None:
        """Return where the models are listed; None where no list is known here."""
        return self.model_list

    def _read_names(self, listed: ModelList, page: Page) -> list[str]:
        rows = page.get(listed.rows)
        if rows is None and listed.is_optional:
            return []
        names = [
            row.get(listed.name) if isinstance(row, Mapping) else None
            for row in (rows if isinstance(rows, list) else [None])
        ]
        if not all(isinstance(name, str) for name in names):
            raise ServiceUnavailableError(
                f"{self.provider.name} answered 200, but not with a list of models",
                status_code=200,
                service=self.provider.name,
            )
        return [str(name).removeprefix("models/") for name in names]

    async def count_tokens(self, request: ChatRequest) -> TokenCount:
        """Count the input tokens of a request, at the provider where it counts them.

        LiteLLM's tokenizer counts for the others, and for a server that speaks a
        provider's format without its counting endpoint.

        Raises:
            InvalidRequestError: The request cannot be translated or counted.
            APIKeyError, LLMServiceError: As the provider answers.
        """
        counter = self.counting_adapter()
        if counter is not None and self.endpoint.base_url is not None:
            tokens = await counter.ask_for_count(self._prepare(request))
            if isinstance(tokens, int):
                return TokenCount(tokens=tokens, source="provider")
        prepared = self._prepare(request)
        try:
            tokens = await litellm_tables.count_tokens(
                self.model_name, prepared.messages, prepared.options.get("tools")
            )
        except Exception as exc:
            raise self._uncountable(exc) from exc
        return TokenCount(tokens=tokens, source="tokenizer")

    def counting_adapter(self) -> "BaseLLMAdapter | None":
        """Return the adapter whose endpoint counts tokens; None where none does."""
        return self if self.token_counter is not None else None

    async def ask_for_count(self, prepared: PreparedRequest) -> Any:
        """Ask the provider for the number; None if it has no such endpoint."""
        counter = self.token_counter
        if counter is None:
            return None
        litellm = await litellm_import.load_litellm()
        try:
            outgoing = self.translate(litellm, prepared, stream=False)
        except Exception as exc:
            raise self._uncountable(exc) from exc
        body = {k: v for k, v in outgoing.body.items() if k in counter.takes}
        path = counter.path.format(model=quote(self.model_name, safe="/"))
        try:
            answer = await self.ask(path, self.count_body(body), outgoing.headers)
        except LLMServiceError as exc:
            # A server of the user's own: vLLM answers 405, LM Studio 200 and an error
            # (https://github.com/vllm-project/vllm/issues/49533, 2026-11-25).
            is_own = self.endpoint.base_url != self.provider.base_url
            if exc.status_code in {404, 405, 501} or (
                is_own and exc.status_code == 200
            ):
                return None
            raise
        return answer.get(counter.answer)

    def count_body(self, body: JSON) -> JSON:
        """Return the body of the question from the fields that the endpoint takes."""
        return body

    def _uncountable(self, exc: Exception) -> InvalidRequestError:
        return InvalidRequestError(
            f"the request cannot be counted, nothing was sent: {self._clean(str(exc))}",
            **self._fields(),
        )

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Mapping[str, Any]:
        """Ask the provider something besides a completion.

        Args:
            path: Below the base URL, with the query.
            body: JSON to post; None sends a GET.
            headers: Further headers that the format needs.

        Returns:
            The JSON object of the answer.

        Raises:
            APIKeyError, LLMServiceError: As the provider answers.
        """
        try:
            data = None if body is None else to_json(body)
        except ValueError as exc:
            raise InvalidRequestError(
                f"the request cannot be made, nothing was sent: {exc}", **self._fields()
            ) from None
        attempt = Attempt()
        attempt.allow(self.settings.timeout, "did not answer within")
        asked = {
            "accept": "application/json",
            **self.question_headers,
            **(headers or {}),
        }
        with self._map_errors(attempt):
            async with asyncio.timeout_at(attempt.due), await self.client() as client:
                method = "GET" if data is None else "POST"
                url = f"{self.endpoint.base_url}{path}"
                await client.send(method, url, asked, data, attempt)
                await client.read(attempt)
        return self._check_object(attempt)

    def _check_object(self, attempt: Attempt) -> Mapping[str, Any]:
        found, reason = failures.answer_in("", bytes(attempt.body))
        if attempt.status != 200 or found.get("error"):
            raise self._refusal(attempt)
        if reason is not None:
            raise ServiceUnavailableError(
                f"{self.provider.name} answered 200, but {self._clean(reason)}",
                **self._answer_fields(attempt),
            )
        return found

    # The client, the key and the address.

    async def client(self) -> Lease[Client]:
        """Lease the open client of this endpoint, opening it if need be."""
        try:
            return await self._pool.lease(self._pool_key(), self._open)
        except LLMServiceError as exc:
            exc.service, exc.model = self.provider.name, self.model_name
            raise

    async def aclose(self) -> None:
        """Close what this adapter opened for itself. May be called twice."""
        if self._owns_pool:
            await self._pool.aclose()

    def sibling(self, name: str) -> "BaseLLMAdapter":
        """Return another endpoint of the same provider, over the same client."""
        from dipeo_llm.adapters.factory import ENDPOINTS

        other = object.__new__(ENDPOINTS[name])
        other.__dict__ = {**self.__dict__, "_owns_pool": False, "_origin": self}
        return other

    @property
    def preparer(self) -> "BaseLLMAdapter":
        """The adapter that prepares the requests of this endpoint."""
        origin: BaseLLMAdapter = self.__dict__.get("_origin", self)
        return origin

    async def _open(self) -> Client:
        await litellm_import.environment_is_whole()
        tls = await http.tls_context(self.endpoint.base_url, self.settings)
        limit = self.settings.max_concurrency
        permits = None if limit is None else self._pool.permits(self._pool_key(), limit)
        return Client(self.endpoint, self.settings, tls, permits)

    def _pool_key(self) -> tuple[str, str | None, bytes]:
        # The digest is keyed, so that it cannot be compared with anything outside.
        secret = self.endpoint.secret.get_secret_value().encode()
        digest = blake2b(secret, digest_size=16, key=_PROCESS).digest()
        return self.provider.name, self.endpoint.base_url, digest

    def _check_key(
        self, api_key: str | SecretStr | None, base_url: str | None
    ) -> SecretStr:
        if not isinstance(api_key, SecretStr):
            api_key = SecretStr((api_key or "").strip())
        if (
            self.provider.needs_key
            and not api_key
            and not http.is_loopback(urlsplit(base_url or "").hostname or "")
        ):
            raise APIKeyNotFoundError(
                f"{self.provider.name} needs a key", **self._fields()
            )
        if not fits_a_header(api_key):
            raise APIKeyError(
                "the key holds a character that no header can carry", **self._fields()
            )
        return api_key

    def _allow_headers(self) -> frozenset[str] | None:
        extra = {name for name, _ in self.provider.extra_headers}
        return None if self.headers is None else self.headers | extra

    def _find_key_header(self, api_key: SecretStr) -> str:
        """Return the header of the key: a token, such as Azure's Entra, is a Bearer's."""
        is_token = _TOKEN.match(api_key.get_secret_value())
        return "authorization" if is_token else self.provider.key_header

    def check_model(self) -> None:
        """Refuse a model name that cannot be sent.

        Raises:
            InvalidRequestError: It holds characters that are not printable.
        """
        if not self.model_name.isprintable():
            raise self._invalid_model()

    def _invalid_model(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.model_name[:80]!r} is not the name of a model",
            service=self.provider.name,
        )

    def _find_base_url(self, given: str | None) -> str:
        row = self.provider
        url = given or row.find_base_url(self.settings.base_urls) or row.base_url
        if url is None:
            # LiteLLM would take it from the environment, and the key would go there.
            example = row.base_url_example
            raise InvalidRequestError(
                f"{row.name} needs a base_url{f' such as {example}' if example else ''},"
                " in the key's record or in Settings.base_urls",
                service=row.name,
            )
        try:
            return self.complete_base_url(_check_url(url))
        except ValueError as exc:
            raise InvalidRequestError(
                f"the base URL of {row.name} cannot be used: {exc}", service=row.name
            ) from None

    def complete_base_url(self, url: str) -> str:
        """Return a checked base URL with the provider's path, if it has none."""
        has_path = "/" in url.partition("://")[2]
        return url if has_path else f"{url}{self.provider.path}"

    # What the system document names.

    def common_parameters(self, request: ChatRequest) -> dict[str, Any]:
        """Return the options of a request under OpenAI's names, for this model."""
        return self.prepare(request).options

    def get_token_usage(self, usage: Any) -> TokenUsage | None:
        """Read a usage record of this provider; None if it holds no number."""
        return token_usage(usage)

    def supports_tools(self) -> bool | None:
        """Say whether the model takes function tools; None where LiteLLM cannot tell.

        Imports LiteLLM if nothing has yet, which takes seconds.
        """
        row = self.provider
        return litellm_tables.supports(
            row.litellm, row.name, self.model_name, "supports_function_calling"
        )


_UNREADABLE = (
    AttributeError,
    TypeError,
    LookupError,
    ValueError,
    ArithmeticError,
    RecursionError,
)
"""What reading JSON of an unknown shape may raise."""
_TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.")
"""A JSON Web Token (RFC 7519)."""
_check_url = lru_cache(maxsize=256)(http_url)
_PROCESS = os.urandom(16)
_seen_options: set[tuple[str, str, str]] = set()


def new_pool(settings: Settings) -> "Pool[Client]":
    """Make a pool for the clients of any number of adapters."""
    return Pool(ttl=settings.client_ttl, max_clients=settings.max_clients)


def _find_row(name: Any) -> Provider:
    from dipeo_llm.adapters.factory import by_name

    return by_name(name)


def _usage_so_far(record: Callable[[], Any]) -> TokenUsage | None:
    """Read a record of usage; return None if it cannot be read."""
    try:
        return token_usage(record())
    except _UNREADABLE:
        return None


class _Permit:
    """Leases an adapter's client for one attempt, and waits for a permit on it.

    First come, first served; a caller that is cancelled while it waits takes no permit.
    """

    def __init__(self, adapter: BaseLLMAdapter, attempt: CompletionAttempt) -> None:
        self._adapter = adapter
        self._attempt = attempt
        self._lease: Lease[Client]

    async def __aenter__(self) -> Client:
        self._lease = await self._adapter.client()
        client = self._lease.client
        if client.permits is not None:
            start = time.monotonic()
            try:
                await client.permits.acquire()
            except BaseException:
                await self._lease.release()
                raise
            self._attempt.queued = time.monotonic() - start
        self._attempt.allow(self._attempt.request.timeout, "did not answer within")
        return client

    async def __aexit__(self, kind: object, exc: object, trace: object) -> None:
        if self._lease.client.permits is not None:
            self._lease.client.permits.release()
        if self._attempt.queued and isinstance(exc, CallError):
            exc.details["queued"] = self._attempt.queued
        # The exception's traceback keeps this attempt alive; break the cycle.
        self._attempt.error = None
        await self._lease.release()


async def _next_piece(
    attempt: CompletionAttempt,
    reader: StreamReader,
    pieces: AsyncGenerator[bytes, None],
) -> bytes | None:
    """Return the next piece of a stream, None after its end.

    The end is the provider's error, the end of the body, or a moment after the
    terminator: some servers keep the connection open.

    Raises:
        TimeoutError: The next piece is late.
    """
    if reader.error is not None:
        return None
    if reader.is_ended:
        now = asyncio.get_running_loop().time()
        attempt.close_due = min(attempt.close_due, now + _AFTER_THE_END)
    # Only a wait for the network costs a timer; one piece holds many chunks.
    try:
        async with asyncio.timeout_at(min(attempt.due, attempt.close_due)):
            return await anext(pieces, None)
    except TimeoutError:
        if not reader.is_ended:
            raise
        return None


def rename_tool(chunk: StreamChunk, names: Mapping[str, str]) -> StreamChunk:
    """Give a tool call in a stream the caller's name of the tool."""
    if chunk.tool_call is not None and chunk.tool_call.name is not None:
        chunk.tool_call.name = names.get(chunk.tool_call.name, chunk.tool_call.name)
    return chunk


def _safe_cause(exc: Exception, attempt: Attempt) -> Exception | None:
    """Return what an error may be chained to.

    Other exceptions that were raised after a request had been sent may hold the peer's
    words, and with them an echoed key.
    """
    if not attempt.requests:
        return exc
    for cause in (exc, attempt.error):
        if isinstance(cause, OSError | TimeoutError):
            return cause
    return None
