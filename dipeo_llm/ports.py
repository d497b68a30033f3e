"""The protocols that the application implements, and those that the package offers.

Protocols only: an application's own classes fit without importing this package.
"""

from collections.abc import Awaitable, Mapping, Sequence
from typing import (
    Any,
    Protocol,
    Required,
    Self,
    TypedDict,
    Unpack,
    overload,
    runtime_checkable,
)

from pydantic import SecretStr

from dipeo_llm.domain import (
    ChatResult,
    CommonOptions,
    ResponseFormat,
    ServiceName,
    StreamChunk,
    T,
    TokenUsage,
    Tool,
)


class APIKeyRecord(TypedDict, total=False):
    """A key, as `APIKeyPort.get_api_key` returns it. Other fields are ignored."""

    key: Required[str | SecretStr]
    """The key itself; empty for a server that needs none."""
    service: ServiceName | None
    """The provider that the key belongs to; the key is sent to no other."""
    base_url: str | None
    """Where calls with this key go; wins over the settings."""
    id: str
    """The id under which the key was found."""
    label: str | None
    """A name for people to read."""


@runtime_checkable
class APIKeyPort(Protocol):
    """Finds keys by their id."""

    def get_api_key(
        self, api_key_id: str
    ) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Return the record of a key, or an awaitable of it.

        Args:
            api_key_id: The key's id.

        Returns:
            An `APIKeyRecord`, or any mapping with its fields.

        Raises:
            APIKeyError: The id is unknown.
        """
        ...


@runtime_checkable
class LLMDomainService(Protocol):
    """The application's own rules about models, such as DiPeO's.

    The service keeps it for the application and never calls it.
    """

    def estimate_tokens(self, text: str, provider: str) -> int:
        """Estimate the number of tokens of a text for a provider."""
        ...


class LLMStreamPort(Protocol[T]):
    """A streamed answer: `async with` opens it, `async for` reads its chunks.

    Leaving the block by its end, `break`, an error or cancellation closes the connection.
    """

    async def __aenter__(self) -> Self:
        """Open the stream and wait for its first chunk.

        Raises:
            DiPeOLLMError: As `LLMServicePort.complete`.
        """
        ...

    async def __aexit__(self, *exc: object) -> None:
        """Close the connection."""
        ...

    def __aiter__(self) -> Self:
        """Return the stream."""
        ...

    async def __anext__(self) -> StreamChunk:
        """Return the next chunk.

        Raises:
            StreamInterruptedError: The stream failed; `partial_text` is the text so far.
        """
        ...

    async def result(self) -> ChatResult[T]:
        """Read the rest of the stream and return the result that `complete` returns.

        Raises:
            StreamInterruptedError: The stream failed.
            StructuredOutputError: The answer does not match `response_format`.
        """
        ...


@runtime_checkable
class LLMServicePort(Protocol):
    """What an application calls."""

    async def initialize(self) -> None:
        """Do the slow part of the first call now. May be called twice."""
        ...

    async def aclose(self) -> None:
        """Close every open connection. May be called twice."""
        ...

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
            messages: In OpenAI's format, oldest first.
            model: A model string.
            api_key_id: The key's id; None for a provider that needs no key.
            **options: `service`, the provider, if the model string does not name it;
                `response_format`; `tools`; and the other fields of `LLMRequestOptions`.
                Times are seconds.

        Returns:
            The result. With `response_format=River` its `parsed` is a River; with tools
            it is None for a turn that calls one.

        Raises:
            APIKeyError: The key is missing, or the provider refuses it.
            LLMServiceError: The call failed for another reason.
            SettingsError: A proxy or a CA bundle cannot be used.
            TypeError: An unknown option.
            RuntimeError: The service is closed.

        Cancelling the call closes its connection.
        """
        ...

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
            person_id: The person that answers.
            llm_config: An object with the attributes of `PersonLLMConfig`; the options
                that it has are the call's defaults.
            variables: Values for a prompt template; each wins over that of the
                configuration's `prompt_variables`.
            **options: As for `complete`.

        Raises:
            DiPeOLLMError, TypeError, RuntimeError: As `complete`.

        Cancelling the call closes its connection.
        """
        ...

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
    ) -> LLMStreamPort[T]: ...
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
    ) -> LLMStreamPort[T | None]: ...
    def stream(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        **options: Any,
    ) -> LLMStreamPort[Any]:
        """Answer a conversation as a stream; nothing is sent until it is entered.

        Args:
            messages: As for `complete`.
            model: As for `complete`.
            api_key_id: As for `complete`.
            **options: As for `complete`; `timeout` limits the wait for the first chunk,
                and `idle_timeout` (s) the wait for each later one.

        Raises:
            InvalidRequestError, TypeError, RuntimeError: At once, as `complete`.
        """
        ...

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
    ) -> LLMStreamPort[T]: ...
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
    ) -> LLMStreamPort[T | None]: ...
    def stream_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LLMStreamPort[Any]:
        """Answer a conversation as one of its persons, as a stream.

        The arguments are those of `complete_with_person`, the rest is as for `stream`.
        """
        ...

    async def get_available_models(self, api_key_id: str) -> list[str]:
        """List the models that the provider offers to a key.

        Raises:
            InvalidRequestError: The key's provider is unknown.
            DiPeOLLMError: As `complete`.

        Cancelling the call closes its connection.
        """
        ...

    def get_token_counts(self, client_name: str, usage: Any) -> TokenUsage:
        """Read any provider's usage record."""
        ...

    async def validate_api_key(
        self, api_key_id: str, provider: str | None = None
    ) -> bool:
        """Say whether the provider accepts a key.

        Raises:
            APIKeyError: The application does not know the key; nothing was sent.
            LLMServiceError: The provider could not be asked.

        Cancelling the call closes its connection.
        """
        ...

    async def get_provider_for_model(self, model: str) -> str | None:
        """Return the name of a model's provider, or None if it is unknown."""
        ...
