"""Turns pictures, PDFs and sound in a conversation into what a provider takes.

Knows files, URLs, limits, and which provider takes what; knows no LiteLLM. A part whose
bytes cannot be had, or that the provider would drop or refuse, is an error before
anything is sent to the provider.
"""

import asyncio
import binascii
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from dipeo_llm.adapters.factory import Provider
from dipeo_llm.adapters.failures import clean
from dipeo_llm.client import USER_AGENT, Endpoint, proxy_for, tls_context
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.files import open_regular, resolve_inside
from dipeo_llm.settings import Settings

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

_T = TypeVar("_T")

MAX_PARTS = 100
"""Most pictures, PDFs and sounds in one conversation."""
MAX_BYTES = 20 * 1024 * 1024
"""Largest one of them, before base64."""
MAX_TOTAL_BYTES = 100 * 1024 * 1024
"""Largest sum of them, before base64."""
MAX_REDIRECTS = 3
FETCH_TIMEOUT = 30.0
"""Seconds for one URL, redirects included."""

_AT_ONCE = 8
_PDF = "application/pdf"
_PICTURES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})

# All pages read 2026-11-23.
TAKES: Mapping[str, frozenset[str]] = {
    # https://platform.openai.com/docs/guides/images-vision#image-input-requirements
    # https://developers.openai.com/api/docs/guides/file-inputs: PDF only, never by URL
    # https://platform.openai.com/docs/guides/audio: wav and mp3
    "openai": _PICTURES | {_PDF, "audio/wav", "audio/mp3"},
    # https://platform.claude.com/docs/en/build-with-claude/vision
    # https://platform.claude.com/docs/en/build-with-claude/pdf-support
    # No sound; LiteLLM leaves it out without a word.
    "anthropic": _PICTURES | {_PDF},
    # https://ai.google.dev/gemini-api/docs/image-understanding: no gif
    # https://ai.google.dev/gemini-api/docs/document-processing
    # https://ai.google.dev/gemini-api/docs/audio
    "google": frozenset(
        {"image/png", "image/jpeg", "image/webp", "image/heic", "image/heif", _PDF}
    )
    | {f"audio/{name}" for name in ("wav", "mp3", "aiff", "aac", "ogg", "flac")}
    # its documents page: text is read as plain text
    | {f"text/{name}" for name in ("plain", "markdown", "html", "xml", "csv")}
    # https://ai.google.dev/gemini-api/docs/video-understanding, as a data: URL
    | {f"video/{name}" for name in ("mp4", "mpeg", "quicktime", "webm", "3gpp")},
    # https://github.com/ollama/ollama/pull/10653 (webp, from 0.7 on) and decodeImageURL
    # in https://github.com/ollama/ollama/blob/main/openai/openai.go: a gif is refused.
    # LiteLLM leaves files and sound out without a word.
    "ollama": frozenset({"image/png", "image/jpeg", "image/webp"}),
}
"""Media types by provider; one that is not here is given what it is given."""

# These fetch a picture themselves; every other gets the bytes.
_FETCH_THEMSELVES = frozenset({"openai"})

# A file that is on Google's servers already is named to Google as it is. LiteLLM fetches
# what begins otherwise (GEMINI_FILES_API_URI_PREFIX in its
# llms/vertex_ai/gemini/transformation.py, 1.105 to 1.109).
_STORED = re.compile(r"gs://|https://generativelanguage\.googleapis\.com/v1beta/files/")
_READ_STORED = frozenset({"google", "vertex"})

_ALIASES = {
    "image/jpg": "image/jpeg",
    "application/x-pdf": _PDF,
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


class _RefusedError(Exception):
    """Why a part cannot be used; becomes an InvalidRequestError that says which."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A part whose bytes are still to be had, and where it goes then."""

    place: str
    content: list[Any]
    index: int
    source: str | Path
    """A data: or https: URL, or a local file."""
    kind: str
    """image, audio, or file, which is any of them."""
    kept: Mapping[str, Any]
    """What stands beside the media in the part, such as `cache_control`."""
    detail: Any = None
    filename: str | None = None


async def prepare(
    messages: Sequence[Mapping[str, Any]],
    provider: Provider,
    *,
    base_dir: Path | None,
    settings: Settings,
    allow_outside_base_dir: bool = False,
) -> list[dict[str, Any]]:
    """Return the messages with every part in the form that the provider takes.

    Args:
        messages: OpenAI-shaped; never changed. A part of a content may be text, a
            `pathlib.Path` (a picture, a PDF or a sound, by its first bytes), or one of
            OpenAI's parts `text`, `image_url`, `file` and `input_audio`, in which a
            data: URL, a https: URL or a Path stands for the bytes. Of a part of media
            nothing else is kept but `cache_control`. OpenAI's `input_image` and
            `input_file` and Anthropic's `image` and `document` are read as the same,
            but a document that Anthropic reads itself is left as it is, as is a part
            of any other type.
        provider: Whose model it is for.
        base_dir: Folder that local files stand on and may not lie outside of; None
            takes the settings', else the working directory.
        settings: Proxy and TLS of a fetch, and whether private addresses are allowed.
        allow_outside_base_dir: Lets a local file lie anywhere.

    Raises:
        InvalidRequestError: A part cannot be read, is too large, or is not taken.

    Files are read in a thread and URLs fetched without blocking the event loop, several
    at once. Cancelling closes the connections. Messages of plain text come back as they
    are, at once.
    """
    wanted: list[_Wanted] = []
    prepared = [
        _unpacked(message, f"message {number}", provider, wanted)
        for number, message in enumerate(messages)
    ]
    if not wanted:
        return prepared
    if len(wanted) > MAX_PARTS:
        raise InvalidRequestError(
            f"there are {len(wanted)} pictures and files, more than {MAX_PARTS}",
            service=provider.name,
        )
    base = base_dir or settings.base_dir or Path()
    loader = _Loader(provider, settings, base, allow_outside=allow_outside_base_dir)
    try:
        async with asyncio.TaskGroup() as group:
            for alike in _grouped(wanted):
                group.create_task(loader.fill(alike))
    except ExceptionGroup as failed:
        # The first failure has cancelled the others.
        raise failed.exceptions[0] from None
    return prepared


def _unpacked(
    message: Mapping[str, Any], place: str, provider: Provider, wanted: list[_Wanted]
) -> dict[str, Any]:
    """Return a message with parts of its own, those that need bytes noted in *wanted*."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message if isinstance(message, dict) else dict(message)
    parts: list[Any] = []
    is_result = message.get("role") in {"tool", "function"}
    for index, given in enumerate(content):
        where = f"{place}, part {index}"
        try:
            part = _openai_part(given, provider)
            found = _wanted(part, provider, is_result=is_result)
        except _RefusedError as why:
            raise InvalidRequestError(
                f"{where}: {why}", service=provider.name
            ) from None
        if found is not None:
            wanted.append(_Wanted(where, parts, index, **found))
        parts.append(_fresh(part))
    return {**message, "content": parts}


def _fresh(part: Any) -> Any:
    """Copy a part as deep as LiteLLM writes into those that it is given."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        return part
    return {k: dict(v) if isinstance(v, dict) else v for k, v in part.items()}


_KINDS = {"image_url": "image", "file": "file", "input_audio": "audio"}
_MAIN = {"image_url": "url", "file": "file", "input_audio": "data"}
# What a part of media may hold: one of these, which says where the bytes are, and more.
_SOURCES = {
    "image_url": ("url",),
    "file": ("file", "file_data", "file_id"),
    "input_audio": ("data",),
}
_BESIDE = ("detail", "filename", "format", "mime_type", "video_metadata")


def _openai_part(part: Any, provider: Provider) -> Any:
    """Write a part of media as OpenAI's chat has it, with nothing in it that is not read.

    LiteLLM fetches what it finds in the spelling of another API, or in a field that the
    type of the part does not have, by itself and in its own way. Seen in 1.105 and
    1.109: `input_image`, `input_file` and `file_data` of a tool's result to Google on
    the event loop, `image` and `document` by its own handlers, whatever there is in a
    `tool_result` as it counts tokens.
    """
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return part
    name = part["type"]
    body = part.get(name)
    if name == "tool_result":
        raise _RefusedError("a tool's result is a message of its own, of the role tool")
    if name in {"image", "document"}:
        name, body = _anthropic_part(name, part, provider)
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
        raise _RefusedError(f"it has no {name!r}")
    body = {k: body[k] for k in (*_SOURCES[name], *_BESIDE) if body.get(k)}
    kept = {k: part[k] for k in ("cache_control",) if k in part}
    return {"type": name, name: body, **kept}


def _anthropic_part(
    name: str, part: Mapping[str, Any], provider: Provider
) -> tuple[str, Any]:
    """Return type and body of OpenAI's part for Anthropic's image or document.

    A document stays one where it is read as such, and LiteLLM does not fetch it.
    """
    found = part.get("source")
    source = found if isinstance(found, Mapping) else {}
    if name == "document" and (
        provider.name == "anthropic"
        or (provider.name not in TAKES and source.get("type") != "url")
    ):
        return name, None
    if source.get("type") == "url":
        url = source.get("url")
    elif source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    else:
        raise _RefusedError(
            f"the source of its {name!r} is neither base64 nor a URL; text is a part of"
            " its own"
        )
    if name == "image":
        return "image_url", {"url": url}
    return "file", {"file_data": url, "filename": part.get("title")}


def _wanted(part: Any, provider: Provider, *, is_result: bool) -> dict[str, Any] | None:
    """Say what a part wants, in the fields of _Wanted; None for nothing."""
    if isinstance(part, str):
        return None
    if isinstance(part, os.PathLike):
        return {"source": Path(part), "kind": "file", "kept": {}}
    if not isinstance(part, Mapping):
        raise _RefusedError(
            f"a part cannot be of type {type(part).__name__}; it is text, a"
            " pathlib.Path or a mapping with a type"
        )
    name = part.get("type")
    if not isinstance(name, str) or name not in _KINDS:
        return None
    body = part[name]
    source = _source(name, body)
    if _is_kept_by_provider(source, name, body, provider):
        if is_result and source is not None:
            # LiteLLM would fetch it, or leave it out without a word.
            raise _RefusedError("a tool's result takes no stored file, only its bytes")
        return None
    return {
        "source": source,
        "kind": _KINDS[name],
        "kept": {k: v for k, v in part.items() if k not in {"type", name}},
        "detail": body.get("detail"),
        "filename": body.get("filename"),
    }


def _source(kind: str, body: Mapping[str, Any]) -> str | Path | None:
    """Return where the bytes are; None for a file that the provider keeps under an id."""
    found = [name for name in _SOURCES[kind] if name in body]
    if len(found) > 1:
        # LiteLLM would take the one that was not looked at here.
        raise _RefusedError(f"its {kind!r} holds {' and '.join(found)}: one is right")
    given = body[found[0]] if found else None
    if isinstance(given, os.PathLike):
        return Path(given)
    if not isinstance(given, str):
        raise _RefusedError(f"its {kind!r} holds no data")
    if found == ["file_id"] and re.fullmatch(r"[\w=-]+", given):
        return None
    if given[:8].lower().startswith(("data:", "https:", "http:", "gs:")):
        return given
    if kind == "input_audio":
        name = body.get("format")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,32}", name):
            raise _RefusedError("its 'input_audio' names no format, such as 'wav'")
        return f"data:audio/{name};base64,{given}"
    raise _RefusedError(
        f"its {kind!r} is neither a data: nor a https: URL; a local file is given as a"
        " pathlib.Path"
    )


def _is_kept_by_provider(
    source: str | Path | None, kind: str, body: Mapping[str, Any], provider: Provider
) -> bool:
    """Say whether the provider has the bytes already, so that the part stays as it is."""
    if source is None:
        if provider.name == "ollama":
            raise _RefusedError("ollama keeps no files that an id could name")
        return True
    if (
        not isinstance(source, str)
        or provider.name not in _READ_STORED
        or kind == "input_audio"
        or not _STORED.match(source)
    ):
        return False
    # LiteLLM asks Google's storage for the type otherwise, blocking and unfenced; and
    # splits it off like this.
    suffix = os.path.splitext(source)[1]  # noqa: PTH122 - a Path drops a slash at the end
    told = body.get("format") or suffix.strip(".")
    if source.startswith("gs://") and not (isinstance(told, str) and told.strip()):
        raise _RefusedError(
            "a gs:// file without a suffix needs a 'format', such as 'image/png'"
        )
    return True


def _grouped(wanted: list[_Wanted]) -> list[list[_Wanted]]:
    """Put parts that want the same file or URL together, so that it is read once."""
    groups: dict[Any, list[_Wanted]] = {}
    for item in wanted:
        inline = isinstance(item.source, str) and item.source[:5].lower() == "data:"
        key = item.place if inline else (item.kind, item.source)
        groups.setdefault(key, []).append(item)
    return list(groups.values())


class _Loader:
    """Has the bytes of one conversation's parts, and puts them in place."""

    def __init__(
        self, provider: Provider, settings: Settings, base: Path, *, allow_outside: bool
    ) -> None:
        self._provider = provider
        self._settings = settings
        self._allow_private = settings.allow_private_urls
        self._base = base
        self._allow_outside = allow_outside
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._total = 0

    async def fill(self, alike: list[_Wanted]) -> None:
        """Load what some parts want in common, and complete them."""
        first = alike[0]
        try:
            async with self._turn:
                media_type, url = await self._load(first)
            self._check(first.kind, media_type, len(url) * 3 // 4 * len(alike))
        except _RefusedError as why:
            raise InvalidRequestError(
                f"{first.place}: {why}", service=self._provider.name
            ) from None
        for item in alike:
            item.content[item.index] = _part(item, media_type, url)

    async def _load(self, item: _Wanted) -> tuple[str, str]:
        """Return the media type, and a URL that the provider takes."""
        source = item.source
        if isinstance(source, Path):
            return await asyncio.to_thread(self._from_file, source)
        if source[:5].lower() == "data:":
            return await _off_loop(len(source), _checked_data_url, source)
        if item.kind == "image" and self._provider.name in _FETCH_THEMSELVES:
            _checked_url(source, allow_private=self._allow_private)
            return "image/*", source
        data, media_type = await _fetched(
            source, item.kind, self._settings, allow_private=self._allow_private
        )
        return media_type, await _off_loop(len(data), _data_url, media_type, data)

    def _from_file(self, path: Path) -> tuple[str, str]:
        try:
            real = resolve_inside(path, self._base, allow_outside=self._allow_outside)
            with open_regular(real) as file:
                # One byte more than is allowed tells that there is more.
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise _RefusedError(f"it is larger than {MAX_BYTES} bytes")
            media_type = sniff(data)
            if media_type is None:
                raise _RefusedError("it is no picture, PDF or sound of a known format")
        except (OSError, ValueError, _RefusedError) as exc:
            why = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            raise _RefusedError(
                f"the file {str(path)!r} cannot be used: {why}"
            ) from None
        return media_type, _data_url(media_type, data)

    def _check(self, kind: str, media_type: str, size: int) -> None:
        family = media_type.partition("/")[0]
        if kind not in {"file", family}:
            raise _RefusedError(
                f"{media_type} stands where {kind}/… is asked for"
                + (": a PDF goes into a 'file' part" if media_type == _PDF else "")
            )
        takes = TAKES.get(self._provider.name)
        if takes is not None and media_type not in {*takes, "image/*"}:
            raise _RefusedError(
                f"{self._provider.name} takes no {media_type}, only"
                f" {', '.join(sorted(takes))}"
            )
        self._total += size
        if self._total > MAX_TOTAL_BYTES:
            raise _RefusedError(
                f"with it the pictures and files are larger than {MAX_TOTAL_BYTES} bytes"
            )


def _part(item: _Wanted, media_type: str, url: str) -> dict[str, Any]:
    """Write a part as OpenAI does, which LiteLLM translates for every other provider."""
    family, _, name = media_type.partition("/")
    if family == "image":
        image = {"url": url}
        if item.detail is not None:
            image["detail"] = item.detail
        return {"type": "image_url", "image_url": image, **item.kept}
    if family == "audio":
        sound = {"data": url[url.index(",") + 1 :], "format": name}
        return {"type": "input_audio", "input_audio": sound, **item.kept}
    # OpenAI refuses a file without a name.
    named = item.filename or _filename(item.source) or f"document.{name}"
    file = {"filename": named, "file_data": url}
    return {"type": "file", "file": file, **item.kept}


def _filename(source: str | Path) -> str:
    if isinstance(source, Path):
        return source.name
    if source[:5].lower() == "data:":
        return ""
    return clean(unquote(urlsplit(source).path).rpartition("/")[2])


# --- bytes ---------------------------------------------------------------------------

# base64 of a large text holds the interpreter for tens of milliseconds; in a thread and
# in steps, it lets the event loop run in between. Both steps are whole groups.
_SMALL = 256 * 1024
_STEP = 768 * 1024
_STEP_64 = 1024 * 1024


async def _off_loop(size: int, work: Callable[..., _T], *args: Any) -> _T:
    """Do work on that many bytes, in a thread if they are many."""
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
    """Tell the media type by the first bytes; None for one that is not known here."""
    for magic, media_type in _MAGIC.items():
        if data.startswith(magic):
            return media_type
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return _PDF
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


def _data_url(media_type: str, data: bytes) -> str:
    pieces = [
        binascii.b2a_base64(data[i : i + _STEP], newline=False).decode("ascii")
        for i in range(0, len(data), _STEP)
    ]
    return f"data:{media_type};base64,{''.join(pieces)}"


def _checked_data_url(url: str) -> tuple[str, str]:
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
        raise _RefusedError(f"the data: URL cannot be used: {why}")
    head = f"data:{media_type};base64,"
    return media_type, url if url.startswith(head) else head + url[comma + 1 :]


def _is_base64(text: str, start: int) -> bool:
    for at in range(start, len(text), _STEP_64):
        piece = text[at : at + _STEP_64]
        last = at + _STEP_64 >= len(text)
        try:
            # Padding is right at the very end only.
            if "=" in piece and not last:
                return False
            binascii.a2b_base64(piece, strict_mode=True)
        except ValueError:
            return False
    return True


# --- files ---------------------------------------------------------------------------

# --- URLs ----------------------------------------------------------------------------

# What is not public of IPv4 and, within 2000::/3, of IPv6, by the registries
# https://www.iana.org/assignments/iana-ipv4-special-registry and
# https://www.iana.org/assignments/iana-ipv6-special-registry (read 2026-11-23). Written
# out, because `ipaddress.is_global` differs between releases of Python.
_PRIVATE_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # Azure's machine agent, on a public address
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # Teredo and others that stand for another address
            "2001:db8::/32",
            "2002::/16",  # 6to4
            "3fff::/20",
        ),
    )
)
# The last 32 bits are an IPv4 address: mapped, and NAT64.
_HOLDS_4 = (
    ipaddress.IPv6Network("::ffff:0:0/96"),
    ipaddress.IPv6Network("64:ff9b::/96"),
)


def is_public(address: str) -> bool:
    """Say whether an IP address is one of the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in _HOLDS_4):
            return ip in _GLOBAL_6 and not any(ip in network for network in _PRIVATE_6)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _PRIVATE_4)


# A name of the public DNS: two labels or more, the last not beginning with a digit, as
# that of every old spelling of an IPv4 address does (`0x7f.1`, `2130706433`).
_NAME = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z][a-z0-9-]*")
# RFC 6761, 6762, 8375 and ICANN's resolution 2024.07.29.06.
_LOCAL = (".localhost", ".local", ".internal", ".home.arpa")


def _checked_url(url: str, *, allow_private: bool = False) -> "URL":
    """Return a URL that may be fetched, as far as its text can tell.

    Args:
        url: The URL.
        allow_private: Lets it be http, and lead to this machine and private networks.

    Raises:
        _RefusedError: It may not be fetched.
    """
    from yarl import URL

    try:
        parsed = URL(url)
    except ValueError:
        raise _RefusedError("it is not a URL") from None
    host = (parsed.raw_host or "").lower()
    if parsed.scheme not in ({"https", "http"} if allow_private else {"https"}):
        raise _url_refused(host, "only https: URLs are fetched")
    if not host:
        raise _RefusedError("it is a URL without a host")
    if "@" in parsed.raw_authority:
        raise _url_refused(host, "it carries a user name or password")
    if allow_private:
        return parsed
    name = host.removesuffix(".")
    try:
        public = is_public(name) and "%" not in name
    except ValueError:
        public = bool(_NAME.fullmatch(name)) and not name.endswith(_LOCAL)
    if not public:
        raise _url_refused(host, _NOT_PUBLIC)
    return parsed


_NOT_PUBLIC = "it is not on the public internet"


def _url_refused(host: str, why: str) -> _RefusedError:
    # The host only: a path or a query may hold a secret.
    return _RefusedError(f"the URL at {clean(host) or '?'} cannot be used: {why}")


_REDIRECTS = frozenset({301, 302, 303, 307, 308})


async def _fetched(
    url: str, kind: str, settings: Settings, *, allow_private: bool
) -> tuple[bytes, str]:
    """Fetch a URL; return its bytes and the media type that they have.

    Carries no key, cookie or name of ours, and follows a few redirects, each checked.
    The address is checked after the look-up whose result is connected to. Behind a
    proxy the proxy looks up again; then the check is as good as the two agree.
    """
    import aiohttp

    target = _checked_url(url, allow_private=allow_private)
    host = target.raw_host or ""
    resolver = _resolver(allow_private=allow_private)
    tls = await tls_context(
        # Only the authorities matter here.
        Endpoint(_NOBODY, None, SecretStr("")),
        settings,
    )
    try:
        async with (
            asyncio.timeout(FETCH_TIMEOUT),
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=resolver,
                    ssl=tls if tls is not None else True,
                    use_dns_cache=False,
                    force_close=True,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Proxies are read here and not by aiohttp, which would read .netrc too.
                trust_env=False,
                auto_decompress=False,
                headers={
                    "User-Agent": USER_AGENT,
                    "Accept": _ACCEPT[kind],
                    "Accept-Encoding": "identity",
                },
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=settings.connect_timeout
                ),
            ) as session,
        ):
            for _ in range(MAX_REDIRECTS + 1):
                proxy = proxy_for(str(target), settings)
                if proxy is not None:
                    await resolver.look_at(target)
                resolver.proxy = urlsplit(proxy).hostname if proxy else None
                async with session.get(
                    target, allow_redirects=False, proxy=proxy
                ) as response:
                    if response.status not in _REDIRECTS:
                        return await _read(response, kind, host)
                    target = _next_hop(response, host, allow_private=allow_private)
                    host = target.raw_host or ""
            raise _url_refused(host, f"there are more than {MAX_REDIRECTS} redirects")
    except TimeoutError:
        why = f"it was not read within {FETCH_TIMEOUT:g} s"
    except aiohttp.ClientConnectorDNSError:
        why = "its name cannot be resolved"
    except aiohttp.ClientSSLError:
        why = "there is no trusted connection to it"
    except (aiohttp.ClientError, OSError, EOFError) as exc:
        # The class only: the text of some holds the whole URL.
        why = f"the connection failed ({type(exc).__name__})"
    raise _url_refused(host, why)


_NOBODY = Provider(name="", litellm="")
_ACCEPT = {"image": "image/*", "audio": "audio/*", "file": f"{_PDF}, image/*, audio/*"}


def _next_hop(
    response: "aiohttp.ClientResponse", host: str, *, allow_private: bool
) -> "URL":
    from yarl import URL

    try:
        location = response.url.join(URL(response.headers.get("location", "")))
        return _checked_url(str(location), allow_private=allow_private)
    except ValueError:
        raise _url_refused(host, "it redirects to what is not a URL") from None
    except _RefusedError as why:
        raise _url_refused(host, f"it redirects: {why}") from None


async def _read(
    response: "aiohttp.ClientResponse", kind: str, host: str
) -> tuple[bytes, str]:
    """Read a body, up to the limit, and see that it is what was asked for."""
    if response.status != 200:
        raise _url_refused(host, f"it answered {response.status}")
    said = _canonical(response.headers.get("content-type", ""))
    family = said.partition("/")[0]
    if not (
        family == kind or (kind == "file" and (family in _FAMILIES or said == _PDF))
    ):
        raise _url_refused(host, f"it answered {clean(said) or 'no media type'}")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise _url_refused(host, "it answered with a compressed body")
    too_large = _url_refused(host, f"it is larger than {MAX_BYTES} bytes")
    if (response.content_length or 0) > MAX_BYTES:
        raise too_large
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_BYTES:
            raise too_large
    data = bytes(body)
    media_type = sniff(data)
    if media_type is None or media_type.partition("/")[0] != family:
        raise _url_refused(host, f"its bytes are not the {said} that it says")
    return data, media_type


_FAMILIES = frozenset({"image", "audio"})


def _resolver(*, allow_private: bool) -> Any:
    """Make a resolver that refuses a name which leads off the public internet."""
    import aiohttp

    class PublicResolver(aiohttp.ThreadedResolver):
        proxy: str | None = None
        """The proxy's own name, which may lead anywhere."""

        async def resolve(
            self,
            host: str,
            port: int = 0,
            family: socket.AddressFamily = socket.AF_UNSPEC,
        ) -> Any:
            found = await super().resolve(host, port, family)
            if (
                not allow_private
                and host != self.proxy
                and not all(is_public(entry["host"]) for entry in found)
            ):
                raise _url_refused(host, _NOT_PUBLIC)
            return found

        async def look_at(self, target: "URL") -> None:
            """Check a name that a proxy is going to resolve, if it is known here."""
            self.proxy = None
            try:
                await self.resolve(target.raw_host or "", target.port or 443)
            except OSError:
                return

    return PublicResolver()
