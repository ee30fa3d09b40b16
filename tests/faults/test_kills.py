"""Killed with -9 at random moments and continued each time: the same weights as if nothing had happened."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, tiny
from harness import EVERYTHING, Job, kill_repeatedly

from sparsemae.models.weights import read_weights

SAVES = ["--trainer.save_every_steps", "10", "--trainer.save_every_minutes", "0.01"]


def compare(
    tmp_path: Path, job: str, options: list[str], kills: int, epochs: int, processes: int, came_out: Any
) -> None:
    """An undisturbed run, and one that is killed; both with the same options."""
    options = [*options, *SAVES, "--trainer.epochs", str(epochs), "--trainer.global_batch", "8"]
    begin = time.monotonic()
    whole = Job(tiny(job, tmp_path / "whole", *options), processes)
    assert whole.wait() == [0] * processes, whole.output.read_text()
    seconds = time.monotonic() - begin
    # on average half of it passes before a kill, of which a part is start-up, and a part work that is lost
    killed = kill_repeatedly(tiny(job, tmp_path / "killed", *options), kills, 0.6 + 1.2 * seconds / kills, processes)
    assert killed == kills, "the run ended before it was killed often enough"
    one, other = read_weights(tmp_path / "whole")[0], read_weights(tmp_path / "killed")[0]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [metrics(tmp_path / name) for name in ("whole", "killed")]
    for row in (*logs[0], *logs[1]):
        row.pop("images_per_second", None)
    assert logs[0] == logs[1]
    topology = [(tmp_path / name / "topology.jsonl").read_text() for name in ("whole", "killed")]
    assert topology[0] == topology[1]
    where = {"pretrain": "pretraining", "finetune": "finetuning with all that is random, and an average"}[job]
    where += f" on {processes} processes, one of which is killed" if processes > 1 else ""
    steps = logs[0][-1]["step"]
    made = f"{where}, at random moments of {steps} steps ({seconds:.0f} s undisturbed), and continued each time"
    came_out("kill -9", made, "-9, at last 0", equal=True, times=kills)


@pytest.mark.slow
def test_pretraining_is_killed_three_times(tmp_path: Path, came_out: Any) -> None:
    """Pretraining: kill -9 at 3 random moments."""
    compare(tmp_path, "pretrain", ["--data.workers", "1"], 3, 10, 1, came_out)


@pytest.mark.holds_only
@pytest.mark.holds("survive.1")
def test_pretraining_is_killed_twenty_times(tmp_path: Path, came_out: Any) -> None:
    """Pretraining: kill -9 at 20 random moments."""
    compare(tmp_path, "pretrain", ["--data.workers", "1"], 20, 100, 1, came_out)


@pytest.mark.holds_only
@pytest.mark.holds("survive.1")
def test_one_of_two_processes_is_killed_five_times(tmp_path: Path, came_out: Any) -> None:
    """Pretraining on two processes: kill -9 of one of them at 5 random moments."""
    compare(tmp_path, "pretrain", [], 5, 50, 2, came_out)


@pytest.mark.holds_only
@pytest.mark.holds("survive.1")
def test_finetuning_is_killed_five_times(tmp_path: Path, came_out: Any) -> None:
    """Finetuning with mixup, cutmix, RandAugment, drop path and a moving average: kill -9 at 5 random moments."""
    compare(tmp_path, "finetune", [*EVERYTHING, "--trainer.evaluate_every_epochs", "20"], 5, 50, 1, came_out)
