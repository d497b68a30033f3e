"""Sorts a caller's tools, and describes functions as OpenAI does. Pure."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

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
