"""`dipeo-llm batch`: a file of requests, answered into a file that a kill cannot harm.

A row counts as done when its line is written; what is done is not asked again.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import click

from dipeo_llm.batch import FATAL, BatchItem, Samples
from dipeo_llm.cli import terminal
from dipeo_llm.cli.options import (
    Command,
    Exit,
    Number,
    UsageError,
    complete_service,
    connection,
    find_provider_and_key,
    open_service,
    report,
    run,
    service,
    text,
)
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.files import replace_file

_HELP = """\
Answer every request of INPUT, one JSON object on a line, into OUTPUT.

A request has "prompt", a text, or "messages", as for OpenAI; and, if it likes, "id",
"model", "service" and any option of a call: "temperature", "max_tokens", "seed", ...
Without an "id" it is known by its line number.

OUTPUT gets a line for each, as soon as it is answered: its "id", and a "result" or an
"error". Run the same command again after a crash or Ctrl-C: requests with a line in
OUTPUT are not asked again. OUTPUT.batch.json says which input and options it belongs to.
"""

_EPILOG = """\
Examples:
  dipeo-llm batch questions.jsonl answers.jsonl --model gpt-4.1-nano
  dipeo-llm batch in.jsonl out.jsonl --model claude-haiku-4-5 --concurrency 20
  dipeo-llm batch in.jsonl out.jsonl --model gpt-4.1-nano --max-cost 5
  dipeo-llm batch in.jsonl out.jsonl --model gpt-4.1-nano --retry-errors

An input file:
  {"id": "a", "prompt": "Name three rivers."}
  {"id": "b", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}

A refused key and a used-up quota stop the run. So does --max-cost, when the answers in
OUTPUT have come to that; the calls in flight end first. The exit code is 0 if every
request has an answer, else 1.
Variables and exit codes: dipeo-llm --help
"""


@click.command(
    cls=Command, help=_HELP, short_help="Answer a file of requests.", epilog=_EPILOG
)
@click.argument("source", metavar="INPUT", type=click.Path(dir_okay=False))
@click.argument("target", metavar="OUTPUT", type=click.Path(dir_okay=False))
@click.option("--model", type=text, help="The model of requests that name none.")
@click.option(
    "--service",
    type=service,
    metavar="NAME",
    shell_complete=complete_service,
    help="The provider, if the model's name does not tell.",
)
@click.option("--system", type=text, metavar="TEXT", help="A system prompt for all.")
@click.option(
    "--temperature",
    metavar="NUMBER",
    type=Number(min=0),
    help="Of requests without one.",
)
@click.option(
    "--max-tokens",
    metavar="INTEGER",
    type=click.IntRange(min=1),
    help="Of requests without one.",
)
@connection
@click.option(
    "--concurrency",
    metavar="INTEGER",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Most requests at a time.",
)
@click.option(
    "--max-cost",
    metavar="USD",
    type=Number(min=0, min_open=True),
    help="Start no request after the answers in OUTPUT have cost this much.",
)
@click.option(
    "--retry-errors", is_flag=True, help="Ask again what has an error in OUTPUT."
)
def batch(source: str, target: str, **options: Any) -> Exit:
    """Answer a file of requests."""
    requests = _read_input(Path(source), options["model"])
    binding = {
        "version": 1,
        "input": requests.digest,
        "options": {name: options[name] for name in _BOUND},
    }
    with _lock(Path(target)) as side:
        _bind(Path(target), side, binding)
        done = _read_output(Path(target), drop_errors=options["retry_errors"])
        return run(_answer(requests, done, Path(target), options))


_BOUND = ("model", "service", "system", "temperature", "max_tokens", "base_url")
"""The options that an answer depends on."""


@dataclass(slots=True)
class _Input:
    path: Path
    digest: str
    count: int
    """Requests in the file."""


@dataclass(slots=True)
class _Done:
    answers: set[str] = field(default_factory=set)
    """The ids that have an answer, as JSON: 1 and "1" are two."""
    errors: set[str] = field(default_factory=set)
    cost: float = 0.0


# The input.


def _read_input(path: Path, model: str | None) -> _Input:
    """Check every line before anything is paid for.

    Raises:
        UsageError: A line is not a request, or two have the same id.
    """
    lines: dict[str, int] = {}
    digest = hashlib.sha256()
    for number, line in _lines(path):
        digest.update(line)
        if not line.strip():
            continue
        row = _parse(number, line)
        if not (row.get("model") or model):
            raise UsageError(
                f'line {number} of INPUT names no "model"; add it, or give --model'
            )
        name = _id(number, row)
        if name in lines:
            raise UsageError(
                f"lines {lines[name]} and {number} of INPUT have the same id, {name}"
            )
        lines[name] = number
    return _Input(path, digest.hexdigest(), len(lines))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers; only LF ends one."""
    try:
        with path.open("rb") as file:
            yield from enumerate(file, 1)
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}") from None


def _parse(number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"line {number} of INPUT is not JSON: {exc}") from None
    if not isinstance(row, dict):
        raise UsageError(f"line {number} of INPUT is not a JSON object")
    if isinstance(row.get("prompt"), str) == ("messages" in row):
        raise UsageError(
            f'line {number} of INPUT needs either "prompt", a text, or "messages"'
        )
    return row


def _id(number: int, row: dict[str, Any]) -> str:
    """Return a row's id as JSON: its own, or the number of its line."""
    given = row.get("id", number)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise UsageError(f'the "id" in line {number} must be a text or an integer')
    return json.dumps(given)


# The output.


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[BinaryIO]:
    """Open the file beside the output that says what it belongs to, for one process.

    Raises:
        UsageError: Another process writes the same output, or it cannot be written.
    """
    side = path.with_name(f"{path.name}.batch.json")
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(side.open("a+b"))
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another batch writes {path}") from None
        except OSError as exc:
            raise UsageError(f"{side} cannot be written: {exc.strerror}") from None
        yield file


def _bind(path: Path, side: BinaryIO, binding: dict[str, Any]) -> None:
    """Bind an empty output to the input and options; refuse another one's output.

    Raises:
        UsageError: The output belongs to another input, or to other options.
    """
    side.seek(0)
    if not path.exists() or path.stat().st_size == 0:
        side.truncate(0)
        side.write(json.dumps(binding).encode() + b"\n")
        side.flush()
        os.fsync(side.fileno())
        return
    try:
        found = json.loads(side.read())
        options = dict(found["options"])
    except (ValueError, TypeError, KeyError):
        raise UsageError(
            f"{path} is not empty, and {side.name} does not say what it belongs to; name"
            " another OUTPUT"
        ) from None
    if found == binding:
        return
    wanted = binding["options"]
    changed = [name for name in wanted if options.get(name) != wanted[name]]
    what = ", ".join("--" + name.replace("_", "-") for name in changed)
    raise UsageError(
        f"{path} belongs to a run with another {what or 'INPUT'}; name another OUTPUT"
    )


def _read_output(path: Path, *, drop_errors: bool) -> _Done:
    """Read what is done; drop a last line that a kill has cut, and errors if asked.

    Raises:
        UsageError: Another line is not a row of a batch.
    """
    done = _Done()
    kept: list[bytes] = []
    has_dropped = False
    for number, line in _lines(path) if path.exists() else ():
        if not line.endswith(b"\n"):
            has_dropped = True
            break
        try:
            row = json.loads(line)
            name = json.dumps(row["id"])
            cost = (row.get("result") or {}).get("cost_usd") or 0.0
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UsageError(f"line {number} of {path} is not a batch's") from None
        is_error = "error" in row
        if is_error and drop_errors:
            has_dropped = True
            continue
        kept.append(line)
        (done.errors if is_error else done.answers).add(name)
        done.cost += cost
    if has_dropped:
        replace_file(path, b"".join(kept))
    return done


# The work.


class _Run:
    """The requests that are left, and what their answers have come to."""

    def __init__(self, source: _Input, done: _Done, options: dict[str, Any]) -> None:
        self._source = source
        self._done = done
        self._options = options
        self.cost = done.cost
        """USD of all answers in the output."""
        self.failed = len(done.errors)
        self.answered = len(done.answers)
        self._keys: dict[tuple[str, str | None], str | None] = {}
        self.unpriced: str | None = None
        """The model of an answer without a known price."""

    @property
    def is_over(self) -> bool:
        """Whether no further request may be started."""
        limit = self._options["max_cost"]
        return limit is not None and (self.cost >= limit or self.unpriced is not None)

    async def rows(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the keywords of each call that is left, read as work goes on."""
        seen = self._done.answers | self._done.errors
        samples = Samples() if os.environ.get("DIPEO_LLM_CACHE_URL") else None
        for number, line in _lines(self._source.path):
            if not line.strip():
                continue
            row = _parse(number, line)
            is_done = _id(number, row) in seen
            if samples is not None:
                # Answered rows count too: an equal one that is left is another sample.
                asked = {name: row[name] for name in row if name != "id"}
                row |= samples.number(asked)
            if is_done:
                continue
            if self.is_over:
                return
            yield await self._call(number, row)

    async def _call(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        call = {"model": self._options["model"], "service": self._options["service"]}
        for name in ("temperature", "max_tokens"):
            if self._options[name] is not None:
                call[name] = self._options[name]
        call |= row
        call["trace_id"] = row.get("id", number)  # a label, which is not sent
        call.pop("id", None)
        prompt = call.pop("prompt", None)
        if prompt is not None:
            call["messages"] = [{"role": "user", "content": prompt}]
        if self._options["system"] and isinstance(call["messages"], list):
            system = {"role": "system", "content": self._options["system"]}
            call["messages"] = [system, *call["messages"]]
        call["api_key_id"] = await self._find_key(call["model"], call["service"])
        return call

    async def _find_key(self, model: str, service: str | None) -> str | None:
        """Return the id of the key of a request's provider."""
        if (model, service) not in self._keys:
            try:
                _, key = await find_provider_and_key(
                    model, service, self._options["key_id"]
                )
            except InvalidRequestError:
                key = None  # the call says what is wrong with the model
            self._keys[model, service] = key
        return self._keys[model, service]

    def write(self, item: BatchItem, file: BinaryIO) -> None:
        """Write a row whole, and count it."""
        row: dict[str, Any] = {"id": item.request["trace_id"]}
        result = item.result
        if result is None:
            row["error"] = _describe(item.error)
            self.failed += 1
        else:
            raw: Any = {"raw_response": True, "parsed": True}
            row["result"] = result.model_dump(mode="json", exclude=raw)
            self.answered += 1
            self.cost += result.cost_usd or 0.0
            if result.cost_usd is None:
                self.unpriced = result.model
        # Escapes U+2028 and its like, at which other readers split lines.
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()


def _describe(error: Exception | None) -> dict[str, Any]:
    fields = ("service", "model", "status_code", "retryable", "request_id", "attempts")
    known = {name: getattr(error, name, None) for name in fields}
    about = {"type": type(error).__name__, "message": str(error)}
    return about | {name: value for name, value in known.items() if value is not None}


async def _answer(
    source: _Input, done: _Done, target: Path, options: dict[str, Any]
) -> Exit:
    provider = options["service"]
    if options["base_url"] and provider is None:
        if options["model"] is None:
            raise UsageError("--base-url needs --model or --service")
        provider, _ = await find_provider_and_key(options["model"], None, None)
        if not provider:
            raise UsageError("--base-url needs a model, and not a route")
    settings = {name: options[name] for name in ("base_url", "timeout")}
    left = _Run(source, done, options)
    stopped: Exception | None = None
    with (
        target.open("ab") as file,
        click.progressbar(
            length=source.count,
            file=sys.stderr,
            show_pos=True,
            hidden=not terminal.is_terminal(sys.stderr),
        ) as bar,
    ):
        bar.update(left.answered + left.failed)
        async with (
            open_service(provider or "", **settings) as opened,
            opened.complete_many(
                left.rows(), concurrency=options["concurrency"], ordered=False
            ) as items,
        ):
            try:
                async for item in items:
                    left.write(item, file)
                    bar.update(1)
            except FATAL as exc:
                stopped = exc
    return _finish(left, source, options, stopped)


def _finish(
    left: _Run, source: _Input, options: dict[str, Any], stopped: Exception | None
) -> Exit:
    """Say what has been done and what is left, and return the exit code."""
    unanswered = source.count - left.answered - left.failed
    terminal.write_aside(
        f"{left.answered} answered, {left.failed} failed, {unanswered} left,"
        f" {left.cost:.6f} USD\n"
    )
    if stopped is not None:
        return report(stopped)
    if unanswered:
        reason = f"--max-cost {options['max_cost']:g} is reached"
        if left.unpriced is not None:
            reason = (
                f"the price of {left.unpriced} is unknown, so --max-cost cannot hold"
            )
        terminal.write_error(f"{reason}; run it again to go on")
    return Exit.FAILED if unanswered or left.failed else Exit.OK
