"""Killed with -9, a process leaves none of its own behind: loader processes, and the workers of a demo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from harness import Job, living, wait_for

KILLS = 3
DEMO = """
import sys, time
from pathlib import Path
from rich.console import Console
from sparsemae.study.stages import Stage, run_stages
stage = Stage("pretrain-sparse", "pretrain", "sparse MAE", ("--data.workers", "1"), required=True)
run_stages([stage], Path(sys.argv[1]), 0, time.monotonic() + 600, Console(stderr=True))
"""


def is_gone(pid: int) -> bool:
    return not living([pid])


def own_group() -> None:
    """By which a job's processes are found."""
    os.setpgid(0, 0)


@pytest.mark.slow
@pytest.mark.holds("held.1")
def test_14_a_killed_run_leaves_no_loader_processes(tmp_path: Path, came_out: Any) -> None:
    for kill in range(KILLS):
        words = tiny("pretrain", tmp_path / f"run {kill}", "--trainer.epochs", "2000", "--data.workers", "2")
        job = Job(words, before=own_group)
        wait_for((tmp_path / f"run {kill}" / "metrics.jsonl").is_file)
        pid = job.processes[0].pid
        assert pid is not None
        assert len(living([pid])) == 3
        job.kill(signal.SIGKILL)
        assert job.wait() == [-9]
        wait_for(partial(is_gone, pid), 5)
    came_out("kill -9 of a run with loader processes", "while it trains; none of them is left", -9, times=KILLS)


@pytest.mark.holds_only
@pytest.mark.holds("held.1")
def test_14_a_killed_demo_leaves_no_workers(tmp_path: Path, came_out: Any) -> None:
    command = [sys.executable, "-c", DEMO, str(tmp_path)]
    demo = subprocess.Popen(command, stderr=subprocess.DEVNULL, process_group=0)
    try:
        wait_for((tmp_path / "pretrain-sparse" / "metrics.jsonl").is_file, 300)
        # itself, multiprocessing's resource tracker, a worker and its loader process
        assert len(living([demo.pid])) >= 4
    finally:
        demo.kill()
        demo.wait()
    wait_for(lambda: not living([demo.pid]), 10)
    came_out("kill -9 of a demo", "while its first stage trains; no process is left", -9)
