"""Every current model of the four providers, asked for each thing that a caller may ask.

The models are those of LiteLLM's table. A cell is right when the request has no
violation of the provider's rules, or when the caller got an InvalidRequestError before
anything was sent. `python -m tests.test_current_models` lists the cells that are wrong,
grouped by rule, and writes docs/models.md: what is sent and what is left out.
"""

import asyncio
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dipeo_llm import InvalidRequestError, ToolConfig, ToolType
from tests.conftest import PROVIDERS
from tests.provider_rules import anthropic, gemini, openai_models
from tests.sent_requests import Requests, Sent, requests

# How LiteLLM's table calls the providers.
TABLE = {"openai": "openai", "anthropic": "anthropic", "google": "gemini"}
# Speech, music, live sessions, and what only another API serves: they do not chat here.
_NOT_CHAT = re.compile(
    r".*(?:audio|tts|lyria|omni|live|streaming|container|computer-use).*"
    r"|deep-research-.*"
)


class Answer(BaseModel):
    """An answer in a form: nested, with a choice and something that may be missing."""

    class Place(BaseModel):
        """Where it is."""

        name: str
        height: float | None = None

    title: str
    places: list[Place]
    confident: bool = True


def weather(city: str, days: int = 1) -> str:
    """Tell the weather of a city."""
    return f"{city}: {days}"


FORCED = {"type": "function", "function": {"name": "weather"}}
SEARCH = ToolConfig(type=ToolType.WEB_SEARCH)
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stream": {"stream": True},
    "effort low": {"reasoning_effort": "low"},
    "effort high": {"reasoning_effort": "high"},
    "effort none": {"reasoning_effort": "none"},
    "temperature": {"temperature": 0.5},
    "top_p and stop": {"top_p": 0.9, "stop": ["END"]},
    "256,000 tokens": {"max_tokens": 256_000},
    "few tokens, effort": {"max_tokens": 200, "reasoning_effort": "medium"},
    "tool": {"tools": [weather]},
    "forced tool": {"tools": [weather], "tool_choice": FORCED},
    "tool, effort": {"tools": [weather], "reasoning_effort": "medium"},
    "forced tool, effort": {
        "tools": [weather],
        "tool_choice": FORCED,
        "reasoning_effort": "medium",
    },
    "structured": {"response_format": Answer},
    "structured, effort": {"response_format": Answer, "reasoning_effort": "medium"},
    "web search": {"tools": [SEARCH]},
    "web search, tool": {"tools": [SEARCH, weather]},
}


def models(provider: str) -> list[str]:
    """Return the chat and responses models of a provider in LiteLLM's table."""
    # From the file: a call of an unknown model adds a row to the table in memory.
    file = files("litellm") / "model_prices_and_context_window_backup.json"
    table = json.loads(file.read_text("utf-8"))
    listed = TABLE.get(provider, provider)
    names = {
        name.removeprefix(f"{listed}/")
        for name, row in table.items()
        if row.get("litellm_provider") == listed
        and row.get("mode") in ("chat", "responses")
    }
    return sorted(name for name in names if not _NOT_CHAT.fullmatch(name))


@dataclass(frozen=True)
class Cell:
    """What one model was sent for one thing that was asked."""

    provider: str
    model: str
    asked: str
    outcome: Sent | Exception

    def wrong(self) -> list[str]:
        """Return what is wrong with it; empty if the cell is right."""
        if isinstance(self.outcome, InvalidRequestError):
            return []
        if isinstance(self.outcome, Exception):
            return [f"raised: {type(self.outcome).__name__} before sending"]
        return [*self.outcome.wrong(), *missing(self, self.outcome.body)]


def missing(cell: Cell, body: dict[str, Any]) -> Iterator[str]:
    """Yield what the model takes, was asked for, and is not in the request."""
    options, text = CELLS[cell.asked], json.dumps(body)
    tools = options.get("tools", ())
    if weather in tools and '"weather"' not in text:
        yield "tools: the function is left out without a word"
    if SEARCH in tools and not re.search("web_?search|googleSearch", text):
        yield "tools: the search is left out without a word"
    if "response_format" in options and '"places"' not in text:
        yield "response_format: the schema is left out without a word"
    warm = 0.5 in dict(leaves(body)).values()
    if "temperature" in options and _takes_temperature(cell) and not warm:
        yield "temperature: MODEL takes it, and it is left out"
    effort = options.get("reasoning_effort")
    thinks = re.search(r'"(?:reasoning|think|output_config|budget_tokens)', text)
    asked = effort is not None and "tool_choice" not in options
    if asked and _takes_effort(cell, str(effort)) and not thinks:
        yield f"reasoning_effort: MODEL takes {effort!r}, and it is left out"


def _takes_temperature(cell: Cell) -> bool:
    if cell.provider == "openai":
        name = cell.model
        return not openai_models.reasons(name) and not openai_models.searches(name)
    if cell.provider == "anthropic":
        series = anthropic.series_of(cell.model)
        return series is not None and series.sampling
    if cell.provider == "google":
        # "No longer recommended" and not sent since 3.5 Flash-Lite:
        # https://ai.google.dev/gemini-api/docs/whats-new-gemini-3.6 (2026-11-25).
        return (gemini.version(cell.model) or (2, 0)) < (3, 5)
    return True


def _takes_effort(cell: Cell, effort: str) -> bool:
    if cell.provider == "openai":
        known = openai_models.efforts(cell.model, chat=False) or ()
        return effort in known and len(known) > 1
    if cell.provider == "anthropic" and effort != "none":
        series = anthropic.series_of(cell.model)
        # A budget must be lower than max_tokens, and at least 1024.
        small = "max_tokens" in CELLS[cell.asked]
        return series is not None and ("adaptive" in series.thinking or not small)
    return cell.provider == "google" and effort != "none" and gemini.thinks(cell.model)


async def body_for(
    asking: Requests, provider: str, model: str, options: Mapping[str, Any]
) -> Sent | Exception:
    """Return what the package sends, or what it raises: the one place that asks it."""
    try:
        return await asking.of(provider, model, **options)
    except Exception as exc:  # noqa: BLE001 - told as a wrong cell
        return exc


async def cells(provider: str) -> list[Cell]:
    """Ask for every cell of a provider."""
    async with requests() as asking:
        await asking.service.initialize()
        return [
            Cell(
                provider, model, name, await body_for(asking, provider, model, options)
            )
            for model in models(provider)
            for name, options in CELLS.items()
        ]


def grouped(made: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Group the wrong cells by rule: the sentence without the name of the model."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in made:
        for said in cell.wrong():
            groups[said.replace(cell.model, "MODEL")].append(cell)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def report(made: list[Cell]) -> Iterator[str]:
    """Yield lines on the cells that are wrong."""
    wrong = sum(bool(cell.wrong()) for cell in made)
    yield f"{made[0].provider}: {len(made) - wrong} of {len(made)} cells right"
    for said, found in grouped(made).items():
        asked = sorted({cell.asked for cell in found})
        names = sorted({cell.model for cell in found})
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"  {len(found)} x {said}"
        yield f"      {', '.join(asked)} | {', '.join(names[:4])}{more}"


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_every_current_model_takes_what_it_is_sent(provider: str) -> None:
    """Or the caller is told before anything is sent."""
    made = await cells(provider)

    assert len(made) > 100
    lines = [*report(made)]
    assert len(lines) == 1, "\n".join(lines)


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_plain_chat_is_refused_only_where_the_model_has_none(
    provider: str,
) -> None:
    """A package that refused everything would have no wrong cell."""
    async with requests() as asking:
        plain = [await body_for(asking, provider, m, {}) for m in models(provider)]

    sent = [outcome for outcome in plain if isinstance(outcome, Sent)]
    assert len(sent) >= 0.9 * len(plain)


# --- The published page ----------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
SHOWN = [name for name in CELLS if name not in ("plain", "stream")]


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values of a body with their paths."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{at}.{name}" if at else name)
    else:
        yield at, value


_AS_ONE = frozenset(
    [
        "tools",
        "tool_choice",
        "messages",
        "input",
        "contents",
        "system",
        "response_format",
        "text",
        "format",
        "output_format",
        "toolConfig",
        "tool_config",
        "options.stop",
    ]
)


def field(at: str, value: Any) -> str:
    """Return a field of a body in a few words: its name, and its value if it is short."""
    first, *inner = at.split(".")
    schemas = [step for step in (first, *inner) if "schema" in step.lower()]
    if first in _AS_ONE:
        return f"`{first}`"
    if schemas:
        return f"`{schemas[0]}`"
    last = inner[-1] if inner else first
    return f"`{last}`" if isinstance(value, list) else f"`{last}: {value}`"


def in_words(plain: Sent, cell: Cell) -> str:
    """Say in a few words what a cell sent that the plain request did not have."""
    if not isinstance(cell.outcome, Sent):
        refused = isinstance(cell.outcome, InvalidRequestError)
        return "refused" if refused else "fails"
    before = dict(leaves(plain.body))
    after = dict(leaves(cell.outcome.body))
    found = [field(at, v) for at, v in after.items() if before.get(at) != v]
    paths = [sent.path.partition("?")[0] for sent in (plain, cell.outcome)]
    if paths[0] != paths[1]:
        # Another endpoint has other fields for what the plain request has too.
        shared = {"`input`", "`messages`"}
        found = [f"at {paths[1]}", *(said for said in found if said not in shared)]
    return ", ".join(dict.fromkeys(found)) or "left out"


def rows(made: list[Cell]) -> dict[tuple[str, ...], list[str]]:
    """Group models that are sent the same for everything."""
    by_model: dict[str, list[Cell]] = defaultdict(list)
    for cell in made:
        by_model[cell.model].append(cell)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for model, own in by_model.items():
        plain = own[0].outcome
        if isinstance(plain, Sent):
            row = tuple(in_words(plain, cell) for cell in own if cell.asked in SHOWN)
        else:
            row = ("refused",) * len(SHOWN)
        groups[row].append(model)
    return groups


def page(made: Mapping[str, list[Cell]]) -> str:
    """Return docs/models.md: for each family of models, what is sent for what is asked."""
    lines = [
        "# What each model is sent",
        "",
        (
            "Generated by `python -m tests.test_current_models` from the models in the"
            f" table of LiteLLM {version('litellm')}; do not edit it."
        ),
        "",
        (
            "Each table is a family: models that are sent the same. Each line says what"
            " a request gains by an option. *Left out* means that the model does not"
            " take the option: the request is sent without it, and that is logged once."
            " *Refused* means an `InvalidRequestError` before anything is sent."
        ),
    ]
    for provider, own in made.items():
        wrong = sum(bool(cell.wrong()) for cell in own)
        lines += ["", f"## {provider}", ""]
        lines += [f"{len(own) - wrong} of {len(own)} requests keep the rules.", ""]
        groups = sorted(rows(own).items(), key=lambda item: item[1])
        for row, names in groups:
            lines += [
                f"**{', '.join(names)}**",
                "",
                "| asked | sent |",
                "| --- | --- |",
            ]
            lines += [
                f"| {asked} | {sent} |" for asked, sent in zip(SHOWN, row, strict=True)
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


async def test_the_published_page_is_the_tested_one() -> None:
    """docs/models.md says what is sent with the LiteLLM that it names."""
    text = PAGE.read_text("utf-8")
    if f"LiteLLM {version('litellm')}" not in text:
        pytest.skip("the page was made with another LiteLLM")

    made = {provider: await cells(provider) for provider in PROVIDERS}

    assert page(made) == text


async def publish(*, write: bool) -> bool:
    """List the wrong cells, write the page, and say whether every cell is right."""
    made = {provider: await cells(provider) for provider in PROVIDERS}
    for own in made.values():
        for line in report(own):
            sys.stdout.write(f"{line}\n")
    if write:
        PAGE.write_text(page(made), "utf-8")
    return not any(cell.wrong() for own in made.values() for cell in own)


if __name__ == "__main__":
    sys.exit(not asyncio.run(publish(write="--check" not in sys.argv)))
