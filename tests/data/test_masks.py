"""Mask files of every kind to classes, and what is no class."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsemae.data.masks import IGNORED, SCENEPARSE150, Legend, distinct_colors, read_classes, read_mask

VALUES = np.array([[0, 1, 2], [3, 2, 255]])


def saved(folder: Path, kind: str) -> Path:
    file = folder / f"{kind}.png"
    if kind == "16-bit":
        Image.fromarray(VALUES.astype(np.uint16)).save(file)
        with Image.open(file) as written:
            assert written.mode == "I;16"
    else:
        picture = Image.fromarray(VALUES.astype(np.uint8))
        if kind == "palette":
            picture.putpalette([255 - i for i in range(256) for _ in range(3)])
        picture.save(file)
    return file


@pytest.mark.parametrize("kind", ["8-bit", "16-bit", "palette"])
def test_index_masks_are_read_as_indices(tmp_path: Path, kind: str) -> None:
    read = read_mask(saved(tmp_path, kind))
    assert np.array_equal(read, VALUES)
    assert Legend(["a", "b", "c", "d"]).decode(read, "m").tolist() == [[0, 1, 2], [3, 2, IGNORED]]
    reduced = Legend(["a", "b", "c"], reduce_zero_label=True)
    assert reduced.decode(read, "m").tolist() == [[IGNORED, 0, 1], [2, 1, IGNORED]]
    assert reduced.encode(reduced.decode(read, "m")).tolist() == [[IGNORED, 1, 2], [3, 2, IGNORED]]
    assert Legend(["a", "b", "c", "d"], ignore_label=2).decode(VALUES % 255, "m")[0].tolist() == [0, 1, IGNORED]


def test_a_mask_of_one_bit_has_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(VALUES > 1).save(tmp_path / "bits.png")
    with Image.open(tmp_path / "bits.png") as picture:
        assert picture.mode == "1"
    assert read_mask(tmp_path / "bits.png").tolist() == [[0, 0, 1], [1, 1, 1]]


def test_color_masks_need_a_table(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("0 0 0 ignore\n128 0 0 tall tree\n\n0 128 0 sky\n")
    names, colors = read_classes(tmp_path / "classes.txt")
    assert names == ["tall tree", "sky"]
    pixels = np.array([[[128, 0, 0], [0, 128, 0], [0, 0, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    labels = Legend(names, colors=colors)
    assert labels.decode(read_mask(tmp_path / "m.png"), "m").tolist() == [[0, 1, IGNORED]]
    assert labels.palette == [(128, 0, 0), (0, 128, 0)]
    with pytest.raises(ValueError, match=r"m: color \(0, 0, 1\): wanted one of the 3 of data.classes"):
        labels.decode(pixels[:, 2:] + np.array([0, 0, 1], np.uint8), "m")
    with pytest.raises(ValueError, match="m: wanted class indices, got a color mask"):
        Legend(names).decode(pixels, "m")


@pytest.mark.parametrize("value", [4, 254, 256, 65_535, 70_000, -1])
def test_values_that_are_no_class_are_named(value: int) -> None:
    with pytest.raises(ValueError, match=f"m: label value {value}: wanted 0 to 3, or 255 for ignored$"):
        Legend(["a", "b", "c", "d"]).decode(np.array([[0, value]]), "m")


def test_sceneparse150() -> None:
    names, colors = read_classes(SCENEPARSE150)
    assert (len(names), names[0], names[12], names[149], colors) == (150, "wall", "person", "flag", None)
    labels = Legend(names, reduce_zero_label=True, full_ade20k_hint=True)
    assert labels.decode(np.array([[0, 1, 150]]), "m").tolist() == [[IGNORED, 0, 149]]
    with pytest.raises(ValueError, match=r"label value 151: wanted 0 to 150, .* masks of the full ADE20K\?"):
        labels.decode(np.array([[151]]), "m")
    assert len(set(distinct_colors(150))) == 150


@pytest.mark.parametrize(
    "text", ["one\n", "a\na\n", "0 0 0 a\nb\n", "1 2 3 a\n1 2 3 b\n", "".join(f"c{i}\n" for i in range(255))]
)
def test_files_of_classes_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=r"data\.classes: .*classes\.txt: wanted"):
        read_classes(tmp_path / "classes.txt")


def test_unreadable_masks(tmp_path: Path) -> None:
    (tmp_path / "m.png").write_text("no")
    with pytest.raises(ValueError, match=r"m\.png: unreadable mask: not an image in a known format"):
        read_mask(tmp_path / "m.png")
    Image.new("CMYK", (2, 2)).save(tmp_path / "cmyk.tif")
    with pytest.raises(ValueError, match="wanted a mask of indices or colors, got an image of mode CMYK"):
        read_mask(tmp_path / "cmyk.tif")
