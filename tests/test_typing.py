"""The types of a call, as three type checkers see them.

`nox -s typing` installs them all; a checker that is not installed is skipped.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "typed_calls.py"
MISTAKES = ROOT / "tests" / "typed_mistakes.py"


class Checker(Protocol):
    """Returns the lines of a file that have an error."""

    __name__: str

    def __call__(self, path: Path) -> set[int]:
        """Check a file."""
        ...


def run(*command: str) -> str:
    """Run a program where the package is; return what it prints."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    # 1 is a checker's answer that there are errors.
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.stdout


def lines_of(said: str, path: Path) -> set[int]:
    """Return the lines of a file in which errors were found, by `path:line:`."""
    found = rf"^\S*{re.escape(path.name)}:(\d+):.* error"
    return {int(line) for line in re.findall(found, said, re.MULTILINE)}


def mypy(path: Path) -> set[int]:
    """Ask mypy, with the project's own configuration."""
    return lines_of(run(sys.executable, "-m", "mypy", "--no-pretty", str(path)), path)


def basedpyright(path: Path) -> set[int]:
    """Ask basedpyright, as an editor does that is based on pyright."""
    said = run(
        "basedpyright", "--pythonpath", sys.executable, "--outputjson", str(path)
    )
    return {
        found["range"]["start"]["line"] + 1
        for found in json.loads(said)["generalDiagnostics"]
        if found["severity"] == "error" and Path(found["file"]).name == path.name
    }


def ty(path: Path) -> set[int]:
    """Ask ty."""
    return lines_of(
        run(
            *("ty", "check", "--python", sys.prefix, "--extra-search-path", str(ROOT)),
            *("--output-format", "concise", str(path)),
        ),
        path,
    )


@pytest.fixture(params=[mypy, basedpyright, ty], ids=lambda checker: checker.__name__)
def checker(request: pytest.FixtureRequest) -> Checker:
    """Each checker that is installed."""
    found: Checker = request.param
    if shutil.which(found.__name__) is None:
        pytest.skip(f"{found.__name__} is not installed")
    return found


def test_the_example_is_well_typed(checker: Checker) -> None:
    """What the example asserts about the types is what the checker infers."""
    assert checker(EXAMPLE) == set()


def test_every_mistake_is_found(checker: Checker, tmp_path: Path) -> None:
    """Each marked line is an error, and no other line is."""
    text = MISTAKES.read_text("utf-8")
    copy = tmp_path / MISTAKES.name
    copy.write_text(re.sub(r"  # type: ignore.*", "", text), "utf-8")
    unseen = f"# not seen by {checker.__name__}"
    marked = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if "  # type: ignore" in line and unseen not in line
    }

    assert len(marked) > 20
    assert checker(copy) == marked


def test_the_example_runs() -> None:
    """It makes its calls, and each is answered in its form."""
    printed = run(sys.executable, str(EXAMPLE)).splitlines()

    assert (printed[0], printed[-1]) == ("Inn: 517 km", "Hello.")
