"""The page of a conversation: what it shows, and what no text in it can do."""

import math
import re
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dipeo_llm import (
    AttemptRecord,
    CallRecord,
    DiPeOLLMError,
    LLMInfraService,
    Settings,
    TokenUsage,
)
from dipeo_llm.conversation_page import Turn, render_page, write_page
from tests.conftest import keys_for
from tests.provider_server import Answer, ProviderServer, error
from tests.read_page import Page, kinds_of, numbers_of

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section"),
    *("h1", "h2", "h3", "p", "dl", "div", "dt", "dd", "small", "data", "details"),
    *("summary", "ol", "ul", "li", "a", "bdi", "svg", "text", "rect", "line", "span"),
    *("article", "time", "b", "table", "caption", "thead", "tbody", "tr", "th", "td"),
}
HOSTILE = [
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "</title></textarea></noscript></svg><svg onload=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "<!-- ]]> --!> <![CDATA[ &lt; &#0; &amp",
    "{style} {0} %s $title ${x}",
    "\0\x1b[2J\x7f\x9b\u202egnorts\u2066 \ufeff\u2028\U000e0041",
    "one\r\ntwo\rthree",
    "lone \udc80 and \ud800 surrogates",
]
OK = CallRecord(
    service="openai",
    model="gpt-4.1-nano",
    status="ok",
    usage=TokenUsage(input=12, output=5),
    cost_usd=0.0000032,
    started_at=1_800_000_000.0,
    duration=2.0,
    requests=1,
    attempts=(AttemptRecord(start=0.0, duration=2.0),),
)


def page_of(*turns: Turn, title: str = "Conversation") -> Page:
    """Render turns and read the page."""
    return Page(render_page(turns, title=title))


@asynccontextmanager
async def calls(
    server: ProviderServer, **settings: object
) -> AsyncIterator[tuple[LLMInfraService, list[CallRecord]]]:
    """Open a service, and collect the records of its calls."""
    records: list[CallRecord] = []
    async with LLMInfraService(
        keys_for(server),
        settings=Settings(retry_wait=0.01, **settings),  # type: ignore[arg-type]
        cache="memory://",
        on_call=records.append,
    ) as service:
        yield service, records


async def test_the_page_shows_what_the_records_say(server: ProviderServer) -> None:
    """A retry, a failure, a stream and a hit: all numbers are those of the records."""
    server.reply(error("openai", 429), Answer("One.", cached_tokens=4))
    server.reply(error("openai", 400, "no such thing"))
    server.reply(Answer("Three, in pieces.", delay=0.05, input_tokens=30))
    hello = [{"role": "user", "content": "Hello"}]
    turns = []

    async with calls(server) as (service, records):

        async def note(text: str, failure: str | None = None) -> None:
            turns.append(Turn("ada", text, records[-1], failure, "Ada"))

        for _ in range(2):  # the second one is a hit
            result = await service.complete(hello, "gpt-4.1-nano", "openai")
            await note(result.text)
        with pytest.raises(DiPeOLLMError) as failed:
            await service.complete([*hello, *hello], "gpt-4.1-nano", "openai")
        await note("", str(failed.value))
        async with service.stream(hello, "claude-haiku-4-5", "anthropic") as stream:
            text = "".join([chunk.text async for chunk in stream])
        await note(text)
        total = service.usage().total

    page = page_of(Turn("user", "Hello"), *turns)
    retried, hit, refused, streamed = records
    articles = page.root.all("article")[1:]
    assert [who for who, _, _ in page.turns] == ["user", "Ada", "Ada", "Ada", "Ada"]
    assert [said for _, said, _ in page.turns][1:] == ["One.", "One.", "", text]
    assert "InvalidRequestError 400: " in page.turns[3][2]
    assert "no such thing" in page.turns[3][2]
    for record, article in zip(records, articles, strict=True):
        shown = numbers_of(article)
        assert repr(record.duration) in shown
        assert (repr(record.cost_usd) in shown) == (record.cost_usd is not None)
        assert f"{record.requests} request" in article.one("ul", "numbers")
    assert "12 tokens in, 5 out (4 cached)" in articles[0].one("ul", "numbers")
    assert "30 tokens in, 5 out" in articles[3].one("ul", "numbers")
    assert repr(streamed.first_chunk) in numbers_of(articles[3])
    assert ["from the cache" in a.one("ul", "numbers") for a in articles] == [
        record.cached for record in records
    ]
    tried = [item.text for item in articles[0].all("ol", "attempts")[0].children]
    assert len(tried) == len(retried.attempts) == 2
    assert tried[0].startswith("RateLimitError 429 after ")
    assert tried[1].startswith("ok after ")
    assert [kinds_of(bar) for bar in page.bars] == [
        ["call", "failed", "wait", "attempt"],
        ["cached"],
        ["call", "failed"],
        ["call", "attempt", "stream"],
    ]
    assert page.bars[0].attributes["aria-label"].count("attempt ") == 2
    assert page.totals["Turns"] == "5"
    assert page.totals["Calls"] == "45 requests, 1 error, 1 from the cache".replace(
        "5", str(total.requests), 1
    )
    assert page.totals["Tokens"].startswith(
        f"{total.tokens.total}{total.tokens.input} in, {total.tokens.output} out"
    )
    values = [data.attributes["value"] for data in page.root.all("dl")[0].all("data")]
    assert values == [repr(total.cost_usd), repr(sum(r.duration for r in records))]
    assert (hit.requests, refused.requests) == (0, 1)


async def test_the_page_holds_no_key(server: ProviderServer) -> None:
    """Neither the key of a call, nor one that somebody typed."""
    typed = "sk-proj-" + "a1B2c3D4" * 6
    server.reply(error("openai", 401, "Incorrect API key: sk-test-openai"))
    async with calls(server, max_retries=0) as (service, records):
        with pytest.raises(DiPeOLLMError) as failed:
            await service.complete(
                [{"role": "user", "content": typed}], "gpt-4.1-nano", "openai"
            )

    text = render_page(
        [
            Turn("user", f"my key is {typed}, is it right?", name=typed),
            Turn("ada", typed, records[0], str(failed.value)),
        ],
        title=typed,
    )

    assert "my key is [key], is it right?" in text
    assert typed not in text
    assert "sk-test-openai" not in text


def test_the_bars_of_all_calls_have_one_scale() -> None:
    """The longest bar is the whole width; queue, attempts and waits have their places."""
    retried = replace(
        OK,
        duration=10.0,
        queued=1.0,
        first_chunk=8.0,
        attempts=(
            AttemptRecord(
                start=0.5,
                duration=1.5,
                error="RateLimitError",
                status_code=429,
                wait=2.0,
            ),
            AttemptRecord(start=4.0, duration=6.0),
        ),
    )

    page = page_of(Turn("a", "x", OK), Turn("a", "y", retried))

    places = [
        [
            tuple(rect.attributes[name] for name in ("class", "x", "width"))
            for rect in bar.all("rect")
        ]
        for bar in page.bars
    ]
    assert places == [
        [("call", "0%", "20%"), ("attempt", "0%", "20%")],
        [
            ("call", "0%", "100%"),
            ("failed", "5%", "15%"),
            ("wait", "20%", "20%"),
            ("attempt", "40%", "60%"),
            ("queue", "40%", "10%"),
            ("stream", "80%", "20%"),
        ],
    ]
    assert [tick.text for tick in page.root.all("text")] == [
        *("0 s", "5 s", "10 s"),
    ]
    assert page.bars[1].attributes["aria-label"] == (
        "ok; 10.0 s in all; 1.00 s in the queue; first chunk after 8.00 s; attempt 1:"
        " RateLimitError 429 after 1.50 s, then waited 2.00 s; attempt 2: ok after 6.00 s"
    )


def test_the_deployments_of_a_route_are_named() -> None:
    """Each attempt says where it went; a move to another deployment is not a wait."""
    moved = replace(
        OK,
        route="fast",
        deployment="b",
        attempts=(
            AttemptRecord(
                start=0, duration=1.0, error="APIKeyError", wait=0.0, deployment="a"
            ),
            AttemptRecord(start=1.0, duration=1.0, deployment="b"),
        ),
    )
    straight = replace(OK, attempts=(replace(moved.attempts[1], deployment="<b>"),))
    straight = replace(straight, deployment="<b>", is_usage_partial=True)
    page = page_of(Turn("a", "x", moved), Turn("a", "y", straight))
    said = page.root.text
    assert "APIKeyError at a after 1.00 s" in said
    assert "ok at b after 1.00 s" in said
    assert "at <b>" in said
    assert "output unknown" in said
    assert "waited" not in said
    assert "wait" not in [r.attributes["class"] for r in page.bars[0].all("rect")]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_text_is_a_text_wherever_it_stands(hostile: str) -> None:
    """No tag, no attribute and no reversed line comes out of a text."""
    record = replace(
        OK,
        model=hostile,
        service=hostile,
        response_model=hostile,
        finish_reason=hostile,
        deployment=hostile,
        attempts=(
            AttemptRecord(
                start=0, duration=1, error=hostile, wait=1.0, deployment=hostile
            ),
        )
        * 2,
    )
    failed = replace(record, status="error", error=hostile)

    text = render_page(
        [
            Turn(hostile, hostile, record, hostile, hostile),
            Turn(hostile + "2", hostile, failed, hostile, hostile),
        ],
        title=hostile,
    )
    page = Page(text)

    plain = re.sub(
        "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda found: found[0].encode("unicode_escape").decode(),
        hostile.replace("\r\n", "\n"),
    ).replace("\\r", "\\x0d")
    assert text.encode().decode() == text
    assert page.tags <= TAGS
    assert [said for _, said, _ in page.turns] == [plain, plain]
    assert page.root.one("h1") == plain
    names = {name for node in page.nodes for name in node.attributes}
    assert not {name for name in names if name.startswith("on") or name == "style"}
    assert names.isdisjoint({"src", "xlink:href", "srcset", "action"})
    links = [n.attributes["href"] for n in page.nodes if "href" in n.attributes]
    assert all(re.fullmatch(r"#turn-\d+", link) for link in links)


def test_the_policy_lets_in_the_style_of_the_page_and_nothing_else() -> None:
    """A browser that knows no more than the policy would load nothing."""
    page = page_of()

    (policy,) = [
        meta.attributes["content"]
        for meta in page.root.all("meta")
        if meta.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/]{43}='; base-uri 'none';"
        r" form-action 'none'",
        policy,
    )
    assert "url(" not in page.root.one("style")
    assert "@import" not in page.root.one("style")


def test_persons_are_told_apart() -> None:
    """Two with one name keep their own colours, and their ids are shown."""
    page = page_of(
        Turn("a", "One", OK, name="Ada"),
        Turn("b", "Two", OK, name="Ada"),
        Turn("c", "Three"),
        Turn("a", "Four", name="Ada"),
    )

    assert [who for who, _, _ in page.turns] == ["Ada (a)", "Ada (b)", "c", "Ada (a)"]
    kinds = [a.attributes["class"] for a in page.root.all("article")]
    assert (len(set(kinds)), kinds[0]) == (3, kinds[3])
    rows = [row.text for row in page.root.all("tr")[1:]]
    assert len(rows) == 2
    assert rows[0].startswith("Ada (a)1")


@pytest.mark.parametrize("status", ["cancelled", "left"])
def test_a_turn_that_was_stopped_says_so(status: str) -> None:
    """What was said until then is kept."""
    stopped = replace(OK, status=status, error="CancelledError", usage=None)  # type: ignore[arg-type]

    page = page_of(Turn("a", "Half a sen", replace(stopped, cost_usd=None)))

    assert page.turns[0][1] == "Half a sen"
    assert "before its end" in page.turns[0][2]
    assert "1 stopped" in page.totals["Calls"]
    assert "tokens unknown" in page.root.one("ul", "numbers")
    assert "cost unknown" in page.root.one("ul", "numbers")
    assert "unknown for 1 call" in page.totals["Tokens"]
    assert "unknown for 1 call" in page.totals["Cost"]


@pytest.mark.parametrize(
    "seconds", [0.0, -3.0, math.nan, math.inf, 1e-12, 1e300, 1e308, 5e-324]
)
def test_a_clock_that_jumps_breaks_nothing(seconds: float) -> None:
    """Every bar lies inside its row, and a time that no calendar has is left out."""
    odd = replace(
        OK,
        started_at=seconds * 1e9,
        duration=seconds,
        queued=seconds,
        first_chunk=-seconds,
        attempts=(
            AttemptRecord(start=-seconds, duration=seconds, wait=seconds),
            AttemptRecord(start=seconds, duration=1.0),
        ),
    )

    page = page_of(Turn("a", "x", odd), Turn("a", "y", replace(OK, started_at=-5.0)))

    for bar in page.bars:
        for rect in bar.all("rect"):
            for name in ("x", "width"):
                assert 0 <= float(rect.attributes[name].removesuffix("%")) <= 100
    assert len(page.turns) == 2


def test_a_conversation_without_calls_has_no_time_line() -> None:
    """Nothing is drawn of nothing."""
    assert page_of().totals["Calls"] == "00 requests"
    assert page_of(Turn("a", "x")).bars == []
    assert page_of(Turn("a")).turns == [("a", "", "")]


def test_many_turns_take_time_and_space_in_proportion() -> None:
    """Ten times the turns are about ten times the bytes, and not a hundred times the time."""

    def render(number: int) -> tuple[float, int]:
        turns = [Turn(f"p{i % 2}", "word " * 100, OK) for i in range(number)]
        started = time.process_time()
        size = len(render_page(turns))
        return time.process_time() - started, size

    render(10)
    few, many = render(200), render(2000)

    assert many[1] < 11 * few[1]
    assert many[0] < 40 * max(few[0], 0.01)


@pytest.mark.parametrize(
    "piece", ["sk-", "hf_", "eyJ-", "<", "\0", "\ud800", "a\u202e"]
)
def test_a_long_text_takes_no_longer_than_its_length(piece: str) -> None:
    """1 MB of what looks like the beginning of a key, or of what is escaped."""
    started = time.process_time()

    text = render_page([Turn("a", piece * (1_000_000 // len(piece)))])

    assert time.process_time() - started < 20
    assert len(text) > 1_000_000


def test_a_page_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    """A new file is its owner's; a link stays a link."""
    path, link = tmp_path / "talk.html", tmp_path / "link.html"
    write_page(path, [Turn("a", "lone \udc80")])
    new = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o644)
    link.symlink_to("talk.html")

    write_page(str(link), [Turn("a", "two")], title="Talk")

    assert (new, stat.S_IMODE(path.stat().st_mode)) == (0o600, 0o644)
    assert link.is_symlink()
    assert Page(path.read_text("utf-8")).root.one("h1") == "Talk"
    assert sorted(tmp_path.iterdir()) == [link, path]
