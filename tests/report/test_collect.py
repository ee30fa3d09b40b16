"""What a run leaves to look at: predictions.csv, and galleries that show what a person wants to see."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SceneRun, on_scene, scene_folder, tiny
from pages import CHROMIUM, Page, browse, served
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import sparsemae
from sparsemae.cli import main
from sparsemae.files import write_atomic

COLORS = {"blue": (40, 60, 200), "green": (50, 170, 60), "red": (200, 50, 40)}
PLANTED = {"blue/03.png": "green", "red/05.png": "blue", "green/01 <i>&amp; $x$.png": "red"}
"""Files of the validation set, and the class whose folder they were put into by mistake."""


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuning on three colors, of whose validation images three lie in another class's folder."""
    folder = tmp_path_factory.mktemp("swapped")
    generator, root = np.random.default_rng(0), folder / "images"
    for split, count in (("train", 16), ("val", 8), ("test", 4)):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (np.array(color) + generator.normal(0, 12, (28, 28, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i:02d}.png")
    for file, other in PLANTED.items():
        name, stem = file.split("/")
        (root / "val" / name / f"{stem[:2]}.png").rename(root / "val" / other / f"planted {name} {stem}")
    main(
        tiny(
            "finetune", folder / "run", "--data.source", "folder", "--data.root", str(root), "--data.workers", "0",
            "--data.train_images", "null", "--trainer.epochs", "12", "--mixup", "0", "--cutmix", "0", "--erasing", "0",
            "--sparse.pattern", "8:16", "--optim.lr", "5e-3", "--trainer.keep", "best",
            "--trainer.evaluate_every_epochs", "1",
        )
    )  # fmt: skip
    return folder


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def record_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.holds("own.3")
def test_swapped_labels_lead_the_gallery_in_order(swapped: Path) -> None:
    worst = next(one for one in record_of(swapped / "run")["galleries"] if one["title"] == "Worst mistakes")
    predictor = sparsemae.load(swapped / "run")  # an independent look at the files, by what was written
    files = sorted((swapped / "images/val").rglob("*.png"))
    found = predictor.predict(files, 3)
    given = {str(f): {p.label: p.probability for p in own}[f.parent.name] for f, own in zip(files, found, strict=True)}
    wrong = [str(f) for f, own in zip(files, found, strict=True) if own[0].label != f.parent.name]
    assert sum("planted" in file for file in wrong) == len(PLANTED), "the model has not learned the colors"
    shown = [one["file"] for one in worst["pictures"]]
    assert shown == sorted(wrong, key=lambda file: given[file])
    assert all("planted" in file for file in shown[: len(PLANTED)])
    assert 'class="pictures wide"' not in (swapped / "run/report.html").read_text()  # a thumbnail is one picture
    assert worst["pictures"][0]["note"].startswith(f"labeled {Path(shown[0]).parent.name}, predicted ")
    for one in worst["pictures"]:
        picture = Image.open(io.BytesIO(base64.b64decode(one["picture"].split(",")[1]))).convert("RGB")
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(one["file"]).convert("RGB")))


@pytest.mark.slow
@pytest.mark.holds("own.3")
def test_rows_matrix_and_figures_are_one_anothers_and_scikit_learns(swapped: Path) -> None:
    rows, record = rows_of(swapped / "run"), record_of(swapped / "run")
    names = record["class_names"]
    assert [row["file"] for row in rows] == [str(file) for file in sorted((swapped / "images/val").rglob("*.png"))]
    assert all(row["label"] == Path(row["file"]).parent.name for row in rows)
    matrix = np.zeros((3, 3), int)
    for truth, predicted, count in record["confusion"]:
        matrix[truth, predicted] = count
    label, predicted = ([row[name] for row in rows] for name in ("label", "predicted"))
    assert np.array_equal(matrix, confusion_matrix(label, predicted, labels=names))
    assert matrix.sum() == record["images"] == len(rows) == 24
    for row in rows:
        each = {name: float(row[f"p({name})"]) for name in names}
        assert sum(each.values()) == pytest.approx(1, abs=1e-4)
        assert max(each, key=lambda name: each[name]) == row["predicted"]
        assert float(row["p"]) == pytest.approx(max(each.values()), abs=1e-5)
        assert float(row["p_label"]) == pytest.approx(each[row["label"]], abs=1e-5)
    metrics = sparsemae.load(swapped / "run").card.metrics
    headlines = {one["name"]: one for one in record["headlines"]}
    assert headlines["Top-1 accuracy"]["value"] == pytest.approx(metrics["top1"])
    assert headlines["Top-1 accuracy"]["error"] == pytest.approx(metrics["standard_error"])
    recall = precision_recall_fscore_support(label, predicted, labels=names)[1]
    assert headlines["Balanced accuracy"]["value"] == pytest.approx(recall.mean())
    loss = -np.log([float(row["p_label"]) for row in rows])
    assert headlines["Cross-entropy"]["value"] == pytest.approx(loss.mean(), rel=1e-3)
    assert headlines["Cross-entropy"]["error"] == pytest.approx(loss.std() / 24**0.5, rel=1e-3)


@pytest.mark.slow
def test_the_page_is_of_the_epoch_that_was_written_and_says_what_a_test_split_says(swapped: Path) -> None:
    run = swapped / "run"
    result = json.loads((run / "result.json").read_text())
    top1 = next(one["value"] for one in record_of(run)["headlines"] if one["name"] == "Top-1 accuracy")
    assert top1 == pytest.approx(result["metrics"]["top1"])
    words = Page((run / "report.html").read_text()).words
    assert words[words.index("Test top-1") + 1] == f"{100 * result['test']['top1']:.1f}"
    assert f"Written are the weights of epoch {result['kept']:g}." in words
    assert all(note in words for note in result["notes"])


@pytest.mark.slow
@pytest.mark.holds("own.3")
@pytest.mark.skipif(not CHROMIUM.is_file(), reason="no Chromium here")
def test_in_a_browser_nothing_is_requested_and_nothing_complains(swapped: Path, tmp_path: Path) -> None:
    page = (swapped / "run/report.html").read_text()
    evil = "<main><img src=/other.png><img src=http://a.invalid/><script>console.error('no')</script>"
    pages = {
        "good": page,
        "foreign": page.replace("<main>", evil),  # as if a name had not been escaped
        "open": page.replace("default-src 'none'; img-src data:; ", "").replace("<main>", evil),
    }
    for name, text in pages.items():
        write_atomic(tmp_path / f"{name}.html", text)
    with served(tmp_path) as (address, asked):
        for size, dark in (((1280, 3000), False), ((390, 3000), True)):
            seen = browse(f"{address}/good.html", tmp_path, size, dark)
            assert seen["console"] == []
            assert seen["requests"] == []
            with Image.open(seen["picture"]) as picture:
                assert picture.size == size
                assert (np.asarray(picture.convert("L"))[2, 2] < 60) == dark
        assert browse(f"{address}/foreign.html", tmp_path)["requests"] == []
        assert {*asked} == {"/good.html", "/foreign.html"}
        seen = browse(f"{address}/open.html", tmp_path)  # what is held against is seen where it happens
        assert seen["requests"] == [f"{address}/other.png", "http://a.invalid/"]
        assert any("no" in line for line in seen["console"])


@pytest.mark.slow
def test_the_page_shows_the_first_batch_as_the_loss_had_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsemae.tasks.classification import Classification

    first: list[torch.Tensor] = []
    original = Classification._mixed

    def spy(self: Classification, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        images, target = original(self, batch)
        first.append(images.clone())
        return images, target

    monkeypatch.setattr(Classification, "_mixed", spy)
    main(tiny("finetune", tmp_path / "run", "--mixup", "0.5", "--erasing", "0.5", "--trainer.max_steps", "2"))
    assert len(first) == 3  # two steps, and the page
    assert torch.equal(first[0], first[2])
    batch = record_of(tmp_path / "run")["batch"]
    assert len(batch) == 16
    assert any("%" in one["note"] for one in batch)  # mixed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "name", "metric"), [("finetune", "Top-1 accuracy", "top1"), ("segment", "mIoU", "miou")]
)
@pytest.mark.holds_only
def test_two_processes_bring_all_images_together(tmp_path: Path, job: str, name: str, metric: str) -> None:
    """Each looks at every other image; the page is of all."""
    short = ["--trainer.max_steps", "1", "--trainer.device_batch", "8" if job == "finetune" else "2"]
    words = partial(tiny, job)
    if job == "segment":
        words = partial(on_scene, root=scene_folder(tmp_path / "ade", train=8, val=5, longest=100))
        short += ["--data.workers", "0"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = [*words(both), *short, "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start = [sys.executable, "-m", "sparsemae.cli", *command]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stderr
    main([*words(alone), *short])
    for run in (both, alone):
        rows, record = rows_of(run), record_of(run)
        assert len(rows) == record["images"] == (10_000 if job == "finetune" else 5)
        found = next(one["value"] for one in record["headlines"] if one["name"] == name)
        assert found == pytest.approx(sparsemae.load(run).card.metrics[metric])
    assert [row["file"] for row in rows_of(both)] == [row["file"] for row in rows_of(alone)]
    for key in ("confusion", "galleries") if job == "finetune" else ():  # a batch's norm is each process's own on a CPU
        assert record_of(both)[key] == record_of(alone)[key]
    shown = [
        {one["file"] for gallery in record_of(run)["galleries"] for one in gallery["pictures"]} for run in (both, alone)
    ]
    assert shown[0] == shown[1]


@pytest.mark.slow
def test_a_pretraining_shows_its_own_images(runs: Path) -> None:
    (shown,) = record_of(runs / "pretrain")["galleries"]
    assert shown["title"] == "Reconstructions"
    assert len(shown["pictures"]) == 8
    assert not (runs / "pretrain/predictions.csv").exists()
    page = (runs / "pretrain/report.html").read_text()
    assert "Reconstructions" in Page(page).words
    assert page.count('class="pictures wide"') == 1


@pytest.mark.slow
def test_a_segmentation_shows_its_best_and_worst(scene_run: SceneRun, capsys: pytest.CaptureFixture[str]) -> None:
    record, rows = record_of(scene_run.folder), rows_of(scene_run.folder)
    worst, best = record["galleries"]
    by_miou = sorted(rows, key=lambda row: float(row["miou"]))
    shown = [one["file"] for one in worst["pictures"] + best["pictures"][::-1]]
    assert shown == [row["file"] for row in by_miou]
    assert sum(count for *_, count in record["confusion"]) == sum(int(row["labeled_pixels"]) for row in rows)
    metrics = sparsemae.load(scene_run.folder).card.metrics
    headlines = {one["name"]: one for one in record["headlines"]}
    assert headlines["mIoU"]["value"] == pytest.approx(metrics["miou"])
    assert headlines["Pixel accuracy"]["value"] == pytest.approx(metrics["pixel_accuracy"])
    matrix = np.zeros((150, 150), np.int64)
    for truth, predicted, count in record["confusion"]:
        matrix[truth, predicted] = count
    right, truth, predicted = np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    there = truth > 0
    iou = right[there] / (truth + predicted - right)[there]
    assert iou.mean() == pytest.approx(metrics["miou"])


@pytest.mark.slow
def test_a_model_is_not_lost_for_want_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsemae.report.collect.write_atomic", full)
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "2"))
    assert "warning: no report: [Errno 28] No space left on device" in capsys.readouterr().err
    assert (tmp_path / "run/model.safetensors").is_file()
