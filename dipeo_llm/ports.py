"""What the package asks of the application, and what it offers to it.

Protocols only: an application's own classes fit without importing this package.
"""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dipeo_llm.domain import ChatResult, TokenUsage


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

    Kept by the service for the application's use. Of its rules only the token estimate
    is asked for, and only where neither the provider nor a tokenizer can count.
    """

    def estimate_tokens(self, text: str, provider: str) -> int:
        """Guess the number of tokens of *text* for *provider*."""
        ...


class PersonMessage(Protocol):
    """What a message must have: the attributes of `domain.Message`."""

    @property
    def from_person_id(self) -> Any:
        """Who speaks."""

    @property
    def to_person_id(self) -> Any:
        """Who is spoken to."""

    @property
    def content(self) -> Any:
        """Text, or OpenAI-style content parts."""


class LLMConfig(Protocol):
    """What a person's configuration must have: that of `domain.PersonLLMConfig`."""

    @property
    def service(self) -> Any:
        """A string, or an enum whose value is one."""

    @property
    def model(self) -> str:
        """The model string."""

    @property
    def api_key_id(self) -> Any:
        """The name of the key."""

    @property
    def system_prompt(self) -> str | None:
        """The inline prompt."""

    @property
    def prompt_file(self) -> str | None:
        """The prompt's file."""


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
        """Answer OpenAI-shaped messages."""
        ...

    async def complete_with_person(
        self,
        person_messages: Sequence[Any],
        person_id: Any,
        llm_config: Any,
        **options: Any,
    ) -> ChatResult:
        """Answer a conversation as one of its persons."""
        ...

    async def get_available_models(self, api_key_id: str) -> list[str]:
        """List what the provider offers to this key."""
        ...

    def get_token_counts(self, client_name: str, usage: Any) -> TokenUsage:
        """Read any provider's usage record."""
        ...

    async def validate_api_key(
        self, api_key_id: str, provider: str | None = None
    ) -> bool:
        """Say whether the provider takes this key."""
        ...

    async def get_provider_for_model(self, model: str) -> str | None:
        """Name the provider of a model, None if that cannot be told."""
        ...
