"""Look at the built site in Chromium, as a reader does: `nox -s docs` runs this last.

Every page is opened at the width of a phone, in dark mode, and at that of a desktop.
A page fails if an internal link or anchor leads nowhere, if the console has an error, if
anything is asked of another host, or if the page scrolls sideways. Then the search is
tried. With `--pictures FOLDER`, a picture of each page is left there.
"""

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Page,
    Request,
    Response,
    ViewportSize,
    sync_playwright,
)

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES: dict[str, ViewportSize] = {
    "phone": {"width": 360, "height": 740},
    "desktop": {"width": 1280, "height": 900},
}
SEARCHES = {"StreamInterruptedError": "api/errors.html", "permit": "reliability.html"}
"""A word, and a page that the search must find by it."""


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve the site on this machine; yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Write no line for each file."""

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def find_chromium() -> str:
    """Return Chromium's path, or end with what to install."""
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), ""
    )
    if not found:
        sys.exit(
            "Chromium is missing, so the site was built but not checked.\n"
            "Install it (Debian: apt-get install chromium), or set CHROMIUM to its path."
        )
    return found


def watch(page: Page, home: str, problems: list[str]) -> None:
    """Note errors of the console, failed requests, and requests to other hosts."""

    def note(text: str) -> None:
        problems.append(f"{page.url.removeprefix(home)}: {text}")

    def check_console(line: ConsoleMessage) -> None:
        if line.type == "error":
            note(f"console: {line.text}")

    def check_request(request: Request) -> None:
        if not request.url.startswith((home, "data:")):
            note(f"asks another host: {request.url}")

    def check_response(response: Response) -> None:
        if response.status >= 400:
            note(f"{response.status} for {response.url}")

    page.on("pageerror", lambda error: note(f"an exception: {error}"))
    page.on("console", check_console)
    page.on("request", check_request)
    page.on("response", check_response)


def check_links(
    home: str, folder: Path, read: dict[str, dict[str, list[str]]]
) -> list[str]:
    """Return the internal links that lead nowhere, given each page's links and ids."""
    problems = []
    for name, found in read.items():
        for link in found["links"]:
            target, anchor = urldefrag(urljoin(home + name, link))
            if not target.startswith(home):
                continue
            path = target.removeprefix(home) or "index.html"
            if not (folder / path).is_file():
                problems.append(f"{name}: no file for the link {link}")
            elif anchor and path in read and anchor not in read[path]["ids"]:
                problems.append(f"{name}: no anchor for the link {link}")
    return problems


READ = """() => ({
  links: [...document.querySelectorAll("a[href]")].map(a => a.getAttribute("href")),
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  without_text: [...document.querySelectorAll("img:not([alt]), img[alt='']")].map(e => e.src),
  wider: [...document.querySelectorAll(":root, .content, .content *")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && !e.matches("pre, .table-wrapper"))
    .filter(e => e === document.documentElement
      || ["auto", "scroll"].includes(getComputedStyle(e).overflowX))
    .map(e => e.outerHTML.slice(0, 40)),
})"""

SEARCHED = """() => /finished|did not match/.test(
  document.querySelector("#search-results .search-summary")?.textContent ?? "")"""


def look(browser: Browser, home: str, folder: Path, pictures: Path | None) -> list[str]:
    """Open every page at every size, and search; return what is wrong."""
    problems: list[str] = []
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.html")]
    for size, viewport in SIZES.items():
        page = browser.new_page(
            viewport=viewport, color_scheme="dark" if size == "phone" else "light"
        )
        watch(page, home, problems)
        read = {}
        for name in sorted(names):
            page.goto(home + name)
            found = page.evaluate(READ)
            read[name] = found
            if found["wider"]:
                problems.append(
                    f"{name}: scrolls sideways on a {size}: {found['wider']}"
                )
            problems += [f"{name}: no alt text: {src}" for src in found["without_text"]]
            if pictures:
                file = pictures / f"{name.replace('/', '-')}-{size}.png"
                page.screenshot(path=file, full_page=True)
        problems += check_links(home, folder, read)
        for word, expected in SEARCHES.items():
            page.goto(f"{home}search.html?q={word}")
            page.wait_for_function(SEARCHED)
            found = page.evaluate(READ)["links"]
            if not any(
                link.partition("?")[0].partition("#")[0] == expected for link in found
            ):
                problems.append(f"the search for {word} does not find {expected}")
        page.close()
    print(f"{len(names)} pages, at {len(SIZES)} sizes")
    return list(dict.fromkeys(problems))


def main() -> None:
    """Check the site in the folder that is given; exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    chromium = find_chromium()
    with serve(arguments.folder) as home, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        problems = look(browser, home, arguments.folder, arguments.pictures)
        browser.close()
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
