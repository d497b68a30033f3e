"""The project's own cassettes, replayed through the whole library, the network closed.

What is asserted is read from the cassette by each provider's own format, so that a new
recording, of a provider itself too, needs no change here.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
import yaml

from dipeo_llm import (
    ChatResult,
    ContextWindowError,
    LLMInfraService,
    LLMServiceError,
    ModelNotFoundError,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.testing import use_cassette
from dipeo_llm.testing.cassette_folder import check
from tests.cassette_calls import CALLS, NAMES, PROMPT_FILE, PROVIDERS, Opinion

ROOT = Path(__file__).resolve().parent.parent
CASSETTES = ROOT / "cassettes"
PROMPT = (ROOT / PROMPT_FILE).read_text(encoding="utf-8")
ENGINES: tuple[Literal["direct", "litellm"], ...] = ("direct", "litellm")
REPLAYS = [
    (name, engine)
    for name in NAMES
    for engine in ENGINES
    # LiteLLM by itself sends another request than the one that was recorded: without a
    # tool's name in Ollama's tool message, and with Gemini's older names for a schema.
    if engine == "direct"
    or name not in {"ollama_tools", "google_tools", "google_structured"}
]
MAX_BYTES = 10_000
# Before 1.110 LiteLLM sent it to a Gemini model that it did not know.
CHANGED = ["generationConfig.temperature"]
LOCAL = re.compile(r"llama\.cpp b\d+, SmolLM2-135M(, through ollama-proxy-plus \S+)?")
MOCK = re.compile(r"aimock \S+, a mock: not a model")
KEY = "sk-of-the-replay"

Json = dict[str, Any]


def _exchanges(name: str) -> list[Json]:
    """Read a cassette without the code that is tested."""
    found: Json = yaml.safe_load((CASSETTES / f"{name}.yaml").read_text("utf-8"))
    exchanges: list[Json] = found["interactions"]
    return exchanges


def _sent(name: str) -> Json:
    sent: Json = json.loads(_exchanges(name)[0]["request"]["body"])
    return sent


def _model(name: str) -> str:
    in_path = re.search(r"/models/([^/:]+):", _exchanges(name)[0]["request"]["uri"])
    return in_path[1] if in_path else str(_sent(name)["model"])


def _events(exchange: Json) -> list[Json]:
    """Return the parts of a streamed answer, or a whole one as the only part."""
    body = exchange["response"]["body"]["string"]
    text = body.decode() if isinstance(body, bytes) else body
    if "event-stream" in str(exchange["response"]["headers"]):
        lines = re.findall(r"^data: ?(\{.*)$", text, re.MULTILINE)
        return [json.loads(line) for line in lines]
    if "ndjson" in str(exchange["response"]["headers"]):
        return [json.loads(line) for line in text.splitlines() if line]
    return [json.loads(text)]


def _parts(provider: str, event: Json) -> Iterator[Json]:
    """Yield the parts of a message in an event, in any provider's format."""
    if provider == "openai":
        for choice in event["choices"]:
            yield choice.get("message") or choice.get("delta") or {}
    elif provider == "anthropic":
        yield from event.get("content", [])
        yield event.get("delta") or {}
    elif provider == "google":
        for candidate in event["candidates"]:
            yield from candidate["content"].get("parts", [])
    else:
        yield event["message"]


def _text(provider: str, exchange: Json) -> str:
    field = "text" if provider in {"anthropic", "google"} else "content"
    parts = (p for e in _events(exchange) for p in _parts(provider, e))
    return "".join(part.get(field) or "" for part in parts)


def _tokens(provider: str, exchange: Json) -> tuple[int, int]:
    """Return the input and output tokens of the last usage."""
    usage: Json = {}
    for event in _events(exchange):
        usage |= event.get("message", {}).get("usage") or {}
        usage |= event.get("usage") or event.get("usageMetadata") or {}
        usage |= event if provider == "ollama" else {}
    read, written = {
        "openai": (["prompt_tokens"], ["completion_tokens"]),
        "anthropic": (
            ["input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"],
            ["output_tokens"],
        ),
        "google": (
            ["promptTokenCount"],
            ["candidatesTokenCount", "thoughtsTokenCount"],
        ),
        "ollama": (["prompt_eval_count"], ["eval_count"]),
    }[provider]
    return sum(usage.get(k, 0) for k in read), sum(usage.get(k, 0) for k in written)


def _calls(provider: str, exchange: Json) -> list[tuple[str, Json]]:
    """Return the tool calls of an answer that was not streamed."""
    found: list[tuple[str, Json]] = []
    (event,) = _events(exchange)
    for part in _parts(provider, event):
        if part.get("type") == "tool_use":
            found.append((part["name"], part["input"]))
        if call := part.get("functionCall"):
            found.append((call["name"], call["args"]))
        for function in (call["function"] for call in part.get("tool_calls") or ()):
            given = function["arguments"]
            arguments = json.loads(given) if isinstance(given, str) else given
            found.append((function["name"], arguments))
    return found


async def _replayed(
    name: str, engine: Literal["direct", "litellm"] = "direct"
) -> list[ChatResult]:
    provider, _, kind = name.partition("_")
    uri = urlsplit(_exchanges(name)[0]["request"]["uri"])
    path = {"openai": "/v1", "google": "/v1beta"}.get(provider, "")
    address = f"{uri.scheme}://{uri.netloc}{path}"
    keys = StaticAPIKeys({provider: {"key": KEY, "base_url": address}})
    settings = Settings(base_dir=ROOT, engine=engine, retry_wait=0.01)
    async with LLMInfraService(keys, settings=settings) as service:
        with use_cassette(CASSETTES / f"{name}.yaml", ignore=CHANGED):
            return await CALLS[kind](service, provider, _model(name))


@pytest.mark.parametrize(
    ("name", "engine"), [r for r in REPLAYS if not r[0].endswith("_error")]
)
async def test_replay_gives_what_was_answered(
    name: str, engine: Literal["direct", "litellm"]
) -> None:
    """Text and tokens of every answer are those of the cassette, to the letter."""
    provider, _, kind = name.partition("_")

    results = await _replayed(name, engine)

    exchanges = _exchanges(name)
    expected = [(_text(provider, e), *_tokens(provider, e)) for e in exchanges]
    usages = [result.token_usage for result in results]
    got = [
        (result.text, usage.input, usage.output)
        for result, usage in zip(results, usages, strict=True)
        if usage
    ]
    assert got == expected
    assert all(usage and usage.total == usage.input + usage.output for usage in usages)
    assert kind == "tools" or results[0].text.strip()
    assert [result.attempts for result in results] == [1] * len(results)
    assert {result.service for result in results} == {provider}


@pytest.mark.parametrize(
    ("name", "engine"), [r for r in REPLAYS if r[0].endswith("_tools")]
)
async def test_a_tool_is_called_and_its_result_answered(
    name: str, engine: Literal["direct", "litellm"]
) -> None:
    """The call is the recorded one, and the second answer follows its result."""
    asked, answer = await _replayed(name, engine)

    provider = name.partition("_")[0]
    first, second = _exchanges(name)
    got = [(call.name, call.arguments) for call in asked.tool_calls]
    assert got == _calls(provider, first) != []
    assert asked.finish_reason == "tool_calls"
    assert answer.tool_calls == []
    assert "It is sunny in" in second["request"]["body"]


@pytest.mark.parametrize(
    ("name", "engine"), [r for r in REPLAYS if r[0].endswith("_structured")]
)
async def test_an_answer_has_the_form_that_was_asked_for(
    name: str, engine: Literal["direct", "litellm"]
) -> None:
    """The class is made of the recorded JSON."""
    provider = name.partition("_")[0]

    (result,) = await _replayed(name, engine)

    said = _text(provider, _exchanges(name)[0])
    assert result.parsed == Opinion.model_validate_json(said)
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stream_was_recorded_in_pieces(provider: str) -> None:
    """The cassette keeps the pieces, so a replay is a stream too."""
    (exchange,) = _exchanges(f"{provider}_streamed")

    lengths = [int(p.partition("@")[0]) for p in exchange["response"]["pieces"].split()]
    assert len(lengths) > 1
    assert sum(lengths) == len(exchange["response"]["body"]["string"].encode())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_recorded_error_has_its_class(
    provider: str, engine: Literal["direct", "litellm"]
) -> None:
    """A missing model and a prompt that is too long are different errors; neither is retried."""
    name = f"{provider}_error"
    (exchange,) = _exchanges(name)
    status = exchange["response"]["status"]["code"]
    expected = ModelNotFoundError if status == 404 else ContextWindowError

    with pytest.raises(LLMServiceError) as caught:
        await _replayed(name, engine)

    assert type(caught.value) is expected
    assert caught.value.status_code == status
    assert caught.value.service == provider
    assert caught.value.attempts == 1
    error = json.loads(exchange["response"]["body"]["string"])["error"]
    message = error["message"] if isinstance(error, dict) else error
    assert message in str(caught.value)


def test_a_prompt_file_reaches_openai_as_developer() -> None:
    """The recorded role is not the one that LiteLLM would have sent."""
    sent = _sent("openai_person_prompt_file")

    assert sent["messages"] == [
        {"role": "developer", "content": PROMPT},
        {"role": "user", "content": "Let us open a small bakery."},
    ]


def test_a_prompt_file_reaches_anthropic_in_its_own_field() -> None:
    """Anthropic has no role for a system prompt."""
    sent = _sent("anthropic_person_prompt_file")

    assert sent["system"] == [{"type": "text", "text": PROMPT}]
    assert [message["role"] for message in sent["messages"]] == ["user"]


def test_a_prompt_file_reaches_google_in_its_own_field() -> None:
    """Google has none either."""
    sent = _sent("google_person_prompt_file")

    assert sent["system_instruction"] == {"parts": [{"text": PROMPT}]}
    assert [content["role"] for content in sent["contents"]] == ["user"]


def test_a_prompt_file_reaches_ollama_as_system() -> None:
    """The request goes to the chat endpoint, not flattened into one prompt."""
    name = "ollama_person_prompt_file"

    messages = _sent(name)["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", PROMPT),
        ("user", "Let us open a small bakery."),
    ]
    assert urlsplit(_exchanges(name)[0]["request"]["uri"]).path == "/api/chat"


def test_every_provider_has_every_cassette() -> None:
    """No cassette is missing, and none is left over."""
    assert {path.stem for path in CASSETTES.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_cassette_says_where_it_is_from(name: str) -> None:
    """The head names a local model or mock, or else the provider's host."""
    lines = (CASSETTES / f"{name}.yaml").read_text("utf-8").splitlines()[:3]

    origin = lines[0].removeprefix("# Recorded from: ")
    hosts = {urlsplit(e["request"]["uri"]).netloc for e in _exchanges(name)}
    if hosts == {"127.0.0.1:8080"}:
        local = LOCAL.fullmatch(origin)
        assert local or MOCK.fullmatch(origin)
        assert not local or bool(local[1]) == name.startswith("ollama")
        assert bool(local) == (_model(name) == "smollm2-135m") or name.endswith(
            "_error"
        )
    else:
        assert {origin} == hosts
    assert re.fullmatch(
        r"# on \d{4}-\d\d-\d\d by dipeo_llm \S+ on litellm \d\S+", lines[1]
    )
    command = rf"# again with: python examples/record_cassettes\.py (--real )?{name}"
    assert re.fullmatch(command, lines[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_cassette_is_small_enough_to_read(name: str) -> None:
    """A reviewer can read the recording."""
    assert (CASSETTES / f"{name}.yaml").stat().st_size < MAX_BYTES


def test_no_cassette_holds_a_secret() -> None:
    """The check that users run over theirs finds nothing in ours."""
    assert check(CASSETTES) == []
