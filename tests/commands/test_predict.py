"""Predictions for image files: classes, or masks and their overlays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SceneRun
from PIL import Image

from sparsemae.cli import main
from sparsemae.commands.overlays import overlay_image
from sparsemae.commands.predict import predict
from sparsemae.options.commands import PredictConfig
from sparsemae.options.model import InferenceConfig
from sparsemae.predictor import Prediction
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.sliding_window import predict_scores


def test_predictions_of_files_and_folders(runs: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = predict(PredictConfig(str(runs / "finetune"), [str(image_folder / "val")], top_k=4))
    assert len(result) == 6
    printed = capsys.readouterr().out
    for file, classes in result.items():
        assert file in printed
        assert len(classes) == 4
        shares = [best.probability for best in classes]
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


def test_predictions_are_palette_masks_and_overlays(
    scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = sorted((scene_run.root / "images" / "validation").iterdir())
    result = predict(PredictConfig(str(scene_run.folder), [str(photographs[0].parent)], 2, str(tmp_path / "out")))
    assert list(result) == [str(file) for file in photographs]
    model, card = load_model(scene_run.folder)
    for file in photographs:
        with Image.open(file) as image, Image.open(tmp_path / "out" / f"{file.stem}.png") as mask:
            assert (mask.mode, mask.size) == ("P", image.size)
            values = np.asarray(mask)
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
            color = np.asarray(mask.convert("RGB"))[0, 0].tolist()
        with torch.no_grad(), hold_masks(model):
            scores = predict_scores(lambda x: model(x).logits, pixels, card.input, InferenceConfig(stride=43))
        assert np.array_equal(values, scores[0].argmax(0).numpy() + 1)  # the data set's own values
        assert color == card.settings["palette"][values[0, 0] - 1]
        best = int(np.bincount(values.ravel()).argmax()) - 1
        first = result[str(file)][0]
        assert first == Prediction(card.class_names[best], best, first.probability)
        assert first.probability == pytest.approx((values == best + 1).mean())
        with Image.open(tmp_path / "out" / f"{file.stem}-overlay.png") as overlay:
            assert overlay.height >= 320
            assert overlay.width > overlay.height * pixels.shape[3] / pixels.shape[2]  # a legend at its side
    (tmp_path / "twice").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "twice" / photographs[0].name)
    with pytest.raises(ValueError, match=r"out: .*png: wanted a new name for the mask of"):
        predict(PredictConfig(str(scene_run.folder), [str(photographs[0].parent), str(tmp_path / "twice")], 2, "out"))


@pytest.mark.parametrize("size", [(2000, 1400), (4000, 330), (30, 40)])
def test_an_overlays_legend_is_as_large_as_its_picture_asks(size: tuple[int, int]) -> None:
    image, classes = Image.new("RGB", size), np.zeros(size[::-1], np.uint8)
    classes[:, size[0] // 2 :] = 1
    colors = [(150, 0, 0), (0, 0, 150)]
    areas = [Prediction("left", 0, 0.5), Prediction("right", 1, 0.5)]
    picture = np.asarray(overlay_image(image, classes, colors, areas))
    magnified = max(1, -(-320 // min(size)))
    legend = picture[:, size[0] * magnified :]
    swatch = (legend == (150, 0, 0)).all(-1).any(1).sum()
    assert swatch == pytest.approx(13 * max(1, min(size) / 700), abs=1)
    outline = (picture[:, : size[0] * magnified] == 255).all(-1)[-1].sum()
    assert outline == max(1, round(min(size) / 700))
