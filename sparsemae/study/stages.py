"""Runs the stages of a demo or a study: each is the very job that a user would type, and its command is printed.

As many run at a time as there are cores, one thread each, which for models this small is faster than several threads on
one. A stage that would not end within the time limit is left out.
"""

import contextlib
import json
import multiprocessing
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from sparsemae.config import read_config
from sparsemae.data.loader import end_with_parent
from sparsemae.jobs import JOBS, resolve
from sparsemae.processors import processors
from sparsemae.terminal import printable


@dataclass(frozen=True)
class Stage:
    """One training."""

    name: str
    job: str
    title: str
    options: tuple[str, ...] = ()
    init: str | None = None
    """Name of the pretraining stage it starts from."""
    required: bool = False
    cost: float = 1.0
    """Time it takes, relative to the longest stage of its job."""
    seed: int = 0
    """Added to the seed of all stages."""
    recipe: str | None = None
    """None: the demo's of the same job."""

    def argv(self, out: Path, seed: int) -> list[str]:
        """The command line after ``sparsemae JOB``."""
        recipe = self.recipe or f"demo_{self.job}"
        argv = ["--config", recipe, "--out", f"{out}/{self.name}", "--seed", str(seed + self.seed)]
        if self.job != "pretrain":
            argv += ["--init", f"{out}/{self.init}" if self.init else "null"]
        return argv + list(self.options)


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    seed: int,
    until: float,
    console: Console,
    at_a_time: int | None = None,
    finished: Callable[[Stage, float], None] = lambda stage, seconds: None,
) -> dict[str, float]:
    """Run, in order of starting, what ends by ``until`` (`time.monotonic`); returns seconds by stage name.

    Args:
        at_a_time: stages in parallel; None: as many as cores, at most 4.
        finished: called with each stage that is done, and its seconds.
    """
    begin = time.monotonic()
    slots, waiting = at_a_time or min(processors(), 4), list(stages)
    running: dict[Future[float], Stage] = {}
    done: dict[str, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(slots, context, _begin_worker) as pool, console.status("") as status:
        # what starts from a stage that was left out is never ready
        while (ready := [stage for stage in waiting if stage.init is None or stage.init in done]) or running:
            for stage in ready[: slots - len(running)]:
                waiting.remove(stage)
                longest = max((done[s.name] for s in stages if s.job == stage.job and s.name in done), default=0.0)
                if stage.required or time.monotonic() + stage.cost * longest < until:
                    argv = stage.argv(out, seed)
                    console.print(printable(f"$ sparsemae {stage.job} {shlex.join(argv)}"), style="dim", markup=False)
                    running[pool.submit(_run_job, stage.job, argv, f"{out}/{stage.name}.log")] = stage
            titles = "; ".join(f"{stage.title} {_progress(out / stage.name)}" for stage in running.values())
            status.update(Text(printable(f"{time.monotonic() - begin:.0f} s: {titles}")))
            try:
                ended = wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done
            except KeyboardInterrupt:
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
            for future in ended:
                stage = running.pop(future)
                try:
                    done[stage.name] = future.result()
                except BrokenExecutor as error:
                    raise ValueError("a training was killed, for want of memory perhaps (--at_a_time)") from error
                except (ValueError, OSError, MemoryError) as error:
                    raise ValueError(f"{stage.title}: {error} (its log: {out}/{stage.name}.log)") from error
                finished(stage, done[stage.name])
                said = f"[{time.monotonic() - begin:3.0f} s] {stage.title}: done in {done[stage.name]:.0f} s"
                console.print(printable(said), markup=False)
    return done


def _progress(folder: Path) -> str:
    """Epoch that a running stage has reached, from its metrics file."""
    try:
        return "(epoch {epoch:.0f})".format(**json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
    except (OSError, ValueError, IndexError, KeyError):
        return ""


def _begin_worker() -> None:
    """Ctrl-C is the first process's, which ends the workers; however that ends, they end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _run_job(name: str, argv: list[str], log: str) -> float:
    """Run one job in this process, single-threaded, its output in a file; returns its seconds."""
    begin = time.monotonic()
    torch.set_num_threads(1)
    config: Any = read_config(JOBS[name].options, argv)
    with open(log, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        resolve(JOBS[name].function)(config)
    return time.monotonic() - begin
