"""What holds whatever comes in: any conversation, path, answer, and any cut of a stream."""

import copy
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipeo_llm import create_adapter
from dipeo_llm.adapters import failures
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import MalformedStreamError
from dipeo_llm.adapters.reading import read_tool_call
from dipeo_llm.adapters.usage import rate_limits, token_usage
from dipeo_llm.domain import ChatResult, StreamChunk
from dipeo_llm.errors import APIKeyError, DiPeOLLMError, LLMServiceError
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.message_formatter import MessageFormatter, has_content
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from dipeo_llm.system_prompt_handler import SystemPromptHandler
from tests import conftest, provider_server
from tests.conftest import HELLO, each_provider
from tests.provider_server import Answer, ProviderServer, Raw, Received

MODELS = {**conftest.MODELS, "responses": "gpt-4.1-nano"}
SECRET = "sk-canary-4xQ9vT7bN2"

# A byte of UTF-8 may be cut off its neighbours, and a separator may look like an end.
words = st.text(max_size=40) | st.sampled_from(
    ["", " ", "é", "a\r\nb\u2028c", "👩‍🚀", "a b c d e f "]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            words | st.sampled_from(["type", "text", "code", "error", "details"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


# --- conversations -----------------------------------------------------------------------

people = st.sampled_from(["me", "you", "system", "ME", ""])
contents = words | st.lists(st.just({"type": "text", "text": "x"}), max_size=2)


@settings(deadline=None)
@given(st.lists(st.tuples(people, contents)), st.none() | words, words)
def test_a_conversation_keeps_its_order_and_its_words(
    talk: list[tuple[str, Any]], prompt: str | None, role: str
) -> None:
    """The prompt is first, mine are the assistant's, and only what is empty is left out."""
    messages = [
        SimpleNamespace(from_person_id=by, to_person_id="me", content=content)
        for by, content in talk
    ]

    formatted = MessageFormatter().format_messages_for_llm(
        messages, "me", prompt, system_role=role
    )

    said = [(by == "me", content) for by, content in talk if has_content(content)]
    first = [{"role": role, "content": prompt}] if (prompt or "").strip() else []
    assert formatted[: len(first)] == first
    rest = formatted[len(first) :]
    assert [(m["role"] == "assistant", m["content"]) for m in rest] == said
    assert {m["role"] for m in rest} <= {"assistant", "user"}


# --- paths of prompts --------------------------------------------------------------------

moves = st.sampled_from(
    [
        "..",
        "../base-2",
        "base-2",
        "base",
        "in",
        "deep",
        "out",
        "link",
        "up",
        "there",
        ".",
    ]
)
names = st.sampled_from(["prompt", "secret", "link"]) | st.sampled_from(
    ["loop", "~", "\0", "", "..", "%2e%2e", "...", "missing"]
)
paths = st.builds(lambda way, name: "/".join([*way, name]), st.lists(moves), names)


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """Make a base folder among others, with links that lead out, in and around."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder).resolve()
        for inside in ["base", "base/in", "base/in/deep"]:
            (top / inside).mkdir()
            (top / inside / "prompt").write_text("INSIDE")
        for outside in [".", "out", "base-2", "out/in"]:
            (top / outside).mkdir(exist_ok=True)
            (top / outside / "prompt").write_text("OUTSIDE")
            (top / outside / "secret").write_text("OUTSIDE")
        (top / "base" / "link").symlink_to(top / "out")
        (top / "base" / "up").symlink_to("..")
        (top / "base" / "in" / "link").symlink_to("../../out/secret")
        (top / "base" / "in" / "up").symlink_to("../in/deep")
        (top / "base" / "loop").symlink_to("loop")
        (top / "out" / "there").symlink_to("../base/in")
        yield top


@settings(max_examples=1_000, deadline=None)
@given(path=paths, start=st.sampled_from(" rb/"))
def test_no_path_of_a_prompt_leads_out_and_each_inside_is_open(
    tree: Path, path: str, start: str
) -> None:
    """What is read lies in the base folder by its real path, and whatever does is read."""
    base = tree / "base"
    path = {"/": "/", " ": "", "r": f"{tree}/", "b": f"{base}/"}[start] + path
    config = SimpleNamespace(prompt_file=path, system_prompt="INLINE")

    found = SystemPromptHandler(base).get_system_prompt(config)

    expected = "INLINE"
    if "\0" not in path and not path.startswith("~"):
        real = Path(os.path.realpath(base / path))
        if real.is_file() and real.is_relative_to(base):
            expected = "INSIDE"
    assert found == expected


# --- errors ------------------------------------------------------------------------------

headers = st.dictionaries(
    st.sampled_from(
        ["Retry-After", "retry-after-ms", "x-request-id", "X-Should-Retry", "x"]
    ),
    words
    | st.sampled_from(["1", "1e999", "nan", "-5", "Wed, 21 Oct 9999 07:28:00 GMT"]),
)
bodies = (
    st.binary(max_size=200)
    | values.map(lambda value: json.dumps(value).encode())
    | values.map(lambda value: json.dumps({"error": value}).encode())
    | st.builds(
        lambda message, details, code: json.dumps(
            {
                "error": {
                    "message": message,
                    "code": code,
                    "type": code,
                    "details": details,
                    "@type": "RetryInfo",
                }
            }
        ).encode(),
        words | st.just(f"wrong key {SECRET}\n\x1b[31m"),
        values | st.just([{"@type": "RetryInfo", "retryDelay": "3s"}]),
        values,
    )
)


@settings(max_examples=500, deadline=None)
@given(status=st.integers(0, 999), headers=headers, body=bodies)
def test_any_answer_makes_an_error_of_ours(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    """It is made without a failure, in one line, without the key, and agrees with itself."""
    error = failures.from_answer(
        status, headers, body, service="openai", model="m", secret=SECRET
    )

    assert isinstance(error, LLMServiceError | APIKeyError)
    assert str(error).isprintable()
    assert SECRET not in str(error) + repr(error) + repr(vars(error))
    assert error.status_code == status
    assert error.retry_after is None or 0 <= error.retry_after < math.inf
    if error.retryable:
        assert headers.get("X-Should-Retry") != "false"
        assert status < 400 or status in {408, 409, 425, 429} or status >= 500


@settings(deadline=None)
@given(headers)
def test_any_limits_are_read_or_passed_over(found: dict[str, str]) -> None:
    """A header of limits that makes no sense is as good as none."""
    told = {
        f"anthropic-ratelimit-{name}-{what}": value
        for (name, what), value in zip(
            [("requests", "remaining"), ("tokens", "reset"), ("tokens", "remaining")],
            found.values(),
            strict=False,
        )
    }

    limits = rate_limits(told)

    assert limits is None or (limits.tokens_reset or 0) >= 0


# --- streams that are cut anywhere -------------------------------------------------------


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a provider's stream, as bytes after the framing of HTTP."""
    api = draw(st.sampled_from(sorted(MODELS)))
    arguments = draw(st.dictionaries(words, words, max_size=2))
    answer = Answer(
        text=draw(words.filter(bool)),
        reasoning=draw(st.none() | words),
        tool_calls=draw(st.sampled_from([(), (("f", arguments), ("g", {}))])),
        finish=draw(st.sampled_from(["stop", "length"])),
        pieces=draw(st.integers(1, 6)),
    )
    ask = provider_server._Ask(api, MODELS[api], stream=True, usage=True)
    data = b"".join(provider_server._stream_events(answer, ask)[0])
    if draw(st.booleans()):
        data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return api, data


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes at places, given as parts of a thousand."""
    places = [0, *sorted(len(data) * cut // 1000 for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def adapter_of(api: str) -> BaseLLMAdapter:
    """Return the adapter that reads a format."""
    provider = "openai" if api == "responses" else api
    adapter = create_adapter(provider, MODELS[api], "k")
    return adapter.sibling(api) if api == "responses" else adapter


def read(api: str, data: list[bytes]) -> tuple[list[StreamChunk], Any, bool]:
    """Read a stream: its chunks, what it is as a whole, and whether it has ended."""
    reader = adapter_of(api).stream_reader()
    chunks = [chunk for piece in data for chunk in reader.feed(piece)]
    chunks += reader.close()
    return chunks, reader.body(), reader.is_ended


thousandths = st.lists(st.integers(0, 1000), max_size=12)


@settings(max_examples=300, deadline=None)
@given(streams(), thousandths)
def test_a_stream_means_the_same_however_it_is_cut(
    stream: tuple[str, bytes], cuts: list[int]
) -> None:
    """The network may cut anywhere, inside a character too."""
    api, data = stream
    whole = read(api, [data])
    single = [data[i : i + 1] for i in range(len(data))]

    assert whole[2]
    assert read(api, pieces(data, cuts)) == whole
    assert read(api, single) == whole


@settings(max_examples=300, deadline=None)
@given(streams(), st.integers(0, 999))
def test_a_stream_that_breaks_off_is_a_beginning_of_the_whole(
    stream: tuple[str, bytes], cut: int
) -> None:
    """Nothing is made up, and it is either seen to be broken or lacks nothing."""
    api, data = stream
    whole, body, _ = read(api, [data])
    reader = adapter_of(api).stream_reader()

    chunks = reader.feed(data[: len(data) * cut // 1000])
    try:
        chunks += reader.close()
    except MalformedStreamError:
        pass
    else:
        if reader.is_ended:
            meant = adapter_of(api).read
            assert meant(reader.body()).text == meant(body).text

    assert chunks == whole[: len(chunks)]


# --- answers of any form -----------------------------------------------------------------


@settings(deadline=None)
@given(st.none() | words, st.none() | words, values | st.just('{"a": ' * 5_000))
def test_any_arguments_make_a_tool_call(
    call_id: str | None, name: str | None, arguments: Any
) -> None:
    """What is no JSON object is kept as text."""
    call = read_tool_call(call_id, name, arguments)

    assert call.arguments is None or isinstance(call.arguments, dict)
    assert isinstance(call.arguments_text, str)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *["prompt_tokens", "completion_tokens", "total_tokens", "input_tokens"],
                *[
                    "output_tokens",
                    "promptTokenCount",
                    "thoughtsTokenCount",
                    "eval_count",
                ],
                *["prompt_tokens_details", "cache_creation_input_tokens"],
            ]
        ),
        values | st.fixed_dictionaries({"cached_tokens": values}),
    )
    | values
)
def test_any_usage_is_counted_or_passed_over(usage: Any) -> None:
    """A record of tokens that makes no sense costs nobody the answer."""
    counted = token_usage(usage)

    assert counted is None or counted.total == counted.input + counted.output


def places(value: Any) -> list[list[Any]]:
    """List the ways to everything inside a value."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [[], *([key, *way] for key, item in inside for way in places(item))]


def broken(value: Any, place: int, by: Any) -> Any:
    """Return a copy of a value with something else in one of its places."""
    ways = places(value)
    way = ways[place % len(ways)]
    if not way:
        return by
    value = copy.deepcopy(value)
    inside = value
    for key in way[:-1]:
        inside = inside[key]
    inside[way[-1]] = by
    return value


def breaking(place: int, by: Any) -> Any:
    """Make a reply in which one place, of any event, is something else."""
    answer = Answer(
        "some text", reasoning="thought", tool_calls=[("f", {"a": 1})], pieces=2
    )

    def reply(asked: Received) -> Raw:
        ask = provider_server._ask(asked)
        assert ask is not None
        server = ProviderServer()
        if not ask.stream:
            body = server._whole(answer, ask).body
            assert isinstance(body, bytes)
            return Raw(body=json.dumps(broken(json.loads(body), place, by)).encode())
        events = provider_server._stream_events(answer, ask)[0]
        number = place % len(events)
        found = re.search(rb"\{.*\}", events[number], re.DOTALL)
        if found:
            other = json.dumps(broken(json.loads(found[0]), place // len(events), by))
            head, tail = events[number][: found.start()], events[number][found.end() :]
            events[number] = head + other.encode() + tail
        kind = provider_server._stream_type(ask.api)
        return Raw(body=b"".join(events), headers={"content-type": kind})

    return reply


@each_provider
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.integers(0, 10_000), by=values, stream=st.booleans())
async def test_an_answer_with_anything_in_any_place_is_a_result_or_an_error_of_ours(
    server: ProviderServer,
    keys: StaticAPIKeys,
    provider: str,
    place: int,
    by: Any,
    stream: bool,
) -> None:
    """No answer of a provider makes an error that the caller does not expect."""
    server.default = breaking(place, by)
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        try:
            if stream:
                async with service.stream(HELLO, MODELS[provider], provider) as chunks:
                    result = await chunks.result()
            else:
                result = await service.complete(HELLO, MODELS[provider], provider)
        except DiPeOLLMError:
            return
    # What is handed out has the types that it says.
    ChatResult.model_validate(result.model_dump())
