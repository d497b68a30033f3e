"""One open client per key, shared by all calls with that key.

Knows only that a client can be created and closed. aiocache holds the entries and their
time to live. Leases decide when a client that has left the cache closes: when its last
call ends, not before.
"""

import asyncio
import contextlib
import contextvars
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from dipeo_llm.errors import ServiceUnavailableError

_log = logging.getLogger("dipeo_llm")

# Seconds that `Pool.aclose` waits, after the grace, for a loop in another thread.
_LOOP_TIMEOUT = 5.0


class Closable(Protocol):
    """A client that the pool can close."""

    async def aclose(self) -> None:
        """Close it."""
        ...


C = TypeVar("C", bound=Closable)


class _Slot(Generic[C]):
    """A client, created or being created, and its users.

    A caller is counted in `leases` as soon as it asks, so that a new client never looks
    idle before the callers that waited for it have run.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.client: C | None = None
        self.failure: Exception | None = None
        self.trace: TracebackType | None = None
        self.made = asyncio.Event()
        self.making: asyncio.Task[None] | None = None
        self.closing: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.leases = 0
        self.used = 0
        self.retired = False


class Lease(Generic[C]):
    """The right to use a client until `release`, or the end of an `async with`."""

    __slots__ = ("_clients", "_slot", "client")

    def __init__(self, clients: "_LoopClients[C]", slot: _Slot[C], client: C) -> None:
        self._clients = clients
        self._slot: _Slot[C] | None = slot
        self.client = client

    async def __aenter__(self) -> C:
        return self.client

    async def __aexit__(self, *exc: object) -> None:
        await self.release()

    async def release(self) -> None:
        """Give the client back. May be called twice.

        The last lease of a client that has left the pool closes the client and waits
        until it is closed; cancelling the caller does not stop that.
        """
        slot, self._slot = self._slot, None
        if slot is not None:
            await self._clients.release(slot)


class Pool(Generic[C]):
    """Clients by key, for any number of event loops; two loops never share a client.

    Args:
        ttl: Seconds that a client is leased after its creation; above 0.
        max_clients: Clients of one loop; above it, the longest idle one closes.
        grace: Seconds that calls in flight have to end when their loop ends.
    """

    def __init__(
        self, *, ttl: float = 3600.0, max_clients: int = 64, grace: float = 0.0
    ) -> None:
        self._ttl = ttl
        self._grace = grace
        self._max_clients = max_clients
        self._lock = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, _LoopClients[C]] = {}
        self._closed = False

    async def lease(self, key: Hashable, make: Callable[[], Awaitable[C]]) -> Lease[C]:
        """Return the client of *key* on this loop; call *make* for the first one.

        *make* runs once, however many callers wait for it. Its failure is raised in all
        of them and is not kept. Cancelling one caller affects neither the others nor
        the client.

        Raises:
            ServiceUnavailableError: The pool is closed, or was closed before the client
                was created.
        """
        clients = self._loops.get(asyncio.get_running_loop())
        if clients is None:
            clients = await self._open_loop()
        return await clients.lease(key, make)

    def permits(self, key: Hashable, limit: int) -> asyncio.Semaphore:
        """Return the semaphore of *limit* permits that the clients of *key* share.

        A client that has left the pool still has calls in flight, so its replacement
        must count them.
        """
        shared = self._loops[asyncio.get_running_loop()].permits
        return shared.setdefault(key, asyncio.Semaphore(limit))

    async def _open_loop(self) -> "_LoopClients[C]":
        loop = asyncio.get_running_loop()
        clients: _LoopClients[C] = _LoopClients(self._ttl, self._max_clients)
        with self._lock:
            if self._closed:
                raise _closed_error()
            self._forget_closed_loops()
            self._loops[loop] = clients
        clients.keeper = self._close_with(loop, clients)
        await anext(clients.keeper)
        return clients

    async def _close_with(
        self, loop: asyncio.AbstractEventLoop, clients: "_LoopClients[C]"
    ) -> AsyncGenerator[None, None]:
        """Close the clients when the loop ends, even if `aclose` is never called.

        `asyncio.run` closes the loop's asynchronous generators before the loop, so that
        a generator that waits in a `yield` runs its `finally` on the loop.
        """
        try:
            yield
        finally:
            with self._lock:
                self._loops.pop(loop, None)
            clients.keeper = None  # this generator
            await clients.aclose(self._grace)

    async def aclose(self, grace: float = 0.0) -> None:
        """Close the clients of every loop, and the pool for good. May be called twice.

        Args:
            grace: Seconds that calls in flight have to end; then their client closes.
                New calls are refused from now on.

        A loop in another thread closes its own clients: if it is not running, when it
        runs again. A loop that is stuck is not waited for.
        """
        here = asyncio.get_running_loop()
        give_up_at = time.monotonic() + grace + _LOOP_TIMEOUT
        with self._lock:
            self._closed = True
            self._forget_closed_loops()
            loops = dict(self._loops)
        ours = loops.pop(here, None)
        running = []
        for loop, clients in loops.items():
            if clients.process != os.getpid():
                continue  # inherited through a fork; the parent closes it
            with contextlib.suppress(RuntimeError):  # the loop has just closed
                loop.call_soon_threadsafe(clients.start_aclose, grace)
                if loop.is_running():
                    running.append((loop, clients))
        if ours is not None:
            await ours.aclose(grace)
        # Polled, because a loop may end without notifying anybody.
        while running := [
            (loop, clients)
            for loop, clients in running
            if not (clients.ended or loop.is_closed())
        ]:
            if time.monotonic() > give_up_at:
                _log.warning("%d event loops did not close their clients", len(running))
                break
            await asyncio.sleep(0.01)

    def __len__(self) -> int:
        """Return the number of open clients of all loops."""
        return sum(len(clients.slots) for clients in list(self._loops.values()))

    def _forget_closed_loops(self) -> None:
        for loop in [loop for loop in self._loops if loop.is_closed()]:
            del self._loops[loop]


class _LoopClients(Generic[C]):
    """The clients of one event loop. Every method runs on that loop."""

    def __init__(self, ttl: float, max_clients: int) -> None:
        # Imported by the first call, because the import takes 30 ms.
        from aiocache import SimpleMemoryCache

        # With a timeout, aiocache creates a task for each look-up.
        self._cache: Any = SimpleMemoryCache(timeout=0)
        self._ttl = ttl
        self._max_clients = max_clients
        self._making: dict[Hashable, _Slot[C]] = {}
        self._uses = itertools.count()
        self._all_closed = asyncio.Event()
        self._closed = False
        self._grace_is_over = False
        self._acloser: asyncio.Task[None] | None = None
        self.process = os.getpid()
        self.permits: WeakValueDictionary[Hashable, asyncio.Semaphore] = (
            WeakValueDictionary()
        )
        self.slots: set[_Slot[C]] = set()
        self.keeper: AsyncGenerator[None, None] | None = None
        self.ended = False
        """Whether everything is closed; read by other threads too."""

    async def lease(self, key: Hashable, make: Callable[[], Awaitable[C]]) -> Lease[C]:
        if self._closed:
            raise _closed_error()
        # `get` adds 4 µs: it looks at settings that are not used here.
        slot: _Slot[C] | None = await self._cache._get(key)  # noqa: SLF001
        if slot is None or slot.retired:
            slot = self._making.get(key)
        if slot is None:
            slot = self._making[key] = _Slot(key)
            slot.leases = 1
            self._start(slot, make)
        else:
            slot.leases += 1
        try:
            await slot.made.wait()
            if slot.failure is not None:
                # The traceback of the failure, without the frames of other callers.
                raise slot.failure.with_traceback(slot.trace)
        except BaseException:
            self._give_back(slot)
            raise
        assert slot.client is not None  # noqa: S101 - created without a failure
        return Lease(self, slot, slot.client)

    async def release(self, slot: _Slot[C]) -> None:
        self._give_back(slot)
        if slot.closing is not None:
            await asyncio.wait([slot.closing])

    def _start(self, slot: _Slot[C], make: Callable[[], Awaitable[C]]) -> None:
        # The task is independent of its caller: cancelling the caller does not cancel
        # it, and its timers, which last as long as the client, hold no caller's context.
        self._all_closed.clear()
        context = contextvars.Context()
        slot.making = context.run(asyncio.create_task, self._make(slot, make))

    async def _make(self, slot: _Slot[C], make: Callable[[], Awaitable[C]]) -> None:
        try:
            slot.client = await make()
            self.slots.add(slot)
            await self._keep(slot)
        except Exception as exc:  # noqa: BLE001 - raised in every waiting caller
            slot.failure, slot.trace = exc, exc.__traceback__
        except BaseException:
            # The waiting callers were not cancelled, so they must not see CancelledError.
            slot.failure = (
                _closed_error()
                if self._closed
                else ServiceUnavailableError("creating the client was cancelled")
            )
            raise
        finally:
            del self._making[slot.key]
            slot.made.set()
            self._check_idle()

    async def _keep(self, slot: _Slot[C]) -> None:
        """Put a new client into the cache."""
        if self._grace_is_over:
            slot.failure = _closed_error()
            self._close_soon(slot)
            return
        if not slot.retired:
            await self._cache.set(slot.key, slot, ttl=self._ttl)
            # With AIOCACHE_DISABLE=1 nothing is stored, and the client serves once.
            slot.retired = await self._cache.get(slot.key) is not slot
        if slot.retired:
            self._retire(slot)
            return
        # aiocache drops an entry silently, so a timer of ours retires the client.
        loop = asyncio.get_running_loop()
        slot.timer = loop.call_later(self._ttl, self._retire, slot)
        slot.used = next(self._uses)
        self._make_room()

    def _give_back(self, slot: _Slot[C]) -> None:
        slot.leases -= 1
        slot.used = next(self._uses)
        if slot.retired:
            self._retire(slot)
        elif slot.leases == 0:
            self._make_room()

    def _make_room(self) -> None:
        """Retire idle clients above the limit, the longest idle first."""
        if len(self.slots) <= self._max_clients:
            return
        kept = [slot for slot in self.slots if not slot.retired]
        idle = sorted((s for s in kept if not s.leases), key=lambda s: s.used)
        for slot in idle[: max(0, len(kept) - self._max_clients)]:
            self._retire(slot)

    def _retire(self, slot: _Slot[C]) -> None:
        """Stop leasing a client, and close it now if it is idle."""
        slot.retired = True
        if slot.timer is not None:
            slot.timer.cancel()
        if slot.client is not None and slot.leases == 0:
            self._close_soon(slot)

    def _close_soon(self, slot: _Slot[C]) -> asyncio.Task[None]:
        # A loop that ends cancels all tasks; a cancelled one has closed nothing.
        if slot.closing is None or slot.closing.cancelled():
            slot.closing = asyncio.create_task(self._close(slot))
        return slot.closing

    async def _close(self, slot: _Slot[C]) -> None:
        if await self._cache.get(slot.key) is slot:
            await self._cache.delete(slot.key)
        try:
            if slot.client is not None:
                await slot.client.aclose()
        except Exception:  # noqa: BLE001 - no call must fail for it
            _log.warning("a client could not be closed", exc_info=True)
        self.slots.discard(slot)
        self._check_idle()

    def _check_idle(self) -> None:
        if not self.slots and not self._making:
            self._all_closed.set()

    def start_aclose(self, grace: float) -> None:
        self._closed = True
        self._acloser = asyncio.create_task(self.aclose(grace))

    async def aclose(self, grace: float) -> None:
        self._closed = True
        for slot in [*self._making.values(), *self.slots]:
            self._retire(slot)
        self._check_idle()
        try:
            async with asyncio.timeout(grace):
                await self._all_closed.wait()
        except TimeoutError:
            await self._close_under_calls()
        self.ended = True
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            await keeper.aclose()

    async def _close_under_calls(self) -> None:
        self._grace_is_over = True
        making = [s.making for s in self._making.values() if s.making is not None]
        for task in making:
            task.cancel()
        if making:
            await asyncio.wait(making)
        closing = [self._close_soon(slot) for slot in list(self.slots)]
        if closing:
            await asyncio.wait(closing)


def _closed_error() -> ServiceUnavailableError:
    return ServiceUnavailableError(
        "the service was closed before the call had a client", retryable=False
    )
