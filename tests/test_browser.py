"""The page of a conversation in a real Chromium: layout, colours, paper, requests."""

import asyncio
import base64
import json
import shutil
from asyncio.subprocess import DEVNULL, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dipeo_llm import AttemptRecord
from dipeo_llm.conversation_page import Turn, write_page
from tests.test_conversation_page import HOSTILE, OK

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"needs a browser: none of {', '.join(NAMES)} is on PATH"
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0"),
)
RETRIED = replace(
    OK,
    queued=0.1,
    first_chunk=1.0,
    attempts=(
        AttemptRecord(start=0.0, duration=0.2, error="RateLimitError", wait=0.3),
        AttemptRecord(start=0.5, duration=1.5),
    ),
)
FAILED = replace(OK, status="error", error="ServiceUnavailableError", status_code=503)
TURNS = [
    Turn("user", "Name three rivers.", name="User"),
    Turn("ada", "Rhine, Rhone, Danube.", RETRIED, name="Ada"),
    Turn("bob", "", FAILED, "openai answered 503: overloaded", "Bob"),
    Turn("carl", "From the cache.", replace(OK, cached=True)),
    Turn("dora", "נהר הריין, and then English.", replace(OK, status="cancelled")),
    Turn("emil", "word" * 5_000, OK, name="a very long name " * 9),
    Turn("fred", "x", OK, "y" * 500, "n" * 300),
    *(Turn(text, text, FAILED, text, text) for text in HOSTILE),
]

CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    const rgb = parse(getComputedStyle(node).backgroundColor);
    return rgb.length === 4 && rgb[3] === 0 && node.parentElement
      ? ground(node.parentElement) : rgb;
  };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    if (![...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (node.tagName === "title") continue;
    const style = getComputedStyle(node);
    const ink = node.tagName === "text" ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(ground(node))];
    found.push((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return [found.length, Math.min(...found)];
})()
"""


class Tab:
    """A tab of the browser, over the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.events: list[dict[str, Any]] = []

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; keep the events before it."""
        self._number += 1
        await self._socket.send_json(
            {"id": self._number, "method": method, "params": params}
        )
        async for message in self._socket:
            said: dict[str, Any] = json.loads(message.data)
            if said.get("id") == self._number:
                assert "error" not in said
                result: dict[str, Any] = said["result"]
                return result
            self.events.append(said)
        raise ConnectionError

    async def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        said = await self.do(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        return said["result"].get("value")

    async def show(self, path: Path, width: int = 1000, **features: str) -> None:
        """Open a file in a window of a width, and wait until it is loaded."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.do(f"{domain}.enable")
        await self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        named = [
            {"name": name.replace("_", "-"), "value": value}
            for name, value in features.items()
        ]
        await self.do("Emulation.setEmulatedMedia", features=named)
        self.events.clear()
        await self.do("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            await self.do("Runtime.evaluate", expression="1")
            await asyncio.sleep(0.02)


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Tab]:
    """Start a browser that knows nothing, and end it."""
    assert CHROMIUM is not None
    process = await create_subprocess_exec(
        *(CHROMIUM, *QUIET, f"--user-data-dir={folder}", "about:blank"),
        stdout=DEVNULL,
        stderr=DEVNULL,
    )
    try:
        async with asyncio.timeout(120), aiohttp.ClientSession() as session:
            port = folder / "DevToolsActivePort"
            while not port.exists() or "\n" not in port.read_text():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
            number = port.read_text().split()[0]
            async with session.get(f"http://127.0.0.1:{number}/json") as response:
                (page,) = [t for t in await response.json() if t["type"] == "page"]
            async with session.ws_connect(
                page["webSocketDebuggerUrl"], max_msg_size=0
            ) as socket:
                yield Tab(socket)
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    """Open a tab of a new browser."""
    async with browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Write a page with every kind of turn, and with hostile ones."""
    path = tmp_path / "talk.html"
    write_page(path, TURNS, title="A talk " + HOSTILE[0])
    return path


async def test_the_page_runs_nothing_and_asks_for_nothing(tab: Tab, page: Path) -> None:
    """One request, for the page itself; not a word in the console."""
    await tab.show(page)

    kinds = [event["method"] for event in tab.events]
    assert kinds.count("Network.requestWillBeSent") == 1
    assert "Runtime.consoleAPICalled" not in kinds
    assert "Runtime.exceptionThrown" not in kinds
    assert "Page.javascriptDialogOpening" not in kinds
    assert [e for e in tab.events if e["method"] == "Log.entryAdded"] == []
    assert await tab.ask("document.scripts.length + document.images.length") == 0
    assert await tab.ask("document.querySelectorAll('article').length") == len(TURNS)
    # The style is applied: the policy names its hash.
    assert await tab.ask("getComputedStyle(document.body).maxWidth") == "832px"


PUT = (
    "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
    "<p id=p style='color: red'>x</p><style>p { color: red }</style>"
)


@pytest.fixture
def broken(page: Path) -> Path:
    """Write a page whose escaping has failed."""
    text = page.read_text("utf-8")
    page.write_text(text.replace("<main>", f"<main>{PUT}"), "utf-8")
    return page


async def test_what_gets_into_the_page_is_stopped_by_its_policy(
    tab: Tab, broken: Path
) -> None:
    """A mistake in the escaping would still run nothing and load nothing."""
    await tab.show(broken)

    assert str(await tab.ask("document.title")).startswith("A talk")
    color = await tab.ask("getComputedStyle(document.querySelector('#p')).color")
    assert color not in {None, "rgb(255, 0, 0)"}


@pytest.mark.parametrize("width", [320, 360, 768, 1600])
async def test_the_page_is_as_wide_as_the_window(
    tab: Tab, page: Path, width: int
) -> None:
    """Long words, long names and long errors wrap; nothing scrolls sideways."""
    await tab.show(page, width)

    assert await tab.ask("document.documentElement.scrollWidth") == width
    assert await tab.ask("innerWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_every_text_can_be_read(tab: Tab, page: Path, scheme: str) -> None:
    """The contrast is that of WCAG 2.2 AA, 4.5 to 1, for every text of the page."""
    await tab.show(page, prefers_color_scheme=scheme)

    number, worst = await tab.ask(CONTRAST)

    assert number > 100
    assert worst >= 4.5
    ground = await tab.ask("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(15, 19, 24)") == (scheme == "dark")


async def test_a_screen_reader_finds_its_way(tab: Tab, page: Path) -> None:
    """Headings without a gap, a name for each drawing and each turn."""
    await tab.show(page)

    nodes = (await tab.do("Accessibility.getFullAXTree"))["nodes"]

    found: dict[str, list[str]] = {}
    levels = []
    for node in nodes:
        role = node["role"]["value"]
        found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        if role == "heading" and not node["ignored"]:
            levels += [
                p["value"]["value"] for p in node["properties"] if p["name"] == "level"
            ]
    assert levels == [1, 2, 2] + [3] * len(TURNS)
    calls = sum(turn.record is not None for turn in TURNS)
    images = [name for role in ("image", "img") for name in found.get(role, [])]
    assert len(images) == calls
    assert all(images)
    assert found["article"][:3] == ["User", "Ada", "Bob"]
    assert len(found["main"]) == 1


async def test_the_page_on_paper_is_light_and_whole(tab: Tab, tmp_path: Path) -> None:
    """A time line that is folded on the screen is printed too."""
    page = tmp_path / "long.html"
    write_page(page, [Turn("ada", "x", OK)] * 50)
    await tab.show(page, prefers_color_scheme="dark")
    line = "document.querySelector('.time-line')"
    assert await tab.ask(f"{line}.checkVisibility()") is False

    printed = await tab.do("Page.printToPDF", printBackground=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    await tab.do("Emulation.setEmulatedMedia", media="print", features=[dark])

    assert base64.b64decode(printed["data"]).startswith(b"%PDF-")
    assert await tab.ask(f"{line}.checkVisibility()") is True
    number, worst = await tab.ask(
        CONTRAST.replace("ground(node)", "[255, 255, 255]", 2)
    )
    assert number > 100
    assert worst >= 4.5
