"""A folder of images in one command: what is written, what is said, and how good it is.

The whole trainings are of photographs that scikit-image ships: separable sets of four classes, each image another crop.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import Figure, metrics, tiny
from hub_standin import hub
from photographs import PHOTOGRAPHS, class_folders
from PIL import Image
from safetensors.torch import save

from sparsemae.card import ModelCard
from sparsemae.cli import main
from sparsemae.models.weights import card_of, read_metadata, read_weights
from sparsemae.options.derived import RATE_BATCH, RULES
from sparsemae.tasks.classification import Classification

FRESH = 500
WARNING = "warning: "


def card(run: Path) -> ModelCard:
    return card_of(read_metadata(run / "model.safetensors"), run)


def epochs_of(run: Path) -> list[float]:
    """Top-1 of each evaluation."""
    return [line["top1"] for line in metrics(run) if "top1" in line]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call with the top-1 that the evaluations of the loop are to give; those after them are real."""

    def script(*values: float) -> None:
        rest, real = list(values), Classification.evaluate

        def evaluate(self: Any, fabric: Any, model: Any) -> dict[str, float]:
            return real(self, fabric, model) | ({"top1": rest.pop(0)} if rest else {})

        monkeypatch.setattr(Classification, "evaluate", evaluate)

    return script


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photographs, to be read only; 36 are for training."""
    return class_folders(tmp_path_factory.mktemp("forty") / "images", 40)


def by_recipe(out: Path, root: Path, *options: str) -> list[str]:
    """The demo's recipe made tiny, on a folder: three epochs of two steps."""
    return tiny("finetune", out, "--data.source", "folder", "--data.root", str(root), "--data.train_images", "null",
                *WORDS, *options)  # fmt: skip


WORDS = ("--trainer.evaluate_every_epochs", "1", "--trainer.keep_checkpoints", "1", "--data.workers", "0")


@pytest.mark.holds("own.2")
def test_the_peak_is_written_packed_and_evaluated(
    tmp_path: Path, forty: Path, scripted: Callable[..., None], capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    run = tmp_path / "run"
    scripted(0.3, 0.6, 0.5)
    main(by_recipe(run, forty, "--keep", "best"))
    shown = capsys.readouterr().err
    assert epochs_of(run) == [0.3, 0.6, 0.5]
    assert "model.safetensors: epoch 2 of 3, the best: top-1 " in shown
    written, peak = read_weights(run)[0], read_weights(run / "checkpoints" / "best")[0]
    masks = {name: value for name, value in written.items() if name.endswith("weight_mask")}
    assert len(masks) == 8
    for name, value in peak.items():
        mask = masks.get(f"{name}_mask")
        assert torch.equal(written[name], value if mask is None else torch.where(mask, value, 0.0)), name
    assert card(run).frozen
    result = json.loads((run / "result.json").read_text())
    assert (result["kept"], result["best"], result["epochs"], result["last"]["top1"]) == (2, 2, 3, 0.5)
    main(["pack", str(run), str(tmp_path / "packed"), "--dtype", "fp32"])
    main(["pack", str(run / "checkpoints" / "best"), str(tmp_path / "of-checkpoint"), "--dtype", "fp32"])
    capsys.readouterr()
    found = set()
    for model in (run, tmp_path / "packed", tmp_path / "of-checkpoint"):
        main(["evaluate", str(model), str(forty), "--data.workers", "0"])
        found.add(re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1])  # type: ignore[index]
    assert found == {f"{100 * result['metrics']['top1']:.2f}"}
    figure(f"top-1 of the peak, frozen, packed, and of its checkpoint, packed: {found}")


@pytest.mark.holds("own.2")
def test_the_last_is_written_where_a_recipe_is_named_and_the_best_is_said(
    tmp_path: Path, forty: Path, scripted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(0.3, 0.6, 0.5)
    main(by_recipe(tmp_path / "run", forty))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kept"] == 3
    assert "the best was epoch 2 of 3: --keep best writes that one" in capsys.readouterr().err
    scripted()
    main(by_recipe(tmp_path / "run", forty, "--trainer.keep", "best"))  # continued, with nothing left to do
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kept"] == 2


@pytest.mark.slow
def test_what_is_best_before_the_pattern_is_reached_does_not_count(
    tmp_path: Path, forty: Path, scripted: Callable[..., None]
) -> None:
    """A gradual schedule reaches it after two of three epochs; equals go to the later one."""
    gradual = ("--sparse.schedule", "gradual", "--sparse.gradual_epochs", "1.5", "--trainer.keep", "best")
    scripted(0.9, 0.4, 0.4)
    main(by_recipe(tmp_path / "run", forty, *gradual))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kept"] == 3
    scripted(0.9, 0.5, 0.4)
    main(by_recipe(tmp_path / "other", forty, *gradual))
    assert json.loads((tmp_path / "other" / "result.json").read_text())["kept"] == 2


@pytest.mark.slow
def test_masks_that_froze_after_the_peak_are_not_the_peaks(
    tmp_path: Path, forty: Path, scripted: Callable[..., None]
) -> None:
    scripted(0.6, 0.4, 0.4)
    frozen = ("--sparse.freeze_epoch", "2", "--trainer.keep", "best")
    main(by_recipe(tmp_path / "run", forty, *frozen))
    written, peak = read_weights(tmp_path / "run")[0], read_weights(tmp_path / "run" / "checkpoints" / "best")[0]
    for name, value in peak.items():
        if f"{name}_mask" in written:
            kept = value.abs().reshape(-1, 32).topk(2).values.sum()
            assert torch.isclose(written[name].abs().sum(), kept), name


def test_a_test_split_is_measured_once_at_the_end(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(image_folder / "test", 4)
    for old, new in (("astronaut", "cat"), ("chelsea", "dog")):
        (image_folder / "test" / old).rename(image_folder / "test" / new)
    for name in ("coffee", "hubble_deep_field"):
        for file in (image_folder / "test" / name).iterdir():
            file.unlink()
    words = ["finetune", str(image_folder), "--out", str(tmp_path / "run"), "--epochs", "1", "--data.workers", "0",
             "--model.args", "{embed_dim: 32, depth: 2, num_heads: 2}", "--trainer.precision", "fp32"]  # fmt: skip
    main(words)
    shown = capsys.readouterr().err
    assert "on the split test, measured once: top-1 " in shown
    assert "on 2 images" in shown
    assert "chosen by these images" not in shown
    assert 0 <= json.loads((tmp_path / "run" / "result.json").read_text())["test"]["top1"] <= 1
    main(words)  # resumed: derived settings are those that the run was begun with
    assert "holds a run with another configuration" not in capsys.readouterr().err


def test_a_run_goes_on_with_what_its_data_settled(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the rule, and the number of processors, have changed since."""
    words = ["pretrain", str(image_folder), "--out", str(tmp_path / "run"), "--data.workers", "0",
             "--model.args", "{embed_dim: 32, depth: 2, num_heads: 2}", "--trainer.precision", "fp32"]  # fmt: skip
    main([*words, "--trainer.max_steps", "1"])
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    monkeypatch.setitem(RULES, "pretrain", RULES["pretrain"]._replace(rate=1.0, largest_batch=2, seen=1))
    main([*words, "--trainer.max_steps", "2"])
    after = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for tree in (before, after):
        del tree["from_data"], tree["trainer"]["max_steps"]
    assert before == after


@pytest.mark.slow
def test_evaluate_takes_the_runs_own_data(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    words = ["finetune", str(image_folder / "train"), "--out", str(tmp_path / "run"), "--epochs", "1",
             "--data.workers", "0", "--data.val_share", "0.25", "--trainer.precision", "fp32",
             "--model.args", "{embed_dim: 32, depth: 2, num_heads: 2}"]  # fmt: skip
    main(words)
    assert card(tmp_path / "run").data["held_out"] == {"rule": "stratified", "share": 0.25, "seed": 0}
    wanted = f"{100 * card(tmp_path / 'run').metrics['top1']:.2f}"
    capsys.readouterr()
    for model in ("run", "run/model.safetensors", "run/checkpoints/best"):
        main(["evaluate", str(tmp_path / model), "--data.workers", "0"])
        said = capsys.readouterr()
        assert f"top-1 {wanted}%" in said.out
        assert "on 4 images" in said.out
        assert "its held-out part, which the model was not trained on" in said.err
    named = refused("evaluate", str(tmp_path / "run"), "--data.source", "embedded")
    assert "class" in named, named
    image_folder.rename(tmp_path / "moved")
    assert "its images are no longer in" in refused("evaluate", str(tmp_path / "run"))
    main(["evaluate", str(tmp_path / "run"), str(tmp_path / "moved" / "train"), "--data.workers", "0"])
    assert "on 4 images" in capsys.readouterr().out


@pytest.mark.holds("own.7")
@pytest.mark.holds_only
def test_init_auto_is_timms_weights_for_the_chosen_model(tmp_path: Path, forty: Path, figure: Figure) -> None:
    """Out of a stand-in of the hub that has them; where nobody answers it is one line with the ways out."""
    name = "vit_tiny_patch16_224"
    found, source = timm.get_pretrained_cfg(name), timm.create_model(name)
    words = ["finetune", str(forty), "--init", "auto", "--trainer.max_steps", "1", "--lr", "1e-12",
             "--data.workers", "0", "--trainer.accelerator", "cpu"]  # fmt: skip

    def started(endpoint: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-m", "sparsemae", *words, "--out", str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    with hub() as server:
        refused = started("http://127.0.0.1:9")  # nobody listens there
        server.repositories[found.hf_hub_id] = {"model.safetensors": save(source.state_dict())}
        done = started(server.endpoint)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert f"--init timm:{name}: its weights cannot be fetched from the hub" in refused.stderr
    assert "a pretraining of your own images" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert f"--init auto: timm:{name}" in done.stderr
    assert "--data.mean '[0.5, 0.5, 0.5]'" in done.stderr
    assert card(tmp_path / "run").input.mean == found.mean == (0.5, 0.5, 0.5)
    assert card(tmp_path / "run").input.interpolation == found.interpolation
    written = read_weights(tmp_path / "run")[0]
    assert torch.allclose(written["patch_embed.proj.weight"], source.patch_embed.proj.weight, atol=1e-6)
    figure(f"{len(server.asked)} requests; refused by: {refused.stderr.strip()}")


def fresh_accuracy(run: Path, fresh: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    main(["evaluate", str(run), str(fresh), "--data.workers", "0"])
    found = re.search(r"top-1 ([\d.]+)% .* on 500 images", capsys.readouterr().out)
    assert found is not None
    return float(found[1]) / 100


@pytest.mark.holds("own.1", "own.2")
@pytest.mark.holds_only
@pytest.mark.parametrize("count", [40, 400, 4_000])
def test_a_folder_without_options(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beats chance by more than five standard errors on fresh images; of 40 only the validation set's size is said."""
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "images", count)
    fresh = class_folders(tmp_path / "fresh", FRESH, seed=1)
    main(["finetune", "images"])
    shown, run = capsys.readouterr().err, tmp_path / "runs" / "finetune"
    config, result = yaml.safe_load((run / "config.yaml").read_text()), json.loads((run / "result.json").read_text())
    images, batch = count * 9 // 10, config["trainer"]["global_batch"]
    assert batch % 2 == 0
    assert batch <= images / 8
    assert config["optim"]["lr"] == pytest.approx(RULES["classify"].rate * batch / RATE_BATCH, rel=1e-2)
    assert config["optim"]["warmup_steps"] <= 0.1 * config["trainer"]["epochs"] * (images // batch)
    assert f"settings from {images:,} images: " in shown
    top1 = epochs_of(run)
    assert result["kept"] == max(range(len(top1)), key=lambda epoch: (top1[epoch], epoch)) + 1
    warned = [line for line in shown.splitlines() if line.startswith(WARNING)]
    assert len(warned) == (count == 40)
    assert all("4 validation images are too few to tell" in line for line in warned)
    found, error = fresh_accuracy(run, fresh, capsys), math.sqrt(0.25 * 0.75 / FRESH)
    figure(f"{count:,} images: epoch {result['kept']:g} of {result['epochs']:g}, {found:.1%} on {FRESH} fresh ones")
    assert found > 0.25 + 5 * error


def dark_and_light(root: Path, counts: tuple[int, int], seed: int) -> Path:
    """Crops of one photograph, at a brightness drawn for each: 0.6 and 0.8 in the means of the classes, 0.1 about them.

    Who knows the brightness tells 84 % of either class; who also knows that one is rare calls most of it the other.
    """
    random = np.random.default_rng(seed)
    crops = class_folders(root.with_name(f"{root.name}-crops"), sum(counts), seed, PHOTOGRAPHS[2:3])
    for number, crop in enumerate(sorted(crops.rglob("*.jpg"))):
        light = number >= counts[0]
        folder, factor = root / ("light" if light else "dark"), random.normal(0.8 if light else 0.6, 0.1)
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(crop).point(lambda value, factor=factor: value * factor).save(folder / crop.name)
    return root


@pytest.mark.holds("own.1")
@pytest.mark.holds_only
def test_class_weights_help_a_rare_class(tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: Figure) -> None:
    """One of two classes has 5 %, and looks much like the other: balanced accuracy on fresh images, three seeds."""
    balanced: dict[str, list[float]] = {"none": [], "balanced": []}
    images = dark_and_light(tmp_path / "images", (190, 10), 0)
    fresh = dark_and_light(tmp_path / "fresh", (100, 100), 1)
    for seed in range(3):
        for weights, found in balanced.items():
            run = tmp_path / f"{weights}-{seed}"
            main(["finetune", str(images), "--out", str(run), "--seed", str(seed), "--epochs", "60", "--img-size", "64",
                  "--class_weights", weights, "--trainer.keep", "last"])  # fmt: skip
            recalls = []
            for name in ("dark", "light"):
                capsys.readouterr()
                main(["predict", str(run), str(fresh / name), "--top_k", "1"])
                lines = capsys.readouterr().out.splitlines()
                recalls.append(sum(f": {name} " in line for line in lines) / len(lines))
            found.append(sum(recalls) / 2)
    gains = [b - a for a, b in zip(balanced["none"], balanced["balanced"], strict=True)]
    figure(f"balanced accuracy {balanced}: gains {gains}")
    assert sum(gains) > 0
