"""A user's mistakes: one line that says what was wanted and what was got, exit status 2, nothing left behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from PIL import Image

from sparsemae.cli import main
from sparsemae.config import read_config
from sparsemae.options import PlanConfig, PredictConfig


def on(folder: Path, job: str, out: Path, *options: str) -> list[str]:
    words = tiny(job, out, "--data.source", "folder", "--data.root", str(folder), *options)
    at = words.index("--data.train_images")
    return words[:at] + words[at + 2 :]


@pytest.mark.holds("foundation.7")
@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_data(refused: Callable[..., str], tmp_path: Path, image_folder: Path, job: str) -> None:
    out = tmp_path / "run"
    line = refused(*on(tmp_path / "nowhere", job, out))
    assert f"data.root: {tmp_path}/nowhere: no such file or folder" in line
    (tmp_path / "empty").mkdir()
    assert "empty: wanted images in it" in refused(*on(tmp_path / "empty", job, out))
    assert not out.exists()
    small = image_folder / "train" / "cat" / "0.png"
    Image.new("RGB", (40, 3)).save(small)
    assert "0.png: wanted at least one patch of 7 px, got 40 x 3 px" in refused(*on(image_folder, job, out))
    small.write_bytes(b"not an image")
    assert "0.png: unreadable image: not an image in a known format" in refused(*on(image_folder, job, out))
    assert not (out / "model.safetensors").exists()


@pytest.mark.holds("foundation.7")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.lrr", "1"], "unrecognized arguments: --optim.lrr"),
        (["--optim.lrr"], "unrecognized arguments: --optim.lrr (did you mean --optim.lr?)"),
        (["--lr"], "--optim.lr: wanted a value, got none"),
        (["--optim.lr", "fast"], "optim.lr: wanted a number, got fast"),
        (["--optim.clip_grad", "x"], "optim.clip_grad: wanted a number or null, got x"),
        (["--trainer.keep", "first"], "trainer.keep: wanted last, best, got first"),
        (["--trainer.compile", "maybe"], "trainer.compile: wanted true or false or auto, got maybe"),
        (["--trainer", "3"], "trainer: wanted options by name, got 3"),
        (["--model", "{nam: 3}"], "model: wanted options it has, got nam"),
        (["--config", "no_such"], "wanted a YAML file or a recipe (demo_finetune, demo_pretrain, demo_segment,"),
        (["--sparse.pattern", "2:48"], "attn.qkv: pattern 2:48 wants in_features divisible by 48, got in_features=32"),
        (["--sparse.pattern", "33:32"], "wanted 1 <= n <= m (n kept of every m), got n=33, m=32"),
        (["--sparse.pattern", "half"], 'wanted "n:m"'),
        (["--data.img_size", "6"], "data.img_size: wanted at least one patch of 7 px, got 6 px"),
        (["--trainer.precision", "fp16"], "wanted auto, bf16, fp32, tf32, fp64, got fp16 (fp16's loss scale"),
        (["--model.name", "resnet18"], "model.name: wanted a timm VisionTransformer, got resnet18"),
        (["--model.name", "vit_huge_patch1"], "model.name: wanted a timm model, got 'vit_huge_patch1'"),
        (["--model.args", "{embed_dimm: 3, patch_size: 7}"], "model.args: vit_base_patch16_224 does not take"),
        (["--trainer.global_batch", "64"], "global_batch: wanted at most the 32 training images, got 64"),
        (["--trainer.device_batch", "3"], "1 x 3 does not divide it"),
        (["--mask_ratio", "1.0"], "mask_ratio: wanted a fraction that keeps and masks at least one of 16 patches, got"),
        (["--data.img_size", "30"], "data.img_size: wanted a multiple of the patch, 7 px, got 30 px"),
        (["--data.root", "images"], "data.root: wanted none for images with classes with data.source=embedded"),
        (["--trainer.max_steps", "0"], "trainer.max_steps: wanted at least 1, got 0"),
        (["--trainer.log_every_steps", "0"], "trainer.log_every_steps: wanted at least 1, got 0"),
        (["--trainer.epochs", "0"], "trainer.epochs: wanted more than 0, got 0"),
        (["--trainer.save_every_minutes", "0"], "trainer.save_every_minutes: wanted more than 0, got 0"),
        (["--trainer.loader_retries", "-1"], "trainer.loader_retries: wanted at least 0, got -1"),
        (["--trainer.ema_decay", "1"], "trainer.ema_decay: wanted at least 0 and below 1, got 1"),
        (["--trainer.epochs", "1"], "optim.warmup_epochs: wanted fewer than the schedule's 2 steps, got 2 steps"),
        (["--trainer.steps", "4", "--optim.warmup_steps", "4"], "wanted fewer than the schedule's 4 steps, got 4"),
        (["--trainer.accelerator", "mps"], "trainer.accelerator: mps cannot be had here"),
        (["--seed", "-1"], "seed: wanted at least 0, got -1"),
        (["--trainer.scale_lr", "true"], "trainer.scale_lr: wanted optim.lr_batch"),
        (["--init", "/no/such/file"], "init: /no/such/file: no such file or folder"),
    ],
)  # fmt: skip
def test_options(refused: Callable[..., str], tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused(*tiny("pretrain", tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.lr", "-1"], "optim.lr: wanted at least 0, got -1"),
        (["--optim.layer_decay", "0"], "optim.layer_decay: wanted more than 0 and at most 1, got 0"),
        (["--optim.betas", "[0.9, 1.0]"], "optim.betas: wanted at least 0 and below 1, got [0.9, 1.0]"),
        (["--optim.weight_decay", ".nan"], "optim.weight_decay: wanted at least 0, got nan"),
        (["--model.drop_path", "1.5"], "model.drop_path: wanted at least 0 and below 1, got 1.5"),
        (["--mixup", "-1"], "mixup: wanted at least 0, got -1"),
        (["--erasing", "2"], "erasing: wanted at least 0 and at most 1, got 2"),
        (["--label_smoothing", "1"], "label_smoothing: wanted at least 0 and below 1, got 1"),
        (["--data.crop_pct", "0"], "data.crop_pct: wanted more than 0 and at most 1, got 0"),
        (["--data.hflip", "3"], "data.hflip: wanted at least 0 and at most 1, got 3"),
        (["--data.crop_scale", "[2, 3]"], "data.crop_scale: wanted more than 0 and at most 1, got [2.0, 3.0]"),
        (["--data.std", "[0, 0, 0]"], "data.std: wanted more than 0, got [0.0, 0.0, 0.0]"),
        (["--sparse.strength", "-1"], "sparse.strength: wanted at least 0, got -1"),
        (["--sparse.dense_epochs", "-1"], "sparse.dense_epochs: wanted at least 0, got -1"),
        (["--sparse.gradual_epochs", "1"], "sparse.gradual_epochs: wanted sparse.schedule=gradual with it"),
        (["--sparse.freeze_epoch", "4"], "sparse.freeze_epoch: wanted at most the training's 3 epochs, got 4"),
        (["--sparse.mask", "fixed", "--sparse.schedule", "gradual"], "sparse.mask: wanted dynamic with"),
        (
            ["--sparse.dense_epochs", "2", "--sparse.freeze_epoch", "1"],
            "sparse.freeze_epoch: wanted at least sparse.dense_epochs=2, when there is a mask, got 1",
        ),
        (
            ["--sparse.schedule", "gradual", "--sparse.init_weights", "sparse"],
            "sparse.schedule: wanted constant with sparse.init_weights=sparse",
        ),
        (
            ["--sparse.schedule", "gradual", "--sparse.dense_epochs", "1.5"],
            "sparse.dense_epochs: wanted fewer than the 1.5 epochs in which a gradual schedule, ",
        ),
        (
            ["--data.crop", "shift", "--data.auto_augment", "rand-m9"],
            "data.auto_augment: wanted null with data.crop shift, got 'rand-m9'",
        ),
        (
            ["--sparse.schedule", "gradual", "--sparse.gradual_epochs", "9"],
            "sparse.gradual_epochs: wanted at most the training's 3 epochs, got 9",
        ),
        (
            ["--sparse.dense_epochs", "2", "--sparse.decay_epochs", "2"],
            "sparse.decay_epochs: wanted at most the training's 3 epochs, got 2 after 2 dense ones",
        ),
        (["--sparse.allocation", "magnitude"], "sparse.allocation_epoch: wanted more than 0 without weights to start"),
        (["--sparse.allocation_epoch", "1"], "sparse.allocation_epoch: wanted sparse.allocation=magnitude with it"),
        (["--sparse.allocation", "magnitude", "--sparse.pattern", "dense"], "sparse.allocation: wanted uniform with"),
        (["--sparse.allocation", "magnitude", "--sparse.mask", "fixed"], "sparse.mask: wanted dynamic with"),
        (
            ["--sparse.allocation", "magnitude", "--sparse.allocation_epoch", "1", "--sparse.pattern", "3:32"],
            "sparse.allocation: wanted a pattern whose n can be halved, got 3:32",
        ),
        (
            ["--optim.freeze_variance_epoch", "3"],
            "optim.freeze_variance_epoch: wanted less than the training's 3 epochs, got 3",
        ),
    ],
)
def test_settings_out_of_their_limits(
    refused: Callable[..., str], tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refused(*tiny("finetune", tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


@pytest.mark.holds("foundation.7")
def test_checkpoint_of_another_architecture(refused: Callable[..., str], tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "run", "--trainer.max_steps", "1"))
    words = tiny("finetune", tmp_path / "tuned", "--init", str(tmp_path / "run"))
    words[words.index("--model.args") + 1] = "{patch_size: 7, embed_dim: 64, depth: 2, num_heads: 2}"
    line = refused(*words)
    assert "checkpoint of another architecture" in line
    assert "wanted at least 90% of the encoder's parameters, matched 0.0%" in line
    assert "cls_token is [1, 1, 32] for [1, 1, 64]" in line
    assert "wanted a finetuned model, got a pretrained one (--probe knn" in refused("evaluate", str(tmp_path / "run"))
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pth")
    assert "wanted a sparsemae weights file of version 1 to 3, got one without our card" in refused(
        "evaluate", str(tmp_path / "foreign.pth")
    )


@pytest.mark.holds("foundation.7")
@pytest.mark.slow
def test_wrong_number_of_classes(refused: Callable[..., str], tmp_path: Path, image_folder: Path) -> None:
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    line = refused("evaluate", str(tmp_path / "run"), "--data.source", "folder", "--data.root", str(image_folder))
    assert "wanted the classes of the model (T-shirt/top, Trouser, Pullover, ...), got" in line
    assert "cat" in line
    for name in ("train", "val"):
        (image_folder / name / "dog" / "0.png").unlink()
    single = image_folder / "train"
    for file in (single / "dog").iterdir():
        file.unlink()
    assert "wanted at least two class folders, got ['cat']" in refused(*on(single, "finetune", tmp_path / "one"))


def test_mixup_wants_even_batches(refused: Callable[..., str], tmp_path: Path) -> None:
    words = tiny("finetune", tmp_path / "run", "--mixup", "0.8", "--trainer.device_batch", "1")
    assert "device_batch: mixup and cutmix want an even batch, got 1" in refused(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_predict(refused: Callable[..., str], tmp_path: Path, image_folder: Path) -> None:
    assert "nowhere: no such file or folder" in refused("predict", str(tmp_path / "nowhere"), str(image_folder))
    assert "images" in refused("predict", str(tmp_path))
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    assert "images: x.jpg: no such file or folder" in refused("predict", str(tmp_path / "run"), "x.jpg")
    assert "top_k: wanted at least 1" in refused("predict", str(tmp_path / "run"), str(image_folder), "--top_k", "0")


@pytest.mark.slow
def test_pack(refused: Callable[..., str], tmp_path: Path) -> None:
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "1"))
    model = tmp_path / "run" / "model.safetensors"
    before = model.read_bytes()
    assert "wanted another file than the model's own" in refused("pack", str(tmp_path / "run"), str(model))
    assert model.read_bytes() == before
    assert "nowhere" in refused("pack", str(tmp_path / "run"), str(tmp_path / "nowhere" / "x.safetensors"))
    main(tiny("finetune", tmp_path / "dense", "--trainer.max_steps", "1", "--sparse.pattern", "dense"))
    assert "wanted a model with N:M sparse layers, got none" in refused(
        "pack", str(tmp_path / "dense"), str(tmp_path / "x")
    )


def test_commands(refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "wanted a command (demo, pretrain" in refused("train")
    (tmp_path / "thesis.txt").write_text("mine")
    assert "got one with other files" in refused("demo", "--out", str(tmp_path))
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / "config.yaml").write_text("mine")
    assert "got one with other files" in refused(*tiny("pretrain", tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "mine"
    with pytest.raises(ValueError, match="nowhere"):
        main(["evaluate", "nowhere", "--debug"])
    main(["--version"])
    assert capsys.readouterr().out.startswith("0.")


def test_a_loss_that_is_not_finite_stops_the_run(refused: Callable[..., str], tmp_path: Path) -> None:
    words = tiny("pretrain", tmp_path / "run", "--optim.lr", "1e30", "--optim.warmup_epochs", "0")
    line = refused(*words, "--trainer.max_bad_steps", "2")
    assert "loss is nan at step" in line
    assert "bad step 2 in a row: try a lower --optim.lr" in line


def test_gray_and_transparent_images_are_read(tmp_path: Path, image_folder: Path) -> None:
    pixels = np.zeros((40, 40), np.uint8)
    Image.fromarray(pixels).save(image_folder / "train" / "cat" / "0.png")
    Image.fromarray(pixels).convert("RGBA").save(image_folder / "train" / "cat" / "1.png")
    Image.fromarray(pixels).convert("P").save(image_folder / "train" / "cat" / "2.png")
    main(on(image_folder, "pretrain", tmp_path / "run"))


def test_a_switch_needs_no_value() -> None:
    words = ["model", "images"]
    for told, null in (
        (["--null"], True),
        (["--null", "true"], True),
        (["--null", "False"], False),
        (["--null=true"], True),
    ):
        assert read_config(PredictConfig, [*words, *told]).null is null
    assert read_config(PredictConfig, ["model", "--null", "-"]).images == ["-"]
    assert read_config(PlanConfig, ["demo_pretrain", "--measure"]).measure
    with pytest.raises(ValueError, match="--top_k: wanted a value, got none"):
        read_config(PredictConfig, [*words, "--null", "--top_k"])
