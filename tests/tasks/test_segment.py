"""Segmentation through the command line, made tiny, on photographs; its scores and its windows."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import metrics, scene_folder
from PIL import Image
from torch import nn

from sparsemae.cli import main
from sparsemae.data.masks import IGNORED
from sparsemae.data.segmentation import MaskDataConfig, MaskDataset, open_masks
from sparsemae.sparsity import hold_masks, iter_sparse
from sparsemae.tasks.build import load_segmenter
from sparsemae.commands.evaluate import EvaluateConfig, evaluate
from sparsemae.commands.predict import PredictConfig, predict
from sparsemae.commands.overlays import overlay_image
from sparsemae.tasks.segment import share_batch_norm
from sparsemae.tasks.sliding_window import (
    InferenceChange,
    InferenceConfig,
    Scores,
    predict_scores,
    slide,
    window_starts,
)


def tiny_segment(out: Path, *options: str) -> list[str]:
    """Words of a segmentation of a few embedded images: 2 steps an epoch."""
    return [
        "segment", "--config", "demo_segment", "--out", str(out), "--data.train_images", "32",
        "--trainer.global_batch", "16", "--trainer.epochs", "2", "--optim.warmup_epochs", "1",
        "--trainer.log_every_steps", "1", "--trainer.evaluate_every_epochs", "100", "--trainer.precision", "fp32",
        "--model.args", "{patch_size: 7, embed_dim: 32, depth: 4, num_heads: 2}", *options,
    ]  # fmt: skip


def on_scene(out: Path, root: Path, *options: str) -> list[str]:
    return tiny_segment(
        out, "--data.source", "sceneparse", "--data.root", str(root), "--data.img_size", "64", "--data.short_side",
        "64", "--data.long_side", "256", "--data.train_images", "null", "--data.workers", "1", "--data.photometric",
        "true", "--data.scale", "[0.5, 2.0]", "--data.crop_max_share", "0.75", "--trainer.global_batch", "4",
        "--model.args", "{patch_size: 16, embed_dim: 32, depth: 4, num_heads: 2}", "--inference",
        "{mode: slide, stride: 43}", *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny run on photographs, and its data."""
    folder = tmp_path_factory.mktemp("segment")
    root = scene_folder(folder / "ade", train=8, val=3, longest=160)
    main(on_scene(folder / "run", root))
    return SimpleNamespace(root=root, folder=folder / "run")


def test_the_chain_on_photographs(run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, description = load_segmenter(run.folder)
    assert description["frozen"]
    assert len(list(iter_sparse(model))) == 16
    where = ["--masks.source", "sceneparse", "--masks.root", str(run.root), "--masks.workers", "0"]
    main(["evaluate", str(run.folder), *where])
    printed = capsys.readouterr().out
    assert f"mIoU {description['metrics']['miou']:.2%}" in printed
    assert "3 images (mode slide, stride 43, scales [1.0], flip False)" in printed
    assert sum(line.split()[-1] == "absent" or line.endswith("%") for line in printed.splitlines()) == 150
    main(["evaluate", str(run.folder), *where, "--inference", "{mode: whole, scales: [0.75, 1.25], flip: true}"])
    assert "mode whole, scales [0.75, 1.25], flip True" in capsys.readouterr().out
    main(["evaluate", str(run.folder), *where, "--inference.flip", "true"])  # the rest as the recipe says
    assert "mode slide, stride 43, scales [1.0], flip True" in capsys.readouterr().out
    assert {"miou", "mean_accuracy", "pixel_accuracy"} <= metrics(run.folder)[-1].keys()


def test_a_dataset_of_other_classes_is_refused(run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", str(run.folder)])
    printed = capsys.readouterr().err
    assert "embedded: wanted the 150 classes" in printed
    assert "(--masks.source and --masks.root name others)" in printed
    with pytest.raises(SystemExit):
        main(["evaluate", str(run.folder), "--data.source", "folder", "--data.root", str(run.root)])
    assert "data.root: wanted none for a segmenter" in capsys.readouterr().err


def test_an_evaluation_shows_how_far_it_is(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparsemae.training.logs.PLAIN_LINE_SECONDS", 0.0)
    main(["evaluate", str(run.folder), "--masks.source", "sceneparse", "--masks.root", str(run.root)])
    assert "evaluating: image 3/3" in capsys.readouterr().err


def test_predictions_are_palette_masks_and_overlays(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = sorted((run.root / "images" / "validation").iterdir())
    result = predict(PredictConfig(str(run.folder), [str(photographs[0].parent)], 2, str(tmp_path / "out")))
    assert list(result) == [str(file) for file in photographs]
    model, description = load_segmenter(run.folder)
    for file in photographs:
        with Image.open(file) as image, Image.open(tmp_path / "out" / f"{file.stem}.png") as mask:
            assert (mask.mode, mask.size) == ("P", image.size)
            values = np.asarray(mask)
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
            colour = mask.convert("RGB").getpixel((0, 0))
        with torch.no_grad(), hold_masks(model):
            scores = predict_scores(lambda x: model(x).logits, pixels, description["input"], InferenceConfig(stride=43))
        assert np.array_equal(values, scores[0].argmax(0).numpy() + 1)  # the data set's own values
        assert list(colour) == description["palette"][values[0, 0] - 1]
        best = np.bincount(values.ravel()).argmax() - 1
        assert result[str(file)][0] == (description["class_names"][best], pytest.approx((values == best + 1).mean()))
        with Image.open(tmp_path / "out" / f"{file.stem}-overlay.png") as overlay:
            assert overlay.height >= 320
            assert overlay.width > overlay.height * pixels.shape[3] / pixels.shape[2]  # a legend at its side
    (tmp_path / "twice").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "twice" / photographs[0].name)
    with pytest.raises(ValueError, match=r"out: .*png: wanted a new name for the mask of"):
        predict(PredictConfig(str(run.folder), [str(photographs[0].parent), str(tmp_path / "twice")], 2, "out"))


def test_the_workers_and_a_resume_change_nothing(run: SimpleNamespace, tmp_path: Path) -> None:
    main(on_scene(tmp_path / "two", run.root, "--data.workers", "2", "--trainer.max_steps", "3"))
    main(on_scene(tmp_path / "two", run.root, "--data.workers", "0"))
    one, two = (load_segmenter(folder)[0].state_dict() for folder in (run.folder, tmp_path / "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_pretrained_encoder_is_taken_over(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = [
        "pretrain", "--config", "demo_pretrain", "--out", str(tmp_path / "mae"), "--trainer.max_steps", "1",
        "--data.train_images", "32", "--trainer.global_batch", "16", "--model.args",
        "{patch_size: 16, embed_dim: 32, depth: 4, num_heads: 2}", "--data.img_size", "32",
    ]  # fmt: skip
    main(pretrain)
    capsys.readouterr()
    main(on_scene(tmp_path / "run", run.root, "--init", str(tmp_path / "mae"), "--trainer.max_steps", "1"))
    printed = capsys.readouterr().err
    assert "resampled: pos_embed" in printed
    assert "100.0% of the encoder's parameters" in printed
    assert "UperNet 32 wide:" in printed
    assert "multiply-adds per 64 px image" in printed
    assert metrics(tmp_path / "run")[0]["step"] == 1


def test_what_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("--trainer.device_batch", "1"): "trainer.device_batch: wanted at least 2 images per device and forward, got 1",
        ("--inference", "{mode: slide, stride: 29}"): "inference.stride: wanted 1 to the window's 28 px, got 29",
        ("--inference.scales", "[]"): "inference.scales: wanted scales above 0, got []",
        ("--data.scale", "[2.0, 1.0]"): "data.scale: wanted two scales above 0 in ascending order, got [2.0, 1.0]",
        ("--taps", "[0, 1, 2, 4]"): "taps: wanted 4 ascending blocks that end with the last, 3, got [0, 1, 2, 4]",
        ("--data.root", "x"): "root: wanted none for source embedded, got x",
        ("--data.source", "sceneparse"): "root: wanted a folder for source sceneparse, got none",
        (
            "--data.source",
            "folder",
            "--data.root",
            "x",
        ): "classes: wanted a file with one class a line for source folder",
        ("--data.train_images", "0"): "data.train_images: wanted at least 1, got 0",
    }
    for options, message in cases.items():
        with pytest.raises(SystemExit) as exit_:
            main(tiny_segment(tmp_path / "run", *options))
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run").exists()


@pytest.mark.holds("ade20k.1")
def test_a_device_batch_of_one_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scene_folder(tmp_path / "ade", train=4, val=1, longest=160)
    for recipe in ("segment_t", "segment_s"):
        words = ["--config", recipe, "--data.root", str(root), "--trainer.global_batch", "4", "--init", "null"]
        words += ["--trainer.device_batch", "1", "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as exit_:
            main(["segment", *words])
        assert exit_.value.code == 2
        assert (
            "the head pools to 1 x 1, where batch normalisation has nothing to normalise over"
            in capsys.readouterr().err
        )
        assert not (tmp_path / "run").exists()


def test_batch_norm_is_shared_between_gpus_only() -> None:
    def kinds(device: str, world: int) -> set[type]:
        model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
        share_batch_norm(model, SimpleNamespace(device=torch.device(device), world_size=world))
        return {type(module) for module in model[1:]}

    assert kinds("cuda", 2) == {nn.SyncBatchNorm}
    assert kinds("cuda", 1) == kinds("cpu", 2) == {nn.BatchNorm2d}


def ten_lines(predicted: np.ndarray, truth: np.ndarray, classes: int) -> tuple[float, float, float]:
    """mIoU, mean accuracy, pixel accuracy."""
    ious, recalls = [], []
    for c in range(classes):
        p, t = (predicted == c) & (truth != IGNORED), truth == c
        if (p | t).any():
            ious.append((p & t).sum() / (p | t).sum())
        if t.any():
            recalls.append((p & t).sum() / t.sum())
    labelled = truth != IGNORED
    return np.mean(ious), np.mean(recalls), (predicted == truth)[labelled].mean()


@pytest.mark.holds("ade20k.3")
@pytest.mark.parametrize("case", ["random", "absent class", "one pixel", "predicted only", "batches of sizes"])
def test_the_scores_are_those_of_ten_lines(case: str) -> None:
    from torchmetrics.classification import MulticlassConfusionMatrix

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
    scores = Scores.of(meter.compute())
    wanted = ten_lines(*(np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1)), classes)
    assert (scores.miou, scores.mean_accuracy, scores.pixel_accuracy) == pytest.approx(wanted, rel=1e-12)
    assert math.isnan(scores.iou[3]) == (case == "absent class")
    assert len(scores.iou) == classes


@pytest.mark.holds("ade20k.3")
def test_an_evaluation_of_a_whole_set_is_that_of_ten_lines(run: SimpleNamespace) -> None:
    masks = MaskDataConfig("sceneparse", str(run.root), workers=0)
    found = evaluate(EvaluateConfig(str(run.folder), masks=masks, inference=InferenceChange("whole")))
    model, description = load_segmenter(run.folder)
    predicted, truth = [], []
    dataset = MaskDataset(open_masks(masks, "val"))
    with torch.no_grad():
        for index in range(len(dataset)):
            sample = dataset[index]
            scores = predict_scores(
                lambda x: model(x).logits, sample["image"][None], description["input"], InferenceConfig("whole")
            )
            predicted.append(scores[0].argmax(0).numpy().ravel())
            truth.append(sample["target"].numpy().ravel())
    wanted = ten_lines(np.concatenate(predicted), np.concatenate(truth), 150)
    assert tuple(found.values()) == pytest.approx(wanted, rel=1e-3)  # freezing sums in another order


@pytest.mark.holds("ade20k.3")
def test_a_set_of_ignored_pixels_only_has_no_score(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert math.isnan(Scores.of(torch.zeros(3, 3)).miou)
    root = scene_folder(tmp_path / "ade", train=1, val=2, longest=100)
    for file in (root / "annotations" / "validation").iterdir():
        with Image.open(file) as mask:
            size = mask.size
        Image.new("L", size).save(file)
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(run.folder), "--masks.source", "sceneparse", "--masks.root", str(root)])
    assert exit_.value.code == 2
    assert "wanted labelled pixels to evaluate on, got ignored ones only" in capsys.readouterr().err


SIZES = [(300, 500), (512, 512), (512, 683), (683, 512), (513, 1024), (1024, 683), (200, 1000)]


@pytest.mark.holds("ade20k.4")
@pytest.mark.parametrize("size", SIZES)
def test_the_weights_of_overlapping_windows_sum_to_one(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    positions = torch.arange(size[0] * size[1], dtype=torch.float64).view(1, 1, *size)

    def forward(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-2:] == (min(512, size[0]), min(512, size[1]))
        seen.view(-1)[images.long().flatten()] += 1
        return torch.ones_like(images)

    assert torch.equal(slide(forward, positions, 512, 341), torch.ones(1, 1, *size, dtype=torch.float64))
    assert seen.min() >= 1
    # by hand: the mean of what each window says, here the number of the window
    starts = [window_starts(side, 512, 341) for side in size]
    numbers = iter(range(100))
    mean = slide(lambda x: torch.full_like(x, float(next(numbers))), positions, 512, 341)[0, 0]
    y, x = size[0] // 2, size[1] // 2
    windows = [(t, left) for t in starts[0] for left in starts[1]]
    over = [i for i, (t, left) in enumerate(windows) if t <= y < t + 512 and left <= x < left + 512]
    assert float(mean[y, x]) == pytest.approx(np.mean(over))


@pytest.mark.holds("ade20k.4")
@pytest.mark.parametrize("size", [(64, 64), (64, 40), (23, 64), (30, 50)])
def test_a_window_over_the_whole_image_is_the_whole_image(run: SimpleNamespace, size: tuple[int, int]) -> None:
    model, _ = load_segmenter(run.folder)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), hold_masks(model):
        whole = model(images).logits
        assert torch.equal(slide(lambda x: model(x).logits, images, 64, 43), whole)
        larger = torch.randn(1, 3, 100, 150)
        assert not torch.allclose(slide(lambda x: model(x).logits, larger, 64, 43), model(larger).logits, atol=1e-3)


def test_scales_and_mirrors_are_averaged_at_the_images_size() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 40, 60), generator=generator, dtype=torch.uint8)
    prepared = {"img_size": 32, "short_side": 32, "long_side": 128, "mean": [0.5] * 3, "std": [0.5] * 3}
    seen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[-2:]))
        return x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)

    inference = InferenceConfig("whole", scales=[0.5, 1.0], flip=True)
    scores = predict_scores(forward, images, prepared, inference)
    assert seen == [(16, 24), (16, 24), (32, 48), (32, 48)]
    assert scores.shape == (1, 3, 40, 60)
    assert torch.allclose(scores.sum(1), torch.ones(1, 40, 60))
    mirrored = predict_scores(forward, images.flip(-1), prepared, inference)
    assert torch.allclose(mirrored.flip(-1), scores, atol=1e-5)


@pytest.mark.parametrize("size", [(2000, 1400), (4000, 330), (30, 40)])
def test_an_overlays_legend_is_as_large_as_its_picture_asks(size: tuple[int, int]) -> None:
    image, classes = Image.new("RGB", size), np.zeros(size[::-1], np.uint8)
    classes[:, size[0] // 2 :] = 1
    colours = [(150, 0, 0), (0, 0, 150)]
    picture = np.asarray(overlay_image(image, classes, colours, [("left", 0.5), ("right", 0.5)], colours))
    magnified = max(1, -(-320 // min(size)))
    legend = picture[:, size[0] * magnified :]
    swatch = (legend == (150, 0, 0)).all(-1).any(1).sum()
    assert swatch == pytest.approx(13 * max(1, min(size) / 700), abs=1)
    outline = (picture[:, : size[0] * magnified] == 255).all(-1)[-1].sum()
    assert outline == max(1, round(min(size) / 700))


def test_a_binary_mask_of_0_and_255_is_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, pixels in (("images", np.arange(1024)), ("masks", np.arange(1024) % 2 * 255)):
        (tmp_path / kind).mkdir()
        for i in range(6):
            Image.fromarray(pixels.reshape(32, 32).astype(np.uint8)).save(tmp_path / kind / f"{i}.png")
    (tmp_path / "classes.txt").write_text("ground\ncrack\n")
    options = ["--data.source", "folder", "--data.root", str(tmp_path), "--data.classes", str(tmp_path / "classes.txt")]
    main(tiny_segment(tmp_path / "run", *options, "--data.train_images", "null", "--trainer.global_batch", "2"))
    assert "masks with one class only: ground (a binary mask has 0 and 1, not 0 and 255" in capsys.readouterr().err
