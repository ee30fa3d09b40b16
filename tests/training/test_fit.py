"""The loop on the real command line, made tiny: determinism, resuming, processes and accumulation."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import metrics, tiny
from lightning_fabric import Fabric
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparsemae.cli import main
from sparsemae.data.dataset import ImageDataset
from sparsemae.models.weights import read_weights
from sparsemae.options.training import OptimConfig
from sparsemae.sparsity import NMPattern, iter_sparse, nm_mask
from sparsemae.tasks.classification import EVALUATION_BATCH
from sparsemae.tasks.loading import load_model
from sparsemae.training import fit
from sparsemae.training.optim import learning_rate

HERE = Path(__file__).parent


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_weights(out)[0]


def assert_identical(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.holds("foundation.6")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("workers_live_on", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_seed_same_weights_with_any_workers(
    tmp_path: Path, workers: int, workers_live_on: bool, precision: str
) -> None:
    """Workers serve the whole run (live on), or are started anew in the middle of an epoch by a resume."""
    options = ["--trainer.precision", precision]
    main(tiny("pretrain", tmp_path / "one", *options))
    words = tiny("pretrain", tmp_path / "other", *options, "--data.workers", str(workers))
    if not workers_live_on:
        main([*words, "--trainer.max_steps", "3"])
    main(words)
    assert_identical(tmp_path / "one", tmp_path / "other")


@pytest.mark.slow
def test_of_a_run_that_has_ended_nothing_stays_in_the_process(tmp_path: Path) -> None:
    def alive() -> list[object]:
        gc.collect()
        return [one for one in gc.get_objects() if type(one) in (ImageDataset, fit._Loop)]

    before = alive()  # what failed runs of other tests left in the tracebacks that pytest keeps
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    assert [one for one in alive() if not any(one is other for other in before)] == []


@pytest.mark.slow
def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "one"))
    main(tiny("pretrain", tmp_path / "other", "--seed", "1"))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert not torch.equal(a["blocks.0.attn.qkv.weight"], b["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("job", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "stop", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.holds_only), 5]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, job: str, stop: int) -> None:
    options = ["--model.drop_path", "0.3"]
    if job == "finetune":
        options += ["--mixup", "0.8", "--cutmix", "1.0", "--erasing", "0.25", "--data.crop", "resized"]
        options += ["--data.auto_augment", "rand-m9-mstd0.5-inc1"]
    main(tiny(job, tmp_path / "whole", *options))
    main(tiny(job, tmp_path / "parts", *options, "--trainer.max_steps", str(stop)))
    main(tiny(job, tmp_path / "parts", *options))
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (
        [(row["step"], row["loss"]) for row in metrics(tmp_path / name) if "loss" in row] for name in ("whole", "parts")
    )
    assert whole == parts
    topologies = [(tmp_path / name / "topology.jsonl").read_text() for name in ("whole", "parts")]
    assert topologies[0] == topologies[1]


def test_a_run_without_an_intact_checkpoint_does_not_start_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny("pretrain", tmp_path / "run", "--trainer.max_steps", "1")
    main(words)
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "sha256.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(words)
    assert "no intact checkpoint to continue from" in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_checkpoint_leaves_no_lines(tmp_path: Path) -> None:
    steps = 0

    def fail(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("half-way through an update: nothing to save")

    hook = register_optimizer_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        main(tiny("pretrain", tmp_path / "run"))
    hook.remove()
    assert len(metrics(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    main(tiny("pretrain", tmp_path / "run"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_masks_are_looked_at_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Topology is made after the model has been moved: its reference must lie on the weights' device."""
    order: list[str] = []
    monkeypatch.setattr(Fabric, "setup", _noted(order, "setup", Fabric.setup))
    monkeypatch.setattr(fit, "Topology", _noted(order, "topology", fit.Topology))
    main(tiny("pretrain", tmp_path / "run", "--trainer.max_steps", "1"))
    assert order == ["setup", "topology"]


def _noted(order: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        order.append(name)
        return function(*args, **kwargs)

    return noted


def test_a_changed_configuration_is_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny("pretrain", tmp_path / "run", "--trainer.max_steps", "1")
    main(words)
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--optim.lr", "0.5"])
    assert exit_.value.code == 2
    assert "optim.lr was 0.004, is 0.5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--trainer.resume", "never"])


@pytest.mark.parametrize(
    "options",
    [
        ["--sparse.freeze_epoch", "1"],
        ["--sparse.schedule", "gradual"],
        ["--sparse.dense_epochs", "1"],
        ["--sparse.term", "decoupled", "--sparse.strength", "0.5"],
        ["--sparse.init_weights", "sparse"],
        ["--dense_loss_weight", "0.5"],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ["--sparse.decay_epochs", "2"],
                ["--sparse.allocation", "magnitude", "--sparse.allocation_epoch", "1"],
                ["--sparse.dense_epochs", "1", "--optim.freeze_variance_epoch", "1"],
                ["--sparse.freeze_epoch", "1", "--trainer.ema_decay", "0.9"],
            )
        ),
    ],
)
@pytest.mark.slow
def test_the_methods_open_points_change_the_run_and_resume_exactly(tmp_path: Path, options: list[str]) -> None:
    main(tiny("pretrain", tmp_path / "base"))
    main(tiny("pretrain", tmp_path / "whole", *options))
    main(tiny("pretrain", tmp_path / "parts", *options, "--trainer.max_steps", "3"))
    main(tiny("pretrain", tmp_path / "parts", *options))
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    base, other = weights(tmp_path / "base"), weights(tmp_path / "whole")
    if "decoupled" in options:
        lines = [json.loads(line) for line in (tmp_path / "whole" / "topology.jsonl").read_text().splitlines()]
        assert {layer["pull"] for line in lines for layer in line["layers"].values() if "pull" in layer} == {0.5}
    assert not torch.equal(base["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.slow
def test_a_mask_that_stops_moving_and_averaged_weights_combine(tmp_path: Path) -> None:
    """What is written: the average of the last step under the mask of the freeze, pruned weights 0."""
    run = tmp_path / "run"
    options = ["--sparse.freeze_epoch", "1", "--trainer.ema_decay", "0.9", "--trainer.save_every_steps", "1"]
    main(tiny("finetune", run, *options, "--trainer.keep_checkpoints", "9"))

    def of_step(step: int, name: str, prefix: str = "") -> dict[str, torch.Tensor]:
        tensors = weights(run / f"checkpoints/step-{step:08d}/{name}.safetensors")
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    assert not of_step(2, "training", "masks/")
    first, last, average, written = (
        of_step(3, "training", "masks/"), of_step(6, "training", "masks/"), of_step(6, "ema"), weights(run)
    )  # fmt: skip
    assert len(first) == 8
    for name, bits in first.items():
        mask = written[f"{name}.weight_mask"]
        assert torch.equal(bits, last[name])
        assert torch.equal(bits, torch.from_numpy(np.packbits(mask.numpy())))
        assert torch.equal(written[f"{name}.weight"], average[f"{name}.weight"].where(mask, torch.zeros(())))
    assert torch.equal(written["head.weight"], average["head.weight"])
    model, _ = load_model(run / "checkpoints/step-00000006")  # latent weights, and the mask beside them
    for name, layer in iter_sparse(model):
        assert torch.equal(layer.weight, written[f"{name}.weight"])


@pytest.mark.slow
def test_a_mask_that_stops_moving_in_pretraining_goes_with_its_weights(tmp_path: Path) -> None:
    """The rate is such that magnitudes have another order in the end; the file has the latent weights, too."""
    run, after = tmp_path / "run", ("--init", str(tmp_path / "run"), "--trainer.max_steps", "1", "--optim.lr", "0")
    main(tiny("pretrain", run, "--sparse.freeze_epoch", "1", "--optim.lr", "0.05"))
    written, (model, card) = weights(run), load_model(run)
    masks = {key: value for key, value in written.items() if key.endswith("weight_mask")}
    assert len(masks) == len(card.patterns) == 8
    for name, layer in iter_sparse(model):
        public = name.removeprefix("encoder.")
        latent, mask = written[f"{public}.weight"], masks[f"{public}.weight_mask"]
        assert not torch.equal(nm_mask(latent, NMPattern(2, 32)), mask)
        assert torch.equal(layer.weight, latent.where(mask, torch.zeros(())))
    main(tiny("finetune", tmp_path / "full", *after))
    main(tiny("finetune", tmp_path / "sparse", *after, "--sparse.init_weights", "sparse"))
    name = "blocks.0.mlp.fc1.weight"
    for start, mask in (("full", nm_mask(written[name], NMPattern(2, 32))), ("sparse", masks[f"{name}_mask"])):
        assert torch.equal(weights(tmp_path / start)[f"{name}_mask"], mask)


def test_the_linear_rule_scales_both_rates(tmp_path: Path) -> None:
    options = ["--optim.lr", "1e-3", "--optim.min_lr", "1e-4", "--optim.lr_batch", "64", "--optim.warmup_epochs", "0"]
    main(tiny("pretrain", tmp_path / "run", *options, "--trainer.scale_lr", "true"))
    rows = metrics(tmp_path / "run")
    assert rows[0]["lr"] == 1e-3 / 4
    lowest = learning_rate(OptimConfig(lr=2.5e-4, min_lr=2.5e-5, warmup_epochs=0), 5 / 2, 3)
    assert rows[-1]["lr"] == pytest.approx(lowest)


def test_the_runs_folder(tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "model.safetensors",
        "report.html", "report.json", "result.json", "topology.jsonl",
    ]  # fmt: skip
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    # config.yaml can be run again
    main(["pretrain", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")])
    assert_identical(tmp_path / "run", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.holds("foundation.5")
def test_a_frozen_file_holds_nm_in_every_group(tmp_path: Path) -> None:
    main(tiny("finetune", tmp_path / "run"))
    state = weights(tmp_path / "run")
    masks = [key for key in state if key.endswith("weight_mask")]
    assert len(masks) == 8
    for key in masks:
        weight = state[key.removesuffix("_mask")]
        kept = (weight.view(-1, 32) != 0).sum(dim=1)
        assert (kept == 2).all()
        assert not torch.signbit(weight[~state[key]]).any()
        assert torch.equal(nm_mask(weight, NMPattern(2, 32)), state[key])


def launch(processes: int, script: str, *words: Any) -> None:
    """Run a script beside this file in so many processes (gloo), one thread each."""
    command, (first, job) = [sys.executable], words
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command += [str(HERE / script), str(first), *job, "--trainer.devices", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def gradients(tmp_path: Path, name: str, processes: int, *options: str) -> dict[str, torch.Tensor]:
    """Gradients at the first optimizer step, and the loss, of a real run in fp64."""
    out = tmp_path / name
    words = tiny("pretrain", out, "--trainer.precision", "fp64", "--trainer.max_steps", "1",
                 "--trainer.global_batch", "8", "--model.drop_path", "0.0", *options)  # fmt: skip
    launch(processes, "gradients.py", f"{out}.pt", words)
    result: dict[str, torch.Tensor] = torch.load(str(out) + ".pt", weights_only=True)
    result["loss"] = torch.tensor(metrics(out)[0]["loss"], dtype=torch.float64)
    return result


@pytest.mark.slow
@pytest.mark.holds("foundation.3")
@pytest.mark.holds_only
def test_processes_accumulation_and_batch_agree(tmp_path: Path, figure: Any) -> None:
    """Loss, gradient and SR-STE's term: 1 x 8, 1 x 2 steps x 4, 2 processes x 4 (gloo)."""
    worst = 0.0
    terms = []
    for name, processes, batch in [("whole", 1, "8"), ("accumulated", 1, "4"), ("processes", 2, "4")]:
        options = ("--trainer.device_batch", batch)
        plain = gradients(tmp_path, f"{name}-0", processes, *options, "--sparse.strength", "0")
        pulled = gradients(tmp_path, f"{name}-1", processes, *options, "--sparse.strength", "1e-3")
        term = {f"srste {key}": pulled[key] - plain[key] for key in plain}
        terms.append({**plain, **pulled, **term} | {f"plain {key}": plain[key] for key in plain})
    whole, accumulated, two = terms
    assert any(value.abs().max() > 1e-6 for key, value in whole.items() if key.startswith("srste"))
    for key, value in whole.items():
        error = float((accumulated[key] - value).norm() / value.norm().clamp_min(1e-12))
        worst = max(worst, error)
        assert torch.equal(accumulated[key], two[key]), key
    assert worst <= 1e-10
    figure(f"largest relative difference {worst:.1e}; processes and accumulation bit for bit")


@pytest.mark.slow
@pytest.mark.holds("imagenet.3")
@pytest.mark.parametrize("beyond_the_paper", [False, True])
@pytest.mark.holds_only
def test_two_processes_equal_accumulation_through_a_finetuning(
    tmp_path: Path, figure: Any, runs: Path, beyond_the_paper: bool
) -> None:
    """Ten steps with mixup, cutmix, erasing, RandAugment and drop path on real images: the same bits."""
    more = ["--init", str(runs / "pretrain"), "--teacher", str(runs / "finetune"), "--sparse.allocation", "magnitude",
            "--sparse.allocation_epoch", "2", "--sparse.dense_epochs", "1", "--sparse.decay_epochs", "3",
            "--optim.freeze_variance_epoch", "1", "--trainer.ema_decay", "0.9"]  # fmt: skip
    for name, processes in (("accumulated", 1), ("processes", 2)):
        out = tmp_path / name
        words = tiny("finetune", out, "--trainer.epochs", "5", "--trainer.device_batch", "8",
                     "--mixup", "0.8", "--cutmix", "1.0", "--erasing", "0.25", "--model.drop_path", "0.3",
                     "--data.crop", "resized", "--data.auto_augment", "rand-m9-mstd0.5-inc1",
                     *more * beyond_the_paper)  # fmt: skip
        launch(processes, "mask_hashes.py", tmp_path / f"{name}.masks", words)
    assert metrics(tmp_path / "processes")[-1]["step"] == 10
    assert_identical(tmp_path / "accumulated", tmp_path / "processes")
    hashes = {file.read_text() for file in tmp_path.glob("*.masks.*")}
    assert len(list(tmp_path.glob("*.masks.*"))) == 3
    assert len(hashes) == 1
    figure("10 steps, weights and masks bit for bit")


@pytest.mark.slow
@pytest.mark.holds("imagenet.5")
@pytest.mark.holds_only
def test_evaluation_on_two_processes_is_that_of_one(tmp_path: Path, figure: Any) -> None:
    """On 10,000 images, which batch x processes does not divide: top-1, top-5 and standard error to the last bit."""
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = tiny("finetune", out, "--trainer.max_steps", "2", "--trainer.device_batch", "8")
        launch(processes, "mask_hashes.py", tmp_path / f"{processes}.masks", words)
        found.append([row for row in metrics(out) if "top1" in row])
    assert 10_000 % (EVALUATION_BATCH * 2)
    assert len(found[0]) == 1
    keys = ("top1", "top5", "standard_error")
    assert [found[1][0][key] for key in keys] == [found[0][0][key] for key in keys]
    figure(f"10,000 images, batch {EVALUATION_BATCH}: top-1 {found[0][0]['top1']:.2%} on one process and on two")


@pytest.mark.slow
@pytest.mark.holds("imagenet.3")
@pytest.mark.parametrize(
    ("job", "precision"),
    [pytest.param(*one, marks=pytest.mark.holds_only) for one in (("pretrain", "fp64"), ("finetune", "fp32"))],
)
def test_compiled_equals_eager(
    tmp_path: Path, job: str, precision: str, monkeypatch: pytest.MonkeyPatch, figure: Any
) -> None:
    """Ten steps. AdamW makes whole steps of the rounding noise in tiny gradients: pretraining is compared in fp64,
    and the key's bias, which softmax cancels, not at all."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # two at once race for a shared one
    for compiled in ("false", "true"):
        options = ["--trainer.epochs", "5", "--model.drop_path", "0.0", "--trainer.compile", compiled]
        options += ["--trainer.precision", precision]
        main(tiny(job, tmp_path / compiled, *options))
    eager, compiled_ = weights(tmp_path / "false"), weights(tmp_path / "true")
    worst = 0.0
    for key, value in eager.items():
        one, other = value.double(), compiled_[key].double()
        if key.endswith("qkv.bias"):
            one, other = (torch.cat((x[: len(x) // 3], x[-len(x) // 3 :])) for x in (one, other))
        worst = max(worst, float((one - other).norm() / one.norm().clamp_min(1e-12)))
    losses = [[row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("false", "true")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert worst <= 1e-4
    figure(f"{job}, {precision}: largest relative difference of a tensor {worst:.1e}")
