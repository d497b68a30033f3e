"""A Python function as a tool: its schema for the model, and its typed arguments.

Knows signatures, docstrings and pydantic; knows no provider.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from dipeo_llm.errors import InvalidRequestError

# A schema takes about as long to build as a whole call takes.
_tools: WeakKeyDictionary[FunctionType, dict[str, Any]] = WeakKeyDictionary()


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function as an OpenAI function tool: name, description, schema.

    Args:
        function: A typed function, a method, a `functools.partial`, an object with
            `__call__`, or a class that pydantic can describe. Annotations and defaults
            become the schema. A parameter's description is its `Field(description=…)`,
            the text of an `Annotated[str, "text"]`, or its entry in the docstring, in
            Google's, NumPy's or Sphinx's style. The rest of the docstring describes the
            tool. Keywords that a partial binds are hidden from the model.

    Raises:
        InvalidRequestError: The function has no name, a parameter that cannot be given
            by name, or a type that pydantic cannot describe; the message says which.
    """
    if not isinstance(function, FunctionType):
        return _describe(function)
    tool = _tools.get(function)
    if tool is None:
        tool = _tools[function] = _describe(function)
    return tool


def read_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Convert the JSON arguments of a tool call to the types of a function.

    Args:
        function: As for `function_tool`.
        arguments: The arguments as JSON values.

    Returns:
        The keywords to call the function with: models, dates and enums where it is
        annotated so. Defaults are included.

    Raises:
        InvalidRequestError: As `function_tool`.
        ValueError: The arguments do not fit; the message names each and says why.
    """
    adapter, _ = _adapt(function)
    try:
        read = adapter.validate_json(to_json(dict(arguments)))
    except ValidationError as exc:
        raise ValueError(explain(exc)) from None
    return dict(arguments) if isinstance(function, type) else read


def explain(error: ValidationError) -> str:
    """Say on one line what pydantic found, without the input."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'the value'}: {item['msg']}"
        for item in found[:5]
    )


def reason(error: Exception) -> str:
    """Return the first sentence of one of pydantic's messages about a type."""
    return str(error).partition("\n")[0].strip().rstrip(".") or type(error).__name__


def _describe(function: Callable[..., Any]) -> dict[str, Any]:
    name = _name(function)
    adapter, description = _adapt(function)
    try:
        schema = adapter.json_schema()
    except Exception as exc:
        raise _error(name, exc) from exc
    if "$ref" in schema:  # a recursive class
        root = schema.pop("$ref").removeprefix("#/$defs/")
        schema = {**schema["$defs"][root], **schema}
    if schema.get("type") != "object":
        raise InvalidRequestError(f"the tool {name!r} must be a class with fields")
    schema.pop("title", None)
    schema.pop("description", None)
    schema.setdefault("properties", {})
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


def _name(function: Callable[..., Any]) -> str:
    target = _target(function)
    name: str = getattr(target, "__name__", "") or type(target).__name__
    if name == "<lambda>":
        raise InvalidRequestError(
            "a lambda has no name that a model can call; define the tool with `def`"
        )
    return name


def _target(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _adapt(function: Callable[..., Any]) -> tuple[TypeAdapter[Any], str]:
    """Return what validates a function's arguments, and the function's description."""
    target = _target(function)
    doc = inspect.getdoc(target) or ""
    if isinstance(function, type):
        # Not by `getdoc`, which returns pydantic's docstring for a class without one.
        description = inspect.cleandoc(function.__doc__ or "")
        return _type_adapter(function, _name(function)), description
    if not inspect.isroutine(target):
        target = type(target).__call__
        doc = doc or inspect.getdoc(target) or ""
    description, texts = _read_docstring(doc)
    keywords = _collect_keywords(function, target, texts)
    return _type_adapter(keywords, _name(function)), description


def _type_adapter(described: Any, name: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(described)
    except Exception as exc:
        raise _error(name, exc) from exc


def _error(name: str, exc: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"the tool {name!r} cannot be described: {reason(exc)}")


def _collect_keywords(
    function: Callable[..., Any], target: Any, texts: Mapping[str, str]
) -> Callable[..., dict[str, Any]]:
    """Make a function with the same parameters that returns what it is called with."""
    name = _name(function)
    try:
        signature = inspect.signature(function)
        hints = get_type_hints(inspect.unwrap(target), include_extras=True)
    except Exception as exc:
        raise _error(name, exc) from exc
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY}:
            raise InvalidRequestError(
                f"the tool {name!r} must take its arguments by name, not {parameter}"
            )
        if parameter.name in getattr(function, "keywords", {}):
            continue
        hint = _with_description(
            hints.get(parameter.name, Any), texts.get(parameter.name)
        )
        parameters.append(parameter.replace(annotation=hint))

    def collect(**keywords: Any) -> dict[str, Any]:
        return keywords

    collect.__annotations__ = {p.name: p.annotation for p in parameters}
    collect.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            p if p.kind is p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY)
            for p in parameters
        ]
    )
    return collect


def _with_description(hint: Any, text: str | None) -> Any:
    """Add a description to a type, unless the type has a `Field(description=…)`."""
    metadata = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    if any(getattr(item, "description", None) for item in metadata):
        return hint
    for item in metadata:
        # PEP 727's `Doc` has its text in `documentation`.
        own = item if isinstance(item, str) else getattr(item, "documentation", None)
        text = own if isinstance(own, str) else text
    return Annotated[hint, Field(description=text)] if text else hint


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into the tool's description and those of its parameters."""
    from docstring_parser import DocstringParam, DocstringRaises, ParseError, parse

    try:
        parsed = parse(doc)
    except ParseError:
        return doc, {}
    texts = {p.arg_name: p.description for p in parsed.params if p.description}
    if not texts:
        return doc, {}
    rest = [
        f"{item.args[0].capitalize()}: {item.description}"
        for item in parsed.meta
        if item.description and not isinstance(item, DocstringParam | DocstringRaises)
    ]
    return "\n\n".join([parsed.description or "", *rest]).strip(), texts
