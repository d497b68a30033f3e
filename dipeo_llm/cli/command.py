"""The command `dipeo-llm`: a question to a model, and what models there are.

Knows the commands, what they read and their exit codes; `cli_arguments` knows how they
are typed, `terminal` how they print, and the rest is the service's. What takes time to
import is imported by the command that needs it, so that `--help` comes at once.
"""

import argparse
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from dipeo_llm.adapters import factory as providers
from dipeo_llm.cli import arguments as cli_arguments
from dipeo_llm.cli import cassettes as cassette_cli
from dipeo_llm.cli import terminal
from dipeo_llm.cli.arguments import UsageError
from dipeo_llm.errors import (
    APIKeyError,
    APIKeyNotFoundError,
    DiPeOLLMError,
    InvalidRequestError,
    SettingsError,
)
from dipeo_llm.files import open_regular, resolve_inside
from dipeo_llm.settings import Settings

if TYPE_CHECKING:
    import asyncio

    from dipeo_llm.domain import ChatResult, ImageGenerationResult, ToolOutput
    from dipeo_llm.service import LLMInfraService
    from dipeo_llm.streaming import ChatStream

_T = TypeVar("_T")


class Exit(IntEnum):
    """What the command tells the shell."""

    OK = 0
    FAILED = 1
    USAGE = 2
    KEY = 3
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    """What a shell shows for a program that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. No exception leaves it.

    Args:
        argv: The arguments; None takes the process's own.

    An interrupt (Ctrl-C) closes the connection of the call in flight.
    """
    try:
        options = build_parser().parse_args(argv)
        options.is_process = argv is None
        command: cli_arguments.Command = options.command
        with terminal.logging_to_stderr():
            return command(options)
    except SystemExit:  # after --help or --version
        return Exit.OK
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        terminal.give_up_stdout()
        return Exit.BROKEN_PIPE
    except Exception as exc:  # noqa: BLE001 - a shell has no use for a traceback
        return _failed(exc)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser, with the commands in it."""
    return cli_arguments.build_parser(
        chat, models, provider, cassette_cli.check, cassette_cli.list_
    )


def _await(
    options: argparse.Namespace,
    work: Coroutine[Any, Any, _T],
    runner: "asyncio.Runner | None" = None,
) -> _T:
    """Do what needs the event loop. Nothing that blocks may stand in it.

    Args:
        options: Of the command.
        work: What to do.
        runner: Has the loop; None makes one for this work alone.

    Raises:
        KeyboardInterrupt: Ctrl-C, after *work* has closed what it opened.
    """
    import asyncio

    async def interruptible() -> _T:
        try:
            return await work
        except asyncio.CancelledError:
            # LiteLLM's import may run on in its thread, and Python would wait for it.
            if options.is_process:
                os._exit(Exit.INTERRUPTED)
            raise

    return (runner.run if runner else asyncio.run)(interruptible())


# --- the commands -------------------------------------------------------------------


def chat(options: argparse.Namespace) -> int:
    """Ask one question and print the answer, or hold a conversation."""
    _check_chat(options)
    if options.schema is not None:
        options.schema = _schema(options.schema)
    options.images = [_image(where) for where in options.images]
    system = _system_prompt(options)
    head = [{"role": "system", "content": system}] if system else []
    question = _stdin() if options.prompt == "-" else options.prompt
    if options.interactive:
        return _converse(options, head, question)
    result = _await(options, _answer(options, [*head, _asked(options, question)]))
    if options.json:
        # The providers' own words are large, and their form is not ours to promise.
        raw: Any = {"raw_response": True, "tool_outputs": {"__all__": {"raw_response"}}}
        terminal.write_json(result.model_dump(exclude=raw))
    elif options.schema is not None:
        terminal.write_json(result.parsed)
    else:
        _show_rest(options, result)
    return Exit.OK


def _check_chat(options: argparse.Namespace) -> None:
    """Refuse what is asked for twice in ways that exclude each other."""
    if options.prompt is None and not options.interactive:
        raise UsageError(
            "the following arguments are required: PROMPT (see dipeo-llm chat --help)"
        )
    if options.interactive and options.prompt == "-":
        raise UsageError("--interactive reads stdin itself: PROMPT cannot be -")
    whole = "--json" if options.json else None
    if options.schema is not None:
        whole = "--schema"
    for option in ("interactive", "stream"):
        if whole and getattr(options, option):
            raise UsageError(f"--{option} and {whole} exclude each other")


async def _answer(
    options: argparse.Namespace, messages: Sequence[Mapping[str, Any]]
) -> "ChatResult":
    service, key_id = await _opened(options)
    async with service:
        return await _call(options, service, key_id, messages)


async def _opened(options: argparse.Namespace) -> tuple["LLMInfraService", str]:
    """Make the service for a chat, and name the key that goes with it."""
    provider = await _provider_of(options.model, options.service)
    return _open(options, provider), _key_id(options, provider)


async def _call(
    options: argparse.Namespace,
    service: "LLMInfraService",
    key_id: str,
    messages: Sequence[Mapping[str, Any]],
) -> "ChatResult":
    """Ask; a stream's text has been written when this returns."""
    import asyncio

    from dipeo_llm import ToolConfig, ToolType

    call: dict[str, Any] = {
        "service": options.service,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "response_format": options.schema,
        "tools": [ToolConfig(type=ToolType(name)) for name in options.tools],
    }
    if _streams(options):
        async with service.stream(messages, options.model, key_id, **call) as stream:
            await _show(options, stream)
            return await stream.result()
    result = await service.complete(messages, options.model, key_id, **call)
    if options.show_reasoning and result.reasoning:
        await asyncio.to_thread(terminal.write_aside, result.reasoning + "\n")
    return result


def _streams(options: argparse.Namespace) -> bool:
    if options.json or options.schema is not None:
        return False
    if options.stream is not None:
        return bool(options.stream)
    return options.interactive or terminal.is_terminal(sys.stdout)


async def _show(options: argparse.Namespace, stream: "ChatStream") -> None:
    """Write a stream as it comes; a terminal that stands still holds only a thread."""
    import asyncio

    speaks = thinks = False
    try:
        async for chunk in stream:
            if chunk.reasoning and options.show_reasoning:
                thinks = True
                await asyncio.to_thread(terminal.write_aside, chunk.reasoning)
            if chunk.text:
                if thinks:
                    thinks = False
                    await asyncio.to_thread(terminal.write_aside, "\n")
                speaks = True
                await asyncio.to_thread(terminal.write_text, chunk.text)
    except DiPeOLLMError:
        if thinks:
            await asyncio.to_thread(terminal.write_aside, "\n")
        if speaks:  # the complaint has a line of its own
            await asyncio.to_thread(terminal.write, "\n")
        raise


def _show_rest(options: argparse.Namespace, result: "ChatResult") -> None:
    """Write what of an answer is not written yet, and say what is wrong with it."""
    outputs = result.tool_outputs or []
    if result.text or not outputs:
        terminal.write_text("\n" if _streams(options) else result.text + "\n")
    terminal.write(_sources(outputs) + _saved(outputs))
    if result.refusal:
        terminal.complain(f"the model declined: {result.refusal}")
    if result.finish_reason not in {"stop", None}:
        terminal.complain(
            f"the answer is not whole: it ended with {result.finish_reason!r}"
        )


def _sources(outputs: "Sequence[ToolOutput]") -> str:
    """List the pages that a search found, each once."""
    found: dict[str, str] = {}
    for output in outputs:
        for page in output.result if isinstance(output.result, list) else ():
            found.setdefault(page.url, page.title)
    listed = terminal.lines(
        f"- {title}: {url}" if title else f"- {url}" for url, title in found.items()
    )
    return f"\nSources:\n{listed}" if listed else ""


def _saved(outputs: "Sequence[ToolOutput]") -> str:
    """Save the pictures in the working directory; return their names, one on a line."""
    from dipeo_llm import ImageGenerationResult

    pictures = [
        o.result for o in outputs if isinstance(o.result, ImageGenerationResult)
    ]
    return terminal.lines(map(_saved_picture, pictures))


def _saved_picture(picture: "ImageGenerationResult") -> str:
    """Write a picture under the first name that is free."""
    import base64

    data = base64.b64decode(picture.image_data)
    known = picture.format in {"png", "jpeg", "jpg", "webp", "gif"}
    suffix = picture.format if known else "png"
    for number in itertools.count(1):
        name = f"image-{number}.{suffix}"
        with suppress(FileExistsError), open(name, "xb") as file:  # noqa: PTH123
            file.write(data)
            return name
    raise AssertionError  # for the type checker: numbers do not end


def _converse(
    options: argparse.Namespace, said: list[dict[str, Any]], question: str | None
) -> int:
    """Hold a conversation on stdin, until /quit or its end.

    Args:
        options: Of the command.
        said: What stands before the first question.
        question: The first one; None reads it.
    """
    import asyncio

    with asyncio.Runner() as runner:
        service, key_id = _await(options, _opened(options), runner)
        try:
            while True:
                question = question or _line()
                if question is None or question.strip() == "/quit":
                    return Exit.OK
                if question.strip():
                    try:
                        said += _turn(options, runner, service, key_id, said, question)
                    except DiPeOLLMError as exc:
                        _failed(exc)
                question = None
        finally:
            runner.run(service.aclose())


def _turn(
    options: argparse.Namespace,
    runner: "asyncio.Runner",
    service: "LLMInfraService",
    key_id: str,
    said: list[dict[str, Any]],
    question: str,
) -> list[dict[str, Any]]:
    """Show the answer to a question; return what is to be remembered of both."""
    asked = _asked(options, question)
    work = _call(options, service, key_id, [*said, asked])
    result = _await(options, work, runner)
    _show_rest(options, result)
    if not result.text:  # no provider takes a turn in which nothing is said
        return []
    options.images = []  # they have been seen
    return [asked, *result.to_messages()]


def models(options: argparse.Namespace) -> int:
    """Print what one provider offers, or all those that the environment leads to."""
    code = Exit.OK
    found: dict[str, list[str]] = {}
    for provider in [options.service] if options.service else _reachable(options):
        try:
            found[provider] = _await(options, _listed(options, provider))
        except DiPeOLLMError as exc:
            code = _failed(exc)
    if options.json:
        terminal.write_json(found)
    else:
        names = (f"{provider}/{name}" for provider in found for name in found[provider])
        terminal.write(terminal.lines(names))
    return code


async def _listed(options: argparse.Namespace, provider: str) -> list[str]:
    key_id = _key_id(options, provider)
    async with _open(options, provider) as service:
        return await service.get_available_models(key_id)


def provider(options: argparse.Namespace) -> int:
    """Print whose a model is."""
    terminal.write(_await(options, _provider_of(options.model)) + "\n")
    return Exit.OK


async def _provider_of(model: str, service: str | None = None) -> str:
    """Name a model's provider. Imports LiteLLM only for a name that no row claims."""
    row, _ = providers.resolve(model, service)
    if row is not None:
        return row.name
    from dipeo_llm import EnvironmentAPIKeys, LLMInfraService

    async with LLMInfraService(EnvironmentAPIKeys()) as asked:
        found = await asked.get_provider_for_model(model)
    if found is None:
        raise InvalidRequestError(
            f"no provider is known for model {model!r}: put its name before it, as in"
            f" openai/{model}, or give `chat` a --service"
        )
    return found


def _key_id(options: argparse.Namespace, provider: str) -> str:
    """Return the id of the key that goes to a provider: its own, or none."""
    key_id: str = options.key_id or provider
    owner = providers.of_key(key_id)
    if owner is None:
        raise APIKeyNotFoundError(
            f"no environment variable is known for the key of {provider}: a program can"
            " give one, by StaticAPIKeys"
        )
    if owner.name != provider:
        raise UsageError(
            f"{key_id!r} names a key of {owner.name}, which is not sent to {provider}"
        )
    return key_id


def _reachable(options: argparse.Namespace) -> list[str]:
    """Name the providers that the environment holds a key or an address for."""
    if options.key_id or options.base_url:
        raise UsageError("--key-id and --base-url need a SERVICE")
    listed = [row for row in providers.PROVIDERS if row.base_url]
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
            f"the environment holds no key: set one of {variables}, or name a SERVICE"
            " that needs none, such as ollama"
        )
    return found


def _open(options: argparse.Namespace, provider: str) -> "LLMInfraService":
    """Make a service that follows the options of a command."""
    from dipeo_llm import EnvironmentAPIKeys, LLMInfraService

    # A path on a command line means what it means to every other command.
    settings = replace(Settings.from_env(), base_dir=Path.cwd())
    if options.timeout is not None:
        settings = replace(settings, timeout=options.timeout)
    if options.base_url is not None:
        urls = {**settings.base_urls, provider: options.base_url}
        settings = replace(settings, base_urls=urls)
    return LLMInfraService(EnvironmentAPIKeys(), settings=settings)


# --- what goes in -------------------------------------------------------------------


def _asked(options: argparse.Namespace, question: str | None) -> dict[str, Any]:
    """Return the user's message: a question, and the pictures beside it."""
    content = [question, *options.images] if options.images else question
    return {"role": "user", "content": content}


def _image(where: str) -> Any:
    """Return the part of a message that holds a picture."""
    if re.match("(https?|data|gs):", where, re.IGNORECASE):
        return {"type": "image_url", "image_url": {"url": where}}
    path = Path(where)
    try:
        # The service reads it; here a slip is told before anything is sent.
        open_regular(resolve_inside(path, Path.cwd(), allow_outside=False)).close()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise UsageError(
            f"the file {where!r} of --image cannot be used: {why}"
            " (it must lie in or below the working directory)"
        ) from None
    return path


def _schema(path: str) -> dict[str, Any]:
    """Read a JSON schema, so that a slip in it costs no call."""
    import jsonschema

    from dipeo_llm.structured import form_of

    try:
        schema: Any = json.loads(Path(path).read_bytes())
        if not isinstance(schema, dict):
            raise InvalidRequestError("a JSON schema is an object")
        form_of(schema)
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except OSError as exc:
        why = exc.strerror
    except (jsonschema.SchemaError, InvalidRequestError) as exc:
        why = f"it holds no JSON schema: {exc.message}"
    except (ValueError, RecursionError) as exc:
        why = f"it is not JSON: {exc}"
    else:
        return schema
    raise UsageError(f"the file {path!r} of --schema cannot be used: {why}")


def _line() -> str | None:
    """Read what the user says next; None at the end."""
    if not all(map(terminal.is_terminal, (sys.stdin, sys.stdout))):
        return _stdin(lambda file: file.readline()) or None
    with suppress(ImportError):
        import readline  # noqa: F401 - its import lets input() edit and remember lines
    try:
        return input("> ").encode("utf-8", "replace").decode() + "\n"
    except EOFError:
        terminal.write("\n")
        return None


def _system_prompt(options: argparse.Namespace) -> str | None:
    """Return the prompt of --prompt-file, else of --system, by the library's rules."""
    if not options.prompt_file:
        return options.system_prompt or None
    from dipeo_llm import SystemPromptHandler

    reasons: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        reasons.append(record.getMessage())
        return False

    log = logging.getLogger("dipeo_llm")
    log.addFilter(hear)
    try:
        prompt = SystemPromptHandler(Path.cwd()).get_system_prompt(options)
    finally:
        log.removeFilter(hear)
    if reasons and prompt is None:
        raise UsageError(f"{reasons[0]} ({_PROMPT_FILE_RULES})")
    for reason in reasons:
        terminal.complain(reason)
    return prompt or None


_PROMPT_FILE_RULES = (
    "a prompt file lies in or below the working directory, is text in UTF-8 and no"
    " larger than 1 MiB"
)


def _stdin(read: Callable[[BinaryIO], bytes] = lambda file: file.read()) -> str:
    try:
        return read(sys.stdin.buffer).decode()
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"the prompt on stdin is not text in UTF-8: {exc.reason} at byte {exc.start}"
        ) from None
    except (AttributeError, OSError):  # None, or not open for reading
        raise UsageError("the prompt is to come from stdin, which is closed") from None


# --- what is wrong ------------------------------------------------------------------


def _failed(exc: Exception) -> Exit:
    """Say what an exception means to the user, and name the exit code for it."""
    foreseen = isinstance(exc, UsageError | DiPeOLLMError | OSError)
    said = f"{exc}{_circumstances(exc)}" if foreseen else f"{type(exc).__name__}: {exc}"
    terminal.complain(said)
    if isinstance(exc, UsageError | SettingsError):
        return Exit.USAGE
    return Exit.KEY if isinstance(exc, APIKeyError) else Exit.FAILED


def _circumstances(exc: Exception) -> str:
    """Add what helps to decide what to do, as far as it is known."""
    attempts = getattr(exc, "attempts", 0)
    wait = getattr(exc, "retry_after", None)
    request_id = getattr(exc, "request_id", None)
    known = [
        f"{attempts} attempts" if attempts > 1 else "",
        f"try again in {wait:g} s" if wait is not None else "",
        f"request {request_id}" if request_id else "",
    ]
    return f" ({', '.join(filter(None, known))})" if any(known) else ""
