"""What a segmentation is told and refused, its scores, and that neither workers nor a resume change it."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Figure, SceneRun, metrics, on_scene, scene_folder, tiny_segment
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix

from sparsemae.cli import main
from sparsemae.commands.evaluate import evaluate
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.mask_transforms import mask_evaluation_transform
from sparsemae.data.masks import IGNORED
from sparsemae.data.pairs import open_masks
from sparsemae.data.sampling import BatchPlan
from sparsemae.options.commands import EvaluateConfig
from sparsemae.options.data import SourceConfig
from sparsemae.options.model import InferenceChange, InferenceConfig
from sparsemae.options.tasks import SegmentConfig
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.segmentation import Segmentation, scores
from sparsemae.tasks.sliding_window import predict_scores


@pytest.mark.slow
def test_the_workers_and_a_resume_change_nothing(scene_run: SceneRun, tmp_path: Path) -> None:
    main(on_scene(tmp_path / "two", scene_run.root, "--data.workers", "2", "--trainer.max_steps", "3"))
    main(on_scene(tmp_path / "two", scene_run.root, "--data.workers", "0"))
    one, two = (load_model(folder)[0].state_dict() for folder in (scene_run.folder, tmp_path / "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_pretrained_encoder_is_taken_over(
    scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = [
        "pretrain", "--config", "demo_pretrain", "--out", str(tmp_path / "mae"), "--trainer.max_steps", "1",
        "--data.train_images", "32", "--trainer.global_batch", "16", "--model.args",
        "{patch_size: 16, embed_dim: 32, depth: 4, num_heads: 2}", "--data.img_size", "32",
    ]  # fmt: skip
    main(pretrain)
    capsys.readouterr()
    main(on_scene(tmp_path / "run", scene_run.root, "--init", str(tmp_path / "mae"), "--trainer.max_steps", "1"))
    printed = capsys.readouterr().err
    assert "resampled: pos_embed" in printed
    assert "100.0% of the encoder's parameters" in printed
    assert "UperNet 32 wide:" in printed
    assert "multiply-adds per 64 px image" in printed
    assert metrics(tmp_path / "run")[0]["step"] == 1


@pytest.mark.slow
def test_what_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("--trainer.device_batch", "1"): "trainer.device_batch: wanted at least 2 images per device and forward, got 1",
        ("--inference", "{mode: slide, stride: 29}"): "inference.stride: wanted 1 to the window's 28 px, got 29",
        ("--inference.scales", "[]"): "inference.scales: wanted scales above 0, got []",
        ("--data.scale", "[2.0, 1.0]"): "data.scale: wanted two scales in ascending order, got [2.0, 1.0]",
        ("--out_indices", "[0, 1, 2, 4]"): "out_indices: wanted 4 ascending blocks up to the last, 3, got [0, 1, 2, 4]",
        ("--data.root", "x"): "data.root: wanted none for images with masks with data.source=embedded, got x",
        ("--data.source", "sceneparse"): "data.root: wanted a folder for data.source=sceneparse, got none",
        ("--data.source", "folder", "--data.root", str(tmp_path)): (
            "data.classes: wanted a file with one class a line for data.source=folder, got none"
        ),
        ("--data.classes", "x"): "data.classes: x: no such file or folder",
        ("--taps", "[0, 1, 2, 3]"): "--taps: wanted --out_indices, as it is called now",
        ("--data.crop_max_share=0.5",): "--data.crop_max_share: wanted --data.cat_max_ratio, as it is called now",
        ("--data.train_images", "0"): "data.train_images: wanted at least 1, got 0",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit) as exit_:
            main(tiny_segment(tmp_path / "run", *options))
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


@pytest.mark.holds("ade20k.1")
@pytest.mark.slow
def test_a_device_batch_of_one_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scene_folder(tmp_path / "ade", train=4, val=1, longest=160)
    for recipe in ("segment_t", "segment_s"):
        words = ["--config", recipe, "--data.root", str(root), "--trainer.global_batch", "4", "--init", "null"]
        words += ["--trainer.device_batch", "1", "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as exit_:
            main(["segment", *words])
        assert exit_.value.code == 2
        assert (
            "the head pools to 1 x 1, where batch normalization has nothing to normalize over"
            in capsys.readouterr().err
        )
        assert not (tmp_path / "run").exists()


def test_batch_norm_is_shared_between_gpus_only() -> None:
    def kinds(device: str, world: int) -> set[type]:
        model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
        fabric: Any = SimpleNamespace(device=torch.device(device), world_size=world)
        Segmentation(SegmentConfig()).prepare(model, fabric, BatchPlan.make(4, 4, None, 1))
        return {type(module) for module in model[1:]}

    assert kinds("cuda", 2) == {nn.SyncBatchNorm}
    assert kinds("cuda", 1) == kinds("cpu", 2) == {nn.BatchNorm2d}


def ten_lines(predicted: np.ndarray, truth: np.ndarray, classes: int) -> tuple[float, float, float]:
    """mIoU, mean accuracy, pixel accuracy."""
    ious, recalls = [], []
    for c in range(classes):
        p, t = (predicted == c) & (truth != IGNORED), truth == c
        if t.any():
            ious.append((p & t).sum() / (p | t).sum())
            recalls.append((p & t).sum() / t.sum())
    labeled = truth != IGNORED
    return float(np.mean(ious)), float(np.mean(recalls)), float((predicted == truth)[labeled].mean())


@pytest.mark.holds("ade20k.3")
@pytest.mark.parametrize("case", ["random", "absent class", "one pixel", "predicted only", "batches of sizes"])
def test_the_scores_are_those_of_ten_lines(case: str) -> None:
    generator, classes = np.random.default_rng(0), 6
    sizes = [(5, 7), (9, 4), (3, 3)] if case == "batches of sizes" else [(17, 23)]
    pairs = []
    for size in sizes:
        predicted, truth = generator.integers(0, classes, (2, *size))
        truth[generator.random(size) < 0.2] = IGNORED
        if case in ("absent class", "predicted only"):
            truth[truth == 3] = 2
            if case == "absent class":
                predicted[predicted == 3] = 1
        if case == "one pixel":
            truth[:] = IGNORED
            truth[4, 5] = predicted[4, 5] = 3
        pairs.append((predicted, truth))
    meter = MulticlassConfusionMatrix(classes, ignore_index=IGNORED)
    for predicted, truth in pairs:
        meter.update(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
    means, ious = scores(meter.compute())
    everywhere, masks = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    wanted = ten_lines(everywhere, masks, classes)
    assert (means["miou"], means["mean_accuracy"], means["pixel_accuracy"]) == pytest.approx(wanted, rel=1e-12)
    assert math.isnan(ious[3]) == (case in ("absent class", "predicted only"))
    assert len(ious) == classes


@pytest.mark.holds("ade20k.3")
def test_an_evaluation_of_a_whole_set_is_that_of_ten_lines(scene_run: SceneRun) -> None:
    data = SourceConfig("sceneparse", str(scene_run.root), workers=0)
    found = evaluate(EvaluateConfig(str(scene_run.folder), data, inference=InferenceChange("whole")))
    model, card = load_model(scene_run.folder)
    predicted, truth = [], []
    dataset = ImageDataset(open_masks(data, "val"), mask_evaluation_transform)
    with torch.no_grad():
        for index in range(len(dataset)):
            sample: Any = dataset[index]
            pixels = predict_scores(
                lambda x: model(x).logits, sample["image"][None], card.input, InferenceConfig("whole")
            )
            predicted.append(pixels[0].argmax(0).numpy().ravel())
            truth.append(sample["target"].numpy().ravel())
    wanted = ten_lines(np.concatenate(predicted), np.concatenate(truth), 150)
    means = found["miou"], found["mean_accuracy"], found["pixel_accuracy"]
    assert means == pytest.approx(wanted, rel=1e-3)  # freezing sums in another order


@pytest.mark.holds("ade20k.3")
def test_a_set_of_ignored_pixels_only_has_no_score(
    scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert math.isnan(scores(torch.zeros(3, 3))[0]["miou"])
    root = scene_folder(tmp_path / "ade", train=1, val=2, longest=100)
    for file in (root / "annotations" / "validation").iterdir():
        with Image.open(file) as mask:
            size = mask.size
        Image.new("L", size).save(file)
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(scene_run.folder), "--data.source", "sceneparse", "--data.root", str(root)])
    assert exit_.value.code == 2
    assert "wanted labeled pixels to evaluate on, got ignored ones only" in capsys.readouterr().err


def test_a_binary_mask_of_0_and_255_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    for kind, pixels in (("images", np.arange(1024)), ("masks", np.arange(1024) % 2 * 255)):
        (tmp_path / kind).mkdir()
        for i in range(6):
            Image.fromarray(pixels.reshape(32, 32).astype(np.uint8)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.txt").write_text("ground\ncrack\n")
    options = ["--data.source", "folder", "--data.root", str(tmp_path), "--data.classes", str(tmp_path / "classes.txt")]
    line = refused(*tiny_segment(tmp_path / "run", *options, "--data.train_images", "null"))
    assert "got 0 and 255 alone in all 5, where 255 is ignored and one class is left: divide them by 255" in line


@pytest.fixture
def corrupt(tmp_path: Path) -> Path:
    """Eight photographs with masks for training, of which one image is cut short and the mask of another is no mask."""
    root = scene_folder(tmp_path / "ade", train=8, val=2, longest=100)
    for file in (root / "images" / "validation").iterdir():  # else photographs of both splits are the same
        with Image.open(file) as opened:
            image = opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(file)
    image_file = root / "images" / "training" / "ADE_training_00000001.jpg"
    image_file.write_bytes(image_file.read_bytes()[:300])
    (root / "annotations" / "training" / "ADE_training_00000006.png").write_text("no mask")
    return root


SAID = ("images/training/ADE_training_00000001.jpg: unreadable image", "ADE_training_00000006.png: unreadable mask")


def on_two_processes(*words: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*launch, "-m", "sparsemae.cli", *words, "--trainer.devices", "2"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.holds_only
@pytest.mark.slow
@pytest.mark.holds("house.6")
def test_what_cannot_be_read_is_replaced_and_counted_on_one_and_two_processes(
    corrupt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    options = ["--trainer.device_batch", "2", "--data.max_unreadable", "0.25"]
    main(on_scene(tmp_path / "one", corrupt, *options))
    printed = capsys.readouterr().err
    assert [printed.count(text) for text in SAID] == [1, 1]
    assert "the next readable image takes its place (2 of 8 images so far)" in printed
    done = on_two_processes(*on_scene(tmp_path / "two", corrupt, *options))
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(text) for text in SAID] == [1, 1]
    one, two = ([row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-6)
    figure(
        f"an image and a mask, each replaced and named once, on 1 and 2 processes: losses {one[0]:.4f} to {one[-1]:.4f}"
    )

    refused = on_two_processes(*on_scene(tmp_path / "no", corrupt, *options, "--data.max_unreadable", "0.2"))
    errors = {line for line in refused.stderr.splitlines() if "error:" in line}
    assert len(errors) == 1  # both say so, or the launcher ends the second one first
    assert "(2 of 8 images cannot be read, more than data.max_unreadable=0.2: sparsemae check" in errors.pop()
    assert not (tmp_path / "no" / "model.safetensors").exists()


@pytest.mark.holds("house.6")
def test_a_run_stops_at_the_first_unreadable_image_where_none_is_tolerated(
    corrupt: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(*on_scene(tmp_path / "run", corrupt, "--data.max_unreadable", "0"))
    assert any(text in line for text in SAID)


@pytest.mark.holds("house.6")
@pytest.mark.slow
def test_training_and_evaluation_leave_out_what_check_has_written(
    corrupt: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], figure: Figure
) -> None:
    damaged = corrupt / "images" / "validation" / "ADE_validation_00000000.jpg"
    damaged.write_bytes(b"")
    out = str(tmp_path / "exclude.txt")
    where = ["--data.root", str(corrupt), "--data.source", "sceneparse", "--data.workers", "0"]
    line = refused("check", *where, "--write-exclude", out)  # the layout says that it is for segmentation
    assert line.endswith(f"leave files out with --data.exclude {out}")
    listed = Path(out).read_text().splitlines()
    assert listed[-1] == "images/validation/ADE_validation_00000000.jpg"
    assert {"images/training/ADE_training_00000001.jpg", "images/training/ADE_training_00000006.jpg"} < {*listed}
    assert len(listed) == 3 + 2  # photographs 0 and 5, and 2 and 7, are the same
    words = on_scene(tmp_path / "run", corrupt, "--data.max_unreadable", "0")
    main([*words, "--data.exclude", out, "--trainer.global_batch", "2"])
    assert "4 images: 2 steps of 2 in an epoch" in capsys.readouterr().err
    main(["evaluate", str(tmp_path / "run"), *where, "--data.exclude", out])
    assert "on 1 images" in capsys.readouterr().out
    assert "ADE_validation_00000000.jpg: unreadable image" in refused("evaluate", str(tmp_path / "run"), *where)
    figure(f"check --write-exclude lists {len(listed)}, segment and evaluate take the list")


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(scene_run: SceneRun, tmp_path: Path) -> None:
    every = ["--trainer.evaluate_every_epochs", "1", "--trainer.save_every_steps", "1", "--trainer.epochs", "5"]
    main(on_scene(tmp_path / "run", scene_run.root, *every, "--trainer.keep_checkpoints", "1", "--optim.lr", "0.1"))
    scores = {row["step"]: row["miou"] for row in metrics(tmp_path / "run") if "miou" in row}
    assert len(scores) == 5
    best = max(scores, key=lambda step: scores[step])
    kept = {int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {best, max(scores)}
