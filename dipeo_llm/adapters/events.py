"""Cuts a stream of bytes into events, and the base of the readers of all formats.

Pure. A reader puts a stream together into the JSON that the whole answer would have
been, so that one method reads both, and it looks for the stream's terminator.
"""

import json
import re
from abc import ABC, abstractmethod
from typing import Any

from dipeo_llm.adapters.failures import error_in, loads
from dipeo_llm.adapters.reading import JSON
from dipeo_llm.domain import StreamChunk


class MalformedStreamError(ValueError):
    """A piece of a stream is not an event of the format."""


def _malformed(data: bytes) -> MalformedStreamError:
    # Longer than what is shown: the key is redacted first, and then the text is cut.
    return MalformedStreamError(data[:9600].decode("utf-8", "replace"))


# The SSE standard ignores unknown fields; a line of HTML has no field at all.
_FIELD = re.compile(rb"\s*[\w-]*:")
# llama.cpp sent its errors in a field of this name until October 2025
# (https://github.com/ggml-org/llama.cpp/pull/16109, 2026-11-25).
_ERROR_FIELD = re.compile(rb"error: ?(\{.*)")


class EventLines:
    """Cuts a stream of bytes into the payloads of its events.

    Args:
        sse: Whether the stream is server-sent events, whose payloads follow "data:";
            otherwise each line is a payload.
    """

    __slots__ = ("_data", "_has_events", "_rest", "_sse", "is_bare")

    def __init__(self, *, sse: bool) -> None:
        self._sse = sse
        self._has_events = False
        self.is_bare = False
        """Whether the stream is bare JSON, without events."""
        self._rest: list[bytes] = []
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the payloads that these bytes, cut anywhere, complete.

        Raises:
            MalformedStreamError: A line cannot belong to an event, such as a line of HTML.
        """
        if b"\n" not in piece:
            self._rest.append(
                piece
            )  # joined once: a line may arrive in a million pieces
            return []
        lines = b"".join([*self._rest, piece]).split(b"\n")
        self._rest = [last] if (last := lines.pop()) else []
        if not self._sse:
            return [line for line in lines if line.strip()]
        payloads: list[bytes] = []
        for line in lines:
            if self.is_bare or (line.startswith(b"{") and not self._has_events):
                payloads += self._bare_line(line)
            elif line.startswith((b"data:", b"\xef\xbb\xbfdata:", b" data:")):
                # One server puts a space in front, which the standard does not allow.
                self._data.append(line.partition(b":")[2].strip())
                self._has_events = True
            elif not line or line == b"\r":
                if self._data:
                    payloads.append(b"\n".join(self._data))
                    self._data = []
            elif found := _ERROR_FIELD.match(line):
                payloads.append(b'{"error": %b}' % found[1])
            elif not _FIELD.match(line.removeprefix(b"\xef\xbb\xbf")):
                raise _malformed(line)
        return payloads

    def _bare_line(self, line: bytes) -> list[bytes]:
        """Return bare JSON as soon as it is whole: at an outermost closing brace."""
        self.is_bare = True
        self._data.append(line)
        if not (line.startswith((b"{", b"}")) and line.rstrip().endswith(b"}")):
            return []
        whole, self._data = b"\n".join(self._data), []
        return [whole]

    def close(self) -> list[bytes]:
        """Return the payloads that the end of the stream completes."""
        payloads = self.feed(b"\n\n") if self._rest or self._data else []
        if rest := b"\n".join(self._data).strip():  # JSON that was cut
            payloads.append(rest)
        return payloads


class StreamReader(ABC):
    """Reads the events of one stream.

    `feed` returns the chunks at once; `body` returns the JSON of the whole answer.
    """

    sse = True

    def __init__(self) -> None:
        self._lines = EventLines(sse=self.sse)
        self.events = 0
        self.error: bytes | None = None
        """The provider's error: an event, or bare JSON."""
        self._done = False

    def feed(self, piece: bytes) -> list[StreamChunk]:
        """Return the chunks that these bytes, cut anywhere, complete.

        Raises:
            MalformedStreamError: An event that cannot be parsed.
        """
        return self._read_payloads(self._lines.feed(piece))

    def close(self) -> list[StreamChunk]:
        """End the stream and return the last chunks.

        Raises:
            MalformedStreamError: As `feed`.
        """
        return self._read_payloads(self._lines.close())

    def read_event(self, event: Any) -> list[StreamChunk]:
        """Read one event, parsed, and return its chunks.

        Raises:
            MalformedStreamError: The JSON is not an event of the format.
        """
        if not isinstance(event, dict):
            raise MalformedStreamError("an event that is not an object")
        self.events += 1
        chunks: list[StreamChunk] = []
        if error_in(event):
            self.error = json.dumps(event).encode()
            return chunks
        try:
            self._event(event, chunks)
        except (
            TypeError,
            AttributeError,
            LookupError,
            ValueError,
            RecursionError,
        ) as exc:
            raise MalformedStreamError(f"an event of another shape: {exc!r}") from exc
        for chunk in chunks:
            said: tuple[Any, Any] = (chunk.text, chunk.reasoning)
            if not all(isinstance(text, str) for text in said):
                raise MalformedStreamError("an event whose text is not a string")
        return chunks

    def read_done(self) -> None:
        """Note OpenAI's [DONE], which is not JSON."""
        self._done = True

    def _read_payloads(self, payloads: list[bytes]) -> list[StreamChunk]:
        chunks: list[StreamChunk] = []
        for payload in payloads:
            if self._lines.is_bare and self.error is not None:
                break  # what follows the error is not an event either
            if payload == b"[DONE]":
                self.read_done()
                continue
            try:
                event = loads(payload)
            except (ValueError, RecursionError):
                raise _malformed(payload) from None
            chunks += self.read_event(event)
            if self._lines.is_bare and self.error is None:  # only errors are bare JSON
                raise _malformed(payload)
        return chunks

    @abstractmethod
    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        """Add an event to the answer, and its chunks to *chunks*."""

    @property
    def usage(self) -> Any:
        """The provider's last record of usage; None before the first."""
        return None

    @property
    @abstractmethod
    def is_ended(self) -> bool:
        """Whether the stream's terminator has come."""

    @abstractmethod
    def body(self) -> JSON:
        """Return the JSON of the answer, as far as it has come."""
