"""Who is measured, in which formats, and what must be installed for it."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FORMATS = ("openai", "anthropic", "google", "ollama")

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / ".nox" / "bench-environments"


@dataclass(frozen=True, slots=True)
class Peer:
    """One library in one process."""

    name: str
    label: str
    formats: tuple[str, ...] = ("openai",)
    requires: tuple[str, ...] = ()
    """What it needs in an environment of its own; nothing: it runs in this one."""
    shows: str = ""
    """The package whose version the table shows."""


PEERS = (
    Peer("raw", "aiohttp + json, bare", FORMATS, shows="aiohttp"),
    Peer("direct", "**dipeo_llm, direct engine**", FORMATS, shows="dipeo-llm"),
    Peer("engine-litellm", "dipeo_llm, litellm engine", FORMATS, shows="dipeo-llm"),
    Peer("litellm", "litellm.acompletion", FORMATS, shows="litellm"),
    Peer("litellm-router", "litellm.Router", shows="litellm"),
    Peer("openai", "OpenAI SDK", requires=("openai==3.54.0",), shows="openai"),
    Peer(
        "anthropic",
        "Anthropic SDK",
        ("anthropic",),
        requires=("anthropic==2.12.0",),
        shows="anthropic",
    ),
    Peer(
        "google-genai",
        "Google Gen AI SDK",
        ("google",),
        requires=("google-genai==3.4.0",),
        shows="google-genai",
    ),
    Peer(
        "ollama",
        "Ollama SDK",
        ("ollama",),
        requires=("ollama==0.6.3",),
        shows="ollama",
    ),
    Peer(
        "pydantic-ai",
        "pydantic-ai",
        requires=("pydantic-ai-slim[openai]==2.68.0", "openai==3.54.0"),
        shows="pydantic-ai-slim",
    ),
    Peer(
        "langchain",
        "LangChain",
        requires=("langchain-openai==1.7.3", "openai==3.54.0"),
        shows="langchain-openai",
    ),
    # It keeps the OpenAI SDK at an older version than the others.
    Peer(
        "instructor",
        "instructor",
        requires=("instructor==1.17.0",),
        shows="instructor",
    ),
    Peer(
        "any-llm",
        "any-llm",
        requires=("any-llm-sdk[openai]==1.40.2", "openai==3.54.0"),
        shows="any-llm-sdk",
    ),
)


def python_of(peer: Peer) -> str:
    """Return the interpreter of a peer's environment, which is made if there is none.

    Raises:
        subprocess.CalledProcessError: It cannot be made, such as without a network.
    """
    if not peer.requires:
        return sys.executable
    folder = ENVIRONMENTS / peer.name
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    made_for = folder / "made-for.json"
    wanted = json.dumps([sys.version, *peer.requires])
    if not made_for.exists() or made_for.read_text() != wanted:
        found = shutil.which("uv")
        uv = [found] if found else [sys.executable, "-m", "uv"]
        for command in (
            [*uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)],
            [
                *(*uv, "pip", "install", "-q", "--compile-bytecode"),
                *("--python", str(python), *peer.requires),
            ],
        ):
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        made_for.write_text(wanted)
    return str(python)


def version_of(peer: Peer, python: str) -> str:
    """Return the version of the package that a peer stands for."""
    code = f"from importlib.metadata import version; print(version({peer.shows!r}))"
    done = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
