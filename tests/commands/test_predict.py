"""Predictions for image files: classes, or masks and their overlays."""

import csv
import io
import json
import os
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import SceneRun
from PIL import Image

import sparsemae
from sparsemae.cli import main
from sparsemae.commands.overlays import Pictures, overlay_image
from sparsemae.commands.predict import predict
from sparsemae.data.tree import image_files
from sparsemae.models.weights import save_model
from sparsemae.options.commands import PredictConfig
from sparsemae.options.model import InferenceConfig
from sparsemae.packing.format import write
from sparsemae.predictor import Prediction
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.loading import load_model
from sparsemae.tasks.sliding_window import predict_scores
from sparsemae.terminal import printable


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
    broken = good[0].with_name("0  0\n.png")
    broken.write_bytes(good[0].read_bytes()[:40])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(model), str(folder)])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert [line.split(": ")[0] for line in printed.out.splitlines()] == [str(file) for file in good]
    named, last = printed.err.splitlines()[-2:]
    assert named.startswith(f"sparsemae predict: {printable(broken)}: ")
    assert last == "sparsemae predict: error: 1 of 7 images could not be read; the others are done"
    with pytest.raises(SystemExit):
        main(["predict", str(model), str(broken)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sparsemae predict: error: {folder}")


def test_what_a_folder_has_beside_images_is_said_on_stderr(
    runs: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(runs / "finetune"), str(image_folder / "val"), "--format", "jsonl"]
    main(words)
    alone = capsys.readouterr()
    (image_folder / "val" / "cat" / "notes\n.txt").touch()
    (image_folder / "val" / "photo.heic").touch()
    (image_folder / "val" / "empty").mkdir()
    main(words)
    printed = capsys.readouterr()
    assert printed.out == alone.out
    said = f"sparsemae predict: {image_folder / 'val'}: "
    empty, others = (line for line in printed.err.splitlines() if line not in alone.err.splitlines())
    assert empty == f"{said}folders without images: empty"
    assert others.startswith(f"{said}2 files are not read: 1 .")


def test_predictions_are_palette_masks_and_overlays(
    scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = sorted((scene_run.root / "images" / "validation").iterdir())
    folder, out = str(photographs[0].parent), str(tmp_path / "out")
    result = predict(PredictConfig(str(scene_run.folder), [folder], top_k=2, pictures=out))
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
    with pytest.raises(ValueError, match=r"pictures: .*png: wanted a new name for the mask of"):
        predict(PredictConfig(str(scene_run.folder), [folder, str(tmp_path / "twice")], pictures="out"))


def test_the_names_of_pictures_are_looked_at_once(
    scene_run: SceneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(path: Path) -> Path:
        seen.append(path)
        return resolve(path)

    resolve, seen = Path.resolve, list[Path]()
    monkeypatch.setattr(Path, "resolve", noted)
    files = [tmp_path / f"{i}.jpg" for i in range(50)]
    Pictures(load_model(scene_run.folder)[1], files, tmp_path / "out")
    assert 0 < len([path for path in seen if path.suffix in (".jpg", ".png")]) <= 3 * len(files)


NAMES = (
    "a,b.png",
    'say "cheese".png',
    "two\nlines.png",
    "back\rhere.png",
    "crlf\r\n.png",
    "caf\u00e9.png",
    os.fsdecode(b"\xff.png"),
    "1.png",
)


def lines_of(style: str, text: bytes) -> list[tuple[str, list[Prediction]]]:
    """File and classes, as a reader of that format finds them."""
    if style == "jsonl":
        found = [json.loads(line) for line in text.splitlines()]
        return [(one["file"], [Prediction(**best) for best in one["predictions"]]) for one in found]
    rows = csv.DictReader(io.StringIO(text.decode("utf-8", "surrogateescape"), newline=""))
    grouped = groupby(rows, lambda row: row["file"])
    return [
        (file, [Prediction(row["label"], int(row["index"]), float(row["probability"])) for row in group])
        for file, group in grouped
    ]


@pytest.mark.holds("take.1")
@pytest.mark.parametrize("style", ["csv", "jsonl"])
def test_tables_parse_back_whatever_names_hold(
    runs: Path, tmp_path: Path, style: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    weights, folder = tmp_path / "model.safetensors", tmp_path / "images"
    model, card = load_model(runs / "finetune")
    labels = ('one, "two"\nthree', "\x1b[31mred", *card.class_names[2:])
    save_model(weights, model, replace(card, class_names=labels))
    folder.mkdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(np.full((30, 30), 20 * i, np.uint8)).save(folder / name, "PNG")
    wanted = [(str(file), sparsemae.load(weights).predict(file, 10)[0]) for file in image_files(folder)]
    words = ["predict", str(weights), str(folder), "--top_k", "10", "--format", style]
    main([*words, "--out", str(tmp_path / "table")])
    capsysbinary.readouterr()
    main(words)
    for text in ((tmp_path / "table").read_bytes(), capsysbinary.readouterr().out):
        found = lines_of(style, text)
        assert [name for name, _ in found] == [name for name, _ in wanted]
        for (_, classes), (_, others) in zip(found, wanted, strict=True):
            assert sorted(best.label for best in classes) == sorted(labels)
            assert [best.probability for best in classes] == pytest.approx([best.probability for best in others])


def test_a_terminal_gets_no_control_characters(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    Image.new("RGB", (30, 30)).save(tmp_path / "a\x1b[2J\n.png")
    for style in ("text", "csv", "jsonl"):
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        predict(PredictConfig(str(runs / "finetune"), [str(tmp_path)], format=style))  # type: ignore[arg-type]
        assert "\x1b" not in terminal.getvalue()
        assert "x1b[2J" in terminal.getvalue()


@pytest.mark.parametrize("null", [False, True])
def test_paths_from_standard_input(
    runs: Path, tmp_path: Path, null: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\nb.png" if null else "a b.png"
    Image.new("RGB", (30, 30)).save(tmp_path / name)
    end = "\0" if null else "\n"
    text = end.join([str(tmp_path / name), str(tmp_path / "absent.png"), str(tmp_path / name)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with pytest.raises(SystemExit):
        main(["predict", str(runs / "finetune"), "-", "--format=jsonl", "--out", str(tmp_path / "t"), f"--null={null}"])
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 't'}: predictions of 2 images\n"
    named, last = printed.err.splitlines()
    assert "absent.png: unreadable image: No such file" in named
    assert last == "sparsemae predict: error: 1 of 3 images could not be read; the others are done"
    found = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    assert [one["file"] for one in found] == [str(tmp_path / name)] * 2
    assert len(found[0]["predictions"]) == 3


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


@pytest.mark.parametrize("words", ["--out MODEL", "--out LINK", "--out IMAGE", "--null true", "--pictures DRAWN"])
def test_an_output_over_an_input_and_an_option_without_effect_are_refused(
    image_folder: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"MODEL": tmp_path / "small", "LINK": tmp_path / "link", "IMAGE": image_folder / "val/cat/0.png"}
    write(files["MODEL"], reference.random_model(reference.TINY))
    files["LINK"].symlink_to(files["MODEL"])
    before = [file.read_bytes() for file in files.values()]
    option, value = words.split()
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(files["MODEL"]), str(files["IMAGE"]), option, str(files.get(value, value))])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert line.startswith(f"sparsemae predict: error: {option[2:]}: wanted ")
    assert [file.read_bytes() for file in files.values()] == before
