"""A request in, a result out, for one model of one provider with one key.

Two engines stand behind one seam. The direct one asks LiteLLM to translate the request,
and sends it itself; the other makes the whole call through `litellm.acompletion`. Both
send through our own client and read what the wire really said. Knows nothing of
persons, prompts or retries.
"""

import asyncio
import json
import logging
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from pydantic import SecretStr
from pydantic_core import to_json

from dipeo_llm import client as wire
from dipeo_llm import litellm_tables
from dipeo_llm.adapters import events as answers
from dipeo_llm.adapters import failures, translation
from dipeo_llm.adapters.events import MalformedStreamError, Reading, StreamReader
from dipeo_llm.adapters.factory import Provider, by_name, check_reach
from dipeo_llm.adapters.failures import CallError
from dipeo_llm.adapters.request import Shape, shape
from dipeo_llm.adapters.usage import rate_limits, token_usage
from dipeo_llm.client import PLACEHOLDER, Client, Endpoint, Exchange
from dipeo_llm.domain import (
    ChatRequest,
    ChatResult,
    StreamChunk,
    TokenUsage,
    ToolOutput,
    ToolType,
)
from dipeo_llm.errors import (
    APIKeyError,
    APIKeyNotFoundError,
    ContentFilterError,
    InvalidRequestError,
    LLMServiceError,
    LLMTimeoutError,
    ServiceUnavailableError,
)
from dipeo_llm.keys import fits_a_header
from dipeo_llm.litellm_import import (
    environment_is_whole,
    load_litellm,
    without_reroutes,
)
from dipeo_llm.message_formatter import checked
from dipeo_llm.pool import Lease, Pool
from dipeo_llm.settings import Settings, http_url
from dipeo_llm.streaming import Items

_log = logging.getLogger("dipeo_llm")


# Seconds.
_AFTER_THE_END = 0.5


class BaseLLMAdapter(ABC):
    """Talks to one model of one provider with one key.

    Args:
        provider: The provider: its row, or its name as a string or a `LLMService`.
        model_name: The model, without a prefix.
        api_key: The key; wrapped at once. Empty where the provider needs none.
        base_url: Where the provider lives; None asks the settings, then the provider.
        settings: How calls are made; None takes the defaults.
        pool: Where open clients are shared; None makes a pool of this adapter's own,
            which `aclose` closes.
    """

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
        provider = provider if isinstance(provider, Provider) else by_name(provider)
        self.provider = provider
        self.model_name = model_name
        self.settings = settings or Settings()
        check_reach(provider)
        _check_model(provider, model_name)
        if not isinstance(api_key, SecretStr):
            api_key = SecretStr((api_key or "").strip())
        if provider.needs_key and not api_key:
            raise APIKeyNotFoundError(
                f"{provider.name} needs a key", service=provider.name, model=model_name
            )
        if not fits_a_header(api_key):
            raise APIKeyError(
                "the key holds a character that no header can carry",
                service=provider.name,
                model=model_name,
            )
        self.endpoint = Endpoint(
            provider, _base_url(provider, base_url, self.settings), api_key
        )
        self._pool = pool if pool is not None else new_pool(self.settings)
        self._owns_pool = pool is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.provider.name!r}, {self.model_name!r})"

    @abstractmethod
    async def complete(
        self, request: ChatRequest | Sequence[Mapping[str, Any]]
    ) -> ChatResult:
        """Make one attempt at a request.

        Args:
            request: Checked, with nothing left to look up; or OpenAI-shaped messages,
                without any option.

        Raises:
            APIKeyError, LLMServiceError: As `errors` describes them.

        Cancelling it closes the connection that the request went out on.
        """

    @abstractmethod
    def stream(self, request: ChatRequest | Sequence[Mapping[str, Any]]) -> Items:
        """Make one attempt at a stream.

        Args:
            request: As for `complete`.

        Yields:
            Chunks as they come, and as the last item the whole result. The first is
            waited for as long as `request.timeout`, each later one as long as
            `request.idle_timeout`.

        Raises:
            APIKeyError, LLMServiceError: Also in mid-stream; the caller knows how far
                it had come.

        Closing the generator, or cancelling its reader, closes the connection.
        """

    def request(self, asked: ChatRequest | Sequence[Mapping[str, Any]]) -> ChatRequest:
        """Return a request as it is, and messages as one without options.

        Raises:
            InvalidRequestError: They are no messages that could be answered.
        """
        if isinstance(asked, ChatRequest):
            return asked
        return ChatRequest(checked(asked), timeout=self.settings.timeout)

    async def client(self) -> Lease[Client]:
        """Lease the open client of this endpoint, opening it if need be."""
        try:
            return await self._pool.lease(_pool_key(self.endpoint), self._open)
        except LLMServiceError as exc:
            exc.service, exc.model = self.provider.name, self.model_name
            raise

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Mapping[str, Any]:
        """Ask the provider something besides a completion.

        Args:
            path: Below the base URL, with the query.
            body: JSON to post; None gets.
            headers: What the format needs.

        Returns:
            The JSON object that it answers.

        Raises:
            APIKeyError, LLMServiceError: As the provider answers.
        """
        exchange = Exchange()
        asked = {"accept": "application/json", **(headers or {})}
        if self.provider.format == "anthropic":
            asked["anthropic-version"] = "2023-06-01"
        try:
            data = None if body is None else to_json(body)
        except ValueError as exc:
            raise InvalidRequestError(
                f"the request cannot be made, nothing was sent: {exc}", **self._fields()
            ) from None
        method = "GET" if data is None else "POST"
        limit = asyncio.timeout(self.settings.timeout)
        try:
            async with limit, await self.client() as client:
                url = f"{self.endpoint.base_url}{path}"
                await client.read(
                    await client.send(method, url, asked, data, exchange=exchange),
                    exchange,
                )
        except Exception as exc:  # noqa: BLE001 - mapped
            error = self._from_transport(exc, exchange)
            if isinstance(exc, TimeoutError) and limit.expired():
                error = LLMTimeoutError(
                    f"{self.provider.name} did not answer within"
                    f" {self.settings.timeout:g} s",
                    **self._fields(),
                )
            raise error from _os_error(exc, exchange)
        found, refusal = self._asked(exchange)
        if refusal is not None:
            raise refusal  # here, where no local holds what came
        return found

    def _asked(self, exchange: Exchange) -> tuple[Mapping[str, Any], CallError | None]:
        """Return the JSON object of an answer, or what it is in place of one."""
        found, reason = failures.answer_in(None, "", bytes(exchange.body))
        if exchange.status != 200 or found.get("error"):
            return {}, self._refused(exchange)
        if reason is None:
            return found, None
        return {}, ServiceUnavailableError(
            f"{self.provider.name} answered 200, but {self._clean(reason)}",
            **self._seen_fields(exchange),
        )

    def _clean(self, text: str) -> str:
        """Take the key, and what is not printable, out of somebody else's words."""
        return failures.clean(text, self.endpoint.secret.get_secret_value())

    def _seen_fields(self, exchange: Exchange) -> dict[str, Any]:
        """Return what every error of an attempt says, once there is an answer."""
        return self._fields() | {
            "status_code": exchange.status,
            "request_id": self._clean(failures.request_id(exchange.headers) or "")
            or None,
        }

    def _refused(self, exchange: Exchange) -> CallError:
        return failures.from_answer(
            exchange.status or 0,
            exchange.headers,
            bytes(exchange.body),
            secret=self.endpoint.secret.get_secret_value(),
            **self._fields(),
        )

    def _from_transport(self, exc: Exception, exchange: Exchange) -> Exception:
        return wire.from_transport(
            exc,
            secret=self.endpoint.secret.get_secret_value(),
            **self._seen_fields(exchange),
        )

    def common_parameters(self, request: ChatRequest) -> dict[str, Any]:
        """Return the options of a request under OpenAI's names, for this model."""
        return dict(shape(self.provider, self.model_name, request).parameters)

    def get_token_usage(self, usage: Any) -> TokenUsage | None:
        """Read a usage record of this provider's; None for none."""
        return token_usage(usage)

    def supports_tools(self) -> bool | None:
        """Say whether the model takes function tools; None where LiteLLM cannot tell.

        Imports LiteLLM if nothing has yet, which takes seconds.
        """
        return litellm_tables.supports(
            self.provider.litellm,
            self.provider.name,
            self.model_name,
            "supports_function_calling",
        )

    async def aclose(self) -> None:
        """Close what this adapter opened for itself. May be called twice."""
        if self._owns_pool:
            await self._pool.aclose()

    async def _open(self) -> Client:
        await environment_is_whole()
        tls = await wire.tls_context(self.endpoint, self.settings)
        limit = self.settings.max_concurrency
        key = _pool_key(self.endpoint)
        turns = None if limit is None else self._pool.turns(key, limit)
        return Client(self.endpoint, self.settings, tls, turns)

    def _fields(self) -> dict[str, Any]:
        return {"service": self.provider.name, "model": self.model_name or None}


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
    return LiteLLMAdapter(
        provider, model_name, api_key, base_url, settings=settings, pool=pool
    )


def _check_model(provider: Provider, model: str) -> None:
    """Refuse a name that would be more than a name in a URL.

    Google's has it in the path, and of the providers that LiteLLM alone knows nobody
    knows where they have it.
    """
    in_a_url = provider.format in {"google", None}
    parts = r"[?#%\\\s]|(^|/)\.\.?(/|$)"
    if not model.isprintable() or (in_a_url and re.search(parts, model)):
        raise InvalidRequestError(
            f"{model[:80]!r} is not the name of a model", service=provider.name
        )


def _os_error(exc: Exception, exchange: Exchange) -> Exception | None:
    """Return what an error may be chained to: the system's words, or LiteLLM's refusal.

    Anything else that was raised once a request had gone out may hold what the peer
    said, with a key in it if the peer echoes one.
    """
    if not exchange.requests:
        return exc
    for cause in (exc, exchange.error):
        if isinstance(cause, OSError | TimeoutError):
            return cause
    return None


@dataclass(slots=True)
class _Call:
    """One attempt: what is asked, and what the wire has seen of it."""

    litellm: Any
    request: ChatRequest = field(repr=False)
    shape: Shape = field(repr=False)
    exchange: Exchange
    stream: bool
    queued: float = 0.0
    ends: float = math.inf
    """When the next piece of an answer must have come, on the event loop's clock."""
    late: str = ""
    """What to say if it has not."""
    told_whole: bool = False
    """Whether LiteLLM took a stream for whole, and closed it before we saw its end."""

    def allow(self, seconds: float, late: str) -> None:
        """Give the next piece this long, from now."""
        self.ends = asyncio.get_running_loop().time() + seconds
        self.late = f"{late} {seconds:g} s"

    @property
    def format(self) -> str | None:
        """Whose words the answer is in."""
        return self.shape.format


class _Turn:
    """The client of an adapter, and a turn on it, for one attempt.

    A turn is waited for first come first served; who is cancelled meanwhile takes none.
    """

    def __init__(self, adapter: BaseLLMAdapter, call: _Call) -> None:
        self._adapter = adapter
        self._call = call
        self._lease: Lease[Client]

    async def __aenter__(self) -> Client:
        self._lease = await self._adapter.client()
        client = self._lease.client
        if client.turns is not None:
            came = time.monotonic()
            try:
                await client.turns.acquire()
            except BaseException:
                await self._lease.release()
                raise
            self._call.queued = time.monotonic() - came
        return client

    async def __aexit__(self, kind: object, exc: object, trace: object) -> None:
        if self._lease.client.turns is not None:
            self._lease.client.turns.release()
        if self._call.queued and isinstance(exc, LLMServiceError | APIKeyError):
            exc.details["queued"] = self._call.queued
        # It knows the frames that it passed, and they know this call.
        self._call.exchange.error = None
        await self._lease.release()


class LiteLLMAdapter(BaseLLMAdapter):
    """Reaches a model with LiteLLM's translation, by either engine.

    `settings.engine` chooses: "direct", "litellm", or "auto", which is direct for a
    provider whose translation the installed LiteLLM has proved to have.
    """

    async def complete(
        self, request: ChatRequest | Sequence[Mapping[str, Any]]
    ) -> ChatResult:
        """Make one attempt at a request."""
        request = self.request(request)
        call = await self._call(request, stream=False)
        async with _Turn(self, call) as client:
            call.allow(request.timeout, "did not answer within")
            try:
                async with asyncio.timeout_at(call.ends):
                    if self._direct(call):
                        await self._send(call, client)
                        body = self._checked(call)
                    else:
                        body = await self._through_litellm(call, client)
            except TimeoutError as exc:
                raise self._failure(call, exc) from _os_error(exc, call.exchange)
        self._log_left_out(call)
        try:
            return self._result(call, body)
        finally:
            del body  # no frame of an error shows what came

    async def stream(self, request: ChatRequest | Sequence[Mapping[str, Any]]) -> Items:
        """Make one attempt at a stream."""
        request = self.request(request)
        call = await self._call(request, stream=True)
        reader = answers.STREAMS[call.format or "openai"]()
        pieces = self._direct_pieces if self._direct(call) else self._litellm_pieces
        idle = request.idle_timeout or request.timeout
        async with _Turn(self, call) as client:
            call.allow(request.timeout, "did not answer within")
            chunks = pieces(call, client, reader)
            try:
                async for chunk in chunks:
                    yield chunk
                    call.allow(idle, "sent nothing for")
            finally:
                await chunks.aclose()
        body, error = self._put_together(call, reader)
        if error is not None:
            raise error
        self._log_left_out(call)
        yield self._result(call, body)

    async def _call(self, request: ChatRequest, *, stream: bool) -> _Call:
        litellm = await load_litellm()
        info = (
            litellm_tables.model_info(
                litellm, self.provider.litellm, self.model_name, self.provider.name
            )
            or {}
        )
        shaped = shape(
            self.provider,
            self.model_name,
            request,
            responses=self.provider.name == "openai"
            and info.get("mode") == "responses",
        )
        exchange = Exchange(extra_body=request.extra_body)
        return _Call(litellm, request, shaped, exchange, stream)

    def _direct(self, call: _Call) -> bool:
        if call.format == "responses":
            return True  # only the direct engine has a client for it, see translation
        engine = self.settings.engine
        if engine == "litellm" or self.provider.format is None:
            return False
        return engine == "direct" or translation.self_check(
            call.litellm, self.provider.format
        )

    # The direct engine: LiteLLM translates, the wire is ours.

    async def _send(self, call: _Call, client: Client) -> None:
        """Send the request; read the body unless it is a stream that has begun well.

        The open answer is in the exchange alone, as its repr shows its headers.
        """
        outgoing = self._translated(call)
        exchange = call.exchange
        try:
            await client.send(
                "POST",
                f"{self.endpoint.base_url}{outgoing.path}",
                outgoing.headers,
                to_json(outgoing.body),
                exchange=exchange,
            )
            if not (call.stream and exchange.status == 200):
                await client.read(exchange.response, exchange)
        except Exception as exc:  # noqa: BLE001 - mapped
            raise self._failure(call, exc) from _os_error(exc, call.exchange)
        if exchange.status != 200:
            raise self._refused(exchange)

    def _translated(self, call: _Call) -> translation.Outgoing:
        try:
            return translation.translate(
                call.litellm,
                self.provider,
                self.model_name,
                call.shape,
                stream=call.stream,
            )
        except Exception as exc:  # noqa: BLE001 - mapped
            raise self._failure(call, exc) from _os_error(exc, call.exchange)

    async def _direct_pieces(
        self, call: _Call, client: Client, reader: StreamReader
    ) -> AsyncGenerator[StreamChunk, None]:
        try:
            async with asyncio.timeout_at(call.ends):
                await self._send(call, client)
        except TimeoutError as exc:
            raise self._failure(call, exc) from _os_error(exc, call.exchange)
        exchange = call.exchange
        pieces = client.pieces(exchange.response, exchange, keep=False)
        over = math.inf  # when what follows the end mark is waited for no longer
        try:
            while reader.error is None:
                if reader.ended:
                    now = asyncio.get_running_loop().time()
                    over = min(over, now + _AFTER_THE_END)
                # Only a wait for the network costs a timer; many chunks come in one
                # piece.
                try:
                    async with asyncio.timeout_at(min(call.ends, over)):
                        piece = await anext(pieces, None)
                except TimeoutError:
                    if not reader.ended:
                        raise
                    piece = None  # it has said all, and keeps the connection open
                if piece is None:
                    break
                try:
                    chunks = reader.feed(piece)
                finally:
                    del piece  # no frame of an error shows what came
                for chunk in chunks:
                    yield chunk
            for chunk in reader.close():
                yield chunk
        except Exception as exc:  # noqa: BLE001 - mapped
            # aiohttp's reader keeps it, and with it the frames that it passed: this call.
            exc.__traceback__ = None
            raise self._failure(call, exc) from _os_error(exc, exchange)
        finally:
            await pieces.aclose()
            exchange.response.close()

    # The other engine: the whole call is LiteLLM's, over our client.

    async def _through_litellm(self, call: _Call, client: Client) -> dict[str, Any]:
        arguments = self._arguments(call, client)
        response: Any = None
        failed: tuple[Exception, Exception | None] | None = None
        try:
            response = await self._begun(call, arguments)
        except Exception as exc:  # noqa: BLE001 - mapped
            if not self._has_answer(call):
                failed = self._failure(call, exc), _os_error(exc, call.exchange)
        if failed is not None:
            # Here, and not in the block above, which would hang LiteLLM's exception on
            # it: that one's frames hold what the provider echoed.
            raise failed[0] from failed[1]
        self._check_seen(call)
        if call.format is None:
            return dict(response.model_dump())
        return self._checked(call)

    def _has_answer(self, call: _Call) -> bool:
        """Say whether the bytes are an answer, whatever LiteLLM made of them."""
        exchange = call.exchange
        return (
            call.format is not None
            and exchange.status == 200
            and exchange.error is None
            and self._judged(call)[1] is None
        )

    def _check_seen(self, call: _Call) -> None:
        """Refuse an answer that did not come over our client."""
        if not call.exchange.requests:
            raise LLMServiceError(
                f"LiteLLM reaches {self.provider.name}'s {self.model_name} through a"
                " client of its own, which has no key",
                **self._fields(),
            )

    async def _litellm_pieces(  # noqa: C901, PLR0912 - one story, told in one place
        self, call: _Call, client: Client, reader: StreamReader
    ) -> AsyncGenerator[StreamChunk, None]:
        """Let LiteLLM read the stream, and read the same bytes under it.

        LiteLLM takes a stream without its end mark, or with a broken event in it, for a
        whole one, so its own chunks tell less than the bytes.
        """
        arguments = self._arguments(call, client)
        exchange = call.exchange
        chunks: list[StreamChunk] = []
        if call.format is not None:
            exchange.on_piece = lambda piece: chunks.extend(reader.feed(piece))
        response: Any = None
        failed: tuple[Exception, Exception | None] | None = None
        try:
            async with asyncio.timeout_at(call.ends):
                response = await self._begun(call, arguments)
            items = aiter(response)
            while True:
                async with asyncio.timeout_at(call.ends):
                    item = await self._seen(exchange, lambda: anext(items, None))
                if item is None:
                    break
                self._check_seen(call)
                if call.format is None:
                    chunks += reader.take(item.model_dump())
                while chunks:
                    yield chunks.pop(0)
            if call.format is None:
                reader.take_end()
            elif not (reader.ended or exchange.whole):
                async with asyncio.timeout_at(call.ends):
                    chunks += await self._rest(call, reader)
        except Exception as exc:  # noqa: BLE001 - judged below, by what the wire saw
            failed = self._failure(call, exc), _os_error(exc, call.exchange)
        finally:
            # LiteLLM does not close an Anthropic stream that is left early.
            if exchange.response is not None:
                exchange.response.close()
            if response is not None:
                await response.aclose()
        if exchange.status == 200 and exchange.whole and exchange.error is None:
            # The bytes are all there: whatever LiteLLM made of them, they tell.
            try:
                chunks += reader.close()
            except MalformedStreamError as exc:
                raise self._failure(call, exc) from None
        elif failed is not None and (
            isinstance(exchange.error, LLMServiceError)
            or (reader.error is None and not reader.ended)
        ):
            raise failed[0] from failed[1]
        for chunk in chunks:
            yield chunk

    @staticmethod
    async def _rest(call: _Call, reader: StreamReader) -> list[StreamChunk]:
        """Read on where LiteLLM stops: at the finish reason, before the end mark."""
        chunks: list[StreamChunk] = []
        exchange = call.exchange
        content = exchange.response.content
        if content.exception() is not None:
            # It has hung up by itself. Since 1.108 it does so at the end of Anthropic's,
            # and nowhere before; the OpenAI SDK does at [DONE], whatever came before it.
            call.told_whole = call.format == "anthropic"
            return chunks
        async for piece in content.iter_any():
            chunks += reader.feed(piece)
        exchange.whole = True
        return chunks

    async def _begun(self, call: _Call, arguments: dict[str, Any]) -> Any:
        """Begin LiteLLM's call in a task of its own.

        LiteLLM makes the coroutine of the call in a thread. Cancelled meanwhile, it
        would drop it there, never awaited; so it is let out, and stopped at the fence.
        """
        exchange = call.exchange
        task = asyncio.create_task(
            self._seen(exchange, lambda: call.litellm.acompletion(**arguments))
        )
        # Heard here, as a caller who is cancelled twice does not wait for it.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if exchange.requests:
                task.cancel()
            exchange.abandoned = True
            await asyncio.wait([task])
            raise
        try:
            return task.result()
        finally:
            del task  # its repr has LiteLLM's exception in it, and that the answer

    @staticmethod
    async def _seen(exchange: Exchange, step: Callable[[], Any]) -> Any:
        """Await a step of LiteLLM's with the exchange as the current one."""
        token = wire.current.set(exchange)
        try:
            return await step()
        finally:
            wire.current.reset(token)

    def _arguments(self, call: _Call, client: Client) -> dict[str, Any]:
        without_reroutes()
        litellm_tables.know_model(
            call.litellm,
            self.model_name,
            translation.untold(self.provider, self.model_name),
        )
        shaped = call.shape
        if self.provider.litellm == "openai":
            # LiteLLM turns "developer" into "system" for all but the o-series, and
            # "system" into "user" for some of those.
            call.exchange.extra_body = {
                "messages": shaped.messages,
                **call.request.extra_body,
            }
        arguments: dict[str, Any] = {
            "model": f"{self.provider.litellm}/{self.model_name}",
            "custom_llm_provider": self.provider.litellm,
            "messages": shaped.messages,
            **shaped.parameters,
            "client": _sdk_client(client),
            "api_key": PLACEHOLDER,
            "timeout": call.request.timeout,
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": True,
        }
        if self.endpoint.base_url is not None:
            arguments["api_base"] = self.endpoint.base_url
        if call.stream:
            arguments |= {"stream": True, "stream_options": {"include_usage": True}}
        return arguments

    # What came back.

    def _checked(self, call: _Call) -> dict[str, Any]:
        """Return the JSON of a 200, or raise what it is in place of an answer."""
        data, error = self._judged(call)
        if error is not None:
            raise error  # here, where no local holds what came
        return data

    def _judged(self, call: _Call) -> tuple[dict[str, Any], CallError | None]:
        """Return the JSON of a 200, or what it is in place of an answer."""
        exchange = call.exchange
        content_type = exchange.headers.get("content-type", "")
        data, reason = failures.answer_in(
            call.format, content_type, bytes(exchange.body)
        )
        if data.get("error"):
            return {}, self._refused(call.exchange)
        why = failures.blocked(data)
        if reason is None and not why:
            return data, None
        fields = self._seen_fields(call.exchange)
        name = self.provider.name
        if reason is not None:
            return {}, ServiceUnavailableError(
                f"{name} answered {exchange.status}, but {self._clean(reason)}",
                **fields,
            )
        return {}, ContentFilterError(
            f"{name} refused the prompt: {self._clean(why or '')}", **fields
        )

    def _put_together(
        self, call: _Call, reader: StreamReader
    ) -> tuple[dict[str, Any], CallError | None]:
        """Return the JSON of a whole stream, or what kept it from its end."""
        try:
            body = reader.body()
        except _UNREADABLE as exc:
            return {}, self._unreadable(call, exc)
        if reader.error is not None:
            call.exchange.body = bytearray(reader.error)
            return {}, self._refused(call.exchange)
        fields, name = self._seen_fields(call.exchange), self.provider.name
        if not (reader.ended or call.told_whole):
            what = "ended without its end mark" if reader.events else "was empty"
            return {}, ServiceUnavailableError(f"{name}: the stream {what}", **fields)
        if why := failures.blocked(body):
            said = f"{name} refused the prompt: {self._clean(why)}"
            return {}, ContentFilterError(said, **fields)
        return body, None

    def _malformed(self, call: _Call, exc: Exception) -> Exception:
        call.exchange.body = bytearray(str(exc).encode())
        return ServiceUnavailableError(
            f"{self.provider.name} sent what is no event of a stream:"
            f" {self._clean(str(exc))}",
            **self._seen_fields(call.exchange),
        )

    def _failure(self, call: _Call, exc: Exception) -> Exception:
        """Say what went wrong by what the wire saw, not by what LiteLLM raised."""
        if isinstance(exc, CallError):
            return self._from_transport(exc, call.exchange)
        now = asyncio.get_running_loop().time()
        if isinstance(exc, TimeoutError) and now >= call.ends:
            return LLMTimeoutError(
                f"{self.provider.name} {call.late}", **self._seen_fields(call.exchange)
            )
        exchange = call.exchange
        for cause in (exc, exchange.error):
            if isinstance(cause, MalformedStreamError):
                return self._malformed(call, cause)
        if exchange.error is not None:
            return self._from_transport(exchange.error, exchange)
        if exchange.status is not None and exchange.status >= 300:
            return self._refused(call.exchange)
        if exchange.status is not None:
            if not call.stream and (error := self._judged(call)[1]) is not None:
                return error
            return LLMServiceError(
                f"LiteLLM could not read the answer of {self.provider.name}:"
                f" {self._clean(str(exc))}",
                **self._seen_fields(call.exchange),
            )
        status = getattr(exc, "status_code", None)
        text = self._clean(str(exc))
        if status in {400, 404, 422} or "surrogates not allowed" in text:
            return InvalidRequestError(
                f"the request cannot be made, nothing was sent: {text}",
                **self._fields(),
            )
        # A provider without a format of ours may have been reached by LiteLLM itself.
        sent = ", nothing was sent" if self.provider.format is not None else ""
        return LLMServiceError(
            f"LiteLLM failed at the request{sent}: {text}", **self._fields()
        )

    def _log_left_out(self, call: _Call) -> None:
        """Log, once for each model and option, what was asked and not sent."""
        request = call.request
        asked = list(request.sampling)
        if request.tools and request.tool_choice not in (None, "auto", "none"):
            asked.append("tool_choice")
        form = request.response_format
        if getattr(form, "response_format", form) == {"type": "json_object"}:
            asked.append("response_format")
        model = (self.provider.name, self.model_name)
        if not asked or all((*model, option) in _seen_options for option in asked):
            return
        body = json.loads(call.exchange.request_body or b"{}")
        sent = set(body)
        for part in ("generationConfig", "options", "text", "output_config"):
            sent.update(body.get(part) or ())
        for option in asked:
            if (*model, option) not in _seen_options:
                _seen_options.add((*model, option))
                if not sent & _WIRE_NAMES.get(option, {option}):
                    _log.info("%s/%s takes no %s: it was left out", *model, option)

    def _result(self, call: _Call, body: dict[str, Any]) -> ChatResult:
        try:
            return self._read(call, body)
        except _UNREADABLE as exc:
            error = self._unreadable(call, exc)
        del body
        raise error

    def _unreadable(self, call: _Call, exc: Exception) -> ServiceUnavailableError:
        return ServiceUnavailableError(
            f"{self.provider.name} answered {call.exchange.status}, but in a form that"
            f" cannot be read: {self._clean(repr(exc))}",
            **self._seen_fields(call.exchange),
        )

    def _read(self, call: _Call, body: dict[str, Any]) -> ChatResult:
        headers = call.exchange.headers
        reading = answers.read(call.format or "openai", body)
        usage = token_usage(reading.usage)
        cost = litellm_tables.cost(
            call.litellm, self.provider.litellm, self.model_name, usage, reading.usage
        )
        return ChatResult(
            text=reading.text,
            texts=reading.texts,
            token_usage=usage,
            raw_response=body,
            tool_outputs=_tool_outputs(reading) or None,
            tool_calls=reading.tool_calls,
            finish_reason=reading.finish,
            model=reading.model or self.model_name,
            service=self.provider.name,
            cost_usd=cost,
            request_id=failures.request_id(headers) or reading.id,
            queued=call.queued,
            reasoning=reading.reasoning,
            rate_limits=rate_limits(headers),
            refusal=reading.refusal,
            thinking_blocks=reading.thinking_blocks,
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


def _tool_outputs(reading: Reading) -> list[ToolOutput]:
    outputs: list[ToolOutput] = []
    if reading.searches:
        outputs.append(ToolOutput(type=ToolType.WEB_SEARCH, result=reading.searches))
    outputs += [
        ToolOutput(type=ToolType.IMAGE_GENERATION, result=image)
        for image in reading.images
    ]
    return outputs


def _base_url(provider: Provider, given: str | None, settings: Settings) -> str | None:
    names = (provider.name, provider.litellm, *provider.aliases)
    # An enum of strings may stand for a name.
    urls = {str(getattr(k, "value", k)): v for k, v in settings.base_urls.items()}
    settled = next((urls[name] for name in names if name in urls), None)
    url = given or settled or provider.base_url
    if url is None and provider.name not in _WITHOUT_BASE_URL:
        # LiteLLM would take it from the environment, and the key would go there.
        raise InvalidRequestError(
            f"{provider.name} needs a base_url, in the key's record or in"
            " Settings.base_urls",
            service=provider.name,
        )
    if url is None:
        return None
    try:
        return _whole_url(url, provider.format, provider.path)
    except ValueError as exc:
        raise InvalidRequestError(
            f"the base URL of {provider.name} cannot be used: {exc}",
            service=provider.name,
        ) from None


@lru_cache(maxsize=256)
def _whole_url(url: str, wire_format: str | None, path: str) -> str:
    url = http_url(url)
    if wire_format == "anthropic":
        return url.removesuffix("/v1")
    scheme, _, rest = url.partition("://")
    return url if "/" in rest else f"{scheme}://{rest}{path}"


# LiteLLM derives the address from a region or a project.
_WITHOUT_BASE_URL = frozenset({"bedrock", "vertex"})


def new_pool(settings: Settings) -> "Pool[Client]":
    """Make a pool for the clients of any number of adapters."""
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
            client.sdk = AsyncHTTPHandler(
                transport=http._transport  # noqa: SLF001 - made by us
            )
            client.sdk.client = http
    return client.sdk


_seen_options: set[tuple[str, str, str]] = set()

# What an option is called on the wires.
_WIRE_NAMES: Mapping[str, set[str]] = {
    "tool_choice": {"tool_choice", "toolConfig", "tool_config"},
    "response_format": {
        "response_format",
        "format",
        "responseMimeType",
        "response_mime_type",
    },
    "max_tokens": {
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "maxOutputTokens",
        "num_predict",
    },
    "top_p": {"top_p", "topP"},
    "n": {"n", "candidateCount", "candidate_count"},
    "stop": {"stop", "stop_sequences", "stopSequences"},
    "reasoning_effort": {
        "reasoning_effort",
        "reasoning",
        "thinking",
        "think",
        "thinkingConfig",
        "thinking_config",
        "effort",
    },
}
