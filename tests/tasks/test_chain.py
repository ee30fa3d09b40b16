"""From images to predictions through the command line, made tiny."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import metrics, tiny
from PIL import Image
from safetensors.torch import load_file

import sparsemae.commands.evaluate
from sparsemae.cli import main
from sparsemae.data.sources import SourceConfig
from sparsemae.models import MaskedAutoencoder
from sparsemae.models.weights import load_weights, read_weights, save_model
from sparsemae.runtime import load
from sparsemae.sparsity import NMPattern, iter_sparse, nm_mask, sparsify
from sparsemae.tasks.build import load_autoencoder, load_classifier
from sparsemae.commands.evaluate import EvaluateConfig, evaluate
from sparsemae.commands.pack import checked_images
from sparsemae.commands.predict import PredictConfig, predict


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain -> finetune, six steps each."""
    folder = tmp_path_factory.mktemp("runs")
    main(tiny("pretrain", folder / "pretrain"))
    main(tiny("finetune", folder / "finetune", "--init", str(folder / "pretrain")))
    return folder


def test_finetuning_starts_from_the_full_latent_weights(runs: Path, tmp_path: Path) -> None:
    main(tiny("finetune", tmp_path / "start", "--init", str(runs / "pretrain"), "--optim.lr", "0"))
    before, after = read_weights(runs / "pretrain")[0], read_weights(tmp_path / "start")[0]
    key = "blocks.1.mlp.fc2.weight"
    assert (before[key] != 0).all()
    mask = nm_mask(before[key], NMPattern(2, 32))
    assert torch.equal(after[key], torch.where(mask, before[key], 0.0))
    assert torch.equal(after["pos_embed"], before["pos_embed"])


@pytest.mark.slow
@pytest.mark.holds("imagenet.4")
@pytest.mark.parametrize("start", ["our run", "an MAE file", "a timm model"])
def test_finetuning_starts_from_anybodys_weights(
    runs: Path, tmp_path: Path, start: str, capsys: pytest.CaptureFixture[str], figure
) -> None:
    """The rate is 0, so what comes out is the start; the head and its norm are new."""
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder, file = timm.create_model("vit_base_patch16_224", num_classes=7, **arguments), tmp_path / "start.pth"
    if start == "our run":
        source, wanted = runs / "pretrain", read_weights(runs / "pretrain")[0]
    elif start == "an MAE file":  # full, under MAE's names
        encoder.reset_classifier(0)
        save_model(tmp_path / "mae.safetensors", MaskedAutoencoder(encoder, 16, 1, 2), {})
        source, wanted = file, load_file(tmp_path / "mae.safetensors")
        torch.save({"model": wanted}, file)
    else:
        source, wanted = file, encoder.state_dict()
        torch.save(wanted, file)
    main(tiny("finetune", tmp_path / "run", "--init", str(source), "--optim.lr", "0", "--optim.min_lr", "0",
              "--trainer.max_steps", "1", "--sparse.pattern", "dense"))  # fmt: skip
    matched = re.search(r"(\S+%) of the encoder's parameters", capsys.readouterr().err)
    assert matched is not None
    assert matched[1] == "100.0%"
    after = read_weights(tmp_path / "run")[0]
    taken = [key for key in after if not key.startswith(("head", "fc_norm"))]
    assert len(taken) == 4 + 12 * 2
    assert all(torch.equal(after[key], wanted[key]) for key in taken)
    figure(f"{start}: {matched[0]}")


@pytest.mark.holds("imagenet.4")
def test_a_start_of_another_architecture_is_refused_with_its_share(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = "{patch_size: 7, embed_dim: 32, depth: 3, num_heads: 2}"
    with pytest.raises(SystemExit) as exit_:
        main(tiny("finetune", tmp_path / "run", "--init", str(runs / "pretrain"), "--model.args", deeper))
    assert exit_.value.code == 2
    assert re.search(r"wanted at least 90% of the encoder's parameters, matched [67]\d\.\d%", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_the_file_says_what_evaluation_found(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(EvaluateConfig(str(runs / "finetune")))
    described = load_classifier(runs / "finetune")[1]["metrics"]
    assert found["top1"] == described["top1"] == metrics(runs / "finetune")[-1]["top1"]
    assert f"top-1 {found['top1']:.2%}" in capsys.readouterr().out
    expected = (found["top1"] * (1 - found["top1"]) / 10_000) ** 0.5
    assert found["standard_error"] == pytest.approx(expected)


@pytest.mark.slow
def test_dense_models_and_unfinished_runs_are_evaluated(tmp_path: Path) -> None:
    main(tiny("finetune", tmp_path / "dense", "--trainer.max_steps", "1", "--sparse.pattern", "dense"))
    assert 0 <= evaluate(EvaluateConfig(str(tmp_path / "dense")))["top1"] <= 1
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert evaluate(EvaluateConfig(str(checkpoint))) == evaluate(EvaluateConfig(str(tmp_path / "run")))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_packed_model_predicts_and_evaluates_like_its_source(
    runs: Path, tmp_path: Path, image_folder: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed.safetensors"
    main(["pack", str(runs / "finetune"), str(packed), "--dtype", dtype, "--data.source", "embedded"])
    assert "dense model on 10000 images: largest difference of a logit" in capsys.readouterr().out
    images = [str(image_folder / "val")]
    ours, theirs = (predict(PredictConfig(str(model), images, 10)) for model in (packed, runs / "finetune"))
    assert ours.keys() == theirs.keys()
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}[dtype]
    for file, ranking in ours.items():
        assert dict(ranking) == pytest.approx(dict(theirs[file]), abs=tolerance)
    one, other = (evaluate(EvaluateConfig(str(model)))["top1"] for model in (packed, runs / "finetune"))
    assert one == pytest.approx(other, abs={"fp32": 1e-3, "bf16": 0.02, "int8": 0.05}[dtype])


@pytest.mark.holds("packed.2")
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 4e-2)])
def test_a_packed_model_decides_like_its_source(
    runs: Path, tmp_path: Path, dtype: str, limit: float, figure: Callable[[str], None]
) -> None:
    """On real images; 32 features average less of bf16's rounding out than a ViT-Base does."""
    main(["pack", str(runs / "finetune"), str(tmp_path / "packed"), "--dtype", dtype])
    model, description = load_classifier(runs / "finetune")
    images = torch.cat(list(checked_images(SourceConfig(workers=0), description)))
    with torch.inference_mode():
        wanted = model(images).numpy()
    got = load(tmp_path / "packed")(images.numpy())
    assert np.abs(got - wanted).max() / wanted.std() <= limit
    error = np.abs(got - wanted)[::2].max()  # of one half of the images, held against the other half
    ranked = np.sort(wanted, axis=1)
    clear = ranked[1::2, -1] - ranked[1::2, -2] > 2 * error
    same = got[1::2].argmax(axis=1) == wanted[1::2].argmax(axis=1)
    figure(f"same class for {same.mean():.1%}, for {same[clear].mean():.1%} of the {clear.sum()} clear ones")
    assert clear.any()
    assert same[clear].all()


def test_predictions_of_files_and_folders(runs: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = predict(PredictConfig(str(runs / "finetune"), [str(image_folder / "val")], top_k=4))
    assert len(result) == 6
    printed = capsys.readouterr().out
    for file, classes in result.items():
        assert file in printed
        assert len(classes) == 4
        shares = [share for _, share in classes]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1 + 1e-6


@pytest.mark.parametrize("kind", ["run", "packed"])
def test_unreadable_images_are_named_and_left_out(
    runs: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = runs / "finetune"
    if kind == "packed":
        main(["pack", str(model), str(tmp_path / "m.safetensors")])
        model = tmp_path / "m.safetensors"
    folder = image_folder / "val"
    good = sorted(folder.glob("*/*.png"))
    broken = good[0].with_name("00.png")
    broken.write_bytes(good[0].read_bytes()[:40])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(model), str(folder)])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == [str(file) for file in good]
    named, last = printed.err.splitlines()[-2:]
    assert named.startswith(f"sparsemae predict: {broken}: ")
    assert last == "sparsemae predict: error: 1 of 7 images could not be read; the others are done"
    with pytest.raises(SystemExit):
        main(["predict", str(model), str(broken)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sparsemae predict: error: {broken}: ")


def test_exif_orientation_goes_with_the_model(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = Image.Exif()
    tag[0x0112] = 3  # upside down
    for file in (image_folder / "val").glob("*/*.png"):
        image = Image.open(file)
        image.transpose(Image.Transpose.ROTATE_180).save(file, exif=tag)
        image.save(file.with_suffix(".upright"), "png")
    main(tiny("finetune", tmp_path / "run", "--data.exif", "true"))
    described = load_classifier(tmp_path / "run")[1]
    assert described["input"]["exif"] is True
    for file in (image_folder / "val").glob("*/*.png"):
        turned, upright = (
            predict(PredictConfig(str(tmp_path / "run"), [str(f)], top_k=10))
            for f in (file, file.with_suffix(".upright"))
        )
        assert [*turned.values()] == [*upright.values()]
    asked = []
    monkeypatch.setattr(sparsemae.commands.evaluate, "ImageDataset", lambda *_, exif, **__: asked.append(exif))
    with pytest.raises(AttributeError):  # no data set
        evaluate(EvaluateConfig(str(tmp_path / "run")))
    assert asked == [True]
    description = read_weights(tmp_path / "run")[1]
    assert description["input"].pop("exif")  # a file written before the option
    save_model(tmp_path / "old.safetensors", load_classifier(tmp_path / "run")[0], description)
    assert load_classifier(tmp_path / "old.safetensors")[1]["input"]["exif"] is False


@pytest.mark.parametrize("mask", ["dynamic", "fixed"])
def test_a_fixed_mask_stays_and_a_dynamic_one_moves(runs: Path, tmp_path: Path, mask: str) -> None:
    main(tiny("finetune", tmp_path / "run", "--init", str(runs / "pretrain"), "--sparse.mask", mask))
    sad = json.loads((tmp_path / "run" / "topology.jsonl").read_text().splitlines()[-1])["total"]["sad"]
    assert (sad > 0) == (mask == "dynamic")


def test_dense_and_excluded_layers(tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "dense", "--sparse.pattern", "dense"))
    assert not list(iter_sparse(load_autoencoder(tmp_path / "dense")[0]))
    assert not (tmp_path / "dense" / "topology.jsonl").exists()
    main(tiny("pretrain", tmp_path / "part", "--sparse.exclude", "[blocks.0.*]"))
    model = load_autoencoder(tmp_path / "part")[0]
    assert {name.split(".")[2] for name, _ in iter_sparse(model)} == {"1"}


@pytest.mark.slow
@pytest.mark.holds("foundation.5")
def test_a_trained_model_is_the_same_in_a_fresh_process(runs: Path) -> None:
    script = """
import sys, torch
from sparsemae.sparsity import iter_sparse, freeze
from sparsemae.tasks.build import load_autoencoder, load_classifier
torch.manual_seed(0)
images, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 16)
mae, classifier = load_autoencoder(sys.argv[1])[0], load_classifier(sys.argv[2])[0]
masks = {name: layer.current_mask() for name, layer in [*iter_sparse(mae), *iter_sparse(classifier)]}
with torch.no_grad():
    torch.save([masks, mae(images, 0.5, noise).pred, classifier(images)], sys.argv[3])
"""
    outputs = []
    for name in ("one", "two"):
        words = [str(runs / "pretrain"), str(runs / "finetune"), str(runs / f"{name}.pt")]
        subprocess.run([sys.executable, "-c", script, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        outputs.append(torch.load(runs / f"{name}.pt", weights_only=True))
    (masks, *predictions), (other_masks, *other_predictions) = outputs
    assert len(masks) == 16
    assert all(torch.equal(masks[name], other_masks[name]) for name in masks)
    assert all(torch.equal(a, b) for a, b in zip(predictions, other_predictions, strict=True))


@pytest.mark.holds("foundation.5")
def test_a_frozen_file_that_breaks_nm_is_refused_naming_the_layer(runs: Path, tmp_path: Path) -> None:
    state, description = read_weights(runs / "finetune")
    layer = "blocks.1.mlp.fc1"
    state[f"{layer}.weight"][3, :5] = 1.0
    model, _ = load_classifier(runs / "finetune")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])
    save_model(tmp_path / "broken.safetensors", model, description)
    with pytest.raises(
        ValueError, match=f"broken.safetensors: {layer}: wanted pruned weights to be 0.* row 3, group 0"
    ):
        load_classifier(tmp_path / "broken.safetensors")


def test_our_files_start_any_timm_vit(runs: Path) -> None:
    import timm

    model = timm.create_model(
        "vit_base_patch16_224", img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    names = sparsify(model, "2:32")
    loaded = load_weights(model, runs / "pretrain")
    assert not loaded.missing
    assert all(key.startswith(("decoder", "mask_token")) for key in loaded.unexpected)
    assert len(names) == 8
