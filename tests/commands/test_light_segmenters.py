"""Segmenters with light heads from a run to a packed file and to ONNX, by the commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Figure, SceneRun, on_scene
from PIL import Image

import sparsemae
from sparsemae.cli import main
from sparsemae.commands.evaluate import evaluate
from sparsemae.commands.export import export
from sparsemae.data.masks import SCENEPARSE150
from sparsemae.options import EvaluateConfig, ExportConfig, InferenceChange, SourceConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def light(scene_run: SceneRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of photographs, by windows, and its packed file: to be read only."""
    folder = tmp_path_factory.mktemp("light")
    main(on_scene(folder / "run", scene_run.root, "--head", "{kind: segformer, width: 32}"))
    main(["pack", str(folder / "run"), str(folder / "packed.safetensors"), "--license", "mit"])
    return folder


@pytest.mark.holds("take.3")
def test_a_packed_segmenter_evaluates_and_predicts_like_its_run(
    light: Path, scene_run: SceneRun, tmp_path: Path, figure: Figure
) -> None:
    data, found = SourceConfig("sceneparse", str(scene_run.root), workers=0), {}
    for model in ("run", "packed.safetensors"):
        for scales in (None, [0.5, 1.0]):  # smaller than a window, too
            config = EvaluateConfig(str(light / model), data, inference=InferenceChange(scales=scales))
            found[model, scales is None] = evaluate(config)
    for one in (True, False):
        own, packed = found["run", one], found["packed.safetensors", one]
        assert own.keys() == packed.keys()
        assert packed["pixel_accuracy"] == pytest.approx(own["pixel_accuracy"], abs=0.01)
    photographs = sorted((scene_run.root / "images" / "validation").iterdir())
    maps = [sparsemae.load(light / model).predict(photographs) for model in ("run", "packed.safetensors")]
    same = np.mean([(a == b).mean() for a, b in zip(*maps, strict=True)])
    figure(f"photographs: {same:.2%} of the pixels in the same class")
    assert same > 0.97
    words = ["predict", str(light / "packed.safetensors"), str(photographs[0]), "--pictures", str(tmp_path)]
    main(words)
    with Image.open(tmp_path / f"{photographs[0].stem}.png") as mask, Image.open(photographs[0]) as image:
        assert mask.size == image.size
        assert np.array_equal(np.asarray(mask), maps[1][0] + 1)  # as the data set has them: 0 is none


def test_a_packed_segmenters_masks_are_read_as_it_was_trained(
    light: Path, scene_run: SceneRun, refused: Callable[..., str]
) -> None:
    packed, root = str(light / "packed.safetensors"), str(scene_run.root)
    assert sparsemae.load(packed).card.data["ignore_label"] == 255
    found = [
        evaluate(EvaluateConfig(packed, data))
        for data in (SourceConfig("sceneparse", root), SourceConfig("folder", root, classes=str(SCENEPARSE150)))
    ]
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    said = refused("evaluate", packed, *scene_run.where, "--data.reduce_zero_label", "false")
    assert "data.reduce_zero_label: wanted what the model was trained with, true, got false" in said


@pytest.mark.holds("take.3")
def test_what_leaves_by_onnx(light: Path, scene_run: SceneRun, tmp_path: Path, figure: Figure) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for model in (light / "run", light / "packed.safetensors"):
        folder = export(ExportConfig(str(model), str(tmp_path / model.stem), "onnx"))
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        windows = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
        (got,) = session.run(None, {"images": windows})
        wanted = sparsemae.load(model)(windows)
        error = np.abs(got - wanted).max() / wanted.std()
        assert error < (1e-4 if model.is_dir() else 4e-2)
        figure(f"{model.name}: onnxruntime differs by {error:.1e} of the spread")
        settings = json.loads(session.get_modelmeta().custom_metadata_map["settings"])
        assert settings["inference"]["mode"] == "slide"


@pytest.mark.holds("take.3")
def test_upernet_is_refused_at_the_start(
    light: Path, scene_run: SceneRun, tmp_path: Path, refused: Callable[..., str]
) -> None:
    said = refused("pack", str(scene_run.folder), str(tmp_path / "x.safetensors"))
    assert "wanted a light head (trained with --head.kind linear or segformer), got upernet" in said
    assert "export --to onnx" in said
    said = refused("pack", str(light / "run"), str(tmp_path / "x.safetensors"), "--data.source", "embedded")
    assert "data: wanted none for a segmenter" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.holds_only
@pytest.mark.holds("take.3")
@pytest.mark.parametrize("kind", ["linear", "segformer"])
def test_miou_on_the_demos_masks(kind: str, tmp_path: Path, figure: Figure) -> None:
    main(["segment", "--config", "demo_segment", "--head.kind", kind, "--out", str(tmp_path / "run"),
          "--trainer.epochs", "4"])  # fmt: skip
    main(["pack", str(tmp_path / "run"), str(tmp_path / "packed.safetensors")])
    data = SourceConfig("embedded", workers=0)
    own, packed = (
        evaluate(EvaluateConfig(str(tmp_path / name), data))["miou"] for name in ("run", "packed.safetensors")
    )
    figure(f"{kind}: mIoU {packed:.3%} packed, {own:.3%} in torch")
    assert abs(packed - own) < 1e-3
