"""An answer in the domain's words, and what the readers of all formats share. Pure."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from dipeo_llm.domain import (
    ImageGenerationResult,
    ToolCall,
    ToolOutput,
    ToolType,
    WebSearchResult,
)

JSON = dict[str, Any]


@dataclass(slots=True)
class Reading:
    """An answer in the domain's words."""

    text: str = ""
    texts: list[str] = field(default_factory=list)
    """The texts of all choices, where more than one was asked for."""
    reasoning: str | None = None
    thinking_blocks: list[JSON] = field(default_factory=list)
    """Anthropic's thinking blocks, which go back with a tool's result."""
    content_blocks: list[JSON] = field(default_factory=list)
    """Anthropic's or Google's whole content, where the work of their own tools is in it."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish: str | None = None
    refusal: str | None = None
    model: str | None = None
    id: str | None = None
    usage: Any = None
    searches: list[WebSearchResult] = field(default_factory=list)
    images: list[ImageGenerationResult] = field(default_factory=list)

    @property
    def tool_outputs(self) -> list[ToolOutput] | None:
        """The results of the provider's own tools, or None."""
        outputs = [
            ToolOutput(type=ToolType.IMAGE_GENERATION, result=image)
            for image in self.images
        ]
        if self.searches:
            outputs.insert(
                0, ToolOutput(type=ToolType.WEB_SEARCH, result=self.searches)
            )
        return outputs or None


def read_tool_call(call_id: str | None, name: str | None, arguments: Any) -> ToolCall:
    """Make a tool call from arguments given as JSON text or as an object.

    Text that is not a JSON object stays text: `arguments` is None then, never `{}`.
    """
    if arguments is not None and not isinstance(arguments, str):
        text, parsed = json.dumps(arguments, ensure_ascii=False), arguments
    else:
        text = arguments or ""
        try:
            parsed = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
    return ToolCall(
        id=call_id or "",
        name=name or "",
        arguments=parsed if isinstance(parsed, dict) else None,
        arguments_text=text,
    )


def read_function(call: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Return the name and the arguments of a call in OpenAI's shape."""
    function = call.get("function") or {}
    return function.get("name"), function.get("arguments")


def make_call_id(answer_id: str | None, index: int, call: Any) -> str:
    """Make an id for a call without one; the same answer gives the same id."""
    seed = f"{answer_id}\0{index}\0{json.dumps(call, sort_keys=True, default=str)}"
    return "call_" + blake2b(seed.encode(), digest_size=12).hexdigest()


def merge_pages(results: Iterable[WebSearchResult]) -> list[WebSearchResult]:
    """Keep one result per page, in order, with the first title and snippet given."""
    pages: dict[str, WebSearchResult] = {}
    for result in results:
        page = pages.setdefault(result.url, result)
        page.title = page.title or result.title
        page.snippet = page.snippet or result.snippet
    return list(pages.values())


def join_paragraphs(texts: Iterable[str]) -> str | None:
    """Join the texts that are not empty; return None without any."""
    return "\n\n".join(filter(None, texts)) or None
