"""A conversation as one HTML file: who said what, how the calls went, what they cost.

Made from turns and their `CallRecord`s. The page makes no request and runs no script.
It holds the prompts and the answers, which records do not.
"""

import hashlib
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from dipeo_llm.files import replace_file
from dipeo_llm.key_shapes import KEY
from dipeo_llm.ledger import Ledger, UsageTotals
from dipeo_llm.record import AttemptRecord, CallRecord


@dataclass(frozen=True, slots=True)
class Turn:
    """What one person said, or failed to say."""

    person: str
    """The id of the person. Turns with the same id get the same colour."""
    text: str = ""
    """The words; empty for a call that failed before any arrived."""
    record: CallRecord | None = None
    """The call that made the text, as `on_call` got it. None for what a user typed."""
    error: str | None = None
    """The message of the error, for a call that failed."""
    name: str = ""
    """A name for people to read; the id if it is empty."""


def write_page(
    path: str | Path, turns: Iterable[Turn], *, title: str = "Conversation"
) -> None:
    """Write a conversation as an HTML file. Readers never see half of a file.

    Blocks: in a coroutine, call it with `asyncio.to_thread`.

    Args:
        path: The file. A new one can only be read by its owner.
        turns: Oldest first.
        title: The heading.

    Raises:
        OSError: The file cannot be written; an older one is left as it was.
    """
    replace_file(Path(path), render_page(turns, title=title))


def render_page(turns: Iterable[Turn], *, title: str = "Conversation") -> str:
    """Return a conversation as HTML, without characters that UTF-8 lacks.

    Whatever looks like an API key in a text is replaced by "[key]".

    Args:
        turns: Oldest first.
        title: The heading.
    """
    turns = list(turns)
    calls = [(i, t, t.record) for i, t in enumerate(turns, 1) if t.record is not None]
    names = _names(turns)
    styles = {person: f"p{i % _COLOURS}" for i, person in enumerate(names)}
    return _PAGE.format(
        csp=_CSP,
        style=_STYLE,
        title=_text(title),
        about=_about([record for _, _, record in calls]),
        summary=_summary(turns, names),
        time_line=_time_line(calls, names, styles) if calls else "",
        turns="".join(
            _turn(number, turn, names[turn.person], styles[turn.person])
            for number, turn in enumerate(turns, 1)
        )
        or "<p>Nothing has been said yet.</p>",
    )


# --- texts and numbers --------------------------------------------------------------

# Characters that HTML forbids, that UTF-8 lacks, or that reverse the text around them.
_CONTROLS = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def _text(text: str) -> str:
    """Escape a text for HTML; show control characters as codes."""
    text = KEY.sub("[key]", text.replace("\r\n", "\n"))
    return escape(_CONTROLS.sub(_code, text))


def _code(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _names(turns: Sequence[Turn]) -> dict[str, str]:
    """Return the name of each person; with the id, if two persons share one name."""
    names = {turn.person: turn.name or turn.person for turn in turns}
    shared = list(names.values())
    return {
        person: _text(
            name if shared.count(name) == 1 or name == person else f"{name} ({person})"
        )
        for person, name in names.items()
    }


def _length(seconds: float | None) -> float:
    """Return seconds that can be drawn."""
    return max(seconds, 0.0) if seconds is not None and math.isfinite(seconds) else 0.0


def _seconds(seconds: float) -> str:
    """Write a duration, with its exact value for programs."""
    decimals = 3 if abs(seconds) < 0.1 else 2 if abs(seconds) < 10 else 1
    return f'<data value="{seconds!r}">{seconds:,.{decimals}f} s</data>'


def _cost(usd: float) -> str:
    """Write a price in USD, never as 1e-06, with its exact value for programs."""
    shown = f"{usd:,.2f}" if usd >= 1 else f"{float(f'{usd:.2g}'):.12f}".rstrip("0")
    return f'<data value="{usd!r}">${shown.rstrip(".")}</data>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _clock(started_at: float, form: str = "%H:%M:%S") -> str:
    """Write a moment in UTC; nothing for one that no calendar has."""
    try:
        moment = datetime.fromtimestamp(started_at, UTC)
    except (ValueError, OverflowError, OSError):
        return ""
    return f'<time datetime="{moment.isoformat()}">{moment:{form}}</time>'


# --- parts of the page --------------------------------------------------------------


def _about(records: Sequence[CallRecord]) -> str:
    """Say when the conversation was, and with which models."""
    if not records:
        return ""
    models = dict.fromkeys(
        "/".join(filter(None, (r.service, r.response_model or r.model)))
        for r in records
    )
    begin = _clock(records[0].started_at, "%Y-%m-%d %H:%M:%S UTC")
    return " · ".join(filter(None, (begin, *map(_text, models))))


def _summary(turns: Sequence[Turn], names: dict[str, str]) -> str:
    """Return the totals: for each person that made a call, and for all."""
    all_calls, by_person = Ledger(), {person: Ledger() for person in names}
    seconds = dict.fromkeys(names, 0.0)
    for turn in turns:
        if turn.record is not None:
            all_calls.add(turn.record)
            by_person[turn.person].add(turn.record)
            seconds[turn.person] += _length(turn.record.duration)
    total = all_calls.usage().total
    rows = {person: ledger.usage().total for person, ledger in by_person.items()}
    callers = [person for person, row in rows.items() if row.calls]
    head = _totals(total, sum(seconds.values()), len(turns))
    if len(callers) < 2:
        return head
    cells = "".join(
        f'<tr><th scope="row"><bdi>{names[person]}</bdi></th>'
        f"<td>{rows[person].calls:,}</td>"
        f"<td>{_tokens(rows[person])}</td>"
        f"<td>{_usd(rows[person])}</td>"
        f"<td>{_seconds(seconds[person])}</td></tr>"
        for person in callers
    )
    return (
        f'{head}<table><caption>By person</caption><thead><tr><th scope="col">Person</th>'
        '<th scope="col">Calls</th><th scope="col">Tokens</th><th scope="col">Cost</th>'
        f'<th scope="col">Time</th></tr></thead><tbody>{cells}</tbody></table>'
    )


def _totals(total: UsageTotals, seconds: float, turns: int) -> str:
    """Return the totals as a list of terms."""
    ends = [
        _count(total.requests, "request"),
        _count(total.errors, "error") if total.errors else "",
        f"{total.cancelled:,} stopped" if total.cancelled else "",
        f"{total.cached:,} from the cache" if total.cached else "",
    ]
    terms = {
        "Turns": f"{turns:,}",
        "Calls": f"{total.calls:,}<small>{', '.join(filter(None, ends))}</small>",
        "Tokens": _tokens(total),
        "Cost": _usd(total),
        "Time in calls": _seconds(seconds),
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in terms.items()
    )
    return f"<dl>{items}</dl>"


def _tokens(total: UsageTotals) -> str:
    """Write the tokens of some calls, and how many calls told none."""
    tokens = total.tokens
    notes = [f"{tokens.input:,} in, {tokens.output:,} out"]
    if total.unknown_usage:
        notes.append(f"unknown for {_count(total.unknown_usage, 'call')}")
    return f"{tokens.total:,}<small>{'; '.join(notes)}</small>"


def _usd(total: UsageTotals) -> str:
    """Write the cost of some calls, and how many have no known price."""
    missing = f"unknown for {_count(total.unknown_cost, 'call')}"
    return _cost(total.cost_usd) + f"<small>{missing}</small>" * bool(
        total.unknown_cost
    )


def _turn(number: int, turn: Turn, name: str, style: str) -> str:
    """Return a turn: the person, the words, what went wrong, the numbers."""
    record = turn.record
    clock = _clock(record.started_at) if record is not None else ""
    ending = _ending(record) if record is not None else ""
    why = _text(turn.error) if turn.error else ""
    failure = ": ".join(filter(None, (ending, why)))
    parts = [
        f'<div class="said" dir="auto" lang="">{_text(turn.text)}</div>'
        * bool(turn.text),
        f'<p class="failure" dir="auto">{failure}</p>' * bool(failure),
        _numbers(record) if record is not None else "",
    ]
    return (
        f'<article id="turn-{number}" class="{style}" aria-labelledby="who-{number}">'
        f'<header><h3 id="who-{number}"><bdi>{name}</bdi></h3>'
        f'<a href="#turn-{number}" aria-label="turn {number}">#{number}</a>{clock}'
        f"</header>{''.join(parts)}</article>\n"
    )


def _ending(record: CallRecord) -> str:
    """Say how a call ended, if not well."""
    if record.status == "error":
        return _failure(record)
    if record.status == "cancelled":
        return "stopped before its end"
    if record.status == "left":
        return "left before its end"
    if record.finish_reason in {"stop", None}:
        return ""
    return f"ended with {_text(record.finish_reason or '')}"


def _failure(failed: CallRecord | AttemptRecord) -> str:
    """Name the error of a call or of an attempt, and its HTTP status."""
    return _text(" ".join(filter(None, (failed.error, str(failed.status_code or "")))))


def _numbers(record: CallRecord) -> str:
    """Return what is known of a call, as a list."""
    usage, asked = record.usage, record.response_model or record.model
    parts = [_text("/".join(filter(None, (record.service, asked))))]
    if record.cached:
        parts.append("<b>from the cache</b>")
    if usage is not None:
        extra = {
            "cached": usage.cached,
            "written to the cache": usage.cache_written,
            "reasoning": usage.reasoning,
        }
        notes = [f"{n:,} {what}" for what, n in extra.items() if n]
        parts.append(
            f"{_count(usage.input, 'token')} in, "
            + ("output unknown" if record.is_usage_partial else f"{usage.output:,} out")
            + f" ({', '.join(notes)})" * bool(notes)
        )
    else:
        parts.append("tokens unknown")
    parts += [
        "cost unknown" if record.cost_usd is None else _cost(record.cost_usd),
        _seconds(record.duration),
    ]
    if record.first_chunk is not None:
        parts.append(f"first chunk after {_seconds(record.first_chunk)}")
    if record.queued:
        parts.append(f"{_seconds(record.queued)} in the queue")
    if record.deployment and len(record.attempts) == 1:
        parts.append(f"at {_text(record.deployment)}")
    parts.append(_count(record.requests, "request"))
    numbers = "".join(f"<li>{part}</li>" for part in parts if part)
    retried = ""
    if any(attempt.wait is not None for attempt in record.attempts):
        tried = "".join(f"<li>{text}</li>" for text in _attempts(record))
        retried = f'<ol class="attempts" aria-label="Attempts">{tried}</ol>'
    return f'{retried}<ul class="numbers">{numbers}</ul>'


def _attempts(record: CallRecord) -> Iterator[str]:
    """Describe each attempt, and the wait after it."""
    for attempt in record.attempts:
        outcome = _failure(attempt) if attempt.error else "ok"
        wait = f", then waited {_seconds(attempt.wait)}" if attempt.wait else ""
        where = f" at {_text(attempt.deployment)}" if attempt.deployment else ""
        yield f"{outcome}{where} after {_seconds(attempt.duration)}{wait}"


# --- the time line ------------------------------------------------------------------

_OPEN_UP_TO = 40
"""Most calls with which the time line is unfolded, so that the words stay in sight."""

_LEGEND = {
    "queue": "queue",
    "attempt": "attempt",
    "stream": "stream, from the first chunk",
    "failed": "failed attempt",
    "wait": "wait before a retry",
    "cached": "from the cache",
    "call": "everything else",
}


def _time_line(
    calls: Sequence[tuple[int, Turn, CallRecord]],
    names: dict[str, str],
    styles: dict[str, str],
) -> str:
    """Return a bar for each call, all in one scale and each from its own start."""
    longest = max(_length(record.duration) for _, _, record in calls) or 1.0
    step = _step(longest)
    ticks = [step * i for i in range(int(longest / step) + 1)]
    rows = "".join(
        f'<li class="{styles[turn.person]}"><a href="#turn-{number}">{number} '
        f"<bdi>{names[turn.person]}</bdi></a>{_bar(record, longest, ticks)}"
        f"<span>{_seconds(record.duration)}</span></li>\n"
        for number, turn, record in calls
    )
    axis = "".join(
        f'<text x="{_percent(tick, longest)}" y="11">{tick:g} s</text>'
        for tick in ticks
    )
    legend = "".join(
        f'<li><svg aria-hidden="true">{_rect(kind, 0, 1, 1)}</svg>{text}</li>'
        for kind, text in _LEGEND.items()
    )
    is_open = " open" if len(calls) <= _OPEN_UP_TO else ""
    return (
        f"<section><details{is_open}><summary><h2>Time line</h2></summary>"
        '<p class="soft">One bar for each call, from its start; all in one scale.</p>'
        f'<ol class="time-line"><li aria-hidden="true"><svg class="axis">{axis}</svg></li>\n'
        f'{rows}</ol><ul class="legend" aria-label="Legend">{legend}</ul>'
        "</details></section>"
    )


def _step(longest: float) -> float:
    """Return the distance of about four ticks: 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(longest / 4))
    return next(power * i for i in (1, 2, 5, 10) if power * i * 5 > longest)


def _bar(record: CallRecord, longest: float, ticks: Sequence[float]) -> str:
    """Draw a call."""
    duration = _length(record.duration)
    parts = [_rect("cached" if record.cached else "call", 0, duration, longest)]
    for attempt in record.attempts:
        start, length = _length(attempt.start), _length(attempt.duration)
        end = start + length
        parts.append(
            _rect("failed" if attempt.error else "attempt", start, length, longest)
        )
        if attempt is record.attempts[-1]:
            if record.queued:  # only known of the last attempt
                queued = min(_length(record.queued), length)
                parts.append(_rect("queue", start, queued, longest))
            first = _length(record.first_chunk)
            if record.first_chunk is not None and first < end:
                parts.append(_rect("stream", first, end - first, longest))
        if attempt.wait:
            parts.append(_rect("wait", end, _length(attempt.wait), longest))
    grid = "".join(
        f'<line x1="{_percent(t, longest)}" x2="{_percent(t, longest)}" y2="100%"/>'
        for t in ticks[1:]
    )
    described = re.sub("<.*?>", "", _describe(record))
    return f'<svg role="img" aria-label="{described}">{grid}{"".join(parts)}</svg>'


def _describe(record: CallRecord) -> str:
    """Return a bar in words."""
    parts = [_ending(record) or "ok", f"{_seconds(record.duration)} in all"]
    if record.cached:
        parts.append("from the cache")
    if record.queued:
        parts.append(f"{_seconds(record.queued)} in the queue")
    if record.first_chunk is not None:
        parts.append(f"first chunk after {_seconds(record.first_chunk)}")
    if len(record.attempts) > 1:
        parts += [f"attempt {i}: {text}" for i, text in enumerate(_attempts(record), 1)]
    return "; ".join(parts)


def _rect(kind: str, start: float, length: float, longest: float) -> str:
    thin = 'y="6" height="4"' if kind in {"wait", "queue"} else 'y="1" height="14"'
    return (
        f'<rect class="{kind}" x="{_percent(start, longest)}"'
        f' width="{_percent(length, longest)}" {thin}><title>{_LEGEND[kind]}</title></rect>'
    )


def _percent(seconds: float, longest: float) -> str:
    return f"{100 * min(seconds / longest, 1):.4g}%"


# --- the frame ----------------------------------------------------------------------

_COLOURS = 6
"""The classes p0 to p5 of the style."""

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b1f24;
  --soft: #57606a; --line: #d8dee4; --bad: #b42318; --bad-paper: #fef0ee;
  --attempt: #6ea8fe; --stream: #1f6feb; --wait: #8c6d1f; --queue: #6b7280;
  --cached: #2da44e; --call: #e4e8ed;
  --p0: #475569; --p1: #1d4ed8; --p2: #a34a06; --p3: #157038; --p4: #9d174d;
  --p5: #6d28d9; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #0f1318;
  --card: #181d24; --ink: #e6e9ed; --soft: #a0a9b4; --line: #2f3740; --bad: #ff9d91;
  --bad-paper: #3a1a17; --attempt: #3d73c4; --stream: #79b8ff; --wait: #d6b25e;
  --queue: #a0a9b4; --cached: #46c066; --call: #2b323b;
  --p0: #cbd5e1; --p1: #93c5fd; --p2: #fbbf77; --p3: #86efac; --p4: #f9a8d4;
  --p5: #c4b5fd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 1.6rem 0 .6rem; font-size: 1.15rem; }
p { margin: .4rem 0; }
small, .soft, caption, dt, time, .numbers, .attempts, .legend { color: var(--soft);
  font-size: .84rem; }
small { display: block; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr));
  gap: .6rem; margin: 1.2rem 0; }
dl div { padding: .6rem .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { font-weight: 400; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
th, td { padding: .3rem .4rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; font-size: .9rem; }
th:first-child { text-align: left; }
a { color: inherit; }
summary { cursor: pointer; }
summary h2 { display: inline-block; margin: .4rem 0; }
ol, ul { margin: 0; padding: 0; list-style: none; }
article { margin: 0 0 .9rem; padding: .7rem 1rem .8rem; background: var(--card);
  border: 1px solid var(--line); border-left: .3rem solid var(--who);
  border-radius: .6rem; }
article:target { outline: 2px solid var(--who); }
article header { display: flex; gap: .6rem; align-items: baseline; }
article header a { margin-left: auto; color: var(--soft); font-size: .84rem;
  text-decoration: none; }
h3 { margin: 0; font-size: 1rem; color: var(--who); }
.said { white-space: pre-wrap; margin: .2rem 0; }
.failure { margin: .4rem 0; padding: .4rem .6rem; color: var(--bad);
  background: var(--bad-paper); border-radius: .4rem; white-space: pre-wrap; }
.attempts { margin: .4rem 0 0; padding-left: 1.4rem; list-style: decimal; }
.numbers, .legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; margin-top: .3rem; }
.time-line li { display: grid; grid-template-columns: 9rem 1fr 4.5rem; gap: .6rem;
  align-items: center; font-size: .84rem; font-variant-numeric: tabular-nums; }
.time-line a { color: var(--who); text-decoration: none; white-space: nowrap;
  overflow: hidden; text-overflow: ellipsis; }
.time-line span { text-align: right; }
.time-line svg { display: block; width: 100%; height: 16px; overflow: visible; }
.axis { grid-column: 2; }
.axis text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
.legend { margin-top: .6rem; }
.legend li { display: flex; align-items: center; gap: .35rem; }
.legend svg { width: 18px; height: 16px; }
line { stroke: var(--line); }
rect { rx: 2px; }
.call { fill: var(--call); }
.attempt { fill: var(--attempt); stroke: var(--attempt); }
.stream { fill: var(--stream); }
.failed { fill: var(--bad); stroke: var(--bad); }
.wait { fill: var(--wait); }
.queue { fill: var(--queue); }
.cached { fill: var(--cached); stroke: var(--cached); }
.p0 { --who: var(--p0); } .p1 { --who: var(--p1); } .p2 { --who: var(--p2); }
.p3 { --who: var(--p3); } .p4 { --who: var(--p4); } .p5 { --who: var(--p5); }
@media (max-width: 34rem) {
  .time-line li { grid-template-columns: 1fr auto; gap: 0 .6rem; margin-bottom: .4rem; }
  .time-line svg { grid-column: 1 / -1; grid-row: 2; } }
@media print {
  body { max-width: none; padding: 0; background: none; font-size: 10pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3, header { break-after: avoid; }
  dl div, .time-line li, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""

# By its hash: not even an attribute `style` is allowed beside it.
_HASH = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_CSP = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{csp}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta name="generator" content="dipeo-llm">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1 dir="auto">{title}</h1>
<p class="soft">{about}</p>
<p class="soft">This page holds what was asked and answered, word for word: read it before
you share it. It holds no API key, loads nothing and runs no script.</p>
</header>
<main>
<section aria-label="Totals">{summary}</section>
{time_line}
<section aria-labelledby="turns">
<h2 id="turns">Conversation</h2>
{turns}</section>
</main>
</body>
</html>
"""
