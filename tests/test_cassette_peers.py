"""Cassettes of vcrpy and pytest-recording here, and ours there."""

import asyncio
import gzip
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import httpx2
import pytest
import requests
import vcr
import yaml

from dipeo_llm.testing import CassetteMismatchError, use_cassette
from tests.provider_server import ProviderServer, Raw


def files_in(folder: Path) -> list[Path]:
    """List the files of a folder."""
    return list(folder.iterdir())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "JSON": {"serializer": "json", "decode_compressed_response": True},
    "decoded": {"decode_compressed_response": True},
    "filtered": {
        "filter_headers": ["authorization"],
        "filter_query_parameters": ["key", ("sig", "REDACTED")],
    },
    "hooks": {
        "before_record_request": lambda request: request,
        "before_record_response": lambda response: {**response, "extra": 1},
    },
    "repeats": {"allow_playback_repeats": True},
}


async def by_httpx(url: str, body: Any, module: Any = httpx) -> Any:
    """Ask by httpx, or httpx2."""
    async with module.AsyncClient(trust_env=False) as client:
        return (await client.post(url, json=body)).json()


async def by_aiohttp(url: str, body: Any) -> Any:
    """Ask by aiohttp."""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as got:
        return await got.json()


async def by_requests(url: str, body: Any) -> Any:
    """Ask by requests."""
    return await asyncio.to_thread(
        lambda: requests.post(url, json=body, timeout=20).json()
    )


CLIENTS = {
    "httpx": by_httpx,
    "httpx2": lambda url, body: by_httpx(url, body, httpx2),
    "aiohttp": by_aiohttp,
    "requests": by_requests,
}
each_client = pytest.mark.parametrize("client", CLIENTS)


@each_client
@pytest.mark.parametrize("options", OPTIONS)
async def test_a_cassette_of_vcrpy_replays_here(
    tmp_path: Path, client: str, options: str
) -> None:
    """Whatever options it was recorded with, and the answer compressed."""
    given = OPTIONS[options]
    path = tmp_path / ("test.json" if "serializer" in given else "test.yaml")
    packed = gzip.compress(b'{"a": 1}')
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions?key=abc&sig=def&alt=sse"
        server.reply(Raw(headers={"content-encoding": "gzip"}, body=packed))
        with vcr.VCR(record_mode="once").use_cassette(str(path), **given):
            await CLIENTS[client](url, {"n": 1})
    with use_cassette(path):
        assert await CLIENTS[client](url, {"n": 1}) == {"a": 1}


@each_client
@pytest.mark.parametrize("by", CLIENTS)
async def test_one_of_ours_replays_in_vcrpy(
    tmp_path: Path, client: str, by: str
) -> None:
    """Recorded by any client, replayed by any."""
    path = tmp_path / "test.yaml"
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(Raw(body=b'{"a": 1}'))
        with use_cassette(path, record="once"):
            await CLIENTS[by](url, {"n": 1})
    with vcr.VCR(record_mode="none").use_cassette(str(path)) as cassette:
        assert await CLIENTS[client](url, {"n": 1}) == {"a": 1}

    assert cassette.all_played


async def test_vcrpy_gets_a_status_for_a_failed_connection(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    """It has no form for an error; 599 is the best that it can read."""
    path = tmp_path / "test.yaml"
    url = f"http://127.0.0.1:{unused_tcp_port}/"
    with use_cassette(path, record="once"), pytest.raises(httpx.ConnectError):
        await by_httpx(url, {})
    with vcr.VCR(record_mode="none").use_cassette(str(path)):
        async with httpx.AsyncClient(trust_env=False) as client:
            got = await client.post(url, json={})

    assert got.status_code == 599


@pytest.mark.parametrize(
    ("data", "kept"),
    [({"a": "1"}, {"a": "1"}), ([("a", "1"), ("a", "2")], [["a", "1"], ["a", "2"]])],
    ids=["a dictionary", "pairs"],
)
async def test_a_form_that_vcrpy_kept_as_objects_replays(
    tmp_path: Path, data: Any, kept: Any
) -> None:
    """In place of the bytes it keeps what the program gave to aiohttp."""
    path = tmp_path / "test.yaml"
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(Raw(body=b"{}"))
        with vcr.VCR(record_mode="once").use_cassette(str(path)):
            async with aiohttp.ClientSession() as session:
                await session.post(url, data=data)
    text = await asyncio.to_thread(path.read_text, "utf-8")
    written = yaml.safe_load(text.replace("!!python/tuple", ""))
    with use_cassette(path):
        async with aiohttp.ClientSession() as session:
            assert (await session.post(url, data=data)).status == 200

    assert written["interactions"][0]["request"]["body"] == kept


def test_the_old_form_of_vcrpys_httpx_replays(tmp_path: Path) -> None:
    """Versions before 6 kept the status and the text in fields of other names."""
    path = tmp_path / "test.yaml"
    response = {
        "status_code": 200,
        "http_version": "HTTP/1.1",
        "headers": {"content-type": "application/json"},
        "content": '{"a": 1}',
    }
    request = {"method": "GET", "uri": "https://host/x", "body": "", "headers": {}}
    interactions = [{"request": request, "response": response}]
    path.write_text(yaml.safe_dump({"interactions": interactions, "version": 1}))

    with use_cassette(path):
        assert httpx.get("https://host/x").json() == {"a": 1}


async def test_redirects_that_vcrpy_followed_in_aiohttp_are_followed(
    tmp_path: Path,
) -> None:
    """Each step is an exchange of its own; the response knows its history."""
    path = tmp_path / "test.yaml"
    async with ProviderServer(strict=False) as server:
        first = f"{server.base_url('openai')}/chat/completions"
        then = f"{server.base_url('openai')}/models"
        headers = {"location": then}
        for record in (vcr.VCR(record_mode="once").use_cassette, None):
            place = tmp_path / ("ours.yaml" if record is None else path.name)
            server.reply(Raw(status=303, headers=headers))
            with (
                record(str(place))
                if record is not None
                else use_cassette(place, record="once")
            ):
                async with aiohttp.ClientSession() as session:
                    await (await session.post(first, json={})).read()
    for place in (path, tmp_path / "ours.yaml"):
        with use_cassette(place):
            async with aiohttp.ClientSession() as session:
                got = await session.post(first, json={})

        assert str(got.url) == then
        assert [step.status for step in got.history] == [303]


async def test_repeats_can_be_allowed_as_in_vcrpy(tmp_path: Path) -> None:
    """One exchange then answers any number of requests."""
    path = tmp_path / "test.yaml"
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(Raw(body=b'{"a": 1}'))
        with use_cassette(path, record="once"):
            await by_httpx(url, {})
    with use_cassette(path, allow_playback_repeats=True):
        for _ in range(3):
            assert await by_httpx(url, {}) == {"a": 1}
    with use_cassette(path) as cassette:
        await by_httpx(url, {})
        with pytest.raises(CassetteMismatchError):
            await by_httpx(url, {})
        cassette.mismatches.clear()


# --- hooks ---------------------------------------------------------------------------


async def test_hooks_change_what_is_compared_and_kept(tmp_path: Path) -> None:
    """A time in a prompt, and a field of the answer, as users of vcrpy write it."""
    path = tmp_path / "test.yaml"

    def forget_time(request: Any) -> Any:
        if request.path.endswith("/models"):
            return None
        request.body = b'{"prompt": "it is noon"}'
        return request

    def forget_id(response: dict[str, Any]) -> dict[str, Any]:
        body = response["body"]["string"].replace(b"secret-id", b"ID")
        return {**response, "body": {"string": body}}

    hooks = {"before_record_request": forget_time, "before_record_response": forget_id}
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(Raw(body=b'{"id": "secret-id"}'))
        with use_cassette(path, record="once", **hooks):
            first = await by_httpx(url, {"prompt": "it is 12:00"})
            models = f"{server.base_url('openai')}/models"
            assert (await asyncio.to_thread(httpx.get, models)).status_code == 200
    with use_cassette(path, **hooks) as cassette:
        then = await by_httpx(url, {"prompt": "it is 12:01"})

    assert (first, then) == ({"id": "secret-id"}, {"id": "ID"})
    assert len(cassette) == 1


async def test_a_hook_can_drop_an_exchange(tmp_path: Path) -> None:
    """As in vcrpy, a hook that returns nothing keeps nothing."""
    path = tmp_path / "test.yaml"
    async with ProviderServer(strict=False) as server:
        url = f"{server.base_url('openai')}/chat/completions"
        server.reply(Raw(body=b"{}"))
        with use_cassette(path, record="once", before_record_response=lambda _: None):
            await by_httpx(url, {})

    assert files_in(tmp_path) == []
