"""Output: text on stdout and stderr, each a terminal, a pipe or closed.

Knows streams, colour and the characters that control a terminal; knows no command.
Everything the program prints goes through here and is flushed at once, so that a closed
pipe shows up in the write that hits it, not when Python exits.
"""

import codecs
import json
import logging
import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Control characters, which drive a terminal, and the ones that reverse text direction.
_ESCAPED = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in (
        *range(0x20),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}
# A lone carriage return overwrites its line.
_TEXT = {**_ESCAPED, ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}
_JSON = {code: f"\\u{code:04x}" for code in _ESCAPED if code != ord("\n")}


def escape(text: str) -> str:
    """Escape control characters, except newlines and tabs."""
    return text.translate(_TEXT)


def one_line(text: str) -> str:
    """Join the lines of a text and escape its control characters."""
    return " ".join(text.split()).translate(_ESCAPED)


def lines(texts: Iterable[str]) -> str:
    """Put each text on its own line."""
    return "".join(f"{one_line(text)}\n" for text in texts)


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a standard stream is a terminal. A closed stream is None."""
    return stream is not None and not stream.closed and stream.isatty()


def paint(text: str, code: int, stream: TextIO | None) -> str:
    """Colour a text if the stream is a terminal and NO_COLOR (no-color.org) is unset.

    Args:
        text: Already escaped.
        code: An SGR parameter: 2 dim, 31 red, 32 green, 33 yellow.
        stream: Where the text will be written.
    """
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


class _Line:
    """What the last write left at the end of stdout and of stderr."""

    is_open = False
    """Whether stdout ends in the middle of a line."""
    is_open_on_stderr = False
    has_status = False
    """Whether stderr shows a status, which the next output erases."""


def write(text: str) -> None:
    """Write to stdout, without escaping.

    Raises:
        OSError: stdout is closed, or the write fails.
    """
    if sys.stdout is None:
        raise OSError("stdout is closed")
    leave_stderr_line()
    _write(text, sys.stdout)
    _Line.is_open = not text.endswith("\n") if text else _Line.is_open


def end_line() -> None:
    """End the line on stdout, if the last text did not."""
    if _Line.is_open:
        write("\n")


def write_text(text: str) -> None:
    """Write a model's text: escaped on a terminal, unchanged anywhere else."""
    write(escape(text) if is_terminal(sys.stdout) else text)


def write_json(value: Any) -> None:
    """Write JSON without control characters; ASCII only if stdout is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = json.dumps(
        value,
        indent=2,
        ensure_ascii=codecs.lookup(encoding).name != "utf-8",
        default=str,
    )
    write(text.translate(_JSON) + "\n")


def write_aside(text: str) -> None:
    """Write to stderr what is not part of the answer: dim and escaped on a terminal."""
    if _Line.has_status:
        leave_stderr_line()
    if is_terminal(sys.stderr):
        body = text.rstrip("\n")
        text = paint(escape(body), 2, sys.stderr) + text[len(body) :]
    _write_stderr(text)
    _Line.is_open_on_stderr = not text.endswith("\n")


def write_hint(text: str) -> None:
    """Write one line for a person: dim, and only if stderr is a terminal."""
    if is_terminal(sys.stderr):
        write_aside(f"{one_line(text)}\n")


def write_error(message: str) -> None:
    """Write one line on stderr that says what is wrong."""
    leave_stderr_line()
    name = paint("dipeo-llm:", 31, sys.stderr)
    _write_stderr(f"{name} {one_line(message)}\n")


def show_status(text: str) -> None:
    """Show what the program waits for, until the next output. Only on a terminal."""
    if is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
        write_aside(one_line(text))
        _Line.has_status = True


def leave_stderr_line() -> None:
    """Erase the status on stderr, or end an unfinished line there."""
    if _Line.has_status:
        _write_stderr("\r\x1b[K")
    elif _Line.is_open_on_stderr:
        _write_stderr("\n")
    _Line.has_status = _Line.is_open_on_stderr = False


def leave() -> None:
    """Leave a terminal at the start of a line, when the program ends."""
    leave_stderr_line()
    if is_terminal(sys.stdout):
        with suppress(OSError):
            end_line()
    _Line.is_open = False


def _write_stderr(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):  # there is nowhere else to report it
            _write(text, sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    """Write and flush; escape what the stream's encoding cannot represent."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    try:
        stream.flush()
    except OSError:
        if stream is sys.stdout:
            discard_stdout()
        raise


def discard_stdout() -> None:
    """Keep Python from flushing a broken pipe or a full disk again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lines(logging.Handler):
    """Prints the package's warnings as errors, and its retries as hints."""

    def emit(self, record: logging.LogRecord) -> None:
        about_a_call = record.name == "dipeo_llm.calls"
        (write_hint if about_a_call else write_error)(record.getMessage())


@contextmanager
def log_to_stderr() -> Generator[None]:
    """Print the warnings of this package, and of no other."""
    added = (
        (logging.getLogger("dipeo_llm"), _Lines(logging.WARNING)),
        # Without a handler on the root, logging prints every library's warnings.
        (logging.getLogger(), logging.NullHandler()),
    )
    for logger, handler in added:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, handler in added:
            logger.removeHandler(handler)
