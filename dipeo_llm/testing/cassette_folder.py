"""Folders of cassettes: what is in them, how old it is, and whether a secret is left."""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dipeo_llm.testing.cassette_file import (
    CassetteError,
    comments_of,
    host_of,
    origin_of,
    parse_time,
    read,
    secrets_in,
    show_path,
)
from dipeo_llm.testing.exchange import Request
from dipeo_llm.testing.scrubbing import Secrets


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a folder of cassettes that should not be there."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{show_path(self.path)}: {self.what}"


@dataclass(frozen=True, slots=True)
class Entry:
    """The data of a cassette that a table shows."""

    path: Path
    exchanges: int
    models: tuple[str, ...]
    hosts: tuple[str, ...]
    origin: str
    by: str
    recorded_at: datetime | None = None
    """When its oldest exchange was recorded."""


def files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the cassettes of a folder and its subfolders, sorted.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    root = Path(folder)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(p for end in ("yaml", "yml") for p in root.rglob(f"*.{end}"))


def check(folder: str | os.PathLike[str]) -> list[Problem]:
    """Look for secrets in every cassette of a folder, and for invalid cassettes.

    A secret is the value of a key in the environment, or text that looks like a key, a
    token, a cookie, or the id of a request or an organisation. No problem shows a value.
    JSON files are searched too, whether vcrpy wrote them or not.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    secrets = Secrets()
    secrets.learn_from_environment()
    more = sorted(path for path in Path(folder).rglob("*.json") if path.is_file())
    return [
        Problem(path, what)
        for path in [*files(folder), *more]
        for what in _secrets_of(path, secrets)
    ]


def _secrets_of(path: Path, secrets: Secrets) -> list[str]:
    found: list[str] = []
    try:
        for number, exchange in enumerate(read(path), 1):
            found += [
                f"exchange {number}, {what}" for what in secrets_in(exchange, secrets)
            ]
    except CassetteError as exc:
        if path.suffix != ".json":
            return [str(exc)]
    if found:
        return found
    # A secret may also be in a comment, or in a field of an unknown name.
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    return [
        f"line {text.encode()[: finding.start].count(10) + 1}: {finding.what}"
        for finding in secrets.find(text)
    ]


def entries(folder: str | os.PathLike[str]) -> list[Entry]:
    """Return the data of each cassette of a folder.

    Raises:
        FileNotFoundError: There is no such folder.
        CassetteError: A file contains no cassette.
    """
    return [_entry(path) for path in files(folder)]


def _entry(path: Path) -> Entry:
    exchanges = read(path)
    head = "\n".join(comments_of(path))
    on = re.search(r"^# on (\S+) by (.+)$", head, re.MULTILINE)
    dates = [e.recorded_at for e in exchanges if e.recorded_at]
    by = next((e.recorded_by for e in reversed(exchanges) if e.recorded_by), "")
    return Entry(
        path,
        len(exchanges),
        tuple(dict.fromkeys(filter(None, (_model(e.request) for e in exchanges)))),
        tuple(dict.fromkeys(host_of(e.request.uri) for e in exchanges)),
        origin_of(path) or "",
        by or (on[2] if on else ""),
        min(dates) if dates else parse_time(on[1]) if on else None,
    )


def _model(request: Request) -> str | None:
    named = request.as_data().get("model")
    in_path = re.search(r"/models/([^/:?]+):", request.uri)
    return str(named) if named else in_path[1] if in_path else None


def list_table(folder: str | os.PathLike[str]) -> str:
    """Return the cassettes of a folder as a table, oldest first.

    Raises:
        FileNotFoundError: There is no such folder.
        CassetteError: A file contains no cassette.
    """
    root = Path(folder)
    now = datetime.now(UTC)
    head = ("cassette", "calls", "model", "from", "recorded", "days", "by")
    rows: list[tuple[str, ...]] = [head]
    never = datetime.min.replace(tzinfo=UTC)
    for entry in sorted(entries(root), key=lambda e: (e.recorded_at or never, e.path)):
        at = entry.recorded_at
        name = entry.path.relative_to(root) if root.is_dir() else entry.path
        rows.append(
            (
                str(name.with_suffix("")),
                str(entry.exchanges),
                ", ".join(entry.models) or "-",
                entry.origin or ", ".join(entry.hosts) or "-",
                f"{at:%Y-%m-%d}" if at else "?",
                str((now - at).days) if at else "?",
                entry.by or "?",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # A recorded name may contain a line break.
    rows = [tuple(" ".join(cell.split()) for cell in row) for row in rows]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)
