"""A provider with a format of its own, in one file; a server that speaks it; calls to it.

`tests/test_architecture.py` runs this file in a process of its own.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from dipeo_llm import APIKeyError, LLMInfraService, LLMServiceError, Settings
from dipeo_llm.adapters.base import BaseLLMAdapter
from dipeo_llm.adapters.events import StreamReader
from dipeo_llm.adapters.factory import register
from dipeo_llm.adapters.provider import ModelList, Provider
from dipeo_llm.adapters.reading import JSON, Reading
from dipeo_llm.adapters.request import PreparedRequest
from dipeo_llm.adapters.translation import JSON_HEADERS, Outgoing
from dipeo_llm.domain import StreamChunk
from dipeo_llm.keys import StaticAPIKeys


class ToyAdapter(BaseLLMAdapter):
    """Talks to a parrot."""

    rows = (Provider(name="toy", litellm="toy", key_header="x-toy", has_prices=False),)
    model_list = ModelList("/parrots", "parrots", "called")

    def translate(
        self, litellm: Any, prepared: PreparedRequest, *, stream: bool
    ) -> Outgoing:
        """Ask the parrot for the last message."""
        body = {
            "parrot": self.model_name,
            "heard": prepared.messages[-1]["content"],
            "loudness": prepared.options.get("temperature"),
            "word_by_word": stream,
        }
        return Outgoing("/talk", JSON_HEADERS, body)

    def has_answer(self, body: Mapping[str, Any]) -> bool:
        """Say whether the parrot spoke."""
        return "said" in body

    def read(self, body: Mapping[str, Any]) -> Reading:
        """Read what it said."""
        return Reading(text=body["said"], finish="stop")

    def stream_reader(self) -> StreamReader:
        """Return a reader of its words."""
        return ToyStream()


class ToyStream(StreamReader):
    """One word a line, and "quiet" at the end."""

    sse = False

    def __init__(self) -> None:
        super().__init__()
        self._words: list[str] = []
        self._is_quiet = False

    def _event(self, event: JSON, chunks: list[StreamChunk]) -> None:
        self._is_quiet = event.get("quiet", False)
        if word := event.get("word"):
            self._words.append(word)
            chunks.append(StreamChunk(text=word))

    @property
    def is_ended(self) -> bool:
        """Whether the parrot is quiet."""
        return self._is_quiet

    def body(self) -> JSON:
        """Return what the whole answer would have been."""
        return {"said": "".join(self._words)}


register(ToyAdapter)  # the one line


async def talk(request: web.Request) -> web.StreamResponse:
    """Say what was heard; "hush" cuts the stream."""
    asked = await request.json()
    if request.headers.get("x-toy") != "sk-toy":
        return web.json_response({"error": {"message": "who are you?"}}, status=401)
    if not asked["word_by_word"]:
        return web.json_response({"said": f"{asked['heard']} {asked['loudness']}"})
    words = [{"word": word} for word in asked["heard"].split()]
    end = [] if asked["heard"].endswith("hush") else [{"quiet": True}]
    lines = [json.dumps(event) for event in words + end]
    return web.Response(text="\n".join([*lines, ""]))


async def parrots(_: web.Request) -> web.Response:
    """List the parrots."""
    return web.json_response({"parrots": [{"called": "polly"}, {"called": "coco"}]})


async def use(url: str) -> dict[str, Any]:
    """Complete, stream, list and fail, as any caller would."""
    records = {
        "good": {"key": "sk-toy", "service": "toy", "base_url": url},
        "bad": {"key": "sk-x", "service": "toy", "base_url": url},
    }
    settings = Settings(max_retries=0)
    seen: dict[str, Any] = {}
    async with LLMInfraService(StaticAPIKeys(records), settings=settings) as service:
        hello = [{"role": "user", "content": "Hello you"}]
        whole = await service.complete(hello, "toy/polly", "good", temperature=0.5)
        seen["whole"] = [whole.text, whole.service, whole.model, whole.cost_usd]
        async with service.stream(hello, "polly", "good", service="toy") as stream:
            seen["chunks"] = [chunk.text async for chunk in stream]
            seen["streamed"] = (await stream.result()).text
        seen["models"] = await service.get_available_models("good")
        hush = [{"role": "user", "content": "Hello hush"}]
        for name, key, said in (("refused", "bad", hello), ("cut", "good", hush)):
            try:
                async with service.stream(said, "toy/polly", key) as stream:
                    await stream.result()
            except (APIKeyError, LLMServiceError) as exc:
                seen[name] = [type(exc).__name__, exc.status_code]
    return seen


async def main() -> None:
    """Serve the format on the loopback interface, use it, and print what was seen."""
    app = web.Application()
    app.router.add_post("/talk", talk)
    app.router.add_get("/parrots", parrots)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        seen = await use(f"http://127.0.0.1:{port}")
    finally:
        await runner.cleanup()
    sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
