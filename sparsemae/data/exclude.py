"""The list of images to leave out: one path a line, relative to the data set's root; bytes that are no UTF-8 pass."""

import os
from collections.abc import Iterable
from pathlib import Path

from sparsemae.files import existing, write_atomic


def read_exclude(file: str, root: Path) -> dict[str, str]:
    """Paths to leave out, as they are found under ``root``, each with the line that names it.

    Raises ValueError, naming the file, if it cannot be read as lines of paths.
    """
    try:
        lines = os.fsdecode(existing(file).read_bytes()).split("\n")
    except OSError as error:
        raise ValueError(f"data.exclude: {file}: wanted a file with one path a line: {error.strerror}") from error
    if any("\0" in line for line in lines):
        raise ValueError(f"data.exclude: {file}: wanted a file with one path a line, got a binary one")
    names = [line.rstrip("\r") for line in lines]
    return {os.path.normpath(root / name): name for name in names if name}


def write_exclude(file: str, root: Path, paths: Iterable[str]) -> None:
    """Write the list that `read_exclude` reads, whole or not at all.

    Raises ValueError if a path holds a line break.
    """
    names = sorted(os.path.relpath(path, root) for path in paths)
    for name in names:
        if "\n" in name or "\r" in name:
            raise ValueError(f"{file}: wanted paths without line breaks, got {name!r}")
    write_atomic(file, os.fsencode("".join(f"{name}\n" for name in names)))
