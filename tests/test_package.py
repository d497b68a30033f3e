"""The package as a whole: its names, what importing it costs, and its metadata."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

import dipeo_llm
from dipeo_llm import (
    APIKeyPort,
    EnvironmentAPIKeys,
    LLMDomainService,
    LLMInfraService,
    LLMServicePort,
    Settings,
    StaticAPIKeys,
)

HEAVY = ["aiohttp", "httpx", "jinja2", "litellm", "openai", "opentelemetry", "pytest"]
HEAVY += ["redis"]
FOLDER = Path(str(resources.files("dipeo_llm")))
ROOT = Path(__file__).parent.parent
# These stand on an extra's packages, or run as they are imported; `testing` is not one.
ON_TOP = {"__main__", "cassette_file", "cassette_folder", "cassettes", "pytest_plugin"}
ON_TOP |= {"telemetry", "templates"}
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.stem not in ON_TOP | {"__init__"}
)
CONTRACT = {
    "APIKeyError",
    "APIKeyNotFoundError",
    "APIKeyPort",
    "BaseLLMAdapter",
    "ChatResult",
    "ContentFilterError",
    "ContextWindowError",
    "DiPeOLLMError",
    "EnvironmentAPIKeys",
    "ImageGenerationResult",
    "InvalidRequestError",
    "LLMDomainService",
    "LLMInfraService",
    "LLMRequestOptions",
    "LLMService",
    "LLMServiceError",
    "LLMServicePort",
    "LLMTimeoutError",
    "Message",
    "MessageFormatter",
    "ModelNotFoundError",
    "Person",
    "PersonLLMConfig",
    "QuotaExceededError",
    "RateLimitError",
    "ServiceUnavailableError",
    "Settings",
    "StaticAPIKeys",
    "StreamInterruptedError",
    "StructuredOutputError",
    "SystemPromptHandler",
    "TokenUsage",
    "ToolCall",
    "ToolConfig",
    "ToolOutput",
    "ToolType",
    "WebSearchResult",
    "create_adapter",
}


def output_of(code: str) -> Any:
    """Run code in a process of its own, in which `heavy` lists what is loaded."""
    heavy = (
        f"import json, sys; heavy = lambda: [m for m in {HEAVY} if m in sys.modules]"
    )
    code = f"{heavy}\n{code}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted({*dipeo_llm.__all__} - {"__version__"}))
def test_every_public_name_can_be_imported(name: str) -> None:
    """What the package offers is there, and it is what its module defines."""
    value = getattr(dipeo_llm, name)

    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value
    assert home.__name__.startswith("dipeo_llm.")


def test_the_public_names_are_sorted_and_unique() -> None:
    """The list of names can be read, and dir() shows the same."""
    assert list(dipeo_llm.__all__) == sorted(set(dipeo_llm.__all__))
    assert dir(dipeo_llm) == dipeo_llm.__all__


def test_the_promised_names_are_all_there() -> None:
    """No name that users import has gone missing."""
    assert CONTRACT - set(dipeo_llm.__all__) == set()


def test_a_type_checker_sees_the_same_names() -> None:
    """The imports that only a type checker reads are exactly the public names."""
    tree = ast.parse((FOLDER / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert seen == set(dipeo_llm.__all__) - {"__version__"}


def test_every_public_class_is_documented() -> None:
    """help() has a sentence for each public name."""
    undocumented = [
        name
        for name in dipeo_llm.__all__
        if name != "__version__" and not getattr(dipeo_llm, name).__doc__
    ]

    assert undocumented == []


@pytest.mark.parametrize("name", ["nothing", "litellm", "_private"])
def test_a_name_that_is_not_there_is_an_attribute_error(name: str) -> None:
    """A misspelt name fails as it does on any module."""
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(dipeo_llm, name)


@pytest.mark.parametrize(
    "code",
    [
        "import dipeo_llm",
        "import dipeo_llm; dir(dipeo_llm); dipeo_llm.__version__",
        "import dipeo_llm as d; d.LLMInfraService(d.StaticAPIKeys({'a': 'sk-1'}))",
        "import dipeo_llm as d; d.LLMInfraService(d.EnvironmentAPIKeys())",
        "from dipeo_llm import create_adapter; create_adapter('openai', 'x', 'sk-1')",
        "from dipeo_llm import *",
    ],
)
def test_what_is_heavy_waits_for_the_first_call(code: str) -> None:
    """Importing the package and making a service loads none of the slow packages."""
    assert output_of(f"{code}\nprint(json.dumps(heavy()))") == []


def test_no_module_loads_what_is_heavy() -> None:
    """Importing every module, one after the other, loads none of the slow packages."""
    loaded = output_of(f"""
import importlib
loaded = {{}}
for module in {MODULES}:
    importlib.import_module("dipeo_llm." + module)
    loaded[module] = heavy()
print(json.dumps(loaded))
""")

    assert loaded == {module: [] for module in MODULES}


def test_the_version_is_that_of_the_distribution() -> None:
    """The version is written in one place, and it is a version."""
    assert dipeo_llm.__version__ == metadata.version("dipeo-llm")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", dipeo_llm.__version__)


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    """The marker file of PEP 561 is in the package."""
    assert (FOLDER / "py.typed").is_file()


def test_the_source_distribution_holds_what_is_read_beside_the_package() -> None:
    """The tests and the nox sessions run from it; a misspelt path is left out unseen."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    include = set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])

    assert [name for name in include if not (ROOT / name[1:]).exists()] == []
    read = {"tests", "docs", "cassettes", "prompts", "examples", "benchmarks"}
    read |= {"noxfile.py", "requirements.lock", "requirements-hashed.lock"}
    assert {f"/{name}" for name in read} - include == set()


@pytest.mark.parametrize("port", [APIKeyPort, LLMDomainService, LLMServicePort])
def test_a_port_can_be_asked_for_at_run_time(port: Any) -> None:
    """An isinstance check tells what fits a port from what does not."""
    members = [name for name in vars(port) if not name.startswith("_")]
    fits = type("Fits", (), dict.fromkeys(members, print))
    lacks = type("Lacks", (), dict.fromkeys(members[1:], print))

    assert members
    assert isinstance(fits(), port)
    assert not isinstance(lacks(), port)


def test_what_the_package_offers_fits_its_own_ports() -> None:
    """The service is a service port, and the ready stores of keys are key ports."""
    service = LLMInfraService(StaticAPIKeys({}), settings=Settings())

    assert isinstance(service, LLMServicePort)
    assert isinstance(EnvironmentAPIKeys(), APIKeyPort)
    assert isinstance(StaticAPIKeys({}), APIKeyPort)


def _typed(service: LLMInfraService) -> LLMServicePort:
    """Let the type checker see that the service's signatures fit the port's."""
    return service
