"""Every chat provider that LiteLLM lists: what is known of it, and what is sent to it.

Generated over LiteLLM's own list, so that a provider that it adds is tried by the next
run. Direct requests are compared with those that `litellm.acompletion` really sends to
a server on loopback.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from dipeo_llm import litellm_providers as providers
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.litellm_import import import_litellm

KEY = "sk-test-of-providers"
MODEL = "user.app.model"  # clarifai wants three parts
MODELS = {"openrouter": "vendor/model"}  # one without a slash is openrouter's own
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "sum",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"sum": {"type": "integer"}},
            "required": ["sum"],
            "additionalProperties": False,
        },
    },
}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"a": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    {"role": "user", "content": "Again."},
]
CASES: Mapping[str, tuple[dict[str, Any], bool]] = {
    "plain": ({"temperature": 0.5, "max_tokens": 7, "top_p": 0.9, "seed": 3}, False),
    "stream": ({"temperature": 0.5, "stop": ["END"]}, True),
    "tools": ({"tools": [TOOL], "tool_choice": "auto"}, False),
    "response_format": ({"response_format": SCHEMA}, False),
    "response_format in a stream": ({"response_format": SCHEMA}, True),
}
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "service_tier": "default",  # without it LiteLLM fails at an answer of groq's
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "{}"},
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "delta": {"role": "assistant", "content": "{}"},
        }
    ],
}


@dataclass
class Loopback:
    """A server that says yes to every POST, and keeps it."""

    base_url: str
    posts: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # else head and body are two packets, 40 ms apart
    loopback: Loopback

    def do_GET(self) -> None:
        self._answer("application/json", b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.loopback.posts.append((self.path, headers, body))
        if body.get("stream"):
            chunk = f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode()
            self._answer("text/event-stream", chunk)
        else:
            self._answer("application/json", json.dumps(ANSWER).encode())

    def _answer(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    """Serve from a thread: one provider's LiteLLM code blocks the event loop."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    serving = Loopback(f"http://127.0.0.1:{server.server_port}/base")
    _Handler.loopback = serving
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield serving
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Import LiteLLM once, behind the fence."""
    return import_litellm()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List the addresses that anything tries to connect to; none is reached."""
    tried: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


def direct(litellm: Any) -> list[providers.ProviderFacts]:
    """List the facts of all providers that are called directly."""
    facts = [providers.describe(litellm, n) for n in providers.chat_providers(litellm)]
    return [fact for fact in facts if fact.engine == "direct"]


# What is known.


def test_the_list_is_litellms(litellm: Any) -> None:
    """Every name of the enum and of the JSON is described; those with chat are listed."""
    from litellm.llms.openai_like.json_loader import JSONProviderRegistry

    names = providers.all_names(litellm)
    assert {p.value for p in litellm.LlmProviders} <= set(names)
    assert set(JSONProviderRegistry.list_providers()) <= set(names)
    chat = providers.chat_providers(litellm)
    assert set(JSONProviderRegistry.list_providers()) <= set(chat)
    for name in set(names) - set(chat):
        assert providers.describe(litellm, name).refusal == "LiteLLM has no chat for it"


def test_most_are_reached_by_a_model_string_and_a_key(litellm: Any) -> None:
    """80 direct ones have an address and a variable for the key, 100 are reached."""
    reached = [
        fact
        for name in providers.chat_providers(litellm)
        if (fact := providers.describe(litellm, name)).engine != "refused"
    ]
    by_name_alone = [
        fact
        for fact in direct(litellm)
        if fact.address and (fact.key_variables or not fact.needs_key)
    ]
    assert len(reached) >= 100
    assert len(by_name_alone) >= 80


@pytest.mark.parametrize(
    ("name", "address", "variables"),
    [
        ("groq", "https://api.groq.com/openai/v1", ["GROQ_API_KEY"]),
        (
            "mistral",
            "https://api.mistral.ai/v1",
            ["MISTRAL_API_KEY"],
        ),
        ("xai", "https://api.x.ai/v1", ["XAI_API_KEY"]),
        ("deepseek", "https://api.deepseek.com/beta", ["DEEPSEEK_API_KEY"]),
        (
            "openrouter",
            "https://openrouter.ai/api/v1",
            ["OPENROUTER_API_KEY", "OR_API_KEY"],
        ),
        (
            "together_ai",
            None,
            [
                "TOGETHER_API_KEY",
                "TOGETHER_AI_API_KEY",
                "TOGETHERAI_API_KEY",
                "TOGETHER_AI_TOKEN",
            ],
        ),
        (
            "fireworks_ai",
            "https://api.fireworks.ai/inference/v1",
            [
                "FIREWORKS_API_KEY",
                "FIREWORKS_AI_API_KEY",
                "FIREWORKSAI_API_KEY",
                "FIREWORKS_AI_TOKEN",
            ],
        ),
        (
            "perplexity",
            "https://api.perplexity.ai",
            ["PERPLEXITYAI_API_KEY", "PERPLEXITY_API_KEY"],
        ),
        ("cerebras", "https://api.cerebras.ai/v1", ["CEREBRAS_API_KEY"]),
        ("moonshot", "https://api.moonshot.ai/v1", ["MOONSHOT_API_KEY"]),
        ("dashscope", None, ["DASHSCOPE_API_KEY"]),
        ("friendliai", None, ["FRIENDLIAI_API_KEY", "FRIENDLI_TOKEN"]),
        ("openai", "https://api.openai.com/v1", ["OPENAI_API_KEY"]),
        ("veniceai", "https://api.venice.ai/api/v1", ["VENICE_AI_API_KEY"]),
        ("scaleway", "https://api.scaleway.ai/v1", ["SCW_SECRET_KEY"]),
    ],
)
def test_address_and_variables(
    litellm: Any, name: str, address: str | None, variables: list[str]
) -> None:
    """LiteLLM's functions give the usual ones, in its order."""
    fact = providers.describe(litellm, name)
    assert fact.engine == "direct"
    assert fact.needs_key
    assert fact.address == address or address is None
    assert list(fact.key_variables) == variables
    assert fact.path == "/chat/completions"


@pytest.mark.parametrize(
    "name",
    [
        *("custom_openai", "docker_model_runner", "hosted_vllm", "lemonade"),
        *("llamafile", "lm_studio", "xinference"),
    ],
)
def test_a_local_server_needs_no_key(litellm: Any, name: str) -> None:
    """A server on this machine, or at an address of the user's own, may have no key."""
    fact = providers.describe(litellm, name)
    assert fact.engine == "direct"
    assert not fact.needs_key


def test_every_direct_one_is_fit_to_be_called(litellm: Any) -> None:
    """An address is an https URL or this machine, and a hosted one names its key."""
    for fact in direct(litellm):
        if fact.address is not None:
            assert fact.address.startswith("https://") == fact.needs_key, fact
            assert not fact.address.endswith("/"), fact
            assert fact.key_variables or not fact.needs_key, fact
        assert fact.path.startswith("/"), fact
        assert fact.key_header in {"authorization", "api-key"}, fact
        assert not fact.headers, f"{fact.name} has headers that the wire must let pass"


def test_the_environment_has_no_say(
    litellm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable leads a call elsewhere, and none is changed, not even for a moment."""
    before = {n: providers.describe(litellm, n) for n in providers.all_names(litellm)}
    monkeypatch.setattr(litellm, "api_base", "http://elsewhere.invalid")
    monkeypatch.setattr(litellm, "api_key", "sk-of-the-application")
    monkeypatch.setenv("USE_LITELLM_PROXY", "True")
    stems = {name.upper().replace("-", "_").removesuffix("_AI") for name in before}
    stems |= {name.upper().replace("-", "_") for name in before}
    for stem in stems | {"LLAMA", "LAMBDA", "FRIENDLI", "SCW", "STIMA", "OR"}:
        for end in ("API_BASE", "BASE_URL", "API_KEY", "ENDPOINT", "REGION"):
            monkeypatch.setenv(f"{stem}_{end}", "http://elsewhere.invalid")
    environment = dict(os.environ)
    providers.describe.cache_clear()
    try:
        for name, fact in before.items():
            assert providers.describe(litellm, name) == fact
    finally:
        providers.describe.cache_clear()
    assert dict(os.environ) == environment


def test_other_threads_keep_their_environment(
    litellm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is only hidden from the thread that asks LiteLLM."""
    monkeypatch.setenv("GROQ_API_BASE", "http://mine.invalid")
    seen: set[str | None] = set()
    asking = threading.Event()
    done = threading.Event()

    def other() -> None:
        asking.set()
        while not done.is_set():
            seen.add(os.environ.get("GROQ_API_BASE"))
            seen.add(dict(os.environ).get("GROQ_API_BASE"))

    thread = threading.Thread(target=other)
    thread.start()
    asking.wait()
    providers.describe.cache_clear()
    address = providers.describe(litellm, "groq").address
    for name in providers.chat_providers(litellm):
        providers.describe(litellm, name)
    done.set()
    thread.join()
    assert address == "https://api.groq.com/openai/v1"
    assert seen == {"http://mine.invalid"}
    assert os.environ.encodekey.__name__ != "hide"


def test_nothing_is_sent_to_find_out(litellm: Any, no_network: list[Any]) -> None:
    """Neither describing nor translating connects to anything, this machine included."""
    providers.describe.cache_clear()
    for name in providers.all_names(litellm):
        fact = providers.describe(litellm, name)
        if fact.engine == "direct":
            for options, stream in CASES.values():
                providers.translate_openai(
                    litellm,
                    fact,
                    MODEL,
                    CONVERSATION,
                    options,
                    stream,
                    base_url="http://127.0.0.1:9/base",
                )
    assert no_network == []


@pytest.mark.parametrize("name", sorted(providers.REFUSED))
def test_refused_with_a_reason(litellm: Any, name: str) -> None:
    """Each of them says why, whether LiteLLM lists it or not."""
    fact = providers.describe(litellm, name)
    assert fact.engine == "refused"
    assert fact.refusal == providers.REFUSED[name]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("gorq", "groq"),
        ("together", "together_ai"),
        ("Together-AI", "together_ai"),
        ("fireworks", "fireworks_ai"),
        ("mistrl", "mistral"),
        ("lmstudio", "lm_studio"),
        ("deep-seek", "deepseek"),
        ("openruoter", "openrouter"),
        ("gogle", "google"),
    ],
)
def test_did_you_mean(litellm: Any, wrong: str, right: str) -> None:
    """A name that is nearly right is answered with the right one."""
    assert providers.suggest(litellm, wrong, also=["google"])[0] == right
    error = providers.unknown_provider(litellm, wrong, also=["google"])
    assert f"did you mean {right!r}" in str(error)


def test_an_unknown_name_is_an_error(litellm: Any) -> None:
    """It is never described by a guess."""
    with pytest.raises(InvalidRequestError, match="did you mean 'groq'"):
        providers.describe(litellm, "gorq")
    assert providers.suggest(litellm, "qqqqqq") == ()


def test_rows_are_needed(litellm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM's functions do not say the same; red if they do: take the row out."""
    rows = {name: providers.describe(litellm, name) for name in providers._ROWS}
    monkeypatch.setattr(providers, "_ROWS", {})
    monkeypatch.setattr(litellm, "api_base", "http://elsewhere.invalid")
    # LiteLLM 1.105, the oldest that is supported, has no address for openrouter.
    for name in set(rows) - {"openrouter"}:
        own = providers.describe.__wrapped__(litellm, name)
        assert own != rows[name], name


# What is sent.


class _Clients:
    """What `acompletion` takes as `client=`, over one client that counts requests."""

    def __init__(
        self, base_url: str, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
        from openai import AsyncOpenAI

        self.requests = 0
        self.http = httpx.AsyncClient(
            trust_env=False,
            event_hooks={"request": [self._count]},
            transport=transport,
        )
        http: Any = self.http  # the SDK names httpx2 in its types, and takes both
        sdk = AsyncOpenAI(
            api_key=KEY, base_url=base_url, http_client=http, max_retries=0
        )
        handler = AsyncHTTPHandler(transport=httpx.AsyncHTTPTransport())
        handler.client = self.http
        self.by_kind: Mapping[str | None, Any] = {
            "sdk": sdk,
            "handler": handler,
            None: None,
        }

    async def _count(self, request: httpx.Request) -> None:
        self.requests += 1


async def _acompletion(
    litellm: Any,
    fact: providers.ProviderFacts,
    base_url: str,
    client: Any,
    options: Mapping[str, Any],
    stream: bool,
) -> None:
    """Have LiteLLM send a request to loopback."""
    arguments: dict[str, Any] = {
        "model": f"{fact.config}/{MODELS.get(fact.name, MODEL)}",
        "custom_llm_provider": fact.config,
        "messages": json.loads(json.dumps(CONVERSATION)),
        "client": client,
        "api_key": KEY,
        "api_base": base_url,
        "drop_params": True,
        "max_retries": 0,
        "num_retries": 0,
        "timeout": 10,
        "allowed_openai_params": providers.unlisted_tools(
            litellm, fact.config, MODEL, options
        ),
        **json.loads(json.dumps(options)),
    }
    if stream:
        arguments |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = await litellm.acompletion(**arguments)
    if stream:
        async for _ in answer:
            pass


def _canonical(body: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out `stream: false`, which says what is so without it."""
    return {k: v for k, v in body.items() if (k, v) != ("stream", False)}


async def test_bodies_are_those_of_acompletion(
    litellm: Any, loopback: Loopback
) -> None:
    """Path, key and body of each direct provider, in five cases, but for `DIFFERS`.

    Red as well if one of `DIFFERS` no longer differs: take it out then.
    """
    differences: dict[str, list[str]] = {}
    bypassed = set()
    clients = _Clients(loopback.base_url)
    for fact in direct(litellm):
        for case, (options, stream) in CASES.items():
            loopback.posts.clear()
            clients.requests = 0
            client = clients.by_kind[fact.client]
            try:
                await _acompletion(
                    litellm, fact, loopback.base_url, client, options, stream
                )
            except litellm.ServiceUnavailableError:
                # LiteLLM cannot read the stream of its own amazon_nova (1.110.2). What
                # it makes of an answer is not the matter here.
                assert loopback.posts
            ((path, headers, body),) = loopback.posts
            below, own_headers, own = providers.translate_openai(
                litellm,
                fact,
                MODELS.get(fact.name, MODEL),
                CONVERSATION,
                options,
                stream,
                base_url=loopback.base_url,
            )
            if (clients.requests == 1) != (fact.client is not None):
                bypassed.add(fact.name)
            assert KEY not in json.dumps(own)
            assert KEY not in str(own_headers)
            # A provider reached through another door has that door's header.
            if fact.config == fact.name:
                assert headers[fact.key_header] == f"Bearer {KEY}", fact
            same = _canonical(own) == _canonical(body)
            if not same or path != f"/base{below}":
                differences.setdefault(fact.name, []).append(case)
    await clients.http.aclose()
    await litellm.close_litellm_async_clients()
    known = set(providers.chat_providers(litellm))
    expected = {name: list(CASES) for name in providers.DIFFERS if name in known}
    expected["groq"] = ["response_format in a stream"]
    assert differences == expected
    assert bypassed == set()


ANY = object()
# Name, model, options, and what of the body they become; None is left out.
QUIRKS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("groq", "openai/gpt-oss-120b", {"reasoning_effort": "low"}, {}),
    ("groq", "openai/gpt-oss-120b", {"response_format": SCHEMA}, {}),
    (
        "groq",
        "llama-3.3-70b-versatile",
        {"reasoning_effort": "low"},
        {"reasoning_effort": None},
    ),
    (
        "groq",
        "a-model-without-schemas",
        {"response_format": SCHEMA},
        {
            "response_format": None,
            "tool_choice": {"type": "function", "function": {"name": "json_tool_call"}},
        },
    ),
    (
        "mistral",
        "mistral-large-latest",
        {"seed": 3, "tools": [TOOL], "tool_choice": "required"},
        {"seed": None, "random_seed": 3, "tool_choice": "any"},
    ),
    ("xai", "grok-4", {"stop": ["END"]}, {"stop": None}),
    (
        "xai",
        "grok-4",
        {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]},
        {"tools": [TOOL]},
    ),
    ("deepseek", "deepseek-chat", {"tools": [TOOL], "tool_choice": "required"}, {}),
    (
        "deepseek",
        "deepseek-reasoner",
        {"reasoning_effort": "low"},
        {"thinking": {"type": "enabled"}, "reasoning_effort": ANY},
    ),
    (
        "openrouter",
        "anthropic/claude-sonnet-4.5",
        {"extra_body": {"provider": {"order": ["a"]}, "transforms": ["middle-out"]}},
        {
            "extra_body": None,
            "provider": {"order": ["a"]},
            "transforms": ["middle-out"],
            "usage": {"include": True},
        },
    ),
    ("together_ai", "a/b", {"tools": [TOOL], "response_format": SCHEMA}, {}),
    (
        "fireworks_ai",
        "llama-v3p3-70b-instruct",
        {"max_completion_tokens": 9},
        {
            "model": "accounts/fireworks/models/llama-v3p3-70b-instruct",
            "max_completion_tokens": None,
            "max_tokens": 9,
        },
    ),
    ("perplexity", "sonar", {"web_search_options": {"search_context_size": "low"}}, {}),
    ("perplexity", "sonar", {"tools": [TOOL]}, {"tools": None}),
    ("cerebras", "llama-3.3-70b", {"tools": [TOOL], "tool_choice": "required"}, {}),
    ("moonshot", "moonshot-v1-8k", {"temperature": 1.7}, {"temperature": 1}),
    (
        "moonshot",
        "moonshot-v1-8k",
        {"tools": [TOOL], "tool_choice": "required"},
        {"tool_choice": None},
    ),
    # LiteLLM's JSON of providers: no row of the model, and its tools are sent.
    (
        "publicai",
        "unheard-of",
        {"max_completion_tokens": 9},
        {"max_completion_tokens": None, "max_tokens": 9},
    ),
    ("crusoe", "unheard-of", {"tools": [TOOL], "tool_choice": "auto"}, {}),
]


@pytest.mark.parametrize(("name", "model", "options", "expected"), QUIRKS)
def test_quirks(
    litellm: Any,
    name: str,
    model: str,
    options: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    """What LiteLLM's configs know of the most used is in the body.

    An option without an expectation is sent as it is.
    """
    messages = [{"role": "user", "content": "Add."}]
    given = json.loads(json.dumps([messages, options]))
    _, _, body = providers.translate_openai(
        litellm, providers.describe(litellm, name), model, messages, options, False
    )
    assert [messages, options] == given, "the caller's own objects were changed"
    wanted: dict[str, Any] = {**options, **expected}
    for option, value in wanted.items():
        assert value is ANY or body.get(option) == value, option


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("groq", True),
        ("mistral", False),
        ("xai", True),
        ("deepseek", True),
        ("openrouter", True),
        ("together_ai", True),
        ("fireworks_ai", True),
        ("perplexity", False),
        ("cerebras", False),
        ("moonshot", True),
    ],
)
def test_usage_in_a_stream_is_asked_for(litellm: Any, name: str, asks: bool) -> None:
    """Where LiteLLM says that the provider takes the option."""
    fact = providers.describe(litellm, name)
    messages = [{"role": "user", "content": "Add."}]
    _, _, body = providers.translate_openai(litellm, fact, "a/b", messages, {}, True)
    assert body["stream"] is True
    assert body.get("stream_options") == ({"include_usage": True} if asks else None)


@pytest.mark.parametrize(
    ("name", "model", "base_url", "path"),
    [
        ("groq", "m", "http://127.0.0.1:9/openai/v1", "/chat/completions"),
        ("mistral", "m", "http://127.0.0.1:9", "/v1/chat/completions"),
        ("mistral", "m", "http://127.0.0.1:9/v1", "/chat/completions"),
        ("minimax", "m", "http://127.0.0.1:9/v1", "/chat/completions"),
        ("docker_model_runner", "m", "http://127.0.0.1:9/v1", "/chat/completions"),
        ("docker_model_runner", "m", "http://127.0.0.1:9", "/v1/chat/completions"),
        (
            "snowflake",
            "mistral-large2",
            "https://acc.snowflakecomputing.com",
            "/api/v2/cortex/v1/chat/completions",
        ),
        (
            "azure",
            "my-deployment",
            "https://r.openai.azure.com/openai/v1",
            "/chat/completions",
        ),
    ],
)
def test_the_path_below_a_base_url(
    litellm: Any, name: str, model: str, base_url: str, path: str
) -> None:
    """LiteLLM's rule for each provider, without a /v1 too many."""
    fact = providers.describe(litellm, name)
    assert providers.path_below(litellm, fact, model, base_url) == path


def test_a_model_in_another_format_is_an_error(litellm: Any) -> None:
    """Snowflake serves Claude in Anthropic's format: nothing is made of the request."""
    with pytest.raises(InvalidRequestError, match="in OpenAI's format"):
        providers.translate_openai(
            litellm,
            providers.describe(litellm, "snowflake"),
            "claude-sonnet-4-5",
            [{"role": "user", "content": "Add."}],
            {},
            False,
            base_url="https://account.snowflakecomputing.com",
        )


class _ToLoopback(httpx.AsyncHTTPTransport):
    """Takes every request to loopback, whatever its host."""

    def __init__(self, base_url: str) -> None:
        super().__init__()
        self._url = httpx.URL(base_url)
        self.urls: list[httpx.URL] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.urls.append(request.url)
        request.url = request.url.copy_with(
            scheme="http", host=self._url.host, port=self._url.port
        )
        return await super().handle_async_request(request)


AWS = {
    "aws_access_key_id": "AKIDEXAMPLE",
    "aws_secret_access_key": "secret",
    "aws_region_name": "eu-central-1",
}
THROUGH_LITELLM: Mapping[str, tuple[str, dict[str, Any]]] = {
    "a2a": ("agent", {"api_base": "https://agent.invalid"}),
    "bedrock": ("anthropic.claude-3-5-sonnet-20240620-v1:0", AWS),
    "databricks_agent": ("agent", {"api_base": "https://ws.invalid"}),
    "langflow": ("flow", {"api_base": "https://flow.invalid"}),
    "ragflow": ("chat/id/model", {"api_base": "https://rag.invalid"}),
    "sagemaker_chat": ("endpoint", AWS),
    "sagemaker_nova": ("endpoint", AWS),
    # Those that LiteLLM sends with a client of its own.
    "predibase": ("model", {"tenant_id": "t"}),
    "sagemaker": ("endpoint", AWS),
    "triton": ("model", {"api_base": "https://triton.invalid/v2/models/m/generate"}),
}


async def test_acompletion_uses_the_client_or_the_provider_is_refused(
    litellm: Any, loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through `acompletion` goes through our client, once and nowhere else.

    Red as well if a provider that is refused for a client of LiteLLM's own uses ours.
    """
    import openai

    elsewhere: list[str] = []
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **named: Any) -> Any:
        if host != "127.0.0.1":
            elsewhere.append(host)
            raise socket.gaierror("no network in this test")
        return resolve(host, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    transport = _ToLoopback(loopback.base_url)
    clients = _Clients(loopback.base_url, transport)
    bypassed, used = {}, set()
    for name in providers.chat_providers(litellm):
        fact = providers.describe(litellm, name)
        own = fact.refusal is not None and name not in providers.REFUSED
        if fact.engine != "litellm" and not own:
            continue
        model, more = THROUGH_LITELLM.get(name, ("model", {}))
        transport.urls.clear()
        elsewhere.clear()
        with contextlib.suppress(openai.OpenAIError):  # the answer is not in its format
            await litellm.acompletion(
                model=f"{name}/{model}",
                custom_llm_provider=name,
                messages=[{"role": "user", "content": "Add."}],
                client=clients.by_kind[fact.client or "handler"],
                max_retries=0,
                num_retries=0,
                timeout=10,
                **({"api_key": KEY} | more if more is not AWS else AWS),
            )
        if own and transport.urls:
            used.add(name)
        elif not own and (len(transport.urls) != 1 or elsewhere):
            bypassed[name] = (list(transport.urls), list(elsewhere))
        elif not own and fact.address:
            assert str(transport.urls[0]).startswith(fact.address), name
    await clients.http.aclose()
    await litellm.close_litellm_async_clients()
    assert bypassed == {}
    assert used == set()


async def test_address_and_variables_are_those_of_acompletion(
    litellm: Any, loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a variable and nothing else, LiteLLM calls the same URL with the same key.

    Tried for all that take our client without an address in it.
    """
    transport = _ToLoopback(loopback.base_url)
    clients = _Clients(loopback.base_url, transport)
    tried = 0
    for fact in direct(litellm):
        if fact.client != "handler" or not fact.address or fact.config != fact.name:
            continue
        for variable in fact.key_variables:
            monkeypatch.setenv(variable, KEY)
            loopback.posts.clear()
            transport.urls.clear()
            await litellm.acompletion(
                model=f"{fact.name}/{MODELS.get(fact.name, MODEL)}",
                custom_llm_provider=fact.name,
                messages=[{"role": "user", "content": "Add."}],
                client=clients.by_kind["handler"],
                max_retries=0,
                num_retries=0,
                timeout=10,
            )
            monkeypatch.delenv(variable)
            assert [str(url) for url in transport.urls] == [fact.address + fact.path]
            assert loopback.posts[0][1][fact.key_header] == f"Bearer {KEY}"
            tried += 1
    await clients.http.aclose()
    await litellm.close_litellm_async_clients()
    assert tried >= 20
