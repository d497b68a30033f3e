"""One open client for each use of it, shared by all calls that fit it.

Knows that a client can be made and closed, and nothing else of it. aiocache keeps the
entries and their time to live; leases decide when a client that has left the cache is
closed: when its last call ends, not before.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

_log = logging.getLogger("dipeo_llm")


class Closable(Protocol):
    """What the pool keeps."""

    async def aclose(self) -> None:
        """Close it."""
        ...


C = TypeVar("C", bound=Closable)


class _Slot(Generic[C]):
    """A client and who uses it."""

    __slots__ = ("client", "key", "leases", "retired", "timer", "used")

    def __init__(self, key: Hashable, client: C) -> None:
        self.key = key
        self.client = client
        self.leases = 0
        self.used = 0
        self.retired = False
        self.timer: asyncio.TimerHandle | None = None


class Lease(Generic[C]):
    """The right to use a client until `release`, or the end of an `async with`."""

    __slots__ = ("_clients", "_slot", "client")

    def __init__(self, clients: "_LoopClients[C]", slot: _Slot[C]) -> None:
        self._clients = clients
        self._slot: _Slot[C] | None = slot
        self.client = slot.client

    async def __aenter__(self) -> C:
        return self.client

    async def __aexit__(self, *exc: object) -> None:
        await self.release()

    async def release(self) -> None:
        """Give the client back. May be called twice.

        The last lease of a client that has left the pool closes it and waits for that,
        which a cancelled caller does not undo.
        """
        slot, self._slot = self._slot, None
        if slot is not None:
            await self._clients.release(slot)


class Pool(Generic[C]):
    """Clients by key, for any number of event loops; no two loops share one.

    Args:
        ttl: Seconds that a client is handed out after it was made; above 0.
        max_clients: Clients of one loop; past it, the one unused for longest goes.
    """

    def __init__(self, *, ttl: float = 3600.0, max_clients: int = 64) -> None:
        self._ttl = ttl
        self._max_clients = max_clients
        self._lock = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, _LoopClients[C]] = {}

    async def lease(self, key: Hashable, make: Callable[[], Awaitable[C]]) -> Lease[C]:
        """Return the client of *key* on this loop, made by *make* if there is none.

        However many ask at once, *make* runs once; its failure reaches all that wait
        and is not kept. A caller that is cancelled while it waits leaves the others
        waiting, and the client in the pool.
        """
        clients = self._loops.get(asyncio.get_running_loop())
        if clients is None:
            clients = await self._open_loop()
        return await clients.lease(key, make)

    async def _open_loop(self) -> "_LoopClients[C]":
        loop = asyncio.get_running_loop()
        with self._lock:
            for old in [old for old in self._loops if old.is_closed()]:
                del self._loops[old]
            clients = self._loops.get(loop)
            if clients is not None:
                return clients
            clients = self._loops[loop] = _LoopClients(self._ttl, self._max_clients)
        clients.keeper = self._close_with(loop, clients)
        await anext(clients.keeper)
        return clients

    async def _close_with(
        self, loop: asyncio.AbstractEventLoop, clients: "_LoopClients[C]"
    ) -> AsyncGenerator[None, None]:
        """Close the clients when the loop ends, whoever forgets `aclose`.

        `asyncio.run` and its like close the loop's asynchronous generators before the
        loop: one that hangs in a `yield` then runs its `finally`, still on the loop.
        """
        try:
            yield
        finally:
            with self._lock:
                self._loops.pop(loop, None)
            clients.keeper = None  # it is this generator
            await clients.aclose(grace=0.0)

    async def aclose(self, grace: float = 0.0) -> None:
        """Close the clients of every running loop. May be called twice.

        Args:
            grace: Seconds that calls have to end; then their client is closed under
                them. No new call may begin meanwhile.
        """
        here = asyncio.get_running_loop()
        with self._lock:
            loops, self._loops = self._loops, {}
        elsewhere = [
            asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(clients.aclose(grace), loop)
            )
            for loop, clients in loops.items()
            if loop is not here and loop.is_running()
        ]
        if here in loops:
            await loops[here].aclose(grace)
        if elsewhere:
            await asyncio.wait(elsewhere)

    def __len__(self) -> int:
        """Count the open clients of all loops."""
        return sum(len(clients.slots) for clients in list(self._loops.values()))


class _LoopClients(Generic[C]):
    """The clients of one event loop. Every method runs on that loop."""

    def __init__(self, ttl: float, max_clients: int) -> None:
        # Imported with the first call, as it takes 30 ms.
        from aiocache import SimpleMemoryCache

        # timeout=0 spares each look-up a task of its own.
        self._cache: Any = SimpleMemoryCache(timeout=0)
        self._ttl = ttl
        self._max_clients = max_clients
        self._making: dict[Hashable, asyncio.Task[_Slot[C]]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._uses = itertools.count()
        self._none_left = asyncio.Event()
        self.slots: set[_Slot[C]] = set()
        self.keeper: AsyncGenerator[None, None] | None = None

    async def lease(self, key: Hashable, make: Callable[[], Awaitable[C]]) -> Lease[C]:
        slot: _Slot[C] | None = await self._cache.get(key)
        while slot is None or slot.retired:
            # The task belongs to nobody: a caller that is cancelled leaves it running.
            slot = await asyncio.shield(self._making.get(key) or self._start(key, make))
        slot.leases += 1
        slot.used = next(self._uses)
        return Lease(self, slot)

    async def release(self, slot: _Slot[C]) -> None:
        slot.leases -= 1
        if slot.retired and slot.leases == 0:
            await asyncio.shield(self._start_close(slot))

    def _start(
        self, key: Hashable, make: Callable[[], Awaitable[C]]
    ) -> asyncio.Task[_Slot[C]]:
        def done(task: asyncio.Task[_Slot[C]]) -> None:
            del self._making[key]
            # If every caller was cancelled, nobody else reads a failure.
            _ = task.cancelled() or task.exception()

        task = asyncio.create_task(self._make(key, make))
        self._making[key] = task
        task.add_done_callback(done)
        return task

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[C]]) -> _Slot[C]:
        slot = _Slot(key, await make())
        self.slots.add(slot)
        await self._cache.set(key, slot, ttl=self._ttl)
        # aiocache forgets an entry without a word, so its end is timed beside it.
        loop = asyncio.get_running_loop()
        slot.timer = loop.call_later(self._ttl, self._retire, slot)
        if len(self.slots) > self._max_clients:
            idle = [s for s in self.slots if not s.leases and s is not slot]
            if idle:
                self._retire(min(idle, key=lambda s: s.used))
        return slot

    def _retire(self, slot: _Slot[C]) -> None:
        """Hand a client out no more, and close it now if nobody uses it."""
        slot.retired = True
        if slot.timer is not None:
            slot.timer.cancel()
        if slot.leases == 0:
            self._start_close(slot)

    def _start_close(self, slot: _Slot[C]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._close(slot))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _close(self, slot: _Slot[C]) -> None:
        if slot not in self.slots:
            return
        self.slots.discard(slot)
        if await self._cache.get(slot.key) is slot:
            await self._cache.delete(slot.key)
        try:
            await slot.client.aclose()
        except Exception:  # noqa: BLE001 - a client that will not close ends no call
            _log.warning("a client could not be closed", exc_info=True)
        finally:
            if not self.slots:
                self._none_left.set()

    async def aclose(self, grace: float) -> None:
        if self._making:
            await asyncio.wait(list(self._making.values()))
        for slot in list(self.slots):
            self._retire(slot)
        if self.slots:
            self._none_left.clear()
            try:
                async with asyncio.timeout(grace):
                    await self._none_left.wait()
            except TimeoutError:
                for slot in list(self.slots):
                    self._start_close(slot)
        if self._closing:
            await asyncio.wait(list(self._closing))
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            await keeper.aclose()
