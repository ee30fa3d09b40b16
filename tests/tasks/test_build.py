"""What the tasks share: the length of a mask's schedule, and which weights a file says it holds."""

from pathlib import Path

import pytest
import torch
from conftest import tiny
from torch import nn

from sparsemae.cli import main
from sparsemae.data.sampling import BatchPlan
from sparsemae.models.weights import read_weights
from sparsemae.sparsity import iter_sparse, sparsify
from sparsemae.tasks.build import SparseConfig, mask_schedule
from sparsemae.training.config import TrainerConfig


@pytest.mark.parametrize("length", [{"epochs": 4.0}, {"steps": 8}])
def test_a_gradual_schedule_reaches_the_pattern_in_the_middle_of_the_training(length: dict) -> None:
    model = nn.Sequential(nn.Linear(32, 2))
    sparsify(model, "2:32", include=["0"])
    plan = BatchPlan.make(images=20, global_batch=10, device_batch=None, world=1)
    masks = mask_schedule(model, SparseConfig(schedule="gradual"), TrainerConfig(**length), plan)
    patterns = []
    for epoch in (0.0, 1.75, 2.0):
        with masks.step(epoch):
            patterns += [str(layer.pattern) for _, layer in iter_sparse(model)]
    assert patterns == ["32:32", "4:32", "2:32"]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pretrain", "finetune", "segment"])
def test_a_file_says_whether_it_holds_the_average(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taps = ["--model.args", "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 2}"] if job == "segment" else []
    main(tiny(job, tmp_path / "run", "--trainer.ema_decay", "0.5", "--trainer.max_steps", "2", *taps))
    assert "the weights written are the moving average of trainer.ema_decay 0.5" in capsys.readouterr().err
    files = [tmp_path / "run/model.safetensors"]
    files += [tmp_path / f"run/checkpoints/step-00000002/{name}.safetensors" for name in ("ema", "model")]
    (written, of_written), (average, of_average), (raw, of_raw) = map(read_weights, files)
    assert (of_written["ema_decay"], of_average["ema_decay"], of_raw["ema_decay"]) == (0.5, 0.5, None)
    name = "blocks.0.norm1.bias"
    assert torch.equal(written[name], average[name])
    assert not torch.equal(written[name], raw[name])
