"""A call that is cancelled at any of its waits leaves nothing behind, for every provider.

Each test runs a coroutine again and again, and cancels it one wait later each time, until
it comes to its end. The service has room for one request and one connection, so that a
turn, a connection or a lease that is lost holds up the next call.
"""

import asyncio
import gc
import itertools
import os
import signal
import sys
import types
import warnings
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest

from dipeo_llm.keys import StaticAPIKeys
from dipeo_llm.service import LLMInfraService
from dipeo_llm.settings import Engine, Settings
from tests import provider_server
from tests.conftest import HELLO, MODELS, each_provider
from tests.provider_server import DEFAULT_TEXT, Answer, ProviderServer, Raw, Received

# What LiteLLM keeps running behind the calls that it makes, for as long as the loop runs.
LITELLMS_TASKS = {"LoggingWorker._worker_loop"}
GRACE = 60.0
ORDER = "by the caller"

Work = Callable[[LLMInfraService, str], Coroutine[Any, Any, str]]


async def call(service: LLMInfraService, provider: str) -> str:
    """Make a call."""
    return (await service.complete(HELLO, MODELS[provider], provider)).text


async def read(service: LLMInfraService, provider: str) -> str:
    """Read a stream to its end."""
    async with service.stream(HELLO, MODELS[provider], provider) as chunks:
        async for _ in chunks:
            pass
        return (await chunks.result()).text


async def look(service: LLMInfraService, provider: str) -> str:
    """Read the first piece of a stream and leave."""
    async with service.stream(HELLO, MODELS[provider], provider) as chunks:
        async for chunk in chunks:
            if chunk.text:
                return chunk.text
    return ""


async def list_models(service: LLMInfraService, provider: str) -> str:
    """Ask which models there are."""
    return ", ".join(await service.get_available_models(provider))


@dataclass
class AtWait:
    """Runs a coroutine and cancels it at one of its waits.

    Args:
        number: Which one, from 0.
        late: Cancels it when what it waits for has come and it has not run since; else
            when it begins to wait.
    """

    number: int
    late: bool
    waits: int = 0

    @types.coroutine
    def _step(self, work: Coroutine[Any, Any, str]) -> Generator[Any, Any, str]:
        thrown: BaseException | None = None
        while True:
            try:
                awaited = work.send(None) if thrown is None else work.throw(thrown)
            except StopIteration as end:
                return str(end.value)
            if self.waits == self.number:
                self._cancel(awaited)
            self.waits += 1
            try:
                thrown = yield awaited
            except BaseException as exc:  # noqa: BLE001 - handed on
                thrown = exc

    def _cancel(self, awaited: asyncio.Future[Any] | None) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self.late and awaited is not None:
            # Before the task's own callback, so that it finds a result and the order.
            awaited.add_done_callback(lambda _: task.cancel(ORDER))
        else:
            task.cancel(ORDER)

    async def run(self, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        """Return its task, which has ended."""

        async def stepped() -> str:
            return await self._step(work)

        task = asyncio.create_task(stepped())
        await asyncio.wait([task])
        assert task.cancelled() == (self.waits > self.number)
        return task


@dataclass
class AfterTurns:
    """Runs a coroutine and cancels it after some turns of the loop, wherever it is."""

    number: int

    async def run(self, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        """Return its task, which has ended."""
        task = asyncio.create_task(work)
        # Ever longer steps: a call takes hundreds of turns.
        for _ in range(int(1.4**self.number)):
            await asyncio.sleep(0)
        task.cancel(ORDER)
        await asyncio.wait([task])
        return task


Moment = Callable[[int], AtWait | AfterTurns]
MOMENTS: dict[str, Moment] = {
    "early": lambda number: AtWait(number, late=False),
    "late": lambda number: AtWait(number, late=True),
    "turns": AfterTurns,
}


@dataclass
class Complaints:
    """What the loop and Python say of things that were left behind."""

    said: list[str] = field(default_factory=list)

    def loop(self, _: object, context: dict[str, Any]) -> None:
        """Take down what the loop would log."""
        self.said.append(f"{context['message']}: {context.get('exception')!r}")


@pytest.fixture
async def complaints() -> AsyncIterator[Complaints]:
    """Take down what is complained of."""
    gc.freeze()  # what was there before is not looked at: it takes 0.2 s each time
    found = Complaints()
    asyncio.get_running_loop().set_exception_handler(found.loop)
    yield found
    gc.unfreeze()


async def until(true: Callable[[], Any]) -> None:
    """Wait until something holds that another task brings about."""
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110 - a server's counter tells nobody
            await asyncio.sleep(0.001)


def tasks() -> set[str]:
    """Name the tasks that run, but for the test's and the server's."""
    names = {
        getattr(task.get_coro(), "__qualname__", "?")
        for task in asyncio.all_tasks() - {asyncio.current_task()}
    }
    return names - {"ProviderServer._serve"}


def held(service: LLMInfraService) -> list[Any]:
    """Tell the leases and connections of a service that are in use."""
    slots = [s for loop in service._pool._loops.values() for s in loop.slots]
    sessions = [slot.client.session for slot in slots if slot.client is not None]
    busy = [vars(session.connector)["_acquired"] for session in sessions]
    return [use for use in (*(slot.leases for slot in slots), *busy) if use]


def in_pieces(server: ProviderServer) -> Callable[[Received], Answer | Raw]:
    """Answer so that a body takes several reads."""

    def reply(asked: Received) -> Answer | Raw:
        ask = provider_server._ask(asked)
        if ask is None or asked.stream:
            return Answer(pieces=3, chunk_delay=0.002)
        body = server._whole(Answer(), ask).body
        assert isinstance(body, bytes)
        pieces = [body[:20], body[20:40], body[40:]]
        return Raw(body=pieces, piece_delay=0.002, framing="chunked")

    return reply


async def cancel_everywhere(
    work: Work,
    provider: str,
    server: ProviderServer,
    keys: StaticAPIKeys,
    complaints: Complaints,
    moment: Moment,
    engine: Engine = "direct",
) -> int:
    """Cancel *work* at each moment, look for what is left; return how often that was."""
    allowed = LITELLMS_TASKS if engine == "litellm" else set()
    settings = Settings(
        max_concurrency=1,
        max_connections=1,
        max_retries=0,
        close_grace=GRACE,
        engine=engine,
    )
    for number in itertools.count():
        where = f"{provider}, moment {number}"
        service = LLMInfraService(keys, settings=settings)
        await service.initialize()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")

            task = await moment(number).run(work(service, provider))

            assert held(service) == [], where
            # One attempt, at once: no turn, no connection and no lease is held.
            async with asyncio.timeout(GRACE / 2):
                again = await service.complete(HELLO, MODELS[provider], provider)
                assert (again.text, again.attempts) == (DEFAULT_TEXT, 1), where
                assert len(service._pool) == 1, where
                await service.aclose()
            await until(lambda: server.open_connections == 0)
            await until(lambda: tasks() <= allowed)
            gc.collect()
        kinds = (ResourceWarning, RuntimeWarning)
        said = [str(w.message) for w in warned if issubclass(w.category, kinds)]
        assert complaints.said + said == [], where
        if not task.cancelled():
            assert task.result(), where
            return number
        # It is the very one that was thrown in, and nothing was made of it.
        with pytest.raises(asyncio.CancelledError, match=ORDER):
            task.result()
        assert task.cancelling() == 1, where
    raise AssertionError("it never came to its end")


each_moment = pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)


@each_moment
@each_provider
@pytest.mark.parametrize("work", [call, read, look, list_models])
async def test_what_is_cancelled_anywhere_leaves_nothing(
    server: ProviderServer,
    keys: StaticAPIKeys,
    complaints: Complaints,
    work: Work,
    provider: str,
    moment: Moment,
) -> None:
    """CancelledError comes out as it went in; the next call is answered at once."""
    server.default = in_pieces(server)

    times = await cancel_everywhere(work, provider, server, keys, complaints, moment)

    # A client, a connection, the head of the answer: fewer would not be a whole call.
    assert times >= 3


@each_moment
@each_provider
@pytest.mark.parametrize("work", [call, read])
async def test_a_call_through_litellm_that_is_cancelled_anywhere_leaves_nothing(
    server: ProviderServer,
    keys: StaticAPIKeys,
    complaints: Complaints,
    work: Work,
    provider: str,
    moment: Moment,
) -> None:
    """Nor does LiteLLM, which makes coroutines in a thread."""
    server.default = in_pieces(server)

    times = await cancel_everywhere(
        work, provider, server, keys, complaints, moment, engine="litellm"
    )

    assert times >= 2


async def test_a_call_that_is_cancelled_twice_leaves_nothing(
    server: ProviderServer, keys: StaticAPIKeys, complaints: Complaints
) -> None:
    """A caller that does not wait for the first cancellation hurts nobody."""
    server.default = Answer(delay=60)
    for engine in get_args(Engine):
        service = LLMInfraService(keys, settings=Settings(engine=engine))
        task = asyncio.create_task(call(service, "openai"))
        await until(lambda: server.in_flight == 1)

        task.cancel(ORDER)
        await asyncio.sleep(0)
        task.cancel(ORDER)
        await asyncio.wait([task])

        assert task.cancelled()
        await until(lambda: server.open_connections == 0)
        await service.aclose()
        gc.collect()
        assert complaints.said == []


# --- processes: an interrupt, an end, a fork, two threads --------------------------------

PROGRAM = """
import asyncio, os, sys, threading, time, warnings
from dipeo_llm import LLMInfraService, Settings, StaticAPIKeys

what, url, engine = sys.argv[1:]
keys = StaticAPIKeys({"k": {"key": "sk-x", "service": "openai", "base_url": url}})
service = LLMInfraService(keys, settings=Settings(engine=engine, max_retries=0))

def say(word):
    print(word, flush=True)

async def call():
    # Development mode tells of every slow turn of the loop; imports are slow.
    asyncio.get_running_loop().slow_callback_duration = 60
    message = {"role": "user", "content": threading.current_thread().name}
    return (await service.complete([message], "gpt-4.1-nano", "k")).text

async def read(*, leave=False):
    asyncio.get_running_loop().slow_callback_duration = 60
    await service.initialize()
    hello = [{"role": "user", "content": "Hello"}]
    async with service.stream(hello, "gpt-4.1-nano", "k") as chunks:
        async for chunk in chunks:
            say(chunk.text)
            if leave:
                sys.exit(0)

async def fork():
    assert await call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a process with threads
        child = os.fork()
    if not child:
        code = 1
        try:
            assert asyncio.run(call()) and asyncio.run(call())
            began = time.monotonic()
            asyncio.run(service.aclose())  # the parent's loop is not the child's to close
            code = 0 if time.monotonic() - began < service.settings.close_grace else 2
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    say(f"child {os.waitstatus_to_exitcode(status)}")
    assert await call()

match what:
    case "interrupted":
        try:
            asyncio.run(read())
        except KeyboardInterrupt:
            say("interrupted")
    case "exit in a stream":
        asyncio.run(read(leave=True))
    case "fork":
        asyncio.run(fork())
    case "threads":
        def work():
            for _ in range(3):
                asyncio.run(calls())
        async def calls():
            for text in await asyncio.gather(*(call() for _ in range(10))):
                assert text
        threads = [threading.Thread(target=work, name=f"t{i}") for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
"""


async def start(what: str, server: ProviderServer, engine: Engine) -> Process:
    """Run the program in development mode, in which Python reports what is left open."""
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM],
        *[what, server.base_url("openai"), engine],
        cwd=Path(__file__).parent.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def end_of(process: Process) -> tuple[int | None, str, str]:
    """Return its exit code, and what it said, and what it complained of."""
    said, complained = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, said.decode(), complained.decode()


@pytest.mark.parametrize("engine", ["direct", "litellm"])
async def test_ctrl_c_in_a_stream_ends_it_in_silence(
    server: ProviderServer, engine: Engine
) -> None:
    """KeyboardInterrupt comes out of `asyncio.run`, and nothing but it."""
    server.default = Answer(text="one two", pieces=2, stall_after=2)
    process = await start("interrupted", server, engine)
    assert process.stdout is not None
    async with asyncio.timeout(120):
        first = await process.stdout.readline()

    process.send_signal(signal.SIGINT)
    code, said, complained = await end_of(process)

    assert (code, complained) == (0, "")
    assert (first.decode() + said).endswith("interrupted\n")
    await until(lambda: server.open_connections == 0)


async def test_an_exit_in_a_stream_is_silent(server: ProviderServer) -> None:
    """A program may end while a stream is open, without closing the service."""
    server.default = Answer(text="one two", pieces=2, stall_after=2)

    code, said, complained = await end_of(
        await start("exit in a stream", server, "direct")
    )

    assert (code, complained) == (0, "")
    assert said
    await until(lambda: server.open_connections == 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
async def test_a_fork_shares_no_connection(server: ProviderServer) -> None:
    """The child opens its own, and the parent's goes on."""
    code, said, complained = await end_of(await start("fork", server, "direct"))

    assert (code, said, complained) == (0, "child 0\n", "")
    assert [asked.connection for asked in server.requests] == [1, 2, 3, 1]
    await until(lambda: server.open_connections == 0)


async def test_two_threads_with_many_loops_end_in_silence(
    server: ProviderServer,
) -> None:
    """Each loop of each thread has connections of its own.

    Not through LiteLLM, whose one logging task is confused by two loops at once.
    """
    code, said, complained = await end_of(await start("threads", server, "direct"))

    assert (code, said, complained) == (0, "", "")
    owners: dict[int, set[str]] = {}
    for asked in server.requests:
        name = asked.json["messages"][0]["content"]
        owners.setdefault(asked.connection, set()).add(name)
    assert len(server.requests) == 60
    assert {len(names) for names in owners.values()} == {1}
    await until(lambda: server.open_connections == 0)
