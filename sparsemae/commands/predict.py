"""Predictions for image files, by a packed file (without torch) or by a run's model, a segmenter's as pictures."""

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sparsemae
from sparsemae.commands.overlays import Pictures
from sparsemae.data.images import PixelRules, as_rgb
from sparsemae.data.tree import image_files
from sparsemae.options import PredictConfig
from sparsemae.predictor import Prediction
from sparsemae.terminal import printable

BATCH = 8


def predict(config: PredictConfig) -> dict[str, Any]:
    """Print and return, per file, the ``top_k`` classes with their probabilities, or a segmenter's with their areas.

    Each is printed as soon as it is known. Images that cannot be read are named on stderr and left out; in the end a
    ValueError counts them.
    """
    files = [file for path in config.images for file in image_files(Path(path))]
    predictor = sparsemae.load(config.model)
    pictures = Pictures(predictor.card, files, Path(config.out)) if "palette" in predictor.card.settings else None
    images = _Images(files, predictor.card.input, config.max_pixels)
    results: dict[str, Any] = {}
    rest = iter(images)
    while batch := list(islice(rest, 1 if pictures else BATCH)):
        found = predictor.predict([image for _, image in batch], config.top_k)
        for (file, image), result in zip(batch, found, strict=True):
            best = pictures.write(file, image, result)[: config.top_k] if pictures else result
            results[str(file)] = best
            print(printable(f"{file}: {_shown(best)}"), flush=True)
    if images.unreadable:
        raise ValueError(f"{images.unreadable} of {len(files)} images could not be read; the others are done")
    return results


class _Images:
    """Image files, of which some may not be readable. One alone must be."""

    def __init__(self, files: Sequence[Path], rules: PixelRules, max_pixels: int) -> None:
        self.files, self.rules, self.max_pixels, self.unreadable = files, rules, max_pixels, 0

    def __iter__(self) -> Iterator[tuple[Path, Image.Image]]:
        """Files with their RGB image, or their names on stderr."""
        for file in self.files:
            try:
                image = as_rgb(file, self.rules, self.max_pixels)
            except (ValueError, OSError) as error:
                if len(self.files) == 1:
                    raise
                self.unreadable += 1
                print(f"sparsemae predict: {printable(' '.join(str(error).split()))}", file=sys.stderr)
            else:
                yield file, image


def _shown(result: Any) -> str:
    if isinstance(result, list) and all(isinstance(best, Prediction) for best in result):
        return ", ".join(f"{best.label} {best.probability:.1%}" for best in result)
    return f"{result:.4g}" if isinstance(result, float | np.floating) else str(result)
