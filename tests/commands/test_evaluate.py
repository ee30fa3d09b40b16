"""Evaluation of whole and of packed models, of classifiers and of segmenters, on the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SceneRun, metrics, tiny
from PIL import Image

from sparsemae.card import InputSpec
from sparsemae.cli import main
from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.predict import predict
from sparsemae.data.masks import SCENEPARSE150
from sparsemae.models.weights import read_weights, save_tensors
from sparsemae.options.commands import EvaluateConfig, PredictConfig
from sparsemae.sparsity import iter_sparse
from sparsemae.tasks.loading import load_model


@pytest.mark.slow
def test_the_file_says_what_evaluation_found(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(EvaluateConfig(str(runs / "finetune")))
    described = load_model(runs / "finetune")[1].metrics
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_packed_model_predicts_and_evaluates_like_its_source(
    runs: Path, tmp_path: Path, image_folder: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed.safetensors"
    main(["pack", str(runs / "finetune"), str(packed), "--dtype", dtype, "--data.source", "embedded"])
    assert "dense model on 10000 images: largest difference of a logit" in capsys.readouterr().out
    images = [str(image_folder / "val")]
    ours, theirs = (predict(PredictConfig(str(model), images, top_k=10)) for model in (packed, runs / "finetune"))
    assert ours.keys() == theirs.keys()
    tolerance = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}[dtype]
    for file, ranking in ours.items():
        one, other = ({best.label: best.probability for best in found} for found in (ranking, theirs[file]))
        assert len(one) == 10
        assert one == pytest.approx(other, abs=tolerance)
    got, wanted = (evaluate(EvaluateConfig(str(model)))["top1"] for model in (packed, runs / "finetune"))
    assert got == pytest.approx(wanted, abs={"fp32": 1e-3, "bf16": 0.02, "int8": 0.05}[dtype])


@pytest.mark.slow
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
    assert load_model(tmp_path / "run")[1].input.exif is True
    for file in (image_folder / "val").glob("*/*.png"):
        turned, upright = (
            predict(PredictConfig(str(tmp_path / "run"), [str(f)], top_k=10))
            for f in (file, file.with_suffix(".upright"))
        )
        assert [*turned.values()] == [*upright.values()]
    asked: list[bool] = []

    def noted(*_: object, rules: InputSpec, **__: object) -> None:
        asked.append(bool(rules.exif))
        raise ValueError("enough")

    monkeypatch.setattr("sparsemae.tasks.classification.ImageDataset", noted)
    with pytest.raises(ValueError, match="enough"):
        evaluate(EvaluateConfig(str(tmp_path / "run")))
    assert asked == [True]
    tensors, document = read_weights(tmp_path / "run")
    assert document["input"].pop("exif")  # a file written before the option
    save_tensors(tmp_path / "old.safetensors", tensors, document)
    assert load_model(tmp_path / "old.safetensors")[1].input.exif is False


@pytest.mark.slow
def test_a_segmenter_on_photographs(scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, card = load_model(scene_run.folder)
    assert card.frozen
    assert len(list(iter_sparse(model))) == 16
    where = scene_run.where
    main(["evaluate", str(scene_run.folder), *where])
    printed = capsys.readouterr().out
    assert f"mIoU {card.metrics['miou']:.2%}" in printed
    assert "3 images (mode slide, stride 43, scales [1.0], flip False)" in printed
    assert sum(line.split()[-1] == "absent" or line.endswith("%") for line in printed.splitlines()) == 150
    main(["evaluate", str(scene_run.folder), *where, "--inference", "{mode: whole, scales: [0.75, 1.25], flip: true}"])
    assert "mode whole, scales [0.75, 1.25], flip True" in capsys.readouterr().out
    main(["evaluate", str(scene_run.folder), *where, "--inference.flip", "true"])  # the rest as the recipe says
    assert "mode slide, stride 43, scales [1.0], flip True" in capsys.readouterr().out
    assert {"miou", "mean_accuracy", "pixel_accuracy"} <= metrics(scene_run.folder)[-1].keys()


@pytest.mark.slow
def test_a_segmenters_masks_are_read_as_it_was_trained(
    scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """Also where the root is named again as a plain folder, whose own rule is another."""
    run, card = str(scene_run.folder), load_model(scene_run.folder)[1]
    assert (card.settings["reduce_zero_label"], card.data["ignore_label"]) == (True, 255)
    named = ["--data.source", "folder", "--data.root", str(scene_run.root), "--data.classes", str(SCENEPARSE150)]
    main(["evaluate", run, *named])
    assert f"mIoU {card.metrics['miou']:.2%}" in capsys.readouterr().out
    for option, trained, given in (("reduce_zero_label", "true", "false"), ("ignore_label", "255", "3")):
        said = refused("evaluate", run, *named, f"--data.{option}", given)
        assert f"data.{option}: wanted what the model was trained with, {trained}, got {given}" in said
    tensors, document = read_weights(run)
    del document["data"]["ignore_label"]  # a file of before
    save_tensors(tmp_path / "old.safetensors", tensors, document)
    main(["evaluate", str(tmp_path / "old.safetensors"), *named, "--data.ignore_label", "9"])


def test_a_dataset_of_other_classes_is_refused(
    scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = str(shutil.copy(scene_run.folder / "model.safetensors", tmp_path))  # without the run that says which images
    with pytest.raises(SystemExit):
        main(["evaluate", alone])
    printed = capsys.readouterr().err
    assert "embedded: wanted the 150 classes" in printed
    assert "(--data.source and --data.root name others)" in printed
    with pytest.raises(SystemExit):
        main(["evaluate", str(scene_run.folder), "--data.source", "folder", "--data.root", str(scene_run.root)])
    assert "data.classes: wanted a file with one class a line for data.source=folder" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_no_class(
    scene_run: SceneRun, tmp_path: Path, refused: Callable[..., str]
) -> None:
    tensors, document = read_weights(scene_run.folder)
    weight = next(name for name in reversed(tensors) if name.startswith("decode_head.") and name.endswith(".weight"))
    tensors[weight].fill_(3e38)
    save_tensors(tmp_path / "broken.safetensors", tensors, document)
    line = refused("evaluate", str(tmp_path / "broken.safetensors"), *scene_run.where)
    assert f"error: {tmp_path / 'broken.safetensors'}: wanted finite logits, got NaN or infinite ones" in line


@pytest.mark.parametrize("command", ["evaluate", "check"])
def test_the_old_names_of_a_segmenters_data_are_answered_with_the_new_ones(
    command: str, refused: Callable[..., str]
) -> None:
    line = refused(command, *["model"] * (command == "evaluate"), "--masks.root", "x")
    assert "--masks.root: wanted --data.root, as it is called now" in line


def test_an_evaluation_shows_how_far_it_is(
    scene_run: SceneRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparsemae.training.logs.PLAIN_LINE_SECONDS", 0.0)
    main(["evaluate", str(scene_run.folder), *scene_run.where])
    assert "evaluating: image 3/3" in capsys.readouterr().err
