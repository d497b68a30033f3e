"""Tools: a caller's own, from functions or dicts, and those that a provider runs itself.

Pure. Knows which provider has which tool of its own, and under which name.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from dipeo_llm.adapters.factory import Provider
from dipeo_llm.domain import ToolConfig, ToolType
from dipeo_llm.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of a request, sorted by who runs them."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    """The caller's own, as OpenAI's function-tool dicts."""
    provided: list[ToolConfig] = field(default_factory=list)
    """The provider's."""


def sort_tools(tools: Sequence[Any]) -> Tools:
    """Sort what a caller gave as `tools`.

    Args:
        tools: OpenAI function-tool dicts, plain typed functions, `ToolConfig` objects,
            or any object with their attributes.

    Raises:
        InvalidRequestError: One is none of these.
    """
    found = Tools()
    for tool in tools:
        if isinstance(tool, Mapping):
            kind = tool.get("type", "function")
            if kind == "function":
                found.functions.append(dict(tool))
            elif kind in set(ToolType):
                found.provided.append(
                    ToolConfig(
                        type=ToolType(kind),
                        config={k: v for k, v in tool.items() if k != "type"} or None,
                    )
                )
            else:
                raise InvalidRequestError(f"a tool of type {kind!r} is not known here")
        elif isinstance(tool, ToolConfig) or hasattr(tool, "type"):
            if getattr(tool, "enabled", True):
                found.provided.append(_config(tool))
        elif callable(tool):
            found.functions.append(function_tool(tool))
        else:
            raise InvalidRequestError(
                f"{tool!r} is no tool: give a function, an OpenAI function-tool dict"
                " or a ToolConfig"
            )
    return found


def _config(tool: Any) -> ToolConfig:
    if isinstance(tool, ToolConfig):
        return tool
    name = getattr(tool.type, "value", tool.type)
    try:
        return ToolConfig(type=ToolType(name), config=getattr(tool, "config", None))
    except ValueError:
        known = ", ".join(ToolType)
        raise InvalidRequestError(
            f"{name!r} is no tool of a provider; there are {known}"
        ) from None


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a typed function as OpenAI does: name, docstring, parameters' schema.

    Args:
        function: Its annotations and defaults become the schema, through pydantic; its
            docstring becomes the description.

    Raises:
        InvalidRequestError: A parameter cannot be described, such as `*args`.
    """
    name = getattr(function, "__name__", "")
    if not name or name == "<lambda>":
        raise InvalidRequestError(f"{function!r} has no name to call it by")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY}:
            raise InvalidRequestError(
                f"the tool {name!r} must take its arguments by name, not {parameter}"
            )
    try:
        schema = _adapter(function).json_schema()
    except Exception as exc:
        raise InvalidRequestError(
            f"the tool {name!r} cannot be described: {exc}"
        ) from exc
    schema.setdefault("properties", {})
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": inspect.getdoc(function) or "",
            "parameters": schema,
        },
    }


# pydantic types it for types, and takes functions as well.
_adapter: Any = TypeAdapter

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
