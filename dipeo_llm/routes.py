"""Routes: names of the user's own for models, each served by several deployments.

Configuration only, from Python or from a YAML or JSON file; `routing` chooses.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dipeo_llm.domain import ServiceName
from dipeo_llm.errors import SettingsError
from dipeo_llm.settings import http_url

Strategy = Literal["shuffle", "cost", "load", "latency", "usage"]

_LARGEST_FILE = 1024 * 1024
_MOST_LINES = 100_000
"""Values of a file whose lines an error can name."""

_Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S(.*\S)?$")]
_Count = Annotated[int, Field(strict=True, ge=1)]
_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Deployment(_Config):
    """A model at one address with one key, and what it may be asked for."""

    model: _Name
    """A model string, as for `LLMInfraService.complete`; not the name of a route."""
    service: ServiceName | None = None
    """The provider, if the model string does not name it."""
    api_key_id: str | None = None
    """The key's id, never the key itself; None is the call's own."""
    base_url: Annotated[str, AfterValidator(http_url)] | None = None
    """Where calls go; wins over the key's record and the settings."""
    name: str = ""
    """What results and records call it; by default the model, the key's id and the host."""
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    """Its share of the calls among equals; 1,000,000 at most."""
    rpm: _Count | None = None
    """Most requests in any minute; None sets no limit."""
    tpm: _Count | None = None
    """Most tokens in any minute, input and output together; None sets no limit."""
    context_window: _Count | None = None
    """Most input tokens; None is LiteLLM's value."""
    input_usd_per_million: _Price | None = None
    """USD for 1,000,000 input tokens, for the strategy "cost"; None is LiteLLM's value."""
    output_usd_per_million: _Price | None = None
    """USD for 1,000,000 output tokens, likewise."""

    @cached_property
    def label(self) -> str:
        """The name, or one made of the model, the key's id and the host."""
        host = urlsplit(self.base_url).netloc if self.base_url else None
        return self.name or "@".join(filter(None, (self.model, self.api_key_id, host)))

    @cached_property
    def id(self) -> str:
        """A digest of what is called; two routes share the state of one deployment."""
        service = getattr(self.service, "value", self.service)
        called = [self.model, service, self.api_key_id, self.base_url]
        return blake2b(json.dumps(called).encode(), digest_size=12).hexdigest()


class Route(_Config):
    """How one of the deployments is chosen for a call, and what follows a failure."""

    deployments: Annotated[tuple[Deployment, ...], Field(min_length=1)]
    strategy: Strategy = "shuffle"
    """Which deployment comes first: "shuffle" any, by weight; "cost" the cheapest for the
    request; "load" the one with the fewest calls in flight; "latency" the one whose
    first content came soonest; "usage" the one with the most room under its limits."""
    fallbacks: tuple[str, ...] = ()
    """Routes to use when the deployments of this one cannot answer."""
    context_window_fallbacks: tuple[str, ...] = ()
    """Routes to use for a request that is too long; None of them: `fallbacks`."""
    cooldown: _Seconds = 30.0
    """Seconds for which a failing deployment gets no calls; 0 switches that off. A
    `Retry-After` of the provider wins."""
    failures: _Count = 3
    """Server errors and timeouts in a row that start a cool-down. A refused connection, a
    refused key, a used-up quota, an unknown model and status 429 start it at once."""
    when_busy: Literal["wait", "fail"] = "wait"
    """Whether a call waits for a limit or a cool-down to end, within its deadline."""
    affinity: bool = True
    """Whether the calls of a session stay at one deployment, whose prompt cache is warm."""

    @model_validator(mode="after")
    def _check_labels(self) -> "Route":
        labels = [deployment.label for deployment in self.deployments]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"two deployments are called {label!r}; give them a `name`, or one of"
                    " them a `weight`"
                )
        of_id: dict[str, str] = {}
        for each in self.deployments:
            if (first := of_id.setdefault(each.id, each.label)) != each.label:
                raise ValueError(
                    f"{first!r} and {each.label!r} are the same model with the same key"
                    " at the same address; keep one of them, with a `weight`"
                )
        return self


class Routes(_Config):
    """All routes of a service, by name."""

    routes: dict[_Name, Route]

    @model_validator(mode="after")
    def _check_fallbacks(self) -> "Routes":
        for name, route in self.routes.items():
            for other in (*route.fallbacks, *route.context_window_fallbacks):
                if other in self.routes and other != name:
                    continue
                near = difflib.get_close_matches(other, self.routes.keys() - {name}, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                kind = "fallbacks" if other in route.fallbacks else _CONTEXT
                raise PydanticCustomError(
                    _WRONG_FALLBACK,
                    "{problem}",
                    {
                        "problem": f"{other!r} is not another route{hint}",
                        "place": (name, kind),
                    },
                )
        return self

    @classmethod
    def read(cls, source: "Routes | Mapping[str, Any] | str | Path") -> "Routes":
        """Return routes from a mapping of names to routes, or from a file.

        Args:
            source: `{"fast": Route(…)}`, with routes as objects or as dicts; or the path
                of a YAML or JSON file, whose top level is `routes:`.

        Raises:
            SettingsError: The routes cannot be used; the message names the file, the line
                and the field.
        """
        if isinstance(source, Routes):
            return source
        if isinstance(source, Mapping):
            return _validate({"routes": dict(source)}, "routes", {})
        return _read_file(Path(source))


def _read_file(path: Path) -> Routes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise SettingsError(f"{path} cannot be read: {reason}") from None
    if len(data) > _LARGEST_FILE:
        raise SettingsError(f"{path} cannot be read: it is larger than 1 MiB")
    try:
        if path.suffix == ".json":
            value = json.loads(text)
            # A tab is white space in JSON, but not in YAML; a JSON string has none.
            text = text.replace("\t", " ")
        else:
            value = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        found = _find_lines(node, ()) if node is not None else ()
        # Aliases of aliases may stand for any number of values.
        lines = dict(islice(found, _MOST_LINES))
    except json.JSONDecodeError as exc:
        raise SettingsError(f"{path}:{exc.lineno}: {exc.msg}") from None
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(exc, "problem", None) or "it is not YAML"
        raise SettingsError(f"{path}{line}: {problem}") from None
    except RecursionError:
        raise SettingsError(f"{path}: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise SettingsError(f'{path}:1: the top level must be a mapping with "routes"')
    return _validate(value, str(path), lines)


_Place = tuple[Any, ...]
_CONTEXT = "context_window_fallbacks"
_WRONG_FALLBACK = "wrong_fallback"


def _find_lines(node: yaml.Node, place: _Place) -> Iterator[tuple[_Place, int]]:
    """Yield the line of each value in a document, and check for repeated keys.

    Raises:
        yaml.YAMLError: A mapping has a key twice.
    """
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _find_lines(item, (*place, index))
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, item in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
            for inner, line in _find_lines(item, (*place, key.value)):
                # A field is looked for where its key stands.
                at_key = inner == (*place, key.value)
                yield inner, key.start_mark.line + 1 if at_key else line


def _validate(value: Any, source: str, lines: Mapping[_Place, int]) -> Routes:
    try:
        return Routes.model_validate(value)
    except ValidationError as exc:
        raise SettingsError(_explain(exc, source, lines)) from None


def _explain(error: ValidationError, source: str, lines: Mapping[_Place, int]) -> str:
    """Say what is wrong with the first field, and where it stands."""
    found = error.errors(include_url=False)[0]
    place = tuple(part for part in found["loc"] if part != "[key]")
    if found["type"] == _WRONG_FALLBACK:
        place = ("routes", *found["ctx"]["place"])
    known = place
    while known and known not in lines:
        known = known[:-1]
    where = f"{source}:{lines[known]}" if known in lines else source
    field = ".".join(map(str, place)) or "routes"
    if found["type"] == "extra_forbidden":
        *_, name = place
        fields = (Routes, Route, Deployment)[min(len(place) // 2, 2)].model_fields
        near = difflib.get_close_matches(str(name), fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: {field} is not a known field{hint}"
    if found["type"] == "missing":
        return f"{where}: {field} is missing"
    problem = found["msg"].removeprefix("Value error, ")
    problem = problem.replace("Input should be", "it must be")
    is_plain = isinstance(found["input"], str | int | float | None)
    # A base URL may hold a password.
    shown = f"={found['input']!r}" if is_plain and place[-1:] != ("base_url",) else ""
    return f"{where}: {field}{shown} cannot be used: {problem}"
