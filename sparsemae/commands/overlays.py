"""Pictures of what a segmenter sees: masks as palette PNGs, and overlays with a legend.

A mask's values are those of the data set that the model was trained on: it may be used where an annotation is.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemae.card import ModelCard
from sparsemae.data.masks import Legend, overlaid
from sparsemae.files import replacing
from sparsemae.predictor import Prediction

SMALLEST_SIDE = 320
"""Of an overlay, px: a smaller image is magnified."""
LARGEST = 1 << 22
"""Pixels of a magnified image: a strip stays as narrow as that takes."""
FONT_SIZE, ROW, SWATCH, MARGIN, LINE = 15, 22, 14, 10, 1
"""Of the legend and the outlines, px, while the image's shorter side is at most `LEGIBLE_SIDE`; in proportion above."""
LEGIBLE_SIDE = 700


class Pictures:
    """``STEM.png`` and ``STEM-overlay.png`` in a folder for each of some image files.

    Raises ValueError if two files have one stem, or a picture would be written over one of the files.
    """

    def __init__(self, card: ModelCard, files: Sequence[Path], out: Path) -> None:
        self.targets = {file: (out / f"{file.stem}.png", out / f"{file.stem}-overlay.png") for file in files}
        written, given = dict[Path, Path](), {file.resolve() for file in files}
        for file, pictures in self.targets.items():
            for picture in pictures:
                other = written.setdefault(picture, file)
                if other != file or picture.resolve() in given:
                    raise ValueError(
                        f"pictures: {picture}: wanted a new name for the mask of {file}, got that of {other}"
                    )
        self.names, self.palette = card.class_names, [tuple(color) for color in card.settings["palette"]]
        self.legend = Legend(list(card.class_names), card.settings["reduce_zero_label"])
        out.mkdir(parents=True, exist_ok=True)

    def write(self, file: Path, image: Image.Image, classes: np.ndarray) -> list[Prediction]:
        """Write both for the classes uint8 ``[H, W]`` of an RGB image; returns the classes found, largest first."""
        mask, overlay = self.targets[file]
        counts = np.bincount(classes.ravel(), minlength=len(self.names))
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        areas = [Prediction(self.names[index], index, float(counts[index] / classes.size)) for index in order]
        with replacing(mask) as temporary:
            palette_image(classes, self.legend, self.palette).save(temporary, "PNG")
        with replacing(overlay) as temporary:
            overlay_image(image, classes, self.palette, areas).save(temporary, "PNG")
        return areas


def palette_image(classes: np.ndarray, legend: Legend, palette: Sequence[tuple[int, ...]]) -> Image.Image:
    """Classes uint8 ``[H, W]`` as a palette image of the data set's own values."""
    picture = Image.fromarray(legend.encode(classes))
    colors = np.zeros((256, 3), np.uint8)
    colors[legend.encode(np.arange(len(palette), dtype=np.uint8))] = palette
    picture.putpalette(colors.tobytes())
    return picture


def overlay_image(
    image: Image.Image,
    classes: np.ndarray,
    palette: Sequence[tuple[int, ...]],
    areas: Sequence[Prediction],
) -> Image.Image:
    """The image under its classes' colors, outlines between them, and a legend of the classes at its right."""
    factor = max(1, min(-(-SMALLEST_SIDE // min(image.size)), math.isqrt(LARGEST // (image.width * image.height))))
    size = (image.width * factor, image.height * factor)
    classes = classes.repeat(factor, axis=0).repeat(factor, axis=1)
    larger = max(1.0, min(size) / LEGIBLE_SIDE)  # or a full-size photograph's legend could not be read
    font_size, row_height, swatch, margin, line = (round(larger * px) for px in (FONT_SIZE, ROW, SWATCH, MARGIN, LINE))
    font = ImageFont.load_default(font_size)
    room = (size[1] - 2 * margin) // row_height
    shown = len(areas) if len(areas) <= room else room - 1
    lines = [f"{area.label} {area.probability:.1%}" for area in areas[:shown]]
    if shown < len(areas):
        lines.append(f"and {len(areas) - shown} more")
    width = max(int(font.getlength(text)) for text in lines) + swatch + 3 * margin
    picture = Image.new("RGB", (size[0] + width, size[1]), "white")
    picture.paste(overlaid(image.resize(size, Image.Resampling.NEAREST), classes, palette, line))
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(lines):
        left, top = size[0] + margin, margin + row * row_height
        if row < shown:
            draw.rectangle((left, top, left + swatch, top + swatch), fill=palette[areas[row].index], outline="black")
        draw.text((left + swatch + margin, top - 2 * larger), text, fill="black", font=font)
    return picture
