"""The errors of this package, sorted by what a caller does next.

    DiPeOLLMError
    ├── SettingsError (also a ValueError)     fix the setting
    ├── APIKeyError                           fix the key
    │   └── APIKeyNotFoundError
    └── LLMServiceError                       ask `retryable`
        ├── InvalidRequestError               fix the request
        ├── ContextWindowError                shorten it
        ├── ContentFilterError                ask for something else
        ├── ModelNotFoundError                fix the model's name
        ├── RateLimitError                    wait `retry_after` seconds
        │   └── QuotaExceededError            pay the bill
        ├── ServiceUnavailableError           try again later
        ├── LLMTimeoutError                   try again, or give it more time
        ├── StreamInterruptedError            use `partial_text`, or start afresh
        └── StructuredOutputError             use `text`, or ask again

This module knows nothing of any provider and imports nothing of the package. A misuse
of the API (an unknown keyword, a closed service) is a TypeError or a RuntimeError, as
it is everywhere in Python.
"""

from typing import Any


class DiPeOLLMError(Exception):
    """Root of everything that this package raises on purpose."""


class SettingsError(DiPeOLLMError, ValueError):
    """A setting or an environment variable cannot be read or used.

    The message names it, and for a proxy its kind. Raised where settings are made, but
    at the first call for a proxy and for a file of trusted authorities.
    """


class CallError(DiPeOLLMError):
    """What both families of a failed call carry. Every argument is optional.

    Args:
        message: One line, without a key in it.
        service: The provider, such as "openai".
        model: The model's name as the provider knows it.
        status_code: The HTTP status that the provider really sent, None without one.
        retry_after: Seconds to wait, as the provider asked, None if it did not.
        retryable: Whether the same call may succeed later; None takes the class's own
            answer.
        request_id: The provider's name for the request, to quote to its support.
        attempts: Requests made so far, the failed one included; 0 if none was sent.
        details: What else is known: `code` and `type`, the provider's own words for the
            error; `queued`, the seconds that the call waited for a turn under
            `max_concurrency`; `cause`, the class that interrupted a stream.
    """

    default_retryable = False

    def __init__(
        self,
        message: str = "",
        *,
        service: str | None = None,
        model: str | None = None,
        status_code: int | None = None,
        retry_after: float | None = None,
        retryable: bool | None = None,
        request_id: str | None = None,
        attempts: int = 0,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.service = service
        self.model = model
        self.status_code = status_code
        self.retry_after = retry_after
        self.retryable = self.default_retryable if retryable is None else retryable
        self.request_id = request_id
        self.attempts = attempts
        self.details = details or {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments are lost by BaseException's own pickling.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(
    cls: type[CallError], args: tuple[Any, ...], state: dict[str, Any]
) -> CallError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class APIKeyError(CallError):
    """The key is missing, unknown, another provider's, or refused (401, 403)."""


class APIKeyNotFoundError(APIKeyError):
    """No key is kept under this id."""


class LLMServiceError(CallError):
    """A call failed in a way that no subclass describes, or base of those that do."""


class InvalidRequestError(LLMServiceError):
    """The request is wrong as it stands (400, 413, 422, or refused before sending)."""


class ContextWindowError(LLMServiceError):
    """The messages are longer than the model's context window."""


class ContentFilterError(LLMServiceError):
    """The provider refused the content of the request."""


class ModelNotFoundError(LLMServiceError):
    """The provider does not know the model, or not for this key (404)."""


class RateLimitError(LLMServiceError):
    """Too many requests or tokens for now (429); see `retry_after`, in seconds."""

    default_retryable = True


class QuotaExceededError(RateLimitError):
    """The account's money or quota is spent (402, 429); waiting does not help."""

    default_retryable = False


class ServiceUnavailableError(LLMServiceError):
    """The provider or the way to it failed: 5xx, 529, refused, reset, not an answer."""

    default_retryable = True


class LLMTimeoutError(LLMServiceError):
    """An attempt took longer than `timeout`, or the call longer than `deadline`."""

    default_retryable = True


class StreamInterruptedError(LLMServiceError):
    """A stream broke off after its first chunk; never tried again.

    Args:
        message: One line, without a key in it.
        partial_text: The text that had come until then.
        **fields: As on every LLMServiceError.
    """

    def __init__(
        self, message: str = "", *, partial_text: str = "", **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.partial_text = partial_text


class StructuredOutputError(LLMServiceError):
    """The answer does not have the form that `response_format` asked for.

    Args:
        message: One line, without a key in it.
        reason: "refusal", "truncation" or "invalid".
        text: The whole text that came.
        **fields: As on every LLMServiceError.
    """

    def __init__(
        self,
        message: str = "",
        *,
        reason: str = "invalid",
        text: str = "",
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.reason = reason
        self.text = text
