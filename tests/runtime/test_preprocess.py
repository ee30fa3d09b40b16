"""Preprocessing agrees with timm's evaluation transform to the pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsemae.card import InputSpec
from sparsemae.data.images import as_rgb
from sparsemae.packing.metadata import INTERPOLATIONS
from sparsemae.runtime.preprocess import transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_image(path: Path, spec: InputSpec, height: int, width: int) -> np.ndarray:
    return transform(as_rgb(path, spec), spec, height, width)


def photo(path: Path, width: int, height: int, mode: str = "RGB", **save: Any) -> Path:
    """A JPEG or PNG with edges, gradients and noise."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    channels = [127 + 90 * np.sin(x / (3 + c) + y / 7) + 20 * rng.standard_normal((height, width)) for c in range(3)]
    Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)).convert(mode).save(path, **save)
    return path


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize(
    ("size", "crop_pct"), [((224, 224), 0.875), ((224, 224), 0.9), ((96, 160), 1.0), ((28, 28), 1.0), ((160, 96), 0.95)]
)
def test_agrees_with_timm_to_the_bit(
    size: tuple[int, int], crop_pct: float, interpolation: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    create_transform = pytest.importorskip("timm.data").create_transform
    theirs = create_transform((3, *size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_pct)
    ours = InputSpec(size[0], MEAN, STD, interpolation, crop_pct)
    for width, height in ((500, 375), (333, 501), (257, 256), (640, 97), (31, 50), (224, 224)):
        path = photo(tmp_path / f"{width}.jpg", width, height, quality=90)
        wanted = theirs(Image.open(path).convert("RGB")).numpy()
        assert (load_image(path, ours, *size) == wanted).all()


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png")]
)
def test_every_mode_becomes_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    image = load_image(photo(tmp_path / f"x.{suffix}", 60, 40, mode), InputSpec(16, MEAN, STD), 16, 16)
    assert image.shape == (3, 16, 16)
    assert image.dtype == np.float32
    assert np.isfinite(image).all()


def test_an_image_of_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^image: wanted mode RGB, got L$"):
        transform(Image.new("L", (60, 40)), InputSpec(16, MEAN, STD), 16, 16)


def test_exif_orientation_is_a_setting(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    path = photo(tmp_path / "x.png", 16, 16, exif=exif)
    plain = load_image(path, InputSpec(16, MEAN, STD, "nearest"), 16, 16)
    upright = load_image(path, InputSpec(16, MEAN, STD, "nearest", exif=True), 16, 16)
    assert (upright == plain[:, ::-1, ::-1]).all()


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    spec = InputSpec(16, MEAN, STD)
    with pytest.raises(ValueError, match=r"x\.jpg: "):
        load_image(tmp_path / "x.jpg", spec, 16, 16)
    with pytest.raises((FileNotFoundError, ValueError), match=r"absent\.jpg"):
        load_image(tmp_path / "absent.jpg", spec, 16, 16)


def test_every_interpolation_of_packed_files_is_pillows(tmp_path: Path) -> None:
    path = photo(tmp_path / "x.png", 60, 40)
    for name in INTERPOLATIONS:
        assert load_image(path, InputSpec(16, MEAN, STD, name), 16, 16).shape == (3, 16, 16)
