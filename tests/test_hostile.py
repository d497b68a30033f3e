"""A provider, or who stands in for one, that means harm: what it sends stays bounded.

Bodies without end, lines without end, bombs, depth, and masses of small things. A call
ends in an error of ours or in a result, takes little memory, and keeps the event loop
for seconds at most. What is tested elsewhere: redirects (test_fault_matrix), TLS and the
environment (test_environment), control characters on a terminal (test_cli).
"""

import asyncio
import gzip
import json
import os
import re
import shutil
import subprocess
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import pytest

from dipeo_llm.adapters import failures
from dipeo_llm.adapters.events import EventLines
from dipeo_llm.domain import ChatResult
from dipeo_llm.errors import (
    DiPeOLLMError,
    LLMServiceError,
    ServiceUnavailableError,
    StreamInterruptedError,
)
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.litellm_import import load_litellm
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from dipeo_llm.testing import cassette_file
from dipeo_llm.testing.cassette_file import CassetteError
from tests import provider_server
from tests.conftest import HELLO, MODELS, each_provider
from tests.provider_server import Answer, ProviderServer, Raw, Received

MIB = 1024 * 1024
# Far above what a call takes, far below what is sent.
LITTLE = 128 * MIB

each_way = pytest.mark.parametrize("stream", [False, True], ids=["call", "stream"])


class Repeated(Sequence[bytes]):
    """The same bytes again and again; counts how often they were taken."""

    def __init__(self, piece: bytes, times: int, first: bytes = b"") -> None:
        self._piece = piece
        self._times = times
        self._first = first
        self.taken = 0

    def __len__(self) -> int:
        return self._times

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        """Return the piece."""
        return self._piece

    def __iter__(self) -> Iterator[bytes]:
        self.taken = 0
        yield self._first or self._piece
        for _ in range(1, self._times):
            self.taken += 1
            yield self._piece


async def ask(
    keys: StaticAPIKeys, provider: str, *, stream: bool, **options: Any
) -> ChatResult:
    """Make a call or read a stream, with one retry at hand."""
    made = {"max_retries": 1, "retry_wait": 0.01, "timeout": 60.0, **options}
    async with LLMInfraService(keys, settings=Settings(**made)) as service:
        await service.initialize()
        if not stream:
            return await service.complete(HELLO, MODELS[provider], provider)
        async with service.stream(HELLO, MODELS[provider], provider) as chunks:
            return await chunks.result()


async def lag(during: asyncio.Task[Any]) -> float:
    """Return the longest time in seconds that the loop stood still under a task."""
    longest, before = 0.0, time.monotonic()
    while not during.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    return longest


def beginning(provider: str, *, stream: bool) -> bytes:
    """Return the bytes with which a good answer begins, up to the middle of its text."""
    ask = provider_server._Ask(provider, MODELS[provider], stream=stream, usage=True)
    if not stream:
        body = ProviderServer()._whole(Answer("MARK"), ask).body
        assert isinstance(body, bytes)
        return body[: body.index(b"MARK")]
    events = provider_server._stream_events(Answer("one two", pieces=2), ask)[0]
    told = {"anthropic": 4, "google": 1}.get(provider, 2)
    return b"".join(events[:told])


def stream_type(provider: str) -> dict[str, str]:
    """Return the content type of a provider's stream."""
    return {"content-type": provider_server._stream_type(provider)}


# --- without end -------------------------------------------------------------------------


@pytest.mark.parametrize("endless", [b"x", b"\n"])
@each_way
@each_provider
async def test_a_body_of_a_gigabyte_is_left_early(
    server: ProviderServer,
    keys: StaticAPIKeys,
    provider: str,
    stream: bool,
    endless: bytes,
) -> None:
    """At the limit the connection closes; the call is not tried again."""
    body = Repeated(endless * 65536, 16_384, beginning(provider, stream=stream))
    await load_litellm()
    server.default = Raw(
        body=body,
        headers=stream_type(provider) if stream else {},
        framing="chunked",
    )
    tracemalloc.start()

    with pytest.raises(LLMServiceError) as caught:
        await ask(keys, provider, stream=stream, max_response_bytes=MIB)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not caught.value.retryable
    assert isinstance(caught.value, ServiceUnavailableError | StreamInterruptedError)
    assert "longer than 1048576 bytes" in str(caught.value)
    assert len(server.requests) == 1
    assert body.taken * 65536 < LITTLE
    assert peak < LITTLE


@each_provider
async def test_a_stream_of_good_chunks_without_end_is_left_at_the_limit(
    server: ProviderServer, keys: StaticAPIKeys, provider: str
) -> None:
    """A model that never stops costs the limit and no more; its text is kept."""
    ask_for = provider_server._Ask(provider, MODELS[provider], stream=True, usage=True)
    events = provider_server._stream_events(Answer("word " * 40, pieces=40), ask_for)[0]
    piece = b"".join(events[10:20])
    body = Repeated(piece, 200_000, b"".join(events[:10]))
    server.default = Raw(body=body, headers=stream_type(provider), framing="chunked")

    with pytest.raises(StreamInterruptedError, match="longer than") as caught:
        await ask(keys, provider, stream=True, max_response_bytes=MIB)

    assert caught.value.partial_text.startswith("word word ")
    assert len(server.requests) == 1


@each_provider
async def test_a_stream_that_only_says_it_is_there_ends_in_time(
    server: ProviderServer, keys: StaticAPIKeys, provider: str
) -> None:
    """Signs of life are no chunks: the limit of time holds."""
    piece = b"\n" if provider == "ollama" else b": still there\n\n"
    server.default = Raw(
        body=[piece] * 10_000,
        headers=stream_type(provider),
        framing="chunked",
        piece_delay=0.01,
    )

    with pytest.raises(DiPeOLLMError, match="did not answer within"):
        await ask(keys, provider, stream=True, timeout=0.3, max_retries=0)


@pytest.mark.parametrize("sse", [True, False])
def test_a_line_that_does_not_end_is_read_in_one_pass(sse: bool) -> None:
    """Each byte is looked at once, however small the pieces that it comes in."""
    lines = EventLines(sse=sse)
    piece = b"x" * 1024
    began = time.process_time()

    assert lines.feed(b"data: ") == []
    for _ in range(16 * 1024):
        assert lines.feed(piece) == []
    (payload,) = lines.feed(b"\n\n")

    # Copied anew for each piece it would be minutes.
    assert len(payload) >= 16 * MIB
    assert time.process_time() - began < 10


# --- compressed --------------------------------------------------------------------------


def bomb(size: int, wbits: int) -> bytes:
    """Compress zeros."""
    packer = zlib.compressobj(9, wbits=wbits)
    zeros = bytes(MIB)
    return b"".join(packer.compress(zeros) for _ in range(size // MIB)) + packer.flush()


@each_way
@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("deflate", 15)])
async def test_a_bomb_does_not_go_off(
    server: ProviderServer,
    keys: StaticAPIKeys,
    encoding: str,
    wbits: int,
    stream: bool,
) -> None:
    """A small body that unpacks to a huge one counts as what it unpacks to."""
    server.default = Raw(
        body=bomb(256 * MIB, wbits),
        headers={"content-encoding": encoding, **stream_type("openai")},
    )
    await load_litellm()
    tracemalloc.start()

    with pytest.raises(ServiceUnavailableError) as caught:
        await ask(keys, "openai", stream=stream, max_response_bytes=MIB)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not caught.value.retryable
    assert peak < LITTLE


async def test_a_body_that_is_compressed_well_is_read(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Only what is too long is refused."""
    ask_for = provider_server._Ask("openai", MODELS["openai"])
    body = server._whole(Answer("x" * 100_000), ask_for).body
    assert isinstance(body, bytes)
    server.default = Raw(body=gzip.compress(body), headers={"content-encoding": "gzip"})

    result = await ask(keys, "openai", stream=False, max_response_bytes=MIB)

    assert result.text == "x" * 100_000


# --- deep, wide, long --------------------------------------------------------------------

# Around the depth at which a parser, a printer and a reader of Python give up.
DEPTHS = [50, *range(300, 1_000, 20), 3_000, 9_000, 100_000]


def replaced(answer: Answer, by: bytes) -> Callable[[Received], Raw]:
    """Reply with an answer in which every "MARK", quoted, is something else."""

    def reply(asked: Received) -> Raw:
        ask_for = provider_server._ask(asked)
        assert ask_for is not None
        if asked.stream:
            body = b"".join(provider_server._stream_events(answer, ask_for)[0])
            kind = provider_server._stream_type(ask_for.api)
        else:
            whole = ProviderServer()._whole(answer, ask_for).body
            assert isinstance(whole, bytes)
            body, kind = whole, "application/json"
        return Raw(body=body.replace(b'"MARK"', by), headers={"content-type": kind})

    return reply


@each_way
@each_provider
@pytest.mark.parametrize(
    "answer",
    [
        Answer("MARK", pieces=1),
        Answer(tool_calls=[("f", {"a": "MARK"})]),
        Answer(tool_calls=[("f", '{"a": "MARK"}')]),
        Answer(model="MARK"),
    ],
    ids=["text", "arguments", "arguments-text", "model"],
)
async def test_json_of_any_depth_is_a_result_or_an_error_of_ours(
    server: ProviderServer,
    keys: StaticAPIKeys,
    provider: str,
    stream: bool,
    answer: Answer,
) -> None:
    """No RecursionError comes out, and the process lives."""
    async with LLMInfraService(keys, settings=Settings(max_retries=0)) as service:
        for depth in DEPTHS:
            for opened, closed in ((b"[", b"]"), (b'{"a":', b"}")):
                by = opened * depth + b"1" + closed * depth
                server.default = replaced(answer, by)
                try:
                    if stream:
                        async with service.stream(
                            HELLO, MODELS[provider], provider
                        ) as chunks:
                            await chunks.result()
                    else:
                        await service.complete(HELLO, MODELS[provider], provider)
                except DiPeOLLMError:
                    pass


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    "error",
    [
        b"%s",
        b'{"error": %s}',
        b'{"error": {"message": "m", "type": %s}}',
        b'{"error": {"code": %s, "details": [{"reason": %s}]}}',
        b'{"request_id": %s}',
    ],
)
def test_an_error_of_any_depth_is_an_error_of_ours(depth: int, error: bytes) -> None:
    """Nor do the words of a refusal do harm."""
    deep = b"[" * depth + b"]" * depth
    body = error.replace(b"%s", deep)

    found = failures.from_answer(400, {}, body, service="openai")

    assert found.status_code == 400


@each_way
@each_provider
async def test_ten_thousand_tool_calls_are_read(
    server: ProviderServer, keys: StaticAPIKeys, provider: str, stream: bool
) -> None:
    """They take time in proportion, and each is there."""
    server.default = Answer(tool_calls=[("f", {"a": 1})] * 10_000)

    task = asyncio.create_task(ask(keys, provider, stream=stream))
    longest = await lag(task)

    assert len(task.result().tool_calls) == 10_000
    assert longest < 5


async def test_a_stream_of_many_choices_takes_time_in_proportion(
    server: ProviderServer, keys: StaticAPIKeys
) -> None:
    """Choices that nobody asked for do not hold up the loop."""
    events = [
        {
            "id": "c",
            "choices": [
                {"index": i, "delta": {"content": "x"}, "finish_reason": "stop"}
                for i in range(first, first + 100)
            ],
        }
        for first in range(0, 20_000, 100)
    ]
    data = b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events)
    server.default = Raw(body=data + b"data: [DONE]\n\n", headers=stream_type("openai"))

    task = asyncio.create_task(ask(keys, "openai", stream=True))
    longest = await lag(task)

    assert len(task.result().texts) == 20_000
    assert longest < 5


@pytest.mark.parametrize("status", [200, 400, 503])
async def test_a_long_word_of_refusal_is_cut_short(
    server: ProviderServer, keys: StaticAPIKeys, status: int
) -> None:
    """An error of 30 MiB is a line in a log, and holds up the loop for a moment only."""
    said = json.dumps({"error": {"message": "\x1b[31m no \n" * 3 * MIB, "type": "x"}})
    server.default = Raw(status, body=said.encode())

    task = asyncio.create_task(ask(keys, "openai", stream=False, max_retries=0))
    longest = await lag(task)

    error = task.exception()
    assert isinstance(error, DiPeOLLMError)
    assert len(str(error)) < 1_000
    assert str(error).isprintable()
    assert longest < 3


# --- heads -------------------------------------------------------------------------------

HEADS: dict[str, dict[str, str]] = {
    "a long header": {"x-request-id": "x" * MIB},
    "many headers": {f"x-{number}": "x" for number in range(20_000)},
    "a long reason to wait": {"retry-after": "1" * 8_000},
}


@each_way
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
async def test_a_head_of_any_size_is_a_result_or_an_error_of_ours(
    server: ProviderServer,
    keys: StaticAPIKeys,
    stream: bool,
    head: dict[str, str],
) -> None:
    """What is too long for HTTP is no answer."""
    server.default = Answer(headers=head)
    try:
        result = await ask(keys, "openai", stream=stream, max_retries=0)
    except ServiceUnavailableError as error:
        said = str(error)
    else:
        said = result.text

    assert said
    assert len(said) < 2_000


@each_way
@each_provider
async def test_half_a_character_is_a_result_or_an_error_of_ours(
    server: ProviderServer, keys: StaticAPIKeys, provider: str, stream: bool
) -> None:
    """JSON can spell what no text can hold."""
    server.default = replaced(Answer("MARK", pieces=1), b'"\\ud83d"')
    try:
        result = await ask(keys, provider, stream=stream, max_retries=0)
    except DiPeOLLMError as error:
        said = str(error)
    else:
        said = result.text

    assert said.encode()


# --- files -------------------------------------------------------------------------------


def test_a_cassette_runs_no_code(tmp_path: Path) -> None:
    """A recording from a stranger is data, whatever its YAML says."""
    proof = tmp_path / "ran"
    cassette = tmp_path / "evil.yaml"
    cassette.write_text(
        f"interactions:\n- !!python/object/apply:os.mkdir ['{proof}']\nversion: 1\n"
    )

    with pytest.raises(CassetteError, match="no cassette"):
        cassette_file.read(cassette)

    assert not proof.exists()


@pytest.mark.skipif(shutil.which("grep") is None, reason="a system without grep")
def test_the_command_of_the_page_finds_files_that_python_would_run(
    tmp_path: Path,
) -> None:
    """docs/security.md tells how to look for what LiteLLM 1.82.8 left behind."""
    page = Path(__file__).parent.parent / "docs" / "security.md"
    (command,) = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "litellm_init.pth").write_text("import os; os.system('harm')\n")
    (packages / "tabbed.pth").write_text("/some/folder\nimport\tos\n")
    (packages / "editable.pth").write_text("/some/folder\nimportant\n# import os\n")

    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    lines = [line.removeprefix(f"{packages}/") for line in done.stdout.splitlines()]
    assert sorted(lines) == [
        "litellm_init.pth:1:import os; os.system('harm')",
        "tabbed.pth:2:import\tos",
    ]
