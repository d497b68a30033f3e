"""The errors of this package, sorted by what the caller does next.

    DiPeOLLMError
    ├── SettingsError (also a ValueError)     fix the setting
    └── CallError                             a failed call; see its fields
        ├── APIKeyError                       fix the key
        │   └── APIKeyNotFoundError
        └── LLMServiceError                   check `retryable`
            ├── InvalidRequestError           fix the request
            ├── ContextWindowError            shorten the messages
            ├── ContentFilterError            ask for something else
            ├── ModelNotFoundError            fix the model's name
            ├── RateLimitError                wait `retry_after` seconds
            │   └── QuotaExceededError        top up the account
            ├── ServiceUnavailableError       try again later
            ├── LLMTimeoutError               try again, or allow more time
            ├── StreamInterruptedError        use `partial_text`, or start again
            └── StructuredOutputError         use `text`, or ask again

This module knows no provider and imports nothing from the package. Misuse of the API (an
unknown keyword, a closed service) is a TypeError or a RuntimeError, as usual in Python.
"""

from typing import Any


class DiPeOLLMError(Exception):
    """Root of every error that this package raises on purpose."""


class SettingsError(DiPeOLLMError, ValueError):
    """A setting or an environment variable cannot be read or used.

    The message names the field or the variable. Raised when the settings are created;
    for a proxy and a CA bundle, at the first call.
    """


class CallError(DiPeOLLMError):
    """A failed call: base of APIKeyError and LLMServiceError.

    Args:
        message: One line without a key.
        service: The provider, such as "openai".
        model: The model's name, as the provider knows it.
        status_code: The HTTP status that the provider sent; None without a response.
        retry_after: The wait in seconds that the provider asked for; None if it did not.
        retryable: Whether the same call may succeed later; None is the class's default.
        request_id: The provider's id of the request, for its support.
        attempts: Requests sent so far, including the failed one; 0 if none was sent.
        details: Further facts: `code` and `type`, the provider's own error codes;
            `queued`, the seconds that the call waited for a permit under
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
        # BaseException's own pickling loses keyword-only arguments.
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
    """There is no key with this id."""


class LLMServiceError(CallError):
    """A call failed: base of the classes below, and used where none of them fits."""


class InvalidRequestError(LLMServiceError):
    """The request is wrong as it stands (400, 413, 422, or refused before sending)."""


class ContextWindowError(LLMServiceError):
    """The messages are longer than the model's context window."""


class ContentFilterError(LLMServiceError):
    """The provider refused the content of the request."""


class ModelNotFoundError(LLMServiceError):
    """The provider does not know the model, or not for this key (404)."""


class RateLimitError(LLMServiceError):
    """Too many requests or tokens at the moment (429); see `retry_after`, in seconds."""

    default_retryable = True


class QuotaExceededError(RateLimitError):
    """The account's credit or quota is used up (402, 429); waiting does not help."""

    default_retryable = False


class ServiceUnavailableError(LLMServiceError):
    """The provider or the connection failed: 5xx, 529, refused, reset, invalid body."""

    default_retryable = True


class LLMTimeoutError(LLMServiceError):
    """An attempt took longer than `timeout`, or the call longer than `deadline`."""

    default_retryable = True


class StreamInterruptedError(LLMServiceError):
    """A stream failed after its first chunk; it is never retried.

    Args:
        message: One line without a key.
        partial_text: The text received before the failure.
        **fields: As for every CallError.
    """

    def __init__(
        self, message: str = "", *, partial_text: str = "", **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.partial_text = partial_text


class StructuredOutputError(LLMServiceError):
    """An answer does not match `response_format`, or a tool call its function.

    Args:
        message: One line without a key.
        reason: "refusal", "truncation" or "invalid".
        text: The whole text of the answer, or of the call's arguments.
        **fields: As for every CallError.
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
