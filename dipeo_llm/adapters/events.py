"""Reads answers: what a provider's JSON, whole or in pieces, means in the domain's words.

Pure. Five formats: OpenAI's chat and Responses, Anthropic's messages, Google's
generateContent, Ollama's chat. A stream is put together into the JSON that the same
answer would have been if it had come whole, so both are read by the same code, and its
end mark is looked for, which LiteLLM does not do.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from dipeo_llm.adapters.failures import error_in, loads
from dipeo_llm.domain import (
    ImageGenerationResult,
    StreamChunk,
    ToolCall,
    ToolCallDelta,
    WebSearchResult,
)

_JSON = dict[str, Any]

# LiteLLM asks older Claude models for JSON through a tool of this name.
_JSON_TOOL = "json_tool_call"


@dataclass(slots=True)
class Reading:
    """An answer in the domain's words."""

    text: str = ""
    texts: list[str] = field(default_factory=list)
    """The texts of all choices, where more than one was asked for."""
    reasoning: str | None = None
    thinking_blocks: list[_JSON] = field(default_factory=list)
    """Anthropic's blocks of thought, which it wants back with a tool's result."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish: str | None = None
    refusal: str | None = None
    model: str | None = None
    id: str | None = None
    usage: Any = None
    searches: list[WebSearchResult] = field(default_factory=list)
    images: list[ImageGenerationResult] = field(default_factory=list)


def read(wire_format: str, body: Mapping[str, Any]) -> Reading:
    """Read a whole answer that `failures.answer_in` has nothing against.

    Args:
        wire_format: "openai", "responses", "anthropic", "google" or "ollama".
        body: The answer's JSON.
    """
    reading = _READERS[wire_format](body)
    if reading.tool_calls and reading.finish in {"stop", None}:
        reading.finish = "tool_calls"
    return reading


def _read_openai(body: Mapping[str, Any]) -> Reading:
    choices = body.get("choices") or []
    messages = [choice.get("message") or {} for choice in choices]
    first = messages[0] if messages else {}
    texts = [_openai_text(message.get("content")) for message in messages]
    finish = choices[0].get("finish_reason") if choices else None
    return Reading(
        text=texts[0] if texts else "",
        texts=texts if len(texts) > 1 else [],
        reasoning=first.get("reasoning_content") or first.get("reasoning") or None,
        tool_calls=[
            tool_call(
                call.get("id") or _made_id(body.get("id"), index, call),
                *_function(call),
            )
            for index, call in enumerate(first.get("tool_calls") or ())
        ],
        finish="tool_calls" if finish == "function_call" else finish,
        refusal=first.get("refusal") or None,
        model=body.get("model"),
        id=body.get("id"),
        usage=body.get("usage"),
        searches=_merge(
            WebSearchResult(url=c.get("url", ""), title=c.get("title") or "")
            for a in first.get("annotations") or ()
            if (c := a.get("url_citation"))
        ),
        images=[
            image
            for part in first.get("images") or ()
            if (image := _data_url_image(part.get("image_url", {}).get("url", "")))
        ],
    )


def _openai_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _function(call: Mapping[str, Any]) -> tuple[str | None, Any]:
    function = call.get("function") or {}
    return function.get("name"), function.get("arguments")


def _data_url_image(url: str) -> ImageGenerationResult | None:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/"):
        return None
    return ImageGenerationResult(
        image_data=data, format=head.removeprefix("data:image/").partition(";")[0]
    )


_RESPONSES_FINISH = {"max_output_tokens": "length", "content_filter": "content_filter"}


def _read_responses(body: Mapping[str, Any]) -> Reading:
    reading = Reading(
        model=body.get("model"), id=body.get("id"), usage=body.get("usage")
    )
    searches: list[WebSearchResult] = []
    thoughts: list[str] = []
    for item in body.get("output") or ():
        match item.get("type"):
            case "message":
                for part in item.get("content") or ():
                    reading.text += part.get("text") or ""
                    reading.refusal = part.get("refusal") or reading.refusal
                    searches += [
                        WebSearchResult(
                            url=a.get("url", ""), title=a.get("title") or ""
                        )
                        for a in part.get("annotations") or ()
                        if a.get("type") == "url_citation"
                    ]
            case "function_call":
                reading.tool_calls.append(
                    tool_call(
                        item.get("call_id"), item.get("name"), item.get("arguments")
                    )
                )
            case "image_generation_call" if item.get("result"):
                reading.images.append(
                    ImageGenerationResult(
                        image_data=item["result"],
                        format=item.get("output_format") or "png",
                    )
                )
            case "reasoning":
                thoughts += [s.get("text") or "" for s in item.get("summary") or ()]
    reading.searches = _merge(searches)
    reading.reasoning = "\n\n".join(filter(None, thoughts)) or None
    reason = (body.get("incomplete_details") or {}).get("reason")
    reading.finish = _RESPONSES_FINISH.get(reason, "stop") if reason else "stop"
    return reading


_ANTHROPIC_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def _read_anthropic(body: Mapping[str, Any]) -> Reading:
    reading = Reading(
        model=body.get("model"), id=body.get("id"), usage=body.get("usage")
    )
    stop = body.get("stop_reason")
    reading.finish = _ANTHROPIC_FINISH.get(stop, stop) if stop else None
    thoughts: list[str] = []
    searches: list[WebSearchResult] = []
    for block in body.get("content") or ():
        match block.get("type"):
            case "text":
                reading.text += block.get("text") or ""
                searches += [
                    WebSearchResult(
                        url=c["url"],
                        title=c.get("title") or "",
                        snippet=c.get("cited_text") or "",
                    )
                    for c in block.get("citations") or ()
                    if c.get("url")
                ]
            case "thinking":
                thoughts.append(block.get("thinking") or "")
                reading.thinking_blocks.append(dict(block))
            case "redacted_thinking":
                reading.thinking_blocks.append(dict(block))
            case "tool_use" if block.get("name") == _JSON_TOOL:
                reading.text += _json_text(block.get("input"))
                reading.finish = (
                    "stop" if reading.finish == "tool_calls" else reading.finish
                )
            case "tool_use":
                reading.tool_calls.append(
                    tool_call(block.get("id"), block.get("name"), block.get("input"))
                )
            case "web_search_tool_result":
                found = block.get("content")
                searches += [
                    WebSearchResult(url=r.get("url", ""), title=r.get("title") or "")
                    for r in (found if isinstance(found, list) else ())
                ]
    if stop == "refusal":
        reading.refusal = reading.text or "the model declined"
    reading.reasoning = "\n\n".join(filter(None, thoughts)) or None
    reading.searches = _merge(searches)
    return reading


def _json_text(value: Any) -> str:
    """Return JSON text; older Claude models may wrap the asked object in `values`."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and set(value) == {"values"}:
        value = value["values"]
    return json.dumps(value, ensure_ascii=False)


_GOOGLE_FINISH = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    # Google says STOP; aimock, which many test against, says this.
    "FUNCTION_CALL": "stop",
}
_GOOGLE_FILTER = frozenset(
    {
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT",
        "IMAGE_RECITATION",
        "MODEL_ARMOR",
    }
)


def _read_google(body: Mapping[str, Any]) -> Reading:
    candidates = body.get("candidates") or [{}]
    first = candidates[0]
    reason = first.get("finishReason")
    texts = [_google_text(candidate, thought=False) for candidate in candidates]
    reading = Reading(
        text=texts[0],
        texts=texts if len(texts) > 1 else [],
        reasoning=_google_text(first, thought=True) or None,
        finish=(
            "content_filter"
            if reason in _GOOGLE_FILTER
            # As it is: MALFORMED_FUNCTION_CALL and its like are no whole answer.
            else _GOOGLE_FINISH.get(reason, reason.lower())
            if reason
            else None
        ),
        model=body.get("modelVersion"),
        id=body.get("responseId"),
        usage=body.get("usageMetadata"),
    )
    if reason in _GOOGLE_FILTER:
        reading.refusal = first.get("finishMessage") or f"blocked: {reason}"
    for index, part in enumerate(_parts(first)):
        if call := part.get("functionCall"):
            made = tool_call(
                call.get("id") or _made_id(body.get("responseId"), index, call),
                call.get("name"),
                call.get("args"),
            )
            signature = part.get("thoughtSignature")
            made.thought_signature = signature if isinstance(signature, str) else None
            reading.tool_calls.append(made)
        elif (data := part.get("inlineData")) and data.get("mimeType", "").startswith(
            "image/"
        ):
            reading.images.append(
                ImageGenerationResult(
                    image_data=data.get("data", ""),
                    format=data["mimeType"].removeprefix("image/"),
                )
            )
    reading.searches = _grounding(first.get("groundingMetadata") or {})
    return reading


def _parts(candidate: Mapping[str, Any]) -> list[_JSON]:
    return (candidate.get("content") or {}).get("parts") or []


def _google_text(candidate: Mapping[str, Any], *, thought: bool) -> str:
    return "".join(
        part.get("text") or ""
        for part in _parts(candidate)
        if bool(part.get("thought")) is thought
    )


def _grounding(metadata: Mapping[str, Any]) -> list[WebSearchResult]:
    snippets: dict[int, str] = {}
    for support in metadata.get("groundingSupports") or ():
        for index in support.get("groundingChunkIndices") or ():
            snippets.setdefault(index, (support.get("segment") or {}).get("text") or "")
    return _merge(
        WebSearchResult(
            url=web.get("uri", ""),
            title=web.get("title") or "",
            snippet=snippets.get(index, ""),
        )
        for index, chunk in enumerate(metadata.get("groundingChunks") or ())
        if (web := chunk.get("web"))
    )


def _read_ollama(body: Mapping[str, Any]) -> Reading:
    message = body.get("message") or {}
    reason = body.get("done_reason")
    return Reading(
        text=message.get("content") or "",
        reasoning=message.get("thinking") or None,
        tool_calls=[
            tool_call(
                call.get("id") or _made_id(body.get("created_at"), index, call),
                *_function(call),
            )
            for index, call in enumerate(message.get("tool_calls") or ())
        ],
        finish="length" if reason == "length" else "stop" if body.get("done") else None,
        model=body.get("model"),
        usage=body if "eval_count" in body or "prompt_eval_count" in body else None,
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Reading]] = {
    "openai": _read_openai,
    "responses": _read_responses,
    "anthropic": _read_anthropic,
    "google": _read_google,
    "ollama": _read_ollama,
}


def tool_call(call_id: str | None, name: str | None, arguments: Any) -> ToolCall:
    """Make a tool call of arguments as JSON text or as an object.

    Text that is not a JSON object stays text: `arguments` is None then, never `{}`.
    """
    if arguments is not None and not isinstance(arguments, str):
        text, parsed = json.dumps(arguments, ensure_ascii=False), arguments
    else:
        text = arguments or ""
        try:
            parsed = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
    return ToolCall(
        id=call_id or "",
        name=name or "",
        arguments=parsed if isinstance(parsed, dict) else None,
        arguments_text=text,
    )


def _made_id(answer_id: str | None, index: int, call: Any) -> str:
    """Make an id for a call that came without, the same one when it is replayed."""
    seed = f"{answer_id}\0{index}\0{json.dumps(call, sort_keys=True, default=str)}"
    return "call_" + blake2b(seed.encode(), digest_size=12).hexdigest()


def _merge(results: Iterable[WebSearchResult]) -> list[WebSearchResult]:
    """Keep one result a page, in order, with the first title and snippet it has."""
    pages: dict[str, WebSearchResult] = {}
    for result in results:
        page = pages.setdefault(result.url, result)
        page.title = page.title or result.title
        page.snippet = page.snippet or result.snippet
    return list(pages.values())


# --- Streams -------------------------------------------------------------------------


class MalformedStreamError(ValueError):
    """What came is not an event of the format."""


def _malformed(data: bytes) -> MalformedStreamError:
    # More than is shown: who shows it takes the key out first, and then cuts.
    return MalformedStreamError(data[:9600].decode("utf-8", "replace"))


# A field that is not known is passed over, by the standard; a page of HTML has none.
_FIELD = re.compile(rb"\s*[\w-]*:")
# llama.cpp of before October 2025 sends its errors as a field of this name
# (github.com/ggml-org/llama.cpp/pull/16109, read 2026-11-25).
_ERROR_FIELD = re.compile(rb"error: ?(\{.*)")


class EventLines:
    """Cuts a stream of bytes into the payloads of its events.

    Args:
        sse: Server-sent events, whose payload follows "data:"; else each line is one.
    """

    __slots__ = ("_begun", "_data", "_rest", "_sse", "bare")

    def __init__(self, *, sse: bool) -> None:
        self._sse = sse
        self._begun = False
        self.bare = False
        """Whether JSON stands in place of events, compact or over several lines."""
        self._rest: list[bytes] = []
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Take bytes, cut anywhere, and return the payloads that they complete.

        Raises:
            MalformedStreamError: A line that no event has, such as an HTML page's.
        """
        if b"\n" not in piece:
            self._rest.append(piece)  # joined once: a line may come in a million pieces
            return []
        lines = b"".join([*self._rest, piece]).split(b"\n")
        self._rest = [last] if (last := lines.pop()) else []
        if not self._sse:
            return [line for line in lines if line.strip()]
        payloads: list[bytes] = []
        for line in lines:
            if self.bare or (line.startswith(b"{") and not self._begun):
                payloads += self._bare_line(line)
            elif line.startswith((b"data:", b"\xef\xbb\xbfdata:", b" data:")):
                # The standard knows no space in front; a server in use sends one.
                self._data.append(line.partition(b":")[2].strip())
                self._begun = True
            elif not line or line == b"\r":
                if self._data:
                    payloads.append(b"\n".join(self._data))
                    self._data = []
            elif found := _ERROR_FIELD.match(line):
                payloads.append(b'{"error": %b}' % found[1])
            elif not _FIELD.match(line.removeprefix(b"\xef\xbb\xbf")):
                raise _malformed(line)
        return payloads

    def _bare_line(self, line: bytes) -> list[bytes]:
        """Return JSON as soon as it is whole: at a brace that stands as far out."""
        self.bare = True
        self._data.append(line)
        if not (line.startswith((b"{", b"}")) and line.rstrip().endswith(b"}")):
            return []
        whole, self._data = b"\n".join(self._data), []
        return [whole]

    def close(self) -> list[bytes]:
        """Return the payload of an event that the end of the stream completes."""
        payloads = self.feed(b"\n\n") if self._rest or self._data else []
        if rest := b"\n".join(self._data).strip():  # JSON that was cut
            payloads.append(rest)
        return payloads


class StreamReader(ABC):
    """Reads the events of one stream.

    `feed` gives the chunks at once; `body` is what the whole answer would have been.
    """

    sse = True

    def __init__(self) -> None:
        self._lines = EventLines(sse=self.sse)
        self.events = 0
        self.error: bytes | None = None
        """The provider's own error: an event, or JSON in place of all events."""
        self._done = False

    def feed(self, piece: bytes) -> list[StreamChunk]:
        """Take bytes, cut anywhere, and return the chunks that they complete.

        Raises:
            MalformedStreamError: An event that cannot be parsed.
        """
        return self._take(self._lines.feed(piece))

    def close(self) -> list[StreamChunk]:
        """Say that no more bytes come; return the last chunks.

        Raises:
            MalformedStreamError: As `feed`.
        """
        return self._take(self._lines.close())

    def take(self, event: Any) -> list[StreamChunk]:
        """Take one event as parsed JSON and return its chunks.

        Raises:
            MalformedStreamError: It is not an event of the format.
        """
        if not isinstance(event, dict):
            raise MalformedStreamError("an event that is not an object")
        self.events += 1
        chunks: list[StreamChunk] = []
        if error_in(event):
            self.error = json.dumps(event).encode()
            return chunks
        try:
            self._event(event, chunks)
        except (TypeError, AttributeError, LookupError, RecursionError) as exc:
            raise MalformedStreamError(f"an event of another shape: {exc!r}") from exc
        for chunk in chunks:
            said: tuple[Any, Any] = (chunk.text, chunk.reasoning)
            if not all(isinstance(text, str) for text in said):
                raise MalformedStreamError("an event whose text is no text")
        return chunks

    def take_end(self) -> None:
        """Take OpenAI's [DONE], which is not JSON."""
        self._done = True

    def _take(self, payloads: list[bytes]) -> list[StreamChunk]:
        chunks: list[StreamChunk] = []
        for payload in payloads:
            if self._lines.bare and self.error is not None:
                break  # it has told all; what follows is no event either
            if payload == b"[DONE]":
                self.take_end()
                continue
            try:
                event = loads(payload)
            except (ValueError, RecursionError):
                raise _malformed(payload) from None
            chunks += self.take(event)
            if self._lines.bare and self.error is None:  # only errors come so
                raise _malformed(payload)
        return chunks

    @abstractmethod
    def _event(self, event: _JSON, chunks: list[StreamChunk]) -> None:
        """Add an event to the answer, and its chunks to *chunks*."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether the provider's end mark has come."""

    @abstractmethod
    def body(self) -> _JSON:
        """Return the answer put together so far, in the form of a whole one."""


_OPENAI_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")


class OpenAIStream(StreamReader):
    """Chat completion chunks, ended by a finish reason for each choice and [DONE]."""

    def __init__(self) -> None:
        super().__init__()
        self._head: _JSON = {}
        self._choices: dict[int, _JSON] = {}
        self._text: dict[tuple[int, str], list[str]] = {}
        self._calls: dict[int, list[_JSON]] = {}
        self._last: dict[tuple[int, int | None], _JSON] = {}
        """The call that a fragment with this index goes to, by choice and index."""

    def _event(self, event: _JSON, chunks: list[StreamChunk]) -> None:
        for name in ("id", "model", "usage"):
            if event.get(name) is not None:
                self._head[name] = event[name]
        for choice in event.get("choices") or ():
            index = choice.get("index") or 0
            kept = self._choices.setdefault(
                index, {"index": index, "finish_reason": None}
            )
            if choice.get("finish_reason"):
                kept["finish_reason"] = choice["finish_reason"]
            delta = choice.get("delta")
            if delta is None:  # some compatible servers send whole messages
                delta = choice.get("message")
            if delta:
                self._delta(index, kept, delta, chunks)

    def _delta(
        self, index: int, kept: _JSON, delta: _JSON, chunks: list[StreamChunk]
    ) -> None:
        for name in _OPENAI_TEXTS:
            if name == "reasoning" and delta.get("reasoning_content"):
                continue  # the same again, under both of its names
            if piece := _openai_text(delta.get(name)):
                self._text.setdefault((index, name), []).append(piece)
                if index == 0 and name == "content":
                    chunks.append(StreamChunk(piece))
                elif index == 0 and name != "refusal":
                    chunks.append(StreamChunk(reasoning=piece))
        if delta.get("annotations"):
            kept.setdefault("annotations", []).extend(delta["annotations"])
        for call in delta.get("tool_calls") or ():
            self._call(index, call, chunks)

    def _call(self, choice: int, call: _JSON, chunks: list[StreamChunk]) -> None:
        name, arguments = _function(call)
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments)
        place = (choice, call.get("index"))
        kept = self._last.get(place)
        if kept is None or _begins_a_call(kept, call, name):
            calls = self._calls.setdefault(choice, [])
            kept = {"at": len(calls), "id": None, "name": None, "text": []}
            self._last[place] = kept
            calls.append(kept)
        kept["id"] = kept["id"] or call.get("id")
        kept["name"] = name or kept["name"]
        if arguments:
            kept["text"].append(arguments)
        if choice == 0:
            told = kept["id"] if call.get("id") else None
            chunks.append(
                StreamChunk(
                    tool_call=ToolCallDelta(
                        kept["at"], told, name or None, arguments or ""
                    )
                )
            )

    @property
    def ended(self) -> bool:
        return (
            self._done
            and bool(self._choices)
            and all(c["finish_reason"] for c in self._choices.values())
        )

    def body(self) -> _JSON:
        texts: dict[int, _JSON] = {}
        for (choice, name), pieces in self._text.items():
            texts.setdefault(choice, {})[name] = "".join(pieces)
        calls = {index: list(map(_whole_call, c)) for index, c in self._calls.items()}
        choices = []
        for index, kept in sorted(self._choices.items()):
            message: _JSON = {"role": "assistant", "content": None}
            message.update(texts.get(index, {}))
            if index in calls:
                message["tool_calls"] = calls[index]
            if "annotations" in kept:
                message["annotations"] = kept["annotations"]
            finish = kept["finish_reason"]
            choices.append(
                {"index": index, "message": message, "finish_reason": finish}
            )
        return {**self._head, "object": "chat.completion", "choices": choices}


def _begins_a_call(kept: _JSON, call: _JSON, name: str | None) -> bool:
    """Say whether a fragment begins another call than the one that has its index.

    Ollama gives each call the index 0 (github.com/ollama/ollama/issues/15457), others
    give none. Poolside changes the id after the first fragment of a call, where alone
    the name is (github.com/poolsideai/pool/issues/9). Both read 2026-11-25.
    """
    given = call.get("id")
    other = bool(given and kept["id"] and given != kept["id"])
    if call.get("index") is not None:
        return other and bool(name)
    return other or (bool(name) and not (given and kept["id"]))


def _whole_call(call: _JSON) -> _JSON:
    function = {"name": call["name"], "arguments": "".join(call["text"])}
    return {"id": call["id"], "type": "function", "function": function}


class ResponsesStream(StreamReader):
    """OpenAI's Responses events, ended by one that carries the whole response."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: _JSON | None = None
        self._items: dict[int, _JSON] = {}
        self._calls: dict[int, int] = {}

    def _event(self, event: _JSON, chunks: list[StreamChunk]) -> None:
        match event.get("type"):
            case "response.output_text.delta":
                chunks.append(StreamChunk(text=event["delta"]))
            case "response.reasoning_summary_text.delta":
                chunks.append(StreamChunk(reasoning=event["delta"]))
            case "response.output_item.added":
                item = event["item"]
                if item.get("type") == "function_call":
                    index = self._calls[event["output_index"]] = len(self._calls)
                    chunks.append(
                        StreamChunk(
                            tool_call=ToolCallDelta(
                                index, item["call_id"], item["name"]
                            )
                        )
                    )
            case "response.function_call_arguments.delta":
                index = self._calls[event["output_index"]]
                chunks.append(
                    StreamChunk(
                        tool_call=ToolCallDelta(index, arguments=event["delta"])
                    )
                )
            case "response.output_item.done":
                self._items[event["output_index"]] = event["item"]
            case "response.completed" | "response.incomplete" if not error_in(
                event["response"]
            ):
                self._whole = event["response"]
            case "response.completed" | "response.incomplete" | "response.failed":
                self.error = json.dumps(event["response"]).encode()
            case "error":
                self.error = json.dumps({"error": event}).encode()

    @property
    def ended(self) -> bool:
        return self._whole is not None

    def body(self) -> _JSON:
        items = [item for _, item in sorted(self._items.items())]
        if self._whole is None:
            return {"output": items}
        # Some servers leave the output out of the last event.
        return {**self._whole, "output": self._whole.get("output") or items}


class AnthropicStream(StreamReader):
    """Anthropic's events, ended by message_stop."""

    def __init__(self) -> None:
        super().__init__()
        self._message: _JSON = {}
        self._blocks: dict[int, _JSON] = {}
        self._pieces: dict[int, list[str]] = {}
        self._calls: dict[int, int] = {}
        self._stopped = False

    def _event(self, event: _JSON, chunks: list[StreamChunk]) -> None:
        match event.get("type"):
            case "content_block_delta":
                self._delta(event["index"], event["delta"], chunks)
            case "content_block_start":
                self._start(event["index"], dict(event["content_block"]), chunks)
            case "content_block_stop":
                self._finish(event["index"])
            case "message_start":
                self._message = dict(event["message"])
            case "message_delta":
                self._message.update(event.get("delta") or {})
                usage = self._message.setdefault("usage", {})
                usage.update(
                    {
                        k: v
                        for k, v in (event.get("usage") or {}).items()
                        if v is not None
                    }
                )
            case "message_stop":
                self._stopped = True

    def _start(self, index: int, block: _JSON, chunks: list[StreamChunk]) -> None:
        self._blocks[index] = block
        self._pieces[index] = []
        if block["type"] == "tool_use":
            self._calls[index] = len(self._calls)
            if block["name"] != _JSON_TOOL:
                chunks.append(
                    StreamChunk(
                        tool_call=ToolCallDelta(
                            self._calls[index], block["id"], block["name"]
                        )
                    )
                )
        elif block["type"] == "text" and block.get("text"):
            self._pieces[index].append(block["text"])
            chunks.append(StreamChunk(text=block["text"]))

    def _delta(self, index: int, delta: _JSON, chunks: list[StreamChunk]) -> None:
        block = self._blocks[index]
        match delta.get("type"):
            case "text_delta":
                self._pieces[index].append(delta["text"])
                chunks.append(StreamChunk(text=delta["text"]))
            case "input_json_delta":
                piece = delta["partial_json"]
                self._pieces[index].append(piece)
                if block["type"] != "tool_use" or not piece:
                    return
                if block["name"] == _JSON_TOOL:
                    chunks.append(StreamChunk(text=piece))
                else:
                    chunks.append(
                        StreamChunk(
                            tool_call=ToolCallDelta(self._calls[index], arguments=piece)
                        )
                    )
            case "thinking_delta":
                self._pieces[index].append(delta["thinking"])
                chunks.append(StreamChunk(reasoning=delta["thinking"]))
            case "signature_delta":
                block["signature"] = block.get("signature", "") + delta["signature"]
            case "citations_delta":
                if not block.get("citations"):
                    block["citations"] = []
                block["citations"].append(delta["citation"])

    def _finish(self, index: int) -> None:
        block = self._blocks[index]
        text = "".join(self._pieces.pop(index, ()))
        match block["type"]:
            case "text":
                block["text"] = text
            case "thinking":
                block["thinking"] = (block.get("thinking") or "") + text
            case "tool_use" | "server_tool_use" if text:
                try:
                    block["input"] = json.loads(text)
                except ValueError:
                    block["input"] = text  # cut or broken: kept as it came

    @property
    def ended(self) -> bool:
        return self._stopped and bool(self._message.get("stop_reason"))

    def body(self) -> _JSON:
        for index in list(self._pieces):
            self._finish(index)
        blocks = [block for _, block in sorted(self._blocks.items())]
        return {**self._message, "content": blocks}


class GoogleStream(StreamReader):
    """Google's responses, ended by one with a finish reason or a blocked prompt."""

    def __init__(self) -> None:
        super().__init__()
        self._head: _JSON = {}
        self._candidates: dict[int, _JSON] = {}
        self._pieces: dict[int, list[str]] = {}
        self._calls = 0

    def _event(self, event: _JSON, chunks: list[StreamChunk]) -> None:
        for name, value in event.items():
            if name != "candidates":
                self._head[name] = value
        for candidate in event.get("candidates") or ():
            index = candidate.get("index") or 0
            kept = self._candidates.setdefault(
                index, {"index": index, "content": {"role": "model", "parts": []}}
            )
            for name, value in candidate.items():
                if name not in {"content", "index"}:
                    kept[name] = value
            for part in _parts(candidate):
                self._part(kept["content"]["parts"], part, chunks if index == 0 else [])

    def _part(self, parts: list[_JSON], part: _JSON, chunks: list[StreamChunk]) -> None:
        if call := part.get("functionCall"):
            arguments = json.dumps(call.get("args") or {}, ensure_ascii=False)
            delta = ToolCallDelta(
                self._calls, call.get("id"), call.get("name"), arguments
            )
            chunks.append(StreamChunk(tool_call=delta))
            self._calls += 1
        elif text := part.get("text"):
            chunks.append(
                StreamChunk(reasoning=text)
                if part.get("thought")
                else StreamChunk(text)
            )
        self._keep(parts, part)

    def _keep(self, parts: list[_JSON], part: _JSON) -> None:
        """Add a part; plain text is joined to plain text, or a long answer is costly."""
        plain = part.keys() <= {"text", "thought"}
        last = parts[-1] if parts else {}
        pieces = self._pieces.get(id(last))
        if plain and pieces is not None and part.get("thought") == last.get("thought"):
            pieces.append(part.get("text") or "")
            return
        parts.append(part)
        if plain:
            self._pieces[id(part)] = [part.get("text") or ""]

    @property
    def ended(self) -> bool:
        feedback = self._head.get("promptFeedback") or {}
        return bool(feedback.get("blockReason")) or (
            bool(self._candidates)
            and all(c.get("finishReason") for c in self._candidates.values())
        )

    def body(self) -> _JSON:
        candidates = [c for _, c in sorted(self._candidates.items())]
        for candidate in candidates:
            for part in _parts(candidate):
                if id(part) in self._pieces:
                    part["text"] = "".join(self._pieces[id(part)])
        return {**self._head, **({"candidates": candidates} if candidates else {})}


class OllamaStream(StreamReader):
    """Ollama's lines, ended by one that is done."""

    sse = False

    def __init__(self) -> None:
        super().__init__()
        self._last: _JSON = {}
        self._first_created: str | None = None
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[_JSON] = []
        self._spoke = False

    def _event(self, event: _JSON, chunks: list[StreamChunk]) -> None:
        self._last = event
        self._first_created = self._first_created or event.get("created_at")
        message = event.get("message") or {}
        self._spoke = self._spoke or "message" in event
        if piece := message.get("thinking"):
            self._thinking.append(piece)
            chunks.append(StreamChunk(reasoning=piece))
        if piece := message.get("content"):
            self._text.append(piece)
            chunks.append(StreamChunk(text=piece))
        for call in message.get("tool_calls") or ():
            made = tool_call(call.get("id"), *_function(call))
            chunks.append(
                StreamChunk(
                    tool_call=ToolCallDelta(
                        len(self._calls),
                        made.id or None,
                        made.name,
                        made.arguments_text,
                    )
                )
            )
            self._calls.append(call)

    @property
    def ended(self) -> bool:
        return self._spoke and self._last.get("done") is True

    def body(self) -> _JSON:
        message: _JSON = {"role": "assistant", "content": "".join(self._text)}
        if self._thinking:
            message["thinking"] = "".join(self._thinking)
        if self._calls:
            message["tool_calls"] = self._calls
        return {**self._last, "created_at": self._first_created, "message": message}


STREAMS: dict[str, type[StreamReader]] = {
    "openai": OpenAIStream,
    "responses": ResponsesStream,
    "anthropic": AnthropicStream,
    "google": GoogleStream,
    "ollama": OllamaStream,
}
