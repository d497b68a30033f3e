"""Record this project's cassettes, for tests that replay them.

    python examples/record_cassettes.py                 # all of them
    python examples/record_cassettes.py openai_plain    # some
    python examples/record_cassettes.py --real          # of providers with a key

Without a key the best server that runs on this machine answers: the small model of
`local_model`, which speaks OpenAI's and Anthropic's formats, and Ollama's through a
proxy; for the rest aimock, a mock from npm. Each cassette says in its first lines which
it was, so that it shows a provider's format and never poses as that provider's service.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from local_model import MODEL, LocalServerError, local_model, ollama_proxy

sys.path.append(str(Path(__file__).resolve().parent.parent))

from dipeo_llm import (
    APIKeyPort,
    DiPeOLLMError,
    EnvironmentAPIKeys,
    LLMInfraService,
    Settings,
    StaticAPIKeys,
)
from dipeo_llm.testing import CassetteError, use_cassette
from tests.cassette_calls import CALLS, NAMES, TOO_LONG

ROOT = Path(__file__).resolve().parent.parent
CASSETTES = ROOT / "cassettes"
HOST = "http://127.0.0.1:8080"
"""Stands in a cassette for the free port of the day."""
KEY = "not-for-the-cassette"
TIMEOUT = 300.0
"""Seconds for one answer."""
MODELS = {
    "openai": "gpt-4.1-nano",
    "anthropic": "claude-haiku-4-5",
    "google": "gemini-2.5-flash-lite",
    "ollama": "llama3.2:1b",
}
"""What is asked of the providers themselves, and of the mock in their place."""
KEY_VARIABLES = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "google": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "ollama": ("OLLAMA_HOST",),
}
FROM_THE_MODEL = {
    "openai": {"plain", "person_prompt_file", "streamed", "structured", "error"},
    "anthropic": {"plain", "person_prompt_file", "streamed", "error"},
    "ollama": {"plain", "person_prompt_file", "streamed", "structured"},
}
"""The model's chat template knows no tools, which is also how LiteLLM asks a Claude that
it does not know for JSON; the proxy makes every error a 500."""

MOCK = "@copilotkit/aimock"
MOCK_VERSION = "1.43.0"


def _usage(read: int, written: int) -> dict[str, int]:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return dict(zip(names, (read, written, read + written), strict=True))


FIXTURES: list[dict[str, Any]] = [
    {
        "match": {"hasToolResult": True},
        "response": {"content": "Sunny, says the tool.", "usage": _usage(90, 6)},
    },
    {
        "match": {"userMessage": "Say hello."},
        "response": {
            "content": "Hello! I am a mock and no model.",
            "usage": _usage(10, 9),
        },
    },
    {
        "match": {"userMessage": "Let us open a small bakery."},
        "response": {
            "content": "A mock would love fresh bread!",
            "usage": _usage(40, 8),
        },
    },
    {
        "match": {
            "userMessage": "What is the weather in Rome?",
            "hasToolResult": False,
        },
        "response": {
            "toolCalls": [{"name": "weather", "arguments": {"city": "Rome"}}],
            "usage": _usage(60, 12),
        },
    },
    {
        "match": {"userMessage": "What do you think of bakeries?"},
        "response": {"content": '{"mood":"good","sure":true}', "usage": _usage(50, 9)},
    },
    {
        "match": {"userMessage": TOO_LONG},
        "response": {
            "error": {
                "message": "model 'no-such-model' not found",
                "type": "not_found_error",
                "code": "model_not_found",
            },
            "status": 404,
        },
    },
    # A tool's result again: aimock knows Google's "functionResponse", and not the other
    # spelling that Google takes, "function_response", which is LiteLLM's.
    {
        "match": {},
        "response": {"content": "Sunny, says the tool.", "usage": _usage(90, 6)},
    },
]


@dataclass(frozen=True, slots=True)
class Source:
    """Where an answer comes from."""

    keys: APIKeyPort
    origin: str | None = None
    """What a cassette says of it; None leaves the host to speak."""
    address: str = ""
    """Of a server on this machine."""
    model: str | None = None
    """None takes the provider's own of MODELS."""


@contextmanager
def mock() -> Iterator[Source]:
    """Install aimock and run it on a free port.

    Raises:
        LocalServerError: It is not to be had, or did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="aimock-") as folder:
        wanted = f"{MOCK}@{MOCK_VERSION}"
        npm = ["npm", "install", "--no-fund", "--no-audit", "--ignore-scripts"]
        try:
            subprocess.run(
                [*npm, "--silent", "--prefix", folder, wanted],
                check=True,
                timeout=120,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise LocalServerError(f"npm could not install {wanted}: {exc}") from exc
        fixtures = Path(folder) / "fixtures.json"
        fixtures.write_text(json.dumps({"fixtures": FIXTURES}), encoding="utf-8")
        log = Path(folder) / "log"
        # Time between chunks, so that each is a piece of its own on the wire too.
        command = [f"{folder}/node_modules/.bin/llmock", "-h", "127.0.0.1", "-p", "0"]
        with (
            log.open("wb") as file,
            subprocess.Popen(
                [*command, "-f", str(fixtures), "--latency", "40"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            ) as server,
        ):
            try:
                address = _address(log, server)
                origin = f"aimock {MOCK_VERSION}, a mock: not a model"
                yield Source(_keys(address), origin, address)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGTERM)


def _address(log: Path, server: subprocess.Popen[bytes]) -> str:
    """Wait until the mock says where it listens."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends and server.poll() is None:
        if found := re.search(r"listening on (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise LocalServerError(f"aimock did not come up; it said:\n{log.read_text()}")


def _keys(address: str) -> StaticAPIKeys:
    return StaticAPIKeys(
        {
            "openai": {"key": KEY, "base_url": f"{address}/v1"},
            "anthropic": {"key": KEY, "base_url": address},
            "google": {"key": KEY, "base_url": f"{address}/v1beta"},
            "ollama": {"key": "", "base_url": address},
        }
    )


def kind_of_source(name: str) -> str:
    """Say which server of this machine answers for a cassette."""
    provider, _, kind = name.partition("_")
    if kind not in FROM_THE_MODEL.get(provider, ()):
        return "mock"
    return "proxy" if provider == "ollama" else "model"


def start(needed: set[str], running: ExitStack) -> Mapping[str, Source]:
    """Start what the cassettes need."""
    sources: dict[str, Source] = {}
    if needed & {"model", "proxy"}:
        model = running.enter_context(local_model())
        sources["model"] = Source(
            _keys(model.origin), model.version, model.origin, MODEL
        )
        if "proxy" in needed:
            proxy = running.enter_context(ollama_proxy(model.origin))
            origin = f"{model.version}, through {proxy.version}"
            sources["proxy"] = Source(_keys(proxy.origin), origin, proxy.origin, MODEL)
    if "mock" in needed:
        sources["mock"] = running.enter_context(mock())
    return sources


async def record(name: str, source: Source, *, real: bool) -> None:
    """Record one cassette; an older one stays if that fails."""
    provider, _, kind = name.partition("_")
    # A retry would be recorded too.
    settings = replace(
        # Only where the providers themselves are may be said by the environment.
        Settings.from_env() if real else Settings(),
        base_dir=ROOT,
        timeout=TIMEOUT,
        max_retries=0,
    )
    again = f"python examples/record_cassettes.py {'--real ' if real else ''}{name}"
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.yaml"
        async with LLMInfraService(source.keys, settings=settings) as service:
            with use_cassette(draft, record="all", origin=source.origin, again=again):
                try:
                    await CALLS[kind](
                        service, provider, source.model or MODELS[provider]
                    )
                except DiPeOLLMError as exc:
                    if kind != "error" or getattr(exc, "status_code", None) is None:
                        raise
                else:
                    if kind == "error":
                        raise RuntimeError(f"{name}: there was no error")
        text = draft.read_text(encoding="utf-8")
    if source.address:
        text = text.replace(source.address, HOST)
    (CASSETTES / f"{name}.yaml").write_text(text, encoding="utf-8", newline="\n")
    print(f"{name}: {text.splitlines()[0].removeprefix('# ')}", flush=True)


async def record_all(
    names: list[str], sources: Mapping[str, Source], *, real: bool
) -> None:
    """Record one after the other."""
    for name in names:
        source = sources["real" if real else kind_of_source(name)]
        await record(name, source, real=real)


def has_key(name: str) -> bool:
    """Say whether a cassette's provider can be asked."""
    return any(map(os.environ.get, KEY_VARIABLES[name.partition("_")[0]]))


def main() -> int:
    """Record; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Record the cassettes anew. Without --real it needs what"
        " examples/local_model.py needs, ollama-proxy-plus, and npm for the mock."
    )
    parser.add_argument("names", nargs="*", metavar="name", help="default: all")
    parser.add_argument(
        "--real",
        action="store_true",
        help="ask the providers themselves, each whose key is in the environment"
        " (Ollama: whose OLLAMA_HOST is); this costs a fraction of a cent",
    )
    arguments = parser.parse_args()
    names = arguments.names or list(NAMES)
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    if arguments.real and not (names := list(filter(has_key, names))):
        wanted = ", ".join(" or ".join(v) for v in KEY_VARIABLES.values())
        parser.error(f"no key in the environment: set any of {wanted}")
    CASSETTES.mkdir(exist_ok=True)
    try:
        with ExitStack() as running:
            sources = (
                {"real": Source(EnvironmentAPIKeys())}
                if arguments.real
                else start(set(map(kind_of_source, names)), running)
            )
            asyncio.run(record_all(names, sources, real=arguments.real))
    except (DiPeOLLMError, LocalServerError, CassetteError, RuntimeError) as exc:
        print(f"recording failed: {type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
