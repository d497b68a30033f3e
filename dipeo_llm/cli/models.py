"""`dipeo-llm models` and `dipeo-llm provider`: what there is, and whose it is."""

import os
import sys
from dataclasses import asdict
from typing import Any

import click

from dipeo_llm.adapters import factory
from dipeo_llm.cli import terminal
from dipeo_llm.cli.options import (
    Command,
    Exit,
    UsageError,
    complete_service,
    connection,
    find_provider,
    key_for,
    open_service,
    report,
    run,
    service,
)
from dipeo_llm.errors import APIKeyNotFoundError, DiPeOLLMError

_MODELS = """\
List the models that a provider offers to your key, one on a line, as `chat` takes them.

Without SERVICE, each provider whose key is in the environment is asked: OpenAI, DeepSeek,
Anthropic and Google; and Ollama, if OLLAMA_HOST or DIPEO_LLM_OLLAMA_BASE_URL is set.

With --providers, list the names that SERVICE takes, with the variable of each one's key and
its address; nothing is sent.
"""

_MODELS_EPILOG = """\
Examples:
  dipeo-llm models
  dipeo-llm models anthropic
  dipeo-llm models openai --key-id OPENAI_API_KEY --json
  dipeo-llm models ollama --base-url http://192.168.1.5:11434
  dipeo-llm models --providers
"""

_PROVIDER_EPILOG = """\
Examples:
  dipeo-llm provider gemini-2.5-flash
  dipeo-llm provider llama3.2:1b

Most names are known here; for the others LiteLLM is imported, which takes seconds.
The exit code is 1 if no provider has the model.
"""


@click.command(
    cls=Command,
    help=_MODELS,
    short_help="List the models that a provider offers.",
    epilog=_MODELS_EPILOG,
)
@click.argument(
    "service", required=False, type=service, shell_complete=complete_service
)
@connection
@click.option("--providers", is_flag=True, help="List the providers instead.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print {service: [model, ...]}, or a list of providers.",
)
def models(
    service: str | None, *, providers: bool, as_json: bool, **connection: Any
) -> Exit:
    """List the models of one provider, or of all that the environment leads to."""
    if providers:
        if service or any(connection.values()):
            raise UsageError(
                "--providers takes no SERVICE and no other option but --json"
            )
        return _list_providers(as_json=as_json)
    if not service and (connection["key_id"] or connection["base_url"]):
        raise UsageError("--key-id and --base-url need a SERVICE")
    code = Exit.OK
    found: dict[str, list[str]] = {}
    for provider in [service] if service else _find_providers():
        try:
            found[provider] = run(_list_models(provider, **connection))
        except DiPeOLLMError as exc:
            code = report(exc)
    if as_json:
        terminal.write_json(found)
    else:
        names = (f"{provider}/{name}" for provider in found for name in found[provider])
        terminal.write(terminal.lines(names))
    return code


def _list_providers(*, as_json: bool) -> Exit:
    """Print every provider: a table on a terminal, else fields with tabs between."""
    terminal.show_status("loading LiteLLM ...")
    rows = factory.list_providers()
    if as_json:
        terminal.write_json([asdict(row) for row in rows])
        return Exit.OK
    table = [
        (
            row.prefix,
            row.engine,
            " or ".join(row.key_variables) or "-",
            row.address or row.example or "-",
            row.notes if row.engine == "refused" else "",
        )
        for row in rows
    ]
    if terminal.is_terminal(sys.stdout):
        widths = [
            max(map(len, column)) for column in list(zip(*table, strict=True))[:2]
        ]
        lines = (
            f"{prefix:{widths[0]}}  {engine:{widths[1]}}"
            f"  {reason or f'{address}  {variables}'}"
            for prefix, engine, variables, address, reason in table
        )
    else:
        lines = ("\t".join(row).rstrip() for row in table)
    terminal.write("".join(f"{terminal.escape(line)}\n" for line in lines))
    return Exit.OK


async def _list_models(provider: str, key_id: str | None, **settings: Any) -> list[str]:
    async with open_service(provider, **settings) as opened:
        return await opened.get_available_models(key_for(provider, key_id))


def _find_providers() -> list[str]:
    """Name the providers that the environment holds a key or an address for."""
    from dipeo_llm import Settings

    listed = [row for row in factory.PROVIDERS if row.base_url]
    addressed = Settings.from_env().base_urls
    found = [
        row.name
        for row in listed
        if (not row.needs_key and row.name in addressed)
        or any(os.environ.get(variable) for variable in row.key_variables)
    ]
    if not found:
        variables = ", ".join(row.key_variables[0] for row in listed if row.needs_key)
        raise APIKeyNotFoundError(
            f"no key is set: set one of {variables}, or name a SERVICE without a key,"
            " such as ollama"
        )
    return found


@click.command(cls=Command, epilog=_PROVIDER_EPILOG)
@click.argument("name")
def provider(name: str) -> Exit:
    """Print the provider that a model's NAME belongs to."""
    terminal.write(run(find_provider(name)) + "\n")
    return Exit.OK
