"""`dipeo-llm doctor`: whether this installation can make calls, and what to do if not."""

import os
import platform
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from dipeo_llm.adapters import factory
from dipeo_llm.adapters.provider import Provider
from dipeo_llm.cli import terminal
from dipeo_llm.cli.options import (
    SECONDS,
    Command,
    Exit,
    find_provider_and_key,
    run,
)
from dipeo_llm.errors import DiPeOLLMError, SettingsError

if TYPE_CHECKING:
    from dipeo_llm.service import LLMInfraService
    from dipeo_llm.settings import Settings

_HELP = """\
Check what a call needs: versions, LiteLLM, settings, prompt folder, keys and providers.

Each line is ok, note (not used here) or fail, and says what to do. Keys are never
shown; each is sent only to its own provider, which is asked for its list of models. The
exit code is 1 if a line is fail.
"""

_EPILOG = """\
Examples:
  dipeo-llm doctor
  dipeo-llm doctor --offline
  OLLAMA_HOST=192.168.1.5 dipeo-llm doctor --timeout 3
"""

_COLOURS = {"ok": 32, "note": 33, "fail": 31}


class Finding(NamedTuple):
    """The outcome of one check."""

    state: str
    """A key of _COLOURS."""
    text: str


@click.command(
    cls=Command, help=_HELP, short_help="Check that calls can be made.", epilog=_EPILOG
)
@click.option("--offline", is_flag=True, help="Ask no provider.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=SECONDS,
    default=10.0,
    show_default=True,
    help="Limit for each provider's answer.",
)
def doctor(*, offline: bool, timeout: float) -> Exit:
    """Print the outcome of each check."""
    return run(_print_findings(None if offline else timeout))


async def _print_findings(limit: float | None) -> Exit:
    code = Exit.OK
    async for state, text in _check(limit):
        mark = terminal.paint(f"{state:<4}", _COLOURS[state], sys.stdout)
        terminal.write(f"{mark}  {terminal.one_line(text)}\n")
        code = Exit.FAILED if state == "fail" else code
    return code


async def _check(limit: float | None) -> AsyncIterator[Finding]:
    """Make all checks, the quickest first.

    Args:
        limit: Seconds for each provider's answer; None asks none.
    """
    from dipeo_llm import Settings

    python = f"Python {platform.python_version()} ({sys.executable})"
    yield Finding("ok", python)
    for finding in _check_versions():
        yield finding
    settings = Settings()
    try:
        settings = Settings.from_env()
        yield Finding(
            "ok",
            f"settings: {settings.timeout:g} s for an attempt,"
            f" {settings.max_retries} retries, engine {settings.engine}",
        )
    except SettingsError as exc:
        yield Finding("fail", f"settings: {exc}; correct the variable")
    yield _check_folder(settings.base_dir)
    if settings.routes_file:
        yield _check_routes(settings.routes_file)
    if model := os.environ.get("DIPEO_LLM_MODEL"):
        yield await _check_model(model)
    terminal.show_status("loading LiteLLM ...")
    yield await _check_litellm()
    async for finding in _check_providers(settings, limit):
        yield finding


def _check_versions() -> Iterator[Finding]:
    """Compare what is installed with what the package requires."""
    from packaging.requirements import Requirement

    yield Finding("ok", f"dipeo-llm {version('dipeo-llm')}")
    for line in requires("dipeo-llm") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate():
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = "is missing"
        said = f"{needed.name} {found} (required: {needed.specifier or 'any'})"
        if found == "is missing" or found not in needed.specifier:
            yield Finding(
                "fail", f"{said}; pip install '{needed.name}{needed.specifier}'"
            )
        elif needed.name == "litellm":
            yield Finding("ok", said)


def _check_folder(base_dir: Path | None) -> Finding:
    folder = base_dir or Path.cwd()
    name = "DIPEO_BASE_DIR" if base_dir else "the working directory"
    if not folder.is_dir():
        return Finding("fail", f"prompt folder {folder}: it does not exist; set {name}")
    if not os.access(folder, os.R_OK | os.X_OK):
        return Finding("fail", f"prompt folder {folder}: not readable; change {name}")
    return Finding("ok", f"prompt folder {folder} ({name})")


def _check_routes(path: Path) -> Finding:
    from dipeo_llm import Routes

    try:
        routes = Routes.read(path).routes
    except SettingsError as exc:
        return Finding("fail", f"routes: {exc}; correct the file")
    return Finding("ok", f"routes: {', '.join(routes)} ({path})")


async def _check_model(model: str) -> Finding:
    try:
        provider, _ = await find_provider_and_key(model, None, None)
    except DiPeOLLMError as exc:
        return Finding("fail", f"DIPEO_LLM_MODEL: {exc}")
    if not provider:
        return Finding("ok", f"DIPEO_LLM_MODEL {model} is a route")
    return Finding("ok", f"DIPEO_LLM_MODEL {model} is a model of {provider}")


async def _check_litellm() -> Finding:
    """Import LiteLLM and try its translators, as the first call does."""
    from dipeo_llm.adapters.translation import check_translation
    from dipeo_llm.litellm_import import load_litellm

    try:
        litellm = await load_litellm()
    except Exception as exc:  # noqa: BLE001 - a broken installation raises anything
        return Finding(
            "fail",
            f"LiteLLM cannot be imported: {type(exc).__name__}: {exc};"
            " pip install --force-reinstall litellm",
        )
    checks = {
        adapter.rows[0].name: check_translation(litellm, adapter)
        for adapter in factory.ADAPTERS
        if adapter.probe is not None
    }
    failed = [name for name, fits in checks.items() if not fits]
    if failed:
        return Finding(
            "note",
            f"LiteLLM self-check: {', '.join(failed)} differ from what was tested, so"
            " calls go through litellm.acompletion; to avoid that, install a tested"
            " LiteLLM (docs/litellm.md)",
        )
    return Finding("ok", f"LiteLLM self-check: {', '.join(checks)}")


async def _check_providers(
    settings: "Settings", limit: float | None
) -> AsyncIterator[Finding]:
    """Ask all providers at once that a key or an address is set for."""
    import asyncio

    from dipeo_llm import EnvironmentAPIKeys, LLMInfraService

    changed = replace(settings, max_retries=0, timeout=limit or settings.timeout)
    rows = [row for row in factory.PROVIDERS if row.base_url]
    terminal.show_status("asking the providers ...")
    async with LLMInfraService(EnvironmentAPIKeys(), settings=changed) as service:
        findings = await asyncio.gather(
            *(_check_provider(row, service, is_offline=limit is None) for row in rows)
        )
    for finding in findings:
        yield finding
    if all(finding.state == "note" for finding in findings):
        yield Finding(
            "fail", "no provider can be used: set one of the keys above, or run Ollama"
        )


async def _check_provider(
    row: Provider, service: "LLMInfraService", *, is_offline: bool
) -> Finding:
    url = service.settings.base_urls.get(row.name)
    variable = next((name for name in row.key_variables if os.environ.get(name)), None)
    if row.needs_key and not variable:
        wanted = " or ".join(row.key_variables)
        return Finding("note", f"{row.name}: no key; to use it, set {wanted}")
    key = f"key in {variable}, " if variable else ""
    where = url or row.base_url
    if is_offline:
        return Finding("ok", f"{row.name}: {key}{where} was not asked")
    try:
        if await service.validate_api_key(row.name):
            accepts = " and accepts the key" if variable else ""
            return Finding("ok", f"{row.name}: {key}{where} answers{accepts}")
    except DiPeOLLMError as exc:
        if not row.needs_key and not url:
            return Finding(
                "note",
                f"{row.name}: nothing answers at {where}; to use it, start it there, or"
                " set OLLAMA_HOST",
            )
        return Finding(
            "fail",
            f"{row.name}: {key}{where}: {exc}; check the address, the network and the"
            " proxy",
        )
    return Finding(
        "fail", f"{row.name}: {where} refuses the key in {variable}; set a valid one"
    )
