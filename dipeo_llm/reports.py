"""Hands the record of each call to the ledger, the call log, telemetry and `on_call`."""

import asyncio
import inspect
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

from dipeo_llm.call_log import log_call
from dipeo_llm.ledger import Ledger
from dipeo_llm.progress import CallProgress
from dipeo_llm.record import CallRecord

if TYPE_CHECKING:
    from dipeo_llm.streaming import ChatStream
    from dipeo_llm.telemetry import Telemetry

_log = logging.getLogger("dipeo_llm")

CallHook: TypeAlias = Callable[[CallRecord], Any]
"""A function, or a coroutine function, that is called after each call."""

# Seconds that a call has to end after its connection was closed.
_ENDING = 1.0


class CallReporter:
    """Reports each call once, when it has ended.

    Safe for several event loops.

    Args:
        on_call: Called with the record of each call.
        telemetry: Reports each record to OpenTelemetry.
    """

    def __init__(
        self,
        on_call: CallHook | None = None,
        telemetry: "Telemetry | None" = None,
    ) -> None:
        self.ledger = Ledger()
        self._on_call = on_call
        self._telemetry = telemetry
        self._calls: set[asyncio.Task[Any]] = set()
        self._hooks: set[asyncio.Task[Any]] = set()
        self.streams: WeakSet[ChatStream[Any]] = WeakSet()
        """The streams that were opened; those of them that are still open end with the
        service."""

    def begin(self, progress: CallProgress) -> CallProgress:
        """Let telemetry note the context of a call that begins; return its progress."""
        if self._telemetry is not None:
            progress.trace = self._telemetry.begin()
        return progress

    def watch(self, progress: CallProgress) -> "_Watched":
        """Return a context manager that reports a call at the end of its block."""
        return _Watched(self, progress, self._calls)

    async def report(self, progress: CallProgress) -> None:
        """Report a call that has ended; once, however often this is called.

        Waits for a hook that is a coroutine, unless the call was cancelled: then
        `aclose` does.
        """
        hook = self._report(progress)
        if hook is not None and not progress.is_cancelled:
            # Cancelling this wait does not cancel the hook, whose errors stay in it.
            await asyncio.wait([hook])

    def report_dropped(self, progress: CallProgress) -> None:
        """Report a stream that was dropped without being left.

        May be called by the garbage collector, in any thread.
        """
        if progress.is_recorded:
            return
        if progress.loop.is_running():
            with suppress(RuntimeError):  # the loop has just closed
                progress.loop.call_soon_threadsafe(self._report, progress)
                return
        self._report(progress)

    async def aclose(self, grace: float) -> None:
        """Wait for the calls that are ending, and for their hooks; report open streams.

        Args:
            grace: Seconds that hooks have to end, at least 1; then they are cancelled.
        """
        await _wait_for_end(self._calls, _ENDING)
        await self._end_streams()
        if hooks := await _wait_for_end(self._hooks, max(grace, _ENDING)):
            _log.warning("%d on_call hooks did not end and were cancelled", len(hooks))
        for task in hooks:
            with suppress(RuntimeError):  # its loop has just closed
                task.get_loop().call_soon_threadsafe(task.cancel)

    async def _end_streams(self) -> None:
        """Report the streams that are still open.

        A task that reads one gets its error first, and the stream is reported with it.
        """
        here = asyncio.current_task()
        give_up_at = time.monotonic() + _ENDING
        while any(stream.is_read_beside(here) for stream in list(self.streams)):
            if time.monotonic() > give_up_at:
                break
            await asyncio.sleep(0.01)
        is_late = False
        for stream in list(self.streams):
            progress = stream.progress
            if progress is not None and not progress.is_recorded:
                self.report_dropped(progress)
                is_late = True
        if is_late:
            await asyncio.sleep(0.01)  # the loops of the streams report them

    def _report(self, progress: CallProgress) -> "asyncio.Task[None] | None":
        if progress.is_recorded:
            return None
        progress.is_recorded = True
        record = progress.record()
        self.ledger.add(record)
        log_call(record)
        if self._telemetry is not None:
            self._trace(self._telemetry, record, progress)
        return None if self._on_call is None else self._run_hook(self._on_call, record)

    def _trace(
        self, telemetry: "Telemetry", record: CallRecord, progress: CallProgress
    ) -> None:
        of_the_call = sys.exception()
        kept, progress.trace = progress.trace, None
        try:
            telemetry.report(record, kept)
        # A span processor or an exporter of the application's may raise anything.
        except Exception as exc:  # noqa: BLE001 - logged
            _forget_context(exc, of_the_call)
            _log.error("telemetry failed", exc_info=exc)

    def _run_hook(
        self, on_call: CallHook, record: CallRecord
    ) -> "asyncio.Task[None] | None":
        of_the_call = sys.exception()
        # The ledger may add its record up later, so the hook gets one of its own.
        record = replace(
            record,
            usage=record.usage and record.usage.model_copy(),
            options=dict(record.options),
            labels=dict(record.labels),
        )
        try:
            made = on_call(record)
        except (KeyboardInterrupt, SystemExit):
            raise
        # Nobody can cancel a function, so a CancelledError is the hook's own too.
        except BaseException as exc:  # noqa: BLE001 - logged
            _forget_context(exc, of_the_call)
            _log.error("on_call failed", exc_info=exc)
            return None
        if not inspect.isawaitable(made):
            return None
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            if inspect.iscoroutine(made):
                made.close()
            _log.warning("on_call was not awaited: its event loop has ended")
            return None
        task = loop.create_task(_wait_for(made))
        self._hooks.add(task)
        task.add_done_callback(self._hooks.discard)
        return task


async def _wait_for_end(
    tasks: set[asyncio.Task[Any]], seconds: float
) -> list[asyncio.Task[Any]]:
    """Wait until no task is left but the current one; return those that are late."""
    here = asyncio.current_task()
    give_up_at = time.monotonic() + seconds
    # Polled, because a loop in another thread may end without notifying anybody.
    while running := [
        task
        for task in list(tasks)
        if task is not here and not task.get_loop().is_closed()
    ]:
        if time.monotonic() > give_up_at:
            break
        await asyncio.sleep(0.01)
    return running


class _Watched:
    """Reports a call at the end of its block."""

    __slots__ = ("_calls", "_progress", "_reporter", "_task")

    def __init__(
        self,
        reporter: CallReporter,
        progress: CallProgress,
        calls: set[asyncio.Task[Any]],
    ) -> None:
        self._reporter = reporter
        self._progress = progress
        self._calls = calls
        self._task = asyncio.current_task()

    async def __aenter__(self) -> None:
        if self._task is not None:
            self._calls.add(self._task)

    async def __aexit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        if error is not None:
            self._progress.fail(error)
        if self._task is not None:
            self._calls.discard(self._task)
        await self._reporter.report(self._progress)


async def _wait_for(hook: Awaitable[Any]) -> None:
    task = asyncio.current_task()
    try:
        await hook
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as exc:
        # `aclose` cancels a hook that is late, and logs it.
        if isinstance(exc, asyncio.CancelledError) and task and task.cancelling():
            raise
        _log.exception("on_call failed")


def _forget_context(error: BaseException, context: BaseException | None) -> None:
    """Cut the call's error, which may quote the prompt, off the chain of another error."""
    while error.__context__ is not None:
        if error.__context__ is context:
            error.__context__ = None
            return
        error = error.__context__
