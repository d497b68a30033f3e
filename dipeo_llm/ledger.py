"""The ledger: tokens and cost of all calls of a service, in all and by key.

Made from the records of calls. Any number of threads and event loops may add to it.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from dipeo_llm.domain import TokenUsage
from dipeo_llm.record import CallRecord

OTHER = "(other)"
"""The key that sums the calls of all keys that are no longer listed."""

MOST_KEYS = 1000
"""Most persons that are listed; likewise models, providers and executions."""

_BATCH = 64
"""Records that are added up at once, which is faster than one by one."""


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """Tokens, cost and number of some calls."""

    calls: int = 0
    """All calls, however they ended."""
    errors: int = 0
    """Calls that failed."""
    cancelled: int = 0
    """Calls that were cancelled, and streams that were left before their end."""
    cached: int = 0
    """Calls that a cache answered; they add no tokens and no cost."""
    requests: int = 0
    """Requests that were sent, including retries."""
    tokens: TokenUsage = field(default_factory=TokenUsage)
    """The sum of the known usage."""
    cost_usd: float = 0.0
    """The sum of the known costs."""
    unknown_usage: int = 0
    """Calls that sent a request, but whose usage is unknown or partial: `tokens` lacks
    what was not told."""
    unknown_cost: int = 0
    """Calls that sent a request, but whose cost is unknown: `cost_usd` lacks them."""


@dataclass(frozen=True, slots=True)
class Usage:
    """A snapshot of a service's usage.

    Each mapping lists the 1,000 keys that were used last; the calls of all earlier ones
    are under "(other)". A call without a person or an execution is only in `total`.
    """

    total: UsageTotals
    by_person: Mapping[str, UsageTotals]
    by_model: Mapping[str, UsageTotals]
    """By the model that was asked for."""
    by_service: Mapping[str, UsageTotals]
    by_execution: Mapping[str, UsageTotals]
    """By `execution_id`."""


class Ledger:
    """Adds up the records of calls, each exactly once.

    Args:
        most_keys: Most keys of each mapping; the least recently used is dropped into
            "(other)". 1,000 keys in each of the four take about 1 MB.
    """

    def __init__(self, most_keys: int = MOST_KEYS) -> None:
        self._most_keys = most_keys
        # Records wait here for the next batch or snapshot. `append` is atomic: it needs
        # no lock, so the garbage collector may add a call in the midst of a batch.
        self._waiting: deque[CallRecord] = deque()
        self._lock = threading.Lock()
        self._books = _Books(most_keys)

    def add(self, record: CallRecord) -> None:
        """Add a call."""
        self._waiting.append(record)
        if len(self._waiting) >= _BATCH and self._lock.acquire(blocking=False):
            try:
                self._add_waiting()
            finally:
                self._lock.release()

    def usage(self, *, reset: bool = False) -> Usage:
        """Return a snapshot of the usage so far.

        Args:
            reset: Whether to start again at zero. No call is lost in between.
        """
        with self._lock:
            self._add_waiting()
            books = self._books
            if reset:
                self._books = _Books(self._most_keys)
            return Usage(
                total=books.total.totals(),
                by_person=books.by_person.totals(),
                by_model=books.by_model.totals(),
                by_service=books.by_service.totals(),
                by_execution=books.by_execution.totals(),
            )

    def _add_waiting(self) -> None:
        waiting, books = self._waiting, self._books
        while waiting:
            record = waiting.popleft()
            books.total.add(record)
            books.by_model.add(record.model, record)
            if record.service is not None:
                books.by_service.add(record.service, record)
            if record.person_id is not None:
                books.by_person.add(record.person_id, record)
            if (execution := record.labels.get("execution_id")) is not None:
                books.by_execution.add(execution, record)


class _Sum:
    """Totals that are still being added to: plain numbers, which cost little."""

    __slots__ = (
        "cache_written",
        "cached",
        "cached_tokens",
        "calls",
        "cancelled",
        "cost",
        "errors",
        "input",
        "output",
        "reasoning",
        "requests",
        "total",
        "unknown_cost",
        "unknown_usage",
    )

    def __init__(self) -> None:
        self.calls = self.errors = self.cancelled = self.cached = self.requests = 0
        self.input = self.output = self.total = 0
        self.cached_tokens = self.cache_written = self.reasoning = 0
        self.unknown_usage = self.unknown_cost = 0
        self.cost = 0.0

    def add(self, record: CallRecord) -> None:
        self.calls += 1
        self.requests += record.requests
        if record.status == "error":
            self.errors += 1
        elif record.status != "ok":
            self.cancelled += 1
        if record.cached:
            self.cached += 1
            return
        usage = record.usage
        if usage is not None:
            self.input += usage.input
            self.output += usage.output
            self.total += usage.total
            self.cached_tokens += usage.cached
            self.cache_written += usage.cache_written
            self.reasoning += usage.reasoning
        if record.requests and (usage is None or record.is_usage_partial):
            self.unknown_usage += 1
        if record.cost_usd is not None:
            self.cost += record.cost_usd
        elif record.requests:
            self.unknown_cost += 1

    def merge(self, other: "_Sum") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def totals(self) -> UsageTotals:
        return UsageTotals(
            calls=self.calls,
            errors=self.errors,
            cancelled=self.cancelled,
            cached=self.cached,
            requests=self.requests,
            tokens=TokenUsage(
                input=self.input,
                output=self.output,
                cached=self.cached_tokens,
                total=self.total,
                cache_written=self.cache_written,
                reasoning=self.reasoning,
            ),
            cost_usd=self.cost,
            unknown_usage=self.unknown_usage,
            unknown_cost=self.unknown_cost,
        )


class _Book:
    """Sums by key, for a limited number of keys."""

    __slots__ = ("_most_keys", "_other", "_sums")

    def __init__(self, most_keys: int) -> None:
        self._most_keys = most_keys
        self._sums: OrderedDict[str, _Sum] = OrderedDict()
        """The least recently used key first."""
        self._other: _Sum | None = None

    def add(self, key: str, record: CallRecord) -> None:
        found = self._sums.get(key)
        if found is None:
            found = self._sums[key] = _Sum()
            if len(self._sums) > self._most_keys:
                _, oldest = self._sums.popitem(last=False)
                self._other = self._other or _Sum()
                self._other.merge(oldest)
        else:
            self._sums.move_to_end(key)
        found.add(record)

    def totals(self) -> dict[str, UsageTotals]:
        found = {key: each.totals() for key, each in self._sums.items()}
        if self._other is not None:
            other = _Sum()
            other.merge(self._other)
            if (of_its_name := self._sums.get(OTHER)) is not None:
                other.merge(of_its_name)
            found[OTHER] = other.totals()
        return found


class _Books:
    """The sum of all calls, and the sums by each kind of key."""

    __slots__ = ("by_execution", "by_model", "by_person", "by_service", "total")

    def __init__(self, most_keys: int) -> None:
        self.total = _Sum()
        self.by_person = _Book(most_keys)
        self.by_model = _Book(most_keys)
        self.by_service = _Book(most_keys)
        self.by_execution = _Book(most_keys)
