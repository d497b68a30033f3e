"""Turns figures into the tables and the picture of docs/performance.md."""

import datetime as dt
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.peers import FORMATS, PEERS, Peer

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"
NAMES = {
    "openai": "OpenAI",
    "anthropic": "Anthropic",
    "google": "Gemini",
    "ollama": "Ollama",
}
_PACKAGES = {
    "asyncio": "asyncio and the sockets",
    "aiohttp": "aiohttp",
    "litellm": "LiteLLM's translation",
    "dipeo_llm": "dipeo_llm",
}
_PEERS = {peer.name: peer for peer in PEERS}


def machine() -> str:
    """Return the interpreter, the processor and the number of its cores."""
    return (
        f"Python {platform.python_version()} on {_processor()}, {os.cpu_count()} cores"
    )


def tables(figures: Figures) -> str:
    """Return every table, as Markdown."""
    view = View(figures)
    parts = [
        view.about(),
        "### Against the numbers to reach",
        view.targets(),
        "### CPU of one call and of one streamed chunk, OpenAI's format",
        view.openai(),
        "### The other formats",
        view.formats(),
        "### On one core, OpenAI's format",
        view.load(),
        "### Before the first answer",
        view.start(),
        "### Where the CPU of one call goes",
        view.shares(),
    ]
    return "\n\n".join(parts) + "\n"


class View:
    """Reads figures."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._values = figures.values

    # --- single figures

    def median(self, name: str) -> float | None:
        """Return the median over rounds."""
        values = self._values.get(name)
        return statistics.median(values) if values else None

    def spread(self, name: str) -> float:
        """Return half the distance between the quartiles."""
        values = self._values.get(name, [])
        if len(values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2

    def ratio(self, name: str, other: str) -> float | None:
        """Return the median over rounds of what one took of the other's."""
        ours, theirs = self._values.get(name), self._values.get(other)
        if not ours or not theirs:
            return None
        return statistics.median(
            a / b for a, b in zip(ours, theirs, strict=False) if b > 0
        )

    def percentile(self, name: str, percent: int) -> float | None:
        """Return a percentile of the single latencies of all rounds."""
        values = self._figures.pooled.get(name)
        if not values or len(values) < 2:
            return None
        return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]

    def peers(self, wire_format: str) -> list[Peer]:
        """Return who was measured in a format, the cheapest call first."""
        found = [
            peer
            for peer in PEERS
            if self.median(f"{peer.name} {wire_format} call") is not None
        ]
        return sorted(
            found, key=lambda p: self.median(f"{p.name} {wire_format} call") or 0.0
        )

    # --- tables

    def about(self) -> str:
        """Say when, where and how it was measured."""
        figures = self._figures
        versions = ", ".join(
            f"{_PEERS[name].shows} {version}"
            for name, version in figures.versions.items()
            if name not in {"engine-litellm", "litellm-router"}
        )
        rounds = len(self._values.get("direct openai call", []))
        today = dt.datetime.now(dt.UTC).date()
        text = (
            f"{'A quick run' if figures.quick else 'Measured'} on {today}:"
            f" {rounds} interleaved rounds in {figures.seconds:.0f} s, {machine()},"
            f" load {figures.load:.1f}. {versions}."
        )
        for name, why in figures.absent.items():
            text += f" {_PEERS[name].label} is missing: {why}."
        return text

    def targets(self) -> str:
        """Show each number to reach, and what was measured."""
        rows = []
        for what, measured, most, unit in self._targets():
            limit = f"{most:.3g}{unit}"
            if measured is None:
                rows.append([what, limit, "not measured", ""])
            else:
                got = f"{measured:.3g}{unit}"
                rows.append([what, limit, got, _mark(ok=measured <= most)])
        rate = self.ratio("direct openai rate at 64", "litellm openai rate at 64")
        rates = {
            peer.name: self.median(f"{peer.name} openai rate at 64") or 0.0
            for peer in self.peers("openai")
            if peer.name != "raw"
        }
        if rate is not None:
            what = "calls/s at 64 in flight, of LiteLLM's"
            rows.append([what, "at least 4", f"{rate:.1f}", _mark(ok=rate >= 4)])
        if rates:
            place = sorted(rates, key=rates.__getitem__, reverse=True).index("direct")
            what = "calls/s at 64 in flight, place among the peers"
            rows.append([what, "1", f"{place + 1}", _mark(ok=place == 0)])
        return _table(["", "at most", "measured", "reached"], rows, "lrrl")

    def _targets(self) -> list[tuple[str, float | None, float, str]]:
        ratio = self.ratio
        rows = [
            (
                "import of LLMInfraService, of `import litellm`",
                ratio("direct import", "litellm import"),
                1 / 15,
                "",
            ),
            ("pool hit", _times(self.median("direct pool"), 1e6), 20.0, " µs"),
            (
                "CPU a call, litellm engine, of acompletion with the same client",
                ratio("engine-litellm openai call", "litellm openai call"),
                1.05,
                "",
            ),
            (
                "CPU a call, OpenAI, of acompletion",
                ratio("direct openai call", "litellm openai call"),
                0.20,
                "",
            ),
            (
                "CPU a call, OpenAI, of the OpenAI SDK",
                ratio("direct openai call", "openai openai call"),
                0.5,
                "",
            ),
        ]
        rows += [
            (
                f"CPU a call, {NAMES[f]}, of acompletion",
                ratio(f"direct {f} call", f"litellm {f} call"),
                0.25,
                "",
            )
            for f in FORMATS[1:]
        ]
        rows.append(
            (
                "CPU a chunk, OpenAI, of the OpenAI SDK",
                ratio("direct openai chunk", "openai openai chunk"),
                0.4,
                "",
            )
        )
        most = {"openai": 0.08, "anthropic": 0.10, "google": 0.15, "ollama": 0.10}
        rows += [
            (
                f"CPU a chunk, {NAMES[f]}, of LiteLLM",
                ratio(f"direct {f} chunk", f"litellm {f} chunk"),
                most[f],
                "",
            )
            for f in FORMATS
        ]
        at_1 = self.median("direct openai call")
        at_512 = self.median("direct openai call at 512")
        rows.append(
            (
                "CPU a call at 512 in flight, of that at 1",
                at_512 / at_1 if at_1 and at_512 else None,
                1.15,
                "",
            )
        )
        return rows

    def openai(self) -> str:
        """Show CPU of all clients that speak OpenAI's format."""
        rows = []
        for peer in self.peers("openai"):
            name = f"{peer.name} openai"
            rows.append(
                [
                    peer.label,
                    self._micro(f"{name} call"),
                    _number(self.ratio(f"{name} call", "litellm openai call"), 2),
                    self._micro(f"{name} chunk"),
                    _number(self.ratio(f"{name} chunk", "litellm openai chunk"), 3),
                    self._micro(f"{name} paced"),
                ]
            )
        head = ["", "call, µs", "of LiteLLM", "chunk, µs", "of LiteLLM"]
        return _table([*head, "chunk alone in a packet, µs"], rows, "lrrrrr")

    def formats(self) -> str:
        """Show CPU for the other three formats."""
        rows = []
        for wire_format in FORMATS[1:]:
            for peer in self.peers(wire_format):
                name = f"{peer.name} {wire_format}"
                base = f"litellm {wire_format}"
                rows.append(
                    [
                        NAMES[wire_format],
                        peer.label,
                        self._micro(f"{name} call"),
                        _number(self.ratio(f"{name} call", f"{base} call"), 2),
                        self._micro(f"{name} chunk"),
                        _number(self.ratio(f"{name} chunk", f"{base} chunk"), 3),
                    ]
                )
        head = ["", "", "call, µs", "of LiteLLM", "chunk, µs", "of LiteLLM"]
        return _table(head, rows, "llrrrr")

    def load(self) -> str:
        """Show what one core does with many calls in flight."""
        rows = []
        for peer in sorted(
            self.peers("openai"),
            key=lambda p: -(self.median(f"{p.name} openai rate at 64") or 0.0),
        ):
            name = f"{peer.name} openai"
            at_1, at_512 = (
                self.median(f"{name} call"),
                self.median(f"{name} call at 512"),
            )
            rows.append(
                [
                    peer.label,
                    *(
                        _number(self.median(f"{name} rate at {n}"))
                        for n in (1, 64, 512)
                    ),
                    _number(self.median(f"{name} streams at 64")),
                    *(self._latency(f"{name} at {n}") for n in (1, 64, 512)),
                    _number(at_512 / at_1 if at_1 and at_512 else None, 2),
                ]
            )
        head = ["", "calls/s, 1", "64", "512 in flight", "streams/s, 64"]
        head += ["p50 / p99 ms, 1", "64", "512 in flight", "CPU at 512, of 1"]
        return _table(head, rows, "lrrrrrrrr")

    def start(self) -> str:
        """Show import, first call, memory and the wait for a first chunk."""
        nothing = self.median("nothing import") or 0.0
        ours, theirs = self.median("direct import"), self.median("litellm import")
        text = ""
        if ours is not None and theirs is not None:
            text = (
                f"Importing `LLMInfraService` takes {(ours - nothing) * 1e3:.0f} ms of"
                f" CPU, `litellm` {(theirs - nothing) * 1e3:.0f} ms (a bare interpreter"
                f" {nothing * 1e3:.0f} ms, which the ratio above has on both sides). A"
                f" pool hit takes {(self.median('direct pool') or 0) * 1e6:.1f} µs.\n\n"
            )
        rows = []
        for peer in PEERS:
            wire_format = peer.formats[0]
            name = f"{peer.name} {wire_format}"
            if self.median(f"{name} call") is None:
                continue
            first = self.percentile(f"{name} first", 50)
            base = self.percentile(f"litellm {wire_format} first", 50)
            rows.append(
                [
                    peer.label,
                    _number(self.median(f"{peer.name} cold-cpu"), 2),
                    _number(self.median(f"{peer.name} cold-wall"), 2),
                    _number(_times(self.median(f"{peer.name} rss"), 2**-20)),
                    _number(_times(self.median(f"{peer.name} rss-end"), 2**-20)),
                    _number(_times(first, 1e3), 2),
                    f"{(first - base) * 1e3:+.2f}" if first and base else "",
                ]
            )
        head = ["", "first answer, s of CPU", "s of time", "memory then, MiB"]
        head += ["at the end", "first chunk, ms", "on top of LiteLLM's"]
        return text + _table(head, rows, "lrrrrrr")

    def shares(self) -> str:
        """Show which package takes how much of a call of the direct engine."""
        shares = self._figures.shares
        whole = {f: (self.median(f"direct {f} call") or 0.0) * 1e6 for f in shares}
        names = sorted(
            {name for of_format in shares.values() for name in of_format},
            key=lambda name: -sum(s.get(name, 0.0) for s in shares.values()),
        )
        rows = []
        rest = dict.fromkeys(shares, 0.0)
        for name in names:
            taken = {f: shares[f].get(name, 0.0) * whole[f] for f in shares}
            if max(taken.values()) < 10:
                rest = {f: rest[f] + taken[f] for f in shares}
            else:
                label = _PACKAGES.get(name, name)
                rows.append([label, *(_number(us) for us in taken.values())])
        rows += [
            ["all that takes less than 10", *(_number(us) for us in rest.values())],
            ["the whole call", *(_number(us) for us in whole.values())],
        ]
        head = ["µs", *(NAMES[f] for f in shares)]
        return _table(head, rows, "l" + "r" * len(shares))

    def _micro(self, name: str) -> str:
        value = self.median(name)
        if value is None:
            return ""
        digits = 0 if value >= 1e-4 else 1
        spread = self.spread(name)
        return f"{value * 1e6:,.{digits}f} ± {spread * 1e6:,.{digits}f}"

    def _latency(self, name: str) -> str:
        half, most = self.percentile(name, 50), self.percentile(name, 99)
        if half is None or most is None:
            return ""
        return f"{_digits(half * 1e3)} / {_digits(most * 1e3)}"


def _mark(*, ok: bool) -> str:
    return "yes" if ok else "**no**"


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    lines = [head, ["---:" if a == "r" else "---" for a in align], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(text: str, figures: Figures, folder: Path) -> None:
    """Put the tables between the page's marks, and draw the picture beside it."""
    page = folder / "performance.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", "utf-8")
    draw(figures, folder / "performance.png")


def draw(figures: Figures, path: Path) -> None:
    """Draw CPU a call, CPU a chunk and calls a second as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    view = View(figures)
    panels = (
        ("CPU of a call, µs", "call", 1e6),
        ("CPU of a streamed chunk, µs", "chunk", 1e6),
        ("calls/s on one core, 64 in flight", "rate at 64", 1.0),
    )
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, (title, what, factor) in zip(axes, panels, strict=True):
        bars = [
            (peer, value * factor)
            for peer in view.peers("openai")
            if (value := view.median(f"{peer.name} openai {what}")) is not None
        ]
        bars.sort(key=lambda bar: bar[1], reverse=what != "rate at 64")
        for place, (peer, value) in enumerate(bars):
            colour = {"direct": "#1769aa", "raw": "#b0b0b0"}.get(peer.name, "#e0a458")
            axis.barh(place, value, color=colour)
            text = f" {value:,.0f}" if value >= 100 else f" {value:.1f}"
            axis.text(value, place, text, va="center", fontsize=8)
        axis.set_yticks(
            range(len(bars)), [peer.label.strip("*") for peer, _ in bars], fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("OpenAI's format against one loopback server", fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
