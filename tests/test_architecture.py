"""One provider, one file: what a new format needs, and who may know a provider's name."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dipeo_llm
from dipeo_llm.adapters import factory
from dipeo_llm.adapters.base import BaseLLMAdapter

ROOT = Path(__file__).parent.parent
PACKAGE = Path(dipeo_llm.__file__).parent
FORMATS = {adapter.__module__ for adapter in factory.ADAPTERS} | {
    adapter.__module__ for adapter in factory.ENDPOINTS.values()
}
TREES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): ast.parse(
        path.read_text("utf-8")
    )
    for path in PACKAGE.rglob("*.py")
}


def test_a_format_is_one_file_and_one_line() -> None:
    """The adapter of `toy_format` completes, streams, lists and fails as the others do."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.toy_format"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "whole": ["Hello you 0.5", "toy", "polly", None],
        "chunks": ["Hello", "you"],
        "streamed": "Helloyou",
        "models": ["coco", "polly"],
        "refused": ["APIKeyError", 401],
        "cut": ["StreamInterruptedError", 200],
    }


def test_a_name_that_is_taken_is_not_registered_twice() -> None:
    """A second adapter for a provider would depend on the order of imports."""

    class Other(BaseLLMAdapter):
        rows = (factory.by_name("openai"),)

    with pytest.raises(ValueError, match="openai: the name is taken"):
        factory.register(Other)


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules that a module imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", ["claude", "gemini", "ollama", "openai_responses"])
def test_a_format_touches_two_modules(name: str) -> None:
    """Its own file, and the factory that has it in a list.

    `dipeo_llm` names the classes that users import.
    """
    module = f"dipeo_llm.adapters.{name}"
    importers = {other for other, tree in TREES.items() if module in imports(tree)}

    assert importers - {"dipeo_llm.__init__"} == {"dipeo_llm.adapters.factory"}


# A table of what LiteLLM knows of its providers, by LiteLLM's names.
OF_LITELLM = {"dipeo_llm.litellm_providers"}
NAMES = {
    name
    for row in factory.PROVIDERS
    for name in (row.name, row.litellm, *row.aliases)
    # It names a package and an engine too.
    if name != "litellm"
}


def constants(node: ast.expr) -> set[object]:
    """Return the constants of an expression, or of a tuple, list or set of them."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


def provider_questions(tree: ast.Module) -> Iterator[str]:
    """Yield each comparison with a provider's name, and each match on one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_a_row = any(
                ast.unparse(side).endswith(("provider.name", "row.name", ".litellm"))
                for side in sides
            )
            is_equality = any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
            known = NAMES & set().union(*map(constants, sides))
            if known or (of_a_row and is_equality):
                yield ast.unparse(node)
        elif isinstance(node, ast.MatchValue) and NAMES & constants(node.value):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("self.provider.name == other", 1),
        ("row.litellm != x", 1),
        ("service in {'openai', 'x'}", 1),
        ("match name:\n    case 'gemini': pass", 1),
        ("row.name in addressed", 0),
        ("engine == 'litellm'", 0),
    ],
)
def test_a_question_is_found(code: str, count: int) -> None:
    """The search below sees what it looks for."""
    assert len(list(provider_questions(ast.parse(code)))) == count


@pytest.mark.parametrize("module", sorted(TREES.keys() - FORMATS - OF_LITELLM))
def test_no_other_module_asks_which_provider_it_is(module: str) -> None:
    """What is particular to a provider is in the file of its format."""
    assert list(provider_questions(TREES[module])) == []
