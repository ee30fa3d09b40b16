"""Models that others open: timm, transformers and ONNX Runtime give the same logits, and prepare images the same."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import PHOTOGRAPHS, SceneRun, tiny
from huggingface_hub import ModelCard as HubCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sparsemae
from sparsemae.cli import main
from sparsemae.commands.export import compared, export
from sparsemae.data.transforms import evaluation_transform
from sparsemae.models.weights import save_model
from sparsemae.options import ExportConfig
from sparsemae.sparsity import dense_weights, densify, hold_masks
from sparsemae.tasks.loading import TorchPredictor, load_model

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real JPEGs, of different sizes and qualities."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    out = tmp_path_factory.mktemp("photographs")
    for i, name in enumerate(PHOTOGRAPHS):
        with Image.open(folder / name) as image:
            image.convert("RGB").save(out / f"{i}.jpg", quality=60 + 9 * i, progressive=i % 2 == 1)
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def exported(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    run = Path(shutil.copytree(runs / "finetune", folder.with_name("run")))
    machine = json.loads((run / "environment.json").read_text())
    machine["command"] = ["sparsemae", "finetune", "--config", "demo_finetune"]  # here it was a test's
    (run / "environment.json").write_text(json.dumps(machine))
    main(["export", str(run), str(folder), "--to", "timm"])
    return folder


def own(runs: Path) -> TorchPredictor:
    return TorchPredictor(*load_model(runs / "finetune"))


def prepared(files: list[Path], card: Any) -> torch.Tensor:
    """As training's evaluation sees them: uint8 [B, 3, H, W]."""
    transform = evaluation_transform(card.input)
    return torch.stack([transform(Image.open(file).convert("RGB"), 0)[0] for file in files])


@pytest.mark.slow
@pytest.mark.holds("take.2")
def test_timm_and_transformers_open_one_folder(
    runs: Path, exported: Path, photographs: list[Path], figure: Callable[[str], None]
) -> None:
    predictor = own(runs)
    theirs = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(exported).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    config = timm.data.resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in photographs])
    pixels = processor([Image.open(file).convert("RGB") for file in photographs])["pixel_values"]
    assert torch.equal(images, pixels)
    spec = predictor.card.input
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    assert torch.equal(((images * std + mean) * 255).round().to(torch.uint8), prepared(photographs, predictor.card))
    wanted = predictor(images.numpy())
    assert np.ptp(wanted) > 0
    with torch.inference_mode():
        assert np.array_equal(theirs(images).numpy(), wanted)
        assert np.array_equal(wrapped(images).logits.numpy(), wanted)
        assert np.array_equal(theirs.forward_features(images).numpy(), predictor.features(images.numpy()))
    assert wrapped.config.id2label == dict(enumerate(predictor.card.class_names))
    assert theirs.pretrained_cfg["label_names"] == list(predictor.card.class_names)
    figure(f"{len(photographs)} photographs, logits and pixels equal")


@pytest.mark.holds("take.2")
def test_the_card_is_read_by_the_hubs_parser(runs: Path, exported: Path) -> None:
    card = HubCard.load(exported / "README.md")
    top1 = own(runs).card.metrics["top1"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert next(result.metric_value for result in card.data.eval_results or []) == pytest.approx(top1)
    for said in (
        "| command | sparsemae finetune --config demo_finetune |",
        "standard error",
        "2:32 in 8 layers",
        f"started from | {runs}/pretrain",
        "ms an image",
    ):
        assert said in card.text


@pytest.mark.holds("take.2")
def test_a_pretrained_run_is_transformers_vitmae(runs: Path, tmp_path: Path) -> None:
    model, card = load_model(runs / "pretrain")
    images = torch.randn(2, 3, card.input.img_size, card.input.img_size)
    noise = torch.rand(2, model.encoder.patch_embed.num_patches)
    for masked, context in ((False, dense_weights), (True, hold_masks)):
        folder = export(ExportConfig(str(runs / "pretrain"), str(tmp_path / f"{masked}"), "hf", masked=masked))
        theirs, loading = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.inference_mode(), context(model):
            wanted, got = model.eval()(images, card.settings["mask_ratio"], noise), theirs.eval()(images, noise=noise)
        assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
        assert torch.allclose(got.logits, wanted.pred, atol=1e-5)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        assert tuple(processor.image_mean) == card.input.mean
        start = load_model(runs / "pretrain")[0]
        sparsemae.load_weights(start, folder / "model.safetensors", strict=True)  # and back
        weight = start.state_dict()["encoder.blocks.0.attn.qkv.weight"]
        assert bool((weight == 0).float().mean() > 0.9) is masked


def with_args(run: Path, file: Path, **args: Any) -> str:
    """A run's weights as another network's, by arguments of timm's that change no shape."""
    model, card = load_model(run)
    save_model(file, model, replace(card, model_args={**card.model_args, **args}))
    return str(file)


def test_another_activation_is_no_vitmae(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("gelu_tanh", "GELUTanh()"), ("relu", "ReLU()")):
        file = with_args(runs / "pretrain", tmp_path / f"{name}.safetensors", act_layer=name)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["export", file, str(tmp_path / name), "--to", "hf"])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"blocks.0.mlp.act: wanted GELU, not approximated, as ViTMAE has it, got {said}")
        assert not (tmp_path / name).exists()
    exact = with_args(runs / "pretrain", tmp_path / "gelu.safetensors", act_layer="gelu")  # timm's own class
    main(["export", exact, str(tmp_path / "gelu"), "--to", "hf"])


def test_what_cannot_be_packed_is_exported_without_its_size_and_speed(runs: Path, tmp_path: Path) -> None:
    file = with_args(runs / "finetune", tmp_path / "relu.safetensors", act_layer="relu")
    main(["export", file, str(tmp_path / "relu")])
    said = (tmp_path / "relu" / "README.md").read_text()
    assert "2:32 in 8 layers" in said
    assert "size and speed" not in said


@pytest.mark.slow
def test_a_pretraining_whose_mask_was_fixed_is_exported_without_it(tmp_path: Path) -> None:
    main(tiny("pretrain", tmp_path / "run", "--sparse.freeze_epoch", "1"))
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.endswith("weight_mask")]  # noqa: SIM118
        weight = file.get_tensor("vit.encoder.layer.0.intermediate.dense.weight")
    assert (weight.view(-1, 32) != 0).sum(dim=1).max() == 2
    assert "Pruned weights are stored as zeros." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_is_exported_with_the_masks_of_then(tmp_path: Path) -> None:
    main(tiny("finetune", tmp_path / "run", "--trainer.max_steps", "2", "--trainer.save_every_steps", "1"))
    main(["export", str(tmp_path / "run" / "checkpoints" / "step-00000001"), str(tmp_path / "out")])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert (weights["blocks.0.attn.qkv.weight"].unflatten(1, (-1, 32)) != 0).sum(-1).eq(2).all()
    assert "size and speed | packed" in (tmp_path / "out" / "README.md").read_text()


def test_the_readme_says_what_the_pruned_weights_are(runs: Path, tmp_path: Path) -> None:
    model, card = load_model(runs / "finetune")
    densify(model)
    save_model(tmp_path / "dense.safetensors", model, replace(card, patterns={}))
    zeros, latent = "Pruned weights are stored as zeros.", "All weights are stored, pruned ones too"
    for name, source, said, masked in (
        ("finetuned", runs / "finetune", zeros, False),
        ("pretrained", runs / "pretrain", latent, False),
        ("masked", runs / "pretrain", zeros, True),
        ("dense", tmp_path / "dense.safetensors", "", False),
    ):
        folder = export(ExportConfig(str(source), str(tmp_path / name), masked=masked))
        text = (folder / "README.md").read_text()
        assert [one for one in (zeros, latent) if one in text] == [one for one in (said,) if one]
        assert ("N:M sparse weights" in text) is ("\n- sparse\n" in text) is bool(said)
        weight = load_file(folder / "model.safetensors")["blocks.0.attn.qkv.weight"]
        assert bool((weight == 0).float().mean() > 0.9) is (said == zeros or name == "dense")


def test_an_encoder_goes_to_timm(runs: Path, tmp_path: Path) -> None:
    folder = export(ExportConfig(str(runs / "pretrain"), str(tmp_path / "encoder"), "timm", masked=True))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    predictor = sparsemae.load(runs / "pretrain")
    images = torch.randn(1, 3, predictor.card.input.img_size, predictor.card.input.img_size)
    with torch.inference_mode():
        assert np.array_equal(theirs.forward_features(images).numpy(), predictor.features(images.numpy()))


def read_by_metadata(content: bytes, metadata: dict[str, str]) -> np.ndarray:
    """An image as ONNX metadata says, without a line of ours: float32 [3, H, W]."""
    spec = json.loads(metadata["preprocess"])
    image = Image.open(BytesIO(content)).convert("RGB")
    short, side = int(spec["img_size"] / spec["crop_pct"]), spec["img_size"]
    width, height = (int(short * length / min(image.size)) for length in image.size)
    image = image.resize((width, height), Image.Resampling[spec["interpolation"].upper()])
    left, top = round((width - side) / 2), round((height - side) / 2)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return ((pixels - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)


@pytest.mark.slow
@pytest.mark.holds("take.2")
def test_onnx_has_the_logits_and_says_how_images_are_prepared(
    runs: Path, scene_run: SceneRun, tmp_path: Path, photographs: list[Path], figure: Callable[[str], None]
) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    predictor = own(runs)
    folder = export(ExportConfig(str(runs / "finetune"), str(tmp_path / "onnx"), "onnx", license="cc0-1.0"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    images = np.stack([read_by_metadata(file.read_bytes(), metadata) for file in photographs])
    spec = predictor.card.input
    back = np.rint((images * np.reshape(spec.std, (3, 1, 1)) + np.reshape(spec.mean, (3, 1, 1))) * 255)
    assert np.array_equal(back, prepared(photographs, predictor.card).numpy())
    wanted = predictor(images)
    for batch in (images, images[:1]):  # any number of images
        (got,) = session.run(None, {"images": batch})
        error = np.abs(got - wanted[: len(batch)]).max() / wanted.std()
        assert error < 1e-4
    if find_spec("openvino"):  # of the extra `bench`
        openvino: Any = pytest.importorskip("openvino")
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        network = openvino.Core().compile_model(folder / "model.onnx", "CPU", exact)
        for batch in (images, images[:1]):
            assert np.abs(network(batch)[0] - wanted[: len(batch)]).max() < 1e-4 * wanted.std()
    assert tuple(json.loads(metadata["class_names"])) == predictor.card.class_names
    assert (metadata["task"], metadata["license"]) == ("classify", "cc0-1.0")
    figure(f"largest difference of a logit {error:.1e} of the spread")

    segmenter = sparsemae.load(scene_run.folder)
    folder = export(ExportConfig(str(scene_run.folder), str(tmp_path / "segmenter"), "onnx"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    window = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    (got,) = session.run(None, {"images": window})
    assert np.abs(got - segmenter(window)).max() < 1e-4 * segmenter(window).std()
    assert json.loads(session.get_modelmeta().custom_metadata_map["settings"])["inference"]["mode"] == "slide"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_packed_file_is_a_frozen_torch_model_again(runs: Path, tmp_path: Path, dtype: str) -> None:
    packed = tmp_path / "packed.safetensors"
    main(["pack", str(runs / "finetune"), str(packed), "--dtype", dtype, "--license", "mit"])
    model, card = sparsemae.load_model(packed)
    assert card == sparsemae.load(packed).card.__class__(**{**vars(sparsemae.load(packed).card), "frozen": True})
    assert all(module.frozen for _, module in sparsemae.iter_sparse(model))
    images = np.random.default_rng(0).standard_normal((2, 3, 28, 28), np.float32)
    wanted = sparsemae.load(packed)(images)
    with torch.inference_mode():
        got = model(torch.from_numpy(images)).numpy()
    assert np.abs(got - wanted).max() < 2e-2 * wanted.std()
    again = tmp_path / "again.safetensors"
    main(["pack", str(packed), str(again), "--dtype", dtype])
    first, second = load_file(packed), load_file(again)
    assert {name: value.tolist() for name, value in first.items()} == {n: v.tolist() for n, v in second.items()}
    (tmp_path / "config.yaml").write_text("data: {source: of another program}\n")  # which is no run's beside it
    folder = export(ExportConfig(str(packed), str(tmp_path / "timm")))
    assert not re.search(r"\| (data|started from|command) \|", (folder / "README.md").read_text())
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        assert np.array_equal(theirs(torch.from_numpy(images)).numpy(), got)
    assert HubCard.load(folder / "README.md").data.license == "mit"


def test_other_logits_are_not_called_done() -> None:
    wanted = np.random.default_rng(0).standard_normal((2, 10), np.float32)
    assert compared(wanted + np.float32(1e-5), wanted, "x").startswith("in x, largest difference of a logit 1.")
    assert "0.0e+00" in compared(wanted * 0, wanted * 0, "x")
    for other in (wanted + np.float32(0.01), wanted * np.float32(np.nan)):
        with pytest.raises(ValueError, match="wanted the same logits in x, got some that are off by"):
            compared(other, wanted, "x")


def test_what_cannot_be_exported_is_one_line(
    runs: Path, scene_run: SceneRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    new = str(tmp_path / "new")
    for words, said in (
        ([str(runs / "finetune"), str(tmp_path / "full")], "full: wanted a new or an empty folder"),
        ([str(scene_run.folder), new], "to: wanted onnx for a segmenter"),
        ([str(runs / "finetune"), new, "--masked", "true"], "masked: wanted a pretrained run"),
        ([str(runs / "pretrain"), new, "--to", "onnx"], "to: wanted timm or hf for a pretrained run"),
        ([str(runs / "finetune"), new, "--push", "a/b/c"], "a/b/c"),
        ([str(runs / "finetune"), new, "--push", "mine"], "push: wanted OWNER/NAME, got mine"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["export", *words])
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full"]
