"""Mutated files, loaded in a process that is watched: what they do to it, and what is said of them.

Each file is a function of its number. The process has little memory to give, reports after each file, and is started
again after the one that ended it. The memory that a load takes is the system's own high-water mark of it. What may not
happen meanwhile, Python's audit hooks tell: a process, a connection, a file written outside the folder.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from harness import SERVER

ALLOWED_BYTES = 3 * 2**30
"""Address space beyond what the process has at its start."""
LONGEST_SECONDS = 60.0
TRIES = 3
SMALLEST = 2**20
"""Files are taken to be this large at least: below, Python's own objects would be measured."""
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect")


@dataclass
class Outcome:
    """What became of one file."""

    number: int
    way: str
    """How it was loaded."""
    kind: str
    """How it was made."""
    error: str = ""
    """Type of what was raised; empty: it was accepted."""
    message: str = ""
    size: int = 0
    """Bytes of the file, or of the checkpoint that it is part of."""
    grown: int = 0
    """Bytes that the process grew by at the peak."""
    seconds: float = 0.0
    wrong: str = ""
    """What should not have come out."""


class Fuzzer(Protocol):
    """Makes the file of a number, loads it, and looks at what came of it."""

    def __init__(self, originals: Path, folder: Path, seed: int) -> None: ...

    def warm_up(self) -> None:
        """Whatever is imported or cached at the first time."""

    def try_one(self, number: int) -> Outcome:
        """Everything in ``folder`` may be replaced."""


FORBIDDEN: list[str] = []
"""What was done since the last look."""


def attempt(
    outcome: Outcome, path: Path, load: Callable[[Path], Any], most: int, refusals: tuple[type[Exception], ...] = ()
) -> None:
    """Load a file, and note what came of it: an error is a ValueError (or of ``refusals``) that names it in one line.

    Args:
        most: bytes that it may take.
    """
    for _ in range(TRIES):  # the system may drop a process's pages, which come back later, but not each time
        before, begin = memory_now(), time.monotonic()
        FORBIDDEN.clear()
        try:
            load(path)
        except Exception as error:
            outcome.error, outcome.message = type(error).__name__, str(error)
            if not isinstance(error, (ValueError, *refusals)):
                outcome.wrong = f"raised {error!r}"
            elif str(path) not in str(error) or "\n" in str(error):
                outcome.wrong = f"is not named in one line: {error}"
        outcome.grown, outcome.seconds = memory_peak() - before, time.monotonic() - begin
        outcome.wrong += "".join(f" {event}" for event in FORBIDDEN)
        if outcome.grown <= most:
            return
    outcome.wrong += f" took {outcome.grown:,} bytes"


def memory_now() -> int:
    """Bytes resident, after all that is free has been given back; the high-water mark starts from here."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def memory_peak() -> int:
    """The high-water mark, bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in PROCESSES:
        FORBIDDEN.append(f"{event} {arguments!r:.200}")


def _work(kind: type[Fuzzer], originals: Path, folder: Path, seed: int, numbers: range, to: Connection) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _status("VmSize") + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    fuzzer = kind(originals, folder, seed)
    fuzzer.warm_up()
    sys.addaudithook(_audit)
    gc.freeze()
    for number in numbers:
        to.send(fuzzer.try_one(number))


def watched(kind: type[Fuzzer], originals: Path, folder: Path, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Outcomes of the files from 0 to ``count``, in order."""
    number = 0
    while number < count:
        here, there = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=_work, args=(kind, originals, folder, seed, range(number, count), there))
        process.start()
        there.close()
        try:
            while number < count:
                if not here.poll(LONGEST_SECONDS):
                    yield Outcome(number, "?", "?", wrong=f"hangs for {LONGEST_SECONDS} s")
                    break
                yield here.recv()
                number += 1
        except EOFError:
            process.join()
            yield Outcome(number, "?", "?", wrong=f"ended the process: {process.exitcode}")
        finally:
            process.kill()
            process.join()
            here.close()
        number += number < count
