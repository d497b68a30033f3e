"""Finds a person's system prompt: a file inside the base directory, or inline text.

Knows files and the role of a system prompt. Reads block: the service calls it in a
thread.
"""

import logging
import os
from pathlib import Path
from typing import Any, get_args

from dipeo_llm.adapters.factory import by_name
from dipeo_llm.errors import InvalidRequestError
from dipeo_llm.files import open_regular, resolve_inside
from dipeo_llm.settings import MissingPrompt

_log = logging.getLogger("dipeo_llm")


class SystemPromptHandler:
    """Finds system prompts.

    Args:
        base_dir: The folder of the prompt files; no path may leave it. None is
            DIPEO_BASE_DIR, else the working directory, at the time of the call.
        on_missing: What happens if a prompt file cannot be read: "fallback" logs a
            warning and uses `system_prompt`, "error" raises InvalidRequestError.
        allow_outside_base_dir: Allows a path outside the folder.
        max_bytes: Largest file that is read.

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
        self._read: dict[Path, tuple[tuple[int, ...], str]] = {}

    @property
    def base_dir(self) -> Path:
        """The folder that is used now."""
        base = self._base_dir or Path(os.environ.get("DIPEO_BASE_DIR") or ".")
        return base.expanduser()

    def get_system_prompt(self, llm_config: Any) -> str | None:
        """Return the prompt of *llm_config*, or None if it has none.

        Args:
            llm_config: An object with `prompt_file` and `system_prompt`.

        Raises:
            InvalidRequestError: The file cannot be read, and `on_missing` is "error".

        A file that has not changed since the last call is not read again. Blocks on the
        disk.
        """
        prompt_file = getattr(llm_config, "prompt_file", None)
        inline: str | None = getattr(llm_config, "system_prompt", None)
        if not prompt_file:
            return inline or None
        try:
            return self._load(prompt_file)
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            if self._on_missing == "error":
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
            return inline or None

    def get_system_role(self, service: Any) -> str:
        """Return the role of a system prompt: "developer" for OpenAI, else "system".

        Without a service, when the model's name decides, it is "system"; the adapter
        sends the right role in any case.

        Source: https://platform.openai.com/docs/guides/text#message-roles-and-instruction-following
        (read 2026-11-23).
        """
        return by_name(service).system_role if service else "system"

    def _load(self, prompt_file: str | os.PathLike[str]) -> str:
        try:
            path = Path(prompt_file)
        except TypeError as exc:  # an application's own configuration may have any type
            raise ValueError(str(exc)) from None
        path = resolve_inside(
            path, self.base_dir, allow_outside=self.allow_outside_base_dir
        )
        with open_regular(path) as file:
            about = os.fstat(file.fileno())
            version = (
                about.st_mtime_ns,
                about.st_size,
                about.st_ino,
                about.st_ctime_ns,
            )
            known = self._read.get(path)
            if known is not None and known[0] == version:
                return known[1]
            # One byte more than allowed, because the file may have grown since fstat.
            data = file.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise ValueError(f"it is larger than {self._max_bytes} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            raise ValueError(
                f"it is not UTF-8: {exc.reason} at byte {exc.start}"
            ) from None
        self._read[path] = (version, text)
        return text
