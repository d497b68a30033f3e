"""The pytest plugin: `llm_cassette`, `llm_mock` and `llm_no_network`.

Loaded in every pytest run of an environment that has this package, so it imports pytest
and nothing else; the rest comes with the fixtures.
"""

import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dipeo_llm.testing import MockLLMAdapter
    from dipeo_llm.testing.cassettes import Cassette

_MODES = ("none", "once", "new", "all")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    group = parser.getgroup("dipeo-llm", "language models")
    group.addoption(
        "--llm-record",
        choices=_MODES,
        default="none",
        help="what llm_cassette records: nothing (default, and always where CI is set);"
        " tests without a cassette (once); requests that a cassette does not answer, and"
        " drop recorded exchanges no request uses (new); everything (all)",
    )
    group.addoption(
        "--llm-max-age",
        type=float,
        metavar="DAYS",
        help="warn of cassettes that were recorded more days ago",
    )
    parser.addini(
        "llm_cassette_dir",
        "folder of cassettes, below the root directory",
        default="cassettes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "llm_cassette(name=None, *, allow_unused=False, ignore=(), real_timing=False,"
        " origin=None): replay the test's calls to language models from a cassette",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say if the wish to record is not granted."""
    asked = config.getoption("llm_record")
    if _mode(config) != asked:
        return f"dipeo-llm: --llm-record={asked} has no effect where CI is set"
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a marked test its cassette, whether it names the fixture or not."""
    names = getattr(item, "fixturenames", None)
    marked = item.get_closest_marker("llm_cassette") is not None
    if marked and names is not None and "llm_cassette" not in names:
        names.insert(0, "llm_cassette")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that passed beside its cassette; explain one that failed by it."""
    cassette = getattr(item, "funcargs", {}).get("llm_cassette")
    try:
        result = yield
    except BaseException:
        for error in getattr(cassette, "mismatches", ()):
            item.add_report_section("call", "llm_cassette", str(error))
        raise
    if cassette is not None:
        cassette.verify()
    return result


@pytest.fixture
def llm_cassette(request: pytest.FixtureRequest) -> "Iterator[Cassette]":
    """Replay the calls of a test from its cassette, or record them."""
    from dipeo_llm.testing import cassettes

    marker = request.node.get_closest_marker("llm_cassette")
    options = dict(marker.kwargs) if marker else {}
    name = options.pop("name", None) or (
        marker.args[0] if marker and marker.args else None
    )
    cassette = cassettes.Cassette(
        _path(request.node, name),
        record=_mode(request.config),
        again=f'pytest --llm-record={{mode}} "{_escaped(request.node.nodeid)}"',
        **options,
    )
    most_days = request.config.getoption("llm_max_age")
    if most_days is not None:
        cassettes.warn_if_stale(cassette, most_days)
    with cassettes.opened(cassette):
        yield cassette


@pytest.fixture
def llm_mock() -> "MockLLMAdapter":
    """Make a scripted model, to be given to a service as `adapter_factory`."""
    from dipeo_llm.testing import MockLLMAdapter

    return MockLLMAdapter()


@pytest.fixture
def llm_no_network() -> Iterator[None]:
    """Refuse every connection but those to this machine."""
    from dipeo_llm.testing import block_network

    with block_network():
        yield


def _mode(config: pytest.Config) -> Any:
    in_ci = os.environ.get("CI", "").lower() not in {"", "0", "false", "no"}
    return "none" if in_ci else config.getoption("llm_record")


def _path(node: pytest.Item, name: str | None) -> Path:
    """Return `<root>/<module>/<test>.yaml`, or `<root>/<name>.yaml`."""
    root: Path = node.config.rootpath / node.config.getini("llm_cassette_dir")
    if name is not None:
        path = root / f"{name.removesuffix('.yaml')}.yaml"
        if not path.resolve().is_relative_to(root.resolve()):
            raise pytest.UsageError(f"the cassette {name!r} is not below {root}")
        return path
    module = Path(os.path.relpath(node.path, node.config.rootpath)).with_suffix("")
    parts = [part for part in module.parts if part not in {"..", "."}]
    if len(parts) > 1 and parts[0] in {"tests", "test"}:
        del parts[0]
    test = node.nodeid.partition("::")[2].replace("::", ".")
    return root.joinpath(*parts, f"{_file_name(test)}.yaml")


def _file_name(test: str) -> str:
    """Return a name that every file system takes, and that no other test has."""
    plain = re.sub(r"^([\w.-]+)\[([\w.-]+)\]$", r"\1-\2", test)
    name = re.sub(r"[^\w.-]+", "-", plain, flags=re.ASCII).strip("-")[:100]
    if name == plain:
        return name
    import hashlib

    return f"{name}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
