"""Pictures, PDFs and sounds: what a provider gets, and what is refused."""

import asyncio
import base64
import copy
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from dipeo_llm import fetch, media
from dipeo_llm.adapters.factory import by_name, create_adapter
from dipeo_llm.domain import ChatRequest
from dipeo_llm.errors import InvalidRequestError, LLMServiceError
from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.media import MediaRules
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Settings
from tests.conftest import PROVIDERS, Authority
from tests.provider_server import PDF, PNG, ProviderServer

# LiteLLM builds its models at their first use, with a warning from pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class")

MODELS = {
    "openai": "gpt-4o-mini",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llava:7b",
}
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
GIF = b"GIF89a\x01\x00\x01\x00"
WEBP = b"RIFF\x1a\x00\x00\x00WEBPVP8L"
HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt "
MP3 = b"ID3\x04\x00\x00\x00\x00\x00\x00"


PRIVATE = Settings(allow_private_urls=True)
"""Settings that allow URLs of this machine."""


def data_url(media_type: str, data: bytes) -> str:
    """Write bytes as a data: URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image(url: Any, **more: Any) -> dict[str, Any]:
    """Make an OpenAI image part."""
    return {"type": "image_url", "image_url": {"url": url}, **more}


def file(**body: Any) -> dict[str, Any]:
    """Make an OpenAI file part."""
    return {"type": "file", "file": body}


def sound(data: Any, name: str = "wav") -> dict[str, Any]:
    """Make an OpenAI audio part."""
    return {"type": "input_audio", "input_audio": {"data": data, "format": name}}


def rules_of(provider: str) -> MediaRules:
    """Return what a provider takes."""
    return by_name(provider).media


async def prepare(
    messages: list[dict[str, Any]],
    provider: str = "openai",
    *,
    base_dir: Path | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Prepare messages for a provider."""
    return await media.prepare(
        messages,
        rules_of(provider),
        service=provider,
        base_dir=base_dir,
        settings=settings or Settings(),
        **options,
    )


async def prepared(part: Any, provider: str = "openai", **options: Any) -> Any:
    """Prepare a message of one part, and return the part."""
    messages = await prepare([{"role": "user", "content": [part]}], provider, **options)
    return messages[0]["content"][0]


async def refused(part: Any, provider: str = "openai", **options: Any) -> str:
    """Prepare a part that must be refused, and return the reason."""
    with pytest.raises(InvalidRequestError) as caught:
        await prepared(part, provider, **options)
    assert caught.value.service == provider
    return caught.value.message


# --- what reaches the provider -------------------------------------------------------


async def sent(
    server: ProviderServer, provider: str, content: list[Any], **options: Any
) -> Any:
    """Complete a message, and return the body of the request that the provider got."""
    adapter = create_adapter(
        provider, MODELS[provider], "sk-test", server.base_url(provider)
    )
    messages = await prepare(
        [{"role": "user", "content": content}], provider, **options
    )
    await adapter.complete(ChatRequest(messages=messages))
    await adapter.aclose()
    return server.requests[-1].json


def received(provider: str, body: Any) -> list[tuple[str, bytes]]:
    """Return type and bytes of the media in the last message of a request."""
    if provider == "google":
        parts = [
            part.get("inlineData") or part.get("inline_data")
            for part in body["contents"][-1]["parts"]
        ]
        found = [
            (part.get("mimeType") or part["mime_type"], part["data"])
            for part in parts
            if part
        ]
    elif provider == "ollama":
        found = [("", data) for data in body["messages"][-1]["images"]]
    elif provider == "anthropic":
        found = [
            (
                f"{block['type']} {block['source']['media_type']}",
                block["source"]["data"],
            )
            for block in body["messages"][-1]["content"]
            if block["type"] != "text"
        ]
    else:
        found = []
        for part in body["messages"][-1]["content"]:
            url = str(part.get("image_url") or part.get("file"))
            found += re.findall(r"data:([\w/]+);base64,([\w+/=]+)", url)
            if audio := part.get("input_audio"):
                found.append((audio["format"], audio["data"]))
    return [(kind, base64.b64decode(data, validate=True)) for kind, data in found]


WIRE = [
    ("openai", PNG, "image/png"),
    ("openai", JPEG, "image/jpeg"),
    ("openai", GIF, "image/gif"),
    ("openai", WEBP, "image/webp"),
    ("openai", PDF, "application/pdf"),
    ("openai", WAV, "wav"),
    ("openai", MP3, "mp3"),
    ("anthropic", PNG, "image image/png"),
    ("anthropic", JPEG, "image image/jpeg"),
    ("anthropic", GIF, "image image/gif"),
    ("anthropic", WEBP, "image image/webp"),
    ("anthropic", PDF, "document application/pdf"),
    ("google", PNG, "image/png"),
    ("google", JPEG, "image/jpeg"),
    ("google", WEBP, "image/webp"),
    ("google", HEIC, "image/heic"),
    ("google", PDF, "application/pdf"),
    ("google", WAV, "audio/wav"),
    ("google", MP3, "audio/mp3"),
    ("ollama", PNG, ""),
    ("ollama", JPEG, ""),
    ("ollama", WEBP, ""),
]


@pytest.mark.parametrize(
    ("provider", "data", "kind"),
    WIRE,
    ids=[f"{p} {media.sniff(d)}" for p, d, _ in WIRE],
)
async def test_bytes_of_a_file_reach_the_provider(
    server: ProviderServer, tmp_path: Path, provider: str, data: bytes, kind: str
) -> None:
    """A local file arrives byte for byte, with the type that its bytes show."""
    (tmp_path / "unnamed").write_bytes(data)
    content = ["What is this?", Path("unnamed")]

    body = await sent(server, provider, content, base_dir=tmp_path)

    assert received(provider, body) == [(kind, data)]


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p != "openai"])
async def test_bytes_of_a_url_reach_the_provider(
    server: ProviderServer, provider: str
) -> None:
    """A provider that takes bytes gets those that a URL leads to."""
    content = ["What is this?", image(f"{server.origin}/image.png?token=abc")]
    settings = Settings(allow_private_urls=True, extra_headers={"x-secret": "s3cret"})

    body = await sent(server, provider, content, settings=settings)

    assert [data for _, data in received(provider, body)] == [PNG]
    assert set(server.requests[0].headers) == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "connection",
    }


async def test_openai_gets_a_picture_by_its_url(server: ProviderServer) -> None:
    """OpenAI fetches a picture itself, so nothing is fetched here."""
    url = "https://pictures.example/a%20cat.png?size=1&size=2#top"

    body = await sent(server, "openai", [image(url)])

    assert body["messages"][-1]["content"] == [image(url)]


async def test_openai_gets_the_bytes_of_a_pdf(server: ProviderServer) -> None:
    """OpenAI's chat endpoint does not take a PDF by URL: it gets the bytes and a name."""
    part = file(file_data=f"{server.origin}/file.pdf")

    got = await prepared(part, settings=PRIVATE)

    url = data_url("application/pdf", PDF)
    assert got == file(filename="file.pdf", file_data=url)


@pytest.mark.parametrize("provider", ["deepseek", "bedrock", "vertex", "groq"])
async def test_other_providers_get_a_data_url(
    server: ProviderServer, provider: str
) -> None:
    """A provider without rules gets the bytes in OpenAI's form."""
    part = image(f"{server.origin}/image.png")

    got = await prepared(part, provider, settings=PRIVATE)

    assert got == image(data_url("image/png", PNG))


EVIL = "http://evil.example/a.png"

# --- the forms of a part -------------------------------------------------------------

PNG_URL = data_url("image/png", PNG)
PDF_URL = data_url("application/pdf", PDF)
WAV_64 = base64.b64encode(WAV).decode()

FORMS: list[tuple[Any, Any]] = [
    ("Hello", {"type": "text", "text": "Hello"}),
    (Path("cat.png"), image(PNG_URL)),
    (Path("a.pdf"), file(filename="a.pdf", file_data=PDF_URL)),
    (Path("bell.wav"), sound(WAV_64)),
    (image(Path("cat.png")), image(PNG_URL)),
    ({"type": "image_url", "image_url": Path("cat.png")}, image(PNG_URL)),
    ({"type": "image_url", "image_url": PNG_URL}, image(PNG_URL)),
    (image(PNG_URL), image(PNG_URL)),
    (
        {"type": "image_url", "image_url": {"url": PNG_URL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": PNG_URL, "detail": "low"}},
    ),
    (
        image(Path("cat.png"), cache_control={"type": "ephemeral"}),
        image(PNG_URL, cache_control={"type": "ephemeral"}),
    ),
    (image("DATA:image/PNG;x=1;BASE64," + PNG_URL[22:]), image(PNG_URL)),
    (image(data_url("image/jpg", JPEG)), image(data_url("image/jpeg", JPEG))),
    (file(file=Path("a.pdf")), file(filename="a.pdf", file_data=PDF_URL)),
    (
        file(file_data=PDF_URL, filename="b.pdf", format="application/pdf"),
        file(filename="b.pdf", file_data=PDF_URL),
    ),
    (file(file_data=PDF_URL), file(filename="document.pdf", file_data=PDF_URL)),
    (file(file=Path("cat.png")), image(PNG_URL)),
    (file(file_id="file-123"), file(file_id="file-123")),
    (sound(WAV_64), sound(WAV_64)),
    (sound(Path("bell.wav")), sound(WAV_64)),
    (sound(data_url("audio/x-wav", WAV)), sound(WAV_64)),
    ({"type": "text", "text": "Hello"}, {"type": "text", "text": "Hello"}),
    ({"type": "thinking", "thinking": "Hm."}, {"type": "thinking", "thinking": "Hm."}),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a picture, a PDF and a sound, and a secret beside it."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "cat.png").write_bytes(PNG)
    (inside / "a.pdf").write_bytes(PDF)
    (inside / "bell.wav").write_bytes(WAV)
    (tmp_path / "secret.png").write_bytes(PNG)
    return inside


@pytest.mark.parametrize(("given", "expected"), FORMS)
async def test_form_of_a_part(folder: Path, given: Any, expected: Any) -> None:
    """Each form of a part becomes OpenAI's own; the caller's part is not changed."""
    before = copy.deepcopy(given)

    got = await prepared(given, base_dir=folder)

    assert got == expected
    assert given == before


async def test_plain_messages_come_back_as_they_are() -> None:
    """Messages of text or without content come back unchanged."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]

    got = await prepare(messages)

    assert [id(message) for message in got] == [id(message) for message in messages]


async def test_parts_are_copies() -> None:
    """Writing into a prepared part does not change the caller's part."""
    part = {"type": "file", "file": {"file_id": "file-123"}}
    messages = [{"role": "user", "content": [part]}]

    got = await prepare(messages)
    got[0]["content"][0]["file"]["filename"] = "written-by-litellm.pdf"

    assert messages == [
        {"role": "user", "content": [{"type": "file", "file": {"file_id": "file-123"}}]}
    ]


async def test_same_url_is_fetched_once(server: ProviderServer) -> None:
    """A picture that occurs twice in a conversation is fetched once."""
    part = image(f"{server.origin}/image.png")
    message = {"role": "user", "content": (part, part)}

    got = await prepare([message, message], "ollama", settings=PRIVATE)

    assert [m["content"] for m in got] == [[image(PNG_URL)] * 2] * 2
    assert len(server.requests) == 1


async def test_base_dir_of_the_settings_is_used(folder: Path) -> None:
    """A call without a base directory takes that of the settings."""
    got = await prepared(Path("cat.png"), settings=Settings(base_dir=folder))

    assert got == image(PNG_URL)


STORED = [
    file(file_id="https://generativelanguage.googleapis.com/v1beta/files/abc"),
    image("gs://bucket/cat.png"),
    file(file_id="gs://bucket/cat", format="image/png"),
]


@pytest.mark.parametrize("part", [*STORED, {**STORED[0], "cache_control": {}}])
async def test_google_keeps_its_own_files(part: dict[str, Any]) -> None:
    """The name of a file on Google's servers goes to Google unchanged; nothing is fetched."""
    assert await prepared({**part, "file_data": EVIL}, "google") == part


@pytest.mark.parametrize("part", STORED)
async def test_the_result_of_a_tool_takes_no_stored_file(part: dict[str, Any]) -> None:
    """It is refused: LiteLLM would fetch it for Google, or drop it."""
    with pytest.raises(InvalidRequestError, match="takes no stored file, only its"):
        await prepare(
            [{"role": "tool", "tool_call_id": "a", "content": [part]}], "google"
        )


def source(kind: str, **body: Any) -> dict[str, Any]:
    """Make a part in Anthropic's spelling."""
    return {"type": kind, "source": body, "cache_control": {"type": "ephemeral"}}


IN_64 = {"type": "base64", "media_type": "image/png", "data": PNG_URL[22:]}
PDF_64 = {"type": "base64", "media_type": "application/pdf", "data": PDF_URL[28:]}
KEPT = {"cache_control": {"type": "ephemeral"}}
SPELT: list[tuple[str, Any, Any]] = [
    ("google", source("image", **IN_64), image(PNG_URL, **KEPT)),
    ("anthropic", source("image", **IN_64), image(PNG_URL, **KEPT)),
    (
        "openai",
        source("image", type="url", url="https://pictures.example/a"),
        image("https://pictures.example/a", **KEPT),
    ),
    ("google", {"type": "input_image", "image_url": PNG_URL}, image(PNG_URL)),
    ("google", {"type": "input_image", "image_url": {"url": PNG_URL}}, image(PNG_URL)),
    (
        "google",
        {**source("document", **PDF_64), "title": "b.pdf"},
        {**file(filename="b.pdf", file_data=PDF_URL), **KEPT},
    ),
    (
        "openai",
        {"type": "input_file", "file_data": PDF_URL, "filename": "b.pdf"},
        file(filename="b.pdf", file_data=PDF_URL),
    ),
    ("openai", {"type": "input_file", "file_id": "file-1"}, file(file_id="file-1")),
    *[
        (provider, document, document)
        for provider, document in [
            ("anthropic", source("document", type="url", url="https://a.example/b")),
            ("anthropic", source("document", type="text", data="Words.")),
            ("bedrock", source("document", **PDF_64)),
            ("bedrock", source("document", type="text", data="Words.")),
        ]
    ],
]


@pytest.mark.parametrize(("provider", "given", "expected"), SPELT)
async def test_parts_as_other_interfaces_spell_them(
    provider: str, given: Any, expected: Any
) -> None:
    """Anthropic's spelling works for every provider; documents stay if they are read."""
    assert await prepared(given, provider) == expected


# --- what is not taken ---------------------------------------------------------------

NOT_TAKEN: list[tuple[str, Any, str]] = [
    ("openai", image(data_url("image/heic", HEIC)), "openai does not take image/heic"),
    ("openai", image(data_url("image/svg+xml", b"<svg/>")), "not take image/svg+xml"),
    ("openai", sound("T2dnUw==", "ogg"), "not take audio/ogg"),
    ("openai", file(file_data=data_url("text/plain", b"a")), "not take text/plain"),
    ("anthropic", sound(WAV_64), "not take audio/wav"),
    ("anthropic", file(file_data=data_url("audio/wav", WAV)), "not take audio/wav"),
    ("google", image(data_url("image/gif", GIF)), "not take image/gif"),
    ("google", file(file_id="gs://bucket/cat"), "needs a 'format'"),
    ("ollama", image(data_url("image/gif", GIF)), "not take image/gif"),
    ("ollama", file(file_data=PDF_URL), "not take application/pdf"),
    ("ollama", sound(WAV_64), "not take audio/wav"),
    ("ollama", file(file_id="file-123"), "ollama keeps no files"),
    ("openai", image(PDF_URL), "put a PDF into a 'file' part"),
    ("openai", image(data_url("audio/wav", WAV)), "its part takes image/…"),
    ("openai", sound(PNG_URL), "its part takes audio/…"),
    ("openai", image("data:image/png,abc"), "does not say base64"),
    ("openai", image("data:image/png;base64"), "does not say base64"),
    ("openai", image("data:;base64,AAAA"), "names no media type"),
    ("openai", image("data:image/png;base64,"), "it is empty"),
    ("openai", image("data:image/png;base64,AAA"), "base64 cannot be read"),
    ("openai", image("data:image/png;base64,AA=A"), "base64 cannot be read"),
    ("openai", image("data:image/png;base64,AA-_"), "base64 cannot be read"),
    ("openai", image("data:image/png;base64,AAAA\n"), "base64 cannot be read"),
    ("openai", image("data:image/png;base64,ÄÄÄÄ"), "base64 cannot be read"),
    ("openai", image("cat.png"), "give a local file as a pathlib.Path"),
    ("openai", image("/etc/passwd"), "give a local file as a pathlib.Path"),
    ("openai", image("file:///etc/passwd"), "neither a data: nor an https: URL"),
    ("openai", image(""), "'image_url' holds no data"),
    ("openai", image(None), "'image_url' holds no data"),
    ("openai", {"type": "image_url"}, "has no 'image_url'"),
    ("openai", file(filename="a.pdf"), "'file' holds no data"),
    ("openai", {"type": "input_audio", "input_audio": {"data": "AA"}}, "no format"),
    ("google", source("document", type="text", data="a"), "neither base64 nor a URL"),
    ("anthropic", source("image", type="file", file_id="a"), "neither base64 nor a"),
    ("anthropic", {"type": "image"}, "the source of its 'image' is neither"),
    ("bedrock", source("document", type="url", url="http://a.example"), "only https:"),
    ("openai", {"type": "input_image", "file_id": "file-1"}, "has no 'image_url'"),
    ("anthropic", {"type": "tool_result", "content": []}, "of the role tool"),
    ("openai", file(file_data=PDF_URL, file_id="a"), "holds file_data and file_id"),
    ("openai", file(file_id="www.evil.example/a.pdf"), "neither a data: nor an https:"),
    ("google", image("gs://bucket/cat.png/"), "needs a 'format'"),
    ("google", file(file_id="gs://bucket/cat", format=["a"]), "needs a 'format'"),
    ("google", file(file_id="gs://bucket/cat.png/."), "needs a 'format'"),
    ("google", sound("gs://bucket/bell.wav"), "only https: URLs are fetched"),
    ("openai", PNG, "cannot be of type bytes"),
    ("openai", None, "cannot be of type NoneType"),
]


@pytest.mark.parametrize(("provider", "part", "reason"), NOT_TAKEN)
async def test_part_that_is_not_taken(provider: str, part: Any, reason: str) -> None:
    """A part that a provider would drop or refuse is an error with its place and reason."""
    message = await refused(part, provider)

    assert message.startswith("message 0, part 0: ")
    assert reason in message


async def test_error_holds_none_of_the_data() -> None:
    """The error for a large data: URL does not repeat it."""
    message = await refused(image("data:image/png;base64," + "A" * 5001))

    assert "AAAA" not in message


async def test_too_many_parts() -> None:
    """More media than the limit are refused at once."""
    message = {"role": "user", "content": [image(PNG_URL)] * (media.MAX_PARTS + 1)}

    with pytest.raises(InvalidRequestError, match="more than 100"):
        await prepare([message])


async def test_too_large_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Media that are too large together are refused, each being small enough."""
    monkeypatch.setattr(media, "MAX_TOTAL_BYTES", 3 * len(PNG))
    message = {"role": "user", "content": [image(PNG_URL)] * 4}

    with pytest.raises(InvalidRequestError, match="with it the pictures and files"):
        await prepare([message])


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_data_url_of_the_largest_size(provider: str) -> None:
    """A file of exactly the limit is taken; a larger one is refused."""
    largest = data_url("image/png", bytes(media.MAX_BYTES))
    larger = data_url("image/png", bytes(media.MAX_BYTES + 3))

    got = await prepared(image(largest), provider)
    reason = await refused(image(larger), provider)

    assert got == image(largest)
    assert f"larger than {media.MAX_BYTES} bytes" in reason


async def test_bad_base64_far_inside() -> None:
    """Padding in the middle of a large data: URL is found."""
    url = data_url("image/png", bytes(4 * 1024 * 1024))
    at = url.index(",") + 1 + 1024 * 1024
    broken = url[: at - 4] + "AAA=" + url[at:]

    assert "base64 cannot be read" in await refused(image(broken))


@pytest.mark.parametrize("local", [True, False])
async def test_large_picture_does_not_hold_up_the_loop(
    tmp_path: Path, *, local: bool
) -> None:
    """Other tasks run while a large picture is read, checked and written as base64."""
    data = PNG + bytes(media.MAX_BYTES - len(PNG))
    (tmp_path / "a.png").write_bytes(data)
    source = Path("a.png") if local else data_url("image/png", data)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    await prepared(image(source), "anthropic", base_dir=tmp_path)
    ticking.cancel()

    assert ticks > 20


# --- local files ---------------------------------------------------------------------


def outside(path: Path) -> None:
    """Do nothing: the path leads outside as it stands."""


def link_to_secret(path: Path) -> None:
    """Make a link to a file outside."""
    path.symlink_to("../secret.png")


def link_to_folder(path: Path) -> None:
    """Make a link to the folder outside."""
    path.parent.symlink_to("..", target_is_directory=True)


def link_to_itself(path: Path) -> None:
    """Make a link that leads nowhere."""
    path.symlink_to(path.name)


def text(path: Path) -> None:
    """Write text into a file with the name of a picture."""
    path.write_bytes(b"API_KEY=secret")


def large(path: Path) -> None:
    """Write a sparse file that is one byte too large."""
    path.write_bytes(PNG)
    os.truncate(path, media.MAX_BYTES + 1)


JAIL: list[tuple[str, Callable[[Path], Any], str]] = [
    ("../secret.png", outside, "outside the base directory"),
    ("x/../../secret.png", outside, "outside the base directory"),
    ("/etc/passwd", outside, "outside the base directory"),
    ("link.png", link_to_secret, "outside the base directory"),
    ("up/secret.png", link_to_folder, "outside the base directory"),
    ("loop.png", link_to_itself, "link"),
    ("no.png", outside, "No such file"),
    ("folder.png", Path.mkdir, "a directory"),
    ("pipe.png", os.mkfifo, "not a regular file"),
    ("nul\0.png", outside, "null"),
    ("~nobody-of-that-name/x.png", outside, "home directory"),
    ("cat.png/x.png", outside, "Not a directory"),
    ("text.png", text, "not a picture, PDF or sound"),
    ("large.png", large, "larger than 20971520 bytes"),
]


@pytest.mark.parametrize(("name", "make", "reason"), JAIL)
async def test_file_that_is_not_read(
    folder: Path, name: str, make: Callable[[Path], Any], reason: str
) -> None:
    """A file outside the folder, or without a picture in it, is refused by name."""
    if make is not outside:
        make(folder / name)

    message = await refused(Path(name), base_dir=folder)

    assert repr(name) in message
    assert reason in message


async def test_link_inside_the_folder_is_followed(folder: Path) -> None:
    """A link that stays inside the folder is followed."""
    (folder / "link.png").symlink_to("cat.png")

    assert await prepared(Path("link.png"), base_dir=folder) == image(PNG_URL)


async def test_file_outside_when_that_is_allowed(folder: Path) -> None:
    """The application may let files lie anywhere."""
    path = folder.parent / "secret.png"

    got = await prepared(path, base_dir=folder, allow_outside_base_dir=True)

    assert got == image(PNG_URL)


# --- URLs that are not fetched -------------------------------------------------------


class Names:
    """Stands in for the DNS."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.looked_up: list[str] = []

    def getaddrinfo(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        """Stand in for the function of `socket`."""
        addresses = [host]
        if not host[:1].isdigit():
            self.looked_up.append(host)
            addresses = self.addresses.get(host, [])
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Replace the DNS by a few names."""
    known = Names()
    monkeypatch.setattr(socket, "getaddrinfo", known.getaddrinfo)
    return known


NEVER = [
    "http://pictures.example/a.png",
    "ftp://pictures.example/a.png",
    "https:///a.png",
    "https://",
    "https://[::1/a.png",
    "https://pictures.example:99999/a.png",
    "https://user:pass@pictures.example/a.png",
    "https://user@pictures.example/a.png",
    "https://pictures.example@127.0.0.1/a.png",
    "https://127.0.0.1\\@pictures.example/a.png",
    "https://localhost/a.png",
    "https://localhost./a.png",
    "https://LOCALHOST/a.png",
    "https://app.localhost/a.png",
    "https://metadata/a.png",
    "https://metadata.google.internal/a.png",
    "https://printer.local./a.png",
    "https://router.home.arpa/a.png",
    "https://127.0.0.1/a.png",
    "https://127.0.0.1./a.png",
    "https://127.1/a.png",
    "https://0x7f.1/a.png",
    "https://0x7f000001/a.png",
    "https://0177.0.0.1/a.png",
    "https://2130706433/a.png",
    "https://127.0.0.0x1/a.png",
    "https://%31%32%37.0.0.1/a.png",
    "https://\uff11\uff12\uff17.0.0.1/a.png",
    "https://\u2460\u2461\u2466.0.0.1/a.png",
    "https://localhost\u3002/a.png",
    "https://127.0.0.1%00.example/a.png",
    "https://pictures .example/a.png",
    "https://0.0.0.0/a.png",
    "https://10.1.2.3/a.png",
    "https://100.64.0.1/a.png",
    "https://169.254.169.254/latest/meta-data",
    "https://172.31.255.255/a.png",
    "https://192.168.0.1/a.png",
    "https://224.0.0.1/a.png",
    "https://255.255.255.255/a.png",
    "https://168.63.129.16/a.png",
    "https://[::]/a.png",
    "https://[::1]/a.png",
    "https://[fe80::1%25eth0]/a.png",
    "https://[2606:4700::1111%25eth0]/a.png",
    "https://[fd00:ec2::254]/a.png",
    "https://[ff02::1]/a.png",
    "https://[::ffff:127.0.0.1]/a.png",
    "https://[::ffff:7f00:1]/a.png",
    "https://[::127.0.0.1]/a.png",
    "https://[64:ff9b::7f00:1]/a.png",
    "https://[64:ff9b:1::a00:1]/a.png",
    "https://[2002:7f00:1::]/a.png",
    "https://[2001:0:7f00:1::]/a.png",
    "https://[2001:db8::1]/a.png",
]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("url", NEVER)
async def test_url_that_is_refused_by_its_text(
    names: Names, provider: str, url: str
) -> None:
    """A URL that is not public and https is refused before any look-up."""
    message = await refused(image(url), provider)

    assert "URL" in message
    assert names.looked_up == []


PUBLIC = [
    "https://pictures.example/a.png",
    "https://pictures.example./a.png",
    "https://PICTURES.example:8443/a.png",
    "https://a_b.pictures.example/a.png",
    "https://bücher.example/a.png",
    "https://8.8.8.8/a.png",
    "https://172.32.0.1/a.png",
    "https://100.128.0.1/a.png",
    "https://[2606:4700::1111]/a.png",
    "https://[64:ff9b::808:808]/a.png",
    "https://[::ffff:8.8.8.8]/a.png",
    "https://pictures.example/@127.0.0.1?u=http://10.0.0.1#@localhost",
]


@pytest.mark.parametrize("url", PUBLIC)
async def test_public_url_is_handed_on(url: str) -> None:
    """A URL of the public internet is taken in any spelling."""
    assert await prepared(image(url)) == image(url)


BEHIND_NAMES = [
    ["127.0.0.1"],
    ["10.0.0.1"],
    ["172.16.0.1"],
    ["192.168.1.1"],
    ["169.254.169.254"],
    ["100.100.100.200"],
    ["0.0.0.0"],
    ["192.0.0.8"],
    ["198.18.0.1"],
    ["224.0.0.251"],
    ["240.0.0.1"],
    ["::1"],
    ["::"],
    ["fe80::1"],
    ["fc00::1"],
    ["ff02::1"],
    ["::ffff:127.0.0.1"],
    ["64:ff9b::a9fe:a9fe"],
    ["2002:a00:1::1"],
    ["2001:0:0:0:0:0:f5ff:fffe"],
    ["93.184.215.14", "127.0.0.1"],
]


@pytest.mark.parametrize("addresses", BEHIND_NAMES)
async def test_name_that_leads_to_a_private_address(
    server: ProviderServer, names: Names, addresses: list[str]
) -> None:
    """A public name with a private address behind it is not connected to."""
    names.addresses["pictures.example"] = addresses
    url = f"https://pictures.example:{server.port}/image.png?token=s3cret"

    message = await refused(image(url), "google")

    assert "the URL at pictures.example cannot be used" in message
    assert "not on the public internet" in message
    assert "s3cret" not in message
    assert server.connections == 0


async def test_unknown_name(names: Names) -> None:
    """The error for a name that cannot be resolved holds the name."""
    message = await refused(image("https://pictures.example/a.png"), "google")

    assert "the URL at pictures.example cannot be used: its name cannot" in message


@pytest.mark.parametrize("path", ["anything", "v1beta/files", "v1/files/abc", ""])
async def test_another_url_of_google_is_fetched_like_any_url(
    names: Names, path: str
) -> None:
    """LiteLLM would fetch it outside the fence, on the event loop."""
    url = f"https://generativelanguage.googleapis.com/{path}"

    message = await refused(image(url), "google")

    assert "the URL at generativelanguage.googleapis.com cannot be used" in message
    assert names.looked_up == ["generativelanguage.googleapis.com"]


def evil(kind: str) -> dict[str, Any]:
    """Make an Anthropic part with a URL."""
    return {"type": kind, "source": {"type": "url", "url": EVIL}}


PAST_US: list[tuple[str, dict[str, Any]]] = [
    ("assistant", {"images": [{"image_url": {"url": EVIL}}]}),
    *[
        (role, {"content": [{"type": "text", "text": "b"}, part]})
        for role in ("user", "assistant", "tool")
        for part in (
            file(file_data="gs://bucket/a.png", file_id=EVIL),
            file(file_id="gs://bucket/a.png", file_data=EVIL),
            file(file_data=PNG_URL) | {"image_url": {"url": EVIL}},
            file(file_data=PNG_URL) | {"file_data": EVIL},
            file(file_id="file-123") | {"file_data": EVIL},
            {"type": "input_image", "image_url": EVIL},
            {"type": "input_file", "file_data": EVIL},
            {"type": "text", "text": "c", "image_url": EVIL},
            {"type": "tool_result", "content": [image(EVIL, detail="high")]},
            image("gs://bucket/a.png/"),
            evil("image"),
            evil("document"),
        )
    ],
]


@pytest.mark.parametrize("engine", ["direct", "litellm"])
@pytest.mark.parametrize("provider", ["google", "anthropic", "ollama"])
async def test_litellm_looks_nothing_up(
    server: ProviderServer,
    keys: StaticAPIKeys,
    names: Names,
    provider: str,
    engine: Any,
) -> None:
    """A URL that LiteLLM would fetch by itself is refused, or does not reach it."""
    server.rules = False  # its URLs are bait
    settings = Settings(engine=engine, max_retries=0)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    async with LLMInfraService(keys, settings=settings) as service:
        for role, what in PAST_US:
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "a", "content": "c"},
                {"role": role, "content": "b", **what},
                {"role": "user", "content": "d"},
            ]
            if role == "tool":
                del messages[2]
                messages[2]["tool_call_id"] = "a"
            # Since 1.109 LiteLLM refuses an image that is kept under an id, by itself.
            with suppress(InvalidRequestError, LLMServiceError):
                await service.complete(messages, MODELS[provider], provider)

            assert (names.looked_up, role, what) == ([], role, what)

    assert {asked.method for asked in server.requests} == {"POST"}


# --- fetching ------------------------------------------------------------------------


def answer(
    body: bytes = PNG, kind: str = "image/png", status: int = 200, **headers: str
) -> bytes:
    """Write an HTTP answer."""
    given = {"content-type": kind, "content-length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
    return f"HTTP/1.1 {status} Fine\r\n{lines}\r\n".encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    """Write a redirect that tries to leave a cookie."""
    return answer(
        b"", status=status, location=location, set_cookie="a=b; path=/", kind=""
    )


Page = bytes | Callable[[], Awaitable[bytes]] | None


class Site:
    """A web site on loopback that closes each connection after an answer.

    Args:
        pages: A request's target to the bytes of an answer; None for never answering.
        tls: Makes it an https site.
    """

    def __init__(
        self, pages: Mapping[str, Page], tls: ssl.SSLContext | None = None
    ) -> None:
        self.pages = dict(pages)
        self.asked: list[str] = []
        """The heads of the requests."""
        self.arrived = asyncio.Event()
        """Set by the first request."""
        self.connections = 0
        self.left = asyncio.Event()
        """Set when a client has closed its connection before the answer."""
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            await self._answer(reader, writer)
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        self.arrived.set()
        page = self.pages[head.split()[1]]
        if page is None:
            await reader.read()
            self.left.set()
            return
        writer.write(page if isinstance(page, bytes) else await page())
        await writer.drain()


BAD_ANSWERS: list[tuple[bytes, str]] = [
    (answer(status=404), "it answered 404"),
    (answer(status=500), "it answered 500"),
    (answer(kind="text/html"), "it answered text/html"),
    (answer(kind="application/octet-stream"), "it answered application/octet-stream"),
    (answer(PDF, "application/pdf"), "it answered application/pdf"),
    (answer(kind=""), "it answered no media type"),
    (answer(b"<html>"), "its bytes are not image/png"),
    (answer(PDF), "its bytes are not image/png"),
    (answer(b""), "its bytes are not image/png"),
    (answer(b"<svg/>", "image/svg+xml"), "its bytes are not image/svg+xml"),
    (answer(content_encoding="gzip"), "a compressed body"),
    (answer(content_length="900000000"), "larger than 20971520 bytes"),
    (answer(content_length="99999"), "the connection failed"),
    (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "the connection failed"),
    (b"", "the connection failed"),
    (redirect(""), "more than 3 redirects"),
    (redirect("https://[::1/"), "it redirects to an invalid URL"),
    (redirect("ftp://pictures.example/"), "it redirects: the URL at pictures.example"),
    (redirect("http://a:b@127.0.0.1/"), "it carries a user name"),
    (redirect("/again?s3cret"), "more than 3 redirects"),
]


@pytest.mark.parametrize(
    ("page", "reason"),
    BAD_ANSWERS,
    ids=[f"{i} {bad[1]}" for i, bad in enumerate(BAD_ANSWERS)],
)
async def test_answer_that_is_not_the_picture(page: bytes, reason: str) -> None:
    """Any other answer than a picture is an error with the host and the reason."""
    async with Site({"/a.png?s3cret": page, "/again?s3cret": page}) as site:
        part = image(f"{site.origin}/a.png?s3cret")
        message = await refused(part, "anthropic", settings=PRIVATE)

    assert message.startswith("message 0, part 0: the URL at 127.0.0.1 cannot be used")
    assert reason in message
    assert "s3cret" not in message


async def test_binary_file_is_refused_by_its_type(server: ProviderServer) -> None:
    """A body of another type than picture, PDF or sound is refused before it is read."""
    message = await refused(
        file(file_data=f"{server.origin}/huge.bin"), settings=PRIVATE
    )

    assert "it answered application/octet-stream" in message


async def test_endless_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of unknown length is read as far as the limit and no further."""
    monkeypatch.setattr(media, "MAX_BYTES", 100_000)
    head = answer(b"", content_length="", transfer_encoding="chunked")
    chunk = b"8000\r\n" + (PNG + bytes(0x8000))[:0x8000] + b"\r\n"

    async with Site({"/a.png": head + chunk * 64}) as site:
        part = image(f"{site.origin}/a.png")
        message = await refused(part, "anthropic", settings=PRIVATE)

    assert "it is larger than 100000 bytes" in message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(status: int) -> None:
    """Redirects are followed up to the limit; their cookies are not kept."""
    pages: dict[str, Page] = {
        "/1": redirect("/2", status),
        "/2": redirect("3?x=1", status),
        "/4": answer(),
    }
    async with Site(pages) as site:
        site.pages["/3?x=1"] = redirect(f"{site.origin}/4", status)
        got = await prepared(image(f"{site.origin}/1"), "ollama", settings=PRIVATE)

    assert got == image(PNG_URL)
    assert [head.split()[1] for head in site.asked] == ["/1", "/2", "/3?x=1", "/4"]
    assert "cookie" not in "".join(site.asked).lower()


async def test_one_redirect_too_many() -> None:
    """A picture behind too many redirects is not fetched."""
    pages: dict[str, Page] = {f"/{n}": redirect(f"/{n + 1}") for n in range(1, 5)}

    async with Site({**pages, "/5": answer()}) as site:
        message = await refused(image(f"{site.origin}/1"), "ollama", settings=PRIVATE)

    assert "there are more than 3 redirects" in message


@pytest.mark.parametrize(
    ("name", "kind"), [("wav", "audio/x-wav"), ("mp3", "audio/mpeg")]
)
async def test_sound_by_url(name: str, kind: str) -> None:
    """A sound may be given by URL, in an audio part as in a file part."""
    data = {"wav": WAV, "mp3": MP3}[name]
    async with Site({"/bell": answer(data, kind)}) as site:
        settings = PRIVATE
        got = await prepared(sound(f"{site.origin}/bell"), "google", settings=settings)
        same = await prepared(
            file(file_data=f"{site.origin}/bell"), "google", settings=settings
        )

    assert got == same == sound(base64.b64encode(data).decode(), name)


async def test_type_is_told_by_the_bytes() -> None:
    """A picture with a wrong label is sent with the type that its bytes show."""
    async with Site({"/a.png": answer(JPEG, "image/png; charset=binary")}) as site:
        part = image(f"{site.origin}/a.png")
        got = await prepared(part, "anthropic", settings=PRIVATE)

    assert got == image(data_url("image/jpeg", JPEG))


async def test_password_files_are_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A .netrc entry for the host is not sent."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(netrc))

    async with Site({"/a.png": answer()}) as site:
        await prepared(image(f"{site.origin}/a.png"), "google", settings=PRIVATE)

    assert "authorization" not in site.asked[0].lower()


async def test_slow_site_does_not_hold_up_the_loop() -> None:
    """Other tasks run during a fetch: here one that the answer waits for."""
    ticked = asyncio.Event()

    async def when_ticked() -> bytes:
        await ticked.wait()
        return answer()

    async def tick() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        ticked.set()

    async with Site({"/a.png": when_ticked}) as site:
        part = image(f"{site.origin}/a.png")
        fetching = asyncio.create_task(prepared(part, "google", settings=PRIVATE))
        await tick()
        got = await asyncio.wait_for(fetching, 20)

    assert got == image(PNG_URL)


async def test_cancelling_closes_the_connection() -> None:
    """A cancelled call leaves no connection behind."""
    async with Site({"/a.png": None}) as site:
        part = image(f"{site.origin}/a.png")
        fetching = asyncio.create_task(prepared(part, "google", settings=PRIVATE))
        await asyncio.wait_for(site.arrived.wait(), 20)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await asyncio.wait_for(site.left.wait(), 20)


async def test_first_failure_ends_the_others() -> None:
    """If one of several pictures fails, the others are not waited for."""
    async with Site({"/slow.png": None, "/bad.png": answer(status=404)}) as site:
        content = [image(f"{site.origin}/{name}.png") for name in ("slow", "bad")]
        with pytest.raises(InvalidRequestError, match=r"part 1: .* it answered 404"):
            await asyncio.wait_for(
                prepare(
                    [{"role": "user", "content": content}],
                    "google",
                    settings=PRIVATE,
                ),
                20,
            )
        await asyncio.wait_for(site.left.wait(), 20)


async def test_silent_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that does not answer in time is an error with the limit."""
    monkeypatch.setattr(fetch, "FETCH_TIMEOUT", 0.2)

    async with Site({"/a.png": None}) as site:
        part = image(f"{site.origin}/a.png")
        message = await refused(part, "google", settings=PRIVATE)

    assert "it was not read within 0.2 s" in message


# --- the public internet, as far as loopback can stand for it ------------------------


@pytest.fixture
def public_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat 127.0.0.0/8 as public."""
    is_public = fetch.is_public
    monkeypatch.setattr(
        fetch,
        "is_public",
        lambda address: address.startswith("127.") or is_public(address),
    )


@pytest.fixture
async def site(authority: Authority, names: Names) -> AsyncIterator[Site]:
    """Run an https site that is pictures.example and other.example."""
    names.addresses["pictures.example"] = ["127.0.0.1"]
    names.addresses["other.example"] = ["127.0.0.1"]
    async with Site({"/a.png": answer()}, authority.server) as running:
        yield running


@pytest.mark.usefixtures("public_loopback")
async def test_picture_over_https(
    site: Site, authority: Authority, names: Names
) -> None:
    """An https URL is fetched; its name is looked up once, so its address cannot change."""
    url = f"https://pictures.example:{site.port}/a.png"

    got = await prepared(
        image(url), "google", settings=Settings(ca_bundle=authority.file)
    )

    assert got == image(PNG_URL)
    assert names.looked_up == ["pictures.example"]


@pytest.mark.usefixtures("public_loopback")
async def test_a_cookie_is_not_kept(site: Site, authority: Authority) -> None:
    """Neither over a redirect nor for the next picture.

    By name: a client that keeps cookies takes none from an address.
    """
    site.pages["/hop"] = redirect("/a.png")
    url = f"https://pictures.example:{site.port}/hop"

    for _ in range(2):
        await prepared(
            image(url), "google", settings=Settings(ca_bundle=authority.file)
        )

    assert len(site.asked) == 4
    assert "cookie" not in "".join(site.asked).lower()


@pytest.mark.usefixtures("public_loopback")
async def test_untrusted_certificate(site: Site) -> None:
    """A site with an untrusted certificate is refused."""
    url = f"https://pictures.example:{site.port}/a.png"

    message = await refused(image(url), "google")

    assert "there is no trusted connection to it" in message


HOPS = [
    ("https://10.0.0.1/a.png", "the URL at 10.0.0.1 cannot be used: it is not on"),
    ("https://[::1]/a.png", "the URL at ::1 cannot be used: it is not on"),
    ("https://metadata.google.internal/", "cannot be used: it is not on"),
    ("https://private.example/a.png", "private.example cannot be used: it is not on"),
    ("http://other.example/a.png", "cannot be used: only https: URLs are fetched"),
    ("//user@other.example/a.png", "it carries a user name or password"),
    ("file:///etc/passwd", "only https: URLs are fetched"),
]


@pytest.mark.usefixtures("public_loopback")
@pytest.mark.parametrize(("location", "reason"), HOPS)
async def test_redirect_off_the_public_internet(
    site: Site, authority: Authority, names: Names, location: str, reason: str
) -> None:
    """Every hop is checked as the first one is."""
    names.addresses["private.example"] = ["10.0.0.1"]
    site.pages["/hop"] = redirect(location)
    url = f"https://pictures.example:{site.port}/hop"

    message = await refused(
        image(url), "google", settings=Settings(ca_bundle=authority.file)
    )

    assert reason in message
    assert len(site.asked) == 1


@pytest.mark.usefixtures("public_loopback")
async def test_redirect_to_another_public_site(
    site: Site, authority: Authority
) -> None:
    """A redirect to another public https site is followed."""
    site.pages["/hop"] = redirect(f"https://other.example:{site.port}/a.png")
    url = f"https://pictures.example:{site.port}/hop"

    got = await prepared(
        image(url), "google", settings=Settings(ca_bundle=authority.file)
    )

    assert got == image(PNG_URL)


async def test_proxy_is_used() -> None:
    """A fetch goes through the proxy that calls go through."""
    url = "http://pictures.example/a.png"

    async with Site({url: answer()}) as proxy:
        settings = Settings(
            allow_private_urls=True, proxy=f"http://me:pass@127.0.0.1:{proxy.port}"
        )
        got = await prepared(image(url), "google", settings=settings)

    assert got == image(PNG_URL)
    assert "host: pictures.example" in proxy.asked[0].lower()


async def test_private_name_behind_a_proxy(names: Names) -> None:
    """A name with a private address is refused, whatever the proxy would do."""
    names.addresses["private.example"] = ["10.0.0.1"]

    async with Site({}) as proxy:
        settings = Settings(proxy=proxy.origin)
        url = "https://private.example/a.png"
        message = await refused(image(url), "google", settings=settings)

    assert "it is not on the public internet" in message
    assert proxy.connections == 0


async def test_unknown_name_is_left_to_a_proxy(names: Names) -> None:
    """A name that only a proxy can resolve goes to the proxy, which may be private."""
    names.addresses["proxy.corp.example"] = ["127.0.0.1"]
    target = "pictures.example:443"

    async with Site({target: answer(b"", status=403)}) as proxy:
        settings = Settings(proxy=f"http://proxy.corp.example:{proxy.port}")
        url = "https://pictures.example/a.png"
        message = await refused(image(url), "google", settings=settings)

    assert [head.split()[:2] for head in proxy.asked] == [["CONNECT", target]]
    assert "the connection failed (ClientHttpProxyError)" in message


# --- bytes ---------------------------------------------------------------------------

SNIFFED = [
    (PNG, "image/png"),
    (JPEG, "image/jpeg"),
    (GIF, "image/gif"),
    (b"GIF87a", "image/gif"),
    (WEBP, "image/webp"),
    (HEIC, "image/heic"),
    (b"\0\0\0\x18ftypmif1", "image/heif"),
    (b"\0\0\0\x18ftypisom", None),
    (PDF, "application/pdf"),
    (b"\r\n%PDF-1.7", "application/pdf"),
    (WAV, "audio/wav"),
    (b"RIFF\0\0\0\0AVI ", None),
    (MP3, "audio/mp3"),
    (b"\xff\xfb\x90\x00", "audio/mp3"),
    (b"\xff\xf1\x50\x80", "audio/aac"),
    (b"fLaC\0\0\0\x22", "audio/flac"),
    (b"OggS\0\x02", "audio/ogg"),
    (b"FORM\0\0\0\0AIFF", "audio/aiff"),
    (b"\xff\xfe<\0h\0", None),
    (b"\x7fELF", None),
    (b"<html>%PDF-1.7", None),
    (b"", None),
]


@pytest.mark.parametrize(
    ("data", "expected"), SNIFFED, ids=[data[:16].hex() for data, _ in SNIFFED]
)
def test_media_type_of_bytes(data: bytes, expected: str | None) -> None:
    """The first bytes tell what a file is."""
    assert media.sniff(data) == expected
