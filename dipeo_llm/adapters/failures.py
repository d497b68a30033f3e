"""Maps a failed HTTP response to an exception of `errors`.

Pure: status, headers and body in, an exception out. It reads the response itself,
because LiteLLM's own exceptions change status numbers (Anthropic's 529 and Gemini's 502
become 500). The patterns are shared by all providers, because compatible servers and
gateways use each other's wording.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

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
from dipeo_llm.key_shapes import pattern_of

_REQUEST_ID_HEADERS = ("x-request-id", "request-id", "x-goog-request-id")

# Patterns for the codes and messages of real responses. Anthropic, Google and Ollama
# have no codes for these errors. The responses and their sources are in
# tests/error_bodies.jsonl.
_TOO_LONG = re.compile(
    # Codes: OpenAI, llama.cpp, GitHub Copilot, GitHub Models, vMLX, LiteLLM's proxy,
    # Ark, Qianfan.
    r"context_length_exceeded|exceed_context_size|prompt_tokens_exceeded"
    r"|tokens_limit_reached|prompt_too_long|ContextWindowExceeded|OutofContextError"
    r"|(?:tokens|characters)_too_long"
    # OpenAI and most compatible servers.
    r"|maximum context length|context window|reduce the length of the messages"
    r"|exceeds? (?:the )?(?:available )?context|exceeded max context length"
    r"|context size has been exceeded|input tokens exceed the configured limit"
    r"|Invalid '(?:messages|input)[\w.\[\]]*\.(?:content|text)': string too long"
    # Anthropic, Bedrock, Cohere. Bedrock's "too many tokens per day" is a rate limit.
    r"|prompt is too long|prompt too long|input is too long|Input Tokens Exceeded"
    r"|too many tokens(?! per|, please wait)"
    # Google AI Studio, Vertex.
    r"|input token count.{0,60}exceeds|input token count is \d+ but model only supports"
    # Ark, SGLang, TensorRT-LLM: "Input length 203743 exceeds the maximum length 202752".
    r"|(?:input|prompt) length (?:\(?\d+(?: tokens)?\)? )?exceeds"
    r"|exceed max message tokens"
    # SGLang, vLLM, LM Studio.
    r"|(?:longer|greater) than the (?:model's |maximum )?(?:context|model) length"
    r"|context length of only|n_keep.{0,12}>= n_ctx"
    # Moonshot, DashScope, Z.ai, SiliconFlow, GitHub Copilot, xAI.
    r"|exceeded model token limit|model max length exceeded|total message size \d+ exceeds"
    r"|range of input length should be|prompt exceeds max length"
    r"|prompt_tokens \(\d+\) must be less than|exceeded max_prompt_tokens"
    r"|prompt token count of \d+ exceeds"
    r"|maximum prompt length is"
    # text-generation-inference, and Together for older models.
    r"|`inputs` tokens \+|`inputs` must have less than",
    re.IGNORECASE,
)
# vLLM names the context's length here too, but it is the output that does not fit.
_OUTPUT_TOO_LONG = re.compile(r"max_(?:completion_)?tokens['`]? is too large")
_REFUSED = re.compile(
    r"content_policy_violation|content_filter|content management policy"
    r"|content filtering policy|blocked by .{0,20}safety|moderation_blocked"
    # OpenAI, whose code invalid_prompt has other meanings too; DeepSeek, DashScope, Ark,
    # Zhipu, New API.
    r"|flagged as potentially violating|content exists risk|data_?inspection_?failed"
    r"|SensitiveContentDetected|不安全或敏感内容|sensitive_words_detected",
    re.IGNORECASE,
)
_OUT_OF_CREDIT = re.compile(
    r"insufficient_quota|credit balance is too low|billing_hard_limit_reached"
    r"|billing_not_active|insufficient balance|credit_balance_exhausted"
    # Monthly limits: https://developers.openai.com/api/docs/guides/error-codes and
    # https://platform.claude.com/docs/en/api/rate-limits, both read 2026-11-25.
    # Anthropic sends 400 for a limit that the account's owner has set.
    r"|spend_limit_(?:reached|exceeded)|organization_usage_limit_exceeded"
    r"|reached your specified (?:workspace )?API usage limits",
    re.IGNORECASE,
)
# Gemini's wording for a model without a quota; "limit: 0.5" is a quota.
_NO_QUOTA = re.compile(r"limit: 0(?!\.?\d)")
_NO_MODEL = re.compile(
    r"model_not_found|model not exist|is not a valid model ID", re.IGNORECASE
)
# OpenRouter's moderation, see `_reasons`; xAI.
_FLAGGED = re.compile(
    r"flagged_input|content_policy_violation|Content violates usage guidelines"
)
_NO_COUNTRY = re.compile(r"unsupported_country_region_territory")
_BAD_KEY = re.compile(r"API_KEY_INVALID|API key not valid|API key expired")
_ECHOED_KEY = re.compile(r"(API key provided: )\S+?(?=\.?(?:\s|$))")
# A single request that exceeds the limit of a minute (OpenAI, Groq) never succeeds.
_PER_MINUTE = re.compile(r"tokens per min")
_NEVER_FITS = re.compile(
    r"tokens must be reduced in order to run|please reduce your message size"
)

# The first row whose status and pattern match decides; then the status alone.
_BY_WORDS: tuple[tuple[frozenset[int], re.Pattern[str], type[CallError]], ...] = (
    (frozenset({400, 403, 429}), _OUT_OF_CREDIT, QuotaExceededError),
    (frozenset({429}), _NO_QUOTA, QuotaExceededError),
    (frozenset({400}), _BAD_KEY, APIKeyError),
    (frozenset({413}), _PER_MINUTE, RateLimitError),
    (frozenset({400}), _OUTPUT_TOO_LONG, InvalidRequestError),
    # llama.cpp sends 500 (https://github.com/ggml-org/llama.cpp/pull/15780).
    (frozenset({400, 413, 422, 500}), _TOO_LONG, ContextWindowError),
    (frozenset({400, 422}), _REFUSED, ContentFilterError),
    # OpenAI sends 403 for a model that is closed to a project, and its Responses
    # endpoint 400 for an unknown model, as do DeepSeek and OpenRouter.
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
_RETRYABLE = frozenset({409, 425})

# The status that an error's code, type or state stands for, where the error comes with
# 200; in lower case. Anthropic's types, OpenAI's codes (openai-python,
# src/openai/types/responses/response_error.py, 2026-11-25), Google's states
# (google/rpc/code.proto).
_STATUS_OF: Mapping[str, int] = {
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
    """Return the exception for a provider's error response.

    Args:
        status: The HTTP status.
        headers: The headers, in any case.
        body: The body, or the part of it that was read.
        service: The provider.
        model: The requested model.
        secret: The key, which is redacted in the provider's message.
    """
    error = _error_object(body)
    message = error["message"] or _excerpt(body)
    words = {name: value for name, value in error.items() if isinstance(value, str)}
    code, kind = words.get("code"), words.get("type") or words.get("status")
    text = f"{code} {kind} {error['reasons']} {message}"[:_MOST_READ]
    cls, retryable = _classify(_meaning(status, error, text), text)
    if _header(headers, "x-should-retry") == "false":
        retryable = False
    return cls(
        f"{service} answered {status}: {clean(message, secret)}"
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
    """Return the status that an error with a 2xx stands for; other statuses as is."""
    if status >= 300:
        return status
    # The code is more precise than the type: OpenAI's rate_limit_exceeded has the type
    # invalid_request_error.
    for name in (error.get("code"), error.get("type"), error.get("status")):
        if not isinstance(name, str | int):
            continue
        if _STATUS.fullmatch(str(name)):
            return int(name)
        if found := _STATUS_OF.get(str(name).lower()):
            return found
    return 400 if _REFUSED.search(text) else 500


def _classify(status: int, text: str) -> tuple[type[CallError], bool]:
    """Return the exception class, and whether a retry may succeed."""
    cls = next(
        (c for statuses, w, c in _BY_WORDS if status in statuses and w.search(text)),
        _BY_STATUS.get(
            status, ServiceUnavailableError if status >= 500 else LLMServiceError
        ),
    )
    retryable = cls.default_retryable or status in _RETRYABLE
    return cls, retryable and not _NEVER_FITS.search(text)


def loads(data: bytes) -> Any:
    """Parse JSON, with U+FFFD for lone surrogates, which cannot be encoded.

    Raises:
        ValueError, RecursionError: The data is not valid JSON, or nested too deeply.
    """
    value = json.loads(data)
    if _SURROGATE.search(data):
        text = json.dumps(value, ensure_ascii=False)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        value = json.loads(whole)
    return value


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


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
    """Return the seconds that the provider asks to wait, or None.

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
    """Return a reset such as "1m2.5s", "20ms", "17" or an ISO 8601 time in seconds."""
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
    """Return the provider's request id, unchanged."""
    for name in _REQUEST_ID_HEADERS:
        if found := _header(headers, name):
            return found
    if b'"request_id"' in body[:65536]:
        in_body = _object(body).get("request_id")
        return in_body if isinstance(in_body, str) else None
    return None


def clean(text: str, secret: str = "") -> str:
    """Make a provider's message fit for one log line: no key, no control characters."""
    if secret and (pattern := pattern_of({secret})):
        text = pattern.sub("[key]", text)
    # Cut only after the redaction, so that no part of a key remains.
    text = text[:_MOST_READ]
    text = _ECHOED_KEY.sub(r"\1[key]", text)
    # LiteLLM puts tracebacks, with paths, into its messages.
    text = text.partition("Traceback (most recent call last)")[0]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "…"


_LONGEST = 600
_MOST_READ = 16 * _LONGEST


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(data, list) and data:  # Google, for a stream without alt=sse
        data = data[0]
    return data if isinstance(data, dict) else {}


def error_in(data: Mapping[str, Any]) -> Any:
    """Return the error in a response or an event; without one, the value is falsy.

    OpenRouter puts the error into the choice once it has begun to answer
    (https://openrouter.ai/docs/api/reference/errors-and-debugging, 2026-11-25). A
    response of OpenAI's Responses endpoint may fail without an error object.
    """
    choices, state = data.get("choices"), data.get("status")
    first = choices[0] if isinstance(choices, list) and choices else None
    return (
        data.get("error")
        or (isinstance(first, dict) and first.get("error"))
        or (state in ("failed", "cancelled") and data)
    )


def _error_object(body: bytes) -> dict[str, Any]:
    """Return the error of any provider's body; `message` and `reasons` are strings."""
    data = _object(body)
    error = error_in(data) or data
    if not isinstance(error, dict):
        error = {"message": error}
    metadata = error.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    message = error.get("message")
    # OpenRouter's message is "Provider returned error"; `raw` is the provider's own.
    messages = [
        message if isinstance(message, str) else "",
        _as_text(metadata.get("raw")),
    ]
    return {
        **error,
        "message": ": ".join(filter(None, messages)),
        "reasons": " ".join(
            reason
            for reason in _reasons(error.get("details"), metadata)
            if isinstance(reason, str)
        ),
    }


def _reasons(details: Any, metadata: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the codes that are nested in an error."""
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
    # `clean` shortens this further, after it has redacted the key.
    text = body[:_MOST_READ].decode("utf-8", "replace").strip()
    return text or "(empty body)"


def _header(headers: Mapping[str, str], name: str) -> str:
    # Only plain dicts are case-sensitive; aiohttp's headers are not.
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
