"""Cassettes that several tests share, their names, their dates, and what a run reports."""

import re
from datetime import UTC, datetime

import pytest
import yaml

from tests.cassette_project import Project
from tests.provider_server import Answer, ProviderServer

pytest_plugins = ["pytester", "tests.cassette_project"]

SHARED = """\
import app
import pytest

pytestmark = pytest.mark.llm_cassette("shared")


@pytest.mark.parametrize("name", ["Ann", "Bob", "Eve", "Joe"])
async def test_greets(service, name):
    first = await app.greet(service, "everybody")
    assert await app.greet(service, name) == f"Greet {name}."
    assert first == "Greet everybody."
"""


@pytest.fixture
def shared(project: Project, alive: ProviderServer) -> Project:
    """Make a project whose four tests share a cassette; each has a call of its own."""
    (project.folder / "test_app.py").write_text(SHARED, encoding="utf-8")
    alive.default = lambda asked: Answer(asked.json["messages"][-1]["content"])
    return project


def prompts(project: Project, name: str = "shared") -> list[str]:
    """Return the prompts of a cassette, sorted."""
    text = project.cassette(name).read_text("utf-8")
    return sorted(re.findall(r"Greet \w+", "".join(re.findall(r"body: '.*", text))))


ALL = ["Greet Ann", "Greet Bob", "Greet Eve", "Greet Joe", "Greet everybody"]


@pytest.mark.parametrize(
    ("mode", "workers"), [("once", 0), ("new", 0), ("all", 0), ("all", 2)]
)
def test_one_run_records_what_all_its_tests_ask(
    shared: Project, alive: ProviderServer, mode: str, workers: int
) -> None:
    """Each call once, under pytest-xdist too; each test then replays alone."""
    record = f"--llm-record={mode}"
    recording = (
        shared.run_alone(record, "-n", str(workers)) if workers else shared.run(record)
    )

    recording.assert_outcomes(passed=4)
    recording.stdout.fnmatch_lines(["dipeo-llm: recorded 5 exchanges in 1 cassette"])
    assert len(alive.requests) == 5
    assert prompts(shared) == ALL
    shared.run().assert_outcomes(passed=4)
    shared.run("-k", "Eve").assert_outcomes(passed=1)
    assert len(alive.requests) == 5


def test_a_second_run_of_once_records_nothing(
    shared: Project,
    alive: ProviderServer,
) -> None:
    """The cassette is there, so a new test's call is a mismatch."""
    shared.run("--llm-record=once").assert_outcomes(passed=4)
    shared.change("test_app.py", '"Joe"', '"Joe", "Zoe"')

    shared.run("--llm-record=once").assert_outcomes(passed=4, failed=1)
    assert len(alive.requests) == 5


def test_new_adds_and_drops_for_one_test_of_several(
    shared: Project,
    alive: ProviderServer,
) -> None:
    """What other tests use stays, even if only one test runs."""
    shared.run("--llm-record=once").assert_outcomes(passed=4)
    shared.change("test_app.py", '"Joe"', '"Zoe"')

    shared.run("--llm-record=new", "-k", "Zoe").assert_outcomes(passed=1)
    assert prompts(shared) == sorted([*ALL, "Greet Zoe"])
    shared.run().assert_outcomes(passed=4)

    shared.change(
        "test_app.py", "app.greet(service, name)", "app.greet(service, 'Ann')"
    )
    shared.change("test_app.py", '== f"Greet {name}."', '== "Greet Ann."')
    shared.run("--llm-record=new", "-k", "Eve").assert_outcomes(passed=1)
    assert prompts(shared) == sorted({*ALL, "Greet Zoe"} - {"Greet Eve"})


def test_an_unused_exchange_of_a_test_fails_it_and_no_other(shared: Project) -> None:
    """A shared cassette is as strict with each test as one of its own."""
    shared.run("--llm-record=once").assert_outcomes(passed=4)
    shared.change(
        "test_app.py",
        "await app.greet(service, name) ==",
        "('Greet Ann.' if name == 'Ann' else await app.greet(service, name)) ==",
    )

    result = shared.run()

    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["1 of 5 recorded exchanges * were not used:"])


# --- names and options ---------------------------------------------------------------


def test_names_that_differ_in_case_are_two_files_everywhere(
    project: Project,
    alive: ProviderServer,
) -> None:
    """Tests, parameters and classes, on a system that ignores case too."""
    (project.folder / "test_app.py").write_text(
        """
import app
import pytest

@pytest.mark.parametrize("name", ["ann", "Ann", "ANN"])
@pytest.mark.llm_cassette
async def test_greets(service, name):
    await app.greet(service, name)

@pytest.mark.llm_cassette
async def test_Greets(service):
    await app.greet(service, "Bob")
""",
        encoding="utf-8",
    )

    project.run("--llm-record=once").assert_outcomes(passed=4)
    project.run().assert_outcomes(passed=4)

    names = [path.name.lower() for path in project.folder.rglob("*.yaml")]
    assert len(set(names)) == len(names) == 4
    assert "test_greets-ann.yaml" in names


def test_a_file_with_an_earlier_name_goes_on_being_used(
    project: Project,
    alive: ProviderServer,
) -> None:
    """Whether a version without that rule gave it, or pytest-recording."""
    project.change("test_app.py", "test_greets(", "test_Greets(")
    project.run("--llm-record=once").assert_outcomes(passed=3)
    (path,) = (project.folder / "cassettes/test_app").glob("test_Greets-*.yaml")

    path.rename(path.with_name("test_Greets.yaml"))
    project.run().assert_outcomes(passed=3)


def test_shared_names_that_differ_in_case_are_refused(
    project: Project,
    alive: ProviderServer,
) -> None:
    """They would be one file on some systems, and two on others."""
    project.change("test_app.py", "llm_cassette\n", 'llm_cassette("one")\n')
    project.change(
        "test_app.py",
        "async def test_greets_all",
        '@pytest.mark.llm_cassette("One")\nasync def test_greets_all',
    )

    result = project.run("--llm-record=once")

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*differ in case only*"])


@pytest.mark.parametrize("kind", ["str", "Path"])
def test_a_folder_of_tests_has_its_own_folder_and_options(
    project: Project,
    alive: ProviderServer,
    kind: str,
) -> None:
    """A conftest.py says both for the tests below it; a marker adds to it."""
    folder = project.folder / "suite"
    folder.mkdir()
    (project.folder / "test_app.py").rename(folder / "test_suite.py")
    (project.folder / "conftest.py").write_text(
        "import sys\nsys.path.append('.')\n"
        + (project.folder / "conftest.py").read_text("utf-8"),
        encoding="utf-8",
    )
    (folder / "conftest.py").write_text(
        f"""
from pathlib import Path
import pytest

@pytest.fixture(scope="session")
def llm_cassette_dir():
    return {kind}(Path(__file__).parent / "recordings")

@pytest.fixture(scope="session")
def llm_cassette_options():
    return {{"ignore": ["seed"], "origin": "the options"}}
""",
        encoding="utf-8",
    )
    project.change(
        "suite/test_suite.py", "llm_cassette\n", "llm_cassette(origin='me')\n"
    )

    project.run("--llm-record=once").assert_outcomes(passed=3)
    project.run().assert_outcomes(passed=3)

    files = sorted(folder.rglob("*.yaml"))
    assert [str(file.relative_to(folder)) for file in files] == [
        "recordings/test_suite/test_greets.yaml",
        "recordings/test_suite/test_greets_all.yaml",
    ]
    heads = [file.read_text("utf-8").splitlines()[0] for file in files]
    assert heads == ["# Recorded from: me", "# Recorded from: the options"]


def test_a_suite_of_pytest_recording_is_taken_over(
    project: Project,
    alive: ProviderServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its files stay where they are; the marker's name is all that changes."""
    tests = """
import os, pytest, requests

@pytest.mark.vcr
@pytest.mark.parametrize("word", ["one", "two/three"])
def test_asks(word):
    url = os.environ["DIPEO_LLM_OPENAI_BASE_URL"] + "/chat/completions"
    body = {"model": "gpt-4.1-nano", "messages": [{"role": "user", "content": word}]}
    headers = {"authorization": "Bearer sk-real-key-of-somebody-0123"}
    assert requests.post(url, json=body, headers=headers, timeout=20).ok
"""
    (project.folder / "test_app.py").write_text(tests, encoding="utf-8")
    project.run_alone("--record-mode=once", "-p", "no:xdist").assert_outcomes(passed=2)
    project.change("test_app.py", "mark.vcr", "mark.llm_cassette")

    project.run().assert_outcomes(passed=2)
    assert len(alive.requests) == 2


# --- reports -------------------------------------------------------------------------


def test_a_run_that_replays_reports_nothing(recorded: Project) -> None:
    """Only a run that may record says what it recorded."""
    recorded.run().stdout.no_fnmatch_line("dipeo-llm: recorded*")
    recorded.run("--llm-record=once").stdout.fnmatch_lines(
        ["dipeo-llm: recorded 0 exchanges in 0 cassettes"]
    )


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_mismatch_is_explained_once(
    recorded: Project,
    monkeypatch: pytest.MonkeyPatch,
    in_ci: bool,
) -> None:
    """Neither the summary nor a section of its own repeats it."""
    recorded.change("app.py", "Greet {name}.", "Greet {name}, please.")
    if in_ci:
        monkeypatch.setenv("CI", "true")

    text = recorded.run("-k", "test_greets and not all").stdout.str()

    assert text.count("now:      'Greet Ann, please.'") == 1


def test_a_failed_recording_does_not_replace_a_cassette(
    recorded: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of `all` without a network leaves the files as they were."""
    monkeypatch.setenv("DIPEO_LLM_MAX_RETRIES", "0")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-real-key-of-somebody-0123")
    files = sorted((recorded.folder / "cassettes").rglob("*.yaml"))
    before = [file.read_bytes() for file in files]

    result = recorded.run("--llm-record=all")

    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["dipeo-llm: recorded 0 exchanges in 0 cassettes"])
    assert [file.read_bytes() for file in files] == before


# --- time ----------------------------------------------------------------------------

FREEZERS: dict[str, str] = {
    "decorated": """
from freezegun import freeze_time

freeze = freeze_time("2020-01-01")
""",
    "travelled": """
import time_machine

freeze = time_machine.travel("2020-01-01")
""",
    "fixed": """
import pytest
from freezegun import freeze_time

@pytest.fixture(autouse=True, scope="module")
def frozen():
    with freeze_time("2020-01-01"):
        yield

freeze = lambda test: test
""",
}
FROZEN = """
import app, pytest

@pytest.mark.llm_cassette
@freeze
async def test_greets(service):
    assert await app.greet(service, "Ann") == "Hello from the loopback."

def test_later():
    import litellm
    assert litellm.model_cost
"""


def test_time_may_stand_still(project: Project, alive: ProviderServer) -> None:
    """LiteLLM is imported before, and the date of the cassette is the real one."""
    (project.folder / "test_app.py").unlink()
    for name, freezer in FREEZERS.items():
        path = project.folder / f"test_{name}.py"
        path.write_text(freezer + FROZEN, encoding="utf-8")

    project.run_alone("--llm-record=once", "-p", "no:xdist").assert_outcomes(passed=6)
    project.run_alone("-p", "no:xdist").assert_outcomes(passed=6)

    assert len(alive.requests) == 3
    for name in FREEZERS:
        text = project.cassette(f"test_{name}/test_greets").read_text("utf-8")
        at = yaml.safe_load(text)["interactions"][0]["response"]["recorded"]["at"]
        assert abs((datetime.now(UTC) - datetime.fromisoformat(at)).days) < 2


def test_an_import_that_fails_is_told_by_each_test(project: Project) -> None:
    """And as what it is, not as what the second try runs into."""
    (project.folder / "openai.py").write_text("raise ImportError('broken')\n", "utf-8")

    result = project.run_alone("-p", "no:xdist")

    result.assert_outcomes(passed=1, errors=2)
    assert result.stdout.str().count("LiteLLM cannot be imported:") >= 2
