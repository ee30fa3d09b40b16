"""One run at a time in a folder: a lock that the system drops with the process, however that ends.

POSIX record locks rather than flock: they are not inherited, so that a loader process that outlives a killed run for
some seconds does not keep the folder. The file's text is for people and for the message: who holds it, or who held it
and ended without a word.
"""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsemae.files import existing

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: Path, info: Callable[[str], None]) -> Iterator[Callable[[], str]]:
    """Hold the lock of a run's folder; gives a function that says what became of it, nothing while it is there.

    Raises ValueError, naming process and host, if another run holds it, or naming the file if it is none.
    """

    def lost() -> str:
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.stat(folder), os.fstat(home)):
                return ""
        return "renamed" if os.fstat(home).st_nlink else "deleted"

    descriptor = os.open(existing(folder / LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o644)
    home = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES, as the system likes
            raise ValueError(
                f"{folder}: in use by {_text(descriptor) or 'another run'}; wait for its end, or choose another --out"
            ) from error
        except OSError as error:
            info(f"{folder}: no locks on this file system ({error.strerror}): nothing keeps a second run out")
        if holder := _text(descriptor):
            info(f"{folder}: the lock is stale: {holder} ended without releasing it")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield lost
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(home)
        os.close(descriptor)


def _text(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace")
