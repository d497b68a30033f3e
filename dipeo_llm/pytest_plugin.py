"""The pytest plugin: `llm_cassette`, `llm_mock` and `llm_no_network`.

It is loaded in every pytest run of an environment that has this package, so it imports
pytest and nothing else. The fixtures import the rest.
"""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dipeo_llm.testing import MockLLMAdapter
    from dipeo_llm.testing.cassettes import Cassette

_MODES = ("none", "once", "new", "all")
_RECORDED = pytest.StashKey[dict[str, int]]()
_NAMES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    group = parser.getgroup("dipeo-llm", "language models")
    group.addoption(
        "--llm-record",
        choices=_MODES,
        default="none",
        help="what llm_cassette records: nothing (default, and always where CI is set);"
        " tests without a cassette (once); requests that a cassette does not answer, and"
        " drop recorded exchanges that no request uses (new); everything (all)",
    )
    group.addoption(
        "--llm-max-age",
        type=float,
        metavar="DAYS",
        help="warn about cassettes that were recorded more days ago",
    )
    parser.addini(
        "llm_cassette_dir",
        "folder of cassettes, relative to the root directory",
        default="cassettes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.stash[_RECORDED] = {}
    config.stash[_NAMES] = {}
    config.addinivalue_line(
        "markers",
        "llm_cassette(name=None, *, allow_unused=False, allow_playback_repeats=False,"
        " ignore=(), ignore_hosts=(), ignore_localhost=False, before_record_request=None,"
        " before_record_response=None, real_timing=False, origin=None): replay the test's"
        " calls to language models from a cassette",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say so if the run asks to record and must not."""
    asked = config.getoption("llm_record")
    if _mode(config) != asked:
        return f"dipeo-llm: --llm-record={asked} has no effect where CI is set"
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a marked test its cassette, before any other fixture of the test.

    A fixture that freezes the time or mocks a client then does so inside the cassette.
    """
    names = getattr(item, "fixturenames", None)
    marked = item.get_closest_marker("llm_cassette") is not None
    if names is not None and (marked or "llm_cassette" in names):
        names[:] = ["llm_cassette", *(name for name in names if name != "llm_cassette")]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import LiteLLM before any fixture can freeze the time."""
    used = any("llm_cassette" in getattr(i, "fixturenames", ()) for i in session.items)
    if used and not session.config.option.collectonly:
        from dipeo_llm.testing import cassettes

        try:
            cassettes.load_litellm()
        except cassettes.CassetteError:
            return  # the fixture raises it, for each test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that passed in spite of its cassette; explain one that failed by it."""
    cassette = getattr(item, "funcargs", {}).get("llm_cassette")
    try:
        result = yield
    except BaseException as exc:
        if cassette is not None:
            cassette.test_failed = True
        shown = _collect_messages(exc)
        for text in dict.fromkeys(map(str, getattr(cassette, "mismatches", ()))):
            if text not in shown:
                item.add_report_section("call", "llm_cassette", text)
        raise
    if cassette is not None:
        cassette.verify()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the explanation out of the summary, which repeats it in full where CI is set."""
    report = yield
    crash = getattr(report.longrepr, "reprcrash", None)
    error = call.excinfo.value if call.excinfo else None
    if crash is not None and type(error).__module__.startswith("dipeo_llm.testing."):
        crash.message = crash.message.partition("\n")[0]
    return report


def _collect_messages(exc: BaseException | None) -> str:
    """Return the messages that a report of this exception shows."""
    texts = []
    while exc is not None:
        texts.append(str(exc))
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    return "\n".join(texts)


@pytest.fixture
def llm_cassette_dir(request: pytest.FixtureRequest) -> "str | Path":
    """Return the folder of cassettes; override it in a conftest.py."""
    folder: str = request.config.getini("llm_cassette_dir")
    return folder


@pytest.fixture
def llm_cassette_options() -> dict[str, Any]:
    """Return defaults for the arguments of the marker; override it in a conftest.py."""
    return {}


@pytest.fixture
def llm_cassette(
    request: pytest.FixtureRequest,
    llm_cassette_dir: "str | Path",
    llm_cassette_options: dict[str, Any],
) -> "Iterator[Cassette]":
    """Replay the calls of a test from its cassette, or record them."""
    from dipeo_llm.testing import cassettes

    options = dict(llm_cassette_options)
    for marker in reversed([*request.node.iter_markers("llm_cassette")]):
        options |= ({"name": marker.args[0]} if marker.args else {}) | marker.kwargs
    name = options.pop("name", None)
    path = _path(request.node, Path(llm_cassette_dir), name)
    mode = _mode(request.config)
    node = request.node.nodeid
    with ExitStack() as stack:
        if name is not None:
            options["test"] = node
            if mode != "none":
                folders = request.getfixturevalue("tmp_path_factory")
                first = _FirstOfRun(request.config, folders, path)
                mode = stack.enter_context(first)
        cassette = cassettes.Cassette(
            path,
            record=mode,
            again=f'pytest --llm-record={{mode}} "{_escaped(node)}"',
            **options,
        )
        most_days = request.config.getoption("llm_max_age")
        if most_days is not None:
            cassettes.warn_if_stale(cassette, most_days)
        with cassettes.open_cassette(cassette):
            yield cassette
        if cassette.written:
            recorded = request.config.stash[_RECORDED]
            recorded[str(path)] = recorded.get(str(path), 0) + cassette.written


class _FirstOfRun:
    """Lets the tests that share a cassette record it one after the other.

    The first test of a run does what `--llm-record` says; the others add what is
    missing. A file in the run's temporary folder, locked under pytest-xdist, tells them
    apart.
    """

    def __init__(
        self, config: pytest.Config, folders: pytest.TempPathFactory, path: Path
    ) -> None:
        import hashlib

        folder = folders.getbasetemp()
        is_worker = hasattr(config, "workerinput")
        name = f"llm_cassette-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        self._asked: str = _mode(config)
        self._path = path
        self._note = (folder.parent if is_worker else folder) / name
        self._lock = _lock(self._note) if is_worker else ExitStack()

    def __enter__(self) -> str:
        self._lock.__enter__()
        if not self._note.exists():
            has_file = self._path.is_file() and self._path.stat().st_size > 0
            replays = self._asked == "once" and has_file
            self._next = "none" if replays else "new"
            return self._asked
        self._next = self._note.read_text("utf-8")
        return self._next

    def __exit__(self, *exc: object) -> None:
        self._note.write_text(self._next, "utf-8")
        self._lock.__exit__(None, None, None)


def _lock(path: Path) -> Any:
    import filelock

    return filelock.FileLock(f"{path}.lock")


@pytest.fixture
def llm_mock() -> "MockLLMAdapter":
    """Make a scripted model, to be given to a service as `adapter_factory`."""
    from dipeo_llm.testing import MockLLMAdapter

    return MockLLMAdapter()


@pytest.fixture
def llm_no_network() -> Iterator[None]:
    """Refuse every connection except to this machine."""
    from dipeo_llm.testing import block_network

    with block_network():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the controller of pytest-xdist what this worker recorded."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["llm_recorded"] = session.config.stash[_RECORDED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add what a worker of pytest-xdist recorded."""
    recorded = node.config.stash[_RECORDED]
    for path, count in (
        getattr(node, "workeroutput", {}).get("llm_recorded", {}).items()
    ):
        recorded[path] = recorded.get(path, 0) + count


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how much was recorded."""
    if _mode(config) != "none":
        recorded = config.stash[_RECORDED]
        exchanges = _count(sum(recorded.values()), "exchange")
        cassettes = _count(len(recorded), "cassette")
        terminalreporter.write_line(f"dipeo-llm: recorded {exchanges} in {cassettes}")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _mode(config: pytest.Config) -> Any:
    in_ci = os.environ.get("CI", "").lower() not in {"", "0", "false", "no"}
    return "none" if in_ci else config.getoption("llm_record")


def _path(node: pytest.Item, folder: Path, name: str | None) -> Path:
    """Return `<folder>/<module>/<test>.yaml`, or `<folder>/<name>.yaml`."""
    config = node.config
    root = config.rootpath / folder
    if name is not None:
        path = root / f"{name.removesuffix('.yaml')}.yaml"
        if not path.resolve().is_relative_to(root.resolve()):
            raise pytest.UsageError(f"the cassette {name!r} is not below {root}")
        known = config.stash[_NAMES].setdefault(str(path).lower(), str(path))
        if known != str(path):
            raise pytest.UsageError(
                f"the cassettes {known} and {path} differ in case only, and are one file"
                " on some systems"
            )
        return path
    # A folder beside the test module, or above it, has the modules below it.
    beside = node.path.is_relative_to(root.parent)
    start = root.parent if beside else config.rootpath
    module = Path(os.path.relpath(node.path, start)).with_suffix("")
    parts = [part for part in module.parts if part not in {"..", "."}]
    if len(parts) > 1 and parts[0] in {"tests", "test"}:
        del parts[0]
    test = node.nodeid.partition("::")[2].replace("::", ".")
    home = root.joinpath(*parts)
    names = [f"{stem}.yaml" for stem in _stems(test)]
    # Exact names, as a file system that ignores case says yes to others too.
    there = {p.name for p in home.iterdir()} if home.is_dir() else set()
    return home / next((name for name in names if name in there), names[0])


def _stems(test: str) -> list[str]:
    """Return the names that a test's file may have; a new file gets the first.

    It suits every file system and no other test has it, whatever its case. The others
    are the names that earlier versions and pytest-recording give.
    """
    plain = re.sub(r"^([\w.-]+)\[([\w.-]+)\]$", r"\1-\2", test)
    name = re.sub(r"[^\w.-]+", "-", plain, flags=re.ASCII).strip("-")[:100]
    import hashlib

    unique = f"{name}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"
    peer = re.sub(r"[<>?%*:|\"'/\\]", "-", test)
    if name != plain:
        return [unique, peer]
    return [name, peer] if name == name.lower() else [unique, name, peer]


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
