"""The probes against slow twins, and on the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from sparsemae.cli import main
from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.probe import knn, linear
from sparsemae.options import SourceConfig
from sparsemae.options.commands import EvaluateConfig


def clusters(count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``[N, 8]`` around three centers, and which."""
    generator = torch.Generator().manual_seed(count)
    targets = torch.arange(count) % 3
    return torch.eye(8)[targets] + spread * torch.randn(count, 8, generator=generator), targets


def test_knn_equals_a_vote_counted_by_hand() -> None:
    (train, targets), (val, _) = clusters(90, 0.5), clusters(30, 0.5)
    votes = knn(train, targets, val, 3).numpy()
    for i, query in enumerate(val.numpy()):
        cosines = [float(x @ query / np.linalg.norm(x) / np.linalg.norm(query)) for x in train.numpy()]
        wanted = np.zeros(3)
        for j in sorted(range(90), key=lambda j: -cosines[j])[:20]:
            wanted[targets[j]] += np.exp(cosines[j] / 0.07)
        np.testing.assert_allclose(votes[i], wanted, rtol=1e-4)


def test_the_linear_probe_is_the_minimum_for_one_of_its_penalties() -> None:
    (train, targets), (val, val_targets) = clusters(300, 0.25), clusters(99, 0.25)
    logits = linear(train, targets, val, 3)
    assert (logits.argmax(dim=1) == val_targets).float().mean() > 0.9
    # the stationary point, from the logits alone: a linear map of the standardized features
    std, mean = torch.std_mean(train, dim=0)
    standard = (torch.cat((train, val)) - mean) / (std + 1e-6)
    all_logits = linear(train, targets, torch.cat((train, val)), 3)
    design = torch.cat((standard, torch.ones(len(standard), 1)), dim=1).double()
    weight = torch.linalg.lstsq(design, all_logits.double()).solution  # D + 1, C
    error = all_logits[:300].double().softmax(dim=1) - torch.eye(3)[targets]
    gradient = design[:300, :8].T @ error / 300
    penalties = -(gradient * weight[:8]).sum() / weight[:8].square().sum()
    assert min(abs(penalties / penalty - 1) for penalty in (1e-4, 1e-3, 1e-2, 1e-1)) < 0.05


@pytest.mark.slow
def test_a_pretrained_and_a_finetuned_run_are_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("pretrain", "finetune"):
        main(tiny(job, tmp_path / job, "--trainer.max_steps", "1"))
        found = evaluate(EvaluateConfig(str(tmp_path / job), probe="knn"))
        assert f"{tmp_path / job}: knn probe, top-1 {found['top1']:.2%}" in capsys.readouterr().out
        assert found["top1"] > 0.5  # pixels alone tell most clothes apart
        assert found["standard_error"] < 0.006


@pytest.mark.slow
def test_a_packed_file_is_not_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    main(["pack", str(tmp_path / "run"), str(tmp_path / "small.safetensors")])
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "small.safetensors"), "--probe", "knn"])
    assert "wanted a run or its weights with --probe, got a packed file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_probe_is_measured_on_what_the_models_own_training_held_out(tmp_path: Path, image_folder: Path) -> None:
    root = str(image_folder / "train")  # eight images of each class, and no splits
    at = ["--data.source", "folder", "--data.root", root, "--data.train_images", "null", "--trainer.global_batch", "4"]
    main(tiny("pretrain", tmp_path / "run", *at, "--data.val_share", "0.5", "--trainer.max_steps", "1"))
    found = evaluate(EvaluateConfig(str(tmp_path / "run"), SourceConfig(root=root, workers=0), probe="knn"))
    assert found["images"] == 8
