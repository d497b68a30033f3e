"""The file of a cassette: vcrpy's format, without secrets, with a head for people.

A response may hold three fields that vcrpy does not know, and ignores: `recorded` (when,
by what, for which tests), a stream's `pieces`, and the `failure` of a connection. A
connection that gave no answer has the status 599 for vcrpy.
"""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from vcr.request import Request as VcrRequest
from vcr.serialize import deserialize, serialize
from vcr.serializers import jsonserializer, yamlserializer

from dipeo_llm.testing.exchange import Answer, Failure, Piece, Request
from dipeo_llm.testing.interception import from_vcrpy, unpack, unpack_of_vcrpy
from dipeo_llm.testing.scrubbing import (
    ID_HEADERS,
    PLACEHOLDER,
    REQUEST_HEADERS,
    RESPONSE_HEADERS,
    Secrets,
    is_secret_header,
    join_events,
)

if TYPE_CHECKING:

    class _Outcome(BaseException):
        def __init__(self, msg: str, pytrace: bool = True) -> None: ...
else:
    _Outcome = pytest.fail.Exception

NO_ANSWER: Final = 599
"""The status in the file for a request that got no response."""


class CassetteError(_Outcome):
    """A test and its cassette do not fit together.

    Like every outcome of pytest it is not an `Exception`: no code between the request
    and the test takes it for an error of the provider, retries it or swallows it.
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
    tests: tuple[str, ...] = ()
    """The tests that made the request, where several share the file."""


def read(path: Path) -> list[Exchange]:
    """Return the exchanges of a file, written by this package or by vcrpy.

    Raises:
        CassetteError: It cannot be read.
    """
    try:
        serializer = jsonserializer if path.suffix == ".json" else yamlserializer
        found = deserialize(path.read_text(encoding="utf-8"), serializer)
        pairs = list(zip(found[0], found[1], strict=True))
        return [_exchange(request, response) for request, response in pairs]
    except Exception as exc:
        raise CassetteError(f"{show_path(path)} contains no cassette: {exc!r}") from exc


def _exchange(request: Any, response: dict[str, Any]) -> Exchange:
    recorded = response.get("recorded") or {}
    return Exchange(
        from_vcrpy(request),
        answer_from(response),
        recorded_at=parse_time(recorded.get("at")),
        recorded_by=recorded.get("by") or "",
        tests=tuple(recorded.get("tests") or ()),
    )


def answer_from(response: dict[str, Any]) -> Answer:
    """Read a response of vcrpy's form."""
    if "status_code" in response:  # vcrpy's form for httpx before version 6
        content = response.get("content") or b""
        response = {
            "status": {"code": response["status_code"], "message": ""},
            "headers": response["headers"],
            "body": {
                "string": content.encode() if isinstance(content, str) else content
            },
        }
    failure = response.get("failure")
    answer = Answer(failure=Failure(**failure) if failure else None)
    status = response["status"]
    headers = response["headers"].items()
    pairs = [
        (name, value)
        for name, values in headers
        for value in (values if isinstance(values, list) else [values])
    ]
    answer.begin(status["code"], status.get("message"), pairs)
    if failure and answer.status == NO_ANSWER:
        answer.status, answer.reason = None, ""
    body = response["body"].get("string") or b""
    answer.pieces = _pieces(body, response.get("pieces") or "")
    answer.unpack = unpack_of_vcrpy(answer)
    answer.settle()
    return answer


def _pieces(body: bytes, lengths: str) -> list[Piece]:
    """Cut a body as it arrived; one that was edited by hand since is one piece."""
    pieces: list[Piece] = []
    end = 0
    for entry in lengths.split():
        length, _, after = entry.partition("@")
        pieces.append((body[end : end + int(length)], int(after)))
        end += int(length)
    return pieces if end == len(body) else [(body, 0)]


def response_of(answer: Answer) -> dict[str, Any]:
    """Write a response in vcrpy's form, the body as bytes."""
    failure = answer.failure
    why = (failure.message or failure.type or failure.kind) if failure else ""
    no_answer = {"code": NO_ANSWER, "message": why}
    response: dict[str, Any] = {
        "status": no_answer
        if answer.status is None
        else {"code": answer.status, "message": answer.reason},
        "headers": answer.headers,
        "body": {"string": answer.body},
    }
    if len(answer.pieces) > 1:
        response["pieces"] = " ".join(f"{len(p)}@{after}" for p, after in answer.pieces)
    if failure is not None:
        response["failure"] = {k: v for k, v in asdict(failure).items() if v}
    return response


def scrub(exchange: Exchange, secrets: Secrets) -> Exchange:
    """Return what may be kept of an exchange."""
    request, answer = exchange.request, exchange.answer
    cuts = list(itertools.accumulate(len(piece) for piece, _ in answer.pieces))
    body, moved = secrets.scrub_pieces(answer.body, cuts)
    failure = answer.failure
    kept = Answer(
        answer.status,
        answer.reason,
        {
            name: [PLACEHOLDER]
            if name.lower() in ID_HEADERS
            else [*map(secrets.scrub, values)]
            for name, values in answer.headers.items()
            if name.lower() in ID_HEADERS or RESPONSE_HEADERS.fullmatch(name.lower())
        },
        [
            (body[start:end], after)
            for (start, end), (_, after) in zip(
                itertools.pairwise([0, *moved]), answer.pieces, strict=True
            )
        ],
        failure
        and Failure(
            failure.kind, failure.type, secrets.scrub(failure.message), failure.errno
        ),
    )
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
    return Exchange(
        asked, kept, True, exchange.recorded_at, exchange.recorded_by, exchange.tests
    )


def secrets_in(exchange: Exchange, secrets: Secrets) -> list[str]:
    """Say where an exchange holds a secret, without its value."""
    request, answer = exchange.request, exchange.answer
    sent, received = _plain(request.body), _plain(answer.body)
    values = [(f"request header {k}", v) for k, v in request.headers.items()]
    values += [(f"header {k}", v) for k, vs in answer.headers.items() for v in vs]
    places = [
        ("method", request.method),
        ("URL", request.uri),
        ("request", sent),
        *values,
        ("status", answer.reason),
        ("failure", answer.failure.message if answer.failure else ""),
        ("answer", received),
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
        for where, text in (("request", sent), ("answer", received))
        if text.startswith(_PACKED)
    ]
    found += [
        f"answer, over several events: {f.what}"
        for text in join_events(received)
        for f in secrets.find(text)
    ]
    return [
        f"{text} ({times} times)" if times > 1 else text
        for text, times in Counter(found).items()
    ]


def _plain(body: bytes) -> str:
    """Return a body as text, also if it is compressed and no header says so."""
    for encoding, magic in _MAGIC.items():
        if body.startswith(magic):
            with contextlib.suppress(Exception):
                body = b"".join(p for p, _ in unpack("httpx", encoding, [(body, 0)]))
    return body.decode(errors="backslashreplace")


# RFC 1952, 2.3.1, and RFC 8878, 3.1.1. httpx reads zstd where zstandard is installed.
_MAGIC: Final = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
_PACKED: Final = tuple(
    magic.decode(errors="backslashreplace") for magic in _MAGIC.values()
)


def as_text(kept: Sequence[Exchange]) -> str:
    """Write exchanges as vcrpy does."""
    responses = []
    for exchange in kept:
        response = response_of(exchange.answer)
        if exchange.recorded_at:
            at = exchange.recorded_at.strftime("%Y-%m-%dT%H:%M:%SZ")
            response["recorded"] = {"at": at, "by": exchange.recorded_by}
            if exchange.tests:
                response["recorded"]["tests"] = list(exchange.tests)
        responses.append(response)
    requests = [vcrpy_request(exchange.request) for exchange in kept]
    text: str = serialize(
        {"requests": requests, "responses": responses}, yamlserializer
    )
    return text


def vcrpy_request(request: Request) -> Any:
    """Return a request as vcrpy has it."""
    return VcrRequest(
        request.method, request.uri, request.body or None, dict(request.headers)
    )


def holds_something(path: Path) -> bool:
    """Say whether there is a cassette; an empty file is not one."""
    return path.is_file() and path.stat().st_size > 0


def show_path(path: Path) -> str:
    """Return a path relative to the working directory, if it is below it."""
    path = path.absolute()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def host_of(uri: str) -> str:
    """Return host and port of an address."""
    return re.sub(r"^\w+://(?:[^/@]*@)?([^/?#]*).*", r"\1", uri)


def parse_time(value: Any) -> datetime | None:
    """Read a time; YAML has already read it unless it is quoted."""
    try:
        at = (
            value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
        )
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def comments_of(path: Path) -> list[str]:
    """Return the lines of comment at the beginning of a file."""
    with path.open(encoding="utf-8") as file:
        lines = itertools.takewhile(lambda line: line.startswith("#"), file)
        return [line.rstrip() for line in lines]


def origin_of(path: Path) -> str | None:
    """Return where an existing file says it was recorded from."""
    comments = comments_of(path) if holds_something(path) else []
    found = re.search(r"^# Recorded from: (.+)$", "\n".join(comments), re.MULTILINE)
    return found[1] if found else None
