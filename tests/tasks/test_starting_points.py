"""From the command line: the network of the weights to start from, and a model that cannot be packed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import tiny

from sparsemae.card import ModelCard
from sparsemae.cli import main
from sparsemae.config import read_config
from sparsemae.data.sources import find_source
from sparsemae.models import hub
from sparsemae.models.weights import find_weights, read_metadata, read_weights
from sparsemae.options import FinetuneConfig
from sparsemae.tasks.derived import settle

pytestmark = pytest.mark.holds("right.1")
SHORT = (
    "--data.source", "embedded", "--data.train_images", "32", "--data.img_size", "28", "--trainer.global_batch", "16",
    "--trainer.epochs", "1", "--optim.warmup_epochs", "0", "--trainer.precision", "fp32", "--sparse.pattern", "2:8",
)  # fmt: skip
SMALL = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}


def card_of(out: Path) -> ModelCard:
    return ModelCard.from_dict(read_metadata(find_weights(out)))


@pytest.mark.slow
def test_item_12_without_a_model_named_it_is_that_of_the_source(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=28, **SMALL, init_values=0.1, num_classes=0)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    words = ["finetune", *SHORT, "--init", str(tmp_path / "weights.pth"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(words)
    assert "weights of an unusual embedding dimension do not say their number of heads" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()

    main([*words, "--model.args", "{num_heads: 2}"])
    wanted = {**SMALL, "init_values": 1e-5}
    assert card_of(tmp_path / "run").model_args == wanted
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["model"]["name"] == "vit_base_patch16_224"
    assert resolved["model"]["args"] == wanted

    again = ["finetune", *SHORT, "--init", str(tmp_path / "run"), "--out", str(tmp_path / "second")]
    main(again)
    assert card_of(tmp_path / "second").model_args == wanted


@pytest.mark.slow
def test_item_15_parallel_blocks_are_said_to_be_trained_not_packed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    main(tiny("finetune", out, "--model.name", "vit_small_patch16_18x2_224", "--data.train_images", "16"))
    said = (out / "log.txt").read_text() if (out / "log.txt").exists() else "".join(capfd.readouterr())
    warning = "warning: this model can be trained, not packed: pack: blocks.0: wanted Block, got ParallelThingsBlock"
    assert said.count(warning) == 1
    with pytest.raises(SystemExit):
        main(["pack", str(out), str(tmp_path / "model.packed")])
    assert "pack: blocks.0: wanted Block, got ParallelThingsBlock" in capfd.readouterr().err


@pytest.mark.slow
def test_weights_on_the_hub_can_be_trained_from(tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(runs / "pretrain" / "model.safetensors")
    monkeypatch.setattr(hub, "_ask_once", lambda *_: None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: file)
    for out, init in (("hub", "hf-hub:lab/model"), ("file", file)):
        main(tiny("finetune", tmp_path / out, "--init", init, "--trainer.max_steps", "1"))
    fetched, local = (read_weights(tmp_path / out)[0] for out in ("hub", "file"))
    assert all(torch.equal(fetched[key], local[key]) for key in local)


@pytest.mark.parametrize(("way", "taken"), [("bilinear", True), ("lanczos", False)])
def test_how_the_images_of_foreign_weights_were_prepared_is_taken_over_or_said(
    tmp_path: Path, image_folder: Path, way: str, taken: bool
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).state_dict(), file)
    prepared = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": way}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": prepared}))
    for words, own in ([], False), (["--data.mean", "[0.1, 0.1, 0.1]"], True):
        config = read_config(FinetuneConfig, [str(image_folder), "--init", str(file), *words])
        task: Any = SimpleNamespace(sources={"train": find_source(config.data).open("train")})
        config, notes = settle(config, task)
        assert config.data.mean == ((0.1,) * 3 if own else (0.5,) * 3)
        assert config.data.std == (0.25,) * 3
        assert config.data.interpolation == ("bilinear" if taken else "bicubic")
        mean, resampled = "--data.mean '[0.5, 0.5, 0.5]'", f"--data.interpolation {way}"
        as_, *warned = (note for note in notes if "was trained: " in note)
        assert (mean in as_, resampled in as_) == (not own, taken)
        assert (mean in "".join(warned), resampled in "".join(warned)) == (own, not taken)
        assert all(note.startswith(f"warning: other than {file} was trained: ") for note in warned)
