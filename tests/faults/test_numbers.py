"""A NaN in a batch: the step is skipped on all processes alike, its images are named, and too many end the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, tiny
from harness import run
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.models.weights import read_weights
from sparsemae.tasks import pretraining
from sparsemae.tasks.pretraining import Pretraining
from sparsemae.training.checkpoint import list_checkpoints, load_checkpoint
from sparsemae.training.state import bad_record

POISONED = 5
"""Index of an image that is NaN."""


def poison() -> None:
    """Image 5 is NaN for the model."""
    normalize, loss = pretraining.normalize, Pretraining.loss

    def poisoned(task: Pretraining, forward: nn.Module, batch: dict[str, Any]) -> Tensor:
        bad = (batch["index"] == POISONED).any()
        pretraining.normalize = lambda *words: normalize(*words) * (float("nan") if bad else 1.0)
        return loss(task, forward, batch)

    Pretraining.loss = poisoned  # type: ignore[method-assign, assignment]


def poison_all() -> None:
    """From the third step on every image is NaN."""
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            pretraining.normalize = lambda images, *_: images * float("nan")

    register_optimizer_step_post_hook(count)


@pytest.mark.slow
@pytest.mark.holds("survive.4")
def test_a_nan_skips_the_step_on_all_processes(tmp_path: Path, came_out: Any) -> None:
    """One image NaN, on one process and on two, of which one sees it: the step is skipped and named, alike."""
    options = ["--trainer.device_batch", "8", "--trainer.ema_decay", "0.5"]
    outputs = []
    for name, processes in (("one", 1), ("two", 2)):
        statuses, output = run(tiny("pretrain", tmp_path / name, *options), processes, poison)
        assert statuses == [0] * processes, output
        outputs.append(output)
    one, two = read_weights(tmp_path / "one")[0], read_weights(tmp_path / "two")[0]
    assert all(torch.equal(one[key], two[key]) and one[key].isfinite().all() for key in one)
    records = [
        [json.loads(line) for line in (tmp_path / name / "bad-batches.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 3  # once an epoch
    for record in records[0]:
        (named,) = record["micro_batches"]
        assert record["loss"] == named["loss"] == "nan"
        assert len(named["images"]) == 8
        assert named["images"][str(POISONED)].endswith(f"/{POISONED:05d}")
        assert f"step skipped: loss is nan at step {record['step']}" in outputs[0]
    assert metrics(tmp_path / "one")[-1]["bad_steps"] == 3
    losses = {row["step"]: row.get("loss") for row in metrics(tmp_path / "one")}
    assert [step for step, loss in losses.items() if loss is None] == [record["step"] for record in records[0]]
    said = next(line for line in outputs[0].splitlines() if "step skipped" in line)
    made = "one image made NaN, on 1 and on 2 processes, of which one sees it"
    came_out("NaN in a batch", made, 0, said, equal=True, times=len(records[0]))


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_with_the_last_good_state_saved(tmp_path: Path, came_out: Any) -> None:
    """All images NaN from step 3 on: after 3 bad steps the run ends, the weights of step 2 being saved."""
    run(tiny("pretrain", tmp_path / "good", "--trainer.max_steps", "2"))
    words = tiny("pretrain", tmp_path / "run", "--trainer.max_bad_steps", "3")
    statuses, output = run(words, before=poison_all)
    assert statuses == [2]
    assert "loss is nan at step 5" in output
    assert "bad step 3 in a row" in output
    (last,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"the last checkpoint is {last}" in output
    weights, good = load_checkpoint(last)[0]["model"], read_weights(tmp_path / "good")[0]
    assert all(torch.equal(weights[key], good[key]) for key in good)
    made = "all images NaN from step 3 on, trainer.max_bad_steps 3"
    came_out("NaN for good", made, statuses[0], output.splitlines()[-1], equal=True, times=3)


def test_the_images_of_a_bad_gradient_are_all_of_the_step() -> None:
    indices = torch.arange(8).view(2, 2, 2)
    everything = bad_record(torch.ones(2, 2), indices, str)
    assert [(row["number"], list(row["images"])) for row in everything] == [
        (0, [0, 1]), (2, [2, 3]), (1, [4, 5]), (3, [6, 7]),
    ]  # fmt: skip
    (one,) = bad_record(torch.tensor([[1.0, 1.0], [float("inf"), 1.0]]), indices, "{}.png".format)
    assert one == {"number": 1, "loss": "inf", "images": {4: "4.png", 5: "5.png"}}
