"""How the result of a call is printed: text, JSON, sources, pictures, usage."""

import base64
import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dipeo_llm.cli import terminal
from dipeo_llm.domain import ChatResult, ImageGenerationResult, ToolOutput

_SUFFIXES = frozenset({"png", "jpeg", "jpg", "webp", "gif"})


def print_json(result: ChatResult) -> None:
    """Print everything but the providers' own JSON, which is large and may change."""
    raw: Any = {"raw_response": True, "tool_outputs": {"__all__": {"raw_response"}}}
    terminal.write_json(result.model_dump(exclude=raw))


def print_rest(result: ChatResult, *, is_printed: bool) -> None:
    """Print a result, and on stderr what is wrong with it.

    Args:
        result: Pictures in it are saved in the working directory.
        is_printed: Whether a stream has printed the text, but no newline after it.
    """
    outputs = result.tool_outputs or []
    if result.text or not outputs:
        terminal.write_text("\n" if is_printed else result.text + "\n")
    terminal.write(_list_sources(outputs) + _save_pictures(outputs))
    if result.refusal:
        terminal.write_error(f"the model declined: {result.refusal}")
    if result.finish_reason not in {"stop", None}:
        terminal.write_error(
            f"the answer is incomplete: it ended with {result.finish_reason!r}"
        )


def print_usage(result: ChatResult, seconds: float) -> None:
    """Print tokens, cost and time on one line of stderr."""
    usage, cost = result.token_usage, result.cost_usd
    parts = ["tokens unknown"]
    if usage:
        cached = f" ({usage.cached} cached)" if usage.cached else ""
        thought = f" ({usage.reasoning} reasoning)" if usage.reasoning else ""
        parts = [f"{usage.input} tokens in{cached}", f"{usage.output} out{thought}"]
    parts.append("cost unknown" if cost is None else f"{_dollars(cost)} USD")
    parts.append(f"{seconds:.1f} s")
    terminal.write_aside(", ".join(parts) + "\n")


def _dollars(cost: float) -> str:
    """Write a price with two significant digits, and never as 1e-06."""
    return f"{cost:.2f}" if cost >= 1 else f"{float(f'{cost:.2g}'):.10f}".rstrip("0")


def _list_sources(outputs: Sequence[ToolOutput]) -> str:
    """List the pages that a search found, each once."""
    found: dict[str, str] = {}
    for output in outputs:
        for page in output.result if isinstance(output.result, list) else ():
            found.setdefault(page.url, page.title)
    listed = terminal.lines(
        f"- {title}: {url}" if title else f"- {url}" for url, title in found.items()
    )
    return f"\nSources:\n{listed}" if listed else ""


def _save_pictures(outputs: Sequence[ToolOutput]) -> str:
    """Save the pictures in the working directory; return their names, one on a line."""
    return terminal.lines(
        _save_picture(output.result)
        for output in outputs
        if isinstance(output.result, ImageGenerationResult)
    )


def _save_picture(picture: ImageGenerationResult) -> str:
    """Write a picture under the first free name, and return the name."""
    data = base64.b64decode(picture.image_data)
    suffix = picture.format if picture.format in _SUFFIXES else "png"
    for number in itertools.count(1):
        name = f"image-{number}.{suffix}"
        with suppress(FileExistsError), open(name, "xb") as file:  # noqa: PTH123
            file.write(data)
            return name
    raise AssertionError  # for the type checker: the numbers never end
