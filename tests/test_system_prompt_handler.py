"""System prompts: which one counts, where a file may lie, and what a bad file does."""

import io
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from dipeo_llm.domain import LLMService, Message, PersonLLMConfig
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from dipeo_llm.system_prompt_handler import SystemPromptHandler
from tests.provider_server import ProviderServer


def config(prompt_file: Any = None, system_prompt: str | None = "inline") -> Any:
    """Make what an application's own configuration looks like."""
    return SimpleNamespace(prompt_file=prompt_file, system_prompt=system_prompt)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Make a base directory with a prompt in it, and a secret beside it."""
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    (base / "prompt.txt").write_text("from the file")
    (base / "sub" / "deep.txt").write_text("from below")
    (tmp_path / "secret.txt").write_text("top secret")
    (tmp_path / "base-2").mkdir()
    (tmp_path / "base-2" / "secret.txt").write_text("top secret")
    return base


# --- which one counts


@pytest.mark.parametrize(
    ("prompt_file", "inline", "expected"),
    [
        ("prompt.txt", "inline", "from the file"),
        ("prompt.txt", None, "from the file"),
        (None, "inline", "inline"),
        ("", "inline", "inline"),
        (None, None, None),
        (None, "", None),
        ("", "", None),
        ("missing.txt", "inline", "inline"),
        ("missing.txt", None, None),
        ("missing.txt", "", None),
    ],
)
def test_the_file_wins_over_the_inline_prompt(
    base: Path, prompt_file: str | None, inline: str | None, expected: str | None
) -> None:
    """The file counts, then the inline prompt, then there is none."""
    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config(prompt_file, inline)) == expected


def test_our_own_configuration_is_read_too(base: Path) -> None:
    """A PersonLLMConfig works like an application's own class."""
    own = PersonLLMConfig(model="gpt-4o", system_prompt="x", prompt_file="sub/deep.txt")

    assert SystemPromptHandler(base).get_system_prompt(own) == "from below"


def test_a_configuration_without_prompts_has_none(base: Path) -> None:
    """An object that has neither attribute has no system prompt."""
    assert SystemPromptHandler(base).get_system_prompt(object()) is None


def test_a_path_object_will_do(base: Path) -> None:
    """A path may be given as text or as a path."""
    handler = SystemPromptHandler(str(base))

    assert handler.get_system_prompt(config(Path("prompt.txt"))) == "from the file"


def test_a_file_that_is_used_logs_nothing(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Success is silent."""
    SystemPromptHandler(base).get_system_prompt(config("prompt.txt"))

    assert caplog.records == []


# --- the base directory


def test_the_argument_is_the_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler's own base directory wins over the environment's."""
    monkeypatch.setenv("DIPEO_BASE_DIR", str(tmp_path))

    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config("prompt.txt")) == "from the file"


def test_the_variable_is_the_base_without_an_argument(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DIPEO_BASE_DIR counts where the handler was given nothing."""
    monkeypatch.chdir(tmp_path)
    handler = SystemPromptHandler()

    monkeypatch.setenv("DIPEO_BASE_DIR", str(base))

    assert handler.get_system_prompt(config("prompt.txt")) == "from the file"


@pytest.mark.parametrize("variable", [None, ""])
def test_the_working_directory_is_the_base_without_either(
    base: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    """Without argument and variable, paths stand on the working directory."""
    if variable is not None:
        monkeypatch.setenv("DIPEO_BASE_DIR", variable)
    monkeypatch.chdir(base)

    handler = SystemPromptHandler()

    assert handler.get_system_prompt(config("prompt.txt")) == "from the file"
    assert handler.get_system_prompt(config("../secret.txt")) == "inline"


def test_a_home_directory_is_expanded_in_the_base(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base directory may begin with a tilde, as an argument and as a variable."""
    monkeypatch.setenv("HOME", str(base.parent))
    monkeypatch.setenv("DIPEO_BASE_DIR", "~/base")

    by_variable = SystemPromptHandler().get_system_prompt(config("prompt.txt"))
    by_argument = SystemPromptHandler("~/base").get_system_prompt(config("prompt.txt"))

    assert (by_variable, by_argument) == ("from the file", "from the file")


def test_a_home_directory_is_expanded_in_the_path(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt file may begin with a tilde, if home lies in the base directory."""
    monkeypatch.setenv("HOME", str(base / "sub"))

    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config("~/deep.txt")) == "from below"


def test_the_base_itself_may_be_a_link(base: Path, tmp_path: Path) -> None:
    """A base directory that is a symbolic link is as good as what it leads to."""
    (tmp_path / "link").symlink_to(base)

    handler = SystemPromptHandler(tmp_path / "link")

    assert handler.get_system_prompt(config("prompt.txt")) == "from the file"


# --- the jail


def _links(base: Path) -> None:
    (base / "file-link.txt").symlink_to(base.parent / "secret.txt")
    (base / "relative-link.txt").symlink_to("../secret.txt")
    (base / "dir-link").symlink_to(base.parent)
    (base / "chain.txt").symlink_to("file-link.txt")


OUTSIDE = [
    "../secret.txt",
    "sub/../../secret.txt",
    "../base-2/secret.txt",
    "{parent}/secret.txt",
    "{parent}/base-2/secret.txt",
    "{parent}/base/../secret.txt",
    "file-link.txt",
    "relative-link.txt",
    "chain.txt",
    "dir-link/secret.txt",
    "dir-link/base-2/secret.txt",
]
INSIDE = [
    ("./prompt.txt", "from the file"),
    ("sub/../prompt.txt", "from the file"),
    ("../base/prompt.txt", "from the file"),
    ("{parent}/base/prompt.txt", "from the file"),
    ("dir-link/base/prompt.txt", "from the file"),
    ("inner-link.txt", "from below"),
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_leads_out_of_the_base(
    base: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Neither dots, nor an absolute path, nor a link reaches a file outside."""
    _links(base)
    path = path.format(parent=base.parent)

    prompt = SystemPromptHandler(base).get_system_prompt(config(path))

    assert prompt == "inline"
    assert path in caplog.text
    assert "outside the base directory" in caplog.text


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_application_may_open_the_jail(base: Path, path: str) -> None:
    """With allow_outside_base_dir every one of these paths is read."""
    _links(base)
    handler = SystemPromptHandler(base, allow_outside_base_dir=True)

    prompt = handler.get_system_prompt(config(path.format(parent=base.parent)))

    assert prompt == "top secret"


@pytest.mark.parametrize(("path", "text"), INSIDE)
def test_every_way_to_a_file_inside_is_open(base: Path, path: str, text: str) -> None:
    """What counts is where a path ends, not how it gets there."""
    _links(base)
    (base / "inner-link.txt").symlink_to("sub/deep.txt")

    handler = SystemPromptHandler(base)

    assert handler.get_system_prompt(config(path.format(parent=base.parent))) == text


def test_a_file_that_becomes_a_link_outwards_is_no_longer_read(base: Path) -> None:
    """The jail is checked at every call, whatever was read before."""
    handler = SystemPromptHandler(base)
    before = handler.get_system_prompt(config("prompt.txt"))

    (base / "prompt.txt").unlink()
    (base / "prompt.txt").symlink_to(base.parent / "secret.txt")

    after = handler.get_system_prompt(config("prompt.txt"))
    assert (before, after) == ("from the file", "inline")


# --- files that cannot be used


def _bad_utf8(base: Path) -> None:
    (base / "bad.txt").write_bytes(b"\xe9t\xe9")


def _utf16(base: Path) -> None:
    (base / "bad.txt").write_bytes("x".encode("utf-16"))


def _loop(base: Path) -> None:
    (base / "bad.txt").symlink_to("other.txt")
    (base / "other.txt").symlink_to("bad.txt")


def _dangling(base: Path) -> None:
    (base / "bad.txt").symlink_to("nowhere.txt")


def _too_long(base: Path) -> None:
    (base / "bad.txt").write_bytes(b"x" * 101)


@pytest.mark.parametrize(
    ("make", "path", "reason"),
    [
        (None, "bad.txt", "No such file"),
        (None, "missing/bad.txt", "No such file"),
        (None, "prompt.txt/bad.txt", "Not a directory"),
        (None, "sub", "(?i)is a directory"),
        (None, ".", "(?i)is a directory"),
        (_bad_utf8, "bad.txt", "not UTF-8"),
        (_utf16, "bad.txt", "not UTF-8"),
        (_loop, "bad.txt", "(?i)symlink loop|symbolic links"),
        # From Python 3.13 on a loop is found where it is opened: it is no folder.
        (_loop, "bad.txt/prompt.txt", "(?i)symlink loop|symbolic links|a directory"),
        (_dangling, "bad.txt", "No such file"),
        (_too_long, "bad.txt", "larger than 100 bytes"),
        (None, "x" * 5000, "name too long"),
        (None, "bad\0.txt", "null (byte|character)"),
        (None, "~no-such-user-here/bad.txt", "home directory|No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_stood_in_for(
    base: Path,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Path], None] | None,
    path: str,
    reason: str,
) -> None:
    """The inline prompt stands in, and one warning names the path and the reason."""
    if make is not None:
        make(base)
    handler = SystemPromptHandler(base, max_bytes=100)

    prompt = handler.get_system_prompt(config(path, "my private prompt"))

    (record,) = caplog.records
    message = record.getMessage()
    assert prompt == "my private prompt"
    assert (record.levelno, record.name) == (logging.WARNING, "dipeo_llm")
    assert repr(path) in message
    assert pytest.RaisesExc(ValueError, match=reason).matches(ValueError(message))
    assert "my private prompt" not in message
    assert message.isprintable()


@pytest.mark.parametrize("path", [b"prompt.txt", 5, ["prompt.txt"], {"a": 1}, True])
def test_what_is_no_path_is_stood_in_for(
    base: Path, caplog: pytest.LogCaptureFixture, path: Any
) -> None:
    """An application's own configuration may hold anything."""
    prompt = SystemPromptHandler(base).get_system_prompt(config(path))

    (record,) = caplog.records
    assert prompt == "inline"
    assert record.levelno == logging.WARNING
    assert repr(str(path)) in record.getMessage()
    assert type(path).__name__ in record.getMessage()


def test_without_an_inline_prompt_the_warning_says_that_there_is_none(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing file with nothing to stand in for it is no error, but it is logged."""
    prompt = SystemPromptHandler(base).get_system_prompt(config("missing.txt", None))

    assert prompt is None
    assert "speaks without a system prompt" in caplog.text


@pytest.mark.parametrize("inline", [None, "Be brief."])
@pytest.mark.parametrize("path", ["missing.txt", "../outside.txt"])
def test_a_file_that_cannot_be_read_may_be_an_error(
    base: Path, path: str, inline: str | None
) -> None:
    """A renamed file then fails the call, instead of changing who is speaking."""
    handler = SystemPromptHandler(base, on_missing="error")

    with pytest.raises(InvalidRequestError, match=re.escape(path)):
        handler.get_system_prompt(config(path, inline))
    assert handler.get_system_prompt(config(None, inline)) == inline


def test_what_a_missing_file_means_is_one_of_two_words() -> None:
    """A misspelt word is refused when the handler is made."""
    with pytest.raises(ValueError, match="'fallback' or 'error'"):
        SystemPromptHandler(on_missing="raise")  # type: ignore[arg-type]


async def test_the_settings_say_what_a_missing_file_means(
    base: Path, keys: StaticAPIKeys, server: ProviderServer
) -> None:
    """The service's own handler takes it from them, and sends nothing."""
    settings = Settings(base_dir=base, missing_prompt="error")
    person = PersonLLMConfig(
        model="gpt-4o", api_key_id="openai", prompt_file="missing.txt"
    )
    said = [Message(from_person_id="a", to_person_id="b", content="Hello?")]

    async with LLMInfraService(keys, settings=settings) as service:
        with pytest.raises(InvalidRequestError, match=r"missing\.txt"):
            await service.complete_with_person(said, "b", person)

    assert server.requests == []


def test_a_missing_base_directory_is_no_error(tmp_path: Path) -> None:
    """A base directory that does not exist holds no file; the inline prompt counts."""
    handler = SystemPromptHandler(tmp_path / "nowhere")

    assert handler.get_system_prompt(config("prompt.txt")) == "inline"


def open_files() -> list[str]:
    """Return the numbers of the files that this process has open."""
    return sorted(entry.name for entry in Path("/dev/fd").iterdir())


@pytest.mark.parametrize("path", ["prompt.txt", "sub", "missing.txt", "big.txt"])
def test_no_file_stays_open(base: Path, path: str) -> None:
    """Whether a file can be used or not, nothing of it is left open."""
    (base / "big.txt").write_bytes(b"x" * 101)
    handler = SystemPromptHandler(base, max_bytes=100)
    before = open_files()

    handler.get_system_prompt(config(path))

    assert open_files() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_holds_nobody(base: Path) -> None:
    """A named pipe that nobody writes to is refused at once, not waited for."""
    os.mkfifo(base / "pipe.txt")
    found: list[str | None] = []
    thread = threading.Thread(
        target=lambda: found.append(
            SystemPromptHandler(base).get_system_prompt(config("pipe.txt"))
        ),
        daemon=True,
    )

    thread.start()
    thread.join(10)

    assert found == ["inline"]


# --- what a file may hold


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Grüße, 你好 🌍".encode(), "Grüße, 你好 🌍"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b" kept \r\n as it is\n\n", " kept \r\n as it is\n\n"),
        (b"null \0 byte", "null \0 byte"),
    ],
)
def test_a_file_is_utf8_and_is_kept_as_it_is(
    base: Path, data: bytes, text: str
) -> None:
    """UTF-8 is read with or without its mark, and not a space is changed."""
    (base / "prompt.txt").write_bytes(data)

    assert SystemPromptHandler(base).get_system_prompt(config("prompt.txt")) == text


@pytest.mark.parametrize(("size", "read"), [(99, True), (100, True), (101, False)])
def test_the_limit_is_the_largest_size_that_is_read(
    base: Path, size: int, read: bool
) -> None:
    """A file of exactly max_bytes is read, one byte more is too much."""
    (base / "prompt.txt").write_bytes(b"x" * size)
    handler = SystemPromptHandler(base, max_bytes=100)

    prompt = handler.get_system_prompt(config("prompt.txt"))

    assert prompt == ("x" * size if read else "inline")


def test_the_limit_counts_bytes_and_not_characters(base: Path) -> None:
    """Sixty letters of two bytes each are more than a hundred bytes."""
    (base / "prompt.txt").write_text("é" * 60, encoding="utf-8")
    handler = SystemPromptHandler(base, max_bytes=100)

    assert handler.get_system_prompt(config("prompt.txt")) == "inline"


# --- reading once


def reads(call: Callable[[], object]) -> int:
    """Count the reads of a file that a call makes in this thread."""
    count = 0

    def watch(frame: FrameType, event: str, function: Any) -> None:
        nonlocal count
        if event == "c_call" and function.__name__ in {"read", "readall", "readinto"}:
            count += isinstance(function.__self__, (io.IOBase, type(os)))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def wait_for_the_file_systems_clock(path: Path) -> None:
    """Wait the few milliseconds after which a change has another time than before."""
    probe = path.with_suffix(".probe")
    probe.touch()
    while probe.stat().st_ctime_ns <= path.stat().st_ctime_ns:
        probe.touch()


def test_an_unchanged_file_is_read_once(base: Path) -> None:
    """A second call for a file that has not changed does not read it again."""
    handler = SystemPromptHandler(base)

    first = reads(lambda: handler.get_system_prompt(config("prompt.txt")))
    again = reads(lambda: handler.get_system_prompt(config("./prompt.txt")))

    assert first > 0
    assert again == 0
    assert handler.get_system_prompt(config("prompt.txt")) == "from the file"


def test_an_edited_file_is_seen(base: Path) -> None:
    """A change shows at the next call, even of the same length and with the old time."""
    path = base / "prompt.txt"
    handler = SystemPromptHandler(base)
    wait_for_the_file_systems_clock(path)
    seen = [handler.get_system_prompt(config("prompt.txt"))]
    before = path.stat()

    path.write_text("From The File")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.append(handler.get_system_prompt(config("prompt.txt")))
    path.write_text("and now longer than before")
    seen.append(handler.get_system_prompt(config("prompt.txt")))

    assert seen == ["from the file", "From The File", "and now longer than before"]


def test_a_replaced_file_is_seen(base: Path) -> None:
    """An editor that writes a new file and renames it into place is noticed."""
    handler = SystemPromptHandler(base)
    handler.get_system_prompt(config("prompt.txt"))
    old = (base / "prompt.txt").stat()

    (base / "new.txt").write_text("FROM THE FILE")
    os.utime(base / "new.txt", ns=(old.st_atime_ns, old.st_mtime_ns))
    (base / "new.txt").replace(base / "prompt.txt")

    assert handler.get_system_prompt(config("prompt.txt")) == "FROM THE FILE"


def test_a_file_that_goes_and_comes_is_followed(base: Path) -> None:
    """A deleted file is stood in for at once, and used again when it is back."""
    handler = SystemPromptHandler(base)
    seen = [handler.get_system_prompt(config("prompt.txt"))]

    (base / "prompt.txt").unlink()
    seen.append(handler.get_system_prompt(config("prompt.txt")))
    (base / "prompt.txt").write_text("back")
    seen.append(handler.get_system_prompt(config("prompt.txt")))

    assert seen == ["from the file", "inline", "back"]


def test_a_bad_file_that_is_mended_is_used(base: Path) -> None:
    """A file that could not be used is tried again."""
    handler = SystemPromptHandler(base)
    (base / "prompt.txt").write_bytes(b"\xff")
    before = handler.get_system_prompt(config("prompt.txt"))

    (base / "prompt.txt").write_bytes(b"ok")

    after = handler.get_system_prompt(config("prompt.txt"))
    assert (before, after) == ("inline", "ok")


# --- the role


class _Service(Enum):
    OPENAI = "openai"
    CLAUDE = "anthropic"


@pytest.mark.parametrize(
    ("service", "role"),
    [
        (LLMService.OPENAI, "developer"),
        ("openai", "developer"),
        ("OpenAI", "developer"),
        (_Service.OPENAI, "developer"),
        (LLMService.ANTHROPIC, "system"),
        (LLMService.GOOGLE, "system"),
        (LLMService.GEMINI, "system"),
        (LLMService.OLLAMA, "system"),
        (LLMService.BEDROCK, "system"),
        (LLMService.VERTEX, "system"),
        (LLMService.DEEPSEEK, "system"),
        (_Service.CLAUDE, "system"),
        ("groq", "system"),
    ],
    ids=repr,
)
def test_only_openai_has_a_role_of_its_own(service: Any, role: str) -> None:
    """A system prompt is "developer" to OpenAI and "system" to everybody else."""
    assert SystemPromptHandler().get_system_role(service) == role
