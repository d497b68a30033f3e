"""The file of a cassette: vcrpy's format, without secrets, with a head for people.

An answer may hold two things that vcrpy does not know, and leaves alone: `recorded`
(when, and by what) and a stream's `pieces`.
"""

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vcr.request import Request as VcrRequest
from vcr.serialize import deserialize, serialize
from vcr.serializers import jsonserializer, yamlserializer

from dipeo_llm.testing.interception import (
    Answer,
    Request,
    pieces_of,
    unpack,
    with_pieces,
)
from dipeo_llm.testing.scrubbing import (
    ID_HEADERS,
    PLACEHOLDER,
    REQUEST_HEADERS,
    RESPONSE_HEADERS,
    Secrets,
    is_secret_header,
    told_over_events,
)

if TYPE_CHECKING:

    class _Outcome(BaseException):
        def __init__(self, msg: str, pytrace: bool = True) -> None: ...
else:
    _Outcome = pytest.fail.Exception


class CassetteError(_Outcome):
    """A test and its cassette do not go together.

    Like every outcome of pytest it is no `Exception`: nothing between the request and
    the test takes it for an error of the provider, retries it or swallows it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


@dataclass(slots=True, eq=False)
class Exchange:
    """A request and its answer."""

    request: Request
    answer: Answer
    used: bool = False
    recorded_at: datetime | None = None
    recorded_by: str = ""


def read(path: Path) -> list[Exchange]:
    """Return the exchanges of a file of ours or of vcrpy's.

    Raises:
        CassetteError: It cannot be read.
    """
    try:
        serializer = jsonserializer if path.suffix == ".json" else yamlserializer
        found = deserialize(path.read_text(encoding="utf-8"), serializer)
        pairs = list(zip(found[0], found[1], strict=True))
        return [_exchange(request, answer) for request, answer in pairs]
    except Exception as exc:
        raise CassetteError(f"{shown(path)} is no cassette: {exc!r}") from exc


def _exchange(request: Any, answer: Answer) -> Exchange:
    recorded = answer.pop("recorded", None) or {}
    answer["headers"] = {
        name: values if isinstance(values, list) else [values]
        for name, values in answer["headers"].items()
    }
    body = request.body
    if not isinstance(body, bytes | None):
        body = json.dumps(body).encode() if isinstance(body, dict) else b"".join(body)
    asked = Request(request.method, request.uri, dict(request.headers), body or b"")
    return Exchange(
        asked,
        _unpacked(answer),
        recorded_at=when(recorded.get("at")),
        recorded_by=recorded.get("by") or "",
    )


def _unpacked(answer: Answer) -> Answer:
    """Take off the compression that vcrpy by itself leaves on."""
    names = [n for n in answer["headers"] if n.lower() == "content-encoding"]
    for name in names:
        (encoding, *_) = answer["headers"].pop(name)
        try:
            return with_pieces(answer, unpack(encoding, pieces_of(answer)))
        except Exception:  # noqa: BLE001 - aiohttp had taken it off, and left the header
            return answer
    return answer


def scrubbed(exchange: Exchange, secrets: Secrets) -> Exchange:
    """Return what may be kept of an exchange."""
    request, answer = exchange.request, exchange.answer
    pieces = pieces_of(answer)
    cuts = [sum(len(p) for p, _ in pieces[:i]) for i in range(1, len(pieces) + 1)]
    body, moved = secrets.scrub_pieces(b"".join(p for p, _ in pieces), cuts)
    starts = [0, *moved]
    cut = [
        (body[a:b], pieces[i][1]) for i, (a, b) in enumerate(itertools.pairwise(starts))
    ]
    headers = {
        name: [PLACEHOLDER]
        if name.lower() in ID_HEADERS
        else [*map(secrets.scrub, values)]
        for name, values in answer["headers"].items()
        if name.lower() in ID_HEADERS or RESPONSE_HEADERS.fullmatch(name.lower())
    }
    asked = Request(
        request.method,
        secrets.scrub(request.uri),
        {
            name: secrets.scrub(value)
            for name, value in request.headers.items()
            if name.lower() in REQUEST_HEADERS
        },
        secrets.scrub_pieces(request.body, ())[0],
    )
    kept = with_pieces({**answer, "headers": headers}, cut)
    return Exchange(asked, kept, True, exchange.recorded_at, exchange.recorded_by)


def secrets_in(exchange: Exchange, secrets: Secrets) -> list[str]:
    """Say where an exchange holds a secret, without its value."""
    request, answer = exchange.request, exchange.answer
    sent = _plain(request.body)
    came = _plain(answer["body"].get("string") or b"")
    values = [(f"request header {k}", v) for k, v in request.headers.items()]
    values += [(f"header {k}", v) for k, vs in answer["headers"].items() for v in vs]
    places = [
        ("method", request.method),
        ("URL", request.uri),
        ("request", sent),
        *values,
        ("status", str(answer["status"].get("message"))),
        ("answer", came),
        ("recorded", exchange.recorded_by),
    ]
    found = [f"{where}: {f.what}" for where, text in places for f in secrets.find(text)]
    found += [
        f"{name}: a header that is not to be kept"
        for name, value in values
        if is_secret_header(name.rpartition(" ")[2]) and value != PLACEHOLDER
    ]
    found += [
        f"{where}: it is compressed, and cannot be looked into"
        for where, text in (("request", sent), ("answer", came))
        if text.startswith(_PACKED)
    ]
    found += [
        f"answer, over several events: {f.what}"
        for text in told_over_events(came)
        for f in secrets.find(text)
    ]
    return [
        f"{text} ({times} times)" if times > 1 else text
        for text, times in Counter(found).items()
    ]


def _plain(body: bytes) -> str:
    """Return a body as text, without a compression of which no header tells."""
    for encoding, magic in _MAGIC.items():
        if body.startswith(magic):
            with contextlib.suppress(Exception):
                body = b"".join(piece for piece, _ in unpack(encoding, [(body, 0)]))
    return body.decode(errors="backslashreplace")


# RFC 1952, 2.3.1, and RFC 8878, 3.1.1. httpx reads zstd where zstandard is installed.
_MAGIC = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
_PACKED = tuple(magic.decode(errors="backslashreplace") for magic in _MAGIC.values())


def as_text(kept: Sequence[Exchange]) -> str:
    """Write exchanges as vcrpy does."""
    responses = []
    for exchange in kept:
        response = {**exchange.answer, "body": dict(exchange.answer["body"])}
        if exchange.recorded_at:
            at = exchange.recorded_at.strftime("%Y-%m-%dT%H:%M:%SZ")
            response["recorded"] = {"at": at, "by": exchange.recorded_by}
        responses.append(response)
    requests = [
        VcrRequest(
            e.request.method, e.request.uri, e.request.body or None, e.request.headers
        )
        for e in kept
    ]
    text: str = serialize(
        {"requests": requests, "responses": responses}, yamlserializer
    )
    return text


def holds_something(path: Path) -> bool:
    """Say whether there is a cassette; an empty file is none."""
    return path.is_file() and path.stat().st_size > 0


def shown(path: Path) -> str:
    """Return a path as people know it: from where they are."""
    path = path.absolute()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def host_of(uri: str) -> str:
    """Return host and port of an address."""
    return re.sub(r"^\w+://(?:[^/@]*@)?([^/?#]*).*", r"\1", uri)


def when(value: Any) -> datetime | None:
    """Read a time; YAML makes one of it by itself unless it is quoted."""
    try:
        at = (
            value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        )
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def comments_of(path: Path) -> list[str]:
    """Return the lines of comment that a file begins with."""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.rstrip())
    return lines


def origin_of(path: Path) -> str | None:
    """Return where the file that is there says it was recorded from."""
    comments = comments_of(path) if holds_something(path) else []
    found = re.search(r"^# Recorded from: (.+)$", "\n".join(comments), re.MULTILINE)
    return found[1] if found else None
