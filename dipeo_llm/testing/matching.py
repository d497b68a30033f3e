"""Compares requests by what they mean, and says field by field where they differ.

Pure. A request is a method, a kind of host, a path, a query and a body. JSON, forms and
multipart bodies are compared as data. Everything that may differ without changing the
meaning is listed in this module.
"""

import difflib
import email.parser
import email.policy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from dipeo_llm.client import is_loopback
from dipeo_llm.key_shapes import KEY_PARAMETERS

VOLATILE: Final = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key"}
)
"""Top-level fields of a body that label a request and do not change its answer.

Null equals an absent field, and so does `"stream": false`. The ids of tool calls, which
are new in each run, count by the order in which they occur. Parameters of the URL that
carry a key are left out, and so is the boundary of a multipart body.
"""

# The part of a host's name that identifies an account or a region, not a service.
_HOST_CLASSES: Final = (
    (
        re.compile(r"[^.]+(\.openai\.azure\.com|\.cognitiveservices\.azure\.com)"),
        r"*\1",
    ),
    (re.compile(r"(bedrock(?:-\w+)*)\.[^.]+(\.amazonaws\.com)"), r"\1.*\2"),
    (re.compile(r"[^.]+(-aiplatform\.googleapis\.com)"), r"*\1"),
)
_CALL_IDS: Final = frozenset({"tool_call_id", "tool_use_id", "call_id"})
_CALLS: Final = frozenset({"function", "tool_use", "function_call"})


class _Nothing:
    """Stands for a field that is not there."""

    def __repr__(self) -> str:
        return "(nothing)"


NOTHING: Final = _Nothing()


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that is not the same in two requests."""

    path: str
    """Such as `messages[0].content`."""
    expected: Any
    """NOTHING if the field is new."""
    actual: Any
    """NOTHING if the field is gone."""


def as_data(
    method: str,
    uri: str,
    body: bytes | None,
    ignore: Sequence[str] = (),
    content_type: str = "",
) -> dict[str, Any]:
    """Return what a request means, as data to compare.

    Args:
        method: GET, POST, …
        uri: The whole address.
        body: The bytes that are sent.
        ignore: Further fields of the body to leave out, with dots for nested ones.
        content_type: The Content-Type header; says how to read the body.
    """
    parts = urlsplit(uri)
    data: dict[str, Any] = {
        "method": method.upper(),
        "host": host_class(parts.netloc),
        "path": parts.path or "/",
    }
    query = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not re.fullmatch(KEY_PARAMETERS, name)
    ]
    if query:
        data["query"] = _grouped(query)
    if body:
        data["body"] = _meaning(fields_of(body, content_type), ignore)
    return data


def fields_of(body: bytes, content_type: str = "") -> Any:
    """Read a body: JSON, a form's or a multipart body's fields, or else text."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        return _grouped(
            parse_qsl(body.decode(errors="replace"), keep_blank_values=True)
        )
    if kind.startswith("multipart/"):
        return _grouped(_parts(body, content_type))
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="backslashreplace")


def _parts(body: bytes, content_type: str) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a multipart body (RFC 7578)."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    for part in parser.parsebytes(head + body).iter_parts():
        raw: Any = part.get_payload(decode=True) or b""
        content = raw.decode(errors="backslashreplace")
        file = part.get_filename()
        field = {"filename": file, "type": part.get_content_type(), "content": content}
        name = part.get_param("name", "part", "content-disposition")
        yield str(name), content if file is None else field


def _grouped(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return fields by name; one that is repeated has the list of its values."""
    found: dict[str, list[Any]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return {k: values[0] if len(values) == 1 else values for k, values in found.items()}


def host_class(netloc: str) -> str:
    """Return the kind of a host: loopback on any port, a cloud in any region."""
    parts = urlsplit(f"//{netloc}")
    host = parts.hostname or ""
    if is_loopback(host):
        return "loopback"
    for pattern, kind in _HOST_CLASSES:
        if pattern.fullmatch(host):
            return pattern.sub(kind, host)
    return host if parts.port in {None, 80, 443} else f"{host}:{parts.port}"


def differences(expected: Any, actual: Any, path: str = "") -> list[Difference]:
    """List the fields in which two values differ, nested ones included.

    `...` as an expected value stands for any value that is there.
    """
    return list(_differences(expected, actual, path))


def nearest(actual: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> int:
    """Return the index of the candidate that differs least, the first one of several."""

    def distance(candidate: Mapping[str, Any]) -> tuple[int, float]:
        different = differences(candidate, actual)
        elsewhere = sum(d.path in {"method", "host", "path"} for d in different)
        one, other = _text(candidate), _text(actual)
        likeness = difflib.SequenceMatcher(None, one[:4000], other[:4000]).ratio()
        return len(different) + 100 * elsewhere, -likeness

    return min(range(len(candidates)), key=lambda i: distance(candidates[i]))


def explain(
    different: Sequence[Difference],
    names: tuple[str, str] = ("recorded", "now"),
    most: int = 12,
) -> str:
    """Write differences for people to read: the field, then its two values."""
    width = max(map(len, names)) + 1
    lines: list[str] = []
    for difference in different[:most]:
        one, other = _shown(difference.expected, difference.actual)
        lines += [
            f"  {difference.path}",
            f"    {names[0] + ':':<{width}} {one}",
            f"    {names[1] + ':':<{width}} {other}",
        ]
    if len(different) > most:
        lines.append(f"  … and {len(different) - most} more")
    return "\n".join(lines)


def summary(data: Mapping[str, Any]) -> str:
    """Describe a request in one line: address, model, and the last message."""
    body = data.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    text = _last_message(body) if isinstance(body, dict) else ""
    line = f"{data['method']} {data['host']}{data['path']}"
    return line + (f", model {model}" if model else "") + (f": {text}" if text else "")


def _meaning(body: Any, ignore: Sequence[str]) -> Any:
    if not isinstance(body, dict):
        return body
    kept = {
        name: value
        for name, value in body.items()
        if name not in VOLATILE
        and value is not None
        and not (name == "stream" and value is False)
    }
    data: dict[str, Any] = _numbered(kept, {})
    for path in ignore:
        _remove(data, path.split("."))
    return data


def _numbered(value: Any, seen: dict[str, str]) -> Any:
    """Copy JSON, with the ids of tool calls replaced by their order."""
    if isinstance(value, list):
        return [_numbered(item, seen) for item in value]
    if not isinstance(value, dict):
        return value
    is_call = value.get("type") in _CALLS
    return {
        name: seen.setdefault(item, f"tool call {len(seen) + 1}")
        if isinstance(item, str) and (name in _CALL_IDS or (name == "id" and is_call))
        else _numbered(item, seen)
        for name, item in value.items()
    }


def _remove(data: Any, path: Sequence[str]) -> None:
    if not isinstance(data, dict):
        return
    if len(path) == 1:
        data.pop(path[0], None)
    else:
        _remove(data.get(path[0]), path[1:])


def _differences(expected: Any, actual: Any, path: str) -> Iterator[Difference]:
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for name in [*expected, *(name for name in actual if name not in expected)]:
            yield from _differences(
                expected.get(name, NOTHING),
                actual.get(name, NOTHING),
                f"{path}.{name}" if path else str(name),
            )
    elif isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        yield from _differences_of_lists(expected, actual, path)
    elif not _equal(expected, actual):
        yield Difference(path or "value", expected, actual)


def _differences_of_lists(
    expected: Sequence[Any], actual: Sequence[Any], path: str
) -> Iterator[Difference]:
    """Align two lists, so that an inserted item is one difference and not many."""
    one, other = [_text(item) for item in expected], [_text(item) for item in actual]
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    for kind, from_, to, new_from, new_to in matcher.get_opcodes():
        if kind == "equal":
            continue
        for step in range(max(to - from_, new_to - new_from)):
            here, there = from_ + step, new_from + step
            is_old, is_new = here < to, there < new_to
            yield from _differences(
                expected[here] if is_old else NOTHING,
                actual[there] if is_new else NOTHING,
                f"{path}[{there if is_new else here}]",
            )


def _equal(one: Any, other: Any) -> bool:
    if one is ...:
        return other is not NOTHING
    # In Python True equals 1; in JSON it does not.
    if isinstance(one, int | float) and isinstance(other, int | float):
        return isinstance(one, bool) is isinstance(other, bool) and one == other
    return bool(one == other)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=repr)


def _last_message(body: Mapping[str, Any]) -> str:
    turns = body.get("messages") or body.get("contents") or body.get("input") or ""
    last = turns[-1] if isinstance(turns, list) and turns else turns
    while isinstance(last, dict | list) and last:
        last = (
            last[-1]
            if isinstance(last, list)
            else last.get("content") or last.get("parts") or last.get("text")
        )
    return _cut(last) if isinstance(last, str) and last else ""


_LONGEST: Final = 100


def _shown(expected: Any, actual: Any) -> tuple[str, str]:
    """Show two values, long ones from a little before their first difference."""
    one, other = _readable(expected), _readable(actual)
    if max(len(one), len(other)) <= _LONGEST:
        return one, other
    pairs = enumerate(zip(one, other, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, first - 30)
    return _window(one, start), _window(other, start)


def _window(text: str, start: int) -> str:
    end = start + _LONGEST
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def _readable(value: Any) -> str:
    if value is ...:
        return "(anything)"
    if isinstance(value, str | _Nothing):
        return repr(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        return repr(value)


def _cut(text: str, longest: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")
