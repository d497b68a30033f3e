"""The pytest plugin, as the test suite of somebody's project sees it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dipeo_llm.testing.cassette_folder import check
from dipeo_llm.testing.matching import VOLATILE
from tests.cassette_project import Project
from tests.provider_server import Answer, ProviderServer

pytest_plugins = ["pytester", "tests.cassette_project"]

GUIDE = Path(__file__).parent.parent / "docs" / "testing.md"

# --- from nothing to green -----------------------------------------------------------


def test_nothing_is_recorded_unless_it_is_asked_for(
    project: Project, alive: ProviderServer
) -> None:
    """A first run without a cassette fails, sends nothing, and says what to do."""
    result = project.run()

    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "no exchange of cassettes/test_app/test_greets.yaml answers this request:",
            "  POST loopback/v1/chat/completions, model gpt-4.1-nano: 'Greet Ann.'",
            "There is no such cassette yet.",
            '  pytest --llm-record=once "test_app.py::test_greets"',
        ]
    )
    assert alive.requests == []
    assert not (project.folder / "cassettes").exists()


def test_what_was_recorded_replays_without_server_and_key(recorded: Project) -> None:
    """One file for each test; replays need neither a network nor a key."""
    result = recorded.run("-W", "error")

    result.assert_outcomes(passed=3)
    files = sorted((recorded.folder / "cassettes").rglob("*.*"))
    assert [str(f.relative_to(recorded.folder)) for f in files] == [
        "cassettes/test_app/test_greets.yaml",
        "cassettes/test_app/test_greets_all.yaml",
    ]


def test_a_recording_holds_no_key(recorded: Project) -> None:
    """The key that recorded is in no file of the project."""
    texts = [f.read_text("utf-8") for f in recorded.folder.rglob("*.yaml")]

    assert len(texts) == 2
    assert not any("sk-real" in text or "uthorization" in text for text in texts)


def test_a_recording_replays_in_another_process(recorded: Project) -> None:
    """CI runs the tests in another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        result = recorded.pytester.runpytest_subprocess(
            "-p", "no:xdist", "--llm-record=all", timeout=120
        )

    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["dipeo-llm: --llm-record=all has no effect where CI*"])


@pytest.mark.parametrize("value", ["true", "1"])
def test_nothing_is_recorded_in_ci(
    project: Project, alive: ProviderServer, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """An option that was left in a script does not spend money there."""
    monkeypatch.setenv("CI", value)

    result = project.run("--llm-record=all")

    result.assert_outcomes(passed=1, failed=2)
    assert alive.requests == []


# --- drift ---------------------------------------------------------------------------

DRIFTS = {
    "prompt": (
        ("app.py", "Greet {name}.", "Greet {name}, please."),
        [
            "The nearest recorded request, exchange 1 of 1, differs in:",
            "  body.messages[[]0[]].content",
            "    recorded: 'Greet Ann.'",
            "    now:      'Greet Ann, please.'",
            '  pytest --llm-record=new "test_app.py::test_greets"',
        ],
    ),
    "tool": (
        (
            "app.py",
            "TOOLS = []",
            "TOOLS = [{'type': 'function', 'function': {'name': 'wave'}}]",
        ),
        [
            "  body.tools",
            "    recorded: (nothing)",
            '    now:      [[]{"*"name": "wave"*',
        ],
    ),
    "model": (
        ("app.py", "gpt-4.1-nano", "gpt-4.1-mini"),
        [
            "  body.model",
            "    recorded: 'gpt-4.1-nano'",
            "    now:      'gpt-4.1-mini'",
        ],
    ),
    "one call more": (
        ("test_app.py", '["Ann", "Bob"]', '["Ann", "Bob", "Ann"]'),
        ["It was recorded once, and is made once more now.", "Nothing was sent.*"],
    ),
    "another call": (
        ("test_app.py", '["Ann", "Bob"]', '["Ann", "Bob", "Eve"]'),
        [
            "The nearest recorded request, exchange * of 2, which is used already, differs*"
        ],
    ),
    "one call less": (
        ("test_app.py", '["Ann", "Bob"]', '["Ann"]'),
        [
            "1 of 2 recorded exchanges of cassettes/test_app/test_greets_all.yaml were*",
            "  exchange 2: POST loopback/*, model gpt-4.1-nano: 'Greet Bob.'",
            '  pytest --llm-record=new "test_app.py::test_greets_all"',
        ],
    ),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_drift_is_explained(recorded: Project, drift: str) -> None:
    """Each change of the program gives a short report that names it."""
    (file, old, new), lines = DRIFTS[drift]
    recorded.change(file, old, new)

    result = recorded.run("-x")

    result.assert_outcomes(
        failed=1, passed=0 if drift in {"prompt", "tool", "model"} else 1
    )
    result.stdout.fnmatch_lines(lines)
    assert "site-packages" not in result.stdout.str()


def test_new_brings_a_cassette_up_to_date(
    recorded: Project, alive: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the new call is made, the old one is dropped, and the next replay is green."""
    recorded.change("test_app.py", '["Ann", "Bob"]', '["Ann", "Eve"]')
    with monkeypatch.context() as patch:
        patch.setenv("DIPEO_LLM_OPENAI_BASE_URL", alive.base_url("openai"))
        patch.setenv("OPENAI_API_KEY", "sk-real-key-of-somebody-0123")
        recorded.run("--llm-record=new").assert_outcomes(passed=3)

    recorded.run().assert_outcomes(passed=3)
    text = recorded.cassette("test_app/test_greets_all").read_text("utf-8")
    assert len(alive.requests) == 4
    assert "Greet Eve." in text
    assert "Greet Bob." not in text


def test_a_failing_test_keeps_its_own_failure(recorded: Project) -> None:
    """Unused exchanges do not hide an assertion that fails."""
    recorded.change(
        "test_app.py",
        "greet_all(service, NAMES)) == len(NAMES)",
        "greet_all(service, NAMES)) == 7",
    )

    result = recorded.run("-k", "greets_all")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 2 == 7*"])
    result.stdout.no_fnmatch_line("*were not used*")


def test_a_swallowed_drift_fails_the_test(recorded: Project) -> None:
    """A program that catches every error is not green."""
    recorded.pytester.makepyfile(
        test_app="""
        import asyncio
        import app

        async def test_greets(service, llm_cassette):
            await asyncio.gather(app.greet(service, "Eve"), return_exceptions=True)
            await app.greet(service, "Ann")
        """
    )

    result = recorded.run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["no exchange of *", "    now:      'Greet Eve.'"])


def test_a_test_that_fails_after_a_swallowed_drift_shows_it(recorded: Project) -> None:
    """The report shows the cause after the failure."""
    recorded.pytester.makepyfile(
        test_app="""
        import asyncio
        import app

        async def test_greets(service, llm_cassette):
            answers = await asyncio.gather(
                app.greet(service, "Eve"), return_exceptions=True
            )
            assert answers == ["Hello"]
        """
    )

    result = recorded.run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*assert *", "*Captured llm_cassette call*", "no exchange of *"]
    )


# --- files and names -----------------------------------------------------------------


def test_every_test_has_a_file_of_its_own(
    project: Project, alive: ProviderServer
) -> None:
    """Classes, parameters, folders and names that are invalid in a file system."""
    (project.folder / "test_app.py").unlink()
    folder = project.folder / "tests" / "unit"
    folder.mkdir(parents=True)
    (folder / "test_names.py").write_text(
        """
import app
import pytest

class TestGreeting:
    @pytest.mark.parametrize("name", ["Ann", "a/b c?", "a/b c*", "x" * 200])
    @pytest.mark.llm_cassette
    async def test_greets(self, service, name):
        await app.greet(service, name)

@pytest.mark.llm_cassette("shared/hello")
async def test_named(service):
    await app.greet(service, "Ann")

@pytest.mark.llm_cassette(name="shared/hello", allow_unused=True)
async def test_named_too(service):
    await app.greet(service, "Ann")
""",
        encoding="utf-8",
    )
    project.change(
        "conftest.py", "import pytest", "import pytest, sys\nsys.path.append('.')"
    )

    project.run("--llm-record=once").assert_outcomes(passed=6)
    project.run().assert_outcomes(passed=6)

    root = project.folder / "cassettes"
    files = {str(f.relative_to(root)) for f in root.rglob("*.yaml")}
    assert "shared/hello.yaml" in files
    assert "unit/test_names/TestGreeting.test_greets-Ann.yaml" in files or (
        len([f for f in files if f.startswith("unit/test_names/TestGreeting")]) == 4
    )
    assert len(files) == 5
    assert len(alive.requests) == 5
    assert all(re.fullmatch(r"[\w./-]{1,140}", name) for name in files)


def test_the_folder_is_an_ini_option(project: Project, alive: ProviderServer) -> None:
    """Cassettes may be in any folder of the project."""
    project.change("tox.ini", "[pytest]\n", "[pytest]\nllm_cassette_dir = data/llm\n")

    project.run("--llm-record=once").assert_outcomes(passed=3)

    assert len(alive.requests) == 3
    assert (project.folder / "data/llm/test_app/test_greets.yaml").is_file()


def test_a_name_cannot_leave_the_folder(project: Project) -> None:
    """A name with dots does not overwrite another file."""
    project.change("test_app.py", "llm_cassette\n", 'llm_cassette("../evil")\n')

    result = project.run("-k", "test_greets and not all")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the cassette '../evil' is not below *cassettes*"])


def test_a_misspelt_option_of_the_marker_is_an_error(project: Project) -> None:
    """An unknown keyword is not ignored."""
    project.change("test_app.py", "llm_cassette\n", "llm_cassette(alow_unused=True)\n")

    result = project.run("-k", "test_greets and not all")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*unexpected keyword argument 'alow_unused'*"])


def test_a_file_with_a_secret_is_not_saved(
    project: Project, alive: ProviderServer
) -> None:
    """The run fails, and no file can be committed by mistake."""
    key = "sk-real-key-of-somebody-0123"
    alive.default = Answer(text=f"your key is {key}", pieces=6)
    project.change("app.py", "service.complete(", "stream(service, ")
    project.change(
        "app.py",
        "async def greet(",
        "async def stream(service, *args):\n"
        "    async with service.stream(*args) as s:\n"
        "        return await s.result()\n\n\n"
        "async def greet(",
    )

    result = project.run("--llm-record=once", "-k", "greets_all")

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "cassettes/test_app/test_greets_all.yaml was not written, a secret would be*",
            "  exchange 1, answer, over several events: a key of this run*",
        ]
    )
    assert not project.cassette("test_app/test_greets_all").exists()
    assert key not in result.stdout.str().partition("was not written")[2]


# --- age -----------------------------------------------------------------------------


def test_there_is_a_warning_about_an_old_cassette(recorded: Project) -> None:
    """Only if the run sets an age, and only for older cassettes."""
    path = recorded.cassette("test_app/test_greets")
    text = re.sub(r"at: '\d{4}", "at: '2020", path.read_text("utf-8"))
    path.write_text(text, encoding="utf-8")

    plain, asked = recorded.run(), recorded.run("--llm-max-age=30", "-W", "default")

    plain.assert_outcomes(passed=3)
    asked.assert_outcomes(passed=3, warnings=1)
    asked.stdout.fnmatch_lines(
        ["*StaleCassetteWarning: cassettes/test_app/test_greets.yaml is * days old;*"]
    )


# --- the other fixtures --------------------------------------------------------------


def test_a_scripted_model_is_a_fixture(project: Project) -> None:
    """A test that needs no recording at all gets a mock by its name."""
    project.pytester.makepyfile(
        test_app="""
        import app
        from dipeo_llm import LLMInfraService, StaticAPIKeys
        from dipeo_llm.testing import assert_request

        async def test_greets(llm_mock):
            llm_mock.add("Hello, Ann.")
            keys = StaticAPIKeys({"openai": "sk-none"})
            async with LLMInfraService(keys, adapter_factory=llm_mock) as service:
                assert await app.greet(service, "Ann") == "Hello, Ann."
            assert_request(llm_mock, provider="openai", model="gpt-4.1-nano")
        """
    )

    project.run("-W", "error").assert_outcomes(passed=1)


def test_the_network_can_be_closed_by_a_fixture(project: Project) -> None:
    """A test that would reach a provider fails with the reason."""
    project.pytester.makepyfile(
        test_app="""
        import socket
        import pytest

        @pytest.mark.usefixtures("llm_no_network")
        def test_closed():
            with socket.socket() as client:
                client.connect(("192.0.2.1", 443))
        """
    )

    result = project.run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*NetworkBlockedError: refused to connect to 192.0.2.1*"]
    )


def test_a_replay_closes_the_network(recorded: Project) -> None:
    """A connection that bypasses the cassette fails."""
    recorded.pytester.makepyfile(
        test_app="""
        import socket
        import app

        async def test_greets(service, llm_cassette):
            await app.greet(service, "Ann")
            socket.getaddrinfo("api.openai.com", 443)
        """
    )

    result = recorded.run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*NetworkBlockedError: refused to look up api.openai*"]
    )


def test_options_and_fixtures_explain_themselves(project: Project) -> None:
    """`pytest --help`, `--fixtures` and `--markers` list everything."""
    texts = [
        project.run(f"--{topic}").stdout.str()
        for topic in ("help", "fixtures", "markers")
    ]

    assert "--llm-record={none,once,new,all}" in texts[0]
    assert "--llm-max-age=DAYS" in texts[0]
    assert "llm_cassette_dir" in texts[0]
    assert "Replay the calls of a test from its cassette" in texts[1]
    assert "@pytest.mark.llm_cassette(name=None" in texts[2]


# --- the guide -----------------------------------------------------------------------


def test_the_guide_leads_from_nothing_to_green(
    project: Project, alive: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files and commands of docs/testing.md do what the page says."""
    guide = GUIDE.read_text("utf-8")
    for file in project.folder.glob("*.*"):
        file.unlink()
    files = re.findall(
        r"^```(?:py|ini)\n# (\S+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL
    )
    for name, text in files:
        (project.folder / name).write_text(text, encoding="utf-8")
    assert "pytest --llm-record=once\npytest\n" in guide

    project.run("--llm-record=once").assert_outcomes(passed=7)
    sent = len(alive.requests)
    monkeypatch.setenv("CI", "true")
    monkeypatch.delenv("OPENAI_API_KEY")
    project.run("-W", "error", "--llm-max-age=90").assert_outcomes(passed=7)
    project.change("greeter.py", "one sentence", "two sentences")
    drifted = project.run("-k", "not_empty")

    assert len(alive.requests) == sent == 2
    assert check(project.folder / "cassettes") == []
    (shown,) = re.findall(r"^```text\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert shown.replace("api.openai.com", "loopback") in drifted.stdout.str()
    head = project.cassette("test_greeter/test_a_greeting_is_not_empty").read_text(
        "utf-8"
    )
    again = re.findall(r"^# again with: .*$", guide, re.MULTILINE)
    assert head.splitlines()[2:3] == again


def test_the_guide_lists_every_field_that_makes_no_difference() -> None:
    """The list in the guide is the list in the code."""
    guide = GUIDE.read_text("utf-8")
    (line,) = re.findall(r"^- the top-level fields (.*);$", guide, re.MULTILINE)

    assert set(re.findall(r"`(\w+)`", line)) == VOLATILE


# --- what it costs -------------------------------------------------------------------

EMPTY_RUN = """
import json, sys, pytest
pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:], "test_empty.py"])
print(json.dumps(sorted(sys.modules)))
"""


def _modules_of_an_empty_run(folder: Path, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", EMPTY_RUN, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_run_that_does_not_use_it_loads_nothing(tmp_path: Path) -> None:
    """It loads two small modules, and nothing that the fixtures need."""
    (tmp_path / "test_empty.py").write_text(
        "def test_nothing(): pass\n", encoding="utf-8"
    )

    with_plugin = _modules_of_an_empty_run(tmp_path)
    without = _modules_of_an_empty_run(tmp_path, "-p", "no:dipeo_llm")

    assert with_plugin - without == {"dipeo_llm", "dipeo_llm.pytest_plugin"}


def test_importing_it_takes_next_to_nothing_beside_pytest() -> None:
    """The import takes a small part of the time of pytest's own."""
    code = """
import time
start = time.perf_counter(); import pytest
loaded = time.perf_counter(); import dipeo_llm.pytest_plugin
print((time.perf_counter() - loaded) / (loaded - start))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert float(done.stdout) < 0.5
