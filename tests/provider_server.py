"""A loopback HTTP/1.1 server that speaks four providers' wire formats byte by byte.

A test says what the model answers (`Answer`), what is on the wire (`Raw`) or what
breaks (`Fault`); the server renders it for the API that was asked, whole or as a
stream, and refuses what the provider would refuse. It is built on streams alone, so
that every cut, reset and TCP write is the test's to choose.

`python -m tests.provider_server --port 0` serves until stdin closes or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import email.utils
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import urllib.parse
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from tests.provider_rules import losses_of, violations_of

Json: TypeAlias = dict[str, Any]

DEFAULT_TEXT = "Hello from the loopback."
MISSING_MODEL = "no-such-model"
CHECK_RULES = os.environ.get("CHECK_PROVIDER_RULES", "1") == "1"
"""Whether every server checks every request against `tests.provider_rules`."""
_HUGE = 64 * 1024 * 1024
_serial = itertools.count(1)


@dataclass(slots=True)
class Received:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    json: Any
    provider: str
    connection: int
    stream: bool


@dataclass(slots=True)
class Answer:
    """What the model says; rendered in the format of the API that was asked.

    The default text is left out beside tool calls, images or a refusal, as real
    models do. `output_tokens` counts the reasoning in, for every provider. A string
    for a tool's arguments goes out as it is where the wire has a string (OpenAI, an
    Anthropic stream); where it has an object, broken JSON becomes `{}`, which is what
    Anthropic sends for arguments that were cut. Stream faults touch streams only.
    """

    text: str = DEFAULT_TEXT
    reasoning: str | None = None
    tool_calls: Sequence[tuple[str, Json | str]] = ()
    finish: str = "stop"
    input_tokens: int = 12
    output_tokens: int = 5
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    refusal: str | None = None
    citations: Sequence[tuple[str, str]] = ()
    images: Sequence[bytes] = ()
    n_texts: Sequence[str] = ()
    model: str | None = None
    pieces: int = 4
    id: str | None = None
    delay: float = 0.0
    chunk_delay: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    drop_end: bool = False
    cut_after: int | None = None
    error_after: int | None = None
    garbage_after: int | None = None
    stall_after: int | None = None
    split: Callable[[bytes], Iterable[bytes]] | None = None

    @property
    def said(self) -> str:
        """The text that really goes out."""
        other = self.tool_calls or self.images or self.refusal is not None
        return "" if other and self.text == DEFAULT_TEXT else self.text

    @property
    def ending(self) -> str:
        """The finish reason, tool calls implied."""
        return (
            "tool_calls" if self.tool_calls and self.finish == "stop" else self.finish
        )


@dataclass(slots=True)
class Raw:
    """Exact bytes; `framing` is length, chunked, close or short (a lying length)."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Sequence[bytes] = b""
    delay: float = 0.0
    piece_delay: float = 0.0
    framing: str = "length"


@dataclass(slots=True)
class Fault:
    """What goes wrong below HTTP: reset, close, stall, reset_mid_body or drip."""

    kind: str
    delay: float = 0.0


Reply: TypeAlias = "Answer | Raw | Fault | Callable[[Received], Answer | Raw | Fault]"


class _RefusalError(Exception):
    """A request that the provider would refuse, with its refusal."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw.status)
        self.raw = raw


@dataclass(slots=True)
class _Ask:
    """What a generation request asked for."""

    api: str  # openai | responses | anthropic | google | ollama
    model: str
    stream: bool = False
    n: int = 1
    usage: bool = False


@dataclass(slots=True, eq=False)
class _Connection:
    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


# --- small parts -------------------------------------------------------------------


def _id(prefix: str, length: int = 24) -> str:
    """A provider-like id: opaque, of the provider's length, distinct per call."""
    digest = hashlib.sha256(str(next(_serial)).encode()).digest() * 2
    text = base64.b64encode(digest).decode()
    return prefix + re.sub("[^A-Za-z0-9]", "x", text)[:length]


def _dump(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _compact(value: Any) -> str:
    return _dump(value, separators=(",", ":"))


def _cut(text: str, pieces: int) -> list[str]:
    """Cut a text into at most that many parts of about the same length."""
    size = max(1, -(-len(text) // max(1, pieces)))
    return [text[i : i + size] for i in range(0, len(text), size)]


def _arguments(arguments: Json | str) -> str:
    return arguments if isinstance(arguments, str) else _compact(arguments)


def _argument_object(arguments: Json | str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _texts(answer: Answer, n: int) -> list[str]:
    """The texts of the further choices: as many as were asked, the last repeated."""
    further = list(answer.n_texts) or [answer.said]
    return (further + further[-1:] * n)[: n - 1]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime()) + "391699Z"


def _request_id(provider: str) -> dict[str, str]:
    if provider == "openai":
        return {"x-request-id": _id("req_", 32), "openai-processing-ms": "19"}
    return {"request-id": _id("req_011C", 20)} if provider == "anthropic" else {}


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


# --- errors ------------------------------------------------------------------------

_ANTHROPIC_ERRORS = {
    401: ("authentication_error", "invalid x-api-key"),
    402: ("billing_error", "Your credit balance is too low."),
    403: ("permission_error", "Your API key does not have permission."),
    404: ("not_found_error", "Not found"),
    413: ("request_too_large", "Request exceeds the maximum size"),
    429: ("rate_limit_error", "This request would exceed your account's rate limit."),
    500: ("api_error", "Internal server error"),
    504: ("timeout_error", "The request timed out."),
    529: ("overloaded_error", "Overloaded"),
}
_GOOGLE_ERRORS = {
    401: ("UNAUTHENTICATED", "Request had invalid authentication credentials."),
    403: ("PERMISSION_DENIED", "The caller does not have permission."),
    404: ("NOT_FOUND", "Requested entity was not found."),
    429: ("RESOURCE_EXHAUSTED", "You exceeded your current quota."),
    500: ("INTERNAL", "An internal error has occurred."),
    503: ("UNAVAILABLE", "The model is overloaded. Please try again later."),
    504: ("DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
}
_OPENAI_ERRORS = {
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    404: ("invalid_request_error", None, "Not found."),
    429: ("tokens", "rate_limit_exceeded", "Rate limit reached."),
    500: ("server_error", None, "The server had an error. Sorry about that!"),
    503: ("server_error", None, "The engine is currently overloaded."),
}


def _openai_body(
    status: int, message: str, code: str | None, param: str | None
) -> Json:
    known = _OPENAI_ERRORS.get(min(status, 500) if status != 503 else 503)
    kind, usual_code, usual = known or ("invalid_request_error", None, "Bad request.")
    if code == "insufficient_quota":
        kind, usual = code, "You exceeded your current quota."
    return {
        "error": {
            "message": message or usual,
            "type": kind,
            "param": param,
            "code": code or usual_code,
        }
    }


def _google_body(
    status: int, message: str, code: str | None, retry_delay: float | None
) -> Json:
    name, usual = _GOOGLE_ERRORS.get(status, ("INVALID_ARGUMENT", "Bad request."))
    details: list[Json] = []
    kind = "type.googleapis.com/google.rpc."
    if code:
        service = {"service": "generativelanguage.googleapis.com"}
        info = {"@type": kind + "ErrorInfo", "reason": code, "domain": "googleapis.com"}
        details.append({**info, "metadata": service})
        said = {"locale": "en-US", "message": message or usual}
        details.append({"@type": kind + "LocalizedMessage", **said})
    if retry_delay is not None:
        delay = f"{retry_delay:g}s"
        details.append({"@type": kind + "RetryInfo", "retryDelay": delay})
    body: Json = {"code": status, "message": message or usual, "status": name}
    return {"error": {**body, "details": details} if details else body}


def _error_body(
    provider: str,
    status: int,
    message: str,
    code: str | None,
    *,
    retry_delay: float | None,
    param: str | None,
) -> str:
    if provider == "google":
        return _dump(_google_body(status, message, code, retry_delay), indent=2) + "\n"
    if provider == "anthropic":
        by_class = "api_error" if status >= 500 else "invalid_request_error"
        kind, usual = _ANTHROPIC_ERRORS.get(status, (by_class, "Bad request."))
        detail = {"type": code or kind, "message": message or usual}
        ref = _id("req_011C", 20)
        return _compact({"type": "error", "error": detail, "request_id": ref})
    if provider == "ollama":
        return _compact({"error": message or "something went wrong"})
    return _dump(_openai_body(status, message, code, param), indent=2)


def error(
    provider: str,
    status: int,
    message: str = "",
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
    retry_delay: float | None = None,
    param: str | None = None,
) -> Raw:
    """The provider's own error for a status.

    Args:
        provider: Whose shape.
        status: HTTP status.
        message: The words; the provider's usual ones when empty.
        code: OpenAI's `code`, Anthropic's error type, Google's `reason`.
        headers: Further response headers; they win over the usual ones.
        retry_delay: Seconds: Google's `RetryInfo`, a `retry-after` header elsewhere.
        param: OpenAI's `param`.
    """
    usual = {"content-type": "application/json", **_request_id(provider)}
    if provider in ("google", "ollama"):
        usual["content-type"] += "; charset=utf-8"
    if provider == "anthropic":
        usual["x-should-retry"] = "true" if status in (408, 409, 429) else "false"
        if status >= 500:
            usual["x-should-retry"] = "true"
    if retry_delay is not None and provider != "google":
        usual["retry-after"] = f"{retry_delay:g}"
    body = _error_body(
        provider, status, message, code, retry_delay=retry_delay, param=param
    )
    return Raw(status, {**usual, **_lower(headers or {})}, body.encode())


# --- OpenAI chat completions -------------------------------------------------------


def _openai_usage(answer: Answer) -> Json:
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.input_tokens + answer.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": answer.cached_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": answer.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _url_citations(answer: Answer) -> list[Json]:
    end = len(answer.said)
    return [
        {"start_index": 0, "end_index": end, "title": title, "url": url}
        for url, title in answer.citations
    ]


def _openai_message(answer: Answer) -> Json:
    notes = [
        {"type": "url_citation", "url_citation": c} for c in _url_citations(answer)
    ]
    bare = answer.refusal is not None or (answer.tool_calls and not answer.said)
    message: Json = {"role": "assistant", "content": None if bare else answer.said}
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": _id("call_"),
                "type": "function",
                "function": {"name": name, "arguments": _arguments(arguments)},
            }
            for name, arguments in answer.tool_calls
        ]
    return {**message, "refusal": answer.refusal, "annotations": notes}


def _openai_whole(answer: Answer, ask: _Ask) -> Json:
    plain: Json = {"role": "assistant", "refusal": None, "annotations": []}
    messages = [_openai_message(answer)]
    messages += [{**plain, "content": text} for text in _texts(answer, ask.n)]
    ends = [answer.ending] + ["stop"] * (len(messages) - 1)
    choices = [
        {"index": i, "message": message, "logprobs": None, "finish_reason": end}
        for i, (message, end) in enumerate(zip(messages, ends, strict=True))
    ]
    return {
        "id": answer.id or _id("chatcmpl-", 29),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answer.model or ask.model,
        "choices": choices,
        "usage": _openai_usage(answer),
        "service_tier": "default",
        "system_fingerprint": "fp_eb3c3cb84d",
    }


def _openai_deltas(message: Json, pieces: int) -> Iterator[Json]:
    content = message["content"]
    first = "" if content is not None else None
    if message["refusal"] is not None:
        yield {"role": "assistant", "content": None, "refusal": ""}
        yield from ({"refusal": p} for p in _cut(message["refusal"], pieces))
    else:
        yield {"role": "assistant", "content": first, "refusal": None}
    yield from ({"content": p} for p in _cut(content or "", pieces))
    for i, call in enumerate(message.get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        function = {**call["function"], "arguments": ""}
        yield {"tool_calls": [{"index": i, **call, "function": function}]}
        for piece in _cut(arguments, max(2, pieces)):
            yield {"tool_calls": [{"index": i, "function": {"arguments": piece}}]}
    if message["annotations"]:
        yield {"annotations": message["annotations"]}


def _openai_events(answer: Answer, ask: _Ask) -> tuple[list[bytes], int]:
    whole = _openai_whole(answer, ask)
    usage = whole.pop("usage")
    choices = whole.pop("choices")
    base = {**whole, "object": "chat.completion.chunk"}
    late = {"usage": None} if ask.usage else {}

    def event(picked: list[Json], **more: Any) -> bytes:
        return f"data: {_compact({**base, 'choices': picked, **late, **more})}\n\n".encode()

    def choice(index: int, delta: Json, end: str | None) -> list[Json]:
        shared = {"logprobs": None, "finish_reason": end}
        return [{"index": index, "delta": delta, **shared}]

    events = [
        event(choice(c["index"], delta, None))
        for c in choices
        for delta in _openai_deltas(c["message"], answer.pieces)
    ]
    last = len(events)
    events += [event(choice(c["index"], {}, c["finish_reason"])) for c in choices]
    if ask.usage:
        events.append(event([], usage=usage))
    return [*events, b"data: [DONE]\n\n"], last


# --- OpenAI responses --------------------------------------------------------------


def _response_items(answer: Answer) -> Iterator[Json]:
    done = {"status": "completed"}
    if answer.reasoning is not None:
        summary = [{"type": "summary_text", "text": answer.reasoning}]
        yield {"id": _id("rs_", 48), "type": "reasoning", "summary": summary}
    if answer.citations:
        search = {"type": "search", "query": "loopback", "queries": ["loopback"]}
        yield {"id": _id("ws_", 48), "type": "web_search_call", **done} | {
            "action": search
        }
    for image in answer.images:
        item = {"id": _id("ig_", 48), "type": "image_generation_call", **done}
        shape = {"output_format": "png", "revised_prompt": "a loopback"}
        yield {**item, **shape, "result": base64.b64encode(image).decode()}
    part: Json | None = None
    if answer.refusal is not None:
        part = {"type": "refusal", "refusal": answer.refusal}
    elif answer.said or not (answer.tool_calls or answer.images):
        notes = [{"type": "url_citation", **c} for c in _url_citations(answer)]
        part = {"type": "output_text", "annotations": notes, "logprobs": []}
        part["text"] = answer.said
    if part:
        item = {"id": _id("msg_", 48), "type": "message", **done}
        yield {**item, "content": [part], "role": "assistant"}
    for name, arguments in answer.tool_calls:
        item = {"id": _id("fc_", 48), "type": "function_call", **done}
        call = {"call_id": _id("call_"), "name": name}
        yield {**item, "arguments": _arguments(arguments), **call}


def _responses_whole(answer: Answer, ask: _Ask) -> Json:
    reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
    reason = reasons.get(answer.ending)
    return {
        "id": answer.id or _id("resp_", 48),
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if reason else "completed",
        "background": False,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": None,
        "max_output_tokens": None,
        "model": answer.model or ask.model,
        "output": list(_response_items(answer)),
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": answer.input_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens},
            "output_tokens": answer.output_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": answer.input_tokens + answer.output_tokens,
        },
        "user": None,
        "metadata": {},
    }


def _text_steps(item: Json, pieces: int) -> Iterator[tuple[str, Json]]:
    part = item["content"][0]
    slot = "refusal" if part["type"] == "refusal" else "text"
    name = "refusal" if slot == "refusal" else "output_text"
    at = {"content_index": 0}
    empty = {**part, slot: ""} | ({"annotations": []} if slot == "text" else {})
    yield "content_part.added", {**at, "part": empty}
    for piece in _cut(part[slot], pieces):
        yield f"{name}.delta", {**at, "delta": piece}
    for i, note in enumerate(part.get("annotations", ())):
        body = {**at, "annotation_index": i, "annotation": note}
        yield "output_text.annotation.added", body
    yield f"{name}.done", {**at, slot: part[slot]}
    yield "content_part.done", {**at, "part": part}


def _item_steps(item: Json, pieces: int) -> Iterator[tuple[str, Json]]:
    """The events between an item's `added` and its `done`."""
    kind = item["type"]
    if kind == "message":
        yield from _text_steps(item, pieces)
    elif kind == "function_call":
        for piece in _cut(item["arguments"], max(2, pieces)):
            yield "function_call_arguments.delta", {"delta": piece}
        yield "function_call_arguments.done", {"arguments": item["arguments"]}
    elif kind == "reasoning":
        at, text = {"summary_index": 0}, item["summary"][0]["text"]
        part = {"type": "summary_text", "text": ""}
        yield "reasoning_summary_part.added", {**at, "part": part}
        for piece in _cut(text, pieces):
            yield "reasoning_summary_text.delta", {**at, "delta": piece}
        yield "reasoning_summary_text.done", {**at, "text": text}
        part = {"type": "summary_text", "text": text}
        yield "reasoning_summary_part.done", {**at, "part": part}
    else:
        middle = "searching" if kind == "web_search_call" else "generating"
        for state in ("in_progress", middle, "completed"):
            yield f"{kind}.{state}", {}


def _responses_steps(whole: Json, pieces: int) -> Iterator[tuple[str, Json]]:
    started = {**whole, "status": "in_progress", "output": [], "usage": None}
    started["incomplete_details"] = None
    yield "created", {"response": started}
    yield "in_progress", {"response": started}
    blank: Json = {"content": [], "arguments": "", "summary": [], "result": None}
    for i, item in enumerate(whole["output"]):
        at = {"output_index": i}
        fresh = {**item, **{k: v for k, v in blank.items() if k in item}}
        fresh |= {"status": "in_progress"} if "status" in item else {}
        fresh.pop("action", None)
        yield "output_item.added", {**at, "item": fresh}
        for name, body in _item_steps(item, pieces):
            yield name, {"item_id": item["id"], **at, **body}
        yield "output_item.done", {**at, "item": item}
    yield whole["status"], {"response": whole}


def _responses_events(answer: Answer, ask: _Ask) -> tuple[list[bytes], int]:
    steps = _responses_steps(_responses_whole(answer, ask), answer.pieces)
    events = []
    for i, (name, body) in enumerate(steps):
        data = {"type": f"response.{name}", "sequence_number": i, **body}
        events.append(_named(f"response.{name}", _compact(data)))
    return events, len(events) - 1


def _named(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


# --- Anthropic ---------------------------------------------------------------------

_ANTHROPIC_ENDS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def _anthropic_blocks(answer: Answer) -> Iterator[Json]:
    if answer.reasoning is not None:
        signature = _id("EsgC", 60)
        yield {
            "type": "thinking",
            "thinking": answer.reasoning,
            "signature": signature,
        }
    if answer.citations:
        call = {"id": _id("srvtoolu_01", 22), "name": "web_search"}
        yield {"type": "server_tool_use", **call, "input": {"query": "loopback"}}
        found = [
            {
                "type": "web_search_result",
                "title": title,
                "url": url,
                "encrypted_content": _id("EuAQ", 60),
                "page_age": None,
            }
            for url, title in answer.citations
        ]
        result = {"tool_use_id": call["id"], "content": found}
        yield {"type": "web_search_tool_result", **result}
    text = answer.said if answer.refusal is None else answer.refusal
    if text:
        yield {"type": "text", "text": text} | _anthropic_citations(answer, text)
    for name, arguments in answer.tool_calls:
        call = {"id": _id("toolu_01", 22), "name": name}
        yield {"type": "tool_use", **call, "input": arguments}


def _anthropic_citations(answer: Answer, text: str) -> Json:
    cited = [
        {
            "type": "web_search_result_location",
            "cited_text": text[:150],
            "url": url,
            "title": title,
            "encrypted_index": _id("Eo8B", 60),
        }
        for url, title in answer.citations
    ]
    return {"citations": cited} if cited else {}


def _anthropic_usage(answer: Answer) -> Json:
    written, read = answer.cache_write_tokens, answer.cached_tokens
    usage: Json = {
        "input_tokens": answer.input_tokens - written - read,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": written,
            "ephemeral_1h_input_tokens": 0,
        },
        "output_tokens": answer.output_tokens,
        "service_tier": "standard",
    }
    if answer.reasoning_tokens:
        spent = {"thinking_tokens": answer.reasoning_tokens}
        usage["output_tokens_details"] = spent
    if answer.citations:
        usage["server_tool_use"] = {"web_search_requests": 1}
    return usage


def _anthropic_whole(answer: Answer, ask: _Ask) -> Json:
    end = "refusal" if answer.refusal is not None else _ANTHROPIC_ENDS[answer.ending]
    blocks = list(_anthropic_blocks(answer))
    for block in blocks:
        # A stream carries broken arguments as they are; a whole message cannot.
        if block["type"] == "tool_use" and not ask.stream:
            block["input"] = _argument_object(block["input"])
    return {
        "model": answer.model or ask.model,
        "id": answer.id or _id("msg_01", 22),
        "type": "message",
        "role": "assistant",
        "content": blocks,
        "stop_reason": end,
        "stop_sequence": None,
        "stop_details": None,
        "usage": _anthropic_usage(answer),
    }


def _anthropic_deltas(block: Json, pieces: int) -> tuple[Json, list[Json]]:
    """How a block opens, and what is added to it."""
    kind = block["type"]
    if kind == "text":
        deltas = [{"type": "text_delta", "text": p} for p in _cut(block[kind], pieces)]
        cited = block.get("citations", ())
        deltas += [{"type": "citations_delta", "citation": c} for c in cited]
        return {**block, "text": ""} | ({"citations": []} if cited else {}), deltas
    if kind == "thinking":
        parts = _cut(block[kind], pieces)
        deltas = [{"type": "thinking_delta", "thinking": p} for p in parts]
        signature = {"type": "signature_delta", "signature": block["signature"]}
        return {**block, "thinking": "", "signature": ""}, [*deltas, signature]
    if kind in ("tool_use", "server_tool_use"):
        text = _arguments(block["input"])
        parts = ["", *_cut("" if text == "{}" else text, max(2, pieces))]
        deltas = [{"type": "input_json_delta", "partial_json": p} for p in parts]
        return {**block, "input": {}}, deltas
    return block, []


def _anthropic_steps(whole: Json, pieces: int) -> Iterator[Json]:
    usage = {**whole["usage"], "output_tokens": 1}
    start = {**whole, "content": [], "stop_reason": None, "usage": usage}
    yield {"type": "message_start", "message": start}
    for i, block in enumerate(whole["content"]):
        opened, deltas = _anthropic_deltas(block, pieces)
        yield {"type": "content_block_start", "index": i, "content_block": opened}
        if i == 0:
            yield {"type": "ping"}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": i, "delta": delta}
        yield {"type": "content_block_stop", "index": i}
    end = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    told = {k: v for k, v in whole["usage"].items() if k.endswith("_tokens")}
    told |= {k: v for k, v in whole["usage"].items() if k == "server_tool_use"}
    yield {"type": "message_delta", "delta": end, "usage": told}
    yield {"type": "message_stop"}


def _anthropic_events(answer: Answer, ask: _Ask) -> tuple[list[bytes], int]:
    events = []
    steps = _anthropic_steps(_anthropic_whole(answer, ask), answer.pieces)
    for i, step in enumerate(steps):
        # The real server pads its events with spaces before the last brace.
        data = f"{_compact(step)[:-1]}{' ' * (i * 5 % 14)}}}"
        events.append(_named(step["type"], data))
    return events, len(events) - 2


# --- Google ------------------------------------------------------------------------

_GOOGLE_ENDS = {"length": "MAX_TOKENS", "content_filter": "SAFETY"}


def _google_parts(answer: Answer) -> Iterator[Json]:
    if answer.refusal is not None:
        return
    if answer.reasoning is not None:
        yield {"text": answer.reasoning, "thought": True}
    if answer.said:
        yield {"text": answer.said}
    for image in answer.images:
        data = base64.b64encode(image).decode()
        yield {"inlineData": {"mimeType": "image/png", "data": data}}
    for i, (name, arguments) in enumerate(answer.tool_calls):
        part: Json = {"functionCall": {"name": name}}
        part["functionCall"]["args"] = _argument_object(arguments)
        # Of parallel calls the real server signs the first.
        yield part if i else {**part, "thoughtSignature": _id("CiQB", 40) + "=="}


def _google_usage(answer: Answer) -> Json:
    told = max(0, answer.output_tokens - answer.reasoning_tokens)
    usage: Json = {
        "promptTokenCount": answer.input_tokens,
        "candidatesTokenCount": told,
        "totalTokenCount": answer.input_tokens + told + answer.reasoning_tokens,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": answer.input_tokens}
        ],
    }
    if answer.cached_tokens:
        usage["cachedContentTokenCount"] = answer.cached_tokens
    if answer.reasoning_tokens:
        usage["thoughtsTokenCount"] = answer.reasoning_tokens
    return usage


def _grounding(answer: Answer) -> Json:
    if not answer.citations:
        return {}
    cited = [{"web": {"uri": url, "title": title}} for url, title in answer.citations]
    segment = {"endIndex": len(answer.said.encode()), "text": answer.said}
    support = {"segment": segment, "groundingChunkIndices": list(range(len(cited)))}
    metadata = {"groundingChunks": cited, "groundingSupports": [support]}
    return {"groundingMetadata": {**metadata, "webSearchQueries": ["loopback"]}}


def _google_end(answer: Answer) -> Json:
    """What closes the first candidate."""
    end: Json = {"finishReason": _GOOGLE_ENDS.get(answer.ending, "STOP")}
    if answer.refusal is not None or end["finishReason"] == "SAFETY":
        rating = {"category": "HARM_CATEGORY_DANGEROUS_CONTENT", "probability": "HIGH"}
        end = {"finishReason": "SAFETY", "safetyRatings": [{**rating, "blocked": True}]}
    elif answer.tool_calls:
        end["finishMessage"] = "Model generated function call(s)."
    return {**end, "index": 0, **_grounding(answer)}


def _google_frame(answer: Answer, ask: _Ask) -> Json:
    version = {"modelVersion": answer.model or ask.model}
    return {**version, "responseId": answer.id or _id("", 22)}


def _google_content(parts: list[Json]) -> Json:
    return {"content": {"parts": parts, "role": "model"} if parts else {}}


def _google_whole(answer: Answer, ask: _Ask) -> Json:
    parts = list(_google_parts(answer))
    candidates = [{**_google_content(parts), **_google_end(answer)}]
    for i, text in enumerate(_texts(answer, ask.n), 1):
        content = _google_content([{"text": text}])
        candidates.append({**content, "finishReason": "STOP", "index": i})
    usage = {"usageMetadata": _google_usage(answer)}
    return {"candidates": candidates, **usage, **_google_frame(answer, ask)}


def _google_steps(answer: Answer, ask: _Ask) -> Iterator[Json]:
    """The candidates one by one; the last carries the end of the first choice."""
    for i, text in enumerate(_texts(answer, ask.n), 1):
        content = _google_content([{"text": text}])
        yield {**content, "finishReason": "STOP", "index": i}
    parts: list[Json] = []
    for part in _google_parts(answer):
        pieces = _cut(part["text"], answer.pieces) if "text" in part else [None]
        parts += [{**part, "text": p} if p is not None else part for p in pieces]
    for part in parts[:-1]:
        yield {**_google_content([part]), "index": 0}
    # Without its end mark a Gemini stream still has all its text.
    end = {"index": 0} if answer.drop_end else _google_end(answer)
    yield {**_google_content(parts[-1:]), **end}


def _google_events(answer: Answer, ask: _Ask) -> tuple[list[bytes], int]:
    frame, usage = _google_frame(answer, ask), _google_usage(answer)
    early = {k: v for k, v in usage.items() if k.startswith("prompt")}
    early["totalTokenCount"] = answer.input_tokens
    steps = list(_google_steps(answer, ask))
    events = []
    for i, step in enumerate(steps, 1):
        last = i == len(steps) and not answer.drop_end
        body = {"candidates": [step], "usageMetadata": usage if last else early}
        events.append(f"data: {_dump({**body, **frame})}\r\n\r\n".encode())
    return events, len(events)


# --- Ollama ------------------------------------------------------------------------


def _ollama_calls(answer: Answer) -> list[Json]:
    return [
        {
            "id": _id("call_", 8),
            "function": {
                "index": i,
                "name": name,
                "arguments": _argument_object(arguments),
            },
        }
        for i, (name, arguments) in enumerate(answer.tool_calls)
    ]


def _ollama_line(answer: Answer, ask: _Ask, message: Json, **end: Any) -> Json:
    said = {"role": "assistant", "content": "", **message}
    head = {"model": answer.model or ask.model, "created_at": _now(), "message": said}
    return {**head, "done": False, **end}


def _ollama_end(answer: Answer) -> Json:
    return {
        "done_reason": "length" if answer.ending == "length" else "stop",
        "done": True,
        "total_duration": 1078043917,
        "load_duration": 109557375,
        "prompt_eval_count": answer.input_tokens,
        "prompt_eval_duration": 153401750,
        "eval_count": answer.output_tokens,
        "eval_duration": 814595750,
    }


def _ollama_whole(answer: Answer, ask: _Ask) -> Json:
    message: Json = {"content": answer.refusal or answer.said}
    if answer.reasoning is not None:
        message["thinking"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = _ollama_calls(answer)
    return _ollama_line(answer, ask, message, **_ollama_end(answer))


def _ollama_events(answer: Answer, ask: _Ask) -> tuple[list[bytes], int]:
    text = answer.refusal or answer.said
    messages: list[Json] = [
        {"thinking": piece} for piece in _cut(answer.reasoning or "", answer.pieces)
    ]
    messages += [{"content": piece} for piece in _cut(text, answer.pieces)]
    messages += [{"tool_calls": [call]} for call in _ollama_calls(answer)]
    lines = [_ollama_line(answer, ask, message) for message in messages]
    lines.append(_ollama_line(answer, ask, {}, **_ollama_end(answer)))
    # Go's encoder escapes what HTML would read.
    escapes = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
    events = [f"{_compact(line).translate(escapes)}\n".encode() for line in lines]
    return events, len(events) - 1


_Events: TypeAlias = tuple[list[bytes], int]
_WHOLE: dict[str, Callable[[Answer, _Ask], Json]] = {
    "openai": _openai_whole,
    "responses": _responses_whole,
    "anthropic": _anthropic_whole,
    "google": _google_whole,
    "ollama": _ollama_whole,
}
# The events of a stream, and the index of the first that marks its end.
_EVENTS: dict[str, Callable[[Answer, _Ask], _Events]] = {
    "openai": _openai_events,
    "responses": _responses_events,
    "anthropic": _anthropic_events,
    "google": _google_events,
    "ollama": _ollama_events,
}
_OVERLOADED = "The model is overloaded. Please try again later."
_STREAM_ERRORS = {
    "openai": f"data: {_compact(_openai_body(500, '', None, None))}\n\n".encode(),
    "responses": _named(
        "error",
        _compact(
            {"type": "error", "sequence_number": 9, **_openai_body(500, "", None, None)}
        ),
    ),
    "anthropic": _named(
        "error",
        _compact(
            {
                "type": "error",
                "error": {
                    "details": None,
                    "type": "overloaded_error",
                    "message": "Overloaded",
                },
            }
        ),
    ),
    "google": f"data: {_dump(_google_body(503, '', None, None))}\r\n\r\n".encode(),
    "ollama": b'{"error":"an error was encountered while running the model"}\n',
}
_GARBAGE = {
    "openai": b'data: {"id":"chatcmpl-\n\n',
    "responses": _named("response.output_text.delta", '{"type":"response.outp'),
    "anthropic": _named("content_block_delta", '{"type":"content_blo'),
    "google": b'data: {"candidates": [{"cont\r\n\r\n',
    "ollama": b'{"model":"llama3.2","created_\n',
}


def _stream_events(answer: Answer, ask: _Ask) -> tuple[list[bytes], str]:
    """The events to send, and how it goes on after them: end, reset or stall."""
    events, mark = _EVENTS[ask.api](answer, ask)
    if answer.drop_end:
        events = events[:mark]
    if (at := answer.garbage_after) is not None:
        events.insert(at, _GARBAGE[ask.api])
    if (at := answer.error_after) is not None:
        events = [*events[:at], _STREAM_ERRORS[ask.api]]
    if (at := answer.cut_after) is not None:
        return events[:at], "reset"
    if (at := answer.stall_after) is not None:
        return events[:at], "stall"
    return events, "end"


def _stream_type(api: str) -> str:
    if api == "ollama":
        return "application/x-ndjson"
    return "text/event-stream" + ("" if api == "google" else "; charset=utf-8")


# --- what a provider refuses -------------------------------------------------------

_FIELDS = {
    "openai": """audio frequency_penalty function_call functions logit_bias logprobs
        max_completion_tokens max_tokens messages metadata modalities model moderation
        n parallel_tool_calls prediction presence_penalty prompt_cache_key
        prompt_cache_options prompt_cache_retention reasoning_effort response_format
        safety_identifier seed service_tier stop store stream stream_options
        temperature tool_choice tools top_logprobs top_p user verbosity
        web_search_options""",
    "responses": """background context_management conversation include input
        instructions max_output_tokens max_tool_calls metadata model moderation
        parallel_tool_calls previous_response_id prompt prompt_cache_key
        prompt_cache_options prompt_cache_retention reasoning safety_identifier
        service_tier store stream stream_options temperature text tool_choice tools
        top_logprobs top_p truncation user""",
    "anthropic": """cache_control container context_management inference_geo max_tokens
        mcp_servers messages metadata model output_config output_format service_tier
        speed stop_sequences stream system temperature thinking tool_choice tools
        top_k top_p""",
    "google": """contents tools toolConfig safetySettings systemInstruction
        generationConfig cachedContent model serviceTier store""",
    "generation_config": """stopSequences responseMimeType responseSchema
        responseJsonSchema _responseJsonSchema responseModalities candidateCount
        maxOutputTokens temperature topP topK seed presencePenalty frequencyPenalty
        responseLogprobs logprobs enableEnhancedCivicAnswers speechConfig
        thinkingConfig imageConfig mediaResolution""",
    "part": """text inlineData functionCall functionResponse fileData executableCode
        codeExecutionResult thought thoughtSignature videoMetadata mediaResolution
        toolCall toolResponse partMetadata""",
}
_KNOWN = {name: frozenset(fields.split()) for name, fields in _FIELDS.items()}
_OPENAI_ROLES = ("system", "assistant", "user", "function", "tool", "developer")


def _refuse(
    provider: str,
    message: str,
    code: str | None = None,
    status: int = 400,
    param: str | None = None,
) -> None:
    raise _RefusalError(error(provider, status, message, code=code, param=param))


def _check_key(asked: Received, accepted: set[str] | None) -> None:
    """Refuse a request without the provider's own key header, or with a bad key."""
    provider, headers = asked.provider, asked.headers
    if "key" in asked.query:
        _refuse(provider, "key in URL: send it in a header")
    if provider not in ("openai", "anthropic", "google"):
        return
    if provider == "openai":
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if not key:
            raise _RefusalError(_no_openai_key())
    elif provider == "anthropic":
        key = headers.get("x-api-key", "")
        if not key:
            _refuse(provider, "x-api-key header is required", status=401)
        if "anthropic-version" not in headers:
            _refuse(provider, "anthropic-version: header is required")
    else:
        key = headers.get("x-goog-api-key", "")
        if not key:
            said = "Method doesn't allow unregistered callers. Please use API Key."
            _refuse(provider, said, status=403)
    known = key in accepted if accepted else not key.startswith(("bad", "sk-bad"))
    if not known:
        _refuse_key(provider, key)


def _no_openai_key() -> Raw:
    said = "You didn't provide an API key. You need to provide your API key in an"
    said += " Authorization header using Bearer auth."
    detail = {"message": said, "type": "invalid_request_error"}
    body = _dump({"error": {**detail, "param": None, "code": None}}, indent=4)
    headers = {"content-type": "application/json; charset=utf-8"}
    return Raw(401, headers | _request_id("openai"), body.encode())


def _refuse_key(provider: str, key: str) -> None:
    if provider == "google":
        said = "API key not valid. Please pass a valid API key."
        _refuse(provider, said, "API_KEY_INVALID")
    if provider == "anthropic":
        _refuse(provider, "invalid x-api-key", status=401)
    # The real server shows the two ends of the key.
    shown = f"{key[:8]}{'*' * 10}{key[-4:]}"
    said = f"Incorrect API key provided: {shown}. You can find your API key at"
    said += " https://platform.openai.com/account/api-keys."
    _refuse(provider, said, "invalid_api_key", 401)


def _check_openai(body: Json) -> None:
    unknown = sorted(set(body) - _KNOWN["openai"])
    if unknown:
        names = ", ".join(unknown)
        _refuse("openai", f"Unrecognized request argument supplied: {names}")
    if not body.get("model"):
        _refuse("openai", "you must provide a model parameter")
    if body.get("messages") is None:
        said = "Missing required parameter: 'messages'."
        _refuse("openai", said, "missing_required_parameter", param="messages")
    if not body["messages"]:
        said = "Invalid 'messages': empty array. Expected an array with minimum length"
        said += " 1, but got an empty array instead."
        _refuse("openai", said, "empty_array", param="messages")
    _check_openai_model(body)
    _check_openai_messages(body["messages"])


def _check_openai_model(body: Json) -> None:
    model = str(body["model"])
    if model == MISSING_MODEL:
        said = f"The model `{model}` does not exist or you do not have access to it."
        _refuse("openai", said, "model_not_found", 404)
    if not re.match(r"o[1-9](-|$)", model):
        return
    code = "unsupported_parameter"
    if body.get("max_tokens") is not None:
        said = "Unsupported parameter: 'max_tokens' is not supported with this model."
        said += " Use 'max_completion_tokens' instead."
        _refuse("openai", said, code, param="max_tokens")
    if body.get("temperature") not in (None, 1):
        said = "Unsupported parameter: 'temperature' is not supported with this model."
        _refuse("openai", said, code, param="temperature")


def _check_openai_role(role: Any, param: str) -> None:
    if role not in _OPENAI_ROLES:
        known = ", ".join(f"'{name}'" for name in _OPENAI_ROLES)
        said = f"Invalid value: '{role}'. Supported values are: {known}."
        _refuse("openai", said, "invalid_value", param=param)


def _check_openai_messages(messages: list[Json]) -> None:
    open_calls: set[str] = set()
    for i, message in enumerate(messages):
        role, at = message.get("role"), f"messages.[{i}]"
        _check_openai_role(role, f"messages[{i}].role")
        if role == "tool":
            if message.get("tool_call_id") not in open_calls:
                said = "Invalid parameter: messages with role 'tool' must be a response"
                said += " to a preceeding message with 'tool_calls'."
                _refuse("openai", said, param=f"{at}.role")
            open_calls.discard(message["tool_call_id"])
            continue
        _check_answered(open_calls, at)
        calls = message.get("tool_calls") or ()
        open_calls = {str(call.get("id")) for call in calls}
        excused = role == "assistant" and (calls or message.get("refusal"))
        if message.get("content") is None and not (
            excused or message.get("function_call")
        ):
            said = "Invalid value for 'content': expected a string, got null."
            _refuse("openai", said, param=f"{at}.content")
    _check_answered(open_calls, f"messages.[{len(messages)}]")


def _check_answered(open_calls: set[str], at: str) -> None:
    if open_calls:
        said = "An assistant message with 'tool_calls' must be followed by tool"
        said += " messages responding to each 'tool_call_id'. The following"
        said += " tool_call_ids did not have response messages: "
        _refuse("openai", said + ", ".join(sorted(open_calls)), param=f"{at}.role")


def _check_responses(body: Json) -> None:
    for name in sorted(set(body) - _KNOWN["responses"]):
        said = f"Unknown parameter: '{name}'."
        _refuse("openai", said, "unknown_parameter", param=name)
    if not body.get("model"):
        said = "Missing required parameter: 'model'."
        _refuse("openai", said, "missing_required_parameter", param="model")
    if body["model"] == MISSING_MODEL:
        said = f"The requested model '{MISSING_MODEL}' does not exist."
        _refuse("openai", said, "model_not_found", param="model")
    if not (body.get("input") or body.get("prompt")):
        said = "Missing required parameter: 'input'."
        _refuse("openai", said, "missing_required_parameter", param="input")
    items = body.get("input")
    for i, item in enumerate(items if isinstance(items, list) else ()):
        if "role" in item:
            _check_openai_role(item["role"], f"input[{i}].role")


def _check_anthropic(body: Json, *, counting: bool = False) -> None:
    for name in sorted(set(body) - _KNOWN["anthropic"]):
        _refuse("anthropic", f"{name}: Extra inputs are not permitted")
    required = ["model", "messages"] + ([] if counting else ["max_tokens"])
    for name in required:
        if body.get(name) is None:
            _refuse("anthropic", f"{name}: Field required")
    if body["model"] == MISSING_MODEL:
        _refuse("anthropic", f"model: {MISSING_MODEL}", status=404)
    if not body["messages"]:
        _refuse("anthropic", "messages: at least one message is required")
    _check_anthropic_blocks("system", body.get("system"))
    previous: Json = {}
    for i, message in enumerate(body["messages"]):
        _check_anthropic_message(i, message, previous)
        previous = message


def _check_anthropic_message(i: int, message: Json, previous: Json) -> None:
    role = message.get("role")
    if role not in ("user", "assistant"):
        said = f'messages: Unexpected role "{role}". The Messages API accepts a'
        said += ' top-level `system` parameter, not "system" as an input message role.'
        _refuse("anthropic", said)
    if i == 0 and role != "user":
        _refuse("anthropic", 'messages: first message must use the "user" role')
    if not message.get("content") and role == "user":
        said = f"messages.{i}: user messages must have non-empty content"
        _refuse("anthropic", said)
    _check_anthropic_blocks(f"messages.{i}.content", message.get("content"))
    called = _block_ids(previous, "tool_use", "id")
    answered = _block_ids(message, "tool_result", "tool_use_id")
    if stray := sorted(answered - called):
        said = f"messages.{i}.content.0: unexpected `tool_use_id` found in"
        said += f" `tool_result` blocks: {', '.join(stray)}. Each `tool_result` block"
        said += " must have a corresponding `tool_use` block in the previous message."
        _refuse("anthropic", said)
    if missing := sorted(called - answered):
        said = f"messages.{i - 1}: `tool_use` ids were found without `tool_result`"
        said += f" blocks immediately after: {', '.join(missing)}."
        _refuse("anthropic", said)


def _check_anthropic_blocks(at: str, content: Any) -> None:
    for block in content if isinstance(content, list) else ():
        if block.get("type") == "text" and not block.get("text"):
            _refuse("anthropic", f"{at}: text content blocks must be non-empty")


def _block_ids(message: Json, kind: str, name: str) -> set[str]:
    content = message.get("content")
    blocks = content if isinstance(content, list) else ()
    return {str(block.get(name)) for block in blocks if block.get("type") == kind}


def _camel(value: Json) -> Json:
    """Google reads both spellings of a field."""

    def name(text: str) -> str:
        return re.sub(r"(?<=[a-z])_([a-z])", lambda m: m[1].upper(), text)

    return {name(key): item for key, item in value.items()}


def _google_known(raw: Any, kind: str, at: str) -> Json:
    value = _camel(raw if isinstance(raw, dict) else {})
    for name in sorted(set(value) - _KNOWN[kind]):
        where = f" at '{at}'" if at else ""
        said = f'Invalid JSON payload received. Unknown name "{name}"{where}:'
        _refuse("google", f"{said} Cannot find field.")
    return value


def _check_google(body: Json, model: str, method: str) -> None:
    if model == MISSING_MODEL:
        said = f"models/{model} is not found for API version v1beta, or is not"
        said += f" supported for {method}. Call ModelService.ListModels to see the list"
        said += " of available models and their supported methods."
        _refuse("google", said, status=404)
    if method == "countTokens":
        body = body.get("generateContentRequest", body)
    body = _google_known(body, "google", "")
    config = body.get("generationConfig")
    _google_known(config, "generation_config", "generation_config")
    prefix = "* GenerateContentRequest.contents"
    if not body.get("contents"):
        _refuse("google", f"{prefix}: contents is not specified\n")
    contents = body["contents"]
    for i, content in enumerate(contents if isinstance(contents, list) else [contents]):
        if content.get("role", "user") not in ("user", "model", "function"):
            _refuse("google", "Please use a valid role: user, model.")
        if not content.get("parts"):
            said = f"{prefix}[{i}].parts: contents.parts must not be empty.\n"
            _refuse("google", said)
        parts = content["parts"]
        for j, part in enumerate(parts if isinstance(parts, list) else [parts]):
            if not _google_known(part, "part", f"contents[{i}].parts[{j}]"):
                said = f"{prefix}[{i}].parts[{j}].data: required oneof field 'data'"
                _refuse("google", f"{said} must have one initialized field\n")


def _check_ollama(body: Json) -> None:
    if not body.get("model"):
        _refuse("ollama", "model is required")
    if body["model"] == MISSING_MODEL:
        _refuse("ollama", f'model "{MISSING_MODEL}" not found', status=404)
    for message in body.get("messages") or ():
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            said = f'invalid role: "{message.get("role")}", role must be one of'
            _refuse("ollama", said + ' ["system", "user", "assistant", "tool"]')


# --- listings and files ------------------------------------------------------------


def _models() -> dict[str, list[str]]:
    return {
        "openai": ["gpt-4.1-nano", "gpt-4o-mini", "gpt-5-mini", "o4-mini"],
        "anthropic": ["claude-sonnet-4-5", "claude-haiku-4-5", "claude-opus-4-1"],
        "google": ["gemini-2.5-flash", "gemini-2.5-pro", "gemini-embedding-001"],
        "ollama": ["llama3.2:latest", "qwen3:4b"],
    }


def _openai_models(names: list[str]) -> Json:
    shared = {"object": "model", "created": 1687882411, "owned_by": "system"}
    return {"object": "list", "data": [{"id": name, **shared} for name in names]}


def _page(names: list[str], start: int, *sizes: int | None) -> tuple[list[str], bool]:
    size = min((size for size in sizes if size), default=len(names))
    return names[start : start + size], start + size < len(names)


def _anthropic_models(names: list[str], asked: Received, size: int | None) -> Json:
    after = asked.query.get("after_id")
    start = names.index(after) + 1 if after in names else 0
    limit = int(asked.query.get("limit") or 0)
    page, more = _page(names, start, size, limit)
    data = [
        {
            "type": "model",
            "id": name,
            "display_name": name.replace("-", " ").title(),
            "created_at": "2025-09-29T00:00:00Z",
        }
        for name in page
    ]
    ends = {"first_id": page[0], "last_id": page[-1]} if page else {}
    return {"data": data, "has_more": more, "first_id": None, "last_id": None} | ends


def _google_models(names: list[str], asked: Received, size: int | None) -> Json:
    token = asked.query.get("pageToken", "")
    start = int(base64.urlsafe_b64decode(token)) if token else 0
    limit = int(asked.query.get("pageSize") or 0)
    page, more = _page(names, start, size, limit)
    models = []
    for name in page:
        methods = ["generateContent", "countTokens"]
        if "embedding" in name:
            methods = ["embedContent"]
        told = {"name": f"models/{name}", "version": "001", "displayName": name}
        limits = {"inputTokenLimit": 1048576, "outputTokenLimit": 65536}
        models.append({**told, **limits, "supportedGenerationMethods": methods})
    following = base64.urlsafe_b64encode(str(start + len(page)).encode()).decode()
    return {"models": models} | ({"nextPageToken": following} if more else {})


def _ollama_details() -> Json:
    family = {"family": "llama", "families": ["llama"]}
    size = {"parameter_size": "3.2B", "quantization_level": "Q4_K_M"}
    return {"parent_model": "", "format": "gguf", **family, **size}


def _ollama_tags(names: list[str]) -> Json:
    shared = {"modified_at": _now(), "size": 2019393189, "details": _ollama_details()}
    return {
        "models": [
            {"name": name, "model": name, "digest": _id("", 40), **shared}
            for name in names
        ]
    }


def _ollama_show(body: Json, names: list[str]) -> Json:
    name = body.get("model") or body.get("name") or ""
    if name not in names and f"{name}:latest" not in names:
        _refuse("ollama", f"model '{name}' not found", status=404)
    info = {"general.architecture": "llama", "llama.context_length": 131072}
    told = {"license": "none", "modelfile": f"FROM {name}", "template": "{{ .Prompt }}"}
    abilities = {"capabilities": ["completion", "tools"], "modified_at": _now()}
    return {**told, "details": _ollama_details(), "model_info": info, **abilities}


def _png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    size = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixel = chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return head + pixel + chunk(b"IEND", b"")


PNG = _png()
PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>endobj\n"
    b"trailer<</Root 1 0 R>>\n%%EOF\n"
)
_FILES: dict[str, tuple[str, bytes | Sequence[bytes]]] = {
    "/image.png": ("image/png", PNG),
    "/file.pdf": ("application/pdf", PDF),
    "/huge.bin": ("application/octet-stream", [bytes(65536)] * (_HUGE // 65536)),
}


# --- requests ----------------------------------------------------------------------


def _provider(path: str, headers: Mapping[str, str]) -> str:
    """Whose API a request is for."""
    if path.startswith("/v1beta/"):
        return "google"
    if path.startswith("/api/"):
        return "ollama"
    own = "x-api-key" in headers or "anthropic-version" in headers
    if not path.startswith("/v1/"):
        return "unknown"
    return "anthropic" if own or path.startswith("/v1/messages") else "openai"


def _wants_stream(path: str, body: Any) -> bool:
    if path.startswith("/v1beta/"):
        return path.endswith(":streamGenerateContent")
    asked = body.get("stream") if isinstance(body, dict) else None
    # Ollama streams unless it is told not to.
    return asked is not False if path == "/api/chat" else asked is True


def _parse(head: bytes, body: bytes, connection: int) -> Received:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines)
    }
    url = urllib.parse.urlsplit(target)
    path = urllib.parse.unquote(url.path)
    try:
        value = json.loads(body) if body else None
    except ValueError:
        value = None
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    provider, stream = _provider(path, headers), _wants_stream(path, value)
    return Received(
        method, path, query, headers, body, value, provider, connection, stream
    )


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    if found:
        return await reader.readexactly(int(found[1]))
    if not re.search(rb"\r\ntransfer-encoding: *chunked", head, re.IGNORECASE):
        return b""
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


def _ask(asked: Received) -> _Ask | None:
    """What a generation request asks for; None for any other request."""
    body = asked.json if isinstance(asked.json, dict) else {}
    model = str(body.get("model"))
    if asked.method != "POST":
        return None
    if asked.path == "/v1/chat/completions":
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return _Ask("openai", model, asked.stream, body.get("n") or 1, usage)
    if found := re.fullmatch(r"/v1beta/models/(.+):(\w+)", asked.path):
        if found[2] not in ("generateContent", "streamGenerateContent"):
            return None
        config = _camel(_camel(body).get("generationConfig") or {})
        n = config.get("candidateCount") or 1
        return _Ask("google", found[1], asked.stream, n)
    paths = {"/v1/responses": "responses", "/v1/messages": "anthropic"}
    api = {**paths, "/api/chat": "ollama"}.get(asked.path)
    return _Ask(api, model, asked.stream) if api else None


def _check(asked: Received) -> None:
    """Refuse a body that the provider would refuse."""
    if asked.method != "POST":
        return
    body, provider, path = asked.json, asked.provider, asked.path
    if not isinstance(body, dict):
        said = {
            "openai": "We could not parse the JSON body of your request.",
            "anthropic": "The request body is not valid JSON: expected value",
            "google": "Invalid JSON payload received. Expected a value.",
        }
        _refuse(provider, said.get(provider, "invalid character in the JSON body"))
    if path == "/v1/chat/completions":
        _check_openai(body)
    elif path == "/v1/responses":
        _check_responses(body)
    elif provider == "anthropic":
        _check_anthropic(body, counting=path.endswith("count_tokens"))
    elif path == "/api/chat":
        _check_ollama(body)
    elif found := re.fullmatch(r"/v1beta/models/(.+):(\w+)", path):
        _check_google(body, found[1], found[2])
        if asked.stream and asked.query.get("alt") != "sse":
            _refuse("google", "streamGenerateContent wants alt=sse here")


def _broken_rules(asked: Received) -> list[str]:
    """What the real provider would refuse or pass over in a generation request."""
    if _ask(asked) is None or not isinstance(asked.json, dict):
        return []
    query = f"?{urllib.parse.urlencode(asked.query)}" if asked.query else ""
    path = f"{asked.path}{query}"
    request = (asked.provider, asked.method, path, asked.headers, asked.json)
    return [*violations_of(*request), *losses_of(*request)]


# --- the server --------------------------------------------------------------------


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    usual = {"date": email.utils.formatdate(usegmt=True)}
    lines = [f"{name}: {value}\r\n" for name, value in (usual | dict(headers)).items()]
    return f"HTTP/1.1 {status} Loopback\r\n{''.join(lines)}\r\n".encode("latin-1")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _reset(connection: _Connection) -> None:
    """Close with an RST: the peer sees "connection reset"."""
    sock = connection.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.writer.transport.abort()


async def _flush(connection: _Connection, data: bytes) -> None:
    """One TCP write; fails once the peer has closed."""
    if connection.reader.at_eof():
        raise ConnectionResetError("the client has gone")
    connection.writer.write(data)
    await connection.writer.drain()


async def _pause(connection: _Connection, seconds: float) -> None:
    """Wait, but no longer than the peer does: it sends nothing before an answer."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await connection.reader.read(1)
            raise ConnectionResetError("the client has gone")


class ProviderServer:
    """The server; an async context manager.

    Args:
        strict: Whether to refuse what the asked provider would refuse.
        host: Where to listen.
        port: 0 picks a free one.
        ssl: A server context, for https.
    """

    def __init__(
        self,
        *,
        strict: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl: ssl.SSLContext | None = None,
    ) -> None:
        self.strict = strict
        self.rules = CHECK_RULES
        """Whether requests that the real provider would refuse fail the test; a test
        that sends nonsense on purpose sets it to False."""
        self.broken_rules: list[str] = []
        self.host = host
        self.port = port
        self.ssl = ssl
        self.requests: list[Received] = []
        self.connections = 0
        self.open_connections = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.default: Reply = Answer()
        self.models = _models()
        self.page_size: int | None = None
        self.keys: dict[str, set[str]] = {}
        self._queue: deque[Reply] = deque()
        self._server: asyncio.Server | None = None
        self._tasks: dict[_Connection, asyncio.Task[Any]] = {}
        self._idle: set[_Connection] = set()
        self._streaming: set[_Connection] = set()
        self._closing = False
        self._one: Callable[[_Connection], Awaitable[bool]] = self._exchange

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"{'https' if self.ssl else 'http'}://{self.host}:{self.port}"

    def base_url(self, provider: str) -> str:
        """What a client of that provider takes as its base URL."""
        return self.origin + {"openai": "/v1", "google": "/v1beta"}.get(provider, "")

    def reply(self, *replies: Reply) -> None:
        """Queue replies for generation requests, each used once, first in first out."""
        self._queue.extend(replies)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, self.host, self.port, ssl=self.ssl, limit=1 << 20, backlog=2048
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closing = True
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks.items())
        for connection, task in tasks:
            connection.writer.transport.abort()
            task.cancel()
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        # Two turns of the loop for the transports to tell that they are closed.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if self.rules and self.broken_rules and exc[:1] == (None,):
            raise AssertionError("\n".join(["refused for real:", *self.broken_rules]))

    async def wait_closed_by_client(self, timeout: float = 5) -> None:  # noqa: ASYNC109
        """Wait until the peers have closed every connection whose last answer streamed.

        A connection that was used again for another request does not count.
        """
        async with asyncio.timeout(timeout):
            while self._streaming:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def drop_connections(self) -> None:
        """Close all idle keep-alive connections from the server's side."""
        for connection in list(self._idle):
            connection.writer.close()
            with contextlib.suppress(OSError):
                await connection.writer.wait_closed()

    # --- one connection

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._closing:
            writer.transport.abort()
            return
        self.connections += 1
        self.open_connections += 1
        connection = _Connection(self.connections, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks[connection] = task
        try:
            while await self._one(connection):
                pass
        except (OSError, EOFError):
            writer.transport.abort()
        except asyncio.CancelledError:
            # Only the end of the server cancels; a cancelled handler would be logged.
            if not self._closing:
                raise
        finally:
            self._streaming.discard(connection)
            self._idle.discard(connection)
            self.open_connections -= 1
            await self._finish(connection)

    async def _finish(self, connection: _Connection) -> None:
        try:
            connection.writer.close()
            await connection.writer.wait_closed()
        except OSError:
            connection.writer.transport.abort()
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self._tasks.pop(connection, None)

    async def _exchange(self, connection: _Connection) -> bool:
        """Serve one request; whether the connection goes on."""
        self._idle.add(connection)
        head = await connection.reader.readuntil(b"\r\n\r\n")
        self._idle.discard(connection)
        self._streaming.discard(connection)
        body = await _read_body(connection.reader, head)
        asked = _parse(head, body, connection.number)
        self.requests.append(asked)
        # A test's own request need not be one that a provider takes.
        is_ours = asked.headers.get("user-agent", "") == "dipeo-llm"
        if self.rules and is_ours:
            self.broken_rules += _broken_rules(asked)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            goes_on = await self._answer(connection, asked)
        finally:
            self.in_flight -= 1
        return goes_on and asked.headers.get("connection", "").lower() != "close"

    async def _answer(self, connection: _Connection, asked: Received) -> bool:
        try:
            if self.strict and asked.path not in _FILES:
                _check_key(asked, self.keys.get(asked.provider))
                _check(asked)
            ask = _ask(asked)
            if ask is None:
                return await self._send_raw(connection, self._listing(asked))
        except _RefusalError as refusal:
            raw = refusal.raw
            if asked.provider == "google" and asked.stream:
                # The real server labels the error of a stream as a stream.
                raw.headers = {**raw.headers, "content-type": "text/event-stream"}
            return await self._send_raw(connection, raw)
        reply = self._queue.popleft() if self._queue else self.default
        if callable(reply):
            reply = reply(asked)
        if isinstance(reply, Fault):
            return await self._fail(connection, reply, ask)
        await _pause(connection, reply.delay)
        if isinstance(reply, Raw):
            return await self._send_raw(connection, reply)
        if ask.stream:
            return await self._send_stream(connection, reply, ask)
        return await self._send_raw(connection, self._whole(reply, ask))

    def _listing(self, asked: Received) -> Raw:
        """What is answered to anything but a generation request."""
        if asked.path in _FILES:
            kind, data = _FILES[asked.path]
            return Raw(headers={"content-type": kind}, body=data)
        value = self._lookup(asked)
        if value is None:
            said = f"Not Found: {asked.method} {asked.path}"
            raise _RefusalError(error(asked.provider, 404, said))
        return Raw(headers=_request_id(asked.provider), body=_dump(value).encode())

    def _lookup(self, asked: Received) -> Json | None:
        names = self.models.get(asked.provider, [])
        route = f"{asked.method} {asked.path}"
        if route == "GET /v1/models" and asked.provider == "anthropic":
            return _anthropic_models(names, asked, self.page_size)
        if route == "GET /v1/models":
            return _openai_models(names)
        if route == "GET /v1beta/models":
            return _google_models(names, asked, self.page_size)
        if route == "GET /api/tags":
            return _ollama_tags(names)
        if route == "POST /api/show":
            return _ollama_show(asked.json or {}, names)
        if route == "GET /api/version":
            return {"version": "0.12.6"}
        # About four bytes are a token.
        tokens = max(1, len(asked.body) // 4)
        if route == "POST /v1/messages/count_tokens":
            return {"input_tokens": tokens}
        if route.startswith("POST /v1beta/models/") and route.endswith(":countTokens"):
            detail = {"modality": "TEXT", "tokenCount": tokens}
            return {"totalTokens": tokens, "promptTokensDetails": [detail]}
        return None

    def _whole(self, answer: Answer, ask: _Ask) -> Raw:
        value = _WHOLE[ask.api](answer, ask)
        spaced = ask.api in ("openai", "responses", "google")
        text = _dump(value, indent=2) if spaced else _compact(value)
        headers = self._headers(answer, ask, "application/json")
        return Raw(headers=headers, body=text.encode())

    def _headers(self, answer: Answer, ask: _Ask, kind: str) -> dict[str, str]:
        provider = "openai" if ask.api == "responses" else ask.api
        usual = {"content-type": kind} | _request_id(provider)
        return usual | _lower(answer.headers)

    # --- bytes

    async def _send_raw(self, connection: _Connection, raw: Raw) -> bool:
        pieces = [raw.body] if isinstance(raw.body, bytes) else raw.body
        length = sum(map(len, pieces)) + (100 if raw.framing == "short" else 0)
        framing = {
            "length": {"content-length": str(length)},
            "short": {"content-length": str(length)},
            "chunked": {"transfer-encoding": "chunked"},
            "close": {"connection": "close"},
        }[raw.framing]
        usual = {"content-type": "application/json"}
        head = _head(raw.status, usual | _lower(raw.headers) | framing)
        chunked = raw.framing == "chunked"
        for i, piece in enumerate(pieces):
            data = _chunk(piece) if chunked and piece else piece
            await _flush(connection, data if i else head + data)
            if i + 1 < len(pieces):
                await _pause(connection, raw.piece_delay)
        if not pieces:
            await _flush(connection, head)
        if chunked:
            await _flush(connection, b"0\r\n\r\n")
        return raw.framing in ("length", "chunked")

    async def _send_stream(
        self, connection: _Connection, answer: Answer, ask: _Ask
    ) -> bool:
        events, ending = _stream_events(answer, ask)
        headers = self._headers(answer, ask, _stream_type(ask.api))
        self._streaming.add(connection)
        await _flush(connection, _head(200, headers | {"transfer-encoding": "chunked"}))
        pieces = answer.split(b"".join(events)) if answer.split else events
        for piece in pieces:
            if piece:
                await _flush(connection, _chunk(piece))
                await _pause(connection, answer.chunk_delay)
        if ending == "stall":
            await _pause(connection, 3600)
        if ending == "reset":
            # Lets the peer take what came before: a reset may discard it.
            await asyncio.sleep(0.02)
            _reset(connection)
            return False
        await _flush(connection, b"0\r\n\r\n")
        return True

    async def _fail(self, connection: _Connection, fault: Fault, ask: _Ask) -> bool:
        if fault.kind == "stall":
            await _pause(connection, 3600)
        if fault.kind == "drip":
            return await self._drip(connection, ask, fault.delay)
        await _pause(connection, fault.delay)
        if fault.kind == "reset_mid_body":
            data = b"".join(self._bytes(ask))
            await _flush(connection, data[: len(data) * 2 // 3])
            await asyncio.sleep(0.02)
        if fault.kind != "close":
            _reset(connection)
        return False

    async def _drip(self, connection: _Connection, ask: _Ask, delay: float) -> bool:
        for byte in b"".join(self._bytes(ask)):
            await _flush(connection, bytes([byte]))
            await _pause(connection, delay)
        return True

    def _bytes(self, ask: _Ask, answer: Answer | None = None) -> list[bytes]:
        """A whole valid response as it is on the wire, a stream event by event."""
        answer = answer or (self.default if isinstance(self.default, Answer) else None)
        answer = answer or Answer()
        if not ask.stream:
            raw = self._whole(answer, ask)
            assert isinstance(raw.body, bytes)
            length = {"content-length": str(len(raw.body))}
            return [_head(200, {**raw.headers, **length}), raw.body]
        headers = self._headers(answer, ask, _stream_type(ask.api))
        events, _ = _EVENTS[ask.api](answer, ask)
        head = _head(200, headers | {"transfer-encoding": "chunked"})
        return [head, *map(_chunk, events), b"0\r\n\r\n"]


class FastServer(ProviderServer):
    """For benchmarks: the same answer for all, rendered once, nothing recorded."""

    def __init__(self, *, chunks: int = 20, **options: Any) -> None:
        super().__init__(strict=False, **options)
        self._one = self._exchange_fast
        answer = Answer("loopback " * chunks, pieces=chunks)
        models = {"google": "gemini-2.5-flash", "ollama": "llama3.2"}
        models |= {"openai": "gpt-4o-mini", "responses": "gpt-4o-mini"}
        models["anthropic"] = "claude-sonnet-4-5"
        self._ready = {
            (api, stream): b"".join(
                self._bytes(_Ask(api, models[api], stream, usage=True), answer)
            )
            for api in _WHOLE
            for stream in (False, True)
        }

    async def _exchange_fast(self, connection: _Connection) -> bool:
        reader = connection.reader
        head = await reader.readuntil(b"\r\n\r\n")
        body = await _read_body(reader, head)
        line = head[: head.index(b"\r\n")]
        stream = b"alt=sse" in line or b'"stream":true' in body.replace(b": ", b":")
        if b"/chat/completions" in line:
            api = "openai"
        elif b"/v1/messages" in line:
            api = "anthropic"
        elif b"/v1beta/" in line:
            api = "google"
        elif b"/api/chat" in line:
            api = "ollama"
            stream = b'"stream":false' not in body.replace(b": ", b":")
        elif b"/v1/responses" in line:
            api = "responses"
        else:
            await _flush(connection, _head(404, {"content-length": "0"}))
            return True
        connection.writer.write(self._ready[api, stream])
        return True


# --- the command -------------------------------------------------------------------


def _watch_stdin(stop: Callable[[], object]) -> None:
    """Call `stop` when stdin closes; a stdin that never was open is no signal."""
    mode = os.fstat(0).st_mode
    if stat.S_ISCHR(mode) and not os.isatty(0):
        return

    def drain() -> None:
        # Not sys.stdin: its lock, held by a daemon thread, breaks the interpreter's end.
        while os.read(0, 4096):
            pass
        stop()

    threading.Thread(target=drain, daemon=True).start()


async def _main(options: argparse.Namespace) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _watch_stdin(lambda: loop.call_soon_threadsafe(stop.set))
    server = (
        FastServer(port=options.port, chunks=options.chunks)
        if options.fast
        else ProviderServer(port=options.port, strict=not options.lenient)
    )
    server.rules = False
    async with server:
        sys.stdout.write(f"{server.origin}\n")
        sys.stdout.flush()
        await stop.wait()


def main() -> None:
    """Serve until stdin closes or SIGTERM; the origin is the first line of output."""
    parser = argparse.ArgumentParser(description="A loopback LLM provider.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="no checks, no records")
    parser.add_argument("--chunks", type=int, default=20, help="events of a stream")
    parser.add_argument("--lenient", action="store_true", help="no checks")
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
