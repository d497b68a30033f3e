"""Opens prompts, pictures and documents inside a folder, and nowhere else.

It also replaces a file whole. Knows paths, links and UTF-8. Everything blocks: call it in
a thread from an event loop.
"""

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

TEMPLATE_SUFFIX = ".j2"
"""The end of the name of a text file that is always a template."""

# Windows lacks these flags; there only the resolved path is checked. O_PATH
# opens a folder that may be entered but not listed.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0)
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)


def resolve_inside(path: Path, base: Path, *, allow_outside: bool) -> Path:
    """Return the real path of a file inside a folder.

    Args:
        path: Relative to the folder, or absolute; `~` is the home directory.
        base: The folder.
        allow_outside: Allows a path outside the folder.

    Raises:
        ValueError: The path leads outside, directly, by `..` or by a link, or it cannot
            be resolved.
    """
    try:
        base = base.resolve()
        path = (base / path.expanduser()).resolve()
    except RuntimeError as exc:  # a loop of links, an unknown user
        raise ValueError(str(exc)) from None
    if not allow_outside and not path.is_relative_to(base):
        raise ValueError("it leads outside the base directory")
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file by its real path.

    Raises:
        ValueError: It is not a regular file.
        OSError: It cannot be opened.
    """
    fd = _open(path)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        is_folder = stat.S_ISDIR(mode)
        raise ValueError(
            "it is a directory" if is_folder else "it is not a regular file"
        )
    return os.fdopen(fd, "rb")


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file beside *path* and rename it: readers never see half of it.

    A link stays a link, and an existing file keeps its mode; a new one is its owner's.

    Raises:
        OSError: It cannot be written; what was there is left as it was.
    """
    path = path.resolve()
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - renamed after it is closed
        dir=path.parent, prefix=f".{path.name}.", delete=False
    )
    try:
        with file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, file.name)
        Path(file.name).replace(path)
    except BaseException:
        Path(file.name).unlink()
        raise


class TextFiles:
    """Reads text files, each version of a file once. Safe for several threads.

    Args:
        max_bytes: Largest file that is read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._read: dict[Path, tuple[tuple[int, ...], str]] = {}

    def read(self, path: Path) -> str:
        """Return the text of a file, from memory if the file has not changed.

        Args:
            path: Its real path.

        Raises:
            ValueError: It is not a regular file, too large, or not UTF-8.
            OSError: It cannot be opened.
        """
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


def _open(path: Path) -> int:
    """Open a resolved path without following links, so that a later link is refused.

    Each folder is opened relative to its parent, so that moving one in between changes
    nothing. O_NONBLOCK keeps a named pipe from blocking the thread.
    """
    if os.open not in os.supports_dir_fd:
        return os.open(path, _FILE)
    folder = os.open(path.anchor, _FOLDER)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, _FOLDER | _NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name or ".", _FILE, dir_fd=folder)
    finally:
        os.close(folder)
