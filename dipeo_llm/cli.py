"""The command `dipeo-llm`: a question to a model, and what models there are.

Knows arguments, exit codes and the terminal; the rest is the service's. What takes time
to import is imported by the command that needs it, so that `--help` comes at once.
"""

import argparse
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TextIO, TypeVar

from dipeo_llm import cassette_cli, providers
from dipeo_llm.errors import (
    APIKeyError,
    APIKeyNotFoundError,
    DiPeOLLMError,
    InvalidRequestError,
    SettingsError,
)
from dipeo_llm.files import open_regular, resolve_inside
from dipeo_llm.settings import Settings, http_url

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


class _UsageError(Exception):
    """What was asked for makes no sense."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. No exception leaves it.

    Args:
        argv: The arguments; None takes the process's own.

    An interrupt (Ctrl-C) closes the connection of the call in flight.
    """
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # What is left in the buffer has nowhere to go, and Python would say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.BROKEN_PIPE
    except Exception as exc:  # noqa: BLE001 - a shell has no use for a traceback
        return _failed(exc)


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = build_parser().parse_args(argv)
    except SystemExit as exc:  # after --help, --version or a wrong argument
        _flush()
        return int(exc.code or 0)
    options.is_process = argv is None
    command: Callable[[argparse.Namespace], int | Coroutine[Any, Any, int]]
    command = options.command
    with _logging_to_stderr():
        code = command(options)
        if not isinstance(code, int):
            code = _await(options, code)
    _flush()
    return code


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
    head, question = _head(options), _question(options)
    if options.interactive:
        return _converse(options, head, question)
    result = _await(options, _answer(options, [*head, _asked(options, question)]))
    if options.json:
        # The providers' own words are large, and their form is not ours to promise.
        raw: Any = {"raw_response": True, "tool_outputs": {"__all__": {"raw_response"}}}
        _write_json(result.model_dump(exclude=raw))
        return Exit.OK
    if options.schema is not None:
        _write_json(result.parsed)
        return Exit.OK
    _show_rest(options, result)
    return Exit.OK


def _check_chat(options: argparse.Namespace) -> None:
    """Refuse what is asked for twice in ways that exclude each other."""
    if options.prompt is None and not options.interactive:
        raise _UsageError(
            "the following arguments are required: PROMPT (see dipeo-llm chat --help)"
        )
    if options.interactive and options.prompt == "-":
        raise _UsageError("--interactive reads stdin itself: PROMPT cannot be -")
    whole = "--json" if options.json else None
    if options.schema is not None:
        whole = "--schema"
    for option in ("interactive", "stream"):
        if whole and getattr(options, option):
            raise _UsageError(f"--{option} and {whole} exclude each other")


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
        await asyncio.to_thread(_write_reasoning, result.reasoning + "\n")
    return result


def _streams(options: argparse.Namespace) -> bool:
    if options.json or options.schema is not None:
        return False
    if options.stream is not None:
        return bool(options.stream)
    return options.interactive or (sys.stdout is not None and sys.stdout.isatty())


async def _show(options: argparse.Namespace, stream: "ChatStream") -> None:
    """Write a stream as it comes; a terminal that stands still holds only a thread."""
    import asyncio

    speaks = thinks = False
    try:
        async for chunk in stream:
            if chunk.reasoning and options.show_reasoning:
                thinks = True
                await asyncio.to_thread(_write_reasoning, chunk.reasoning)
            if chunk.text:
                if thinks:
                    thinks = False
                    await asyncio.to_thread(_write_reasoning, "\n")
                speaks = True
                await asyncio.to_thread(_write, _for_terminal(chunk.text))
    except DiPeOLLMError:
        if thinks:
            await asyncio.to_thread(_write_reasoning, "\n")
        if speaks:  # the complaint has a line of its own
            await asyncio.to_thread(_write, "\n")
        raise


def _show_rest(options: argparse.Namespace, result: "ChatResult") -> None:
    """Write what of an answer is not written yet, and say what is wrong with it."""
    outputs = result.tool_outputs or []
    if result.text or not outputs:
        text = "" if _streams(options) else _for_terminal(result.text)
        _write(text + "\n")
    _write(_sources(outputs) + _saved(outputs))
    if result.refusal:
        _complain(f"the model declined: {result.refusal}")
    if result.finish_reason not in {"stop", None}:
        _complain(f"the answer is not whole: it ended with {result.finish_reason!r}")


def _sources(outputs: "Sequence[ToolOutput]") -> str:
    """List the pages that a search found, each once."""
    found: dict[str, str] = {}
    for output in outputs:
        for page in output.result if isinstance(output.result, list) else ():
            found.setdefault(page.url, page.title)
    lines = [
        f"- {title}: {url}" if title else f"- {url}" for url, title in found.items()
    ]
    listed = "".join(f"{_one_line(line)}\n" for line in lines)
    return f"\nSources:\n{listed}" if listed else ""


def _saved(outputs: "Sequence[ToolOutput]") -> str:
    """Save the pictures in the working directory; return their names, one on a line."""
    from dipeo_llm import ImageGenerationResult

    pictures = [
        o.result for o in outputs if isinstance(o.result, ImageGenerationResult)
    ]
    return "".join(f"{_saved_picture(picture)}\n" for picture in pictures)


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
        _write_json(found)
    else:
        names = (f"{provider}/{name}" for provider in found for name in found[provider])
        _write("".join(_one_line(name) + "\n" for name in names))
    return code


async def _listed(options: argparse.Namespace, provider: str) -> list[str]:
    key_id = _key_id(options, provider)
    async with _open(options, provider) as service:
        return await service.get_available_models(key_id)


def provider(options: argparse.Namespace) -> int:
    """Print whose a model is."""
    _write(_await(options, _provider_of(options.model)) + "\n")
    return Exit.OK


async def _provider_of(model: str, service: str | None = None) -> str:
    """Name a model's provider. Imports LiteLLM only for a name that no row claims."""
    row, _ = providers.split(model, service)
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
        raise _UsageError(
            f"{key_id!r} names a key of {owner.name}, which is not sent to {provider}"
        )
    return key_id


def _reachable(options: argparse.Namespace) -> list[str]:
    """Name the providers that the environment holds a key or an address for."""
    if options.key_id or options.base_url:
        raise _UsageError("--key-id and --base-url need a SERVICE")
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


def _head(options: argparse.Namespace) -> list[dict[str, Any]]:
    system = _system_prompt(options)
    return [{"role": "system", "content": system}] if system else []


def _question(options: argparse.Namespace) -> str | None:
    question: str | None = options.prompt
    return _stdin() if question == "-" else question


def _asked(options: argparse.Namespace, question: str | None) -> dict[str, Any]:
    """Return the user's message: a question, and the pictures beside it."""
    content: Any = question
    if options.images:
        content = [question, *options.images]
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
        raise _UsageError(
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
    raise _UsageError(f"the file {path!r} of --schema cannot be used: {why}")


def _line() -> str | None:
    """Read what the user says next; None at the end."""
    typed = all(s is not None and s.isatty() for s in (sys.stdin, sys.stdout))
    if not typed:
        return _stdin(lambda file: file.readline()) or None
    with suppress(ImportError):
        import readline  # noqa: F401 - its import lets input() edit and remember lines
    try:
        return input("> ").encode("utf-8", "replace").decode() + "\n"
    except EOFError:
        _write("\n")
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
        raise _UsageError(f"{reasons[0]} ({_PROMPT_FILE_RULES})")
    for reason in reasons:
        _complain(reason)
    return prompt or None


_PROMPT_FILE_RULES = (
    "a prompt file lies in or below the working directory, is text in UTF-8 and no"
    " larger than 1 MiB"
)


def _stdin(read: Callable[[BinaryIO], bytes] = lambda file: file.read()) -> str:
    try:
        return read(sys.stdin.buffer).decode()
    except UnicodeDecodeError as exc:
        raise _UsageError(
            f"the prompt on stdin is not text in UTF-8: {exc.reason} at byte {exc.start}"
        ) from None
    except (AttributeError, OSError):  # None, or not open for reading
        raise _UsageError("the prompt is to come from stdin, which is closed") from None


# --- what comes out -----------------------------------------------------------------

# Control characters, which drive a terminal, and those that turn the order of text.
_ESCAPED = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}
# A lone carriage return writes over a line.
_TEXT = {**_ESCAPED, ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}
_JSON = {code: f"\\u{code:04x}" for code in _ESCAPED if code != ord("\n")}


def _for_terminal(text: str) -> str:
    """Make a model's text harmless where it is shown; a file gets it as it came."""
    shown = sys.stdout is not None and sys.stdout.isatty()
    return text.translate(_TEXT) if shown else text


def _one_line(text: str) -> str:
    return " ".join(text.split()).translate(_ESCAPED)


def _write(text: str) -> None:
    """Write to stdout, now; what its encoding lacks is escaped."""
    if sys.stdout is None:
        raise OSError("stdout is closed")
    sys.stdout.write(_encodable(text, sys.stdout))
    sys.stdout.flush()


def _write_reasoning(text: str) -> None:
    """Write what a model thinks to stderr: dim on a terminal."""
    if sys.stderr is None:
        return
    if sys.stderr.isatty():
        text = f"\x1b[2m{text.translate(_TEXT)}\x1b[0m"
    with suppress(OSError):  # the answer is what counts
        sys.stderr.write(_encodable(text, sys.stderr))
        sys.stderr.flush()


def _encodable(text: str, output: TextIO) -> str:
    encoding = output.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _flush() -> None:
    """Learn now, and not when Python ends, that nobody reads any more."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _write_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    _write(text.translate(_JSON) + "\n")


def _complain(message: str) -> None:
    """Say what is wrong, in one line on stderr."""
    with suppress(OSError):  # there is no other place to say it
        print(f"dipeo-llm: {_one_line(message)}", file=sys.stderr, flush=True)


def _failed(exc: Exception) -> Exit:
    """Say what an exception means to the user, and name the exit code for it."""
    if isinstance(exc, _UsageError | SettingsError):
        _complain(str(exc))
        return Exit.USAGE
    if isinstance(exc, DiPeOLLMError):
        _complain(f"{exc}{_circumstances(exc)}")
        return Exit.KEY if isinstance(exc, APIKeyError) else Exit.FAILED
    _complain(str(exc) if isinstance(exc, OSError) else f"{type(exc).__name__}: {exc}")
    return Exit.FAILED


def _circumstances(exc: DiPeOLLMError) -> str:
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


@contextmanager
def _logging_to_stderr() -> Generator[None]:
    """Show the package's warnings as lines of this command, and nobody else's."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _complain(record.getMessage())

    added = (
        (logging.getLogger("dipeo_llm"), Lines(logging.WARNING)),
        # Without any handler Python prints the warnings of all, tracebacks included.
        (logging.getLogger(), logging.NullHandler()),
    )
    for logger, handler in added:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)


# --- the arguments ------------------------------------------------------------------

_EPILOG = """\
examples:
  dipeo-llm chat gpt-4.1-nano "Name three rivers."
  dipeo-llm chat claude-haiku-4-5 - < letter.txt --system "Answer in one sentence."
  dipeo-llm chat claude-haiku-4-5 --interactive
  dipeo-llm chat llama3.2:1b "Say hello." --base-url http://192.168.1.5:11434
  dipeo-llm chat my-model "Hi" --service openai --base-url http://127.0.0.1:8000/v1
  dipeo-llm models anthropic
  dipeo-llm provider gemini-2.5-flash
  dipeo-llm cassettes check tests/cassettes

environment:
  OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY or GOOGLE_API_KEY
                             the key of each provider; Ollama needs none
  DIPEO_LLM_TIMEOUT          seconds for one attempt (default 300)
  DIPEO_LLM_MAX_RETRIES      attempts after the first (default 3)
  DIPEO_LLM_OPENAI_BASE_URL, DIPEO_LLM_ANTHROPIC_BASE_URL,
  DIPEO_LLM_GOOGLE_BASE_URL, DIPEO_LLM_OLLAMA_BASE_URL (or OLLAMA_HOST)
                             where a provider lives, if not at its own address
  HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE
                             as for other programs

exit codes:
  0    it worked
  1    the call failed, or the model or its provider is unknown
  2    a wrong argument, file or setting
  3    a key is missing, or the provider refuses it
  130  interrupted (Ctrl-C)
  141  whoever read the output closed it
"""

_CHAT = """\
Ask a model one question and print its answer, or talk with it (--interactive). The
model's name tells the provider; where it does not, --service or a prefix
(openai/my-model) does.
"""

_CHAT_EPILOG = """\
examples:
  dipeo-llm chat gpt-4.1-nano "Name three rivers."
  git diff | dipeo-llm chat claude-haiku-4-5 - --system "Write a commit message."
  dipeo-llm chat gemini-2.5-flash "Hello" --prompt-file prompts/optimist.md
  dipeo-llm chat gpt-4.1-nano "Name a colour." --max-tokens 20 --json
  dipeo-llm chat gpt-4.1-nano "What is this?" --image photo.jpg --image plan.png
  dipeo-llm chat gemini-2.5-flash "Name two rivers." --schema rivers.schema.json
  dipeo-llm chat claude-haiku-4-5 "Who won yesterday?" --tool web_search
  dipeo-llm chat gpt-5 "Draw a river." --tool image_generation
  dipeo-llm chat llama3.2:1b --interactive --system "Answer like a pirate."

A schema file holds a JSON schema, such as
  {"type": "object", "properties": {"names": {"type": "array"}}, "required": ["names"]}

In a conversation each line is a question; /quit or Ctrl-D ends it. A question that
fails is not remembered. An answer that breaks off is printed as far as it came, and the
exit code is 1.

On a terminal, control characters in an answer are shown as escapes (\\x1b).
Variables and exit codes: dipeo-llm --help
"""

_MODELS = """\
Print the models that a provider offers to your key, one on a line, in the form that
`chat` takes. Without SERVICE: of every provider whose key is in the environment, and of
Ollama if OLLAMA_HOST or DIPEO_LLM_OLLAMA_BASE_URL is set.
"""

_PROVIDER = """\
Print the provider that a model name belongs to; exit with 1 if that is unknown.
Most names are answered at once; for the others LiteLLM is asked, which takes seconds.
"""


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        sys.exit(Exit.USAGE)


class _Version(argparse.Action):
    """Looks the versions up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        _write(f"dipeo-llm {version('dipeo-llm')} (LiteLLM {version('litellm')})\n")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; what runs a command is in `options.command`: plain, or async."""
    parser = _Parser(
        prog="dipeo-llm",
        description="Talk to OpenAI, Anthropic, Google Gemini and Ollama models.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the version and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_chat(commands)
    _add_models(commands)
    _add_provider(commands)
    cassette_cli.add_parser(commands)
    return parser


def _add_chat(commands: Any) -> None:
    parser = commands.add_parser(
        "chat", help="ask a model", description=_CHAT, epilog=_CHAT_EPILOG
    )
    parser.set_defaults(command=chat)
    parser.add_argument("model", metavar="MODEL", help="such as gpt-4.1-nano")
    prompt = parser.add_argument(
        "prompt",
        metavar="PROMPT",
        type=_text,
        help="the question; - reads it from stdin; with --interactive it may be left"
        " out",
    )
    # nargs="?" would make argparse overlook a prompt that stands after an option.
    prompt.required = False
    parser.add_argument(
        "--system",
        dest="system_prompt",
        metavar="TEXT",
        type=_text,
        help="what the model is told about its task",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read that from a file in or below the working directory; --system stands"
        " in if it cannot be used",
    )
    parser.add_argument(
        "--service",
        type=_service,
        help="the provider (openai, anthropic, google, ollama, ...), where the model's"
        " name does not tell it",
    )
    parser.add_argument(
        "--temperature",
        metavar="NUMBER",
        type=_temperature,
        help="how freely it speaks, from 0, often up to 2; left out for a model that"
        " takes none",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="TOKENS",
        type=_count,
        help="longest answer, in tokens (a token is about four letters of English)",
    )
    parser.add_argument(
        "--image",
        dest="images",
        metavar="PATH_OR_URL",
        action="append",
        default=[],
        type=_text,
        help="a picture (or PDF, or sound) to look at, in or below the working"
        " directory, or a picture's URL; may be given several times",
    )
    parser.add_argument(
        "--tool",
        dest="tools",
        action="append",
        default=[],
        choices=["web_search", "image_generation"],
        help="let the provider search, and list its sources; or let it draw, and save"
        " the pictures as image-1.png and so on in the working directory",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="hold a conversation on stdin, until /quit or Ctrl-D",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer as it comes (default: on a terminal, and with"
        " --interactive)",
    )
    parser.add_argument(
        "--show-reasoning",
        action="store_true",
        help="print on stderr what the model thinks, where its provider shows it",
    )
    _add_connection(parser)
    parser.add_argument(
        "--schema",
        metavar="FILE",
        help="print JSON that follows the JSON schema in this file",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the whole result as JSON: text, tokens, cost in USD, request id",
    )


def _add_models(commands: Any) -> None:
    parser = commands.add_parser(
        "models", help="list what a provider offers", description=_MODELS
    )
    parser.set_defaults(command=models)
    parser.add_argument(
        "service",
        metavar="SERVICE",
        nargs="?",
        type=_service,
        help="openai, anthropic, google or ollama",
    )
    _add_connection(parser)
    parser.add_argument(
        "--json", action="store_true", help="print {service: [model, ...]} as JSON"
    )


def _add_provider(commands: Any) -> None:
    parser = commands.add_parser(
        "provider", help="tell whose a model is", description=_PROVIDER
    )
    parser.set_defaults(command=provider)
    parser.add_argument("model", metavar="NAME", help="such as gemini-2.5-flash")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key-id",
        metavar="NAME",
        type=_named_key,
        help="where the key is: a variable such as GEMINI_API_KEY (default: the"
        " provider's own)",
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        type=_url,
        help="where the provider lives; your key is sent there",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        help="for one attempt (default: DIPEO_LLM_TIMEOUT, else 300)",
    )


def _text(argument: str) -> str:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not text in UTF-8") from None
    return argument


def _service(argument: str) -> str:
    try:
        return providers.by_name(argument).name
    except InvalidRequestError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _named_key(argument: str) -> str:
    if providers.of_key(argument) is None:
        # Not repeated here: it may be the key itself.
        raise argparse.ArgumentTypeError(
            "it must be the name of a provider or of the variable that holds its key;"
            " a key itself does not belong on a command line"
        )
    return argument


def _url(argument: str) -> str:
    try:
        return http_url(argument)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _number(argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        return math.nan


def _temperature(argument: str) -> float:
    value = _number(argument)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a number from 0")
    return value


def _seconds(argument: str) -> float:
    value = _number(argument)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{argument!r} is not a number of seconds above 0"
        )
    return value


def _count(argument: str) -> int:
    if not (argument.isdecimal() and int(argument) > 0):
        raise argparse.ArgumentTypeError(f"{argument!r} is not a whole number above 0")
    return int(argument)
