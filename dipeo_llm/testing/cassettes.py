"""Cassettes: exchanges with a real provider in a file, and how they are replayed.

The file has vcrpy's format, so that people and vcrpy's tools can read it. What matches,
what is kept and when a test fails is decided here. Needs `dipeo-llm[testing]`.
"""

import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

import pytest

from dipeo_llm.adapters import factory as providers
from dipeo_llm.client import is_loopback
from dipeo_llm.errors import APIKeyNotFoundError
from dipeo_llm.keys import EnvironmentAPIKeys
from dipeo_llm.litellm_import import import_litellm
from dipeo_llm.testing import matching
from dipeo_llm.testing.cassette_file import (
    CassetteError,
    Exchange,
    answer_from,
    as_text,
    holds_something,
    host_of,
    origin_of,
    read,
    response_of,
    scrub,
    secrets_in,
    show_path,
    vcrpy_request,
)
from dipeo_llm.testing.cassette_folder import Problem, check, list_table
from dipeo_llm.testing.exchange import Answer, Request, header
from dipeo_llm.testing.interception import from_vcrpy, intercept
from dipeo_llm.testing.network_guard import (
    NetworkBlockedError,
    block_network,
    is_named,
)
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
    "open_cassette",
    "use_cassette",
]

Mode: TypeAlias = Literal["none", "once", "new", "all"]
"""`none` records nothing, `once` records if the file does not exist yet, `new` records
the requests that the file does not answer, and `all` records everything."""

REPLAY_KEY: Final = "key-of-the-replay"
"""The value, in a replay, of each provider's key variable that is not set."""


class CassetteMismatchError(CassetteError):
    """The cassette cannot answer a request, or cannot record it. Nothing was sent."""


class CassetteUnusedError(CassetteError):
    """An exchange was recorded, and its request is no longer made."""


class SecretLeftError(CassetteError):
    """A secret cannot be removed from a cassette, so the file was not written."""


class StaleCassetteWarning(UserWarning):
    """A cassette is older than the test run allows."""


class Cassette:
    """The exchanges of one file, and the requests that were made while it was open.

    Args:
        path: The file.
        record: What may be recorded; everything else is answered from the file.
        allow_unused: Whether recorded exchanges may stay unused.
        allow_playback_repeats: Whether an exchange may answer more than one request.
        ignore: Further fields of a body that need not be equal, with dots for nested
            ones.
        ignore_hosts: Hosts whose requests are neither recorded nor answered, such as
            "db.internal", "*.example.com" or "localhost:8000".
        ignore_localhost: Whether requests to this machine are ignored likewise.
        before_record_request: Changes a request before it is compared or kept: takes
            and returns vcrpy's `Request`; None ignores the request.
        before_record_response: Changes a response before it is kept: takes and returns
            vcrpy's dictionary; None drops the exchange.
        real_timing: Whether a replay waits as long as the provider took: before the
            pieces of a stream, and before retries.
        origin: The server behind the address, if its name does not say it; kept in the
            head of the file.
        again: The command that records it again, with `{mode}` in it.
        test: The name of the test, if several tests share the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        record: Mode = "none",
        allow_unused: bool = False,
        allow_playback_repeats: bool = False,
        ignore: Sequence[str] | str = (),
        ignore_hosts: Sequence[str] | str = (),
        ignore_localhost: bool = False,
        before_record_request: Callable[[Any], Any] | None = None,
        before_record_response: Callable[[dict[str, Any]], Any] | None = None,
        real_timing: bool = False,
        origin: str | None = None,
        again: str = 'use_cassette(…, record="{mode}")',
        test: str = "",
    ) -> None:
        self.path = Path(path)
        self.mode = record
        self.real_timing = real_timing
        self.requests: list[Request] = []
        """The requests that it answered or recorded, oldest first."""
        self.mismatches: list[CassetteMismatchError] = []
        self.written = 0
        """How many new exchanges were written."""
        self.test_failed = False
        """Set by the code that runs the test. A failed test does not write failed connections:
        they may be the reason why it failed, and would replace a good cassette."""
        self.secrets = Secrets()
        self.secrets.learn_from_environment()
        self.ignore_hosts = _as_tuple(ignore_hosts)
        self._ignore_localhost = ignore_localhost
        self._allow_unused = allow_unused
        self._allow_repeats = allow_playback_repeats
        self._ignore = _as_tuple(ignore)
        self._change_request = before_record_request
        self._change_response = before_record_response
        self._origin = origin
        self._again = again
        self._test = test
        self._lock = threading.Lock()
        self._changed = False
        self.is_there = holds_something(self.path)
        self._recorded = read(self.path) if self.is_there and record != "all" else []
        self._new: list[Exchange] = []
        self._meanings: dict[Exchange, tuple[int, dict[str, Any]]] = {}

    def __repr__(self) -> str:
        return (
            f"Cassette({show_path(self.path)!r}, {self.mode!r}, {len(self)} exchanges)"
        )

    def __len__(self) -> int:
        return len(self.exchanges)

    @property
    def exchanges(self) -> list[Exchange]:
        """The exchanges that are, or will be, in the file, in order."""
        return [*self._recorded, *self._new]

    @property
    def is_recording(self) -> bool:
        """Whether a request may be sent."""
        return self.mode in {"new", "all"} or (
            self.mode == "once" and not self.is_there
        )

    def ignores(self, uri: str) -> bool:
        """Say whether requests to this address are neither recorded nor answered."""
        parts = urlsplit(uri)
        host = parts.hostname or ""
        names = {host, f"{host}:{parts.port}"}
        return any(is_named(name, self.ignore_hosts) for name in names) or (
            self._ignore_localhost and is_loopback(host)
        )

    def answer(self, request: Request) -> Answer | None:
        """Return the recorded answer to a request; each is given once.

        Returns:
            None if the request is to be sent: it is to be recorded, or a hook ignores it.

        Raises:
            CassetteMismatchError: There is no answer, and nothing may be sent.
        """
        self._learn(request)
        changed = self._changed_request(request)
        if changed is None:
            return None
        if header(request.headers, "upgrade").lower() == "websocket":
            raise self.refuse(f"{_describe(request)}: a WebSocket cannot be recorded.")
        meaning = self._meaning(changed)
        with self._lock:
            exchange = self._find(meaning)
            if exchange is not None:
                self._use(exchange)
                self.requests.append(request)
                return exchange.answer
            if self.is_recording:
                return None
            text = self._explain(meaning)
        raise self.refuse(text)

    def _find(self, meaning: Mapping[str, Any]) -> Exchange | None:
        fitting = [e for e in self._recorded if not self._different(e, meaning)]
        unused = next((e for e in fitting if not e.used), None)
        return fitting[-1] if fitting and self._allow_repeats and not unused else unused

    def _use(self, exchange: Exchange) -> None:
        exchange.used = True
        if self._test and self.is_recording and self._test not in exchange.tests:
            exchange.tests = (*exchange.tests, self._test)
            self._changed = True

    def keep(self, request: Request) -> Answer:
        """Return the answer to fill while the network answers; `save` writes it."""
        changed = self._changed_request(request)
        if changed is None:
            return Answer()
        by = f"dipeo_llm {version('dipeo-llm')} on litellm {version('litellm')}"
        tests = (self._test,) if self._test else ()
        exchange = Exchange(changed, Answer(), True, _real_now(), by, tests)
        with self._lock:
            self._new.append(exchange)
            self.requests.append(request)
            self._changed = True
        return exchange.answer

    def refuse(self, message: str) -> CassetteMismatchError:
        """Return an error, and remember it: it fails the test even if it is caught."""
        error = CassetteMismatchError(message)
        self.mismatches.append(error)
        return error

    def refuse_connection(self, what: str) -> NetworkBlockedError:
        """Return the error for a connection that no HTTP client known here opens."""
        if self.is_recording:
            message = (
                f"refused to {what}: no HTTP client that a cassette can record opens"
                f" this connection.\nignore_hosts=[…] lets it pass, in replays too."
            )
        else:
            message = (
                f"refused to {what}: the network is closed by block_network, because the"
                " test replays a cassette.\nignore_hosts=[…] lets it pass."
            )
        self.refuse(message)
        return NetworkBlockedError(message)

    def verify(self) -> None:
        """Assert that the requests were those of the cassette, no more and no fewer.

        In mode "new" unused exchanges are dropped instead.

        Raises:
            CassetteMismatchError: A request was refused, and the program continued.
            CassetteUnusedError: A recorded request was not made.
        """
        if self.mismatches:
            raise self.mismatches[0]
        unused = [e for e in self._recorded if not e.used and self._is_mine(e)]
        if not unused or self._allow_unused:
            return
        if self.mode == "new":
            # An exchange of a shared file goes with the last test that used it.
            gone = {e for e in unused if not self._test or e.tests == (self._test,)}
            for exchange in unused:
                exchange.tests = tuple(t for t in exchange.tests if t != self._test)
            self._recorded = [e for e in self._recorded if e not in gone]
            self._changed = True
            return
        number = {e: i for i, e in enumerate(self._recorded, 1)}
        lines = [f"  exchange {number[e]}: {self._line(e)}" for e in unused]
        raise CassetteUnusedError(
            f"{len(unused)} of {len(self._recorded)} recorded exchanges of"
            f" {show_path(self.path)} were not used:\n"
            + "\n".join(lines)
            + "\nThe test no longer makes these calls. If that is intended,\n"
            f"  {self._again.format(mode='new')}\ndrops them; allow_unused=True keeps"
            " them."
        )

    def _is_mine(self, exchange: Exchange) -> bool:
        return not exchange.tests or not self._test or self._test in exchange.tests

    def save(self) -> None:
        """Write the file without secrets, if there is anything new.

        Raises:
            SecretLeftError: A secret would be left in it.
        """
        if self._changed:
            for exchange in self._new:
                exchange.answer.settle()
            self._new = [*filter(None, map(self._change, self._new))]
        if not self._changed or not self.exchanges or self._may_be_wrong():
            return
        kept = [scrub(exchange, self.secrets) for exchange in self.exchanges]
        left = [
            f"  exchange {number}, {finding}"
            for number, exchange in enumerate(kept, 1)
            for finding in secrets_in(exchange, self.secrets)
        ]
        text = self.secrets.scrub(self._head(kept)) + as_text(kept)
        left += [f"  {f.what}" for f in self.secrets.find(text) if not left]
        if left:
            raise SecretLeftError(
                f"{show_path(self.path)} was not written, a secret would be left in it:\n"
                + "\n".join(left)
                + "\nA key that a model repeats in pieces, or that is part of other data,"
                " cannot be removed without damage: change the test, or remove it in"
                " before_record_response."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(text, encoding="utf-8", newline="\n")
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)
        self._changed = False
        self.written = len(self._new)

    def _may_be_wrong(self) -> bool:
        failures = [e.answer.failure for e in self._new if e.answer.failure]
        return self.test_failed and any(f.kind != "unread" for f in failures)

    def _change(self, exchange: Exchange) -> Exchange | None:
        if self._change_response is not None:
            response = self._change_response(response_of(exchange.answer))
            if response is None:
                return None
            exchange.answer = answer_from(response)
        return exchange

    def _changed_request(self, request: Request) -> Request | None:
        if self._change_request is None:
            return request
        changed = self._change_request(vcrpy_request(request))
        return None if changed is None else from_vcrpy(changed)

    def age(self, now: datetime | None = None) -> float | None:
        """Return the days since its oldest exchange was recorded, None if unknown."""
        dates = [e.recorded_at for e in self.exchanges]
        known = [date for date in dates if date]
        if not known or len(known) < len(dates):
            return None
        return ((now or _real_now()) - min(known)).total_seconds() / 86_400

    def _learn(self, request: Request) -> None:
        self.secrets.learn_from_headers(request.headers)
        for finding in self.secrets.find(request.uri):
            self.secrets.learn(request.uri[finding.start : finding.end])

    def _meaning(self, request: Request) -> dict[str, Any]:
        # Both sides are scrubbed, because a key in a prompt differs in each run.
        body, _ = self.secrets.scrub_pieces(request.body, ())
        uri = self.secrets.scrub(request.uri)
        return matching.as_data(
            request.method, uri, body, self._ignore, request.content_type
        )

    def _meaning_of(self, exchange: Exchange) -> dict[str, Any]:
        """Return what a recorded request means by the secrets known now."""
        known = len(self.secrets)
        if self._meanings.get(exchange, (-1, {}))[0] != known:
            self._meanings[exchange] = known, self._meaning(exchange.request)
        return self._meanings[exchange][1]

    def _different(
        self, exchange: Exchange, meaning: Mapping[str, Any]
    ) -> list[matching.Difference]:
        return matching.differences(self._meaning_of(exchange), meaning)

    def _line(self, exchange: Exchange) -> str:
        return matching.summary(self._meaning_of(exchange))

    def _explain(self, meaning: Mapping[str, Any]) -> str:
        again = self._again.format(mode="new" if self._recorded else "once")
        lines = [
            f"no exchange of {show_path(self.path)} answers this request:",
            f"  {matching.summary(meaning)}",
        ]
        same = [e for e in self._recorded if not self._different(e, meaning)]
        left = [e for e in self._recorded if not e.used] or self._recorded
        if not self.is_there:
            lines += ["There is no such cassette yet."]
        elif not left:
            lines += ["The cassette is empty."]
        elif same:
            times = "once" if len(same) == 1 else f"{len(same)} times"
            lines += [f"It was recorded {times}, and is made once more now."]
        else:
            meanings = [self._meaning_of(e) for e in left]
            near = left[matching.nearest(meaning, meanings)]
            number = self._recorded.index(near) + 1
            count = f"{number} of {len(self._recorded)}"
            used = ", which is used already" if near.used else ""
            lines += [
                f"The nearest recorded request, exchange {count}{used}, differs in:",
                matching.explain(self._different(near, meaning)),
            ]
        lines += [
            "Nothing was sent. If this request is intended, record it:",
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


def _as_tuple(given: Sequence[str] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _describe(request: Request) -> str:
    return f"{request.method} {host_of(request.uri)}{urlsplit(request.uri).path}"


def _real_now() -> datetime:
    """Return the time, also where a test freezes it: the file system's clock goes on."""
    with tempfile.TemporaryFile() as file:
        seconds = int(os.fstat(file.fileno()).st_mtime)
    return _EPOCH + seconds * _SECOND


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC) - _EPOCH


@contextmanager
def open_cassette(cassette: Cassette) -> Iterator[Cassette]:
    """Let a cassette answer, and write what it has recorded at the end.

    Connections that are not on the cassette are refused, except to this machine and to
    ignored hosts. In a replay, names are not looked up either, and each provider's key
    that is not in the environment is there as `REPLAY_KEY`.
    """
    load_litellm()
    with ExitStack() as stack:
        stack.callback(cassette.save)
        stack.enter_context(intercept(cassette))
        stack.enter_context(
            block_network(
                allow_hosts=[host.partition(":")[0] for host in cassette.ignore_hosts],
                lookups=not cassette.is_recording,
                refuse=cassette.refuse_connection,
            )
        )
        if not cassette.is_recording:
            stack.enter_context(_keys_in_environment())
            if not cassette.real_timing:
                stack.enter_context(_no_waits())
        yield cassette


def load_litellm() -> None:
    """Import LiteLLM before a test freezes the time, in which the import fails.

    Raises:
        CassetteError: It cannot be imported.
    """
    try:
        import_litellm()
    except Exception as exc:
        raise CassetteError(
            f"LiteLLM cannot be imported: {exc!r}\nIf the test freezes the time, open the"
            " cassette first."
        ) from exc


@contextmanager
def use_cassette(path: str | os.PathLike[str], **options: Any) -> Iterator[Cassette]:
    """Answer from a cassette, or record it; at the end every exchange must be used.

    Args:
        path: The file.
        **options: As for `Cassette`.

    Raises:
        CassetteError: As its subclasses say; from inside, or at the end.
    """
    with open_cassette(Cassette(path, **options)) as cassette:
        try:
            yield cassette
        except BaseException:
            cassette.test_failed = True
            raise
        cassette.verify()


def warn_if_stale(cassette: Cassette, most_days: float) -> None:
    """Warn if a cassette is older than *most_days*, or does not say how old it is."""
    age = cassette.age()
    if not cassette.is_there or cassette.is_recording:
        return
    if age is None or age > most_days:
        known = "of unknown age" if age is None else f"{age:.0f} days old"
        message = (
            f"{show_path(cassette.path)} is {known}; --llm-max-age is {most_days:g}"
        )
        warnings.warn(StaleCassetteWarning(message), stacklevel=2)


@contextmanager
def _keys_in_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for row in providers.PROVIDERS:
            if row.key_variables and not any(map(os.environ.get, row.key_variables)):
                patch.setenv(row.key_variables[0], REPLAY_KEY)
        # The providers that only LiteLLM knows are too many to be set one by one.
        real = EnvironmentAPIKeys.get_api_key
        patch.setattr(EnvironmentAPIKeys, "get_api_key", _with_replay_key(real))
        yield


def _with_replay_key(real: Callable[..., Any]) -> Callable[..., Any]:
    def get_api_key(self: EnvironmentAPIKeys, api_key_id: str) -> Any:
        try:
            return real(self, api_key_id)
        except APIKeyNotFoundError as exc:
            if exc.service is None:
                raise
            return {"id": api_key_id, "service": exc.service, "key": REPLAY_KEY}

    return get_api_key


@contextmanager
def _no_waits() -> Iterator[None]:
    """Retry at once: the server that asked for patience is not there."""
    import stamina

    with stamina.set_testing(True, attempts=1_000_000, cap=True):
        yield
