"""Asked to end: the step is finished and saved, the status says so, and the same command goes on."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from harness import Job, run, wait_for
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparsemae.models.weights import read_weights
from sparsemae.training import checkpoint, saver
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint, step_of
from sparsemae.training.signals import STOPPED_STATUS

LONG = ["--trainer.epochs", "2000"]


def steps(job: Job) -> int:
    """Lines of the job's log so far: optimizer steps."""
    file = job.output.with_suffix("") / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def words(tmp_path: Path, *options: str) -> list[str]:
    return tiny("pretrain", tmp_path / "run", *LONG, *options)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [("SIGTERM", 1), ("SIGUSR1", 2), ("SIGINT", 1)])
def test_the_step_is_finished_and_saved(tmp_path: Path, number: str, processes: int, came_out: Any) -> None:
    """SIGTERM, SIGINT; SIGUSR1 to the second of two processes: all save the same step and end with the status 75."""
    job = Job(words(tmp_path, "--trainer.device_batch", "8"), processes)
    wait_for(lambda: steps(job) > 3)
    job.kill(signal.Signals[number], rank=processes - 1)
    statuses = job.wait()
    assert statuses == [STOPPED_STATUS, 0][:processes]
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert step_of(last) == load_checkpoint(last)[1]["done"] == steps(job)
    assert f"{number} at step {steps(job)}" in job.output.read_text()
    options = [*LONG, "--trainer.max_steps", str(steps(job) + 2), "--trainer.device_batch", "8"]
    for name in ("run", "whole"):
        assert run(tiny("pretrain", tmp_path / name, *options))[0] == [0]
    stopped, whole = read_weights(tmp_path / "run")[0], read_weights(tmp_path / "whole")[0]
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    said = next(line for line in job.output.read_text().splitlines() if f"ended by {number}" in line)
    made = "to the run, which is then continued" if processes == 1 else "to the second of 2 processes, then continued"
    came_out(number, made, f"{statuses[0]}, then 0", said, equal=True)


@pytest.mark.slow
def test_a_second_sigint_stops_at_once(tmp_path: Path, came_out: Any) -> None:
    """SIGINT twice: ends at once, with 130, saving nothing."""
    job = Job(words(tmp_path), before=slow_steps)
    wait_for(lambda: steps(job) > 1)
    job.kill(signal.SIGINT)
    wait_for(lambda: "SIGINT: finishing the step" in job.output.read_text())
    job.kill(signal.SIGINT)
    assert job.wait(5) == [130]
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    came_out("SIGINT twice", "the second while the step is finished", 130, job.output.read_text().splitlines()[-1])


def slow_steps() -> None:
    register_optimizer_step_pre_hook(lambda *_: time.sleep(1.0))


@pytest.mark.slow
@pytest.mark.holds("survive.4")
def test_sigterm_in_the_middle_of_saving(tmp_path: Path, came_out: Any) -> None:
    """SIGTERM while a checkpoint is being written: it is finished, then the last step is saved, too."""
    job = Job(words(tmp_path, "--trainer.save_every_steps", "4"), before=slow_writes)
    folder = tmp_path / "run" / "checkpoints"
    torn = wait_for(lambda: list(folder.glob(".step-*.tmp/model.safetensors")))
    job.kill(signal.SIGTERM)
    assert torn[0].exists(), "the signal came after the save"
    assert job.wait() == [STOPPED_STATUS]
    kept = list_checkpoints(folder)
    assert [path.name for path in kept] == sorted(path.name for path in folder.iterdir())
    assert step_of(kept[0]) == 4
    assert load_checkpoint(kept[-1])[1]["done"] == steps(job)
    said = next(line for line in job.output.read_text().splitlines() if "ended by" in line)
    came_out(
        "SIGTERM while saving",
        "between two files of a checkpoint, which is whole, as is the next",
        STOPPED_STATUS,
        said,
    )


def slow_writes() -> None:
    """Half a second between the files of a checkpoint and its rename."""
    save, sha256 = saver.save_checkpoint, checkpoint._sha256

    def slow_sha256(file: Path) -> str:
        time.sleep(0.25)
        return sha256(file)

    def slowly(*args: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        checkpoint._sha256 = slow_sha256
        try:
            save(*args)
        finally:
            checkpoint._sha256 = sha256

    saver.save_checkpoint = slowly  # type: ignore[assignment]
