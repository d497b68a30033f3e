"""What works with which provider, tried on the direct engine.

Each feature is a function that uses it, through the loopback server, as a caller would.
The table in README.md is made of what came of it: `python -m tests.test_features` tries
everything and writes it anew, and a test holds the two together. Where a feature is not
there, the provider's reason stands beside it, and trying it must fail.
"""

import asyncio
import base64
import contextlib
import struct
import tempfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dipeo_llm import (
    ChatResult,
    DiPeOLLMError,
    ImageGenerationResult,
    InvalidRequestError,
    LLMInfraService,
    RateLimits,
    Settings,
    StructuredOutputError,
    ToolConfig,
    ToolType,
    WebSearchResult,
)
from dipeo_llm.domain import StreamChunk
from tests.conftest import HELLO, MODELS, PROVIDERS, keys_for
from tests.provider_server import Answer, ProviderServer, Received


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), zlib.crc32(kind + data)
        return size + kind + data + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


PNG = _png()
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
WAV = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\0\0\0\0"


class Server(ProviderServer):
    """The loopback server, with OpenAI's endpoint that counts tokens."""

    def _lookup(self, asked: Received) -> dict[str, Any] | None:
        if asked.path == "/v1/responses/input_tokens":
            return {"object": "response.input_tokens", "input_tokens": 11}
        return super()._lookup(asked)


@dataclass
class Bench:
    """A provider, and a service that asks it."""

    server: ProviderServer
    service: LLMInfraService
    provider: str

    async def ask(
        self,
        messages: list[dict[str, Any]] | None = None,
        model: str | None = None,
        **options: Any,
    ) -> ChatResult:
        """Ask for a whole answer."""
        result: ChatResult = await self.service.complete(
            messages or HELLO, model or MODELS[self.provider], self.provider, **options
        )
        return result

    async def stream(
        self, model: str | None = None, **options: Any
    ) -> tuple[list[StreamChunk], ChatResult]:
        """Read a stream to its end."""
        stream = self.service.stream(
            HELLO, model or MODELS[self.provider], self.provider, **options
        )
        async with stream:
            chunks = [chunk async for chunk in stream]
            return chunks, await stream.result()

    @property
    def body(self) -> Any:
        """What was sent last."""
        return self.server.requests[-1].json


@contextlib.asynccontextmanager
async def bench(provider: str) -> AsyncIterator[Bench]:
    """Open a server, and a service that asks it; pictures may lie in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        await asyncio.to_thread(Path(folder, "red.png").write_bytes, PNG)
        async with Server() as server:
            settings = Settings(engine="direct", max_retries=0, base_dir=Path(folder))
            async with LLMInfraService(keys_for(server), settings=settings) as service:
                yield Bench(server, service, provider)


Try = Callable[[Bench], Awaitable[None]]


@dataclass
class Feature:
    """A row of the table."""

    name: str
    use: Try
    missing: Mapping[str, str] = field(default_factory=dict)
    """Providers that do not have it, and why."""


FEATURES: list[Feature] = []


def feature(name: str, **missing: str) -> Callable[[Try], Try]:
    """Make a function a row of the table."""

    def add(use: Try) -> Try:
        FEATURES.append(Feature(name, use, missing))
        return use

    return add


# --- The features ----------------------------------------------------------------------

CALLS: list[tuple[str, Any]] = [
    ("weather", {"city": "Köln", "days": 2}),
    ("clock", {"zone": "UTC"}),
]
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tell the time.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}},
            "required": ["zone"],
        },
    },
}


def weather(city: str, days: int = 1) -> dict[str, Any]:
    """Tell the weather of a city."""
    return {"city": city, "days": days}


def asked_of_caller(result: ChatResult) -> list[tuple[str, Any]]:
    """The calls of a result, by name and arguments; each must have an id."""
    assert all(call.id for call in result.tool_calls)
    return [(call.name, call.arguments) for call in result.tool_calls]


def found(value: Any, name: str) -> list[Any]:
    """Every value under a name, anywhere in a request."""
    if isinstance(value, list):
        return [hit for item in value for hit in found(item, name)]
    if not isinstance(value, dict):
        return []
    here = [value[name]] if name in value else []
    return here + [hit for item in value.values() for hit in found(item, name)]


@feature("Streams, with the same result as a call")
async def streams(b: Bench) -> None:
    """Chunks come one by one, and make up the result."""
    b.server.default = Answer("So it is: ß.", pieces=6)
    whole = await b.ask()

    chunks, result = await b.stream()

    assert len(chunks) == 6
    assert "".join(chunk.text for chunk in chunks) == result.text == "So it is: ß."
    left_out = {"raw_response", "request_id"}
    assert result.model_dump(exclude=left_out) == whole.model_dump(exclude=left_out)


@feature("Tools: OpenAI's dicts")
async def tools(b: Bench) -> None:
    """A function tool reaches the provider, and its call comes back parsed."""
    b.server.reply(Answer(tool_calls=CALLS[1:]))

    result = await b.ask(tools=[CLOCK])

    assert asked_of_caller(result) == CALLS[1:]
    assert result.finish_reason == "tool_calls"
    assert "Tell the time." in found(b.body, "description")


@feature("Tools: typed Python functions")
async def functions(b: Bench) -> None:
    """A function is described by its name, its docstring and its types."""
    b.server.reply(Answer(tool_calls=CALLS[:1]))

    result = await b.ask(tools=[weather])

    (schema,) = [p for p in found(b.body, "properties") if "city" in p]
    assert {name: str(p["type"]).lower() for name, p in schema.items()} == {
        "city": "string",
        "days": "integer",
    }
    assert "weather" in found(b.body, "name")
    assert "Tell the weather of a city." in found(b.body, "description")
    assert asked_of_caller(result) == CALLS[:1]


@feature("Tools: several calls at once")
async def parallel(b: Bench) -> None:
    """Parallel calls come apart, each with its own id."""
    b.server.reply(Answer("Both.", tool_calls=CALLS))

    result = await b.ask(tools=[weather, CLOCK])

    assert asked_of_caller(result) == CALLS
    assert len({call.id for call in result.tool_calls}) == 2
    assert result.text == "Both."


@feature("Tools: several calls at once, in a stream")
async def parallel_stream(b: Bench) -> None:
    """Parallel calls come apart in a stream too, in its chunks and in its result."""
    b.server.reply(Answer("Both.", tool_calls=CALLS))

    chunks, result = await b.stream(tools=[weather, CLOCK])

    deltas = [chunk.tool_call for chunk in chunks if chunk.tool_call]
    assert {delta.index for delta in deltas} == {0, 1}
    assert [d.name for d in deltas if d.name] == ["weather", "clock"]
    assert asked_of_caller(result) == CALLS
    assert result.text == "".join(chunk.text for chunk in chunks) == "Both."


@feature("Tools: results sent back, with call ids and thought signatures")
async def tool_turn(b: Bench) -> None:
    """What `to_messages` and `to_message` make is what the provider wants back."""
    thought = "Look it up."
    b.server.reply(
        Answer("Both.", reasoning=thought, tool_calls=CALLS), Answer("Fine.")
    )
    result = await b.ask(tools=[weather, CLOCK])
    messages = HELLO + result.to_messages()
    messages += [call.to_message({"ok": call.name}) for call in result.tool_calls]

    last = await b.ask(messages, tools=[weather, CLOCK])

    assert last.text == "Fine."
    sent = b.body.get("contents") or b.body["messages"]
    ids = [call.id for call in result.tool_calls]
    if b.provider == "openai":
        assert [c["id"] for c in sent[1]["tool_calls"]] == ids
        assert found(sent, "tool_call_id") == ids
    elif b.provider == "anthropic":
        kinds = [block["type"] for block in sent[1]["content"]]
        assert kinds == ["thinking", "text", "tool_use", "tool_use"]
        assert sent[1]["content"][0] == result.thinking_blocks[0]
        assert found(sent, "tool_use_id") == ids
    elif b.provider == "google":
        seals = [call.thought_signature for call in result.tool_calls]
        assert found(sent, "thoughtSignature") == [s for s in seals if s] != []
        assert [part["name"] for part in found(sent, "function_response")] == [
            "weather",
            "clock",
        ]
    else:
        assert found(sent, "thinking") == [thought]
        assert found(sent, "tool_call_id") == ids


# In each provider's own words.
SEARCHES = {
    "openai": {"type": "web_search"},
    "anthropic": {"type": "web_search_20250305", "name": "web_search"},
    "google": {"googleSearch": {}},
}


@feature(
    "Web search by the provider, with the pages",
    ollama="its chat endpoint runs no tools of its own",
)
async def web_search(b: Bench) -> None:
    """A search is the provider's work: its pages are told, and nobody is to run it."""
    pages = [("https://a.example/1", "One"), ("https://b.example/2", "Two")]
    b.server.default = Answer("It rains.", citations=pages)

    # OpenAI's nano models do not search.
    model = "gpt-4.1-mini" if b.provider == "openai" else None
    whole = await b.ask(model=model, tools=[ToolConfig(type=ToolType.WEB_SEARCH)])
    assert b.body["tools"] == [SEARCHES[b.provider]]
    _, streamed = await b.stream(
        model, tools=[ToolConfig(type=ToolType.WEB_SEARCH_PREVIEW)]
    )

    for result in (whole, streamed):
        (output,) = result.tool_outputs or []
        assert output.type is ToolType.WEB_SEARCH
        assert isinstance(output.result, list)
        assert [(page.url, page.title) for page in output.result] == pages
        assert all(isinstance(page, WebSearchResult) for page in output.result)
        assert result.tool_calls == []
        assert result.text == "It rains."
        assert result.finish_reason == "stop"


@feature(
    "Images generated by the provider",
    anthropic="its models do not generate images",
    ollama="its chat endpoint gives text only",
)
async def pictures_out(b: Bench) -> None:
    """A picture comes as base64, beside the text."""
    b.server.default = Answer("Here.", images=[PNG])
    model = "gemini-2.5-flash-image" if b.provider == "google" else None

    result = await b.ask(model=model, tools=[ToolConfig(type="image_generation")])

    (output,) = result.tool_outputs or []
    assert output.type is ToolType.IMAGE_GENERATION
    assert isinstance(output.result, ImageGenerationResult)
    assert base64.b64decode(output.result.image_data) == PNG
    assert output.result.format == "png"
    assert result.tool_calls == []


class Colour(Enum):
    """What a thing looks like."""

    RED = "red"
    BLUE = "blue"


class Circle(BaseModel):
    """A round thing."""

    radius: float


class Square(BaseModel):
    """A thing with corners."""

    side: int


class Box(BaseModel):
    """Things in a box."""

    label: str
    things: list[Circle | Square]
    colour: Colour
    note: str | None = None


BOXED = Box(
    label="ß",
    things=[Circle(radius=1.5), Square(side=2)],
    colour=Colour.BLUE,
)
BOX_TEXT = (
    '{"label": "ß", "things": [{"radius": 1.5}, {"side": 2}], "colour": "blue",'
    ' "note": null}'
)


@feature(
    "Structured output by a pydantic class: nested, enums, unions, lists, optional fields"
)
async def as_class(b: Bench) -> None:
    """The class travels as a schema, and the answer comes back as its instance."""
    b.server.default = Answer(BOX_TEXT)

    whole = await b.ask(response_format=Box)
    _, streamed = await b.stream(text_format=Box)

    assert whole.parsed == streamed.parsed == BOXED
    fields = [names for names in found(b.body, "properties") if "things" in names]
    assert sorted(fields[0]) == ["colour", "label", "note", "things"]
    assert ["red", "blue"] in found(b.body, "enum")


@feature("Structured output by a JSON schema")
async def as_schema(b: Bench) -> None:
    """A schema travels, and what comes back is checked against it."""
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
    }
    b.server.reply(Answer('{"sum": 5}'))

    result = await b.ask(response_format=schema)

    assert result.parsed == {"sum": 5}
    assert [p for p in found(b.body, "properties") if "sum" in p]


@feature("Structured output: truncated and invalid answers are distinguished")
async def broken_form(b: Bench) -> None:
    """A cut answer is a truncation, another one invalid, and the text is kept."""
    answers = {
        "truncation": Answer('{"label": "ß", "thi', finish="length"),
        "invalid": Answer('{"label": 5}'),
    }
    for reason, answer in answers.items():
        b.server.reply(answer)

        with pytest.raises(StructuredOutputError) as caught:
            await b.ask(response_format=Box)

        assert caught.value.reason == reason
        assert caught.value.text == answer.text


@feature(
    "Refusals are distinguished from answers",
    ollama="its API does not mark them",
)
async def refusal(b: Bench) -> None:
    """A model that declines says so in `refusal`, and is no answer in a form."""
    b.server.default = Answer(refusal="I cannot help with that.")

    plain = await b.ask()
    with pytest.raises(StructuredOutputError) as caught:
        await b.ask(response_format=Box)

    assert plain.refusal
    assert caught.value.reason == "refusal"


@feature(
    "Several answers to one question (`n`)",
    anthropic="its API gives one answer; `n` is left out",
    ollama="its API gives one answer; `n` is left out",
)
async def choices(b: Bench) -> None:
    """All texts are in `texts`, the first of them in `text`."""
    b.server.default = Answer("one", n_texts=["two", "three"])

    whole = await b.ask(n=3)
    _, streamed = await b.stream(n=3)

    assert whole.texts == streamed.texts == ["one", "two", "three"]
    assert whole.text == "one"


@feature("Sampling: temperature, max_tokens, stop")
async def sampling(b: Bench) -> None:
    """The common options reach the provider under its own names."""
    await b.ask(temperature=0.25, max_tokens=33, stop=["END"])

    assert found(b.body, "temperature") == [0.25]
    named = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    limits = [
        found(b.body, name) for name in (*named, "maxOutputTokens", "num_predict")
    ]
    assert [33] in limits
    stops = [found(b.body, n) for n in ("stop", "stop_sequences", "stopSequences")]
    assert [["END"]] in stops


@feature("`seed`", anthropic="its API does not have it; it is left out")
async def seed(b: Bench) -> None:
    """A seed reaches the provider."""
    await b.ask(seed=7)

    assert found(b.body, "seed") == [7]


@feature("Reasoning effort")
async def effort(b: Bench) -> None:
    """The effort is put in the provider's own words."""
    model = "gpt-5-mini" if b.provider == "openai" else None

    await b.ask(model=model, reasoning_effort="low")

    wanted = {
        "openai": ("reasoning_effort", "low"),
        "anthropic": ("budget_tokens", 1024),
        "google": ("thinkingBudget", 1024),
        "ollama": ("think", True),
    }
    name, value = wanted[b.provider]
    assert found(b.body, name) == [value]


@feature(
    "Reasoning text",
    openai="its chat endpoint hides it",
)
async def thoughts(b: Bench) -> None:
    """What the model thought is in `reasoning`, and not in the text."""
    b.server.default = Answer("4", reasoning="Two and two.")

    whole = await b.ask()
    chunks, streamed = await b.stream()

    assert whole.reasoning == streamed.reasoning == "Two and two."
    assert "".join(chunk.reasoning for chunk in chunks) == "Two and two."
    assert whole.text == streamed.text == "4"


@feature(
    "Reasoning tokens",
    ollama="its API counts them with the rest",
)
async def thought_tokens(b: Bench) -> None:
    """Tokens of thought are part of the output, and counted apart as well."""
    b.server.default = Answer(reasoning="Hm.", output_tokens=9, reasoning_tokens=4)

    result = await b.ask()

    assert result.token_usage is not None
    assert result.token_usage.reasoning == 4
    assert result.token_usage.output == 9


_BY_ITSELF = "it caches by itself; `cache_control` is left out"


@feature(
    "Prompt caching by `cache_control`",
    openai=_BY_ITSELF,
    google=_BY_ITSELF,
    ollama=_BY_ITSELF,
)
async def cache_control(b: Bench) -> None:
    """A marked part keeps its mark on the wire."""
    mark = {"type": "ephemeral"}
    part = {"type": "text", "text": "Long.", "cache_control": mark}

    await b.ask([{"role": "system", "content": [part]}, *HELLO])

    assert found(b.body, "cache_control") == [mark]


@feature(
    "Prompt caching by `prompt_cache_key` in `extra_body`",
    anthropic="it has `cache_control` for that",
    google="it has no such key",
    ollama="it has no such key",
)
async def cache_key(b: Bench) -> None:
    """What a provider takes and this package does not know travels in `extra_body`."""
    assert b.provider == "openai"

    await b.ask(extra_body={"prompt_cache_key": "k"})

    assert b.body["prompt_cache_key"] == "k"


@feature("Cached tokens", ollama="its API does not report them")
async def cached_tokens(b: Bench) -> None:
    """Tokens from a cache are part of the input, and counted apart as well."""
    b.server.default = Answer(input_tokens=20, cached_tokens=8)

    result = await b.ask()

    assert result.token_usage is not None
    assert result.token_usage.cached == 8
    assert result.token_usage.input == 20


@feature(
    "Tokens counted before the call, by the provider",
    ollama="it has no endpoint for it; LiteLLM's tokenizer counts",
)
async def count_tokens(b: Bench) -> None:
    """The number is the provider's, and nothing is generated for it."""
    counted = await b.service.count_tokens(HELLO, MODELS[b.provider], b.provider)

    assert counted.source == "provider"
    assert counted.tokens > 0


@feature(
    "Remaining rate limits",
    google="it sends no such headers",
    ollama="it has no limits",
)
async def limits(b: Bench) -> None:
    """Requests and tokens left, and the seconds until they are full again."""
    headers = {
        "openai": {
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1m2.5s",
            "x-ratelimit-remaining-tokens": "1000",
            "x-ratelimit-reset-tokens": "20ms",
        },
        "anthropic": {
            "anthropic-ratelimit-requests-remaining": "59",
            "anthropic-ratelimit-tokens-remaining": "1000",
        },
    }
    b.server.default = Answer(headers=headers.get(b.provider, {}))

    whole = await b.ask()
    _, streamed = await b.stream()

    resets = (62.5, 0.02) if b.provider == "openai" else (None, None)
    wanted = RateLimits(
        requests_left=59,
        requests_reset=resets[0],
        tokens_left=1000,
        tokens_reset=resets[1],
    )
    assert whole.rate_limits == streamed.rate_limits == wanted


@feature("Tokens of a call")
async def usage(b: Bench) -> None:
    """Input, output and their sum."""
    b.server.default = Answer(input_tokens=12, output_tokens=5)

    whole = await b.ask()
    _, streamed = await b.stream()

    for result in (whole, streamed):
        assert result.token_usage is not None
        assert (result.token_usage.input, result.token_usage.output) == (12, 5)
        assert result.token_usage.total == 17


@feature("Cost of a call in USD", ollama="it runs on your machine and has no price")
async def cost(b: Bench) -> None:
    """The price of the tokens, by LiteLLM's table."""
    result = await b.ask()

    assert result.cost_usd is not None
    assert 0 < result.cost_usd < 0.01


@feature(
    "Abilities and price of a model (`capabilities`)",
    ollama="LiteLLM's table does not have local models",
)
async def capabilities(b: Bench) -> None:
    """LiteLLM's table says what a model takes."""
    able = b.service.capabilities(MODELS[b.provider], service=b.provider)

    assert (able.service, able.model) == (b.provider, MODELS[b.provider])
    assert able.tools is True
    assert able.vision is True
    assert able.structured_output is True
    assert able.context_window is not None
    assert able.context_window >= 100_000
    assert able.input_usd_per_million is not None
    assert 0 < able.input_usd_per_million < 10


@feature("List of models")
async def models(b: Bench) -> None:
    """The provider is asked which models it has."""
    names = await b.service.get_available_models(b.provider)

    assert set(b.server.models[b.provider]) <= set(names)


async def sends(b: Bench, part: Any, data: bytes, model: str | None = None) -> None:
    """Send a part beside a question, and look for its bytes in what was sent."""
    text = {"type": "text", "text": "What is this?"}

    await b.ask([{"role": "user", "content": [text, part]}], model)

    assert base64.b64encode(data) in b.server.requests[-1].body


def url(kind: str, data: bytes) -> str:
    """Write bytes as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@feature("Image input")
async def pictures_in(b: Bench) -> None:
    """A picture by a data: URL, or as a file below the base directory."""
    await sends(
        b, {"type": "image_url", "image_url": {"url": url("image/png", PNG)}}, PNG
    )
    await sends(b, Path("red.png"), PNG)


@feature("PDF input", ollama="its API does not take them")
async def pdfs_in(b: Bench) -> None:
    """A PDF by a data: URL."""
    data = url("application/pdf", PDF)
    await sends(
        b, {"type": "file", "file": {"filename": "a.pdf", "file_data": data}}, PDF
    )


@feature(
    "Audio input",
    anthropic="its API does not take it",
    ollama="its API does not take it",
)
async def sound_in(b: Bench) -> None:
    """A recording as base64, as OpenAI writes it."""
    data = {"data": base64.b64encode(WAV).decode(), "format": "wav"}
    model = "gpt-4o-audio-preview" if b.provider == "openai" else None
    await sends(b, {"type": "input_audio", "input_audio": data}, WAV, model)


# --- The table -------------------------------------------------------------------------

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- features -->", "<!-- /features -->"
TITLES = {
    "openai": "OpenAI",
    "anthropic": "Anthropic",
    "google": "Google",
    "ollama": "Ollama",
}
CELLS = [(row, provider) for row in FEATURES for provider in PROVIDERS]


def table(works: Callable[[Feature, str], bool]) -> str:
    """Write the table in Markdown: what works, and the reason where it does not."""
    lines = [
        f"| | {' | '.join(TITLES[p] for p in PROVIDERS)} |",
        "| --- |" + " --- |" * len(PROVIDERS),
    ]
    for row in FEATURES:
        cells = [
            "yes" if works(row, p) else f"no: {row.missing.get(p, '?')}"
            for p in PROVIDERS
        ]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


async def outcome(row: Feature, provider: str) -> bool:
    """Try a feature; whether it is there."""
    async with bench(provider) as b:
        try:
            await row.use(b)
        except InvalidRequestError:
            # Refused before anything was sent, or else by the provider.
            assert all(asked.method == "GET" for asked in b.server.requests)
            return False
        except (AssertionError, DiPeOLLMError, pytest.fail.Exception):
            return False
        return True


@pytest.mark.parametrize(
    ("row", "provider"),
    [(row, provider) for row, provider in CELLS if provider not in row.missing],
    ids=lambda value: getattr(value, "name", value),
)
async def test_a_feature(row: Feature, provider: str) -> None:
    """What the table says works does."""
    async with bench(provider) as b:
        await row.use(b)


@pytest.mark.parametrize(
    ("row", "provider"),
    [(row, provider) for row, provider in CELLS if provider in row.missing],
    ids=lambda value: getattr(value, "name", value),
)
async def test_what_is_not_there(row: Feature, provider: str) -> None:
    """What the table says a provider does not have cannot be had from it."""
    assert not await outcome(row, provider)


async def test_a_search_model_of_openai() -> None:
    """OpenAI's search models search in a chat completion, with their own option."""
    tool = ToolConfig(type="web_search", config={"search_context_size": "low"})
    async with bench("openai") as b:
        b.server.reply(Answer("Rain.", citations=[("https://a.example/", "A")]))

        result = await b.ask(model="gpt-4o-search-preview", tools=[tool])

        assert b.server.requests[-1].path == "/v1/chat/completions"
        assert b.body["web_search_options"] == {"search_context_size": "low"}
        assert "tools" not in b.body
        (output,) = result.tool_outputs or []
        assert output.result == [WebSearchResult(url="https://a.example/", title="A")]


def test_the_table_is_published() -> None:
    """README.md holds the table of these features."""
    text = README.read_text()

    published = text.partition(BEGIN)[2].partition(END)[0].strip()

    assert published == table(lambda row, provider: provider not in row.missing), (
        "write it anew: python -m tests.test_features"
    )


async def main() -> None:
    """Try everything, and write what came of it into README.md."""
    works = {
        (row.name, provider): await outcome(row, provider) for row, provider in CELLS
    }
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    made = table(lambda row, provider: works[row.name, provider])
    README.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    asyncio.run(main())
