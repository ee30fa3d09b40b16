"""Every kind of image becomes the RGB that timm gives."""

from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image
from timm.data.readers import create_reader

from sparsemae.card import InputSpec
from sparsemae.data.images import DefaultRules, PixelRules, as_rgb, decode_rgb
from sparsemae.data.survey import Traits
from sparsemae.data.tree import image_files

BEFORE = InputSpec(16, (), ())
"""The rules of models of before."""


MODES = {  # of Pillow, and a file format that keeps it
    "1": "png", "L": "jpg", "LA": "png", "P": "png", "RGB": "jpg", "RGBA": "png", "CMYK": "jpg", "YCbCr": "jpg",
    "I;16": "png", "I": "tif", "F": "tif",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its files open
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_rgb_of_timm_by_the_rules_of_before(tmp_path: Path, mode: str) -> None:
    gradient = np.linspace(0, 511 if mode in ("I;16", "I", "F") else 255, 16 * 16 * 3).reshape(16, 16, 3)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(gradient[:, :, 0].astype(kind))
    else:
        image = Image.fromarray(gradient.astype(np.uint8)).convert(mode)
    file = tmp_path / f"image.{MODES[mode]}"
    image.save(file)
    assert Image.open(file).mode == ("RGB" if mode == "YCbCr" else mode)
    reader = create_reader("", str(tmp_path), class_map={"": 0}) if file.suffix != ".tif" else None
    got = np.asarray(decode_rgb(file, str(file), rules=BEFORE))
    assert got.shape == (16, 16, 3)
    if reader is not None:
        theirs = timm.data.ImageDataset(str(tmp_path), reader=reader)[0][0]
        np.testing.assert_array_equal(got, np.asarray(theirs))
    if mode in ("L", "LA"):
        np.testing.assert_array_equal(got[:, :, 0], np.asarray(Image.open(file).convert("L")))
    if mode in ("I;16", "I", "F"):  # clipped, not scaled
        np.testing.assert_array_equal(got[:, :, 1], np.asarray(image).astype(np.int64).clip(0, 255))


def test_files_of_a_folder_and_images_of_the_caller(tmp_path: Path) -> None:
    for name in ("b/2.png", "1.bmp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(file.relative_to(tmp_path)) for file in image_files(tmp_path)] == ["1.bmp", "b/2.png"]
    assert image_files(tmp_path / "1.bmp") == [tmp_path / "1.bmp"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: wanted image files, found none"):
        image_files(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"absent\.png: unreadable image: No such file"):
        as_rgb(tmp_path / "absent.png")
    gray = Image.new("L", (4, 3), 7)
    assert (as_rgb(gray).mode, as_rgb(gray).getpixel((0, 0)), gray.size) == ("RGB", (7, 7, 7), (4, 3))


@pytest.mark.parametrize("kind", ["P2", "P5"])
def test_the_range_that_a_pgm_says_is_not_scaled_again(tmp_path: Path, kind: str) -> None:
    values = np.array([0, 1024, 2048, 4095])
    pixels = {"P2": b"0 1024 2048 4095\n", "P5": values.astype(">u2").tobytes()}[kind]
    for maxval, wanted in ((4095, [0, 64, 128, 255]), (65535, [0, 64, 128, 255])):
        (tmp_path / "x.pgm").write_bytes(f"{kind} 4 1 {maxval}\n".encode() + pixels)
        assert channel(tmp_path / "x.pgm", DefaultRules(bits=12)) == wanted
    assert channel(tmp_path / "x.pgm", DefaultRules()) == [0, 4, 8, 16]
    (tmp_path / "x.pgm").write_bytes(f"{kind} 4 1 4095\n".encode() + pixels)
    assert channel(tmp_path / "x.pgm", DefaultRules()) == [0, 64, 128, 255]
    assert channel(tmp_path / "x.pgm", BEFORE) == [0, 255, 255, 255]
    with Image.open(tmp_path / "x.pgm") as image:
        traits = Traits()
        traits.add(image, "x.pgm")
    assert (traits.images, traits.wide) == (1, 0)  # data.bits would change nothing of it


def channel(file: Path, rules: PixelRules) -> list[int]:
    """The first of a row of pixels."""
    return np.asarray(as_rgb(file, rules))[0, :, 0].tolist()
