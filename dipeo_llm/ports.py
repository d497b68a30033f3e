"""What the package asks of the application, and what it offers to it.

Protocols only: an application's own classes fit without importing this package.
"""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from dipeo_llm.domain import ChatResult, StreamChunk, TokenUsage


@runtime_checkable
class APIKeyPort(Protocol):
    """Where keys are kept."""

    def get_api_key(
        self, api_key_id: str
    ) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Return, or return an awaitable of, the record of a key.

        Args:
            api_key_id: The name of the key.

        Returns:
            A mapping with `key` and, where known, `service`, `id`, `label`, `base_url`.

        Raises:
            APIKeyError: The id is unknown.
        """
        ...


@runtime_checkable
class LLMDomainService(Protocol):
    """The application's own rules about models, such as DiPeO's.

    The service keeps it for the application and calls nothing of it.
    """

    def estimate_tokens(self, text: str, provider: str) -> int:
        """Guess the number of tokens of a text for a provider."""
        ...


class LLMStreamPort(Protocol):
    """A streamed answer: `async with` opens it, `async for` reads its chunks.

    Leaving the block, by its end, `break`, an error or cancellation, closes the
    connection.
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
            StreamInterruptedError: The stream broke off; `partial_text` is what came.
        """
        ...

    async def result(self) -> ChatResult:
        """Read the rest, if any, and return what `complete` would have returned.

        Raises:
            StreamInterruptedError: The stream broke off.
            StructuredOutputError: The answer is not as `response_format` asked.
        """
        ...


@runtime_checkable
class LLMServicePort(Protocol):
    """What an application talks to."""

    async def initialize(self) -> None:
        """Do the slow part of the first call now. May be called twice."""
        ...

    async def aclose(self) -> None:
        """Close all that was opened. May be called twice."""
        ...

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
            messages: OpenAI-shaped, oldest first.
            model: A model string.
            api_key_id: The key's name; None for a provider that needs none.
            service: The provider, where the model string does not tell it.
            **options: The fields of `LLMRequestOptions`; times are seconds.

        Raises:
            APIKeyError: The key is missing, or the provider refuses it.
            LLMServiceError: Any other failure of the call.
            SettingsError: A proxy or a bundle of authorities cannot be used.
            TypeError: An unknown option.
            RuntimeError: The service is closed.

        Cancelling it closes the call's connection.
        """
        ...

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
            person_id: Who answers.
            llm_config: An object with the attributes of `PersonLLMConfig`.
            **options: As for `complete`.

        Raises:
            DiPeOLLMError, TypeError, RuntimeError: As `complete`.

        Cancelling it closes the call's connection.
        """
        ...

    def stream(
        self,
        messages: Sequence[Mapping[str, Any]] | None,
        model: str,
        api_key_id: str | None = None,
        *,
        service: Any = None,
        **options: Any,
    ) -> LLMStreamPort:
        """Answer a conversation as a stream; nothing is sent before it is entered.

        Args:
            messages: As for `complete`.
            model: Likewise.
            api_key_id: Likewise.
            service: Likewise.
            **options: Likewise; `timeout` is for the first chunk, and `idle_timeout`
                (s) for each later one.

        Raises:
            InvalidRequestError, TypeError, RuntimeError: At once, as `complete`.
        """
        ...

    def stream_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        **options: Any,
    ) -> LLMStreamPort:
        """Answer a conversation as one of its persons, as a stream.

        Arguments are as for `complete_with_person`, the rest as for `stream`.
        """
        ...

    async def get_available_models(self, api_key_id: str) -> list[str]:
        """List what the provider offers to this key.

        Raises:
            InvalidRequestError: It cannot be told whose key it is.
            DiPeOLLMError: As `complete`.

        Cancelling it closes the connection.
        """
        ...

    def get_token_counts(self, client_name: str, usage: Any) -> TokenUsage:
        """Read any provider's usage record."""
        ...

    async def validate_api_key(
        self, api_key_id: str, provider: str | None = None
    ) -> bool:
        """Say whether the provider takes this key.

        Raises:
            APIKeyError: The key is unknown to the application, so nothing was asked.
            LLMServiceError: The provider could not be asked.

        Cancelling it closes the connection.
        """
        ...

    async def get_provider_for_model(self, model: str) -> str | None:
        """Name the provider of a model, None if that cannot be told."""
        ...
