"""Renders prompt templates in Jinja's sandbox.

Knows Jinja and the base folder; the text of a template and the values come from the
caller. Jinja2 comes with the extra `templates`, so this module is imported by the first
template. Everything blocks: call it in a thread from an event loop.

The sandbox keeps a template from Python's objects and from files, not from the CPU and
the memory: `range` is limited, nested loops and `"A" * 10**9` are not. Jinja's authors
refuse such a limit inside a process, so a template is code that must be trusted.
Source: https://jinja.palletsprojects.com/en/stable/sandbox/#security-considerations
(read 2026-11-25).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from jinja2 import (
    BaseLoader,
    Environment,
    StrictUndefined,
    Template,
    TemplateNotFound,
    TemplateSyntaxError,
    Undefined,
    UndefinedError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from packaging.version import Version
from pydantic_core import to_jsonable_python

from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.files import TEMPLATE_SUFFIX, TextFiles, resolve_inside

INLINE = "system_prompt"
"""The name of a template that is not a file, in errors."""

_OLDEST = "3.1.6"
"""Older sandboxes can be left: CVE-2025-27516, CVE-2024-56326, CVE-2024-56201."""
_COMPILED = 128
"""Most compiled templates that are kept, of files and inline texts together."""
_LONGEST_REASON = 300
"""Characters of an error of Jinja or Python that are shown."""


class RenderedPrompt(str):
    """A rendered template file, which says where it comes from."""

    __slots__ = ("template", "version")

    template: str
    """The file's path, relative to the base folder if it lies inside."""
    version: str
    """The first 12 hexadecimal digits of the SHA-256 of the file's text."""


class Templates:
    """Renders templates that may include, extend and import others below a folder.

    Safe for several threads. A text is compiled once for as long as it does not change.

    Args:
        base: The folder.
        files: Reads the files.
        max_output: Most characters of a rendered template.

    Raises:
        ImportError: The installed Jinja2 is too old.
    """

    def __init__(self, base: Path, files: TextFiles, *, max_output: int) -> None:
        installed = version("jinja2")
        if Version(installed) < Version(_OLDEST):
            raise ImportError(f"Jinja2 {installed} is installed")
        self.base = base
        self._max_output = max_output
        self._loader = _Loader(base, files)
        self._environment = _environment(self._loader)
        # Cached by the text itself, so that a change cannot be missed.
        self._compile = lru_cache(_COMPILED)(self._compile_now)

    def render_file(
        self, path: Path, text: str, variables: Mapping[str, Any]
    ) -> RenderedPrompt:
        """Render the text of a file.

        Args:
            path: The file's real path.
            text: Its content.
            variables: The values, by name.

        Raises:
            InvalidRequestError: As `render`.
        """
        name = _name(path, self.base)
        prompt = RenderedPrompt(self.render(text, variables, name))
        prompt.template = name
        prompt.version = hashlib.sha256(text.encode()).hexdigest()[:12]
        return prompt

    def render(
        self, text: str, variables: Mapping[str, Any], name: str = INLINE
    ) -> str:
        """Render a text.

        Args:
            text: The template.
            variables: The values, by name. They are converted to plain data as for JSON,
                and are never compiled, whatever they hold.
            name: The template's name, for errors.

        Raises:
            InvalidRequestError: The template cannot be compiled or rendered, or its
                output is too long; the message names the file and the line. Or a value
                is not plain data.
        """
        values = _plain(variables)
        try:
            template = self._compile(text, name)
            return self._join(template.generate(values))
        except Exception as exc:  # a template can raise anything
            raise self._explain(exc, name, values) from exc

    def _compile_now(self, text: str, name: str) -> Template:
        self._loader.names.add(name)
        environment = self._environment
        code = environment.compile(text, name, name)
        return Template.from_code(environment, code, environment.make_globals(None))

    def _join(self, pieces: Iterable[str]) -> str:
        found, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > self._max_output:
                raise ValueError(f"the output exceeds {self._max_output} characters")
            found.append(piece)
        return "".join(found)

    def _explain(
        self, error: Exception, name: str, values: Mapping[str, Any]
    ) -> InvalidRequestError:
        line: int | None = None
        if isinstance(error, TemplateSyntaxError):
            name, line = error.filename or name, error.lineno
        else:
            at = error.__traceback__
            while at is not None:
                # Jinja puts a frame of the template's own into the traceback.
                if at.tb_frame.f_code.co_filename in self._loader.names:
                    name, line = at.tb_frame.f_code.co_filename, at.tb_lineno
                at = at.tb_next
        reason = " ".join(_reason(error).split())[:_LONGEST_REASON]
        if isinstance(error, UndefinedError):
            reason += f"; the variables are: {', '.join(sorted(values)) or 'none'}"
        place = f"{name!r}, line {line}" if line else f"{name!r}"
        return InvalidRequestError(f"prompt template {place}: {reason}")


class _Loader(BaseLoader):
    """Loads the `.j2` files of one folder that a template includes, extends or imports."""

    def __init__(self, base: Path, files: TextFiles) -> None:
        self.names: set[str] = set()
        """The names of all templates that were compiled."""
        self._base = base
        self._files = files

    def get_source(
        self, environment: Environment, template: str
    ) -> tuple[str, str, Callable[[], bool]]:
        """Return a template's text, its name in errors, and a check for changes.

        Raises:
            TemplateNotFound: There is no such file.
            ValueError: The template is refused. `ignore missing` does not hide that.
        """
        try:
            path, source = self._read(template)
        except (FileNotFoundError, NotADirectoryError):
            raise TemplateNotFound(template) from None

        def is_current() -> bool:
            # Resolves again, because a folder on the way may have become a link.
            try:
                return self._read(template) == (path, source)
            except (OSError, ValueError):
                return False

        self.names.add(name := _name(path, self._base))
        return source, name, is_current

    def _read(self, template: str) -> tuple[Path, str]:
        parts = PurePath(template).parts
        if PurePath(template).is_absolute() or ".." in parts or template[:1] == "~":
            raise ValueError(
                f"template {template!r} is refused: its path must be relative to the"
                " base folder, without '..'"
            )
        if not template.endswith(TEMPLATE_SUFFIX):
            raise ValueError(
                f"template {template!r} is refused: a template can use only files that"
                f" end in {TEMPLATE_SUFFIX}"
            )
        try:
            path = resolve_inside(Path(template), self._base, allow_outside=False)
            return path, self._files.read(path)
        except ValueError as exc:
            raise ValueError(f"template {template!r} is refused: {exc}") from None


class _Undefined(StrictUndefined):
    # Jinja's own prints "Undefined" in a list, such as that of `map(attribute="nom")`.
    __repr__ = StrictUndefined.__str__


class _Environment(ImmutableSandboxedEnvironment):
    def join_path(self, template: str, parent: str) -> str:
        """Return the path of a template from the base folder.

        `./x.j2` lies beside the template that names it, so that a folder of templates
        can be moved.
        """
        if not template.startswith("./"):
            return template
        return (PurePosixPath(parent).parent / template).as_posix()


def _environment(loader: BaseLoader) -> Environment:
    """Make the environment that all templates of a folder share."""
    environment = _Environment(
        loader=loader,
        undefined=_Undefined,
        # Escaping is HTML's: a model would read `&#39;`.
        autoescape=False,
        # A line with nothing but a tag leaves no empty line, and a file without a tag
        # is rendered as it is.
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Jinja's own replaces `<`, `>`, `&` and `'` by escapes, for a script in HTML.
    environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    if isinstance(value, Undefined):
        str(value)  # raises the error that names the variable
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _plain(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the values to plain str, int, float, bool, None, list and dict.

    A template could reach everything that an object refers to.
    """
    values: dict[str, Any] = {}
    for name, value in variables.items():
        if not isinstance(name, str):
            raise InvalidRequestError(f"prompt variable {name!r}: a name must be text")
        try:
            values[name] = to_jsonable_python(value)
        except Exception as exc:  # a property of the value's own can raise anything
            raise InvalidRequestError(f"prompt variable {name!r}: {exc}") from exc
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, TemplateNotFound):
        return f"there is no template {error.name!r} in the base folder"
    if isinstance(error, ValueError | TemplateSyntaxError | UndefinedError):
        return str(getattr(error, "message", None) or error)
    return f"{type(error).__name__}: {error}"


def _name(path: Path, base: Path) -> str:
    inside = path.is_relative_to(base)
    return path.relative_to(base).as_posix() if inside else str(path)
