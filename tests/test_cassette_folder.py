"""Checking and listing folders of cassettes."""

import gzip
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from dipeo_llm.cli import main
from dipeo_llm.testing.cassette_folder import check, entries, list_table

OURS = Path(__file__).parent.parent / "cassettes"
HEAD = """\
# Recorded from: llama.cpp b1
# on 2020-01-02 by dipeo_llm 0.0.1 on litellm 1.100.0
# again with: something
"""


def write(
    path: Path,
    *,
    uri: str = "https://api.openai.com/v1/chat/completions",
    sent: str | bytes = '{"model": "gpt-4.1-nano"}',
    came: str | bytes = "{}",
    headers: dict[str, list[str]] | None = None,
    sent_headers: dict[str, list[str]] | None = None,
    recorded: dict[str, str] | None = None,
    head: str = "",
    tail: str = "",
    method: str = "POST",
    message: str = "OK",
) -> None:
    """Write a cassette as vcrpy would, without scrubbing."""
    response = {
        "status": {"code": 200, "message": message},
        "headers": headers or {},
        "body": {"string": came},
        **({"recorded": recorded} if recorded else {}),
    }
    request = {
        "method": method,
        "uri": uri,
        "body": sent,
        "headers": sent_headers or {},
    }
    data = {"interactions": [{"request": request, "response": response}], "version": 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + yaml.safe_dump(data) + tail, encoding="utf-8")


def run(*arguments: str) -> int:
    """Run `dipeo-llm cassettes …` in this process."""
    return main(["cassettes", *arguments])


def writing_end(pipe: Path) -> int:
    """Open a named pipe as soon as somebody reads from it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    pytest.fail("nobody reads from the pipe")


KEY = "sk-abcdefghijklmnop1234"
PLANTS = {
    "URL: an API key": {"uri": f"https://host/{KEY}"},
    "URL: a credential in a URL": {"uri": "https://host/?key=short"},
    "request: an API key": {"sent": f'{{"content": "{KEY}"}}'},
    "answer: an API key": {"came": f'{{"content": "{KEY}"}}'},
    "answer: a key of this run": {"came": "it is a-key-of-the-environment"},
    "answer: the id of an organisation": {"came": "org-abcdefghij0123456789"},
    "answer, over several events: an API key": {
        "came": f'data: {{"c": "{KEY[:9]}"}}\n\ndata: {{"c": "{KEY[9:]}"}}\n\n'
    },
    "request header Authorization: a header": {
        "sent_headers": {"Authorization": ["anything"]}
    },
    "header Set-Cookie: a header that is not to be kept": {
        "headers": {"Set-Cookie": ["a=b"]}
    },
    "header x-request-id: a header": {"headers": {"x-request-id": ["abc"]}},
    "status: an API key": {"message": KEY},
    "method: an API key": {"method": KEY},
    "recorded: an API key": {"recorded": {"at": "2020-01-02", "by": KEY}},
    "line 1: an API key": {"head": f"# made with {KEY}\n"},
    "line 15: an API key": {"tail": f"# made with {KEY}\n"},
    "line 15: a key of this run": {"tail": "note: 'a-key-of-the-environment'\n"},
    "answer: it is compressed, and cannot be looked into": {
        "came": b"\x28\xb5\x2f\xfd and what no one can read"
    },
}


@pytest.mark.parametrize("problem", PLANTS)
def test_what_must_not_be_kept_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    """The problem names the place and not the value."""
    monkeypatch.setenv("GROQ_API_KEY", "a-key-of-the-environment")
    write(tmp_path / "deep" / "down.yaml", **PLANTS[problem])  # type: ignore[arg-type]

    found = [str(each) for each in check(tmp_path)]

    assert len(found) == 1
    assert problem in found[0]
    assert "down.yaml" in found[0]
    assert KEY not in found[0]
    assert "a-key-of-the-environment" not in found[0]


def test_a_secret_in_binary_is_found(tmp_path: Path) -> None:
    """YAML writes binary data as Base64."""
    write(tmp_path / "a.yaml", came=b"\xff\xfe " + KEY.encode())
    assert KEY not in (tmp_path / "a.yaml").read_text("utf-8")

    assert len(check(tmp_path)) == 1


def test_a_secret_in_gzip_is_found(tmp_path: Path) -> None:
    """With and without a header that says so."""
    packed = gzip.compress(KEY.encode())
    write(tmp_path / "a.yaml", sent=packed, came=packed)
    write(tmp_path / "b.yaml", came=packed, headers={"content-encoding": ["gzip"]})

    assert [problem.what for problem in check(tmp_path)] == [
        "exchange 1, request: an API key",
        "exchange 1, answer: an API key",
        "exchange 1, answer: an API key",
    ]


def test_json_is_searched(tmp_path: Path) -> None:
    """Other JSON is only a problem if it has a key."""
    write(tmp_path / "a.yaml", came=f'data: {{"c": "{KEY[:9]}"}}\n\n' * 2)
    came = f'data: {{"c": "{KEY[:9]}"}}\n\ndata: {{"c": "{KEY[9:]}"}}\n\n'
    write(tmp_path / "b.yaml", came=came)
    data = yaml.safe_load((tmp_path / "b.yaml").read_text("utf-8"))
    (tmp_path / "b.yaml").unlink()
    # An emoji is two escapes in JSON, which YAML does not take.
    data["interactions"][0]["request"]["body"] = "🌍"
    (tmp_path / "b.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([{"note": KEY}]), encoding="utf-8")
    (tmp_path / "d.json").write_text('{"note": 1}', encoding="utf-8")
    (tmp_path / "e.json").write_text("{", encoding="utf-8")

    found = [(p.path.name, p.what) for p in check(tmp_path)]

    assert found == [
        ("b.json", "exchange 1, answer, over several events: an API key"),
        ("c.json", "line 1: an API key"),
    ]
    assert len(check(tmp_path / "c.json")) == 1


def test_a_clean_folder_has_no_problem(tmp_path: Path) -> None:
    """Files without secrets, and files that are not cassettes by their name, pass."""
    write(tmp_path / "a.yaml", headers={"content-type": ["application/json"]})
    (tmp_path / "notes.txt").write_text(KEY, encoding="utf-8")

    assert check(tmp_path) == []


def test_an_invalid_cassette_is_a_problem(tmp_path: Path) -> None:
    """A file that cannot be read may hold anything."""
    (tmp_path / "a.yml").write_text("- just\n- a list\n", encoding="utf-8")

    (problem,) = check(tmp_path)

    assert "a.yml contains no cassette" in str(problem)


def test_the_command_tells_a_script_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 for a clean folder, 1 for one with a secret, one line for each."""
    write(tmp_path / "a.yaml")
    clean = run("check", str(tmp_path))
    write(tmp_path / "b.yaml", sent=KEY, came=KEY)
    dirty = run("check", str(tmp_path))

    out, err = capsys.readouterr()
    assert (clean, dirty) == (0, 1)
    assert len(out.splitlines()) == 2
    assert err.splitlines() == [
        "dipeo-llm: 1 cassette, no secret found",
        "dipeo-llm: 2 cassettes, 2 problems",
    ]


def test_one_problem_is_counted_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The summary is a sentence for any number."""
    write(tmp_path / "a.yaml", sent=KEY)

    run("check", str(tmp_path))

    assert capsys.readouterr().err == "dipeo-llm: 1 cassette, 1 problem\n"


@pytest.mark.parametrize("action", ["check", "list"])
def test_a_folder_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    """A misspelt path does not pass as a clean folder."""
    code = run(action, str(tmp_path / "nothing"))

    assert code == 1
    assert capsys.readouterr().err.startswith("dipeo-llm: there is no folder ")


def test_without_vcrpy_the_command_says_what_to_install(tmp_path: Path) -> None:
    """The message names the extra to install, and there is no traceback."""
    program = (
        "import sys; sys.modules['vcr'] = None; from dipeo_llm.cli import main;"
        " sys.exit(main(['cassettes', 'check', sys.argv[1]]))"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )

    said = (
        "dipeo-llm: cassettes need vcrpy and pytest: pip install 'dipeo-llm[testing]'\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", said)


def test_ctrl_c_ends_a_check_at_once(tmp_path: Path) -> None:
    """A folder that takes long to read need not be read to its end."""
    slow = tmp_path / "slow.yaml"
    os.mkfifo(slow)
    process = subprocess.Popen(
        [sys.executable, "-m", "dipeo_llm", "cassettes", "check", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    writing = writing_end(slow)

    process.send_signal(signal.SIGINT)
    try:
        got = process.communicate(timeout=20)
    finally:
        os.close(writing)
        process.kill()
        process.communicate()

    assert (process.returncode, *got) == (130, b"", b"")


def test_the_table_shows_what_is_oldest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line has the model, the host, the age and the versions."""
    day = datetime.now(UTC) - timedelta(days=3)
    recorded = {"at": f"{day:%Y-%m-%dT%H:%M:%SZ}", "by": "dipeo_llm 0.1.0 on litellm 1"}
    write(tmp_path / "new.yaml", recorded=recorded)
    write(tmp_path / "sub" / "old.yaml", head=HEAD)
    gemini = "https://generativelanguage.googleapis.com/v1beta/models/gemini-x:generate"
    write(tmp_path / "unknown.yaml", uri=gemini, sent="{}")

    code = run("list", str(tmp_path))

    head, *rows = [
        re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()
    ]
    assert code == 0
    assert head == ["cassette", "calls", "model", "from", "recorded", "days", "by"]
    assert [row[0] for row in rows] == ["unknown", "sub/old", "new"]
    assert rows[0][1:] == ["1", "gemini-x", gemini.split("/")[2], "?", "?", "?"]
    assert rows[1][2:5] == ["gpt-4.1-nano", "llama.cpp b1", "2020-01-02"]
    assert rows[1][6] == "dipeo_llm 0.0.1 on litellm 1.100.0"
    assert rows[2][3:] == [
        "api.openai.com",
        f"{day:%Y-%m-%d}",
        "3",
        "dipeo_llm 0.1.0 on litellm 1",
    ]


def test_a_file_that_cannot_be_listed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One broken file is not a traceback."""
    (tmp_path / "a.yaml").write_text("{", encoding="utf-8")

    code = run("list", str(tmp_path))

    assert code == 1
    assert "a.yaml contains no cassette" in capsys.readouterr().err


def test_a_table_cannot_drive_the_terminal(tmp_path: Path) -> None:
    """Control characters in the name of a model are escaped."""
    sent = json.dumps({"model": "a\x1b]0;mine\x07b\x9b31m"})
    write(tmp_path / "a.yaml", sent=sent)
    screen, terminal = pty.openpty()

    ended = subprocess.run(
        [sys.executable, "-m", "dipeo_llm", "cassettes", "list", tmp_path],
        stdout=terminal,
        stderr=subprocess.PIPE,
        check=False,
    )

    shown = os.read(screen, 4096).decode()
    os.close(terminal)
    os.close(screen)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert r"a\x1b]0;mine\x07b\x9b31m" in shown
    assert {c for c in shown if not c.isprintable()} == {"\r", "\n"}


@pytest.mark.parametrize("action", ["check", "list"])
def test_an_output_that_is_closed_is_a_failure_in_one_line(
    tmp_path: Path, action: str
) -> None:
    """A result that cannot be written is not a success."""
    write(tmp_path / "a.yaml", sent=KEY)
    command = 'exec "$0" -m dipeo_llm cassettes "$1" "$2" >&-'

    ended = subprocess.run(
        ["sh", "-c", command, sys.executable, action, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stderr) == (1, "dipeo-llm: stdout is closed\n")


def test_the_exit_code_counts_with_stderr_closed(
    tmp_path: Path,
) -> None:
    """With stderr closed, a clean folder is still clean."""
    write(tmp_path / "a.yaml")
    command = 'exec "$0" -m dipeo_llm cassettes check "$1" 2>&-'

    ended = subprocess.run(
        ["sh", "-c", command, sys.executable, tmp_path],
        stdout=subprocess.PIPE,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (0, b"")


def test_the_projects_own_cassettes_can_be_listed() -> None:
    """Each has an origin and a date, and a row in the table."""
    listed = entries(OURS)

    assert len(listed) == len(list(OURS.glob("*.yaml")))
    assert all(entry.origin and entry.recorded_at and entry.by for entry in listed)
    assert len(list_table(OURS).splitlines()) == len(listed) + 1
