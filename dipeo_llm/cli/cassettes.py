"""`dipeo-llm cassettes`: look after recordings. Prints; what it prints is `cassette_folder`'s.

A command takes the parsed arguments and returns an exit code, 0 or 1.
"""

import argparse
from typing import Any

from dipeo_llm.cli import terminal
from dipeo_llm.errors import DiPeOLLMError


def check(options: argparse.Namespace) -> int:
    """Print what is wrong with a folder's cassettes, one line for each."""
    cassette_folder = _cassette_folder()
    problems = cassette_folder.check(options.folder)
    if problems:
        terminal.write(terminal.lines(map(str, problems)))
    count = _counted(len(cassette_folder.files(options.folder)), "cassette")
    found = _counted(len(problems), "problem") if problems else "no secret found"
    terminal.complain(f"{count}, {found}")
    return 1 if problems else 0


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def list_(options: argparse.Namespace) -> int:
    """Print a table of a folder's cassettes."""
    cassette_folder = _cassette_folder()
    try:
        table = cassette_folder.list_table(options.folder)
    except cassette_folder.CassetteError as exc:  # an outcome of pytest, no Exception
        terminal.complain(str(exc))
        return 1
    terminal.write(terminal.harmless(table))
    return 0


def _cassette_folder() -> Any:
    try:
        from dipeo_llm.testing import cassette_folder
    except ModuleNotFoundError:
        raise DiPeOLLMError(
            "cassettes need vcrpy and pytest: pip install 'dipeo-llm[testing]'"
        ) from None
    return cassette_folder
