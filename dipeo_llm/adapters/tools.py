"""Tools: the caller's own, from functions or dicts, and the provider's own.

Pure. Knows which provider has which tool, and its name there.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dipeo_llm.adapters.factory import Provider
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


_SEARCHES = frozenset({ToolType.WEB_SEARCH, ToolType.WEB_SEARCH_PREVIEW})


def provided_parameters(
    provider: Provider, model: str, provided: Sequence[ToolConfig]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the provider's own words for its tools.

    Sources, read 2026-11-23:
    https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/web-search-tool,
    https://ai.google.dev/gemini-api/docs/google-search,
    https://platform.openai.com/docs/guides/tools-web-search.

    Returns:
        What goes among `tools`, and further parameters of the request.

    Raises:
        InvalidRequestError: The provider, or this model of it, has no such tool.
    """
    tools: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {}
    for tool in provided:
        config = tool.config or {}
        if tool.type in _SEARCHES and provider.format == "anthropic":
            tools.append(
                {"type": "web_search_20250305", "name": "web_search"}
                | {k: v for k, v in config.items() if k != "search_context_size"}
            )
        elif tool.type in _SEARCHES and provider.format == "google":
            tools.append({"googleSearch": {}})
        elif tool.type in _SEARCHES and provider.name == "openai":
            if "search" in model:
                parameters["web_search_options"] = config
            else:
                tools.append({"type": "web_search", **config})
        elif tool.type is ToolType.IMAGE_GENERATION and provider.name == "openai":
            tools.append({"type": "image_generation", **config})
        elif (
            tool.type is ToolType.IMAGE_GENERATION
            and provider.format == "google"
            and "image" in model
        ):
            parameters["modalities"] = ["image", "text"]
        else:
            raise InvalidRequestError(
                f"{provider.name}'s {model} has no tool {tool.type.value!r} of its own",
                service=provider.name,
                model=model,
            )
    return tools, parameters


def needs_responses(provider: Provider, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether OpenAI takes these tools at its Responses endpoint only."""
    return provider.name == "openai" and any(
        tool.get("type") != "function" for tool in tools
    )
