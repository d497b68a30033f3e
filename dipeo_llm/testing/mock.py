"""A model that answers from a script, and assertions on the requests to it."""

import asyncio
import copy
import inspect
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Protocol, Self, TypeAlias

from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.domain import (
    ChatRequest,
    ChatResult,
    StreamChunk,
    TokenUsage,
    ToolCall,
    ToolCallDelta,
)
from dipeo_llm.errors import APIKeyError, LLMServiceError, LLMTimeoutError
from dipeo_llm.streaming import Items
from dipeo_llm.testing.matching import Difference, differences, explain


class ScriptError(AssertionError):
    """A mock received more requests than its script has replies."""


# --- a model that answers from a script ----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A scripted answer with more than a text."""

    text: str = ""
    tool_calls: Sequence[tuple[str, Mapping[str, Any]] | ToolCall] = ()
    """Calls of the caller's tools: names and arguments."""
    pieces: Sequence[str] = ()
    """The chunks of a stream; without them, one for each word."""
    reasoning: str | None = None
    usage: TokenUsage | None = None
    """None stands for a count of words."""
    finish_reason: str | None = None
    """None stands for "tool_calls" if there are some, else "stop"."""
    delay: float = 0.0
    """Seconds before the answer, or its first chunk."""
    piece_delay: float = 0.0
    """Seconds before each further chunk."""
    error: Exception | None = None
    """Raised in place of the answer; by a stream, after its pieces."""
    result: ChatResult | None = None
    """The whole answer; of the other fields only the delays and pieces count then."""


Script: TypeAlias = (
    str
    | Reply
    | ChatResult
    | Exception
    | type[Exception]
    | Sequence[str]
    | Callable[[ChatRequest], Any]
)
"""A text, a `Reply`, a result, an error to raise, the pieces of a stream, or a function,
asynchronous or not, that takes the request and returns any of these."""


@dataclass(frozen=True, slots=True)
class MockRequest:
    """A request that a mock received."""

    provider: str
    model: str
    request: ChatRequest
    streamed: bool = False

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """The conversation in OpenAI's form, oldest message first."""
        return list(self.request.messages)

    def as_data(self) -> dict[str, Any]:
        """Return its fields for `assert_request`, with the options beside the others."""
        asked = {f.name: getattr(self.request, f.name) for f in fields(self.request)}
        sampling = asked.pop("sampling")
        about = {
            "provider": self.provider,
            "model": self.model,
            "streamed": self.streamed,
        }
        return {**about, **asked, **sampling}


class MockLLMAdapter(BaseLLMAdapter):
    """Answers from a script and opens no connection; pass it as `adapter_factory`.

    Each request takes the next reply, whichever model or task sends it.

    Args:
        *replies: Each answers one request, in this order.
        default: Answers when the replies are used up. Without it the next request is a
            ScriptError. A mock without any reply has a default of its own.
    """

    def __init__(self, *replies: Script, default: Script | None = None) -> None:
        super().__init__("openai", "mock-model", "key-of-the-mock")
        self._script = _Script(replies, default)

    def __call__(
        self,
        provider: Provider,
        model_name: str,
        api_key: Any = None,
        base_url: str | None = None,
        **options: Any,
    ) -> Self:
        """Return this mock as another model, with the same script and requests."""
        bound = copy.copy(self)
        bound.provider, bound.model_name = provider, model_name
        return bound

    @property
    def requests(self) -> list[MockRequest]:
        """The requests to every model so far, oldest first."""
        return self._script.requests

    @property
    def replies_left(self) -> int:
        """The number of replies that no request has taken yet."""
        return len(self._script.replies)

    def add(self, *replies: Script) -> None:
        """Append replies to the script."""
        self._script.add(replies)

    async def complete(
        self, request: ChatRequest | Sequence[Mapping[str, Any]]
    ) -> ChatResult:
        """Answer with the next reply."""
        request = _request(request)
        async with self._limit(request.timeout):
            reply = await self._next(request, streamed=False)
            await asyncio.sleep(reply.delay)
        if reply.error is not None:
            raise self._with_owner(reply.error)
        return self._result(reply, request)

    async def stream(self, request: ChatRequest | Sequence[Mapping[str, Any]]) -> Items:
        """Yield the next reply in chunks, and then the whole result."""
        request = _request(request)
        async with self._limit(request.timeout):
            reply = await self._next(request, streamed=True)
            await asyncio.sleep(reply.delay)
        result = self._result(reply, request)
        idle = request.idle_timeout or request.timeout
        for chunk in _chunks(reply, result):
            yield chunk
            async with self._limit(idle, "sent nothing for"):
                await asyncio.sleep(reply.piece_delay)
        if reply.error is not None:
            raise self._with_owner(reply.error)
        yield result

    async def list_models(self, pages: int = 1) -> list[str]:
        """Refuse: there is no provider behind a mock."""
        raise self._no_provider("list models or check keys")

    async def count_tokens(self, request: ChatRequest) -> NoReturn:
        """Refuse likewise."""
        raise self._no_provider("count tokens")

    def _no_provider(self, what: str) -> ScriptError:
        return ScriptError(
            f"MockLLMAdapter only answers complete and stream; it cannot {what}"
        )

    @asynccontextmanager
    async def _limit(
        self, seconds: float, late: str = "did not answer within"
    ) -> AsyncIterator[None]:
        """Limit a scripted delay as the real adapter limits a provider's."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise LLMTimeoutError(
                f"{self.provider.name} {late} {seconds:g} s",
                service=self.provider.name,
                model=self.model_name,
            ) from None

    async def _next(self, request: ChatRequest, *, streamed: bool) -> Reply:
        asked = MockRequest(self.provider.name, self.model_name, request, streamed)
        return await _reply(self._script.next(asked), request)

    def _result(self, reply: Reply, request: ChatRequest) -> ChatResult:
        if reply.result is not None:
            result = reply.result.model_copy(deep=True)
            result.service = result.service or self.provider.name
            result.model = result.model or self.model_name
            return result
        text = reply.text or "".join(reply.pieces)
        calls = [_tool_call(call, i) for i, call in enumerate(reply.tool_calls, 1)]
        return ChatResult(
            text=text,
            token_usage=reply.usage or _word_count(request, text),
            tool_calls=calls,
            finish_reason=reply.finish_reason or ("tool_calls" if calls else "stop"),
            reasoning=reply.reasoning,
            service=self.provider.name,
            model=self.model_name,
        )

    def _with_owner(self, error: Exception) -> Exception:
        """Fill in the service and the model of an error, as the real adapter does."""
        if isinstance(error, LLMServiceError | APIKeyError):
            error.service = error.service or self.provider.name
            error.model = error.model or self.model_name
        return error


class _Script:
    """The replies of a mock and the requests to it, shared by all its models."""

    def __init__(self, replies: Sequence[Script], default: Script | None) -> None:
        self.requests: list[MockRequest] = []
        self.replies: deque[Script] = deque(replies)
        self._given = len(replies)
        if default is None and not replies:
            default = "Hello from the mock."
        self._default = default

    def add(self, replies: Sequence[Script]) -> None:
        self.replies.extend(replies)
        self._given += len(replies)

    def next(self, asked: MockRequest) -> Script:
        self.requests.append(asked)
        if self.replies:
            return self.replies.popleft()
        if self._default is None:
            raise ScriptError(
                f"the mock has no reply left: it was given {self._given}, and this is"
                f" request {len(self.requests)}:\n  {_line(asked)}\nGive it one more, or"
                " a default"
            )
        return self._default


def _request(given: ChatRequest | Sequence[Mapping[str, Any]]) -> ChatRequest:
    return given if isinstance(given, ChatRequest) else ChatRequest(given)


async def _reply(script: Any, request: ChatRequest) -> Reply:
    """Make a `Reply` of any scripted object."""
    if isinstance(script, Reply):
        return script
    if isinstance(script, str):
        return Reply(text=script)
    if isinstance(script, ChatResult):
        return Reply(result=script)
    if isinstance(script, type) and issubclass(script, Exception):
        script = script("scripted")
    if isinstance(script, Exception):
        return Reply(error=script)
    if isinstance(script, list | tuple):
        return Reply(pieces=script)
    if callable(script):
        result = script(request)
        result = await result if inspect.isawaitable(result) else result
        return await _reply(result, request)
    raise TypeError(
        f"{type(script).__name__} is not a reply: script a str, a Reply, a ChatResult,"
        " an exception, a list of pieces, or a function of the request that returns one"
    )


def _chunks(reply: Reply, result: ChatResult) -> Iterator[StreamChunk]:
    if reply.error is not None and not reply.pieces and not reply.text:
        return
    if result.reasoning:
        yield StreamChunk(reasoning=result.reasoning)
    for piece in reply.pieces or re.findall(r"\S+\s*|\s+", result.text):
        yield StreamChunk(text=piece)
    for index, call in enumerate(result.tool_calls):
        yield StreamChunk(
            tool_call=ToolCallDelta(index, call.id, call.name, call.arguments_text)
        )


def _tool_call(call: tuple[str, Mapping[str, Any]] | ToolCall, number: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    name, arguments = call
    return ToolCall(
        id=f"call_{number}",
        name=name,
        arguments=dict(arguments),
        arguments_text=json.dumps(arguments),
    )


def _word_count(request: ChatRequest, text: str) -> TokenUsage:
    """Count words as tokens, so that the numbers are stable and not zero."""
    read = sum(len(str(m.get("content") or "").split()) for m in request.messages)
    written = len(text.split())
    return TokenUsage(input=read, output=written, total=read + written)


def _line(asked: MockRequest) -> str:
    last = asked.messages[-1] if asked.messages else {}
    said = " ".join(str(last.get("content")).split())
    said = said if len(said) <= 60 else said[:59] + "…"
    return f"{asked.provider}/{asked.model}, {last.get('role')}: {said!r}"


# --- what was asked ------------------------------------------------------------------


class SentRequest(Protocol):
    """A request to assert on: a `MockRequest`, or one of a cassette."""

    def as_data(self) -> Mapping[str, Any]:
        """Return its fields."""
        ...


class _HasRequests(Protocol):
    @property
    def requests(self) -> Sequence[SentRequest]: ...


def assert_request(
    where: SentRequest | Sequence[SentRequest] | _HasRequests,
    *,
    times: int | None = None,
    **expected: Any,
) -> None:
    """Assert that a request was made; the failure shows the nearest one.

    Args:
        where: A mock, a cassette, its `requests`, or one of them.
        times: How many requests must fit; None accepts any number but 0.
        **expected: Fields and their values. For a mock: provider, model, messages,
            tools, streamed, temperature, … For a cassette: method, host, path, and the
            fields of the body. A value is compared with `==`, so `pytest.approx` and
            `unittest.mock.ANY` work; `...` stands for any value of a field that is there.
    """
    __tracebackhide__ = True
    found = [asked.as_data() for asked in _requests(where)]
    missing = [_missing(expected, data) for data in found]
    fitting = sum(not different for different in missing)
    if fitting == times or (times is None and fitting):
        return
    wanted = ", ".join(f"{name}={_brief(value)}" for name, value in expected.items())
    wanted = f"with {wanted}" if wanted else "at all"
    if not found:
        raise AssertionError(f"no request was made {wanted}")
    if fitting:
        raise AssertionError(
            f"{fitting} of {len(found)} requests were made {wanted}, not {times}"
        )
    nearest = min(range(len(found)), key=lambda i: len(missing[i]))
    which = (
        "the request" if len(found) == 1 else f"request {nearest + 1} of {len(found)}"
    )
    raise AssertionError(
        f"no request was made {wanted}\n{which} differs in:\n"
        + explain(missing[nearest], ("expected", "was"))
    )


def _requests(where: Any) -> Sequence[SentRequest]:
    if hasattr(where, "requests"):
        where = where.requests
    return [where] if hasattr(where, "as_data") else list(where)


def _missing(expected: Mapping[str, Any], data: Mapping[str, Any]) -> list[Difference]:
    return differences(
        expected, {name: data[name] for name in expected if name in data}
    )


def _brief(value: Any) -> str:
    text = "..." if value is ... else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
