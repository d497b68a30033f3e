"""Failed responses of providers, and the exceptions that callers get for them."""

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
    CallError,
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
    errors,
)
from dipeo_llm.adapters.failures import (
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
# A recording, the class of its error, and the requested wait in seconds.
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
    """Each recorded error gets its class, its wait and a printable message."""
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
    """A new recording must be added to the table."""
    found = {f"{path.parent.name}/{path.stem}" for path in RECORDINGS.glob("*/err*")}

    assert found == set(REAL)


# --- messages to errors -----------------------------------------------------------------


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
        # A limit of the output is not the context window.
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
        # Not every 500 that mentions a context is about its length.
        (500, {"message": "context canceled"}, ServiceUnavailableError),
        (503, {"message": "exceeds the context"}, ServiceUnavailableError),
        # A 403 without a known code is about the key.
        (403, {"message": "Not allowed", "metadata": {}}, APIKeyError),
        (403, {"message": "x", "metadata": {"reasons": []}}, APIKeyError),
        (429, {"message": "quota, limit: 0.5, model: x"}, RateLimitError),
        (429, {"message": "quota, limit: 05, model: x"}, RateLimitError),
    ],
)
def test_class_of_an_error(
    status: int, body: Mapping[str, Any], cls: type[CallError]
) -> None:
    """The status, the code and the message decide."""
    got = from_answer(
        status, {}, json.dumps({"error": body}).encode(), service="x", model="m"
    )

    assert type(got) is cls


# One line per body: the server, the status, the expected error, the body, and where it
# was seen (read 2026-11-25).
ERROR_BODIES = {
    row["server"]: row
    for row in map(
        json.loads,
        Path(__file__).with_name("error_bodies.jsonl").read_text("utf-8").splitlines(),
    )
}


@pytest.mark.parametrize("server_name", ERROR_BODIES)
def test_a_real_error(server_name: str) -> None:
    """The status, the code and the message decide on the class and on retrying."""
    row = ERROR_BODIES[server_name]

    got = from_answer(row["status"], {}, json.dumps(row["body"]).encode(), service="x")

    assert type(got) is getattr(errors, row["error"])
    assert got.retryable is row["retryable"]
    assert got.status_code == row["status"]


@pytest.mark.parametrize(
    "server_name",
    [
        name
        for name, row in ERROR_BODIES.items()
        if row["error"] == "ContextWindowError"
    ],
)
def test_a_prompt_that_is_too_long_with_200(server_name: str) -> None:
    """Gateways wrap the error of a provider into a 200."""
    body = json.dumps(ERROR_BODIES[server_name]["body"]).encode()

    got = from_answer(200, {}, body, service="x")

    assert type(got) is ContextWindowError
    assert not got.retryable


def test_the_message_of_a_provider_behind_openrouter() -> None:
    """OpenRouter's error shows the provider's message, redacted and shortened."""
    raw = "bad key sk-secret-1 " + "x" * 1000
    error = {"message": "Provider returned error", "metadata": {"raw": raw}}

    got = from_answer(
        400,
        {},
        json.dumps({"error": error}).encode(),
        service="openrouter",
        secret="sk-secret-1",
    )

    assert "Provider returned error: bad key [key] xxx" in str(got)
    assert len(str(got)) < 650


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_retryable_statuses(status: int) -> None:
    """They are retryable unless a header says otherwise."""
    told = {"X-Should-Retry": "false"}

    assert from_answer(status, {}, b"", service="x").retryable
    assert not from_answer(status, told, b"", service="x").retryable


@pytest.mark.parametrize("status", [302, 400, 401, 402, 403, 404, 413, 418, 422])
def test_statuses_that_are_not_retryable(status: int) -> None:
    """They are not retryable, whatever a header says."""
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
    """No body hides the status."""
    got = from_answer(status, {}, body, service="x")

    assert got.status_code == status
    assert got.retryable is (status >= 429)
    assert str(got).isprintable()


def test_an_error_that_is_the_whole_body() -> None:
    """A body without an error object is the error itself."""
    body = b'{"status": "failed", "code": "c", "message": "the whole is the error"}'

    got = from_answer(400, {}, body, service="x")

    assert str(got) == "x answered 400: the whole is the error"
    assert got.details == {"code": "c", "type": "failed"}


def test_a_redirect_says_what_to_do() -> None:
    """Redirects are not followed; the base URL must be fixed."""
    got = from_answer(307, {}, b"Moved", service="x")

    assert str(got) == (
        "x answered 307: Moved (a redirect is never followed: fix the base URL)"
    )


def test_what_an_error_keeps() -> None:
    """The error has the code, the type, the request id and the wait, and pickles."""
    body = b'{"error": {"message": "no", "code": "c", "type": "t"}}'
    headers = {"X-Request-ID": "req_1", "Retry-After": "7"}

    got = from_answer(429, headers, body, service="openai", model="gpt-4o")

    assert str(got) == "openai answered 429: no"
    assert got.details == {"code": "c", "type": "t"}
    assert (got.request_id, got.retry_after, got.attempts) == ("req_1", 7.0, 0)
    copy = pickle.loads(pickle.dumps(got))
    assert type(copy) is RateLimitError
    assert (str(copy), vars(copy)) == (str(got), vars(got))


# --- waits, ids, messages ----------------------------------------------------------------


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
    """Milliseconds, seconds, a date, or Google's RetryInfo; None for anything else."""
    assert retry_after(headers, body) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0200"])
def test_retry_after_a_date(zone: str) -> None:
    """A date gives the seconds from now, in any time zone."""
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
    """A reset is a duration in any provider's format, or a time."""
    got = seconds_until(text)

    assert got == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("text", ["1.2.3s", ".s", "1..5m", "..ms"])
def test_seconds_until_an_invalid_number(text: str) -> None:
    """An unreadable header is None."""
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
    """The id comes from a header, else from Anthropic's body."""
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
def test_a_message_for_one_log_line(said: str, line: str) -> None:
    """One line without the key and control characters, and not too long."""
    assert clean(said, "sk-secret-1") == line


@pytest.mark.parametrize(
    ("secret", "said", "line"),
    [
        ("x", "exceeds the limit, x", "exceeds the limit, [key]"),
        ("key-1", "monkey-1 sent key-1.", "monkey-1 sent [key]."),
        (
            "a/b",
            r'path "a/b", "a\/b", a%2Fb, ca/bd',
            'path "[key]", "[key]", [key], ca/bd',
        ),
        ("x.y", "xzy x.y", "xzy [key]"),
        ("k-long-8", "mk-long-8s", "m[key]s"),
    ],
)
def test_a_short_key_is_redacted_as_a_whole_token(
    secret: str, said: str, line: str
) -> None:
    """A key of fewer than eight characters does not destroy words that contain it."""
    assert clean(said, secret) == line


def test_a_key_that_is_cut_by_the_end_of_the_line() -> None:
    """The key is redacted before the text is cut, so no part of it remains."""
    got = clean("x" * 595 + "sk-secret-1", "sk-secret-1")

    assert "sk-" not in got


# --- on the wire ---------------------------------------------------------------------


@pytest.fixture
async def once(keys: StaticAPIKeys) -> AsyncIterator[LLMInfraService]:
    """Open a service that makes one immediate retry at most."""
    settings = Settings(max_retries=1, retry_wait=0.01, retry_wait_max=0.02, timeout=20)
    async with LLMInfraService(keys, settings=settings) as opened:
        yield opened


async def fails(service: LLMInfraService, provider: str) -> CallError:
    """Return the error of a call that must fail."""
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
    """Each status has its class and its number of requests, for every provider."""
    headers = {"x-request-id": "req_7"} if provider in {"openai", "ollama"} else {}
    headers = {"request-id": "req_7"} if provider == "anthropic" else headers
    # The header cannot turn a final error into a retryable one.
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
    """The error has the wait from a header or from Google's body."""
    server.default = error(provider, 429, retry_delay=0.05)

    got = await fails(once, provider)

    assert type(got) is RateLimitError
    assert got.retry_after == 0.05
    assert got.attempts == 2


async def test_an_empty_account_is_not_retried(
    once: LLMInfraService, server: ProviderServer
) -> None:
    """OpenAI's 429 insufficient_quota is not retried."""
    server.default = error("openai", 429, code="insufficient_quota")

    got = await fails(once, "openai")

    assert type(got) is QuotaExceededError
    assert isinstance(got, RateLimitError)
    assert got.retryable is False
    assert len(server.requests) == 1


@each_provider
async def test_a_proxys_plain_text(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A proxy's 503 keeps the proxy's message."""
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
    """A broken connection is retried, with one request an attempt."""
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
WITHOUT_ANSWER: dict[str, bytes] = {
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
@pytest.mark.parametrize("kind", WITHOUT_ANSWER)
async def test_a_200_without_an_answer(
    once: LLMInfraService, server: ProviderServer, provider: str, kind: str
) -> None:
    """It is retried, and never returned as an empty answer."""
    content_type = "text/html" if kind == "html" else "application/json"
    body = WITHOUT_ANSWER[kind]
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
        # The code is more precise than the type.
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
            ContentFilterError,
        ),
        (
            "openai",
            {"error": {"message": "x", "code": "content_filter"}},
            ContentFilterError,
        ),
        ("openai", {"error": {"message": "x", "code": "model_not_found"}}, _MODEL),
        ("google", {"error": {"message": "x", "status": "INVALID_ARGUMENT"}}, _ASK),
        ("google", {"error": {"message": "x", "status": "RESOURCE_EXHAUSTED"}}, _RATE),
        ("google", {"error": {"message": "x", "status": "UNAVAILABLE"}}, _DOWN),
        (
            "google",
            {"error": {"message": "x", "status": "CANCELLED"}},
            LLMServiceError,
        ),
        # LM Studio, and Ollama.
        (
            "openai",
            {"error": {"message": ERROR_BODIES["LM Studio"]["body"]["error"]}},
            _LONG,
        ),
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
    """The error decides on the class, and the status remains 200."""
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
    """A 400 for the length is a ContextWindowError."""
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
    """A 400 for the content is a ContentFilterError."""
    server.default = error(provider, 400, said, code=code)

    got = await fails(once, provider)

    assert type(got) is ContentFilterError
    assert len(server.requests) == 1


@each_provider
async def test_a_key_that_the_provider_refuses(
    server: ProviderServer, provider: str
) -> None:
    """Each provider's response to a bad key is an APIKeyError, also Google's 400."""
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
    """No line break, escape sequence or key of a response reaches a message."""
    said = f"bad key sk-test-{provider}\nsecond line \x1b[31mred"
    server.default = error(provider, status, said)

    got = await fails(once, provider)

    assert "bad key [key] second line [31mred" in str(got)
    assert f"sk-test-{provider}" not in repr(vars(got))


@each_provider
async def test_an_unknown_model(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """A wrong model name is a ModelNotFoundError that shows the name."""
    with pytest.raises(ModelNotFoundError, match="no-such-model") as caught:
        await once.complete(HELLO, "no-such-model", provider, service=provider)

    assert caught.value.model == "no-such-model"
    assert len(server.requests) == 1


@each_provider
async def test_a_malformed_answer(
    once: LLMInfraService, server: ProviderServer, provider: str
) -> None:
    """An exception of LiteLLM's leaves no traceback in the message."""
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
