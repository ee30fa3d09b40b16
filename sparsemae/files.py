"""Files that appear whole or not at all, a kill at any moment included."""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
RETRY_PAUSES_SECONDS = (1.0, 2.0, 4.0)
LEFT_SECONDS = 86_400
"""After which a temporary file that nobody has written to is that of a writer that was killed."""


class NoFileError(ValueError):
    """A path is of a device or a pipe, which need have no end."""

    strerror = "wanted a file, got a device or pipe"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; what was written there takes the place of ``path`` if nothing is raised.

    Of a symbolic link it takes the target's place. With the permissions of a new file, whoever made it. Of writers at
    the same time each has a name of its own: the last to finish is what stays.

    Raises:
        ValueError: ``path`` is a folder, a device or a pipe, which are no files to replace.
        OSError: it cannot be written, in a message that names ``path``; nothing is left then.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:32]}.sparsemae-{secrets.token_hex(4)}.tmp")
    try:
        if existing(path).is_dir():
            raise ValueError(f"{path}: wanted a file, got a folder")
        _remove_leftovers(target.parent)
        temporary.touch(exist_ok=False)  # nor somebody's link to elsewhere
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files for their owner alone
        fsync(temporary)
        temporary.replace(target)
        fsync(target.parent)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            raise OSError(f"{path}: {error.strerror or error}") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@cache  # once a process, as a folder may have many files
def _remove_leftovers(folder: Path) -> None:
    for left in folder.glob(".*.sparsemae-*.tmp"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > LEFT_SECONDS:
                left.unlink()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a text (as UTF-8) or bytes by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def retried(action: Callable[[Path], T], path: Path, info: Callable[[str], None]) -> T:
    """What an action on a file gives, tried again where the system fails it (disk, network, memory), which may pass.

    A missing file is no such failure. Raises OSError naming the file where it does not pass.
    """
    pauses = iter(RETRY_PAUSES_SECONDS)
    while True:
        try:
            return action(path)
        except FileNotFoundError:
            raise
        except (OSError, MemoryError) as error:
            reason = str(error) or "out of memory"
            said = reason if str(path) in reason else f"{path}: {reason}"
            pause = next(pauses, None)
            if pause is None:
                raise OSError(said) from error
            info(f"{said}; trying again in {pause:g} s")
            time.sleep(pause)


def oversized_header(path: Path) -> int:
    """Bytes of a safetensors file's header where they are too many beside its data, else 0.

    A byte of header may make twenty of memory, of tensors without values.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return header if 2**16 + size // 16 < header < size else 0


def existing(path: Any) -> Path:
    """A path from outside, of a file or a folder, if it is there.

    Raises ValueError, naming it, if it is of a device or a pipe, or no path at all.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"wanted a path, got {path!r:.40}")
    found = Path(path)
    if found.exists() and not found.is_file() and not found.is_dir():
        raise NoFileError(f"{path}: {NoFileError.strerror}")
    return found


def fsync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk now.

    Windows wants a file to be open for writing, and has nothing of the kind for folders.
    """
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
