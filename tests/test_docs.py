"""The README and the pages of docs/: their examples run, and what they list is true.

`python -m tests.test_docs` writes the README's table of measurements from the pages that
hold the figures.
"""

import ast
import asyncio
import dataclasses
import inspect
import json
import re
import runpy
import shlex
from collections.abc import Iterable
from importlib.metadata import metadata
from pathlib import Path

import click
import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser

import dipeo_llm
from dipeo_llm import (
    DiPeOLLMError,
    EnvironmentAPIKeys,
    LLMInfraService,
    Settings,
    cli,
    testing,
)
from dipeo_llm.adapters import factory
from dipeo_llm.adapters.factory import PROVIDERS
from dipeo_llm.cli.command import dipeo_llm as program
from tests.conftest import HELLO, keys_for
from tests.conftest import PROVIDERS as SERVED
from tests.provider_server import Answer, ProviderServer, Received, error

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
SETTINGS = DOCS / "settings.md"
ERRORS = DOCS / "errors.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
LITELLM = ROOT / "docs" / "litellm.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {page: page.read_text("utf-8") for page in PAGES}
OTHERS = ("groq", "mistral")
"""Providers of the examples beside those that the server is made for."""
WITH_EXAMPLES = [page for page, text in TEXTS.items() if "```python\n" in text]


def name_of(page: object) -> str:
    """Name a page in the id of a test."""
    return page.name if isinstance(page, Path) else ""


def run_examples(page: Path) -> int:
    """Run a page's Python examples in order, in one namespace; say how many ran.

    An example may await, as in a coroutine, and finds an open `service`.
    """

    def evaluate(example: Example) -> None:
        source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, example.path, "exec", flags)
        awaited = eval(code, example.namespace)
        if code.co_flags & inspect.CO_COROUTINE:
            runner.run(awaited)

    document = Document.parse(str(page), CodeBlockParser("python", evaluate))
    examples = list(document)
    with asyncio.Runner() as runner:
        service = LLMInfraService(EnvironmentAPIKeys())
        document.namespace["service"] = service
        try:
            for example in examples:
                example.evaluate()
        finally:
            runner.run(service.aclose())
    return len(examples)


def table(page: Path, head: str) -> dict[str, list[str]]:
    """Read the table whose first column is called *head*: first cell to the others."""
    lines = rf"^\| {head} \|.*\n\| ---.*\n((?:\|.*\n)+)"
    (found,) = re.findall(lines, TEXTS[page], re.MULTILINE)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in found.splitlines()
    ]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def leading_to_the_server(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> ProviderServer:
    """Set the environment so that the examples, as they are, ask the server."""
    monkeypatch.chdir(ROOT)
    for provider in SERVED:
        name = f"DIPEO_LLM_{provider.upper()}_BASE_URL"
        monkeypatch.setenv(name, server.base_url(provider))
    for provider in OTHERS:
        name = f"DIPEO_LLM_{provider.upper()}_BASE_URL"
        monkeypatch.setenv(name, server.base_url("openai"))
    for provider in ("openai", "anthropic", "gemini", *OTHERS):
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", f"sk-{provider}")
    monkeypatch.setenv("TEAM_KEY", "sk-team")
    monkeypatch.setenv("TEAM_URL", server.base_url("openai"))
    # The server stands for the providers, which need a key; one on this machine does not.
    monkeypatch.setattr(factory, "is_loopback", lambda host: False)
    server.default = as_asked
    return server


def as_asked(request: Received) -> Answer:
    """Answer as a model would: with tool calls, with JSON, or with a sentence."""
    asked = str(request.json)
    if "'forecast'" in asked and "'role': 'tool'" not in asked:
        day = {"city": "Bonn", "day": "2026-11-26"}
        return Answer(tool_calls=[("forecast", day), ("book", {"city": "Bonn"})])
    if "web_search" in asked:
        return Answer(citations=[("https://example.test/", "The match")])
    if "'message_ids'" in asked:
        return Answer(text='{"message_ids": ["m2"]}')
    if "'decision'" in asked:
        return Answer(text='{"decision": true}')
    if "length_km" in asked:
        river = {"name": "Inn", "length_km": 517}
        return Answer(
            text=json.dumps({"value": [river]} if "'value'" in asked else river)
        )
    return Answer()


FENCES = {
    "python": "runs here",
    "py": "runs in tests/test_pytest_plugin.py, and is on the page that says so",
    "console": "commands; those of this package and of nox are tried below",
    "sh": "as console",
    "text": "what is printed",
    "yaml": "a recording, or a job of CI",
    "ini": "a file beside the program",
    "diff": "lines that change",
    "{toctree}": "the site's navigation",
}
"""What a block of code may be, and how it is held true."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_is_held_by_something(page: Path) -> None:
    """No Python hides in a block that nothing runs."""
    fences = re.findall(r"^ *```(\S*)$", TEXTS[page], re.MULTILINE)
    used = set(fences[::2])

    assert len(fences) % 2 == 0
    assert used <= FENCES.keys()
    assert "py" not in used or page.name == "testing.md"


@pytest.mark.usefixtures("leading_to_the_server")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
async def test_the_examples_of_a_page_run_as_they_are(page: Path) -> None:
    """A reader who copies an example gets what the page says, and not an error."""
    if "from fastapi import" in TEXTS[page]:
        pytest.importorskip("fastapi")
    if "opentelemetry" in TEXTS[page]:
        pytest.importorskip("opentelemetry.exporter.prometheus")
    ran = await asyncio.to_thread(run_examples, page)

    assert ran == TEXTS[page].count("```python\n")


async def test_the_examples_of_model_names_ask_every_provider(
    leading_to_the_server: ProviderServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model string is all that leads to another provider."""
    await asyncio.to_thread(run_examples, DOCS / "model-names.md")

    asked = {request.provider for request in leading_to_the_server.requests}
    assert asked == set(SERVED)
    assert "ollama Hello from the loopback." in capsys.readouterr().out


async def test_the_log_lines_of_the_page_are_those_of_a_call(
    server: ProviderServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A line for the retry, then one for the call; only numbers and ids differ."""
    caplog.set_level("INFO", "dipeo_llm.calls")
    server.reply(error("openai", 429), Answer())
    settings = Settings(max_retries=3, retry_wait=0)
    async with LLMInfraService(keys_for(server), settings=settings) as service:
        await service.complete(HELLO, "gpt-4.1-nano", "openai")

    def plain(lines: Iterable[str]) -> list[str]:
        return [re.sub(r"(?<=request )\S+|\d+\.\d+", "…", line) for line in lines]

    shown = re.search(r"```text\n(openai/.*?)```", TEXTS[DOCS / "usage.md"], re.DOTALL)
    assert shown is not None
    assert plain(caplog.messages) == plain(shown[1].splitlines())


async def test_the_tool_loop_of_the_page_tells_the_model_what_happened(
    leading_to_the_server: ProviderServer,
) -> None:
    """An async tool gets a date, and the exception of another is told to the model."""
    await asyncio.to_thread(run_examples, DOCS / "tools.md")

    told = [
        message["content"]
        for request in leading_to_the_server.requests
        for message in request.json.get("messages", ())
        if message["role"] == "tool"
    ]
    assert told == ["sunny in Bonn on Thursday", "error: no room in Bonn"]


PEERS = ("**dipeo_llm, direct engine**", "litellm.acompletion", "OpenAI SDK")
FIGURES = [
    ("CPU of a call, µs", "### CPU of one call", 0),
    ("CPU of a streamed chunk, µs", "### CPU of one call", 2),
    ("calls a second on one core, 64 in flight", "### On one core", 1),
    ("CPU until the first answer, imports included, s", "### Before the first", 0),
    ("memory after the first answer, MiB", "### Before the first", 2),
]
"""Rows of the README's table, and where docs/performance.md has the figures."""
WHY, END_OF_WHY = "<!-- why -->", "<!-- /why -->"


def why() -> str:
    """Write the README's table of measurements from the pages that hold them."""
    lines = ["| | dipeo_llm | LiteLLM by itself | OpenAI SDK |", "| --- " * 4 + "|"]
    for name, heading, column in FIGURES:
        _, _, section = TEXTS[PERFORMANCE].partition(f"\n{heading}")
        rows = {
            cells[0].strip(): cells[1:]
            for line in section.partition("\n### ")[0].splitlines()
            if len(cells := line.strip("|").split("|")) > 1
        }
        values = (rows[peer][column].partition("±")[0].strip() for peer in PEERS)
        lines.append(f"| {name} | {' | '.join(values)} |")
    cells = [cell for row in table(LITELLM, "fault").values() for cell in row]
    untold = sum("taken for an answer" in cell for cell in cells)
    lines.append(
        f"| broken answers that pass for an answer, of {len(cells)} kinds | 0 | {untold}"
        " | not measured |"
    )
    return "\n".join(lines)


def test_the_readme_has_the_measured_figures() -> None:
    """The table that says why holds what docs/performance.md and litellm.md say."""
    published = TEXTS[README].partition(WHY)[2].partition(END_OF_WHY)[0].strip()

    assert published == why(), "write it again: python -m tests.test_docs"


def test_the_page_lists_every_setting_with_its_default() -> None:
    """No setting is hidden, and no default has changed unseen."""
    listed = {
        name.strip("`"): ast.literal_eval(default.strip("`"))
        for name, (default, _) in table(SETTINGS, "field").items()
    }

    defaults = Settings()
    fields = [field.name for field in dataclasses.fields(Settings)]
    assert listed == {name: getattr(defaults, name) for name in fields}


def test_the_page_lists_every_variable_that_is_read() -> None:
    """Each variable that has a say is in the table, with the address that it replaces."""
    read: set[str] = set()

    class Environment(dict[str, str]):
        def get(self, name: str, default: str = "") -> str:  # type: ignore[override]
            read.add(name)
            return default

    Settings.from_env(Environment())
    read.update(name for row in PROVIDERS for name in row.key_variables)

    listed = table(SETTINGS, "variable")
    named = {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}
    assert read - named == set()
    for row in PROVIDERS:
        if cells := listed.get(f"`DIPEO_LLM_{row.name.upper()}_BASE_URL`"):
            assert cells[0] == f"`{row.base_url}`"


def test_the_page_lists_every_error_and_whether_it_is_tried_again() -> None:
    """Who catches errors by the table misses none."""
    listed = {
        name.strip("`"): cells[-1] for name, cells in table(ERRORS, "error").items()
    }

    errors = [
        getattr(dipeo_llm, name)
        for name in dipeo_llm.__all__
        if name.endswith("Error") and name != DiPeOLLMError.__name__
    ]
    retried = {e.__name__: getattr(e, "default_retryable", False) for e in errors}
    assert listed == {name: "yes" if yes else "no" for name, yes in retried.items()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_links_to_what_is_there(page: Path) -> None:
    """No link of a page to another file leads nowhere."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXTS[page])

    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    """Who looks for the test of a claim finds it, in the module that is named."""
    tests = {p.stem: p.read_text("utf-8") for p in (ROOT / "tests").glob("*.py")}
    module = "\n".join(tests.values())
    missing = []
    for name in re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?`", TEXTS[page]):
        if name in tests:
            module = tests[name]
        elif f"def {name}(" not in module:
            missing.append(name)

    assert missing == []


def commands_of(group: click.Group, name: str = "") -> dict[str, click.Command]:
    """Return the commands of a group and of the groups in it, by what is typed."""
    found: dict[str, click.Command] = {}
    for part, command in group.commands.items():
        found[f"{name}{part}"] = command
        if isinstance(command, click.Group):
            found |= commands_of(command, f"{name}{part} ")
    return found


def test_the_commands_of_the_pages_and_the_help_are_ones_that_exist() -> None:
    """A command that is copied from a page or the help is understood."""
    commands = commands_of(program)
    helps = [command.epilog or "" for command in (program, *commands.values())]
    line = r"^ *(?:[^`|\n]*\| )?(?:\w+=\S+ )?dipeo-llm (.+)$"
    lines = re.findall(line, "\n".join([*TEXTS.values(), *helps]), re.MULTILINE)

    shown = set()
    for typed in (re.sub(r"[<>] \S+", "", rest) for rest in lines if rest[0] != "-"):
        name = max((c for c in commands if f"{typed} ".startswith(f"{c} ")), key=len)
        commands[name].make_context(name, shlex.split(typed.removeprefix(name)))
        shown.add(name)

    assert shown >= commands.keys() - {"cassettes"}


def test_the_page_and_the_help_tell_every_exit_code() -> None:
    """A script can be written from either."""
    text = " ".join(TEXTS[DOCS / "command.md"].split())
    sentence = text[text.index("the exit code is 0") :].split(". ")[0]

    codes = {int(code) for code in re.findall(r"\b\d+\b", sentence)}
    told = re.findall(r"^  (\d+) ", program.epilog or "", re.MULTILINE)
    assert codes == {int(code) for code in told} == {int(code) for code in cli.Exit}


def test_the_nox_sessions_that_are_named_exist() -> None:
    """The commands that the pages give for the demo, the tests and the checks work."""
    noxfile = (ROOT / "noxfile.py").read_text("utf-8")
    defined = re.findall(r"^@nox\.session.*\ndef (\w+)", noxfile, re.MULTILINE)

    named = set(re.findall(r"nox -s (\w+)", "\n".join(TEXTS.values())))
    assert {"demo", "tests"} <= named <= set(defined)


def test_the_extras_that_are_named_exist() -> None:
    """What a page tells to install is there."""
    named = set(re.findall(r"dipeo-llm\[(\w+)\]", "\n".join(TEXTS.values())))

    extras = metadata("dipeo-llm").get_all("Provides-Extra")
    assert named == set(extras or ())


def test_the_architecture_page_shows_every_module() -> None:
    """The tree has no module that is gone, and lacks none."""
    (tree,) = re.findall(
        r"```text\ndipeo_llm/\n(.*?)```", TEXTS[ARCHITECTURE], re.DOTALL
    )
    shown, folder = set(), ""
    for name in re.findall(r"^ +(\S+)", tree, re.MULTILINE):
        if name.endswith("/"):
            folder = name
        else:
            shown.add(f"{folder}{name}")

    package = ROOT / "dipeo_llm"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert shown == {name for name in modules if not name.endswith("__init__.py")}


def test_the_path_of_a_call_names_methods_in_the_order_of_the_source() -> None:
    """A reader who follows the table reads each module downwards."""
    rows = re.findall(
        r"^\| `([\w.]+)` \| `(\w+)` \|", TEXTS[ARCHITECTURE], re.MULTILINE
    )
    lines: dict[str, list[int]] = {}
    for module, method in rows:
        path = ROOT / "dipeo_llm" / f"{module.replace('.', '/')}.py"
        found = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == method
        ]
        assert found, f"{module}.{method}"
        lines.setdefault(module, []).append(max(found))

    assert len(rows) > 15
    assert lines["service"] == sorted(lines["service"])


def test_the_site_has_every_page_and_every_public_name() -> None:
    """A page is in the navigation, and a name in the reference, each once."""
    lists = re.findall(r"```{toctree}\n(.*?)```", TEXTS[DOCS / "index.md"], re.DOTALL)
    entries = [e for text in lists for e in text.splitlines() if e and e[0] != ":"]
    listed = [page for e in entries for page in (match(e) if "*" in e else [e])]
    pages = {p.relative_to(DOCS).with_suffix("").as_posix() for p in sources()}
    assert sorted(listed) == sorted(pages - {"index"})

    directives = [
        name
        for path in (DOCS / "api").glob("*.rst")
        for name in re.findall(
            r"^\.\. auto\w+:: (\S+)", path.read_text("utf-8"), re.MULTILINE
        )
    ]
    public = {f"dipeo_llm.{name}" for name in dipeo_llm.__all__}
    public |= {f"dipeo_llm.testing.{name}" for name in testing.__all__}
    assert public - set(directives) == set()
    assert len(directives) == len(set(directives))


def sources() -> list[Path]:
    """Return the sources of the site's pages."""
    return [*DOCS.glob("*.md"), *DOCS.glob("api/*.rst")]


def match(pattern: str) -> list[str]:
    """Return the pages that a pattern of the navigation stands for."""
    return [path.stem for path in DOCS.glob(f"{pattern}.md")]


def test_the_picture_is_what_its_source_draws() -> None:
    """The path of a call in the picture is the one in the table below it."""
    picture = runpy.run_path(str(DOCS / "call_path.py"))

    assert (DOCS / "call-path.svg").read_text("utf-8") == picture["draw"]()
    shown = [method for _, _, methods in picture["STEPS"] for method in methods.split()]
    table = re.findall(r"^\| `[\w.]+` \| `(\w+)` \|", TEXTS[ARCHITECTURE], re.MULTILINE)
    assert shown == [method for method in table if method in shown]


if __name__ == "__main__":
    before, _, rest = TEXTS[README].partition(WHY)
    after = rest.partition(END_OF_WHY)[2]
    README.write_text(f"{before}{WHY}\n{why()}\n{END_OF_WHY}{after}", "utf-8")
