"""Sorts a caller's tools, and describes functions as OpenAI does. Pure."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dipeo_llm.domain import ToolConfig, ToolType
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.functions import function_tool


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request, sorted by who runs them."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    """The caller's, as function-tool dicts in the format of OpenAI's chat API."""
    provided: list[ToolConfig] = field(default_factory=list)
    """The provider's own."""


def sort_tools(tools: Sequence[Any]) -> Tools:
    """Sort the tools of a request by who runs them.

    Args:
        tools: Functions and pydantic classes; function-tool dicts in the format of
            OpenAI's chat or Responses API, Anthropic or MCP; `ToolConfig` objects, or
            any objects with their attributes.

    Raises:
        InvalidRequestError: One of them is none of these, or cannot be described.
    """
    found = Tools()
    for tool in tools:
        if isinstance(tool, Mapping):
            kind = getattr(tool.get("type"), "value", tool.get("type"))
            if kind in set(ToolType):
                config = {k: v for k, v in tool.items() if k != "type"}
                found.provided.append(
                    ToolConfig(type=ToolType(kind), config=config or None)
                )
            elif kind in {"function", "custom", None}:
                found.functions.append(_function_dict(tool))
            else:
                raise InvalidRequestError(
                    f"a tool of type {kind!r} is unknown; a provider's own tool is"
                    " ToolConfig(type=…) with one of "
                    + ", ".join(repr(known.value) for known in ToolType)
                )
        elif hasattr(tool, "type") and not isinstance(tool, type):
            if getattr(tool, "enabled", True):
                found.provided.append(_config(tool))
        elif callable(tool):
            found.functions.append(function_tool(tool))
        else:
            raise InvalidRequestError(
                f"a tool must be a function, a function-tool dict or a ToolConfig; got"
                f" {reprlib.repr(tool)}"
            )
    return found


def _function_dict(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function tool in the format of OpenAI's chat API."""
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise InvalidRequestError(
            "a function tool needs a name:"
            ' {"type": "function", "function": {"name": …, "parameters": …}}'
        )
    if inner is not tool:
        return dict(tool)
    function = {key: tool[key] for key in _FUNCTION_KEYS if tool.get(key) is not None}
    for key in _SCHEMA_KEYS:
        if key in tool:
            function["parameters"] = tool[key]
    rest = {"cache_control": tool["cache_control"]} if "cache_control" in tool else {}
    return {"type": "function", "function": function, **rest}


_FUNCTION_KEYS = ("name", "description", "strict")
# OpenAI's Responses API, Anthropic and MCP have these keys beside the name.
_SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")


def _config(tool: Any) -> ToolConfig:
    if isinstance(tool, ToolConfig):
        return tool
    name = getattr(tool.type, "value", tool.type)
    try:
        return ToolConfig(type=ToolType(name), config=getattr(tool, "config", None))
    except ValueError:
        known = ", ".join(ToolType)
        raise InvalidRequestError(
            f"{name!r} is not a provider's own tool; known are {known}"
        ) from None
