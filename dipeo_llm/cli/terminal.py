"""What is shown: text on stdout and stderr, be it a terminal, a pipe or closed.

Knows streams and the characters that drive a terminal; knows nothing of commands and
exit codes. Whatever the program prints goes through here, and is flushed at once, so
that a reader who has gone is noticed by the write and not when Python ends.
"""

import json
import logging
import os
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any, TextIO

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


def harmless(text: str) -> str:
    """Escape what drives a terminal; lines and tabs stay."""
    return text.translate(_TEXT)


def one_line(text: str) -> str:
    """Put a text on one line that drives no terminal."""
    return " ".join(text.split()).translate(_ESCAPED)


def lines(texts: Iterable[str]) -> str:
    """Put each text on a line of its own, which it cannot leave."""
    return "".join(f"{one_line(text)}\n" for text in texts)


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a standard stream is a terminal; a closed one is None."""
    return stream is not None and stream.isatty()


def write(text: str) -> None:
    """Write to stdout as it stands.

    Raises:
        OSError: It is closed, or cannot be written to.
    """
    if sys.stdout is None:
        raise OSError("stdout is closed")
    _write(text, sys.stdout)


def write_text(text: str) -> None:
    """Write what others said: harmless on a terminal; a file gets it as it came."""
    write(harmless(text) if is_terminal(sys.stdout) else text)


def write_json(value: Any) -> None:
    """Write JSON that is exact and harmless at once."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    write(text.translate(_JSON) + "\n")


def write_aside(text: str) -> None:
    """Write what is not the answer to stderr: dim and harmless on a terminal."""
    dim = is_terminal(sys.stderr)
    _to_stderr(f"\x1b[2m{harmless(text)}\x1b[0m" if dim else text)


def complain(message: str) -> None:
    """Say what is wrong, in one line on stderr."""
    _to_stderr(f"dipeo-llm: {one_line(message)}\n")


def _to_stderr(text: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):  # there is no other place to say it
            _write(text, sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    """Write now; what the stream's encoding lacks is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def give_up_stdout() -> None:
    """Keep Python from flushing, at its end, what a closed pipe did not take."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def logging_to_stderr() -> Generator[None]:
    """Show the package's warnings as complaints, and nobody else's."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complain(record.getMessage())

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
