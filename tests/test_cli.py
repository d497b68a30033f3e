"""The command `dipeo-llm`, against a server that speaks the providers' formats."""

import asyncio
import base64
import errno
import io
import json
import os
import pty
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dipeo_llm import Person
from dipeo_llm.cli import main
from tests.conftest import PROVIDERS
from tests.provider_server import (
    MISSING_MODEL,
    Answer,
    Fault,
    ProviderServer,
    Raw,
    error,
)
from tests.read_page import Page, kinds_of
from tests.redis_server import RedisServer, needs_redis

MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-haiku-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2:1b",
}
HOSTILE = "\x1b]0;mine\x07\x1b[2Jred\x9b31m\r\x7f over\u202eturned\tok\n2"
HARMLESS = r"\x1b]0;mine\x07\x1b[2Jred\x9b31m\x7f over\u202eturned" + "\tok\n2"

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def environment(server: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what a user sets: keys, the providers' addresses, and no retries."""
    for provider in PROVIDERS:
        name = f"DIPEO_LLM_{provider.upper()}_BASE_URL"
        monkeypatch.setenv(name, server.base_url(provider))
    for provider in ("OPENAI", "ANTHROPIC", "GEMINI"):
        monkeypatch.setenv(f"{provider}_API_KEY", f"sk-{provider.lower()}")
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "0")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; give its exit code, output and complaints."""

    async def running(*argv: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(main, argv)
        return code, *capsys.readouterr()

    return running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def start(*argv: str, **options: Any) -> Process:
    """Start the command as a process of its own."""
    settings = {"stdin": asyncio.subprocess.DEVNULL, "stdout": PIPE, "stderr": PIPE}
    extra = options.pop("env", {})
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return await create_subprocess_exec(
        sys.executable,
        *("-m", "dipeo_llm", *argv),
        env=env | extra,
        **settings | options,
    )


async def finish(process: Process, stdin: bytes | None = None) -> tuple[int, str, str]:
    """Wait for a process to end."""
    async with asyncio.timeout(120):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), (err or b"").decode()


async def on_a_terminal(*argv: str) -> tuple[int, str, str]:
    """Run the command on a terminal; give its exit code, the screen and complaints."""
    screen, terminal = pty.openpty()
    process = await start(*argv, stdout=terminal)

    code, _, said = await finish(process)

    shown = await asyncio.to_thread(os.read, screen, 65536)
    os.close(terminal)
    os.close(screen)
    return code, shown.decode(), said


async def until(true: Callable[[], bool]) -> None:
    """Wait for what a process of its own does."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def names_in(folder: Path) -> list[str]:
    """Return what there is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def body(server: ProviderServer) -> Any:
    """Return what the last request asked for."""
    return server.requests[-1].json


USAGE = r"12 tokens in, 5 out, cost unknown, \d+\.\d s\n"
Typed = Callable[[str | bytes], None]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Put what the user types on stdin."""

    def typing(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return typing


def turns(server: ProviderServer) -> list[tuple[str, Any]]:
    """Return the conversation as the last request told it."""
    return [(m["role"], m["content"]) for m in body(server)["messages"]]


# --- chat ---------------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("provider", "model"), MODELS.items())
async def test_chat_prints_the_answer_of_the_provider_that_the_name_tells(
    run: Run, server: ProviderServer, provider: str, model: str
) -> None:
    """A model's name is enough, and only the answer is printed."""
    server.reply(Answer("Rhine, Rhone, Danube."))

    got = await run("chat", model, "Name three rivers.")

    assert got == (0, "Rhine, Rhone, Danube.\n", "")
    assert server.requests[-1].provider == provider


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (["--temperature", "0.5"], {"temperature": 0.5}),
        (["--temperature", "0"], {"temperature": 0}),
        (["--max-tokens", "7"], {"max_tokens": 7}),
        (["--top-p", "0.5"], {"top_p": 0.5}),
        (["--seed", "-7"], {"seed": -7}),
        (
            ["--system", "Be brief."],
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                ]
            },
        ),
        (["--system", ""], {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_an_option_of_chat_reaches_the_provider(
    run: Run, server: ProviderServer, options: list[str], sent: dict[str, Any]
) -> None:
    """What is asked for by an option is what goes out."""
    code, _, _ = await run("chat", "gpt-4.1-nano", "Hi", *options)

    assert code == 0
    assert {name: body(server).get(name) for name in sent} == sent


@pytest.mark.usefixtures("environment")
async def test_the_effort_of_reasoning_reaches_a_model_that_reasons(
    run: Run, server: ProviderServer
) -> None:
    """How long the model thinks can be chosen."""
    code, _, _ = await run("chat", "gpt-5-mini", "Hi", "--reasoning-effort", "low")

    assert (code, body(server)["reasoning_effort"]) == (0, "low")


@pytest.mark.usefixtures("environment")
async def test_deadline_ends_a_call_with_its_retries(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds after --deadline are what all attempts have together."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "9")
    server.default = Fault("stall")
    limits = ["--timeout", "0.2", "--deadline", "0.5"]

    code, out, said = await run("chat", "llama3.2", "Hi", *limits)

    assert (code, out) == (1, "")
    assert "deadline of 0.5 s" in said


@pytest.mark.usefixtures("environment")
async def test_usage_prints_tokens_cost_and_seconds_beside_the_answer(
    run: Run, server: ProviderServer
) -> None:
    """The line is on stderr, so that the answer can still be piped."""
    server.reply(Answer("42", input_tokens=1000, cached_tokens=200, output_tokens=9))

    code, out, said = await run("chat", "gpt-4.1-nano", "Hi", "--usage")

    assert (code, out) == (0, "42\n")
    assert re.fullmatch(
        r"1000 tokens in \(200 cached\), 9 out, 0\.00\d+ USD, \d+\.\d s\n", said
    )


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("argv", "stdin", "model", "question"),
    [
        (["Hi"], "", "gpt-4.1-nano", "Hi"),
        (["and rivers"], "", "gpt-4.1-nano", "and rivers"),
        (["gpt-5", "Hi"], "", "gpt-5", "Hi"),
        (["gpt-5"], "Hi", "gpt-5", "Hi"),
        ([], "Hi", "gpt-4.1-nano", "Hi"),
        (["openai/my-own"], "Hi", "my-own", "Hi"),
    ],
)
async def test_a_model_in_the_environment_need_not_be_named(
    run: Run,
    server: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
    typed: Typed,
    argv: list[str],
    stdin: str,
    model: str,
    question: str,
) -> None:
    """DIPEO_LLM_MODEL is the default; what reads as a model's name is one."""
    monkeypatch.setenv("DIPEO_LLM_MODEL", "gpt-4.1-nano")
    typed(stdin)

    code, _, _ = await run("chat", *argv)

    assert code == 0
    assert body(server)["model"] == model
    assert turns(server) == [("user", question)]


@pytest.mark.usefixtures("environment")
async def test_chat_sends_nothing_that_was_not_asked_for(
    run: Run, server: ProviderServer
) -> None:
    """Without options the provider's own defaults hold."""
    await run("chat", "gpt-4.1-nano", "Hi")

    messages = [{"role": "user", "content": "Hi"}]
    assert body(server) == {"model": "gpt-4.1-nano", "messages": messages}


@pytest.mark.usefixtures("environment")
async def test_service_and_base_url_reach_a_server_of_ones_own(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that nobody knows is asked of the server that is named."""
    monkeypatch.delenv("DIPEO_LLM_OPENAI_BASE_URL")
    own = ["--service", "openai", "--base-url", f"{server.origin}/v1/"]

    code, _, complaint = await run("chat", "my-model", "Hi", *own)

    assert (code, complaint) == (0, "")
    assert body(server)["model"] == "my-model"
    assert server.requests[-1].headers["authorization"] == "Bearer sk-openai"


@pytest.mark.usefixtures("environment")
async def test_base_url_wins_over_the_environment(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is typed counts more than what is set."""
    monkeypatch.setenv("DIPEO_LLM_OLLAMA_BASE_URL", "http://127.0.0.1:9")

    code, _, _ = await run("chat", "llama3.2", "Hi", "--base-url", server.origin)

    assert code == 0
    assert server.requests[-1].path == "/api/chat"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("key_id", ["GOOGLE_API_KEY", "GEMINI_API_KEY"])
async def test_key_id_names_the_variable_that_the_key_is_taken_from(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch, key_id: str
) -> None:
    """Of two variables that are set, the one that is named holds the key."""
    monkeypatch.setenv("GEMINI_API_KEY", "sk-from-GEMINI_API_KEY")
    monkeypatch.setenv("GOOGLE_API_KEY", "sk-from-GOOGLE_API_KEY")

    code, _, _ = await run("chat", "gemini-2.5-flash", "Hi", "--key-id", key_id)

    assert code == 0
    assert server.requests[-1].headers["x-goog-api-key"] == f"sk-from-{key_id}"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    "command", [["chat", "gpt-4.1-nano", "Hi"], ["models", "openai"]]
)
async def test_a_key_is_not_sent_to_another_provider(
    run: Run, server: ProviderServer, command: list[str]
) -> None:
    """A slip in --key-id does not show one provider the key of another."""
    got = await run(*command, "--key-id", "ANTHROPIC_API_KEY")

    complaint = "'ANTHROPIC_API_KEY' is a key of anthropic, and is not sent to openai"
    assert got == (
        2,
        "",
        f"dipeo-llm: {complaint} (see dipeo-llm {command[0]} --help)\n",
    )
    assert server.requests == []


@pytest.mark.usefixtures("environment")
async def test_timeout_ends_a_call_that_gets_no_answer(
    run: Run, server: ProviderServer
) -> None:
    """Seconds after --timeout are what a silent provider is given."""
    server.default = Fault("stall")

    code, out, complaint = await run("chat", "llama3.2", "Hi", "--timeout", "0.2")

    assert (code, out) == (1, "")
    assert complaint == "dipeo-llm: ollama did not answer within 0.2 s\n"


@pytest.mark.usefixtures("environment")
async def test_chat_tries_again_as_often_as_the_environment_says(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DIPEO_LLM_MAX_RETRIES is obeyed, and the number of attempts is told."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "1")
    server.default = error("ollama", 500, "out of memory", headers={"retry-after": "0"})

    code, _, complaint = await run("chat", "llama3.2", "Hi")

    assert (code, len(server.requests)) == (1, 2)
    assert complaint == (
        "dipeo-llm: ollama answered 500: out of memory (2 attempts, try again in 0 s)\n"
    )


@pytest.mark.usefixtures("environment")
async def test_json_prints_the_whole_result(run: Run, server: ProviderServer) -> None:
    """A program can read everything but the provider's raw words."""
    server.reply(Answer("42", input_tokens=9, output_tokens=1, finish="length"))

    code, out, complaint = await run("chat", "gpt-4.1-nano", "Hi", "--json")

    result = json.loads(out)
    assert (code, complaint) == (0, "")
    assert "raw_response" not in result
    assert (result["text"], result["finish_reason"]) == ("42", "length")
    assert (result["service"], result["model"]) == ("openai", "gpt-4.1-nano")
    assert result["token_usage"]["input"] == 9
    assert result["cost_usd"] > 0


@pytest.mark.usefixtures("environment")
async def test_an_answer_that_was_cut_off_is_printed_and_said_to_be_cut(
    run: Run, server: ProviderServer
) -> None:
    """A reader of half an answer learns that it is half."""
    server.reply(Answer("Once upon a", finish="length"))

    got = await run("chat", "gpt-4.1-nano", "Tell a story.", "--max-tokens", "4")

    complaint = "dipeo-llm: the answer is incomplete: it ended with 'length'\n"
    assert got == (0, "Once upon a\n", complaint)


@pytest.mark.usefixtures("environment")
async def test_a_prompt_of_one_dash_is_read_from_stdin(server: ProviderServer) -> None:
    """What another program prints can be the question."""
    process = await start("chat", "llama3.2", "-", stdin=PIPE)

    got = await finish(process, "Größe?\n".encode())

    assert got == (0, "Hello from the loopback.\n", "")
    assert body(server)["messages"][0]["content"] == "Größe?\n"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("prompt", "stdin", "question"),
    [
        (["Summarise this:"], "Dear Ada,\n", "Summarise this:\n\nDear Ada,\n"),
        (["Hi"], "", "Hi"),
        (["Hi"], " \n", "Hi"),
        ([], "Dear Ada,\n", "Dear Ada,\n"),
        (["-"], "Dear Ada,\n", "Dear Ada,\n"),
        ([""], "Dear Ada,\n", "Dear Ada,\n"),
        ([], "\ufeffDear Ada,\n", "Dear Ada,\n"),
    ],
)
async def test_piped_text_is_the_question_or_goes_with_it(
    run: Run,
    server: ProviderServer,
    typed: Typed,
    prompt: list[str],
    stdin: str,
    question: str,
) -> None:
    """`cat letter.txt | dipeo-llm chat M "Summarise this:"`; a BOM is taken off."""
    typed(stdin)

    code, _, said = await run("chat", "llama3.2", *prompt)

    assert (code, said) == (0, "")
    assert turns(server) == [("user", question)]


@pytest.mark.parametrize("prompt", [[], ["-"], [""]])
async def test_without_any_question_nothing_is_sent(
    run: Run, server: ProviderServer, typed: Typed, prompt: list[str]
) -> None:
    """Who forgot the question is told how to give one."""
    typed("")

    code, out, said = await run("chat", "llama3.2", *prompt)

    assert (code, out, server.requests) == (2, "", [])
    assert said.startswith("dipeo-llm: there is no question: give PROMPT")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            b"\xff\xfe",
            "the text on stdin is not UTF-8: invalid start byte at",
        ),
        (None, "stdin is closed: give the question as PROMPT"),
    ],
)
async def test_stdin_that_is_no_text_is_a_wrong_argument(
    run: Run, monkeypatch: pytest.MonkeyPatch, data: bytes | None, complaint: str
) -> None:
    """Bytes that are no text, or no stdin at all, are named as what is wrong."""
    stdin = None if data is None else io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)

    code, out, said = await run("chat", "llama3.2", "-")

    assert (code, out) == (2, "")
    assert said.startswith(f"dipeo-llm: {complaint}")


# --- streams ------------------------------------------------------------------------

ESCAPES = "\x1b]0;mine\x07\x1b[2Jred\x9b31m"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("provider", "model"), MODELS.items())
async def test_a_stream_prints_what_the_whole_answer_would(
    run: Run, server: ProviderServer, provider: str, model: str
) -> None:
    """With --stream the answer is the same, for every provider."""
    server.reply(Answer("Rhine, Rhone, Danube."))

    got = await run("chat", model, "Name three rivers.", "--stream")

    assert got == (0, "Rhine, Rhone, Danube.\n", "")
    assert (server.requests[-1].provider, server.requests[-1].stream) == (
        provider,
        True,
    )


@pytest.mark.usefixtures("environment")
async def test_chat_streams_on_a_terminal_and_cut_escapes_stay_escapes(
    server: ProviderServer,
) -> None:
    """A control sequence that comes letter by letter is shown, not obeyed."""
    server.reply(Answer(ESCAPES, pieces=len(ESCAPES)))

    code, shown, said = await on_a_terminal("chat", "llama3.2", "Hi")

    assert (code, said) == (0, "")
    assert shown == "\\x1b]0;mine\\x07\\x1b[2Jred\\x9b31m\r\n"
    assert server.requests[-1].stream


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("option", ["--no-stream", "--json"])
async def test_chat_waits_for_the_whole_answer_where_it_is_told_to(
    server: ProviderServer, option: str
) -> None:
    """On a terminal, too, the answer can be had in one piece."""
    code, shown, _ = await on_a_terminal("chat", "llama3.2", "Hi", option)

    assert code == 0
    assert "Hello from the loopback." in shown
    assert not server.requests[-1].stream


@pytest.mark.usefixtures("environment")
async def test_ctrl_c_in_a_stream_closes_the_connection(server: ProviderServer) -> None:
    """What was said is printed as it comes; nothing stays open at the provider."""
    server.reply(Answer("one two", pieces=2, stall_after=1))
    process = await start("chat", "llama3.2", "Hi", "--stream")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        first = await process.stdout.readexactly(4)

    process.send_signal(signal.SIGINT)
    got = await finish(process)

    assert first == b"one "
    assert got == (130, "", "")
    await until(lambda: server.open_connections == 0)


@pytest.mark.usefixtures("environment")
async def test_a_stream_that_breaks_off_is_printed_as_far_as_it_came(
    run: Run, server: ProviderServer
) -> None:
    """What came is not lost, and the reason has a line of its own."""
    server.reply(Answer("one two", drop_end=True))

    code, out, said = await run("chat", "llama3.2", "Hi", "--stream")

    assert (code, out) == (1, "one two\n")
    assert said.startswith("dipeo-llm: the stream broke off after 7 characters: ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("environment")
async def test_a_streamed_answer_that_was_cut_off_is_said_to_be_cut(
    run: Run, server: ProviderServer
) -> None:
    """A stream tells of its end what a whole answer tells."""
    server.reply(Answer("Once upon a", finish="length"))

    got = await run("chat", "gpt-4.1-nano", "Tell a story.", "--stream")

    complaint = "dipeo-llm: the answer is incomplete: it ended with 'length'\n"
    assert got == (0, "Once upon a\n", complaint)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("option", ["--stream", "--no-stream"])
@pytest.mark.parametrize(("shown", "said"), [([], ""), (["--show-reasoning"], "Hm.\n")])
async def test_reasoning_is_shown_on_stderr_where_it_is_asked_for(
    run: Run, server: ProviderServer, option: str, shown: list[str], said: str
) -> None:
    """What the model thinks is never mixed with what it says."""
    server.reply(Answer("42", reasoning="Hm."))

    got = await run("chat", "qwen3:4b", "Hi", option, *shown)

    assert got == (0, "42\n", said)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("no_color", "expected"),
    [
        (
            "",
            b"\x1b[2mwaiting for qwen3:4b ...\x1b[0m\r\x1b[K\x1b[2ma\\x1b[2J\x1b[0m\r\n",
        ),
        ("1", b"waiting for qwen3:4b ...\r\x1b[Ka\\x1b[2J\r\n"),
    ],
)
async def test_reasoning_on_a_terminal_is_dim_and_harmless(
    server: ProviderServer, no_color: str, expected: bytes
) -> None:
    """Thoughts cannot drive the terminal either, and NO_COLOR is respected."""
    server.reply(Answer("42", reasoning="a\x1b[2J"))
    screen, terminal = pty.openpty()
    process = await start(
        *("chat", "qwen3:4b", "Hi", "--show-reasoning"),
        stderr=terminal,
        env={"NO_COLOR": no_color, "TERM": "xterm"},
    )

    got = await finish(process)

    shown = await asyncio.to_thread(os.read, screen, 4096)
    os.close(terminal)
    os.close(screen)
    assert got == (0, "42\n", "")
    assert shown.endswith(expected)


@pytest.mark.usefixtures("environment")
async def test_a_stream_that_nobody_reads_ends_in_silence(
    server: ProviderServer,
) -> None:
    """`dipeo-llm chat ... --stream | head -1` closes the connection."""
    server.reply(Answer("one two", chunk_delay=0.01))
    reading, writing = os.pipe()
    os.close(reading)
    process = await start("chat", "llama3.2", "Hi", "--stream", stdout=writing)
    os.close(writing)

    assert await finish(process) == (141, "", "")
    await until(lambda: server.open_connections == 0)


# --- pictures, schemas, tools -------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)


@pytest.mark.usefixtures("environment")
async def test_pictures_go_out_beside_the_question(
    run: Run, server: ProviderServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the working directory and URLs, in the order in which they are given."""
    monkeypatch.setenv("DIPEO_BASE_DIR", "/nowhere")
    (folder / "a.png").write_bytes(PNG)
    url = "https://example.org/b.png"
    pictures = ["--image", "a.png", "--image", url]

    code, _, said = await run("chat", "gpt-4.1-nano", "What?", *pictures)

    data = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert (code, said) == (0, "")
    assert body(server)["messages"][0]["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image_url", "image_url": {"url": url}},
    ]


@pytest.mark.usefixtures("environment")
async def test_a_file_may_lie_wherever_the_person_may_read(
    run: Run, server: ProviderServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path on a command line means what it means to every other command."""
    (folder / "a.png").write_bytes(PNG)
    (folder / "plan.pdf").write_bytes(b"%PDF-1.7 plan")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    files = ["--image", "../a.png", "--file", str(folder / "plan.pdf")]

    code, _, said = await run("chat", "gpt-4.1-nano", "What?", *files)

    assert (code, said) == (0, "")
    _, picture, plan = body(server)["messages"][0]["content"]
    assert picture["type"] == "image_url"
    assert plan["file"]["filename"] == "plan.pdf"


@pytest.mark.usefixtures("environment")
async def test_a_url_of_file_need_not_be_a_picture(
    run: Run, server: ProviderServer
) -> None:
    """A PDF in a URL goes out as a document."""
    url = "data:application/pdf;base64,JVBERi0xLjc="

    code, _, said = await run("chat", "gpt-4.1-nano", "What?", "--file", url)

    assert (code, said) == (0, "")
    assert body(server)["messages"][0]["content"][1]["file"]["file_data"] == url


@pytest.mark.usefixtures("environment", "folder")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("none.png", "No such file or directory"),
        (".", "it is a directory"),
    ],
)
@pytest.mark.parametrize("option", ["--no-stream", "--interactive"])
async def test_a_picture_that_cannot_be_used_is_named_before_anything_is_sent(
    run: Run, server: ProviderServer, path: str, reason: str, option: str
) -> None:
    """A slip in a path is a wrong argument."""
    code, out, said = await run("chat", "llama3.2", "Hi", "--image", path, option)

    line = f"dipeo-llm: the file {path!r} of --image cannot be used: {reason} (see"
    assert (code, out, server.requests) == (2, "", [])
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.usefixtures("environment")
async def test_schema_prints_json_that_follows_it(
    run: Run, server: ProviderServer, folder: Path
) -> None:
    """The model is told the form, and a program can read the answer."""
    schema = {
        "type": "object",
        "properties": {"rivers": {"type": "array", "items": {"type": "string"}}},
    }
    (folder / "rivers.json").write_text(json.dumps(schema))
    server.reply(Answer('{"rivers":["Rhine","\\u001b"]}'))

    code, out, said = await run("chat", "gpt-4.1-nano", "Hi", "--schema", "rivers.json")

    assert (code, said) == (0, "")
    assert json.loads(out) == {"rivers": ["Rhine", "\x1b"]}
    assert "\x1b" not in out
    assert body(server)["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.usefixtures("environment")
async def test_an_answer_that_does_not_follow_the_schema_is_a_failure(
    run: Run, server: ProviderServer, folder: Path
) -> None:
    """A program never reads what it did not ask for."""
    (folder / "number.json").write_text('{"type": "number"}')
    server.reply(Answer('"seven"'))

    code, out, said = await run("chat", "gpt-5", "Hi", "--schema", "number.json")

    assert (code, out) == (1, "")
    assert said.startswith("dipeo-llm: no structured answer: 'seven' is not of type")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file or directory"),
        ("{", "it is not JSON: "),
        ("[]", "it does not hold a JSON schema: a JSON schema must be an object"),
        ("{}", "it does not hold a JSON schema: "),
        ('{"type": "river"}', "it does not hold a JSON schema:"),
    ],
)
async def test_a_schema_that_cannot_be_used_is_a_wrong_argument(
    run: Run, folder: Path, text: str | None, reason: str
) -> None:
    """A slip in a schema costs no call."""
    if text is not None:
        (folder / "s.json").write_text(text)

    code, out, said = await run("chat", "llama3.2", "Hi", "--schema", "s.json")

    assert (code, out) == (2, "")
    line = f"dipeo-llm: the file 's.json' of --schema cannot be used: {reason}"
    assert said.startswith(line)
    assert said.count("\n") == 1


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("option", ["--stream", "--no-stream"])
async def test_a_search_lists_its_sources_after_the_answer(
    run: Run, server: ProviderServer, option: str
) -> None:
    """Each page that was used is named once, on a line that it cannot leave."""
    pages = [
        ("https://a.example/", "First\x1b[2J\npage"),
        ("https://b.example/", "Second"),
        ("https://a.example/", "First\x1b[2J\npage"),
    ]
    server.reply(Answer("It rains.", citations=pages))

    got = await run("chat", "gpt-5", "Weather?", "--tool", "web_search", option)

    listed = (
        "It rains.\n\nSources:\n- First\\x1b[2J page: https://a.example/\n"
        "- Second: https://b.example/\n"
    )
    assert got == (0, listed, "")
    assert body(server)["tools"] == [{"type": "web_search"}]


@pytest.mark.usefixtures("environment")
async def test_pictures_that_a_model_draws_are_saved_and_overwrite_nothing(
    run: Run, server: ProviderServer, folder: Path
) -> None:
    """The names of the new files are printed, one on a line."""
    (folder / "image-1.png").write_bytes(b"mine")
    (folder / "image-3.png").symlink_to(folder / "elsewhere")
    server.reply(Answer(images=[PNG, PNG + b"2"]))

    got = await run("chat", "gpt-5", "Draw.", "--tool", "image_generation")

    assert got == (0, "image-2.png\nimage-4.png\n", "")
    assert (folder / "image-1.png").read_bytes() == b"mine"
    assert (folder / "image-2.png").read_bytes() == PNG
    assert (folder / "image-4.png").read_bytes() == PNG + b"2"
    assert not (folder / "elsewhere").exists()


@pytest.mark.usefixtures("environment")
async def test_a_tool_that_the_provider_has_not_is_refused_before_anything_is_sent(
    run: Run, server: ProviderServer
) -> None:
    """A question is not answered without the search that it was to rest on."""
    got = await run("chat", "llama3.2", "Hi", "--tool", "web_search")

    complaint = "ollama's llama3.2 has no tool 'web_search' of its own"
    assert got == (1, "", f"dipeo-llm: {complaint}\n")
    assert server.requests == []


# --- conversations ------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("end", ["/quit\nNever asked\n", ""])
async def test_a_conversation_is_kept_until_it_ends(
    run: Run, server: ProviderServer, typed: Typed, end: str
) -> None:
    """Each question is asked with all that was said before; empty lines ask nothing."""
    server.reply(Answer("One."))
    server.reply(Answer("Two."))
    typed(f"First?\n\n  \nSecond?\n{end}")

    got = await run("chat", "llama3.2", "--interactive", "--system", "Be brief.")

    code, out, said = got
    assert (code, out) == (0, "One.\nTwo.\n")
    assert re.fullmatch(rf"({USAGE}){{2}}", said)
    assert turns(server) == [
        ("system", "Be brief."),
        ("user", "First?\n"),
        ("assistant", "One."),
        ("user", "Second?\n"),
    ]
    assert (len(server.requests), server.requests[-1].stream) == (2, True)
    assert len({request.connection for request in server.requests}) == 1


@pytest.mark.usefixtures("environment")
async def test_a_question_that_fails_is_told_and_not_remembered(
    run: Run, server: ProviderServer, typed: Typed
) -> None:
    """After an error line the conversation goes on as it was before."""
    server.reply(Answer("One."))
    server.reply(error("ollama", 500, "out of memory"))
    server.reply(Answer("Half", drop_end=True))
    server.reply(Answer("Four."))
    typed("Second?\nThird?\nFourth?\n")

    code, out, said = await run("chat", "llama3.2", "First?", "--interactive")

    failed, broken = [line for line in said.splitlines() if "dipeo-llm" in line]
    assert (code, out) == (0, "One.\nHalf\nFour.\n")
    assert failed == "dipeo-llm: ollama answered 500: out of memory"
    assert broken.startswith("dipeo-llm: the stream broke off after 4 characters: ")
    assert turns(server) == [
        ("user", "First?"),
        ("assistant", "One."),
        ("user", "Fourth?\n"),
    ]


@pytest.mark.usefixtures("environment")
async def test_a_picture_is_shown_with_the_first_question_that_is_answered(
    run: Run, server: ProviderServer, folder: Path, typed: Typed
) -> None:
    """A failure does not lose the picture, and no question repeats it."""
    (folder / "a.png").write_bytes(PNG)
    server.reply(error("openai", 500))
    typed("What?\nAnd?\n")

    await run("chat", "gpt-5", "Hm?", "--interactive", "--image", "a.png")

    contents = [content for role, content in turns(server) if role == "user"]
    parts = [[p["type"] for p in c] for c in contents if isinstance(c, list)]
    assert parts == [["text", "image_url"]]
    assert contents[-1] == "And?\n"


@pytest.mark.usefixtures("environment")
async def test_a_line_that_is_no_text_ends_the_conversation(
    run: Run, server: ProviderServer, typed: Typed
) -> None:
    """Bytes that are no text are named as what is wrong."""
    typed(b"\xff\n")

    code, out, said = await run("chat", "llama3.2", "--interactive")

    assert (code, out, server.requests) == (2, "", [])
    assert said.startswith("dipeo-llm: the text on stdin is not UTF-8")


@pytest.mark.usefixtures("environment")
async def test_a_conversation_on_a_terminal_prompts_and_ends_with_ctrl_d(
    server: ProviderServer,
) -> None:
    """Who types sees where to type."""
    screen, terminal = pty.openpty()
    os.set_blocking(screen, False)
    ends = {"stdin": terminal, "stdout": terminal}
    process = await start(
        "chat", "llama3.2", "--interactive", env={"TERM": "dumb"}, **ends
    )
    shown = b""

    def prompted() -> bool:
        nonlocal shown
        with suppress(BlockingIOError):
            shown += os.read(screen, 4096)
        return shown.endswith(b"> ")

    for typing in (b"Hi\n", b"\x04"):
        await until(prompted)
        shown += b"|"
        os.write(screen, typing)
    got = await finish(process)

    os.close(terminal)
    os.close(screen)
    assert re.fullmatch(USAGE, got[2])
    assert shown == b"> |Hi\r\nHello from the loopback.\r\n> |"
    assert turns(server) == [("user", "Hi\n")]


class Screen:
    """A terminal that a process has for its three streams."""

    def __init__(self) -> None:
        self._screen, self.terminal = pty.openpty()
        os.set_blocking(self._screen, False)
        self.shown = ""

    async def start(self, *argv: str, **env: str) -> Process:
        """Start the command on this terminal."""
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), self.terminal)
        return await start(*argv, env={"TERM": "dumb", "NO_COLOR": "1", **env}, **ends)

    async def until(self, text: str) -> None:
        """Wait for a text; it is then taken off what is shown."""

        def is_shown() -> bool:
            with suppress(BlockingIOError):
                self.shown += os.read(self._screen, 4096).decode()
            return text in self.shown

        await until(is_shown)
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        """Type on the keyboard."""
        os.write(self._screen, text.encode())

    def close(self) -> None:
        """Take the terminal away."""
        os.close(self.terminal)
        os.close(self._screen)


@pytest.fixture
def screen() -> Iterator[Screen]:
    """Open a terminal."""
    opened = Screen()
    yield opened
    opened.close()


@pytest.mark.usefixtures("environment")
async def test_ctrl_c_in_an_answer_of_a_conversation_ends_the_answer_only(
    server: ProviderServer, screen: Screen
) -> None:
    """The next question is asked with all that was on the screen."""
    server.reply(Answer("One."))
    server.reply(Answer("two three", pieces=2, stall_after=1))
    process = await screen.start("chat", "llama3.2", "First?", "--interactive")
    await screen.until("One.\r\n")
    await screen.until("> ")
    screen.type("Second?\n")
    await screen.until("Second?\r\ntwo t")

    process.send_signal(signal.SIGINT)
    await screen.until("\r\n> ")
    await until(lambda: server.in_flight == 0)
    screen.type("Third?\n")
    await screen.until("Hello from the loopback.\r\n")
    await screen.until("> ")
    process.send_signal(signal.SIGINT)
    await screen.until("/quit or Ctrl-D ends the conversation\r\n> ")
    screen.type("/quit\n")

    assert (await finish(process))[0] == 0
    assert turns(server) == [
        ("user", "First?"),
        ("assistant", "One."),
        ("user", "Second?\n"),
        ("assistant", "two t"),
        ("user", "Third?\n"),
    ]


@pytest.mark.usefixtures("environment")
async def test_ctrl_c_before_an_answer_forgets_the_question(
    server: ProviderServer, screen: Screen
) -> None:
    """Nothing was said that could be gone on from."""
    server.reply(Fault("stall"))
    process = await screen.start("chat", "llama3.2", "First?", "--interactive")
    await until(lambda: server.in_flight == 1)

    process.send_signal(signal.SIGINT)
    await screen.until("\r\n> ")
    screen.type("Second?\n")
    await screen.until("Hello from the loopback.\r\n")
    await screen.until("> ")
    screen.type("\x04")

    assert (await finish(process))[0] == 0
    assert turns(server) == [("user", "Second?\n")]


@pytest.mark.usefixtures("environment")
async def test_a_conversation_is_saved_and_continued(
    run: Run, server: ProviderServer, folder: Path, typed: Typed
) -> None:
    """The file holds a Person: model, system prompt, and what both have said."""
    first = ["chat", "gpt-5", "First?", "--system", "Be brief."]
    await run(*first, "--conversation", "talk.json")
    typed("Third?\n")

    code, _, _ = await run(
        "chat", "Second?", "--conversation", "talk.json", "--interactive"
    )

    hello = ("assistant", "Hello from the loopback.")
    assert code == 0
    assert body(server)["model"] == "gpt-5"
    assert turns(server) == [
        ("developer", "Be brief."),
        *(("user", "First?"), hello),
        *(("user", "Second?"), hello),
        ("user", "Third?\n"),
    ]
    person = Person.model_validate_json((folder / "talk.json").read_text())
    assert [m.content for m in person.messages[-2:]] == ["Third?\n", hello[1]]
    assert names_in(folder) == ["talk.json"]
    assert "sk-openai" not in (folder / "talk.json").read_text()


@pytest.mark.usefixtures("environment")
async def test_a_conversation_can_go_on_with_another_model_and_prompt(
    run: Run, server: ProviderServer, folder: Path
) -> None:
    """What is typed counts more than what was saved, and is saved in turn."""
    talk = ["--conversation", "talk.json"]
    await run("chat", "gpt-5", "First?", "--system", "Be brief.", *talk)
    (folder / "talk.json").chmod(0o640)
    (folder / "link.json").symlink_to("talk.json")

    await run(
        *("chat", "claude-haiku-4-5", "Second?", "--system", "Be long."),
        *("--conversation", "link.json"),
    )
    await run("chat", "Third?", *talk)

    assert server.requests[-1].provider == "anthropic"
    assert "Be long." in str(body(server)["system"])
    assert len(body(server)["messages"]) == 5
    assert (folder / "link.json").is_symlink()
    assert (folder / "talk.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("environment")
async def test_a_question_that_fails_leaves_the_file_as_it_was(
    run: Run, server: ProviderServer, folder: Path
) -> None:
    """A conversation can be continued after any failure."""
    talk = ["--conversation", "talk.json"]
    await run("chat", "gpt-5", "First?", *talk)
    before = (folder / "talk.json").read_bytes()
    server.default = error("openai", 500)

    code, _, _ = await run("chat", "Second?", *talk)

    assert (code, (folder / "talk.json").read_bytes()) == (1, before)


@pytest.mark.usefixtures("environment", "server")
async def test_a_file_that_cannot_be_written_keeps_what_it_held(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is printed, the failure is told, and nothing is left behind."""
    talk = ["--conversation", "talk.json"]
    await run("chat", "gpt-5", "First?", *talk)
    before = (folder / "talk.json").read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    code, out, said = await run("chat", "Second?", *talk)

    assert (code, out) == (1, "Hello from the loopback.\n")
    assert said == "dipeo-llm: [Errno 28] No space left on device\n"
    assert (folder / "talk.json").read_bytes() == before
    assert names_in(folder) == ["talk.json"]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"id": "a", "llm_config": {"prompt": "x"}}',
        '{"id": "a", "messages": [{"content": "x"}]}',
        "\xff",
    ],
)
async def test_a_file_without_a_conversation_is_a_wrong_argument(
    run: Run, server: ProviderServer, folder: Path, text: str
) -> None:
    """It is named before anything is sent, and not overwritten."""
    (folder / "talk.json").write_text(text, "latin-1")

    code, out, said = await run("chat", "gpt-5", "Hi", "--conversation", "talk.json")

    assert (code, out, server.requests) == (2, "", [])
    assert said.startswith("dipeo-llm: the file 'talk.json' of --conversation cannot")
    assert said.count("\n") == 1
    assert (folder / "talk.json").read_text("latin-1") == text


@pytest.mark.usefixtures("environment")
async def test_a_folder_that_is_missing_is_named_before_anything_is_sent(
    run: Run, server: ProviderServer, folder: Path
) -> None:
    """No answer is paid for that could not be kept."""
    path = str(folder / "none" / "talk.json")

    code, _, said = await run("chat", "gpt-5", "Hi", "--conversation", path)

    assert (code, server.requests) == (2, [])
    assert "its folder" in said


# --- the page of a conversation -----------------------------------------------------


def read_page(path: str = "talk.html") -> Page:
    """Read a page of the working directory."""
    return Page(Path(path).read_text("utf-8"))


@pytest.mark.usefixtures("environment")
async def test_a_page_shows_the_retry_the_failure_and_the_stream(
    run: Run,
    server: ProviderServer,
    folder: Path,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every turn is there, with the numbers of its call."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "1")
    server.reply(Answer("One.", input_tokens=1000, output_tokens=100))
    server.reply(error("openai", 429, retry_delay=0.2), Answer("<b>Two</b>", pieces=3))
    server.reply(error("openai", 400, "no <i>such</i> thing"))
    typed("Second?\nThird?\nFourth? \udcff".encode("utf-8", "replace"))

    code, _, _ = await run(
        *("chat", "gpt-4.1-nano", "First?", "--interactive", "--html", "talk.html")
    )

    page = read_page()
    user, failed = "User", "InvalidRequestError 400: openai answered 400: no <i>such"
    turns = [(who, said, why[: len(failed)]) for who, said, why in page.turns]
    assert code == 0
    assert turns == [
        (user, "First?", ""),
        ("Assistant", "One.", ""),
        (user, "Second?\n", ""),
        ("Assistant", "<b>Two</b>", ""),
        (user, "Third?\n", ""),
        ("Assistant", "", failed),
        (user, "Fourth? ?", ""),
        ("Assistant", "Hello from the loopback.", ""),
    ]
    assert page.root.one("h1") == "Conversation with gpt-4.1-nano"
    assert page.root.one("ol", "attempts").startswith("RateLimitError 429 after 0.")
    assert "then waited 0.20 s" in page.root.one("ol", "attempts")
    assert [kinds_of(bar) for bar in page.bars] == [
        ["call", "attempt", "stream"],
        ["call", "failed", "wait", "attempt", "stream"],
        ["call", "failed"],
        ["call", "attempt", "stream"],
    ]
    assert page.totals["Calls"] == "45 requests, 1 error"
    assert page.totals["Tokens"] == "11341024 in, 110 out; unknown for 1 call".replace(
        "1134", "1,134"
    ).replace("1024", "1,024")
    # 0.1 and 0.4 USD for a million tokens
    assert page.root.all("dl")[0].all("data")[0].attributes["value"] == repr(
        sum([1000e-7 + 100 * 4e-7, 12e-7 + 5 * 4e-7, 12e-7 + 5 * 4e-7])
    )
    assert names_in(folder) == ["talk.html"]
    assert "sk-openai" not in (folder / "talk.html").read_text("utf-8")


@pytest.mark.usefixtures("environment", "folder")
async def test_a_page_begins_with_what_was_said_before(
    run: Run, server: ProviderServer
) -> None:
    """A continued conversation is one page; what was not called now has no numbers."""
    talk = ["--conversation", "talk.json", "--html", "talk.html"]
    await run("chat", "gpt-4.1-nano", "First?", *talk)
    before = read_page().turns
    server.reply(Answer('{"a": 1}'))

    await run("chat", "Second?", *talk, "--json")

    page = read_page()
    assert (
        page.turns[:2]
        == before
        == [
            ("User", "First?", ""),
            ("Assistant", "Hello from the loopback.", ""),
        ]
    )
    assert page.turns[3] == ("Assistant", '{"a": 1}', "")
    assert len(page.bars) == 1


@needs_redis
@pytest.mark.usefixtures("environment", "folder", "server")
async def test_a_page_shows_that_an_answer_came_from_the_cache(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs nothing and sends nothing."""
    with RedisServer(tmp_path) as redis:
        monkeypatch.setenv("DIPEO_LLM_CACHE_URL", redis.url)
        for name in ("one.html", "two.html"):
            await run("chat", "gpt-4.1-nano", "Hi", "--html", name)

    one, two = read_page("one.html"), read_page("two.html")
    assert (one.totals["Calls"], kinds_of(one.bars[0])) == (
        "11 request",
        ["call", "attempt"],
    )
    assert (two.totals["Calls"], kinds_of(two.bars[0])) == (
        "10 requests, 1 from the cache",
        ["cached"],
    )
    assert one.turns == two.turns
    assert two.totals["Tokens"] == "00 in, 0 out"


@pytest.mark.usefixtures("environment", "folder")
async def test_a_page_has_a_call_that_failed_without_a_conversation(
    run: Run, server: ProviderServer
) -> None:
    """The exit code is that of the failure."""
    server.reply(error("openai", 401, "Incorrect API key provided: sk-openai."))

    code, _, _ = await run("chat", "gpt-4.1-nano", "Hi", "--html", "talk.html")

    assert code == 3
    assert read_page().turns[1][2].startswith("APIKeyError 401: ")


@pytest.mark.usefixtures("environment", "folder")
async def test_ctrl_c_leaves_a_page_with_what_was_printed(
    server: ProviderServer,
) -> None:
    """The only turn was stopped, and the process ends as it does without a page."""
    server.reply(Answer("one two", pieces=2, stall_after=1))
    process = await start("chat", "llama3.2", "Hi", "--stream", "--html", "a.html")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        await process.stdout.readexactly(4)

    process.send_signal(signal.SIGINT)
    code, _, _ = await finish(process)

    page = read_page("a.html")
    assert code == 130
    assert page.turns == [
        ("User", "Hi", ""),
        ("Assistant", "one ", "stopped before its end"),
    ]
    assert page.bars[0].attributes["aria-label"].startswith("stopped before its end")


@pytest.mark.usefixtures("environment", "folder")
async def test_a_killed_conversation_leaves_the_page_of_the_turn_before(
    server: ProviderServer,
) -> None:
    """The page is whole after each turn."""
    server.reply(Answer("One."), Fault("stall"))
    process = await start(
        *("chat", "llama3.2", "First?", "--interactive", "--html", "talk.html"),
        stdin=PIPE,
    )
    assert process.stdin is not None
    await until(lambda: Path("talk.html").exists())
    process.stdin.write(b"Second?\n")
    await until(lambda: server.in_flight == 1)

    process.kill()
    await finish(process)

    assert read_page().turns == [("User", "First?", ""), ("Assistant", "One.", "")]
    assert names_in(Path()) == ["talk.html"]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("mode", ["--interactive", "--no-stream"])
@pytest.mark.parametrize(
    "path",
    ["none/talk.html", ".", "talk.json", "../" * 99 + "dev/null", "a" * 300],
)
async def test_a_page_that_cannot_be_written_is_named_before_anything_is_sent(
    run: Run, server: ProviderServer, folder: Path, path: str, mode: str
) -> None:
    """No answer is paid for that would be missing on the page."""
    (folder / "talk.json").touch()
    talk = ["--conversation", "talk.json", "--html", path]

    code, out, said = await run("chat", "gpt-4.1-nano", "Hi", mode, *talk)

    assert (code, out, server.requests) == (2, "", [])
    assert "--html" in said
    assert said.count("\n") == 1
    assert names_in(folder) == ["talk.json"]
    assert (folder / "talk.json").stat().st_size == 0


@pytest.mark.usefixtures("environment", "server")
async def test_a_page_that_fails_later_keeps_what_it_held(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is printed, the failure is told, and nothing is left behind."""
    await run("chat", "gpt-4.1-nano", "First?", "--html", "talk.html")
    before = (folder / "talk.html").read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    code, out, said = await run("chat", "gpt-5", "Second?", "--html", "talk.html")

    assert (code, out) == (1, "Hello from the loopback.\n")
    assert said == "dipeo-llm: [Errno 28] No space left on device\n"
    assert (folder / "talk.html").read_bytes() == before
    assert names_in(folder) == ["talk.html"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--interactive", "--json"], "--interactive and --json exclude each other"),
        (["--stream", "--json"], "--stream and --json exclude each other"),
        (["--interactive", "-"], "--interactive reads stdin itself: PROMPT cannot be"),
    ],
)
async def test_options_that_exclude_each_other_are_refused(
    run: Run, options: list[str], complaint: str
) -> None:
    """What cannot be had at once is said, and nothing is sent."""
    prompt = [] if "-" in options else ["Hi"]

    code, out, said = await run("chat", "llama3.2", *prompt, *options)

    assert (code, out) == (2, "")
    assert said.startswith(f"dipeo-llm: {complaint}")


# --- the prompt file ----------------------------------------------------------------


@pytest.mark.usefixtures("environment")
async def test_a_prompt_file_is_found_from_the_working_directory(
    run: Run, server: ProviderServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path on a command line means what it means to every other command."""
    monkeypatch.setenv("DIPEO_BASE_DIR", "/nowhere")
    (folder / "brief.md").write_text("Be brief.")

    got = await run(
        "chat", "gpt-5", "Hi", "--prompt-file", "brief.md", "--system", "Be long."
    )

    assert got == (0, "Hello from the loopback.\n", "")
    assert body(server)["messages"][0] == {"role": "developer", "content": "Be brief."}


@pytest.mark.usefixtures("environment", "folder")
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.md", "No such file or directory"),
        ("/etc/passwd", "it leads outside the base directory"),
        (".", "it is "),
    ],
)
async def test_a_prompt_file_that_cannot_be_used_is_named_with_the_rules(
    run: Run, server: ProviderServer, path: str, reason: str
) -> None:
    """Nothing is sent without the prompt that was asked for."""
    code, out, complaint = await run("chat", "llama3.2", "Hi", "--prompt-file", path)

    assert (code, out, server.requests) == (2, "", [])
    assert complaint.startswith(
        f"dipeo-llm: prompt file {path!r} is not used: {reason}"
    )
    assert "in or below the working directory" in complaint
    assert complaint.count("\n") == 1


@pytest.mark.usefixtures("environment", "folder")
async def test_system_stands_in_for_a_prompt_file_that_cannot_be_used(
    run: Run, server: ProviderServer
) -> None:
    """As in the library, the text is used, and the user is told."""
    code, _, complaint = await run(
        "chat", "gpt-5", "Hi", "--prompt-file", "none.md", "--system", "Be brief."
    )

    assert code == 0
    assert body(server)["messages"][0] == {"role": "developer", "content": "Be brief."}
    assert complaint == (
        "dipeo-llm: prompt file 'none.md' is not used: No such file or directory;"
        " system_prompt stands in\n"
    )


# --- models and provider ------------------------------------------------------------


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_models_prints_what_a_provider_offers_as_chat_takes_it(
    run: Run, server: ProviderServer, provider: str
) -> None:
    """Each line can be given to `chat`."""
    got = await run("models", provider)

    names = sorted(server.models[provider])
    assert got == (0, "".join(f"{provider}/{name}\n" for name in names), "")


@pytest.mark.usefixtures("environment")
async def test_models_without_a_service_asks_all_that_the_environment_leads_to(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider whose key is not set is left out; Ollama needs an address only."""
    monkeypatch.delenv("ANTHROPIC_API_KEY")

    code, out, complaint = await run("models", "--json")

    asked = ("openai", "google", "ollama")
    assert (code, complaint) == (0, "")
    assert json.loads(out) == {name: sorted(server.models[name]) for name in asked}


@pytest.mark.usefixtures("environment")
async def test_models_of_the_others_are_printed_where_one_provider_fails(
    run: Run, server: ProviderServer
) -> None:
    """One bad key does not hide what the others offer, but is not forgotten."""
    server.keys["openai"] = {"sk-another"}

    code, out, complaint = await run("models")

    services = {line.split("/")[0] for line in out.splitlines()}
    assert (code, services) == (3, {"anthropic", "google", "ollama"})
    assert complaint.startswith("dipeo-llm: openai answered 401: ")


@pytest.mark.usefixtures("environment")
async def test_models_takes_its_own_address_and_patience(
    run: Run, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of the connection mean what they mean to `chat`."""
    monkeypatch.delenv("DIPEO_LLM_OLLAMA_BASE_URL")

    got = await run("models", "ollama", "--base-url", server.origin, "--timeout", "20")

    assert got == (0, "ollama/llama3.2:latest\nollama/qwen3:4b\n", "")


@pytest.mark.usefixtures("environment")
async def test_the_name_of_a_model_stays_on_its_line(
    run: Run, server: ProviderServer
) -> None:
    """A name that a server made up can neither drive the terminal nor add lines."""
    server.models["ollama"] = ["a\x1b[2J\nb"]

    got = await run("models", "ollama")

    assert got == (0, "ollama/a\\x1b[2J b\n", "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-4.1-nano", "openai"),
        ("claude-haiku-4-5", "anthropic"),
        ("gemini-2.5-flash", "google"),
        ("llama3.2:1b", "ollama"),
        ("gemini/gemma-3-27b-it", "google"),
        ("groq/llama-3.3-70b-versatile", "groq"),
    ],
)
async def test_provider_prints_whose_a_model_is(
    run: Run, name: str, expected: str
) -> None:
    """One word, for a script to use."""
    assert await run("provider", name) == (0, f"{expected}\n", "")


async def test_providers_are_listed(run: Run) -> None:
    """One on a line, with its engine, variables and address, or why it is refused."""
    code, out, said = await run("models", "--providers")

    assert (code, said) == (0, "")
    lines = [line.split("\t") for line in out.splitlines()]
    assert len(lines) > 130  # 138 on LiteLLM 1.105, 155 on 1.110
    by_name = {prefix: rest for prefix, *rest in lines}
    assert by_name["groq"] == [
        "direct",
        "GROQ_API_KEY",
        "https://api.groq.com/openai/v1",
    ]
    assert by_name["azure"][2] == "https://RESOURCE.openai.azure.com/openai/v1"
    assert by_name["watsonx"][0] == "refused"
    assert "IAM token" in by_name["watsonx"][3]


async def test_providers_are_listed_as_json(run: Run) -> None:
    """With everything that is known of each."""
    code, out, said = await run("models", "--providers", "--json")

    assert (code, said) == (0, "")
    rows = {row["prefix"]: row for row in json.loads(out)}
    assert rows["openai"]["other_prefixes"] == ["chatgpt", "gpt"]
    assert rows["qwencloud"]["key_variables"] == [
        "QWENCLOUD_API_KEY",
        "DASHSCOPE_API_KEY",
    ]
    assert {row["engine"] for row in rows.values()} == {"direct", "litellm", "refused"}


async def test_provider_says_what_to_do_about_an_unknown_name(run: Run) -> None:
    """An unknown name is a failure that tells the way out."""
    got = await run("provider", "nobodys-model")

    complaint = (
        "dipeo-llm: no provider is known for model 'nobodys-model': name it with"
        " service=… or a prefix, such as service='openai' or 'openai/nobodys-model'\n"
    )
    assert got == (1, "", complaint)


async def test_cassettes_looks_into_the_recordings_of_the_project(run: Run) -> None:
    """The command for recordings is part of this one."""
    folder = str(Path(__file__).parent.parent / "cassettes")

    code, out, said = await run("cassettes", "list", folder)

    assert (code, said) == (0, "")
    assert "openai" in out


# --- exit codes ---------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("reply", "code", "complaint"),
    [
        (error("openai", 401), 3, "openai answered 401: Incorrect API key"),
        (error("openai", 403), 3, "openai answered 403: "),
        (error("openai", 400, "bad temperature"), 1, "openai answered 400: bad temp"),
        (error("openai", 404), 1, "openai answered 404: Not found."),
        (error("openai", 429, retry_delay=7), 1, "openai answered 429: Rate limit"),
        (error("openai", 503), 1, "openai answered 503: The engine is currently"),
        (Raw(body=b"<html>a proxy</html>"), 1, "openai answered 200, but its body is"),
        (Raw(302, {"location": "https://x.test"}), 1, "openai answered 302: "),
        (Fault("reset"), 1, "no answer from openai: "),
        (Fault("reset_mid_body"), 1, "no answer from openai: "),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_call_that_fails_ends_with_one_line_and_the_code_of_its_kind(
    run: Run, server: ProviderServer, reply: Raw | Fault, code: int, complaint: str
) -> None:
    """A script can tell a bad key from a bad day, and a person can read why."""
    server.default = reply

    got, out, said = await run("chat", "gpt-4.1-nano", "Hi")

    assert (got, out) == (code, "")
    assert said.startswith(f"dipeo-llm: {complaint}")
    assert said.count("\n") == 1
    assert "sk-openai" not in said


@pytest.mark.usefixtures("environment")
async def test_a_failure_tells_when_to_come_back_and_what_to_quote(
    run: Run, server: ProviderServer
) -> None:
    """The provider's own wish and its name for the request are passed on."""
    server.default = error("openai", 429, retry_delay=7, headers={"x-request-id": "r1"})

    _, _, said = await run("chat", "gpt-4.1-nano", "Hi")

    assert said.endswith(" (try again in 7 s, request r1)\n")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("argv", "code", "complaint"),
    [
        (["chat", f"openai/{MISSING_MODEL}", "Hi"], 1, "openai answered 404: "),
        (["chat", "nobodys-model", "Hi"], 1, "no provider is known for model"),
        (["chat", "", "Hi"], 1, "'' is not the name of a model"),
        (["chat", "llama3.2", ""], 2, "stdin is closed: give the question as PROMPT"),
        (["chat", "llama3.2"], 2, "stdin is closed: give the question as PROMPT (see"),
        (["models", "bedrock"], 1, "bedrock needs a region: set AWS_REGION"),
        (["models", "mistral"], 3, "set MISTRAL_API_KEY for 'mistral'"),
        (
            ["models", "mistrl"],
            2,
            "invalid value for '[SERVICE]': unknown provider 'mistrl'; did you mean 'mistral'?",
        ),
        (
            ["models", "claude-code"],
            2,
            "invalid value for '[SERVICE]': claude-code is not reached: it is a program",
        ),
        (
            ["chat", "gorq/x", "Hi"],
            1,
            "no provider is known for model 'gorq/x': did you mean 'groq/x'?",
        ),
        (["models", "openai", "--providers"], 2, "--providers takes no SERVICE"),
        (["models", "deepseek"], 3, "set DEEPSEEK_API_KEY for 'deepseek'"),
        ([], 2, "missing command (see dipeo-llm --help)"),
        (["talk"], 2, "no such command 'talk'"),
        (["chat"], 2, "the model is missing: give MODEL, or set DIPEO_LLM_MODEL (see"),
        (["chat", "llama3.2", "Hi", "--temp", "1"], 2, "no such option"),
        (
            ["chat", "llama3.2", "\udcff"],
            2,
            "invalid value for '[PROMPT]': it is not UT",
        ),
        (
            ["cassettes", "find"],
            2,
            "no such command 'find' (see dipeo-llm cassettes --",
        ),
        (
            ["models", "--base-url", "http://x"],
            2,
            "--key-id and --base-url need a SERV",
        ),
        (["models", "!"], 2, "invalid value for '[SERVICE]': '!' is not the name of a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
async def test_what_cannot_be_done_is_said_in_one_line(
    run: Run, argv: list[str], code: int, complaint: str
) -> None:
    """Each mistake has its exit code and names what is wrong."""
    got, out, said = await run(*argv)

    assert (got, out) == (code, "")
    assert said.startswith(f"dipeo-llm: {complaint}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--temperature", "warm", "'warm' is not a valid number"),
        ("--temperature", "-1", "-1.0 is not in the range x>=0"),
        ("--temperature", "nan", "'nan' is not a finite number"),
        ("--top-p", "1.1", "1.1 is not in the range 0<=x<=1"),
        ("--max-tokens", "0", "0 is not in the range x>=1"),
        ("--max-tokens", "1.5", "'1.5' is not a valid integer range"),
        ("--seed", "x", "'x' is not a valid integer"),
        ("--timeout", "0", "0.0 is not in the range x>0"),
        ("--timeout", "inf", "'inf' is not a finite number"),
        ("--deadline", "0", "0.0 is not in the range x>0"),
        ("--base-url", "example.org", "it must be an http:// or https:// URL"),
        (
            "--base-url",
            "http://me:pw@x",
            "a URL must not carry a user name or password",
        ),
        ("--system", "\udcff", "it is not UTF-8 text"),
        ("--service", "", "'' is not the name of a service"),
    ],
)
async def test_an_option_that_makes_no_sense_is_refused_before_anything_is_sent(
    run: Run, option: str, value: str, complaint: str
) -> None:
    """The line names the option and says what it takes."""
    got = await run("chat", "llama3.2", "Hi", f"{option}={value}")

    said = f"invalid value for '{option}': {complaint} (see dipeo-llm chat --help)"
    assert got == (2, "", f"dipeo-llm: {said}\n")


async def test_a_key_in_place_of_its_name_is_refused_and_not_repeated(run: Run) -> None:
    """A key that was typed by mistake does not show up in a log of complaints."""
    code, _, said = await run("chat", "gpt-4.1-nano", "Hi", "--key-id", "sk-secret")

    assert code == 2
    assert "never put a key on a command line" in said
    assert "sk-secret" not in said


@pytest.mark.parametrize("command", [["models"], ["chat", "gpt-4.1-nano", "Hi"]])
async def test_a_missing_key_is_asked_for_by_the_name_of_its_variable(
    run: Run, command: list[str]
) -> None:
    """Who has set nothing yet learns what to set."""
    code, out, said = await run(*command)

    assert (code, out) == (3, "")
    assert "OPENAI_API_KEY" in said


@pytest.mark.parametrize("command", [["models", "ollama"], ["chat", "llama3.2", "Hi"]])
async def test_a_setting_that_cannot_be_read_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """A variable with a slip in it is a mistake to fix, not a failed call."""
    monkeypatch.setenv("DIPEO_LLM_TIMEOUT", "soon")

    code, out, said = await run(*command)

    assert (code, out) == (2, "")
    assert said.startswith("dipeo-llm: DIPEO_LLM_TIMEOUT='soon' cannot be read: ")


@pytest.mark.usefixtures("environment")
async def test_ctrl_c_closes_the_connection_and_says_nothing(
    server: ProviderServer,
) -> None:
    """An interrupted call leaves no traceback, and nothing open at the provider."""
    server.default = Fault("stall")
    process = await start("chat", "gpt-4.1-nano", "Hi")
    await until(lambda: server.in_flight == 1)

    process.send_signal(signal.SIGINT)
    got = await finish(process)

    assert got == (130, "", "")
    await until(lambda: server.open_connections == 0)


async def test_ctrl_c_while_the_prompt_is_typed_says_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who thinks better of a question before it is asked gets a prompt back."""

    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Interrupted()))

    assert await run("chat", "llama3.2", "-") == (130, "", "")


# --- the terminal and the pipe ------------------------------------------------------


@pytest.mark.usefixtures("environment")
async def test_an_answer_cannot_drive_the_terminal(server: ProviderServer) -> None:
    """On a terminal control characters are shown, not obeyed; tabs and lines stay."""
    server.reply(Answer(HOSTILE))
    screen, terminal = pty.openpty()
    process = await start("chat", "llama3.2", "Hi", stdout=terminal)

    got = await finish(process)

    shown = await asyncio.to_thread(os.read, screen, 4096)
    os.close(terminal)
    os.close(screen)
    assert got == (0, "", "")
    assert shown.decode() == f"{HARMLESS}\n".replace("\n", "\r\n")


@pytest.mark.usefixtures("environment")
async def test_a_file_gets_the_answer_as_it_came(
    run: Run, server: ProviderServer
) -> None:
    """What is not shown is not touched."""
    server.reply(Answer(HOSTILE))

    got = await run("chat", "llama3.2", "Hi")

    assert got == (0, f"{HOSTILE}\n", "")


@pytest.mark.usefixtures("environment")
async def test_json_holds_no_control_character_and_loses_none(
    run: Run, server: ProviderServer
) -> None:
    """JSON has escapes of its own, so it is harmless and exact at once."""
    server.reply(Answer(HOSTILE))

    _, out, _ = await run("chat", "llama3.2", "Hi", "--json")

    assert json.loads(out)["text"] == HOSTILE
    assert {c for c in out if not c.isprintable()} == {"\n"}


@pytest.mark.usefixtures("environment")
async def test_a_complaint_cannot_drive_the_terminal(
    run: Run, server: ProviderServer
) -> None:
    """A provider's words of refusal are shown on one line without control characters."""
    server.reply(error("ollama", 500, HOSTILE))

    _, _, said = await run("chat", "llama3.2", "Hi")

    assert {c for c in said if not c.isprintable()} == {"\n"}
    assert said.count("\n") == 1


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("option", [[], ["--json"]])
async def test_half_a_character_from_a_model_is_printed_as_unknown(
    run: Run, server: ProviderServer, option: Sequence[str]
) -> None:
    """Text that no encoding can hold is no reason to fail."""
    message = {"role": "assistant", "content": "half \ud83d"}
    answer = {"model": "m", "message": message, "done": True, "done_reason": "stop"}
    server.reply(Raw(body=json.dumps(answer).encode()))

    code, out, said = await run("chat", "llama3.2", "Hi", *option)

    assert (code, said) == (0, "")
    assert "half \N{REPLACEMENT CHARACTER}" in out


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
async def test_json_is_valid_whatever_the_output_encodes(
    server: ProviderServer, encoding: str
) -> None:
    """A program can read it, and a person too where the output is UTF-8."""
    server.reply(Answer("größe \N{SNOWMAN}"))

    process = await start(
        *("chat", "llama3.2", "Hi", "--json"), env={"PYTHONIOENCODING": encoding}
    )

    code, out, _ = await finish(process)
    assert (code, json.loads(out)["text"]) == (0, "größe \N{SNOWMAN}")
    assert out.isascii() == (encoding != "utf-8")


@pytest.mark.usefixtures("environment")
async def test_what_the_output_cannot_encode_is_printed_as_an_escape(
    server: ProviderServer,
) -> None:
    """A terminal without Unicode shows the rest of the answer."""
    server.models["ollama"] = ["größe"]

    process = await start("models", "ollama", env={"PYTHONIOENCODING": "ascii"})

    assert await finish(process) == (0, "ollama/gr\\xf6\\xdfe\n", "")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("argv", [["models", "ollama"], ["--help"], ["--version"]])
async def test_output_that_nobody_reads_ends_the_command_in_silence(
    argv: list[str],
) -> None:
    """`dipeo-llm models | head -1` prints no complaint."""
    reading, writing = os.pipe()
    os.close(reading)
    process = await start(*argv, stdout=writing, env={"PYTHONUNBUFFERED": ""})
    os.close(writing)

    assert await finish(process) == (141, "", "")


@pytest.mark.usefixtures("environment")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
async def test_a_full_disk_is_a_failure() -> None:
    """An answer that could not be kept is not a success."""
    full = os.open("/dev/full", os.O_WRONLY)
    process = await start("models", "ollama", stdout=full)
    os.close(full)

    got = await finish(process)

    assert got == (1, "", "dipeo-llm: [Errno 28] No space left on device\n")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("stdout", "complaint"),
    [
        (None, "stdout is closed"),
        (io.StringIO(), "ValueError: I/O operation on closed file"),
    ],
)
async def test_an_output_that_is_closed_is_a_failure_in_one_line(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    stdout: io.StringIO | None,
    complaint: str,
) -> None:
    """Even what nobody foresaw ends without a traceback."""
    if stdout is not None:
        stdout.close()
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", stdout)

        code, _, said = await run("provider", "gpt-4.1-nano")

    assert (code, said) == (1, f"dipeo-llm: {complaint}\n")


async def test_a_complaint_that_nobody_can_hear_is_no_output() -> None:
    """With stderr closed, what is wrong is not mixed with the answer."""
    command = 'exec "$0" -m dipeo_llm provider "" 2>&-'
    process = await create_subprocess_exec(
        *("sh", "-c", command, sys.executable), stdout=PIPE
    )

    assert await finish(process) == (1, "", "")


async def test_only_warnings_of_this_package_are_shown_and_without_a_traceback() -> (
    None
):
    """What LiteLLM logs is not mixed with what the user has to know."""
    program = """
import io, logging, sys
from dipeo_llm.cli import main

class Logging(io.BytesIO):
    def read(self, size=-1):
        for name in ("LiteLLM", "dipeo_llm"):
            try:
                1 / 0
            except ZeroDivisionError:
                logging.getLogger(name).warning("from %s", name, exc_info=True)
        return super().read(size)

sys.stdin = io.TextIOWrapper(Logging(b"Hi"))
sys.exit(main(["chat", "", "-"]))
"""
    process = await create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=PIPE, stderr=PIPE
    )

    code, out, said = await finish(process)

    lines = "dipeo-llm: from dipeo_llm\ndipeo-llm: '' is not the name of a model\n"
    assert (code, out, said) == (1, "", lines)


@pytest.mark.parametrize("is_terminal", [True, False])
async def test_a_retry_is_told_on_a_terminal_only(
    *, is_terminal: bool, screen: Screen
) -> None:
    """A person learns what the wait is for; a log file does not fill with it."""
    retry = "openai/gpt-4.1-nano: 429, next attempt in 2.0 s (2 of 4)"
    program = f"""
import io, logging, sys
from dipeo_llm.cli import main

class Logging(io.BytesIO):
    def read(self, size=-1):
        logging.getLogger("dipeo_llm.calls").warning({retry!r})
        return super().read(size)

sys.stdin = io.TextIOWrapper(Logging(b"Hi"))
sys.exit(main(["chat", "", "-"]))
"""
    stderr = screen.terminal if is_terminal else PIPE
    process = await create_subprocess_exec(
        *(sys.executable, "-c", program), stderr=stderr
    )

    _, _, said = await finish(process)

    if is_terminal:
        await screen.until(f"{retry}\x1b[0m\r\n")
    else:
        assert said == "dipeo-llm: '' is not the name of a model\n"


# --- completion ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("do", ["doctor"]),
        ("chat --reas", ["--reasoning-effort"]),
        ("chat --reasoning-effort mi", ["minimal"]),
        ("chat --service an", ["anthropic"]),
        ("models goo", ["google"]),
        ("models --key-id GE", ["GEMINI_API_KEY"]),
        ("cassettes l", ["list"]),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_a_shell_completes_commands_options_and_values(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    shell: str,
    words: str,
    expected: list[str],
) -> None:
    """Each of the three asks in its own way and gets the same."""
    *_, last = typed = f"dipeo-llm {words}".split()
    number = len(typed) - 1
    monkeypatch.setenv("_DIPEO_LLM_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(typed))
    monkeypatch.setenv("COMP_CWORD", last if shell == "fish" else str(number))

    code, out, _ = await run()

    found = [re.split(r"[,\t]", line) for line in out.split("\n")]
    values = {part for line in found for part in line}
    assert code == 0
    assert set(expected) <= values


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_completion_prints_a_script_for_the_shell(run: Run, shell: str) -> None:
    """The script calls this command by its name."""
    code, out, said = await run("completion", shell)

    assert (code, said) == (0, "")
    assert f"_DIPEO_LLM_COMPLETE={shell}_complete" in out
    assert "dipeo-llm" in out


# --- help ---------------------------------------------------------------------------

SUBCOMMANDS = ["chat", "models", "provider", "doctor", "cassettes", "completion"]


@pytest.mark.parametrize("argv", [[], *([name] for name in SUBCOMMANDS)])
async def test_help_teaches_by_examples(run: Run, argv: list[str]) -> None:
    """Every command shows how it is typed."""
    code, out, _ = await run(*argv, "--help")

    examples = out.partition("Examples:\n")[2]
    assert code == 0
    assert f"dipeo-llm {' '.join(argv)}" in examples


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--help"],
            ["chat", "models", "provider", "--version", "130", "DIPEO_LLM_TI"],
        ),
        (
            ["chat", "--help"],
            ["--temperature NUMBER", "--timeout SECONDS", "in tokens", "/quit", "URL"],
        ),
        (
            ["chat", "--help"],
            ["Sampling temperature", "[x>=0]", "The system prompt"],
        ),
        (["models", "--help"], ["SERVICE", "--json"]),
        (["provider", "--help"], ["NAME"]),
    ],
    ids=lambda value: value[0],
)
async def test_help_tells_units_variables_and_exit_codes(
    run: Run, argv: list[str], words: list[str]
) -> None:
    """Who asks for help finds what a call needs."""
    code, out, complaint = await run(*argv)

    assert (code, complaint) == (0, "")
    assert [word for word in words if word not in out] == []
    assert max(map(len, out.splitlines())) <= 88


@pytest.mark.parametrize("argv", [["--help"], ["chat", "--help"]])
async def test_help_that_cannot_be_printed_is_a_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    """What was asked for on stdout does not turn up on stderr, as if it were there."""
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)

        code, _, said = await run(*argv)

    assert (code, said) == (1, "dipeo-llm: stdout is closed\n")


async def test_version_names_the_package_and_litellm(run: Run) -> None:
    """Both numbers are what a report of a fault needs."""
    from importlib.metadata import version

    got = await run("--version")

    said = f"dipeo-llm {version('dipeo-llm')} (LiteLLM {version('litellm')})\n"
    assert got == (0, said, "")


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["chat", "--help"], ["--version"], ["provider", "gpt-4.1-nano"]],
)
async def test_what_needs_no_call_imports_nothing_heavy(argv: list[str]) -> None:
    """Help and a known name come at once: pydantic's 0.1 s is all that they wait for."""
    heavy = {"litellm", "openai", "aiohttp", "httpx"}
    program = (
        "import sys; from dipeo_llm.cli import main; code = main(sys.argv[1:]);"
        f" print(sorted({heavy} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    process = await create_subprocess_exec(
        sys.executable, "-c", program, *argv, stdout=PIPE, stderr=PIPE
    )

    code, _, imported = await finish(process)

    assert (code, imported) == (0, "[]\n")
