"""Finds a person's system prompt: a file inside the base directory, or inline text.

Knows files, templates and the role of a system prompt. Reading blocks, so the service calls
it in a thread.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, get_args

from dipeo_llm.adapters.factory import by_name
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.files import TEMPLATE_SUFFIX, TextFiles, resolve_inside
from dipeo_llm.settings import MissingPrompt

if TYPE_CHECKING:
    from dipeo_llm.templates import Templates

_log = logging.getLogger("dipeo_llm")


class SystemPromptHandler:
    """Finds system prompts.

    Args:
        base_dir: The folder of the prompt files; no path may leave it. None is
            DIPEO_BASE_DIR, else the working directory, at the time of the call.
        on_missing: What happens if a prompt file cannot be read: "fallback" logs a
            warning and uses `system_prompt`, "error" raises InvalidRequestError.
        allow_outside_base_dir: Allows a path outside the folder.
        max_bytes: Largest file that is read; a rendered template may have as many
            characters.

    Raises:
        ValueError: `on_missing` is neither.
    """

    def __init__(
        self,
        base_dir: str | os.PathLike[str] | None = None,
        *,
        on_missing: MissingPrompt = "fallback",
        allow_outside_base_dir: bool = False,
        max_bytes: int = 1024 * 1024,
    ) -> None:
        if on_missing not in get_args(MissingPrompt):
            raise ValueError(f"on_missing={on_missing!r} must be 'fallback' or 'error'")
        self._on_missing = on_missing
        self._base_dir = None if base_dir is None else Path(base_dir)
        self.allow_outside_base_dir = allow_outside_base_dir
        self._max_bytes = max_bytes
        self._files = TextFiles(max_bytes)
        self._known_templates: Templates | None = None

    @property
    def base_dir(self) -> Path:
        """The folder that is used now."""
        base = self._base_dir or Path(os.environ.get("DIPEO_BASE_DIR") or ".")
        return base.expanduser()

    def get_system_prompt(
        self, llm_config: Any, variables: Mapping[str, Any] | None = None
    ) -> str | None:
        """Return the prompt of *llm_config*, or None if it has none.

        A file that ends in `.j2` is a template. Any other file and `system_prompt` are
        templates if there are variables: the call's or the configuration's.

        Args:
            llm_config: An object with `prompt_file` and `system_prompt`, and
                `prompt_variables` if it has any.
            variables: The values of a template; each wins over the configuration's.

        Returns:
            The text; for a template file a `RenderedPrompt`, which names the file.

        Raises:
            InvalidRequestError: The file cannot be read, and `on_missing` is "error". Or
                a template cannot be rendered, whatever `on_missing` is: its text is
                never returned raw. Or Jinja2 is not installed.

        A file that has not changed since the last call is not read again. Blocks on the
        disk.
        """
        prompt_file = getattr(llm_config, "prompt_file", None)
        inline: str | None = getattr(llm_config, "system_prompt", None)
        values = _merge(getattr(llm_config, "prompt_variables", None), variables)
        if not prompt_file:
            return self._render_inline(inline, values)
        is_template = values is not None or _is_template_file(prompt_file)
        try:
            path, text = self._load(prompt_file)
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            is_refused = is_template and isinstance(exc, ValueError)
            if is_refused or self._on_missing == "error":
                raise InvalidRequestError(
                    f"prompt file {str(prompt_file)!r} cannot be read: {reason}"
                ) from exc
            _log.warning(
                "prompt file %r is not used: %s; %s",
                str(prompt_file),
                reason,
                "system_prompt stands in"
                if inline
                else "the person speaks without a system prompt",
            )
            return self._render_inline(inline, values)
        if not is_template and not _is_template_file(path):  # a link may lead to one
            return text
        return self._templates(prompt_file).render_file(path, text, values or {})

    def get_system_role(self, service: Any) -> str:
        """Return the role of a system prompt: "developer" for OpenAI, else "system".

        Without a service, when the model's name decides, it is "system"; the adapter
        sends the right role in any case.

        Source: https://platform.openai.com/docs/guides/text#message-roles-and-instruction-following
        (read 2026-11-23).
        """
        return by_name(service).system_role if service else "system"

    def _load(self, prompt_file: str | os.PathLike[str]) -> tuple[Path, str]:
        try:
            path = Path(prompt_file)
        except TypeError as exc:  # an application's own configuration may have any type
            raise ValueError(str(exc)) from None
        path = resolve_inside(
            path, self.base_dir, allow_outside=self.allow_outside_base_dir
        )
        return path, self._files.read(path)

    def _render_inline(
        self, text: str | None, values: Mapping[str, Any] | None
    ) -> str | None:
        if not text or values is None:
            return text or None
        return self._templates("system_prompt").render(text, values)

    def _templates(self, name: Any) -> "Templates":
        """Return the templates of the base directory; the first call imports Jinja.

        Args:
            name: The template that is wanted, for the error.
        """
        base = self.base_dir.resolve()
        known = self._known_templates
        if known is None or known.base != base:
            try:
                from dipeo_llm.templates import Templates

                known = Templates(base, self._files, max_output=self._max_bytes)
            except ImportError as exc:
                raise InvalidRequestError(
                    f"{str(name)!r} is a template, which needs Jinja2 3.1.6 or newer: pip"
                    f" install 'dipeo-llm[templates]' ({exc})"
                ) from exc
            self._known_templates = known
        return known


def _is_template_file(path: Any) -> bool:
    return PurePath(str(path)).name.lower().endswith(TEMPLATE_SUFFIX)


def _merge(config: Any, call: Any) -> Mapping[str, Any] | None:
    """Return the variables of a template; None means that it is not a template."""
    given = [variables for variables in (config, call) if variables is not None]
    for variables in given:
        if not isinstance(variables, Mapping):
            raise InvalidRequestError(
                "the variables of a prompt must be a mapping, such as {'name': 'Ada'};"
                f" got {type(variables).__name__}"
            )
    return (
        {k: v for variables in given for k, v in variables.items()} if given else None
    )
