"""The one server that every client is measured against, in a process of its own.

Three ports of `tests.provider_server`, on one event loop: short answers, long ones, and
one whose stream comes an event at a time, as from a real model. Prints their origins as
a line of JSON and serves until stdin closes.
"""

import asyncio
import contextlib
import json
import sys
from typing import Any

from tests.provider_server import _WHOLE, Answer, FastServer, ProviderServer, _Ask

SHORT, LONG, PACED = 20, 220, 100
"""Events that carry text, in a stream of each port."""


def words(count: int) -> str:
    """Return as many pieces of text, no two alike.

    LiteLLM breaks off a stream that says the same a hundred times.
    """
    return "".join(f"word{i:03d} " for i in range(count))


class BenchmarkServer(FastServer):
    """The fast server with an answer in which no two events are alike."""

    def __init__(self, chunks: int) -> None:
        super().__init__(chunks=chunks)
        answer = Answer(words(chunks), pieces=chunks, output_tokens=chunks)
        self._ready = {
            (api, stream): b"".join(
                self._bytes(_Ask(api, MODELS[api], stream, usage=True), answer)
            )
            for api in _WHOLE
            for stream in (False, True)
        }


MODELS = {
    "openai": "gpt-4o-mini",
    "responses": "gpt-4o-mini",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "ollama": "llama3.2",
}


async def main() -> None:
    """Serve until stdin closes."""
    paced: Any = Answer(
        words(PACED), pieces=PACED, output_tokens=PACED, chunk_delay=0.002
    )
    servers = {
        "short": BenchmarkServer(SHORT),
        "long": BenchmarkServer(LONG),
        "paced": ProviderServer(strict=False),
    }
    servers["paced"].default = paced
    async with contextlib.AsyncExitStack() as stack:
        for server in servers.values():
            await stack.enter_async_context(server)
        origins = {name: server.origin for name, server in servers.items()}
        sys.stdout.write(json.dumps(origins) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
