"""Opens a file inside a folder and nowhere else: prompts, pictures, documents.

Knows paths and links; knows nothing of what is in a file. Everything blocks: callers on
an event loop go through a thread.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

# Windows has neither flag; there the resolved path alone must do.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


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
    # The path is fully resolved, so a link at its end was put there since; and a pipe
    # must not hold the thread until somebody writes into it.
    fd = os.open(path, os.O_RDONLY | _NOFOLLOW | _NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        is_folder = stat.S_ISDIR(mode)
        raise ValueError(
            "it is a directory" if is_folder else "it is not a regular file"
        )
    return os.fdopen(fd, "rb")
