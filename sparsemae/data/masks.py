"""From mask files to classes and back: which value (or color) means which class, and what is not counted.

Inside the program a mask is uint8: classes from 0, and 255 for a pixel that is ignored. In files, the pixels of an
index mask are values (1, 8 or 16 bits; a palette PNG's are its indices, never its colors); color masks need a table.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sparsemae.data.images import open_image, own_maxval, reason, stored_orientation
from sparsemae.files import existing
from sparsemae.limits import MAX_PIXELS

IGNORED = 255
MAX_CLASSES = 254
SCENEPARSE150 = Path(__file__).parent / "sceneparse150.txt"
"""The first name of each class in the data set's own list."""
IGNORED_NAME = "ignore"
OPACITY = 0.55
"""Of the classes' colors over an image."""
_FULL_ADE20K = "; masks of the full ADE20K? wanted those of SceneParse150 (ADEChallengeData2016)"


@dataclass(frozen=True)
class Legend:
    """What the values of mask files mean."""

    class_names: list[str]
    reduce_zero_label: bool = False
    """0 is "not annotated" and ignored, class c is c + 1 (as in SceneParse150)."""
    ignore_label: int = 255
    """Value that is ignored, whatever class it would be."""
    colors: dict[tuple[int, int, int], int] | None = None
    """Class of a color mask's colors, `IGNORED` among them; None: there are only index masks."""
    full_ade20k_hint: bool = False
    """Say, of values that are none, that they may be those of the full ADE20K."""

    def decode(self, mask: np.ndarray, name: str | Path) -> np.ndarray:
        """What `read_mask` gives to classes, uint8 ``[H, W]``.

        Raises ValueError naming the file and the first value or color that is no class.
        """
        hint = _FULL_ADE20K if self.full_ade20k_hint else ""
        if mask.ndim == 3:
            if self.colors is None:
                raise ValueError(
                    f"{name}: wanted class indices, got a color mask: it needs colors in data.classes{hint}"
                )
            return self._decode_colors(mask, name)
        known = (mask >= 0) & (mask < len(self._table))
        classes = self._table[np.where(known, mask, 0)]
        wrong = ~known | (classes < 0)
        if wrong.any():
            highest = len(self.class_names) - 1 + self.reduce_zero_label
            raise ValueError(
                f"{name}: label value {int(mask[wrong][0])}: wanted 0 to {highest}, "
                f"or {self.ignore_label} for ignored{hint}"
            )
        return classes.astype(np.uint8)

    def encode(self, classes: np.ndarray) -> np.ndarray:
        """Classes uint8 ``[H, W]`` to the values of an index mask."""
        return np.where(classes == IGNORED, IGNORED, classes + self.reduce_zero_label).astype(np.uint8)

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """One color per class: the table's own, or made up."""
        if self.colors is None:
            return distinct_colors(len(self.class_names))
        by_class = {index: color for color, index in self.colors.items()}
        return [by_class[index] for index in range(len(self.class_names))]

    @cached_property
    def _table(self) -> np.ndarray:
        """Class of each value of an index mask; -1: it is none."""
        table = np.full(1 << 16, -1, np.int16)
        first = int(self.reduce_zero_label)
        table[first : first + len(self.class_names)] = np.arange(len(self.class_names))
        if self.reduce_zero_label:
            table[0] = IGNORED
        table[self.ignore_label] = IGNORED
        return table

    def _decode_colors(self, mask: np.ndarray, name: str | Path) -> np.ndarray:
        assert self.colors is not None
        known = sorted((_rgb_code(np.array(color)), index) for color, index in self.colors.items())
        codes, classes = (np.array(column) for column in zip(*known, strict=True))
        got = _rgb_code(mask)
        at = np.searchsorted(codes, got).clip(max=len(codes) - 1)
        wrong = codes[at] != got
        if wrong.any():
            color = tuple(int(value) for value in mask[wrong][0])
            raise ValueError(f"{name}: color {color}: wanted one of the {len(codes)} of data.classes")
        found: np.ndarray = classes[at].astype(np.uint8)
        return found


def _rgb_code(colors: np.ndarray) -> np.ndarray:
    """RGB ``[..., 3]`` as one number each."""
    code: np.ndarray = colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    return code


def read_classes(file: str | Path) -> tuple[list[str], dict[tuple[int, int, int], int] | None]:
    """Names, and colors if there are any, of a file with one class a line: ``name``, or ``R G B name``.

    The color of a line named "ignore" is ignored. Raises ValueError, naming file and line, if it is not such a file.
    """
    try:
        lines = [line.strip() for line in existing(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.classes: {file}: wanted a text file with one class a line: {error}") from error
    table = [_color_line(line) for line in lines]
    names = lines
    colors: dict[tuple[int, int, int], int] | None = None
    if any(table):
        colors, names = {}, []
        for line, entry in zip(lines, table, strict=True):
            if entry is None or entry[0] in colors:
                raise ValueError(f"data.classes: {file}: wanted R G B NAME with a color of its own, got {line!r}")
            colors[entry[0]] = IGNORED if entry[1] == IGNORED_NAME else len(names)
            names += [entry[1]] * (entry[1] != IGNORED_NAME)
    if not 2 <= len({*names}) == len(names) <= MAX_CLASSES:
        got = f"{len({*names})} in {len(names)} lines"
        raise ValueError(f"data.classes: {file}: wanted 2 to {MAX_CLASSES} different names, got {got}")
    return names, colors


def _color_line(line: str) -> tuple[tuple[int, int, int], str] | None:
    *rgb, name = line.split(maxsplit=3)
    if len(rgb) != 3 or not all(value.isdecimal() and int(value) < 256 for value in rgb):
        return None
    red, green, blue = map(int, rgb)
    return (red, green, blue), name


def read_mask(file: str | Path, table: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An index mask's values ``[H, W]``, or a color mask's colors uint8 ``[H, W, 3]``.

    Without a color ``table``, colors that are all gray are values.

    Raises ValueError naming the file if it is unreadable, too large, or neither, or its values are scaled when read.
    """
    try:
        with open_image(file, max_pixels) as opened:
            if maxval := own_maxval(opened):
                raise ValueError(f"wanted values of 1, 8 or 16 bits, got some up to {maxval}, which would be scaled")
            if opened.format == "TIFF" and stored_orientation(opened) != 1:
                raise ValueError(f"wanted a TIFF saved upright, got orientation {stored_orientation(opened)}")
            if opened.mode in ("RGB", "RGBA"):
                colors = np.asarray(opened.convert("RGB"))
                gray = (colors == colors[:, :, :1]).all()
                return colors[:, :, 0].astype(np.int32) if gray and not table else colors
            image = opened.getchannel("L") if opened.mode == "LA" else opened
            if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.int32)
            mode = image.mode
    except Exception as error:
        raise ValueError(f"{file}: unreadable mask: {reason(error)}") from error
    raise ValueError(f"{file}: wanted a mask of indices or colors, got an image of mode {mode}")


def overlaid(image: Image.Image, classes: np.ndarray, palette: Sequence[Sequence[int]], line: int = 1) -> Image.Image:
    """An RGB image under the colors of its classes uint8 ``[H, W]``, with white outlines of ``line`` px between them.

    Ignored pixels stay as they are.
    """
    colors = np.zeros((256, 3), np.float32)
    colors[: len(palette)] = palette
    blended = np.array(image, np.float32)
    known = classes != IGNORED
    blended[known] = blended[known] * (1 - OPACITY) + colors[classes[known]] * OPACITY
    edge = np.zeros(classes.shape, bool)
    for px in range(1, line + 1):
        edge[px:] |= classes[px:] != classes[:-px]
        edge[:, px:] |= classes[:, px:] != classes[:, :-px]
    blended[edge] = 255
    return Image.fromarray(blended.astype(np.uint8))


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Gray, for background or wall, then colors whose neighbors differ: hues a golden section apart."""
    colors = [(150, 150, 150)]
    for i in range(1, count):
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.85, 0.55, 0.75)[i % 3], (0.95, 0.9, 0.6)[i // 3 % 3])
        colors.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return colors


def turned_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Classes uint8 ``[H, W]`` turned as EXIF's orientation turns their image."""
    image = Image.fromarray(mask)
    image.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(image))
