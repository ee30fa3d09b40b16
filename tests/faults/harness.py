"""Real runs in processes of their own, to be killed, stopped and starved.

A server process imports everything once and forks each run from there (multiprocessing's forkserver): a cold start
spends four seconds on imports, which would be most of what is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sparsemae.cli import main

SERVER = multiprocessing.get_context("forkserver")
TASKS = [f"sparsemae.tasks.{name}" for name in ("pretraining", "classification", "segmentation")]
SERVER.set_forkserver_preload(["sparsemae.commands.train", *TASKS])
LONGEST_SECONDS = 120
EVERYTHING = [
    "--mixup", "0.8", "--cutmix", "1.0", "--erasing", "0.25", "--data.crop", "resized", "--data.auto_augment",
    "rand-m9-mstd0.5-inc1", "--model.drop_path", "0.3", "--trainer.ema_decay", "0.9",
]  # fmt: skip
"""Options of a finetuning with all that is random."""


class Job:
    """A run on one or more processes, started as torchrun would; ``before`` runs in each of them first."""

    def __init__(self, words: list[str], processes: int = 1, before: Callable[[], None] | None = None) -> None:
        self.output = Path(words[words.index("--out") + 1]).with_suffix(".log")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        words = [*words, "--trainer.devices", str(processes), "--trainer.accelerator", "cpu"]
        environments: list[dict[str, str]] = [{}]
        if processes > 1:
            common = {
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "faults",
            }  # fmt: skip
            environments = [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
        self.processes = [
            SERVER.Process(target=_run, args=(words, self.output, environment, before)) for environment in environments
        ]
        for process in self.processes:
            process.start()

    def kill(self, number: signal.Signals, rank: int = 0) -> None:
        """Send a signal to one process, if it still lives."""
        process = self.processes[rank]
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)

    def wait(self, seconds: float = LONGEST_SECONDS) -> list[int | None]:
        """Exit statuses, None for a process that still runs; a negative one is the signal that ended it."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """Kill whatever is left, and wait for it."""
        for process in self.processes:
            process.kill()
            process.join()


def _run(words: list[str], output: Path, environment: dict[str, str], before: Callable[[], None] | None) -> None:
    multiprocessing.set_start_method("fork", force=True)  # loader processes are the run's own, and end with it
    os.environ.update(environment, PYTHONWARNINGS="ignore")
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["sparsemae", *words]
    if before is not None:
        before()
    main(words)


def run(words: list[str], processes: int = 1, before: Callable[[], None] | None = None) -> tuple[list[int | None], str]:
    """A run to its end: exit statuses and output."""
    job = Job(words, processes, before)
    try:
        return job.wait(), job.output.read_text()
    finally:
        job.end()


def kill_repeatedly(words: list[str], kills: int, seconds: float, processes: int = 1, seed: int = 0) -> int:
    """Kill -9 a run at random moments and continue it, until it has ended well; returns how often it was killed.

    Args:
        seconds: a moment is drawn from 0 to this, the start-up included.
        processes: one of them is killed.
    """
    draw, done = random.Random(seed), 0
    while True:
        job = Job(words, processes)
        try:
            statuses = job.wait(draw.uniform(0.0, seconds) if done < kills else LONGEST_SECONDS)
            if statuses == [0] * processes:
                return done
            assert done < kills, (statuses, job.output.read_text()[-3000:])
            assert None in statuses, (statuses, job.output.read_text()[-3000:])
            job.kill(signal.SIGKILL, draw.randrange(processes))
            if None in job.wait(5):  # the other one may still wait to meet it
                for rank in range(processes):
                    job.kill(signal.SIGTERM, rank)  # as torchrun does
            statuses = job.wait(30)
            assert None not in statuses, f"a process waits for one that was killed: {statuses}"
            done += 1
        finally:
            job.end()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Poll every millisecond; returns what the condition gave."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.001)
    return result


def living(groups: list[int]) -> list[str]:
    """Processes of these process groups, loader processes included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) in groups and state != "Z":
            found.append(f"{entry.parent.name} {state}")
    return found


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A file system of that size, mounted on a new folder."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={round(megabytes * 1024)}k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        pytest.skip("needs root: mounts a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until nothing more fits on the disk."""
    with suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"0" * 4096)
