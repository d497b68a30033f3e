"""What all commands share: argument types, connection options, errors, a service.

Knows names, types and the environment. Knows no command.
"""

import math
import os
import re
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dipeo_llm.adapters import factory
from dipeo_llm.cli import terminal
from dipeo_llm.errors import (
    APIKeyError,
    DiPeOLLMError,
    InvalidRequestError,
    SettingsError,
)

if TYPE_CHECKING:
    import asyncio

    from dipeo_llm.reports import CallHook
    from dipeo_llm.routes import Route
    from dipeo_llm.service import LLMInfraService

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


class Exit(IntEnum):
    """The exit codes."""

    OK = 0
    FAILED = 1
    USAGE = 2
    KEY = 3
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    """What a shell reports for a program that SIGPIPE ended."""


class UsageError(click.UsageError):
    """An argument, file or setting is wrong; points to the command's help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, click.get_current_context(silent=True))


class Command(click.Command):
    """A command whose help shows its examples as they are written."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog without wrapping it."""
        if self.epilog:
            formatter.write(f"\n{self.epilog}")


class Group(Command, click.Group):
    """A group of such commands."""


# --- types: each takes an argument as typed and raises BadParameter -----------------


class Number(click.FloatRange):
    """A finite number in a range."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Refuse nan and inf, which no comparison with a limit refuses."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


SECONDS = Number(min=0, min_open=True)


def text(argument: str) -> str:
    """Check that an argument is text: bytes that are not UTF-8 arrive as surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise click.BadParameter("it is not UTF-8 text") from None
    return argument


def service(argument: str) -> str:
    """Return a provider's name for any of its names."""
    try:
        return factory.by_name(argument).name
    except InvalidRequestError as exc:
        raise click.BadParameter(exc.message) from None


def _url(argument: str) -> str:
    from dipeo_llm.settings import http_url

    try:
        return http_url(argument)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


def _key_id(argument: str) -> str:
    if factory.of_key(argument) is None:
        # The argument is not repeated: it may be the key itself.
        raise click.BadParameter(
            "it must name a provider or the variable that holds its key; never put a"
            " key on a command line"
        )
    return argument


def complete_service(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Return the provider names that begin with what is typed, for the shell."""
    return [r.name for r in factory.PROVIDERS if r.name.startswith(incomplete)]


def _complete_key_id(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    variables = (name for row in factory.PROVIDERS for name in row.key_variables)
    return [name for name in variables if name.startswith(incomplete)]


def connection(command: _F) -> _F:
    """Add the options that say how a provider is reached."""
    options = (
        click.option(
            "--key-id",
            metavar="NAME",
            type=_key_id,
            shell_complete=_complete_key_id,
            help="The variable that holds the key, such as GEMINI_API_KEY. Default:"
            " the provider's own.",
        ),
        click.option(
            "--base-url",
            metavar="URL",
            type=_url,
            help="Where the provider is reached. Your key is sent there.",
        ),
        click.option(
            "--timeout",
            metavar="SECONDS",
            type=SECONDS,
            help="Limit for one attempt. Default: DIPEO_LLM_TIMEOUT, else 300.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


# --- running ------------------------------------------------------------------------


def open_service(
    provider: str,
    *,
    base_url: str | None = None,
    on_call: "CallHook | None" = None,
    **changes: Any,
) -> "LLMInfraService":
    """Make a service with the environment's settings.

    Args:
        provider: Whose address `base_url` replaces.
        base_url: None keeps the address of the settings.
        on_call: Gets the record of each call.
        **changes: Fields of `Settings`; None keeps the environment's.
    """
    from dipeo_llm import (
        EnvironmentAPIKeys,
        LLMInfraService,
        Settings,
        SystemPromptHandler,
    )

    settings = Settings.from_env()
    if base_url is not None:
        changes["base_urls"] = {**settings.base_urls, provider: base_url}
    changes = {name: value for name, value in changes.items() if value is not None}
    return LLMInfraService(
        EnvironmentAPIKeys(),
        settings=replace(settings, **changes),
        # Paths are relative to the working directory, as for any other program, and
        # the person who typed them may read whatever they lead to.
        system_prompt_handler=SystemPromptHandler(
            Path.cwd(), allow_outside_base_dir=True
        ),
        on_call=on_call,
    )


async def find_provider(model: str, service: str | None = None) -> str:
    """Return the name of a model's provider.

    Imports LiteLLM, which takes seconds, only for a name that no provider here claims.

    Raises:
        InvalidRequestError: Nobody claims the name.
    """
    if factory.needs_litellm(model, service):
        from dipeo_llm.litellm_import import load_litellm

        await load_litellm()
    return factory.resolve(model, service)[0].name


async def find_provider_and_key(
    model: str, service: str | None, key_id: str | None
) -> tuple[str, str | None]:
    """Return the provider of a model and the id of the key to send to it.

    For a route the provider is "", and the key is what the user chose: its deployments
    name their own.

    Raises:
        InvalidRequestError: Nobody claims the name.
        UsageError: The key is another provider's.
    """
    if service is None and model in read_routes():
        return "", key_id
    provider = await find_provider(model, service)
    return provider, key_for(provider, key_id)


def read_routes() -> "Mapping[str, Route]":
    """Return the routes of the file that DIPEO_LLM_ROUTES names.

    Raises:
        SettingsError: It cannot be used.
    """
    if not os.environ.get("DIPEO_LLM_ROUTES"):
        return {}
    from dipeo_llm import Routes, Settings

    path = Settings.from_env().routes_file
    return Routes.read(path).routes if path else {}


def key_for(provider: str, key_id: str | None) -> str:
    """Return the id of the key to send to a provider.

    Args:
        provider: The provider's name.
        key_id: What the user chose. None, or another application's id, takes the
            provider's own key.

    Raises:
        UsageError: The key is another provider's.
    """
    owner = factory.of_key(key_id) if key_id else None
    if owner is None or key_id is None:
        return provider
    if owner.name != provider:
        raise UsageError(
            f"{key_id!r} is a key of {owner.name}, and is not sent to {provider}"
        )
    return key_id


def is_model(argument: str) -> bool:
    """Tell whether an argument reads as a model's name, not as a prompt."""
    if re.fullmatch(r"[a-z][a-z0-9_-]*/\S+", argument) or argument in read_routes():
        return True
    return bool(argument.strip()) and not factory.needs_litellm(argument)


def run(work: Coroutine[Any, Any, _T], runner: "asyncio.Runner | None" = None) -> _T:
    """Run a coroutine. It must not block.

    Args:
        work: The coroutine.
        runner: Has the event loop; None makes one for this call.

    Raises:
        KeyboardInterrupt: Ctrl-C, after *work* has closed what it opened.
    """
    import asyncio

    async def interruptible() -> _T:
        try:
            return await work
        except asyncio.CancelledError:
            # LiteLLM's import may still run in its thread; Python would wait for it.
            if click.get_current_context().obj == "process":
                terminal.leave()
                os._exit(Exit.INTERRUPTED)
            raise

    return (runner.run if runner else asyncio.run)(interruptible())


def report(exc: Exception) -> Exit:
    """Print what an exception means to the user, and return its exit code."""
    if isinstance(exc, click.ClickException):
        message = exc.format_message().rstrip(".")
        message = message[:1].lower() + message[1:]
        if isinstance(exc, click.UsageError) and exc.ctx:
            message += f" (see {exc.ctx.command_path} --help)"
    elif isinstance(exc, DiPeOLLMError | OSError):
        message = f"{exc}{_circumstances(exc)}"
    else:
        message = f"{type(exc).__name__}: {exc}"
    with suppress(OSError):  # stdout may be what is wrong
        terminal.end_line()
    terminal.write_error(message)
    if isinstance(exc, click.ClickException | SettingsError):
        return Exit.USAGE
    return Exit.KEY if isinstance(exc, APIKeyError) else Exit.FAILED


def _circumstances(exc: Exception) -> str:
    attempts = getattr(exc, "attempts", 0)
    wait = getattr(exc, "retry_after", None)
    request_id = getattr(exc, "request_id", None)
    known = [
        f"{attempts} attempts" if attempts > 1 else "",
        f"try again in {wait:g} s" if wait is not None else "",
        f"request {request_id}" if request_id else "",
    ]
    return f" ({', '.join(filter(None, known))})" if any(known) else ""
