"""Cassettes: exchanges with a real provider in a file, and how they answer for it.

The file is vcrpy's, so that its tools and people can read it; what to match, what to
leave out and when to fail is decided here. Needs `dipeo-llm[testing]`.
"""

import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import pytest

from dipeo_llm.adapters import factory as providers
from dipeo_llm.testing import matching
from dipeo_llm.testing.cassette_file import (
    CassetteError,
    Exchange,
    as_text,
    holds_something,
    host_of,
    origin_of,
    read,
    scrubbed,
    secrets_in,
    shown,
)
from dipeo_llm.testing.cassette_folder import Problem, check, list_table
from dipeo_llm.testing.interception import Answer, Request, intercept
from dipeo_llm.testing.network_guard import block_network
from dipeo_llm.testing.scrubbing import Secrets

__all__ = [
    "REPLAY_KEY",
    "Cassette",
    "CassetteError",
    "CassetteMismatchError",
    "CassetteUnusedError",
    "Exchange",
    "Problem",
    "SecretLeftError",
    "StaleCassetteWarning",
    "check",
    "list_table",
    "opened",
    "use_cassette",
]

Mode: TypeAlias = Literal["none", "once", "new", "all"]
"""What is recorded: nothing; everything where there is no file yet; what the file does
not answer; everything."""

REPLAY_KEY: Final = "key-of-the-replay"
"""Stands in the environment for each provider's key that is not set, in a replay."""


class CassetteMismatchError(CassetteError):
    """A request was made that no recorded exchange answers. Nothing was sent."""


class CassetteUnusedError(CassetteError):
    """An exchange was recorded, and its request is made no more."""


class SecretLeftError(CassetteError):
    """A cassette would hold a secret that cannot be scrubbed. It was not written."""


class StaleCassetteWarning(UserWarning):
    """A cassette is older than the test run wants them to be."""


class Cassette:
    """The exchanges of one file, and the requests that were made with it open.

    Args:
        path: The file.
        record: What may be recorded; the rest is answered from the file.
        allow_unused: Whether exchanges may stay without a request.
        ignore: Further fields of a body that need not be the same, with dots for
            nested ones.
        real_timing: Whether a replay takes the time that the real thing took: waits
            before the pieces of a stream, and before retries.
        origin: What answers, where its address does not say; kept in the file's head.
        again: How to record it anew, with `{mode}` in it; for messages and the head.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        record: Mode = "none",
        allow_unused: bool = False,
        ignore: Sequence[str] = (),
        real_timing: bool = False,
        origin: str | None = None,
        again: str = 'use_cassette(…, record="{mode}")',
    ) -> None:
        self.path = Path(path)
        self.mode = record
        self.real_timing = real_timing
        self.requests: list[Request] = []
        """What was asked while it was open, answered or recorded, oldest first."""
        self.mismatches: list[CassetteMismatchError] = []
        self.secrets = Secrets()
        self.secrets.learn_from_environment()
        self._allow_unused = allow_unused
        self._ignore = tuple(ignore)
        self._origin = origin
        self._again = again
        self._lock = threading.Lock()
        self._changed = False
        self.is_there = holds_something(self.path)
        self._recorded = read(self.path) if self.is_there and record != "all" else []
        self._new: list[Exchange] = []
        self._meanings: dict[Exchange, tuple[int, dict[str, Any]]] = {}

    def __repr__(self) -> str:
        return f"Cassette({shown(self.path)!r}, {self.mode!r}, {len(self)} exchanges)"

    def __len__(self) -> int:
        return len(self.exchanges)

    @property
    def exchanges(self) -> list[Exchange]:
        """What is in the file, or will be, in order."""
        return [*self._recorded, *self._new]

    @property
    def records(self) -> bool:
        """Whether a request may be sent."""
        return self.mode in {"new", "all"} or (
            self.mode == "once" and not self.is_there
        )

    def answer(self, request: Request) -> Answer | None:
        """Return the recorded answer to a request, each only once.

        Returns:
            None if there is none and the request is to be sent.

        Raises:
            CassetteMismatchError: There is none, and nothing may be sent.
        """
        self._learn(request)
        asked = self._meaning(request)
        with self._lock:
            for exchange in self._recorded:
                if not exchange.used and not self._different(exchange, asked):
                    exchange.used = True
                    self.requests.append(request)
                    return exchange.answer
            if self.records:
                return None
            error = CassetteMismatchError(self._explain(asked))
            self.mismatches.append(error)
            raise error

    def keep(self, request: Request, answer: Answer) -> None:
        """Take a new exchange; it is written by `save`."""
        by = f"dipeo_llm {version('dipeo-llm')} on litellm {version('litellm')}"
        now = datetime.now(UTC).replace(microsecond=0)
        with self._lock:
            self._new.append(Exchange(request, answer, True, now, by))
            self.requests.append(request)
            self._changed = True

    def verify(self) -> None:
        """Assert that the requests were those of the cassette, no more and no fewer.

        In mode "new" what was not used is dropped instead.

        Raises:
            CassetteMismatchError: One was refused, and the program went on all the same.
            CassetteUnusedError: One was not made.
        """
        if self.mismatches:
            raise self.mismatches[0]
        unused = [e for e in self._recorded if not e.used]
        if not unused or self._allow_unused:
            return
        if self.mode == "new":
            self._recorded = [e for e in self._recorded if e.used]
            self._changed = True
            return
        number = {id(e): i for i, e in enumerate(self._recorded, 1)}
        lines = [f"  exchange {number[id(e)]}: {self._line(e)}" for e in unused]
        raise CassetteUnusedError(
            f"{len(unused)} of {len(self._recorded)} recorded exchanges of"
            f" {shown(self.path)} were not used:\n"
            + "\n".join(lines)
            + f"\nThe test no longer makes these calls. If that is wanted,\n"
            f"  {self._again.format(mode='new')}\ndrops them; allow_unused=True lets them"
            " be."
        )

    def save(self) -> None:
        """Write the file if there is something new, scrubbed.

        Raises:
            SecretLeftError: A secret would be left in it.
        """
        if not self._changed or not self.exchanges:
            return
        kept = [scrubbed(exchange, self.secrets) for exchange in self.exchanges]
        left = [
            f"  exchange {number}, {finding}"
            for number, exchange in enumerate(kept, 1)
            for finding in secrets_in(exchange, self.secrets)
        ]
        text = self.secrets.scrub(self._head(kept)) + as_text(kept)
        left += [f"  {f.what}" for f in self.secrets.find(text) if not left]
        if left:
            raise SecretLeftError(
                f"{shown(self.path)} was not written, a secret would be in it:\n"
                + "\n".join(left)
                + "\nA model that repeats a key, or a key inside of other data, cannot be"
                " scrubbed without damage: change the test."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8", newline="\n")
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)
        self._changed = False

    def age(self, now: datetime | None = None) -> float | None:
        """Return the days since its oldest exchange was recorded, None if unknown."""
        return _age([e.recorded_at for e in self.exchanges], now)

    def _learn(self, request: Request) -> None:
        self.secrets.learn_from_headers(request.headers)
        for finding in self.secrets.find(request.uri):
            self.secrets.learn(request.uri[finding.start : finding.end])

    def _meaning(self, request: Request) -> dict[str, Any]:
        # Both sides are scrubbed: a key in a prompt is another one in each run.
        body, _ = self.secrets.scrub_pieces(request.body, ())
        uri = self.secrets.scrub(request.uri)
        return matching.as_data(request.method, uri, body, self._ignore)

    def _meaning_of(self, exchange: Exchange) -> dict[str, Any]:
        """Return what a recorded request means by the secrets known now."""
        known = len(self.secrets)
        if self._meanings.get(exchange, (-1, {}))[0] != known:
            self._meanings[exchange] = known, self._meaning(exchange.request)
        return self._meanings[exchange][1]

    def _different(
        self, exchange: Exchange, asked: Mapping[str, Any]
    ) -> list[matching.Difference]:
        return matching.differences(self._meaning_of(exchange), asked)

    def _line(self, exchange: Exchange) -> str:
        return matching.summary(self._meaning_of(exchange))

    def _explain(self, asked: Mapping[str, Any]) -> str:
        again = self._again.format(mode="new" if self._recorded else "once")
        lines = [
            f"no exchange of {shown(self.path)} answers this request:",
            f"  {matching.summary(asked)}",
        ]
        same = [e for e in self._recorded if not self._different(e, asked)]
        left = [e for e in self._recorded if not e.used] or self._recorded
        if not self.is_there:
            lines += ["There is no such cassette yet."]
        elif not left:
            lines += ["The cassette is empty."]
        elif same:
            times = "once" if len(same) == 1 else f"{len(same)} times"
            lines += [f"It was recorded {times}, and is made once more now."]
        else:
            near = left[matching.nearest(asked, [self._meaning_of(e) for e in left])]
            number = self._recorded.index(near) + 1
            count = f"{number} of {len(self._recorded)}"
            used = ", which is used already" if near.used else ""
            lines += [
                f"The nearest recorded request, exchange {count}{used}, differs in:",
                matching.explain(self._different(near, asked)),
            ]
        lines += [
            "Nothing was sent. If this request is wanted, record it:",
            f"  {again}",
        ]
        return "\n".join(lines)

    def _head(self, kept: Sequence[Exchange]) -> str:
        origin = self._origin or origin_of(self.path)
        hosts = dict.fromkeys(host_of(e.request.uri) for e in kept)
        dates = sorted(e.recorded_at for e in kept if e.recorded_at)
        by = next((e.recorded_by for e in reversed(kept) if e.recorded_by), "")
        lines = [f"Recorded from: {origin or ', '.join(hosts)}"]
        if dates:
            lines += [f"on {dates[0]:%Y-%m-%d} by {by}"]
        lines += [f"again with: {self._again.format(mode='all')}"]
        return "".join(f"# {' '.join(line.split())}\n" for line in lines)


@contextmanager
def opened(cassette: Cassette) -> Iterator[Cassette]:
    """Let a cassette answer, and write what it has recorded at the end.

    Where nothing may be recorded, the network is closed but for this machine, and a
    provider's key that is not in the environment is there as `REPLAY_KEY`.
    """
    with ExitStack() as stack:
        stack.callback(cassette.save)
        stack.enter_context(intercept(cassette))
        if not cassette.records:
            stack.enter_context(block_network())
            stack.enter_context(_keys_in_environment())
            if not cassette.real_timing:
                stack.enter_context(_no_waits())
        yield cassette


@contextmanager
def use_cassette(path: str | os.PathLike[str], **options: Any) -> Iterator[Cassette]:
    """Answer from a cassette, or record it; at the end every exchange must be used.

    Args:
        path: The file.
        **options: As for `Cassette`.

    Raises:
        CassetteError: As the subclasses say; from inside, or at the end.
    """
    with opened(Cassette(path, **options)) as cassette:
        yield cassette
        cassette.verify()


def warn_if_stale(cassette: Cassette, most_days: float) -> None:
    """Warn if a cassette is older than that, or does not say how old it is."""
    age = cassette.age()
    if not cassette.is_there or cassette.records:
        return
    if age is None or age > most_days:
        known = "of unknown age" if age is None else f"{age:.0f} days old"
        message = f"{shown(cassette.path)} is {known}; --llm-max-age is {most_days:g}"
        warnings.warn(StaleCassetteWarning(message), stacklevel=2)


@contextmanager
def _keys_in_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for row in providers.PROVIDERS:
            if row.key_variables and not any(map(os.environ.get, row.key_variables)):
                patch.setenv(row.key_variables[0], REPLAY_KEY)
        yield


@contextmanager
def _no_waits() -> Iterator[None]:
    """Retry at once: the server that asked for patience is not there."""
    import stamina

    with stamina.set_testing(True, attempts=1_000_000, cap=True):
        yield


def _age(dates: Sequence[datetime | None], now: datetime | None = None) -> float | None:
    known = [date for date in dates if date]
    if not known or len(known) < len(dates):
        return None
    return ((now or datetime.now(UTC)) - min(known)).total_seconds() / 86_400
