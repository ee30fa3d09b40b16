"""How a part is run, cut off, judged and written down."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self
from unittest.mock import patch

import torch

MINUTES = 8.0
"""All parts together on one H100; with more, each has as many times its limit."""
VERDICTS = ("passed", "failed", "skipped: needs CUDA", "not run")
"""How a part may end."""


class Cut(BaseException):
    """A part's time is used up. Nothing that catches errors catches it."""


@dataclass(frozen=True)
class Part:
    """Checks and figures that belong together."""

    work: Callable[[Bench], None]
    limit: float
    """Seconds of `MINUTES`."""


class Tee:
    """What is printed goes to the screen and into a file."""

    def __init__(self, file: Path) -> None:
        self.screen, self.file = sys.stdout, file.open("w")

    def write(self, text: str) -> int:
        """To both."""
        self.file.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        """Both."""
        self.file.flush()
        self.screen.flush()

    def isatty(self) -> bool:
        """No progress bars in a log."""
        return False


class Bench:
    """The parts' results, written down as they come."""

    def __init__(self, device: str, out: Path, minutes: float = MINUTES) -> None:
        self.device, self.out, self.tiny = device, out, device == "cpu"
        self.until, self.patience = time.monotonic() + 60 * minutes, max(1.0, minutes / MINUTES)
        self.peak_flops: float | None = None
        self.lines: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.log = (out / "gpu.jsonl").open("w"), Tee(out / "gpu.log")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.log.file.close()

    def note(self, part: str, verdict: str, **figures: Any) -> None:
        """One line: 'right', 'WRONG', 'figure', or how a part ended."""
        self.lines.append({"part": part, "verdict": verdict, **figures})
        self.file.write(json.dumps(self.lines[-1]) + "\n")
        self.file.flush()
        print(f"{part:<34} {verdict:<8} " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)

    def check(self, part: str, right: bool, **figures: Any) -> None:
        """Something that is right or not."""
        self.note(part, "right" if right else "WRONG", **figures)

    def run(self, name: str, part: Part) -> str:
        """Run a part and judge it: its own error is a failure, not the end; one that found nothing has failed, too."""
        begin, first = time.monotonic(), len(self.lines)
        limit = min(part.limit * self.patience, self.until - begin)
        verdict, why = "passed", {}
        if limit <= 0:
            verdict, why = "not run", {"reason": "no time left"}
        else:
            before = signal.signal(signal.SIGALRM, _cut)
            signal.setitimer(signal.ITIMER_REAL, limit)
            try:
                part.work(self)
            except Cut:
                verdict, why = "not run", {"reason": f"cut off after {limit:.0f} s"}
            except SkippedError:
                verdict = "skipped: needs CUDA"
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                verdict, why = "failed", {"reason": f"{type(error).__name__}: {error}"[:300]}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        found = {line["verdict"] for line in self.lines[first:]}
        if "WRONG" in found or (verdict == "passed" and not found):
            verdict = "failed"
        self.note(name, verdict, seconds=round(time.monotonic() - begin, 1), **why)
        return verdict

    def needs_cuda(self) -> None:
        """End the part on a machine without it."""
        if self.device != "cuda":
            raise SkippedError

    def compiler(self) -> AbstractContextManager[Any]:
        """Within, torch.compile is as it is on the device; tiny it traces, and leaves the code to torch."""
        traced = partial(torch.compile, backend="aot_eager")
        return patch("torch.compile", traced) if self.tiny else nullcontext()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], runs: int) -> float:
        """Median seconds of a call, the device awaited; two calls tiny."""
        times = []
        for _ in range(2 if self.tiny else runs + 2):
            self.synchronize()
            begin = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - begin)
        return median(times[1 if self.tiny else 2 :])


class SkippedError(Exception):
    """A part that this device cannot run."""


def _cut(number: int, frame: object) -> None:
    raise Cut
