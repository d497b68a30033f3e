"""What `dipeo-llm chat` reads before it calls: stdin, files and their checks.

A mistake in any of them is a UsageError, before anything is sent.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from dipeo_llm.cli import terminal
from dipeo_llm.cli.options import UsageError
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.files import open_regular, resolve_inside

_PROMPT_FILE_RULES = (
    "a prompt file must lie in or below the working directory and hold at most 1 MiB of"
    " UTF-8 text"
)


def read_prompt(prompt: str | None) -> str:
    """Return the question: the argument, piped text, or both."""
    typed = "" if prompt is None or prompt == "-" else prompt
    piped = ""
    if prompt == "-" or not terminal.is_terminal(sys.stdin):
        if terminal.is_terminal(sys.stdin):
            terminal.write_hint("type the question; Ctrl-D on a new line ends it")
        else:
            terminal.show_status("reading stdin ...")
        try:
            piped = _read_stdin()
        except _ClosedError:
            if not typed:
                raise
    question = "\n\n".join(filter(str.strip, (typed, piped)))
    if not question:
        raise UsageError(
            "there is no question: give PROMPT, pipe text in, or use --interactive"
        )
    return question


def read_line() -> str | None:
    """Read the next question of a conversation. Returns None at the end."""
    if not all(map(terminal.is_terminal, (sys.stdin, sys.stdout))):
        return _read_stdin(lambda file: file.readline()) or None
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() editing and history
    while True:
        try:
            return input("> ").encode("utf-8", "replace").decode() + "\n"
        except EOFError:
            terminal.write("\n")
            return None
        except KeyboardInterrupt:
            terminal.write("\n")
            terminal.write_hint("/quit or Ctrl-D ends the conversation")


class _ClosedError(UsageError):
    """Nothing can be read from stdin."""


def _read_stdin(read: Callable[[BinaryIO], bytes] = lambda file: file.read()) -> str:
    try:
        return read(sys.stdin.buffer).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"the text on stdin is not UTF-8: {exc.reason} at byte {exc.start}"
        ) from None
    except (AttributeError, OSError):  # stdin is None, or not open for reading
        raise _ClosedError("stdin is closed: give the question as PROMPT") from None


def find_media(images: Sequence[str], files: Sequence[str]) -> list[Any]:
    """Return the parts of a message for the pictures and files that are named."""
    return [
        *(_find("--image", where) for where in images),
        *(_find("--file", where) for where in files),
    ]


def _find(option: str, where: str) -> Any:
    if re.match("(https?|data|gs):", where, re.IGNORECASE):
        if option == "--image":
            return {"type": "image_url", "image_url": {"url": where}}
        return {"type": "file", "file": {"file_data": where}}
    try:
        path = resolve_inside(Path(where), Path.cwd(), allow_outside=True)
        open_regular(path).close()  # the service reads it
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"the file {where!r} of {option} cannot be used: {reason(exc)}"
        ) from None
    return path


def read_schema(path: str) -> dict[str, Any]:
    """Read a JSON schema."""
    import jsonschema

    from dipeo_llm.structured import form_of

    try:
        schema: Any = json.loads(Path(path).read_bytes())
        if not isinstance(schema, dict):
            raise InvalidRequestError("a JSON schema must be an object")
        form_of(schema)
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except OSError as exc:
        why = reason(exc)
    except (jsonschema.SchemaError, InvalidRequestError) as exc:
        why = f"it does not hold a JSON schema: {exc.message}"
    except (ValueError, RecursionError) as exc:
        why = f"it is not JSON: {exc}"
    else:
        return schema
    raise UsageError(f"the file {path!r} of --schema cannot be used: {why}")


def read_system_prompt(source: Any) -> str | None:
    """Return the system prompt by the library's rules, from a file or a text.

    Args:
        source: Has `prompt_file` and `system_prompt`.

    A file that cannot be used is a UsageError, or one printed line if there is a text.
    """
    if not source.prompt_file:
        return source.system_prompt or None
    from dipeo_llm import SystemPromptHandler

    warnings: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return False

    log = logging.getLogger("dipeo_llm")
    log.addFilter(collect)
    try:
        prompt = SystemPromptHandler(Path.cwd()).get_system_prompt(source)
    finally:
        log.removeFilter(collect)
    if warnings and prompt is None:
        raise UsageError(f"{warnings[0]} ({_PROMPT_FILE_RULES})")
    for warning in warnings:
        terminal.write_error(warning)
    return prompt or None


def reason(exc: Exception) -> str:
    """Return why a file cannot be used, without the path that OSError repeats."""
    strerror = exc.strerror if isinstance(exc, OSError) else None
    return strerror or str(exc)
