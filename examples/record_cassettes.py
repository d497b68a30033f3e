"""Record real exchanges with the local model, for tests that replay them.

    python examples/record_cassettes.py                 # all of them
    python examples/record_cassettes.py openai_plain    # some

Each goes into cassettes/ with its origin in its first lines. What answers is the small
model of `local_model`, so that is what a cassette says: it shows a provider's format,
never that provider's service.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import vcr
from local_model import (
    CONTEXT,
    MODEL,
    LocalModel,
    LocalServerError,
    OllamaProxy,
    local_model,
    ollama_proxy,
)

import dipeo_llm
from dipeo_llm import (
    ContextWindowError,
    DiPeOLLMError,
    LLMInfraService,
    Person,
    PersonLLMConfig,
    Settings,
    StaticAPIKeys,
)

ROOT = Path(__file__).resolve().parent.parent
CASSETTES = ROOT / "cassettes"
HOST = "local-model.test:8080"
"""Stands for the free port of the day. No name under .test is ever resolved."""
KEY = "not-for-the-cassette"
KEPT_HEADERS = {"accept", "anthropic-version", "content-type"}
"""Request headers that are recorded. A list of what to keep and not of what to drop:
no key gets in, whatever header it travels in, and nothing of this machine does."""
TIMEOUT = 300.0
"""Seconds for one answer."""


@dataclass(frozen=True, slots=True)
class Via:
    """The format that an exchange is in."""

    service: str

    @property
    def model(self) -> str:
        """The model string."""
        return f"{self.service}/{MODEL}"


Exchange = Callable[[LLMInfraService, Via], Awaitable[None]]


async def plain(service: LLMInfraService, via: Via) -> None:
    """Ask without a person and without a system prompt."""
    await service.complete(
        [{"role": "user", "content": "Say hello."}],
        via.model,
        via.service,
        temperature=0,
        max_tokens=16,
    )


async def person_prompt_file(service: LLMInfraService, via: Via) -> None:
    """Ask a person whose system prompt is in a file."""
    optimist = Person(
        id="optimist",
        llm_config=PersonLLMConfig(
            service=via.service,
            model=via.model,
            api_key_id=via.service,
            prompt_file="prompts/optimist.md",
        ),
    )
    await optimist.complete(
        "Let us open a small bakery.", service, temperature=0, max_tokens=16
    )


async def error(service: LLMInfraService, via: Via) -> None:
    """Ask for more than the model's context holds."""
    messages = [{"role": "user", "content": "a " * CONTEXT}]
    try:
        await service.complete(messages, via.model, via.service, max_tokens=16)
    except ContextWindowError:
        return
    raise RuntimeError("the model took a prompt that is longer than its context")


EXCHANGES: Mapping[str, tuple[Via, Exchange]] = {
    "openai_plain": (Via("openai"), plain),
    "openai_person_prompt_file": (Via("openai"), person_prompt_file),
    "openai_error": (Via("openai"), error),
    "anthropic_plain": (Via("anthropic"), plain),
    "anthropic_person_prompt_file": (Via("anthropic"), person_prompt_file),
    "ollama_plain": (Via("ollama"), plain),
    "ollama_person_prompt_file": (Via("ollama"), person_prompt_file),
}


def clean_request(request: Any) -> Any:
    """Take the key, the port and this machine out of a request to be recorded."""
    request.uri = urlunsplit(urlsplit(request.uri)._replace(netloc=HOST))
    request.headers = {
        name: value
        for name, value in request.headers.items()
        if name.lower() in KEPT_HEADERS
    }
    return request


async def record(service: LLMInfraService, name: str, origin: str) -> None:
    """Record one exchange; an older cassette stays if that fails."""
    via, exchange = EXCHANGES[name]
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.yaml"
        recorder = vcr.VCR(before_record_request=clean_request, record_mode="all")
        with recorder.use_cassette(str(draft)) as cassette:
            await exchange(service, via)
        if len(cassette) != 1:
            raise RuntimeError(f"{name} made {len(cassette)} requests, not one")
        text = draft.read_text(encoding="utf-8")
    if KEY in text:
        raise RuntimeError(f"{name} would hold the key")
    head = (
        f"# Recorded from: {origin}\n"
        f"# on {datetime.now(UTC):%Y-%m-%d}"
        f" by dipeo_llm {dipeo_llm.__version__} on litellm {version('litellm')}\n"
        f"# again with: python examples/record_cassettes.py {name}\n"
    )
    (CASSETTES / f"{name}.yaml").write_text(head + text, encoding="utf-8")
    print(f"{name}: {origin}")


async def record_all(
    names: list[str], model: LocalModel, proxy: OllamaProxy | None
) -> None:
    """Record the named exchanges, one after the other."""
    keys = {
        "openai": {"key": KEY, "base_url": model.openai_url},
        "anthropic": {"key": KEY, "base_url": model.anthropic_url},
    }
    if proxy:
        keys["ollama"] = {"key": "", "base_url": proxy.origin}
    # A retry would be recorded too.
    settings = Settings(base_dir=ROOT, timeout=TIMEOUT, max_retries=0)
    async with LLMInfraService(StaticAPIKeys(keys), settings=settings) as service:
        for name in names:
            origin = model.version
            if proxy and name.startswith("ollama"):
                origin = f"{origin}, through {proxy.version}"
            await record(service, name, origin)


def main() -> int:
    """Record; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Record cassettes from a real model on this machine (no network,"
        " no account). Needs what examples/local_model.py needs, and vcrpy; the ollama"
        " ones also need ollama-proxy-plus."
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of: {', '.join(EXCHANGES)}"
    )
    names = parser.parse_args().names or list(EXCHANGES)
    if unknown := sorted(set(names) - set(EXCHANGES)):
        parser.error(f"no exchange named {', '.join(unknown)}; see --help")
    CASSETTES.mkdir(exist_ok=True)
    try:
        with ExitStack() as running:
            model = running.enter_context(local_model())
            proxy = None
            if any(name.startswith("ollama") for name in names):
                proxy = running.enter_context(ollama_proxy(model.origin))
            asyncio.run(record_all(names, model, proxy))
    except (DiPeOLLMError, LocalServerError, RuntimeError) as exc:
        print(f"recording failed: {type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
