"""Reads an HTTP answer that is not what was asked for, and says which error it is.

Pure: status, headers and body in, an exception of `errors` out. It classifies by what
was really on the wire, because LiteLLM's own exceptions change status numbers and guess
by words (its 529 is a 500, its 502 from Gemini is a 500 too).
"""

import json
import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from dipeo_llm.errors import (
    APIKeyError,
    ContentFilterError,
    ContextWindowError,
    InvalidRequestError,
    LLMServiceError,
    LLMTimeoutError,
    ModelNotFoundError,
    QuotaExceededError,
    RateLimitError,
    ServiceUnavailableError,
)

CallError = APIKeyError | LLMServiceError

_REQUEST_ID_HEADERS = ("x-request-id", "request-id", "x-goog-request-id")

# Words of the providers' own messages, from real answers of each. Codes come first
# where a provider has them; Anthropic, Google and Ollama have only words for these.
_TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|exceeds? the (?:available )?context"
    r"|maximum context length|context window|prompt is too long|prompt too long"
    r"|input token count.{0,60}exceeds|exceeded max context length|too many tokens",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"content_policy_violation|content_filter|content management policy"
    r"|content filtering policy|blocked by .{0,20}safety|moderation_blocked",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(
    r"insufficient_quota|credit balance is too low|billing_hard_limit_reached"
    r"|billing_not_active|insufficient balance",
    re.IGNORECASE,
)
_BAD_KEY = re.compile(r"API_KEY_INVALID|API key not valid|API key expired")
_ECHOED_KEY = re.compile(r"(API key provided: )\S+?(?=\.?(?:\s|$))")

_TIMEOUT = frozenset({408})
_TRY_AGAIN = frozenset({409, 425})
_BY_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def from_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    service: str,
    model: str | None = None,
    secret: str = "",
    effective_status: int | None = None,
) -> CallError:
    """Make the error for an answer of a provider.

    Args:
        status: The status on the wire.
        headers: Its headers, looked up without regard to case.
        body: Its body, or as much of it as was read.
        service: The provider.
        model: The model that was asked for.
        secret: The key, to be taken out of what the provider says.
        effective_status: What the answer means, where the status does not say it: an
            error that came with 200.
    """
    error = _error_object(body)
    message = clean(error.get("message") or _excerpt(body), secret)
    code = error.get("code") if isinstance(error.get("code"), str) else None
    kind = error.get("type") or error.get("status")
    meaning = effective_status or _meaning(status, error)
    text = f"{code} {kind} {message} {error.get('reasons', '')}"
    cls, retryable = _classify(meaning, text[:_LOOKED_AT])
    if _header(headers, "x-should-retry") == "false":
        retryable = False
    return cls(
        f"{service} answered {status}: {message}"
        + (_REDIRECT if 300 <= status < 400 else ""),
        service=service,
        model=model,
        status_code=status,
        retry_after=retry_after(headers, body),
        retryable=retryable,
        request_id=request_id(headers, body),
        details={k: v for k, v in (("code", code), ("type", kind)) if v},
    )


_REDIRECT = " (a redirect is never followed: mend the base URL)"


def _meaning(status: int, error: Mapping[str, Any]) -> int:
    """Find what an error that came with a 2xx stands for; else it is the status."""
    if status >= 300:
        return status
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    for name in (error.get("type"), code):
        if isinstance(name, str) and name in _BY_TYPE:
            return _BY_TYPE[name]
    return 500


def _classify(status: int, text: str) -> tuple[type[CallError], bool]:
    """Name the class for a status and the provider's words, and whether to try again."""
    cls: type[CallError] = LLMServiceError
    if status == 402 or (status in {400, 403, 429} and _NO_MONEY.search(text)):
        cls = QuotaExceededError
    elif status in {401, 403} or (status == 400 and _BAD_KEY.search(text)):
        cls = APIKeyError
    elif status == 429:
        cls = RateLimitError
    elif status == 404:
        cls = ModelNotFoundError
    elif status in {400, 413, 422} and _TOO_LONG.search(text):
        cls = ContextWindowError
    elif status in {400, 422} and _REFUSED.search(text):
        cls = ContentFilterError
    elif status in {400, 413, 422}:
        # OpenAI's Responses endpoint answers 400 for a model that it does not know.
        cls = ModelNotFoundError if "model_not_found" in text else InvalidRequestError
    elif status in _TIMEOUT:
        cls = LLMTimeoutError
    elif status >= 500:
        cls = ServiceUnavailableError
    return cls, cls.default_retryable or status in _TRY_AGAIN


def loads(data: bytes) -> Any:
    """Parse JSON; half a character, which no text can hold, becomes U+FFFD.

    Raises:
        ValueError, RecursionError: It is not JSON that can be read.
    """
    value = json.loads(data)
    if _HALF.search(data):
        text = json.dumps(value, ensure_ascii=False)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        value = json.loads(whole)
    return value


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def answer_in(
    wire_format: str | None, content_type: str, body: bytes
) -> tuple[dict[str, Any], str | None]:
    """Read the body of a 200.

    Args:
        wire_format: Whose format it should be in; None where only LiteLLM can tell.
        content_type: For the reason.
        body: The whole body.

    Returns:
        Its JSON, and the reason why it is no answer; None for one. An error object of
        the provider's is returned with the key "error".
    """
    try:
        data = loads(body)
    except (ValueError, RecursionError):
        what = (
            "empty" if not body.strip() else f"not JSON ({content_type or 'untyped'})"
        )
        return {}, f"its body is {what}: {_excerpt(body)}"
    if not isinstance(data, dict):
        return {}, "its body is not a JSON object"
    if wire_format is None or data.get("error") or _ANSWERS[wire_format](data):
        return data, None
    return data, f"it holds no answer, only {', '.join(sorted(data)[:8]) or 'nothing'}"


def _has_openai_answer(data: Mapping[str, Any]) -> bool:
    choices = data.get("choices")
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(
            isinstance(c, dict) and isinstance(c.get("message"), dict) for c in choices
        )
    )


def _has_google_answer(data: Mapping[str, Any]) -> bool:
    candidates = data.get("candidates")
    # Without candidates, a prompt that was blocked says so: that is an answer.
    return (isinstance(candidates, list) and bool(candidates)) or blocked(
        data
    ) is not None


def _has_anthropic_answer(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("content"), list)


def _has_ollama_answer(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("message"), dict)


def _has_responses_answer(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("output"), list)


_ANSWERS = {
    "openai": _has_openai_answer,
    "responses": _has_responses_answer,
    "anthropic": _has_anthropic_answer,
    "google": _has_google_answer,
    "ollama": _has_ollama_answer,
}


def blocked(data: Mapping[str, Any]) -> str | None:
    """Return Google's reason for refusing a prompt, None if it did not."""
    feedback = data.get("promptFeedback")
    reason = feedback.get("blockReason") if isinstance(feedback, dict) else None
    return str(reason) if reason and not data.get("candidates") else None


def retry_after(headers: Mapping[str, str], body: bytes = b"") -> float | None:
    """Return the seconds that the provider asks to wait, None if it does not.

    Reads `retry-after-ms`, then `Retry-After` as seconds or as a date (RFC 9110,
    10.2.3), then the RetryInfo in a Google error's details.
    """
    ms = _number(_header(headers, "retry-after-ms"))
    if ms is not None:
        return ms / 1000
    text = _header(headers, "retry-after")
    if text:
        seconds = _number(text)
        if seconds is not None:
            return seconds
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return None
    if b"RetryInfo" not in body:
        return None
    details = _error_object(body).get("details")
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str) and delay.endswith("s"):
            return _number(delay[:-1])
    return None


def seconds_until(text: str) -> float | None:
    """Read a reset such as "1m2.5s", "20ms", "17" or a time in ISO 8601, in seconds."""
    if match := _DURATION.fullmatch(text):
        return sum(
            float(value) * scale
            for value, scale in zip(match.groups(), _UNITS.values(), strict=True)
            if value
        )
    if (seconds := _number(text)) is not None:
        return seconds
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp() - time.time())
    except ValueError:
        return None


_UNITS = {"d": 86400, "h": 3600, "m(?!s)": 60, "s": 1, "ms": 0.001}
_DURATION = re.compile(
    "(?=.)" + "".join(rf"(?:(\d+(?:\.\d+)?|\.\d+){unit})?" for unit in _UNITS)
)


def request_id(headers: Mapping[str, str], body: bytes = b"") -> str | None:
    """Return the provider's name for the request."""
    for name in _REQUEST_ID_HEADERS:
        if found := _header(headers, name):
            return found
    if b'"request_id"' in body[:65536]:
        in_body = _object(body).get("request_id")
        return in_body if isinstance(in_body, str) else None
    return None


def clean(text: str, secret: str = "") -> str:
    """Make a provider's words fit for one line of a log: no key, no control character."""
    if secret:
        text = text.replace(secret, "[key]")
    # The key is out already, so this cut hides none; what follows walks the text.
    text = text[:_LOOKED_AT]
    text = _ECHOED_KEY.sub(r"\1[key]", text)
    # LiteLLM puts whole tracebacks, paths included, into its messages.
    text = text.partition("Traceback (most recent call last)")[0]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


_LONGEST = 600
_LOOKED_AT = 16 * _LONGEST


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(data, list) and data:  # Google's errors of a stream without alt=sse
        data = data[0]
    return data if isinstance(data, dict) else {}


def _error_object(body: bytes) -> dict[str, Any]:
    """Return the error of any provider's body, with `reasons` from Google's details."""
    data = _object(body)
    error = data.get("error", data)
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    details = error.get("details")
    reasons = (
        " ".join(str(d.get("reason", "")) for d in details if isinstance(d, dict))
        if isinstance(details, list)
        else ""
    )
    message = error.get("message")
    return {
        **error,
        "message": message if isinstance(message, str) else "",
        "reasons": reasons,
    }


def _excerpt(body: bytes) -> str:
    text = body[:300].decode("utf-8", "replace").strip()
    return text or "(empty body)"


def _header(headers: Mapping[str, str], name: str) -> str:
    # aiohttp's own headers are looked up without regard to case, a plain dict is not.
    if name in headers:
        return headers[name].strip()
    if not isinstance(headers, dict):
        return ""
    return next((v for k, v in headers.items() if k.lower() == name), "").strip()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None
