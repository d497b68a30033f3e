"""`dipeo-llm routes`: print the routes of a file, or what is wrong with it."""

import os
from pathlib import Path
from typing import Any

import click

from dipeo_llm.cli import terminal
from dipeo_llm.cli.options import Command, Exit, UsageError, run

_HELP = """\
Print the routes of FILE with their deployments, and look up each model.

A route is a name of your own for models: `dipeo-llm chat fast "Hello"` calls one of its
deployments, and another if that fails. FILE is YAML or JSON; without it, the file that
DIPEO_LLM_ROUTES names. Nothing is sent.
"""

_EPILOG = """\
Examples:
  dipeo-llm routes routes.yaml
  DIPEO_LLM_ROUTES=routes.yaml dipeo-llm chat fast "Name three rivers."

A file:
  routes:
    fast:
      strategy: load        # or shuffle, cost, latency, usage
      fallbacks: [smart]
      deployments:
        - {model: gpt-4.1-nano, api_key_id: openai, rpm: 500}
        - {model: gemini-2.5-flash, api_key_id: google}
    smart:
      deployments: [{model: claude-opus-4-1, api_key_id: anthropic}]
"""


@click.command(
    cls=Command,
    help=_HELP,
    short_help="Check a file of routes and print it.",
    epilog=_EPILOG,
)
@click.argument("file", metavar="[FILE]", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def routes(file: str | None, *, as_json: bool) -> Exit:
    """Print routes as text or JSON."""
    from dipeo_llm import LLMInfraService, Routes, StaticAPIKeys

    path = file or os.environ.get("DIPEO_LLM_ROUTES")
    if not path:
        raise UsageError("the file is missing: give FILE, or set DIPEO_LLM_ROUTES")
    found = Routes.read(Path(path).expanduser())

    async def look_up() -> None:
        async with LLMInfraService(StaticAPIKeys({}), routes=found) as service:
            terminal.show_status("loading LiteLLM ...")
            await service.initialize()

    run(look_up())
    if as_json:
        terminal.write_json(found.model_dump(mode="json", exclude_defaults=True))
    else:
        terminal.write(terminal.lines(_describe(found.routes)))
    return Exit.OK


def _describe(found: Any) -> list[str]:
    said = []
    for name, route in found.items():
        then = f", then {', '.join(route.fallbacks)}" if route.fallbacks else ""
        said.append(f"{name}: {route.strategy}{then}")
        for each in route.deployments:
            limits = {"weight": each.weight, "rpm": each.rpm, "tpm": each.tpm}
            known = [f"{key} {value:g}" for key, value in limits.items() if value]
            said.append(f"{name} -> {each.label}: {each.model}, {', '.join(known)}")
    return said
