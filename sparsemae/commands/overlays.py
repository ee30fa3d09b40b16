"""Pictures of what a segmenter sees: masks as palette PNGs, and overlays with a legend.

A mask's values are those of the data set that the model was trained on: it may stand where an annotation stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as transforms

from sparsemae.data.classification import decode_rgb
from sparsemae.data.masks import Labels
from sparsemae.sparsity import hold_masks
from sparsemae.tasks.build import load_segmenter
from sparsemae.commands.predict import Images
from sparsemae.tasks.sliding_window import InferenceConfig, predict_scores
from sparsemae.training.logs import RunLog

Shares = list[tuple[str, float]]
"""Classes of an image with their shares of its pixels, largest first."""
OPACITY = 0.55
SMALLEST_SIDE = 320
"""Of an overlay, px: a smaller image is magnified."""
FONT_SIZE, ROW, SWATCH, MARGIN, LINE = 15, 22, 14, 10, 1
"""Of the legend and the outlines, px, while the image's shorter side is at most `LEGIBLE_SIDE`; in proportion above."""
LEGIBLE_SIDE = 700


def predict_masks(model: str, images: Images, out: Path) -> Iterator[tuple[Path, Shares]]:
    """Write ``STEM.png`` and ``STEM-overlay.png`` for each file that can be read; yields it with the classes found.

    Raises ValueError if two files have one stem, or a picture would be written over one of the files.
    """
    files = images.files
    targets = {file: (out / f"{file.stem}.png", out / f"{file.stem}-overlay.png") for file in files}
    written: dict[Path, Path] = {}
    for file, pictures in targets.items():
        for picture in pictures:
            other = written.setdefault(picture, file)
            if other != file or picture.resolve() in {given.resolve() for given in files}:
                raise ValueError(f"out: {picture}: wanted a new name for the mask of {file}, got that of {other}")
    segmenter, description = load_segmenter(model)
    prepared, inference = description["input"], InferenceConfig(**description["inference"])
    names, palette = description["class_names"], [tuple(colour) for colour in description["palette"]]
    labels = Labels(names, description["reduce_zero_label"])
    out.mkdir(parents=True, exist_ok=True)
    progress = RunLog(None).progress("predicting", 0, len(files), 1, unit="image")
    with torch.inference_mode(), hold_masks(segmenter), progress as shown:
        for done, (file, image) in enumerate(images.read(lambda f: decode_rgb(f, str(f), exif=prepared["exif"])), 1):
            mask, overlay = targets[file]
            pixels = transforms.pil_to_tensor(image)[None]
            scores = predict_scores(lambda x: segmenter(x).logits, pixels, prepared, inference)
            classes = scores[0].argmax(dim=0).numpy().astype(np.uint8)
            palette_image(classes, labels, palette).save(mask)
            counts = np.bincount(classes.ravel(), minlength=len(names))
            order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
            shares = [(names[index], float(counts[index] / classes.size)) for index in order]
            overlay_image(image, classes, palette, shares, [palette[index] for index in order]).save(overlay)
            shown.advance(done, file.name)
            yield file, shares


def palette_image(classes: np.ndarray, labels: Labels, palette: Sequence[tuple[int, ...]]) -> Image.Image:
    """Classes uint8 ``[H, W]`` as a palette image of the data set's own values."""
    picture = Image.fromarray(labels.encode(classes))
    colours = np.zeros((256, 3), np.uint8)
    colours[labels.encode(np.arange(len(palette), dtype=np.uint8))] = palette
    picture.putpalette(colours.tobytes())
    return picture


def overlay_image(
    image: Image.Image,
    classes: np.ndarray,
    palette: Sequence[tuple[int, ...]],
    shares: Shares,
    swatches: Sequence[tuple[int, ...]],
) -> Image.Image:
    """The image under its classes' colours, outlines between them, and a legend of the classes at its right."""
    factor = max(1, -(-SMALLEST_SIDE // min(image.size)))
    size = (image.width * factor, image.height * factor)
    classes = classes.repeat(factor, axis=0).repeat(factor, axis=1)
    base = np.asarray(image.resize(size, Image.Resampling.NEAREST), np.float32)
    blended = base * (1 - OPACITY) + np.array(palette, np.float32)[classes] * OPACITY
    larger = max(1.0, min(size) / LEGIBLE_SIDE)  # or a full-size photograph's legend could not be read
    font_size, row_height, swatch, margin, line = (round(larger * px) for px in (FONT_SIZE, ROW, SWATCH, MARGIN, LINE))
    edge = np.zeros(classes.shape, bool)
    for px in range(1, line + 1):
        edge[px:] |= classes[px:] != classes[:-px]
        edge[:, px:] |= classes[:, px:] != classes[:, :-px]
    blended[edge] = 255

    font = ImageFont.load_default(font_size)
    room = (size[1] - 2 * margin) // row_height
    shown = len(shares) if len(shares) <= room else room - 1
    lines = [f"{name} {share:.1%}" for name, share in shares[:shown]]
    if shown < len(shares):
        lines.append(f"and {len(shares) - shown} more")
    width = max(int(font.getlength(text)) for text in lines) + swatch + 3 * margin
    picture = Image.new("RGB", (size[0] + width, size[1]), "white")
    picture.paste(Image.fromarray(blended.astype(np.uint8)))
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(lines):
        left, top = size[0] + margin, margin + row * row_height
        if row < shown:
            draw.rectangle((left, top, left + swatch, top + swatch), fill=swatches[row], outline="black")
        draw.text((left + swatch + margin, top - 2 * larger), text, fill="black", font=font)
    return picture
