"""Sorts a caller's tools, and describes functions as OpenAI does. Pure."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dipeo_llm.domain import ToolConfig, ToolType
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.functions import function_tool
from dipeo_llm.structured import check_schema, object_schema


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
        InvalidRequestError: A tool is of another kind, or cannot be described.
    """
    found = Tools()
    for tool in tools:
        if isinstance(tool, Mapping):
            kind = getattr(tool.get("type"), "value", tool.get("type"))
            if kind in list(ToolType):
                config = {k: v for k, v in tool.items() if k != "type"}
                found.provided.append(
                    ToolConfig(type=ToolType(kind), config=config or None)
                )
            elif kind in ("function", "custom", None):
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
    names = [tool["function"]["name"] for tool in found.functions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InvalidRequestError(
            f"two tools have the name {min(twice)!r}; a call would not tell which is meant"
        )
    return found


def read_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Return a `tool_choice` in the format of OpenAI's chat API.

    Args:
        choice: A word, or a dict that names a function in the format of OpenAI's chat or
            Responses API, or of Anthropic.

    Raises:
        InvalidRequestError: The dict names no function.
    """
    if isinstance(choice, str):
        return choice
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequestError(
            "`tool_choice` must be 'auto', 'none', 'required' or"
            ' {"type": "function", "function": {"name": …}}'
        )
    return {"type": "function", "function": {"name": name}}


def _function_dict(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function tool in the format of OpenAI's chat API."""
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not (isinstance(name, str) and name.strip()):
        raise InvalidRequestError(
            "a function tool needs a name:"
            ' {"type": "function", "function": {"name": …, "parameters": …}}'
        )
    if not isinstance(inner.get("description"), str | None) or not isinstance(
        inner.get("strict"), bool | None
    ):
        raise InvalidRequestError(
            f"the `description` of the tool {name!r} must be text, and its `strict` True"
            " or False"
        )
    if inner is not tool:
        function = dict(inner)
        if "parameters" in function:
            function["parameters"] = _read_schema(name, function["parameters"])
        return {**tool, "type": "function", "function": function}
    function = {key: tool[key] for key in _FUNCTION_KEYS if tool.get(key) is not None}
    for key in _SCHEMA_KEYS:
        if key in tool:
            function["parameters"] = _read_schema(name, tool[key])
    rest = {"cache_control": tool["cache_control"]} if "cache_control" in tool else {}
    return {"type": "function", "function": function, **rest}


def _read_schema(name: str, schema: Any) -> dict[str, Any]:
    """Return the schema of a tool's arguments with an object at its root.

    Raises:
        InvalidRequestError: The arguments would not be an object.
    """
    of = "the parameters of the tool"
    if schema is None:
        schema = {}
    read = object_schema(schema) if isinstance(schema, Mapping) else None
    if read is None:
        raise InvalidRequestError(f"{of} {name!r} must be a JSON schema of an object")
    return {"type": "object", "properties": {}, **check_schema(read, f"{of} {name!r}")}


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
