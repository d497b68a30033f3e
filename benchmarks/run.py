"""Measure a call of this package beside its peers, in one interleaved run.

`python -m benchmarks.run` takes under ten minutes and writes docs/performance.md and its
picture; `--quick` takes under 90 seconds on an idle machine and only prints. The figures
are ratios inside one run: CPU time of the client's process, the median over rounds in
which every client has its turn, so that a busy machine is busy for all of them.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report, server
from benchmarks.figures import Figures
from benchmarks.peers import FORMATS, PEERS, Peer, python_of, version_of

ROOT = Path(__file__).parent.parent
_CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
_SERVER_CORE = _CPUS[0] if len(_CPUS) > 1 else None
_CLIENT_CORE = _CPUS[-1] if len(_CPUS) > 1 else None


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each part may take (s), and how often it is done at most."""

    starts: int
    together: int
    """Processes that start at the same time; more than one blurs the time of a start."""
    turn: float
    """CPU seconds of one client's turn in a round, about."""
    rounds: int
    rounds_until: float
    load: float
    """CPU seconds of one client's calls with many in flight, about."""
    loads: int
    loads_until: float
    crowded: tuple[str, ...]
    """Who is asked with 512 in flight."""
    paced: int


_ALL = tuple(peer.name for peer in PEERS)
FULL = Effort(
    starts=3,
    together=1,
    turn=0.12,
    rounds=15,
    rounds_until=270.0,
    load=1.0,
    loads=3,
    loads_until=420.0,
    crowded=_ALL,
    paced=5,
)
QUICK = Effort(
    starts=1,
    together=2,
    turn=0.04,
    rounds=5,
    rounds_until=40.0,
    load=0.4,
    loads=1,
    loads_until=60.0,
    crowded=("raw", "direct", "openai"),
    paced=1,
)


def _environment() -> dict[str, str]:
    """Return ours without what changes a library: keys, proxies, tracing, bytecode."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "SSL_CERT_FILE")
    kept += ("BENCHMARK_REDIS",)
    made = {name: os.environ[name] for name in kept if name in os.environ}
    return made | {
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


class Process:
    """A child that speaks JSON, an object a line."""

    def __init__(self, arguments: list[str], core: int | None = None) -> None:
        began = time.perf_counter()
        self._child = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=_environment(),
        )
        self._began = began
        self._core = core

    def begin(self) -> tuple[dict[str, Any], float]:
        """Wait for its first line; return that, and the seconds it took to come."""
        first = self._read()
        seconds = time.perf_counter() - self._began
        if self._core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._child.pid, {self._core})
        return first, seconds

    def close(self) -> None:
        """End it, by closing its stdin."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and return what came of it."""
        self.tell(**order)
        return self.hear()

    def tell(self, **order: Any) -> None:
        """Give an order, and wait for nothing."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for the outcome of an order."""
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"{self._child.args!r}: {answer['error']}")
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._child.args!r} ended")
        return dict(json.loads(line))


class Run:
    """One run, from the first process to the last figure."""

    def __init__(self, effort: Effort, only: list[str]) -> None:
        self._effort = effort
        self._peers = [peer for peer in PEERS if not only or peer.name in only]
        self._began = time.monotonic()
        self._workers: dict[str, Process] = {}
        self._count: dict[str, int] = {}
        self._stack = contextlib.ExitStack()
        self.figures = Figures(quick=effort is QUICK)

    def measure(self) -> Figures:
        """Do it all."""
        pythons = self._environments()
        self._began = time.monotonic()
        with self._stack:
            serving = Process([sys.executable, "-m", "benchmarks.server"], _SERVER_CORE)
            self._stack.callback(serving.close)
            origins, _ = serving.begin()
            self._imports()
            self._start(pythons, origins)
            self._calibrate()
            self._rounds()
            self._inside()
            self._loads()
            self._paced()
            for peer in self._present():
                memory = self._workers[peer.name].ask(do="memory")["rss"]
                self.figures.values[f"{peer.name} rss-end"].append(memory)
        self.figures.seconds = self._elapsed()
        if hasattr(os, "getloadavg"):
            self.figures.load = os.getloadavg()[1]
        return self.figures

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _present(self) -> list[Peer]:
        return [peer for peer in self._peers if peer.name in self._workers]

    def _environments(self) -> dict[str, str]:
        pythons = {}
        for peer in self._peers:
            try:
                pythons[peer.name] = python_of(peer)
                version = version_of(peer, pythons[peer.name])
            except (subprocess.CalledProcessError, OSError) as exc:
                self._leave_out(peer, f"it could not be installed ({exc})")
                pythons.pop(peer.name, None)
            else:
                self.figures.versions[peer.name] = version
        return pythons

    def _leave_out(self, peer: Peer, why: str) -> None:
        _say(f"{peer.name} is left out: {why}")
        self.figures.absent[peer.name] = why

    def _imports(self) -> None:
        for turn in range(self._effort.starts + 1):
            for name, code in _IMPORTS.items():
                seconds = _cpu_of(code)
                if turn:  # the first may have had to compile
                    self._keep(f"{name} import", seconds)

    def _start(self, pythons: dict[str, str], origins: dict[str, Any]) -> None:
        """Start every client, the last time for good."""
        for turn in range(self._effort.starts):
            waiting = [peer for peer in self._peers if peer.name in pythons]
            while waiting:
                some = waiting[: self._effort.together]
                del waiting[: self._effort.together]
                started = [(p, self._process(p, pythons, origins)) for p in some]
                for peer, process in started:
                    self._begin(peer, process, last=turn == self._effort.starts - 1)
        _say(f"{len(self._workers)} processes are warm, {self._elapsed():.0f} s")

    def _process(
        self, peer: Peer, pythons: dict[str, str], origins: dict[str, Any]
    ) -> Process:
        worker = str(Path(__file__).parent / "worker.py")
        start = {
            "name": peer.name,
            "format": peer.formats[0],
            "origins": origins,
            "core": _CLIENT_CORE,
        }
        return Process([pythons[peer.name], worker, json.dumps(start)])

    def _begin(self, peer: Peer, process: Process, *, last: bool) -> None:
        try:
            first, seconds = process.begin()
        except RuntimeError as exc:
            process.close()
            self._leave_out(peer, f"its first call failed ({exc})")
            return
        self._keep(f"{peer.name} cold-cpu", first["cpu"])
        self._keep(f"{peer.name} rss", first["rss"])
        if self._effort.together == 1:
            self._keep(f"{peer.name} cold-wall", seconds)
        if last:
            self._stack.callback(process.close)
            self._workers[peer.name] = process
        else:
            process.close()

    def _median(self, name: str) -> float:
        return statistics.median(self.figures.values[name])

    def _keep(self, name: str, value: float) -> None:
        self.figures.values[name].append(value)

    def _calibrate(self) -> None:
        """Find how many calls and streams fill a turn."""
        for peer in self._present():
            worker = self._workers[peer.name]
            for wire_format in peer.formats:
                name = f"{peer.name} {wire_format}"
                order: dict[str, Any] = {"format": wire_format}
                worker.ask(do="calls", n=3, **order)
                cpu = worker.ask(do="calls", n=5, **order)["cpu"] / 5
                self._count[f"{name} calls"] = self._fit(cpu)
                for kind, chunks in _STREAMS.items():
                    order |= {"server": kind, "chunks": chunks}
                    cpu = worker.ask(do="streams", n=1, **order)["cpu"]
                    self._count[f"{name} {kind}"] = self._fit(cpu)

    def _fit(self, cpu: float) -> int:
        return int(min(max(self._effort.turn / max(cpu, 1e-5), 2), 400))

    def _rounds(self) -> None:
        """CPU a call and a chunk, one at a time, every client in every round."""
        for turn in range(self._effort.rounds):
            if turn and self._elapsed() > self._effort.rounds_until:
                break
            present = self._present()
            for peer in present[turn % len(present) :] + present[: turn % len(present)]:
                for wire_format in peer.formats:
                    self._turn(peer, wire_format)
            _say(f"round {turn + 1} of {self._effort.rounds}, {self._elapsed():.0f} s")

    def _turn(self, peer: Peer, wire_format: str) -> None:
        worker, name = self._workers[peer.name], f"{peer.name} {wire_format}"
        n = self._count[f"{name} calls"]
        got = worker.ask(do="calls", format=wire_format, n=n)
        call = got["cpu"] / n
        self._keep(f"{name} call", call)
        self.figures.pooled[f"{name} at 1"] += got["latencies"]
        if wire_format == "openai":
            self._keep(f"{name} rate at 1", n / got["wall"])
        cost = {}
        for kind, chunks in _STREAMS.items():
            n = self._count[f"{name} {kind}"]
            got = worker.ask(
                do="streams", format=wire_format, server=kind, chunks=chunks, n=n
            )
            cost[kind] = got["cpu"] / n
            if kind == "short":
                self.figures.pooled[f"{name} first"] += got["first"]
        more = _STREAMS["long"] - _STREAMS["short"]
        self._keep(f"{name} chunk", (cost["long"] - cost["short"]) / more)

    def _loads(self) -> None:
        """Calls and streams a second on one core, with many in flight."""
        for turn in range(self._effort.loads):
            if turn and self._elapsed() > self._effort.loads_until:
                break
            for peer in self._present():
                if "openai" in peer.formats:
                    self._load(peer)
            _say(f"load {turn + 1} of {self._effort.loads}, {self._elapsed():.0f} s")

    def _load(self, peer: Peer) -> None:
        worker, name = self._workers[peer.name], f"{peer.name} openai"
        crowd = (64, 512) if peer.name in self._effort.crowded else (64,)
        # So many that a rare pause, such as for garbage, falls on each alike.
        enough = int(self._effort.load / self._median(f"{name} call"))
        for in_flight in crowd:
            n = min(max(in_flight, enough), 4000)
            got = worker.ask(do="calls", format="openai", n=n, in_flight=in_flight)
            self._keep(f"{name} rate at {in_flight}", n / got["wall"])
            self._keep(f"{name} call at {in_flight}", got["cpu"] / n)
            self.figures.pooled[f"{name} at {in_flight}"] += got["latencies"]
        got = worker.ask(
            do="streams",
            format="openai",
            server="short",
            chunks=_STREAMS["short"],
            n=64,
            in_flight=64,
            warm=8,
        )
        self._keep(f"{name} streams at 64", 64 / got["wall"])

    def _paced(self) -> None:
        """CPU a chunk where each event comes in a packet of its own."""
        for _ in range(self._effort.paced):
            for peer in self._present():
                if "openai" not in peer.formats:
                    continue
                got = self._workers[peer.name].ask(
                    do="streams",
                    format="openai",
                    server="paced",
                    chunks=server.PACED,
                    n=16,
                    in_flight=16,
                    warm=2,
                )
                self._keep(f"{peer.name} openai paced", got["cpu"] / 16 / server.PACED)

    def _inside(self) -> None:
        """Look into our own process: the pool, and where a call's time goes."""
        if "direct" not in self._workers:
            return
        for _ in range(5):
            got = self._workers["direct"].ask(do="pool", format="openai", n=2000)
            self._keep("direct pool", got["cpu"] / 2000)
        for wire_format in FORMATS:
            got = self._workers["direct"].ask(do="profile", format=wire_format, n=300)
            self.figures.shares[wire_format] = got["shares"]


_STREAMS = {"short": server.SHORT, "long": server.LONG}
_IMPORTS = {
    "direct": "from dipeo_llm import LLMInfraService",
    "litellm": "import litellm",
    "nothing": "pass",
}


def _cpu_of(code: str) -> float:
    """Return the CPU seconds of an interpreter that runs one line."""
    script = f"{code}\nimport time; print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_environment(),
    )
    return float(done.stdout.splitlines()[-1])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, only printed")
    parser.add_argument("--no-write", action="store_true", help="leave docs/ as it is")
    parser.add_argument("--only", nargs="*", default=[], help="names of clients")
    parser.add_argument("--save", type=Path, help="write all figures to a JSON file")
    options = parser.parse_args()
    # Importing LiteLLM without bytecode compiles 2,600 modules each time.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    figures = Run(QUICK if options.quick else FULL, options.only).measure()
    if options.save:
        options.save.write_text(
            json.dumps({"values": figures.values, "pooled": figures.pooled})
        )
    text = report.tables(figures)
    sys.stdout.write(text)
    if not options.quick and not options.no_write:
        report.write(text, figures, ROOT / "docs")


if __name__ == "__main__":
    main()
