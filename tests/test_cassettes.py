"""Real exchanges, replayed through the whole library with the network closed.

What answered was a small model in llama.cpp; `examples/record_cassettes.py` records
these cassettes, from the very calls that are made here. What is asserted is read from
the cassette itself, so that a new recording, which may hold other words, needs no change.
"""

import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import vcr
import yaml

from dipeo_llm import (
    ChatResult,
    ContextWindowError,
    LLMInfraService,
    Person,
    PersonLLMConfig,
    Settings,
    StaticAPIKeys,
)

ROOT = Path(__file__).resolve().parent.parent
CASSETTES = ROOT / "cassettes"
SERVICES = ("openai", "anthropic", "ollama")
KEY = "sk-of-the-replay"
ORIGIN = "http://local-model.test:8080"
KEYS = StaticAPIKeys(
    {
        "openai": {"key": KEY, "base_url": f"{ORIGIN}/v1"},
        "anthropic": {"key": KEY, "base_url": ORIGIN},
        "ollama": {"key": "", "base_url": ORIGIN},
    }
)
PROMPT = (ROOT / "prompts" / "optimist.md").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Recorded:
    """The one exchange of a cassette."""

    head: list[str]
    """The comment lines that it begins with."""
    text: str
    """The whole file."""
    request: dict[str, Any]
    """The JSON that was sent."""
    uri: str
    answer: dict[str, Any]
    """The JSON that came back."""


def recorded(name: str) -> Recorded:
    """Read a cassette without vcrpy."""
    text = (CASSETTES / f"{name}.yaml").read_text(encoding="utf-8")
    (exchange,) = yaml.safe_load(text)["interactions"]
    head = [line for line in text.splitlines()[:5] if line.startswith("#")]
    return Recorded(
        head,
        text,
        json.loads(exchange["request"]["body"]),
        exchange["request"]["uri"],
        json.loads(exchange["response"]["body"]["string"]),
    )


@contextmanager
def replay(name: str) -> Iterator[None]:
    """Answer from a cassette and from nothing else; every exchange must be used."""
    player = vcr.VCR(record_mode="none", match_on=["method", "uri", "json"])
    player.register_matcher("json", _same_json)
    with player.use_cassette(str(CASSETTES / f"{name}.yaml")) as cassette:
        yield
    assert cassette.all_played


def _same_json(one: Any, other: Any) -> None:
    assert json.loads(one.body) == json.loads(other.body)


@pytest.fixture(autouse=True)
def _closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail("a replay reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


Call = Callable[[LLMInfraService, str], Awaitable[ChatResult]]


async def _plain(service: LLMInfraService, provider: str) -> ChatResult:
    return await service.complete(
        [{"role": "user", "content": "Say hello."}],
        f"{provider}/smollm2-135m",
        provider,
        temperature=0,
        max_tokens=16,
    )


async def _person(service: LLMInfraService, provider: str) -> ChatResult:
    optimist = Person(
        id="optimist",
        llm_config=PersonLLMConfig(
            service=provider,
            model=f"{provider}/smollm2-135m",
            api_key_id=provider,
            prompt_file="prompts/optimist.md",
        ),
    )
    return await optimist.complete(
        "Let us open a small bakery.", service, temperature=0, max_tokens=16
    )


CALLS: Mapping[str, Call] = {"plain": _plain, "person_prompt_file": _person}


async def _replayed(name: str) -> ChatResult:
    provider, _, kind = name.partition("_")
    settings = Settings(base_dir=ROOT, max_retries=0)
    async with LLMInfraService(KEYS, settings=settings) as service:
        with replay(name):
            return await CALLS[kind](service, provider)


def _said(provider: str, answer: Mapping[str, Any]) -> tuple[str, int, int]:
    """Read text, input and output tokens as each provider's own format has them."""
    if provider == "openai":
        usage = answer["usage"]
        text = answer["choices"][0]["message"]["content"]
        return text, usage["prompt_tokens"], usage["completion_tokens"]
    if provider == "anthropic":
        usage = answer["usage"]
        read = usage["input_tokens"] + usage["cache_read_input_tokens"]
        return answer["content"][0]["text"], read, usage["output_tokens"]
    return (
        answer["message"]["content"],
        answer["prompt_eval_count"],
        answer["eval_count"],
    )


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("provider", SERVICES)
async def test_replay_gives_what_the_model_said(provider: str, kind: str) -> None:
    """Text and tokens are those of the recorded answer, to the letter."""
    name = f"{provider}_{kind}"

    result = await _replayed(name)

    text, read, written = _said(provider, recorded(name).answer)
    usage = result.token_usage
    assert result.text == text
    assert text.strip()
    assert usage is not None
    assert (usage.input, usage.output, usage.total) == (read, written, read + written)
    assert result.attempts == 1
    assert not result.cached


@pytest.mark.parametrize("provider", SERVICES)
async def test_a_local_model_has_no_price(provider: str) -> None:
    """No price table knows the model, and unknown is not nothing."""
    result = await _replayed(f"{provider}_plain")

    assert result.cost_usd is None


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_an_answer_that_was_cut_off_says_so(provider: str) -> None:
    """The model ran into max_tokens, which the Ollama proxy does not pass on."""
    result = await _replayed(f"{provider}_plain")

    assert result.finish_reason == "length"


def test_a_prompt_file_reaches_openai_as_developer() -> None:
    """The role in the recorded bytes is not the one that LiteLLM would have put there."""
    sent = recorded("openai_person_prompt_file")

    assert sent.request["messages"] == [
        {"role": "developer", "content": PROMPT},
        {"role": "user", "content": "Let us open a small bakery."},
    ]
    assert sent.uri == f"{ORIGIN}/v1/chat/completions"


def test_a_prompt_file_reaches_anthropic_in_its_own_field() -> None:
    """Anthropic knows no role for a system prompt."""
    sent = recorded("anthropic_person_prompt_file")

    assert sent.request["system"] == [{"type": "text", "text": PROMPT}]
    assert [message["role"] for message in sent.request["messages"]] == ["user"]
    assert sent.uri == f"{ORIGIN}/v1/messages"


def test_a_prompt_file_reaches_ollama_as_system() -> None:
    """And at the chat endpoint, not flattened into one prompt."""
    sent = recorded("ollama_person_prompt_file")

    roles = [
        (message["role"], message["content"]) for message in sent.request["messages"]
    ]
    assert roles == [("system", PROMPT), ("user", "Let us open a small bakery.")]
    assert sent.uri == f"{ORIGIN}/api/chat"


async def test_a_prompt_that_is_too_long_is_told_apart() -> None:
    """The model's own error 400 becomes ContextWindowError, and is not retried."""
    too_long = [{"role": "user", "content": "a " * 4096}]
    async with LLMInfraService(KEYS, settings=Settings(base_dir=ROOT)) as service:
        with replay("openai_error"), pytest.raises(ContextWindowError) as caught:
            await service.complete(
                too_long, "openai/smollm2-135m", "openai", max_tokens=16
            )

    error = recorded("openai_error").answer["error"]
    assert error["type"] == "exceed_context_size_error"
    assert caught.value.status_code == 400
    assert caught.value.attempts == 1
    assert not caught.value.retryable
    assert error["message"] in str(caught.value)


@pytest.mark.parametrize("path", sorted(CASSETTES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_cassette_says_where_it_is_from(path: Path) -> None:
    """Its first lines name server, model, date, versions and how to make it again."""
    cassette = recorded(path.stem)

    head = "\n".join(cassette.head)
    assert re.match(r"# Recorded from: llama\.cpp b\d+, SmolLM2-135M", head)
    assert ("through ollama-proxy-plus" in head) == path.stem.startswith("ollama")
    assert re.search(r"on \d{4}-\d\d-\d\d by dipeo_llm \S+ on litellm \d\S+", head)
    assert f"python examples/record_cassettes.py {path.stem}" in head
    assert not re.search("OpenAI|Anthropic", head)


@pytest.mark.parametrize("path", sorted(CASSETTES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_cassette_holds_no_key_and_no_port_of_the_day(path: Path) -> None:
    """No header that could carry a key is in it, and nothing of the machine."""
    text = recorded(path.stem).text.lower()

    for word in ("authorization", "api-key", "bearer", "127.0.0.1", "localhost"):
        assert word not in text
