"""Two processes stand and fall together: whatever ends or stops one of them, at any point, on either of them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_scene, scene_folder, tiny
from harness import Job, living, run, wait_for
from lightning_fabric import Fabric

from sparsemae.cli import main
from sparsemae.models.weights import read_weights
from sparsemae.tasks.classification import Classification
from sparsemae.training import fit
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint
from sparsemae.training.feed import Feed

POINTS = ("load", "forward", "backward", "all-reduce", "save", "evaluate")
FAULTS = ("error", "kill -9", "SIGSTOP", "endless loop")
ALL = list(itertools.product(POINTS, FAULTS, (0, 1)))
FEW = [
    ("forward", "error", 1),
    ("backward", "kill -9", 0),
    ("all-reduce", "SIGSTOP", 0),
]


def words(out: Path, *options: str) -> list[str]:
    """A finetuning of 6 steps, evaluated and saved after 2 and 4 of them."""
    saves = ["--trainer.evaluate_every_epochs", "1", "--trainer.save_every_steps", "4", "--trainer.device_batch", "8"]
    return tiny("finetune", out, *saves, *options)


def strike(fault: str) -> None:
    """Happens to this process."""
    Path(os.environ["STRUCK"]).touch()
    if fault == "error":
        raise RuntimeError("a fault\nof two lines")
    if fault == "endless loop":
        while True:
            time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill -9" else signal.SIGSTOP)
    time.sleep(1000)


def inject(point: str, fault: str, rank: int, struck: Path) -> None:
    """Have a fault happen to one process: in step 4, or at what comes after it."""
    os.setpgid(0, 0)  # by which its loader processes are found
    if int(os.environ["RANK"]) != rank:
        return
    os.environ["STRUCK"] = str(struck)
    owner, name, at = {
        "load": (Feed, "micro_batch", 4),
        "forward": (Classification, "loss", 4),
        "backward": (Classification, "loss", 4),
        "all-reduce": (Fabric, "all_reduce", 5),  # the third is of the evaluation after step 2
        "save": (fit._Loop, "_save", 2),
        "evaluate": (Classification, "evaluate", 2),
    }[point]
    original, calls = getattr(owner, name), itertools.count(1)

    def struck_call(self: Any, *args: Any, **named: Any) -> Any:
        due = next(calls) == at
        if due and point != "backward":
            strike(fault)
        result = original(self, *args, **named)
        if due:
            result.register_hook(lambda gradient: strike(fault))
        return result

    setattr(owner, name, struck_call)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, with a checkpoint of each step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    main(words(out, "--trainer.save_every_steps", "1", "--trainer.keep_checkpoints", "6"))
    return out


def stand_and_fall(
    point: str, fault: str, rank: int, tmp_path: Path, whole: Path, hang: int
) -> tuple[list[str], float, str]:
    """The fault in two processes with a loader process each; the command line, how long it took, and what was said."""
    options = ["--trainer.hang_timeout_seconds", str(hang), "--data.workers", "1"]
    struck, own = tmp_path / "struck", words(tmp_path / "run", *options)
    job = Job(own, 2, partial(inject, point, fault, rank, struck))
    pids = [process.pid for process in job.processes if process.pid is not None]
    try:
        statuses = job.wait(180)
        seconds = time.time() - struck.stat().st_mtime
        output = job.output.read_text()
        assert None not in statuses, output
        assert statuses[1 - rank] == 2, (statuses, output)
        assert statuses[rank] == (-signal.SIGKILL if fault in ("kill -9", "SIGSTOP") else 2), output
        time.sleep(0.5)  # the system ends the loader processes
        assert not living(pids)
    finally:
        job.end()
    errors = [line for line in output.splitlines() if line.startswith("sparsemae") and "error: " in line]
    assert len(errors) == (1 if fault in ("kill -9", "SIGSTOP") else 2), output
    assert not [line for line in output.splitlines() if "Traceback" in line or "frame #" in line], output
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (files, counters), (wanted, _) = load_checkpoint(last), load_checkpoint(whole / "checkpoints" / last.name)
    assert counters["done"] == (4 if point in ("save", "evaluate") else 3), output
    for name, tensors in wanted.items():  # the topology is brought up to date after an evaluation
        keys = [key for key in tensors if point != "evaluate" or not key.startswith("topology")]
        assert keys
        assert all(torch.equal(tensors[key], files[name][key]) for key in keys), name
    assert all(line.endswith(f"; the last checkpoint is {last}") or " been at " in line for line in errors), output
    return own, seconds, next((line for line in errors if "failed" in line), errors[0])


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.parametrize(("point", "fault", "rank"), FEW)
def test_2_one_of_two_processes_takes_the_other_with_it(
    tmp_path: Path, whole: Path, came_out: Any, point: str, fault: str, rank: int
) -> None:
    """The last whole step is saved, and the same command goes on to the same weights."""
    own, _, said = stand_and_fall(point, fault, rank, tmp_path, whole, 5)
    main([*own, "--data.workers", "0"])
    one, other = (read_weights(folder)[0] for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    statuses = {"error": "2 and 2", "endless loop": "2 and 2"}.get(fault, "-9 and 2")
    made = f"in process {rank} of 2, at {point}; then the same command again"
    came_out(f"one of two processes: {fault}", made, f"{statuses}, then 0", said, equal=True)


@pytest.mark.holds_only
@pytest.mark.holds("held.2")
@pytest.mark.parametrize(("point", "fault", "rank"), ALL)
def test_a_fault_at_any_point_on_either_of_two_processes(
    tmp_path: Path, whole: Path, benchmark_line: Callable[..., None], point: str, fault: str, rank: int
) -> None:
    _, seconds, _ = stand_and_fall(point, fault, rank, tmp_path, whole, 10)
    benchmark_line(f"{fault} at {point} in process {rank}: seconds until all were gone", seconds, 60)


@pytest.mark.slow
@pytest.mark.holds("held.1")
@pytest.mark.parametrize("job", ["pretrain", "finetune", "segment"])
def test_3_an_image_that_cannot_be_read_ends_both_processes(
    tmp_path: Path, image_folder: Path, came_out: Any, job: str
) -> None:
    """One image, which one of the processes reads: in training, and in the evaluation of the others."""
    where = ["--data.source", "folder", "--data.root", str(image_folder), "--trainer.device_batch", "8"]
    own = tiny(job, tmp_path / "run", *where)
    harmed = image_folder / ("train/cat/3.png" if job == "pretrain" else "val/cat/1.png")
    if job == "segment":
        root = scene_folder(tmp_path / "scenes", train=4, val=2, longest=96)
        own = on_scene(tmp_path / "run", root, "--data.workers", "0", "--trainer.evaluate_every_epochs", "1")
        harmed = sorted((root / "images" / "validation").iterdir())[1]
    harmed.write_bytes(harmed.read_bytes()[:200])
    statuses, output = run(own, 2)
    assert statuses == [2, 2], output
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 2, output
    assert all(f"{harmed.name}: unreadable image" in line for line in errors)
    came_out("image that cannot be read", f"{job} on two processes, of which one reads it", "2 and 2", errors[0])


@pytest.mark.holds_only
@pytest.mark.holds("held.1")
def test_2_a_first_process_that_is_killed_leaves_a_checkpoint_and_no_process(tmp_path: Path, came_out: Any) -> None:
    """As `sparsemae --trainer.devices 2` starts them: the second one saves and ends, the same command goes on."""

    def start(*options: str) -> subprocess.Popen[str]:
        own = tiny("pretrain", tmp_path / "run", "--trainer.epochs", "500", "--trainer.device_batch", "8", *options)
        command = [sys.executable, "-m", "sparsemae", *own, "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, process_group=0)

    log = tmp_path / "run" / "metrics.jsonl"
    first = start()
    wait_for(lambda: log.is_file() and len(log.read_text().splitlines()) > 5, 300)
    first.kill()
    output = first.communicate(timeout=120)[1]  # the pipe is the second one's, too
    wait_for(lambda: not living([first.pid]))
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "error: " in line]
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"process 0 of 2 (pid {first.pid}) ended without a word" in line
    assert line.endswith(f"the last checkpoint is {last}")
    steps = load_checkpoint(last)[1]["done"] + 2
    again = start("--trainer.max_steps", str(steps))
    output = again.communicate(timeout=300)[1]
    assert again.returncode == 0, output
    words = ["--trainer.epochs", "500", "--trainer.device_batch", "8", "--trainer.max_steps", str(steps)]
    main(tiny("pretrain", tmp_path / "whole", *words))
    one, other = (read_weights(tmp_path / name)[0] for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    came_out("first of two processes killed", "kill -9, as --trainer.devices 2 starts them", "-9, then 0", line)
