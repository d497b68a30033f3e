"""What goes wrong at a provider, and which error a caller gets for it."""

import email.utils
import json
import pickle
import socket
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    ContentFilterError,
    ContextWindowError,
    DiPeOLLMError,
    InvalidRequestError,
    LLMInfraService,
    LLMServiceError,
    LLMTimeoutError,
    ModelNotFoundError,
    QuotaExceededError,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.adapters.failures import (
    CallError,
    clean,
    from_answer,
    request_id,
    retry_after,
    seconds_until,
)
from tests.conftest import PROVIDERS
from tests.provider_server import Answer, Fault, ProviderServer, Raw, error

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "recordings"
MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2:1b",
}
HELLO = [{"role": "user", "content": "Hello"}]

each_provider = pytest.mark.parametrize("provider", PROVIDERS)


# --- real answers ------------------------------------------------------------------

_KEY, _ASK, _LONG = APIKeyError, InvalidRequestError, ContextWindowError
_MODEL, _RATE, _DOWN = ModelNotFoundError, RateLimitError, ServiceUnavailableError
# By folder and the end of the name; what the class is, and the wait that is asked for.
REAL: dict[str, tuple[type[CallError], float | None]] = {
    "anthropic/err400-claude-haiku-4-5-f19c": (_LONG, None),
    "anthropic/err400-claude-opus-4-6-fe55": (_ASK, None),
    "anthropic/err400-claude-sonnet-4-6-15c6": (_ASK, None),
    "anthropic/err400-claude-sonnet-5-c691": (_ASK, None),
    "anthropic/err400-schema-claude-sonnet-4-abb4": (_ASK, None),
    "anthropic/err401-stream-schema-claude-sonnet-4-6-eeca": (_KEY, None),
    "anthropic/err404-claude-sonet-4-8eac": (_MODEL, None),
    "anthropic/err404-stream-invalid-model-358a": (_MODEL, None),
    "anthropic/err404-stream-this-model-doe-1845": (_MODEL, None),
    "anthropic/err429-ratelimit-no-retry-after-transcribed": (_RATE, None),
    "anthropic/err429-ratelimit-transcribed": (_RATE, 16.0),
    "anthropic/err529-overloaded-transcribed": (_DOWN, None),
    "gemini/err400-cachedContents-gemini-2.5-flash-baed": (_ASK, None),
    "gemini/err400-gemini-3.5-flash-1c6b": (_KEY, None),
    "gemini/err400-stream-gemini-2.5-flash-63af": (_KEY, None),
    "gemini/err404-count-tokens-nonexistent-mo-49ee": (_MODEL, None),
    "gemini/err404-gemini-nonexis-d6c8": (_MODEL, None),
    "gemini/err429-gemini-2.5-flash-ab91": (_RATE, 48.0),
    "gemini/err503-overloaded-transcribed": (_DOWN, None),
    "ollama/err400-openai-compat-gpt-oss-0a44": (_LONG, None),
    "ollama/err500-memory-transcribed": (_DOWN, None),
    "openai/err400-gpt-4o-3369": (_ASK, None),
    "openai/err400-gpt-5-ed40": (_ASK, None),
    "openai/err401-gpt-4o-0597": (_KEY, None),
    "openai/err401-gpt-4o-a00c": (_KEY, None),
    "openai/err401-gpt-4o-b988": (_KEY, None),
    "openai/err401-gpt-5.1-bf03": (_KEY, None),
    "openai/err401-models-310d": (_KEY, None),
    "openai/err401-stream-gpt-4o-03ca": (_KEY, None),
    "openai/err404-gpt-3.5-bc1d": (_MODEL, None),
    "openai/err404-stream-does-not-exist-78e6": (_MODEL, None),
    "openai/err503-gpt-4o-f60d": (_DOWN, None),
    "openai_responses/err400-gpt-4o-296a": (_ASK, None),
    "openai_responses/err400-gpt-4o-6012": (_ASK, None),
    "openai_responses/err400-gpt-5-938c": (_LONG, None),
    "openai_responses/err400-o4-e24f": (_ASK, None),
    "openai_responses/err400-stream-gpt-4o-01f4": (_ASK, None),
    "openai_responses/err400-this-model-doe-088e": (_MODEL, None),
    "openai_responses/err401-gpt-4.1-e251": (_KEY, None),
    "openai_responses/err401-gpt-5-0c3c": (_KEY, None),
    "openai_responses/err401-schema-invalid-model-81af": (_KEY, None),
    "openai_responses/err429-ratelimit-noheaders-transcribed": (_RATE, None),
}


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not here")
@pytest.mark.parametrize("name", REAL)
def test_errors_that_providers_really_sent(name: str) -> None:
    """Each recorded refusal gets its class, its waiting time and one line of words."""
    response = json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))["response"]
    cls, wait = REAL[name]

    got = from_answer(
        response["status"],
        response["headers"],
        response["body"].encode(),
        service="some",
        model="m",
    )

    assert type(got) is cls
    assert got.retryable is (cls in {_RATE, _DOWN})
    assert got.retry_after == wait
    assert got.status_code == response["status"]
    assert (got.service, got.model) == ("some", "m")
    assert str(got).startswith(f"some answered {response['status']}: ")
    assert str(got).isprintable()


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not here")
def test_every_recorded_error_is_in_the_table() -> None:
    """A recording that is added is looked at."""
    found = {f"{path.parent.name}/{path.stem}" for path in RECORDINGS.glob("*/err*")}

    assert found == set(REAL)


# --- words to errors -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "cls"),
    [
        (400, {"message": "bad"}, InvalidRequestError),
        (422, {"message": "bad"}, InvalidRequestError),
        (413, {"message": "Request exceeds the maximum size"}, InvalidRequestError),
        (402, {"message": "pay"}, QuotaExceededError),
        (429, {"code": "insufficient_quota", "message": "x"}, QuotaExceededError),
        (429, {"type": "insufficient_quota", "message": "x"}, QuotaExceededError),
        (
            400,
            {"message": "Your credit balance is too low to access the API."},
            QuotaExceededError,
        ),
        (
            400,
            {
                "code": "context_length_exceeded",
                "message": "This model's maximum context length is 8192 tokens.",
            },
            ContextWindowError,
        ),
        (
            400,
            {"message": "prompt is too long: 205000 tokens > 200000 maximum"},
            ContextWindowError,
        ),
        (
            400,
            {
                "message": "The input token count (1200000) exceeds the maximum number"
                " of tokens allowed (1048576).",
                "status": "INVALID_ARGUMENT",
            },
            ContextWindowError,
        ),
        (413, {"message": "prompt is too long"}, ContextWindowError),
        (
            400,
            {"code": "content_policy_violation", "message": "Rejected."},
            ContentFilterError,
        ),
        (
            400,
            {"code": "content_filter", "message": "The response was filtered"},
            ContentFilterError,
        ),
        (
            400,
            {"message": "Output blocked by content filtering policy"},
            ContentFilterError,
        ),
        (400, {"code": "model_not_found", "message": "x"}, ModelNotFoundError),
        # The output's limit is no context window: shortening the messages helps not.
        (
            400,
            {"message": "max_tokens is too large: 99999. This model supports 16384."},
            InvalidRequestError,
        ),
        (
            400,
            {"message": "max_tokens: 99999 > 64000, the maximum of output tokens"},
            InvalidRequestError,
        ),
        (401, {}, APIKeyError),
        (403, {"status": "PERMISSION_DENIED"}, APIKeyError),
        (404, {}, ModelNotFoundError),
        (408, {}, LLMTimeoutError),
        (409, {}, LLMServiceError),
        (418, {}, LLMServiceError),
        (429, {}, RateLimitError),
        (500, {}, ServiceUnavailableError),
        (502, {}, ServiceUnavailableError),
        (504, {}, ServiceUnavailableError),
        (529, {}, ServiceUnavailableError),
        (599, {}, ServiceUnavailableError),
        (307, {}, LLMServiceError),
        # Not every 500 that speaks of a context is for its length.
        (500, {"message": "context canceled"}, ServiceUnavailableError),
        (503, {"message": "exceeds the context"}, ServiceUnavailableError),
        # Not every 403 is for the key, but most are.
        (403, {"message": "Not allowed", "metadata": {}}, APIKeyError),
        (403, {"message": "x", "metadata": {"reasons": []}}, APIKeyError),
        (429, {"message": "quota, limit: 0.5, model: x"}, RateLimitError),
        (429, {"message": "quota, limit: 05, model: x"}, RateLimitError),
    ],
)
def test_class_of_an_error(
    status: int, body: Mapping[str, Any], cls: type[CallError]
) -> None:
    """The status and the provider's code or words decide, and nothing else."""
    got = from_answer(
        status, {}, json.dumps({"error": body}).encode(), service="x", model="m"
    )

    assert type(got) is cls


_QUOTA, _FILTER = QuotaExceededError, ContentFilterError
_OPENROUTER = "Provider returned error"
# What servers were seen to say, in the forms that they say it in: the status, the error,
# and what it is. The sources stand beside the patterns in `failures`.
SAID: dict[str, tuple[int, Any, type[CallError]]] = {
    "Anthropic, with max_tokens": (
        400,
        {
            "type": "invalid_request_error",
            "message": "input length and `max_tokens` exceed context limit: 178959 +"
            " 64000 > 200000, decrease input length or `max_tokens` and try again",
        },
        _LONG,
    ),
    "SGLang": (
        400,
        {
            "message": "The input (61709 tokens) is longer than the model's context"
            " length (32768 tokens).",
            "type": "BadRequestError",
            "code": 400,
        },
        _LONG,
    ),
    "vLLM": (
        400,
        {
            "message": "The decoder prompt (length 10127) is longer than the maximum"
            " model length of 8192. Make sure that `max_model_len` is no smaller than"
            " the number of text tokens.",
            "type": "BadRequestError",
            "code": 400,
        },
        _LONG,
    ),
    "LM Studio": (
        400,
        (
            "The number of tokens to keep from the initial prompt is greater than the"
            " context length. Try to load the model with a"
            " larger context length, or provide a shorter input."
        ),
        _LONG,
    ),
    "LM Studio, older": (
        400,
        (
            "Trying to keep the first 15857 tokens when context the overflows. However, the"
            " model is loaded with context length of only 4096 tokens, which is not enough."
        ),
        _LONG,
    ),
    "LM Studio, newer": (
        400,
        "Cannot truncate prompt with n_keep (15028) >= n_ctx (7424)",
        _LONG,
    ),
    "xAI": (
        400,
        (
            "This model's maximum prompt length is 131072 but the request contains 151312"
            " tokens."
        ),
        _LONG,
    ),
    "text-generation-inference": (
        422,
        (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."
            " Given: 4000 `inputs` tokens and 1024 `max_new_tokens`"
        ),
        _LONG,
    ),
    "llama.cpp": (
        500,
        {
            "code": 500,
            "message": "Context size has been exceeded.",
            "type": "server_error",
        },
        _LONG,
    ),
    "llama.cpp, by its type": (
        500,
        {
            "code": 500,
            "message": "the request is too large. try increasing the context size",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": 1407,
            "n_ctx": 256,
        },
        _LONG,
    ),
    "OpenRouter, of its provider": (
        400,
        {
            "message": _OPENROUTER,
            "code": 400,
            "metadata": {
                "raw": '{"error":{"message":"This model\'s maximum context length is'
                ' 131072 tokens."}}',
                "provider_name": "Novita",
            },
        },
        _LONG,
    ),
    "OpenRouter, of its provider, as an object": (
        400,
        {
            "message": _OPENROUTER,
            "code": 400,
            "metadata": {"raw": {"code": "context_length_exceeded"}},
        },
        _LONG,
    ),
    "OpenRouter, by its type": (
        400,
        {"message": "x", "metadata": {"error_type": "context_length_exceeded"}},
        _LONG,
    ),
    "OpenRouter, moderation": (
        403,
        {
            "message": "Your chosen model requires moderation and your input was flagged",
            "code": 403,
            "metadata": {
                "reasons": ["violence"],
                "flagged_input": "my insufficient balance…",
                "provider_name": "OpenAI",
            },
        },
        _FILTER,
    ),
    "OpenRouter, moderation without the input": (
        403,
        {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"]}},
        _FILTER,
    ),
    "OpenRouter, a provider's filter": (
        403,
        {"message": "x", "metadata": {"error_type": "content_policy_violation"}},
        _FILTER,
    ),
    "OpenAI, a prompt": (
        400,
        {
            "message": "Invalid prompt: your prompt was flagged as potentially violating"
            " our usage policy. Please try again with a different prompt:"
            " https://platform.openai.com/docs/guides/reasoning#advice-on-prompting",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_prompt",
        },
        _FILTER,
    ),
    "OpenRouter, a prompt of another shape": (
        400,
        {"code": "invalid_prompt", "message": "Invalid Responses API request"},
        _ASK,
    ),
    "DeepSeek, a prompt": (
        400,
        {
            "message": "Content Exists Risk",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request_error",
        },
        _FILTER,
    ),
    "OpenAI, a model that is closed to a project": (
        403,
        {
            "message": "Project `proj_x` does not have access to model `gpt-4o`",
            "type": "invalid_request_error",
            "param": None,
            "code": "model_not_found",
        },
        _MODEL,
    ),
    "DeepSeek, a model": (
        400,
        {
            "message": "Model Not Exist",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request_error",
        },
        _MODEL,
    ),
    "OpenRouter, a model": (
        400,
        {"message": "openrouter/foo is not a valid model ID", "code": 400},
        _MODEL,
    ),
    "OpenAI, a country": (
        403,
        {
            "code": "unsupported_country_region_territory",
            "message": "Country, region, or territory not supported",
            "param": None,
            "type": "request_forbidden",
        },
        LLMServiceError,
    ),
    "Anthropic, a limit of the account's owner": (
        400,
        {
            "type": "invalid_request_error",
            "message": "You have reached your specified API usage limits. You will regain"
            " access on 2026-04-01 at 00:00 UTC.",
        },
        _QUOTA,
    ),
    "Anthropic, a limit of its own": (
        429,
        {
            "type": "rate_limit_error",
            "message": "You have reached your API usage limits: your organization has"
            " crossed its monthly API usage threshold, set based on your organization's"
            " API tier. You will regain access on 2026-09-01 at 00:00 UTC.",
            "details": {"error_code": "enforced_spend_limit_reached"},
        },
        _QUOTA,
    ),
    "OpenAI, a limit of the project": (
        429,
        {"code": "project_spend_limit_exceeded", "message": "x"},
        _QUOTA,
    ),
    "OpenAI, no credits": (
        429,
        {"code": "credit_balance_exhausted", "message": "x"},
        _QUOTA,
    ),
    "Gemini, a model that has no free quota": (
        429,
        {
            "code": 429,
            "message": "You exceeded your current quota, please check your plan and"
            " billing details. For more information on this error, head to:"
            " https://ai.google.dev/gemini-api/docs/rate-limits.\n* Quota exceeded for"
            " metric: generativelanguage.googleapis.com/generate_content_free_tier_requests"
            ", limit: 0, model: gemini-2.5-pro\nPlease retry in 48.1s.",
            "status": "RESOURCE_EXHAUSTED",
        },
        _QUOTA,
    ),
}


@pytest.mark.parametrize("kind", SAID)
def test_what_a_server_was_seen_to_say(kind: str) -> None:
    """Its words tell what no status tells, and none of it is tried again."""
    status, error, cls = SAID[kind]

    got = from_answer(status, {}, json.dumps({"error": error}).encode(), service="x")

    assert type(got) is cls
    assert not got.retryable
    assert got.status_code == status


def test_a_request_that_is_larger_than_a_minutes_tokens() -> None:
    """OpenAI's limit for a minute may be less than one request: then no wait helps."""
    error = {
        "message": "Request too large for gpt-4o in organization org-x on tokens per min"
        " (TPM): Limit 30000, Requested 45411. The input or output tokens must be reduced"
        " in order to run successfully.",
        "type": "tokens",
        "param": None,
        "code": "rate_limit_exceeded",
    }

    got = from_answer(429, {}, json.dumps({"error": error}).encode(), service="openai")

    assert type(got) is RateLimitError
    assert not got.retryable


def test_the_words_of_the_provider_behind_a_provider() -> None:
    """What OpenRouter's own provider said is shown, without the key and not in full."""
    raw = "bad key sk-secret-1 " + "x" * 1000
    error = {"message": _OPENROUTER, "code": 400, "metadata": {"raw": raw}}

    got = from_answer(
        400,
        {},
        json.dumps({"error": error}).encode(),
        service="openrouter",
        secret="sk-secret-1",
    )

    assert f"{_OPENROUTER}: bad key [key] xxx" in str(got)
    assert len(str(got)) < 650


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_statuses_that_are_worth_another_try(status: int) -> None:
    """They are retryable, unless the provider says in a header that they are not."""
    told = {"X-Should-Retry": "false"}

    assert from_answer(status, {}, b"", service="x").retryable
    assert not from_answer(status, told, b"", service="x").retryable


@pytest.mark.parametrize("status", [302, 400, 401, 402, 403, 404, 413, 418, 422])
def test_statuses_that_are_not(status: int) -> None:
    """They are refused once and for all, whatever a header says."""
    told = {"x-should-retry": "true"}

    assert not from_answer(status, {}, b"", service="x").retryable
    assert not from_answer(status, told, b"", service="x").retryable


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"[1]",
        b'"x"',
        b"5",
        b"{}",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"error": null}',
        b'{"error": []}',
        b'{"error": 5}',
        b'{"error": {"message": 5, "code": {}, "type": [], "details": {}}}',
        b'{"error": {"message": {"a": 1}, "details": [null, 5, {"retryDelay": 5}]}}',
        b'{"error": {"details": [{"@type": "RetryInfo", "retryDelay": "soon"}]}}',
        b'[{"error": {"message": "in a list"}}]',
    ],
)
@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_body_of_any_form(status: int, body: bytes) -> None:
    """No body, however odd, hides the status that came with it."""
    got = from_answer(status, {}, body, service="x")

    assert got.status_code == status
    assert got.retryable is (status >= 429)
    assert str(got).isprintable()


def test_an_error_that_is_the_whole_body() -> None:
    """Not each server wraps its error; a state of failure beside it hides none of it."""
    body = b'{"status": "failed", "code": "c", "message": "the whole is the error"}'

    got = from_answer(400, {}, body, service="x")

    assert str(got) == "x answered 400: the whole is the error"
    assert got.details == {"code": "c", "type": "failed"}


def test_a_redirect_says_what_to_do() -> None:
    """Where it leads is not followed; the base URL is wrong."""
    got = from_answer(307, {}, b"Moved", service="x")

    assert str(got) == (
        "x answered 307: Moved (a redirect is never followed: fix the base URL)"
    )


def test_what_an_error_keeps() -> None:
    """The provider's code and type, its request id and the wait are on the error."""
    body = b'{"error": {"message": "no", "code": "c", "type": "t"}}'
    headers = {"X-Request-ID": "req_1", "Retry-After": "7"}

    got = from_answer(429, headers, body, service="openai", model="gpt-4o")

    assert str(got) == "openai answered 429: no"
    assert got.details == {"code": "c", "type": "t"}
    assert (got.request_id, got.retry_after, got.attempts) == ("req_1", 7.0, 0)
    copy = pickle.loads(pickle.dumps(got))
    assert type(copy) is RateLimitError
    assert (str(copy), vars(copy)) == (str(got), vars(got))


# --- waits, ids, words ----------------------------------------------------------------


def _retry_info(delay: Any) -> bytes:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    return json.dumps({"error": {"details": [{"@type": "other"}, info]}}).encode()


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({}, b"", None),
        ({"retry-after": "16"}, b"", 16.0),
        ({"Retry-After": " 0.5 "}, b"", 0.5),
        ({"retry-after": "0"}, b"", 0.0),
        ({"retry-after": "-5"}, b"", 0.0),
        ({"retry-after-ms": "250"}, b"", 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, b"", 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, b"", 9.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"", 0.0),
        ({"retry-after": "soon"}, b"", None),
        ({"retry-after": ""}, b"", None),
        ({"retry-after": "nan"}, b"", None),
        ({"retry-after": "inf"}, b"", None),
        ({"retry-after": "1e400"}, b"", None),
        ({"retry-after": "Wed, 99 Oct 2015 07:28:00 GMT"}, b"", None),
        ({}, _retry_info("48s"), 48.0),
        ({}, _retry_info("0.25s"), 0.25),
        ({}, _retry_info("48"), None),
        ({}, _retry_info(48), None),
        ({}, _retry_info("sooner s"), None),
        ({"retry-after": "3"}, _retry_info("48s"), 3.0),
        ({}, b'{"error": {"details": "RetryInfo"}}', None),
    ],
)
def test_retry_after(
    headers: Mapping[str, str], body: bytes, seconds: float | None
) -> None:
    """Milliseconds, seconds, a date, or Google's RetryInfo; what is none of it is None."""
    assert retry_after(headers, body) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0200"])
def test_retry_after_a_date(zone: str) -> None:
    """A date in the future is so many seconds from now, in whatever zone."""
    offset = 7200 if zone == "+0200" else 0
    stamp = email.utils.formatdate(time.time() + 100 + offset, usegmt=True)

    got = retry_after({"retry-after": stamp.replace("GMT", zone)})

    assert got is not None
    assert 90 < got <= 100


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("17", 17.0),
        ("20ms", 0.02),
        ("1s", 1.0),
        ("1m2.5s", 62.5),
        ("6m0s", 360.0),
        ("1h", 3600.0),
        ("1d2h3m4s5ms", 93784.005),
        ("-3", 0.0),
        ("2020-01-01T00:00:00Z", 0.0),
        ("", None),
        ("soon", None),
        ("1x", None),
        ("nan", None),
    ],
)
def test_seconds_until(text: str, seconds: float | None) -> None:
    """A reset is a duration in any of the providers' spellings, or a time."""
    got = seconds_until(text)

    assert got == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("text", ["1.2.3s", ".s", "1..5m", "..ms"])
def test_seconds_until_a_number_that_is_none(text: str) -> None:
    """A header that cannot be read ends no call."""
    assert seconds_until(text) is None


@pytest.mark.parametrize(
    ("headers", "body", "found"),
    [
        ({"x-request-id": "a"}, b"", "a"),
        ({"Request-Id": "b"}, b"", "b"),
        ({"X-Goog-Request-Id": "c"}, b"", "c"),
        ({}, b'{"type": "error", "request_id": "d"}', "d"),
        ({}, b'{"request_id": 5}', None),
        ({}, b'"request_id"', None),
        ({}, b"", None),
    ],
)
def test_request_id(headers: Mapping[str, str], body: bytes, found: str | None) -> None:
    """From a header, else from Anthropic's body."""
    assert request_id(headers, body) == found


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("plain", "plain"),
        ("two\nlines\r\nand\ta tab", "two lines and a tab"),
        ("\x1b[31mred\x1b[0m \x07bell\x00", "[31mred [0m bell"),
        ("\u202eright to left\u2028line", "right to left line"),
        (
            "Incorrect API key: sk-secret-1 sk-secret-1",
            "Incorrect API key: [key] [key]",
        ),
        (
            "Incorrect API key provided: sk-sec**********et-1. You can find",
            "Incorrect API key provided: [key]. You can find",
        ),
        ("Grüße 🥖", "Grüße 🥖"),
        ("x" * 601, "x" * 600 + "…"),
        ("", ""),
    ],
)
def test_words_for_one_line_of_a_log(said: str, line: str) -> None:
    """No key, no control character, one line, and not too long."""
    assert clean(said, "sk-secret-1") == line


def test_a_key_that_is_cut_by_the_end_of_the_line() -> None:
    """The key is taken out before the text is shortened, so no half of it stays."""
    got = clean("x" * 595 + "sk-secret-1", "sk-secret-1")

    assert "sk-" not in got


# --- on the wire ---------------------------------------------------------------------


@pytest.fixture
async def once(keys: StaticAPIKeys) -> AsyncIterator[LLMInfraService]:
    """Open a service that makes one retry at most, and at once."""
    settings = Settings(max_retries=1, retry_wait=0.01, retry_wait_max=0.02, timeout=20)
    async with LLMInfraService(keys, settings=settings) as opened:
        yield opened


async def fails(service: LLMInfraService, provider: str) -> CallError:
    """Make a call that must fail, and return its error."""
    with pytest.raises(DiPeOLLMError) as caught:
        await service.complete(HELLO, MODELS[provider], provider)
    got = caught.value
    assert isinstance(got, APIKeyError | LLMServiceError)
    assert (got.service, got.model) == (provider, MODELS[provider])
    assert str(got).isprintable()
    assert f"sk-test-{provider}" not in str(got)
    return got


STATUSES: dict[int, tuple[type[CallError], int]] = {
    400: (InvalidRequestError, 1),
    401: (APIKeyError, 1),
    402: (QuotaExceededError, 1),
    403: (APIKeyError, 1),
    404: (ModelNotFoundError, 1),
    408: (LLMTimeoutError, 2),
    409: (LLMServiceError, 2),
    413: (InvalidRequestError, 1),
    422: (InvalidRequestError, 1),
    429: (RateLimitError, 2),
    500: (ServiceUnavailableError, 2),
    502: (ServiceUnavailableError, 2),
    503: (ServiceUnavailableError, 2),
    504: (ServiceUnavailableError, 2),
    529: (ServiceUnavailableError, 2),
}


@each_provider
@pytest.mark.parametrize("status", STATUSES)
async def test_a_status(
    once: LLMInfraService, server: ProviderServer, provider: str, status: int
) -> None:
    """Each status has its class and its number of requests, with every provider."""
    headers = {"x-request-id": "req_7"} if provider in {"openai", "ollama"} else {}
    headers = {"request-id": "req_7"} if provider == "anthropic" else headers
    # Of other providers than Anthropic there is no word on it.
    headers["x-should-retry"] = "true"
    server.default = error(provider, status, headers=headers)
    cls, requests = STATUSES[status]

    got = await fails(once, provider)

    assert type(got) is cls
    assert got.status_code == status
    assert got.retryable is (requests > 1)
    assert (got.attempts, len(server.requests)) == (requests, requests)
    assert got.request_id == (None if provider == "google" else "req_7")
    assert str(got).startswith(f"{provider} answered {status}: ")


@each_provider
async def test_a_rate_limit_that_says_when(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """The wait is on the error, from a header or from Google's body."""
    server.default = error(provider, 429, retry_delay=0.05)

    got = await fails(once, provider)

    assert type(got) is RateLimitError
    assert got.retry_after == 0.05
    assert got.attempts == 2


async def test_an_empty_account_is_not_asked_again(
    once: LLMInfraService, server: ProviderServer
) -> None:
    """OpenAI's 429 insufficient_quota is a RateLimitError that waiting does not fix."""
    server.default = error("openai", 429, code="insufficient_quota")

    got = await fails(once, "openai")

    assert type(got) is QuotaExceededError
    assert isinstance(got, RateLimitError)
    assert got.retryable is False
    assert len(server.requests) == 1


@each_provider
async def test_a_proxys_words_in_plain_text(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A 503 of something before the provider is told in its own words."""
    said = b"upstream connect error or disconnect/reset before headers"
    server.default = Raw(503, headers={"content-type": "text/plain"}, body=said)

    got = await fails(once, provider)

    assert type(got) is ServiceUnavailableError
    assert said.decode() in str(got)
    assert len(server.requests) == 2


@each_provider
@pytest.mark.parametrize("kind", ["reset", "close", "reset_mid_body"])
async def test_a_connection_that_breaks(
    once: LLMInfraService, server: ProviderServer, provider: str, kind: str
) -> None:
    """A connection that breaks is tried again, once an attempt, without a status."""
    server.reply(Fault(kind), Fault(kind), Answer())

    got = await fails(once, provider)

    assert type(got) is ServiceUnavailableError
    assert got.retryable
    assert (got.attempts, len(server.requests)) == (2, 2)
    assert got.status_code == (200 if kind == "reset_mid_body" else None)


@each_provider
async def test_nobody_listens(provider: str) -> None:
    """A refused connection is a ServiceUnavailableError that names the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        keys = StaticAPIKeys(
            {
                provider: {
                    "key": f"sk-test-{provider}",
                    "base_url": f"http://127.0.0.1:{port}",
                }
            }
        )
        settings = Settings(max_retries=1, retry_wait=0.01, retry_wait_max=0.02)
        async with LLMInfraService(keys, settings=settings) as service:
            got = await fails(service, provider)

    assert type(got) is ServiceUnavailableError
    assert str(port) in str(got)
    assert (got.status_code, got.attempts) == (None, 2)


HTML = b"<html><body>502 Bad Gateway</body></html>"
NO_ANSWERS: dict[str, bytes] = {
    "html": HTML,
    "empty": b"",
    "spaces": b" \n",
    "null": b"null",
    "number": b"5",
    "list": b"[]",
    "object": b"{}",
    "cut": b'{"choices": [{"message": {"content": "Hel',
    "deep": b"[" * 100_000,
    "no choices": b'{"id": "x", "choices": []}',
    "choices null": b'{"id": "x", "choices": null}',
    "no message": b'{"id": "x", "choices": [{"index": 0}]}',
    "no candidates": b'{"candidates": []}',
    "candidates null": b'{"candidates": null}',
    "no content": b'{"id": "msg_1", "type": "message", "role": "assistant"}',
    "content null": b'{"id": "msg_1", "type": "message", "content": null}',
    "message null": b'{"model": "m", "message": null, "done": true}',
}


@each_provider
@pytest.mark.parametrize("kind", NO_ANSWERS)
async def test_a_200_that_is_no_answer(
    once: LLMInfraService, server: ProviderServer, provider: str, kind: str
) -> None:
    """What is no answer is never returned as an empty one; it is tried again."""
    content_type = "text/html" if kind == "html" else "application/json"
    body = NO_ANSWERS[kind]
    server.default = Raw(headers={"content-type": content_type}, body=body)

    got = await fails(once, provider)

    assert type(got) is ServiceUnavailableError
    assert got.retryable
    assert got.status_code == 200
    assert (got.attempts, len(server.requests)) == (2, 2)


@pytest.mark.parametrize(
    ("provider", "body", "cls"),
    [
        ("openai", {"error": {"message": "x", "code": 429}}, RateLimitError),
        ("openai", {"error": {"message": "x", "code": 401}}, APIKeyError),
        ("openai", {"error": {"message": "x"}}, ServiceUnavailableError),
        ("openai", {"error": "overloaded", "choices": []}, ServiceUnavailableError),
        (
            "openai",
            {"error": {"code": "insufficient_quota", "message": "x"}},
            QuotaExceededError,
        ),
        (
            "anthropic",
            {"type": "error", "error": {"type": "overloaded_error", "message": "x"}},
            ServiceUnavailableError,
        ),
        (
            "anthropic",
            {"type": "error", "error": {"type": "rate_limit_error", "message": "x"}},
            RateLimitError,
        ),
        (
            "anthropic",
            {"type": "error", "error": {"type": "authentication_error"}},
            APIKeyError,
        ),
        (
            "google",
            {"error": {"code": 503, "status": "UNAVAILABLE", "message": "x"}},
            ServiceUnavailableError,
        ),
        (
            "google",
            {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "x"}},
            RateLimitError,
        ),
        ("ollama", {"error": "llama runner terminated"}, ServiceUnavailableError),
        # The code is nearer to the point than the type.
        (
            "openai",
            {
                "type": "error",
                "error": {
                    "type": "invalid_request_error",
                    "code": "rate_limit_exceeded",
                    "message": "x",
                },
            },
            RateLimitError,
        ),
        ("openai", {"error": {"message": "x", "code": "429"}}, RateLimitError),
        ("openai", {"error": {"message": "x", "code": "999"}}, ServiceUnavailableError),
        ("openai", {"error": {"message": "x", "code": True}}, ServiceUnavailableError),
        ("openai", {"error": {"message": "x", "code": "invalid_api_key"}}, APIKeyError),
        ("openai", {"error": {"message": "x", "code": "invalid_image_url"}}, _ASK),
        (
            "openai",
            {"error": {"message": "x", "code": "image_content_policy_violation"}},
            _FILTER,
        ),
        ("openai", {"error": {"message": "x", "code": "content_filter"}}, _FILTER),
        ("openai", {"error": {"message": "x", "code": "model_not_found"}}, _MODEL),
        ("google", {"error": {"message": "x", "status": "INVALID_ARGUMENT"}}, _ASK),
        ("google", {"error": {"message": "x", "status": "RESOURCE_EXHAUSTED"}}, _RATE),
        ("google", {"error": {"message": "x", "status": "UNAVAILABLE"}}, _DOWN),
        (
            "google",
            {"error": {"message": "x", "status": "CANCELLED"}},
            LLMServiceError,
        ),
        # LM Studio's, and Ollama's
        ("openai", {"error": {"message": SAID["LM Studio"][1]}}, _LONG),
        ("openai", {"error": "Context size has been exceeded."}, _LONG),
        ("ollama", {"error": "the input length exceeds the context length"}, _LONG),
    ],
)
async def test_a_200_that_is_an_error(
    once: LLMInfraService,
    server: ProviderServer,
    provider: str,
    body: Mapping[str, Any],
    cls: type[CallError],
) -> None:
    """Its own words decide on the class, and the status stays the one that was sent."""
    server.default = Raw(body=json.dumps(body).encode())

    got = await fails(once, provider)

    assert type(got) is cls
    assert got.status_code == 200
    assert len(server.requests) == (2 if got.retryable else 1)


TOO_LONG = {
    "openai": (
        "This model's maximum context length is 128000 tokens. However, your messages"
        " resulted in 250000 tokens. Please reduce the length of the messages."
    ),
    "anthropic": "prompt is too long: 250000 tokens > 200000 maximum",
    "google": (
        "The input token count (1250000) exceeds the maximum number of tokens allowed"
        " (1048576)."
    ),
    "ollama": "prompt too long; exceeded max context length by 1000 tokens",
}


@each_provider
async def test_a_conversation_that_is_too_long(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A 400 for its length is a ContextWindowError, in whatever words."""
    server.default = error(provider, 400, TOO_LONG[provider])

    got = await fails(once, provider)

    assert type(got) is ContextWindowError
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("provider", "code", "said"),
    [
        ("openai", "content_policy_violation", "Your request was rejected."),
        ("openai", "content_filter", "The response was filtered."),
        ("anthropic", None, "Output blocked by content filtering policy"),
    ],
)
async def test_content_that_is_refused(
    once: LLMInfraService,
    server: ProviderServer,
    provider: str,
    code: str | None,
    said: str,
) -> None:
    """A 400 for its content is a ContentFilterError."""
    server.default = error(provider, 400, said, code=code)

    got = await fails(once, provider)

    assert type(got) is ContentFilterError
    assert len(server.requests) == 1


@each_provider
async def test_a_key_that_the_provider_refuses(
    server: ProviderServer, provider: str
) -> None:
    """Each provider's own refusal of a bad key, Google's 400 too, is an APIKeyError."""
    key = f"sk-bad-{provider}-0123456789"
    if provider == "ollama":
        server.default = error(provider, 401, "unauthorized")
    keys = StaticAPIKeys({"k": {"key": key, "base_url": server.base_url(provider)}})

    async with LLMInfraService(keys, settings=Settings()) as service:
        with pytest.raises(APIKeyError) as caught:
            await service.complete(HELLO, MODELS[provider], "k", service=provider)

    assert caught.value.status_code == (400 if provider == "google" else 401)
    assert len(server.requests) == 1
    assert key[:8] not in str(caught.value)


@each_provider
@pytest.mark.parametrize("status", [200, 400, 401, 500])
async def test_an_answer_that_echoes_the_key(
    once: LLMInfraService, server: ProviderServer, provider: str, status: int
) -> None:
    """Whatever the provider repeats, no line, no escape and no key reaches a log."""
    said = f"bad key sk-test-{provider}\nsecond line \x1b[31mred"
    server.default = error(provider, status, said)

    got = await fails(once, provider)

    assert "bad key [key] second line [31mred" in str(got)
    assert f"sk-test-{provider}" not in repr(vars(got))


@each_provider
async def test_a_model_that_is_not_there(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A model's wrong name is a ModelNotFoundError that shows the name."""
    with pytest.raises(ModelNotFoundError, match="no-such-model") as caught:
        await once.complete(HELLO, "no-such-model", provider, service=provider)

    assert caught.value.model == "no-such-model"
    assert len(server.requests) == 1


@each_provider
async def test_a_stranger_in_the_answer(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """What LiteLLM raises on its own account has no traceback in its message."""
    odd: dict[str, Any] = {
        "choices": [{"message": {"content": {"a": 1}, "tool_calls": 5}}],
        "content": [{"type": "tool_use", "input": 5}, 5],
        "candidates": [{"content": {"parts": [{"functionCall": 5}]}}],
        "message": {"content": 5, "tool_calls": [5]},
    }
    server.default = Raw(body=json.dumps(odd).encode())

    got = await fails(once, provider)

    assert "Traceback" not in str(got)
    assert ".py" not in str(got)
    assert isinstance(got, LLMServiceError)
