"""Opens a file inside a folder and nowhere else: prompts, pictures, documents.

Knows paths and links; knows nothing of what is in a file. Everything blocks: callers on
an event loop go through a thread.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

# Windows has none of them; there the resolved path alone must do. With O_PATH a folder
# need not be readable to be gone through.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0)
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)


def resolve_inside(path: Path, base: Path, *, allow_outside: bool) -> Path:
    """Return the real path of a file below a folder.

    Args:
        path: Relative to the folder, or absolute; `~` is the home directory.
        base: The folder.
        allow_outside: Lets the path lead out of the folder.

    Raises:
        ValueError: The path leads outside, by `..`, by a link or as it stands, or
            cannot be followed.
    """
    try:
        base = base.resolve()
        path = (base / path.expanduser()).resolve()
    except RuntimeError as exc:  # a loop of links, a user that does not exist
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
    fd = _opened(path)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        is_folder = stat.S_ISDIR(mode)
        raise ValueError(
            "it is a directory" if is_folder else "it is not a regular file"
        )
    return os.fdopen(fd, "rb")


def _opened(path: Path) -> int:
    """Open a path that is fully resolved, so that a link in it was put there since.

    Each folder is opened in the one before: what is moved meanwhile leads nowhere else.
    And a pipe must not hold the thread until somebody writes into it.
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
