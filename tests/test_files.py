"""A file inside a folder is opened, and none outside, whoever moves things meanwhile."""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dipeo_llm.files import open_regular, resolve_inside

pytestmark = pytest.mark.skipif(
    os.open not in os.supports_dir_fd, reason="the system opens nothing in a folder"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Make a base folder with a file in it, and one outside of the same name."""
    for folder in ("base/sub/deep", "out/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text(folder)
    (tmp_path / "base" / "link").symlink_to(tmp_path / "out")
    return tmp_path / "base"


def read(base: Path, path: str) -> str:
    """Read a file inside the base folder."""
    real = resolve_inside(Path(path), base, allow_outside=False)
    with open_regular(real) as file:
        return file.read().decode()


def move(path: Path, to: Path) -> None:
    """Put a link in the place of a file or a folder."""
    path.rename(path.with_name("moved"))
    path.symlink_to(to)


def read_after(do: Callable[[], None], base: Path, path: str) -> str:
    """Read a file, and do something when the first folder is about to be opened."""

    def watch(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function is os.open:
            sys.setprofile(None)
            do()

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        return read(base, path)
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("moved", ["sub", "sub/deep", "sub/deep/file"])
def test_what_becomes_a_link_after_the_check_is_not_followed(
    base: Path, moved: str
) -> None:
    """Neither a folder on the way nor the file itself leads out."""
    out = base.parent / "out" / moved.removeprefix("sub").strip("/")

    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        read_after(lambda: move(base / moved, out), base, "sub/deep/file")

    assert (base / moved).is_symlink()
    assert (base / "sub/deep/file").read_text() == "out/deep"


def exchange() -> Callable[[Path, Path], None]:
    """Return what puts two things in each other's place at once, as Linux can."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        pytest.skip("the system cannot exchange two names at once")
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return lambda a, b: libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), both)


def test_a_folder_that_is_swapped_all_the_time_leads_nowhere_else(base: Path) -> None:
    """Of some thousand reads, while a link takes its place and leaves it, none is out."""
    swap, done = exchange(), threading.Event()

    def swapping() -> None:
        while not done.is_set():
            swap(base / "sub", base / "link")

    thread = threading.Thread(target=swapping)
    thread.start()
    found: set[str] = set()
    try:
        for _ in range(2_000):
            try:
                found.add(read(base, "sub/deep/file"))
            except (OSError, ValueError) as exc:
                found.add(type(exc).__name__)
    finally:
        done.set()
        thread.join()

    assert "out/deep" not in found
    assert {"base/sub/deep", "ValueError"} <= found  # there were swaps


@pytest.mark.parametrize(
    "path", ["inner", "sub/../inner/file", "{base}/inner/file", "sub/file-link"]
)
def test_a_link_that_stays_inside_is_followed(base: Path, path: str) -> None:
    """What counts is the real path."""
    (base / "inner").symlink_to("sub/deep")
    (base / "sub" / "file-link").symlink_to("../inner/file")
    path = path.format(base=base)
    path = f"{path}/file" if path == "inner" else path

    assert read(base, path) == "base/sub/deep"


def test_nothing_stays_open(base: Path) -> None:
    """Of the folders on the way neither, whether there is a file at its end or not."""
    before = sorted(entry.name for entry in Path("/dev/fd").iterdir())

    read(base, "sub/deep/file")
    for path in ("sub/deep", "sub/none/file", "sub/deep/file/none"):
        with pytest.raises((OSError, ValueError)):
            read(base, path)

    assert sorted(entry.name for entry in Path("/dev/fd").iterdir()) == before


def test_where_no_file_is_opened_in_a_folder_the_real_path_must_do(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setattr(os, "supports_dir_fd", set())

    assert read(base, "sub/deep/file") == "base/sub/deep"
    with pytest.raises(ValueError, match="outside"):
        read(base, "link/deep/file")
