"""Real answers of the real providers, replayed through the whole library.

Every recorded chat in `../shared/recordings` is served again, byte for byte and cut at
random places, and what a caller gets is compared with a reading of the same bytes that
is written down here and shares no code with the package.
"""

import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    ChatResult,
    InvalidRequestError,
    LLMInfraService,
    ModelNotFoundError,
    QuotaExceededError,
    RateLimitError,
    ServiceUnavailableError,
    Settings,
    StaticAPIKeys,
    WebSearchResult,
)
from dipeo_llm.domain import StreamChunk
from tests.provider_server import ProviderServer, Raw

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "recordings"
ENGINES = ("direct", "litellm")

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the recordings are not beside this copy of the project"
)

# By the end of the URL that was asked: whose API it is, and the name of its format.
_APIS = {
    "/chat/completions": ("openai", "openai"),
    "/v1/responses": ("openai", "responses"),
    "/v1/messages": ("anthropic", "anthropic"),
    ":generateContent": ("google", "google"),
    ":streamGenerateContent": ("google", "google"),
    "/api/chat": ("ollama", "ollama"),
}


@dataclass(frozen=True)
class Recording:
    """One recorded chat."""

    name: str
    provider: str
    format: str
    model: str
    request: dict[str, Any]
    response: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the provider answered with 200."""
        return bool(self.response["status"] == 200)

    @property
    def streamed(self) -> bool:
        """Whether the caller had asked for a stream."""
        asked = self.request["body"].get("stream")
        if self.format == "ollama":
            return asked is not False and bool(self.ok)
        return asked is True or ":stream" in self.request["url"]

    @property
    def bytes(self) -> bytes:
        """The body as a provider sends it to us.

        Google's stream as a JSON array is what a caller gets who does not ask for
        `alt=sse`; we always do, so its elements are framed as events.
        """
        text: str = self.response["body"]
        if self.format == "google" and self.streamed and text.startswith("["):
            text = "".join(f"data: {json.dumps(e)}\r\n\r\n" for e in json.loads(text))
        return text.encode()

    def reply(self) -> Raw:
        """What the loopback server sends: a stream is cut at random places."""
        body = self.bytes
        headers = {
            k: v for k, v in self.response["headers"].items() if v.isprintable()
        }
        if not (self.streamed and self.ok):
            return Raw(self.response["status"], headers, body)
        headers["content-type"] = (
            "application/x-ndjson" if self.format == "ollama" else "text/event-stream"
        )
        draw = random.Random(self.name)
        places = sorted(draw.randrange(len(body) + 1) for _ in range(60))
        pieces = [
            body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)
        ]
        return Raw(200, headers, [p for p in pieces if p], framing="chunked")


def _recordings() -> Iterator[Recording]:
    for path in sorted(FOLDER.glob("*/*.json")):
        data = json.loads(path.read_text())
        request = data["request"]
        url = request["url"].partition("?")[0]
        api = next((api for end, api in _APIS.items() if url.endswith(end)), None)
        if request["method"] != "POST" or api is None:
            continue
        model = request["body"].get("model") or data.get("model") or "o4-mini"
        if api[1] == "google":
            model = url.rpartition("/")[2].partition(":")[0]
        yield Recording(
            f"{path.parent.name}/{path.stem}", *api, model, request, data["response"]
        )


RECORDINGS = {recording.name: recording for recording in _recordings()}


# Streams that broke off for the one who recorded them too.
BROKEN = {
    # OpenRouter's, sent for Novita: [DONE] comes, but never a finish reason.
    "openai/stream-toolcall-gpt-4.1-d3f6",
}


def pick(*, streamed: bool, ok: bool = True) -> Any:
    """Parametrize a test with the recordings of one kind."""
    names = [n for n, r in RECORDINGS.items() if (r.streamed, r.ok) == (streamed, ok)]
    return pytest.mark.parametrize("name", [n for n in names if n not in BROKEN])


each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture
async def services(
    server: ProviderServer, keys: StaticAPIKeys
) -> AsyncIterator[dict[str, LLMInfraService]]:
    """Open one service for each engine; neither tries anything twice."""
    made = {
        engine: LLMInfraService(
            keys, settings=Settings(engine=engine, max_retries=0, timeout=20)
        )
        for engine in ENGINES
    }
    yield made
    for service in made.values():
        await service.aclose()


# --- An independent reading of the bodies --------------------------------------------


@dataclass
class Said:
    """What an answer means."""

    text: str = ""
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    thinking: list[Any] = field(default_factory=list)
    calls: list[tuple[str | None, str, Any]] = field(default_factory=list)
    signatures: list[str | None] = field(default_factory=list)
    finish: str | None = None
    refusal: str | None = None
    usage: dict[str, int] | None = None
    model: str | None = None
    urls: list[str] = field(default_factory=list)
    images: int = 0


def read(recording: Recording) -> Said:
    """Read a recorded 200."""
    text = recording.bytes.decode()
    events = list(_events(text, recording)) if recording.streamed else [json.loads(text)]
    said = _READ[recording.format](events)
    said.urls = list(dict.fromkeys(said.urls))
    if said.calls and said.finish == "stop":
        said.finish = "tool_calls"
    return said


def _events(text: str, recording: Recording) -> Iterator[Any]:
    lines = text.replace("\r\n", "\n").split("\n")
    if recording.format == "ollama":
        yield from (json.loads(line) for line in lines if line)
        return
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _usage(
    read: int, written: int, cached: int | None, reasoning: int | None, cache: int = 0
) -> dict[str, int]:
    return {
        "input": read,
        "output": written,
        "total": read + written,
        "cached": cached or 0,
        "reasoning": reasoning or 0,
        "cache_written": cache,
    }


def _openai(events: list[Any]) -> Said:
    said = Said()
    texts: dict[int, str] = {}
    calls: dict[int, list[Any]] = {}
    thought = refusal = ""
    for event in events:
        said.model = event.get("model") or said.model
        for choice in event["choices"]:
            message = choice.get("delta") or choice.get("message") or {}
            index = choice.get("index", 0)
            texts[index] = texts.get(index, "") + (message.get("content") or "")
            if index:
                continue
            said.finish = choice.get("finish_reason") or said.finish
            refusal += message.get("refusal") or ""
            thought += message.get("reasoning_content") or message.get("reasoning") or ""
            for at, call in enumerate(message.get("tool_calls") or ()):
                kept = calls.setdefault(call.get("index", at), [None, "", ""])
                kept[0] = call.get("id") or kept[0]
                kept[1] += call["function"].get("name") or ""
                kept[2] += call["function"].get("arguments") or ""
            for note in message.get("annotations") or ():
                said.urls.append(note["url_citation"]["url"])
        if usage := event.get("usage"):
            told = usage.get("completion_tokens_details") or {}
            total = usage["total_tokens"]
            hidden = total - usage["prompt_tokens"] - usage["completion_tokens"]
            said.usage = _usage(
                usage["prompt_tokens"],
                total - usage["prompt_tokens"],
                (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
                told.get("reasoning_tokens") or hidden,
            )
    said.text = texts.get(0, "")
    said.texts = [texts[i] for i in sorted(texts)] if len(texts) > 1 else []
    said.reasoning = [thought] if thought else []
    said.refusal = refusal or None
    said.calls = [(i, name, _arguments(text)) for i, name, text in calls.values()]
    if said.finish == "function_call":
        # The form of 2023, which we never ask for; there is no id to answer it with.
        said.finish = "tool_calls"
    return said


def _responses(events: list[Any]) -> Said:
    last = events[-1]
    whole = last.get("response", last)
    items = whole["output"] or [
        e["item"] for e in events if e.get("type") == "response.output_item.done"
    ]
    said = Said(model=whole["model"], finish="stop")
    if whole.get("status") == "incomplete":
        said.finish = {"max_output_tokens": "length"}[
            whole["incomplete_details"]["reason"]
        ]
    for item in items:
        for part in item.get("content") or ():
            said.text += part.get("text", "")
            said.refusal = part.get("refusal") or said.refusal
            said.urls += [a["url"] for a in part.get("annotations", ()) if "url" in a]
        if item["type"] == "function_call":
            call = (item["call_id"], item["name"], _arguments(item["arguments"]))
            said.calls.append(call)
        said.reasoning += [s["text"] for s in item.get("summary", ())]
        said.images += item["type"] == "image_generation_call"
    if usage := whole.get("usage"):
        said.usage = _usage(
            usage["input_tokens"],
            usage["output_tokens"],
            usage.get("input_tokens_details", {}).get("cached_tokens"),
            usage.get("output_tokens_details", {}).get("reasoning_tokens"),
        )
    return said


def _anthropic(events: list[Any]) -> Said:
    message = events[0].get("message", events[0])
    usage, stop = dict(message["usage"]), message["stop_reason"]
    blocks = {i: dict(block) for i, block in enumerate(message["content"])}
    for event in events:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = {"json": "", **event["content_block"]}
        elif event["type"] == "content_block_delta":
            kind, delta = event["delta"]["type"], event["delta"]
            block = blocks[event["index"]]
            if kind == "citations_delta":
                block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
                continue
            name = {"input_json_delta": "json"}.get(kind, kind.removesuffix("_delta"))
            piece = delta["partial_json"] if name == "json" else delta[name]
            block[name] = block.get(name, "") + piece
        elif event["type"] == "message_delta":
            stop = event["delta"]["stop_reason"]
            usage |= event["usage"]
    said = Said(model=message["model"])
    said.finish = {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "tool_use": "tool_calls",
    }[stop]
    for _, block in sorted(blocks.items()):
        text = block.pop("json", "")
        match block["type"]:
            case "text":
                said.text += block["text"]
                cited = block.get("citations") or ()
                said.urls += [c["url"] for c in cited if "url" in c]
            case "thinking" | "redacted_thinking":
                said.thinking.append(block)
                said.reasoning += [block["thinking"]] if block.get("thinking") else []
            case "tool_use":
                given = _arguments(text) if text else block["input"]
                said.calls.append((block["id"], block["name"], given))
            case "web_search_tool_result":
                said.urls += [found["url"] for found in block["content"]]
    fresh, old = usage["input_tokens"], usage.get("cache_read_input_tokens") or 0
    new = usage.get("cache_creation_input_tokens") or 0
    told = usage.get("output_tokens_details") or {}
    said.usage = _usage(
        fresh + old + new, usage["output_tokens"], old, told.get("thinking_tokens"), new
    )
    return said


def _google(events: list[Any]) -> Said:
    said = Said()
    thought = ""
    for event in events:
        said.model = event["modelVersion"]
        candidate = event["candidates"][0]
        said.finish = candidate.get("finishReason") or said.finish
        for part in candidate.get("content", {}).get("parts", ()):
            if part.get("thought"):
                thought += part["text"]
            else:
                said.text += part.get("text", "")
            if call := part.get("functionCall"):
                said.calls.append((call.get("id"), call["name"], call.get("args", {})))
                said.signatures.append(part.get("thoughtSignature"))
        chunks = candidate.get("groundingMetadata", {}).get("groundingChunks", ())
        said.urls += [chunk["web"]["uri"] for chunk in chunks if "web" in chunk]
        usage = event["usageMetadata"]
    thoughts = usage.get("thoughtsTokenCount", 0)
    said.usage = _usage(
        usage["promptTokenCount"] + usage.get("toolUsePromptTokenCount", 0),
        usage.get("candidatesTokenCount", 0) + thoughts,
        usage.get("cachedContentTokenCount"),
        thoughts,
    )
    said.reasoning = [thought] if thought else []
    ends = {"STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "content_filter"}
    said.finish = ends[str(said.finish)]
    return said


def _ollama(events: list[Any]) -> Said:
    last = events[-1]
    said = Said(model=last["model"], finish=last.get("done_reason", "stop"))
    messages = [event["message"] for event in events]
    said.text = "".join(m.get("content") or "" for m in messages)
    thought = "".join(m.get("thinking") or "" for m in messages)
    said.reasoning = [thought] if thought else []
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    said.calls = [
        (c.get("id"), c["function"]["name"], c["function"]["arguments"]) for c in calls
    ]
    said.usage = _usage(last.get("prompt_eval_count", 0), last["eval_count"], 0, 0)
    return said


_READ = {
    "openai": _openai,
    "responses": _responses,
    "anthropic": _anthropic,
    "google": _google,
    "ollama": _ollama,
}


# --- The replay ----------------------------------------------------------------------


def asking(recording: Recording) -> dict[str, Any]:
    """What a call says so that the recorded answer fits it.

    The recorded function tools; a tool of OpenAI's own leads to its Responses endpoint.
    """
    body = recording.request["body"]
    found: list[dict[str, Any]] = []
    for tool in body.get("tools") or ():
        for one in tool.get("functionDeclarations") or [tool.get("function", tool)]:
            schema = one.get("parameters") or one.get("input_schema")
            if schema is not None and "name" in one:
                found.append(_function(one["name"], one.get("description", ""), schema))
    if recording.format == "responses":
        found.append({"type": "web_search"})
    return {"service": recording.provider, "tools": found}


def _function(name: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": dict(schema)}
    return {"type": "function", "function": function}


HELLO = [{"role": "user", "content": "Hello"}]


def check(result: ChatResult, said: Said, recording: Recording) -> None:
    """Compare what a caller got with what the bytes say."""
    got = {
        "text": result.text,
        "texts": result.texts,
        "reasoning": result.reasoning,
        "thinking": result.thinking_blocks,
        "calls": [(call.name, call.arguments) for call in result.tool_calls],
        "signatures": [call.thought_signature for call in result.tool_calls],
        "finish": result.finish_reason,
        "usage": result.token_usage and result.token_usage.model_dump(),
        "model": result.model,
        "urls": [
            page.url
            for output in result.tool_outputs or ()
            if isinstance(output.result, list)
            for page in output.result
            if isinstance(page, WebSearchResult)
        ],
        "refused": bool(result.refusal),
        "service": result.service,
    }
    assert got == {
        "text": said.text,
        "texts": said.texts,
        "reasoning": "\n\n".join(said.reasoning) or None,
        "thinking": said.thinking,
        "calls": [(name, arguments) for _, name, arguments in said.calls],
        "signatures": said.signatures or [None] * len(said.calls),
        "finish": said.finish,
        "usage": said.usage,
        "model": said.model,
        "urls": said.urls,
        "refused": bool(said.refusal) or said.finish == "content_filter",
        "service": recording.provider,
    }
    if said.refusal:
        assert result.refusal == said.refusal
    for call, (given, _, _) in zip(result.tool_calls, said.calls, strict=True):
        assert call.id == given if given else call.id


@each_engine
@pick(streamed=False)
async def test_a_recorded_answer(
    name: str,
    engine: str,
    server: ProviderServer,
    services: dict[str, LLMInfraService],
) -> None:
    """A whole answer means what its bytes say, whichever engine reads it."""
    recording = RECORDINGS[name]
    server.reply(recording.reply())

    result = await services[engine].complete(
        HELLO, recording.model, recording.provider, **asking(recording)
    )

    check(result, read(recording), recording)
    headers = recording.response["headers"]
    named = headers.get("x-request-id") or headers.get("request-id")
    assert named is None or result.request_id == named
    assert len(server.requests) == 1


@each_engine
@pick(streamed=True)
async def test_a_recorded_stream(
    name: str,
    engine: str,
    server: ProviderServer,
    services: dict[str, LLMInfraService],
) -> None:
    """A stream's chunks and its result mean what its bytes say."""
    recording = RECORDINGS[name]
    server.reply(recording.reply())

    async with services[engine].stream(
        HELLO, recording.model, recording.provider, **asking(recording)
    ) as stream:
        chunks = [chunk async for chunk in stream]
        result = await stream.result()

    said = read(recording)
    check(result, said, recording)
    assert "".join(chunk.text for chunk in chunks) == said.text
    assert "".join(chunk.reasoning for chunk in chunks) == "".join(said.reasoning)
    assert [(name, arguments) for _, name, arguments in joined(chunks)] == [
        (name, arguments) for _, name, arguments in said.calls
    ]
    assert len(server.requests) == 1


def joined(chunks: list[StreamChunk]) -> list[tuple[str | None, str, Any]]:
    """Put the pieces of streamed tool calls together, as a caller would."""
    calls: dict[int, list[Any]] = {}
    for delta in (chunk.tool_call for chunk in chunks):
        if delta is not None:
            kept = calls.setdefault(delta.index, [None, "", ""])
            kept[0] = delta.id or kept[0]
            kept[1] += delta.name or ""
            kept[2] += delta.arguments
    return [(i, name, _arguments(text)) for i, name, text in calls.values()]
