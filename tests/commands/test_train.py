"""Trainings through the command line, made tiny: what they start from, and what their files say."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import Figure, tiny
from safetensors.torch import load_file

from sparsemae.card import InputSpec, ModelCard
from sparsemae.cli import main
from sparsemae.models import MaskedAutoencoder
from sparsemae.models.weights import card_of, read_metadata, read_weights, save_model
from sparsemae.sparsity import NMPattern, iter_sparse, nm_mask
from sparsemae.tasks.loading import load_model


@pytest.mark.slow
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
    runs: Path, tmp_path: Path, start: str, capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    """The rate is 0, so what comes out is the start; the head and its norm are new."""
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder, file = timm.create_model("vit_base_patch16_224", num_classes=7, **arguments), tmp_path / "start.pth"
    if start == "our run":
        source, wanted = runs / "pretrain", read_weights(runs / "pretrain")[0]
    elif start == "an MAE file":  # full, under MAE's names
        encoder.reset_classifier(0)
        card = ModelCard("pretrain", "vit_base_patch16_224", {}, InputSpec(28, (0.5,) * 3, (0.5,) * 3))
        save_model(tmp_path / "mae.safetensors", MaskedAutoencoder(encoder, 16, 1, 2), card)
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


@pytest.mark.parametrize("mask", ["dynamic", "fixed"])
@pytest.mark.slow
def test_a_fixed_mask_stays_and_a_dynamic_one_moves(runs: Path, tmp_path: Path, mask: str) -> None:
    main(tiny("finetune", tmp_path / "run", "--init", str(runs / "pretrain"), "--sparse.mask", mask))
    sad = json.loads((tmp_path / "run" / "topology.jsonl").read_text().splitlines()[-1])["total"]["sad"]
    assert (sad > 0) == (mask == "dynamic")


def test_dense_and_excluded_layers(tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "dense", "--sparse.pattern", "dense"))
    assert not list(iter_sparse(load_model(tmp_path / "dense")[0]))
    assert not (tmp_path / "dense" / "topology.jsonl").exists()
    main(tiny("pretrain", tmp_path / "part", "--sparse.exclude", "[blocks.0.*]"))
    model = load_model(tmp_path / "part")[0]
    assert {name.split(".")[2] for name, _ in iter_sparse(model)} == {"1"}


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pretrain", "finetune", "segment"])
@pytest.mark.holds_only
def test_a_file_says_whether_it_holds_the_average(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deeper = ["--model.args", "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 2}"] if job == "segment" else []
    main(tiny(job, tmp_path / "run", "--trainer.ema_decay", "0.5", "--trainer.max_steps", "2", *deeper))
    assert "the weights written are the moving average of trainer.ema_decay 0.5" in capsys.readouterr().err
    files = [tmp_path / "run/model.safetensors"]
    files += [tmp_path / f"run/checkpoints/step-00000002/{name}.safetensors" for name in ("ema", "model")]
    assert [card_of(read_metadata(file), file).ema_decay for file in files] == [0.5, 0.5, None]
    written, average, raw = (read_weights(file)[0] for file in files)
    name = "blocks.0.norm1.bias"
    assert torch.equal(written[name], average[name])
    assert not torch.equal(written[name], raw[name])
