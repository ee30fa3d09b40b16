"""JPEGs by torchvision: the reference's pixels to a rounding, its draws, its errors, and its own way where it must."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Figure
from PIL import Image

from sparsemae.data import jpeg
from sparsemae.data.dataset import ImageDataset
from sparsemae.data.images import DefaultRules, decode_rgb
from sparsemae.data.sources import open_source
from sparsemae.data.transforms import training_transform
from sparsemae.options.data import ImageDataConfig

MODES = ("RGB", "L", "CMYK")
SIZES = ((500, 375), (37, 61), (225, 224), (1, 9))


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Something with edges, gradients and noise."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (5 + 3 * c) + y / (9 - 2 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    pixels = (np.stack(waves, 2) + noise + 60 * ((x // 20 + y // 16) % 2)[..., None]).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def saved(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    image.save(content, "JPEG", exif=exif, **options)
    return content.getvalue()


def cases() -> dict[str, bytes]:
    found = {
        f"{mode} {width}x{height}": saved(photograph(width, height, mode)) for mode in MODES for width, height in SIZES
    }
    found |= {f"EXIF {turned}": saved(photograph(70, 44), turned) for turned in range(1, 10)}
    ways: dict[str, dict[str, Any]] = {
        "progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1},
        "restarts": {"restart_marker_rows": 1}, "low quality": {"quality": 5}, "as RGB": {"keep_rgb": True},
    }  # fmt: skip
    for name, options in ways.items():
        found[name] = saved(photograph(301, 203), 1, **options)
    return found


def read(decoder: Any, content: bytes, **options: Any) -> np.ndarray | str:
    """Pixels ``[H, W, 3]``, or the error."""
    try:
        image = decoder(io.BytesIO(content), "a.jpg", **options)
    except ValueError as error:
        return str(error)
    return np.asarray(image) if isinstance(image, Image.Image) else image.pixels.permute(1, 2, 0).numpy()


@pytest.mark.holds("fast.8")
@pytest.mark.parametrize("exif", [True, False])
def test_what_is_decoded_is_the_references(exif: bool, figure: Figure) -> None:
    worst = 0.0
    for name, content in cases().items():
        wanted, got = (read(decoder, content, rules=DefaultRules(exif=exif)) for decoder in (decode_rgb, jpeg.decode))
        assert isinstance(wanted, np.ndarray), name
        assert isinstance(got, np.ndarray), name
        assert wanted.shape == got.shape, name
        worst = max(worst, float(np.abs(wanted.astype(int) - got.astype(int)).mean()))
    figure(f"decoded: at most {worst:.3f} of 255 in the mean")
    assert worst < 1


def test_plain_jpegs_and_no_others_are_torchvisions() -> None:
    ways = {name: jpeg.decode(io.BytesIO(content), name) for name, content in cases().items()}
    by_pillow = {name for name, image in ways.items() if isinstance(image, Image.Image)}
    assert by_pillow == {name for name in ways if name.startswith("CMYK")}
    content = io.BytesIO()
    photograph(20, 20).save(content, "PNG")
    assert isinstance(jpeg.decode(content, "a.png"), Image.Image)


def test_a_torchvision_that_decodes_no_more_is_refused(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(ImageDataConfig(source="folder", root=str(image_folder)), "train")
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert jpeg.decoded_by("pillow", source) is source
    with pytest.raises(ValueError, match=r"^data\.jpeg: wanted pillow, or a torchvision that decodes, got "):
        jpeg.decoded_by("torchvision", source)


@pytest.mark.holds("fast.8")
def test_errors_are_the_references() -> None:
    whole = saved(photograph(120, 90))
    harmed = {f"cut at {end}": whole[:end] for end in (0, 1, 3, 20, 200, len(whole) // 2, len(whole) - 200)}
    harmed |= {f"without its last {count}": whole[:-count] for count in (1, 2, 3, 8)}
    rng = random.Random(0)
    for number in range(200):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 4, 16))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        harmed[f"bytes {number}"] = bytes(changed)
    same = 0
    for name, content in harmed.items():
        wanted, got = read(decode_rgb, content), read(jpeg.decode, content)
        if isinstance(wanted, str) or isinstance(got, str):
            assert wanted == got, name
            same += 1
    assert same > 20
    for options in ({"smallest": 100}, {"max_pixels": 120 * 90 - 1}):
        assert read(decode_rgb, whole, **options) == read(jpeg.decode, whole, **options)
        assert isinstance(read(jpeg.decode, whole, **options), str)


@pytest.mark.holds("fast.8")
@pytest.mark.parametrize(
    "options",
    [{}, {"interpolation": "bilinear"}, {"crop": "shift"}, {"auto_augment": "original"}, {"crop_scale": (0.05, 0.1)}],
)
@pytest.mark.slow
def test_samples_are_the_references_to_a_rounding(options: dict[str, Any], tmp_path: Path, figure: Figure) -> None:
    for number, content in enumerate(cases().values()):
        file = tmp_path / f"train/{'cat' if number % 2 else 'dog'}/{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    data = ImageDataConfig(source="folder", root=str(tmp_path), img_size=96, val_share=0.01, **options)
    source, transform = open_source(data, "train"), training_transform(data)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(source))]
    reference, faster = (ImageDataset(jpeg.decoded_by(by, source), transform) for by in ("pillow", "torchvision"))
    differences = []
    by_torchvision = [isinstance(faster.source.read(index)[0], jpeg.Decoded) for index in range(len(source))]
    assert sum(by_torchvision) > 20
    for key in keys:
        wanted, got = reference[key], faster[key]
        assert isinstance(wanted, dict)
        assert isinstance(got, dict)
        assert got["image"].shape == (3, 96, 96)
        assert got["image"].dtype == torch.uint8
        differences.append(float((got["image"].int() - wanted["image"].int()).abs().float().mean()))
    figure(f"{options}: {np.mean(differences):.3f} of 255 in the mean, at most {max(differences):.3f}")
    assert max(differences) < 1
