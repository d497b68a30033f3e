"""`dipeo-llm cassettes`: look after recordings. Prints; what it prints is `cassette_folder`'s."""

import argparse
import sys
from typing import Any

_MISSING = "cassettes need vcrpy and pytest: pip install 'dipeo-llm[testing]'"


def add_parser(subparsers: Any) -> None:
    """Add `cassettes check` and `cassettes list` to a command's subparsers.

    Their coroutine functions are set as `command`: they take the parsed arguments and
    return an exit code, 0 or 1.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cassettes", help="look after recorded exchanges"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for command, text in (
        (check, "look for keys and other secrets; exits with 1 if there are some"),
        (list_, "show what was recorded when, from where and with which model"),
    ):
        action = actions.add_parser(command.__name__.strip("_"), help=text)
        action.description = f"{text[0].upper()}{text[1:]}."
        action.add_argument(
            "folder",
            nargs="?",
            default="cassettes",
            metavar="DIR",
            help="the folder, or one file (default: cassettes)",
        )
        action.set_defaults(command=command)


async def check(options: argparse.Namespace) -> int:
    """Print what is wrong with a folder's cassettes, one line for each."""
    cassette_folder = _cassette_folder()
    if cassette_folder is None:
        return 1
    problems = cassette_folder.check(options.folder)
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    count = len(cassette_folder.files(options.folder))
    noun = "cassette" if count == 1 else "cassettes"
    verdict = f"{len(problems)} problems" if problems else "no secret found"
    sys.stderr.write(f"dipeo-llm: {count} {noun}, {verdict}\n")
    return 1 if problems else 0


async def list_(options: argparse.Namespace) -> int:
    """Print a table of a folder's cassettes."""
    cassette_folder = _cassette_folder()
    if cassette_folder is None:
        return 1
    try:
        sys.stdout.write(cassette_folder.list_table(options.folder))
    except cassette_folder.CassetteError as exc:
        sys.stderr.write(f"dipeo-llm: {exc}\n")
        return 1
    return 0


def _cassette_folder() -> Any:
    try:
        from dipeo_llm import cassette_folder
    except ModuleNotFoundError:
        sys.stderr.write(f"dipeo-llm: {_MISSING}\n")
        return None
    return cassette_folder
