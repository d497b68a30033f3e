"""Reads an HTTP answer that is not what was asked for, and says which error it is.

Pure: status, headers and body in, an exception of `errors` out. It classifies by what
was really on the wire, because LiteLLM's own exceptions change status numbers and guess
by words (its 529 is a 500, its 502 from Gemini is a 500 too).
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from dipeo_llm.errors import (
    APIKeyError,
    CallError,
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

_REQUEST_ID_HEADERS = ("x-request-id", "request-id", "x-goog-request-id")

# Words of the providers' own messages, from real answers of each. Codes come first
# where a provider has them; Anthropic, Google and Ollama have only words for these.
# The last three lines are the servers' that run models at home, and xAI's: LM Studio
# (github.com/lmstudio-ai/lmstudio-bug-tracker/issues/2322), llama.cpp, SGLang, vLLM and
# text-generation-inference, read 2026-11-25.
_TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|context window"
    r"|exceeds? (?:the )?(?:available )?context|exceeded max context length"
    r"|prompt is too long|prompt too long|input token count.{0,60}exceeds"
    r"|too many tokens|context size has been exceeded|maximum prompt length is"
    r"|(?:longer|greater) than the (?:model's |maximum )?(?:context|model) length"
    r"|context length of only|n_keep.{0,12}>= n_ctx|`inputs` tokens \+",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"content_policy_violation|content_filter|content management policy"
    r"|content filtering policy|blocked by .{0,20}safety|moderation_blocked"
    # OpenAI's invalid_prompt, a code that it has for other prompts too; DeepSeek.
    r"|flagged as potentially violating|content exists risk",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(
    r"insufficient_quota|credit balance is too low|billing_hard_limit_reached"
    r"|billing_not_active|insufficient balance|credit_balance_exhausted"
    # Limits of a month: https://developers.openai.com/api/docs/guides/error-codes, and
    # https://platform.claude.com/docs/en/api/rate-limits, where one that the owner of
    # the account has set is a 400. Both read 2026-11-25.
    r"|spend_limit_(?:reached|exceeded)|organization_usage_limit_exceeded"
    r"|reached your specified (?:workspace )?API usage limits",
    re.IGNORECASE,
)
# A model that the account has no quota for, in Gemini's words; 0.5 is a quota.
_NO_QUOTA = re.compile(r"limit: 0(?!\.?\d)")
_NO_MODEL = re.compile(
    r"model_not_found|model not exist|is not a valid model ID", re.IGNORECASE
)
# OpenRouter's moderation, see `_reasons`.
_FLAGGED = re.compile(r"flagged_input|content_policy_violation")
_NO_COUNTRY = re.compile(r"unsupported_country_region_territory")
_BAD_KEY = re.compile(r"API_KEY_INVALID|API key not valid|API key expired")
_ECHOED_KEY = re.compile(r"(API key provided: )\S+?(?=\.?(?:\s|$))")
# More than a minute's tokens in one request: no wait makes it fit.
_TOO_LARGE = re.compile(r"tokens must be reduced in order to run")

# What words make of a status, the first row that fits; then what it is without words.
_BY_WORDS: tuple[tuple[frozenset[int], re.Pattern[str], type[CallError]], ...] = (
    (frozenset({400, 403, 429}), _NO_MONEY, QuotaExceededError),
    (frozenset({429}), _NO_QUOTA, QuotaExceededError),
    (frozenset({400}), _BAD_KEY, APIKeyError),
    # llama.cpp says it with 500 (github.com/ggml-org/llama.cpp/pull/15780).
    (frozenset({400, 413, 422, 500}), _TOO_LONG, ContextWindowError),
    (frozenset({400, 422}), _REFUSED, ContentFilterError),
    # OpenAI says 403 for a model that is closed to a project, and on its Responses
    # endpoint 400 for one that it does not know; so do DeepSeek and OpenRouter.
    (frozenset({400, 403}), _NO_MODEL, ModelNotFoundError),
    (frozenset({403}), _FLAGGED, ContentFilterError),
    (frozenset({403}), _NO_COUNTRY, LLMServiceError),
)
_BY_STATUS: Mapping[int, type[CallError]] = {
    400: InvalidRequestError,
    401: APIKeyError,
    402: QuotaExceededError,
    403: APIKeyError,
    404: ModelNotFoundError,
    408: LLMTimeoutError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: RateLimitError,
}
_TRY_AGAIN = frozenset({409, 425})

# What the codes, types and states of errors stand for that come with 200, in lower
# case: Anthropic's types, OpenAI's codes
# (openai-python, src/openai/types/responses/response_error.py, 2026-11-25) and Google's
# states (google/rpc/code.proto).
_BY_NAME: Mapping[str, int] = {
    "invalid_request_error": 400,
    "invalid_prompt": 400,
    "invalid_image": 400,
    "invalid_image_format": 400,
    "invalid_base64_image": 400,
    "invalid_image_url": 400,
    "invalid_image_mode": 400,
    "image_too_large": 400,
    "image_too_small": 400,
    "image_parse_error": 400,
    "image_content_policy_violation": 400,
    "image_file_too_large": 400,
    "image_file_not_found": 400,
    "empty_image_file": 400,
    "unsupported_image_media_type": 400,
    "invalid_argument": 400,
    "failed_precondition": 400,
    "out_of_range": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "unauthenticated": 401,
    "billing_error": 402,
    "permission_error": 403,
    "permission_denied": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "not_found": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "resource_exhausted": 429,
    "cancelled": 499,
    "unavailable": 503,
    "timeout_error": 504,
    "deadline_exceeded": 504,
    "overloaded_error": 529,
}
_STATUS = re.compile(r"[45]\d\d")


def from_answer(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    service: str,
    model: str | None = None,
    secret: str = "",
) -> CallError:
    """Make the error for an answer of a provider.

    Args:
        status: The status on the wire.
        headers: Its headers, looked up without regard to case.
        body: Its body, or as much of it as was read.
        service: The provider.
        model: The model that was asked for.
        secret: The key, to be taken out of what the provider says.
    """
    error = _error_object(body)
    said = error["message"] or _excerpt(body)
    words = {name: value for name, value in error.items() if isinstance(value, str)}
    code, kind = words.get("code"), words.get("type") or words.get("status")
    text = f"{code} {kind} {error['reasons']} {said}"[:_LOOKED_AT]
    cls, retryable = _classify(_meaning(status, error, text), text)
    if _header(headers, "x-should-retry") == "false":
        retryable = False
    return cls(
        f"{service} answered {status}: {clean(said, secret)}"
        + (_REDIRECT if 300 <= status < 400 else ""),
        service=service,
        model=model,
        status_code=status,
        retry_after=retry_after(headers, body),
        retryable=retryable,
        request_id=clean(request_id(headers, body) or "", secret) or None,
        details={
            name: clean(word, secret)
            for name, word in (("code", code), ("type", kind))
            if word
        },
    )


_REDIRECT = " (a redirect is never followed: fix the base URL)"


def _meaning(status: int, error: Mapping[str, Any], text: str) -> int:
    """Find what an error that came with a 2xx stands for; else it is the status."""
    if status >= 300:
        return status
    # The code is nearer to the point: rate_limit_exceeded has invalid_request_error for
    # its type.
    for name in (error.get("code"), error.get("type"), error.get("status")):
        if not isinstance(name, str | int):
            continue
        if _STATUS.fullmatch(str(name)):
            return int(name)
        if found := _BY_NAME.get(str(name).lower()):
            return found
    return 400 if _REFUSED.search(text) else 500


def _classify(status: int, text: str) -> tuple[type[CallError], bool]:
    """Name the class for a status and the provider's words, and whether to try again."""
    cls = next(
        (c for statuses, w, c in _BY_WORDS if status in statuses and w.search(text)),
        _BY_STATUS.get(
            status, ServiceUnavailableError if status >= 500 else LLMServiceError
        ),
    )
    again = cls.default_retryable or status in _TRY_AGAIN
    return cls, again and not _TOO_LARGE.search(text)


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
    content_type: str,
    body: bytes,
    has_answer: Callable[[Mapping[str, Any]], bool] = lambda _: True,
) -> tuple[dict[str, Any], str | None]:
    """Read the body of a 200.

    Args:
        content_type: For the reason.
        body: The whole body.
        has_answer: Says whether the JSON holds an answer in the provider's format.

    Returns:
        The JSON, and the reason why it is not an answer; None if it is one. An error
        object of the provider is returned under the key "error".
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
    if error := error_in(data):
        return {**data, "error": error}, None
    if has_answer(data):
        return data, None
    fields = ", ".join(sorted(data)[:8]) or "nothing"
    return data, f"it does not hold an answer, only {fields}"


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
    """Return the provider's name for the request, as it is."""
    for name in _REQUEST_ID_HEADERS:
        if found := _header(headers, name):
            return found
    if b'"request_id"' in body[:65536]:
        in_body = _object(body).get("request_id")
        return in_body if isinstance(in_body, str) else None
    return None


def clean(text: str, secret: str = "") -> str:
    """Make a provider's words fit for one line of a log: no key, no control character."""
    for form in _spellings(secret):
        text = text.replace(form, "[key]")
    # The key is out already, so this cut hides none; what follows walks the text.
    text = text[:_LOOKED_AT]
    text = _ECHOED_KEY.sub(r"\1[key]", text)
    # LiteLLM puts whole tracebacks, paths included, into its messages.
    text = text.partition("Traceback (most recent call last)")[0]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


def _spellings(secret: str) -> set[str]:
    """Return how an echo may write a key: as it is, in JSON, and in a URL."""
    if not secret:
        return set()
    in_json = json.dumps(secret)[1:-1]
    return {secret, in_json, in_json.replace("/", "\\/"), quote(secret, safe="")}


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


def error_in(data: Mapping[str, Any]) -> Any:
    """Return what an answer or an event says went wrong; nothing that is true if nothing.

    OpenRouter puts it into the choice where it has begun to answer
    (https://openrouter.ai/docs/api/reference/errors-and-debugging, 2026-11-25); an answer
    of OpenAI's Responses may have failed without a word why.
    """
    choices, state = data.get("choices"), data.get("status")
    first = choices[0] if isinstance(choices, list) and choices else None
    return (
        data.get("error")
        or (isinstance(first, dict) and first.get("error"))
        or (state in ("failed", "cancelled") and data)
    )


def _error_object(body: bytes) -> dict[str, Any]:
    """Return the error of any provider's body, with its `message` and `reasons` as text."""
    data = _object(body)
    error = error_in(data) or data
    if not isinstance(error, dict):
        error = {"message": error}
    metadata = error.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    said = error.get("message")
    # OpenRouter: "Provider returned error", and in `raw` what the provider said.
    told = [said if isinstance(said, str) else "", _as_text(metadata.get("raw"))]
    return {
        **error,
        "message": ": ".join(filter(None, told)),
        "reasons": " ".join(
            reason
            for reason in _reasons(error.get("details"), metadata)
            if isinstance(reason, str)
        ),
    }


def _reasons(details: Any, metadata: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the codes that are told deeper in an error than its own."""
    if isinstance(details, list):  # Google's
        yield from (d.get("reason") for d in details if isinstance(d, dict))
    elif isinstance(details, dict):  # Anthropic's
        yield details.get("error_code")
    yield metadata.get("error_type")  # OpenRouter's
    if metadata.get("flagged_input") or metadata.get("reasons"):
        yield "flagged_input"


def _as_text(value: Any) -> str:
    if not value or isinstance(value, str):
        return value or ""
    try:
        return json.dumps(value)
    except RecursionError:
        return ""


def _excerpt(body: bytes) -> str:
    # More than is shown: `clean` cuts when the key is out, so that no half of it stays.
    text = body[:_LOOKED_AT].decode("utf-8", "replace").strip()
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
