"""Packed segmenters against torch: logits at any size, and the class of every pixel of an image, without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Figure
from PIL import Image
from torch import nn

import sparsemae
from sparsemae.card import InputSpec, ModelCard
from sparsemae.models import build_vit
from sparsemae.models.segmenter import Segmenter
from sparsemae.options import HeadConfig, InferenceConfig
from sparsemae.packing.format import read, write
from sparsemae.packing.pack import pack
from sparsemae.runtime import load
from sparsemae.runtime.native import usable_isas
from sparsemae.sparsity import freeze, sparsify
from sparsemae.tasks.segmentation import Segmentation
from sparsemae.tasks.sliding_window import predict_scores

NAMES = tuple("abcdefghijk")
ARGS = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
SPEC = InputSpec(64, (0.5, 0.4, 0.6), (0.25, 0.2, 0.3), short_side=64, long_side=256, exif=None)
BARS = {"fp32": 1e-4, "bf16": 4e-2, "int8": 9e-2}  # those of classifiers this small


def card(kind: str, **inference: Any) -> ModelCard:
    settings = {
        "head": {"kind": kind, "width": 48}, "out_indices": [0, 1, 2, 3],
        "inference": vars(InferenceConfig(stride=43)) | inference, "palette": [[i, i, i] for i in range(len(NAMES))],
        "reduce_zero_label": False,
    }  # fmt: skip
    return ModelCard("segment", "vit_base_patch16_224", ARGS, SPEC, NAMES, settings=settings)


def segmenter(kind: Any) -> Segmenter:
    torch.manual_seed(0)
    args = {**ARGS, "dynamic_img_size": True, "dynamic_img_pad": True}
    vit = build_vit("vit_base_patch16_224", args, SPEC.img_size)
    model = Segmenter(vit, len(NAMES), (0, 1, 2, 3), HeadConfig(48, kind=kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        nn.init.normal_(model.encoder.pos_embed)
    sparsify(model, "2:32")
    freeze(model)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Segmenter, Path]]:
    """By kind and dtype, a model and its packed file: to be read only."""
    folder, models = tmp_path_factory.mktemp("packed"), {kind: segmenter(kind) for kind in ("linear", "segformer")}

    def get(kind: str, dtype: Any = "fp32") -> tuple[Segmenter, Path]:
        file = folder / f"{kind}-{dtype}.safetensors"
        if not file.exists():
            pack(models[kind], file, card(kind), dtype)
        return models[kind], file

    return get


@pytest.mark.holds("take.3")
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("kind", ["linear", "segformer"])
def test_logits_of_any_size_are_torchs(kind: str, dtype: str, files: Any, figure: Figure) -> None:
    model, file = files(kind, dtype)
    predictor, largest = sparsemae.load(file), 0.0
    for height, width in ((64, 64), (37, 50), (64, 96)):
        images = torch.randn(3, 3, height, width)
        with torch.inference_mode():
            wanted = model(images).logits.numpy()
            features = model.encoder.forward_features(images).numpy() if (height, width) == (64, 64) else None
        got = predictor(images.numpy())
        assert got.shape == wanted.shape
        largest = max(largest, np.abs(got - wanted).max() / wanted.std())
        if features is not None:
            assert np.abs(predictor.features(images.numpy()) - features).max() < 2 * BARS[dtype] * features.std()
    assert largest < BARS[dtype]
    figure(f"{kind}, {dtype}: largest difference of a logit {largest:.1e} of the spread, bar {BARS[dtype]:g}")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_instruction_set_has_the_head(
    dtype: str, threads: int, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = files("segformer", dtype)
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        wanted = model(images).logits.numpy()
    for isa in usable_isas():
        monkeypatch.setenv("SPARSEMAE_ISA", isa)
        got = load(file, threads)(images.numpy())
        assert np.abs(got - wanted).max() < BARS[dtype] * wanted.std(), isa


def pictures() -> list[np.ndarray]:
    """Blobs: of the window's size, larger, wide, and so long that its short side is less than a window."""
    generator, found = np.random.default_rng(0), []
    for height, width in ((64, 64), (64, 150), (90, 70), (400, 60), (23, 31)):
        small = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        found.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return found


LOOKS: dict[str, dict[str, Any]] = {
    "windows": {},
    "whole": {"mode": "whole"},
    "scales and mirrored": {"scales": [0.75, 1.5], "flip": True},
}


@pytest.mark.slow
@pytest.mark.holds("take.3")
@pytest.mark.parametrize("look", LOOKS)
def test_the_class_of_every_pixel_is_torchs(look: str, files: Any, tmp_path: Path, figure: Figure) -> None:
    model, file = files("segformer")
    packed, own = read(file), card("segformer", **LOOKS[look])
    write(tmp_path / "m.safetensors", replace(packed, config=replace(packed.config, card=replace(
        packed.config.card, settings=own.settings))))  # fmt: skip
    predictor = sparsemae.load(tmp_path / "m.safetensors")
    images = [Image.fromarray(pixels) for pixels in pictures()]
    with torch.inference_mode():
        wanted = Segmentation.predict(model, own, images, 1)
    for pixels, classes, got in zip(pictures(), wanted, predictor.predict(pictures()), strict=True):
        assert got.shape == classes.shape == pixels.shape[:2]
        assert got.dtype == np.uint8
        same = float((got == classes).mean())
        # images that are resized: torch's uint8 bilinear rounds otherwise than Pillow's, by one of 255 here and there
        assert same == 1.0 if min(pixels.shape[:2]) == 64 and "scales" not in LOOKS[look] else same > 0.99
        figure(f"{look}, {pixels.shape[1]} x {pixels.shape[0]} px: {same:.2%} of the pixels")
    assert len(np.unique(np.concatenate([classes.ravel() for classes in wanted]))) > 3


def test_scores_by_hand(files: Any) -> None:
    """The native composition against the definition: windows made, averaged, resized."""
    _, file = files("linear")
    pixels, predictor = pictures()[2], sparsemae.load(file)

    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(predictor(images.numpy()))

    scores = predict_scores(network, torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], SPEC,
                            InferenceConfig(stride=43))  # fmt: skip
    (classes,) = predictor.predict(pixels)
    best = scores[0].numpy().max(axis=0)
    chosen = np.take_along_axis(scores[0].numpy(), classes[None].astype(np.intp), axis=0)[0]
    assert (best - chosen).max() < 0.05 * scores.std()


@pytest.mark.slow
def test_it_is_a_torch_model_again(files: Any) -> None:
    for kind in ("linear", "segformer"):
        model, file = files(kind)
        again, again_card = sparsemae.load_model(file)
        images = torch.randn(2, 3, 64, 80)
        with torch.inference_mode():
            assert torch.equal(again(images).logits, model(images).logits)
        assert again_card.patterns["encoder.blocks.0.attn.qkv"] == "2:32"
        assert again_card.settings == sparsemae.load(file).card.settings


@pytest.mark.slow
def test_without_torch(files: Any, tmp_path: Path) -> None:
    """The class map, masks and overlays by the command line, torch, torchvision and timm being out of reach."""
    for index, pixels in enumerate(pictures()[:2]):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm'): sys.modules[name] = None\n"
        "from sparsemae.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["predict", str(files("linear")[1]), str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--format", "jsonl",
             "--pictures", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for index, line in enumerate(lines):
        (classes,) = sparsemae.load(files("linear")[1]).predict(pictures()[index])
        with Image.open(tmp_path / "out" / f"{index}.png") as mask:
            assert np.array_equal(np.asarray(mask), classes)
        best = line["predictions"][0]
        assert best["probability"] == pytest.approx((classes == best["index"]).mean())
        assert (tmp_path / "out" / f"{index}-overlay.png").is_file()


def test_scores_that_are_not_finite(files: Any, tmp_path: Path) -> None:
    packed = read(files("linear")[1])
    packed.tensors["decode_head.classifier.weight"][:] = 3e38
    write(tmp_path / "m.safetensors", packed)
    with pytest.raises(ValueError, match="image 0: wanted finite logits, got NaN or infinite ones"):
        sparsemae.load(tmp_path / "m.safetensors").predict(pictures()[0])


def set_part(part: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: (config["segment"][part] if part else config["segment"]).update(changes)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no segment": (lambda c: c.pop("segment"), "config: wanted exactly the fields of the format"),
    "another head": (set_part("head", kind="upernet"), "segment.head.kind: wanted linear or segformer, got 'upernet'"),
    "wide": (set_part("head", width=1 << 20), "segment.head.width: wanted at least 1 and at most 16384"),
    "classes": (set_part("head", num_classes=256), "segment.head.num_classes: wanted at least 1 and at most 255"),
    "fewer classes": (set_part("head", num_classes=10), "wanted a color of three bytes for each of 10 classes"),
    "taps": (set_part("head", out_indices=[0, 1, 2, 4]), "segment.head.out_indices: wanted 4 ascending blocks up to"),
    "taps of text": (set_part("head", out_indices=["0", 1, 2, 3]), "segment.head.out_indices: wanted 4 ascending"),
    "no scale": (set_part("inference", scales=[]), "segment.inference.scales: wanted 1 to 16 numbers above 0"),
    "nan": (set_part("inference", scales=[float("nan")]), "segment.inference.scales: wanted 1 to 16 numbers above 0"),
    "stride": (set_part("inference", stride=0), "segment.inference.stride: wanted 1 to 64 px, got 0"),
    "mode": (set_part("inference", mode="x"), "segment.inference.mode: wanted slide or whole, got 'x'"),
    "side": (set_part("", short_side=0), "segment.short_side: wanted at least 1 and at most 16384, got 0"),
    "color": (set_part("", palette=[[0, 0, 256]] * 11), "segment.palette: wanted a color of three bytes for each"),
    "pool": (lambda c: c["vit"].update(global_pool="token"), "vit: wanted a segmenter's encoder"),
    "linear without norm": (lambda c: c["vit"].update(final_norm=False), "vit: wanted a segmenter's encoder"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_metadata_is_one_line(attack: str, files: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = files("linear")[1]
    raw = file.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    config = json.loads(metadata["config"])
    HOSTILE[attack][0](config)
    save_file(load_file(file), tmp_path / "m.safetensors", {**metadata, "config": json.dumps(config)})
    with pytest.raises(ValueError, match="wanted a packed model, got one that cannot be used") as error:
        load(tmp_path / "m.safetensors")
    assert HOSTILE[attack][1] in str(error.value)
    assert "\n" not in str(error.value)
