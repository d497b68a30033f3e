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


_QUOTA, _FILTER = QuotaExceededError, ContentFilterError
_OPENROUTER = "Provider returned error"
# Real errors whose class the status alone does not tell.
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
    # https://github.com/camel-ai/owl/issues/432
    "DashScope, a prompt": (
        400,
        {
            "code": "data_inspection_failed",
            "message": "Input data may contain inappropriate content.",
            "type": "data_inspection_failed",
        },
        _FILTER,
    ),
    # https://github.com/QwenLM/qwen-code/issues/2905
    "DashScope, a prompt, without a code": (
        400,
        {
            "message": "<400> InternalError.Algo.DataInspectionFailed: Input text data may"
            " contain inappropriate content."
        },
        _FILTER,
    ),
    # https://www.volcengine.com/docs/82379/1299023
    "Ark, a prompt": (
        400,
        {
            "code": "InputTextSensitiveContentDetected",
            "message": "The request failed because the input text may contain sensitive"
            " information.",
            "type": "BadRequest",
        },
        _FILTER,
    ),
    # https://github.com/langchain4j/langchain4j/issues/1079
    "Zhipu, a prompt": (
        400,
        {
            "code": "1301",
            "message": "系统检测到输入或生成内容可能包含不安全或敏感内容",
        },
        _FILTER,
    ),
    # https://github.com/MoonshotAI/kimi-cli/issues/1002
    "Moonshot, a prompt": (
        400,
        {
            "code": 400,
            "message": "The request was rejected because it was considered high risk",
            "param": "prompt",
            "type": "content_filter",
        },
        _FILTER,
    ),
    # https://github.com/openai/openai-cookbook/issues/1224
    "New API, a prompt": (
        400,
        {
            "message": "input contains sensitive words: [test] (request id: x)",
            "type": "new_api_error",
            "code": "sensitive_words_detected",
        },
        _FILTER,
    ),
    # https://github.com/UKGovernmentBEIS/inspect_ai/pull/2267
    "xAI, a prompt": (
        403,
        "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO",
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
def test_a_real_error(kind: str) -> None:
    """The code or the message decides, and none of these errors is retryable."""
    status, error, cls = SAID[kind]

    got = from_answer(status, {}, json.dumps({"error": error}).encode(), service="x")

    assert type(got) is cls
    assert not got.retryable
    assert got.status_code == status


# Bodies that reject a prompt for its length: the status, the body, and where it was seen.
# All were read 2026-11-25.
_GITHUB = "https://github.com"
TOO_LONG_BODIES: dict[str, tuple[int, Any, str]] = {
    "Moonshot": (
        400,
        {
            "error": {
                "message": "Invalid request: Your request exceeded model token limit:"
                " 262144 (requested: 269030)",
                "type": "invalid_request_error",
            }
        },
        f"{_GITHUB}/MoonshotAI/kimi-cli/issues/2011",
    ),
    "Moonshot, older": (
        400,
        {"error": {"message": "model max length exceeded, max length:8192"}},
        f"{_GITHUB}/MoonshotAI/MoonshotAI-Cookbook/issues/18",
    ),
    "Moonshot, by size": (
        400,
        {"error": {"message": "total message size 2100954 exceeds limit 2097152"}},
        f"{_GITHUB}/MoonshotAI/kimi-code/issues/1862",
    ),
    "Ark, GLM": (
        400,
        {
            "error": {
                "code": "InvalidParameter",
                "message": "Input length 203743 exceeds the maximum length 202752.",
                "param": "",
                "type": "BadRequest",
            }
        },
        f"{_GITHUB}/langgenius/dify/issues/32221",
    ),
    "Ark, Doubao": (
        400,
        {
            "error": {
                "code": "InvalidParameter",
                "message": "Total tokens of image and text exceed max message tokens."
                " Request id: 0217",
                "type": "BadRequest",
            }
        },
        f"{_GITHUB}/sipeed/picoclaw/issues/183",
    ),
    "SGLang": (
        400,
        {
            "object": "error",
            "message": "The input (61709 tokens) is longer than the model's context length"
            " (40960 tokens).",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
        f"{_GITHUB}/QwenLM/Qwen3/issues/1321",
    ),
    "SGLang, in all": (
        400,
        {
            "object": "error",
            "message": "Requested token count exceeds the model's maximum context length of"
            " 4096 tokens. You requested a total of 4320 tokens: 1320 tokens from the input"
            " messages and 3000 tokens for the completion.",
            "type": "BadRequestError",
            "code": 400,
        },
        f"{_GITHUB}/sgl-project/sglang/issues/3642",
    ),
    "SGLang, without truncation": (
        400,
        {
            "object": "error",
            "message": "Input length (11 tokens) exceeds the maximum allowed length"
            " (10 tokens). Use a shorter input or enable --allow-auto-truncate.",
            "code": 400,
        },
        f"{_GITHUB}/mmcdermott/MEDS_EIC_AR/pull/172",
    ),
    "DashScope": (
        400,
        {
            "error": {
                "code": "invalid_parameter_error",
                "message": "<400> InternalError.Algo.InvalidParameter: Range of input length"
                " should be [1, 983616]",
                "param": None,
                "type": "invalid_request_error",
            },
            "request_id": "81a373d6-28bd-9968-8335-e22a2127c41b",
        },
        f"{_GITHUB}/agentscope-ai/QwenPaw/issues/6255",
    ),
    "DashScope, native": (
        400,
        {
            "code": "InvalidParameter",
            "message": "Range of input length should be [1, 6000]",
            "request_id": "x",
        },
        f"{_GITHUB}/LLM-Red-Team/qwen-free-api/issues/23",
    ),
    "Z.ai": (
        400,
        {"error": {"code": "1261", "message": "Prompt exceeds max length"}},
        f"{_GITHUB}/zeroclaw-labs/zeroclaw/issues/4124",
    ),
    "GitHub Copilot": (
        400,
        {
            "error": {
                "message": "prompt token count of 138898 exceeds the limit of 64000",
                "code": "model_max_prompt_tokens_exceeded",
            }
        },
        f"{_GITHUB}/microsoft/copilot-intellij-feedback/issues/94",
    ),
    "GitHub Copilot, without a code": (
        400,
        {
            "error": {
                "message": "prompt token count of 65446 exceeds the limit of 64000",
                "param": "",
                "code": "",
                "type": "",
            }
        },
        f"{_GITHUB}/microsoft/vscode-copilot-release/issues/6700",
    ),
    "GitHub Models": (
        413,
        {
            "error": {
                "code": "tokens_limit_reached",
                "message": "Request body too large for gpt-4o model. Max size: 8000 tokens.",
                "details": "Request body too large for gpt-4o model. Max size: 8000 tokens.",
            }
        },
        f"{_GITHUB}/eslint/tsc-meetings/pull/593",
    ),
    "Bedrock": (
        400,
        {"message": "Input is too long for requested model."},
        f"{_GITHUB}/aws-samples/assessment-generator/issues/2",
    ),
    "Bedrock, behind a gateway": (
        400,
        {
            "detail": "An error occurred (ValidationException) when calling the Converse"
            " operation: The model returned the following errors: Input is too long for"
            " requested model."
        },
        f"{_GITHUB}/continuedev/continue/issues/9592",
    ),
    "Bedrock, Claude": (
        400,
        {
            "message": "The model returned the following errors: prompt is too long: 227255"
            " tokens > 200000 maximum"
        },
        f"{_GITHUB}/aaif-goose/goose/pull/7504",
    ),
    "OpenAI, by its limit": (
        400,
        {
            "error": {
                "message": "Input tokens exceed the configured limit of 272000 tokens. Your"
                " messages resulted in 289650 tokens. Please reduce the length of the"
                " messages.",
                "type": "invalid_request_error",
                "code": None,
            }
        },
        f"{_GITHUB}/cline/cline/issues/5474",
    ),
    "OpenAI, a message": (
        400,
        {
            "error": {
                "message": "Invalid 'input[0].content': string too long. Expected a string"
                " with maximum length 10485760, but got a string with length 62114761"
                " instead.",
                "type": "invalid_request_error",
                "param": "input[0].content",
                "code": "string_above_max_length",
            }
        },
        f"{_GITHUB}/VectorlyApp/bluebox/issues/31",
    ),
    "DeepSeek": (
        400,
        {
            "error": {
                "message": "This model's maximum context length is 131072 tokens. However,"
                " you requested 131134 tokens (122942 in the messages, 8192 in the"
                " completion). Please reduce the length of the messages or completion.",
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_request_error",
            }
        },
        f"{_GITHUB}/evalstate/fast-agent/issues/621",
    ),
    "vLLM": (
        400,
        {
            "error": {
                "message": "This model's maximum context length is 128000 tokens. However,"
                " you requested 65535 output tokens and your prompt contains at least 62466"
                " input tokens, for a total of at least 128001 tokens.",
                "type": "BadRequestError",
                "code": 400,
            }
        },
        f"{_GITHUB}/vllm-project/vllm/issues/42474",
    ),
    "Groq": (
        400,
        {
            "error": {
                "message": "Please reduce the length of the messages or completion.",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        },
        f"{_GITHUB}/OpenHands/OpenHands/issues/1902",
    ),
    "Cerebras": (
        400,
        {
            "message": "Please reduce the length of the messages or completion. Current"
            " length is 42328 while limit is 40000",
            "type": "invalid_request_error",
        },
        f"{_GITHUB}/cline/cline/issues/5140",
    ),
    "SiliconFlow": (
        400,
        {
            "code": 20015,
            "message": "length of prompt_tokens (57535) must be less than max_seq_len"
            " (32768)",
            "data": None,
        },
        f"{_GITHUB}/langgenius/dify/issues/19394",
    ),
    "SiliconFlow, newer": (
        400,
        {
            "code": 20015,
            "message": "number of input tokens (83121) have exceeded max_prompt_tokens"
            " (65536) limit.",
            "data": None,
        },
        f"{_GITHUB}/continuedev/continue/issues/9971",
    ),
    "Qianfan": (
        400,
        {
            "error": {
                "code": "tokens_too_long",
                "message": "Prompt tokens too long",
                "type": "invalid_request_error",
            },
            "id": "as-x",
        },
        "https://cloud.baidu.com/doc/qianfan-api/s/rmwbl43x7",
    ),
    "MiniMax": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "invalid params, context window exceeds limit (2013)",
            },
        },
        f"{_GITHUB}/MiniMax-AI/MiniMax-M2/issues/119",
    ),
    "Vertex": (
        400,
        {
            "error": {
                "code": 400,
                "message": "Unable to submit request because the input token count is"
                " 1251952 but model only supports up to 1048576. Reduce the input token"
                " count and try again.",
                "status": "INVALID_ARGUMENT",
            }
        },
        f"{_GITHUB}/google-gemini/gemini-cli/issues/19727",
    ),
    "Gemini, without a count": (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "The input token count exceeds the maximum number of tokens"
                    " allowed (1048576).",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        f"{_GITHUB}/arkavo-org/arkavo-edge/issues/371",
    ),
    "Cohere": (
        400,
        {
            "message": "too many tokens: total number of tokens (prompt and prediction)"
            " cannot exceed 2048 - received 6354. Try using a shorter prompt or a smaller"
            " max_tokens value."
        },
        f"{_GITHUB}/cohere-ai/sandbox-topically/issues/4",
    ),
    "Together": (
        400,
        {
            "error": {
                "message": "Input validation error: `inputs` tokens + `max_new_tokens` must"
                " be <= 4097. Given: 80125 `inputs` tokens and 4096 `max_new_tokens`",
                "type": "invalid_request_error",
                "param": "max_tokens",
                "code": None,
            }
        },
        f"{_GITHUB}/BerriAI/litellm/issues/4934",
    ),
    "text-generation-inference": (
        422,
        {
            "error": "Input validation error: `inputs` must have less than 4096 tokens."
            " Given: 4545",
            "error_type": "validation",
        },
        f"{_GITHUB}/meta-llama/llama/issues/1103",
    ),
    "TensorRT-LLM": (
        400,
        {"error": "Prompt length (200) exceeds maximum input length (1)"},
        f"{_GITHUB}/triton-inference-server/tensorrtllm_backend/issues/565",
    ),
    "llama.cpp, counted": (
        400,
        {
            "error": {
                "code": 400,
                "message": "request (355724 tokens) exceeds the available context size"
                " (262144 tokens), try increasing it",
                "type": "exceed_context_size_error",
            }
        },
        f"{_GITHUB}/ItzCrazyKns/Vane/issues/1011",
    ),
    "vMLX": (
        400,
        {
            "detail": "prompt_too_long: tokenized VLM text prompt has 20771 tokens, max"
            " prompt/context tokens is 20119"
        },
        f"{_GITHUB}/jjang-ai/vmlx/issues/254",
    ),
    "LiteLLM's proxy": (
        400,
        {
            "error": {
                "message": "litellm.ContextWindowExceededError: Max Input Tokens=272000,"
                " Got=301450",
                "type": None,
                "param": None,
                "code": "400",
            }
        },
        f"{_GITHUB}/BerriAI/litellm/pull/38368",
    ),
}


@pytest.mark.parametrize("server_name", TOO_LONG_BODIES)
@pytest.mark.parametrize("told_with", ["its status", "200"])
def test_a_prompt_that_is_too_long(server_name: str, told_with: str) -> None:
    """Every server's wording is a ContextWindowError, also in a 200 with an error."""
    status, body, _ = TOO_LONG_BODIES[server_name]
    if told_with == "200":
        status = 200

    got = from_answer(status, {}, json.dumps(body).encode(), service="x")

    assert type(got) is ContextWindowError
    assert not got.retryable
    assert got.status_code == status


# Bodies that mention lengths, limits or tokens, and are not about the prompt's length.
NOT_TOO_LONG: dict[str, tuple[int, Any, type[CallError], bool]] = {
    # https://github.com/proma-ai/Proma/issues/1453
    "Ark, max_tokens": (
        400,
        {
            "error": {
                "code": "InvalidParameter",
                "message": "The parameter `max_tokens` specified in the request is not valid:"
                " integer above maximum value, expected a value <= 131072, but got 512000"
                " instead.",
                "param": "max_tokens",
                "type": "BadRequest",
            }
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/RooCodeInc/Roo-Code/issues/5729
    "Groq, max_tokens": (
        400,
        {
            "error": {
                "message": "`max_tokens` must be less than or equal to `16384`, the maximum"
                " value for `max_tokens` is less than the `context_window` for this model",
                "type": "invalid_request_error",
                "param": "max_tokens",
            }
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/stanfordnlp/dspy/issues/8724
    "Azure, max_tokens": (
        400,
        {
            "error": {
                "message": "max_tokens is too large: 20000. This model supports at most 16384"
                " completion tokens, whereas you provided 20000."
            }
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/vllm-project/vllm/issues/19861
    "vLLM, max_tokens": (
        400,
        {
            "object": "error",
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 9000. This"
            " model's maximum context length is 8192 tokens and your request has 10 input"
            " tokens (9000 > 8192 - 10).",
            "type": "BadRequestError",
            "code": 400,
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/charmbracelet/crush/issues/946
    "Bedrock, max_tokens": (
        400,
        {
            "message": "The maximum tokens you requested exceeds the model limit of 32768"
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/open-webui/open-webui/issues/10507
    "DashScope, max_tokens": (
        400,
        {
            "error": {
                "message": "<400> InternalError.Algo.InvalidParameter: Range of max_tokens"
                " should be [1, 8192]"
            }
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/HKUDS/nanobot/issues/651
    "DeepSeek, max_tokens": (
        400,
        {
            "error": {
                "message": "Invalid max_tokens value, the valid range of max_tokens is"
                " [1, 8192]",
                "type": "invalid_request_error",
                "code": "invalid_request_error",
            }
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/langmanus/langmanus/issues/119
    "OpenAI, the id of a call": (
        400,
        {
            "error": {
                "message": "Invalid 'messages[10].tool_calls[0].id': string too long."
                " Expected a string with maximum length 40, but got a string with length 63"
                " instead.",
                "code": "string_above_max_length",
            }
        },
        InvalidRequestError,
        False,
    ),
    # https://github.com/minorun365/agent-book/issues/29
    "Bedrock, a day's tokens": (
        429,
        {"message": "Too many tokens per day, please wait before trying again."},
        RateLimitError,
        True,
    ),
    "Bedrock, a day's tokens, behind a gateway": (
        500,
        {"detail": "Too many tokens, please wait before trying again."},
        ServiceUnavailableError,
        True,
    ),
    # https://github.com/cline/cline/issues/4971
    "Groq, a minute's tokens in one request": (
        413,
        {
            "error": {
                "message": "Request too large for model `moonshotai/kimi-k2-instruct` in"
                " organization `org_x` service tier `on_demand` on tokens per minute (TPM):"
                " Limit 10000, Requested 15088, please reduce your message size and try"
                " again.",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
        RateLimitError,
        False,
    ),
    "OpenAI, a minute's tokens": (
        429,
        {
            "error": {
                "message": "Rate limit reached for gpt-4o in organization org-x on tokens"
                " per min (TPM): Limit 30000, Used 27000, Requested 4500. Please try again"
                " in 3s.",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
        RateLimitError,
        True,
    ),
    # https://github.com/fork-dev/TrackerWin/issues/2595
    "OpenAI, a minute's tokens in one request": (
        429,
        {
            "error": {
                "message": "Request too large for gpt-4o in organization org-x on tokens per"
                " min (TPM): Limit 30000, Requested 45411. The input or output tokens must"
                " be reduced in order to run successfully.",
                "type": "tokens",
                "code": "rate_limit_exceeded",
            }
        },
        RateLimitError,
        False,
    ),
    # https://github.com/anomalyco/opencode/issues/14064
    "a proxy, by bytes": (
        413,
        {"message": "Request Entity Too Large"},
        InvalidRequestError,
        False,
    ),
}


@pytest.mark.parametrize("server_name", NOT_TOO_LONG)
def test_limits_of_another_kind(server_name: str) -> None:
    """A limit of the output, or of a minute, is not the context window."""
    status, body, cls, retryable = NOT_TOO_LONG[server_name]

    got = from_answer(status, {}, json.dumps(body).encode(), service="x")

    assert type(got) is cls
    assert got.retryable is retryable


def test_the_message_of_a_provider_behind_openrouter() -> None:
    """OpenRouter's error shows the provider's message, redacted and shortened."""
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
        # LM Studio, and Ollama.
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
