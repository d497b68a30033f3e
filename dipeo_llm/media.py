"""Turns pictures, PDFs and sounds of a conversation into what a provider takes.

Knows files, parts, media types and limits; knows neither LiteLLM nor any provider:
`MediaRules` say what a provider takes. A part that cannot be loaded, or that the
provider would drop or refuse, is an error before anything is sent to the provider.
"""

import asyncio
import binascii
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from dipeo_llm.adapters.failures import clean
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.fetch import FetchError, check_url, fetch
from dipeo_llm.files import open_regular, resolve_inside
from dipeo_llm.settings import Settings

_T = TypeVar("_T")

MAX_PARTS = 100
"""Most pictures, PDFs and sounds of one conversation."""
MAX_BYTES = 20 * 1024 * 1024
"""Size of the largest one, before base64."""
MAX_TOTAL_BYTES = 100 * 1024 * 1024
"""Size of all together, before base64."""

_AT_ONCE = 8
PDF = "application/pdf"
PICTURES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})


@dataclass(frozen=True, slots=True)
class MediaRules:
    """What a provider takes. The defaults suit a provider that nothing is known about."""

    types: frozenset[str] | None = None
    """Media types it takes, in the spelling of `sniff`; None passes every type."""
    fetches_images: bool = False
    """Whether it fetches images by their https URL itself; else it gets the bytes."""
    reads_stored: bool = False
    """Whether it reads gs:// URLs and files of Google's Files API."""
    takes_file_ids: bool = True
    """Whether a file may be named by the id that the provider gave it."""
    reads_documents: bool = False
    """Whether it takes Anthropic's `document` parts, which then stay as they are."""


# Google reads files that are on its own servers. LiteLLM fetches every other URL itself
# (GEMINI_FILES_API_URI_PREFIX in its llms/vertex_ai/gemini/transformation.py, 1.105 to
# 1.109).
_STORED = re.compile(r"gs://|https://generativelanguage\.googleapis\.com/v1beta/files/")

_ALIASES = {
    "image/jpg": "image/jpeg",
    "application/x-pdf": PDF,
    "application/ogg": "audio/ogg",
    # Google's documentation and OpenAI's `format` both say mp3.
    "audio/mpeg": "audio/mp3",
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "audio/x-aiff": "audio/aiff",
    "audio/x-aac": "audio/aac",
    "audio/x-flac": "audio/flac",
}


class _PartError(Exception):
    """Why a part cannot be used; becomes an InvalidRequestError that names the part."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A part whose bytes are not loaded yet."""

    place: str
    """Its message and its position there, for error messages."""
    content: list[Any]
    index: int
    """Where in *content* the loaded part goes."""
    source: str | Path
    """A data: or https: URL, or a local file."""
    kind: str
    """image, audio, or file, which may hold either."""
    kept: Mapping[str, Any]
    """Fields beside the media, such as `cache_control`."""
    detail: Any = None
    filename: str | None = None


async def prepare(
    messages: Sequence[Mapping[str, Any]],
    rules: MediaRules,
    *,
    service: str,
    base_dir: Path | None,
    settings: Settings,
    allow_outside_base_dir: bool = False,
) -> list[dict[str, Any]]:
    """Return the messages with every part in the form that the provider takes.

    Files are read in a thread and URLs are fetched without blocking the event loop,
    several at once. Messages of plain text come back unchanged.

    Args:
        messages: OpenAI-shaped; never changed. A part of a content is text, a
            `pathlib.Path` (a picture, a PDF or a sound, told by its first bytes), or one
            of OpenAI's parts `text`, `image_url`, `file` and `input_audio`, with a data:
            URL, an https: URL or a Path in place of the bytes. Media parts keep only
            `cache_control`; other fields are dropped. OpenAI's `input_image` and
            `input_file` and Anthropic's `image` and `document` are read in the same way,
            unless the provider takes documents. Parts of other types stay unchanged.
        rules: What the provider takes.
        service: Name of the provider, for error messages.
        base_dir: Folder of local files; they may not lie outside of it. None takes that
            of the settings, else the working directory.
        settings: Proxy and TLS of a fetch, and whether private addresses are allowed.
        allow_outside_base_dir: Allows local files anywhere.

    Raises:
        InvalidRequestError: A part cannot be read, is too large, or is not taken.

    Cancelling it closes the connections.
    """
    pending: list[_Pending] = []
    prepared = [
        _unpack(message, f"message {number}", rules, service, pending)
        for number, message in enumerate(messages)
    ]
    if not pending:
        return prepared
    if len(pending) > MAX_PARTS:
        raise InvalidRequestError(
            f"there are {len(pending)} pictures and files, more than {MAX_PARTS}",
            service=service,
        )
    base = base_dir or settings.base_dir or Path()
    loader = _Loader(
        rules, service, settings, base, allow_outside=allow_outside_base_dir
    )
    try:
        async with asyncio.TaskGroup() as group:
            for alike in _group(pending):
                group.create_task(loader.fill(alike))
    except ExceptionGroup as failures:
        # The first failure has cancelled the other tasks.
        raise failures.exceptions[0] from None
    return prepared


def _unpack(
    message: Mapping[str, Any],
    place: str,
    rules: MediaRules,
    service: str,
    pending: list[_Pending],
) -> dict[str, Any]:
    """Return a message with copies of its parts; note in *pending* which lack bytes."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message if isinstance(message, dict) else dict(message)
    parts: list[Any] = []
    is_result = message.get("role") in {"tool", "function"}
    for index, given in enumerate(content):
        where = f"{place}, part {index}"
        try:
            part = _to_openai(given, rules)
            fields = _media_of(part, rules, service, is_result=is_result)
        except _PartError as why:
            raise InvalidRequestError(f"{where}: {why}", service=service) from None
        if fields is not None:
            pending.append(_Pending(where, parts, index, **fields))
        parts.append(_copy(part))
    return {**message, "content": parts}


def _copy(part: Any) -> Any:
    """Copy a part to the depth to which LiteLLM writes into it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        return part
    return {k: dict(v) if isinstance(v, dict) else v for k, v in part.items()}


_KINDS = {"image_url": "image", "file": "file", "input_audio": "audio"}
_MAIN = {"image_url": "url", "file": "file", "input_audio": "data"}
# A media part has one of these fields, which says where the bytes are, and others beside.
_SOURCES = {
    "image_url": ("url",),
    "file": ("file", "file_data", "file_id"),
    "input_audio": ("data",),
}
_BESIDE = ("detail", "filename", "format", "mime_type", "video_metadata")


def _to_openai(part: Any, rules: MediaRules) -> Any:
    """Rewrite a media part as OpenAI's chat spells it, without fields unknown here.

    If a URL stands in another API's spelling, or in a field that does not belong to the
    part's type, LiteLLM fetches it in its own way. Seen in 1.105 and 1.109:
    `input_image`, `input_file` and `file_data` of a tool's result for Google, on the
    event loop; `image` and `document`; anything in a `tool_result` when it counts tokens.
    """
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return part
    name = part["type"]
    body = part.get(name)
    if name == "tool_result":
        raise _PartError("a tool's result is a message of its own, of the role tool")
    if name in {"image", "document"}:
        name, body = _from_anthropic(name, part, rules)
    elif name == "input_image":
        name, body = "image_url", part.get("image_url")
    elif name == "input_file":
        data = part.get("file_data") or part.get("file_url")
        name, body = "file", {**part, "file_data": data}
    if name not in _KINDS:
        return part
    if isinstance(body, str | os.PathLike):
        body = {_MAIN[name]: body}
    if not isinstance(body, Mapping):
        raise _PartError(f"it has no {name!r}")
    body = {k: body[k] for k in (*_SOURCES[name], *_BESIDE) if body.get(k)}
    kept = {k: part[k] for k in ("cache_control",) if k in part}
    return {"type": name, name: body, **kept}


def _from_anthropic(
    name: str, part: Mapping[str, Any], rules: MediaRules
) -> tuple[str, Any]:
    """Return type and body of OpenAI's part for Anthropic's `image` or `document`.

    A document stays one if the provider reads it, or may read it and LiteLLM would not
    fetch it.
    """
    found = part.get("source")
    source = found if isinstance(found, Mapping) else {}
    if name == "document" and (
        rules.reads_documents or (rules.types is None and source.get("type") != "url")
    ):
        return name, None
    if source.get("type") == "url":
        url = source.get("url")
    elif source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    else:
        raise _PartError(
            f"the source of its {name!r} is neither base64 nor a URL; text is a part of"
            " its own"
        )
    if name == "image":
        return "image_url", {"url": url}
    return "file", {"file_data": url, "filename": part.get("title")}


def _media_of(
    part: Any, rules: MediaRules, service: str, *, is_result: bool
) -> dict[str, Any] | None:
    """Return the fields of `_Pending` for a part; None if it needs no bytes."""
    if isinstance(part, str):
        return None
    if isinstance(part, os.PathLike):
        return {"source": Path(part), "kind": "file", "kept": {}}
    if not isinstance(part, Mapping):
        raise _PartError(
            f"a part cannot be of type {type(part).__name__}; give text, a pathlib.Path"
            " or a mapping with a type"
        )
    name = part.get("type")
    if not isinstance(name, str):
        raise _PartError('a part needs a `type`, such as {"type": "text", "text": …}')
    if name == "text" and not isinstance(part.get("text"), str):
        raise _PartError("a part of type 'text' needs a `text`")
    if name not in _KINDS:
        return None
    body = part[name]
    source = _source(name, body)
    if source is None and not rules.takes_file_ids:
        raise _PartError(f"{service} keeps no files that an id could name")
    if source is None or _is_stored(source, name, body, rules):
        if is_result and source is not None:
            # LiteLLM would fetch the file, or silently drop the part.
            raise _PartError("a tool's result takes no stored file, only its bytes")
        return None
    return {
        "source": source,
        "kind": _KINDS[name],
        "kept": {k: v for k, v in part.items() if k not in {"type", name}},
        "detail": body.get("detail"),
        "filename": body.get("filename"),
    }


def _source(name: str, body: Mapping[str, Any]) -> str | Path | None:
    """Return the URL or path of a part's bytes; None for the id of a stored file."""
    found = [field for field in _SOURCES[name] if field in body]
    if len(found) > 1:
        # LiteLLM might take the one that was not checked here.
        raise _PartError(f"its {name!r} holds {' and '.join(found)}; give only one")
    given = body[found[0]] if found else None
    if isinstance(given, os.PathLike):
        return Path(given)
    if not isinstance(given, str):
        raise _PartError(f"its {name!r} holds no data")
    if found == ["file_id"] and re.fullmatch(r"[\w=-]+", given):
        return None
    if given[:8].lower().startswith(("data:", "https:", "http:", "gs:")):
        return given
    if name == "input_audio":
        media_format = body.get("format")
        if not isinstance(media_format, str) or not re.fullmatch(
            r"[\w.+-]{1,32}", media_format
        ):
            raise _PartError("its 'input_audio' names no format, such as 'wav'")
        return f"data:audio/{media_format};base64,{given}"
    raise _PartError(
        f"its {name!r} is neither a data: nor an https: URL; give a local file as a"
        " pathlib.Path"
    )


def _is_stored(
    source: str | Path, name: str, body: Mapping[str, Any], rules: MediaRules
) -> bool:
    """Tell whether the provider has the file already, so that the part stays as it is."""
    if (
        not isinstance(source, str)
        or not rules.reads_stored
        or name == "input_audio"
        or not _STORED.match(source)
    ):
        return False
    # Without a format or suffix LiteLLM asks Google's storage for the type, outside the
    # fence and on the event loop. It finds the suffix in this way.
    suffix = os.path.splitext(source)[1]  # noqa: PTH122 - a Path drops the last slash
    known = body.get("format") or suffix.strip(".")
    if source.startswith("gs://") and not (isinstance(known, str) and known.strip()):
        raise _PartError(
            "a gs:// file without a suffix needs a 'format', such as 'image/png'"
        )
    return True


def _group(pending: list[_Pending]) -> list[list[_Pending]]:
    """Group parts with the same file or URL, so that it is read once."""
    groups: dict[Any, list[_Pending]] = {}
    for part in pending:
        is_inline = isinstance(part.source, str) and _is_data_url(part.source)
        key = part.place if is_inline else (part.kind, part.source)
        groups.setdefault(key, []).append(part)
    return list(groups.values())


class _Loader:
    """Loads the media of one conversation and puts them into its parts."""

    def __init__(
        self,
        rules: MediaRules,
        service: str,
        settings: Settings,
        base: Path,
        *,
        allow_outside: bool,
    ) -> None:
        self._rules = rules
        self._service = service
        self._settings = settings
        self._base = base
        self._allow_outside = allow_outside
        self._permits = asyncio.Semaphore(_AT_ONCE)
        self._total = 0

    async def fill(self, alike: list[_Pending]) -> None:
        """Load the media that some parts have in common, and complete the parts."""
        first = alike[0]
        try:
            async with self._permits:
                media_type, url = await self._load(first)
            self._check(first.kind, media_type, len(url) * 3 // 4 * len(alike))
        except (_PartError, FetchError) as why:
            raise InvalidRequestError(
                f"{first.place}: {why}", service=self._service
            ) from None
        for part in alike:
            part.content[part.index] = _build(part, media_type, url)

    async def _load(self, part: _Pending) -> tuple[str, str]:
        """Return the media type, and a URL that the provider takes."""
        source = part.source
        if isinstance(source, Path):
            return await asyncio.to_thread(self._read_file, source)
        if _is_data_url(source):
            return await _off_loop(len(source), _check_data_url, source)
        if part.kind == "image" and self._rules.fetches_images:
            check_url(source, allow_private=self._settings.allow_private_urls)
            return "image/*", source
        media_type, data = await self._fetch(source, part.kind)
        return media_type, await _off_loop(len(data), _data_url, media_type, data)

    async def _fetch(self, url: str, kind: str) -> tuple[str, bytes]:
        def is_accepted(media_type: str) -> bool:
            media_type = _canonical(media_type)
            family = media_type.partition("/")[0]
            return family == kind or (
                kind == "file" and (family in {"image", "audio"} or media_type == PDF)
            )

        download = await fetch(
            url,
            self._settings,
            accept=_ACCEPT[kind],
            is_accepted=is_accepted,
            max_bytes=MAX_BYTES,
        )
        given = _canonical(download.media_type)
        media_type = sniff(download.data)
        if (
            media_type is None
            or media_type.partition("/")[0] != given.partition("/")[0]
        ):
            raise FetchError(download.host, f"its bytes are not {given}, as it says")
        return media_type, download.data

    def _read_file(self, path: Path) -> tuple[str, str]:
        try:
            real = resolve_inside(path, self._base, allow_outside=self._allow_outside)
            with open_regular(real) as file:
                # One byte more than allowed tells that the file is too large.
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise _PartError(f"it is larger than {MAX_BYTES} bytes")
            media_type = sniff(data)
            if media_type is None:
                raise _PartError("it is not a picture, PDF or sound of a known format")
        except (OSError, ValueError, _PartError) as exc:
            why = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            raise _PartError(f"the file {str(path)!r} cannot be used: {why}") from None
        return media_type, _data_url(media_type, data)

    def _check(self, kind: str, media_type: str, size: int) -> None:
        family = media_type.partition("/")[0]
        if kind not in {"file", family}:
            hint = "; put a PDF into a 'file' part" if media_type == PDF else ""
            raise _PartError(f"it is {media_type}, but its part takes {kind}/…{hint}")
        types = self._rules.types
        if types is not None and media_type not in {*types, "image/*"}:
            raise _PartError(
                f"{self._service} does not take {media_type}; it takes"
                f" {', '.join(sorted(types))}"
            )
        self._total += size
        if self._total > MAX_TOTAL_BYTES:
            raise _PartError(
                f"with it the pictures and files are larger than {MAX_TOTAL_BYTES} bytes"
            )


_ACCEPT = {"image": "image/*", "audio": "audio/*", "file": f"{PDF}, image/*, audio/*"}


def _build(part: _Pending, media_type: str, url: str) -> dict[str, Any]:
    """Return OpenAI's part, which LiteLLM translates for every other provider."""
    family, _, name = media_type.partition("/")
    if family == "image":
        image = {"url": url}
        if part.detail is not None:
            image["detail"] = part.detail
        return {"type": "image_url", "image_url": image, **part.kept}
    if family == "audio":
        sound = {"data": url[url.index(",") + 1 :], "format": name}
        return {"type": "input_audio", "input_audio": sound, **part.kept}
    # OpenAI refuses a file without a name.
    filename = part.filename or _filename(part.source) or f"document.{name}"
    file = {"filename": filename, "file_data": url}
    return {"type": "file", "file": file, **part.kept}


def _filename(source: str | Path) -> str:
    if isinstance(source, Path):
        return source.name
    if _is_data_url(source):
        return ""
    return clean(unquote(urlsplit(source).path).rpartition("/")[2])


# --- bytes ---------------------------------------------------------------------------

# base64 of a large text holds the interpreter for tens of milliseconds. In a thread and
# in steps, it lets the event loop run in between. Both steps are whole groups.
_SMALL = 256 * 1024
_STEP = 768 * 1024
_STEP_64 = 1024 * 1024


async def _off_loop(size: int, work: Callable[..., _T], *args: Any) -> _T:
    """Call a function that handles *size* bytes, in a thread if they are many."""
    return work(*args) if size < _SMALL else await asyncio.to_thread(work, *args)


_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"ID3": "audio/mp3",
    b"fLaC": "audio/flac",
    b"OggS": "audio/ogg",
}
_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav"}
_AIFF = frozenset({b"AIFF", b"AIFC"})
# ISO 23008-12, B.4: the brands of still pictures.
_HEIF = {
    b"heic": "image/heic",
    b"heix": "image/heic",
    b"mif1": "image/heif",
    b"msf1": "image/heif",
}


def sniff(data: bytes) -> str | None:
    """Return the media type by the first bytes; None if it is not known here."""
    for magic, media_type in _MAGIC.items():
        if data.startswith(magic):
            return media_type
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return PDF
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12])
    if data[:4] == b"FORM" and data[8:12] in _AIFF:
        return "audio/aiff"
    if data[4:8] == b"ftyp":
        return _HEIF.get(data[8:12])
    if len(data) > 2 and data[0] == 0xFF:
        # A frame of MPEG: eleven bits set, the version, and the layer: 0 is AAC, 1 MP3.
        if data[1] & 0xF6 == 0xF0:
            return "audio/aac"
        if data[1] & 0xE6 == 0xE2:
            return "audio/mp3"
    return None


def _canonical(media_type: str) -> str:
    media_type = media_type.partition(";")[0].strip().lower()
    return _ALIASES.get(media_type, media_type)


def _is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def _data_url(media_type: str, data: bytes) -> str:
    pieces = [
        binascii.b2a_base64(data[i : i + _STEP], newline=False).decode("ascii")
        for i in range(0, len(data), _STEP)
    ]
    return f"data:{media_type};base64,{''.join(pieces)}"


def _check_data_url(url: str) -> tuple[str, str]:
    """Return the media type of a data: URL, and the URL in its plainest form."""
    comma = url.find(",", 0, 256)
    fields = url[5 : max(comma, 5)].lower().split(";")
    media_type = _canonical(fields[0])
    why = None
    if comma < 0 or fields[-1].strip() != "base64":
        why = "it does not say base64"
    elif not re.fullmatch(r"\w[\w.+-]*/\w[\w.+-]*", media_type):
        why = "it names no media type"
    elif len(url) == comma + 1:
        why = "it is empty"
    elif (len(url) - comma - 1) // 4 * 3 > MAX_BYTES + 3:
        why = f"it is larger than {MAX_BYTES} bytes"
    elif not _is_base64(url, comma + 1):
        why = "its base64 cannot be read"
    if why is not None:
        raise _PartError(f"the data: URL cannot be used: {why}")
    head = f"data:{media_type};base64,"
    return media_type, url if url.startswith(head) else head + url[comma + 1 :]


def _is_base64(text: str, start: int) -> bool:
    for at in range(start, len(text), _STEP_64):
        piece = text[at : at + _STEP_64]
        is_last = at + _STEP_64 >= len(text)
        try:
            # Only the very end may be padded.
            if "=" in piece and not is_last:
                return False
            binascii.a2b_base64(piece, strict_mode=True)
        except ValueError:
            return False
    return True
