"""Many calls: `complete_many`, and the command `dipeo-llm batch`."""

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import (
    APIKeyError,
    InvalidRequestError,
    LLMInfraService,
    PersonLLMConfig,
    QuotaExceededError,
)
from dipeo_llm.cli import main
from tests.conftest import PROVIDERS
from tests.provider_server import Answer, ProviderServer, Received, Reply, error
from tests.redis_server import RedisServer, needs_redis
from tests.test_cache import open_cached

MODEL = "gpt-4.1-nano"


def row(text: str = "Hello", **options: Any) -> dict[str, Any]:
    """Return the keywords of a call."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "model": MODEL, "api_key_id": "openai", **options}


def asked(received: Received) -> str:
    """Return the last message of a request."""
    text: str = received.json["messages"][-1]["content"]
    return text


def echo(received: Received) -> Answer:
    """Answer with the question."""
    return Answer(asked(received))


async def test_results_come_in_order(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Slow calls do not change the order, and never more than allowed are in flight."""

    def slow_first(received: Received) -> Answer:
        number = int(asked(received))
        return Answer(f"{number}", delay=0.1 if number % 5 == 0 else 0.01)

    server.default = slow_first
    rows = (row(f"{n}") for n in range(40))
    batch = service.complete_many(rows, concurrency=6)
    items = [item async for item in batch]
    assert [item.index for item in items] == list(range(40))
    assert [item.result.text for item in items if item.result] == [
        f"{n}" for n in range(40)
    ]
    assert server.max_in_flight <= 6
    assert batch.totals.succeeded == batch.totals.attempts == 40
    assert batch.totals.tokens.total == 40 * 17
    assert batch.totals.cost_usd > 0


async def test_results_come_as_they_end(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Without an order the slow one comes last."""
    server.default = lambda r: Answer(asked(r), delay=0.3 if asked(r) == "0" else 0)
    rows = [row(f"{n}") for n in range(5)]
    items = [i async for i in service.complete_many(rows, ordered=False)]
    assert sorted(item.index for item in items) == [0, 1, 2, 3, 4]
    assert items[-1].index == 0


async def test_one_bad_request_is_one_error(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """The others are answered; the error is the item's."""
    server.default = echo
    config = PersonLLMConfig(service="openai", model=MODEL, api_key_id="openai")
    rows = [
        row("a"),
        row("b", temperature=-1),
        row("c", temprature=1),
        {"person_messages": [], "person_id": "x", "llm_config": config},
        "not a mapping",
        row("d"),
    ]
    batch = service.complete_many(rows)  # type: ignore[arg-type]
    items = [item async for item in batch]
    kinds = [type(item.error) for item in items]
    assert kinds == [
        *(type(None), InvalidRequestError, TypeError),
        *(InvalidRequestError, TypeError, type(None)),
    ]
    assert (batch.totals.succeeded, batch.totals.failed) == (2, 4)


FATAL: dict[str, tuple[Reply, type[Exception]]] = {
    "key": (error("openai", 401), APIKeyError),
    "quota": (error("openai", 429, code="insufficient_quota"), QuotaExceededError),
}


@pytest.mark.parametrize(("reply", "kind"), FATAL.values(), ids=FATAL)
async def test_a_fatal_error_ends_the_batch(
    server: ProviderServer,
    service: LLMInfraService,
    reply: Reply,
    kind: type[Exception],
) -> None:
    """Nothing is started after it; what was in flight is yielded first."""

    def fail(received: Received) -> Any:
        if asked(received) == "3":
            return reply
        return Answer(asked(received), delay=0.1)

    server.default = fail
    batch = service.complete_many((row(f"{n}") for n in range(1000)), concurrency=4)
    items: list[Any] = []

    async def collect() -> None:
        async for item in batch:
            items.append(item)  # noqa: PERF401 - the iterator raises

    with pytest.raises(kind):
        await collect()
    assert [i.index for i in items] == [n for n in range(len(items) + 1) if n != 3]
    assert len(server.requests) <= 8


async def test_input_is_read_as_work_goes_on(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Of a million rows few are read, and a slow reader slows the work down."""
    read = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal read
        for number in range(1_000_000):
            read += 1
            yield row(f"{number}")

    async with service.complete_many(rows(), concurrency=4) as batch:
        for _ in range(10):
            await anext(batch)
            await asyncio.sleep(0.02)
        assert read <= 10 + 4 * 4
    assert server.in_flight == 0


async def test_an_async_input_and_an_early_end(
    service: LLMInfraService, server: ProviderServer
) -> None:
    """Results do not wait for the next row; leaving cancels the calls in flight."""
    ended = False

    async def rows() -> AsyncIterator[dict[str, Any]]:
        nonlocal ended
        try:
            for number in range(3):
                yield row(f"{number}")
            await asyncio.sleep(60)
        finally:
            ended = True

    async with service.complete_many(rows(), concurrency=8) as batch:
        assert [(await anext(batch)).index for _ in range(3)] == [0, 1, 2]
        left = asyncio.create_task(anext(batch))
        await asyncio.sleep(0.05)
        assert not left.done()
        left.cancel()
    assert ended
    server.default = Answer(delay=30)
    async with service.complete_many([row()]) as batch:
        waiting = asyncio.ensure_future(anext(batch))
        while not server.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
    while server.in_flight:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_a_source_that_fails(service: LLMInfraService) -> None:
    """An error of the input is raised to the reader."""

    def rows() -> Iterator[dict[str, Any]]:
        yield row()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        [item async for item in service.complete_many(rows())]
    with pytest.raises(ValueError, match="at least 1"):
        service.complete_many([], concurrency=0)
    assert [item async for item in service.complete_many([])] == []


async def test_one_prompt_many_times_is_sampling(server: ProviderServer) -> None:
    """Equal requests are answers of their own, and the same ones in the next run."""
    numbers = iter(range(100))
    server.default = lambda _: Answer(f"{next(numbers)}", delay=0.02)
    async with open_cached(server) as service:

        async def run() -> list[str]:
            rows = [row(temperature=1)] * 6 + [row(temperature=1, sample=2)]
            batch = service.complete_many(rows, concurrency=6)
            return [item.result.text async for item in batch if item.result]

        first, second = await run(), await run()
    assert first == second
    assert len(set(first[:6])) == 6
    assert first[6] == first[2]
    assert len(server.requests) == 6


# The command.


@pytest.fixture
def environment(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Set what a user sets, and go to an empty folder."""
    for provider in PROVIDERS:
        name = f"DIPEO_LLM_{provider.upper()}_BASE_URL"
        monkeypatch.setenv(name, server.base_url(provider))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)


Run = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], environment: None) -> Run:
    """Run the command in this process; give its exit code and complaints."""

    async def running(*argv: str) -> tuple[int, str]:
        command = ["batch", "in.jsonl", "out.jsonl", "--model", MODEL, *argv]
        code = await asyncio.to_thread(main, command)
        return code, capsys.readouterr().err

    return running


def write(*rows: Any, end: str = "\n") -> None:
    """Write the input: rows, or lines as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    Path("in.jsonl").write_text("\n".join(lines) + end, encoding="utf-8", newline="")


def output() -> list[dict[str, Any]]:
    """Read the output."""
    lines = Path("out.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def ids() -> list[Any]:
    """Return the ids of the output, sorted by their text."""
    return sorted((found["id"] for found in output()), key=str)


async def test_a_file_is_answered(run: Run, server: ProviderServer) -> None:
    """Each line has its id or its number, and what the call said."""
    server.default = echo
    write(
        {"id": "a", "prompt": "one"},
        "",
        {"messages": [{"role": "user", "content": "two"}], "temperature": 0.5},
        {"id": 7, "prompt": "three", "model": "gpt-4.1-mini"},
        end="",
    )
    code, said = await run("--system", "Be brief.", "--max-tokens", "9")
    assert (code, "3 answered, 0 failed, 0 left" in said) == (0, True)
    found = {r["id"]: r["result"] for r in output()}
    assert {k: v["text"] for k, v in found.items()} == {
        "a": "one",
        3: "two",
        7: "three",
    }
    assert found["a"]["cost_usd"] > 0
    sent = {asked(r): r.json for r in server.requests}
    assert sent["two"]["temperature"] == 0.5
    assert sent["three"]["model"] == "gpt-4.1-mini"
    assert {r["max_tokens"] for r in sent.values()} == {9}
    assert {r["messages"][0]["content"] for r in sent.values()} == {"Be brief."}


async def test_a_second_run_asks_nothing_twice(
    run: Run, server: ProviderServer
) -> None:
    """What has a line is done; equal prompts are rows of their own."""
    write(*({"prompt": "the same"} for _ in range(3)))
    assert (await run())[0] == 0
    assert ids() == [1, 2, 3]
    assert (await run())[0] == 0
    assert len(server.requests) == 3


async def test_only_lf_ends_a_line(run: Run, server: ProviderServer) -> None:
    """Other line breaks in a prompt or an answer break nothing."""
    text = "a\u2028b\u2029c\u0085d\x0be\x1cf"
    server.default = Answer(text)
    write(json.dumps({"prompt": text}, ensure_ascii=False), {"prompt": "x"})
    assert (await run())[0] == 0
    assert (await run())[0] == 0
    assert len(server.requests) == 2
    assert {r["result"]["text"] for r in output()} == {text}
    assert len(Path("out.jsonl").read_text("utf-8").splitlines()) == 2


async def test_a_torn_line_is_asked_again(run: Run, server: ProviderServer) -> None:
    """The last line of a killed run is dropped, and only its row is run again."""
    write(*({"prompt": f"{n}"} for n in range(4)))
    await run("--concurrency", "1")
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[:-20])
    assert (await run())[0] == 0
    assert ids() == [1, 2, 3, 4]
    assert len(server.requests) == 5


BAD_INPUTS: dict[str, tuple[list[Any], str]] = {
    "same id": ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], "1 and 2"),
    "id and number": ([{"id": 2, "prompt": "x"}, {"prompt": "y"}], "1 and 2"),
    "not JSON": ([{"prompt": "x"}, '{"prompt": '], "line 2"),
    "a list": (["[1]"], "line 1"),
    "no question": ([{"prompt": "x"}, {"id": "b"}], "line 2"),
    "two questions": ([{"prompt": "x", "messages": []}], "line 1"),
    "id": ([{"id": 1.5, "prompt": "x"}], "line 1"),
}


@pytest.mark.parametrize(("rows", "hint"), BAD_INPUTS.values(), ids=BAD_INPUTS)
async def test_a_bad_input_is_refused_before_it_costs(
    run: Run, server: ProviderServer, rows: list[Any], hint: str
) -> None:
    """The whole input is checked first; the message names the lines."""
    write(*rows)
    code, said = await run()
    assert (code, hint in said) == (2, True), said
    assert server.requests == []
    assert not Path("out.jsonl").exists()


async def test_the_output_belongs_to_its_input_and_options(
    run: Run, server: ProviderServer
) -> None:
    """Another input, other options and a foreign file are refused."""
    write({"prompt": "x"})
    assert (await run())[0] == 0
    code, said = await run("--temperature", "1")
    assert (code, "--temperature" in said) == (2, True)
    write({"prompt": "y"})
    code, said = await run()
    assert (code, "another INPUT" in said) == (2, True)
    Path("out.jsonl.batch.json").unlink()
    code, said = await run()
    assert (code, "is not empty" in said) == (2, True)
    assert len(server.requests) == 1
    assert len(output()) == 1


async def test_error_rows_are_asked_again_on_request(
    run: Run, server: ProviderServer
) -> None:
    """An error is a row of its own, and stays unless it is asked again."""
    server.default = lambda r: error("openai", 400) if asked(r) == "bad" else Answer()
    write({"id": "a", "prompt": "bad"}, {"id": "b", "prompt": "good"})
    code, said = await run()
    assert (code, "1 answered, 1 failed" in said) == (1, True)
    (failed,) = [r["error"] for r in output() if "error" in r]
    assert (failed["type"], failed["status_code"]) == ("InvalidRequestError", 400)
    assert failed["attempts"] == 1
    server.default = Answer()
    assert (await run())[0] == 1
    assert len(server.requests) == 2
    assert (await run("--retry-errors"))[0] == 0
    assert ids() == ["a", "b"]
    assert len(server.requests) == 3


async def test_a_fatal_error_stops_the_run(run: Run, server: ProviderServer) -> None:
    """A refused key stops it, and the row is left for the next run."""
    server.default = lambda r: error("openai", 401) if asked(r) == "2" else Answer()
    write(*({"prompt": f"{n}"} for n in range(50)))
    code, said = await run("--concurrency", "2")
    assert (code, "left" in said) == (3, True)
    assert len(server.requests) < 8
    assert 3 not in ids()
    server.default = Answer()
    assert (await run())[0] == 0
    assert ids() == sorted(range(1, 51), key=str)


async def test_a_cost_cap_stops_the_run(run: Run, server: ProviderServer) -> None:
    """No row is started after it; the next run counts what is there already."""
    write(*({"prompt": f"{n}"} for n in range(20)))
    cost = 3.2e-06  # of one answer
    code, said = await run("--concurrency", "1", "--max-cost", f"{4.5 * cost:.9f}")
    assert (code, "--max-cost" in said) == (1, True)
    assert len(server.requests) == 5
    assert (await run("--concurrency", "1", "--max-cost", f"{7.5 * cost:.9f}"))[0] == 1
    assert len(server.requests) == 8
    assert (await run())[0] == 0
    assert len(server.requests) == 20


async def test_a_cap_without_a_price(run: Run, server: ProviderServer) -> None:
    """A model without a price cannot be capped, and the run says so."""
    write(*({"prompt": f"{n}", "model": "llama3.2:1b"} for n in range(5)))
    code, said = await run("--concurrency", "1", "--max-cost", "1")
    assert (code, "price" in said) == (1, True)
    assert len(server.requests) == 1


async def test_a_killed_run_goes_on(
    environment: None, server: ProviderServer, run: Run
) -> None:
    """Killed at random, again and again, it answers each row once."""
    server.default = lambda r: Answer(asked(r), delay=0.02)
    write(*({"prompt": f"{n}"} for n in range(120)))
    command = ("batch", "in.jsonl", "out.jsonl", "--model", MODEL, "--concurrency", "2")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for target in (20, 60):
        process = await create_subprocess_exec(
            *(sys.executable, "-m", "dipeo_llm", *command), env=environ, stderr=PIPE
        )
        try:
            async with asyncio.timeout(60):
                while len(server.requests) < target:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            await process.communicate()
    assert (await run())[0] == 0
    assert ids() == sorted(range(1, 121), key=str)
    # What was in flight when it was killed may be asked again, and nothing else.
    times = Counter(asked(r) for r in server.requests)
    assert sum(n - 1 for n in times.values()) <= 2 * 2
    assert all(r["result"]["text"] == f"{r['id'] - 1}" for r in output())


async def test_two_runs_of_one_output(
    environment: None, server: ProviderServer, run: Run
) -> None:
    """The second is refused while the first one runs."""
    server.default = Answer(delay=0.5)
    write(*({"prompt": f"{n}"} for n in range(3)))
    first = asyncio.create_task(
        asyncio.to_thread(main, ["batch", "in.jsonl", "out.jsonl", "--model", MODEL])
    )
    while not server.requests:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    code, said = await run()
    assert (code, bool(re.search("another batch", said))) == (2, True)
    assert await first == 0


async def test_equal_rows_of_a_file_are_samples(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's id is a label: with a cache, equal prompts still get answers of their own."""
    monkeypatch.setenv("DIPEO_LLM_CACHE_URL", "memory://")
    write(*({"id": name, "prompt": "Roll a die."} for name in "abc"))
    assert (await run())[0] == 0
    assert (ids(), len(server.requests)) == (["a", "b", "c"], 3)
    assert not any(found["result"]["cached"] for found in output())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
async def test_the_output_keeps_its_permissions(run: Run) -> None:
    """Dropping a torn line writes the file anew, and changes nothing else about it."""
    write({"prompt": "1"}, {"prompt": "2"})
    await run()
    path = Path("out.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    path.chmod(0o640)
    assert (await run())[0] == 0
    assert (path.stat().st_mode & 0o777, ids()) == (0o640, [1, 2])


@needs_redis
async def test_equal_rows_stay_samples_in_the_next_run(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row that is left is the same sample as before, also if its equals are answered."""
    server.reply(*(Answer(text) for text in ("one", "two", "three")))
    write(*({"id": name, "prompt": "Roll a die."} for name in "abc"))
    with RedisServer(tmp_path) as redis:
        monkeypatch.setenv("DIPEO_LLM_CACHE_URL", redis.url)
        assert (await run())[0] == 0
        before = {found["id"]: found["result"]["text"] for found in output()}
        path = Path("out.jsonl")
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
        assert (await run())[0] == 0
    after = {found["id"]: found["result"]["text"] for found in output()}
    assert (after, len(server.requests)) == (before, 3)
    assert sorted(after.values()) == ["one", "three", "two"]
