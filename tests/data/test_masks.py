"""Mask files of every kind to classes, and what is no class."""

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsemae.data.images import DefaultRules
from sparsemae.data.masks import IGNORED, SCENEPARSE150, Legend, distinct_colors, read_classes, read_mask
from sparsemae.data.pairs import find_masks
from sparsemae.data.splits import Source
from sparsemae.options import MaskDataConfig, SegmentConfig, SourceConfig
from sparsemae.tasks.segmentation import Segmentation

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


def pgm(kind: str, maxval: int, values: list[int]) -> bytes:
    """One row of them, in the magic number's way to write: P5 as bytes, P2 as text; P6 and P3 of three channels."""
    channels = 3 if kind in ("P3", "P6") else 1
    numbers = [value for value in values for _ in range(channels)]
    head = f"{kind} {len(values)} 1 {maxval}\n".encode()
    if kind in ("P2", "P3"):
        return head + " ".join(map(str, numbers)).encode() + b"\n"
    return head + np.array(numbers, np.uint8 if maxval < 256 else ">u2").tobytes()


@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
@pytest.mark.parametrize("maxval", [2, 20, 254, 255, 256, 4095, 65535])
def test_masks_whose_values_pillow_would_scale_are_refused(tmp_path: Path, kind: str, maxval: int) -> None:
    file = tmp_path / "m.pgm"
    file.write_bytes(pgm(kind, maxval, [0, 1, 2]))
    if maxval == 255 or (maxval == 65535 and kind in ("P2", "P5")):  # of 16 bits Pillow has gray alone
        assert read_mask(file).tolist() == [[0, 1, 2]]
    else:
        wanted = rf"m\.pgm: unreadable mask: wanted values of 1, 8 or 16 bits, got some up to {maxval}, which would be"
        with pytest.raises(ValueError, match=wanted):
            read_mask(file)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_of_few_bits_is_refused_and_a_palettes_is_read(tmp_path: Path, bits: int) -> None:
    values = np.arange(2**bits, dtype=np.uint8)[None]
    palette = Image.fromarray(values, "L").convert("P")
    palette.save(tmp_path / "palette.png", bits=bits)
    content = (tmp_path / "palette.png").read_bytes()
    assert content[24:26] == bytes([bits, 3])
    assert read_mask(tmp_path / "palette.png").tolist() == values.tolist()
    header = content[12:25] + b"\0" + content[26:29]  # the same pixels as gray
    gray = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    (tmp_path / "gray.png").write_bytes(re.sub(rb"....PLTE.{%d}" % (3 * 2**bits + 4), b"", gray, flags=re.DOTALL))
    if bits == 1:
        assert read_mask(tmp_path / "gray.png").tolist() == values.tolist()
    else:
        with pytest.raises(
            ValueError, match=rf"gray\.png: unreadable mask: wanted .* up to {2**bits - 1}, which would"
        ):
            read_mask(tmp_path / "gray.png")


def a_pair(
    root: Path, way: int, image: str = "a.tiff", mask: str = "a.png", size: tuple[int, int] = (30, 20)
) -> Source:
    """One image of an EXIF orientation, with a mask of the stored size."""
    exif = Image.Exif()
    exif[0x0112] = way
    for kind, file, picture in (("images", image, Image.new("RGB", size)), ("masks", mask, Image.new("L", size))):
        (root / kind).mkdir(parents=True)
        tagged = kind == "images" or file.endswith("tiff")
        picture.save(root / kind / file, exif=exif if tagged else None)
    (root / "classes.txt").write_text("ground\nbox\n")
    return find_masks(SourceConfig("folder", str(root))).whole("train")


@pytest.mark.parametrize("exif", [None, True, False])
@pytest.mark.parametrize("way", [2, 3, 4, 5, 6, 7, 8])
def test_a_turned_tiff_is_refused_whatever_the_rule(tmp_path: Path, way: int, exif: bool | None) -> None:
    """Pillow turns it on load, and nothing turns its mask."""
    with pytest.raises(ValueError, match=rf"a\.tiff: wanted a TIFF with a mask saved upright, .* orientation is {way}"):
        a_pair(tmp_path, way).read(0, rules=DefaultRules(exif=exif))


def test_an_upright_tiff_is_read_and_a_turned_mask_refused(tmp_path: Path) -> None:
    image, target = a_pair(tmp_path / "upright", 1).read(0, rules=DefaultRules(exif=None))
    assert image.size == target.shape[::-1] == (30, 20)
    with pytest.raises(ValueError, match=r"a\.tiff: unreadable mask: wanted a TIFF saved upright, got orientation 3"):
        a_pair(tmp_path / "mask", 3, "a.png", "a.tiff").read(0, rules=DefaultRules(exif=False))


@pytest.mark.parametrize("way", [5, 6, 7, 8])
def test_a_square_image_on_its_side_is_refused_where_it_would_be_turned(tmp_path: Path, way: int) -> None:
    source = a_pair(tmp_path, way, "a.jpg", size=(24, 24))
    with pytest.raises(ValueError, match=rf"a\.jpg: wanted data\.exif false, .* a square one .* orientation is {way}"):
        source.read(0, rules=DefaultRules(exif=True))
    assert source.read(0, rules=DefaultRules(exif=False))[0].size == (24, 24)


def test_masks_are_read_as_a_model_was_trained_unless_the_option_says_otherwise(tmp_path: Path) -> None:
    a_pair(tmp_path, 1)
    trained = {"reduce_zero_label": True, "ignore_label": 2}

    def legend(**options: Any) -> tuple[bool, int]:
        found = find_masks(SourceConfig("folder", str(tmp_path), **options), trained).whole("train").legend
        assert found is not None
        return found.reduce_zero_label, found.ignore_label

    assert legend() == legend(reduce_zero_label=True, ignore_label=2) == (True, 2)
    with pytest.raises(ValueError, match=r"data\.reduce_zero_label: wanted what .* trained with, true, got false"):
        legend(reduce_zero_label=False)
    with pytest.raises(ValueError, match=r"data\.ignore_label: wanted what the model was trained with, 2, got 3"):
        legend(ignore_label=3)
    del trained["ignore_label"]  # a card of before
    assert legend(ignore_label=3) == (True, 3)


def test_a_card_keeps_the_label_that_its_masks_ignore(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind, picture in (("images", Image.new("RGB", (9, 9))), ("masks", Image.new("L", (9, 9)))):
            (tmp_path / kind / split).mkdir(parents=True)
            picture.save(tmp_path / kind / split / "a.png")
    (tmp_path / "classes.txt").write_text("ground\nbox\n")
    task = Segmentation(SegmentConfig(data=MaskDataConfig("folder", str(tmp_path), ignore_label=7)))
    task.open_data()
    assert task.card().data["ignore_label"] == 7


def test_a_table_of_colors_has_no_zero_label(tmp_path: Path) -> None:
    a_pair(tmp_path, 1)
    (tmp_path / "classes.txt").write_text("0 0 0 ground\n255 255 255 box\n")
    data = SourceConfig("folder", str(tmp_path), reduce_zero_label=True)
    with pytest.raises(ValueError, match=r"data\.reduce_zero_label: wanted none with the colors in .*classes\.txt"):
        find_masks(data)
