"""What compatible servers really send, and what it means in the domain's words.

Each body is one that a server was seen to send; it goes over the loopback, byte for
byte, through the whole library.
"""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    ChatResult,
    ContextWindowError,
    InvalidRequestError,
    LLMInfraService,
    LLMServiceError,
    ServiceUnavailableError,
)
from dipeo_llm.domain import StreamChunk
from tests.conftest import HELLO, MODELS, PROVIDERS
from tests.provider_server import ProviderServer, Raw

# A tool of OpenAI's own leads to its Responses endpoint.
RESPONSES: dict[str, Any] = {"tools": [{"type": "image_generation"}]}


def events(*payloads: Mapping[str, Any] | str) -> Raw:
    """Make a stream of server-sent events; a text goes out as it is."""
    data = "".join(
        f"data: {p if isinstance(p, str) else json.dumps(p)}\n\n" for p in payloads
    )
    return Raw(headers={"content-type": "text/event-stream"}, body=data.encode())


def chat(*choices: Mapping[str, Any]) -> Raw:
    """Make a stream of chat completion chunks with one choice each, and its end mark."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m"}
    return events(*({**head, "choices": [choice]} for choice in choices), "[DONE]")


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """Make a chunk's choice."""
    return {"index": 0, "delta": fields, "finish_reason": finish}


async def streamed(
    service: LLMInfraService, provider: str = "openai", **options: Any
) -> tuple[list[StreamChunk], ChatResult]:
    """Read a stream: its chunks, and its result."""
    asked = (HELLO, MODELS[provider], provider)
    async with service.stream(*asked, **options) as stream:
        return [chunk async for chunk in stream], await stream.result()


# --- tool calls in pieces --------------------------------------------------------------


def fragment(call: Mapping[str, Any]) -> dict[str, Any]:
    """Make a chunk's choice with one piece of a tool call."""
    return delta(tool_calls=[call])


def piece(
    arguments: str, name: str | None = None, **fields: Any
) -> dict[str, dict[str, Any]]:
    """Make a piece of a tool call; the name stands in the first alone."""
    named = {} if name is None else {"name": name}
    return {**fields, "function": {**named, "arguments": arguments}}


ONE, TWO = ("f", {"x": 1}), ("g", {"y": 2})
CALLS: dict[str, tuple[list[Mapping[str, Any]], list[tuple[str, Any]]]] = {
    "as OpenAI does": (
        [
            piece("", "f", index=0, id="a"),
            piece('{"x":', index=0),
            piece("", "g", index=1, id="b"),
            piece("1}", index=0),
            piece('{"y":2}', index=1),
        ],
        [ONE, TWO],
    ),
    # github.com/ollama/ollama/issues/15457
    "whole, all with index 0": (
        [
            piece('{"x":1}', "f", index=0, id="a"),
            piece('{"y":2}', "g", index=0, id="b"),
        ],
        [ONE, TWO],
    ),
    # github.com/InternLM/lmdeploy/issues/3412, of vLLM
    "in pieces, all with index 0": (
        [
            piece("", "f", index=0, id="a"),
            piece('{"x":1}', index=0, id=""),
            piece("", "g", index=0, id="b"),
            piece('{"y":', index=0, id=""),
            piece("2}", index=0, id=""),
        ],
        [ONE, TWO],
    ),
    # The same issue, of SGLang
    "in pieces, all with index 0, each with its id": (
        [
            piece("", "f", index=0, id="0"),
            piece('{"x":1}', index=0, id="0"),
            piece("", "g", index=0, id="1"),
            piece('{"y":2}', index=0, id="1"),
        ],
        [ONE, TWO],
    ),
    # github.com/poolsideai/pool/issues/9
    "an id that changes within a call": (
        [
            piece("", "f", index=0, id="a"),
            piece('{"x":', index=0, id="b"),
            piece("1}", index=0, id="b"),
        ],
        [ONE],
    ),
    "an id that comes late": (
        [piece("", "f", index=0), piece('{"x":1}', "f", index=0, id="a")],
        [ONE],
    ),
    "from 1": ([piece('{"x":1}', "f", index=1, id="a")], [ONE]),
    # github.com/ollama/ollama/issues/7881
    "whole, without an index": (
        [piece('{"x":1}', "f", id="a"), piece('{"y":2}', "g", id="b")],
        [ONE, TWO],
    ),
    "whole, without index and id": (
        [piece('{"x":1}', "f"), piece('{"y":2}', "g")],
        [ONE, TWO],
    ),
    "in pieces, without an index": (
        [
            piece("", "f", id="a"),
            piece('{"x":'),
            piece("1}"),
            piece("", "g", id="b"),
            piece('{"y":2}'),
        ],
        [ONE, TWO],
    ),
    "in pieces, without an index, each with its id and name": (
        [
            piece('{"x":', "f", id="a"),
            piece("1}", "f", id="a"),
            piece('{"y":2}', "g", id="b"),
        ],
        [ONE, TWO],
    ),
    "without an index, the id before the name": (
        [piece('{"x":1}', "f", id="a"), piece("", id="b"), piece('{"y":2}', "g", id="b")],
        [ONE, TWO],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
async def test_tool_calls_in_pieces(
    kind: str, server: ProviderServer, direct: LLMInfraService
) -> None:
    """Each call is put together of its own pieces, in the result and in the chunks."""
    pieces, wanted = CALLS[kind]
    server.reply(chat(*map(fragment, pieces), delta("tool_calls")))

    chunks, result = await streamed(direct)

    assert [(call.name, call.arguments) for call in result.tool_calls] == wanted
    told: dict[int, list[Any]] = {}
    for tool_call in (chunk.tool_call for chunk in chunks):
        assert tool_call is not None
        kept = told.setdefault(tool_call.index, [set(), "", ""])
        kept[0] |= {tool_call.id} - {None}
        kept[1] = tool_call.name or kept[1]
        kept[2] += tool_call.arguments
    assert list(told) == list(range(len(wanted)))
    for (ids, *rest), call in zip(told.values(), result.tool_calls, strict=True):
        assert rest == [call.name, call.arguments_text]
        assert ids <= {call.id}


# --- text and thoughts -----------------------------------------------------------------


async def test_a_thought_under_two_names(
    server: ProviderServer, direct: LLMInfraService
) -> None:
    """A thought that is told as reasoning and as reasoning_content comes once."""
    server.reply(
        chat(
            delta(reasoning="I thi", reasoning_content="I thi"),
            delta(reasoning="nk", reasoning_content="nk"),
            delta("stop", content="so"),
        )
    )

    chunks, result = await streamed(direct)

    assert "".join(chunk.reasoning for chunk in chunks) == "I think"
    assert (result.reasoning, result.text) == ("I think", "so")


TEXTS: dict[str, list[dict[str, Any]]] = {
    "message in place of delta": [
        {"index": 0, "message": {"content": "Hel"}},
        {"index": 0, "message": {"content": "lo"}, "finish_reason": "stop"},
    ],
    "a null in place of delta": [
        {"index": 0, "delta": None, "message": {"content": "Hello"}},
        {"index": 0, "delta": None, "finish_reason": "stop"},
    ],
    "a message beside the delta": [
        delta(content="Hel") | {"message": {"content": "Hel"}},
        delta(content="lo") | {"message": {"content": "Hello"}},
        delta("stop") | {"message": {"content": "Hello"}},
    ],
    "a list of parts": [
        delta(content=[{"type": "text", "text": "Hel"}]),
        delta("stop", content=[{"type": "text", "text": "lo"}]),
    ],
}


@pytest.mark.parametrize("kind", TEXTS)
async def test_text_in_other_shapes(
    kind: str, server: ProviderServer, direct: LLMInfraService
) -> None:
    """Text is read wherever a compatible server puts it."""
    server.reply(chat(*TEXTS[kind]))

    chunks, result = await streamed(direct)

    assert "".join(chunk.text for chunk in chunks) == result.text == "Hello"
    assert result.finish_reason == "stop"


async def test_a_choice_that_was_filtered_whole(
    server: ProviderServer, direct: LLMInfraService
) -> None:
    """Azure's choice without a message is an answer that was filtered."""
    filtered = {"index": 0, "finish_reason": "content_filter"}
    body = {"id": "chatcmpl-1", "model": "m", "choices": [filtered]}
    server.reply(Raw(body=json.dumps(body).encode()))

    result = await direct.complete(HELLO, MODELS["openai"], "openai")

    assert (result.text, result.finish_reason) == ("", "content_filter")
    assert len(server.requests) == 1


# --- Gemini's ends -----------------------------------------------------------------------

# https://ai.google.dev/api/generate-content#FinishReason, and Vertex's MODEL_ARMOR
ENDS = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    **dict.fromkeys(
        (
            *("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT"),
            *("SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
            "MODEL_ARMOR",
        ),
        "content_filter",
    ),
    **{
        reason: reason.lower()
        for reason in (
            *("OTHER", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "NO_IMAGE"),
            *("TOO_MANY_TOOL_CALLS", "MALFORMED_RESPONSE", "IMAGE_OTHER"),
            *("MISSING_THOUGHT_SIGNATURE", "A_REASON_OF_2027"),
        )
    },
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("reason", ENDS)
async def test_how_gemini_ends(
    reason: str, stream: bool, server: ProviderServer, direct: LLMInfraService
) -> None:
    """Only STOP is a clean end; what has no word of ours keeps its own."""
    content = {"role": "model", "parts": [{"text": "Well"}]}
    candidate = {"index": 0, "content": content, "finishReason": reason}
    body = {"candidates": [candidate], "modelVersion": "gemini-2.5-flash"}
    if stream:
        server.reply(events(body))
        _, result = await streamed(direct, "google")
    else:
        server.reply(Raw(body=json.dumps(body).encode()))
        result = await direct.complete(HELLO, MODELS["google"], "google")

    assert (result.text, result.finish_reason) == ("Well", ENDS[reason])
    assert bool(result.refusal) is (ENDS[reason] == "content_filter")


# --- errors in place of answers --------------------------------------------------------

TOO_LONG = (
    "Your input exceeds the context window of this model. Please adjust your input and"
    " try again."
)


def failed(**error: Any) -> dict[str, Any]:
    """Make a response of OpenAI's that has failed."""
    told = error or None
    return {"id": "resp_1", "object": "response", "status": "failed", "error": told}


# github.com/openai/codex/pull/4675
TOLD = {"code": "context_length_exceeded", "message": TOO_LONG}
RESPONSES_STREAMS: dict[str, tuple[dict[str, Any], type[LLMServiceError]]] = {
    "failed": (
        {"type": "response.failed", "response": failed(**TOLD)},
        ContextWindowError,
    ),
    "flat": (
        {"type": "error", **TOLD, "param": None, "sequence_number": 2},
        ContextWindowError,
    ),
    "failed, without a word why": (
        {"type": "response.failed", "response": failed()},
        ServiceUnavailableError,
    ),
    "failed, as if it were complete": (
        {"type": "response.completed", "response": {**failed(**TOLD), "output": []}},
        ContextWindowError,
    ),
    "of an image": (
        {
            "type": "response.failed",
            "response": failed(code="invalid_image_url", message="Not an image."),
        },
        InvalidRequestError,
    ),
}


@pytest.mark.parametrize("kind", RESPONSES_STREAMS)
async def test_a_responses_stream_that_fails(
    kind: str, server: ProviderServer, direct: LLMInfraService
) -> None:
    """What has failed for good is not taken for a fault of the server's."""
    event, cls = RESPONSES_STREAMS[kind]
    server.reply(events(event))

    with pytest.raises(LLMServiceError) as caught:
        await streamed(direct, **RESPONSES)

    assert type(caught.value) is cls
    assert caught.value.retryable is (cls is ServiceUnavailableError)
    assert caught.value.status_code == 200


@pytest.mark.parametrize(
    ("body", "cls"),
    [
        (failed(**TOLD), ContextWindowError),
        (failed(), ServiceUnavailableError),
        ({**failed(), "status": "cancelled"}, LLMServiceError),
    ],
)
async def test_a_response_that_has_failed(
    body: dict[str, Any],
    cls: type[LLMServiceError],
    server: ProviderServer,
    direct: LLMInfraService,
) -> None:
    """A whole response that has failed or was cancelled is never a success."""
    server.reply(Raw(body=json.dumps({**body, "output": []}).encode()))

    with pytest.raises(LLMServiceError) as caught:
        await direct.complete(HELLO, MODELS["openai"], "openai", **RESPONSES)

    assert type(caught.value) is cls
    assert caught.value.retryable is (cls is ServiceUnavailableError)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_error_in_a_choice(
    stream: bool, server: ProviderServer, direct: LLMInfraService
) -> None:
    """OpenRouter's error after the first word is no answer with nothing in it."""
    error = {"code": 502, "message": "Upstream error from Novita: gone"}
    choice = {"index": 0, "finish_reason": "error", "error": error}
    if stream:
        server.reply(chat({**choice, "delta": {"content": ""}}))
    else:
        body = {"id": "gen-1", "choices": [{**choice, "message": {"content": ""}}]}
        server.reply(Raw(body=json.dumps(body).encode()))

    asked = (HELLO, MODELS["openai"], "openai")
    call = streamed(direct) if stream else direct.complete(*asked)
    with pytest.raises(ServiceUnavailableError, match="Upstream error from Novita"):
        await call


# github.com/ggml-org/llama.cpp/pull/16109
LLAMA = (
    b'error: {"code":400,"message":"the request exceeds the available context size. try'
    b' increasing the context size or enable context shift","type":'
    b'"invalid_request_error"}\n\ndata: [DONE]\n\n'
)


async def test_an_error_as_a_field_of_its_own(
    server: ProviderServer, direct: LLMInfraService
) -> None:
    """llama.cpp's line "error:" is the error that it says."""
    server.reply(Raw(headers={"content-type": "text/event-stream"}, body=LLAMA))

    with pytest.raises(ContextWindowError, match="available context size"):
        await streamed(direct)


ERRORS: dict[str, tuple[str, bytes, type[LLMServiceError]]] = {
    # github.com/lmstudio-ai/lmstudio-bug-tracker/issues/2322
    "LM Studio": (
        "openai",
        (
            b'event: error\ndata: {"error":{"message":"The number of tokens to keep from the'
            b" initial prompt is greater than the context length. Try to load the model with"
            b' a larger context length, or provide a shorter input"}}\n\n'
        ),
        ContextWindowError,
    ),
    "LM Studio, a text": (
        "openai",
        b'event: error\ndata: {"error":"Context size has been exceeded."}\n\n',
        ContextWindowError,
    ),
    "Ollama": (
        "ollama",
        b'{"error":"the input length exceeds the context length"}\n',
        ContextWindowError,
    ),
    "OpenAI": (
        "openai",
        b'data: {"error":{"message":"The server had an error","type":"server_error"}}\n\n',
        ServiceUnavailableError,
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
async def test_an_error_for_an_event(
    kind: str, server: ProviderServer, direct: LLMInfraService
) -> None:
    """What a stream says in place of an answer is told by its words too."""
    provider, body, cls = ERRORS[kind]
    server.reply(Raw(headers={"content-type": "text/event-stream"}, body=body))

    with pytest.raises(LLMServiceError) as caught:
        await streamed(direct, provider)

    assert type(caught.value) is cls
    assert caught.value.retryable is (cls is ServiceUnavailableError)


BAD = {"error": {"message": "bad", "code": 401}}
JSON_FOR_EVENTS = {
    "compact": json.dumps(BAD).encode(),
    "a line": json.dumps(BAD).encode() + b"\r\n",
    "pretty": json.dumps(BAD, indent=2).encode(),
    "pretty, with an end": json.dumps(BAD, indent=2).encode() + b"\n",
    "before the end mark": json.dumps(BAD).encode() + b"\n\ndata: [DONE]\n\n",
    "after a comment": b": processing\n\n" + json.dumps(BAD, indent=2).encode(),
}


@pytest.mark.parametrize("kind", JSON_FOR_EVENTS)
@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p != "ollama"])
async def test_an_error_as_json_in_place_of_a_stream(
    provider: str, kind: str, server: ProviderServer, direct: LLMInfraService
) -> None:
    """An error that comes as JSON with 200, in however many pieces, is that error."""
    body = JSON_FOR_EVENTS[kind]
    server.reply(Raw(body=[body[:9], body[9:20], body[20:]], framing="chunked"))

    with pytest.raises(APIKeyError, match="bad") as caught:
        await streamed(direct, provider)

    assert caught.value.status_code == 200


WHOLE = {
    "id": "x",
    "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
}


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(WHOLE).encode(),
        json.dumps(WHOLE, indent=2).encode(),
        json.dumps(WHOLE).encode() + b"\n" + json.dumps(BAD).encode(),
        json.dumps(BAD, indent=2).encode()[:-3],
        b'data: {"choices": []}\n\n' + json.dumps(BAD).encode(),
    ],
    ids=["whole", "pretty", "lines", "cut", "later"],
)
async def test_json_in_place_of_a_stream_that_is_no_error(
    body: bytes, server: ProviderServer, direct: LLMInfraService
) -> None:
    """Any other JSON is no stream, nor is it one after an event."""
    server.reply(Raw(headers={"content-type": "text/event-stream"}, body=body))

    with pytest.raises(LLMServiceError, match="invalid event"):
        await streamed(direct)
