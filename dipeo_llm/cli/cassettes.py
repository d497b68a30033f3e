"""`dipeo-llm cassettes`: check and list recordings, as `cassette_folder` finds them."""

from typing import Any

import click

from dipeo_llm.cli import terminal
from dipeo_llm.cli.options import Command, Exit, Group
from dipeo_llm.errors import DiPeOLLMError

_EPILOG = """\
Examples:
  dipeo-llm cassettes check
  dipeo-llm cassettes check tests/cassettes
  dipeo-llm cassettes list tests/cassettes/test_rivers.yaml
"""
_folder = click.argument(
    "folder", metavar="[DIR]", default="cassettes", type=click.Path()
)


@click.group(cls=Group, epilog=_EPILOG, no_args_is_help=False)
def cassettes() -> None:
    """Check and list recorded exchanges. DIR may be one file; default: cassettes."""


@cassettes.command(cls=Command, epilog=_EPILOG)
@_folder
def check(folder: str) -> Exit:
    """Look for keys and other secrets; exit with 1 if there are any."""
    cassette_folder = _import_cassette_folder()
    problems = cassette_folder.check(folder)
    if problems:
        terminal.write(terminal.lines(map(str, problems)))
    count = _count(len(cassette_folder.files(folder)), "cassette")
    found = _count(len(problems), "problem") if problems else "no secret found"
    terminal.write_error(f"{count}, {found}")
    return Exit.FAILED if problems else Exit.OK


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@cassettes.command("list", cls=Command, epilog=_EPILOG)
@_folder
def list_(folder: str) -> Exit:
    """Show when, from where and with which model each was recorded."""
    cassette_folder = _import_cassette_folder()
    try:
        table = cassette_folder.list_table(folder)
    except cassette_folder.CassetteError as exc:  # pytest's, and not an Exception
        terminal.write_error(str(exc))
        return Exit.FAILED
    terminal.write(terminal.escape(table))
    return Exit.OK


def _import_cassette_folder() -> Any:
    try:
        from dipeo_llm.testing import cassette_folder
    except ModuleNotFoundError:
        raise DiPeOLLMError(
            "cassettes need vcrpy and pytest: pip install 'dipeo-llm[testing]'"
        ) from None
    return cassette_folder
